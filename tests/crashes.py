"""A piece of work that is ended, or whose disk fails, at its k-th change of the file system.

    sweep(work, check, tmp_path)        # for every k, or some of them

`work(root)` writes below a folder. It runs in a forked child, in which the calls that change files
there are counted: open for writing, write, fsync, replace, rename, unlink, mkdir, link, symlink,
rmdir (of which rmtree is made), truncate, and the writers of other languages that go past Python.
"""
import _pyio
import builtins
import contextlib
import errno
import functools
import io
import os
import re
import shutil
import sys
import tarfile
import threading
import traceback

import numpy as np

KILLED, BROKEN = 77, 99         # exit codes of a child: ended at its k-th change; a traceback
# a full disk stays full for what takes room; an error of the device comes once
KINDS = {'kill': 0, 'full': errno.ENOSPC, 'io': errno.EIO}
TAKES_ROOM = {'open', 'write', 'fsync', 'mkdir', 'link', 'symlink', 'sendfile', 'native'}


class Changes:
    """Counts the changes below `root` and ends or fails the k-th one; 0: none."""

    def __init__(self, root, k=0, kind='kill'):
        self.root, self.k, self.kind = os.path.realpath(root) + os.sep, k, kind
        self.count, self.names, self.fds, self.lock = 0, [], {}, threading.RLock()
        self.real = {}

    def is_below(self, path, dir_fd=None):
        if isinstance(path, int):
            return path in self.fds
        folder = os.getcwd() if dir_fd is None else os.readlink(f'/proc/self/fd/{dir_fd}')
        path = os.path.join(folder, os.fsdecode(path))
        return os.path.abspath(path).startswith(self.root)

    def meet(self, name, harm=None):
        """A change comes; harm: what is done of it where it is the last one."""
        with self.lock:
            self.count += 1
            self.names.append(name)
            is_due = self.count == self.k
            if self.kind == 'full' and self.k:
                is_due = self.count >= self.k and name in TAKES_ROOM
            if not is_due:
                return
            if harm:
                harm()
            if self.kind == 'kill':
                os._exit(KILLED)
            raise OSError(KINDS[self.kind], os.strerror(KINDS[self.kind]))

    def counted(self, name, real, num_paths=1):
        """A function of os that takes a path first, or two."""
        @functools.wraps(real)
        def call(*args, **kwargs):
            dir_fd = kwargs.get('dir_fd')
            if any(self.is_below(path, dir_fd) for path in args[:num_paths]):
                self.meet(name)
            return real(*args, **kwargs)
        return call

    def install(self):
        for name in ('replace', 'rename', 'link', 'symlink'):
            setattr(os, name, self.counted(name, getattr(os, name), 2))
        for name in ('unlink', 'remove', 'mkdir', 'rmdir', 'truncate', 'fsync', 'ftruncate',
                     'sendfile'):
            setattr(os, name, self.counted(name, getattr(os, name)))
        real_open, real_write, real_close = os.open, os.write, os.close

        def opened(path, flags, *args, **kwargs):
            is_ours = flags & (os.O_WRONLY | os.O_RDWR) and self.is_below(
                path, kwargs.get('dir_fd'))
            if is_ours:
                self.meet('open')
            fd = real_open(path, flags, *args, **kwargs)
            self.fds.pop(fd, None)
            if is_ours:
                self.fds[fd] = path
            return fd

        def written(fd, data):
            # what was under way is there by half
            if fd in self.fds:
                self.meet('write', lambda: real_write(fd, bytes(data)[:len(data) // 2]))
            return real_write(fd, data)

        def closed(fd):
            self.fds.pop(fd, None)
            return real_close(fd)

        os.open, os.write, os.close = opened, written, closed
        self.replace_open()
        self.replace_native()

    def replace_open(self):
        """Files that are opened for writing go through os.open and os.write."""
        real = builtins.open

        def choose(file, mode='r', *args, **kwargs):
            is_ours = set(mode) & set('wax+') and not isinstance(file, int) and self.is_below(file)
            return (_pyio.open if is_ours else real)(file, mode, *args, **kwargs)
        builtins.open = io.open = tarfile.bltn_open = choose

    def replace_native(self):
        """Writers in other languages: what they leave when they are ended is half a file."""
        import safetensors.torch
        native = [(safetensors.torch, 'serialize_file', 1, safetensors.SafetensorError)]
        with contextlib.suppress(ImportError):
            import pyarrow.parquet
            native.append((pyarrow.parquet, 'write_table', 1, OSError))
        for module, name, place, error in native:
            setattr(module, name, self.native(getattr(module, name), place, error))

    def native(self, real, place, error):
        def call(*args, **kwargs):
            path = args[place]

            def half():
                real(*args, **kwargs)
                with open(path, 'rb') as f:
                    data = f.read()
                self.k, k = 0, self.k
                with open(path, 'wb') as f:
                    f.write(data[:len(data) // 2])
                self.k = k
            try:
                if self.is_below(path):
                    self.meet('native', half)
            except OSError as failure:
                raise error(str(failure)) from None
            return real(*args, **kwargs)
        return call


class Ended:
    """How a child ended: code, what it said, the names of its changes."""

    def __init__(self, code, text, names):
        self.code, self.text, self.names = code, text, names

    @property
    def lines(self):
        return [line for line in self.text.replace('\r', '\n').split('\n') if line.strip()]


def run(work, root, k=0, kind='kill'):
    """work(root) in a forked child; how it ended."""
    said, report = f'{root}.said', f'{root}.changes'
    pid = os.fork()
    if pid == 0:
        child(work, root, k, kind, said, report)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(said, encoding='utf-8') as f:
        text = f.read()
    names = []
    if code != KILLED:
        with open(report, encoding='utf-8') as f:
            names = f.read().split()
    return Ended(code, text, names)


def child(work, root, k, kind, said, report):
    """Never returns."""
    fd = os.open(said, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1), os.dup2(fd, 2)
    sys.stdout = open(1, 'w', closefd=False)       # noqa: SIM115  (pytest's own are elsewhere)
    sys.stderr = open(2, 'w', closefd=False)       # noqa: SIM115
    code, changes = 0, Changes(root, k, kind)
    try:
        changes.install()
        work(root)
    except SystemExit as stop:
        code = stop.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = BROKEN
    changes.k = 0
    sys.stdout.flush()
    sys.stderr.flush()
    with open(report, 'w', encoding='utf-8') as f:
        f.write(' '.join(changes.names))
    os._exit(code)


def chosen(total, few):
    """1 ... total, or so many of them."""
    if not few or few >= total:
        return list(range(1, total + 1))
    return sorted({int(k) for k in np.linspace(1, total, few)})


def nothing(root):
    pass


def sweep(work, check, tmp_path, begin=nothing, look=nothing, few=0, kinds=tuple(KINDS)):
    """Try every k (or `few` of them) of each kind, look at what that left, then do the work once
    more as it should be, and check. begin(root) makes what was there before. Number of changes,
    and of tries."""
    def fresh(name):
        root = tmp_path / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        begin(root)
        return root

    root = fresh('whole')
    whole = run(work, root)
    assert whole.code == 0, whole.text
    check(root)
    total, tries = len(whole.names), 0
    for kind in kinds:
        for k in chosen(total, few):
            root = fresh(f'{kind}-{k}')
            where = f'{kind} at change {k} of {total} ({whole.names[k - 1]})'
            first = run(work, root, k, kind)
            if kind == 'kill':
                # threads: another order may have less changes
                assert first.code in (KILLED, 0), f'{where}: {first.code}\n{first.text}'
            else:
                assert first.code in (0, 1, 2), f'{where}: exit code {first.code}\n{first.text}'
                assert 'Traceback' not in first.text, f'{where}\n{first.text}'
                own = [line for line in first.lines if re.match(r'(\S+\.py|test): ', line)]
                assert len(own) == bool(first.code), f'{where}\n{first.text}'
            try:
                look(root)
                again = run(work, root)
                assert again.code == 0, again.text
                check(root)
            except Exception as error:
                said = f'{where}: exit code {first.code}, {first.text}\nthen {error!r}'
                raise AssertionError(said) from error
            shutil.rmtree(root)
            tries += 1
    print(f'{total} changes, {tries} tries')
    return total, tries
