"""The one door to other people's weights, in and out: folders of transformers and repositories of
the Hugging Face hub, big_vision's .npz, and runs of ours.

    model = hub.from_pretrained('google/gemma-2b')          # a repository, a folder, or out/run
    python hub.py config google/gemma-2b > config/mine.py   its settings, as a config file
    python hub.py export out/run folder [--dtype=bfloat16]  a run, as a folder for transformers
    python hub.py push out/run name/repository              the same to the Hub, with a model card

No table of names or shapes is here. Each family of models has a module in families/, all of them
have the same plain names, and they are asked in turn:

    knows(path)                             is this folder (or file) mine?
    settings(path)                          flat settings of train.py, `task` and paths among them
    load(model, path, skip)                 into our model: the names that were loaded
    open_model(path, dtype, image_size)     our model
    writes(settings, model)                 is the model of a run of a kind that I write?
    export(settings, tokenizer, model, folder, dtype)   a run as a folder of mine

They raise ValueError, naming what has no counterpart. Runs of ours need none of them.
"""
import importlib
import os
import re
import sys
import tempfile

import torch

import checkpoint
import shards
from tokenizer import read_json

# The families are found beside this file, in the order in which they are asked.
HERE = os.path.dirname(os.path.abspath(__file__))
FAMILIES = ('huggingface', 'big_vision', 'diffusers')
NEEDS = {'diffusers': 'images'}          # the rooms that a family needs
MISSING = ('families/ is not here: without it, runs of ours are opened, but no models of others '
           'are fetched, opened or written')

# ------------------------------------------------------------------------------------------------
# families


def is_here(name):
    """Is a module of families/ there? Whoever does not need one may delete it, or all."""
    room = os.path.join(HERE, NEEDS.get(name, 'families'))
    return os.path.isfile(os.path.join(HERE, 'families', f'{name}.py')) and os.path.isdir(room)


def family(name):
    """A module of families/. Raises ValueError."""
    if not is_here(name):
        raise ValueError(MISSING)

    # Imported when it is met: a run that has nothing of others does not read all this.
    return importlib.import_module(f'families.{name}')


def families():
    """The modules of the families that are here. Raises ValueError where none is."""
    found = [family(name) for name in FAMILIES if is_here(name)]
    if not found:
        raise ValueError(MISSING)
    return found


def family_of(path):
    """The family that knows a folder or file. Raises ValueError."""
    for module in families():
        if module.knows(path):
            return module
    raise ValueError(f'{path!r} is no model of a family that is known here: '
                     f'{", ".join(FAMILIES)}')


# ------------------------------------------------------------------------------------------------
# in


def is_repository(name):
    """Could it be the name of a repository of the Hugging Face hub, owner/name?"""
    return re.fullmatch(r'[\w.-]+/[\w.-]+', name) is not None


def fetch(name, revision=None):
    """The folder of a model: `name` itself, or a repository's copy in huggingface_hub's cache.
    Raises ValueError."""
    if os.path.isdir(name) or name.endswith('.npz'):
        return name
    return family('files').fetch(name, revision)


def is_foreign(name):
    """Is it a model of others: a folder with their config.json, or a repository's name where no
    folder is?"""
    # Where a folder `out` is, `out/run` is a run that is not there, and no repository.
    if not os.path.isdir(name):
        has_parent = os.path.isdir(os.path.dirname(name))
        return name.endswith('.npz') or (is_repository(name) and not has_parent)
    if os.path.isdir(os.path.join(name, 'checkpoints')):
        return False

    # Of those that no config.json tells apart, the families may know some.
    config = os.path.join(name, 'config.json')
    if not os.path.exists(config):
        return any(family(key).knows(name) for key in FAMILIES if is_here(key))
    try:
        return 'task' not in read_json(config)      # a checkpoint of ours has it
    except ValueError:
        return True                                 # its family says what is wrong with it


def open_run(path, device='cpu', ema=True):
    """The checkpoint.Run of a run of ours or of one of its checkpoints, or of a folder of others
    that can be used as it is (of diffusers). Raises ValueError."""
    if not is_foreign(path):
        return checkpoint.open_run(path, device, ema)
    module = family_of(path)
    if not hasattr(module, 'open_run'):
        raise ValueError(f'{path!r} is a model of others: begin a run with it (init_from)')
    return module.open_run(path, device)


def task_of(path):
    """The name of the task that a run, or a folder of others, is of. Raises ValueError."""
    if is_foreign(path):
        return family_of(path).settings(path)['task']
    config = os.path.join(checkpoint.checkpoint_of(path), 'config.json')
    if not os.path.exists(config):
        raise ValueError(f'{path!r} is no checkpoint ({config} is missing)')
    return read_json(config)['task']


def begin(model, path, skip, cache_dir):
    """Weights to begin from, of a run or a checkpoint (every parameter of the same name, a URL,
    too) or of another project's model; what was loaded, new and unused, as a line. Raises
    ValueError.

    A language or vision-language model begins what reads for a denoiser: `model.reader` names
    that part."""
    try:
        folder = path
        if shards.is_url(path):
            from mirror import local_copy
            folder = local_copy(path, cache_dir)
        target, prefix, unused = model, '', set()
        reader = getattr(model, 'reader', '')
        if is_foreign(folder):
            folder = fetch(folder)
            if reader and not hasattr(family_of(folder), 'open_run'):
                target, prefix = getattr(model, reader), f'{reader}.'
            loaded = load(target, folder, skip)
        else:
            if reader and not has_denoiser(folder):
                target, prefix = getattr(model, reader), f'{reader}.'
            loaded, unused = load_weights(target, folder, skip)
    except checkpoint.ERRORS as error:
        raise ValueError(f'init_from={path!r}: {error}') from None

    loaded = {prefix + name for name in loaded}
    fresh = model.state_dict().keys() - loaded
    return (f'init_from {folder}: {len(loaded)} tensors ({parts(loaded)}) loaded, '
            f'{parts(fresh) or "none"} begin anew, {parts(unused) or "none"} left there unused')


def has_weights(folder):
    return os.path.exists(os.path.join(folder, 'model.safetensors'))


def weights_folder(path):
    """The folder with the weights of a run or of a checkpoint; '' where it has none."""
    for folder in (path, os.path.join(path, 'checkpoints', 'latest')):
        if has_weights(folder):
            return folder
    return ''


def has_denoiser(path):
    """Is it a run of a DiffusionPolicy or TextToImage, or a checkpoint of one?"""
    folder = weights_folder(path)
    if not folder:
        return False
    return any(name.startswith('denoiser.') for name in checkpoint.shapes(folder))


def load_weights(model, path, skip=()):
    """Fill the parameters that a run, a checkpoint or its ema/ has by the same name, but for those
    in which a regex of `skip` is found: (names loaded, names there that are not used). Raises
    ValueError, and ERRORS of a damaged file."""
    folder = weights_folder(path)
    if not folder:
        raise ValueError('no model.safetensors there, nor in checkpoints/latest below it')

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
        filled = {name: tensor for name, tensor in wanted.items() if name in shared}
        checkpoint.load(filled, source)
        loaded |= shared
        there |= theirs.keys()
    if not loaded:
        raise ValueError('it holds none of the parameters of this model')
    return loaded, there - loaded


def parts(names):
    """The first parts of parameter names: vit, decoder."""
    return ', '.join(sorted({name.partition('.')[0] for name in names}))


def from_pretrained(name, dtype=torch.float32, revision=None, image_size=0):
    """Our model, weights loaded, `.config` filled: of a folder or repository of transformers, a
    run or a checkpoint of ours. image_size: of its pictures, where it is to be another than it was
    trained on. Raises ValueError."""
    folder = fetch(name, revision)
    if is_foreign(folder):
        return family_of(folder).open_model(folder, dtype, image_size)
    return checkpoint.open_run(folder).model.to(dtype).eval()


def load(model, folder, skip=()):
    """Copy what a folder of others (or a file of theirs) and our model share into the model,
    sharded or not, one tensor at a time, but for names in which a regex of `skip` is found: the
    names that were loaded. Raises ValueError."""
    return family_of(folder).load(model, folder, skip)


def config_lines(name):
    """The settings of a model as the lines of a config file. Raises ValueError."""
    folder = fetch(name)
    settings = family_of(folder).settings(folder)
    # A repository is called by its name, not by where its copy lies.
    for key in ('init_from', 'tokenizer', 'processor'):
        if key in settings:
            settings[key] = settings[key].replace(folder, name, 1)

    # Each part of the model is a paragraph.
    lines = [f'# the settings of {name}, by python hub.py config']
    last_part = ''
    for key, value in settings.items():
        part = key.rpartition('.')[0]
        if part != last_part:
            lines.append('')
        last_part = part
        lines.append(f'{key} = {value!r}')
    return '\n'.join(lines) + '\n'


# ------------------------------------------------------------------------------------------------
# out


def export(model, folder, dtype=torch.float32, max_shard_size='5GB'):
    """Write config.json and .safetensors files that transformers loads: the same logits, in fp32
    the same bits. Raises ValueError for a model that it has not."""
    family('huggingface').export_model(model, folder, dtype, max_shard_size)


def export_run(run, folder, dtype=torch.float32):
    """A run, or one of its checkpoints, as a folder of others: of transformers, or of diffusers.
    Raises ValueError."""
    run_of = checkpoint.open_run(run)
    settings, tokenizer, model = run_of.settings, run_of.tokenizer, run_of.model

    # The first that writes such models writes this one, or says what has no counterpart.
    for module in families():
        if module.writes(settings, model):
            return module.export(settings, tokenizer, model, folder, dtype)
    raise ValueError(f'{run!r} can not be exported: task={settings["task"]!r} trains a '
                     f'{type(model).__name__}, which none of these knows: {", ".join(FAMILIES)}')


def push(run, name, dtype=torch.float32):
    """A run to a repository of the Hub, as `export_run` writes it, with a model card: where it is.
    Raises ValueError."""
    with tempfile.TemporaryDirectory() as folder:
        export_run(run, folder, dtype)
        return family('card').upload(run, name, folder)


# ------------------------------------------------------------------------------------------------
# the command line


def main(argv):
    """The command: config, export or push."""
    # Flags may stand anywhere.
    dtype = torch.float32
    words = []
    for word in argv:
        if word in ('--dtype=float32', '--dtype=bfloat16', '--dtype=float16'):
            dtype = getattr(torch, word.removeprefix('--dtype='))
        else:
            words.append(word)

    # What a user can put right is said in one line.
    try:
        if words[:1] == ['config'] and len(words) == 2:
            print(config_lines(words[1]), end='')
        elif words[:1] == ['export'] and len(words) == 3:
            export_run(words[1], words[2], dtype)
        elif words[:1] == ['push'] and len(words) == 3:
            print(push(words[1], words[2], dtype))
        else:
            print(f'hub.py: {" ".join(argv) or "nothing"} asked for; it knows:', file=sys.stderr)
            commands = [line for line in __doc__.splitlines() if 'python hub.py' in line]
            print('\n'.join(commands), file=sys.stderr)
            sys.exit(2)
    except (ValueError, OSError) as error:
        print(f'hub.py: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    main(sys.argv[1:])
