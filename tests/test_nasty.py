"""No traceback for what a user can do: nasty values of every setting of every task and command end
in a run that trains, or in one line with key, value and remedy (tests/nasty.py has the values)."""
from collections import Counter

import nasty
import pytest
import tiny
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import usage

NEEDS = ('robots', 'images', 'tasks/llm.py', 'tasks/vlm.py', 'tasks/siglip.py', 'tasks/policy.py',
         'tasks/vla.py', 'tasks/t2i.py')
OTHERS = ('data', 'stats', 'lerobot', 'latents', 'text', 'sample llm', 'sample vlm',
          'sample siglip', 'sample t2i')


def find_fault(name, number):
    """Gives a command so many nasty settings, the same each time; what came of them."""
    figures, slowest, faults = Counter(), (0, ''), []

    @settings(max_examples=number, derandomize=True, deadline=None, database=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test(data):
        nonlocal slowest
        chosen, outcome, fault = nasty.example(
            name, lambda choices: data.draw(st.sampled_from(choices)))
        figures[outcome.code] += 1
        slowest = max(slowest, (round(outcome.seconds, 1), f'{str(chosen):.100}'))
        # all of them, for a sweep takes minutes
        if fault:
            faults.append(f'{str(chosen):.200}: {fault:.400}')

    test()
    print(f'\n{name}: {figures[0]} did it, {figures[2]} were refused (exit code 2), {figures[1]} '
          f'failed in a line (1); the slowest: {slowest[0]} s with {slowest[1]}')
    assert not faults, '\n'.join(faults)
    return figures


@pytest.mark.parametrize('name', nasty.TASKS)
def test_a_run_that_trains_or_one_line(name):
    assert find_fault(name, 6)[2] > 0


@pytest.mark.parametrize('name', ['stats', 'data', 'sample llm'])
def test_another_command(name):
    find_fault(name, 4)


@pytest.mark.long
@pytest.mark.parametrize('name', [*nasty.TASKS, *OTHERS])
def test_a_thousand_settings(name):
    find_fault(name, 1000 if name in nasty.TASKS else 200)


# -----------------------------------------------------------------------------------------------
# one of each kind


KINDS = {
    'llm': [('decoder.width', 0), ('decoder.num_heads', 0), ('seq_len', 0), ('seq_len', -5),
            ('decoder.depth', -5), ('decoder.dropout', -1.0), ('decoder.mlp_dim', 2 ** 31),
            ('seed', 2 ** 64), ('max_steps', 2 ** 63), ('epochs', 1e308), ('workers', 100_000),
            ('decoder.rope_scaling', [None]),
            ('decoder.query_pre_attn_scalar', -1.0), ('weight_decay', float('inf')),
            ('out_dir', 'a\0b'), ('mix', {'file.bin': 1}), ('tokenizer', 'file.bin/x'),
            ('device', 'cuda')],
    'policy': [('policy.prediction', ' '), ('normalize', '['), ('proprio_dim', 2 ** 31),
               ('policy.depth', 100_000), ('action_dim', 2)],
    't2i': [('dit.channels', 1), ('vae.latent_channels', 0), ('unet.block_out_channels', ['a']),
            ('unet.beta_start', -1.0), ('dit.schedule_steps', 0)]}


@pytest.mark.parametrize('task', KINDS)
def test_each_kind_is_refused_by_key_and_value(task):
    script, bases, _ = nasty.commands(task)
    for key, value in KINDS[task]:
        base = bases[-1] if key.startswith(('unet', 'vae')) else bases[0]
        outcome, fault = nasty.tried(script, base, {key: value}, False)
        assert outcome.code == 2 and not fault, (key, value, outcome, fault)
        assert key.rpartition('.')[2] in outcome.err, (key, outcome.err)


def test_betas_without_a_point():
    script, bases, _ = nasty.commands('llm')
    outcome, fault = nasty.tried(script, bases[0], dict(betas=[0, 0]), True)
    assert outcome.code == 0 and not fault, outcome


def test_a_reader_that_was_killed_is_told_in_a_line(capsys):
    error = RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.')
    usage.tell_end(RuntimeError, error, None)
    said = capsys.readouterr().err.split()
    assert 'Traceback' not in said and {'killed,', 'workers;'} <= set(said)


def test_what_wandb_refuses(tmp_path):
    """No key, and nobody to ask for one."""
    script, bases, _ = nasty.commands('llm')
    tiny.run(script, *bases[0], '--wandb_project=a', cwd=tmp_path, env=dict(
        WANDB_MODE='online', WANDB_API_KEY='', WANDB_BASE_URL='http://127.0.0.1:9',
        HOME=str(tmp_path))).refused("wandb_project='a'", 'WANDB_MODE=offline')


def test_numbers_that_float32_has_not_and_a_full_memory():
    script, bases, _ = nasty.commands('llm')
    for key, value in ('decoder.norm_offset', 1e308), ('seq_len', 1 << 19):
        outcome, fault = nasty.tried(script, bases[0], {key: value}, True)
        assert outcome.code == 1 and not fault, (key, outcome, fault)
