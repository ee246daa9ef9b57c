"""Settings as their source has them, for --help and for refusals: nothing is imported or run.

Of a script the assignments before it calls configure(), of a task those in the body of a class:
each with its default and its whole comment, in sections.
"""
import ast
import io
import os
import re
import shutil
import signal
import textwrap
import tokenize
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace as Group

HOME = Path(__file__).resolve().parent
Setting = namedtuple('Setting', 'name default comment section')  # as text, from its source


def settings_in(path, class_name):
    """{flat name: Setting} of a class in a file, its dataclasses included; {}: no such class."""
    found = find_class(class_name, read_source(path))
    if not found:
        return {}
    cls, source = found  # a file may import it
    return settings_of(cls.body, source, {})


def read_source(path):
    text = Path(path).read_text(encoding='utf-8')
    return Group(tree=ast.parse(text), lines=text.split('\n'))


def find_class(name, source):
    """(class, its source): there, or in the file here that it is imported from; or None."""
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, source
        if isinstance(node, ast.ImportFrom):  # not what `import model` has: model.ViTConfig
            path = HOME / f'{(node.module or "").replace(".", "/")}.py'
            for alias in node.names:
                if name == (alias.asname or alias.name) and path.is_file():
                    return find_class(alias.name, read_source(path))
    return None


def settings_of(body, source, given, prefix='', title=''):
    """{flat name: Setting} of assignments; given: {name: (value, source)} instead of theirs."""
    found, section = {}, title
    for node in body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        name = ast.unparse(getattr(node, 'target', None) or node.targets[0])
        value, home = given.get(name, (node.value, source))
        value = default_of(value)
        is_name = re.fullmatch(r'[a-z]\w*', name)  # not _private, CONSTANT, a.b
        if not is_name or value is None or ast.unparse(value) == 'None':
            continue
        above, comment = notes(node, source.lines)
        section = title or above or section
        key = prefix + name

        # A dataclass is a section: its fields, with the values that the call gives them.
        cls = isinstance(value, ast.Call) and find_class(ast.unparse(value.func), home)
        if cls:
            own = [field for field in cls[0].body if isinstance(field, ast.AnnAssign)]
            arguments = {}
            for field, argument in zip(own, value.args):
                arguments[field.target.id] = argument, home
            for keyword in value.keywords:
                arguments[keyword.arg] = keyword.value, home
            group = title or f'{key}: {comment}'.rstrip(': ')
            found |= settings_of(own, cls[1], arguments, f'{key}.', group)
        else:
            found[key] = Setting(key, text_of(value, home.lines), comment, section)
    return found


def default_of(value):
    """What makes a field's default: Rope() for field(default_factory=Rope); None: nothing does."""
    if not isinstance(value, ast.Call) or not ast.unparse(value.func).endswith('field'):
        return value
    options = {keyword.arg: keyword.value for keyword in value.keywords}
    factory = options.get('default_factory')
    if 'init' in options:  # no one may set it
        return None
    if isinstance(factory, ast.Lambda):  # lambda: [1, 2]
        return factory.body
    return ast.Call(factory, [], []) if factory else options.get('default')


def text_of(value, lines):
    """A value as its source has it, in one line."""
    if getattr(value, 'lineno', 0) == getattr(value, 'end_lineno', 1):
        line = lines[value.lineno - 1].encode()  # ast counts bytes
        return line[value.col_offset : value.end_col_offset].decode()
    text = ast.unparse(value)
    return {'list()': '[]', 'dict()': '{}'}.get(text, text)


def notes(node, lines):
    """(title, comment) of an assignment: the lines that stand alone above it, those beside it."""
    start, end, indent = node.lineno - 1, node.end_lineno, ' ' * node.col_offset
    while start and re.match(rf'{indent}# ?[^\s-]', lines[start - 1]):
        start -= 1
    title = ' '.join(line.strip(' #') for line in lines[start : node.lineno - 1])

    # A comment goes on in the lines below that are further in, before their # or behind it.
    while end < len(lines) and re.match(rf'{indent}(\s+#|#\s\s)', lines[end]):
        end += 1
    code = io.StringIO('\n'.join(lines[node.lineno - 1 : end]))
    tokens = tokenize.generate_tokens(code.readline)
    return title, ' '.join(t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT)


def before_configure(body):
    """The statements before the call of configure(), also in an `if __name__ == '__main__'`."""
    for place, node in enumerate(body):
        for inner in ast.walk(node):
            if isinstance(inner, ast.Call) and getattr(inner.func, 'id', '') == 'configure':
                return body[:place] + before_configure(getattr(node, 'body', []))
    return body


def show(script, task_class, task, choose_task):
    """Print what a script and its task take. task: if '', the script's own, if it has one, as the
    command line leaves it: choose_task(default)."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # ... | head ends in silence

    # What stands in the script itself.
    source = read_source(script)
    own = settings_of(before_configure(source.tree.body), source, {})
    print(ast.get_docstring(source.tree) or '')
    print_settings(own.values())

    # What the task adds, if there is one.
    if 'task' in own and not task:
        task = ast.literal_eval(own['task'].default)
        try:
            task = choose_task(task)
        except SystemExit:  # it has said why; the default task has settings, too
            pass
    if not task:
        return
    path = Path(os.path.expanduser(task))
    if path.suffix != '.py':
        path = HOME / 'tasks' / f'{task}.py'
    print(f'\nsettings of task={task}')
    if path.is_file():
        print_settings(settings_in(path, task_class).values())
    else:
        print(f'there is no {path}')


def print_settings(settings):
    """Each on a line, as a flag with its default, and its comment beside it; in sections."""
    sections = {}
    for setting in settings:
        sections.setdefault(setting.section, []).append(setting)
    width = max(80, shutil.get_terminal_size((100, 24)).columns) - 41
    for section, members in sections.items():
        print()
        if section:
            print(section)
        for name, default, comment, _ in members:
            flag, text = f'--{name}={default}', comment and f'# {comment}'
            lines = textwrap.wrap(text, width, subsequent_indent='  ', break_on_hyphens=False)
            # A long flag has a line of its own.
            if len(flag) > 40 or not lines:
                lines.insert(0, '')
            for line in lines:
                print(f'{flag:40} {line}'.rstrip())
                flag = ''
