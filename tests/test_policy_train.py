"""Robot policies in the real commands: train.py with task=policy and task=vla on any number of ranks, and sample.py in
the simulator."""
import io
import json

import numpy as np
import pytest
import tiny

FLAGS = ['--device=cpu', '--lanes=8', '--window=4', '--workers=0', '--batch_size=12', '--seq_len=48', '--log_every=1',
         '--max_steps=3', '--lr=1e-3', '--warmup=0', '--action_steps=4', '--action_dim=4', '--proprio_dim=39',
         '--mix={"robot": 1.0}', '--ema=0.9', '--policy.width=32', '--policy.mlp_dim=32', '--policy.num_heads=2',
         '--policy.depth=1', '--policy.num_noise_draws=2', '--vla.width=32', '--vla.mlp_dim=32', *tiny.MODEL]


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """robot: episodes of unequal length, states alone; eyes: time steps with a picture or none, one with an answer."""
    import webdataset
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    (folder / 'robot').mkdir()
    counts = [5, 9, 2, 7]
    with webdataset.TarWriter(str(folder / 'robot' / '0.tar'), encoder=False) as tar:
        for i, n in enumerate(counts):
            rows = np.zeros(n, [('proprio', '<f4', 39), ('actions', '<f4', 4)])
            rows['proprio'], rows['actions'] = rng.standard_normal((n, 39)), rng.uniform(-1, 1, (n, 4))
            meta = dict(instruction=f'do {i}', task=['reach', 'push'][i % 2])
            tar.write({'__key__': f'e{i}', 'json': json.dumps(meta).encode(), 'lowdim.npy': npy(rows)})
    (folder / 'robot' / 'manifest.jsonl').write_text(json.dumps(dict(shard='0', num_sequences=sum(counts))) + '\n')
    (folder / 'eyes').mkdir()
    with webdataset.TarWriter(str(folder / 'eyes' / '0.tar'), encoder=False) as tar:
        for i in range(10):
            file = io.BytesIO()
            np.savez(file, proprio=rng.standard_normal(39), actions=rng.uniform(-1, 1, (4, 4)), is_pad=np.arange(4) > i)
            meta = dict(instruction='look') | (dict(suffix='an answer') if i % 4 == 1 else {})
            tar.write({'__key__': f's{i}', 'json': json.dumps(meta).encode(), 'lowdim.npz': file.getvalue()} | (
                {'near.png': tiny.png(tiny.draw('red disc', 'plain'))} if i % 3 else {}))
    for name in ('robot', 'eyes'):
        tiny.run('prepare/stats.py', f'--data={folder / name}', f'--cache_dir={folder / "cache"}').ok()
    return folder


def train(data_dir, out_dir, *flags, **kwargs):
    return tiny.run('train.py', *FLAGS, f'--data_dir={data_dir}', f'--out_dir={out_dir}', *flags, **kwargs)


KINDS = {'state': ['--task=policy'],
         'words': ['--task=policy', '--policy.encoder=text', '--policy.denoiser=unet', '--policy.channels=[16, 32]',
                   '--policy.objective=ddpm', '--policy.loss=huber'],
         'pictures': ['--task=policy', '--policy.encoder=vlm', '--policy.denoiser=transformer', '--policy.loss=l1',
                      '--mix={"eyes": 1.0, "robot": 1.0}'],
         'vla': ['--task=vla', '--mix={"eyes": 1.0, "robot": 1.0}', '--action_weight=2.0']}


@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_does_not_depend_on_ranks_or_micro_batches(data_dir, tmp_path, kind):
    flags = [*KINDS[kind], *([f'--stats={data_dir}/eyes/stats.json'] if 'eyes' in ' '.join(KINDS[kind]) else [])]
    train(data_dir, tmp_path / 'one', *flags).ok()
    train(data_dir, tmp_path / 'two', *flags, '--micro_batch_size=3', f'--fsdp={int(kind != "vla")}', torchrun=2).ok()
    one, two = tiny.rows(tmp_path / 'one'), tiny.rows(tmp_path / 'two')
    for a, b in zip(one, two, strict=True):
        assert abs(a['loss'] - b['loss']) < 1e-5 * max(1, a['loss']) and a['tokens'] == b['tokens']
    if kind == 'vla':
        assert all(abs(r['loss/text'] + 2 * r['loss/actions'] - r['loss']) < 1e-6 for r in one)
    assert json.loads((tmp_path / 'one/checkpoints/latest/stats.json').read_text())['actions']['count'][0] > 0


def test_a_policy_goes_on_bit_for_bit(data_dir, tmp_path):
    flags = [*KINDS['words'], '--num_checkpoints=3']
    train(data_dir, tmp_path / 'whole', *flags).ok()
    train(data_dir, tmp_path / 'cut', *flags).ok()
    import shutil
    for step in (2, 3):
        shutil.rmtree(tmp_path / f'cut/checkpoints/step_{step:08d}')
    assert 'resumed' in train(data_dir, tmp_path / 'cut', *flags).ok().out
    assert tiny.losses(tmp_path / 'cut') == tiny.losses(tmp_path / 'whole')
    tiny.same_weights(tiny.weights(tmp_path / 'cut'), tiny.weights(tmp_path / 'whole'))


def test_a_vlm_begins_a_policy_and_a_vla(data_dir, tmp_path):
    mix = ['--mix={"eyes": 1.0}', '--max_steps=1', '--ema=0']
    tiny.run('train.py', '--task=vlm', *tiny.FLAGS, '--mix={"plain": 1.0}', f'--data_dir={tiny.data_dir()}',
             '--max_steps=1', f'--out_dir={tmp_path / "vlm"}').ok()
    for kind in ('pictures', 'vla'):
        result = train(data_dir, tmp_path / kind, *KINDS[kind], *mix, f'--init_from={tmp_path / "vlm"}').ok()
        line, = (x for x in result.out.splitlines() if x.startswith('init_from'))
        assert line.endswith('none left there unused') and ' begin anew' in line, line
    train(data_dir, tmp_path / 'again', *KINDS['pictures'], *mix, f'--init_from={tmp_path / "pictures"}').ok()


@pytest.mark.parametrize('flags, said', [
    (['--action_dim=0'], ('action_dim=0', 'at least')), (['--policy.action_dim=4'], ('set action_dim',)),
    (['--pack=true'], ('pack=True',)), (['--policy.loss=l3'], ('policy.loss', 'huber')),
    (['--stats=gone.json'], ('gone.json', 'prepare/stats.py')), (['--normalize=z'], ("'z'", 'mean_std')),
    (['--mix={"eyes": 1.0, "robot": 1.0}'], ('2 data sets', '--stats=')), (['--action_dim=2'], ('4 dimensions', '2'))])
def test_wrong_settings(data_dir, tmp_path, flags, said):
    train(data_dir, tmp_path, '--task=policy', *flags).refused(*said)


def test_sample_acts_in_the_simulator(data_dir, tmp_path):
    pytest.importorskip('metaworld')
    train(data_dir, tmp_path / 'run', *KINDS['words']).ok()
    flags = [f'--out_dir={tmp_path / "run"}', '--env=metaworld', '--tasks=reach,push', '--episodes=1', '--device=cpu',
             '--execute=4', '--sample_steps=2', '--processes=1', '--json=true']
    first = tiny.run('sample.py', *flags).ok().out
    rows = {row['policy']: row for row in map(json.loads, first.splitlines())}
    assert rows.keys() == {'policy', 'expert', 'random', 'zero', 'replay', 'wrong words'}
    assert rows['expert']['success'] == 1 and rows['zero']['success'] == 0
    assert set(rows['policy']['tasks']) == {'reach', 'push'} and 0 <= rows['policy']['low'] <= rows['policy']['high']
    tiny.run('sample.py', f'--out_dir={tmp_path / "run"}').refused('--env=metaworld')
    tiny.run('sample.py', *flags[:1], '--env=mars').refused('--env=mars')
    tiny.run('sample.py', *flags[:2], '--tasks=fly').refused("'fly'")
