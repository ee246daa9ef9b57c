"""What ends a script is told in one line: a task of yours that gives nonsense, Ctrl-C, a full disk
or memory, names that stand for too much, what was not finished."""
import sys
from types import SimpleNamespace

import pytest
import tiny

import hub
import initial
import tasks
import usage
from tars import expand
from yours import Nonsense

MINE = '''import os
from tasks.llm import *
from tasks.llm import TrainSettings


def form(sample, p):
    return sample


def build(settings, tokenizer, load_weights=True):
    return settings


def count(batch):
    return 7


def inputs(run, batch, tensors):
    return []
'''


def test_functions_of_a_task_that_give_nonsense_are_named(tmp_path):
    (tmp_path / 'mine.py').write_text(MINE)
    task = tasks.load(str(tmp_path / 'mine.py'))
    assert tasks.load(str(tmp_path / 'mine.py')) is task
    for name, arguments, given, wanted in [
            ('form', ('a', 0), "str 'a'", '[(item, role), ...]'),
            ('build', ({}, 0), 'dict {}', 'a torch.nn.Module'),
            ('count', (0,), 'int 7', '{kind: number of targets}'),
            ('inputs', (0, 0, 0), 'list []', 'a dict')]:
        with pytest.raises(Nonsense) as error:
            getattr(task, name)(*arguments)
        assert f'mine.py: {name} gave {given}: expected {wanted}' in str(error.value)


def test_a_forward_that_gives_nonsense_is_named(tmp_path):
    (tmp_path / 'net.py').write_text('import torch\nfrom tasks.llm import TrainSettings, form\n'
                                     'build = lambda *_, **__: torch.nn.Identity()\n')
    model = tasks.load(str(tmp_path / 'net.py')).build({}, None)
    import torch
    good = {'a': (torch.zeros(2), torch.ones(2), None)}
    assert model(good) is good
    for given in (3, {'a': 3}, {'a': (torch.zeros(2), torch.ones(3), None)}):
        with pytest.raises(Nonsense, match="net.py: its model's forward gave"):
            model(given)


@pytest.mark.parametrize('counted', [{'a': 4}, {'b': 2}, {'a': 2, 'b': 0}])
def test_a_count_that_is_not_what_forward_learned_is_named(tmp_path, counted):
    (tmp_path / 'two.py').write_text('import torch\nfrom tasks.llm import TrainSettings, form\n'
                                     'build = lambda *_, **__: torch.nn.Identity()\n'
                                     'def count(batch):\n    return batch\n')
    import torch
    task = tasks.load(str(tmp_path / 'two.py'))
    learned = {'a': (torch.zeros(2), torch.ones(2), None)}
    model = task.build({}, None)
    task.count(counted)
    with pytest.raises(Nonsense, match='two.py: count gave .* forward learned'):
        model(learned)

    # of the first batch alone: later ones may be counted before they come
    model = task.build({}, None)
    task.count({'a': 2})
    model(learned)
    task.count(counted)
    model(learned)


def test_nonsense_ends_a_run_in_one_line(tmp_path):
    mine = MINE[:MINE.index('def form')] + MINE[MINE.index('def count'):MINE.index('def inputs')]
    (tmp_path / 'mine.py').write_text(mine)
    flags = [flag for flag in tiny.LLM_FLAGS if not flag.startswith('--task')]
    tiny.run('train.py', f'--task={tmp_path}/mine.py', *flags, f'--data_dir={tiny.data_dir()}',
             '--mix={"words": 1}', '--max_steps=1', f'--out_dir={tmp_path / "run"}').refused(
                 'mine.py: count gave int 7', code=1)


@pytest.mark.parametrize('error, words', [
    (KeyboardInterrupt(), 'stopped by Ctrl-C'), (MemoryError('9 GB'), 'micro_batch_size'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 'micro_batch_size'),
    (RuntimeError('CUDA out of memory.\nTried to allocate'), 'Tried'), (Nonsense('mine'), 'mine')])
def test_the_end_of_a_script_is_one_line(capsys, error, words):
    usage.tell_end(type(error), error, None)
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1


def test_other_errors_keep_their_traceback(capsys):
    try:
        raise RuntimeError('shapes differ')
    except RuntimeError:
        usage.tell_end(*sys.exc_info())
    assert 'Traceback' in capsys.readouterr().err


def test_a_full_disk_behind_standard_output_is_told(monkeypatch):
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr(sys, 'stdout', full)
        with pytest.raises(OSError, match='standard output can not be written'), usage.printing():
            print('a')


def test_braces_are_counted_before_they_are_written_out():
    assert len(expand('{000..099}.tar,b{a,b}{1..4..2}')) == 104
    for spec in ('{0..9999999999}.tar', '{0..9999}{0..9999}.tar', '{a,b}' * 40):
        with pytest.raises(ValueError, match='its braces stand for more than'):
            expand(spec)


def test_a_checkpoint_that_was_not_finished_is_refused(tmp_path):
    folder = tmp_path / 'checkpoints' / '.step_00000002.tmp'
    folder.mkdir(parents=True)
    (folder / 'model.safetensors').write_bytes(b'')
    for opened in (hub.open_ours, initial.weights_folder):
        with pytest.raises(ValueError, match='was not finished'):
            opened(str(folder))


def test_hub_help(capsys):
    hub.main(['--help'])
    assert 'python hub.py export' in capsys.readouterr().out


def test_help_names_the_tasks_that_are_there(monkeypatch, tmp_path):
    task = usage.Setting('task', "'vlm'", 'llm | vlm | t2i, or a file: mine.py', '')
    assert usage.only_here(task) == task
    (tmp_path / 'tasks').mkdir()
    (tmp_path / 'tasks' / 'llm.py').touch()
    monkeypatch.setattr(usage, 'HOME', tmp_path)
    assert usage.only_here(task).comment == 'llm, or a file: mine.py'


def test_sizes_that_are_not_those_of_the_statistics_are_named():
    samples = pytest.importorskip('robots.samples')
    settings = dict(action_dim=1, proprio_dim=3, normalize='none', action_steps=2)
    run = SimpleNamespace(settings=settings, processor=SimpleNamespace(form='auto'),
                          kept={'stats.json': dict(actions=dict(mean=[0, 0]), proprio={})})
    with pytest.raises(ValueError, match='action_dim=1: actions have 2 numbers.*action_dim=2'):
        samples.prepare(run)
