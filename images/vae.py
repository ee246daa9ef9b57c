"""Stable Diffusion's autoencoder (arXiv 2112.10752): pictures of -1 to 1 to latents, and back.

Modules have diffusers' names, so that a state dict is a file. Axes: B batch, C channels, H W rows
and columns of a picture, a latent or a map of features.
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from diffusion import normal
from images.sd import Attention, Level, levels_of, to_map, to_tokens


@dataclass
class VAEConfig:
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)    # of each level; the next has half the rows
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215     # makes latents of about unit variance


class PixelAttention(Attention):
    """Every pixel sees every other, with one head."""

    def __init__(self, width, groups):
        super().__init__(width, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, 1e-6)

    def forward(self, x, context=None, mask=None):
        """x (B, C, H, W); the others are what a Level gives to any attention."""
        return x + to_map(super().forward(to_tokens(self.group_norm(x))), x)


class PictureEncoder(nn.Module):
    """Pictures (B, 3, H, W) -> moments of latents, each level but the last halves rows and
    columns."""

    def __init__(self, c):
        super().__init__()
        widths = tuple(c.block_out_channels)
        shape = 0, c.norm_num_groups, 1e-6      # without a time
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            # the first of a level's blocks comes to its width
            channels = [(before, width)] + [(width, width)] * (c.layers_per_block - 1)

            # without padding, for `forward` pads on two sides alone
            if i < len(widths) - 1:
                level = Level(channels, *shape, down=0)
            else:
                level = Level(channels, *shape)
            self.down_blocks.append(level)
            before = width

        # a pixel sees beyond its neighbours where there are fewest of them
        attention_between = PixelAttention(width, c.norm_num_groups)
        self.mid_block = Level([(width, width)] * 2, *shape, [attention_between])

        # a mean and a log-variance for each number of a latent
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, width, 1e-6)
        self.conv_out = nn.Conv2d(width, 2 * c.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, x)
            for sampler in level.downsamplers:
                # on the right and below, as the weights were trained
                x = sampler.conv(F.pad(x, (0, 1, 0, 1)))
        x = self.mid_block.block(0, x)
        x = self.mid_block.block(1, x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class PictureDecoder(nn.Module):
    """Latents (B, C, H, W) -> pictures, each level but the last doubles rows and columns."""

    def __init__(self, c):
        super().__init__()
        widths = tuple(c.block_out_channels[::-1])
        width = widths[0]
        shape = 0, c.norm_num_groups, 1e-6      # without a time
        self.conv_in = nn.Conv2d(c.latent_channels, width, 3, padding=1)
        attention_between = PixelAttention(width, c.norm_num_groups)
        self.mid_block = Level([(width, width)] * 2, *shape, [attention_between])

        # one residual block more than on the way down
        self.up_blocks = nn.ModuleList()
        before = width
        for i, width in enumerate(widths):
            channels = [(before, width)] + [(width, width)] * c.layers_per_block
            self.up_blocks.append(Level(channels, *shape, up=i < len(widths) - 1))
            before = width

        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, width, 1e-6)
        self.conv_out = nn.Conv2d(width, c.out_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.mid_block.block(0, x)
        x = self.mid_block.block(1, x)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, x)
            x = level.upsample(x, (2 * x.shape[2], 2 * x.shape[3]))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Pictures to latents of 1/8 of their rows and columns, and back."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        # rows of a picture for a row of its latent
        self.factor = 2 ** (levels_of(c, 'vae') - 1)
        self.encoder = PictureEncoder(c)
        self.decoder = PictureDecoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1)

    def moments(self, pixels):
        """pixels (B, 3, H, W) -> mean and standard deviation of their latents (B, C, H/8, W/8)."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, 1)
        scale = self.config.scaling_factor

        # bounded as diffusers' DiagonalGaussianDistribution does
        return scale * mean, scale * (0.5 * logvar.clamp(-30, 20)).exp()

    def encode(self, pixels, keys=None):
        """pixels (B, 3, H, W) -> latents (B, C, H/8, W/8), drawn by keys int64 (B,); without keys
        their means.

        Instead of pixels, their moments (B, 2 C, H/8, W/8), as prepare/latents.py keeps them."""
        if pixels.shape[1] == 2 * self.config.latent_channels:
            mean, std = pixels.chunk(2, 1)
        else:
            mean, std = self.moments(pixels)
        return draw(mean, std, keys)

    def decode(self, latents):
        """Latents (B, C, H, W) -> pixels (B, 3, 8 H, 8 W), of about -1 to 1."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))

    forward = encode


def draw(mean, std, keys=None):
    """Normal numbers of this mean and deviation (B, ...) by keys (B,); without keys the mean."""
    if keys is None:
        return mean
    # a stream of its own: the noise that is learned from is another
    noise = normal(keys, mean.shape[1:], stream=3)
    return mean + std * noise.to(mean)
