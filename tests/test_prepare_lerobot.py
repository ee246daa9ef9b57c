"""prepare/lerobot.py: tiny v2.1 and v3 data sets written here, lossless, and read to the last pixel and bit."""
import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

import processor
from processor import open_picture
from shards import Folder

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
    return subprocess.run([sys.executable, str(ROOT / 'prepare' / 'lerobot.py'), *args], check=False, text=True,
                          capture_output=True, timeout=100)


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
    assert done.returncode == 0, done.stderr
    assert '3 episodes, 18 steps, 0 broken' in done.stdout
    check(Folder(f'{tmp_path}/out'))


def test_there_and_back(tmp_path):
    """Shards to v3 to shards; the states alone, and with pictures."""
    for cameras in (CAMERAS, ()):
        here = tmp_path / f'cameras{len(cameras)}'
        root = write_set(here / 'lerobot', 'v2.1', cameras)
        for command in ([f'--data={root}', f'--out={here}/a'], [f'--data={here}/a', f'--out={here}/v3', '--export=true',
                        f'--fps={FPS}', '--crf=0'], [f'--data={here}/v3', f'--out={here}/b']):
            done = run(*command, '--action_steps=4', f'--cache_dir={here}/cache')
            assert done.returncode == 0, done.stderr
        for name in 'ab':
            check(Folder(f'{here}/{name}'), cameras)
        assert (here / 'a/00000000.tar').read_bytes() == (here / 'b/00000000.tar').read_bytes()
    assert run(f'--data={here}/a', f'--out={here}/v3', '--export=true').returncode == 1, 'it is there already'


def test_broken_episodes_are_named_and_left_out(tmp_path):
    root = write_set(tmp_path / 'lerobot', 'v2.1')
    video = root / 'videos/chunk-000/observation.images.wrist/episode_000001.mp4'
    write_video(video, [np.zeros((16, 32, 3), np.uint8)] * 6)           # three too few
    args = f'--data={root}', f'--out={tmp_path}/out', '--action_steps=4'
    done = run(*args)
    assert done.returncode == 1 and 'episode 1: ' in done.stderr and '1 broken' in done.stdout, done.stderr
    assert run(*args, '--skip_broken=true').returncode == 0
    check(Folder(f'{tmp_path}/out'), without=[1])
    video.write_bytes(b'no video')
    table = pq.read_table(root / 'data/chunk-001/episode_000002.parquet')
    pq.write_table(table.slice(1), root / 'data/chunk-001/episode_000002.parquet')
    done = run(*args, '--skip_broken=true')
    assert done.returncode == 0 and 'episode 1: ' in done.stderr and 'episode 2: ' in done.stderr
    check(Folder(f'{tmp_path}/out'), without=[1, 2])
    file = io.BytesIO()
    pq.write_table(table, file)
    (root / 'data/chunk-000/episode_000000.parquet').write_bytes(file.getvalue()[:-9])
    (root / 'data/chunk-001/episode_000002.parquet').unlink()
    done = run(*args)
    assert done.returncode == 1 and all(f'episode {i}: ' in done.stderr for i in range(3))


def test_wrong_settings(tmp_path):
    for args, code, word in (([], 2, '--data'), ([f'--data={tmp_path}', f'--out={tmp_path}/x'], 1, 'info.json'),
                             ([f'--data={tmp_path}', '--out=x', '--picture_format=gif'], 2, 'png')):
        done = run(*args)
        assert done.returncode == code and word in done.stderr and done.stderr.count('\n') == 1
