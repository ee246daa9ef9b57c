"""A file of yours, a task or a form, is kept with the checkpoint: a run goes on and is used when
the original moved or changed. What a form meets in one sample is told by its line."""
import json
import shutil
import sys

import numpy as np
import pytest
import tiny
from conftest import make_processor, write_set
from tiny import names, run

import data
import hub
import past
import yours
from shards import Folder

FORM = '''from processor import LEARNED, READ

def form(sample, p):
    text = sample['text'] + SUFFIX
    return [(p.tokenizer.bos_id, READ), (text, LEARNED), (p.tokenizer.eos_id, LEARNED)]

SUFFIX = '!'
'''


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A folder with form.py, task.py, and a run of both."""
    folder = tmp_path_factory.mktemp('kept')
    (folder / 'form.py').write_text(FORM)
    (folder / 'task.py').write_text('from tasks.llm import *  # noqa: F403\nMINE = 1\n')
    train(folder, '--max_steps=2').ok()
    return folder


@pytest.fixture
def folder(base, tmp_path):
    """A copy of it."""
    return shutil.copytree(base, tmp_path / 'copy', symlinks=True)


def train(folder, *flags, code=None):
    code = code or folder
    return run('train.py', *tiny.LLM_FLAGS, f'--data_dir={tiny.data_dir()}', '--mix={"words": 1}',
               f'--task={code}/task.py', f'--processor={code}/form.py:form',
               f'--out_dir={folder / "run"}', *flags)


def kept_in(folder):
    return folder / 'run/checkpoints' / names(folder / 'run')[-1]


def test_a_run_goes_on_when_its_files_moved(folder):
    checkpoint = kept_in(folder)
    assert (checkpoint / 'form.py').read_text() == FORM
    for name in ('form.py', 'task.py'):
        (folder / name).unlink()
    train(folder).refused('task.py', 'no file', 'checkpoints')
    said = train(folder, '--max_steps=3', code=checkpoint).ok().out
    assert 'resumed from' in said and f'-> \'{checkpoint}/form.py:form\'' in said
    assert (kept_in(folder) / 'task.py').read_text().endswith('MINE = 1\n')


def test_a_changed_file_is_refused_or_adopted_by_name(folder):
    (folder / 'form.py').write_text(FORM.replace("'!'", "'?'"))
    train(folder, '--max_steps=3').refused('form.py is not what', 'step_00000002', '--adopt=')
    train(folder, '--max_steps=3', '--adopt=["form.py"]').ok()
    assert "'?'" in (kept_in(folder) / 'form.py').read_text()


def test_a_run_is_used_with_the_code_it_was_made_with(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['x', '--allow_code=true'])
    sample = dict(text='a', pictures=[])

    def suffix(**options):
        opened = hub.open_run(str(folder / 'run'), **options)
        assert opened.task.MINE == 1
        return opened.processor.function(sample, opened.processor)[1][0]

    # as config.json names it, changed, and gone
    assert suffix() == 'a!' and not capsys.readouterr().err
    (folder / 'form.py').write_text(FORM.replace("'!'", "'?'"))
    config = kept_in(folder) / 'config.json'
    settings = json.loads(config.read_text())
    here = settings | dict(task=f'{folder}/task.py', processor=f'{folder}/form.py:form')
    kept = yours.with_kept(here, str(kept_in(folder)))
    said = capsys.readouterr().err
    assert kept['processor'] == f'{kept_in(folder)}/form.py:form'
    assert f'{folder}/form.py is not what the run was made with' in said and '--adopt=' in said
    adopted = yours.with_kept(here, str(kept_in(folder)), ['form.py'])
    assert adopted['processor'] == f'{folder}/form.py:form' and not capsys.readouterr().err
    (folder / 'form.py').unlink()
    assert yours.with_kept(here, str(kept_in(folder))) == kept and not capsys.readouterr().err


def test_sample_py_uses_what_is_kept(folder):
    flags = [f'--out_dir={folder / "run"}', '--prompt=a', '--max_new_tokens=1', '--device=cpu']
    run('sample.py', *flags).refused('names code', '--allow_code=true')
    run('sample.py', *flags, '--allow_code=true').ok()


def test_two_files_of_one_name(tmp_path):
    files = dict(task='/a/x.py', processor='/b/x.py')
    assert yours.names_of(files) == dict(task='x.py', processor='form_x.py')
    assert yours.names_of(files | dict(task='/b/x.py')) == dict(task='x.py', processor='x.py')
    named = yours.files_in(dict(task='llm', processor=f'{tmp_path}/x.py:form'))
    assert named == dict(processor=f'{tmp_path}/x.py')
    assert yours.files_in(dict(task='llm', processor='a/model.folder')) == {}


def test_what_is_edited_while_a_run_goes_on_is_kept_as_it_was(tmp_path):
    (tmp_path / 'x.py').write_text(FORM)
    made = yours.copies(dict(task='llm', processor=f'{tmp_path}/x.py:form'))
    (tmp_path / 'x.py').write_text('nothing')
    assert open(made['x.py']).read() == FORM


def test_a_task_that_moved_is_the_same_task(folder):
    path = str(kept_in(folder))
    settings = json.loads((kept_in(folder) / 'config.json').read_text())
    line, = past.changes(path, settings | dict(task='/else/task.py'), ())
    assert 'task' in line and '/else/task.py' in line
    with pytest.raises(ValueError, match='a run keeps its model'):
        past.changes(path, settings | dict(task='llm'), ())


# -----------------------------------------------------------------------------------------------
# a form that fails on one sample, or reads what nobody else does


FAILS = '''from processor import LEARNED, READ

def deep(sample):
    return 1 / int(sample['number'])

def form(sample, p):
    if sample.get('number') == 0:
        deep(sample)
    return [(p.tokenizer.bos_id, READ), (sample['caption'], LEARNED)]

def raw(sample, p):
    members = sample['members']
    assert type(members['depth.npy']) is type(members['wav']) is bytes
    return [(p.tokenizer.bos_id, READ), (f"{len(members['wav'])} {sample['data_set']}", LEARNED)]
'''


def batch_of(tmp_path, form, samples):
    (tmp_path / 'fails.py').write_text(FAILS)
    named = [(f'k{i}', members) for i, members in enumerate(samples)]
    made = write_set(tmp_path / 'set', [named])
    folder = Folder(str(made))
    processor = make_processor(200, task='llm', form=f'{tmp_path}/fails.py:{form}')
    order = data.Order([folder.sizes], [1])
    return data.Batches([folder], order, processor)[np.arange(len(samples))]


def test_a_form_that_fails_on_one_sample_is_told_with_its_line(tmp_path):
    rows = [{'caption': 'fine'}, {'other': 'x'}, {'number': 0}, {'caption': ['no', 'text']}]
    batch = batch_of(tmp_path, 'form', [{'json': json.dumps(row).encode()} for row in rows])
    said = {line.partition(', ')[2].partition(':')[0]: line for line in batch['bad']}
    assert said.keys() == {'k1', 'k2', 'k3'}
    assert "00000000.tar, k1: fails.py, line 9, form: 'caption' is missing, it has other" in (
        said['k1'])
    assert 'fails.py, line 4, deep: ZeroDivisionError: division by zero, it' in said['k2']
    assert 'k3: fails.py: ' in said['k3'] and 'it has caption' in said['k3']


def test_a_form_of_yours_gets_raw_members_and_the_data_set(tmp_path):
    batch = batch_of(tmp_path, 'raw', [{'depth.npy': b'\x93NUMPY', 'wav': b'RIFF' * 5}])
    assert not batch['bad']
    text = bytes(batch['tokens'][0][batch['segments'][0] > 0][1:].tolist()
                 if 'segments' in batch else batch['tokens'][0][1:].tolist())
    assert text.startswith(b'20 ') and text.endswith(b'set')


def test_a_fault_of_a_form_of_ours_is_no_bad_sample():
    error = TypeError('a fault')
    assert yours.bad_sample(error, [], dict(task='llm', processor='auto')) is error
