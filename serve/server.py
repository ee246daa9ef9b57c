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
with the observation, by its name; 401 no token; 408 a body that does not come; 413 one that is too
large; 500 what the policy raised; 503 too many wait, the answer took too long, or the server ends.
Nothing is unpickled.

aiohttp speaks HTTP, in one thread; the policy has one of its own.
"""
import asyncio
import contextlib
import hmac
import io
import logging
import math
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakSet

import numpy as np
from aiohttp import web

# dtypes of fields -> numpy's kinds that will do
KINDS = {'float32': 'fiu', 'uint8': 'u', 'int64': 'iu', 'str': 'U'}

MOST_CONNECTIONS = 512
MOST_TEXT = 4096                # characters of a sentence
MOST_MEMBERS = 100              # of an .npz
LARGEST = 2 ** 31 - 1           # of whole numbers
FARTHEST = 1e9                  # from 0, of other numbers: no robot measures more
IDLE = 3600                     # seconds after which a silent connection is closed
PACE = 0.005                    # seconds that each takes at the door
ENDS = 'the server ends'


class Refused(Exception):
    """A request that is not answered: (HTTP's status, why)."""


# -------------------------------------------------------------------------------------------------
# observations: fields, {name: (dtype, shape, optional)}, say what one holds


def read(body, fields):
    """The .npz of an observation -> {name: array, text or whole number}. Raises Refused, which
    names what is wrong, what was expected and what came."""
    known = ', '.join(fields)
    try:
        # A few bytes may list a million members, or unpack to more than there is memory.
        if body.count(b'PK\x01\x02') > MOST_MEMBERS:
            raise ValueError(f'it has more than {MOST_MEMBERS} members')
        file = np.load(io.BytesIO(body), allow_pickle=False)
        size = sum(info.file_size for info in file.zip.infolist())
        if size > limit(fields):
            raise ValueError(f'it unpacks to {size} bytes')
    except Exception as error:          # numpy, zipfile and struct have errors of their own
        raise Refused(400, f'the body: expected an .npz of {known} ({error})') from None

    # A name that is misspelt would else be one that is missing.
    for name in file.files:
        if name not in fields:
            raise Refused(400, f'{name[:80]!r} is unknown: expected {known}')

    out = {}
    for name, (dtype, shape, optional) in fields.items():
        wanted = f'{name}: expected {dtype} {shape}'
        if name in file.files:
            try:
                value = np.asarray(file[name])
            except Exception as error:  # zipfile's, zlib's, and numpy's, MemoryError among them
                raise Refused(400, f'{wanted}, it can not be read ({error})') from None
            out[name] = checked(value, dtype, shape, wanted)
        elif not optional:
            given = ', '.join(file.files) or 'nothing'
            raise Refused(400, f'{wanted}, got nothing; given: {given}')
        elif dtype == 'str':
            out[name] = ''
        else:
            out[name] = 0
    return out


def checked(value, dtype, shape, wanted):
    """An array as the policy takes it: an array of the field's dtype, a text, or a whole number.
    Raises Refused."""
    given = value.dtype
    if value.dtype.kind == 'U':
        given = 'str'

    # Pixels are never converted: other integers have another range.
    is_other_integer = dtype == 'uint8' and given != dtype
    if value.dtype.kind not in KINDS[dtype] or value.shape != shape or is_other_integer:
        raise Refused(400, f'{wanted}, got {given} {value.shape}')
    if dtype == 'str':
        return checked_text(value, wanted)
    if dtype == 'int64' and not 0 <= int(value) <= LARGEST:
        raise Refused(400, f'{wanted} from 0 to {LARGEST}, got {value}')
    if not shape:
        return value.item()

    # A number too large for fp32 becomes infinite here; nan is not near to anything.
    with np.errstate(over='ignore'):
        value = value.astype(dtype)
    bad = np.argwhere(~(np.abs(value) <= FARTHEST))
    if len(bad):
        raise Refused(400, f'{wanted}, finite, at most {FARTHEST:.0e} from 0, got '
                           f'{value[tuple(bad[0])]:g} at {bad[0].tolist()}')
    return value


def checked_text(value, wanted):
    """The text of an array. Raises Refused."""
    try:
        text = value.item()
        text.encode()
    except Exception as error:          # half of a surrogate pair, or what is no character
        raise Refused(400, f'{wanted}, it is no text ({error})') from None
    if len(text) > MOST_TEXT:
        raise Refused(400, f'{wanted} of at most {MOST_TEXT} characters, got {len(text)}')
    return text


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


class Server:
    """act: a list of observations, as `read` gives them -> actions (N, steps, size).

    token: what a request for actions must bring, where it is not empty; wait and timeout in
    seconds. Raises OSError if the port is taken."""

    def __init__(self, act, fields, port, host='127.0.0.1', batch_size=64, wait=0.003,
                 most_waiting=256, timeout=10.0, token=''):
        self.act, self.fields, self.token = act, fields, token
        self.batch_size, self.wait = batch_size, wait
        self.most_waiting, self.patience = most_waiting, timeout
        self.thread, self.loop, self.web = ThreadPoolExecutor(1), None, None
        self.ending = False

        # Requests on their way to the policy, and how many are not answered yet.
        self.queue, self.waiting = asyncio.Queue(), 0
        # Connections whose last request was good; who has none passes the door, one by one.
        self.known, self.door = WeakSet(), asyncio.Lock()
        self.counts = dict(answered=0, refused=0, batches=0, largest_batch=0, policy_seconds=0.0)

        # It listens when it is warm.
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind((host, port))
        self.server_address = self.socket.getsockname()

    @property
    def robots(self):
        """How many connections are open that have asked for actions."""
        return len([connection for connection in self.known if not connection.is_closing()])

    def run(self):
        """Warm up, say that it is ready, and answer until `end`, or a signal. Raises OSError, and
        what `act` raises at first."""
        asyncio.run(self.serve())

    async def serve(self):
        """`run`, in the thread of the network."""
        self.loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.loop.add_signal_handler(number, self.end)
        began = time.perf_counter()
        await self.loop.run_in_executor(self.thread, self.warm_up)

        # What strangers send is not worth a line.
        logging.getLogger('aiohttp.server').disabled = True
        app = web.Application(client_max_size=limit(self.fields), middlewares=[self.guard])
        app.router.add_get('/health', self.say_health)
        app.router.add_post('/act', self.say_actions)
        runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=2,
                               keepalive_timeout=IDLE, lingering_time=self.patience)
        await runner.setup()
        self.web = runner.server
        # With room for a crowd at once: who finds none tries again after a second.
        listening = await self.loop.create_server(
            self.connect, sock=self.socket, backlog=MOST_CONNECTIONS)

        # Whoever started it waits for this line.
        host, port = self.server_address
        url, seconds = f'http://{host}:{port}', time.perf_counter() - began
        print(f'ready at {url}, after {seconds:.1f} s of warm-up; {url}/health says what an '
              'observation holds', flush=True)
        while not self.ending:
            await self.answer(await self.gather())

        # Answers that are on their way arrive.
        listening.close()
        await runner.cleanup()

    def warm_up(self):
        """Batches of growing size, before the first robot waits; the shape of an answer."""
        for n in (1, 1, 2, 4, 8):
            batch = [example(self.fields)] * min(n, self.batch_size)
            self.shape = np.asarray(self.act(batch)).shape[1:]

    def end(self):
        """Let `run` finish the batch at hand and return. From any thread."""
        self.ending = True
        # It may have returned already.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.dismiss)

    def dismiss(self):
        """Tell those that wait that the server ends, and wake up who waits for them."""
        while not self.queue.empty():
            _, future = self.queue.get_nowait()
            if not future.done():
                future.set_exception(Refused(503, ENDS))
        nobody = self.loop.create_future()
        nobody.cancel()
        self.queue.put_nowait(({}, nobody))

    # ---------------------------------------------------------------------------------------------
    # batches

    async def gather(self):
        """Requests that came together: [(observation, Future), ...]."""
        batch = [await self.queue.get()]
        end = self.loop.time() + self.wait
        while len(batch) < self.batch_size and not self.ending:
            if not self.queue.empty():
                batch.append(self.queue.get_nowait())
                continue

            # Each robot has one request at a time: when all have asked nobody else can come.
            left = end - self.loop.time()
            if left <= 0 or len(batch) >= self.robots:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    batch.append(await self.queue.get())
        return batch

    async def answer(self, batch):
        """Give each Future its actions, or Refused."""
        # Who hung up or lost patience is left out.
        batch = [(seen, future) for seen, future in batch if not future.done()]
        if not batch:
            return
        self.counts['batches'] += 1
        self.counts['largest_batch'] = max(self.counts['largest_batch'], len(batch))
        seen = [observation for observation, _ in batch]
        try:
            actions = await self.loop.run_in_executor(self.thread, self.actions, seen)
        except Exception as error:      # whatever it is: the one who asked is told
            if len(batch) > 1:
                # And nobody else: one by one it shows whose observation it was.
                for request in batch:
                    await self.answer([request])
                return
            actions = [Refused(500, f'{type(error).__name__}: {error}')]

        for given, (_, future) in zip(actions, batch):
            if future.done():
                continue
            if isinstance(given, Refused):
                future.set_exception(given)
            else:
                future.set_result(given)

    def actions(self, seen):
        """What the policy gives, in its thread: fp32 (N, steps, size). Raises what it raises."""
        began = time.perf_counter()
        actions = np.asarray(self.act(seen), np.float32)
        self.counts['policy_seconds'] += time.perf_counter() - began
        is_whole = actions.shape == (len(seen), *self.shape)
        if not is_whole or not np.isfinite(actions).all():
            raise ValueError(f'the policy gave {actions.shape} or numbers that are not finite')
        return actions

    # ---------------------------------------------------------------------------------------------
    # requests

    def connect(self):
        """What speaks to a new connection."""
        # It counts once it is made.
        self.loop.call_later(0.01, self.make_room)
        return self.web()

    def make_room(self):
        """Hang up on the oldest connections that have asked for nothing, where there are too
        many."""
        there = [each for each in self.web.connections if each.transport]
        silent = [each for each in there if each.transport not in self.known]
        for each in silent[:max(len(there) - MOST_CONNECTIONS, 0)]:
            each.force_close()

    @web.middleware
    async def guard(self, request, handler):
        """Answer a request, or say why not; count it."""
        # A crowd that asks for nothing good must not take the time of those who do.
        connection = request.transport
        if connection not in self.known or request.path == '/health':
            async with self.door:
                if request.transport:
                    await asyncio.sleep(PACE)
        try:
            self.check_token(request)
            answer = await handler(request)
        except web.HTTPException:
            answer = refusal(404, f'{request.path[:80]!r}: expected POST /act or GET /health')
        except Refused as error:
            answer = refusal(*error.args)

        if 400 <= answer.status < 500:
            self.known.discard(connection)
        # What did not come would be taken for the next request.
        if answer.status in (408, 411):
            answer.force_close()
            await answer.prepare(request)
            await answer.write_eof()
            connection.close()
        if request.method == 'POST':
            self.counts['answered' if answer.status == 200 else 'refused'] += 1
        return answer

    def check_token(self, request):
        """Raises Refused. Whether a server lives may be asked by all."""
        given = request.headers.get('Authorization', '').encode(errors='replace')
        wanted = f'Bearer {self.token}'.encode()
        # In a time that does not tell how much of it is right.
        if self.token and request.path != '/health' and not hmac.compare_digest(given, wanted):
            raise Refused(401, 'expected the header "Authorization: Bearer TOKEN", with the token '
                               'that the server was given')

    async def say_health(self, request):
        """What the server is, for people and clients: enough to write a client from."""
        observation = {}
        for name, (dtype, shape, optional) in self.fields.items():
            observation[name] = dict(dtype=dtype, shape=shape, optional=optional)
        actions = dict(dtype='float32', shape=self.shape)
        return web.json_response(dict(
            ready=not self.ending, observation=observation, actions=actions, robots=self.robots,
            **self.counts))

    async def say_actions(self, request):
        """Actions for an observation."""
        seen = read(await self.body(request), self.fields)
        # From its first good request on this connection is waited for.
        if request.transport:
            self.known.add(request.transport)
        if self.ending:
            raise Refused(503, ENDS)
        # Refused at once rather than after a wait that has no hope.
        if self.waiting >= self.most_waiting:
            raise Refused(503, f'{self.most_waiting} requests wait: try again later')

        file, future = io.BytesIO(), self.loop.create_future()
        self.queue.put_nowait((seen, future))
        self.waiting += 1
        try:
            async with asyncio.timeout(self.patience):
                np.save(file, await future)
        except TimeoutError:
            raise Refused(503, f'no answer within {self.patience} s') from None
        finally:
            self.waiting -= 1
        return web.Response(body=file.getvalue())

    async def body(self, request):
        """What follows the head of a request for an action. Raises Refused."""
        size = request.content_length
        if size is None:
            given = request.headers.get('Transfer-Encoding', 'nothing')
            raise Refused(411, f'Content-Length: expected the bytes of the body, got {given[:20]}')
        try:
            async with asyncio.timeout(self.patience):
                return await request.read()
        except TimeoutError:
            raise Refused(408, f'the body: expected {size} bytes, they did not come in '
                               f'{self.patience} s') from None
        except web.HTTPRequestEntityTooLarge:
            known = ', '.join(self.fields)
            raise Refused(413, f'the body: expected at most {limit(self.fields)} bytes with '
                               f'{known}, got {size}') from None
        except web.RequestPayloadError:
            raise ConnectionResetError('it hung up') from None


def refusal(status, why):
    """An answer of one line."""
    line = ' '.join(why.split()) + '\n'
    return web.Response(status=status, body=line.encode(errors='replace'),
                        content_type='text/plain', charset='utf-8')
