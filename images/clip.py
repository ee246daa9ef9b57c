"""CLIP's text tower (arXiv 2103.00020), which Stable Diffusion 1 and 2 read.

Modules are named as those of our other towers.

Axes: B batch, S tokens, N heads, H head dim, D width.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model import attention, check_sizes


@dataclass
class CLIPTextConfig:
    vocab_size: int = 49408
    width: int = 768
    depth: int = 12             # blocks
    mlp_dim: int = 3072
    num_heads: int = 12
    max_length: int = 77        # tokens
    activation: str = 'quick_gelu'      # quick_gelu (OpenAI's CLIP) | gelu (SD 2)
    norm_eps: float = 1e-5
    feature_layer: int = -1     # block whose output is used, normed: -1 last, -2 is clip_skip=1


def quick_gelu(x):
    # gelu is x times the normal distribution's integral, which a logistic curve comes near
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {'quick_gelu': quick_gelu, 'gelu': F.gelu}


class CLIPBlock(nn.Module):
    is_block = True     # FSDP shards and torch.compile compiles block by block

    def __init__(self, c):
        super().__init__()
        self.num_heads = c.num_heads
        self.activation = ACTIVATIONS[c.activation]
        self.norm1 = nn.LayerNorm(c.width, c.norm_eps)
        self.norm2 = nn.LayerNorm(c.width, c.norm_eps)
        self.q = nn.Linear(c.width, c.width)
        self.k = nn.Linear(c.width, c.width)
        self.v = nn.Linear(c.width, c.width)
        self.o = nn.Linear(c.width, c.width)
        self.fc1 = nn.Linear(c.width, c.mlp_dim)
        self.fc2 = nn.Linear(c.mlp_dim, c.width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.num_heads, -1)) for f in (self.q, self.k, self.v))

        # a token sees those before it, in padding too
        x = x + self.o(attention(q, k, v, is_causal=True).flatten(2))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class CLIPText(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.activation not in ACTIVATIONS:
            raise ValueError(f'clip.activation={c.activation!r}: expected one of '
                             f'{", ".join(ACTIVATIONS)}')
        check_sizes(c, 'clip', 'vocab_size width depth mlp_dim num_heads max_length')
        if c.width % c.num_heads:
            raise ValueError(
                f'clip.width={c.width} must be a multiple of clip.num_heads={c.num_heads}')
        if not -c.depth <= c.feature_layer < c.depth:
            raise ValueError(f'clip.feature_layer={c.feature_layer}: expected -{c.depth} to '
                             f'{c.depth - 1}, of the {c.depth} blocks')

        self.embedding = nn.Embedding(c.vocab_size, c.width)
        self.pos_embed = nn.Embedding(c.max_length, c.width)
        # What comes after feature_layer is not built: a parameter without a gradient would stop
        # DDP.
        num_blocks = c.feature_layer % c.depth + 1
        self.blocks = nn.ModuleList(CLIPBlock(c) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(c.width, c.norm_eps)

    def forward(self, tokens, segments=None):
        """tokens (B, S) -> (B, S, D). Causal, so that what is padded on the right changes nothing
        before it; Stable Diffusion looks at the padding, too: segments are not used."""
        x = self.embedding(tokens) + self.pos_embed.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
