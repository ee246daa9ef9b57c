"""LeRobot data sets (v2.1 and v3: parquet and mp4) to shards, and shards to a LeRobot data set (v3).

    python prepare/lerobot.py --data=path/to/lerobot_set --out=datasets/mine
    python prepare/lerobot.py --data=datasets/mine --out=path/to/lerobot_set --export=true --fps=10

Every time step becomes a sample: `key.<camera>.png` (exact; jpg is smaller), `key.lowdim.npz` with `proprio` (column
observation.state), a chunk of `action_steps` actions (the column action) and `is_pad`, `key.json` with the instruction,
episode, frame and timestamp. A set without cameras is stored by episodes, `key.lowdim.npy`, see prepare/metaworld.py. A
camera is the last part of its feature's name: observation.images.front becomes front.

An episode that is broken (a file is missing or cut, a count or a time does not fit, a value is not finite) is named on
stderr and left out; then the exit code is 1, or 0 with --skip_broken=true.

Export writes a file of parquet and one mp4 a camera for all episodes; h264, `crf=0` keeps every pixel (libx264rgb).
Needs `pip install av`.
"""

import io
import json
import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))
from configurator import configure  # noqa: E402
from processor import fields, open_picture  # noqa: E402
from shards import CACHE, BadSample, Folder  # noqa: E402


class Broken(Exception):
    """An episode that can not be used; the message says why."""


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
    try:
        words = [tasks[i] for i in table['task_index'].to_pylist()]
    except KeyError as error:
        raise Broken(f'task {error} is unknown') from None
    name, fps = f'{episode["episode_index"]:06d}', info['fps']
    cameras = {key: feature['dtype'] for key, feature in info['features'].items()
               if feature['dtype'] in ('video', 'image')}
    if not cameras and len(set(words)) == 1:
        rows = np.zeros(len(table), [('proprio', '<f4', proprio.shape[1]), ('actions', '<f4', actions.shape[1])])
        rows['proprio'], rows['actions'] = proprio, actions
        meta = dict(instruction=words[0], episode=episode['episode_index'], fps=fps)
        return [(name, {'json': json.dumps(meta).encode(), 'lowdim.npy': saved(np.save, rows)})]
    views = {key.rpartition('.')[2]: video_frames(root, info, episode, key, times) if kind == 'video' else
             image_frames(table, key) for key, kind in cameras.items()}
    out = []
    for t in range(len(table)):
        chunk = actions[t:t + s['action_steps']]
        short = s['action_steps'] - len(chunk)
        meta = dict(instruction=words[t], episode=episode['episode_index'], frame=t, timestamp=times[t], fps=fps)
        arrays = dict(proprio=proprio[t], actions=np.pad(chunk, ((0, short), (0, 0))),
                      is_pad=np.arange(s['action_steps']) >= len(chunk))
        out.append((f'{name}-{t:06d}', {
            'json': json.dumps(meta).encode(), 'lowdim.npz': saved(np.savez, **arrays),
            **{f'{view}.{s["picture_format"]}': encoded(next(frames), s['picture_format'])
               for view, frames in views.items()}}))
    return out


def saved(save, *args, **arrays):
    file = io.BytesIO()
    save(file, *args, **arrays)
    return file.getvalue()


def encoded(frame, kind):
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(frame).save(file, {'png': 'PNG', 'jpg': 'JPEG'}[kind], quality=95)
    return file.getvalue()


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


def episodes_of(folder):
    """Yields (words, proprio (T, P), actions (T, A), {camera: [uint8]}) of a data set of shards, episode by episode."""
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
                yield gathered(held)
                held = []
            now = this
            held.append((sample.get('instruction', ''), low['proprio'], low['actions'][0], {
                name or 'image': np.array(open_picture(data).convert('RGB'))
                for name, data in zip(sample['picture_names'], sample['pictures'])}))
    if held:
        yield gathered(held)


def gathered(held):
    words, proprio, actions, pictures = zip(*held)
    return words, np.stack(proprio), np.stack(actions), {k: [p[k] for p in pictures] for k in pictures[0]}


def write_v3(root, episodes, fps, crf=23, robot='unknown'):
    """Write a LeRobotDataset v3 of (words, proprio, actions, pictures), see `episodes_of`; the number of episodes."""
    import av
    import pyarrow as pa
    import pyarrow.parquet as pq
    root = Path(root)
    if (root / 'meta').exists():
        raise ValueError(f'{root} holds a LeRobot data set already: give another --out')
    table, meta, tasks, videos, total = [], [], {}, {}, 0
    for number, (words, proprio, actions, pictures) in enumerate(episodes):
        n = len(actions)
        if number and pictures.keys() != videos.keys():
            raise ValueError(f'episode {number} has cameras {sorted(pictures)}, those before {sorted(videos)}')
        row = {'episode_index': number, 'tasks': sorted(set(words)), 'length': n, 'dataset_from_index': total,
               'dataset_to_index': total + n, 'data/chunk_index': 0, 'data/file_index': 0,
               'meta/episodes/chunk_index': 0, 'meta/episodes/file_index': 0}
        for name, frames in pictures.items():
            key = f'observation.images.{name}'
            if name not in videos:
                path = root / f'videos/{key}/chunk-000/file-000.mp4'
                path.parent.mkdir(parents=True, exist_ok=True)
                container = av.open(str(path), 'w')
                rate = Fraction(fps).limit_denominator(1000)
                stream = container.add_stream('libx264' if crf else 'libx264rgb', rate=rate,
                                              options={'crf': str(crf), 'g': '10'})
                stream.height, stream.width = frames[0].shape[:2]
                stream.pix_fmt = 'rgb24' if crf == 0 else 'yuv420p'
                videos[name] = container, stream, frames[0].shape
            container, stream, shape = videos[name]
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
            row |= {f'videos/{key}/chunk_index': 0, f'videos/{key}/file_index': 0,
                    f'videos/{key}/from_timestamp': total / fps, f'videos/{key}/to_timestamp': (total + n) / fps}
        meta.append(row)
        table += [{'observation.state': p.tolist(), 'action': a.tolist(), 'timestamp': np.float32(t / fps),
                   'frame_index': t, 'episode_index': number, 'index': total + t,
                   'task_index': tasks.setdefault(w, len(tasks))}
                  for t, (w, p, a) in enumerate(zip(words, proprio, actions))]
        total += n
    for container, stream, _ in videos.values():
        container.mux(stream.encode())
        container.close()
    if not meta:
        raise ValueError('there are no episodes to write')
    schema = pa.schema([('observation.state', pa.list_(pa.float32())), ('action', pa.list_(pa.float32())),
                        ('timestamp', pa.float32()), *((k, pa.int64()) for k in (
                            'frame_index', 'episode_index', 'index', 'task_index'))])
    features = {k: dict(dtype='float32', shape=[len(table[0][k])], names=None) for k in ('observation.state', 'action')}
    axes = ['height', 'width', 'channels']
    features |= {f'observation.images.{k}': dict(dtype='video', shape=list(shape), names=axes)
                 for k, (_, _, shape) in videos.items()}
    features |= {f.name: dict(dtype=str(f.type).replace('float', 'float32'), shape=[1], names=None)
                 for f in list(schema)[2:]}
    for path, what in ((root / 'data/chunk-000/file-000.parquet', pa.Table.from_pylist(table, schema)),
                       (root / 'meta/episodes/chunk-000/file-000.parquet', pa.Table.from_pylist(meta)),
                       (root / 'meta/tasks.parquet', pa.table({'task_index': list(tasks.values()),
                                                               '__index_level_0__': list(tasks)}))):
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(what, path)
    (root / 'meta/info.json').write_text(json.dumps(dict(
        codebase_version='v3.0', robot_type=robot, total_episodes=len(meta), total_frames=total, total_tasks=len(tasks),
        chunks_size=1000, fps=fps, splits={'train': f'0:{len(meta)}'}, features=features,
        data_path='data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
        video_path='videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4'), indent=1))
    return len(meta)


def fail(message, code):
    print(f'prepare/lerobot.py: {message}', file=sys.stderr)
    sys.exit(code)


def main(s):
    if not s['data'] or not s['out']:
        fail('--data= and --out= are needed', 2)
    if min(s['action_steps'], s['episodes_per_shard'], s['fps']) < 1 or s['picture_format'] not in ('png', 'jpg'):
        fail('action_steps, episodes_per_shard and fps must be at least 1, picture_format png or jpg', 2)
    try:
        if s['export']:
            count = write_v3(s['out'], episodes_of(Folder(s['data'], '', s['cache_dir'])), s['fps'], s['crf'])
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
    fps = 10                    # of an export
    crf = 23                    # of an export's h264: 0 keeps every pixel
    cache_dir = CACHE
    main(configure(globals()))
