"""Data: which sample stands at which position of a run, reading it from tar shards, and batches.

    python data.py out/vlm_emoji/config.json --show_steps=100:103

prints which samples steps 100, 101 and 102 saw. A data set is a folder of plain .tar shards
(webdataset's format), best with a `manifest.jsonl`. `Order` is a pure function of the position:
nothing is recorded to resume, and nothing depends on the number of ranks or workers.
"""
import hashlib
import itertools
import math
import os
import threading
import time
from dataclasses import asdict, dataclass, replace

import numpy as np

from order import Mixture, Order, Random, hash64  # noqa: F401
from processor import BadSample, collate
from shards import CACHE, Folder  # noqa: F401


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
    """The chapters of a run, and its data sets as they were first met.

    A resume with the settings of the last chapter adds nothing. One with another mix, weight,
    batch size, seed or window begins a chapter: positions go on where they stopped, and each data
    set goes on in its own epoch at its own sample. saved: a checkpoint's chapters.json."""

    def __init__(self, lanes, saved=None):
        saved = saved or dict(lanes=lanes, sets={}, chapters=[])
        self.lanes, self.sets = saved['lanes'], dict(saved['sets'])
        self.chapters = [Chapter(**chapter) for chapter in saved['chapters']]
        self.folders, self.orders, self.end = {}, {}, math.inf

    def to_json(self):
        chapters = [asdict(chapter) for chapter in self.chapters]
        return dict(lanes=self.lanes, sets=self.sets, chapters=chapters)

    def go_on(self, settings, folders, step, position):
        """Make the last chapter one of these settings, from a step and position on. Raises
        ValueError for a data set that is not what it was."""
        # what came after the checkpoint is done again
        self.chapters = [chapter for chapter in self.chapters if chapter.step <= step]
        drawn = self.drawn(step, position) if self.chapters else {}
        for name, folder in folders.items():
            if self.is_new(name, folder, settings.get('adopt', ())):
                drawn.pop(name, None)

        mix = dict(settings['mix'])
        numbers = {name: self.sets[name]['number'] for name in mix}
        chapter = Chapter(step, position, settings['batch_size'], mix, settings['seed'],
                          settings['window'], settings['whole'], numbers, drawn)
        if not self.is_continued_by(chapter):
            self.chapters = [old for old in self.chapters if old.step < step] + [chapter]
        self.folders, self.orders = dict(folders), {}

    def is_continued_by(self, chapter):
        """Would the last chapter do just what this one does?"""
        if not self.chapters:
            return False
        last = self.chapters[-1]
        position = last.position + (chapter.step - last.step) * last.batch_size
        same = replace(last, step=chapter.step, position=position, drawn=chapter.drawn) == chapter
        return same and list(last.mix) == list(chapter.mix)

    def is_new(self, name, folder, adopted):
        """Keep what a data set is; whether it begins its epochs anew. Raises ValueError where it
        is not what it was, and is not adopted."""
        names = hashlib.sha256(folder.names.tobytes() + folder.sizes.tobytes()).hexdigest()[:16]
        now = dict(samples=len(folder), shards=len(folder.sizes), names=names)
        before = self.sets.get(name)
        if before and before | now == before:
            return False
        if before and name not in adopted:
            raise ValueError(
                f'data set {name!r} is not what this run began with ({before["samples"]} samples '
                f'in {before["shards"]} shards, now {now["samples"]} in {now["shards"]}): bring '
                f'it back, or begin its epochs anew with --adopt=\'["{name}"]\'')
        taken = [each['number'] for each in self.sets.values()]
        self.sets[name] = now | dict(number=max(taken, default=-1) + 1)
        return True

    def order_at(self, step):
        """The Order of the step after `step` others. Raises ValueError."""
        chapter = self.chapter_of(step)
        if chapter.step not in self.orders:
            self.orders[chapter.step] = self.order_of(chapter)
        return self.orders[chapter.step]

    def order_of(self, chapter):
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
        mine = np.arange(begin + (rank - begin) % world, end, world)
        return np.split(mine, range(at_once, len(mine), at_once)) if len(mine) else []

    def drawn(self, step, position):
        """{data set: what the run drew of it} before a position that the step after `step` others
        begins with."""
        chapter = self.chapter_of(step)
        drawn, mixture = dict(chapter.drawn), Mixture(list(chapter.mix.values()), self.lanes)
        for number, name in enumerate(chapter.mix):
            by_lane = self.sets[name]['samples'] > chapter.whole
            drawn[name] = mixture.drawn(number, position, by_lane, chapter.position,
                                        drawn.get(name, 0))
        return drawn

    def length(self, settings):
        """(steps, steps that leave a checkpoint) of the run. Raises ValueError."""
        last, order, batch_size = self.chapters[-1], self.order, settings['batch_size']
        samples = settings['max_samples'] or round(settings['epochs'] * order.samples_in_use)
        steps = settings['max_steps']
        if samples:
            # the last batch is as short as it must be
            self.end = max(samples, last.position)
            steps = last.step + -(-(self.end - last.position) // batch_size)
        num_checkpoints = settings['num_checkpoints']
        if num_checkpoints > steps:
            raise ValueError(f'num_checkpoints={num_checkpoints}, but the run has {steps} steps')

        end = self.position_of(steps)
        for number, name in enumerate(settings['mix']):
            taken, there = order.before(end, number), order.samples[number]
            if taken > there and not settings['allow_repeat']:
                raise ValueError(
                    f'allow_repeat=False, but a run of {end} samples takes {taken} of {name!r}, '
                    f'which has {there}: make the run shorter or its weight smaller')
        return steps, {round(steps * (i + 1) / num_checkpoints) for i in range(num_checkpoints)}

    def provenance(self, folders, step, before=None):
        """What the steps before `step` saw of each data set: {data set: {samples, whole_epochs,
        shards_of_next_epoch}}. before: what a checkpoint said of data sets that are in the mix no
        more."""
        seen_of = {name: said for name, said in (before or {}).items() if name not in folders}
        order, drawn = self.order_at(step), self.drawn(step, self.position_of(step))
        for number, name in enumerate(self.chapter_of(step).mix):
            count, whole_epochs, shards = int(np.sum(drawn[name])), 0, {}
            # a data set of weight 0 may be empty: it has no epochs
            if count:
                whole_epochs, shards = order.seen(number, drawn[name])
            name_of = folders[name].name
            by_name = {name_of(shard): samples for shard, samples in sorted(shards.items())}
            seen_of[name] = dict(samples=count, whole_epochs=whole_epochs,
                                 shards_of_next_epoch=by_name)
        return seen_of


# -------------------------------------------------------------------------------------------------
# what train.py asks for


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


def open_mix(settings, saved=None, step=0, samples=0):
    """The folders of a mix, {data set: Folder}, and the History of the run. saved: the
    chapters.json of a checkpoint that the run goes on from, at a step and a position. Raises
    ValueError and OSError."""
    history = History(settings['lanes'], saved)
    folders = {name: open_folder(name, settings) for name in settings['mix']}
    history.go_on(settings, folders, step, samples)
    return folders, history


def open_folder(name, settings):
    return Folder(name, settings['data_dir'], settings['cache_dir'], settings['cache_gb'])


def open_validation(settings, processor, pack):
    """{name: (folder, its batches in order)} of the data sets that are validated on."""
    opened = {}
    for name, path in settings['val'].items():
        folder = open_folder(path, settings)
        opened[name] = folder, Batches([folder], InOrder(folder.sizes), processor, pack=pack)
    return opened


if __name__ == '__main__':
    # the command is a script of its own, which imports this file
    import runpy
    here = os.path.dirname(os.path.abspath(__file__))
    runpy.run_path(os.path.join(here, 'show_steps.py'), run_name='__main__')
