"""What sample.py asks a model with words: prompts, or a .jsonl of them, and what it prints.

    python sample.py --model=folder --prompt='["one", "two"]'
    python sample.py --model=folder --prompts=in.jsonl --out=out.jsonl

A line of in.jsonl is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, with
"images": ["a.png"] for a model with eyes; a line of out.jsonl is the same and its answer. A chat
model gets a prompt as a user's turn (--raw=true: as it is).
"""
import json
import os
import sys
from typing import NamedTuple

from answering import (
    answer_batch,
    asked,
    check_sampling,
    pixels_of,
    prompt_of,
    question_of,
    texts_of,
)
from shards import BadSample
from tokenizer import read_json
from usage import refuse_unused

ANSWERED = 'text', 'finish', 'tokens', 'logprobs'       # the keys that an answer adds
AT_ONCE = 8                     # batches that are sorted by length together, and then written
LONG_ANSWER = 512               # tokens, where somebody talks


def ask(run, options):
    """Answer --prompt or --prompts, or talk."""
    check_sampling(options)
    is_chat = hasattr(run.processor, 'chat')
    if options.chat:
        others = dict(prompt='', prompts='', out='', raw=False, logprobs=False)
        refuse_unused(vars(options), others, tuple(others), 'chat=True reads what you type')
        if not is_chat:
            raise ValueError('chat=True: this model has no chat template: give --prompt, or train '
                             'one with processor=chat')
        from talk import talk
        talk(run, options)
    elif options.prompts:
        refuse_unused(vars(options), dict(prompt=''), ('prompt',), f'prompts={options.prompts!r}')
        answer_file(run, options)
    else:
        refuse_unused(vars(options), dict(out=''), ('out',), 'it goes with --prompts=in.jsonl')
        answer_prompts(run, options)


# -------------------------------------------------------------------------------------------------
# questions


class Question(NamedTuple):
    """A prompt as the model reads it."""
    number: int                 # among all, for its random stream
    prompt: tuple               # (token ids, blocks)
    images: list                # paths


def read_question(run, number, row, raw):
    """The Question of a row {prompt or messages, images}. Raises ValueError."""
    # what is wrong with a row is told before anything is asked
    images, messages = row.get('images', []), row.get('messages')
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise ValueError('images: expected a list of paths')
    if images and not run.processor.eyes:
        raise ValueError(f'images={images}: this model has no eyes')
    for name in images:
        if not os.path.isfile(name):
            raise ValueError(f'images: there is no file {name}')
    if (messages is None) == (not isinstance(row.get('prompt'), str)):
        raise ValueError(f'expected "prompt", a text, or "messages", it has {", ".join(row)}')

    try:
        return Question(number, prompt_ids(run, row, len(images), raw), images)
    except (BadSample, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f'{error}') from None


def prompt_ids(run, row, pictures, raw):
    """(token ids, blocks) of a row. Raises ValueError and BadSample."""
    # a conversation goes up to where its next answer would begin
    p, messages = run.processor, row.get('messages')
    is_chat = hasattr(p, 'chat') and not raw
    if messages is not None:
        if not is_chat:
            raise ValueError('messages need a chat template: this model has none, or raw=true')
        if not messages or messages[-1].get('role') != 'user':
            raise ValueError('messages: the last one is not a user\'s, there is nothing to answer')
        answer = dict(role='assistant', content='')
        return asked(p, dict(messages=[*messages, answer]), pictures)
    if pictures:
        return prompt_of(p, row['prompt'], pictures)

    # a model of others that has no template is asked nothing, a run of ours as it was trained
    text = document(run, row['prompt'])
    is_base = hasattr(run, 'opening') and not is_chat
    if raw or is_base:
        return text
    return question_of(p, row['prompt']) or text


def document(run, prompt):
    """(token ids, blocks) of a text to go on with. Raises ValueError."""
    # others' models begin a text as their tokenizer does
    tok = run.tokenizer
    ids = getattr(run, 'opening', [tok.bos_id]) + tok.encode(prompt)
    if not ids:
        raise ValueError('the prompt is empty')
    return ids, [1] * len(ids)


def answered(run, questions, options):
    """Yield the Answer to each Question, in their order."""
    # sorted in parts, so that the first are written long before the last are asked
    size = AT_ONCE * options.batch_size
    for a in range(0, len(questions), size):
        part = questions[a:a + size]
        # rows of one length waste nothing on padding
        order = sorted(range(len(part)), key=lambda i: len(part[i].prompt[0]))
        found = {}
        for b in range(0, len(order), options.batch_size):
            places = order[b:b + options.batch_size]
            batch = [part[i] for i in places]
            found |= zip(places, answers_to(run, batch, options))
        yield from (found[i] for i in range(len(part)))


def answers_to(run, batch, options):
    """The Answers to a batch of Questions."""
    # pictures are read when they are needed, for a file may name many
    pixels = []
    for question in batch:
        pixels += [pixels_of(run, name) for name in question.images]
    return answer_batch(run, [question.prompt for question in batch], pixels or None,
                        [question.number for question in batch], options)


# -------------------------------------------------------------------------------------------------
# --prompt


def prompts_of(value):
    """The prompts of --prompt: a text, a list of texts, or the lines of a .txt. Raises
    ValueError."""
    if not value.endswith('.txt') or any(map(str.isspace, value)):
        return texts_of(value) or ['']
    try:
        with open(value, encoding='utf-8') as f:
            return f.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'prompt={value!r} can not be read: {error}') from None


def answer_prompts(run, options):
    """Print the answers to --prompt."""
    prompts, questions = prompts_of(options.prompt), []
    for number, prompt in enumerate(prompts):
        try:
            questions.append(read_question(run, number, dict(prompt=prompt), options.raw))
        except ValueError as error:
            raise ValueError(f'prompt {number + 1}: {error}') from None

    cut = num_asked = 0
    for question, prompt, answer in zip(questions, prompts, answered(run, questions, options)):
        # an answer stands for itself, a text goes on
        begin = ''
        is_asked = question.prompt != document(run, prompt or ' ')
        if not is_asked:
            begin = prompt
        elif len(prompts) > 1:
            begin = f'> {prompt}\n'
        num_asked += is_asked
        cut += is_asked and answer.finish == 'length'
        if options.json:
            said = dict(prompt=prompt, text=answer.text)
            print(json.dumps(said | logprobs_of(run, answer, options)), flush=True)
        else:
            print(begin + answer.text, flush=True)
            print_logprobs(run, answer, options)
    say_cut(cut, num_asked, options)


def logprobs_of(run, answer, options):
    """The tokens of an answer and their log-probabilities as keys of JSON, where asked for."""
    if not options.logprobs:
        return {}
    return dict(tokens=[run.tokenizer.decode([i]) for i in answer.ids],
                logprobs=[round(p, 6) for p in answer.logprobs])


def print_logprobs(run, answer, options):
    """The same, a line a token."""
    if options.logprobs and not options.json:
        for i, p in zip(answer.ids, answer.logprobs):
            print(f'{p:9.4f}  {run.tokenizer.decode([i])!r}')


def say_cut(cut, count, options):
    if cut:
        print(f'{cut} of {count} answers were cut at max_new_tokens={options.max_new_tokens}',
              file=sys.stderr)


# -------------------------------------------------------------------------------------------------
# --prompts


def answer_file(run, options):
    """Answer each line of --prompts that --out has not answered yet. Raises ValueError, before
    anything is asked, for a line that can not be."""
    rows, questions = read_rows(options.prompts), []
    for number, row in enumerate(rows):
        try:
            questions.append(read_question(run, number, row, options.raw))
        except ValueError as error:
            raise ValueError(f'{options.prompts}, line {number + 1}: {error}') from None

    # whatever an earlier command has answered stays
    done, out = 0, sys.stdout
    if options.out:
        if os.path.exists(options.out) and os.path.samefile(options.out, options.prompts):
            raise ValueError(f'out={options.out!r} is the file of --prompts: name another one')
        done = mend(options.out, rows)
        out = open(options.out, 'a', encoding='utf-8')
    if done:
        print(f'{options.out}: {done} of {len(rows)} are answered already; delete it to begin '
              'anew', file=sys.stderr)

    # each line is written as it is known, so that little is lost
    cut = 0
    for row, answer in zip(rows[done:], answered(run, questions[done:], options)):
        said = dict(text=answer.text, finish=answer.finish)
        line = json.dumps(row | said | logprobs_of(run, answer, options))
        print(line, file=out, flush=True)
        cut += answer.finish == 'length'
    if options.out:
        out.close()
    say_cut(cut, len(rows) - done, options)


def read_rows(path):
    """The objects of a .jsonl. Raises ValueError."""
    # Windows begins a text with a mark
    rows = []
    try:
        with open(path, encoding='utf-8-sig') as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    rows.append(read_row(line, f'{path}, line {number}'))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'prompts={path!r} can not be read: {error}') from None
    if not rows:
        raise ValueError(f'prompts={path!r} is empty')
    return rows


def read_row(line, where):
    """The object in a line. Raises ValueError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{where} is no JSON: {error}') from None
    if not isinstance(row, dict):
        raise ValueError(f'{where}: expected {{"prompt": "..."}} or {{"messages": [...]}}')
    # a key of the row must not be lost to one of the answer
    taken = [key for key in ANSWERED if key in row]
    if taken:
        raise ValueError(f'{where} has {", ".join(taken)}, which the answer would overwrite: call '
                         'it otherwise')
    return row


def mend(path, rows):
    """How many of the rows a file of answers holds; a torn last line is cut off. Raises
    ValueError where it answers others."""
    if not os.path.exists(path):
        return 0
    if not os.path.isfile(path):
        raise ValueError(f'out={path!r} is no file: name one')
    with open(path, 'rb') as f:
        content = f.read()
    whole = content.rfind(b'\n') + 1

    # what is there must be answers to these very rows, else it is somebody's file
    lines = content[:whole].splitlines()
    for number, line in enumerate(lines):
        try:
            said = json.loads(line)
            is_answer = all(key in said for key in ('text', 'finish'))
            wanted = {key: said.get(key) for key in said if key not in ANSWERED}
        except (ValueError, AttributeError, TypeError):
            is_answer, wanted = False, None
        if not is_answer or number >= len(rows) or wanted != rows[number]:
            raise ValueError(f'out={path!r}: line {number + 1} is no answer to that line of '
                             '--prompts: name another file, or delete it')

    # a line without its end is of a command that was killed, if it begins as an answer does
    torn = content[whole:].decode(errors='replace')
    if torn:
        row = json.dumps(rows[len(lines)])[:-1] if len(lines) < len(rows) else ''
        if not row or not (torn.startswith(row) or row.startswith(torn)):
            raise ValueError(f'out={path!r}: its last line is no answer: name another file')
        print(f'{path}: its last line is torn, and answered again', file=sys.stderr)
        with open(path, 'rb+') as f:
            f.truncate(whole)
    return len(lines)


# -------------------------------------------------------------------------------------------------
# what a model wants of itself


def wanted_by(folder, flags):
    """({setting: value} of how a folder of others wants to be sampled, where the command line, of
    these flags, does not say; the line that tells so): its generation_config.json, in the words of
    transformers. Raises ValueError."""
    given = {flag.partition('=')[0].removeprefix('--') for flag in flags}
    path = os.path.join(folder, 'generation_config.json')
    theirs, wanted = {}, {}
    if os.path.isfile(path):
        theirs = read_json(path)
    for key, kind in dict(repetition_penalty=float, max_new_tokens=int).items():
        if theirs.get(key):
            wanted[key] = number(theirs[key], kind, key, path)

    # where it draws, transformers has a top_k of its own
    if theirs.get('do_sample'):
        wanted |= dict(temperature=1.0, top_k=50)
        for key, kind in dict(temperature=float, top_k=int, top_p=float, min_p=float).items():
            if theirs.get(key) is not None:
                wanted[key] = number(theirs[key], kind, key, path)

    # what only a draw needs goes with it
    if '--temperature=0' in flags or '--temperature=0.0' in flags:
        for key in ('top_k', 'top_p', 'min_p'):
            wanted.pop(key, None)
    wanted = {key: value for key, value in wanted.items() if key not in given}
    line = ''
    if wanted:
        line = f'{path}: ' + ', '.join(f'{key}={value}' for key, value in wanted.items())

    # who talks wants whole answers
    if '--chat=true' in flags and 'max_new_tokens' not in {*given, *wanted}:
        wanted['max_new_tokens'] = LONG_ANSWER
    return wanted, line


def number(value, kind, key, path):
    """A number of a stranger's file. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
        raise ValueError(f'{path}: {key}={value!r:.60} is no {kind.__name__}')
    return kind(value)
