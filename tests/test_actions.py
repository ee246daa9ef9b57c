"""robots/actions.py, robots/rotations.py beside numpy and scipy; episodes and missing cameras in
batches; prepare/stats.py."""
import io
import json
import subprocess
import sys

import fsspec
import numpy as np
import pytest
import torch
from conftest import ROOT, encode, picture, robot_processor, write_set

from data import Batches, InOrder
from processor import collate
from robots import actions
from robots import rotations as r
from robots.actions import KINDS, Normalizer, Statistics
from shards import Folder
from tokenizer import Bytes

RNG = np.random.default_rng(0)


# -------------------------------------------------------------------------------------------------
# statistics


def test_statistics_are_numpys():
    x = RNG.normal(1e4, 1e-2, (5000, 3)) * [1, 10, 0] + [0, 5, 7]
    stats = Statistics(3)
    for piece in np.split(x, [1, 700, 701, 4000]):
        stats.update(piece.reshape(1, -1, 3))

    # As stats.json has them.
    out = json.loads(json.dumps(stats.to_dict()))
    expected = dict(mean=x.mean(0), std=x.std(0), min=x.min(0), max=x.max(0),
                    q01=np.quantile(x, 0.01, 0), q99=np.quantile(x, 0.99, 0))
    for key, values in expected.items():
        np.testing.assert_allclose(out[key], values, rtol=1e-9, atol=1e-12, err_msg=key)
    assert out['count'] == [5000] * 3 and out['std'][2] == 0


def test_merged_statistics_are_those_of_all():
    x = RNG.standard_normal((3000, 2))
    merged = Statistics(2)
    for piece in np.split(x, [10, 1500]):
        merged.merge(Statistics(2).update(piece))
    merged = merged.to_dict()
    for key, expected in Statistics(2).update(x).to_dict().items():
        np.testing.assert_allclose(merged[key], expected, rtol=1e-9, err_msg=key)


@pytest.mark.parametrize('order', ['random', 'sorted', 'falling', 'sawtooth'])
def test_quantiles_past_the_buffer_are_as_near_as_promised(order):
    n, exact = 100_000, 256
    orders = dict(random=RNG.permutation(n), sorted=np.arange(n), falling=np.arange(n)[::-1],
                  sawtooth=np.arange(n) * 517 % n)
    x = orders[order].astype(np.float64)

    # Two that were fed in turn, merged.
    halves = [Statistics(1, exact), Statistics(1, exact)]
    for i, piece in enumerate(np.array_split(x, 977)):
        halves[i % 2].update(piece[:, None])
    merged = halves[0].merge(halves[1])
    bound = np.log2(n / exact) / exact
    for q in (0.01, 0.1, 0.5, 0.99):
        assert abs(merged.quantile(q)[0] / n - q) <= bound, (order, q)

    # A value of level i stands for 2 ** i.
    levels = merged.levels[0]
    assert sum(level.size << i for i, level in enumerate(levels)) == n, 'what is kept is all'
    assert sum(level.size for level in levels) < 20 * exact
    assert (merged.min[0], merged.max[0], merged.count[0]) == (0, n - 1, n)


def test_padding_and_other_robots_do_not_count():
    x = RNG.standard_normal((40, 4, 3))
    mask = RNG.uniform(size=(40, 4)) < 0.5
    padded = np.where(mask[..., None], x, 1e9)

    # A robot of three numbers, and one of two.
    out = Statistics(5).update(padded, mask).update(x[:, 0, :2]).to_dict()
    both = np.concatenate([x[mask][:, :2], x[:, 0, :2]])
    np.testing.assert_allclose(out['mean'][:2], both.mean(0))
    np.testing.assert_allclose(out['std'][2], x[mask][:, 2].std())
    assert out['count'] == [len(both)] * 2 + [mask.sum(), 0, 0]

    # What was never seen normalises to itself.
    unseen = dict(mean=0, std=1, min=-1, max=1, q01=-1, q99=1)
    for name, value in unseen.items():
        assert out[name][4] == value, name


def test_statistics_of_what_is_not_finite():
    with pytest.raises(ValueError, match='dimension 1'):
        Statistics(2).update([[0, np.nan]])


# -------------------------------------------------------------------------------------------------
# normalisation


def stats_of(x):
    """What stats.json would have of x (N, D)."""
    return Statistics(x.shape[1]).update(x).to_dict()


@pytest.mark.parametrize('kind', KINDS)
def test_normalisation_and_its_inverse(kind):
    # Of very different sizes, the last one constant, and two that only pad.
    x = RNG.normal([0, 100, 1e-4, 3], [1, 5, 1e-5, 0], (2000, 4)).astype(np.float32)
    norm = Normalizer(stats_of(x), kind, dim=6)
    given = torch.tensor(np.pad(x, ((0, 0), (0, 2)), constant_values=9)).reshape(100, 20, 6)
    out = norm(given)
    assert out.shape == given.shape and out.dtype == torch.float32 and out.isfinite().all()
    assert (out[..., 4:] == 9).all()
    assert kind == 'none' or (out[..., 3] == 0).all()
    assert not norm.state_dict()

    # Two ulps of the largest value.
    size = given.abs().amax((0, 1))
    assert ((norm.inverse(out) - given).abs() <= 2 ** -22 * size).all()


def normalized(kind):
    """2000 samples of three dimensions, in fp64: as they are, and normalised."""
    x = RNG.normal([0, 100, 1e-4], [1, 5, 1e-5], (2000, 3)).astype(np.float32)
    return torch.tensor(x), Normalizer(stats_of(x), kind)(torch.tensor(x)).double()


def test_what_each_kind_makes_of_a_data_set():
    ones = torch.ones(3).double()
    _, flat = normalized('mean_std')
    torch.testing.assert_close(flat.mean(0), 0 * ones, rtol=0, atol=1e-3)
    torch.testing.assert_close(flat.std(0, correction=0), ones, rtol=1e-3, atol=0)

    # The ends of the range.
    _, flat = normalized('min_max')
    torch.testing.assert_close(flat.amin(0), -ones, rtol=1e-4, atol=0)
    torch.testing.assert_close(flat.amax(0), ones, rtol=1e-4, atol=0)

    # All but 2 % are inside.
    _, flat = normalized('quantile')
    inside = (flat.abs() <= 1).double().mean(0)
    assert (inside - 0.98).abs().max() < 0.002
    assert (flat.abs() > 1).any(), 'nothing is clipped'

    x, flat = normalized('none')
    assert torch.equal(flat.float(), x)


@pytest.mark.parametrize('kind', KINDS)
def test_constant_dimensions_are_safe_both_ways(kind):
    x = np.full((100, 2), np.float32(0.1)) * np.float32([1, 0])
    norm = Normalizer(stats_of(x), kind)

    # Values that training did not have: neither far away nor lost.
    other = torch.tensor([[0.1, 0.0], [0.3, -2.0]])
    out = norm(other)
    assert out.abs().max() <= 2
    assert (norm.inverse(out) - other).abs().max() < 1e-6


def test_a_gripper_that_rarely_closes():
    x = np.where(np.arange(1000) % 500 == 0, 1.0, -1.0)[:, None]
    norm = Normalizer(stats_of(x), 'quantile')

    # Both of its quantiles are -1.
    assert norm(torch.tensor([[-1.0], [1.0]])).flatten().tolist() == [-1, 1]


def test_masked_dimensions_stay():
    norm = Normalizer(stats_of(RNG.normal(5, 2, (100, 3))), 'mean_std')
    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[True, True, False], [True, False, True]])[:, None]
    out = norm(x, mask)
    assert torch.equal(out[~mask.expand_as(x)], x[~mask.expand_as(x)])
    assert torch.equal(out[0, :, :2], norm(x)[0, :, :2])
    torch.testing.assert_close(norm.inverse(out, mask), x)


def test_statistics_that_do_not_fit():
    stats = stats_of(RNG.standard_normal((9, 3)))
    for wrong in ((stats, 'zscore'), (stats, 'min_max', 2), ({'mean': [0]}, 'mean_std')):
        with pytest.raises(ValueError):
            Normalizer(*wrong)


# -------------------------------------------------------------------------------------------------
# rotations


def scipys():
    """scipy's Rotations: random ones, the identity, half turns, tiny ones."""
    from scipy.spatial.transform import Rotation
    special = [[0, 0, 0], [np.pi, 0, 0], [0, np.pi, 0], [0, 0, -np.pi], [1e-7, 0, 0],
               [0, 3.14159, 0], [1e-20, 0, 0]]
    random = Rotation.random(200, rng=np.random.default_rng(1))
    return Rotation.concatenate([random, Rotation.from_rotvec(special)])


def test_rotations_are_scipys():
    theirs = scipys()
    matrix = torch.tensor(theirs.as_matrix())
    axis_angle = torch.tensor(theirs.as_rotvec())
    quaternion = torch.tensor(theirs.as_quat(scalar_first=True))
    six = r.matrix_to_rotation_6d(matrix)

    # By any way to the same matrix; a quaternion of any length.
    for ours in (r.quaternion_to_matrix(quaternion * 3),
                 r.axis_angle_to_matrix(axis_angle),
                 r.rotation_6d_to_matrix(r.quaternion_to_rotation_6d(quaternion)),
                 r.rotation_6d_to_matrix(r.axis_angle_to_rotation_6d(axis_angle)),
                 r.axis_angle_to_matrix(r.matrix_to_axis_angle(matrix)),
                 r.quaternion_to_matrix(r.matrix_to_quaternion(matrix)),
                 r.axis_angle_to_matrix(r.rotation_6d_to_axis_angle(six)),
                 r.quaternion_to_matrix(r.rotation_6d_to_quaternion(six))):
        torch.testing.assert_close(ours, matrix, rtol=0, atol=1e-12)

    # Conventions. A half turn has two axes.
    assert (r.matrix_to_quaternion(matrix)[:, 0] >= 0).all()
    is_less = axis_angle.norm(dim=-1) < 3.1
    torch.testing.assert_close(r.matrix_to_axis_angle(matrix)[is_less], axis_angle[is_less],
                               rtol=0, atol=1e-12)
    assert torch.equal(six[:, 3:], matrix[:, :, 1]), 'columns'


def test_six_numbers_are_a_rotation_wherever_they_point():
    matrix = r.rotation_6d_to_matrix(torch.randn(3, 50, 6, dtype=torch.float64))
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(3).double().expand_as(matrix))

    # And no mirror.
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(3, 50).double())


def test_relative_actions():
    turns = torch.tensor(scipys().as_matrix()[:8])
    anchor, turn = turns[:2], turns[2:].unflatten(0, (2, 3))

    # Two samples: states of 5 numbers and a rotation, chunks of three actions: xyz, a rotation, a
    # gripper.
    proprio = torch.cat([torch.randn(2, 5).double(), r.matrix_to_rotation_6d(anchor)], 1)
    action = torch.cat([torch.randn(2, 3, 3).double(), r.matrix_to_rotation_6d(turn),
                        torch.randn(2, 3, 1).double()], -1)
    how = dict(pairs=[(0, 2), (1, 3), (2, 4)], rotations=[(3, 5)])
    before = action.clone()
    out = actions.relative(action, proprio, **how)
    torch.testing.assert_close(out[..., :3], action[..., :3] - proprio[:, None, 2:5])
    torch.testing.assert_close(r.rotation_6d_to_matrix(out[..., 3:9]), anchor[:, None].mT @ turn)
    assert torch.equal(out[..., 9], action[..., 9]), 'a gripper stays'
    assert torch.equal(action, before)

    # There and back; without pairs nothing is relative.
    torch.testing.assert_close(actions.absolute(out, proprio, **how), action)
    assert torch.equal(actions.relative(action, proprio), action)


# -------------------------------------------------------------------------------------------------
# episodes: a .lowdim.npy, whose every row is a sample

ROW = np.dtype([('proprio', '<f4', 3), ('actions', '<f4', 2)])


def episode(steps, seed=0, dtype=ROW):
    """Rows of random numbers."""
    rng, rows = np.random.default_rng(seed), np.zeros(steps, dtype)
    for name in dtype.names:
        rows[name] = rng.standard_normal(rows[name].shape)
    return rows


def npy(array):
    """The bytes of a file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays):
    """The bytes of a file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def write_episodes(folder, lengths, dtype=ROW):
    """A data set, an episode a shard."""
    shards = []
    for i, steps in enumerate(lengths):
        words = json.dumps({'instruction': f'do {i}'}).encode()
        shards.append([(f'e{i}', {'lowdim.npy': npy(episode(steps, i, dtype)), 'json': words})])
    return write_set(folder, shards, manifest=False)


def read_all(path, processor):
    """All samples of a data set as one batch."""
    folder = Folder(str(path))
    return Batches([folder], InOrder(folder.sizes), processor)[np.arange(len(folder))]


def test_every_step_of_an_episode_is_a_sample(tmp_path):
    path = write_episodes(tmp_path, [5, 1, 3])
    batch = read_all(path, robot_processor(16, (4, 3, 5)))
    assert not batch['bad']
    assert Folder(str(path)).sizes.tolist() == [5, 1, 3]
    assert Folder(str(path)).key(0, 3) == 'e0[3]'

    # Each with the chunk that begins there, padded at the end.
    low, n = batch['beside'], 0
    for i, steps in enumerate([5, 1, 3]):
        rows = episode(steps, i)
        for t in range(steps):
            ahead = rows['actions'][t:t + 4]
            padded = np.pad(ahead, ((0, 4 - len(ahead)), (0, 1)))
            np.testing.assert_array_equal(low['actions'][n], padded)
            np.testing.assert_array_equal(low['proprio'][n], [*rows['proprio'][t], 0, 0])
            assert low['is_pad'][n].tolist() == [t + k >= steps for k in range(4)]
            sentence = bytes(batch['tokens'][n, 1:5].astype(np.uint8))
            assert sentence == f'do {i}'.encode()
            n += 1

    # And masks that say which numbers the robot has.
    assert n == len(low['rows']) == 9 and (low['rows'] == np.arange(9)).all()
    assert low['action_mask'].all(0).tolist() == [True, True, False]
    assert low['proprio_mask'].sum() == 27


def test_episodes_and_single_steps_in_one_set(tmp_path):
    """Two robots of other sizes, and a state without a word."""
    single = dict(actions=np.ones((2, 1)), is_pad=[False, True], proprio=np.arange(4))
    wide = np.dtype([('actions', '<f8', 3), ('proprio', '<f4', 1), ('reward', '<f4')])
    shard = [('a', {'lowdim.npz': npz(**single)}),
             ('b', {'lowdim.npy': npy(episode(2))}),
             ('c', {'lowdim.npy': npy(episode(2, 7, wide))})]
    path = write_set(tmp_path, [shard], manifest=False)
    batch = read_all(path, robot_processor(8, (2, 3, 4)))
    assert not batch['bad'], batch['bad']

    # One step of a, two of b, two of c.
    low = batch['beside']
    assert low['action_mask'].sum(1).tolist() == [1, 2, 2, 3, 3]
    assert low['proprio_mask'].sum(1).tolist() == [4, 3, 3, 1, 1]
    expected = episode(2, 7, wide)['actions'].astype(np.float32)
    np.testing.assert_array_equal(low['actions'][3], expected)
    whole, end = [False, False], [False, True]
    assert low['is_pad'].tolist() == [end, whole, end, whole, end]


def test_damaged_episodes_are_named(tmp_path):
    nan = episode(3)
    nan['actions'][1] = np.nan
    other = np.zeros(2, [('velocity', '<f4', 2)])
    shard = [('n', {'lowdim.npy': npy(nan)}), ('f', {'lowdim.npy': npy(other)})]
    path = write_set(tmp_path / 'nan', [shard], manifest=False)
    batch = read_all(path, robot_processor(8, (1, 2, 3)))

    # Only the step that is wrong, where the others are right.
    assert len(batch['beside']['rows']) == 2
    keys = [line.split(', ')[1].split(':')[0] for line in batch['bad']]
    assert keys == ['n[1]', 'f[0]', 'f[1]']
    assert 'not finite' in batch['bad'][0] and 'velocity' in batch['bad'][1]

    # What can not even be counted stops the run before it begins.
    cut = npy(episode(3))[:-1]
    for i, data in enumerate((cut, npy(np.zeros((2, 2))), b'no array', npy(episode(0)))):
        path = write_set(tmp_path / f'cut{i}', [[('e', {'lowdim.npy': data})]], manifest=False)
        with pytest.raises(ValueError, match='e, |e:|, e'):
            Folder(str(path))


def test_missing_cameras_are_black_and_not_attended():
    png = encode(picture(3)[..., :3])
    p = robot_processor(32, (2, 2, 3), 16, 4, ('left', 'wrist', 'right'))
    common = {'lowdim.npz': npz(actions=np.ones((2, 2))), 'json': b'{"instruction": "go"}'}

    # Without the wrist's, with all, without any.
    pieces = []
    for views in ({'right.png': png, 'left.png': png, 'other.png': png},
                  {'left.png': png, 'wrist.png': png, 'right.png': png},
                  {}):
        pieces += [piece | {'part': 0, 'position': 0} for piece in p.pieces(views | common)]
    batch = collate(pieces, p)
    is_there = [[True, False, True], [True] * 3, [False] * 3]
    assert batch['beside']['camera_mask'].tolist() == is_there
    assert batch['pictures'].tolist() == [3, 3, 3]
    assert [bool(pixels.any()) for pixels in batch['pixels']] == np.ravel(is_there).tolist()

    # Four tokens a picture: each has its place, those of black ones are in no segment.
    image = batch['tokens'][:, :12].reshape(3, 3, 4) == Bytes().image_id
    assert image.all()
    is_attended = batch['segments'][:, :12].reshape(3, 3, 4).astype(bool).all(2)
    np.testing.assert_array_equal(is_attended, batch['beside']['camera_mask'])
    assert (batch['segments'][:, 12:16] == 1).all()


# -------------------------------------------------------------------------------------------------
# prepare/stats.py


def stats_command(*args):
    """Run prepare/stats.py."""
    command = [sys.executable, str(ROOT / 'prepare' / 'stats.py'), *args]
    return subprocess.run(command, check=False, text=True, capture_output=True, timeout=100)


def test_stats_of_a_data_set(tmp_path):
    a = write_episodes(tmp_path / 'a', [40, 7, 30])
    done = stats_command(f'--data={a}', f'--cache_dir={tmp_path}/cache')
    assert done.returncode == 0, done.stderr

    # Every step once, as numpy counts them.
    rows = np.concatenate([episode(n, i) for i, n in enumerate([40, 7, 30])])
    found = json.loads((a / 'stats.json').read_text())
    for key in ('actions', 'proprio'):
        x = rows[key].astype(np.float64)
        np.testing.assert_allclose(found[key]['mean'], x.mean(0), rtol=1e-9)
        np.testing.assert_allclose(found[key]['std'], x.std(0), rtol=1e-9)
        np.testing.assert_allclose(found[key]['q99'], np.quantile(x, 0.99, 0), rtol=1e-9)
        assert found[key]['max'] == x.max(0).tolist()
        assert found[key]['count'] == [77] * x.shape[1]


def test_stats_of_two_robots(tmp_path):
    a = write_episodes(tmp_path / 'a', [40, 7, 30])
    wide = np.dtype([('proprio', '<f4', 4), ('actions', '<f4', 1)])
    b = write_episodes(tmp_path / 'b', [20], wide)
    done = stats_command(f'--data={a},{b}', f'--out={tmp_path}/both.json',
                         f'--cache_dir={tmp_path}/cache')
    assert done.returncode == 0, done.stderr

    # A dimension is of those that have it.
    both = json.loads((tmp_path / 'both.json').read_text())
    assert both['actions']['count'] == [97, 77]
    assert both['proprio']['count'] == [97, 97, 97, 20]
    rows = [episode(n, i)['actions'][:, 0] for i, n in enumerate([40, 7, 30])]
    first = np.concatenate([*rows, episode(20, 0, wide)['actions'][:, 0]]).astype(np.float64)
    np.testing.assert_allclose(both['actions']['mean'][0], first.mean(), rtol=1e-9)


def test_stats_of_relative_actions(tmp_path):
    a = write_episodes(tmp_path / 'a', [6, 3])
    done = stats_command(f'--data={a}', '--action_steps=4', '--pairs=[[1, 2]]',
                         f'--cache_dir={tmp_path}/cache')
    assert done.returncode == 0, done.stderr

    # Every action of every chunk, less the state at the chunk's beginning.
    relative = []
    for rows in (episode(6, 0), episode(3, 1)):
        for t in range(len(rows)):
            relative += list(rows['actions'][t:t + 4] - [0, rows['proprio'][t, 2]])
    found = json.loads((a / 'stats.json').read_text())
    np.testing.assert_allclose(found['actions']['mean'], np.mean(relative, 0), rtol=1e-5)
    np.testing.assert_allclose(found['actions']['std'], np.std(relative, 0), rtol=1e-5)


def test_stats_of_what_is_wrong(tmp_path):
    a = write_episodes(tmp_path / 'a', [6, 3])
    cache = f'--cache_dir={tmp_path}/cache'
    for args, code, word in ((['--data='], 2, '--data'),
                             ([f'--data={a},{a}'], 2, '--out'),
                             (['--data=gone'], 1, 'gone'),
                             ([f'--data={a}', '--pairs=[[9, 0]]', cache], 1, 'pairs')):
        done = stats_command(*args)
        assert done.returncode == code and word in done.stderr, done.stderr
        assert done.stderr.count('\n') == 1, done.stderr


def test_stats_say_where_they_can_not_be_written_before_they_count(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / 'prepare'))
    import stats
    a, b = (write_episodes(tmp_path / name, [6]) for name in 'ab')
    (tmp_path / 'list.txt').write_text('a/0.tar\nb/0.tar\n')
    shard = next(a.glob('*.tar')).name
    (tmp_path / 'list.txt').write_text(f'a/{shard}\nb/{shard}\n')

    def said(data, out=''):
        """Exit code and what is on stderr."""
        try:
            stats.main(dict(data=str(data), out=str(out), action_steps=1, pairs=[], rotations=[],
                            data_dir='', cache_dir=str(tmp_path / 'cache')))
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    # a read-only set: its statistics can go nowhere there
    (a / 'stats.json.part').mkdir()
    with monkeypatch.context() as m:
        m.setattr(stats, 'collect', None)
        for data, out in ((a, ''), (tmp_path / 'list.txt', ''), (f'{tmp_path}/{{a,b}}', ''),
                          (a, tmp_path), (a, tmp_path / 'gone/stats.json')):
            code, line = said(data, out)
            assert code == 1 and '--out' in line and line.count('\n') == 1, (data, out, line)
    (a / 'stats.json.part').rmdir()

    # where it can, a list and a URL are as good as a folder
    out = tmp_path / 'both.json'
    assert said(tmp_path / 'list.txt', out) == (0, '') and said(f'{tmp_path}/{{a,b}}', out)[0] == 0
    assert json.loads(out.read_text())['actions']['count'] == [12] * 2
    url = f'memory://{tmp_path.name}'
    fsspec.filesystem('memory').put(str(a), url, recursive=True)
    assert said(url) == (0, '')
    with fsspec.open(f'{url}/stats.json') as file:
        assert json.load(file)['actions']['count'] == [6] * 2
    assert said(a) == (0, '') and not list(a.glob('*.part'))
