"""Any causal language model or vision model of transformers as a tower of ours:
`decoder.hf='owner/name'`, `vit.hf=...` in a config, with our loop, masks, losses, freezing and
checkpoints around it; for text to image also text encoders (CLIP, T5).

    python train.py config/mine.py --decoder.hf=HuggingFaceTB/SmolLM2-135M \
        --vit.hf=google/siglip-base-patch16-224

Needs `pip install transformers`. Axes: B rows, T query, S key, D width, V vocabulary, I pictures,
P patches.
"""
import inspect
import os
import re
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from accounting import Account, check_finite, listed, say
from families.files import DEQUANTISE, fetch, files_of, opened, refuse_settings, tensor_of
from model import Decoder, layout
from tokenizer import read_json

# ------------------------------------------------------------------------------------------------
# opening


# gradients tell which parameters are used, also where the caller wants none
@torch.enable_grad()
def open_tower(part, config, vocab_size, load_weights=True):
    """The model of transformers that config.hf names, as our part: vit, decoder, or text (what
    text to image is told by, which need not speak). vocab_size: ids that the tokenizer has.
    load_weights=False: random ones, for a checkpoint that has its own. Raises ValueError."""
    if part == 'vit':
        return HFViT(config, load_weights)
    if part == 'text' and not is_causal(config.hf):
        return HFText(config, vocab_size, load_weights)
    return HFDecoder(config, vocab_size, load_weights)


def is_causal(name):
    """Has transformers a causal language model of this folder's or repository's kind?"""
    try:
        import transformers
        config = transformers.AutoConfig.from_pretrained(fetch(name), trust_remote_code=False)
        return type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    except (ImportError, ValueError, OSError, KeyError):
        return True         # what is wrong there, open_theirs says


def open_theirs(name, auto, weights):
    """(the model of a folder or repository in fp32, what transformers says of its weights); random
    ones and {} with weights=False. auto: the class of transformers that opens it. Raises
    ValueError."""
    try:
        import transformers
    except ImportError:
        raise ValueError(f'{name!r} needs a package that is not here: pip install '
                         'transformers') from None
    folder = fetch(name)
    if weights:
        refuse_unreadable(folder)
    transformers.utils.logging.disable_progress_bar()       # every rank would draw one

    # No code that comes with a model is run, and no pickle is opened.
    options = dict(dtype=torch.float32, attn_implementation='sdpa', trust_remote_code=False)
    auto_class = getattr(transformers, auto)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        dropout = ', '.join(without_dropout(config))
        if weights:
            model, info = auto_class.from_pretrained(folder, config=config, use_safetensors=True,
                                                     output_loading_info=True, **options)
            return model, info | dict(dropout=dropout)
        return auto_class.from_config(config, **options), {}
    except (ValueError, OSError, KeyError, ImportError, RuntimeError, AttributeError,
            SafetensorError) as error:
        reason = ' '.join(str(error).split())[:300]
        raise ValueError(f'{name!r} can not be opened by transformers: {reason}') from None


def refuse_unreadable(folder):
    """Raises ValueError for a folder without .safetensors, an adapter, and quantised weights."""
    config = os.path.join(folder, 'config.json')
    if os.path.exists(config):
        refuse_settings(read_json(config))
    tensor_files = files_of(folder)
    for path in sorted(set(tensor_files.values())):
        with opened(path) as file:
            for name in file.keys():
                # masks of old releases are bytes
                if file.get_slice(name).get_dtype().startswith(('I8', 'F8')):
                    raise ValueError(f'{path}: {name} is of 8 bits: {DEQUANTISE}')


def account_for(tower, theirs, info, name):
    """Say what became of the tensors of a folder of which a tower uses what is not frozen. theirs:
    all that was opened, info: what transformers says of it. Raises ValueError where the tower's
    own are not there, not all of its layers, or not finite."""
    if not info:
        return
    used, account = {id(p) for p in tower.parameters() if p.requires_grad}, Account()
    for key, p in theirs.named_parameters():
        if id(p) in used:
            account.loaded.append(key)
        else:
            account.unused[first_part(key)] += 1
    lacking = [key for key in account.loaded if key in info['missing_keys']]
    if lacking:
        raise ValueError(f'{name!r} lacks {listed(lacking)}')

    # What is not known there is another part, or a layer that its config.json leaves out.
    for key in sorted(info['unexpected_keys']):
        if is_layer_too_many(key, account.loaded):
            raise ValueError(f'{name!r} has {key}, but its config.json says of fewer layers: one '
                             'of the two is wrong')
        account.unused[first_part(key)] += 1
    check_finite(theirs.named_parameters(), name)
    dropout = info['dropout'] and f'; {info["dropout"]} is not used: it knows no samples'
    say(f'{name}: {len(account.loaded)} tensors of a {type(theirs).__name__} loaded, '
        f'{account.left()}{dropout}')


def first_part(key):
    """lm_head, or what follows model."""
    return key.removeprefix('model.').partition('.')[0]


def is_layer_too_many(key, loaded):
    """Is a name that is not known one of a layer after those that were loaded?"""
    layer = re.compile(r'(.+)\.(\d+)\.(.+)')
    extra = layer.fullmatch(key)
    for match in filter(None, map(layer.fullmatch, loaded)):
        # one of the two may stand in a larger model
        if extra and match[3] == extra[3] and int(extra[2]) > int(match[2]):
            if match[1].endswith(extra[1]) or extra[1].endswith(match[1]):
                return True
    return False


def check_tied(lm, folder):
    """Raises ValueError where a folder's output layer is to be its embedding, and is not."""
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    if not getattr(lm.config.get_text_config(), 'tie_word_embeddings', False):
        return
    tensor_files = files_of(folder)
    both = []
    for name, p in lm.named_parameters(remove_duplicate=False):
        if (p is embedding or p is head) and name in tensor_files:
            with opened(tensor_files[name]) as file:
                both.append(tensor_of(file, name, tensor_files[name]))
    if head is not embedding or (len(both) == 2 and not torch.equal(*both)):
        raise ValueError(f'{folder!r} says tie_word_embeddings=true, but its output layer is not '
                         'its embedding: set false in config.json, or remove the output layer')


def without_dropout(config):
    """Switch off the dropout of a config of transformers, and of those inside it: what was on. It
    would be drawn by rank and micro-batch, and differ with their number."""
    found = []
    for key, value in list(vars(config).items()):
        if hasattr(value, 'to_dict'):
            found += without_dropout(value)
        elif 'drop' in key and isinstance(value, float) and value > 0:
            found.append(f'{key}={value}')
            setattr(config, key, 0.0)
    return found


def refuse_others(config, part, allowed):
    """Raises ValueError for settings beside hf that would seem to have an effect."""
    # A setting left at its default was not meant.
    default = type(config)()
    changed = []
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in allowed and value != getattr(default, f.name):
            changed.append(f'{part}.{f.name}={value!r}')
    if changed:
        raise ValueError(f'{part}.hf={config.hf!r} brings its own shape: leave out '
                         f'{", ".join(changed)}')


def mark_blocks(module):
    """Its transformer blocks, the longest list of modules, get `is_block`: FSDP and torch.compile
    go block by block."""
    lists = [inner for inner in module.modules() if isinstance(inner, nn.ModuleList)]
    for block in max(lists, key=len, default=()):
        block.is_block = True


def freeze_unused(module, output):
    """Parameters that an output does not depend on (a pooling head) are frozen: DDP would wait for
    their gradients."""
    output.sum().backward()
    for p in module.parameters():
        p.requires_grad_(p.grad is not None)
        p.grad = None


# ------------------------------------------------------------------------------------------------
# language models


class HFCache:
    """Keys and values as transformers keeps them, for `generate`."""

    def __init__(self):
        from transformers import DynamicCache
        # Without a config: no layer forgets, masks say what is seen.
        self.inner = DynamicCache()
        self.length = 0


class HFDecoder(nn.Module):
    """A causal language model of transformers behind the calls of our Decoder."""

    def __init__(self, config, vocab_size, weights=True):
        super().__init__()
        refuse_others(config, 'decoder', ('hf', 'vocab_size', 'remat'))
        lm, info = open_theirs(config.hf, 'AutoModelForCausalLM', weights)
        lm.eval()

        # Multiples of 64 rows are faster, as those of our own embeddings.
        if vocab_size > lm.get_input_embeddings().num_embeddings:
            lm.resize_token_embeddings(-(-vocab_size // 64) * 64)

        # Layers and output layer are called apart: logits only where there is a loss.
        self.model, head = lm.base_model, lm.get_output_embeddings()
        if head is None or self.model is lm:
            raise ValueError(f'decoder.hf={config.hf!r}: a {type(lm).__name__} has no layers and '
                             'output layer apart')
        embedding = lm.get_input_embeddings()
        is_tied = head.weight is embedding.weight
        self.head = nn.Identity() if is_tied else head

        # Older releases call their cache otherwise.
        known = inspect.signature(self.model.forward).parameters
        self.cache_name = 'cache' if 'cache' in known else 'past_key_values'

        self.read_shape(config, lm.config.get_text_config(), embedding.num_embeddings)
        if config.remat:
            lm.gradient_checkpointing_enable(dict(use_reentrant=False))
        mark_blocks(self)
        if info:
            check_tied(lm, fetch(config.hf))
        self.check_logits(lm)
        account_for(self, lm, info, config.hf)

    def read_shape(self, config, text, vocab_size):
        """config, as far as masks and losses look at it, and kinds: those of its layers."""
        # Some that have a window say in another place that they do not use it.
        window = getattr(text, 'sliding_window', None) or 0
        if not getattr(text, 'use_sliding_window', True):
            window = 0
        all_alike = 'sliding_attention' if window else 'full_attention'
        self.kinds = set(getattr(text, 'layer_types', None) or [all_alike])

        softcap = getattr(text, 'final_logit_softcapping', None) or 0.0
        self.config = replace(
            config, vocab_size=vocab_size, width=text.hidden_size, depth=text.num_hidden_layers,
            num_heads=text.num_attention_heads, sliding_window=window,
            global_every=2 if window else 1, final_logits_softcap=softcap)

    def check_logits(self, lm):
        """Raises ValueError where the model does more than we call, such as to scale its logits:
        that would be lost in silence."""
        tokens = torch.arange(6)[None] % self.config.vocab_size
        logits = self.logits(tokens)
        error = (lm(tokens, use_cache=False).logits - logits).abs().max().item()
        freeze_unused(self, logits)
        if error > 1e-3:
            raise ValueError(f'decoder.hf={self.config.hf!r}: a {type(lm).__name__} does more '
                             'than its layers and its output layer say (logits differ by '
                             f'{error:.2g})')

    def new_cache(self, batch, size, device):
        return HFCache()

    def embed(self, tokens):
        """tokens (B, T) -> (B, T, D)."""
        return self.model.get_input_embeddings()(tokens)

    def features(self, x, blocks=None, segments=None, cache=None, masks=None, positions=None,
                 keys=None):
        """As Decoder.features; keys are not read, for nothing is dropped (`without_dropout`)."""
        masks, positions = layout(self.config, x, blocks, segments, masks, positions)

        # A model with both kinds of layers takes both masks by name.
        full, local = (mask[:, None] for mask in masks)                         # (B, 1, T, S)
        if len(self.kinds) > 1:
            mask = {'full_attention': full, 'sliding_attention': local}
        elif self.kinds == {'full_attention'}:
            mask = full
        else:
            mask = local

        # Theirs grows by itself; `length` is what `generate` looks at.
        kept = {}
        if cache is not None:
            kept[self.cache_name] = cache.inner
        out = self.model(inputs_embeds=x, attention_mask=mask,
                         position_ids=positions.expand(len(x), -1),
                         use_cache=cache is not None, **kept)
        if cache is not None:
            cache.length += x.shape[1]
        return out.last_hidden_state

    def unembed(self, x):
        """Hidden states (..., D) -> logits (..., V)."""
        if isinstance(self.head, nn.Identity):
            logits = F.linear(x, self.model.get_input_embeddings().weight)
        else:
            logits = self.head(x)
        cap = self.config.final_logits_softcap
        if cap:
            logits = (logits / cap).tanh() * cap
        return logits

    logits, loss, forward = Decoder.logits, Decoder.loss, Decoder.forward


# ------------------------------------------------------------------------------------------------
# vision models and text encoders


class HFViT(nn.Module):
    """A vision model of transformers behind the calls of our ViT: its patch features, without
    class tokens."""

    def __init__(self, config, weights=True):
        super().__init__()
        refuse_others(config, 'vit', ('hf', 'image_size', 'patch_size', 'remat'))
        model, info = open_theirs(config.hf, 'AutoModel', weights)
        self.model = getattr(model, 'vision_model', model)      # a CLIP has words, too

        # Pictures and image tokens are made of these two before any tower is asked.
        theirs = self.model.config
        for key in ('image_size', 'patch_size'):
            wanted, has = getattr(config, key), getattr(theirs, key, None)
            if has != wanted:
                raise ValueError(f'vit.{key}={wanted}, but vit.hf={config.hf!r} has {has}: give '
                                 f'it as --vit.{key}')
        self.config = replace(config, width=theirs.hidden_size, depth=theirs.num_hidden_layers)

        # The pooling head among them.
        size = config.image_size
        freeze_unused(self, self(torch.zeros(1, 3, size, size)))
        account_for(self, model, info, config.hf)
        if config.remat:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        mark_blocks(self)

    def forward(self, pixels, keys=None):
        """pixels (I, 3, H, W) -> features (I, P, D); keys as in HFDecoder."""
        # Class tokens, where there are any, come first.
        return self.model(pixels).last_hidden_state[:, -self.config.num_patches:]


class HFText(nn.Module):
    """The text encoder of a CLIP, T5 or alike of transformers, as TextToImage reads it."""

    def __init__(self, config, vocab_size, weights=True):
        super().__init__()
        refuse_others(config, 'decoder', ('hf', 'vocab_size', 'remat'))
        model, info = open_theirs(config.hf, 'AutoModel', weights)
        if model.config.is_encoder_decoder:
            self.model = model.get_encoder()
        else:
            self.model = getattr(model, 'text_model', model)

        known = self.model.get_input_embeddings().num_embeddings
        if vocab_size > known:
            raise ValueError(f'decoder.hf={config.hf!r} knows {known} tokens, the tokenizer has '
                             f'{vocab_size}')
        self.config = replace(config, vocab_size=known, width=self.model.config.hidden_size)
        if config.remat:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        mark_blocks(self)

        # A T5's decoder and a CLIP's projection are not read.
        tokens = torch.zeros(1, 2, dtype=torch.long)
        freeze_unused(self, self(tokens, torch.ones_like(tokens)))
        account_for(self, model, info, config.hf)

    def forward(self, tokens, segments):
        """tokens, segments (B, S), segments 0 where padding, which stands on the right -> features
        (B, S, D)."""
        mask = (segments > 0).long()
        return self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
