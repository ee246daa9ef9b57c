"""Models of transformers, in and out: folders of Gemma 1, 2 and 3 (text), Llama, SmolLM2, Qwen2
and 3, SigLIP 1 and 2 (fixed resolution), PaliGemma 1 and 2, Idefics3 and SmolVLM.

Names of tensors are here as data, read in both directions: the names of all releases become one
form, `vit.*`, `decoder.*` or `connector.*` with the rest as theirs (`canonical`), and ours become
the same form (`their_name`). Settings are in huggingface_config.py, pictures and tokenizers in
processors.py. Axes: P patches, D width.
"""
import itertools
import os
import re
from dataclasses import fields, replace

import torch

from accounting import Account, copy_into, fitted, is_skipped, listed, say
from checkpoint import write_json
from families import files, processors
from families.huggingface_config import read_config, to_theirs
from model import VLM, Decoder, DecoderConfig, ViT, ViTConfig, VLMConfig
from tokenizer import read_json

# ------------------------------------------------------------------------------------------------
# names: ours -> theirs

# Llama's names are those of all decoders.
DECODER = {'embedding': 'embed_tokens', 'norm': 'norm'}
DECODER_BLOCK = {
    'norm1': 'input_layernorm',
    'q': 'self_attn.q_proj',
    'k': 'self_attn.k_proj',
    'v': 'self_attn.v_proj',
    'o': 'self_attn.o_proj',
    'q_norm': 'self_attn.q_norm',
    'k_norm': 'self_attn.k_norm',
    'norm2': 'post_attention_layernorm',
    'gate': 'mlp.gate_proj',
    'up': 'mlp.up_proj',
    'down': 'mlp.down_proj'}

# Gemma 2 and 3 have norms after attention and MLP, too, and so call one of them otherwise.
POST_NORMS = {
    'post_norm1': 'post_attention_layernorm',
    'norm2': 'pre_feedforward_layernorm',
    'post_norm2': 'post_feedforward_layernorm'}

VIT = {
    'stem': 'embeddings.patch_embedding',
    'pos_embed': 'embeddings.position_embedding',
    'norm': 'post_layernorm'}
VIT_BLOCK = {
    'norm1': 'layer_norm1',
    'q': 'self_attn.q_proj',
    'k': 'self_attn.k_proj',
    'v': 'self_attn.v_proj',
    'o': 'self_attn.out_proj',
    'norm2': 'layer_norm2',
    'fc1': 'mlp.fc1',
    'fc2': 'mlp.fc2'}

# What stands before the names of a part: all that releases of transformers have written -> one
# form. The first that fits is taken.
PREFIXES = [
    (r'(?:model\.)?lm_head\.|language_model\.lm_head\.', 'decoder.head.'),
    (r'(?:model\.)?(?:vision_tower|vision_model)\.(?:vision_model\.)?', 'vit.'),
    (r'(?:model\.)?(?:language_model|text_model)\.(?:model\.)?', 'decoder.'),
    (r'(?:model\.)?(?:multi_modal_projector\.linear|connector\.modality_projection\.proj)\.',
     'connector.'),
    (r'(?=embeddings\.|encoder\.|post_layernorm\.|head\.)', 'vit.'),
    (r'(?:model\.)?(?=embed_tokens\.|layers\.|norm\.)', 'decoder.')]

# The same, as the kinds of models write it today; decoders alone are all alike.
WRITTEN = {
    'decoder': {
        'decoder.head.': 'lm_head.',
        'decoder.': 'model.'},
    'siglip_vision_model': {
        'vit.': 'vision_model.'},
    'paligemma': {
        'decoder.head.': 'language_model.lm_head.',
        'decoder.': 'language_model.model.',
        'vit.': 'vision_tower.vision_model.',
        'connector.': 'multi_modal_projector.linear.'},
    'idefics3': {
        'decoder.head.': 'lm_head.',
        'decoder.': 'model.text_model.',
        'vit.': 'model.vision_model.',
        'connector.': 'model.connector.modality_projection.proj.'}}

# What nobody needs, for it follows from the settings, and why.
TABLES = r'.*\.(?:position_ids|inv_freq)$'
FOLLOWS, TIED = 'follows from the settings', 'the embedding once more'
POOLED = 'such a model takes the features before it'

# What we have no use for: the pooling head of a SigLIP tower, the norm after a feature_layer that
# is not the last, the output layer where no word is said.
UNUSED = r'vit\.head\.|decoder\.head\.|decoder\.norm\.|vit\.post_layernorm\.'

# model_type -> the part of the model that is read.
ONLY_INSIDE = {'siglip': r'vision_model\.',
               'gemma3': r'(?:model\.)?language_model\.|(?:model\.)?lm_head\.'}

# ------------------------------------------------------------------------------------------------
# what every family offers


def knows(path):
    """Is this folder mine? It has a config.json that is not a run's of ours, or is an adapter."""
    config = os.path.join(path, 'config.json')
    if not os.path.isfile(config):
        return os.path.isfile(os.path.join(path, 'adapter_config.json'))
    try:
        return 'task' not in read_json(config)
    except ValueError:
        return True         # whoever opens it says what is wrong with it


def settings(path):
    """What a run of train.py needs to begin with this folder: flat settings, its paths among them.
    Raises ValueError."""
    config = read_config(path)
    if isinstance(config, ViTConfig):
        return dict(task='siglip', init_from=path) | flat('vit', config)

    # A model with words brings its tokenizer and how it wants its rows.
    places = dict(init_from=path, tokenizer=path, processor=path)
    if isinstance(config, DecoderConfig):
        return dict(task='llm') | places | flat('decoder', config)
    connector = dict(pixel_shuffle=config.pixel_shuffle, connector_bias=config.connector_bias)
    parts = flat('vit', config.vit) | flat('decoder', config.decoder)
    return dict(task='vlm') | places | connector | parts


def flat(part, config):
    """{'vit.width': 1152, ...}: of a config, what belongs to the weights."""
    of_training = {'dropout', 'remat', 'feature_layer', 'init_scale', 'stem', 'hf'}
    return {f'{part}.{f.name}': getattr(config, f.name) for f in fields(config)
            if f.name not in of_training}


def load(model, path, skip=()):
    """Copy what a folder and our model share into the model, sharded or not, one tensor at a time:
    the Account. Raises ValueError."""
    # of some parts of a model, parts.py has looked at the settings
    different = {} if hasattr(model, 'parts') else differences(model, path)
    if different:
        named = ', '.join(f'{key}={theirs!r} (here {ours!r})'
                          for key, (ours, theirs) in different.items())
        raise ValueError(f'{path!r} has {named}: python hub.py config {path} prints all of its '
                         'settings')
    rows, account = where(model, path, skip)
    account.loaded = copy_into(model, tensors(model, path, rows, account))
    return account


def open_model(path, dtype=torch.float32, image_size=0):
    """Our model of a folder, weights loaded, `.config` filled. image_size: of its pictures, where
    it is to be another than it was trained on. Raises ValueError."""
    config = read_config(path)
    if image_size and isinstance(config, ViTConfig):
        config = replace(config, image_size=image_size)
    if image_size and isinstance(config, VLMConfig):
        config = replace(config, vit=replace(config.vit, image_size=image_size))

    # Nothing is allocated before a file is known to hold it.
    kind = {DecoderConfig: Decoder, ViTConfig: ViT, VLMConfig: VLM}[type(config)]
    with torch.device('meta'):
        model = kind(config)

    # Copied: what safe_open gives is the file itself, mapped, and who changes that would change
    # the model.
    rows, account = where(model, path)
    loaded = {name: tensor.to(dtype, copy=True)
              for name, tensor in tensors(model, path, rows, account)}
    if lacking := model.state_dict().keys() - loaded.keys():
        raise ValueError(f'{path!r} lacks {listed(sorted(lacking))}')
    model.load_state_dict(loaded, assign=True)

    # A part of a model is less than the whole.
    if not account.is_whole():
        say(f'{path}: {len(loaded)} tensors of a {kind.__name__} loaded, {account.left()}')
    return model.eval()


def writes(run_settings, model):
    """Is a run's model of a kind that `export` writes, or refuses with a reason of its own?"""
    model = exported_part(run_settings, model)
    return isinstance(model, Decoder | ViT | VLM) or is_tower(model)


def export(run, folder, dtype=torch.float32):
    """A run's model as a folder that transformers loads: also what its tokenizer and processor
    read. Raises ValueError."""
    tokenizer, model = run.tokenizer, exported_part(run.settings, run.model)
    if model is not run.model:
        left = {part_of(name) for name in run.model.state_dict()} - {'vit'}
        say(f'{folder}: the vision tower alone, which is what transformers has of this model: '
            f'{", ".join(sorted(left))} left out')
    theirs = write_weights(model, folder, dtype)

    if not isinstance(model, ViT):
        # Both model and generation want to know where a text ends.
        ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
                   pad_token_id=tokenizer.pad_id)
        theirs.update(ids)
        text = theirs.get('text_config', theirs)
        text.update(ids)
        if not getattr(model.config, 'decoder', model.config).max_positions:
            text['max_position_embeddings'] = run.settings['seq_len']

        # An answer may have an end of its own.
        ids |= dict(eos_token_id=run.processor.end_id)
        write_json(os.path.join(folder, 'generation_config.json'), ids)
        processors.write_tokenizer(tokenizer, folder, processors.form_name(run) == 'text')
        processors.write_template(theirs['model_type'], run, folder)

    image = tokenizer.names.get('image_token', '<image>')
    if isinstance(model, VLM) and image != '<image>':
        say(f'{folder}: the processors of transformers look for <image>, this tokenizer calls it '
            f'{image}: put the tokens of a picture into a text yourself')
    if not isinstance(model, Decoder):
        processors.write_processor(theirs['model_type'], run, folder)
    write_json(os.path.join(folder, 'config.json'), theirs)


def exported_part(run_settings, model):
    """Of a SigLIP, its tower: the text beside it is not theirs."""
    return model.vit if run_settings['task'] == 'siglip' else model


def is_tower(model):
    """Is it a model of transformers itself (towers.py)?"""
    config = getattr(model, 'config', None)
    return isinstance(config, DecoderConfig | ViTConfig) and config.hf != ''


def export_model(model, folder, dtype=torch.float32, max_shard_size='5GB'):
    """Write config.json and .safetensors files that transformers loads: the same logits, in fp32
    the same bits. Raises ValueError for a model that it has not."""
    theirs = write_weights(model, folder, dtype, max_shard_size)
    write_json(os.path.join(folder, 'config.json'), theirs)


def write_weights(model, folder, dtype=torch.float32, max_shard_size='5GB'):
    """All but config.json, which goes last: a folder without it is no model. What that is to
    hold. Raises ValueError."""
    # What is wrong with a tower of theirs, to_theirs says.
    if not isinstance(model, Decoder | ViT | VLM) and not is_tower(model):
        raise ValueError(f'{type(model).__name__} has no counterpart in transformers: only '
                         'Decoder, ViT and VLM do')
    if getattr(model, 'attends', 'causal') != 'causal':
        raise ValueError('the prompts of this run do not attend causally, as its form says: no '
                         'language model of transformers does so')
    theirs = to_theirs(model.config) | dict(dtype=str(dtype).removeprefix('torch.'))

    # Whoever exports a whole model does not want a part of it (a VLA without its actions).
    ours, names = model.state_dict(), our_names(model)
    if lost := sorted({part_of(name) for name in ours.keys() - set(names.values())}):
        raise ValueError(f'a {type(model).__name__} can not be exported: no model of transformers '
                         f'has its {", ".join(lost)}')

    out = {}
    for key, name in names.items():
        tensor = ours[name].detach().to('cpu', dtype).contiguous()
        if name.endswith('pos_embed'):
            tensor = tensor[0]          # (1, P, D) -> (P, D)
        out[written_name(key, theirs['model_type'])] = tensor

    # an older model that is written over is none meanwhile
    files.remove(os.path.join(folder, 'config.json'))
    files.write_tensors(out, folder, max_shard_size=max_shard_size)
    return theirs


# ------------------------------------------------------------------------------------------------
# names


def canonical(name):
    """A tensor's name there -> vit.*, decoder.* or connector.*, with what follows still theirs; as
    it is if unknown."""
    for pattern, ours in PREFIXES:
        if match := re.match(pattern, name):
            return ours + name[match.end():]
    return name


def their_name(name, post_norms):
    """Our tensor's name, vit.*, decoder.* or connector.*, in their words after the same prefix.
    Raises ValueError."""
    part, _, rest = name.partition('.')
    if part == 'connector' or rest.startswith('head.'):
        return name

    top, inside, layers = DECODER, DECODER_BLOCK, 'decoder.layers'
    if part == 'vit':
        top, inside, layers = VIT, VIT_BLOCK, 'vit.encoder.layers'
    elif post_norms:
        inside = DECODER_BLOCK | POST_NORMS

    # In a block, all layers are called alike.
    if match := re.fullmatch(r'blocks\.(\d+)\.(\w+)\.(weight|bias)', rest):
        number, ours, kind = match.groups()
        return f'{layers}.{number}.{inside[ours]}.{kind}'

    # Outside, a table has no kind in our names, and a stem of several convolutions has numbers.
    key, _, kind = rest.partition('.')
    is_other_stem = key == 'stem' and kind not in ('weight', 'bias')
    if key not in top or is_other_stem:
        raise ValueError(f'{name}: no model of theirs has that')
    return f'{part}.{top[key]}.{kind or "weight"}'


def written_name(key, kind):
    """A canonical name of theirs as a kind of model writes it."""
    starts = WRITTEN.get(kind, WRITTEN['decoder'])
    start = next(start for start in starts if key.startswith(start))
    return starts[start] + key[len(start):]


def our_names(model):
    """{canonical name of theirs: our name} of what a Decoder, ViT or VLM (or a model that has a
    .vit) holds."""
    prefix = ''
    if isinstance(model, Decoder):
        prefix = 'decoder.'
    elif isinstance(model, ViT):
        prefix = 'vit.'
    decoder_config = getattr(model.config, 'decoder', model.config)
    post_norms = getattr(decoder_config, 'post_norms', False)

    # What else a model has is none of theirs.
    names = {}
    for name in model.state_dict():
        if (prefix + name).startswith(('vit.', 'decoder.', 'connector.')):
            names[their_name(prefix + name, post_norms)] = name
    return names


def part_of(key):
    """vit, decoder or connector; something else in a name that is not known."""
    return key.partition('.')[0]


# ------------------------------------------------------------------------------------------------
# reading


def differences(model, folder):
    """{our key: (ours, theirs)} of the settings in which a model folder differs from the parts of
    a model that both have; sizes of pictures and vocabularies aside, and what does not belong to
    the weights."""
    ours, theirs = model.config, read_config(folder)
    free = {'image_size', 'feature_layer', 'dropout', 'remat', 'init_scale', 'vocab_size', 'hf',
            'max_positions'}
    pairs = []

    # Each may be a part alone, or have it.
    for part, kind in (('vit', ViTConfig), ('decoder', DecoderConfig)):
        our_part, their_part = part_config(ours, part, kind), part_config(theirs, part, kind)
        if our_part and their_part:
            pairs += [(f'{part}.{f.name}', getattr(our_part, f.name), getattr(their_part, f.name))
                      for f in fields(kind) if f.name not in free]

    if isinstance(ours, VLMConfig) and isinstance(theirs, VLMConfig):
        for key in ('pixel_shuffle', 'connector_bias'):
            pairs.append((key, getattr(ours, key), getattr(theirs, key)))
    return {key: (a, b) for key, a, b in pairs if a != b}


def part_config(config, part, kind):
    """The config of a part: itself, or inside of it; None where it has no such part."""
    return config if isinstance(config, kind) else getattr(config, part, None)


def where(model, folder, skip=()):
    """([(our name, their name, file)] file by file, Account) of all that a folder and a model
    share, but for names in which a regex of `skip` is found. Raises ValueError where a part of
    theirs is not whole, or holds what is not known here."""
    tensor_files = files.files_of(folder)
    theirs, account = names_in(folder, tensor_files)
    ours, wanted = our_names(model), {}
    for key, name in ours.items():
        if not is_skipped(name, skip):
            wanted[key] = name

    # A folder may hold more parts than the model (a decoder beside a tower), never half a part.
    shared = set(map(part_of, theirs)) & set(map(part_of, ours))
    if not shared:
        raise ValueError(f'{folder!r} holds another model: nothing in it belongs to this one')
    missing = [key for key in sorted(wanted) if part_of(key) in shared and key not in theirs]
    unknown = sort_out(theirs, ours, folder, shared, account)
    if missing or unknown:
        raise ValueError(f'{folder!r} holds another model: it lacks {listed(missing)} and has '
                         f'{listed(unknown)} that is not known here')

    # What is skipped is there all the same.
    for key in theirs.keys() & (ours.keys() - wanted.keys()):
        account.unused[part_of(key)] += 1
    check_tied(theirs, tensor_files, account, folder)
    rows = [(name, theirs[key], tensor_files[theirs[key]]) for key, name in wanted.items()
            if key in theirs]
    return sorted(rows, key=lambda row: (row[2], row[1])), account


def names_in(folder, tensor_files):
    """({canonical name: its name there}, Account of what is in no part that is read). Raises
    ValueError."""
    kind = read_json(os.path.join(folder, 'config.json')).get('model_type')
    theirs, account = {}, Account()
    account.unused = files.beside(folder, tensor_files.values())
    for name in tensor_files:
        if not re.match(ONLY_INSIDE.get(kind, ''), name):
            account.unused[part_of(name.removeprefix('model.'))] += 1
            continue
        key = canonical(name)
        if key in theirs:
            raise ValueError(f'{folder!r} has {theirs[key]} and {name}, which are one: leave out '
                             'the one that is old')
        theirs[key] = name
    return theirs, account


def sort_out(theirs, ours, folder, shared, account):
    """Account for what a folder has and our model has not; the names that are not known. Raises
    ValueError where it has more layers than its config.json says."""
    config, built = read_config(folder), set(map(files.layer_of, ours))
    configs = {'vit': part_config(config, 'vit', ViTConfig),
               'decoder': part_config(config, 'decoder', DecoderConfig)}
    if isinstance(config, VLMConfig):
        configs['connector'] = config

    unknown = []
    for key in sorted(theirs.keys() - ours.keys()):
        name, part, layer = theirs[key], part_of(key), files.layer_of(key)
        depth = getattr(configs.get(part), 'depth', 0)
        if depth and layer and int(layer.split('.')[-2]) >= depth:
            raise ValueError(f'{folder!r} has {name}, but its config.json says num_hidden_layers='
                             f'{depth}: one of the two is wrong')

        # What nobody needs. (Whether that output layer is the embedding is looked at later.)
        if re.match(TABLES, key):
            account.needless[name] = FOLLOWS
        elif key == 'decoder.head.weight' and part in shared and configs['decoder'].tied:
            account.needless[name] = TIED
        elif key.startswith('vit.head.') and part in shared and isinstance(config, VLMConfig):
            account.needless[name] = POOLED
        elif not configs.get(part):
            unknown.append(name)

        # Parts that the model lacks, and what stands after its feature_layer.
        elif part not in shared or layer not in built or re.match(UNUSED, key):
            account.unused['vit.head' if key.startswith('vit.head.') else part] += 1
        else:
            unknown.append(name)
    return unknown


def check_tied(theirs, tensor_files, account, folder):
    """Raises ValueError where a folder's output layer is to be its embedding, and is not."""
    name = theirs.get('decoder.head.weight')
    if name not in account.needless:
        return
    with files.opened(tensor_files[name]) as file:
        head = files.tensor_of(file, name, tensor_files[name])
    name = theirs['decoder.embed_tokens.weight']
    with files.opened(tensor_files[name]) as file:
        embedding = files.tensor_of(file, name, tensor_files[name])
    if not torch.equal(head, embedding):
        raise ValueError(f'{folder!r} says tie_word_embeddings=true, but its output layer is not '
                         'its embedding: set false in config.json, or remove the output layer')


def tensors(model, folder, rows, account):
    """Yield (our name, tensor of our shape), one at a time, for rows of `where`. Position tables
    are interpolated where the picture size differs. Raises ValueError."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Each file is opened once, and no more than one at a time.
    for path, in_file in itertools.groupby(rows, lambda row: row[2]):
        with files.opened(path) as file:
            for name, their, _ in in_file:
                tensor = files.tensor_of(file, their, path)
                yield name, fitted(tensor, name, shapes[name], folder, account)
