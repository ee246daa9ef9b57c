"""Data: which sample stands at which position of a run, reading it from tar shards, and batches.

    python data.py out/vlm_emoji/config.json --show_steps=100:103

prints which samples steps 100, 101 and 102 saw. A data set is a folder of plain .tar shards
(webdataset's format), best with a `manifest.jsonl`. `Order` is a pure function of the position:
nothing is recorded to resume, and nothing depends on the number of ranks or workers.
"""
import functools
import itertools
import math
import os
import threading
import time

import numpy as np

from processor import BadSample, collate
from shards import CACHE, Folder

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
# the order of a run

BLOCK = 4096                    # rounds in which the mixing shares are exact


class Order:
    """Position n of a run -> (data set, epoch, shard, index in the shard): a pure function.

    datasets: a list of [(shard name, samples), ...] or of arrays of samples; weights: a number for
    each, of any sum.
    1. n = round * lanes + slot. Rank r of W takes the positions congruent to r mod W, so what a
       batch holds does not depend on W; when W divides `lanes`, a rank stays in its own lanes and
       so in its own shards.
    2. A round belongs to one data set. Each block of 4096 rounds gives every data set its exact
       share, by largest remainder, in hashed order.
    3. Each data set runs through epochs of its own. An epoch permutes the shards; every lane owns
       a contiguous range of the samples, permuted in windows of `window` samples. Lane sizes
       differ by one at most, so an epoch holds every sample exactly once and the next begins at
       the very next position."""

    def __init__(self, datasets, weights, seed=0, lanes=64, window=1024):
        # samples of each shard
        self.sizes = []
        for shards in datasets:
            if not isinstance(shards, np.ndarray):
                shards = np.array([samples for _, samples in shards], np.int64)
            self.sizes.append(shards)
        self.samples = [int(sizes.sum()) for sizes in self.sizes]
        self.weights, self.seed, self.lanes, self.window = list(weights), seed, lanes, window
        if len(weights) != len(datasets) or not datasets:
            raise ValueError(f'{len(datasets)} data sets and {len(weights)} weights: give one '
                             'weight a data set')
        if lanes < 1 or window < 1:
            raise ValueError(f'lanes={lanes} and window={window} must be at least 1')
        numbers = all(isinstance(w, (int, float)) and 0 <= w < np.inf for w in weights)
        if not numbers or sum(weights) <= 0:
            raise ValueError(f'weights {list(weights)}: they must be numbers, finite, not '
                             'negative, not all zero')

        # largest remainder: each share rounded down, then those that lost most get one more
        exact = np.array(weights, np.float64) / sum(weights) * BLOCK
        self.quotas = np.floor(exact).astype(np.int64)
        most_lost = np.argsort(-(exact - self.quotas), kind='stable')
        self.quotas[most_lost[:BLOCK - self.quotas.sum()]] += 1
        for i, (quota, weight) in enumerate(zip(self.quotas, weights)):
            if weight > 0 and quota == 0:
                raise ValueError(f'data set {i}: weight {weight} of {sum(weights)} is less than '
                                 f'one round in {BLOCK}; give it at least '
                                 f'{sum(weights) / BLOCK:g}')
            if quota > 0 and self.samples[i] == 0:
                raise ValueError(f'data set {i} is empty: give it weight 0')

        # a place in the permuted block below bounds[i + 1] and from bounds[i] on is of data set i
        self.bounds = np.concatenate([[0], np.cumsum(self.quotas)])
        self.block = functools.lru_cache(64)(self._block)
        self.shards = functools.lru_cache(2 * len(datasets) + 2)(self._shards)

    def __reduce__(self):
        # without its caches, which can not be pickled: workers need not be forked
        return Order, (self.sizes, self.weights, self.seed, self.lanes, self.window)

    def _block(self, block):
        """For each round of the block: its data set, and how many rounds of that data set came
        before in the block."""
        place = permute(np.arange(BLOCK), BLOCK, hash64(self.seed, 1, block))
        dataset = np.searchsorted(self.bounds, place, side='right') - 1
        before = np.zeros(BLOCK, np.int64)
        for i in range(len(self.quotas)):
            before[dataset == i] = np.arange(self.quotas[i])
        return dataset, before

    def _shards(self, dataset, epoch):
        """The shards of an epoch in their order, and where each one's samples begin in it (one
        more: the end)."""
        sizes = self.sizes[dataset]
        hashes = hash64(self.seed, 2, dataset, epoch, np.arange(len(sizes)))
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
        if n.size and n.min() < 0:
            raise ValueError(f'position {n.min()}: positions begin at 0')
        flat = n.reshape(-1)
        rounds, slot = flat // self.lanes, flat % self.lanes

        # block by block: the data set, and the number of the round among those of its data set
        blocks, round_in_block = rounds // BLOCK, rounds % BLOCK
        dataset, own_round = np.empty_like(flat), np.empty_like(flat)
        for block in np.unique(blocks):
            inside = blocks == block
            of_round, before = self.block(int(block))
            dataset[inside] = of_round[round_in_block[inside]]
            earlier = block * self.quotas[dataset[inside]]
            own_round[inside] = earlier + before[round_in_block[inside]]
        epoch, place = self._place(dataset, own_round * self.lanes + slot)

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
        """Of the p-th samples of data sets: epoch, where their lane begins in the epoch's row of
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
        """Epoch, and the place in the epoch's row of samples, of the p-th samples of data sets."""
        epoch, start, owned, turn = self._lane(dataset, p)
        # the last window of a lane may be smaller
        window = turn // self.window
        size = np.minimum(self.window, owned - window * self.window)
        key = hash64(self.seed, 3, dataset, epoch, p % self.lanes, window)
        return epoch, start + window * self.window + permute(turn % self.window, size, key)

    def before(self, n, dataset):
        """How many samples of a data set stand before position n."""
        rounds, slot = divmod(int(n), self.lanes)
        block, in_block = divmod(rounds, BLOCK)
        of_round = self.block(block)[0]
        own_rounds = block * int(self.quotas[dataset])
        own_rounds += int((of_round[:in_block] == dataset).sum())
        samples = own_rounds * self.lanes
        # a round that is under way
        if of_round[in_block] == dataset:
            samples += slot
        return samples

    def seen(self, dataset, count):
        """The first `count` samples of a data set: how many whole epochs, and {shard: samples} of
        the epoch after them.

        Windows that a lane has finished are ranges of the epoch's row, so this takes no time for
        each sample."""
        samples, lanes = self.samples[dataset], self.lanes
        epoch, p = divmod(count, samples)
        order, starts = self.shards(dataset, epoch)

        # The first positions of an epoch are each in another lane. turns: how many samples each
        # lane gave; finished: how many of those are in windows that are over.
        first = np.arange(min(p, lanes))
        turns = -(-(p - first) // lanes)
        finished = turns // self.window * self.window
        first += epoch * samples

        # windows under way: sample by sample
        late = [f + lanes * np.arange(w, t) for f, w, t in zip(first, finished, turns)]
        late = np.concatenate(late or [first])
        place = self._place(np.full_like(late, dataset), late)[1]
        shard = np.searchsorted(starts, place, side='right') - 1
        counts = np.bincount(shard, minlength=len(order))

        # finished ones: ranges, in which the count grows by one a place; beside them it stays
        if finished.any():
            begin = self._lane(np.full_like(first, dataset), first)[1][finished > 0]
            length = finished[finished > 0]
            by_place = np.argsort(begin)
            begin, length = begin[by_place], length[by_place]
            knots = np.stack([begin, begin + length], 1).ravel()
            level = np.cumsum(np.stack([0 * length, length], 1).ravel())
            counts += np.diff(np.interp(starts, knots, level)).astype(np.int64)
        met = counts > 0
        return epoch, dict(zip(order[met].tolist(), counts[met].tolist()))


class InOrder:
    """The locate of `Order` for a validation pass over one folder: position n is sample n."""

    def __init__(self, sizes):
        self.starts = np.concatenate([[0], np.cumsum(sizes)])

    def locate(self, n):
        n = np.asarray(n, np.int64)
        shard = np.searchsorted(self.starts, n, side='right') - 1
        return np.zeros_like(n), np.zeros_like(n), shard, n - self.starts[shard]


# -------------------------------------------------------------------------------------------------
# batches


class Batches:
    """Positions -> the batch they stand for; what DataLoader's workers run.

    A sample that can not be used becomes an empty row and a line in the batch's `bad`; a shard
    that is gone or damaged gives {'error': one line}. seed=None: no augmentation; pack, multiple:
    see `collate`; ahead: how many positions ahead remote shards are fetched."""

    def __init__(self, folders, order, processor, seed=None, pack=False, multiple=1, ahead=0):
        self.folders, self.order, self.processor, self.seed = folders, order, processor, seed
        self.pack, self.multiple = pack, multiple
        self.remote = [number for number, folder in enumerate(folders) if folder.is_remote]
        self.ahead = ahead if self.remote else 0
        vocab_size = processor.tokenizer.vocab_size
        for folder in folders:
            # of an episode no more than a chunk is read
            folder.horizon = processor.episode_rows
            if folder.sequence_length > processor.seq_len + 1:
                raise ValueError(
                    f'data set {folder.path!r} has sequence_length={folder.sequence_length}: it '
                    f'needs seq_len={folder.sequence_length - 1}, not {processor.seq_len}')
            if folder.vocab_size not in (0, vocab_size):
                raise ValueError(
                    f'data set {folder.path!r} was made with a tokenizer of {folder.vocab_size} '
                    f'tokens, this one has {vocab_size}: give tokenizer the file beside it')

    def __getitem__(self, positions):
        """An array of positions, or a pair of it and what order.locate says of them."""
        if isinstance(positions, tuple):
            positions, places = positions
        else:
            places = self.order.locate(positions)
        try:
            return self.read(positions, *places)
        except (OSError, ValueError) as error:
            # a shard that is gone or damaged stops the run, in one line
            return dict(error=str(error))

    def read(self, positions, dataset, _, shard, index):
        """The batch. Raises OSError and ValueError."""
        self.fetch(dataset, shard)
        if self.ahead:
            later, _, later_shard, _ = self.order.locate(positions + self.ahead)
            self.fetch(later, later_shard)

        # data set by data set; pieces: (position, what `collate` makes rows of)
        bad, ready, pieces = [], [], []
        for number in sorted(set(dataset.tolist())):
            folder, own = self.folders[number], dataset == number
            shards, indexes = shard[own].tolist(), index[own].tolist()
            if folder.sequence_length:
                ready.append((self.sequences(folder, shards, indexes, bad), number))
            else:
                places = zip(positions[own].tolist(), shards, indexes)
                pieces += self.samples(folder, number, places, bad)

        # a batch is in the order of its positions, whatever data sets they are of
        pieces.sort(key=lambda piece: piece[0])
        pieces = [piece for _, piece in pieces]
        return collate(pieces, self.processor, self.pack, self.multiple, ready) | dict(bad=bad)

    def fetch(self, dataset, shard):
        for number in self.remote:
            self.folders[number].fetch(np.unique(shard[dataset == number]).tolist())

    def samples(self, folder, number, places, bad):
        """(position, piece) of each sample; one that can not be used is (position, None)."""
        pieces = []
        for position, shard, index in places:
            rng = None
            if self.seed is not None:
                rng = Random(self.seed, 4, position)
            try:
                for piece in self.processor.pieces(folder.read(shard, index), rng):
                    pieces.append((position, piece | {'part': number, 'position': position}))
            except BadSample as error:
                pieces.append((position, None))
                bad.append(complaint(folder, shard, index, error))
        return pieces

    def sequences(self, folder, shards, indexes, bad):
        """Tokenized sequences: (samples, sequence_length), of the type they are stored in."""
        rows, failed = [], {}
        for shard, index in zip(shards, indexes):
            try:
                rows.append(folder.read_sequence(shard, index))
            except BadSample as error:
                failed[len(rows)] = error
                # which is padding
                rows.append(bytes([255]) * folder.sequence_bytes)
        ids = np.frombuffer(bytearray().join(rows), folder.dtype).reshape(len(rows), -1)

        # padding is past the vocabulary, too: most batches that have none are told at once
        padding, vocab_size = np.iinfo(folder.dtype).max, self.processor.tokenizer.vocab_size
        if ids.max() >= vocab_size:
            unknown = (ids >= vocab_size) & (ids != padding)
            for row in np.flatnonzero(unknown.any(1)).tolist():
                failed[row] = (f'token {ids[row][ids[row] != padding].max()} of a tokenizer of '
                               f'{vocab_size}: made with another one?')
                ids[row] = padding
        for row in sorted(failed):
            bad.append(complaint(folder, shards[row], indexes[row], failed[row]))
        return ids


def complaint(folder, shard, index, error):
    """The line of a bad sample."""
    return f'{folder.shard_path(shard)}, {folder.key(shard, index)}: {error}'


def positions_of_step(step, batch_size, micro_batch_size, rank=0, world=1):
    """The micro-batches of a rank in one step: arrays of positions. micro_batch_size * world
    divides batch_size."""
    own = np.arange(step * batch_size + rank, (step + 1) * batch_size, world)
    return np.split(own, batch_size // world // micro_batch_size)


def located(order, positions, many=64):
    """Position arrays -> pairs of them and what `order.locate` says, asked for `many` arrays at a
    time."""
    positions = iter(positions)
    while chunk := list(itertools.islice(positions, many)):
        # one call for many arrays takes hardly longer than for one
        cuts = np.cumsum([len(array) for array in chunk])[:-1]
        places = order.locate(np.concatenate(chunk))
        yield from zip(chunk, zip(*(np.split(each, cuts) for each in places)))


def loader(batches, positions, workers=0):
    """Batches for an iterable of position arrays, in its order, read by `workers` processes (0: in
    this one)."""
    from torch.utils.data import DataLoader
    return DataLoader(batches, batch_size=None, sampler=located(batches.order, positions),
                      num_workers=workers, prefetch_factor=4 if workers else None,
                      worker_init_fn=quiet_worker, collate_fn=share if workers else as_it_is)


def as_it_is(batch):
    return batch


def share(batch):
    """Large arrays as tensors, which travel through shared memory; below 512 KB a pipe is quicker
    (bench/data.py)."""
    import torch
    shared = {}
    for key, value in batch.items():
        if isinstance(value, dict):
            value = share(value)
        elif isinstance(value, np.ndarray) and value.nbytes >= 1 << 19:
            value = torch.from_numpy(value)
        shared[key] = value
    return shared


def quiet_worker(_):
    """One thread a worker, in a process group of its own."""
    import torch
    torch.set_num_threads(1)
    # Ctrl-C and a batch system's SIGTERM reach the main process alone, which finishes its step,
    # saves, and closes the workers
    os.setpgid(0, 0)
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()


def leave_with(parent):
    """End this worker when its parent is no more."""
    # else, after a SIGKILL, it waits for ever to hand over a batch
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def provenance(order, folders, n):
    """What the positions below n saw of each data set: {data set: {samples, whole_epochs,
    shards_of_next_epoch}}."""
    seen_of = {}
    for number, folder in enumerate(folders):
        count = order.before(n, number)
        epochs, shards = 0, {}
        # a data set of weight 0 may be empty: it has no epochs
        if count:
            epochs, shards = order.seen(number, count)
        by_name = {folder.name(shard): samples for shard, samples in sorted(shards.items())}
        seen_of[folder.path] = dict(
            samples=count, whole_epochs=epochs, shards_of_next_epoch=by_name)
    return seen_of


def check(settings, world):
    """Raises ValueError, one line with key, value and remedy, for settings of data and length."""
    for key in ('log_every', 'num_checkpoints', 'seq_len', 'lanes', 'window'):
        if settings[key] < 1:
            raise ValueError(f'{key}={settings[key]} must be at least 1')
    for key in ('eval_every', 'keep_last', 'workers', 'warmup', 'seed', 'skip_bad_steps',
                'max_bad_fraction', 'micro_batch_size'):
        if settings[key] < 0:
            raise ValueError(f'{key}={settings[key]} must be at least 0')

    batch_size, micro_batch = settings['batch_size'], settings['micro_batch_size']
    unit = world * max(micro_batch, 1)
    if batch_size < 1 or batch_size % unit:
        below, above = max(batch_size // unit, 1) * unit, (max(batch_size, 0) // unit + 1) * unit
        raise ValueError(f'batch_size={batch_size} is not a multiple of {world} ranks x '
                         f'micro_batch_size={micro_batch or 1}: {below} or {above} would fit')

    lengths = {key: settings[key] for key in ('max_steps', 'max_samples', 'epochs')}
    for key, value in lengths.items():
        if value < 0:
            raise ValueError(f'{key}={value} must be at least 0')
    if sum(value > 0 for value in lengths.values()) != 1:
        given = ', '.join(f'{key}={value}' for key, value in lengths.items())
        raise ValueError(f'the run\'s length is one of {given}: set one above 0 and leave the '
                         'others at 0')


def length(settings, order):
    """(steps, steps that leave a checkpoint) of a run. Raises ValueError."""
    batch_size, num_checkpoints = settings['batch_size'], settings['num_checkpoints']
    samples = settings['max_samples'] or settings['epochs'] * order.samples_in_use
    steps = settings['max_steps'] or math.ceil(samples / batch_size)
    if num_checkpoints > steps:
        raise ValueError(f'num_checkpoints={num_checkpoints}, but the run has {steps} steps')

    for number, name in enumerate(settings['mix']):
        taken, there = order.before(steps * batch_size, number), order.samples[number]
        if taken > there and not settings['allow_repeat']:
            raise ValueError(
                f'allow_repeat=False, but a run of {steps * batch_size} samples takes {taken} of '
                f'{name!r}, which has {there}: make the run shorter or its weight smaller')
    return steps, {round(steps * (i + 1) / num_checkpoints) for i in range(num_checkpoints)}


def open_mix(mix, data_dir, seed, lanes, window, cache_dir=CACHE, cache_gb=100.0):
    """The folders of a mix {data set: weight} and their order."""
    folders = [Folder(name, data_dir, cache_dir, cache_gb) for name in mix]
    try:
        sizes = [folder.sizes for folder in folders]
        return folders, Order(sizes, list(mix.values()), seed, lanes, window)
    except ValueError as error:
        raise ValueError(f'mix={mix}: {error}') from None


def open_validation(settings, processor, pack):
    """{name: (folder, its batches in order)} of the data sets that are validated on."""
    opened = {}
    for name, path in settings['val'].items():
        folder = Folder(path, settings['data_dir'], settings['cache_dir'], settings['cache_gb'])
        opened[name] = folder, Batches([folder], InOrder(folder.sizes), processor, pack=pack)
    return opened


if __name__ == '__main__':
    # the command is a script of its own, which imports this file
    import runpy
    here = os.path.dirname(os.path.abspath(__file__))
    runpy.run_path(os.path.join(here, 'show_steps.py'), run_name='__main__')
