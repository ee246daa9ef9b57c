"""Picture-name pairs: SigLIP (arXiv 2303.15343), the first stage of a vision-language model whose
tower starts from nothing.

    python train.py config/siglip_emoji.py

Axes: I pictures, N texts, T tokens of a text, P patches, D width.
"""
import math
import string

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import pictures
from configurator import part
from keyed import random_bits, random_keys
from model import Decoder, DecoderConfig, Learned, ViT, ViTConfig, VLMConfig, sized
from processor import LEARNED, SEEN, question
from shards import BadSample
from tasks import tower


class TrainSettings:
    """What train.py takes with task=siglip, beside its own settings."""
    vit = ViTConfig()
    decoder = DecoderConfig()   # the text tower
    pair_with = 'batch'         # a picture is compared with the texts of its batch (batch) or of
    #                             the whole mix (all)
    pair_scale = 10.0           # the factor of the cosines at the start
    pair_bias = -10.0           # the logit of a pair at the start, near the log-odds of a match
    image_mean = 0.5            # subtracted from pixels of 0 to 1 (1.0: white is 0)
    image_std = 0.5             # and what they are then divided by
    image_draft = True          # JPEGs may be decoded at 1/2, 1/4 or 1/8, where that is at least
    #                             vit.image_size
    augment = False             # drawings change a little every time they are seen


def check(settings, world):
    """Raises ValueError for settings that can not be."""
    if settings['pair_with'] not in ('batch', 'all'):
        raise ValueError(f'pair_with={settings["pair_with"]!r}: expected batch or all')
    if settings['pair_scale'] <= 0:
        raise ValueError(f'pair_scale={settings["pair_scale"]} must be above 0')
    batch_size = settings['batch_size']
    micro_batch = settings['micro_batch_size'] or batch_size // world
    if settings['pair_with'] == 'batch' and micro_batch != batch_size:
        raise ValueError(f'pair_with=batch compares all pairs of a batch, so batch_size='
                         f'{batch_size} must be one micro-batch on one rank (here: {world} ranks, '
                         f'micro_batch_size={micro_batch}): take pair_with=all')


def eyes(settings):
    return pictures.eyes_of(settings, settings['vit.image_size'])


def form(sample, p):
    """The caption alone: what is compared with the picture."""
    if len(sample['pictures']) != 1:
        raise BadSample(f'{len(sample["pictures"])} pictures (.png, .jpg, .webp): a pair has one')
    caption = clean(question(sample, p)[1], p.text_rule)
    return [(sample['pictures'][0], SEEN), (caption, LEARNED), (p.tokenizer.eos_id, LEARNED)]


NO_PUNCTUATION = str.maketrans('', '', string.punctuation)


def clean(caption, rule):
    """What SigLIP's tokenizers in transformers do to a text first: lower case, and for the first
    SigLIP no punctuation and no more than one space."""
    if rule:
        caption = caption.lower()
    if rule == 'siglip':
        caption = ' '.join(caption.translate(NO_PUNCTUATION).split())
    return caption


def build(settings, tokenizer, load_weights=True):
    """The SigLIP of the settings. Raises ValueError."""
    decoder = sized(part(settings, 'decoder', DecoderConfig), tokenizer.vocab_size)
    if decoder.hf:
        raise ValueError(f'decoder.hf={decoder.hf!r}: the text tower of task=siglip is ours, '
                         'which reads texts in both directions')
    config = VLMConfig(part(settings, 'vit', ViTConfig), decoder)
    vit = tower('vit', config.vit, tokenizer, load_weights)
    return SigLIP(config, settings['pair_scale'], settings['pair_bias'], vit)


class SigLIP(nn.Module):
    """ViT and text tower trained to tell, for every picture and every text, whether they belong
    together.

    Every picture is compared with the texts of its batch, so that a batch can not be cut into
    micro-batches or ranks, or with `texts`, and then it can. scale and bias start the logits: bias
    near the log-odds of a match.

    The picture's vector is linear in all its patches, where SigLIP pools them by attention: a
    tower that starts from a thousand pictures does not find out by itself where things are. It is
    the one image token of a VLM that puts all patches side by side, and named as there, so that
    such a VLM begins with it (`init_from`)."""

    def __init__(self, config, scale=10.0, bias=-10.0, vit=None):
        super().__init__()
        self.config = config
        self.vit, self.text = vit or ViT(config.vit), Decoder(config.decoder)
        width = config.decoder.width
        self.connector = nn.Linear(self.vit.config.width * config.vit.num_patches, width)
        self.text_head = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(bias))

    def embed_images(self, pixels, keys=None):
        """pixels (I, 3, H, W), keys of their dropout (I,) -> unit vectors (I, D)."""
        return F.normalize(self.connector(self.vit(pixels, keys).flatten(1)), dim=-1)

    def embed_texts(self, tokens, segments, keys=None):
        """tokens, segments (0: padding), keys (N, T) -> unit vectors (N, D)."""
        # every token sees every other one
        x = self.text.embed(tokens)
        x = self.text.features(x, torch.zeros_like(tokens), segments, keys=keys)
        real = (segments > 0)[..., None]
        mean = (x * real).sum(1) / real.sum(1)
        return F.normalize(self.text_head(mean), dim=-1)

    def forward(self, tokens, segments, pixels, rows, texts=None, text_segments=None, keys=None,
                step_key=None):
        """{'pairs': the sum over all texts of a picture's sigmoid losses}; equal texts are all
        positives.

        rows (I,): the rows of tokens that the pictures belong to. texts, text_segments (N, T):
        what every picture is compared with; without them, the texts of the batch. Dropout follows
        from keys (B, T), that of `texts`, which are of no row, from step_key (1,)."""
        T, tokens, segments = tokens.shape[1], tokens[rows], segments[rows]
        picture_keys = text_keys = None
        if keys is not None:
            text_keys, picture_keys = keys[rows], keys[rows, 0]
        if texts is None:
            texts, text_segments = tokens, segments
        elif keys is not None:
            text_keys = random_bits(random_bits(step_key, len(texts), 6)[0], T, 4)
        same = (tokens[:, None] == texts[None]).all(-1)                         # (I, N)
        images = self.embed_images(pixels, picture_keys)
        cosines = images @ self.embed_texts(texts, text_segments, text_keys).T
        logits = cosines * self.scale.exp() + self.bias
        losses = -F.logsigmoid(torch.where(same, logits, -logits).float()).sum(1)       # (I,)
        return {'pairs': Learned(losses, torch.ones_like(losses), rows * T)}


# -----------------------------------------------------------------------------------------------
# training


def count(batch):
    return {'pairs': int(batch['pictures'].sum())}


def constants(run, folders):
    """Every text of the mix once, for pair_with=all. Raises ValueError."""
    if run.settings['pair_with'] != 'all':
        return {}
    known = {}
    for folder in folders:
        batches = data.Batches([folder], data.InOrder(folder.sizes), run.processor)
        for start in range(0, len(folder), 1024):
            batch = batches[np.arange(start, min(start + 1024, len(folder)))]
            if 'error' in batch:
                raise ValueError(batch['error'])
            for tokens, segments in zip(batch['tokens'], batch['segments']):
                if segments.any():          # a placeholder has no text to compare with
                    known[tokens.tobytes()] = tokens, segments
    texts, text_segments = zip(*known.values())
    return dict(texts=torch.as_tensor(np.stack(texts)).to(run.device).long(),
                text_segments=torch.as_tensor(np.stack(text_segments)).to(run.device).long())


def inputs(run, batch, tensors):
    """Pictures and the rows of their texts; none at all where a rank's batch has none."""
    tokens, size = tensors['tokens'], run.settings['vit.image_size']
    rows = torch.as_tensor(np.flatnonzero(batch['pictures'])).to(tokens.device)
    pixels = tensors.get('pixels')
    if pixels is None:
        pixels = torch.zeros(0, 3, size, size, device=tokens.device)
    segments = tensors.get('segments', torch.ones_like(tokens))
    keyed = {}
    if 'keys' in tensors:
        # one for all of a step's micro-batches
        step = torch.tensor([run.progress['step']]).to(tokens.device)
        keyed = dict(keys=tensors['keys'], step_key=random_keys(run.settings['seed'], step))
    return dict(tokens=tokens, segments=segments, pixels=pixels, rows=rows, **keyed)


def summary(run, folder, batches, losses):
    """exact_match: the share of pictures whose own text, among all texts of the data set, lies
    nearest."""
    with run.gathered():
        return dict(exact_match=nearest_share(run, folder, batches))


def nearest_share(run, folder, batches):
    settings = run.settings
    chunks = max(1, len(folder) // (settings['micro_batch_size'] or settings['batch_size']))
    texts, names, vectors = [], [], []
    for positions in np.array_split(np.arange(len(folder)), chunks):
        batch = batches[positions]
        tensors = run.inputs(batch)
        texts.append(run.model.embed_texts(tensors['tokens'], tensors['segments']))
        vectors.append(run.model.embed_images(tensors['pixels']))
        names += batch['texts']
    nearest = (torch.cat(vectors) @ torch.cat(texts).T).argmax(1).tolist()
    right = sum(names[i] == name for i, name in zip(nearest, names))
    return right / len(names)


def sample(run, options):
    raise ValueError(f'{options.out_dir} is a vision tower (task=siglip), it has no words: give '
                     'the run of a vlm or llm')
