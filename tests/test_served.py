"""A policy is used as it was trained: the chunk that sample.py serves over its network route, and
that it acts on in rollouts, is what training's own forward says of the same sample."""
import io
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import write_tar

pytest.importorskip('aiohttp')

from test_serve import Robot, free_port  # noqa: E402

import data  # noqa: E402
import hub  # noqa: E402
from diffusion import normal, random_keys  # noqa: E402
from robots.acting import policy_of  # noqa: E402
from shards import Folder  # noqa: E402

NEEDS = 'tasks/policy.py', 'tasks/vla.py'
STEPS, ACTIONS, STATES, SAMPLE_STEPS = 6, 3, 5, 4
SIZES = [f'--action_steps={STEPS}', f'--action_dim={ACTIONS + 1}', f'--proprio_dim={STATES + 2}']
CAMERAS = ["--cameras=['right', 'left']", '--cameras_of={"one": {"left": "left"}}',
           '--image_mean=0.4', '--image_std=0.6']
POLICY = ['--task=policy', '--policy.width=32', '--policy.mlp_dim=32', '--policy.num_heads=2',
          '--policy.depth=1', *tiny.MODEL]
VLA = ['--task=vla', '--vla.width=32', '--vla.mlp_dim=32', *tiny.MODEL, *CAMERAS]
KINDS = {
    'words': [*POLICY, '--policy.encoder=text', '--policy.denoiser=unet',
              '--policy.channels=[16, 32]', '--policy.objective=ddpm', '--normalize=mean_std'],
    'pictures': [*POLICY, *CAMERAS, '--policy.encoder=vlm', '--policy.denoiser=transformer'],
    'vla': VLA,
    'own form': VLA}
# what is told is causal, as no form of ours has it
MINE = """from processor import READ
from robots.samples import form as theirs
def form(sample, p):
    return [(item, READ if isinstance(item, str) else role) for item, role in theirs(sample, p)]
"""


def write_robot(folder, cameras, rng):
    """Eight moments of a robot, told in sentences of unequal length."""
    samples = []
    for i in range(8):
        file = io.BytesIO()
        np.savez(file, proprio=rng.standard_normal(STATES).astype(np.float32),
                 actions=rng.uniform(-2, 2, (STEPS, ACTIONS)), is_pad=np.zeros(STEPS, bool))
        members = {'json': json.dumps(dict(instruction='go' * (i % 3 + 1))).encode(),
                   'lowdim.npz': file.getvalue()}
        for camera in cameras:
            picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            members[f'{camera}.png'] = tiny.png(picture)
        samples.append((f's{i}', members))
    folder.mkdir()
    write_tar(folder / '0.tar', samples)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The data sets two and one, called by their cameras, and statistics of both."""
    folder, rng = tmp_path_factory.mktemp('robots'), np.random.default_rng(0)
    write_robot(folder / 'two', ('left', 'right'), rng)
    write_robot(folder / 'one', ('left',), rng)
    tiny.run('prepare/stats.py', f'--data={folder / "two"},{folder / "one"}',
             f'--out={folder}/stats.json', f'--cache_dir={folder / "cache"}').ok()
    (folder / 'mine.py').write_text(MINE)
    return folder


def samples_of(run, folder, name):
    """The moments of a data set: what training's forward gets, and what a robot would send."""
    shards = Folder(name, str(folder))
    batch = data.Batches([shards], data.InOrder(shards.sizes), run.processor)[np.arange(8)]
    assert not batch['bad']
    observations = []
    for i in range(8):
        members = shards.read(0, i)
        lowdim = np.load(io.BytesIO(members['lowdim.npz']))
        seen = dict(proprio=lowdim['proprio'], instruction=json.loads(members['json'])
                    ['instruction'], seed=3, step=i)
        for camera in ('left', 'right'):
            if f'{camera}.png' in members and run.processor.eyes:
                seen[camera] = run.processor.eyes.pixels(members[f'{camera}.png'])
        observations.append(seen)
    return batch, observations


def trained_chunks(run, batch):
    """Chunks (A, T, D) by the forward that training calls, whatever `model.sample` does."""
    model, said = run.model, []
    inputs = run.inputs(batch)
    lowdim = inputs['lowdim']
    inputs['lowdim'] = lowdim | dict(actions=torch.zeros_like(lowdim['actions']))
    name = 'velocity' if hasattr(model, 'velocity') else 'denoise'
    original = getattr(model, name)
    draws = getattr(model, 'policy', model.config).num_noise_draws
    assert draws == 1

    def heard(*args, **kwargs):
        said.append(original(*args, **kwargs))
        return said[-1]

    def predict(x, t):
        # of a chunk of zeros, noise so large is x
        scale = model.schedule.add_noise(torch.zeros_like(x), torch.ones_like(x), t)
        model(**inputs, noise=x / scale, time=t)
        return said.pop()

    setattr(model, name, heard)
    keys = random_keys(0, 3 * 4096 + torch.arange(8))
    x = normal(keys, lowdim['actions'].shape[1:])
    sampler = 'ddim' if run.settings.get('policy.objective') == 'ddpm' else 'euler'
    with torch.no_grad():
        x = model.schedule.sample(predict, x, SAMPLE_STEPS, sampler)
    setattr(model, name, original)
    x = x.where(lowdim['action_mask'].bool()[:, None], 0)
    states = torch.as_tensor(batch['beside']['proprio'])
    return run.units.decode(x, states)[..., :ACTIONS].numpy()


@pytest.mark.parametrize('kind', KINDS)
def test_the_served_chunk_is_that_of_training(kind, folder, tmp_path, monkeypatch):
    flags = [*KINDS[kind]]
    if kind == 'own form':
        flags.append(f'--processor={folder}/mine.py:form')
    tiny.run('train.py', *flags, *SIZES, '--device=cpu', '--lanes=8', '--workers=0',
             '--batch_size=8', '--seq_len=48', '--max_steps=2', '--lr=1e-3', '--warmup=0',
             f'--data_dir={folder}', '--mix={"two": 1, "one": 1}',
             f'--stats={folder}/stats.json', f'--out_dir={tmp_path / "run"}').ok()
    monkeypatch.setattr('sys.argv', ['sample.py', '--allow_code=true'])
    run = hub.open_run(str(tmp_path / 'run'))
    options = SimpleNamespace(seed=0, sample_steps=SAMPLE_STEPS, sampler='')
    act, asked, chunks = policy_of(run, options), [], []
    for name in ('two', 'one'):
        batch, observations = samples_of(run, folder, name)
        wanted = trained_chunks(run, batch)
        assert wanted.std() > 0.1 and len(np.unique(wanted.round(3))) > 60
        in_rollouts = [seen | dict(task='', pictures={
            camera: seen[camera] for camera in ('left', 'right') if camera in seen})
            for seen in observations]
        np.testing.assert_allclose(act(in_rollouts), wanted, atol=2e-4)
        asked += observations[:3]
        chunks += list(wanted[:3])
    # what test_serve.py says of all policies, that they are served what they act on
    if kind in ('pictures', 'vla'):
        np.testing.assert_allclose(served(tmp_path / 'run', asked), chunks, atol=2e-4)


def served(out_dir, observations):
    """What sample.py answers to a robot."""
    port = free_port()
    process = tiny.Process('sample.py', [
        f'--out_dir={out_dir}', '--device=cpu', f'--sample_steps={SAMPLE_STEPS}',
        f'--serve_policy={port}', '--allow_code=true'])
    try:
        tiny.wait_until(lambda: 'ready' in open(process.files[0]).read(), process)
        robot = Robot('127.0.0.1', port)
        return [robot.act(**seen) for seen in observations]
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(20)
