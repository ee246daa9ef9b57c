"""A robot's policy: a chunk of actions from a state, a sentence and pictures, by diffusion
(Diffusion Policy, arXiv 2303.04137).

    python train.py config/policy_metaworld_state.py
    python sample.py --out_dir=out/policy_metaworld_state --env=metaworld --episodes=20
    python sample.py --out_dir=out/policy_metaworld_state --serve_policy=8000

Axes: A samples with actions, T actions of a chunk, D numbers of an action, P of a state, S tokens,
W width of a token.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import pictures
from configurator import part
from diffusion import check_objective, check_schedule, check_widths, schedule_of, sincos
from model import VLM, Decoder, DecoderConfig, ViTConfig, check_sizes, make_attn_mask, sized
from robots import samples
from robots.acting import SampleSettings, sample  # noqa: F401
from robots.chunks import LOSSES, action_loss, draws_of, start_of, state_of
from robots.denoisers import MLPDenoiser, Pool, Transformer, UNet1d
from robots.samples import FILES, form, prepare  # noqa: F401
from tasks import defaults, tower, vlm
from usage import unused


@dataclass
class PolicyConfig:
    action_dim: int = 0         # numbers of an action: of the setting action_dim
    action_steps: int = 0       # actions of a chunk: of the setting action_steps
    proprio_dim: int = 0        # numbers of the state (0: it is not seen): of proprio_dim
    encoder: str = 'none'       # what else is seen: none | text: tokens, by the decoder | vlm: and
    #                             pictures, by ViT, connector and decoder
    denoiser: str = 'mlp'       # mlp: of the whole chunk | unet: the paper's, over time |
    #                             transformer: a DiT
    width: int = 512            # of mlp and transformer; of the time's embedding
    depth: int = 3              # layers of mlp and transformer
    mlp_dim: int = 1024
    num_heads: int = 8          # transformer
    pool: int = 4               # mlp, unet: tokens become so many vectors of width `width`
    channels: tuple = (256, 512, 1024)      # unet: of each halving of the chunk, and the first
    kernel_size: int = 5        # unet
    objective: str = 'flow'     # flow | ddpm
    time: str = 'uniform'       # flow: how training times fall: uniform | beta (pi0) |
    #                             logit_normal
    shift: float = 1.0          # flow: above 1: times are noisier
    schedule: str = 'squaredcos_cap_v2'     # ddpm: linear | scaled_linear | squaredcos_cap_v2
    schedule_steps: int = 100   # ddpm
    prediction: str = 'sample'  # ddpm: epsilon (the paper's) | sample | v_prediction
    spacing: str = 'trailing'   # ddpm: the times that are sampled at: trailing | leading
    #                             (epsilon's) | linspace
    clip_range: float = 0.0     # ddpm: clean actions lie within so much of 0 (0: anywhere)
    loss: str = 'mse'           # mse | l1 | huber
    num_noise_draws: int = 1    # noisy versions of a chunk for one pass of the encoder

    def check(self):
        """Raises ValueError for settings that no policy can have."""
        choices = dict(encoder=('none', 'text', 'vlm'), denoiser=('mlp', 'unet', 'transformer'),
                       objective=('flow', 'ddpm'), loss=tuple(LOSSES))
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'policy.{name}={getattr(self, name)!r}: expected one of '
                                 f'{", ".join(allowed)}')
        check_sizes(self, 'policy', 'action_dim action_steps num_noise_draws pool width depth '
                                    'mlp_dim num_heads kernel_size schedule_steps')
        if self.proprio_dim < 0:
            raise ValueError(f'policy.proprio_dim={self.proprio_dim} must be at least 0')
        if self.width % (2 * self.num_heads):
            raise ValueError(f'policy.width={self.width} must be a multiple of twice '
                             f'policy.num_heads={self.num_heads}')

        # the U-Net halves the chunk, and its norms are of eight groups
        if self.denoiser != 'unet':
            return
        check_widths('policy.channels', self.channels)
        unit = 2 ** (len(self.channels) - 1)
        if any(c % 8 for c in self.channels):
            raise ValueError(f'policy.channels={self.channels} must be multiples of 8')
        if self.action_steps % unit:
            raise ValueError(f'action_steps={self.action_steps} must be a multiple of {unit}, to '
                             f'be halved for all policy.channels={self.channels} but the first')


class TrainSettings:
    """What train.py takes with task=policy, beside its own settings."""
    policy = PolicyConfig()
    vit = ViTConfig()           # policy.encoder=vlm
    decoder = DecoderConfig()   # policy.encoder=text and vlm
    pixel_shuffle = 1           # squares of so many patches a side become one image token
    connector_bias = True       # of the linear layer between vit and decoder
    action_steps = 0            # actions of a chunk; a sample is padded to so many
    action_dim = 0              # of so many numbers,
    proprio_dim = 0             # and the state to so many
    cameras = []                # names of a robot's pictures, in this order; [] those that its
    #                             samples have
    cameras_of = {}             # data set -> {camera: its name there}, without those it lacks
    stats = ''                  # a stats.json of prepare/stats.py; empty: the one beside the data
    #                             set
    normalize = 'quantile'      # actions and states: quantile (1 %, 99 % to -1, 1) | min_max |
    #                             mean_std | none
    prompt = ''                 # the sentence of a sample that has none
    image_mean = 0.5            # subtracted from pixels of 0 to 1 (1.0: white is 0)
    image_std = 0.5             # and what they are then divided by
    image_draft = True          # JPEGs may be decoded at 1/2, 1/4 or 1/8, where that is at least
    #                             vit.image_size
    augment = False             # pictures change a little every time they are seen


# what a branch does not read
WORDS = ('decoder.', 'prompt')
PICTURES = ('vit.', 'pixel_shuffle', 'connector_bias', 'cameras', 'cameras_of', 'image_mean',
            'image_std', 'image_draft', 'augment')
NOT_OF_ENCODER = dict(none=(*WORDS, *PICTURES, 'policy.pool'), text=PICTURES)
NOT_OF_DENOISER = dict(mlp=('num_heads', 'channels', 'kernel_size'),
                       unet=('depth', 'mlp_dim', 'num_heads'),
                       transformer=('pool', 'channels', 'kernel_size'))
KEPT = ('pixel_shuffle', 'connector_bias', 'action_steps', 'action_dim', 'proprio_dim',
        'normalize')


def check(settings, world):
    """Raises ValueError for settings that can not be; lines on those that are not used."""
    samples.check(settings)
    known, c = defaults('policy'), part(settings, 'policy', PolicyConfig)
    check_objective(settings, known, 'policy')
    check_schedule('policy', schedule_of, c)

    # parts and pictures that this policy does not have; a config may serve several
    lines = unused(settings, known, NOT_OF_ENCODER.get(c.encoder, ()),
                   f'policy.encoder={c.encoder}')
    names = [f'policy.{name}' for name in NOT_OF_DENOISER.get(c.denoiser, ())]
    return lines + unused(settings, known, names, f'policy.denoiser={c.denoiser}')


def eyes(settings):
    """A pictures.Eyes, or None where pictures are not seen."""
    if settings['policy.encoder'] == 'vlm':
        return pictures.eyes_of(settings, settings['vit.image_size'])
    return None


def build(settings, tokenizer, load_weights=True):
    """The DiffusionPolicy of the settings. Raises ValueError."""
    config = replace(part(settings, 'policy', PolicyConfig), **samples.sizes(settings))
    config.check()

    # a tower that is asked for by name is never left out in silence
    for key, encoders in (('decoder', ('text', 'vlm')), ('vit', ('vlm',))):
        name = settings[f'{key}.hf']
        if name and config.encoder not in encoders:
            raise ValueError(f'{key}.hf={name!r}: policy.encoder={config.encoder} has no {key}, '
                             f'expected {" or ".join(encoders)}')
    encoder = None
    if config.encoder == 'text':
        decoder = sized(part(settings, 'decoder', DecoderConfig), tokenizer.vocab_size)
        encoder = tower('decoder', decoder, tokenizer, load_weights) or Decoder(decoder)
    elif config.encoder == 'vlm':
        encoder = vlm.build(settings, tokenizer, load_weights)
    return DiffusionPolicy(config, encoder)


class DiffusionPolicy(nn.Module):
    """A chunk of actions from a state, a sentence and pictures. encoder: None, a Decoder (text) or
    a VLM.

    `tokens` hold the sentence, and image tokens where the pictures of each sample go (any number
    of cameras)."""

    def __init__(self, config, encoder=None):
        super().__init__()
        self.config = c = config
        c.check()
        self.encoder = encoder
        # the part that a language or vision-language model begins
        self.reader = 'encoder' if encoder else ''
        self.schedule = schedule_of(c)

        # context: numbers of a token; condition: those of the vector that modulates
        self.pool, context, condition = None, 0, max(c.proprio_dim, 1)
        if encoder:
            decoder = getattr(encoder, 'decoder', encoder)
            decoder.head = nn.Identity()            # no gradient would reach an output layer
            context = decoder.config.width
            # a token that is there when no other is
            self.blank = nn.Parameter(torch.zeros(1, 1, context))
        # a transformer reads tokens itself
        if encoder and c.denoiser != 'transformer':
            self.pool = Pool(context, c.width, c.pool)
            condition += c.pool * c.width

        if c.denoiser == 'mlp':
            self.denoiser = MLPDenoiser(c, condition)
        elif c.denoiser == 'unet':
            self.denoiser = UNet1d(c.action_dim, condition, c.channels, c.kernel_size, c.width)
        else:
            self.denoiser = Transformer(c, condition, context)

    @property
    def image_tokens(self):
        """Tokens that a picture takes."""
        return getattr(self.encoder, 'image_tokens', 0)

    def encode(self, lowdim, tokens, pixels, blocks, segments, batch, device, keys=None):
        """Everything that is computed once a chunk: (condition (A, C), context (A, S, W) or None,
        its mask (A, S))."""
        condition = state_of(lowdim, self.config, batch, device)
        if self.encoder is None:
            return condition, None, None

        # what the encoder makes of every token
        if isinstance(self.encoder, VLM):
            if blocks is None:
                blocks = self.encoder.default_blocks(tokens)
            x = self.encoder.embed(tokens, pixels, True, keys)
            x = self.encoder.decoder.features(x, blocks, segments, keys=keys)
        else:
            x = self.encoder.features(self.encoder.embed(tokens), blocks, segments, keys=keys)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        if segments is not None:
            mask = segments > 0

        # of the rows that have actions, with the token that is always there
        if 'rows' in lowdim:
            x, mask = x[lowdim['rows']], mask[lowdim['rows']]
        x = torch.cat((self.blank.to(x).expand(len(x), -1, -1), x), 1)
        mask = F.pad(mask, (1, 0), value=True)
        if self.pool is None:
            return condition, x, mask
        return torch.cat((condition, self.pool(x, mask)), 1), None, None

    def denoise(self, x, t, condition, context, context_mask, valid=None):
        """The model's output (B, T, D) at x (B, T, D), times t (B,); valid (B, T, D): what is not
        padding."""
        time = sincos(self.schedule.fraction(t), self.config.width)
        if self.config.denoiser != 'transformer':
            return self.denoiser(x, time, condition)

        # padded actions are in no segment: nobody sees them
        mask = None
        if valid is not None:
            steps = valid.any(2).long()
            mask = make_attn_mask(torch.zeros_like(steps), steps)
        if context is not None:
            context_mask = context_mask[:, None].expand(-1, x.shape[1], -1)
        return self.denoiser(x, time, condition, mask, context, context_mask)

    def forward(self, lowdim, tokens=None, pixels=None, blocks=None, segments=None, noise=None,
                time=None, keys=None):
        """{'actions': the losses of each chunk}, means over the noise draws; they count
        `valid_numbers`.

        noise (A * draws, T, D) and time (A * draws,) are given, or follow from lowdim's keys;
        keys (B, T) are those of tokens, which the encoder's dropout follows from."""
        c, draws = self.config, self.config.num_noise_draws
        device = lowdim['actions'].device
        encoded = self.encode(lowdim, tokens, pixels, blocks, segments, len(lowdim['actions']),
                              device, keys)
        x, t, target, valid = draws_of(lowdim, self.schedule, draws, noise, time)

        # one pass of the encoder serves all noisy versions of a chunk
        repeated = []
        for each in encoded:
            repeated.append(None if each is None else each.repeat_interleave(draws, 0))
        output = self.denoise(x, t, *repeated, valid)
        places = None
        if tokens is not None:
            places = lowdim['rows'] * tokens.shape[1]
        return {'actions': action_loss(c.loss, output, target, valid, draws, places)}

    def loss(self, **inputs):
        """(sum of the losses, how many numbers they are of); inputs: as of `forward`."""
        learned = self(**inputs)['actions']
        return learned.losses.sum(), learned.counts.sum()

    @torch.no_grad()
    def sample(self, tokens=None, pixels=None, blocks=None, segments=None, lowdim=None, noise=None,
               steps=10, sampler=''):
        """Actions (A, T, D). lowdim: proprio, proprio_mask, action_mask, rows, and keys (A,),
        unless noise is given (A, T, D); sampler: euler | heun of flow, ddim | ddpm of ddpm; the
        first if ''."""
        device, was_training = next(self.parameters()).device, self.training
        self.eval()
        lowdim = lowdim or {}
        x, is_wanted = start_of(lowdim, self.config, noise)
        encoded = self.encode(lowdim, tokens, pixels, blocks, segments, len(x), device)

        # numbers that a robot does not have are 0 there, as in training
        def predict(x, t):
            return self.denoise(x.where(is_wanted, 0), t, *encoded)

        if not sampler:
            sampler = 'euler' if self.config.objective == 'flow' else 'ddim'
        x = self.schedule.sample(predict, x, steps, sampler, lowdim.get('keys'))
        self.train(was_training)
        return x.where(is_wanted, 0)


# -----------------------------------------------------------------------------------------------
# training


def statistics(settings, folders):
    """As robots/samples.py has it, of what learns from actions alone."""
    return samples.statistics(settings, folders, learns_text=False)


def count(batch):
    """{kind: targets of a batch}; a sentence is read, not learned."""
    return {'actions': samples.count_actions(batch)}


def inputs(run, batch, tensors):
    """Chunks in the model's units, and what is seen; text is not learned."""
    seen = {key: tensors.get(key) for key in ('tokens', 'pixels', 'blocks', 'segments', 'keys')}
    return dict(lowdim=samples.lowdim_of(run, tensors, run.model.config), **seen)
