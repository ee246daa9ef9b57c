"""What is set and not used is refused, or said where a config may serve several branches."""
import io
import sys
from types import SimpleNamespace

import pytest
import tiny

import data
import initial
import tasks
from answering import check_sampling
from configurator import configure

NEEDS = 'tasks/vlm.py', 'tasks/policy.py', 'tasks/vla.py', 'tasks/t2i.py'
ACTIONS = dict(action_steps=4, action_dim=2)


def check(task, **said):
    """What a task says of its settings, as a run has them."""
    loop = dict(task=task, seq_len=77, tokenizer='bytes', processor='auto', mix={'a': 1.0}, val={})
    said = {key.replace('__', '.'): value for key, value in said.items()}
    return tasks.load(task).check(tasks.defaults(task) | loop | said, 1)


@pytest.mark.parametrize('task, said, words', [
    ('policy', dict(policy__objective='ddpm', policy__shift=3.0), ['policy.shift=3.0', 'ddpm']),
    ('policy', dict(policy__prediction='epsilon'), ["policy.prediction='epsilon'", 'flow']),
    ('t2i', dict(dit__schedule_steps=50), ['dit.schedule_steps=50', 'flow']),
    ('t2i', dict(dit__objective='ddpm', dit__time='beta'), ["dit.time='beta'", 'ddpm']),
    ('vla', dict(action_weight=0.0), ['action_weight=0.0', 'task=vlm'])])
def test_settings_of_a_branch_that_is_not_taken_are_refused(task, said, words):
    actions = ACTIONS if task in ('policy', 'vla') else {}
    assert not check(task, **actions)
    with pytest.raises(ValueError) as error:
        check(task, **actions, **said)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize('task, said, keys', [
    ('policy', dict(decoder__width=32, augment=True, policy__pool=2),
     ['decoder.width', 'augment', 'policy.pool']),
    ('policy', dict(decoder__width=32, policy__encoder='text', vit__depth=1), ['vit.depth']),
    ('policy', dict(policy__denoiser='unet', policy__depth=1), ['policy.depth']),
    ('t2i', dict(unet__layers_per_block=1, vae__latent_channels=8),
     ['unet.layers_per_block', 'vae.latent_channels']),
    ('t2i', dict(denoiser='unet', dit__width=32, dit__drop=0.2), ['dit.width'])])
def test_parts_that_a_branch_has_not_are_said(task, said, keys):
    actions = ACTIONS if task == 'policy' else {}
    lines = check(task, **actions, **said)
    assert all(line.startswith('not used, for ') for line in lines)
    named = [each.split('=')[0] for line in lines for each in line.split(': ')[1].split(', ')]
    assert sorted(named) == sorted(keys)


def options(task, **said):
    """What sample.py would hand to a task."""
    loop = dict(out_dir='out', batch_size=4, seed=0, json=False, data_dir='')
    return SimpleNamespace(**tasks.body_of(tasks.load(task).SampleSettings) | loop | said)


@pytest.mark.parametrize('task, said, words', [
    ('t2i', dict(eval='mix', image='a.png'), ["image='a.png'", '--eval=mix']),
    ('t2i', dict(eval='mix', n=4), ['n=4']), ('t2i', dict(judge='run'), ["judge='run'", '--eval']),
    ('t2i', dict(strength=0.9), ['strength=0.9', '--image']),
    ('vlm', dict(eval='mix', image='a.png'), ["image='a.png'", '--eval=mix']),
    ('vlm', dict(image='a.png', grid='b.png'), ["grid='b.png'", '--eval']),
    ('policy', dict(serve_policy=8000, episodes=3), ['episodes=3', '--serve_policy=8000']),
    ('vla', dict(env='metaworld', serve_host='0.0.0.0'), ["serve_host='0.0.0.0'", 'no server']),
    ('llm', dict(top_k=3), ['top_k=3', 'temperature=0']),
    ('llm', dict(top_p=0.5), ['top_p=0.5', 'temperature=0']),
    ('llm', dict(temperature=1e-30), ['temperature=1e-30', '0.001']),
    ('llm', dict(temperature=-1.0), ['temperature=-1.0', 'at least 0'])])
def test_sample_py_refuses_what_it_would_not_use(task, said, words):
    with pytest.raises(ValueError) as error:
        tasks.load(task).sample(SimpleNamespace(settings=dict(task=task)), options(task, **said))
    assert all(word in str(error.value) for word in words)


def test_a_seed_without_chance_is_said(capsys):
    check_sampling(options('llm', seed=3, temperature=1.0, top_k=2))
    assert capsys.readouterr().err == ''
    check_sampling(options('llm', seed=3))
    assert capsys.readouterr().err == 'not used, for temperature=0: seed=3\n'


def test_a_data_set_is_named_once(tmp_path):
    known = dict(data_dir=str(tiny.data_dir()), cache_dir=str(tmp_path), cache_gb=1.0, lanes=8,
                 batch_size=4, seed=0, window=4, whole=100)
    data.open_mix(known | dict(mix={'plain': 1, 'plain/00000001.tar': 1}))
    for other in ('plain/', str(tiny.data_dir() / 'plain'), 'plain/manifest.jsonl'):
        with pytest.raises(ValueError, match=f"'plain' and '{other}' are one data set"):
            data.open_mix(known | dict(mix={'plain': 1, other: 1}))


def test_init_skip_must_match_something(tmp_path):
    import torch
    from safetensors.torch import save_file
    model = torch.nn.Linear(2, 2)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text('{"task": "llm"}')
    assert '1 tensors' in initial.begin(model, str(tmp_path), ['bias'], '')
    with pytest.raises(ValueError, match="init_skip: 'head' is found in no name"):
        initial.begin(model, str(tmp_path), ['head'], '')


def test_a_setting_that_no_tokenizer_can_read_is_refused(monkeypatch):
    """Bytes of a command line that are no UTF-8, and half of a surrogate pair in a file."""
    for value in ('a\udcff', '\ud800'):
        # as a real one is opened
        err = io.TextIOWrapper(io.BytesIO(), 'utf-8', errors='backslashreplace')
        monkeypatch.setattr(sys, 'stderr', err)
        with pytest.raises(SystemExit):
            configure(dict(prompt=''), [f'--prompt={value}'])
        err.seek(0)
        said = err.read()
        assert 'surrogate pair' in said and '--prompt=' in said and said.count('\n') == 1
    assert configure(dict(prompt=''), ['--prompt=\U0001f600'])['prompt'] == '\U0001f600'
