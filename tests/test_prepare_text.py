"""prepare/text.py: what is written is the documents, whatever they came in; any crash, worker
number and bad input."""

import contextlib
import fcntl
import gzip
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import webdataset
from conftest import ROOT
from pyarrow import parquet

import tokenizer

SCRIPT = ROOT / "prepare" / "text.py"
sys.path.append(str(SCRIPT.parent))  # by name, so that its worker processes find it too
import text  # noqa: E402
import text_files  # noqa: E402

MB = 1 << 20


def make(inputs, out, **settings):
    """The command in this process: bytes, short sequences, small shards, nothing held out unless
    `settings` say so."""
    settings = dict(seq_len=16, val_fraction=0.0, workers=1, sequences_per_member=3,
                    sequences_per_shard=8) | settings
    text.main([f"--input={inputs}", f"--out={out}",
               *(f"--{key}={value}" for key, value in settings.items())])


def refused(inputs, out, **settings):
    """The one line with which the command fails."""
    with pytest.raises(SystemExit) as stop:
        make(inputs, out, **settings)
    # a text is exit code 1
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, stop.value.code
    return stop.value.code


def run(*arguments, **options):
    """The real command; (exit code, lines on stderr)."""
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], check=False,
                          capture_output=True, text=True, timeout=100, **options)
    return done.returncode, done.stderr.splitlines()


def read_stream(folder):
    """(tokens of a part's stream, rows of the manifest), cut as the docstring says, counted as the
    manifest says."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["manifest.jsonl", *(f"{row['shard']}.tar" for row in rows)])
    stream, fill = None, None
    for row in rows:
        assert set(row) == {"shard", "num_sequences", "sequence_length", "dtype", "vocab_size",
                            "num_tokens", "num_bytes"}
        assert fill is None, "padding before the end"
        with tarfile.open(folder / f"{row['shard']}.tar") as archive:
            members = archive.getmembers()
            data = b"".join(archive.extractfile(member).read() for member in members)
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in members} == {
            (0, 0, "", 0o644)}
        assert all(member.name.endswith(".tokens.bin") for member in members)
        sequences = np.frombuffer(data, "<u4" if row["dtype"] == "uint32" else "<u2")
        sequences = sequences.reshape(row["num_sequences"], row["sequence_length"]).astype(
            np.int64)
        padding = sequences == np.iinfo(row["dtype"]).max
        assert padding.sum() == row["num_sequences"] * (
            row["sequence_length"] - 1) - row["num_tokens"]
        for sequence in sequences:
            assert fill is None and (stream is None or sequence[0] == stream[-1])
            if padding.any() and sequence is not None and (
                sequence == np.iinfo(row["dtype"]).max).any():
                fill = int(np.argmax(sequence == np.iinfo(row["dtype"]).max))
                assert fill > 1 and (sequence[fill:] == np.iinfo(row["dtype"]).max).all()
                sequence = sequence[:fill]
            stream = [*sequence] if stream is None else [*stream, *sequence[1:]]
    assert len(stream) == sum(row["num_tokens"] for row in rows) + 1
    assert len({row["sequence_length"] for row in rows}) == 1
    assert max(stream) < rows[0]["vocab_size"]
    return stream, rows


def read_documents(folder):
    """The documents of a part that the tokenizer `bytes` made, with their bos and eos checked."""
    stream, rows = read_stream(folder)
    documents, held = [], None
    for token in stream:
        if token == 256:
            assert held is None
            held = bytearray()
        elif token == 257:
            documents.append(held.decode())
            held = None
        else:
            held.append(token)
    assert held is None, "no eos at the end"
    assert sum(row["num_bytes"] for row in rows) == sum(
        len(document.encode()) for document in documents)
    return documents


def tree(folder):
    """{path: bytes} of all files."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


# --- documents in every kind of file


def texts(count, seed=0):
    """Documents of one line: lengths from 1 letter to many sequences, all planes of Unicode,
    spaces at the ends."""
    pick, letters = random.Random(seed), "ab c\t.é漢🙂<s>\u2028\x1f\x00\ufeff\"\\"
    found = ["".join(pick.choices(letters, k=pick.choice((1, 2, 15, 16, 17, 40, 200))))
             for _ in range(count)]
    return [f"{n}{document}{('.', ' ', '. ')[n % 3]}" for n, document in enumerate(found)]


def pack(path, data):
    """A file as its ending says."""
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_documents(folder, kind, documents, name="part"):
    """Files of a kind in the folder; the setting that they need."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, packed = kind.partition("+")
    path = folder / f"part.{name.split('-')[0]}{packed and '.' + packed}"
    end = "\r\n" if "crlf" in kind else "\n"
    if name == "txt-file":
        for n, document in enumerate(documents):
            pack(folder / f"{n:04d}{path.name}", document.encode())
        return {"split": "file"}
    if name.startswith("txt-line"):
        pack(path, (end.join(documents) + end * ("crlf" in kind)).encode())
        return {"split": "line"}
    if name.startswith("txt-blank"):
        pack(path, f"\ufeff{end} {end}{(end + end).join(documents)}{end}\t{end}{end}".encode())
        return {"split": "blank"}
    if name in ("jsonl", "json"):
        rows = [json.dumps({"id": n, "body": document}, ensure_ascii=n % 2 == 0) for n, document in
                enumerate(documents)]
        pack(path, ("\ufeff" + "\n\n".join(rows)).encode())
    if name == "parquet":
        table = pyarrow.table({"id": range(len(documents)), "body": documents})
        parquet.write_table(table, path, row_group_size=23)
    if name == "tar-txt":
        write_tar(path, [member for n, document in enumerate(documents) for member in (
            (f"d.d/{n}.jpg", b"picture"), (f"d.d/{n}.txt", document.encode()),
            (f"d.d/{n}.json", b"{"))])
    if name == "tar-json":
        write_tar(path, [(f"{n}.json", json.dumps({"body": document}).encode()) for n, document in
                         enumerate(documents)])
    return {"text_key": "body"}


KINDS = ["txt-file", "txt-file+gz", "txt-file+zst", "txt-line", "txt-line-crlf", "txt-line+gz",
         "txt-blank", "txt-blank-crlf+zst", "json", "jsonl", "jsonl+gz", "jsonl+zst", "parquet",
         "tar-txt", "tar-json"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_is_the_documents(tmp_path, kind, monkeypatch):
    """Also where the run is killed after a shard, in the middle of a file."""
    documents = texts(90)
    if "line" not in kind and "crlf" not in kind:
        # blank: no empty line, see texts
        documents = [document.replace("é", "\n") for document in documents]
    if "blank" in kind:
        documents = [document.replace("\n\n", "\n.\n") for document in documents]
        documents = ["\n".join(line if line.strip() else "-" for line in document.split("\n"))
                     for document in documents]
    if kind.startswith("txt-line"):
        documents[40:40] = ["", ""]
    settings = write_documents(tmp_path / "raw", kind, documents)
    monkeypatch.setattr(text, "CHUNK_RECORDS", 7)
    make(tmp_path / "raw", tmp_path / "out", **settings)
    assert read_documents(tmp_path / "out" / "train") == [
        document for document in documents if document]
    assert killed(40, tmp_path / "raw", tmp_path / "again", **settings)
    first = (tmp_path / "again" / "train" / "00000000.tar").stat().st_mtime_ns
    make(tmp_path / "raw", tmp_path / "again", **settings)
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    assert (
        tmp_path / "again" / "train" / "00000000.tar").stat().st_mtime_ns == first, "it began anew"


def test_order_of_files_folders_and_patterns(tmp_path):
    names = ["b.txt", "a.txt", "sub/c.txt", "sub/.hidden/d.txt", ".e.txt", "f.md", "sub/g.jsonl"]
    raw = tmp_path / "raw"
    for name in names:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_text('{"text": "g"}' if name.endswith("jsonl") else name)
    for _ in range(2):  # what it wrote is no input of its own
        make(raw, raw / "out")
    assert read_documents(raw / "out" / "train") == ["a.txt", "b.txt", "sub/c.txt", "g"]
    make(f"{raw}/b.txt,{raw}/*.txt, {raw}/sub/*.txt,", tmp_path / "out")
    assert read_documents(tmp_path / "out" / "train") == ["b.txt", "a.txt", "sub/c.txt"]


# --- tokens, manifest, tokenizer


def test_bytes_go_to_the_shard_in_which_a_document_ends(tmp_path):
    documents = texts(60)
    settings = write_documents(tmp_path / "raw", "txt-line", documents)
    make(tmp_path / "raw", tmp_path / "out", **settings)
    rows = read_stream(tmp_path / "out" / "train")[1]
    want, place = [0] * len(rows), -1
    for document in documents:
        # of its eos in the stream; a shard's targets are 8 * 16
        place += len(document.encode()) + 2
        want[(place - 1) // 128] += len(document.encode())
    assert [row["num_bytes"] for row in rows] == want and len(rows) > 10
    assert [row["num_sequences"] for row in rows[:-1]] == [8] * (len(rows) - 1)


@pytest.mark.parametrize("length", [13, 14, 15, 30, 126, 127, 128])
def test_ends_of_streams(tmp_path, length):
    """A stream that fills its last sequence or shard exactly, or one token less or more."""
    (tmp_path / "a.txt").write_text("x" * length)
    make(tmp_path / "a.txt", tmp_path / "out")
    assert read_documents(tmp_path / "out" / "train") == ["x" * length]
    shard = tmp_path / "out" / "train" / "00000000.tar"
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    sequences = -(-(length + 1) // 16)
    assert [sample["__key__"] for sample in samples] == [
        f"{n:010d}" for n in range(0, min(sequences, 8), 3)]
    assert len(samples[0]["tokens.bin"]) == min(sequences, 3) * 17 * 2


def write_ranks(path, tokens):
    """A tiktoken file, whose name begins with gpt2: one token is bos and eos."""
    import base64
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % n for n, token in enumerate(tokens)))
    return path


def test_one_token_for_both_ends_and_the_copy_of_the_tokenizer(tmp_path):
    ranks = write_ranks(
        tmp_path / "gpt2_tiny.tiktoken", [bytes([n]) for n in range(256)] + [b"th", b"the"])
    documents = ["the cat", "th", "on the mat"]
    settings = write_documents(tmp_path / "raw", "txt-line", documents)
    make(tmp_path / "raw", tmp_path / "out", tokenizer=ranks, **settings)
    tok = tokenizer.load(str(tmp_path / "out"))
    stream, rows = read_stream(tmp_path / "out" / "train")
    assert tok.bos_id == tok.eos_id
    assert stream == [token for document in documents
                      for token in [tok.bos_id, *tok.encode(document)]] + [tok.eos_id]
    assert sum(row["num_bytes"] for row in rows) == len("".join(documents))
    assert rows[0]["vocab_size"] == 261


def test_a_tokenizer_that_lies_in_the_folder_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    Path("out").mkdir()
    write_ranks(Path("out/gpt2.tiktoken"), [bytes([n]) for n in range(256)])
    for force in ("false", "true"):
        make("a.txt", "out", tokenizer="out/gpt2.tiktoken", force=force,
             seq_len=16 if force == "false" else 8)
        assert tokenizer.load("out").decode(read_stream(Path("out/train"))[0]) == "a"


def test_uint32(tmp_path):
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    ranks = write_ranks(tmp_path / "gpt2_wide.tiktoken", [bytes([n]) for n in range(256)] + pairs)
    (tmp_path / "a.txt").write_text("漢字\xff zzz" * 9)
    make(tmp_path / "a.txt", tmp_path / "out", tokenizer=ranks)
    stream, rows = read_stream(tmp_path / "out" / "train")
    tok = tokenizer.load(str(ranks))
    assert rows[0]["dtype"] == "uint32"
    assert max(stream) > 65535
    assert tok.decode(stream) == "漢字\xff zzz" * 9
    s = SimpleNamespace(sequences_per_shard=1, seq_len=1)
    state = {"rows": [], "documents": 0, "num_bytes": 0}
    dtypes = [
        text.Stream(tmp_path, s, size, state, np.empty(0)).dtype.name for size in (65534, 65535)]
    assert dtypes == ["uint16", "uint32"]


# --- what is held out


def test_split_by_number(tmp_path):
    documents = [f"document {n}" for n in range(600)]
    write_documents(tmp_path / "raw", "txt-line", documents)
    held = {}
    for seed in (0, 1):
        make(tmp_path / "raw", tmp_path / f"out{seed}", split="line", val_fraction=0.1, seed=seed)
        parts = [read_documents(tmp_path / f"out{seed}" / part) for part in ("train", "val")]
        held[seed] = parts[1]
        for part in parts:
            assert part == [document for document in documents if document in set(part)], "order"
        assert sorted(parts[0] + parts[1]) == sorted(documents) and 40 < len(parts[1]) < 80
    assert held[0] != held[1]
    # pinned: a change would move documents between training and validation of data sets made
    # before
    assert [documents.index(document) for document in held[0][:6]] == [38, 44, 61, 68, 72, 92]


def test_val_input(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    make(f"{tmp_path}/a.txt,{tmp_path}/b.txt", tmp_path / "out", val_input=tmp_path / "c.txt",
         val_fraction=0.9)
    assert [read_documents(tmp_path / "out" / part) for part in ("train", "val")] == [
        ["a", "b"], ["c"]]
    assert "b.txt" in refused(
        f"{tmp_path}/a.txt,{tmp_path}/b.txt", tmp_path / "out2", val_input=tmp_path / "b.txt")


def test_nothing_held_out_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    make(tmp_path / "a.txt", tmp_path / "out", val_fraction=1e-9)
    assert "no document fell into this part" in capsys.readouterr().out
    assert not (tmp_path / "out" / "val").exists()
    (tmp_path / "b.txt").write_text("")
    assert "no document to train on" in refused(tmp_path / "b.txt", tmp_path / "out2")


# --- workers and crashes


def killed(step, inputs, out, **settings):
    """The command in a child, killed before its step-th call that changes a disk; False if it
    ended before that."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), contextlib.redirect_stdout(io.StringIO()):
            count = 0

            def wrap(call):
                def wrapped(*arguments, **options):
                    nonlocal count
                    count += 1
                    if count == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*arguments, **options)
                return wrapped

            for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
                setattr(os, name, wrap(getattr(os, name)))
            make(inputs, out, **settings)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_sigkill_at_every_step(tmp_path, monkeypatch):
    settings = write_documents(tmp_path / "raw", "jsonl+gz", texts(24)) | {
        "val_fraction": 0.5, "sequences_per_shard": 16}
    monkeypatch.setattr(text, "CHUNK_RECORDS", 5)
    make(tmp_path / "raw", tmp_path / "whole", **settings)
    whole, step = tree(tmp_path / "whole"), 1
    assert {"train/00000003.tar", "val/00000001.tar"} <= set(whole)
    while killed(step, tmp_path / "raw", tmp_path / f"{step}", **settings):
        if step % 3 == 0:  # once more, in what is left of the first
            killed(5, tmp_path / "raw", tmp_path / f"{step}", **settings)
        make(tmp_path / "raw", tmp_path / f"{step}", **settings)
        assert tree(tmp_path / f"{step}") == whole, step
        step += 1
    assert step > 6 * 6


def test_sigkill_while_made_anew(tmp_path):
    """Nothing of the old remains, wherever --force=true is killed."""
    raw, other = tmp_path / "raw", tmp_path / "other"
    settings, more = write_documents(raw, "txt-line", texts(6)), write_documents(
        other, "txt-line", texts(30))
    make(raw, tmp_path / "whole", **settings)
    whole = tree(tmp_path / "whole")
    for step in range(1, 14):
        out = tmp_path / f"{step}"
        make(other, out, val_fraction=0.5, **more)
        assert killed(step, raw, out, force="true", **settings)
        assert step < 7 or not (out / "done.json").exists()
        # before the first save it still is the old one, and says so
        with contextlib.suppress(SystemExit):
            make(raw, out, **settings)
        if tree(out) != whole:
            assert step < 4
            make(raw, out, force="true", **settings)
        assert tree(out) == whole, step


def test_workers_and_a_real_sigkill(tmp_path):
    """Two workers write what one does; killed, they leave no process and no lock behind."""
    documents = texts(4000)
    settings = write_documents(tmp_path / "raw", "jsonl", documents)
    make(
        tmp_path / "raw", tmp_path / "one", sequences_per_shard=256, val_fraction=0.05, **settings)
    arguments = [f"--input={tmp_path}/raw", f"--out={tmp_path}/two", "--text_key=body",
                 "--seq_len=16", "--workers=2", "--sequences_per_member=3",
                 "--sequences_per_shard=256", "--val_fraction=0.05"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "two").glob("train/0*.tar")) and process.poll() is None:
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert "done.json" not in tree(tmp_path / "two")
    assert run(*arguments) == (0, [])
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert not [worker for worker in workers if Path(f"/proc/{worker}/exe").exists()]


def test_chunks_wait_in_bounded_number():
    """The input is read no further ahead than results are taken."""
    read = []

    def chunks():
        for n in range(40):
            read.append(n)
            yield [("train", "text", b"x" * n, "")], n

    taken = text.in_order(chunks(), 2, "bytes", "text")
    for n, ((done, _, _), after) in enumerate(taken):
        assert after == n and len(read) <= n + 2 * 2 + 1
        assert len(done["train"][0]) == (n + 2 if n else 0)
    assert n == 39


def test_a_place_far_in_a_file():
    lines = [b"x" * 999_999 + b"\n"] * 5
    for kept in range(5):
        rest = list(
            text_files.read_lines(io.BytesIO(b"".join(lines[:-1]) + b"end"), MB, kept * 1_000_000,
                                  kept))
        assert [count for _, _, count in rest] == list(range(kept + 1, 6))
        assert rest[-1][:2] == (b"end", 4_000_003)


def test_chunks_are_of_bounded_size(tmp_path):
    settings = write_documents(tmp_path, "txt-line", ["x" * 700_000] * 6 + ["y"] * 9000)
    s = SimpleNamespace(max_document_mb=1, seed=0, val_fraction=0.0, **settings)
    state = {"records": 0, "place": (0, 0, 0)}
    sizes = [(len(chunk), sum(len(row[2]) for row in chunk))
             for chunk, _ in text.chunks([tmp_path / "part.txt"], s, None, state)]
    assert sum(count for count, _ in sizes) == 9006
    assert max(size for _, size in sizes) < 2 * MB and max(count for count, _ in sizes) <= 4096


# --- an output that is there


def test_a_second_call_does_nothing(tmp_path, capsys):
    settings = write_documents(tmp_path / "raw", "txt-line", texts(30))
    make(tmp_path / "raw", tmp_path / "out", **settings)
    first = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    make(tmp_path / "raw", tmp_path / "out", **settings)
    again = capsys.readouterr().out.splitlines()
    assert "already prepared" in again[0]
    assert again[1:] == first.splitlines()
    assert "30 documents" in first
    assert {path: path.stat().st_mtime_ns for path in before} | {tmp_path / "out/.lock": 0} == \
        before | {tmp_path / "out/.lock": 0}
    (tmp_path / "out" / "train" / "00000001.tar").write_bytes(b"cut")
    assert "00000001.tar was lost or changed" in refused(
        tmp_path / "raw", tmp_path / "out", **settings)


def test_shards_and_progress_that_are_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_RECORDS", 5)
    settings = write_documents(tmp_path / "raw", "txt-line", texts(30))
    assert killed(70, tmp_path / "raw", tmp_path / "out", **settings)
    (tmp_path / "out" / "train" / "00000001.tar").unlink()
    assert "00000001.tar was lost or changed" in refused(
        tmp_path / "raw", tmp_path / "out", **settings)
    progress = tmp_path / "out" / "progress.npz"
    progress.write_bytes(progress.read_bytes()[:-9])
    assert "progress.npz can not be read" in refused(
        tmp_path / "raw", tmp_path / "out", **settings)
    make(tmp_path / "raw", tmp_path / "out", force="true", **settings)
    assert read_documents(tmp_path / "out" / "train") == texts(30)


def test_other_settings_are_refused(tmp_path):
    settings = write_documents(tmp_path / "raw", "txt-line", texts(30))
    make(tmp_path / "raw", tmp_path / "out", **settings)
    before = tree(tmp_path / "out")
    for key, value in (("seq_len", 8), ("seed", 1), ("val_fraction", 0.5),
                       ("sequences_per_shard", 9), ("sequences_per_member", 4),
                       ("max_document_mb", 3), ("split", "blank"), ("text_key", "b")):
        line = refused(tmp_path / "raw", tmp_path / "out", **settings | {key: value})
        assert key in line and "--force=true" in line and str(value) in line
    ranks = write_ranks(tmp_path / "gpt2.tiktoken", [bytes([n]) for n in range(256)])
    assert "other tokenizer" in refused(
        tmp_path / "raw", tmp_path / "out", tokenizer=ranks, **settings)
    # these change nothing
    make(tmp_path / "raw", tmp_path / "out", **settings | {"workers": 2, "skip_bad": "true"})
    os.utime(tmp_path / "raw" / "part.txt", (1, 1))
    assert "other input" in refused(tmp_path / "raw", tmp_path / "out", **settings)
    assert tree(tmp_path / "out") == before
    make(tmp_path / "raw", tmp_path / "out", tokenizer=ranks, force="true", **settings)
    make(tmp_path / "raw", tmp_path / "out", force="true", **settings)
    assert tree(tmp_path / "out").keys() == before.keys(), "the other tokenizer is left"
    assert read_documents(tmp_path / "out" / "train") == texts(30)


def test_an_input_that_changes_meanwhile(tmp_path, monkeypatch):
    settings = write_documents(tmp_path / "raw", "txt-line", texts(30))
    finish = text.Stream.add

    def grow(*arguments):
        with open(tmp_path / "raw" / "part.txt", "a") as file:
            file.write("more")
        return finish(*arguments)

    monkeypatch.setattr(text.Stream, "add", grow)
    assert "the input changed" in refused(tmp_path / "raw", tmp_path / "out", **settings)


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "00000000.tar").write_text("mine")
    assert "another origin" in refused(tmp_path / "a.txt", tmp_path / "out", force="true")
    assert (tmp_path / "out" / "train" / "00000000.tar").read_text() == "mine"


def test_two_runs_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "out").mkdir()
    child = os.fork()
    if child == 0:
        with open(tmp_path / "out" / ".lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            (tmp_path / "held").touch()
            time.sleep(60)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        assert "another run is writing" in refused(tmp_path / "a.txt", tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    make(tmp_path / "a.txt", tmp_path / "out")


def test_full_disk(tmp_path):
    """A file size limit stands for it: one line, nothing half-written, and it goes on when there
    is space."""
    settings = write_documents(tmp_path / "raw", "txt-line", texts(60))
    make(tmp_path / "raw", tmp_path / "whole", **settings | {"sequences_per_shard": 64})
    arguments = [
        f"--input={tmp_path}/raw", f"--out={tmp_path}/out", "--split=line", "--seq_len=16",
        "--workers=1", "--sequences_per_member=3", "--sequences_per_shard=64", "--val_fraction=0"]
    code, lines = run(
        *arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)))
    assert code == 1
    assert len(lines) == 1
    assert "too large" in lines[0]
    assert "check the disk" in lines[0]
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {
        ".lock", "progress.npz", "train", "manifest.jsonl"}
    make(tmp_path / "raw", tmp_path / "out", **settings | {"sequences_per_shard": 64})
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


# --- bad input


GOOD = b'{"text": "good"}\n'
LONG = b'{"text": "' + b"x" * MB + b'"}\n'
# of JSON: what the line says
BAD_LINES = {
    b"\xff": "can't decode byte 0xff", b"{": "not a line of JSON", b"[]": "not an object",
    b"1": "not an object",
    b"{}": "with a string 'text'", b'{"text": 1}': "with a string 'text'",
    b'{"text": null}': "with a string 'text'",
    b'{"text": "\\ud800"}': "surrogates not allowed", b"[" * 100_000: "not a line of JSON",
    b'{"text": ' + b"9" * 5000 + b"}": "not a line of JSON",
    LONG[:-1]: "longer than --max_document_mb=1"}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_lines(tmp_path, line, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 300 + b"\n" + line + b"\n" + GOOD * 2 + line)
    message = refused(path, tmp_path / "out", max_document_mb=1)
    assert f"{path}:302: " in message
    assert BAD_LINES[line] in message
    assert "--skip_bad=true" in message
    assert list((tmp_path / "out").glob("train/*")) == []
    make(path, tmp_path / "out", max_document_mb=1, skip_bad="true")  # the same run goes on
    assert read_documents(tmp_path / "out" / "train") == ["good"] * 302
    assert "2 bad documents" in capsys.readouterr().out


def test_surrogates_whatever_the_tokenizer_makes_of_them(tmp_path):
    ranks = write_ranks(tmp_path / "gpt2.tiktoken", [bytes([n]) for n in range(256)])
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"text": "\\ud800"}')
    assert "a.jsonl:2: " in refused(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=ranks)


@pytest.mark.parametrize(
    "kind", ["txt-line", "txt-blank", "txt-file", "jsonl", "parquet", "tar-txt", "tar-json"])
def test_the_longest_document(tmp_path, kind):
    extra = {"jsonl": len('{"id": 0, "body": ""}'), "tar-json": len('{"body": ""}')}.get(kind, 0)
    for more in (0, 1):
        settings = write_documents(tmp_path / f"raw{more}", kind, ["a" * (MB + more - extra)])
        settings |= {"max_document_mb": 1, "seq_len": 4096}
        if more:
            assert "longer than --max_document_mb=1" in refused(
                tmp_path / "raw1", tmp_path / "out1", **settings)
        else:
            make(tmp_path / "raw0", tmp_path / "out0", **settings)
            done = json.loads((tmp_path / "out0" / "done.json").read_bytes())
            assert done["parts"]["train"]["documents"] == 1


@pytest.mark.parametrize("split", ["file", "line", "blank"])
@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_a_bomb_takes_no_memory(tmp_path, packed, split):
    pack(tmp_path / f"a.txt.{packed}", bytes(40 * MB) + b"\n\ngood\n")
    tracemalloc.start()
    message = refused(
        tmp_path / f"a.txt.{packed}", tmp_path / "out", max_document_mb=1, split=split)
    assert "longer than --max_document_mb=1" in message
    if split != "file":
        make(tmp_path / f"a.txt.{packed}", tmp_path / "out", max_document_mb=1, split=split,
             skip_bad="true")
        assert read_documents(tmp_path / "out" / "train") == ["good"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * MB


@pytest.mark.parametrize("kind", ["txt-line+gz", "jsonl+zst", "parquet", "tar-txt"])
@pytest.mark.parametrize("left", [0, 0.5, 1])
def test_files_that_are_cut(tmp_path, kind, left):
    """Also at their very end, where a library may take it for the true one; --skip_bad=true does
    not help."""
    settings = write_documents(tmp_path, kind, texts(300))
    path = next(tmp_path.iterdir())
    data = path.read_bytes().rstrip(b"\0") if kind == "tar-txt" else path.read_bytes()
    path.write_bytes(data[:int(len(data) * left) - (left == 1)])
    message = refused(path, tmp_path / "out", skip_bad="true", **settings)
    assert f"{path} can not be read: " in message


def test_damaged_files(tmp_path):
    for kind, place in (("txt-line+gz", 0.5), ("jsonl+zst", 0), ("parquet", 0.4),
                        ("tar-txt", 0.5)):
        folder = tmp_path / kind
        settings = write_documents(folder, kind, texts(300))
        path = next(folder.iterdir())
        data = bytearray(path.read_bytes())
        # of a tar: a header among three, so all of them
        start = int(len(data) * place) // 512 * 512
        data[start:start + 4 * 512] = bytes(byte ^ 0x5A for byte in data[start:start + 4 * 512])
        path.write_bytes(data)
        assert f"{path} can not be read: " in refused(
            path, tmp_path / "out" / kind, **settings), kind


def test_bad_records_of_tables_and_tars(tmp_path, capsys):
    odd = pyarrow.array([b"good", b"\xff", None, b"good"], pyarrow.binary())
    parquet.write_table(
        pyarrow.table({"text": odd, "number": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert "row 2: 'utf-8'" in refused(tmp_path / "a.parquet", tmp_path / "out1")
    assert "no column 'x' but text, number" in refused(
        tmp_path / "a.parquet", tmp_path / "out2", text_key="x")
    assert "can not be read" in refused(
        tmp_path / "a.parquet", tmp_path / "out3", text_key="number")
    write_tar(tmp_path / "a.tar",
              [("a.txt", b"good"), ("b.json", b"{"), ("c.txt", b"good"), ("d.jpg", b"no text")])
    assert "a.tar: b.json: not a line of JSON" in refused(tmp_path / "a.tar", tmp_path / "out4")
    make(tmp_path, tmp_path / "out5", skip_bad="true")
    assert read_documents(tmp_path / "out5" / "train") == ["good"] * 4
    assert "3 bad documents" in capsys.readouterr().out
    write_tar(tmp_path / "b.tar", [("a.txt", b"one"), ("a.txt", b"two")])
    assert "twice" in refused(tmp_path / "b.tar", tmp_path / "out6")
    # of two that are joined, the second is not left out, nor is a link
    (tmp_path / "c.tar").write_bytes((tmp_path / "a.tar").read_bytes() * 2)
    assert "joined" in refused(tmp_path / "c.tar", tmp_path / "out7", skip_bad="true")
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        link = tarfile.TarInfo("e.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        archive.addfile(link)
    assert "is a link" in refused(tmp_path / "a.tar", tmp_path / "out8", skip_bad="true")


def test_names_in_capitals_are_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/A.TXT").write_text("one")
    (tmp_path / "in/B.JSONL").write_text('{"text": "two"}\n')
    with gzip.open(tmp_path / "in/C.TXT.GZ", "wt") as file:
        file.write("three")
    write_tar(tmp_path / "in/D.TAR", [("x.TXT", b"four")])
    make(tmp_path / "in", tmp_path / "out")
    assert sorted(read_documents(tmp_path / "out/train")) == ["four", "one", "three", "two"]


@pytest.mark.parametrize("inputs, words", [
    ("gone.txt", "does not exist"),
    ("*.txt", "matches no file"), ("empty", "holds no file"), ("a.csv", "ends in no"),
    (",", "names no file")])
def test_inputs_that_are_not_there(tmp_path, inputs, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").touch()
    message = refused(inputs if inputs == "," else tmp_path / inputs, tmp_path / "out")
    assert inputs in message and words in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [
    ["--seq_len=0"], ["--val_fraction=1"], ["--val_fraction=-0.1"], ["--val_fraction=nan"],
    ["--workers=-1"],
    ["--sequences_per_shard=0"], ["--seq_len=many"], ["--split=word"], ["--skip_bad=maybe"],
    ["--tokenizer=gone.model"],
    ["--tokenizer=a.txt"], ["--seq_lem=8"], ["--seq_len=100000"],
    ["--seq_len=1000000", "--sequences_per_shard=9"]])
def test_wrong_settings(tmp_path, capsys, arguments):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(SystemExit) as stop:
        text.main([f"--input={tmp_path}/a.txt", f"--out={tmp_path}/out", *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and arguments[0].split("=")[0][2:] in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_command_says_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{\n")
    code, lines = run("--input=a.jsonl", "--out=out", cwd=tmp_path)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("prepare/text.py: a.jsonl:2: not a line of JSON")
    code, lines = run("--input=a.jsonl", cwd=tmp_path)
    assert code == 2 and len(lines) == 1 and "--out" in lines[0]
