"""A robot policy over HTTP: an observation in, a chunk of actions out.

    python sample.py --out_dir=out/policy_metaworld_state --serve_policy=8000

    POST /act       body: an .npz (numpy.savez) of the observation; the answer: an .npy, fp32
                    (steps, action size)
    GET  /health    JSON: what an observation holds, by name, dtype and shape; how many requests
                    and batches there were

A robot keeps its connection open. Requests that come together are one batch: the first waits
until every robot that has a connection is there, 3 ms at most. An answer is a function of the
observation alone (its noise of `seed` and `step`, which the robot counts), but for the rounding
that a batch's size decides. What can not be answered gets a status and one line: 400 what is wrong
with the observation, by its name; 408 a body that does not come; 413 one that is too large; 500
what the policy raised; 503 too many wait, the answer took too long, or the server ends. Nothing is
unpickled.
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

# dtypes of fields -> numpy's kinds that will do
KINDS = {'float32': 'fiu', 'uint8': 'u', 'int64': 'iu', 'str': 'U'}

MOST_CONNECTIONS = 256
MOST_TEXT = 4096                # characters of a sentence
LARGEST = 2 ** 31 - 1           # of whole numbers


class Refused(Exception):
    """A request that is not answered: (HTTP's status, why)."""


# -------------------------------------------------------------------------------------------------
# observations: fields, {name: (dtype, shape, optional)}, say what one holds


def read(body, fields):
    """The .npz of an observation -> {name: array, text or whole number}. Raises Refused, which
    names what is wrong, what was expected and what came."""
    known = ', '.join(fields)
    try:
        file = zipfile.ZipFile(io.BytesIO(body))
        members = {info.filename.removesuffix('.npy'): info for info in file.infolist()}
    except Exception as error:          # zipfile and struct have errors of their own
        raise Refused(400, f'the body: expected an .npz of {known} ({error})') from None

    # A name that is misspelt would else be one that is missing.
    for name in members:
        if name not in fields:
            raise Refused(400, f'{name[:80]!r} is unknown: expected {known}')

    out, most = {}, limit(fields)
    for name, (dtype, shape, optional) in fields.items():
        wanted = f'{name}: expected {dtype} {shape}'
        if name in members:
            value = read_member(file, members[name], most, wanted)
            out[name] = checked(name, value, dtype, shape, wanted)
        elif not optional:
            given = ', '.join(members) or 'nothing'
            raise Refused(400, f'{wanted}, got nothing; given: {given}')
        elif dtype == 'str':
            out[name] = ''
        else:
            out[name] = 0
    return out


def read_member(file, info, most, wanted):
    """An array of a .npz, of at most so many bytes. Raises Refused."""
    try:
        # A few bytes may unpack to more than there is memory.
        if info.file_size > most:
            raise ValueError(f'it unpacks to {info.file_size} bytes')
        with file.open(info) as f:
            return np.lib.format.read_array(f, allow_pickle=False)
    except Exception as error:          # zipfile's, zlib's, and numpy's, MemoryError among them
        raise Refused(400, f'{wanted}, it can not be read ({error})') from None


def checked(name, value, dtype, shape, wanted):
    """An array as the policy takes it: an array of the field's dtype, a text, or a whole number.
    Raises Refused."""
    given = value.dtype
    if value.dtype.kind == 'U':
        given = 'str'

    # Pixels are never converted: other integers have another range.
    is_other_integer = dtype == 'uint8' and given != dtype
    if value.dtype.kind not in KINDS[dtype] or value.shape != shape or is_other_integer:
        raise Refused(400, f'{wanted}, got {given} {value.shape}')

    if dtype == 'str' and len(str(value)) > MOST_TEXT:
        raise Refused(400, f'{wanted} of at most {MOST_TEXT} characters, got {len(str(value))}')
    if dtype == 'int64' and not 0 <= int(value) <= LARGEST:
        raise Refused(400, f'{wanted} from 0 to {LARGEST}, got {value}')
    if not shape:
        return value.item()

    # A number too large for fp32 becomes infinite here.
    with np.errstate(over='ignore'):
        value = value.astype(dtype)
    bad = np.argwhere(~np.isfinite(value))
    if len(bad):
        raise Refused(400, f'{wanted}, finite, got {value[tuple(bad[0])]} at {bad[0].tolist()}')
    return value


def limit(fields):
    """Bytes that a request may have: enough for shapes that are somewhat wrong to be told so."""
    return (4 << 20) + sum(8 * math.prod(shape) for _, shape, _ in fields.values())


def example(fields):
    """An observation of zeros, for the warm-up."""
    out = {}
    for name, (dtype, shape, _) in fields.items():
        if dtype == 'str':
            out[name] = 'warm up'
        elif shape:
            out[name] = np.zeros(shape, dtype)
        else:
            out[name] = 0
    return out


# -------------------------------------------------------------------------------------------------
# the server


class Server(socketserver.ThreadingTCPServer):
    """act: a list of observations, as `read` gives them -> actions (N, steps, size).

    It runs in the thread that calls `run`; each connection has a thread of its own. wait and
    timeout in seconds. Raises OSError if the port is taken."""
    allow_reuse_address = daemon_threads = True
    request_queue_size = 128

    def __init__(self, act, fields, port, host='127.0.0.1', batch_size=64, wait=0.003,
                 most_waiting=256, timeout=10.0):
        super().__init__((host, port), Handler, bind_and_activate=False)
        self.act, self.fields = act, fields
        self.batch_size, self.wait, self.patience = batch_size, wait, timeout

        # Requests on their way from the connections' threads to the policy's.
        self.queue = queue.SimpleQueue()
        self.room, self.most_waiting = threading.Semaphore(most_waiting), most_waiting
        self.ending = False

        # What the connections' threads change together, under the lock: how many have asked.
        self.lock, self.robots = threading.Lock(), 0
        self.counts = dict(answered=0, refused=0, batches=0, largest_batch=0, policy_seconds=0.0)
        self.server_bind()

    def run(self):
        """Warm up, say that it is ready, and answer until `end`. Raises OSError, and what `act`
        raises at first."""
        began = time.perf_counter()
        self.warm_up()
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

        # Whoever started it waits for this line.
        host, port = self.server_address
        url, seconds = f'http://{host}:{port}', time.perf_counter() - began
        print(f'ready at {url}, after {seconds:.1f} s of warm-up; {url}/health says what an '
              'observation holds', flush=True)

        # Who hung up or lost patience is left out.
        while not self.ending:
            gathered = self.gather()
            batch = [pair for pair in gathered if pair[1].set_running_or_notify_cancel()]
            if batch:
                self.answer(batch)

        # Those that still wait are told that it ends.
        while not self.queue.empty():
            _, future = self.queue.get()
            future.cancel()
        self.shutdown()

        # What was answered is on its way: room for all again says that it has arrived.
        end = time.monotonic() + 2
        for _ in range(self.most_waiting):
            self.room.acquire(timeout=max(end - time.monotonic(), 0))
        self.server_close()

    def warm_up(self):
        """Batches of growing size, before the first robot waits; the shape of an answer."""
        for n in (1, 1, 2, 4, 8):
            batch = [example(self.fields)] * min(n, self.batch_size)
            self.shape = np.asarray(self.act(batch)).shape[1:]

    def end(self, *_):
        """Let `run` finish the batch at hand and return. From any thread, or as a signal's
        handler."""
        self.ending = True
        self.queue.put((None, Future()))        # wakes it up

    def gather(self):
        """Requests that came together: [(observation, Future)], or none for a while."""
        # Not for ever: a signal that another thread was given does not wake this one, which
        # handles it.
        try:
            batch = [self.queue.get(timeout=0.2)]
        except queue.Empty:
            return []

        # Each robot has one request at a time: when all have asked nobody else can come.
        end = time.monotonic() + self.wait
        while len(batch) < self.batch_size and not self.ending:
            left = 0
            if len(batch) < self.robots:
                left = max(end - time.monotonic(), 0)
            try:
                batch.append(self.queue.get(timeout=left))
            except queue.Empty:
                break

        # None is what woke it up.
        return [(seen, future) for seen, future in batch if seen is not None]

    def answer(self, batch):
        """Give each Future its actions, or Refused."""
        self.counts['batches'] += 1
        self.counts['largest_batch'] = max(self.counts['largest_batch'], len(batch))
        began = time.perf_counter()
        try:
            actions = np.asarray(self.act([seen for seen, _ in batch]), np.float32)
            self.counts['policy_seconds'] += time.perf_counter() - began
            is_whole = actions.shape == (len(batch), *self.shape)
            if not is_whole or not np.isfinite(actions).all():
                raise ValueError(f'the policy gave {actions.shape} or numbers that are not finite')
            for chunk, (_, future) in zip(actions, batch):
                future.set_result(chunk)
        except Exception as error:      # whatever it is: the one who asked is told
            if len(batch) == 1:
                _, future = batch[0]
                future.set_exception(Refused(500, f'{type(error).__name__}: {error}'))
                return

            # And nobody else: one by one it shows whose observation it was.
            for request in batch:
                self.answer([request])

    def ask(self, seen):
        """The actions for an observation, from the thread of a connection. Raises Refused."""
        future = Future()
        self.queue.put((seen, future))
        try:
            return future.result(self.patience)
        except (TimeoutError, CancelledError):
            # So that no batch has it any more.
            future.cancel()
            why = f'no answer within {self.patience} s'
            if self.ending:
                why = 'the server ends'
            raise Refused(503, why) from None

    def verify_request(self, request, client_address):
        """Too many connections: the others are hung up on."""
        return threading.active_count() < MOST_CONNECTIONS

    def handle_error(self, request, client_address):
        """One line; that one hung up is not worth it."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f'serve/server.py: {client_address}: {error!r}', file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
    """A connection; one that is silent for `timeout` seconds is closed."""
    protocol_version = 'HTTP/1.1'       # the connection stays open
    timeout = 3600

    # An answer leaves at once, in as few packets as it fits into.
    disable_nagle_algorithm, wbufsize = True, -1

    # Has it asked for actions? Only those that have are waited for.
    is_robot = False

    def do_GET(self):
        """What the server is, for people and clients."""
        server = self.server
        if self.path != '/health':
            self.say(404, f'{self.path[:80]}: expected POST /act or GET /health\n'.encode())
            return

        # Enough to write a client from.
        observation = {}
        for name, (dtype, shape, optional) in server.fields.items():
            observation[name] = dict(dtype=dtype, shape=shape, optional=optional)
        actions = dict(dtype='float32', shape=server.shape)
        health = dict(ready=not server.ending, observation=observation, actions=actions,
                      robots=server.robots, **server.counts)
        self.say(200, json.dumps(health).encode(), 'application/json')

    def do_POST(self):
        """Actions for an observation."""
        server, has_room, file = self.server, False, io.BytesIO()
        try:
            seen = read(self.body(), server.fields)

            # From its first good request on this connection is waited for.
            with server.lock:
                if not self.is_robot:
                    server.robots += 1
                self.is_robot = True

            # Refused at once rather than after a wait that has no hope.
            has_room = server.room.acquire(blocking=False)
            if not has_room:
                raise Refused(503, f'{server.most_waiting} requests wait: try again later')
            np.save(file, server.ask(seen))
            self.say(200, file.getvalue(), 'application/octet-stream')
        except Refused as error:
            status, why = error.args
            self.say(status, f'{why}\n'.encode())
        finally:
            if has_room:
                server.room.release()

    def body(self):
        """What follows the head of a request for an action. Raises Refused."""
        # Until all of it is read nothing else can be heard on this connection.
        closing, self.close_connection = self.close_connection, True
        most, patience = limit(self.server.fields), self.server.patience
        given = self.headers.get('Content-Length', '')
        if not given[:20].isdecimal() or 'Transfer-Encoding' in self.headers:
            raise Refused(411, 'Content-Length: expected the bytes of the body, got '
                               f'{given[:20]!r}')

        # A body has less time than a connection: who sends one is in the middle of something.
        size = int(given[:20])
        is_large = size > most
        try:
            self.connection.settimeout(patience)
            parts = self.parts(size, is_large)
        except TimeoutError:
            raise Refused(408, f'the body: expected {given} bytes, they did not come in '
                               f'{patience} s') from None
        self.connection.settimeout(self.timeout)
        self.close_connection = closing

        # These are told only now, when the sender listens and the connection may go on.
        if self.path != '/act':
            raise Refused(404, f'{self.path[:80]}: expected POST /act or GET /health')
        if is_large:
            known = ', '.join(self.server.fields)
            raise Refused(413, f'the body: expected at most {most} bytes with {known}, '
                               f'got {given[:20]}')
        return b''.join(parts)

    def parts(self, size, is_large):
        """A body in pieces. One too large is read, too, and forgotten: its sender would not listen
        before. Raises ConnectionError."""
        parts, left = [], size
        while left:
            part = self.rfile.read(min(left, 1 << 20))
            if not part:
                raise ConnectionError('it hung up')
            left -= len(part)
            if not is_large:
                parts.append(part)
        return parts

    def say(self, status, what, kind='text/plain; charset=utf-8'):
        """Answer, and count it."""
        if self.command == 'POST':
            with self.server.lock:
                if status == 200:
                    self.server.counts['answered'] += 1
                else:
                    self.server.counts['refused'] += 1
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', len(what))
        if self.close_connection:
            self.send_header('Connection', 'close')
        self.end_headers()
        self.wfile.write(what)
        self.wfile.flush()

    def finish(self):
        """The robot is gone: nobody waits for it."""
        if self.is_robot:
            with self.server.lock:
                self.server.robots -= 1
        super().finish()

    def log_message(self, *_):
        """Not a line for each request."""
