"""A vision-language-action model: a vision-language model with pi0's action expert (arXiv
2410.24164).

    python train.py config/vla_metaworld.py
    python sample.py --out_dir=out/vla_metaworld --env=metaworld --tasks=button-press-topdown

Axes: B rows, S tokens of a row, A samples with actions, T actions of a chunk, D numbers of an
action, P of a state, L = S + 1 + T places of a row: prefix, state, actions.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from configurator import part
from diffusion import FlowSchedule, check_schedule, sincos
from keyed import random_bits
from model import (
    VLM,
    DecoderBlock,
    DecoderConfig,
    KVCache,
    RMSNorm,
    ViTConfig,
    VLMConfig,
    check_sizes,
    make_attn_masks,
    positions_of,
    rope_table,
    run_block,
    token_losses,
)
from robots import samples
from robots.acting import SampleSettings, sample  # noqa: F401
from robots.chunks import LOSSES, action_loss, draws_of, start_of, state_of
from robots.samples import FILES, form, prepare, statistics  # noqa: F401
from tasks import tower, vlm
from tasks.llm import arguments, check_text_loss  # noqa: F401
from tasks.vlm import eyes  # noqa: F401


@dataclass
class VLAConfig:
    action_dim: int = 0         # numbers of an action: of the setting action_dim
    action_steps: int = 0       # actions of a chunk: of the setting action_steps
    proprio_dim: int = 0        # numbers of the state (0: its token says nothing): of proprio_dim
    width: int = 96             # of the action expert, whose layers and heads are as the decoder's
    mlp_dim: int = 384
    time: str = 'beta'          # how training times fall: beta (pi0) | uniform | logit_normal
    shift: float = 1.0          # above 1: times are noisier
    loss: str = 'mse'           # mse | l1 | huber
    num_noise_draws: int = 1    # noisy versions of a chunk for one pass of the VLM

    def check(self):
        """Raises ValueError for settings that no action expert can have."""
        if self.loss not in LOSSES:
            raise ValueError(f'vla.loss={self.loss!r}: expected one of {", ".join(LOSSES)}')
        check_sizes(self, 'vla', 'action_dim action_steps num_noise_draws width mlp_dim')
        if self.proprio_dim < 0:
            raise ValueError(f'vla.proprio_dim={self.proprio_dim} must be at least 0')
        if self.width % 2:
            raise ValueError(f'vla.width={self.width} must be even')


class TrainSettings:
    """What train.py takes with task=vla, beside its own settings."""
    vla = VLAConfig()
    vit = ViTConfig()
    decoder = DecoderConfig()
    pixel_shuffle = 1           # squares of so many patches a side become one image token
    connector_bias = True       # of the linear layer between vit and decoder
    action_steps = 0            # actions of a chunk; a sample is padded to so many
    action_dim = 0              # of so many numbers,
    proprio_dim = 0             # and the state to so many
    action_weight = 1.0         # of the mean over actions, beside the mean over text
    cameras = []                # names of a robot's pictures, in this order; [] those that its
    #                             samples have
    cameras_of = {}             # data set -> {camera: its name there}, without those it lacks
    stats = ''                  # a stats.json of prepare/stats.py; empty: the one beside the data
    #                             set
    normalize = 'quantile'      # actions and states: quantile (1 %, 99 % to -1, 1) | min_max |
    #                             mean_std | none
    prompt = ''                 # between a picture and its answer, and for actions without words
    image_mean = 0.5            # subtracted from pixels of 0 to 1 (1.0: white is 0)
    image_std = 0.5             # and what they are then divided by
    image_draft = True          # JPEGs may be decoded at 1/2, 1/4 or 1/8, where that is at least
    #                             vit.image_size
    augment = False             # pictures change a little every time they are seen
    document_attention = True   # tokenized sets: attention stops at a document's end (False:
    #                             faster, less exact)
    label_smoothing = 0.0       # of text
    z_loss = 0.0                # weight of log(sum of exponentials)^2, which keeps logits small


KEPT = ('pixel_shuffle', 'connector_bias', 'action_steps', 'action_dim', 'proprio_dim',
        'normalize')


def schedule_of(c):
    return FlowSchedule(c.time, c.shift)


def check(settings, world):
    """Raises ValueError for settings that can not be."""
    samples.check(settings)
    check_text_loss(settings)
    check_schedule('vla', schedule_of, part(settings, 'vla', VLAConfig))
    if not 0 < settings['action_weight'] < math.inf:
        raise ValueError(f'action_weight={settings["action_weight"]} must be above 0: without '
                         'actions it is task=vlm')


def build(settings, tokenizer, load_weights=True):
    """The VLA of the settings. Raises ValueError."""
    config = replace(part(settings, 'vla', VLAConfig), **samples.sizes(settings))
    of_vlm = vlm.config_of(settings, tokenizer)
    if of_vlm.decoder.hf:
        raise ValueError(f'decoder.hf={of_vlm.decoder.hf!r}: the action expert of task=vla reads '
                         'the keys and values of our own decoder; its weights can begin one '
                         '(init_from)')
    return VLA(config, of_vlm, tower('vit', of_vlm.vit, tokenizer, load_weights))


class Prefix:
    """Takes the place of a KVCache where gradients flow: what the decoder's layers leave for the
    expert's."""

    def __init__(self):
        self.layers, self.length = {}, 0

    @torch.compiler.disable     # of what is compiled layer by layer, one graph serves all layers
    def update(self, layer, k, v):
        self.layers[layer] = k, v
        return k, v


class Suffix:
    """Puts the keys and values of a prefix, of some of its rows (A,), before the expert's own."""

    def __init__(self, prefix, rows):
        self.prefix, self.rows = prefix, rows

    @torch.compiler.disable     # of what is compiled layer by layer, one graph serves all layers
    def update(self, layer, k, v):
        old_k, old_v = self.prefix.layers[layer]
        return torch.cat((old_k[self.rows], k), 1), torch.cat((old_v[self.rows], v), 1)


class VLA(VLM):
    """A VLM, and an action expert with weights of its own in every layer, which reads the VLM's
    keys and values.

    Three blocks, [pictures and text] -> [state] -> [actions], each sees itself and what stands
    before it. So the first does not depend on the others: it is computed by itself, once a chunk.
    Time enters as in pi0, by an MLP of each action joined with the time's embedding (not by
    adaptive norms, as in pi0.5). The weights of the VLM keep their names, so a trained one is
    where this begins; a row may have targets of text, an action chunk, or both (then the actions
    see the text that is learned). One row, one sample: rows are not packed."""

    def __init__(self, config, vlm=None, vit=None):
        super().__init__(vlm or VLMConfig(), vit)
        self.policy = c = config
        c.check()
        d = self.decoder.config
        self.schedule = schedule_of(c)
        of_expert = replace(d, width=c.width, mlp_dim=c.mlp_dim)
        self.expert = nn.ModuleList(DecoderBlock(of_expert, i)
                                    for i in range(len(self.decoder.blocks)))
        self.expert_norm = RMSNorm(c.width, d.norm_eps, d.norm_offset)
        self.action_in = nn.Linear(c.action_dim, c.width)
        self.state_in = nn.Linear(max(c.proprio_dim, 1), c.width)
        self.time_in, self.time_out = nn.Linear(2 * c.width, c.width), nn.Linear(c.width, c.width)
        self.action_out = nn.Linear(c.width, c.action_dim)

    def layout(self, tokens, targets, blocks, segments, steps, rows):
        """Who sees whom, and where everything stands: masks (B, L, L) of the decoder for [prefix,
        state, actions], and positions (B, L). tokens (B, S); steps (A, T): which actions are no
        padding, of the rows (A,)."""
        if segments is None:
            segments = torch.ones_like(tokens)
        if blocks is None:
            blocks = self.default_blocks(tokens, targets)

        # rows without actions have a state and a chunk, too, which nothing is learned from
        suffix = torch.ones(len(tokens), 1 + steps.shape[1], dtype=segments.dtype,
                            device=tokens.device)
        begins = suffix.clone()
        begins[:, 2:] = 0                           # the state is a block, all actions are one
        suffix[rows, 1:] = steps.to(suffix)
        masks = make_attn_masks(self.decoder.config, torch.cat((blocks, begins), 1),
                                torch.cat((segments, suffix), 1))

        # the suffix goes on where the row's own tokens end, before its padding
        after = torch.arange(suffix.shape[1], device=tokens.device)
        after = (segments > 0).sum(1, keepdim=True) + after
        return masks, torch.cat((positions_of(segments), after), 1)

    def prefix(self, tokens, pixels, masks, positions, cache, keys=None):
        """Pictures and text through the decoder, which leaves keys and values in `cache`: hidden
        states (B, S, width of the decoder)."""
        S = tokens.shape[1]
        masks = tuple(mask[:, :S, :S] for mask in masks)
        x = self.embed(tokens, pixels, True, keys)
        return self.decoder.features(x, None, None, cache, masks, positions[:, :S], keys)

    def velocity(self, x, t, state, mask, positions, cache, keys=None):
        """What the expert says of x (A, T, D) at the times t (A,); state (A, P), mask
        (A, 1 + T, L), positions and keys (A, 1 + T) -> (A, T, D)."""
        # the state's token, and each action with its time
        d = self.decoder.config
        h = self.action_in(x)
        time = sincos(t, h.shape[-1])[:, None].expand(h.shape).to(h)
        h = self.time_out(F.silu(self.time_in(torch.cat((h, time), -1))))
        h = torch.cat((self.state_in(state)[:, None], h), 1)

        # the decoder's rotary positions, local layers with their own
        rope = rope_table(positions, d.head_dim, d.rope_theta, d.rope_scaling)
        ropes = rope, rope
        if d.sliding_window:
            ropes = rope, rope_table(positions, d.head_dim, d.rope_local_theta)
        for block in self.expert:       # the expert sees the whole prefix in local layers, too
            h = run_block(block, d.remat, h, ropes, (mask, mask), cache, keys)
        return self.action_out(self.expert_norm(h)[:, 1:])

    def forward(self, tokens, lowdim, targets=None, pixels=None, blocks=None, segments=None,
                num_targets=None, label_smoothing=0.0, z_loss=0.0, noise=None, time=None,
                keys=None):
        """{'text': as `VLM.forward` has it, 'actions': as `DiffusionPolicy.forward`}.

        A weighted sum of both is what is learned: with one left out, some parameters have no
        gradient (DDP waits)."""
        c, draws, S = self.policy, self.policy.num_noise_draws, tokens.shape[1]
        if targets is None:
            targets = torch.full_like(tokens, -100)

        # the prefix once, whatever the number of noisy versions of a chunk
        rows = lowdim['rows']
        x, t, target, valid = draws_of(lowdim, self.schedule, draws, noise, time)
        masks, positions = self.layout(tokens, targets, blocks, segments, valid[::draws].any(2),
                                       rows)
        prefix = Prefix()
        hidden = self.prefix(tokens, pixels, masks, positions, prefix, keys)

        # the expert, over the rows that have actions
        state = state_of(lowdim, c, len(rows), tokens.device).repeat_interleave(draws, 0)
        of_draws = rows.repeat_interleave(draws)
        places = positions[of_draws, S:]
        if keys is not None:            # of a chunk's dropout: by the row's first token
            keys = random_bits(keys[rows, 0], draws * places.shape[1], 5).view_as(places)
        output = self.velocity(x, t, state, masks[0][of_draws, S:], places,
                               Suffix(prefix, of_draws), keys)
        text = token_losses(self.decoder, hidden, targets, num_targets, label_smoothing, z_loss)
        return {'text': text,
                'actions': action_loss(c.loss, output, target, valid, draws, rows * S)}

    def loss(self, **inputs):
        """((sum of the losses, how many targets they are of) of the text, the same of the
        actions); inputs: as of `forward`."""
        learned = self(**inputs)
        text, actions = learned['text'], learned['actions']
        return ((text.losses.sum(), text.counts.sum()),
                (actions.losses.sum(), actions.counts.sum()))

    @torch.no_grad()
    def sample(self, tokens, pixels=None, blocks=None, segments=None, lowdim=None, noise=None,
               steps=10, sampler=''):
        """Actions (B, T, D), the prefix computed once. Arguments as of `DiffusionPolicy.sample`;
        every row of tokens is a prompt, so `rows` are not read."""
        c, d, device = self.policy, self.decoder.config, tokens.device
        was_training = self.training
        self.eval()
        lowdim, (batch, S) = lowdim or {}, tokens.shape
        x, is_wanted = start_of(lowdim, c, noise)
        state = state_of(lowdim, c, batch, device)
        real = torch.ones(batch, c.action_steps, dtype=torch.bool, device=device)
        masks, positions = self.layout(tokens, None, blocks, segments, real,
                                       torch.arange(batch, device=device))

        # velocity leaves the cache's length, and overwrites what stands behind it
        cache = KVCache(d, batch, S + 1 + c.action_steps, device,
                        self.decoder.embedding.weight.dtype)
        self.prefix(tokens, pixels, masks, positions, cache)

        # numbers that a robot does not have are 0 there, as in training
        def predict(x, t):
            return self.velocity(x.where(is_wanted, 0), t, state, masks[0][:, S:],
                                 positions[:, S:], cache)

        x = self.schedule.sample(predict, x, steps, sampler or 'euler')
        self.train(was_training)
        return x.where(is_wanted, 0)


# -----------------------------------------------------------------------------------------------
# training


def count(batch):
    """{kind: targets of a batch}."""
    return {'text': batch['num_targets'], 'actions': samples.count_actions(batch)}


def weights(settings):
    """{kind: what its mean weighs, beside the text's}."""
    return {'actions': settings['action_weight']}


def inputs(run, batch, tensors):
    """Rows of text and pictures, and chunks in the model's units."""
    lowdim = samples.lowdim_of(run, tensors, run.model.policy)
    return {key: value for key, value in tensors.items() if key != 'beside'} | dict(lowdim=lowdim)
