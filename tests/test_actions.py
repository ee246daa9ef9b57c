"""actions.py: statistics beside numpy's, normalisation both ways, rotations beside scipy's, relative actions."""
import json

import numpy as np
import pytest
import torch

import actions
from actions import KINDS, Normalizer, Statistics

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
