"""LeRobot data sets (v2.1 and v3: parquet and mp4) to shards, and shards to LeRobot (v3).

    python prepare/lerobot.py --data=path/to/lerobot_set --out=datasets/mine
    python prepare/lerobot.py --data=datasets/mine --out=path/to/lerobot_set --export=true

Every time step becomes a sample: `key.<camera>.png` (exact; jpg is smaller), `key.lowdim.npz` with
`proprio` (column observation.state), a chunk of `action_steps` actions (the column action) and
`is_pad`, `key.json` with the instruction, episode, frame and timestamp. A set without cameras is
stored by episodes, `key.lowdim.npy`, see prepare/metaworld.py. A camera is the last part of its
feature's name, and as many more as tell it from the others: observation.images.front becomes
front. Depth is no picture: it is left out, and named with all other columns that are.

`--rotations=[('action', 3, 'quaternion')]` makes the four numbers from 3 on the six of a 6D
rotation, and on export these again what they were: of the columns `action` and
`observation.state`, and of `quaternion` (w first), `quaternion_xyzw` and `axis_angle`.

An episode that is broken (a file is missing or cut, a count or a time does not fit, a value is not
finite) is named on stderr and left out; then the exit code is 1, or 0 with --skip_broken=true.

Export writes a file of parquet and one mp4 a camera for all episodes; h264, `crf=0` keeps every
pixel (libx264rgb). What `sample.py --record` wrote goes the same way, its success in next.success.
Needs `pip install av`.

Axes: T time steps of an episode, P numbers of a state, A of an action, H, W pixels.
"""

import itertools
import json
import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import manifests  # noqa: E402
import shards  # noqa: E402
from checkpoint import write_json  # noqa: E402
from configurator import configure  # noqa: E402
from pictures import is_depth, on_white, open_picture  # noqa: E402
from processor import fields  # noqa: E402
from robots import record  # noqa: E402
from robots.actions import Statistics, read  # noqa: E402
from robots.rotations import (  # noqa: E402
    axis_angle_to_rotation_6d,
    quaternion_to_rotation_6d,
    rotation_6d_to_axis_angle,
    rotation_6d_to_quaternion,
)
from shards import BadSample, Folder  # noqa: E402

data = ''                       # a LeRobot data set, or with export shards
out = ''                        # what is made
action_steps = 16               # of a chunk
picture_format = 'png'          # or jpg, a quarter as large and not exact
episodes_per_shard = 50
skip_broken = False             # exit code 0 though episodes are left out
export = False                  # from shards to LeRobot v3
rotations = []                  # [(column, place, kind), ...] of what becomes 6D, and back
fps = 0                         # of an export (0: as the shards say)
crf = 23                        # of an export's h264: 0 keeps every pixel
cache_dir = shards.CACHE


# columns that samples are made of; `index` counts the rows, which stay in their order
USED = {'action', 'observation.state', 'timestamp', 'frame_index', 'episode_index', 'index',
        'task_index', 'next.success'}


class Broken(Exception):
    """An episode that can not be used; the message says why."""


# -------------------------------------------------------------------------------------------------
# rotations


def to_6d(x, kind):
    """Rotations of a kind (T, 3 or 4) -> (T, 6)."""
    if kind == 'axis_angle':
        return axis_angle_to_rotation_6d(x)
    # ours are (w, x, y, z)
    if kind == 'quaternion_xyzw':
        x = x.roll(1, -1)
    return quaternion_to_rotation_6d(x)


def from_6d(x, kind):
    """The inverse of to_6d."""
    if kind == 'axis_angle':
        return rotation_6d_to_axis_angle(x)
    x = rotation_6d_to_quaternion(x)
    if kind == 'quaternion_xyzw':
        x = x.roll(-1, -1)
    return x


def turned(x, rotations, name, back=False):
    """The numbers (T, D) of a column with its rotations as 6D; back: from 6D to what they were.

    rotations: as the setting, counted in LeRobot's column. Raises ValueError."""
    here = sorted((begin, kind) for column, begin, kind in rotations if column == name)
    # places are counted in what is not 6D: there, those behind a rotation move with it
    if not back:
        here.reverse()

    for begin, kind in here:
        size = 4
        if back:
            size = 6
        elif kind == 'axis_angle':
            size = 3
        end = begin + size
        if x.shape[1] < end:
            raise ValueError(f'rotations={rotations}: {name} has {x.shape[1]} numbers, no {kind} '
                             f'at {begin}')

        # in fp64, so that there and back is the same to fp32
        part = torch.tensor(x[:, begin:end], dtype=torch.float64)
        if back:
            part = from_6d(part, kind)
        else:
            part = to_6d(part, kind)
        x = np.concatenate([x[:, :begin], part.numpy().astype(np.float32), x[:, end:]], 1)
    return x


# -------------------------------------------------------------------------------------------------
# LeRobot's files


def jsonl(path):
    """The rows of a .jsonl file."""
    lines = path.read_text(encoding='utf-8').splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def read_meta(root):
    """info.json, {task index: sentence} and a list of episodes' rows, of either version.

    Raises ValueError."""
    import pyarrow.parquet as pq
    meta = root / 'meta'
    try:
        info = json.loads((meta / 'info.json').read_text(encoding='utf-8'))
        version = info['codebase_version']
        if version.startswith('v2'):
            tasks = {row['task_index']: row['task'] for row in jsonl(meta / 'tasks.jsonl')}
            episodes = jsonl(meta / 'episodes.jsonl')

        # in tasks.parquet the sentences are pandas' index
        elif version.startswith('v3'):
            tasks, episodes = {}, []
            for row in pq.read_table(meta / 'tasks.parquet').to_pylist():
                tasks[row['task_index']] = row.get('task', row.get('__index_level_0__'))
            for path in sorted((meta / 'episodes').rglob('*.parquet')):
                episodes += pq.read_table(path).to_pylist()
        else:
            raise ValueError(f'codebase_version {version}: expected v2.x or v3.x')
        episodes.sort(key=lambda row: row['episode_index'])
    except (OSError, KeyError) as error:
        raise ValueError(f'{root} is no LeRobot data set ({error})') from None
    return info, tasks, episodes


def path_of(root, info, episode, template, place, video_key=''):
    """A file of an episode; place: 'data' or 'videos/<key>', where its row says which (v3)."""
    number = episode['episode_index']
    return root / template.format(
        episode_index=number,
        episode_chunk=number // info.get('chunks_size', 1000),
        chunk_index=episode.get(f'{place}/chunk_index', 0),
        file_index=episode.get(f'{place}/file_index', 0),
        video_key=video_key,
    )


def episode_rows(root, info, episode, opened):
    """The table of an episode. opened: {path: table} of the one file that was read last.

    Raises Broken."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    path = path_of(root, info, episode, info['data_path'], 'data')
    try:
        # a file of v3 holds many episodes
        if path not in opened:
            opened.clear()
            opened[path] = pq.read_table(path)
        table = opened[path]
        table = table.filter(pc.equal(table['episode_index'], episode['episode_index']))
        table = table.sort_by('frame_index')
    except (OSError, KeyError, pa.ArrowException) as error:
        raise Broken(f'{path} can not be read ({error})') from None

    frames = table['frame_index'].to_pylist()
    if len(table) != episode['length'] or frames != list(range(len(table))):
        raise Broken(f'{path} has {len(table)} rows of it, or others than 0, 1, ..., its length '
                     f'is {episode["length"]}')
    return table


def column(table, name):
    """A column of numbers -> fp32 (T, D). Raises Broken."""
    if name not in table.column_names:
        raise Broken(f'it has no column {name}')
    values = np.array(table[name].to_pylist(), np.float32).reshape(len(table), -1)
    if not np.isfinite(values).all():
        raise Broken(f'{name} holds a value that is not finite')
    return values


def video_frames(root, info, episode, key, times):
    """Yield uint8 (H, W, 3), the frame of each of `times`, seconds in the episode. Raises Broken.

    Never more than one is held."""
    import av
    path = path_of(root, info, episode, info['video_path'], f'videos/{key}', key)
    start = episode.get(f'videos/{key}/from_timestamp', 0.0)
    tolerance = 0.5 / info['fps']
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            start_time = stream.start_time or 0
            first = float(start_time * stream.time_base)

            # decoding begins at the key frame before the episode
            begin = int((start + first - tolerance) / stream.time_base)
            container.seek(max(begin, 0), stream=stream)
            decoded = container.decode(stream)

            # each time takes a new frame: what comes before it is of no step
            for t in times:
                at = -np.inf
                while at < t - tolerance:
                    frame = next(decoded, None)
                    if frame is None:
                        raise Broken(f'{path} ends before {t:.3f} s of it')
                    at = float(frame.pts * stream.time_base) - first - start
                if at > t + tolerance:
                    raise Broken(f'{path} has no frame at {t:.3f} s of it')
                yield frame.to_ndarray(format='rgb24')
    except (OSError, av.FFmpegError, IndexError) as error:
        raise Broken(f'{path} can not be decoded ({error})') from None


def image_frames(table, key):
    """Yield the same of a column of encoded pictures."""
    for cell in table[key].to_pylist():
        try:
            yield pixels_of(key, cell['bytes'])
        except (BadSample, TypeError, KeyError) as error:
            raise Broken(f'{key}: {error}') from None


def pixels_of(name, data):
    """An encoded picture -> uint8 (H, W, 3), on white, as training has it. Raises BadSample."""
    if is_depth(name, data):
        raise BadSample(f'{name} holds depth in 16 bits, which is no picture')
    return np.array(on_white(open_picture(data)))


def camera_names(features):
    """{feature: what its camera is called}. Raises ValueError where names would be one."""
    keys = [key for key, feature in features.items() if feature['dtype'] in ('video', 'image')]
    names = {key: shortest_name(key, keys) for key in keys}
    # members of a tar have no case, and a / begins a folder
    for key, name in names.items():
        same = [other for other in names if names[other].lower() == name.lower()]
        if len(same) > 1:
            raise ValueError(f'cameras {", ".join(same)} differ in the case of letters alone:'
                             ' rename one of them')
        if '/' in name:
            raise ValueError(f'camera {key} has a / in its name: rename it')
    return names


def shortest_name(key, keys):
    """The end of a feature's name, by its dots, that no other ends with."""
    parts = key.split('.')
    for begin in reversed(range(len(parts))):
        name = '.'.join(parts[begin:])
        same = [other for other in keys if f'.{other}'.lower().endswith(f'.{name}'.lower())]
        if len(same) == 1:
            break
    return name


def holds_depth(key, feature, table):
    """Is a feature a film or pictures of distances, as it says, or as its first picture is?"""
    about = feature.get('info') or feature.get('video_info') or {}
    says_so = about.get('video.is_depth_map') or about.get('is_depth_map')
    # grey of 10, 12 or 16 bits
    if says_so or str(about.get('video.pix_fmt')).startswith('gray1'):
        return True
    if feature['dtype'] != 'image' or 'depth' not in key.lower():
        return False
    # fractions are stored as TIFF
    first = (table[key][0].as_py() or {}).get('bytes') or b''
    return is_depth(key, first) or first[:4] in (b'II*\0', b'MM\0*')


# -------------------------------------------------------------------------------------------------
# LeRobot -> shards


def read_episode(root, info, tasks, episode, s, opened, left_out):
    """[(key, {extension: bytes})] of an episode; names of columns that are not in them go to
    `left_out`. Raises Broken."""
    table = episode_rows(root, info, episode, opened)
    left_out |= {*table.column_names, *info['features']} - USED
    actions = column(table, 'action')
    times = column(table, 'timestamp')[:, 0].astype(float)

    # a robot may have cameras alone
    proprio = np.zeros((len(table), 0), np.float32)
    if 'observation.state' in table.column_names:
        proprio = column(table, 'observation.state')
    actions = turned(actions, s['rotations'], 'action')
    proprio = turned(proprio, s['rotations'], 'observation.state')

    # what is said may change from step to step
    each = []
    try:
        for task, at in zip(table['task_index'].to_pylist(), times):
            each.append(dict(instruction=tasks[task], timestamp=at))
    except KeyError as error:
        raise Broken(f'task {error} is unknown') from None

    pictures = {}
    for key, camera in camera_names(info['features']).items():
        feature = info['features'][key]
        if holds_depth(key, feature, table):
            continue
        left_out.discard(key)
        if feature['dtype'] == 'video':
            pictures[camera] = video_frames(root, info, episode, key, times)
        else:
            pictures[camera] = image_frames(table, key)

    # one step of success makes an episode one
    number = episode['episode_index']
    meta = dict(episode=number, fps=info['fps'])
    if 'next.success' in table.column_names:
        meta['success'] = bool(column(table, 'next.success').any())
    return record.samples(f'{number:06d}', proprio, actions, pictures, meta, each,
                          s['action_steps'], s['picture_format'])


def convert(s):
    """Episodes to shards of `episodes_per_shard`; the number of broken ones."""
    from webdataset import TarWriter
    root, out = Path(s['data']), Path(s['out'])
    info, tasks, episodes = read_meta(root)
    camera_names(info['features'])          # before there is a file

    out.mkdir(parents=True, exist_ok=True)
    manifests.begin(out, 'prepare/lerobot.py')
    rows, num_broken, num_steps, opened, left_out = [], 0, 0, {}, set()
    for start in range(0, len(episodes), s['episodes_per_shard']):
        path, count = out / f'{len(rows):08d}.tar', 0
        with TarWriter(f'{path}.part', encoder=False, mtime=0.0) as sink:
            for episode in episodes[start:start + s['episodes_per_shard']]:
                try:
                    samples = read_episode(root, info, tasks, episode, s, opened, left_out)
                except Broken as error:
                    number = episode['episode_index']
                    print(f'prepare/lerobot.py: episode {number}: {error}', file=sys.stderr)
                    num_broken += 1
                    continue
                for key, members in samples:
                    sink.write({'__key__': key, **members})
                count += episode['length']
        os.replace(f'{path}.part', path)
        rows.append(dict(shard=path.stem, num_sequences=count))
        num_steps += count

    manifests.finish(out, rows)
    if left_out:
        print(f'prepare/lerobot.py: columns left out: {", ".join(sorted(left_out))}',
              file=sys.stderr)
    print(f'{out}: {len(episodes) - num_broken} episodes, {num_steps} steps, {num_broken} broken '
          'episodes left out')
    return num_broken


# -------------------------------------------------------------------------------------------------
# shards -> LeRobot v3


def steps_of(folder):
    """Yield (name of its episode, sentence, proprio (P,), action (A,), {camera: uint8}, .json).

    Of each time step of a data set of shards. Raises ValueError."""
    for shard in range(len(folder.sizes)):
        for index in range(int(folder.sizes[shard])):
            key = folder.key(shard, index)
            try:
                members = folder.read(shard, index)
                sample, lowdim, pictures = fields(members), read(members)['lowdim'], {}
                for camera, content in zip(sample['picture_names'], sample['pictures']):
                    camera = camera or 'image'
                    if camera in pictures:
                        raise BadSample(f'it has two pictures of camera {camera!r}')
                    pictures[camera] = pixels_of(camera, content)
            except (BadSample, KeyError) as error:
                raise ValueError(f'{folder.name(shard)}.tar, {key}: {error}') from None

            # name[row] of what is stored by episodes, name-step of what is stored by steps
            name = key.rpartition('[')[0] or key.rpartition('-')[0]
            words, action = sample.get('instruction', ''), lowdim['actions'][0]
            yield name, words, lowdim['proprio'], action, pictures, sample


def episodes_of(folder, rotations):
    """Yield (sentences, proprio (T, P), actions (T, A), {camera: [uint8]}, its first .json).

    Of each episode of a data set of shards. Raises ValueError."""
    for name, steps in itertools.groupby(steps_of(folder), key=lambda step: step[0]):
        _, words, proprio, actions, pictures, samples = zip(*steps)
        proprio = turned(np.stack(proprio), rotations, 'observation.state', back=True)
        actions = turned(np.stack(actions), rotations, 'action', back=True)

        # a step without a camera of the others would shift its film
        frames = {camera: [] for camera in pictures[0]}
        for t, views in enumerate(pictures):
            if views.keys() != frames.keys():
                raise ValueError(f'{name}: step {t} has cameras {sorted(views)}, those before '
                                 f'{sorted(frames)}')
            for camera, view in views.items():
                frames[camera].append(view)
        yield words, proprio, actions, frames, samples[0]


def open_video(path, shape, fps, crf):
    """(container, stream) of an mp4 to be written, of frames of a shape (H, W, 3)."""
    import av
    path.parent.mkdir(parents=True, exist_ok=True)
    container = av.open(str(path), 'w')

    # yuv420p is what every player shows, but of colours it keeps a quarter: crf=0 is RGB
    codec, pixels = 'libx264', 'yuv420p'
    if crf == 0:
        codec, pixels = 'libx264rgb', 'rgb24'

    # a key frame (g) every tenth, so that an episode's beginning is soon found
    rate = Fraction(fps).limit_denominator(1000)
    stream = container.add_stream(codec, rate=rate, options={'crf': str(crf), 'g': '10'})
    stream.height, stream.width, stream.pix_fmt = *shape[:2], pixels
    return container, stream


def write_frames(root, key, frames, videos, fps, crf):
    """Add an episode's frames to the video `key`; videos: {key: (container, stream, shape)}."""
    import av
    if key not in videos:
        path, shape = root / f'videos/{key}/chunk-000/file-000.mp4', frames[0].shape
        videos[key] = *open_video(path, shape, fps, crf), shape
    container, stream, shape = videos[key]
    for frame in frames:
        # the encoder would stretch it
        if frame.shape != shape:
            raise ValueError(f'{key} has pictures of {frame.shape[:2]}, those before have '
                             f'{shape[:2]}')
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))


def meta_row(number, words, begin, end, cameras, fps):
    """The row of an episode that is steps `begin` to `end` of the data set."""
    row = {
        'episode_index': number, 'tasks': sorted(set(words)), 'length': end - begin,
        'dataset_from_index': begin, 'dataset_to_index': end,
        'data/chunk_index': 0, 'data/file_index': 0,
        'meta/episodes/chunk_index': 0, 'meta/episodes/file_index': 0,
    }
    for camera in cameras:
        key = f'videos/observation.images.{camera}'
        row |= {f'{key}/chunk_index': 0, f'{key}/file_index': 0,
                f'{key}/from_timestamp': begin / fps, f'{key}/to_timestamp': end / fps}
    return row


def step_rows(number, words, proprio, actions, begin, tasks, fps, about):
    """The rows of an episode's steps. tasks: {sentence: number}, to which new ones are added."""
    rows = []
    for t in range(len(actions)):
        row = {
            'observation.state': proprio[t].tolist(), 'action': actions[t].tolist(),
            'timestamp': t / fps, 'frame_index': t, 'episode_index': number, 'index': begin + t,
            'task_index': tasks.setdefault(words[t], len(tasks)),
        }
        # as LeRobot's simulators write it: the last step has it
        if 'success' in about:
            is_last = t == len(actions) - 1
            row['next.done'] = is_last
            row['next.success'] = is_last and bool(about['success'])
        rows.append(row)
    return rows


def write_v3(root, episodes, fps=0, crf=23, robot='unknown'):
    """Write a LeRobotDataset v3 of what `episodes_of` yields; the number of episodes.

    fps=0: as .json says. Raises ValueError."""
    root = Path(root)
    if (root / 'meta/info.json').exists():
        raise ValueError(f'{root} holds a LeRobot data set already: give another --out')

    rows, meta, tasks, videos, cameras, has_success = [], [], {}, {}, None, None
    for number, (words, proprio, actions, pictures, about) in enumerate(episodes):
        fps = fps or about.get('fps', 0)
        if not fps:
            raise ValueError('the shards do not say how many steps a second there are: give '
                             '--fps=')

        # a data set has the same columns and videos in all episodes
        if number == 0:
            cameras, has_success = set(pictures), 'success' in about
        if (set(pictures), 'success' in about) != (cameras, has_success):
            raise ValueError(f'episode {number} has cameras {sorted(pictures)} and success '
                             f'{"success" in about}, those before {sorted(cameras)} and '
                             f'{has_success}')

        # frames go to the video at once: pictures of one episode are in memory
        begin = len(rows)
        for camera, frames in pictures.items():
            write_frames(root, f'observation.images.{camera}', frames, videos, fps, crf)
        meta.append(meta_row(number, words, begin, begin + len(actions), pictures, fps))
        rows += step_rows(number, words, proprio, actions, begin, tasks, fps, about)

    # what the encoder still holds
    for container, stream, _ in videos.values():
        container.mux(stream.encode())
        container.close()
    if not meta:
        raise ValueError('there are no episodes to write')
    shapes = {key: shape for key, (_, _, shape) in videos.items()}
    write_tables(root, rows, meta, tasks, shapes, fps, robot)
    return len(meta)


def described(rows):
    """(arrow's schema, features of info.json, statistics) of rows of steps."""
    import pyarrow as pa
    types = {'timestamp': pa.float32(), 'next.done': pa.bool_(), 'next.success': pa.bool_()}
    columns, features, stats = [], {}, {}
    for key, value in rows[0].items():
        size, kind = 1, types.get(key, pa.int64())
        if isinstance(value, list):
            size, kind = len(value), pa.float32()
            values = np.array([row[key] for row in rows], np.float32)
            stats[key] = Statistics(size).update(values).to_dict() | {'count': [len(rows)]}
            # LeRobot has one number as a number
            if size == 1:
                for row in rows:
                    row[key] = row[key][0]

        features[key] = dict(dtype=str(kind), shape=[size], names=None)
        if kind == pa.float32():
            features[key]['dtype'] = 'float32'      # arrow calls it float
        if size != 1:
            kind = pa.list_(kind)
        columns.append((key, kind))
    return pa.schema(columns), features, stats


def tasks_table(tasks):
    """{sentence: number} as the table of tasks.parquet."""
    import pyarrow as pa
    # pandas, with which LeRobot reads it, is to take the sentences as index
    index = '__index_level_0__'
    table = pa.table({'task_index': list(tasks.values()), index: list(tasks)})
    columns = [
        dict(name='task_index', field_name='task_index', pandas_type='int64', numpy_type='int64',
             metadata=None),
        dict(name=None, field_name=index, pandas_type='unicode', numpy_type='object',
             metadata=None),
    ]
    pandas = dict(index_columns=[index], column_indexes=[], columns=columns)
    return table.replace_schema_metadata({'pandas': json.dumps(pandas)})


def write_tables(root, rows, meta, tasks, videos, fps, robot):
    """Parquet and json files: rows of steps, of episodes, {sentence: number}, {video: shape}."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    schema, features, stats = described(rows)
    for key, shape in videos.items():
        names = ['height', 'width', 'channels']
        features[key] = dict(dtype='video', shape=list(shape), names=names)

    tables = {
        'data/chunk-000/file-000.parquet': pa.Table.from_pylist(rows, schema),
        'meta/episodes/chunk-000/file-000.parquet': pa.Table.from_pylist(meta),
        'meta/tasks.parquet': tasks_table(tasks),
    }
    for name, table in tables.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)

    # the sizes are LeRobot's defaults: past them it would begin a next file
    info = dict(
        codebase_version='v3.0', robot_type=robot, total_episodes=len(meta),
        total_frames=len(rows), total_tasks=len(tasks), chunks_size=1000,
        data_files_size_in_mb=100, video_files_size_in_mb=200, fps=fps,
        splits={'train': f'0:{len(meta)}'}, features=features,
        data_path='data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
        video_path='videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4',
    )
    write_json(root / 'meta/stats.json', stats)
    # the last one, without which it is no data set
    write_json(root / 'meta/info.json', info)


# -------------------------------------------------------------------------------------------------
# the command


def fail(message, code):
    """End with one line on stderr."""
    print(f'prepare/lerobot.py: {message}', file=sys.stderr)
    sys.exit(code)


def check(s):
    """Refuse settings that make no sense."""
    if not s['data'] or not s['out']:
        fail('--data= and --out= are needed', 2)
    for key, least in dict(action_steps=1, episodes_per_shard=1, fps=0).items():
        if s[key] < least:
            fail(f'{key}={s[key]} must be at least {least}', 2)
    if s['picture_format'] not in ('png', 'jpg'):
        fail(f'picture_format={s["picture_format"]!r}: expected png or jpg', 2)

    columns = 'action', 'observation.state'
    kinds = 'quaternion', 'quaternion_xyzw', 'axis_angle'
    for item in s['rotations']:
        if not isinstance(item, (list, tuple)):
            item = ()
        is_known = len(item) == 3 and item[0] in columns and item[2] in kinds
        if not is_known or item[1] not in range(1000):
            fail(f'rotations={s["rotations"]}: expected ({" or ".join(columns)}, its place, '
                 f'{" or ".join(kinds)})', 2)


def main(s):
    """The command; s: the settings above."""
    check(s)
    try:
        if s['export']:
            folder = Folder(s['data'], '', s['cache_dir'])
            episodes = episodes_of(folder, s['rotations'])
            count = write_v3(s['out'], episodes, s['fps'], s['crf'])
            print(f'{s["out"]}: {count} episodes')
            return
        num_broken = convert(s)
    except (ValueError, OSError, ImportError) as error:
        fail(error, 1)
    if num_broken and not s['skip_broken']:
        fail(f'{num_broken} episodes are broken: mend them, or accept it with '
             '--skip_broken=true', 1)


if __name__ == '__main__':
    main(configure(globals()))
