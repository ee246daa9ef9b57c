"""Small policies and vision-language-action models, and what they are fed, for their tests."""
from dataclasses import replace

import torch

from diffusion import random_keys
from model import VLM, Decoder, DecoderConfig, ViTConfig, VLMConfig
from tasks.policy import DiffusionPolicy, PolicyConfig
from tasks.vla import VLA, VLAConfig

IMAGE, PAD, V = 5, 0, 50
VIT = ViTConfig(image_size=16, patch_size=8, width=24, depth=1, mlp_dim=48, num_heads=3)
TEXT = DecoderConfig(vocab_size=V, width=32, depth=2, mlp_dim=64, num_heads=4, num_kv_heads=2,
                     head_dim=8)
SMALL = PolicyConfig(action_dim=3, action_steps=8, proprio_dim=5, width=32, depth=2, mlp_dim=64,
                     num_heads=4, pool=2, channels=(16, 32))
DENOISERS = ('mlp', 'unet', 'transformer')


def policy(seed=0, **settings):
    """A small policy none of whose weights are zero."""
    torch.manual_seed(seed)
    config = replace(SMALL, **settings)
    encoder = None
    if config.encoder == 'text':
        encoder = Decoder(replace(TEXT, tied=False))
    elif config.encoder == 'vlm':
        encoder = VLM(VLMConfig(VIT, TEXT, IMAGE))
    return shaken(DiffusionPolicy(config, encoder))


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def lowdim(rows, seed=0, config=SMALL):
    """Samples with padded actions, of robots with other numbers."""
    g = torch.Generator().manual_seed(seed)
    real = torch.randint(1, config.action_steps + 1, (rows, 1), generator=g)
    action_mask = torch.rand(rows, config.action_dim, generator=g) < 0.7
    action_mask[:, 0] = True
    return dict(actions=torch.randn(rows, config.action_steps, config.action_dim, generator=g),
                is_pad=torch.arange(config.action_steps)[None] >= real, action_mask=action_mask,
                proprio=torch.randn(rows, config.proprio_dim, generator=g),
                proprio_mask=torch.rand(rows, config.proprio_dim, generator=g) < 0.8,
                keys=random_keys(seed, torch.arange(rows)), rows=torch.arange(rows))


def without(x, *keys):
    return {key: value for key, value in x.items() if key not in keys}


def observations(pictures):
    """Rows of image tokens, words and padding, with so many pictures each: a dict of tokens,
    pixels and segments."""
    width = 4 * max(pictures) + 6
    tokens = torch.full((len(pictures), width), PAD)
    for i, n in enumerate(pictures):
        words = torch.randint(10, V, (3 + i % 3,), generator=torch.Generator().manual_seed(i))
        row = torch.cat((torch.full((4 * n,), IMAGE), words))
        tokens[i, :len(row)] = row
    return dict(tokens=tokens, pixels=randn(sum(pictures), 3, 16, 16),
                segments=(tokens != PAD).long())


def take(x, i):
    return {k: v[i:i + 1] for k, v in x.items()} | {'rows': torch.tensor([0])}


def each(model, **inputs):
    """The losses of each chunk, and their counts."""
    learned = model(**inputs)['actions']
    return learned.losses, learned.counts


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def vla(seed=0, text=TEXT, **settings):
    torch.manual_seed(seed)
    config = VLAConfig(action_dim=3, action_steps=8, proprio_dim=5, width=24, mlp_dim=40)
    return shaken(VLA(replace(config, **settings), VLMConfig(VIT, text, IMAGE)))


def total(learned):
    """The sum of all losses that a model's forward gives."""
    return sum(kind.losses.sum() for kind in learned.values())
