"""LoRA: factors beside frozen matrices (lora.py), in the real commands and against peft."""
import os
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import losses, rows, run, same_weights, weights

os.environ['HF_HUB_OFFLINE'] = '1'
peft = pytest.importorskip('peft')
from transformers import AutoModelForCausalLM  # noqa: E402

import hub  # noqa: E402

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


def test_dropout_reaches_the_factors(base, adapted, tmp_path):
    adapt(base, tmp_path / 'run', '--lora_dropout=0').ok()
    with_it, without = rows(adapted), rows(tmp_path / 'run')
    # at first the factors add nothing, and nothing of it can be dropped
    assert without[0]['loss'] == with_it[0]['loss'] and without[-1]['loss'] != with_it[-1]['loss']


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


# -----------------------------------------------------------------------------------------------
# peft, both ways


@pytest.fixture(scope='module')
def llama(base):
    """A model of transformers with the shape of the others here."""
    folder = str(base.parent / 'llama')
    hub.export_run(str(base), folder)
    return folder


def logits_of(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


def test_our_adapter_in_peft(llama, tmp_path):
    adapt(llama, tmp_path / 'run', '--lr=0.05').ok()
    tiny.run('hub.py', 'adapter', tmp_path / 'run', tmp_path / 'folder').ok()
    theirs = AutoModelForCausalLM.from_pretrained(llama)
    tokens = torch.randint(0, 256, (2, 20))
    before = logits_of(theirs, tokens)
    beside = peft.PeftModel.from_pretrained(theirs, str(tmp_path / 'folder'))
    ours = hub.open_run(str(tmp_path / 'run')).model.logits(tokens)
    assert (ours - before).abs().max() > 0.01
    assert (ours - logits_of(beside, tokens)).abs().max() < 1e-5
    # base and factors as one, here
    again = hub.from_pretrained(str(tmp_path / 'folder')).logits(tokens)
    assert (again - ours).abs().max() < 1e-5


def test_their_adapter_here(llama, tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=['q_proj', 'down_proj'], rank_pattern={'down_proj': 3},
        task_type='CAUSAL_LM')
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    for name, factor in theirs.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(factor, std=0.1)
    folder = str(tmp_path / 'folder')
    theirs.save_pretrained(folder)
    tokens = torch.randint(0, 256, (2, 20))
    expected = logits_of(theirs, tokens)
    assert (hub.from_pretrained(folder).logits(tokens) - expected).abs().max() < 1e-5

    # and trained on: a first step at lr=0 changes nothing
    flags = [f'--init_from={folder}', '--lora=[["q.weight", 4], ["down", 3]]', '--max_steps=1']
    said = train(tmp_path / 'run', *flags, '--lora_alpha=6', '--lr=0.0').ok().out
    assert f'which begin as those of {folder}' in said
    opened = hub.open_run(str(tmp_path / 'run')).model
    assert (opened.logits(tokens) - expected).abs().max() < 1e-5
    train(tmp_path / 'no', *flags, '--lora_alpha=7').refused('lora_alpha=7', '6')
    train(tmp_path / 'no', *flags, '--lora=[["q.weight", 4]]').refused('down.lora_A', 'not there')


# -----------------------------------------------------------------------------------------------
# what can not be


@pytest.mark.parametrize('flags, words', [
    (['--lora=[["nothing", 4]]'], ["'nothing'", 'no matrix']),
    (['--lora=[["embedding", 4]]'], ["'embedding'", 'no matrix']),
    (['--lora=[["down", 0]]'], ['rank 0', 'at least 1']),
    (['--lora=[["down", 33]]'], ['rank 33', '(32, 64)']),
    (['--lora=[["(", 3]]'], ['(', 'regular expression']),
    (['--lora_alpha=0'], ['lora_alpha=0', 'above 0']),
    (['--lora_dropout=1'], ['lora_dropout=1', 'below 1']),
    (['--init_from='], ['init_from is empty']),
    (['--groups=[["norm", {"lr_scale": 2}], [".*", {}]]'], ["'norm'", 'frozen']),
    (['--decoder.depth=3', r'--init_skip=["blocks\\.2\\."]'], ['begin anew', 'freeze'])])
def test_refusal(base, tmp_path, flags, words):
    adapt(base, tmp_path / 'run', *flags).refused(*words)


def test_another_base_is_refused(base, adapted, tmp_path):
    train(tmp_path / 'other', '--max_steps=1').ok()
    adapt(tmp_path / 'other', adapted, '--max_steps=9').refused('checksum', str(base))
    train(tmp_path / 'run', '--max_steps=1', f'--init_from={adapted}').refused(
        'factors of lora alone', 'export')
    adapt(base, adapted, '--max_steps=9', '--lora_alpha=3').refused('lora_alpha=3', '16')
    os.rename(base, tmp_path / 'base')
    try:
        with pytest.raises(ValueError, match='base'):
            hub.open_run(str(adapted))
    finally:
        os.rename(tmp_path / 'base', base)
