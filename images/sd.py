"""Stable Diffusion 1 and 2 (arXiv 2112.10752): its U-Net, autoencoder and text tower. families/diffusers.py reads and writes them.

U-Net and autoencoder name their modules as diffusers does, so that a state dict is a file; the text tower is named as
our other towers. Pictures are -1 to 1; a latent is what the U-Net sees: the autoencoder's, times its scaling_factor.

Axes: B batch, C channels, H W rows and columns of a picture, a latent or a map of features, T = H W pixels as tokens,
S text tokens, N heads, D width. Maps of features are (B, C, H, W); with weights of channels_last, which is faster for
drawing and what families/diffusers.py gives, they are (B, H, W, C) in memory, and tokens are a view of them.
"""
import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import Schedule, normal
from images.dit import TextToImage
from model import attention, run_block


@dataclass
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)     # of each level; the next has half as many rows and columns
    cross_attention: tuple = (True, True, True, False)     # levels that read the text
    layers_per_block: int = 2       # residual blocks of a level, one more on the way up
    num_heads: tuple = (8, 8, 8, 8)     # of each level: what config.json calls attention_head_dim
    cross_attention_dim: int = 768      # width of the text tower
    use_linear_projection: bool = False     # around the attention, else a convolution of one pixel: the same numbers
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
    remat: bool = False         # recompute the blocks in the backward pass instead of keeping what they computed


@dataclass
class VAEConfig:
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)       # of each level; the next has half as many rows and columns
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215     # makes latents of about unit variance


@dataclass
class CLIPTextConfig:
    vocab_size: int = 49408
    width: int = 768
    depth: int = 12             # blocks
    mlp_dim: int = 3072
    num_heads: int = 12
    max_length: int = 77        # tokens
    activation: str = 'quick_gelu'      # quick_gelu: x sigmoid(1.702 x) (OpenAI's CLIP) | gelu (SD 2)
    norm_eps: float = 1e-5
    feature_layer: int = -1     # block whose output is used, normed in any case: -1 the last, -2 is clip_skip=1


# ----------------------------------------------------------------------------------------------------------------------
# what U-Net and autoencoder are made of


class ResnetBlock(nn.Module):
    def __init__(self, channels, out_channels, time_dim, groups, eps):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels, eps), nn.GroupNorm(groups, out_channels, eps)
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
        if h.shape[1] != x.shape[1]:
            x = to_map(pixelwise(self.conv_shortcut, to_tokens(x)), x)
        return x + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Of tokens among themselves, or on a context of another width."""

    def __init__(self, width, num_heads, context_dim=0, bias=False):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width, bias)
        self.to_k, self.to_v = (nn.Linear(context_dim or width, width, bias) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def read(self, context):
        """Keys and values of a context (B, S, D), each (B, S, N, H)."""
        return tuple(f(context).unflatten(-1, (self.num_heads, -1)) for f in (self.to_k, self.to_v))

    def forward(self, x, context=None, mask=None):
        """x (B, T, D), context (B, S, D), or what `read` gave of it, or None: x itself; mask bool (B, 1, S)."""
        k, v = context if isinstance(context, tuple) else self.read(x if context is None else context)
        q = self.to_q(x).unflatten(-1, (self.num_heads, -1))                            # (B, T, N, H)
        return self.to_out(attention(q, k, v, mask).flatten(2))


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
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, num_heads), Attention(width, num_heads, context_dim)
        self.ff = nn.ModuleDict({'net': nn.Sequential(GEGLU(width, 4 * width), nn.Identity(),
                                                      nn.Linear(4 * width, width))})

    def forward(self, x, context, mask):
        x = x + self.attn1(self.norm1(x))
        x = rows_as(x, context[0] if isinstance(context, tuple) else context)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff['net'](self.norm3(x))


class SpatialTransformer(nn.Module):
    """A map of features as tokens, which see each other and the text."""

    def __init__(self, c, level):
        super().__init__()
        width = c.block_out_channels[level]
        self.norm = nn.GroupNorm(c.norm_num_groups, width, 1e-6)
        self.proj_in, self.proj_out = (
            nn.Linear(width, width) if c.use_linear_projection else nn.Conv2d(width, width, 1) for _ in range(2))
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, c.num_heads[level], c.cross_attention_dim)])

    def forward(self, x, context, mask):
        h = pixelwise(self.proj_in, to_tokens(self.norm(x)))
        h = self.transformer_blocks[0](h, context, mask)
        x = rows_as(x, h)
        return x + to_map(pixelwise(self.proj_out, h), x)


class PixelAttention(Attention):
    """Of the autoencoder: every pixel sees every other, one head."""

    def __init__(self, width, groups):
        super().__init__(width, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, 1e-6)

    def forward(self, x, context=None, mask=None):
        return x + to_map(super().forward(to_tokens(self.group_norm(x))), x)


def rows_as(x, like):
    """x (B, ...), repeated to as many rows as `like` has: until a text is read, what two texts guide is the same."""
    return x if len(x) == len(like) else torch.cat([x] * (len(like) // len(x)))


def to_tokens(x):
    """(B, C, H, W) -> (B, T, C)"""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def pixelwise(layer, x):
    """A linear layer, or a convolution of one pixel, of tokens (B, T, C)."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def to_map(x, like):
    """(B, T, C) -> (B, C, H, W)"""
    return x.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class Sampler(nn.Module):
    """A convolution that halves rows and columns, or follows their doubling."""

    def __init__(self, channels, stride=1, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding)


# a kernel of 3 rows on rows that come twice, as two kernels of 2: of the lower of two equal rows, of the next upper one
ROWS = torch.tensor([[[1.0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]])


def doubled(conv, x):
    """conv, 3 x 3, of x (B, C, H, W) whose pixels are doubled to squares of four -> (B, C, 2 H, 2 W).

    Two of three rows that a kernel meets there are one row of x, and so with columns: for each pixel of a square that
    is a kernel of 2 x 2 on x, with 16 products instead of 36."""
    with torch.autocast(x.device.type, enabled=False):
        fold = torch.einsum('pai,qbj->pqabij', ROWS, ROWS).reshape(16, 9).to(conv.weight)
        w = fold @ conv.weight.permute(0, 2, 3, 1).flatten(1, 2)            # (C, 4 pixels x 4, C)
    w = w.unflatten(1, (4, 2, 2)).flatten(0, 1).permute(0, 3, 1, 2)         # (4 C, C, 2, 2)
    x = F.conv2d(x, w, conv.bias.repeat_interleave(4), padding=1)           # (B, 4 C, H + 1, W + 1)
    return F.pixel_shuffle(x, 2)[:, :, 1:-1, 1:-1]


class Level(nn.Module):
    """Residual blocks with an attention after each, or none; `channels`: (in, out) of each block."""

    def __init__(self, channels, time_dim, groups, eps, attentions=(), down=None, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b, time_dim, groups, eps) for a, b in channels)
        self.attentions = nn.ModuleList(attentions)
        width = channels[-1][1]
        self.downsamplers = nn.ModuleList([Sampler(width, 2, down)] if down is not None else [])
        self.upsamplers = nn.ModuleList([Sampler(width)] if up else [])

    def block(self, i, x, time=None, context=None, mask=None):
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context, mask) if i < len(self.attentions) else x

    def upsample(self, x, size):
        """Rows and columns doubled, or one less, and what the convolution makes of it."""
        if not self.upsamplers:
            return x
        conv = self.upsamplers[0].conv
        many = len(x) * x.shape[2] * x.shape[3] >= 256          # with fewer pixels, to make other kernels costs more
        if many and size == (2 * x.shape[2], 2 * x.shape[3]):
            return doubled(conv, x)
        return conv(F.interpolate(x, size, mode='nearest'))


def schedule_of(c):
    """The Schedule of a UNetConfig, as StableDiffusionPipeline has DDIM: nothing is clipped, and times begin at 1."""
    return Schedule(c.beta_schedule, c.num_train_timesteps, c.prediction_type, c.beta_start, c.beta_end,
                    clip_sample=False, timestep_spacing=c.timestep_spacing, steps_offset=1,
                    set_alpha_to_one=c.set_alpha_to_one, rescale_betas_zero_snr=c.rescale_betas_zero_snr)


def levels_of(c, what):
    """Number of levels, if the settings of all of them are as many. Raises ValueError."""
    n = len(c.block_out_channels)
    for key in ('cross_attention', 'num_heads'):
        if len(getattr(c, key, c.block_out_channels)) != n:
            raise ValueError(f'{what}.{key}={getattr(c, key)}: block_out_channels has {n} levels')
    for key, divisors in (('norm_num_groups', (c.norm_num_groups,) * n), ('num_heads', getattr(c, 'num_heads', ()))):
        for width, divisor in zip(c.block_out_channels, divisors):
            if divisor < 1 or width % divisor:
                raise ValueError(f'{what}.{key}={getattr(c, key)} does not divide block_out_channels='
                                 f'{c.block_out_channels}')
    return n


# ----------------------------------------------------------------------------------------------------------------------
# U-Net


def time_features(t, width):
    """Times (B,) of 0 to 999 -> cosines and sines, fp32 (B, width)."""
    half = width // 2
    angle = t.float()[:, None] * torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / half))
    return torch.cat((angle.cos(), angle.sin()), 1)


class UNet2DCondition(nn.Module):
    """What the noise is in a latent (or what else its schedule asks for), given a text."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        n, widths = levels_of(c, 'unet'), tuple(c.block_out_channels)
        time_dim, args = 4 * widths[0], (4 * widths[0], c.norm_num_groups, c.norm_eps)
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict({'linear_1': nn.Linear(widths[0], time_dim),
                                             'linear_2': nn.Linear(time_dim, time_dim)})

        def level(i, channels, **more):
            attends = c.cross_attention[i]
            return Level(channels, *args, [SpatialTransformer(c, i) for _ in channels if attends], **more)

        self.down_blocks, skips, width = nn.ModuleList(), [widths[0]], widths[0]
        for i in range(n):
            channels = [(width if j == 0 else widths[i], widths[i]) for j in range(c.layers_per_block)]
            self.down_blocks.append(level(i, channels, down=1 if i < n - 1 else None))
            width = widths[i]
            skips += [width] * (c.layers_per_block + (i < n - 1))
        self.mid_block = Level([(width, width)] * 2, *args, [SpatialTransformer(c, n - 1)])
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(n)):
            channels = [((width if j == 0 else widths[i]) + skips.pop(), widths[i])
                        for j in range(c.layers_per_block + 1)]
            self.up_blocks.append(level(i, channels, up=i > 0))
            width = widths[i]
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, width, c.norm_eps)
        self.conv_out = nn.Conv2d(width, c.out_channels, 3, padding=1)

    def read(self, context):
        """A text (B, S, D) as keys and values for each attention on it, which are the same at all times."""
        return [module.attn2.read(context) for module in self.modules() if isinstance(module, TransformerBlock)]

    def forward(self, x, t, context, context_mask=None):
        """x (B, C, H, W), t (B,) of 0 to 999, context (B, S, D), or what `read` gave of it, context_mask bool (B, S)
        -> (B, C, H, W). With n times as many texts as x has rows, x and t are meant n times: (n B, C, H, W)."""
        time = self.time_embedding['linear_1'](time_features(t, self.config.block_out_channels[0]).to(x.dtype))
        time = F.silu(self.time_embedding['linear_2'](F.silu(time)))                    # (B, D)
        mask = None if context_mask is None else context_mask[:, None]                  # (B, 1, S)
        texts = iter(context) if isinstance(context, list) else itertools.repeat(context)

        def block(level, i, x):
            text = next(texts) if i < len(level.attentions) else None
            return run_block(level.block, self.config.remat, i, x, time, text, mask)

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
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = block(level, i, torch.cat((x, rows_as(skips.pop(), x)), 1))
            x = level.upsample(x, skips[-1].shape[2:]) if skips else x      # as large as it was, if 2 does not divide
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# ----------------------------------------------------------------------------------------------------------------------
# autoencoder


class PictureEncoder(nn.Module):
    """Pictures (B, 3, H, W) -> moments of latents, each level but the last halves rows and columns."""

    def __init__(self, c):
        super().__init__()
        widths, args = tuple(c.block_out_channels), (0, c.norm_num_groups, 1e-6)
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level([(a, b)] + [(b, b)] * (c.layers_per_block - 1), *args, down=0 if i < len(widths) - 1 else None)
            for i, (a, b) in enumerate(zip(widths[:1] + widths, widths)))
        self.mid_block = Level([(widths[-1], widths[-1])] * 2, *args, [PixelAttention(widths[-1], c.norm_num_groups)])
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, x)
            for sampler in level.downsamplers:
                x = sampler.conv(F.pad(x, (0, 1, 0, 1)))
        x = self.mid_block.block(1, self.mid_block.block(0, x))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class PictureDecoder(nn.Module):
    """Latents (B, C, H, W) -> pictures, each level but the last doubles rows and columns."""

    def __init__(self, c):
        super().__init__()
        widths, args = tuple(c.block_out_channels[::-1]), (0, c.norm_num_groups, 1e-6)
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Level([(widths[0], widths[0])] * 2, *args, [PixelAttention(widths[0], c.norm_num_groups)])
        self.up_blocks = nn.ModuleList(
            Level([(a, b)] + [(b, b)] * c.layers_per_block, *args, up=i < len(widths) - 1)
            for i, (a, b) in enumerate(zip(widths[:1] + widths, widths)))
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.mid_block.block(1, self.mid_block.block(0, x))
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
        self.factor = 2 ** (levels_of(c, 'vae') - 1)        # rows of a picture for a row of its latent
        self.encoder, self.decoder = PictureEncoder(c), PictureDecoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1)

    def moments(self, pixels):
        """pixels (B, 3, H, W) -> mean and standard deviation of their latents (B, C, H/8, W/8)."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, 1)
        scale = self.config.scaling_factor
        return scale * mean, scale * (0.5 * logvar.clamp(-30, 20)).exp()

    def encode(self, pixels, keys=None):
        """pixels (B, 3, H, W) -> latents (B, C, H/8, W/8), drawn by keys int64 (B,); without keys their means.

        Instead of pixels, their moments (B, 2 C, H/8, W/8), as prepare/latents.py keeps them."""
        known = pixels.shape[1] == 2 * self.config.latent_channels
        return draw(*(pixels.chunk(2, 1) if known else self.moments(pixels)), keys)

    def decode(self, latents):
        """Latents (B, C, H, W) -> pixels (B, 3, 8 H, 8 W), of about -1 to 1."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))

    forward = encode


def draw(mean, std, keys=None):
    """Normal numbers of this mean and deviation (B, ...) by keys (B,); without keys the mean."""
    return mean if keys is None else mean + std * normal(keys, mean.shape[1:], stream=3).to(mean)


# ----------------------------------------------------------------------------------------------------------------------
# text tower: CLIP's (arXiv 2103.00020)


class CLIPBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.num_heads = c.num_heads
        self.activation = ACTIVATIONS[c.activation]
        self.norm1, self.norm2 = (nn.LayerNorm(c.width, c.norm_eps) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(c.width, c.width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(c.width, c.mlp_dim), nn.Linear(c.mlp_dim, c.width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.num_heads, -1)) for f in (self.q, self.k, self.v))
        x = x + self.o(attention(q, k, v, is_causal=True).flatten(2))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


ACTIVATIONS = {'quick_gelu': lambda x: x * torch.sigmoid(1.702 * x), 'gelu': F.gelu}


class CLIPText(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.activation not in ACTIVATIONS or c.width % c.num_heads:
            raise ValueError(f'text.activation={c.activation!r}: expected one of {", ".join(ACTIVATIONS)}, and '
                             f'text.width={c.width} a multiple of text.num_heads={c.num_heads}')
        if not -c.depth <= c.feature_layer < c.depth:
            raise ValueError(f'text.feature_layer={c.feature_layer}: expected -{c.depth} to {c.depth - 1}, of the '
                             f'{c.depth} blocks')
        self.embedding, self.pos_embed = nn.Embedding(c.vocab_size, c.width), nn.Embedding(c.max_length, c.width)
        # what comes after feature_layer is not built: a parameter without a gradient would stop DDP
        self.blocks = nn.ModuleList(CLIPBlock(c) for _ in range(c.feature_layer % c.depth + 1))
        self.norm = nn.LayerNorm(c.width, c.norm_eps)

    def forward(self, tokens, segments=None):
        """tokens (B, S) -> (B, S, D). Causal, so that what is padded on the right changes nothing before it; Stable
        Diffusion looks at the padding, too: segments are not used."""
        x = self.embedding(tokens) + self.pos_embed.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ----------------------------------------------------------------------------------------------------------------------
# all of it


def build(dit, unet, text, vae, empty):
    """A TextToImage of a UNet2DCondition, a CLIPText and an AutoencoderKL, which is not trained. dit: its image_size,
    the rows of a latent, and drop; empty: ids of the empty sentence, padded as CLIP's."""
    model = TextToImage(replace(dit, objective='ddpm', channels=unet.config.out_channels), text, unet, vae, empty)
    model.schedule = schedule_of(unet.config)
    vae.requires_grad_(False)
    return model
