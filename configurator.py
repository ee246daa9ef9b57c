"""Settings are a script's own globals; config files and flags change them, from left to right.

    lr = 6e-4                       # train.py: plain names, and dataclasses for model parts
    vit = ViTConfig()
    config = configure(globals())   # flat dict {'lr': 6e-4, 'vit.depth': 12, ...}, to be saved as config.json

    python train.py config/gemma_2b.py out/run/config.json --lr=3e-5 --vit.depth=12
    python train.py --help

A config `.py` is plain Python over the current settings (`vit.depth = 27`, `lr = lr * 2`; helpers start with `_`), a
`.json` is a saved run. A setting has the type of its default; int -> float and list <-> tuple are converted, anything
else is refused with one line on stderr and exit code 2.
"""

import ast
import copy
import dataclasses
import difflib
import inspect
import io
import json
import os
import re
import sys
import tokenize
import traceback
from pathlib import Path
from types import SimpleNamespace as Group  # what stands for a dataclass while a config file runs

TYPES = (bool, int, float, str, tuple, list, dict)  # bool first: it is an int too
HOME = Path(__file__).resolve().parent


def configure(settings, argv=None, partial=False):
    """Apply files and flags to `settings`, a script's globals(), in place; return the flat config, ready for JSON.

    `partial=True` is for scripts that read another script's config: what they do not have is skipped in files.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    scope = {k: v for k, v in settings.items() if k[0] != '_' and (isinstance(v, TYPES) or is_instance(v))}
    defaults = flatten({name: group(name, value, {}) for name, value in scope.items()})
    for key, value in defaults.items():
        assert isinstance(value, TYPES), f'{key} = {value!r}: a setting is one of {[t.__name__ for t in TYPES]}'
    if '--help' in argv or '-h' in argv:
        show_help(settings, scope, defaults)
        raise SystemExit(0)
    flat = {key: convert(f'the default {key}={value!r}', value, value) for key, value in defaults.items()}
    for i, arg in enumerate(argv):
        key, equals, text = arg.partition('=')
        flag = arg.startswith('--') and equals
        if flag:
            found = {key[2:]: parse(text, defaults.get(key[2:]))}
        elif arg.startswith('-'):
            value = argv[i + 1] if argv[i + 1 :] and not argv[i + 1].startswith('--') else 'VALUE'
            refuse(f'{arg} is not of the form --key=value: write --{key.lstrip("-")}={text if equals else value}')
        elif arg.endswith(('.py', '.json')):
            path = find(arg)
            found = run_python(path, scope, flat, partial) if arg.endswith('.py') else read_json(path)
        else:
            refuse(f'unexpected {arg!r}: write {"--" + arg if equals else "--key=value, or a .py or .json file"}')
        for key, value in found.items():
            label = arg if flag else f'{key}={value!r:.60} in {arg}'
            if key in flat:
                flat[key] = convert(label, value, defaults[key])
            elif parts := [k for k in flat if k.startswith(key + '.')]:
                refuse(f'{label}: {key} is a group of settings, set its parts, such as {parts[0]}')
            elif flag or not partial:
                tip = 'start the names of helpers with _' if arg.endswith('.py') else '--help lists all'
                refuse(f'unknown setting {label}: did you mean {nearest(key, flat, 0.0)}? ({tip})')
    settings.update({name: rebuild(name, value, flat) for name, value in scope.items()})
    return {key: plain(value) for key, value in flat.items()}


def refuse(message):
    """One line on stderr, exit code 2."""
    print('configurator:', ' '.join(message.split()), file=sys.stderr)
    raise SystemExit(2) from None


def nearest(name, keys, cutoff):
    """The key most like `name`, by its whole or by its last part (depth: vit.depth); '' below the cutoff."""
    names = {key.rpartition('.')[2]: key for key in reversed(keys)} | {key: key for key in keys}
    match = difflib.get_close_matches(name.lower(), names, 1, cutoff)
    return names[match[0]] if match else ''


# Values


def parse(text, default):
    """The value of a flag; a string setting takes the text as it is, less its quotes."""
    if isinstance(default, str) and (len(text) < 2 or text[0] not in '\'"' or text[0] != text[-1]):
        return text
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    if isinstance(default, float) and text.lower().lstrip('+-') in ('inf', 'nan'):
        return float(text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return text if isinstance(default, str) and not isinstance(value, str) else value


def convert(label, value, default):
    """`value` in the type of `default`; `label` opens the refusal."""
    kind, got = (next((t for t in TYPES if isinstance(v, t)), type(v)) for v in (default, value))
    if kind is float and got is int and abs(value) <= sys.float_info.max:
        value, got = float(value), float
    elif {kind, got} == {list, tuple}:
        value, got = kind(value), kind
    if got is not kind or value != value:  # nan is not equal to itself
        hint = ': write true or false' if kind is bool else ''
        if kind is int and got is float and value.is_integer():
            hint = f': write {int(value)}'
        name = 'nan' if got is kind else got.__name__
        refuse(f'{label}: expected {kind.__name__} like {default!r:.60}, got {name}{hint}')
    try:  # what config.json cannot give back would change the run that is started from it
        text = json.dumps(value)
        assert json.loads(text, parse_constant=float) == plain(value)
    except (TypeError, ValueError, AssertionError):
        refuse(f'{label}: JSON cannot hold it: use numbers but nan, strings, lists, and dicts with string keys')
    return default if text == json.dumps(default) else kind(plain(value))


def plain(value):
    """`value` as JSON gives it back: with lists for tuples."""
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


# Dataclasses: {'vit': ViTConfig(depth=12)}, as groups {'vit': Group(depth=12)}, flat {'vit.depth': 12}


def is_instance(value):
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields(value):
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}


def group(key, value, flat):
    """A copy of a setting with the values of the flat config, a Group where it is a dataclass."""
    if not is_instance(value):
        return copy.deepcopy(flat.get(key, value))
    return Group(**{k: group(f'{key}.{k}', v, flat) for k, v in fields(value).items()})


def flatten(groups, prefix=''):
    flat = {}
    for name, value in groups.items():
        flat |= flatten(vars(value), f'{prefix}{name}.') if isinstance(value, Group) else {prefix + name: value}
    return flat


def rebuild(key, value, flat):
    """A setting's value from the flat config: always a new instance, so that frozen ones work and are checked again."""
    if not is_instance(value):
        return flat[key]
    try:
        return dataclasses.replace(value, **{k: rebuild(f'{key}.{k}', v, flat) for k, v in fields(value).items()})
    except (ValueError, AssertionError) as error:  # from __post_init__
        refuse(f'{key}: {error!r}')


# Files


def find(arg):
    """The path of a config file: from the current folder, else from the folder of this file."""
    near = []
    for root in (Path(), HOME):
        if (root / arg).is_file():
            return root / arg
        folder = (root / arg).parent
        paths = [*root.glob('config/**/*.py'), *folder.glob('*.py'), *folder.glob('*.json')]
        paths += [p for sibling in folder.parent.glob('*') if (p := sibling / Path(arg).name).is_file()]
        paths = [p for p in paths if p.resolve().parent != HOME]  # those are scripts
        near += [str(p) if os.path.isabs(arg) else os.path.relpath(p, root) for p in paths]
    match = difflib.get_close_matches(arg, near, 1, 0.0)
    refuse(f'no config file {arg}: ' + (f'did you mean {match[0]}?' if match else 'and none near it'))


def read_json(path):
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else refuse(f'{path}:1: expected {{"key": value}}, as in config.json')
    except (ValueError, OSError, RecursionError) as error:
        refuse(f'{path}:{getattr(error, "lineno", 1)}: {type(error).__name__}: {error}')


def run_python(path, scope, flat, partial):
    """Run a config file over a copy of the settings; the flat settings, and unknown names, that it ends with."""
    given = {name: group(name, value, flat) for name, value in scope.items()}
    names, assigned = {**given, '__file__': str(path)}, set()
    try:
        for statement in ast.parse(path.read_bytes(), str(path)).body:
            nodes = list(ast.walk(statement))
            targets = roots(n for n in nodes if isinstance(getattr(n, 'ctx', None), ast.Store))
            assigned |= targets
            try:
                exec(compile(ast.Module([statement], []), str(path), 'exec', dont_inherit=True), names)
            except (NameError, AttributeError):
                # Skip what is about another script's settings, but not where one of ours depends on it.
                objects = roots(n.func for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute))
                if not partial or given.keys() & (targets | objects):
                    raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if getattr(error, 'filename', None) == str(path) else (lines or [1])[-1]
        near = isinstance(error, (NameError, AttributeError)) and nearest(str(error.name), flat, 0.6)
        hint = f': did you mean {near}?' if near else ''
        hint += ' (if it is a setting of another script: pass the saved config.json of the run)' if partial else ''
        refuse(f'{path}:{line}: {type(error).__name__}: {error}{hint}')
    for name in given.keys() - assigned:
        if names.get(name) is not given[name]:
            refuse(f'{path}: {name} is a setting, but an import, def or class takes it: assign it or use _{name}')
    # Imports, functions and classes are no settings.
    unknown = {k for k in assigned & names.keys() - given.keys() if k[0] != '_' and not callable(names[k])}
    return flatten({k: v for k, v in names.items() if k in given or k in unknown and not inspect.ismodule(v)})


def roots(nodes):
    """The names at the start of expressions: {'a'} for a, a.b and a[i].c."""
    return {re.match(r'\W*(\w*)', ast.unparse(node))[1] for node in nodes}


# --help


def show_help(settings, scope, defaults):
    """Print the script's docstring, then every setting, its default and the comment on its line."""
    notes = {}
    if os.path.isfile(settings.get('__file__') or ''):
        with tokenize.open(settings['__file__']) as file:
            notes = comments(file.read(), '')
    for name, value in scope.items():
        notes |= field_comments(name, value)
    print(inspect.cleandoc(settings.get('__doc__') or ''), end='\n\n')
    for key, value in defaults.items():
        print(f'{f"--{key}={value!r}":40} {notes.get(key, "")}'.rstrip())


def field_comments(key, value):
    notes = {}
    for cls in [c for c in reversed(type(value).__mro__) if is_instance(value) and dataclasses.is_dataclass(c)]:
        try:
            notes |= {f'{key}.{name}': text for name, text in comments(inspect.getsource(cls), r'\s+').items()}
        except (OSError, TypeError):  # a class typed into a shell has no source
            pass
    for name, part in fields(value).items() if is_instance(value) else ():
        notes |= field_comments(f'{key}.{name}', part)
    return notes


def comments(source, indent):
    """{name: comment} of the lines `name = ...  # comment` and `name: type = ...  # comment`; the first one counts."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    lines = [(re.match(indent + r'(\w+)\s*(:|=[^=])', t.line), t.string) for t in tokens]
    return {match[1]: text for match, text in reversed(lines) if match}
