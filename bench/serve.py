"""What a robot waits for: OMP_NUM_THREADS=1 python bench/serve.py --out_dir=out/policy_metaworld_state

Starts `sample.py --serve_policy` and asks it, with the client that README.md prints, from so many robots at once, each
of which asks again as soon as it has an answer. Prints medians and 99 % quantiles of the time from the call to the
actions, beside the mean time that the policy took for a batch: the rest is the network, the queue and the wait.
"""
import json
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


def client():
    """The class Robot of README.md."""
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    code, = (block for block in blocks if 'class Robot' in block)
    exec(code, names := {})
    return names['Robot']


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def health(port):
    with urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=10) as answer:
        return json.load(answer)


def observation(holds, rng):
    """Random numbers of the shapes that the server wants."""
    make = {'float32': lambda shape: rng.standard_normal(shape, np.float32), 'str': lambda _: 'open the door',
            'uint8': lambda shape: rng.integers(0, 256, shape, np.uint8), 'int64': lambda _: int(rng.integers(100))}
    return {name: make[field['dtype']](field['shape']) for name, field in holds.items()}


def measure(port, count):
    """Seconds of each request, (count, requests)."""
    holds, times, Robot = health(port)['observation'], np.zeros((count, requests + 10)), client()
    start = threading.Barrier(count)

    def ask(i):
        robot, rng = Robot('127.0.0.1', port), np.random.default_rng(i)
        for k in range(-10, requests):
            seen = observation(holds, rng)
            if k in (-10, 0):
                start.wait()
            began = time.perf_counter()
            robot.act(**seen)
            times[i, k] = time.perf_counter() - began
        robot.http.close()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times[:, :requests]


def main():
    port = free_port()
    args = f'--out_dir={out_dir}', f'--device={device}', f'--serve_policy={port}', f'--sample_steps={sample_steps}'
    server = subprocess.Popen([sys.executable, str(ROOT / 'sample.py'), *args], stdout=subprocess.PIPE, text=True)
    try:
        print(server.stdout.readline().strip())
        for count in robots:
            before = health(port)
            began = time.perf_counter()
            ms = 1e3 * np.sort(measure(port, count).flatten())
            rate, after = (requests + 10) * count / (time.perf_counter() - began), health(port)
            batches, answered, busy = (after[k] - before[k] for k in ('batches', 'answered', 'policy_seconds'))
            p50, p99 = np.quantile(ms, [0.5, 0.99])
            print(f'{count} robot{"s" * (count > 1)}: p50 {p50:.1f} ms, p99 {p99:.1f} ms; {rate:.0f} chunks a second; '
                  f'batches of {answered / batches:.1f}, the policy takes {1e3 * busy / batches:.1f} ms for one',
                  flush=True)
    finally:
        server.terminate()
    sys.exit(server.wait(20))


if __name__ == '__main__':
    out_dir = os.path.abspath(configure(globals())['out_dir'])
    main()
