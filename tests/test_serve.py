"""serve.py: the server with a policy that is known, asked by the client that README.md prints; and sample.py, which
rolls out a policy in PushT, records it, and serves it: bit for bit the same actions."""
import http.client
import io
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny

import envs
import serve
from processor import fields as fields_of
from processor import open_picture
from shards import Folder

FIELDS = {'proprio': ('float32', (3,)), 'near': ('uint8', (4, 4, 3)), 'instruction': ('str', ()), 'seed': ('int64', ()),
          'step': ('int64', ())}
SEEN = dict(proprio=np.arange(3, dtype=np.float32), near=np.zeros((4, 4, 3), np.uint8), instruction='go', step=7)


def client():
    code, = (c for c in re.findall(r'```python\n(.*?)```', (tiny.ROOT / 'README.md').read_text(), re.S) if 'Robot' in c)
    assert code.count('\n') <= 30
    exec(code, names := {})
    return names['Robot']


Robot = client()


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def plain(seen):
    """(N, 2, 3): the state, and seed and step and the sentence's length."""
    return np.stack([[o['proprio'], [o['seed'], o['step'], len(o['instruction'])]] for o in seen])


class Running:
    """A server in a thread."""

    def __init__(self, act=plain, **settings):
        self.server = serve.Server(act, FIELDS, 0, **settings)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        tiny.wait_until(lambda: socket.socket().connect_ex(('127.0.0.1', self.port)) == 0)
        return self

    def __exit__(self, *_):
        self.server.end()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def robot(self):
        return Robot('127.0.0.1', self.port)

    def health(self):
        with urllib.request.urlopen(f'http://127.0.0.1:{self.port}/health', timeout=10) as answer:
            return json.load(answer)


@pytest.fixture(scope='module')
def running():
    with Running() as it:
        yield it


def test_answers_and_health(running):
    robot = running.robot()
    for step in range(3):
        given = robot.act(**SEEN | dict(step=step, seed=2))
        assert given.dtype == np.float32 and given.tolist() == [[0, 1, 2], [2, step, 2]]
    assert robot.act(proprio=[1, 2, 3], near=SEEN['near']).tolist() == [[1, 2, 3], [0, 0, 0]], 'what is optional'
    told = running.health()
    assert told['ready'] and told['actions'] == dict(dtype='float32', shape=[2, 3]) and told['robots'] == 1
    assert told['observation'].keys() == FIELDS.keys() and told['observation']['near'] == dict(
        dtype='uint8', shape=[4, 4, 3], optional=False)
    robot.http.close()
    tiny.wait_until(lambda: running.health()['robots'] == 0)


@pytest.mark.parametrize('change, words', [
    (dict(proprio=np.zeros(4)), ('proprio', 'float32 (3,)', 'float64 (4,)')),
    (dict(proprio=None), ('proprio', 'float32 (3,)', 'nothing', 'near')),
    (dict(proprio=np.array([0, np.nan, 0])), ('proprio', 'finite', 'nan', '[1]')),
    (dict(proprio=np.array([0, 1e300, 0])), ('proprio', 'finite', 'inf')),
    (dict(proprio=np.array(['a', 'b', 'c'])), ('proprio', 'str (3,)')),
    (dict(near=None), ('near', 'uint8 (4, 4, 3)', 'nothing')),
    (dict(near=np.zeros((480, 640, 3), np.uint8)), ('near', '(4, 4, 3)', '(480, 640, 3)')),
    (dict(near=np.zeros((4, 4, 3), np.uint16)), ('near', 'uint8', 'uint16')),
    (dict(far=0), ("'far'", 'unknown', 'near')),
    (dict(step=-1), ('step', '-1')), (dict(step=1.5), ('step', 'int64', 'float64')),
    (dict(seed=2 ** 40), ('seed', str(2 ** 40))), (dict(step=np.zeros(2, int)), ('step', '(2,)')),
    (dict(instruction='x' * 5000), ('instruction', '4096', '5000')), (dict(instruction=3), ('instruction', 'str')),
])
def test_what_is_wrong_is_said_by_its_name(running, change, words):
    robot, seen = running.robot(), {k: v for k, v in (SEEN | change).items() if v is not None}
    with pytest.raises(RuntimeError, match='400') as error:
        robot.act(**seen)
    assert all(word in str(error.value) for word in words) and str(error.value).count('\n') == 1, error.value
    assert robot.act(**SEEN)[1].tolist() == [0, 7, 2], 'the connection goes on'


class Bomb:
    def __reduce__(self):
        return print, ('it was unpickled',)


def raw(port, data, end=False):
    """What a socket hears that sends `data`."""
    with socket.create_connection(('127.0.0.1', port), timeout=10) as s:
        s.sendall(data)
        if end:
            s.shutdown(socket.SHUT_WR)
        return s.makefile('rb').read()


def test_bodies_that_are_none(running, capfd):
    pickled, zipped = io.BytesIO(), io.BytesIO()
    np.savez(pickled, **SEEN | dict(proprio=np.array([Bomb()] * 3)))
    with zipfile.ZipFile(zipped, 'w', zipfile.ZIP_DEFLATED) as z:       # 50 MB in 50 kB
        z.writestr('proprio.npy', bytes(50_000_000))
    connection = http.client.HTTPConnection('127.0.0.1', running.port, timeout=10)
    for body, status, word in ((pickled.getvalue(), 400, 'proprio'), (zipped.getvalue(), 400, 'unpacks to 50000000'),
                               (b'{}', 400, 'npz'), (b'', 400, 'npz'), (pickled.getvalue()[:-9], 400, 'npz'),
                               (bytes(serve.limit(FIELDS) + 1), 413, str(serve.limit(FIELDS)))):
        connection.request('POST', '/act', body)
        answer = connection.getresponse()
        assert (answer.status, word in answer.read().decode()) == (status, True), (status, word)
    connection.request('GET', '/other')
    assert connection.getresponse().status == 404
    head = b'POST /act HTTP/1.1\r\nHost: x\r\n'
    assert b' 411 ' in raw(running.port, head + b'\r\n') and b' 411 ' in raw(
        running.port, head + b'Transfer-Encoding: chunked\r\n\r\n')
    assert b' 411 ' in raw(running.port, head + b'Content-Length: -5\r\n\r\n')
    assert raw(running.port, head + b'Content-Length: 99\r\n\r\nhalf', end=True) == b'', 'it hung up'
    assert running.robot().act(**SEEN).shape == (2, 3)
    out, err = capfd.readouterr()
    assert 'unpickled' not in out + err and not err


def test_robots_that_come_together_are_one_batch():
    sizes = []

    def act(seen):
        sizes.append(len(seen))
        return plain(seen)

    with Running(act, wait=0.0) as running, ThreadPoolExecutor(4) as pool:
        robots = [running.robot() for _ in range(4)]
        for robot in robots:
            robot.act(**SEEN)           # from here on it is known, and waited for
        running.server.wait = 20.0
        sizes.clear()
        given = [*pool.map(lambda i: robots[i].act(**SEEN | dict(step=i)), range(4))]
        assert sizes == [4] and [actions[1, 1] for actions in given] == [0, 1, 2, 3], 'to each its own'
        began = time.monotonic()
        for robot in robots[1:]:
            robot.http.close()
        tiny.wait_until(lambda: running.server.robots == 1)
        robots[0].act(**SEEN)
        assert time.monotonic() - began < 15, 'nobody waits for who is gone'


def test_an_error_is_told_to_the_one_who_caused_it():
    def act(seen):
        if any(o['seed'] == 1 for o in seen):
            raise KeyError('seed 1')
        return np.where(plain(seen) == 13, np.nan, plain(seen))

    with Running(act, wait=0.2) as running, ThreadPoolExecutor(3) as pool:
        def ask(seed, step):
            try:
                return running.robot().act(**SEEN | dict(seed=seed, step=step))[1, 1]
            except RuntimeError as error:
                return str(error)
        for _ in range(2):
            right, raised, not_finite = pool.map(ask, (0, 1, 0), (5, 0, 13))
            assert right == 5 and '500 KeyError' in raised and 'not finite' in not_finite


def test_who_waits_too_long_and_who_is_too_many():
    go, begun = threading.Event(), threading.Event()

    def act(seen):
        if seen[0]['instruction'] != 'warm up':
            begun.set()
            go.wait(20)
        return plain(seen)

    with Running(act, wait=0.0, most_waiting=2, timeout=0.3) as running, ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.robot().act, **SEEN)
        assert begun.wait(10)
        with pytest.raises(RuntimeError, match='503 no answer within 0.3 s'):
            running.robot().act(**SEEN)
        with pytest.raises(RuntimeError, match='503 no answer'):
            first.result()
        running.server.patience = 20
        two = [pool.submit(running.robot().act, **SEEN | dict(step=i)) for i in range(2)]
        tiny.wait_until(lambda: running.server.queue.qsize() == 3)
        with pytest.raises(RuntimeError, match='503 2 requests wait'):
            running.robot().act(**SEEN)
        go.set()
        assert [f.result()[1, 1] for f in two] == [0, 1]
        assert running.health()['answered'] == 2 and running.health()['refused'] == 3
        running.server.patience = 0.2
        assert b' 408 ' in raw(running.port, b'POST /act HTTP/1.1\r\nContent-Length: 99\r\n\r\nhalf')


def test_the_end_finishes_the_batch_at_hand():
    begun = threading.Event()

    def act(seen):
        if seen[0]['instruction'] != 'warm up':
            begun.set()
            time.sleep(0.3)
        return plain(seen)

    with Running(act, wait=0.0) as running, ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.robot().act, **SEEN)
        assert begun.wait(10)
        second = pool.submit(running.robot().act, **SEEN)
        tiny.wait_until(lambda: running.server.queue.qsize() == 1)
        running.server.end()
        assert first.result().shape == (2, 3)
        with pytest.raises(RuntimeError, match='503 the server ends'):
            second.result()


# ----------------------------------------------------------------------------------------------------------------------
# sample.py: a policy with random weights in PushT


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """pusht: steps of random numbers with a picture."""
    import webdataset
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    (folder / 'pusht').mkdir()
    proprio, actions = (rng.uniform(0, 512, (12, n)).astype(np.float32) for n in (5, 2))
    with webdataset.TarWriter(str(folder / 'pusht' / '0.tar'), encoder=False) as tar:
        for key, members in envs.samples('e', proprio, actions, dict(top=[np.zeros((16, 16, 3), np.uint8)] * 12), {},
                                         [dict(instruction='push')] * 12, 4):
            tar.write({'__key__': key, **members})
    tiny.run('prepare/stats.py', f'--data={folder / "pusht"}', f'--cache_dir={folder / "cache"}').ok()
    return folder


def train(data_dir, out_dir, mix='pusht', task='policy'):
    return tiny.run('train.py', *tiny.MODEL, '--device=cpu', f'--task={task}', '--lanes=8', '--window=4', '--workers=0',
                    '--batch_size=4', '--seq_len=64', '--max_steps=1', '--action_steps=4', '--action_dim=2',
                    '--proprio_dim=5', '--cameras=["top"]', '--policy.encoder=vlm', '--policy.width=32',
                    '--policy.mlp_dim=32', '--policy.num_heads=2', '--policy.depth=1', '--vla.width=32',
                    f'--mix={{"{mix}": 1.0}}', f'--data_dir={data_dir}', f'--out_dir={out_dir}').ok()


@pytest.fixture(scope='module')
def rolled(data_dir, tmp_path_factory):
    """(run, the folder of two recorded episodes)."""
    pytest.importorskip('gym_pusht')
    folder = tmp_path_factory.mktemp('rolled')
    train(data_dir, folder / 'run')
    flags = [f'--out_dir={folder / "run"}', '--env=pusht', '--episodes=2', '--device=cpu', '--execute=4',
             '--sample_steps=2', '--processes=1', '--batch_size=1', '--json=true']
    result = tiny.run('sample.py', *flags, f'--record={data_dir / "rolled"}', f'--film={folder / "a.mp4"}').ok()
    row, = map(json.loads, result.out.splitlines())
    assert row['policy'] == 'policy' and row['tasks'].keys() == {'pusht'} and row['episodes'] == 2
    tiny.run('sample.py', *flags, f'--record={data_dir / "rolled"}').refused('rolled', 'already')
    return folder / 'run', data_dir / 'rolled'


def recorded(folder):
    """A list of samples' fields."""
    folder = Folder(str(folder))
    return [fields_of(folder.read(shard, i), lowdim=True) for shard in range(len(folder.sizes))
            for i in range(folder.sizes[shard])]


def test_what_is_recorded_happened(rolled):
    import av
    rows = recorded(rolled[1])
    env, seen = envs.make('pusht', 16), None
    for row in rows:
        if row['frame'] == 0:
            seen = env.reset(row['seed'])
        assert (seen['proprio'] == row['lowdim']['proprio']).all() and row['instruction'] == seen['instruction']
        assert (seen['pictures']['top'] == np.array(open_picture(row['pictures'][0]))).all()
        assert row['success'] is False and row['task'] == 'pusht' and row['fps'] == 10
        if row['frame'] % 50 == 0:
            for k in range(1, 4):           # the chunk is what was done next
                assert (row['lowdim']['actions'][k] == rows[rows.index(row) + k]['lowdim']['actions'][0]).all()
        seen, _ = env.step(row['lowdim']['actions'][0])
    env.close()
    assert [row['seed'] for row in rows if row['frame'] == 0] == [envs.TEST_SEED, envs.TEST_SEED + 1]
    with av.open(str(rolled[0].parent / 'a_pusht.mp4')) as film:
        frames = [frame.to_ndarray(format='rgb24') for frame in film.decode(film.streams.video[0])]
    assert len(frames) == 301 and frames[0].shape == (16, 16, 3)
    assert abs(frames[0].astype(int) - np.array(open_picture(rows[0]['pictures'][0]))).mean() < 16


def test_a_vla_learns_from_what_is_recorded_and_acts(rolled, data_dir, tmp_path):
    tiny.run('prepare/stats.py', f'--data={rolled[1]}', f'--cache_dir={tmp_path / "cache"}').ok()
    train(data_dir, tmp_path / 'run', 'rolled', 'vla')
    assert tiny.rows(tmp_path / 'run')[0]['bad_samples'] == 0
    acted = tiny.run('sample.py', f'--out_dir={tmp_path / "run"}', '--env=pusht', '--episodes=1', '--device=cpu',
                     '--execute=4', '--sample_steps=1', '--processes=1', '--json=true').ok()
    assert json.loads(acted.out)['tasks'].keys() == {'pusht'}


def test_rollouts_to_lerobot_and_back(rolled, tmp_path):
    """Every value, pixel, sentence and success."""
    flags = ['--action_steps=4', f'--cache_dir={tmp_path}/cache']
    there = f'--data={rolled[1]}', f'--out={tmp_path}/v3', '--export=true', '--crf=0'
    tiny.run('prepare/lerobot.py', *there, *flags).ok()
    info = json.loads((tmp_path / 'v3/meta/info.json').read_text())
    assert info['fps'] == 10 and info['total_episodes'] == 2 and info['features']['next.success']['dtype'] == 'bool'
    tiny.run('prepare/lerobot.py', f'--data={tmp_path}/v3', f'--out={tmp_path}/back', *flags).ok()
    for a, b in zip(recorded(rolled[1]), recorded(tmp_path / 'back'), strict=True):
        for key in ('actions', 'is_pad', 'proprio'):
            np.testing.assert_array_equal(a['lowdim'][key], b['lowdim'][key])
        assert all((np.array(open_picture(x)) == np.array(open_picture(y))).all() for x, y in zip(
            a['pictures'], b['pictures'], strict=True))
        assert all(a[key] == b[key] for key in ('instruction', 'frame', 'success', 'fps', 'picture_names'))


def test_sample_serves_what_it_acts(rolled):
    run, folder = rolled
    port = free_port()
    flags = [f'--out_dir={run}', '--device=cpu', '--sample_steps=2', f'--serve_policy={port}']
    process = tiny.Process('sample.py', flags)
    tiny.wait_until(lambda: 'ready' in open(process.files[0]).read(), process)
    robot = Robot('127.0.0.1', port)
    for row in recorded(folder)[:600:4][:20]:
        seen = dict(proprio=row['lowdim']['proprio'], top=np.array(open_picture(row['pictures'][0])),
                    instruction=row['instruction'], seed=row['seed'], step=row['frame'])
        given = robot.act(**seen)
        assert (np.clip(given, 0, 512) == row['lowdim']['actions']).all(), 'bit for bit'
    assert not (robot.act(**seen | dict(step=99)) == given).any() and (robot.act(**seen) == given).all()
    for change, word in ((dict(top=seen['top'][:8]), r'top: expected uint8 \(16, 16, 3\), got uint8 \(8, 16, 3\)'),
                         (dict(proprio=np.zeros(39)), r'proprio: expected float32 \(5,\)')):
        with pytest.raises(RuntimeError, match=word):
            robot.act(**seen | change)
    with ThreadPoolExecutor(4) as pool:         # together with others: to rounding
        for other in pool.map(lambda _: Robot('127.0.0.1', port).act(**seen), range(8)):
            np.testing.assert_allclose(other, given, rtol=1e-4, atol=1e-2)
    taken = tiny.Process('sample.py', flags, real=True).wait()
    os.kill(process.pid, signal.SIGTERM)
    process.wait(20).ok()
    taken.refused(f'--serve_policy={port}', 'in use', code=1)


def test_wrong_settings(rolled):
    run = f'--out_dir={rolled[0]}'
    tiny.run('sample.py', run, '--serve_policy=99999').refused('99999', 'port')
    tiny.run('sample.py', run, '--env=metaworld').refused('metaworld', '39', '5')
    tiny.run('sample.py', run, '--env=pusht', '--tasks=reach').refused("'reach'", 'pusht')
