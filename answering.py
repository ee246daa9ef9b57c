"""Texts that models continue, with pictures or without: how prompts are asked, and answers.

sample.py's tasks import this, and what looks at a picture.
"""
import sys
from itertools import takewhile

import numpy as np
import torch

from generate import generate
from processor import BESIDE, LEARNED, BadSample, blocks_of
from usage import refuse_unused, unused

COLDEST = 1e-3                  # the lowest temperature that is not 0


def check_sampling(options):
    """Raises ValueError for settings of generation that can not be."""
    # temperature 0 takes the likeliest token, top_k 0 keeps all of them
    for key in ('batch_size', 'max_new_tokens'):
        if getattr(options, key) < 1:
            raise ValueError(f'{key}={getattr(options, key)} must be at least 1')
    for key in ('temperature', 'top_k'):
        if getattr(options, key) < 0:
            raise ValueError(f'{key}={getattr(options, key)} must be at least 0')
    if not 0 < options.top_p <= 1:
        raise ValueError(f'top_p={options.top_p} must be above 0 and at most 1')

    # below it, a logit that is divided by it may pass the largest number that there is
    if 0 < options.temperature < COLDEST:
        raise ValueError(f'temperature={options.temperature} must be 0, which takes the likeliest '
                         f'token, or at least {COLDEST}')
    if options.temperature == 0:
        refuse_unused(vars(options), dict(top_k=0, top_p=1.0), ('top_k', 'top_p'),
                      'temperature=0 takes the likeliest token')
        for line in unused(vars(options), dict(seed=0), ('seed',), 'temperature=0'):
            print(line, file=sys.stderr)


def prompt_of(p, prompt=None, pictures=1):
    """(token ids, blocks) of pictures and a prompt, up to where the answer begins: who sees whom
    there, as the form of a Processor trains it. Raises BadSample where it wants more than that."""
    prompt = p.prompt if prompt is None else prompt
    sample = dict(pictures=[b''] * pictures, picture_names=[''] * pictures, members={},
                  prefix=prompt, suffix='', _asking=True)
    try:
        parts = p.function(sample, p)
    except KeyError as error:
        raise BadSample(f'processor={p.form!r} can not be asked: it wants {error} of a sample, '
                        "and a prompt is sample['prefix']") from None
    ids, roles = [], []
    for item, role in takewhile(lambda part: part[1] != LEARNED, parts):
        if role != BESIDE:
            new = p.encode(item)
            ids += new
            roles += [role] * len(new)
    return ids, blocks_of(np.array(roles)).tolist()


def question_of(p, prompt):
    """What a language model is asked, as `prompt_of` gives it; None where its form has no place
    for a question."""
    try:
        asked, other = (prompt_of(p, text, 0) for text in (prompt, prompt + '?'))
    except BadSample:
        return None
    return asked if asked != other else None


def answers(run, prompts, pixels, options):
    """Texts that continue prompts, (token ids, blocks) of each, as `prompt_of` gives them.
    pixels: uint8 (I, H, W, 3), one picture a prompt, or None."""
    out, tok, eyes = [], run.tokenizer, run.processor.eyes
    for a in range(0, len(prompts), options.batch_size):
        # what pads blocks is in no segment: nobody sees it
        ids, blocks = zip(*prompts[a:a + options.batch_size])
        tokens, _ = padded(ids, tok.pad_id)
        blocks, _ = padded(blocks, 1)

        # each batch has a seed of its own, as its rows are counted from 0
        pictures = None
        if pixels is not None:
            pictures = eyes.to_tensor(pixels[a:a + options.batch_size], run.device)
        new = generate(run.model, tokens.to(run.device), pictures, options.max_new_tokens,
                       options.temperature, options.top_k, options.top_p, run.processor.end_id,
                       tok.pad_id, options.seed + a, blocks=blocks.to(run.device))
        out += map(tok.decode, new)
    return out


def padded(rows, pad_id, least=1):
    """Lists of token ids -> (tokens, segments), int64 tensors (B, T), T at least `least`, padded
    on the right, segments 0 there."""
    # a batch is as wide as its longest row
    width = max(least, *map(len, rows))
    tokens = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    segments = (torch.arange(width)[None] < lengths[:, None]).long()
    return tokens, segments


def attends(processor):
    """How what stands before an answer attends, as a form trains it: prefix: all to all | causal |
    own: otherwise, or not known, where a form wants more of a sample than a prompt."""
    try:
        _, blocks = prompt_of(processor, pictures=int(processor.eyes is not None))
    except (TypeError, AttributeError, BadSample):
        return 'own'
    if all(blocks):
        return 'causal'
    return 'own' if any(blocks) else 'prefix'


def set_mask(model, processor):
    """What a model attends to by itself is what its form trains."""
    # a policy has one inside
    model = getattr(model, 'encoder', model)
    if hasattr(model, 'default_blocks'):
        model.config.attends = attends(processor)
    elif model is not None:
        model.attends = attends(processor)      # a decoder alone is causal, where nobody says more
