"""logs.py: rows that a resume takes again, the picture of the losses, what GPUs could do."""
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

import leftovers
import logs
import logs_more


def row(step, **more):
    return json.dumps(dict(step=step, **more)) + '\n'


def test_rows_of_steps_that_come_again_are_dropped(tmp_path):
    path = tmp_path / 'log.jsonl'
    kept = row(1, loss=2.0) + row(2, loss=1.5) + row(2, val='held', val_loss=1.6)
    path.write_text(kept + row(3, loss=1.0) + '{"step": 2, "lo')
    assert leftovers.cut_log(str(path), 2) == 1
    assert path.read_text() == kept and len(list(tmp_path.iterdir())) == 1
    assert leftovers.cut_log(str(path), 2) == 0 and path.read_text() == kept


@pytest.mark.parametrize('damage', [
    b'{"step": 2, "lo', bytes(300), bytes(300) + b'\n', b'\xff\xfe\x80\n', b'null\n', b'[]\n5\n',
    b'{"loss": 1}\n', b'{"step": "2"}\n', b'[' * 100_000 + b'\n'],
    ids=['torn', 'zeros', 'a row of zeros', 'no UTF-8', 'null', 'no objects', 'no step', 'a text',
         'deep'])
@pytest.mark.parametrize('place', [0, 1, 2])
def test_no_good_row_is_lost_beside_what_is_damaged(tmp_path, damage, place):
    """Zeros that stand before a row, as after a power failure, leave the row as it is."""
    path, good = tmp_path / 'log.jsonl', [row(step, loss=1.5).encode() for step in (1, 2)]
    is_torn = not damage.endswith(b'\n') and damage.strip(b'\0')
    # what was torn ended there: nothing is behind it but a row that another command began
    lines = [*good[:place], damage + (b'\n' if is_torn and place < 2 else b''), *good[place:]]
    path.write_bytes(b''.join(lines))
    assert leftovers.cut_log(str(path), 5) == len(
        [line for line in damage.split(b'\n') if line.strip(b'\0')])
    assert path.read_bytes() == b''.join(good)


def test_a_row_that_only_lacks_its_end_is_one(tmp_path):
    path = tmp_path / 'log.jsonl'
    path.write_text(row(1, loss=2.0) + row(2, loss=1.5).strip())
    assert leftovers.cut_log(str(path), 2) == 0
    assert path.read_text() == row(1, loss=2.0) + row(2, loss=1.5)


def drawn(out):
    return np.array(Image.open(out / 'loss.png').convert('RGB')).astype(int)


def test_each_data_set_has_a_curve_of_its_own(tmp_path):
    """A row more of one of them changes the picture, a row that is not whole does not."""
    pictures = []
    log = row(1, loss=2.0) + row(2, loss=1.5)
    validated = [row(2, val='a', val_loss=1.6), row(2, val='train', val_loss=1.0)]
    for more in ('', *validated, '{"step": 3'):
        log += more
        (tmp_path / 'log.jsonl').write_text(log)
        logs.plot(str(tmp_path), ['a', 'train'])
        pictures.append(drawn(tmp_path))
    assert (pictures[0] != pictures[1]).any() and (pictures[1] != pictures[2]).any()
    assert (pictures[2] == pictures[3]).all()


def test_nothing_to_draw_is_no_error(tmp_path):
    (tmp_path / 'log.jsonl').write_text('')
    logs.plot(str(tmp_path), [])
    assert drawn(tmp_path).std() > 0        # axes, without a curve


@pytest.mark.parametrize('name, expected', [
    ('NVIDIA H200', (989e12, 67e12)), ('NVIDIA A100-SXM4-80GB', (312e12, 19.5e12)),
    ('NVIDIA L4', (121e12, 30e12)), ('NVIDIA GeForce RTX 4090', (165e12, 83e12)),
    ('NVIDIA L40S', (None, None)), ('NVIDIA RTX A1000', (None, None)),
])
def test_a_gpu_is_known_by_its_whole_name(name, expected):
    found = [logs_more.peak_of_gpu(name, dtype) for dtype in ('bfloat16', 'float32')]
    assert tuple(found) == expected


def test_a_row_has_an_mfu_where_the_peak_is_known(tmp_path):
    assert logs.peak_flops('cpu', 'float32', 1) is None
    since = dict(steps=2, samples=16, tokens=10, seconds=4.0, data=1.0, val=0.0, save=0.0)
    assert 'mfu' not in logs.speed(since, 1, 3e9, None)
    assert logs.speed(since, 1, 3e9, 48e9)['mfu'] == 0.25


def test_tokens_of_each_data_set():
    """Packed rows, rows with padding, full rows, and tokenized sequences."""
    packed = dict(parts=np.array([[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]),
                  segments=np.array([[1, 1, 2, 2, 0], [1, 1, 2, 0, 0]]))
    padded = dict(parts=np.array([[0], [1]]), segments=np.array([[1, 1, 0], [1, 0, 0]]))
    full = dict(parts=np.array([[1], [1]]), tokens=np.zeros((2, 3)))
    ids = dict(parts=np.array([[0], [1]]), ids=np.array([[5, 6, 65535], [7, 8, 9]], np.uint16))
    batches = [packed, padded, full, ids]
    expected = [[2, 5], [2, 1], [0, 6], [2, 3]]
    assert [logs.tokens_of([batch], 2) for batch in batches] == expected
    assert logs.tokens_of(batches, 2) == [6, 15]
    assert logs.tokens_of([dict(num_tokens=3), dict(num_tokens=4)], 1) == [7]


def test_a_row_is_json_whatever_the_loss_is(tmp_path):
    path = tmp_path / 'log.jsonl'
    logs.append(path, dict(step=1, loss=math.nan, grad_norm=math.inf, lr=0.5))

    def refuse(word):
        raise ValueError(word)

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == dict(step=1, loss=None, grad_norm=None, lr=0.5)


def test_without_git_a_run_is_described_all_the_same(monkeypatch):
    monkeypatch.setenv('PATH', '')
    found = logs.environment('cpu', 1)
    assert found['git'] == found['diff'] == '' and found['torch']


@pytest.mark.skipif(not shutil.which('git'), reason='no git')
def test_outside_of_a_repository_git_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, '__file__', str(tmp_path / 'logs.py'))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    found = logs.environment('cpu', 1)
    assert found['git'] == found['diff'] == '' and found['world'] == 1 and found['torch']
