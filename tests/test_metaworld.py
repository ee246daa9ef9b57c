"""robots/ and prepare/metaworld.py: the real simulators, few steps."""
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import ROOT, robot_processor

from data import Batches, InOrder
from pictures import open_picture
from robots import metaworld, rollouts, simulators
from robots.simulators import TEST_SEED
from shards import Folder

# The one is done in any way, the other has a goal in the air.
TASKS = ['drawer-close', 'reach']


def prepare(out, *args):
    """Run prepare/metaworld.py."""
    script = str(ROOT / 'prepare' / 'metaworld.py')
    command = [sys.executable, script, f'--out={out}', '--workers=1', *args]
    return subprocess.run(command, check=False, text=True, capture_output=True, timeout=300)


@pytest.fixture(scope='module')
def states(tmp_path_factory):
    """A data set without pictures."""
    out = tmp_path_factory.mktemp('metaworld')
    done = prepare(out, f'--tasks={TASKS}', '--episodes=2', '--linger=3')
    assert done.returncode == 0, done.stderr
    return out


def read(path):
    """{key: {extension: bytes}}."""
    out = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, ext = member.name.partition('.')
            out.setdefault(key, {})[ext] = tar.extractfile(member).read()
    return out


def read_batch(folder, processor):
    """All samples of a folder as one batch."""
    return Batches([folder], InOrder(folder.sizes), processor)[np.arange(len(folder))]


def test_demonstrations(states):
    # A shard is a task.
    rows = [json.loads(line) for line in (states / 'manifest.jsonl').read_text().splitlines()]
    assert [row['shard'] for row in rows] == TASKS
    assert [row['episodes'] for row in rows] == [2, 2]

    # What training reads of them.
    folder = Folder(str(states))
    batch = read_batch(folder, robot_processor(64, (16, 4, 39)))
    assert not batch['bad']
    assert len(batch['beside']['actions']) == sum(row['num_sequences'] for row in rows)
    assert abs(batch['beside']['actions']).max() <= 1

    # What each episode says of itself.
    for task in TASKS:
        for i, (key, members) in enumerate(read(states / f'{task}.tar').items()):
            meta = json.loads(members['json'])
            assert meta['task'] == task and key == f'{task}-{meta["seed"]:06d}'
            assert meta['seed'] < TEST_SEED
            assert meta['instruction'] == simulators.instruction(task, i)


def test_the_experts_action_is_stored_and_a_noisy_one_executed(states):
    for number, task in enumerate(TASKS):
        # To fp32: the expert saw more digits than are stored.
        episode = Folder(str(states)).read(number, 0)['lowdim.npy']
        for row in episode[::9]:
            action = metaworld.expert_action(task, row['proprio'].astype(float))
            np.testing.assert_allclose(row['actions'], action, atol=1e-4)

        # The hand moves by 1 cm where the action is 1.
        moved = np.diff(episode['proprio'][:, :3], axis=0) * 100
        assert np.std(moved - episode['actions'][:-1, :3]) > 0.05, 'noise was executed'


def test_goals_of_tests_are_in_no_demonstration(states):
    """By the vectors that MetaWorld drew, and by what the state shows."""
    for task in TASKS:
        metas = [json.loads(m['json']) for m in read(states / f'{task}.tar').values()]
        known = np.array([meta['goal'] for meta in metas])

        # What is stored is what the seed draws.
        env = simulators.make(task)
        for meta in metas:
            env.reset(meta['seed'])
            assert (env.goal == meta['goal']).all(), 'a seed has one goal'

        # The object's place and the goal's, in the state.
        drawn, shown = [], []
        for seed in range(TEST_SEED, TEST_SEED + 10):
            proprio = env.reset(seed)['proprio']
            drawn.append(env.goal)
            shown.append(np.concatenate([proprio[4:7], proprio[-3:]]))
        env.close()
        assert (abs(np.array(drawn)[:, None] - known).max(-1) > 1e-6).all()
        assert len(np.unique(drawn, axis=0)) == 10, 'other seeds, other goals'
        assert len(np.unique(shown, axis=0)) == 10, 'and they show'

    # Of reach, the last one.
    goals = np.array(drawn)[:, 3:].astype(np.float32)
    assert (np.array(shown)[:, 3:] == goals).all(), 'the goal is in the state'


def test_the_same_settings_give_the_same_bytes(states, tmp_path):
    done = prepare(tmp_path, "--tasks=['drawer-close']", '--episodes=2', '--linger=3')
    assert done.returncode == 0
    again, first = tmp_path / 'drawer-close.tar', states / 'drawer-close.tar'
    assert again.read_bytes() == first.read_bytes()


def test_pictures(tmp_path):
    done = prepare(tmp_path, "--tasks=['drawer-close']", '--episodes=1', '--linger=1', '--size=32',
                   '--noise=0', "--cameras=['near', 'corner3']", '--action_steps=5')
    assert done.returncode == 0, done.stderr

    # A sample is a step, with a picture of each camera.
    samples = list(read(tmp_path / 'drawer-close.tar').values())
    folder = Folder(str(tmp_path))
    assert len(samples) == folder.sizes.sum()
    for members in samples:
        assert set(members) == {'json', 'lowdim.npz', 'near.png', 'corner3.png'}

    # Without noise the expert does the same again, and the same is seen.
    env = simulators.make('drawer-close', 32, ('near', 'corner3'))
    seen = env.reset(0)
    for members in samples[:3]:
        for name in env.cameras:
            stored = np.array(open_picture(members[f'{name}.png']))
            np.testing.assert_array_equal(stored, seen['pictures'][name])
        seen, _ = env.step(metaworld.expert_action(env.task, env.state))
    near, corner = seen['pictures']['near'], seen['pictures']['corner3']
    assert near.std() > 20 and not (near == corner).all()

    # What a policy is given: who sees is told the hand's place and the gripper's alone.
    p = robot_processor(64, (5, 4, 4), 32, 4, ('near', 'corner3'))
    batch = read_batch(folder, p)
    low = batch['beside']
    assert not batch['bad'] and low['camera_mask'].all()
    assert len(batch['pixels']) == 2 * len(samples)
    assert low['is_pad'][-1].tolist() == [False] + [True] * 4
    assert np.array_equal(low['proprio'][3], seen['proprio']), 'what is to be seen is not told'
    assert np.array_equal(seen['proprio'], np.float32(seen['state'][:4]))
    env.close()


@pytest.mark.parametrize('args, word', [
    (["--tasks=['fly']"], 'fly'),
    (['--seed=1000000'], 'seed'),
    (['--episodes=0'], 'episodes'),
    (['--picture_format=gif'], 'png'),
])
def test_wrong_settings(tmp_path, args, word):
    done = prepare(tmp_path, *args)
    assert done.returncode == 2 and word in done.stderr and done.stderr.count('\n') == 1


def test_rollouts_are_the_same_each_time_and_in_processes():
    episodes = []
    for task in TASKS:
        episodes += [(task, TEST_SEED), (task, TEST_SEED + 1)]
    batch_sizes = []

    # It looks every fourth step, but sees at once what the expert needs.
    def policy(observations):
        batch_sizes.append(len(observations))
        return np.repeat(metaworld.expert(observations), 4, 1)

    # Enough steps to close a drawer, too few to reach.
    def make(task):
        return simulators.make(task, max_steps={'drawer-close': 90, 'reach': 12}[task])

    def outcome(result):
        names = ('task', 'seed', 'success', 'steps')
        return [result[name] for name in names], result['goal'].tolist()

    # Four episodes, three places: the last one waits for the first that ends.
    one = rollouts.rollout(episodes, policy, execute=4, make=make, parallel=3)
    assert max(batch_sizes) == 3
    two = rollouts.rollout(episodes, policy, execute=4, make=make, parallel=3, processes=2)
    assert list(map(outcome, one)) == list(map(outcome, two))

    # Each in its place, and each as it had to end.
    assert [(result['task'], result['seed']) for result in one] == episodes
    assert [result['success'] for result in one] == [True, True, False, False]
    assert one[2]['steps'] == one[3]['steps'] == 12


def test_an_environment_forgets_what_was_before():
    """Used again it computes what a new one does, bit for bit; the pictures, too."""
    def play(env, seed):
        seen = [env.reset(seed)]
        for _ in range(10):
            seen.append(env.step(metaworld.expert_action(env.task, env.state))[0])
        states = np.stack([o['proprio'] for o in seen])
        return states, np.stack([o['pictures']['hand'] for o in seen])

    # The first episode of the used one must leave nothing.
    used = simulators.make('reach', 24, ('hand',))
    play(used, 5)
    states, pictures = play(used, 7)
    new_states, new_pictures = play(simulators.make('reach', 24, ('hand',)), 7)
    assert (states == new_states).all() and (pictures == new_pictures).all()
    assert not (states == play(used, 8)[0]).all(), 'another seed is another episode'


@pytest.mark.parametrize('task', ['drawer-open', 'window-open', 'reach'])
def test_the_first_observation_is_of_where_things_are(task):
    """As the one after a step on the spot has it, in the state and in the picture."""
    # MuJoCo's own places of bodies and sites are what its renderer draws.
    env = simulators.make(task)
    data = env.env.data
    for seed in (3, 4):
        first = env.reset(seed)
        bodies, sites = data.xpos.copy(), data.site_xpos.copy()
        after, _ = env.step([0, 0, 0, 0])
        assert abs(first['proprio'] - after['proprio']).max() < 0.01
        assert abs(bodies - data.xpos).max() < 0.01
        assert abs(sites - data.site_xpos).max() < 0.01

        # The state holds the observation before, too: at first they are the same.
        assert (first['proprio'][:18] == first['proprio'][18:36]).all()
    env.close()


def test_controls():
    seen = simulators.make('reach', max_steps=20).reset(TEST_SEED)
    later = seen | {'step': 8}
    assert metaworld.expert([seen]).shape == (1, 1, 4)

    # Random actions depend on the observation alone, not on its batch.
    chosen = rollouts.random_policy([-1, 0], [1, 0.5], 6, seed=3)
    assert chosen([seen, seen]).shape == (2, 6, 2)
    assert (chosen([seen])[0] == chosen([seen, seen])[1]).all()
    assert not (chosen([seen]) == chosen([later])).any()
    assert (chosen([seen])[..., 1] >= 0).all()

    # Past the demonstration's end the hand rests, and the gripper stays as it was.
    actions = np.arange(40).reshape(10, 4)
    again = rollouts.replay({'reach': actions}, 8)
    assert (again([seen])[0] == actions[:8]).all()
    assert again([later])[0].tolist() == actions[8:].tolist() + [[0, 0, 0, 39]] * 6

    assert not rollouts.zero(4)([seen]).any()
    assert rollouts.zero(4, 5)([seen] * 2).shape == (2, 5, 4)


def make_small(task):
    """With a picture, and soon over."""
    return simulators.make(task, 16, max_steps=5)


def test_what_is_kept():
    def policy(observations):
        # From 0.9 up, and soon past 1.
        return np.full((len(observations), 2, 4), 0.1 * observations[0]['step'] + 0.9)

    episodes = [('reach', TEST_SEED), ('reach', TEST_SEED + 1)]
    how = dict(execute=2, make=make_small)
    shown, other = rollouts.rollout(episodes, policy, **how, show=episodes[:1])
    blind, *_ = rollouts.rollout(episodes, policy, **how, keep=episodes, blind=True)
    assert not blind['pictures'] and (blind['proprio'] == shown['proprio']).all()

    # Five steps, and a picture of how it ended.
    pictures, actions = shown['pictures']['near'], shown['actions']
    assert pictures.shape == (6, 16, 16, 3) and pictures.dtype == np.uint8
    assert 'actions' not in other and actions.max() == 1, 'as they are executed: clipped'

    # To do the same again is to see the same again.
    env = make_small('reach')
    seen = env.reset(TEST_SEED)
    for state, action, picture in zip(shown['proprio'], actions, pictures):
        assert (seen['proprio'] == state).all()
        assert (seen['pictures']['near'] == picture).all()
        seen, _ = env.step(action)
    assert (seen['pictures']['near'] == pictures[5]).all()
    assert env.steps == len(actions) == 5


def test_errors_are_told():
    # A policy's fault, one in a process, one before the first step.
    with pytest.raises(ValueError, match='the policy gave'):
        rollouts.rollout([('reach', 0)], rollouts.zero(4, 3), execute=8)
    with pytest.raises(RuntimeError, match='task .fly.'):
        rollouts.rollout([('fly', 0)], rollouts.zero(4), processes=2)
    with pytest.raises(ValueError, match='camera'):
        simulators.make('reach', 16, ('moon',))


def test_a_process_that_dies_is_told():
    """Not waited for."""
    def make(task):
        # At once, as a fault of a simulator does it: Python has no word in that.
        os._exit(3)

    with pytest.raises(RuntimeError, match='a process of environments ended, exit code 3'):
        rollouts.rollout([('reach', 0)], rollouts.zero(4), make=make, processes=2)


def test_wordings():
    from metaworld import envs, policies
    every = []
    for task, (environment, expert, words) in metaworld.TASKS.items():
        assert hasattr(envs, environment) and hasattr(policies, expert)
        every += words

        # Those of the demonstrations, those held out, and no third kind.
        given = {simulators.instruction(task, i) for i in range(20)}
        held = {simulators.instruction(task, i, held_out=True) for i in range(20)}
        assert len(held) == 3 and not given & held and given | held == set(words)
    assert len(set(every)) == len(every) == 72, 'a sentence says which task it is'


def test_wilson():
    """Beside Brown, Cai and DasGupta's formula, solved for where |p - share| = z sqrt(p (1 - p) /
    n)."""
    for successes, trials in ((0, 10), (9, 10), (10, 10), (155, 160)):
        low, high = rollouts.wilson(successes, trials)
        share = successes / trials
        for edge in (low, high):
            # At 0 and 1 the edge is cut off.
            if 0 < edge < 1:
                distance = 1.96 * np.sqrt(edge * (1 - edge) / trials)
                assert abs(abs(edge - share) - distance) < 1e-9
        assert 0 <= low <= share <= high <= 1
    assert rollouts.wilson(0, 0) == (0.0, 1.0)


def test_pusht():
    # It sees its picture and the numbers, too.
    env = simulators.make('pusht', 32)
    seen = env.reset(3)
    assert seen['proprio'].shape == (5,) and seen['pictures']['top'].shape == (32, 32, 3)
    assert seen['instruction'] == simulators.instruction('pusht')
    after, success = env.step([200, 300])
    assert not success and not (after['proprio'][:2] == seen['proprio'][:2]).all()

    # The same seed, the same action: the same picture.
    again = simulators.make('pusht', 32)
    assert (again.reset(3)['proprio'] == seen['proprio']).all()
    after_again, _ = again.step([200, 300])
    assert (after_again['pictures']['top'] == after['pictures']['top']).all()
    env.close()
    again.close()
