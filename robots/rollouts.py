"""Rollouts: a policy in closed loop, many episodes at a time; the controls that it has to beat.

    results = rollouts.rollout([('reach', 1_000_000), ...], policy, execute=8)

A policy is a function: a list of N observations -> actions (N, H, A), H at least `execute`, in the
environment's own units.
Axes: N observations, H actions of a chunk, A numbers of an action, P of a state (proprio).
"""
import traceback
import warnings
from collections import OrderedDict

import numpy as np

from robots import metaworld
from robots.simulators import make


def rollout(*args, **settings):
    """What `rollouts` gives, in the order of the episodes."""
    numbered = sorted(rollouts(*args, **settings), key=lambda pair: pair[0])
    return [result for _, result in numbered]


def rollouts(episodes, policy, execute=8, make=make, parallel=16, processes=1, keep=(), show=(),
             blind=False):
    """A policy looks, `execute` of the actions that it gives are done, it looks again.

    episodes: a list of (task, seed); make(task) builds an environment. `parallel` episodes at a
    time stand before the policy as one batch; `processes` step them. The result does not depend on
    `processes`, and on `parallel` only so far as the policy's rounding depends on its batch. An
    episode ends with its first success.

    Yields (number of the episode, dict of task, seed, success, steps, goal, instruction) as they
    end; of those in `keep`, of (task, seed), also proprio (steps, P) and actions (steps, A) as
    they were executed; of those in `show` pictures {camera: uint8 (steps + 1, size, size, 3)},
    too, the last of which shows how it ended. blind: the policy needs no pictures. Raises
    RuntimeError with what went wrong in an environment."""
    # What is shown is kept, too.
    show = set(show)
    keep = set(keep) | show
    pools = open_pools(make, parallel, processes)
    waiting = list(range(len(episodes)))

    # Of those that run, by number: the newest observation, and what is kept of the way to it.
    newest, trails = {}, {}
    try:
        while waiting or newest:
            # The next ones take the places that are free.
            free = parallel - len(newest)
            begun, waiting = waiting[:free], waiting[free:]
            for k, seen in zip(begun, begin(pools, episodes, begun, show, blind)):
                newest[k], trails[k] = seen, [(None, seen)]

            # One batch of all that run, in an order that no process decides.
            running = sorted(newest)
            actions = np.asarray(policy([newest[k] for k in running]))
            is_chunks = actions.ndim == 3 and actions.shape[1] >= execute
            if len(actions) != len(running) or not is_chunks:
                raise ValueError(
                    f'the policy gave actions {actions.shape} for {len(running)} observations: '
                    f'expected ({len(running)}, {execute} or more, size)')

            # Its actions are done, all environments at the same time.
            requests = []
            for k, chunk in zip(running, actions[:, :execute]):
                is_kept, is_shown = episodes[k] in keep, episodes[k] in show
                requests.append((k, 'run', k, chunk, is_kept, is_shown, blind))
            for k, stretch in zip(running, ask(pools, requests)):
                newest[k] = stretch.pop('seen')
                trails[k] += stretch.pop('trail')

                # The answer holds success, steps and goal besides.
                if stretch.pop('is_done'):
                    seen, trail = newest.pop(k), trails.pop(k)
                    yield k, ended(episodes[k], seen, trail, keep, show) | stretch
    finally:
        for pool in pools:
            pool.close()


def begin(pools, episodes, numbers, show, blind):
    """The first observations of episodes."""
    requests = []
    for k in numbers:
        task, seed = episodes[k]
        with_pictures = episodes[k] in show or not blind
        requests.append((k, 'begin', k, task, seed, with_pictures))
    return ask(pools, requests)


def ended(episode, seen, trail, keep, show):
    """What is told of an episode; how it ended is added to it."""
    out = {}
    if episode in keep:
        out = joined(trail, episode in show)
    task, seed = episode
    return out | dict(task=task, seed=seed, instruction=seen['instruction'])


def joined(trail, pictures):
    """[(action, the observation after it)], the first without an action, as arrays."""
    actions, seen = zip(*trail)
    views = {}
    if pictures:
        for name in seen[0]['pictures']:
            views[name] = np.stack([o['pictures'][name] for o in seen])

    # A state stands beside the action that followed it: the last one has none.
    states = np.stack([o['proprio'] for o in seen[:-1]])
    return dict(actions=np.stack(actions[1:]), proprio=states, pictures=views)


# -------------------------------------------------------------------------------------------------
# who steps the environments: this process, or others


def open_pools(make, parallel, processes):
    """A Pool, or as many Processes."""
    if processes > 1:
        return [Process(make, parallel) for _ in range(processes)]
    return [Pool(make, parallel)]


def ask(pools, requests):
    """[(episode, method, arguments ...)] -> answers in the same order; each pool has the episodes
    of its own."""
    shares = [[] for _ in pools]
    for episode, *request in requests:
        shares[episode % len(pools)].append(request)

    # All work at the same time: nobody is waited for before everybody has been asked.
    for pool, share in zip(pools, shares):
        pool.send(share)
    answers = [iter(pool.receive()) for pool in pools]
    return [next(answers[episode % len(pools)]) for episode, *_ in requests]


class Pool:
    """Environments of this process, by episode. They are used again: one takes 0.2 s to build, a
    renderer 0.3 s."""

    def __init__(self, make, most):
        self.make, self.most = make, most
        self.free = OrderedDict()       # (task, its last episode) -> environment, the oldest first
        self.busy = {}                  # episode -> environment

    def begin(self, episode, task, seed, pictures):
        """The first observation of an episode."""
        # Any that did this task before will do: a reset forgets all.
        key = next((key for key in self.free if key[0] == task), None)
        if key:
            env = self.free.pop(key)
        else:
            env = self.make(task)
        self.busy[episode] = env
        return env.reset(seed, pictures)

    def run(self, episode, actions, keep, show, blind):
        """Do actions until the episode ends. The last observation, whether the episode is done,
        how it stands, and what is kept of it."""
        env, trail, success = self.busy[episode], [], False
        last = len(actions) - 1
        for i, action in enumerate(actions):
            # A policy sees the last observation only: the others have pictures only for a film.
            seen, success = env.step(action, show or (i == last and not blind))
            if keep:
                trail.append((env.action, seen))
            is_done = success or env.steps >= env.max_steps
            if is_done:
                self.release(episode)
                break
        return dict(seen=seen, trail=trail, is_done=is_done, success=success, steps=env.steps,
                    goal=env.goal)

    def release(self, episode):
        """Its environment is free for another one of the task; the oldest go if there are many."""
        env = self.busy.pop(episode)
        self.free[env.task, episode] = env
        if len(self.free) > self.most:
            _, oldest = self.free.popitem(last=False)
            oldest.close()

    def send(self, requests):
        """Answer [(method, arguments ...)]."""
        self.answers = [getattr(self, method)(*arguments) for method, *arguments in requests]

    def receive(self):
        """The answers to what was sent."""
        return self.answers

    def close(self):
        """Close all environments."""
        for env in [*self.free.values(), *self.busy.values()]:
            env.close()
        self.free.clear()
        self.busy.clear()


class Process:
    """A Pool in a process of its own, which never touches a GPU."""

    def __init__(self, make, most):
        import multiprocessing

        # Forked, since `make` may be any function, a lambda, too.
        context = multiprocessing.get_context('fork')

        # A daemon: if this process dies without a word, it does not stay.
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.pipe, make, most),
                                       daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')     # torch has threads, of which the child uses none
            self.process.start()
        theirs.close()

    def send(self, requests):
        """Begin with the answers to [(method, arguments ...)]."""
        self.pipe.send(requests)

    def receive(self):
        """The answers to what was sent. Raises RuntimeError."""
        try:
            answers = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError('a process of environments ended, exit code '
                               f'{self.process.exitcode}') from None

        # A text is what went wrong there.
        if isinstance(answers, str):
            raise RuntimeError(answers)
        return answers

    def close(self):
        """End it, or kill it if it does not listen."""
        try:
            # To close the pipe would not do: processes that came later have inherited it.
            self.pipe.send(None)
        except OSError:                 # it is dead already
            pass

        # An environment may be in the middle of a long step.
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


def serve(pipe, theirs, make, most):
    """What a Process runs, until it is told to end or its parent is gone."""
    theirs.close()                      # while it is open here, the parent's end is not seen
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
            except Exception:           # whatever it is, the one who asked is told
                pipe.send(traceback.format_exc())
    finally:
        pool.close()


# -------------------------------------------------------------------------------------------------
# controls: policies that a trained one has to beat, and how sure a score is


def replay(demonstrations, execute=8):
    """A policy that looks at nothing: the actions (T, A) of one demonstration, {task: actions},
    then its last one with the hand at rest (MetaWorld)."""
    def actions_of(seen):
        actions = np.asarray(demonstrations[seen['task']], np.float32)
        chunk = actions[seen['step']:seen['step'] + execute]

        # MetaWorld's xyz is a movement, and none is rest. PushT's is a place to stay at.
        rest = actions[-1]
        if seen['task'] in metaworld.TASKS:
            rest = np.concatenate([np.zeros(3), actions[-1, 3:]])
        return np.concatenate([chunk, np.tile(rest, (execute - len(chunk), 1))])

    def policy(observations):
        return np.stack([actions_of(seen) for seen in observations])
    return policy


def random_policy(low, high, execute=8, seed=0):
    """Uniform actions, low and high (A,); drawn anew for each task, seed and step."""
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)

    # Never from what was drawn before: neither the batch nor the order decides.
    def actions_of(seen):
        key = [seed, *seen['task'].encode(), seen['seed'], seen['step']]
        return np.random.default_rng(key).uniform(low, high, (execute, len(low)))

    def policy(observations):
        return np.stack([actions_of(seen) for seen in observations])
    return policy


def zero(action_dim, execute=8):
    """A policy that does nothing."""
    return lambda observations: np.zeros((len(observations), execute, action_dim), np.float32)


def wilson(successes, trials, z=1.96):
    """Wilson's (1927) score interval of a share: (low, high), 95 % for z = 1.96."""
    if not trials:
        return 0.0, 1.0
    p = successes / trials
    middle = p + z * z / (2 * trials)
    half = z * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))

    # Rounding may end a hair outside of what a share can be.
    divisor = 1 + z * z / trials
    low = np.clip((middle - half) / divisor, 0, 1)
    high = np.clip((middle + half) / divisor, 0, 1)
    return float(low), float(high)
