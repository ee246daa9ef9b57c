"""prepare/lerobot.py: tiny v2.1 and v3 data sets written here, lossless, and read to the last
pixel and bit."""
import io
import json
import re
import runpy

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import write_tar
from PIL import Image

from pictures import open_picture
from processor import fields
from robots import actions as robot_actions
from shards import Folder

lerobot = runpy.run_path(str(tiny.ROOT / 'prepare' / 'lerobot.py'))
LENGTHS, FPS, CAMERAS = (5, 9, 4), 10, ('front', 'wrist')


def episodes(cameras=CAMERAS):
    """(words, proprio, actions, pictures) of each episode."""
    for i, n in enumerate(LENGTHS):
        rng = np.random.default_rng(i)
        proprio = rng.standard_normal((n, 3)).astype(np.float32)
        actions = rng.standard_normal((n, 2)).astype(np.float32)
        pictures = {}
        for camera in cameras:
            pictures[camera] = list(rng.integers(0, 256, (n, 16, 32, 3), dtype=np.uint8))
        yield [f'do {i % 2}'] * n, proprio, actions, pictures


def write_video(path, frames):
    import av
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264rgb', rate=FPS, options={'crf': '0'})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], 'rgb24'
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        container.mux(stream.encode())


def write_set(root, version, cameras=CAMERAS):
    """A LeRobot data set in the words of its own documentation, written without the code under
    test."""
    features = {'action': dict(dtype='float32', shape=[2])}
    for camera in cameras:
        features[f'observation.images.{camera}'] = dict(dtype='video', shape=[16, 32, 3])
    info = dict(codebase_version=version, fps=FPS, chunks_size=2, features=features)

    # rows of steps and of episodes
    tables, meta, total = [], [], 0
    for i, (_, proprio, actions, _) in enumerate(episodes(cameras)):
        n = len(actions)
        tables.append(pa.table({
            'observation.state': proprio.tolist(), 'action': actions.tolist(),
            'episode_index': [i] * n, 'timestamp': (np.arange(n) / FPS).astype(np.float32),
            'frame_index': range(n), 'index': range(total, total + n), 'task_index': [i % 2] * n}))
        meta.append({'episode_index': i, 'length': n, 'tasks': [f'do {i % 2}'], 'begin': total})
        total += n

    (root / 'meta').mkdir(parents=True)
    if version == 'v3.0':
        info |= write_v3(root, tables, meta, cameras)
    else:
        info |= write_v2(root, tables, meta, cameras)
    (root / 'meta/info.json').write_text(json.dumps(info))
    return root


def write_v3(root, tables, meta, cameras):
    """Two files of rows, one of the frames of each camera; the paths in info.json."""
    rows = []
    for i, row in enumerate(meta):
        begin = row.pop('begin') / FPS
        rows.append(row | {'data/chunk_index': 0, 'data/file_index': i // 2})
        for key in (f'videos/observation.images.{camera}' for camera in cameras):
            rows[i] |= {f'{key}/chunk_index': 0, f'{key}/file_index': 1,
                        f'{key}/from_timestamp': begin}
    for folder in ('meta/episodes/chunk-000', 'data/chunk-000'):
        (root / folder).mkdir(parents=True)
    tasks = pa.table({'task_index': [1, 0], '__index_level_0__': ['do 1', 'do 0']})
    pq.write_table(tasks, root / 'meta/tasks.parquet')
    pq.write_table(pa.Table.from_pylist(rows), root / 'meta/episodes/chunk-000/file-000.parquet')
    for k in range(2):
        pair = pa.concat_tables(tables[2 * k:2 * k + 2])
        pq.write_table(pair, root / f'data/chunk-000/file-{k:03d}.parquet')

    for camera in cameras:
        path = root / f'videos/observation.images.{camera}/chunk-000/file-001.mp4'
        write_video(path, [x for *_, pictures in episodes(cameras) for x in pictures[camera]])
    name = 'chunk-{chunk_index:03d}/file-{file_index:03d}'
    return dict(data_path=f'data/{name}.parquet',
                video_path=f'videos/{{video_key}}/{name}.mp4')


def write_v2(root, tables, meta, cameras):
    """A file of rows, and of the frames of each camera, for each episode; the paths in
    info.json."""
    tasks = [json.dumps({'task_index': k, 'task': f'do {k}'}) + '\n' for k in range(2)]
    (root / 'meta/tasks.jsonl').write_text(''.join(tasks))
    rows = [{key: row[key] for key in ('episode_index', 'length', 'tasks')} for row in meta]
    lines = [json.dumps(row) + '\n' for row in rows]
    (root / 'meta/episodes.jsonl').write_text(''.join(lines))
    for i, (*_, pictures) in enumerate(episodes(cameras)):
        chunk = f'chunk-{i // 2:03d}'
        (root / 'data' / chunk).mkdir(parents=True, exist_ok=True)
        pq.write_table(tables[i], root / f'data/{chunk}/episode_{i:06d}.parquet')
        for camera in cameras:
            folder = root / f'videos/{chunk}/observation.images.{camera}'
            write_video(folder / f'episode_{i:06d}.mp4', pictures[camera])
    chunk, name = 'chunk-{episode_chunk:03d}', 'episode_{episode_index:06d}'
    return dict(data_path=f'data/{chunk}/{name}.parquet',
                video_path=f'videos/{chunk}/{{video_key}}/{name}.mp4')


def run(*args):
    return tiny.run('prepare/lerobot.py', *args)


def check(folder, cameras=CAMERAS, without=()):
    """Every frame and value of the shards is the source's."""
    n = 0
    for i, (words, proprio, actions, pictures) in enumerate(episodes(cameras)):
        if i in without:
            continue
        for t in range(len(actions)):
            shard = int(np.searchsorted(np.cumsum(folder.sizes), n, side='right'))
            members = folder.read(shard, n - int(folder.sizes[:shard].sum()))
            sample, low = fields(members), robot_actions.read(members)['lowdim']
            assert (sample['instruction'], sample['episode']) == (words[t], i)
            ahead = actions[t:t + 4]
            np.testing.assert_array_equal(low['actions'][~low['is_pad']][:4], ahead)
            np.testing.assert_array_equal(low['proprio'], proprio[t])
            assert sample['picture_names'] == sorted(cameras)
            for c, data in zip(sorted(cameras), sample['pictures']):
                np.testing.assert_array_equal(np.array(open_picture(data)), pictures[c][t])
            n += 1
    assert n == len(folder) > 0


@pytest.mark.parametrize('version', ['v2.1', 'v3.0'])
def test_every_frame_and_value(tmp_path, version):
    root = write_set(tmp_path / 'lerobot', version)
    done = run(f'--data={root}', f'--out={tmp_path}/out', '--action_steps=4',
               '--episodes_per_shard=2')
    assert done.code == 0, done.err
    assert '3 episodes, 18 steps, 0 broken' in done.out
    check(Folder(f'{tmp_path}/out'))


def test_there_and_back(tmp_path):
    """Shards to v3 to shards; the states alone, and with pictures."""
    for cameras in (CAMERAS, ()):
        here = tmp_path / f'cameras{len(cameras)}'
        root = write_set(here / 'lerobot', 'v2.1', cameras)
        for command in ([f'--data={root}', f'--out={here}/a'],
                        [f'--data={here}/a', f'--out={here}/v3', '--export=true', '--crf=0'],
                        [f'--data={here}/v3', f'--out={here}/b']):
            done = run(*command, '--action_steps=4', f'--cache_dir={here}/cache')
            assert done.code == 0, done.err
        for name in 'ab':
            check(Folder(f'{here}/{name}'), cameras)
        assert (here / 'a/00000000.tar').read_bytes() == (here / 'b/00000000.tar').read_bytes()
    again = run(f'--data={here}/a', f'--out={here}/v3', '--export=true')
    assert again.code == 1, 'it is there already'


@pytest.mark.parametrize('kind, size', [
    ('quaternion', 4), ('quaternion_xyzw', 4), ('axis_angle', 3)])
def test_rotations_become_6d_and_again_what_they_were(kind, size):
    """By hand: a quarter turn about z takes x to y and y to -x, its first two columns."""
    half = np.sqrt(0.5)
    turn = dict(quaternion=[half, 0, 0, half], quaternion_xyzw=[0, 0, half, half],
                axis_angle=[0, 0, np.pi / 2])[kind]
    rng = np.random.default_rng(0)
    before, between = rng.standard_normal((5, 2)), rng.standard_normal((5, 1))
    x = np.concatenate([before, [turn] * 5, between, [turn] * 5], 1).astype('f4')

    # two of a column; that of another column is not looked at
    places = [('action', 2, kind), ('action', 3 + size, kind), ('observation.state', 0, kind)]
    out = lerobot['turned'](x, places, 'action')
    assert out.shape == (5, 2 + 6 + 1 + 6) and out.dtype == np.float32
    np.testing.assert_allclose(out[:, 2:8], [[0, 1, 0, -1, 0, 0]] * 5, atol=1e-6)
    np.testing.assert_allclose(out[:, 9:], out[:, 2:8], atol=0)
    assert (out[:, [0, 1, 8]] == x[:, [0, 1, 2 + size]]).all()
    back = lerobot['turned'](out, places, 'action', back=True)
    np.testing.assert_allclose(back, x, atol=1e-6)
    with pytest.raises(ValueError, match='has 3 numbers'):
        lerobot['turned'](x[:, :3], places, 'action')
    assert lerobot['turned'](x, [], 'action') is x


def test_rotations_by_the_command(tmp_path):
    root = write_set(tmp_path / 'lerobot', 'v2.1', ())
    flags = "--rotations=[('observation.state', 0, 'axis_angle')]", f'--cache_dir={tmp_path}/cache'
    run(f'--data={root}', f'--out={tmp_path}/a', *flags).ok()
    run(f'--data={tmp_path}/a', f'--out={tmp_path}/v3', '--export=true', *flags).ok()
    run(f'--data={tmp_path}/v3', f'--out={tmp_path}/b', flags[1]).ok()
    turned, again = (Folder(f'{tmp_path}/{name}').read(0, 0)['lowdim.npy'] for name in 'ab')
    _, proprio, actions, _ = next(episodes(()))
    assert turned['proprio'].shape == (5, 6) and (turned['actions'] == actions).all()

    # angles below pi come back as they were, others as less than a half turn
    is_small = np.linalg.norm(proprio, axis=1) <= np.pi
    assert is_small.any()
    np.testing.assert_allclose(again['proprio'][is_small], proprio[is_small], atol=1e-5)
    wrong = run(f'--data={root}', f'--out={tmp_path}/c', "--rotations=[('action', 0, 'euler')]")
    wrong.refused('euler', 'axis_angle')


def test_what_is_exported_is_as_lerobot_reads_it(tmp_path):
    """pandas takes the sentences as the index of tasks.parquet, a state of one number is a number,
    and there are statistics."""
    words, actions = ['b', 'b', 'a'], np.arange(6, dtype=np.float32).reshape(3, 2)
    said, root = dict(fps=30, success=True), tmp_path / 'set'
    lerobot['write_v3'](root, [(words, actions[:, :1], actions, {}, said)] * 2)
    schema = pq.read_schema(root / 'meta/tasks.parquet')
    assert schema.pandas_metadata['index_columns'] == ['__index_level_0__']
    assert pq.read_table(root / 'meta/tasks.parquet').to_pylist() == [
        {'task_index': 0, '__index_level_0__': 'b'}, {'task_index': 1, '__index_level_0__': 'a'}]

    table = pq.read_table(root / 'data/chunk-000/file-000.parquet')
    assert table['observation.state'].to_pylist() == [0, 2, 4] * 2
    assert table['action'].to_pylist()[4] == [2, 3]
    ends = [False, False, True] * 2
    assert table['next.success'].to_pylist() == table['next.done'].to_pylist() == ends

    stats = json.loads((root / 'meta/stats.json').read_text())['action']
    assert stats['mean'] == [2, 3] and stats['count'] == [6]
    assert set(stats) == {'count', 'mean', 'std', 'min', 'max', 'q01', 'q99'}
    info = json.loads((root / 'meta/info.json').read_text())
    features = info['features']
    assert info['fps'] == 30
    assert features['observation.state'] == dict(dtype='float32', shape=[1], names=None)
    assert features['next.success']['dtype'] == 'bool' and features['index']['dtype'] == 'int64'
    with pytest.raises(ValueError, match='--fps='):
        lerobot['write_v3'](tmp_path / 'other', [(words, actions, actions, {}, {})])


def test_broken_episodes_are_named_and_left_out(tmp_path):
    root = write_set(tmp_path / 'lerobot', 'v2.1')
    video = root / 'videos/chunk-000/observation.images.wrist/episode_000001.mp4'
    write_video(video, [np.zeros((16, 32, 3), np.uint8)] * 6)           # three too few
    args = f'--data={root}', f'--out={tmp_path}/out', '--action_steps=4'
    done = run(*args)
    assert done.code == 1 and 'episode 1: ' in done.err and '1 broken' in done.out, done.err
    assert run(*args, '--skip_broken=true').code == 0
    check(Folder(f'{tmp_path}/out'), without=[1])

    # a video that is none, and rows that are too few
    video.write_bytes(b'no video')
    table = pq.read_table(root / 'data/chunk-001/episode_000002.parquet')
    pq.write_table(table.slice(1), root / 'data/chunk-001/episode_000002.parquet')
    done = run(*args, '--skip_broken=true')
    assert done.code == 0 and 'episode 1: ' in done.err and 'episode 2: ' in done.err
    check(Folder(f'{tmp_path}/out'), without=[1, 2])

    # a table that is cut, and one that is gone
    file = io.BytesIO()
    pq.write_table(table, file)
    (root / 'data/chunk-000/episode_000000.parquet').write_bytes(file.getvalue()[:-9])
    (root / 'data/chunk-001/episode_000002.parquet').unlink()
    done = run(*args)
    assert done.code == 1 and all(f'episode {i}: ' in done.err for i in range(3))


def test_shards_that_can_not_be_exported_are_named(tmp_path):
    """A picture that is none, and a camera that a step lacks."""
    png, low = io.BytesIO(), io.BytesIO()
    Image.new('RGB', (16, 16)).save(png, 'PNG')
    np.savez(low, proprio=np.zeros(2, 'f4'), actions=np.zeros((1, 2), 'f4'), is_pad=[False])
    front = {'json': b'{"fps": 10}', 'lowdim.npz': low.getvalue(), 'a.png': png.getvalue()}
    whole = front | {'b.png': png.getvalue()}

    lacking = "step 1 has cameras ['a'], those before ['a', 'b']"
    for name, last, message in (('broken', front | {'b.png': b'none'}, 'e-1: '),
                                ('absent', front, lacking)):
        folder = tmp_path / name
        folder.mkdir()
        write_tar(folder / '0.tar', [('e-0', whole), ('e-1', last)])
        done = run(f'--data={folder}', f'--out={folder}/v3', '--export=true',
                   f'--cache_dir={folder}/cache')
        assert done.code == 1 and done.err.count('\n') == 1 and message in done.err, done.err


def with_columns(root, columns, features):
    """Add columns {name: cell} to every row of a set of v2.1, and features to info.json."""
    for path in root.glob('data/*/*.parquet'):
        table = pq.read_table(path)
        for name, cell in columns.items():
            table = table.append_column(name, pa.array([cell] * len(table)))
        pq.write_table(table, path)
    info = json.loads((root / 'meta/info.json').read_text())
    info['features'] |= features
    (root / 'meta/info.json').write_text(json.dumps(info))
    return root


def encoded(array, form='PNG'):
    """A cell of LeRobot's."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, form)
    return dict(bytes=out.getvalue(), path='x')


def test_cameras_stay_apart_depth_does_not_become_one_and_columns_are_named(tmp_path):
    """Two wrists, one of them with transparent pixels; depth in 16 bits, in fractions, and as a
    film that says so; other columns."""
    views = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 4), dtype=np.uint8)
    distance = np.full((16, 16), 20_000, np.uint16)
    of = 'observation.images'
    images = {f'{of}.left.wrist': encoded(views[0, ..., :3]),
              f'{of}.right.Wrist': encoded(views[1]), f'{of}.front': encoded(views[0]),
              f'{of}.depth_front': encoded(distance),
              f'{of}.front.depth': encoded(distance.astype(np.float32), 'TIFF'),
              f'{of}.grey': encoded(distance)}
    features = {key: dict(dtype='image') for key in images}
    features[f'{of}.range'] = dict(dtype='video', info={'video.is_depth_map': True})
    features['next.reward'] = dict(dtype='float32')
    root = with_columns(write_set(tmp_path / 'set', 'v2.1', ()),
                        images | {'next.reward': 0.5, 'not_in_info': 1}, features)
    done = run(f'--data={root}', f'--out={tmp_path}/out').ok()
    line, = done.err.splitlines()
    assert line.endswith(f': columns left out: next.reward, not_in_info, {of}.depth_front, '
                         f'{of}.front.depth, {of}.range')

    members = Folder(f'{tmp_path}/out', '', str(tmp_path / 'cache')).read(0, 0)
    sample = fields(members)
    assert sample['picture_names'] == ['front', 'grey', 'left.wrist', 'right.wrist']
    front, grey, left, right = [np.array(open_picture(data)) for data in sample['pictures']]
    np.testing.assert_array_equal(left, views[0, ..., :3])
    assert (grey == 77).all()
    alpha = views[..., 3:] / 255
    on_white = views[..., :3] * alpha + 255 * (1 - alpha)
    assert abs(front - on_white[0]).max() <= 0.51 and abs(right - on_white[1]).max() <= 0.51


@pytest.mark.parametrize('names, said', [
    (('Wrist', 'wrist'), 'case of letters'), (('a/b',), 'has a /')])
def test_cameras_that_can_not_be_told_apart_are_refused(tmp_path, names, said):
    features = {f'observation.images.{name}': dict(dtype='image') for name in names}
    root = with_columns(write_set(tmp_path / 'set', 'v2.1', ()), {}, features)
    done = run(f'--data={root}', f'--out={tmp_path}/out')
    assert done.code == 1 and said in done.err and done.err.count('\n') == 1, done.err
    assert not (tmp_path / 'out').exists()


def test_names_of_cameras():
    def names(*keys):
        return list(lerobot['camera_names']({key: dict(dtype='video') for key in keys}).values())

    assert names('observation.images.front', 'observation.image') == ['front', 'image']
    assert names('o.a.wrist', 'o.b.wrist', 'o.top') == ['a.wrist', 'b.wrist', 'top']
    assert names('wrist', 'o.wrist') == ['wrist', 'o.wrist']


def test_what_would_be_another_picture_is_not_exported(tmp_path):
    """Depth, a camera that comes twice, pictures of another size."""
    low = io.BytesIO()
    np.savez(low, proprio=np.zeros(2, 'f4'), actions=np.zeros((1, 2), 'f4'), is_pad=[False])
    small, large = (encoded(np.zeros((side, side, 3), np.uint8))['bytes'] for side in (16, 32))
    depth = encoded(np.zeros((16, 16), np.uint16))['bytes']
    first = {'json': b'{"fps": 10}', 'lowdim.npz': low.getvalue(), 'a.png': small}
    for name, last, message in (('depth', first | {'depth.png': depth}, 'holds depth'),
                                ('twice', first | {'a.webp': small}, 'two pictures'),
                                ('size', first | {'a.png': large}, '(32, 32)')):
        folder = tmp_path / name
        folder.mkdir()
        write_tar(folder / '0.tar', [('e-0', first), ('e-1', last)])
        shards = Folder(str(folder), '', str(folder / 'cache'))
        with pytest.raises(ValueError, match=re.escape(message)):
            lerobot['write_v3'](folder / 'v3', lerobot['episodes_of'](shards, []))


def test_wrong_settings(tmp_path):
    data = f'--data={tmp_path}'
    for args, code, word in (([], 2, '--data'),
                             ([data, f'--out={tmp_path}/x'], 1, 'info.json'),
                             ([data, '--out=x', '--picture_format=gif'], 2, 'png')):
        done = run(*args)
        assert done.code == code and word in done.err and done.err.count('\n') == 1
