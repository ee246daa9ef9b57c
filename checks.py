"""Settings of train.py that can be told to be wrong before any data are opened."""
import re

CHOICES = {'task': ('vlm', 'llm', 'siglip', 'policy', 'vla', 't2i'), 'resume': ('auto', 'never'),
           'denoiser': ('dit', 'unet'), 'pair_with': ('batch', 'all'), 'optimizer': ('adamw', 'muon'),
           'dtype': ('float32', 'bfloat16', 'float16'), 'matmul': ('highest', 'high', 'medium'),
           'schedule': ('cosine', 'linear', 'constant', 'wsd')}


def check(s, world):
    """Raises ValueError, one line with key, value and remedy. s: an object with the settings as attributes."""
    for key, allowed in CHOICES.items():
        if getattr(s, key) not in allowed:
            raise ValueError(f'{key}={getattr(s, key)!r}: expected one of {", ".join(allowed)}')
    check_batch(s, world)
    if s.task in ('policy', 'vla'):
        check_policy(s)
    length = getattr(s, 'clip.max_length', 0)
    if s.denoiser == 'unet' and (s.task != 't2i' or s.seq_len != length):
        raise ValueError(f'denoiser=unet with task={s.task} and seq_len={s.seq_len}: expected task=t2i and seq_len='
                         f'{length}, which is clip.max_length')
    if sum(x > 0 for x in (s.max_steps, s.max_samples, s.epochs)) != 1 or min(s.max_steps, s.max_samples, s.epochs) < 0:
        raise ValueError(f'the run\'s length is one of max_steps={s.max_steps}, max_samples={s.max_samples}, '
                         f'epochs={s.epochs}: set one above 0 and leave the others at 0')
    if s.fsdp < 0 or world % (s.fsdp or 1):
        raise ValueError(f'fsdp={s.fsdp} must divide the {world} ranks: 1 (DDP), 0 (all) or a divisor')
    check_optimizer(s)
    try:
        if s.remote:
            from remote import filesystem
            filesystem(s.remote)
    except (ValueError, ImportError) as error:
        raise ValueError(f'remote={s.remote!r}: {error}') from error
    if min(s.log_every, s.num_checkpoints) < 1 or min(s.eval_every, s.keep_last, s.workers, s.warmup, s.seed,
                                                      s.skip_bad_steps) < 0:
        raise ValueError(f'log_every={s.log_every} and num_checkpoints={s.num_checkpoints} must be at least 1; '
                         f'eval_every={s.eval_every}, keep_last={s.keep_last}, workers={s.workers}, '
                         f'warmup={s.warmup}, seed={s.seed} and skip_bad_steps={s.skip_bad_steps} at least 0')
    if not 0 < s.decay <= 1:
        raise ValueError(f'decay={s.decay}: expected a fraction of the run, above 0 and at most 1')


def check_policy(s):
    """A policy's settings, and what it has no use for."""
    for key in ('action_dim', 'action_steps', 'proprio_dim'):
        if getattr(s, f'{s.task}.{key}'):
            raise ValueError(f'{s.task}.{key}={getattr(s, f"{s.task}.{key}")}: set {key}, which samples have, too')
    if min(s.action_dim, s.action_steps) < 1 or min(s.proprio_dim, s.action_weight) < 0:
        raise ValueError(f'task={s.task}: action_dim={s.action_dim} and action_steps={s.action_steps} must be at least '
                         f'1, proprio_dim={s.proprio_dim} and action_weight={s.action_weight} at least 0')
    if s.pack:
        raise ValueError(f'pack=True: task={s.task} has a row for every sample')


def check_batch(s, world):
    unit = world * max(s.micro_batch_size, 1)
    if s.batch_size < 1 or s.micro_batch_size < 0 or s.batch_size % unit:
        raise ValueError(f'batch_size={s.batch_size} is not a multiple of {world} ranks x micro_batch_size='
                         f'{s.micro_batch_size or 1}: {max(s.batch_size // unit, 1) * unit} or '
                         f'{(max(s.batch_size, 0) // unit + 1) * unit} would fit')
    if s.task in ('siglip', 't2i') and s.pack:
        raise ValueError(f'pack=True: a row of task={s.task} has one picture, it can not be shared')
    micro_batch = s.micro_batch_size or s.batch_size // world
    if s.task == 'siglip' and s.pair_with == 'batch' and micro_batch != s.batch_size:
        raise ValueError(f'pair_with=batch compares all pairs of a batch, so batch_size={s.batch_size} must be one '
                         f'micro-batch on one rank (here: {world} ranks, micro_batch_size={micro_batch}): take '
                         'pair_with=all')


def check_optimizer(s):
    if min(s.lr, s.min_lr, s.weight_decay, s.grad_clip) < 0 or len(s.betas) != 2 or not all(
            0 <= b < 1 for b in s.betas):
        raise ValueError(f'lr={s.lr}, min_lr={s.min_lr}, weight_decay={s.weight_decay} and grad_clip={s.grad_clip} '
                         f'must be at least 0, and betas={s.betas} two numbers of at least 0 and below 1')
    if not all(isinstance(rule, (list, tuple)) and len(rule) == 2 and isinstance(rule[1], dict) for rule in s.groups):
        raise ValueError(f'groups={s.groups}: expected [(regex, {{lr_scale, weight_decay, freeze}}), ...]')
    for regex in [*(rule[0] for rule in s.groups), *s.init_skip]:
        try:
            re.compile(regex)
        except (re.error, TypeError) as error:
            raise ValueError(f'groups and init_skip: {regex!r} is not a regular expression ({error})') from error
    if s.task in ('siglip', 't2i') and (s.label_smoothing or s.z_loss) or not (
            0 <= s.label_smoothing < 1 and s.z_loss >= 0 and 0 <= s.ema < 1):
        raise ValueError(f'ema={s.ema} and label_smoothing={s.label_smoothing} must be at least 0 and below 1, '
                         f'z_loss={s.z_loss} at least 0; task={s.task}: siglip and t2i have neither of the two last')
    if set(s.loss_weights) - set(s.mix) or not all(
            isinstance(w, (int, float)) and w >= 0 for w in s.loss_weights.values()):
        raise ValueError(f'loss_weights={s.loss_weights}: expected data sets of mix={list(s.mix)} with numbers of at '
                         'least 0')
