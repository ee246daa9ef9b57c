"""shards.py: what a folder of tars holds, how it is read, and damage of every kind."""
import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest
import webdataset
from conftest import ROOT, sample, write_set, write_tar
from test_data import shards_of

import shards
from shards import BadSample, Folder


def list_of(folder):
    return list(zip([name.decode() for name in folder.names.tolist()], folder.sizes.tolist()))


@pytest.fixture(scope='module')
def emoji(tmp_path_factory):
    """A data set of 5 + 7 + 3 samples."""
    return write_set(tmp_path_factory.mktemp('sets') / 'toy', [5, 7, 3])


def test_a_folder_reads_what_webdataset_reads(emoji, tmp_path):
    bare = tmp_path / 'bare'
    shutil.copytree(emoji, bare)
    (bare / 'manifest.jsonl').unlink()
    (bare / 'notes.md').write_text('not a shard')
    for path in (emoji, bare):
        folder = Folder(str(path))
        assert list_of(folder) == shards_of([5, 7, 3]) and len(folder) == 15
        for s, (name, count) in enumerate(list_of(folder)):
            theirs = list(webdataset.WebDataset(str(path / f'{name}.tar'), shardshuffle=False))
            ours = [(folder.key(s, i), folder.read(s, i)) for i in range(count)]
            assert [key for key, _ in ours] == [row['__key__'] for row in theirs]
            assert [members for _, members in ours] == [{k: row[k] for k in ('png', 'txt')}
                                                        for row in theirs]


def test_names_that_webdataset_groups_in_its_own_way(tmp_path):
    write_tar(tmp_path / '0.tar',
              [('./a/b.c/key', {'left.png': b'1', 'txt': b'2'}), ('x' * 150, {'json': b'{}'}),
               ('sub/key', {'txt': b'3'}), ('sub/näme', {'TXT': b'4'})])
    with tarfile.open(tmp_path / '0.tar', 'a') as tar:
        tar.addfile(tarfile.TarInfo('README'))
        tar.addfile(tarfile.TarInfo('.DS_Store'))
        folder = tarfile.TarInfo('a.folder')
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    theirs = [{k: v for k, v in row.items() if k not in ('__url__', '__local_path__')}
              for row in webdataset.WebDataset(str(tmp_path / '0.tar'), shardshuffle=False)]
    folder = Folder(str(tmp_path))
    ours = [(folder.key(0, i), folder.read(0, i)) for i in range(len(folder))]
    assert [{'__key__': key, **members} for key, members in ours] == theirs


def test_few_open_files_and_indexes_are_enough(emoji):
    whole, narrow = Folder(str(emoji)), Folder(str(emoji), max_open=1, max_index_bytes=1)
    before = len(os.listdir('/proc/self/fd'))
    for i in range(12):
        assert narrow.read(i % 3, i % 3) == whole.read(i % 3, i % 3)
        assert len(narrow.files) == len(narrow.indexes) == 1
    assert len(os.listdir('/proc/self/fd')) <= before + 4, 'descriptors leak'


def refused(path, *words):
    """Opening the set and reading its first shard is refused, by an error that holds the words."""
    with pytest.raises((ValueError, OSError)) as error:
        folder = Folder(str(path))
        for s in range(len(folder.names)):
            folder.index(s)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_tar_that_is_cut_anywhere_is_an_error_that_names_it(tmp_path):
    whole = write_set(tmp_path / 'whole',
                      [[('a', sample(1)), ('b' * 120, sample(2)), ('c', sample(3))]])
    content = (whole / '00000000.tar').read_bytes()
    with tarfile.open(whole / '00000000.tar') as tar:
        members = tar.getmembers()
    last = members[-1]
    end = last.offset_data + (last.size + 511) // 512 * 512
    cuts = {'nothing left': 0, 'in the first header': 100, 'in the end blocks': end + 100,
            'no end blocks': end}
    for i, m in enumerate(members):
        cuts |= {f'data {i}': m.offset_data + 1, f'before data {i}': m.offset_data,
                 f'header {i}': m.offset + 200}
        cuts |= {f'edge {i}': m.offset, f'padding {i}': m.offset_data + m.size}
    cuts |= {f'long name {k}': members[2].offset + k for k in range(0, 1600, 256)}
    cut = write_set(tmp_path / 'cut', [[]])
    bare = write_set(tmp_path / 'bare', [[]], manifest=False)
    (cut / 'manifest.jsonl').write_text('{"shard": "00000000", "num_sequences": 3}')
    passed = []
    for name, size in cuts.items():
        for folder in (cut, bare):      # with a manifest and without
            (folder / '00000000.tar').write_bytes(content[:size])
            try:
                refused(folder, '00000000.tar')
            except BaseException as error:      # noqa: B036 - pytest's Failed is one, and all cases shall be tried
                passed.append(f'{name}, {size} bytes, {folder.name}: {error!r:.100}')
    assert not passed, '\n'.join(passed)
    (cut / '00000000.tar').write_bytes(content[:end + 512])
    assert len(Folder(str(cut)).index(0)) == 3, 'nothing is lost with the second end block'


@pytest.mark.parametrize('content', [b'', b'no tar at all' * 100, os.urandom(4096)],
                         ids=['empty', 'text', 'noise'])
def test_a_file_that_is_no_tar_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / 'x.tar').write_bytes(content)
    refused(tmp_path, 'x.tar')


def test_a_damaged_header_is_an_error(tmp_path):
    path = write_set(tmp_path / 'set', [6]) / '00000000.tar'
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[5].offset
    content = bytearray(path.read_bytes())
    content[offset + 3] ^= 0xFF
    path.write_bytes(content)
    refused(path.parent, '00000000.tar', str(offset))


def test_a_compressed_tar_is_refused(tmp_path):
    path = write_set(tmp_path / 'set', [2]) / '00000000.tar'
    # its offsets are not the file's
    path.write_bytes(gzip.compress(path.read_bytes() + bytes(100_000)))
    refused(path.parent, '00000000.tar')


def test_repeated_members_are_placeholders_and_interleaved_ones_find_together(tmp_path):
    again = Folder(str(write_set(tmp_path / 'apart',
                                 [[('a', sample(1)), ('b', sample(2)), ('a', sample(3))]])))
    assert again.read(0, 0) == sample(1) and again.read(0, 1) == sample(2)
    assert again.key(0, 2) == 'a'
    with pytest.raises(BadSample, match='twice'):
        again.read(0, 2)
    beside = Folder(str(write_set(tmp_path / 'beside', [[('b', sample(2)), ('b', sample(3))]],
                                  manifest=False)))
    assert len(beside) == 1
    with pytest.raises(BadSample, match='twice'):
        beside.read(0, 0)
    mixed = [('a', {'png': b'1'}), ('b', {'png': b'2'}), ('a', {'txt': b'3'}),
             ('b', {'txt': b'4'})]
    mixed = Folder(str(write_set(tmp_path / 'mixed', [mixed], manifest=False)))
    assert [mixed.read(0, i)
            for i in range(2)] == [{'png': b'1', 'txt': b'3'}, {'png': b'2', 'txt': b'4'}]


@pytest.mark.parametrize(
    'line', ['{"shard": "00000001"', '{"shard": "00000001"}', '{"num_sequences": 3}', '[1, 2]',
             '{"shard": "00000001", "num_sequences": -1}', '7', 'null',
             '{"shard": "00000001", "num_sequences": 1.5}', '\udcff',
             '{"shard": "00000001", "num_sequences": true}', '{"shard": null, "num_sequences": 3}',
             '\ufeff{"shard": "00000001"}'])
def test_a_damaged_manifest_line_is_named(tmp_path, line):
    text = '{"shard": "00000000", "num_sequences": 5}\n\n' + line + '\n'
    (tmp_path / 'manifest.jsonl').write_bytes(text.encode('utf-8', errors='surrogateescape'))
    refused(tmp_path, 'manifest.jsonl', 'line 3')


def test_a_shard_stands_in_the_manifest_once(tmp_path):
    folder = write_set(tmp_path / 'set', [3])
    row = (folder / 'manifest.jsonl').read_text()
    (folder / 'manifest.jsonl').write_text(row + row.replace('00000000', '00000000.tar'))
    refused(folder, 'manifest.jsonl', '00000000')


def test_the_manifest_may_say_tar_and_more(tmp_path):
    folder = write_set(tmp_path / 'set', [4])
    (folder / 'manifest.jsonl').write_text(
        '\n{"shard": "00000000.tar", "num_sequences": 4, "more": 9}\n\n')
    assert list_of(Folder(str(folder))) == [('00000000', 4)]


def test_a_wrong_count_a_missing_shard_and_an_empty_folder(tmp_path):
    folder = write_set(tmp_path / 'set', [4])
    for count in (3, 5):
        (folder / 'manifest.jsonl').write_text(
            json.dumps({'shard': '00000000', 'num_sequences': count}))
        refused(folder, '00000000.tar', '4 samples', f'says {count}')
    (folder / '00000000.tar').unlink()
    refused(folder, '00000000.tar')
    (folder / 'manifest.jsonl').write_text('\n')
    refused(folder, str(folder), 'no shards')
    (folder / 'manifest.jsonl').unlink()
    refused(folder, str(folder), 'no shards')


def test_a_file_cut_short_after_it_was_indexed_gives_bad_samples(tmp_path):
    path = write_set(tmp_path / 'set', [4])
    folder = Folder(str(path))
    members = {ext: offset for ext, offset, _, _ in folder.index(0).members(2)}
    size = os.path.getsize(path / '00000000.tar')
    os.truncate(path / '00000000.tar', members['png'] + 5)
    assert folder.read(0, 1) == sample(1)
    with pytest.raises(BadSample, match='5 of'):
        folder.read(0, 2)
    with pytest.raises(BadSample, match='0 of'):
        folder.read(0, 3)
    assert size > members['png']


def test_find_looks_in_data_dir_and_beside_the_scripts(emoji, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here').mkdir()
    assert shards.find('here') == 'here'
    assert shards.find('toy', str(emoji.parent)) == str(emoji)
    assert shards.find(str(emoji), 'elsewhere') == str(emoji)
    assert os.path.samefile(shards.find('test_shards.py', 'tests'), __file__), (
        'beside the scripts, from any folder')
    with pytest.raises(FileNotFoundError, match='nothing'):
        shards.find('nothing', 'datasets')


@pytest.mark.parametrize('typed, meant',
                         [('emoji/nota', 'emoji/noto'), ('emojy/noto', 'emoji/noto'),
                          ('shakespear/', 'shakespeare'), ('text', ''), ('a/b/third-levol', '')])
def test_a_mistyped_data_set_is_told_its_neighbour(tmp_path, typed, meant):
    for name in ('emoji/noto', 'emoji/fluent', 'shakespeare', 'a/b/third-level'):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / 'texts').write_text('no folder')
    with pytest.raises(FileNotFoundError) as error:
        Folder(typed, str(tmp_path))
    said = str(error.value)
    assert repr(typed) in said and 'prepare/' in said and '\n' not in said
    assert f'did you mean {meant!r}?' in said if meant else 'did you mean' not in said
    with pytest.raises(FileNotFoundError) as error:
        shards.find('emoji/nota')
    assert 'did you mean' not in str(error.value), 'no data_dir: nothing to compare with'


def test_what_is_local_does_not_import_what_is_remote(emoji):
    code = ('import sys, checkpoint, data, shards; shards.Folder(sys.argv[1], '
            'cache_dir=sys.argv[2]).read(1, 0); '
            'checkpoint.names(sys.argv[1]); print("remote" in sys.modules, "fsspec" in '
            'sys.modules)')
    out = subprocess.run([sys.executable, '-c', code, str(emoji), str(emoji.parent / 'cache')],
                         cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert out.stdout.startswith('False'), out
