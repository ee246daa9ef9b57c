"""Weights that the parts of a model begin with, each from where `init` says.

    init = {'vit': 'google/siglip-base-patch16-224', 'decoder': 'out/llm'}

A part is a group of the task's settings (vit, decoder, clip, unet, vae, or vla, policy, dit: what
no other part holds), or the connector. It comes from a run or a checkpoint of ours, also as a URL,
from a folder of transformers or diffusers, a repository of the Hugging Face hub, or a file of
big_vision.

Its shape comes along: `flags` stand before all that a user says, so that nobody has to write them
and the run's config.json holds them. train.py imports this where a run begins with weights, part
by part or whole (initial.py).
"""
import json
import os
import re
from collections import Counter
from types import SimpleNamespace

from safetensors import safe_open

import accounting
import checkpoint
import hub
import initial
import past
import tasks
import tokenizer as tokenizers
from accounting import Account, counted, is_skipped
from configurator import plain, refuse
from shards import is_url
from tokenizer import read_json

# What of a part's settings does not come along: it says how to train.
OF_TRAINING = ('dropout', 'remat', 'feature_layer', 'init_scale', 'loss', 'time', 'shift',
               'num_noise_draws', 'drop', 'clip_range', 'spacing')
# What belongs to a part and stands outside of its group.
BESIDE = {'vit': ('image_mean', 'image_std'),
          'decoder': ('tokenizer',),
          'clip': ('tokenizer',),
          'connector': ('pixel_shuffle', 'connector_bias')}
# What may be set otherwise: positions are interpolated, rows are added, units are a choice.
FREE = ('vit.image_size', 'decoder.vocab_size', 'decoder.max_positions', 'image_mean', 'image_std',
        'action_steps', 'normalize')
# Two tokenizers that cut this alike are one, whatever their files are called.
WORDS = 'The 7 quick brown foxes jumped over 42 naïve dogs; 東京 isn\'t far.\n\n    def f(x): pass'

# -------------------------------------------------------------------------------------------------
# what comes along


def flags(settings):
    """The flags of what comes along with the weights of `init`, for settings as they are without
    them. One line and exit code 2 for what can not be."""
    try:
        if settings['init_from']:
            raise ValueError(f'init={settings["init"]!r} and init_from={settings["init_from"]!r}: '
                             'give one of the two (--init_from= or --init={} takes one away)')
        # a run that goes on needs no source any more
        saved = saved_settings(settings)
        if saved:
            brought = shapes(settings, dict.fromkeys(settings['init'], saved))
        else:
            brought = brought_along(settings)
            # now, where it can be told: `begin` knows all, and comes late
            known = tasks.defaults(settings['task']) | dict(tokenizer='bytes')
            check(settings, brought, known)
    except checkpoint.ERRORS as error:
        refuse(str(error))
    return [f'--{key}={value!r}' for key, value in brought.items()]


def brought_along(settings):
    """{key: value} of the parts of `init`. Raises ValueError and OSError."""
    sources = {}
    for part, source in settings['init'].items():
        if not isinstance(source, str) or not source:
            raise ValueError(f'init: {part}={source!r}: expected a run, a folder, or a name on '
                             'the Hugging Face hub')
        try:
            sources[part] = settings_of(source)
        except checkpoint.ERRORS as error:
            raise ValueError(f'init: {part} of {source!r}: {error}') from None
    brought = shapes(settings, sources)

    # a tower of transformers counts its own
    rows = brought.get('decoder.vocab_size', -1)
    if rows < 0 or brought.get('decoder.hf'):
        return brought

    # 0 stands for what its own tokenizer has; this run's may have more
    if not rows:
        rows = hub.room_for(0, load_tokenizer(brought['tokenizer'], settings))
    name = settings['tokenizer']
    if name == 'bytes':
        name = brought['tokenizer']
    brought['decoder.vocab_size'] = hub.room_for(rows, load_tokenizer(name, settings))
    return brought


def shapes(settings, sources):
    """{key: value}: of the settings of each part's source, {part: settings}, what belongs to its
    weights. Raises ValueError for a part that the task, or the source, has not."""
    task, brought = settings['task'], {}
    known = tasks.defaults(task)
    groups = {key.partition('.')[0] for key in known if '.' in key} | {'connector'}
    for part, theirs in sources.items():
        if part not in groups:
            raise ValueError(f'init: {part!r} is no part of task={task}, which has '
                             f'{", ".join(sorted(groups))}')
        if part != 'connector' and not any(key.startswith(f'{part}.') for key in theirs):
            raise ValueError(f'init: {settings["init"][part]!r} has no {part}')
        for key in keys_of(part, known, task):
            if key in theirs:
                brought[key] = plain(theirs[key])
    return brought


def keys_of(part, known, task):
    """Names of the settings that belong to the weights of a part."""
    keys = [key for key in known if key.startswith(f'{part}.')]
    keys = [key for key in keys if key.partition('.')[2] not in OF_TRAINING]

    # A group that is made for a task in its own file goes with what such a run keeps.
    beside, module = BESIDE.get(part, ()), tasks.load(task)
    group = tasks.train_settings(task).get(part)
    if type(group).__module__ == module.__name__:
        beside = [key for key in module.KEPT if key not in BESIDE['connector']]
    return keys + [key for key in beside if key in (*known, 'tokenizer')]


def check(settings, brought, known):
    """Raises ValueError where somebody has set what came along to another value, and init_skip
    does not name it. known: values that nobody has set, as far as can be told."""
    for key, theirs in brought.items():
        ours = settings[key]
        if ours in (theirs, known.get(key)) or key in FREE:
            continue
        if is_skipped(key, settings['init_skip']):
            continue
        if key == 'tokenizer' and is_alike(ours, theirs, settings):
            continue
        source = settings['init'].get(key.partition('.')[0], settings['init'])
        raise ValueError(f'{key}={ours!r}, but {source!r} of init has {theirs!r}: leave it out, '
                         f'or name {key} in init_skip')


def is_alike(ours, theirs, settings):
    """Do two tokenizers cut words alike, as far as can be told?"""
    ours = load_tokenizer(ours, settings)
    try:
        theirs = load_tokenizer(theirs, settings)
    except (ValueError, OSError):
        return True         # weights came without one
    return ours.encode(WORDS) == theirs.encode(WORDS)


def load_tokenizer(name, settings):
    return tokenizers.load(checkpoint.located(settings | dict(tokenizer=name), 'tokenizer'))


# -------------------------------------------------------------------------------------------------
# settings of a source


def saved_settings(settings):
    """The settings of the run that this one goes on with, if it began with the same `init`; {}
    where it begins."""
    place, remote = settings['out_dir'], settings['remote']
    has_begun = checkpoint.names(os.path.join(place, 'checkpoints'))
    if not has_begun and settings['resume'] not in ('auto', 'never'):
        place = settings['resume']
    saved, folder = {}, past.checkpoint_of(place)
    if os.path.exists(os.path.join(folder, 'config.json')):
        saved = read_json(os.path.join(folder, 'config.json'))
    elif remote and not has_begun:
        try:
            saved = read_far(remote)
        except OSError:
            return {}           # nothing there yet: the run begins
    return saved if saved.get('init') == settings['init'] else {}


def read_far(url):
    """The config.json of a run, or a checkpoint, at a URL. Raises OSError and ValueError."""
    from remote import patiently

    settings = patiently(url.rstrip('/'), lambda fs, base: fs.cat_file(f'{base}/config.json'))
    settings = json.loads(settings)
    if not isinstance(settings, dict):
        raise ValueError(f'{url}/config.json is no JSON object')
    return settings


def settings_of(source):
    """Flat settings of a run of ours, or of a model of others. Raises ValueError and OSError."""
    if is_url(source):
        return read_far(source)
    if hub.is_foreign(source):
        theirs = hub.settings_of(source)
        # what others' models do not have, and a tower of transformers brings its own weights
        for key, value in {'vit.hf': '', 'vit.stem': 'patch', 'decoder.hf': ''}.items():
            if f'{key.partition(".")[0]}.width' in theirs:
                theirs[key] = value
        return theirs

    folder = initial.weights_folder(source)
    if not folder:
        raise ValueError('no model.safetensors there, nor in checkpoints/ below it')
    # averages lie in their checkpoint
    if not os.path.exists(os.path.join(folder, 'config.json')):
        folder = os.path.dirname(os.path.abspath(folder))
    theirs = read_json(os.path.join(folder, 'config.json'))

    # where its tokenizer came from may be gone, or on another machine
    try:
        checkpoint.located(theirs | dict(out_dir=''), 'tokenizer')
    except (OSError, ValueError):
        theirs['tokenizer'] = folder
    return theirs


# -------------------------------------------------------------------------------------------------
# weights


def begin_run(run, resumed, is_for_names=False):
    """`initial.begin_run`, and the same of `init`: a line that tells what was loaded, new and
    unused. Raises ValueError."""
    if not run.settings['init'] or run.settings['lora']:
        return initial.begin_run(run, resumed, is_for_names)
    return '' if is_for_names else begin(run.model, run.settings)


def begin(model, settings):
    """Fill the parts of a model with what `init` names: the line. Raises ValueError."""
    brought, skip = brought_along(settings), settings['init_skip']
    check(settings, brought, {})
    accounting.check_skip(skip, [*model.state_dict(), *brought])
    names, configs = parts_of(model, settings['task'])

    # each source is opened once
    parts_from = {}
    for part, source in settings['init'].items():
        if part not in names:
            raise ValueError(f'init: this model has no {part}, only {", ".join(sorted(names))}')
        parts_from.setdefault(source, []).append(part)

    said, fresh = [], set(model.state_dict())
    for source, parts in parts_from.items():
        some = Some(model, {part: names[part] for part in parts}, configs)
        # of which init_skip has the names in the model
        skipped = [f'^{re.escape(name)}$' for name, own in some.names.items()
                   if is_skipped(own, skip)]
        try:
            account = load(some, source, skipped, settings['cache_dir'])
        except checkpoint.ERRORS as error:
            raise ValueError(f'init: {", ".join(parts)} of {source!r}: {error}') from None
        fresh -= {some.names[name] for name in account.loaded}
        said.append(f'{", ".join(parts)} from {source}: {len(account.loaded)} tensors loaded, '
                    f'{account.left()}')
    anew = Counter(name.partition('.')[0] for name in fresh)
    return f'init: {". ".join(said)}. {counted(anew)} begin anew'


class Some:
    """Some parts of a model as a family sees a model: vit.*, decoder.*, connector.*, whatever they
    are called in it."""

    def __init__(self, model, parts, configs):
        self.model, self.parts, self.names = model, parts, {}
        for part, rests in parts.items():
            for rest, name in rests.items():
                self.names[f'{part}.{rest}'] = name
        self.config = SimpleNamespace(**{part: configs[part] for part in parts})

    def state_dict(self):
        tensors = self.model.state_dict()
        return {name: tensors[own] for name, own in self.names.items()}


def parts_of(model, task):
    """({part: {name in it: name in the model}}, {part: its config or None}). A part is the first
    module that has a config of the class that a group of the task's settings has."""
    kinds, prefixes, configs = {}, {}, {'connector': None}
    for group, value in tasks.train_settings(task).items():
        if hasattr(value, '__dataclass_fields__'):
            kinds[type(value)] = group
    for path, module in model.named_modules():
        prefix = f'{path}.'.removeprefix('.')
        if path.rpartition('.')[2] == 'connector':
            prefixes.setdefault('connector', prefix)
        for value in vars(module).values():
            part = kinds.get(type(value))
            if part and part not in prefixes:
                prefixes[part], configs[part] = prefix, value

    # a name belongs to the innermost
    names = {part: {} for part in prefixes}
    for name in model.state_dict():
        inside = [part for part, prefix in prefixes.items() if name.startswith(prefix)]
        if inside:
            part = max(inside, key=lambda part: len(prefixes[part]))
            names[part][name.removeprefix(prefixes[part])] = name
    return names, configs


def load(some, source, skip, cache_dir):
    """Fill parts of a model with what a source has of them: the Account. Raises ValueError."""
    if is_url(source):
        from mirror import local_copy
        source = local_copy(source, cache_dir)
    if hub.is_foreign(source):
        folder = hub.fetch(source)
        return hub.family_of(folder).load(some, folder, skip)
    return load_ours(some, initial.weights_folder(source), skip)


def load_ours(some, folder, skip):
    """The same of a folder with weights of ours."""
    accounting.check_sums(folder)
    # an ema/ has what was trained, the rest is in the folder above it
    files = {}
    for place in (os.path.dirname(os.path.abspath(folder)), folder):
        if initial.has_weights(place):
            path = os.path.join(place, 'model.safetensors')
            with safe_open(path, framework='pt') as file:
                files |= dict.fromkeys(file.keys(), path)

    # a part may be called otherwise there
    theirs = {}
    for part, rests in some.parts.items():
        start = start_of(rests, files)
        for rest in rests:
            name = f'{part}.{rest}'
            if is_skipped(name, skip):
                continue
            if start + rest not in files:
                raise ValueError(f'{start}{rest} is not there: change the model\'s settings, or '
                                 f'name {some.names[name]} in init_skip')
            theirs[name] = start + rest

    unused = Counter(name.partition('.')[0] for name in files.keys() - set(theirs.values()))
    account = Account(unused=unused)
    account.loaded = accounting.copy_into(some, tensors(some, theirs, files, folder, account))
    return account


def start_of(rests, names):
    """What stands before the names of a part among others: the beginning that most of them
    have."""
    votes = Counter()
    for name in names:
        words = name.split('.')
        for place in range(len(words)):
            if '.'.join(words[place:]) in rests:
                votes['.'.join([*words[:place], ''])] += 1
    return max(votes, key=votes.get, default='')


def tensors(some, theirs, files, folder, account):
    """Yield (our name, tensor of our shape) of {our name: theirs}, one at a time. Raises
    ValueError."""
    ours = some.state_dict()
    for name, their in theirs.items():
        with safe_open(files[their], framework='pt') as file:
            tensor = file.get_tensor(their)
        accounting.check_finite([(their, tensor)], folder)
        shape = tuple(ours[name].shape)

        # only what is known to be of patches or words is made to fit
        if name.startswith(('vit.', 'decoder.')):
            tensor = accounting.fitted(tensor, name, shape, folder, account)
        if tuple(tensor.shape) != shape:
            raise ValueError(f'{their} is {tuple(tensor.shape)} there and {shape} here: change '
                             f'the model\'s settings, or name {some.names[name]} in init_skip')
        yield name, tensor
