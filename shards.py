"""Shards: data sets of plain .tar files (webdataset's format), on disk or behind a URL, with random access to samples.

`Folder('web/{000..099}.tar,s3://bucket/more')` knows its shards and their counts; `read(shard, index)` gives the
members of one sample. What is learned about a shard once (its index, a copy if it is remote) is kept in a cache folder
that all processes of a node share.
"""
import hashlib
import io
import json
import os
import re
import tarfile
import threading
import time
from bisect import bisect_right
from collections import OrderedDict

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'nanofoundry')
MAX_MEMBER = 64 << 20           # bytes of a member that is read whole; more is a bad sample
DOWNLOADS = threading.Semaphore(8)
# a forked worker has none of its parent's threads, which may hold it
os.register_at_fork(after_in_child=lambda: globals().update(DOWNLOADS=threading.Semaphore(8)))


class BadSample(Exception):
    """A sample that can not be used; the message says why."""


def find(path, data_dir='', what='data set'):
    """Where a file or folder of a config is: in data_dir, there beside the scripts, or just where it says."""
    for candidate in (os.path.join(data_dir, path), os.path.join(HERE, data_dir, path), path):
        if os.path.exists(candidate):
            return candidate
    raise FileNotFoundError(f'{what} {path!r} does not exist, in data_dir={data_dir!r} or as a path: make it with a '
                            'script of prepare/ (the config names it) or correct it')


def is_url(path):
    return '://' in path


def expand(spec):
    """'a,s3://b/{000..099}.tar' -> its parts, braces expanded; commas inside braces separate nothing else."""
    from braceexpand import UnbalancedBracesError, braceexpand
    try:
        return [name for part in re.findall(r'(?:\{[^{}]*\}|[^,])+', spec) for name in braceexpand(part.strip())]
    except UnbalancedBracesError:
        raise ValueError(f'data set {spec!r}: its braces do not match') from None


def filesystem(url):
    """The fsspec file system of a URL and the path in it. Raises ValueError and ImportError."""
    import fsspec
    fs, path = fsspec.url_to_fs(url)
    fs.invalidate_cache()           # what it listed before may have changed
    return fs, path


def patiently(url, action, retries=5, what='read'):
    """action(file system, path), again after 0.5, 1, 2 ... seconds where it fails; OSError in the end."""
    for attempt in range(retries + 1):
        try:
            return action(*filesystem(url))
        except (FileNotFoundError, PermissionError, ImportError, ValueError) as error:
            raise OSError(f'{url} can not be {what}: {error!r}') from None      # trying again would not help
        except Exception as error:          # each kind of storage has errors of its own
            if attempt == retries:
                raise OSError(f'{url} can not be {what}, {attempt + 1} times: {error!r}') from None
            time.sleep(0.5 * 2 ** attempt)


class Remote:
    """Copies of remote shards in a folder that all processes of a node share: whole or not at all, at most `max_bytes`
    besides what is under way, the least recently used go first. A reader that holds a file open keeps it."""

    def __init__(self, folder, max_bytes=100 << 30, retries=5):
        self.folder, self.max_bytes, self.retries = os.path.join(folder, 'shards'), max_bytes, retries

    def ask(self, url, action):
        return patiently(url, action, self.retries)

    def fingerprint(self, url):
        """Changes when the file does: size and ETag or time of change, where the storage tells them."""
        return self.ask(url, lambda fs, path: (fs.ukey(path), fs.size(path)))

    def fetch(self, url):
        """The local copy of a shard."""
        import filelock
        key, size = self.fingerprint(url)
        local = os.path.join(self.folder, hashlib.sha256(f'{url} {key}'.encode()).hexdigest()[:32] + '.tar')
        if size is not None and size > self.max_bytes:
            raise OSError(f'{url} has {size} bytes, more than the whole cache may hold: raise cache_gb')
        os.makedirs(self.folder, exist_ok=True)
        # one of 256 locks, so that they do not pile up
        with filelock.FileLock(os.path.join(self.folder, f'{os.path.basename(local)[:2]}.lock')):
            if not os.path.exists(local):
                self.make_room(size or 0)
                self.ask(url, lambda fs, path: self.download(fs, path, local, size))
            os.utime(local)
        return local

    def download(self, fs, path, local, size):
        fs.get_file(path, local + '.part')
        if size is not None and os.path.getsize(local + '.part') != size:
            raise OSError(f'{os.path.getsize(local + ".part")} of {size} bytes came')
        os.rename(local + '.part', local)

    def make_room(self, size):
        """Remove the least recently used copies, and what a killed process left of one a day ago."""
        files = []
        for entry in os.scandir(self.folder):
            try:
                stat = entry.stat()
                if entry.name.endswith('.tar'):
                    files.append((stat.st_mtime, stat.st_size, entry.path))
                elif entry.name.endswith('.part') and stat.st_mtime < time.time() - 86400:
                    os.remove(entry.path)
            except FileNotFoundError:           # another process was quicker
                pass
        total = sum(n for _, n, _ in files) + size
        for _, n, path in sorted(files):
            if total <= self.max_bytes:
                break
            try:
                os.remove(path)
            except FileNotFoundError:
                pass
            total -= n


class Folder:
    """A data set: its shards, their counts, and random access to samples. `spec` is a folder, a manifest (.jsonl), a
    list of shards (.txt), a .tar, or several of those with commas or {braces} between; each a path or a URL.

    names (bytes, without .tar) and sizes (samples) are arrays, so that a million shards take little. sequence_length >
    0: the shards hold sequences of so many tokens of `dtype`; num_bytes: of the text they were made from, if known.
    Each row of a `key.lowdim.npy`, a whole episode, is a sample."""

    def __init__(self, spec, data_dir='', cache_dir=CACHE, cache_gb=100.0, max_open=128, max_index_bytes=128 << 20):
        self.path, self.cache_dir = spec, os.path.expanduser(cache_dir)
        self.remote = Remote(self.cache_dir, int(cache_gb * (1 << 30)))
        self.max_open, self.max_index_bytes = max_open, max_index_bytes
        self.horizon = 0            # rows that are read of an episode for one of its anchors; 0: all to its end
        self.files, self.indexes = OrderedDict(), OrderedDict()     # least recently used first
        self.local, self.coming = {}, {}                            # shard -> path; shard -> thread that fetches it
        self.contents = {}                                          # shard -> what names the content of its file
        parts = [part for part in self.listing(spec, data_dir) if len(part[1])]
        if not parts:
            raise ValueError(f'data set {spec!r} holds no shards: make it again with its script of prepare/')
        if len({part[3] for part in parts}) > 1:
            raise ValueError(f'data set {spec!r}: its parts differ in sequence_length, dtype or vocab_size')
        self.base, self.names, self.sizes, (self.sequence_length, self.dtype, self.vocab_size), _ = parts[0]
        self.num_bytes = sum(part[4] for part in parts)
        self.is_remote = any(is_url(part[0]) for part in parts)
        self.sequence_bytes = self.sequence_length * np.dtype(self.dtype).itemsize
        if len(parts) > 1:
            self.base, self.sizes = '', np.concatenate([part[2] for part in parts])
            self.names = np.concatenate([np.char.add(base.encode(), names) for base, names, *_ in parts])
        unknown = np.flatnonzero(self.sizes < 0)
        if len(unknown):
            from tqdm import tqdm
            for shard in tqdm(unknown.tolist(), desc=f'counting {spec}', delay=2, leave=False):
                self.sizes[shard] = len(self.index(shard))

    def listing(self, spec, data_dir):
        """Yields (base, names, sizes, (sequence_length, dtype, vocab_size), num_bytes) of the parts of a spec; a size
        of -1 has to be counted."""
        tars = {}
        for part in expand(spec):
            if part.endswith('.txt'):
                text = self.read_file(part if is_url(part) else (part := find(part, data_dir))).decode()
                for line in filter(None, map(str.strip, text.splitlines())):
                    line = line if is_url(line) else os.path.join(os.path.dirname(part), line)
                    tars.setdefault(os.path.dirname(line), []).append(os.path.basename(line))
            elif part.endswith('.tar'):
                tars.setdefault(os.path.dirname(part), []).append(os.path.basename(part))
            else:
                folder = part.rstrip('/') if is_url(part) else find(part, data_dir)
                manifest = folder if folder.endswith('.jsonl') else folder + '/manifest.jsonl'
                base = os.path.dirname(manifest) + '/'
                if folder == manifest or self.exists(manifest):
                    yield base, *self.manifest(manifest)
                else:
                    names = sorted(n.removesuffix('.tar') for n in self.list_tars(folder))
                    yield base, to_names(names), np.full(len(names), -1), (0, 'uint16', 0), 0
        for folder, files in tars.items():
            folder = folder if is_url(folder) or folder and os.path.isdir(folder) else find(folder or '.', data_dir)
            names, sizes = to_names([f.removesuffix('.tar') for f in files]), np.full(len(files), -1)
            kind, num_bytes = (0, 'uint16', 0), 0
            if self.exists(folder + '/manifest.jsonl'):
                known, counts, kind, _ = self.manifest(folder + '/manifest.jsonl')
                _, ours, theirs = np.intersect1d(names, known, return_indices=True)
                sizes[ours] = counts[theirs]
            yield folder + '/', names, sizes, kind, num_bytes

    def exists(self, path):
        if not is_url(path):
            return os.path.exists(path)
        return self.remote.ask(path, lambda fs, path: fs.exists(path))

    def list_tars(self, folder):
        names = (self.remote.ask(folder, lambda fs, path: fs.ls(path, detail=False)) if is_url(folder) else
                 os.listdir(folder))
        return [os.path.basename(n.rstrip('/')) for n in names if n.endswith('.tar')]

    def read_file(self, path):
        if is_url(path):
            return self.remote.ask(path, lambda fs, path: fs.cat_file(path))
        with open(path, 'rb') as f:
            return f.read()

    def manifest(self, path):
        """names, sizes, (sequence_length, dtype, vocab_size), num_bytes of a manifest; a long one is parsed once."""
        stamp = self.remote.fingerprint(path) if is_url(path) else (os.stat(path).st_size, os.stat(path).st_mtime_ns)
        cached = self.cached(f'manifest {path if is_url(path) else os.path.abspath(path)} {stamp}', '.npz')
        if os.path.exists(cached):
            with np.load(cached) as z:
                kind = int(z['length']), str(z['dtype']), int(z['vocab_size'])
                return z['names'], z['sizes'], kind, int(z['num_bytes'])
        names, sizes, kind, num_bytes = read_manifest(path, self.read_file(path))
        if len(names) > 10_000:
            write_cache(cached, lambda f: np.savez(f, names=names, sizes=sizes, length=kind[0], dtype=kind[1],
                                                   vocab_size=kind[2], num_bytes=num_bytes))
        return names, sizes, kind, num_bytes

    def cached(self, what, ending):
        return os.path.join(self.cache_dir, 'index', hashlib.sha256(what.encode()).hexdigest()[:32] + ending)

    def __getstate__(self):             # descriptors and threads mean nothing in another process
        return self.__dict__ | {'files': OrderedDict(), 'coming': {}}

    def __len__(self):
        return int(self.sizes.sum())

    def name(self, shard):
        return self.names[shard].decode()

    def fetch(self, shards):
        """Begin to copy remote shards to this node, at most eight at a time in this process."""
        def run(shard):
            with DOWNLOADS:
                try:
                    self.local[shard] = self.remote.fetch(self.base + self.name(shard) + '.tar')
                except OSError as error:
                    self.local[shard] = error

        for shard in shards:
            if shard not in self.local and shard not in self.coming and is_url(self.base + self.name(shard)):
                self.coming[shard] = threading.Thread(target=run, args=(shard,), daemon=True)
                self.coming[shard].start()

    def copy(self, shard):
        """Path of a remote shard's copy on this node. Raises OSError."""
        for _ in range(3):      # it may be removed from a cache that is too small just before it is opened
            self.fetch([shard])
            if shard in self.coming:
                self.coming.pop(shard).join()
            path = self.local.get(shard, '')        # none where a forked worker took over another's thread
            if isinstance(path, OSError):
                del self.local[shard]
                raise path
            if os.path.exists(path):
                return path
            self.local.pop(shard, None)
        raise OSError(f'{self.base}{self.name(shard)}.tar is removed from {self.remote.folder} before it can be read: '
                      'raise cache_gb')

    def open(self, shard):
        """A descriptor of a shard."""
        if shard not in self.files:
            path = self.base + self.name(shard) + '.tar'
            remote = is_url(path)
            path = self.copy(shard) if remote else os.path.abspath(path)
            self.files[shard] = os.open(path, os.O_RDONLY)
            if len(self.files) > self.max_open:
                os.close(self.files.popitem(last=False)[1])
            # a copy has another name for each content, and its time says when it was used
            stat = os.fstat(self.files[shard])
            content = f'{path} {stat.st_size} {"" if remote else stat.st_mtime_ns}'
            if self.contents.setdefault(shard, content) != content:     # it changed since it was open before
                self.contents[shard] = content
                self.indexes.pop(shard, None)
        self.files.move_to_end(shard)
        return self.files[shard]

    def index(self, shard):
        """The Index of a shard: made when the shard is first opened, then kept in the cache folder."""
        if shard not in self.indexes:
            path, fd = self.base + self.name(shard) + '.tar', self.open(shard)
            cached = self.cached(self.contents[shard], '.npy')
            try:
                table = np.load(cached)
            except (OSError, ValueError, EOFError):
                table = index_tar(path, fd)
                write_cache(cached, lambda f: np.save(f, table))
            index = Index(table, self.sequence_length, self.dtype, fd, path)
            if 0 <= self.sizes[shard] != len(index):
                raise ValueError(f'{path} holds {len(index)} samples, the manifest says {self.sizes[shard]}: make the '
                                 'data set again, or mend manifest.jsonl')
            self.indexes[shard] = index
            while len(self.indexes) > 1 and sum(i.table.nbytes for i in self.indexes.values()) > self.max_index_bytes:
                self.indexes.popitem(last=False)
        self.indexes.move_to_end(shard)
        return self.indexes[shard]

    def key(self, shard, index):
        """A sample's key; in a shard of sequences its member's key and the number in it."""
        return self.index(shard).key(index)

    def read(self, shard, index):
        """One sample: {extension: bytes}. pread, never mmap: a file cut short must not kill the process."""
        fd, sample = self.open(shard), {}       # before its index, which it may make void
        for ext, offset, size, repeated in self.index(shard).members(index, self.horizon):
            if repeated:
                raise BadSample(f'.{ext} comes twice in its shard')
            if size > MAX_MEMBER:
                raise BadSample(f'.{ext} has {size} bytes, over the bound of {MAX_MEMBER}')
            sample[ext] = os.pread(fd, size, offset)
            if len(sample[ext]) != size:
                raise BadSample(f'.{ext} has {len(sample[ext])} of {size} bytes')
        if 'lowdim.npy' in sample:
            sample['lowdim.npy'] = np.frombuffer(sample['lowdim.npy'], self.index(shard).episode(index)[2])
        if 'tokens.bin' in sample:
            if len(sample['tokens.bin']) % np.dtype(self.dtype).itemsize:
                raise BadSample(f'.tokens.bin has {len(sample["tokens.bin"])} bytes, which are no row of {self.dtype}')
            sample['tokens.bin'] = np.frombuffer(sample['tokens.bin'], self.dtype)
        return sample

    def read_sequence(self, shard, index):
        """The bytes of one sequence."""
        fd = self.open(shard)
        data = os.pread(fd, self.sequence_bytes, self.index(shard).offset(index))
        if len(data) != self.sequence_bytes:
            raise BadSample('its sequence is cut short')
        return data


def to_names(names):
    """Strings -> an array of UTF-8 bytes."""
    return np.array([n.encode() for n in names], np.bytes_) if len(names) else np.zeros(0, 'S1')


def read_manifest(path, data):
    """names, sizes, (sequence_length, dtype, vocab_size), num_bytes from a manifest's bytes; an error names the row."""
    names, sizes, kinds, num_bytes, chunk = [], [], set(), 0, []
    for number, line in enumerate(io.BytesIO(data), 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
            chunk.append(row['shard'].removesuffix('.tar').encode())
            count = row['num_sequences']
            if type(count) is not int or not 0 <= count < 1 << 40:
                raise ValueError(f'num_sequences is {count!r}')
            sizes.append(count)
            kinds.add((row.get('sequence_length', 0), row.get('dtype', 'uint16'), row.get('vocab_size', 0)))
            num_bytes += row.get('num_bytes', 0)
            if len(kinds) > 1 or kinds - {k for k in kinds if type(k[0]) is int and k[1] in ('uint16', 'uint32')}:
                raise ValueError(f'sequence_length, dtype and vocab_size are {kinds}')
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path}, line {number} is no manifest row ({error}): expected '
                             '{"shard": "00000000", "num_sequences": 123}') from None
        if len(chunk) == 10_000:        # a million str would take more memory than all the rest
            names.append(np.array(chunk))
            chunk = []
    names = np.concatenate([*names, np.array(chunk, np.bytes_)]) if names or chunk else np.zeros(0, 'S1')
    ordered = np.sort(names)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ValueError(f'{path}: shard {twice[0].decode()!r} comes twice')
    return names, np.array(sizes, np.int64), kinds.pop() if kinds else (0, 'uint16', 0), num_bytes


def write_cache(path, write):
    """A file of the cache, whole or not at all."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f'{path}.{os.getpid()}.{threading.get_ident()}.tmp'
        with open(temporary, 'wb') as f:
            write(f)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f'the cache {path} can not be written ({error.strerror}): give another cache_dir') from None


EPISODE = b'lowdim.npy'      # a member whose every row is a sample, an anchor
ROW = [('sample', '<u4'), ('offset', '<u8'), ('size', '<u8'), ('repeated', '?')]      # and key, ext: as long as needed


def index_tar(path, fd):
    """The members of a tar's samples as a table, sample by sample: sample, key, ext, offset, size, repeated.

    Members that share the name up to the first dot are one sample, wherever they stand; a name without a dot, or that
    begins with it, is no sample (as in webdataset). Where a key comes a second time, later in the tar and with members
    that it has already, that is another sample, marked as repeated. A tar that is cut or damaged is an error: tarfile
    itself ends in silence."""
    rows, latest, end, count = [], {}, 0, 0
    with open(os.dup(fd), 'rb') as f:
        f.seek(0)
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
            sample, exts = latest.get(key, (-1, ()))
            repeated = ext in exts
            if sample < 0 or repeated and sample != count - 1:
                sample, exts, count = count, set(), count + 1
                latest[key] = sample, exts
            exts.add(ext)
            rows.append((sample, key.encode(), ext.encode(), member.offset_data, member.size, repeated))
        f.seek(end)
        if f.read(512) != bytes(512):
            raise ValueError(f'{path} is cut short or damaged at byte {end}: copy it again or make the data set again')
    widths = [max((len(row[i]) for row in rows), default=1) for i in (1, 2)]
    kind = [ROW[0], ('key', f'S{widths[0]}'), ('ext', f'S{widths[1]}'), *ROW[1:]]
    return np.array(sorted(rows, key=lambda row: row[0]), kind)


def npy_header(fd, at, size, where):
    """(shape, dtype, bytes of the header) of a .npy of so many bytes. Raises ValueError."""
    header = io.BytesIO(os.pread(fd, min(size, 4096), at))
    try:
        version = np.lib.format.read_magic(header)[0]
        shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == 1 else
                                 np.lib.format.read_array_header_2_0)(header)
        if fortran and len(shape) > 1 or dtype.hasobject:
            raise ValueError(f'{dtype} in columns')
    except ValueError as error:
        raise ValueError(f'{where}: no .npy file ({error})') from None
    return shape, dtype, header.tell()


class Index:
    """Where the samples of one shard are, from the table of `index_tar`. sequence_length > 0: a sample is a sequence of
    so many tokens, and a member holds several."""

    def __init__(self, table, sequence_length, dtype, fd, path):
        self.table = table
        samples = int(table['sample'][-1]) + 1 if len(table) else 0
        self.first = np.searchsorted(table['sample'], np.arange(samples + 1)).tolist()
        self.starts, self.rows = None, None
        if sequence_length:
            self.read_offsets(sequence_length, np.dtype(dtype), fd, path)
        elif EPISODE in table['ext']:
            self.read_episodes(fd, path)

    def read_offsets(self, sequence_length, dtype, fd, path):
        """Where each member's sequences begin, and the number of the first."""
        self.starts, self.offsets, self.keys, self.stride = [0], [], [], sequence_length * dtype.itemsize
        for _, key, ext, offset, size, _ in self.table.tolist():
            if ext not in (b'tokens.bin', b'tokens.npy'):
                continue
            if ext == b'tokens.npy':
                _, theirs, header = npy_header(fd, offset, size, f'{path}, {key.decode()}')
                if theirs != dtype:
                    raise ValueError(f'{path}, {key.decode()}: {theirs}, the manifest says {dtype}')
                offset, size = offset + header, size - header
            if size % self.stride:
                raise ValueError(f'{path}, {key.decode()}: {size // dtype.itemsize} tokens are no multiple of '
                                 f'sequence_length={sequence_length}')
            self.starts.append(self.starts[-1] + size // self.stride)
            self.offsets.append(offset)
            self.keys.append(key)

    def read_episodes(self, fd, path):
        """How many samples each key stands for: a `.lowdim.npy` has one a row, which begins there; others are one."""
        self.starts, self.keys, self.rows = [0], [], []
        for first, last in zip(self.first, self.first[1:]):
            rows, steps = (None, 0), 1
            for _, key, ext, offset, size, _ in self.table[first:last].tolist():
                if ext == EPISODE:
                    shape, dtype, header = npy_header(fd, offset, size, f'{path}, {key.decode()}')
                    if len(shape) != 1 or not shape[0] or size != header + shape[0] * dtype.itemsize:
                        raise ValueError(f'{path}, {key.decode()}: .lowdim.npy has {size} bytes and {shape} rows of '
                                         f'{dtype.itemsize}: make the data set again')
                    rows, steps = (dtype, header), shape[0]
            self.starts.append(self.starts[-1] + steps)
            self.keys.append(self.table['key'][first])
            self.rows.append(rows)

    def __len__(self):
        return self.starts[-1] if self.starts else len(self.first) - 1

    def key(self, index):
        if not self.starts:
            return self.table['key'][self.first[index]].decode()
        member = bisect_right(self.starts, index) - 1
        return f'{self.keys[member].decode()}[{index - self.starts[member]}]'

    def episode(self, index):
        """Of a sample: the number of its key; of an episode its row, the type of a row, where rows begin in it."""
        number = bisect_right(self.starts, index) - 1
        return number, index - self.starts[number], *self.rows[number]

    def members(self, index, horizon=0):
        """(extension, offset, size, repeated) of each member of a sample; of an episode `horizon` rows from the
        sample's own on, 0: all to its end."""
        step, dtype = 0, None
        if self.rows is not None:
            index, step, dtype, header = self.episode(index)
        out = []
        for _, _, ext, offset, size, repeated in self.table[self.first[index]:self.first[index + 1]].tolist():
            if dtype and ext == EPISODE:
                begin = header + step * dtype.itemsize
                offset, size = offset + begin, min(size - begin, (horizon or size) * dtype.itemsize)
            out.append((ext.decode(), offset, size, repeated))
        return out

    def offset(self, index):
        """Of a sequence."""
        member = bisect_right(self.starts, index) - 1
        return self.offsets[member] + (index - self.starts[member]) * self.stride
