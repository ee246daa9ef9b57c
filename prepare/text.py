"""Any text files -> a tokenized data set to pretrain on: shards to train with and to validate.

    python prepare/text.py --input='raw/*.jsonl.gz' --out=datasets/mine --tokenizer=bytes \\
        --seq_len=1024 --val_fraction=0.01

The input is a comma-separated list of files, patterns and folders (read recursively); a file named
twice is read once:

    .txt  .txt.gz  .txt.zst         --split=file: a document a file; line: one a line; blank: blank
                                    lines part them
    .jsonl  .json  (also .gz .zst)  an object a line; its `--text_key` is the document
    .parquet                        a document a row of the column `--text_key`
    .tar                            webdataset samples: `key.txt`, else `--text_key` of `key.json`

It writes `train/` and `val/`, each with `00000000.tar ...` and `manifest.jsonl`, and a copy of the
tokenizer. Validation documents are chosen by a hash of their running number, or are those of
`--val_input`. The documents of a part are one stream of tokens, each `bos text eos` (`bos text`,
and one last eos, where both are the same token as in GPT-2's). It is cut into sequences of
seq_len + 1 tokens, each beginning with the last token of the one before, so that every token but
the very first is a target once. The last sequence is filled up with the largest value of the
dtype, which is no id.

A member `<number of its first sequence>.tokens.bin` holds `--sequences_per_member` sequences,
little-endian uint16, or uint32 from 65535 ids on. A row of the manifest counts the sequences of a
shard, its targets (`num_tokens`) and the UTF-8 bytes of the documents that end in it
(`num_bytes`): summed loss / ln 2 / num_bytes is bits per byte.

The bytes written do not depend on `--workers`. After a crash, the same command goes on from the
last finished shard.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from text_files import BadInput, find_inputs, records  # noqa: E402
from text_shards import Stream, atomic  # noqa: E402

import tokenizer as tokenizers  # noqa: E402

FORMAT = 1                      # part of the fingerprint: raise it when what is written changes
PARTS = ('train', 'val')

# What a worker gets at a time; a chunk may be one record longer.
CHUNK_BYTES, CHUNK_RECORDS = 1 << 20, 4096

# Bytes: a growing shard is held in memory, a member where it is read.
MAX_SHARD, MAX_MEMBER = 1 << 30, 64 << 20


def fail(message):
    """End with one line on stderr and exit code 1."""
    raise SystemExit(f'prepare/text.py: {" ".join(str(message).split())}') from None


# -------------------------------------------------------------------------------------------------
# records -> chunks, the work of a worker at a time


def drawn_part(number, s):
    """The part of a document, by its number: neither workers nor other documents change it."""
    digest = hashlib.sha256(f'{s.seed} {number}'.encode()).digest()
    if int.from_bytes(digest[:8], 'big') < s.val_fraction * 2**64:
        return 'val'
    return 'train'


def chunks(files, s, fixed, state):
    """Yield ([(part, form, bytes or what is wrong, where)], state after them).

    fixed: the first so many files are for training, others not; None: --val_fraction decides."""
    chunk, size, number = [], 0, state['records']
    before = [0]                # bytes of the files before each
    for path in files:
        before.append(before[-1] + path.stat().st_size)

    for record in records(files, s, state['place']):
        file_number = record.place[0]
        if fixed is None:
            part = drawn_part(number, s)
        elif file_number < fixed:
            part = 'train'
        else:
            part = 'val'

        # a chunk ends after a record, so that a run can go on after it
        chunk.append((part, record.form, record.data, record.where))
        size += len(record.data)
        number += 1

        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_RECORDS:
            read = before[file_number] + record.read
            yield chunk, {'records': number, 'place': record.place, 'read': read}
            chunk, size = [], 0

    yield chunk, {'records': number, 'place': (len(files), 0, 0), 'read': before[-1]}


# -------------------------------------------------------------------------------------------------
# chunks -> tokens, in worker processes


def end_with(process):
    """End this process when that one has ended."""
    process.join()
    os._exit(1)


def start_worker(name, text_key):
    """Load the tokenizer of this process."""
    global WORKER
    WORKER = tokenizers.load(name), text_key

    # The process that feeds this one may end by a SIGKILL, which tells nobody. Ctrl-C reaches all
    # of them, but it is that one which stops the others.
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def text_of(form, data):
    """The document of a record; ValueError says why there is none."""
    if form == 'bad':
        raise ValueError(data)
    text, text_key = data.decode(), WORKER[1]
    if form == 'text':
        return text

    # too many brackets or digits are errors of their own
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'not a line of JSON: {error}') from None
    if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
        raise ValueError(f'not an object with a string {text_key!r} (--text_key)')

    # half a surrogate pair is fine in JSON alone
    record[text_key].encode()
    return record[text_key]


def tokenize(chunk):
    """({part: (tokens, numbers of tokens, of bytes)}, what is bad, number of empty ones).

    The tokens are end to end, the numbers those of each document."""
    tokenizer = WORKER[0]
    found = {part: ([np.empty(0, np.uint32)], [], []) for part in PARTS}
    bad, num_empty = [], 0

    # where both ends are one token, the next document's bos is this one's eos
    end = []
    if tokenizer.bos_id != tokenizer.eos_id:
        end = [tokenizer.eos_id]

    for part, form, data, where in chunk:
        try:
            text = text_of(form, data)
            if not text:
                num_empty += 1
                continue
            ids = [tokenizer.bos_id, *tokenizer.encode(text), *end]
        except ValueError as error:
            bad.append(f'{where}: {error}')
            continue
        tokens, lengths, sizes = found[part]
        tokens.append(np.array(ids, np.uint32))
        lengths.append(len(ids))
        sizes.append(len(text.encode()))

    # arrays, which go to the other process as they are
    done = {}
    for part, (tokens, lengths, sizes) in found.items():
        done[part] = np.concatenate(tokens), np.array(lengths, np.int64), np.array(sizes, np.int64)
    return done, bad, num_empty


def in_order(chunks, workers, tokenizer_name, text_key):
    """Yield (tokenize(chunk), state) of each (chunk, state), in order.

    At most 2 * workers + 1 chunks wait at any time."""
    if workers == 1:
        start_worker(tokenizer_name, text_key)
        for chunk, after in chunks:
            yield tokenize(chunk), after
        return

    # spawned: a fork would take along the threads and locks of this process
    waiting, setup = deque(), (tokenizer_name, text_key)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), start_worker, setup)
    try:
        for chunk, after in chunks:
            waiting.append((pool.submit(tokenize, chunk), after))
            if len(waiting) > 2 * workers:
                future, after = waiting.popleft()
                yield future.result(), after
        for future, after in waiting:
            yield future.result(), after
    except BrokenProcessPool:
        fail('a worker process was killed, by a lack of memory perhaps: run this again with fewer '
             '--workers')
    finally:
        pool.shutdown(cancel_futures=True)


# -------------------------------------------------------------------------------------------------
# how far a run is: `progress.npz` tells it after each shard, `done.json` in the end


def new_state(fingerprint):
    """The state of a run that has read nothing."""
    parts = {part: {'rows': [], 'documents': 0, 'num_bytes': 0} for part in PARTS}
    return {'fingerprint': fingerprint, 'place': (0, 0, 0), 'records': 0, 'read': 0, 'empty': 0,
            'bad': 0, 'parts': parts}


def recall(out, fingerprint, force):
    """(state, {part: tokens that wait}) of an earlier run into `out`, or of a new one.

    Where all is done, (state, None)."""
    progress, done = out / 'progress.npz', out / 'done.json'
    is_ours = progress.exists() or done.exists()
    # a folder of somebody else's stays as it is, --force=true or not
    if not is_ours and any((out / part).exists() for part in PARTS):
        fail(f'{out} holds a train or val of another origin: move it away or choose another --out')
    if force or not is_ours:
        return new_state(fingerprint), {part: np.empty(0, np.uint32) for part in PARTS}

    # where both are, a run was killed as it began or ended: from progress.npz, both can go on
    path = done
    if progress.exists():
        path = progress
    try:
        if path == progress:
            with np.load(path) as saved:
                state = json.loads(saved['state'].tobytes())
                tokens = {part: saved[part] for part in PARTS}
        else:
            state, tokens = json.loads(path.read_bytes()), None
    # numpy, zipfile and json have each their own for a damaged file
    except Exception as error:
        fail(f'{path} can not be read ({error}): --force=true makes all anew')

    check_fingerprint(out, fingerprint, state['fingerprint'])
    check_written(out, state)
    return state, tokens


def check_fingerprint(out, fingerprint, before):
    """Refuse to go on with other settings."""
    for key, value in fingerprint.items():
        if value == before.get(key):
            continue
        change = f'{key} ({before.get(key)}, not {value})'
        if key == 'files':
            change = 'input'
        fail(f'{out} was made with other {change}: choose another --out, or --force=true to make '
             'it anew')


def check_written(out, state):
    """Refuse to go on where a file is gone, or, when all is done, where its size has changed."""
    # sizes are known in the end alone
    written = state.get('written')
    if written is None:
        written = {}
        for part in PARTS:
            for row in state['parts'][part]['rows']:
                written[f'{part}/{row["shard"]}.tar'] = None

    for name, size in written.items():
        path = out / name
        if not path.is_file() or size not in (None, path.stat().st_size):
            fail(f'{path} was lost or changed since it was made: --force=true makes all anew')


def save(out, state, streams):
    """Write down how far the run is."""
    parts = {part: stream.state() for part, stream in streams.items()}
    waiting = {part: np.concatenate(stream.waiting) for part, stream in streams.items()}
    text = json.dumps(state | {'parts': parts})
    with atomic(out / 'progress.npz') as file:
        np.savez(file, state=np.frombuffer(text.encode(), np.uint8), **waiting)


# -------------------------------------------------------------------------------------------------
# the run


def clear(out, tokenizer):
    """Remove what an earlier run made, its tokenizer too, or load(out) might find that."""
    (out / 'done.json').unlink(missing_ok=True)
    for part in PARTS:
        shutil.rmtree(out / part, ignore_errors=True)

    # the one in use may lie in this very folder
    ours = {Path(file).resolve() for file in tokenizer.files}
    for pattern in ('tokenizer*.*', 'special_tokens_map.json', '*.tiktoken'):
        for path in list(out.glob(pattern)):
            if path.resolve() not in ours:
                path.unlink()


def copy_tokenizer(out, tokenizer):
    """Copy its files to the data set; paths of the copies."""
    copies = []
    for path in map(Path, tokenizer.files):
        # a sentencepiece model's name is arbitrary, the others' tell what they are
        copy = out / path.name
        if path.suffix == '.model':
            copy = out / 'tokenizer.model'
        copies.append(copy)
        if path.resolve() != copy.resolve():
            with atomic(copy) as file:
                file.write(path.read_bytes())
    return copies


def report(s, state):
    """What was made, for people."""
    for part in PARTS:
        # nothing is said of a part that nobody asked for
        if part == 'val' and not s.val_fraction and not s.val_input:
            continue
        made, folder = state['parts'][part], s.out / part
        if not made['rows']:
            print(f'{folder}: no document fell into this part, so it was not written')
            continue
        tokens = sum(row['num_tokens'] for row in made['rows'])
        num_bytes = sum(row['num_bytes'] for row in made['rows'])
        sequences = sum(row['num_sequences'] for row in made['rows'])
        print(f'{folder}: {made["documents"]:,} documents, {num_bytes:,} bytes, {tokens:,} tokens '
              f'({num_bytes / tokens:.3f} bytes each), {sequences:,} sequences, '
              f'{len(made["rows"]):,} shards')

    print(f'left out: {state["empty"]:,} empty and {state["bad"]:,} bad documents')


def read_all(s, files, fixed, state, streams):
    """The input to shards, from where an earlier run stopped; `state` and `streams` follow."""
    workers = s.workers or os.cpu_count()
    results = in_order(chunks(files, s, fixed, state), workers, s.tokenizer, s.text_key)

    # a log file gets few lines
    interval = 30
    if sys.stderr.isatty():
        interval = 0.5
    total = sum(path.stat().st_size for path in files)
    bar = tqdm(total=total, initial=state['read'], unit='B', unit_scale=True, desc='read', delay=1,
               mininterval=interval)

    with bar, contextlib.closing(results):
        for (done, bad, num_empty), after in results:
            # it stops before anything of this chunk is written: it is read again with --skip_bad
            if bad and not s.skip_bad:
                fail(f'{bad[0]} (--skip_bad=true leaves out and counts such documents)')

            # a shard that is written and what is left over are one step: saved together
            written = [stream.add(*done[part]) for part, stream in streams.items()]
            state.update(after)
            state['empty'] += num_empty
            state['bad'] += len(bad)
            if any(written):
                save(s.out, state, streams)

            documents = sum(stream.documents for stream in streams.values())
            tokens = sum(stream.tokens for stream in streams.values())
            bar.set_postfix_str(f'{documents:,} documents, {tokens:,} tokens', refresh=False)
            bar.update(after['read'] - bar.n)


def finish(out, state, streams, copies):
    """`done.json` in place of `progress.npz`, with the size of each file."""
    state['parts'] = {part: stream.state() for part, stream in streams.items()}

    # what was lost or cut since is seen by the next call
    written = list(copies)
    for part in PARTS:
        written += sorted((out / part).glob('*'))
    state['written'] = {str(path.relative_to(out)): path.stat().st_size for path in written}
    with atomic(out / 'done.json') as file:
        file.write(json.dumps(state).encode())
    (out / 'progress.npz').unlink()


def run(s, tokenizer, files, fixed, fingerprint):
    """All of the input, from where an earlier run stopped."""
    state, tokens = recall(s.out, fingerprint, s.force)
    if tokens is None:
        print(f'{s.out} is already prepared')
        report(s, state)
        return

    streams, vocab_size = {}, tokenizer.vocab_size
    for part in PARTS:
        streams[part] = Stream(s.out / part, s, vocab_size, state['parts'][part], tokens[part])

    # from the first save on, the folder is ours
    save(s.out, state, streams)
    if not state['records']:
        clear(s.out, tokenizer)
    copies = copy_tokenizer(s.out, tokenizer)

    read_all(s, files, fixed, state, streams)
    # places in a file that has changed since mean nothing
    if digest_of(files) != fingerprint['files']:
        fail('the input changed while it was read: --force=true makes all anew')
    if not streams['train'].documents:
        fail(f'no document to train on: {state["records"]:,} records were read, '
             f'{state["empty"]:,} of them empty and {state["bad"]:,} bad')

    # where both ends are one token, the last document still has none
    last = []
    if tokenizer.bos_id == tokenizer.eos_id:
        last = [tokenizer.eos_id]
    for stream in streams.values():
        stream.close(last)
    finish(s.out, state, streams, copies)
    report(s, state)


def digest_of(files):
    """What tells that no file was changed, renamed, added or taken away."""
    rows = []
    for path in files:
        stat = path.stat()
        rows.append((str(path.absolute()), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def fingerprint_of(s, tokenizer, files, fixed):
    """All that decides what is written. A run with another fingerprint is another run."""
    # without skip_bad: a run that was stopped by a bad document can go on with it
    keys = ('seq_len', 'val_fraction', 'seed', 'split', 'text_key', 'sequences_per_member',
            'sequences_per_shard', 'max_document_mb')
    fingerprint = {key: getattr(s, key) for key in keys}

    # one of our own has no files, its name says all
    name = s.tokenizer
    if tokenizer.files:
        content = b''.join(Path(path).read_bytes() for path in tokenizer.files)
        name = hashlib.sha256(content).hexdigest()
    return fingerprint | {'format': FORMAT, 'tokenizer': name, 'fixed': fixed,
                          'files': digest_of(files)}


def prepare(s, tokenizer):
    """Make the data set that the settings `s` describe."""
    files, fixed = find_inputs(s.input, s.out), None
    # files to be held out are read after the others, in one run of numbers
    if s.val_input:
        fixed, held_out = len(files), find_inputs(s.val_input, s.out)
        both = {path.resolve() for path in files} & {path.resolve() for path in held_out}
        if both:
            fail(f'{min(both)} is in --input and in --val_input')
        files += held_out

    fingerprint = fingerprint_of(s, tokenizer, files, fixed)
    s.out.mkdir(parents=True, exist_ok=True)
    with open(s.out / '.lock', 'w') as lock:
        try:
            # unlike flock's, it dies with this very process
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            fail(f'another run is writing {s.out}: wait for its end or choose another --out')
        run(s, tokenizer, files, fixed, fingerprint)


# -------------------------------------------------------------------------------------------------
# the command


def refuse(message):
    """End with one line on stderr and exit code 2."""
    print(f'prepare/text.py: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(2)


def read_flags(arguments):
    """The settings of the command line, each of the right type."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add, choices = refuse, parser.add_argument, ('true', 'false')
    add('--input', required=True, help='files, patterns and folders, with commas between')
    add('--out', type=Path, required=True, help='folder to write')
    add('--tokenizer', default='bytes',
        help='bytes, a file or folder that tokenizer.load takes, or a model on the Hugging Face '
        'hub')
    add('--seq_len', type=int, default=1024,
        help='targets of a sequence, which holds one token more')
    add('--val_fraction', type=float, default=0.01, help='share of the documents that is held out')
    add('--val_input', default='', help='hold out the documents of these files instead')
    add('--split', choices=('file', 'line', 'blank'), default='file',
        help='what is a document of a .txt file')
    add('--text_key', default='text', help='key or column of the text in JSON and parquet')
    add('--workers', type=int, default=0, help='processes that tokenize; 0: one a core')
    add('--seed', type=int, default=0, help='of the choice that --val_fraction makes')
    add('--sequences_per_member', type=int, default=64)
    add('--sequences_per_shard', type=int, default=8192)
    add('--max_document_mb', type=int, default=64,
        help='a longer document, or line of JSON, is a bad one')
    add('--skip_bad', default='false', type=str.lower, choices=choices,
        help='leave out and count bad documents: not JSON, no UTF-8, too long')
    add('--force', default='false', type=str.lower, choices=choices,
        help='make it anew where other settings were used before')

    s = parser.parse_args(arguments)
    s.skip_bad, s.force = s.skip_bad == 'true', s.force == 'true'
    return s


def parse(arguments):
    """(settings, tokenizer) of the command line; what is wrong ends in one line, exit code 2."""
    s = read_flags(arguments)
    least = dict(seq_len=1, workers=0, sequences_per_member=1, sequences_per_shard=1,
                 max_document_mb=1)
    for key, bound in least.items():
        if getattr(s, key) < bound:
            refuse(f'--{key}={getattr(s, key)} is less than {bound}')
    if not 0 <= s.val_fraction < 1:
        refuse(f'--val_fraction={s.val_fraction} is not in 0 <= val_fraction < 1')

    # as uint32, whatever the tokenizer's number of ids will be
    sequence_bytes = 4 * (s.seq_len + 1)
    for key, most in dict(sequences_per_shard=MAX_SHARD, sequences_per_member=MAX_MEMBER).items():
        if getattr(s, key) * sequence_bytes > most:
            refuse(f'--{key}={getattr(s, key)} is too much for --seq_len={s.seq_len}: '
                   f'{most // sequence_bytes} sequences fit into {most >> 20} MB')

    try:
        # a name of the hub, as no such folder is here
        if '/' in s.tokenizer and not os.path.exists(os.path.dirname(s.tokenizer)):
            import hub  # not above: it takes torch along, to each of the workers
            s.tokenizer = hub.fetch(s.tokenizer)
        return s, tokenizers.load(s.tokenizer)
    except (ValueError, OSError) as error:
        refuse(str(error))


def main(arguments=None):
    """The command."""
    s, tokenizer = parse(arguments)
    try:
        prepare(s, tokenizer)
    except BadInput as error:
        fail(error)
    except OSError as error:
        fail(f'{error}: check the disk and --out={s.out}, then run this again to go on')
    except KeyboardInterrupt:
        fail('stopped; run it again to go on')


if __name__ == '__main__':
    main()
