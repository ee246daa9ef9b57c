"""What is not needed can be deleted: it really is, and what is left really trains, goes on, and is
used; the tests of what is left are found."""
import shutil
import subprocess
import sys

import pytest
import tiny

ROOMS = {
    'robots': ('robots', 'serve', 'tasks/policy.py', 'tasks/vla.py'),
    'images': ('images', 'tasks/t2i.py'),
    'families': ('families',),
    'diffusion': ('diffusion.py', 'robots', 'images', 'tasks/policy.py', 'tasks/vla.py',
                  'tasks/t2i.py'),
    'all but llm': ('robots', 'serve', 'images', 'families', 'diffusion.py', 'pictures.py',
                    'tasks/policy.py', 'tasks/vla.py', 'tasks/t2i.py', 'tasks/vlm.py',
                    'tasks/siglip.py'),
}
TEXT = [flag for flag in tiny.FLAGS if not flag.startswith(('--vit', '--augment'))]
RUNS = {
    'vlm': ([*tiny.FLAGS, '--task=vlm', '--mix={"plain": 1}', '--exact_match=false'],
            ['--eval=plain', '--json=true']),
    'llm': ([*TEXT, '--task=llm', '--mix={"words": 1}'], ['--prompt=red', '--max_new_tokens=3']),
}


def copy_without(folder, names):
    """The files of the project that git knows, or would, without some."""
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=tiny.ROOT,
                            check=True, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (tiny.ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tiny.ROOT / name, folder / name)
    for name in names:
        path = folder / name
        assert path.exists(), f'{name}: there is nothing to delete'
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return folder


@pytest.fixture(scope='module', params=ROOMS)
def house(request, tmp_path_factory):
    """(what was deleted, the folder that is left)"""
    folder = tmp_path_factory.mktemp('house')
    return request.param, copy_without(folder, ROOMS[request.param])


def test_what_is_left_trains_goes_on_and_is_used(house, tmp_path):
    deleted, folder = house
    for task, (flags, use) in RUNS.items():
        if (folder / 'tasks' / f'{task}.py').exists():
            flags = [*flags, f'--data_dir={tiny.data_dir()}', f'--out_dir={tmp_path / task}']
            tiny.run(folder / 'train.py', *flags, '--max_steps=2').ok()
            again = tiny.run(folder / 'train.py', *flags, '--max_steps=3').ok()
            assert 'resumed' in again.out
            assert len(tiny.rows(tmp_path / task)) == 3
            answer = tiny.run(folder / 'sample.py', f'--out_dir={tmp_path / task}', *use,
                              '--device=cpu').ok()
            assert answer.out.strip()


def test_what_was_deleted_is_told(house, tmp_path):
    """A task that is not there is refused with those that are."""
    deleted, folder = house
    names = [name for name in ROOMS[deleted] if name.startswith('tasks/')]
    for name in names:
        task = name.removeprefix('tasks/').removesuffix('.py')
        result = tiny.run(folder / 'train.py', f'--task={task}')
        result.refused(f"task='{task}'", 'expected one of', 'llm')
    if deleted == 'families':
        result = tiny.run(folder / 'train.py', *RUNS['llm'][0], f'--data_dir={tiny.data_dir()}',
                          '--max_steps=1', '--decoder.hf=owner/name', f'--out_dir={tmp_path}')
        result.refused('families/')


@pytest.mark.parametrize('deleted', ['robots', 'all but llm'])
def test_the_tests_of_what_is_left_are_found(deleted, tmp_path):
    folder = copy_without(tmp_path, ROOMS[deleted])
    collect = ['-m', 'pytest', '--collect-only', '-q', '-p', 'no:xdist', '-p', 'no:cacheprovider']
    found = subprocess.run([sys.executable, *collect], cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr
    files = {line.partition('::')[0] for line in found.stdout.splitlines() if '::' in line}
    assert {'tests/test_data.py', 'tests/test_tokenizer.py'} <= files
    assert not files & {'tests/test_policy.py', 'tests/test_metaworld.py'}
