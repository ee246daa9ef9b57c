"""manifest.jsonl of a data set that is being made: first it says so, in the end it counts the
shards.

The makers of data sets import this. A folder without a manifest is read as it lies, and one whose
maker was stopped would pass for whole; a first row that is none makes every reader refuse it.
"""
import json
import os

STOPPED = 'unknown, for {maker} has not come to its end: run it again'


def begin(folder, maker):
    """From now on a folder counts as unfinished."""
    write(folder, [dict(shard='', num_sequences=STOPPED.format(maker=maker))])


def finish(folder, rows):
    """All shards of the rows, {'shard': name, 'num_sequences': samples, ...}, are there."""
    write(folder, rows)


def is_unfinished(folder):
    """Did a maker begin here and not end?"""
    try:
        with open(os.path.join(folder, 'manifest.jsonl'), encoding='utf-8') as f:
            return json.loads(f.readline()).get('shard') == ''
    except (OSError, ValueError):
        return False


def write(folder, rows):
    """Whole or not at all, and on the disk when this returns."""
    path = os.path.join(folder, 'manifest.jsonl')
    with open(f'{path}.part', 'w', encoding='utf-8') as f:
        for row in rows:
            f.write(json.dumps(row) + '\n')
        f.flush()
        os.fsync(f.fileno())
    os.replace(f'{path}.part', path)
