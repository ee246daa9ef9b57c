"""A robot policy over HTTP: an observation in, a chunk of actions out.

    python sample.py --out_dir=out/policy_metaworld_state --serve_policy=8000

    POST /act       body: an .npz (numpy.savez) of the observation; the answer: an .npy, fp32 (steps, action size)
    GET  /health    JSON: what an observation holds, by name, dtype and shape; how many requests and batches there were

A robot keeps its connection open. Requests that come together are one batch: the first waits until every robot that has
a connection is there, 3 ms at most. An answer is a function of the observation alone (its noise of `seed` and `step`,
which the robot counts), but for the rounding that a batch's size decides. What can not be answered gets a status and
one line: 400 what is wrong with the observation, by its name; 408 a body that does not come; 413 one that is too large;
500 what the policy raised; 503 too many wait, the answer took too long, or the server ends. Nothing is unpickled.
"""
import io
import json
import math
import queue
import socketserver
import sys
import threading
import time
import zipfile
from concurrent.futures import CancelledError, Future
from http.server import BaseHTTPRequestHandler

import numpy as np

KINDS = {'float32': 'fiu', 'uint8': 'u', 'int64': 'iu', 'str': 'U'}     # dtypes of fields -> numpy's kinds that will do
OPTIONAL = dict(seed=0, step=0, instruction='')         # what stands for those that are not given
MOST_CONNECTIONS, MOST_TEXT = 256, 4096


class Refused(Exception):
    """A request that is not answered: (HTTP's status, why)."""


# ----------------------------------------------------------------------------------------------------------------------
# observations: fields, {name: (dtype, shape)}, say what one holds


def read(body, fields):
    """The .npz of an observation -> {name: array, text or whole number}. Raises Refused, which names what is wrong,
    what was expected and what came."""
    try:
        file = zipfile.ZipFile(io.BytesIO(body))
        members = {info.filename.removesuffix('.npy'): info for info in file.infolist()}
    except Exception as error:          # zipfile and struct have errors of their own
        raise Refused(400, f'the body: expected an .npz of {", ".join(fields)} ({error})') from None
    for name in members:
        if name not in fields:
            raise Refused(400, f'{name[:80]!r} is unknown: expected {", ".join(fields)}')
    out = {name: value for name, value in OPTIONAL.items() if name in fields}
    for name, (dtype, shape) in fields.items():
        wanted = f'{name}: expected {dtype} {shape}'
        if name in members:
            try:
                if members[name].file_size > limit(fields):
                    raise ValueError(f'it unpacks to {members[name].file_size} bytes')
                with file.open(members[name]) as f:
                    value = np.lib.format.read_array(f, allow_pickle=False)
            except Exception as error:      # as above, zlib's, and numpy's, MemoryError among them
                raise Refused(400, f'{wanted}, it can not be read ({error})') from None
            out[name] = checked(name, value, dtype, shape, wanted)
        elif name not in out:
            raise Refused(400, f'{wanted}, got nothing; given: {", ".join(members) or "nothing"}')
    return out


def checked(name, value, dtype, shape, wanted):
    """An array as the policy takes it: an array of the field's dtype, a text, or a whole number."""
    given = 'str' if value.dtype.kind == 'U' else value.dtype
    if value.dtype.kind not in KINDS[dtype] or value.shape != shape or (dtype == 'uint8' and given != dtype):
        raise Refused(400, f'{wanted}, got {given} {value.shape}')
    if dtype == 'str' and len(str(value)) > MOST_TEXT:
        raise Refused(400, f'{wanted} of at most {MOST_TEXT} characters, got {len(str(value))}')
    if dtype == 'int64' and not 0 <= int(value) < 2 ** 31:
        raise Refused(400, f'{wanted} from 0 to {2 ** 31 - 1}, got {value}')
    if not shape:
        return value.item()
    with np.errstate(over='ignore'):
        value = value.astype(dtype)
    bad = np.argwhere(~np.isfinite(value))
    if len(bad):
        raise Refused(400, f'{wanted}, finite, got {value[tuple(bad[0])]} at {bad[0].tolist()}')
    return value


def limit(fields):
    """Bytes that a request may have: enough for shapes that are somewhat wrong to be told so."""
    return (4 << 20) + sum(8 * math.prod(shape) for _, shape in fields.values())


# ----------------------------------------------------------------------------------------------------------------------
# the server


class Server(socketserver.ThreadingTCPServer):
    """act: a list of observations, as `read` gives them -> actions (N, steps, size). It runs in the thread that calls
    `run`; each connection has a thread of its own. wait and timeout in seconds. Raises OSError if the port is taken."""
    allow_reuse_address = daemon_threads = True
    request_queue_size = 128

    def __init__(self, act, fields, port, host='127.0.0.1', batch_size=64, wait=0.003, most_waiting=256, timeout=10.0):
        super().__init__((host, port), Handler, bind_and_activate=False)
        self.act, self.fields, self.batch_size, self.wait, self.patience = act, fields, batch_size, wait, timeout
        self.queue, self.room, self.most_waiting = queue.SimpleQueue(), threading.Semaphore(most_waiting), most_waiting
        self.lock, self.robots, self.ending = threading.Lock(), 0, False
        self.counts = dict(answered=0, refused=0, batches=0, largest_batch=0, policy_seconds=0.0)
        self.server_bind()

    def run(self):
        """Warm up, say that it is ready, and answer until `end`. Raises OSError, and what `act` raises at first."""
        began = time.perf_counter()
        example = {name: 'warm up' if dtype == 'str' else np.zeros(shape, dtype) if shape else 0
                   for name, (dtype, shape) in self.fields.items()}
        for n in (1, 1, 2, 4, 8):
            self.shape = np.asarray(self.act([example] * min(n, self.batch_size))).shape[1:]
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        url = 'http://{}:{}'.format(*self.server_address)
        print(f'ready at {url}, after {time.perf_counter() - began:.1f} s of warm-up; {url}/health says what an '
              'observation holds', flush=True)
        while not self.ending:
            batch = [request for request in self.gather() if request[1].set_running_or_notify_cancel()]
            if batch:
                self.answer(batch)
        while not self.queue.empty():
            self.queue.get()[1].cancel()
        self.shutdown()
        end = time.monotonic() + 2      # what was answered is on its way
        for _ in range(self.most_waiting):
            self.room.acquire(timeout=max(end - time.monotonic(), 0))
        self.server_close()

    def end(self, *_):
        """Let `run` finish the batch at hand and return. From any thread, or as a signal's handler."""
        self.ending = True
        self.queue.put((None, Future()))        # wakes it up

    def gather(self):
        """Requests that came together: [(observation, Future)]."""
        batch, end = [self.queue.get()], time.monotonic() + self.wait
        while len(batch) < self.batch_size and not self.ending:
            left = 0 if len(batch) >= self.robots else max(end - time.monotonic(), 0)
            try:
                batch.append(self.queue.get(timeout=left))
            except queue.Empty:
                break
        return [(seen, future) for seen, future in batch if seen is not None]

    def answer(self, batch):
        self.counts['batches'] += 1
        self.counts['largest_batch'] = max(self.counts['largest_batch'], len(batch))
        began = time.perf_counter()
        try:
            given = np.asarray(self.act([seen for seen, _ in batch]), np.float32)
            self.counts['policy_seconds'] += time.perf_counter() - began
            if given.shape != (len(batch), *self.shape) or not np.isfinite(given).all():
                raise ValueError(f'the policy gave {given.shape} or numbers that are not finite')
            for actions, (_, future) in zip(given, batch):
                future.set_result(actions)
        except Exception as error:      # whatever it is: the one who asked is told, and nobody else
            if len(batch) == 1:
                batch[0][1].set_exception(Refused(500, f'{type(error).__name__}: {error}'))
            for request in batch if len(batch) > 1 else []:
                self.answer([request])

    def ask(self, seen):
        """The actions for an observation, from the thread of a connection. Raises Refused."""
        future = Future()
        self.queue.put((seen, future))
        try:
            return future.result(self.patience)
        except (TimeoutError, CancelledError):
            future.cancel()
            raise Refused(503, 'the server ends' if self.ending else f'no answer within {self.patience} s') from None

    def verify_request(self, request, client_address):
        return threading.active_count() < MOST_CONNECTIONS      # the others are hung up on

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):      # that one hung up is not worth a line
            print(f'serve.py: {client_address}: {error!r}', file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
    """A connection; one that is silent for `timeout` seconds is closed."""
    protocol_version, timeout, disable_nagle_algorithm, wbufsize, robot = 'HTTP/1.1', 3600, True, -1, False

    def do_GET(self):
        s = self.server
        holds = {name: dict(dtype=dtype, shape=shape, optional=name in OPTIONAL)
                 for name, (dtype, shape) in s.fields.items()}
        if self.path == '/health':
            self.say(200, json.dumps(dict(ready=not s.ending, observation=holds, actions=dict(
                dtype='float32', shape=s.shape), robots=s.robots, **s.counts)).encode(), 'application/json')
        else:
            self.say(404, f'{self.path[:80]}: expected POST /act or GET /health\n'.encode())

    def do_POST(self):
        s, held, file = self.server, False, io.BytesIO()
        try:
            seen = read(self.body(), s.fields)
            with s.lock:
                s.robots, self.robot = s.robots + (not self.robot), True
            held = s.room.acquire(blocking=False)
            if not held:
                raise Refused(503, f'{s.most_waiting} requests wait: try again later')
            np.save(file, s.ask(seen))
            self.say(200, file.getvalue(), 'application/octet-stream')
        except Refused as error:
            self.say(error.args[0], f'{error.args[1]}\n'.encode())
        finally:
            if held:
                s.room.release()

    def body(self):
        """What follows the head of a request for an action. Raises Refused."""
        closing, self.close_connection = self.close_connection, True        # until all of it is read
        most, patience, given = limit(self.server.fields), self.server.patience, self.headers.get('Content-Length', '')
        if not given[:20].isdecimal() or 'Transfer-Encoding' in self.headers:
            raise Refused(411, f'Content-Length: expected the bytes of the body, got {given[:20]!r}')
        parts, left = [], int(given[:20])
        large = left > most
        self.connection.settimeout(patience)
        try:
            while left and (new := self.rfile.read(min(left, 1 << 20))):        # one too large, too: else its sender
                parts, left = [] if large else [*parts, new], left - len(new)   # would not listen
        except TimeoutError:
            raise Refused(408, f'the body: expected {given} bytes, they did not come in {patience} s') from None
        if left:
            raise ConnectionError('it hung up')
        self.connection.settimeout(self.timeout)
        self.close_connection = closing
        if self.path != '/act':
            raise Refused(404, f'{self.path[:80]}: expected POST /act or GET /health')
        if large:
            raise Refused(413, f'the body: expected at most {most} bytes, for {self.server.fields}, got {given}')
        return b''.join(parts)

    def say(self, status, what, kind='text/plain; charset=utf-8'):
        with self.server.lock:
            self.server.counts['answered' if status == 200 else 'refused'] += self.command == 'POST'
        self.send_response(status)
        for name, value in (('Content-Type', kind), ('Content-Length', len(what)),
                            *([('Connection', 'close')] if self.close_connection else ())):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(what)
        self.wfile.flush()

    def finish(self):
        with self.server.lock:
            self.server.robots -= self.robot
        super().finish()

    def log_message(self, *_):
        pass
