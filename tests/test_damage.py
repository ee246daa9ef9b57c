"""Damaged files of every kind: what is read is what tarfile, webdataset, numpy, PIL, json, pyarrow
and safetensors read, or one error that says where, or a counted placeholder. A few hundred here;
`make long` tries thousands, and says how many came to what."""
import io
import json
import os
import re
import resource
import shutil
import tarfile
import time
from collections import Counter
from types import SimpleNamespace

import damage
import numpy as np
import pytest
import tiny
from conftest import ROOT, encode, make_processor, picture, sample, write_tar
from webdataset import tariterators

import hub
import npy as npys
import tasks
from shards import BadSample, Folder, read_manifest

NEEDS = 'families', 'pictures.py'


def counts(few, many):
    """So many cases here, and so many in `make long`."""
    return pytest.mark.parametrize('count', [few, pytest.param(many, marks=pytest.mark.long)])


def sweep(name, count, case):
    """case(seed) -> (kind of damage, outcome) for each seed; prints what came of them."""
    outcomes, slowest, wrong = Counter(), (0.0, ''), []
    for seed in range(count):
        begun = time.perf_counter()
        try:
            with damage.at_most(20):
                kind, outcome = case(seed)
        except BaseException as error:      # noqa: B036 - hangs, and pytest's own, are among them
            wrong.append(f'{name}, seed {seed}: {error!r:.600}')
            continue
        outcomes[outcome] += 1
        slowest = max(slowest, (time.perf_counter() - begun, f'{kind}, seed {seed}'))
    print(f'\n{name}: {count} damaged: {dict(outcomes.most_common())}; slowest '
          f'{1e3 * slowest[0]:.0f} ms ({slowest[1]})')
    assert not wrong, '\n'.join([f'{len(wrong)} are wrong', *wrong[:20]])
    return outcomes


# -----------------------------------------------------------------------------------------------
# tars


def split_name(name):
    """(key, extension) as webdataset splits a name, less what macOS and others add; or None."""
    folder, slash, file = name.rpartition('/')
    stem, _, ext = file.partition('.')
    if not stem or not ext or re.match('__[^/]*__/', name):
        return None
    return folder + slash + stem, ext.lower()


def whole_tars():
    """Small tars in several formats: {name: bytes}."""
    made = {}
    for name, form in dict(gnu=tarfile.GNU_FORMAT, pax=tarfile.PAX_FORMAT,
                           ustar=tarfile.USTAR_FORMAT).items():
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode='w', format=form) as tar:
            names = ['a.txt', 'a.json', 'sub/b.txt', 'c.d.txt', 'e.bin', 'README']
            if form != tarfile.USTAR_FORMAT:
                names.insert(2, 'n' * 150 + '.txt')
            for i, each in enumerate(names):
                member = tarfile.TarInfo(each)
                member.size = (5, 0, 512, 700, 3, 1, 9)[i]
                if form == tarfile.PAX_FORMAT:
                    member.pax_headers = {'comment': 'x' * 9, 'mtime': '1.5'}
                tar.addfile(member, io.BytesIO(bytes(range(97, 97 + 7)) * 100))
        made[name] = file.getvalue()
    return list(made.values())


def of_webdataset(path):
    """Counter of (key, extension, bytes) as webdataset has them, or None where it raises."""
    found = Counter()
    try:
        with open(path, 'rb') as file:
            files = tariterators.tar_file_expander([dict(url='x', stream=file)])
            for row in tariterators.group_by_keys(files):
                key = row.pop('__key__')
                for ext, data in row.items():
                    if not ext.startswith('__') and not key.endswith('/') and ext:
                        found[key, ext, data] += 1
    except Exception:
        return None
    return found


def of_ours(path, cache):
    """The same as we read it, and how many samples are placeholders. Raises ValueError."""
    folder, found, bad = Folder(str(path), cache_dir=str(cache)), Counter(), 0
    index = folder.index(0)
    for i in range(len(folder)):
        key = folder.key(0, i)
        try:
            for ext, data in folder.read(0, i).items():
                found[key, ext, data] += 1
        except BadSample:
            bad += 1
            for ext, offset, size, _ in index.members(i):
                found[key, ext, os.pread(folder.open(0), size, offset)] += 1
    return found, bad


@counts(150, 5000)
def test_damaged_tars(tmp_path, count):
    tars, path = whole_tars(), tmp_path / '0.tar'

    def case(seed):
        rng = np.random.default_rng([seed, 1])
        whole, other = (tars[i] for i in rng.integers(len(tars), size=2))
        if seed % 3 == 0:
            kind, data = damage.headed(whole, seed)
        else:
            kind, data = damage.damaged(whole, seed, other)
        path.write_bytes(data)
        theirs, stopped = damage.members_of(io.BytesIO(data))
        expected = Counter((*split_name(name), content) for name, content in theirs
                           if split_name(name))
        try:
            found, bad = of_ours(path, tmp_path / 'cache')
        except (ValueError, OSError) as error:
            assert '0.tar' in str(error) and '\n' not in str(error), error
            return kind, 'named error'
        # a tar without anything is as it was
        assert found == expected and not stopped, (kind, found - expected, expected - found)
        web = of_webdataset(path)
        if web is None:
            assert bad, f'{kind}: webdataset raises'
            return kind, 'placeholder'
        # webdataset parts what lies apart, and never has more
        # its pattern of a name stops at the end of a line
        if not any('\n' in name for name, _ in theirs):
            assert web == expected, (kind, web - expected, expected - web)
        return kind, 'placeholder' if bad else 'read as they do'

    outcomes = sweep('tar', count, case)
    assert {'named error', 'read as they do'} <= outcomes.keys()


# -----------------------------------------------------------------------------------------------
# members of samples


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """Thousands of data sets keep thousands of shards open: they are closed here."""
    opened, begin = [], Folder.__init__

    def remembered(folder, *args, **settings):
        while opened:
            for fd in opened.pop().files.values():
                os.close(fd)
        opened.append(folder)
        folder.files = {}
        begin(folder, *args, **settings)

    monkeypatch.setattr(Folder, '__init__', remembered)


def attempt(read, *args):
    """(what it gives, None) or (None, its error)."""
    try:
        return read(*args), None
    except Exception as error:
        return None, error


def compared(ours, theirs, reader_words, same):
    """What came of one case. ours, theirs: of `attempt`; reader_words: what an error says that is
    of the reader and not of what was read; same: of the two values, where both are there."""
    (value, error), (expected, their_error) = ours, theirs
    if error is None:
        assert their_error is None, f'read, but {their_error!r}'
        assert same(value, expected), f'{value!r:.200} is not {expected!r:.200}'
        return 'read as they do'
    assert isinstance(error, BadSample), repr(error)
    assert '\n' not in str(error).strip() or their_error, error
    if reader_words in str(error):
        assert their_error is not None, f'not read ({error}), but they do'
    return 'placeholder'


def npy(array, order='C'):
    out = io.BytesIO()
    np.save(out, np.asarray(array, order=order))
    return out.getvalue()


def with_header(shape, dtype='<u2'):
    """A .npy of a few bytes whose header says something else."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, dict(descr=dtype, fortran_order=False, shape=shape))
    return out.getvalue() + b'\1\0' * 8


HEADERS = [(1 << 40,), (1 << 62, 1 << 62), (1 << 31, 0), (-1,), (), (8,), (7,), (2, 4), (1 << 64,)]


def numpys(data):
    return np.load(io.BytesIO(data), allow_pickle=False)


@counts(60, 500)
def test_damaged_npy(count):
    def read_tokens(data):
        # the run's own door to a member
        try:
            return npys.read_tokens(data, 'tokens.npy')
        except ValueError as error:
            raise BadSample(str(error)) from None

    whole = [npy(np.arange(1, 300, dtype=np.uint16)), npy(np.arange(40, dtype=np.uint32)),
             *(with_header(shape) for shape in HEADERS), with_header((8,), '|V0'),
             with_header((4,), '|O'), with_header((1 << 60,), '|S0')]

    def case(seed):
        kind, data = damage.damaged(whole[seed % len(whole)], seed)
        if seed < len(whole):
            kind, data = 'header', whole[seed]
        outcome = compared(attempt(read_tokens, data), attempt(numpys, data),
                           'can not be read', lambda ours, theirs: np.array_equal(
                               ours, theirs[theirs != np.iinfo(theirs.dtype).max]))
        return kind, outcome

    outcomes = sweep('npy', count, case)
    assert len(outcomes) == 2, outcomes


@counts(30, 500)
def test_damaged_latents(count):
    t2i = pytest.importorskip('tasks.t2i')
    array = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(np.float16)
    whole = [npy(array), npy(array, 'F'), with_header((1 << 40, 2, 2), '<f2')]

    def case(seed):
        kind, data = damage.damaged(whole[seed % len(whole)], seed)
        if seed < len(whole):
            kind, data = 'header', whole[seed]
        outcome = compared(attempt(t2i.read_latents, data), attempt(numpys, data),
                           'can not be read', np.array_equal)
        return kind, outcome

    assert len(sweep('latents.npy', count, case)) == 2


def npz(**arrays):
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def zipped(**files):
    """A .npz of bytes that are said to be arrays."""
    import zipfile
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as file:
        for name, data in files.items():
            file.writestr(f'{name}.npy', data)
    return out.getvalue()


@counts(60, 500)
def test_damaged_npz(count):
    actions = pytest.importorskip('robots.actions')
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    whole = [npz(actions=rows, is_pad=np.zeros(4, bool), proprio=np.ones(2)), npz(actions=rows),
             zipped(actions=with_header((1 << 40,), '<f4')), zipped(actions=b'no array'),
             zipped(actions=with_header((4, 2), '|O')), npy(rows), b'PK\5\6' + bytes(18),
             npz(actions=np.zeros((10 ** 6, 9)))]

    def theirs(data):
        with np.load(io.BytesIO(data), allow_pickle=False) as z:
            return {key: z[key] for key in ('actions', 'is_pad', 'proprio') if key in z}

    def same(ours, theirs):
        padded = theirs.get('is_pad', np.zeros(len(theirs['actions']))).astype(bool)
        return np.array_equal(ours['actions'][~padded], theirs['actions'][~padded])

    def case(seed):
        # the last one takes long to unpack
        kind, data = damage.damaged(whole[seed % (len(whole) - 1)], seed)
        if seed < len(whole):
            kind, data = 'as it is', whole[seed]
        elif seed % 3 == 0:
            # one whose checksums are right
            kind, data = damage.damaged(npy(rows), seed)
            data = zipped(actions=data)
        ours = attempt(actions.read_lowdim, data)
        words = 'can not be read'
        if 'unpacks to more' in str(ours[1]):
            words = 'nothing'
        return kind, compared(ours, attempt(theirs, data), words, same)

    assert len(sweep('npz', count, case)) == 2


@counts(60, 500)
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP'])
def test_damaged_pictures(form, count, monkeypatch):
    pictures = pytest.importorskip('pictures')
    from PIL import Image, ImageOps
    from PIL.PngImagePlugin import PngInfo
    shapes = [picture(1, 40)[..., :3], picture(2, 40), picture(3, 40)[..., 0]]
    if form != 'PNG':
        shapes = [shape if shape.ndim == 2 else shape[..., :3] for shape in shapes]
    whole = [encode(np.ascontiguousarray(shape), form) for shape in shapes]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, 'a text' * 9
    whole.append(encode(picture(4, 40)[..., :3].copy(), form, exif=exif))
    if form == 'PNG':
        info = PngInfo()
        info.add_text('a', 'b' * 4000, zip=True)
        info.add_itxt('c', 'd' * 4000, zip=True)
        whole.append(encode(picture(5, 40), form, pnginfo=info))

    def theirs(data):
        image = Image.open(io.BytesIO(data), formats=('JPEG', 'PNG', 'WEBP'))
        assert image.width * image.height <= pictures.MAX_PIXELS
        return ImageOps.exif_transpose(image).convert('RGB')

    def case(seed):
        kind, data = damage.damaged(whole[seed % len(whole)], seed)
        if seed < len(whole):
            kind, data = 'as it is', whole[seed]
        elif form == 'PNG' and seed % 3 == 0:
            kind, data = damage.chunked(whole[seed % len(whole)], seed)
        ours = attempt(pictures.open_picture, data)
        outcome = compared(ours, attempt(theirs, data), 'decoded', lambda a, b: a.mode[0] == 'R'
                           and np.array_equal(np.asarray(a.convert('RGB')), np.asarray(b)))
        eyes = pictures.Eyes(16)
        again, error = attempt(eyes.pixels, data)
        assert (error is None) == (ours[1] is None), error
        assert error or again.shape == (16, 16, 3)
        return kind, outcome

    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', pictures.MAX_PIXELS)
    assert len(sweep(form.lower(), count, case)) == 2


SAMPLES = [
    {'text': 'a red apple', 'style': 'noto', 'n': [1, 2, {'a': None}]},
    {'prefix': 'what is it?', 'suffix': 'an apple'},
    {'messages': [{'role': 'system', 'content': 'be brief'}, {'role': 'user', 'content': 'hi'},
                  {'role': 'assistant', 'content': 'hello'}]},
    {'messages': [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'a'}]},
                  {'role': 'assistant', 'content': [{'type': 'text', 'text': 'b'}]}]},
    {'instruction': 'push', 'episode': 3, 'frame': 5},
    {'instruction': 'add', 'input': '1 2', 'output': '3'}]


@counts(80, 500)
def test_damaged_json(count):
    from processor import fields
    forms = [make_processor(400, size=16, image_tokens=4, form=form, task='vlm')
             for form in ('auto', 'text', 'chat')]
    forms.append(make_processor(400, form='auto', task='llm'))
    png = sample(1)['png']

    def case(seed):
        value = SAMPLES[seed % len(SAMPLES)]
        if seed % 4:
            kind, data = 'value', damage.revalued(value, seed)
        else:
            kind, data = damage.damaged(json.dumps(value).encode(), seed)
        members = {'json': data} | ({'png': png} if seed % 3 else {})
        # what a form makes of it, or why not
        results = [attempt(form.pieces, members)[1] for form in forms]
        for error in results:
            assert error is None or isinstance(error, BadSample), repr(error)
        ours, error = attempt(fields, members, False)
        theirs, their_error = attempt(lambda: json.loads(data.decode('utf-8-sig')))
        if error is None:
            kept = [key for key in theirs if repr(theirs[key]) != repr(ours.get(key))]
            assert set(kept) <= {'instruction', 'input', 'output', 'pictures', 'members',
                                 'picture_names', 'data_set', '_asking', '_lowdim'}, kept
        elif 'can not be read' in str(error):
            assert their_error is not None, error
        return kind, 'placeholder' if any(results) else 'read as they do'

    assert len(sweep('json', count, case)) == 2


# -----------------------------------------------------------------------------------------------
# manifests and episodes


@counts(60, 500)
def test_damaged_manifests(count):
    rows = [dict(shard=f'{i:08d}', num_sequences=i + 1, num_bytes=9, sequence_length=5,
                 dtype='uint16', vocab_size=300) for i in range(3)]

    def case(seed):
        if seed % 2:
            data = b'\n'.join([damage.revalued(rows[0], seed), *(
                json.dumps(row).encode() for row in rows[1:])])
            kind = 'value'
        else:
            kind, data = damage.damaged('\n'.join(map(json.dumps, rows)).encode(), seed)
        ours, error = attempt(read_manifest, 'x/manifest.jsonl', data)
        if error is not None:
            assert isinstance(error, ValueError) and 'x/manifest.jsonl' in str(error), repr(error)
            assert '\n' not in str(error), error
            return kind, 'named error'
        theirs = [json.loads(line) for line in data.split(b'\n') if line.strip()]
        names = [os.fsdecode(name) for name in ours.names.tolist()]
        assert names == [row['shard'].removesuffix('.tar') for row in theirs]
        assert ours.sizes.tolist() == [row['num_sequences'] for row in theirs]
        assert ours.num_bytes == sum(row.get('num_bytes', 0) for row in theirs)
        return kind, 'read as they do'

    assert len(sweep('manifest.jsonl', count, case)) == 2


@counts(30, 500)
def test_damaged_episodes_and_sequences(tmp_path, count):
    """Members that an index is made of: rows of an episode, sequences of tokens."""
    rows = np.zeros(5, [('proprio', '<f4', 2), ('actions', '<f4', 3)])
    rows['actions'] = np.arange(15).reshape(5, 3)
    whole = {'lowdim.npy': [npy(rows), with_header((1 << 60,), '|V0'), with_header((1 << 40,))],
             'tokens.npy': [npy(np.arange(10, dtype=np.uint16)), with_header((1 << 40,))]}

    def case(seed):
        name = list(whole)[seed % 2]
        kind, data = damage.damaged(whole[name][seed // 2 % len(whole[name])], seed)
        if seed < 6:
            kind, data = 'as it is', whole[name][seed // 2 % len(whole[name])]
        write_tar(tmp_path / '0.tar', [('a', {name: data})])
        row = dict(shard='0', num_sequences=2, sequence_length=5) if name == 'tokens.npy' else None
        (tmp_path / 'manifest.jsonl').write_text(json.dumps(row or dict(shard='0',
                                                                        num_sequences=5)))

        def read():
            folder = Folder(str(tmp_path), cache_dir=str(tmp_path / 'cache'))
            if row:
                return b''.join(folder.read_sequence(0, i) for i in range(len(folder.index(0))))
            return [folder.read(0, i)['lowdim.npy'] for i in range(len(folder.index(0)))][0]

        ours, error = attempt(read)
        theirs, their_error = attempt(numpys, data)
        if error is not None:
            assert isinstance(error, ValueError) and '0.tar' in str(error), repr(error)
            return kind, 'named error'
        assert their_error is None, their_error
        assert ours == theirs.tobytes() if row else ours.tobytes() == theirs.tobytes()
        return kind, 'read as they do'

    assert len(sweep('episodes and sequences', count, case)) == 2


# -----------------------------------------------------------------------------------------------
# tables of texts, and models


@counts(20, 500)
def test_damaged_parquet(tmp_path, count, monkeypatch):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    monkeypatch.syspath_prepend(os.path.join(ROOT, 'prepare'))
    import text_files
    path, whole = tmp_path / '0.parquet', []
    for options in (dict(), dict(compression='none', use_dictionary=False),
                    dict(compression='zstd', row_group_size=10)):
        table = pyarrow.table({'text': ['a text'] * 30 + ['ü', None], 'n': range(32)})
        parquet.write_table(table, path, **options)
        whole.append(path.read_bytes())
    asked = SimpleNamespace(max_document_mb=1, text_key='text', split='file')

    def theirs():
        # the same way of reading, without what is ours
        with open(path, 'rb') as raw:
            table = parquet.ParquetFile(raw, buffer_size=1 << 20)
            rows = []
            for batch in table.iter_batches(16, columns=['text'], use_threads=False):
                rows += batch.column(0).cast(pyarrow.large_binary()).to_pylist()
            return rows

    def case(seed):
        kind, data = damage.damaged(whole[seed % 3], seed)
        if seed < 3:
            kind, data = 'as it is', whole[seed]
        path.write_bytes(data)
        expected, their_error = attempt(theirs)
        try:
            found = list(text_files.records([path], asked, (0, 0, 0)))
        except text_files.BadInput as error:
            assert '0.parquet' in str(error)
            assert their_error or 'no column' in str(error), error
            return kind, 'named error'
        assert not their_error, their_error
        texts = [record.data for record in found if record.form == 'text']
        assert texts == [text for text in expected if text is not None]
        return kind, 'read as they do'

    assert len(sweep('parquet', count, case)) == 2


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """The checkpoint of a run of a step, and its model as a folder of transformers."""
    folder = tmp_path_factory.mktemp('models')
    tiny.run('train.py', *tiny.LLM_FLAGS, '--mix={"words": 1}', f'--data_dir={tiny.data_dir()}',
             '--max_steps=1', f'--out_dir={folder / "run"}').ok()
    hub.export_run(str(folder / 'run'), str(folder / 'theirs'))
    # copied out of its run, it has no checksums that would see all of this at once
    shutil.copytree(folder / 'run/checkpoints/step_00000001', folder / 'copy')
    (folder / 'copy/progress.json').unlink()
    return dict(run=folder / 'copy', theirs=folder / 'theirs')


def opened(folder):
    if folder.name == 'run':
        return hub.open_ours(str(folder)).model
    return hub.from_pretrained(str(folder))


@counts(30, 500)
@pytest.mark.parametrize('kind', ['run', 'theirs'])
def test_damaged_weights(tmp_path, folders, kind, count):
    from safetensors.torch import load_file
    shutil.copytree(folders[kind], tmp_path / kind)
    path = tmp_path / kind / 'model.safetensors'
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], 'little')
    head = json.loads(whole[8:8 + size])

    def case(seed):
        what, data = damage.damaged(whole, seed)
        if seed % 2:
            text = damage.revalued(head, seed)
            what, data = 'header', len(text).to_bytes(8, 'little') + text + whole[8 + size:]
        path.write_bytes(data)
        model, error = attempt(opened, tmp_path / kind)
        theirs, their_error = attempt(load_file, path)
        if error is not None:
            assert isinstance(error, ValueError) and kind in str(error), repr(error)
            return what, 'named error'
        assert their_error is None, their_error
        # theirs may have other names and more tensors
        ours = {tensor.numpy().tobytes() for tensor in model.state_dict().values()}
        assert ours <= {tensor.float().numpy().tobytes() for tensor in theirs.values()}
        return what, 'read as they do'

    assert 'named error' in sweep(f'safetensors of {kind}', count, case)


@counts(40, 500)
@pytest.mark.parametrize('kind', ['run', 'theirs'])
def test_damaged_config_json(tmp_path, folders, kind, count):
    shutil.copytree(folders[kind], tmp_path / kind)
    path = tmp_path / kind / 'config.json'
    whole = path.read_bytes()

    def case(seed):
        what, data = damage.damaged(whole, seed)
        if seed % 4:
            what, data = 'value', damage.revalued(json.loads(whole), seed)
        path.write_bytes(data)
        model, error = attempt(opened, tmp_path / kind)
        if error is not None:
            assert isinstance(error, ValueError), repr(error)
            return what, 'named error'
        json.loads(data)
        return what, 'read as they do'

    assert len(sweep(f'config.json of {kind}', count, case)) == 2


@pytest.mark.parametrize('key, value', [('depth', 1 << 31), ('depth', 5000), ('width', 1 << 22),
                                        ('mlp_dim', 1 << 26), ('num_heads', 1 << 20)])
def test_a_config_that_asks_for_all_the_memory(tmp_path, folders, key, value):
    names = dict(depth='num_hidden_layers', width='hidden_size', mlp_dim='intermediate_size',
                 num_heads='num_attention_heads')
    for kind, name in (('run', f'decoder.{key}'), ('theirs', names[key])):
        shutil.copytree(folders[kind], tmp_path / kind)
        path = tmp_path / kind / 'config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with damage.at_most(20):
            model, error = attempt(opened, tmp_path / kind)
        assert isinstance(error, ValueError), error
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10, 'KiB'


@pytest.mark.parametrize('name', [5, None, ['a.py'], {}])
def test_a_task_that_is_no_name(name):
    with pytest.raises(ValueError, match='expected one of'):
        tasks.load(name)
