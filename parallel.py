"""Ranks: the processes that torchrun starts, what they tell each other, a model on all of them.

One process is a world of one: everything here works there, too.
"""
import contextlib
import math
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
master = rank == 0


def begin(device):
    """The device of this rank ('auto': a GPU, if there is one), and the process group."""
    if device == 'auto':
        device = 'cpu'
        if torch.cuda.is_available():
            device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    if 'WORLD_SIZE' not in os.environ:
        return device
    backend = 'gloo'
    if device != 'cpu' and torch.cuda.is_available():
        torch.cuda.set_device(device)
        backend = 'cpu:gloo,cuda:nccl'

    # after a restart torchrun may give the same store, which still knows the addresses of the dead
    store = next(dist.rendezvous('env://'))[0]
    store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return device


def check(settings, world=1):
    """Raises ValueError for a device that is not there."""
    kind, _, number = settings['device'].partition(':')
    if kind not in ('auto', 'cpu', 'cuda') or not (number or '0').isdigit():
        raise ValueError(f'device={settings["device"]!r}: expected auto, cpu, cuda or cuda:NUMBER')
    if kind == 'cuda' and not 0 <= int(number or 0) < torch.cuda.device_count():
        raise ValueError(f'device={settings["device"]!r}: torch sees {torch.cuda.device_count()} '
                         'GPUs here: give --device=cpu, or the number of one of them from 0')


def leave(code):
    """Exit; a rank must not wait for the others to say goodbye."""
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


def end():
    """Say goodbye to the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def say(message):
    """Print, on one rank."""
    if master:
        print(message, flush=True)


def barrier():
    if world > 1:
        dist.barrier()


def all_ranks(*values):
    """Every rank's values, in fp64: (ranks, values)."""
    table = torch.zeros(world, len(values), dtype=torch.float64)    # on the CPU: no GPU need wait
    table[rank] = torch.tensor(values, dtype=torch.float64)
    if world > 1:
        dist.all_reduce(table)
    return table


def from_master(value):
    """What the first rank has, on every rank."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box, device=torch.device('cpu'))
    return box[0]


# -----------------------------------------------------------------------------------------------
# a model on all ranks: DDP, or FSDP2 layer by layer


def layers_of(model):
    """The modules that are sharded and compiled each by itself: those that say `is_block`."""
    return [module for module in model.modules() if getattr(module, 'is_block', False)]


def compile_layers(model):
    """torch.compile layer by layer: one graph for all of them, whatever their number."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    for layer in layers_of(model):
        layer.forward = torch.compile(layer.forward)


def spread(model, fsdp, device):
    """The model as it is to be called. fsdp: ranks that share one copy of it; 1 is DDP, 0 all."""
    # torchrun may start a world of one: --fsdp=0 shards there, too, so that one GPU can try it
    is_sharded = fsdp != 1 and dist.is_initialized()
    if not is_sharded:
        # convolutions are fastest with channels last, which FSDP can not shard
        model.to(memory_format=getattr(model, 'memory_format', torch.preserve_format))
    if world == 1 and not is_sharded:
        return model
    if fsdp == 1:
        index = None if device == 'cpu' else [torch.device(device).index]
        return DistributedDataParallel(model, device_ids=index)

    shape, names = (world,), ('shard',)
    if fsdp not in (0, world):
        shape, names = (world // fsdp, fsdp), ('replicate', 'shard')
    mesh = init_device_mesh(torch.device(device).type, shape, mesh_dim_names=names)
    for module in (*layers_of(model), model):
        fully_shard(module, mesh=mesh)      # gathered in fp32, so that DDP computes the same
    return model


def synchronize(model, is_last):
    """Gradients travel in the backward pass of a step's last micro-batch alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    elif world > 1:
        model.require_backward_grad_sync = is_last


def clip_gradients(parameters, most):
    """The norm of all gradients, which are made smaller where it is above `most` (0: never)."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, most or math.inf)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.item()


def sharded_modules(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def swap(weights, averages, model):
    """Weights and their averages, {name: tensor}, change places."""
    with torch.no_grad():
        for name, average in averages.items():
            kept = weights[name].clone()
            weights[name].copy_(average)
            average.copy_(kept)
    for module in sharded_modules(model):
        module.reshard()            # what it gathered before is of the other weights


@contextlib.contextmanager
def gathered(model):
    """Every rank holds the whole model meanwhile: what runs inside may differ between them."""
    modules = sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in modules:
        module.reshard()
        module.set_reshard_after_forward(module is not model, recurse=False)
