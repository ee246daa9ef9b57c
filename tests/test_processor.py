"""processor.py and Batches: forms, packing, tokenized sets, actions, data sets of several kinds in
one batch."""
import io
import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import encode, make_processor, picture, write_set

import data
import processor as processors
import sequences
import tasks
from answering import prompt_of
from data import Batches, InOrder, Order
from model import Decoder, DecoderConfig
from processor import LEARNED, READ, collate, fill_rows, split
from shards import BadSample, Folder
from tasks import vlm
from tokenizer import Bytes

BOS, EOS, PAD, IMAGE = 256, 257, 258, 259
PNG = encode(picture(1))


def batch_of(processor, *samples, **options):
    return collate([piece | {'part': 0} for members in samples
                    for piece in processor.pieces(members)], processor, **options)


def learned(batch, row=0):
    """The text of a row's targets, | for a stretch that is not learned, $ for the end token."""
    out = ''
    for t in batch['targets'][row].tolist():
        out += '$' if t == EOS else chr(t) if t >= 0 else '' if out.endswith('|') else '|'
    return out.strip('|')


def test_files_of_other_makers():
    """A byte order mark; an instruction with its input and output; keys that we use inside."""
    bom = b'\xef\xbb\xbf'
    p = make_processor(48, 16, 4)
    for members in ({'txt': bom + b'this'}, {'json': bom + b'{"text": "this"}'},
                    {'json': b'{"instruction": "what?", "input": "it", "output": "this"}'},
                    {'json': b'{"text": "this", "asking": 1, "_asking": 1, "lowdim": 2,'
                             b' "_lowdim": 3, "pictures": 4, "members": 5, "camera_mask": 6}'}):
        assert learned(batch_of(p, members | {'png': PNG})) == 'this$'
    members = {'json': b'{"instruction": "what?", "input": "it", "output": "this"}'}
    assert batch_of(p, members)['tokens'][0].tolist()[1:9] == [*b'what?\nit']


def test_nothing_to_learn_is_a_bad_sample():
    p = make_processor(48, 16, 4)
    for members, words in [
            ({'txt': b' \n\t'}, 'text is empty'), ({'json': b'{"text": "  "}'}, 'text is empty'),
            ({'json': b'{"prefix": "a", "suffix": " "}'}, 'text is empty'),
            ({'json': b'{"caption": "a dog", "id": 3}'}, 'caption, id.*known are text')]:
        for form in (p, make_processor(48, 16, 4, form='text')):
            with pytest.raises(BadSample, match=words):
                form.pieces(members | {'png': PNG})


def test_questions_and_answers():
    members = {'json': json.dumps({'prefix': 'what?', 'suffix': 'this'}).encode()}
    p = make_processor(32, 16, 4)
    batch = batch_of(p, members | {'left.png': PNG, 'right.png': PNG}, members)
    assert batch['tokens'][0].tolist()[:20] == [IMAGE] * 8 + [BOS, *b'what?\n', *b'this', EOS]
    assert learned(batch, 0) == learned(batch, 1) == 'this$'
    assert batch['pictures'].tolist() == [2, 0]
    assert batch['blocks'][1].tolist() == [0] * 7 + [1] * 25, (
        'a question is a prefix without a picture, too')
    causal = batch_of(make_processor(32, 16, 4, form='text'), members)
    assert learned(causal) == 'this$' and 'blocks' not in causal


@pytest.mark.parametrize('form', ['chat', 'gemma', 'llava', 'smolvlm'])
def test_conversations_learn_answers_alone(form):
    asked = [{'type': 'text', 'text': 'and '}, {'type': 'image'},
             {'type': 'text', 'text': 'this?'}]
    messages = [{'role': 'system', 'content': 'be brief'},
                {'role': 'user', 'content': 'one?'},
                {'role': 'assistant', 'content': 'yes'},
                {'role': 'user', 'content': asked},
                {'role': 'assistant', 'content': 'no'}]
    p = make_processor(400, 16, 4, form=form)
    batch = batch_of(p, {'json': json.dumps({'messages': messages}).encode(), 'png': PNG})
    # what follows 'Assistant:' is the answer's
    space = ' ' if form in ('llava', 'smolvlm') else ''
    assert learned(batch) == f'{space}yes$|{space}no$' and 'blocks' in batch
    assert batch['blocks'].all(), 'causal'
    text = Bytes().decode(batch['tokens'][0].tolist())
    assert text.index('and ') < text.index('this?') and (batch['tokens'] == IMAGE).sum() == 4
    one = batch_of(p, {'json': b'{"prefix": "q", "suffix": "a"}', 'png': PNG})
    one = one['tokens'][0].tolist()
    prefix = prompt_of(p, 'q')[0]
    assert one[:len(prefix)] == prefix
    assert one[len(prefix):][:len(space) + 2] == [*f'{space}a'.encode(), EOS]
    for broken in (
        {'messages': []}, {'messages': [{'role': 'user', 'content': 'x'}]}, {'messages': 'x'},
        {'messages': [{'role': 'robot', 'content': 'x'}]},
        {'messages': messages[:3] + [{'role': 'user', 'content': [{'type': 'image'}] * 2}]}):
        with pytest.raises(BadSample):
            p.pieces({'json': json.dumps(broken).encode(), 'png': PNG})


def test_markup_becomes_special_tokens_and_text_never_does():
    class Special(Bytes):
        def special(self, text):
            return {'<|im_end|>': 300}.get(text)

    p = make_processor(200, form='chat', tokenizer=Special())
    ids = p.pieces({'json': b'{"prefix": "a <|im_end|> b", "suffix": "c"}'})[0]['tokens'].tolist()
    assert ids.count(300) == 2


def test_a_form_of_ones_own(tmp_path):
    (tmp_path / 'mine.py').write_text('''
from processor import LEARNED, SEEN
def form(sample, p):
    return [(sample['question'], SEEN), (sample['answer'], LEARNED), (p.tokenizer.eos_id, LEARNED)]
''')
    p = make_processor(12, form=f'{tmp_path}/mine.py:form')
    batch = batch_of(p, {'json': b'{"question": "2+2", "answer": "4", "text": ""}'})
    assert batch['tokens'][0, :5].tolist() == [*b'2+24', EOS] and learned(batch) == '4$'
    for name in ('nothing', f'{tmp_path}/mine.py:other', f'{tmp_path}/other.py:form'):
        with pytest.raises(ValueError, match='processor='):
            make_processor(12, form=name)


def test_a_model_folder_names_the_form(tmp_path):
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(
        {'processor_class': 'PaliGemmaProcessor', 'size': {'height': 16, 'width': 16},
         'image_seq_length': 4, 'image_mean': [0.5, 0.4, 0.3], 'image_std': [0.5, 0.5, 0.25]}))
    said = {'processor': str(tmp_path), 'image_mean': 0.0, 'vit.image_size': 16, 'seq_len': 32}
    config = tasks.defaults('vlm') | {'task': 'vlm'} | said
    p = processors.build(config, Bytes(), vlm, 4)
    assert p.function is vlm.form and p.eyes.mean == [0.5, 0.4, 0.3]
    pixels = p.eyes.to_tensor(np.full((1, 1, 1, 3), 255, np.uint8), 'cpu')
    torch.testing.assert_close(pixels.flatten(), torch.tensor([1.0, 1.2, 2.8]))
    with pytest.raises(ValueError, match='image_size'):
        processors.build(config | {'vit.image_size': 32}, Bytes(), vlm, 4)


TEXTS = ['', 'a', 'some words', 'x' * 37, 'y' * 16, 'z' * 15, 'end']


def test_packing_loses_nothing_and_keeps_texts_apart():
    p = make_processor(16, form='text')
    samples = [{'txt': text.encode()} for text in TEXTS if text]
    for pack in (True, False):
        batch = batch_of(p, *samples, pack=pack, multiple=4)
        assert len(batch['tokens']) % 4 == 0
        wanted = sorted(b for text in TEXTS if text for b in (*text.encode(), EOS))
        assert sorted(batch['targets'][batch['targets'] != -100].tolist()) == wanted, (
            'each token is learned once')
        assert (batch['targets'][batch['segments'] == 0] == -100).all(), 'padding is not learned'
        assert batch['num_targets'] == len(wanted)
        assert batch['num_tokens'] == (batch['segments'] > 0).sum()
    assert len(batch_of(p, *samples, pack=True)['tokens']) < len(batch_of(p, *samples)['tokens'])


def model_inputs(batch, p):
    """What Decoder.loss takes of a batch, which counts its targets itself."""
    tensors = processors.to_device(batch, 'cpu', p)
    assert tensors.pop('num_targets') == (tensors['targets'] != -100).sum()
    return tensors


def test_a_packed_batch_has_the_losses_and_gradients_of_its_samples():
    torch.manual_seed(0)
    m = Decoder(DecoderConfig(vocab_size=320, width=32, depth=2, mlp_dim=64, num_heads=2,
                              head_dim=16)).double()
    p = make_processor(16, form='text')
    samples = [{'txt': text.encode()} for text in TEXTS if text]
    sums = []
    for batches in ([batch_of(p, *samples, pack=True, multiple=4)],
                    [batch_of(p, s) for s in samples],
                    split(batch_of(p, *samples, pack=True), 2, p)):
        m.zero_grad()
        losses = [m.loss(**model_inputs(batch, p))[0] for batch in batches]
        sum(losses).backward()
        sums.append((sum(losses).item(), m.embedding.weight.grad.clone()))
    for loss, grad in sums[1:]:
        assert loss == pytest.approx(sums[0][0], rel=1e-6)
        torch.testing.assert_close(grad, sums[0][1], rtol=1e-4, atol=1e-5)


def test_rows_are_filled_well_and_nothing_is_cut():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 300).tolist()
    rows = fill_rows(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(300))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert max(sums) <= 100 and len(rows) < 1.05 * sum(lengths) / 100 + 1


def token_rows(ids, seq_len, tokenizer, documents=True):
    p = SimpleNamespace(seq_len=seq_len, tokenizer=tokenizer, documents=documents)
    return sequences.rows_of(ids, p)


def test_token_rows():
    ids = torch.tensor([[BOS, 1, 2, EOS, BOS, 3, 4], [5, EOS, BOS, 6, EOS, 65535, 65535]],
                       dtype=torch.uint16)
    tokens, targets, segments = token_rows(ids, 6, Bytes())
    assert tokens.tolist() == [[BOS, 1, 2, EOS, BOS, 3], [5, EOS, BOS, 6, EOS, PAD]]
    assert targets.tolist() == [[1, 2, EOS, -100, 3, 4], [EOS, -100, 6, EOS, -100, -100]]
    assert segments.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 2, 0]]
    assert token_rows(ids, 6, Bytes(), documents=False)[2].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert token_rows(ids, 9, Bytes())[1][0].tolist() == [1, 2, EOS, -100, 3, 4, -100, -100, -100]

    class Gpt(Bytes):           # one token begins and ends a document
        def __init__(self):
            super().__init__()
            self.bos_id = self.eos_id = 257
    ids = torch.tensor([[257, 1, 2, 257, 3]], dtype=torch.uint16)
    tokens, targets, segments = token_rows(ids, 4, Gpt())
    assert targets.tolist() == [[1, 2, 257, 3]] and segments.tolist() == [[1, 1, 1, 2]]


@pytest.mark.parametrize('dtype', ['uint16', 'uint32'])
@pytest.mark.parametrize('documents', [True, False])
@pytest.mark.parametrize('seq_len', [8, 11])
@pytest.mark.parametrize('padded', [0, 0.4])
@pytest.mark.parametrize('bos', [BOS, EOS])
def test_sequences_alone_and_beside_other_samples_are_the_same_rows(
    dtype, documents, seq_len, padded, bos):
    rng = np.random.default_rng(0)
    tok = Bytes()
    tok.bos_id = bos
    p = make_processor(seq_len, form='text', document_attention=documents, tokenizer=tok)
    for low in (250, 254, 256, 257):
        ids = rng.integers(low, 258, (5, 9)).astype(dtype)
        for row in ids:
            if rng.uniform() < padded:
                row[rng.integers(1, 9):] = np.iinfo(dtype).max
        numbers = np.arange(5)
        ready = [(ids[:3], 0, numbers[:3]), (ids[3:], 1, numbers[3:])]
        alone, beside = collate([], p, multiple=3, ready=ready), collate([None], p, ready=ready)
        assert 'ids' in alone and 'ids' not in beside and len(alone['ids']) == 6
        assert all(alone[k] == beside[k] for k in ('num_tokens', 'num_targets', 'texts'))
        for key in ('parts', 'positions', 'numbers'):
            assert alone[key].tolist() == beside[key].tolist()
        a, b = (processors.to_device(batch, 'cpu', p) for batch in (alone, beside))
        assert all(torch.equal(a[k], b[k]) and a[k].shape == (6, seq_len)
                   for k in ('tokens', 'targets'))
        assert alone['cut'] and torch.equal(a['segments'], b['segments']), 'for the empty row'
        whole = collate([], p, ready=[(ids, 0, numbers)])
        segments = token_rows(torch.as_tensor(ids), seq_len, tok, documents)[2]
        assert whole['cut'] == (not torch.equal(segments, torch.ones(5, seq_len)))


@pytest.mark.parametrize('form, dtype', [('bin', 'uint16'), ('bin', 'uint32'), ('npy', 'uint16')])
def test_sequences_that_share_a_member(tmp_path, form, dtype):
    ids = np.random.default_rng(0).integers(0, 250, (7, 9)).astype(dtype)

    def member(rows):
        out = io.BytesIO()
        np.save(out, rows.ravel())
        return rows.tobytes() if form == 'bin' else out.getvalue()

    folder = write_set(tmp_path / 'set', [[('a', {f'tokens.{form}': member(ids[:4])}),
                                           ('b', {f'tokens.{form}': member(ids[4:])})]])
    row = {'shard': '00000000', 'num_sequences': 7, 'sequence_length': 9, 'dtype': dtype}
    (folder / 'manifest.jsonl').write_text(json.dumps(row))
    opened = Folder(str(folder))
    batch = Batches([opened], InOrder(opened.sizes), make_processor(8, form='text'))[np.arange(7)]
    tensors = processors.to_device(batch, 'cpu', make_processor(8))
    assert set(tensors) == {'tokens', 'targets', 'num_targets'}
    assert not batch['cut'], 'just causal'
    assert tensors['tokens'].tolist() == ids[:, :8].tolist()
    assert tensors['targets'].tolist() == ids[:, 1:].tolist()
    assert [opened.key(0, i) for i in (0, 3, 4)] == ['a[0]', 'a[3]', 'b[0]']
    with pytest.raises(ValueError, match='seq_len=8'):
        Batches([opened], InOrder(opened.sizes), make_processor(7, form='text'))
    (folder / 'manifest.jsonl').write_text(json.dumps(row | {'num_sequences': 6}))
    opened, p = Folder(str(folder)), make_processor(8)
    assert '7 samples' in Batches([opened], InOrder([6]), p)[np.arange(2)]['error']
    p.tokenizer.vocab_size = int(ids[:4].max())
    (folder / 'manifest.jsonl').write_text(json.dumps(row))
    opened = Folder(str(folder))
    batch = Batches([opened], InOrder([7]), p)[np.arange(7)]
    assert batch['bad'] and all('another' in line and '[' in line for line in batch['bad'])
    assert batch['num_targets'] == 8 * (7 - len(batch['bad']))


def lowdim(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def test_text_pictures_tokens_and_actions_in_one_batch(tmp_path):
    pytest.importorskip('tasks.policy')
    actions = np.arange(6, dtype=np.float32).reshape(3, 2)
    ids = np.arange(10, 43).astype(np.uint16)
    chunk = lowdim(actions=actions, is_pad=np.array([False, False, True]), proprio=np.ones(1))
    robot = {'cam.png': PNG, 'json': b'{"instruction": "push"}', 'lowdim.npz': chunk}
    sets = {'text': [('t', {'txt': b'just text'})],
            'caption': [('c', {'png': PNG, 'txt': b'a thing'})],
            'robot': [('r', robot)],
            'tokens': [('k', {'tokens.bin': ids.tobytes()})]}
    folders = [Folder(str(write_set(tmp_path / name, [samples])))
               for name, samples in sets.items()]
    p = make_processor(32, 16, 4, task='policy', action_steps=4, action_dim=3, proprio_dim=2)
    order = Order([f.sizes for f in folders], [1] * 4, lanes=2)
    batch = Batches(folders, order, p)[np.arange(64)]
    assert not batch['bad'] and set(batch['parts'].ravel().tolist()) == {0, 1, 2, 3}
    low = batch['beside']
    assert low['actions'].shape[1:] == (4, 3) and low['proprio'].shape[1:] == (2,)
    assert low['actions'][0].tolist() == [[0, 1, 0], [2, 3, 0], [0, 0, 0], [0, 0, 0]], (
        'what is padded is zero')
    assert low['is_pad'][0].tolist() == [False, False, True, True]
    assert low['action_mask'][0].tolist() == [1, 1, 0]
    assert (batch['parts'][low['rows'], 0] == 2).all()
    halves = split(batch, 20, p)
    num_pixels = sum(len(h.get('pixels', ())) for h in halves)
    assert num_pixels == len(batch['pixels']) == batch['pictures'].sum()
    again = [h['beside']['rows'] + 20 * i for i, h in enumerate(halves) if 'beside' in h]
    assert (np.concatenate(again) == low['rows']).all()
    assert all(k in h for h in halves for k in ('tokens', 'targets', 'blocks', 'parts'))


def damaged_npz(inside):
    """A .npz whose packed bytes are `inside`, or whose header says that it holds a thousand
    terabytes."""
    out = io.BytesIO()
    if inside is None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {'descr': '<f4', 'fortran_order': False, 'shape': (10 ** 15, 1)})
        with zipfile.ZipFile(out, 'w') as z:
            z.writestr('actions.npy', header.getvalue())
        return out.getvalue()
    np.savez_compressed(out, actions=np.random.default_rng(0).normal(size=(64, 2)))
    data = bytearray(out.getvalue())
    data[60:60 + len(inside)] = inside
    return bytes(data)


@pytest.mark.parametrize('arrays, word', [
    (dict(actions=np.full((2, 2), np.nan)), 'finite'),
    (dict(actions=np.zeros(3)), 'expected'), (dict(), 'actions'),
    (dict(actions=np.zeros((2, 2)), is_pad=np.zeros(3)), 'expected'),
    (dict(actions=np.zeros((9, 2))), 'larger'),
    (dict(actions=np.zeros((2, 2)), proprio=np.array([np.inf])), 'finite'),
    (dict(actions=np.array([[None, 1]], dtype=object)), 'read'),
    (None, 'read'), ('zlib', 'read'), ('lies', 'read'),
    (dict(actions=np.array([['a']])), 'numbers'),
    (dict(actions=np.ones((1, 1), complex)), 'numbers')])
def test_actions_that_can_not_be_used(arrays, word):
    pytest.importorskip('tasks.policy')
    p = make_processor(32, 16, 4, task='policy', action_steps=4, action_dim=2, proprio_dim=2)
    if arrays is None:
        content = b'PK not a zip'
    elif arrays == 'zlib':
        content = damaged_npz(b'\xff' * 40)
    elif arrays == 'lies':
        content = damaged_npz(None)
    else:
        content = lowdim(**arrays)
    with pytest.raises(BadSample, match=word):
        p.pieces({'json': b'{"instruction": "go"}', 'lowdim.npz': content})


def test_specs_of_data_sets(tmp_path, monkeypatch):
    a, b = write_set(tmp_path / 'a', [2, 3]), write_set(tmp_path / 'b', [4], manifest=False)
    (tmp_path / 'list.txt').write_text('a/00000001.tar\n\nb/00000000.tar\n')
    monkeypatch.chdir(tmp_path)
    specs = {'a,b': [2, 3, 4], '{a,b}': [2, 3, 4], 'a/{00000000..00000001}.tar': [2, 3],
             'list.txt': [3, 4], 'b/00000000.tar,a': [2, 3, 4], 'a/manifest.jsonl': [2, 3],
             str(b): [4]}
    for spec, sizes in specs.items():
        folder = Folder(spec)
        assert sorted(folder.sizes.tolist()) == sorted(sizes), spec
        assert all(folder.read(s, n - 1) for s, n in enumerate(folder.sizes.tolist()))
    with pytest.raises((ValueError, OSError), match='c'):
        Folder('a,c')
    assert str(a)


def test_an_index_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    import shards
    path = write_set(tmp_path / 'set', [3], manifest=False)
    Folder(str(path))
    with monkeypatch.context() as m:
        m.setattr(shards, 'index_tar', None)
        assert len(Folder(str(path))) == 3, 'from the cache'
    write_set(tmp_path / 'set', [5], manifest=False)
    assert len(Folder(str(path))) == 5


def test_roles_are_what_forms_use():
    assert (READ, LEARNED) == (1, 2) and data.BLOCK == 4096
