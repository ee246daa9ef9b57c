"""Code of yours, a task (`--task=mine.py`) or a form (`--processor=mine.py:form`): what its
functions give is looked at, a mistake is told by their name, and a checkpoint keeps the file.

Imported where there is such code (docs/tasks.md).
"""
import filecmp
import functools
import os
import shutil
import sys
import tempfile
import traceback

import torch

from shards import BadSample

HERE = os.path.dirname(os.path.abspath(__file__))
COPIES = tempfile.TemporaryDirectory(prefix='yours')        # of code, as it was when a run began

# -------------------------------------------------------------------------------------------------
# its files


def files_in(settings):
    """{'task' or 'processor': the file of yours that it names}."""
    files, task = {}, settings['task']
    form = settings['processor'].rpartition(':')[0]
    if task.endswith('.py'):
        files['task'] = os.path.abspath(os.path.expanduser(task))
    if form.endswith('.py'):
        form = os.path.expanduser(form)
        is_here = os.path.isfile(form)
        files['processor'] = os.path.abspath(form if is_here else os.path.join(HERE, form))
    return files


def names_of(files):
    """{'task' or 'processor': the name of its file in a checkpoint}, of what `files_in` gives."""
    names = {key: os.path.basename(path) for key, path in files.items()}
    # two files of one name
    if len(names) == 2 and len(set(files.values())) == 2 and len(set(names.values())) == 1:
        names['processor'] = f'form_{names["processor"]}'
    return names


def copies(settings):
    """{name in a checkpoint: path of a copy} of the code that settings name, as it is now: it may
    be written on while a run goes on."""
    files, made = files_in(settings), {}
    for key, name in names_of(files).items():
        folder = tempfile.mkdtemp(dir=COPIES.name)
        made[name] = shutil.copyfile(files[key], os.path.join(folder, name))
    return made


def with_kept(settings, folder, adopt=()):
    """The settings of a checkpoint with its own copies of their code, but for those files that are
    adopted by name. Says where a file is another one now."""
    files, settings = files_in(settings), dict(settings)
    for key, name in names_of(files).items():
        kept = os.path.join(folder, name)
        if name in adopt or not os.path.isfile(kept):
            continue
        if os.path.isfile(files[key]) and not filecmp.cmp(files[key], kept, shallow=False):
            print(f'{files[key]} is not what the run was made with: {kept} is used; to take the '
                  f'other, --adopt=\'["{name}"]\'', file=sys.stderr)
        settings[key] = kept + settings[key][settings[key].rindex('.py') + 3:]
    return settings


# -------------------------------------------------------------------------------------------------
# a form that fails


def bad_sample(error, keys, settings):
    """What to raise where a form met an error: a BadSample that names the form, its line, and what
    the sample has; what is a fault of ours, or said already, as it is."""
    files = [*files_in(settings).values()]
    if isinstance(error, BadSample | Nonsense) or not (files or isinstance(error, KeyError)):
        return error
    reason = f'{type(error).__name__}: {error}'
    if isinstance(error, KeyError):
        reason = f'{error} is missing'
    # what it gave may be the fault, and not a line of it
    where = f'{os.path.basename(files[-1])}: ' if files else ''
    for frame in traceback.extract_tb(error.__traceback__):
        if os.path.abspath(frame.filename) in files:
            where = f'{os.path.basename(frame.filename)}, line {frame.lineno}, {frame.name}: '
    return BadSample(f'{where}{reason}, it has {", ".join(keys) or "no keys"}')


# -------------------------------------------------------------------------------------------------
# what its functions give


class Nonsense(ValueError):
    """A function of a task gave what it may not; told in one line, without a traceback."""
    in_one_line = True


def is_form(parts):
    """[(item, role), ...]?"""
    if not isinstance(parts, (list, tuple)):
        return False
    pairs = [part for part in parts if isinstance(part, (list, tuple)) and len(part) == 2]
    return len(pairs) == len(parts) and all(role in range(5) for _, role in pairs)


def is_count(counts):
    """{kind: number of targets}?"""
    if not isinstance(counts, dict) or not counts:
        return False
    # an array or a tensor of one number is one, too
    return all(hasattr(count, '__float__') for count in counts.values())


def is_dict(given):
    return isinstance(given, dict)


def is_learned(given):
    """{kind: Learned}, three tensors of one length each?"""
    if not isinstance(given, dict):
        return False
    for learned in given.values():
        if not isinstance(learned, tuple) or len(learned) != 3:
            return False
        if len({each.shape for each in learned if isinstance(each, torch.Tensor)}) != 1:
            return False
    return True


# function of a task -> what it has to give, in words, and whether it is that
EXPECTED = dict(
    form=('[(item, role), ...] (top of processor.py)', is_form),
    build=('a torch.nn.Module', lambda given: isinstance(given, torch.nn.Module)),
    count=('{kind: number of targets}', is_count),
    inputs=('a dict, what forward takes', is_dict),
    constants=('a dict, what forward takes', is_dict),
    arguments=('a dict, what forward takes in training', is_dict),
    weights=('a dict {kind: what it weighs}', is_dict),
    statistics=('a dict {name of FILES: value}', is_dict),
    summary=('a dict {key: number}', is_dict),
    scorer=('a function or None', lambda given: given is None or callable(given)))


def check_given(path, name, given):
    """Raises Nonsense where a function of the task in a file gave what it may not."""
    expected, is_right = EXPECTED.get(name, ('a dict {kind: model.Learned}', is_learned))
    if not is_right(given):
        raise Nonsense(f'{path}: {name} gave {type(given).__name__} '
                       f'{" ".join(repr(given).split()):.80}: expected {expected}')


def watch(task, path):
    """Let the functions of a task be looked at, and its model's forward."""
    for name in EXPECTED:
        # once, though a task is loaded in several places
        if not hasattr(getattr(task, name), '__wrapped__'):
            setattr(task, name, watched(getattr(task, name), path, name))


def watched(function, path, name):
    """The function, which raises Nonsense if it gives what it may not."""
    @functools.wraps(function)
    def checked(*args, **kwargs):
        given = function(*args, **kwargs)
        check_given(path, name, given)
        if name == 'count':
            COUNTED[path] = given
        if name == 'build':
            watch_forward(given, path)
        return given
    return checked


# file of a task -> what its `count` gave last
COUNTED = {}


def watch_forward(model, path):
    """Look at what a model's forward gives, the first time beside what `count` said of it."""
    seen = []

    def look(_, args, given):
        check_given(path, "its model's forward", given)
        if not seen and COUNTED.get(path):
            seen.append(given)
            # a mean would be divided by another number, or be of a kind that nobody adds
            says = {kind: float(number) for kind, number in COUNTED[path].items()}
            found = {kind: float(learned[1].sum()) for kind, learned in given.items()}
            if says != found:
                raise Nonsense(f'{path}: count gave {says}, but its model\'s forward learned '
                               f'{found} of the same batch')
    model.register_forward_hook(look)
