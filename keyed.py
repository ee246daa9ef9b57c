"""Random numbers from keys: noise, times, and the dropout of layers.

Nothing here comes from a global generator: all is a function of int64 keys, so that what a sample
gets does not depend on ranks, on micro-batches, on who else is in the batch, or on the device:

    keys = random_keys(seed, positions)
    noise = normal(keys, x.shape[1:])
    t = schedule.times(uniform(keys, 1, 1)[:, 0])

Axes: B batch, T tokens, D width.
"""
import math

import torch
from torch import nn

# splitmix64 (Steele, Lea, Flood 2014) counts, Box-Muller makes normals

# splitmix64's constants as int64, whose products wrap around as those of its unsigned numbers do
GOLDEN = 0x9E3779B97F4A7C15 - 2 ** 64
MIX1 = 0xBF58476D1CE4E5B9 - 2 ** 64
MIX2 = 0x94D049BB133111EB - 2 ** 64


def logical_shift(x, n):
    """int64 x as 64 bits without a sign, moved right by n: torch's own shift repeats the sign."""
    return x >> n & (1 << 64 - n) - 1


def mix64(x):
    """splitmix64's finalizer, a bijection of int64."""
    x = (x ^ logical_shift(x, 30)) * MIX1
    x = (x ^ logical_shift(x, 27)) * MIX2
    return x ^ logical_shift(x, 31)


def random_keys(seed, positions):
    """A key for every position (B,) of a run: int64 (B,)."""
    # each is mixed before they meet, so that position 1 of seed 0 is not position 0 of seed 1
    seeds = torch.full_like(positions, seed, dtype=torch.long)
    return mix64(mix64(positions.long() + GOLDEN) ^ mix64(seeds))


def random_bits(keys, count, stream=0):
    """64 random bits, (B, count), from keys int64 (B,).

    Streams are independent: 0 noise, 1 times, 2 dropped conditions, 3 latents, 4 the dropout of a
    row's tokens or of a picture's patches, 5 of its actions, 6 of texts, 16 on DDPM's steps.
    """
    # a key may be any number, a raw seed too: mixed twice, near ones begin far from each other
    start = mix64(mix64(keys.long()) + stream)[:, None]     # (B, 1)
    return mix64(start + GOLDEN * torch.arange(1, count + 1, device=keys.device))


def open_unit(bits):
    """The lowest 23 bits as a number above 0 and below 1: so many are exact in fp32."""
    return ((bits & (1 << 23) - 1) + 0.5) / 2 ** 23


def uniform(keys, count, stream=0):
    """Numbers above 0 and below 1, fp32 (B, count), from keys (B,)."""
    return open_unit(random_bits(keys, count, stream))


def normal(keys, shape, stream=0):
    """Standard normal numbers, fp32 (B, *shape), from keys (B,)."""
    count = math.prod(shape)
    bits = random_bits(keys, math.ceil(count / 2), stream)

    # A point of the plane, by its radius and its angle, has two coordinates that are normal and
    # independent: of 64 bits, the upper 23 make the one, the lower 23 the other.
    radius = open_unit(logical_shift(bits, 41)).log().mul(-2).sqrt()
    angle = (bits & (1 << 23) - 1) * (2 * math.pi / 2 ** 23)
    numbers = torch.cat((radius * angle.cos(), radius * angle.sin()), 1)

    # an odd count leaves one over
    return numbers[:, :count].reshape(-1, *shape)


# -------------------------------------------------------------------------------------------------
# dropout


def token_keys(settings, batch, device='cpu'):
    """A key for every token of a run's collated batch: int64 (B, T)."""
    numbers = torch.as_tensor(batch['numbers'])
    if numbers.shape[1] > 1:            # packed: each token has that of its segment
        segments = torch.as_tensor(batch['segments']).long() - 1
        numbers = numbers.gather(1, segments.clamp(0, numbers.shape[1] - 1))
    places = torch.arange(settings['seq_len'], device=device)
    return random_keys(settings['seed'], numbers.to(device) + places)


class Dropout(nn.Module):
    """Dropout whose mask follows from the tokens' keys: each number of a token is 0 with
    probability p.

    A token's key is two numbers a and d of 32 bits, a channel c has a random one of this layer's:
    what a * c + d is, modulo 2^32, is as good as random (multiply-shift, Dietzfelbinger 1996), and
    takes less time than nn.Dropout's numbers. number: that of the layer; all differ."""

    def __init__(self, p, width, number):
        super().__init__()
        assert 0 <= p < 1, f'dropout={p}'
        self.p = p
        self.limit = round(p * 2 ** 32) - 2 ** 31
        channels = random_bits(torch.tensor([number]), width)[0].int()
        self.register_buffer('channels', channels, persistent=False)

    def forward(self, x, keys):
        """x (B, T, D), keys int64 (B, T)."""
        if not self.training:
            return x
        if keys is None:
            raise ValueError(f'dropout={self.p} needs keys in training: keyed.py has token_keys')
        a, d = keys.int()[..., None], (keys >> 32).int()[..., None]     # (B, T, 1)
        is_dropped = torch.addcmul(d, a, self.channels) < self.limit
        return torch.where(is_dropped, 0, x) * (1 / (1 - self.p))
