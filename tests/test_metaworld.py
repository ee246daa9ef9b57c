"""envs.py and prepare/metaworld.py: the real simulator, few steps."""
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import ROOT

import envs
from data import Batches, InOrder
from processor import Processor, open_picture
from shards import Folder
from tokenizer import Bytes

TASKS = ['drawer-close', 'reach']       # the one is done in any way, the other has a goal in the air


def prepare(out, *args):
    command = [sys.executable, str(ROOT / 'prepare' / 'metaworld.py'), f'--out={out}', '--workers=1', *args]
    return subprocess.run(command, check=False, text=True, capture_output=True, timeout=300)


@pytest.fixture(scope='module')
def states(tmp_path_factory):
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


def test_demonstrations(states):
    rows = [json.loads(line) for line in (states / 'manifest.jsonl').read_text().splitlines()]
    assert [row['shard'] for row in rows] == TASKS and [row['episodes'] for row in rows] == [2, 2]
    folder = Folder(str(states))
    batch = Batches([folder], InOrder(folder.sizes), Processor(Bytes(), seq_len=64, lowdim=(16, 4, 39)))[
        np.arange(len(folder))]
    assert not batch['bad'] and len(batch['lowdim']['actions']) == sum(row['num_sequences'] for row in rows)
    assert abs(batch['lowdim']['actions']).max() <= 1
    for task in TASKS:
        for i, (key, members) in enumerate(read(states / f'{task}.tar').items()):
            meta, episode = json.loads(members['json']), Folder(str(states)).read(TASKS.index(task), 0)['lowdim.npy']
            assert meta['task'] == task and key == f'{task}-{meta["seed"]:06d}' and meta['seed'] < envs.TEST_SEED
            assert meta['instruction'] == envs.instruction(task, i)
            if i == 0:      # what is stored is what the expert does, not what was executed
                for row in episode[::9]:
                    np.testing.assert_allclose(row['actions'], envs.expert_action(task, row['proprio'].astype(float)),
                                               atol=1e-4)
                moved = np.diff(episode['proprio'][:, :3], axis=0) * 100
                assert np.std(moved - episode['actions'][:-1, :3]) > 0.05, 'noise was executed'


def test_goals_of_tests_are_in_no_demonstration(states):
    """By the vectors that MetaWorld drew, and by what the state shows."""
    for task in TASKS:
        known = np.array([json.loads(m['json'])['goal'] for m in read(states / f'{task}.tar').values()])
        seeds = [json.loads(m['json'])['seed'] for m in read(states / f'{task}.tar').values()]
        env = envs.make(task)
        for seed, goal in zip(seeds, known):
            env.reset(seed)
            assert (env.goal == goal).all(), 'a seed has one goal'
        drawn, shown = [], []
        for seed in range(envs.TEST_SEED, envs.TEST_SEED + 10):
            seen = env.reset(seed)
            drawn.append(env.goal)
            shown.append(np.concatenate([seen['proprio'][4:7], seen['proprio'][-3:]]))
        assert (abs(np.array(drawn)[:, None] - known).max(-1) > 1e-6).all()
        assert len(np.unique(drawn, axis=0)) == len(np.unique(shown, axis=0)) == 10, 'other seeds, other goals'
        env.close()
    assert (np.array(shown)[:, 3:] == np.array(drawn)[:, 3:].astype(np.float32)).all(), 'the goal is in the state'


def test_the_same_settings_give_the_same_bytes(states, tmp_path):
    assert prepare(tmp_path, "--tasks=['drawer-close']", '--episodes=2', '--linger=3').returncode == 0
    assert (tmp_path / 'drawer-close.tar').read_bytes() == (states / 'drawer-close.tar').read_bytes()


def test_pictures(tmp_path):
    done = prepare(tmp_path, "--tasks=['drawer-close']", '--episodes=1', '--linger=1', '--size=32', '--noise=0',
                   "--cameras=['near', 'corner3']", '--action_steps=5')
    assert done.returncode == 0, done.stderr
    samples = read(tmp_path / 'drawer-close.tar')
    assert len(samples) == Folder(str(tmp_path)).sizes.sum() and all(set(m) == {
        'json', 'lowdim.npz', 'near.png', 'corner3.png'} for m in samples.values())
    env = envs.make('drawer-close', 32, ('near', 'corner3'))
    seen = env.reset(0)
    for t, members in enumerate(samples.values()):
        if t < 3:
            for name in env.cameras:
                np.testing.assert_array_equal(np.array(open_picture(members[f'{name}.png'])), seen['pictures'][name])
            seen, _ = env.step(envs.expert_action(env.task, env.state))
    assert seen['pictures']['near'].std() > 20 and not (seen['pictures']['near'] == seen['pictures']['corner3']).all()
    # the right way up: the floor's grey is above the table in no picture of a camera that hangs upside-down
    p = Processor(Bytes(), 32, 4, '', 64, lowdim=(5, 4, 4), cameras=('near', 'corner3'))
    folder = Folder(str(tmp_path))
    batch = Batches([folder], InOrder(folder.sizes), p)[np.arange(len(folder))]
    assert not batch['bad'] and batch['lowdim']['camera_mask'].all() and len(batch['pixels']) == 2 * len(samples)
    assert batch['lowdim']['is_pad'][-1].tolist() == [False] + [True] * 4
    assert np.array_equal(batch['lowdim']['proprio'][3], seen['proprio']), 'what is to be seen is not told'
    assert np.array_equal(seen['proprio'], np.float32(seen['state'][:4]))
    env.close()


@pytest.mark.parametrize('args, word', [(["--tasks=['fly']"], 'fly'), (['--seed=1000000'], 'seed'),
                                        (['--episodes=0'], 'episodes'), (['--picture_format=gif'], 'png')])
def test_wrong_settings(tmp_path, args, word):
    done = prepare(tmp_path, *args)
    assert done.returncode == 2 and word in done.stderr and done.stderr.count('\n') == 1


def test_rollouts_are_the_same_each_time_and_in_processes():
    episodes = [(task, envs.TEST_SEED + i) for task in TASKS for i in range(2)]
    seen_by_policy = []

    def policy(observations):
        seen_by_policy.append(len(observations))
        return np.repeat(envs.expert(observations), 4, 1)

    make = lambda task: envs.make(task, max_steps=90 if task == 'drawer-close' else 12)     # noqa: E731
    one = envs.rollout(episodes, policy, execute=4, make=make, parallel=3)
    assert max(seen_by_policy) == 3
    two = envs.rollout(episodes, policy, execute=4, make=make, parallel=3, processes=2)
    assert [(r['task'], r['seed'], r['success'], r['steps'], r['goal'].tolist()) for r in one] == [
        (r['task'], r['seed'], r['success'], r['steps'], r['goal'].tolist()) for r in two]
    assert [(r['task'], r['seed']) for r in one] == episodes and [r['success'] for r in one[:2]] == [True, True]
    assert not any(r['success'] for r in one[2:]) and [r['steps'] for r in one[2:]] == [12, 12]


def test_an_environment_forgets_what_was_before():
    """Used again it computes what a new one does, bit for bit; the pictures, too."""
    def play(env, seed):
        out = [env.reset(seed)]
        for _ in range(10):
            out.append(env.step(envs.expert_action(env.task, env.state))[0])
        return np.stack([o['proprio'] for o in out]), np.stack([o['pictures']['hand'] for o in out])

    used = envs.make('reach', 24, ('hand',))
    play(used, 5)
    again, new = play(used, 7), play(envs.make('reach', 24, ('hand',)), 7)
    assert all((a == b).all() for a, b in zip(again, new)) and not (again[0] == play(used, 8)[0]).all()


@pytest.mark.parametrize('task', ['drawer-open', 'window-open', 'reach'])
def test_the_first_observation_is_of_where_things_are(task):
    """As the one after a step on the spot has it, in the state and in the picture."""
    env = envs.make(task)
    for seed in (3, 4):
        first = env.reset(seed)
        places = [x.copy() for x in (env.env.data.xpos, env.env.data.site_xpos)]    # what a picture shows
        after, _ = env.step([0, 0, 0, 0])
        assert abs(first['proprio'] - after['proprio']).max() < 0.01
        assert (first['proprio'][:18] == first['proprio'][18:36]).all()
        assert all(abs(x - y).max() < 0.01 for x, y in zip(places, (env.env.data.xpos, env.env.data.site_xpos)))
    env.close()


def test_controls():
    seen = envs.make('reach', max_steps=20).reset(envs.TEST_SEED)
    assert envs.expert([seen]).shape == (1, 1, 4)
    chosen = envs.random_policy([-1, 0], [1, 0.5], 6, seed=3)
    assert chosen([seen, seen]).shape == (2, 6, 2) and (chosen([seen])[0] == chosen([seen, seen])[1]).all()
    assert not (chosen([seen]) == chosen([seen | {'step': 8}])).any() and (chosen([seen])[..., 1] >= 0).all()
    actions = np.arange(40).reshape(10, 4)
    again = envs.replay({'reach': actions}, 8)
    assert (again([seen])[0] == actions[:8]).all()
    assert again([seen | {'step': 8}])[0].tolist() == actions[8:].tolist() + [[0, 0, 0, 39]] * 6
    assert not envs.zero(4)([seen]).any() and envs.zero(4, 5)([seen] * 2).shape == (2, 5, 4)


def test_what_is_kept_and_errors():
    make = lambda task: envs.make(task, 16, max_steps=5)        # noqa: E731
    policy = lambda seen: np.full((len(seen), 2, 4), 0.1 * seen[0]['step'] + 0.9)       # noqa: E731
    episodes = [('reach', envs.TEST_SEED), ('reach', envs.TEST_SEED + 1)]
    done, other = envs.rollout(episodes, policy, execute=2, make=make, show=episodes[:1])
    blind, *_ = envs.rollout(episodes, policy, execute=2, make=make, keep=episodes, blind=True)
    assert not blind['pictures'] and (blind['proprio'] == done['proprio']).all()
    assert done['pictures']['near'].shape == (6, 16, 16, 3) and done['pictures']['near'].dtype == np.uint8
    assert 'actions' not in other and done['actions'].max() == 1, 'as they are executed: clipped'
    env = make('reach')
    seen = env.reset(envs.TEST_SEED)
    for state, action, picture in zip(done['proprio'], done['actions'], done['pictures']['near']):
        assert (seen['proprio'] == state).all() and (seen['pictures']['near'] == picture).all()
        seen, _ = env.step(action)
    assert (seen['pictures']['near'] == done['pictures']['near'][5]).all() and env.steps == len(done['actions']) == 5
    with pytest.raises(ValueError, match='the policy gave'):
        envs.rollout([('reach', 0)], envs.zero(4, 3), execute=8)
    with pytest.raises(RuntimeError, match='task .fly.'):
        envs.rollout([('fly', 0)], envs.zero(4), processes=2)
    with pytest.raises(ValueError, match='camera'):
        envs.make('reach', 16, ('moon',))


def test_wordings():
    from metaworld import envs as theirs
    from metaworld import policies
    words = [word for _, _, all_words in envs.TASKS.values() for word in all_words]
    assert len(set(words)) == len(words) == 72, 'a sentence says which task it is'
    for task, (environment, expert, all_words) in envs.TASKS.items():
        assert hasattr(theirs, environment) and hasattr(policies, expert)
        given = {envs.instruction(task, i) for i in range(20)}
        held = {envs.instruction(task, i, held_out=True) for i in range(20)}
        assert not given & held and given | held == set(all_words) and len(held) == 3


def test_wilson():
    """Beside the values of Brown, Cai and DasGupta's formula, solved for where |p - share| = z sqrt(p (1 - p) / n)."""
    for successes, trials in ((0, 10), (9, 10), (10, 10), (155, 160)):
        low, high = envs.wilson(successes, trials)
        share = successes / trials
        for edge in (low, high):
            if 0 < edge < 1:
                assert abs(abs(edge - share) - 1.96 * np.sqrt(edge * (1 - edge) / trials)) < 1e-9
        assert 0 <= low <= share <= high <= 1
    assert envs.wilson(0, 0) == (0.0, 1.0)


def test_pusht():
    env = envs.make('pusht', 32)
    seen = env.reset(3)
    assert seen['proprio'].shape == (5,) and seen['pictures']['top'].shape == (32, 32, 3)
    after, success = env.step([200, 300])
    assert not success and not (after['proprio'][:2] == seen['proprio'][:2]).all()
    again = envs.make('pusht', 32)
    assert (again.reset(3)['proprio'] == seen['proprio']).all() and (
        again.step([200, 300])[0]['pictures']['top'] == after['pictures']['top']).all()
    env.close()
    again.close()
