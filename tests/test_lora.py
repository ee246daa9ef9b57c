"""LoRA: factors beside frozen matrices (lora.py), in the real commands and against peft."""
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import losses, rows, run, same_weights, weights

import hub

NEEDS = ('families',)
LORA = '[["blocks.*(q|v|up).weight", 4], ["down", 2]]'
MIX = '--mix={"words": 1}'
HALF, LAST = 'step_00000004', 'step_00000008'


def train(out, *extra, **kwargs):
    flags = [*tiny.LLM_FLAGS, f'--data_dir={tiny.data_dir()}', MIX, f'--out_dir={out}', *extra]
    return run('train.py', *flags, **kwargs)


def adapt(base, out, *extra, **kwargs):
    """A run with factors beside the weights of the run `base`."""
    flags = ['--max_steps=8', '--num_checkpoints=2', '--ema=0.5', '--lora_dropout=0.1']
    return train(out, f'--init_from={base}', f'--lora={LORA}', *flags, *extra, **kwargs)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp('lora') / 'base'
    train(out, '--max_steps=2').ok()
    return out


@pytest.fixture(scope='module')
def adapted(base):
    out = base.parent / 'adapted'
    said = adapt(base, out).ok().out
    assert 'factors beside 8 matrices, 0.00 M parameters' in said
    return out


def test_factors_are_trained_and_kept_alone(adapted):
    first, last = (weights(adapted, name) for name in (HALF, LAST))
    assert all(name.endswith(('.lora_A', '.lora_B')) for name in last) and len(last) == 16
    assert last['blocks.1.down.lora_A'].shape == (2, 64)
    assert all((first[name] != last[name]).any() for name in last)
    found = rows(adapted)
    assert found[-1]['loss'] < found[0]['loss']


def test_a_run_goes_on_bit_for_bit(base, adapted, tmp_path):
    out = tmp_path / 'run'
    shutil.copytree(adapted, out)
    shutil.rmtree(out / 'checkpoints' / LAST)
    adapt(base, out).ok()
    same_weights(weights(out, LAST), weights(adapted, LAST))
    assert losses(out) == losses(adapted)


@pytest.mark.parametrize('ranks, extra', [
    (0, ['--micro_batch_size=4', '--compile=true']), (2, []), (2, ['--fsdp=0'])])
def test_ranks_micro_batches_and_compiling_change_nothing(base, adapted, tmp_path, ranks, extra):
    env = {'COMPILE_BACKEND': 'aot_eager'}
    adapt(base, tmp_path / 'run', *extra, torchrun=ranks, env=env).ok()
    for row, expected in zip(rows(tmp_path / 'run'), rows(adapted), strict=True):
        assert row['loss'] == pytest.approx(expected['loss'], abs=2e-5)


def test_a_run_is_opened_and_exported_whole(adapted, base, tmp_path):
    """Base and factors as one matrix; a base that is gone or another one is told."""
    opened, before = (hub.open_run(str(out)).model.state_dict() for out in (adapted, base))
    average = load_file(adapted / 'checkpoints' / LAST / 'ema' / 'model.safetensors')
    for name in before:
        layer = name.removesuffix('.weight')
        expected = before[name]
        if f'{layer}.lora_A' in average:
            rank = len(average[f'{layer}.lora_A'])
            factors = average[f'{layer}.lora_B'] @ average[f'{layer}.lora_A']
            expected = expected + 16 / rank * factors
            assert factors.abs().max() > 1e-5
        assert (opened[name] - expected).abs().max() < 1e-6
    hub.export_run(str(adapted), str(tmp_path / 'folder'))
    exported = hub.from_pretrained(str(tmp_path / 'folder')).state_dict()
    assert all(torch.equal(exported[name], opened[name]) for name in opened)
