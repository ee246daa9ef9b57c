"""Other projects' models, in and out: Hugging Face folders and repositories of Gemma 1, 2 and 3, Llama, SmolLM2, Qwen2
and 3, SigLIP 1 and 2 (fixed resolution), PaliGemma 1 and 2, Idefics3 and SmolVLM (one picture at a time).

    model = hub.from_pretrained('google/paligemma-3b-pt-224')       a repository, a folder, or a run of ours
    python hub.py config google/gemma-2b > config/mine.py           its settings, as a config file
    python hub.py export out/run folder [--dtype=bfloat16]          a run as a folder that transformers loads
    python hub.py push out/run name/repository                      the same to the Hub, with a model card

Whatever names another project's tensors or settings is here, as data: the tables are read in both directions. Nothing
that comes with a model is run or unpickled: .safetensors and .json (and big_vision's .npz) alone are read.
"""
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

import big_vision
import checkpoint
import shards
import tokenizer as tokenizers
from model import VLM, Decoder, DecoderConfig, ViT, ViTConfig, VLMConfig
from tokenizer import read_json

# ----------------------------------------------------------------------------------------------------------------------
# names: ours -> theirs. Llama's names are those of all decoders; Gemma 2 and 3 name one norm otherwise.

DECODER = {'embedding': 'embed_tokens', 'norm': 'norm'}
DECODER_BLOCK = {
    'norm1': 'input_layernorm', 'norm2': 'post_attention_layernorm', 'q': 'self_attn.q_proj', 'k': 'self_attn.k_proj',
    'v': 'self_attn.v_proj', 'o': 'self_attn.o_proj', 'q_norm': 'self_attn.q_norm', 'k_norm': 'self_attn.k_norm',
    'gate': 'mlp.gate_proj', 'up': 'mlp.up_proj', 'down': 'mlp.down_proj'}
POST_NORMS = {'post_norm1': 'post_attention_layernorm', 'norm2': 'pre_feedforward_layernorm',
              'post_norm2': 'post_feedforward_layernorm'}
VIT = {'stem': 'embeddings.patch_embedding', 'pos_embed': 'embeddings.position_embedding', 'norm': 'post_layernorm'}
VIT_BLOCK = {'norm1': 'layer_norm1', 'norm2': 'layer_norm2', 'q': 'self_attn.q_proj', 'k': 'self_attn.k_proj',
             'v': 'self_attn.v_proj', 'o': 'self_attn.out_proj', 'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2'}

# what stands before the names of a part: all that releases of transformers have written -> one form
PREFIXES = [(r'(?:model\.)?lm_head\.|language_model\.lm_head\.', 'decoder.head.'),
            (r'(?:model\.)?(?:vision_tower|vision_model)\.(?:vision_model\.)?', 'vit.'),
            (r'(?:model\.)?(?:language_model|text_model)\.(?:model\.)?', 'decoder.'),
            (r'(?:model\.)?(?:multi_modal_projector\.linear|connector\.modality_projection\.proj)\.', 'connector.'),
            (r'(?=embeddings\.|encoder\.|post_layernorm\.|head\.)', 'vit.'),
            (r'(?:model\.)?(?=embed_tokens\.|layers\.|norm\.)', 'decoder.')]
# what we have no use for: the pooling head of a SigLIP tower, tables that follow from the settings, the norm after a
# feature_layer that is not the last, an output layer that is the embedding (and was saved all the same)
UNUSED = r'vit\.head\.|.*\.(?:position_ids|inv_freq)$|decoder\.norm\.|vit\.post_layernorm\.|decoder\.head\.'
# model_type -> the part of the model that is read
ONLY_INSIDE = {'siglip': r'vision_model\.', 'gemma3': r'(?:model\.)?language_model\.'}

# the same, as each kind of model writes it: the first that fits
WRITTEN = {'decoder': {'decoder.head.': 'lm_head.', 'decoder.': 'model.'},
           'siglip_vision_model': {'vit.': 'vision_model.'},
           'paligemma': {'decoder.head.': 'language_model.lm_head.', 'decoder.': 'language_model.model.',
                         'vit.': 'vision_tower.vision_model.', 'connector.': 'multi_modal_projector.linear.'},
           'idefics3': {'decoder.head.': 'lm_head.', 'decoder.': 'model.text_model.', 'vit.': 'model.vision_model.',
                        'connector.': 'model.connector.modality_projection.proj.'}}

# ----------------------------------------------------------------------------------------------------------------------
# settings: what a kind of decoder is in our terms, and what its config.json may leave out

LLAMA = dict(norm_offset=0.0, embed_scale=1.0)
DECODERS = {
    'gemma': (dict(), dict(vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
                           num_attention_heads=16, num_key_value_heads=16, head_dim=256, tie_word_embeddings=True)),
    'gemma2': (dict(post_norms=True), dict(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, query_pre_attn_scalar=256, sliding_window=4096,
        sliding_window_pattern=2, final_logit_softcapping=30.0, attn_logit_softcapping=50.0)),
    'gemma3_text': (dict(post_norms=True, qk_norm=True), dict(
        vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, query_pre_attn_scalar=256, sliding_window=4096,
        sliding_window_pattern=6, rope_theta=1e6, rope_local_base_freq=1e4)),
    'llama': (LLAMA, dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                          num_attention_heads=32, tie_word_embeddings=False, hidden_act='silu')),
    'qwen2': (LLAMA | dict(qkv_bias=True), dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, tie_word_embeddings=False, hidden_act='silu')),
    'qwen3': (LLAMA | dict(qk_norm=True), dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, tie_word_embeddings=False, hidden_act='silu'))}
VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
              patch_size=16, num_channels=3, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6)
TOWERS = {'siglip_vision_model': VISION, 'idefics3_vision': VISION | dict(hidden_size=1152, num_attention_heads=16,
                                                                           patch_size=32),
          'smolvlm_vision': VISION | dict(hidden_size=1152, num_attention_heads=16, patch_size=32)}
VLMS = {'paligemma': (dict(model_type='gemma'), dict(model_type='siglip_vision_model')),
        'idefics3': (dict(model_type='llama', rms_norm_eps=1e-5, vocab_size=32000), dict(model_type='idefics3_vision')),
        'smolvlm': (dict(model_type='llama', rms_norm_eps=1e-5, vocab_size=32000), dict(model_type='smolvlm_vision'))}
ACTIVATIONS = {'gelu_pytorch_tanh': 'gelu', 'gelu_fast': 'gelu', 'gelu_new': 'gelu', 'silu': 'silu', 'swish': 'silu'}
ARCHITECTURES = {'gemma': 'GemmaForCausalLM', 'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM',
                 'qwen3': 'Qwen3ForCausalLM', 'gemma2': 'Gemma2ForCausalLM', 'gemma3_text': 'Gemma3ForCausalLM'}
LLAMA3_ROPE = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
# settings that change what is computed, and the values with which we compute the same
ONLY = dict(attention_bias=(False, None), mlp_bias=(False, None), use_sliding_window=(False, None),
            use_bidirectional_attention=(False, None), partial_rotary_factor=(1.0, None), num_channels=(3,),
            quantization_config=(None,), layer_norm_eps=(1e-6,))


def decoder_config(theirs):
    """Their text settings -> DecoderConfig. Raises ValueError for what we do not compute."""
    kind = theirs.get('model_type')
    if kind not in DECODERS:
        raise ValueError(f'model_type={kind!r} is no decoder that is known here: {", ".join(DECODERS)}')
    fixed, defaults = DECODERS[kind]
    c = dict(rms_norm_eps=1e-6) | defaults | theirs
    refuse(c)
    act = c.get('hidden_activation') or c.get('hidden_act') or 'gelu_pytorch_tanh'
    act = 'gelu_pytorch_tanh' if kind == 'gemma' and act == 'gelu' else act     # as old files of Gemma say it
    if act not in ACTIVATIONS:
        raise ValueError(f'hidden_act={act!r}: known are {", ".join(ACTIVATIONS)}')
    theta, local_theta, scaling = rope_settings(c)
    window, every = layers(c)
    heads = c['num_attention_heads']
    kv_heads, head_dim = c.get('num_key_value_heads') or heads, c.get('head_dim') or c['hidden_size'] // heads
    return DecoderConfig(
        vocab_size=c['vocab_size'], width=c['hidden_size'], depth=c['num_hidden_layers'],
        mlp_dim=c['intermediate_size'], num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        activation=ACTIVATIONS[act], tied=c['tie_word_embeddings'], norm_eps=c['rms_norm_eps'],
        query_pre_attn_scalar=float(c.get('query_pre_attn_scalar') or 0),
        attn_logits_softcap=float(c.get('attn_logit_softcapping') or 0) if kind == 'gemma2' else 0.0,
        final_logits_softcap=float(c.get('final_logit_softcapping') or 0), sliding_window=window, global_every=every,
        rope_theta=theta, rope_local_theta=local_theta if window else 10000.0, rope_scaling=scaling, **fixed)


def refuse(c):
    """Raises ValueError for a setting that asks for what we do not compute, and for sizes that no model has."""
    for key, values in ONLY.items():
        if key in c and c[key] not in values:
            raise ValueError(f'{key}={c[key]!r} is not supported, only {" or ".join(map(repr, values))}')
    for key in ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads',
                'head_dim', 'vocab_size', 'image_size', 'patch_size', 'sliding_window', 'scale_factor'):
        limit = 1000 if key == 'num_hidden_layers' else 10 ** 8
        left_open = key in ('num_key_value_heads', 'head_dim', 'sliding_window') and c.get(key) is None
        if key in c and not left_open and not (type(c[key]) is int and 0 < c[key] <= limit):
            raise ValueError(f'{key}={c[key]!r}: expected a number from 1 to {limit}')


def rope_settings(c):
    """(theta, theta of local layers, our rope_scaling), of all the ways in which config.json files say them."""
    rope = c.get('rope_parameters') or {}
    full, local = (rope.get('full_attention') or {}, rope.get('sliding_attention') or {}) if (
        'full_attention' in rope or 'sliding_attention' in rope) else (rope, rope)
    theta = full.get('rope_theta') or c.get('rope_theta') or 10000.0
    local_theta = local.get('rope_theta') or c.get('rope_local_base_freq') or theta
    scaling = c.get('rope_scaling') or {k: v for k, v in full.items() if k != 'rope_theta'}
    kind = scaling.get('rope_type', scaling.get('type', 'default'))
    keys = {'default': (), 'linear': LLAMA3_ROPE[:1], 'llama3': LLAMA3_ROPE}.get(kind)
    if keys is None or local.get('rope_type', 'default') != 'default' and local is not full:
        raise ValueError(f'rope_type={kind!r} is not supported, only default, linear and llama3, and for local layers '
                         'default')
    return float(theta), float(local_theta), [float(scaling[key]) for key in keys]


def layers(c):
    """(sliding_window, global_every): of so many layers the last is global."""
    n, window = c['num_hidden_layers'], c.get('sliding_window')
    pattern = c.get('_sliding_window_pattern') or c.get('sliding_window_pattern') or 1
    kinds = c.get('layer_types') or ['full_attention' if (i + 1) % pattern == 0 else 'sliding_attention'
                                     for i in range(n)]
    if set(kinds) == {'full_attention'} or not window:
        return 0, 1
    for every in (pattern, *range(2, n + 2)):
        if kinds == ['full_attention' if (i + 1) % every == 0 else 'sliding_attention' for i in range(n)]:
            return window, every
    raise ValueError(f'layer_types={kinds}: expected one global layer after every so many local ones')


def vit_config(theirs):
    """Their vision settings -> ViTConfig. Raises ValueError."""
    kind = theirs.get('model_type', 'siglip_vision_model')
    if kind not in TOWERS:
        raise ValueError(f'model_type={kind!r} is no vision tower that is known here: {", ".join(TOWERS)}')
    c = TOWERS[kind] | theirs
    refuse(c)
    if c['hidden_act'] != 'gelu_pytorch_tanh':
        raise ValueError(f'hidden_act={c["hidden_act"]!r} of a vision tower: only gelu_pytorch_tanh is known')
    return ViTConfig(image_size=c['image_size'], patch_size=c['patch_size'], width=c['hidden_size'],
                     depth=c['num_hidden_layers'], mlp_dim=c['intermediate_size'], num_heads=c['num_attention_heads'])


def to_config(theirs):
    """A config.json -> our DecoderConfig, ViTConfig or VLMConfig. Raises ValueError."""
    kind = theirs.get('model_type')
    try:
        if kind in VLMS:
            text, vision = (default | theirs.get(key, {}) for default, key in zip(VLMS[kind], (
                'text_config', 'vision_config')))
            text.setdefault('vocab_size', theirs.get('vocab_size', 257152))
            if kind == 'paligemma':             # says what the masks of its own text say, too
                text['use_bidirectional_attention'] = None
            if 'tie_word_embeddings' in theirs:
                text['tie_word_embeddings'] = theirs['tie_word_embeddings']
            return VLMConfig(vit_config(vision), decoder_config(text), theirs.get(
                'image_token_index', theirs.get('image_token_id', 257152 if kind == 'paligemma' else 128257)),
                1 if kind == 'paligemma' else theirs.get('scale_factor', 2), kind == 'paligemma')
        if kind == 'gemma3':                    # its text part alone
            return decoder_config({'model_type': 'gemma3_text'} | theirs['text_config'])
        if kind == 'siglip':
            return vit_config(theirs['vision_config'])
        if kind in DECODERS:
            return decoder_config(theirs)
        if kind in TOWERS:
            return vit_config(theirs)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'config.json is not what a {kind} has ({error!r})') from None
    known = ', '.join((*DECODERS, 'gemma3', 'siglip', *TOWERS, *VLMS))
    raise ValueError(f'model_type={kind!r} is not supported; known are {known}')


# ----------------------------------------------------------------------------------------------------------------------
# reading

REPOSITORY = r'[\w.-]+/[\w.-]+'


def fetch(name, revision=None):
    """The folder of a model: `name` itself, or a repository's copy in huggingface_hub's cache. Raises ValueError."""
    if os.path.isdir(name) or name.endswith('.npz'):
        return name
    if not re.fullmatch(REPOSITORY, name):
        raise ValueError(f'{name!r} is neither a folder nor a repository (owner/name)')
    import huggingface_hub
    try:
        return huggingface_hub.snapshot_download(name, revision=revision, ignore_patterns=['*/*'], allow_patterns=[
            '*.json', '*.safetensors', '*.model', '*.jinja', '*.tiktoken'])
    except Exception as error:          # of several libraries: no such repository, no licence accepted, no network
        raise ValueError(f'{name!r} is no folder here, and could not be fetched from Hugging Face: '
                         f'{" ".join(str(error).split())[:300]}') from None


def locate(name, data_dir='', what='file'):
    """A file or folder that a setting names: here, or a repository's folder. Raises ValueError and OSError."""
    try:
        return shards.find(name, data_dir, what)
    except FileNotFoundError:
        if not re.fullmatch(REPOSITORY, name) or os.path.splitext(name)[1] in ('.model', '.json', '.tiktoken', '.py'):
            raise
        return fetch(name)


def is_foreign(name):
    """Is it a model of transformers: a folder with its config.json, or a repository's name where no folder is?"""
    if not os.path.isdir(name):
        return name.endswith('.npz') or (re.fullmatch(REPOSITORY, name) is not None
                                         and not os.path.isdir(os.path.dirname(name)))
    if os.path.isdir(os.path.join(name, 'checkpoints')) or not os.path.exists(os.path.join(name, 'config.json')):
        return False
    try:
        return 'task' not in read_json(os.path.join(name, 'config.json'))       # a checkpoint of ours has it
    except ValueError:
        return True                     # read_config says what is wrong with it


def read_config(folder):
    """config.json of a folder as our settings. Raises ValueError."""
    path = os.path.join(folder, 'config.json')
    try:
        return to_config(read_json(path))
    except FileNotFoundError:
        raise ValueError(f'{folder!r} has no config.json') from None
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def files_of(folder, stem='model'):
    """{name of a tensor there: its .safetensors file}; stem: how the files' names begin. fp16 only where there is
    nothing else. Raises ValueError."""
    for variant in ('', '.fp16'):
        index = os.path.join(folder, f'{stem}.safetensors.index{variant}.json')
        if os.path.exists(index):
            files = read_json(index).get('weight_map')
            if not isinstance(files, dict) or not all(isinstance(f, str) and re.fullmatch(r'[\w.-]+\.safetensors', f)
                                                      for f in files.values()):
                raise ValueError(f'{index}: weight_map does not name .safetensors files beside it')
            return {name: os.path.join(folder, file) for name, file in files.items()}
        single = os.path.join(folder, f'{stem}{variant}.safetensors')
        if os.path.exists(single):
            with opened(single) as f:
                return dict.fromkeys(f.keys(), single)
    other = sorted(f for f in os.listdir(folder) if f.endswith(('.bin', '.pt', '.pth', '.gguf')))
    raise ValueError(f'{folder!r} has no {stem}.safetensors' + (
        f' ({", ".join(other)} can not be read: pickles run code; save it with safe_serialization=True)'
        if other else ''))


def opened(path):
    """safe_open. Raises ValueError where the file is missing, cut or no .safetensors."""
    try:
        return safe_open(path, framework='pt')
    except (OSError, SafetensorError) as error:
        raise ValueError(f'{path} can not be read ({error})') from None


def canonical(name):
    """A tensor's name there -> vit.*, decoder.* or connector.*, with what follows still theirs; as it is if unknown."""
    for pattern, ours in PREFIXES:
        if match := re.match(pattern, name):
            return ours + name[match.end():]
    return name


def their_name(name, post_norms):
    """Our tensor's name, vit.*, decoder.* or connector.*, in their words after the same prefix."""
    part, _, rest = name.partition('.')
    if part == 'connector' or rest.startswith('head.'):
        return name
    top, inside = (VIT, VIT_BLOCK) if part == 'vit' else (DECODER, DECODER_BLOCK | (POST_NORMS if post_norms else {}))
    if match := re.fullmatch(r'blocks\.(\d+)\.(\w+)\.(weight|bias)', rest):
        return f'{part}.{"encoder." * (part == "vit")}layers.{match[1]}.{inside[match[2]]}.{match[3]}'
    key, _, kind = rest.partition('.')
    if key not in top or key == 'stem' and kind not in ('weight', 'bias'):
        raise ValueError(f'{name}: no model of theirs has that')
    return f'{part}.{top[key]}.{kind or "weight"}'


def our_names(model):
    """{canonical name of theirs: our name} of what a Decoder, ViT or VLM (or a model that has a .vit) holds."""
    prefix = 'decoder.' if isinstance(model, Decoder) else 'vit.' if isinstance(model, ViT) else ''
    post_norms = getattr(getattr(model.config, 'decoder', model.config), 'post_norms', False)
    return {their_name(prefix + name, post_norms): name for name in model.state_dict()
            if (prefix + name).startswith(('vit.', 'decoder.', 'connector.'))}


def differences(model, folder):
    """{our key: (ours, theirs)} of the settings in which a model folder differs from the parts of a model that both
    have; sizes of pictures and vocabularies aside, and what does not belong to the weights."""
    theirs, ours, pairs = read_config(folder), model.config, []
    free = {'image_size', 'feature_layer', 'dropout', 'remat', 'init_scale', 'vocab_size', 'hf'}
    for name, kind in (('vit', ViTConfig), ('decoder', DecoderConfig)):
        a, b = (c if isinstance(c, kind) else getattr(c, name, None) for c in (ours, theirs))
        pairs += [(f'{name}.{f.name}', getattr(a, f.name), getattr(b, f.name)) for f in fields(kind)
                  if a and b and f.name not in free]
    if isinstance(ours, VLMConfig) and isinstance(theirs, VLMConfig):
        pairs += [(key, getattr(ours, key), getattr(theirs, key)) for key in ('pixel_shuffle', 'connector_bias')]
    return {key: (a, b) for key, a, b in pairs if a != b}


def layer_of(key):
    """vit.encoder.layers.3. of vit.encoder.layers.3.mlp.fc1.weight; '' of what is in no layer."""
    match = re.match(r'\w+\.(?:encoder\.)?layers\.\d+\.', key)
    return match[0] if match else ''


def where(model, folder):
    """[(our name, their name, file)] for all that a folder and a model share, file by file. Raises ValueError where a
    part of theirs is not whole, or holds what is not known here."""
    ours, files = our_names(model), files_of(folder)
    inside = ONLY_INSIDE.get(read_json(os.path.join(folder, 'config.json')).get('model_type'), '')
    theirs = {canonical(name): name for name in files if re.match(inside, name)}
    parts = {name.partition('.')[0] for name in theirs} & {name.partition('.')[0] for name in ours}
    missing = [key for key in sorted(ours) if key.partition('.')[0] in parts and key not in theirs]
    built = {layer_of(key) for key in ours}             # layers after feature_layer are not
    extra = [theirs[key] for key in sorted(theirs) if key not in ours and not re.match(UNUSED, key)
             and key.partition('.')[0] not in {'vit', 'decoder', 'connector'} - parts and layer_of(key) in built]
    if not parts or missing or extra:
        raise ValueError(f'{folder!r} holds another model: ' + (
            f'it lacks {", ".join(missing[:3]) or "nothing"} and has {", ".join(extra[:3]) or "nothing"} that is not '
            'known here' if parts else 'nothing in it belongs to this one'))
    return sorted(((ours[key], theirs[key], files[theirs[key]]) for key in ours.keys() & theirs.keys()),
                  key=lambda row: (row[2], row[1]))


def tensors(model, folder, skip=()):
    """Yield (our name, tensor of our shape), one at a time, for all that a folder and a model share, but for names in
    which a regex of `skip` is found. Position tables are interpolated where the picture size differs. Raises
    ValueError."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for path, rows in itertools.groupby(where(model, folder), lambda row: row[2]):
        with opened(path) as file:
            for name, their, _ in rows:
                if any(re.search(regex, name) for regex in skip):
                    continue
                try:
                    tensor = file.get_tensor(their)
                except (SafetensorError, RuntimeError) as error:
                    raise ValueError(f'{path}: {their} can not be read ({error})') from None
                yield name, fitted(tensor, name, shapes[name], folder)


def fitted(tensor, name, shape, folder):
    """The tensor in our shape. Raises ValueError if it has another."""
    if name.endswith('pos_embed') and tensor.shape[-1] == shape[2]:
        return resize_positions(tensor.view(1, -1, shape[2]), shape[1])
    if name.endswith('embedding.weight') and tensor.shape[1:] == shape[1:] and len(tensor) < shape[0]:
        # rows for tokens that we added: what the model thinks of an average one
        return torch.cat((tensor, tensor.float().mean(0, keepdim=True).to(tensor).expand(shape[0] - len(tensor), -1)))
    if tuple(tensor.shape) != shape:
        raise ValueError(f'{folder!r}: {name} is {tuple(tensor.shape)} there and {shape} here: change the model\'s '
                         'settings, or name it in init_skip')
    return tensor


def resize_positions(table, patches):
    """Position table (1, P, D) -> (1, patches, D), bicubic over the square (as transformers does)."""
    if table.shape[1] == patches:
        return table
    a, b = round(table.shape[1] ** 0.5), round(patches ** 0.5)
    if a * a != table.shape[1]:
        raise ValueError(f'a position table of {table.shape[1]} patches is no square')
    grid = table.float().unflatten(1, (a, a)).permute(0, 3, 1, 2)                               # (1, D, a, a)
    grid = F.interpolate(grid, size=(b, b), mode='bicubic', align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


def from_pretrained(name, dtype=torch.float32, revision=None, image_size=0):
    """Our model, weights loaded, `.config` filled: of a folder or repository of transformers, a run or a checkpoint of
    ours. image_size: of its pictures, where it is to be another than it was trained on. Raises ValueError."""
    folder = fetch(name, revision)
    if not is_foreign(folder):
        return checkpoint.load_run(folder)[2].to(dtype).eval()
    config = read_config(folder)
    if image_size and isinstance(config, ViTConfig):
        config = replace(config, image_size=image_size)
    elif image_size and isinstance(config, VLMConfig):
        config = replace(config, vit=replace(config.vit, image_size=image_size))
    kind = {DecoderConfig: Decoder, ViTConfig: ViT, VLMConfig: VLM}[type(config)]
    with torch.device('meta'):                  # nothing is allocated before a file is known to hold it
        model = kind(config)
    # copied: what safe_open gives is the file itself, mapped, and who changes that would change the model
    loaded = {name: tensor.to(dtype, copy=True) for name, tensor in tensors(model, folder)}
    if lacking := model.state_dict().keys() - loaded.keys():
        raise ValueError(f'{folder!r} lacks {", ".join(sorted(lacking)[:3])}')
    model.load_state_dict(loaded, assign=True)
    return model.eval()


def load(model, folder, skip=()):
    """Copy what a folder of transformers (or an .npz of big_vision) and our model share into the model, sharded or not,
    one tensor at a time: the names that were loaded. Raises ValueError."""
    ours = model.state_dict()
    if folder.endswith('.npz'):
        rows = ((name, fitted(tensor, name, tuple(ours[name].shape), folder))
                for name, tensor in big_vision.tensors(model, folder) if not any(re.search(r, name) for r in skip))
    else:
        rows = tensors(model, folder, skip)
        if different := differences(model, folder):
            raise ValueError(f'{folder!r} has ' + ', '.join(f'{k}={b!r} (here {a!r})' for k, (a, b) in
                             different.items()) + f': python hub.py config {folder} prints all of its settings')
    return copy_into(model, rows)


def copy_into(model, rows):
    """Copy (name, tensor) pairs into a model, sharded or not: the names."""
    ours, loaded = model.state_dict(), []
    for name, tensor in rows:
        target = ours[name]
        tensor = tensor.to(target.device, target.dtype)
        if isinstance(target, DTensor):         # every process reads all and keeps its part: nothing is sent
            tensor = distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(tensor)
        loaded.append(name)
    return loaded


# ----------------------------------------------------------------------------------------------------------------------
# writing


def their_decoder(c, kind):
    """DecoderConfig -> the config.json of a kind of decoder, of what that kind can say."""
    out = dict(
        model_type=kind, architectures=[ARCHITECTURES[kind]], vocab_size=c.vocab_size, hidden_size=c.width,
        intermediate_size=c.mlp_dim, num_hidden_layers=c.depth, num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
        max_position_embeddings=131072, rope_theta=c.rope_theta)
    act = {'gelu': 'gelu_pytorch_tanh', 'silu': 'silu'}[c.activation]
    out |= dict(hidden_act=act, hidden_activation=act) if kind.startswith('gemma') else dict(hidden_act=act)
    if c.rope_scaling:
        out['rope_scaling'] = dict(zip(LLAMA3_ROPE, c.rope_scaling)) | dict(
            rope_type='linear' if len(c.rope_scaling) == 1 else 'llama3')
    if kind in ('gemma2', 'gemma3_text'):
        kinds = ['sliding_attention' if c.sliding_window and (i + 1) % c.global_every else 'full_attention'
                 for i in range(c.depth)]
        out |= dict(query_pre_attn_scalar=whole(c.query_pre_attn_scalar or c.head_dim), layer_types=kinds,
                    sliding_window=c.sliding_window or 4096, final_logit_softcapping=c.final_logits_softcap or None,
                    attn_logit_softcapping=c.attn_logits_softcap or None)
    if kind == 'gemma3_text':
        out['rope_local_base_freq'] = c.rope_local_theta
    return out


def whole(number):
    """An int where it is one: transformers refuses 256.0."""
    return int(number) if number == int(number) else number


def meaning(c):
    """A DecoderConfig with what is written out that a 0 stands for, and without what only training looks at."""
    return replace(c, dropout=0.0, remat=False, query_pre_attn_scalar=c.query_pre_attn_scalar or float(c.head_dim),
                   embed_scale=c.embed_scale or c.width ** 0.5,
                   rope_local_theta=c.rope_local_theta if c.sliding_window else c.rope_theta)


def export_decoder(c, kinds=None):
    """The config.json of the kind of decoder that computes what ours does: the one that reads back as ours. Raises
    ValueError with the settings that the nearest kind lacks."""
    if c.feature_layer != -1 or c.hf:
        raise ValueError(f'decoder.feature_layer={c.feature_layer}, decoder.hf={c.hf!r}: only a whole decoder of ours '
                         'can be exported')
    lacking = {}
    for kind in kinds or ARCHITECTURES:
        theirs = their_decoder(c, kind)
        read, wanted = meaning(decoder_config(theirs)), meaning(c)
        lacking[kind] = [f.name for f in fields(c) if getattr(read, f.name) != getattr(wanted, f.name)]
        if not lacking[kind]:
            return theirs
    nearest = min(lacking, key=lambda kind: len(lacking[kind]))
    raise ValueError(f'no decoder of transformers computes this one; {nearest} would, but for ' + ', '.join(
        f'decoder.{name}={getattr(c, name)!r}' for name in lacking[nearest]))


def export_vit(c, kind='siglip_vision_model'):
    """ViTConfig -> the config.json of a tower. Raises ValueError."""
    if c.stem != 'patch' or c.feature_layer != -1 or c.hf:
        raise ValueError(f'vit.stem={c.stem!r}, vit.feature_layer={c.feature_layer}, vit.hf={c.hf!r}: transformers has '
                         'towers with stem patch and feature_layer -1 alone')
    return dict(model_type=kind, architectures=['SiglipVisionModel'], hidden_size=c.width, num_hidden_layers=c.depth,
                intermediate_size=c.mlp_dim, num_attention_heads=c.num_heads, image_size=c.image_size,
                patch_size=c.patch_size, num_channels=3, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6,
                vision_use_head=False)


def to_theirs(c):
    """Our DecoderConfig, ViTConfig or VLMConfig -> a config.json. Raises ValueError, naming what no model of
    transformers has."""
    if isinstance(c, DecoderConfig):
        return export_decoder(c)
    if isinstance(c, ViTConfig):
        return export_vit(c)
    if c.connector_bias and c.pixel_shuffle == 1:
        text = export_decoder(c.decoder, ('gemma', 'gemma2', 'gemma3_text'))
        vision = export_vit(c.vit) | dict(projection_dim=c.decoder.width)
        return dict(model_type='paligemma', architectures=['PaliGemmaForConditionalGeneration'], text_config=text,
                    vision_config=vision, image_token_index=c.image_token_id, projection_dim=c.decoder.width,
                    hidden_size=c.decoder.width, vocab_size=c.decoder.vocab_size, tie_word_embeddings=c.decoder.tied)
    if not c.connector_bias:
        return dict(model_type='idefics3', architectures=['Idefics3ForConditionalGeneration'],
                    text_config=export_decoder(c.decoder, ('llama',)), image_token_id=c.image_token_id,
                    vision_config=export_vit(c.vit, 'idefics3_vision'), scale_factor=c.pixel_shuffle,
                    vocab_size=c.decoder.vocab_size, tie_word_embeddings=c.decoder.tied)
    raise ValueError(f'pixel_shuffle={c.pixel_shuffle} with connector_bias=True: transformers has PaliGemma '
                     '(pixel_shuffle=1, connector_bias=True) and Idefics3 (connector_bias=False)')


def written_name(key, kind):
    """A canonical name of theirs as a kind of model writes it."""
    names = WRITTEN.get(kind, WRITTEN['decoder'])
    start = next(start for start in names if key.startswith(start))
    return names[start] + key[len(start):]


def write_tensors(tensors, folder, stem='model', max_shard_size='5GB'):
    """{name: tensor} as .safetensors files, with an index where there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards
    os.makedirs(folder, exist_ok=True)
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size,
                                              filename_pattern=stem + '{suffix}.safetensors')
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, os.path.join(folder, file), {'format': 'pt'})
    if plan.is_sharded:
        checkpoint.write_json(os.path.join(folder, f'{stem}.safetensors.index.json'),
                              dict(metadata=plan.metadata, weight_map=plan.tensor_to_filename))


def export(model, folder, dtype=torch.float32, max_shard_size='5GB'):
    """Write config.json and .safetensors files that transformers loads: the same logits, in fp32 the same bits.

    Raises ValueError for a model that it has not."""
    if not isinstance(model, Decoder | ViT | VLM):
        raise ValueError(f'{type(model).__name__} has no counterpart in transformers: only Decoder, ViT and VLM do')
    config = to_theirs(model.config) | dict(dtype=str(dtype).removeprefix('torch.'))
    ours = model.state_dict()
    out = {}
    for key, name in our_names(model).items():
        tensor = ours[name].detach().to('cpu', dtype).contiguous()
        out[written_name(key, config['model_type'])] = tensor[0] if name.endswith('pos_embed') else tensor
    write_tensors(out, folder, max_shard_size=max_shard_size)
    checkpoint.write_json(os.path.join(folder, 'config.json'), config)


def export_run(run, folder, dtype=torch.float32):
    """A run, or one of its checkpoints, as a folder that transformers loads: also what its tokenizer and processor
    read. Raises ValueError."""
    settings, tok, model = checkpoint.load_run(run)
    if settings['task'] == 't2i':
        from families import diffusers as hub_sd
        return hub_sd.export_run(settings, model, folder, dtype)
    model = model.vit if settings['task'] == 'siglip' else model
    export(model, folder, dtype)
    config = read_json(os.path.join(folder, 'config.json'))
    ids = dict(bos_token_id=tok.bos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id)
    if settings['task'] != 'siglip':
        for part in (config, *(config[key] for key in ('text_config',) if key in config)):
            part.update(ids)
        checkpoint.write_json(os.path.join(folder, 'config.json'), config)
        checkpoint.write_json(os.path.join(folder, 'generation_config.json'), ids)
        write_tokenizer(tok, folder)
    if settings['task'] != 'llm':
        write_processor(config, settings, model.config, folder)


def write_processor(config, settings, c, folder):
    """preprocessor_config.json and processor_config.json: how pictures become pixels and image tokens."""
    size = settings['vit.image_size']
    mean, std = (list(x) if isinstance(x, list | tuple) else [x] * 3 for x in (settings['image_mean'],
                                                                              settings['image_std']))
    pixels = dict(do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True, rescale_factor=1 / 255,
                  image_mean=mean, image_std=std, resample=3)
    if config['model_type'] == 'idefics3':
        whole = dict(longest_edge=size)
        pixels |= dict(image_processor_type='Idefics3ImageProcessor', processor_class='Idefics3Processor', size=whole,
                       max_image_size=whole, do_image_splitting=False, do_pad=True, resample=1)
        more = dict(image_seq_len=c.image_tokens)
    else:
        pixels |= dict(image_processor_type='SiglipImageProcessor', size=dict(height=size, width=size))
        more = {}
        if config['model_type'] == 'paligemma':
            pixels |= dict(processor_class='PaliGemmaProcessor', image_seq_length=c.image_tokens)
    checkpoint.write_json(os.path.join(folder, 'preprocessor_config.json'), pixels)
    if 'processor_class' in pixels:
        checkpoint.write_json(os.path.join(folder, 'processor_config.json'),
                              dict(processor_class=pixels['processor_class'], **more))


def write_tokenizer(tok, folder):
    """The tokenizer's files as transformers looks for them. (Of a Llama-like tokenizer.model it makes a tokenizer that
    swallows the space before a text that begins with one.)"""
    names = dict(bos_token='<bos>', eos_token='<eos>', pad_token='<pad>', image_token='<image>')
    added = {}
    for role, text in names.items():
        i = getattr(tok, role.replace('token', 'id'))
        known = (tok.model.id_to_piece(i) if isinstance(tok, tokenizers.SentencePiece) and i < tok.size else
                 tok.model.id_to_token(i) if isinstance(tok, tokenizers.HuggingFace) else None)
        names[role] = known or text
        added[str(i)] = dict(content=names[role], special=True, normalized=False, lstrip=False, rstrip=False,
                             single_word=False)
    for path in tok.files:
        main = {'.model': 'tokenizer.model', '.json': 'tokenizer.json'}.get(os.path.splitext(path)[1])
        shutil.copyfile(path, os.path.join(folder, main if path == tok.files[0] and main else os.path.basename(path)))
    kind = 'PreTrainedTokenizerFast'
    if isinstance(tok, tokenizers.Bytes):
        checkpoint.write_json(os.path.join(folder, 'tokenizer.json'), bytes_tokenizer(added))
    elif isinstance(tok, tokenizers.SentencePiece):
        kind = 'GemmaTokenizer' if names['bos_token'] == '<bos>' else 'LlamaTokenizer'
    path = os.path.join(folder, 'tokenizer_config.json')
    theirs = read_json(path) if os.path.exists(path) else {}
    checkpoint.write_json(path, dict(tokenizer_class=kind, added_tokens_decoder=added, model_max_length=10 ** 30,
                                     clean_up_tokenization_spaces=False) | names | theirs)


def bytes_tokenizer(added):
    """tokenizer.json of a tokenizer whose ids are the bytes of UTF-8. It spells a byte as GPT-2 does: as itself where
    it is a letter of Latin-1, the others as the letters from 256 on."""
    plain = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [b for b in range(256) if b not in plain]
    vocab = {chr(256 + others.index(b) if b in others else b): b for b in range(256)}
    level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
    return dict(version='1.0', truncation=None, padding=None, normalizer=None, pre_tokenizer=level, post_processor=None,
                decoder=level, added_tokens=[dict(id=int(i), **token) for i, token in added.items()],
                model=dict(type='BPE', dropout=None, unk_token=None, continuing_subword_prefix=None,
                           end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, vocab=vocab, merges=[]))


# ----------------------------------------------------------------------------------------------------------------------
# the command line


def config_lines(name):
    """The settings of a model as the lines of a config file."""
    if os.path.isfile(os.path.join(name, 'unet', 'config.json')):
        from families import diffusers as hub_sd
        lines = [f'# the settings of {name}, by python hub.py config', f'init_from = {name!r}',
                 f'tokenizer = {os.path.join(name, "tokenizer")!r}']
        return '\n'.join(lines + [f'{key} = {value!r}' for key, value in hub_sd.settings_of(name).items()]) + '\n'
    config = read_config(fetch(name))
    kind = {DecoderConfig: 'llm', ViTConfig: 'siglip', VLMConfig: 'vlm'}[type(config)]
    lines = [f'# the settings of {name}, by python hub.py config', f'task = {kind!r}', f'init_from = {name!r}']
    lines += [f'tokenizer = {name!r}', f'processor = {name!r}'] if kind != 'siglip' else []
    parts = dict(vit=config.vit, decoder=config.decoder) if kind == 'vlm' else {
        'decoder' if kind == 'llm' else 'vit': config}
    lines += [f'{key} = {getattr(config, key)!r}' for key in ('pixel_shuffle', 'connector_bias') if kind == 'vlm']
    for part, c in parts.items():
        lines += ['', *(f'{part}.{f.name} = {getattr(c, f.name)!r}' for f in fields(c)
                        if f.name not in ('dropout', 'remat', 'feature_layer', 'init_scale', 'stem', 'hf'))]
    return '\n'.join(lines) + '\n'


def model_card(run, name):
    """README.md of a pushed run: its command, data, losses and settings."""
    settings = read_json(os.path.join(run, 'config.json'))
    rows = []
    if os.path.exists(os.path.join(run, 'log.jsonl')):
        with open(os.path.join(run, 'log.jsonl'), encoding='utf-8') as f:
            rows = [json.loads(line) for line in f if line.endswith('\n')]
    command = 'train.py'
    if os.path.exists(os.path.join(run, 'environment.json')):
        command = ' '.join(read_json(os.path.join(run, 'environment.json')).get('argv', [command]))
    train = [row for row in rows if 'loss' in row][-1:]
    last = {row['val']: row for row in rows if 'val' in row}
    table = [f'| train | {row["step"]} | {row["loss"]:.4f} |' for row in train]
    table += [f'| {key} | {row["step"]} | {row["val_loss"]:.4f} |' for key, row in last.items()]
    tag = {'vlm': 'image-text-to-text', 'llm': 'text-generation', 'siglip': 'image-feature-extraction'}
    return '\n'.join([
        '---', 'library_name: transformers', f'pipeline_tag: {tag.get(settings["task"], "other")}', 'tags:',
        '- nanofoundry', '---', f'# {name.rpartition("/")[2]}', '', f'Trained with nanofoundry: `python {command}`', '',
        'Data (weight in the mix): ' + ', '.join(f'{k} ({w:g})' for k, w in settings['mix'].items()), '',
        '| data | step | loss |', '| --- | --- | --- |', *table, '', '<details><summary>all settings</summary>', '',
        '```json', json.dumps(settings, indent=1), '```', '</details>', ''])


def push(run, name, dtype=torch.float32):
    """A run to a repository of the Hub, as `export_run` writes it, with a model card. Raises ValueError."""
    import huggingface_hub
    with tempfile.TemporaryDirectory() as folder:
        export_run(run, folder, dtype)
        with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as f:
            f.write(model_card(run, name))
        try:
            api = huggingface_hub.HfApi()
            api.create_repo(name, exist_ok=True)
            return api.upload_folder(repo_id=name, folder_path=folder, commit_message='nanofoundry').commit_url
        except Exception as error:      # of several libraries: not logged in, no such name, no network
            raise ValueError(f'{name!r} could not be written ({" ".join(str(error).split())[:300]}): is HF_TOKEN set?'
                             ) from None


def main(argv):
    dtypes = {f'--dtype={name}': getattr(torch, name) for name in ('float32', 'bfloat16', 'float16')}
    dtype = next((dtypes[flag] for flag in argv if flag in dtypes), torch.float32)
    words = [word for word in argv if word not in dtypes]
    calls = {'config': (1, lambda name: print(config_lines(name), end='')),
             'export': (2, lambda run, folder: export_run(run, folder, dtype)),
             'push': (2, lambda run, name: print(push(run, name, dtype)))}
    if not words or words[0] not in calls or len(words) != 1 + calls[words[0]][0]:
        print(f'hub.py: {" ".join(argv) or "nothing"} asked for; it knows:', file=sys.stderr)
        print(*(line for line in __doc__.splitlines() if 'python hub.py' in line), sep='\n', file=sys.stderr)
        sys.exit(2)
    try:
        calls[words[0]][1](*words[1:])
    except (ValueError, OSError) as error:
        print(f'hub.py: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    main(sys.argv[1:])
