"""A crash at every write: work that is killed, or whose disk is full or fails, at its k-th change
of the file system leaves the old or the new, never a half, and the same command goes on.

`make long` tries every k of each writer, `make test` a few of some.
"""
import contextlib
import json
import os
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import crashes
import numpy as np
import pytest
import test_prepare_emoji
import test_prepare_lerobot
import test_prepare_text
import tiny
import torch
from conftest import sample, write_set
from test_mirror import progress, write
from test_remote import proxy, s3  # noqa: F401  (fixtures)

import checkpoint
import hub
import leftovers
import manifests
import mirror
import past
import remote
from robots import record
from shards import Folder

# whose tests make the data of these
NEEDS = ('robots', 'families', 'pictures.py', 'prepare')
# how many of all changes are tried in make test; 0: all of them
FEW = pytest.mark.parametrize('few', [2, pytest.param(0, marks=pytest.mark.long)])
LONG = pytest.mark.long


def command(script, *args):
    """Run a script of ours, as its command does."""
    sys.argv = [script, *map(str, args)]
    sys.path.insert(0, str((tiny.ROOT / script).parent))
    runpy.run_path(str(tiny.ROOT / script), run_name='__main__')


def tree(folder, without=()):
    """{path: bytes} of all files below a folder, but some."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*')
            if path.is_file() and path.name not in without}


class Same:
    """check(root): what read(root) gives is what it gave first."""

    def __init__(self, read):
        self.read, self.first = read, None

    def __call__(self, root):
        found = self.read(root)
        if self.first is None:
            self.first = found
        assert found == self.first


@contextlib.contextmanager
def opened(spec, cache):
    """A Folder, whose descriptors are closed: a sweep opens thousands."""
    folder = Folder(str(spec), cache_dir=cache)
    yield folder
    for fd in folder.files.values():
        os.close(fd)


def is_whole_or_refused(folder, samples):
    """Is a folder that can be opened as a data set all of it?"""
    cache = Path(f'{folder}.cache')
    try:
        with opened(folder, cache) as data:
            assert len(data) == samples, f'{len(data)} of {samples} samples are taken for all'
            read = data.read_sequence if data.sequence_length else data.read
            for shard, size in enumerate(data.sizes.tolist()):
                for index in range(size):
                    read(shard, index)
    except (OSError, ValueError):
        pass
    shutil.rmtree(cache, ignore_errors=True)


# -----------------------------------------------------------------------------------------------
# checkpoints


def save(root, step):
    """What train.py does at a checkpoint, of which the last one is kept."""
    os.makedirs(root / 'checkpoints', exist_ok=True)
    try:
        leftovers.tidy(str(root), step, print)
        saver = checkpoint.Saver(str(root), keep_last=1)
        saver.save(step, {'a': torch.full((3,), float(step))}, {}, {'s': torch.ones(2)},
                   {'progress.json': progress(step), 'shards.json': {}}, {})
        saver.wait()
    except checkpoint.ERRORS as error:
        raise SystemExit(f'test: {str(error).splitlines()[-1]}') from None


def newest_step(root):
    """Of a checkpoint that holds what was written."""
    path, saved = past.newest(str(root / 'checkpoints'), print)
    new = {'a': torch.zeros(3)}
    checkpoint.load(new, path)
    assert new['a'].tolist() == [float(saved['step'])] * 3
    return saved['step']


def old_or_new(root):
    assert newest_step(root) in (1, 2)


def only_new(root):
    assert newest_step(root) == 2
    assert sorted(os.listdir(root / 'checkpoints')) == ['latest', 'step_00000002']


@FEW
def test_a_checkpoint(tmp_path, few):
    crashes.sweep(lambda root: save(root, 2), only_new, tmp_path, lambda root: save(root, 1),
                  old_or_new, few)


def train(root):
    command('train.py', *tiny.LLM_FLAGS, f'--data_dir={tiny.data_dir()}', '--mix={"words": 1}',
            '--max_steps=2', '--num_checkpoints=2', '--keep_last=1', f'--out_dir={root}/run',
            f'--cache_dir={root}/cache')


def whole_run(root):
    # one that was ended after its last checkpoint leaves the one before, and the link to that
    newest = tiny.names(root / 'run')[-1]
    weights = tiny.weights(root / 'run', newest)
    weights = {name: array.tobytes() for name, array in weights.items()}
    return tiny.losses(root / 'run'), newest, weights


def test_a_checkpoint_never_has_its_name_in_part(tmp_path, monkeypatch):
    write(tmp_path, 1, 2)

    def killed(folder, ignore_errors=False):
        os.remove(f'{folder}/progress.json')
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, 'rmtree', killed)
        checkpoint.remove(f'{tmp_path}/checkpoints', 'step_00000001')
    assert checkpoint.names(f'{tmp_path}/checkpoints') == ['step_00000002']


@LONG
def test_a_run(tmp_path):
    tiny.import_libraries()
    crashes.sweep(train, Same(whole_run), tmp_path)


# -----------------------------------------------------------------------------------------------
# copies of checkpoints


def copy(root):
    """To a URL that is a folder: whose files can be there by half, unlike those of S3."""
    names = checkpoint.names(str(root / 'run/checkpoints'))
    copier = mirror.Mirror(f'file://{root}/far', str(root / 'run'), names, print, retries=0)
    error = copier.finish(dict(signal=0))
    if error:
        raise SystemExit(f'test: {error}')


def copies_are_whole(root):
    there = mirror.remote_names(*remote.filesystem(f'file://{root}/far'))
    for name in there:
        past.verify(str(root / 'far/checkpoints' / name))
    return there


def all_is_copied(root):
    assert len(copies_are_whole(root)) == 2
    far, run = tree(root / 'far'), tree(root / 'run')
    assert {name: far.get(name) for name in run} == run


def two_checkpoints(root):
    write(root / 'run', 1, 2)


@FEW
def test_copies_of_a_run(tmp_path, few):
    crashes.sweep(copy, all_is_copied, tmp_path, two_checkpoints, copies_are_whole, few)


def restore(root):
    remote.time = SimpleNamespace(sleep=lambda seconds: None, time=time.time)   # of this child
    path, _, problem = mirror.find(str(root / 'run'), f'file://{root}.far', 'auto', print)
    if problem:
        raise SystemExit(f'test: {problem}')
    assert path


def run_is_back(root):
    path, saved = past.newest(str(root / 'run/checkpoints'), print)
    assert saved['step'] == 2
    log = (root / 'run/log.jsonl').read_text()
    assert log == Path(f'{root}.far/log.jsonl').read_text()


@FEW
def test_a_run_is_brought_back(tmp_path, few):
    def begin(root):
        shutil.rmtree(f'{root}.far', ignore_errors=True)
        write(Path(f'{root}.far'), 1, 2)
    crashes.sweep(restore, run_is_back, tmp_path, begin, few=few)


def copy_to(url, out):
    names = checkpoint.names(str(out / 'checkpoints'))
    return mirror.Mirror(url, str(out), names, print).finish(dict(signal=0))


def copied_and_killed(far, url, out, at):
    """The copying in a child that ends at its request number `at` that changes something; how many
    there were."""
    seen = []

    def strike(method, path):
        if method in ('PUT', 'POST', 'DELETE'):
            seen.append(method)
            if len(seen) == at:
                os.kill(child, signal.SIGKILL)
    child = os.fork()
    if child == 0:
        os._exit(1 if copy_to(url, out) else 0)
    far.proxy.fault = strike
    os.waitpid(child, 0)
    far.proxy.fault = lambda method, path: None
    return len(seen)


@FEW
def test_copies_on_a_server(s3, tmp_path, few):  # noqa: F811
    write(tmp_path / 'run', 1, 2)
    base = s3.url.rpartition('/')[0]
    total = copied_and_killed(s3, f'{base}/whole', tmp_path / 'run', 0)
    assert total > 10
    for k in crashes.chosen(total, few):
        url = f'{base}/{k}'
        copied_and_killed(s3, url, tmp_path / 'run', k)
        # what counts as there is whole
        mirror.find(str(tmp_path / f'half-{k}'), url, 'auto', pytest.fail)
        assert copy_to(url, tmp_path / 'run') == ''
        path, saved, problem = mirror.find(str(tmp_path / f'new-{k}'), url, 'auto', pytest.fail)
        assert saved['step'] == 2 and not problem
    print(f'{total} changes')


# -----------------------------------------------------------------------------------------------
# makers of data sets


def test_a_data_set_that_is_not_finished_is_refused(tmp_path):
    write_set(tmp_path / 'set', [3, 2])
    manifests.begin(tmp_path / 'set', 'prepare/mine.py')
    with pytest.raises(ValueError, match='manifest.jsonl.*prepare/mine.py has not come to'):
        Folder(str(tmp_path / 'set'), cache_dir=tmp_path)
    record.Recorder(str(tmp_path / 'set'))      # takes it over
    manifests.finish(tmp_path / 'set', [dict(shard='00000000', num_sequences=3)])
    assert len(Folder(str(tmp_path / 'set'), cache_dir=tmp_path)) == 3
    with pytest.raises(ValueError, match='holds a data set already'):
        record.Recorder(str(tmp_path / 'set'))


def make_text(root):
    test_prepare_text.make(f'{root}.input/*.txt', root / 'out', val_fraction=0.3, split='line')


def text_input(root):
    folder = Path(f'{root}.input')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / 'a.txt').write_text(''.join(f'line {i} of a text\n' for i in range(40)))
    os.utime(folder / 'a.txt', (1e9, 1e9))


def text_files(root):
    files = tree(root / 'out', ('.lock', 'done.json'))
    sizes = {}
    for part in ('train', 'val'):
        with opened(root / 'out' / part, f'{root}.cache') as data:
            sizes[part] = len(data)
    return files, sizes


@FEW
def test_text(tmp_path, few):
    same = Same(text_files)

    def parts_are_whole(root):
        for part, samples in same.first[1].items():
            is_whole_or_refused(root / 'out' / part, samples)
    crashes.sweep(make_text, same, tmp_path, text_input, parts_are_whole, few)


NAMES = [f'thing-{n}' for n in range(12)]


@LONG
def test_emoji(tmp_path):
    maker = test_prepare_emoji.prepare_emoji
    pictures = maker.draw_icon_sets(test_prepare_emoji.icon_sets(NAMES))

    def make(root):
        try:
            maker.build(root / 'sets', pictures, set(NAMES), 'credit\n', {'test': 1})
        except OSError as error:
            raise SystemExit(f'test: {error}') from None
    crashes.sweep(make, Same(lambda root: tree(root / 'sets')), tmp_path,
                  lambda root: (root / 'sets').mkdir())


def convert(root):
    command('prepare/lerobot.py', f'--data={root.parent}/source', f'--out={root}/out',
            '--action_steps=2', '--episodes_per_shard=2')


@pytest.fixture
def robot(tmp_path):
    """A LeRobot data set of 18 steps; the folder for sweeps beside it."""
    test_prepare_lerobot.write_set(tmp_path / 'source', 'v3.0')
    return tmp_path


@FEW
def test_lerobot_to_shards(robot, few):
    crashes.sweep(convert, Same(lambda root: tree(root / 'out')), robot,
                  look=lambda root: is_whole_or_refused(root / 'out', 18), few=few)


def to_lerobot(root):
    # what is there is not written over
    if (root / 'out/meta/info.json').exists():
        return
    command('prepare/lerobot.py', '--export=true', f'--data={root.parent}/shards',
            f'--out={root}/out', f'--cache_dir={root.parent}/cache')


@LONG
def test_shards_to_lerobot(robot):
    command('prepare/lerobot.py', f'--data={robot}/source', f'--out={robot}/shards')

    def names(root):
        return sorted(tree(root / 'out'))
    crashes.sweep(to_lerobot, Same(names), robot)


# -----------------------------------------------------------------------------------------------
# statistics, and what is kept beside shards


@pytest.fixture
def lowdim(tmp_path):
    """A data set of actions and states; the folder for sweeps beside it."""
    samples = [(f'{i:03}', {'lowdim.npz': npz(i), 'json': b'{"instruction": "go"}'})
               for i in range(6)]
    write_set(tmp_path / 'set', [samples[:4], samples[4:]])
    return tmp_path


def npz(number):
    import io
    rng, file = np.random.default_rng(number), io.BytesIO()
    np.savez(file, proprio=rng.random(3, np.float32), actions=rng.random((2, 2), np.float32),
             is_pad=np.zeros(2, bool))
    return file.getvalue()


def count_statistics(root):
    command('prepare/stats.py', f'--data={root.parent}/set', f'--out={root}/stats.json',
            f'--cache_dir={root}/cache')


def statistics_are_whole(root):
    if (root / 'stats.json').exists():
        json.loads((root / 'stats.json').read_text())['actions']


@FEW
def test_statistics(lowdim, few):
    crashes.sweep(count_statistics, Same(lambda root: (root / 'stats.json').read_bytes()), lowdim,
                  look=statistics_are_whole, few=few)


def read_all(root):
    """Without counts, so that they are kept in the cache; by way of a copy; a long manifest."""
    try:
        for spec in (f'{root.parent}/set/{{00000000,00000001}}.tar', f'file://{root.parent}/set',
                     f'{root.parent}/long'):
            folder = Folder(spec, cache_dir=root / 'cache')
            for shard in range(2):
                folder.read(shard, 0)
    except (OSError, ValueError) as error:
        raise SystemExit(f'test: {error}') from None


def all_is_read(root):
    for spec in (f'{root.parent}/set', f'file://{root.parent}/set', f'{root.parent}/long'):
        with opened(spec, root / 'cache') as data:
            for shard, size in enumerate([3, 2]):
                for index in range(size):
                    number = 3 * shard + index
                    assert data.read(shard, index) == sample(number)
                    assert data.key(shard, index) == f'{number:06d}'


@FEW
def test_what_is_kept_beside_shards(tmp_path, few):
    write_set(tmp_path / 'set', [3, 2])
    (tmp_path / 'long').mkdir()
    for path in (tmp_path / 'set').glob('*.tar'):
        shutil.copy(path, tmp_path / 'long')
    rows = [json.dumps(dict(shard=f'{i:08d}', num_sequences=[3, 2][i] if i < 2 else 1)) + '\n'
            for i in range(10_001)]
    (tmp_path / 'long/manifest.jsonl').write_text(''.join(rows))
    crashes.sweep(read_all, all_is_read, tmp_path, look=all_is_read, few=few)


# -----------------------------------------------------------------------------------------------
# exports


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp('trained') / 'run'
    tiny.run('train.py', *tiny.LLM_FLAGS, f'--data_dir={tiny.data_dir()}', '--mix={"words": 1}',
             '--max_steps=1', f'--out_dir={out}').ok()
    return out


@FEW
def test_an_export(trained, tmp_path, few):
    def export(root):
        hub.main(['export', str(trained), str(root / 'out')])

    whole = Same(lambda root: tree(root / 'out'))

    def whole_or_no_model(root):
        if (root / 'out/config.json').exists():
            whole(root)
    crashes.sweep(export, whole, tmp_path, look=whole_or_no_model, few=few)
