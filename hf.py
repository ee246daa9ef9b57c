"""Any causal language model or vision model of transformers as a tower of ours: `decoder.hf='owner/name'`, `vit.hf=...`
in a config, with our loop, masks, losses, freezing and checkpoints around it; for text to image also text encoders
(CLIP, T5).

    python train.py config/mine.py --decoder.hf=HuggingFaceTB/SmolLM2-135M --vit.hf=google/siglip-base-patch16-224

Needs `pip install transformers`. Axes: as in model.py.
"""
import inspect
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import nn

from hub import fetch
from model import Decoder, make_attn_masks, positions_of


def towers(vit, decoder, vocab_size, weights=True, task='vlm'):
    """{'vit': module, 'decoder': module} of those that the settings ask for. vocab_size: ids that the tokenizer has.
    weights=False: not loaded, for a checkpoint that has them. Raises ValueError."""
    out = {'vit': HFViT(vit, weights)} if vit.hf else {}
    if not decoder.hf:
        return out
    kind = HFText if task == 't2i' and not is_causal(decoder.hf) else HFDecoder
    return out | {'decoder': kind(decoder, vocab_size, weights)}


def is_causal(name):
    """Has transformers a causal language model of this folder's or repository's kind?"""
    try:
        import transformers
        config = transformers.AutoConfig.from_pretrained(fetch(name), trust_remote_code=False)
        return type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    except (ImportError, ValueError, OSError, KeyError):
        return True                                         # what is wrong there, open_model says


def open_model(name, auto, weights):
    """The model of a folder or repository in fp32, with its weights or with random ones. Raises ValueError."""
    try:
        import transformers
    except ImportError:
        raise ValueError(f'{name!r} needs a package that is not here: pip install transformers') from None
    folder = fetch(name)
    transformers.utils.logging.disable_progress_bar()       # one a rank
    options = dict(attn_implementation='sdpa', trust_remote_code=False)
    kind = getattr(transformers, auto)
    try:
        if weights:
            return kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options)
        return kind.from_config(transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32, **options)
    except (ValueError, OSError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        raise ValueError(f'{name!r} can not be opened by transformers: {" ".join(str(error).split())[:300]}') from None


def layers_of(module):
    """Its transformer blocks: the longest list of modules."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


def freeze_unused(module, output):
    """Parameters that an output does not depend on (a pooling head) are frozen: DDP would wait for their gradients."""
    output.sum().backward()
    for p in module.parameters():
        p.requires_grad_(p.grad is not None)
        p.grad = None


def refuse_others(config, name, allowed):
    """Raises ValueError for settings beside hf that would seem to have an effect."""
    plain = type(config)()
    changed = [f.name for f in fields(config) if f.name not in allowed
               and getattr(config, f.name) != getattr(plain, f.name)]
    if changed:
        raise ValueError(f'{name}.hf={config.hf!r} brings its own shape: leave out ' + ', '.join(
            f'{name}.{key}={getattr(config, key)!r}' for key in changed))


class HFCache:
    """Keys and values as transformers keeps them, for `generate`."""

    def __init__(self):
        from transformers import DynamicCache
        self.inner, self.length = DynamicCache(), 0     # without a config: no layer forgets, masks say what is seen


class HFDecoder(nn.Module):
    """A causal language model of transformers behind the calls of our Decoder."""

    def __init__(self, config, vocab_size, weights=True):
        super().__init__()
        refuse_others(config, 'decoder', ('hf', 'vocab_size', 'remat'))
        lm = open_model(config.hf, 'AutoModelForCausalLM', weights).eval()
        text = lm.config.get_text_config()
        if vocab_size > lm.get_input_embeddings().num_embeddings:
            lm.resize_token_embeddings(-(-vocab_size // 64) * 64)
        self.model, head = lm.base_model, lm.get_output_embeddings()
        if head is None or self.model is lm:
            raise ValueError(f'decoder.hf={config.hf!r}: a {type(lm).__name__} has no layers and output layer apart')
        known = inspect.signature(self.model.forward).parameters
        self.cache_name = 'cache' if 'cache' in known else 'past_key_values'        # in older releases
        embedding = lm.get_input_embeddings()
        self.head = nn.Identity() if head.weight is embedding.weight else head
        local = getattr(text, 'sliding_window', None) if getattr(text, 'use_sliding_window', True) else None
        self.kinds = set(getattr(text, 'layer_types', None) or ['sliding_attention' if local else 'full_attention'])
        self.config = replace(
            config, vocab_size=embedding.num_embeddings, width=text.hidden_size, depth=text.num_hidden_layers,
            num_heads=text.num_attention_heads, sliding_window=local or 0, global_every=2 if local else 1,
            final_logits_softcap=getattr(text, 'final_logit_softcapping', None) or 0.0)
        if config.remat:
            lm.gradient_checkpointing_enable(dict(use_reentrant=False))
        tokens = torch.arange(6)[None] % embedding.num_embeddings
        logits = self.logits(tokens)
        error = (lm(tokens, use_cache=False).logits - logits).abs().max().item()
        freeze_unused(self, logits)
        if error > 1e-3:        # it scales its logits, say: what is not done here would be lost in silence
            raise ValueError(f'decoder.hf={config.hf!r}: a {type(lm).__name__} does more than its layers and its '
                             f'output layer say (logits differ by {error:.2g})')

    def new_cache(self, batch, size, device):
        return HFCache()

    def embed(self, tokens):
        """tokens (B, T) -> (B, T, D)."""
        return self.model.get_input_embeddings()(tokens)

    def features(self, x, blocks=None, segments=None, cache=None, masks=None, positions=None):
        """As Decoder.features."""
        if masks is None:
            blocks = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if blocks is None else blocks
            masks = make_attn_masks(self.config, blocks, segments)
        if positions is None:
            positions = (torch.arange(x.shape[1], device=x.device)[None] if segments is None
                         else positions_of(segments))
        full, local = (mask[:, None] for mask in masks)                         # (B, 1, T, S)
        mask = full if self.kinds == {'full_attention'} else local
        if len(self.kinds) > 1:
            mask = {'full_attention': full, 'sliding_attention': local}
        kept = {} if cache is None else {self.cache_name: cache.inner}
        out = self.model(inputs_embeds=x, attention_mask=mask, position_ids=positions.expand(len(x), -1),
                         use_cache=cache is not None, **kept)
        if cache is not None:
            cache.length += x.shape[1]
        return out.last_hidden_state

    def unembed(self, x):
        """Hidden states (..., D) -> logits (..., V)."""
        cap = self.config.final_logits_softcap
        logits = (F.linear(x, self.model.get_input_embeddings().weight) if isinstance(self.head, nn.Identity)
                  else self.head(x))
        return (logits / cap).tanh() * cap if cap else logits

    logits, loss, forward = Decoder.logits, Decoder.loss, Decoder.loss


class HFViT(nn.Module):
    """A vision model of transformers behind the calls of our ViT: its patch features, without class tokens."""

    def __init__(self, config, weights=True):
        super().__init__()
        refuse_others(config, 'vit', ('hf', 'image_size', 'patch_size', 'remat'))
        model = open_model(config.hf, 'AutoModel', weights)
        self.model = getattr(model, 'vision_model', model)
        theirs = self.model.config
        for key in ('image_size', 'patch_size'):
            if getattr(theirs, key, None) != getattr(config, key):
                raise ValueError(f'vit.{key}={getattr(config, key)}, but vit.hf={config.hf!r} has '
                                 f'{getattr(theirs, key, None)}: give it as --vit.{key}')
        self.config = replace(config, width=theirs.hidden_size, depth=theirs.num_hidden_layers)
        size = config.image_size
        freeze_unused(self, self(torch.zeros(1, 3, size, size)))
        if config.remat:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))

    def forward(self, pixels):
        """pixels (I, 3, H, W) -> features (I, P, D)."""
        return self.model(pixels).last_hidden_state[:, -self.config.num_patches:]


class HFText(nn.Module):
    """The text encoder of a CLIP, T5 or alike of transformers, as TextToImage reads it."""

    def __init__(self, config, vocab_size, weights=True):
        super().__init__()
        refuse_others(config, 'decoder', ('hf', 'vocab_size', 'remat'))
        model = open_model(config.hf, 'AutoModel', weights)
        self.model = model.get_encoder() if model.config.is_encoder_decoder else getattr(model, 'text_model', model)
        known = self.model.get_input_embeddings().num_embeddings
        if vocab_size > known:
            raise ValueError(f'decoder.hf={config.hf!r} knows {known} tokens, the tokenizer has {vocab_size}')
        self.config = replace(config, vocab_size=known, width=self.model.config.hidden_size)
        if config.remat:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        freeze_unused(self, self(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long)))

    def forward(self, tokens, segments):
        """tokens, segments (B, S), segments 0 where padding, which stands on the right -> features (B, S, D)."""
        return self.model(input_ids=tokens, attention_mask=(segments > 0).long()).last_hidden_state


KINDS = HFViT, HFDecoder, HFText
