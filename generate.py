"""Texts that a decoder continues, token by token, with pictures before them or without.

Takes tensors and gives lists of tokens; answering.py makes them of prompts, and texts of them.
Axes as in model.py: B batch, T query, D width, V vocabulary.
"""
import math
from itertools import takewhile

import torch

from model import VLM, make_attn_masks, positions_of


@torch.no_grad()
def generate(model, tokens, pixels=None, max_new_tokens=32, temperature=0.0, top_k=0, top_p=1.0,
             eos_id=-1, pad_id=0, seed=0, use_cache=True, blocks=None):
    """Continue the prompts `tokens` (B, T), padded left or right with pad_id: a list of new token
    lists, one a row. blocks (B, T) of the prompts: by default as the model attends.

    temperature 0 is greedy; top_k 0 and top_p 1 keep every token; a row ends before its eos_id
    (-1: never). Every row samples from its own random stream (seed, row), so what it gets does not
    depend on the length of the others."""
    if blocks is None:
        blocks = torch.ones_like(tokens)
        if isinstance(model, VLM):
            blocks = model.default_blocks(tokens)
    tokens, segments, blocks = left_padded(tokens, pad_id, blocks)
    was_training = model.training
    model.eval()

    decoder = getattr(model, 'decoder', model)
    x = model.embed(tokens, pixels) if isinstance(model, VLM) else model.embed(tokens)

    # Who will see whom is known beforehand: computed once, for the prompts and all that follows.
    batch, prompt = tokens.shape
    following = tokens.new_ones(batch, max_new_tokens)                  # causal
    segments = torch.cat((segments, following), 1)
    masks = make_attn_masks(decoder.config, torch.cat((blocks, following), 1), segments)
    positions = positions_of(segments)
    cache = decoder.new_cache(batch, prompt + max_new_tokens, tokens.device) if use_cache else None
    seeds = [seed * 1_000_003 + row for row in range(batch)]
    generators = [torch.Generator(tokens.device).manual_seed(number) for number in seeds]

    new, is_done = [], torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    start = 0
    for end in range(prompt, prompt + max_new_tokens):
        seen = tuple(mask[:, start:end, :end] for mask in masks)
        hidden = decoder.features(x, cache=cache, positions=positions[:, start:end], masks=seen)
        logits = decoder.unembed(hidden[:, -1]).float()                 # (B, V)

        token = sample(logits, temperature, top_k, top_p, generators)   # (B,)
        new.append(token)
        is_done |= token == eos_id
        if is_done.all():
            break

        # With a cache the next round reads this token alone; without one, all again.
        fresh = decoder.embed(token[:, None])                           # (B, 1, D)
        if use_cache:
            x, start = fresh, end
        else:
            x = torch.cat((x, fresh), 1)
    model.train(was_training)

    # A row that ended early was carried along until the last had ended.
    rows = torch.stack(new, 1).tolist() if new else [[]] * batch
    return [list(takewhile(lambda token: token != eos_id, row)) for row in rows]


def left_padded(tokens, pad_id, blocks):
    """Move the padding of each row to its left: (tokens, segments, blocks), segments 0 at padding,
    1 else.

    Padding stands before the first or after the last other token: a pad_id inside is a token."""
    is_real = tokens != pad_id
    if not is_real.any(1).all():
        raise ValueError('generate: a prompt is empty')
    width = tokens.shape[1]
    before, after = is_real.int().argmax(1), is_real.int().flip(1).argmax(1)

    # The columns of the result, counted from the first token of each row: below 0 is padding.
    index = torch.arange(width, device=tokens.device)[None] - (before + after)[:, None]
    segments = (index >= 0).to(tokens.dtype)
    source = index.clamp(min=0) + before[:, None]
    tokens = tokens.gather(1, source).where(segments > 0, pad_id)
    return tokens, segments, blocks.gather(1, source)


def sample(logits, temperature, top_k, top_p, generators):
    """Choose a token a row from logits (B, V): (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        # A token stays if those before it do not hold top_p yet; the first one always does.
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        is_beyond = probs.cumsum(-1) - probs >= top_p
        is_beyond[:, 0] = False
        logits = logits.masked_fill(is_beyond.gather(1, order.argsort(-1)), -math.inf)

    # Row by row, as each has a random stream of its own.
    probs = logits.softmax(-1)
    return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators)])
