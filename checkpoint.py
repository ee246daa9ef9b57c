"""Checkpoints: written whole or not at all, in the background, by one process or many, and copied elsewhere.

    out_dir/checkpoints/step_00001000/
        model.safetensors           the weights, whole, fp32
        ema/model.safetensors       their moving average, where there is one
        state/*.safetensors         the optimizer's state, each process its part (torch.distributed.checkpoint)
        config.json  shards.json    and the tokenizer's files
        progress.json               step, tokens, ...; every other file with its size and checksum
    out_dir/checkpoints/latest      a link to the newest

Nothing here is a pickle. What is saved by N processes, sharded or not, is loaded by any other number.
"""
import json
import os
import posixpath
import queue
import re
import shutil
import threading
import zlib
from dataclasses import replace

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import processor as processors
import tokenizer as tokenizers
from model import VLM, DecoderConfig, ViTConfig, build
from shards import patiently

ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, dcp.CheckpointException)


def write_json(path, value):
    """Whole or not at all, and on the disk when this returns."""
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)


def read_json(path):
    with open(path, encoding='utf-8') as f:
        return json.load(f)


def names(folder):
    """Names of the checkpoints in a run's checkpoints/, the newest first."""
    return ordered(os.listdir(folder) if os.path.isdir(folder) else [])


def ordered(found):
    """Those that are names of checkpoints, the newest first."""
    return sorted((n for n in found if re.fullmatch(r'step_\d{8,}', n)), key=lambda n: int(n[5:]), reverse=True)


def files_of(folder):
    """{path inside the folder: [bytes, CRC-32]} of every file."""
    found = {}
    for root, _, files in os.walk(folder):
        for name in files:
            size, crc = 0, 0
            with open(os.path.join(root, name), 'rb') as f:
                while block := f.read(1 << 22):
                    size, crc = size + len(block), zlib.crc32(block, crc)
            found[os.path.relpath(os.path.join(root, name), folder)] = [size, crc]
    return found


def verify(path):
    """What progress.json of a checkpoint says. Raises OSError and ValueError where a file is not as it was written."""
    saved, found = read_json(os.path.join(path, 'progress.json')), files_of(path)
    for file, (size, crc) in saved['files'].items():
        if found.get(file) != [size, crc]:
            raise ValueError(f'{file} has {found.get(file, [0])[0]} of {size} bytes' if found.get(file, [0])[0] != size
                             else f'{file} is not what was written (checksum)')
    return saved


def newest(folder, say):
    """(path, progress) of the newest checkpoint that is whole; ('', {}) where there is none. Raises ValueError if all
    are damaged, for a run must not begin anew over what may be mended."""
    for name in names(folder):
        try:
            return os.path.join(folder, name), verify(os.path.join(folder, name))
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f'{os.path.join(folder, name)} is damaged and is skipped: {" ".join(str(error).split())[:200]}')
    if names(folder):
        raise ValueError(f'every checkpoint in {folder} is damaged: move them away to begin anew')
    return '', {}


def build_model(run, tok, weights=True):
    """The model of a run's settings (flat, as in config.json) and its tokenizer. weights=False: those of `vit.hf` and
    `decoder.hf` are not loaded. Raises ValueError."""
    def part(name, kind):
        return kind(**{k.partition('.')[2]: v for k, v in run.items() if k.startswith(name + '.')})

    vit, decoder, task = part('vit', ViTConfig), part('decoder', DecoderConfig), run['task']
    shape = vit, decoder, tok.vocab_size, tok.image_id, run.get('pixel_shuffle', 1), run.get('connector_bias', True)
    if task in ('policy', 'vla'):
        import policies
        config = part(task, dict(policy=policies.PolicyConfig, vla=policies.VLAConfig)[task])
        config = replace(config, **{key: run[key] for key in ('action_steps', 'action_dim', 'proprio_dim')})
        return policies.build(task, config, *shape)
    towers = {}
    if vit.hf or decoder.hf:
        try:
            from families import towers as opener
        except ModuleNotFoundError:
            raise ValueError('vit.hf and decoder.hf need families/, which is not here') from None
        towers = opener.towers(vit, decoder, tok.vocab_size, weights, task)
    if task == 't2i' and run.get('denoiser', 'dit') == 'unet':
        from images import clip as image_clip
        from images import dit as image_dit
        from images import sd
        from images import vae as image_vae
        clip = part('clip', image_clip.CLIPTextConfig)
        empty = tokenizers.clip_row(tok, '', clip.max_length)
        if max(empty) >= clip.vocab_size:
            raise ValueError(f'clip.vocab_size={clip.vocab_size}, but the tokenizer has token {max(empty)}: it is not '
                             'this model\'s')
        return sd.build(part('dit', image_dit.DiTConfig), sd.UNet2DCondition(part('unet', sd.UNetConfig)),
                        image_clip.CLIPText(clip), image_vae.AutoencoderKL(part('vae', image_vae.VAEConfig)), empty)
    if task == 't2i':
        from images import dit as image_dit
        dit, vae = part('dit', image_dit.DiTConfig), None
        if dit.vae:
            from families import diffusers as hub_sd
            from images import vae as image_vae
            settings = part('vae', image_vae.VAEConfig)
            vae = hub_sd.autoencoder(dit.vae, settings) if weights else image_vae.AutoencoderKL(settings)
        return image_dit.build(dit, decoder, tok.vocab_size, [tok.bos_id, tok.eos_id], towers.get('decoder'), vae)
    return build(task, *shape, run.get('pair_scale', 1.0), run.get('pair_bias', 0.0), towers)


def image_tokens(model):
    """Tokens that a picture takes in a model; 0 where it has no place in the text."""
    model = getattr(model, 'encoder', model)        # of a policy
    return model.config.image_tokens if isinstance(model, VLM) else 0


def load_run(path, ema=True):
    """(settings, tokenizer, model with its weights) of a run, or of one of its checkpoints; settings['folder'] is the
    checkpoint. ema: with the averages of the weights, where the run kept them. Raises ValueError."""
    folder = os.path.abspath(path)
    if os.path.basename(os.path.dirname(folder)) != 'checkpoints' and not os.path.exists(
            os.path.join(folder, 'model.safetensors')):
        folder = os.path.join(folder, 'checkpoints', 'latest')
    try:
        run = read_json(os.path.join(folder, 'config.json'))
        tok = tokenizers.load('bytes' if run['tokenizer'] == 'bytes' else folder)
        model = build_model(run, tok, weights=False)
        weights = load_file(os.path.join(folder, 'model.safetensors'))
        if ema and run.get('ema'):
            weights |= load_file(os.path.join(folder, 'ema', 'model.safetensors'))
        model.load_state_dict(weights)
        if processors.is_folder(run.get('processor', 'auto')):
            run['processor'] = folder               # its files are kept here
    except FileNotFoundError as error:
        raise ValueError(f'{folder!r} is no checkpoint ({error.filename or error} is missing)') from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f'{folder!r} can not be loaded: {" ".join(str(error).split())[:300]}') from None
    return run | dict(folder=folder), tok, model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# tensors


def shapes(folder):
    """{name: shape} of the safetensors files of a folder."""
    found = dcp.HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(item.size) for name, item in found.items()}


def load(tensors, folder):
    """Fill tensors {name: tensor}, sharded or not, from the safetensors files of a folder, in place."""
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(folder), no_dist=not dist.is_initialized())


def has_denoiser(path):
    """Is it a run of a DiffusionPolicy or TextToImage, or a checkpoint of one?"""
    for folder in (path, os.path.join(path, 'checkpoints', 'latest')):
        if os.path.exists(os.path.join(folder, 'model.safetensors')):
            return any(name.startswith('denoiser.') for name in shapes(folder))
    return False


def load_weights(model, path, skip=()):
    """Fill the parameters that a run, a checkpoint or its ema/ has by the same name, but for those in which a regex of
    `skip` is found: (names loaded, names there that are not used). Raises ValueError, and ERRORS of a damaged file."""
    folder = path if os.path.exists(os.path.join(path, 'model.safetensors')) else os.path.join(
        path, 'checkpoints', 'latest')
    if not os.path.exists(os.path.join(folder, 'model.safetensors')):
        raise ValueError('no model.safetensors there, nor in checkpoints/latest below it')
    ours = model.state_dict()
    wanted = {k: v for k, v in ours.items() if not any(re.search(regex, k) for regex in skip)}
    above = os.path.dirname(os.path.abspath(folder))        # an ema/ has what was trained, the rest is beside it
    loaded, there = set(), set()
    for layer in [above] * os.path.exists(os.path.join(above, 'model.safetensors')) + [folder]:
        theirs = shapes(layer)
        for k in sorted(theirs.keys() & wanted.keys()):
            if theirs[k] != tuple(wanted[k].shape):
                raise ValueError(f'{k} is {theirs[k]} there and {tuple(wanted[k].shape)} here: change the model\'s '
                                 'settings, or name it in init_skip')
        load({k: v for k, v in wanted.items() if k in theirs}, layer)
        loaded, there = loaded | theirs.keys() & wanted.keys(), there | theirs.keys()
    if not loaded:
        raise ValueError('it holds none of the parameters of this model')
    return loaded, there - loaded


def parts(names):
    """The first parts of parameter names: vit, decoder."""
    return ', '.join(sorted({n.partition('.')[0] for n in names}))


def whole(tensors, keep):
    """{name: tensor} gathered and copied to the CPU, one at a time; {} on processes that need not keep them."""
    out = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            out[name] = full.detach().to('cpu', copy=True).contiguous()
    return out


def staged(tensors):
    """{name: tensor} copied to the CPU, a sharded one in its shards."""
    meshes, out = {}, {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            out[name] = tensor.detach().to('cpu', copy=True).contiguous()
            continue
        mesh = tensor.device_mesh
        if mesh.device_type != 'cpu' and mesh not in meshes:
            meshes[mesh] = init_device_mesh('cpu', tuple(mesh.shape))
        out[name] = DTensor.from_local(tensor.to_local().detach().to('cpu', copy=True), meshes.get(mesh, mesh),
                                       tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())
    return out


class Saver:
    """Writes the checkpoints of a run: `save` copies, a thread writes while training goes on, `check` and `wait` raise
    what went wrong there. scheduled: the steps that were asked for; others (a signal's) go when the next one is there.
    keep_last: how many of the scheduled ones stay (0: all). after: called when one is there, on the first process."""

    def __init__(self, out_dir, scheduled, keep_last=0, remote=None, rank=0, world=1, after=None):
        self.folder, self.scheduled, self.keep_last = os.path.join(out_dir, 'checkpoints'), scheduled, keep_last
        self.remote, self.rank, self.world, self.after = remote, rank, world, after
        self.group = dist.new_group(backend='gloo') if world > 1 else None      # the thread's own, beside training's
        self.thread, self.error, self.step = None, None, 0

    def save(self, step, model, ema, state, jsons, files):
        """model, ema, state: {name: tensor}; jsons: {file name: value}, of which progress.json is completed; files:
        {file name: path to copy}. Returns when all is copied. Every process calls it."""
        self.wait()
        self.step = step
        copies = whole(model, self.rank == 0), whole(ema, self.rank == 0), staged(state)
        self.thread = threading.Thread(target=self.run, args=(step, *copies, jsons, files), daemon=True)
        self.thread.start()

    def run(self, *args):
        try:
            self.write(*args)
        except BaseException as error:          # whatever it is, training must hear of it
            self.error = error

    def check(self):
        """Raise what the thread met."""
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
                shutil.rmtree(new, ignore_errors=True)
                os.makedirs(os.path.join(new, 'ema') if ema else new)
                for path, tensors in ((new, model), (os.path.join(new, 'ema'), ema)):
                    if tensors:
                        save_file(tensors, os.path.join(path, 'model.safetensors'))
            if self.world > 1:
                dist.barrier(self.group)        # the folder is there
            writer = dcp.HuggingFaceStorageWriter(os.path.join(new, 'state'), save_distributed=self.world > 1)
            dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=self.world == 1)
            if self.rank == 0:
                for file, value in jsons.items():
                    if file != 'progress.json':
                        write_json(os.path.join(new, file), value)
                for file, path in files.items():
                    shutil.copyfile(path, os.path.join(new, file))
                write_json(os.path.join(new, 'progress.json'), jsons['progress.json'] | dict(files=files_of(new)))
                self.publish(name, new)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(new, ignore_errors=True)
            raise

    def publish(self, name, new):
        """Give the finished folder its name, point `latest` at it, remove what keep_last leaves no room for."""
        for root, _, files in os.walk(new):
            for path in [root, *(os.path.join(root, n) for n in files)]:
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
        shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)
        os.rename(new, os.path.join(self.folder, name))
        point_latest(self.folder, name)
        if int(name[5:]) in self.scheduled:
            kept = [n for n in names(self.folder) if int(n[5:]) in self.scheduled][:self.keep_last or None]
            for n in names(self.folder):
                if n not in kept:
                    shutil.rmtree(os.path.join(self.folder, n))
        if self.after:
            self.after()
        if self.remote:
            self.remote.wake()


def point_latest(folder, name):
    link = os.path.join(folder, '.latest.tmp')
    if os.path.lexists(link):
        os.remove(link)
    os.symlink(name, link)
    os.replace(link, os.path.join(folder, 'latest'))


# ----------------------------------------------------------------------------------------------------------------------
# a copy elsewhere


class Mirror:
    """Copies a run's checkpoints and logs to an fsspec URL, in the background. progress.json goes last: a checkpoint
    without it is not there. What was not copied in an earlier session is copied, too; nothing is ever deleted there."""

    def __init__(self, url, out_dir, say, retries=4):
        self.url, self.out_dir, self.say, self.retries = url.rstrip('/'), out_dir, say, retries
        self.error, self.wakes = '', queue.Queue()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def wake(self):
        """There is something new."""
        self.wakes.put(True)

    def finish(self):
        """Copy what is left; the error if that did not succeed, else ''."""
        self.wakes.put(True)
        self.wakes.put(False)
        self.thread.join()
        return self.error

    def run(self):
        while self.wakes.get():
            try:
                patiently(self.url, self.copy, self.retries, 'written')
                self.error = ''
            except OSError as error:
                self.error = f'remote={" ".join(str(error).split())[:300]}'
                self.say(f'\n{self.error}: the next checkpoint tries again')

    def copy(self, fs, base):
        folder = os.path.join(self.out_dir, 'checkpoints')
        there = remote_names(fs, base)
        for name in reversed(names(folder)):
            if name in there:
                continue
            try:
                files = [*read_json(os.path.join(folder, name, 'progress.json'))['files'], 'progress.json']
                for file in files:
                    put(fs, os.path.join(folder, name, file), posixpath.join(base, 'checkpoints', name, file),
                        at_once=file == 'progress.json')
            except FileNotFoundError:
                if os.path.exists(os.path.join(folder, name)):
                    raise               # else keep_last has removed it meanwhile
        for file in ('config.json', 'log.jsonl', 'loss.png'):
            if os.path.exists(os.path.join(self.out_dir, file)):
                put(fs, os.path.join(self.out_dir, file), posixpath.join(base, file))


def put(fs, local, path, at_once=False):
    """Copy a file there; at_once: under another name first, since some storages show a file before it is whole."""
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    fs.put_file(local, path + '.part' * at_once)
    if at_once:
        fs.mv(path + '.part', path)


def remote_names(fs, base):
    """Names of the checkpoints that are there as a whole, the newest first."""
    found = fs.glob(posixpath.join(base, 'checkpoints/*/progress.json'))
    return ordered(posixpath.basename(posixpath.dirname(path)) for path in found)


def restore(url, out_dir):
    """The newest checkpoint of a run at `url`, and its log, into an empty out_dir. Raises OSError and ValueError."""
    def get_log(fs, base):
        if fs.exists(posixpath.join(base, 'log.jsonl')):
            fs.get_file(posixpath.join(base, 'log.jsonl'), os.path.join(out_dir, 'log.jsonl'))

    path = download(url, os.path.join(out_dir, 'checkpoints'))
    if path:
        point_latest(os.path.dirname(path), os.path.basename(path))
        patiently(url, get_log)


def download(url, folder, only=()):
    """The newest whole checkpoint of a run at `url`, or the one it names, into folder/<name>; its path, '' without one.
    only: the files that are wanted. Raises OSError and ValueError."""
    def get(fs, base):
        name = posixpath.basename(base)
        if re.fullmatch(r'step_\d{8,}', name):
            base = posixpath.dirname(posixpath.dirname(base))
        else:
            name = next(iter(remote_names(fs, base)), '')
        if not name:
            return ''
        new, there = os.path.join(folder, f'.{name}.tmp'), posixpath.join(base, 'checkpoints', name)
        shutil.rmtree(new, ignore_errors=True)
        saved = json.loads(fs.cat_file(posixpath.join(there, 'progress.json')))
        if not isinstance(saved, dict) or not isinstance(saved.get('files'), dict):
            raise ValueError('progress.json is not what a checkpoint has')
        saved['files'] = {k: v for k, v in saved['files'].items() if not only or k in only}
        for file in saved['files']:
            if os.path.isabs(file) or '..' in file.split('/'):
                raise ValueError(f'{file!r} would leave the folder')
            os.makedirs(os.path.dirname(os.path.join(new, file)), exist_ok=True)
            fs.get_file(posixpath.join(there, file), os.path.join(new, file))
        write_json(os.path.join(new, 'progress.json'), saved)
        return name

    name = patiently(url.rstrip('/'), get)
    if not name:
        return ''
    new, path = os.path.join(folder, f'.{name}.tmp'), os.path.join(folder, name)
    verify(new)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(new, path)
    return path
