"""Latents of a data set's pictures, computed once: training then does without the autoencoder.

    python prepare/latents.py --data=datasets/mine --vae=<folder of diffusers> --image_size=512

writes datasets/mine-latents, for task=t2i with denoiser=unet. For every shard of --data it has one
of the same name: each sample's picture becomes `key.latents.npy`, float16 (2 C, H / 8, W / 8), the
means and standard deviations of its latent times the autoencoder's scaling_factor, from which
training draws anew every time; its other members stay as they are. Pictures are made squares as
train.py makes them. Samples that can not be used are left out, named and counted. Interrupted, the
same command goes on with the next shard; latents.json says what they were made with, and other
settings are refused. manifest.jsonl comes last.

Axes: B batch, C channels of a latent, H, W pixels of a side.
"""
import io
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from webdataset import TarWriter  # noqa: E402

import manifests  # noqa: E402
import parallel  # noqa: E402
import shards  # noqa: E402
from checkpoint import write_json  # noqa: E402
from configurator import configure  # noqa: E402
from families import diffusers  # noqa: E402
from pictures import Eyes  # noqa: E402
from processor import ENDINGS, fields  # noqa: E402
from shards import BadSample, Folder  # noqa: E402
from tokenizer import read_json  # noqa: E402

data = ''                       # data set of pictures and captions
out = ''                        # empty: beside it, <data>-latents
vae = ''                        # folder of diffusers that has vae/
image_size = 512                # pixels of a side
image_draft = True              # JPEGs may be decoded at 1/2, 1/4 or 1/8, if at least image_size
batch_size = 8                  # pictures at once
dtype = 'float32'               # float32 | bfloat16
device = 'auto'                 # auto: cuda if there is one, else cpu
max_bad_fraction = 0.001        # more unusable samples than this are an error
data_dir = 'datasets'           # where data sets are, else as paths
cache_dir = shards.CACHE


def fail(message, code):
    """End with one line on stderr."""
    print(f'prepare/latents.py: {message}', file=sys.stderr)
    sys.exit(code)


def pictures(folder, shard, eyes, bad):
    """Yield (key, members, picture uint8 (H, W, 3)) of a shard; `bad` gets a line a bad sample."""
    for index in range(folder.sizes[shard]):
        try:
            members = folder.read(shard, index)
            sample = fields(members)
            images = sample['pictures']
            if len(images) != 1 or 'latents.npy' in members:
                raise BadSample(f'{len(images)} pictures: expected one')
            yield folder.key(shard, index), members, eyes.pixels_of(images[0], sample)
        except BadSample as error:
            name, key = folder.name(shard), folder.key(shard, index)
            bad.append(f'{folder.base}{name}.tar, {key}: {error}')


def batches(samples, size):
    """Yield lists of `size` samples, the last one shorter."""
    batch = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.inference_mode()
def moments(vae, eyes, batch, device, dtype):
    """Pictures uint8 (B, H, W, 3) -> float16 (B, 2 C, H / 8, W / 8)."""
    pixels = eyes.to_tensor(np.stack(batch), device)
    is_mixed = dtype != torch.float32
    with torch.autocast(torch.device(device).type, dtype, enabled=is_mixed):
        return torch.cat(vae.moments(pixels), 1).half().cpu().numpy()


def write_shard(path, samples, vae, eyes, batch_size, device, dtype):
    """The samples of one shard, under another name until it is whole; how many they were."""
    count = 0
    # without times and owners: the same pictures give the same bytes
    with open(f'{path}.part', 'wb') as file, \
            TarWriter(file, user='', group='', mode=0o644, mtime=0, encoder=False) as sink:
        for batch in batches(samples, batch_size):
            images = [picture for _, _, picture in batch]
            latents = moments(vae, eyes, images, device, dtype)
            for (key, members, _), latent in zip(batch, latents):
                npy = io.BytesIO()
                np.save(npy, latent)
                sample = {'__key__': key, 'latents.npy': npy.getvalue()}

                # all but the picture, whose name may have several parts
                for ext, member in members.items():
                    if ext.rpartition('.')[2] not in ENDINGS:
                        sample[ext] = member
                sink.write(sample)
            count += len(batch)
    os.replace(f'{path}.part', path)
    return count


def begin(s, out):
    """{shard: its row} of what an earlier call has done. Refuses a folder of other settings."""
    # by its whole path, unless it is a URL or lies in data_dir
    data = s['data']
    if os.path.exists(data):
        data = os.path.abspath(data)
    made = dict(data=data, vae=os.path.abspath(s['vae']), image_size=s['image_size'])

    path = os.path.join(out, 'latents.json')
    os.makedirs(out, exist_ok=True)
    if os.path.exists(path):
        before = read_json(path)
        if before != made:
            fail(f'{out} was made with {before}: give another --out', 2)
    elif os.listdir(out):
        fail(f'--out={out} holds something else: give an empty folder', 2)
    write_json(path, made)

    return read_done(os.path.join(out, 'done.jsonl'))


def read_done(path):
    """{shard: its row} of a done.jsonl, which is mended where its last line was cut."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding='utf-8') as file:
        lines = file.readlines()
    whole = [line for line in lines if line.endswith('\n')]

    # what is left of a line would spoil the next one
    if len(whole) < len(lines):
        with open(f'{path}.part', 'w', encoding='utf-8') as file:
            file.writelines(whole)
        os.replace(f'{path}.part', path)

    rows = [json.loads(line) for line in whole]
    return {row['shard']: row for row in rows}


def check(s):
    """Refuse settings that make no sense; (device, dtype) of the others."""
    if not s['data'] or not s['vae'] or s['batch_size'] < 1 or s['image_size'] < 1:
        fail(f'--data={s["data"]!r} and --vae={s["vae"]!r} must be given, --batch_size='
             f'{s["batch_size"]} and --image_size={s["image_size"]} at least 1', 2)
    dtype = getattr(torch, s['dtype'], None)
    if dtype not in (torch.float32, torch.bfloat16):
        fail(f'--dtype={s["dtype"]}: expected float32 or bfloat16', 2)

    device = s['device']
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        parallel.check(dict(device=device))
    except ValueError as error:
        fail(error, 2)
    return device, dtype


def finish(s, out, done):
    """The manifest, unless too many samples were left out, now or by an earlier call."""
    total = sum(row['num_sequences'] for row in done.values())
    left_out = sum(row['bad'] for row in done.values())
    # one bad sample of a small data set is not too many
    if left_out > max(1, s['max_bad_fraction'] * (total + left_out)):
        fail(f'{left_out} of {total + left_out} samples can not be used, over max_bad_fraction='
             f'{s["max_bad_fraction"]}: mend the data set or raise the bound; manifest.jsonl is '
             'not written', 1)
    rows = [dict(shard=name, num_sequences=row['num_sequences'])
            for name, row in sorted(done.items())]
    manifests.finish(out, rows)
    message = f'{out}: latents of {total} pictures'
    if left_out:
        message += f', {left_out} bad samples left out'
    print(message)


def main(s):
    """The command; s: the settings above."""
    device, dtype = check(s)
    out = s['out'] or s['data'].rstrip('/') + '-latents'
    try:
        folder = Folder(s['data'], s['data_dir'], s['cache_dir'])
        vae = diffusers.from_folder(s['vae'], 'vae').to(device)
    except (OSError, ValueError) as error:
        fail(f'--data={s["data"]}, --vae={s["vae"]}: {error}', 2)
    if s['image_size'] % vae.factor:
        fail(f'--image_size={s["image_size"]} must be a multiple of {vae.factor}, the pixels of a '
             'latent', 2)

    eyes = Eyes(s['image_size'], draft=s['image_draft'])
    bad = []
    try:
        done = begin(s, out)
        if not done:
            manifests.begin(out, 'prepare/latents.py')
        for shard in tqdm(range(len(folder.sizes)), desc='latents', unit='shard'):
            name, before = folder.name(shard), len(bad)
            if name in done:
                continue
            path = os.path.join(out, name + '.tar')
            os.makedirs(os.path.dirname(path), exist_ok=True)
            samples = pictures(folder, shard, eyes, bad)
            count = write_shard(path, samples, vae, eyes, s['batch_size'], device, dtype)

            # a line a shard, only after it is there under its name
            done[name] = dict(shard=name, num_sequences=count, bad=len(bad) - before)
            with open(os.path.join(out, 'done.jsonl'), 'a', encoding='utf-8') as file:
                file.write(json.dumps(done[name]) + '\n')
        # the first ones say what is wrong with them
        for line in bad[:10]:
            print(f'prepare/latents.py: {line}', file=sys.stderr)
        finish(s, out, done)
    except (OSError, ValueError) as error:
        fail(error, 1)


if __name__ == '__main__':
    main(configure(globals()))
