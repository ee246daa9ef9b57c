"""What is behind a URL, any that fsspec knows, and copies of remote shards.

shards.py and checkpoint.py import this where they meet a URL; a run on local data without `remote`
never does. Copies of runs: mirror.py.
"""
import errno
import hashlib
import os
import posixpath
import threading
import time

# what is said of a shard that is another one
CHANGED = ('is not what it was when this run began to read it: bring it back; or the same command '
           'goes on with what is there now')
DOWNLOADS = threading.Semaphore(8)
# a forked worker has none of its parent's threads, which may hold it
os.register_at_fork(
    after_in_child=lambda: globals().update(DOWNLOADS=threading.Semaphore(8)))


def filesystem(url):
    """The fsspec file system of a URL and the path in it. Raises ValueError and ImportError."""
    import fsspec
    fs, path = fsspec.url_to_fs(url)
    # what it listed before may have changed
    fs.invalidate_cache()
    return fs, path


def check_url(url):
    """Raises ValueError for a URL that no run can be copied to."""
    try:
        filesystem(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f'remote={url!r}: {error}') from error


def patiently(url, action, retries=5, what='read'):
    """action(file system, path), again after 0.5, 1, 2 ... seconds where it fails; OSError in the
    end."""
    for attempt in range(retries + 1):
        try:
            return action(*filesystem(url))
        except (FileNotFoundError, PermissionError, ImportError, ValueError) as error:
            # trying again would not help
            raise OSError(f'{url} can not be {what}: {error!r}') from None
        except Exception as error:
            # a disk that is full here, which would be waited for in vain
            if getattr(error, 'errno', 0) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                problem = f'{error.strerror}, here or there'
                raise OSError(f'{url} can not be {what}: {problem}') from None
            # each kind of storage has errors of its own
            if attempt == retries:
                raise OSError(f'{url} can not be {what}, {attempt + 1} times: {error!r}') from None
            time.sleep(0.5 * 2 ** attempt)


# -------------------------------------------------------------------------------------------------
# shards


class Remote:
    """Copies of remote shards in a folder that all processes of a node share: whole or not at all,
    at most `max_bytes` besides what is under way, the least recently used go first. A reader that
    holds a file open keeps it.

    `begin` and `copy` are for one reader, who fetches ahead of need; `fetch` is one download."""

    def __init__(self, folder, max_bytes=100 << 30, retries=5):
        self.folder = os.path.join(folder, 'shards')
        self.max_bytes, self.retries = max_bytes, retries
        self.begun = time.time()
        self.results = {}       # URL -> path of its copy, or the OSError that came instead
        self.threads = {}       # URL -> the thread that fetches it
        self.first = {}         # URL -> path of the first copy that was read

    def __getstate__(self):
        # threads mean nothing in another process
        return self.__dict__ | {'threads': {}}

    def begin(self, url):
        """Begin to fetch a shard, at most eight at a time in this process."""
        if url not in self.results and url not in self.threads:
            thread = threading.Thread(target=self.fetch_in_turn, args=(url,), daemon=True)
            self.threads[url] = thread
            thread.start()

    def fetch_in_turn(self, url):
        with DOWNLOADS:
            try:
                self.results[url] = self.fetch(url)
            except OSError as error:
                self.results[url] = error

    def copy(self, url):
        """Path of a shard's copy on this node, waited for. Raises OSError."""
        # it may be removed from a cache that is too small just before it is opened
        for _ in range(3):
            self.begin(url)
            if url in self.threads:
                self.threads.pop(url).join()

            # none where a forked worker took over a thread of its parent
            result = self.results.get(url, '')
            if not result:
                continue
            if isinstance(result, OSError):
                del self.results[url]
                raise result
            # the path tells the content
            if self.first.setdefault(url, result) != result:
                raise OSError(f'{url} {CHANGED}')
            if os.path.exists(result):
                return result
            self.results.pop(url, None)
        raise OSError(f'{url} is removed from {self.folder} before it can be read: raise cache_gb')

    def ask(self, url, action):
        return patiently(url, action, self.retries)

    def exists(self, url):
        return self.ask(url, lambda fs, path: fs.exists(path))

    def names_in(self, url):
        """Names of the files in a folder."""
        paths = self.ask(url, lambda fs, path: fs.ls(path, detail=False))
        return [posixpath.basename(path) for path in paths]

    def read(self, url):
        """The bytes of a file."""
        return self.ask(url, lambda fs, path: fs.cat_file(path))

    def fingerprint(self, url):
        """Changes when the file does: size and ETag or time of change, where the storage tells."""
        return self.ask(url, lambda fs, path: (fs.ukey(path), fs.size(path)))

    def fetch(self, url):
        """The local copy of a shard: the one that is there, or a new one."""
        import filelock
        key, size = self.fingerprint(url)
        if size is not None and size > self.max_bytes:
            raise OSError(f'{url} has {size} bytes, more than the whole cache may hold: '
                          'raise cache_gb')
        # another name for each content of the URL
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        local = f'{name}-{hashlib.sha256(str(key).encode()).hexdigest()[:16]}.tar'
        local = os.path.join(self.folder, local)
        os.makedirs(self.folder, exist_ok=True)

        # one of 256 locks, so that they do not pile up
        with filelock.FileLock(os.path.join(self.folder, f'{name[:2]}.lock')):
            if not os.path.exists(local):
                self.check_unchanged(url, name)
                self.make_room(size or 0)
                self.ask(url, lambda fs, path: self.download(fs, path, local, (key, size)))
            # its time says when it was used last
            os.utime(local)
        return local

    def check_unchanged(self, url, name):
        """Raises OSError where another content of a URL was used since this run began."""
        for entry in os.scandir(self.folder):
            if entry.name.startswith(f'{name}-') and entry.name.endswith('.tar'):
                if entry.stat().st_mtime > self.begun:
                    raise OSError(f'{url} {CHANGED}')

    def download(self, fs, path, local, fingerprint):
        fs.get_file(path, local + '.part')
        # a connection that ends early is no error everywhere
        came, size = os.path.getsize(local + '.part'), fingerprint[1]
        if size is not None and came != size:
            raise OSError(f'{came} of {size} bytes came')
        fs.invalidate_cache()
        if (fs.ukey(path), fs.size(path)) != fingerprint:
            raise OSError('it changed while it was copied')
        os.rename(local + '.part', local)

    def make_room(self, size):
        """Remove the least recently used copies, and what a killed process left long ago."""
        copies = []
        for entry in os.scandir(self.folder):
            try:
                stat = entry.stat()
                if entry.name.endswith('.tar'):
                    copies.append((stat.st_mtime, stat.st_size, entry.path))
                # a day old: nobody writes to it any more
                elif entry.name.endswith('.part') and stat.st_mtime < time.time() - 86400:
                    os.remove(entry.path)
            except FileNotFoundError:
                # another process was quicker
                pass

        # with the new one it must be no more than max_bytes
        total = sum(num_bytes for _, num_bytes, _ in copies) + size
        for _, num_bytes, path in sorted(copies):
            if total <= self.max_bytes:
                break
            try:
                os.remove(path)
            except FileNotFoundError:
                pass
            total -= num_bytes
