"""A model is used as it was trained: pictures and prompt attend in validation and in sample.py as
its form says, whatever the form, one of yours too."""
import json

import pytest
import tiny
from conftest import encode, picture, write_tar

NEEDS = ['tasks/vlm.py']
FORMS = ('paligemma', 'text', 'chat', 'llava', 'smolvlm')
MINE = '''from processor import LEARNED, READ, SEEN
def form(sample, p):            # pictures see each other, the question is causal
    return [*((picture, SEEN) for picture in sample['pictures']), (p.tokenizer.bos_id, READ),
            ('name it: ', READ), (sample.get('text', ''), LEARNED), (p.tokenizer.eos_id, LEARNED)]
'''


def train(out_dir, form):
    flags = [flag for flag in tiny.FLAGS if not flag.startswith(('--augment', '--seq_len'))]
    return tiny.run('train.py', *flags, '--task=vlm', f'--data_dir={tiny.data_dir()}',
                    '--seq_len=128',
                    '--mix={"plain": 1}', '--val={"plain": "plain"}', f'--processor={form}',
                    '--prompt=which?', '--max_steps=80', '--lr=1e-2', '--log_every=40',
                    f'--out_dir={out_dir}')


@pytest.mark.parametrize('form', [*FORMS, 'mine'])
def test_validation_and_sample_answer_as_trained(form, tmp_path):
    if form == 'mine':
        (tmp_path / 'mine.py').write_text(MINE)
        form = f'{tmp_path}/mine.py:form'
    train(tmp_path / 'run', form).ok()
    row, = tiny.rows(tmp_path / 'run', 'val_loss')
    assert row['exact_match'] == 1
    shown = tiny.run('sample.py', f'--out_dir={tmp_path / "run"}', '--eval=plain', '--json=true',
                     '--device=cpu', '--allow_code=true').ok()
    assert json.loads(shown.out)['exact_match'] == 1


QUESTIONS = {'which colour?': 'red', 'which shape?': 'a circle, as round as a wheel of a cart is'}


@pytest.mark.parametrize('form', ['paligemma', 'chat'])
def test_each_sample_is_asked_its_own_question(form, tmp_path):
    """And may be answered at any length: one answer is longer than sample.py's 32 tokens."""
    samples = []
    for number, (asked, answer) in enumerate(QUESTIONS.items()):
        says = dict(prefix=asked, suffix=answer)
        if form == 'chat':
            says = dict(messages=[
                dict(role='user', content=[dict(type='image'), dict(type='text', text=asked)]),
                dict(role='assistant', content=answer)])
        samples.append((str(number), dict(png=encode(picture(1)), json=json.dumps(says).encode())))
    (tmp_path / 'both').mkdir()
    write_tar(tmp_path / 'both' / 'a.tar', samples)

    flags = [flag for flag in tiny.FLAGS if not flag.startswith(('--augment', '--seq_len'))]
    tiny.run('train.py', *flags, '--task=vlm', f'--data_dir={tmp_path}', '--seq_len=160',
             '--mix={"both": 1}', '--val={"both": "both"}', f'--processor={form}',
             '--max_steps=60', '--batch_size=4', '--lr=1e-2', '--log_every=30',
             f'--out_dir={tmp_path}/run').ok()
    row, = tiny.rows(tmp_path / 'run', 'val_loss')
    assert row['exact_match'] == 1
    shown = tiny.run('sample.py', f'--out_dir={tmp_path}/run', '--eval=both', '--json=true',
                     '--device=cpu').ok()
    assert json.loads(shown.out)['exact_match'] == 1
