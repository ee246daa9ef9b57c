"""Actions: how a sample holds them, their statistics, normalisation by these, relative actions.

Axes: N samples, D numbers of one (of an action, of a robot's state); H steps of a chunk, A numbers
of an action, P of a robot's state (proprio); `...` is any shape, (B, H) in a batch.
`python prepare/stats.py --data=datasets/x` writes a data set's stats.json.
"""
import io

import numpy as np
import torch
from torch import nn

from robots.rotations import matrix_to_rotation_6d, rotation_6d_to_matrix
from shards import BadSample

MAX_ARRAYS = 64 << 20           # bytes that a .npz may unpack to
KINDS = ('mean_std', 'min_max', 'quantile', 'none')

# -------------------------------------------------------------------------------------------------
# what a sample holds


def read(members):
    """{extension: bytes} of a sample -> {'lowdim': dict of actions fp32 (H, A), is_pad bool (H,),
    proprio fp32 (P,)}, or {} where it has none. Raises BadSample."""
    if 'lowdim.npz' in members:
        return {'lowdim': read_lowdim(members['lowdim.npz'])}
    if 'lowdim.npy' in members:
        return {'lowdim': read_rows(members['lowdim.npy'])}
    return {}


def read_lowdim(data):
    """Bytes of a .npz -> dict of actions fp32 (H, A), is_pad bool (H,), proprio fp32 (P,). Raises
    BadSample."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as z:
            # A few bytes may unpack to more than there is memory.
            unpacked = sum(info.file_size for info in z.zip.infolist())
            if unpacked > MAX_ARRAYS:
                raise ValueError(f'it unpacks to more than {MAX_ARRAYS} bytes')
            arrays = {k: z[k] for k in ('actions', 'is_pad', 'proprio') if k in z}
    except Exception as error:          # zipfile, zlib and numpy have errors of their own
        raise BadSample(f'.lowdim.npz can not be read ({error})') from None
    return check_lowdim(arrays, '.lowdim.npz')


def read_rows(rows):
    """Rows of an episode from the anchor on, fields `proprio` (P,) and `actions` (A,) -> what
    `read_lowdim` gives of them. Raises BadSample."""
    try:
        arrays = dict(actions=rows['actions'], proprio=rows['proprio'][0])
    except (ValueError, IndexError):
        raise BadSample(f'.lowdim.npy has rows of {rows.dtype}: '
                        'expected fields actions and proprio') from None
    return check_lowdim(arrays, '.lowdim.npy')


def check_lowdim(arrays, name):
    """Arrays of a member -> actions, is_pad, proprio as they should be. Raises BadSample."""
    # Numbers only, and actions among them.
    # numpy gives the bytes of what is no array
    kinds = {key: getattr(array, 'dtype', np.dtype('O')) for key, array in arrays.items()}
    is_numbers = all(dtype.kind in 'biuf' for dtype in kinds.values())
    if 'actions' not in arrays or not is_numbers:
        kinds = ', '.join(f'{key} {dtype}' for key, dtype in kinds.items())
        raise BadSample(f'{name} holds {kinds or "nothing known"}: '
                        'expected numbers in actions, is_pad, proprio')

    # A state and padding may be missing.
    actions = arrays['actions']
    proprio = arrays.get('proprio', np.zeros(0))
    is_pad = np.zeros(actions.shape[:1], bool)
    if 'is_pad' in arrays:
        is_pad = arrays['is_pad'].astype(bool)
    if actions.ndim != 2 or is_pad.shape != actions.shape[:1] or proprio.ndim != 1:
        raise BadSample(f'{name}: actions {actions.shape}, is_pad {is_pad.shape}, '
                        f'proprio {proprio.shape}: expected (steps, size), (steps,), (size,)')

    # A padded action may hold anything, even what is not finite.
    if 'is_pad' in arrays:
        actions = np.where(is_pad[:, None], 0, actions)

    # Finite as fp32: a larger number has become infinite.
    actions = actions.astype(np.float32, copy=False)
    proprio = proprio.astype(np.float32, copy=False)
    if not (np.isfinite(actions).all() and np.isfinite(proprio).all()):
        raise BadSample(f'{name} holds a value that is not finite')
    return dict(actions=actions, is_pad=is_pad, proprio=proprio)


# -------------------------------------------------------------------------------------------------
# statistics: streaming, mergeable, each dimension by itself


class Statistics:
    """Count, mean, std, min, max and quantiles of D dimensions, fed in pieces, mergeable.

    Pieces may have any size. Moments are Chan, Golub and LeVeque's (1979) pairwise update of
    Welford's in fp64. Quantiles are exact up to `exact` samples. Past that, a full buffer is
    sorted and every second value goes up a level, where it stands for twice as many (Munro and
    Paterson 1980); compactions take the odd and the even ones in turn, so that their errors
    cancel. The rank of a quantile is off by at most log2(N / exact) / exact of N: 0.1 % for a
    hundred million samples. The same pieces in the same order give the same bits."""

    def __init__(self, dim, exact=16384):
        assert exact % 2 == 0           # half of a full buffer goes up
        self.exact = exact

        # Each dimension counts for itself: data sets of robots with fewer numbers are merged.
        self.count = np.zeros(dim, np.int64)
        self.mean, self.m2 = np.zeros(dim), np.zeros(dim)
        self.min, self.max = np.full(dim, np.inf), np.full(dim, -np.inf)
        self.levels = [[Level(exact)] for _ in range(dim)]

    def update(self, x, mask=None):
        """x (..., D), a number of dimensions at most that of these statistics; mask, bool of the
        shape of x or of x without its last axis: what is real. Values that are not finite raise
        ValueError."""
        x = np.asarray(x, np.float64)
        if mask is None:
            mask = np.ones(x.shape, bool)
        mask = np.asarray(mask, bool)
        if mask.ndim != x.ndim:
            mask = mask[..., None]
        mask = np.broadcast_to(mask, x.shape)

        # A dimension by itself, for each may have its own mask.
        dim = x.shape[-1]
        x, mask = x.reshape(-1, dim), mask.reshape(-1, dim)
        for d in range(dim):
            values = x[mask[:, d], d]
            if not np.isfinite(values).all():
                raise ValueError(f'dimension {d} holds a value that is not finite')
            if len(values):
                mean = values.mean()
                m2 = ((values - mean) ** 2).sum()
                self.add_moments(d, len(values), mean, m2, values.min(), values.max())
                self.add_values(d, values, 0)
        return self

    def merge(self, other):
        """Take in what another Statistics has seen; one of fewer dimensions adds to the first of
        them."""
        for d in range(len(other.count)):
            if other.count[d]:
                self.add_moments(d, other.count[d], other.mean[d], other.m2[d],
                                 other.min[d], other.max[d])
                # A level's values keep their weight: they enter at the same height.
                for height, level in enumerate(other.levels[d]):
                    self.add_values(d, level.values(), height)
        return self

    def add_moments(self, d, count, mean, m2, low, high):
        """Moments of `count` values into those of a dimension."""
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

        # At most a buffer at a time, so that one compaction is enough.
        for a in range(0, len(values), self.exact):
            up = levels[height].add(values[a:a + self.exact])
            if len(up):
                self.add_values(d, up, height + 1)

    def quantile(self, q):
        """The q-quantile of each dimension (D,), linear between neighbours as numpy's; nan where
        nothing was seen."""
        out = np.full(len(self.count), np.nan)
        for d, levels in enumerate(self.levels):
            values = np.concatenate([level.values() for level in levels])
            if not len(values):
                continue

            # A value of a level stands for as many as its weight says.
            sizes = [level.size for level in levels]
            weights = np.repeat([1 << height for height in range(len(levels))], sizes)
            order = np.argsort(values, kind='stable')
            values, weights = values[order], weights[order]

            # Its rank is the middle of those that it stands for.
            ranks = np.cumsum(weights) - (weights + 1) / 2
            out[d] = np.interp(q * (weights.sum() - 1), ranks, values)
        return out

    def to_dict(self):
        """For stats.json: {count, mean, std, min, max, q01, q99}, lists of D numbers; std divides
        by N. A dimension that was never seen has mean 0, std 1, and -1 and 1 elsewhere."""
        std = np.sqrt(self.m2 / np.maximum(self.count, 1))

        # Beside each row what it is where there is nothing: numbers that normalise to themselves.
        rows = dict(mean=(self.mean, 0), std=(std, 1), min=(self.min, -1), max=(self.max, 1),
                    q01=(self.quantile(0.01), -1), q99=(self.quantile(0.99), 1))

        is_seen = self.count > 0
        out = dict(count=self.count.tolist())
        for name, (values, if_unseen) in rows.items():
            out[name] = np.where(is_seen, values, if_unseen).tolist()
        return out


class Level:
    """A buffer of `room` values; a full one hands every second of them on."""

    def __init__(self, room):
        self.buffer, self.size, self.is_odd = np.zeros(room), 0, False

    def values(self):
        """Those it holds now."""
        return self.buffer[:self.size]

    def add(self, values):
        """Take at most `room` values; gives those that go up a level, often none."""
        room = len(self.buffer) - self.size
        first, rest = values[:room], values[room:]
        self.buffer[self.size:self.size + len(first)] = first
        self.size += len(first)
        if not len(rest):
            return rest

        # It is full: half of it goes up, and it begins anew with what found no room.
        up = np.sort(self.buffer)[int(self.is_odd)::2]
        self.is_odd = not self.is_odd
        self.buffer[:len(rest)], self.size = rest, len(rest)
        return up


# -------------------------------------------------------------------------------------------------
# normalisation


class Normalizer(nn.Module):
    """(..., dim) -> what a model is given, and back. kind:

    mean_std  (x - mean) / std
    min_max   min to -1, max to 1
    quantile  the 1 % quantile to -1, the 99 % quantile to 1; nothing is clipped
    none      x

    stats: a part of stats.json, such as stats['actions']. dim: pads it; dimensions past its own
    stay as they are, as do those that a mask says are not real. A dimension that is constant in
    the data is shifted to 0 and not scaled; one whose quantiles coincide though it is not constant
    (a gripper that rarely closes) goes by min and max. The inverse is exact to rounding."""

    def __init__(self, stats, kind, dim=0):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f'normalize={kind!r}: expected one of {", ".join(KINDS)}')
        missing = {'mean', 'std', 'min', 'max', 'q01', 'q99'} - set(stats)
        if missing:
            raise ValueError(f'statistics without {", ".join(sorted(missing))}: '
                             'make them again with prepare/stats.py')

        shift, scale = shift_and_scale(stats, kind)
        own = len(shift)
        dim = dim or own
        if dim < own:
            raise ValueError(f'statistics of {own} dimensions do not fit into {dim}')

        # What pads them changes nothing.
        shift = np.pad(shift, (0, dim - own), constant_values=0)
        scale = np.pad(scale, (0, dim - own), constant_values=1)

        # Not in the state_dict: stats.json goes with a checkpoint.
        self.register_buffer('shift', torch.tensor(shift, dtype=torch.float32), persistent=False)
        self.register_buffer('scale', torch.tensor(scale, dtype=torch.float32), persistent=False)

    def forward(self, x, mask=None):
        """x (..., dim), fp32 out; mask, bool, broadcasts to x: what is real."""
        return self.where((x.float() - self.shift) / self.scale, x, mask)

    def inverse(self, x, mask=None):
        """What `forward` was given."""
        return self.where(x.float() * self.scale + self.shift, x, mask)

    def where(self, new, x, mask):
        """The new values where they are real, x elsewhere."""
        if mask is None:
            return new
        return torch.where(mask, new, x.float())


def shift_and_scale(stats, kind):
    """The numbers (D,) in fp64 of a Normalizer: it gives (x - shift) / scale."""
    s = {name: np.array(values, np.float64) for name, values in stats.items() if name != 'count'}
    own = len(s['mean'])
    if kind == 'none':
        return np.zeros(own), np.ones(own)

    # The ends that become -1 and 1. Quantiles that coincide are none.
    low, high = s['min'], s['max']
    if kind == 'quantile':
        is_range = s['q01'] < s['q99']
        low = np.where(is_range, s['q01'], low)
        high = np.where(is_range, s['q99'], high)

    shift, scale = (low + high) / 2, (high - low) / 2
    if kind == 'mean_std':
        shift, scale = s['mean'], s['std']

    # A constant, to the rounding of fp32, has no scale.
    is_constant = s['max'] - s['min'] <= 1e-6 * np.maximum(abs(s['min']), abs(s['max']))
    return np.where(is_constant, s['mean'], shift), np.where(is_constant, 1, scale)


# -------------------------------------------------------------------------------------------------
# actions relative to where the robot is at the anchor


def relative(actions, proprio, pairs=(), rotations=()):
    """Absolute actions (..., H, A) -> relative to proprio (..., P) of the anchor, a new tensor.

    pairs: (action index, proprio index) of numbers that are subtracted. rotations: (action index,
    proprio index) where 6D rotations begin. What is in neither stays absolute (a gripper)."""
    out = actions.clone()
    if pairs:
        ours, theirs = zip(*pairs)
        out[..., list(ours)] -= proprio[..., None, list(theirs)]

    # A turn is not a difference: R_proprio^T R_action, as the robot's own frame sees it.
    for a, p in rotations:
        anchor = rotation_6d_to_matrix(proprio[..., None, p:p + 6])
        turn = rotation_6d_to_matrix(out[..., a:a + 6])
        out[..., a:a + 6] = matrix_to_rotation_6d(anchor.mT @ turn)
    return out


def absolute(actions, proprio, pairs=(), rotations=()):
    """The inverse of `relative`."""
    out = actions.clone()
    if pairs:
        ours, theirs = zip(*pairs)
        out[..., list(ours)] += proprio[..., None, list(theirs)]

    # R_proprio (R_proprio^T R_action)
    for a, p in rotations:
        anchor = rotation_6d_to_matrix(proprio[..., None, p:p + 6])
        turn = rotation_6d_to_matrix(out[..., a:a + 6])
        out[..., a:a + 6] = matrix_to_rotation_6d(anchor @ turn)
    return out


class Units(nn.Module):
    """Between a robot's numbers and a model's: relative where stats.json says so, and normalised.

    stats: what prepare/stats.py wrote. Raises ValueError."""

    def __init__(self, stats, kind, steps, action_dim, proprio_dim):
        super().__init__()
        try:
            self.pairs, self.rotations = stats.get('pairs', []), stats.get('rotations', [])

            # Statistics of relative actions depend on how far a chunk reaches from its anchor.
            is_relative = self.pairs or self.rotations
            if is_relative and stats['action_steps'] != steps:
                raise ValueError('they are of relative actions in chunks of '
                                 f'{stats["action_steps"]}, not of {steps}')
            if is_relative and not proprio_dim:
                raise ValueError('they are of actions relative to the state, which proprio_dim=0 '
                                 'leaves out')
            self.known_numbers = len(stats['actions']['mean']), len(stats['proprio']['mean'])
            self.actions = Normalizer(stats['actions'], kind, action_dim)
            # a run may leave the state out
            self.proprio = Normalizer(stats['proprio'], kind, proprio_dim) if proprio_dim else None
        except ValueError as error:
            raise ValueError(f'action_dim={action_dim}, proprio_dim={proprio_dim}, '
                             f'action_steps={steps}: {error}') from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'no statistics of actions ({error!r}): '
                             'make them with prepare/stats.py') from None

    def encode(self, lowdim):
        """lowdim as the data set has it -> as a model learns it; `actions` may be missing."""
        proprio, out = lowdim['proprio'], dict(lowdim)
        if self.proprio:
            out['proprio'] = self.proprio(proprio, lowdim['proprio_mask'].bool())

        # The anchor is the state in the robot's units, before it is normalised.
        if 'actions' in lowdim:
            chunk = relative(lowdim['actions'], proprio, self.pairs, self.rotations)
            out['actions'] = self.actions(chunk, lowdim['action_mask'].bool()[:, None])
        return out

    def decode(self, actions, proprio):
        """What a model gave (B, H, A), and the state (B, P) as the robot has it -> the robot's
        actions."""
        return absolute(self.actions.inverse(actions), proprio, self.pairs, self.rotations)
