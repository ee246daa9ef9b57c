"""LeRobot data sets (v2.1 and v3: parquet and mp4) to shards, and shards to a LeRobot data set (v3).

    python prepare/lerobot.py --data=path/to/lerobot_set --out=datasets/mine
    python prepare/lerobot.py --data=datasets/mine --out=path/to/lerobot_set --export=true

Every time step becomes a sample: `key.<camera>.png` (exact; jpg is smaller), `key.lowdim.npz` with `proprio` (column
observation.state), a chunk of `action_steps` actions (the column action) and `is_pad`, `key.json` with the instruction,
episode, frame and timestamp. A set without cameras is stored by episodes, `key.lowdim.npy`, see prepare/metaworld.py. A
camera is the last part of its feature's name: observation.images.front becomes front.

An episode that is broken (a file is missing or cut, a count or a time does not fit, a value is not finite) is named on
stderr and left out; then the exit code is 1, or 0 with --skip_broken=true.

Export writes a file of parquet and one mp4 a camera for all episodes; h264, `crf=0` keeps every pixel (libx264rgb).
What `sample.py --record` wrote goes the same way, its success in next.success. Needs `pip install av`.
"""

import json
import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))
from configurator import configure  # noqa: E402
from processor import fields, open_picture  # noqa: E402
from robots.record import samples  # noqa: E402
from shards import CACHE, BadSample, Folder  # noqa: E402


class Broken(Exception):
    """An episode that can not be used; the message says why."""


# ----------------------------------------------------------------------------------------------------------------------
# rotations


def turned(x, rotations, name, back=False):
    """The numbers (T, D) of a column with its rotations as 6D; back: from 6D to what they were. rotations: as the
    setting, counted in LeRobot's column. Raises ValueError."""
    here = sorted((begin, kind) for column, begin, kind in rotations if column == name)
    if not here:
        return x
    import torch

    from robots.rotations import (
        axis_angle_to_rotation_6d,
        quaternion_to_rotation_6d,
        rotation_6d_to_axis_angle,
        rotation_6d_to_quaternion,
    )
    kinds = {'quaternion': (4, quaternion_to_rotation_6d, rotation_6d_to_quaternion),
             'axis_angle': (3, axis_angle_to_rotation_6d, rotation_6d_to_axis_angle)}
    for begin, kind in here if back else reversed(here):
        size, to_6d, from_6d = kinds[kind.removesuffix('_xyzw')]
        roll = int(kind.endswith('_xyzw'))          # ours are (w, x, y, z)
        end = begin + (6 if back else size)
        if x.shape[1] < end:
            raise ValueError(f'rotations={rotations}: {name} has {x.shape[1]} numbers, no {kind} at {begin}')
        part = torch.tensor(x[:, begin:end], dtype=torch.float64)
        part = from_6d(part).roll(-roll, -1) if back else to_6d(part.roll(roll, -1))
        x = np.concatenate([x[:, :begin], part.numpy().astype(np.float32), x[:, end:]], 1)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# reading


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]


def read_meta(root):
    """info.json, {task index: sentence} and a list of episodes' rows, of either version. Raises ValueError."""
    import pyarrow.parquet as pq
    try:
        info = json.loads((root / 'meta/info.json').read_text(encoding='utf-8'))
        version = info['codebase_version']
        if version.startswith('v2'):
            tasks = {row['task_index']: row['task'] for row in jsonl(root / 'meta/tasks.jsonl')}
            episodes = jsonl(root / 'meta/episodes.jsonl')
        elif version.startswith('v3'):
            rows = pq.read_table(root / 'meta/tasks.parquet').to_pylist()
            tasks = {row['task_index']: row.get('task', row.get('__index_level_0__')) for row in rows}
            files = sorted((root / 'meta/episodes').rglob('*.parquet'))
            episodes = [row for file in files for row in pq.read_table(file).to_pylist()]
        else:
            raise ValueError(f'codebase_version {version}: expected v2.x or v3.x')
        return info, tasks, sorted(episodes, key=lambda row: row['episode_index'])
    except (OSError, KeyError) as error:
        raise ValueError(f'{root} is no LeRobot data set ({error})') from None


def episode_rows(root, info, episode, opened):
    """The table of an episode. opened: the one file of v3 that was read last, {path: table}."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    number = episode['episode_index']
    where = dict(episode_index=number, episode_chunk=number // info.get('chunks_size', 1000),
                 chunk_index=episode.get('data/chunk_index', 0), file_index=episode.get('data/file_index', 0))
    path = root / info['data_path'].format(**where)
    try:
        if path not in opened:
            opened.clear()
            opened[path] = pq.read_table(path)
        table = opened[path]
        table = table.filter(pc.equal(table['episode_index'], number)).sort_by('frame_index')
    except (OSError, KeyError, pa.ArrowException) as error:
        raise Broken(f'{path} can not be read ({error})') from None
    if len(table) != episode['length'] or table['frame_index'].to_pylist() != list(range(len(table))):
        raise Broken(f'{path} has {len(table)} rows of it, or others than 0, 1, ..., its length is {episode["length"]}')
    return table


def column(table, name):
    """A column of numbers -> fp32 (T, D)."""
    if name not in table.column_names:
        raise Broken(f'it has no column {name}')
    out = np.array(table[name].to_pylist(), np.float32).reshape(len(table), -1)
    if not np.isfinite(out).all():
        raise Broken(f'{name} holds a value that is not finite')
    return out


def video_frames(root, info, episode, key, times):
    """Yields uint8 (H, W, 3), the frame of each of `times`, seconds in the episode; never more than one is held."""
    import av
    number = episode['episode_index']
    where = dict(episode_index=number, episode_chunk=number // info.get('chunks_size', 1000), video_key=key,
                 chunk_index=episode.get(f'videos/{key}/chunk_index', 0),
                 file_index=episode.get(f'videos/{key}/file_index', 0))
    path = root / info['video_path'].format(**where)
    start, tolerance = episode.get(f'videos/{key}/from_timestamp', 0.0), 0.5 / info['fps']
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            first = float((stream.start_time or 0) * stream.time_base)
            container.seek(max(int((start + first - tolerance) / stream.time_base), 0), stream=stream)
            frames = container.decode(stream)
            for t in times:
                for frame in frames:
                    at = float(frame.pts * stream.time_base) - first - start
                    if at >= t - tolerance:
                        break
                else:
                    raise Broken(f'{path} ends before {t:.3f} s of it')
                if at > t + tolerance:
                    raise Broken(f'{path} has no frame at {t:.3f} s of it')
                yield frame.to_ndarray(format='rgb24')
    except (OSError, av.FFmpegError, IndexError) as error:
        raise Broken(f'{path} can not be decoded ({error})') from None


def image_frames(table, key):
    """The same of a column of encoded pictures."""
    for cell in table[key].to_pylist():
        try:
            yield np.array(open_picture(cell['bytes']).convert('RGB'))
        except (BadSample, TypeError, KeyError) as error:
            raise Broken(f'{key}: {error}') from None


def read_episode(root, info, tasks, episode, s, opened):
    """[(key, {extension: bytes})] of an episode. Raises Broken."""
    table = episode_rows(root, info, episode, opened)
    actions, times = column(table, 'action'), column(table, 'timestamp')[:, 0].astype(float)
    proprio = column(table, 'observation.state') if 'observation.state' in table.column_names else np.zeros(
        (len(table), 0), np.float32)
    actions, proprio = (turned(x, s['rotations'], name) for x, name in (
        (actions, 'action'), (proprio, 'observation.state')))
    try:
        words = [tasks[i] for i in table['task_index'].to_pylist()]
    except KeyError as error:
        raise Broken(f'task {error} is unknown') from None
    name, fps = f'{episode["episode_index"]:06d}', info['fps']
    cameras = {key: feature['dtype'] for key, feature in info['features'].items()
               if feature['dtype'] in ('video', 'image')}
    views = {key.rpartition('.')[2]: video_frames(root, info, episode, key, times) if kind == 'video' else
             image_frames(table, key) for key, kind in cameras.items()}
    meta = dict(episode=episode['episode_index'], fps=fps)
    if 'next.success' in table.column_names:
        meta['success'] = bool(column(table, 'next.success').any())
    return samples(name, proprio, actions, views, meta, [dict(instruction=word, timestamp=at) for word, at in zip(
        words, times)], s['action_steps'], s['picture_format'])


def convert(s):
    """Episodes to shards of `episodes_per_shard`; the number of broken ones."""
    from webdataset import TarWriter
    root, out = Path(s['data']), Path(s['out'])
    info, tasks, episodes = read_meta(root)
    out.mkdir(parents=True, exist_ok=True)
    (out / 'manifest.jsonl').unlink(missing_ok=True)
    rows, broken, opened, steps = [], 0, {}, 0
    for a in range(0, len(episodes), s['episodes_per_shard']):
        path, count = out / f'{len(rows):08d}.tar', 0
        with TarWriter(str(path) + '.part', encoder=False, mtime=0.0) as sink:
            for episode in episodes[a:a + s['episodes_per_shard']]:
                try:
                    found = read_episode(root, info, tasks, episode, s, opened)
                except Broken as error:
                    print(f'prepare/lerobot.py: episode {episode["episode_index"]}: {error}', file=sys.stderr)
                    broken += 1
                    continue
                for key, members in found:
                    sink.write({'__key__': key, **members})
                count += episode['length']
        os.replace(str(path) + '.part', path)
        rows.append(dict(shard=path.stem, num_sequences=count))
        steps += count
    (out / 'manifest.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    print(f'{out}: {len(episodes) - broken} episodes, {steps} steps, {broken} broken episodes left out')
    return broken


# ----------------------------------------------------------------------------------------------------------------------
# writing


def episodes_of(folder, rotations):
    """Yields the episodes of a data set of shards: (words, proprio (T, P), actions (T, A), {camera: [uint8]}, what its
    first .json holds)."""
    now, held = None, []
    for shard in range(len(folder.sizes)):
        for i in range(int(folder.sizes[shard])):
            key = folder.key(shard, i)
            try:
                sample = fields(folder.read(shard, i), lowdim=True)
                low = sample['lowdim']
            except (BadSample, KeyError) as error:
                raise ValueError(f'{folder.name(shard)}.tar, {key}: {error}') from None
            this = key.rpartition('[')[0] or key.rpartition('-')[0]
            if this != now and held:
                yield gathered(held, rotations)
                held = []
            now = this
            held.append((sample.get('instruction', ''), low['proprio'], low['actions'][0], {
                name or 'image': np.array(open_picture(data).convert('RGB'))
                for name, data in zip(sample['picture_names'], sample['pictures'])}, sample))
    if held:
        yield gathered(held, rotations)


def gathered(held, rotations):
    words, proprio, actions, pictures, samples = zip(*held)
    proprio, actions = (turned(np.stack(x), rotations, name, back=True)
                        for x, name in ((proprio, 'observation.state'), (actions, 'action')))
    return words, proprio, actions, {k: [p[k] for p in pictures] for k in pictures[0]}, samples[0]


def open_video(path, shape, fps, crf):
    """(container, stream) of an mp4 to be written."""
    import av
    path.parent.mkdir(parents=True, exist_ok=True)
    container = av.open(str(path), 'w')
    stream = container.add_stream('libx264' if crf else 'libx264rgb', rate=Fraction(fps).limit_denominator(1000),
                                  options={'crf': str(crf), 'g': '10'})
    stream.height, stream.width, stream.pix_fmt = *shape[:2], 'yuv420p' if crf else 'rgb24'
    return container, stream


def write_v3(root, episodes, fps=0, crf=23, robot='unknown'):
    """Write a LeRobotDataset v3 of what `episodes_of` yields; the number of episodes. Where .json says `success`, the
    last step has next.success, as LeRobot's simulators write it. fps=0: as .json says. Raises ValueError."""
    import av
    root = Path(root)
    if (root / 'meta').exists():
        raise ValueError(f'{root} holds a LeRobot data set already: give another --out')
    rows, meta, tasks, videos, total, keys = [], [], {}, {}, 0, ()
    for number, (words, proprio, actions, pictures, said) in enumerate(episodes):
        n, fps = len(actions), fps or said.get('fps', 0)
        if not fps:
            raise ValueError('the shards do not say how many steps a second there are: give --fps=')
        keys = keys or (pictures.keys(), 'success' in said)
        if (pictures.keys(), 'success' in said) != keys:
            raise ValueError(f'episode {number} has cameras {sorted(pictures)} and success {"success" in said}, those '
                             f'before {sorted(keys[0])} and {keys[1]}')
        row = {'episode_index': number, 'tasks': sorted(set(words)), 'length': n, 'dataset_from_index': total,
               'dataset_to_index': total + n, 'data/chunk_index': 0, 'data/file_index': 0,
               'meta/episodes/chunk_index': 0, 'meta/episodes/file_index': 0}
        for key, frames in ((f'observation.images.{name}', frames) for name, frames in pictures.items()):
            if key not in videos:
                path = root / f'videos/{key}/chunk-000/file-000.mp4'
                videos[key] = *open_video(path, frames[0].shape, fps, crf), frames[0].shape
            container, stream, _ = videos[key]
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
            row |= {f'videos/{key}/chunk_index': 0, f'videos/{key}/file_index': 0,
                    f'videos/{key}/from_timestamp': total / fps, f'videos/{key}/to_timestamp': (total + n) / fps}
        meta.append(row)
        rows += [{'observation.state': proprio[t].tolist(), 'action': actions[t].tolist(), 'timestamp': t / fps,
                  'frame_index': t, 'episode_index': number, 'index': total + t,
                  'task_index': tasks.setdefault(words[t], len(tasks))} for t in range(n)]
        for t in range(n if keys[1] else 0):
            rows[total + t] |= {'next.done': t == n - 1, 'next.success': t == n - 1 and bool(said['success'])}
        total += n
    for container, stream, _ in videos.values():
        container.mux(stream.encode())
        container.close()
    if not meta:
        raise ValueError('there are no episodes to write')
    write_tables(root, rows, meta, tasks, {key: shape for key, (*_, shape) in videos.items()}, fps, robot)
    return len(meta)


def write_tables(root, rows, meta, tasks, videos, fps, robot):
    """The parquet and json files: rows of steps, meta of episodes, {sentence: number}, {video: shape}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from robots.actions import Statistics
    types = {'timestamp': pa.float32(), 'next.done': pa.bool_(), 'next.success': pa.bool_()}
    features, columns, stats = {}, [], {}
    for key, value in rows[0].items():
        size = len(value) if isinstance(value, list) else 1
        kind = pa.float32() if isinstance(value, list) else types.get(key, pa.int64())
        if isinstance(value, list):
            stats[key] = Statistics(size).update(np.array([row[key] for row in rows], np.float32)).to_dict()
            stats[key]['count'] = [len(rows)]
            for row in rows if size == 1 else []:       # LeRobot has one number as a number
                row[key] = row[key][0]
        columns.append((key, pa.list_(kind) if size != 1 else kind))
        features[key] = dict(dtype={'float': 'float32'}.get(str(kind), str(kind)), shape=[size], names=None)
    features |= {key: dict(dtype='video', shape=list(shape), names=['height', 'width', 'channels'])
                 for key, shape in videos.items()}
    index = '__index_level_0__'         # pandas, with which LeRobot reads it, is to take the sentences as index
    pandas = dict(index_columns=[index], column_indexes=[], columns=[
        dict(name='task_index', field_name='task_index', pandas_type='int64', numpy_type='int64', metadata=None),
        dict(name=None, field_name=index, pandas_type='unicode', numpy_type='object', metadata=None)])
    names = pa.table({'task_index': list(tasks.values()), index: list(tasks)})
    names = names.replace_schema_metadata({'pandas': json.dumps(pandas)})
    for path, what in (('data/chunk-000/file-000.parquet', pa.Table.from_pylist(rows, pa.schema(columns))),
                       ('meta/episodes/chunk-000/file-000.parquet', pa.Table.from_pylist(meta)),
                       ('meta/tasks.parquet', names)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(what, root / path)
    (root / 'meta/stats.json').write_text(json.dumps(stats, indent=1))
    (root / 'meta/info.json').write_text(json.dumps(dict(
        codebase_version='v3.0', robot_type=robot, total_episodes=len(meta), total_frames=len(rows),
        total_tasks=len(tasks), chunks_size=1000, data_files_size_in_mb=100, video_files_size_in_mb=200, fps=fps,
        splits={'train': f'0:{len(meta)}'}, features=features,
        data_path='data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
        video_path='videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4'), indent=1))


def fail(message, code):
    print(f'prepare/lerobot.py: {message}', file=sys.stderr)
    sys.exit(code)


def main(s):
    if not s['data'] or not s['out']:
        fail('--data= and --out= are needed', 2)
    if min(s['action_steps'], s['episodes_per_shard']) < 1 or s['fps'] < 0 or s['picture_format'] not in ('png', 'jpg'):
        fail('action_steps and episodes_per_shard must be at least 1, fps at least 0, picture_format png or jpg', 2)
    columns, kinds = ('action', 'observation.state'), ('quaternion', 'quaternion_xyzw', 'axis_angle')
    for item in s['rotations']:
        if len(item) != 3 or item[0] not in columns or item[1] not in range(1000) or item[2] not in kinds:
            fail(f'rotations={s["rotations"]}: expected ({" or ".join(columns)}, its place, {" or ".join(kinds)})', 2)
    try:
        if s['export']:
            folder = Folder(s['data'], '', s['cache_dir'])
            count = write_v3(s['out'], episodes_of(folder, s['rotations']), s['fps'], s['crf'])
            print(f'{s["out"]}: {count} episodes')
            return
        broken = convert(s)
    except (ValueError, OSError, ImportError) as error:
        fail(error, 1)
    if broken and not s['skip_broken']:
        fail(f'{broken} episodes are broken: mend them, or accept it with --skip_broken=true', 1)


if __name__ == '__main__':
    data = ''                   # a LeRobot data set, or with export shards
    out = ''                    # what is made
    action_steps = 16           # of a chunk
    picture_format = 'png'      # or jpg, a quarter as large and not exact
    episodes_per_shard = 50
    skip_broken = False         # exit code 0 though episodes are left out
    export = False              # from shards to LeRobot v3
    rotations = []              # ('action', 3, 'quaternion') at 3 to 6 becomes 6D, and back; or 'quaternion_xyzw', or
    #                             'axis_angle', in 'action' or 'observation.state'
    fps = 0                     # of an export (0: as the shards say)
    crf = 23                    # of an export's h264: 0 keeps every pixel
    cache_dir = CACHE
    main(configure(globals()))
