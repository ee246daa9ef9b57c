"""Demonstrations of MetaWorld v3's scripted experts: states, pictures, sentences and actions to train a policy on.

    python prepare/metaworld.py --out=datasets/metaworld                       # states
    python prepare/metaworld.py --out=datasets/metaworld_64 --size=64          # and pictures

What is executed is the expert's action with Gaussian noise on xyz, what is stored is the expert's own, clipped to
[-1, 1]: so the data show how to come back to the path. Episodes that fail are thrown away, their seeds too.
The seed decides the goal (see robots/metaworld.py), and tests begin at seed 1,000,000: their goals are none of the
demonstrations'. `goal` in the .json is what was drawn.

States are stored by episodes: `key.lowdim.npy`, a row a time step with fields `proprio` (39) and `actions` (4); each
row is a sample, and training decides how long chunks are. With pictures a sample is a time step: `key.<camera>.png` (or
.jpg), `key.lowdim.npz` with a chunk of `action_steps` actions, `is_pad` at the episode's end; hand and gripper (4) are
what is left of the state, for all else is to be seen. `key.json` has the instruction, one of those in
robots/metaworld.py that are not held out. stats.json: `python prepare/stats.py --data=...`.

Needs `pip install metaworld packaging`, and EGL for pictures (Debian and Ubuntu: apt install libegl1 if it is missing).
"""

import itertools
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path[:] = [p for p in sys.path if os.path.realpath(p or '.') != os.path.dirname(os.path.realpath(__file__))]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of this file holds a metaworld.py, too
from configurator import configure  # noqa: E402
from robots import metaworld, simulators  # noqa: E402
from robots.record import samples  # noqa: E402


def record(env, seed, noise, linger):
    """One episode: proprio (T, P), actions (T, A), pictures {camera: [uint8]}, dict for .json; None: it failed.

    It ends `linger` steps after its success, so that success is not only seen as padding."""
    rng, seen = np.random.default_rng([seed, *env.task.encode()]), env.reset(seed)
    states, actions, pictures, left = [], [], {name: [] for name in env.cameras}, -1
    while env.steps < env.max_steps and left:
        action = metaworld.expert_action(env.task, env.state)
        states.append(seen['proprio'])
        actions.append(action)
        for name, frame in seen['pictures'].items():
            pictures[name].append(frame)
        executed = action + np.float32(noise) * np.append(rng.standard_normal(3), 0)
        seen, success = env.step(executed)
        left = linger if success and left < 0 else left - 1
    if left:
        return None
    return np.stack(states), np.stack(actions), pictures, dict(task=env.task, seed=seed, goal=env.goal.tolist(),
                                                               fps=env.fps)


def shard(task, s):
    """Record a task's episodes into a shard of its own; its manifest row and what is printed of it."""
    from webdataset import TarWriter
    began, tried, kept, steps = time.time(), 0, 0, 0
    env = simulators.make(task, s['size'], s['cameras'], s['max_steps'])
    path = Path(s['out']) / f'{task}.tar'
    with TarWriter(str(path) + '.part', encoder=False, mtime=0.0) as sink:
        for seed in itertools.count(s['seed']):
            if kept == s['episodes']:
                break
            if seed >= simulators.TEST_SEED or tried > 20 + 10 * kept:
                raise RuntimeError(f'{task}: {kept} of {tried} episodes succeed, with noise={s["noise"]}')
            tried += 1
            found = record(env, seed, s['noise'], s['linger'])
            if found is None:
                continue
            words = [dict(instruction=simulators.instruction(task, kept))] * len(found[0])
            for key, members in samples(f'{task}-{seed:06d}', *found, words, s['action_steps'], s['picture']):
                sink.write({'__key__': key, **members})
            kept, steps = kept + 1, steps + len(words)
    os.replace(str(path) + '.part', path)
    env.close()
    return (dict(shard=task, num_sequences=steps, episodes=kept),
            f'{task}: {kept} of {tried} episodes, {steps} steps, {path.stat().st_size / 1e6:.1f} MB, '
            f'{time.time() - began:.1f} s')


def fail(message, code):
    print(f'prepare/metaworld.py: {message}', file=sys.stderr)
    sys.exit(code)


def main(s):
    for task in s['tasks']:
        if task not in metaworld.TASKS:
            fail(f'tasks={s["tasks"]}: {task!r} is none of {", ".join(metaworld.TASKS)}', 2)
    if not 0 <= s['seed'] < simulators.TEST_SEED:
        fail(f'seed={s["seed"]}: demonstrations have seeds from 0 to {simulators.TEST_SEED - 1}, tests those above', 2)
    if min(s['episodes'], s['workers'], s['max_steps'], s['action_steps'], s['linger']) < 1 or s['size'] < 0 or \
            s['noise'] < 0 or s['picture'] not in ('png', 'jpg'):
        fail('episodes, workers, max_steps, action_steps and linger must be at least 1, size and noise at least 0, '
             'picture png or jpg', 2)
    os.makedirs(s['out'], exist_ok=True)
    manifest = Path(s['out']) / 'manifest.jsonl'
    manifest.unlink(missing_ok=True)        # it comes last: a folder with one is whole
    rows = []
    try:
        if s['workers'] == 1:
            done = (shard(task, s) for task in s['tasks'])
        else:
            pool = ProcessPoolExecutor(s['workers'])
            done = pool.map(shard, s['tasks'], [s] * len(s['tasks']))
        for row, line in done:
            rows.append(row)
            print(line, flush=True)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        fail(error, 1)
    manifest.write_text(''.join(json.dumps(row) + '\n' for row in rows))


if __name__ == '__main__':
    out = 'datasets/metaworld'      # the folder to be made
    tasks = list(metaworld.TASKS)
    episodes = 50                   # a task, successful ones
    noise = 0.3                     # standard deviation of what is added to the executed xyz
    seed = 0                        # of the first episode; the next has the next
    linger = 10                     # steps recorded from the success on
    max_steps = 500                 # of an episode
    size = 0                        # side of the pictures, 0: none
    cameras = ['near']              # see robots/metaworld.py, CAMERAS
    picture_format = 'png'          # or jpg, a quarter as large and not exact
    action_steps = 16               # of a chunk that is stored with a picture
    workers = 2                     # processes, a task each
    s = configure(globals())
    main(s | {'picture': s['picture_format']})
