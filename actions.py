"""Actions: statistics of a data set's numbers, normalisation by them, rotations as 6D, actions relative to an anchor.

Axes: N samples, D numbers of one (of an action, of a robot's state); `...` is any shape, (B, steps) in a batch.
`python prepare/stats.py --data=datasets/x` writes a data set's stats.json.
"""
import io

import numpy as np
import torch
from torch import nn

from shards import BadSample

MAX_ARRAYS = 64 << 20           # bytes that a .npz may unpack to
KINDS = ('mean_std', 'min_max', 'quantile', 'none')

# ----------------------------------------------------------------------------------------------------------------------
# what a sample holds


def read(members):
    """{extension: bytes} of a sample -> {'lowdim': dict of actions fp32 (H, A), is_pad bool (H,), proprio fp32 (P,)},
    or {} where it has none. Raises BadSample."""
    if 'lowdim.npz' in members:
        return {'lowdim': read_lowdim(members['lowdim.npz'])}
    return {'lowdim': read_rows(members['lowdim.npy'])} if 'lowdim.npy' in members else {}


def read_lowdim(data):
    """Bytes of a .npz -> dict of actions fp32 (H, A), is_pad bool (H,), proprio fp32 (P,). Raises BadSample."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as z:
            if sum(info.file_size for info in z.zip.infolist()) > MAX_ARRAYS:
                raise ValueError(f'it unpacks to more than {MAX_ARRAYS} bytes')
            arrays = {k: z[k] for k in ('actions', 'is_pad', 'proprio') if k in z}
    except Exception as error:          # zipfile, zlib and numpy have errors of their own
        raise BadSample(f'.lowdim.npz can not be read ({error})') from None
    return check_lowdim(arrays, '.lowdim.npz')


def read_rows(rows):
    """Rows of an episode from the anchor on, fields `proprio` (P,) and `actions` (A,) -> what `read_lowdim` gives of
    them. Raises BadSample."""
    try:
        arrays = dict(actions=rows['actions'], proprio=rows['proprio'][0])
    except (ValueError, IndexError):
        raise BadSample(f'.lowdim.npy has rows of {rows.dtype}: expected fields actions and proprio') from None
    return check_lowdim(arrays, '.lowdim.npy')


def check_lowdim(arrays, name):
    """Arrays of a member -> actions, is_pad, proprio as they should be. Raises BadSample."""
    if 'actions' not in arrays or any(array.dtype.kind not in 'biuf' for array in arrays.values()):
        kinds = ', '.join(f'{k} {array.dtype}' for k, array in arrays.items())
        raise BadSample(f'{name} holds {kinds or "nothing known"}: expected numbers in actions, is_pad, proprio')
    actions, proprio = arrays['actions'], arrays.get('proprio', np.zeros(0))
    is_pad = arrays['is_pad'].astype(bool) if 'is_pad' in arrays else np.zeros(actions.shape[:1], bool)
    if actions.ndim != 2 or is_pad.shape != actions.shape[:1] or proprio.ndim != 1:
        raise BadSample(f'{name}: actions {actions.shape}, is_pad {is_pad.shape}, proprio {proprio.shape}: '
                        'expected (steps, size), (steps,), (size,)')
    if 'is_pad' in arrays:
        actions = np.where(is_pad[:, None], 0, actions)                 # a padded action may hold anything
    actions, proprio = actions.astype(np.float32, copy=False), proprio.astype(np.float32, copy=False)
    if not (np.isfinite(actions).all() and np.isfinite(proprio).all()):
        raise BadSample(f'{name} holds a value that is not finite')
    return dict(actions=actions, is_pad=is_pad, proprio=proprio)


# ----------------------------------------------------------------------------------------------------------------------
# statistics: streaming, mergeable, each dimension by itself


class Statistics:
    """Count, mean, std, min, max and quantiles of D dimensions, fed in pieces of any size, mergeable.

    Moments are Chan, Golub and LeVeque's (1979) pairwise update of Welford's in fp64. Quantiles are exact up to `exact`
    samples. Past that, a full buffer is sorted and every second value goes up a level, where it stands for twice as
    many (Munro and Paterson 1980); compactions take the odd and the even ones in turn, so that their errors cancel. The
    rank of a quantile is off by at most log2(N / exact) / exact of N: 0.1 % for a hundred million samples. What is fed
    decides the result, the same pieces in the same order give the same bits."""

    def __init__(self, dim, exact=16384):
        assert exact % 2 == 0
        self.exact = exact
        self.count = np.zeros(dim, np.int64)
        self.mean, self.m2 = np.zeros(dim), np.zeros(dim)
        self.min, self.max = np.full(dim, np.inf), np.full(dim, -np.inf)
        self.levels = [[Level(exact)] for _ in range(dim)]

    def update(self, x, mask=None):
        """x (..., D), a number of dimensions at most that of these statistics; mask, bool of the shape of x or of x
        without its last axis: what is real. Values that are not finite raise ValueError."""
        x = np.asarray(x, np.float64)
        mask = np.ones(x.shape, bool) if mask is None else np.asarray(mask, bool)
        mask = np.broadcast_to(mask if mask.ndim == x.ndim else mask[..., None], x.shape)
        x, mask = x.reshape(-1, x.shape[-1]), mask.reshape(-1, x.shape[-1])
        for d in range(x.shape[1]):
            values = x[mask[:, d], d]
            if not np.isfinite(values).all():
                raise ValueError(f'dimension {d} holds a value that is not finite')
            if len(values):
                mean = values.mean()
                self.add_moments(d, len(values), mean, ((values - mean) ** 2).sum(), values.min(), values.max())
                self.add_values(d, values, 0)
        return self

    def merge(self, other):
        """Take in what another Statistics has seen; one of fewer dimensions adds to the first of them."""
        for d in range(len(other.count)):
            if other.count[d]:
                self.add_moments(d, other.count[d], other.mean[d], other.m2[d], other.min[d], other.max[d])
                for height, level in enumerate(other.levels[d]):
                    self.add_values(d, level.values(), height)
        return self

    def add_moments(self, d, count, mean, m2, low, high):
        total = self.count[d] + count
        delta = mean - self.mean[d]
        self.m2[d] += m2 + delta ** 2 * self.count[d] * count / total
        self.mean[d] += delta * count / total
        self.count[d] = total
        self.min[d], self.max[d] = min(self.min[d], low), max(self.max[d], high)

    def add_values(self, d, values, height):
        """Values of weight 2 ** height into the buffers of a dimension."""
        levels = self.levels[d]
        while len(levels) <= height:
            levels.append(Level(self.exact))
        for a in range(0, len(values), self.exact):
            up = levels[height].add(values[a:a + self.exact])
            if len(up):
                self.add_values(d, up, height + 1)

    def quantile(self, q):
        """The q-quantile of each dimension (D,), linear between neighbours as numpy's; nan where nothing was seen."""
        out = np.full(len(self.count), np.nan)
        for d, levels in enumerate(self.levels):
            values = np.concatenate([level.values() for level in levels])
            if not len(values):
                continue
            weights = np.repeat([1 << i for i in range(len(levels))], [level.size for level in levels])
            order = np.argsort(values, kind='stable')
            values, weights = values[order], weights[order]
            ranks = np.cumsum(weights) - (weights + 1) / 2          # where the middle of what a value stands for is
            out[d] = np.interp(q * (weights.sum() - 1), ranks, values)
        return out

    def to_dict(self):
        """For stats.json: {count, mean, std, min, max, q01, q99}, lists of D numbers; std divides by N. A dimension
        that was never seen has mean 0, std 1, and -1 and 1 elsewhere."""
        seen = self.count > 0
        std = np.sqrt(self.m2 / np.maximum(self.count, 1))
        rows = dict(mean=(self.mean, 0), std=(std, 1), min=(self.min, -1), max=(self.max, 1),
                    q01=(self.quantile(0.01), -1), q99=(self.quantile(0.99), 1))
        return dict(count=self.count.tolist()) | {k: np.where(seen, v, unseen).tolist()
                                                  for k, (v, unseen) in rows.items()}


class Level:
    """A buffer of `room` values; a full one hands every second of them on."""

    def __init__(self, room):
        self.buffer, self.size, self.odd = np.zeros(room), 0, False

    def values(self):
        return self.buffer[:self.size]

    def add(self, values):
        """Take at most `room` values; gives those that go up a level, often none."""
        room = len(self.buffer) - self.size
        first, rest = values[:room], values[room:]
        self.buffer[self.size:self.size + len(first)] = first
        self.size += len(first)
        if not len(rest):
            return rest
        up = np.sort(self.buffer)[int(self.odd)::2]
        self.odd = not self.odd
        self.buffer[:len(rest)], self.size = rest, len(rest)
        return up


# ----------------------------------------------------------------------------------------------------------------------
# normalisation


class Normalizer(nn.Module):
    """(..., dim) -> what a model is given, and back. kind:

    mean_std  (x - mean) / std
    min_max   min to -1, max to 1
    quantile  the 1 % quantile to -1, the 99 % quantile to 1; nothing is clipped
    none      x

    stats: a part of stats.json, such as stats['actions']. dim: pads it; dimensions past its own stay as they are, as do
    those that a mask says are not real. A dimension that is constant in the data is shifted to 0 and not scaled; one
    whose quantiles coincide though it is not constant (a gripper that rarely closes) goes by min and max. The inverse
    is exact to rounding. Nothing of it is in the state_dict: stats.json goes with a checkpoint."""

    def __init__(self, stats, kind, dim=0):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f'normalisation {kind!r}: expected one of {", ".join(KINDS)}')
        missing = {'mean', 'std', 'min', 'max', 'q01', 'q99'} - set(stats)
        if missing:
            raise ValueError(f'statistics without {", ".join(sorted(missing))}: make them again with prepare/stats.py')
        s = {k: np.array(v, np.float64) for k, v in stats.items() if k != 'count'}
        own = len(s['mean'])
        dim = dim or own
        if dim < own:
            raise ValueError(f'statistics of {own} dimensions do not fit into {dim}')
        low, high = (s['q01'], s['q99']) if kind == 'quantile' else (s['min'], s['max'])
        low, high = (np.where(low < high, a, b) for a, b in ((low, s['min']), (high, s['max'])))
        shift, scale = (s['mean'], s['std']) if kind == 'mean_std' else ((low + high) / 2, (high - low) / 2)
        constant = s['max'] - s['min'] <= 1e-6 * np.maximum(abs(s['min']), abs(s['max']))
        shift, scale = np.where(constant, s['mean'], shift), np.where(constant, 1, scale)
        if kind == 'none':
            shift, scale = np.zeros(own), np.ones(own)
        for name, values, rest in (('shift', shift, 0), ('scale', scale, 1)):
            values = np.pad(values, (0, dim - own), constant_values=rest)
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    def forward(self, x, mask=None):
        """x (..., dim), fp32 out; mask, bool, broadcasts to x: what is real."""
        return self.where((x.float() - self.shift) / self.scale, x, mask)

    def inverse(self, x, mask=None):
        """What `forward` was given."""
        return self.where(x.float() * self.scale + self.shift, x, mask)

    def where(self, new, x, mask):
        return new if mask is None else torch.where(mask, new, x.float())


# ----------------------------------------------------------------------------------------------------------------------
# actions relative to where the robot is at the anchor


def relative(actions, proprio, pairs=(), rotations=()):
    """Absolute actions (..., steps, A) -> relative to proprio (..., P) of the anchor, a new tensor.

    pairs: (action index, proprio index) of numbers that are subtracted. rotations: (action index, proprio index) where
    6D rotations begin, which become R_proprio^T R_action. What is in neither stays absolute (a gripper)."""
    return shifted(actions, proprio, pairs, rotations, -1)


def absolute(actions, proprio, pairs=(), rotations=()):
    """The inverse of `relative`."""
    return shifted(actions, proprio, pairs, rotations, 1)


def shifted(actions, proprio, pairs, rotations, sign):
    out = actions.clone()
    if pairs:
        ours, theirs = (list(x) for x in zip(*pairs))
        out[..., ours] += sign * proprio[..., None, theirs]
    for a, p in rotations:
        anchor, matrix = rotation_6d_to_matrix(proprio[..., None, p:p + 6]), rotation_6d_to_matrix(out[..., a:a + 6])
        out[..., a:a + 6] = matrix_to_rotation_6d((anchor.mT if sign < 0 else anchor) @ matrix)
    return out


class Units(nn.Module):
    """Between a robot's numbers and a model's: relative to the anchor where stats.json says so, and normalised.

    stats: what prepare/stats.py wrote. Raises ValueError."""

    def __init__(self, stats, kind, steps, action_dim, proprio_dim):
        super().__init__()
        try:
            self.pairs, self.rotations = stats.get('pairs', []), stats.get('rotations', [])
            if (self.pairs or self.rotations) and stats['action_steps'] != steps:
                raise ValueError(f'they are of relative actions in chunks of {stats["action_steps"]}, not of {steps}')
            self.actions = Normalizer(stats['actions'], kind, action_dim)
            self.proprio = Normalizer(stats['proprio'], kind, proprio_dim)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'no statistics of actions ({error!r}): make them with prepare/stats.py') from None

    def encode(self, lowdim):
        """lowdim as the data set has it -> as a model learns it; `actions` may be missing."""
        proprio, out = lowdim['proprio'], dict(lowdim)
        out['proprio'] = self.proprio(proprio, lowdim['proprio_mask'].bool())
        if 'actions' in lowdim:
            chunk = relative(lowdim['actions'], proprio, self.pairs, self.rotations)
            out['actions'] = self.actions(chunk, lowdim['action_mask'].bool()[:, None])
        return out

    def decode(self, actions, proprio):
        """What a model gave (A, steps, D), and the state (A, P) as the robot has it -> the robot's actions."""
        return absolute(self.actions.inverse(actions), proprio, self.pairs, self.rotations)


# ----------------------------------------------------------------------------------------------------------------------
# rotations: 6D is the first two columns of the matrix, one after the other (Zhou et al. 2019, arXiv 1812.07035);
# quaternions are (w, x, y, z), as MuJoCo's; axis-angle is the axis times the angle in radians


def rotation_6d_to_matrix(x):
    """(..., 6) -> (..., 3, 3), by Gram-Schmidt; any six numbers whose halves are not parallel will do."""
    a, b = x[..., :3], x[..., 3:]
    first = nn.functional.normalize(a, dim=-1)
    second = nn.functional.normalize(b - (first * b).sum(-1, keepdim=True) * first, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


def matrix_to_rotation_6d(matrix):
    """(..., 3, 3) -> (..., 6)."""
    return torch.cat([matrix[..., 0], matrix[..., 1]], -1)


def quaternion_to_matrix(q):
    """(..., 4) of any length but zero -> (..., 3, 3)."""
    w, x, y, z = nn.functional.normalize(q, dim=-1).unbind(-1)
    rows = (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y))
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def matrix_to_quaternion(m):
    """(..., 3, 3) -> (..., 4) of length 1 with w >= 0. Of four formulas the one that divides by the most (Shepperd
    1978)."""
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    squares = torch.stack([1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz], -1)     # 4 q_i^2
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]      # 4 w q_i
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]      # 4 q_i q_j
    w2, x2, y2, z2 = squares.unbind(-1)
    table = torch.stack([torch.stack(row, -1) for row in (
        (w2, wx, wy, wz), (wx, x2, xy, xz), (wy, xy, y2, yz), (wz, xz, yz, z2))], -2)       # 4 q_i q_j
    best = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    q = nn.functional.normalize(table.gather(-2, best)[..., 0, :], dim=-1)
    return torch.where(q[..., :1] < 0, -q, q)


def axis_angle_to_matrix(v):
    """(..., 3) -> (..., 3, 3)."""
    half = v.norm(dim=-1, keepdim=True) / 2
    return quaternion_to_matrix(torch.cat([half.cos(), v / 2 * torch.sinc(half / torch.pi)], -1))


def matrix_to_axis_angle(m):
    """(..., 3, 3) -> (..., 3), angles from 0 to pi."""
    q = matrix_to_quaternion(m)
    sine = q[..., 1:].norm(dim=-1, keepdim=True)
    half = torch.atan2(sine, q[..., :1])
    return q[..., 1:] * 2 / torch.sinc(half / torch.pi).clamp_min(1e-12)


def quaternion_to_rotation_6d(q):
    return matrix_to_rotation_6d(quaternion_to_matrix(q))


def rotation_6d_to_quaternion(x):
    return matrix_to_quaternion(rotation_6d_to_matrix(x))


def axis_angle_to_rotation_6d(v):
    return matrix_to_rotation_6d(axis_angle_to_matrix(v))


def rotation_6d_to_axis_angle(x):
    return matrix_to_axis_angle(rotation_6d_to_matrix(x))
