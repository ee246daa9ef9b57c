"""What a robot waits for: OMP_NUM_THREADS=1 python bench/serve.py --out_dir=out/policy_...

Starts `sample.py --serve_policy` and asks it, with the client that docs/robots.md prints, from so
many robots at once, each of which asks again as soon as it has an answer. Prints medians and 99 %
quantiles of the time from the call to the actions, beside the mean time that the policy took for a
batch: the rest is the network, the queue and the wait.

With --silent=300 --busy=50 it asks again beside a crowd: connections that say nothing, and
connections that send nonsense again and again.
"""
import asyncio
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configurator import configure  # noqa: E402

out_dir = 'out/policy_metaworld_state'
robots = [1, 8]                 # at once
requests = 300                  # of each robot, after 10 that warm up
sample_steps = 10
device = 'auto'
silent = 0                      # connections of a crowd that say nothing,
busy = 0                        # and those that ask again and again, for nothing good


def client():
    """The class Robot of docs/robots.md."""
    # What users copy is what is measured.
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'robots.md').read_text(), re.S)
    code, = (block for block in blocks if 'class Robot' in block)
    names = {}
    exec(code, names)
    return names['Robot']


def free_port():
    # Port 0: one that the system knows to be free.
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def health(port):
    with urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=10) as answer:
        return json.load(answer)


def observation(fields, rng):
    """Random numbers of the shapes that the server wants."""
    seen = {}
    for name, field in fields.items():
        if field['dtype'] == 'float32':
            seen[name] = rng.standard_normal(field['shape'], np.float32)
        elif field['dtype'] == 'uint8':
            seen[name] = rng.integers(0, 256, field['shape'], np.uint8)
        elif field['dtype'] == 'int64':
            seen[name] = int(rng.integers(100))
        # An instruction.
        else:
            seen[name] = 'open the door'
    return seen


def measure(port, count):
    """Seconds of each request, (count, requests)."""
    fields = health(port)['observation']
    Robot = client()
    times = np.zeros((count, requests))
    start = threading.Barrier(count)

    def ask(number):
        robot, rng = Robot('127.0.0.1', port), np.random.default_rng(number)
        for i in range(-10, requests):
            seen = observation(fields, rng)
            # Robots connect at different times, so they wait for each other, before and after
            # those that warm up.
            if i in (-10, 0):
                start.wait()
            began = time.perf_counter()
            robot.act(**seen)
            if i >= 0:
                times[number, i] = time.perf_counter() - began
        robot.http.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


async def pester(port):
    """The crowd, until it is killed."""
    async def ask(reader, writer):
        while True:
            writer.write(b'POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}')
            head = await reader.readuntil(b'\r\n\r\n')
            await reader.readexactly(int(re.search(rb'Content-Length: (\d+)', head)[1]))

    streams = [await asyncio.open_connection('127.0.0.1', port) for _ in range(silent + busy)]
    await asyncio.gather(*(ask(*stream) for stream in streams[:busy]))


def report_crowd(port):
    """`report` beside a crowd."""
    crowd = multiprocessing.get_context('fork').Process(
        target=lambda: asyncio.run(pester(port)), daemon=True)
    crowd.start()
    time.sleep(1)
    print(f'beside {silent} silent and {busy} busy connections:')
    for count in robots:
        report(port, count)
    crowd.kill()


def report(port, count):
    """Print what `count` robots at once wait for."""
    before = health(port)
    began = time.perf_counter()
    milliseconds = 1e3 * measure(port, count)
    rate = (requests + 10) * count / (time.perf_counter() - began)
    # What the slowest see, as a robot waits for each of its chunks.
    p50, p99 = np.quantile(milliseconds, [0.5, 0.99])

    # The server's own counts, of these requests alone.
    after = health(port)
    batches, answered, busy = (
        after[key] - before[key] for key in ('batches', 'answered', 'policy_seconds'))
    robots_said = '1 robot' if count == 1 else f'{count} robots'
    print(f'{robots_said}: p50 {p50:.1f} ms, p99 {p99:.1f} ms; {rate:.0f} chunks a second; '
          f'batches of {answered / batches:.1f}, the policy takes {1e3 * busy / batches:.1f} ms '
          'for one', flush=True)


def main():
    port = free_port()
    command = [
        sys.executable, str(ROOT / 'sample.py'), f'--out_dir={out_dir}', f'--device={device}',
        f'--serve_policy={port}', f'--sample_steps={sample_steps}']
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        # It says where it listens once it does.
        print(server.stdout.readline().strip())
        for count in robots:
            report(port, count)
        if silent + busy:
            report_crowd(port)
    finally:
        server.terminate()
    sys.exit(server.wait(20))


if __name__ == '__main__':
    # The server may be started in another folder.
    out_dir = os.path.abspath(configure(globals())['out_dir'])
    main()
