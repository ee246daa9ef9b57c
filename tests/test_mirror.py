"""Copies of checkpoints at a URL: what is damaged, replaced, missing or gone there (mirror.py)."""
import errno
import json
import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from test_remote import proxy, s3  # noqa: F401  (fixtures)

import checkpoint
import mirror
import past
import remote

# test_remote.py, whose fixtures are used here, looks at pictures
NEEDS = ('pictures.py',)


def progress(step):
    """What a run writes of itself."""
    return dict(step=step, samples=0, tokens=0, bad_samples=0, world=1, scheduled=True)


def write(out, *steps, content='weights'):
    """Checkpoints of a run, a few bytes each, and its log; their names, the newest first."""
    for step in steps:
        folder = out / 'checkpoints' / f'step_{step:08}'
        (folder / 'state').mkdir(parents=True)
        (folder / 'model.safetensors').write_text(f'{content} {step}')
        (folder / 'state/a.safetensors').write_text(f'state {step}')
        files = checkpoint.files_of(str(folder))
        checkpoint.write_json(str(folder / 'progress.json'), progress(step) | dict(files=files))
    (out / 'log.jsonl').write_text(''.join(f'{{"step": {step}}}\n' for step in steps))
    return checkpoint.names(str(out / 'checkpoints'))


def copy(url, out, said=print):
    """All that a run has, to its URL; the error."""
    names = checkpoint.names(str(out / 'checkpoints'))
    return mirror.Mirror(url, str(out), names, said).finish(dict(signal=0))


def copied(tmp_path, url):
    """A run of steps 1, 2, 3 that is copied to a URL."""
    write(tmp_path / 'run', 1, 2, 3)
    assert copy(url, tmp_path / 'run') == ''
    fs, base = remote.filesystem(url)
    return SimpleNamespace(url=url, out=tmp_path / 'run', fs=fs, base=base)


@pytest.fixture
def near(tmp_path):
    """The same, at a URL that is a folder: quicker than a server."""
    return copied(tmp_path, f'file://{tmp_path}/far/a')


@pytest.fixture
def far(s3, tmp_path):  # noqa: F811
    run = copied(tmp_path, s3.url.rpartition('/')[0] + '/runs/a')
    run.proxy = s3.proxy
    return run


def there(run):
    return sorted(mirror.remote_names(*remote.filesystem(run.url)))


def flip(fs, path):
    fs.pipe_file(path, fs.cat_file(path)[:-1] + b'?')


def cut(fs, path):
    fs.pipe_file(path, fs.cat_file(path)[:-1])


def remove(fs, path):
    fs.rm(path)


@pytest.mark.parametrize('harm', [flip, cut, remove])
@pytest.mark.parametrize('file', ['model.safetensors', 'state/a.safetensors', 'progress.json'])
def test_a_damaged_copy_falls_back_to_the_one_before(near, tmp_path, file, harm):
    falls_back(near, tmp_path, file, harm)


def test_so_it_does_on_a_server(far, tmp_path):
    falls_back(far, tmp_path, 'model.safetensors', flip)


def falls_back(far, tmp_path, file, harm):
    harm(far.fs, f'{far.base}/checkpoints/step_00000003/{file}')
    said = []
    mirror.restore(far.url, str(tmp_path / 'new'), said.append)
    path, saved = past.newest(str(tmp_path / 'new/checkpoints'), said.append)
    assert path.endswith('step_00000002') and saved['step'] == 2
    # without progress.json it never was whole, so there is nothing to tell
    is_silent = file == 'progress.json' and 'step_00000003' not in ''.join(said)
    assert is_silent or len(said) == 1 and 'step_00000003 is damaged' in said[0]
    assert there(far) == ['step_00000001', 'step_00000002'], 'it counts as not whole'
    assert (tmp_path / 'new/log.jsonl').read_bytes() == (far.out / 'log.jsonl').read_bytes()

    # the run comes by that step again
    assert copy(far.url, far.out) == '' and there(far)[-1] == 'step_00000003'
    theirs = far.fs.cat_file(f'{far.base}/checkpoints/step_00000003/{file}')
    assert theirs == (far.out / 'checkpoints/step_00000003' / file).read_bytes()


def test_where_all_copies_are_damaged_no_run_begins_anew(near, tmp_path):
    for name in there(near):
        flip(near.fs, f'{near.base}/checkpoints/{name}/model.safetensors')
    _, _, problem = mirror.find(str(tmp_path / 'new'), near.url, 'auto', print)
    assert near.url in problem and 'no checkpoint that is whole' in problem


def test_weights_to_begin_with_fall_back_and_mark_nothing(near, tmp_path, capsys):
    flip(near.fs, f'{near.base}/checkpoints/step_00000003/model.safetensors')
    folder = mirror.local_copy(near.url, str(tmp_path))
    assert folder.endswith('step_00000002')
    assert 'step_00000003 is damaged' in capsys.readouterr().out
    assert len(there(near)) == 3


def test_what_is_damaged_here_is_not_copied_and_holds_up_no_other(near):
    write(near.out, 4, 5)
    (near.out / 'checkpoints/step_00000004/model.safetensors').write_text('?')
    (near.out / 'checkpoints/step_00000005/progress.json').unlink()
    write(near.out, 6)
    said = []
    assert copy(near.url, near.out, said.append) == ''
    assert there(near) == [f'step_{step:08}' for step in (1, 2, 3, 6)]
    assert [line.split()[0][-1] for line in said] == ['4', '5']


def test_a_checkpoint_that_was_made_again_replaces_its_copy(near, tmp_path):
    write(tmp_path / 'new', 3, content='other')
    assert copy(near.url, tmp_path / 'new') == ''
    theirs = near.fs.cat_file(f'{near.base}/checkpoints/step_00000003/model.safetensors')
    assert theirs == b'other 3'
    file = tmp_path / 'far/a/checkpoints/step_00000003/model.safetensors'
    before = os.stat(file)
    assert copy(near.url, tmp_path / 'new') == '' and os.stat(file) == before


def save(saver, step):
    saver.save(step, {'a': torch.ones(2)}, {}, {'s': torch.ones(1)},
               {'progress.json': progress(step)}, {})
    saver.wait()


def test_keep_last_deletes_nothing_that_is_not_copied_yet(far, tmp_path):
    out = tmp_path / 'new'
    out.mkdir()
    url = far.url + 'b'
    is_gone = [True]
    far.proxy.fault = lambda method, path: 500 if is_gone[0] and method == 'PUT' else None
    copier = mirror.Mirror(url, str(out), [], print)
    saver = checkpoint.Saver(str(out), keep_last=1, remote=copier)
    every = [f'step_{step:08}' for step in (3, 2, 1)]
    for step in (1, 2, 3):
        save(saver, step)
    assert checkpoint.names(str(out / 'checkpoints')) == every
    is_gone[0] = False
    assert copier.finish(dict(signal=0)) == ''
    assert checkpoint.names(str(out / 'checkpoints')) == every[:1]
    fs, base = remote.filesystem(url)
    assert checkpoint.ordered(mirror.remote_names(fs, base)) == every


@pytest.fixture
def silent(far, monkeypatch):
    """Its URL is a place that takes connections and never answers."""
    import fsspec
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        options = {'endpoint_url': f'http://127.0.0.1:{port}', 'key': 'k', 'secret': 's',
                   'config_kwargs': {'read_timeout': 60, 'retries': {'max_attempts': 0}}}
        monkeypatch.setitem(fsspec.config.conf, 's3', options)
        yield far


def test_a_place_that_never_answers_costs_one_bounded_wait(silent, monkeypatch):
    monkeypatch.setattr(mirror, 'WAIT', 0.5)
    begun, said = time.monotonic(), []
    error = copy(silent.url, silent.out, said.append)
    assert time.monotonic() - begun < 4 and said[0].startswith('\nwaiting until s3://')
    assert 'no sign of life' in error and 'step_00000001' in error


def test_a_signal_ends_the_wait(silent):
    stop, begun = dict(signal=15), time.monotonic()
    copier = mirror.Mirror(silent.url, str(silent.out), ['step_00000003'], print)
    threading.Timer(2.5, lambda: stop.update(signal=15)).start()
    error = copier.finish(stop)
    # the one that ended the run did not
    assert 2.4 < time.monotonic() - begun < 4 and 'ended by a signal' in error


def test_a_disk_that_is_full_here_is_not_waited_for(near, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(remote.time, 'sleep', pytest.fail)
    monkeypatch.setattr(mirror, 'get_checkpoint', full)
    _, _, problem = mirror.find(str(tmp_path / 'new'), near.url, 'auto', print)
    assert 'No space left on device' in problem and near.url in problem


def test_what_is_killed_on_its_way_here_is_brought_anew(near, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mirror.os, 'rename', killed)
        mirror.restore(near.url, str(tmp_path / 'new'), print)
    path, _, problem = mirror.find(str(tmp_path / 'new'), near.url, 'auto', print)
    assert path.endswith('step_00000003') and not problem
    assert json.loads((tmp_path / 'new/log.jsonl').read_text().splitlines()[-1]) == {'step': 3}
