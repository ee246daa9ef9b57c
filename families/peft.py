"""Folders of adapters, as peft writes and reads them: the factors of LoRA beside a language model.

    python hub.py adapter out/run folder        (of a run with `lora`)

`init_from=folder` begins with base and factors as one; with `lora`, the factors begin there and
are trained on. What is no plain LoRA of matrices is refused by name.
"""
import os

import torch

import lora
from checkpoint import write_json
from families import files, huggingface
from model import Decoder
from tokenizer import read_json

CONFIG, WEIGHTS, PREFIX = 'adapter_config.json', 'adapter_model.safetensors', 'base_model.model.'
# what they may say, and still be W x + alpha / rank * B A x
PLAIN = {'peft_type': ('LORA',), 'bias': ('none',), 'use_rslora': (False,), 'use_dora': (False,),
         'fan_in_fan_out': (False,), 'modules_to_save': (None, []), 'alpha_pattern': ({},),
         'lora_bias': (False,), 'trainable_token_indices': (None, [], {}),
         'target_parameters': (None, [])}


def knows(path):
    """Is this the folder of an adapter, and of no whole model?"""
    is_adapter = os.path.isfile(os.path.join(path, CONFIG))
    return is_adapter and not os.path.isfile(os.path.join(path, 'config.json'))


def base_of(path):
    """The folder or repository's name of the model that an adapter stands beside. Raises
    ValueError."""
    config = read_json(os.path.join(path, CONFIG))
    base = config.get('base_model_name_or_path')
    for key, allowed in PLAIN.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f'{path!r}, an adapter of {base!r}, has {key}={config[key]!r}, which '
                             'is no plain LoRA: in peft, call merge_and_unload(), then '
                             'save_pretrained()')
    if not isinstance(base, str) or not base:
        raise ValueError(f'{path!r} names no base_model_name_or_path in adapter_config.json')
    return base


def their_layers(model):
    """{our linear layer: its name there}. Raises ValueError."""
    if not isinstance(model, Decoder):
        raise ValueError(f'adapters of peft are read and written for language models alone, not '
                         f'for a {type(model).__name__}: python hub.py export merges them')
    names = {}
    for key, ours in huggingface.our_names(model).items():
        their = huggingface.written_name(key, 'decoder')
        names[ours.removesuffix('.weight')] = their.removesuffix('.weight')
    return names


def read(model, path):
    """({our name: factor}, alpha) of an adapter for a model. Raises ValueError."""
    ours = {}
    for layer, their in their_layers(model).items():
        for end in lora.ENDS:
            ours[f'{PREFIX}{their}{end}.weight'] = layer + end
    file_path, factors = os.path.join(path, WEIGHTS), {}
    if not os.path.isfile(file_path):
        raise ValueError(f'{path!r} has no {WEIGHTS}')
    with files.opened(file_path) as file:
        for name in file.keys():
            if name not in ours:
                raise ValueError(f'{path!r} has {name}, which this model has no place for')
            factors[ours[name]] = files.tensor_of(file, name, file_path).float()
    return factors, float(read_json(os.path.join(path, CONFIG))['lora_alpha'])


# ------------------------------------------------------------------------------------------------
# what every family offers


def settings(path):
    """Settings of a run that begins with base and factors as one. Raises ValueError."""
    return huggingface.settings(files.fetch(base_of(path))) | dict(init_from=path)


def load(model, path, skip=()):
    """Base and factors as one into our model: the Account. Raises ValueError."""
    account = huggingface.load(model, files.fetch(base_of(path)), skip)
    lora.merge(model, *read(model, path))
    return account


def open_model(path, dtype=torch.float32, image_size=0):
    """Our model of base and factors as one. Raises ValueError."""
    model = huggingface.open_model(files.fetch(base_of(path)), torch.float32, image_size)
    lora.merge(model, *read(model, path))
    return model.to(dtype)


def writes(run_settings, model):
    """A run is exported whole, by the family of its base."""
    return False


# ------------------------------------------------------------------------------------------------
# adapters alone


def begin(model, path, factors, alpha):
    """Fill the factors of our model with those that `read` gave of the adapter `path`; alpha: that
    of our run, and of the adapter. Raises ValueError."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()}
              for each in (lora.factors_of(model), factors)]
    if shapes[0] != shapes[1]:
        name = min(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise ValueError(f'lora: {name} is {shapes[0].get(name, "not there")} here and '
                         f'{shapes[1].get(name, "not there")} in {path!r}: give lora the matrices '
                         'and ranks of its adapter_config.json')
    if alpha[0] != alpha[1]:
        raise ValueError(f'lora_alpha={alpha[0]}, but {path!r} has lora_alpha={alpha[1]}')
    for name, factor in lora.factors_of(model).items():
        factor.copy_(factors[name])


def write(run, factors, base, folder):
    """The factors {our name: tensor} of a run, as an adapter's folder. base: of its base.json.
    Raises ValueError."""
    out, ranks, theirs = {}, {}, their_layers(run.model)
    for name, factor in factors.items():
        layer, _, end = name.rpartition('.')
        their = theirs[layer]
        out[f'{PREFIX}{their}.{end}.weight'] = factor
        if end == 'lora_A':
            ranks[their] = len(factor)

    # peft takes one rank for all layers, and the others by name
    rank = min(ranks.values())
    config = dict(
        peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base['folder'], r=rank,
        lora_alpha=run.settings['lora_alpha'], lora_dropout=run.settings['lora_dropout'],
        bias='none', target_modules=sorted(ranks), inference_mode=True,
        rank_pattern={name: each for name, each in ranks.items() if each != rank})
    files.write_tensors(out, folder, 'adapter_model')
    write_json(os.path.join(folder, CONFIG), config)
