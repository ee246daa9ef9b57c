"""The order of a run as a reader of its batches sees it: shares, quotas, and a fair shuffle."""
from fractions import Fraction

import numpy as np
import pytest

import data
from data import WHOLE, Order, hash64, permute, quotas_of
from lanes import Walk
from mixing import BLOCK, Mixture

LANES = [1, 3, 8, 64, 100]


def random_weights(number):
    """Of two to eight data sets, the smallest of them a hundredth or so of the largest."""
    rng = np.random.default_rng(number)
    return rng.uniform(0.01, 1, rng.integers(2, 9)).round(3).tolist()


# -----------------------------------------------------------------------------------------------
# shares


@pytest.mark.parametrize('lanes', LANES)
@pytest.mark.parametrize('number', range(10))
def test_any_stretch_holds_each_share_to_within_three_samples(number, lanes):
    quotas = quotas_of(random_weights(number))
    mixture = Mixture(quotas, lanes)
    # all turns of a block, and the first of the next one
    n = np.arange(BLOCK * lanes + mixture.turn)
    dataset = mixture.dataset(n)
    for which, quota in enumerate(quotas.tolist()):
        ahead = np.cumsum(BLOCK * (dataset == which) - quota)
        spread = (max(ahead.max(), 0) - min(ahead.min(), 0)) / BLOCK
        assert spread <= 3, (which, quota)


@pytest.mark.parametrize('weights', [[0.5, 0.3, 0.2], [1, 1, 1], [3, 0, 1], [1, 4000, 3],
                                     [7, 11, 13]])
def test_quotas_are_the_shares_by_largest_remainder(weights):
    total = sum(Fraction(str(weight)) for weight in weights)
    exact = [Fraction(str(weight)) * BLOCK / total for weight in weights]
    quotas = [int(x) for x in exact]
    for i in sorted(range(3), key=lambda i: quotas[i] - exact[i])[:BLOCK - sum(quotas)]:
        quotas[i] += 1
    assert quotas_of(weights).tolist() == quotas


@pytest.mark.parametrize('lanes', LANES)
@pytest.mark.parametrize('block', [0, 1, 123456])
def test_each_lane_meets_its_quota_in_a_block(lanes, block):
    quotas = quotas_of(random_weights(3))
    n = block * BLOCK * lanes + np.arange(BLOCK * lanes)
    dataset = Mixture(quotas, lanes).dataset(n).reshape(BLOCK, lanes)
    for lane in range(lanes):
        assert np.bincount(dataset[:, lane], minlength=len(quotas)).tolist() == quotas.tolist()


@pytest.mark.parametrize('lanes', LANES)
def test_counts_before_a_position_are_those_of_counting(lanes):
    quotas = quotas_of(random_weights(4))
    mixture = Mixture(quotas, lanes)
    n = np.arange(BLOCK * lanes + mixture.turn)
    dataset = mixture.dataset(n)
    ends = np.random.default_rng(0).integers(0, len(n), 20).tolist()
    for which in range(len(quotas)):
        is_of = dataset == which
        before = np.concatenate([[0], np.cumsum(is_of)])
        assert (mixture.before(n, which) == before[:-1]).all()
        walk = Walk(mixture, which)
        for end in ends:
            by_lane = np.bincount(n[:end][is_of[:end]] % lanes, minlength=lanes)
            assert walk.drawn(end).tolist() == by_lane.tolist()


def test_a_small_share_never_comes_in_a_lump():
    dataset = Mixture(quotas_of([99, 1]), 64).dataset(np.arange(BLOCK * 64))
    gaps = np.diff(np.flatnonzero(dataset == 1))
    assert gaps.min() > 30 and gaps.max() < 300, 'every hundredth or so'


# -----------------------------------------------------------------------------------------------
# a fair shuffle: sets sorted by class, and how often each class is in a batch


CLASSES = 10


def classes_of(samples, shards, whole, count, first=0):
    """The classes of `count` samples of a run, on a set of `samples` that is sorted by class."""
    sizes = np.full(shards, samples // shards, np.int64)
    sizes[:samples % shards] += 1
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order = Order([sizes], [1], seed=7, whole=whole)
    _, _, shard, index = order.locate(first + np.arange(count))
    return (starts[shard] + index) * CLASSES // samples


def chi_square(labels, group, samples):
    """How far the classes of groups of labels are from those of fair draws without repetition, as
    a number of standard deviations of the mean over the groups; 0 is fair."""
    groups = labels[:len(labels) // group * group].reshape(-1, group)
    counts = np.stack([(groups == each).sum(1) for each in range(CLASSES)], 1)
    expected = group / CLASSES
    # hypergeometric: of few samples the counts vary less
    expected_square = (CLASSES - 1) * (samples - group) / (samples - 1)
    each = ((counts - expected) ** 2 / expected).sum(1)
    return (each.mean() - expected_square) / (np.sqrt(2 * (CLASSES - 1)) / np.sqrt(len(groups)))


SMALL = [(40, 1), (40, 5), (1000, 1), (1000, 25)]


def drawn_classes(samples, shards):
    """The classes of many epochs, (epochs, samples)."""
    epochs = 20_000 // samples
    return classes_of(samples, shards, WHOLE, epochs * samples).reshape(epochs, samples)


@pytest.mark.parametrize('samples, shards', SMALL)
def test_classes_in_batches_are_those_of_a_fair_draw(samples, shards):
    rows = drawn_classes(samples, shards)
    for size in (8, 16, 64):
        if size >= samples:
            continue
        batches = rows[:, :samples // size * size]
        assert abs(chi_square(batches.reshape(-1), size, samples)) < 4, size
        # far from it is a set in its order, or one whose blocks are rotated
        in_order = np.roll(np.sort(rows, 1), 8, 1)[:, :samples // size * size]
        assert chi_square(in_order.reshape(-1), size, samples) > 20, size


@pytest.mark.parametrize('samples, shards', SMALL)
def test_successive_batches_are_together_a_fair_draw(samples, shards):
    rows = drawn_classes(samples, shards)
    for size in (8, 16, 64):
        batches = rows[:, :samples // size * size].reshape(len(rows), -1, size)
        for apart in (1, 2, 4):
            # each batch in one pair
            pairs = np.concatenate([batches[:, :-apart], batches[:, apart:]], 2)[:, ::2 * apart]
            if pairs.size:
                assert abs(chi_square(pairs.reshape(-1), 2 * size, samples)) < 4, (size, apart)


@pytest.mark.parametrize('samples, shards', SMALL)
def test_each_sample_comes_early_and_late_alike(samples, shards):
    rows = drawn_classes(samples, shards)
    places = np.arange(samples)[None] * np.ones((len(rows), 1))
    mean = np.array([places[rows == each].mean() for each in range(CLASSES)])
    error = samples / np.sqrt(12 * rows.size / CLASSES)
    assert (abs(mean - (samples - 1) / 2) < 4 * error).all()


@pytest.mark.parametrize('shards', [1, 3000])
@pytest.mark.parametrize('size', [8, 16, 64])
def test_classes_of_a_large_set_are_those_of_a_fair_draw(shards, size):
    """64 lanes stand in 64 places of the set, each for a window of 1024 samples: batches that are
    further apart are independent, and so are those of other lanes."""
    samples, apart = 3_000_000, 64 * 1024
    for begin in (0, size):
        if begin + size <= 64:
            rounds = [classes_of(samples, shards, WHOLE, begin + size, n * apart)
                      for n in range(400)]
            batches = np.stack(rounds)
            assert abs(chi_square(batches.reshape(-1), begin + size, samples)) < 4
            assert abs(chi_square(batches[:, begin:].reshape(-1), size, samples)) < 4
    # and whole, if it is asked for, every batch is
    fair = classes_of(samples, shards, samples, 64 * 400)
    assert abs(chi_square(fair, size, samples)) < 4


def test_steps_do_not_see_parts_of_a_set_in_turn():
    """Batches of 16 of 64 lanes: one in four is of the same lanes."""
    for samples, whole, num in ((1000, WHOLE, 16 * 4000), (100_000, 0, 100_000)):
        order = Order([np.array([samples])], [1], seed=3, window=16, whole=whole)
        quarters = order.locate(np.arange(num))[3].reshape(-1, 16) * 4 // samples
        means = np.stack([quarters[beat::4].mean() for beat in range(4)])
        assert abs(means - 1.5).max() < 0.1


# -----------------------------------------------------------------------------------------------
# what a look-up costs



def test_a_look_up_in_a_million_shards_touches_no_array_of_samples(monkeypatch):
    """Each look-up permutes as many numbers as it has positions, and searches the shards."""
    sizes = np.full(1_000_000, 2000, np.int64)
    order = Order([sizes], [1])
    permuted, hashed = [], []

    def counting_permute(index, size, key):
        permuted.append(np.size(index))
        return permute(index, size, key)

    def counting_hash(*values):
        hashed.append(max(map(np.size, values)))
        return hash64(*values)

    order.large[0].permute = counting_permute
    monkeypatch.setattr(data, 'hash64', counting_hash)
    order.locate(np.arange(100) + 10 ** 9)
    assert permuted == [100] and max(hashed) == len(sizes), 'an epoch begins: its shards'
    hashed.clear()
    for n in range(10 ** 9, 10 ** 9 + 20):
        order.locate(np.array([n]))
    assert permuted[1:] == [1] * 20 and max(hashed) == 1, 'what an epoch needs is kept'


def test_a_look_up_in_a_whole_set_permutes_as_many_numbers_as_it_has_positions(monkeypatch):
    order, permuted = Order([np.full(1000, 1000, np.int64)], [1]), []

    def counting(index, size, key):
        permuted.append(np.size(index))
        return permute(index, size, key)

    monkeypatch.setattr(data, 'permute', counting)
    order.locate(np.arange(10) + 10 ** 12)
    assert permuted == [10]
