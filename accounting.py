"""Accounts of weights that are opened, others' and ours: every tensor of a file is loaded or
unused, every one of the model loaded or new, and one line says so. Weights that no model should
use, for they are not finite or not whole, are refused here; others are made to fit, and copied.

Axes: P patches, D width.
"""
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor

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


# ------------------------------------------------------------------------------------------------
# theirs to ours


def fitted(tensor, name, shape, where, account):
    """The tensor in the shape of ours of this name; what was done is said in the account. Raises
    ValueError if it has another shape."""
    # Pictures of another size have other patches.
    theirs = tuple(tensor.shape)
    if name.endswith('pos_embed') and theirs[-1] == shape[2]:
        tensor = resize_positions(tensor.view(1, -1, shape[2]), shape[1])
        if tensor.numel() != math.prod(theirs):
            account.fitted.append(f'{name} {theirs} made {shape}')

    # Rows for tokens that we added: what the model thinks of an average one.
    is_of_words = name.endswith(('embedding.weight', 'head.weight'))
    if is_of_words and theirs[1:] == shape[1:] and theirs[0] < shape[0]:
        average = tensor.float().mean(0, keepdim=True).to(tensor)
        tensor = torch.cat((tensor, average.expand(shape[0] - theirs[0], -1)))
        account.fitted.append(f'{name} {theirs} made {shape}, new rows are the mean of the old')

    if tuple(tensor.shape) != shape:
        raise ValueError(f'{where!r}: {name} is {theirs} there and {shape} here: change the '
                         'model\'s settings, or name it in init_skip')
    return tensor


def resize_positions(table, patches):
    """Position table (1, P, D) -> (1, patches, D), bicubic over the square (as transformers)."""
    if table.shape[1] == patches:
        return table
    theirs, ours = round(table.shape[1] ** 0.5), round(patches ** 0.5)
    if theirs * theirs != table.shape[1]:
        raise ValueError(f'a position table of {table.shape[1]} patches is no square')

    grid = table.float().unflatten(1, (theirs, theirs)).permute(0, 3, 1, 2)     # (1, D, a, a)
    grid = F.interpolate(grid, size=(ours, ours), mode='bicubic', align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)               # (1, P, D)


def copy_into(model, tensors):
    """Copy (name, tensor) pairs into a model, sharded or not, one at a time: the names."""
    ours = model.state_dict()
    loaded = []
    for name, tensor in tensors:
        target = ours[name]
        tensor = tensor.to(target.device, target.dtype)
        if isinstance(target, DTensor):
            # Every process reads all and keeps its part: nothing is sent.
            tensor = distribute_tensor(tensor, target.device_mesh, target.placements,
                                       src_data_rank=None)
        target.copy_(tensor)
        loaded.append(name)
    return loaded
