"""What the tests share: the repo's root on sys.path, one thread, tiny pictures and tiny data
sets."""
import atexit
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='cache')     # not the user's
atexit.register(shutil.rmtree, os.environ['XDG_CACHE_HOME'], ignore_errors=True)
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


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
