"""A run at a URL, any that fsspec knows: checkpoints and logs are copied there, and brought back.

train.py and hub.py import this where they meet a URL. A run looks there as it does here:
<url>/checkpoints/step_00001000/model.safetensors.
"""
import hashlib
import json
import os
import posixpath
import shutil
import threading
import time

import torch.distributed as dist

import checkpoint
import past
from remote import patiently

WAIT = 120      # seconds a run waits at its end for a place that gives no sign of life

# -------------------------------------------------------------------------------------------------
# there


class Mirror:
    """Copies a run's checkpoints and logs to an fsspec URL, in the background. What was not copied
    in an earlier session is copied, too; no file is ever deleted there that is not replaced.

    names: the run's checkpoints, the newest first. remove_old: called with the names of those that
    are there, when some have come."""

    def __init__(self, url, out_dir, names, say, retries=4):
        self.url, self.out_dir, self.say, self.retries = url.rstrip('/'), out_dir, say, retries
        self.error, self.copied, self.damaged = '', {}, set()
        self.has_news, self.is_ending = threading.Event(), False
        self.has_come, self.remove_old, self.last_sign = False, None, 0.0
        self.wake(names)
        self.thread = threading.Thread(target=self.copy_when_woken, daemon=True)
        self.thread.start()

    def wake(self, names):
        """There is something new."""
        self.names = names
        self.has_news.set()

    def finish(self, stop):
        """Copy what is left. The error if that did not succeed, or was ended by a place that gives
        no sign of life or by a signal (stop['signal']); else ''."""
        # the signal that ended the run is not yet one that ends this
        stop.update(signal=0)
        self.is_ending, self.last_sign = True, time.monotonic()
        self.has_news.set()
        self.thread.join(2)
        if self.thread.is_alive():
            self.say(f'\nwaiting until {self.url} has {self.missing()}; Ctrl-C ends the wait')
        while self.thread.is_alive() and not stop['signal']:
            if time.monotonic() > self.last_sign + WAIT:
                break
            self.thread.join(0.1)

        if self.thread.is_alive():
            reason = f'no sign of life for {WAIT} seconds'
            if stop['signal']:
                reason = 'the wait was ended by a signal'
            self.error = f'remote={self.url}: {reason}, {self.missing()} is not copied'
        return self.error

    def missing(self):
        names = [name for name in self.names if name not in self.copied]
        return ', '.join(names) or 'the log'

    def copy_when_woken(self):
        is_last = False
        while not is_last:
            self.has_news.wait()
            # before it is looked at: what comes from now on is the next turn's
            self.has_news.clear()
            is_last = self.is_ending
            try:
                patiently(self.url, self.copy, self.retries, 'written')
                self.error = ''
                if self.has_come and self.remove_old:
                    self.remove_old(self.copied)
            except Exception as error:
                # whatever it is, the run must hear of it at its end
                self.error = f'remote={" ".join(str(error).split())[:300]}'
                # a run waits at its end for no more than the tries that are under way
                is_last = self.is_ending
                if not is_last:
                    self.say(f'\n{self.error}: the next checkpoint tries again')

    def copy(self, fs, base):
        """The checkpoints that are not there yet, the oldest first, then the logs."""
        # whole ones alone: what is there in part is copied again
        there = remote_names(fs, base)
        for name in reversed(self.names):
            # keep_last may have removed it, or a user
            folder = os.path.join(self.out_dir, 'checkpoints', name)
            if os.path.exists(folder) and name not in self.damaged:
                self.copy_checkpoint(fs, base, name, folder, name in there)

        for file in ('config.json', 'log.jsonl', 'loss.png'):
            if os.path.exists(os.path.join(self.out_dir, file)):
                self.put_whole(fs, os.path.join(self.out_dir, file), posixpath.join(base, file))

    def copy_checkpoint(self, fs, base, name, folder, is_there):
        """progress.json goes last: a checkpoint without it is not there."""
        there = posixpath.join(base, 'checkpoints', name)
        last = posixpath.join(there, 'progress.json')
        try:
            with open(os.path.join(folder, 'progress.json'), 'rb') as f:
                ours = f.read()
            if self.copied.get(name) == ours:
                return
            # one of that name may be of a run that went on from an older one, and came by it again
            if is_there and fs.cat_file(last) == ours:
                self.copied[name] = ours
                return
            files = past.verify(folder)['files']
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            # one that goes there must be one that can come back
            self.damaged.add(name)
            self.say(f'\n{folder} is damaged and is not copied: {error}')
            return

        if is_there:
            fs.rm_file(last)
        for file in files:
            self.put(fs, os.path.join(folder, file), posixpath.join(there, file))
        self.put_whole(fs, os.path.join(folder, 'progress.json'), last)
        self.copied[name], self.has_come = ours, True

    def put(self, fs, local, path):
        """Copy a file there."""
        from fsspec.callbacks import Callback
        # some storages have no folders, and make none
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        fs.put_file(local, path, callback=Callback(hooks={'sign': self.note_sign}))
        self.note_sign()

    def put_whole(self, fs, local, path):
        """Copy a file there, under another name first: some storages show it before it is
        whole."""
        self.put(fs, local, path + '.part')
        fs.mv(path + '.part', path)

    def note_sign(self, *_, **__):
        self.last_sign = time.monotonic()


def remote_names(fs, base):
    """Names of the checkpoints that are there as a whole."""
    # progress.json came last
    whole = fs.glob(posixpath.join(base, 'checkpoints/*/progress.json'))
    return [posixpath.basename(posixpath.dirname(path)) for path in whole]


# -------------------------------------------------------------------------------------------------
# and back


def find(out_dir, url, resume, say):
    """As past.find; where out_dir has no checkpoint, the newest at `url` is brought here."""
    try:
        if not checkpoint.names(os.path.join(out_dir, 'checkpoints')):
            restore(url, out_dir, say)
    except (ValueError, OSError) as error:
        return '', {}, str(error)
    return past.find(out_dir, resume, say)


def restore(url, out_dir, say):
    """The newest checkpoint of a run at `url`, and its log, into an empty out_dir. Raises OSError
    and ValueError."""
    def get_log_of_run(fs, base):
        # nothing there yet is no fault: the run begins
        if remote_names(fs, base):
            get_log(fs, base, out_dir)

    # the log first: what is killed before it has the checkpoint begins again
    os.makedirs(out_dir, exist_ok=True)
    patiently(url, get_log_of_run)
    path = download(url, os.path.join(out_dir, 'checkpoints'), say=say, is_ours=True)
    if path:
        checkpoint.point_latest(os.path.dirname(path), os.path.basename(path))


def download(url, folder, only=(), say=print, is_ours=False):
    """The newest whole checkpoint of a run at `url`, or the one it names, into folder/<name>; its
    path, '' without one. A damaged one is said and skipped, and where the run is ours it is marked
    as not whole there, so that it is copied again. only: the files that are wanted. Raises OSError
    and ValueError."""
    url = url.rstrip('/')
    run, names = url, [posixpath.basename(url)]
    # the URL of a checkpoint, or of a run
    if checkpoint.is_name(names[0]):
        run = posixpath.dirname(posixpath.dirname(url))
    else:
        names = checkpoint.ordered(patiently(run, remote_names))

    problem = ''
    for name in names:
        place = f'{run}/checkpoints/{name}'
        problem = fetch(place, folder, name, only)
        if not problem:
            return os.path.join(folder, name)
        say(f'{place} is damaged and is skipped: {problem}')
        if is_ours:
            patiently(place, mark_damaged, what='written')
    if names:
        raise ValueError(f'{url} has no checkpoint that is whole: {problem}')
    return ''


def fetch(url, folder, name, only=()):
    """A checkpoint into folder/<name>; what is wrong with it, or ''. Raises OSError."""
    new, path = os.path.join(folder, f'.{name}.tmp'), os.path.join(folder, name)
    # twice: it may have been damaged on the way
    for _ in range(2):
        shutil.rmtree(new, ignore_errors=True)
        problem = patiently(url, lambda fs, base: get_checkpoint(fs, base, new, only))
        if not problem:
            break
    else:
        shutil.rmtree(new, ignore_errors=True)
        return problem

    # it gets its name when it is here as it was written
    checkpoint.sync(new)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(new, path)
    return ''


def get_checkpoint(fs, there, folder, only=()):
    """Copy the files of a checkpoint from there into a folder, all or those of `only`; what is
    wrong with them, or ''. Raises ValueError."""
    try:
        progress = json.loads(fs.cat_file(posixpath.join(there, 'progress.json')))
        files = dict(progress['files'])
    except FileNotFoundError:
        return 'progress.json is missing'
    except (ValueError, KeyError, TypeError):
        return 'progress.json is not what a checkpoint has'
    # weights to begin with need no optimizer's state
    if only:
        files = {file: sums for file, sums in files.items() if file in only}

    for file in files:
        # whoever wrote it is a stranger
        if os.path.isabs(file) or '..' in file.split('/'):
            raise ValueError(f'{file!r} would leave the folder')
        os.makedirs(os.path.dirname(os.path.join(folder, file)), exist_ok=True)
        try:
            fs.get_file(posixpath.join(there, file), os.path.join(folder, file))
        except FileNotFoundError:
            return f'{file} is missing'

    checkpoint.write_json(os.path.join(folder, 'progress.json'), progress | dict(files=files))
    try:
        past.verify(folder)
    except (ValueError, TypeError) as error:
        return str(error)
    return ''


def mark_damaged(fs, there):
    """Take the name of its last file from a checkpoint, so that it counts as not whole."""
    last = posixpath.join(there, 'progress.json')
    fs.mv(last, last + '.damaged')


def get_log(fs, base, out_dir):
    """Copy the log of a run from there, if it has one."""
    log_path, here = posixpath.join(base, 'log.jsonl'), os.path.join(out_dir, 'log.jsonl')
    if fs.exists(log_path):
        fs.get_file(log_path, here + '.tmp')
        os.replace(here + '.tmp', here)


def local_copy(url, cache_dir):
    """A folder with the newest weights of a run at a URL, copied once a node. Raises OSError and
    ValueError."""
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = os.path.join(os.path.expanduser(cache_dir), 'weights', name)
    # one process of a node fetches, the others wait for it
    if int(os.environ.get('LOCAL_RANK', 0)) == 0:
        download(url, folder, ('model.safetensors',))
    if dist.is_initialized():
        dist.barrier()
    return os.path.join(folder, next(iter(checkpoint.names(folder)), ''))
