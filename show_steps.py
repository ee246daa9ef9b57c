"""Which samples did a step see?

    python data.py out/vlm_emoji/config.json --show_steps=100:103

prints those of the rows 100, 101 and 102 of log.jsonl: step, position, data set, epoch, shard,
key.
"""
import fnmatch
import re
import signal
import sys

import numpy as np

import data
import past
from configurator import configure
from usage import printing

# those settings of train.py that the order depends on, with the same defaults
out_dir = 'out/run'             # its checkpoints know what was done before today's settings
resume = 'auto'                 # and where it has none yet, the one that it branched off from
data_dir = 'datasets'           # where data sets are: here, or there beside the scripts
mix = {'emoji/noto': 1.0}       # data set -> sampling weight
cache_dir = data.CACHE          # indexes of shards and copies of remote ones
cache_gb = 100.0                # of copies
batch_size = 128                # samples a step
seed = 0
lanes = 64                      # parallel streams of the order
whole = 1 << 20                 # a data set of at most so many samples is shuffled as a whole
window = 1024                   # of a larger one so many samples of a lane at once
adopt = []                      # data sets that may have changed since the run began
max_steps = 0                   # the run's length: its last batch may be short
max_samples = 0
epochs = 0.0

# what is shown
show_steps = ''                 # a:b prints the samples of steps a to b - 1
where = ''                      # only those whose key, shard or data set matches it: cat-*


def open_past(settings, out_dir):
    """The History of a run, by its newest checkpoint and today's settings, all its data sets open.
    Raises ValueError and OSError."""
    _, history = data.open_mix(settings)
    # a run that was not to go on has gone on since
    begun_from = settings['resume'] if settings['resume'] != 'never' else 'auto'
    # what is printed is samples alone
    path, progress, problem = past.find(out_dir, begun_from, warn)
    if problem:
        raise ValueError(problem)
    if path:
        past.go_on(history, settings, path, progress)
    for name in history.sets:
        if name not in history.folders:
            history.folders[name] = data.open_folder(name, settings, 'mix')
    # where the last batch was cut short
    steps_of(history, settings)
    return history


def warn(line):
    print(f'data.py: {line}', file=sys.stderr)


def steps_of(history, settings):
    """Steps of the run; 0 where no setting says so."""
    return history.length(settings | dict(num_checkpoints=0, allow_repeat=True))[0]


def check_end(history, settings, first, last):
    """Raises ValueError for steps that the run will never take."""
    steps = steps_of(history, settings)
    if not steps or last <= steps + 1:
        return
    remedy = f'--show_steps={first}:{steps + 1}'
    if first > steps:
        remedy = 'say how long it is to be (max_steps)'
    raise ValueError(f'--show_steps={first}:{last}: the run ends with step {steps}: {remedy}')


def show(history, first, last):
    """The samples of the rows `first` to `last` - 1 of the log, one a line. Raises OSError and
    ValueError."""
    for step in range(first, last):
        chapter, order = history.chapter_of(step - 1), history.order_at(step - 1)
        names = list(chapter.mix)
        positions = np.arange(history.position_of(step - 1), history.position_of(step))
        places = (array.tolist() for array in order.locate(positions))
        for position, number, epoch, shard, index in zip(positions.tolist(), *places):
            folder = history.folders[names[number]]
            columns = names[number], folder.name(shard), folder.key(shard, index)
            if not where or any(map(is_wanted, columns)):
                print(step, position, columns[0], epoch, *columns[1:], sep='\t')


def is_wanted(text):
    # a name may hold brackets, which a pattern reads otherwise
    return text == where or fnmatch.fnmatchcase(text, where)


def leave(code, error):
    print(f'data.py: {" ".join(str(error).split())}', file=sys.stderr)
    sys.exit(code)


if __name__ == '__main__':
    # a key is written as it is in its tar, UTF-8 or not
    sys.stdout.reconfigure(errors='surrogateescape')
    # ... | head ends in silence
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    settings = configure(globals(), partial=True)
    for least, most, keys in data.RANGES:
        for key in settings.keys() & set(keys.split()):
            if not least <= settings[key] <= most:
                leave(2, f'{key}={settings[key]} must be at least {least}, at most {most}')
    if not re.fullmatch(r'\d+:\d+', show_steps):
        leave(2, f'--show_steps={show_steps}: expected a:b, such as --show_steps=100:103')
    first, last = map(int, show_steps.split(':'))
    if first < 1:
        leave(2, f'--show_steps={show_steps}: steps begin at 1, as in log.jsonl')
    if first >= last:
        leave(2, f'--show_steps={show_steps}: there is no step in it; {first}:{first + 1} is one')
    try:
        history = open_past(settings, out_dir)
        check_end(history, settings, first, last)
    except (ValueError, OSError) as error:
        leave(2, error)
    try:
        with printing():
            show(history, first, last)
    except (ValueError, OSError) as error:
        leave(1, error)
