"""Text to image: a diffusion transformer, and what it or another denoiser draws of sentences.

    model = build(DiTConfig(), decoder_config, vocab_size, empty_ids)
    pictures = model.sample(tokens, segments, keys, guidance=4.0)

Axes: B batch, I pictures, C channels, H W rows and columns of a picture or latent, P patches,
S tokens of a sentence, D width, W width of the text tower.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import DenoiserBlock, JointBlock, schedule_of, sincos
from keyed import normal, random_bits, uniform
from model import Learned, check_sizes, run_block


@dataclass
class DiTConfig:
    image_size: int = 32        # pixels of a side, or rows of a latent
    channels: int = 3           # 3 of pictures, 4 of Stable Diffusion's latents
    patch_size: int = 4
    width: int = 256
    depth: int = 6              # blocks
    mlp_dim: int = 1024
    num_heads: int = 4
    attention: str = 'cross'    # how the sentence is read: cross | joint (both see both, SD3)
    objective: str = 'flow'     # flow | ddpm
    time: str = 'logit_normal'  # flow: how training times fall: uniform | beta | logit_normal
    shift: float = 1.0          # flow: above 1: times are noisier, as large pictures want them
    schedule: str = 'squaredcos_cap_v2'     # ddpm: linear | scaled_linear | squaredcos_cap_v2
    schedule_steps: int = 1000  # ddpm
    prediction: str = 'v_prediction'  # ddpm: epsilon (spacing=leading) | sample | v_prediction
    spacing: str = 'trailing'   # ddpm: the times sampled at: trailing | leading | linspace
    clip_range: float = 0.0     # ddpm: clean pictures lie within so much of 0 (0: anywhere)
    drop: float = 0.1           # share of samples learned without their sentence, for guidance
    remat: bool = False         # recompute blocks in the backward pass: less memory, more time
    vae: str = ''               # a folder of diffusers: its vae/ makes latents, which are learned

    def check(self):
        """Raises ValueError for settings that no DiT can have."""
        if self.attention not in ('cross', 'joint'):
            raise ValueError(f'dit.attention={self.attention!r}: expected cross or joint')
        check_sizes(self, 'dit', 'image_size channels patch_size width depth mlp_dim num_heads '
                                 'schedule_steps')
        if self.image_size % self.patch_size:
            raise ValueError(f'dit.image_size={self.image_size} must be a multiple of '
                             f'dit.patch_size={self.patch_size}')
        # half of the width for rows and half for columns, each of them sines and cosines
        if self.width % (2 * self.num_heads) or self.width % 4:
            raise ValueError(f'dit.width={self.width} must be a multiple of 4 and of twice '
                             f'dit.num_heads={self.num_heads}')
        if not 0 <= self.drop < 1:
            raise ValueError(f'dit.drop={self.drop}: expected a share of at least 0 and below 1')


# -------------------------------------------------------------------------------------------------
# a diffusion transformer (arXiv 2212.09748)


class DiT(nn.Module):
    """A transformer over the patches of a noisy picture. context: width of a sentence's features.

    The sentence is read token by token, and its mean, beside the time, modulates every block (as
    in SD3)."""

    def __init__(self, config, context):
        super().__init__()
        self.config = c = config
        c.check()
        numbers = c.channels * c.patch_size ** 2

        # the times are from 0 to so much
        self.steps = 1
        if c.objective == 'ddpm':
            self.steps = c.schedule_steps

        # patches, and where they are: one half says the row, the other the column
        self.input = nn.Linear(numbers, c.width)
        side = c.image_size // c.patch_size
        place = sincos(torch.arange(side) / side, c.width // 2, 2 / side, 4.0)      # (side, D / 2)
        rows = place.repeat_interleave(side, 0)
        columns = place.repeat(side, 1)
        self.pos_embed = nn.Parameter(torch.cat((rows, columns), 1)[None])      # (1, P, D)

        # time and sentence
        self.time = nn.Sequential(
            nn.Linear(c.width, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.context = nn.Sequential(
            nn.LayerNorm(context, eps=1e-6), nn.Linear(context, c.width))
        self.mean = nn.Linear(c.width, c.width)

        self.blocks = nn.ModuleList()
        for i in range(c.depth):
            if c.attention == 'cross':
                block = DenoiserBlock(c, c.width)
            else:
                # nothing reads what the sentence becomes in the last block
                block = JointBlock(c, ends=i == c.depth - 1)
            self.blocks.append(block)

        self.norm = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False)
        self.modulate = nn.Linear(c.width, 2 * c.width)
        self.output = nn.Linear(c.width, numbers)
        self.init_weights()

    def init_weights(self):
        """As the paper has it: Xavier, and zero where a block, or the whole, begins as nothing."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.zeros_(module.bias)
            if name.endswith(('modulate', 'output')):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)

    def forward(self, x, t, context, context_mask):
        """x (B, C, H, W), times t (B,), context (B, S, W), context_mask bool (B, S), True = a
        token -> as x."""
        c = self.config
        patches = F.pixel_unshuffle(x, c.patch_size).flatten(2).mT
        h = self.input(patches) + self.pos_embed        # (B, P, D)

        # what modulates the blocks: the time, and the mean of the sentence
        context = self.context(context)
        is_token = context_mask[..., None].to(x.dtype)
        mean = (context * is_token).sum(1) / is_token.sum(1).clamp(min=1)
        condition = F.silu(self.time(sincos(t / self.steps, c.width)) + self.mean(mean))

        # all patches ask alike: one row of the mask will do
        mask = context_mask[:, None]        # (B, 1, S)
        if c.attention == 'joint':
            mask = F.pad(mask, (h.shape[1], 0), value=True)     # (B, 1, P + S)

        for block in self.blocks:
            if c.attention == 'joint':
                h, context = run_block(block, c.remat, h, context, condition, mask)
            else:
                h = run_block(block, c.remat, h, condition, None, context, mask)

        # patches to a picture
        shift, scale = self.modulate(condition)[:, None].chunk(2, -1)
        h = self.output(torch.addcmul(shift, self.norm(h), 1 + scale)).mT       # (B, C p p, P)
        side = c.image_size // c.patch_size
        return F.pixel_shuffle(h.unflatten(2, (side, side)), c.patch_size)


# -------------------------------------------------------------------------------------------------
# sentences in, pictures out


class TextToImage(nn.Module):
    """Pictures from sentences, by a DiT or another denoiser, in pixels of -1 to 1 or in latents.

    text: a Decoder (at its feature_layer), or a module: text(tokens (B, S), segments (B, S)) ->
    (B, S, W).

    denoiser: denoiser(x (B, C, H, W), t (B,), context (B, S, W), context_mask (B, S)) -> as x. One
    that has `read` is given read(context) in sampling, once for all steps, and x once for its two
    sentences.

    vae: turns pictures to latents and back (`encode(pixels, keys)`, `decode`); without it pixels,
    or latents, go in and come out.

    empty: token ids of the empty sentence, which is what is read where the condition is dropped,
    in training (`config.drop`) and in sampling (classifier-free guidance, arXiv 2207.12598)."""

    def __init__(self, config, text, denoiser=None, vae=None, empty=(0,)):
        super().__init__()
        self.config = config
        self.schedule = schedule_of(config)
        # the part that a language model begins
        self.reader = 'text'
        self.text = text
        self.vae = vae
        # no gradient would reach an output layer
        if hasattr(text, 'head'):
            text.head = nn.Identity()
        self.denoiser = denoiser or DiT(config, text.config.width)
        self.register_buffer('empty', torch.tensor(empty), persistent=False)

    def encode(self, tokens, segments, keys=None):
        """What a denoiser reads of sentences (B, S): features (B, S, W) and their mask (B, S).
        Dropout follows from keys (B,)."""
        if hasattr(self.text, 'embed'):
            if keys is not None and self.training and self.text.config.dropout:
                keys = random_bits(keys, tokens.shape[1], 4)
            features = self.text.features(self.text.embed(tokens), None, segments, keys=keys)
        else:
            features = self.text(tokens, segments)
        return features, segments > 0

    def dropped(self, tokens, segments, rows):
        """tokens and segments (B, S) with the empty sentence in some rows, bool (B,)."""
        length, room = len(self.empty), tokens.shape[1]
        assert length <= room, (
            f'rows of {room} tokens have no room for the {length} of no sentence')
        padding = (0, room - length)
        empty = F.pad(self.empty, padding)
        empty_segments = F.pad(torch.ones_like(self.empty), padding)

        rows = rows[:, None]
        return torch.where(rows, empty, tokens), torch.where(rows, empty_segments, segments)

    def forward(self, tokens, segments, pixels, rows, keys=None, noise=None, time=None):
        """{'pictures': their mean squared errors}. pixels (I, C, H, W), of rows (I,) of tokens.

        keys int64 (B,) give noise, times and who learns without a sentence; noise (I, C, H, W) and
        time (I,) may be given instead. Outside of training no sentence is dropped."""
        c, n = self.config, len(rows)
        if not n:               # no row has a picture: one that counts nothing goes through
            rows = torch.zeros(1, dtype=torch.long, device=tokens.device)
            pixels = torch.zeros(1, c.channels, c.image_size, c.image_size, device=tokens.device)
        T, tokens, segments = tokens.shape[1], tokens[rows], segments[rows]
        if keys is not None:
            keys = keys[rows]
        x = pixels
        if self.vae and pixels.shape[1] != c.channels:
            with torch.no_grad():
                x = self.vae.encode(pixels, keys)
        if noise is None:
            noise = normal(keys, x.shape[1:])
        if time is None:
            time = self.schedule.times(uniform(keys, 1, 1)[:, 0])
        if self.training and c.drop and keys is not None:
            is_dropped = uniform(keys, 1, 2)[:, 0] < c.drop
            tokens, segments = self.dropped(tokens, segments, is_dropped)

        noisy = self.schedule.add_noise(x, noise, time)
        output = self.denoiser(noisy, time, *self.encode(tokens, segments, keys))
        target = self.schedule.target(x, noise, time)
        losses = F.mse_loss(output.float(), target, reduction='none')[:n].flatten(1).mean(1)
        return {'pictures': Learned(losses, torch.ones_like(losses), rows[:n] * T)}

    def loss(self, **inputs):
        """(sum of the losses, how many pictures they are of); inputs: as of `forward`."""
        learned = self(**inputs)['pictures']
        return learned.losses.sum(), learned.counts.sum()

    @torch.no_grad()
    def sample(self, tokens, segments=None, keys=None, noise=None, steps=50, sampler='',
               guidance=1.0, image=None, strength=1.0, mask=None):
        """Pictures (B, C, H, W) of sentences (B, S), from noise that is given or follows from keys
        (B,).

        guidance: 1 the condition as it is, above it more of what tells it from the empty sentence,
        0 that one alone. sampler: euler | heun of flow, ddim | ddpm of ddpm; the first if ''.

        image (B, C, H, W): where to begin, with as much noise as `strength`, 0 to 1, of the steps
        take away (SDEdit, arXiv 2108.01073). mask, bool (B, 1, H, W) of what is sampled: True is
        drawn anew, the rest stays the image's."""
        c, schedule = self.config, self.schedule
        was_training = self.training
        self.eval()
        if segments is None:
            segments = torch.ones_like(tokens)
        if noise is None:
            noise = normal(keys, (c.channels, c.image_size, c.image_size))
        if not sampler and c.objective == 'flow':
            sampler = 'euler'
        elif not sampler:
            sampler = 'ddim'
        predict = self.guided(tokens, segments, guidance)

        # from noise alone, or from an image with some of it
        x, skip, after = noise, 0, None
        if image is not None:
            if self.vae and image.shape[1] != c.channels:
                image = self.vae.encode(image, keys)
            x = image
            skip = steps - int(steps * strength)
            if skip < steps:
                first = schedule.timesteps(steps)[skip].item()
                x = schedule.add_noise(image, noise, first)

        # what stays is at every time the image with that time's noise
        if image is not None and mask is not None:
            def after(x, t):
                return torch.where(mask, x, schedule.add_noise(image, noise, t))

        x = schedule.sample(predict, x, steps, sampler, keys, skip=skip, after=after)
        self.train(was_training)
        if self.vae:
            x = self.vae.decode(x)
        return x

    def guided(self, tokens, segments, guidance):
        """predict(x (B, C, H, W), t (B,)): what the denoiser says of these sentences (B, S), and
        how far that goes beyond what it says of none."""
        # one batch: with the sentences, and without
        has_two = guidance != 1
        if has_two:
            everyone = torch.ones_like(tokens[:, 0], dtype=torch.bool)
            empty, empty_segments = self.dropped(tokens, segments, everyone)
            tokens = torch.cat((tokens, empty))
            segments = torch.cat((segments, empty_segments))

        # what is the same at all times is computed once
        context, context_mask = self.encode(tokens, segments)
        can_read = hasattr(self.denoiser, 'read')
        if can_read:
            context = self.denoiser.read(context)

        def predict(x, t):
            if has_two and not can_read:
                x = torch.cat((x, x))
                t = torch.cat((t, t))
            output = self.denoiser(x, t, context, context_mask)
            if not has_two:
                return output
            told, untold = output.chunk(2)
            return untold + guidance * (told - untold)

        return predict
