"""Statistics of a data set's actions and states, for normalisation: mean, std, min, max, quantiles, of each dimension.

    python prepare/stats.py --data=datasets/metaworld                       # writes datasets/metaworld/stats.json
    python prepare/stats.py --data=a,b --out=stats.json                     # of both together
    python prepare/stats.py --data=a --action_steps=16 --pairs='[(0, 0), (1, 1), (2, 2)]'

stats.json holds `actions` and `proprio`, each as `Statistics.to_dict` gives it, where it says how exact it is.
Every time step counts once: of a chunk only its first action does. Relative actions (--pairs, --rotations, as
`robots.actions.relative` takes them) depend on the anchor, so there every action of a chunk counts that is not padding.
Data sets of several robots: a dimension's statistics are of those samples that have it.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

from configurator import configure  # noqa: E402
from processor import fields  # noqa: E402
from robots.actions import Statistics, relative  # noqa: E402
from shards import CACHE, BadSample, Folder  # noqa: E402


def collect(folder, action_steps, pairs, rotations, found):
    """Add a data set to found['actions'] and found['proprio']; lines about samples that can not be read."""
    folder.horizon, bad = action_steps, []
    held = {'actions': [], 'proprio': []}

    def flush():
        for key, arrays in held.items():
            if arrays and arrays[0].shape[-1]:
                seen = Statistics(arrays[0].shape[-1])
                seen.update(np.concatenate(arrays))
                if len(found[key].count) < len(seen.count):
                    found[key] = seen.merge(found[key])
                else:
                    found[key].merge(seen)
            arrays.clear()

    for shard in range(len(folder.sizes)):
        for i in range(folder.sizes[shard]):
            try:
                members = folder.read(shard, i)
                sample = fields(members, pictures=False, lowdim=True)
                if 'lowdim' not in sample:
                    raise BadSample('it has no .lowdim.npz or .lowdim.npy')
            except BadSample as error:
                bad.append(f'{folder.base}{folder.name(shard)}.tar, {folder.key(shard, i)}: {error}')
                continue
            low = sample['lowdim']
            actions = low['actions'][~low['is_pad']]
            if pairs or rotations:
                try:
                    actions = relative(torch.tensor(actions), torch.tensor(low['proprio']), pairs, rotations).numpy()
                except IndexError as error:
                    raise ValueError(f'pairs={pairs}, rotations={rotations}: actions have {actions.shape[-1]} numbers, '
                                     f'proprio {len(low["proprio"])} ({error})') from None
            else:
                actions = actions[:1]
            new = {'actions': actions, 'proprio': low['proprio'][None]}
            if any(held[k] and held[k][0].shape[-1] != new[k].shape[-1] for k in new) or len(held['proprio']) >= 16384:
                flush()
            for key, array in new.items():
                held[key].append(array)
    flush()
    return bad


def fail(message, code):
    print(f'prepare/stats.py: {message}', file=sys.stderr)
    sys.exit(code)


def main(s):
    names = [name for name in s['data'].split(',') if name]
    if not names:
        fail('--data= names no data set: --data=datasets/metaworld', 2)
    if len(names) > 1 and not s['out']:
        fail('several data sets: say with --out=stats.json where their statistics go', 2)
    found, bad, folders = {'actions': Statistics(0), 'proprio': Statistics(0)}, [], []
    try:
        for name in names:
            folders.append(Folder(name, s['data_dir'], s['cache_dir']))
            bad += collect(folders[-1], max(s['action_steps'], 1), s['pairs'], s['rotations'], found)
    except (OSError, ValueError) as error:
        fail(error, 1)
    for line in bad[:10]:
        print(f'prepare/stats.py: {line}', file=sys.stderr)
    if not found['actions'].count.any():
        fail('no sample has actions', 1)
    out = s['out'] or os.path.join(folders[0].base, 'stats.json')
    text = json.dumps({key: stats.to_dict() for key, stats in found.items()} | {
        'action_steps': s['action_steps'], 'pairs': s['pairs'], 'rotations': s['rotations']}, indent=1)
    with open(out + '.part', 'w', encoding='utf-8') as file:
        file.write(text + '\n')
    os.replace(out + '.part', out)
    print(f'{out}: {found["proprio"].count.max(initial=0)} samples, actions of {len(found["actions"].count)} and '
          f'states of {len(found["proprio"].count)} numbers' + (f', {len(bad)} bad samples left out' if bad else ''))
    if bad:
        fail(f'{len(bad)} samples can not be read', 1)


if __name__ == '__main__':
    data = ''                   # data sets, separated by commas
    out = ''                    # empty: stats.json in the data set's folder
    action_steps = 1            # of a chunk; only relative actions need more than one
    pairs = []                  # (action index, proprio index) of what is relative, see robots.actions.relative
    rotations = []              # where 6D rotations begin that are relative
    data_dir = 'datasets'       # where data sets are, else as paths
    cache_dir = CACHE
    main(configure(globals()))
