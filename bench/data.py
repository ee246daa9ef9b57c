"""Reading data beside plain webdataset on the same shards, and what scale costs.

    python bench/data.py                        all of it, about 8 minutes on 2 cores
    python bench/data.py speed start scale memory between_processes

Each ratio is ours by theirs, from medians of runs that take turns. Both give batches of 64 that a model can take: token
ids, or pictures of 224 px and token ids. Ours leave the pipeline as uint16 and uint8, as train.py takes them; theirs as
webdataset's users write them, int64 ids and float pictures.
"""
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import webdataset
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import data  # noqa: E402
from processor import Processor  # noqa: E402
from shards import Folder  # noqa: E402
from tokenizer import Bytes  # noqa: E402

B, L, SIZE, RUNS = 64, 1025, 224, 5
CACHE = ''                      # of indexes, set in main


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


def jpeg(rng, size):
    small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    noise = rng.integers(-8, 9, (size, size, 3))
    out = io.BytesIO()
    Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8)).save(out, 'JPEG', quality=90)
    return out.getvalue()


def tokens_set(folder, per_member, sequences=10240):
    rows = np.random.default_rng(0).integers(0, 256, (sequences // per_member, per_member * L)).astype(np.uint16)
    write(folder, [{'tokens.bin': r.tobytes()} for r in rows], 1024 // per_member, per_member, sequence_length=L)
    return Processor(Bytes(), seq_len=L - 1, form='text')


def captions_set(folder, size, samples=1024, per_shard=128):
    pictures = [jpeg(np.random.default_rng(i), size) for i in range(32)]
    write(folder, [{'jpg': pictures[i % 32], 'txt': b'a caption of a picture'} for i in range(samples)], per_shard)
    return Processor(Bytes(), SIZE, 1, '', 64)


def ours(folder, processor, workers, first=0):
    opened = Folder(folder, cache_dir=CACHE)
    batches = data.Batches([opened], data.Order([opened.sizes], [1.0]), processor)
    return data.loader(batches, (np.arange(i * B, (i + 1) * B) for i in range(first, 10 ** 6)), workers)


def theirs(folder, decode, workers, shuffle=True):
    urls = sorted(f'{folder}/{f}' for f in os.listdir(folder) if f.endswith('.tar'))
    dataset = webdataset.WebDataset(urls * 1000, shardshuffle=100 if shuffle else False).compose(decode)
    dataset = (dataset.shuffle(1000) if shuffle else dataset).batched(B)
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


def rate(batches, count, warm=2):
    """Samples a second of `count` batches, after some that warm up."""
    batches = iter(batches)
    for _ in range(warm):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * B / (time.perf_counter() - began)


def take_turns(a, b):
    """Medians of RUNS runs of each."""
    return [statistics.median(x) for x in zip(*((a(), b()) for _ in range(RUNS)))]


def speed(folder):
    """Samples a second, beside webdataset."""
    cases = [(f'tokens, 1024 a row, {n} row{"s"[:n > 1]} a member', f'tokens{n}', tokens_set(f'{folder}/tokens{n}', n),
              sequences, 60) for n in (64, 1)]
    cases += [(f'captions, JPEG of {size} px', f'{size}', captions_set(f'{folder}/{size}', size), captions, 8)
              for size in (224, 512)]
    print(f'{"samples a second":44}{"workers":>8}{"ours":>10}{"webdataset":>12}{"ratio":>8}')
    for name, sub, processor, decode, count in cases:
        for workers in (0, 2):
            a, b = take_turns(lambda: rate(ours(f'{folder}/{sub}', processor, workers), count),        # noqa: B023
                              lambda: rate(theirs(f'{folder}/{sub}', decode, workers), count))         # noqa: B023
            print(f'{name:44}{workers:8}{a:10.0f}{b:12.0f}{a / b:8.2f}', flush=True)


def first_batch(make):
    """Seconds to the first batch."""
    began = time.perf_counter()
    next(iter(make()))
    return time.perf_counter() - began


def start(folder):
    """The first batch where indexes are cached, beside webdataset; and the rate from 90 % of an epoch on."""
    processor = captions_set(f'{folder}/many', SIZE, 64 * 512, 512)
    next(iter(ours(f'{folder}/many', processor, 0)))
    print(f'{"milliseconds to the first batch, 64 shards":44}{"workers":>8}{"ours":>10}{"webdataset":>12}{"ratio":>8}')
    for shuffle in (False, True):
        a, b = take_turns(lambda: first_batch(lambda: ours(f'{folder}/many', processor, 0)),
                          lambda: first_batch(lambda: theirs(f'{folder}/many', captions, 0, shuffle)))  # noqa: B023
        print(f'{"webdataset shuffles" if shuffle else "webdataset does not shuffle":44}{0:8}{1e3 * a:10.0f}'
              f'{1e3 * b:12.0f}{a / b:8.2f}', flush=True)
    a, b = take_turns(lambda: first_batch(lambda: ours(f'{folder}/many', processor, 0, first=int(0.9 * 512))),
                      lambda: first_batch(lambda: ours(f'{folder}/many', processor, 0)))
    print(f'{"ours from 90 % of an epoch, by from 0 %":44}{0:8}{1e3 * a:10.0f}{1e3 * b:12.0f}{a / b:8.2f}', flush=True)


SCALE = '''
import os, sys, time, numpy as np
sys.path.insert(0, {root!r})
import data, tqdm
from shards import Folder
rss = lambda: int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6
Folder({small!r}, cache_dir={cache!r})
before, began = rss(), time.perf_counter()
folder = Folder({manifest!r}, cache_dir={cache!r})
opened = time.perf_counter() - began
order = data.Order([folder.sizes], [1.0])
began = time.perf_counter()
order.locate(np.array([int({share} * len(folder))]))
print(f'{{opened:.2f}} s to open, {{time.perf_counter() - began:.2f}} s to locate, {{rss() - before:.0f}} MB more')
'''


def scale(folder):
    """A manifest of a million shards."""
    tokens_set(f'{folder}/small', 64, 1024)
    with open(f'{folder}/million.jsonl', 'w') as f:
        f.writelines(f'{{"shard": "{i:08d}", "num_sequences": {4000 + i % 1000}}}\n' for i in range(10 ** 6))
    for share, what in ((0.0, 'first time'), (0.5, 'again'), (7.3, 'again')):
        code = SCALE.format(root=os.path.dirname(HERE), small=f'{folder}/small', manifest=f'{folder}/million.jsonl',
                            cache=CACHE, share=share)
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
        print(f'1,000,000 shards, {what}, at {share} epochs: {out}', flush=True)


def memory(folder):
    """Of two workers, over five epochs: what only they hold."""
    def held():
        total = 0
        for pid in [os.getpid(), *(w.pid for w in batches._workers)]:
            with open(f'/proc/{pid}/smaps_rollup') as f:
                total += sum(int(line.split()[1]) for line in f if line.startswith('Private_'))
        return total / 1e3

    processor = captions_set(f'{folder}/five', SIZE, 2048)
    batches = iter(ours(f'{folder}/five', processor, 2))
    found = []
    for _ in range(6):
        for _ in range(2048 // B):
            next(batches)
        with contextlib.suppress(FileNotFoundError):
            found.append(f'{held():.0f}')
    print(f'MB of the process and two workers after each of 6 epochs: {", ".join(found)}', flush=True)


class Same:
    """A data set that gives the same batch again and again, in the form that is asked for."""

    def __init__(self, batch, form):
        self.batch, self.form = batch, form

    def __getitem__(self, i):
        return self.form(self.batch)


def between_processes(folder):
    """What it takes to bring a batch from a worker to a tensor in the main process."""
    ids, pixels = np.zeros((B, L), np.uint16), np.zeros((B, SIZE, SIZE, 3), np.uint8)
    wide = pixels.astype(np.float32).transpose(0, 3, 1, 2)
    forms = [
        ('ids, lists', ids, lambda x: x.tolist(), torch.tensor),
        ('ids, int64 tensor', ids, lambda x: torch.from_numpy(x.astype(np.int64)), None),
        ('ids, int64 array', ids, lambda x: x.astype(np.int64), torch.from_numpy),
        ('ids, uint16 tensor', ids, lambda x: torch.from_numpy(x.copy()), None),
        ('ids, uint16 array (ours)', ids, np.copy, torch.from_numpy),
        ('pixels, float32 tensor', wide, lambda x: torch.from_numpy(x.copy()), None),
        ('pixels, uint8 array', pixels, np.copy, torch.from_numpy),
        ('pixels, uint8 tensor (ours)', pixels, lambda x: torch.from_numpy(x.copy()), None)]

    def milliseconds(batch, form, after, count):
        loader = iter(torch.utils.data.DataLoader(Same(batch, form), batch_size=None, sampler=range(10 ** 6),
                                                  num_workers=2, prefetch_factor=4, collate_fn=data.as_it_is))
        began = 0
        for i in range(10 + count):
            began = time.perf_counter() if i == 10 else began
            batch = next(loader)
            after(batch) if after else batch
        return 1e3 * (time.perf_counter() - began) / count

    rows = [[milliseconds(*form[1:], 100 if form[1] is ids else 20) for form in forms] for _ in range(3)]
    for form, times in zip(forms, zip(*rows)):
        print(f'from a worker, a batch of 64: {form[0]:30}{statistics.median(times):8.2f} ms', flush=True)


if __name__ == '__main__':
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ('speed', 'start', 'scale', 'memory', 'between_processes'):
        with tempfile.TemporaryDirectory() as temporary:
            CACHE = f'{temporary}/cache'
            globals()[name](temporary)
