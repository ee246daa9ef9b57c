"""A conversation in the terminal: `python sample.py --model=folder --chat=true`.

    /image a.png    a picture for what is said next
    /reset          forget all
    /quit           or Ctrl-D; Ctrl-C stops an answer, and at the prompt ends

Lines may come from a pipe as well; answers come as they are made, word by word.
"""
import os
import sys
from types import SimpleNamespace

from answering import asked, cut, growing, pixels_of, texts_of
from shards import BadSample

HELP = '/image a.png: a picture for what you say next; /reset: forget all; /quit'


def talk(run, options):
    """Answer what is typed, until it ends."""
    conversation = SimpleNamespace(messages=[], pixels=[], fresh=[])
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    for line in typed():
        # what can not be done is said, and the conversation goes on
        try:
            if line.startswith('/'):
                if line.split()[0] == '/quit':
                    return
                command(run, conversation, line)
            elif line.strip():
                reply(run, conversation, line, options)
        except (ValueError, OSError, BadSample) as error:
            # nobody listens any more
            if isinstance(error, BrokenPipeError):
                raise
            print(f'{" ".join(str(error).split())}', file=sys.stderr, flush=True)


def typed():
    """Yield the lines that are typed, or come from a pipe."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  (arrows work)
    while True:
        try:
            if is_terminal:
                # it says the prompt on a line that can be edited
                yield input('> ')
                continue
            line = sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            # the shell's prompt begins a line
            print()
            return
        if not line:
            return
        yield line.removesuffix('\n')


def command(run, conversation, line):
    """/image or /reset. Raises ValueError and OSError."""
    # pictures wait for the question that is asked of them
    name, _, rest = line.partition(' ')
    if name == '/reset':
        conversation.messages, conversation.pixels, conversation.fresh = [], [], []
    elif name == '/image' and rest.strip():
        if not run.processor.eyes:
            raise ValueError('/image: this model has no eyes')
        conversation.fresh.append(pixels_of(run, os.path.expanduser(rest.strip())))
    else:
        raise ValueError(f'{name} is unknown: {HELP}')


def reply(run, conversation, line, options):
    """Print the answer to a line, word by word, and keep both. Raises ValueError and BadSample."""
    # kept only once it is answered: a line that is too long changes nothing
    content = line
    if run.processor.eyes:
        content = [dict(type='image')] * len(conversation.fresh) + [dict(type='text', text=line)]
    messages = [*conversation.messages, dict(role='user', content=content)]
    pixels = conversation.pixels + conversation.fresh
    empty = dict(role='assistant', content='')
    prompt = asked(run.processor, dict(messages=[*messages, empty]), len(pixels))

    # an answer that was stopped is one, too
    text, stops = '', texts_of(options.stop)
    try:
        for answer, in growing(run, [prompt], pixels or None, [len(messages)], options):
            whole, _ = cut(run.tokenizer.decode(answer.ids), stops)
            if not answer.finish:
                whole = settled(whole, stops)
            # some tokenizers join what came before to what comes next
            if whole.startswith(text):
                print(whole[len(text):], end='', flush=True)
                text = whole
        if answer.finish == 'length' and answer.text.startswith(text):
            print(answer.text[len(text):], end='')
            text = answer.text
    except KeyboardInterrupt:
        # a script is stopped as a whole
        if not sys.stdin.isatty():
            raise
    print(flush=True)
    messages.append(dict(role='assistant', content=text))
    conversation.messages, conversation.pixels, conversation.fresh = messages, pixels, []


def settled(text, stops):
    """Of a text that grows, what will not change: no half of a letter, no beginning of a stop."""
    # the bytes of a letter may come one token by one
    text = text.rstrip('\ufffd')
    for stop in stops:
        for length in range(len(stop) - 1, 0, -1):
            if text.endswith(stop[:length]):
                text = text[:-length]
                break
    return text
