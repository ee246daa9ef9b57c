"""Resumes with anything changed, against what was really read (tests/resumes.py)."""
import random
from collections import Counter

import numpy as np
import pytest
import resumes

import data
from mixing import BLOCK, Mixture


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    return resumes.write_sets(tmp_path_factory.mktemp('sets'))


@pytest.fixture
def play(sets, tmp_path):
    """play(number of a game, commands): how often there was what."""
    def game(number, commands, **options):
        (tmp_path / str(number)).mkdir()
        return resumes.play(number, tmp_path / str(number), sets, commands, **options)
    return game


pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled')


@pytest.mark.parametrize('number', [3, 25])
def test_some_resumes(play, number):
    counts = play(number, 10)
    assert counts['checkpoints'] and counts['changed']


@pytest.mark.long
def test_a_thousand_resumes(play):
    total = Counter()
    for number in range(40):
        total += play(number, 32)
    # workers, which take longer to begin than to read
    for number in range(40, 50):
        total += play(number, 10, num_workers=2)
    print(dict(total))
    assert sum(total[end] for end in resumes.ENDS) >= 1000, 'that trained'
    assert all(total[end] > 50 for end in (*resumes.ENDS, 'nothing to do', 'branches', 'damaged'))


@pytest.mark.long
@pytest.mark.parametrize('number', range(6))
def test_whole_runs(play, number):
    """48 commands of train.py, really stopped and killed, with ranks and workers."""
    print(dict(play(number, 8, kind=resumes.Whole)))


@pytest.mark.long
@pytest.mark.parametrize('number', range(10))
def test_shares_hold_for_any_ranks(number):
    """In any stretch of a block: of all positions to three samples, and so of each rank's own."""
    rng = random.Random(number)
    weights = [rng.choice([1, 2, 5, 30]) * rng.random() + 0.001 for _ in range(rng.randint(2, 7))]
    lanes = rng.choice([1, 6, 8, 48, 64])
    mixture, quotas = Mixture(data.quotas_of(weights), lanes), data.quotas_of(weights)
    sets = mixture.dataset(np.arange(BLOCK * lanes))
    worst = {}
    for world in (1, 2, 3, 4, 8):
        worst[world] = max(furthest(sets[rank::world], quotas) for rank in range(world))
    print(len(weights), lanes, {world: round(float(most), 2) for world, most in worst.items()})
    assert worst[1] < 3


def furthest(sets, quotas):
    """How many samples more or less than its share a data set has in the worst stretch."""
    is_of = sets[:, None] == np.arange(len(quotas))
    ahead = (is_of - quotas / BLOCK).cumsum(0)
    return (np.maximum(ahead.max(0), 0) - np.minimum(ahead.min(0), 0)).max()
