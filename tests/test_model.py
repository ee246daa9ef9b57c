"""model.py: attention and masks, the towers, and the losses."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_processor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call

import processor
from keyed import random_keys
from model import (
    VLM,
    Decoder,
    DecoderConfig,
    RMSNorm,
    ViT,
    ViTConfig,
    VLMConfig,
    attention,
    make_attn_mask,
    pixel_shuffle,
    positions_of,
    rope_table,
    rotate,
    sized,
    token_losses,
)
from stem import ConvStem
from tokenizer import Bytes

IMAGE, PAD, EOS, V = 5, 0, 1, 50
VIT = ViTConfig(image_size=16, patch_size=8, width=24, depth=2, mlp_dim=48, num_heads=3)
TEXT = DecoderConfig(vocab_size=V, width=32, depth=3, mlp_dim=64, num_heads=4,
                     num_kv_heads=2, head_dim=8)
P = VIT.num_patches     # 4


def decoder(seed=0, **settings):
    torch.manual_seed(seed)
    return Decoder(replace(TEXT, **settings)).eval()


def vlm(seed=0, vit=VIT, **settings):
    torch.manual_seed(seed)
    return VLM(VLMConfig(vit, replace(TEXT, **settings), IMAGE)).eval()


def words(*shape, seed=0):
    """Random tokens that are not special."""
    return torch.randint(10, V, shape, generator=torch.Generator().manual_seed(seed))


def pictures(n, seed=0):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pad(rows, side, width=None, token=PAD):
    """Lists of tokens -> (tokens, segments) with the padding on the left or right."""
    width = width or max(map(len, rows))
    tokens = torch.full((len(rows), width), token)
    segments = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == 'left' else slice(0, len(row))
        tokens[i, where], segments[i, where] = torch.tensor(row), 1
    return tokens, segments


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# -----------------------------------------------------------------------------------------------
# attention and masks


@pytest.mark.parametrize('heads, kv_heads', [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize('masked', ['none', 'mask', 'shared mask', 'causal'])
def test_attention_equals_the_formula(heads, kv_heads, masked):
    torch.manual_seed(0)
    batch, queries, keys, dim = 2, 5, 5 if masked == 'causal' else 7, 8
    q, k, v = (torch.randn(batch, n, h, dim)
               for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads)))
    mask = None
    if 'mask' in masked:
        mask = torch.rand(1 if 'shared' in masked else batch, queries, keys) < 0.5
        mask[:, :, 0] = True
    out = attention(q, k, v, mask, is_causal=masked == 'causal')
    assert out.shape == (batch, queries, heads, dim)
    allowed = torch.ones(queries, keys).tril().bool() if masked == 'causal' else mask
    for b, n in itertools.product(range(batch), range(heads)):
        # query heads of a group share their key and value head
        kv = n // (heads // kv_heads)
        scores = q[b, :, n] @ k[b, :, kv].T / math.sqrt(dim)
        if allowed is not None:
            of_row = allowed if allowed.dim() == 2 else allowed[b % len(allowed)]
            scores = scores.masked_fill(~of_row, -math.inf)
        close(out[b, :, n], scores.softmax(-1) @ v[b, :, kv])


def rows(text):
    """'110 010' -> a bool matrix."""
    return torch.tensor([[c == '1' for c in row] for row in text.split()])


# causal, twice; bidirectional; prefix-LM; pi0's picture and text | state | actions
@pytest.mark.parametrize('blocks, expected', [
    ([1, 1, 1, 1], '1000 1100 1110 1111'),
    ([0, 1, 1, 1], '1000 1100 1110 1111'),
    ([0, 0, 0, 0], '1111 1111 1111 1111'),
    ([0, 0, 1, 1], '1100 1100 1110 1111'),
    ([0, 0, 1, 1, 0, 0], '110000 110000 111000 111111 111111 111111'),
    ([1, 0, 1, 0], '1100 1100 1111 1111')])
def test_blocks_give_the_masks_of_big_vision(blocks, expected):
    assert (make_attn_mask(torch.tensor([blocks]))[0] == rows(expected)).all()


def test_segments_keep_documents_and_padding_apart():
    mask = make_attn_mask(torch.ones(1, 6, dtype=torch.long), torch.tensor([[1, 1, 2, 2, 0, 0]]))
    assert (mask[0] == rows('100000 110000 001000 001100 000010 000011')).all()
    torch.manual_seed(1)
    for _ in range(20):
        blocks, segments = torch.randint(0, 2, (3, 9)), torch.randint(0, 3, (3, 9))
        mask = make_attn_mask(blocks, segments)
        assert mask.dtype == torch.bool and mask.shape == (3, 9, 9)
        for b, t, s in itertools.product(range(3), range(9), range(9)):
            sees = blocks[b, :s + 1].sum() <= blocks[b, :t + 1].sum()
            sees = sees and segments[b, t] == segments[b, s]
            assert mask[b, t, s] == sees
        assert mask.diagonal(dim1=1, dim2=2).all(), 'no row of the softmax is empty'


def test_positions_restart_with_every_segment():
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1], [3, 3, 3, 3, 3, 3],
                             [1, 2, 3, 1, 1, 0]])
    assert positions_of(segments).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3],
                                               [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 0]]


def test_rope_turns_pairs_by_position_and_frequency():
    torch.manual_seed(0)
    x, theta = torch.randn(2, 5, 3, 8), 100.0
    positions = torch.tensor([[0, 1, 2, 3, 400], [7, 0, 0, 9, 1]])
    out = rotate(x, rope_table(positions, 8, theta))
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())         # halves are paired
    angle = positions[..., None, None].double() * theta ** (-torch.arange(4).double() * 2 / 8)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    close(out, torch.cat((turned.real, turned.imag), -1).float(), 1e-4)
    close(out.norm(dim=-1), x.norm(dim=-1))
    close(out[0, 0], x[0, 0], 0)


def test_rope_depends_on_distance_alone():
    torch.manual_seed(0)
    q, k, positions = torch.randn(1, 6, 2, 16), torch.randn(1, 6, 2, 16), torch.arange(6)[None]

    def scores(shift):
        table = rope_table(positions + shift, 16, 10000.0)
        return torch.einsum('btnh,bsnh->bnts', rotate(q, table), rotate(k, table))
    close(scores(0), scores(1000), 1e-3)
    assert (scores(0) - torch.einsum('btnh,bsnh->bnts', q, k)).abs().max() > 0.1


def test_rope_is_computed_in_fp32_under_autocast():
    positions = torch.tensor([[1, 257, 4001, 4002]])
    exact = rope_table(positions, 8, 10000.0)
    x = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        table = rope_table(positions, 8, 10000.0)
        out = rotate(x, table)
    assert all(t.dtype == torch.float32 and (t == e).all() for t, e in zip(table, exact))
    assert out.dtype == torch.bfloat16
    assert (out == rotate(x.float(), exact).bfloat16()).all(), 'rounded once, at the end'
    low = rope_table(positions.bfloat16(), 8, 10000.0)
    assert (low[0] == rope_table(positions.bfloat16().float(), 8, 10000.0)[0]).all()
    assert low[0].dtype == torch.float32


def test_rms_norm_is_the_formula():
    torch.manual_seed(0)
    norm, x = RMSNorm(16, 1e-3), torch.randn(3, 5, 16) * 7
    close(norm(x).square().mean(-1), torch.ones(3, 5), 1e-3)        # a new one has a weight of one
    torch.nn.init.normal_(norm.weight)
    close(norm(x), F.rms_norm(x, (16,), 1 + norm.weight, 1e-3))
    small = x * 1e-4
    root = small.square().mean(-1, keepdim=True).add(1e-3).sqrt()
    close(norm(small), small / root * (1 + norm.weight))
    low = (x * 30).bfloat16()
    assert norm(low).dtype == torch.bfloat16 and (norm(low) == norm(low.float()).bfloat16()).all()


# -----------------------------------------------------------------------------------------------
# decoder


def test_decoder_block_is_gemmas():
    """One layer written out: pre-norms, no biases, tanh GeGLU, embedding scaled, tied output."""
    d = decoder(depth=1)
    tokens, b = words(2, 6), d.blocks[0]
    for norm in (d.norm, b.norm1, b.norm2):
        torch.nn.init.normal_(norm.weight, std=0.3)

    def rms(x, norm):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + norm.weight)
    x = d.embedding.weight[tokens] * 32 ** 0.5
    h, table = rms(x, b.norm1), rope_table(torch.arange(6)[None], 8, 10000.0)
    q, k = (rotate((h @ f.weight.T).view(2, 6, -1, 8), table) for f in (b.q, b.k))
    a = attention(q, k, (h @ b.v.weight.T).view(2, 6, -1, 8), torch.ones(1, 6, 6).tril().bool())
    x = x + a.reshape(2, 6, 32) @ b.o.weight.T
    h = rms(x, b.norm2)
    gate = F.gelu(h @ b.gate.weight.T, approximate='tanh')
    x = x + (gate * (h @ b.up.weight.T)) @ b.down.weight.T
    close(d.logits(tokens), rms(x, d.norm) @ d.embedding.weight.T)


def test_decoder_is_causal_unless_blocks_say_otherwise():
    d, tokens = decoder(), words(2, 9)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] - 9) % 40 + 10
    for blocks in (None, torch.ones_like(tokens)):
        a, b = d.logits(tokens, blocks=blocks), d.logits(changed, blocks=blocks)
        close(a[:, :5], b[:, :5])
        assert ((a - b)[:, 5:].abs().amax(-1) > 1e-4).all(), 'all that come after see it'
    close(d.logits(tokens), d.logits(tokens, blocks=torch.ones_like(tokens)))
    close(d.logits(tokens), d.logits(tokens, segments=torch.ones_like(tokens)))
    free = torch.zeros_like(tokens)
    difference = d.logits(tokens, blocks=free) - d.logits(changed, blocks=free)
    assert (difference.abs().amax(-1) > 1e-4).all()


def test_a_prefix_never_sees_the_suffix():
    d, tokens = decoder(), words(1, 8)
    blocks = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    x = d.embed(tokens).detach().requires_grad_()
    out = d.features(x, blocks)
    seen = torch.zeros(8, 8, dtype=torch.bool)
    for t in range(8):
        seen[t] = torch.autograd.grad(out[0, t].square().sum(), x,
                                      retain_graph=True)[0][0].abs().sum(-1) > 0
    assert (seen == make_attn_mask(blocks)[0]).all(), (
        'the gradient reaches what the mask allows, and nothing else')
    changed = tokens.clone()
    changed[0, 6] = 11 if tokens[0, 6] != 11 else 12
    a, b = d.logits(tokens, blocks=blocks), d.logits(changed, blocks=blocks)
    assert (a[:, :6] == b[:, :6]).all() and (a[:, 6:] != b[:, 6:]).any(-1).all()


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('prefix', [0, 3])
def test_padding_changes_nothing(side, prefix):
    d, texts = decoder(), [words(n, seed=n).tolist() for n in (5, 9, 1)]
    tokens, segments = pad(texts, side, 12)
    for other in (PAD, 33):
        blocks = torch.ones_like(tokens)
        for i, text in enumerate(texts):
            start = 12 - len(text) if side == 'left' else 0
            blocks[i, start:start + prefix] = 0
        out = d.logits(tokens.where(segments > 0, other), blocks=blocks, segments=segments)
        assert out.isfinite().all()
        for i, text in enumerate(texts):
            alone = torch.ones(1, len(text), dtype=torch.long)
            alone[:, :prefix] = 0
            close(out[i][segments[i] > 0], d.logits(torch.tensor([text]), blocks=alone)[0])


def test_packed_documents_are_as_apart():
    d, texts = decoder(), [words(n, seed=n) for n in (4, 7, 3)]
    segments = torch.tensor([[1] * 4 + [2] * 7 + [3] * 3 + [0] * 2])
    packed = d.logits(torch.cat((*texts, torch.zeros(2, dtype=torch.long)))[None],
                      segments=segments)
    close(packed[0, :14], torch.cat([d.logits(text[None])[0] for text in texts]))


@pytest.mark.parametrize('layer', [0, 1, 2])
def test_feature_layer_gives_the_output_of_that_block(layer):
    for whole, run in ((decoder(), lambda m: m.features(m.embed(words(2, 5)))),
                       (ViT(replace(VIT, depth=3)), lambda m: m(pictures(2)))):
        kept = {}
        whole.blocks[layer].register_forward_hook(
            lambda module, args, out, kept=kept: kept.update(out=out))
        last = run(whole)
        cut = type(whole)(replace(whole.config, feature_layer=layer))
        weights = whole.state_dict()
        cut.load_state_dict({name: weights[name] for name in cut.state_dict()})
        out = run(cut)
        assert (out == kept['out']).all() and (out != last).any()
        if layer == 2:
            close(last, whole.norm(kept['out']))        # -1: the last, normed
        out.square().sum().backward()
        assert all(p.grad is not None for p in cut.parameters()), 'or DDP would stop'
        for wrong in (3, -2):
            with pytest.raises(ValueError, match='feature_layer'):
                type(whole)(replace(whole.config, feature_layer=wrong))


@pytest.mark.parametrize('kind, settings, message', [
    (Decoder, dict(num_heads=3),
     'decoder.num_heads=3 must be a multiple of decoder.num_kv_heads=2'),
    (Decoder, dict(head_dim=7), 'decoder.head_dim=7 must be even'),
    (Decoder, dict(activation='relu'), "decoder.activation='relu'"),
    (Decoder, dict(sliding_window=-1), 'decoder.sliding_window=-1'),
    (Decoder, dict(global_every=0), 'decoder.global_every=0'),
    (Decoder, dict(global_every=2), 'they need a decoder.sliding_window'),
    (Decoder, dict(rope_scaling=[8.0, 1.0]), 'decoder.rope_scaling=[8.0, 1.0]'),
    (ViT, dict(image_size=20), 'vit.image_size=20 must be a multiple of vit.patch_size=8'),
    (ViT, dict(width=25), 'vit.width=25 must be a multiple of vit.num_heads=3'),
    (ViT, dict(stem='convolution'), "vit.stem='convolution'")])
def test_impossible_shapes_are_refused_fault_by_fault(kind, settings, message):
    shape = TEXT if kind is Decoder else VIT
    with pytest.raises(ValueError) as error:
        kind(replace(shape, **settings))
    assert message in str(error.value)


def test_a_decoder_has_no_eyes():
    with pytest.raises(AssertionError, match='eyes'):
        decoder().logits(words(1, 3), pictures(1))


# -----------------------------------------------------------------------------------------------
# loss


@pytest.mark.parametrize('chunk', [3, 7, 4096])
def test_token_loss_is_cross_entropy_over_the_targets(chunk):
    d = decoder()
    targets = words(3, 8, seed=1).where(
        torch.rand(3, 8, generator=torch.Generator().manual_seed(2)) < 0.6, -100)
    targets[0, :2], targets[2, :2] = 0, -100            # 0 is a token like others
    x = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
    largest, unembed = [], d.unembed
    d.unembed = lambda h: largest.append(len(h)) or unembed(h)
    losses, counts, places = token_losses(d, x, targets, chunk=chunk)
    loss = losses.sum()
    ours = torch.autograd.grad(loss, (x, d.embedding.weight))
    d.unembed = unembed
    assert counts.sum() == (targets != -100).sum() == len(places)
    assert (targets.flatten()[places] != -100).all()
    assert max(largest) <= chunk, 'logits where there is a loss, chunk by chunk'
    naive = F.cross_entropy((x @ d.embedding.weight.T).flatten(0, 1), targets.flatten(),
                            ignore_index=-100, reduction='sum')
    close(loss, naive)
    for a, b in zip(ours, torch.autograd.grad(naive, (x, d.embedding.weight))):
        close(a, b)


def test_loss_is_token_losses_of_the_features_and_the_sum_of_forward():
    d, tokens = decoder(), words(2, 7)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    loss, count = d.loss(tokens, targets)
    close(loss, -d.logits(tokens).log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).sum())
    learned = d(tokens, targets)['text']
    assert count == 12 and learned.losses.sum() == loss
    assert learned.places.tolist() == [*range(6), *range(7, 13)]


def test_a_batch_without_targets_gives_zero_gradients():
    d, tokens = decoder().train(), words(2, 7)
    loss, count = d.loss(tokens, torch.full_like(tokens, -100))
    loss.backward()
    assert loss == 0 and count == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in d.parameters()), (
        'or DDP would wait for ever')


def test_loss_is_counted_in_fp32_under_autocast():
    d, tokens = decoder(), words(2, 7)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, _ = d.loss(tokens, tokens)
    assert loss.dtype == torch.float32 and abs(loss - d.loss(tokens, tokens)[0]) / loss < 0.03


def micro_batch(kind, device='cpu'):
    """A model and what its forward takes, targets of unequal number in each row."""
    text, vit = replace(TEXT, dropout=0.1), replace(VIT, dropout=0.1)
    model = Decoder(text) if kind == 'llm' else VLM(VLMConfig(vit, text, IMAGE))
    tokens, targets = words(3, 12), words(3, 12, seed=1)
    targets[0, :5], targets[1, 2:9] = -100, -100
    segments = torch.ones_like(tokens).index_fill(1, torch.tensor([11]), 0)
    batch = dict(tokens=tokens, targets=targets, segments=segments,
                 keys=random_keys(0, torch.arange(36).view(3, 12)))
    if kind == 'vlm':
        tokens[:2, :P] = IMAGE
        batch['pixels'] = pictures(2)
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    return model.train().to(device), batch, int((targets != -100).sum())


@pytest.mark.parametrize('kind', ['llm', 'vlm'])
def test_a_number_of_targets_changes_nothing(kind):
    model, batch, count = micro_batch(kind)
    model.eval()
    a, b = (model(**batch, num_targets=n)['text'] for n in (None, count))
    assert len(a.losses) == count == a.counts.sum() == b.counts.sum()
    assert torch.equal(a.losses, b.losses) and torch.equal(a.places, b.places)

    # every token is a target: nothing is picked out
    if kind == 'llm':
        full = batch | dict(targets=batch['tokens'])
        a, b = (model(**full, num_targets=n)['text'] for n in (None, 36))
        assert torch.equal(a.losses, b.losses) and len(a.losses) == 36


@pytest.mark.parametrize('kind', ['llm', 'vlm'])
def test_no_shape_and_no_branch_of_a_micro_batch_depends_on_its_values(kind):
    """Tensors without values go through loss and backward: whatever had to read one, and so to
    wait for a GPU, would raise."""
    model, batch, count = micro_batch(kind)
    real = {name: p.shape for name, p in model.named_parameters()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with pytest.raises(DynamicOutputShapeException):
            mode.from_tensor(batch['targets']).nonzero()
        batch = {key: mode.from_tensor(tensor) for key, tensor in batch.items()}
        parameters = {name: mode.from_tensor(p.detach()).requires_grad_()
                      for name, p in model.named_parameters()}
        learned = functional_call(model, parameters, (), batch | dict(num_targets=count))['text']
        assert all(len(each) == count for each in learned)
        learned.losses.sum().backward()
    assert {name: p.grad.shape for name, p in parameters.items()} == real


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('kind', ['llm', 'vlm'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_gpu_is_not_waited_for(kind, dtype):
    model, batch, count = micro_batch(kind, 'cuda')
    # the first time may set up libraries
    for mode in ('default', 'error'):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
                losses = model(**batch, num_targets=count)['text'].losses
            losses.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert losses.isfinite().all()


def test_gradients_add_up_over_micro_batches():
    m = vlm()
    tokens, targets, pixels, segments = vlm_batch()
    whole, count = m.loss(tokens, targets, pixels, segments=segments)
    a, b = (m.loss(tokens[s], targets[s], pixels[s], segments=segments[s])
            for s in (slice(0, 1), slice(1, 3)))
    close(whole, a[0] + b[0])
    assert count == a[1] + b[1]


# -----------------------------------------------------------------------------------------------
# initial weights


def test_initial_weights_are_those_of_big_vision():
    torch.manual_seed(0)
    d = Decoder(DecoderConfig(vocab_size=640, width=256, depth=2, mlp_dim=512, num_heads=4,
                              head_dim=64))
    assert abs(d.embedding.weight.std() * 16 - 1) < 0.02
    for name, p in d.named_parameters():
        if 'norm' in name:
            assert (p == 0).all(), name
        elif p.dim() == 2 and 'embedding' not in name:
            assert abs(p.std() * p.shape[1] ** 0.5 - 1) < 0.03, name
            assert p.abs().max() * p.shape[1] ** 0.5 < 2.3, (
                f'{name} is cut at two standard deviations')
    v = ViT(ViTConfig(width=192, depth=2, mlp_dim=768))
    assert abs(v.pos_embed.std() * 192 ** 0.5 - 1) < 0.03
    assert abs(v.stem.weight.std() * (3 * 64) ** 0.5 - 1) < 0.03 and (v.stem.bias == 0).all()
    for p, fan in ((v.blocks[1].fc1, 192 + 768), (v.blocks[0].q, 384)):
        assert abs(p.weight.abs().max() / (6 / fan) ** 0.5 - 1) < 0.01 and (p.bias == 0).all()
        assert abs(p.weight.std() * (fan / 2) ** 0.5 - 1) < 0.03
    torch.manual_seed(0)
    small = ViT(ViTConfig(width=192, depth=2, mlp_dim=768, init_scale=0.25))
    for (name, p), q in zip(v.named_parameters(), small.parameters()):
        if name.endswith(('.o.weight', '.fc2.weight')):
            assert abs(q.std() / p.std() - 0.25) < 0.01, name
    close(ViT(replace(VIT, init_scale=0.0)).blocks[0](torch.ones(1, 4, 24)),
          torch.ones(1, 4, 24), 0)


@pytest.mark.parametrize('kind', ['llm', 'vlm'])
def test_initial_loss_is_that_of_guessing(kind):
    """ln(vocabulary), with two additions that tied embeddings bring: logits have a variance of 1,
    so their softmax is not flat (+ 1/2), and a token's own logit is up to the root of the width
    (the residual stream still holds its embedding). Without its own column every model starts
    within 15 % of ln(vocabulary)."""
    vocabulary, width = 1000, 192
    torch.manual_seed(0)
    text = sized(DecoderConfig(width=width, depth=4, mlp_dim=768), vocabulary)
    m = Decoder(text) if kind == 'llm' else VLM(VLMConfig(ViTConfig(depth=2), text, IMAGE))
    m.eval()
    tokens, pixels, learned = words(4, 24), None, slice(0, 24)
    if kind == 'vlm':
        tokens = torch.cat((torch.full((4, 64), IMAGE), tokens), 1)
        pixels, learned = torch.rand(4, 3, 64, 64) * 2 - 1, slice(64, 88)
    targets = torch.full_like(tokens, -100)
    targets[:, learned] = torch.randint(0, vocabulary, targets[:, learned].shape)
    blocks = torch.ones_like(tokens)
    with torch.no_grad():
        loss, count = m.loss(tokens, targets, pixels, blocks)
        logits = m.logits(tokens, pixels, blocks)[:, learned]
    guess = math.log(1024)                              # rounded up to a multiple of 64
    assert guess < loss / count < guess + width ** 0.5 / 4
    own = tokens[:, learned, None]
    others = logits.scatter(2, own, -math.inf).log_softmax(-1)
    wanted = targets[:, learned, None]
    assert abs(-others.gather(2, wanted)[wanted != own].mean() / guess - 1) < 0.15
    assert abs(logits.std() - 1) < 0.1 and logits.gather(2, own).max() < width ** 0.5


# -----------------------------------------------------------------------------------------------
# vision tower


def test_vit_gives_a_feature_a_patch_in_reading_order():
    config = ViTConfig(image_size=24, patch_size=8, width=12, depth=0, num_heads=3)
    vit = ViT(config).eval()
    plain = torch.zeros(1, 3, 24, 24)
    assert vit(plain).shape == (1, 9, 12) and config.num_patches == 9
    for patch in range(9):
        pixels = plain.clone()
        pixels[0, :, patch // 3 * 8 + 3, patch % 3 * 8 + 5] = 1
        change = (vit(pixels) - vit(plain)).abs().amax(-1)[0]
        assert (change > 0).nonzero().flatten().tolist() == [patch]


@pytest.mark.parametrize('stem, patch', [('patch', 8), ('conv', 8), ('conv', 4)])
def test_vit_shapes_and_that_every_parameter_learns(stem, patch):
    torch.manual_seed(0)
    vit = ViT(replace(VIT, stem=stem, patch_size=patch))
    out = vit(pictures(3))
    assert out.shape == (3, (16 // patch) ** 2, 24) and out.isfinite().all()
    (out * torch.randn_like(out)).sum().backward()
    for name, p in vit.named_parameters():
        if '.k.bias' not in name:       # the softmax does not feel a key's bias
            assert p.grad is not None and p.grad.abs().max() > 0, name
    alone = torch.cat([vit(p[None]) for p in pictures(3)])
    close(out, alone)
    moved = pictures(3).roll(8, 3)
    assert (vit(moved).mean(1) - out.mean(1)).abs().max() > 1e-3, 'it knows where a patch stands'


def test_vit_block_is_siglips():
    torch.manual_seed(0)
    vit, x = ViT(VIT), torch.randn(2, 4, 24)
    b = vit.blocks[0]
    h = F.layer_norm(x, (24,), eps=1e-6)
    q, k, v = (f(h).view(2, 4, 3, 8) for f in (b.q, b.k, b.v))
    y = x + b.o(attention(q, k, v).reshape(2, 4, 24))
    y = y + b.fc2(F.gelu(b.fc1(F.layer_norm(y, (24,), eps=1e-6)), approximate='tanh'))
    close(b(x), y)


def test_conv_stem_halves_to_one_pixel_a_patch():
    torch.manual_seed(0)
    stem = ConvStem(32, 16)
    assert stem(torch.randn(2, 3, 48, 48)).shape == (2, 32, 3, 3)
    with pytest.raises(ValueError, match='power of 2'):
        ConvStem(32, 12)


# -----------------------------------------------------------------------------------------------
# vision-language model


def vlm_batch():
    """Three rows with a picture each and answers of unequal length: tokens, targets, pixels,
    segments."""
    texts = [[IMAGE] * P + words(2 + n, seed=n).tolist() + [EOS] for n in (3, 1, 5)]
    tokens, segments = pad(texts, 'right')
    targets = torch.full_like(tokens, -100)
    for i, text in enumerate(texts):
        targets[i, P + 1:len(text) - 1] = tokens[i, P + 2:len(text)]
    return tokens, targets, pictures(3), segments


def test_default_blocks_are_prefix_lm_up_to_the_first_target_or_causal():
    tokens = torch.tensor([[IMAGE, IMAGE, 10, 11, 12, 13], [20, 21, 22, 23, 24, 25],
                           [IMAGE, 30, 31, 32, 33, 34]])
    targets = torch.full_like(tokens, -100)
    targets[0, 2:5], targets[1, 0:5], targets[2, 1:3] = 1, 1, 1
    m = vlm()
    blocks = m.default_blocks(tokens, targets).tolist()
    assert blocks == [[0, 0, 0, 1, 1, 1], [1] * 6, [0, 0, 1, 1, 1, 1]]
    assert m.default_blocks(tokens).tolist() == [[0] * 6, [1] * 6, [0] * 6]


def test_default_blocks_are_those_of_collate():
    tokens, targets, pixels, segments = vlm_batch()
    pieces = [dict(tokens=tokens[i, :n].numpy(), targets=targets[i, :n].numpy(),
                   pictures=[pixels[i].numpy()], text='',
                   blocks=(np.arange(n) >= P + 2).astype(np.uint8), part=0)
              for i, n in enumerate(segments.sum(1).tolist())]
    tok = Bytes()
    tok.pad_id = PAD
    batch = processor.collate(pieces, make_processor(tokens.shape[1], task='llm', tokenizer=tok))
    assert (torch.tensor(batch['targets']) == targets).all()
    assert (torch.tensor(batch['tokens']) == tokens).all()
    real = segments > 0
    default = vlm().default_blocks(tokens, targets)
    assert (torch.tensor(batch['blocks'])[real] == default[real]).all()
    m, blocks = vlm(), torch.tensor(batch['blocks']).long()
    close(m.loss(tokens, targets, pixels, blocks, segments)[0],
          m.loss(tokens, targets, pixels, segments=segments)[0])


def test_the_caption_sees_the_picture_and_never_its_own_future():
    m = vlm()
    tokens, targets, pixels, segments = vlm_batch()
    changed = pixels.clone()
    changed[1, 0, 3, 3] += 0.5
    a, b = (m.logits(tokens, p, m.default_blocks(tokens, targets), segments)
            for p in (pixels, changed))
    assert (a[0] == b[0]).all() and (a[2] == b[2]).all()
    assert ((a - b)[1, segments[1] > 0].abs().amax(-1) > 1e-6).all()
    later = tokens.clone()
    later[:, P + 3] = 10
    c = m.logits(later, pixels, m.default_blocks(tokens, targets), segments)
    close(a[:, :P + 3], c[:, :P + 3], 0)


def test_pictures_stand_where_their_image_tokens_are():
    m = vlm()
    pixels = pictures(3)
    row = [IMAGE] * P
    tokens, _ = pad([[10] + row + [11], [12, 13, 14], row + [15] + row + [16]], 'right')
    x, patches = m.embed(tokens, pixels), m.connector(m.vit(pixels))
    close(x[0, 1:1 + P], patches[0], 0)
    close(x[2, :P], patches[1], 0)
    close(x[2, P + 1:2 * P + 1], patches[2], 0)
    text = tokens != IMAGE
    close(x[text], m.decoder.embed(tokens)[text], 0)
    out = m.logits(tokens, pixels, segments=(tokens != PAD).long())
    # a row without a picture is causal text
    close(out[1, :3], m.decoder.logits(tokens[1:2, :3])[0])
    close(out[2:], m.logits(tokens[2:], pixels[1:]))
    close(out[0, :P + 2], m.logits(tokens[:1, :P + 2], pixels[:1])[0])


def test_pixel_shuffle_joins_squares_of_patches():
    # patch number, row by row, 6 x 6
    x = torch.arange(36.0).view(1, 36, 1).repeat(1, 1, 2)
    out = pixel_shuffle(x, 2)
    assert out.shape == (1, 9, 8) and (pixel_shuffle(x, 1) == x).all()
    for r, c in itertools.product(range(3), range(3)):
        square = [6 * (2 * r + i) + 2 * c + j for i in range(2) for j in range(2)]
        assert out[0, 3 * r + c].tolist() == [float(n) for n in square for _ in range(2)]
    assert pixel_shuffle(x, 3)[0, 1, ::2].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]


def test_a_vlm_with_pixel_shuffle():
    torch.manual_seed(0)
    m = VLM(VLMConfig(VIT, TEXT, IMAGE, pixel_shuffle=2)).eval()
    assert m.image_tokens == m.config.image_tokens == 1 and vlm().image_tokens == P
    tokens = torch.tensor([[IMAGE, 10, 11], [IMAGE, IMAGE, 12]])
    x = m.embed(tokens, pictures(3))
    close(x[1, :2], m.connector(m.vit(pictures(3)[1:]).flatten(1)), 1e-6)
    with pytest.raises(ValueError, match='pixel_shuffle'):
        VLM(VLMConfig(replace(VIT, image_size=24), TEXT, IMAGE, pixel_shuffle=2))


def test_pictures_and_image_tokens_must_agree():
    m, tokens = vlm(), torch.tensor([[IMAGE] * P + [10]])
    for wrong, pixels in ((tokens, pictures(2)), (tokens[:, 1:], pictures(1)), (tokens, None),
                          (tokens, pictures(1)[:0]), (words(1, 3), pictures(1))):
        for model in (m, vlm().train()):
            with pytest.raises(RuntimeError, match='image tokens'):
                model.logits(wrong, pixels)


def test_a_batch_without_pictures_still_runs_the_tower():
    m, tokens = vlm().train(), words(2, 6)
    for pixels in (None, pictures(1)[:0]):
        m.zero_grad(set_to_none=True)
        loss, _ = m.loss(tokens, tokens.roll(-1, 1), pixels)
        loss.backward()
        for name, p in m.named_parameters():
            assert p.grad is not None, name
            assert (p.grad == 0).all() == name.startswith(('vit', 'connector')), name
    close(loss, m.decoder.loss(tokens, tokens.roll(-1, 1))[0])
    close(m.eval().loss(tokens, tokens.roll(-1, 1))[0], loss)


def test_every_parameter_of_a_vlm_learns():
    m = vlm().train()
    tokens, targets, pixels, segments = vlm_batch()
    m.loss(tokens, targets, pixels, segments=segments)[0].backward()
    for name, p in m.named_parameters():
        if '.k.bias' not in name:
            assert p.grad is not None and p.grad.abs().max() > 0, name


def test_a_vlm_computes_under_autocast():
    m = vlm().train()
    tokens, targets, pixels, segments = vlm_batch()
    exact = m.loss(tokens, targets, pixels, segments=segments)[0]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, _ = m.loss(tokens, targets, pixels, segments=segments)
    assert abs(loss - exact) / exact < 0.05


def test_an_embedding_has_a_row_for_every_token_and_a_multiple_of_64():
    free = replace(TEXT, vocab_size=0)
    for tokens, size in ((260, 320), (256, 256), (1, 64), (257, 320)):
        assert sized(free, tokens).vocab_size == size
        assert Decoder(sized(free, tokens)).embedding.weight.shape == (size, 32)
    assert free.vocab_size == 0, 'the setting stays as it is'
    assert sized(TEXT, V).vocab_size == sized(TEXT, V - 1).vocab_size == V
    with pytest.raises(ValueError, match=f'decoder.vocab_size={V}'):
        sized(TEXT, V + 1)
