"""Which samples did a step see?

    python data.py out/vlm_emoji/config.json --show_steps=100:103

prints those of steps 100, 101 and 102: step, position, data set, epoch, shard, key.
"""
import fnmatch
import re
import signal
import sys

import numpy as np

import data
from configurator import configure

# those settings of train.py that the order depends on, with the same defaults
data_dir = 'datasets'           # where data sets are: here, or there beside the scripts
mix = {'emoji/noto': 1.0}       # data set -> sampling weight
cache_dir = data.CACHE          # indexes of shards and copies of remote ones
cache_gb = 100.0                # of copies
batch_size = 128                # samples a step
seed = 0
lanes = 64                      # parallel streams of the order
window = 1024                   # samples among which a lane is shuffled

# what is shown
show_steps = ''                 # a:b prints the samples of steps a to b - 1
where = ''                      # only those whose key, shard or data set matches it: cat-*


def show(folders, order, first, last):
    """The samples of steps first to last - 1, one a line. Raises OSError and ValueError."""
    names = list(mix)
    for step in range(first, last):
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        places = (array.tolist() for array in order.locate(positions))
        for position, number, epoch, shard, index in zip(positions.tolist(), *places):
            folder = folders[number]
            columns = names[number], folder.name(shard), folder.key(shard, index)
            if not where or any(map(is_wanted, columns)):
                print(step, position, columns[0], epoch, *columns[1:], sep='\t')


def is_wanted(text):
    # a name may hold brackets, which a pattern reads otherwise
    return text == where or fnmatch.fnmatchcase(text, where)


def leave(code, error):
    print(f'data.py: {error}', file=sys.stderr)
    sys.exit(code)


if __name__ == '__main__':
    # ... | head ends in silence
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    configure(globals(), partial=True)
    if not re.fullmatch(r'\d+:\d+', show_steps):
        leave(2, f'--show_steps={show_steps}: expected a:b, such as --show_steps=100:103')
    try:
        folders, order = data.open_mix(mix, data_dir, seed, lanes, window, cache_dir, cache_gb)
    except (ValueError, OSError) as error:
        leave(2, error)
    try:
        show(folders, order, *map(int, show_steps.split(':')))
    except (ValueError, OSError) as error:
        leave(1, error)
