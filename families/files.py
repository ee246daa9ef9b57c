"""Files of other people's weights, whatever family they are of: fetched, opened, written.

Nothing that comes with a model is run or unpickled: .safetensors and .json alone are read here.
"""
import math
import os
import re
from collections import Counter

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import accounting
from checkpoint import write_json
from tokenizer import read_json

REPOSITORY = r'[\w.-]+/[\w.-]+'

# What a model is made from. Pickles and code that lie beside it are never fetched.
WANTED = ['*.json', '*.safetensors', '*.model', '*.jinja', '*.tiktoken']
PICKLES = ('.bin', '.pt', '.pth', '.gguf')

# Endings of what stands beside quantised weights: bitsandbytes (8 and 4 bits), GPTQ and AWQ, fp8,
# compressed-tensors.
QUANTISED = re.compile(
    r'\.(?:SCB|weight_format|absmax|quant_map|nested_\w+|quant_state\.\w+|qweight|qzeros|g_idx'
    r'|(?:weight|input)_scale(?:_inv)?|weight_packed|weight_shape|weight_zero_point)$'
    r'|\.weight\.(?:absmax|quant_map|nested_\w+|quant_state\.[\w.]+)$')
DEQUANTISE = ('quantised weights are not read: open it in transformers, call model.dequantize(), '
              'save that, or take the repository before it was quantised')


def fetch(name, revision=None, key=''):
    """The folder of a model: `name` itself, or a repository's copy in huggingface_hub's cache.
    Raises ValueError, which says of which setting, `key`, that is."""
    if os.path.isdir(name) or name.endswith('.npz'):
        return name
    if not re.fullmatch(REPOSITORY, name):
        raise ValueError(f'{name!r} is neither a folder nor a repository (owner/name)')

    import huggingface_hub
    try:
        return huggingface_hub.snapshot_download(
            name, revision=revision, ignore_patterns=['*/*'], allow_patterns=WANTED)
    except Exception as error:
        # Of several libraries: no such repository, no licence accepted, no network.
        reason = ' '.join(str(error).split())[:300]
        said = f'{key}={name!r}' if key else repr(name)
        raise ValueError(f'{said} is no folder here, and could not be fetched from Hugging '
                         f'Face: {reason}') from None


# ------------------------------------------------------------------------------------------------
# reading


def files_of(folder, stem='model'):
    """{name of a tensor there: its .safetensors file}; stem: how the files' names begin. fp16 only
    where there is nothing else. Raises ValueError, for what is no model by itself, too."""
    refuse_adapter(folder)
    for variant in ('', '.fp16'):
        # Large models are cut into several files, which an index lists.
        index = os.path.join(folder, f'{stem}.safetensors.index{variant}.json')
        single = os.path.join(folder, f'{stem}{variant}.safetensors')
        is_cut, is_single = os.path.exists(index), os.path.exists(single)
        if is_cut and is_single:
            raise ValueError(f'{folder!r} has both {os.path.basename(single)} and '
                             f'{os.path.basename(index)}: remove the one that is old')
        if is_cut:
            return refuse_quantised(files_of_index(index), folder)
        if is_single:
            with opened(single) as file:
                return refuse_quantised(dict.fromkeys(file.keys(), single), folder)

    pickles = sorted(name for name in os.listdir(folder) if name.endswith(PICKLES))
    if pickles:
        raise ValueError(f'{folder!r} has no {stem}.safetensors ({", ".join(pickles)} can not be '
                         'read: pickles run code; save it with safe_serialization=True)')
    raise ValueError(f'{folder!r} has no {stem}.safetensors')


def files_of_index(index):
    """{name of a tensor: its file} of a .safetensors.index.json. Raises ValueError."""
    files = read_json(index).get('weight_map')

    # A file's name must not lead out of the folder.
    if not isinstance(files, dict) or not all(map(is_safetensors, files.values())):
        raise ValueError(f'{index}: weight_map does not name .safetensors files beside it')

    # What the index does not list would be lost in silence.
    folder = os.path.dirname(index)
    for name in sorted(set(files.values())):
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            raise ValueError(f'{path} can not be read: {os.path.basename(index)} names it, and it '
                             'is not there')
        listed = {tensor for tensor, file in files.items() if file == name}
        with opened(path) as file:
            there = set(file.keys())
        if there != listed:
            raise ValueError(f'{path} and {os.path.basename(index)} do not name the same tensors: '
                             f'{accounting.listed(sorted(there ^ listed))}')
    return {name: os.path.join(folder, file) for name, file in files.items()}


def beside(folder, used):
    """Counter {file: tensors} of .safetensors files of a folder that are not among the `used`."""
    found = Counter()
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        # the same in fp16 is no other
        if is_safetensors(name) and path not in used and '.fp16' not in name:
            with opened(path) as file:
                found[name] = len(file.keys())
    return found


def refuse_adapter(folder):
    """Raises ValueError for the folder of an adapter of peft, which is no model by itself."""
    path = os.path.join(folder, 'adapter_config.json')
    if os.path.exists(path):
        base = read_json(path).get('base_model_name_or_path')
        raise ValueError(f'{folder!r} is an adapter of {base!r} (adapter_config.json), no whole '
                         'model: in peft, call merge_and_unload(), then save_pretrained()')


def refuse_settings(theirs):
    """Raises ValueError where a config.json, of a model or of a part, is of quantised weights."""
    for part in (theirs, theirs.get('text_config'), theirs.get('vision_config')):
        if isinstance(part, dict) and part.get('quantization_config'):
            raise ValueError(f'quantization_config={part["quantization_config"]!r}: {DEQUANTISE}')


def refuse_quantised(tensor_files, folder):
    """The {name: file} of a model, if none of the names is one of quantised weights. Raises
    ValueError."""
    found = [name for name in sorted(tensor_files) if QUANTISED.search(name)]
    if found:
        raise ValueError(f'{folder!r} has {accounting.listed(found)}: {DEQUANTISE}')
    return tensor_files


def is_safetensors(name):
    """Is it the name of a .safetensors file, without a folder?"""
    return isinstance(name, str) and re.fullmatch(r'[\w.-]+\.safetensors', name) is not None


def opened(path):
    """safe_open. Raises ValueError where the file is missing, cut or no .safetensors."""
    try:
        return safe_open(path, framework='pt')
    except (OSError, SafetensorError) as error:
        raise ValueError(f'{path} can not be read ({error})') from None


def tensor_of(file, name, path):
    """A tensor of an opened file. Raises ValueError, with its path and name, for one that can not
    be read, is quantised or is not finite."""
    try:
        tensor = file.get_tensor(name)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f'{path}: {name} can not be read ({error})') from None

    # float8 has a scale somewhere
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise ValueError(f'{path}: {name} is {str(tensor.dtype).removeprefix("torch.")}: '
                         f'{DEQUANTISE}')
    accounting.check_finite([(name, tensor)], path)
    return tensor


# ------------------------------------------------------------------------------------------------
# theirs to ours


def dtype_of(folder):
    """The name of the dtype of most of the weights of a folder. Raises ValueError."""
    sizes = Counter()
    for name, path in files_of(folder).items():
        with opened(path) as file:
            tensor = file.get_slice(name)
            sizes[tensor.get_dtype()] += math.prod(tensor.get_shape())
    names = dict(BF16='bfloat16', F16='float16')
    return names.get(sizes.most_common(1)[0][0], 'float32')


def layer_of(key):
    """vit.encoder.layers.3. of vit.encoder.layers.3.mlp.fc1.weight; '' of what is in no layer."""
    match = re.match(r'\w+\.(?:encoder\.)?layers\.\d+\.', key)
    return match[0] if match else ''


# ------------------------------------------------------------------------------------------------
# writing


def remove(path):
    """A file, if it is there."""
    if os.path.exists(path):
        os.remove(path)


def write_tensors(tensors, folder, stem='model', max_shard_size='5GB'):
    """{name: tensor} as .safetensors files, with an index where there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards
    os.makedirs(folder, exist_ok=True)
    plan = split_torch_state_dict_into_shards(
        tensors, max_shard_size=max_shard_size, filename_pattern=stem + '{suffix}.safetensors')

    for file, names in plan.filename_to_tensors.items():
        shard = {name: tensors[name] for name in names}
        try:
            save_file(shard, os.path.join(folder, file), {'format': 'pt'})
        except SafetensorError as error:
            raise OSError(f'{os.path.join(folder, file)} can not be written: {error}') from None

    if plan.is_sharded:
        write_json(os.path.join(folder, f'{stem}.safetensors.index.json'),
                   dict(metadata=plan.metadata, weight_map=plan.tensor_to_filename))
