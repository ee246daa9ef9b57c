"""What is trained, and by which optimizer: rules over parameters' names, groups of options, the state as tensors."""
import re

import torch


def match(groups, names):
    """{name: options}: every parameter takes the first rule (regex, options) of `groups` that is found in its name.

    Raises ValueError for a parameter without a rule, a rule without a parameter, and where nothing is left to train."""
    rules = {name: next((rule for rule in groups if re.search(rule[0], name)), None) for name in names}
    for name, rule in rules.items():
        if rule is None:
            raise ValueError(f'groups: no rule matches parameter {name}: end the list with (".*", {{}})')
    for rule in groups:
        if rule not in rules.values() or set(rule[1]) - {'lr_scale', 'weight_decay', 'freeze'}:
            raise ValueError(f'groups: rule {rule[0]!r}: {rule[1]} ' + (
                'may hold lr_scale, weight_decay and freeze' if rule in rules.values() else
                'matches no parameter that an earlier one left'))
    if all(rule[1].get('freeze') for rule in rules.values()):
        raise ValueError(f'groups={groups} freeze every parameter: nothing is left to train')
    return {name: rule[1] for name, rule in rules.items()}


def build(kind, trained, options, lr, betas, weight_decay):
    """The optimizers of parameters {name: parameter}: AdamW, and with kind='muon' Muon for the matrices of blocks."""
    by_options = {}
    for name, p in trained.items():
        matrix = kind == 'muon' and p.ndim == 2 and re.search(r'(^|\.)blocks\.', name) is not None
        key = matrix, options[name].get('lr_scale', 1.0), options[name].get('weight_decay', weight_decay)
        by_options.setdefault(key, []).append(p)
    groups = {matrix: [dict(params=ps, lr_scale=scale, weight_decay=decayed)
                       for (m, scale, decayed), ps in by_options.items() if m == matrix] for matrix in (False, True)}
    optimizers = [torch.optim.AdamW(groups[False], lr=lr, betas=betas, fused=True)] if groups[False] else []
    if groups[True]:
        optimizers.append(torch.optim.Muon(groups[True], lr=lr, adjust_lr_fn='match_rms_adamw'))
    return optimizers


def state_tensors(optimizers, trained):
    """The optimizers' state as {parameter.key: tensor}, zeros where no step was taken."""
    tensors, names = {}, {p: name for name, p in trained.items()}
    for opt in optimizers:
        for p in [p for group in opt.param_groups for p in group['params']]:
            if p not in opt.state:
                keys = ('momentum_buffer',) if isinstance(opt, torch.optim.Muon) else ('exp_avg', 'exp_avg_sq')
                opt.state[p] = {key: torch.zeros_like(p) for key in keys}
                if keys[0] == 'exp_avg':
                    opt.state[p]['step'] = torch.zeros((), device=p.device)
            tensors |= {f'{names[p]}.{key}': value for key, value in opt.state[p].items()}
    return tensors
