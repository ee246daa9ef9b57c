"""Statistics of actions and states, for normalisation: mean, std, min, max, quantiles.

    python prepare/stats.py --data=datasets/metaworld               # datasets/metaworld/stats.json
    python prepare/stats.py --data=a,b --out=stats.json             # of both together
    python prepare/stats.py --data=a --action_steps=16 --pairs='[(0, 0), (1, 1), (2, 2)]'

stats.json holds `actions` and `proprio`, each as `Statistics.to_dict` of robots/actions.py gives
it, where it says how exact it is; each dimension has its own. Every time step counts once: of a
chunk only its first action does. Relative actions (--pairs, --rotations, as `relative` there takes
them) depend on the anchor, so there every action of a chunk counts that is not padding. Data sets
of several robots: a dimension's statistics are of those samples that have it.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))
import fsspec  # noqa: E402
import torch  # noqa: E402

import shards  # noqa: E402
from configurator import configure  # noqa: E402
from processor import fields  # noqa: E402
from robots.actions import Statistics, read, relative  # noqa: E402
from shards import BadSample, Folder  # noqa: E402

data = ''                       # data sets, separated by commas
out = ''                        # empty: stats.json in the data set's folder
action_steps = 1                # of a chunk; only relative actions need more than one
pairs = []                      # (action index, proprio index) that are relative
rotations = []                  # where 6D rotations begin that are relative
data_dir = 'datasets'           # where data sets are, else as paths
cache_dir = shards.CACHE


def fail(message, code):
    """End with one line on stderr."""
    print(f'prepare/stats.py: {message}', file=sys.stderr)
    sys.exit(code)


def read_lowdim(folder, shard, index):
    """Actions (T, A), states (P,) and padding (T,) of a sample. Raises BadSample."""
    members = folder.read(shard, index)
    fields(members, with_pictures=False)        # training reads its .json, too
    sample = read(members)
    if not sample:
        raise BadSample('it has no .lowdim.npz or .lowdim.npy')
    return sample['lowdim']


def counted_actions(lowdim, pairs, rotations):
    """The actions of a sample that count. Raises ValueError."""
    actions, proprio = lowdim['actions'][~lowdim['is_pad']], lowdim['proprio']
    # the next action is the first one of the next sample, unless it depends on this one's state
    if not pairs and not rotations:
        return actions[:1]
    try:
        moved = relative(torch.tensor(actions), torch.tensor(proprio), pairs, rotations)
    except (IndexError, RuntimeError) as error:
        raise ValueError(f'pairs={pairs}, rotations={rotations}: actions have {actions.shape[-1]} '
                         f'numbers, proprio {len(proprio)} ({error})') from None
    return moved.numpy()


def add_rows(found, key, arrays):
    """Add arrays (n, D) of one width to found[key], which may have fewer dimensions."""
    width = arrays[0].shape[-1]
    if width == 0:
        return
    seen = Statistics(width)
    seen.update(np.concatenate(arrays))
    # the narrower one goes into the wider one
    if len(found[key].count) < len(seen.count):
        found[key] = seen.merge(found[key])
    else:
        found[key].merge(seen)


def collect(folder, action_steps, pairs, rotations, found):
    """Add a data set to found['actions'] and found['proprio']; lines about its bad samples."""
    folder.horizon = action_steps
    bad, held = [], {'actions': [], 'proprio': []}
    for shard in range(len(folder.sizes)):
        for index in range(folder.sizes[shard]):
            try:
                lowdim = read_lowdim(folder, shard, index)
            except BadSample as error:
                bad.append(f'{folder.shard_path(shard)}, {folder.key(shard, index)}: {error}')
                continue
            rows = {'actions': counted_actions(lowdim, pairs, rotations),
                    'proprio': lowdim['proprio'][None]}

            # rows of one width are added together; the same pieces give the same bits
            is_full = len(held['proprio']) >= 16384
            is_other = any(held[k] and held[k][0].shape[-1] != rows[k].shape[-1] for k in rows)
            if is_full or is_other:
                for key in held:
                    add_rows(found, key, held[key])
                    held[key] = []
            for key in held:
                held[key].append(rows[key])

    for key, arrays in held.items():
        if arrays:
            add_rows(found, key, arrays)
    return bad


def place_of(folders, out):
    """Where stats.json goes, tried before anything is counted. Raises ValueError."""
    path = os.path.expanduser(out) or os.path.join(folders[0].base, 'stats.json')
    remedy = 'say with --out=stats.json where the statistics go'
    if not out and not folders[0].base:
        raise ValueError(f'--data={folders[0].path} lies in several folders: {remedy}')
    if shards.is_url(path):
        return path

    # a data set may be read-only, and hours of counting would be lost
    if os.path.isdir(path):
        raise ValueError(f'--out={out} is a folder: {remedy}')
    try:
        open(f'{path}.part', 'w').close()
        os.remove(f'{path}.part')
    except OSError as error:
        raise ValueError(f'{path} can not be written ({error.strerror}): {remedy}') from None
    return path


def write(path, found, s):
    """stats.json, whole or not at all. Raises OSError."""
    content = {key: stats.to_dict() for key, stats in found.items()}
    # training refuses statistics of other chunks
    content |= {key: s[key] for key in ('action_steps', 'pairs', 'rotations')}
    text = json.dumps(content, indent=1) + '\n'
    if shards.is_url(path):
        # who reads it there sees nothing until it is closed
        with fsspec.open(path, 'w', encoding='utf-8') as file:
            file.write(text)
        return
    with open(f'{path}.part', 'w', encoding='utf-8') as file:
        file.write(text)
    os.replace(f'{path}.part', path)


def main(s):
    """The command; s: the settings above."""
    # one spec where commas separate something else: {a,b}, or a name that has some
    names = [name for name in s['data'].split(',') if name]
    if '{' in s['data'] or shards.place(s['data'], s['data_dir']):
        names = [s['data']]
    if not s['data'] or not names:
        fail('--data= names no data set: --data=datasets/metaworld', 2)
    for key in ('pairs', 'rotations'):
        for pair in s[key]:
            is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
            if not is_pair or not all(type(place) is int and place >= 0 for place in pair):
                fail(f'--{key}={s[key]}: {pair!r}: expected (action index, proprio index)', 2)
    if len(names) > 1 and not s['out']:
        fail('several data sets: say with --out=stats.json where their statistics go', 2)

    found, bad = {'actions': Statistics(0), 'proprio': Statistics(0)}, []
    try:
        folders = [Folder(name, s['data_dir'], s['cache_dir']) for name in names]
        path = place_of(folders, s['out'])
        for folder in folders:
            bad += collect(folder, max(s['action_steps'], 1), s['pairs'], s['rotations'], found)
    except (OSError, ValueError, ImportError) as error:
        fail(error, 1)

    # the first ones say what is wrong with them
    for line in bad[:10]:
        print(f'prepare/stats.py: {line}', file=sys.stderr)
    actions, proprio = found['actions'].count, found['proprio'].count
    if not actions.any():
        fail('no sample has actions', 1)

    try:
        write(path, found, s)
    except Exception as error:          # each kind of storage has errors of its own
        fail(f'{path} can not be written ({error!r}): say with --out=stats.json where the '
             'statistics go', 1)
    message = f'{path}: {proprio.max(initial=0)} samples, actions of {len(actions)} and ' \
              f'states of {len(proprio)} numbers'
    if bad:
        message += f', {len(bad)} bad samples left out'
    print(message)
    if bad:
        fail(f'{len(bad)} samples can not be read', 1)


if __name__ == '__main__':
    main(configure(globals()))
