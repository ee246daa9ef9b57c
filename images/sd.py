"""Stable Diffusion 1 and 2 (arXiv 2112.10752): its U-Net, and all of it as a TextToImage.

The autoencoder is in images/vae.py and made of the same blocks, the text tower in images/clip.py;
families/diffusers.py reads and writes their folders. U-Net and autoencoder name their modules as
diffusers does, so that a state dict is a file. A latent is what the U-Net sees: the autoencoder's,
times its scaling_factor.

Axes: B batch, C channels, H W rows and columns of a map of features, T = H W pixels as tokens,
S text tokens, N heads, D width. A map of features is (B, C, H, W); with weights of channels_last,
which draws faster and is what families/diffusers.py gives, it is (B, H, W, C) in memory, and
tokens are a view of it.
"""
import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import Schedule, check_widths
from images.dit import TextToImage
from model import attention, check_sizes, run_block


@dataclass
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)  # of each level; the next has half the rows
    cross_attention: tuple = (True, True, True, False)  # levels that read the text
    layers_per_block: int = 2           # residual blocks of a level, one more on the way up
    num_heads: tuple = (8, 8, 8, 8)     # of each level: config.json's attention_head_dim
    cross_attention_dim: int = 768      # width of the text tower
    use_linear_projection: bool = False     # around the attention, not 1 x 1 convolutions
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    beta_schedule: str = 'scaled_linear'    # of its noise: as `diffusion.Schedule` takes them
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    prediction_type: str = 'epsilon'
    timestep_spacing: str = 'leading'
    set_alpha_to_one: bool = False
    rescale_betas_zero_snr: bool = False
    remat: bool = False         # recompute blocks in the backward pass: less memory, more time


# -------------------------------------------------------------------------------------------------
# maps of features, and tokens


def rows_as(x, like):
    """x (B, ...), repeated to as many rows as `like` has: until a text is read, what two texts
    guide is the same."""
    if len(x) == len(like):
        return x
    return torch.cat([x] * (len(like) // len(x)))


def to_tokens(x):
    """(B, C, H, W) -> (B, T, C)"""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(x, like):
    """(B, T, C) -> (B, C, H, W)"""
    return x.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def pixelwise(layer, x):
    """A linear layer, or a convolution of one pixel, of tokens (B, T, C)."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


# -------------------------------------------------------------------------------------------------
# what U-Net and autoencoder are made of


class ResnetBlock(nn.Module):
    is_block = True     # FSDP shards and torch.compile compiles block by block

    def __init__(self, channels, out_channels, time_dim, groups, eps):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if time_dim:
            self.time_emb_proj = nn.Linear(time_dim, out_channels)
        if channels != out_channels:
            self.conv_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, time=None):
        """x (B, C, H, W), time (B, D) after its activation."""
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + rows_as(self.time_emb_proj(time)[:, :, None, None], h)

        # the way around is a projection where the width changes
        if h.shape[1] != x.shape[1]:
            x = to_map(pixelwise(self.conv_shortcut, to_tokens(x)), x)
        return x + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Of tokens among themselves, or on a context of another width."""

    def __init__(self, width, num_heads, context_dim=0, bias=False):
        super().__init__()
        self.num_heads = num_heads
        context_dim = context_dim or width
        self.to_q = nn.Linear(width, width, bias)
        self.to_k = nn.Linear(context_dim, width, bias)
        self.to_v = nn.Linear(context_dim, width, bias)
        # diffusers has a dropout in it as well: the linear layer's name is to_out.0
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def heads(self, x):
        """(B, T, D) -> (B, T, N, H)"""
        return x.unflatten(-1, (self.num_heads, -1))

    def read(self, context):
        """Keys and values of a context (B, S, D), each (B, S, N, H)."""
        return self.heads(self.to_k(context)), self.heads(self.to_v(context))

    def forward(self, x, context=None, mask=None):
        """x (B, T, D), context (B, S, D), or what `read` gave of it, or None: x itself; mask bool
        (B, 1, S)."""
        if context is None:
            context = x
        if not isinstance(context, tuple):
            context = self.read(context)
        k, v = context
        out = attention(self.heads(self.to_q(x)), k, v, mask)
        return self.to_out(out.flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width, num_heads, context_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.attn1 = Attention(width, num_heads)
        self.attn2 = Attention(width, num_heads, context_dim)
        # layer 1 is diffusers' dropout: what follows keeps its number
        layers = GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        self.ff = nn.ModuleDict({'net': nn.Sequential(*layers)})

    def forward(self, x, context, mask):
        x = x + self.attn1(self.norm1(x))

        # here a text is read: with two of them, each row becomes two
        text = context[0] if isinstance(context, tuple) else context
        x = rows_as(x, text)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff['net'](self.norm3(x))


class SpatialTransformer(nn.Module):
    """A map of features as tokens, which see each other and the text."""

    is_block = True     # FSDP shards and torch.compile compiles block by block

    def __init__(self, c, level):
        super().__init__()
        width = c.block_out_channels[level]
        self.norm = nn.GroupNorm(c.norm_num_groups, width, 1e-6)
        if c.use_linear_projection:
            self.proj_in = nn.Linear(width, width)
            self.proj_out = nn.Linear(width, width)
        else:
            self.proj_in = nn.Conv2d(width, width, 1)
            self.proj_out = nn.Conv2d(width, width, 1)
        block = TransformerBlock(width, c.num_heads[level], c.cross_attention_dim)
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, x, context, mask):
        h = pixelwise(self.proj_in, to_tokens(self.norm(x)))
        h = self.transformer_blocks[0](h, context, mask)

        # the block may have made more rows of it
        x = rows_as(x, h)
        return x + to_map(pixelwise(self.proj_out, h), x)


class Sampler(nn.Module):
    """A convolution that halves rows and columns, or follows their doubling."""

    def __init__(self, channels, stride=1, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding)


# a kernel of 3 rows on rows that come twice, as two kernels of 2: of the lower of two equal rows,
# and of the next upper one
ROWS = torch.tensor([[[1.0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]])


def doubled(conv, x):
    """conv, 3 x 3, of x (B, C, H, W), each pixel of it doubled to a square: (B, C, 2 H, 2 W).

    Two of three rows that a kernel meets there are one row of x, and so with columns: for each
    pixel of a square that is a kernel of 2 x 2 on x, with 16 products instead of 36."""
    # weights are added up in their own precision, which autocast would lower
    with torch.autocast(x.device.type, enabled=False):
        fold = torch.einsum('pai,qbj->pqabij', ROWS, ROWS).reshape(16, 9).to(conv.weight)
        w = fold @ conv.weight.permute(0, 2, 3, 1).flatten(1, 2)        # (C, 4 pixels x 4, C)
    w = w.unflatten(1, (4, 2, 2)).flatten(0, 1).permute(0, 3, 1, 2)     # (4 C, C, 2, 2)

    # four channels are a square; half a square too many comes out at every edge
    x = F.conv2d(x, w, conv.bias.repeat_interleave(4), padding=1)       # (B, 4 C, H + 1, W + 1)
    return F.pixel_shuffle(x, 2)[:, :, 1:-1, 1:-1]


class Level(nn.Module):
    """Residual blocks with an attention after each, or none.

    channels: (in, out) of each block. down: how the convolution that halves rows and columns is
    padded, None without one. up: whether they are doubled."""

    def __init__(self, channels, time_dim, groups, eps, attentions=(), down=None, up=False):
        super().__init__()
        self.resnets = nn.ModuleList()
        for channels_in, channels_out in channels:
            self.resnets.append(ResnetBlock(channels_in, channels_out, time_dim, groups, eps))
        self.attentions = nn.ModuleList(attentions)

        # lists of one, as diffusers has them
        width = channels[-1][1]
        self.downsamplers = nn.ModuleList()
        if down is not None:
            self.downsamplers.append(Sampler(width, 2, down))
        self.upsamplers = nn.ModuleList()
        if up:
            self.upsamplers.append(Sampler(width))

    def block(self, i, x, time=None, context=None, mask=None):
        x = self.resnets[i](x, time)
        if i < len(self.attentions):
            x = self.attentions[i](x, context, mask)
        return x

    def upsample(self, x, size):
        """Rows and columns doubled, or one less, and what the convolution makes of it."""
        if not self.upsamplers:
            return x
        conv = self.upsamplers[0].conv
        rows, columns = x.shape[2:]

        # with fewer pixels, to make other kernels costs more
        if size == (2 * rows, 2 * columns) and len(x) * rows * columns >= 256:
            return doubled(conv, x)
        return conv(F.interpolate(x, size, mode='nearest'))


# those of the U-Net and the autoencoder
SIZES = ('in_channels', 'out_channels', 'latent_channels', 'layers_per_block',
         'cross_attention_dim', 'norm_num_groups', 'num_train_timesteps')


def levels_of(c, what):
    """Number of levels, if the settings of all of them are as many. Raises ValueError."""
    widths = c.block_out_channels
    num_levels = len(widths)
    check_sizes(c, what, ' '.join(name for name in SIZES if hasattr(c, name)))
    for name in ('block_out_channels', 'num_heads'):
        check_widths(f'{what}.{name}', getattr(c, name, [1]))

    # an autoencoder has no such settings
    for key in ('cross_attention', 'num_heads'):
        if hasattr(c, key) and len(getattr(c, key)) != num_levels:
            raise ValueError(
                f'{what}.{key}={getattr(c, key)}: block_out_channels has {num_levels} levels')

    # channels come in groups and in heads of equal size
    divisors = {'norm_num_groups': [c.norm_num_groups] * num_levels}
    if hasattr(c, 'num_heads'):
        divisors['num_heads'] = c.num_heads
    for key, values in divisors.items():
        for width, value in zip(widths, values):
            if value < 1 or width % value:
                raise ValueError(f'{what}.{key}={getattr(c, key)} does not divide '
                                 f'block_out_channels={widths}')
    return num_levels


# -------------------------------------------------------------------------------------------------
# U-Net


def time_features(t, width):
    """Times (B,) of 0 to 999 -> cosines and sines, fp32 (B, width)."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / half))
    angle = t.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), 1)


class UNet2DCondition(nn.Module):
    """What the noise is in a latent (or what else its schedule asks for), given a text."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        num_levels = levels_of(c, 'unet')
        widths = tuple(c.block_out_channels)
        time_dim = 4 * widths[0]
        shape = time_dim, c.norm_num_groups, c.norm_eps

        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict({
            'linear_1': nn.Linear(widths[0], time_dim),
            'linear_2': nn.Linear(time_dim, time_dim)})

        def level(i, inputs, down=None, up=False):
            """Level i, of blocks that get maps of these widths."""
            attentions = []
            if c.cross_attention[i]:
                attentions = [SpatialTransformer(c, i) for _ in inputs]
            channels = [(width, widths[i]) for width in inputs]
            return Level(channels, *shape, attentions, down, up)

        # Down. Every map is kept for the way up, the first and the halved ones too: skips are
        # their widths.
        self.down_blocks = nn.ModuleList()
        width, skips = widths[0], [widths[0]]
        for i in range(num_levels):
            inputs = [width] + [widths[i]] * (c.layers_per_block - 1)
            width = widths[i]
            skips += [width] * c.layers_per_block
            if i < num_levels - 1:
                self.down_blocks.append(level(i, inputs, down=1))
                skips.append(width)
            else:
                self.down_blocks.append(level(i, inputs))

        # in the middle, always with a text
        attention_between = SpatialTransformer(c, num_levels - 1)
        self.mid_block = Level([(width, width)] * 2, *shape, [attention_between])

        # Up. Each block gets what comes from below and the last map that is kept.
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(num_levels)):
            from_below = [width] + [widths[i]] * c.layers_per_block
            inputs = [below + skips.pop() for below in from_below]
            self.up_blocks.append(level(i, inputs, up=i > 0))
            width = widths[i]

        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, width, c.norm_eps)
        self.conv_out = nn.Conv2d(width, c.out_channels, 3, padding=1)

    def read(self, context):
        """A text (B, S, D) as keys and values for each attention on it, which are the same at all
        times."""
        blocks = [module for module in self.modules() if isinstance(module, TransformerBlock)]
        return [block.attn2.read(context) for block in blocks]

    def forward(self, x, t, context, context_mask=None):
        """x (B, C, H, W), t (B,) of 0 to 999, context (B, S, D), or what `read` gave of it,
        context_mask bool (B, S) -> (B, C, H, W). With n times as many texts as x has rows, x and t
        are meant n times: (n B, C, H, W)."""
        time = time_features(t, self.config.block_out_channels[0]).to(x.dtype)
        time = self.time_embedding['linear_1'](time)
        time = F.silu(self.time_embedding['linear_2'](F.silu(time)))    # (B, D)
        mask = None
        if context_mask is not None:
            mask = context_mask[:, None]        # (B, 1, S)

        # what was read: one for each attention, in the order in which they come
        if isinstance(context, list):
            texts = iter(context)
        else:
            texts = itertools.repeat(context)

        def block(level, i, x):
            text = None
            if i < len(level.attentions):
                text = next(texts)
            return run_block(level.block, self.config.remat, i, x, time, text, mask)

        # down, and keep every map
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = block(level, i, x)
                skips.append(x)
            for sampler in level.downsamplers:
                x = sampler.conv(x)
                skips.append(x)

        for i in range(2):
            x = block(self.mid_block, i, x)

        # up, to the size it was on the way down: where 2 did not divide it, one less than double
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = torch.cat((x, rows_as(skips.pop(), x)), 1)
                x = block(level, i, x)
            if skips:
                x = level.upsample(x, skips[-1].shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# -------------------------------------------------------------------------------------------------
# all of it


def schedule_of(c):
    """The Schedule of a UNetConfig, as StableDiffusionPipeline has DDIM: nothing is clipped, and
    times begin at 1."""
    return Schedule(
        c.beta_schedule, c.num_train_timesteps, c.prediction_type, c.beta_start, c.beta_end,
        clip_sample=False, timestep_spacing=c.timestep_spacing, steps_offset=1,
        set_alpha_to_one=c.set_alpha_to_one, rescale_betas_zero_snr=c.rescale_betas_zero_snr)


def build(dit, unet, text, vae, empty):
    """A TextToImage of a UNet2DCondition, a CLIPText and an AutoencoderKL, which is not trained.

    dit: its image_size, the rows of a latent, and drop; empty: ids of the empty sentence, padded
    as CLIP's."""
    dit = replace(dit, objective='ddpm', channels=unet.config.out_channels)
    model = TextToImage(dit, text, unet, vae, empty)
    model.schedule = schedule_of(unet.config)
    # what convolutions are fastest with
    model.memory_format = torch.channels_last
    vae.requires_grad_(False)
    return model
