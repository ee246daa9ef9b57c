"""The order of a run: which sample of which data set stands at which position.

`Order` is a pure function of the position: nothing depends on the number of ranks or workers. What
it does with a data set of more than a million samples stands in lanes.py.
"""
import functools

import numpy as np

# -------------------------------------------------------------------------------------------------
# hashing: written out here, so that no order ever changes with a release of numpy or torch


def splitmix64(x):
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on uint64 arrays."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*values):
    """A uint64 hash of integers or integer arrays, which broadcast."""
    h = np.zeros(1, np.uint64)
    for value in values:
        shape = np.shape(value) or (1,)
        # negative numbers, too, by their bits
        bits = np.asarray(value).astype(np.int64).view(np.uint64).reshape(shape)
        h = splitmix64(h ^ bits)
    return h


def permute(index, size, key, rounds=32):
    """Where `index` goes in the permutation of range(size) chosen by `key`; all three are arrays
    or broadcast.

    Swap-or-not (Hoang, Morris, Rogaway 2012): each round pairs every x with key - x and swaps the
    pair or does not, by a bit that both share. A bijection for any size, point by point, so no
    permutation is ever held."""
    x, size = np.broadcast_arrays(np.asarray(index, np.uint64), np.asarray(size, np.uint64))
    key = hash64(key)
    for i in range(rounds):
        round_key = splitmix64(key ^ np.uint64(i))
        # modulo size: a difference below 0 has wrapped around 2**64
        partner = round_key % size - x
        partner = np.where(partner > size, partner + size, partner)
        swap = splitmix64(round_key ^ np.maximum(x, partner)) >> np.uint64(63) == 1
        x = np.where(swap, partner, x)
    return x.astype(np.int64)


class Random:
    """A stream of random numbers keyed by integers, the same for ever. Enough for augmentation."""

    def __init__(self, *key):
        self.key, self.count = hash64(*key), 0

    def uniform(self, low=0.0, high=1.0, size=None):
        """Uniform in [low, high): a float, or an array of `size` numbers."""
        if size is None:
            return float(self.uniform(low, high, 1)[0])
        n = int(np.prod(size))
        places = np.arange(self.count, self.count + n, dtype=np.uint64)
        bits = splitmix64(self.key + splitmix64(places))
        self.count += n

        # the 53 highest bits, as many as a float64 holds exactly
        values = low + (high - low) * (bits >> np.uint64(11)).astype(np.float64) * 2.0 ** -53
        return values.reshape(size)


# -------------------------------------------------------------------------------------------------
# the order

BLOCK = 4096                    # places in the row that mixes data sets
WHOLE = 1 << 20                 # samples up to which a data set is permuted whole


class Order:
    """Position n of a run -> (data set, epoch, shard, index in the shard): a pure function.

    datasets: a list of [(shard name, samples), ...] or of arrays of samples; weights: a number for
    each, of any sum.
    1. Every position is mixed by itself (`Mixture`): any stretch of positions holds the share of
       each data set to within three samples. Rank r of W takes the positions congruent to r mod W,
       so what a batch holds does not depend on W.
    2. Each data set runs through epochs of its own, in which every sample comes exactly once. One
       of at most `whole` samples is permuted whole in each epoch; a larger one is read by `lanes`
       streams (lanes.py), so that a rank meets few of its shards at a time.

    A later chapter of a run goes on from another: `start` is its first position, `drawn` what the
    run drew before of each data set (a number; of a large one, one for each lane), `numbers` the
    data sets' numbers in the run, which their permutations follow from."""

    def __init__(self, datasets, weights, seed=0, lanes=64, window=1024, whole=WHOLE, start=0,
                 drawn=None, numbers=None):
        self.arguments = datasets, weights, seed, lanes, window, whole, start, drawn, numbers
        self.sizes = [sizes_of(shards) for shards in datasets]
        self.samples = [int(sizes.sum()) for sizes in self.sizes]
        self.weights, self.seed, self.start = list(weights), seed, start
        if len(weights) != len(datasets) or not datasets:
            raise ValueError(f'{len(datasets)} data sets and {len(weights)} weights: give one '
                             'weight a data set')
        for key, value in dict(lanes=lanes, window=window, whole=whole + 1).items():
            if value < 1:
                raise ValueError(f'{key}={value} is too small')
        self.mixture = Mixture(weights, lanes)
        for number, (quota, samples) in enumerate(zip(self.mixture.quotas, self.samples)):
            if quota > 0 and samples == 0:
                raise ValueError(f'data set {number} is empty: give it weight 0')

        self.numbers = np.array(numbers or range(len(datasets)), np.int64)
        self.starts = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in self.sizes]
        # what was drawn before, beside what this mixture would have given until then
        self.offset, self.large = np.zeros(len(datasets), np.int64), {}
        for number, samples in enumerate(self.samples):
            before = drawn[number] if drawn else 0
            if samples > whole:
                # the only ones that need it
                from lanes import Lanes
                self.large[number] = Lanes(self, number, lanes, window, before)
            elif drawn:
                self.offset[number] = np.sum(before) - self.mixture.before(start, number)

    def __reduce__(self):
        # without its caches, which can not be pickled: workers need not be forked
        return Order, self.arguments

    @property
    def samples_in_use(self):
        """Samples of all data sets that have a weight."""
        return sum(n for n, weight in zip(self.samples, self.weights) if weight)

    def locate(self, n):
        """Positions (int64 array) -> four int64 arrays: data set, epoch, shard, index in the
        shard."""
        n = np.asarray(n, np.int64)
        if n.size and n.min() < self.start:
            raise ValueError(f'position {n.min()}: positions begin at {self.start}')
        flat = n.reshape(-1)
        dataset = self.mixture.dataset(flat)
        epoch, shard, index = (np.empty_like(flat) for _ in range(3))
        for number in np.unique(dataset).tolist():
            own = dataset == number
            if number in self.large:
                epoch[own], shard[own], index[own] = self.large[number].locate(flat[own])
                continue
            drawn = self.mixture.before(flat[own], number) + self.offset[number]
            epoch[own], place = self.place(number, drawn)
            shard[own] = np.searchsorted(self.starts[number], place, side='right') - 1
            index[own] = place - self.starts[number][shard[own]]
        return tuple(x.reshape(n.shape) for x in (dataset, epoch, shard, index))

    def place(self, number, drawn):
        """Of the samples that a data set gives after `drawn` others: epoch, and place in it as it
        lies on the disk."""
        samples = self.samples[number]
        epoch, index = drawn // samples, drawn % samples
        return epoch, permute(index, samples, hash64(self.seed, 4, self.numbers[number], epoch))

    def before(self, n, number):
        """How many samples of a data set the run drew before position n."""
        if number in self.large:
            return int(self.large[number].drawn(n).sum())
        return int(self.mixture.before(n, number) + self.offset[number])

    def seen(self, number, drawn):
        """Of what was drawn of a data set: how many whole epochs, and {shard: samples} of what came
        after them."""
        if number in self.large:
            whole_epochs, counts = self.large[number].seen(np.asarray(drawn))
        else:
            whole_epochs, rest = divmod(drawn, self.samples[number])
            _, place = self.place(number, drawn - rest + np.arange(rest))
            shard = np.searchsorted(self.starts[number], place, side='right') - 1
            counts = np.bincount(shard, minlength=len(self.sizes[number]))
        met = np.flatnonzero(counts)
        return whole_epochs, dict(zip(met.tolist(), counts[met].tolist()))


class Mixture:
    """Which data set each position is of, so that any stretch of them holds each share.

    4096 places in a row hold the data sets by their quotas: each goes, place by place, to the one
    that is furthest behind its share. Positions go around that row. With 64 lanes a lane would
    meet the same 64 places again each time, so after every turn the row is shifted by one: in 64
    turns, a block, a lane meets every place once. A shift leaves out a place; where in the row that
    begins is chosen so that those left out hold the shares, too."""

    def __init__(self, weights, lanes):
        self.quotas = quotas_of(weights)
        # lanes = shifts * odd: a lane meets every shifts-th place of the row in one of its turns
        self.lanes, self.shifts = lanes, lanes & -lanes
        if self.shifts > BLOCK:
            raise ValueError(f'lanes={lanes} are more than {BLOCK}')
        self.turn = BLOCK * (lanes // self.shifts)      # positions, until the next shift
        row = row_of(tuple(self.quotas.tolist()))
        self.row = np.roll(row, -best_start(row, self.quotas, self.shifts))

        # how often each data set stands in the first places of two rows, one after the other
        is_of = np.tile(self.row, 2)[:, None] == np.arange(len(self.quotas))
        self.met = np.zeros((2 * BLOCK + 1, len(self.quotas)), np.int64)
        self.met[1:] = is_of.cumsum(0)

    def dataset(self, n):
        """The data sets of positions."""
        shift = n // self.turn % self.shifts
        return self.row[(n + shift) % BLOCK]

    def before(self, n, number):
        """How many of the positions before n are of a data set."""
        shift, place = n // self.turn % self.shifts, n % BLOCK
        in_row = self.met[shift + place, number] - self.met[shift, number]
        return n // BLOCK * self.quotas[number] + in_row

    def drawn(self, number, n, by_lane, start=0, before=0):
        """What was drawn of a data set before position n, where it was `before` at `start`: a
        number, or one for each lane."""
        if not by_lane:
            return int(np.sum(before) + self.before(n, number) - self.before(start, number))
        from lanes import Walk, spread
        walk = Walk(self, number)
        return (spread(before, self.lanes) + walk.drawn(n) - walk.drawn(start)).tolist()


def sizes_of(shards):
    """[(shard name, samples), ...] or an array of samples -> the array."""
    if isinstance(shards, np.ndarray):
        return shards
    return np.array([samples for _, samples in shards], np.int64)


def quotas_of(weights):
    """How many of 4096 each weight gets, by largest remainder. Raises ValueError."""
    numbers = all(isinstance(w, (int, float)) and 0 <= w < np.inf for w in weights)
    if not numbers or sum(weights) <= 0:
        raise ValueError(f'weights {list(weights)}: they must be numbers, finite, not negative, '
                         'not all zero')
    exact = np.array(weights, np.float64) / sum(weights) * BLOCK
    quotas = np.floor(exact).astype(np.int64)
    most_lost = np.argsort(-(exact - quotas), kind='stable')
    quotas[most_lost[:BLOCK - quotas.sum()]] += 1
    for number, (quota, weight) in enumerate(zip(quotas, weights)):
        if weight > 0 and quota == 0:
            raise ValueError(f'data set {number}: weight {weight} of {sum(weights)} is less than '
                             f'one sample in {BLOCK}; give it at least {sum(weights) / BLOCK:g}')
    return quotas


@functools.cache
def row_of(quotas):
    """4096 places, each given to the data set that is furthest behind its share; a tie to the
    first."""
    behind, row = np.zeros(len(quotas), np.int64), np.empty(BLOCK, np.int64)
    quotas = np.array(quotas)
    for place in range(BLOCK):
        behind += quotas                                # in 4096ths of a sample
        row[place] = behind.argmax()
        behind[row[place]] -= BLOCK
    return row


def best_start(row, quotas, length):
    """Where so many places in a row hold the shares best."""
    is_of = row[:, None] == np.arange(len(quotas))
    ahead = np.zeros((BLOCK + 1, len(quotas)), np.int64)
    ahead[1:] = (BLOCK * is_of - quotas).cumsum(0)
    ahead = np.concatenate([ahead, ahead[1:length + 1]])
    stretches = np.lib.stride_tricks.sliding_window_view(ahead, length + 1, axis=0)
    spread = (stretches.max(-1) - stretches.min(-1)).max(1)
    return int(spread[:BLOCK].argmin())
