"""Everything that has noise and a time: schedules, and their samplers. What they train is in policies.py.

Axes: B batch.

Noise and times are never drawn from a global generator: they are a function of int64 `keys`, one a sample, so that
what a sample gets does not depend on ranks, micro-batches or who else is in the batch:
  keys = random_keys(seed, positions); noise = normal(keys, x.shape[1:]); t = schedule.times(uniform(keys, 1, 1)[:, 0])
"""
import math

import numpy as np
import torch

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
    """64 random bits, (B, count), from keys int64 (B,). Streams are independent: 0 noise, 1 times, 16 on DDPM's."""
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
    rescale_betas_zero_snr leaves nothing of x at the last time (arXiv 2305.08891), where epsilon then says nothing."""

    def __init__(self, kind='squaredcos_cap_v2', steps=1000, prediction='epsilon', beta_start=1e-4, beta_end=0.02,
                 clip_sample=True, clip_sample_range=1.0, timestep_spacing='leading', steps_offset=0,
                 set_alpha_to_one=True, rescale_betas_zero_snr=False):
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
        return list(zip(t, [*t[1:], -1])) if chained else [(a, max(a - self.steps // n, -1)) for a in t]

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

    def sample(self, predict, x, n, sampler='ddim', keys=None, chained=False):
        """From noise x to a sample in n steps; predict(x, t) is the model at the times t (B,). sampler: ddim | ddpm,
        which adds noise by `keys` (B,); chained: see `pairs`."""
        if sampler not in ('ddim', 'ddpm'):
            raise ValueError(f'sampler={sampler!r}: a discrete schedule has ddim and ddpm')
        for i, (t, t_next) in enumerate(self.pairs(n, chained or sampler == 'ddpm')):
            output = predict(x, torch.full((len(x),), t, device=x.device))
            if sampler == 'ddim':
                x = self.step(output, t, t_next, x)
            else:
                x = self.ddpm_step(output, t, t_next, x, normal(keys, x.shape[1:], 16 + i).to(x) if t > 0 else None)
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

    def sample(self, predict, x, n, sampler='euler', keys=None):
        """From noise x to a sample in n steps; predict(x, t) is the model at the times t (B,). sampler: euler | heun,
        which asks the model twice in every step but the last. Nothing is random: keys are not used."""
        if sampler not in ('euler', 'heun'):
            raise ValueError(f'sampler={sampler!r}: flow matching has euler and heun')
        for t, t_next in self.pairs(n):
            output = predict(x, x.new_full((len(x),), t))
            if sampler == 'heun' and t_next > 0:
                ahead = predict(self.step(output, t, t_next, x), x.new_full((len(x),), t_next))
                output = (output + ahead) / 2
            x = self.step(output, t, t_next, x)
        return x


def sincos(t, width, min_period=4e-3, max_period=4.0):
    """Times of 0 to 1, (B,), as sines and cosines, fp32 (B, width); the periods are pi0's."""
    period = min_period * (max_period / min_period) ** torch.linspace(0, 1, width // 2, device=t.device)
    angle = t.float()[:, None] * (2 * math.pi / period)
    return torch.cat((angle.sin(), angle.cos()), 1)
