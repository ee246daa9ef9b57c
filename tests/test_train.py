"""train.py from end to end: the real command on a tiny model and data set (tests/tiny.py)."""
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import Process, losses, names, rows, run, same_weights, wait_until, weights

import checkpoint
import shards
from answering import prompt_of
from generate import generate

STEPS = 24
# five of 24 steps: 4.8, 9.6, 14.4, 19.2, 24
CHECKPOINTS = [f'step_{step:08}' for step in (5, 10, 14, 19, 24)]


@pytest.fixture(scope='module')
def data():
    return tiny.data_dir()


@pytest.fixture(scope='module')
def flags(data):
    """A run with all that could differ when it is resumed: augmentation, dropout, workers, several
    sets, validation."""
    return [*tiny.FLAGS, f'--data_dir={data}', '--mix={"plain": 1, "dark": 1, "long": 1}',
            '--val={"held": "held"}', '--vit.dropout=0.1', '--decoder.dropout=0.1', '--workers=2',
            f'--max_steps={STEPS}', '--num_checkpoints=5', '--eval_every=8']


@pytest.fixture(scope='module')
def base(flags, tmp_path_factory):
    """The run that nobody disturbs, by the plain command."""
    out = tmp_path_factory.mktemp('base') / 'run'
    run('train.py', *flags, f'--out_dir={out}', real=True).ok()
    return out


@pytest.fixture
def short(data, tmp_path):
    """train(*flags): eight steps on one data set, without validation, into tmp_path/run; its
    Result."""
    def train(*extra, **kwargs):
        return run('train.py', *tiny.FLAGS, f'--data_dir={data}', '--mix={"plain": 1}',
                   '--max_steps=8', f'--out_dir={tmp_path / "run"}', *extra, **kwargs)
    return train


def contents(folder):
    """{path: bytes} of all files, and where links point."""
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes()
            for p in sorted(folder.rglob('*')) if p.is_symlink() or p.is_file()}


def copy(base, out, *without):
    """A copy of a run, less some of its checkpoints."""
    shutil.copytree(base, out, symlinks=True)
    for name in without:
        shutil.rmtree(out / 'checkpoints' / name)
    return out


def assert_same_run(out, base):
    assert losses(out) == losses(base)
    same_weights(weights(out), weights(base))
    assert names(out) == names(base)


def show_steps(out, steps):
    """{step: [(position, data set, epoch, shard, key)]} as data.py prints them."""
    result = run('data.py', out / 'config.json', f'--show_steps={steps}').ok()
    seen = {}
    for line in result.out.splitlines():
        step, position, dataset, epoch, shard, key = line.split('\t')
        seen.setdefault(int(step), []).append((int(position), dataset, int(epoch), shard, key))
    return seen


# -----------------------------------------------------------------------------------------------
# what a run leaves behind


def test_log_rows(base):
    found = rows(base)
    parts = {f'{key}/{name}' for key in ('loss', 'epoch', 'samples', 'tokens')
             for name in ('plain', 'dark', 'long')}
    assert all(set(row) >= tiny.ROW_KEYS and set(row) - tiny.ROW_KEYS <= parts for row in found)
    assert set().union(*found) == tiny.ROW_KEYS | parts
    assert [row['step'] for row in found] == list(range(1, STEPS + 1))
    assert [row['samples'] for row in found] == [12 * row['step'] for row in found]
    # 12 + 12 + 25 samples
    assert all(row['epoch'] == pytest.approx(row['samples'] / 49, abs=1e-4) for row in found)
    assert all(row['bad_samples'] == 0 and row['mem_gb'] > 0.05 for row in found)
    for row in found:
        assert row['samples_per_sec'] == pytest.approx(12 / row['step_time'], rel=0.05)
        assert row['samples_per_sec_per_gpu'] == row['samples_per_sec']
        assert row['tokens_per_sec'] / row['samples_per_sec'] < 60
        assert 0 <= row['data_time'] <= row['step_time']
        # what each data set gave since the run began
        for key in ('samples', 'tokens'):
            assert row[key] == sum(row[f'{key}/{name}'] for name in ('plain', 'dark', 'long'))
        assert abs(row['epoch/long'] * 25 - row['samples/long']) < 0.01
    # what remains is nothing in the end; time in validation and saving is in the row after it
    assert found[-1]['eta'] == 0 < found[0]['eta']
    validated = rows(base, 'val_loss')
    assert all(row['val_time'] > 0 for row in validated)
    loss = [row['loss'] for row in found]
    # 260 bytes and specials, rounded up to 64
    assert loss[0] == pytest.approx(math.log(320), abs=2.0)
    assert np.mean(loss[-4:]) < 0.6 * np.mean(loss[:2])


def test_learning_rate_warms_up_over_a_fraction_and_falls_on_a_cosine(base):
    warm = 5                                                        # 0.2 of 24 steps, rounded
    for row in rows(base):
        k = row['step'] - 1
        expected = 5e-3 * ((k + 1) / warm if k < warm else
                           0.5 * (1 + math.cos(math.pi * (k - warm) / (STEPS - warm))))
        assert row['lr'] == pytest.approx(expected, rel=1e-6)


def test_tokens_are_those_of_the_samples_that_data_py_shows(base):
    """The lengths of the captions differ, so that the count tells the samples; padding is not in
    it."""
    samples = {sample[0]: sample for dataset in tiny.SETS.values() for sample in dataset}
    seen = show_steps(base, f'1:{STEPS + 1}')
    total = 0
    for row in rows(base):
        total += sum(tiny.row_length(samples[key]) for *_, key in seen[row['step']])
        assert row['tokens'] == total, f'step {row["step"]}'
    positions = [position for step in range(1, STEPS + 1) for position, *_ in seen[step]]
    assert positions == list(range(12 * STEPS))
    assert {dataset for step in seen.values() for _, dataset, *_ in step} == {
        'plain', 'dark', 'long'}


def test_checkpoints_are_evenly_spaced_and_whole(base):
    assert names(base) == CHECKPOINTS
    assert os.readlink(base / 'checkpoints' / 'latest') == CHECKPOINTS[-1]
    config = json.loads((base / 'config.json').read_text())
    assert config['vit.width'] == 32
    assert config['max_steps'] == STEPS
    assert config['mix'] == dict(plain=1, dark=1, long=1)
    for name in CHECKPOINTS:
        folder = base / 'checkpoints' / name
        assert {'model.safetensors', 'config.json', 'shards.json', 'state'} <= {
            p.name for p in folder.iterdir()}
        assert json.loads((folder / 'config.json').read_text()) == config
        assert not any(p.suffix in ('.pt', '.pkl', '.metadata') or p.name == '.metadata'
                       for p in folder.rglob('*'))
        assert all(w.dtype == np.float32 for w in weights(base, name).values())
    assert any((weights(base, CHECKPOINTS[0])[k] != w).any() for k, w in weights(base).items())


def test_shards_json_counts_what_was_read(base, data):
    for name, steps in zip(CHECKPOINTS[:2], (5, 10)):
        expected = {}
        for seen in show_steps(base, f'1:{steps + 1}').values():
            for _, dataset, epoch, shard, _ in seen:
                expected.setdefault(dataset, []).append((int(epoch), shard))
        found = json.loads((base / 'checkpoints' / name / 'shards.json').read_text())
        assert found.keys() == expected.keys()
        for dataset, seen in expected.items():
            whole = found[dataset]['whole_epochs']
            assert found[dataset]['samples'] == len(seen)
            assert whole == len(seen) // len(tiny.SETS[dataset])
            late = [shard for epoch, shard in seen if epoch == whole]
            assert found[dataset]['shards_of_next_epoch'] == {
                shard: late.count(shard) for shard in sorted(set(late))}


def test_loss_png_is_a_picture_of_something(base):
    from PIL import Image
    picture = np.array(Image.open(base / 'loss.png').convert('RGB'))
    assert min(picture.shape[:2]) >= 200 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def begin_run(out):
    """The checkpoint.Run of a folder's config, with the weights that its seed gives."""
    settings = json.loads((out / 'config.json').read_text())
    torch.manual_seed(settings['seed'])
    return checkpoint.make_run(settings, 'cpu')


def one_by_one(begun, folder, keys=None):
    """Losses in nats, targets and greedy answers of the samples of a data set, each on its own;
    {key: (...)}."""
    built, tok, eyes = begun.model.eval(), begun.tokenizer, begun.processor.eyes
    opened, found = shards.Folder(str(folder)), {}
    places = [(s, i) for s, count in enumerate(opened.sizes.tolist()) for i in range(count)]
    for shard, index in places:
        key, members = opened.key(shard, index), opened.read(shard, index)
        if keys is not None and key not in keys:
            continue
        pixels, before = None, [tok.bos_id]
        if 'png' in members:
            pixels = eyes.to_tensor(eyes.pixels(members['png'])[None], 'cpu')
            before = prompt_of(begun.processor)[0]
        text = members['txt'].decode().strip()
        ids = before + tok.encode(text) + [tok.eos_id]
        tokens, targets = torch.tensor([ids]), torch.full((1, len(ids)), -100)
        targets[0, len(before) - 1:-1] = tokens[0, len(before):]
        with torch.no_grad():
            loss, count = built.loss(tokens, targets, pixels)
            answer = generate(built, tokens[:, :len(before)], pixels, eos_id=tok.eos_id,
                              pad_id=tok.pad_id)[0]
        found[key] = loss.item(), count.item(), tok.decode(answer) == text
    return found


def test_validation_is_the_mean_over_targets_of_the_whole_set(base, data):
    found = rows(base, 'val_loss')
    assert [(row['step'], row['val']) for row in found] == [
        (8, 'held'), (16, 'held'), (24, 'held')]
    begun = begin_run(base)
    begun.model.load_state_dict({k: torch.from_numpy(w) for k, w in weights(base).items()})
    sums = np.array(list(one_by_one(begun, data / 'held').values())).sum(0)
    assert found[-1]['val_loss'] == pytest.approx(sums[0] / sums[1], rel=1e-5)
    assert found[-1]['exact_match'] == pytest.approx(sums[2] / 12)


def test_validation_takes_samples_without_a_picture(short, tmp_path):
    short('--val={"long": "long", "words": "words"}').ok()
    found = rows(tmp_path / 'run', 'val_loss')
    assert [row['val'] for row in found] == ['long', 'words']
    assert all(row['val_loss'] < 8 for row in found)


def test_keep_last_and_log_every(short, tmp_path):
    short('--num_checkpoints=4', '--keep_last=2', '--log_every=3').ok()
    assert names(tmp_path / 'run') == ['step_00000006', 'step_00000008']
    assert [row['step'] for row in rows(tmp_path / 'run')] == [3, 6, 8]
    assert rows(tmp_path / 'run')[-1]['samples_per_sec'] == pytest.approx(
        12 / rows(tmp_path / 'run')[-1]['step_time'], rel=0.05)


def test_a_finished_run_says_so_and_changes_nothing(base, flags):
    before = contents(base)
    assert 'finished' in run('train.py', *flags, f'--out_dir={base}').ok().out
    assert contents(base) == before


# -----------------------------------------------------------------------------------------------
# killed, stopped, damaged: the same command goes on, bit for bit


def test_sigkill_at_any_moment(base, flags, tmp_path):
    out, rng = tmp_path / 'run', random.Random(0)
    temporary = out / 'checkpoints' / '.step_00000010.tmp'

    def past(step, seconds):
        def reached():
            if rows(out)[-1:] and rows(out)[-1]['step'] >= step:
                time.sleep(seconds)
                return True
        return reached

    moments = [lambda: True, past(2, 0), temporary.exists, past(7, 0.01),
               past(12, rng.random() / 20), (out / 'checkpoints' / '.step_00000019.tmp').exists,
               past(17, rng.random() / 20), (out / 'checkpoints' / '.step_00000024.tmp').exists]
    kills = leftovers = 0
    for reached in moments:
        process = Process('train.py', [*flags, f'--out_dir={out}'])
        if wait_until(reached, process):
            os.kill(process.pid, signal.SIGKILL)
        kills += process.wait().code == -signal.SIGKILL
        leftovers += (out / 'checkpoints').exists() and any(
            n.startswith('.step') for n in names(out))
    assert kills >= len(moments) - 2 and leftovers
    assert 'resumed from' in run('train.py', *flags, f'--out_dir={out}').ok().out
    assert_same_run(out, base)


def test_no_worker_outlives_a_killed_run(flags, tmp_path):
    process = Process('train.py', [
        *flags, '--seq_len=2000', f'--out_dir={tmp_path / "run"}', '--max_steps=1000'])
    wait_until(lambda: rows(tmp_path / 'run'), process)
    workers = [int(pid) for pid in Path(
        f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(os.path.exists(f'/proc/{pid}') for pid in workers), timeout=10)


def test_a_half_written_checkpoint_is_never_used(base, flags, tmp_path):
    out = copy(base, tmp_path / 'run', *CHECKPOINTS[2:])
    # the second is of a step that will not be saved
    for left in ('.step_00000010.tmp', '.step_00000012.tmp'):
        shutil.copytree(out / 'checkpoints' / CHECKPOINTS[1], out / 'checkpoints' / left)
    shutil.rmtree(out / 'checkpoints' / CHECKPOINTS[1])
    with open(out / 'log.jsonl', 'a') as f:
        f.write('{"step": 25, "lo')                                 # a row that was cut short, too
    result = run('train.py', *flags, f'--out_dir={out}').ok()
    assert f'resumed from {out}/checkpoints/{CHECKPOINTS[0]}' in result.out
    assert_same_run(out, base)


def cut(path):
    with open(path, 'r+b') as f:
        f.truncate(path.stat().st_size // 2)


def zero_the_header(path):
    with open(path, 'r+b') as f:
        f.write(bytes(64))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


STATE = 'state/model-00001-of-00001.safetensors'


@pytest.mark.parametrize('damage', [
    lambda folder: cut(folder / 'model.safetensors'), lambda folder: cut(folder / STATE),
    lambda folder: (folder / 'progress.json').unlink(), lambda folder: (folder / STATE).unlink(),
    lambda folder: cut(folder / 'progress.json'), lambda folder: (folder / 'config.json').unlink(),
    lambda folder: (folder / 'model.safetensors').unlink(),
    lambda folder: flip(folder / 'model.safetensors')],
                         ids=['weights cut', 'state cut', 'no progress', 'no state',
                              'progress cut', 'no config', 'no weights', 'a bit'])
def test_a_damaged_checkpoint_is_reported_and_an_older_one_used(base, flags, tmp_path, damage):
    out = copy(base, tmp_path / 'run')
    damage(out / 'checkpoints' / CHECKPOINTS[-1])
    result = run('train.py', *flags, f'--out_dir={out}').ok()
    assert any(CHECKPOINTS[-1] in line and 'damaged' in line
               for line in result.out.splitlines()), result.out
    assert f'resumed from {out}/checkpoints/{CHECKPOINTS[-2]}' in result.out
    assert_same_run(out, base)


def test_nothing_of_a_damaged_checkpoint_is_used(base, flags, tmp_path):
    """The only checkpoint there is, with sound weights and an optimizer state that can not be
    read."""
    out = copy(base, tmp_path / 'run', *CHECKPOINTS[:-1])
    zero_the_header(out / 'checkpoints' / CHECKPOINTS[-1] / STATE)
    before = contents(out)
    run('train.py', *flags, f'--out_dir={out}').refused(
        'every checkpoint', 'checkpoints', 'damaged', 'anew')
    assert contents(out) == before, 'a run does not begin anew over what may be mended'


def stop_after(step, out, args, send, **kwargs):
    """Start a run, send it a signal once it has logged a step; its Result."""
    process = Process('train.py', [*args, f'--out_dir={out}'], **kwargs)
    assert wait_until(
        lambda: rows(out)[-1:] and rows(out)[-1]['step'] >= step, process), process.wait().err
    send(process.pid)
    return process.wait()


@pytest.mark.parametrize(
    'send', [lambda pid: os.kill(pid, signal.SIGTERM), lambda pid: os.killpg(pid, signal.SIGINT),
             lambda pid: os.killpg(pid, signal.SIGTERM)],
    ids=['SIGTERM', 'SIGINT to all', 'SIGTERM to all'])
def test_a_signal_finishes_the_step_and_saves(base, flags, tmp_path, send):
    """Ctrl-C, `timeout` and batch systems send the signal to the workers, too."""
    out = tmp_path / 'run'
    result = stop_after(6, out, flags, send).ok()
    last = rows(out)[-1]['step']
    assert last < STEPS, 'it was over before the signal came'
    assert names(out)[-1] == f'step_{last:08}' == os.readlink(out / 'checkpoints' / 'latest')
    assert 'same command' in result.out and 'finished' not in result.out
    assert f'resumed from {out}/checkpoints/step_{last:08}' in run(
        'train.py', *flags, f'--out_dir={out}').ok().out
    # the checkpoint of the signal is gone, too
    assert_same_run(out, base)


def test_keep_last_counts_scheduled_checkpoints(flags, tmp_path):
    """An extra checkpoint, which a signal left, takes no other's place."""
    out = tmp_path / 'run'
    # after the checkpoints of steps 5 and 19
    for step in (6, 20):
        stop_after(
            step, out, [*flags, '--keep_last=2'], lambda pid: os.kill(pid, signal.SIGTERM)).ok()
    run('train.py', *flags, '--keep_last=2', f'--out_dir={out}').ok()
    assert names(out) == CHECKPOINTS[-2:]


def test_workers_change_nothing(base, flags, tmp_path):
    run('train.py', *flags, '--workers=0', f'--out_dir={tmp_path / "run"}').ok()
    assert_same_run(tmp_path / 'run', base)


def test_augmentation_is_of_the_position_and_the_seed(short, tmp_path):
    first = []
    for i, extra in enumerate(([], ['--augment=false'], ['--max_steps=2'])):
        short(f'--out_dir={tmp_path / str(i)}', '--warmup=1', *extra).ok()
        first.append(rows(tmp_path / str(i))[0]['loss'])
    assert first[0] == first[2] != first[1]


# -----------------------------------------------------------------------------------------------
# precision, groups, weights from elsewhere


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('torchrun', range(min(torch.cuda.device_count(), 2)))
@pytest.mark.parametrize('extra', [
    ['--dtype=bfloat16'], ['--dtype=bfloat16', '--fsdp=0', '--compile=true', '--ema=0.9'],
    ['--dtype=float16', '--decoder.remat=true', '--vit.remat=true']])
def test_gpus_train(short, tmp_path, torchrun, extra):
    """One process on one GPU, then NCCL between two where there are two: the loss falls and the
    checkpoint is fp32."""
    gpus = {'CUDA_VISIBLE_DEVICES': os.environ.get('CUDA_VISIBLE_DEVICES', '0,1')}
    short(
        *extra, '--device=auto', '--max_steps=40', torchrun=torchrun * 2, real=True, env=gpus).ok()
    assert rows(tmp_path / 'run')[-1]['loss'] < rows(tmp_path / 'run')[0]['loss']
    assert all(w.dtype == np.float32 for w in weights(tmp_path / 'run').values())


def test_bfloat16_computes_low_and_keeps_high(short, data, tmp_path):
    short('--dtype=bfloat16', '--val={"held": "held"}', f'--out_dir={tmp_path / "low"}').ok()
    short('--val={"held": "held"}', f'--out_dir={tmp_path / "high"}').ok()
    low, high = ([row['loss'] for row in rows(tmp_path / name)] for name in ('low', 'high'))
    assert low != high and low == pytest.approx(high, rel=0.05)
    from safetensors.numpy import load_file
    latest = tmp_path / 'low' / 'checkpoints' / 'latest'
    for file in (latest / 'model.safetensors', latest / STATE):
        assert {str(w.dtype) for w in load_file(file).values()} == {'float32'}
    # masters that lose nothing: their low halves are not the zeros of a bfloat16
    assert (
        weights(tmp_path / 'low')['connector.weight'].view(np.uint32) & 0xffff != 0).mean() > 0.9


def test_frozen_parameters_stay_and_have_no_state(short, tmp_path):
    short("--groups=[['^vit', {'freeze': True}], ['.*', {}]]").ok()
    from safetensors.numpy import load_file
    trained = weights(tmp_path / 'run')
    for name, parameter in begin_run(tmp_path / 'run').model.named_parameters():
        equal = parameter.detach().numpy().tobytes() == trained[name].tobytes()
        assert equal == name.startswith('vit'), name
    state = load_file(tmp_path / 'run' / 'checkpoints' / 'latest' / STATE)
    assert not [k for k in state if k.startswith('vit')]
    assert [k for k in state if k.startswith('connector')]


def test_groups_scale_the_rate_and_set_the_decay(short, tmp_path):
    """One step: AdamW moves a weight by lr_scale x lr x (sign of the gradient + decay x
    weight)."""
    common = ['--max_steps=1', '--warmup=0', '--lr=0.01', '--weight_decay=0.0', '--augment=false']
    short(*common, "--groups=[['.*', {}]]", f'--out_dir={tmp_path / "a"}').ok()
    half, decayed = "['^vit', {'lr_scale': 0.5}]", "['^connector', {'weight_decay': 3.0}]"
    short(*common, f"--groups=[{half}, {decayed}, ['.*', {{}}]]",
          f'--out_dir={tmp_path / "b"}').ok()
    begun = begin_run(tmp_path / 'a').model
    start = {k: p.detach().numpy() for k, p in begun.named_parameters()}
    a, b = weights(tmp_path / 'a'), weights(tmp_path / 'b')
    for name, w in start.items():
        if name.startswith('connector'):
            np.testing.assert_allclose(b[name], a[name] - 0.01 * 3.0 * w, atol=1e-6)
        else:
            np.testing.assert_allclose(
                b[name] - w, (a[name] - w) * (0.5 if name.startswith('vit') else 1), atol=1e-6)
    assert np.abs(a['connector.weight'] - start['connector.weight']).max() == pytest.approx(
        0.01, rel=1e-3)


@pytest.fixture(scope='module')
def siglip(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('siglip') / 'run'
    run('train.py', *tiny.FLAGS, f'--data_dir={data}', '--mix={"plain": 1}', '--task=siglip',
        '--max_steps=30', '--augment=false', '--val={"plain": "plain"}', f'--out_dir={out}').ok()
    return out


def test_siglip_learns_pairs(siglip):
    loss = [row['loss'] for row in rows(siglip)]
    assert np.mean(loss[-3:]) < 0.7 * np.mean(loss[:3])
    assert rows(siglip, 'val_loss')[-1]['exact_match'] > 0.3       # of twelve texts the right one


def test_siglip_with_all_texts_does_not_depend_on_micro_batches(short, tmp_path):
    for size in ('12', '3'):
        short('--task=siglip', '--pair_with=all', f'--micro_batch_size={size}', *tiny.DROPOUT,
              f'--out_dir={tmp_path / size}').ok()
    got, expected = ([row['loss'] for row in rows(tmp_path / size)] for size in ('3', '12'))
    assert got == pytest.approx(expected, abs=1e-5) and expected[-1] < expected[0]


FREEZE = "--groups=[['^vit', {'freeze': True}], ['.*', {}]]"


@pytest.mark.parametrize('where', ['', 'checkpoints/step_00000030'])
def test_init_from_takes_what_has_the_same_name(siglip, short, tmp_path, where):
    # all patches side by side, as in the tower's own head: that is the connector, then
    result = short(f'--init_from={siglip / where}', '--pixel_shuffle=2', FREEZE,
                   '--max_steps=2').ok()
    theirs, ours = weights(siglip), weights(tmp_path / 'run')
    tower = [k for k in ours if k.startswith('vit.')]
    assert tower and all(ours[k].tobytes() == theirs[k].tobytes() for k in tower)
    moved = np.abs(ours['connector.weight'] - theirs['connector.weight']).max()
    assert 0 < moved < 0.01
    line, = (line for line in result.out.splitlines() if line.startswith('init_from'))
    assert f'{len(tower) + 2} tensors (connector, vit)' in line
    assert 'decoder' in line and 'text' in line


def test_init_from_refuses_another_shape(siglip, short, tmp_path):
    wider = ['--vit.patch_size=4', f'--init_from={siglip}', '--max_steps=2']
    short(*wider).refused('connector.weight', '(32, 128)', '(32, 32)', 'init_skip')
    short(*wider, "--init_skip=['connector', 'pos_embed']").refused(
        'vit.stem.weight', '(32, 3, 8, 8)', '(32, 3, 4, 4)')
    result = short(*wider, "--init_skip=['connector', 'stem', 'pos_embed']", FREEZE).ok()
    theirs, ours = weights(siglip), weights(tmp_path / 'run')
    same = {k for k in ours if k in theirs and ours[k].tobytes() == theirs[k].tobytes()}
    assert same == {
        k for k in ours if k.startswith('vit.') and 'stem' not in k and k != 'vit.pos_embed'}
    assert f'{len(same)} tensors' in result.out


def test_init_from_what_is_not_there_or_damaged(siglip, short, tmp_path):
    short('--init_from=no/such/run').refused('init_from', 'no/such/run', 'model.safetensors')
    copy(siglip, tmp_path / 'broken')
    cut(tmp_path / 'broken' / 'checkpoints' / 'latest' / 'model.safetensors')
    short(f'--init_from={tmp_path / "broken"}').refused('init_from', 'broken')


def test_parameters_end_when_nobody_reads_on(data, tmp_path):
    flags = *tiny.FLAGS, f'--data_dir={data}', '--mix={"plain": 1}', '--max_steps=8'
    command = shlex.join([sys.executable, str(tiny.ROOT / 'train.py'), *flags, '--parameters',
                          f'--out_dir={tmp_path / "run"}'])
    done = subprocess.run(f'{command} | true', shell=True, capture_output=True, text=True,
                          env=os.environ | tiny.ENV)
    assert done.stderr == ''


# -----------------------------------------------------------------------------------------------
# refusals: one line that says what to change, exit code 2


@pytest.mark.parametrize('extra, words', [
    (['--learning_rate=1'], ['learning_rate', 'did you mean']),
    (['--max_step=1'], ['max_step', 'max_steps']),
    (['--vit.dept=1'], ['vit.dept', 'vit.depth']),
    (['--batch_size=many'], ['batch_size', 'many', 'int']),
    (['--augment=1'], ['augment', 'true or false']),
    (['--mix={"nowhere": 1}'], ['nowhere', 'does not exist', 'prepare/']),
    (['--val={"v": "nowhere"}'], ['nowhere', 'does not exist', 'prepare/']),
    (['--mix={}'], ['data set']),
    (['--mix={"plain": -1}'], ['-1', 'negative']),
    (['--mix={"plain": "x"}'], ['mix', 'x']),
    (['--tokenizer=missing.model'], ['missing.model', 'does not exist']),
    (['--tokenizer=words'], ['words', '.model']),
    (['--batch_size=10', '--micro_batch_size=4'],
     ['batch_size=10', 'micro_batch_size=4', '8 or 12']),
    (['--batch_size=0'], ['batch_size=0']),
    (['--task=llama'], ['task', 'llama', 'llm, policy, siglip', 'mine.py']),
    (['--task=nowhere.py'], ['nowhere.py', 'there is no file /']),
    (['--device=tpu'], ["device='tpu'", 'cuda:NUMBER']),
    (['--device=cuda:99'], ['cuda:99', 'GPUs', '--device=cpu']),
    (['--seed=99999999999999999999999'], ['seed', '64 bits']),
    (['--val={"a": 5}'], ['val', "'a'", '5', 'name of a data set']),
    (['--vit.patch_size=0'], ['vit.patch_size=0', 'at least 1']),
    (['--decoder.num_kv_heads=-1'], ['decoder.num_kv_heads=-1', 'at least 1']),
    (['--dtype=float8'], ['dtype', 'float8', 'bfloat16']),
    (['--resume=always'], ['resume', 'always', 'missing', 'auto, never']),
    (['--task=siglip', '--micro_batch_size=6'], ['batch_size=12', 'micro_batch_size=6']),
    (['--epochs=1.0'], ['max_steps=8', 'epochs=1.0', 'one']),
    (['--max_steps=0'], ['max_steps=0', 'max_samples=0', 'epochs=0.0']),
    (['--max_steps=-3'], ['max_steps=-3']),
    (['--warmup=9'], ['warmup=9', '9 steps', 'run has 8']),
    (['--num_checkpoints=9'], ['num_checkpoints=9', '8 steps']),
    (['--num_checkpoints=0'], ['num_checkpoints=0', 'at least 1']),
    (['--allow_repeat=false', '--max_steps=2'], ['allow_repeat', '24', "'plain'", 'has 12']),
    (["--groups=[['^vit', {}]]"], ['groups', 'no rule matches', '.*']),
    (["--groups=[['.*', {}], ['^vit', {'lr_scale': 2.0}]]"], ['groups', '^vit', 'no parameter']),
    (["--groups=[['^vit', {'lr': 2.0}], ['.*', {}]]"], ['groups', "'lr'", 'lr_scale']),
    (["--groups=[['.*', {'freeze': True}]]"], ['freeze', 'nothing is left']),
    (["--groups=[['(', {}], ['.*', {}]]"], ['groups', '(']),
    (["--groups=['.*']"], ['groups']),
    (['--vit.patch_size=5'], ['vit.image_size=16', 'vit.patch_size=5']),
    (['--vit.stem=resnet'], ['vit.stem', 'resnet']),
    (['--decoder.num_kv_heads=3'], ['decoder.num_heads=2', '3']),
    (['--decoder.vocab_size=100'], ['decoder.vocab_size=100', '260']),
    (['--lr=-1.0'], ['lr=-1.0']),
    (['--betas=[0.9]'], ['betas']),
    (['--betas=[0.9, 1.5]'], ['betas', '1.5']),
    (['--grad_clip=-1.0'], ['grad_clip=-1.0']),
    (['--lanes=0'], ['lanes=0']),
    (['--pixel_shuffle=3'], ['pixel_shuffle=3', '2 patches']),
    (['--pixel_shuffle=0'], ['pixel_shuffle=0']),
    (['--task=siglip', '--pair_scale=0.0'], ['pair_scale=0.0']),
    (['--task=siglip', '--mix={"words": 1}'], ['siglip', 'picture']),
], ids=lambda value: ' '.join(value) if value and value[0].startswith('--') else '')
def test_refusal(short, tmp_path, extra, words):
    short(*extra).refused(*words)
    assert not rows(tmp_path / 'run') and not (tmp_path / 'run' / 'loss.png').exists()


def test_just_allowed(short, tmp_path):
    """What lies next to the refusals: a whole epoch without a repeat, warm-up all along, a
    checkpoint a step."""
    short('--mix={"long": 1}', '--batch_size=5', '--max_steps=5', '--allow_repeat=false',
          '--warmup=5', '--num_checkpoints=5').ok()
    assert len(names(tmp_path / 'run')) == 5
    assert rows(tmp_path / 'run')[-1]['lr'] == pytest.approx(5e-3)
    seen = [key for step in show_steps(tmp_path / 'run', '1:6').values() for *_, key in step]
    assert sorted(seen) == sorted(sample[0] for sample in tiny.SETS['long'])


def test_resume_refuses_another_model_and_prints_other_changes(base, flags, tmp_path):
    out = copy(base, tmp_path / 'run', CHECKPOINTS[-1])
    before = contents(out)
    for change in ('decoder.width=48', 'vit.patch_size=4', 'lanes=4'):
        run('train.py', *flags, f'--out_dir={out}', f'--{change}').refused(change, 'out_dir')
    run('train.py', *flags, f'--out_dir={out}', '--resume=never').refused(
        'resume=never', 'out_dir')
    assert contents(out) == before
    result = run('train.py', *flags, f'--out_dir={out}', '--weight_decay=0.2', '--workers=0').ok()
    changed = [line for line in result.out.splitlines() if 'changed' in line]
    assert any('weight_decay 0.1 -> 0.2' in line for line in changed)
    assert len([line for line in changed if 'out_dir' not in line]) == 2, changed
    assert rows(out)[18:] != rows(base)[18:]


# -----------------------------------------------------------------------------------------------
# failures at run time: one line among the progress bars, exit code 1


def spoiled(folder, count):
    """12 shapes, of which some have a picture that can not be decoded."""
    samples = [(key, picture[:60] if i < count else picture, caption)
               for i, (key, picture, caption) in enumerate(tiny.SETS['plain'])]
    tiny.write(folder, samples)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_bad_picture_is_a_counted_placeholder(short, tmp_path, workers):
    spoiled(tmp_path / 'spoiled', 1)
    result = short(f'--mix={{"{tmp_path}/spoiled": 1}}', '--max_bad_fraction=0.2',
                   f'--workers={workers}').ok()
    found = rows(tmp_path / 'run')
    seen = show_steps(tmp_path / 'run', '1:9')
    bad = np.cumsum([[key for *_, key in seen[step]].count('plain-00') for step in range(1, 9)])
    assert [row['bad_samples'] for row in found] == bad.tolist() and bad[-1] == 8
    assert result.err.count('plain-00') == 8 and '00000000.tar' in result.err
    # nothing of it is learned or counted
    lengths = {sample[0]: tiny.row_length(sample) for sample in tiny.SETS['plain']} | {
        'plain-00': 0}
    assert found[0]['tokens'] == sum(lengths[key] for *_, key in seen[1])


def test_too_many_bad_pictures_stop_the_run(short, tmp_path):
    spoiled(tmp_path / 'spoiled', 3)
    result = short(f'--mix={{"{tmp_path}/spoiled": 1}}', '--num_checkpoints=8').failed(
        'max_bad_fraction=0.001', 'bad')
    assert 'spoiled/00000000.tar' in result.err and 'plain-01' in result.err
    assert not rows(tmp_path / 'run')


def test_a_bad_validation_picture_stops_the_run(short, tmp_path):
    spoiled(tmp_path / 'spoiled', 1)
    short(f'--val={{"v": "{tmp_path}/spoiled"}}').failed('plain-00', "'v'")


def test_a_loss_that_is_not_finite_stops_the_run(short, tmp_path):
    result = short('--lr=1e30', '--warmup=0', '--num_checkpoints=8')
    result.failed('loss', 'nan', '--show_steps=2:3', 'step_00000001')
    assert names(tmp_path / 'run') == ['step_00000001']
    assert all(np.isfinite(w).all() for w in weights(tmp_path / 'run').values())


# -----------------------------------------------------------------------------------------------
# lengths, places, other tools


@pytest.mark.parametrize(
    'length, steps, samples', [('max_samples=37', 4, 37), ('max_samples=36', 3, 36),
                               ('epochs=2', 5, 50), ('epochs=0.5', 2, 13)])
def test_lengths(data, tmp_path, length, steps, samples):
    """Of 25 samples in batches of 12, rounded up; the last batch is as short as it must be."""
    run('train.py', *tiny.FLAGS, f'--data_dir={data}', '--mix={"long": 1}', f'--{length}',
        '--warmup=0.1', f'--out_dir={tmp_path / "run"}').ok()
    last = rows(tmp_path / 'run')[-1]
    assert (last['step'], last['samples']) == (steps, samples)
    assert names(tmp_path / 'run') == [f'step_{steps:08}']


def test_a_saved_config_reproduces_the_run_from_another_folder(base, tmp_path):
    run('train.py', base / 'config.json', '--out_dir=again', cwd=tmp_path).ok()
    assert_same_run(tmp_path / 'again', base)
    ours, theirs = (
        json.loads((out / 'config.json').read_text()) for out in (tmp_path / 'again', base))
    assert ours | {'out_dir': ''} == theirs | {'out_dir': ''}


def test_wandb_offline(short, tmp_path):
    pytest.importorskip('wandb')
    env = {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true', 'WANDB_DIR': str(tmp_path),
           'HOME': str(tmp_path), 'WANDB_CACHE_DIR': str(tmp_path),
           'WANDB_DATA_DIR': str(tmp_path), 'WANDB_CONFIG_DIR': str(tmp_path)}
    short('--wandb_project=tiny', '--max_steps=3', env=env).ok()
    files = list((tmp_path / 'run').rglob('*.wandb'))
    assert len(files) == 1 and b'grad_norm' in files[0].read_bytes()
    assert len(rows(tmp_path / 'run')) == 3


def test_a_language_model_trains_on_words_alone(data, tmp_path):
    run('train.py', *tiny.LLM_FLAGS, f'--data_dir={data}', '--mix={"words": 1}', '--max_steps=12',
        f'--out_dir={tmp_path / "run"}').ok()
    loss = [row['loss'] for row in rows(tmp_path / 'run')]
    assert loss[-1] < 0.7 * loss[0]
    assert not [k for k in weights(tmp_path / 'run') if k.startswith('vit')]


def test_a_disk_that_is_full_ends_the_run_in_one_line_and_leaves_no_half_checkpoint(
    data, tmp_path):
    command = [sys.executable, str(tiny.ROOT / 'train.py'), *tiny.FLAGS, f'--data_dir={data}',
               '--mix={"plain": 1}', '--max_steps=8', '--num_checkpoints=2',
               f'--out_dir={tmp_path / "run"}']
    # no file may have more than 64 KiB
    full = ['bash', '-c', 'ulimit -f 64; exec "$@"', '-', *command]
    done = subprocess.run(
        full, env=os.environ | tiny.ENV, capture_output=True, text=True, check=False)
    tiny.Result(done.returncode, done.stdout, done.stderr).failed(
        'step 4', 'could not be written', 'none')
    assert os.listdir(tmp_path / 'run' / 'checkpoints') == []
    run('train.py', *command[2:]).ok()          # with room again, the same command goes through
    assert names(tmp_path / 'run') == ['step_00000004', 'step_00000008']
