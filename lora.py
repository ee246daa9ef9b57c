"""Low-rank factors beside frozen matrices (LoRA, arXiv 2106.09685): `lora` trains them alone.

    python train.py config/mine.py --init_from=owner/name --lora='[["(q|v).weight", 8]]'

A linear layer W x becomes W x + alpha / rank * B A x. All that is not a factor is frozen, and no
checkpoint holds it: the weights that a run began with, its base, are found again where base.json
says, and known by their checksum. Embeddings and convolutions take no factors.

Axes: R rank, K numbers that go into a layer, N that come out of it.
"""
import math
import re
import zlib

import torch
import torch.nn.functional as F
from torch import nn

from keyed import Dropout
from model import DecoderBlock, ViTBlock

# how the names of factors end, here and in peft
ENDS = ('.lora_A', '.lora_B')


class Factored(nn.Linear):
    """A linear layer with factors lora_A (R, K) and lora_B (N, R) beside its matrix (N, K)."""

    def __init__(self, linear, rank, alpha, dropout, number):
        # its matrix is there: none is allocated
        super().__init__(linear.in_features, linear.out_features, False, device='meta')
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        # as nn.Linear begins, and peft
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = alpha / rank
        self.keys, self.dropout = None, None
        if dropout:
            self.dropout = Dropout(dropout, self.in_features, number).to(device)

    def forward(self, x):
        h = x
        if self.dropout is not None:
            h = self.dropout(x, self.keys)
        h = F.linear(h, self.lora_A) * self.scale
        return super().forward(x) + F.linear(h, self.lora_B)


# -----------------------------------------------------------------------------------------------
# which matrices


def check(settings):
    """Raises ValueError for settings that can not be, whatever the model is."""
    for rule in settings['lora']:
        try:
            regex, rank = rule
            re.compile(regex)
        except (TypeError, ValueError, re.error):
            raise ValueError(f'lora: {rule!r}: expected (regular expression, rank)') from None
        if type(rank) is not int or rank < 1:
            raise ValueError(f'lora: {regex!r}: rank {rank!r}: expected a whole number of at '
                             'least 1')
    if not settings['lora_alpha'] > 0:
        raise ValueError(f'lora_alpha={settings["lora_alpha"]}: expected a number above 0')
    if not 0 <= settings['lora_dropout'] < 1:
        raise ValueError(f'lora_dropout={settings["lora_dropout"]}: expected at least 0 and below '
                         '1')
    if not settings['init_from']:
        raise ValueError('lora: init_from is empty: what stands beside the factors is frozen, so '
                         'it must come from somewhere')
    for key in settings:
        if key.endswith('.hf') and settings[key]:
            raise ValueError(f'lora beside {key}={settings[key]!r}: a model of transformers takes '
                             'no factors here: open it as one of ours (python hub.py config)')


def ranks_of(model, rules):
    """{name of a linear layer: rank}: each takes the first rule whose regex is found in the name
    of its matrix. Raises ValueError."""
    ranks, unused = {}, [regex for regex, _ in rules]
    for name, module in model.named_modules():
        # a class that is made from it may use its matrix otherwise
        if type(module) is not nn.Linear:
            continue
        for regex, rank in rules:
            if not re.search(regex, f'{name}.weight'):
                continue
            if rank > min(module.weight.shape):
                raise ValueError(f'lora: {regex!r}: rank {rank} is larger than {name}.weight, '
                                 f'{tuple(module.weight.shape)}')
            ranks[name] = rank
            unused = [each for each in unused if each != regex]
            break
    if unused:
        raise ValueError(f'lora: {unused[0]!r} is found in the name of no matrix that an earlier '
                         'one left (--parameters lists them; embeddings and convolutions take no '
                         'factors)')
    return ranks


def check_groups(groups, factors):
    """Raises ValueError for a rule of `groups` that would train what is frozen."""
    for regex, options in groups:
        is_about_factors = any(re.search(regex, name) for name in factors)
        # the default's weight_decay of norms and biases says nothing of whether they are trained
        is_harmless = options.get('freeze') or [*options] == ['weight_decay']
        if not is_about_factors and not is_harmless:
            raise ValueError(f'groups: rule {regex!r}: {options} is about no factor of lora, and '
                             'all that is no factor is frozen: leave the rule out, or lora')


# -----------------------------------------------------------------------------------------------
# training


def add(model, settings):
    """Freeze a model, and put factors beside its matrices: a line that tells. Raises
    ValueError."""
    ranks, dropout = ranks_of(model, settings['lora']), settings['lora_dropout']
    model.requires_grad_(False)
    for number, (name, rank) in enumerate(ranks.items()):
        where, _, last = name.rpartition('.')
        # no number is that of another dropout of the same tokens
        layer = Factored(model.get_submodule(name), rank, settings['lora_alpha'], dropout,
                         1 << 20 | number)
        setattr(model.get_submodule(where), last, layer)
    if dropout:
        hand_on_keys(model)

    factors = factors_of(model)
    check_groups(settings['groups'], factors)
    trained = sum(factor.numel() for factor in factors.values())
    frozen = sum(p.numel() for p in model.parameters()) - trained
    return (f'lora: factors beside {len(ranks)} matrices, {trained / 1e6:.2f} M parameters; the '
            f'other {frozen / 1e6:.2f} M are frozen')


def hand_on_keys(model):
    """Let the blocks give the keys of their tokens, by which is dropped, to the factors in them.
    Raises ValueError."""
    def give(block, args):
        for module in block.modules():
            if isinstance(module, Factored):
                module.keys = args[-1]

    # before each call, also one that computes again: what is compiled stays as it is
    reached = set()
    for block in model.modules():
        if isinstance(block, DecoderBlock | ViTBlock):
            block.register_forward_pre_hook(give)
            reached |= set(block.modules())
    for name, module in model.named_modules():
        if isinstance(module, Factored) and module not in reached:
            raise ValueError(f'lora_dropout: {name} is in no block of a decoder or a vision tower,'
                             ' where tokens have keys: leave it out of lora, or lora_dropout=0')


def factors_of(model):
    """{name: tensor}: what a checkpoint holds of a model with factors."""
    tensors = model.state_dict()
    return {name: tensors[name] for name in tensors if name.endswith(ENDS)}


# -----------------------------------------------------------------------------------------------
# the base


def sum_of(model):
    """A checksum of a model's weights before factors are added: their names and their bits."""
    crc, tensors = 0, model.state_dict()
    for name in sorted(tensors):
        bits = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
        crc = zlib.crc32(bits.numpy(), zlib.crc32(name.encode(), crc))
    return crc


def check_base(model, base, path):
    """Raises ValueError where a model's weights are not those beside which the factors of the
    checkpoint `path` were trained. base: what its base.json says."""
    there = sum_of(model)
    if there != base['sum']:
        raise ValueError(f'lora: the factors of {path} were trained beside {base["folder"]!r} of '
                         f'checksum {base["sum"]}, these weights have {there}: give that base as '
                         'init_from')


def merge(model, factors, alpha):
    """Add the factors {name: tensor} to the matrices of a model without them."""
    tensors = model.state_dict()
    for name, a in factors.items():
        if not name.endswith('.lora_A'):
            continue
        layer = name.removesuffix('.lora_A')
        b = factors[f'{layer}.lora_B']
        # as many bits as a product of them has
        delta = b.double() @ a.double() * (alpha / len(a))
        weight = tensors[f'{layer}.weight']
        weight.copy_(weight.double() + delta)
