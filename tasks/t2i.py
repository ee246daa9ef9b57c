"""Text to image: a diffusion transformer, or Stable Diffusion's U-Net, in pixels or in latents.

    python train.py config/t2i_emoji.py
    python sample.py --out_dir=out/t2i_emoji --prompt='noto: red apple' --n=16  (PNGs in samples/)
    python sample.py --out_dir=out/t2i_emoji --prompt=... --image=a.png [--strength=0.6]
                                [--mask=b.png]
    python sample.py --out_dir=<a folder of diffusers> --prompt='a red apple' --guidance=7.5 --n=4
    python sample.py --out_dir=out/t2i_emoji --eval=mix,heldout --judge=out/vlm_judge
                                (what a captioner reads in its pictures, and in the real ones)

Axes: B rows, S tokens of a sentence, N pictures, H W rows and columns, C channels.
"""
import json
import os
import zlib
from types import SimpleNamespace

import numpy as np
import torch

import hub
import npy
import pictures
import tasks
from answering import padded, prompt_of
from configurator import part
from diffusion import check_objective, check_schedule, random_keys, schedule_of
from images import judge, sd
from images.clip import CLIPText, CLIPTextConfig
from images.dit import DiTConfig, TextToImage
from images.vae import AutoencoderKL, VAEConfig
from model import Decoder, DecoderConfig, sized
from processor import READ, question
from shards import BadSample
from tasks import vlm
from usage import refuse_unused, say_once, unused
from vocabularies.clip import clip_row


class TrainSettings:
    """What train.py takes with task=t2i, beside its own settings."""
    dit = DiTConfig()
    decoder = DecoderConfig()   # the text tower
    denoiser = 'dit'            # dit | unet (Stable Diffusion: unet, clip and vae; of dit
    #                             image_size, the rows of a latent, and drop)
    unet = sd.UNetConfig()
    clip = CLIPTextConfig()     # the text tower of unet
    vae = VAEConfig()           # of unet, and of dit with dit.vae
    prompt = ''                 # a caption, as '{style}: {text}' of what the sample and its .json
    #                             hold (empty: '{text}')
    image_mean = 0.5            # subtracted from pixels of 0 to 1 (1.0: white is 0)
    image_std = 0.5             # and what they are then divided by
    image_draft = True          # JPEGs may be decoded at 1/2, 1/4 or 1/8, where that is at least
    #                             dit.image_size
    augment = False             # drawings change a little every time they are seen


class SampleSettings:
    """What sample.py takes with a run of task=t2i."""
    prompt = ''                 # what is to be drawn
    n = 16                      # pictures to draw
    guidance = 4.0              # above 1 exaggerates what the sentence changes, 1 as learned, 0
    #                             without it
    steps = 50                  # of denoising
    sampler = ''                # euler | heun | ddim | ddpm (empty: the first that fits)
    image = ''                  # a picture to begin from
    strength = 0.6              # with --image: how much of it becomes noise first, above 0, 1 all
    mask = ''                   # with --image: a picture that is white where that is drawn anew
    grid = ''                   # a PNG of all that was drawn (empty: in out_dir)
    eval = ''                   # data sets to draw the sentences of, separated by commas; mix: all
    #                             that the run was trained on
    judge = ''                  # with --eval: the run of a captioner that reads what was drawn


KEPT = ('denoiser',)


def check(settings, world):
    """Raises ValueError for settings that can not be; lines on those that are not used."""
    if settings['denoiser'] not in ('dit', 'unet'):
        raise ValueError(f'denoiser={settings["denoiser"]!r}: expected dit or unet')
    dit = part(settings, 'dit', DiTConfig)
    dit.check()
    check_schedule('dit', schedule_of, dit)
    length = settings['clip.max_length']
    check_schedule('unet', sd.schedule_of, part(settings, 'unet', sd.UNetConfig))
    if settings['denoiser'] == 'unet' and settings['seq_len'] != length:
        raise ValueError(f'seq_len={settings["seq_len"]}: denoiser=unet reads {length}, which is '
                         'clip.max_length')
    check_channels(settings)
    return unused_of_denoiser(settings, tasks.defaults('t2i'))


def check_channels(settings):
    """Raises ValueError where what comes out of one network does not go into the next."""
    wanted = {}
    if settings['denoiser'] == 'unet':
        latent = settings['vae.latent_channels']
        wanted = {'unet.in_channels': latent, 'unet.out_channels': latent,
                  'unet.cross_attention_dim': settings['clip.width']}
    if settings['denoiser'] == 'unet' or settings['dit.vae']:
        wanted |= {'vae.in_channels': 3, 'vae.out_channels': 3}
    else:
        wanted['dit.channels'] = 3
    for key, channels in wanted.items():
        if settings[key] != channels:
            raise ValueError(f'{key}={settings[key]}: expected {channels}, as '
                             'vae.latent_channels, clip.width and pictures of 3 colours have it')


def unused_of_denoiser(settings, known):
    """Lines on settings that the denoiser does not read. Raises ValueError."""
    denoiser = settings['denoiser']
    if denoiser == 'dit':
        check_objective(settings, known, 'dit')
        lines = unused(settings, known, ('unet.', 'clip.'), 'denoiser=dit')
        if not settings['dit.vae']:
            lines += unused(settings, known, ('vae.',), 'dit.vae is empty')
        return lines
    of_dit = [key for key in known if key.startswith('dit.')]
    of_dit = set(of_dit) - {'dit.image_size', 'dit.drop'}
    return unused(settings, known, ('decoder.', *of_dit), f'denoiser={denoiser}')


def eyes(settings):
    """The pictures.Eyes: of an autoencoder, pictures are larger than latents."""
    size = settings['dit.image_size']
    if settings['denoiser'] == 'unet' or settings['dit.vae']:
        size *= 2 ** (len(settings['vae.block_out_channels']) - 1)
    return pictures.eyes_of(settings, size)


def form(sample, p):
    """bos, the caption as `prompt` puts it ('{style}: {text}', of what the sample holds), eos, all
    causal and not learned: what is learned is the picture."""
    # a picture, or its latents as prepare/latents.py writes them
    images = list(sample['pictures'])
    if 'latents.npy' in sample.get('members', ()):
        images.append(read_latents(sample['members']['latents.npy']))
    if len(images) != 1:
        raise BadSample(f'{len(images)} pictures (.png, .jpg, .webp): expected one')

    # who asks says the whole caption
    if sample.get('_asking'):
        caption = sample['prefix']
    else:
        caption = filled_in(p.prompt or '{text}', sample | dict(text=question(sample, p)[1]))
    tok = p.tokenizer
    if p.settings['denoiser'] == 'unet':    # as CLIP reads it: padding, too, is looked at
        num_tokens = len(tok.encode(caption))
        if num_tokens > p.seq_len - 2:
            say_once('clip', f'a caption of {num_tokens} tokens: CLIP reads the first '
                     f'{p.seq_len - 2}, of {caption!r:.80}')
        return [(images[0], READ), (clip_row(tok, caption, p.seq_len), READ)]
    return [(images[0], READ), (tok.bos_id, READ), (caption, READ), (tok.eos_id, READ)]


def filled_in(prompt, sample):
    """The prompt with what a sample holds in its places. Raises BadSample."""
    try:
        return prompt.format_map(sample)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise BadSample(f'prompt={prompt!r} can not be filled in with {", ".join(sample)} '
                        f'({error!r})') from None


def read_latents(data):
    """Bytes of a .latents.npy -> fp16 (2 C, H, W), means and standard deviations. Raises
    BadSample."""
    try:
        moments = npy.load(data)
    except ValueError as error:
        raise BadSample(f'.latents.npy can not be read ({error})') from None
    is_latent = moments.dtype == np.float16 and moments.ndim == 3 and moments.shape[0] % 2 == 0
    if not is_latent or not np.isfinite(moments).all():
        raise BadSample(f'.latents.npy is {moments.dtype} {moments.shape}: expected numbers of '
                        'float16 (2 C, H, W)')
    return moments


def build(settings, tokenizer, load_weights=True):
    """The TextToImage of the settings. Raises ValueError."""
    config = part(settings, 'dit', DiTConfig)
    config.check()
    if settings['denoiser'] == 'unet':
        return build_stable_diffusion(settings, config, tokenizer)

    # the autoencoder is never trained: its weights are a folder's, and then the checkpoint's
    vae = None
    if config.vae:
        vae_config = part(settings, 'vae', VAEConfig)
        if vae_config.latent_channels != config.channels:
            raise ValueError(f'dit.channels={config.channels}: latents of {config.vae!r} have '
                             f'{vae_config.latent_channels}')
        vae = AutoencoderKL(vae_config)
        if load_weights:
            vae = hub.family('diffusers').autoencoder(config.vae, vae_config)
        vae.requires_grad_(False)

    # the text tower: ours, or one of transformers
    decoder = part(settings, 'decoder', DecoderConfig)
    text = tasks.tower('text', decoder, tokenizer, load_weights)
    if text is None:
        text = Decoder(sized(decoder, tokenizer.vocab_size))
    return TextToImage(config, text, vae=vae, empty=[tokenizer.bos_id, tokenizer.eos_id])


def build_stable_diffusion(settings, config, tokenizer):
    """U-Net, autoencoder and CLIP's text tower as a TextToImage. Raises ValueError."""
    if settings['decoder.hf']:
        raise ValueError(f'decoder.hf={settings["decoder.hf"]!r}: the text tower of denoiser=unet '
                         'is `clip`, whose weights can begin one (init_from)')
    clip = part(settings, 'clip', CLIPTextConfig)
    empty = clip_row(tokenizer, '', clip.max_length)
    if max(empty) >= clip.vocab_size:
        raise ValueError(f'clip.vocab_size={clip.vocab_size}, but the tokenizer has token '
                         f'{max(empty)}: it is not this model\'s')
    unet = sd.UNet2DCondition(part(settings, 'unet', sd.UNetConfig))
    vae = AutoencoderKL(part(settings, 'vae', VAEConfig))
    return sd.build(config, unet, CLIPText(clip), vae, empty)


# -----------------------------------------------------------------------------------------------
# training


def count(batch):
    """{kind: targets of a batch}: a picture is one."""
    return {'pictures': int(batch['pictures'].sum())}


def inputs(run, batch, tensors):
    """Pictures, the rows of their sentences, and keys that their noise and times follow from."""
    rows = torch.as_tensor(np.flatnonzero(batch['pictures'])).to(run.device)
    positions = torch.as_tensor(batch['positions']).to(run.device)
    segments = tensors.get('segments', torch.ones_like(tensors['tokens']))
    return dict(tokens=tensors['tokens'], segments=segments, pixels=tensors.get('pixels'),
                rows=rows, keys=random_keys(run.settings['seed'], positions))


# -----------------------------------------------------------------------------------------------
# use


def sample(run, options):
    """Draw --prompt, or measure what is drawn of the sentences of --eval."""
    for key in ('n', 'steps', 'batch_size'):
        if getattr(options, key) < 1:
            raise ValueError(f'{key}={getattr(options, key)} must be at least 1')
    if options.guidance < 0:
        raise ValueError(f'guidance={options.guidance} must be at least 0')
    if not 0 < options.strength <= 1:
        raise ValueError(f'strength={options.strength} must be above 0 and at most 1')
    if options.mask and not options.image:
        raise ValueError(f'mask={options.mask!r} goes with --image')
    given, known = vars(options), tasks.body_of(SampleSettings)
    if not options.image:
        refuse_unused(given, known, ('strength',), 'it goes with --image')
    if options.eval:
        refuse_unused(given, known, ('prompt', 'n', 'image', 'strength', 'mask'),
                      f'--eval={options.eval} draws each sentence of a data set once')
    else:
        refuse_unused(given, known, ('judge',), 'it goes with --eval')
    if options.eval:
        judge_pictures(run, options)
    else:
        draw_prompt(run, options)


def paint(run, sentences, options, image=None, mask=None):
    """Pictures uint8 (N, H, W, 3) of lists of token ids; what the i-th gets is by (seed, i),
    whatever the batch."""
    out = []
    for a in range(0, len(sentences), options.batch_size):
        rows = sentences[a:a + options.batch_size]
        # at least as wide as the empty sentence, which guidance draws, too
        tokens, segments = padded(rows, run.tokenizer.pad_id, least=len(run.model.empty))
        keys = random_keys(options.seed, torch.arange(a, a + len(rows)))
        if image is not None:
            image = image[:1].expand(len(rows), -1, -1, -1)
        x = run.model.sample(tokens.to(run.device), segments.to(run.device), keys.to(run.device),
                             steps=options.steps, sampler=options.sampler,
                             guidance=options.guidance, image=image, strength=options.strength,
                             mask=mask)
        out.append(run.processor.eyes.to_pictures(x))
    return np.concatenate(out)


def draw_prompt(run, options):
    """n pictures of the prompt, each a PNG with its settings inside, and one of them all."""
    path = path_of_grid(options)
    image = mask = None
    if options.image:
        image = read_image(run, options.image)
    if options.mask:
        mask = read_mask(run, options.mask)
    prompt, _ = prompt_of(run.processor, options.prompt)
    drawn = paint(run, [prompt] * options.n, options, image, mask)

    # what it takes to draw them again
    said = dict(prompt=options.prompt, seed=options.seed, guidance=options.guidance,
                steps=options.steps, sampler=options.sampler or 'default', run=options.out_dir,
                checkpoint=os.path.basename(os.path.realpath(run.folder)), ema=options.ema)
    if options.image:
        said |= dict(image=options.image, strength=options.strength, mask=options.mask)
    for i, picture in enumerate(drawn):
        judge.save(f'{os.path.splitext(path)[0]}_{i:03}.png', picture, said | dict(index=i))
    judge.save(path, judge.side_by_side(drawn), said | dict(n=options.n))
    print(json.dumps(said | dict(grid=path)) if options.json else path)


def path_of_grid(options):
    """Where the pictures of a prompt go. Raises ValueError."""
    path = options.grid
    # said before they are drawn, not after
    if path and (not path.lower().endswith('.png') or os.path.isdir(path)):
        raise ValueError(f'grid={path!r}: expected the name of a file that ends in .png')
    if not path:
        # they are named by the words of the prompt; what another one drew stays
        words = ''.join(c if c.isalnum() else ' ' for c in options.prompt.lower())[:60].split()
        stem = os.path.join(options.out_dir, 'samples', '-'.join(words) or 'no-sentence')
        path = f'{stem}.png'
        if os.path.exists(path) and judge.setting_in(path, 'prompt') != options.prompt:
            path = f'{stem}-{zlib.crc32(os.fsencode(options.prompt)):08x}.png'
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    return path


def read_image(run, names):
    """The one picture to begin from, as pixels (1, 3, H, W). Raises ValueError and OSError."""
    name, *others = pictures.find(names)
    if others:
        raise ValueError(f'--image={names}: {len(others) + 1} pictures, expected one to begin '
                         'with')
    eyes = run.processor.eyes
    try:
        with open(name, 'rb') as f:
            return eyes.to_tensor(eyes.pixels(f.read())[None], run.device)
    except BadSample as error:
        raise OSError(f'--image={name}: {error}') from None


def read_mask(run, name):
    """bool (1, 1, H, W): True, white, is drawn anew. Raises OSError."""
    from PIL import Image
    size = run.model.config.image_size
    mask = Image.open(name).convert('L').resize((size, size), Image.Resampling.NEAREST)
    return torch.tensor(np.array(mask) > 127, device=run.device)[None, None]


@torch.no_grad()
def judge_pictures(run, options):
    """What a captioner reads in pictures drawn from the sentences of a data set, beside what it
    reads in the real ones: the name to the letter, the words of it, another name of the set (which
    must not be read), and the Fréchet distance to the real ones in what its decoder sees of a
    picture (of the real ones: of one half to the other)."""
    if not options.judge:
        raise ValueError(f'--eval={options.eval}: {options.out_dir} draws pictures: give --judge='
                         '<the run of a captioner>')
    captioner = hub.open_run(options.judge, run.device)
    if captioner.settings['task'] != 'vlm':
        raise ValueError(f'--judge={options.judge} is task={captioner.settings["task"]}: expected '
                         'a captioner, task=vlm')
    if not options.json:
        print(f'{"data set":14} {"pictures":>20}  {"exact match":>11}  {"words (F1)":>10}  '
              f'{"another name":>12}  {"Fréchet":>8}')
    for name in options.eval.split(','):
        real, texts, sentences, _ = vlm.read_sets(run, name, options)
        drawn = paint(run, sentences, options)
        of_drawn = features(captioner, drawn, options)
        of_real = features(captioner, real, options)
        given, score = judged(captioner, name, 'drawn', drawn, texts, options,
                              (of_drawn, of_real))
        judged(captioner, name, 'real', real, texts, options, (of_real[::2], of_real[1::2]))
    path = options.grid or os.path.join(options.out_dir, 'judged.png')
    pictures.draw_answers(path, f'{name}, real and drawn', np.concatenate((real, drawn), 2), texts,
                          given, score)


def features(captioner, images, options):
    """What a captioner's decoder sees of pictures uint8 (N, H, W, 3), a mean over patches:
    (N, D)."""
    eyes, seen = captioner.processor.eyes, []
    num_batches = -(-len(images) // options.batch_size)
    for batch in np.array_split(judge.resized(images, eyes.size), num_batches):
        patches = captioner.model.patches(eyes.to_tensor(batch, captioner.device))
        seen.append(patches.mean(1).cpu().numpy())
    return np.concatenate(seen)


def judged(captioner, name, kind, images, texts, options, both_features):
    """Prints a line of scores of pictures, of the distance between two sets of features, too: the
    captioner's answers, and the share that is right."""
    prompts = [prompt_of(captioner.processor)] * len(texts)
    sampling = SimpleNamespace(**tasks.body_of(vlm.SampleSettings) | vars(options))
    pixels = judge.resized(images, captioner.processor.eyes.size)
    given = [answer.strip() for answer in vlm.answers(captioner, prompts, pixels, sampling)]

    # another name of the set: half of all names further
    known = sorted(set(texts))
    others = [known[known.index(text) - len(known) // 2] for text in texts]
    f1 = np.mean([judge.token_f1(answer, text) for answer, text in zip(given, texts)])
    row = dict(exact_match=vlm.share_right(given, texts), token_f1=f1,
               another_name=vlm.share_right(given, others),
               frechet=judge.frechet(*both_features))
    if options.json:
        print(json.dumps(dict(data=name, pictures=kind, samples=len(texts)) | row))
    else:
        print(f'{name:14} {len(texts):14} {kind:>5}  {row["exact_match"]:11.1%}  '
              f'{row["token_f1"]:10.1%}  {row["another_name"]:12.1%}  {row["frechet"]:8.2f}',
              flush=True)
    return given, row['exact_match']
