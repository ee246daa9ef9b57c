"""Checkpoints: written whole or not at all, in the background, by one process or many.

    out_dir/checkpoints/step_00001000/
        model.safetensors           the weights, whole, fp32
        ema/model.safetensors       their moving average, where there is one
        state/*.safetensors         the optimizer's state, each process its part (DCP)
        config.json  shards.json    and the tokenizer's files
        progress.json               step, tokens, ...; every other file with its size and checksum
    out_dir/checkpoints/latest      a link to the newest

Nothing here is a pickle. What is saved by N processes, sharded or not, is loaded by any other
number. DCP is torch.distributed.checkpoint. past.py goes on from a checkpoint, mirror.py brings
it to a URL, and back.
"""
import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import threading
import zlib
from dataclasses import dataclass, field

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import processor as processors
import tasks
import tokenizer as tokenizers
from shards import find as find_file
from tokenizer import read_json

ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, dcp.CheckpointException)

# -------------------------------------------------------------------------------------------------
# names and files


def write_json(path, value):
    """Whole or not at all, and on the disk when this returns."""
    with open(f'{path}.tmp', 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    # whoever reads it meanwhile sees the old one
    os.replace(f'{path}.tmp', path)


# a copy that somebody made (step_00000100.bak) and what is under way (.step_00000100.tmp) are none
def is_name(text):
    return re.fullmatch(r'step_\d{8,}', text) is not None


def step_of(name):
    return int(name.removeprefix('step_'))


def ordered(texts):
    """Those that are names of checkpoints, the newest first."""
    return sorted(filter(is_name, texts), key=step_of, reverse=True)


def names(folder):
    """Names of the checkpoints in a run's checkpoints/, the newest first."""
    if not os.path.isdir(folder):
        return []
    return ordered(os.listdir(folder))


def newest_name(folder):
    return (names(folder) or ['none'])[0]


def files_of(folder, leave_out=()):
    """{path inside the folder: [bytes, CRC-32]} of every file, but for those that begin so."""
    checksums = {}
    for root, _, files in os.walk(folder):
        for path in (os.path.join(root, file) for file in files):
            name = os.path.relpath(path, folder)
            if name.startswith(leave_out):
                continue
            # in pieces: the file may be larger than the memory
            size, crc = 0, 0
            with open(path, 'rb') as f:
                while block := f.read(1 << 22):
                    size, crc = size + len(block), zlib.crc32(block, crc)
            checksums[name] = [size, crc]
    return checksums


def point_latest(folder, name):
    """The link `latest` to a checkpoint, replaced in one step."""
    link = os.path.join(folder, '.latest.tmp')
    # nothing needs it: a disk may have no links, and a folder of that name stays
    with contextlib.suppress(OSError):
        # of a process that was killed just here
        if os.path.lexists(link):
            os.remove(link)
        os.symlink(name, link)
        os.replace(link, os.path.join(folder, 'latest'))


# -------------------------------------------------------------------------------------------------
# tensors


def shapes(folder):
    """{name: shape} of the safetensors files of a folder."""
    # DCP's reader, for it knows a folder of several files, too
    metadata = dcp.HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(tensor.size) for name, tensor in metadata.items()}


def load(tensors, folder):
    """Fill tensors {name: tensor}, sharded or not, from a folder's safetensors files, in place."""
    reader = dcp.HuggingFaceStorageReader(folder)
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def whole(tensors, keep):
    """{name: tensor} gathered and copied to the CPU, one at a time; {} on processes that need not
    keep them."""
    copies = {}
    for name, tensor in tensors.items():
        # every process takes part in the gathering, whether it keeps the tensor or not
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if keep:
            copies[name] = tensor.detach().to('cpu', copy=True).contiguous()
    return copies


def staged(tensors):
    """{name: tensor} copied to the CPU, a sharded one in its shards."""
    cpu_meshes, copies = {}, {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            copies[name] = tensor.detach().to('cpu', copy=True).contiguous()
            continue

        # one mesh on the CPU for each on the devices: making one is a collective operation
        mesh = tensor.device_mesh
        if mesh.device_type != 'cpu':
            if mesh not in cpu_meshes:
                cpu_meshes[mesh] = init_device_mesh('cpu', tuple(mesh.shape))
            mesh = cpu_meshes[mesh]
        local = tensor.to_local().detach().to('cpu', copy=True)
        copies[name] = DTensor.from_local(local, mesh, tensor.placements, run_check=False,
                                          shape=tensor.shape, stride=tensor.stride())
    return copies


# -------------------------------------------------------------------------------------------------
# saving


def is_asked_for(path):
    """Was a checkpoint meant to stay by the command that wrote it? A damaged one stays, too."""
    try:
        return read_json(os.path.join(path, 'progress.json')).get('scheduled', True)
    except (OSError, ValueError):
        return True


class Saver:
    """Writes the checkpoints of a run: `save` copies, a thread writes while training goes on,
    `check` and `wait` raise what went wrong there.

    Checkpoints that nobody asked for (a signal's) go when the next one is there. keep_last: how
    many of the others stay (0: all). remote: a Mirror. after: called when one is there, on the
    first process."""

    def __init__(self, out_dir, keep_last=0, remote=None, rank=0, world=1, after=None):
        self.folder = os.path.join(out_dir, 'checkpoints')
        self.keep_last, self.remote, self.after = keep_last, remote, after
        self.rank, self.world = rank, world
        self.thread, self.error, self.step = None, None, 0
        self.group = None
        if world > 1:
            # the thread's own, beside training's
            self.group = dist.new_group(backend='gloo')
        if remote:
            remote.remove_old = self.remove_old

    def save(self, step, model, ema, state, jsons, files):
        """model, ema, state: {name: tensor}; jsons: {file name: value}, of which progress.json is
        completed; files: {file name: path to copy}. Returns when all is copied. Every process
        calls it."""
        self.wait()
        self.step = step
        # training goes on, and the next step changes them
        copies = whole(model, self.rank == 0), whole(ema, self.rank == 0), staged(state)
        self.thread = threading.Thread(
            target=self.write_and_keep_error, args=(step, *copies, jsons, files), daemon=True)
        self.thread.start()

    def write_and_keep_error(self, *args):
        try:
            self.write(*args)
        except BaseException as error:
            # whatever it is, training must hear of it
            self.error = error

    def check(self):
        """Raise what the thread met."""
        # once: whoever asks again asks for the next checkpoint
        if self.error:
            error, self.error = self.error, None
            raise error

    def wait(self):
        """Until what was begun is on the disk."""
        if self.thread:
            self.thread.join()
            self.thread = None
        self.check()

    def write(self, step, model, ema, state, jsons, files):
        """Under another name, synced, then renamed."""
        name = f'step_{step:08d}'
        new = os.path.join(self.folder, f'.{name}.tmp')
        try:
            if self.rank == 0:
                # what a killed process left of it
                shutil.rmtree(new, ignore_errors=True)
                write_weights(new, model, ema)
            # no state is written before the folder is there
            if self.world > 1:
                dist.barrier(self.group)
            writer = dcp.HuggingFaceStorageWriter(
                os.path.join(new, 'state'), save_distributed=self.world > 1)
            dcp.save(state, storage_writer=writer, process_group=self.group,
                     no_dist=self.world == 1)
            if self.rank == 0:
                write_files(new, jsons, files)
                self.publish(name, new)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(new, ignore_errors=True)
            raise

    def publish(self, name, new):
        """Give the finished folder its name, point `latest` at it, remove what keep_last leaves
        no room for."""
        # what has the name is on the disk, even if the power fails now
        sync(new)
        # a run that went on from an older one comes by this step again
        remove(self.folder, name)
        os.rename(new, os.path.join(self.folder, name))
        point_latest(self.folder, name)

        # the old ones go after the new one is there, and where there is a remote, there, too
        if self.after:
            self.after()
        if self.remote:
            self.remote.wake(names(self.folder))
        else:
            self.remove_old(names(self.folder))

    def remove_old(self, may_go):
        """Of `may_go`, those that nobody asked for (a signal's), and what keep_last leaves no room
        for; the newest stays."""
        # what was damaged, so that the run went on from an older one, takes the place of none
        there = names(self.folder)
        if self.step:
            there = [name for name in there if step_of(name) <= self.step]
        asked_for = [name for name in there if is_asked_for(os.path.join(self.folder, name))]
        for name in there[1:]:
            if name in may_go and name not in asked_for[:self.keep_last or None]:
                remove(self.folder, name)


def remove(folder, name):
    """Remove a checkpoint, which never has its name in part."""
    old = os.path.join(folder, f'.{name}.old')
    if os.path.exists(os.path.join(folder, name)):
        os.rename(os.path.join(folder, name), old)
    shutil.rmtree(old, ignore_errors=True)


def write_weights(folder, model, ema):
    os.makedirs(os.path.join(folder, 'ema') if ema else folder)
    if model:
        save_file(model, os.path.join(folder, 'model.safetensors'))
    if ema:
        save_file(ema, os.path.join(folder, 'ema', 'model.safetensors'))


def write_files(folder, jsons, files):
    for file, value in jsons.items():
        if file != 'progress.json':
            write_json(os.path.join(folder, file), value)
    for file, path in files.items():
        shutil.copyfile(path, os.path.join(folder, file))
    # last, for it holds the checksums of all others
    progress = jsons['progress.json'] | dict(files=files_of(folder))
    write_json(os.path.join(folder, 'progress.json'), progress)


def sync(folder):
    """Everything in a folder, to the disk."""
    for root, _, files in os.walk(folder):
        for path in [root, *(os.path.join(root, file) for file in files)]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


CHOICES = {'dtype': ('float32', 'bfloat16', 'float16'),
           'matmul': ('highest', 'high', 'medium')}


def check(settings, world):
    """Raises ValueError, one line with key, value and remedy, for settings that can not be."""
    for key, allowed in CHOICES.items():
        if settings[key] not in allowed:
            raise ValueError(f'{key}={settings[key]!r}: expected one of {", ".join(allowed)}')
    if settings['fsdp'] < 0 or world % (settings['fsdp'] or 1):
        raise ValueError(f'fsdp={settings["fsdp"]} must divide the {world} ranks: 1 (DDP), '
                         '0 (all) or a divisor')
    if settings['remote']:
        from remote import check_url
        check_url(settings['remote'])


# -----------------------------------------------------------------------------------------------
# one command at a time trains into an out_dir

def check_free(out_dir):
    """Raises ValueError where another process trains into out_dir."""
    if os.path.exists(os.path.join(out_dir, 'lock')):
        import leftovers
        leftovers.check_free(out_dir)


def take(out_dir, step, say):
    """Let a run go on in out_dir, which is made if need be, after `step` steps; its lock, which
    keeps others away while this process has it open. Raises OSError and ValueError."""
    os.makedirs(os.path.join(out_dir, 'checkpoints'), exist_ok=True)
    lock, log = (os.path.join(out_dir, name) for name in ('lock', 'log.jsonl'))
    held = open(lock, 'a+')
    try:
        # not flock, which the workers that are forked here would hold, too
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        import leftovers
        leftovers.wait(held, fcntl.LOCK_EX, say)
    held.truncate(0)
    print(platform.node(), os.getpid(), file=held, flush=True)

    if os.path.exists(log):
        import leftovers
        leftovers.tidy(out_dir, step, say)
    # for whoever follows it from the start
    open(log, 'a').close()
    return held


# -----------------------------------------------------------------------------------------------
# runs: a model and all that goes with it


@dataclass
class Run:
    """A model and all that goes with it: one that is trained, or that hub.py opened."""
    task: object                # its module
    settings: dict              # flat, as in config.json
    tokenizer: object
    model: object
    processor: object           # makes rows of samples
    device: str = 'cpu'
    folder: str = ''            # the checkpoint that it was opened from
    kept: dict = field(default_factory=dict)            # {name of task.FILES: its value}
    gathered: object = contextlib.nullcontext           # inside, this rank holds the whole model
    tensors: object = None      # (): {name: tensor} that a checkpoint holds of the model
    code: dict = field(default_factory=dict)            # {name of a file of yours: its copy}
    # of training, which a checkpoint keeps
    progress: dict = field(default_factory=lambda: dict(
        step=0, samples=0, tokens=0, tokens_of={}, bad_samples=0, bad_steps=0, good_steps=0))

    def inputs(self, batch):
        """What the model's forward gets of a collated batch."""
        tensors = processors.to_device(batch, self.device, self.processor)
        drops = (key.endswith('dropout') and p > 0 for key, p in self.settings.items())
        if self.model.training and any(drops):
            from keyed import token_keys
            tensors['keys'] = token_keys(self.settings, batch, self.device)
        return self.task.inputs(self, batch, tensors)


def make_run(settings, device):
    """The Run of a flat config, with a model that begins anew. Raises ValueError and OSError."""
    task = tasks.load(settings['task'])
    tok = tokenizers.load(located(settings, 'tokenizer'))
    model = task.build(settings, tok).to(device)
    where = dict(processor=located(settings, 'processor'))
    processor = processors.build(settings | where, tok, task, getattr(model, 'image_tokens', 0))
    if processor.eyes:
        from answering import set_mask
        set_mask(model, processor)
    run = Run(task, settings, tok, model, processor, device, tensors=model.state_dict)
    if '.py' in settings['task'] + settings['processor']:
        from yours import copies
        run.code = copies(settings)
    return run


def located(settings, key):
    """The file or folder that a setting names: here, or the copy of a repository of the Hugging
    Face hub. Raises ValueError and OSError."""
    name = settings[key]
    if name == 'bytes' or (key == 'processor' and not processors.is_folder(name)):
        return name
    try:
        return find_file(name, settings['data_dir'], key)
    except FileNotFoundError:
        # a file that is missing is not looked for in the internet
        is_file = os.path.splitext(name)[1] in ('.model', '.json', '.tiktoken', '.py')
        is_file = is_file or os.path.isdir(os.path.dirname(name))
        if is_file or not re.fullmatch(r'[\w.-]+/[\w.-]+', name):
            # of what came along with weights, a run that goes on has its own copy
            kept = os.path.join(settings.get('out_dir', ''), 'checkpoints')
            if not settings.get('init') or not names(kept):
                raise
            return os.path.join(kept, newest_name(kept))
    return tasks.family('files').fetch(name, key=key)


def own_files(run):
    """{name in a checkpoint: path} of what a run's tokenizer and processor were made from."""
    files = dict(run.code)
    form = run.processor.folder
    for name in processors.FILES:
        if form and os.path.exists(os.path.join(form, name)):
            files[name] = os.path.join(form, name)
    for path in run.tokenizer.files:
        is_main = path == run.tokenizer.files[0] and path.endswith('.json')
        files['tokenizer.json' if is_main else os.path.basename(path)] = path
    return files
