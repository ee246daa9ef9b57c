"""data.py: the order of a run, what it saw, and --show_steps."""
import hashlib
import json
import os
import time
import tracemalloc

import numpy as np
import pytest
import tiny
from conftest import write_set

import data
from data import WHOLE, History, InOrder, Order, hash64, permute
from shards import Folder

GOLDEN = {1000: '275bff8354da7475ab99d76b946185153390bc99cd00f7a819912ae739908041',
          WHOLE: '7b2de242d04eb8d3298fc1e40f3d96c2598ed7f9b57b38e0ea110c933d4374be'}


def shards_of(sizes):
    return [(f'{i:08d}', n) for i, n in enumerate(sizes)]


def located(order, n):
    """Positions -> a list of (data set, epoch, shard, index)."""
    return list(zip(*(x.tolist() for x in order.locate(np.asarray(n)))))


# -----------------------------------------------------------------------------------------------
# hashing


def test_splitmix64_gives_the_published_sequence_of_seed_0():
    # the function adds one more itself
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert data.splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4,
                                                0x06C45D188009454F]


def test_hash64_broadcasts_depends_on_every_value_and_stays_as_it_is():
    a, b = np.arange(5), np.arange(3)[:, None]
    grid = hash64(7, a, b, -1)
    assert grid.shape == (3, 5) and grid.dtype == np.uint64
    assert all(hash64(7, i, j, -1)[0] == grid[j, i] for i in range(5) for j in range(3))
    assert len(set(grid.ravel().tolist())) == 15
    assert len({int(hash64(*key)[0])
                for key in [(1, 2), (2, 1), (1,), (1, 2, 0), (-1, 2), (1, 2 + 2 ** 40)]}) == 6
    assert int(hash64(1, -2, 3)[0]) == 12056474070484764355
    assert hash64(hash64(5), 1)[0] == hash64(int(hash64(5)[0]), 1)[0], 'a hash may be a value'


def test_permute_is_a_bijection_for_every_size():
    for size in range(1, 301):
        assert sorted(permute(np.arange(size), size, hash64(size))) == list(range(size)), size
    size = 10 ** 5
    assert (np.bincount(permute(np.arange(size), size, hash64(3))) == 1).all()


def test_permute_is_pointwise_and_takes_arrays():
    keys, sizes = hash64(np.arange(50)), np.arange(50) + 3
    together = permute(np.arange(50) % 3, sizes, keys)
    assert together.dtype == np.int64
    assert together.tolist() == [int(permute(i % 3, int(sizes[i]), keys[i:i + 1])[0])
                                 for i in range(50)]


def chi_square(counts):
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum()


def test_permute_looks_uniform():
    # all size! permutations equally often: p of about 1e-5
    for size, bound in ((2, 20), (3, 30), (4, 60)):
        keys = hash64(np.arange(6000))
        rows = np.stack([permute(np.full(6000, i), size, keys) for i in range(size)], 1)
        code = rows @ size ** np.arange(size)
        _, counts = np.unique(code, return_counts=True)
        assert len(counts) == {2: 2, 3: 6, 4: 24}[size]
        assert chi_square(counts) < bound, (size, counts)
    # each index goes everywhere, and neighbours part
    size = 9
    keys = hash64(np.arange(4000), 1)
    rows = np.stack([permute(np.full(4000, i), size, keys) for i in range(size)], 1)
    places = np.stack([np.bincount(rows[:, i], minlength=size) for i in range(size)])
    assert chi_square(places) < 135                     # 64 degrees of freedom
    steps = np.bincount((rows[:, 1] - rows[:, 0]) % size, minlength=size)
    assert steps[0] == 0 and chi_square(steps[1:]) < 35


# -----------------------------------------------------------------------------------------------
# the order


CASES = [([7], 64, 4), ([1], 7, 5), ([1], 1, 1), ([2], 64, 1),
         ([63], 64, 8), ([64], 64, 1), ([65], 64, 2), ([5, 0, 3, 9], 4, 3), ([100, 37, 1], 8, 16),
         ([13] * 11, 6, 1000), ([1000, 3], 64, 1024), ([9, 0], 10, 3), ([129], 64, 1)]
rng = np.random.default_rng(0)
CASES += [(rng.integers(0, 60, rng.integers(1, 9)).tolist() + [1], int(rng.integers(1, 40)),
           int(rng.integers(1, 50))) for _ in range(25)]


@pytest.mark.parametrize('whole', [0, WHOLE])
@pytest.mark.parametrize('sizes, lanes, window', CASES)
def test_every_sample_stands_exactly_once_in_every_epoch(sizes, lanes, window, whole):
    order = Order([shards_of(sizes)], [1.0], 3, lanes, window, whole)
    total = sum(sizes)
    everything = [(shard, index) for shard, n in enumerate(sizes) for index in range(n)]
    orders = []
    for epoch in range(6):
        rows = located(order, np.arange(epoch * total, (epoch + 1) * total))
        assert {row[:2] for row in rows} == {(0, epoch)}, (
            'an epoch ends after its last sample, not at the next round')
        assert sorted(row[2:] for row in rows) == everything
        orders.append(tuple(row[2:] for row in rows))
    if total > 40 and window > 1:
        assert len(set(orders)) == 6, 'every epoch has an order of its own'


def test_a_seed_makes_the_order():
    def first(seed):
        return located(Order([shards_of([50] * 4)], [1], seed=seed, lanes=4, window=16),
                       np.arange(100))
    assert first(0) == first(0)
    assert len({tuple(first(seed)) for seed in range(10)}) == 10


def test_epochs_differ_in_shards_and_inside_them():
    order = Order([shards_of([20] * 12)], [1], lanes=1, window=5, whole=0)
    shards = [tuple(dict.fromkeys(r[2] for r in located(order, np.arange(e * 240, e * 240 + 240))))
              for e in range(8)]
    assert len(set(shards)) == 8
    one = Order([shards_of([20])], [1], lanes=1, window=5, whole=0)
    inside = [tuple(r[3] for r in located(one, np.arange(e * 20, e * 20 + 20))) for e in range(8)]
    assert len(set(inside)) == 8


def rows_of_mix(sizes, weights, whole, num):
    """The rows (epoch, shard, index) of each data set of a mix, in the order of positions."""
    order = Order([shards_of(s) for s in sizes], weights, 1, 5, 16, whole)
    rows = located(order, np.arange(num))
    return [[row[1:] for row in rows if row[0] == number] for number in range(len(sizes))]


MIX = [[5, 40], [33], [700, 1, 299]]


def test_each_data_set_of_a_mix_runs_through_epochs_of_its_own():
    for size, mine in zip(MIX, rows_of_mix(MIX, [3, 2, 5], WHOLE, 2 * 4096 * 5)):
        total = sum(size)
        assert [row[0] for row in mine] == [p // total for p in range(len(mine))]
        for e in range(len(mine) // total):
            assert len(set(mine[e * total:(e + 1) * total])) == total
    alone = rows_of_mix([MIX[1]], [1], WHOLE, 33)[0]
    assert alone != rows_of_mix(MIX, [3, 2, 5], WHOLE, 400)[1][:33], (
        'data sets of one size have different orders')


def test_large_data_sets_of_a_mix_run_through_epochs_of_their_own():
    for size, mine in zip(MIX, rows_of_mix(MIX, [3, 2, 5], 0, 4096 * 5)):
        # lanes may be some draws apart inside a block; at its end they are not
        assert len(set(mine)) == len(mine), 'nothing twice'
        epochs, counts = np.unique([row[0] for row in mine], return_counts=True)
        assert epochs.tolist() == list(range(len(epochs)))
        assert (counts[:-1] == sum(size)).all()


def test_bad_weights_and_settings_are_refused():
    two = [shards_of([4]), shards_of([5])]
    bad = [[1], [1, 2, 3], [1, -0.5], [0, 0], [1, float('nan')], [1, float('inf')], [1, 1e-5]]
    for weights in bad:
        with pytest.raises(ValueError, match='weight'):
            Order(two, weights)
    with pytest.raises(ValueError, match='weight'):
        Order([], [])
    with pytest.raises(ValueError, match='empty'):
        Order([shards_of([4]), shards_of([0])], [1, 1])
    assert {row[0] for row in located(Order([shards_of([0]), shards_of([4])], [0, 1]),
                                      np.arange(100))} == {1}
    for key in ('lanes', 'window'):
        with pytest.raises(ValueError, match=key):
            Order(two, [1, 1], **{key: 0})
    with pytest.raises(ValueError, match='-1'):
        Order(two, [1, 1]).locate(np.array([3, -1]))


@pytest.mark.parametrize('total, lanes', [(1000, 16), (1001, 16), (1015, 16), (40, 64), (77, 5)])
def test_lanes_own_contiguous_ranges_whose_sizes_differ_by_one_at_most(total, lanes):
    # one shard of one piece: the index is the place
    order = Order([shards_of([total])], [1], lanes=lanes, window=total, whole=0)
    for epoch in range(5):
        n = np.arange(epoch * total, (epoch + 1) * total)
        index = order.locate(n)[3]
        lane = [np.sort(index[n % lanes == slot]) for slot in range(lanes)]
        assert all((own == np.arange(own[0], own[0] + len(own))).all() for own in lane if len(own))
        assert {len(own) for own in lane} <= {total // lanes, total // lanes + 1}
        assert [own[0] for own in lane if len(own)] == sorted(own[0] for own in lane if len(own))


def test_a_lane_is_shuffled_in_windows():
    lanes, window, total = 4, 10, 404                   # 101 a lane: the last window holds one
    order = Order([shards_of([total])], [1], lanes=lanes, window=window, whole=0)
    index = order.large[0].place(np.arange(total))[1]
    orders = set()
    for slot in range(lanes):
        own = index[slot::lanes]
        for a in range(0, len(own), window):
            part = own[a:a + window]
            assert (np.sort(part) == own.min() + np.arange(a, a + len(part))).all(), (
                'a window is a contiguous range')
            orders.add(tuple(part - part.min()))
    # 40 full ones and those of one sample
    assert len(orders) > 38, (
        'windows and lanes are shuffled apart')


def test_ranks_read_their_own_shards_when_they_divide_the_lanes():
    order = Order([shards_of([10] * 16)], [1], lanes=16, whole=0)
    uneven = Order([shards_of([7, 30, 1, 12, 50, 3, 9, 48])], [1], lanes=16, whole=0)
    for world in (2, 4, 8, 16):
        for epoch in range(3):
            n = np.arange(epoch * 160, (epoch + 1) * 160)
            shard = order.locate(n)[2]
            own = [set(shard[n % world == rank].tolist()) for rank in range(world)]
            assert sum(map(len, own)) == 16, 'each shard has one reader'
            _, _, shard, index = uneven.locate(n)
            seen = [set(zip(shard[n % world == rank].tolist(), index[n % world == rank].tolist()))
                    for rank in range(world)]
            assert sum(map(len, seen)) == len(set.union(*seen)) == 160


@pytest.mark.parametrize('whole', [0, 50, WHOLE])
def test_locate_of_an_array_is_locate_of_each_point(whole):
    order = Order([shards_of([30, 70]), shards_of([11])], [2, 1], 8, 6, 9, whole)
    n = np.random.default_rng(1).integers(0, 10 ** 6, (6, 20))
    together = order.locate(n)
    assert all(x.shape == n.shape and x.dtype == np.int64 for x in together)
    fresh = Order([shards_of([30, 70]), shards_of([11])], [2, 1], 8, 6, 9, whole)
    for i, j in np.ndindex(*n.shape):
        assert tuple(int(x)
                     for x in fresh.locate(n[i, j])) == tuple(int(x[i, j]) for x in together)
    assert all(x.shape == (0,) for x in order.locate(np.array([], np.int64)))


def test_large_numbers():
    order = Order([shards_of([300, 700])], [1], lanes=64, window=1024)
    e = 10 ** 9
    rows = located(order, np.arange(e * 1000, (e + 1) * 1000))
    assert {row[1] for row in rows} == {e} and len({row[2:] for row in rows}) == 1000
    big = Order([shards_of([10 ** 9] * 1000), shards_of([10 ** 15])], [1, 1], lanes=64)
    # the first data set's epoch ends somewhere here
    n = 2 * 10 ** 12 - 50_000 + np.arange(100_000)
    dataset, epoch, shard, index = big.locate(n)
    assert set(epoch[dataset == 0].tolist()) <= {0, 1} and set(epoch[dataset == 1].tolist()) == {0}
    assert (index >= 0).all() and index[dataset == 0].max() < 10 ** 9
    assert index[dataset == 1].max() < 10 ** 15
    assert len(set(zip(dataset.tolist(), epoch.tolist(), shard.tolist(),
                       index.tolist()))) == len(n)


def test_a_manifest_of_100_000_shards_is_quick_and_small():
    shards = shards_of([1000 + i % 7 for i in range(100_000)])
    tracemalloc.start()
    began = time.process_time()
    order = Order([shards], [1.0])
    order.locate(np.arange(10_000))
    for n in range(10 ** 7, 10 ** 7 + 200):
        order.locate(np.array([n]))
    seconds, (held, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 15, 'tracing included'
    assert held < 60 * len(shards) and peak < 120 * len(shards), 'some dozen bytes a shard'


def test_what_was_seen_is_counted_without_going_through_it():
    order = Order([shards_of([100, 186])], [1.0])
    assert order.seen(0, 286 * 10 ** 9) == (10 ** 9, {})
    epoch, counts = order.seen(0, 286 * 10 ** 9 + 100)
    assert epoch == 10 ** 9 and sum(counts.values()) == 100
    # lane by lane: each has drawn as much, and 14 of 64 one more
    large = Order([shards_of([100, 186])], [1.0], whole=0)
    assert large.seen(0, [286 * 10 ** 9] * 64) == (64 * 10 ** 9, {})
    epoch, counts = large.seen(0, [286 * 10 ** 9 + 1] * 14 + [286 * 10 ** 9] * 50)
    assert epoch == 64 * 10 ** 9 and sum(counts.values()) == 14


@pytest.mark.parametrize('whole', [1000, WHOLE])
def test_the_order_never_changes(whole):
    """A golden hash: runs that are resumed or looked into later rely on it. Never change it."""
    order = Order([shards_of([1000, 234, 1]), shards_of([77]), shards_of([50, 5000])],
                  [0.5, 0.2, 0.3], 1234, 16, 128, whole)
    n = np.concatenate([np.arange(100_000), 10 ** 12 + np.arange(1000)])
    rows = np.stack(order.locate(n), 1).astype('<i8')
    assert hashlib.sha256(rows.tobytes()).hexdigest() == GOLDEN[whole]


def test_in_order_is_file_order():
    n = np.array([0, 4, 5, 11, 12, 14])
    assert located(InOrder([5, 7, 3]), n) == [(0, 0, 0, 0), (0, 0, 0, 4), (0, 0, 1, 0),
                                              (0, 0, 1, 6), (0, 0, 2, 0), (0, 0, 2, 2)]
    assert located(InOrder([2, 0, 1]), [1, 2]) == [(0, 0, 0, 1), (0, 0, 2, 0)]


@pytest.fixture(scope='module')
def emoji(tmp_path_factory):
    """A data set of 5 + 7 + 3 samples."""
    return write_set(tmp_path_factory.mktemp('sets') / 'toy', [5, 7, 3])


SETTINGS = dict(batch_size=1, seed=0, lanes=64, window=1024, whole=WHOLE, adopt=[])


@pytest.mark.parametrize('whole', [0, WHOLE])
@pytest.mark.parametrize('lanes, window', [(4, 8), (1, 1), (7, 3), (64, 1024), (16, 2)])
def test_provenance_counts_every_sample(emoji, tmp_path, lanes, window, whole):
    other = write_set(tmp_path / 'other', [4, 0, 2])
    folders = {str(path): Folder(str(path)) for path in (emoji, other)}
    mix = dict(zip(folders, [2, 1]))
    history = History(SETTINGS | dict(mix=mix, lanes=lanes, window=window, whole=whole), folders)
    for end in (0, 1, 5, 37, 211, 900, 5000):
        rows = located(history.order, np.arange(end))
        counts = history.provenance(end)
        assert json.loads(json.dumps(counts)) == counts
        for number, (name, folder) in enumerate(folders.items()):
            ours = [row for row in rows if row[0] == number]
            found, epochs = counts[name], [row[1] for row in ours]
            assert found['samples'] == len(ours)
            done = found['whole_epochs']
            assert all(epochs.count(epoch) == len(folder) for epoch in range(done))
            assert epochs.count(done) < len(folder), 'no more of them are whole'
            late = [folder.name(row[2]) for row in ours if row[1] >= done]
            assert found['shards_of_next_epoch'] == {name: late.count(name)
                                                     for name in sorted(set(late))}


# -----------------------------------------------------------------------------------------------
# python data.py --show_steps


def show(*args, cwd=None, real=False):
    return tiny.run('data.py', *args, cwd=cwd, real=real)


@pytest.fixture
def config(emoji, tmp_path):
    """The config.json of a run on two data sets, with settings that data.py does not have."""
    other = write_set(tmp_path / 'other', [4, 2])
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(
        {'mix': {str(emoji): 2.0, str(other): 1.0}, 'batch_size': 6, 'seed': 3, 'lanes': 4,
         'window': 8, 'data_dir': 'datasets', 'lr': 1e-3, 'vit.depth': 2, 'task': 'vlm'}))
    return path


def test_show_steps_prints_what_the_order_gives(config, emoji, tmp_path):
    out = show(config, '--show_steps=8:11', cwd=tmp_path, real=True)
    assert out.code == 0 and out.err == ''
    folders = [Folder(str(emoji)), Folder(str(tmp_path / 'other'))]
    order = Order([f.sizes for f in folders], [2, 1], seed=3, lanes=4, window=8)
    expected = [[str(n // 6 + 1), str(n), folders[d].path, str(e), folders[d].name(s),
                 folders[d].key(s, i)]
                for n, (d, e, s, i) in zip(range(42, 60), located(order, np.arange(42, 60)))]
    assert [line.split('\t') for line in out.out.splitlines()] == expected
    flags = show(config, '--show_steps=8:11', '--batch_size=3', '--seed=4',
                 cwd=tmp_path).out.splitlines()
    assert [line.split('\t')[:2]
            for line in flags] == [[str(n // 3 + 1), str(n)] for n in range(21, 30)]


def test_show_steps_where(config, tmp_path):
    lines = show(config, '--show_steps=1:31', cwd=tmp_path).out.splitlines()
    keys = {line.split('\t')[-1] for line in lines}
    for where, wanted in [(key := max(keys), {key}), ('*3', {k for k in keys if k.endswith('3')}),
                          ('none', set())]:
        out = show(config, '--show_steps=1:31', f'--where={where}', cwd=tmp_path)
        assert out.code == 0
        assert out.out.splitlines() == [
            line for line in lines if line.split('\t')[-1] in wanted]
    assert show(config, '--show_steps=1:31', '--where=00000000',
                cwd=tmp_path).out.splitlines() == [
                    line for line in lines if line.split('\t')[-2] == '00000000']


def test_show_steps_says_what_is_wrong_in_one_line(config, tmp_path):
    gone, weights = tmp_path / 'gone.json', tmp_path / 'weights.json'
    gone.write_text(config.read_text().replace('other', 'others'))
    weights.write_text(config.read_text().replace('1.0', '-1.0'))
    for args, word in [([config], 'show_steps'), ([config, '--show_steps=5'], 'a:b'), (
        [config, '--show_steps=1:x'], 'a:b'), ([config, '--show_steps=-1:2'], 'a:b'), (
            [gone, '--show_steps=1:2'], 'others'), ([weights, '--show_steps=1:2'], 'weight'),
                       ([config, '--show_step=1:2'], 'show_steps'),
                       ([config, '--show_steps=0:2'], 'begin at 1'),
                       ([config, '--show_steps=5:2'], 'no step'),
                       ([config, '--show_steps=2:5', '--max_steps=3'], '--show_steps=2:4'),
                       ([config, '--show_steps=4:5', '--max_steps=3'], 'ends with step 3'),
                       ([config, '--show_steps=1:2', '--lanes=0'], 'lanes')]:
        out = show(*args)
        assert out.code == 2 and out.out == '' and word in out.err, (args, out)
        assert out.err.count('\n') == 1 and 'Traceback' not in out.err, (args, out.err)


def test_show_steps_names_a_damaged_shard_in_one_line(config, tmp_path):
    os.truncate(tmp_path / 'other' / '00000001.tar', 600)
    out = show(config, '--show_steps=1:11')
    assert out.code in (1, 2) and '00000001.tar' in out.err
    assert out.err.count('\n') == 1 and 'Traceback' not in out.err, out.err
