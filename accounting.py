"""Accounts of weights that are opened, others' and ours: every tensor of a file is loaded or
unused, every one of the model loaded or new, and one line says so. Weights that no model should
use, for they are not finite or not whole, are refused here.
"""
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import past
from checkpoint import is_name


@dataclass
class Account:
    """What became of the tensors of a folder or file."""
    loaded: list = field(default_factory=list)          # our names
    unused: Counter = field(default_factory=Counter)    # {a part there: its tensors left unused}
    needless: dict = field(default_factory=dict)        # {name there: why it is not needed}
    fitted: list = field(default_factory=list)          # what was made to fit, in words

    def left(self):
        """What was not loaded, and what was made to fit, in words."""
        said = [f'{counted(self.unused)} left there unused']
        # those of all layers have one reason: some are named, all are counted
        for why in dict.fromkeys(self.needless.values()):
            names = [name for name, reason in self.needless.items() if reason == why]
            said.append(f'{listed(names)} not needed ({why})')
        return '; '.join(said + self.fitted)

    def is_whole(self):
        """Was all of it loaded as it is?"""
        return not (self.unused or self.needless or self.fitted)


def counted(parts):
    """{part: tensors} in words: 'action_in, expert (20)'; none."""
    if not parts:
        return 'none'
    return f'{", ".join(sorted(parts))} ({sum(parts.values())})'


def listed(names):
    """The first three of some names, and how many there are."""
    rest = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return (', '.join(names[:3]) or 'nothing') + rest


def say(line):
    """A line on stderr, from the first process alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------
# init_skip


def is_skipped(name, skip):
    """Is one of the regexes of `skip` found in a name?"""
    return any(re.search(regex, name) for regex in skip)


def check_skip(skip, names):
    """Raises ValueError for a regex of init_skip that is found in none of the model's names."""
    for regex in skip:
        if not any(re.search(regex, name) for name in names):
            raise ValueError(f'init_skip: {regex!r} is found in no name of a parameter '
                             '(--parameters lists them)')


# ------------------------------------------------------------------------------------------------
# weights that no model should use


def is_finite(tensor):
    """Is no number of a tensor NaN or infinite? One pass, a tenth of a second for 1 GB."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # a NaN is both the least and the largest
    least, largest = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(least) and torch.isfinite(largest))


def check_finite(tensors, where):
    """Raises ValueError, with its name, for one of (name, tensor) pairs that holds NaN or
    infinity."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise ValueError(f'{where}: {name} holds NaN or infinity: take an earlier checkpoint, '
                             'or fetch the file again')


def check_sums(folder):
    """Raises ValueError where a file of a checkpoint of ours is not what was written, the
    optimizer's state aside, which only a run that goes on reads."""
    # averages are among the files of their checkpoint
    if os.path.basename(os.path.abspath(folder)) == 'ema':
        folder = os.path.dirname(os.path.abspath(folder))

    # whoever copied the weights out of a checkpoint has no sums
    is_there = os.path.exists(os.path.join(folder, 'progress.json'))
    if not is_there and not is_name(os.path.basename(os.path.realpath(folder))):
        return
    try:
        past.verify(folder, leave_out='state/')
    except FileNotFoundError:
        raise ValueError('progress.json is missing: this checkpoint is not whole') from None
