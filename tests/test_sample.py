"""sample.py from end to end, on a tiny model that has learned the names of twelve shapes
(tests/tiny.py)."""
import json
import shutil

import numpy as np
import pytest
import tiny
from tiny import NAMES, rows, run


@pytest.fixture(scope='module')
def data():
    return tiny.data_dir()


@pytest.fixture(scope='module')
def knows(data, tmp_path_factory):
    """A run that knows the shapes of two styles by heart."""
    out = tmp_path_factory.mktemp('knows') / 'run'
    run('train.py', *tiny.FLAGS, f'--data_dir={data}', '--mix={"plain": 1, "dark": 1}',
        '--max_steps=260', '--batch_size=24', '--augment=false', '--seq_len=24', '--log_every=20',
        '--val={"plain": "plain", "dark": "dark", "held": "held"}', f'--out_dir={out}').ok()
    return out


@pytest.fixture(scope='module')
def llm(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('llm') / 'run'
    run('train.py', *tiny.LLM_FLAGS, f'--data_dir={data}', '--mix={"words": 1}',
        '--max_steps=60', '--seq_len=24', '--log_every=20', f'--out_dir={out}').ok()
    return out


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A folder of the twelve shapes in the plain style, with a file that is no picture by its
    name."""
    folder = tmp_path_factory.mktemp('pictures')
    for name in NAMES:
        (folder / f'{name.replace(" ", "-")}.png').write_bytes(tiny.png(tiny.draw(name, 'plain')))
    (folder / 'notes.txt').write_text('not a picture')
    return folder


def name_of(path):
    return path.rpartition('/')[2].removesuffix('.png').replace('-', ' ')


@pytest.fixture(scope='module')
def sample(knows):
    """sample(*flags): run sample.py on the run that knows the shapes; its Result."""
    return lambda *flags, **kwargs: run(
        'sample.py', f'--out_dir={knows}', '--device=cpu', *flags, **kwargs)


def test_it_learned_the_shapes(knows):
    exact = {row['val']: row['exact_match'] for row in rows(knows, 'val_loss')}
    assert exact['plain'] == exact['dark'] == 1.0


def test_one_picture_by_the_plain_command(sample, pictures):
    assert sample(f'--image={pictures}/green-cross.png', real=True).ok().out == 'green cross\n'


def test_many_pictures_as_json(sample, pictures):
    """By a folder, a pattern and a path; answers are those of one by one, whatever the rows at
    once."""
    result = sample(f'--image={pictures},{pictures}/red-*.png,{pictures}/blue-disc.png',
                    '--json=true', '--batch_size=5').ok()
    found = [json.loads(line) for line in result.out.splitlines()]
    assert len(found) == 12 + 4 + 1 and not result.err
    assert sorted(name_of(row['image']) for row in found[:12]) == sorted(NAMES)
    assert all(name_of(row['image']).startswith('red') for row in found[12:16])
    assert all(row['text'] == name_of(row['image']) for row in found)


def test_many_pictures_as_text(sample, pictures):
    lines = sample(f'--image={pictures}/*-disc.png').ok().out.splitlines()
    assert sorted(lines) == [
        f'{pictures}/{colour}-disc.png: {colour} disc' for colour in ('blue', 'green', 'red')]


def test_other_formats_sizes_and_places(sample, knows, tmp_path):
    from PIL import Image
    big = Image.fromarray(tiny.draw('blue bar', 'dark')).convert('RGB').resize(
        (64, 64), Image.Resampling.NEAREST)
    big.save(tmp_path / 'big.webp', lossless=True)
    big.save(tmp_path / 'a,b.jpg', quality=95)
    shutil.copytree(knows, tmp_path / 'run', symlinks=True)
    result = run(
        'sample.py', '--out_dir=run', '--device=cpu', '--image=big.webp', cwd=tmp_path).ok()
    assert result.out == 'blue bar\n'


def test_prompt_is_what_the_model_reads(sample, pictures):
    """A prompt that was never trained on changes what is computed, and is told in the answer."""
    at = f'--image={pictures}'
    plain, prompted = (
        [json.loads(line) for line in sample(at, *flags, '--json=true').ok().out.splitlines()]
        for flags in ((), ('--prompt=zzzzzzzzzzzzzzz',)))
    assert {row['prompt'] for row in plain} == {''}
    assert {row['prompt'] for row in prompted} == {'zzzzzzzzzzzzzzz'}
    assert [row['text'] for row in plain] != [row['text'] for row in prompted]


def test_temperature_and_seed(sample, pictures):
    def texts(*flags):
        return sample(f'--image={pictures}', '--temperature=3.0', *flags).ok().out
    assert texts('--seed=1') == texts('--seed=1') != texts('--seed=2')
    assert texts('--top_k=1') == sample(f'--image={pictures}').ok().out


@pytest.mark.parametrize('flags, words', [
    (['--image=nowhere.png'], ['nowhere.png', 'no such picture']),
    (['--image=nowhere/*.png'], ['nowhere/*.png', 'no such picture']),
    (['--image='], ['--image', '--eval']),
    (['--checkpoint=step_00000001', '--image=x.png'], ['step_00000001', 'no checkpoint']),
    (['--eval=nowhere'], ['nowhere', 'does not exist']),
    (['--imag=x.png'], ['imag', 'image']),
    (['--temperature=hot'], ['temperature', 'hot', 'float']),
    (['--batch_size=0', '--eval=plain'], ['batch_size=0']),
    (['--max_new_tokens=-1', '--eval=plain'], ['max_new_tokens=-1']),
    (['--temperature=-1.0', '--eval=plain'], ['temperature=-1.0']),
    (['--eval=words'], ['words', 'picture']),
])
def test_refusal(sample, flags, words):
    sample(*flags).refused(*words)


def test_a_missing_or_damaged_run(knows, pictures, tmp_path):
    at = f'--image={pictures}/red-bar.png'
    run('sample.py', f'--out_dir={tmp_path / "none"}', at).refused(
        tmp_path / 'none', 'no checkpoint', 'out_dir')
    shutil.copytree(knows, tmp_path / 'run', symlinks=True)
    file = tmp_path / 'run' / 'checkpoints' / 'latest' / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])
    run('sample.py', f'--out_dir={tmp_path / "run"}', at).refused(
        'checkpoints/step_', 'can not be loaded')


@pytest.mark.parametrize(
    'content', [b'', b'not a picture', tiny.png(tiny.draw('red disc', 'dark'))[:80]],
    ids=['empty', 'text', 'cut'])
def test_not_a_picture(sample, pictures, tmp_path, content):
    (tmp_path / 'bad.png').write_bytes(content)
    result = sample(f'--image={pictures}/red-bar.png,{tmp_path}/bad.png')
    result.refused(tmp_path / 'bad.png', code=1)
    assert 'Traceback' not in result.err


def test_eval_prints_the_score_and_its_controls_and_draws_the_grid(sample, knows):
    from PIL import Image
    (knows / 'captions.png').unlink(missing_ok=True)
    row = json.loads(sample('--eval=held', '--json=true').ok().out)
    assert row['data'] == 'held' and row['samples'] == 12
    validated = {row['val']: row['exact_match'] for row in rows(knows, 'val_loss')}
    assert row['exact_match'] == validated['held']      # the same model, the same answers
    assert row['blank_picture'] <= 1 / 12               # one answer for all twelve names
    assert row['nearest_pixels'] == nearest_neighbour()
    with Image.open(knows / 'captions.png') as grid:
        assert len(np.unique(np.array(grid.convert('RGB')).reshape(-1, 3), axis=0)) > 50


def nearest_neighbour():
    """Share of held pictures whose nearest trained picture, on 8 x 8 pixels on white, has their
    name."""
    def small(name, style):
        rgba = tiny.draw(name, style).astype(float)
        rgb = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
        return rgb.reshape(8, 2, 8, 2, 3).mean((1, 3))
    known = [(small(name, style), name) for style in ('plain', 'dark') for name in NAMES]
    nearest = [min(known, key=lambda one: ((one[0] - small(name, 'held')) ** 2).sum())[1]
               for name in NAMES]
    return sum(a == b for a, b in zip(nearest, NAMES)) / 12


def test_eval_of_what_was_learned(sample, tmp_path):
    """Everything right with its own picture, nothing with another's; `mix` is all that was trained
    on, in one."""
    lines = sample('--eval=mix,plain', f'--grid={tmp_path / "grid.png"}').ok().out.splitlines()
    for line, name, pictures in zip(lines[-2:], ('mix', 'plain'), (24, 12)):
        found, count, *scores = line.split()
        exact, blank, shuffled, nearest = (float(score.rstrip('%')) for score in scores)
        assert (found, int(count), exact, nearest) == (name, pictures, 100.0, 100.0)
        assert blank <= 8.4 and shuffled == 0.0             # one name in twelve, none
    assert (tmp_path / 'grid.png').stat().st_size > 1000


def test_eval_of_a_set_that_lies_elsewhere(sample, tmp_path):
    """--data_dir is where the measured set is; the trained ones stay where the run found them."""
    tiny.write(tmp_path / 'sets' / 'mine', tiny.SETS['held'])
    here, there = (
        json.loads(sample(f'--eval={name}', '--json=true', *extra).ok().out)
        for name, extra in (('held', ()), ('mine', (f'--data_dir={tmp_path / "sets"}',))))
    assert here | {'data': ''} == there | {'data': ''}


def test_eval_of_a_bad_picture(sample, tmp_path):
    tiny.write(tmp_path / 'sets',
               [(key, picture[:60], caption) for key, picture, caption in tiny.SETS['held']])
    sample(f'--eval={tmp_path / "sets"}').refused('held-00', code=1)


def test_language_model_continues_text(llm, pictures):
    result = run('sample.py', f'--out_dir={llm}', '--device=cpu', '--prompt=green ').ok()
    assert result.out.startswith('green ') and result.out.strip() in NAMES
    row = json.loads(run(
        'sample.py', f'--out_dir={llm}', '--device=cpu', '--prompt=red c', '--json=true').ok().out)
    assert row == {'prompt': 'red c', 'text': 'ross'}
    for model in (llm, llm / 'checkpoints' / 'latest'):
        assert run('sample.py', f'--model={model}', '--device=cpu', '--prompt=red c').ok().out == (
            'red cross\n')
    run('sample.py', f'--out_dir={llm}', f'--image={pictures}').refused('--image', 'task=vlm')
    run('sample.py', f'--out_dir={llm}', '--eval=plain').refused('--eval', 'task=vlm')


def test_the_average_is_used_where_the_run_kept_one(data, tmp_path):
    """An average that has hardly begun to move continues a text as nothing trained does."""
    out = tmp_path / 'run'
    run('train.py', *tiny.LLM_FLAGS, f'--data_dir={data}', '--mix={"words": 1}',
        '--max_steps=60', '--seq_len=24', '--ema=0.9999', f'--out_dir={out}').ok()
    average, last = (run('sample.py', f'--out_dir={out}', '--device=cpu', '--prompt=red squ',
                         f'--ema={ema}').ok().out for ema in ('true', 'false'))
    assert last.startswith('red square') and not average.startswith('red square')
