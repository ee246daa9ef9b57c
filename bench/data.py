"""Reading data beside plain webdataset on the same shards, and what scale costs.

    python bench/data.py                        all of it, about 8 minutes on 2 cores
    python bench/data.py speed start scale memory between_processes

Each ratio is ours by theirs, from medians of runs that take turns. Both give batches of 64 that a
model can take: token ids, or pictures of 224 px and token ids. Ours leave the pipeline as uint16
and uint8, as train.py takes them; theirs as webdataset's users write them, int64 ids and float
pictures.
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
from functools import partial

import numpy as np
import torch
import webdataset
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import data  # noqa: E402
from pictures import Eyes  # noqa: E402
from processor import Processor  # noqa: E402
from shards import Folder  # noqa: E402
from tokenizer import Bytes  # noqa: E402

B, L, SIZE, RUNS = 64, 1025, 224, 5
# Of indexes; set in main to a folder that is new each time.
CACHE = ''
# A line of a table: what, workers, ours, theirs, their ratio.
HEAD = '{:44}{:>8}{:>10}{:>12}{:>8}'
ROW = '{:44}{:8}{:10.0f}{:12.0f}{:8.2f}'


def write(folder, samples, per_shard, per_sample=1, **row):
    """Shards of samples and their manifest."""
    # A folder that is there already would be another set of the same name.
    os.makedirs(folder)
    with open(f'{folder}/manifest.jsonl', 'w') as manifest:
        for first in range(0, len(samples), per_shard):
            shard = f'{first // per_shard:08d}'
            held = samples[first:first + per_shard]
            with webdataset.TarWriter(f'{folder}/{shard}.tar', encoder=False) as tar:
                for i, members in enumerate(held, first):
                    tar.write({'__key__': f'{i:08d}', **members})
            row_of_shard = {'shard': shard, 'num_sequences': per_sample * len(held), **row}
            manifest.write(json.dumps(row_of_shard) + '\n')


def jpeg(rng, size):
    """A picture as large in bytes as a photograph: blurred colours and a little noise."""
    colours = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    blurred = np.asarray(colours.resize((size, size), Image.Resampling.BICUBIC))
    noisy = blurred + rng.integers(-8, 9, (size, size, 3))
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, 'JPEG', quality=90)
    return out.getvalue()


def tokens_set(folder, per_member, sequences=10240):
    """A data set of tokens, `per_member` rows in each sample; its processor."""
    shape = sequences // per_member, per_member * L
    rows = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint16)
    samples = [{'tokens.bin': row.tobytes()} for row in rows]
    write(folder, samples, 1024 // per_member, per_member, sequence_length=L)
    settings = dict(task='llm', processor='text', seq_len=L - 1)
    return Processor(settings, Bytes(), 'text')


def captions_set(folder, size, samples=1024, per_shard=128):
    """A data set of pictures and captions; its processor."""
    # So few, again and again: what is measured reads and decodes each of them anew.
    pictures = [jpeg(np.random.default_rng(i), size) for i in range(32)]
    members = []
    for i in range(samples):
        members.append({'jpg': pictures[i % 32], 'txt': b'a caption of a picture'})
    write(folder, members, per_shard)
    settings = dict(task='vlm', processor='auto', seq_len=64)
    return Processor(settings, Bytes(), eyes=Eyes(SIZE), image_tokens=1)


def ours(folder, processor, workers, first=0):
    """Batches of our pipeline, from batch `first` on."""
    opened = Folder(folder, cache_dir=CACHE)
    order = data.Order([opened.sizes], [1.0])
    # As train.py asks for them, without an end.
    positions = (np.arange(i * B, (i + 1) * B) for i in range(first, 10 ** 6))
    return data.loader(data.Batches([opened], order, processor), positions, workers)


def theirs(folder, decode, workers, shuffle=True):
    """Batches of webdataset, as its documentation has it."""
    urls = sorted(f'{folder}/{f}' for f in os.listdir(folder) if f.endswith('.tar'))
    # The shards again and again: an epoch's end, where its workers stop, is not measured.
    shards = 100 if shuffle else False
    dataset = webdataset.WebDataset(urls * 1000, shardshuffle=shards).compose(decode)
    if shuffle:
        dataset = dataset.shuffle(1000)
    return torch.utils.data.DataLoader(dataset.batched(B), batch_size=None, num_workers=workers)


def sequences(samples):
    """webdataset's samples -> rows of token ids."""
    for sample in samples:
        for row in np.frombuffer(sample['tokens.bin'], np.uint16).reshape(-1, L):
            yield (row.astype(np.int64),)


def captions(samples):
    """webdataset's samples -> pictures of -1 to 1 and token ids."""
    for sample in samples:
        picture = Image.open(io.BytesIO(sample['jpg'])).convert('RGB')
        # Bicubic, as ours.
        if picture.size != (SIZE, SIZE):
            picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)

        # 258 is the padding of Bytes.
        ids = np.full(64, 258, np.int64)
        text = list(sample['txt'])[:64]
        ids[:len(text)] = text
        yield np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1, ids


def rate(batches, count, warm=2):
    """Samples a second of `count` batches, after some that warm up."""
    # Workers start, and shards are opened.
    batches = iter(batches)
    for _ in range(warm):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * B / (time.perf_counter() - began)


def take_turns(first, second):
    """Medians of RUNS runs of each."""
    # By turns, so that what else runs on the machine meets both.
    of_first, of_second = [], []
    for _ in range(RUNS):
        of_first.append(first())
        of_second.append(second())
    return statistics.median(of_first), statistics.median(of_second)


def speed(folder):
    """Samples a second, beside webdataset."""
    # One member may hold a row or many: the price of a member is webdataset's.
    # What, its folder, its processor, webdataset's decoder, batches of a run.
    cases = []
    for n, what in ((64, '64 rows a member'), (1, '1 row a member')):
        path = f'{folder}/tokens{n}'
        cases.append((f'tokens, 1024 a row, {what}', path, tokens_set(path, n), sequences, 60))
    for size in (224, 512):
        path = f'{folder}/{size}'
        cases.append((f'captions, JPEG of {size} px', path, captions_set(path, size), captions, 8))

    print(HEAD.format('samples a second', 'workers', 'ours', 'webdataset', 'ratio'))
    for what, path, processor, decode, count in cases:
        for workers in (0, 2):
            a, b = take_turns(
                lambda: rate(ours(path, processor, workers), count),        # noqa: B023
                lambda: rate(theirs(path, decode, workers), count))         # noqa: B023
            print(ROW.format(what, workers, a, b, a / b), flush=True)


def first_batch(make):
    """Milliseconds to the first batch."""
    began = time.perf_counter()
    next(iter(make()))
    return 1e3 * (time.perf_counter() - began)


def start(folder):
    """The first batch where indexes are cached, beside webdataset; and from 90 % of an epoch."""
    path = f'{folder}/many'
    processor = captions_set(path, SIZE, 64 * 512, 512)

    # Now the index is cached, as it is from a run's second start on.
    next(iter(ours(path, processor, 0)))

    def at_0():
        return first_batch(lambda: ours(path, processor, 0))

    def at_90():
        return first_batch(lambda: ours(path, processor, 0, first=int(0.9 * 512)))

    what = 'milliseconds to the first batch, 64 shards'
    print(HEAD.format(what, 'workers', 'ours', 'webdataset', 'ratio'))
    for shuffle, what in ((False, 'webdataset does not shuffle'), (True, 'webdataset shuffles')):
        a, b = take_turns(at_0, partial(first_batch, partial(theirs, path, captions, 0, shuffle)))
        print(ROW.format(what, 0, a, b, a / b), flush=True)
    a, b = take_turns(at_90, at_0)
    print(ROW.format('ours from 90 % of an epoch, by from 0 %', 0, a, b, a / b), flush=True)


# In a process of its own, whose memory holds nothing else.
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
located = time.perf_counter() - began
print(f'{{opened:.2f}} s to open, {{located:.2f}} s to locate, {{rss() - before:.0f}} MB more')
'''


def scale(folder):
    """A manifest of a million shards."""
    small, million = f'{folder}/small', f'{folder}/million.jsonl'
    tokens_set(small, 64, 1024)
    with open(million, 'w') as f:
        for i in range(10 ** 6):
            f.write(f'{{"shard": "{i:08d}", "num_sequences": {4000 + i % 1000}}}\n')

    # First the manifest is read and its index written, then the index is read.
    root = os.path.dirname(HERE)
    for share, what in ((0.0, 'first time'), (0.5, 'again'), (7.3, 'again')):
        code = SCALE.format(root=root, small=small, manifest=million, cache=CACHE, share=share)
        command = [sys.executable, '-c', code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f'1,000,000 shards, {what}, at {share} epochs: {done.stdout.strip()}', flush=True)


def memory(folder):
    """Of two workers, over five epochs: what only they hold."""
    path = f'{folder}/five'
    processor = captions_set(path, SIZE, 2048)
    batches = iter(ours(path, processor, 2))

    def held():
        total = 0
        for pid in [os.getpid(), *(worker.pid for worker in batches._workers)]:
            # Pages that processes share since the fork are not theirs alone.
            with open(f'/proc/{pid}/smaps_rollup') as f:
                for line in f:
                    if line.startswith('Private_'):
                        total += int(line.split()[1])
        return total / 1e3

    found = []
    for _ in range(6):
        for _ in range(2048 // B):
            next(batches)
        # Other systems than Linux have no such file.
        with contextlib.suppress(FileNotFoundError):
            found.append(f'{held():.0f}')
    what = 'MB of the process and two workers after each of 6 epochs'
    print(f'{what}: {", ".join(found)}', flush=True)


class Same:
    """A data set that gives the same batch again and again, in the form that is asked for."""

    def __init__(self, batch, form):
        self.batch, self.form = batch, form

    def __getitem__(self, i):
        return self.form(self.batch)


def between_processes(folder):
    """What it takes to bring a batch from a worker to a tensor in the main process."""
    ids, pixels = np.zeros((B, L), np.uint16), np.zeros((B, SIZE, SIZE, 3), np.uint8)
    # As webdataset's users have pixels: four times the bytes.
    wide = pixels.astype(np.float32).transpose(0, 3, 1, 2)

    # What, the batch, what a worker makes of it, what the main process does with that, batches.
    forms = [
        ('ids, lists', ids, lambda x: x.tolist(), torch.tensor, 100),
        ('ids, int64 tensor', ids, lambda x: torch.from_numpy(x.astype(np.int64)), None, 100),
        ('ids, int64 array', ids, lambda x: x.astype(np.int64), torch.from_numpy, 100),
        ('ids, uint16 tensor', ids, lambda x: torch.from_numpy(x.copy()), None, 100),
        ('ids, uint16 array (ours)', ids, np.copy, torch.from_numpy, 100),
        ('pixels, float32 tensor', wide, lambda x: torch.from_numpy(x.copy()), None, 20),
        ('pixels, uint8 array', pixels, np.copy, torch.from_numpy, 20),
        ('pixels, uint8 tensor (ours)', pixels, lambda x: torch.from_numpy(x.copy()), None, 20)]

    def milliseconds(batch, form, after, count):
        loader = iter(torch.utils.data.DataLoader(
            Same(batch, form), batch_size=None, sampler=range(10 ** 6), num_workers=2,
            prefetch_factor=4, collate_fn=data.as_it_is))
        # After ten, workers are at the pace at which batches are taken.
        began = 0
        for i in range(10 + count):
            if i == 10:
                began = time.perf_counter()
            got = next(loader)
            if after:
                after(got)
        return 1e3 * (time.perf_counter() - began) / count

    # Three rounds, so that what else runs on the machine meets all of them.
    rounds = []
    for _ in range(3):
        rounds.append([milliseconds(*rest) for _, *rest in forms])
    for (what, *_), times in zip(forms, zip(*rounds)):
        median = statistics.median(times)
        print(f'from a worker, a batch of 64: {what:30}{median:8.2f} ms', flush=True)


if __name__ == '__main__':
    torch.set_num_threads(1)
    parts = dict(speed=speed, start=start, scale=scale, memory=memory,
                 between_processes=between_processes)
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as temporary:
            CACHE = f'{temporary}/cache'
            parts[name](temporary)
