"""Robots in simulators: MetaWorld's tasks and PushT behind one small interface, rollouts, the controls beside a score.

    env = envs.make('reach', size=64)               # size 0: no pictures
    seen = env.reset(seed=1_000_000)                # the seed decides the goal and all that is random
    seen, success = env.step(action)                # seen: see Environment.observe

    results = envs.rollout([('reach', 1_000_000), ...], policy, execute=8)

A policy is a function: a list of N observations -> actions (N, at least `execute`, A), in the environment's own units.
MetaWorld (PyPI metaworld, 39 numbers of state, the goal among them, 4 of action: xyz of the hand by 1 cm, gripper)
draws where object and goal are uniformly from a box of each task (`rand_vec`, 3 or 6 numbers). Here numpy's generator
of the seed draws them anew at each reset, so that other seeds are other goals. Demonstrations have seeds below
TEST_SEED, tests from there on. What an environment computes depends on task and seed alone, bit for bit.
"""
import importlib
import io
import json
import os
import sys
import traceback
import warnings
from collections import OrderedDict

import numpy as np

if sys.platform == 'linux':     # before mujoco is imported: draw without a screen
    os.environ.setdefault('MUJOCO_GL', 'egl')
os.environ.setdefault('LP_NUM_THREADS', '0')        # Mesa's software renderer is the fastest without threads of its own

TEST_SEED = 1_000_000           # first seed of the test episodes
HELD_OUT = 3                    # the last so many wordings of a task are not in demonstrations

# task -> class in metaworld.envs, expert in metaworld.policies, wordings
TASKS = {
    'reach': ('SawyerReachEnvV3', 'SawyerReachV3Policy', (
        'reach the goal', 'move the hand to the target', 'go to the red point', 'bring the gripper to the goal',
        'reach the target position', 'move to the marked point in the air',
        'reach for the target', 'move the gripper to the red dot', 'put the hand where the goal is')),
    'push': ('SawyerPushEnvV3', 'SawyerPushV3Policy', (
        'push the puck to the goal', 'slide the puck to the target', 'push the object to the green point',
        'move the puck across the table to the goal', 'shove the puck onto the target', 'push the puck to the mark',
        'slide the object to the goal', 'push the cylinder to the target', 'get the puck to the green dot by pushing')),
    'drawer-open': ('SawyerDrawerOpenEnvV3', 'SawyerDrawerOpenV3Policy', (
        'open the drawer', 'pull the drawer open', 'pull out the drawer', 'open the green drawer',
        'pull the handle of the drawer', 'slide the drawer open',
        'get the drawer open', 'draw the drawer out', 'make the drawer open')),
    'drawer-close': ('SawyerDrawerCloseEnvV3', 'SawyerDrawerCloseV3Policy', (
        'close the drawer', 'push the drawer shut', 'shut the drawer', 'close the green drawer',
        'push the drawer in', 'slide the drawer closed',
        'get the drawer closed', 'push in the open drawer', 'make the drawer shut')),
    'door-open': ('SawyerDoorEnvV3', 'SawyerDoorOpenV3Policy', (
        'open the door', 'pull the door open', 'swing the door open', 'open the door by its handle',
        'pull the handle of the door', 'open the black door',
        'get the door open', 'turn the door on its hinge', 'make the door open')),
    'button-press-topdown': ('SawyerButtonPressTopdownEnvV3', 'SawyerButtonPressTopdownV3Policy', (
        'press the button', 'press the button from above', 'push the red button down', 'press down on the button',
        'hit the button', 'push down the button on the yellow box',
        'push the button', 'press the red button', 'press the button downwards')),
    'window-open': ('SawyerWindowOpenEnvV3', 'SawyerWindowOpenV3Policy', (
        'open the window', 'slide the window open', 'push the window to the side', 'open the window by its handle',
        'slide the handle of the window', 'push the window open',
        'get the window open', 'slide the window aside', 'make the window open')),
    'pick-place': ('SawyerPickPlaceEnvV3', 'SawyerPickPlaceV3Policy', (
        'pick up the puck and bring it to the goal', 'pick the puck and place it at the target',
        'lift the object to the blue point', 'grasp the puck and carry it to the goal', 'take the puck to the target',
        'pick and place the puck',
        'grab the puck and lift it to the goal', 'pick up the object and move it to the target',
        'carry the puck to the blue dot')),
}
PUSHT = ('push the T onto its outline', 'move the T-shaped block to the target', 'push the block into place',
         'align the T with the goal', 'slide the T to the green T', 'cover the target with the T',
         'push the T to the goal', 'bring the T onto the mark', 'fit the T into the outline')
# our cameras -> MetaWorld's, and where it is moved to: nearer, as in Masked World Models (Seo et al. 2022)
CAMERAS = {'near': ('corner2', (0.75, 0.075, 0.7)), 'hand': ('gripperPOV', ())}


def instruction(task, number=0, held_out=False):
    """A sentence for a task: wording `number` of those of the demonstrations, or of those held out."""
    words = PUSHT if task == 'pusht' else TASKS[task][2]
    words = words[-HELD_OUT:] if held_out else words[:-HELD_OUT]
    return words[number % len(words)]


def make(task, size=0, cameras=('near',), max_steps=0, blind=False):
    """The environment of a task, a key of TASKS or 'pusht'. size: of the pictures, 0 for none. max_steps: of an
    episode, 0 for the environment's own. blind: the pictures are not for who acts. Raises ValueError."""
    if task == 'pusht':
        return PushT(size, max_steps or 300)
    if task not in TASKS:
        raise ValueError(f'task {task!r}: expected one of {", ".join(TASKS)}, pusht')
    return MetaWorld(task, size, cameras, max_steps or 500, blind)


class MetaWorld:
    """A task of MetaWorld v3. size > 0: pictures of the cameras, of those in CAMERAS or of MetaWorld's own. Who sees
    them is told the hand's place and the gripper's, 4 numbers of the 39: all else is to be seen."""
    proprio_dim, hand_dim, action_dim, fps = 39, 4, 4, 80

    def __init__(self, task, size=0, cameras=('near',), max_steps=500, blind=False):
        self.task, self.size, self.max_steps, self.renderer = task, size, max_steps, None
        self.proprio_dim = self.hand_dim if size and not blind else self.proprio_dim
        self.env = getattr(importlib.import_module('metaworld.envs'), TASKS[task][0])()
        self.env._partially_observable = False              # the goal stands in the state
        self.env.__dict__.pop('sawyer_observation_space', None)     # which its bounds would clip to zero
        self.env._set_task_called, self.env._freeze_rand_vec, self.env.seeded_rand_vec = True, False, True
        self.env.max_path_length = max_steps
        model = self.env.model
        known = [model.camera(i).name for i in range(model.ncam)]
        self.cameras = {}
        for name in cameras if size else ():
            theirs, place = CAMERAS.get(name, (name, ()))
            if theirs not in known:
                raise ValueError(f'camera {name!r}: expected one of {", ".join([*CAMERAS, *known])}')
            self.cameras[name] = theirs
            if place:
                model.camera(theirs).pos = place

    def reset(self, seed, pictures=True):
        """Begin the episode of a seed; its first observation."""
        import mujoco
        self.seed, self.steps = seed, 0
        self.env.seed(seed)
        self.env.reset()
        mujoco.mj_kinematics(self.env.model, self.env.data)     # MetaWorld moves drawer, window and goal, and looks at
        self.env._get_obs()                                     # where they were; an observation has the one before
        self.state = self.env._get_obs()
        self.goal = self.env._last_rand_vec.copy()          # what was drawn: place of the object, of the goal
        return self.observe(pictures)

    def step(self, action, pictures=True):
        """action (4,) in [-1, 1], clipped. The observation after it, and whether the task is done."""
        self.action = np.clip(np.asarray(action, np.float32), -1, 1)
        self.state, _, _, _, info = self.env.step(self.action)
        self.steps += 1
        return self.observe(pictures), bool(info['success'])

    def observe(self, pictures=True):
        """proprio fp32 (P,), pictures {camera: uint8 (size, size, 3)}, instruction, task, seed, step; `state`, all
        that the simulator knows, is for the expert."""
        seen = {name: self.picture(name) for name in self.cameras} if pictures else {}
        return dict(proprio=self.state[:self.proprio_dim].astype(np.float32), pictures=seen, state=self.state,
                    instruction=instruction(self.task), task=self.task, seed=self.seed, step=self.steps)

    def picture(self, camera):
        """uint8 (size, size, 3), the right way up. Without shadows, reflections and multisampling: 10 ms, not 135."""
        import mujoco
        model, data, camera = self.env.model, self.env.data, self.cameras[camera]
        if self.renderer is None:
            model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
            model.vis.global_.offwidth = model.vis.global_.offheight = self.size
            self.renderer = mujoco.Renderer(model, self.size, self.size)
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self.renderer.scene.flags[flag] = 0
        self.renderer.update_scene(data, camera)
        out = self.renderer.render()
        upright = data.camera(camera).xmat.reshape(3, 3)[2, 1] >= -1e-6     # corner and corner2 hang upside-down
        return out.copy() if upright else out[::-1, ::-1].copy()

    def close(self):
        if self.renderer is not None:
            self.renderer.close()
        self.renderer = None
        self.env.close()


class PushT:
    """gym-pusht: push a T onto its outline (Diffusion Policy, arXiv 2303.04137). State: agent's and block's places and
    the block's angle; action: where the agent is to go, 2 numbers in pixels of 512."""
    proprio_dim, action_dim, fps, task = 5, 2, 10, 'pusht'

    def __init__(self, size=0, max_steps=300):
        os.environ.setdefault('SDL_VIDEODRIVER', 'dummy')
        os.environ.setdefault('PYGAME_HIDE_SUPPORT_PROMPT', '1')
        from gym_pusht.envs import PushTEnv
        self.size, self.max_steps, self.cameras = size, max_steps, {'top': 'top'} if size else {}
        self.env = PushTEnv(obs_type='state', render_mode='rgb_array', observation_width=size or 96,
                            observation_height=size or 96)

    def reset(self, seed, pictures=True):
        self.seed, self.steps = seed, 0
        self.state = self.env.reset(seed=seed)[0]
        self.goal = self.state.copy()
        return self.observe(pictures)

    def step(self, action, pictures=True):
        self.action = np.clip(np.asarray(action, np.float32), 0, 512)
        self.state, _, done, _, _ = self.env.step(self.action)
        self.steps += 1
        return self.observe(pictures), bool(done)

    def observe(self, pictures=True):
        return dict(proprio=self.state.astype(np.float32), pictures={'top': self.picture('top')} if pictures and
                    self.size else {}, instruction=instruction('pusht'), task='pusht', seed=self.seed, step=self.steps)

    def picture(self, camera):
        return np.ascontiguousarray(self.env._render())     # render() would draw the action on it

    def close(self):
        self.env.close()


# ----------------------------------------------------------------------------------------------------------------------
# rollouts


def rollout(*args, **settings):
    """What `rollouts` gives, in the order of the episodes."""
    return [result for _, result in sorted(rollouts(*args, **settings), key=lambda pair: pair[0])]


def rollouts(episodes, policy, execute=8, make=make, parallel=16, processes=1, keep=(), show=(), blind=False):
    """Run a policy in closed loop: it looks, `execute` of the actions that it gives are done, it looks again.

    episodes: a list of (task, seed); make(task) builds an environment. `parallel` episodes at a time stand before the
    policy as one batch; `processes` step them. The result does not depend on `processes`, and on `parallel` only so far
    as the policy's rounding depends on its batch. An episode ends with its first success.

    Yields (number of the episode, dict of task, seed, success, steps, goal, instruction) as they end; of those in
    `keep`, of (task, seed), also proprio (steps, P) and actions (steps, A) as they were executed; of those in `show`
    pictures {camera: uint8 (steps + 1, size, size, 3)}, too, the last of which shows how it ended. blind: the policy
    needs no pictures. Raises RuntimeError with what went wrong in an environment."""
    pools = [Process(make, parallel) for _ in range(processes)] if processes > 1 else [Pool(make, parallel)]
    trails, running, waiting, keep, show = {}, {}, list(range(len(episodes))), set(keep) | set(show), set(show)
    try:
        while waiting or running:
            begun = waiting[:parallel - len(running)]
            waiting = waiting[len(begun):]
            for k, seen in zip(begun, ask(pools, [
                    (k, 'begin', k, *episodes[k], episodes[k] in show or not blind) for k in begun])):
                running[k], trails[k] = seen, [(None, seen)]
            now = sorted(running)
            given = np.asarray(policy([running[k] for k in now]))
            if len(given) != len(now) or given.ndim != 3 or given.shape[1] < execute:
                raise ValueError(f'the policy gave actions {given.shape} for {len(now)} observations: expected '
                                 f'({len(now)}, {execute} or more, size)')
            for k, (seen, success, done, steps, goal, trail) in zip(now, ask(pools, [
                    (k, 'run', k, actions[:execute], episodes[k] in keep, episodes[k] in show, blind)
                    for k, actions in zip(now, given)])):
                running[k] = seen
                trails[k] += trail
                if done:
                    task, seed = episodes[k]
                    kept = joined(trails[k], episodes[k] in show) if episodes[k] in keep else {}
                    yield k, kept | dict(task=task, seed=seed, success=success, steps=steps, goal=goal,
                                         instruction=seen['instruction'])
                    del running[k], trails[k]
    finally:
        for pool in pools:
            pool.close()


def joined(trail, pictures):
    """[(action, the observation after it)], the first without an action, as arrays."""
    actions, seen = zip(*trail)
    cameras = seen[0]['pictures'] if pictures else ()
    return dict(actions=np.stack(actions[1:]), proprio=np.stack([o['proprio'] for o in seen[:-1]]),
                pictures={name: np.stack([o['pictures'][name] for o in seen]) for name in cameras})


def ask(pools, requests):
    """[(episode, method, arguments ...)] -> answers in the same order; each pool has the episodes of its own."""
    shares = [[r[1:] for r in requests if r[0] % len(pools) == i] for i in range(len(pools))]
    for pool, share in zip(pools, shares):
        pool.send(share)
    answers = [iter(pool.receive()) for pool in pools]
    return [next(answers[r[0] % len(pools)]) for r in requests]


class Pool:
    """Environments of this process, by episode. They are used again: one takes 0.2 s to build, a renderer 0.3 s."""

    def __init__(self, make, most):
        self.make, self.most, self.free, self.busy = make, most, OrderedDict(), {}

    def begin(self, episode, task, seed, pictures):
        kept = next((key for key in self.free if key[0] == task), None)
        env = self.free.pop(kept) if kept else self.make(task)
        self.busy[episode] = env
        return env.reset(seed, pictures)

    def run(self, episode, actions, keep, show, blind):
        env, trail, success = self.busy[episode], [], False
        for i, action in enumerate(actions):
            seen, success = env.step(action, show or (i == len(actions) - 1 and not blind))
            trail += [(env.action, seen)] if keep else []
            done = success or env.steps >= env.max_steps
            if done:
                self.free[env.task, episode] = self.busy.pop(episode)
                if len(self.free) > self.most:
                    self.free.popitem(last=False)[1].close()
                break
        return seen, success, done, env.steps, env.goal, trail

    def send(self, requests):
        self.answers = [getattr(self, method)(*arguments) for method, *arguments in requests]

    def receive(self):
        return self.answers

    def close(self):
        for env in [*self.free.values(), *self.busy.values()]:
            env.close()
        self.free.clear()
        self.busy.clear()


class Process:
    """A Pool in a process of its own. It is forked, since `make` may be any function; it never touches a GPU."""

    def __init__(self, make, most):
        import multiprocessing
        context = multiprocessing.get_context('fork')
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.pipe, make, most), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')     # torch has threads, of which the child uses none
            self.process.start()
        theirs.close()

    def send(self, requests):
        self.pipe.send(requests)

    def receive(self):
        try:
            answers = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f'a process of environments ended, exit code {self.process.exitcode}') from None
        if isinstance(answers, str):
            raise RuntimeError(answers)
        return answers

    def close(self):
        try:
            self.pipe.send(None)        # closing it would not do: later processes have inherited it
        except OSError:                 # it is dead already
            pass
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


def serve(pipe, theirs, make, most):
    """What a Process runs, until it is told to end or its parent is gone."""
    theirs.close()
    pool = Pool(make, most)
    try:
        while True:
            try:
                requests = pipe.recv()
            except EOFError:
                return
            if requests is None:
                return
            try:
                pool.send(requests)
                pipe.send(pool.receive())
            except Exception:       # whatever it is, the one who asked is told
                pipe.send(traceback.format_exc())
    finally:
        pool.close()


# ----------------------------------------------------------------------------------------------------------------------
# episodes as samples of a data set


def samples(key, proprio, actions, pictures, meta, each, steps=16, kind='png'):
    """[(key, {extension: bytes})] of an episode: proprio (T, P), actions (T, A), pictures {camera: T frames}, uint8 (H,
    W, 3). For .json: meta, and each, a list of T dicts with an instruction.

    With pictures a sample is a time step: `key-t.<camera>.<kind>`, `.lowdim.npz` with a chunk of `steps` actions and
    `is_pad` at the episode's end. Without, and with one instruction, it is the episode: `.lowdim.npy`, a row a step."""
    if not pictures and len({m['instruction'] for m in each}) == 1:
        rows = np.zeros(len(actions), [('proprio', '<f4', proprio.shape[1:]), ('actions', '<f4', actions.shape[1:])])
        rows['proprio'], rows['actions'] = proprio, actions
        meta = dict(instruction=each[0]['instruction']) | meta
        return [(key, {'json': json.dumps(meta).encode(), 'lowdim.npy': saved(np.save, rows)})]
    frames, out = {name: iter(frames) for name, frames in pictures.items()}, []
    for t in range(len(actions)):
        chunk = actions[t:t + steps]
        arrays = dict(proprio=proprio[t], actions=np.pad(chunk, ((0, steps - len(chunk)), (0, 0))),
                      is_pad=np.arange(steps) >= len(chunk))
        out.append((f'{key}-{t:06d}', {
            'json': json.dumps(each[t] | meta | dict(frame=t)).encode(), 'lowdim.npz': saved(np.savez, **arrays),
            **{f'{name}.{kind}': encoded(next(theirs), kind) for name, theirs in frames.items()}}))
    return out


def saved(save, *args, **arrays):
    file = io.BytesIO()
    save(file, *args, **arrays)
    return file.getvalue()


def encoded(frame, kind):
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(frame).save(file, {'png': 'PNG', 'jpg': 'JPEG'}[kind], quality=95)
    return file.getvalue()


class Recorder:
    """Writes episodes that `rollouts` has kept as a data set, a shard a task; the manifest comes last, so that a folder
    with one is whole. Raises ValueError if it has one."""

    def __init__(self, folder, action_steps=16):
        self.folder, self.action_steps, self.shards, self.counts = folder, action_steps, {}, {}
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(os.path.join(folder, 'manifest.jsonl')):
            raise ValueError(f'{folder} holds a data set already: name another folder')

    def write(self, result, fps, pictures=True):
        """pictures=False leaves them out."""
        from webdataset import TarWriter
        task, actions = result['task'], result['actions']
        if task not in self.shards:
            self.shards[task] = TarWriter(os.path.join(self.folder, f'{task}.tar'), encoder=False, mtime=0.0)
            self.counts[task] = dict(shard=task, num_sequences=0, episodes=0)
        meta = {k: result[k] for k in ('task', 'seed', 'success')} | dict(goal=result['goal'].tolist(), fps=fps)
        words = [dict(instruction=result['instruction'])] * len(actions)
        for key, members in samples(f'{task}-{result["seed"]}', result['proprio'], actions,
                                    result['pictures'] if pictures else {}, meta, words, self.action_steps):
            self.shards[task].write({'__key__': key, **members})
        self.counts[task]['num_sequences'] += len(actions)
        self.counts[task]['episodes'] += 1

    def close(self):
        """The number of steps written."""
        for sink in self.shards.values():
            sink.close()
        with open(os.path.join(self.folder, 'manifest.jsonl'), 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(row) + '\n' for row in self.counts.values())
        return sum(row['num_sequences'] for row in self.counts.values())


def write_film(path, task, pictures, fps):
    """What the first camera saw, in real time: a.mp4 becomes a_<task>.mp4 of all frames, other names a_<task>.gif of
    every fourth one. The file's name."""
    frames, (name, ending) = next(iter(pictures.values())), os.path.splitext(path)
    if ending == '.mp4':
        import av
        path = f'{name}_{task}.mp4'
        with av.open(path, 'w') as container:
            stream = container.add_stream('libx264', rate=fps, options={'crf': '18'})
            stream.height, stream.width, stream.pix_fmt = *(n - n % 2 for n in frames.shape[1:3]), 'yuv420p'
            for frame in frames:
                picture = np.ascontiguousarray(frame[:stream.height, :stream.width])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode())
        return path
    from PIL import Image
    path = f'{path.removesuffix(".gif")}_{task}.gif'
    first, *rest = (Image.fromarray(frame) for frame in frames[::4])
    first.save(path, save_all=True, append_images=rest, duration=4000 // fps, loop=0)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# controls: policies that a trained one has to beat, and how sure a score is

EXPERTS = {}


def expert(observations):
    """MetaWorld's scripted experts, for execute=1: actions (N, 1, 4), clipped to [-1, 1]."""
    return np.stack([expert_action(seen['task'], seen['state']) for seen in observations])[:, None]


def expert_action(task, state):
    """(4,) fp32 of the 39 numbers of a state."""
    if task not in EXPERTS:
        if task not in TASKS:
            raise ValueError(f'task {task!r} has no expert')
        EXPERTS[task] = getattr(importlib.import_module('metaworld.policies'), TASKS[task][1])()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')         # that it will be clipped
        return np.clip(EXPERTS[task].get_action(state), -1, 1).astype(np.float32)


def replay(demonstrations, execute=8):
    """A policy that looks at nothing: the actions (T, A) of one demonstration, {task: actions}, then its last one with
    the hand at rest (MetaWorld)."""
    def policy(observations):
        out = []
        for seen in observations:
            actions = np.asarray(demonstrations[seen['task']], np.float32)
            rest = np.concatenate([np.zeros(3), actions[-1, 3:]]) if seen['task'] in TASKS else actions[-1]
            chunk = actions[seen['step']:seen['step'] + execute]
            out.append(np.concatenate([chunk, np.tile(rest, (execute - len(chunk), 1))]))
        return np.stack(out)
    return policy


def random_policy(low, high, execute=8, seed=0):
    """Uniform actions, low and high (A,); drawn anew for each task, seed and step."""
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)

    def policy(observations):
        return np.stack([np.random.default_rng([seed, *seen['task'].encode(), seen['seed'], seen['step']]).uniform(
            low, high, (execute, len(low))) for seen in observations])
    return policy


def zero(action_dim, execute=8):
    return lambda observations: np.zeros((len(observations), execute, action_dim), np.float32)


def wilson(successes, trials, z=1.96):
    """Wilson's (1927) score interval of a share: (low, high), 95 % for z = 1.96."""
    if not trials:
        return 0.0, 1.0
    p = successes / trials
    middle, half = p + z * z / (2 * trials), z * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return tuple(float(np.clip((middle + s * half) / (1 + z * z / trials), 0, 1)) for s in (-1, 1))
