"""Settings as their source has them, for --help; what was meant by one that does not exist.

Nothing is imported or run.

Of a script the assignments before it calls configure(), of a task those in the body of a class:
each with its default and its whole comment, in sections.
"""
import ast
import contextlib
import difflib
import errno
import glob
import io
import os
import re
import shutil
import signal
import sys
import textwrap
import tokenize
import traceback
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
    settings = {}
    for base in cls.bases:
        parent = parent_of(base, source)
        if parent:
            settings |= settings_of(parent[0].body, parent[1], {})
    return settings | settings_of(cls.body, source, {})


def parent_of(base, source):
    """(class, its source) of one that another inherits from: `TrainSettings`, or
    `vlm.TrainSettings` after `from tasks import vlm`; or None."""
    if isinstance(base, ast.Name):
        return find_class(base.id, source)
    for node in source.tree.body:
        if isinstance(node, ast.ImportFrom) and isinstance(base, ast.Attribute):
            for alias in node.names:
                path = HOME / node.module.replace('.', '/') / f'{alias.name}.py'
                if ast.unparse(base.value) == (alias.asname or alias.name) and path.is_file():
                    return find_class(base.attr, read_source(path))
    return None


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


def only_here(setting):
    """The setting, without tasks in its comment whose files were deleted."""
    if setting.name != 'task':
        return setting
    tasks, comma, rest = setting.comment.partition(',')
    here = [task for task in tasks.split(' | ') if (HOME / 'tasks' / f'{task}.py').is_file()]
    return setting._replace(comment=' | '.join(here) + comma + rest)


def print_settings(settings):
    """Each on a line, as a flag with its default, and its comment beside it; in sections."""
    sections = {}
    for setting in settings:
        sections.setdefault(setting.section, []).append(setting)
    width = max(80, shutil.get_terminal_size((100, 24)).columns) - 41
    for section, members in sections.items():
        members = [only_here(setting) for setting in members]
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


def show_parameters(groups, parameters, say):
    """Print what `describe` tells, and exit."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # ... | head ends in silence
    say('\n'.join(describe(groups, parameters)))
    sys.exit(0)


def describe(groups, parameters):
    """Lines of {name: parameter}: name, shape, its rule, the rule's options, trained or frozen."""
    from optim import match
    rows = []
    for name, options in match(groups, parameters).items():
        parameter = parameters[name]
        regex = next(regex for regex, _ in groups if re.search(regex, name))
        shape = ' x '.join(map(str, parameter.shape)) or 'scalar'
        said = ', '.join(f'{option}={value}' for option, value in options.items()) or '-'

        # A model freezes some of its own, as the autoencoder of latents.
        is_frozen = options.get('freeze') or not parameter.requires_grad
        state = 'frozen' if is_frozen else 'trained'
        rows.append((name, shape, repr(regex), said, state))

    # Each column as wide as the widest of it.
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        lines.append('  '.join(map(str.ljust, row, widths)).rstrip())
    return lines


# Code that a saved run names

NAME_CODE = 'task', 'processor'


def code_in(settings):
    """The settings that name a file of Python, as texts; those of a mix's data sets, too."""
    found = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found += code_in(value)
        elif key.rpartition('.')[2] in NAME_CODE and re.search(r'\.py(:|$)', str(value)):
            found.append(f'{key}={value!r}')
    return found


def code_problem(settings, where):
    """What to say of a saved run that names code, which would do all that its user may; or ''."""
    found = code_in(settings)
    if not found:
        return ''
    return f'{where} names code, {", ".join(found)}: if you trust it, add --allow_code=true'


# What is set and not used, or named twice, or nothing can be learned from


def unused(settings, known, keys, because):
    """A line, in a list, on settings that somebody has set and this command does not read. known:
    {key: default}, as config.json has it; keys: their names, or beginnings of them that end in a
    dot; because: what makes it so."""
    groups, found = tuple(key for key in keys if key.endswith('.')), []
    for key, default in known.items():
        # a config.json holds all of them, as they are where nobody sets them
        is_one = key in keys or key.startswith(groups)
        if is_one and settings[key] != default:
            found.append(f'{key}={settings[key]!r}')
    return [f'not used, for {because}: {", ".join(found)}'] if found else []


def refuse_unused(settings, known, keys, because):
    """Raises ValueError with the line of `unused`."""
    for line in unused(settings, known, keys, because):
        raise ValueError(f'{line}; leave it out')


def check_each_once(folders):
    """Raises ValueError where two names {name: Folder} are one data set, which would be gone
    through twice, each time in another order."""
    known = {}
    for name, folder in folders.items():
        first = os.path.realpath(folder.shard_path(0)), len(folder.sizes)
        if known.setdefault(first, name) != name:
            raise ValueError(f'mix: {known[first]!r} and {name!r} are one data set: give it one '
                             'weight')


def nothing_to_learn(keys):
    """Why a sample of these keys, without an answer, is a bad one."""
    if {'text', 'suffix'} & set(keys):
        return 'its text is empty'
    if 'messages' in keys:
        return 'it has messages, which are read by processor=chat and others of its kind'
    return (f'it has {", ".join(keys) or "no keys"}: nothing to answer; known are text, prefix '
            'and suffix, messages, instruction')


SAID = set()                    # by this process


def say_once(kind, line):
    """Print to stderr what would be said of every sample of a kind."""
    if kind not in SAID:
        SAID.add(kind)
        print(f'\n{line} (said once)', file=sys.stderr, flush=True)


# How a script ends that did not expect it


FLOAT32 = 3.4e38                # the largest number that it has


def too_large(trace):
    """The settings, of the script that a traceback comes from, that float32 can not hold."""
    found = []
    for frame, _ in traceback.walk_tb(trace):
        settings = frame.f_globals.get('config')
        if isinstance(settings, dict):
            for key, value in settings.items():
                if isinstance(value, float) and abs(value) > FLOAT32:
                    found.append(f'{key}={value}')
    return ', '.join(dict.fromkeys(found)) or 'a setting'


def tell_end(kind, error, trace):
    """Ctrl-C, more memory than there is, and what says so of itself, in one line; other errors as
    Python does."""
    said, script = ' '.join(str(error).split()), os.path.basename(sys.argv[0])
    # \r: over a progress bar, which has no end of its own
    is_full = re.search(r"out of memory|can't allocate memory|not enough memory|array is too big|"
                        'Storage size calculation overflowed|Maximum allowed dimension', said)
    if kind is KeyboardInterrupt:
        print(f'{script}: stopped by Ctrl-C', file=sys.stderr)
    elif issubclass(kind, MemoryError) or is_full:
        print(f'\r{script}: the memory is full: take a smaller micro_batch_size, seq_len or model '
              f'({said:.200})', file=sys.stderr)
    elif getattr(kind, 'in_one_line', False):
        print(f'{script}: {said}', file=sys.stderr)
    elif 'without overflow' in said:
        print(f'\r{script}: {too_large(trace)}: float32 has no such number', file=sys.stderr)
    elif re.search(r'DataLoader worker .* (is killed by|exited unexpectedly)', said):
        print(f'\r{script}: a process that reads data was killed, by a full memory perhaps: take '
              f'fewer workers; the same command goes on ({said:.200})', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


@contextlib.contextmanager
def printing():
    """Raises OSError that says so where what is printed inside can not be written."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename:
            raise
        # else it is tried again when the script ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f'standard output can not be written: {error.strerror}') from None


# What may have been meant, for refusals

OTHER_NAMES = dict(  # ours = what other trainers call it
    lr='learning_rate', schedule='lr_scheduler_type lr_schedule', weight_decay='wd',
    warmup='warmup_steps warmup_ratio warmup_iters', grad_clip='max_grad_norm clip_grad',
    micro_batch_size='gradient_accumulation_steps per_device_train_batch_size device_batch_size',
    batch_size='batch', max_steps='max_iters total_steps num_steps', dtype='bf16 fp16 precision',
    epochs='num_epochs num_train_epochs', mix='dataset train_data', seed='random_seed',
    workers='num_workers', out_dir='output_dir', num_checkpoints='save_steps save_every',
    log_every='logging_steps log_interval', eval_every='eval_interval eval_steps',
    resume='resume_from_checkpoint',
)  # fmt: skip


def unknown_key(key, label, flat, may_skip, elsewhere):
    """What to say of a key that is no setting; '' where it may be another script's."""
    parts = [known for known in flat if known.startswith(f'{key}.')]
    if parts:
        return f'{label}: {key} is a group of settings, set its parts, such as {parts[0]}'
    if may_skip:
        return ''
    owner = owner_of(key, flat, elsewhere)
    if owner:
        return f'unknown setting {label}: {owner}'
    tip = 'start the names of helpers with _' if label.endswith('.py') else '--help lists all'
    return f'unknown setting {label}: did you mean {nearest(key, flat, 0.0)}? ({tip})'


def fault_in_file(path, error, flat, partial=False, elsewhere=None):
    """Where in a config file an error was, and what may have been meant."""
    # The last line that was run, or the one that could not be read.
    line = 1
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            line = frame.lineno
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line = error.lineno
    message = f'{path}:{line}: {type(error).__name__}: {error}'

    # Python says `dit` where the file has `dit.depth`.
    if isinstance(error, (NameError, AttributeError)):
        name, text = str(error.name), path.read_text().split('\n')[line - 1]
        key = re.search(rf'\b{name}(\.\w+)*|$', text)[0]
        owner, near = owner_of(key, flat, elsewhere), nearest(name, flat, 0.6)
        if owner:
            message += f': {key} is {owner}'
        elif near:
            message += f': did you mean {near}?'
    if partial:
        message += ' (if it is a setting of another script: pass the saved config.json of the run)'
    return message


def owner_of(key, flat, elsewhere):
    """'a setting of task=t2i, this run is task=vlm'; '' where no other task has the key."""
    tasks = elsewhere(key) if elsewhere else []
    if not tasks:
        return ''
    owner = f'a setting of task={", task=".join(tasks)}'
    if 'task' in flat:
        owner += f', this run is task={flat["task"]}'
    return owner


def nearest(name, keys, cutoff):
    """The key that others call `name`, else the most like it, whole or its last part; or ''."""
    # Others' names first: max_iters looks more like max_samples than like max_steps.
    name = name.lower().replace('-', '_')
    for ours, theirs in OTHER_NAMES.items():
        if ours in keys and name in theirs.split():
            return ours

    # `depth` is near to vit.depth, the first that ends so, if no setting is called just that.
    names = dict(zip(keys, keys))
    for key in keys:
        names.setdefault(key.rpartition('.')[2], key)
    match = difflib.get_close_matches(name, names, 1, cutoff)
    if not match:
        return ''
    return names[match[0]]


def nearest_file(path):
    """'did you mean config/pali.py?', of a config file that is not there."""
    near = []
    for root in (Path(), HOME):
        # Near is what lies beside it, or has its name in a folder beside its own; but no script.
        folder = (root / path).parent
        paths = [*root.glob('config/**/*.py'), *folder.glob('*.py'), *folder.glob('*.json')]
        paths += [sibling / path.name for sibling in folder.parent.glob('*')]
        for other in paths:
            if not other.is_file() or other.resolve().parent == HOME:
                continue
            # as the one who asks has written it
            if path.is_absolute():
                near.append(str(other))
            else:
                near.append(os.path.relpath(other, root))

    # However little it looks like it.
    match = difflib.get_close_matches(str(path), near, 1, 0.0)
    return f'did you mean {match[0]}?' if match else 'and none near it'


def nearest_folder(path, data_dir):
    """The folder in data_dir, or one level down, that is most like `path`; '' without one."""
    # without data_dir there is no place that holds data sets alone
    if not data_dir:
        return ''
    folders = []
    for root in (data_dir, HOME / data_dir):
        folders += glob.glob('*/', root_dir=root) + glob.glob('*/*/', root_dir=root)
    near = difflib.get_close_matches(path.rstrip('/') + '/', sorted(folders), 1)
    return near[0].rstrip('/') if near else ''
