"""Demonstrations of MetaWorld v3's scripted experts: states, pictures, sentences and actions.

    python prepare/metaworld.py --out=datasets/metaworld                       # states
    python prepare/metaworld.py --out=datasets/metaworld_64 --size=64          # and pictures

What is executed is the expert's action with Gaussian noise on xyz, what is stored is the expert's
own, clipped to [-1, 1]: so the data show how to come back to the path. Episodes that fail are
thrown away, their seeds too. The seed decides the goal (see robots/metaworld.py), and tests begin
at seed 1,000,000: their goals are none of the demonstrations'. `goal` in the .json is what was
drawn.

States are stored by episodes: `key.lowdim.npy`, a row a time step with fields `proprio` (39) and
`actions` (4); each row is a sample, and training decides how long chunks are. With pictures a
sample is a time step: `key.<camera>.png` (or .jpg), `key.lowdim.npz` with a chunk of
`action_steps` actions, `is_pad` at the episode's end; hand and gripper (4) are what is left of the
state, for all else is to be seen. `key.json` has the instruction, one of those in
robots/metaworld.py that are not held out. stats.json: `python prepare/stats.py --data=...`.

Needs `pip install metaworld packaging`, and EGL for pictures (Debian and Ubuntu: apt install
libegl1 if it is missing).
"""

import itertools
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

# the folder of this file holds a metaworld.py, too
HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or '.').resolve() != HERE]
sys.path.insert(0, str(HERE.parent))
import manifests  # noqa: E402
from configurator import configure  # noqa: E402
from robots import metaworld, simulators  # noqa: E402
from robots.record import samples  # noqa: E402

out = 'datasets/metaworld'      # the folder to be made
tasks = list(metaworld.TASKS)
episodes = 50                   # a task, successful ones
noise = 0.3                     # standard deviation of what is added to the executed xyz
seed = 0                        # of the first episode; the next has the next
linger = 10                     # steps recorded from the success on
max_steps = 500                 # of an episode
size = 0                        # side of the pictures, 0: none
cameras = ['near']              # see CAMERAS in robots/metaworld.py
picture_format = 'png'          # or jpg, a quarter as large and not exact
action_steps = 16               # of a chunk that is stored with a picture
workers = 2                     # processes, a task each


def fail(message, code):
    """End with one line on stderr."""
    print(f'prepare/metaworld.py: {message}', file=sys.stderr)
    sys.exit(code)


def record(env, seed, noise, linger):
    """One episode: proprio (T, P), actions (T, A), {camera: [uint8]}, a dict for .json.

    None: it failed."""
    rng = np.random.default_rng([seed, *env.task.encode()])
    observation = env.reset(seed)
    states, actions, pictures = [], [], {name: [] for name in env.cameras}

    # it ends `linger` steps after its success, so that success is not only seen as padding
    has_succeeded, steps_left = False, linger
    while env.steps < env.max_steps and steps_left:
        action = metaworld.expert_action(env.task, env.state)
        states.append(observation['proprio'])
        actions.append(action)
        for name, frame in observation['pictures'].items():
            pictures[name].append(frame)

        # none on the gripper
        disturbance = np.append(rng.standard_normal(3), 0)
        observation, success = env.step(action + np.float32(noise) * disturbance)
        if has_succeeded:
            steps_left -= 1
        has_succeeded = has_succeeded or success

    if steps_left:
        return None
    about = dict(task=env.task, seed=seed, goal=env.goal.tolist(), fps=env.fps)
    return np.stack(states), np.stack(actions), pictures, about


def shard(task, s):
    """Record a task's episodes into a shard; (its row of the manifest, what is printed of it)."""
    from webdataset import TarWriter
    began, num_tried, num_kept, num_steps = time.time(), 0, 0, 0
    env = simulators.make(task, s['size'], s['cameras'], s['max_steps'])
    path = Path(s['out']) / f'{task}.tar'
    with TarWriter(f'{path}.part', encoder=False, mtime=0.0) as sink:
        for seed in itertools.count(s['seed']):
            if num_kept == s['episodes']:
                break
            # with much noise the experts may never succeed
            if seed >= simulators.TEST_SEED or num_tried > 20 + 10 * num_kept:
                raise RuntimeError(f'{task}: {num_kept} of {num_tried} episodes succeed, with '
                                   f'noise={s["noise"]}')
            num_tried += 1
            episode = record(env, seed, s['noise'], s['linger'])
            if episode is None:
                continue

            # the instructions of a task take turns
            proprio, actions, pictures, about = episode
            each = [dict(instruction=simulators.instruction(task, num_kept))] * len(actions)
            steps = samples(f'{task}-{seed:06d}', proprio, actions, pictures, about, each,
                            s['action_steps'], s['picture_format'])
            for key, members in steps:
                sink.write({'__key__': key, **members})
            num_kept += 1
            num_steps += len(actions)
    os.replace(f'{path}.part', path)
    env.close()

    row = dict(shard=task, num_sequences=num_steps, episodes=num_kept)
    megabytes, seconds = path.stat().st_size / 1e6, time.time() - began
    return row, f'{task}: {num_kept} of {num_tried} episodes, {num_steps} steps, ' \
                f'{megabytes:.1f} MB, {seconds:.1f} s'


def check(s):
    """Refuse settings that make no sense."""
    for task in s['tasks']:
        if task not in metaworld.TASKS:
            fail(f'tasks={s["tasks"]}: {task!r} is none of {", ".join(metaworld.TASKS)}', 2)
    if not 0 <= s['seed'] < simulators.TEST_SEED:
        fail(f'seed={s["seed"]}: demonstrations have seeds from 0 to {simulators.TEST_SEED - 1}, '
             'tests those above', 2)

    counts = s['episodes'], s['workers'], s['max_steps'], s['action_steps'], s['linger']
    is_known = s['picture_format'] in ('png', 'jpg')
    if min(counts) < 1 or s['size'] < 0 or s['noise'] < 0 or not is_known:
        fail('episodes, workers, max_steps, action_steps and linger must be at least 1, size and '
             'noise at least 0, picture png or jpg', 2)


def main(s):
    """The command; s: the settings above."""
    check(s)
    os.makedirs(s['out'], exist_ok=True)

    rows = []
    try:
        manifests.begin(s['out'], 'prepare/metaworld.py')
        if s['workers'] == 1:
            done = (shard(task, s) for task in s['tasks'])
        else:
            pool = ProcessPoolExecutor(s['workers'])
            done = pool.map(shard, s['tasks'], [s] * len(s['tasks']))
        for row, line in done:
            rows.append(row)
            print(line, flush=True)
        manifests.finish(s['out'], rows)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        fail(error, 1)


if __name__ == '__main__':
    main(configure(globals()))
