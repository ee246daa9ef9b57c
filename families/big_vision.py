"""Checkpoints of google-research/big_vision (.npz): PaliGemma 1 and 2, SigLIP towers, Gemma, as it
trained them. They are read, never written.

    python train.py config/pali.py --init_from=pt_224.npz --tokenizer=paligemma_tokenizer.model

Its arrays hold all layers of a tower at once, (layers, ...), or a layer each (encoderblock_0,
...); dense kernels are (in, out), heads have axes of their own.
Axes: D width, F mlp, N heads, K kv heads, H head dim.
"""
import math
import re
import zipfile

import numpy as np
import torch

from accounting import Account, copy_into, fitted, is_skipped

# ------------------------------------------------------------------------------------------------
# our name -> the array's, and how it becomes ours


def conv_kernel(x):
    """(h, w, 3, D) -> (D, 3, h, w)."""
    return x.transpose(3, 2, 0, 1)


def heads_in(x):
    """(D, N, H) -> (N H, D), as a linear layer has it."""
    return x.reshape(len(x), -1).T


def heads_out(x):
    """(N, H, D) -> (D, N H)."""
    return x.reshape(-1, x.shape[-1]).T


def einsum_heads(x):
    """(N, D, H) -> (N H, D)."""
    return x.transpose(0, 2, 1).reshape(-1, x.shape[1])


# Keys and values share an array, and so do the two inputs of the gated MLP.


def keys_of(x):
    """(2, K, D, H) -> (K H, D)."""
    return einsum_heads(x[0])


def values_of(x):
    """(2, K, D, H) -> (K H, D)."""
    return einsum_heads(x[1])


def gate_of(x):
    """(2, D, F) -> (F, D)."""
    return x[0].T


def up_of(x):
    """(2, D, F) -> (F, D)."""
    return x[1].T


TOP = {
    'vit.stem.weight': ('img/embedding/kernel', conv_kernel),
    'vit.stem.bias': ('img/embedding/bias', None),
    'vit.pos_embed': ('img/pos_embedding', None),
    'vit.norm.weight': ('img/Transformer/encoder_norm/scale', None),
    'vit.norm.bias': ('img/Transformer/encoder_norm/bias', None),
    'connector.weight': ('img/head/kernel', np.transpose),
    'connector.bias': ('img/head/bias', None),
    'decoder.embedding.weight': ('llm/embedder/input_embedding', None),
    'decoder.norm.weight': ('llm/final_norm/scale', None)}

# In a block of a tower.
ATTENTION = 'MultiHeadDotProductAttention_0'
VIT_BLOCK = {
    'norm1.weight': ('LayerNorm_0/scale', None),
    'norm1.bias': ('LayerNorm_0/bias', None),
    'q.weight': (f'{ATTENTION}/query/kernel', heads_in),
    'q.bias': (f'{ATTENTION}/query/bias', np.ravel),
    'k.weight': (f'{ATTENTION}/key/kernel', heads_in),
    'k.bias': (f'{ATTENTION}/key/bias', np.ravel),
    'v.weight': (f'{ATTENTION}/value/kernel', heads_in),
    'v.bias': (f'{ATTENTION}/value/bias', np.ravel),
    'o.weight': (f'{ATTENTION}/out/kernel', heads_out),
    'o.bias': (f'{ATTENTION}/out/bias', None),
    'norm2.weight': ('LayerNorm_1/scale', None),
    'norm2.bias': ('LayerNorm_1/bias', None),
    'fc1.weight': ('MlpBlock_0/Dense_0/kernel', np.transpose),
    'fc1.bias': ('MlpBlock_0/Dense_0/bias', None),
    'fc2.weight': ('MlpBlock_0/Dense_1/kernel', np.transpose),
    'fc2.bias': ('MlpBlock_0/Dense_1/bias', None)}

# In a block of a decoder. An RMSNorm's scale is stored less the 1 that it adds, as ours of a
# Gemma is.
DECODER_BLOCK = {
    'norm1.weight': ('pre_attention_norm/scale', None),
    'q.weight': ('attn/q_einsum/w', einsum_heads),
    'k.weight': ('attn/kv_einsum/w', keys_of),
    'v.weight': ('attn/kv_einsum/w', values_of),
    'o.weight': ('attn/attn_vec_einsum/w', heads_out),
    'post_norm1.weight': ('post_attention_norm/scale', None),
    'norm2.weight': ('pre_ffw_norm/scale', None),
    'gate.weight': ('mlp/gating_einsum', gate_of),
    'up.weight': ('mlp/gating_einsum', up_of),
    'down.weight': ('mlp/linear', np.transpose),
    'post_norm2.weight': ('post_ffw_norm/scale', None)}

# what the names of its arrays begin with -> the part of our model that they are
PARTS = {'img/': 'vit.', 'img/head/': 'connector.', 'llm/': 'decoder.'}

# ------------------------------------------------------------------------------------------------
# what every family offers


def knows(path):
    """Is this file mine?"""
    return path.endswith('.npz')


def settings(path):
    """Flat settings of train.py, as far as the shapes of the arrays tell them. Raises ValueError
    where there is neither tower nor decoder."""
    arrays, found = Arrays(path), {}
    has_vit = 'img/pos_embedding' in arrays.keys
    has_decoder = 'llm/final_norm/scale' in arrays.keys
    try:
        if has_vit:
            found |= vit_shape(arrays)
        if has_decoder:
            found |= decoder_shape(arrays)
    except (KeyError, ValueError) as error:
        raise ValueError(f'{path}: the shapes of a model can not be read from it ({error})'
                         ) from None

    # The file of PaliGemma's pieces lies beside the weights.
    said = dict(init_from=path, tokenizer='paligemma_tokenizer.model')
    if has_vit and has_decoder:
        return dict(task='vlm') | said | dict(pixel_shuffle=1, connector_bias=True) | found
    if has_decoder:
        return dict(task='llm') | said | found
    if has_vit:
        return dict(task='siglip', init_from=path) | found
    raise ValueError(f'{path!r} holds neither a vision tower nor a decoder of big_vision')


def vit_shape(arrays):
    """{'vit.width': ...}. Raises KeyError and ValueError."""
    size, _, _, width = arrays.shape('img/embedding/kernel')
    patches = arrays.shape('img/pos_embedding')[1]
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f'{patches} patches are no square')

    # All layers in an array, or each in arrays of its own.
    layers = {key.split('/')[2] for key in arrays.keys if key.startswith('img/Transformer/enc')}
    block = 'img/Transformer/encoderblock'
    depth = len(layers - {'encoder_norm'})
    if 'encoderblock' in layers:
        depth = arrays.shape(f'{block}/LayerNorm_0/scale')[0]
    else:
        block += '_0'
    return {
        'vit.image_size': side * size, 'vit.patch_size': size, 'vit.width': width,
        'vit.depth': depth, 'vit.mlp_dim': arrays.shape(f'{block}/MlpBlock_0/Dense_0/bias')[-1],
        'vit.num_heads': arrays.shape(f'{block}/{ATTENTION}/query/bias')[-2]}


def decoder_shape(arrays):
    """{'decoder.width': ...} of a Gemma 1 or 2. Raises KeyError and ValueError."""
    rows, width = arrays.shape('llm/embedder/input_embedding')
    depth, num_heads, _, head_dim = arrays.shape('llm/layers/attn/q_einsum/w')
    found = {
        # with room for the token of a picture, which the tokenizer adds
        'decoder.vocab_size': -(-(rows + 1) // 64) * 64,
        'decoder.width': width, 'decoder.depth': depth,
        'decoder.mlp_dim': arrays.shape('llm/layers/mlp/linear')[1],
        'decoder.num_heads': num_heads, 'decoder.head_dim': head_dim,
        'decoder.num_kv_heads': arrays.shape('llm/layers/attn/kv_einsum/w')[2]}
    if 'llm/layers/post_attention_norm/scale' not in arrays.keys:
        return found

    # What no array tells of a Gemma 2, and all sizes of it share, but for the scale of 27B.
    scalar = float(head_dim)
    if width == 4608:
        scalar = width / num_heads
    return found | {
        'decoder.post_norms': True, 'decoder.query_pre_attn_scalar': scalar,
        'decoder.attn_logits_softcap': 50.0, 'decoder.final_logits_softcap': 30.0,
        'decoder.sliding_window': 4096, 'decoder.global_every': 2}


def load(model, path, skip=()):
    """Copy what an .npz and our model share into the model: the Account. Raises ValueError."""
    ours, account = model.state_dict(), Account()

    def fitted_tensors():
        for name, tensor in tensors(model, path, skip, account):
            yield name, fitted(tensor, name, tuple(ours[name].shape), path, account)

    account.loaded = copy_into(model, fitted_tensors())
    return account


def open_model(path, dtype=torch.float32, image_size=0):
    """Refused: its files hold arrays alone."""
    raise ValueError(f'{path!r} holds weights of big_vision and no settings: give it as init_from '
                     'to the config of such a model, like config/pali.py')


def writes(run_settings, model):
    """Can `export` write a model of this kind?"""
    return False


def export(run, folder, dtype=torch.float32):
    """Refused."""
    raise ValueError('.npz files of big_vision are read here, not written')


# ------------------------------------------------------------------------------------------------
# reading


class Arrays:
    """The arrays of an .npz, one in memory at a time. Raises ValueError."""

    def __init__(self, path):
        try:
            self.file = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f'{path} can not be read ({error})') from None

        # Some of its checkpoints say params/ before each name, or twice.
        self.keys = {re.sub(r'^(params/)+', '', key): key for key in self.file.files}
        self.path = path
        self.last_name, self.last_array = '', None

    def shape(self, name):
        """Of an array, which is not read. Raises KeyError and ValueError."""
        with self.file.zip.open(self.keys[name] + '.npy') as file:
            read = np.lib.format.read_array_header_1_0
            if np.lib.format.read_magic(file) != (1, 0):
                read = np.lib.format.read_array_header_2_0
            return read(file)[0]

    def __getitem__(self, name):
        if name != self.last_name:
            try:
                array = self.file[self.keys[name]]
            except Exception as error:
                # zipfile, zlib and numpy have errors of their own.
                raise ValueError(f'{self.path}: {name} can not be read ({error})') from None
            if array.dtype.itemsize < 2 or array.dtype.kind in 'iub':
                raise ValueError(f'{self.path}: {name} is {array.dtype}: quantised weights are '
                                 'not read')
            if not np.isfinite([array.min(), array.max()]).all():
                raise ValueError(f'{self.path}: {name} holds NaN or infinity')
            self.last_name, self.last_array = name, array
        return self.last_array


def array_of(name, keys):
    """Of which array one of our parameters is made: (its name, the layer of it or None, how it
    becomes ours)."""
    # What is in no layer.
    match = re.fullmatch(r'(vit|decoder)\.blocks\.(\d+)\.(.+)', name)
    if not match:
        key, change = TOP.get(name, (name, None))
        return key, None, change

    # A decoder has all layers in one array.
    part, layer, rest = match[1], int(match[2]), match[3]
    if part == 'decoder':
        key, change = DECODER_BLOCK.get(rest, (rest, None))
        return f'llm/layers/{key}', layer, change

    # A vision tower has a layer an array, or all of them in one.
    key, change = VIT_BLOCK.get(rest, (rest, None))
    alone = f'img/Transformer/encoderblock_{layer}/{key}'
    if alone in keys:
        return alone, None, change
    return f'img/Transformer/encoderblock/{key}', layer, change


def tensors(model, path, skip, account):
    """Yield (our name, tensor) of all parameters of a VLM, or of its .vit alone, that an .npz has,
    array by array, but for names in which a regex of `skip` is found. Raises ValueError where a
    part is not whole, or has what is not known here."""
    arrays = Arrays(path)

    # A tower alone has no text, a language model no pictures.
    there = set()
    for start, part in PARTS.items():
        if any(key.startswith(start) for key in arrays.keys):
            there.add(part)

    # All are looked up before the first is copied.
    rows = []
    for name in model.state_dict():
        if not name.startswith(tuple(there)) or is_skipped(name, skip):
            continue
        key, layer, change = array_of(name, arrays.keys)
        if key not in arrays.keys:
            raise ValueError(f'{path} has no {key}, of which {name} would be made')
        rows.append((key, name, layer, change))
    if not rows:
        raise ValueError(f'{path} holds nothing that this model has')
    count_unused(model, arrays, {row[0] for row in rows}, account)

    # What shares an array comes one after the other, so that each is read once.
    for key, name, layer, change in sorted(rows, key=lambda row: row[0]):
        array = arrays[key]
        if layer is not None:
            check_depth(model, name, key, len(array), path)
            array = array[layer]
        if change:
            array = change(array)
        yield name, torch.from_numpy(np.ascontiguousarray(array, np.float32))


def count_unused(model, arrays, used, account):
    """Account for the arrays that nothing of our model is made of: other parts, and what stands
    after a feature_layer. Raises ValueError for a layer that is none of the model's."""
    for key in arrays.keys.keys() - used:
        if match := re.match(r'img/Transformer/encoderblock_(\d+)/', key):
            check_depth(model, 'vit', key, int(match[1]) + 1, arrays.path)
        account.unused[key.partition('/')[0]] += 1


def check_depth(model, name, key, layers, path):
    """Raises ValueError where an array is of more layers than the part of our model."""
    part = name.partition('.')[0]
    depth = getattr(getattr(model.config, part, None), 'depth', layers)
    if layers > depth:
        raise ValueError(f'{path}: {key} is of {layers} layers, {part}.depth={depth} here')
