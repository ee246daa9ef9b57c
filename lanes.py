"""The order of a data set of more than `whole` samples, which `lanes` parallel streams read.

A position is of lane n mod lanes; when the number of ranks divides that of lanes, a rank stays in
its own lanes. A lane's j-th draw from the data set is sample number p = j * lanes + lane. An epoch
permutes the shards, large ones in pieces, so that a set of one sorted shard comes out mixed, too.
Every lane owns a contiguous range of their samples, permuted in windows of `window`. Nothing is
dropped or repeated inside an epoch; lanes may be some draws apart, so that one may begin an epoch
a little before another.
"""
import functools

import numpy as np


class Lanes:
    """A data set of an Order. before: what each lane drew of it before the order began, or what
    all of them drew together."""

    def __init__(self, order, number, lanes, window, before):
        self.samples = order.samples[number]
        self.cut(order.sizes[number], max(window, self.samples // (64 * lanes)))
        self.permute, self.hash = order.permute, functools.partial(order.hash, number)
        self.lanes, self.window = lanes, window
        self.walk = Walk(order.mixture, number)
        self.offset = spread(before, lanes) - self.walk.drawn(order.start)
        self.pieces = functools.lru_cache(4)(self.pieces_of)

    def cut(self, sizes, most):
        """Shards into pieces of at most so many samples: sizes, shards, where they begin in it."""
        pieces = -(-sizes // most)
        self.shard = np.repeat(np.arange(len(sizes), dtype=np.int32), pieces)
        first = np.cumsum(pieces) - pieces
        self.begin = (np.arange(len(self.shard)) - first[self.shard]) * most
        self.sizes = np.minimum(most, sizes[self.shard] - self.begin)
        self.num_shards = len(sizes)

    def pieces_of(self, epoch):
        """The pieces of an epoch in their order, and where each one's samples begin in it (one
        more: the end)."""
        hashes = self.hash(2, epoch, np.arange(len(self.sizes)))
        # half the memory of a million shards
        order = np.argsort(hashes, kind='stable').astype(np.int32)
        return order, np.concatenate([[0], np.cumsum(self.sizes[order])])

    def drawn(self, n):
        """Samples that each lane drew before position n."""
        return self.walk.drawn(n) + self.offset

    def locate(self, n):
        """Epoch, shard and index of positions that are of this data set."""
        rounds, lane = n // self.lanes, n % self.lanes
        draws = self.walk.count(lane, rounds) + self.offset[lane]
        epoch, place = self.place(draws * self.lanes + lane)
        shard, index = np.empty_like(n), np.empty_like(n)
        for each in np.unique(epoch).tolist():
            own = epoch == each
            order, starts = self.pieces(each)
            k = np.searchsorted(starts, place[own], side='right') - 1
            shard[own] = self.shard[order[k]]
            index[own] = self.begin[order[k]] + place[own] - starts[k]
        return epoch, shard, index

    def lane_of(self, p):
        """Of samples number p: epoch, where their lane begins in the epoch's row of samples, how
        many it owns, and how many it gave before in this epoch."""
        lanes, samples = self.lanes, self.samples
        slot, epoch = p % lanes, p // samples
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

    def place(self, p):
        """Epoch, and the place in the epoch's row of samples, of samples number p."""
        epoch, start, owned, turn = self.lane_of(p)
        # the last window of a lane may be smaller
        window = turn // self.window
        size = np.minimum(self.window, owned - window * self.window)
        key = self.hash(3, epoch, p % self.lanes, window)
        return epoch, start + window * self.window + self.permute(turn % self.window, size, key)

    def seen(self, draws):
        """Of what each lane drew: how many whole epochs, and the samples of each shard in the
        epochs after them."""
        lane = np.arange(self.lanes)
        # each lane's next sample
        ends = spread(draws, self.lanes) * self.lanes + lane
        counts = np.zeros(self.num_shards, np.int64)
        whole_epochs = int(ends.min()) // self.samples
        for epoch in range(whole_epochs, int(ends.max()) // self.samples + 1):
            # the first sample of each lane in this epoch, and how many it gave
            begin = epoch * self.samples
            first = begin + (lane - begin) % self.lanes
            turns = -(-(np.minimum(ends, begin + self.samples) - first) // self.lanes)
            counts += self.seen_in(epoch, first, np.maximum(turns, 0))
        return whole_epochs, counts

    def seen_in(self, epoch, first, turns):
        """Samples of each shard in an epoch of which every lane gave `turns`, from number `first`
        on. Windows that a lane has finished are ranges of the epoch's row, so this takes no time
        for each sample."""
        order, starts = self.pieces(epoch)
        finished = turns // self.window * self.window

        # windows under way: sample by sample
        late = [f + self.lanes * np.arange(w, t) for f, w, t in zip(first, finished, turns)]
        place = self.place(np.concatenate(late))[1]
        piece = np.searchsorted(starts, place, side='right') - 1
        counts = np.bincount(piece, minlength=len(order))

        # finished ones: ranges, in which the count grows by one a place; beside them it stays
        is_over = finished > 0
        if is_over.any():
            begin, length = self.lane_of(first)[1][is_over], finished[is_over]
            by_place = np.argsort(begin)
            begin, length = begin[by_place], length[by_place]
            knots = np.stack([begin, begin + length], 1).ravel()
            level = np.cumsum(np.stack([0 * length, length], 1).ravel())
            counts += np.diff(np.interp(starts, knots, level)).astype(np.int64)
        out = np.zeros(self.num_shards, np.int64)
        np.add.at(out, self.shard[order], counts)
        return out


class Walk:
    """How often each lane meets a data set of a Mixture."""

    def __init__(self, mixture, number):
        self.lanes, self.shifts = mixture.lanes, mixture.shifts
        self.quota = mixture.quotas[number]
        self.block = len(mixture.row)                   # rounds in which it meets its quota
        self.rounds = self.block // self.shifts              # of a lane, until the next shift

        # Lanes that begin in the same class of places (mod shifts) walk through them in the same
        # order: table[class, steps] counts, and where[place] is the step of a place.
        steps, classes = np.arange(self.rounds), np.arange(self.shifts)
        walks = (classes[:, None] + steps * self.lanes) % self.block         # (classes, rounds)
        self.table = np.zeros((self.shifts, self.rounds + 1), np.int64)
        self.table[:, 1:] = (mixture.row == number)[walks].cumsum(1)
        self.where = np.empty(self.block, np.int64)
        self.where[walks] = steps
        # what a lane meets in its first turns of a block, by the class that it begins in
        all_met = self.table[:, -1]
        self.turns = np.zeros(2 * self.shifts + 1, np.int64)
        self.turns[1:] = np.concatenate([all_met, all_met]).cumsum()

    def count(self, lane, rounds):
        """How often lanes meet the data set in their first so many rounds."""
        block, inside = rounds // self.block, rounds % self.block
        turn, steps = inside // self.rounds, inside % self.rounds

        # whole blocks, and whole turns of the last one
        first = lane % self.shifts
        count = block * self.quota + self.turns[first + turn] - self.turns[first]

        # steps of a turn, which may go around the end of the walk
        place = (lane + turn) % self.block
        kind, begin = place % self.shifts, self.where[place]
        end = begin + steps
        count = count + self.table[kind, np.minimum(end, self.rounds)] - self.table[kind, begin]
        return count + self.table[kind, np.maximum(end - self.rounds, 0)]

    def drawn(self, n):
        """How often each lane meets it before position n."""
        lane = np.arange(self.lanes)
        return self.count(lane, np.maximum(n - lane + self.lanes - 1, 0) // self.lanes)


def spread(drawn, lanes):
    """What each lane drew; of a number that they drew together, as evenly as can be."""
    if np.ndim(drawn):
        return np.asarray(drawn, np.int64)
    return (drawn - np.arange(lanes) + lanes - 1) // lanes
