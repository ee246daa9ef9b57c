"""Tars, names and folders as people have them: read as tarfile and webdataset read them, or an
error that names the shard, the member and what helps."""
import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from conftest import encode, make_processor, picture, sample, write_set, write_tar
from test_shards import list_of, refused

from data import Batches, InOrder
from shards import Folder

NEEDS = ('pictures.py',)


def add(tar, name, data=b'x', kind=tarfile.REGTYPE, link='', **pax):
    """A member of any kind."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.pax_headers = kind, link, pax
    if kind == tarfile.REGTYPE:
        member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def made(path, *members, form=tarfile.PAX_FORMAT):
    """A tar of (name, bytes) or (name, bytes, kind, link); the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', format=form) as tar:
        for member in members:
            add(tar, *member)
    return path.parent


def ours(folder):
    """[(key, {extension: bytes})] of all of a data set."""
    folder = Folder(str(folder))
    return [(folder.key(s, i), folder.read(s, i)) for s, n in enumerate(folder.sizes.tolist())
            for i in range(n)]


def theirs(path):
    """The same of a shard, as webdataset has it."""
    rows = webdataset.WebDataset(str(path), shardshuffle=False)
    return [(row['__key__'], {k: v for k, v in row.items() if not k.startswith('__')})
            for row in rows]


def same_as_theirs(folder, name='0.tar'):
    found = ours(folder)
    assert found and found == theirs(folder / name), found
    return found


# -----------------------------------------------------------------------------------------------
# what is in a tar


def test_tars_joined_by_cat_are_an_error(tmp_path):
    write_tar(tmp_path / 'a', [('a', sample(1))])
    write_tar(tmp_path / 'b', [('b', sample(2))])
    first, second = (tmp_path / 'a').read_bytes(), (tmp_path / 'b').read_bytes()
    (tmp_path / '0.tar').write_bytes(first + second)
    refused(tmp_path, '0.tar', 'joined', 'tar xif')
    # and so is one of which a header is nothing but zeros: the rest would be lost
    write_tar(tmp_path / '0.tar', [('a', sample(1)), ('b', sample(2))])
    content = bytearray((tmp_path / '0.tar').read_bytes())
    with tarfile.open(tmp_path / '0.tar') as tar:
        offset = tar.getmembers()[2].offset
    content[offset:offset + 512] = bytes(512)
    (tmp_path / '0.tar').write_bytes(content)
    refused(tmp_path, '0.tar', str(offset), 'more follows')
    # zeros, however many, are nothing
    (tmp_path / '0.tar').write_bytes(first + bytes(3 << 20))
    same_as_theirs(tmp_path)


def test_an_index_of_an_earlier_version_is_made_again(tmp_path, monkeypatch):
    made(tmp_path / '0.tar', ('a.txt', b'1'))
    write_tar(tmp_path / 'b', [('b', sample(2))])
    (tmp_path / '0.tar').write_bytes((tmp_path / '0.tar').read_bytes() * 2)
    stat = os.stat(tmp_path / '0.tar')
    folder = Folder.__new__(Folder)
    folder.cache_dir = str(tmp_path / 'cache')
    old = folder.cached(f'{tmp_path}/0.tar {stat.st_size} {stat.st_mtime_ns}', '.npy')
    os.makedirs(os.path.dirname(old))
    with open(old, 'wb') as f:
        np.save(f, np.zeros(0, [('sample', '<u4'), ('key', 'S1'), ('ext', 'S1'),
                                ('offset', '<u8'), ('size', '<u8'), ('repeated', '?')]))
    with pytest.raises(ValueError, match='joined'):
        Folder(str(tmp_path), cache_dir=folder.cache_dir)


SPARSE = {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.name': 'b.txt',
          'GNU.sparse.realsize': '100'}


@pytest.mark.parametrize('kind, link, words', [
    (tarfile.SYMTYPE, 'a.txt', ['is a link', "'a.txt'", '--dereference']),
    (tarfile.LNKTYPE, 'a.txt', ['is a link', '--hard-dereference']),
    (tarfile.FIFOTYPE, '', ['no file']), (tarfile.CHRTYPE, '', ['no file']),
    (b'Z', '', ['no file'])])
def test_a_member_that_is_no_file_is_an_error(tmp_path, kind, link, words):
    made(tmp_path / '0.tar', ('a.txt', b'1'), ('sub/b.txt', b'', kind, link))
    refused(tmp_path, '0.tar', "'sub/b.txt'", *words)
    # where no member of a sample could be, nothing is lost
    made(tmp_path / '0.tar', ('a.txt', b'1'), ('latest', b'', kind, link),
         ('a.folder', b'', tarfile.DIRTYPE), ('.b.txt', b'', kind, link))
    assert ours(tmp_path) == [('a', {'txt': b'1'})]


def test_sparse_members_are_an_error(tmp_path):
    made(tmp_path / '0.tar', ('a.txt', b'1'))
    with tarfile.open(tmp_path / '0.tar', 'a') as tar:
        add(tar, 'GNUSparseFile.0/b.txt', b'1\n0\n100\n'.ljust(512, b'\0') + b'y' * 100, **SPARSE)
    refused(tmp_path, '0.tar', "'b.txt'", 'sparse', '-S')
    # GNU tar's own format: a map of what there is, and the size with its holes
    header = bytearray(tarfile.TarInfo('b.txt').tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b'S'
    header[386:410] = b'00000000000\x0000000001000\x00'
    header[483:495] = b'00000001000\x00'
    header[148:156] = b' ' * 8
    header[148:156] = b'%06o\0 ' % sum(header)
    (tmp_path / '0.tar').write_bytes(bytes(header) + bytes(1024))
    with tarfile.open(tmp_path / '0.tar') as tar:
        assert tar.getmembers()[0].issparse()
    refused(tmp_path, '0.tar', "'b.txt'", 'sparse')


@pytest.mark.parametrize('form', [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_all_kinds_are_read_as_webdataset_reads_them(tmp_path, form):
    names = ['A.TXT', 'v1.0_a.b.txt', '../up.txt', '/abs/olute.txt', '~/x.txt', 'a,b{c}[d]:e.txt',
             'n' * 90 + '.txt', 'long/' * 60 + 'n' * 90 + '.txt', 'ü' * 60 + '.txt',
             'white space/a b.txt', "it's \"so\".txt", 'x.tar.gz.txt', '-rf.txt', 'sub/A.TXT']
    members = [(name, str(i).encode()) for i, name in enumerate(names)]
    made(tmp_path / '0.tar', *members, form=form)
    found = same_as_theirs(tmp_path)
    assert len(found) == len(names) and found[0] == ('A', {'txt': b'0'})
    assert found[1] == ('v1', {'0_a.b.txt': b'1'}) and found[2][0] == '../up'


def test_names_that_are_not_utf_8_are_read_and_can_be_said(tmp_path):
    name = b'caf\xe9.txt'.decode('utf-8', 'surrogateescape')
    made(tmp_path / '0.tar', (name, b'1'), form=tarfile.GNU_FORMAT)
    same_as_theirs(tmp_path)
    folder = os.fsencode(tmp_path) + b'/caf\xe9'
    os.mkdir(folder)
    shutil.copy(tmp_path / '0.tar', folder + b'/\xe9.tar')
    assert ours(os.fsdecode(folder)) == ours(tmp_path)


def test_what_macos_and_others_add_is_no_sample(tmp_path):
    made(tmp_path / '0.tar', ('./._a.txt', b'mac'), ('a.txt', b'1'), ('__MACOSX/._a.txt', b'mac'),
         ('PaxHeaders.0/a', b'pax'), ('sub/._b.txt', b'mac'), ('.DS_Store', b'mac'),
         ('__meta__/c.txt', b'no'), ('sub/b.txt', b'2'), ('Thumbs', b'win'))
    assert ours(tmp_path) == [('a', {'txt': b'1'}), ('sub/b', {'txt': b'2'})]
    assert [row for row in theirs(tmp_path / '0.tar') if '_' not in str(row)] == ours(tmp_path)


def test_the_same_key_in_two_folders_and_two_shards_is_two_samples(tmp_path):
    for name in ('0', '1'):
        made(tmp_path / f'{name}.tar', ('x/a.txt', b'1'), ('y/a.txt', b'2'))
    assert [key for key, _ in ours(tmp_path)] == ['x/a', 'y/a'] * 2


def test_a_name_without_end_is_an_error(tmp_path):
    made(tmp_path / '0.tar', ('a.txt', b'1'), ('n' * 2000 + '.txt', b'2'))
    refused(tmp_path, '0.tar', 'nnn', '2004 characters')


def test_a_tar_of_nothing_is_empty_and_one_of_no_bytes_an_error(tmp_path):
    made(tmp_path / '0.tar')
    made(tmp_path / '1.tar', ('a.txt', b'1'))
    assert Folder(str(tmp_path)).sizes.tolist() == [0, 1]
    (tmp_path / '0.tar').write_bytes(b'')
    refused(tmp_path, '0.tar', 'empty')
    (tmp_path / '0.tar').write_bytes((tmp_path / '1.tar').read_bytes()[:1024])
    refused(tmp_path, '0.tar', 'cut short', '1024')


def negative(field):
    """The header of a member with a size below 0, which leads tarfile back to where it was."""
    member = tarfile.TarInfo('b.txt')
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = field
    header[148:156] = b' ' * 8
    header[148:156] = b'%06o\0 ' % sum(header)
    return bytes(header)


@pytest.mark.parametrize('size', [-512, -1024, -1 << 40])
def test_a_size_below_zero_is_an_error_and_no_circle(tmp_path, size):
    made(tmp_path / '0.tar', ('a.txt', b'1'))
    whole = (tmp_path / '0.tar').read_bytes()
    field = b'\xff' + size.to_bytes(11, 'big', signed=True)
    (tmp_path / '0.tar').write_bytes(whole[:1024] + negative(field) + whole[1024:])
    refused(tmp_path, '0.tar', 'damaged')


def test_headers_without_end_are_an_error(tmp_path):
    header = bytearray(tarfile.TarInfo('././@LongLink').tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b'L'
    header[148:156] = b' ' * 8
    header[148:156] = b'%06o\0 ' % sum(header)
    (tmp_path / '0.tar').write_bytes(bytes(header) * 4000)
    refused(tmp_path, '0.tar', 'damaged')


# -----------------------------------------------------------------------------------------------
# which shards a data set has


def test_endings_in_capitals_and_hidden_files(tmp_path):
    made(tmp_path / 'A.TAR', ('a.txt', b'1'))
    made(tmp_path / 'b.tar', ('b.txt', b'2'))
    (tmp_path / '._b.tar').write_bytes(b'\0\5\26\7mac')
    assert [key for key, _ in ours(tmp_path)] == ['a', 'b']
    assert ours(tmp_path / 'A.TAR') == [('a', {'txt': b'1'})]
    assert Folder(str(tmp_path)).shard_path(0) == f'{tmp_path}/A.TAR'


@pytest.mark.parametrize('packed', ['b.tar.gz', 'b.TGZ', 'b.tar.zst'])
def test_packed_shards_are_an_error_alone_and_among_others(tmp_path, packed):
    (tmp_path / packed).write_bytes(b'packed')
    refused(tmp_path, packed, 'unpack')
    refused(tmp_path / packed, packed, 'not packed')
    made(tmp_path / 'a.tar', ('a.txt', b'1'))
    refused(tmp_path, packed, 'unpack')
    # unpacked, and kept
    made(tmp_path / 'b.tar', ('b.txt', b'1'))
    assert len(ours(tmp_path)) == 2


def test_shards_one_folder_below_are_named(tmp_path):
    made(tmp_path / 'web/train/0.tar', ('a.txt', b'1'))
    refused(tmp_path / 'web', 'holds no shards', "web/train' does")


def test_a_folder_a_pipe_and_a_link_that_look_like_shards(tmp_path):
    made(tmp_path / 'set.tar/0.tar', ('a.txt', b'1'))
    assert len(ours(tmp_path / 'set.tar')) == 1, 'a folder may be called so'
    refused(tmp_path, 'set.tar', 'folder')
    shutil.move(tmp_path / 'set.tar/0.tar', tmp_path / 'file')
    shutil.rmtree(tmp_path / 'set.tar')
    os.mkfifo(tmp_path / 'set.tar')
    refused(tmp_path, 'set.tar', 'device')
    os.remove(tmp_path / 'set.tar')
    os.symlink('file', tmp_path / 'set.tar')
    assert ours(tmp_path) == [('a', {'txt': b'1'})]
    os.remove(tmp_path / 'file')
    refused(tmp_path, 'set.tar')


@pytest.mark.parametrize('name', ['a,b', 'a{0..3}', '{x}', 'a{', '[ab]', 'c:d', ' e', 'f g', 'ü'])
def test_a_data_set_is_called_as_its_folder_is(tmp_path, monkeypatch, name):
    made(tmp_path / name / '0.tar', ('a.txt', b'1'))
    monkeypatch.chdir(tmp_path)
    for spec in (name, f'{name}/0.tar', str(tmp_path / name)):
        assert ours(spec) == [('a', {'txt': b'1'})], spec
    assert len(Folder(name, str(tmp_path))) == 1
    (tmp_path / 'list.txt').write_text(f'{name.strip()}/0.tar\n')
    if name == name.strip():
        assert len(ours('list.txt')) == 1
    write_set(tmp_path / name, [2])
    assert list_of(Folder(name)) == [('00000000', 2)], 'and with a manifest'


def test_a_path_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    made(tmp_path / 'web/0.tar', ('a.txt', b'1'))
    (tmp_path / 'list.txt').write_text('~/web/0.tar\n')
    for spec in ('~/web', '~/web/0.tar', '~/list.txt', '~/web/{0..0}.tar'):
        assert len(ours(spec)) == 1, spec
    assert len(Folder('web', '~')) == 1


def test_a_shard_named_twice_and_a_list_of_other_things_are_errors(tmp_path):
    made(tmp_path / '0.tar', ('a.txt', b'1'))
    refused(f'{tmp_path}/0.tar,{tmp_path}/0.tar', 'twice')
    for line in ('web', '0.tar.gz'):
        (tmp_path / 'list.txt').write_text(f'0.tar\n{line}\n')
        refused(tmp_path / 'list.txt', 'line 2', line)


# -----------------------------------------------------------------------------------------------
# members that are not read


def batch_of(path, **settings):
    folder = Folder(str(path))
    batches = Batches([folder], InOrder(folder.sizes), make_processor(64, **settings))
    return batches, batches[np.arange(len(folder))]


def test_a_picture_that_is_not_read_is_a_bad_sample_and_named_once(tmp_path, capsys):
    other = encode(picture(1), 'TIFF')
    good = [(f'b{i}', sample(i)) for i in range(3)]
    write_set(tmp_path / 'set', [[(f'a{i}', {'tiff': other, 'txt': b'a name'}) for i in range(12)],
                                 [('c', {'tiff': other, 'txt': b'x'}), *good]])
    batches, batch = batch_of(tmp_path / 'set', size=16, image_tokens=4)
    said = capsys.readouterr().err
    assert said.count('not read') == 1 and '00000000.tar: 12 members .tiff: not read' in said
    assert len(batch['bad']) == 13 and 'a0: its picture is a .tiff' in batch['bad'][0]
    assert (batch['targets'] != -100).any(1).sum() == 3
    assert batches[np.arange(2)] and not capsys.readouterr().err

    # without eyes there is nothing but the text
    _, batch = batch_of(tmp_path / 'set')
    assert not batch['bad'] and '12 members .tiff' in capsys.readouterr().err


def test_other_members_are_named_once_and_a_form_of_yours_gets_them(tmp_path, capsys):
    write_set(tmp_path / 'set', [[(f'a{i}', sample(i) | {'cls': b'7', 'wav': b'RIFF'})
                                  for i in range(3)]])
    _, batch = batch_of(tmp_path / 'set', size=16, image_tokens=4)
    said = capsys.readouterr().err
    assert '3 members .cls: not read' in said and '3 members .wav: not read' in said
    assert not batch['bad'] and len(said.split('\n')) == 5
    (tmp_path / 'mine.py').write_text(
        'from processor import LEARNED\n'
        'def form(sample, p):\n    return [(sample["members"]["cls"].decode() * 3, LEARNED)]\n')
    _, batch = batch_of(tmp_path / 'set', form=f'{tmp_path}/mine.py:form')
    assert not batch['bad'] and not capsys.readouterr().err
    assert batch['num_targets'] == 3 * 2


def test_keys_with_dots_are_explained(tmp_path, capsys):
    made(tmp_path / '0.tar', ('v1.a.png', sample(1)['png']), ('v1.a.txt', b'one'),
         ('v1.b.png', sample(2)['png']), ('v1.b.txt', b'two'))
    _, batch = batch_of(tmp_path, size=16, image_tokens=4)
    assert len(batch['bad']) == 1
    assert '2 members .txt: not read (.a.txt: a key ends at the first dot' in (
        capsys.readouterr().err)
