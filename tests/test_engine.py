"""The training engine: ranks, precision, compiling, averages, checkpoints near and far
(tests/tiny.py)."""
import json
import math
import os
import shutil
import signal
import time

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import write_set
from test_remote import proxy, s3  # noqa: F401  (fixtures)
from tiny import Process, losses, names, rows, run, same_weights, wait_until, weights

import checkpoint
import mirror
import past
import remote
from model import Decoder, DecoderConfig, token_losses

# test_remote.py, whose fixtures are used here, looks at pictures
NEEDS = ('pictures.py',)

MIX = ['--mix={"long": 1, "plain": 0.5}', '--val={"long": "long"}', '--augment=false']
COMMON = ['--max_steps=16', '--lr=1e-3', '--num_checkpoints=2', *tiny.DROPOUT]
HALF, LAST = 'step_00000008', 'step_00000016'
MODES = {
    'alone': ([], 0),
    'ddp2': ([], 2),
    'fsdp2': (['--fsdp=0', '--micro_batch_size=2'], 2),
    'hsdp4': (['--fsdp=2'], 4),
    'fsdp4': (['--fsdp=0'], 4)}


def train(out, *extra, **kwargs):
    return run('train.py', *tiny.FLAGS, f'--data_dir={tiny.data_dir()}', *MIX, f'--out_dir={out}',
               *extra, **kwargs)


def ema(out, name='latest'):
    from safetensors.numpy import load_file
    return load_file(out / 'checkpoints' / name / 'ema' / 'model.safetensors')


def state_of(out, name='latest'):
    """The optimizer's state, whole, whoever wrote it."""
    folder = str(out / 'checkpoints' / name / 'state')
    state = {k: torch.zeros(shape) for k, shape in checkpoint.shapes(folder).items()}
    checkpoint.load(state, folder)
    return {k: v.numpy() for k, v in state.items()}


# -----------------------------------------------------------------------------------------------
# ranks


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """trained(mode): a run of so many ranks, taken once; of None one process. Rows of very unequal
    length, a third of them without a picture."""
    folder = tmp_path_factory.mktemp('trained')

    def run_of(mode):
        extra, ranks = MODES[mode]
        if not (folder / mode).exists():
            train(folder / mode, *COMMON, *extra, torchrun=ranks).ok()
        return folder / mode
    return run_of


def loss_of(out, key='loss'):
    return [row[key] for row in rows(out, key)]


@pytest.mark.parametrize('mode', ['ddp2', 'fsdp2', 'hsdp4', 'fsdp4'])
def test_ranks_agree_with_one_process(trained, mode):
    ours, theirs = trained(mode), trained('alone')
    for key in ('loss', 'val_loss'):
        assert len(loss_of(ours, key)) == len(loss_of(theirs, key)) > 0
        assert loss_of(ours, key) == pytest.approx(loss_of(theirs, key), abs=1e-6)
    assert loss_of(ours, 'tokens') == loss_of(theirs, 'tokens')

    # Adam makes much of a gradient that is nothing but rounding, as that of the keys' bias
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    for k in ours:
        assert 'k.bias' in k or np.mean(np.abs(ours[k] - theirs[k]) < 1e-4) > 0.95, k


@pytest.mark.parametrize('begin, go_on', [
    ('fsdp2', 'alone'), ('fsdp2', 'fsdp4'), ('ddp2', 'fsdp2'), ('fsdp2', 'ddp2'),
    ('alone', 'hsdp4')])
def test_a_checkpoint_is_loaded_by_any_number_of_ranks(trained, tmp_path, begin, go_on):
    out, alone = tmp_path / 'run', trained('alone')
    shutil.copytree(trained(begin), out, symlinks=True)
    shutil.rmtree(out / 'checkpoints' / LAST)
    before = state_of(alone, HALF)
    for key, value in state_of(out, HALF).items():
        assert np.allclose(value, before[key], atol=1e-3), key

    extra, ranks = MODES[go_on]
    result = train(out, *COMMON, *extra, torchrun=ranks).ok()
    assert 'resumed from' in result.out and HALF in result.out
    assert loss_of(out) == pytest.approx(loss_of(alone), abs=1e-6)
    assert state_of(out).keys() == before.keys()


def test_the_same_ranks_give_the_same_bits(tmp_path):
    for name in 'ab':
        train(tmp_path / name, '--fsdp=0', '--max_steps=4', '--decoder.dropout=0.1',
              '--deterministic=true', torchrun=2).ok()
    assert losses(tmp_path / 'a') == losses(tmp_path / 'b')
    same_weights(weights(tmp_path / 'a'), weights(tmp_path / 'b'))


def test_one_process_shares_with_nobody(tmp_path):
    for name, extra in (('plain', []), ('shared', ['--fsdp=0'])):
        train(tmp_path / name, '--max_steps=3', *extra).ok()
    assert losses(tmp_path / 'plain') == losses(tmp_path / 'shared')


def test_ranks_differ_in_noise(tmp_path):
    """Two ranks read the same sample: with one noise for both, their loss would be that of one
    rank alone."""
    folder = write_set(tmp_path / 'set', [[('only', {'txt': b'the same text for both'})]])
    for name, ranks, size, dropout in (('alone', 0, 1, 0.5),
                                       ('both', 2, 2, 0.5), ('still', 0, 1, 0.0), (
                                           'still both', 2, 2, 0.0)):
        run('train.py', *tiny.LLM_FLAGS, f'--mix={{"{folder}": 1}}', '--max_steps=1',
            f'--batch_size={size}', f'--decoder.dropout={dropout}', f'--out_dir={tmp_path / name}',
            torchrun=ranks).ok()
    alone, both, still, still_both = (rows(tmp_path / name)[0]['loss'] for name in (
        'alone', 'both', 'still', 'still both'))
    assert still == pytest.approx(still_both, abs=1e-6) and abs(both - alone) > 1e-3


def test_one_rank_killed_alone_and_torchrun_begins_again(tmp_path):
    """torchrun --max_restarts: the other rank is stopped, both begin again from the newest
    checkpoint by themselves."""
    out, common = tmp_path / 'run', ['--max_steps=40', '--lr=1e-3', '--num_checkpoints=10']
    train(tmp_path / 'alone', *common).ok()
    flags = [*tiny.FLAGS, f'--data_dir={tiny.data_dir()}', *MIX, f'--out_dir={out}', *common,
             '--fsdp=0']
    process = Process(
        'train.py', flags, real=True, torchrun=[2, '--max_restarts=2', '--monitor_interval=0.1'])
    assert wait_until(lambda: len(rows(out)) > 5, process), process.wait().err
    workers = [int(pid) for pid in os.listdir('/proc') if pid.isdigit()
               and str(out) in cmdline(pid) and 'torch.distributed.run' not in cmdline(pid)]
    os.kill(max(workers), signal.SIGKILL)
    result = process.wait()
    assert result.code == 0 and 'resumed from' in result.out, result.err
    assert loss_of(out) == pytest.approx(loss_of(tmp_path / 'alone'), abs=1e-6)
    assert len(names(out)) == 10


def cmdline(pid):
    try:
        with open(f'/proc/{pid}/cmdline') as f:
            return f.read()
    except OSError:
        return ''


def test_refused_by_name(tmp_path):
    for extra, words, ranks in (
        (['--fsdp=3'], ['fsdp=3', '2 ranks'], 2), (['--loss_weights={"x": 1}'], ["'x'"], 0),
        (['--ema=1.0'], ['ema=1.0'], 0), (['--schedule=step'], ['schedule', 'wsd'], 0),
        (['--decay=0.0'], ['decay'], 0), (['--optimizer=sgd'], ['optimizer', 'muon'], 0),
        (['--matmul=low'], ['matmul', 'highest'], 0)):
        result = train(tmp_path / 'run', '--max_steps=2', *extra, torchrun=ranks)
        own = [line for line in result.lines if line.startswith('train.py: ')]
        assert len(own) == 1 and all(word in own[0] for word in words), result.err


# -----------------------------------------------------------------------------------------------
# precision, memory, schedules, losses


SMALL_STEPS = ['--max_steps=30', '--lr=1e-5', '--warmup=0', '--schedule=constant',
               '--weight_decay=0.0', '--num_checkpoints=2', '--val={}']


@pytest.fixture(scope='module')
def high(tmp_path_factory):
    out = tmp_path_factory.mktemp('high') / 'run'
    train(out, *SMALL_STEPS).ok()
    return out


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_small_updates_are_not_lost(high, tmp_path, dtype):
    """At lr 1e-5 an update is far below the spacing of 16-bit weights: they move as those of fp32
    do."""
    train(tmp_path / 'run', f'--dtype={dtype}', *SMALL_STEPS).ok()
    start = weights(high, 'step_00000015')
    for name in ('decoder.blocks.0.gate.weight', 'connector.weight', 'vit.blocks.0.fc1.weight'):
        ours, theirs = (weights(out)[name] - start[name] for out in (tmp_path / 'run', high))
        assert np.median(np.abs(theirs)) > 5e-5 and (ours != 0).mean() > 0.99
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.98
        spacing = np.abs(start[name]).max() * 2 ** -8
        assert np.abs(theirs).max() < spacing or 'connector' in name


def test_float16_finds_its_scale_and_keeps_it_over_a_resume(tmp_path):
    flags = ['--dtype=float16', '--max_steps=12', '--num_checkpoints=2', '--batch_size=4',
             '--decoder.dropout=0.1']
    train(tmp_path / 'run', *flags).ok()
    scales = [row['loss_scale'] for row in rows(tmp_path / 'run')]
    assert scales[0] <= 2 ** 16 and all(b in (a, a / 2) for a, b in zip(scales, scales[1:]))
    saved = json.loads((tmp_path / 'run/checkpoints/step_00000006/progress.json').read_text())
    assert saved['loss_scale'] == scales[5]
    shutil.copytree(tmp_path / 'run', tmp_path / 'again', symlinks=True)
    shutil.rmtree(tmp_path / 'again/checkpoints/step_00000012')
    train(tmp_path / 'again', *flags).ok()
    assert losses(tmp_path / 'again') == losses(tmp_path / 'run')
    same_weights(weights(tmp_path / 'again'), weights(tmp_path / 'run'))


def test_recomputing_blocks_changes_no_bit(tmp_path):
    for name, value in (('kept', 'false'), ('again', 'true')):
        train(tmp_path / name, '--max_steps=4', '--decoder.dropout=0.1', '--vit.dropout=0.1',
              f'--vit.remat={value}', f'--decoder.remat={value}').ok()
    assert losses(tmp_path / 'kept') == losses(tmp_path / 'again')
    same_weights(weights(tmp_path / 'kept'), weights(tmp_path / 'again'))


PACKED = ['--max_steps=6', '--pack=true', '--micro_batch_size=3', '--seq_len=64', '--val={}',
          *tiny.DROPOUT]


@pytest.mark.parametrize('ranks, extra', [(0, []), (2, ['--fsdp=0'])])
def test_compiled_blocks_with_accumulation_and_packing(tmp_path, ranks, extra):
    """Compiled a bounded number of times, whatever the batches hold; the same losses. The graphs
    are not made into code, which takes most of the time and is the same for any ranks."""
    train(tmp_path / 'eager', *PACKED).ok()
    result = train(tmp_path / 'compiled', *PACKED, *extra, '--compile=true', torchrun=ranks,
                   env={'TORCH_LOGS': 'recompiles', 'COMPILE_BACKEND': 'aot_eager'}).ok()
    assert 0 < result.err.count('Recompiling function') <= 6 * max(ranks, 1), result.err
    assert loss_of(tmp_path / 'compiled') == pytest.approx(loss_of(tmp_path / 'eager'), abs=1e-4)


def test_compiled_as_users_do(tmp_path):
    """The real command, whose graphs become code: those of the decoder's layers alone."""
    flags = [*PACKED, '--vit.depth=0', '--max_steps=3']
    train(tmp_path / 'eager', *flags).ok()
    result = train(tmp_path / 'compiled', *flags, '--compile=true', real=True, timeout=400,
                   env={'TORCH_LOGS': 'output_code', 'TORCHINDUCTOR_COMPILE_THREADS': '1',
                        'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')}).ok()
    assert 'cpp_fused' in result.err, 'no code was made'
    assert loss_of(tmp_path / 'compiled') == pytest.approx(loss_of(tmp_path / 'eager'), abs=1e-4)


@pytest.mark.parametrize('schedule, expected', [
    ('constant', [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ('linear', [0.5, 1] + [1 - i / 8 for i in range(8)]),
    ('wsd', [0.5, 1, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
    ('cosine', [0.5, 1] + [0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(8)])])
def test_schedules(tmp_path, schedule, expected):
    flags = ['--decay=0.4', '--warmup=0.2', '--max_steps=10', '--lr=0.001']
    train(tmp_path / 'run', f'--schedule={schedule}', *flags).ok()
    assert [row['lr'] for row in rows(tmp_path / 'run')] == pytest.approx(
        [1e-3 * x for x in expected], rel=1e-9)


@pytest.mark.parametrize('ranks, extra', [(0, []), (2, ['--fsdp=0'])])
def test_the_average_is_exact_over_a_resume(tmp_path, ranks, extra):
    flags = ['--ema=0.5', '--max_steps=4', '--num_checkpoints=4', *extra]
    train(tmp_path / 'run', *flags, torchrun=ranks).ok()
    average = ema(tmp_path / 'run', 'step_00000001')
    for step in (2, 3, 4):
        new = weights(tmp_path / 'run', f'step_{step:08}')
        average = {k: average[k] + 0.5 * (new[k] - average[k]) for k in new}
        kept = ema(tmp_path / 'run', f'step_{step:08}')
        assert all(np.allclose(average[k], kept[k], atol=1e-6) for k in new)
    assert any(not np.array_equal(average[k], new[k]) for k in new)
    shutil.copytree(tmp_path / 'run', tmp_path / 'again', symlinks=True)
    for step in (3, 4):
        shutil.rmtree(tmp_path / f'again/checkpoints/step_{step:08}')
    train(tmp_path / 'again', *flags, torchrun=ranks).ok()
    same_weights(ema(tmp_path / 'again'), ema(tmp_path / 'run'))
    assert losses(tmp_path / 'again') == losses(tmp_path / 'run')


def test_validating_the_average_leaves_training_as_it_was(tmp_path):
    for name, ranks, extra in (('plain', 0, []), ('often', 0, ['--eval_every=1']), (
            'shared', 2, ['--eval_every=1', '--fsdp=0'])):
        train(tmp_path / name, '--ema=0.8', '--max_steps=6', '--exact_match=false', *extra,
              torchrun=ranks).ok()
    assert [r['loss'] for r in rows(tmp_path / 'often')] == [
        r['loss'] for r in rows(tmp_path / 'plain')]
    for key in ('loss', 'val_loss'):
        ours, theirs = (
            [row[key] for row in rows(tmp_path / name, key)] for name in ('shared', 'often'))
        assert len(ours) == 6 and ours == pytest.approx(theirs, abs=1e-6)


def test_muon_for_matrices(tmp_path):
    flags = ['--optimizer=muon', '--max_steps=4', '--num_checkpoints=2']
    train(tmp_path / 'one', *flags).ok()
    state = state_of(tmp_path / 'one')
    moments = {k.rpartition('.')[0] for k in state if k.endswith('momentum_buffer')}
    assert moments
    assert all('blocks' in k and k.endswith('weight') and 'norm' not in k for k in moments)
    assert 'decoder.embedding.weight.exp_avg' in state
    assert not moments & {k.rpartition('.')[0] for k in state if k.endswith('exp_avg')}
    assert loss_of(tmp_path / 'one')[-1] < loss_of(tmp_path / 'one')[0]

    # on ranks: its matrix products are in bfloat16
    train(tmp_path / 'two', *flags, '--fsdp=0', torchrun=2).ok()
    assert loss_of(tmp_path / 'two') == pytest.approx(loss_of(tmp_path / 'one'), abs=0.02)

    # and over a resume
    shutil.rmtree(tmp_path / 'one/checkpoints/step_00000004')
    before = losses(tmp_path / 'one')
    train(tmp_path / 'one', *flags).ok()
    assert losses(tmp_path / 'one') == before


def test_token_loss_options():
    torch.manual_seed(0)
    m = Decoder(
        DecoderConfig(vocab_size=64, width=16, depth=1, mlp_dim=32, num_heads=2, head_dim=8))
    tokens = torch.randint(0, 64, (3, 9))
    targets = torch.where(torch.rand(3, 9) < 0.3, -100, torch.randint(0, 64, (3, 9)))
    logits = m.logits(tokens)[targets != -100]
    wanted = targets[targets != -100]
    each = F.cross_entropy(logits, wanted, reduction='none', label_smoothing=0.1)
    each += 0.01 * logits.logsumexp(-1) ** 2
    options = dict(label_smoothing=0.1, z_loss=0.01)
    learned = m(tokens, targets, **options)['text']
    torch.testing.assert_close(learned.losses, each)
    assert learned.counts.tolist() == [1] * len(wanted)
    torch.testing.assert_close(targets.flatten()[learned.places], wanted)
    x = m.features(m.embed(tokens))
    torch.testing.assert_close(token_losses(m, x, targets, **options, chunk=4).losses, each)
    torch.testing.assert_close(m.loss(tokens, targets)[0],
                               F.cross_entropy(logits, wanted, reduction='sum'))


def test_loss_weights(tmp_path):
    common = ['--mix={"plain": 1, "words": 1}', '--max_steps=4', '--val={}', '--lr=0.0']
    train(tmp_path / 'equal', *common).ok()
    train(tmp_path / 'weighed', *common, '--loss_weights={"words": 0.0}').ok()
    train(tmp_path / 'double', *common, '--loss_weights={"words": 2.0, "plain": 2.0}').ok()
    for equal, weighed, double in zip(
        *(rows(tmp_path / name) for name in ('equal', 'weighed', 'double'))):
        for key in ('loss/plain', 'loss/words'):
            assert equal.get(key) == weighed.get(key) == double.get(key), 'each is logged as it is'
        assert double['loss'] == pytest.approx(2 * equal['loss'])
        assert double['grad_norm'] == pytest.approx(2 * equal['grad_norm'], rel=1e-4)
        assert weighed['loss'] < equal['loss'] or 'loss/words' not in equal


def test_bad_steps_are_skipped_as_often_as_allowed(tmp_path):
    """A learning rate that destroys the weights: every later loss is not finite."""
    flags = ['--lr=1e30', '--warmup=0', '--max_steps=8', '--schedule=constant']
    result = train(tmp_path / 'run', *flags, '--skip_bad_steps=2').failed(
        'step 3', 'nan', '--show_steps=4:5')
    assert [row['step'] for row in rows(tmp_path / 'run')] == [1, 2, 3], 'two were skipped'
    assert result.out.count('The weights stay as they are') == 2
    train(tmp_path / 'run2', *flags).failed('step 1', '--show_steps=2:3')


# -----------------------------------------------------------------------------------------------
# checkpoints


def test_what_a_run_depends_on_is_written_down(trained):
    environment = json.loads((trained('alone') / 'environment.json').read_text())
    assert environment['torch'] == torch.__version__
    assert environment['argv'][0].endswith('train.py')
    assert len(environment['git']) in (0, 40)


def test_the_loop_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What is saved is what was there when `save` was called, though it changes while it is
    written."""
    tensors = {'a': torch.arange(1000.0), 'b': torch.ones(3, 3)}
    saver = checkpoint.Saver(str(tmp_path), after=lambda: None)
    real, begun = checkpoint.save_file, []

    def slow(copies, path):
        begun.append(time.monotonic())
        time.sleep(0.5)
        real(copies, path)
    monkeypatch.setattr(checkpoint, 'save_file', slow)
    (tmp_path / 'file').write_text('x')
    progress = dict(step=1, samples=0, tokens=0, bad_samples=0, world=1)
    began = time.monotonic()
    saver.save(1, tensors, {}, {'s': tensors['a']}, {'progress.json': progress, 'c.json': [1]},
               {'copy': str(tmp_path / 'file')})
    assert time.monotonic() - began < 0.4
    for tensor in tensors.values():
        tensor.fill_(-1)
    assert not checkpoint.names(str(tmp_path / 'checkpoints')), 'not before it is whole'
    saver.wait()
    path, saved = past.newest(str(tmp_path / 'checkpoints'), print)
    assert path.endswith('step_00000001') and saved['step'] == 1 and os.path.exists(f'{path}/copy')
    new = {'a': torch.zeros(1000), 'b': torch.zeros(3, 3)}
    checkpoint.load(new, path)
    assert torch.equal(new['a'], torch.arange(1000.0)) and torch.equal(new['b'], torch.ones(3, 3))
    monkeypatch.setattr(
        checkpoint, 'save_file', lambda *_: (_ for _ in ()).throw(OSError('disk on fire')))
    saver.save(2, tensors, {}, {'s': tensors['a']}, {'progress.json': {}}, {})
    with pytest.raises(OSError, match='on fire'):
        saver.wait()
    assert os.listdir(tmp_path / 'checkpoints')
    assert checkpoint.names(str(tmp_path / 'checkpoints')) == ['step_00000001']
    assert not [n for n in os.listdir(tmp_path / 'checkpoints') if n.startswith('.step')]


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    train(tmp_path / 'file' / 'run', '--max_steps=2').refused('out_dir', 'file')


@pytest.fixture
def far(s3):  # noqa: F811
    """A bucket's URL for a run, and the run's flags."""
    s3.far = s3.url.rpartition('/')[0] + '/runs/a'
    return s3


def far_names(far):
    fs, base = remote.filesystem(far.far)
    return sorted(mirror.remote_names(fs, base))


def test_a_run_is_copied_elsewhere_and_goes_on_from_there(far, tmp_path):
    """Faults on the way; then another machine, with an empty out_dir, goes on from the copy."""
    faults = iter([500, None, 500, 'cut'])
    far.proxy.fault = lambda method, path: next(faults, None) if method in ('PUT',
                                                                            'POST') else None
    flags = ['--max_steps=12', '--num_checkpoints=3', f'--remote={far.far}']
    train(tmp_path / 'run', *flags, env=far.env).ok()
    assert far_names(far) == names(tmp_path / 'run') == [
        'step_00000004', 'step_00000008', 'step_00000012']
    fs, base = remote.filesystem(far.far)
    for path in (tmp_path / 'run').rglob('*'):
        is_copied = path.name not in ('environment.json', 'lock') and 'latest' not in str(path)
        if path.is_file() and is_copied:
            assert fs.cat_file(
                f'{base}/{path.relative_to(tmp_path / "run")}') == path.read_bytes(), path
    # as if it was killed on the way; and the one before is damaged
    fs.rm(f'{base}/checkpoints/step_00000012/progress.json')
    damaged = f'{base}/checkpoints/step_00000008/model.safetensors'
    fs.pipe_file(damaged, fs.cat_file(damaged)[:-1] + b'?')
    result = train(tmp_path / 'other', *flags, env=far.env).ok()
    assert 'step_00000008 is damaged and is skipped: model.safetensors' in result.out
    assert 'resumed from' in result.out and 'step_00000004' in result.out
    assert losses(tmp_path / 'other') == losses(tmp_path / 'run')
    assert far_names(far) == names(tmp_path / 'run')
    kept = tmp_path / 'run/checkpoints/step_00000008/model.safetensors'
    assert fs.cat_file(damaged) == kept.read_bytes(), 'it is copied again'
    flags = [
        '--max_steps=1', '--lr=0.0', f'--init_from={far.far}', f'--cache_dir={tmp_path / "c"}']
    result = train(tmp_path / 'new', *flags, env=far.env).ok()
    assert 'init_from' in result.out
    same_weights(weights(tmp_path / 'new'), weights(tmp_path / 'run'))


def test_a_copy_that_would_leave_its_folder_is_refused(tmp_path):
    far = tmp_path / 'far' / 'checkpoints' / 'step_00000001'
    far.mkdir(parents=True)
    for file in ('../../../stolen', '/tmp/stolen'):
        (far / 'progress.json').write_text(json.dumps({'step': 1, 'files': {file: [0, 0]}}))
        with pytest.raises(OSError, match='leave the folder'):
            mirror.download(f'file://{tmp_path}/far', str(tmp_path / 'here'))
    (far / 'progress.json').write_text('{"step": 1}')
    train(tmp_path / 'run', '--max_steps=1',
          f'--init_from=file://{tmp_path}/far', f'--cache_dir={tmp_path}/c').refused(
              'init_from', 'progress.json')
    train(tmp_path / 'run', '--max_steps=1', f'--remote=file://{tmp_path}/far').refused(
        'progress.json')


def test_a_fault_of_ours_while_a_checkpoint_is_written_is_heard(tmp_path, monkeypatch):
    saver = checkpoint.Saver(str(tmp_path))
    monkeypatch.setattr(
        checkpoint, 'files_of', lambda *_: (_ for _ in ()).throw(TypeError('ours')))
    monkeypatch.setattr(checkpoint, 'save_file', lambda *_: None)
    saver.save(1, {'a': torch.ones(1)}, {}, {'s': torch.ones(1)}, {'progress.json': {}}, {})
    with pytest.raises(TypeError, match='ours'):
        saver.wait()


def test_a_place_elsewhere_that_is_lost_is_told_and_costs_nothing(far, tmp_path):
    far.proxy.fault = lambda method, path: 500 if method in ('PUT', 'POST') else None
    flags = ['--max_steps=4', '--num_checkpoints=4', '--keep_last=1', f'--remote={far.far}']
    process = Process('train.py', [*tiny.FLAGS, f'--data_dir={tiny.data_dir()}', *MIX, *flags,
                                   f'--out_dir={tmp_path / "run"}'], env=far.env)
    # a signal ends the wait for it
    assert wait_until(lambda: 'waiting until' in process.result(0).out, process)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(10).failed('remote=', far.far, 'ended by a signal', 'step_00000001', 'whole')
    every = [f'step_{step:08}' for step in (1, 2, 3, 4)]
    assert names(tmp_path / 'run') == every and far_names(far) == [], 'keep_last takes none'

    # what is missing there is copied by the same command, which has nothing left to train
    far.proxy.fault = lambda method, path: None
    train(tmp_path / 'run', *flags, env=far.env).ok()
    assert far_names(far) == every and names(tmp_path / 'run') == every[-1:]
    train(tmp_path / 'x', '--max_steps=2', '--remote=nothing://here', env=far.env).refused(
        'remote', 'nothing')
