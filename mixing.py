"""Which data set stands at which position of a run that has several."""
import functools

import numpy as np

BLOCK = 4096                    # places in a row; the sum of all quotas


class Mixture:
    """Which data set each position is of, so that any stretch of them holds each share.

    4096 places in a row hold the data sets by their quotas: each goes, place by place, to the one
    that is furthest behind its share. Positions go around that row. With 64 lanes (lanes.py) a
    lane would meet the same 64 places again each time, so after every turn the row is shifted by
    one: in 64 turns, a block, a lane meets every place once. A shift leaves out a place; where in
    the row that begins is chosen so that those left out hold the shares, too."""

    def __init__(self, quotas, lanes):
        self.quotas = quotas
        # lanes = shifts * odd: a lane meets every shifts-th place of the row in one of its turns
        self.lanes, self.shifts = lanes, lanes & -lanes
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
