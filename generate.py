"""Texts that a decoder continues, token by token, with pictures before them or without.

Takes tensors and gives lists of tokens; answering.py makes them of prompts, and texts of them.
Axes as in model.py: B batch, T query, D width, V vocabulary.
"""
import math
from itertools import takewhile
from typing import NamedTuple

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
    choice = Choice(temperature, top_k, top_p)
    seeds = [row_seed(seed, row) for row in range(len(tokens))]
    new, is_done = [], torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for token, _ in steps(model, tokens, pixels, max_new_tokens, choice, pad_id, seeds, use_cache,
                          blocks):
        new.append(token)
        is_done |= token == eos_id
        if is_done.all():
            break

    # A row that ended early was carried along until the last had ended.
    rows = torch.stack(new, 1).tolist() if new else [[]] * len(tokens)
    return [list(takewhile(lambda token: token != eos_id, row)) for row in rows]


class Choice(NamedTuple):
    """How a token is chosen from logits. The defaults take the likeliest."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def row_seed(seed, row):
    """The seed of a row's own random stream."""
    return seed * 1_000_003 + row


@torch.no_grad()
def steps(model, tokens, pixels, max_new_tokens, choice, pad_id, seeds, use_cache=True,
          blocks=None):
    """Yield, max_new_tokens times, the next token of each row (B,) and its log-probability (B,),
    as the model has it before `choice` changes anything. Whoever asks no more ends it.

    tokens, blocks (B, T) and pad_id as in `generate`; seeds: one a row."""
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
    is_prompt = segments > 0
    segments = torch.cat((segments, following), 1)
    masks = make_attn_masks(decoder.config, torch.cat((blocks, following), 1), segments)
    positions = positions_of(segments)
    cache = decoder.new_cache(batch, prompt + max_new_tokens, tokens.device) if use_cache else None
    generators = [torch.Generator(tokens.device).manual_seed(number) for number in seeds]

    said = None         # (B, V): which tokens each row holds
    start = 0
    try:
        for end in range(prompt, prompt + max_new_tokens):
            seen = tuple(mask[:, start:end, :end] for mask in masks)
            hidden = decoder.features(x, cache=cache, positions=positions[:, start:end],
                                      masks=seen)
            logits = decoder.unembed(hidden[:, -1]).float()             # (B, V)

            if said is None:
                said = torch.zeros_like(logits, dtype=torch.bool)
                row, column = is_prompt.nonzero(as_tuple=True)
                said[row, tokens[row, column]] = True
            chosen = choose(logits, choice, said, generators)           # (B, 1)
            said.scatter_(1, chosen, True)
            logprobs = logits.log_softmax(-1).gather(1, chosen)
            yield chosen[:, 0], logprobs[:, 0]

            # With a cache the next round reads this token alone; without one, all again.
            fresh = decoder.embed(chosen)                               # (B, 1, D)
            if use_cache:
                x, start = fresh, end
            else:
                x = torch.cat((x, fresh), 1)
    finally:
        model.train(was_training)


def choose(logits, choice, said, generators):
    """A token a row of logits (B, V): (B, 1). said (B, V): the tokens that the row holds."""
    if choice.repetition_penalty != 1:
        # As CTRL (arXiv 1909.05858) has it, for logits of both signs.
        penalty = choice.repetition_penalty
        fined = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(said, fined, logits)
    return sample(logits, choice.temperature, choice.top_k, choice.top_p, generators,
                  choice.min_p)[:, None]


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


def sample(logits, temperature, top_k, top_p, generators, min_p=0.0):
    """Choose a token a row from logits (B, V): (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = kept(logits / temperature, top_k, top_p, min_p)

    # Row by row, as each has a random stream of its own.
    probs = logits.softmax(-1)
    return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators)])


def kept(logits, top_k, top_p, min_p):
    """The logits (B, V) of the tokens that may be chosen, -inf for others; in the order of
    transformers."""
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
    if min_p:
        # A share of what the likeliest has.
        probs = logits.softmax(-1)
        is_rare = probs < min_p * probs.amax(-1, keepdim=True)
        logits = logits.masked_fill(is_rare, -math.inf)
    return logits
