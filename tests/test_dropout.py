"""Dropout follows from (seed, position of the sample), like all that is random: keyed.py. That a
run does not depend on how it is cut is in test_cuts.py, test_engine.py and those of the tasks."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_processor

from keyed import Dropout, random_keys, token_keys
from model import VLM, Decoder, DecoderConfig, ViT, ViTConfig, VLMConfig
from processor import collate

TEXT = DecoderConfig(vocab_size=320, width=32, depth=2, mlp_dim=64, num_heads=2, head_dim=16)
EYES = ViTConfig(image_size=16, patch_size=8, width=32, depth=1, mlp_dim=64, num_heads=2)


def masks(p, number=0, tokens=4096, width=256, seed=0):
    """What is kept of tokens of ones: 0.0 or 1.0 (tokens, width)."""
    keys = random_keys(seed, torch.arange(tokens))[None]
    kept = Dropout(p, width, number)(torch.ones(1, tokens, width), keys)[0]
    assert torch.allclose(kept[kept != 0], torch.tensor(1 / (1 - p)))
    return (kept != 0).double()


@pytest.mark.parametrize('p', [0.1, 0.5, 0.02])
def test_a_mask_is_as_random_as_that_of_torch(p):
    """Shares of all, of tokens, of channels; and of what is dropped together by two channels, two
    tokens, two layers, each within five standard deviations."""
    dropped = 1 - masks(p)
    tokens, width = dropped.shape

    def holds(sums, n, share):
        bound = 5.5 * (n * share * (1 - share)) ** 0.5 + 3
        assert (sums - n * share).abs().max() < bound

    holds(dropped.sum(), tokens * width, p)
    holds(dropped.sum(1), width, p)
    holds(dropped.sum(0), tokens, p)
    variance = dropped.sum(1).var() / (width * p * (1 - p))
    assert 0.85 < variance < 1.15
    together = dropped.T @ dropped
    holds(together[~torch.eye(width, dtype=torch.bool)], tokens, p * p)
    for other in (dropped.roll(1, 0), dropped.roll(1, 1), 1 - masks(p, 1), 1 - masks(p, seed=1)):
        holds((dropped * other).sum(), tokens * width, p * p)


def test_a_gradient_passes_where_a_number_was_kept():
    x = torch.randn(2, 3, 8, requires_grad=True)
    keys = random_keys(0, torch.arange(6)).view(2, 3)
    y = Dropout(0.5, 8, 0)(x, keys)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0) * 2.0) and 0 < (y == 0).sum() < 48
    half = Dropout(0.5, 8, 0)(x.bfloat16(), keys)
    assert half.dtype == torch.bfloat16 and torch.equal(half == 0, y == 0)


@pytest.mark.parametrize('p', [-0.1, 1, float('nan')])
def test_a_share_that_can_not_be_is_refused(p):
    with pytest.raises(ValueError, match='expected at least 0 and below 1'):
        Decoder(replace(TEXT, dropout=p))


def test_without_keys_training_is_refused_and_without_dropout_nothing_is_there():
    tokens = torch.zeros(1, 4, dtype=torch.long)
    model = Decoder(replace(TEXT, dropout=0.1))
    with pytest.raises(ValueError, match='dropout=0.1 needs keys'):
        model.loss(tokens, tokens)
    model.eval().loss(tokens, tokens)
    plain = Decoder(TEXT)
    plain.loss(tokens, tokens)
    assert not [*plain.buffers()] and plain.state_dict().keys() == model.state_dict().keys()


def test_the_layers_of_a_model_drop_each_in_its_own_way():
    both = replace(EYES, dropout=0.5), replace(TEXT, dropout=0.5)
    model = VLM(VLMConfig(*both, image_token_id=5))
    found = [m for m in model.decoder.modules() if isinstance(m, Dropout)]
    channels = [tuple(m.channels.tolist()) for m in found]
    assert len(channels) == 4 and len(set(channels)) == 4
    assert len([m for m in ViT(both[0]).modules() if isinstance(m, Dropout)]) == 2


def keys_of(p, samples, **options):
    """{position: the keys of its tokens} of texts at positions, however they are collated."""
    pieces = []
    for position, text in samples:
        for piece in p.pieces({'txt': text}):
            pieces.append(piece | dict(part=0, position=position))
    batch, found = collate(pieces, p, **options), {}
    keys = token_keys(dict(seed=3, seq_len=p.seq_len), batch)
    assert keys.shape == batch['tokens'].shape
    for row, segments, tokens in zip(keys, batch['segments'], batch['tokens']):
        for number in range(1, segments.max() + 1):
            own = np.flatnonzero(segments == number)
            found[tuple(tokens[own].tolist())] = row[own].tolist()
    return found


def test_a_tokens_key_is_that_of_its_place_in_the_sample():
    """Alone in a row or packed with others, in this batch or another; pieces of a long text have
    keys of their own, and no two tokens share one."""
    samples = [(7, b'abc'), (12, b'a text that is longer than a row of these'), (13, b'de')]
    p = make_processor(16, form='text')
    alone, packed = keys_of(p, samples), keys_of(p, samples[::-1], pack=True)
    assert packed == alone and len(alone) == 5
    assert keys_of(p, samples[:1]).items() <= alone.items()
    flat = sum(alone.values(), [])
    assert len(set(flat)) == len(flat)
    assert not set(flat) & set(sum(keys_of(p, [(8, b'abc')]).values(), []))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_a_gpu_drops_the_same_numbers():
    keys, x = random_keys(0, torch.arange(64)).view(2, 32), torch.randn(2, 32, 96)
    layer = Dropout(0.3, 96, 1)
    assert torch.equal(layer(x, keys), layer.cuda()(x.cuda(), keys.cuda()).cpu())
