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
MAX_NAME = 1024                 # characters of a name: each row of an index has room for them


class BadSample(Exception):
    """A sample that can not be used; the message says why."""


def is_url(path):
    return '://' in path


def place(path, data_dir=''):
    """Where a path of a config is; '' if it does not exist."""
    # in data_dir, there beside the scripts, or just where it says
    for candidate in (os.path.join(data_dir, path), os.path.join(HERE, data_dir, path), path):
        candidate = os.path.expanduser(candidate)
        if os.path.exists(candidate):
            return candidate
    return ''


def find(path, data_dir='', what='data set'):
    """Where a file or folder of a config is. Raises FileNotFoundError."""
    found = place(path, data_dir)
    if not found:
        from tars import not_found
        raise FileNotFoundError(not_found(path, data_dir, what))
    return found


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
            from tars import no_shards
            raise ValueError(no_shards(self, spec, data_dir))
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
            paths = [np.char.add(os.fsencode(one.base), one.names) for one in listings]
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
        """The Listing of each part of a spec."""
        # most data sets are one folder with a manifest, whatever its name
        folder = place(spec, data_dir)
        manifest = os.path.join(folder, 'manifest.jsonl')
        if folder and os.path.exists(manifest):
            return [self.manifest(manifest)._replace(base=folder.rstrip('/') + '/')]
        from tars import listings
        return [Listing(*part) for part in listings(self, spec, data_dir)]

    # for tars.py, which imports nothing of this
    is_url, place, find = staticmethod(is_url), staticmethod(place), staticmethod(find)

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
        digest = hashlib.sha256(os.fsencode(what)).hexdigest()[:32]
        return os.path.join(self.cache_dir, 'index', digest + ending)

    def __getstate__(self):
        # descriptors mean nothing in another process
        return self.__dict__ | {'files': OrderedDict()}

    def __len__(self):
        return int(self.sizes.sum())

    def name(self, shard):
        return os.fsdecode(self.names[shard])

    def shard_path(self, shard):
        return self.base + file_of(self.name(shard))

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
            # a pipe would be waited for
            if os.path.exists(path) and not os.path.isfile(path):
                raise OSError(f'{path} is a folder or a device, no shard: give it another name')
            if not os.path.exists(path):
                raise OSError(f'{path} is missing, a shard of data set {self.path!r}: bring it '
                              'back, or make the data set or its manifest.jsonl again')
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
            # 2: what index_tar gives, or refuses, has changed
            cached = self.cached(f'index 2 {self.contents[shard]}', '.npy')
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


def file_of(name):
    """A shard's file: its name says .tar only where that is written in another way (.TAR)."""
    is_whole = name.lower().endswith('.tar') and not name.endswith('.tar')
    return name if is_whole else f'{name}.tar'


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
            for key in ('num_sequences', 'num_bytes', 'sequence_length', 'vocab_size'):
                if type(row.get(key, 0)) is not int or not 0 <= row.get(key, 0) < 1 << 40:
                    raise ValueError(f'{key} is {row[key]!r}')
            num_bytes += row.get('num_bytes', 0)
            if not 0 < len(chunk[-1]) <= MAX_NAME or b'\0' in chunk[-1]:
                raise ValueError('shard is no name of a file')

            # the same in every row
            length, dtype = row.get('sequence_length', 0), row.get('dtype', 'uint16')
            stored.add(Stored(length, dtype, row.get('vocab_size', 0)))
            if len(stored) > 1 or dtype not in ('uint16', 'uint32'):
                raise ValueError(f'sequence_length, dtype and vocab_size are {stored}')
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
        raise ValueError(f'{path}: shard {os.fsdecode(twice[0])!r} comes twice')
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
        # as in webdataset: a name without a dot, or that begins with it (as those that macOS adds
        # do), is no sample, and no __folder__ holds any
        folder, slash, name = member.name.rpartition('/')
        stem, _, ext = name.partition('.')
        if member.isdir() or not stem or not ext or re.match('__[^/]*__/', member.name):
            continue
        if not is_plain(member):
            from tars import no_file
            raise ValueError(f'{path}: {no_file(member)}')

        # Members that share the name up to the first dot are one sample, wherever they stand. A
        # key that comes again, later in the tar and with members that it has already, is another
        # sample, marked as repeated.
        key, ext = folder + slash + stem, ext.lower()
        sample, exts = latest.get(key, (-1, ()))
        repeated = ext in exts
        if sample < 0 or repeated and sample != count - 1:
            sample, exts, count = count, set(), count + 1
            latest[key] = sample, exts
        exts.add(ext)
        place_of = member.offset_data, member.size
        rows.append((sample, os.fsencode(key), os.fsencode(ext), *place_of, repeated))

    # sample by sample; inside one they stay as they are in the tar
    rows.sort(key=lambda row: row[0])
    key_bytes = max((len(row[1]) for row in rows), default=1)
    ext_bytes = max((len(row[2]) for row in rows), default=1)
    return np.array(rows, [('sample', '<u4'), ('key', f'S{key_bytes}'), ('ext', f'S{ext_bytes}'),
                           ('offset', '<u8'), ('size', '<u8'), ('repeated', '?')])


def is_plain(member):
    """Is it a file that lies in its tar, byte by byte?"""
    has_name = len(member.name) <= MAX_NAME and '\0' not in member.name
    return has_name and member.isreg() and not member.issparse()


def read_headers(path, fd):
    """The members of a tar, which must be whole. Raises ValueError."""
    members, end = [], 0
    with open(os.dup(fd), 'rb') as f:
        f.seek(0)
        try:
            tar = tarfile.open(fileobj=f, mode='r:')
            while (member := tar.next()) is not None:
                # it would go in circles
                if member.size < 0 or tar.offset <= end:
                    raise ValueError(f'a member of {member.size} bytes')
                members.append(member)
                end = tar.offset
        # a damaged header may be anything to tarfile
        except Exception as error:
            raise ValueError(f'{path} is no tar or is damaged ({error}): copy it or make the data '
                             'set again') from None

        # tarfile ends in silence where a tar is cut, at a damaged header, and at the end of the
        # first of two that were joined. Behind the last member there must be zeros, and no more.
        problem = end_of(f, end)
        if problem:
            raise ValueError(f'{path} {problem}')
    return members


def end_of(f, end):
    """What is wrong with the end of a tar whose members end at byte `end`, or ''."""
    f.seek(end)
    if f.read(512) != bytes(512):
        return f'is cut short or damaged at byte {end}: copy it again or make the data set again'
    while block := f.read(1 << 20):
        if block.strip(b'\0'):
            return (f'ends at byte {end}, but more follows: is it several tars, joined? Each is a '
                    'shard of its own (or `tar xif` it and `tar cf` a new one)')
    return ''


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
            from npy import read_sequences
            self.stride = sequence_length * np.dtype(dtype).itemsize
            self.starts, self.keys, self.offsets = read_sequences(
                table, sequence_length, np.dtype(dtype), fd, path)
        elif EPISODE in table['ext']:
            from npy import read_episodes
            self.starts, self.keys, self.episodes = read_episodes(table, self.first, fd, path)

    def __len__(self):
        return self.starts[-1] if self.starts else len(self.first) - 1

    def place(self, index):
        """Of a sample: the number of its key, and its own number in that."""
        number = bisect_right(self.starts, index) - 1
        return number, index - self.starts[number]

    def key(self, index):
        if not self.starts:
            return os.fsdecode(self.table['key'][self.first[index]])
        number, inside = self.place(index)
        return f'{os.fsdecode(self.keys[number])}[{inside}]'

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
            members.append((os.fsdecode(ext), offset, size, repeated))
        return members

    def row_type(self, index):
        """Of an episode's rows."""
        return self.episodes[self.place(index)[0]][0]

    def offset(self, index):
        """Of a sequence."""
        number, inside = self.place(index)
        return self.offsets[number] + inside * self.stride
