"""prepare/lerobot.py: tiny v2.1 and v3 data sets written here, lossless, and read to the last pixel and bit."""
import io
import json
import runpy

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import write_tar
from PIL import Image

import processor
from pictures import open_picture
from shards import Folder

lerobot = runpy.run_path(str(tiny.ROOT / 'prepare' / 'lerobot.py'))
LENGTHS, FPS, CAMERAS = (5, 9, 4), 10, ('front', 'wrist')


def episodes(cameras=CAMERAS):
    """(words, proprio, actions, pictures) of each episode."""
    for i, n in enumerate(LENGTHS):
        rng = np.random.default_rng(i)
        yield ([f'do {i % 2}'] * n, rng.standard_normal((n, 3)).astype(np.float32),
               rng.standard_normal((n, 2)).astype(np.float32),
               {c: list(rng.integers(0, 256, (n, 16, 32, 3), dtype=np.uint8)) for c in cameras})


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
    """A LeRobot data set in the words of its own documentation, written without the code under test."""
    info = dict(codebase_version=version, fps=FPS, chunks_size=2, features={
        f'observation.images.{c}': dict(dtype='video', shape=[16, 32, 3]) for c in cameras} | {
            'action': dict(dtype='float32', shape=[2])})
    tables, meta, total = [], [], 0
    for i, (_, proprio, actions, _) in enumerate(episodes(cameras)):
        n = len(actions)
        tables.append(pa.table({
            'observation.state': proprio.tolist(), 'action': actions.tolist(), 'episode_index': [i] * n,
            'timestamp': (np.arange(n) / FPS).astype(np.float32), 'frame_index': range(n),
            'index': range(total, total + n), 'task_index': [i % 2] * n}))
        meta.append({'episode_index': i, 'length': n, 'tasks': [f'do {i % 2}']})
        if version == 'v3.0':
            meta[i] |= {'data/chunk_index': 0, 'data/file_index': i // 2}      # two files of rows, one of frames
            for key in (f'videos/observation.images.{c}' for c in cameras):
                meta[i] |= {f'{key}/chunk_index': 0, f'{key}/file_index': 1, f'{key}/from_timestamp': total / FPS}
        total += n
    (root / 'meta').mkdir(parents=True)
    if version == 'v3.0':
        info |= dict(data_path='data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
                     video_path='videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4')
        pq.write_table(pa.table({'task_index': [1, 0], '__index_level_0__': ['do 1', 'do 0']}),
                       root / 'meta/tasks.parquet')
        (root / 'meta/episodes/chunk-000').mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(meta), root / 'meta/episodes/chunk-000/file-000.parquet')
        (root / 'data/chunk-000').mkdir(parents=True)
        for k in range(2):
            pq.write_table(pa.concat_tables(tables[2 * k:2 * k + 2]), root / f'data/chunk-000/file-{k:03d}.parquet')
        for c in cameras:
            write_video(root / f'videos/observation.images.{c}/chunk-000/file-001.mp4',
                        [frame for *_, pictures in episodes(cameras) for frame in pictures[c]])
    else:
        info |= dict(data_path='data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet',
                     video_path='videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4')
        (root / 'meta/tasks.jsonl').write_text(''.join(json.dumps({'task_index': k, 'task': f'do {k}'}) + '\n'
                                                       for k in range(2)))
        (root / 'meta/episodes.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in meta))
        for i, (*_, pictures) in enumerate(episodes(cameras)):
            (root / f'data/chunk-{i // 2:03d}').mkdir(parents=True, exist_ok=True)
            pq.write_table(tables[i], root / f'data/chunk-{i // 2:03d}/episode_{i:06d}.parquet')
            for c in cameras:
                write_video(root / f'videos/chunk-{i // 2:03d}/observation.images.{c}/episode_{i:06d}.mp4', pictures[c])
    (root / 'meta/info.json').write_text(json.dumps(info))
    return root


def run(*args):
    return tiny.run('prepare/lerobot.py', *args)


def check(folder, cameras=CAMERAS, without=()):
    """Every frame and value of the shards is the source's."""
    n = 0
    for i, (words, proprio, actions, pictures) in enumerate(episodes(cameras)):
        for t in range(len(actions) if i not in without else 0):
            shard = int(np.searchsorted(np.cumsum(folder.sizes), n, side='right'))
            members = folder.read(shard, n - int(folder.sizes[:shard].sum()))
            sample = processor.fields(members, lowdim=True)
            assert (sample['instruction'], sample['episode']) == (words[t], i)
            ahead, low = actions[t:t + 4], sample['lowdim']
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
    done = run(f'--data={root}', f'--out={tmp_path}/out', '--action_steps=4', '--episodes_per_shard=2')
    assert done.code == 0, done.err
    assert '3 episodes, 18 steps, 0 broken' in done.out
    check(Folder(f'{tmp_path}/out'))


def test_there_and_back(tmp_path):
    """Shards to v3 to shards; the states alone, and with pictures."""
    for cameras in (CAMERAS, ()):
        here = tmp_path / f'cameras{len(cameras)}'
        root = write_set(here / 'lerobot', 'v2.1', cameras)
        for command in ([f'--data={root}', f'--out={here}/a'], [f'--data={here}/a', f'--out={here}/v3', '--export=true',
                        '--crf=0'], [f'--data={here}/v3', f'--out={here}/b']):
            done = run(*command, '--action_steps=4', f'--cache_dir={here}/cache')
            assert done.code == 0, done.err
        for name in 'ab':
            check(Folder(f'{here}/{name}'), cameras)
        assert (here / 'a/00000000.tar').read_bytes() == (here / 'b/00000000.tar').read_bytes()
    assert run(f'--data={here}/a', f'--out={here}/v3', '--export=true').code == 1, 'it is there already'


@pytest.mark.parametrize('kind, size', [('quaternion', 4), ('quaternion_xyzw', 4), ('axis_angle', 3)])
def test_rotations_become_6d_and_again_what_they_were(kind, size):
    """By hand: a quarter turn about z takes x to y and y to -x, its first two columns."""
    half = np.sqrt(0.5)
    one = dict(quaternion=[half, 0, 0, half], quaternion_xyzw=[0, 0, half, half], axis_angle=[0, 0, np.pi / 2])[kind]
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((5, 2)), [one] * 5, rng.standard_normal((5, 1)), [one] * 5], 1).astype('f4')
    places = [('action', 2, kind), ('action', 3 + size, kind), ('observation.state', 0, kind)]
    out = lerobot['turned'](x, places, 'action')
    assert out.shape == (5, 2 + 6 + 1 + 6) and out.dtype == np.float32
    np.testing.assert_allclose(out[:, 2:8], [[0, 1, 0, -1, 0, 0]] * 5, atol=1e-6)
    np.testing.assert_allclose(out[:, 9:], out[:, 2:8], atol=0)
    assert (out[:, [0, 1, 8]] == x[:, [0, 1, 2 + size]]).all()
    np.testing.assert_allclose(lerobot['turned'](out, places, 'action', back=True), x, atol=1e-6)
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
    same = proprio * np.minimum(1, np.pi / np.linalg.norm(proprio, axis=1, keepdims=True)) == proprio     # below pi
    np.testing.assert_allclose(np.where(same, again['proprio'], 0), np.where(same, proprio, 0), atol=1e-5)
    assert same.any()
    run(f'--data={root}', f'--out={tmp_path}/c', "--rotations=[('action', 0, 'euler')]").refused('euler', 'axis_angle')


def test_what_is_exported_is_as_lerobot_reads_it(tmp_path):
    """pandas takes the sentences as the index of tasks.parquet, a state of one number is a number, and there are
    statistics."""
    words, actions = ['b', 'b', 'a'], np.arange(6, dtype=np.float32).reshape(3, 2)
    said = dict(fps=30, success=True)
    lerobot['write_v3'](tmp_path / 'set', [(words, actions[:, :1], actions, {}, said)] * 2)
    schema = pq.read_schema(tmp_path / 'set/meta/tasks.parquet')
    assert schema.pandas_metadata['index_columns'] == ['__index_level_0__']
    assert pq.read_table(tmp_path / 'set/meta/tasks.parquet').to_pylist() == [
        {'task_index': 0, '__index_level_0__': 'b'}, {'task_index': 1, '__index_level_0__': 'a'}]
    table = pq.read_table(tmp_path / 'set/data/chunk-000/file-000.parquet')
    assert table['observation.state'].to_pylist() == [0, 2, 4] * 2 and table['action'].to_pylist()[4] == [2, 3]
    assert table['next.success'].to_pylist() == table['next.done'].to_pylist() == [False, False, True] * 2
    stats = json.loads((tmp_path / 'set/meta/stats.json').read_text())
    assert stats['action']['mean'] == [2, 3] and stats['action']['count'] == [6] and set(stats['action']) == {
        'count', 'mean', 'std', 'min', 'max', 'q01', 'q99'}
    info = json.loads((tmp_path / 'set/meta/info.json').read_text())
    assert info['fps'] == 30 and info['features']['observation.state'] == dict(dtype='float32', shape=[1], names=None)
    assert info['features']['next.success']['dtype'] == 'bool' and info['features']['index']['dtype'] == 'int64'
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
    video.write_bytes(b'no video')
    table = pq.read_table(root / 'data/chunk-001/episode_000002.parquet')
    pq.write_table(table.slice(1), root / 'data/chunk-001/episode_000002.parquet')
    done = run(*args, '--skip_broken=true')
    assert done.code == 0 and 'episode 1: ' in done.err and 'episode 2: ' in done.err
    check(Folder(f'{tmp_path}/out'), without=[1, 2])
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


def test_wrong_settings(tmp_path):
    for args, code, word in (([], 2, '--data'), ([f'--data={tmp_path}', f'--out={tmp_path}/x'], 1, 'info.json'),
                             ([f'--data={tmp_path}', '--out=x', '--picture_format=gif'], 2, 'png')):
        done = run(*args)
        assert done.code == code and word in done.err and done.err.count('\n') == 1
