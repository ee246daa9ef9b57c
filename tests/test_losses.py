"""A loss that somebody changes is that of training and of validation: one path serves both."""
import pytest
import tiny

FOCAL = '''"""A language model with focal loss, as docs/tasks.md has it."""
import torch

import model
from model import Learned
from tasks.llm import *  # noqa: F403
from tasks.llm import SampleSettings, TrainSettings, form  # noqa: F401

plain = model.token_losses


def focal(*args, **kwargs):
    losses, counts, places = plain(*args, **kwargs)
    return Learned(losses * (1 - torch.exp(-losses)) ** 2, counts, places)


model.token_losses = focal
'''


def losses_of(task, out_dir):
    """What is trained and what is validated of a step of lr 0 that sees all samples."""
    flags = [flag for flag in tiny.LLM_FLAGS if not flag.startswith(('--task', '--lr'))]
    tiny.run('train.py', f'--task={task}', *flags, f'--data_dir={tiny.data_dir()}', '--lr=0',
             '--mix={"words": 1}', '--val={"held": "words"}', '--max_steps=1',
             f'--out_dir={out_dir}').ok()
    trained, = tiny.rows(out_dir)
    validated, = tiny.rows(out_dir, 'val_loss')
    return trained['loss'], validated['val_loss']


def test_validation_has_the_loss_that_is_trained(tmp_path):
    (tmp_path / 'mine.py').write_text(FOCAL)
    trained, validated = losses_of('llm', tmp_path / 'plain')
    assert validated == pytest.approx(trained, rel=1e-5)
    focal, validated = losses_of(tmp_path / 'mine.py', tmp_path / 'focal')
    assert validated == pytest.approx(focal, rel=1e-5)
    # at random weights a token's probability is about 1 / 320
    assert 0.97 * trained < focal < 0.9999 * trained
