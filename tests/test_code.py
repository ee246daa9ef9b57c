"""Code comes from the command line or the user's own config file: what a saved run names, which
may have been downloaded, runs only where the command line says so; nothing of others ever does."""
import ast
import json
import shutil
import sys

import pytest
import tiny
import torch
from safetensors.torch import save_file

import checkpoint
import hub
import initial
import past
from configurator import configure
from usage import code_in

BOMB = '''from pathlib import Path
Path(__file__).with_suffix('.ran').touch()
from tasks.llm import *     # noqa: F403
'''


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of a language model."""
    out_dir = tmp_path_factory.mktemp('trained') / 'run'
    tiny.run('train.py', *tiny.LLM_FLAGS, '--mix={"words": 1}', f'--data_dir={tiny.data_dir()}',
             '--max_steps=1', f'--out_dir={out_dir}').ok()
    return out_dir


@pytest.fixture(params=['processor', 'task'])
def strange(request, trained, tmp_path):
    """A run as a stranger may have made it: its config.json names code that lies in it."""
    run = tmp_path / 'run'
    shutil.copytree(trained, run, symlinks=True)
    (run / 'bomb.py').write_text(BOMB)
    value = f'{run}/bomb.py'
    if request.param == 'processor':
        value += ':form'
    for folder in (run, run / 'checkpoints' / 'latest'):
        settings = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps(settings | {request.param: value}))

    # a stranger knows of checksums
    progress = json.loads((folder / 'progress.json').read_text())
    progress['files'] = checkpoint.files_of(folder, ('progress.json',))
    (folder / 'progress.json').write_text(json.dumps(progress))
    return run


def has_run(strange):
    return (strange / 'bomb.ran').exists()


def test_a_saved_run_does_not_name_code(strange, tmp_path, monkeypatch):
    words = 'bomb.py', 'names code', '--allow_code=true'
    for use in (hub.open_run, hub.from_pretrained, lambda run: hub.export_run(run, tmp_path / 'x'),
                lambda run: hub.push(run, 'me/it')):
        with pytest.raises(ValueError, match='names code.*bomb.*--allow_code=true'):
            use(str(strange))
    tiny.run('sample.py', f'--out_dir={strange}', '--device=cpu').refused(*words)
    for script in ('train.py', 'data.py'):
        tiny.run(script, strange / 'config.json', f'--out_dir={tmp_path}/x').refused(*words)

    # weights and a past are taken from it, and nothing else is
    path = strange / 'checkpoints' / 'latest'
    settings = json.loads((path / 'config.json').read_text())
    assert past.changes(str(path), settings, ()) == []
    monkeypatch.setattr(sys, 'argv', ['x', '--allow_code=true'])
    model = hub.open_run(str(strange)).model
    assert has_run(strange), 'where it is allowed'
    (strange / 'bomb.ran').unlink()
    monkeypatch.setattr(sys, 'argv', ['x'])
    initial.begin(model, str(strange), (), tmp_path)
    assert not has_run(strange)


def test_the_command_line_lets_it_run(strange, tmp_path):
    used = tiny.run('sample.py', f'--out_dir={strange}', '--device=cpu', '--prompt=a',
                    '--max_new_tokens=1', '--allow_code=true').ok()
    assert used.out.startswith('a') and (strange / 'bomb.ran').exists()
    tiny.run('train.py', strange / 'config.json', f'--out_dir={tmp_path}/x',
             '--allow_code=true').ok()

    # the new run has its code from that command
    again = tiny.run('train.py', strange / 'config.json', f'--out_dir={tmp_path}/x',
                     '--max_steps=2', '--allow_code=true').ok()
    assert 'resumed' in again.out


def test_who_says_so(tmp_path, capsys):
    """Neither a file nor a setting allows it; what a user writes need not be allowed."""
    (tmp_path / 'run.json').write_text('{"processor": "a\\u002epy:form", "allow_code": true}')
    (tmp_path / 'mine.py').write_text("processor = 'a.py:form'")
    for argv in (['--processor=a.py:form'], [str(tmp_path / 'mine.py')]):
        assert configure({'processor': ''}, argv)['processor'] == 'a.py:form'
    with pytest.raises(SystemExit):
        configure({'processor': ''}, [str(tmp_path / 'run.json')])
    assert 'names code' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        configure({'processor': ''}, [str(tmp_path / 'run.json'), '--allow_code=true'])
    assert 'unknown setting allow_code' in capsys.readouterr().err


def test_what_names_code():
    named = {'task': 'a/b.py', 'mix': {'x': {'processor': 'f.py:g', 'weight': 1}, 'a.py': 2.0},
             'processor': 'some/model.python', 'out_dir': 'x.py'}
    assert code_in(named) == ["task='a/b.py'", "processor='f.py:g'"]


# -----------------------------------------------------------------------------------------------
# models of others


OPENS = {'from_pretrained', 'from_config'}


def auto_calls(path):
    """Lines of a file where a class of transformers that others choose is opened, and whether
    their code is refused there."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or getattr(node.func, 'attr', '') not in OPENS:
            continue
        owner = ast.unparse(node.func.value)
        if 'auto' not in owner.lower():
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        # `options` of the function says it
        is_refused = given.get('trust_remote_code') == 'False' or given.get(None) == 'options'
        yield f'{path.name}:{node.lineno}', is_refused


def test_code_of_others_is_refused_wherever_transformers_could_run_it():
    found = {}
    for path in [*tiny.ROOT.glob('*.py'), *tiny.ROOT.glob('*/*.py')]:
        if path.parent.name != 'tests':
            found |= dict(auto_calls(path))
    assert len(found) >= 4 and all(found.values()), found
    text = (tiny.ROOT / 'families' / 'towers.py').read_text()
    assert "sdpa', trust_remote_code=False)" in text, 'of the options'


def test_a_tower_that_brings_code(tmp_path):
    """The folder of a model whose config.json names a Python file of its own."""
    pytest.importorskip('transformers')
    from families import towers
    config = {'model_type': 'own', 'auto_map': {'AutoConfig': 'bomb.Config',
                                                'AutoModelForCausalLM': 'bomb.Model'}}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'bomb.py').write_text(BOMB)
    save_file({'weight': torch.zeros(2)}, tmp_path / 'model.safetensors')
    for has_weights in (True, False):
        with pytest.raises(ValueError, match='can not be opened'):
            towers.open_theirs(str(tmp_path), 'AutoModelForCausalLM', has_weights)
    assert towers.is_causal(str(tmp_path)), 'what is wrong is said elsewhere'
    assert not list(tmp_path.rglob('*.ran'))
