"""Folders of diffusers with Stable Diffusion 1 or 2, in and out: unet/, vae/, text_encoder/,
scheduler/, tokenizer/.

    unet, vae, text = (diffusers.from_folder(folder, part) for part in diffusers.MODELS)
    settings, tok, model = diffusers.load_run(folder)       all of it, an images.dit.TextToImage

Nothing that comes with a model is run or unpickled: .safetensors and .json alone are read.
"""
import math
import os
import re
import shutil
from collections import Counter
from dataclasses import fields

import torch

import processor as processors
import tasks
import tokenizer as tokenizers
from accounting import Account, copy_into, counted, is_skipped, listed, say
from checkpoint import Run, write_json
from families.files import (
    beside,
    files_of,
    layer_of,
    opened,
    remove,
    tensor_of,
    write_tensors,
)
from families.huggingface import FOLLOWS, VIT_BLOCK
from images.clip import CLIPText, CLIPTextConfig
from images.dit import DiTConfig
from images.sd import UNet2DCondition, UNetConfig, build, schedule_of
from images.vae import AutoencoderKL, VAEConfig
from tokenizer import read_json
from vocabularies.clip import clip_row

# a folder's parts
MODELS = {
    'unet': (UNet2DCondition, UNetConfig),
    'vae': (AutoencoderKL, VAEConfig),
    'text_encoder': (CLIPText, CLIPTextConfig)}

# how the files of their weights are named
STEMS = {
    'unet': 'diffusion_pytorch_model',
    'vae': 'diffusion_pytorch_model',
    'text_encoder': 'model'}

# names the parts for diffusers, which begins with it
INDEX = 'model_index.json'

# what they are called among train.py's settings, and inside of a TextToImage
SETTINGS = {'unet': 'unet', 'clip': 'text_encoder', 'vae': 'vae'}
INSIDE = {'denoiser': 'unet', 'text': 'text_encoder', 'vae': 'vae'}

# -------------------------------------------------------------------------------------------------
# settings: theirs, ours, and what we do not compute

# what a config.json may leave out
DEFAULTS = {
    'unet': dict(
        in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280, 1280],
        layers_per_block=2, attention_head_dim=8, cross_attention_dim=1280,
        use_linear_projection=False, norm_num_groups=32, norm_eps=1e-5,
        down_block_types=['CrossAttnDownBlock2D'] * 3 + ['DownBlock2D']),
    'vae': dict(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=[64],
        layers_per_block=1, norm_num_groups=32, scaling_factor=0.18215),
    'text_encoder': dict(
        vocab_size=49408, hidden_size=512, num_hidden_layers=12, intermediate_size=2048,
        num_attention_heads=8, max_position_embeddings=77, hidden_act='quick_gelu',
        layer_norm_eps=1e-5)}

# our name of a text tower's setting -> theirs; of the other parts we have diffusers' names
TEXT = {
    'vocab_size': 'vocab_size',
    'width': 'hidden_size',
    'depth': 'num_hidden_layers',
    'mlp_dim': 'intermediate_size',
    'num_heads': 'num_attention_heads',
    'max_length': 'max_position_embeddings',
    'activation': 'hidden_act',
    'norm_eps': 'layer_norm_eps'}

# what of a scheduler_config.json a UNetConfig holds
SCHEDULE = (
    'beta_schedule', 'beta_start', 'beta_end', 'num_train_timesteps', 'prediction_type',
    'timestep_spacing', 'set_alpha_to_one', 'rescale_betas_zero_snr')

# levels on the way down -> what mirrors them on the way up
MIRRORS = {
    'unet': {'CrossAttnDownBlock2D': 'CrossAttnUpBlock2D', 'DownBlock2D': 'UpBlock2D'},
    'vae': {'DownEncoderBlock2D': 'UpDecoderBlock2D'}}

# settings that change what is computed, and the values with which we compute the same
ONLY = {
    'unet': {
        # it would win over attention_head_dim, which says the number of heads in spite of its name
        'num_attention_heads': (None,),

        # other conditions than a text and a time: classes, SDXL's sizes, a second text
        'class_embed_type': (None,),
        'addition_embed_type': (None,),
        'num_class_embeds': (None,),
        'class_embeddings_concat': (False, None),
        'encoder_hid_dim': (None,),
        'encoder_hid_dim_type': (None,),

        # other times
        'time_embedding_type': ('positional',),
        'flip_sin_to_cos': (True,),
        'freq_shift': (0,),
        'time_embedding_dim': (None,),
        'time_embedding_act_fn': (None,),
        'timestep_post_act': (None,),
        'time_cond_proj_dim': (None,),

        # other attention: SDXL's has several blocks a level
        'transformer_layers_per_block': (1,),
        'reverse_transformer_layers_per_block': (None,),
        'attention_type': ('default',),
        'cross_attention_norm': (None,),
        'only_cross_attention': (False, None),
        'dual_cross_attention': (False, None),
        'mid_block_only_cross_attention': (False, None),

        # other convolutions and residual blocks
        'center_input_sample': (False, None),
        'conv_in_kernel': (3,),
        'conv_out_kernel': (3,),
        'downsample_padding': (1,),
        'resnet_skip_time_act': (False, None),
        'resnet_time_scale_shift': ('default',),
        'resnet_out_scale_factor': (1,),
        'mid_block_type': ('UNetMidBlock2DCrossAttn',),
        'mid_block_scale_factor': (1,),
        'dropout': (0,),
        'act_fn': ('silu', 'swish')},
    'vae': {
        'act_fn': ('silu', 'swish'),

        # SD 3's and SDXL's autoencoders
        'shift_factor': (None, 0),
        'latents_mean': (None,),
        'latents_std': (None,),
        'use_quant_conv': (True,),
        'use_post_quant_conv': (True,),
        'mid_block_add_attention': (True,)},
    'text_encoder': {
        'model_type': ('clip_text_model',),
        'attention_dropout': (0,),
        'use_attention_mask': (False, None)},

    # whatever class a schedule is of, its betas are what is read
    'scheduler': {
        'trained_betas': (None,),
        'thresholding': (False,),
        'use_flow_sigmas': (False, None)}}


def check_only(theirs, part, remark=''):
    """Raises ValueError for a setting of theirs that changes what is computed."""
    for key, values in ONLY[part].items():
        if key in theirs and theirs[key] not in values:
            allowed = ' or '.join(map(repr, values))
            raise ValueError(f'{key}={theirs[key]!r} is not supported, only {allowed}{remark}')


def to_config(theirs, part):
    """A config.json of a part -> UNetConfig, VAEConfig or CLIPTextConfig. Raises ValueError for
    what we do not compute."""
    c = DEFAULTS[part] | theirs
    check_only(c, part, ': such a model is not Stable Diffusion 1 or 2')
    if part == 'text_encoder':
        return checked(CLIPTextConfig, {ours: c[key] for ours, key in TEXT.items()})

    # all that differs from level to level is a tuple here
    widths = c['block_out_channels']
    num_levels = len(widths) if isinstance(widths, list) else 0
    down = levels_down(c, part, num_levels)
    c['block_out_channels'] = tuple(widths)
    if part == 'vae':
        return checked(VAEConfig, c)

    # what diffusers calls attention_head_dim is the number of heads, of all levels or of each
    heads = c['attention_head_dim']
    if not isinstance(heads, list):
        heads = [heads] * num_levels
    c['num_heads'] = tuple(heads)
    c['cross_attention'] = tuple(kind == 'CrossAttnDownBlock2D' for kind in down)
    c['remat'] = False
    return checked(UNetConfig, c)


def levels_down(c, part, num_levels):
    """What kind each level on the way down is. Raises ValueError for one that is not known, or
    where the way up is not its mirror."""
    mirror = MIRRORS[part]
    down = c.get('down_block_types', ['DownEncoderBlock2D'] * num_levels)
    mirrored = [mirror[kind] for kind in reversed(down) if kind in mirror]
    up = c.get('up_block_types', mirrored)

    # what is not known has no mirror, so that there are fewer of them
    if len(down) != num_levels or len(mirrored) != num_levels or up != mirrored:
        raise ValueError(f'down_block_types={down}, up_block_types={up}: expected {num_levels} of '
                         f'{" and ".join(mirror)}, and {" and ".join(mirror.values())} in the '
                         'reverse order')
    return down


def is_like(value, default):
    """Is a setting of the default's type, and of a size that a model has?"""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(is_like(v, default[0]) for v in value)
    if type(default) is int:
        return type(value) is int and 0 < value < 1 << 20
    # a number of JSON has no kind: 1 may be meant as 1.0
    if type(default) is float and type(value) is int:
        return True
    return isinstance(value, type(default))


def checked(kind, values):
    """The dataclass of these settings, of which others are left out. Raises ValueError where one
    is of another type or size than any model has."""
    known = {}
    for field in fields(kind):
        if field.name not in values:
            continue
        value = values[field.name]
        if not is_like(value, field.default):
            raise ValueError(
                f'{field.name}={value!r}: expected something like {field.default!r}')
        known[field.name] = value
    return kind(**known)


def with_schedule(config, theirs):
    """A UNetConfig with the schedule of a scheduler_config.json: for DDIM, as
    DDIMScheduler.from_config and StableDiffusionPipeline make it of any class, PNDM's too, whose
    betas it is. Raises ValueError."""
    defaults = dict(beta_schedule='linear', beta_start=1e-4, beta_end=0.02, set_alpha_to_one=True)
    c = defaults | theirs
    check_only(c, 'scheduler')

    # Stable Diffusion 3 has folders of the same form
    if 'FlowMatch' in str(c.get('_class_name')):
        raise ValueError(
            f'_class_name={c["_class_name"]!r}: Stable Diffusion 1 and 2 have no flow matching')

    given = {key: c[key] for key in SCHEDULE if key in c}
    config = checked(UNetConfig, vars(config) | given)

    # which may refuse it
    schedule_of(config)
    return config


def their_config(config, part):
    """Our settings of a part as its config.json."""
    ours = dict(vars(config))
    if part == 'text_encoder':
        theirs = {key: ours[name] for name, key in TEXT.items()}
        return dict(architectures=['CLIPTextModel'], model_type='clip_text_model') | theirs

    # diffusers keeps the kinds of levels, and asserts that there are as many as widths
    if part == 'vae':
        num_levels = len(config.block_out_channels)
        return dict(
            _class_name='AutoencoderKL', down_block_types=['DownEncoderBlock2D'] * num_levels,
            up_block_types=['UpDecoderBlock2D'] * num_levels) | ours

    down = ['CrossAttnDownBlock2D' if attends else 'DownBlock2D'
            for attends in config.cross_attention]
    up = [MIRRORS['unet'][kind] for kind in reversed(down)]
    theirs = {key: value for key, value in ours.items() if key in DEFAULTS['unet']}
    return dict(
        _class_name='UNet2DConditionModel', attention_head_dim=list(config.num_heads),
        down_block_types=down, up_block_types=up) | theirs


def is_folder(path):
    """Is it a folder of diffusers with Stable Diffusion's parts?"""
    return all(os.path.isfile(os.path.join(path, part, 'config.json')) for part in MODELS)


def read_config(folder, part):
    """Our settings of a part of a folder; the U-Net's hold its schedule, too, if there is one.
    Raises ValueError."""
    path = os.path.join(folder, part, 'config.json')
    schedule = os.path.join(folder, 'scheduler', 'scheduler_config.json')
    try:
        config = to_config(read_json(path), part)
        # an error from here on is the other file's
        if part == 'unet' and os.path.exists(schedule):
            path = schedule
            config = with_schedule(config, read_json(path))
        return config
    except FileNotFoundError:
        raise ValueError(
            f'{folder!r} has no {part}/config.json: it is no folder of diffusers') from None
    except (ValueError, TypeError) as error:
        raise ValueError(f'{path}: {error}') from None


# -------------------------------------------------------------------------------------------------
# tensors, in and out

# as the autoencoders of SD 1's folders have them
OLD_VAE = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}

# what of a text tower is in no block
TEXT_TOP = {
    'embedding': 'embeddings.token_embedding',
    'pos_embed': 'embeddings.position_embedding',
    'norm': 'final_layer_norm'}


def their_name(name, part):
    """The name of our tensor in a folder."""
    if part != 'text_encoder':
        return name

    # transformers 5 leaves out `text_model.`, but reads it
    if match := re.fullmatch(r'blocks\.(\d+)\.(\w+)\.(\w+)', name):
        number, module, tensor = match.groups()
        return f'text_model.encoder.layers.{number}.{VIT_BLOCK[module]}.{tensor}'
    module, _, tensor = name.partition('.')
    return f'text_model.{TEXT_TOP[module]}.{tensor}'


def canonical(name, part):
    """A name in a folder -> as `their_name` writes it."""
    if part == 'text_encoder':
        return 'text_model.' + name.removeprefix('text_model.')

    # between what is the same in old names and in new ones
    if part == 'vae':
        old = r'(?<=attentions\.0\.)(query|key|value|proj_attn)(?=\.)'
        return re.sub(old, lambda match: OLD_VAE[match[0]], name)
    return name


def block_of(key):
    """What says the block of a text tower's canonical name, '' of what is in none."""
    return layer_of('text.' + key.removeprefix('text_model.'))


def check_names(theirs, ours, where, depth, account):
    """Account for what of a folder's canonical names, {name: the file's}, we have no use for.
    Raises ValueError where something is missing, or not known here. depth: of its text tower."""
    missing = [key for key in ours if key not in theirs]
    if missing:
        raise ValueError(f'{where} holds another model than its config.json says: '
                         f'{listed(missing)} is missing')

    # A tower that ends with its feature_layer has no use for the blocks after it, of which there
    # are so many as its config.json says.
    built = {block_of(key) for key in ours}
    unknown = []
    for key, name in theirs.items():
        block = block_of(key)
        if key in ours:
            continue
        # Positions count from 0: old folders have them as a tensor.
        if key.endswith('.position_ids'):
            account.needless[name] = FOLLOWS
        elif not block or block in built or int(block.split('.')[-2]) >= depth:
            unknown.append(name)
        else:
            account.unused[where] += 1
    if unknown:
        raise ValueError(f'{where} holds another model than its config.json says: '
                         f'{listed(unknown)} is not known here')


def tensors(shapes, folder, part, account, skip=()):
    """Yield (our name, tensor) of a part of a folder, one at a time, for `shapes` {our name:
    shape}, but for names of `skip`. Raises ValueError where a tensor is missing, unknown or of
    another shape."""
    files = files_of(os.path.join(folder, part), STEMS[part])
    theirs = {canonical(name, part): name for name in files}
    if len(theirs) < len(files):
        twice = files.keys() - theirs.values()
        raise ValueError(f'{folder}/{part} has {listed(sorted(twice))} under two names')
    ours = {their_name(name, part): name for name in shapes}

    # what is skipped may be there or not
    for key, name in list(ours.items()):
        if name in skip:
            del ours[key]
            if theirs.pop(key, ''):
                account.unused[part] += 1
    depth = getattr(read_config(folder, part), 'depth', 0)
    check_names(theirs, ours, f'{folder}/{part}', depth, account)

    # file by file, so that one is open at a time
    open_path, open_file = '', None
    for key in sorted(ours, key=lambda key: (files[theirs[key]], key)):
        name, their = ours[key], theirs[key]
        path, shape = files[their], shapes[name]
        if path != open_path:
            open_path, open_file = path, opened(path)
        tensor = tensor_of(open_file, their, path)

        # once a convolution of one pixel
        if part == 'vae' and '.attentions.' in name and tensor.numel() == math.prod(shape):
            tensor = tensor.view(shape)
        if tensor.shape != shape:
            raise ValueError(f'{path}: {their} is {tuple(tensor.shape)}, its config.json says '
                             f'{tuple(shape)}')
        yield name, tensor


def others_in(folder):
    """Counter {part: tensors} of what else a folder holds, such as a safety_checker."""
    found = Counter()
    for part in sorted(os.listdir(folder)):
        path = os.path.join(folder, part)
        if part not in MODELS and os.path.isdir(path):
            found[part] = beside(path, ()).total()
    return +found


def shapes_of(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def from_folder(folder, part, dtype=torch.float32, config=None):
    """A part of a folder of diffusers: unet, vae or text_encoder. config: settings to use instead
    of its own, such as another feature_layer. Raises ValueError."""
    config = config or read_config(folder, part)

    # nothing is allocated before a file is known to hold it
    kind, _ = MODELS[part]
    with torch.device('meta'):
        model = kind(config)

    # copied, for what safetensors gives may be a view of the file
    loaded, account = {}, Account()
    for name, tensor in tensors(shapes_of(model), folder, part, account):
        loaded[name] = tensor.to(dtype, copy=True)
    model.load_state_dict(loaded, assign=True)
    if not account.is_whole():
        say(f'{folder}/{part}: {len(loaded)} tensors loaded, {account.left()}')

    # convolutions draw faster so
    return model.to(memory_format=torch.channels_last).eval()


def export_parts(models, folder, source, dtype=torch.float32):
    """Write a folder of diffusers: `models` {part: model}, the other parts, schedule and tokenizer
    copied from the folder `source`. In fp32 the same bits. Raises ValueError."""
    if not is_folder(source) or os.path.abspath(source) == os.path.abspath(folder):
        raise ValueError(f'source={source!r}: expected another folder of diffusers, with '
                         f'{", ".join(MODELS)}')

    def not_copied(path, names):
        """The parts that are written anew, pickles, and what a download leaves beside."""
        beside = ('.bin', '.ckpt', '.pt', '.pth', '.md')
        left = []
        for name in names:
            is_anew = os.path.relpath(os.path.join(path, name), source) in (*models, INDEX)
            if is_anew or name.startswith('.') or name.endswith(beside):
                left.append(name)
        return left

    # these go last, and what is written over has none meanwhile: a folder without is no model
    for name in (INDEX, *(f'{part}/config.json' for part in models)):
        remove(os.path.join(folder, name))
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=not_copied)
    for part, model in models.items():
        out = {}
        for name, tensor in model.state_dict().items():
            out[their_name(name, part)] = tensor.detach().to('cpu', dtype).contiguous()
        write_tensors(out, os.path.join(folder, part), STEMS[part])

        # sample_size and what else is not computed with stays
        kept = read_json(os.path.join(source, part, 'config.json'))
        settings = kept | their_config(model.config, part)
        write_json(os.path.join(folder, part, 'config.json'), settings)
    if os.path.exists(os.path.join(source, INDEX)):
        write_json(os.path.join(folder, INDEX), read_json(os.path.join(source, INDEX)))


# -------------------------------------------------------------------------------------------------
# a whole folder


def settings_of(folder):
    """Our settings of all that is in a folder, as train.py has them: {'unet.norm_eps': 1e-5, ...}.
    Raises ValueError."""
    configs = {name: read_config(folder, part) for name, part in SETTINGS.items()}

    # rows of a latent, 64 in Stable Diffusion 1
    path = os.path.join(folder, 'unet', 'config.json')
    size = read_json(path).get('sample_size') or 64
    if type(size) is not int:
        raise ValueError(f'{path}: sample_size={size!r}: expected the side of a square')
    settings = {
        'task': 't2i', 'denoiser': 'unet', 'seq_len': configs['clip'].max_length,
        'dit.image_size': size}

    # all but what a user chooses
    for part, config in configs.items():
        for key, value in vars(config).items():
            if key not in ('remat', 'feature_layer'):
                settings[f'{part}.{key}'] = value
    return settings


def open_run(folder, device='cpu', ema=True):
    """The Run of a folder, to draw with. Raises ValueError."""
    defaults = tasks.defaults('t2i')
    settings = defaults | dict(processor='auto', seed=0) | settings_of(folder)
    tok = tokenizers.load(os.path.join(folder, 'tokenizer'))
    dit = DiTConfig(image_size=settings['dit.image_size'])
    unet, vae, text = (from_folder(folder, part) for part in MODELS)
    if others := others_in(folder):
        say(f'{folder}: {counted(others)} left there unused')
    empty = clip_row(tok, '', settings['seq_len'])
    model = build(dit, unet, text, vae, empty).to(device).eval()
    task = tasks.load('t2i')
    processor = processors.build(settings, tok, task, 0)
    return Run(task, settings, tok, model, processor, device, folder)


def whole(model, folder, skip, account, places):
    """Yield (our name, tensor) of all parts of a TextToImage, {what its names begin with: part},
    but for names in which a regex of `skip` is found."""
    account.unused += others_in(folder)
    ours = shapes_of(model)
    for name, part in places.items():
        shapes = {key.removeprefix(f'{name}.'): shape for key, shape in ours.items()
                  if key.startswith(f'{name}.')}
        # a part that is skipped as a whole may be missing there, or be of another shape
        if not shapes or is_skipped(name + '.', skip):
            account.unused += Counter({part: beside(os.path.join(folder, part), ()).total()})
            continue
        skipped = {key for key in shapes if is_skipped(f'{name}.{key}', skip)}
        for key, tensor in tensors(shapes, folder, part, account, skipped):
            yield f'{name}.{key}', tensor


def check_same(folder, theirs, ours):
    """Raises ValueError where `theirs`, settings of a folder, are not those of `ours` {'vae': its
    config, ...}."""
    different = []
    for key, value in theirs.items():
        # other settings are a run's, not a part's
        part, _, name = key.partition('.')
        if part not in ours:
            continue
        here = getattr(ours[part], name)
        if to_list(here) != to_list(value):
            different.append(f'{key}={value!r} (here {here!r})')
    if different:
        raise ValueError(f'{folder!r} has {", ".join(different)}: python hub.py config {folder} '
                         'prints all of its settings')


def to_list(value):
    """JSON, and so a run's settings, has lists where a dataclass has tuples."""
    if isinstance(value, tuple):
        return list(value)
    return value


def autoencoder(folder, config):
    """The AutoencoderKL of a folder, which has to be as `config` says. Raises ValueError."""
    theirs = vars(read_config(folder, 'vae'))
    check_same(folder, {f'vae.{key}': value for key, value in theirs.items()}, {'vae': config})
    return from_folder(folder, 'vae')


def load(model, folder, skip=()):
    """Copy a folder's weights into a TextToImage of the same settings, or some of its parts
    (parts.py): the Account. Raises ValueError."""
    if hasattr(model, 'parts'):
        account = Account()
        account.loaded = copy_into(model, whole(model, folder, skip, account, SETTINGS))
        return account
    if not isinstance(getattr(model, 'denoiser', None), UNet2DCondition):
        raise ValueError(f'{folder!r} is Stable Diffusion: it begins a run of task=t2i with '
                         'denoiser=unet')
    ours = {'unet': model.denoiser.config, 'clip': model.text.config, 'vae': model.vae.config}
    check_same(folder, settings_of(folder), ours)
    account = Account()
    account.loaded = copy_into(model, whole(model, folder, skip, account, INSIDE))
    return account


def export_run(settings, model, folder, dtype=torch.float32):
    """A run of Stable Diffusion as a folder of diffusers: schedule, tokenizer and what else is
    there are those of the folder that it began with. Raises ValueError."""
    source = settings['init_from']
    if settings.get('denoiser') != 'unet' or not is_folder(source):
        raise ValueError(
            f'denoiser={settings.get("denoiser")}, init_from={source!r}: of task=t2i, runs of '
            'denoiser=unet can be exported that began with a folder of diffusers')
    parts = {part: getattr(model, name) for name, part in INSIDE.items()}

    # a tower that ends with its feature_layer is not whole: the folder's own is copied
    if len(model.text.blocks) < model.text.config.depth:
        del parts['text_encoder']
    export_parts(parts, folder, source, dtype)


# -------------------------------------------------------------------------------------------------
# what hub.py asks a family


def knows(path):
    return is_folder(path)


def settings(path):
    """Flat settings of train.py, `task` and paths among them. Raises ValueError."""
    return dict(init_from=path, tokenizer=os.path.join(path, 'tokenizer')) | settings_of(path)


def open_model(path, dtype=torch.float32, image_size=0):
    """The TextToImage of a folder. Raises ValueError."""
    return open_run(path).model.to(dtype)


def writes(run_settings, model):
    return run_settings['task'] == 't2i'


def export(run, folder, dtype=torch.float32):
    """A run as a folder of diffusers. Raises ValueError."""
    export_run(run.settings, run.model, folder, dtype)
