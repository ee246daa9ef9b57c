"""However a batch is cut, into ranks, micro-batches, workers or packed rows, a run is the same;
and samples of all kinds may stand in one batch."""
import io
import json

import numpy as np
import pytest
import tiny
from conftest import encode, picture, sample, write_set
from test_train import begin_run, copy, one_by_one, show_steps
from tiny import names, rows, run, weights


@pytest.fixture(scope='module')
def data():
    return tiny.data_dir()


@pytest.fixture(scope='module')
def unequal(data):
    """20 steps on captions of 1 to 49 characters, a third without a picture; validated on an odd
    number."""
    return [*tiny.FLAGS, f'--data_dir={data}', '--mix={"long": 1, "plain": 0.5}',
            '--val={"odd": "odd"}', '--max_steps=20', '--num_checkpoints=2', '--lr=1e-3',
            *tiny.DROPOUT]


@pytest.fixture(scope='module')
def alone(unequal, tmp_path_factory):
    out = tmp_path_factory.mktemp('alone') / 'run'
    run('train.py', *unequal, f'--out_dir={out}').ok()
    return out


def assert_equal_runs(out, alone, tolerance=1e-5):
    for key in ('loss', 'val_loss'):
        got, expected = ([row[key] for row in rows(x, key)] for x in (out, alone))
        assert got == pytest.approx(expected, abs=tolerance)
    for key in ('step', 'samples', 'tokens', 'epoch', 'lr'):
        assert [row[key] for row in rows(out)] == [row[key] for row in rows(alone)]
    assert [row['grad_norm'] for row in rows(out)] == pytest.approx(
        [row['grad_norm'] for row in rows(alone)], rel=1e-3)
    assert rows(out, 'val_loss')[-1].get('exact_match') == rows(alone, 'val_loss')[-1].get(
        'exact_match')


@pytest.fixture(scope='module')
def two_ranks(unequal, tmp_path_factory):
    out = tmp_path_factory.mktemp('ranks') / 'run'
    run('train.py', *unequal, '--micro_batch_size=3', f'--out_dir={out}', torchrun=2).ok()
    return out


def test_two_ranks_with_accumulation_give_the_same_losses(two_ranks, alone):
    assert_equal_runs(two_ranks, alone)
    assert names(two_ranks) == names(alone)
    assert show_steps(two_ranks, '1:4') == show_steps(alone, '1:4')
    for key, value in weights(two_ranks).items():
        np.testing.assert_allclose(value, weights(alone)[key], atol=1e-3)


def test_one_process_goes_on_where_two_ranks_stopped(two_ranks, alone, unequal, tmp_path):
    out = copy(two_ranks, tmp_path / 'run', 'step_00000020')
    run('train.py', *unequal, f'--out_dir={out}').ok()
    assert_equal_runs(out, alone)


@pytest.mark.parametrize('size', [1, 4])
def test_micro_batches_give_the_same_losses(alone, unequal, tmp_path, size):
    run('train.py', *unequal, f'--micro_batch_size={size}', f'--out_dir={tmp_path / "run"}').ok()
    assert_equal_runs(tmp_path / 'run', alone)


def test_packed_rows_and_long_texts_cut_in_any_way(unequal, tmp_path):
    """Texts longer than a row, rows shared or not, one rank or two with another number of rows:
    the same losses."""
    flags = [*tiny.LLM_FLAGS, *unequal[len(tiny.FLAGS):-2], '--seq_len=16',
             '--val={"long": "long"}', '--max_steps=6', '--decoder.dropout=0.1']
    run('train.py', *flags, f'--out_dir={tmp_path / "plain"}').ok()
    run('train.py', *flags, '--pack=true', '--micro_batch_size=3',
        f'--out_dir={tmp_path / "packed"}').ok()
    run('train.py', *flags, '--pack=true', '--micro_batch_size=2',
        f'--out_dir={tmp_path / "ranks"}', torchrun=2).ok()
    for name in ('packed', 'ranks'):
        assert_equal_runs(tmp_path / name, tmp_path / 'plain')
    assert rows(tmp_path / 'plain', 'loss/long') and rows(tmp_path / 'plain', 'loss/plain')


@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
    """A data set of each kind: captions, text, token sequences, actions; and what a mix of them is
    called."""
    folder = tmp_path_factory.mktemp('kinds')
    npz = io.BytesIO()
    np.savez(
        npz, actions=np.ones((3, 2)), is_pad=np.array([False, False, True]), proprio=np.zeros(1))
    robot = {'cam.png': encode(picture(1)),
             'json': b'{"instruction": "push the red thing", "suffix": "red"}',
             'lowdim.npz': npz.getvalue()}
    ids = np.random.default_rng(0).integers(0, 256, (10, 33)).astype(np.uint16)
    sets = {'captions': [(f'{i}', sample(i)) for i in range(20)], 'robot': [('r0', robot), (
        'r1', robot)], 'text': [(f'{i}', {'txt': b'only words ' * (i % 4 + 1)}) for i in range(9)],
            'tokens': [('0', {'tokens.bin': ids[:6].tobytes()}),
                       ('1', {'tokens.bin': ids[6:].tobytes()})]}
    for name, samples in sets.items():
        write_set(folder / name, [samples])
    (folder / 'tokens' / 'manifest.jsonl').write_text(
        '{"shard": "00000000", "num_sequences": 10, "sequence_length": 33}')
    return [f'--data_dir={folder}', '--mix={"captions": 2, "robot": 1, "text": 1, "tokens": 1}',
            '--max_steps=8', '--lanes=2', '--log_every=1', '--processor=text', *tiny.DROPOUT]


@pytest.fixture(scope='module')
def cotrained(kinds, tmp_path_factory):
    out = tmp_path_factory.mktemp('cotrained') / 'run'
    run('train.py', *tiny.FLAGS, *kinds, f'--out_dir={out}').ok()
    return out


def test_kinds_mix_in_a_batch_and_each_has_its_loss(cotrained):
    found = rows(cotrained)
    for row in found:
        parts = [row[f'loss/{name}']
                 for name in ('captions', 'robot', 'text', 'tokens') if f'loss/{name}' in row]
        assert len(parts) > 1 and min(parts) <= row['loss'] <= max(parts)
    assert all(any(f'loss/{name}' in row for row in found)
               for name in ('captions', 'robot', 'text', 'tokens'))
    counted = json.loads((cotrained / 'checkpoints/latest/shards.json').read_text())
    assert sum(part['samples'] for part in counted.values()) == 96
    for name, size in (('captions', 20), ('robot', 2), ('text', 9), ('tokens', 10)):
        assert found[-1][f'epoch/{name}'] == pytest.approx(
            counted[name]['samples'] / size, abs=1e-4)
        assert counted[name]['whole_epochs'] == counted[name]['samples'] // size
    shown = [line[1] for lines in show_steps(cotrained, '1:9').values() for line in lines]
    assert all(shown.count(name) == counted[name]['samples'] for name in counted)


@pytest.mark.parametrize(
    'extra', [['--workers=2'], ['--micro_batch_size=3'], ['--pack=true', '--micro_batch_size=2']])
@pytest.mark.parametrize('torchrun', [0, 2])
def test_a_mix_of_kinds_is_the_same_however_it_is_cut(cotrained, kinds, tmp_path, extra, torchrun):
    run('train.py', *tiny.FLAGS, *kinds, *extra, f'--out_dir={tmp_path / "run"}',
        torchrun=torchrun).ok()
    for ours, theirs in zip(rows(tmp_path / 'run'), rows(cotrained), strict=True):
        assert ours['tokens'] == theirs['tokens']
        keys = [k for k in theirs if k.startswith(('loss', 'epoch'))]
        assert [ours[k] for k in keys] == pytest.approx([theirs[k] for k in keys], abs=2e-5)


def test_the_first_loss_is_one_mean_over_the_targets_of_its_samples(
    alone, unequal, data, tmp_path):
    """Against the samples one by one, through the weights that the seed gives."""
    out = tmp_path / 'run'
    run('train.py', *unequal, '--augment=false', '--seed=3', '--vit.dropout=0',
        '--decoder.dropout=0', f'--out_dir={out}').ok()
    begun = begin_run(out)
    loss = targets = 0
    for _, dataset, _, _, key in show_steps(out, '1:2')[1]:
        one = one_by_one(begun, data / dataset, {key})[key]
        loss, targets = loss + one[0], targets + one[1]
    assert rows(out)[0]['loss'] == pytest.approx(loss / targets, rel=1e-5)
