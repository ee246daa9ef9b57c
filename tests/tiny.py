"""What the tests of commands share: tiny data sets, a tiny model, and ways to run a command.

Most commands run in a process of their own that a server forks after it has imported torch and the
other libraries (none of ours), which saves two seconds a command and a rank; `real=True` starts
the interpreter or torchrun as a user does. Both run the script's file as `__main__` with its
arguments, working directory, signals and exit code.
"""
import atexit
import functools
import gc
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ENV = {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'MPLBACKEND': 'Agg'}
VIT = ['--vit.image_size=16', '--vit.patch_size=8', '--vit.width=32', '--vit.depth=1',
       '--vit.mlp_dim=64', '--vit.num_heads=2']
DECODER = ['--decoder.width=32', '--decoder.depth=2', '--decoder.mlp_dim=64',
           '--decoder.num_heads=2', '--decoder.head_dim=16']
MODEL = [*VIT, *DECODER]
DROPOUT = ['--vit.dropout=0.1', '--decoder.dropout=0.1']
TRAINING = ['--device=cpu', '--tokenizer=bytes', '--seq_len=64', '--batch_size=12', '--lanes=8',
            '--window=4', '--workers=0', '--log_every=1', '--warmup=0.2', '--lr=5e-3']
FLAGS = [*MODEL, *TRAINING, '--augment=true']
LLM_FLAGS = ['--task=llm', *DECODER, *TRAINING]     # it has no pictures
ROW_KEYS = set('step samples tokens epoch loss lr grad_norm samples_per_sec '
               'samples_per_sec_per_gpu tokens_per_sec tokens_per_sec_per_gpu data_time '
               'step_time val_time save_time eta mem_gb bad_samples'.split())

# -----------------------------------------------------------------------------------------------
# data: twelve shapes in three styles, and a set of captions of very unequal length, a third of
# them without a picture

COLOURS = {'red': (220, 20, 20), 'green': (20, 190, 20), 'blue': (20, 40, 230)}
SHAPES = ('square', 'disc', 'bar', 'cross')
NAMES = [f'{colour} {shape}' for colour in COLOURS for shape in SHAPES]


def draw(name, style):
    """RGBA uint8 (16, 16, 4) of 'red square' in a style: plain, dark or held (never trained
    on)."""
    colour, shape = name.split()
    shift = 1 if style == 'held' else 0
    y, x = np.mgrid[:16, :16] - 7.5 - shift
    inside = {'square': np.maximum(abs(x), abs(y)) < 5, 'disc': x ** 2 + y ** 2 < 25,
              'bar': abs(y) < 2, 'cross': np.minimum(abs(x), abs(y)) < 2}[shape]
    picture = np.zeros((16, 16, 4), np.uint8)
    if style == 'dark':
        picture[:] = (40, 40, 40, 255)
    ink = np.array(COLOURS[colour]) // 2 + (
        100 if style == 'dark' else 60 if style == 'held' else 0)
    picture[inside] = (*ink, 255)
    return picture


def png(picture):
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(picture).save(file, 'png')
    return file.getvalue()


def write(folder, samples, cut=None):
    """A data set of two unequal shards from [(key, picture bytes or None, caption), ...], with its
    manifest."""
    import webdataset
    folder.mkdir(parents=True)
    cut = len(samples) // 3 if cut is None else cut
    with open(folder / 'manifest.jsonl', 'w') as manifest:
        for name, rows in (('00000000', samples[:cut]), ('00000001', samples[cut:])):
            with webdataset.TarWriter(str(folder / f'{name}.tar'), mtime=0) as tar:
                for key, picture, caption in rows:
                    tar.write(
                        {'__key__': key, 'txt': caption} | ({'png': picture} if picture else {}))
            manifest.write(json.dumps({'shard': name, 'num_sequences': len(rows)}) + '\n')


def styled(style):
    return [(f'{style}-{i:02}', png(draw(name, style)), name) for i, name in enumerate(NAMES)]


def long_samples():
    """25 captions of 1, 3, 5 ... 49 characters, so that a sum of lengths tells who is in it; a
    third lack a picture."""
    rng = np.random.default_rng(0)
    captions = [''.join(rng.choice(list('abcdefgh'), 2 * i + 1)) for i in range(25)]
    return [(f'long-{i:02}', None if i % 3 == 0 else png(draw(NAMES[i % 12], 'dark')), captions[i])
            for i in rng.permutation(25)]


SETS = {'plain': styled('plain'), 'dark': styled('dark'), 'held': styled('held'),
        'long': long_samples(), 'odd': [sample for sample in long_samples() if sample[1]][:9],
        'words': [(f'words-{i:02}', None, name) for i, name in enumerate(NAMES)]}


@functools.cache
def data_dir():
    """The folder of the data sets, made once and removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix='tiny'))
    atexit.register(shutil.rmtree, folder)
    for name, samples in SETS.items():
        write(folder / name, samples)
    return folder


def row_length(sample, patches=4):
    """Tokens of a training row without its padding: patches, bos, newline | caption, eos; or bos,
    text, eos."""
    _, picture, caption = sample
    return (patches + 2 if picture else 1) + len(caption.encode()) + 1


# -----------------------------------------------------------------------------------------------
# processes


class Process:
    """A command that runs; `wait` gives its Result."""

    def __init__(self, script, args, cwd=None, env=None, real=False, torchrun=0):
        self.folder = tempfile.TemporaryDirectory(prefix='tiny')
        self.files = [os.path.join(self.folder.name, name) for name in ('out', 'err')]
        for path in self.files:
            Path(path).touch()
        args, cwd = [str(a) for a in args], str(cwd or ROOT)
        self.popen = None
        if not real:
            self.server = server()
            self.pid = self.server.start(
                str(ROOT / script), args, cwd, dict(env or {}), self.files, torchrun)
            return
        launcher = [sys.executable]
        if torchrun:
            ranks, *options = torchrun if isinstance(torchrun, list) else [torchrun]
            launcher += ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}',
                         '--standalone', *options]
        with open(self.files[0], 'w') as out, open(self.files[1], 'w') as err:
            self.popen = subprocess.Popen(
                [*launcher, str(ROOT / script), *args], cwd=cwd, stdout=out, stderr=err,
                stdin=subprocess.DEVNULL, env=os.environ | ENV | (env or {}),
                start_new_session=True)
        self.pid = self.popen.pid

    def wait(self, timeout=180):
        try:
            code = self.popen.wait(timeout) if self.popen else self.server.code(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self.popen.wait() if self.popen else self.server.code(timeout)
            raise AssertionError(
                f'still running after {timeout} s: {self.result(None).err}') from None
        return self.result(code)

    def result(self, code):
        return Result(code, *(Path(path).read_text() for path in self.files))


class Result:
    """Exit code, stdout and stderr of a command."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err
        self.lines = [line for line in err.replace('\r', '\n').split('\n') if line.strip()]

    def ok(self):
        assert self.code == 0, f'exit code {self.code}\n{self.out}\n{self.err}'
        assert 'Traceback' not in self.err, self.err
        return self

    def refused(self, *words, code=2):
        """Exactly one line on stderr, which holds all of `words`."""
        assert self.code == code, f'exit code {self.code}, not {code}\n{self.out}\n{self.err}'
        assert len(self.lines) == 1, self.err
        assert all(
            str(word) in self.lines[0] for word in words), f'{words} not in {self.lines[0]!r}'
        return self

    def failed(self, *words, code=1):
        """A failure at run time, among progress bars: one line of the script's own that holds
        `words`; no traceback."""
        assert self.code == code, f'exit code {self.code}, not {code}\n{self.out}\n{self.err}'
        assert 'Traceback' not in self.err, self.err
        own = [line for line in self.lines if line.startswith(
            ('train.py: ', 'sample.py: ', 'data.py: '))]
        assert len(own) == 1, self.err
        assert all(str(word) in own[0] for word in words), f'{words} not in {own[0]!r}'
        return self


def run(script, *args, timeout=180, **kwargs):
    """Run a script of the repository to its end; its Result."""
    return Process(script, args, **kwargs).wait(timeout)


class Server:
    """Forks a process for each command, out of one that has the libraries imported. One command at
    a time."""

    def __init__(self):
        self.popen = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | ENV, text=True, bufsize=1)

    def start(self, *request):
        self.popen.stdin.write(json.dumps(request) + '\n')
        return int(self.popen.stdout.readline())

    def code(self, timeout):
        if not select.select([self.popen.stdout], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired('server', timeout)
        return int(self.popen.stdout.readline())

    def close(self):
        self.popen.stdin.close()
        self.popen.wait()


@functools.cache
def server():
    started = Server()
    atexit.register(started.close)
    return started


def import_libraries():
    """What a command imports and does not keep apart from others."""
    import matplotlib.pyplot
    import PIL.PngImagePlugin  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch._dynamo  # noqa: F401  (an optimizer imports it)
    import torch.distributed.checkpoint  # noqa: F401
    import torch.nn.parallel  # noqa: F401
    import torch.utils.data  # noqa: F401
    import torch.utils.flop_counter  # noqa: F401
    import tqdm  # noqa: F401
    matplotlib.pyplot.figure(layout='constrained').savefig(io.BytesIO())
    matplotlib.pyplot.close()


def serve():
    """The server's side: read a request, fork, answer with the process id and then the exit
    code."""
    import_libraries()
    gc.freeze()     # else every child walks through all that was imported
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return child(*request)
        os.write(1, f'{pid}\n'.encode())
        os.write(1, f'{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n'.encode())


def child(script, args, cwd, env, files, ranks):
    """Become the command, or so many ranks of it."""
    os.setsid()
    os.chdir(cwd)
    os.environ.update(env)
    for fd, path in ((0, os.devnull), *zip((1, 2), files)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), fd)
    if ranks:
        torchrun(ranks)
    prepare_torch(env)
    sys.argv, sys.path[0] = [script, *args], os.path.dirname(script)
    code = 1
    try:
        runpy.run_path(script, run_name='__main__')
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        # a script may have its own
        sys.excepthook(*sys.exc_info())
    leave(code)


def prepare_torch(env):
    """What torch reads when it is imported, and COMPILE_BACKEND: of torch.compile, inductor is
    slow."""
    import torch
    if 'TORCH_LOGS' in env:
        torch._logging._init_logs()
    if 'COMPILE_BACKEND' in env:
        torch.compile = functools.partial(torch.compile, backend=env['COMPILE_BACKEND'])


def leave(code):
    """What Python does at its end, but for taking every module to pieces: a third of a command."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def torchrun(ranks):
    """Go on as each of so many ranks, while this process waits as torchrun would: when one fails,
    the others end."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        address = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(s.getsockname()[1]),
                   'WORLD_SIZE': str(ranks)}
    running = {}
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            os.environ.update(address | {'RANK': str(rank), 'LOCAL_RANK': str(rank)})
            return
        running[pid] = rank
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in running])
    failed = False
    while running:
        pid, status = os.wait()
        running.pop(pid)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    os._exit(failed)


# -----------------------------------------------------------------------------------------------
# reading a run


def rows(out_dir, key='loss'):
    """The rows of log.jsonl that have a key; key=None: all. A last row that is being written is
    left out."""
    path = Path(out_dir) / 'log.jsonl'
    text = path.read_text() if path.exists() else ''
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]
    return [row for row in found if key is None or key in row]


def losses(out_dir):
    """What must not depend on when a run was killed: every row, less times and memory."""
    drop = {'data_time', 'step_time', 'val_time', 'save_time', 'eta', 'mem_gb', 'mfu'}
    return [{k: v for k, v in row.items() if k not in drop and 'per_sec' not in k}
            for row in rows(out_dir, None)]


def names(out_dir):
    """Names of all that is in checkpoints/ but the link."""
    return sorted(p.name for p in (Path(out_dir) / 'checkpoints').iterdir() if p.name != 'latest')


def weights(out_dir, checkpoint='latest'):
    from safetensors.numpy import load_file
    return load_file(Path(out_dir) / 'checkpoints' / checkpoint / 'model.safetensors')


def same_weights(a, b):
    """Bit for bit."""
    assert a.keys() == b.keys()
    different = [k for k in a if a[k].dtype != b[k].dtype or a[k].tobytes() != b[k].tobytes()]
    assert not different, f'these differ: {different}'


def wait_until(condition, process=None, timeout=60):
    """Poll; False if `process` is over first."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, 'it did not come to pass'
        if process is not None:
            if process.popen:
                if process.popen.poll() is not None:
                    return False
            elif select.select([process.server.popen.stdout], [], [], 0)[0]:
                return False
        time.sleep(0.0005)
    return True


if __name__ == '__main__':
    serve()
