"""Weights that a model begins with (`init_from`): those of a run of ours, or of others.

train.py imports this where there are such.
"""
import os
import re

import checkpoint
import hub
import past
from shards import is_url


def begin(model, path, skip, cache_dir):
    """Weights to begin from, of a run or a checkpoint (every parameter of the same name, a URL,
    too) or of another project's model; what was loaded, new and unused, as a line. Raises
    ValueError.

    A language or vision-language model begins what reads for a denoiser: `model.reader` names
    that part."""
    try:
        folder = path
        if is_url(path):
            from mirror import local_copy
            folder = local_copy(path, cache_dir)

        # what reads for a denoiser takes what is no denoiser itself
        target, prefix, unused = model, '', set()
        reader = getattr(model, 'reader', '')
        if hub.is_foreign(folder):
            folder = hub.fetch(folder)
            if reader and not hasattr(hub.family_of(folder), 'open_run'):
                target, prefix = getattr(model, reader), f'{reader}.'
            loaded = hub.load(target, folder, skip)
        else:
            if reader and not has_denoiser(folder):
                target, prefix = getattr(model, reader), f'{reader}.'
            loaded, unused = load_weights(target, folder, skip)
        for regex in skip:
            if not any(re.search(regex, name) for name in target.state_dict()):
                raise ValueError(f'init_skip: {regex!r} is found in no name of a parameter '
                                 '(--parameters lists them)')
    except checkpoint.ERRORS as error:
        raise ValueError(f'init_from={path!r}: {error}') from None

    # every tensor is accounted for
    loaded = {prefix + name for name in loaded}
    fresh = model.state_dict().keys() - loaded
    return (f'init_from {folder}: {len(loaded)} tensors ({parts(loaded)}) loaded, '
            f'{parts(fresh) or "none"} begin anew, {parts(unused) or "none"} left there unused')


def has_weights(folder):
    return os.path.exists(os.path.join(folder, 'model.safetensors'))


def weights_folder(path):
    """The folder with the weights of a run or of a checkpoint; '' where it has none."""
    # the newest by its number, and perhaps its ema/: the link may be missing
    run, is_latest, below = path.partition('/checkpoints/latest')
    if is_latest:
        path = past.checkpoint_of(run) + below
    # a checkpoint, or a run with its checkpoints
    for folder in (path, past.checkpoint_of(path)):
        if has_weights(folder):
            return folder
    return ''


def has_denoiser(path):
    """Is it a run of a DiffusionPolicy or TextToImage, or a checkpoint of one?"""
    folder = weights_folder(path)
    if not folder:
        return False
    # both call it so
    return any(name.startswith('denoiser.') for name in checkpoint.shapes(folder))


def load_weights(model, path, skip=()):
    """Fill the parameters that a run, a checkpoint or its ema/ has by the same name, but for those
    in which a regex of `skip` is found: (names loaded, names there that are not used). Raises
    ValueError, and ERRORS of a damaged file."""
    folder = weights_folder(path)
    if not folder:
        raise ValueError('no model.safetensors there, nor in checkpoints/ below it')

    # views of the parameters: loading fills the model
    wanted = {}
    for name, tensor in model.state_dict().items():
        if not any(re.search(regex, name) for regex in skip):
            wanted[name] = tensor

    # an ema/ has what was trained, the rest is in the folder above it
    folders = [folder]
    above = os.path.dirname(os.path.abspath(folder))
    if has_weights(above):
        folders = [above, folder]

    # the folder comes last: its averages are to stand
    loaded, there = set(), set()
    for source in folders:
        # a shape that differs is told before anything is filled
        theirs = checkpoint.shapes(source)
        shared = theirs.keys() & wanted.keys()
        for name in sorted(shared):
            if theirs[name] != tuple(wanted[name].shape):
                raise ValueError(
                    f'{name} is {theirs[name]} there and {tuple(wanted[name].shape)} here: change '
                    'the model\'s settings, or name it in init_skip')
        checkpoint.load({name: wanted[name] for name in sorted(shared)}, source)
        loaded |= shared
        there |= theirs.keys()
    if not loaded:
        raise ValueError('it holds none of the parameters of this model')
    return loaded, there - loaded


def parts(names):
    """The first parts of parameter names: vit, decoder."""
    first_parts = {name.partition('.')[0] for name in names}
    return ', '.join(sorted(first_parts))
