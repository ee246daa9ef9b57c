"""Weights that a model begins with (`init_from`): those of a run of ours, or of others.

train.py imports this where there are such.
"""
import os
import re
from collections import Counter

import accounting
import checkpoint
import hub
import past
from accounting import Account, counted
from model import DecoderConfig, ViTConfig
from shards import is_url
from tokenizer import read_json


def begin(model, path, skip, cache_dir):
    """Weights to begin from, of a run or a checkpoint (every parameter of the same name, a URL,
    too) or of another project's model; what was loaded, new and unused, as a line. Raises
    ValueError.

    A language or vision-language model begins what reads for a denoiser: `model.reader` names
    that part."""
    return fill(model, path, skip, cache_dir)[0]


def fill(model, path, skip, cache_dir):
    """What `begin` does: (its line, {part: tensors that begin anew}, the folder)."""
    ours = model.state_dict()
    accounting.check_skip(skip, ours)
    try:
        folder = path
        if is_url(path):
            from mirror import local_copy
            folder = local_copy(path, cache_dir)

        # what reads for a denoiser takes what is no denoiser itself
        is_foreign = hub.is_foreign(folder)
        if is_foreign:
            folder = hub.fetch(folder)
            is_reading = not hasattr(hub.family_of(folder), 'open_run')
        else:
            is_reading = not has_denoiser(folder)

        # and has names without that part's own, which skip is about
        target, prefix, reader = model, '', getattr(model, 'reader', '')
        if reader and is_reading:
            target, prefix = getattr(model, reader), f'{reader}.'
            skip = [f'^{re.escape(name)}$' for name in target.state_dict()
                    if accounting.is_skipped(prefix + name, skip)]

        if is_foreign:
            account = hub.family_of(folder).load(target, folder, skip)
        else:
            account = load_weights(target, folder, skip)
    except checkpoint.ERRORS as error:
        # DCP puts a traceback before it
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f'init_from={path!r}: {reason}') from None

    # every tensor is accounted for
    loaded = {prefix + name for name in account.loaded}
    fresh = Counter(name.partition('.')[0] for name in ours.keys() - loaded)
    line = (f'init_from {folder}: {len(loaded)} tensors ({parts(loaded)}) loaded, '
            f'{counted(fresh)} begin anew, {account.left()}')
    return line, fresh, folder


def begin_run(run, resumed, is_for_names=False):
    """The weights of a run's `init_from`, and the factors of `lora` beside them, as a line that
    tells. resumed: the checkpoint that it goes on from, or ''. is_for_names: nothing is loaded.
    Raises ValueError."""
    settings, model = run.settings, run.model
    path, skip, cache_dir = (settings[key] for key in ('init_from', 'init_skip', 'cache_dir'))
    if not settings['lora']:
        return '' if is_for_names else begin(model, path, skip, cache_dir)

    # few runs need it
    import lora
    lora.check(settings)
    if is_for_names:
        return lora.add(model, settings)

    # the factors may begin where those of peft ended
    adapter = ''
    if os.path.exists(os.path.join(path, 'adapter_config.json')):
        adapter, path = path, hub.family('peft').base_of(path)

    # its checkpoints hold the factors alone: each command finds the same weights again
    line, fresh, folder = fill(model, path, skip, cache_dir)
    if fresh:
        raise ValueError(f'lora: init_from={path!r} leaves {counted(fresh)} to begin anew, which '
                         'lora would freeze as it is: train that part first, without lora')
    if resumed:
        lora.check_base(model, read_json(os.path.join(resumed, 'base.json')), resumed)
    run.kept['base.json'] = dict(folder=lasting(path, folder), sum=lora.sum_of(model))
    run.tensors = lambda: lora.factors_of(model)
    begun = hub.family('peft').read(model, adapter) if adapter else ()
    line = f'{line}; {lora.add(model, settings)}'
    if begun:
        factors, alpha = begun
        hub.family('peft').begin(model, adapter, factors, (settings['lora_alpha'], alpha))
        line += f', which begin as those of {adapter}'
    return line


def lasting(path, folder):
    """What names these weights from anywhere, and still when a run of ours has gone on."""
    if not hub.is_foreign(folder):
        return os.path.abspath(weights_folder(folder))
    return os.path.abspath(path) if os.path.exists(path) else path


def has_weights(folder):
    return os.path.exists(os.path.join(folder, 'model.safetensors'))


def weights_folder(path):
    """The folder with the weights of a run or of a checkpoint; '' where it has none. Raises
    ValueError."""
    # the newest by its number, and perhaps its ema/: the link may be missing
    run, is_latest, below = path.partition('/checkpoints/latest')
    if is_latest:
        path = past.checkpoint_of(run) + below
    if os.path.basename(os.path.normpath(path)).startswith('.step_'):
        raise ValueError('a checkpoint that was not finished: take another')
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
    in which a regex of `skip` is found: their Account. Raises ValueError, and ERRORS of a damaged
    file."""
    folder = weights_folder(path)
    if not folder:
        raise ValueError('no model.safetensors there, nor in checkpoints/ below it')
    accounting.check_sums(folder)
    if os.path.exists(os.path.join(folder, 'base.json')):
        raise ValueError('it holds the factors of lora alone: python hub.py export merges them '
                         'with their base into a folder to begin from')

    # views of the parameters: loading fills the model
    wanted = {}
    for name, tensor in model.state_dict().items():
        if not accounting.is_skipped(name, skip):
            wanted[name] = tensor

    # an ema/ has what was trained, the rest is in the folder above it
    folders = [folder]
    above = os.path.dirname(os.path.abspath(folder))
    if has_weights(above):
        folders = [above, folder]

    # the folder comes last: its averages are to stand
    theirs, sources = {}, {}
    for source in folders:
        shapes = checkpoint.shapes(source)
        theirs |= shapes
        sources |= dict.fromkeys(shapes, source)

    # what does not fit is told before anything is filled
    check_fit(model, wanted, theirs)
    shared = theirs.keys() & wanted.keys()
    for source in folders:
        names = [name for name in sorted(shared) if sources[name] == source]
        checkpoint.load({name: wanted[name] for name in names}, source)
    accounting.check_finite(((name, wanted[name]) for name in sorted(shared)), folder)
    unused = Counter(name.partition('.')[0] for name in theirs.keys() - shared)
    return Account(sorted(shared), unused)


def check_fit(model, wanted, theirs):
    """Raises ValueError where a tensor has another shape there, {name: shape}, or is missing in a
    part that both have."""
    shared = sorted(theirs.keys() & wanted.keys())
    if not shared:
        raise ValueError('it holds none of the parameters of this model')
    for name in shared:
        if theirs[name] != tuple(wanted[name].shape):
            raise ValueError(
                f'{name} is {theirs[name]} there and {tuple(wanted[name].shape)} here: change '
                'the model\'s settings, or name it in init_skip')

    # a decoder or tower alone is one part, other models have some
    is_one = isinstance(getattr(model, 'config', None), DecoderConfig | ViTConfig)
    first_parts = {name.partition('.')[0] for name in shared}
    for name in sorted(wanted.keys() - theirs.keys()):
        if is_one or name.partition('.')[0] in first_parts:
            raise ValueError(f'{name} is not there: change the model\'s settings, or name it in '
                             'init_skip')


def parts(names):
    """The first parts of parameter names: vit, decoder."""
    first_parts = {name.partition('.')[0] for name in names}
    return ', '.join(sorted(first_parts))
