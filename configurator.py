"""Settings are a script's own globals; config files and flags change them, from left to right.

    lr = 6e-4                       # train.py: plain names, and dataclasses for model parts
    vit = ViTConfig()
    config = configure(globals())   # flat dict {'lr': 6e-4, 'vit.depth': 12, ...}: config.json

    python train.py config/gemma_2b.py out/run/config.json --lr=3e-5 --vit.depth=12

A config `.py` is plain Python over the current settings (`vit.depth = 27`, `lr = lr * 2`; helpers
start with `_`), a `.json` is a saved run. A setting has the type of its default; int -> float and
list <-> tuple are converted, anything else is refused with one line on stderr and exit code 2.
A script's `task` names a file that has a class of further settings: tasks/<task>.py, or your own.
"""

import ast
import copy
import json
import os
import re
import sys
from ctypes import c_int64
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace as Group  # what stands for a dataclass while a config file runs

TYPES = (bool, int, float, str, tuple, list, dict)  # bool first: it is an int too
HELP = {'--help', '-h'}
ALLOW_CODE = '--allow_code=true'  # what a saved run names may be run
HOME = Path(__file__).resolve().parent  # config/ and tasks/ are here


def configure(settings, argv=None, partial=False, more=None, elsewhere=None, brings=None):
    """Apply files and flags to `settings`, a script's globals(), in place; return the flat config.

    partial: the files are another script's: what they set and this one does not have is skipped.
    more: task -> {name: value}, the settings that the task adds. Raises ValueError.
    elsewhere: key -> the tasks that have this setting; asked when a key is refused.
    brings: flat config -> flags of what its `init` brings along; they stand before all others."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if os.path.isfile(settings.get('__file__') or ''):  # a shell has none
        answer_help(settings['__file__'], argv)
    scope = {k: v for k, v in settings.items() if k[0] != '_' and is_setting(v)}

    # The task decides which settings there are, so it is known before any of them is read.
    if more:
        scope['task'] = find_task(argv, scope['task'])
        scope |= added_by(scope['task'], more, settings)
    defaults = flatten(scope)
    if HELP & set(argv):  # and no source to read
        print('\n'.join(f'--{key}={value!r}' for key, value in defaults.items()))
        raise SystemExit(0)

    # Left to right, the last one counts; the globals change when all has been read.
    flat = {k: convert(f'the default {k} = {v!r}', v, v) for k, v in defaults.items()}
    for place, argument in enumerate(argv):
        if argument == ALLOW_CODE:
            continue
        is_flag = argument.startswith('-')
        if is_flag:
            given = read_flag(argument, argv[place + 1 :], defaults)
        elif argument.endswith('.py'):
            given = run_python(find(argument), scope, flat, partial, elsewhere)
        elif argument.endswith('.json'):
            given = read_json(find(argument), argv)
        else:
            right = f'--{argument}' if '=' in argument else '--key=value, or a .py or .json file'
            refuse(f'unexpected {argument!r}: write {right}')

        for key, value in given.items():
            label = argument if is_flag else f'{key}={value!r:.60} in {argument}'
            if key in flat:
                flat[key] = convert(label, value, defaults[key])
                continue
            from usage import unknown_key
            if message := unknown_key(key, label, flat, partial and not is_flag, elsewhere):
                refuse(message)

    # Some file set it where only running it can tell, in an `if` perhaps.
    if more and flat['task'] != scope['task']:
        refuse(f"task={flat['task']} comes too late: write task = '...' on a line of its own")
    # A file of yours is found from any folder.
    if more and flat['task'].endswith('.py'):
        flat['task'] = os.path.abspath(os.path.expanduser(flat['task']))
    # Shapes come with weights: read again, as if they were said first.
    if brings and flat.get('init'):
        return configure(settings, [*brings(plain(flat)), *argv], partial, more, elsewhere)
    try:
        settings.update({name: fill(name, value, flat) for name, value in scope.items()})
    except ValueError as error:
        refuse(str(error))
    return plain(flat)


def added_by(task, more, settings):
    """The settings that a task adds to a script's."""
    try:
        added = more(task)
    except ValueError as error:
        refuse(str(error))
    for name in added:
        assert name not in settings, f'task={task}: {name} is a name of the script, too'
    return added


def part(flat, name, cls):
    """The dataclass `cls` with the flat settings `name.*`. Raises ValueError."""
    known = flatten({name: cls()})
    unknown = [key for key in flat if key.startswith(f'{name}.') and key not in known]
    if unknown:
        raise ValueError(f'{cls.__name__} has no setting {", ".join(unknown)}')
    return fill(name, cls(), flat)


def refuse(message):
    """One line on stderr, exit code 2."""
    print('configurator:', ' '.join(message.split()), file=sys.stderr)
    raise SystemExit(2) from None


# Values


def read_flag(flag, following, defaults):
    """{key: value} of --key=value."""
    key, equals, text = flag.partition('=')
    if flag.startswith('--') and equals:
        return {key[2:]: parse(text, defaults.get(key[2:]))}

    # --lr 3: the next argument is what was meant, unless it is a flag itself.
    if not equals:
        text = 'VALUE'
        if following and not following[0].startswith('--'):
            text = following[0]
    refuse(f'{flag} is not of the form --key=value: write --{key.lstrip("-")}={text}')


def parse(text, default):
    """The value of a flag; a string setting takes the text as it is, less its quotes."""
    is_text = isinstance(default, str)
    is_quoted = len(text) > 1 and text[0] in '\'"' and text[0] == text[-1]
    if is_text and not is_quoted:
        return text

    # What Python does not write like this.
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    if isinstance(default, float) and text.lower().lstrip('+-') in ('inf', 'nan'):
        return float(text)

    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    if is_text and not isinstance(value, str):
        return text
    return value


def convert(label, value, default):
    """`value` in the type of `default`; `label` opens the refusal."""
    kind, got = kind_of(default), kind_of(value)
    assert kind in TYPES, f'{label}: a setting is one of {TYPES}'

    # These lose nothing: 3 is 3.0, [1, 2] is (1, 2).
    if kind is float and got is int and abs(value) <= sys.float_info.max:
        value, got = float(value), float
    elif {kind, got} == {list, tuple}:
        value, got = kind(value), kind

    if got is not kind or value != value:  # nan is not equal to itself
        what = 'nan' if got is kind else got.__name__
        if kind is bool:
            what += ': write true or false'
        elif kind is int and got is float and value.is_integer():
            what += f': write {int(value)}'
        refuse(f'{label}: expected {kind.__name__} like {default!r:.60}, got {what}')

    # What config.json cannot give back would change the run that is started from it.
    try:
        is_kept = plain(value) == json.loads(json.dumps(value), parse_constant=float,
                                             parse_int=lambda text: c_int64(int(text)).value)
    except (TypeError, ValueError):
        is_kept = False
    if not is_kept:
        what = 'numbers of 64 bits but nan, strings, lists, and dicts with string keys'
        refuse(f'{label}: JSON cannot hold it: use {what}')
    # Bytes of a command line that are no UTF-8 are such halves; paths can hold no zero.
    if re.search(r'[\ud800-\udfff]|\\u0000', json.dumps(value, ensure_ascii=False)):
        refuse(f'{label}: it holds bytes that are no UTF-8, half of a surrogate pair, or a NUL')
    return kind(plain(value))


def kind_of(value):
    # numpy's float64 is a float
    return next((kind for kind in TYPES if isinstance(value, kind)), type(value))


def is_setting(value):
    return isinstance(value, TYPES) or is_dataclass(type(value))


def plain(value):
    """`value` as JSON gives it back: with lists for tuples."""
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


# Dataclasses: {'vit': ViTConfig(depth=12)}, {'vit': Group(depth=12)}, or flat {'vit.depth': 12}


def fill(key, value, flat, as_group=False):
    """A setting with the values of the flat config: a new instance of a dataclass, or a Group."""
    if is_dataclass(type(value)):
        parts = {}
        for field in fields(value):
            if field.init:
                old = getattr(value, field.name)
                parts[field.name] = fill(f'{key}.{field.name}', old, flat, as_group)
        if as_group:
            return Group(**parts)
        try:  # a new instance: frozen ones work, too, and all are checked by their __post_init__
            return replace(value, **parts)
        except (ValueError, AssertionError, TypeError) as error:
            raise ValueError(f'{key}: {error!r}') from None

    # JSON has lists for tuples, also for those inside of a default.
    if key not in flat or json.dumps(flat[key]) == json.dumps(value):
        return copy.deepcopy(value)
    if isinstance(value, tuple) and isinstance(flat[key], list):
        return tuple(flat[key])
    return copy.deepcopy(flat[key])


def flatten(groups, prefix=''):
    flat = {}
    for name, value in groups.items():
        if is_dataclass(type(value)):
            value = fill(name, value, {}, as_group=True)
        if isinstance(value, Group):
            flat |= flatten(vars(value), f'{prefix}{name}.')
        else:
            flat[prefix + name] = value
    return flat


# Files


def find(name):
    """The path of a config file: from the current folder, else from the folder of this file."""
    path = Path(os.path.expanduser(name))
    for root in (Path(), HOME):
        if (root / path).is_file():
            return root / path
    from usage import nearest_file
    refuse(f'no config file {name}: {nearest_file(path)}')


def read_json(path, argv):
    try:
        given = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:  # only JSON's knows the line
        refuse(f'{path}:{getattr(error, "lineno", 1)}: {type(error).__name__}: {error}')
    if not isinstance(given, dict):
        refuse(f'{path}:1: expected {{"key": value}}, as in config.json')
    if '.py' in repr(given) and ALLOW_CODE not in argv:
        from usage import code_problem
        problem = code_problem(given, path)
        if problem:
            refuse(problem)
    return given


def find_task(argv, default):
    """The task that files and flags leave, from left to right; nothing is run."""
    task = default
    for argument in argv:
        if argument.startswith('--task='):
            task = parse(argument.partition('=')[2], default)
        elif argument.startswith('-'):  # also --name=a.py
            continue
        elif argument.endswith('.json'):
            value = read_json(find(argument), argv).get('task', task)
            task = convert(f'task={value!r:.60} in {argument}', value, default)
        elif argument.endswith('.py'):
            task = task_in(find(argument), task)
    return task


def task_in(path, task):
    """The task that a config file sets in a line of its own, else `task`."""
    try:
        body = ast.parse(path.read_bytes(), str(path)).body
    except Exception as error:
        from usage import fault_in_file
        refuse(fault_in_file(path, error, {}))
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'task':
            task = getattr(node.value, 'value', None)  # of a constant
            if not isinstance(task, str):
                what = "the task is read before the file runs: write task = 'name'"
                refuse(f'{path}:{node.lineno}: {what}')
    return task


def run_python(path, scope, flat, partial, elsewhere):
    """Run a config file over a copy of the settings; those, and unknown ones, that it leaves."""
    given = {name: fill(name, value, flat, as_group=True) for name, value in scope.items()}
    names, assigned = {**given, '__file__': str(path)}, set()

    # One statement at a time, so that one can be skipped.
    try:
        for node in ast.parse(path.read_bytes(), str(path)).body:
            nodes = list(ast.walk(node))
            targets = roots(n for n in nodes if isinstance(getattr(n, 'ctx', None), ast.Store))
            assigned |= targets
            code = compile(ast.Module([node], []), str(path), 'exec', dont_inherit=True)
            try:
                exec(code, names)
            except (NameError, AttributeError):
                # Skip what is about another script's settings, unless one of ours depends on it.
                called = [n.func for n in nodes if isinstance(n, ast.Call)]
                objects = roots(func for func in called if isinstance(func, ast.Attribute))
                if not partial or given.keys() & (targets | objects):
                    raise
    except Exception as error:
        from usage import fault_in_file
        refuse(fault_in_file(path, error, flat, partial, elsewhere))

    # Imports, functions and classes are no settings, and may not hide one.
    for name in given.keys() - assigned:
        if names.get(name) is not given[name]:
            what = 'is a setting, but an import, def or class takes it'
            refuse(f'{path}: {name} {what}: assign it or use _{name}')
    left = {}
    for name, value in names.items():
        is_helper = name[0] == '_' or callable(value) or isinstance(value, type(ast))
        if name in given or (name in assigned and not is_helper):
            left[name] = value
    return flatten(left)


def roots(nodes):
    """The names at the start of expressions: {'a'} for a, a.b and a[i].c."""
    return {re.match(r'\W*(\w*)', ast.unparse(node))[1] for node in nodes}


# --help: usage.py reads the source, and is imported only then


def last_words(*error):
    """Ctrl-C, while torch is imported, too, and a full memory in one line."""
    from usage import tell_end
    tell_end(*error)


def answer_help(script, argv=None, task_class='TrainSettings', task=''):
    """If argv asks for help: print what a script and its task take, and exit."""
    sys.excepthook = last_words
    argv = sys.argv[1:] if argv is None else argv
    if HELP & set(argv):
        from usage import show
        show(script, task_class, task, lambda default: find_task(argv, default))
        raise SystemExit(0)
