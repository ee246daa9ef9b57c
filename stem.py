"""A stem of convolutions for a vision tower (vit.stem=conv), which learns from fewer pictures."""
from torch import nn


class ConvStem(nn.Sequential):
    """3x3 stride-2 convolutions down to one pixel a patch: needs less data (arXiv 2106.14881)."""

    def __init__(self, width, patch_size):
        halvings = patch_size.bit_length() - 1
        if patch_size != 2 ** halvings:
            raise ValueError(f'vit.patch_size={patch_size}: a conv stem needs a power of 2')
        layers, channels = [], 3
        for i in reversed(range(halvings)):
            layers += [nn.Conv2d(channels, width >> i, 3, stride=2, padding=1),
                       nn.GroupNorm(1, width >> i), nn.GELU(approximate='tanh')]
            channels = width >> i
        super().__init__(*layers, nn.Conv2d(width, width, 1))
