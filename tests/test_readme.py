"""README.md and docs/: short, true of what is there; their examples run."""
import ast
import glob
import json
import os
import re

import numpy as np
import pytest
import tiny
from conftest import write_set

import tasks
import usage

# they are of the whole house: where a room was deleted, they speak of what is not there
NEEDS = ['robots', 'serve', 'images', 'families', 'diffusion.py', 'pictures.py', 'tasks/vlm.py',
         'tasks/siglip.py', 'tasks/policy.py', 'tasks/vla.py', 'tasks/t2i.py']
ROOT = tiny.ROOT
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
CONFIGS = sorted((ROOT / 'config').glob('*.py'))
# files and folders of those who read, which are not here
YOURS = {'mine.py', 'box.py', 'config/mine.py', 'llm.py', 'vlm.py', 'vla.py', 'out/', 'datasets/',
         'checkpoints/', 'state/'}
# flags of torchrun and sbatch, which stand before our script
NOT_OURS = {'nproc_per_node', 'nnodes', 'rdzv_backend', 'rdzv_endpoint', 'max_restarts', 'nodes',
            'gpus-per-node'}
VIT = ['--vit.image_size=16', '--vit.patch_size=4', '--vit.width=32', '--vit.depth=1',
       '--vit.mlp_dim=64', '--vit.num_heads=2']
SMALL = ['--batch_size=12', '--lanes=8', '--log_every=1', '--workers=0', '--device=cpu',
         '--lr=3e-3']


def name_of(page):
    return str(page.relative_to(ROOT))


def text_of(page):
    return page.read_text(encoding='utf-8')


def blocks_of(page, language):
    return re.findall(rf'```{language}\n(.*?)```', text_of(page), re.S)


def example(page, word):
    """The first Python block of a page that holds a word."""
    return next(block for block in blocks_of(page, 'python') if word in block)


def quoted(page):
    """What stands in backticks, outside of blocks."""
    return re.findall(r'`([^`\n]+)`', re.sub(r'```.*?```', '', text_of(page), flags=re.S))


def test_readme_is_short():
    assert text_of(ROOT / 'README.md').count('\n') <= 160


# -----------------------------------------------------------------------------------------------
# what is named is there


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = re.findall(r'\]\(([^)]+)\)', text_of(page))
    assert links or page.name not in ('README.md', 'promises.md')
    for link in links:
        assert '://' in link or (page.parent / link).exists(), link


def is_there(name):
    """Is there a file or folder of this name, or, of 'tests/test_data.py::test_name', the test?"""
    path, _, test = name.partition('::')
    if not (ROOT / path).exists():
        return False
    return not test or f'def {test}(' in text_of(ROOT / path)


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_files_and_folders_are_there(page):
    """Names like `model.py`, `tasks/` and `tests/test_data.py::test_name`; scripts of commands."""
    named = set()
    for words in quoted(page):
        if re.fullmatch(r'[\w/]+(\.(py|sh|md)(::\w+)?|/)', words):
            named.add(words)
    for script, arguments in commands_of(page):
        named |= {script, *re.findall(r'(?<=\s)[\w/]+\.py(?=\s|$)', arguments)}
    missing = [name for name in sorted(named - YOURS) if not is_there(name)]
    assert not missing, missing


# -----------------------------------------------------------------------------------------------
# commands

COMMAND = re.compile(r'(?:^|\s)(?:python|torchrun|sbatch)\b.*?([\w/]+\.(?:py|sh))(.*)')


def commands_of(page):
    """[(script, what follows)]: commands of a page, in blocks and in backticks, or those in the
    docstring of a config file."""
    if page.suffix == '.py':
        text = ast.get_docstring(ast.parse(text_of(page)))
    else:
        text = '\n'.join([*blocks_of(page, 'sh'), *quoted(page)])
    found = []
    for line in text.replace('\\\n', ' ').split('\n'):
        # what is after # is a comment
        for part in re.split(r'\s&&\s|\s#', line):
            match = COMMAND.search(part)
            if match:
                found.append((match[1], match[2]))
    return found


def settings_of(script, arguments):
    """Names of the settings that a command may give."""
    if script == 'launch/slurm.sh':
        return settings_of('train.py', arguments)
    # the command is a script of its own
    if script == 'data.py':
        return settings_of('show_steps.py', arguments) | settings_of('train.py', arguments)
    source = usage.read_source(ROOT / script)
    known = set(usage.settings_of(usage.before_configure(source.tree.body), source, {}))
    # what configure takes of every script, argparse takes, or a script reads by itself
    known |= {'help', 'allow_code', *re.findall(r'[\'"]--(\w+)\b', text_of(ROOT / script))}

    # a job hands on what stands after --
    if script == 'launch/sagemaker.py':
        known |= settings_of('train.py', arguments)
    task_class = {'train.py': 'TrainSettings', 'sample.py': 'SampleSettings'}.get(script)
    if task_class:
        for path in task_files(arguments):
            known |= set(usage.settings_in(path, task_class))
    return known


def task_files(arguments):
    """The file of the task that a command is of; all of them, where it does not say."""
    chosen = re.findall(r'--task=(\w+)(?=\s|$)', arguments)
    # of --out_dir=out/llm_tiny: the task of config/llm_tiny.py
    configs = re.findall(r'\bconfig/(\w+)\.py', arguments) + re.findall(r'\bout/(\w+)', arguments)
    for config in configs:
        path = ROOT / 'config' / f'{config}.py'
        if path.exists():
            chosen += re.findall(r"^task = '(\w+)'", text_of(path), re.M)
    return [tasks.path_of(name) for name in chosen[:1] or tasks.names()]


@pytest.mark.parametrize('page', PAGES + CONFIGS, ids=name_of)
def test_flags_are_settings(page):
    unknown = []
    for script, arguments in commands_of(page):
        flags = set(re.findall(r'(?<!\S)\[?--([a-z][\w.-]*)', arguments)) - NOT_OURS
        for flag in flags - settings_of(script, arguments):
            unknown.append(f'{script} --{flag}')
    assert not unknown, unknown


def test_flags_by_themselves_are_settings():
    """A flag in backticks without its command is one of some script."""
    known = set()
    for script in ('train.py', 'sample.py', 'data.py', 'prepare/lerobot.py', 'bench/train.py',
                   'bench/serve.py'):
        known |= settings_of(script, '')
    for page in PAGES:
        for words in quoted(page):
            flag = re.match(r'--([a-z][\w.]*)', words)
            assert not flag or flag[1] in known, f'{name_of(page)}: {words}'


def test_what_this_file_finds():
    """The patterns above find what they are for: else the tests would pass on anything."""
    commands = []
    for page in PAGES:
        commands += commands_of(page)
    scripts = {script for script, _ in commands}
    assert {'train.py', 'sample.py', 'data.py', 'hub.py', 'bench/serve.py'} <= scripts
    assert len(commands) > 40
    assert 'decoder.width' in settings_of('train.py', ' config/llm_tiny.py')
    assert 'vit.width' not in settings_of('train.py', ' config/llm_tiny.py --lr=1')
    assert 'guidance' not in settings_of('sample.py', ' --out_dir=out/llm_tiny --prompt=a')
    assert is_there('tests/test_readme.py::test_what_this_file_finds')
    assert not is_there('policies.py') and not is_there('tests/test_readme.py::test_nothing')


# -----------------------------------------------------------------------------------------------
# the examples


@pytest.fixture
def pictures(tmp_path):
    """Files of real pictures, those that matplotlib has; a data set of them without captions."""
    import matplotlib
    files = sorted(glob.glob(os.path.join(matplotlib.get_data_path(), 'images', '*.png')))
    assert len(files) >= 12
    samples = []
    for number, path in enumerate(files):
        with open(path, 'rb') as file:
            samples.append((f'{number:03}', {'png': file.read()}))
    write_set(tmp_path / 'icons', [samples[:5], samples[5:]])
    return files


def losses_of(out_dir, key='loss'):
    return [row[key] for row in tiny.rows(out_dir)]


def test_the_task_of_the_readme(pictures, tmp_path):
    """It trains, goes on, gives the same losses on two ranks with FSDP, and fills pictures."""
    code = example(ROOT / 'README.md', 'class MaskedPatches')
    assert code.count('\n') <= 60
    (tmp_path / 'mine.py').write_text(code)

    flags = ['--task=mine.py', '--mix={"icons": 1}', '--data_dir=.', '--seq_len=1', *VIT, *SMALL]
    for out, extra, ranks in (('one', [], 0), ('two', ['--fsdp=0'], 2)):
        more = [*flags, f'--out_dir={out}', *extra]
        tiny.run('train.py', *more, '--max_steps=8', cwd=tmp_path, torchrun=ranks).ok()
        again = tiny.run('train.py', *more, '--max_steps=12', cwd=tmp_path, torchrun=ranks).ok()
        assert 'resumed from' in again.out
    alone = losses_of(tmp_path / 'one')
    assert len(alone) == 12 and max(alone[-4:]) < 0.9 * alone[0]
    assert losses_of(tmp_path / 'two') == pytest.approx(alone, abs=1e-5)

    # patches that the model saw stay as they are, the others are its own
    tiny.run('sample.py', '--out_dir=one', f'--image={pictures[0]}', '--device=cpu',
             '--allow_code=true', cwd=tmp_path).ok()
    stays = unchanged_patches(pictures[0], tmp_path / 'filled.png')
    assert 0 < stays.sum() < stays.size


def unchanged_patches(before, after, size=16, patch=4):
    """Which patches of a picture are the same after, but for rounding."""
    from PIL import Image

    from pictures import Eyes
    with open(before, 'rb') as file:
        old = Eyes(size).pixels(file.read())
    new = np.array(Image.open(after))
    assert new.shape == old.shape
    difference = abs(old.astype(int) - new).max(-1)
    squares = difference.reshape(size // patch, patch, size // patch, patch)
    return squares.max((1, 3)) <= 1


def test_the_box_of_docs_tasks(tmp_path):
    """A new head beside the caption: both are learned, whether or not a sample has a box."""
    (tmp_path / 'box.py').write_text(example(ROOT / 'docs' / 'tasks.md', 'class Boxed'))
    samples = []
    for number in range(12):
        said = {'prefix': '', 'suffix': 'a shape'}
        if number % 3:
            said['box'] = [0.1, 0.2, 0.5, 0.6]
        members = {'png': tiny.SETS['plain'][number][1], 'json': json.dumps(said).encode()}
        samples.append((f'{number:03}', members))
    write_set(tmp_path / 'boxes', [samples])

    flags = [*tiny.FLAGS, '--task=box.py', '--mix={"boxes": 1, "words": 1}', '--augment=false',
             '--exact_match=false', '--max_steps=12', f'--data_dir={tiny.data_dir()}']
    for out, extra, ranks in (('one', [], 0), ('two', ['--micro_batch_size=1'], 2)):
        tiny.run('train.py', *flags, f'--out_dir={out}', *extra, cwd=tmp_path, torchrun=ranks).ok()
    for key in ('loss', 'loss/text', 'loss/box'):
        alone = losses_of(tmp_path / 'one', key)
        assert losses_of(tmp_path / 'two', key) == pytest.approx(alone, abs=1e-5)
        # a step may meet no box at all
        there = [value for value in alone if value]
        assert 4 <= len(there) and there[-1] < there[0]
