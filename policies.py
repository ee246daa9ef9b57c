"""Robot policies: DiffusionPolicy, and VLA, a vision-language model with an action expert.

Axes: B batch, A samples with actions, T actions of a chunk, D numbers of an action, P of a state, S tokens of a
condition, W width.

What a policy learns from is a dict `lowdim`: actions (A, T, D), and where they are needed is_pad (A, T), action_mask
(A, D), proprio (A, P), proprio_mask (A, P), keys (A,), and rows (A,), the rows of `tokens` that the samples belong to.
A padded action, and a number that action_mask leaves out, is neither input nor target, whatever it is.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import DenoiserBlock, FlowSchedule, normal, schedule_of, sincos, uniform
from model import (
    VLM,
    DecoderBlock,
    KVCache,
    RMSNorm,
    VLMConfig,
    attention,
    make_attn_mask,
    make_attn_masks,
    positions_of,
    rope_table,
    run_block,
    sized,
    token_loss,
)
from model import build as build_tower

# ----------------------------------------------------------------------------------------------------------------------
# what policies share: how actions are read, and what an error costs

LOSSES = {'mse': F.mse_loss, 'l1': F.l1_loss, 'huber': F.huber_loss}


def valid_numbers(lowdim):
    """bool (A, T, D): the numbers that are learned; their sum is the count that a policy's loss is a mean over."""
    valid = torch.ones_like(lowdim['actions'], dtype=torch.bool)
    if 'is_pad' in lowdim:
        valid = valid & ~lowdim['is_pad'].bool()[:, :, None]
    return valid & lowdim['action_mask'].bool()[:, None] if 'action_mask' in lowdim else valid


def nothing(config, device):
    """A `lowdim` without anything to learn: what a rank goes through whose batch has no actions."""
    shape = 1, config.action_steps, config.action_dim
    return dict(actions=torch.zeros(shape, device=device), is_pad=torch.ones(shape[:2], device=device),
                proprio=torch.zeros(1, config.proprio_dim, device=device),
                keys=torch.zeros(1, dtype=torch.long, device=device), rows=[0])


def state_of(lowdim, config, batch, device):
    """The state (A, P), zero where proprio_mask leaves a number out; one zero where there is no state."""
    if not config.proprio_dim:
        return torch.zeros(batch, 1, device=device)
    state = lowdim['proprio'].float()
    return state.where(lowdim['proprio_mask'].bool(), 0) if 'proprio_mask' in lowdim else state


def draws_of(lowdim, schedule, draws, noise=None, time=None):
    """(x_t, t, target) of `draws` noisy versions of each chunk, (A * draws, T, D), and its valid numbers.

    noise (A * draws, T, D) and time (A * draws,) are given, or follow from keys."""
    valid = valid_numbers(lowdim)
    x = lowdim['actions'].float().where(valid, 0)
    if noise is None:
        noise = normal(lowdim['keys'], (draws, *x.shape[1:])).flatten(0, 1)
    if time is None:
        time = schedule.times(uniform(lowdim['keys'], draws, 1).flatten())
    x, valid = x.repeat_interleave(draws, 0), valid.repeat_interleave(draws, 0)
    return schedule.add_noise(x, noise, time).where(valid, 0), time, schedule.target(x, noise, time), valid


def action_loss(kind, output, target, valid, draws, reduction):
    """(sum, count) of the errors at valid numbers, or, not reduced, those of each sample (A,), (A,)."""
    losses = LOSSES[kind](output.float(), target, reduction='none').where(valid, 0)
    losses, count = losses.flatten(1).sum(1).unflatten(0, (-1, draws)).mean(1), valid[::draws].flatten(1).sum(1)
    return (losses.sum(), count.sum()) if reduction == 'sum' else (losses, count)


def start_of(lowdim, config, noise=None):
    """Noise to sample from (A, T, D), as given or by keys, and action_mask (A or 1, 1, D)."""
    if noise is None:
        noise = normal(lowdim['keys'], (config.action_steps, config.action_dim))
    everything = torch.ones(1, config.action_dim, dtype=torch.bool, device=noise.device)
    return noise, lowdim.get('action_mask', everything).bool()[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# diffusion policy (arXiv 2303.04137)


@dataclass
class PolicyConfig:
    action_dim: int = 0         # numbers of an action
    action_steps: int = 0       # actions of a chunk
    proprio_dim: int = 0        # numbers of the state (0: it is not seen)
    encoder: str = 'none'       # what else is seen: none | text: tokens, by the decoder | vlm: and pictures, by ViT,
    #                             connector and decoder
    denoiser: str = 'mlp'       # mlp: of the whole chunk | unet: the paper's, over time | transformer: a DiT
    width: int = 512            # of mlp and transformer; of the time's embedding
    depth: int = 3              # blocks of mlp and transformer
    mlp_dim: int = 1024
    num_heads: int = 8          # transformer
    pool: int = 4               # mlp, unet: tokens become so many vectors of width `width`
    channels: tuple = (256, 512, 1024)      # unet: one for each halving of the chunk, and the first
    kernel_size: int = 5        # unet
    objective: str = 'flow'     # flow | ddpm
    time: str = 'uniform'       # flow: how training times fall: uniform | beta (pi0) | logit_normal
    shift: float = 1.0          # flow: above 1: times are noisier
    schedule: str = 'squaredcos_cap_v2'     # ddpm: linear | scaled_linear | squaredcos_cap_v2
    schedule_steps: int = 100   # ddpm
    prediction: str = 'sample'  # ddpm: epsilon (the paper's) | sample | v_prediction
    spacing: str = 'trailing'   # ddpm: the times that are sampled at: trailing | leading (epsilon's) | linspace
    clip_range: float = 0.0     # ddpm: clean actions lie within so much of 0 (0: anywhere)
    loss: str = 'mse'           # mse | l1 | huber
    num_noise_draws: int = 1    # noisy versions of a chunk for one pass of the encoder

    def check(self):
        """Raises ValueError for settings that no policy can have."""
        for name, allowed in (('encoder', ('none', 'text', 'vlm')), ('denoiser', ('mlp', 'unet', 'transformer')),
                              ('objective', ('flow', 'ddpm')), ('loss', tuple(LOSSES))):
            if getattr(self, name) not in allowed:
                raise ValueError(f'policy.{name}={getattr(self, name)!r}: expected one of {", ".join(allowed)}')
        if min(self.action_dim, self.action_steps, self.num_noise_draws, self.pool) < 1 or self.proprio_dim < 0:
            raise ValueError(f'policy: action_dim={self.action_dim}, action_steps={self.action_steps}, num_noise_draws='
                             f'{self.num_noise_draws} and pool={self.pool} must be at least 1, proprio_dim='
                             f'{self.proprio_dim} at least 0')
        if self.width % (2 * self.num_heads):
            raise ValueError(f'policy.width={self.width} must be a multiple of twice policy.num_heads={self.num_heads}')
        unit = 2 ** (len(self.channels) - 1)
        if self.denoiser == 'unet' and (self.action_steps % unit or any(c % 8 for c in self.channels)):
            raise ValueError(f'policy.channels={self.channels} must be multiples of 8, and {self.action_steps} actions '
                             f'a multiple of {unit}, to be halved for all channels but the first')


class MLPDenoiser(nn.Module):
    """A residual MLP over the whole chunk at once."""

    def __init__(self, c, condition):
        super().__init__()
        self.shape = c.action_steps, c.action_dim
        self.time = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.input = nn.Linear(math.prod(self.shape) + condition, c.width)
        self.norms = nn.ModuleList(nn.LayerNorm(c.width) for _ in range(c.depth + 1))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(c.width, c.mlp_dim), nn.SiLU(),
                                                  nn.Linear(c.mlp_dim, c.width)) for _ in range(c.depth))
        self.output = nn.Linear(c.width, math.prod(self.shape))

    def forward(self, x, time, condition):
        """x (B, T, D), time's embedding (B, W), condition (B, C) -> (B, T, D)."""
        time = self.time(time)
        h = self.input(torch.cat((x.flatten(1), condition), 1))
        for norm, block in zip(self.norms, self.blocks):
            h = h + block(norm(h) + time)
        return self.output(self.norms[-1](h)).unflatten(1, self.shape)


def windows(x, size, stride=1):
    """(B, T, C) -> (B, T / stride, size * C). A convolution over time is a Linear on these: as short as chunks are, it
    takes a third to two thirds of the time of conv1d."""
    return F.pad(x, (0, 0, size // 2, size // 2)).unfold(1, size, stride).transpose(2, 3).flatten(2)


class Upsample(nn.Module):
    """A transposed convolution, kernel 4, stride 2: (B, T, C) -> (B, 2 T, C)."""

    def __init__(self, channels):
        super().__init__()
        self.taps, self.bias = nn.Linear(channels, 4 * channels, bias=False), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        a, b, c, d = F.pad(self.taps(x), (0, 0, 1, 1)).chunk(4, -1)             # (B, T + 2, C)
        pairs = b[:, 1:-1] + d[:, :-2], c[:, 1:-1] + a[:, 2:]
        return torch.stack(pairs, 2).flatten(1, 2) + self.bias


class ConvBlock(nn.Module):
    """Two convolutions; time and condition scale and shift what is between (FiLM, arXiv 1709.07871)."""

    def __init__(self, inputs, outputs, condition, kernel_size):
        super().__init__()
        self.kernel_size = kernel_size
        self.conv1, self.conv2 = (nn.Linear(kernel_size * i, outputs) for i in (inputs, outputs))
        self.norm1, self.norm2 = nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)
        self.film = nn.Linear(condition, 2 * outputs)
        self.skip = nn.Linear(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x, condition):
        """x (B, T, inputs), condition (B, C) after its Mish -> (B, T, outputs)."""
        scale, shift = self.film(condition)[:, None].chunk(2, -1)
        h = F.mish(self.norm1(self.conv1(windows(x, self.kernel_size)).mT)).mT
        h = torch.addcmul(shift, scale, h)
        return F.mish(self.norm2(self.conv2(windows(h, self.kernel_size)).mT)).mT + self.skip(x)


class UNet1d(nn.Module):
    """The U-Net over time of the Diffusion Policy paper, which leaves out the skip of the first resolution."""

    def __init__(self, action_dim, condition, channels=(256, 512, 1024), kernel_size=5, width=256):
        super().__init__()
        self.kernel_size = kernel_size
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        condition += width

        def pair(i, o):
            return nn.ModuleList((ConvBlock(i, o, condition, kernel_size), ConvBlock(o, o, condition, kernel_size)))
        sizes = [action_dim, *channels]
        self.down = nn.ModuleList(pair(i, o) for i, o in zip(sizes, channels))
        self.downsample = nn.ModuleList(nn.Linear(3 * c, c) for c in channels[:-1])
        self.middle = pair(channels[-1], channels[-1])
        self.up = nn.ModuleList(pair(2 * o, i) for i, o in reversed([*zip(channels, channels[1:])]))
        self.upsample = nn.ModuleList(Upsample(c) for c in channels[-2::-1])
        self.conv, self.norm = nn.Linear(kernel_size * channels[0], channels[0]), nn.GroupNorm(8, channels[0])
        self.output = nn.Linear(channels[0], action_dim)

    def forward(self, x, time, condition):
        """x (B, T, D), time's embedding (B, W), condition (B, C) -> (B, T, D)."""
        condition, skips = F.mish(torch.cat((self.time(time), condition), 1)), []       # Mish: before every film
        for level, (first, second) in enumerate(self.down):
            x = second(first(x, condition), condition)
            skips.append(x)
            x = self.downsample[level](windows(x, 3, 2)) if level < len(self.downsample) else x
        x = self.middle[1](self.middle[0](x, condition), condition)
        for (first, second), upsample in zip(self.up, self.upsample):
            x = upsample(second(first(torch.cat((x, skips.pop()), -1), condition), condition))
        return self.output(F.mish(self.norm(self.conv(windows(x, self.kernel_size)).mT)).mT)


class Transformer(nn.Module):
    """A DiT over the actions of a chunk; time and state modulate, tokens are read by cross-attention."""

    def __init__(self, c, condition, context):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.condition = nn.Linear(condition, c.width)
        self.input = nn.Linear(c.action_dim, c.width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, c.action_steps, c.width))
        self.blocks = nn.ModuleList(DenoiserBlock(c, context) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        self.output = nn.Linear(c.width, c.action_dim)

    def forward(self, x, time, condition, mask=None, context=None, context_mask=None):
        """x (B, T, D), time's embedding (B, W), condition (B, C), masks and context as in a block -> (B, T, D)."""
        condition = F.silu(self.time(time) + self.condition(condition))
        x = self.input(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, condition, mask, context, context_mask)
        return self.output(self.norm(x))


class Pool(nn.Module):
    """Tokens to vectors: each of `queries` learned queries takes a mean of them, weighed by a softmax.

    One head a query, and no keys and values of its own: what they would do, the query and the output can."""

    def __init__(self, context, width, queries):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, queries, context))     # the queries
        self.norm, self.o = nn.LayerNorm(context), nn.Linear(context, width)

    def forward(self, x, mask):
        """x (B, S, C), mask (B, S) -> (B, queries * width)."""
        x = self.norm(x)[:, :, None]                                        # (B, S, 1, C)
        q = self.pos_embed.to(x).expand(len(x), -1, -1)[:, :, None]
        return self.o(attention(q, x, x, mask[:, None].expand(-1, q.shape[1], -1)).flatten(2)).flatten(1)


class DiffusionPolicy(nn.Module):
    """A chunk of actions from a state, a sentence and pictures. encoder: None, a Decoder (text) or a VLM.

    `tokens` hold the sentence, and image tokens where the pictures of each sample go (any number of cameras)."""

    def __init__(self, config, encoder=None):
        super().__init__()
        self.config = c = config
        c.check()
        self.encoder = encoder
        self.schedule = schedule_of(c)
        context, condition = 0, max(c.proprio_dim, 1)
        if encoder:
            decoder = getattr(encoder, 'decoder', encoder)
            decoder.head, context = nn.Identity(), decoder.config.width     # no gradient would reach an output layer
            self.blank = nn.Parameter(torch.zeros(1, 1, context))           # a token that is there when no other is
        self.pool = Pool(context, c.width, c.pool) if context and c.denoiser != 'transformer' else None
        condition += c.pool * c.width if self.pool else 0
        if c.denoiser == 'mlp':
            self.denoiser = MLPDenoiser(c, condition)
        elif c.denoiser == 'unet':
            self.denoiser = UNet1d(c.action_dim, condition, c.channels, c.kernel_size, c.width)
        else:
            self.denoiser = Transformer(c, condition, context)

    def encode(self, lowdim, tokens, pixels, blocks, segments, batch, device):
        """Everything that is computed once a chunk: (condition (A, C), context (A, S, C) or None, its mask (A, S))."""
        condition = state_of(lowdim, self.config, batch, device)
        if self.encoder is None:
            return condition, None, None
        if isinstance(self.encoder, VLM):
            blocks = self.encoder.default_blocks(tokens) if blocks is None else blocks
            x = self.encoder.decoder.features(self.encoder.embed(tokens, pixels, always=True), blocks, segments)
        else:
            x = self.encoder.features(self.encoder.embed(tokens), blocks, segments)
        mask = torch.ones_like(tokens, dtype=torch.bool) if segments is None else segments > 0
        if 'rows' in lowdim:
            x, mask = x[lowdim['rows']], mask[lowdim['rows']]
        x, mask = torch.cat((self.blank.to(x).expand(len(x), -1, -1), x), 1), F.pad(mask, (1, 0), value=True)
        if self.pool is None:
            return condition, x, mask
        return torch.cat((condition, self.pool(x, mask)), 1), None, None

    def denoise(self, x, t, condition, context, context_mask, valid=None):
        """The model's output (B, T, D) at x (B, T, D), times t (B,); valid (B, T, D): what is not padding."""
        time = sincos(self.schedule.fraction(t), self.config.width)
        if self.config.denoiser != 'transformer':
            return self.denoiser(x, time, condition)
        mask = None
        if valid is not None:
            steps = valid.any(2).long()
            mask = make_attn_mask(torch.zeros_like(steps), steps)
        if context is not None:
            context_mask = context_mask[:, None].expand(-1, x.shape[1], -1)
        return self.denoiser(x, time, condition, mask, context, context_mask)

    def loss(self, tokens=None, targets=None, pixels=None, blocks=None, segments=None, lowdim=None, noise=None,
             time=None, reduction='sum', num_targets=None):
        """Sum of the losses, a mean over the noise draws, and the count of `valid_numbers`; `targets` are not read.

        reduction='none': sums and counts of each sample. noise (A * draws, T, D) and time (A * draws,) are given, or
        follow from lowdim's keys. Without lowdim all goes through with a count of 0."""
        c, device = self.config, next(self.parameters()).device
        lowdim = nothing(c, device) if lowdim is None else lowdim
        encoded = self.encode(lowdim, tokens, pixels, blocks, segments, len(lowdim['actions']), device)
        x, t, target, valid = draws_of(lowdim, self.schedule, c.num_noise_draws, noise, time)
        encoded = (None if e is None else e.repeat_interleave(c.num_noise_draws, 0) for e in encoded)
        return action_loss(c.loss, self.denoise(x, t, *encoded, valid), target, valid, c.num_noise_draws, reduction)

    forward = loss              # DistributedDataParallel wraps `forward`

    @torch.no_grad()
    def sample(self, tokens=None, pixels=None, blocks=None, segments=None, lowdim=None, noise=None, steps=10,
               sampler=''):
        """Actions (A, T, D). lowdim: proprio, proprio_mask, action_mask, rows, and keys (A,), unless noise is given
        (A, T, D); sampler: euler | heun of flow, ddim | ddpm of ddpm; the first if ''."""
        device, was_training = next(self.parameters()).device, self.training
        self.eval()
        lowdim = lowdim or {}
        x, wanted = start_of(lowdim, self.config, noise)
        encoded = self.encode(lowdim, tokens, pixels, blocks, segments, len(x), device)
        x = self.schedule.sample(lambda x, t: self.denoise(x.where(wanted, 0), t, *encoded), x, steps,
                                 sampler or ('euler' if self.config.objective == 'flow' else 'ddim'),
                                 lowdim.get('keys'))
        self.train(was_training)
        return x.where(wanted, 0)


# ----------------------------------------------------------------------------------------------------------------------
# vision-language-action model: pi0 (arXiv 2410.24164)


@dataclass
class VLAConfig:
    action_dim: int = 0         # numbers of an action
    action_steps: int = 0       # actions of a chunk
    proprio_dim: int = 0        # numbers of the state (0: its token says nothing)
    width: int = 96             # of the action expert, whose layers and heads are as the decoder's
    mlp_dim: int = 384
    time: str = 'beta'          # how training times fall: beta (pi0) | uniform | logit_normal
    shift: float = 1.0          # above 1: times are noisier
    loss: str = 'mse'           # mse | l1 | huber
    num_noise_draws: int = 1    # noisy versions of a chunk for one pass of the vision-language model

    def check(self):
        """Raises ValueError for settings that no action expert can have."""
        if self.loss not in LOSSES:
            raise ValueError(f'vla.loss={self.loss!r}: expected one of {", ".join(LOSSES)}')
        if min(self.action_dim, self.action_steps, self.num_noise_draws) < 1 or self.proprio_dim < 0 or self.width % 2:
            raise ValueError(f'vla: action_dim={self.action_dim}, action_steps={self.action_steps} and num_noise_draws='
                             f'{self.num_noise_draws} must be at least 1, proprio_dim={self.proprio_dim} at least 0, '
                             f'width={self.width} even')


class Prefix:
    """Takes the place of a KVCache where gradients flow: what the decoder's layers leave for the expert's."""

    def __init__(self):
        self.layers, self.length = {}, 0

    @torch.compiler.disable     # of what is compiled block by block, one graph serves all layers
    def update(self, layer, k, v):
        self.layers[layer] = k, v
        return k, v


class Suffix:
    """Puts the keys and values of a prefix, of some of its rows (A,), before the expert's own."""

    def __init__(self, prefix, rows):
        self.prefix, self.rows = prefix, rows

    @torch.compiler.disable     # of what is compiled block by block, one graph serves all layers
    def update(self, layer, k, v):
        return tuple(torch.cat((old[self.rows], new), 1) for old, new in zip(self.prefix.layers[layer], (k, v)))


class VLA(VLM):
    """A VLM, and an action expert with weights of its own in every layer, which reads the VLM's keys and values.

    Three blocks, [pictures and text] -> [state] -> [actions], each sees itself and what stands before it. So the first
    does not depend on the others: it is computed by itself, once a chunk. Time enters as in pi0, by an MLP of each
    action joined with the time's embedding (not by adaptive norms, as in pi0.5). The weights of the VLM keep their
    names, so a trained one is where this begins; a row may have targets of text, an action chunk, or both (then
    the actions see the text that is learned). One row, one sample: rows are not packed."""

    def __init__(self, config, vlm=None):
        super().__init__(vlm or VLMConfig())
        self.policy = c = config
        c.check()
        d = self.decoder.config
        self.schedule = FlowSchedule(c.time, c.shift)
        self.expert = nn.ModuleList(DecoderBlock(replace(d, width=c.width, mlp_dim=c.mlp_dim), i)
                                    for i in range(len(self.decoder.blocks)))
        self.expert_norm = RMSNorm(c.width, d.norm_eps, d.norm_offset)
        self.action_in, self.state_in = nn.Linear(c.action_dim, c.width), nn.Linear(max(c.proprio_dim, 1), c.width)
        self.time_in, self.time_out = nn.Linear(2 * c.width, c.width), nn.Linear(c.width, c.width)
        self.action_out = nn.Linear(c.width, c.action_dim)

    def layout(self, tokens, targets, blocks, segments, steps, rows):
        """Who sees whom, and where everything stands: masks of the decoder for [prefix, state, actions], their
        positions. tokens (B, S); steps (A, T): actions that are no padding -> (masks (B, L, L), positions (B, L))."""
        segments = torch.ones_like(tokens) if segments is None else segments
        blocks = self.default_blocks(tokens, targets) if blocks is None else blocks
        suffix = torch.ones(len(tokens), 1 + steps.shape[1], dtype=segments.dtype, device=tokens.device)
        begins = suffix.clone()
        begins[:, 2:] = 0                                       # the state is a block, all actions are one
        suffix[rows, 1:] = steps.to(suffix)
        masks = make_attn_masks(self.decoder.config, torch.cat((blocks, begins), 1), torch.cat((segments, suffix), 1))
        after = (segments > 0).sum(1, keepdim=True) + torch.arange(suffix.shape[1], device=tokens.device)
        return masks, torch.cat((positions_of(segments), after), 1)

    def prefix(self, tokens, pixels, masks, positions, cache):
        """Pictures and text through the decoder, which leaves keys and values in `cache`: hidden states (B, S, D)."""
        S = tokens.shape[1]
        return self.decoder.features(self.embed(tokens, pixels, always=True), cache=cache, positions=positions[:, :S],
                                     masks=tuple(mask[:, :S, :S] for mask in masks))

    def velocity(self, x, t, state, mask, positions, cache):
        """What the expert says of x (A, T, D) at the times t (A,); state (A, P), mask (A, 1 + T, S + 1 + T), positions
        (A, 1 + T) -> (A, T, D)."""
        d = self.decoder.config
        h = self.action_in(x)
        time = sincos(t, h.shape[-1])[:, None].expand(h.shape).to(h)
        h = self.time_out(F.silu(self.time_in(torch.cat((h, time), -1))))
        h = torch.cat((self.state_in(state)[:, None], h), 1)
        rope = rope_table(positions, d.head_dim, d.rope_theta, d.rope_scaling)
        ropes = rope, rope_table(positions, d.head_dim, d.rope_local_theta) if d.sliding_window else rope
        for block in self.expert:                               # the expert sees the whole prefix in local layers, too
            h = run_block(block, d.remat, h, ropes, (mask, mask), cache)
        return self.action_out(self.expert_norm(h)[:, 1:])

    def loss(self, tokens, targets=None, pixels=None, blocks=None, segments=None, lowdim=None, noise=None, time=None,
             reduction='sum', label_smoothing=0.0, z_loss=0.0, num_targets=None):
        """((loss, count) of the text as `VLM.loss` has it, (loss, count) of the actions as `DiffusionPolicy.loss`).

        A weighted sum of both is what is learned: with one left out, some parameters have no gradient (DDP waits)."""
        c, device = self.policy, tokens.device
        lowdim = nothing(c, device) if lowdim is None else lowdim
        targets = torch.full_like(tokens, -100) if targets is None else targets
        rows = torch.as_tensor(lowdim['rows'] if 'rows' in lowdim else range(len(tokens)), device=device)
        x, t, target, valid = draws_of(lowdim, self.schedule, c.num_noise_draws, noise, time)
        masks, positions = self.layout(tokens, targets, blocks, segments, valid[::c.num_noise_draws].any(2), rows)
        prefix, S = Prefix(), tokens.shape[1]
        hidden = self.prefix(tokens, pixels, masks, positions, prefix)
        state = state_of(lowdim, c, len(rows), device).repeat_interleave(c.num_noise_draws, 0)
        rows = rows.repeat_interleave(c.num_noise_draws)
        output = self.velocity(x, t, state, masks[0][rows, S:], positions[rows, S:], Suffix(prefix, rows))
        return (token_loss(self.decoder, hidden, targets, reduction, label_smoothing, z_loss, num_targets),
                action_loss(c.loss, output, target, valid, c.num_noise_draws, reduction))

    forward = loss

    @torch.no_grad()
    def sample(self, tokens, pixels=None, blocks=None, segments=None, lowdim=None, noise=None, steps=10,
               sampler='euler'):
        """Actions (B, T, D), the prefix computed once. Arguments as of `DiffusionPolicy.sample`; every row of tokens is
        a prompt, so `rows` are not read."""
        c, d, device, was_training = self.policy, self.decoder.config, tokens.device, self.training
        self.eval()
        lowdim, (batch, S) = lowdim or {}, tokens.shape
        x, wanted = start_of(lowdim, c, noise)
        state = state_of(lowdim, c, batch, device)
        real = torch.ones(batch, c.action_steps, dtype=torch.bool, device=device)
        masks, positions = self.layout(tokens, None, blocks, segments, real, torch.arange(batch, device=device))
        cache = KVCache(d, batch, S + 1 + c.action_steps, device, self.decoder.embedding.weight.dtype)
        self.prefix(tokens, pixels, masks, positions, cache)    # velocity leaves its length, and overwrites the rest
        x = self.schedule.sample(lambda x, t: self.velocity(x.where(wanted, 0), t, state, masks[0][:, S:],
                                                            positions[:, S:], cache), x, steps, sampler)
        self.train(was_training)
        return x.where(wanted, 0)


def build(task, config, vit, decoder, vocab_size, image_token_id, pixel_shuffle=1, connector_bias=True):
    """The model of a task: policy, from a PolicyConfig, or vla, from a VLAConfig; the rest as `model.build`."""
    if task == 'vla':
        return VLA(config, VLMConfig(vit, sized(decoder, vocab_size), image_token_id, pixel_shuffle, connector_bias))
    config.check()
    encoder = {'none': '', 'text': 'llm', 'vlm': 'vlm'}[config.encoder]
    return DiffusionPolicy(config, build_tower(encoder, vit, decoder, vocab_size, image_token_id, pixel_shuffle,
                                               connector_bias) if encoder else None)
