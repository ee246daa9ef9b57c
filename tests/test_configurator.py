"""configurator.py: every rule with a case that fails when it is broken."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))
from configurator import configure  # noqa: E402

SCRIPT = '''"""Trains a toy.

Second paragraph.
"""
from __future__ import annotations
import os, math
from dataclasses import dataclass, field
from configurator import configure

@dataclass(frozen=True)
class Rope:
    theta: float = 1e4  # base wavelength

@dataclass
class ViT:
    depth: int = 12                 # number of blocks
    width: "int" = 768
    rope: Rope = field(default_factory=Rope)
    scales: list = field(default_factory=lambda: [1, 2])

    def __post_init__(self):
        if self.width % 2:
            raise ValueError(f'width {self.width} is odd')

_private = 3
lr = 6e-4                       # peak learning rate
steps = 1000
name = 'a#b'                    # what the run is called
compile = True
betas = (0.9, 0.95)
layers = [1, 2]
mix = dict(emoji=1.0)           # data set -> sampling weight
empty = {}
limit = float('inf')
vit = ViT()

def helper(): pass

config = configure(globals(), partial=os.environ.get('PARTIAL') == '1')

if __name__ == '__main__':
    import json
    types = [type(betas).__name__, type(layers).__name__, type(lr).__name__]
    print(json.dumps(dict(config=config, types=types, betas=repr(betas), vit=repr(vit),
                          default=repr(ViT()))))
'''
DEFAULT = {
    'lr': 6e-4, 'steps': 1000, 'name': 'a#b', 'compile': True, 'betas': [0.9, 0.95],
    'layers': [1, 2],
    'mix': {'emoji': 1.0}, 'empty': {}, 'limit': float('inf'),
    'vit.depth': 12, 'vit.width': 768, 'vit.rope.theta': 1e4, 'vit.scales': [1, 2],
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Runs the script as a user does, from a folder that is not the script's."""
    (tmp_path / 'project').mkdir()
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'project/train.py').write_text(SCRIPT)
    for name in ('configurator.py', 'usage.py'):
        (tmp_path / 'project' / name).write_text((HOME / name).read_text())

    def call(*argv, partial=False, files=None):
        for path, text in (files or {}).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        env = {
            'PARTIAL': str(int(partial)),
            'PATH': '/usr/bin:/bin',
            'PYTHONDONTWRITEBYTECODE': '1',
        }
        command = [sys.executable, str(tmp_path / 'project/train.py'), *argv]
        return subprocess.run(
            command, cwd=tmp_path / 'elsewhere', env=env, capture_output=True, text=True
        )

    return call


def good(result):
    assert result.returncode == 0 and result.stderr == '', result.stderr
    return json.loads(result.stdout)


def bad(result, *words):
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert result.stdout == ''
    assert result.stderr.endswith('\n') and len(result.stderr.splitlines()) == 1, result.stderr
    for word in ('configurator: ', *words):
        assert word in result.stderr, (word, result.stderr)


def script(**more):
    """The globals of a small script, for what needs no process."""

    @dataclass(frozen=True)
    class Inner:
        theta: float = 1e4

    @dataclass(slots=True)
    class ViT:
        depth: int = 12
        inner: Inner = field(default_factory=Inner)
        sizes: tuple = (1, 2)
        area: int = field(init=False, default=0)

        def __post_init__(self):
            self.area = self.depth**2

    return dict(
        lr=6e-4,
        betas=(0.9, 0.95),
        layers=[1],
        name='x',
        mix={'a': 1.0},
        vit=ViT(),
        _hidden=1,
        **more,
    )


def value_of(flag, default):
    settings = {'x': default}
    flat = configure(settings, [f'--x={flag}'])
    return settings['x'], flat['x']


def refusal(capsys, settings, argv, *words, **kwargs):
    before = dict(settings)
    with pytest.raises(SystemExit) as stop:
        configure(settings, argv, **kwargs)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == '' and len(err.splitlines()) == 1, err
    for word in words:
        assert word in err, (word, err)
    assert settings == before  # nothing is half applied


# The flat config and the globals


def test_defaults_in_order_from_a_script(run):
    result = good(run())
    assert result['config'] == DEFAULT
    assert list(result['config']) == list(DEFAULT)
    assert result['types'] == ['tuple', 'list', 'float'] and result['betas'] == '(0.9, 0.95)'


def test_only_values_are_settings():
    flat = configure(script(json=json, Path=Path, function=good, nothing=None), [])
    assert list(flat) == [
        'lr',
        'betas',
        'layers',
        'name',
        'mix',
        'vit.depth',
        'vit.inner.theta',
        'vit.sizes',
    ]


def test_a_field_without_a_value_is_the_scripts_mistake():
    @dataclass
    class C:
        size: int = None

    with pytest.raises(AssertionError, match='c.size'):
        configure({'c': C()}, [])


def test_dataclasses_are_replaced_and_class_defaults_kept():
    settings = script()
    old, cls = settings['vit'], type(settings['vit'])
    flat = configure(settings, ['--vit.depth=3', '--vit.inner.theta=5', '--vit.sizes=[4]'])
    new = settings['vit']
    assert type(new) is cls and (new.depth, new.inner.theta, new.sizes, new.area) == (
        3,
        5.0,
        (4,),
        9,
    )
    assert (old.depth, cls().depth, cls().inner.theta) == (12, 12, 1e4)
    assert flat['vit.sizes'] == [4] and type(flat['vit.inner.theta']) is float


def test_checks_of_a_dataclass_run_on_the_final_values_only(run):
    bad(run('--vit.width=3'), 'vit', 'width 3 is odd')
    assert good(
        run('--vit.width=3', 'a.py', '--vit.width=4', files={'elsewhere/a.py': 'lr = 1.0'})
    )
    # the default list of a field is not shared with what a file does to it
    result = good(run('a.py', files={'elsewhere/a.py': "vit.scales.append(3); mix['noto'] = 2.0"}))
    assert result['config']['vit.scales'] == [1, 2, 3] and result['config']['mix'] == {
        'emoji': 1.0,
        'noto': 2.0,
    }
    assert 'scales=[1, 2])' in result['default']


# Values of flags


@pytest.mark.parametrize(
    'text, default, value',
    [
        ('3e-5', 1.0, 3e-5), ('3', 1.0, 3.0), ('-3', 1.0, -3.0), ('inf', 1.0, float('inf')),
        ('-Inf', 1.0, -float('inf')),
        ('7', 1, 7), ('1_000', 1, 1000),
        ('true', False, True), ('True', False, True), ('FALSE', True, False),
        ('1e5', 'x', '1e5'), ('None', 'x', 'None'), ('true', 'x', 'true'), ('', 'x', ''),
        ('a=b', 'x', 'a=b'),
        ("'a b'", 'x', 'a b'), ('"1"', 'x', '1'), ("'a','b'", 'x', "'a','b'"),
        ("it's", 'x', "it's"), ("'", 'x', "'"),
        ('[1,2]', (0,), (1, 2)), ('(1,2)', [0], [1, 2]), ('1,2', (0,), (1, 2)), ('()', (0,),
        ()), ("['a']", [0], ['a']),
        ("{'emoji/noto': 2}", {'a': 1.0}, {'emoji/noto': 2}), ('{}', {'a': 1.0}, {}),
        ("{'b': 1}", {}, {'b': 1}),
    ],
)  # fmt: skip
def test_flag_values(text, default, value):
    got, flat = value_of(text, default)
    assert got == value and type(got) is type(default)
    assert json.loads(json.dumps(flat)) == flat


@pytest.mark.parametrize(
    'text, default, words',
    [
        ('1e3', 1, ['expected int', 'got float', 'write 1000']),
        ('1.5', 1, ['expected int', 'got float']),
        ('true', 1, ['expected int', 'got bool']),
        ('1', True, ['expected bool', 'got int', 'true or false']),
        ('true', 1.0, ['expected float', 'got bool']), ('yes', True, ['expected bool', 'got str']),
        ('nan', 1.0, ['expected float', 'nan']), ('abc', 1.0, ['expected float', 'got str']),
        ('', 1.0, ['got str']),
        ('None', 1.0, ['expected float', 'NoneType']), ('inf', 1, ['expected int']),
        ('9' * 400, 1.0, ['expected float']),
        ('0.9', (0.9, 0.95), ['expected tuple', '(0.9, 0.95)']),
        ('{1}', [0], ['expected list', 'got set']),
        ('[1]', {}, ['expected dict', 'got list']), ('{1: 2}', {}, ['string keys']),
        ('[{1}]', [0], ['JSON']),
        ('[1e999, "a"', [0], ['expected list', 'got str']), ('(' * 5000, [0], ['expected list']),
    ],
)  # fmt: skip
def test_flag_values_of_a_wrong_type(capsys, text, default, words):
    refusal(capsys, {'x': default}, [f'--x={text}'], '--x=', *words)


def test_wrong_values_in_files(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, text in enumerate(
        ['lr = None', "lr = float('nan')", 'lr = "1"', 'lr = [1]', 'lr = True', 'lr = print']
    ):
        Path(f'c{i}.py').write_text(text)
        refusal(capsys, script(), [f'c{i}.py'], 'lr=', f'c{i}.py', 'expected float')
    Path('c.json').write_text('{"lr": NaN}')
    refusal(capsys, script(), ['c.json'], 'lr=nan', 'c.json', 'expected float')
    Path('d.json').write_text('{"layers": [NaN]}')
    refusal(capsys, script(), ['d.json'], 'layers=', 'd.json', 'nan')


# The command line


def test_left_to_right_last_wins(run):
    files = {'elsewhere/a.py': 'lr = 2.0\nsteps = 7', 'elsewhere/b.py': 'lr = lr * 2'}
    assert (
        good(run('--lr=5', 'a.py', 'b.py', '--steps=8', '--steps=9', files=files))['config']['lr']
        == 4.0
    )
    result = good(run('a.py', '--lr=5', 'b.py', '--steps=8', '--steps=9'))['config']
    assert (result['lr'], result['steps']) == (10.0, 9)


@pytest.mark.parametrize(
    'argv, words',
    [
        (['--lrr=3'], ['unknown setting --lrr=3', 'did you mean lr?']),
        (['--LR=3'], ['--LR=3', 'did you mean lr?']),
        (['--vit.depht=3'], ['--vit.depht=3', 'vit.depth']),
        (['--depth=3'], ['--depth=3', 'vit.depth']),
        (['--qqq=3'], ['--qqq=3', 'did you mean']),
        (['--_private=4'], ['--_private=4']),
        (['--json=4'], ['--json=4']),
        (['--helper=4'], ['--helper=4']),
        (['--vit=4'], ['--vit=4', 'vit.depth']),
        (['--vit.rope=4'], ['--vit.rope=4', 'vit.rope.theta']),
        (['--lr', '3'], ['--lr=3']),
        (['--lr', '-3'], ['--lr=-3']),
        (['--compile', '--lr=3'], ['write --compile=VALUE']),
        (['-lr=3'], ['write --lr=3']),
        (['-k'], ['write --k=VALUE']),
        (['lr=3'], ['write --lr=3']),
        (['word'], ["'word'", '--key=value']),
        ([''], ["''", '--key=value']),
        (['--'], ['--key=value']),
        (['--lr=3\n4'], ['expected float']),
    ],
)
def test_refused_arguments(run, argv, words):
    bad(run(*argv), *words)


def test_nothing_changes_when_something_is_refused(capsys, tmp_path):
    refusal(capsys, script(), ['--lr=3', '--vit.depth=7', '--lrr=3'], '--lrr=3')
    settings = script()
    (tmp_path / 'a.py').write_text("mix['b'] = 2.0")
    refusal(capsys, settings, [str(tmp_path / 'a.py'), '--lrr=3'], '--lrr=3')
    assert settings['mix'] == {'a': 1.0}


# Files


def test_python_file(run):
    text = """
from __future__ import annotations
import os
import numpy_is_not_here if False else None
"""
    bad(run('a.py', files={'elsewhere/a.py': text}), 'a.py:4', 'SyntaxError')
    text = '''"""A config."""
import os.path as osp
from math import pi, e as euler
from dataclasses import dataclass
_twice = 2
def double(x):
    half = x / 2
    return x * _twice + 0 * half
class Other: pass
half = lambda x: x / 2
import json
json.flag = True
lr = double(lr) + 0 * pi
vit.depth = 27
vit.rope.theta = 10
vit.width = vit.depth * 2
betas = [0.5, 0.6]
layers += [3]
mix = {'emoji/noto': sum(x for x in (1, 2)) / 2}
limit = 3
name = osp.basename(__file__)
'''
    result = good(run('a.py', files={'elsewhere/a.py': text}))
    expected = {
        'lr': 1.2e-3, 'vit.depth': 27, 'vit.rope.theta': 10.0, 'vit.width': 54,
        'betas': [0.5, 0.6],
        'layers': [1, 2, 3], 'mix': {'emoji/noto': 1.5}, 'limit': 3.0, 'name': 'a.py',
    }  # fmt: skip
    assert result['config'] == DEFAULT | expected and list(result['config']) == list(DEFAULT)
    assert result['betas'] == '(0.5, 0.6)' and result['types'] == ['tuple', 'list', 'float']
    assert 'depth=27' in result['vit'] and 'depth=12' in result['default']


@pytest.mark.parametrize(
    'text, words',
    [
        ('lrr = 3', ['unknown setting lrr=3', 'a.py', 'did you mean lr?']),
        ('for i in range(3):\n    lr = 1.0', ['i=2', 'a.py', '_']),
        ('vit.depht = 3', ['vit.depht=3', 'a.py', 'vit.depth']),
        ('vit.rope.thetta = 3', ['vit.rope.thetta=3', 'vit.rope.theta']),
        ('vit = 3', ['vit=3', 'a.py', 'vit.depth']),
        ('vit.rope = 3', ['vit.rope=3', 'vit.rope.theta']),
        ('from train_parts import *', ['ModuleNotFoundError', 'a.py:1']),
        ('import math as name', ['name', 'a.py', 'import']),
        ('from math import pi as lr', ['lr', 'a.py', 'import']),
        ('def lr(): pass', ['lr', 'a.py', 'def']),
        ('lr = 1.0\nlr = (3', ['a.py:2', 'SyntaxError']),
        (
            'lr = 1.0\n\nlr = vit.depht * 3',
            ['a.py:3', 'AttributeError', 'did you mean vit.depth?'],
        ),
        ('\nlr = depht * 3', ['a.py:2', 'NameError', 'did you mean vit.depth?']),
        ('def f():\n    return 1 / 0\nlr = f()', ['a.py:2', 'ZeroDivisionError']),
        ('raise ValueError("two\\nlines")', ['a.py:1', 'two lines']),
        ('return 3', ['a.py:1', 'SyntaxError']),
        ('lr.x = 3', ['a.py:1', 'AttributeError']),
        ('_partial.depth = 3', ['a.py:1', 'NameError']),
    ],
)
def test_refused_python_files(run, text, words):
    bad(run('a.py', files={'elsewhere/a.py': text}), *words)


@pytest.mark.parametrize(
    'text, words',
    [
        ('{"lrr": 3}', ['lrr=3', 'a.json', 'did you mean lr?']),
        ('{"lr": null}', ['lr=None', 'a.json', 'expected float']),
        ('{"vit": {"depth": 3}}', ['vit=', 'a.json', 'vit.depth']),
        ('[1]', ['a.json:1']),
        ('{"lr": 1,\n "steps": }', ['a.json:2', 'JSONDecodeError']),
        ('', ['a.json:1']),
    ],
)
def test_refused_json_files(run, text, words):
    bad(run('a.json', files={'elsewhere/a.json': text}), *words)


def test_files_are_found_from_here_and_from_the_projects_folder(run):
    files = {'project/config/pali.py': 'steps = 5', 'elsewhere/config/mine.py': 'steps = 6'}
    assert good(run('config/pali.py', files=files))['config']['steps'] == 5
    assert good(run('config/mine.py'))['config']['steps'] == 6
    files = {'elsewhere/config/pali.py': 'steps = 7'}  # the current folder goes first
    assert good(run('config/pali.py', files=files))['config']['steps'] == 7


def test_missing_files_name_the_nearest(run, tmp_path):
    files = {
        'project/config/pali.py': '',
        'project/config/gemma.py': '',
        'elsewhere/out/run/config.json': '{}',
    }
    bad(run('config/pally.py', files=files), 'config/pally.py', 'did you mean config/pali.py?')
    bad(run('train.pyy/gemma.py'), 'config/gemma.py')
    bad(run('configuratr.py'), 'did you mean config/')  # a script is no config file
    bad(run('gemma.py'), 'did you mean config/gemma.py?')
    bad(run('out/rnu/config.json'), 'did you mean out/run/config.json?')
    bad(run('out/run/confg.json'), 'did you mean out/run/config.json?')
    absolute = tmp_path / 'elsewhere/out/run'
    bad(run(f'{absolute}/confg.json'), f'did you mean {absolute}/config.json?')
    bad(run('out/**/a[.py'), 'no config file')
    bad(run(str(tmp_path / 'elsewhere') + '/nowhere/at/all.json'), 'no config file')


# Reproduction


def test_a_saved_config_reproduces_the_run(run):
    flags = [
        '--lr=1.0000000000000002e-5',
        '--betas=(0.1,)',
        '--layers=[]',
        '--vit.rope.theta=3',
        '--name=1e5',
    ]
    flags += [
        "--mix={'emoji/noto': 0.1, 'b': [(1, 2), True]}",
        '--vit.scales=(1, 2.5)',
        '--compile=false',
    ]
    first = good(run(*flags))
    assert first['config']['mix'] == {'emoji/noto': 0.1, 'b': [[1, 2], True]}
    second = good(
        run(
            'out/run/config.json',
            files={'elsewhere/out/run/config.json': json.dumps(first['config'])},
        )
    )
    assert second == first and json.dumps(second) == json.dumps(first)
    default = good(run())
    again = good(
        run(
            'out/d/config.json',
            files={'elsewhere/out/d/config.json': json.dumps(default['config'])},
        )
    )
    assert again == default and json.dumps(again) == json.dumps(default)


def test_nested_tuples_of_defaults_survive_their_own_json(tmp_path):
    settings, groups = {}, [('.*bias', {'decay': 0.0})]
    settings = {'groups': groups, 'boxes': ((1, 2), (3, 4))}
    flat = configure(settings, [])
    assert flat == {'groups': [['.*bias', {'decay': 0.0}]], 'boxes': [[1, 2], [3, 4]]}
    (tmp_path / 'config.json').write_text(json.dumps(flat))
    again = {'groups': [('.*bias', {'decay': 0.0})], 'boxes': ((1, 2), (3, 4))}
    assert configure(again, [str(tmp_path / 'config.json')]) == flat and again == settings
    assert again['groups'] == groups and type(again['groups'][0]) is tuple
    # 1 == 1.0 == True in Python, and not in a saved run
    settings = {'layers': [1]}
    assert json.dumps(configure(settings, ['--layers=[1.0]'])) == '{"layers": [1.0]}'


# partial=True


def test_partial_skips_what_the_script_does_not_have(run):
    text = """
decoder.depth = 27
decoder.rope.theta = 3.0
decoder.mlp_dim = int(max(decoder.width, steps) * 8 / 3)
batch_size = 8
weights['a'] = 3
total *= 2
vit.heads = 3
if decoder.depth > 3:
    batch_size = 9
for k in decoder.names:
    decoder.x = k
run = f'depth{decoder.depth}'
lr = 0.5
steps = batch_size * 2
"""
    result = good(run('a.py', partial=True, files={'elsewhere/a.py': text}))
    assert result['config'] == DEFAULT | {'lr': 0.5, 'steps': 16}
    bad(run('a.py'), 'a.py:2', 'NameError', 'decoder')
    files = {'elsewhere/a.json': '{"decoder.depth": 3, "lr": 0.25, "vit.heads": 2}'}
    assert good(run('a.json', partial=True, files=files))['config'] == DEFAULT | {'lr': 0.25}


@pytest.mark.parametrize(
    'text',
    [
        'steps = decoder.width * 2',
        'if decoder.depth > 3:\n    steps = 4',
        'name = f"{decoder.width}"',
        "mix['a'] = decoder.weight",
        'mix.update(a=decoder.weight)',
        'run = decoder.name\nname = run',
        'vit.depth = vit.heads',
    ],
)
def test_partial_never_guesses_a_setting_of_its_own(run, text):
    line = 1 if text.startswith('if') else len(text.splitlines())
    bad(
        run('a.py', partial=True, files={'elsewhere/a.py': text}),
        f'a.py:{line}:',
        'saved config.json',
    )


def test_partial_still_refuses_flags_values_and_errors(run):
    bad(run('--decoder.depth=3', partial=True), '--decoder.depth=3')
    bad(run('a.py', partial=True, files={'elsewhere/a.py': 'lr = "x"'}), 'expected float')
    bad(
        run('a.py', partial=True, files={'elsewhere/a.py': 'other = 1 / 0'}),
        'a.py:1',
        'ZeroDivisionError',
    )
    bad(run('a.py', partial=True, files={'elsewhere/a.py': 'vit = 3'}), 'vit.depth')


# --help


def test_help(run):
    result = run('missing.py', '--nonsense', '--help')
    assert result.returncode == 0 and result.stderr == ''
    text = result.stdout
    assert text.startswith('Trains a toy.\n\nSecond paragraph.')
    lines = {line.split('=')[0]: line for line in text.splitlines() if line.startswith('--')}
    assert list(lines) == [f'--{key}' for key in DEFAULT]
    assert '6e-4' in lines['--lr'] and lines['--lr'].endswith('# peak learning rate')
    assert "'a#b'" in lines['--name'] and lines['--name'].endswith('# what the run is called')
    assert lines['--steps'].rstrip() == '--steps=1000'
    assert lines['--vit.depth'].startswith('--vit.depth=12') and lines['--vit.depth'].endswith(
        '# number of blocks'
    )
    assert lines['--vit.rope.theta'].endswith('# base wavelength')
    assert run('-h').stdout == text


def test_help_of_a_script_that_is_imported_too(run):
    """As data.py: its settings stand under `if __name__`, beside constants and functions."""
    text = '''"""Reads."""
from configurator import configure
SIZE = 4096                     # a constant
def work(seed=3): pass
if __name__ == '__main__':
    import math
    # what is read
    data = ''                   # data sets,
    #                             separated by commas
    _hidden = 3
    nothing = None
    found = configure(globals(), partial=True)
    after = 5
'''
    result = run('x.py', '--help', files={'project/train.py': text})
    expected = [
        'Reads.',
        '',
        'what is read',
        "--data=''" + 32 * ' ' + '# data sets, separated by commas',
    ]
    assert result.returncode == 0 and result.stdout.splitlines() == expected


def test_help_without_source(capsys):
    settings = {'lr': 1.0}
    with pytest.raises(SystemExit) as stop:
        configure(settings, ['--help'])
    assert stop.value.code == 0 and '--lr=1.0' in capsys.readouterr().out


def test_argv_defaults_to_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--lr=3'])
    assert configure(script())['lr'] == 3.0
    assert configure(script(), [])['lr'] == 6e-4
