"""Reading speed beside plain webdataset on the same shards: python bench/data.py

Each line is a ratio of samples a second, ours by theirs, from medians of interleaved runs. Both give batches of 64 that
a model can take: token ids, or uint8 pictures and token ids (ours), float pictures as webdataset decodes them (theirs).
"""
import io
import json
import os
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
import webdataset
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
from processor import Processor
from shards import Folder
from tokenizer import Bytes

B, L, SIZE, RUNS = 64, 1025, 224, 5


def write(folder, samples, per_shard, per_sample=1, **row):
    """Shards of samples and their manifest."""
    os.makedirs(folder)
    with open(f'{folder}/manifest.jsonl', 'w') as manifest:
        for i in range(0, len(samples), per_shard):
            with webdataset.TarWriter(f'{folder}/{i // per_shard:08d}.tar', encoder=False) as tar:
                for j, members in enumerate(samples[i:i + per_shard]):
                    tar.write({'__key__': f'{i + j:08d}', **members})
            count = per_sample * len(samples[i:i + per_shard])
            manifest.write(json.dumps({'shard': f'{i // per_shard:08d}', 'num_sequences': count, **row}) + '\n')


def rate(batches, count):
    """Samples a second of `count` batches, after two that warm up."""
    batches = iter(batches)
    next(batches), next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * B / (time.perf_counter() - began)


def ours(folder, processor, workers):
    opened = Folder(folder)
    order = data.Order([opened.sizes], [1.0])
    batches = data.Batches([opened], order, processor)
    return data.loader(batches, (np.arange(i * B, (i + 1) * B) for i in range(10 ** 6)), workers)


def theirs(folder, decode, workers):
    urls = sorted(f'{folder}/{f}' for f in os.listdir(folder) if f.endswith('.tar'))
    dataset = webdataset.WebDataset(urls * 1000, shardshuffle=100).compose(decode).shuffle(1000).batched(B)
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)


def sequences(samples):
    for sample in samples:
        for row in np.frombuffer(sample['tokens.bin'], np.uint16).reshape(-1, L):
            yield (row.astype(np.int64),)


def captions(samples):
    for sample in samples:
        picture = Image.open(io.BytesIO(sample['jpg'])).convert('RGB')
        if picture.size != (SIZE, SIZE):
            picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        ids = np.full(64, 258, np.int64)
        text = list(sample['txt'])[:64]
        ids[:len(text)] = text
        yield np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1, ids


def jpeg(rng, size):
    small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    noise = rng.integers(-8, 9, (size, size, 3))
    out = io.BytesIO()
    Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8)).save(out, 'JPEG', quality=90)
    return out.getvalue()


def main():
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = rng.integers(0, 256, (160, 64 * L)).astype(np.uint16)
        write(f'{folder}/tokens', [{'tokens.bin': r.tobytes()} for r in rows], 16, 64, sequence_length=L)
        cases = [('tokens, 1024 a row', 'tokens', Processor(Bytes(), seq_len=L - 1, form='text'), sequences, 60)]
        for size in (224, 512):
            pictures = [jpeg(rng, size) for _ in range(32)]
            samples = [{'jpg': pictures[i % 32], 'txt': b'a caption of a picture'} for i in range(1024)]
            write(f'{folder}/{size}', samples, 128)
            p = Processor(Bytes(), SIZE, 1, '', 64)
            cases.append((f'captions, JPEG of {size} px at {SIZE}', str(size), p, captions, 8))
        print(f'{"":36}{"workers":>8}{"ours/s":>12}{"webdataset/s":>14}{"ratio":>8}')
        for name, sub, processor, decode, count in cases:
            for workers in (0, 2):
                pairs = [(rate(ours(f'{folder}/{sub}', processor, workers), count),
                          rate(theirs(f'{folder}/{sub}', decode, workers), count)) for _ in range(RUNS)]
                a, b = (statistics.median(x) for x in zip(*pairs))
                print(f'{name:36}{workers:8}{a:12.0f}{b:14.0f}{a / b:8.2f}', flush=True)


if __name__ == '__main__':
    torch.set_num_threads(1)
    main()
