"""Settings of transformers' models, both ways: a config.json becomes a DecoderConfig, ViTConfig or
VLMConfig of ours, and ours a config.json.

In: Gemma 1, 2 and 3 (text), Llama, SmolLM2, Qwen2 and 3, SigLIP 1 and 2 (fixed resolution),
PaliGemma 1 and 2, Idefics3 and SmolVLM (one picture at a time). `theirs` is a config.json as a
dict, `config` is ours.
"""
import os
from dataclasses import fields, replace

from families.files import refuse_adapter, refuse_settings
from model import DecoderConfig, ViTConfig, VLMConfig
from tokenizer import read_json

# ------------------------------------------------------------------------------------------------
# tables

# A kind of decoder -> (what it is in our terms, what its config.json may leave out). The defaults
# are those of the configuration_*.py files of transformers: a published config.json may say no
# more than what differs from them.
LLAMA = dict(norm_offset=0.0, embed_scale=1.0)
DECODERS = {
    'gemma': (
        dict(),
        dict(vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
             num_attention_heads=16, num_key_value_heads=16, head_dim=256,
             tie_word_embeddings=True)),
    'gemma2': (
        dict(post_norms=True),
        dict(vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
             num_attention_heads=8, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True,
             query_pre_attn_scalar=256, sliding_window=4096, sliding_window_pattern=2,
             final_logit_softcapping=30.0, attn_logit_softcapping=50.0)),
    'gemma3_text': (
        dict(post_norms=True, qk_norm=True),
        dict(vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
             num_attention_heads=8, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True,
             query_pre_attn_scalar=256, sliding_window=4096, sliding_window_pattern=6,
             rope_theta=1e6, rope_local_base_freq=1e4)),
    'llama': (
        LLAMA,
        dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
             num_attention_heads=32, tie_word_embeddings=False, hidden_act='silu')),
    'qwen2': (
        LLAMA | dict(qkv_bias=True),
        dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
             hidden_act='silu')),
    'qwen3': (
        LLAMA | dict(qk_norm=True),
        dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=32, head_dim=128,
             tie_word_embeddings=False, hidden_act='silu'))}

# And how many positions it has, where that is left out.
POSITIONS = {'gemma': 8192, 'gemma2': 8192, 'gemma3_text': 131072, 'llama': 2048, 'qwen2': 32768,
             'qwen3': 32768}

# A kind of vision tower -> what its config.json may leave out. Our ViT is SigLIP's, in which the
# towers of Idefics3 and SmolVLM differ by size alone.
SIGLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
              num_attention_heads=12, image_size=224, patch_size=16, num_channels=3,
              hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6)
IDEFICS3 = SIGLIP | dict(hidden_size=1152, num_attention_heads=16, patch_size=32)
TOWERS = {'siglip_vision_model': SIGLIP, 'idefics3_vision': IDEFICS3, 'smolvlm_vision': IDEFICS3}

# A kind of VLM -> (what its text_config may leave out, what its vision_config may).
IDEFICS3_TEXT = dict(model_type='llama', rms_norm_eps=1e-5, vocab_size=32000)
VLMS = {'paligemma': (dict(model_type='gemma'), dict(model_type='siglip_vision_model')),
        'idefics3': (IDEFICS3_TEXT, dict(model_type='idefics3_vision')),
        'smolvlm': (IDEFICS3_TEXT, dict(model_type='smolvlm_vision'))}

# Positions of a model that was never trained, where nobody said: RoPE has no end.
LONGEST = 131072

# These three gelus are one approximation, by tanh. Plain gelu is not among them.
ACTIVATIONS = {'gelu_pytorch_tanh': 'gelu', 'gelu_fast': 'gelu', 'gelu_new': 'gelu',
               'silu': 'silu', 'swish': 'silu'}
THEIR_ACTIVATIONS = {'gelu': 'gelu_pytorch_tanh', 'silu': 'silu'}

# rope_type -> the numbers that it takes, in the order of our rope_scaling.
ROPE = {'default': (),
        'linear': ('factor',),
        'llama3': ('factor', 'low_freq_factor', 'high_freq_factor',
                   'original_max_position_embeddings')}

# Kinds of decoders that we write, in the order in which they are tried: where two compute the
# same, the simpler one is written.
ARCHITECTURES = {'gemma': 'GemmaForCausalLM', 'llama': 'LlamaForCausalLM',
                 'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM',
                 'gemma2': 'Gemma2ForCausalLM', 'gemma3_text': 'Gemma3ForCausalLM'}

# Settings that change what is computed, and the values with which we compute the same.
ONLY = dict(attention_bias=(False, None), mlp_bias=(False, None), use_sliding_window=(False, None),
            use_bidirectional_attention=(False, None), partial_rotary_factor=(1.0, None),
            num_channels=(3,), layer_norm_eps=(1e-6,))

# Whoever changes a file can ask for any size: these are looked at before anything is made.
SIZES = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
         'num_key_value_heads', 'head_dim', 'vocab_size', 'image_size', 'patch_size',
         'sliding_window', 'scale_factor', 'max_position_embeddings')
LEFT_OPEN = ('num_key_value_heads', 'head_dim', 'sliding_window',       # sizes that may be null
             'max_position_embeddings')
BESIDE_PARTS = ('quantization_config', 'scale_factor')      # of a model that has several parts

# ------------------------------------------------------------------------------------------------
# theirs to ours


def read_config(folder):
    """config.json of a folder as our settings. Raises ValueError."""
    path = os.path.join(folder, 'config.json')
    refuse_adapter(folder)
    try:
        return to_config(read_json(path))
    except FileNotFoundError:
        raise ValueError(f'{folder!r} has no config.json') from None
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def to_config(theirs):
    """A config.json -> our DecoderConfig, ViTConfig or VLMConfig. Raises ValueError."""
    kind = theirs.get('model_type')
    try:
        if kind in DECODERS:
            return decoder_config(theirs)
        if kind in TOWERS:
            return vit_config(theirs)

        # These have parts, and what stands beside the parts' own settings holds for all of them.
        if kind in (*VLMS, 'gemma3', 'siglip'):
            refuse({key: theirs[key] for key in BESIDE_PARTS if key in theirs})
        if kind in VLMS:
            return vlm_config(theirs)
        # Of those that we do not have as a whole, the part that we do.
        if kind == 'gemma3':
            return decoder_config({'model_type': 'gemma3_text'} | theirs['text_config'])
        if kind == 'siglip':
            return vit_config(theirs['vision_config'])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'config.json is not what a {kind} has ({error!r})') from None

    known = ', '.join((*DECODERS, 'gemma3', 'siglip', *TOWERS, *VLMS))
    raise ValueError(f'model_type={kind!r} is not supported; known are {known}')


def vlm_config(theirs):
    """A config.json of a PaliGemma, Idefics3 or SmolVLM -> VLMConfig. Raises ValueError."""
    is_paligemma = theirs['model_type'] == 'paligemma'
    text_defaults, vision_defaults = VLMS[theirs['model_type']]
    text = text_defaults | theirs.get('text_config', {})
    vision = vision_defaults | theirs.get('vision_config', {})

    # Some settings of the text stand outside of text_config.
    text.setdefault('vocab_size', theirs.get('vocab_size', 257152))
    if 'tie_word_embeddings' in theirs:
        text['tie_word_embeddings'] = theirs['tie_word_embeddings']

    image_token_id, pixel_shuffle = 128257, theirs.get('scale_factor', 2)
    if is_paligemma:
        # It says so of its masks, which are ours; its text alone would be another model.
        text['use_bidirectional_attention'] = None
        image_token_id, pixel_shuffle = 257152, 1
    image_token_id = theirs.get('image_token_id', image_token_id)
    image_token_id = theirs.get('image_token_index', image_token_id)
    return VLMConfig(vit=vit_config(vision), decoder=decoder_config(text),
                     image_token_id=image_token_id, pixel_shuffle=pixel_shuffle,
                     connector_bias=is_paligemma,
                     attends='prefix' if is_paligemma else 'causal')


def decoder_config(theirs):
    """Their text settings -> DecoderConfig. Raises ValueError for what we do not compute."""
    kind = theirs.get('model_type')
    if kind not in DECODERS:
        raise ValueError(f'model_type={kind!r} is no decoder that is known here: '
                         f'{", ".join(DECODERS)}')
    fixed, defaults = DECODERS[kind]
    theirs = dict(rms_norm_eps=1e-6) | defaults | theirs
    refuse(theirs)

    activation = our_activation(theirs)
    rope_theta, rope_local_theta, rope_scaling = rope_settings(theirs)
    sliding_window, global_every = sliding_layers(theirs)
    if not sliding_window:
        rope_local_theta = 10000.0

    # What a config.json may leave open.
    num_heads = theirs['num_attention_heads']
    num_kv_heads = theirs.get('num_key_value_heads') or num_heads
    head_dim = theirs.get('head_dim') or theirs['hidden_size'] // num_heads

    # Gemma 3 has soft caps among its settings, and does not cap its attention.
    attn_logits_softcap = 0.0
    if kind == 'gemma2':
        attn_logits_softcap = float(theirs.get('attn_logit_softcapping') or 0)

    return DecoderConfig(
        vocab_size=theirs['vocab_size'], width=theirs['hidden_size'],
        depth=theirs['num_hidden_layers'], mlp_dim=theirs['intermediate_size'],
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        activation=activation, tied=theirs['tie_word_embeddings'],
        norm_eps=theirs['rms_norm_eps'],
        query_pre_attn_scalar=float(theirs.get('query_pre_attn_scalar') or 0),
        attn_logits_softcap=attn_logits_softcap,
        final_logits_softcap=float(theirs.get('final_logit_softcapping') or 0),
        sliding_window=sliding_window, global_every=global_every,
        rope_theta=rope_theta, rope_local_theta=rope_local_theta, rope_scaling=rope_scaling,
        max_positions=theirs.get('max_position_embeddings') or POSITIONS[kind], **fixed)


def vit_config(theirs):
    """Their vision settings -> ViTConfig. Raises ValueError."""
    kind = theirs.get('model_type', 'siglip_vision_model')
    if kind not in TOWERS:
        raise ValueError(f'model_type={kind!r} is no vision tower that is known here: '
                         f'{", ".join(TOWERS)}')
    theirs = TOWERS[kind] | theirs
    refuse(theirs)

    if theirs['hidden_act'] != 'gelu_pytorch_tanh':
        raise ValueError(f'hidden_act={theirs["hidden_act"]!r} of a vision tower: only '
                         'gelu_pytorch_tanh is known')
    return ViTConfig(
        image_size=theirs['image_size'], patch_size=theirs['patch_size'],
        width=theirs['hidden_size'], depth=theirs['num_hidden_layers'],
        mlp_dim=theirs['intermediate_size'], num_heads=theirs['num_attention_heads'])


def refuse(theirs):
    """Raises ValueError for a setting that asks for what we do not compute, and for sizes that no
    model has."""
    refuse_settings(theirs)
    for key, values in ONLY.items():
        if key in theirs and theirs[key] not in values:
            allowed = ' or '.join(map(repr, values))
            raise ValueError(f'{key}={theirs[key]!r} is not supported, only {allowed}')

    for key in SIZES:
        if key not in theirs or (key in LEFT_OPEN and theirs[key] is None):
            continue
        # So many layers would take minutes to be made, before any file is found to lack them.
        limit = 1000 if key == 'num_hidden_layers' else 10 ** 8
        size = theirs[key]
        if type(size) is not int or not 0 < size <= limit:
            raise ValueError(f'{key}={size!r}: expected a number from 1 to {limit}')


def our_activation(theirs):
    """Our name of the activation of a decoder's MLP. Raises ValueError."""
    name = theirs.get('hidden_activation') or theirs.get('hidden_act') or 'gelu_pytorch_tanh'

    # Old files of Gemma say gelu, and mean its approximation by tanh.
    if theirs['model_type'] == 'gemma' and name == 'gelu':
        name = 'gelu_pytorch_tanh'
    if name not in ACTIVATIONS:
        raise ValueError(f'hidden_act={name!r}: known are {", ".join(ACTIVATIONS)}')
    return ACTIVATIONS[name]


def rope_settings(theirs):
    """(theta, theta of local layers, our rope_scaling), of all the ways in which config.json files
    say them. Raises ValueError."""
    # transformers 5 has rope_parameters, for all layers or for each kind of them.
    rope = theirs.get('rope_parameters') or {}
    full = local = rope
    if 'full_attention' in rope or 'sliding_attention' in rope:
        full = rope.get('full_attention') or {}
        local = rope.get('sliding_attention') or {}

    # What it leaves out stands where earlier releases wrote it.
    theta = full.get('rope_theta') or theirs.get('rope_theta') or 10000.0
    local_theta = local.get('rope_theta') or theirs.get('rope_local_base_freq') or theta
    scaling = theirs.get('rope_scaling')
    if not scaling:
        scaling = {key: value for key, value in full.items() if key != 'rope_theta'}

    kind = scaling.get('rope_type', scaling.get('type', 'default'))
    scales_local = local is not full and local.get('rope_type', 'default') != 'default'
    if kind not in ROPE or scales_local:
        raise ValueError(f'rope_type={kind!r} is not supported, only default, linear and llama3, '
                         'and for local layers default')
    return float(theta), float(local_theta), [float(scaling[key]) for key in ROPE[kind]]


def kinds_of_layers(depth, global_every):
    """layer_types of a config.json, where of so many layers the last is global."""
    return ['full_attention' if number % global_every == 0 else 'sliding_attention'
            for number in range(1, depth + 1)]


def sliding_layers(theirs):
    """(sliding_window, global_every): of so many layers the last is global. Raises ValueError."""
    depth, window = theirs['num_hidden_layers'], theirs.get('sliding_window')
    every = theirs.get('_sliding_window_pattern') or theirs.get('sliding_window_pattern') or 1
    kinds = theirs.get('layer_types') or kinds_of_layers(depth, every)
    if set(kinds) == {'full_attention'} or not window:
        return 0, 1

    # A list of layers wins over the number that stands beside it.
    for global_every in (every, *range(2, depth + 2)):
        if kinds == kinds_of_layers(depth, global_every):
            return window, global_every
    raise ValueError(f'layer_types={kinds}: expected one global layer after every so many local '
                     'ones')


# ------------------------------------------------------------------------------------------------
# ours to theirs


def to_theirs(config):
    """Our DecoderConfig, ViTConfig or VLMConfig -> a config.json. Raises ValueError, naming what
    no model of transformers has."""
    if isinstance(config, DecoderConfig):
        return export_decoder(config)
    if isinstance(config, ViTConfig):
        return export_vit(config)

    # A VLM is told by its connector, linear with a bias or pixel shuffle without, and its mask.
    if config.connector_bias and config.pixel_shuffle == 1 and config.attends == 'prefix':
        return export_paligemma(config)
    if not config.connector_bias and config.attends == 'causal':
        return export_idefics3(config)
    if config.attends == 'own':
        raise ValueError('pictures and prompt attend as the form of this run says, neither all to '
                         'all (PaliGemma) nor causal (Idefics3), or it can not be asked a prompt: '
                         'no model of transformers does so')
    raise ValueError(
        f'pixel_shuffle={config.pixel_shuffle}, connector_bias={config.connector_bias}, and '
        f'pictures and prompt attend {config.attends}: transformers has PaliGemma (1, True, '
        'prefix) and Idefics3 (any, False, causal)')


def export_paligemma(config):
    """VLMConfig -> the config.json of a PaliGemma. Raises ValueError."""
    decoder = config.decoder
    return dict(
        model_type='paligemma',
        architectures=['PaliGemmaForConditionalGeneration'],
        text_config=export_decoder(decoder, ('gemma', 'gemma2', 'gemma3_text')),
        vision_config=export_vit(config.vit) | dict(projection_dim=decoder.width),
        image_token_index=config.image_token_id,
        projection_dim=decoder.width,
        hidden_size=decoder.width,
        vocab_size=decoder.vocab_size,
        tie_word_embeddings=decoder.tied)


def export_idefics3(config):
    """VLMConfig -> the config.json of an Idefics3. Raises ValueError."""
    return dict(
        model_type='idefics3',
        architectures=['Idefics3ForConditionalGeneration'],
        text_config=export_decoder(config.decoder, ('llama',)),
        image_token_id=config.image_token_id,
        vision_config=export_vit(config.vit, 'idefics3_vision'),
        scale_factor=config.pixel_shuffle,
        vocab_size=config.decoder.vocab_size,
        tie_word_embeddings=config.decoder.tied)


def export_vit(config, kind='siglip_vision_model'):
    """ViTConfig -> the config.json of a tower. Raises ValueError."""
    # Theirs begin with one convolution, and norm the last layer.
    if config.stem != 'patch' or config.feature_layer != -1 or config.hf:
        raise ValueError(f'vit.stem={config.stem!r}, vit.feature_layer={config.feature_layer}, '
                         f'vit.hf={config.hf!r}: transformers has towers with stem patch and '
                         'feature_layer -1 alone')
    return dict(
        model_type=kind,
        architectures=['SiglipVisionModel'],
        hidden_size=config.width, num_hidden_layers=config.depth,
        intermediate_size=config.mlp_dim, num_attention_heads=config.num_heads,
        image_size=config.image_size, patch_size=config.patch_size, num_channels=3,
        hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6,
        vision_use_head=False)


def export_decoder(config, kinds=tuple(ARCHITECTURES)):
    """The config.json of the kind of decoder that computes what ours does: the one that reads back
    as ours. Raises ValueError with the settings that the nearest kind lacks."""
    if config.feature_layer != -1 or config.hf:
        raise ValueError(f'decoder.feature_layer={config.feature_layer}, '
                         f'decoder.hf={config.hf!r}: only a whole decoder of ours can be exported')

    # What we write is read back: no list of what each kind lacks could forget a setting.
    lacking = {}
    for kind in kinds:
        theirs = their_decoder(config, kind)
        lacking[kind] = settings_apart(meaning(decoder_config(theirs)), meaning(config))
        if not lacking[kind]:
            return theirs

    # None of them does: the user learns what to change.
    nearest = min(lacking, key=lambda kind: len(lacking[kind]))
    named = ', '.join(f'decoder.{name}={getattr(config, name)!r}' for name in lacking[nearest])
    raise ValueError(f'no decoder of transformers computes this one; {nearest} would, but for '
                     f'{named}')


def settings_apart(a, b):
    """Names of the fields in which two configs of a kind differ."""
    return [f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)]


def meaning(config):
    """A DecoderConfig with what is written out that a 0 stands for, and without what only training
    looks at."""
    # Without local layers, theirs follows the global one, and nobody reads ours.
    rope_local_theta = config.rope_local_theta if config.sliding_window else config.rope_theta
    scalar = config.query_pre_attn_scalar or float(config.head_dim)
    return replace(config, dropout=0.0, remat=False, max_positions=0, query_pre_attn_scalar=scalar,
                   embed_scale=config.embed_scale or config.width ** 0.5,
                   rope_local_theta=rope_local_theta)


def their_decoder(config, kind):
    """DecoderConfig -> the config.json of a kind of decoder, of what that kind can say."""
    # rope_theta at the top is what releases before 5 read; 5 makes rope_parameters of it.
    activation = THEIR_ACTIVATIONS[config.activation]
    theirs = dict(
        model_type=kind,
        architectures=[ARCHITECTURES[kind]],
        vocab_size=config.vocab_size, hidden_size=config.width,
        intermediate_size=config.mlp_dim, num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied, max_position_embeddings=config.max_positions or LONGEST,
        rope_theta=config.rope_theta, hidden_act=activation)
    if kind.startswith('gemma'):
        theirs['hidden_activation'] = activation

    if config.rope_scaling:
        rope_type = 'linear' if len(config.rope_scaling) == 1 else 'llama3'
        scaling = dict(zip(ROPE[rope_type], config.rope_scaling))
        theirs['rope_scaling'] = scaling | dict(rope_type=rope_type)

    # Where no layer is local, these kinds want a window all the same.
    if kind in ('gemma2', 'gemma3_text'):
        global_every = config.global_every if config.sliding_window else 1
        theirs |= dict(
            query_pre_attn_scalar=whole(config.query_pre_attn_scalar or config.head_dim),
            layer_types=kinds_of_layers(config.depth, global_every),
            sliding_window=config.sliding_window or 4096,
            final_logit_softcapping=config.final_logits_softcap or None,
            attn_logit_softcapping=config.attn_logits_softcap or None)
    if kind == 'gemma3_text':
        theirs['rope_local_base_freq'] = config.rope_local_theta
    return theirs


def whole(number):
    """An int where it is one: transformers refuses 256.0."""
    return int(number) if number == int(number) else number
