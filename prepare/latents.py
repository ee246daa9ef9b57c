"""Latents of a data set's pictures, computed once: task=t2i with denoiser=unet then trains without the autoencoder.

    python prepare/latents.py --data=datasets/mine --vae=<folder of diffusers> --image_size=512

writes datasets/mine-latents. For every shard of --data it has one of the same name: each sample's picture becomes
`key.latents.npy`, float16 (2 C, H / 8, W / 8), the means and standard deviations of its latent times the autoencoder's
scaling_factor, from which training draws anew every time; its other members stay as they are. Pictures are made squares
as train.py makes them. Samples that can not be used are left out, named and counted. Interrupted, the same command goes
on with the next shard; latents.json says what they were made with, and other settings are refused. manifest.jsonl comes
last.
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

import processor as processors  # noqa: E402
import tokenizer as tokenizers  # noqa: E402
from checkpoint import write_json  # noqa: E402
from configurator import configure  # noqa: E402
from families import diffusers as hub_sd  # noqa: E402
from shards import CACHE, BadSample, Folder  # noqa: E402


def fail(message, code):
    print(f'prepare/latents.py: {message}', file=sys.stderr)
    sys.exit(code)


def pictures(folder, shard, processor, bad):
    """Yield (key, members, picture uint8 (H, W, 3)) of a shard; what can not be used is added to `bad`."""
    for i in range(folder.sizes[shard]):
        try:
            members = folder.read(shard, i)
            found = processors.fields(members)['pictures']
            if len(found) != 1 or 'latents.npy' in members:
                raise BadSample(f'{len(found)} pictures: expected one')
            yield folder.key(shard, i), members, processor.pixels(found[0])
        except BadSample as error:
            bad.append(f'{folder.base}{folder.name(shard)}.tar, {folder.key(shard, i)}: {error}')


@torch.inference_mode()
def moments(vae, batch, device, dtype):
    """Pictures uint8 (B, H, W, 3) -> float16 (B, 2 C, H / 8, W / 8)."""
    pixels = processors.to_pixels(np.stack(batch), device)
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        return torch.cat(vae.moments(pixels), 1).half().cpu().numpy()


def write_shard(path, samples, vae, s):
    """The samples of one shard, under another name until it is whole; how many they were."""
    count, rest = 0, []

    def flush():
        if not rest:
            return
        for (key, members, _), latent in zip(rest, moments(vae, [x[2] for x in rest], s['device'], s['dtype'])):
            out = io.BytesIO()
            np.save(out, latent)
            kept = {ext: data for ext, data in members.items() if ext.rpartition('.')[2] not in processors.PICTURES}
            sink.write({'__key__': key, 'latents.npy': out.getvalue(), **kept})
        rest.clear()

    with open(path + '.part', 'wb') as file, TarWriter(file, user='', group='', mode=0o644, mtime=0,
                                                       encoder=False) as sink:
        for sample in samples:
            rest.append(sample)
            count += 1
            if len(rest) == s['batch_size']:
                flush()
        flush()
    os.replace(path + '.part', path)
    return count


def begin(s, folder):
    """{shard: samples} that an earlier call has finished in --out. Refuses a folder made with other settings."""
    made = dict(data=os.path.abspath(s['data']) if os.path.exists(s['data']) else s['data'],
                vae=os.path.abspath(s['vae']), image_size=s['image_size'])
    path = os.path.join(s['out'], 'latents.json')
    os.makedirs(s['out'], exist_ok=True)
    if os.path.exists(path) and (old := tokenizers.read_json(path)) != made:
        fail(f'{s["out"]} was made with {old}: give another --out', 2)
    if not os.path.exists(path) and os.listdir(s['out']):
        fail(f'--out={s["out"]} holds something else: give an empty folder', 2)
    write_json(path, made)
    done = os.path.join(s['out'], 'done.jsonl')
    rows = [json.loads(line) for line in open(done, encoding='utf-8') if line.endswith('\n')] if os.path.exists(
        done) else []
    return {row['shard']: row for row in rows}


def main(s):
    if not s['data'] or not s['vae'] or s['batch_size'] < 1 or s['image_size'] < 1:
        fail(f'--data={s["data"]!r} and --vae={s["vae"]!r} must be given, --batch_size={s["batch_size"]} and '
             f'--image_size={s["image_size"]} at least 1', 2)
    s['device'] = ('cuda' if torch.cuda.is_available() else 'cpu') if s['device'] == 'auto' else s['device']
    s['dtype'] = getattr(torch, s['dtype'], None)
    s['out'] = s['out'] or s['data'].rstrip('/') + '-latents'
    if s['dtype'] not in (torch.float32, torch.bfloat16):
        fail('--dtype: expected float32 or bfloat16', 2)
    try:
        folder = Folder(s['data'], s['data_dir'], s['cache_dir'])
        vae = hub_sd.from_folder(s['vae'], 'vae').to(s['device'])
    except (OSError, ValueError) as error:
        fail(error, 2)
    if s['image_size'] % vae.factor:
        fail(f'--image_size={s["image_size"]} must be a multiple of {vae.factor}, the pixels of a latent', 2)
    processor = processors.Processor(tokenizers.load('bytes'), s['image_size'], draft=s['image_draft'])
    done, bad = begin(s, folder), []
    try:
        for shard in tqdm(range(len(folder.sizes)), desc='latents', unit='shard'):
            name, before = folder.name(shard), len(bad)
            if name in done:
                continue
            path = os.path.join(s['out'], name + '.tar')
            os.makedirs(os.path.dirname(path), exist_ok=True)
            count = write_shard(path, pictures(folder, shard, processor, bad), vae, s)
            done[name] = dict(shard=name, num_sequences=count, bad=len(bad) - before)
            with open(os.path.join(s['out'], 'done.jsonl'), 'a', encoding='utf-8') as file:
                file.write(json.dumps(done[name]) + '\n')
    except (OSError, ValueError) as error:
        fail(error, 1)
    for line in bad[:10]:
        print(f'prepare/latents.py: {line}', file=sys.stderr)
    rows = [{'shard': name, 'num_sequences': row['num_sequences']} for name, row in sorted(done.items())]
    total, left_out = sum(row['num_sequences'] for row in rows), sum(row['bad'] for row in done.values())
    if left_out > max(1, s['max_bad_fraction'] * (total + left_out)):
        fail(f'{left_out} of {total + left_out} samples can not be used, over max_bad_fraction='
             f'{s["max_bad_fraction"]}: mend the data set or raise the bound; manifest.jsonl is not written', 1)
    manifest = os.path.join(s['out'], 'manifest.jsonl')
    with open(manifest + '.part', 'w', encoding='utf-8') as file:
        file.write(''.join(json.dumps(row) + '\n' for row in rows))
    os.replace(manifest + '.part', manifest)
    print(f'{s["out"]}: latents of {total} pictures' + (f', {left_out} bad samples left out' if left_out else ''))


if __name__ == '__main__':
    data = ''                   # data set of pictures and captions
    out = ''                    # empty: beside it, <data>-latents
    vae = ''                    # folder of diffusers that has vae/
    image_size = 512            # pixels of a side
    image_draft = True          # JPEGs may be decoded at 1/2, 1/4 or 1/8, where that is at least image_size
    batch_size = 8              # pictures at once
    dtype = 'float32'           # float32 | bfloat16
    device = 'auto'             # auto: cuda if there is one, else cpu
    max_bad_fraction = 0.001    # more unusable samples than this are an error
    data_dir = 'datasets'       # where data sets are, else as paths
    cache_dir = CACHE
    main(configure(globals()))
