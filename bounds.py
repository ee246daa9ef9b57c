"""A model that is built of a stranger's config.json is no larger than the weights beside it.

hub.py builds models inside `no_more_than`.
"""
import os

from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

# what a model may have beside its weights: tables, masks
NUMBERS, TENSORS = 1 << 26, 1000
MAKERS = ('empty', 'zeros', 'ones', 'full', 'arange')


class Counted(TorchFunctionMode):
    """Counts tensors that are made, and the numbers in them. Raises ValueError past the most."""

    def __init__(self, numbers, tensors):
        super().__init__()
        self.numbers, self.tensors = numbers, tensors

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        # nothing is written to it yet, so that it takes no memory
        if getattr(function, '__name__', '') in MAKERS:
            self.numbers -= made.numel()
            self.tensors -= 1
        if self.numbers < 0 or self.tensors < 0:
            raise ValueError('its config.json asks for a model that is larger than the weights '
                             'beside it, so it is of another one')
        return made


def no_more_than(folder):
    """A context in which models are built, for what the weights in a folder hold. Raises
    ValueError."""
    numbers, tensors = 0, 0
    for root, _, files in os.walk(folder):
        for path in (os.path.join(root, name) for name in files if name.endswith('.safetensors')):
            # a number takes a byte or more
            numbers += os.path.getsize(path)
            try:
                with safe_open(path, framework='pt') as file:
                    tensors += len(file.keys())
            except (OSError, SafetensorError) as error:
                raise ValueError(f'{path} can not be read ({error})') from None

    # a file of big_vision's says nothing of its own size
    if not tensors:
        return Counted(float('inf'), float('inf'))
    # some are tied, some are made twice on the way
    return Counted(2 * numbers + NUMBERS, 8 * tensors + TENSORS)
