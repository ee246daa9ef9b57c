"""actions.py beside numpy and scipy; episodes and missing cameras in batches; prepare/stats.py."""
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, encode, picture, write_set

import actions
from actions import KINDS, Normalizer, Statistics
from data import Batches, InOrder
from processor import Processor, collate
from shards import Folder
from tokenizer import Bytes

RNG = np.random.default_rng(0)


def test_statistics_are_numpys():
    x = RNG.normal(1e4, 1e-2, (5000, 3)) * [1, 10, 0] + [0, 5, 7]
    pieces = np.split(x, [1, 700, 701, 4000])
    stats = Statistics(3)
    for piece in pieces:
        stats.update(piece.reshape(1, -1, 3))
    out = json.loads(json.dumps(stats.to_dict()))
    for key, expected in (('mean', x.mean(0)), ('std', x.std(0)), ('min', x.min(0)), ('max', x.max(0)),
                          ('q01', np.quantile(x, 0.01, 0)), ('q99', np.quantile(x, 0.99, 0))):
        np.testing.assert_allclose(out[key], expected, rtol=1e-9, atol=1e-12, err_msg=key)
    assert out['count'] == [5000] * 3 and out['std'][2] == 0


def test_merged_statistics_are_those_of_all():
    x = RNG.standard_normal((3000, 2))
    parts = [Statistics(2).update(piece) for piece in np.split(x, [10, 1500])]
    merged = Statistics(2).merge(parts[0]).merge(parts[1]).merge(parts[2]).to_dict()
    for key, expected in Statistics(2).update(x).to_dict().items():
        np.testing.assert_allclose(merged[key], expected, rtol=1e-9, err_msg=key)


@pytest.mark.parametrize('order', ['random', 'sorted', 'falling', 'sawtooth'])
def test_quantiles_past_the_buffer_are_as_near_as_promised(order):
    n, exact = 100_000, 256
    x = {'random': RNG.permutation(n), 'sorted': np.arange(n), 'falling': np.arange(n)[::-1],
         'sawtooth': np.arange(n) * 517 % n}[order].astype(np.float64)
    halves = [Statistics(1, exact), Statistics(1, exact)]
    for i, piece in enumerate(np.array_split(x, 977)):
        halves[i % 2].update(piece[:, None])
    merged = halves[0].merge(halves[1])
    bound = np.log2(n / exact) / exact
    for q in (0.01, 0.1, 0.5, 0.99):
        assert abs(merged.quantile(q)[0] / n - q) <= bound, (order, q)
    assert sum(level.size << i for i, level in enumerate(merged.levels[0])) == n, 'what is kept stands for all'
    assert sum(level.size for level in merged.levels[0]) < 20 * exact
    assert (merged.min[0], merged.max[0], merged.count[0]) == (0, n - 1, n)


def test_padding_and_other_robots_do_not_count():
    x = RNG.standard_normal((40, 4, 3))
    mask = RNG.uniform(size=(40, 4)) < 0.5
    stats = Statistics(5).update(np.where(mask[..., None], x, 1e9), mask).update(x[:, 0, :2])
    out = stats.to_dict()
    both = np.concatenate([x[mask][:, :2], x[:, 0, :2]])
    np.testing.assert_allclose(out['mean'][:2], both.mean(0))
    np.testing.assert_allclose(out['std'][2], x[mask][:, 2].std())
    assert out['count'] == [len(both)] * 2 + [mask.sum(), 0, 0]
    assert [out[k][4] for k in ('mean', 'std', 'min', 'max', 'q01', 'q99')] == [0, 1, -1, 1, -1, 1]
    with pytest.raises(ValueError, match='dimension 1'):
        Statistics(2).update([[0, np.nan]])


def stats_of(x):
    return Statistics(x.shape[1]).update(x).to_dict()


@pytest.mark.parametrize('kind', KINDS)
def test_normalisation_and_its_inverse(kind):
    x = RNG.normal([0, 100, 1e-4, 3], [1, 5, 1e-5, 0], (2000, 4)).astype(np.float32)
    norm = Normalizer(stats_of(x), kind, dim=6)
    given = torch.tensor(np.pad(x, ((0, 0), (0, 2)), constant_values=9)).reshape(100, 20, 6)
    out = norm(given)
    assert out.shape == given.shape and out.dtype == torch.float32 and out.isfinite().all()
    size = given.abs().amax((0, 1))
    assert ((norm.inverse(out) - given).abs() <= 2 ** -22 * size).all(), 'two ulps of the largest value'
    assert (out[..., 4:] == 9).all() and (kind == 'none' or (out[..., 3] == 0).all())
    flat = out.reshape(-1, 6)[:, :3].double()
    if kind == 'mean_std':
        torch.testing.assert_close(flat.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-3)
        torch.testing.assert_close(flat.std(0, correction=0), torch.ones(3).double(), rtol=1e-3, atol=0)
    elif kind == 'min_max':
        torch.testing.assert_close(flat.aminmax(dim=0).min, -torch.ones(3).double(), rtol=1e-4, atol=0)
        torch.testing.assert_close(flat.aminmax(dim=0).max, torch.ones(3).double(), rtol=1e-4, atol=0)
    elif kind == 'quantile':
        inside = (flat.abs() <= 1).double().mean(0)
        assert (inside - 0.98).abs().max() < 0.002 and (flat.abs() > 1).any(), 'nothing is clipped'
    else:
        assert torch.equal(out, given)
    assert not norm.state_dict()


@pytest.mark.parametrize('kind', KINDS)
def test_constant_dimensions_are_safe_both_ways(kind):
    x = np.full((100, 2), np.float32(0.1)) * np.float32([1, 0])
    norm = Normalizer(stats_of(x), kind)
    other = torch.tensor([[0.1, 0.0], [0.3, -2.0]])
    out = norm(other)
    assert out.abs().max() <= 2 and (norm.inverse(out) - other).abs().max() < 1e-6


def test_a_gripper_that_rarely_closes():
    x = np.where(np.arange(1000) % 500 == 0, 1.0, -1.0)[:, None]
    norm = Normalizer(stats_of(x), 'quantile')
    assert norm(torch.tensor([[-1.0], [1.0]])).flatten().tolist() == [-1, 1]


def test_masked_dimensions_stay():
    norm = Normalizer(stats_of(RNG.normal(5, 2, (100, 3))), 'mean_std')
    x, mask = torch.randn(2, 4, 3), torch.tensor([[True, True, False], [True, False, True]])[:, None]
    out = norm(x, mask)
    assert torch.equal(out[~mask.expand_as(x)], x[~mask.expand_as(x)]) and torch.equal(out[0, :, :2], norm(x)[0, :, :2])
    torch.testing.assert_close(norm.inverse(out, mask), x)


def test_statistics_that_do_not_fit():
    stats = stats_of(RNG.standard_normal((9, 3)))
    for wrong in (lambda: Normalizer(stats, 'zscore'), lambda: Normalizer(stats, 'min_max', 2),
                  lambda: Normalizer({'mean': [0]}, 'mean_std')):
        with pytest.raises(ValueError):
            wrong()


# ----------------------------------------------------------------------------------------------------------------------


def rotations():
    """scipy's Rotations: random ones, the identity, half turns, tiny ones."""
    from scipy.spatial.transform import Rotation
    special = [[0, 0, 0], [np.pi, 0, 0], [0, np.pi, 0], [0, 0, -np.pi], [1e-7, 0, 0], [0, 3.14159, 0], [1e-20, 0, 0]]
    return Rotation.concatenate([Rotation.random(200, rng=np.random.default_rng(1)), Rotation.from_rotvec(special)])


def test_rotations_are_scipys():
    theirs = rotations()
    matrix = torch.tensor(theirs.as_matrix())
    quaternion, axis_angle = torch.tensor(theirs.as_quat(scalar_first=True)), torch.tensor(theirs.as_rotvec())
    close = dict(rtol=0, atol=1e-12)
    for ours in (actions.quaternion_to_matrix(quaternion * 3), actions.axis_angle_to_matrix(axis_angle),
                 actions.rotation_6d_to_matrix(actions.quaternion_to_rotation_6d(quaternion)),
                 actions.rotation_6d_to_matrix(actions.axis_angle_to_rotation_6d(axis_angle)),
                 actions.axis_angle_to_matrix(actions.matrix_to_axis_angle(matrix)),
                 actions.quaternion_to_matrix(actions.matrix_to_quaternion(matrix)),
                 actions.axis_angle_to_matrix(actions.rotation_6d_to_axis_angle(actions.matrix_to_rotation_6d(matrix))),
                 actions.quaternion_to_matrix(actions.rotation_6d_to_quaternion(
                     actions.matrix_to_rotation_6d(matrix)))):
        torch.testing.assert_close(ours, matrix, **close)
    assert (actions.matrix_to_quaternion(matrix)[:, 0] >= 0).all()
    small = axis_angle.norm(dim=-1) < 3.1
    torch.testing.assert_close(actions.matrix_to_axis_angle(matrix)[small], axis_angle[small], **close)
    assert torch.equal(actions.matrix_to_rotation_6d(matrix)[:, 3:], matrix[:, :, 1]), 'columns'


def test_six_numbers_are_a_rotation_wherever_they_point():
    matrix = actions.rotation_6d_to_matrix(torch.randn(3, 50, 6, dtype=torch.float64))
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(3).double().expand_as(matrix))
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(3, 50).double())


def test_relative_actions():
    turn = torch.tensor(rotations().as_matrix()[:8])
    proprio = torch.cat([torch.randn(2, 5).double(), actions.matrix_to_rotation_6d(turn[:2])], 1)           # (2, 11)
    action = torch.cat([torch.randn(2, 3, 3).double(), actions.matrix_to_rotation_6d(turn[2:].unflatten(0, (2, 3))),
                        torch.randn(2, 3, 1).double()], -1)                                                 # (2, 3, 10)
    how = dict(pairs=[(0, 2), (1, 3), (2, 4)], rotations=[(3, 5)])
    before = action.clone()
    out = actions.relative(action, proprio, **how)
    torch.testing.assert_close(out[..., :3], action[..., :3] - proprio[:, None, 2:5])
    torch.testing.assert_close(actions.rotation_6d_to_matrix(out[..., 3:9]),
                               turn[:2, None].mT @ turn[2:].unflatten(0, (2, 3)))
    assert torch.equal(out[..., 9], action[..., 9]) and torch.equal(action, before), 'a gripper stays'
    torch.testing.assert_close(actions.absolute(out, proprio, **how), action)
    assert torch.equal(actions.relative(action, proprio), action)


# ----------------------------------------------------------------------------------------------------------------------
# episodes: a .lowdim.npy, whose every row is a sample

ROW = np.dtype([('proprio', '<f4', 3), ('actions', '<f4', 2)])


def episode(steps, seed=0, dtype=ROW):
    rng, rows = np.random.default_rng(seed), np.zeros(steps, dtype)
    for name in dtype.names:
        rows[name] = rng.standard_normal(rows[name].shape)
    return rows


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def write_episodes(folder, episodes, dtype=ROW):
    return write_set(folder, [[(f'e{i}', {'lowdim.npy': npy(episode(n, i, dtype)),
                                          'json': json.dumps({'instruction': f'do {i}'}).encode()})]
                              for i, n in enumerate(episodes)], manifest=False)


def read_all(path, p):
    folder = Folder(str(path))
    return Batches([folder], InOrder(folder.sizes), p)[np.arange(len(folder))]


def test_every_step_of_an_episode_is_a_sample(tmp_path):
    path = write_episodes(tmp_path, [5, 1, 3])
    batch = read_all(path, Processor(Bytes(), seq_len=16, lowdim=(4, 3, 5), form='text'))
    assert not batch['bad'] and Folder(str(path)).sizes.tolist() == [5, 1, 3]
    low, n = batch['lowdim'], 0
    for i, steps in enumerate([5, 1, 3]):
        rows = episode(steps, i)
        for t in range(steps):
            ahead = rows['actions'][t:t + 4]
            np.testing.assert_array_equal(low['actions'][n], np.pad(ahead, ((0, 4 - len(ahead)), (0, 1))))
            np.testing.assert_array_equal(low['proprio'][n], [*rows['proprio'][t], 0, 0])
            assert low['is_pad'][n].tolist() == [t + k >= steps for k in range(4)]
            assert bytes(batch['tokens'][n, 1:5].astype(np.uint8)) == f'do {i}'.encode()
            n += 1
    assert n == len(low['rows']) == 9 and (low['rows'] == np.arange(9)).all()
    assert low['action_mask'].all(0).tolist() == [True, True, False] and low['proprio_mask'].sum() == 27
    assert Folder(str(path)).key(0, 3) == 'e0[3]'


def test_episodes_and_single_steps_in_one_set(tmp_path):
    """Two robots of other sizes, and a state without a word."""
    single = dict(actions=np.ones((2, 1)), is_pad=[False, True], proprio=np.arange(4))
    wide = np.dtype([('actions', '<f8', 3), ('proprio', '<f4', 1), ('reward', '<f4')])
    path = write_set(tmp_path, [[('a', {'lowdim.npz': npz(**single)}), ('b', {'lowdim.npy': npy(episode(2))}),
                                 ('c', {'lowdim.npy': npy(episode(2, 7, wide))})]], manifest=False)
    batch = read_all(path, Processor(Bytes(), seq_len=8, lowdim=(2, 3, 4)))
    assert not batch['bad'], batch['bad']
    low = batch['lowdim']
    assert low['action_mask'].sum(1).tolist() == [1, 2, 2, 3, 3] and low['proprio_mask'].sum(1).tolist() == [
        4, 3, 3, 1, 1]
    np.testing.assert_array_equal(low['actions'][3], episode(2, 7, wide)['actions'].astype(np.float32))
    assert low['is_pad'].tolist() == [[False, True], [False, False], [False, True]] + [[False, False], [False, True]]


def test_damaged_episodes_are_named(tmp_path):
    nan = episode(3)
    nan['actions'][1] = np.nan
    bad = write_set(tmp_path / 'nan', [[('n', {'lowdim.npy': npy(nan)}), ('f', {'lowdim.npy': npy(
        np.zeros(2, [('velocity', '<f4', 2)]))})]], manifest=False)
    batch = read_all(bad, Processor(Bytes(), seq_len=8, lowdim=(1, 2, 3)))
    assert len(batch['lowdim']['rows']) == 2 and [line.split(', ')[1].split(':')[0] for line in batch['bad']] == [
        'n[1]', 'f[0]', 'f[1]'] and 'not finite' in batch['bad'][0] and 'velocity' in batch['bad'][1]
    for i, data in enumerate((npy(episode(3))[:-1], npy(np.zeros((2, 2))), b'no array', npy(episode(0)))):
        with pytest.raises(ValueError, match='e, |e:|, e'):
            Folder(str(write_set(tmp_path / f'cut{i}', [[('e', {'lowdim.npy': data})]], manifest=False)))


def test_missing_cameras_are_black_and_not_attended():
    png = encode(picture(3)[..., :3])
    p = Processor(Bytes(), 16, 4, '', 32, lowdim=(2, 2, 3), cameras=('left', 'wrist', 'right'))
    low, words = npz(actions=np.ones((2, 2))), b'{"instruction": "go"}'
    batch = collate([piece | {'part': 0} for members in (
        {'right.png': png, 'left.png': png, 'other.png': png, 'json': words, 'lowdim.npz': low},
        {'left.png': png, 'wrist.png': png, 'right.png': png, 'json': words, 'lowdim.npz': low},
        {'json': words, 'lowdim.npz': low}) for piece in p.pieces(members)], p)
    assert batch['lowdim']['camera_mask'].tolist() == [[True, False, True], [True] * 3, [False] * 3]
    assert batch['pictures'].tolist() == [3, 3, 3]
    assert [bool(pixels.any()) for pixels in batch['pixels']] == [True, False, True] + [True] * 3 + [False] * 3
    image = batch['tokens'][:, :12].reshape(3, 3, 4) == Bytes().image_id
    assert image.all()
    np.testing.assert_array_equal(batch['segments'][:, :12].reshape(3, 3, 4).astype(bool).all(2),
                                  batch['lowdim']['camera_mask'])
    assert (batch['segments'][:, 12:16] == 1).all()


def stats_command(*args):
    return subprocess.run([sys.executable, str(ROOT / 'prepare' / 'stats.py'), *args], check=False, text=True,
                          capture_output=True, timeout=100)


def test_stats_of_a_data_set(tmp_path):
    a = write_episodes(tmp_path / 'a', [40, 7, 30])
    wide = np.dtype([('proprio', '<f4', 4), ('actions', '<f4', 1)])
    b = write_episodes(tmp_path / 'b', [20], wide)
    done = stats_command(f'--data={a}', f'--cache_dir={tmp_path}/cache')
    assert done.returncode == 0, done.stderr
    rows = np.concatenate([episode(n, i) for i, n in enumerate([40, 7, 30])])
    found = json.loads((a / 'stats.json').read_text())
    for key in ('actions', 'proprio'):
        x = rows[key].astype(np.float64)
        np.testing.assert_allclose(found[key]['mean'], x.mean(0), rtol=1e-9)
        np.testing.assert_allclose(found[key]['std'], x.std(0), rtol=1e-9)
        np.testing.assert_allclose(found[key]['q99'], np.quantile(x, 0.99, 0), rtol=1e-9)
        assert found[key]['max'] == x.max(0).tolist() and found[key]['count'] == [77] * x.shape[1]
    done = stats_command(f'--data={a},{b}', f'--out={tmp_path}/both.json', f'--cache_dir={tmp_path}/cache')
    assert done.returncode == 0, done.stderr
    both = json.loads((tmp_path / 'both.json').read_text())
    assert both['actions']['count'] == [97, 77] and both['proprio']['count'] == [97, 97, 97, 20]
    np.testing.assert_allclose(both['actions']['mean'][0], np.concatenate(
        [rows['actions'][:, 0], episode(20, 0, wide)['actions'][:, 0]]).astype(np.float64).mean(), rtol=1e-9)


def test_stats_of_relative_actions(tmp_path):
    a = write_episodes(tmp_path / 'a', [6, 3])
    done = stats_command(f'--data={a}', '--action_steps=4', '--pairs=[[1, 2]]', f'--cache_dir={tmp_path}/cache')
    assert done.returncode == 0, done.stderr
    relative = [rows['actions'][k] - [0, rows['proprio'][t, 2]] for rows in (episode(6, 0), episode(3, 1))
                for t in range(len(rows)) for k in range(t, min(t + 4, len(rows)))]
    found = json.loads((a / 'stats.json').read_text())
    np.testing.assert_allclose(found['actions']['mean'], np.mean(relative, 0), rtol=1e-5)
    np.testing.assert_allclose(found['actions']['std'], np.std(relative, 0), rtol=1e-5)
    for args, code, word in ((['--data='], 2, '--data'), ([f'--data={a},{a}'], 2, '--out'),
                             (['--data=gone'], 1, 'gone'),
                             ([f'--data={a}', '--pairs=[[9, 0]]', f'--cache_dir={tmp_path}/cache'], 1, 'pairs')):
        done = stats_command(*args)
        assert done.returncode == code and word in done.stderr and done.stderr.count('\n') == 1, done.stderr
