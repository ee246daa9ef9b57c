"""Air: a line says one thing (the bounds over all files that are no test)."""
import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
# in a hundred lines that are not blank, over all files together
MOST_CONDITIONALS, MOST_COMPREHENSIONS, LEAST_COMMENTS = 2.5, 5, 10
WIDTH, FUNCTION_LINES, FILE_LINES = 99, 60, 800
# experiments are settings: a long mix or a table of what was tried may be as wide as it is
SETTINGS = 'config'


def sources():
    """The Python files of the project that are no tests, in a checkout or a copy of one."""
    listed = subprocess.run(['git', 'ls-files', '*.py'], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split()
    if listed.returncode:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob('*.py')]
    others = 'tests/', '.venv/', f'{SETTINGS}/'
    return [ROOT / name for name in names
            if not name.startswith(others) and (ROOT / name).exists()]


def lines_of(path):
    return path.read_text(encoding='utf-8').splitlines()


def nodes_of(path, kinds):
    """[(place, node)] of these kinds of nodes in a file."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    return [(f'{path.relative_to(ROOT)}:{node.lineno}', node) for node in ast.walk(tree)
            if isinstance(node, kinds)]


def all_nodes(kinds):
    return [found for path in sources() for found in nodes_of(path, kinds)]


def is_truth(node):
    """Is it a comparison, a negation or alike?"""
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, ast.Call):
        return getattr(node.func, 'id', '') == 'bool'
    return isinstance(node, ast.Compare | ast.BoolOp)


def worst(count):
    """The files in which most of something is, for the one who has to mend it."""
    rows = sorted(((count(path), path) for path in sources()), key=lambda row: row[0])[::-1]
    return [f'{path.relative_to(ROOT)}: {number}' for number, path in rows[:8]]


@pytest.fixture(scope='module')
def code_lines():
    """Lines that are not blank."""
    return sum(len([line for line in lines_of(path) if line.strip()]) for path in sources())


def test_few_conditional_expressions(code_lines):
    found = all_nodes(ast.IfExp)
    assert 100 * len(found) / code_lines <= MOST_CONDITIONALS, worst(
        lambda path: len(nodes_of(path, ast.IfExp)))


def test_no_conditional_expression_inside_another():
    nested = [place for place, node in all_nodes(ast.IfExp)
              if sum(isinstance(inside, ast.IfExp) for inside in ast.walk(node)) > 1]
    assert not nested, nested


def test_no_expression_stands_for_an_if():
    statements = [place for place, node in all_nodes(ast.Expr)
                  if isinstance(node.value, ast.IfExp | ast.BoolOp)]
    assert not statements, statements


def test_no_truth_value_is_a_factor():
    factors = [place for place, node in all_nodes(ast.BinOp)
               if isinstance(node.op, ast.Mult) and (is_truth(node.left) or is_truth(node.right))]
    assert not factors, factors


def test_few_comprehensions(code_lines):
    found = all_nodes(COMPREHENSIONS)
    assert 100 * len(found) / code_lines <= MOST_COMPREHENSIONS, worst(
        lambda path: len(nodes_of(path, COMPREHENSIONS)))
    long = [place for place, node in found if len(node.generators) > 2]
    assert not long, long


def test_comments(code_lines):
    def comments(path):
        lines = lines_of(path)
        return len([line for line in lines if line.strip().startswith('#') or '  # ' in line])

    total = sum(comments(path) for path in sources())
    few = [f'{path.relative_to(ROOT)}: {comments(path)} in {len(lines_of(path))} lines'
           for path in sources() if 100 * comments(path) < 5 * len(lines_of(path))]
    assert 100 * total / code_lines >= LEAST_COMMENTS, few


def test_no_line_is_wide():
    wide = [f'{path.relative_to(ROOT)}:{number}' for path in sources()
            for number, line in enumerate(lines_of(path), 1) if len(line) > WIDTH]
    assert not wide, wide


def test_no_function_and_no_file_is_long():
    long = []
    for place, node in all_nodes(ast.FunctionDef | ast.AsyncFunctionDef):
        if node.end_lineno - node.lineno >= FUNCTION_LINES:
            long.append(f'{place}, {node.name}: {node.end_lineno - node.lineno + 1} lines')
    files = [f'{path.relative_to(ROOT)}: {len(lines_of(path))} lines' for path in sources()
             if len(lines_of(path)) > FILE_LINES]
    assert not long + files, long + files
