"""configurator.py: the settings of tasks, --help, other names, and parts of a flat config."""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
from test_configurator import HOME, refusal, script

import configurator
import tasks
import tasks.vlm
import usage
from configurator import answer_help, configure, find_task, part
from usage import settings_in

# Tasks: a script's `task` names a file with further settings

LOOP = '''"""Trains."""
from configurator import configure
raise SystemExit('nothing of this is run')

# ------------------------------------------------------------------------------------------------
# settings

# what is trained
task = 'vlm'                    # vlm | t2i
groups = [(r'norm|bias', {'weight_decay': 0.0}), (r'.*', {})]   # the first regex found
#                                 names the group;  it goes on for very long, so that it does
#                                 not fit on any line of a terminal, and ends here.
lr = 1e-3
# data
mix = {                         # data set
    'emoji': 1.0,               # -> weight
}
config = configure(globals())
later = 1
'''
MODEL = """
raise SystemExit('nothing of this is run')
from dataclasses import dataclass, field
KINDS = ('a', 'b')

@dataclass
class Rope:
    theta: float = 1e4          # base wavelength

@dataclass
class ViTConfig:
    depth: int = 6              # blocks
    width: "int" = 192
    rope: Rope = field(default_factory=Rope)
    scaling: list = field(default_factory=list)     # [factor], or [factor,
    #                             low, high]
    scales: tuple = field(default_factory=lambda: (1, 2))
    area: int = field(init=False, default=0)
    kinds = KINDS

    def blocks(self):
        local = 3
"""
VLM = '''
import torch_is_not_here
from model import ViTConfig as Tower, Rope
from elsewhere import Unknown

class TrainSettings:
    """What train.py takes with this task."""
    vit = Tower()               # the vision tower
    small = Tower(2, rope=Rope(theta=5.0), width=96)
    odd = Unknown(a=1)          # of a file that is not here
    # the answer
    prompt = 'a  é'             # between a picture and its answer

class SampleSettings:
    image = ''                  # pictures
'''
T2I = """
from dataclasses import dataclass

@dataclass
class DiT:
    depth: int = 4

class TrainSettings:
    dit = DiT()
    denoiser = 'dit'
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A project with two tasks, and the current folder somewhere else."""
    files = {'train.py': LOOP, 'model.py': MODEL, 'tasks/vlm.py': VLM, 'tasks/t2i.py': T2I}
    for name, text in files.items():
        (tmp_path / 'home' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'home' / name).write_text(text)
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    monkeypatch.setattr(configurator, 'HOME', tmp_path / 'home')
    monkeypatch.setattr(usage, 'HOME', tmp_path / 'home')
    monkeypatch.setenv('COLUMNS', '100')
    return tmp_path / 'home'


@dataclass
class Tower:
    depth: int = 6
    sizes: tuple = (1, 2)


def more(task):
    if task not in ('vlm', 't2i', 'llm'):
        raise ValueError(f'there is no task {task}')
    return {
        'vlm': {'vit': Tower(), 'prompt': ''},
        't2i': {'dit': Tower(), 'denoiser': 'dit'},
        'llm': {},
    }[task]


def elsewhere(key):
    return [task for task in ('vlm', 't2i') if key in configurator.flatten(more(task))]


def loop():
    return {'task': 'vlm', 'lr': 1.0}


def test_find_task(home):
    Path('t2i.py').write_text("1 / 0\nlr = 3\ntask = 'llm'\ntask = 't2i'\nunknown.depth = 3")
    Path('none.py').write_text('lr = 3\ndef f():\n    task = 3')
    Path('run.json').write_text('{"lr": 3, "task": "llm"}')
    Path('none.json').write_text('{"lr": 3}')
    for argv, task in [
        ([], 'vlm'), (['--task=t2i'], 't2i'), (["--task='t2i'", '--lr'], 't2i'), (['t2i.py'],
        't2i'), (['run.json'], 'llm'),
        (['t2i.py', 'none.py', 'none.json'], 't2i'), (['t2i.py', '--task=llm'], 'llm'),
        (['--task=llm', 't2i.py'], 't2i'),
        (['t2i.py', 'run.json'], 'llm'), (['--name=missing.py', '--task', 'word', '--tasks=x'],
        'vlm'),
    ]:  # fmt: skip
        assert find_task(argv, 'vlm') == task, argv


@pytest.mark.parametrize(
    'name, text, words',
    [
        ('a.py', '\ntask = name', ['a.py:2', "write task = 'name'"]),
        ('a.py', 'task = f"{3}"', ['a.py:1', "write task = 'name'"]),
        ('a.py', 'task = None', ['a.py:1', "write task = 'name'"]),
        ('a.py', 'lr = 3\nlr = (', ['a.py:2', 'SyntaxError']),
        ('a.py', "if True:\n    task = 't2i'", ['task=t2i', 'too late']),
        ('a.py', "task += '_x'", ['task=vlm_x', 'too late']),
        ('a.json', '{"task": 3}', ['task=3 in a.json', "expected str like 'vlm', got int"]),
        ('a.json', '{', ['a.json:1', 'JSONDecodeError']),
        ('a.json', '{"task": "nothing"}', ['there is no task nothing']),
    ],
)
def test_tasks_that_cannot_be_found(capsys, home, name, text, words):
    Path(name).write_text(text)
    refusal(capsys, loop(), [name], *words, more=more)
    refusal(capsys, loop(), ['missing.py'], 'no config file missing.py', more=more)


def test_settings_of_the_task_follow_the_scripts(home):
    settings = loop()
    assert configure(settings, [], more=more) == {
        'task': 'vlm', 'lr': 1.0, 'vit.depth': 6, 'vit.sizes': [1, 2], 'prompt': ''
    }  # fmt: skip
    Path('a.py').write_text(
        "vit.depth = 27 if task == 'vlm' else 0\nprompt = task\nlr = vit.depth"
    )
    settings = loop()
    flat = configure(settings, ['--vit.sizes=(3,)', 'a.py', '--prompt=x'], more=more)
    assert list(flat) == ['task', 'lr', 'vit.depth', 'vit.sizes', 'prompt']
    assert settings == {'task': 'vlm', 'lr': 27.0, 'vit': Tower(27, (3,)), 'prompt': 'x'}

    # the task may be said last; a saved run says it itself
    settings = loop()
    flat = configure(settings, ['--dit.depth=3', '--lr=2', '--task=t2i'], more=more)
    assert settings == {'task': 't2i', 'lr': 2.0, 'dit': Tower(3), 'denoiser': 'dit'}
    Path('run.json').write_text(json.dumps(flat))
    again = loop()
    assert configure(again, ['run.json'], more=more) == flat and again == settings


def test_what_comes_along_stands_before_all_that_is_said(home):
    """Files and flags see it, and go on from it; who asks for nothing is not asked."""
    given = []

    def brings(flat):
        given.append(flat)
        return ['--vit.depth=3', '--vit.sizes=[4]', "--prompt='a'"]

    Path('a.py').write_text('lr = vit.depth * lr\nprompt += "b"')
    settings = loop() | {'init': {}}
    argv = ['a.py', "--init={'vit': 'x'}", '--vit.sizes=[5]']
    flat = configure(settings, argv, more=more, brings=brings)
    assert flat['vit.depth'] == 3 and flat['vit.sizes'] == [5] and flat['prompt'] == 'ab'
    assert settings['lr'] == 3.0 and settings['vit'] == Tower(3, (5,))
    assert len(given) == 1 and given[0]['vit.depth'] == 6 and given[0]['lr'] == 6.0
    configure(loop() | {'init': {}}, ['a.py'], more=more, brings=lambda flat: 1 / 0)


def test_a_task_may_not_take_a_name_of_the_script(home):
    with pytest.raises(AssertionError, match='prompt'):
        configure({**loop(), 'prompt': print}, [], more=more)
    with pytest.raises(AssertionError, match='size = None'):
        configure(loop(), [], more=lambda task: {'size': None})


def test_a_key_of_another_task_is_refused_with_its_name(capsys, home):
    words = 'a setting of task=t2i, this run is task=vlm'
    refusal(
        capsys,
        loop(),
        ['--dit.depth=3'],
        f'unknown setting --dit.depth=3: {words}',
        more=more,
        elsewhere=elsewhere,
    )
    Path('a.json').write_text('{"denoiser": "unet"}')
    refusal(
        capsys,
        loop(),
        ['a.json'],
        f"denoiser='unet' in a.json: {words}",
        more=more,
        elsewhere=elsewhere,
    )
    Path('a.py').write_text('denoiser = "unet"')
    refusal(
        capsys,
        loop(),
        ['a.py'],
        f"denoiser='unet' in a.py: {words}",
        more=more,
        elsewhere=elsewhere,
    )
    Path('a.py').write_text('lr = 3\ndit.depth = 3')
    words = f"a.py:2: NameError: name 'dit' is not defined: dit.depth is {words}"
    refusal(capsys, loop(), ['a.py'], words, more=more, elsewhere=elsewhere)
    refusal(capsys, loop(), ['--lrr=3'], 'did you mean lr?', more=more, elsewhere=elsewhere)
    refusal(
        capsys,
        loop(),
        ['--x=3'],
        'of task=b, task=c, this run is task=vlm',
        elsewhere=lambda key: ['b', 'c'],
    )
    refusal(
        capsys, {'lr': 1.0}, ['--x=3'], 'x=3: a setting of task=b\n', elsewhere=lambda key: ['b']
    )
    configure(loop(), ['--lr=3', '--vit.depth=3'], more=more, elsewhere=lambda key: 1 / 0)


# Settings as their source has them


def test_settings_in_a_class(home):
    found = settings_in(home / 'tasks/vlm.py', 'TrainSettings')
    assert all(key == setting.name for key, setting in found.items())
    vit = 'vit: the vision tower'
    assert [tuple(setting)[1:] for key, setting in found.items() if key.startswith('vit.')] == [
        ('6', 'blocks', vit), ('192', '', vit), ('1e4', 'base wavelength', vit),
        ('[]', '[factor], or [factor, low, high]', vit), ('(1, 2)', '', vit),
    ]  # fmt: skip
    small = {key: setting.default for key, setting in found.items() if key.startswith('small.')}
    assert small == {
        'small.depth': '2', 'small.width': '96', 'small.rope.theta': '5.0', 'small.scaling': '[]',
        'small.scales': '(1, 2)',
    }  # fmt: skip
    assert found['small.depth'].section == 'small'
    assert found['odd'] == ('odd', 'Unknown(a=1)', 'of a file that is not here', '')
    assert found['prompt'] == (
        'prompt',
        "'a  é'",
        'between a picture and its answer',
        'the answer',
    )
    assert list(found)[-2:] == ['odd', 'prompt'] and len(found) == 12
    assert list(settings_in(home / 'tasks/t2i.py', 'TrainSettings')) == ['dit.depth', 'denoiser']
    assert list(settings_in(home / 'tasks/vlm.py', 'SampleSettings')) == ['image']
    assert settings_in(home / 'tasks/t2i.py', 'SampleSettings') == {}


@pytest.mark.parametrize('text', [
    'from tasks import vlm\n\nclass TrainSettings(vlm.TrainSettings):\n    weight = 2.0\n',
    'from tasks.vlm import TrainSettings as Theirs\n\nclass TrainSettings(Theirs):\n'
    '    weight = 2.0\n',
])
def test_a_task_may_inherit_settings(tmp_path, text):
    """For training as for the help."""
    path = tmp_path / 'mine.py'
    path.write_text(text)
    theirs = settings_in(tiny.ROOT / 'tasks/vlm.py', 'TrainSettings')
    assert list(settings_in(path, 'TrainSettings')) == [*theirs, 'weight']
    scope = {}
    exec(text, scope)
    assert tasks.body_of(scope['TrainSettings']) == tasks.body_of(tasks.vlm.TrainSettings) | {
        'weight': 2.0}


def help_of(capsys, *args, **kwargs):
    with pytest.raises(SystemExit) as stop:
        answer_help(*args, **kwargs)
    out, err = capsys.readouterr()
    assert stop.value.code == 0
    return out, err


def test_help_shows_sections_and_whole_comments(capsys, home):
    assert answer_help(home / 'train.py', ['--lr=3', 'missing.py']) is None
    out, err = help_of(capsys, home / 'train.py', ['-h'])
    assert err == '' and out.startswith('Trains.\n\nwhat is trained\n--task=')
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    loop, _, task = out.partition('\nsettings of task=vlm\n')
    assert ' '.join(loop.split()) == ' '.join(
        """Trains. what is trained --task='vlm' # vlm | t2i
        --groups=[(r'norm|bias', {'weight_decay': 0.0}), (r'.*', {})] # the first regex found names
        the group; it goes on for very long, so that it does not fit on any line of a terminal, and
        ends here. --lr=1e-3
        data --mix={'emoji': 1.0} # data set -> weight""".split()
    )
    assert '\n' + 41 * ' ' + '# the first regex found names' in loop
    assert (
        '\nvit: the vision tower\n--vit.depth=6' + 28 * ' ' + '# blocks\n--vit.width=192\n' in task
    )
    assert "\nthe answer\n--prompt='a  é'" in task and '--vit.rope.theta=1e4 ' in task

    # everything is in there for a narrow and a wide terminal
    for columns in ('20', '300'):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('COLUMNS', columns)
            assert help_of(capsys, home / 'train.py', ['-h'])[0].split() == out.split()


def test_help_of_other_tasks(capsys, home):
    out, err = help_of(capsys, home / 'train.py', ['--task=t2i', '--help'])
    assert '\nsettings of task=t2i\n' in out and '--dit.depth=4' in out and 'vit' not in out
    Path('mine.py').write_text('class TrainSettings:\n    mine = 3   # of my own')
    out, _ = help_of(capsys, home / 'train.py', ['--help', '--task=mine.py'])
    assert '\nsettings of task=mine.py\n' in out and '# of my own' in out
    out, _ = help_of(capsys, home / 'train.py', ['--help', '--task=gone'])
    assert '--lr=1e-3' in out and out.endswith(
        f'settings of task=gone\nthere is no {home}/tasks/gone.py\n'
    )

    # sample.py knows the task from a run
    out, _ = help_of(
        capsys, home / 'tasks/t2i.py', ['-h'], task='vlm', task_class='SampleSettings'
    )
    assert out.endswith("settings of task=vlm\n\n--image=''" + 31 * ' ' + '# pictures\n')

    # what is wrong with a file is said, and help is given
    out, err = help_of(capsys, home / 'train.py', ['missing.py', '--help'])
    assert 'no config file missing.py' in err and 'settings of task=vlm' in out


def test_configure_answers_help_of_its_script(capsys, home):
    with pytest.raises(SystemExit) as stop:
        configure(
            {'__file__': str(home / 'train.py'), **loop()}, ['--task=t2i', '--help'], more=more
        )
    assert stop.value.code == 0 and '--dit.depth=4' in capsys.readouterr().out


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_help_of_the_real_scripts_is_quick(script):
    code = (
        f'import sys, configurator; configurator.answer_help({script!r}, ["--help"]); sys.exit(3)'
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, '-c', code], cwd=HOME, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0 and '\n--seed=0' in result.stdout, result.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


# Other names, other paths


@pytest.mark.parametrize(
    'theirs, ours',
    [
        ('learning_rate', 'lr'), ('batch', 'batch_size'), ('wd', 'weight_decay'),
        ('max_iters', 'max_steps'),
        ('total_steps', 'max_steps'), ('num_steps', 'max_steps'), ('num_epochs', 'epochs'),
        ('num_train_epochs', 'epochs'), ('gradient_accumulation_steps', 'micro_batch_size'),
        ('per_device_train_batch_size', 'micro_batch_size'),
        ('device_batch_size', 'micro_batch_size'),
        ('warmup_steps', 'warmup'), ('warmup_ratio', 'warmup'), ('warmup_iters', 'warmup'),
        ('max_grad_norm', 'grad_clip'), ('clip_grad', 'grad_clip'), ('output_dir', 'out_dir'),
        ('bf16', 'dtype'),
        ('fp16', 'dtype'), ('precision', 'dtype'), ('save_steps', 'num_checkpoints'),
        ('save_every', 'num_checkpoints'), ('logging_steps', 'log_every'),
        ('log_interval', 'log_every'),
        ('eval_interval', 'eval_every'), ('eval_steps', 'eval_every'),
        ('resume_from_checkpoint', 'resume'),
        ('dataset', 'mix'), ('train_data', 'mix'), ('lr_scheduler_type', 'schedule'),
        ('lr_schedule', 'schedule'),
        ('num_workers', 'workers'), ('random_seed', 'seed'), ('Learning-Rate', 'lr'),
    ],
)  # fmt: skip
def test_what_others_call_it(capsys, theirs, ours):
    settings = dict.fromkeys([*usage.OTHER_NAMES, theirs + 's'], 1)
    refusal(capsys, settings, [f'--{theirs}=1'], f'--{theirs}=1: did you mean {ours}?')


def test_other_names_only_of_settings_that_exist(capsys, tmp_path):
    refusal(capsys, {'rate': 1.0}, ['--learning_rate=1'], 'did you mean rate?')
    (tmp_path / 'a.py').write_text('lr = learning_rate * 2')
    refusal(capsys, script(), [str(tmp_path / 'a.py')], 'NameError', 'did you mean lr?')


def test_a_path_may_begin_with_a_tilde(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'a.py').write_text("task = 't2i'\nlr = 3")
    settings = loop()
    configure(settings, ['~/a.py'], more=more)
    assert settings['lr'] == 3.0 and settings['task'] == 't2i'
    refusal(capsys, loop(), ['~/b.py'], 'no config file ~/b.py', f'did you mean {tmp_path}/a.py?')


# A part of a flat config


@dataclass(frozen=True)
class Part:
    depth: int = 6
    sizes: tuple = (1, 2)
    boxes: tuple = ((1, 2), (3, 4))
    names: list = field(default_factory=list)
    inner: Tower = field(default_factory=Tower)

    def __post_init__(self):
        if self.depth < 0:
            raise ValueError(f'depth={self.depth}\nis below 0')


def test_part():
    settings = {'vit': Part(), 'vitamin': 3}
    flat = configure(
        settings, ['--vit.depth=3', '--vit.sizes=[5]', "--vit.names=['a']", '--vit.inner.sizes=()']
    )
    flat = json.loads(json.dumps(flat))
    assert (
        part(flat, 'vit', Part)
        == settings['vit']
        == Part(3, (5,), names=['a'], inner=Tower(6, ()))
    )
    assert (
        part({'vit.depth': 2, 'depth': 3}, 'vit', Part) == Part(2)
        and part({}, 'vit', Part) == Part()
    )
    for bad, words in [
        ({'vit.depht': 3, 'vit.inner.x': 4}, 'Part has no setting vit.depht, vit.inner.x'),
        ({'vit.depth': -3}, 'vit: .*depth=-3'), ({'vit.depth': 'x'}, 'vit: .*TypeError'),
        ({'vit': 3, 'vit.': 3}, 'vit.'),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            part(bad, 'vit', Part)
        assert '\n' not in str(error.value)
