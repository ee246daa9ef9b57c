"""serve/server.py: the server with a policy that is known, asked by the client that README.md
prints; and sample.py, which rolls out a policy in PushT, records it, and serves it: bit for bit
the same actions."""
import http.client
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from pictures import open_picture
from processor import fields
from robots import acting, actions, record, simulators
from shards import Folder

pytest.importorskip('aiohttp')
from serve import server  # noqa: E402

# A robot of three numbers and one camera.
FIELDS = {
    'proprio': ('float32', (3,), False),
    'near': ('uint8', (4, 4, 3), False),
    'instruction': ('str', (), True),
    'seed': ('int64', (), True),
    'step': ('int64', (), True)}
SEEN = dict(proprio=np.arange(3, dtype=np.float32), near=np.zeros((4, 4, 3), np.uint8),
            instruction='go', step=7)


def client():
    """The class Robot of README.md."""
    text = (tiny.ROOT / 'docs' / 'robots.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', text, re.S)
    code, = (block for block in blocks if 'Robot' in block)

    # Short enough to be copied.
    assert code.count('\n') <= 30
    exec(code, names := {})
    return names['Robot']


Robot = client()


def free_port():
    """One that nobody listens at, for a moment."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def plain(seen):
    """A policy, (N, 2, 3): the state; the seed, the step and the sentence's length."""
    return np.stack([[o['proprio'], [o['seed'], o['step'], len(o['instruction'])]] for o in seen])


def without_nones(seen):
    """An observation less what is None."""
    return {name: value for name, value in seen.items() if value is not None}


class Running:
    """A server in a thread."""

    def __init__(self, act=plain, **settings):
        self.server = server.Server(act, FIELDS, 0, **settings)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        # It listens when it is warm.
        self.thread.start()
        address = '127.0.0.1', self.port
        tiny.wait_until(lambda: socket.socket().connect_ex(address) == 0)
        return self

    def __exit__(self, *_):
        # As SIGTERM ends it.
        self.server.end()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def robot(self):
        """A connection of its own."""
        return Robot('127.0.0.1', self.port)

    def health(self):
        """What the server says of itself."""
        with urllib.request.urlopen(f'http://127.0.0.1:{self.port}/health', timeout=10) as answer:
            return json.load(answer)


@pytest.fixture(scope='module')
def running():
    """One for all tests that leave it as it was."""
    with Running() as it:
        yield it


def test_answers_and_health(running):
    robot = running.robot()
    for step in range(3):
        given = robot.act(**SEEN | dict(step=step, seed=2))
        assert given.dtype == np.float32 and given.tolist() == [[0, 1, 2], [2, step, 2]]

    # What is optional is empty or 0.
    given = robot.act(proprio=[1, 2, 3], near=SEEN['near'])
    assert given.tolist() == [[1, 2, 3], [0, 0, 0]]

    # Enough to write a client from.
    told = running.health()
    assert told['ready'] and told['robots'] == 1
    assert told['actions'] == dict(dtype='float32', shape=[2, 3])
    assert told['observation'].keys() == FIELDS.keys()
    assert told['observation']['near'] == dict(dtype='uint8', shape=[4, 4, 3], optional=False)

    # Who has hung up is not waited for.
    robot.http.close()
    tiny.wait_until(lambda: running.health()['robots'] == 0)


@pytest.mark.parametrize('change, words', [
    # shapes, dtypes and values of numbers
    (dict(proprio=np.zeros(4)), ('proprio', 'float32 (3,)', 'float64 (4,)')),
    (dict(proprio=None), ('proprio', 'float32 (3,)', 'nothing', 'near')),
    (dict(proprio=np.array([0, np.nan, 0])), ('proprio', 'finite', 'nan', '[1]')),
    (dict(proprio=np.array([0, 1e300, 0])), ('proprio', 'finite', 'inf')),
    (dict(proprio=np.array([0, -np.inf, 0])), ('proprio', 'finite', '-inf', '[1]')),
    (dict(proprio=np.array([1e30, 0, 0])), ('proprio', '1e+09', '1e+30', '[0]')),
    (dict(proprio=np.array(['a', 'b', 'c'])), ('proprio', 'str (3,)')),
    (dict(proprio=np.zeros(3, complex)), ('proprio', 'complex128')),
    # of pictures
    (dict(near=None), ('near', 'uint8 (4, 4, 3)', 'nothing')),
    (dict(near=np.zeros((480, 640, 3), np.uint8)), ('near', '(4, 4, 3)', '(480, 640, 3)')),
    (dict(near=np.zeros((4, 4, 3), np.uint16)), ('near', 'uint8', 'uint16')),
    (dict(far=0), ("'far'", 'unknown', 'near')),
    # of whole numbers
    (dict(step=-1), ('step', '-1')),
    (dict(step=1.5), ('step', 'int64', 'float64')),
    (dict(seed=2 ** 31), ('seed', str(2 ** 31))),
    (dict(seed=2 ** 40), ('seed', str(2 ** 40))),
    (dict(step=np.zeros(2, int)), ('step', '(2,)')),
    # of texts
    (dict(instruction='x' * 5000), ('instruction', '4096', '5000')),
    (dict(instruction=3), ('instruction', 'str')),
    (dict(instruction='\ud800'), ('instruction', 'no text', 'surrogates')),
    (dict(instruction=np.frombuffer(b'\0\0\x7f\0', '<U1').reshape(())),
     ('instruction', 'no text')),
    ({'a\nb': 1}, ('unknown', "'a\\nb'")),
])
def test_what_is_wrong_is_said_by_its_name(running, change, words):
    # One line, with the name, what was expected and what came.
    robot = running.robot()
    with pytest.raises(RuntimeError, match='400') as error:
        robot.act(**without_nones(SEEN | change))
    said = str(error.value)
    assert all(word in said for word in words) and said.count('\n') == 1, said
    assert robot.act(**SEEN)[1].tolist() == [0, 7, 2], 'the connection goes on'


class Bomb:
    """Pickled, it prints when it is read."""

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
    # Code that would run if it were unpickled.
    pickled, zipped = io.BytesIO(), io.BytesIO()
    np.savez(pickled, **SEEN | dict(proprio=np.array([Bomb()] * 3)))

    # 50 MB in 50 kB
    with zipfile.ZipFile(zipped, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('proprio.npy', bytes(50_000_000))

    # members that are too many to be listed
    listed = io.BytesIO()
    with zipfile.ZipFile(listed, 'w') as z:
        for number in range(200):
            z.writestr(f'{number}.npy', b'')

    most = server.limit(FIELDS)
    connection = http.client.HTTPConnection('127.0.0.1', running.port, timeout=10)
    for body, status, word in ((pickled.getvalue(), 400, 'proprio'),
                               (zipped.getvalue(), 400, 'unpacks to 50000000'),
                               (listed.getvalue(), 400, 'more than 100 members'),
                               (b'{}', 400, 'npz'),
                               (b'', 400, 'npz'),
                               (pickled.getvalue()[:-9], 400, 'npz'),
                               (bytes(most + 1), 413, str(most))):
        connection.request('POST', '/act', body)
        answer = connection.getresponse()
        assert (answer.status, word in answer.read().decode()) == (status, True), (status, word)

    # Other paths, and the connection goes on.
    for method, body in (('GET', None), ('POST', b'{}'), ('GET', None)):
        connection.request(method, '/other', body)
        answer = connection.getresponse()
        assert answer.status == 404 and b'expected POST /act or GET /health' in answer.read()

    # No harm was done.
    assert running.robot().act(**SEEN).shape == (2, 3)
    out, err = capfd.readouterr()
    assert 'unpickled' not in out + err and not err


def test_heads_without_a_length(running, capfd):
    head = b'POST /act HTTP/1.1\r\nHost: x\r\n'
    for line, status in ((b'', b' 411 '), (b'Transfer-Encoding: chunked\r\n', b' 411 '),
                         (b'Content-Length: -5\r\n', b' 400 ')):
        assert status in raw(running.port, head + line + b'\r\n')

    # One that hangs up in the middle is not worth a line.
    assert raw(running.port, head + b'Content-Length: 99\r\n\r\nhalf', end=True) == b''
    assert running.robot().act(**SEEN).shape == (2, 3)
    assert not capfd.readouterr().err


def test_robots_that_come_together_are_one_batch():
    sizes = []

    def act(seen):
        sizes.append(len(seen))
        return plain(seen)

    with Running(act, wait=0.0) as running, ThreadPoolExecutor(4) as pool:
        # From its first request on a robot is known, and waited for.
        robots = [running.robot() for _ in range(4)]
        for robot in robots:
            robot.act(**SEEN)
        running.server.wait = 20.0
        sizes.clear()
        given = list(pool.map(lambda i: robots[i].act(**SEEN | dict(step=i)), range(4)))
        assert sizes == [4]
        assert [answer[1, 1] for answer in given] == [0, 1, 2, 3], 'to each its own'

        # Nobody waits for who is gone.
        began = time.monotonic()
        for robot in robots[1:]:
            robot.http.close()
        tiny.wait_until(lambda: running.server.robots == 1)
        robots[0].act(**SEEN)
        assert time.monotonic() - began < 15


def test_an_error_is_told_to_the_one_who_caused_it():
    # Seed 1 raises for the whole batch, step 13 gives what is not finite.
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

        # Twice: an error leaves nothing behind.
        for _ in range(2):
            right, raised, not_finite = pool.map(ask, (0, 1, 0), (5, 0, 13))
            assert right == 5 and '500 KeyError' in raised and 'not finite' in not_finite


def test_who_waits_too_long_and_who_is_too_many():
    go, begun = threading.Event(), threading.Event()

    # A policy that hangs, once it is warm.
    def act(seen):
        if seen[0]['instruction'] != 'warm up':
            begun.set()
            go.wait(20)
        return plain(seen)

    settings = dict(wait=0.0, most_waiting=2, timeout=0.3)
    with Running(act, **settings) as running, ThreadPoolExecutor(2) as pool:
        # The one before the policy, and one that waits.
        first = pool.submit(running.robot().act, **SEEN)
        assert begun.wait(10)
        with pytest.raises(RuntimeError, match='503 no answer within 0.3 s'):
            running.robot().act(**SEEN)
        with pytest.raises(RuntimeError, match='503 no answer'):
            first.result()

        # Two have time, for a third there is no room. The queue has the one of above, too.
        running.server.patience = 20
        two = [pool.submit(running.robot().act, **SEEN | dict(step=i)) for i in range(2)]
        tiny.wait_until(lambda: running.server.queue.qsize() == 3)
        with pytest.raises(RuntimeError, match='503 2 requests wait'):
            running.robot().act(**SEEN)
        go.set()
        assert [future.result()[1, 1] for future in two] == [0, 1]
        told = running.health()
        assert told['answered'] == 2 and told['refused'] == 3

        # A body that does not come.
        running.server.patience = 0.2
        half = b'POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nhalf'
        assert b' 408 ' in raw(running.port, half)


def test_the_end_finishes_the_batch_at_hand():
    begun = threading.Event()

    def act(seen):
        if seen[0]['instruction'] != 'warm up':
            begun.set()
            time.sleep(0.3)
        return plain(seen)

    with Running(act, wait=0.0) as running, ThreadPoolExecutor(2) as pool:
        # The one before the policy is answered, the one that waits is told.
        first = pool.submit(running.robot().act, **SEEN)
        assert begun.wait(10)
        second = pool.submit(running.robot().act, **SEEN)
        tiny.wait_until(lambda: running.server.queue.qsize() == 1)
        running.server.end()
        assert first.result().shape == (2, 3)
        with pytest.raises(RuntimeError, match='503 the server ends'):
            second.result()


def test_the_end_is_told_to_those_who_come_late():
    go, begun = threading.Event(), threading.Event()

    def act(seen):
        if seen[0]['instruction'] != 'warm up':
            begun.set()
            go.wait(20)
        return plain(seen)

    with Running(act, wait=0.0) as running, ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.robot().act, **SEEN)
        assert begun.wait(10)
        running.server.end()
        assert running.health()['ready'] is False
        with pytest.raises(RuntimeError, match='503 the server ends'):
            running.robot().act(**SEEN)
        go.set()
        assert first.result().shape == (2, 3)


def test_a_body_has_its_time_as_a_whole():
    # A byte now and then is not enough.
    with Running(timeout=0.3) as running:
        with socket.create_connection(('127.0.0.1', running.port), timeout=10) as s:
            s.sendall(b'POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n')
            began = time.monotonic()
            while time.monotonic() < began + 10:
                try:
                    s.sendall(b'x')
                except OSError:
                    break
                time.sleep(0.05)
        assert time.monotonic() - began < 5


def test_a_token():
    with Running(token='secret') as running:
        for token, status in (('', '401'), ('Secret', '401'), ('secre', '401'), ('\xff', '401'),
                              ('secret', '')):
            robot = Robot('127.0.0.1', running.port, token=token)
            if not status:
                assert robot.act(**SEEN).shape == (2, 3)
                continue
            with pytest.raises(RuntimeError, match=f'{status} expected the header "Auth') as error:
                robot.act(**SEEN)
            assert 'secret' not in str(error.value)

        # whether a server lives is no secret
        assert running.health()['answered'] == 1
        assert b' 401 ' in raw(running.port, b'GET /other HTTP/1.0\r\n\r\n')


def test_too_many_connections(monkeypatch):
    """Those that have asked for nothing make room, the oldest first."""
    monkeypatch.setattr(server, 'MOST_CONNECTIONS', 8)
    with Running() as running:
        robot = running.robot()
        robot.act(**SEEN)
        silent = [socket.create_connection(('127.0.0.1', running.port)) for _ in range(40)]
        silent[0].settimeout(10)
        assert silent[0].recv(1) == b''
        assert running.robot().act(**SEEN).shape == (2, 3), 'one that is new gets in'
        robot.http.connect = None                       # it stays connected
        assert robot.act(**SEEN).shape == (2, 3)
        for each in silent:
            each.close()


def delays(robot, count):
    """Seconds that a robot waits for each of its chunks."""
    times = []
    for step in range(count):
        began = time.perf_counter()
        robot.act(**SEEN | dict(step=step))
        times.append(time.perf_counter() - began)
    return times


def test_a_crowd_does_not_lock_robots_out():
    """300 connections that say nothing, and 50 that ask and ask, for nothing good."""
    def act(seen):
        # as a policy does, it lets others run after each of its small operations
        for _ in range(50):
            time.sleep(0.0001)
        return plain(seen)

    def pester(port):
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=20)
        while not over.is_set():
            connection.request('POST', '/act', b'{}')
            assert connection.getresponse().read().startswith(b'the body')
        connection.close()

    def slower():
        """How many times as long a robot waits beside a crowd."""
        over.clear()
        usual = delays(running.robot(), 40)
        silent = [socket.create_connection(address) for _ in range(300)]
        busy = [pool.submit(pester, running.port) for _ in range(50)]
        try:
            crowded = delays(running.robot(), 40)
        finally:
            over.set()
        for each in busy:
            each.result()
        for each in silent:
            each.close()
        # the first request of a robot waits at the door
        return np.median(crowded[1:]) / np.median(usual[1:])

    over = threading.Event()
    with Running(act) as running, ThreadPoolExecutor(50) as pool:
        address = '127.0.0.1', running.port
        # other processes may disturb a round
        assert any(slower() < 1.4 for _ in range(3))
        assert running.health()['refused'] >= 50


# -------------------------------------------------------------------------------------------------
# sample.py: a policy with random weights in PushT


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """pusht: steps of random numbers with a picture."""
    import webdataset
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    pusht = folder / 'pusht'
    pusht.mkdir()
    proprio = rng.uniform(0, 512, (12, 5)).astype(np.float32)
    chosen = rng.uniform(0, 512, (12, 2)).astype(np.float32)

    # In chunks of four, as the policy has them.
    views = dict(top=[np.zeros((16, 16, 3), np.uint8)] * 12)
    each = [dict(instruction='push')] * 12
    with webdataset.TarWriter(str(pusht / '0.tar'), encoder=False) as tar:
        for key, members in record.samples('e', proprio, chosen, views, {}, each, 4):
            tar.write({'__key__': key, **members})
    tiny.run('prepare/stats.py', f'--data={pusht}', f'--cache_dir={folder / "cache"}').ok()
    return folder


def train(data_dir, out_dir, mix='pusht', task='policy'):
    """One step, of a policy that sees and reads."""
    own = ['--vla.width=32']
    if task == 'policy':
        own = ['--policy.encoder=vlm', '--policy.width=32', '--policy.mlp_dim=32',
               '--policy.num_heads=2', '--policy.depth=1']
    return tiny.run(
        'train.py', *tiny.MODEL, '--device=cpu', f'--task={task}', '--lanes=8', '--window=4',
        '--workers=0', '--batch_size=4', '--seq_len=64', '--max_steps=1', '--action_steps=4',
        '--action_dim=2', '--proprio_dim=5', '--cameras=["top"]', *own,
        f'--mix={{"{mix}": 1.0}}', f'--data_dir={data_dir}', f'--out_dir={out_dir}').ok()


@pytest.fixture(scope='module')
def rolled(data_dir, tmp_path_factory):
    """(run, the folder of two recorded episodes)."""
    # Actions of four steps, all of which are executed.
    pytest.importorskip('gym_pusht')
    folder = tmp_path_factory.mktemp('rolled')
    run, rolled = folder / 'run', data_dir / 'rolled'
    train(data_dir, run)
    flags = [f'--out_dir={run}', '--env=pusht', '--episodes=2', '--device=cpu', '--execute=4',
             '--sample_steps=2', '--processes=1', '--batch_size=1', '--json=true',
             f'--record={rolled}']
    result = tiny.run('sample.py', *flags, f'--film={folder / "a.mp4"}').ok()
    row, = map(json.loads, result.out.splitlines())
    assert row['policy'] == 'policy' and row['episodes'] == 2
    assert row['tasks'].keys() == {'pusht'}

    # What is recorded is not written over.
    tiny.run('sample.py', *flags).refused('rolled', 'already')
    return run, rolled


def recorded(folder):
    """A list of samples' fields."""
    folder, rows = Folder(str(folder)), []
    for shard, size in enumerate(folder.sizes):
        for i in range(size):
            members = folder.read(shard, i)
            rows.append(fields(members) | actions.read(members))
    return rows


def top_of(row):
    """The picture of a sample, uint8 (H, W, 3)."""
    return np.array(open_picture(row['pictures'][0]))


def test_what_is_recorded_happened(rolled):
    rows = recorded(rolled[1])
    env = simulators.make('pusht', 16)
    seen = None
    for number, row in enumerate(rows):
        # The simulator goes along, from the seed and the recorded actions alone.
        if row['frame'] == 0:
            seen = env.reset(row['seed'])
        assert (seen['proprio'] == row['lowdim']['proprio']).all()
        assert (seen['pictures']['top'] == top_of(row)).all()
        assert row['instruction'] == seen['instruction']
        assert row['success'] is False and row['task'] == 'pusht' and row['fps'] == 10

        # The chunk is what was done next.
        chunk = row['lowdim']['actions']
        if row['frame'] % 50 == 0:
            for k in range(1, 4):
                assert (chunk[k] == rows[number + k]['lowdim']['actions'][0]).all()
        seen, _ = env.step(chunk[0])
    env.close()
    seeds = [row['seed'] for row in rows if row['frame'] == 0]
    assert seeds == [simulators.TEST_SEED, simulators.TEST_SEED + 1]


def test_the_film_is_of_the_first_episode(rolled):
    import av
    with av.open(str(rolled[0].parent / 'a_pusht.mp4')) as film:
        stream = film.streams.video[0]
        frames = [frame.to_ndarray(format='rgb24') for frame in film.decode(stream)]

    # All steps, and how it ended.
    assert len(frames) == 301 and frames[0].shape == (16, 16, 3)
    assert abs(frames[0].astype(int) - top_of(recorded(rolled[1])[0])).mean() < 16


def test_a_vla_learns_from_what_is_recorded_and_acts(rolled, data_dir, tmp_path):
    run = tmp_path / 'run'
    tiny.run('prepare/stats.py', f'--data={rolled[1]}', f'--cache_dir={tmp_path / "cache"}').ok()
    train(data_dir, run, 'rolled', 'vla')
    assert tiny.rows(run)[0]['bad_samples'] == 0

    # It sees, and acts in a simulator that draws.
    acted = tiny.run('sample.py', f'--out_dir={run}', '--env=pusht', '--episodes=1',
                     '--device=cpu', '--execute=4', '--sample_steps=1', '--processes=1',
                     '--json=true').ok()
    assert json.loads(acted.out)['tasks'].keys() == {'pusht'}


def test_rollouts_to_lerobot_and_back(rolled, tmp_path):
    """Every value, pixel, sentence and success."""
    flags = ['--action_steps=4', f'--cache_dir={tmp_path}/cache']
    there = f'--data={rolled[1]}', f'--out={tmp_path}/v3', '--export=true', '--crf=0'
    tiny.run('prepare/lerobot.py', *there, *flags).ok()

    # As LeRobot tells of a data set.
    info = json.loads((tmp_path / 'v3/meta/info.json').read_text())
    assert info['fps'] == 10 and info['total_episodes'] == 2
    assert info['features']['next.success']['dtype'] == 'bool'

    # And back.
    tiny.run('prepare/lerobot.py', f'--data={tmp_path}/v3', f'--out={tmp_path}/back', *flags).ok()
    for a, b in zip(recorded(rolled[1]), recorded(tmp_path / 'back'), strict=True):
        for key in ('actions', 'is_pad', 'proprio'):
            np.testing.assert_array_equal(a['lowdim'][key], b['lowdim'][key])
        for x, y in zip(a['pictures'], b['pictures'], strict=True):
            np.testing.assert_array_equal(open_picture(x), open_picture(y))
        for key in ('instruction', 'frame', 'success', 'fps', 'picture_names'):
            assert a[key] == b[key], key


def test_sample_serves_what_it_acts(rolled):
    run, folder = rolled
    port = free_port()
    flags = [f'--out_dir={run}', '--device=cpu', '--sample_steps=2', f'--serve_policy={port}']
    process = tiny.Process('sample.py', flags)
    tiny.wait_until(lambda: 'ready' in open(process.files[0]).read(), process)

    # At each fourth step, where the rollout asked, too.
    robot = Robot('127.0.0.1', port)
    for row in recorded(folder)[:80:4]:
        seen = dict(proprio=row['lowdim']['proprio'], top=top_of(row),
                    instruction=row['instruction'], seed=row['seed'], step=row['frame'])
        given = robot.act(**seen)
        assert (np.clip(given, 0, 512) == row['lowdim']['actions']).all(), 'bit for bit'

    # The step decides the noise.
    assert not (robot.act(**seen | dict(step=99)) == given).any()
    assert (robot.act(**seen) == given).all()

    # What an observation holds is the run's.
    for change, word in (
            (dict(top=seen['top'][:8]),
             r'top: expected uint8 \(16, 16, 3\), got uint8 \(8, 16, 3\)'),
            (dict(proprio=np.zeros(39)), r'proprio: expected float32 \(5,\)'),
            (dict(instruction=None), 'instruction: expected str .*, got nothing')):
        with pytest.raises(RuntimeError, match=word):
            robot.act(**without_nones(seen | change))

    # Together with others it is the same to rounding.
    with ThreadPoolExecutor(4) as pool:
        for other in pool.map(lambda _: Robot('127.0.0.1', port).act(**seen), range(8)):
            np.testing.assert_allclose(other, given, rtol=1e-4, atol=1e-2)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(20).ok()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'aiohttp', None)
    monkeypatch.delitem(sys.modules, 'serve.server')
    monkeypatch.delattr('serve.server')
    with pytest.raises(ValueError, match='--serve_policy needs .*aiohttp.*pip install aiohttp'):
        acting.answer_robots(None, None)


def test_the_word_of_a_file(tmp_path, capsys):
    options = SimpleNamespace(serve_token='', serve_host='0.0.0.0')
    assert acting.token_of(options) == ''
    assert '--serve_token=FILE' in capsys.readouterr().err, 'that all may ask is told'
    options.serve_token = str(tmp_path / 'token')
    (tmp_path / 'token').write_text('a-word\n')
    assert acting.token_of(options) == 'a-word'
    for wrong in (b'', b'two words', b'\xff', 'wörd'.encode()):
        (tmp_path / 'token').write_bytes(wrong)
        with pytest.raises(ValueError, match='--serve_token=.*expected'):
            acting.token_of(options)


def test_wrong_settings(rolled):
    run = f'--out_dir={rolled[0]}'
    # What is no port is a wrong setting.
    tiny.run('sample.py', run, '--serve_policy=99999').refused('99999', 'port')
    tiny.run('sample.py', run, '--serve_policy=8000', '--serve_token=nowhere').refused(
        '--serve_token=nowhere', 'file of text')

    # One that another program has is a failure.
    with socket.create_server(('127.0.0.1', 0)) as taken:
        flag = f'--serve_policy={taken.getsockname()[1]}'
        tiny.run('sample.py', run, flag).refused(flag, 'in use', code=1)

    # A robot that the run was not trained for.
    tiny.run('sample.py', run, '--env=metaworld').refused('metaworld', 'states of 4', '2 and 5')
    tiny.run('sample.py', run, '--env=pusht', '--tasks=reach').refused("'reach'", 'pusht')
