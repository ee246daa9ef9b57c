"""What the functions of a task of yours give is looked at: a mistake is told by their name.

tasks/__init__.py imports this where a task is a file of yours (docs/tasks.md).
"""
import functools

import torch


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
        if name == 'build':
            given.register_forward_hook(
                lambda _, args, given: check_given(path, "its model's forward", given))
        return given
    return checked
