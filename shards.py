"""Shards: data sets of plain .tar files (webdataset's format), on disk or behind a URL.

`Folder('web/{000..099}.tar,s3://bucket/more')` knows its shards and their counts, and gives any
sample: `read(shard, index)`. What is learned of a shard once (its index, a copy if it is remote)
is kept in a cache folder that all processes of a node share.
"""
import functools
import hashlib
import io
import json
import os
import re
import tarfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'nanofoundry')
MAX_MEMBER = 64 << 20           # bytes of a member that is read whole; more is a bad sample


class BadSample(Exception):
    """A sample that can not be used; the message says why."""


def is_url(path):
    return '://' in path


def find(path, data_dir='', what='data set'):
    """Where a file or folder of a config is. Raises FileNotFoundError."""
    # in data_dir, there beside the scripts, or just where it says
    for candidate in (os.path.join(data_dir, path), os.path.join(HERE, data_dir, path), path):
        if os.path.exists(candidate):
            return candidate
    remedy = 'make it with a script of prepare/ (the config names it) or correct it'
    from usage import nearest_folder
    near = nearest_folder(path, data_dir)
    if near:
        remedy = f'did you mean {near!r}? If not, {remedy}'
    raise FileNotFoundError(f'{what} {path!r} does not exist, in data_dir={data_dir!r} or as a '
                            f'path: {remedy}')


def expand(spec):
    """'a,s3://b/{000..099}.tar' -> the paths and URLs in it."""
    from braceexpand import UnbalancedBracesError, braceexpand
    # commas inside braces separate nothing here
    patterns = re.findall(r'(?:\{[^{}]*\}|[^,])+', spec)
    try:
        return [path for pattern in patterns for path in braceexpand(pattern.strip())]
    except UnbalancedBracesError:
        raise ValueError(f'data set {spec!r}: its braces do not match') from None


# -------------------------------------------------------------------------------------------------
# a data set


class Stored(NamedTuple):
    """How tokens are stored. sequence_length 0: not in sequences of one length."""
    sequence_length: int = 0
    dtype: str = 'uint16'
    vocab_size: int = 0


class Listing(NamedTuple):
    """Shards of one folder."""
    base: str               # stands before each name: a folder and its /
    names: np.ndarray       # bytes, without .tar
    sizes: np.ndarray       # samples; -1: they have to be counted
    stored: Stored = Stored()
    num_bytes: int = 0      # of the text they were made from, if known


class Folder:
    """A data set: its shards, their counts, and random access to samples. `spec` is a folder, a
    manifest (.jsonl), a list of shards (.txt), a .tar, or several of those with commas or {braces}
    between; each a path or a URL. sequence_length > 0: samples are sequences of so many tokens.
    Each row of a `key.lowdim.npy`, a whole episode, is a sample."""

    def __init__(self, spec, data_dir='', cache_dir=CACHE, cache_gb=100.0, max_open=128,
                 max_index_bytes=128 << 20):
        self.path, self.cache_dir, self.cache_gb = spec, os.path.expanduser(cache_dir), cache_gb
        self.max_open, self.max_index_bytes = max_open, max_index_bytes
        self.horizon = 0                # rows read of an episode for a sample; 0: all to its end
        self.files = OrderedDict()      # shard -> descriptor, the least recently used first
        self.indexes = OrderedDict()    # shard -> Index, likewise
        self.contents = {}              # shard -> what names the content of its file

        listings = [one for one in self.listings(spec, data_dir) if len(one.names)]
        if not listings:
            raise ValueError(f'data set {spec!r} holds no shards (.tar): `tar cf FOLDER/a.tar -C '
                             'FOLDER .` makes one of files, or make it with a script of prepare/')
        if len({one.stored for one in listings}) > 1:
            raise ValueError(f'data set {spec!r}: its parts differ in sequence_length, dtype or '
                             'vocab_size')
        self.base, self.names, self.sizes, stored, _ = listings[0]
        self.sequence_length, self.dtype, self.vocab_size = stored
        self.sequence_bytes = self.sequence_length * np.dtype(self.dtype).itemsize
        self.num_bytes = sum(one.num_bytes for one in listings)
        self.is_remote = any(is_url(one.base) for one in listings)

        # of several folders each name is a path; arrays, so that a million shards take little
        if len(listings) > 1:
            self.base, self.sizes = '', np.concatenate([one.sizes for one in listings])
            paths = [np.char.add(one.base.encode(), one.names) for one in listings]
            self.names = np.concatenate(paths)

        # there is no manifest that says it
        unknown = np.flatnonzero(self.sizes < 0)
        if len(unknown):
            from tqdm import tqdm
            for shard in tqdm(unknown.tolist(), desc=f'counting {spec}', delay=2, leave=False):
                self.sizes[shard] = len(self.index(shard))

    @functools.cached_property
    def remote(self):
        """The cache of remote shards; made, and its file imported, when a URL is met."""
        from remote import Remote
        return Remote(self.cache_dir, int(self.cache_gb * (1 << 30)))

    def listings(self, spec, data_dir):
        """Yields the Listing of each folder of a spec: first whole ones, then single shards."""
        chosen = {}                     # folder -> file names
        for path in expand(spec):
            if path.endswith('.tar'):
                tars = [path]
            elif path.endswith('.txt'):
                tars = self.tars_of_list(path if is_url(path) else find(path, data_dir))
            else:
                yield self.whole_folder(path, data_dir)
                continue
            for tar in tars:
                chosen.setdefault(os.path.dirname(tar), []).append(os.path.basename(tar))
        for folder, files in chosen.items():
            if not is_url(folder) and not os.path.isdir(folder):
                folder = find(folder or '.', data_dir)
            yield self.some_of_folder(folder, files)

    def tars_of_list(self, path):
        """Paths and URLs in a .txt, one a line, relative to where it is."""
        lines = self.read_file(path).decode().splitlines()
        tars = [line.strip() for line in lines if line.strip()]
        return [tar if is_url(tar) else os.path.join(os.path.dirname(path), tar) for tar in tars]

    def whole_folder(self, path, data_dir):
        """The Listing of a folder, or of the folder of a manifest."""
        folder = path.rstrip('/') if is_url(path) else find(path, data_dir)
        manifest = folder if folder.endswith('.jsonl') else folder + '/manifest.jsonl'
        base = os.path.dirname(manifest) + '/'
        if folder == manifest or self.exists(manifest):
            return self.manifest(manifest)._replace(base=base)
        # without one the shards are those that are there
        files = self.remote.names_in(folder) if is_url(folder) else os.listdir(folder)
        names = to_names(file for file in files if file.endswith('.tar'))
        return Listing(base, np.sort(names), np.full(len(names), -1))

    def some_of_folder(self, folder, files):
        """The Listing of some shards; their counts are in the manifest, if there is one."""
        names, sizes, stored = to_names(files), np.full(len(files), -1), Stored()
        if self.exists(folder + '/manifest.jsonl'):
            _, known, counts, stored, _ = self.manifest(folder + '/manifest.jsonl')
            _, ours, theirs = np.intersect1d(names, known, return_indices=True)
            sizes[ours] = counts[theirs]
        return Listing(folder + '/', names, sizes, stored)

    def exists(self, path):
        return self.remote.exists(path) if is_url(path) else os.path.exists(path)

    def read_file(self, path):
        if is_url(path):
            return self.remote.read(path)
        with open(path, 'rb') as f:
            return f.read()

    def manifest(self, path):
        """The Listing of a manifest, without a base; a long one is parsed once."""
        if is_url(path):
            name, stamp = path, self.remote.fingerprint(path)
        else:
            stat = os.stat(path)
            name, stamp = os.path.abspath(path), (stat.st_size, stat.st_mtime_ns)
        cached = self.cached(f'manifest {name} {stamp}', '.npz')
        if os.path.exists(cached):
            with np.load(cached) as z:
                stored = Stored(int(z['length']), str(z['dtype']), int(z['vocab_size']))
                return Listing('', z['names'], z['sizes'], stored, int(z['num_bytes']))

        listing = read_manifest(path, self.read_file(path))
        if len(listing.names) > 10_000:
            _, names, sizes, (length, dtype, vocab_size), num_bytes = listing
            write_cache(cached, lambda f: np.savez(
                f, names=names, sizes=sizes, length=length, dtype=dtype, vocab_size=vocab_size,
                num_bytes=num_bytes))
        return listing

    def cached(self, what, ending):
        digest = hashlib.sha256(what.encode()).hexdigest()[:32]
        return os.path.join(self.cache_dir, 'index', digest + ending)

    def __getstate__(self):
        # descriptors mean nothing in another process
        return self.__dict__ | {'files': OrderedDict()}

    def __len__(self):
        return int(self.sizes.sum())

    def name(self, shard):
        return self.names[shard].decode()

    def shard_path(self, shard):
        return f'{self.base}{self.name(shard)}.tar'

    def fetch(self, shards):
        """Begin to copy remote shards to this node."""
        for path in map(self.shard_path, shards):
            if is_url(path):
                self.remote.begin(path)

    def open(self, shard):
        """A descriptor of a shard."""
        if shard not in self.files:
            path = self.shard_path(shard)
            remote = is_url(path)
            path = self.remote.copy(path) if remote else os.path.abspath(path)
            self.files[shard] = os.open(path, os.O_RDONLY)
            if len(self.files) > self.max_open:
                os.close(self.files.popitem(last=False)[1])

            # the time of a copy says when it was used; it has another name for each content
            stat = os.fstat(self.files[shard])
            content = f'{path} {stat.st_size} {"" if remote else stat.st_mtime_ns}'
            if self.contents.setdefault(shard, content) != content:
                # it changed since it was open before
                self.contents[shard] = content
                self.indexes.pop(shard, None)
        self.files.move_to_end(shard)
        return self.files[shard]

    def index(self, shard):
        """The Index of a shard: made when it is first opened, then kept in the cache folder."""
        if shard not in self.indexes:
            path, fd = self.shard_path(shard), self.open(shard)
            cached = self.cached(self.contents[shard], '.npy')
            # a file of the cache may be missing or damaged: what it holds can be had again
            try:
                table = np.load(cached)
            except (OSError, ValueError, EOFError):
                table = index_tar(path, fd)
                write_cache(cached, lambda f: np.save(f, table))
            index = Index(table, self.sequence_length, self.dtype, fd, path)
            if 0 <= self.sizes[shard] != len(index):
                raise ValueError(f'{path} holds {len(index)} samples, the manifest says '
                                 f'{self.sizes[shard]}: make the data set again, or mend '
                                 'manifest.jsonl')
            self.indexes[shard] = index

            # the newest stays, however large it is
            total = sum(each.table.nbytes for each in self.indexes.values())
            while len(self.indexes) > 1 and total > self.max_index_bytes:
                total -= self.indexes.popitem(last=False)[1].table.nbytes
        self.indexes.move_to_end(shard)
        return self.indexes[shard]

    def key(self, shard, index):
        """A sample's key; in a shard of sequences its member's key and the number in it."""
        return self.index(shard).key(index)

    def read(self, shard, index):
        """One sample: {extension: bytes}."""
        # first the descriptor: opening may make the index void
        fd, sample = self.open(shard), {}
        for ext, offset, size, repeated in self.index(shard).members(index, self.horizon):
            if repeated:
                raise BadSample(f'.{ext} comes twice in its shard')
            if size > MAX_MEMBER:
                raise BadSample(f'.{ext} has {size} bytes, over the bound of {MAX_MEMBER}')
            # never mmap: a file that is cut short must not kill the process
            sample[ext] = os.pread(fd, size, offset)
            if len(sample[ext]) != size:
                raise BadSample(f'.{ext} has {len(sample[ext])} of {size} bytes')

        # bytes of which only the index and the manifest know the type
        if 'lowdim.npy' in sample:
            row_type = self.index(shard).row_type(index)
            sample['lowdim.npy'] = np.frombuffer(sample['lowdim.npy'], row_type)
        if 'tokens.bin' in sample:
            size = len(sample['tokens.bin'])
            if size % np.dtype(self.dtype).itemsize:
                raise BadSample(f'.tokens.bin has {size} bytes, which are no row of {self.dtype}')
            sample['tokens.bin'] = np.frombuffer(sample['tokens.bin'], self.dtype)
        return sample

    def read_sequence(self, shard, index):
        """The bytes of one sequence."""
        fd = self.open(shard)
        data = os.pread(fd, self.sequence_bytes, self.index(shard).offset(index))
        if len(data) != self.sequence_bytes:
            raise BadSample('its sequence is cut short')
        return data


def to_names(files):
    """Names of .tar files -> an array of UTF-8 bytes, without .tar."""
    return np.array([file.removesuffix('.tar').encode() for file in files], np.bytes_)


def read_manifest(path, data):
    """The Listing of a manifest's bytes, without a base; an error names the row."""
    names, chunk, sizes, stored, num_bytes = [], [], [], set(), 0
    for number, line in enumerate(io.BytesIO(data), 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
            chunk.append(row['shard'].removesuffix('.tar').encode())
            sizes.append(row['num_sequences'])
            num_bytes += row.get('num_bytes', 0)
            if type(sizes[-1]) is not int or not 0 <= sizes[-1] < 1 << 40:
                raise ValueError(f'num_sequences is {sizes[-1]!r}')

            # the same in every row
            length, dtype = row.get('sequence_length', 0), row.get('dtype', 'uint16')
            stored.add(Stored(length, dtype, row.get('vocab_size', 0)))
            if len(stored) > 1 or type(length) is not int or dtype not in ('uint16', 'uint32'):
                raise ValueError(f'sequence_length, dtype and vocab_size are {stored}')
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path}, line {number} is no manifest row ({error}): expected '
                             '{"shard": "00000000", "num_sequences": 123}') from None

        # a million str would take more memory than all the rest
        if len(chunk) == 10_000:
            names.append(np.array(chunk))
            chunk = []

    names = np.concatenate([*names, np.array(chunk, np.bytes_)])
    # beside each other once they are sorted
    ordered = np.sort(names)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ValueError(f'{path}: shard {twice[0].decode()!r} comes twice')
    stored = next(iter(stored), Stored())
    return Listing('', names, np.array(sizes, np.int64), stored, num_bytes)


def write_cache(path, write):
    """A file of the cache, whole or not at all."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # two processes, or two threads of one, may write it at once
        temporary = f'{path}.{os.getpid()}.{threading.get_ident()}.tmp'
        with open(temporary, 'wb') as f:
            write(f)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f'the cache {path} can not be written ({error.strerror}): give another '
                      'cache_dir') from None


# -------------------------------------------------------------------------------------------------
# the index of one shard

EPISODE = b'lowdim.npy'      # a member whose every row is a sample (npy.py)


def index_tar(path, fd):
    """The members of a tar's samples as a table: sample, key, ext, offset, size, repeated."""
    rows, latest, count = [], {}, 0         # latest: key -> (its sample, extensions of that)
    for member in read_headers(path, fd):
        # as in webdataset: a name without a dot, or that begins with it, is no sample
        folder, name = os.path.split(member.name)
        stem, _, ext = name.partition('.')
        if not member.isfile() or not stem or not ext:
            continue

        # Members that share the name up to the first dot are one sample, wherever they stand. A
        # key that comes again, later in the tar and with members that it has already, is another
        # sample, marked as repeated.
        key, ext = os.path.join(folder, stem), ext.lower()
        sample, exts = latest.get(key, (-1, ()))
        repeated = ext in exts
        if sample < 0 or repeated and sample != count - 1:
            sample, exts, count = count, set(), count + 1
            latest[key] = sample, exts
        exts.add(ext)
        place = member.offset_data, member.size
        rows.append((sample, key.encode(), ext.encode(), *place, repeated))

    # sample by sample; inside one they stay as they are in the tar
    rows.sort(key=lambda row: row[0])
    key_bytes = max((len(row[1]) for row in rows), default=1)
    ext_bytes = max((len(row[2]) for row in rows), default=1)
    return np.array(rows, [('sample', '<u4'), ('key', f'S{key_bytes}'), ('ext', f'S{ext_bytes}'),
                           ('offset', '<u8'), ('size', '<u8'), ('repeated', '?')])


def read_headers(path, fd):
    """The members of a tar, which must be whole. Raises ValueError."""
    with open(os.dup(fd), 'rb') as f:
        f.seek(0)
        try:
            members = tarfile.open(fileobj=f, mode='r:').getmembers()
        except tarfile.TarError as error:
            raise ValueError(f'{path} is no tar or is damaged ({error}): copy it or make the data '
                             'set again') from None

        # tarfile ends in silence where a tar is cut. Behind the last member, which is padded to
        # blocks of 512 bytes, a block of zeros must be.
        end = 0
        if members:
            end = members[-1].offset_data + (members[-1].size + 511) // 512 * 512
        f.seek(end)
        if f.read(512) != bytes(512):
            raise ValueError(f'{path} is cut short or damaged at byte {end}: copy it again or '
                             'make the data set again')
    return members


class Index:
    """Where the samples of one shard are, from the table of `index_tar`."""

    def __init__(self, table, sequence_length, dtype, fd, path):
        self.table = table
        # where each key's rows begin in the table (one more: the end)
        num_keys = int(table['sample'][-1]) + 1 if len(table) else 0
        self.first = np.searchsorted(table['sample'], np.arange(num_keys + 1)).tolist()
        # A key is one sample; or, with a sequence_length, a member holds several, and so does an
        # episode: its rows. Then starts: the number of each key's first (one more: the count).
        self.starts, self.keys, self.episodes = [], [], []
        if sequence_length:
            self.read_offsets(sequence_length, np.dtype(dtype), fd, path)
        elif EPISODE in table['ext']:
            from npy import read_episodes
            self.starts, self.keys, self.episodes = read_episodes(table, self.first, fd, path)

    def read_offsets(self, sequence_length, dtype, fd, path):
        """Where each member's sequences begin."""
        self.starts, self.offsets, self.stride = [0], [], sequence_length * dtype.itemsize
        for _, key, ext, offset, size, _ in self.table.tolist():
            where = f'{path}, {key.decode()}'
            # members of other kinds hold no sequences
            if ext == b'tokens.npy':
                from npy import npy_header
                _, its_dtype, header = npy_header(fd, offset, size, where)
                if its_dtype != dtype:
                    raise ValueError(f'{where}: {its_dtype}, the manifest says {dtype}')
                offset, size = offset + header, size - header
            elif ext != b'tokens.bin':
                continue
            if size % self.stride:
                raise ValueError(f'{where}: {size // dtype.itemsize} tokens are no multiple of '
                                 f'sequence_length={sequence_length}')
            self.starts.append(self.starts[-1] + size // self.stride)
            self.offsets.append(offset)
            self.keys.append(key)

    def __len__(self):
        return self.starts[-1] if self.starts else len(self.first) - 1

    def place(self, index):
        """Of a sample: the number of its key, and its own number in that."""
        number = bisect_right(self.starts, index) - 1
        return number, index - self.starts[number]

    def key(self, index):
        if not self.starts:
            return self.table['key'][self.first[index]].decode()
        number, inside = self.place(index)
        return f'{self.keys[number].decode()}[{inside}]'

    def members(self, index, horizon=0):
        """(extension, offset, size, repeated) of each member of a sample."""
        row_type, members = None, []
        if self.episodes:
            index, row = self.place(index)
            row_type, header = self.episodes[index]
        table = self.table[self.first[index]:self.first[index + 1]]
        for _, _, ext, offset, size, repeated in table.tolist():
            if row_type is not None and ext == EPISODE:
                # `horizon` rows from the sample's own on; 0: all to the episode's end
                begin = header + row * row_type.itemsize
                offset, size = offset + begin, size - begin
                if horizon:
                    size = min(size, horizon * row_type.itemsize)
            members.append((ext.decode(), offset, size, repeated))
        return members

    def row_type(self, index):
        """Of an episode's rows."""
        return self.episodes[self.place(index)[0]][0]

    def offset(self, index):
        """Of a sequence."""
        number, inside = self.place(index)
        return self.offsets[number] + inside * self.stride
