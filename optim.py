"""What is trained, and by which optimizer: rules over parameters' names, groups, state as tensors.

A rule is (regex, options), a parameter takes the first one that is found in its name:

    groups = [('^vit', {'freeze': True}), ('norm|bias', {'weight_decay': 0.0}), ('.*', {})]
"""
import math
import re

import torch

OPTIONS = ('lr_scale', 'weight_decay', 'freeze')
AMOUNT = 'expected a finite number of at least 0'
CHOICES = {'optimizer': ('adamw', 'muon'), 'schedule': ('cosine', 'linear', 'constant', 'wsd')}


def check(settings, world=1):
    """Raises ValueError, one line on one fault, for what a run can not be trained with; lines on
    what is set and changes nothing."""
    for key, allowed in CHOICES.items():
        if settings[key] not in allowed:
            raise ValueError(f'{key}={settings[key]!r}: expected one of {", ".join(allowed)}')
    if not 0 < settings['decay'] <= 1:
        raise ValueError(f'decay={settings["decay"]}: expected a fraction of the run, above 0 and '
                         'at most 1')

    # lr=0 is no fault: a dry run, which is told.
    for key in ('lr', 'min_lr', 'weight_decay', 'grad_clip'):
        if not is_amount(settings[key]):
            raise ValueError(f'{key}={settings[key]}: {AMOUNT}')
    if not (is_amount(settings['ema']) and settings['ema'] < 1):
        raise ValueError(f'ema={settings["ema"]}: {AMOUNT} and below 1')

    # At a beta of 1 a mean never changes, and its correction divides by 0.
    betas = settings['betas']
    if len(betas) != 2:
        raise ValueError(f'betas={betas}: expected two numbers')
    for beta in betas:
        if not (is_amount(beta) and beta < 1):
            raise ValueError(f'betas={betas}: {beta!r}: {AMOUNT} and below 1')

    # Whether they match parameters is told once there is a model, by `match`.
    check_groups(settings['groups'])
    for regex in settings['init_skip']:
        check_regex('init_skip', regex)
        if not (settings['init_from'] or settings['init']):
            raise ValueError(f'init_skip: {regex!r}: there is no init_from or init to skip it in')

    # A weight of 0 keeps a data set in the order of the run, and learns nothing from it.
    known = list(settings['mix'])
    for name, weight in settings['loss_weights'].items():
        if name not in known:
            raise ValueError(f'loss_weights: {name!r} is no data set of mix={known}')
        if not is_amount(weight):
            raise ValueError(f'loss_weights: {name!r}: {weight!r}: {AMOUNT}')
    if not any(settings['loss_weights'].get(name, 1) for name in known):
        raise ValueError(f'loss_weights={settings["loss_weights"]}: nothing would be learned of '
                         'any data set: give one of them a weight above 0')

    # Not refused: a config may have them, and another schedule be tried by a flag.
    lines, schedule = [], settings['schedule']
    if settings['lr'] == 0:
        lines.append('lr=0: nothing will change but what is measured')
    if settings['decay'] != 0.2 and schedule != 'wsd':
        lines.append(f'decay={settings["decay"]} is not used: schedule={schedule}')
    if settings['min_lr'] and schedule == 'constant':
        lines.append(f'min_lr={settings["min_lr"]} is not used: schedule=constant')
    return lines


def is_amount(value):
    """Whether a setting is a finite number of at least 0."""
    # A comparison with nan is false, so that nan is none.
    return isinstance(value, (int, float)) and 0 <= value < math.inf


def check_regex(key, regex):
    """Raises ValueError where `regex`, of the setting `key`, does not compile."""
    try:
        re.compile(regex)
    except (re.error, TypeError) as error:
        raise ValueError(f'{key}: {regex!r} is not a regular expression ({error})') from error


def check_groups(groups):
    """Raises ValueError for the first rule that is wrong, whatever the parameters are."""
    for rule in groups:
        is_pair = isinstance(rule, (list, tuple)) and len(rule) == 2
        if not is_pair or not isinstance(rule[1], dict):
            raise ValueError(f'groups: {rule!r}: expected (regex, {{option: value}}), '
                             f'where options are {", ".join(OPTIONS)}')
        regex, options = rule
        check_regex('groups', regex)

        for option, value in options.items():
            said = f'groups: rule {regex!r}: {option!r}: {value!r}'
            if option not in OPTIONS:
                raise ValueError(f'{said}: a rule may hold {", ".join(OPTIONS)}')
            # Text such as 'false' would count as true.
            if option == 'freeze' and not isinstance(value, bool):
                raise ValueError(f'{said}: expected True or False')
            if option != 'freeze' and not is_amount(value):
                raise ValueError(f'{said}: {AMOUNT}')


def learning_rate(settings, steps):
    """A function of the step: linear warm-up to lr, then as `schedule` says down to min_lr * lr.

    Raises ValueError for more warm-up than run."""
    lr, min_lr, warmup = settings['lr'], settings['min_lr'], settings['warmup']
    warmup_steps = round(warmup * steps) if warmup < 1 else int(warmup)
    if warmup_steps > steps:
        raise ValueError(f'warmup={warmup} is {warmup_steps} steps, the run has {steps}: give a '
                         'fraction below 1 or fewer steps')

    def lr_at(step):
        if step < warmup_steps:
            return lr * (step + 1) / warmup_steps
        x = (step - warmup_steps) / max(1, steps - warmup_steps)        # 0 to 1
        left = {'cosine': 0.5 * (1 + math.cos(math.pi * x)), 'linear': 1 - x, 'constant': 1.0,
                'wsd': min(1.0, (steps - step) / (settings['decay'] * steps))}
        return lr * (min_lr + (1 - min_lr) * left[settings['schedule']])

    return lr_at


def match(groups, names):
    """{name: options}: every parameter takes the first rule of `groups` found in its name.

    Raises ValueError for a parameter without a rule, a rule without a parameter, and where nothing
    is left to train."""
    check_groups(groups)
    rules = {}
    for name in names:
        rules[name] = next((rule for rule in groups if re.search(rule[0], name)), None)
        if rules[name] is None:
            raise ValueError(f'groups: no rule matches parameter {name}: '
                             'end the list with (".*", {})')

    # A rule that nothing takes is misspelled, or stands behind one that takes everything.
    for rule in groups:
        if rule not in rules.values():
            raise ValueError(f'groups: rule {rule[0]!r}: {rule[1]} matches no parameter '
                             'that an earlier one left')

    options = {name: rule[1] for name, rule in rules.items()}
    if all(each.get('freeze') for each in options.values()):
        raise ValueError(f'groups={groups} freeze every parameter: nothing is left to train')
    return options


def build(kind, trained, options, lr, betas, weight_decay):
    """The optimizers of {name: parameter}: AdamW; kind='muon': Muon for the matrices of blocks."""
    # Parameters of equal options share a group, in the order in which the model has them.
    adamw, muon = {}, {}
    for name, parameter in trained.items():
        is_block_matrix = parameter.ndim == 2 and re.search(r'(^|\.)blocks\.', name)
        groups = muon if kind == 'muon' and is_block_matrix else adamw

        # The loop multiplies lr by lr_scale in each step; weight_decay is torch's own.
        lr_scale = options[name].get('lr_scale', 1.0)
        decay = options[name].get('weight_decay', weight_decay)
        empty = dict(params=[], lr_scale=lr_scale, weight_decay=decay)
        groups.setdefault((lr_scale, decay), empty)['params'].append(parameter)

    # torch refuses an optimizer that has no parameters.
    optimizers = []
    if adamw:
        # torch takes no 0 for 0.0 there
        groups, betas = list(adamw.values()), tuple(map(float, betas))
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True))
    # Muon's updates as large as AdamW's (arXiv 2502.16982), so that one lr serves both.
    if muon:
        groups = list(muon.values())
        optimizers.append(torch.optim.Muon(groups, lr=lr, adjust_lr_fn='match_rms_adamw'))
    return optimizers


def state_tensors(optimizers, trained):
    """The optimizers' state as {parameter.key: tensor}, zeros where no step was taken."""
    names = {parameter: name for name, parameter in trained.items()}
    tensors = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group['params']:
                # A checkpoint may be read before any step, which would make these.
                if parameter not in optimizer.state:
                    optimizer.state[parameter] = zero_state(optimizer, parameter)
                for key, value in optimizer.state[parameter].items():
                    tensors[f'{names[parameter]}.{key}'] = value
    return tensors


def zero_state(optimizer, parameter):
    """What the optimizer has of a parameter before the first step, {key: tensor}."""
    if isinstance(optimizer, torch.optim.Muon):
        return {'momentum_buffer': torch.zeros_like(parameter)}
    # fused AdamW counts its steps on the parameter's device.
    return {'exp_avg': torch.zeros_like(parameter), 'exp_avg_sq': torch.zeros_like(parameter),
            'step': torch.zeros((), device=parameter.device)}
