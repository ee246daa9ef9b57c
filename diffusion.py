"""Everything that has noise and a time: schedules, their samplers, and text to image. Robots are in policies.py.

Axes: B batch, C channels, H W pixels, P patches, S tokens of a sentence, D width.

Noise and times are never drawn from a global generator: they are a function of int64 `keys`, one a sample, so that
what a sample gets does not depend on ranks, micro-batches or who else is in the batch:
  keys = random_keys(seed, positions); noise = normal(keys, x.shape[1:]); t = schedule.times(uniform(keys, 1, 1)[:, 0])
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model import Decoder, attention, positions_where, run_block, sized

# ----------------------------------------------------------------------------------------------------------------------
# random numbers from keys: splitmix64 (Steele, Lea, Flood 2014) counts, Box and Muller make normals

GOLDEN, MIX1, MIX2 = (c - 2 ** 64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))    # as int64


def mix64(x):
    """splitmix64's finalizer, a bijection of int64; torch's int64 wraps around, its shift keeps the sign."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * MIX1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * MIX2
    return x ^ (x >> 31 & (1 << 33) - 1)


def random_keys(seed, positions):
    """A key for every position (B,) of a run: int64 (B,)."""
    return mix64(mix64(positions.long() + GOLDEN) ^ mix64(torch.full_like(positions, seed, dtype=torch.long)))


def random_bits(keys, count, stream=0):
    """64 random bits, (B, count), from keys int64 (B,). Streams are independent: 0 noise, 1 times, 2 dropped
    conditions, 16 on DDPM's."""
    start = mix64(mix64(keys.long()) + stream)[:, None]
    return mix64(start + GOLDEN * torch.arange(1, count + 1, device=keys.device))


def uniform(keys, count, stream=0):
    """Numbers above 0 and below 1, fp32 (B, count), from keys (B,)."""
    return ((random_bits(keys, count, stream) & (1 << 23) - 1) + 0.5) / 2 ** 23     # exact in fp32


def normal(keys, shape, stream=0):
    """Standard normal numbers, fp32 (B, *shape), from keys (B,)."""
    count = math.prod(shape)
    bits = random_bits(keys, -(-count // 2), stream)
    radius = (((bits >> 41 & (1 << 23) - 1) + 0.5) / 2 ** 23).log().mul(-2).sqrt()
    angle = (bits & (1 << 23) - 1) * (2 * math.pi / 2 ** 23)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), 1)[:, :count].reshape(-1, *shape)


# ----------------------------------------------------------------------------------------------------------------------
# schedules: how much noise there is at a time, what the model is to say, and the way back


class Schedule:
    """DDPM (arXiv 2006.11239) and DDIM (arXiv 2010.02502): times are 0 (least noise) to steps - 1.

    Equal to diffusers' DDPMScheduler and DDIMScheduler; arguments have the names and defaults of its
    scheduler_config.json but for the first three: beta_schedule linear | scaled_linear | squaredcos_cap_v2,
    num_train_timesteps, and prediction_type epsilon (the noise) | sample (x) | v_prediction (arXiv 2202.00512).
    rescale_betas_zero_snr leaves nothing of x at the last time (arXiv 2305.08891), where epsilon then says nothing.
    chained, which is not diffusers': see `pairs`."""

    def __init__(self, kind='squaredcos_cap_v2', steps=1000, prediction='epsilon', beta_start=1e-4, beta_end=0.02,
                 clip_sample=True, clip_sample_range=1.0, timestep_spacing='leading', steps_offset=0,
                 set_alpha_to_one=True, rescale_betas_zero_snr=False, chained=False):
        for name, value, allowed in (('kind', kind, ('linear', 'scaled_linear', 'squaredcos_cap_v2')),
                                     ('prediction', prediction, ('epsilon', 'sample', 'v_prediction')),
                                     ('timestep_spacing', timestep_spacing, ('leading', 'trailing', 'linspace'))):
            if value not in allowed:
                raise ValueError(f'schedule: {name}={value!r}: expected one of {", ".join(allowed)}')
        if steps < 1:
            raise ValueError(f'schedule: steps={steps} must be at least 1')
        if kind == 'linear':
            betas = torch.linspace(beta_start, beta_end, steps)
        elif kind == 'scaled_linear':
            betas = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, steps) ** 2
        else:                           # arXiv 2102.09672
            left = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
            betas = torch.tensor([min(1 - b / a, 0.999) for a, b in zip(left, left[1:])])
        alphas = (1 - betas).cumprod(0)
        if rescale_betas_zero_snr:
            roots = alphas.sqrt()
            alphas = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
            # by way of the betas, as diffusers goes: near zero the detour shows in the third digit
            alphas = torch.cat((alphas[:1], alphas[1:] / alphas[:-1]))
            alphas = (1 - (1 - alphas)).cumprod(0)
        self.steps, self.prediction, self.spacing, self.offset = steps, prediction, timestep_spacing, steps_offset
        self.chained = chained
        self.clip = clip_sample_range if clip_sample else math.inf
        self.alphas, self.final = alphas, 1.0 if set_alpha_to_one else alphas[0].item()     # products, 1 to 0

    def alpha(self, t, x, final=1.0):
        """The share of x in the variance at t, a number or (B,), in a shape that multiplies x; `final` where t < 0."""
        self.alphas = self.alphas.to(x.device)
        t = torch.as_tensor(t, device=x.device)
        return torch.where(t < 0, final, self.alphas[t.clamp(min=0)]).reshape(t.shape + (1,) * (x.ndim - 1) * t.ndim)

    def fraction(self, t):
        """Times as 0 to 1."""
        return t / self.steps

    def times(self, u):
        """Times to train at, from uniform numbers u of 0 to 1."""
        return (u * self.steps).long()

    def add_noise(self, x, noise, t):
        """x as it is at the times t (B,), or at one time."""
        a = self.alpha(t, x)
        return (a.sqrt() * x + (1 - a).sqrt() * noise).to(x.dtype)

    def target(self, x, noise, t):
        """What the model is to say at the times t."""
        a = self.alpha(t, x)
        return {'epsilon': noise, 'sample': x, 'v_prediction': a.sqrt() * noise - (1 - a).sqrt() * x}[self.prediction]

    def timesteps(self, n):
        """n times, from noise to x. (For 61 of 1000 and other numbers diffusers' trailing spacing ends in a time -1,
        rounding that went wrong: not here.)"""
        if not 1 <= n <= self.steps:
            raise ValueError(f'{n} sampling steps: expected 1 to {self.steps}, as many as the schedule has')
        if self.spacing == 'linspace':
            t = np.linspace(0, self.steps - 1, n).round()[::-1]
        elif self.spacing == 'leading':
            t = np.arange(n)[::-1] * (self.steps // n) + self.offset
        else:
            t = np.round(np.arange(self.steps, 0, -self.steps / n))[:n] - 1
        return torch.from_numpy(t.astype(np.int64))

    def pairs(self, n, chained=False):
        """[(t, t_next), ...] for n steps, t_next -1 where nothing is left to do.

        diffusers' DDIM steps to t - steps // n, whatever time comes next: the same for leading spacing, not for others
        whose n does not divide steps. chained: to the time that comes next, as diffusers' DDPM does."""
        t = self.timesteps(n).tolist()
        return list(zip(t, [*t[1:], -1])) if chained or self.chained else [(a, max(a - self.steps // n, -1)) for a in t]

    def split(self, output, t, x):
        """What the model's output says of x at t: (clean x, clipped; noise, which does not know of the clipping)."""
        a = self.alpha(t, x)
        signal, sigma = a.sqrt(), (1 - a).sqrt()
        if self.prediction == 'epsilon':
            clean, noise = (x - sigma * output) / signal, output
        elif self.prediction == 'sample':
            clean, noise = output, (x - signal * output) / sigma
        else:
            clean, noise = signal * x - sigma * output, signal * output + sigma * x
        return clean.clamp(-self.clip, self.clip), noise

    def step(self, output, t, t_next, x, eta=0.0, noise=None, use_clipped_model_output=False):
        """DDIM from time t to t_next (below 0: to the end). eta > 0 adds `noise`, 1 as much as DDPM.

        use_clipped_model_output: the noise is what is left of x beside the clipped clean x."""
        clean, direction = self.split(output, t, x)
        a, a_next = self.alpha(t, x), self.alpha(t_next, x, self.final)
        if use_clipped_model_output:
            direction = (x - a.sqrt() * clean) / (1 - a).sqrt()
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).clamp(min=0).sqrt()
        x = a_next.sqrt() * clean + (1 - a_next - sigma ** 2).clamp(min=0).sqrt() * direction
        return x + sigma * noise if eta else x

    def ddpm_step(self, output, t, t_next, x, noise=None):
        """DDPM from time t to t_next with the variance of the posterior ("fixed_small"); the last step adds none."""
        clean, _ = self.split(output, t, x)
        a, a_next = self.alpha(t, x), self.alpha(t_next, x)
        left = a / a_next               # of x in this step
        mean = a_next.sqrt() * (1 - left) / (1 - a) * clean + left.sqrt() * (1 - a_next) / (1 - a) * x
        if noise is None:
            return mean
        variance = ((1 - a_next) / (1 - a) * (1 - left)).clamp(min=1e-20)
        return torch.where(torch.as_tensor(t, device=x.device).reshape(a.shape) > 0, mean + variance.sqrt() * noise,
                           mean)

    def sample(self, predict, x, n, sampler='ddim', keys=None, skip=0, after=None):
        """From noise x to a sample in n steps; predict(x, t) is the model at the times t (B,). sampler: ddim | ddpm,
        which adds noise by `keys` (B,). skip: x is what the first so many steps would have left;
        after(x, t): what becomes of x when it has come to t."""
        if sampler not in ('ddim', 'ddpm'):
            raise ValueError(f'sampler={sampler!r}: a discrete schedule has ddim and ddpm')
        for i, (t, t_next) in enumerate(self.pairs(n, sampler == 'ddpm')[skip:], skip):
            output = predict(x, torch.full((len(x),), t, device=x.device))
            if sampler == 'ddim':
                x = self.step(output, t, t_next, x)
            else:
                x = self.ddpm_step(output, t, t_next, x, normal(keys, x.shape[1:], 16 + i).to(x) if t > 0 else None)
            x = after(x, t_next) if after else x
        return x


class FlowSchedule:
    """Flow matching on straight lines (arXiv 2209.03003, 2210.02747): time 1 is noise, 0 is x, and the model says how
    x changes with time, noise - x.

    time: how training times fall: uniform | beta (pi0's Beta(1.5, 1) * 0.999 + 0.001, more of them noisy; arXiv
    2410.24164) | logit_normal (SD3, arXiv 2403.03206). shift s takes times, of sampling too, to
    s t / (1 + (s - 1) t)."""

    def __init__(self, time='uniform', shift=1.0):
        if time not in ('uniform', 'beta', 'logit_normal') or shift <= 0:
            raise ValueError(f'flow: time={time!r}, shift={shift}: expected uniform, beta or logit_normal, and a shift '
                             'above 0')
        self.time, self.shift = time, shift

    def shifted(self, t):
        return self.shift * t / (1 + (self.shift - 1) * t)

    def fraction(self, t):
        """Times as 0 to 1."""
        return t

    def times(self, u):
        """Times to train at, from uniform numbers u of 0 to 1."""
        t = {'uniform': lambda: u, 'logit_normal': lambda: torch.special.ndtri(u).sigmoid(),
             'beta': lambda: u ** (1 / 1.5) * 0.999 + 0.001}[self.time]()       # Beta(a, 1) is distributed as t^a
        return self.shifted(t)

    def add_noise(self, x, noise, t):
        """x as it is at the times t (B,), or at one time."""
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device)
        t = t.reshape(t.shape + (1,) * (x.ndim - 1) * t.ndim)
        return (t * noise + (1 - t) * x).to(x.dtype)

    def target(self, x, noise, t=None):
        """What the model is to say, at all times."""
        return noise - x

    def timesteps(self, n):
        """n + 1 times, the last 0: what n steps go through, from 1."""
        if n < 1:
            raise ValueError(f'{n} sampling steps: expected at least 1')
        return self.shifted(torch.linspace(1, 0, n + 1, dtype=torch.float64)).float()

    def pairs(self, n):
        """[(t, t_next), ...] for n steps."""
        t = self.timesteps(n).tolist()
        return list(zip(t, t[1:]))

    def step(self, output, t, t_next, x):
        """Euler from time t to t_next; numbers, or (B,)."""
        dt = torch.as_tensor(t_next, dtype=torch.float32) - torch.as_tensor(t, dtype=torch.float32)
        return x + (dt.reshape(dt.shape + (1,) * (x.ndim - 1) * dt.ndim) * output).to(x.dtype)

    def sample(self, predict, x, n, sampler='euler', keys=None, skip=0, after=None):
        """From noise x to a sample in n steps; predict(x, t) is the model at the times t (B,). sampler: euler | heun,
        which asks the model twice in every step but the last. Nothing is random: keys are not used. skip, after: as
        `Schedule.sample` has them."""
        if sampler not in ('euler', 'heun'):
            raise ValueError(f'sampler={sampler!r}: flow matching has euler and heun')
        for t, t_next in self.pairs(n)[skip:]:
            output = predict(x, x.new_full((len(x),), t))
            if sampler == 'heun' and t_next > 0:
                ahead = predict(self.step(output, t, t_next, x), x.new_full((len(x),), t_next))
                output = (output + ahead) / 2
            x = self.step(output, t, t_next, x)
            x = after(x, t_next) if after else x
        return x


def sincos(t, width, min_period=4e-3, max_period=4.0):
    """Times of 0 to 1, (B,), as sines and cosines, fp32 (B, width); the periods are pi0's."""
    period = min_period * (max_period / min_period) ** torch.linspace(0, 1, width // 2, device=t.device)
    angle = t.float()[:, None] * (2 * math.pi / period)
    return torch.cat((angle.sin(), angle.cos()), 1)


def schedule_of(c):
    """The schedule of a config's objective, flow | ddpm. Raises ValueError."""
    if c.objective not in ('flow', 'ddpm'):
        raise ValueError(f'objective={c.objective!r}: expected flow or ddpm')
    return (FlowSchedule(c.time, c.shift) if c.objective == 'flow' else Schedule(
        c.schedule, c.schedule_steps, c.prediction, clip_sample=c.clip_range > 0, clip_sample_range=c.clip_range,
        timestep_spacing=c.spacing, chained=True))


# ----------------------------------------------------------------------------------------------------------------------
# blocks of a diffusion transformer, a DiT (arXiv 2212.09748)


class Stream(nn.Module):
    """What a block does with one sequence before and after its attention; time scales, shifts and gates it.

    ends: nothing reads what this sequence would become, so it only has keys and values."""

    def __init__(self, c, ends=False):
        super().__init__()
        self.num_heads = c.num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.modulate = nn.Linear(c.width, (2 if ends else 6) * c.width)
        self.qkv = nn.Linear(c.width, (2 if ends else 3) * c.width)
        if not ends:
            self.o = nn.Linear(c.width, c.width)
            self.fc1, self.fc2 = nn.Linear(c.width, c.mlp_dim), nn.Linear(c.mlp_dim, c.width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def heads(self, x, parts):
        return [part.unflatten(-1, (self.num_heads, -1)) for part in x.chunk(parts, -1)]

    def open(self, x, condition):
        """x (B, T, D), condition (B, D) after its SiLU -> ([q, k, v] or [k, v], each (B, T, N, H), what `close` needs
        of the condition)."""
        D = x.shape[-1]
        shift, scale, *rest = self.modulate(condition)[:, None].split(D, -1)
        x = self.qkv(torch.addcmul(shift, self.norm1(x), 1 + scale))
        return self.heads(x, x.shape[-1] // D), rest

    def attended(self, x, out, gate):
        """x and what it has seen, out (B, T, N, H)."""
        return torch.addcmul(x, gate, self.o(out.flatten(2)))

    def mlp(self, x, shift, scale, gate):
        h = F.gelu(self.fc1(torch.addcmul(shift, self.norm2(x), 1 + scale)), approximate='tanh')
        return torch.addcmul(x, gate, self.fc2(h))


class DenoiserBlock(Stream):
    """A DiT block; tokens of a condition are read by cross-attention, in between."""

    def __init__(self, c, context):
        super().__init__(c)
        if context:
            self.cross_norm = nn.LayerNorm(c.width, eps=1e-6)
            self.cross_q, self.cross_kv = nn.Linear(c.width, c.width), nn.Linear(context, 2 * c.width)
            self.cross_o = nn.Linear(c.width, c.width)

    def forward(self, x, condition, mask, context, context_mask):
        """x (B, T, D), condition (B, D) after its SiLU, mask (B, T, T), context (B, S, W), context_mask (B, T, S)."""
        (q, k, v), (gate, *rest) = self.open(x, condition)
        x = self.attended(x, attention(q, k, v, mask), gate)
        if context is not None:
            (q,), (k, v) = self.heads(self.cross_q(self.cross_norm(x)), 1), self.heads(self.cross_kv(context), 2)
            x = x + self.cross_o(attention(q, k, v, context_mask).flatten(2))
        return self.mlp(x, *rest)


class JointBlock(nn.Module):
    """Patches and sentence, each with weights of its own, attend to both at once: SD3's MM-DiT (arXiv 2403.03206)."""

    def __init__(self, c, ends=False):
        super().__init__()
        self.patches, self.text = Stream(c), Stream(c, ends)

    def forward(self, x, text, condition, mask):
        """x (B, P, D), text (B, S, D), condition (B, D) after its SiLU, mask (B, 1, P + S) -> x, text."""
        (q, k, v), (gate, *rest) = self.patches.open(x, condition)
        (*text_q, text_k, text_v), text_rest = self.text.open(text, condition)
        P = x.shape[1]
        out = attention(torch.cat((q, *text_q), 1), torch.cat((k, text_k), 1), torch.cat((v, text_v), 1), mask)
        x = self.patches.mlp(self.patches.attended(x, out[:, :P], gate), *rest)
        if text_q:
            gate, *rest = text_rest
            text = self.text.mlp(self.text.attended(text, out[:, P:], gate), *rest)
        return x, text


# ----------------------------------------------------------------------------------------------------------------------
# text to image


@dataclass
class DiTConfig:
    image_size: int = 32        # pixels of a side, or rows of a latent
    channels: int = 3           # 3 of pictures, 4 of Stable Diffusion's latents
    patch_size: int = 4
    width: int = 256
    depth: int = 6              # blocks
    mlp_dim: int = 1024
    num_heads: int = 4
    attention: str = 'cross'    # how the sentence is read: cross | joint (patches and sentence see each other, SD3)
    objective: str = 'flow'     # flow | ddpm
    time: str = 'logit_normal'  # flow: how training times fall: uniform | beta | logit_normal
    shift: float = 1.0          # flow: above 1: times are noisier, as large pictures want them
    schedule: str = 'squaredcos_cap_v2'     # ddpm: linear | scaled_linear | squaredcos_cap_v2
    schedule_steps: int = 1000  # ddpm
    prediction: str = 'v_prediction'        # ddpm: epsilon (wants spacing=leading) | sample | v_prediction
    spacing: str = 'trailing'   # ddpm: the times that are sampled at: trailing | leading | linspace
    clip_range: float = 0.0     # ddpm: clean pictures lie within so much of 0 (0: anywhere)
    drop: float = 0.1           # share of samples that are learned without their sentence, for guidance
    remat: bool = False         # recompute the blocks in the backward pass instead of keeping what they computed
    vae: str = ''               # a folder of diffusers: its vae/ makes latents of pictures, which are learned

    def check(self):
        """Raises ValueError for settings that no DiT can have."""
        if self.attention not in ('cross', 'joint'):
            raise ValueError(f'dit.attention={self.attention!r}: expected cross or joint')
        if min(self.channels, self.patch_size, self.depth) < 1 or self.image_size % self.patch_size:
            raise ValueError(f'dit.image_size={self.image_size} must be a multiple of dit.patch_size={self.patch_size}'
                             f', dit.channels={self.channels} and dit.depth={self.depth} at least 1')
        if self.width % (2 * self.num_heads) or self.width % 4:
            raise ValueError(f'dit.width={self.width} must be a multiple of 4 and of twice dit.num_heads='
                             f'{self.num_heads}')
        if not 0 <= self.drop < 1:
            raise ValueError(f'dit.drop={self.drop}: expected a share of at least 0 and below 1')


class DiT(nn.Module):
    """A transformer over the patches of a noisy picture. context: width of a sentence's features.

    The sentence is read token by token, and its mean, beside the time, modulates every block (as in SD3)."""

    def __init__(self, config, context):
        super().__init__()
        self.config = c = config
        c.check()
        self.steps = 1 if c.objective == 'flow' else c.schedule_steps       # the times are from 0 to so much
        numbers = c.channels * c.patch_size ** 2
        self.input = nn.Linear(numbers, c.width)
        side = c.image_size // c.patch_size
        place = sincos(torch.arange(side) / side, c.width // 2, 2 / side, 4.0)                  # (side, D / 2)
        self.pos_embed = nn.Parameter(torch.cat((place.repeat_interleave(side, 0), place.repeat(side, 1)), 1)[None])
        self.time = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.context = nn.Sequential(nn.LayerNorm(context, eps=1e-6), nn.Linear(context, c.width))
        self.mean = nn.Linear(c.width, c.width)
        self.blocks = nn.ModuleList(DenoiserBlock(c, c.width) if c.attention == 'cross' else
                                    JointBlock(c, ends=i == c.depth - 1) for i in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False)
        self.modulate, self.output = nn.Linear(c.width, 2 * c.width), nn.Linear(c.width, numbers)
        self.init_weights()

    def init_weights(self):
        """As the paper has it: Xavier, and zero where a block, or the whole, begins as nothing."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                nn.init.zeros_(module.weight) if name.endswith(('modulate', 'output')) else nn.init.xavier_uniform_(
                    module.weight)

    def forward(self, x, t, context, context_mask):
        """x (B, C, H, W), times t (B,), context (B, S, W), context_mask bool (B, S), True = a token -> as x."""
        c = self.config
        h = self.input(F.pixel_unshuffle(x, c.patch_size).flatten(2).mT) + self.pos_embed       # (B, P, D)
        context, seen = self.context(context), context_mask[..., None].to(x.dtype)
        mean = (context * seen).sum(1) / seen.sum(1).clamp(min=1)
        condition = F.silu(self.time(sincos(t / self.steps, c.width)) + self.mean(mean))
        context_mask = context_mask[:, None]                                                    # (B, 1, S)
        if c.attention == 'joint':
            context_mask = F.pad(context_mask, (h.shape[1], 0), value=True)                     # (B, 1, P + S)
        for block in self.blocks:
            if c.attention == 'joint':
                h, context = run_block(block, c.remat, h, context, condition, context_mask)
            else:
                h = run_block(block, c.remat, h, condition, None, context, context_mask)
        shift, scale = self.modulate(condition)[:, None].chunk(2, -1)
        h = self.output(torch.addcmul(shift, self.norm(h), 1 + scale)).mT                       # (B, C p p, P)
        side = c.image_size // c.patch_size
        return F.pixel_shuffle(h.unflatten(2, (side, side)), c.patch_size)


class TextToImage(nn.Module):
    """Pictures from sentences, by a DiT or another denoiser, in pixels of -1 to 1 or in latents.

    text: a Decoder (at its feature_layer), or a module: text(tokens (B, S), segments (B, S)) -> (B, S, W).
    denoiser: denoiser(x (B, C, H, W), t (B,), context (B, S, W), context_mask (B, S)) -> (B, C, H, W). One that has
    `read` is given read(context) in sampling, once for all steps, and x once for its two sentences.
    vae: turns pictures to latents and back (`encode(pixels, keys)`, `decode`); without it pixels, or latents, go in and
    come out.
    empty: token ids of the empty sentence, which is what is read where the condition is dropped, in training
    (`config.drop`) and in sampling (classifier-free guidance, arXiv 2207.12598)."""

    def __init__(self, config, text, denoiser=None, vae=None, empty=(0,)):
        super().__init__()
        self.config = config
        self.schedule = schedule_of(config)
        self.text, self.vae = text, vae
        if hasattr(text, 'head'):
            text.head = nn.Identity()                           # no gradient would reach an output layer
        self.denoiser = denoiser or DiT(config, text.config.width)
        self.register_buffer('empty', torch.tensor(empty), persistent=False)

    def encode(self, tokens, segments):
        """What the denoiser reads of sentences (B, S): features (B, S, W) and their mask (B, S)."""
        text = self.text
        if hasattr(text, 'embed'):
            return text.features(text.embed(tokens), None, segments), segments > 0
        return text(tokens, segments), segments > 0

    def dropped(self, tokens, segments, rows):
        """tokens and segments (B, S) with the empty sentence in some rows, bool (B,)."""
        room = (0, tokens.shape[1] - len(self.empty))
        assert room[1] >= 0, f'rows of {tokens.shape[1]} tokens have no room for the {len(self.empty)} of no sentence'
        empty, there = F.pad(self.empty, room), F.pad(torch.ones_like(self.empty), room)
        return torch.where(rows[:, None], empty, tokens), torch.where(rows[:, None], there, segments)

    def loss(self, tokens, targets=None, pixels=None, blocks=None, segments=None, keys=None, noise=None, time=None,
             reduction='sum', num_targets=None):
        """Sum over pictures of the mean squared errors, and the number of pictures. pixels (I, C, H, W) are of those
        rows that have a target (`targets` None: of all).

        keys int64 (B,) give noise, times and who learns without a sentence; noise (I, C, H, W) and time (I,) may be
        given instead. Outside of training no sentence is dropped. `blocks` are not read: sentences are causal."""
        c = self.config
        pictured = torch.ones_like(tokens[:, 0], dtype=torch.bool) if targets is None else (targets != -100).any(1)
        segments = torch.ones_like(tokens) if segments is None else segments
        here, count = positions_where(pictured, num_targets), pictured.sum()
        n = len(here)
        if pixels is None:              # no row has one: one that counts nothing goes through, as on all ranks
            here = torch.zeros(1, dtype=torch.long, device=tokens.device)
            pixels = torch.zeros(1, c.channels, c.image_size, c.image_size, device=tokens.device)
        tokens, segments, keys = tokens[here], segments[here], None if keys is None else keys[here]
        with torch.no_grad():
            x = self.vae.encode(pixels, keys) if self.vae and pixels.shape[1] != c.channels else pixels
        noise = normal(keys, x.shape[1:]) if noise is None else noise
        time = self.schedule.times(uniform(keys, 1, 1)[:, 0]) if time is None else time
        if self.training and c.drop and keys is not None:
            tokens, segments = self.dropped(tokens, segments, uniform(keys, 1, 2)[:, 0] < c.drop)
        output = self.denoiser(self.schedule.add_noise(x, noise, time), time, *self.encode(tokens, segments))
        losses = F.mse_loss(output.float(), self.schedule.target(x, noise, time), reduction='none')[:n]
        losses = losses.flatten(1).mean(1)
        return losses.sum() if reduction == 'sum' else losses, count

    forward = loss              # DistributedDataParallel wraps `forward`

    @torch.no_grad()
    def sample(self, tokens, segments=None, keys=None, noise=None, steps=50, sampler='', guidance=1.0, image=None,
               strength=1.0, mask=None):
        """Pictures (B, C, H, W) of sentences (B, S), from noise that is given or follows from keys (B,).

        guidance: 1 the condition as it is, above it more of what tells it from the empty sentence, 0 that one alone.
        sampler: euler | heun of flow, ddim | ddpm of ddpm; the first if ''. image (B, C, H, W): where to begin, with
        as much noise as `strength`, 0 to 1, of the steps take away (SDEdit, arXiv 2108.01073). mask, bool (B, 1, H, W)
        of what is sampled: True is drawn anew, the rest stays the image's."""
        c, schedule, was_training = self.config, self.schedule, self.training
        self.eval()
        segments = torch.ones_like(tokens) if segments is None else segments
        noise = normal(keys, (c.channels, c.image_size, c.image_size)) if noise is None else noise
        both = guidance != 1
        if both:                                                # one batch: with the sentences, and without
            everyone = torch.ones_like(tokens[:, 0], dtype=torch.bool)
            tokens, segments = (torch.cat(pair) for pair in zip(
                (tokens, segments), self.dropped(tokens, segments, everyone)))
        context, context_mask = self.encode(tokens, segments)
        reads = hasattr(self.denoiser, 'read')
        context = self.denoiser.read(context) if reads else context

        def predict(x, t):
            if both and not reads:
                x, t = torch.cat((x, x)), torch.cat((t, t))
            output = self.denoiser(x, t, context, context_mask)
            if not both:
                return output
            told, untold = output.chunk(2)
            return untold + guidance * (told - untold)

        x, skip, after = noise, 0, None
        if image is not None:
            image = self.vae.encode(image, keys) if self.vae and image.shape[1] != c.channels else image
            skip = steps - int(steps * strength)
            x = schedule.add_noise(image, noise, schedule.timesteps(steps)[skip].item()) if skip < steps else image
            if mask is not None:
                def after(x, t):
                    return torch.where(mask, x, schedule.add_noise(image, noise, t))
        x = schedule.sample(predict, x, steps, sampler or ('euler' if c.objective == 'flow' else 'ddim'), keys,
                            skip=skip, after=after)
        self.train(was_training)
        return self.vae.decode(x) if self.vae else x


def build(config, decoder, vocab_size, empty, text=None, vae=None):
    """A TextToImage from a DiTConfig and a DecoderConfig, or a text tower that is taken as it is; vae: an autoencoder,
    which is not trained. Raises ValueError."""
    config.check()
    if vae and vae.config.latent_channels != config.channels:
        raise ValueError(f'dit.channels={config.channels}: latents of {config.vae!r} have {vae.config.latent_channels}')
    if vae:
        vae.requires_grad_(False)
    return TextToImage(config, text or Decoder(sized(decoder, vocab_size)), vae=vae, empty=empty)
