"""Data sets behind a URL: remote.Remote and Folder against a local S3 server, through a proxy that
makes faults."""
import http.client
import json
import multiprocessing
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from conftest import ROOT, sample, write_set, write_tar

import data
import lost
import remote
from pictures import Eyes
from processor import Processor
from shards import Folder
from tokenizer import Bytes

pytest.importorskip('s3fs')
server = pytest.importorskip('moto.server')


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on to moto and notes them; `fault(method, path)` says what goes wrong: 500,
    'cut', seconds."""
    protocol_version = 'HTTP/1.1'       # clients wait for its '100 Continue'

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        path, fault = self.path.partition('?')[0], self.server.fault(self.command, self.path)
        self.server.seen.append((self.command, path))
        status, headers, answer = 500, [], b''
        if fault != 500:
            time.sleep(fault if isinstance(fault, float) else 0)
            behind = http.client.HTTPConnection('127.0.0.1', self.server.moto)
            behind.request(self.command, self.path, body,
                           {k: v for k, v in self.headers.items() if k != 'Expect'})
            response = behind.getresponse()
            status, headers, answer = response.status, response.getheaders(), response.read()
            behind.close()
        length = response.getheader(
            'Content-Length') if self.command == 'HEAD' and fault != 500 else len(answer)
        self.send_response_only(status)
        ours = {'connection': 'close', 'content-length': str(length or 0), 'transfer-encoding': ''}
        for key, value in [item for item in headers
                           if item[0].lower() not in ours] + list(ours.items())[:2]:
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(answer[:len(answer) // 2] if fault == 'cut' else answer)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET
    log_message = lambda *args: None  # noqa: E731


@pytest.fixture(scope='module')
def proxy():
    moto, proxy = server.ThreadedMotoServer('127.0.0.1', 0, verbose=False), ThreadingHTTPServer(
        ('127.0.0.1', 0), Proxy)
    moto.start()
    proxy.moto = moto.get_host_and_port()[1]
    Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy
    proxy.shutdown()
    moto.stop()


@pytest.fixture
def s3(proxy, monkeypatch, tmp_path):
    """A bucket of its own: `url`, `local` (a set of 4 + 5 + 3 samples), upload(), seen (requests),
    fault, waits."""
    import fsspec
    import s3fs
    options = {'endpoint_url': f'http://127.0.0.1:{proxy.server_port}', 'key': 'k', 'secret': 's',
               'config_kwargs': {'retries': {'max_attempts': 0}, 'read_timeout': 5}}
    monkeypatch.setitem(fsspec.config.conf, 's3', options)
    env = {'FSSPEC_S3': json.dumps(options)}
    monkeypatch.setenv('FSSPEC_S3', env['FSSPEC_S3'])       # of other processes
    # s3fs tries again by itself: here we shall
    monkeypatch.setattr(s3fs.S3FileSystem, 'retries', 1)
    waits, bucket, fs = [], f'b{time.time_ns()}', fsspec.filesystem('s3')
    monkeypatch.setattr(remote, 'time', SimpleNamespace(sleep=waits.append, time=time.time))
    proxy.seen, proxy.fault = [], lambda method, path: None
    fs.mkdir(bucket)

    def upload(path, name=None):
        fs.pipe_file(f'{bucket}/set/{name or path.name}', path.read_bytes())
    local = write_set(tmp_path / 'local', [4, 5, 3])
    for path in local.iterdir():
        upload(path)
    return SimpleNamespace(url=f's3://{bucket}/set', local=local, upload=upload, proxy=proxy,
                           waits=waits, fs=fs, cache=tmp_path / 'cache', env=env,
                           gets=lambda: [path.rsplit('/', 1)[1] for method, path in proxy.seen
                                         if method == 'GET' and path.endswith('.tar')])


def everything(folder):
    return [(folder.name(s).rsplit('/', 1)[-1], folder.key(s, i), folder.read(s, i))
            for s, n in enumerate(folder.sizes.tolist()) for i in range(n)]


def copies(s3):
    return sorted((s3.cache / 'shards').glob('*.tar')), sorted(
        (s3.cache / 'shards').glob('*.part'))


def caption_rows():
    """A Processor of pictures and captions, in rows of 24 tokens."""
    settings = dict(task='vlm', processor='auto', seq_len=24, prompt='')
    return Processor(settings, Bytes(), eyes=Eyes(16), image_tokens=4)


@pytest.mark.parametrize('manifest', [True, False])
@pytest.mark.parametrize('spec', ['', '/', '/{00000000..00000002}.tar', '/list.txt'])
def test_a_remote_set_reads_as_the_local_one(s3, spec, manifest, tmp_path):
    if not manifest:
        s3.fs.rm(s3.url + '/manifest.jsonl')
    if spec.endswith('.txt'):
        (tmp_path / 'list.txt').write_text('00000000.tar\n\n00000001.tar\n00000002.tar\n')
        s3.upload(tmp_path / 'list.txt')
    folder = Folder(s3.url + spec, cache_dir=s3.cache)
    assert (s3.gets() == []) == manifest, 'counts are in the manifest'
    assert folder.sizes.tolist() == [4, 5, 3]
    assert everything(folder) == everything(Folder(str(s3.local)))
    assert sorted(s3.gets()) == [f'{i:08d}.tar' for i in range(3)], 'each once'
    again = Folder(s3.url + spec, cache_dir=s3.cache)
    assert everything(again) == everything(folder) and len(s3.gets()) == 3 and not copies(s3)[1]


def test_the_cache_is_bounded_and_open_readers_keep_their_files(s3):
    local = Folder(str(s3.local))
    sizes = [os.path.getsize(s3.local / f'{i:08d}.tar') for i in range(3)]
    folder, other = (Folder(s3.url, cache_dir=s3.cache) for _ in range(2))
    folder.remote.max_bytes = other.remote.max_bytes = max(sizes) + 100
    other.read(0, 0)
    for _ in range(2):
        for shard in (0, 1, 2):
            assert folder.read(shard, 2) == local.read(shard, 2)
            assert sum(path.stat().st_size for path in copies(s3)[0]) <= folder.remote.max_bytes
    assert len(s3.gets()) == 3 and other.read(0, 3) == local.read(
        0, 3), 'its file is removed and open'
    few = Folder(s3.url, cache_dir=s3.cache, max_open=1)
    few.remote.max_bytes = max(sizes) + 100
    assert all(few.read(shard, i) == local.read(shard, i) for i in range(3) for shard in range(3))
    assert len(s3.gets()) == 3 + 9 and len(copies(s3)[0]) == 1
    few.remote.max_bytes = sum(sizes) - 1
    kept, oldest, last = (few.remote.fetch(f'{s3.url}/0000000{i}.tar') for i in (2, 0, 2))
    os.utime(oldest, (1e9, 1e9))
    assert kept == last
    assert few.remote.fetch(f'{s3.url}/00000001.tar')
    assert not os.path.exists(oldest)
    assert os.path.exists(kept)
    few.remote.max_bytes = min(sizes) - 1
    with pytest.raises(OSError, match='0000000.*cache_gb'):
        few.remote.fetch(f'{s3.url}/00000000.tar')


@pytest.mark.parametrize('fault', [500, 'cut', 0.3])
@pytest.mark.parametrize('what', ['manifest.jsonl', '.tar'])
def test_faults_that_pass_change_nothing(s3, what, fault):
    left, whole = [2], {path.stat().st_size for path in s3.local.glob('*.tar')}

    def strike(method, path):
        assert {path.stat().st_size for path in copies(s3)[0]} <= whole
        if left[0] and what in path and (method == 'GET' or fault == 500):
            left[0] -= 1
            return fault
    s3.proxy.fault = strike
    folder = Folder(s3.url, cache_dir=s3.cache)
    assert everything(folder) == everything(Folder(str(s3.local)))
    assert left == [0] or fault == 0.3 and left == [1], 'the faults came'
    assert s3.waits == ([] if fault == 0.3 else [0.5, 1.0]) and not copies(s3)[1]
    assert {path.stat().st_size for path in copies(s3)[0]} == whole


@pytest.mark.parametrize('fault', [500, 'cut'])
@pytest.mark.parametrize('retries', [0, 2])
def test_a_fault_that_stays_is_an_error_that_names_the_url(s3, fault, retries):
    folder = Folder(s3.url, cache_dir=s3.cache)
    folder.remote.retries = retries

    def strike(method, path):
        return fault if '00000001.tar' in path and method == 'GET' else None
    s3.proxy.fault = strike
    with pytest.raises(
        OSError, match=f'{s3.url}/00000001.tar can not be read, {retries + 1} times'):
        folder.read(1, 0)
    assert s3.waits == [0.5, 1.0][:retries] and not copies(s3)[0], 'no part of it is a copy'
    assert s3.gets() == ['00000001.tar'] * (retries + 1)
    assert folder.read(0, 0) == Folder(str(s3.local)).read(0, 0)
    s3.proxy.fault = lambda method, path: None
    assert folder.read(1, 0) == Folder(str(s3.local)).read(1, 0), 'the error is not kept'


def test_two_processes_fetch_a_shard_once(s3):
    s3.proxy.fault = lambda method, path: 1.0 if method == 'GET' and path.endswith(
        '.tar') else None
    code = ('import sys, shards; folder = shards.Folder(sys.argv[1], cache_dir=sys.argv[2]); '
            'print(len(folder.read(1, 0)["png"]))')
    both = [
        subprocess.Popen([sys.executable, '-c', code, s3.url, str(s3.cache)], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    expected = f'{len(Folder(str(s3.local)).read(1, 0)["png"])}\n'
    assert [process.communicate(timeout=30) for process in both] == [(expected, '')] * 2
    assert s3.gets() == ['00000001.tar'] and not copies(s3)[1]


def test_shards_that_change_or_go(s3, tmp_path):
    old = Folder(s3.url, cache_dir=s3.cache)
    first = old.read(0, 0)
    write_tar(tmp_path / 'new.tar', [(f'new{i}', sample(70 + i)) for i in range(4)])
    s3.upload(tmp_path / 'new.tar', '00000000.tar')
    new = Folder(s3.url, cache_dir=s3.cache)
    assert new.read(0, 0) == sample(70) and new.key(0, 0) == 'new0'
    assert old.read(0, 0) == first and old.key(0, 0) == '000000', 'an open one stays as it was'
    s3.upload(s3.local / '00000002.tar', '00000001.tar')
    with pytest.raises(
        ValueError, match=f'{s3.url}/00000001.tar holds 3 samples, the manifest says 5'):
        new.read(1, 0)
    s3.fs.rm(s3.url + '/00000002.tar')
    with pytest.raises(OSError, match=f'{s3.url}/00000002.tar'):
        new.read(2, 0)
    with pytest.raises(OSError, match=f'{s3.url}-none'):
        Folder(s3.url + '-none', cache_dir=s3.cache)
    assert s3.waits == [], 'waiting would not help'


def rewritten(s3, tmp_path, remote):
    """A Folder whose first shard was read, closed, and then changed."""
    folder = Folder(s3.url if remote else str(s3.local), cache_dir=s3.cache, max_open=1)
    folder.read(0, 0), folder.read(1, 0)
    write_tar(tmp_path / 'new.tar', [(f'anew{i}', {'txt': b'anew %d' % i}) for i in range(4)])
    s3.upload(tmp_path / 'new.tar', '00000000.tar')
    (tmp_path / 'new.tar').rename(s3.local / '00000000.tar')
    return folder


def test_a_local_shard_that_changes_after_it_was_closed_is_indexed_anew(s3, tmp_path):
    folder = rewritten(s3, tmp_path, False)
    assert folder.read(0, 1) == {'txt': b'anew 1'} and folder.key(0, 1) == 'anew1'


@pytest.mark.parametrize('has_copy', [True, False])
def test_a_remote_shard_that_changes_midway_is_an_error(s3, tmp_path, has_copy):
    folder = rewritten(s3, tmp_path, True)
    other = Folder(s3.url, cache_dir=s3.cache)
    # as in another worker of the same run, which never had the old one
    other.remote.begun = folder.remote.begun
    if not has_copy:
        for path in copies(s3)[0]:
            path.unlink()
        other = folder
    for _ in range(2):
        with pytest.raises(OSError, match=f'{s3.url}/00000000.tar is not what it was when this'):
            other.read(0, 1)
    assert other.read(1, 0) and other.read(2, 0), 'the others can be read'
    later = Folder(s3.url, cache_dir=s3.cache)
    assert later.read(0, 1) == {'txt': b'anew 1'}, 'another run begins with what is there'


def test_a_remote_shard_that_changes_while_it_is_copied_is_an_error(s3, tmp_path):
    folder = Folder(s3.url, cache_dir=s3.cache)
    old = (s3.local / '00000000.tar').read_bytes()

    def strike(method, path):
        # after the request for its fingerprint: the same size and count, another ETag
        if method == 'GET' and path.endswith('00000000.tar'):
            new = tmp_path / f'{time.time_ns()}.tar'
            new.write_bytes(old.replace(b'name', str(time.time_ns())[-4:].encode()))
            s3.upload(new, '00000000.tar')
    s3.proxy.fault = strike
    with pytest.raises(OSError, match='00000000.tar can not be read, 6 times.*changed while'):
        folder.read(0, 0)
    assert copies(s3)[0] == []


def test_a_cache_that_loses_its_copies_at_once(s3, monkeypatch):
    folder = Folder(s3.url, cache_dir=s3.cache)
    fetch = folder.remote.fetch
    monkeypatch.setattr(folder.remote, 'fetch', lambda url: os.remove(path := fetch(url)) or path)
    with pytest.raises(OSError, match=f'{s3.url}/00000000.tar .*cache_gb'):
        folder.read(0, 0)


def test_a_forked_process_fetches_what_its_parents_threads_had_begun(s3):
    s3.proxy.fault = lambda method, path: 1.0 if method == 'GET' and path.endswith(
        '.tar') else None
    folder = Folder(s3.url, cache_dir=s3.cache)
    expected = Folder(str(s3.local)).read(1, 0)
    folder.fetch([0, 1, 2])
    child = multiprocessing.get_context('fork').Process(
        target=lambda: os._exit(folder.read(1, 0) != expected))
    child.start()
    child.join(30)
    assert child.exitcode == 0 and folder.read(1, 0) == expected


def test_shards_are_fetched_ahead_of_need(s3):
    folder = Folder(s3.url, cache_dir=s3.cache)
    order = data.Order([folder.sizes], [1.0], lanes=1, window=5, whole=0)
    batches = data.Batches([folder], order, caption_rows(), ahead=4)
    first, later = (folder.name(order.locate(np.array([n]))[2][0]) for n in (0, 6))
    batches[np.arange(1)]
    assert f'{first}.tar' in s3.gets()
    batches[np.arange(2, 3)]            # four ahead is 6
    tiny.wait_until(lambda: len(copies(s3)[0]) == 2)
    # side by side
    assert sorted(s3.gets()) == sorted([f'{first}.tar', f'{later}.tar']) and first != later


def test_a_run_on_remote_shards_is_the_run_on_local_ones(s3, tmp_path):
    faults = iter(['cut', 500, 'cut', None, 0.5])
    s3.proxy.fault = lambda method, path: next(faults, None) if method == 'GET' and path.endswith(
        '.tar') else None
    for out, spec in (('remote', s3.url), ('local', s3.local)):
        tiny.run('train.py', *tiny.FLAGS, f'--mix={{"{spec}": 1}}', '--max_steps=4', '--workers=2',
                 f'--cache_dir={s3.cache}', f'--out_dir={tmp_path / out}', env=s3.env).ok()
    assert next(faults, 'all came') == 'all came'
    assert tiny.losses(tmp_path / 'remote') == tiny.losses(tmp_path / 'local')


def test_a_shard_that_goes_midway_may_be_lost(s3):
    def batches(spec):
        folder = Folder(spec, cache_dir=s3.cache)
        order = data.Order([folder.sizes], [1.0])
        return order, data.Batches([folder], order, caption_rows(), ahead=1)
    order, ours = batches(s3.url)
    lost.spare(ours)
    theirs = batches(str(s3.local))[1][np.arange(12)]
    s3.fs.rm(s3.url + '/00000001.tar')
    s3.proxy.seen.clear()
    for _ in range(2):
        batch = ours[np.arange(12)]
        gone = order.locate(np.arange(12))[2] == 1
        assert np.array_equal(batch['tokens'][~gone], theirs['tokens'][~gone])
        assert not batch['pictures'][gone].any() and gone.sum() == 5
        reasons, number = lost.take_lines([batch])
        assert list(reasons) == [f'{s3.url}/00000001.tar'] and number == 5
    asked = [path for _, path in s3.proxy.seen if path.endswith('00000001.tar')]
    assert len(asked) == 1, 'it is looked for once'


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_are_those_of_the_local_set(s3, workers):
    def batches(spec, workers):
        folder = Folder(spec, cache_dir=s3.cache)
        order = data.Order([folder.sizes], [1.0], seed=1, lanes=4, window=8)
        batches = data.Batches([folder], order, caption_rows(), 7)
        return list(data.loader(batches, [np.arange(i, i + 6) for i in range(0, 30, 6)], workers))
    ours, theirs = batches(s3.url, workers), batches(str(s3.local), 0)
    for a, b in zip(ours, theirs, strict=True):
        assert 'pixels' in a and not a['bad'] and a.keys() == b.keys()
        assert all(np.array_equal(np.asarray(a[k]), np.asarray(b[k])) for k in a)
    assert sorted(s3.gets()) == [f'{i:08d}.tar' for i in range(3)], 'each once for all workers'
