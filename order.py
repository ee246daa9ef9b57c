"""The order of a run: which sample of which data set stands at which position.

`Order` is a pure function of the position: nothing depends on the number of ranks or workers.
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

BLOCK = 4096                    # rounds in which every lane meets each data set exactly its quota
WHOLE = 1 << 20                 # samples up to which a data set is permuted whole


class Order:
    """Position n of a run -> (data set, epoch, shard, index in the shard): a pure function.

    datasets: a list of [(shard name, samples), ...] or of arrays of samples; weights: a number for
    each, of any sum.
    1. n = round * lanes + lane. Rank r of W takes the positions congruent to r mod W, so what a
       batch holds does not depend on W; when W divides `lanes`, a rank stays in its own lanes.
    2. Every position is mixed by itself (`Mixture`): any stretch of positions holds the share of
       each data set to within three samples, and in a block of 4096 rounds each lane meets each
       data set exactly its quota of times.
    3. A lane's j-th draw from a data set is that data set's sample number p = j * lanes + lane. It
       runs through epochs of its own. One of at most `whole` samples is permuted whole in each
       epoch. Of a larger one an epoch permutes the shards, and every lane owns a contiguous range
       of the samples, permuted in windows of `window` samples. Nothing is dropped or repeated
       inside an epoch.

    A later chapter of a run goes on from another: `start` is its first position, `drawn` (lanes,
    data sets) what each lane drew of each data set before, `numbers` the data sets' numbers in the
    run, which their permutations follow from."""

    def __init__(self, datasets, weights, seed=0, lanes=64, window=1024, whole=WHOLE, start=0,
                 drawn=None, numbers=None):
        self.sizes = [sizes_of(shards) for shards in datasets]
        self.samples = [int(sizes.sum()) for sizes in self.sizes]
        self.weights, self.seed, self.lanes = list(weights), seed, lanes
        self.window, self.whole, self.start = window, whole, start
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
        self.given = drawn
        # what lanes had drawn before, beside what this mixture would have given them until then
        self.offset = np.zeros((lanes, len(datasets)), np.int64)
        if drawn is not None:
            self.offset = np.asarray(drawn, np.int64) - self.mixture.drawn(start)
        self.shards = functools.lru_cache(2 * len(datasets) + 2)(self._shards)

    def __reduce__(self):
        # without its caches, which can not be pickled: workers need not be forked
        return Order, (self.sizes, self.weights, self.seed, self.lanes, self.window, self.whole,
                       self.start, self.given, self.numbers.tolist())

    def _shards(self, dataset, epoch):
        """The shards of an epoch in their order, and where each one's samples begin in it (one
        more: the end)."""
        sizes = self.sizes[dataset]
        if self.samples[dataset] <= self.whole:         # its samples are permuted, not its shards
            return np.arange(len(sizes)), np.concatenate([[0], np.cumsum(sizes)])
        number = self.numbers[dataset]
        hashes = hash64(self.seed, 2, number, epoch, np.arange(len(sizes)))
        # half the memory of a million shards
        order = np.argsort(hashes, kind='stable').astype(np.int32)
        return order, np.concatenate([[0], np.cumsum(sizes[order])])

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
        rounds, lane = flat // self.lanes, flat % self.lanes
        dataset = self.mixture.dataset(lane, rounds)
        draws = self.mixture.count(lane, rounds, dataset) + self.offset[lane, dataset]
        epoch, place = self._place(dataset, draws * self.lanes + lane)

        # epoch by epoch of each data set: the shard
        shard, index = np.empty_like(flat), np.empty_like(flat)
        by_epoch = np.lexsort((epoch, dataset))
        changes = np.diff(dataset[by_epoch]) | np.diff(epoch[by_epoch])
        for group in np.split(by_epoch, 1 + np.flatnonzero(changes)):
            # no positions are one empty group
            if not len(group):
                continue
            order, starts = self.shards(int(dataset[group[0]]), int(epoch[group[0]]))
            k = np.searchsorted(starts, place[group], side='right') - 1
            shard[group], index[group] = order[k], place[group] - starts[k]
        return tuple(x.reshape(n.shape) for x in (dataset, epoch, shard, index))

    def _lane(self, dataset, p):
        """Of samples number p of data sets: epoch, where their lane begins in the epoch's row of
        samples, how many it owns, and how many it gave before in this epoch."""
        lanes, samples = self.lanes, np.array(self.samples, np.int64)[dataset]
        slot, epoch = p % lanes, p // np.maximum(samples, 1)
        base, extra = samples // lanes, samples % lanes

        # An epoch begins at slot `first`; the lanes first, first + 1, ... own one sample more,
        # where these wrap around the lanes 0, 1, ..., too.
        first = epoch * samples % lanes
        more_before = np.where(
            first + extra <= lanes,
            np.clip(slot - first, 0, extra),
            np.minimum(slot, first + extra - lanes) + np.maximum(slot - first, 0))
        owned = base + ((slot - first) % lanes < extra)
        return epoch, slot * base + more_before, owned, (p - epoch * samples) // lanes

    def _place(self, dataset, p):
        """Epoch, and the place in the epoch's row of samples, of samples number p of data sets."""
        number, samples = self.numbers[dataset], np.array(self.samples, np.int64)[dataset]
        epoch, start, owned, turn = self._lane(dataset, p)
        # the last window of a lane may be smaller
        window = turn // self.window
        start = start + window * self.window
        size = np.minimum(self.window, owned - window * self.window)
        key = hash64(self.seed, 3, number, epoch, p % self.lanes, window)
        index = turn % self.window

        # all of a small data set is one window, which no lane owns
        is_whole = samples <= self.whole
        start = np.where(is_whole, 0, start)
        size = np.where(is_whole, samples, size)
        key = np.where(is_whole, hash64(self.seed, 4, number, epoch), key)
        index = np.where(is_whole, p - epoch * samples, index)
        return epoch, start + permute(index, size, key)

    def drawn(self, n):
        """Samples that each lane drew of each data set before position n: (lanes, data sets)."""
        return self.mixture.drawn(n) + self.offset

    def before(self, n, dataset):
        """How many samples of a data set the run drew before position n."""
        return int(self.drawn(n)[:, dataset].sum())

    def seen(self, dataset, draws):
        """Of what the lanes drew, (lanes,): how many whole epochs, and {shard: samples} of the
        epochs after them (lanes may be some draws apart)."""
        samples, lane = self.samples[dataset], np.arange(self.lanes)
        ends = np.asarray(draws) * self.lanes + lane            # each lane's next sample
        counts = np.zeros(len(self.sizes[dataset]), np.int64)
        whole_epochs = int(ends.min()) // samples
        for epoch in range(whole_epochs, int(ends.max()) // samples + 1):
            # the first sample of each lane in this epoch, and how many it gave
            first = epoch * samples + (lane - epoch * samples) % self.lanes
            turns = -(-(np.minimum(ends, (epoch + 1) * samples) - first) // self.lanes)
            counts += self._seen_in(dataset, epoch, first, np.maximum(turns, 0))
        met = np.flatnonzero(counts)
        return whole_epochs, dict(zip(met.tolist(), counts[met].tolist()))

    def _seen_in(self, dataset, epoch, first, turns):
        """Samples of each shard in an epoch of which every lane gave `turns`, from number `first`
        on. Windows that a lane has finished are ranges of the epoch's row, so this takes no time
        for each sample."""
        order, starts = self.shards(dataset, epoch)
        finished = turns // self.window * self.window
        if self.samples[dataset] <= self.whole:
            finished = 0 * turns

        # windows under way: sample by sample
        late = [f + self.lanes * np.arange(w, t) for f, w, t in zip(first, finished, turns)]
        late = np.concatenate(late)
        place = self._place(np.full_like(late, dataset), late)[1]
        shard = np.searchsorted(starts, place, side='right') - 1
        counts = np.bincount(shard, minlength=len(order))

        # finished ones: ranges, in which the count grows by one a place; beside them it stays
        is_over = finished > 0
        if is_over.any():
            begin = self._lane(np.full_like(first, dataset), first)[1][is_over]
            length = finished[is_over]
            by_place = np.argsort(begin)
            begin, length = begin[by_place], length[by_place]
            knots = np.stack([begin, begin + length], 1).ravel()
            level = np.cumsum(np.stack([0 * length, length], 1).ravel())
            counts += np.diff(np.interp(starts, knots, level)).astype(np.int64)
        out = np.zeros(len(order), np.int64)
        out[order] = counts
        return out


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
        self.rounds = BLOCK // self.shifts              # of a lane, until the next shift
        row = row_of(self.quotas)
        self.row = np.roll(row, -best_start(row, self.quotas, self.shifts))

        # Lanes that begin in the same class of places (mod shifts) walk through them in the same
        # order: table[class, steps, data set] counts, and where[place] is the step of a place.
        steps, classes = np.arange(self.rounds), np.arange(self.shifts)
        walks = (classes[:, None] + steps * lanes) % BLOCK          # (classes, rounds)
        met = self.row[walks][..., None] == np.arange(len(self.quotas))
        self.table = np.zeros((self.shifts, self.rounds + 1, len(self.quotas)), np.int64)
        self.table[:, 1:] = met.cumsum(1)
        self.where = np.empty(BLOCK, np.int64)
        self.where[walks] = steps
        # what a lane meets in its first turns of a block, by the class that it begins in
        all_met = self.table[:, -1]
        self.turns = np.zeros((2 * self.shifts + 1, len(self.quotas)), np.int64)
        self.turns[1:] = np.concatenate([all_met, all_met]).cumsum(0)

    def dataset(self, lane, rounds):
        """The data set of lanes' rounds, int64 arrays that broadcast."""
        turn = rounds % BLOCK // self.rounds
        return self.row[(lane + rounds * self.lanes + turn) % BLOCK]

    def count(self, lane, rounds, dataset):
        """How often lanes meet data sets in their first so many rounds; arrays that broadcast."""
        block, inside = rounds // BLOCK, rounds % BLOCK
        turn, steps = inside // self.rounds, inside % self.rounds

        # whole blocks, and whole turns of the last one
        first = lane % self.shifts
        count = block * self.quotas[dataset]
        count = count + self.turns[first + turn, dataset] - self.turns[first, dataset]

        # steps of a turn, which may go around the end of the walk
        place = (lane + turn) % BLOCK
        kind, begin = place % self.shifts, self.where[place]
        end = begin + steps
        count = count + self.table[kind, np.minimum(end, self.rounds), dataset]
        count = count - self.table[kind, begin, dataset]
        return count + self.table[kind, np.maximum(end - self.rounds, 0), dataset]

    def drawn(self, n):
        """How often each lane meets each data set before position n: (lanes, data sets)."""
        lane = np.arange(self.lanes)[:, None]
        rounds = np.maximum(n - lane + self.lanes - 1, 0) // self.lanes
        return self.count(lane, rounds, np.arange(len(self.quotas))[None])


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


def row_of(quotas):
    """4096 places, each given to the data set that is furthest behind its share; a tie to the
    first."""
    behind, row = np.zeros(len(quotas), np.int64), np.empty(BLOCK, np.int64)
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
