"""Transformers: a vision tower (SigLIP), a decoder (Gemma), both joined (PaliGemma).

Everything here takes tensors and gives tensors: no files, tokenizers or ranks.

Axes: B batch, I pictures, P patches, T query, S key, N heads, K kv heads, H head dim, D width,
V vocabulary.

Attention has one implementation and one mask. A sequence is described by two integer rows:
  blocks    a token attends to all whose running sum of `blocks` is not larger than its own:
            1 1 1 1 causal, 0 0 0 0 bidirectional, 0 0 0 1 1 prefix-LM (big_vision's convention);
  segments  a token attends inside its own segment only: 1, 2, ... are documents, 0 is padding.
"""
import importlib
import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class ViTConfig:
    image_size: int = 64        # pixels, a square
    patch_size: int = 8         # pixels, a square
    width: int = 192
    depth: int = 6              # layers
    mlp_dim: int = 768
    num_heads: int = 3
    stem: str = 'patch'         # patch: one convolution (SigLIP) | conv: a 3x3 one per halving
    init_scale: float = 1.0     # of each residual branch at the start: 1 SigLIP, 0 learns sooner
    feature_layer: int = -1     # layer whose output is given, as it is; -1: the last, normed
    dropout: float = 0.0        # on the output of each attention and MLP
    remat: bool = False         # compute layers again in the backward pass: less memory, slower
    hf: str = ''                # a folder or hub id: that model of transformers instead

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


@dataclass
class DecoderConfig:
    vocab_size: int = 0         # 0: that of the tokenizer, rounded up to a multiple of 64
    width: int = 192
    depth: int = 4              # layers
    mlp_dim: int = 768
    num_heads: int = 4
    num_kv_heads: int = 1
    head_dim: int = 64
    activation: str = 'gelu'    # of the gated MLP: gelu (GeGLU, Gemma) | silu (SwiGLU, Llama)
    tied: bool = True           # the output layer is the embedding
    embed_scale: float = 0.0    # of embeddings; 0: the root of the width (Gemma), 1: none (Llama)
    norm_offset: float = 1.0    # what norms add to their weights: 1 Gemma, 0 Llama
    norm_eps: float = 1e-6
    post_norms: bool = False    # norms also after attention and MLP (Gemma 2, 3)
    qk_norm: bool = False       # norms of queries and keys (Gemma 3, Qwen3)
    qkv_bias: bool = False      # biases of queries, keys and values (Qwen2)
    query_pre_attn_scalar: float = 0.0      # queries are divided by its root; 0: head_dim
    attn_logits_softcap: float = 0.0        # s: logits become s tanh(logits / s), Gemma 2; 0: no
    final_logits_softcap: float = 0.0       # the same for the output
    sliding_window: int = 0     # tokens that local layers see, with itself; 0: none is local
    global_every: int = 1       # of so many the last is global (2 Gemma 2, 6 Gemma 3); 1: all
    rope_theta: float = 10000.0
    rope_local_theta: float = 10000.0       # of local layers
    rope_scaling: list = field(default_factory=list)    # of global layers, see rope_frequencies
    feature_layer: int = -1     # layer whose output is given, as it is; -1: the last, normed
    dropout: float = 0.0        # on the output of each attention and MLP
    remat: bool = False         # compute layers again in the backward pass: less memory, slower
    hf: str = ''                # a folder or hub id: that causal LM of transformers
    max_positions: int = 0      # tokens of a row, as an exported config.json says; 0: seq_len


@dataclass
class VLMConfig:
    vit: ViTConfig = field(default_factory=ViTConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    image_token_id: int = 0     # marks where the patches of a picture go
    pixel_shuffle: int = 1      # squares of so many patches a side become one image token
    connector_bias: bool = True
    attends: str = 'prefix'     # pictures and prompt: prefix: all to all (PaliGemma) | causal
    #                             (Idefics3, Llava) | own: as the form that trains it says, which
    #                             sets this; or a family does

    @property
    def image_tokens(self):
        """Tokens that a picture takes."""
        return self.vit.num_patches // self.pixel_shuffle ** 2


# -------------------------------------------------------------------------------------------------
# attention


def attention(q, k, v, mask=None, is_causal=False, scale=None, softcap=0.0):
    """Scaled dot-product attention. q (B, T, N, H); k, v (B, S, K, H), K divides N.

    mask: bool (B or 1, T, S), True = attends. scale: of the logits, 1 / sqrt(H) if None. softcap:
    as in the config (Gemma 2, arXiv 2408.00118)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, N or K, T or S, H)
    if mask is not None:
        mask = mask[:, None]                                            # (B, 1, T, S)
    if softcap:
        scale = scale or q.shape[-1] ** -0.5
        out = softcapped(q, k, v, mask, is_causal, scale, softcap)
    else:
        is_grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale,
                                             enable_gqa=is_grouped)
    return out.transpose(1, 2)                                          # (B, T, N, H)


def softcapped(q, k, v, mask, is_causal, scale, softcap):
    """What SDPA can not do. q (B, N, T, H), k, v (B, K, S, H), mask (B, 1, T, S)."""
    q = q.unflatten(1, (k.shape[1], -1)) * scale                        # (B, K, N / K, T, H)
    k, v = k[:, :, None], v[:, :, None]                                 # (B, K, 1, S, H)
    logits = (q @ k.mT / softcap).tanh() * softcap                      # (B, K, N / K, T, S)
    if is_causal:
        mask = logits.new_ones(logits.shape[-2:], dtype=torch.bool).tril()[None, None]
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None], -math.inf)
    out = logits.softmax(-1).to(v.dtype) @ v                            # (B, K, N / K, T, H)
    return out.flatten(1, 2)


def make_attn_mask(blocks, segments=None, window=0):
    """Who attends to whom: bool (B, T, S), True = attends. blocks, segments (B, T).

    Blocks 0 0 1 1, a picture and its caption, give the rows 1100 1100 1110 1111. window > 0: only
    the last `window` tokens, itself included, and all of its own bidirectional block (Gemma 3)."""
    number = blocks.cumsum(1)
    of_query, of_key = number[:, :, None], number[:, None, :]
    mask = of_key <= of_query                                           # (B, T, S)

    # Padding sees padding, so that no row is empty and no softmax divides zero by zero.
    if segments is not None:
        mask = mask & (segments[:, None, :] == segments[:, :, None])

    if window:
        index = torch.arange(blocks.shape[1], device=blocks.device)
        is_near = index[None, :] > index[:, None] - window              # (T, S)
        mask = mask & (is_near | (of_key == of_query))
    return mask


def make_attn_masks(config, blocks, segments=None):
    """The masks of a DecoderConfig's global layers and of its local ones."""
    mask = make_attn_mask(blocks, segments)

    # A window that holds the whole row hides nothing.
    has_local = config.sliding_window > 0 and config.global_every > 1
    if not has_local or config.sliding_window >= blocks.shape[1]:
        return mask, mask
    return mask, make_attn_mask(blocks, segments, config.sliding_window)


def positions_of(segments):
    """Positions that restart with every segment. segments (B, T), each contiguous -> (B, T)."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    is_start = torch.ones_like(segments, dtype=torch.bool)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]

    # The last start at or before a token is where its segment begins.
    start = torch.where(is_start, index, 0).cummax(1).values
    return index - start


def rope_frequencies(head_dim, theta, scaling, device):
    """Radians that each pair of a head turns in one position: (H / 2,).

    scaling: [factor] divides them; Llama 3's [factor, low_freq_factor, high_freq_factor,
    original_max_position_embeddings] (arXiv 2407.21783) does so to waves above length / low,
    not to those below length / high, and in between in part."""
    index = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequency = theta ** -(index / head_dim)
    if not scaling:
        return frequency
    if len(scaling) == 1:
        return frequency / scaling[0]

    factor, low, high, length = scaling
    waves = frequency * length / (2 * math.pi)                          # in that length
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


def rope_table(positions, head_dim, theta, scaling=()):
    """cos, and sin with the signs of a rotation, of positions (B, T): (B, T, 1, H).

    Always fp32: in bf16 positions past a few hundred run together."""
    frequency = rope_frequencies(head_dim, theta, scaling, positions.device)
    angle = positions.float()[..., None, None] * frequency              # (B, T, 1, H / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rope_tables(config, positions):
    """The tables of a DecoderConfig's global layers and of its local ones."""
    rope = rope_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    if not config.sliding_window:
        return rope, rope
    return rope, rope_table(positions, config.head_dim, config.rope_local_theta)


def rotate(x, rope):
    """Rotary position embedding (arXiv 2104.09864) of x (B, T, N, H), halves paired as Gemma."""
    cos, sin = rope
    h = x.float()
    turned = torch.addcmul(h * cos, h.roll(h.shape[-1] // 2, -1), sin)
    return turned.to(x.dtype)


class KVCache:
    """Keys and values of every layer, allocated once: `size` positions for B rows."""

    def __init__(self, config, batch, size, device, dtype):
        shape = (config.depth, batch, size, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0         # positions filled; moved on once all layers have written

    def update(self, layer, k, v):
        """Write k, v (B, T, K, H) after what is there; all so far, (B, S, K, H)."""
        end = self.length + k.shape[1]
        self.keys[layer, :, self.length:end] = k
        self.values[layer, :, self.length:end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]


# -------------------------------------------------------------------------------------------------
# vision tower: SigLIP's ViT (arXiv 2303.15343)


class ViTBlock(nn.Module):
    is_block = True     # FSDP shards and torch.compile compiles block by block

    def __init__(self, c, layer):
        super().__init__()
        self.num_heads = c.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(c.width, eps=1e-6), nn.LayerNorm(c.width, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(c.width, c.width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(c.width, c.mlp_dim), nn.Linear(c.mlp_dim, c.width)
        self.dropout1, self.dropout2 = dropouts_of(c, layer)

    def forward(self, x, keys=None):
        """x (I, P, D): every patch attends to all patches of its picture; keys (I, P)."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.num_heads, -1)) for f in (self.q, self.k, self.v))
        h = self.o(attention(q, k, v).flatten(2))                       # (I, P, D)
        x = x + self.dropout1(h, keys)
        h = self.fc1(self.norm2(x))
        h = self.fc2(F.gelu(h, approximate='tanh'))
        return x + self.dropout2(h, keys)


def dropouts_of(c, layer):
    """The dropouts after a layer's attention and MLP, f(x, keys), by the keys of its tokens."""
    if c.dropout == 0:
        return (lambda x, keys: x,) * 2
    from keyed import Dropout  # which few runs need
    return Dropout(c.dropout, c.width, 2 * layer), Dropout(c.dropout, c.width, 2 * layer + 1)


def run_block(block, remat, *args):
    """block(*args), whose inside is computed again in the backward pass if remat."""
    if remat and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def check_sizes(c, part, names):
    """Raises ValueError for what a part of a model can not have, or no memory would hold."""
    for name in names.split():
        if not 1 <= getattr(c, name) < 1 << 20:
            raise ValueError(f'{part}.{name}={getattr(c, name)} must be at least 1, below 2^20')
    if not 0 <= getattr(c, 'depth', 0) <= 1000:
        raise ValueError(f'{part}.depth={c.depth} must be at least 0, at most 1000')
    if not 0 <= getattr(c, 'dropout', 0) < 1:
        raise ValueError(f'{part}.dropout={c.dropout}: expected at least 0 and below 1')


def check_vit(c):
    """Raises ValueError for settings that no vision tower can have."""
    check_sizes(c, 'vit', 'image_size patch_size width mlp_dim num_heads')
    if c.image_size % c.patch_size:
        raise ValueError(f'vit.image_size={c.image_size} must be a multiple of '
                         f'vit.patch_size={c.patch_size}')
    if c.width % c.num_heads:
        raise ValueError(f'vit.width={c.width} must be a multiple of vit.num_heads={c.num_heads}')
    if not -1 <= c.feature_layer < c.depth:
        raise ValueError(f'vit.feature_layer={c.feature_layer}: expected -1 to {c.depth - 1}')
    if c.stem not in ('patch', 'conv'):
        raise ValueError(f'vit.stem={c.stem!r}: expected patch or conv')


class ViT(nn.Module):
    """Pictures to patch features."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        check_vit(c)
        if c.stem == 'conv':
            from stem import ConvStem  # which few towers have
            self.stem = ConvStem(c.width, c.patch_size)
        else:
            self.stem = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, c.num_patches, c.width))
        # Layers after feature_layer are not built: a parameter without a gradient would stop DDP.
        num_layers = c.depth if c.feature_layer < 0 else c.feature_layer + 1
        self.blocks = nn.ModuleList(ViTBlock(c, i) for i in range(num_layers))
        self.norm = nn.LayerNorm(c.width, eps=1e-6) if c.feature_layer < 0 else nn.Identity()
        self.init_weights()

    def init_weights(self):
        """As big_vision initialises SigLIP: Xavier in the layers, lecun-normal in the stem."""
        nn.init.normal_(self.pos_embed, std=self.config.width ** -0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity='linear')
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for layer in self.blocks:
                layer.o.weight *= self.config.init_scale
                layer.fc2.weight *= self.config.init_scale

    def forward(self, pixels, keys=None):
        """pixels (I, 3, H, W) as the processor gives them, keys (I,) -> features (I, P, D)."""
        x = self.stem(pixels)                                           # (I, D, rows, columns)
        x = x.flatten(2).transpose(1, 2) + self.pos_embed               # (I, P, D)
        if self.config.dropout and keys is not None:
            from keyed import random_bits
            keys = random_bits(keys, x.shape[1], 4)                     # (I, P)
        for layer in self.blocks:
            x = run_block(layer, self.config.remat, x, keys)
        return self.norm(x)


# -------------------------------------------------------------------------------------------------
# decoder: Gemma (arXiv 2403.08295)


class RMSNormFunction(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight in fp32; x (..., D), weight (D,). Its own gradient takes
    a third of the time that autograd takes, and keeps nothing but x and a number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        # Autocast would take vecdot in half precision.
        with torch.autocast(x.device.type, enabled=False):
            h = x.to(torch.promote_types(x.dtype, torch.float32))
            mean_square = torch.linalg.vecdot(h, h)[..., None] / h.shape[-1]
            scale = torch.rsqrt(mean_square + eps)                      # (..., 1)
            ctx.save_for_backward(x, weight, scale)
            return (h * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            g, h = grad.to(scale.dtype), x.to(scale.dtype)
            g_h = g * h
            grad_weight = scale.flatten() @ g_h.flatten(0, -2)          # (D,)

            # A longer x has a smaller scale: what of the gradient lies along x is taken off.
            along = g_h @ weight.to(scale.dtype)                        # (...)
            along = along[..., None] * scale ** 3 / -h.shape[-1]        # (..., 1)
            grad_x = (g * weight).mul_(scale).addcmul_(h, along)
            return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """Root mean square norm; the weight is stored as its distance from 1 (Gemma) or 0 (Llama)."""

    def __init__(self, width, eps, offset=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x):
        return RMSNormFunction.apply(x, self.offset + self.weight, self.eps)


ACTIVATIONS = {'gelu': lambda x: F.gelu(x, approximate='tanh'), 'silu': F.silu}


def norm_of(c, width, is_used=True):
    """A norm as a DecoderConfig has it, or what does nothing in its place."""
    return RMSNorm(width, c.norm_eps, c.norm_offset) if is_used else nn.Identity()


class DecoderBlock(nn.Module):
    is_block = True     # FSDP shards and torch.compile compiles block by block

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim, self.softcap = layer, c.head_dim, c.attn_logits_softcap
        self.scale = (c.query_pre_attn_scalar or c.head_dim) ** -0.5
        self.is_local = c.sliding_window > 0 and (layer + 1) % c.global_every > 0
        self.norm1, self.norm2 = norm_of(c, c.width), norm_of(c, c.width)
        self.post_norm1, self.post_norm2 = (norm_of(c, c.width, c.post_norms) for _ in range(2))
        self.q_norm, self.k_norm = (norm_of(c, c.head_dim, c.qk_norm) for _ in range(2))
        self.q = nn.Linear(c.width, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k = nn.Linear(c.width, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v = nn.Linear(c.width, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o = nn.Linear(c.num_heads * c.head_dim, c.width, bias=False)
        self.activation = ACTIVATIONS[c.activation]
        self.gate, self.up = (nn.Linear(c.width, c.mlp_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(c.mlp_dim, c.width, bias=False)
        self.dropout1, self.dropout2 = dropouts_of(c, layer)

    def forward(self, x, ropes, masks, cache, keys=None):
        """x (B, T, D); ropes and masks: of global layers, of local ones; keys (B, T)."""
        rope, mask = ropes[self.is_local], masks[self.is_local]
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                       # (B, S, K, H)
        is_causal = mask is None
        h = attention(q, k, v, mask, is_causal, self.scale, self.softcap)
        h = self.o(h.flatten(2))                                        # (B, T, D)
        x = x + self.dropout1(self.post_norm1(h), keys)

        h = self.norm2(x)
        h = self.down(self.activation(self.gate(h)) * self.up(h))
        return x + self.dropout2(self.post_norm2(h), keys)


def check_decoder(c):
    """Raises ValueError for settings that no decoder can have."""
    check_sizes(c, 'decoder', 'vocab_size width mlp_dim num_heads num_kv_heads head_dim '
                              'global_every')
    if c.num_heads % c.num_kv_heads:
        raise ValueError(f'decoder.num_heads={c.num_heads} must be a multiple of '
                         f'decoder.num_kv_heads={c.num_kv_heads}')
    if c.head_dim % 2:
        raise ValueError(f'decoder.head_dim={c.head_dim} must be even: RoPE turns pairs')
    if not -1 <= c.feature_layer < c.depth:
        raise ValueError(f'decoder.feature_layer={c.feature_layer}: expected -1 to {c.depth - 1}')
    if c.activation not in ACTIVATIONS:
        raise ValueError(f'decoder.activation={c.activation!r}: expected gelu or silu')
    for name in ('sliding_window', 'query_pre_attn_scalar', 'attn_logits_softcap'):
        if getattr(c, name) < 0:
            raise ValueError(f'decoder.{name}={getattr(c, name)}: expected 0 or more')
    if c.global_every > 1 and c.sliding_window == 0:
        raise ValueError(f'decoder.global_every={c.global_every} makes the other layers local: '
                         'they need a decoder.sliding_window')
    numbers = [each for each in c.rope_scaling if isinstance(each, (int, float)) and each > 0]
    if len(numbers) not in (0, 1, 4) or numbers != list(c.rope_scaling):
        raise ValueError(f'decoder.rope_scaling={c.rope_scaling}: expected [], [factor] or '
                         '[factor, low_freq_factor, high_freq_factor, '
                         'original_max_position_embeddings]')


def sized(config, vocab_size):
    """A DecoderConfig with a vocabulary that holds the tokenizer's. Raises ValueError."""
    if config.vocab_size == 0:
        return replace(config, vocab_size=-(-vocab_size // 64) * 64)
    if config.vocab_size < vocab_size:
        raise ValueError(f'decoder.vocab_size={config.vocab_size} is less than the {vocab_size} '
                         'of the tokenizer')
    return config


class Learned(NamedTuple):
    """What a model's forward gives of one kind of target."""
    losses: torch.Tensor        # (n,)
    counts: torch.Tensor        # (n,): of how many targets each is the sum
    places: torch.Tensor        # (n,): where in `tokens`, flat, each stands: its row is place // T


def layout(config, x, blocks, segments, masks, positions):
    """(masks, positions) of x (B, T, D), of blocks (None: causal) where they are not given."""
    if masks is None:
        if blocks is None:
            blocks = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        masks = make_attn_masks(config, blocks, segments)
    if positions is None and segments is None:
        positions = torch.arange(x.shape[1], device=x.device)[None]
    elif positions is None:
        positions = positions_of(segments)
    return masks, positions


class Decoder(nn.Module):
    """A language model. With `blocks=None` it is causal."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        check_decoder(c)
        self.embedding = nn.Embedding(c.vocab_size, c.width)
        num_layers = c.depth if c.feature_layer < 0 else c.feature_layer + 1
        self.blocks = nn.ModuleList(DecoderBlock(c, i) for i in range(num_layers))
        self.norm = norm_of(c, c.width, c.feature_layer < 0)
        self.head = nn.Identity() if c.tied else nn.Linear(c.width, c.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        """As big_vision initialises Gemma: truncated normal with variance 1 / fan-in."""
        nn.init.normal_(self.embedding.weight, std=self.config.width ** -0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # A unit normal that is cut at 2 has this standard deviation.
                std = module.in_features ** -0.5 / 0.87962566
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def new_cache(self, batch, size, device):
        """A KVCache for `features`."""
        return KVCache(self.config, batch, size, device, self.embedding.weight.dtype)

    def embed(self, tokens):
        """tokens (B, T) -> (B, T, D), scaled."""
        scale = self.config.embed_scale or math.sqrt(self.config.width)
        return self.embedding(tokens) * scale

    def features(self, x, blocks=None, segments=None, cache=None, masks=None, positions=None,
                 keys=None):
        """Embeddings x (B, T, D) -> hidden states (B, T, D) of `feature_layer`.

        With a cache, `masks` (two, (B, T, S)) and `positions` (B, T) say where new tokens stand;
        without, both follow from blocks and segments. keys (B, T): dropout follows from them."""
        # Plain causal rows need no mask: SDPA has a faster path for them.
        is_plain = masks is None and blocks is None and segments is None
        is_windowed = 0 < self.config.sliding_window < x.shape[1]
        if is_plain and not is_windowed:
            masks = None, None
        masks, positions = layout(self.config, x, blocks, segments, masks, positions)
        ropes = rope_tables(self.config, positions)
        for layer in self.blocks:
            x = run_block(layer, self.config.remat, x, ropes, masks, cache, keys)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)

    def unembed(self, x):
        """Hidden states (..., D) -> logits (..., V)."""
        logits = F.linear(x, self.embedding.weight) if self.config.tied else self.head(x)
        cap = self.config.final_logits_softcap
        if cap:
            logits = (logits / cap).tanh() * cap
        return logits

    def logits(self, tokens, pixels=None, blocks=None, segments=None):
        """tokens (B, T) -> logits (B, T, V)."""
        assert pixels is None, 'a Decoder has no eyes: use a VLM'
        return self.unembed(self.features(self.embed(tokens), blocks, segments))

    def forward(self, tokens, targets, pixels=None, blocks=None, segments=None, num_targets=None,
                label_smoothing=0.0, z_loss=0.0, keys=None):
        """{'text': the cross-entropies in nats}; targets (B, T) are shifted, -100 is ignored.

        num_targets: how many there are, where the caller knows; a GPU is then not waited for."""
        assert pixels is None, 'a Decoder has no eyes: use a VLM'
        x = self.features(self.embed(tokens), blocks, segments, keys=keys)
        return {'text': token_losses(self, x, targets, num_targets, label_smoothing, z_loss)}

    def loss(self, tokens, targets, pixels=None, blocks=None, segments=None):
        """The sum of the losses, and the number of targets."""
        losses, counts, _ = self(tokens, targets, pixels, blocks, segments)['text']
        return losses.sum(), counts.sum()


def positions_where(chosen, count=None):
    """Flat positions of what is True: (count,). Without a count a GPU is waited for."""
    chosen = chosen.flatten()
    if count is None:
        return chosen.nonzero()[:, 0]
    return torch.nonzero_static(chosen, size=count)[:, 0]


def token_losses(decoder, x, targets, num_targets=None, label_smoothing=0.0, z_loss=0.0,
                 chunk=4096):
    """Cross-entropy at the targets only, in chunks whose logits are recomputed in the backward
    pass: (tokens x vocabulary) is never held. x (B, T, D), targets (B, T) -> Learned.

    z_loss: weight of log(sum of exponentials)^2, which keeps logits from drifting (PaLM, arXiv
    2204.02311)."""
    x, targets = x.flatten(0, 1), targets.flatten()
    places = torch.arange(len(targets), device=targets.device)
    if num_targets != len(targets):
        places = positions_where(targets != -100, num_targets)
        x, targets = x.index_select(0, places), targets[places]                 # (targets, D)

    def chunk_losses(x, targets):
        logits = decoder.unembed(x).float()
        losses = F.cross_entropy(logits, targets, reduction='none',
                                 label_smoothing=label_smoothing)
        if z_loss:
            losses = losses + z_loss * logits.logsumexp(-1).square()
        return losses

    if len(x) <= chunk:
        losses = chunk_losses(x, targets)
    else:
        losses = torch.cat([checkpoint(chunk_losses, *pair, use_reentrant=False)
                            for pair in zip(x.split(chunk), targets.split(chunk))])
    return Learned(losses, torch.ones_like(losses), places)


# -------------------------------------------------------------------------------------------------
# vision-language model: PaliGemma (arXiv 2407.07726)


def pixel_shuffle(x, factor):
    """Patches (I, P, D), row by row, to squares of patches (I, P / factor^2, factor^2 * D)."""
    squares = math.isqrt(x.shape[1]) // factor                          # of a side
    x = x.unflatten(1, (squares, factor, squares, factor))
    x = x.transpose(2, 3)                           # (I, squares, squares, factor, factor, D)
    return x.flatten(3).flatten(1, 2)


class VLM(nn.Module):
    """ViT -> pixel shuffle, linear -> decoder. Pictures (I, 3, H, W) come in the order of their
    image tokens in the rows of `tokens`; a row may have any number."""

    def __init__(self, config, vit=None, decoder=None):
        super().__init__()
        self.vit, self.decoder = vit or ViT(config.vit), decoder or Decoder(config.decoder)
        self.config = config = replace(config, vit=self.vit.config, decoder=self.decoder.config)

        side, factor = config.vit.image_size // config.vit.patch_size, config.pixel_shuffle
        if factor < 1 or side % factor:
            raise ValueError(f'pixel_shuffle={factor} must divide the {side} patches of a side')
        features = config.vit.width * factor ** 2
        self.connector = nn.Linear(features, config.decoder.width, config.connector_bias)
        nn.init.normal_(self.connector.weight, std=features ** -0.5)
        if config.connector_bias:
            nn.init.zeros_(self.connector.bias)

    @property
    def image_tokens(self):
        """Tokens that a picture takes."""
        return self.config.image_tokens

    def patches(self, pixels, keys=None):
        """pixels (I, 3, H, W) -> what stands in place of the image tokens (I, image_tokens, D)."""
        return self.connector(pixel_shuffle(self.vit(pixels, keys), self.config.pixel_shuffle))

    def embed(self, tokens, pixels=None, always=False, keys=None):
        """Token embeddings (B, T, D), with the pictures' patches in place of the image tokens.

        always: the tower runs even without a picture, as ranks wait for one that saw none."""
        x = self.decoder.embed(tokens)
        is_image = tokens == self.config.image_token_id
        if pixels is None or len(pixels) == 0:
            torch._assert_async(~is_image.any(), 'image tokens without pictures')
            if always:
                size = self.config.vit.image_size
                x = x + 0.0 * self.patches(x.new_zeros(1, 3, size, size), tokens[0, :1]).sum()
            return x

        count = len(pixels) * self.image_tokens
        error = f'image tokens are not as many as the {count} patches'
        torch._assert_async(is_image.sum() == count, error)
        where = positions_where(is_image, count)
        if keys is not None:            # a picture has that of its first token
            keys = keys.flatten()[where[::self.image_tokens]]
        patches = self.patches(pixels, keys).flatten(0, 1)              # (I * image_tokens, D)
        return x.flatten(0, 1).index_copy(0, where, patches.to(x.dtype)).view_as(x)

    def default_blocks(self, tokens, targets=None):
        """As the model attends: rows with a picture are prefix-LM (a prefix ends at the first
        target), others causal; or all are causal."""
        if self.config.attends == 'causal':
            return torch.ones_like(tokens)
        suffix = torch.zeros_like(tokens)
        if targets is not None:
            suffix[:, 1:] = (targets[:, :-1] != -100).cummax(1).values
        has_picture = (tokens == self.config.image_token_id).any(1, keepdim=True)
        if self.config.attends == 'own' and has_picture.any():
            raise ValueError('the form of this model says who attends to whom: give blocks')
        return torch.where(has_picture, suffix, 1)

    def logits(self, tokens, pixels=None, blocks=None, segments=None):
        """tokens (B, T) -> logits (B, T, V)."""
        if blocks is None:
            blocks = self.default_blocks(tokens)
        x = self.embed(tokens, pixels)
        return self.decoder.unembed(self.decoder.features(x, blocks, segments))

    def forward(self, tokens, targets, pixels=None, blocks=None, segments=None, num_targets=None,
                label_smoothing=0.0, z_loss=0.0, keys=None):
        """As `Decoder.forward`."""
        if blocks is None:
            blocks = self.default_blocks(tokens, targets)
        x = self.embed(tokens, pixels, True, keys)
        x = self.decoder.features(x, blocks, segments, keys=keys)
        return {'text': token_losses(self.decoder, x, targets, num_targets, label_smoothing,
                                     z_loss)}

    loss = Decoder.loss


def __getattr__(name):
    """`model.generate` is read when it is asked for: training has no use for it."""
    if name == 'generate':
        return importlib.import_module('generate').generate
    raise AttributeError(f'model.py has no {name}')
