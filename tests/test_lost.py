"""max_bad_shards: shards that are gone or damaged become counted placeholders (lost.py)."""
import json
import shutil

import numpy as np
import pytest
import tiny
from conftest import make_processor, write_set
from tiny import losses, rows, run

import data
import lost
from shards import Folder
from tokenizer import Bytes

WORDS = [(f'word-{i:02}', {'txt': f'the number {i} in words'.encode()}) for i in range(24)]


def words(folder):
    """A set of four shards of six texts."""
    return write_set(folder, [WORDS[i:i + 6] for i in range(0, 24, 6)])


def sequences(folder):
    """A set of two shards of four sequences of five ids."""
    ids = np.arange(40, dtype=np.uint16).reshape(2, 20)
    halves = [[(f'{i:03}', {'tokens.bin': half.tobytes()})] for i, half in enumerate(ids)]
    write_set(folder, halves, manifest=False)
    rows = [dict(shard=f'{i:08d}', num_sequences=4, sequence_length=5, dtype='uint16')
            for i in range(2)]
    (folder / 'manifest.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder


def batches_of(folder, may_lose):
    """The first 30 positions, five at a time."""
    opened = Folder(str(folder))
    seq_len = opened.sequence_length - 1 if opened.sequence_length else 40
    processor = make_processor(seq_len, tokenizer=Bytes(), task='llm')
    order = data.Order([opened.sizes], [1.0], lanes=1)
    batches = data.Batches([opened], order, processor)
    if may_lose:
        lost.spare(batches)
    return order, [batches[np.arange(i, i + 5)] for i in range(0, 30, 5)]


def break_count(path):
    """Another shard with a sample less."""
    write_set(path.parent / 'other', [WORDS[:5]])
    shutil.move(path.parent / 'other' / '00000000.tar', path)


@pytest.mark.parametrize('make', [words, sequences])
@pytest.mark.parametrize('harm', [
    lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:700]),
    break_count], ids=['gone', 'cut', 'another count'])
def test_positions_of_a_lost_shard_are_empty_and_nothing_shifts(tmp_path, make, harm):
    folder = make(tmp_path / 'set')
    key = 'tokens' if make is words else 'ids'
    _, whole = batches_of(folder, True)
    assert not any(batch['bad'] for batch in whole)
    harm(folder / '00000001.tar')
    with pytest.raises(KeyError):
        [batch[key] for batch in batches_of(folder, False)[1]]

    order, spared = batches_of(folder, True)
    is_lost = (order.locate(np.arange(30))[2] == 1).reshape(6, 5)
    assert is_lost.any()
    for before, now, gone in zip(whole, spared, is_lost):
        assert np.array_equal(before[key][~gone], now[key][~gone])
        padding = Bytes().pad_id if make is words else 65535
        assert (now[key][gone] == padding).all()
    found, number = lost.take_lines(spared)
    assert list(found) == [f'{folder}/00000001.tar'] and number == is_lost.sum()
    assert not any(batch['bad'] for batch in spared)


@pytest.fixture
def flags(tmp_path):
    """Flags of a run of three steps, all of one epoch, on a set that has lost a shard."""
    folder = words(tmp_path / 'set')
    (folder / '00000002.tar').unlink()
    return [*tiny.LLM_FLAGS, f'--mix={{"{folder}": 1}}', '--max_steps=4', '--num_checkpoints=2',
            '--batch_size=6']


def test_a_lost_shard_is_counted_also_over_a_resume_and_ranks(flags, tmp_path):
    for name, extra, ranks in (('one', [], 0), ('two', ['--workers=2'], 2)):
        result = run('train.py', *flags, '--max_bad_shards=1', *extra,
                     f'--out_dir={tmp_path / name}', torchrun=ranks).ok()
        assert result.out.count('lost shard') == 1 and '00000002.tar' in result.out
    found = rows(tmp_path / 'one')
    assert [row['bad_shards'] for row in found][-1] == 1
    assert [row['lost_samples'] for row in found][-1] == 6 and found[-1]['bad_samples'] == 0
    others = rows(tmp_path / 'two')
    assert [row['lost_samples'] for row in others] == [row['lost_samples'] for row in found]
    expected = [row['loss'] for row in found]
    assert [row['loss'] for row in others] == pytest.approx(expected, abs=1e-6)

    before = losses(tmp_path / 'one')
    shutil.rmtree(tmp_path / 'one/checkpoints/step_00000004')
    again = run('train.py', *flags, '--max_bad_shards=1', f'--out_dir={tmp_path / "one"}').ok()
    assert losses(tmp_path / 'one') == before
    # it was named before it stopped
    saved = tmp_path / 'one/checkpoints/step_00000002/progress.json'
    named = bool(json.loads(saved.read_text()).get('lost_shards'))
    assert again.out.count('lost shard') == (0 if named else 1)


def test_more_lost_shards_than_allowed_end_the_run(flags, tmp_path):
    result = run('train.py', *flags, f'--out_dir={tmp_path / "none"}')
    result.refused('00000002.tar', code=1)
    (tmp_path / 'set/00000000.tar').unlink()
    run('train.py', *flags, '--max_bad_shards=1', f'--out_dir={tmp_path / "few"}').failed(
        '2 shards are lost', 'max_bad_shards=1', str(tmp_path / 'set'))
