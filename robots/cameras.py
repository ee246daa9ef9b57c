"""Which cameras the data sets of a run have, and whether its settings and statistics fit them.

Asked before the first step: what is named wrongly would else be black, or left out in silence.
"""
from dataclasses import dataclass, field

import numpy as np

from parallel import say
from pictures import is_depth
from processor import ENDINGS
from robots import actions
from shards import BadSample, Folder
from usage import nearest

LOWDIM = b'lowdim.npz', b'lowdim.npy'
# Shards that are looked at where no camera is named, or no robot is met; and for a camera that the
# first ones do not have. Remote ones are copied for it.
FEW, MOST = 8, 256
FEW_REMOTE, MOST_REMOTE = 1, 4


@dataclass
class Survey:
    """What some shards of a data set hold."""
    name: str
    samples: int = 0            # keys with actions
    cameras: dict = field(default_factory=dict)     # name -> in how many of them it is
    others: set = field(default_factory=set)        # other members that they have
    depth: set = field(default_factory=set)         # cameras whose first picture is no picture
    sizes: dict = field(default_factory=dict)       # (numbers of an action, of a state): a sample


def survey(folder, wanted):
    """The Survey of a data set's shards, from all over it, until all wanted cameras are met."""
    found, count, few, most = Survey(folder.path), len(folder.sizes), FEW, MOST
    if folder.is_remote:
        few, most = FEW_REMOTE, MOST_REMOTE
    # tokens in sequences have no actions
    if folder.sequence_length:
        return found

    places = np.linspace(0, count - 1, min(count, most)).round().astype(int)
    for looked, shard in enumerate(places.tolist(), 1):
        try:
            look_at(folder, shard, found)
        except (OSError, ValueError):
            # damaged or gone, which the run says when it comes to it: it may not go that far
            continue
        if looked >= few and not (wanted and found.samples):
            break
        if wanted and wanted <= found.cameras.keys():
            break
    return found


def look_at(folder, shard, found):
    """Add a shard to a Survey."""
    index = folder.index(shard)
    table = index.table
    acting = np.unique(table['sample'][np.isin(table['ext'], LOWDIM)])
    if not len(acting):
        return

    # the index alone says which members there are
    found.samples += len(acting)
    members = table['ext'][np.isin(table['sample'], acting)]
    for ext, number in zip(*np.unique(members, return_counts=True)):
        name, _, ending = ext.decode().rpartition('.')
        if ending in ENDINGS:
            found.cameras[name] = found.cameras.get(name, 0) + int(number)
        elif ext not in (*LOWDIM, b'json', b'txt'):
            found.others.add(ext.decode())

    # one sample says how many numbers there are, and what a picture holds
    first = int(acting[0])
    if index.starts:
        first = index.starts[first]
    try:
        members = folder.read(shard, first)
        lowdim = actions.read(members)['lowdim']
    except BadSample:
        return
    sizes = lowdim['actions'].shape[1], len(lowdim['proprio'])
    found.sizes.setdefault(sizes, f'{folder.shard_path(shard)}, {folder.key(shard, first)}')
    for ext, data in members.items():
        if ext.rpartition('.')[2] in ENDINGS and is_depth(ext, data):
            found.depth.add(ext.rpartition('.')[0])


def surveys(settings, folders):
    """The Survey of each data set of the mix and of validation."""
    by_name = {folder.path: folder for folder in folders}
    for path in settings['val'].values():
        if path not in by_name:
            by_name[path] = Folder(path, settings['data_dir'], settings['cache_dir'],
                                   settings['cache_gb'])
    found = []
    for path, folder in by_name.items():
        names = names_in(path, settings).values()
        found.append(survey(folder, {name.lower() for name in names}))
    return found


def names_in(data_set, settings):
    """{camera of the run: its name in a data set}, without those that the set lacks."""
    cameras = settings['cameras']
    # a run that began before there was such a setting
    own = settings.get('cameras_of', {})
    return own.get(data_set, dict(zip(cameras, cameras)))


# -----------------------------------------------------------------------------------------------
# settings


def check(settings):
    """Raises ValueError for names that can not be."""
    cameras, own = settings['cameras'], settings['cameras_of']
    if not are_names(cameras):
        raise ValueError(f'cameras={cameras}: expected names')
    # extensions count in any case of letters, and so do these
    if len({name.lower() for name in cameras}) < len(cameras):
        raise ValueError(f'cameras={cameras}: a name comes twice')

    sets = {*settings['mix'], *settings['val'].values()}
    for data_set, names in own.items():
        if data_set not in sets:
            raise ValueError(f'cameras_of: {data_set!r} is no data set of the run, which has '
                             f'{listed(sets)}')
        if not isinstance(names, dict) or not are_names(names.values()):
            raise ValueError(f'cameras_of: {data_set!r} is {names!r}: expected a dict, camera of '
                             'the run -> its name there')
        for camera in names:
            if camera not in cameras:
                raise ValueError(f'cameras_of: {data_set!r} names {camera!r}, which is none of '
                                 f'cameras={cameras}')


def are_names(values):
    return all(isinstance(value, str) for value in values)


def listed(names):
    """Names for people; a picture may have none."""
    return ', '.join(name or "''" for name in sorted(names)) or 'none'


def check_pictures(settings, found):
    """The cameras of a run that sees, in its order: those that `cameras` names, else those that
    its data sets have. Raises ValueError for one that a data set does not have."""
    robots = [each for each in found if each.samples]
    if not settings['cameras']:
        return check_unnamed(robots)
    for each in robots:
        names = names_in(each.name, settings)
        for name in names.values():
            check_camera(each, name, settings)
    return settings['cameras']


def check_camera(found, name, settings):
    """Raises ValueError where a data set has no pictures of a camera, or has depth; says how many
    of its samples have none."""
    there = found.cameras.get(name.lower(), 0)
    if not there:
        raise ValueError(lack_line(found, name, settings))
    if name.lower() in found.depth:
        raise ValueError(depth_line(found, name))
    if there < found.samples:
        say(f'{found.samples - there} of {found.samples} samples of {found.name!r} lack camera '
            f'{name!r}: there it is black, and nobody attends to it')


def lack_line(found, name, settings):
    """Why a camera can not be read, and what to do."""
    line = f'cameras: no sample of {found.name!r} has {name!r}: it has {listed(found.cameras)}'
    beside = [ext for ext in sorted(found.others) if ext.startswith(f'{name.lower()}.')]
    if beside:
        line += f', and {", ".join(beside)}, which is no picture'
    near = nearest(name, list(found.cameras), 0)
    if near:
        line += f' (did you mean {near!r}?)'

    # the remedy where it is no slip of the pen
    has = names_in(found.name, settings)
    said = {found.name: {ours: theirs for ours, theirs in has.items()
                         if theirs.lower() in found.cameras}}
    return f'{line}. If it lacks that camera, say which it has: cameras_of={said}'


def depth_line(found, name):
    others = sorted(found.cameras.keys() - found.depth)
    return (f'cameras: {name!r} of {found.name!r} holds depth in 16 bits, which is no picture: '
            f'leave it out with cameras={others}')


def check_unnamed(robots):
    """The cameras of data sets where none is named: the pictures of a sample then go by the order
    of their names, so all must have the same. Raises ValueError."""
    seeing = [each for each in robots if each.cameras]
    for each in seeing:
        for name in each.depth:
            raise ValueError(depth_line(each, name))
        if each.cameras.keys() != seeing[0].cameras.keys():
            raise ValueError(f'cameras=[]: {seeing[0].name!r} has {listed(seeing[0].cameras)}, '
                             f'{each.name!r} has {listed(each.cameras)}: name the cameras of the '
                             'run, and in cameras_of what a data set calls them')
        for name, there in each.cameras.items():
            if there == each.samples:
                continue
            lack = (f'{each.samples - there} of {each.samples} samples of {each.name!r} lack '
                    f'{name!r}')
            # another camera would stand in its place
            if len(each.cameras) > 1:
                raise ValueError(f'cameras=[]: {lack}: name the cameras, so that each keeps its '
                                 f'place: cameras={sorted(each.cameras)}')
            say(f'{lack}: they are learned without a picture')
    if not seeing:
        return []
    return sorted(seeing[0].cameras)


# -----------------------------------------------------------------------------------------------
# statistics


def check_statistics(stats, path, found, settings):
    """Raises ValueError where statistics are of other numbers than those of the data sets."""
    robots = [each for each in found if each.samples]
    keys = ['actions']
    # a state that the run is not to see needs none
    if settings['proprio_dim']:
        keys.append('proprio')
    names = ','.join(each.name for each in robots)
    for each in robots:
        for sizes, where in each.sizes.items():
            for key, number in zip(keys, sizes):
                if not fits(stats, key, number):
                    raise ValueError(
                        f'{path}: its {key} have {len(stats[key]["mean"])} numbers, those of '
                        f'{each.name!r} have {number} ({where}), so it was made of other data: '
                        f'python prepare/stats.py --data={names} --out={path} makes it anew')


def fits(stats, key, number):
    """Are statistics of samples with so many numbers, among others?"""
    known, count = len(stats[key]['mean']), stats[key].get('count')
    if number >= known or not count:
        return number == known
    # of several robots: behind the last number of a smaller one fewer samples were counted
    before = stats['actions']['count'][0]
    if number:
        before = count[number - 1]
    return count[number] < before
