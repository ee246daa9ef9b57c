"""An out_dir: one command at a time trains there, and what it finds may be as a crash, a copy or
another disk has left it."""
import json
import os
import platform
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from test_train import contents, cut
from tiny import Process, names, rows, run, same_weights, wait_until, weights

import checkpoint
import initial
import past

FLAGS = [*tiny.LLM_FLAGS, '--mix={"words": 1}', '--val={"held": "words"}', '--num_checkpoints=3']


@pytest.fixture(scope='module')
def train():
    """train(out, *flags): six steps with three checkpoints; its Result."""
    def command(out, *extra, **kwargs):
        return run('train.py', *FLAGS, '--max_steps=6', f'--data_dir={tiny.data_dir()}',
                   f'--out_dir={out}', *extra, **kwargs)
    return command


@pytest.fixture(scope='module')
def base(train, tmp_path_factory):
    out = tmp_path_factory.mktemp('base') / 'run'
    train(out).ok()
    return out


@pytest.fixture
def out(base, tmp_path):
    """A copy of the run, as it was after four of its steps."""
    copied = tmp_path / 'run'
    shutil.copytree(base, copied, symlinks=True)
    shutil.rmtree(copied / 'checkpoints/step_00000006')
    os.remove(copied / 'checkpoints/latest')
    os.symlink('step_00000004', copied / 'checkpoints/latest')
    return copied


def is_as_base(out, base):
    assert tiny.losses(out) == tiny.losses(base)
    same_weights(weights(out, 'step_00000006'), weights(base, 'step_00000006'))


# -----------------------------------------------------------------------------------------------
# one command at a time


def hold(out):
    """A process that has taken out_dir and does nothing more; its id."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        held = checkpoint.take(str(out), 4, print)
        # such as a worker is: it lives on
        if not os.fork():
            os.write(write, b'x')
        signal.pause()
        os._exit(held.fileno())
    os.read(read, 1)
    return pid


def test_a_second_command_is_refused_and_a_killed_one_lets_go(train, base, out):
    before = contents(out)
    pid = hold(out)
    worker = int(Path(f'/proc/{pid}/task/{pid}/children').read_text())
    try:
        train(out).refused(f'process {pid} on {platform.node()}', out, 'out_dir')
        assert 'norm.weight' in train(out, '--parameters').ok().out
        run('sample.py', f'--out_dir={out}', '--prompt=a', '--max_new_tokens=2').ok()
        after = contents(out)
        assert {name for name in after if after[name] != before.get(name)} <= {'lock', 'log.jsonl'}
        os.kill(pid, signal.SIGKILL)
        # at once: nobody has asked yet whether it is gone
        assert 'resumed from' in train(out).ok().out
    finally:
        for process in (pid, worker):
            os.kill(process, signal.SIGKILL)
        os.waitpid(pid, 0)
    is_as_base(out, base)


def test_of_several_ranks_the_first_holds_it(tmp_path):
    out = tmp_path / 'run'
    process = Process('train.py', [*FLAGS, '--workers=1', f'--data_dir={tiny.data_dir()}',
                                   '--max_steps=100000', f'--out_dir={out}'], torchrun=2)
    assert wait_until(lambda: rows(out), process), process.wait().err
    ranks = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    with pytest.raises(ValueError, match=f'process {ranks[0]} on') as error:
        checkpoint.check_free(str(out))
    assert f'out_dir={str(out)!r}' in str(error.value)
    # a second read of the lock has not opened it
    os.kill(int(ranks[0]), signal.SIGKILL)
    checkpoint.check_free(str(out))
    process.wait()


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, 'No locks available')
    monkeypatch.setattr(checkpoint.fcntl, 'lockf', refuse)
    assert checkpoint.take(str(tmp_path / 'run'), 0, print)
    said = capsys.readouterr().out
    assert 'No locks available' in said and len(said.splitlines()) == 1
    checkpoint.check_free(str(tmp_path / 'run'))


def test_where_nothing_can_be_written(train, tmp_path):
    (tmp_path / 'file').write_text('')
    result = train(tmp_path / 'file/run')
    result.failed(f"out_dir='{tmp_path}/file/run'", code=2)


# -----------------------------------------------------------------------------------------------
# as a copy or another disk has it


def without(out):
    os.remove(out / 'checkpoints/latest')


def file(out):
    os.remove(out / 'checkpoints/latest')
    (out / 'checkpoints/latest').write_text('step_00000002')


def folder(out):
    os.remove(out / 'checkpoints/latest')
    shutil.copytree(out / 'checkpoints/step_00000002', out / 'checkpoints/latest')


def older(out):
    os.remove(out / 'checkpoints/latest')
    os.symlink('step_00000002', out / 'checkpoints/latest')


@pytest.mark.parametrize('latest', [without, file, folder, older])
def test_nothing_needs_latest(out, latest):
    latest(out)
    newest = str(out / 'checkpoints/step_00000004')
    for path in (out, out / 'checkpoints/latest', newest):
        assert past.checkpoint_of(path) == initial.weights_folder(str(path)) == newest
    assert past.find('nowhere', str(out), print)[0] == newest
    os.makedirs(out / 'checkpoints/step_00000004/ema')
    shutil.copy(out / 'checkpoints/step_00000004/model.safetensors', f'{newest}/ema')
    assert initial.weights_folder(f'{out}/checkpoints/latest/ema') == f'{newest}/ema'

    os.rename(newest, out / 'checkpoints/step_00000005')
    checkpoint.point_latest(out / 'checkpoints', 'step_00000005')
    is_link = os.path.islink(out / 'checkpoints/latest')
    assert is_link != (latest is folder)
    if is_link:
        assert os.readlink(out / 'checkpoints/latest') == 'step_00000005'


def test_a_run_whose_latest_is_a_folder_goes_on_and_is_used(train, base, out):
    folder(out)
    told = run('sample.py', f'--out_dir={out}', '--prompt=a', '--checkpoint=none')
    assert told.code == 2 and len(told.lines) == 1
    assert 'latest is a folder' in train(out).ok().out
    is_as_base(out, base)
    cut(out / 'checkpoints/latest/model.safetensors')
    run('sample.py', f'--out_dir={out}', '--prompt=a', '--max_new_tokens=2').ok()


def save(saver, *steps):
    for step in steps:
        progress = dict(step=step, samples=step, tokens=0, bad_samples=0, world=1)
        saver.save(step, {}, {}, {}, {'progress.json': progress}, {})
        saver.wait()


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
def test_a_disk_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, 'Operation not permitted')
    monkeypatch.setattr(os, 'symlink', refuse)
    (tmp_path / 'checkpoints').mkdir()
    save(checkpoint.Saver(str(tmp_path)), 1, 2)
    assert names(tmp_path) == ['step_00000001', 'step_00000002']
    path, progress = past.newest(str(tmp_path / 'checkpoints'), print)
    assert path == past.checkpoint_of(tmp_path) == str(tmp_path / 'checkpoints/step_00000002')


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
def test_a_damaged_checkpoint_takes_the_place_of_no_other(tmp_path):
    """A run that went on from an older one, with room for one: the newest that is whole stays."""
    (tmp_path / 'checkpoints').mkdir()
    save(checkpoint.Saver(str(tmp_path)), 1, 2, 9)
    cut(tmp_path / 'checkpoints/step_00000009/progress.json')
    saver = checkpoint.Saver(str(tmp_path), keep_last=1)
    save(saver, 3)
    assert names(tmp_path) == ['step_00000003', 'step_00000009']
    save(saver, 4, 9)
    assert names(tmp_path) == ['step_00000009']
    assert past.verify(tmp_path / 'checkpoints/step_00000009')['step'] == 9


# -----------------------------------------------------------------------------------------------
# as a crash has left it


def test_a_log_that_a_crash_has_damaged(train, base, out):
    kept = [line for line in (out / 'log.jsonl').read_bytes().splitlines(keepends=True)
            if json.loads(line)['step'] <= 4]
    (out / 'log.jsonl').write_bytes(b''.join(
        [*kept[:2], b'\xff\x80\n', *kept[2:], bytes(500), b'{"step": 5, "lo']))
    os.remove(out / 'loss.png')
    result = train(out).ok()
    assert f'{out}/log.jsonl: 2 lines could not be read' in result.out
    is_as_base(out, base)
    assert np.array(Image.open(out / 'loss.png')).std() > 0


def rewrite(**changes):
    def damage(folder):
        progress = json.loads((folder / 'progress.json').read_text())
        (folder / 'progress.json').write_text(json.dumps(progress | changes))
    return damage


@pytest.mark.parametrize('damage', [
    rewrite(step='4'), rewrite(samples=None), rewrite(tokens=1.5), rewrite(files=[]),
    rewrite(files={'config.json': 3}), rewrite(files={'config.json': None}),
    rewrite(bad_samples=[]), lambda folder: (folder / 'progress.json').write_text('[]'),
    lambda folder: (folder / 'progress.json').write_text('4'),
    lambda folder: (folder / 'progress.json').write_bytes(bytes(200)),
    lambda folder: cut(folder / 'chapters.json'), lambda folder: cut(folder / 'shards.json'),
    lambda folder: (folder / 'config.json').write_text('[]')])
def test_json_of_a_checkpoint_that_is_not_what_was_written(base, out, damage, capsys):
    damage(out / 'checkpoints/step_00000004')
    path, progress, problem = past.find(str(out), 'auto', print)
    assert path.endswith('step_00000002') and progress['step'] == 2 and not problem
    said = capsys.readouterr().out
    assert 'step_00000004 is damaged and is skipped' in said and len(said.splitlines()) == 1
    # and what a run is told to begin with is told
    _, _, problem = past.find(str(out / 'new'), f'{out}/checkpoints/step_00000004', print)
    assert 'resume=' in problem and 'step_00000004' in problem
    assert checkpoint.is_asked_for(out / 'checkpoints/step_00000004')
