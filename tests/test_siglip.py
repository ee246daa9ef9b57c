"""tasks/siglip.py: its rows, the losses of all pairs, and every text of a mix once."""
import itertools
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_processor, sample, write_set
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

import tasks
from model import DecoderConfig, ViTConfig, VLMConfig
from processor import collate, to_device
from shards import BadSample, Folder
from tasks import siglip
from tasks.siglip import SigLIP
from tokenizer import Bytes

PAD, EOS, V = 0, 1, 50
BYTES_EOS, BYTES_PAD = 257, 258
VIT = ViTConfig(image_size=16, patch_size=8, width=24, depth=2, mlp_dim=48, num_heads=3)
TEXT = DecoderConfig(vocab_size=V, width=32, depth=3, mlp_dim=64, num_heads=4, num_kv_heads=2,
                     head_dim=8)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance,
                               atol=tolerance)


def a_model(**settings):
    torch.manual_seed(0)
    return SigLIP(VLMConfig(VIT, TEXT), **settings)


def pictures(n):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def padded(texts):
    """Lists of token ids -> tokens and segments (N, T), padded on the right to one length."""
    width = max(map(len, texts))
    tokens = torch.tensor([text + [PAD] * (width - len(text)) for text in texts])
    segments = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return tokens, segments


def pairs_of(texts):
    """What forward takes of a batch in which every text has its picture."""
    tokens, segments = padded(texts)
    return dict(tokens=tokens, segments=segments, pixels=pictures(len(texts)),
                rows=torch.arange(len(texts)))


# ------------------------------------------------------------------------------------------------
# the model


def test_the_loss_is_the_sum_over_all_pairs():
    m = a_model()
    with torch.no_grad():
        m.bias.fill_(-1.5)
    # the first and third are one text
    texts = [[10, 11, EOS], [12, EOS], [10, 11, EOS], [13, 14, 15, EOS]]
    learned = m(**pairs_of(texts))['pairs']

    images = m.embed_images(pictures(4))
    alone = torch.cat([m.embed_texts(torch.tensor([text]), torch.ones(1, len(text)).long())
                       for text in texts])
    close(images.norm(dim=-1), torch.ones(4))
    close(alone.norm(dim=-1), torch.ones(4))
    losses = torch.zeros(4)
    for i, j in itertools.product(range(4), range(4)):
        logit = m.scale.exp() * images[i] @ alone[j] + m.bias
        losses[i] += -F.logsigmoid(logit if texts[i] == texts[j] else -logit)
    close(learned.losses, losses, 1e-4)
    assert learned.counts.tolist() == [1] * 4 and learned.places.tolist() == [0, 4, 8, 12]


def test_it_starts_at_the_papers_scale_and_bias_or_those_of_the_settings():
    m = a_model()
    assert abs(m.scale.exp() - 10) < 1e-4 and m.bias == -10
    said = {'pair_scale': 5.0, 'pair_bias': -4.0, 'vit.depth': 1, 'decoder.depth': 1}
    other = siglip.build(tasks.defaults('siglip') | said, Bytes())
    assert isinstance(other, SigLIP) and other.text.config.vocab_size == 320
    assert abs(other.scale.exp() - 5) < 1e-4 and other.bias == -4


def test_rows_without_a_picture_are_left_out():
    m = a_model()
    tokens, segments = padded([[10, 11, EOS], [PAD], [12, EOS]])
    segments[1] = 0
    good = torch.tensor([0, 2])
    learned = m(tokens, segments, pictures(2), good)['pairs']
    alone = m(tokens[good], segments[good], pictures(2), torch.arange(2))['pairs']
    close(learned.losses, alone.losses)
    assert learned.losses.isfinite().all() and learned.places.tolist() == [0, 6]


def test_any_texts_are_compared_with_and_then_micro_batches_add_up():
    m = a_model()
    with torch.no_grad():
        m.bias.fill_(-1.0)
    batch = pairs_of([[10, 11, EOS], [12, EOS], [13, EOS]])
    texts, text_segments = padded([[12, EOS], [14, EOS], [10, 11, EOS], [15, 16, EOS], [13, EOS]])
    images, known = m.embed_images(pictures(3)), m.embed_texts(texts, text_segments)
    total = 0.0
    for i, own in enumerate((2, 0, 4)):
        for j in range(5):
            logit = m.scale.exp() * images[i] @ known[j] + m.bias
            total += -F.logsigmoid(logit if j == own else -logit)

    more = dict(texts=texts, text_segments=text_segments)
    losses = m(**batch, **more)['pairs'].losses
    close(losses.sum(), total, 1e-4)
    parts = []
    for part in (slice(0, 1), slice(1, 3)):
        rows = batch['rows'][part] - part.start
        parts.append(m(batch['tokens'][part], batch['segments'][part], batch['pixels'][part],
                       rows, **more)['pairs'].losses)
    close(torch.cat(parts), losses, 1e-4)


def test_text_is_read_both_ways_and_everything_learns():
    m = a_model()
    vectors = m.embed_texts(torch.tensor([[10, 11, 12], [12, 11, 10]]), torch.ones(2, 3).long())
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3
    m(**pairs_of([[10, 11, EOS], [12, EOS]]))['pairs'].losses.sum().backward()
    for name, p in m.named_parameters():
        if '.k.bias' not in name:
            assert p.grad is not None and p.grad.abs().max() > 0, name

    kept = {}
    m.text.blocks[0].register_forward_hook(lambda module, args, out: kept.update(out=out))
    for last in (20, 30):
        m.embed_texts(torch.tensor([[10, 11, last]]), torch.ones(1, 3).long())
        kept[last] = kept['out'][0, 0]
    assert (kept[20] != kept[30]).any(), 'the first token sees the last'


def test_no_shape_and_no_branch_depends_on_values():
    """As in test_model.py: whatever had to read one, and so to wait for a GPU, would raise."""
    m = a_model()
    batch = pairs_of([[10, 11, EOS], [12, EOS], [13, EOS]])
    real = {name: p.shape for name, p in m.named_parameters()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = {key: mode.from_tensor(tensor) for key, tensor in batch.items()}
        parameters = {name: mode.from_tensor(p.detach()).requires_grad_()
                      for name, p in m.named_parameters()}
        losses = functional_call(m, parameters, (), batch)['pairs'].losses
        assert losses.shape == (3,)
        losses.sum().backward()
    assert {name: p.grad.shape for name, p in parameters.items()} == real


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_gpu_is_not_waited_for(dtype):
    m = a_model().cuda()
    batch = pairs_of([[10, 11, EOS], [12, EOS], [13, EOS]])
    batch = {key: tensor.cuda() for key, tensor in batch.items()}
    # the first time may set up libraries
    for mode in ('default', 'error'):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
                losses = m(**batch)['pairs'].losses
            losses.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert losses.isfinite().all()


# ------------------------------------------------------------------------------------------------
# rows


def run_of(p, **settings):
    """What the task looks at of a run."""
    return SimpleNamespace(settings={'vit.image_size': 16} | settings, processor=p, device='cpu')


def test_a_row_holds_the_caption_alone_and_is_one_pair():
    p = make_processor(6, 16, prompt='prompt', task='siglip')
    batch = collate([p.pieces(sample(1, 'dog'))[0] | dict(part=0), None], p)
    assert batch['tokens'].tolist() == [[*b'dog', BYTES_EOS, BYTES_PAD, BYTES_PAD],
                                        [BYTES_PAD] * 6]
    assert batch['segments'].tolist() == [[1] * 4 + [0] * 2, [0] * 6]
    assert siglip.count(batch) == {'pairs': 1}

    inputs = siglip.inputs(run_of(p), batch, to_device(batch, 'cpu', p))
    assert inputs['rows'].tolist() == [0] and inputs['pixels'].shape == (1, 3, 16, 16)
    with pytest.raises(BadSample, match='0 pictures'):
        p.pieces({'txt': b'dog'})


def test_a_batch_without_pictures_is_empty_and_not_a_fault():
    p = make_processor(6, 16, task='siglip')
    batch = collate([None, None], p)
    inputs = siglip.inputs(run_of(p), batch, to_device(batch, 'cpu', p))
    assert len(inputs['rows']) == len(inputs['pixels']) == 0 == siglip.count(batch)['pairs']
    learned = siglip.build(tasks.defaults('siglip') | {
        'vit.image_size': 16, 'vit.patch_size': 8, 'vit.depth': 1, 'decoder.depth': 1}, Bytes())
    losses = learned(**inputs)['pairs'].losses
    assert losses.shape == (0,)
    losses.sum().backward()
    assert all(q.grad is not None for q in learned.parameters()), 'no rank waits for another'


def test_every_text_of_a_mix_stands_once_among_those_to_compare_with(tmp_path):
    numbered = Folder(str(write_set(tmp_path / 'numbered', [5, 7, 3])))
    samples = [('a', sample(1)), ('b', sample(2, 'new')), ('c', sample(3, 'name 4'))]
    other = write_set(tmp_path / 'other', [samples])

    run = run_of(make_processor(24, 16, task='siglip'), pair_with='all')
    given = siglip.constants(run, [numbered, Folder(str(other))])
    tokens, lengths = given['texts'], given['text_segments'].sum(1)
    assert tokens.shape == given['text_segments'].shape == (16, 24)
    texts = {Bytes().decode(row[:length - 1].tolist()) for row, length in zip(tokens, lengths)}
    assert texts == {f'name {i}' for i in range(15)} | {'new'}

    # 'name 10' and on do not fit: placeholders
    short = run_of(make_processor(7, 16, task='siglip'), pair_with='all')
    given = siglip.constants(short, [numbered])
    assert len(given['texts']) == 10 and given['text_segments'].any(1).all()
    assert siglip.constants(run_of(run.processor, pair_with='batch'), [numbered]) == {}
    os.truncate(other / '00000000.tar', 700)
    with pytest.raises(ValueError, match='00000000.tar'):
        siglip.constants(run, [Folder(str(other))])
