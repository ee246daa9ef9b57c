"""Checkpoints of google-research/big_vision (.npz): PaliGemma 1 and 2, SigLIP towers, Gemma, as it trained them.

    python train.py config/pali.py --init_from=pt_224.npz --tokenizer=paligemma_tokenizer.model --processor=paligemma

Its arrays hold all layers of a tower at once, (layers, ...), or a layer each (encoderblock_0, ...); dense kernels are
(in, out), heads have axes of their own. Axes: L layers, D width, F mlp, N heads, K kv heads, H head dim.
"""
import re
import zipfile

import numpy as np
import torch

ATTN = 'MultiHeadDotProductAttention_0'
# our name -> the array's, and how it becomes ours
TOP = {
    'vit.stem.weight': ('img/embedding/kernel', lambda x: x.transpose(3, 2, 0, 1)),     # (h, w, 3, D) -> (D, 3, h, w)
    'vit.stem.bias': ('img/embedding/bias', None),
    'vit.pos_embed': ('img/pos_embedding', None),
    'vit.norm.weight': ('img/Transformer/encoder_norm/scale', None),
    'vit.norm.bias': ('img/Transformer/encoder_norm/bias', None),
    'connector.weight': ('img/head/kernel', np.transpose),
    'connector.bias': ('img/head/bias', None),
    'decoder.embedding.weight': ('llm/embedder/input_embedding', None),
    'decoder.norm.weight': ('llm/final_norm/scale', None)}
VIT_BLOCK = {
    **{f'norm{i + 1}.{ours}': (f'LayerNorm_{i}/{theirs}', None)
       for i in (0, 1) for ours, theirs in (('weight', 'scale'), ('bias', 'bias'))},
    **{f'{q}.weight': (f'{ATTN}/{name}/kernel', lambda x: x.reshape(len(x), -1).T)      # (D, N, H)
       for q, name in (('q', 'query'), ('k', 'key'), ('v', 'value'))},
    **{f'{q}.bias': (f'{ATTN}/{name}/bias', np.ravel) for q, name in (('q', 'query'), ('k', 'key'), ('v', 'value'))},
    'o.weight': (f'{ATTN}/out/kernel', lambda x: x.reshape(-1, x.shape[-1]).T),         # (N, H, D)
    'o.bias': (f'{ATTN}/out/bias', None),
    **{f'fc{i + 1}.weight': (f'MlpBlock_0/Dense_{i}/kernel', np.transpose) for i in (0, 1)},
    **{f'fc{i + 1}.bias': (f'MlpBlock_0/Dense_{i}/bias', None) for i in (0, 1)}}


def heads(x):
    """(N, D, H) -> (N H, D)."""
    return x.transpose(0, 2, 1).reshape(-1, x.shape[1])


DECODER_BLOCK = {
    'q.weight': ('attn/q_einsum/w', heads), 'k.weight': ('attn/kv_einsum/w', lambda x: heads(x[0])),    # (2, K, D, H)
    'v.weight': ('attn/kv_einsum/w', lambda x: heads(x[1])),
    'o.weight': ('attn/attn_vec_einsum/w', lambda x: x.reshape(-1, x.shape[-1]).T),     # (N, H, D)
    'gate.weight': ('mlp/gating_einsum', lambda x: x[0].T), 'up.weight': ('mlp/gating_einsum', lambda x: x[1].T),
    'down.weight': ('mlp/linear', np.transpose),
    'norm1.weight': ('pre_attention_norm/scale', None), 'norm2.weight': ('pre_ffw_norm/scale', None),
    'post_norm1.weight': ('post_attention_norm/scale', None), 'post_norm2.weight': ('post_ffw_norm/scale', None)}


class Arrays:
    """The arrays of an .npz, one in memory at a time. Raises ValueError."""

    def __init__(self, path):
        try:
            self.file = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f'{path} can not be read ({error})') from None
        self.keys = {re.sub(r'^(params/)+', '', key): key for key in self.file.files}
        self.path, self.last = path, ('', None)

    def __getitem__(self, name):
        if name != self.last[0]:
            try:
                self.last = name, self.file[self.keys[name]]
            except Exception as error:      # zipfile, zlib and numpy have errors of their own
                raise ValueError(f'{self.path}: {name} can not be read ({error})') from None
        return self.last[1]


def tensors(model, path):
    """Yield (our name, tensor) of all parameters of a VLM, or of its .vit alone, that an .npz has, array by array.
    Raises ValueError where a part is not whole."""
    arrays, found = Arrays(path), []
    parts = [part for part, start in (('vit.', 'img/'), ('connector.', 'img/head/'), ('decoder.', 'llm/'))
             if any(key.startswith(start) for key in arrays.keys)]
    for name in model.state_dict():
        if not name.startswith(tuple(parts)):
            continue
        layer = None
        if match := re.fullmatch(r'(vit|decoder)\.blocks\.(\d+)\.(.+)', name):
            part, layer, rest = match[1], int(match[2]), match[3]
            key, change = (VIT_BLOCK if part == 'vit' else DECODER_BLOCK).get(rest, (rest, None))
            alone = f'img/Transformer/encoderblock_{layer}/{key}'
            if part == 'vit' and alone in arrays.keys:
                key, layer = alone, None
            else:
                key = ('img/Transformer/encoderblock/' if part == 'vit' else 'llm/layers/') + key
        else:
            key, change = TOP.get(name, (name, None))
        if key not in arrays.keys:
            raise ValueError(f'{path} has no {key}, of which {name} would be made')
        found.append((key, name, change, layer))
    if not found:
        raise ValueError(f'{path} holds nothing that this model has')
    for key, name, change, layer in sorted(found, key=lambda row: row[0]):
        array = arrays[key] if layer is None else arrays[key][layer]
        array = change(array) if change else array
        yield name, torch.from_numpy(np.ascontiguousarray(array, np.float32))
