"""Everything that has noise and a time: schedules, samplers, blocks of diffusion transformers.

What draws pictures with them is in images/dit.py.

Axes: B batch, T tokens, P patches, S tokens of a sentence, N heads, H head dim, D width.

Noise and times are never drawn from a global generator: they follow from keys, as keyed.py says.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from keyed import mix64, normal, random_keys, uniform  # noqa: F401
from model import attention
from usage import refuse_unused

# -------------------------------------------------------------------------------------------------
# schedules: how much noise there is at a time, what the model is to say, and the way back


def per_row(t, x):
    """t, a number or one for every row (B,), in a shape that multiplies x (B, ...)."""
    if t.ndim == 0:
        return t
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def check_choice(name, value, allowed):
    """Raises ValueError for a setting of a schedule that is none of those allowed."""
    if value not in allowed:
        raise ValueError(f'schedule: {name}={value!r}: expected one of {", ".join(allowed)}')


def betas_of(kind, steps, start, end):
    """The share of noise that each step adds, fp32 (steps,)."""
    if kind == 'linear':
        return torch.linspace(start, end, steps)

    # as Stable Diffusion has it, linear in the root
    if kind == 'scaled_linear':
        return torch.linspace(start ** 0.5, end ** 0.5, steps) ** 2

    # squaredcos_cap_v2 (arXiv 2102.09672): a squared cosine says what is left of x, and no step
    # takes more than 0.999 of it
    left = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return torch.tensor([min(1 - after / before, 0.999) for before, after in zip(left, left[1:])])


def with_zero_snr(alphas):
    """Products of alphas, moved and stretched so that the last is 0 (arXiv 2305.08891)."""
    roots = alphas.sqrt()
    alphas = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2

    # By way of the betas, as diffusers goes: near zero the detour shows in the third digit.
    alphas = torch.cat((alphas[:1], alphas[1:] / alphas[:-1]))
    return (1 - (1 - alphas)).cumprod(0)


class Schedule:
    """DDPM (arXiv 2006.11239) and DDIM (arXiv 2010.02502): times are 0 (least noise) to steps - 1.

    Equal to diffusers' DDPMScheduler and DDIMScheduler; arguments have the names and defaults of
    its scheduler_config.json but for the first three: beta_schedule linear | scaled_linear |
    squaredcos_cap_v2, num_train_timesteps, and prediction_type epsilon (the noise) | sample (x) |
    v_prediction (arXiv 2202.00512). rescale_betas_zero_snr leaves nothing of x at the last time
    (arXiv 2305.08891), where epsilon then says nothing. chained, which is not diffusers': see
    `pairs`."""

    def __init__(self, kind='squaredcos_cap_v2', steps=1000, prediction='epsilon', beta_start=1e-4,
                 beta_end=0.02, clip_sample=True, clip_sample_range=1.0,
                 timestep_spacing='leading', steps_offset=0, set_alpha_to_one=True,
                 rescale_betas_zero_snr=False, chained=False):
        check_choice('kind', kind, ('linear', 'scaled_linear', 'squaredcos_cap_v2'))
        check_choice('prediction', prediction, ('epsilon', 'sample', 'v_prediction'))
        check_choice('timestep_spacing', timestep_spacing, ('leading', 'trailing', 'linspace'))
        if not 1 <= steps <= 1 << 20:
            raise ValueError(f'schedule: steps={steps} must be at least 1, and at most 2^20')
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f'schedule: beta_start={beta_start}, beta_end={beta_end}: expected '
                             'shares of noise between 0 and 1')
        self.steps = steps
        self.prediction = prediction
        self.spacing = timestep_spacing
        self.offset = steps_offset
        self.chained = chained

        # papers' alpha bar, the product of all (1 - beta) up to a time: it falls from 1 to 0
        betas = betas_of(kind, steps, beta_start, beta_end)
        self.alphas = (1 - betas).cumprod(0)
        if rescale_betas_zero_snr:
            self.alphas = with_zero_snr(self.alphas)

        # what it is when the last step is done
        self.final = 1.0
        if not set_alpha_to_one:
            self.final = self.alphas[0].item()

        # how far from 0 a clean x may be
        self.clip = math.inf
        if clip_sample:
            self.clip = clip_sample_range

    def alpha(self, t, x, final=1.0):
        """The share of x in the variance at t, a number or (B,), in a shape that multiplies x;
        `final` where t < 0."""
        # the table follows x to its device, once
        self.alphas = self.alphas.to(x.device)
        t = torch.as_tensor(t, device=x.device)
        return per_row(torch.where(t < 0, final, self.alphas[t.clamp(min=0)]), x)

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
        if self.prediction == 'epsilon':
            return noise
        if self.prediction == 'sample':
            return x
        a = self.alpha(t, x)
        return a.sqrt() * noise - (1 - a).sqrt() * x

    def timesteps(self, n):
        """n times, from noise to x.

        For 61 of 1000 and other numbers diffusers' trailing spacing ends in a time -1, rounding
        that went wrong: not here."""
        if not 1 <= n <= self.steps:
            raise ValueError(
                f'{n} sampling steps: expected 1 to {self.steps}, as many as the schedule has')

        if self.spacing == 'linspace':
            t = np.linspace(0, self.steps - 1, n).round()[::-1]
        elif self.spacing == 'leading':
            t = np.arange(n)[::-1] * (self.steps // n) + self.offset
        else:
            # trailing: cut to n, which is where diffusers' -1 would come
            t = np.round(np.arange(self.steps, 0, -self.steps / n))[:n] - 1
        return torch.from_numpy(t.astype(np.int64))

    def pairs(self, n, chained=False):
        """[(t, t_next), ...] for n steps, t_next -1 where nothing is left to do.

        diffusers' DDIM steps to t - steps // n, whatever time comes next: the same for leading
        spacing, not for others whose n does not divide steps. chained: to the time that comes
        next, as diffusers' DDPM does."""
        t = self.timesteps(n).tolist()
        if chained or self.chained:
            return list(zip(t, [*t[1:], -1]))
        stride = self.steps // n
        return [(time, max(time - stride, -1)) for time in t]

    def split(self, output, t, x):
        """What the model's output says of x at t: (clean x, clipped; noise, which does not know of
        the clipping)."""
        a = self.alpha(t, x)
        signal = a.sqrt()
        sigma = (1 - a).sqrt()

        # x = signal * clean + sigma * noise: whatever the output is, the others follow
        if self.prediction == 'epsilon':
            noise = output
            clean = (x - sigma * output) / signal
        elif self.prediction == 'sample':
            clean = output
            noise = (x - signal * output) / sigma
        else:
            clean = signal * x - sigma * output
            noise = signal * output + sigma * x
        return clean.clamp(-self.clip, self.clip), noise

    def step(self, output, t, t_next, x, eta=0.0, noise=None, use_clipped_model_output=False):
        """DDIM from time t to t_next (below 0: to the end). eta > 0 adds `noise`: 1 as
        much as DDPM.

        use_clipped_model_output: the noise is what is left of x beside the clipped clean x."""
        clean, direction = self.split(output, t, x)
        a = self.alpha(t, x)
        a_next = self.alpha(t_next, x, self.final)
        if use_clipped_model_output:
            direction = (x - a.sqrt() * clean) / (1 - a).sqrt()

        # equations 12 and 16 of DDIM: new noise takes the place of as much of the old
        variance = ((1 - a_next) / (1 - a) * (1 - a / a_next)).clamp(min=0)
        sigma = eta * variance.sqrt()
        old_noise = (1 - a_next - sigma ** 2).clamp(min=0).sqrt()
        x = a_next.sqrt() * clean + old_noise * direction
        if eta:
            x = x + sigma * noise
        return x

    def ddpm_step(self, output, t, t_next, x, noise=None):
        """DDPM from time t to t_next with the variance of the posterior ("fixed_small"); the last
        step adds none."""
        clean, _ = self.split(output, t, x)
        a = self.alpha(t, x)
        a_next = self.alpha(t_next, x)

        # equation 7 of DDPM; `left` is the share of x's variance that this step leaves
        left = a / a_next
        of_clean = a_next.sqrt() * (1 - left) / (1 - a)
        of_x = left.sqrt() * (1 - a_next) / (1 - a)
        mean = of_clean * clean + of_x * x
        if noise is None:
            return mean

        # rows may be at different times, some of them at their last step
        variance = ((1 - a_next) / (1 - a) * (1 - left)).clamp(min=1e-20)
        goes_on = per_row(torch.as_tensor(t, device=x.device), x) > 0
        return torch.where(goes_on, mean + variance.sqrt() * noise, mean)

    def sample(self, predict, x, n, sampler='ddim', keys=None, skip=0, after=None):
        """From noise x to a sample in n steps; predict(x, t) is the model at the times t (B,).

        sampler: ddim | ddpm, which adds noise by `keys` (B,). skip: x is what the first so many
        steps would have left. after(x, t): what becomes of x when it has come to t."""
        if sampler not in ('ddim', 'ddpm'):
            raise ValueError(f'sampler={sampler!r}: a discrete schedule has ddim and ddpm')

        pairs = self.pairs(n, chained=sampler == 'ddpm')
        for i, (t, t_next) in enumerate(pairs[skip:], skip):
            output = predict(x, torch.full((len(x),), t, device=x.device))
            if sampler == 'ddim':
                x = self.step(output, t, t_next, x)
            elif t > 0:
                # a stream of its own for every step
                noise = normal(keys, x.shape[1:], 16 + i).to(x)
                x = self.ddpm_step(output, t, t_next, x, noise)
            else:
                x = self.ddpm_step(output, t, t_next, x)

            if after:
                x = after(x, t_next)
        return x


class FlowSchedule:
    """Flow matching on straight lines (arXiv 2209.03003, 2210.02747): time 1 is noise, 0 is x, and
    the model says how x changes with time, noise - x.

    time: how training times fall: uniform | beta (pi0's Beta(1.5, 1) * 0.999 + 0.001, more of them
    noisy; arXiv 2410.24164) | logit_normal (SD3, arXiv 2403.03206). shift s takes times, of
    sampling too, to s t / (1 + (s - 1) t)."""

    def __init__(self, time='uniform', shift=1.0):
        is_time = time in ('uniform', 'beta', 'logit_normal')
        if not is_time or not 0 < shift < math.inf:
            raise ValueError(
                f'flow: time={time!r}, shift={shift}: expected uniform, beta or logit_normal, '
                'and a shift above 0')
        self.time = time
        self.shift = shift

    def shifted(self, t):
        return self.shift * t / (1 + (self.shift - 1) * t)

    def fraction(self, t):
        """Times as 0 to 1."""
        return t

    def times(self, u):
        """Times to train at, from uniform numbers u of 0 to 1."""
        if self.time == 'uniform':
            t = u
        elif self.time == 'logit_normal':
            t = torch.special.ndtri(u).sigmoid()
        else:
            # u ** (1 / a) is distributed as Beta(a, 1)
            t = u ** (1 / 1.5) * 0.999 + 0.001
        return self.shifted(t)

    def add_noise(self, x, noise, t):
        """x as it is at the times t (B,), or at one time."""
        # fp32 whatever x is: times that bf16 rounds are other times
        t = per_row(torch.as_tensor(t, dtype=torch.float32, device=x.device), x)
        return (t * noise + (1 - t) * x).to(x.dtype)

    def target(self, x, noise, t=None):
        """What the model is to say, at all times."""
        return noise - x

    def timesteps(self, n):
        """n + 1 times, the last 0: what n steps go through, from 1."""
        if n < 1:
            raise ValueError(f'{n} sampling steps: expected at least 1')
        # in fp64, so that fp32 has the nearest number to each
        even = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        return self.shifted(even).float()

    def pairs(self, n):
        """[(t, t_next), ...] for n steps."""
        t = self.timesteps(n).tolist()
        return list(zip(t, t[1:]))

    def step(self, output, t, t_next, x):
        """Euler from time t to t_next; numbers, or (B,)."""
        # on the CPU where they are numbers: a GPU takes one of those without a copy
        t = torch.as_tensor(t, dtype=torch.float32)
        t_next = torch.as_tensor(t_next, dtype=torch.float32)
        return x + (per_row(t_next - t, x) * output).to(x.dtype)

    def sample(self, predict, x, n, sampler='euler', keys=None, skip=0, after=None):
        """From noise x to a sample in n steps; predict(x, t) is the model at the times t (B,).

        sampler: euler | heun, which asks the model twice in every step but the last. Nothing is
        random: keys are not used. skip, after: as `Schedule.sample` has them."""
        if sampler not in ('euler', 'heun'):
            raise ValueError(f'sampler={sampler!r}: flow matching has euler and heun')

        for t, t_next in self.pairs(n)[skip:]:
            output = predict(x, x.new_full((len(x),), t))

            # Heun: the mean of what the model says here and where Euler would go
            if sampler == 'heun' and t_next > 0:
                ahead = self.step(output, t, t_next, x)
                output_ahead = predict(ahead, x.new_full((len(x),), t_next))
                output = (output + output_ahead) / 2

            x = self.step(output, t, t_next, x)
            if after:
                x = after(x, t_next)
        return x


def sincos(t, width, min_period=4e-3, max_period=4.0):
    """Times of 0 to 1, (B,), as sines and cosines, fp32 (B, width); the periods are pi0's."""
    # from the shortest to the longest, by equal factors
    exponent = torch.linspace(0, 1, width // 2, device=t.device)
    period = min_period * (max_period / min_period) ** exponent
    angle = t.float()[:, None] * (2 * math.pi / period)
    return torch.cat((angle.sin(), angle.cos()), 1)


# settings of a config that only one objective reads
OF_OBJECTIVE = dict(flow=('time', 'shift'), ddpm=('schedule', 'schedule_steps', 'prediction',
                                                  'spacing', 'clip_range'))


def check_objective(settings, known, part):
    """Raises ValueError where a setting of the other objective is set. known: {key: default};
    part: the name of the config in the settings."""
    for objective, names in OF_OBJECTIVE.items():
        if objective != settings[f'{part}.objective']:
            refuse_unused(settings, known, [f'{part}.{name}' for name in names],
                          f'{part}.objective={settings[f"{part}.objective"]}')


def check_widths(key, widths):
    """Raises ValueError for a list that does not hold a size for each level of a network."""
    if not widths or not all(type(width) is int and 0 < width < 1 << 20 for width in widths):
        raise ValueError(f'{key}={widths}: expected a number a level, at least 1, below 2^20')


def check_schedule(part, make, c):
    """Raises ValueError where a config has no schedule: `part` is its name in the settings, `make`
    a function of it."""
    try:
        make(c)
    except ValueError as error:
        raise ValueError(f'{part}: {error}') from None


def schedule_of(c):
    """The schedule of a config's objective, flow | ddpm. Raises ValueError."""
    if c.objective == 'flow':
        return FlowSchedule(c.time, c.shift)

    # chained: sampled at times that may not divide schedule_steps evenly
    if c.objective == 'ddpm':
        return Schedule(
            c.schedule, c.schedule_steps, c.prediction, clip_sample=c.clip_range > 0,
            clip_sample_range=c.clip_range, timestep_spacing=c.spacing, chained=True)
    raise ValueError(f'objective={c.objective!r}: expected flow or ddpm')


# -------------------------------------------------------------------------------------------------
# blocks of a diffusion transformer, a DiT (arXiv 2212.09748)


class Stream(nn.Module):
    """What a block does with one sequence before and after its attention; time scales, shifts and
    gates it.

    ends: nothing reads what this sequence would become, so it only has keys and values."""

    def __init__(self, c, ends=False):
        super().__init__()
        self.num_heads = c.num_heads
        self.norm1 = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False)

        # Shift and scale of a norm, and the gate of what follows, for attention and for MLP; where
        # the sequence ends, there is nothing after keys and values.
        if ends:
            modulations, projections = 2, 2
        else:
            modulations, projections = 6, 3
        self.modulate = nn.Linear(c.width, modulations * c.width)
        self.qkv = nn.Linear(c.width, projections * c.width)
        if not ends:
            self.o = nn.Linear(c.width, c.width)
            self.fc1 = nn.Linear(c.width, c.mlp_dim)
            self.fc2 = nn.Linear(c.mlp_dim, c.width)

        # a block begins as nothing: all of its gates are 0
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def heads(self, x, parts):
        """x (B, T, parts D) -> as many of (B, T, N, H)."""
        return [part.unflatten(-1, (self.num_heads, -1)) for part in x.chunk(parts, -1)]

    def open(self, x, condition):
        """x (B, T, D), condition (B, D) after its SiLU -> ([q, k, v] or [k, v], each (B, T, N, H);
        what `attended` and `mlp` need of the condition)."""
        D = x.shape[-1]

        # one row a sample, the same for all of its tokens
        shift, scale, *rest = self.modulate(condition)[:, None].split(D, -1)
        x = self.qkv(torch.addcmul(shift, self.norm1(x), 1 + scale))
        return self.heads(x, x.shape[-1] // D), rest

    def attended(self, x, out, gate):
        """x and what it has seen, out (B, T, N, H)."""
        return torch.addcmul(x, gate, self.o(out.flatten(2)))

    def mlp(self, x, shift, scale, gate):
        h = self.fc1(torch.addcmul(shift, self.norm2(x), 1 + scale))
        h = F.gelu(h, approximate='tanh')
        return torch.addcmul(x, gate, self.fc2(h))


class DenoiserBlock(Stream):
    """A DiT block; tokens of a condition are read by cross-attention, in between."""

    is_block = True     # FSDP shards and torch.compile compiles block by block

    def __init__(self, c, context):
        super().__init__(c)
        if context:
            self.cross_norm = nn.LayerNorm(c.width, eps=1e-6)
            self.cross_q = nn.Linear(c.width, c.width)
            self.cross_kv = nn.Linear(context, 2 * c.width)
            self.cross_o = nn.Linear(c.width, c.width)

    def forward(self, x, condition, mask, context, context_mask):
        """x (B, T, D), condition (B, D) after its SiLU, mask (B, T, T), context (B, S, W),
        context_mask (B, T, S)."""
        (q, k, v), (gate, *rest) = self.open(x, condition)
        x = self.attended(x, attention(q, k, v, mask), gate)

        # the condition's tokens have no time: nothing gates them
        if context is not None:
            (q,) = self.heads(self.cross_q(self.cross_norm(x)), 1)
            k, v = self.heads(self.cross_kv(context), 2)
            x = x + self.cross_o(attention(q, k, v, context_mask).flatten(2))
        return self.mlp(x, *rest)


class JointBlock(nn.Module):
    """Patches and sentence, each with weights of its own, attend to both at once: SD3's MM-DiT
    (arXiv 2403.03206)."""

    is_block = True     # FSDP shards and torch.compile compiles block by block

    def __init__(self, c, ends=False):
        super().__init__()
        self.patches = Stream(c)
        self.text = Stream(c, ends)

    def forward(self, x, text, condition, mask):
        """x (B, P, D), text (B, S, D), condition (B, D) after its SiLU, mask (B, 1, P + S)
        -> x, text."""
        (q, k, v), (gate, *rest) = self.patches.open(x, condition)

        # the last block's sentence asks nothing: it has no queries
        (*text_q, text_k, text_v), text_rest = self.text.open(text, condition)
        out = attention(torch.cat((q, *text_q), 1), torch.cat((k, text_k), 1),
                        torch.cat((v, text_v), 1), mask)

        # each goes on with what it has seen
        P = x.shape[1]
        x = self.patches.mlp(self.patches.attended(x, out[:, :P], gate), *rest)
        if text_q:
            gate, *rest = text_rest
            text = self.text.mlp(self.text.attended(text, out[:, P:], gate), *rest)
        return x, text
