"""Rows of samples, bad ones among them, and the batches that data.py makes of them."""
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import encode, make_processor, picture, sample, write_set
from test_data import located
from test_pictures import bomb

import data
import processor as processors
import tasks
from answering import prompt_of
from data import Batches, InOrder, Order
from pictures import Eyes, on_background
from processor import collate
from shards import BadSample, Folder
from tokenizer import Bytes

BOS, EOS, PAD, IMAGE = 256, 257, 258, 259


@pytest.fixture(scope='module')
def emoji(tmp_path_factory):
    """A data set of 5 + 7 + 3 samples."""
    return write_set(tmp_path_factory.mktemp('sets') / 'toy', [5, 7, 3])


# -----------------------------------------------------------------------------------------------
# samples to rows


class PadIsEos(Bytes):
    """Many real tokenizers pad with their end token."""

    def __init__(self):
        super().__init__()
        self.pad_id = self.eos_id


def batch_of(processor, *samples, **options):
    """A batch of samples, {extension: bytes}; None is a placeholder."""
    pieces = [p | {'part': 0} if p else None for m in samples
              for p in (processor.pieces(m) if m else [None])]
    return collate(pieces, processor, **options)


def test_a_row_is_picture_bos_prompt_newline_then_caption_eos():
    processor = make_processor(16, 16, 4, prompt='en')
    ids = [IMAGE] * 4 + [BOS, *b'en\n', *b'cat', EOS]
    assert prompt_of(processor)[0] == ids[:8]
    assert prompt_of(processor, 'x')[0] == [IMAGE] * 4 + [BOS, *b'x\n']
    batch = batch_of(processor, {'png': encode(picture(1)), 'txt': b' cat\n'})
    assert batch['tokens'].tolist() == [ids + [PAD] * 4]
    assert batch['targets'].tolist() == [[-100] * 7 + [*b'cat', EOS] + [-100] * 5], (
        'shifted; the answer and its end')
    assert batch['blocks'].tolist() == [[0] * 8 + [1] * 8]
    assert batch['segments'].tolist() == [[1] * 12 + [0] * 4]
    assert batch['texts'] == ['cat'] and batch['pixels'].shape == (1, 16, 16, 3)
    assert batch['pixels'].dtype == np.uint8
    assert (batch['pixels'][0] == on_background(picture(1))).all(), 'on white, not changed'
    assert batch['num_tokens'] == 12 and batch['num_targets'] == 4


def test_the_end_is_learned_where_pad_and_end_are_one_token():
    batch = batch_of(make_processor(12, 16, 4, tokenizer=PadIsEos()), sample(1, 'ab'))
    assert batch['tokens'].tolist() == [[IMAGE] * 4 + [BOS, *b'\nab', EOS] + [EOS] * 3]
    assert batch['targets'].tolist() == [[-100] * 5 + [*b'ab', EOS] + [-100] * 4]
    assert batch['segments'].tolist() == [[1] * 9 + [0] * 3]


def test_a_row_without_a_picture_is_causal_text():
    processor = make_processor(12, 16, 4, prompt='prompt')
    batch = batch_of(processor, {'txt': 'zoë'.encode()})
    assert batch['tokens'][0, :6].tolist() == [BOS, *'zoë'.encode(), EOS]
    assert batch['targets'].tolist() == [[*'zoë'.encode(), EOS] + [-100] * 7]
    assert 'blocks' not in batch and 'pixels' not in batch
    mixed = batch_of(make_processor(12, 16, 4), {'txt': b'zoe'}, sample(1, 'q'))
    assert mixed['pixels'].shape[0] == 1 and mixed['blocks'][1].tolist() == [0] * 6 + [1] * 6
    assert mixed['blocks'][0].tolist() == [1] * 12 and mixed['pictures'].tolist() == [0, 1]


def test_a_language_model_leaves_pictures_out():
    processor = make_processor(12, form='text')
    batch = batch_of(processor, {'png': b'broken', 'txt': b'dog'})
    assert batch['tokens'][0, :5].tolist() == [BOS, *b'dog', EOS] and 'pixels' not in batch


def test_rows_that_can_not_be_are_bad_samples():
    processor = make_processor(12, 16, 4)
    for members, word in [({'png': b'1'}, 'no keys: nothing to answer; known'), ({}, 'none'), (
        {'png': encode(picture(1)), 'txt': b'\xff'}, 'UTF-8'), (sample(1, 'seven77'), '14 tokens'),
                          ({'png': b'x', 'txt': b'a'}, 'decoded'),
                          ({'json': b'{'}, 'json'), ({'json': b'[1]'}, 'object'),
                          ({'json': b'[' * 100_000}, 'json'), ({'json': b'{"text": 3}'}, 'text'),
                          ({'json': b'{"text": "\\ud800"}'}, 'surrogate'),
                          ({'json': b'{"style": ["\\uDC00"], "text": "a"}'}, 'surrogate'),
                          ({'json': b'{"messages": null, "suffix": "a"}'}, 'messages: expected'),
                          ({'json': b'{"messages": ["a"], "suffix": "a"}'}, 'messages: expected'),
                          ({'json': b'{"messages": []}'}, 'read by processor=chat')]:
        with pytest.raises(BadSample, match=word):
            processor.pieces(members)
    assert len(processor.pieces(sample(1, 'fives'))[0]['tokens']) == 12, 'as long as it may be'
    # a pair of halves is a character
    pair, = processor.pieces({'json': b'{"text": "\\ud83d\\ude00"}'})
    assert pair['text'] == '\U0001f600'


def test_what_is_cut_or_left_out_is_said_once(capsys):
    """A text of very many rows, of which every token is learned once; captions over CLIP's 77."""
    from usage import SAID
    SAID.clear()
    processor = make_processor(8, form='text')
    for _ in range(2):
        pieces = processor.pieces({'txt': b'abcdefg ' * 1000})
        assert sum((piece['targets'] != -100).sum() for piece in pieces) == 8001
    assert capsys.readouterr().err == ('\na text of 8002 tokens becomes 1001 rows of seq_len=8, '
                                       'none of it is left out (said once)\n')
    if 't2i' in tasks.names():      # which may be deleted
        processor = make_processor(12, 16, task='t2i', denoiser='unet')
        for caption in ('short', 'much longer than twelve'):
            members = {'png': encode(picture(1)), 'txt': caption.encode()}
            assert len(processor.pieces(members)[0]['tokens']) == 12
        assert 'a caption of 23 tokens: CLIP reads the first 10' in capsys.readouterr().err


def test_a_key_that_a_form_asks_for_and_a_sample_lacks_is_named(tmp_path):
    (tmp_path / 'mine.py').write_text('def ask(sample, p):\n    return [(sample["answer"], 2)]\n')
    processor = make_processor(12, form=f'{tmp_path}/mine.py:ask')
    assert processor.pieces({'json': b'{"answer": "yes"}'})[0]['targets'].tolist()[:2] == [
        *b'es']
    with pytest.raises(BadSample, match="'answer' is missing, it has question, text"):
        processor.pieces({'json': b'{"question": "a"}', 'txt': b'b'})


def test_tensors_for_the_model():
    batch = batch_of(make_processor(12, 16, 4), sample(1, 'q'))
    out = processors.to_device(batch, 'cpu', make_processor(12, 16, 4))
    rows = 'tokens', 'targets', 'blocks', 'segments'
    assert set(out) == {*rows, 'pixels', 'num_targets'} and out['num_targets'] == 2
    assert all(out[k].dtype == torch.long and out[k].tolist() == batch[k].tolist() for k in rows)
    assert out['pixels'].shape == (1, 3, 16, 16) and out['pixels'].dtype == torch.float32
    close = torch.testing.assert_close
    extremes = Eyes().to_tensor(np.array([[[[0, 255, 51]]]], np.uint8), 'cpu')
    close(extremes, torch.tensor([-1.0, 1.0, -0.6]).view(1, 3, 1, 1))
    rows = np.arange(18, dtype=np.uint8).reshape(1, 2, 3, 3)
    green_of_lower_row = torch.tensor([10, 13, 16.0]) / 127.5 - 1
    close(Eyes().to_tensor(rows, 'cpu')[0, 1, 1], green_of_lower_row)
    other = Eyes(mean=0.4, std=0.2).to_tensor(np.array([[[[0, 255, 51]]]], np.uint8), 'cpu')
    close(other, torch.tensor([-2.0, 3.0, -1.0]).view(1, 3, 1, 1))
    p = make_processor(12, 16, 4, mean=0.4, std=0.2)
    close(processors.to_device(batch, 'cpu', p)['pixels'], (out['pixels'] + 0.2) / 0.4)


# -----------------------------------------------------------------------------------------------
# batches


def toy(emoji, seed=7, prompt=''):
    folder = Folder(str(emoji))
    order = Order([folder.sizes], [1.0], seed=1, lanes=4, window=8)
    return Batches([folder], order, make_processor(24, 16, 4, prompt=prompt), seed)


def same(a, b):
    """Are two batches equal in every entry?"""
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[k]), np.asarray(b[k]))
                                        for k in a)


def test_workers_change_nothing(emoji):
    positions = np.split(np.arange(32), 8)
    alone = list(data.loader(toy(emoji), positions, 0))
    workers = list(data.loader(toy(emoji), positions, 2))
    assert len(alone) == 8 and all(map(same, alone, workers))
    assert all(same(batch, toy(emoji)[p]) for batch, p in zip(workers, positions))
    assert any((b['pixels'] != c['pixels']).any()
               for b, c in zip(alone, data.loader(toy(emoji, None), positions)))


def test_ranks_change_nothing(emoji):
    whole = toy(emoji)[np.arange(16, 24)]
    for world, micro in ((2, 4), (2, 2), (4, 2), (8, 1)):
        for rank in range(world):
            mine = np.arange(16 + rank, 24, world)
            for part in np.split(mine, range(micro, len(mine), micro)):
                batch = toy(emoji)[part]
                assert all((batch[k] == whole[k][part - 16]).all()
                           for k in ('tokens', 'targets', 'blocks', 'segments', 'pixels'))


def test_a_position_seen_again_in_the_next_epoch_is_augmented_anew(emoji):
    batches = toy(emoji)
    rows = located(batches.order, np.arange(45))
    twins = [(i, j) for i in range(15) for j in range(15, 45) if rows[i][2:] == rows[j][2:]]
    assert len(twins) == 30
    pixels = batches[np.arange(45)]['pixels']
    assert sum((pixels[i] != pixels[j]).any() for i, j in twins) > 25, (
        'few may be left as they are both times')
    plain = toy(emoji, None)[np.arange(45)]['pixels']
    assert all((plain[i] == plain[j]).all() for i, j in twins)


def test_a_batch_holds_what_the_order_says(emoji):
    batches = toy(emoji, None)
    names = {(s, i): folder_row['txt'].decode() for s, n in enumerate((5, 7, 3)) for i in range(n)
             for folder_row in [batches.folders[0].read(s, i)]}
    batch = batches[np.arange(30, 45)]
    assert batch['texts'] == [names[row[2:]] for row in located(batches.order, np.arange(30, 45))]
    numbers = [int(text.split()[1]) for text in batch['texts']]
    assert all((on_background(picture(k)) == pixels).all()
               for k, pixels in zip(numbers, batch['pixels']))


@pytest.mark.filterwarnings('ignore')
def test_bad_samples_become_rows_that_weigh_nothing(tmp_path):
    bad = {'cut': {'png': encode(picture(1))[:60], 'txt': b'a'},
           'bomb': {'png': bomb(30000), 'txt': b'a'},
           'latin': {'png': encode(picture(1)), 'txt': 'é'.encode('latin-1')},
           'mute': {'png': encode(picture(1))},
           'long': sample(1, 'a caption of more than its share')}
    samples = [('good0', sample(0)), *bad.items(), ('good1', sample(1))]
    folder = Folder(str(write_set(tmp_path / 'set', [samples])))
    batches = Batches([folder], InOrder(folder.sizes), make_processor(24, 16, 4))
    batch = batches[np.arange(7)]
    assert len(batch['bad']) == 5
    assert all('00000000.tar' in line and key in line for key, line in zip(bad, batch['bad']))
    assert (batch['targets'][1:6] == -100).all() and (batch['segments'][1:6] == 0).all()
    assert (batch['tokens'][1:6] == PAD).all() and len(batch['pixels']) == 2
    assert batch['texts'][1:6] == [''] * 5
    alone = batches[np.array([0, 6])]
    assert all((batch[k][[0, 6]] == alone[k]).all()
               for k in ('tokens', 'targets', 'blocks', 'segments'))
    assert (batch['pixels'] == alone['pixels']).all() and not alone['bad']
    with_workers = list(data.loader(batches, [np.arange(7)], 1))[0]
    assert same(batch, with_workers)
    only = batches[np.arange(1, 6)]
    assert 'pixels' not in only and (only['targets'] == -100).all()


@pytest.mark.parametrize('workers', [0, 1])
def test_a_shard_that_is_gone_or_damaged_is_an_error_that_names_it(tmp_path, workers):
    path = write_set(tmp_path / 'set', [3, 3])
    os.truncate(path / '00000001.tar', 700)
    folder = Folder(str(path))
    batches = Batches([folder], InOrder(folder.sizes), make_processor(24, 16, 4))
    good, cut = data.loader(batches, [np.arange(3), np.arange(2, 5)], workers)
    assert 'error' not in good and not good['bad']
    assert '00000001.tar' in cut['error'] and '\n' not in cut['error'], (
        'a line for the user, not a placeholder')
    (path / '00000000.tar').unlink()
    gone = Batches([Folder(str(path))], batches.order, batches.processor)[np.arange(2)]
    assert '00000000.tar' in gone['error']


def test_batches_travel_to_workers_that_are_not_forked(emoji):
    """Pickled, as under spawn and forkserver: the default on macOS, and on Linux from Python 3.14
    on."""
    batches = toy(emoji)
    batches[np.arange(4)]
    assert same(pickle.loads(pickle.dumps(batches))[np.arange(9)], batches[np.arange(9)])
