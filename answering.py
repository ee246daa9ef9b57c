"""Texts that models continue, with pictures or without: how prompts are asked, and answers.

sample.py's tasks import this, and what looks at a picture.
"""
import ast
import os
import sys
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import torch

from generate import Choice, row_seed, steps
from processor import BESIDE, LEARNED, BadSample, blocks_of
from tokenizer import read_json
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
    if not 0 <= options.min_p <= 1:
        raise ValueError(f'min_p={options.min_p} must be 0 to 1')
    if options.repetition_penalty <= 0:
        raise ValueError(f'repetition_penalty={options.repetition_penalty} must be above 0: 1 '
                         'changes nothing, 1.1 makes what was said less likely')
    if '' in texts_of(options.stop):
        raise ValueError(f'stop={options.stop!r}: one of them is empty')

    # below it, a logit that is divided by it may pass the largest number that there is
    if 0 < options.temperature < COLDEST:
        raise ValueError(f'temperature={options.temperature} must be 0, which takes the likeliest '
                         f'token, or at least {COLDEST}')
    if options.temperature == 0:
        refuse_unused(vars(options), dict(top_k=0, top_p=1.0, min_p=0.0),
                      ('top_k', 'top_p', 'min_p'), 'temperature=0 takes the likeliest token')
        for line in unused(vars(options), dict(seed=0), ('seed',), 'temperature=0'):
            print(line, file=sys.stderr)


def texts_of(value):
    """The texts of a setting: one, or several as a Python list of them; [] of an empty one."""
    if value.startswith('['):
        try:
            texts = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            texts = None
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return texts
    return [value] if value else []


def prompt_of(p, prompt=None, pictures=1):
    """(token ids, blocks) of pictures and a prompt, up to where the answer begins: who sees whom
    there, as the form of a Processor trains it. Raises BadSample where it wants more than that."""
    prompt = p.prompt if prompt is None else prompt
    return asked(p, dict(prefix=prompt, suffix=''), pictures)


def asked(p, sample, pictures=0):
    """The same of a sample as a form has it: prefix and suffix, or messages of which the last is
    the answer. Raises BadSample."""
    sample = dict(pictures=[b''] * pictures, picture_names=[''] * pictures, members={},
                  _asking=True) | sample
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


# -------------------------------------------------------------------------------------------------
# answers


@dataclass
class Answer:
    """What a model says after a prompt."""
    text: str = ''
    ids: list = field(default_factory=list)         # without the one that ended it
    logprobs: list = field(default_factory=list)    # of the ids
    finish: str = ''                                # stop | length; '': it goes on


def answers(run, prompts, pixels, options):
    """The texts of `all_answers`."""
    return [answer.text for answer in all_answers(run, prompts, pixels, options)]


def all_answers(run, prompts, pixels, options):
    """The Answers to prompts, (token ids, blocks) of each, as `prompt_of` gives them. pixels:
    uint8 (I, H, W, 3), one picture a prompt, or None."""
    out = []
    for a in range(0, len(prompts), options.batch_size):
        rows = range(a, min(a + options.batch_size, len(prompts)))
        seen = None
        if pixels is not None:
            seen = pixels[rows.start:rows.stop]
        batch = [prompts[row] for row in rows]
        out += answer_batch(run, batch, seen, rows, options)
    return out


def answer_batch(run, prompts, pixels, rows, options):
    """The Answers to prompts, all at once. rows: their numbers among all, for the random stream of
    each; pixels: uint8 (I, H, W, 3) of all, in their order, or None."""
    # all along the list is the same
    *_, answers = growing(run, prompts, pixels, rows, options)
    return answers


def growing(run, prompts, pixels, rows, options):
    """Yield the list of Answers to prompts, the same one, whenever they have a token more; they
    have their texts once it ends."""
    tok = run.tokenizer
    ids, blocks = zip(*prompts)
    max_new_tokens = min(options.max_new_tokens, room_after(run, max(map(len, ids))))

    # what pads blocks is in no segment: nobody sees it
    tokens, _ = padded(ids, tok.pad_id)
    blocks, _ = padded(blocks, 1)
    if pixels is not None:
        dtype = next(run.model.parameters()).dtype
        pixels = run.processor.eyes.to_tensor(np.asarray(pixels), run.device).to(dtype)

    # a row draws the same whoever stands beside it
    choice = Choice(options.temperature, options.top_k, options.top_p, options.min_p,
                    options.repetition_penalty)
    seeds = [row_seed(options.seed, row) for row in rows]
    ends, stops = ends_of(run), texts_of(options.stop)
    answers = [Answer() for _ in prompts]
    for token, logprob in steps(run.model, tokens.to(run.device), pixels, max_new_tokens,
                                choice, tok.pad_id, seeds, blocks=blocks.to(run.device)):
        for answer, i, p in zip(answers, token.tolist(), logprob.tolist()):
            if not answer.finish:
                grow(answer, i, p, ends, stops, tok)
        yield answers
        if all(answer.finish for answer in answers):
            break

    # read once, at the end: a text is no sum of its tokens' texts
    for answer in answers:
        answer.finish = answer.finish or 'length'
        answer.text, _ = cut(tok.decode(answer.ids), stops)


def grow(answer, i, logprob, ends, stops, tok):
    """A token more for an Answer, or its end."""
    if i in ends:
        answer.finish = 'stop'
        return
    answer.ids.append(i)
    answer.logprobs.append(logprob)
    if stops and cut(tok.decode(answer.ids), stops)[1]:
        answer.finish = 'stop'


def cut(text, stops):
    """(a text up to the first of some others in it, was one there?)"""
    places = [text.find(stop) for stop in stops if stop in text]
    if not places:
        return text, False
    return text[:min(places)], True


def ends_of(run):
    """The ids that end an answer: of the form, and those that a folder of others names."""
    # of ours there is no such file, and no such key in the config.json
    ends = {run.processor.end_id}
    for name in ('generation_config.json', 'config.json'):
        path = os.path.join(run.folder, name)
        if not os.path.isfile(path):
            continue

        # one id, or a list; the first file that says any decides, as in transformers
        said = read_json(path).get('eos_token_id')
        if isinstance(said, int):
            said = [said]
        if said:
            return ends | set(said)
    return ends


def pixels_of(run, name):
    """The pixels of a picture's file. Raises OSError."""
    with open(name, 'rb') as f:
        try:
            return run.processor.eyes.pixels(f.read())
        except BadSample as error:
            raise OSError(f'{name}: {error}') from None


def room_after(run, length):
    """How many tokens the model can write after a prompt. Raises ValueError."""
    decoder = getattr(run.model, 'decoder', run.model)
    most = decoder.config.max_positions or length + (1 << 30)
    if most <= length:
        raise ValueError(f'there are {length} tokens to read, this model reads and writes {most} '
                         'in all: ask for less')
    return most - length


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
