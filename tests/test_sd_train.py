"""Stable Diffusion in the real commands, from a tiny folder of diffusers: prepare/latents.py,
train.py, sample.py."""
import io
import json

import numpy as np
import pytest
import test_sd
import tiny
import torch
from conftest import write_tar
from PIL import Image

import hub
from families import diffusers
from pictures import Eyes
from shards import Folder

saved = test_sd.saved
LOOP = ['--task=t2i', '--dit.drop=0.3', '--device=cpu', '--lanes=8', '--window=4', '--workers=0',
        '--batch_size=6', '--log_every=1', '--max_steps=2', '--lr=1e-3', '--warmup=0', '--ema=0.9',
        '--num_checkpoints=2', f'--data_dir={tiny.data_dir()}', '--mix={"plain": 1.0}']
FREEZE = "--groups=[('^text|^vae', {'freeze': True}), ('.*', {})]"
FLAGS = [*LOOP, FREEZE, '--denoiser=unet', '--seq_len=77']


def train(folder, out_dir, *flags, **kwargs):
    config = out_dir.parent / 'tiny.py'
    config.write_text(hub.config_lines(folder))
    return tiny.run('train.py', str(config), *FLAGS, f'--out_dir={out_dir}', *flags, **kwargs)


def losses(out_dir):
    return [row['loss'] for row in tiny.rows(out_dir)]


@pytest.fixture(scope='module')
def latents(saved, tmp_path_factory):
    """The data set plain as latents, the command's output."""
    out = tmp_path_factory.mktemp('latents') / 'plain'
    return out, tiny.run('prepare/latents.py', f'--data={tiny.data_dir()}/plain',
                         f'--vae={saved[1]}', f'--out={out}', '--image_size=16',
                         '--batch_size=5', '--device=cpu').ok()


def test_a_folder_is_trained_resumed_exported_and_drawn_with(saved, tmp_path):
    folder = saved[1]
    train(folder, tmp_path / 'a', '--dit.image_size=8', '--val={"held": "held"}').ok()
    before = diffusers.open_run(folder).model.state_dict()
    after = tiny.weights(tmp_path / 'a')
    different = [key for key in after if (after[key] != before[key].numpy()).any()]
    assert {key.partition('.')[0] for key in different} == {'denoiser'}
    assert after.keys() == before.keys()

    # damaged: the one before it is taken
    for path in (tmp_path / 'a' / 'checkpoints').glob('step_00000002/**/*'):
        if path.is_file():
            path.unlink()
    want = losses(tmp_path / 'a')
    train(folder, tmp_path / 'a').ok()
    assert losses(tmp_path / 'a') == want
    tiny.same_weights(tiny.weights(tmp_path / 'a'), after)
    other = train(folder, tmp_path / 'a', '--unet.norm_eps=1e-4')
    other.refused('unet.norm_eps', 'another out_dir')

    # exported, with the averages
    hub.export_run(str(tmp_path / 'a'), str(tmp_path / 'out'))
    again = diffusers.open_run(str(tmp_path / 'out')).model.state_dict()
    averages = tiny.weights(tmp_path / 'a', 'latest/ema')
    assert all((again[key].numpy() == averages.get(key, after[key])).all() for key in after)

    # both draw the same
    drawn = []
    for run in (tmp_path / 'a', tmp_path / 'out'):
        tiny.run('sample.py', f'--out_dir={run}', '--prompt=the dog', '--guidance=7.5',
                 '--steps=3', '--n=2', f'--grid={run}/grid.png', '--device=cpu').ok()
        drawn.append(np.array(Image.open(run / 'grid_001.png')))
    first, second = drawn
    assert first.shape == (16, 16, 3) and (first == second).all() and first.std() > 5

    # and the folder itself, from a picture
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / 'mask.png')
    tiny.run('sample.py', f'--out_dir={folder}', '--prompt=the dog', '--steps=3', '--n=1',
             f'--grid={tmp_path}/b.png', f'--image={tmp_path}/a/grid_001.png',
             f'--mask={tmp_path}/mask.png', '--device=cpu').ok()


def test_two_ranks_give_the_same_losses(saved, latents, tmp_path):
    """Sharded, from random weights and latents."""
    small = ['--unet.block_out_channels=(8, 8)', '--unet.cross_attention=(True, False)',
             '--unet.num_heads=(1, 1)', '--unet.layers_per_block=1', '--unet.norm_num_groups=4',
             '--clip.depth=1', '--init_from=', f'--data_dir={latents[0].parent}', '--ema=0']
    train(saved[1], tmp_path / 'a', *small).ok()
    train(saved[1], tmp_path / 'b', *small, '--fsdp=0', torchrun=2).ok()
    np.testing.assert_allclose(losses(tmp_path / 'a'), losses(tmp_path / 'b'), rtol=1e-5)


def test_latents_are_moments_and_train_as_pictures_do(saved, latents, tmp_path):
    out, _ = latents
    vae, eyes = diffusers.from_folder(saved[1], 'vae'), Eyes(16)
    theirs, ours = Folder(f'{tiny.data_dir()}/plain'), Folder(str(out))
    assert theirs.sizes.tolist() == ours.sizes.tolist()
    for i in range(int(ours.sizes[0])):
        a, b = theirs.read(0, i), ours.read(0, i)
        moments = np.load(io.BytesIO(b.pop('latents.npy')))
        mean, std = vae.moments(eyes.to_tensor(eyes.pixels(a.pop('png'))[None], 'cpu'))
        expected = torch.cat((mean, std), 1)[0].detach()
        np.testing.assert_allclose(moments, expected, rtol=1e-3, atol=1e-3)
        assert moments.dtype == np.float16 and a == b and theirs.key(0, i) == ours.key(0, i)
    train(saved[1], tmp_path / 'a').ok()
    train(saved[1], tmp_path / 'b', f'--data_dir={out.parent}').ok()
    np.testing.assert_allclose(losses(tmp_path / 'a'), losses(tmp_path / 'b'), rtol=2e-3)


def test_latents_go_on_where_they_were_stopped(saved, latents, tmp_path):
    """A shard that is done is not made again; an unfinished one is; other settings are refused."""
    out, _ = latents
    flags = [f'--data={tmp_path / "in"}', f'--vae={saved[1]}', f'--out={tmp_path / "out"}',
             '--image_size=16']
    (tmp_path / 'in').mkdir()
    sample = {'png': tiny.png(tiny.draw('red disc', 'plain')), 'txt': b'red disc'}
    for shard in range(3):
        samples = [(f'{shard}{i}', sample) for i in range(2)]
        write_tar(tmp_path / 'in' / f'{shard:08d}.tar', samples)
    tiny.run('prepare/latents.py', *flags).ok()
    whole = {path.name: path.read_bytes() for path in (tmp_path / 'out').glob('*.*')}

    # stopped in the second shard, and while a line was written
    done = tmp_path / 'out' / 'done.jsonl'
    done.write_text(''.join(done.read_text().splitlines(True)[:1]) + '{"shard": "0000')
    first = (tmp_path / 'out' / '00000000.tar').stat().st_mtime_ns
    for name in ('00000002.tar', 'manifest.jsonl'):
        (tmp_path / 'out' / name).unlink()
    (tmp_path / 'out' / '00000001.tar').write_bytes(b'half')

    # the second time there is nothing to do
    for _ in range(2):
        tiny.run('prepare/latents.py', *flags).ok()
    assert done.read_bytes() == whole['done.jsonl'], 'the line that was cut is left'
    assert (tmp_path / 'out' / '00000000.tar').stat().st_mtime_ns == first
    for path in (tmp_path / 'out').glob('*.tar'):
        assert path.read_bytes() == whole[path.name]
    assert (tmp_path / 'out' / 'manifest.jsonl').read_bytes() == whole['manifest.jsonl']
    tiny.run('prepare/latents.py', *flags, '--image_size=8').refused('another --out')


def test_samples_without_a_usable_picture_are_named_and_counted(saved, tmp_path):
    good = {'png': tiny.png(tiny.draw('red disc', 'plain')), 'txt': b'red disc',
            'json': b'{"style": "plain"}'}
    samples = [('a', good), ('b', good | {'png': b'no picture'}), ('c', {'txt': b'alone'})]
    (tmp_path / 'in').mkdir()
    write_tar(tmp_path / 'in' / '00000000.tar', samples)
    flags = [f'--data={tmp_path / "in"}', f'--vae={saved[1]}', '--image_size=16']
    out = tiny.run('prepare/latents.py', *flags)
    assert out.code == 1 and '2 of 3 samples' in out.err
    assert ', b: ' in out.err and ', c: ' in out.err
    tiny.run('prepare/latents.py', *flags, '--max_bad_fraction=0.9').ok()
    manifest = (tmp_path / 'in-latents' / 'manifest.jsonl').read_text()
    rows = [json.loads(line) for line in manifest.splitlines()]
    assert rows == [{'shard': '00000000', 'num_sequences': 1}]
    odd = tiny.run('prepare/latents.py', *flags[:2], f'--out={tmp_path}/x', '--image_size=15')
    odd.refused('multiple of 2')
    tiny.run('prepare/latents.py', flags[0], '--vae=nowhere').refused('no vae/config.json')


def test_a_dit_learns_latents(saved, latents, tmp_path):
    """Of pictures, encoded every time, and of prepare/latents.py; the run keeps the
    autoencoder."""
    lines = [*hub.config_lines(saved[1]).splitlines(), 'tokenizer = "bytes"', 'init_from = ""']
    config = tmp_path / 'tiny.py'
    config.write_text('\n'.join(lines))
    tiny_dit = [str(config), *LOOP, '--denoiser=dit', '--dit.image_size=8', '--dit.patch_size=2',
                '--dit.width=32', '--dit.depth=1', '--dit.num_heads=2', '--decoder.width=32',
                '--decoder.depth=1', '--decoder.num_heads=2', '--seq_len=40',
                f'--dit.vae={saved[1]}']
    tiny.run('train.py', *tiny_dit, f'--out_dir={tmp_path}/c').refused('dit.channels=3', 'have 4')
    tiny_dit.append('--dit.channels=4')
    tiny.run('train.py', *tiny_dit, f'--out_dir={tmp_path}/a').ok()
    tiny.run('train.py', *tiny_dit, f'--out_dir={tmp_path}/b',
             f'--data_dir={latents[0].parent}').ok()
    np.testing.assert_allclose(losses(tmp_path / 'a'), losses(tmp_path / 'b'), rtol=2e-3)
    vae = diffusers.from_folder(saved[1], 'vae').state_dict()
    kept = tiny.weights(tmp_path / 'a')
    assert vae
    for key, value in vae.items():
        assert (kept[f'vae.{key}'] == value.numpy()).all(), key
    tiny.run('sample.py', f'--out_dir={tmp_path}/a', '--prompt=red disc', '--steps=2', '--n=1',
             f'--grid={tmp_path}/grid.png', '--device=cpu').ok()
    assert np.array(Image.open(tmp_path / 'grid_000.png')).shape == (16, 16, 3)
    tiny.run('train.py', *tiny_dit, f'--out_dir={tmp_path}/c', '--vae.scaling_factor=0.5').refused(
        'vae.scaling_factor', '(here 0.5)')


def test_settings_that_do_not_go_together(saved, tmp_path):
    def refused(*flags):
        return train(saved[1], tmp_path / 'a', *flags).refused

    refused('--seq_len=40')('seq_len', '77')
    refused('--unet.layers_per_block=1')('unet.layers_per_block=2 (here 1)')
    refused('--tokenizer=bytes', '--clip.vocab_size=99')('clip.vocab_size')
    refused('--denoiser=dit', '--dit.image_size=16')('denoiser=unet')
