"""Shards that may be lost: `max_bad_shards` of a run are allowed to be gone, changed or damaged.

train.py imports this where the setting is above 0. Each position of a lost shard becomes an empty
row, as of a bad sample, so that nothing shifts: all other positions hold what they would hold.
They count as `lost_samples` in the log, and not against max_bad_fraction.
"""
import torch.distributed as dist

import parallel
from shards import BadSample

NO_KEY = '(lost)'           # stands where a bad sample's line has its key


class Spared:
    """A Folder of which a shard that can not be read makes bad samples. It is not tried again: a
    place that is gone is waited for once."""

    def __init__(self, folder):
        self.folder, self.lost = folder, {}         # shard -> why it is lost

    def __getattr__(self, name):
        # a copy that is just being unpickled has no folder yet
        if name == 'folder':
            raise AttributeError(name)
        return getattr(self.folder, name)

    def fetch(self, shards):
        self.folder.fetch([shard for shard in shards if shard not in self.lost])

    def read(self, shard, index):
        return self.unless_lost(self.folder.read, shard, index)

    def read_sequence(self, shard, index):
        return self.unless_lost(self.folder.read_sequence, shard, index)

    def unless_lost(self, read, shard, index):
        """read(shard, index). Raises BadSample."""
        if shard not in self.lost:
            try:
                return read(shard, index)
            except (OSError, ValueError) as error:
                self.lost[shard] = ' '.join(str(error).split())
        raise BadSample(self.lost[shard])

    def key(self, shard, index):
        if shard in self.lost:
            return NO_KEY
        return self.folder.key(shard, index)


def spare(batches):
    """Let the folders of `batches` lose shards."""
    batches.folders = [Spared(folder) for folder in batches.folders]


def count(progress, batches, most):
    """Take the lines of lost shards from the batches of a step, and count over all ranks what was
    lost: in `progress`, 'lost' for the log and the shards' names. What is wrong if they are more
    than `most`, or ''. Every rank calls it."""
    reasons, num_samples = take_lines(batches)
    # another rank may have met another one
    of_ranks = [(reasons, num_samples)]
    if parallel.world > 1:
        of_ranks = [None] * parallel.world
        dist.all_gather_object(of_ranks, (reasons, num_samples))

    # anew, for a checkpoint that is being written holds the old ones
    before = progress.get('lost', dict(bad_shards=0, lost_samples=0))
    names = [*progress.get('lost_shards', [])]
    for theirs, _ in of_ranks:
        for path, why in sorted(theirs.items()):
            if path not in names:
                names.append(path)
                parallel.say(f'\nlost shard: {path}: {why}; its samples are left out')
    lost_samples = before['lost_samples'] + sum(number for _, number in of_ranks)
    progress['lost'] = dict(bad_shards=len(names), lost_samples=lost_samples)
    progress['lost_shards'] = names

    if len(names) > most:
        return (f'{len(names)} shards are lost, over max_bad_shards={most}: bring back '
                f'{names[-1]}, or raise the bound')
    return ''


def take_lines(batches):
    """{path: why} of the lost shards that the bad samples of batches are of, and how many samples
    that is; of `bad` they are taken away."""
    reasons, num_samples = {}, 0
    for batch in batches:
        kept = []
        for line in batch['bad']:
            path, mark, why = line.partition(f', {NO_KEY}: ')
            if not mark:
                kept.append(line)
                continue
            reasons[path] = why
            num_samples += 1
        # what is left counts against max_bad_fraction
        batch['bad'] = kept
    return reasons, num_samples
