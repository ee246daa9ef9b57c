"""The one door to other people's weights, in and out: folders of transformers and repositories of
the Hugging Face hub, big_vision's .npz, and runs of ours.

    model = hub.from_pretrained('google/gemma-2b')          # a repository, a folder, or out/run
    python hub.py config google/gemma-2b > config/mine.py   its settings, as a config file
    python hub.py export out/run folder [--dtype=bfloat16]  a run, as a folder for transformers
    python hub.py adapter out/run folder                    the factors of `lora`, as one for peft
    python hub.py push out/run name/repository              the same to the Hub, with a model card

A run that names code (`task: mine.py`) is opened with --allow_code=true on the command line.

No table of names or shapes is here. Each family of models has a module in families/, all of them
have the same plain names, and they are asked in turn:

    knows(path)                             is this folder (or file) mine?
    settings(path)                          flat settings of train.py, `task` and paths among them
    load(model, path, skip)                 into our model: an accounting.Account
    open_model(path, dtype, image_size)     our model
    writes(settings, model)                 is the model of a run of a kind that I write?
    export(run, folder, dtype)              a checkpoint.Run as a folder of mine

They raise ValueError, naming what has no counterpart. Runs of ours need none of them.
"""
import contextlib
import importlib
import os
import re
import sys
import tempfile

import torch
from safetensors.torch import load_file

import accounting
import bounds
import checkpoint
import past
import processor as processors
import tasks
import tokenizer as tokenizers
from answering import set_mask
from configurator import ALLOW_CODE
from tokenizer import read_json
from usage import code_in, code_problem

# The families are found beside this file, in the order in which they are asked.
HERE = os.path.dirname(os.path.abspath(__file__))
FAMILIES = ('peft', 'huggingface', 'big_vision', 'diffusers')
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


def open_run(path, device='cpu', ema=True, adopt=(), dtype='auto'):
    """The checkpoint.Run of a run of ours, or of a folder or repository of others. dtype: the name
    of that of others' weights (auto: as their files have them). Raises ValueError."""
    if not is_foreign(path):
        return open_ours(path, device, ema, adopt)
    path = fetch(path)
    module = family_of(path)
    if hasattr(module, 'open_run'):
        return module.open_run(path, device)
    return open_theirs(path, device, dtype)


def open_theirs(folder, device, dtype):
    """The Run of a folder that is no run: what trains such a model, as it is where nobody sets
    it. Raises ValueError."""
    said = family_of(folder).settings(folder)
    task = tasks.load(said['task'])
    if 'tokenizer' not in said:
        raise ValueError(f'{folder!r} has no words: begin a run with it (init_from)')
    if dtype == 'auto':
        dtype = family('files').dtype_of(folder)
    model = from_pretrained(folder, getattr(torch, dtype)).to(device)
    tok = tokenizers.load(folder)

    decoder = getattr(model, 'decoder', model)
    settings = dict(seq_len=decoder.config.max_positions, mix={}, data_dir='', ema=0.0)
    settings = tasks.defaults(said['task']) | settings | said
    settings['processor'] = form_of(folder, settings)
    processor = processors.build(settings, tok, task, getattr(model, 'image_tokens', 0))
    set_mask(model, processor)
    run = checkpoint.Run(task, settings, tok, model, processor, device, folder)
    run.opening = getattr(tok, 'opening', [tok.bos_id])
    task.prepare(run)
    return run


def check_code(path):
    """Raises ValueError where a run or checkpoint of ours names code: it may have been downloaded,
    and only the command line says that it may run."""
    folder = past.checkpoint_of(path)
    try:
        settings = read_json(os.path.join(folder, 'config.json'))
    except (OSError, ValueError):
        return                                      # who opens it says what is wrong with it
    problem = code_problem(settings, folder)
    if problem and ALLOW_CODE not in sys.argv:
        raise ValueError(problem)


def open_ours(path, device='cpu', ema=True, adopt=()):
    """The checkpoint.Run of a run's folder or of one of its checkpoints; ema: with the averages of
    the weights, where it kept them; adopt: names of code that is taken as it is now, not as the
    run keeps it. Raises ValueError."""
    check_code(path)
    folder = past.checkpoint_of(path)
    if os.path.basename(folder).startswith('.step_'):
        raise ValueError(f'{folder!r} is a checkpoint that was not finished: take another')
    try:
        settings = read_json(os.path.join(folder, 'config.json'))
        accounting.check_sums(folder)
        if code_in(settings):
            from yours import with_kept
            settings = with_kept(settings, folder, adopt)
        task = tasks.load(settings['task'])
        is_bytes = settings['tokenizer'] == 'bytes'
        tok = tokenizers.load('bytes' if is_bytes else folder)

        weights = tensors_of(folder, ema and settings.get('ema'))
        base = {}
        if settings.get('lora'):
            base = read_json(os.path.join(folder, 'base.json'))
        with bounds.no_more_than(fetch(base.get('folder', folder))):
            model = task.build(settings, tok, load_weights=False)
        if base:
            weights = merged(model, base, folder, weights, settings['lora_alpha'])
        model.load_state_dict(weights)
        accounting.check_finite(weights.items(), folder)
        model.to(device, memory_format=getattr(model, 'memory_format', torch.preserve_format))

        # the files of a model folder are kept here
        if processors.is_folder(settings['processor']):
            settings['processor'] = folder
        processor = processors.build(settings, tok, task, getattr(model, 'image_tokens', 0))
        set_mask(model, processor)
        run = checkpoint.Run(task, settings, tok, model.eval(), processor, device, folder)
        run.kept = {name: read_json(os.path.join(folder, name)) for name in task.FILES}
        task.prepare(run)
        return run
    except FileNotFoundError as error:
        raise ValueError(f'{folder!r} is no checkpoint ({error.filename or error} is missing)'
                         ) from None
    # a stranger's config.json may hold anything
    except Exception as error:
        raise ValueError(f'{folder!r} can not be loaded: {" ".join(str(error).split())[:300]}'
                         ) from None


def tensors_of(folder, ema):
    """{name: tensor} that a checkpoint of ours holds; ema: averages, where it has some."""
    tensors = load_file(os.path.join(folder, 'model.safetensors'))
    if ema:
        tensors |= load_file(os.path.join(folder, 'ema', 'model.safetensors'))
    return tensors


def merged(model, base, folder, factors, alpha):
    """{name: tensor} of the factors of a checkpoint's folder and their base. Raises ValueError."""
    import lora  # few runs have factors
    fill(model, base['folder'])
    lora.check_base(model, base, folder)
    lora.merge(model, factors, alpha)
    return model.state_dict()


def fill(model, folder):
    """Fill a model with the weights of a folder, repository or file of others, or a checkpoint of
    ours, or its ema/. Raises ValueError."""
    folder = fetch(folder)
    if is_foreign(folder):
        return load(model, folder)
    is_ema = os.path.basename(folder) == 'ema'
    theirs = open_ours(os.path.dirname(folder) if is_ema else folder, ema=is_ema)
    model.load_state_dict(theirs.model.state_dict())


def task_of(path):
    """The name of the task that a run, or a folder of others, is of. Raises ValueError."""
    if is_foreign(path):
        return family_of(path).settings(path)['task']
    config = os.path.join(past.checkpoint_of(path), 'config.json')
    if not os.path.exists(config):
        raise ValueError(f'{path!r} is no checkpoint ({config} is missing)')
    task = read_json(config)['task']
    if not isinstance(task, str):
        raise ValueError(f'{config}: task={task!r} is no name')
    return task


def from_pretrained(name, dtype=torch.float32, revision=None, image_size=0):
    """Our model, weights loaded, `.config` filled: of a folder or repository of transformers, a
    run or a checkpoint of ours. image_size: of its pictures, where it is to be another than it was
    trained on. Raises ValueError."""
    folder = fetch(name, revision)
    if is_foreign(folder):
        try:
            module = family_of(folder)
            # the weights of an adapter are beside those of its base
            base = fetch(module.base_of(folder)) if hasattr(module, 'base_of') else folder
            with bounds.no_more_than(base):
                return module.open_model(folder, dtype, image_size)
        except OverflowError as error:
            raise ValueError(f'{folder!r}: a number of config.json is too large ({error})'
                             ) from None
    return open_ours(folder).model.to(dtype).eval()


def load(model, folder, skip=()):
    """Copy what a folder of others (or a file of theirs) and our model share into the model,
    sharded or not, one tensor at a time, but for names in which a regex of `skip` is found: the
    names that were loaded. Raises ValueError."""
    return family_of(folder).load(model, folder, skip).loaded


def room_for(vocab_size, tokenizer):
    """The rows of a vocabulary that is to hold the ids of a tokenizer, too: as they are, or, for
    special tokens that the model did not know, a multiple of 64."""
    if tokenizer.vocab_size <= vocab_size:
        return vocab_size
    return -(-tokenizer.vocab_size // 64) * 64


def form_of(folder, settings):
    """The processor for a folder's settings."""
    # a language model that holds no conversations has no template, and is none the worse for it
    has_eyes = any(key.startswith('vit.') for key in settings)
    if has_eyes or family('processors').read_template(folder):
        return settings.get('processor', 'auto')
    return 'auto'


def settings_of(name):
    """The settings of train.py for a model of others. Raises ValueError."""
    folder = fetch(name)
    settings = family_of(folder).settings(folder)

    if 'processor' in settings:
        settings['processor'] = form_of(folder, settings)

    # A folder may have no tokenizer: who trains with it has to give one.
    rows = settings.get('decoder.vocab_size')
    with contextlib.suppress(ValueError, OSError):
        if rows:
            tokenizer = tokenizers.load(settings['tokenizer'])
            settings['decoder.vocab_size'] = room_for(rows, tokenizer)

    # A repository is called by its name, not by where its copy lies.
    for key in ('init_from', 'tokenizer', 'processor'):
        if key in settings:
            settings[key] = settings[key].replace(folder, name, 1)
    return settings


def config_lines(name):
    """The settings of a model as the lines of a config file. Raises ValueError."""
    settings = settings_of(name)

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
    if os.path.isdir(os.path.join(folder, 'checkpoints')):
        raise ValueError(f'{folder!r} is a run and would be overwritten: name a new folder')
    run_of = open_ours(run)
    settings, model = run_of.settings, run_of.model

    # The first that writes such models writes this one, or says what has no counterpart.
    for module in families():
        if module.writes(settings, model):
            return module.export(run_of, folder, dtype)
    raise ValueError(f'{run!r} can not be exported: task={settings["task"]!r} trains a '
                     f'{type(model).__name__}, which none of these knows: {", ".join(FAMILIES)}')


def export_adapter(run, folder):
    """The factors of a run with `lora`, as a folder of peft. Raises ValueError."""
    if os.path.isdir(os.path.join(folder, 'checkpoints')):
        raise ValueError(f'{folder!r} is a run and would be overwritten: name a new folder')
    run_of = open_ours(run)
    if not run_of.settings.get('lora'):
        raise ValueError(f'{run!r} was trained without lora: python hub.py export writes it whole')
    factors = tensors_of(run_of.folder, run_of.settings['ema'])
    base = read_json(os.path.join(run_of.folder, 'base.json'))
    family('peft').write(run_of, factors, base, folder)


def push(run, name, dtype=torch.float32):
    """A run to a repository of the Hub, as `export_run` writes it, with a model card: where it is.
    Raises ValueError."""
    with tempfile.TemporaryDirectory() as folder:
        export_run(run, folder, dtype)
        return family('card').upload(run, name, folder)


# ------------------------------------------------------------------------------------------------
# the command line


def main(argv):
    """The command: config, export, adapter or push."""
    # Flags may stand anywhere.
    dtype = torch.float32
    words = []
    for word in argv:
        if word in ('--dtype=float32', '--dtype=bfloat16', '--dtype=float16'):
            dtype = getattr(torch, word.removeprefix('--dtype='))
        elif word != ALLOW_CODE:
            words.append(word)

    # What a user can put right is said in one line.
    if {'--help', '-h'} & set(argv):
        print(__doc__)
        return
    try:
        if words[:1] == ['config'] and len(words) == 2:
            print(config_lines(words[1]), end='')
        elif words[:1] == ['export'] and len(words) == 3:
            export_run(words[1], words[2], dtype)
        elif words[:1] == ['adapter'] and len(words) == 3:
            export_adapter(words[1], words[2])
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
