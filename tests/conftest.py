"""What the tests share: the repo's root on sys.path, one thread, tiny pictures and data sets.

Tests of what somebody has deleted are not collected: those that import it, or say so in NEEDS.
"""
import ast
import atexit
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='cache')     # not the user's
atexit.register(shutil.rmtree, os.environ['XDG_CACHE_HOME'], ignore_errors=True)
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


# what may be deleted, as it is imported
ROOMS = ('robots', 'images', 'families', 'serve', 'diffusion', 'pictures', 'tasks')


def needs(path):
    """Files and folders of the project that a test imports, and those of its NEEDS."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ''} | {f'{node.module}.{alias.name}' for alias in node.names}
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'NEEDS':
            yield from ast.literal_eval(node.value)
    for name in found:
        room, _, inside = name.partition('.')
        if room in ROOMS:
            is_folder = (ROOT / room).is_dir()
            yield room if is_folder or (ROOT / f'{room}.py').exists() else f'{room}.py'
        if room == 'tasks' and inside:
            yield f'tasks/{inside.partition(".")[0]}.py'


def is_there(name):
    return (ROOT / name).exists() or (ROOT / f'{name}.py').exists()


collect_ignore = [path.name for path in sorted((ROOT / 'tests').glob('test_*.py'))
                  if not all(is_there(name) for name in needs(path))]


@pytest.fixture(autouse=True)
def a_broken_pipe_is_an_error():
    """--help, called in this process, lets one end it in silence, and all later tests with it."""
    yield
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def picture(number, size=16):
    """An RGBA picture (size, size, 4) of its own for every number: noise with a transparent
    rim."""
    rgba = np.random.default_rng(number).integers(0, 256, (size, size, 4), dtype=np.uint8)
    rgba[..., 3] = 255
    rgba[0], rgba[-1] = 0, 0
    return rgba


def encode(rgba, form='PNG', **options):
    """A picture as the bytes of a file."""
    from PIL import Image
    out = io.BytesIO()
    Image.fromarray(rgba).save(out, form, **options)
    return out.getvalue()


def sample(number, text=None):
    """The members of a sample, {extension: bytes}."""
    return {'png': encode(picture(number)), 'txt': (text or f'name {number}').encode()}


def write_tar(path, samples):
    """A shard as webdataset writes it; samples is a list of (key, {extension: bytes})."""
    import webdataset
    with webdataset.TarWriter(str(path), encoder=False) as sink:
        for key, members in samples:
            sink.write({'__key__': key, **members})


def write_set(folder, shards, manifest=True):
    """A data set of shards, each a list of samples or a number of samples to be made; the
    folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows, count = [], 0
    for i, samples in enumerate(shards):
        if isinstance(samples, int):
            samples = [(f'{count + j:06d}', sample(count + j)) for j in range(samples)]
        write_tar(folder / f'{i:08d}.tar', samples)
        rows.append({'shard': f'{i:08d}', 'num_sequences': len(samples)})
        count += len(samples)
    if manifest:
        (folder / 'manifest.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder


def make_processor(seq_len, size=0, image_tokens=0, prompt='', tokenizer=None, form='auto',
                   task='vlm', draft=True, mean=0.5, std=0.5, **settings):
    """The Processor of a run whose settings are these and the defaults of its task; of bytes,
    where no tokenizer is given. size: of its pictures; 0: it leaves pictures out."""
    import tasks
    from processor import Processor
    from tokenizer import Bytes
    said = dict(task=task, processor=form, seq_len=seq_len, prompt=prompt)
    eyes = None
    if size:
        from pictures import Eyes  # which may be deleted
        eyes = Eyes(size, mean, std, draft)
    return Processor(tasks.defaults(task) | said | settings, tokenizer or Bytes(), form, eyes,
                     image_tokens)


def robot_processor(seq_len, sizes, image_size=0, image_tokens=0, cameras=()):
    """What makes rows of a robot's samples; sizes: action_steps, action_dim, proprio_dim. Without
    an image_size it is blind."""
    names = 'action_steps', 'action_dim', 'proprio_dim'
    return make_processor(seq_len, image_size, image_tokens, task='policy', cameras=list(cameras),
                          **dict(zip(names, sizes)))
