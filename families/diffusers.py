"""Folders of diffusers with Stable Diffusion 1 or 2, in and out: unet/, vae/, text_encoder/, scheduler/, tokenizer/.

    unet, vae, text = (diffusers.from_folder(folder, part) for part in diffusers.MODELS)
    settings, tok, model = diffusers.load_run(folder)              all of it, a diffusion.TextToImage

Nothing that comes with a model is run or unpickled: .safetensors and .json alone are read.
"""
import math
import os
import re
import shutil
from dataclasses import fields

import torch
from safetensors import SafetensorError

import hub
import tokenizer as tokenizers
from checkpoint import write_json
from images.dit import DiTConfig
from images.sd import AutoencoderKL, CLIPText, CLIPTextConfig, UNet2DCondition, UNetConfig, VAEConfig, build, schedule_of
from tokenizer import read_json

# ----------------------------------------------------------------------------------------------------------------------
# settings: theirs, ours, and what we do not compute

MODELS = {'unet': (UNet2DCondition, UNetConfig), 'vae': (AutoencoderKL, VAEConfig),
          'text_encoder': (CLIPText, CLIPTextConfig)}
SETTINGS = {'unet': 'unet', 'clip': 'text_encoder', 'vae': 'vae'}       # of train.py
INSIDE = {'denoiser': 'unet', 'text': 'text_encoder', 'vae': 'vae'}     # of a TextToImage
STEMS = {'unet': 'diffusion_pytorch_model', 'vae': 'diffusion_pytorch_model', 'text_encoder': 'model'}
# what a config.json may leave out
DEFAULTS = {
    'unet': dict(in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2,
                 attention_head_dim=8, cross_attention_dim=1280, use_linear_projection=False, norm_num_groups=32,
                 norm_eps=1e-5, down_block_types=['CrossAttnDownBlock2D'] * 3 + ['DownBlock2D']),
    'vae': dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=[64], layers_per_block=1,
                norm_num_groups=32, scaling_factor=0.18215),
    'text_encoder': dict(vocab_size=49408, hidden_size=512, num_hidden_layers=12, intermediate_size=2048,
                         num_attention_heads=8, max_position_embeddings=77, hidden_act='quick_gelu',
                         layer_norm_eps=1e-5)}
TEXT = dict(vocab_size='vocab_size', width='hidden_size', depth='num_hidden_layers', mlp_dim='intermediate_size',
            num_heads='num_attention_heads', max_length='max_position_embeddings', activation='hidden_act',
            norm_eps='layer_norm_eps')
# settings that change what is computed, and the values with which we compute the same
ONLY = {
    'unet': dict.fromkeys((
        'num_attention_heads', 'class_embed_type', 'addition_embed_type', 'num_class_embeds', 'time_embedding_dim',
        'time_embedding_act_fn', 'timestep_post_act', 'time_cond_proj_dim', 'cross_attention_norm', 'encoder_hid_dim',
        'encoder_hid_dim_type', 'reverse_transformer_layers_per_block'), (None,)) | dict.fromkeys((
            'center_input_sample', 'only_cross_attention', 'dual_cross_attention', 'resnet_skip_time_act',
            'class_embeddings_concat', 'mid_block_only_cross_attention'), (False, None)) | dict(
        flip_sin_to_cos=(True,), freq_shift=(0,), mid_block_type=('UNetMidBlock2DCrossAttn',), downsample_padding=(1,),
        mid_block_scale_factor=(1,), dropout=(0,), act_fn=('silu', 'swish'), transformer_layers_per_block=(1,),
        resnet_time_scale_shift=('default',), resnet_out_scale_factor=(1,), time_embedding_type=('positional',),
        conv_in_kernel=(3,), conv_out_kernel=(3,), attention_type=('default',)),
    'vae': dict(act_fn=('silu', 'swish'), shift_factor=(None, 0), latents_mean=(None,), latents_std=(None,),
                use_quant_conv=(True,), use_post_quant_conv=(True,), mid_block_add_attention=(True,)),
    'text_encoder': dict(model_type=('clip_text_model',), attention_dropout=(0,), use_attention_mask=(False, None))}


def to_config(theirs, part):
    """A config.json of a part -> UNetConfig, VAEConfig or CLIPTextConfig. Raises ValueError for what we do not
    compute."""
    c = DEFAULTS[part] | theirs
    for key, values in ONLY[part].items():
        if key in c and c[key] not in values:
            raise ValueError(f'{key}={c[key]!r} is not supported, only {" or ".join(map(repr, values))}: such a model '
                             'is not Stable Diffusion 1 or 2')
    if part == 'text_encoder':
        return checked(CLIPTextConfig, {ours: c[key] for ours, key in TEXT.items()})
    n = len(c['block_out_channels']) if isinstance(c['block_out_channels'], list) else 0
    kinds = {'vae': (['DownEncoderBlock2D'], ['UpDecoderBlock2D']), 'unet': (
        ['CrossAttnDownBlock2D', 'DownBlock2D'], ['CrossAttnUpBlock2D', 'UpBlock2D'])}[part]
    down = c.get('down_block_types', ['DownEncoderBlock2D'] * n)
    up = c.get('up_block_types', [kinds[1][kinds[0].index(kind)] for kind in reversed(down) if kind in kinds[0]])
    mirrored = [kinds[1][kinds[0].index(kind)] for kind in reversed(down) if kind in kinds[0]]
    if len(down) != n or up != mirrored or len(mirrored) != n:
        raise ValueError(f'down_block_types={down}, up_block_types={up}: expected {n} of {" and ".join(kinds[0])}, and '
                         f'{" and ".join(kinds[1])} in the reverse order')
    c['block_out_channels'] = tuple(c['block_out_channels'])
    if part == 'vae':
        return checked(VAEConfig, c)
    heads = c['attention_head_dim']
    return checked(UNetConfig, c | dict(
        num_heads=tuple(heads) if isinstance(heads, list) else (heads,) * n, remat=False,
        cross_attention=tuple(kind == kinds[0][0] for kind in down)))


def checked(kind, values):
    """The dataclass of these settings. Raises ValueError where one is of another type or size than any model has."""
    def fits(value, default):
        if isinstance(default, tuple):
            return isinstance(value, tuple) and all(fits(v, default[0]) for v in value)
        if type(default) is int:
            return type(value) is int and (0 < value < 1 << 20)
        return isinstance(value, type(default)) or type(default) is float and type(value) is int

    known = {f.name: values[f.name] for f in fields(kind) if f.name in values}
    for f in fields(kind):
        if f.name in known and not fits(known[f.name], f.default):
            raise ValueError(f'{f.name}={known[f.name]!r}: expected something like {f.default!r}')
    return kind(**known)


def with_schedule(config, theirs):
    """A UNetConfig with the schedule of a scheduler_config.json: for DDIM, as DDIMScheduler.from_config and
    StableDiffusionPipeline make it of any class, PNDM's too, whose betas it is. Raises ValueError."""
    c = dict(beta_schedule='linear', beta_start=1e-4, beta_end=0.02, set_alpha_to_one=True) | theirs
    for key, values in dict(trained_betas=(None,), thresholding=(False,), use_flow_sigmas=(False, None)).items():
        if key in c and c[key] not in values:
            raise ValueError(f'{key}={c[key]!r} is not supported, only {" or ".join(map(repr, values))}')
    if 'FlowMatch' in str(c.get('_class_name')):
        raise ValueError(f'_class_name={c["_class_name"]!r}: Stable Diffusion 1 and 2 have no flow matching')
    keys = ('beta_schedule', 'beta_start', 'beta_end', 'num_train_timesteps', 'prediction_type', 'timestep_spacing',
            'set_alpha_to_one', 'rescale_betas_zero_snr')
    config = checked(UNetConfig, {f.name: c[f.name] if f.name in keys and f.name in c else getattr(config, f.name)
                                  for f in fields(config)})
    schedule_of(config)         # which may refuse it
    return config


def their_config(config, part):
    """Our settings of a part as its config.json."""
    ours = {f.name: getattr(config, f.name) for f in fields(config)}
    if part == 'text_encoder':
        return dict(architectures=['CLIPTextModel'], model_type='clip_text_model') | {
            key: ours[name] for name, key in TEXT.items()}
    n = len(config.block_out_channels)
    if part == 'vae':
        return dict(_class_name='AutoencoderKL', down_block_types=['DownEncoderBlock2D'] * n,
                    up_block_types=['UpDecoderBlock2D'] * n) | ours
    attends, heads = ours.pop('cross_attention'), ours.pop('num_heads')
    ours = {key: value for key, value in ours.items() if key in DEFAULTS['unet']}
    return dict(_class_name='UNet2DConditionModel', attention_head_dim=list(heads),
                down_block_types=['CrossAttnDownBlock2D' if a else 'DownBlock2D' for a in attends],
                up_block_types=['CrossAttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(attends)]) | ours


def is_folder(path):
    """Is it a folder of diffusers with Stable Diffusion's parts?"""
    return all(os.path.isfile(os.path.join(path, part, 'config.json')) for part in MODELS)


def read_config(folder, part):
    """Our settings of a part of a folder; the U-Net's hold its schedule, too, if there is one. Raises ValueError."""
    path = os.path.join(folder, part, 'config.json')
    try:
        config = to_config(read_json(path), part)
        path = os.path.join(folder, 'scheduler', 'scheduler_config.json')
        return with_schedule(config, read_json(path)) if part == 'unet' and os.path.exists(path) else config
    except FileNotFoundError:
        raise ValueError(f'{folder!r} has no {part}/config.json: it is no folder of diffusers') from None
    except (ValueError, TypeError) as error:
        raise ValueError(f'{path}: {error}') from None


# ----------------------------------------------------------------------------------------------------------------------
# tensors, in and out

OLD_VAE = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}       # as SD 1's folders have them


def their_name(name, part):
    """The name of our tensor in a folder. (transformers 5 leaves out `text_model.`, but reads it.)"""
    if part != 'text_encoder':
        return name
    if match := re.fullmatch(r'blocks\.(\d+)\.(\w+)\.(\w+)', name):
        return f'text_model.encoder.layers.{match[1]}.{hub.VIT_BLOCK[match[2]]}.{match[3]}'
    top = {'embedding': 'embeddings.token_embedding', 'pos_embed': 'embeddings.position_embedding',
           'norm': 'final_layer_norm'}
    return f'text_model.{top[name.partition(".")[0]]}.{name.rpartition(".")[2]}'


def canonical(name, part):
    """A name in a folder -> as `their_name` writes it."""
    if part == 'vae':
        return re.sub(r'(?<=attentions\.0\.)(query|key|value|proj_attn)(?=\.)', lambda m: OLD_VAE[m[0]], name)
    return 'text_model.' + name.removeprefix('text_model.') if part == 'text_encoder' else name


def tensors(shapes, folder, part, skip=()):
    """Yield (our name, tensor) of a part of a folder, one at a time, for `shapes` {our name: shape}, but for names in
    which a regex of `skip` is found. Raises ValueError where a tensor is missing, unknown or of another shape."""
    files = hub.files_of(os.path.join(folder, part), STEMS[part])
    theirs = {canonical(name, part): name for name in files}
    ours = {their_name(name, part): name for name in shapes}
    built = {hub.layer_of('text.' + key.removeprefix('text_model.')) for key in ours}    # none after feature_layer
    extra = [theirs[key] for key in theirs if key not in ours and not key.endswith('.position_ids')
             and hub.layer_of('text.' + key.removeprefix('text_model.')) in built]
    if missing := [key for key in ours if key not in theirs] or extra:
        raise ValueError(f'{folder}/{part} holds another model than its config.json says: {", ".join(missing[:3])} is '
                         f'{"not known here" if missing is extra else "missing"}')
    opened = {}
    for key in sorted(ours, key=lambda key: (files[theirs[key]], key)):
        name, path = ours[key], files[theirs[key]]
        if any(re.search(regex, name) for regex in skip):
            continue
        if path not in opened:
            opened = {path: hub.opened(path)}
        try:
            tensor = opened[path].get_tensor(theirs[key])
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f'{path}: {theirs[key]} can not be read ({error})') from None
        if part == 'vae' and '.attentions.' in name and tensor.numel() == math.prod(shapes[name]):
            tensor = tensor.view(shapes[name])          # once a convolution of one pixel
        if tensor.shape != shapes[name]:
            raise ValueError(f'{path}: {theirs[key]} is {tuple(tensor.shape)}, its config.json says '
                             f'{tuple(shapes[name])}')
        yield name, tensor


def from_folder(folder, part, dtype=torch.float32, config=None):
    """A part of a folder of diffusers: unet, vae or text_encoder. config: settings to use instead of its own, such as
    another feature_layer. Raises ValueError."""
    config = config or read_config(folder, part)
    with torch.device('meta'):                  # nothing is allocated before a file is known to hold it
        model = MODELS[part][0](config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in tensors(shapes, folder, part)},
                          assign=True)
    return model.to(memory_format=torch.channels_last).eval()


def export(models, folder, source, dtype=torch.float32):
    """Write a folder of diffusers: `models` {part: model}, the other parts, schedule and tokenizer copied from the
    folder `source`. In fp32 the same bits. Raises ValueError."""
    if not is_folder(source) or os.path.abspath(source) == os.path.abspath(folder):
        raise ValueError(f'source={source!r}: expected another folder of diffusers, with {", ".join(MODELS)}')
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=lambda path, names: [
        name for name in names if os.path.relpath(os.path.join(path, name), source) in models
        or name.startswith('.') or name.endswith(('.bin', '.ckpt', '.pt', '.pth', '.md'))])
    for part, model in models.items():
        out = {their_name(name, part): tensor.detach().to('cpu', dtype).contiguous()
               for name, tensor in model.state_dict().items()}
        hub.write_tensors(out, os.path.join(folder, part), STEMS[part])
        kept = read_json(os.path.join(source, part, 'config.json'))         # sample_size and what else is not computed
        write_json(os.path.join(folder, part, 'config.json'), kept | their_config(model.config, part))


# ----------------------------------------------------------------------------------------------------------------------
# a whole folder


def settings_of(folder):
    """Our settings of all that is in a folder, as train.py has them: {'unet.norm_eps': 1e-5, ...}. Raises
    ValueError."""
    found = {name: read_config(folder, part) for name, part in SETTINGS.items()}
    size = read_json(os.path.join(folder, 'unet', 'config.json')).get('sample_size') or 64
    if type(size) is not int:
        raise ValueError(f'{folder}/unet/config.json: sample_size={size!r}: expected the side of a square')
    return {'task': 't2i', 'denoiser': 'unet', 'seq_len': found['clip'].max_length, 'dit.image_size': size} | {
        f'{name}.{f.name}': getattr(c, f.name) for name, c in found.items() for f in fields(c)
        if f.name not in ('remat', 'feature_layer')}


def load_run(folder):
    """(settings, tokenizer, model with its weights) of a folder, as checkpoint.load_run gives them of a run. Raises
    ValueError."""
    run = dict(prompt='', image_mean=0.5, image_std=0.5, folder=folder) | settings_of(folder)
    tok = tokenizers.load(os.path.join(folder, 'tokenizer'))
    dit = DiTConfig(image_size=run['dit.image_size'])
    unet, vae, text = (from_folder(folder, part) for part in MODELS)
    return run, tok, build(dit, unet, text, vae, tokenizers.clip_row(tok, '', run['seq_len'])).eval()


def whole(model, folder, skip=()):
    """Yield (our name, tensor) of all parts of a TextToImage."""
    for name, part in INSIDE.items():
        shapes = {key: tensor.shape for key, tensor in getattr(model, name).state_dict().items()}
        inside = [regex for regex in skip if re.search(regex, name + '.')]
        for key, tensor in () if inside else tensors(shapes, folder, part):
            if not any(re.search(regex, f'{name}.{key}') for regex in skip):
                yield f'{name}.{key}', tensor


def check_same(folder, theirs, ours):
    """Raises ValueError where `theirs`, settings of a folder, are not those of `ours` {'vae': its config, ...}."""
    different = [f'{key}={value!r} (here {here!r})' for key, value in theirs.items() if '.' in key
                 and (part := key.partition('.'))[0] in ours
                 and to_list(here := getattr(ours[part[0]], part[2])) != to_list(value)]
    if different:
        raise ValueError(f'{folder!r} has {", ".join(different)}: python hub.py config {folder} prints all of its '
                         'settings')


def autoencoder(folder, config):
    """The AutoencoderKL of a folder, which has to be as `config` says. Raises ValueError."""
    theirs = read_config(folder, 'vae')
    check_same(folder, {f'vae.{f.name}': getattr(theirs, f.name) for f in fields(theirs)}, {'vae': config})
    return from_folder(folder, 'vae')


def load(model, folder, skip=()):
    """Copy a folder's weights into a TextToImage of the same settings: the names that were loaded. Raises
    ValueError."""
    if not isinstance(getattr(model, 'denoiser', None), UNet2DCondition):
        raise ValueError(f'{folder!r} is Stable Diffusion: it begins a run of task=t2i with denoiser=unet')
    check_same(folder, settings_of(folder), {'unet': model.denoiser.config, 'clip': model.text.config,
                                             'vae': model.vae.config})
    return hub.copy_into(model, whole(model, folder, skip))


def export_run(settings, model, folder, dtype=torch.float32):
    """A run of Stable Diffusion as a folder of diffusers: schedule, tokenizer and what else is there are those of the
    folder that it began with. Raises ValueError."""
    source = settings['init_from']
    if settings.get('denoiser') != 'unet' or not is_folder(source):
        raise ValueError(f'denoiser={settings.get("denoiser")}, init_from={source!r}: of task=t2i, runs of '
                         'denoiser=unet can be exported that began with a folder of diffusers')
    parts = {part: getattr(model, name) for name, part in INSIDE.items()}
    if len(model.text.blocks) < model.text.config.depth:        # feature_layer: the tower is not whole
        del parts['text_encoder']
    export(parts, folder, source, dtype)


def to_list(value):
    return list(value) if isinstance(value, tuple) else value
