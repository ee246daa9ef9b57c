"""Any text files -> a tokenized data set to pretrain on: tar shards of token sequences, training and validation.

    python prepare/text.py --input='raw/*.jsonl.gz' --out=datasets/mine --tokenizer=bytes --seq_len=1024 \\
        --val_fraction=0.01

The input is a comma-separated list of files, patterns and folders (read recursively); a file named twice is read once:

    .txt  .txt.gz  .txt.zst         --split=file: a document a file; line: one a line; blank: blank lines part them
    .jsonl  .json  (also .gz .zst)  an object a line; its `--text_key` is the document
    .parquet                        a document a row of the column `--text_key`
    .tar                            webdataset samples: `key.txt`, else `--text_key` of `key.json`

It writes `train/` and `val/`, each with `00000000.tar ...` and `manifest.jsonl`, and a copy of the tokenizer.
Validation documents are chosen by a hash of their running number, or are those of `--val_input`. The documents of a
part are one stream of tokens, each `bos text eos` (`bos text`, and one last eos, where both are the same token as in
GPT-2's). It is cut into sequences of seq_len + 1 tokens, each beginning with the last token of the one before, so that
every token but the very first is a target once. The last sequence is filled up with the largest value of the dtype,
which is no id.

A member `<number of its first sequence>.tokens.bin` holds `--sequences_per_member` sequences, little-endian uint16, or
uint32 from 65535 ids on. A row of the manifest counts the sequences of a shard, its targets (`num_tokens`) and the
UTF-8 bytes of the documents that end in it (`num_bytes`): summed loss / ln 2 / num_bytes is bits per byte.

The bytes written do not depend on `--workers`. After a crash, the same command goes on from the last finished shard.
"""

import argparse
import codecs
import contextlib
import fcntl
import glob
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tokenizer as tokenizers  # noqa: E402

FORMAT = 1                                      # part of the fingerprint: raise it when what is written changes
ENDINGS = (*(kind + packed for kind in (".txt", ".jsonl", ".json") for packed in ("", ".gz", ".zst")),
           ".parquet", ".tar")
CHUNK_BYTES, CHUNK_RECORDS = 1 << 20, 4096      # what a worker gets at a time; a chunk may be one record longer
MAX_SHARD, MAX_MEMBER = 1 << 30, 64 << 20       # bytes: a growing shard is held in memory, a member where it is read
PARTS = ("train", "val")


def fail(message):
    """End with one line on stderr and exit code 1."""
    raise SystemExit(f"prepare/text.py: {' '.join(str(message).split())}") from None


# ---------------------------------------------------------------------------------------------------------------------
# files -> records: (form, bytes or what is wrong, where, place, bytes of the file read). `place` is two numbers with
# which reading goes on after the record: where to begin, and how many lines or samples came before


def find_inputs(names, out):
    """Paths of a comma-separated list of files, patterns and folders, sorted inside each, none of them twice."""
    found = {}
    for name in filter(None, (name.strip() for name in names.split(","))):
        if os.path.isdir(name):
            paths = [path for path in Path(name).rglob("*") if path.name.endswith(ENDINGS) and path.is_file()
                     and not any(part.startswith(".") for part in path.relative_to(name).parts)
                     and out.resolve() not in path.resolve().parents]
            why = f"holds no file that ends in {' '.join(ENDINGS)}"
        else:
            paths = [Path(path) for path in ([name] if os.path.exists(name) else glob.glob(name, recursive=True))]
            paths = [path for path in paths if path.is_file()]
            why = "matches no file" if glob.has_magic(name) else "does not exist"
        if not paths:
            fail(f"input {name!r} {why}")
        for path in sorted(paths):
            if not path.name.endswith(ENDINGS):
                fail(f"input {path} ends in none of {' '.join(ENDINGS)}")
            found.setdefault(path.resolve(), path)
    return list(found.values()) or fail(f"input {names!r} names no file")


def unpack(raw, path):
    """The file as it was before it was packed; a packed file that is cut raises when its end is read."""
    if path.suffix in (".gz", ".zst") and not path.stat().st_size:
        raise EOFError("the file is empty, and a packed file is never")
    if path.suffix == ".zst":
        import pyarrow
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 16)  # zstandard's would not see a cut
    return gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw


def chomp(line):
    """A line without its end."""
    return line.removesuffix(b"\n").removesuffix(b"\r")


def read_lines(file, limit, at, count):
    """(line with its end, or None where it is too long; bytes and lines up to there)."""
    for start in range(0, at, 1 << 20):
        file.read(min(at - start, 1 << 20))
    while line := file.readline(limit + 6):  # 3 for the mark at a file's beginning, 2 for \r\n, 1 to see it is too long
        at, count = at + len(line), count + 1
        if count == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(chomp(line)) > limit:
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
                at += len(line)
            line = None
        yield line, at, count


def read_blocks(lines, limit):
    """The same for blocks of lines between blank ones, and the number of a block's first line."""
    held, size, first, place = io.BytesIO(), 0, 0, ()
    for line, at, count in itertools.chain(lines, [(b"", 0, 0)]):  # the end of the file ends a block too
        if line is None or line.strip():
            first, place = first or count, (at, count)
            size += limit + 3 if line is None else len(line)
            if size <= limit + 2:
                held.write(line)
        elif first:
            text = chomp(held.getvalue())
            yield text if size <= limit + 2 and len(text) <= limit else None, *place, first
            held, size, first = io.BytesIO(), 0, 0


def text_records(raw, path, s, at, count):
    """Records of a .txt, .json or .jsonl file."""
    limit, file = s.max_document_mb << 20, unpack(raw, path)
    form = "text" if path.name.removesuffix(".gz").removesuffix(".zst").endswith(".txt") else "json"
    if form == "text" and s.split == "file":
        if not at:
            data = file.read(limit + len(codecs.BOM_UTF8) + 1)
            text = data.removeprefix(codecs.BOM_UTF8)
            yield "text", text if len(text) <= limit else None, path, (1, 0), raw.tell()
        return
    lines = read_lines(file, limit, at, count)
    if form == "text" and s.split == "blank":
        for text, at, count, first in read_blocks(lines, limit):
            yield "text", text, f"{path}:{first}", (at, count), raw.tell()
        return
    for line, at, count in lines:
        if form == "text" or line is None or line.strip():  # a blank line is no record of JSON
            yield form, None if line is None else chomp(line), f"{path}:{count}", (at, count), raw.tell()


def parquet_records(raw, path, s, at, count):
    """Records of a column of a .parquet file, a few rows in memory at a time."""
    import pyarrow
    from pyarrow import parquet
    table = parquet.ParquetFile(raw, buffer_size=1 << 20)  # without it, a whole row group would be read at once
    row, size = 0, path.stat().st_size
    if s.text_key not in table.schema_arrow.names:
        raise ValueError(f"no column {s.text_key!r} but {', '.join(table.schema_arrow.names)}; give --text_key")
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if row + rows <= at:
            row += rows
            continue
        for batch in table.iter_batches(16, [group], [s.text_key], use_threads=False):
            for value in batch.column(0).cast(pyarrow.large_binary()):  # the bytes as they are, to be checked later
                row, data = row + 1, value.as_buffer()
                if row > at:
                    form, data = ("bad", f"{s.text_key!r} is null") if data is None else \
                        ("text", data.to_pybytes() if data.size <= s.max_document_mb << 20 else None)
                    yield form, data, f"{path}: row {row}", (row, 0), size * row // table.metadata.num_rows


def tar_records(raw, path, s, at, count):
    """Records of the samples of a .tar file: a sample is a run of members whose names differ after the first dot."""
    raw.seek(at)
    archive = tarfile.open(fileobj=raw, mode="r:")

    def members():
        while (member := archive.next()) is not None:
            archive.members.clear()  # or it would remember every one
            folder, name = os.path.split(member.name)
            key, _, ending = name.partition(".")
            if member.isfile():
                yield (folder, key), ending, member

    for i, (_, group) in enumerate(itertools.groupby(members(), key=lambda item: item[0])):
        group = list(group)
        sample = {ending: member for _, ending, member in group}
        if len(sample) < len(group):
            raise ValueError(f"a member beside {group[0][2].name} is there twice")
        form = "text" if "txt" in sample else "json"
        member, start = sample.get("txt", sample.get("json")), group[0][2].offset
        if member and i >= count:  # a place is the sample that was read last, to be left out
            data = archive.extractfile(member).read() if member.size <= s.max_document_mb << 20 else None
            yield form, data, f"{path}: {member.name}", (start, 1), start
    raw.seek(archive.offset)
    if raw.read(512) != bytes(512):  # tarfile takes a damaged header, or none, for the end
        raise ValueError(f"damaged or cut at byte {archive.offset}")


def records(files, s, place):
    """Records of all files from a place on: (file's number, *place) before, and after each record."""
    for i, path in enumerate(files[place[0]:], place[0]):
        at, count = place[1:] if i == place[0] else (0, 0)
        kind = {".parquet": parquet_records, ".tar": tar_records}.get(path.suffix, text_records)
        try:
            with open(path, "rb") as raw:
                for form, data, where, after, read in kind(raw, path, s, at, count):
                    if data is None:
                        form, data = "bad", f"longer than --max_document_mb={s.max_document_mb}"
                    yield form, data, str(where), (i, *after), read
        except Exception as error:  # of a damaged file: each library has its own
            fail(f"{path} can not be read: {str(error) or type(error).__name__}")


def chunks(files, s, fixed, state):
    """([(part, form, bytes or what is wrong, where)], state after them); `fixed` files are for training alone."""
    chunk, size, number, base = [], 0, state["records"], 0
    sizes = [0, *itertools.accumulate(path.stat().st_size for path in files)]
    for form, data, where, place, read in records(files, s, state["place"]):
        if fixed is not None:
            part = PARTS[place[0] >= fixed]
        else:  # by number, so that it depends neither on workers nor on what other documents hold
            digest = hashlib.sha256(f"{s.seed} {number}".encode()).digest()
            part = PARTS[int.from_bytes(digest[:8], "big") < s.val_fraction * 2**64]
        chunk.append((part, form, data, where))
        number, size, base = number + 1, size + len(data), sizes[place[0]]
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_RECORDS:
            yield chunk, {"records": number, "place": place, "read": base + read}
            chunk, size = [], 0
    yield chunk, {"records": number, "place": (len(files), 0, 0), "read": sizes[-1]}


# ---------------------------------------------------------------------------------------------------------------------
# records -> tokens, in worker processes


def start_worker(name, text_key):
    """Load the tokenizer of this process, and end with the process that feeds it: its own end may be a SIGKILL."""
    global WORKER
    WORKER = tokenizers.load(name), text_key
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the parent stops the others
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def text_of(form, data):
    """The document of a record; ValueError says why there is none."""
    if form == "bad":
        raise ValueError(data)
    text, text_key = data.decode(), WORKER[1]
    if form == "json":
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a line of JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
            raise ValueError(f"not an object with a string {text_key!r} (--text_key)")
        text = record[text_key]
        text.encode()  # half a surrogate pair is fine in JSON alone
    return text


def tokenize(chunk):
    """{part: (tokens end to end, the number of tokens and bytes of each document)}, what is bad, how many are empty."""
    tokenizer, found, bad, empty = WORKER[0], {part: ([], [], []) for part in PARTS}, [], 0
    end = [tokenizer.eos_id] * (tokenizer.bos_id != tokenizer.eos_id)
    for part, form, data, where in chunk:
        try:
            text = text_of(form, data)
            ids = [tokenizer.bos_id, *tokenizer.encode(text), *end] if text else []
        except ValueError as error:
            bad.append(f"{where}: {error}")
            continue
        empty += not ids
        tokens, lengths, sizes = found[part]
        if ids:
            tokens.append(np.array(ids, np.uint32))
            lengths.append(len(ids))
            sizes.append(len(text.encode()))
    return {part: (np.concatenate([np.empty(0, np.uint32), *tokens]), np.array(lengths, np.int64),
                   np.array(sizes, np.int64)) for part, (tokens, lengths, sizes) in found.items()}, bad, empty


def in_order(chunks, workers, *setup):
    """(tokenize(chunk), state) of each (chunk, state), in order; at most 2 * workers + 1 chunks wait at any time."""
    if workers == 1:
        start_worker(*setup)
        yield from ((tokenize(chunk), after) for chunk, after in chunks)
        return
    waiting = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, setup)
    try:
        for chunk, after in chunks:
            waiting.append((pool.submit(tokenize, chunk), after))
            if len(waiting) > 2 * workers:
                future, after = waiting.popleft()
                yield future.result(), after
        yield from ((future.result(), after) for future, after in waiting)
    except BrokenProcessPool:
        fail("a worker process was killed, by a lack of memory perhaps: run this again with fewer --workers")
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# tokens -> shards


@contextlib.contextmanager
def atomic(path):
    """A file to write that gets its name when it is whole and on the disk, or never."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the name too
    os.close(folder)


class Stream:
    """The tokens of one part that wait for their shard; `rows` are the manifest's of the shards that are written."""

    def __init__(self, folder, s, vocab_size, saved, tokens):
        self.folder, self.s, self.vocab_size = folder, s, vocab_size
        self.dtype = np.dtype("<u4" if vocab_size >= 65535 else "<u2")
        self.rows, self.documents, self.num_bytes = saved["rows"], saved["documents"], saved["num_bytes"]
        self.waiting, self.count = [tokens.astype(self.dtype)], len(tokens)
        self.step = s.sequences_per_shard * s.seq_len  # a shard holds one token more, which begins the next one too

    @property
    def tokens(self):
        return len(self.rows) * self.step + self.count

    def state(self):
        return {"rows": self.rows, "documents": self.documents, "num_bytes": self.num_bytes}

    def add(self, tokens, lengths, sizes):
        """Take documents' tokens; write the shards that they fill. True if there were some."""
        lasts = self.count + np.cumsum(lengths, dtype=np.int64) - 1  # where documents end
        self.waiting.append(tokens.astype(self.dtype))
        self.count += len(tokens)
        self.documents += len(lengths)
        full = (self.count - 1) // self.step  # shards
        if full > 0:
            held = np.concatenate(self.waiting)
            for start in range(0, full * self.step, self.step):
                ended = np.searchsorted(lasts, start + self.step, side="right")
                self.num_bytes += int(sizes[:ended].sum())
                lasts, sizes = lasts[ended:], sizes[ended:]
                self.write(held[start:start + self.step + 1], self.step)
            self.waiting = [held[full * self.step:].copy()]
            self.count = len(self.waiting[0])
        self.num_bytes += int(sizes.sum())
        return full > 0

    def close(self, last):
        """Write what is left, after the tokens `last`, and the manifest."""
        if not self.documents:
            return
        self.add(np.array(last, np.uint32), np.empty(0, np.int64), np.empty(0, np.int64))
        if self.count > 1:
            fill = np.full(-(self.count - 1) % self.s.seq_len, np.iinfo(self.dtype).max, self.dtype)
            self.write(np.concatenate([*self.waiting, fill]), self.count - 1)
        with atomic(self.folder / "manifest.jsonl") as file:
            file.write("".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def write(self, tokens, num_tokens):
        """A shard of all of the tokens, and its row."""
        from webdataset import TarWriter  # it imports torch
        length, name = self.s.seq_len + 1, f"{len(self.rows):08d}"
        sequences = np.lib.stride_tricks.sliding_window_view(tokens, length)[::self.s.seq_len]
        self.folder.mkdir(exist_ok=True)
        with atomic(self.folder / f"{name}.tar") as file, \
                TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
            for start in range(0, len(sequences), self.s.sequences_per_member):
                key = f"{len(self.rows) * self.s.sequences_per_shard + start:010d}"
                writer.write({"__key__": key,
                              "tokens.bin": sequences[start:start + self.s.sequences_per_member].tobytes()})
        self.rows.append({"shard": name, "num_sequences": len(sequences), "sequence_length": length,
                          "dtype": self.dtype.name, "vocab_size": self.vocab_size, "num_tokens": num_tokens,
                          "num_bytes": self.num_bytes})
        self.num_bytes = 0


# ---------------------------------------------------------------------------------------------------------------------
# the run: how far it is stands in `progress.npz`, after each shard; `done.json` takes its place in the end


def recall(out, fingerprint, force):
    """(state, {part: tokens that wait}) of an earlier run into `out`, or of a new one; (state, None) if all is done."""
    progress, done = out / "progress.npz", out / "done.json"
    ours = progress.exists() or done.exists()
    if not ours and any((out / part).exists() for part in PARTS):
        fail(f"{out} holds a train or val of another origin: move it away or choose another --out")
    if force or not ours:
        return {"fingerprint": fingerprint, "place": (0, 0, 0), "records": 0, "read": 0, "empty": 0, "bad": 0,
                "parts": {part: {"rows": [], "documents": 0, "num_bytes": 0} for part in PARTS}}, \
               {part: np.empty(0, np.uint32) for part in PARTS}
    try:
        if progress.exists():
            with np.load(progress) as saved:
                state, tokens = json.loads(saved["state"].tobytes()), {part: saved[part] for part in PARTS}
        else:
            state, tokens = json.loads(done.read_bytes()), None
    except Exception as error:
        fail(f"{progress if progress.exists() else done} can not be read ({error}): --force=true makes all anew")
    for key, value in fingerprint.items():
        if value != state["fingerprint"].get(key):
            change = "input" if key == "files" else f"{key} ({state['fingerprint'].get(key)}, not {value})"
            fail(f"{out} was made with other {change}: choose another --out, or --force=true to make it anew")
    shards = [f"{part}/{row['shard']}.tar" for part in PARTS for row in state["parts"][part]["rows"]]
    written = state.get("written", dict.fromkeys(shards))
    for name, size in written.items():
        if not (out / name).is_file() or size not in (None, (out / name).stat().st_size):
            fail(f"{out / name} was lost or changed since it was made: --force=true makes all anew")
    return state, tokens


def save(out, state, streams):
    """Write down how far the run is."""
    state = state | {"parts": {part: stream.state() for part, stream in streams.items()}}
    with atomic(out / "progress.npz") as file:
        np.savez(file, state=np.frombuffer(json.dumps(state).encode(), np.uint8),
                 **{part: np.concatenate(stream.waiting) for part, stream in streams.items()})


def clear(out, tokenizer):
    """Remove what an earlier run made, its tokenizer too, or load(out) might find that."""
    (out / "done.json").unlink(missing_ok=True)
    for part in PARTS:
        shutil.rmtree(out / part, ignore_errors=True)
    for path in (*out.glob("tokenizer*.*"), *out.glob("special_tokens_map.json"), *out.glob("*.tiktoken")):
        if path.resolve() not in {Path(file).resolve() for file in tokenizer.files}:
            path.unlink()


def copy_tokenizer(out, tokenizer):
    """Paths of the copies; a sentencepiece model gets the name tokenizer.model, of the others the name tells more."""
    copies = []
    for path in map(Path, tokenizer.files):
        copies.append(out / ("tokenizer.model" if path.suffix == ".model" else path.name))
        if path.resolve() != copies[-1].resolve():
            with atomic(copies[-1]) as file:
                file.write(path.read_bytes())
    return copies


def report(s, state):
    """What was made, for people."""
    for part in PARTS if s.val_fraction or s.val_input else PARTS[:1]:
        made = state["parts"][part]
        if rows := made["rows"]:
            tokens, num_bytes, sequences = (sum(row[key] for row in rows) for key in
                                            ("num_tokens", "num_bytes", "num_sequences"))
            print(f"{s.out / part}: {made['documents']:,} documents, {num_bytes:,} bytes, {tokens:,} tokens "
                  f"({num_bytes / tokens:.3f} bytes each), {sequences:,} sequences, {len(rows):,} shards")
        else:
            print(f"{s.out / part}: no document fell into this part, so it was not written")
    print(f"left out: {state['empty']:,} empty and {state['bad']:,} bad documents")


def run(s, tokenizer, files, fixed, fingerprint):
    """All of the input, from where an earlier run stopped."""
    state, tokens = recall(s.out, fingerprint, s.force)
    if tokens is None:
        print(f"{s.out} is already prepared")
        return report(s, state)
    streams = {part: Stream(s.out / part, s, tokenizer.vocab_size, state["parts"][part], tokens[part])
               for part in PARTS}
    save(s.out, state, streams)  # from here on, the folder is ours
    if not state["records"]:
        clear(s.out, tokenizer)
    copies = copy_tokenizer(s.out, tokenizer)
    results = in_order(chunks(files, s, fixed, state), s.workers or os.cpu_count(), s.tokenizer, s.text_key)
    bar = tqdm(total=sum(path.stat().st_size for path in files), initial=state["read"], unit="B", unit_scale=True,
               desc="read", delay=1, mininterval=0.5 if sys.stderr.isatty() else 30)
    with bar, contextlib.closing(results):
        for (done, bad, empty), after in results:
            if bad and not s.skip_bad:
                fail(f"{bad[0]} (--skip_bad=true leaves out and counts such documents)")
            shards = [stream.add(*done[part]) for part, stream in streams.items()]
            state |= after | {"empty": state["empty"] + empty, "bad": state["bad"] + len(bad)}
            if any(shards):
                save(s.out, state, streams)
            bar.set_postfix_str(f"{sum(stream.documents for stream in streams.values()):,} documents, "
                                f"{sum(stream.tokens for stream in streams.values()):,} tokens", refresh=False)
            bar.update(after["read"] - bar.n)
    if digest_of(files) != fingerprint["files"]:
        fail("the input changed while it was read: --force=true makes all anew")
    if not streams["train"].documents:
        fail(f"no document to train on: {state['records']:,} records were read, {state['empty']:,} of them empty and "
             f"{state['bad']:,} bad")
    for stream in streams.values():
        stream.close([tokenizer.eos_id] * (tokenizer.bos_id == tokenizer.eos_id))
    state["parts"] = {part: stream.state() for part, stream in streams.items()}
    written = [*copies, *(path for part in PARTS for path in sorted((s.out / part).glob("*")))]
    state["written"] = {str(path.relative_to(s.out)): path.stat().st_size for path in written}
    with atomic(s.out / "done.json") as file:
        file.write(json.dumps(state).encode())
    (s.out / "progress.npz").unlink()
    report(s, state)


def digest_of(files):
    """What tells that no file was changed, renamed, added or taken away."""
    rows = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def prepare(s, tokenizer):
    """Make the data set that the settings `s` describe."""
    files, fixed = find_inputs(s.input, s.out), None
    if s.val_input:
        fixed, held_out = len(files), find_inputs(s.val_input, s.out)
        if both := {path.resolve() for path in files} & {path.resolve() for path in held_out}:
            fail(f"{min(both)} is in --input and in --val_input")
        files += held_out
    # without skip_bad, which changes nothing until a bad document comes: then the run can go on with it
    fingerprint = {key: getattr(s, key) for key in (
        "seq_len", "val_fraction", "seed", "split", "text_key", "sequences_per_member", "sequences_per_shard",
        "max_document_mb")}
    digest = hashlib.sha256(b"".join(Path(path).read_bytes() for path in tokenizer.files)).hexdigest()
    fingerprint |= {"format": FORMAT, "tokenizer": digest if tokenizer.files else s.tokenizer, "fixed": fixed,
                    "files": digest_of(files)}
    s.out.mkdir(parents=True, exist_ok=True)
    with open(s.out / ".lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, it dies with this very process
        except (BlockingIOError, PermissionError):
            fail(f"another run is writing {s.out}: wait for its end or choose another --out")
        run(s, tokenizer, files, fixed, fingerprint)


def parse(arguments):
    """(settings, tokenizer) of the command line; what is wrong ends in one line and exit code 2."""
    def refuse(message):
        print(f"prepare/text.py: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error, add, switch = refuse, parser.add_argument, {"type": str.lower, "choices": ("true", "false")}
    add("--input", required=True, help="files, patterns and folders, with commas between")
    add("--out", type=Path, required=True, help="folder to write")
    add("--tokenizer", default="bytes", help="bytes, a file or folder that tokenizer.load takes, or "
        "a model on the Hugging Face hub")
    add("--seq_len", type=int, default=1024, help="targets of a sequence, which holds one token more")
    add("--val_fraction", type=float, default=0.01, help="share of the documents that is held out")
    add("--val_input", default="", help="hold out the documents of these files instead")
    add("--split", choices=("file", "line", "blank"), default="file", help="what is a document of a .txt file")
    add("--text_key", default="text", help="key or column of the text in JSON and parquet")
    add("--workers", type=int, default=0, help="processes that tokenize; 0: one a core")
    add("--seed", type=int, default=0, help="of the choice that --val_fraction makes")
    add("--sequences_per_member", type=int, default=64)
    add("--sequences_per_shard", type=int, default=8192)
    add("--max_document_mb", type=int, default=64, help="a longer document, or line of JSON, is a bad one")
    add("--skip_bad", default="false", **switch, help="leave out and count bad documents: not JSON, no UTF-8, too long")
    add("--force", default="false", **switch, help="make it anew where other settings were used before")
    s = parser.parse_args(arguments)
    s.skip_bad, s.force = s.skip_bad == "true", s.force == "true"
    for key, least in (("seq_len", 1), ("workers", 0), ("sequences_per_member", 1), ("sequences_per_shard", 1),
                       ("max_document_mb", 1)):
        if getattr(s, key) < least:
            refuse(f"--{key}={getattr(s, key)} is less than {least}")
    if not 0 <= s.val_fraction < 1:
        refuse(f"--val_fraction={s.val_fraction} is not in 0 <= val_fraction < 1")
    for key, most in (("sequences_per_shard", MAX_SHARD), ("sequences_per_member", MAX_MEMBER)):
        if getattr(s, key) * 4 * (s.seq_len + 1) > most:
            refuse(f"--{key}={getattr(s, key)} is too much for --seq_len={s.seq_len}: {most // 4 // (s.seq_len + 1)} "
                   f"sequences fit into {most >> 20} MB")
    try:
        if "/" in s.tokenizer and not os.path.exists(os.path.dirname(s.tokenizer)):
            import hub  # only here: it takes torch along
            s.tokenizer = hub.fetch(s.tokenizer)
        return s, tokenizers.load(s.tokenizer)
    except (ValueError, OSError) as error:
        refuse(str(error))


def main(arguments=None):
    """The command."""
    s, tokenizer = parse(arguments)
    try:
        prepare(s, tokenizer)
    except OSError as error:
        fail(f"{error}: check the disk and --out={s.out}, then run this again to go on")
    except KeyboardInterrupt:
        fail("stopped; run it again to go on")


if __name__ == "__main__":
    main()
