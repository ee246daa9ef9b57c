"""Denoisers of action chunks: an MLP, the Diffusion Policy paper's U-Net over time (arXiv
2303.04137), a transformer; and what makes one vector of tokens.

Axes: B batch, T actions of a chunk, D numbers of an action, S tokens of a condition, C channels or
numbers of a condition, W width.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import DenoiserBlock
from model import attention


class MLPDenoiser(nn.Module):
    """A residual MLP over the whole chunk at once."""

    def __init__(self, c, condition):
        super().__init__()
        self.shape = c.action_steps, c.action_dim
        self.time = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(),
                                  nn.Linear(c.width, c.width))
        self.input = nn.Linear(math.prod(self.shape) + condition, c.width)

        # a norm before each layer, and one more at the end
        self.norms = nn.ModuleList(nn.LayerNorm(c.width) for _ in range(c.depth + 1))
        self.blocks = nn.ModuleList()
        for _ in range(c.depth):
            self.blocks.append(nn.Sequential(nn.Linear(c.width, c.mlp_dim), nn.SiLU(),
                                             nn.Linear(c.mlp_dim, c.width)))
        self.output = nn.Linear(c.width, math.prod(self.shape))

    def forward(self, x, time, condition):
        """x (B, T, D), time's embedding (B, W), condition (B, C) -> (B, T, D)."""
        # a chunk is short enough to be one vector; time is added in every layer
        time = self.time(time)
        h = self.input(torch.cat((x.flatten(1), condition), 1))
        for norm, block in zip(self.norms, self.blocks):
            h = h + block(norm(h) + time)
        return self.output(self.norms[-1](h)).unflatten(1, self.shape)


def windows(x, size, stride=1):
    """(B, T, C) -> (B, T / stride, size * C). A convolution over time is a Linear on these: as
    short as chunks are, it takes a third to two thirds of the time of conv1d."""
    # zeros before the first action and behind the last, as a convolution's own padding
    x = F.pad(x, (0, 0, size // 2, size // 2))
    return x.unfold(1, size, stride).transpose(2, 3).flatten(2)


class Upsample(nn.Module):
    """A transposed convolution, kernel 4, stride 2: (B, T, C) -> (B, 2 T, C)."""

    def __init__(self, channels):
        super().__init__()
        self.taps = nn.Linear(channels, 4 * channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        # each place reaches four of the output, so each of those has two taps of neighbours
        a, b, c, d = F.pad(self.taps(x), (0, 0, 1, 1)).chunk(4, -1)             # (B, T + 2, C)
        pairs = b[:, 1:-1] + d[:, :-2], c[:, 1:-1] + a[:, 2:]
        return torch.stack(pairs, 2).flatten(1, 2) + self.bias


class ConvBlock(nn.Module):
    """Two convolutions; time and condition scale and shift what is between (FiLM, arXiv
    1709.07871)."""
    is_block = True             # FSDP shards and torch.compile compiles block by block

    def __init__(self, inputs, outputs, condition, kernel_size):
        super().__init__()
        self.kernel_size = kernel_size
        self.conv1 = nn.Linear(kernel_size * inputs, outputs)
        self.conv2 = nn.Linear(kernel_size * outputs, outputs)
        self.norm1, self.norm2 = nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)
        self.film = nn.Linear(condition, 2 * outputs)
        self.skip = nn.Identity()
        if inputs != outputs:
            self.skip = nn.Linear(inputs, outputs)

    def forward(self, x, condition):
        """x (B, T, inputs), condition (B, C) after its Mish -> (B, T, outputs)."""
        # GroupNorm wants channels before time
        scale, shift = self.film(condition)[:, None].chunk(2, -1)
        h = F.mish(self.norm1(self.conv1(windows(x, self.kernel_size)).mT)).mT
        h = torch.addcmul(shift, scale, h)
        h = F.mish(self.norm2(self.conv2(windows(h, self.kernel_size)).mT)).mT
        return h + self.skip(x)


class UNet1d(nn.Module):
    """The U-Net over time of the Diffusion Policy paper, which leaves out the skip of the first
    resolution."""

    def __init__(self, action_dim, condition, channels=(256, 512, 1024), kernel_size=5, width=256):
        super().__init__()
        self.kernel_size = kernel_size
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(),
                                  nn.Linear(4 * width, width))
        condition += width

        def pair(i, o):
            return nn.ModuleList((ConvBlock(i, o, condition, kernel_size),
                                  ConvBlock(o, o, condition, kernel_size)))

        # down: two blocks, then half the length; up: double, and the skip of that length
        sizes = [action_dim, *channels]
        steps_up = list(zip(channels, channels[1:]))[::-1]
        self.down = nn.ModuleList(pair(i, o) for i, o in zip(sizes, channels))
        self.downsample = nn.ModuleList(nn.Linear(3 * c, c) for c in channels[:-1])
        self.middle = pair(channels[-1], channels[-1])
        self.up = nn.ModuleList(pair(2 * o, i) for i, o in steps_up)
        self.upsample = nn.ModuleList(Upsample(c) for c in channels[-2::-1])
        self.conv = nn.Linear(kernel_size * channels[0], channels[0])
        self.norm = nn.GroupNorm(8, channels[0])
        self.output = nn.Linear(channels[0], action_dim)

    def forward(self, x, time, condition):
        """x (B, T, D), time's embedding (B, W), condition (B, C) -> (B, T, D)."""
        # the Mish before every film is the same
        condition = F.mish(torch.cat((self.time(time), condition), 1))
        skips = []
        for level, (first, second) in enumerate(self.down):
            x = second(first(x, condition), condition)
            skips.append(x)
            if level < len(self.downsample):
                x = self.downsample[level](windows(x, 3, 2))

        # skips from the last resolution on; that of the first is left
        x = self.middle[1](self.middle[0](x, condition), condition)
        for (first, second), upsample in zip(self.up, self.upsample):
            x = torch.cat((x, skips.pop()), -1)
            x = upsample(second(first(x, condition), condition))
        return self.output(F.mish(self.norm(self.conv(windows(x, self.kernel_size)).mT)).mT)


class Transformer(nn.Module):
    """A DiT over the actions of a chunk; time and state modulate, tokens are read by
    cross-attention."""

    def __init__(self, c, condition, context):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(),
                                  nn.Linear(c.width, c.width))
        self.condition = nn.Linear(condition, c.width)
        self.input = nn.Linear(c.action_dim, c.width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, c.action_steps, c.width))
        self.blocks = nn.ModuleList(DenoiserBlock(c, context) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        self.output = nn.Linear(c.width, c.action_dim)

    # masks and context are those of a DenoiserBlock
    def forward(self, x, time, condition, mask=None, context=None, context_mask=None):
        """x (B, T, D), time's embedding (B, W), condition (B, C) -> (B, T, D)."""
        # one vector modulates all layers; each of them applies its own matrix to it
        condition = F.silu(self.time(time) + self.condition(condition))
        x = self.input(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, condition, mask, context, context_mask)
        return self.output(self.norm(x))


class Pool(nn.Module):
    """Tokens to vectors: each of `queries` learned queries takes a mean of them, weighed by a
    softmax.

    One head a query, and no keys and values of its own: what they would do, the query and the
    output can."""

    def __init__(self, context, width, queries):
        super().__init__()
        # the queries; so named, they are trained without weight decay
        self.pos_embed = nn.Parameter(torch.randn(1, queries, context))
        self.norm, self.o = nn.LayerNorm(context), nn.Linear(context, width)

    def forward(self, x, mask):
        """x (B, S, C), mask (B, S) -> (B, queries * width)."""
        x = self.norm(x)[:, :, None]                                        # (B, S, 1, C)
        q = self.pos_embed.to(x).expand(len(x), -1, -1)[:, :, None]         # (B, queries, 1, C)
        mask = mask[:, None].expand(-1, q.shape[1], -1)
        return self.o(attention(q, x, x, mask).flatten(2)).flatten(1)
