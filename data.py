"""Data: which sample stands at which position of a run, reading it from tar shards, and turning it into a batch.

    python data.py out/vlm_emoji/config.json --show_steps=100:103      which samples steps 100, 101 and 102 saw

A data set is a folder of plain .tar shards (webdataset's format) with a `manifest.jsonl`. `Order` is a pure function of
the position: nothing is recorded to resume, and nothing depends on the number of ranks or workers.

Axes: B rows of a micro-batch, T tokens of a row, I pictures of a micro-batch.
"""
import functools
import io
import json
import os
import re
import sys
import tarfile
from collections import OrderedDict

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))

# ----------------------------------------------------------------------------------------------------------------------
# hashing: written out here, so that no order ever changes with a release of numpy or torch


def splitmix64(x):
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on uint64 arrays."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*values):
    """A uint64 hash of integers or integer arrays, which broadcast."""
    h = np.zeros(1, np.uint64)
    for value in values:
        h = splitmix64(h ^ np.asarray(value).astype(np.int64).view(np.uint64).reshape(np.shape(value) or (1,)))
    return h


def permute(index, size, key, rounds=32):
    """Where `index` goes in the permutation of range(size) chosen by `key`; all three are arrays or broadcast.

    Swap-or-not (Hoang, Morris, Rogaway 2012): each round pairs every x with key - x and swaps the pair or does not, by
    a bit that both share. A bijection for any size, point by point, so no permutation is ever held."""
    x, size = np.broadcast_arrays(np.asarray(index, np.uint64), np.asarray(size, np.uint64))
    for i in range(rounds):
        round_key = hash64(key, i)
        partner = (round_key % size + size - x) % size
        swap = splitmix64(round_key ^ np.maximum(x, partner)) >> np.uint64(63) == 1
        x = np.where(swap, partner, x)
    return x.astype(np.int64)


class Random:
    """A stream of random numbers keyed by integers, the same for ever. Enough for augmentation."""

    def __init__(self, *key):
        self.key, self.count = hash64(*key), 0

    def uniform(self, low=0.0, high=1.0, size=None):
        """Uniform in [low, high): a float, or an array of `size` numbers."""
        n = 1 if size is None else int(np.prod(size))
        bits = splitmix64(self.key + splitmix64(np.arange(self.count, self.count + n, dtype=np.uint64)))
        self.count += n
        values = low + (high - low) * (bits >> np.uint64(11)).astype(np.float64) * 2.0 ** -53
        return float(values[0]) if size is None else values.reshape(size)


# ----------------------------------------------------------------------------------------------------------------------
# the order of a run

BLOCK = 4096                    # rounds in which the mixing shares are exact


class Order:
    """Position n of a run -> (data set, epoch, shard, index in the shard): a pure function.

    datasets: a list of [(shard name, samples), ...]; weights: a number for each data set, of any sum.
    1. n = round * lanes + slot. Rank r of W takes the positions congruent to r mod W, so what a batch holds does not
       depend on W; when W divides `lanes`, a rank stays in its own lanes and so in its own shards.
    2. A round belongs to one data set. Each block of 4096 rounds gives every data set its exact share, by largest
       remainder, in hashed order.
    3. Each data set runs through epochs of its own. An epoch permutes the shards; every lane owns a contiguous range
       of the samples, permuted in windows of `window` samples. Lane sizes differ by one at most, so an epoch holds
       every sample exactly once and the next begins at the very next position."""

    def __init__(self, datasets, weights, seed=0, lanes=64, window=1024):
        self.sizes = [np.array([n for _, n in shards], np.int64) for shards in datasets]
        self.samples = [int(sizes.sum()) for sizes in self.sizes]
        self.weights, self.seed, self.lanes, self.window = list(weights), seed, lanes, window
        if len(weights) != len(datasets) or not datasets:
            raise ValueError(f'{len(datasets)} data sets and {len(weights)} weights: give one weight a data set')
        if lanes < 1 or window < 1:
            raise ValueError(f'lanes={lanes} and window={window} must be at least 1')
        if not all(isinstance(w, (int, float)) and 0 <= w < np.inf for w in weights) or sum(weights) <= 0:
            raise ValueError(f'weights {list(weights)}: they must be numbers, finite, not negative, not all zero')
        exact = np.array(weights, np.float64) / sum(weights) * BLOCK
        self.quotas = np.floor(exact).astype(np.int64)
        remainder = np.argsort(-(exact - self.quotas), kind='stable')
        self.quotas[remainder[:BLOCK - self.quotas.sum()]] += 1
        for i, (quota, weight, samples) in enumerate(zip(self.quotas, weights, self.samples)):
            if weight > 0 and quota == 0:
                raise ValueError(f'data set {i}: weight {weight} of {sum(weights)} is less than one round in {BLOCK}; '
                                 f'give it at least {sum(weights) / BLOCK:g}')
            if quota > 0 and samples == 0:
                raise ValueError(f'data set {i} is empty: give it weight 0')
        self.bounds = np.concatenate([[0], np.cumsum(self.quotas)])
        self.block = functools.lru_cache(64)(self._block)           # 4096 rounds each
        self.shards = functools.lru_cache(2 * len(datasets) + 2)(self._shards)

    def __reduce__(self):       # without its caches, which can not be pickled: workers need not be forked
        datasets = [list(enumerate(sizes.tolist())) for sizes in self.sizes]
        return Order, (datasets, self.weights, self.seed, self.lanes, self.window)

    def _block(self, block):
        """For each round of the block: its data set, and how many rounds of that data set came before in the block."""
        place = permute(np.arange(BLOCK), BLOCK, hash64(self.seed, 1, block))
        dataset = np.searchsorted(self.bounds, place, side='right') - 1
        before = np.zeros(BLOCK, np.int64)
        for i in range(len(self.quotas)):
            before[dataset == i] = np.arange(self.quotas[i])
        return dataset, before

    def _shards(self, dataset, epoch):
        """The shards of an epoch in their order, and where each one's samples begin in it (one more: the end)."""
        sizes = self.sizes[dataset]
        order = np.argsort(hash64(self.seed, 2, dataset, epoch, np.arange(len(sizes))), kind='stable')
        return order, np.concatenate([[0], np.cumsum(sizes[order])])

    def locate(self, n):
        """Positions (int64 array) -> four int64 arrays: data set, epoch, shard, index in the shard."""
        n = np.asarray(n, np.int64)
        if n.size and n.min() < 0:
            raise ValueError(f'position {n.min()}: positions begin at 0')
        flat = n.reshape(-1)
        rounds, slot = flat // self.lanes, flat % self.lanes
        blocks, in_block = rounds // BLOCK, rounds % BLOCK
        dataset, local = np.empty_like(flat), np.empty_like(flat)   # local: the round among those of its data set
        for block in np.unique(blocks):
            here = blocks == block
            of_round, before = self.block(int(block))
            dataset[here] = of_round[in_block[here]]
            local[here] = block * self.quotas[dataset[here]] + before[in_block[here]]
        epoch, place = self._place(dataset, local, slot)
        shard, index = np.empty_like(flat), np.empty_like(flat)
        for d, e in sorted(set(zip(dataset.tolist(), epoch.tolist()))):
            here = (dataset == d) & (epoch == e)
            order, starts = self.shards(d, e)
            k = np.searchsorted(starts, place[here], side='right') - 1
            shard[here], index[here] = order[k], place[here] - starts[k]
        return tuple(x.reshape(n.shape) for x in (dataset, epoch, shard, index))

    def _place(self, dataset, local, slot):
        """Epoch, and the place in the epoch's row of samples, of the `local`-th round of a data set and its slot."""
        lanes, samples = self.lanes, np.array(self.samples, np.int64)[dataset]
        p = local * lanes + slot                                    # the position among those of this data set
        epoch = p // np.maximum(samples, 1)
        base, extra = samples // lanes, samples % lanes
        # An epoch begins at slot `first`; the lanes first, first + 1, ... (wrapping) own one sample more.
        first = epoch * samples % lanes
        more_before = np.where(first + extra <= lanes, np.clip(slot - first, 0, extra),
                               np.minimum(slot, first + extra - lanes) + np.maximum(slot - first, 0))
        start = slot * base + more_before
        owned = base + ((slot - first) % lanes < extra)
        turn = (p - epoch * samples) // lanes                       # how many this lane gave before in this epoch
        window = turn // self.window
        size = np.minimum(self.window, owned - window * self.window)
        key = hash64(self.seed, 3, dataset, epoch, slot, window)
        return epoch, start + window * self.window + permute(turn % self.window, size, key)


# ----------------------------------------------------------------------------------------------------------------------
# reading shards


class BadSample(Exception):
    """A sample that can not be used; the message says why."""


def find(path, data_dir='', what='data set'):
    """Where a file or folder of a config is: in data_dir, there beside the scripts, or just where it says."""
    for candidate in (os.path.join(data_dir, path), os.path.join(HERE, data_dir, path), path):
        if os.path.exists(candidate):
            return candidate
    raise FileNotFoundError(f'{what} {path!r} does not exist, in data_dir={data_dir!r} or as a path: make it with a '
                            'script of prepare/ (the config names it) or correct it')


class Folder:
    """A data set on disk: shards, their counts, and random access to samples. Indexes are made on first use."""

    def __init__(self, path, max_open=64, max_indexes=256):
        self.path = path
        manifest = os.path.join(path, 'manifest.jsonl')
        if os.path.exists(manifest):
            self.shards = list(read_manifest(manifest))
        else:
            tars = sorted(f for f in os.listdir(path) if f.endswith('.tar'))
            self.shards = [(f.removesuffix('.tar'), len(index_tar(os.path.join(path, f)))) for f in tars]
        if not self.shards:
            raise ValueError(f'data set {path!r} holds no shards: make it again with its script of prepare/')
        self.max_open, self.max_indexes = max_open, max_indexes
        self.files, self.indexes = OrderedDict(), OrderedDict()     # least recently used first

    def __getstate__(self):
        return self.__dict__ | {'files': OrderedDict()}             # descriptors mean nothing in another process

    def __len__(self):
        return sum(n for _, n in self.shards)

    def index(self, shard):
        """The samples of a shard: [(key, {extension: (offset, size)}), ...]."""
        if shard not in self.indexes:
            name, count = self.shards[shard]
            tar = os.path.join(self.path, name + '.tar')
            index = index_tar(tar)
            if len(index) != count:
                raise ValueError(f'{tar} holds {len(index)} samples, the manifest says {count}: make the data set '
                                 'again, or mend manifest.jsonl')
            self.indexes[shard] = index
            if len(self.indexes) > self.max_indexes:
                self.indexes.popitem(last=False)
        self.indexes.move_to_end(shard)
        return self.indexes[shard]

    def read(self, shard, index):
        """One sample: (key, {extension: bytes}). pread, never mmap: a file cut short must not kill the process."""
        key, members = self.index(shard)[index]
        if shard not in self.files:
            self.files[shard] = os.open(os.path.join(self.path, self.shards[shard][0] + '.tar'), os.O_RDONLY)
            if len(self.files) > self.max_open:
                os.close(self.files.popitem(last=False)[1])
        self.files.move_to_end(shard)
        sample = {ext: os.pread(self.files[shard], size, offset) for ext, (offset, size) in members.items()}
        for ext, (_, size) in members.items():
            if len(sample[ext]) != size:
                raise BadSample(f'.{ext} has {len(sample[ext])} of {size} bytes')
        return key, sample


def read_manifest(path):
    """(shard name without .tar, samples) of each row; an error names the row that is wrong."""
    seen = set()
    with open(path, 'rb') as f:         # bytes: a row that is not UTF-8 is an error of that row
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, count = row['shard'].removesuffix('.tar'), row['num_sequences']
                if type(count) is not int or count < 0:
                    raise ValueError(f'num_sequences is {count!r}')
                if name in seen:
                    raise ValueError(f'shard {name!r} comes twice')
                seen.add(name)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f'{path}, line {number} is no manifest row ({error}): expected '
                                 '{"shard": "00000000", "num_sequences": 123}') from None
            yield name, count


def index_tar(path):
    """Samples of a tar in file order: [(key, {extension: (offset, size)}), ...]. Members of a sample stand together and
    share the name up to the first dot; a name without a dot, or that begins with it, is no sample (as in webdataset).
    A tar that is cut or damaged is an error: tarfile itself ends in silence."""
    samples, seen, end = [], set(), 0
    with open(path, 'rb') as f:
        try:
            members = tarfile.open(fileobj=f, mode='r:').getmembers()
        except tarfile.TarError as error:
            raise ValueError(f'{path} is no tar or is damaged ({error}): copy it or make the data set again') from None
        for member in members:
            end = member.offset_data + (member.size + 511) // 512 * 512
            folder, name = os.path.split(member.name)
            stem, _, ext = name.partition('.')
            if not member.isfile() or not stem or not ext:
                continue
            key, ext = os.path.join(folder, stem), ext.lower()
            if not samples or samples[-1][0] != key:
                if key in seen:
                    raise ValueError(f'{path}: key {key!r} comes twice; make the data set again')
                seen.add(key)
                samples.append((key, {}))
            if ext in samples[-1][1]:
                raise ValueError(f'{path}: member {member.name!r} comes twice; make the data set again')
            samples[-1][1][ext] = (member.offset_data, member.size)
        f.seek(end)
        if f.read(512) != bytes(512):
            raise ValueError(f'{path} is cut short or damaged at byte {end}: copy it again or make the data set again')
    return samples


# ----------------------------------------------------------------------------------------------------------------------
# samples to rows


def decode_picture(data, max_pixels=64 << 20):
    """Encoded bytes -> RGBA uint8 (H, W, 4). Raises BadSample."""
    from PIL import Image, UnidentifiedImageError
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.width * picture.height > max_pixels:
            raise BadSample(f'a picture of {picture.width} x {picture.height} pixels is over the bound of {max_pixels}')
        return np.array(picture.convert('RGBA'))
    except UnidentifiedImageError:
        raise BadSample('the picture can not be decoded (no known format)') from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f'the picture can not be decoded ({error})') from None


def on_background(rgba, colour=(255, 255, 255)):
    """RGBA uint8 (H, W, 4) over a colour -> RGB uint8 (H, W, 3)."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + np.array(colour, np.uint16) * (255 - alpha) + 127) // 255).astype(np.uint8)


def resize(picture, size):
    """uint8 (H, W, C) -> (size, size, C), bicubic."""
    if picture.shape[:2] == (size, size):
        return picture
    from PIL import Image
    return np.array(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))


LUMA = np.array([0.299, 0.587, 0.114], np.float32)
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
TO_RGB = np.linalg.inv(TO_YIQ)


def augment(rgba, rng):
    """RGBA uint8 (S, S, 4) -> RGB uint8 (S, S, 3): as another designer might have drawn it. Never mirrored, since left
    and right arrows are different names; one in ten is left as it is."""
    from PIL import Image
    if rng.uniform() < 0.1:
        return on_background(rgba)
    size = rgba.shape[0]
    angle, zoom, aspect, shear, dx, dy, hue, saturation, gain, brightness, *gains = rng.uniform(-1, 1, 13)
    gray, lines, line_ink, posterize, tones, outline, outline_ink, ground, hole, *hole_box, blur = rng.uniform(size=14)

    # where things are: rotation, zoom, aspect, shear, shift
    zoom, aspect, angle = np.exp(0.22 * zoom - 0.12), np.exp(0.12 * aspect), 0.3 * angle
    c, s, m = np.cos(angle) / zoom, np.sin(angle) / zoom, size / 2
    a, b, d, e = c * aspect, (s + 0.15 * shear * c) * aspect, -s / aspect, (c - 0.15 * shear * s) / aspect
    dx, dy = m + 0.08 * size * dx, m + 0.08 * size * dy
    picture = Image.fromarray(rgba).transform((size, size), Image.Transform.AFFINE, (
        a, b, m - a * dx - b * dy, d, e, m - d * dx - e * dy), Image.Resampling.BILINEAR)
    x = np.asarray(picture).astype(np.float32) / 255
    rgb, alpha = x[..., :3], x[..., 3]

    # colour: hue and saturation turn and stretch the chroma plane; gains and brightness
    turn, stretch = 0.35 * hue, 0.0 if gray < 0.1 else np.exp(0.6 * saturation)
    chroma = np.eye(3)
    chroma[1:, 1:] = stretch * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    gains = np.exp(0.3 * gain + 0.15 * np.array(gains))
    matrix = ((TO_RGB @ chroma @ TO_YIQ) * gains[:, None]).astype(np.float32)
    rgb = rgb @ matrix.T + np.float32(0.12 * brightness + 0.5 * (1 - gains.mean()))

    # line and tone: dark lines inside, few tones, a dark outline
    if lines < 0.2:
        light = rgb @ LUMA
        edge = abs(np.diff(light, axis=0, append=light[-1:])) + abs(np.diff(light, axis=1, append=light[:, -1:]))
        rgb = rgb * (1 - np.minimum(2 * edge, 1) * np.float32(0.5 + 0.5 * line_ink))[..., None]
    if posterize < 0.15:
        rgb = np.round(rgb * (2 + int(4 * tones))) / (2 + int(4 * tones))
    rgb = rgb.clip(0, 1)
    if outline < 0.25:
        p = np.pad(alpha, 1)
        grown = np.maximum.reduce([alpha, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]])
        rgb, alpha = rgb * alpha[..., None] + np.float32(0.2 * outline_ink) * (1 - alpha[..., None]), grown

    # the ground is white or a light colour; a piece may be missing; a blur
    colour = np.ones(3, np.float32) if ground < 0.6 else rng.uniform(0, 1, 3).astype(np.float32) ** 0.5
    rgb = rgb * alpha[..., None] + colour * (1 - alpha[..., None])
    if hole < 0.25:
        top, left, height, width = (np.array(hole_box) * [1, 1, 0.25, 0.25] + [0, 0, 0.12, 0.12]) * size
        rgb[int(top):int(top + height), int(left):int(left + width)] = colour
    if blur < 0.15:
        p = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode='edge')
        p = p[:-2] + 2 * p[1:-1] + p[2:]
        rgb = (p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]) / 16
    return (255 * rgb + 0.5).astype(np.uint8)


class Processor:
    """A sample -> one row of tokens, targets, blocks, segments and its picture. PaliGemma's form of a row is

        <image> * image_tokens, bos, prompt, newline | caption, eos      (left of the bar: seen by all, never learned)

    and a sample without a picture is bos, text, eos, causal. task=llm leaves pictures out; a row of task=siglip is the
    caption alone, and needs a picture."""

    def __init__(self, tokenizer, image_size, image_tokens, prompt='', seq_len=96, task='vlm'):
        self.tokenizer, self.image_size, self.image_tokens = tokenizer, image_size, image_tokens
        self.prompt, self.seq_len, self.task = prompt, seq_len, task

    def prefix(self, prompt=None):
        """Token ids of a picture and its prompt, up to where the answer begins."""
        t = self.tokenizer
        return ([t.image_id] * self.image_tokens + [t.bos_id]
                + t.encode((self.prompt if prompt is None else prompt) + '\n'))

    def row(self, sample, rng=None):
        """{extension: bytes} -> (tokens, start of what is learned, picture uint8 (H, W, 3) or None, text).

        rng: a Random makes the picture an augmented one. Raises BadSample."""
        t = self.tokenizer
        picture = next((sample[ext] for ext in ('png', 'jpg', 'jpeg', 'webp') if ext in sample), None)
        if self.task == 'llm':
            picture = None
        try:
            text = sample['txt'].decode('utf-8').strip()
        except KeyError:
            raise BadSample(f'no .txt among its members ({", ".join(sorted(sample)) or "none"})') from None
        except UnicodeDecodeError:
            raise BadSample('.txt is not UTF-8') from None
        if self.task == 'siglip':
            if picture is None:
                raise BadSample('no picture (.png, .jpg, .webp) to pair with the text')
            prefix, answer = [], t.encode(text) + [t.eos_id]
        else:
            prefix, answer = [t.bos_id] if picture is None else self.prefix(), t.encode(text) + [t.eos_id]
        if len(prefix) + len(answer) > self.seq_len:
            raise BadSample(f'{len(prefix) + len(answer)} tokens do not fit seq_len={self.seq_len}')
        return prefix + answer, len(prefix), None if picture is None else self.pixels(picture, rng), text

    def pixels(self, data, rng=None):
        """Encoded picture -> RGB uint8 (image_size, image_size, 3)."""
        rgba = resize(decode_picture(data), self.image_size)
        return on_background(rgba) if rng is None else augment(rgba, rng)


def collate(rows, seq_len, pad_id, pairs=False):
    """Rows of `Processor.row` (None: a placeholder that weighs nothing) -> a batch of small integer arrays:
    tokens, targets int32, blocks, segments uint8 (B, T), pixels uint8 (I, H, W, 3) or absent, texts."""
    shape = (len(rows), seq_len)
    tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, -100, np.int32)
    blocks, segments = np.ones(shape, np.uint8), np.zeros(shape, np.uint8)
    pictures, texts = [], []
    for i, row in enumerate(rows):
        texts.append('' if row is None else row[3])
        if row is None:
            continue
        ids, start, picture, _ = row
        tokens[i, :len(ids)], segments[i, :len(ids)] = ids, 1
        if pairs:
            targets[i, 0] = ids[0]      # one target a pair, so that pairs are what the loss is a mean over
        else:
            first = max(start, 1)       # the first token has nothing before it to be predicted from
            targets[i, first - 1:len(ids) - 1] = ids[first:]
        if picture is not None:
            blocks[i, :start] = 0
            pictures.append(picture)
    batch = dict(tokens=tokens, targets=targets, blocks=blocks, segments=segments, texts=texts)
    if pictures:
        batch['pixels'] = np.stack(pictures)
    return batch


def to_device(batch, device, mean=0.5, std=0.5):
    """A collated batch -> the tensors that the models take."""
    import torch
    out = {k: torch.as_tensor(batch[k]).to(device, non_blocking=True).long()
           for k in ('tokens', 'targets', 'blocks', 'segments')}
    if 'pixels' in batch:
        out['pixels'] = to_pixels(batch['pixels'], device, mean, std)
    return out


def to_pixels(pictures, device, mean=0.5, std=0.5):
    """uint8 (I, H, W, 3) -> fp32 (I, 3, H, W), less the mean, by std; 0.5 and 0.5 give -1 to 1, as SigLIP's."""
    import torch
    pixels = torch.as_tensor(pictures).to(device, non_blocking=True).permute(0, 3, 1, 2)
    return pixels.float().div(255 * std).sub(mean / std)


# ----------------------------------------------------------------------------------------------------------------------
# batches


class InOrder:
    """The locate of `Order` for a validation pass over one folder: position n is sample n."""

    def __init__(self, shards):
        self.starts = np.concatenate([[0], np.cumsum([n for _, n in shards])])

    def locate(self, n):
        n = np.asarray(n, np.int64)
        shard = np.searchsorted(self.starts, n, side='right') - 1
        return np.zeros_like(n), np.zeros_like(n), shard, n - self.starts[shard]


class Batches:
    """Positions -> the batch they stand for; what DataLoader's workers run. `seed=None`: no augmentation.

    A sample that can not be used becomes a row that weighs nothing and a line in the batch's `bad`."""

    def __init__(self, folders, order, processor, seed=None):
        self.folders, self.order, self.processor, self.seed = folders, order, processor, seed

    def __getitem__(self, positions):
        rows, bad = [], []
        for n, dataset, _, shard, index in zip(positions.tolist(), *(x.tolist() for x in self.order.locate(positions))):
            folder, key = self.folders[dataset], f'sample {index}'
            try:
                try:
                    key, sample = folder.read(shard, index)
                except (OSError, ValueError) as error:      # a shard that is gone or damaged stops the run, in one line
                    return dict(error=str(error))
                rows.append(self.processor.row(sample, None if self.seed is None else Random(self.seed, 4, n)))
            except BadSample as error:
                rows.append(None)
                bad.append(f'{os.path.join(folder.path, folder.shards[shard][0])}.tar, {key}: {error}')
        p = self.processor
        return collate(rows, p.seq_len, p.tokenizer.pad_id, p.task == 'siglip') | dict(bad=bad, positions=positions)


def positions_of_step(step, batch_size, micro_batch_size, rank=0, world=1):
    """The micro-batches of a rank in one step: arrays of positions. micro_batch_size * world divides batch_size."""
    return np.split(np.arange(step * batch_size + rank, (step + 1) * batch_size, world),
                    batch_size // world // micro_batch_size)


def loader(batches, positions, workers=0):
    """Batches for an iterable of position arrays, in its order, read by `workers` processes (0: in this one)."""
    from torch.utils.data import DataLoader
    return DataLoader(batches, batch_size=None, sampler=positions, num_workers=workers,
                      prefetch_factor=4 if workers else None, worker_init_fn=quiet_worker)


def quiet_worker(_):
    """One thread a worker, in a process group of its own: Ctrl-C and a batch system's SIGTERM reach the main process
    alone, which finishes its step, saves, and closes the workers."""
    import torch
    torch.set_num_threads(1)
    os.setpgid(0, 0)


def all_texts(folders, processor):
    """Every text of the folders once, as rows of a batch: tokens and segments (N, T)."""
    found = {}
    for folder in folders:
        batches = Batches([folder], InOrder(folder.shards), processor)
        for start in range(0, len(folder), 1024):
            rows = batches[np.arange(start, min(start + 1024, len(folder)))]
            if 'error' in rows:
                raise ValueError(rows['error'])
            found |= {row.tobytes(): (row, segments) for row, segments in zip(rows['tokens'], rows['segments'])
                      if segments.any()}        # a placeholder has no text to compare with
    return tuple(np.stack(x) for x in zip(*found.values()))


def shards_between(order, folders, start, end, chunk=1 << 20):
    """Which shards gave how many samples to positions start to end: {data set: {epoch: {shard: samples}}}."""
    counts = {}
    for a in range(start, end, chunk):
        dataset, epoch, shard, _ = order.locate(np.arange(a, min(a + chunk, end)))
        rows, n = np.unique(np.stack([dataset, epoch, shard]), axis=1, return_counts=True)
        for d, e, s, k in zip(*rows.tolist(), n.tolist()):
            shards = counts.setdefault(folders[d].path, {}).setdefault(str(e), {})
            shards[folders[d].shards[s][0]] = shards.get(folders[d].shards[s][0], 0) + k
    return counts


def open_mix(mix, data_dir, seed, lanes, window):
    """The folders of a mix {data set: weight} and their order."""
    folders = [Folder(find(name, data_dir)) for name in mix]
    try:
        return folders, Order([f.shards for f in folders], list(mix.values()), seed, lanes, window)
    except ValueError as error:
        raise ValueError(f'mix={mix}: {error}') from None


# ----------------------------------------------------------------------------------------------------------------------
# which samples did a step see?

if __name__ == '__main__':
    from configurator import configure
    # those settings of train.py that the order depends on, with the same defaults
    data_dir = 'datasets'           # where data sets are: here, or there beside the scripts
    mix = {'emoji/noto': 1.0}       # data set -> sampling weight
    batch_size = 128                # samples a step
    seed = 0
    lanes = 64                      # parallel streams of the order
    window = 1024                   # samples among which a lane is shuffled
    show_steps = ''                 # a:b prints the samples of steps a to b - 1
    configure(globals(), partial=True)
    if not re.fullmatch(r'\d+:\d+', show_steps):
        print(f'data.py: --show_steps={show_steps}: expected a:b, such as --show_steps=100:103', file=sys.stderr)
        sys.exit(2)
    first, last = map(int, show_steps.split(':'))
    try:
        folders, order = open_mix(mix, data_dir, seed, lanes, window)
    except (ValueError, OSError) as error:
        print(f'data.py: {error}', file=sys.stderr)
        sys.exit(2)
    for step in range(first, last):
        n = np.arange(step * batch_size, (step + 1) * batch_size)
        for position, d, e, s, i in zip(n.tolist(), *(x.tolist() for x in order.locate(n))):
            try:
                key = folders[d].index(s)[i][0]
            except (ValueError, OSError) as error:
                print(f'data.py: {error}', file=sys.stderr)
                sys.exit(1)
            print(step, position, list(mix)[d], e, folders[d].shards[s][0], key, sep='\t')
