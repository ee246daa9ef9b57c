"""What a policy learns from: a chunk of actions, its noisy versions, and what an error costs.

`lowdim` is a dict of tensors: actions (A, T, D), is_pad (A, T), action_mask (A, D), proprio
(A, P), proprio_mask (A, P), keys (A,) that noise and times follow from, and rows (A,), the rows of
`tokens` that the samples belong to. A padded action, and a number that action_mask leaves out, is
neither input nor target, whatever it is.

Axes: A samples with actions, T actions of a chunk, D numbers of an action, P of a state.
"""
import torch
import torch.nn.functional as F

from diffusion import normal, uniform
from model import Learned

LOSSES = {'mse': F.mse_loss, 'l1': F.l1_loss, 'huber': F.huber_loss}


def valid_numbers(lowdim):
    """bool (A, T, D): the numbers that are learned; their sum is what a policy's loss is a mean
    over."""
    # masks may be missing: then all that is there is real
    valid = torch.ones_like(lowdim['actions'], dtype=torch.bool)
    if 'is_pad' in lowdim:
        valid = valid & ~lowdim['is_pad'].bool()[:, :, None]
    if 'action_mask' in lowdim:
        valid = valid & lowdim['action_mask'].bool()[:, None]
    return valid


def nothing(config, device):
    """A `lowdim` without anything to learn: what a rank goes through whose batch has no
    actions."""
    # one chunk, all of it padding: every parameter gets a gradient, of zeros
    shape = 1, config.action_steps, config.action_dim
    return dict(actions=torch.zeros(shape, device=device),
                is_pad=torch.ones(shape[:2], device=device),
                proprio=torch.zeros(1, config.proprio_dim, device=device),
                keys=torch.zeros(1, dtype=torch.long, device=device),
                rows=torch.zeros(1, dtype=torch.long, device=device))


def state_of(lowdim, config, batch, device):
    """The state (A, P), zero where proprio_mask leaves a number out; one zero where there is no
    state."""
    # a layer needs an input, and so there is a number that says nothing
    if not config.proprio_dim:
        return torch.zeros(batch, 1, device=device)
    state = lowdim['proprio'].float()
    if 'proprio_mask' in lowdim:
        state = state.where(lowdim['proprio_mask'].bool(), 0)
    return state


def draws_of(lowdim, schedule, draws, noise=None, time=None):
    """(x_t, t, target) of `draws` noisy versions of each chunk, (A * draws, T, D), and its valid
    numbers.

    noise (A * draws, T, D) and time (A * draws,) are given, or follow from keys."""
    valid = valid_numbers(lowdim)
    x = lowdim['actions'].float().where(valid, 0)

    # by keys alone, so that a batch may be cut anywhere
    if noise is None:
        noise = normal(lowdim['keys'], (draws, *x.shape[1:])).flatten(0, 1)
    if time is None:
        time = schedule.times(uniform(lowdim['keys'], draws, 1).flatten())

    # noise on padding would be an input, too
    x, valid = x.repeat_interleave(draws, 0), valid.repeat_interleave(draws, 0)
    noisy = schedule.add_noise(x, noise, time).where(valid, 0)
    return noisy, time, schedule.target(x, noise, time), valid


def action_loss(kind, output, target, valid, draws, places):
    """The Learned of a chunk: the errors of each sample at its valid numbers, a mean over its
    draws."""
    # `where`, for 0 times what is not finite would not be 0
    losses = LOSSES[kind](output.float(), target, reduction='none').where(valid, 0)
    losses = losses.flatten(1).sum(1).unflatten(0, (-1, draws)).mean(1)         # (A,)
    return Learned(losses, valid[::draws].flatten(1).sum(1), places)


def start_of(lowdim, config, noise=None):
    """Noise to sample from (A, T, D), as given or by keys, and action_mask (A or 1, 1, D)."""
    if noise is None:
        noise = normal(lowdim['keys'], (config.action_steps, config.action_dim))
    everything = torch.ones(1, config.action_dim, dtype=torch.bool, device=noise.device)
    return noise, lowdim.get('action_mask', everything).bool()[:, None]
