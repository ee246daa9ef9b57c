"""Robot policies in the real commands: train.py with task=policy and task=vla on any number of
ranks, and sample.py in the simulator."""
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from hub import open_run
from robots.acting import policy_of

FLAGS = ['--device=cpu', '--lanes=8', '--window=4', '--workers=0', '--batch_size=12',
         '--seq_len=48', '--log_every=1', '--max_steps=3', '--lr=1e-3', '--warmup=0',
         '--action_steps=4', '--action_dim=4', '--proprio_dim=39', '--mix={"robot": 1.0}',
         '--ema=0.9']
POLICY = ['--task=policy', '--policy.width=32', '--policy.mlp_dim=32', '--policy.num_heads=2',
          '--policy.depth=1', '--policy.num_noise_draws=2', *tiny.MODEL, *tiny.DROPOUT]
BOTH = '--mix={"eyes": 1.0, "robot": 1.0}'


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_episodes(folder, rng):
    """Episodes of unequal length, states alone."""
    import webdataset
    folder.mkdir()
    counts = [5, 9, 2, 7]
    with webdataset.TarWriter(str(folder / '0.tar'), encoder=False) as tar:
        for i, n in enumerate(counts):
            rows = np.zeros(n, [('proprio', '<f4', 39), ('actions', '<f4', 4)])
            rows['proprio'] = rng.standard_normal((n, 39))
            rows['actions'] = rng.uniform(-1, 1, (n, 4))
            meta = dict(instruction=f'do {i}', task=['reach', 'push'][i % 2])
            tar.write({'__key__': f'e{i}', 'json': json.dumps(meta).encode(),
                       'lowdim.npy': npy(rows)})
    row = dict(shard='0', num_sequences=sum(counts))
    (folder / 'manifest.jsonl').write_text(json.dumps(row) + '\n')


def write_steps(folder, rng):
    """Time steps with a picture or none, some with an answer."""
    import webdataset
    folder.mkdir()
    with webdataset.TarWriter(str(folder / '0.tar'), encoder=False) as tar:
        for i in range(10):
            file = io.BytesIO()
            np.savez(file, proprio=rng.standard_normal(39), actions=rng.uniform(-1, 1, (4, 4)),
                     is_pad=np.arange(4) > i)
            meta = dict(instruction='look')
            if i % 4 == 1:
                meta['suffix'] = 'an answer'
            sample = {'__key__': f's{i}', 'json': json.dumps(meta).encode(),
                      'lowdim.npz': file.getvalue()}
            if i % 3:
                sample['near.png'] = tiny.png(tiny.draw('red disc', 'plain'))
            tar.write(sample)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """The data sets robot and eyes, with their statistics."""
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    write_episodes(folder / 'robot', rng)
    write_steps(folder / 'eyes', rng)
    for name in ('robot', 'eyes'):
        tiny.run('prepare/stats.py', f'--data={folder / name}',
                 f'--cache_dir={folder / "cache"}').ok()
    return folder


def train(data_dir, out_dir, *flags, **kwargs):
    return tiny.run('train.py', *FLAGS, f'--data_dir={data_dir}', f'--out_dir={out_dir}', *flags,
                    **kwargs)


KINDS = {
    'state': POLICY,
    'words': [*POLICY, '--policy.encoder=text', '--policy.denoiser=unet',
              '--policy.channels=[16, 32]', '--policy.objective=ddpm', '--policy.loss=huber'],
    'pictures': [*POLICY, '--policy.encoder=vlm', '--policy.denoiser=transformer',
                 '--policy.loss=l1', BOTH],
    'vla': ['--task=vla', '--vla.width=32', '--vla.mlp_dim=32', *tiny.MODEL, *tiny.DROPOUT,
            '--vla.num_noise_draws=2', BOTH, '--action_weight=2.0']}


@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_does_not_depend_on_ranks_or_micro_batches(data_dir, tmp_path, kind):
    flags = [*KINDS[kind]]
    if BOTH in flags:
        flags.append(f'--stats={data_dir}/eyes/stats.json')
    fsdp = 0 if kind == 'vla' else 1
    if kind == 'vla':
        flags.append('--val={"held": "eyes"}')
    train(data_dir, tmp_path / 'one', *flags).ok()
    train(data_dir, tmp_path / 'two', *flags, '--micro_batch_size=3', f'--fsdp={fsdp}',
          torchrun=2).ok()
    one, two = tiny.rows(tmp_path / 'one'), tiny.rows(tmp_path / 'two')
    for a, b in zip(one, two, strict=True):
        assert abs(a['loss'] - b['loss']) < 1e-5 * max(1, a['loss'])
        assert a['tokens'] == b['tokens']
    if kind == 'vla':
        for row in one:
            assert abs(row['loss/text'] + 2 * row['loss/actions'] - row['loss']) < 1e-6
        # validation has each kind, too
        held, of_two = (tiny.rows(tmp_path / name, 'val_loss')[0] for name in ('one', 'two'))
        parts = held['val_loss/text'] + 2 * held['val_loss/actions']
        assert abs(parts - held['val_loss']) < 1e-6
        for key in ('val_loss/text', 'val_loss/actions'):
            assert abs(of_two[key] - held[key]) < 1e-4 * held[key]
    stats = json.loads((tmp_path / 'one/checkpoints/latest/stats.json').read_text())
    assert stats['actions']['count'][0] > 0


def test_a_policy_goes_on_bit_for_bit(data_dir, tmp_path):
    flags = [*KINDS['words'], '--num_checkpoints=3']
    train(data_dir, tmp_path / 'whole', *flags).ok()
    train(data_dir, tmp_path / 'cut', *flags).ok()
    for step in (2, 3):
        shutil.rmtree(tmp_path / f'cut/checkpoints/step_{step:08d}')
    assert 'resumed' in train(data_dir, tmp_path / 'cut', *flags).ok().out
    assert tiny.losses(tmp_path / 'cut') == tiny.losses(tmp_path / 'whole')
    tiny.same_weights(tiny.weights(tmp_path / 'cut'), tiny.weights(tmp_path / 'whole'))


def test_statistics_that_were_made_again_are_refused_or_adopted(data_dir, tmp_path):
    stats = tmp_path / 'stats.json'
    shutil.copy(data_dir / 'robot/stats.json', stats)
    flags = [*KINDS['state'], f'--stats={stats}']
    train(data_dir, tmp_path / 'run', *flags, '--max_steps=1').ok()
    made_again = json.loads(stats.read_text())
    made_again['actions']['mean'][0] += 1
    stats.write_text(json.dumps(made_again))
    train(data_dir, tmp_path / 'run', *flags).refused('stats.json', 'step_00000001', '--adopt=')
    train(data_dir, tmp_path / 'run', *flags, '--adopt=["stats.json"]').ok()
    kept = json.loads((tmp_path / 'run/checkpoints/latest/stats.json').read_text())
    assert kept == made_again


def test_a_vlm_begins_a_policy_and_a_vla(data_dir, tmp_path):
    short = ['--mix={"eyes": 1.0}', '--max_steps=1', '--ema=0']
    tiny.run('train.py', '--task=vlm', *tiny.FLAGS, '--mix={"plain": 1.0}', '--max_steps=1',
             f'--data_dir={tiny.data_dir()}', f'--out_dir={tmp_path / "vlm"}').ok()
    for kind in ('pictures', 'vla'):
        result = train(data_dir, tmp_path / kind, *KINDS[kind], *short,
                       f'--init_from={tmp_path / "vlm"}').ok()
        line, = (x for x in result.out.splitlines() if x.startswith('init_from'))
        assert line.endswith('none left there unused') and ' begin anew' in line, line
    train(data_dir, tmp_path / 'again', *KINDS['pictures'], *short,
          f'--init_from={tmp_path / "pictures"}').ok()


@pytest.mark.parametrize('kind', KINDS)
def test_a_chunk_does_not_depend_on_who_asks_with_it(data_dir, tmp_path, kind):
    """Robots with sentences of any length, so that rows are padded, one by one and together."""
    train(data_dir, tmp_path, *KINDS[kind], '--mix={"eyes": 1.0}').ok()
    run = open_run(str(tmp_path))
    act = policy_of(run, SimpleNamespace(seed=0, sample_steps=3, sampler=''))
    rng, seen = np.random.default_rng(0), []
    for i in range(6):
        picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        seen.append(dict(proprio=rng.standard_normal(39), instruction='go' + 3 * i * 'o',
                         pictures=dict(near=picture), seed=i, step=2 * i))

    # the same request gives the same bits, in another batch the same to rounding
    alone = np.concatenate([act([one]) for one in seen])
    assert alone.shape == (6, 4, 4) and abs(np.diff(alone, axis=0)).max((1, 2)).min() > 1e-3
    for one, chunk in zip(seen, alone):
        np.testing.assert_array_equal(act([one])[0], chunk)
    for size in (2, 3, 6):
        together = np.concatenate([act(seen[a:a + size]) for a in range(0, 6, size)])
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(act(seen), act(seen))

    # only the step and the seed make other noise
    other = act([seen[0] | dict(step=1), seen[0] | dict(seed=9)])
    assert (abs(other - alone[0]).max((1, 2)) > 1e-3).all()


@pytest.mark.parametrize('flags, said', [
    (['--action_dim=0'], ('action_dim=0', 'at least')),
    (['--policy.action_dim=4'], ('set action_dim',)),
    (['--pack=true'], ('pack', 'task=policy')),
    (['--policy.loss=l3'], ('policy.loss', 'huber')),
    (['--stats=gone.json'], ('gone.json', 'prepare/stats.py')),
    (['--normalize=z'], ("'z'", 'mean_std')),
    ([BOTH], ('2 data sets', '--stats=')),
    (['--action_dim=2'], ('action_dim=2', '4 numbers'))])
def test_wrong_settings(data_dir, tmp_path, flags, said):
    train(data_dir, tmp_path, *POLICY, *flags).refused(*said)


def test_sample_acts_in_the_simulator(data_dir, tmp_path):
    pytest.importorskip('metaworld')
    train(data_dir, tmp_path / 'run', *KINDS['words']).ok()
    run = f'--out_dir={tmp_path / "run"}'
    acted = tiny.run('sample.py', run, '--env=metaworld', '--tasks=reach,push', '--episodes=1',
                     '--device=cpu', '--execute=4', '--sample_steps=2', '--processes=1',
                     '--json=true').ok()
    rows = {row['policy']: row for row in map(json.loads, acted.out.splitlines())}
    assert rows.keys() == {'policy', 'expert', 'random', 'zero', 'replay', 'wrong words'}
    assert rows['expert']['success'] == 1 and rows['zero']['success'] == 0
    assert set(rows['policy']['tasks']) == {'reach', 'push'}
    assert 0 <= rows['policy']['low'] <= rows['policy']['high']

    tiny.run('sample.py', run).refused('--env=metaworld')
    tiny.run('sample.py', run, '--env=mars').refused('--env=mars')
    tiny.run('sample.py', run, '--env=metaworld', '--tasks=fly').refused("'fly'")
