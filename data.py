"""Data: which sample stands at which position of a run, reading it from tar shards, and batches.

    python data.py out/vlm_emoji/config.json --show_steps=100:103

prints which samples steps 100, 101 and 102 saw. A data set is a folder of plain .tar shards
(webdataset's format), best with a `manifest.jsonl`. `Order` is a pure function of the position:
nothing depends on the number of ranks or workers. Several data sets are mixed by mixing.py, those
of more than a million samples go as lanes.py says, past.py goes on from a checkpoint.
"""
import hashlib
import itertools
import math
import os
import threading
import time
from dataclasses import asdict, dataclass

import numpy as np

from processor import BadSample, collate, is_read
from shards import CACHE, Folder  # noqa: F401

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


# -------------------------------------------------------------------------------------------------
# the order

BLOCK = 4096                    # positions of which each data set gets its quota
WHOLE = 1 << 20                 # samples up to which a data set is permuted whole


class Order:
    """Position n of a run -> (data set, epoch, shard, index in the shard): a pure function.

    datasets: a list of [(shard name, samples), ...] or of arrays of samples; weights: a number for
    each, of any sum.
    1. Every position is mixed by itself (mixing.py): any stretch of positions holds the share of
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
        for key, value in dict(lanes=lanes, window=window).items():
            if value < 1:
                raise ValueError(f'{key}={value} is too small')
        # a lane has at least one turn a block
        if lanes & -lanes > BLOCK:
            raise ValueError(f'lanes={lanes} is too large')
        quotas = quotas_of(weights)
        for number, (quota, samples) in enumerate(zip(quotas, self.samples)):
            if quota > 0 and samples == 0:
                raise ValueError(f'data set {number} is empty: give it weight 0')

        self.numbers = np.array(numbers or range(len(datasets)), np.int64)
        self.starts = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in self.sizes]
        # what was drawn before, beside what this mixture would have given until then
        self.offset, self.large, self.mixture = np.zeros(len(datasets), np.int64), {}, None
        if len(datasets) > 1 or max(self.samples) > whole:
            from mixing import Mixture
            self.mixture = Mixture(quotas, lanes)
        for number, samples in enumerate(self.samples):
            before = drawn[number] if drawn else 0
            if samples > whole:
                # the only ones that need it
                from lanes import Lanes
                self.large[number] = Lanes(self, number, lanes, window, before)
            elif drawn:
                self.offset[number] = np.sum(before) - self.count(start, number)

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
        dataset = self.mixture.dataset(flat) if self.mixture else np.zeros_like(flat)
        epoch, shard, index = (np.empty_like(flat) for _ in range(3))
        for number in np.unique(dataset).tolist():
            own = dataset == number
            if number in self.large:
                epoch[own], shard[own], index[own] = self.large[number].locate(flat[own])
                continue
            # a set is small, so it goes by what the whole run drew of it
            drawn = self.count(flat[own], number) + self.offset[number]
            epoch[own], place = self.place(number, drawn)
            shard[own] = np.searchsorted(self.starts[number], place, side='right') - 1
            index[own] = place - self.starts[number][shard[own]]
        return tuple(x.reshape(n.shape) for x in (dataset, epoch, shard, index))

    def place(self, number, drawn):
        """Of the samples that a data set gives after `drawn` others: epoch, and place in it as it
        lies on the disk."""
        samples = self.samples[number]
        epoch, index = drawn // samples, drawn % samples
        return epoch, permute(index, samples, self.hash(number, 4, epoch))

    def hash(self, number, kind, epoch, *values):
        """Keys of the permutations of a data set."""
        return hash64(self.seed, kind, self.numbers[number], epoch, *values)

    permute = staticmethod(permute)     # for lanes.py, which imports nothing of this

    def count(self, n, number):
        """How many of the positions before n are of a data set."""
        return self.mixture.before(n, number) if self.mixture else n

    def drawn(self, n, number):
        """What the run drew of a data set before position n: a number; of a large one, one for
        each lane."""
        if number in self.large:
            return self.large[number].drawn(n).tolist()
        return int(self.count(n, number) + self.offset[number])

    def before(self, n, number):
        """How many samples of a data set the run drew before position n."""
        return int(np.sum(self.drawn(n, number)))

    def seen(self, number, drawn):
        """Of what was drawn of a data set: how many whole epochs, and {shard: samples} of the
        epochs after them."""
        if number in self.large:
            whole_epochs, counts = self.large[number].seen(np.asarray(drawn))
        else:
            # a data set of weight 0 may be empty
            whole_epochs, rest = divmod(drawn, max(self.samples[number], 1))
            _, place = self.place(number, drawn - rest + np.arange(rest))
            shard = np.searchsorted(self.starts[number], place, side='right') - 1
            counts = np.bincount(shard, minlength=len(self.sizes[number]))
        met = np.flatnonzero(counts)
        return whole_epochs, dict(zip(met.tolist(), counts[met].tolist()))


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
        self.pack, self.multiple, self.said = pack, multiple, set()
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
                import sequences
                ids, failed = sequences.read(folder, shards, indexes, self.processor.tokenizer)
                ready.append((ids, number, positions[own]))
                for row, error in failed:
                    bad.append(complaint(folder, shards[row], indexes[row], error))
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
            if self.seed is not None and self.processor.eyes:
                rng = self.processor.eyes.random(self.seed, 4, position)
            try:
                members = folder.read(shard, index)
                if not all(map(is_read, members)):
                    import unread
                    unread.look(folder, shard, members, self.processor, self.said)
                for piece in self.processor.pieces(members, rng, folder.path):
                    pieces.append((position, piece | {'part': number, 'position': position}))
            except BadSample as error:
                pieces.append((position, None))
                bad.append(complaint(folder, shard, index, error))
        return pieces

def complaint(folder, shard, index, error):
    """The line of a bad sample."""
    return f'{folder.shard_path(shard)}, {folder.key(shard, index)}: {error}'


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


# -------------------------------------------------------------------------------------------------
# a run's past is written down, not recomputed from today's settings


@dataclass
class Chapter:
    """From which step and position on a run was ordered how; settings as train.py has them."""
    step: int
    position: int
    batch_size: int
    mix: dict                   # data set -> weight
    seed: int
    window: int
    whole: int
    numbers: dict               # data set -> its number in the run
    drawn: dict                 # data set -> what the run drew of it before (as Order's)


class History:
    """The chapters of a run, and its data sets {name: Folder} as they were first met. It begins
    with one; past.py goes on from a checkpoint."""

    def __init__(self, settings, folders):
        self.lanes, self.folders = settings['lanes'], folders
        # what each data set is; what a checkpoint said of those that are in the mix no more
        self.sets, self.seen_before = {}, {}
        self.orders, self.end = {}, math.inf            # by chapters; the last position
        for name, folder in folders.items():
            self.meet(name, folder)
        self.chapters = [self.chapter(settings)]

    def meet(self, name, folder):
        """A data set, as it is, gets the next number."""
        # one that was adopted gets another one, and so another order
        taken = [each['number'] for each in self.sets.values()]
        self.sets[name] = what_is(folder) | dict(number=max(taken, default=-1) + 1)

    def chapter(self, settings, step=0, position=0, drawn=None):
        """The Chapter of a command."""
        numbers = {name: self.sets[name]['number'] for name in settings['mix']}
        # no setting of the model, of ranks or workers: the order does not depend on them
        return Chapter(step, position, settings['batch_size'], dict(settings['mix']),
                       settings['seed'], settings['window'], settings['whole'], numbers,
                       drawn or {})

    def to_json(self):
        chapters = [asdict(chapter) for chapter in self.chapters]
        return dict(lanes=self.lanes, sets=self.sets, chapters=chapters)

    def order_at(self, step):
        """The Order of the step after `step` others. Raises ValueError."""
        # made once: that of a million shards takes a second
        chapter = self.chapter_of(step)
        if chapter.step not in self.orders:
            self.orders[chapter.step] = self.order_of(chapter)
        return self.orders[chapter.step]

    def order_of(self, chapter):
        # what is no more can not be looked into
        for name, number in chapter.numbers.items():
            if number != self.sets[name]['number']:
                raise ValueError(f'data set {name!r} is not what it was at step '
                                 f'{chapter.step + 1}: another one was adopted since')
        try:
            return Order([self.folders[name].sizes for name in chapter.mix],
                         list(chapter.mix.values()), chapter.seed, self.lanes, chapter.window,
                         chapter.whole, chapter.position,
                         [chapter.drawn.get(name, 0) for name in chapter.mix],
                         list(chapter.numbers.values()))
        except ValueError as error:
            raise ValueError(f'mix={chapter.mix}: {error}') from None

    @property
    def order(self):
        """The Order of the last chapter. Raises ValueError."""
        return self.order_at(self.chapters[-1].step)

    def chapter_of(self, step):
        """The chapter that the step after `step` others is of."""
        return [chapter for chapter in self.chapters if chapter.step <= step][-1]

    def position_of(self, step):
        """Samples of the run before the step after `step` others."""
        chapter = self.chapter_of(step)
        # the last batch may have been cut short
        return min(chapter.position + (step - chapter.step) * chapter.batch_size, self.end)

    def positions_of(self, step, at_once, rank=0, world=1):
        """A rank's positions of the step after `step` others: arrays of at most at_once."""
        begin, end = self.position_of(step), self.position_of(step + 1)
        # of a short batch a rank may have none
        mine = np.arange(begin + (rank - begin) % world, end, world)
        return np.split(mine, range(at_once, len(mine), at_once)) if len(mine) else []

    def length(self, settings):
        """(steps, steps that leave a checkpoint) of the run. Raises ValueError."""
        last, order, batch_size = self.chapters[-1], self.order, settings['batch_size']
        # rounded up, but for what is no fraction of a sample: 0.1 * 30 is 3.0000000000000004
        epochs = round(settings['epochs'] * order.samples_in_use, 6)
        samples, steps = settings['max_samples'] or math.ceil(epochs), settings['max_steps']
        if samples:
            # the last batch is as short as it must be
            self.end = max(samples, last.position)
            steps = last.step + -(-(self.end - last.position) // batch_size)
        num_checkpoints = settings['num_checkpoints']
        if num_checkpoints > steps:
            raise ValueError(f'num_checkpoints={num_checkpoints}, but the run has {steps} steps')

        # each data set by itself, for weights make their epochs unequal
        end = self.position_of(steps)
        for number, name in enumerate(settings['mix']):
            taken, there = order.before(end, number), order.samples[number]
            if taken > there and not settings['allow_repeat']:
                raise ValueError(
                    f'allow_repeat=False, but a run of {end} samples takes {taken} of {name!r}, '
                    f'which has {there}: make the run shorter or its weight smaller')
        return steps, {round(steps * (i + 1) / num_checkpoints) for i in range(num_checkpoints)}

    def provenance(self, step):
        """What the steps before `step` saw of each data set: {data set: {samples, whole_epochs,
        shards_of_next_epoch}}."""
        mix = self.chapter_of(step).mix
        seen_of = {name: seen for name, seen in self.seen_before.items() if name not in mix}
        order, position = self.order_at(step), self.position_of(step)
        for number, name in enumerate(mix):
            # counted, not gone through: a run may be of a billion samples
            drawn, name_of = order.drawn(position, number), self.folders[name].name
            whole_epochs, shards = order.seen(number, drawn)
            by_name = {name_of(shard): samples for shard, samples in sorted(shards.items())}
            seen_of[name] = dict(samples=int(np.sum(drawn)), whole_epochs=whole_epochs,
                                 shards_of_next_epoch=by_name)
        return seen_of


def what_is(folder):
    """What tells a data set from another one."""
    # not the bytes of all shards, which take hours to read
    names = hashlib.sha256(folder.names.tobytes() + folder.sizes.tobytes()).hexdigest()[:16]
    return dict(samples=len(folder), shards=len(folder.sizes), names=names)


# -------------------------------------------------------------------------------------------------
# what train.py asks for


# beyond these, positions are no int64, or one batch fills the memory
RANGES = ((1, 1 << 40, 'log_every window lanes'), (1, 1 << 20, 'num_checkpoints seq_len'),
          (0, 1 << 40, 'eval_every keep_last warmup skip_bad_steps max_bad_fraction '
                       'max_bad_shards whole cache_gb max_steps max_samples epochs'),
          (0, 1 << 20, 'batch_size micro_batch_size'), (0, 1024, 'workers'),
          (0, 2 ** 63 - 1, 'seed'))


def check(settings, world):
    """Raises ValueError, one line with key, value and remedy, for settings of data and length."""
    for least, most, keys in RANGES:
        for key in keys.split():
            if not least <= settings[key] <= most:
                raise ValueError(f'{key}={settings[key]} must be at least {least}, at most {most}')
    for name, place in settings['val'].items():
        if not isinstance(place, str):
            raise ValueError(f'val: {name!r} is {place!r}: expected the name of a data set')

    batch_size, micro_batch = settings['batch_size'], settings['micro_batch_size']
    unit = world * max(micro_batch, 1)
    if batch_size < 1 or batch_size % unit:
        below, above = max(batch_size // unit, 1) * unit, (max(batch_size, 0) // unit + 1) * unit
        raise ValueError(f'batch_size={batch_size} is not a multiple of {world} ranks x '
                         f'micro_batch_size={micro_batch or 1}: {below} or {above} would fit')

    lengths = {key: settings[key] for key in ('max_steps', 'max_samples', 'epochs')}
    if sum(value > 0 for value in lengths.values()) != 1:
        given = ', '.join(f'{key}={value}' for key, value in lengths.items())
        raise ValueError(f'the run\'s length is one of {given}: set one above 0 and leave the '
                         'others at 0')


def open_mix(settings):
    """The folders of a mix, {data set: Folder}, and the History of a run that begins. Raises
    ValueError and OSError."""
    folders = {name: open_folder(name, settings, 'mix') for name in settings['mix']}
    if len(folders) > 1:
        from usage import check_each_once
        check_each_once(folders)
    return folders, History(settings, folders)


def open_folder(name, settings, key):
    """The data set that a setting names. Raises ValueError."""
    try:
        return Folder(name, settings['data_dir'], settings['cache_dir'], settings['cache_gb'])
    except (ValueError, OSError) as error:
        raise ValueError(f'{key}: {error}') from None


def open_validation(settings, processor, pack):
    """{name: (folder, its batches in order)} of the data sets that are validated on."""
    opened = {}
    for name, path in settings['val'].items():
        folder = open_folder(path, settings, 'val')
        opened[name] = folder, Batches([folder], InOrder(folder.sizes), processor, pack=pack)
    return opened


if __name__ == '__main__':
    # the command is a script of its own, which imports this file
    import runpy
    here = os.path.dirname(os.path.abspath(__file__))
    runpy.run_path(os.path.join(here, 'show_steps.py'), run_name='__main__')
