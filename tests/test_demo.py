"""launch/demo.sh: what it says of a result, and which runs it makes (python is stood in for)."""
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Writes down what it is asked to do, and leaves what train.py and sample.py would.
PYTHON = '''#!/bin/sh
echo "$@" >> calls
case "$*" in
    *train.py*) for flag; do case $flag in --out_dir=*) mkdir -p "${flag#*=}";; esac; done;;
    *--json=true*) cat scores;;
    *--eval=*) echo the table;;
esac
'''


def scores(exact_match):
    """The line of sample.py --json=true; the pixels of the 64 names are right 42 times."""
    row = dict(data='fluent-emoji-flat', samples=64, exact_match=exact_match,
               blank_picture=0.015625, shuffled_pictures=0.0, nearest_pixels=0.65625)
    return json.dumps(row) + '\n'


def demo(*arguments, root=ROOT, **env):
    """Run launch/demo.sh with the settings of `env`."""
    # `make test SEED=1` must not be a setting of what is tested here
    kept = {key: os.environ[key] for key in os.environ.keys() - {'SEED', 'FULL', 'MINUTES'}}
    command = ['sh', str(root / 'launch/demo.sh'), *arguments]
    return subprocess.run(command, env=kept | env, text=True, capture_output=True, timeout=60)


# -------------------------------------------------------------------------------------------------
# what is said of a result


@pytest.fixture
def said(tmp_path):
    """said(exact_match, **env): the last sentence."""
    def say(exact_match, **env):
        path = tmp_path / 'unseen.json'
        path.write_text(scores(exact_match))
        done = demo('result', str(path), **env)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return say


def test_a_result_is_told_beside_the_pixels(said):
    assert said(0.796875) == (
        'Of 64 pictures by a designer it never saw it names 79.7 % to the letter; the nearest '
        'training picture in 8 x 8 pixels names 65.6 %.\n')


# the last one is as good as the pixels, which is not above them
@pytest.mark.parametrize('exact_match, words', [
    (0.0, '0.0 %'), (0.5, '50.0 %'), (0.65625, '65.6 %')])
def test_a_run_that_does_not_beat_the_pixels_says_so(said, exact_match, words):
    sentence = said(exact_match, MINUTES='2')
    assert sentence.startswith('This run was too short to beat the pixels')
    assert f'names {words}, the nearest training picture in 8 x 8 pixels 65.6 %' in sentence
    assert sentence.endswith('make demo without MINUTES runs to the end.\n')


def test_what_helps_is_not_what_was_done(said):
    assert 'make demo FULL=1 trains' in said(0.5)
    assert 'make demo FULL=1 SEED=1' in said(0.5, FULL='1')
    assert 'without MINUTES' in said(0.5, FULL='1', MINUTES='2')


@pytest.mark.parametrize('text', ['', '{"error": "no"}\n'])
def test_a_file_without_scores_is_refused(tmp_path, text):
    path = tmp_path / 'unseen.json'
    path.write_text(text)
    done = demo('result', str(path))

    # one line that names what is missing, not a sentence with holes
    assert done.returncode == 2 and 'has no samples' in done.stderr and not done.stdout


@pytest.mark.parametrize('key, value', [('SEED', 'one'), ('MINUTES', '0'), ('MINUTES', '1.5'),
                                        ('FULL', 'yes')])
def test_a_wrong_setting_is_refused(key, value):
    done = demo(**{key: value})

    # before anything is drawn or trained
    assert done.returncode == 2 and f'{key}={value}: expected' in done.stderr and not done.stdout


# -------------------------------------------------------------------------------------------------
# which runs are made


@pytest.fixture
def clone(tmp_path):
    """A folder with the script, the configs, the data sets' folders and a stand-in for python."""
    shutil.copytree(ROOT / 'launch', tmp_path / 'launch')
    shutil.copytree(ROOT / 'config', tmp_path / 'config')
    for data in ('emoji', 'emoji_64'):
        (tmp_path / 'datasets' / data / 'fluent-emoji-flat').mkdir(parents=True)
    (tmp_path / 'python').write_text(PYTHON)
    (tmp_path / 'python').chmod(0o755)
    (tmp_path / 'scores').write_text(scores(0.8))
    return tmp_path


def calls(clone, **env):
    """The commands that the demo runs, and what it prints."""
    (clone / 'calls').unlink(missing_ok=True)
    done = demo(root=clone, PY='./python', **env)
    assert done.returncode == 0, done.stderr
    return (clone / 'calls').read_text().splitlines(), done.stdout


def max_steps(command):
    return int(command.partition('--max_steps=')[2].split()[0])


def test_the_model_begins_from_the_tower(clone):
    (data, tower, model, *_), text = calls(clone)
    assert data == 'prepare/emoji.py'
    assert tower.startswith('train.py config/siglip_emoji_64.py --out_dir=out/siglip_emoji_64 ')
    assert model.startswith('train.py config/vlm_emoji_64.py --out_dir=out/vlm_emoji_64 ')
    assert model.endswith('--init_from=out/siglip_emoji_64')

    # a line before each stage, and the end: the table, the picture, what to try next
    stages = [line[0] for line in text.splitlines() if line[1:4] == '/4 ' and line.endswith(' s')]
    assert stages == ['1', '2', '3', '4']
    for words in ('the table', 'names 80.0 %', 'out/vlm_emoji_64/captions.png', 'FULL=1'):
        assert words in text


@pytest.mark.parametrize('env, suffix', [
    (dict(SEED='1'), '_64_seed1'), (dict(MINUTES='3'), '_64_3min'), (dict(FULL='1'), ''),
    (dict(FULL='1', SEED='2', MINUTES='5'), '_seed2_5min')])
def test_another_seed_or_length_is_another_run(clone, env, suffix):
    (_, tower, model, *_), _ = calls(clone, **env)
    assert f'--out_dir=out/siglip_emoji{suffix} ' in tower
    assert f'--out_dir=out/vlm_emoji{suffix} ' in model
    assert model.endswith(f'--init_from=out/siglip_emoji{suffix}')

    # both trainings are told of the seed
    flag = f'--seed={env.get("SEED", 0)} '
    assert flag in tower and flag in model


def test_half_the_minutes_are_half_the_steps(clone):
    (_, *whole, _, _), _ = calls(clone)
    (_, *short, _, _), _ = calls(clone, MINUTES='3')
    # of the 6 minutes that the configs are for
    assert len(whole) == 2
    for long_run, short_run in zip(whole, short):
        assert max_steps(short_run) == max_steps(long_run) // 2


def test_what_lost_against_the_pixels_is_not_shown(clone):
    (clone / 'scores').write_text(scores(0.5))

    # neither the table nor the pictures: a reader would take them for what the project can do
    _, text = calls(clone, MINUTES='2')
    assert 'too short' in text and 'the table' not in text and 'captions.png' not in text


def test_one_designer_alone_is_no_measure(clone):
    """Without npm there is no unseen style."""
    (clone / 'datasets/emoji_64/fluent-emoji-flat').rmdir()
    (_, tower, model, measured), text = calls(clone)

    # it still trains, on the one style
    for command in (tower, model):
        assert "--mix={'openmoji':1.0} --val={'heldout':'heldout'}" in command
    assert measured.endswith('--eval=mix') and 'install npm' in text and 'captions.png' not in text
