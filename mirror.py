"""A run at a URL, any that fsspec knows: checkpoints and logs are copied there, and brought back.

train.py and hub.py import this where they meet a URL. A run looks there as it does here:
<url>/checkpoints/step_00001000/model.safetensors.
"""
import hashlib
import json
import os
import posixpath
import queue
import shutil
import threading

import torch.distributed as dist

import checkpoint
import past
from remote import patiently
from tokenizer import read_json

# -------------------------------------------------------------------------------------------------
# there


class Mirror:
    """Copies a run's checkpoints and logs to an fsspec URL, in the background. What was not copied
    in an earlier session is copied, too; nothing is ever deleted there."""

    def __init__(self, url, out_dir, say, retries=4):
        self.url, self.out_dir, self.say, self.retries = url.rstrip('/'), out_dir, say, retries
        self.error, self.names = '', []
        self.wakes = queue.Queue()
        self.thread = threading.Thread(target=self.copy_when_woken, daemon=True)
        self.thread.start()

    def wake(self, names):
        """There is something new. names: the run's checkpoints, the newest first."""
        self.names = names
        self.wakes.put(True)

    def finish(self):
        """Copy what is left; the error if that did not succeed, else ''."""
        self.wakes.put(True)
        self.wakes.put(False)
        self.thread.join()
        return self.error

    def copy_when_woken(self):
        while self.wakes.get():
            try:
                patiently(self.url, self.copy, self.retries, 'written')
                self.error = ''
            except OSError as error:
                self.error = f'remote={" ".join(str(error).split())[:300]}'
                self.say(f'\n{self.error}: the next checkpoint tries again')

    def copy(self, fs, base):
        """The checkpoints that are not there yet, the oldest first, then the logs."""
        # whole ones alone: what is there in part is copied again
        there = remote_names(fs, base)
        for name in reversed(self.names):
            if name not in there:
                self.copy_checkpoint(fs, base, name)
        for file in ('config.json', 'log.jsonl', 'loss.png'):
            if os.path.exists(os.path.join(self.out_dir, file)):
                put(fs, os.path.join(self.out_dir, file), posixpath.join(base, file))

    def copy_checkpoint(self, fs, base, name):
        """progress.json goes last: a checkpoint without it is not there."""
        folder = os.path.join(self.out_dir, 'checkpoints', name)
        there = posixpath.join(base, 'checkpoints', name)
        try:
            for file in read_json(os.path.join(folder, 'progress.json'))['files']:
                put(fs, os.path.join(folder, file), posixpath.join(there, file))

            # under another name first: some storages show a file before it is whole
            last = posixpath.join(there, 'progress.json')
            put(fs, os.path.join(folder, 'progress.json'), last + '.part')
            fs.mv(last + '.part', last)
        except FileNotFoundError:
            # keep_last may have removed it meanwhile
            if os.path.exists(folder):
                raise


def put(fs, local, path):
    """Copy a file there."""
    # some storages have no folders, and make none
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    fs.put_file(local, path)


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
            restore(url, out_dir)
    except (ValueError, OSError) as error:
        return '', {}, str(error)
    return past.find(out_dir, resume, say)


def restore(url, out_dir):
    """The newest checkpoint of a run at `url`, and its log, into an empty out_dir. Raises OSError
    and ValueError."""
    path = download(url, os.path.join(out_dir, 'checkpoints'))
    # nothing there yet is no fault: the run begins
    if path:
        checkpoint.point_latest(os.path.dirname(path), os.path.basename(path))
        patiently(url, lambda fs, base: get_log(fs, base, out_dir))


def download(url, folder, only=()):
    """The newest whole checkpoint of a run at `url`, or the one it names, into folder/<name>; its
    path, '' without one. only: the files that are wanted. Raises OSError and ValueError."""

    def get(fs, base):
        # the URL of a checkpoint, or of a run
        name, there = posixpath.basename(base), base
        if not checkpoint.is_name(name):
            name = next(iter(checkpoint.ordered(remote_names(fs, base))), '')
            there = posixpath.join(base, 'checkpoints', name)
        if name:
            new = os.path.join(folder, f'.{name}.tmp')
            shutil.rmtree(new, ignore_errors=True)
            progress = get_checkpoint(fs, there, new, only)
            checkpoint.write_json(os.path.join(new, 'progress.json'), progress)
        return name

    name = patiently(url.rstrip('/'), get)
    if not name:
        return ''

    # it gets its name when it is here as it was written
    new, path = os.path.join(folder, f'.{name}.tmp'), os.path.join(folder, name)
    past.verify(new)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(new, path)
    return path


def get_checkpoint(fs, there, folder, only=()):
    """Copy the files of a checkpoint from there into a folder, all or those of `only`; what its
    progress.json says of them. Raises ValueError."""
    progress = json.loads(fs.cat_file(posixpath.join(there, 'progress.json')))
    if not isinstance(progress, dict) or not isinstance(progress.get('files'), dict):
        raise ValueError('progress.json is not what a checkpoint has')
    # weights to begin with need no optimizer's state
    if only:
        wanted = {file: sums for file, sums in progress['files'].items() if file in only}
        progress['files'] = wanted

    for file in progress['files']:
        # whoever wrote it is a stranger
        if os.path.isabs(file) or '..' in file.split('/'):
            raise ValueError(f'{file!r} would leave the folder')
        os.makedirs(os.path.dirname(os.path.join(folder, file)), exist_ok=True)
        fs.get_file(posixpath.join(there, file), os.path.join(folder, file))
    return progress


def get_log(fs, base, out_dir):
    """Copy the log of a run from there, if it has one."""
    log_path = posixpath.join(base, 'log.jsonl')
    if fs.exists(log_path):
        fs.get_file(log_path, os.path.join(out_dir, 'log.jsonl'))


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
