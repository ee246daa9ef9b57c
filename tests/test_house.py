"""The house (design, section 1): what a plain run imports, no import circles, no task named in the
files that all tasks share."""
import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import tiny

ROOT = tiny.ROOT
MAX_FILES, MAX_LINES = 14, 4800
# what a language model trained on local text has no use for
ELSEWHERE = ('robots/', 'images/', 'families/', 'serve/', 'pictures.py', 'diffusion.py',
             'remote.py', 'mirror.py', 'hub.py', 'initial.py', 'parts.py', 'chat.py',
             'template.py', 'usage.py', 'npy.py', 'show_steps.py', 'answering.py', 'generate.py',
             'tars.py', 'unread.py', 'leftovers.py', 'wandb_log.py', 'keyed.py', 'stem.py',
             'lora.py')
# runs the command line that follows, and says which of our files it has imported
WATCH = '''
import atexit, json, runpy, sys
root, report, *sys.argv = sys.argv[1:]
sys.path[0] = root

def write_report():
    paths = [getattr(module, '__file__', None) or '' for module in sys.modules.values()]
    ours = [path.removeprefix(root + '/') for path in {*paths, sys.argv[0]}
            if path.startswith(root + '/') and '/.venv/' not in path]
    with open(report, 'w') as f:
        json.dump(sorted(ours), f)

atexit.register(write_report)
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def git_files():
    """Our .py files, those of tests and benchmarks left out."""
    said = subprocess.run(['git', 'ls-files', '*.py'], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout.split()
    return [path for path in said if not path.startswith(('tests/', 'bench/'))]


# -----------------------------------------------------------------------------------------------
# what a run imports


def imported_by(tmp_path, *args):
    """Our files that a run of train.py with these arguments imports."""
    (tmp_path / 'watch.py').write_text(WATCH)
    report = tmp_path / 'report.json'
    command = [sys.executable, tmp_path / 'watch.py', ROOT, report, ROOT / 'train.py', *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                          env=tiny.os.environ | tiny.ENV)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text())


def sentencepiece_model(path):
    """A tokenizer such as config/llm_tiny.py has."""
    sentencepiece = pytest.importorskip('sentencepiece')
    with open(path, 'wb') as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(tiny.NAMES * 20), model_writer=model, vocab_size=40,
            hard_vocab_limit=False, minloglevel=2)


@pytest.mark.parametrize('kind', ['bytes', 'sentencepiece'])
def test_a_language_model_imports_little(tmp_path, kind):
    tokenizer = 'bytes'
    if kind == 'sentencepiece':
        tokenizer = tmp_path / 'tokenizer.model'
        sentencepiece_model(tokenizer)
    flags = [flag for flag in tiny.FLAGS
             if not flag.startswith(('--vit', '--augment', '--tokenizer'))]
    ours = imported_by(tmp_path, '--task=llm', *flags, f'--tokenizer={tokenizer}', '--max_steps=2',
                       f'--data_dir={tiny.data_dir()}', '--mix={"words": 1}',
                       '--val={"held": "words"}', f'--out_dir={tmp_path / "run"}')

    lines = {name: len((ROOT / name).read_text().splitlines()) for name in ours}
    said = f'{len(lines)} files, {sum(lines.values())} lines: {lines}'
    assert 'train.py' in lines and 'tasks/llm.py' in lines, said
    assert len(lines) <= MAX_FILES and sum(lines.values()) <= MAX_LINES, said
    assert not [name for name in lines if name.startswith(ELSEWHERE)], said


# -----------------------------------------------------------------------------------------------
# imports run one way


def file_of(module):
    """The file of ours that a dotted name is of; '' where it is none."""
    path = module.replace('.', '/')
    for candidate in (f'{path}.py', f'{path}/__init__.py'):
        if (ROOT / candidate).is_file():
            return candidate
    return ''


def imports_of(path):
    """Our files that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {file_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}, line {node.lineno}: a relative import'
            # of `from robots import actions` the second is a file
            found.add(file_of(node.module))
            found |= {file_of(f'{node.module}.{alias.name}') for alias in node.names}
    return found - {''}


def circles(graph):
    """Circles of a graph {name: names}, as lists of names."""
    found, done = [], set()

    def visit(name, path):
        if name in path:
            found.append([*path[path.index(name):], name])
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def test_circles_are_found():
    assert circles({'a': {'b'}, 'b': {'c'}, 'c': set()}) == []
    assert circles({'a': {'b'}, 'b': {'c'}, 'c': {'b'}}) == [['b', 'c', 'b']]
    assert circles({'a': {'a'}}) == [['a', 'a']]


def test_imports_run_one_way():
    graph = {path: imports_of(path) for path in git_files()}
    # that the walk sees what stands inside functions, and files of folders without __init__.py
    assert 'usage.py' in graph['configurator.py'] and 'shards.py' in graph['data.py']
    assert 'robots/samples.py' in graph['tasks/vla.py']
    assert circles(graph) == []


# -----------------------------------------------------------------------------------------------
# tasks are not named where all tasks are served


def names_compared(path, names):
    """Lines of a file in which one of `names` is compared with something."""
    lines = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        patterns = []
        if isinstance(node, ast.Compare):
            patterns = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            patterns = [node.pattern]
        constants = [inner for pattern in patterns for inner in ast.walk(pattern)
                     if isinstance(inner, ast.Constant)]
        lines += [inner.lineno for inner in constants if inner.value in names]
    return lines


@pytest.mark.parametrize('name', ['train', 'sample', 'checkpoint', 'data', 'processor', 'hub'])
def test_no_task_is_named(name):
    tasks = {path.stem for path in Path(ROOT / 'tasks').glob('*.py')} - {'__init__'}
    assert {'llm', 'vla'} <= tasks
    assert names_compared(f'{name}.py', tasks | {'unet', 'dit'}) == []


# -----------------------------------------------------------------------------------------------
# names that others rely on


NAMES = {
    'configurator': ['configure'],
    'data': ['Order'],
    'model': ['attention', 'make_attn_mask', 'generate', 'ViT', 'VLM', 'Decoder'],
    'hub': ['from_pretrained', 'export'],
    'diffusion': ['Schedule', 'FlowSchedule'],
}


@pytest.mark.parametrize('file', NAMES)
def test_names_that_others_rely_on(file):
    if not (ROOT / f'{file}.py').exists():
        pytest.skip(f'{file}.py was deleted')
    module = importlib.import_module(file)
    assert [name for name in NAMES[file] if not callable(getattr(module, name, None))] == []


def test_no_test_is_left_out_where_nothing_is_deleted():
    """conftest.py leaves out what needs a deleted room: a room that is there hides no test."""
    rooms = [path for path in git_files() if '/' in path or path == 'diffusion.py']
    if not all((ROOT / path).exists() for path in rooms):
        pytest.skip('some rooms were deleted')
    assert conftest.collect_ignore == []
