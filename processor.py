"""Processors: a sample of a shard becomes pieces of rows (tokens, what is learned, who sees whom, pictures, actions),
and pieces become a batch.

A form says how a sample is written as tokens. It is one plain function: it gets what the sample holds (`fields`) and
the Processor, and gives [(item, role), ...]. An item is text, a token id, a list of ids or an encoded picture;
the role is
    SEEN    not learned, seen by everything in its SEEN stretch (the prefix of a prefix-LM)
    READ    not learned, causal
    LEARNED learned, causal
`processor = 'paligemma'` in a config names one of FORMS, a folder the form of the model in it (families/processors.py:
token ids and pixels are those of its processor in transformers), `'mine.py:my_form'` a function of your own:

    def my_form(sample, p):
        return [(picture, SEEN) for picture in sample['pictures']] + [(p.tokenizer.bos_id, SEEN),
                (sample['question'] + '\\n', SEEN), (sample['answer'], LEARNED), (p.tokenizer.eos_id, LEARNED)]

Axes: B rows of a batch, T tokens of a row, I pictures of a batch, A samples with actions.
"""
import base64
import io
import json
import os
import runpy
import string
from itertools import takewhile

import numpy as np

from chat import CHATS, Chat, read_messages
from shards import BadSample
from tokenizer import clip_row

SEEN, READ, LEARNED = 0, 1, 2
HERE = os.path.dirname(os.path.abspath(__file__))
PICTURES = ('jpg', 'jpeg', 'png', 'webp')
BLACK = base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC')
MAX_PIXELS = 64 << 20           # of one picture; more is a bad sample
NO_PUNCTUATION = str.maketrans('', '', string.punctuation)


# ----------------------------------------------------------------------------------------------------------------------
# what a sample holds


def fields(members, pictures=True, lowdim=False, cameras=()):
    """{extension: bytes} -> the keys of .json, and pictures (a list of bytes, in the order of their names),
    picture_names, text (.txt), lowdim (arrays). cameras: the names of the pictures; one that is missing is BLACK, and
    `camera_mask` says which are there. Raises BadSample."""
    sample = {}
    if 'json' in members:
        try:
            sample = json.loads(members['json'])
        except (ValueError, RecursionError) as error:
            raise BadSample(f'.json can not be read ({error})') from None
        if not isinstance(sample, dict):
            raise BadSample('.json is no object')
    if 'txt' in members:
        try:
            sample['text'] = members['txt'].decode('utf-8')
        except UnicodeDecodeError:
            raise BadSample('.txt is not UTF-8') from None
    for key in ('text', 'prefix', 'suffix', 'instruction'):
        try:
            sample.get(key, '').encode('utf-8')
        except AttributeError:
            raise BadSample(f'.json: {key} is no text') from None
        except UnicodeEncodeError:
            raise BadSample(f'.json: {key} holds half of a surrogate pair') from None
    found = sorted((ext.rpartition('.')[0], ext) for ext in members if ext.rpartition('.')[2] in PICTURES)
    found += [('latents', 'latents.npy')] if 'latents.npy' in members else []       # as prepare/latents.py writes them
    if pictures and cameras:
        by_name = dict(found)
        found = [(name, by_name.get(name)) for name in cameras]
        sample['camera_mask'] = [ext is not None for _, ext in found]
    sample['picture_names'] = [name for name, _ in found] if pictures else []
    sample['pictures'] = [members.get(ext, BLACK) for _, ext in found] if pictures else []
    if lowdim:
        import actions
        sample |= actions.read(members)
    if 'lowdim' in sample and not sample['pictures'] and not sample.keys() & {'text', 'suffix', 'messages'}:
        sample.setdefault('instruction', '')            # a state alone is a sample
    if not sample['pictures'] and not sample.keys() & {'text', 'suffix', 'messages', 'instruction'}:
        raise BadSample(f'neither text nor pictures among its members ({", ".join(sorted(members)) or "none"})')
    return sample


# ----------------------------------------------------------------------------------------------------------------------
# forms


def document(sample, p):
    """bos, text, eos: all of it learned, cut into as many rows as it takes."""
    return [(p.tokenizer.bos_id, READ), (sample['text'], LEARNED), (p.tokenizer.eos_id, LEARNED)]


def paligemma(sample, p):
    """<image>..., bos, prefix, newline | suffix, eos: left of the bar seen by all (arXiv 2407.07726)."""
    prefix, suffix = question(sample, p)
    return [*((picture, SEEN) for picture in sample['pictures']), (p.tokenizer.bos_id, SEEN), (prefix + '\n', SEEN),
            (suffix, LEARNED), (p.tokenizer.eos_id, LEARNED)]


def text(sample, p):
    """bos, prefix | suffix, eos, all causal. Pictures come first."""
    prefix, suffix = question(sample, p)
    return [(p.tokenizer.bos_id, READ), *((picture, READ) for picture in sample['pictures']), (prefix, READ),
            (suffix, LEARNED), (p.tokenizer.eos_id, LEARNED)]


def robot(sample, p):
    """<image>..., bos, instruction, newline, all seen by all, and an answer, if there is one, as in paligemma."""
    prefix, suffix = question(sample, p)
    answer = [(suffix, LEARNED), (p.tokenizer.eos_id, LEARNED)] if suffix or sample.get('asking') else []
    return [*((picture, SEEN) for picture in sample['pictures']), (p.tokenizer.bos_id, SEEN), (prefix + '\n', SEEN),
            *answer]


def pair(sample, p):
    """The caption alone: what SigLIP compares with the picture."""
    if len(sample['pictures']) != 1:
        raise BadSample(f'{len(sample["pictures"])} pictures (.png, .jpg, .webp): a pair has one')
    return [(sample['pictures'][0], SEEN), (p.clean(question(sample, p)[1]), LEARNED), (p.tokenizer.eos_id, LEARNED)]


def t2i(sample, p):
    """bos, the caption as `prompt` puts it ('{style}: {text}', of what the sample holds; empty: '{text}'), eos, all
    causal and not learned: what is learned is the picture."""
    if len(sample['pictures']) != 1:
        raise BadSample(f'{len(sample["pictures"])} pictures (.png, .jpg, .webp): expected one')
    try:
        caption = sample['prefix'] if sample.get('asking') else (p.prompt or '{text}').format_map(
            sample | dict(text=question(sample, p)[1]))
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise BadSample(f'prompt={p.prompt!r} can not be filled in with {", ".join(sample)} ({error!r})') from None
    return [(sample['pictures'][0], READ), (p.tokenizer.bos_id, READ), (caption, READ), (p.tokenizer.eos_id, READ)]


def clip(sample, p):
    """`t2i` as CLIP reads it: seq_len tokens, padding among them, which Stable Diffusion looks at, too."""
    picture, _, (caption, _), _ = t2i(sample, p)
    return [picture, (clip_row(p.tokenizer, caption, p.seq_len), READ)]


def question(sample, p):
    """(prefix, suffix) of a sample: its own, or the prompt of the settings and the caption; actions have no answer."""
    prefix = sample.get('prefix', sample.get('instruction', p.prompt))
    answer = sample.get('suffix', sample.get('text', '') if 'prefix' not in sample else None)
    if answer is None or not answer and 'instruction' not in sample and not sample.get('asking'):
        raise BadSample('no suffix: nothing to answer' if answer is None else 'its text is empty')
    return prefix, answer.strip()


def chat(sample, p):
    """A conversation: `messages` (see `read_messages`), or one question and its answer, as the chat template writes it.
    Answers alone are learned, with the token that ends them."""
    pictures, asking = sample['pictures'], sample.get('asking', False)
    try:
        if 'messages' in sample:
            turns = read_messages(sample['messages'], len(pictures))
        else:
            prefix, suffix = question(sample, p)
            turns = [('user', [None] * len(pictures) + [prefix]), ('assistant', [suffix])]
        ids, learned = p.chat.encode(turns[:-1] if asking else turns, asking)
    except ValueError as error:
        raise BadSample(str(error)) from None
    picture = ids == p.tokenizer.image_id
    if picture.sum() != len(pictures):
        raise BadSample(f'its messages place {picture.sum()} pictures, there are {len(pictures)}')
    parts, rest = [] if ids[:1].tolist() == [p.tokenizer.bos_id] else [(p.opening, READ)], iter(pictures)
    cuts = np.flatnonzero(np.diff(learned) | picture[1:] | picture[:-1]) + 1
    for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), len(ids)]):
        parts.append((next(rest), READ) if picture[a] else (ids[a:b].tolist(), LEARNED if learned[a] else READ))
    return parts


FORMS = {'paligemma': paligemma, 'text': text, 'pair': pair, 't2i': t2i, 'clip': clip, 'robot': robot} | dict.fromkeys(
    CHATS, chat)


# of a model folder, what a processor is made from
FILES = ('preprocessor_config.json', 'processor_config.json', 'chat_template.jinja', 'chat_template.json',
         'tokenizer_config.json')


def is_folder(name):
    """Does `processor` name a model folder, not a form?"""
    return name not in ('auto', *FORMS) and '.py:' not in name


def load_form(name):
    """The function of a form: one of FORMS, or `file.py:function`."""
    if name in FORMS:
        return FORMS[name]
    path, _, function = name.rpartition(':')
    path = path if os.path.isfile(path) else os.path.join(HERE, path)
    if not path.endswith('.py') or not os.path.isfile(path):
        raise ValueError(f'processor={name!r}: expected one of {", ".join(FORMS)}, a model folder, or file.py:function')
    found = runpy.run_path(path).get(function)
    if not callable(found):
        raise ValueError(f'processor={name!r}: {path} has no function {function!r}')
    return found


def build(config, tokenizer, image_tokens):
    """The Processor of a run, from its flat config; image_mean, image_std and image_draft are not those of a model
    folder. Raises ValueError and OSError."""
    form = config.get('processor', 'auto')
    if form == 'auto':
        form = {'vlm': 'paligemma', 'llm': 'text', 'siglip': 'pair', 't2i': 't2i'}.get(config['task'], 'robot')
        form = 'clip' if config.get('denoiser') == 'unet' else form
    # a policy may see nothing but its state and a sentence
    pictures = config['task'] != 'llm' and (config['task'] != 'policy' or config['policy.encoder'] == 'vlm')
    size = config['dit.image_size' if config['task'] == 't2i' else 'vit.image_size']
    if config.get('denoiser') == 'unet' or config.get('dit.vae'):       # pictures have more pixels than latents
        size *= 2 ** (len(config['vae.block_out_channels']) - 1)
    files, draft = dict(form=form), config.get('image_draft', True)
    if os.path.isdir(form):
        try:
            from families.processors import read_model_folder
        except ModuleNotFoundError:
            raise ValueError(f'processor={form!r} needs families/, which is not here') from None
        files = read_model_folder(form, pictures) | dict(where=f'processor={form!r}')
        for key, ours in (('image_size', size), ('image_tokens', image_tokens)):
            theirs = files.pop(key, 0)
            if theirs not in (0, ours):
                raise ValueError(f'processor={form!r} wants {key} {theirs}, the model has {ours}: change '
                                 'vit.image_size, vit.patch_size or pixel_shuffle')
        draft = draft and 'resize' not in files         # pixels as transformers has them
    lowdim = tuple(config.get(key, 0) for key in ('action_steps', 'action_dim', 'proprio_dim'))
    files = dict(mean=config['image_mean'], std=config['image_std'], cameras=config.get('cameras', ())) | files
    return Processor(tokenizer, size, image_tokens, config['prompt'], config['seq_len'], files.pop('form'),
                     pictures, lowdim, draft, documents=config.get('document_attention', True), **files)


# ----------------------------------------------------------------------------------------------------------------------
# pictures


def open_picture(data, size=0):
    """Encoded bytes -> a PIL picture, RGBA where it is transparent, else RGB. Raises BadSample.

    size > 0: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as both sides stay at least `size`."""
    from PIL import Image, UnidentifiedImageError
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        picture = Image.open(io.BytesIO(data), formats=('JPEG', 'PNG', 'WEBP'))
        if picture.width * picture.height > MAX_PIXELS:
            raise BadSample(f'a picture of {picture.width} x {picture.height} pixels is over the bound of {MAX_PIXELS}')
        if size and picture.format == 'JPEG':
            picture.draft(None, (size, size))
        return picture.convert('RGBA' if picture.has_transparency_data else 'RGB')
    except UnidentifiedImageError:
        raise BadSample('the picture can not be decoded (no JPEG, PNG or WebP)') from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f'the picture can not be decoded ({error})') from None


def on_background(rgba, colour=(255, 255, 255)):
    """RGBA uint8 (H, W, 4) over a colour -> RGB uint8 (H, W, 3)."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + np.array(colour, np.uint16) * (255 - alpha) + 127) // 255).astype(np.uint8)


LUMA = np.array([0.299, 0.587, 0.114], np.float32)
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
TO_RGB = np.linalg.inv(TO_YIQ)


def augment(rgba, rng):
    """RGBA uint8 (S, S, 4) -> RGB uint8 (S, S, 3): as another designer might have drawn it. Never mirrored, since left
    and right arrows are different names; one in ten is left as it is."""
    from PIL import Image
    if rng.uniform() < 0.1:
        return on_background(rgba)
    size = rgba.shape[0]
    angle, zoom, aspect, shear, dx, dy, hue, saturation, gain, brightness, *gains = rng.uniform(-1, 1, 13)
    gray, lines, line_ink, posterize, tones, outline, outline_ink, ground, hole, *hole_box, blur = rng.uniform(size=14)

    # where things are: rotation, zoom, aspect, shear, shift
    zoom, aspect, angle = np.exp(0.22 * zoom - 0.12), np.exp(0.12 * aspect), 0.3 * angle
    c, s, m = np.cos(angle) / zoom, np.sin(angle) / zoom, size / 2
    a, b, d, e = c * aspect, (s + 0.15 * shear * c) * aspect, -s / aspect, (c - 0.15 * shear * s) / aspect
    dx, dy = m + 0.08 * size * dx, m + 0.08 * size * dy
    picture = Image.fromarray(rgba).transform((size, size), Image.Transform.AFFINE, (
        a, b, m - a * dx - b * dy, d, e, m - d * dx - e * dy), Image.Resampling.BILINEAR)
    x = np.asarray(picture).astype(np.float32) / 255
    rgb, alpha = x[..., :3], x[..., 3]

    # colour: hue and saturation turn and stretch the chroma plane; gains and brightness
    turn, stretch = 0.35 * hue, 0.0 if gray < 0.1 else np.exp(0.6 * saturation)
    chroma = np.eye(3)
    chroma[1:, 1:] = stretch * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    gains = np.exp(0.3 * gain + 0.15 * np.array(gains))
    matrix = ((TO_RGB @ chroma @ TO_YIQ) * gains[:, None]).astype(np.float32)
    rgb = rgb @ matrix.T + np.float32(0.12 * brightness + 0.5 * (1 - gains.mean()))

    # line and tone: dark lines inside, few tones, a dark outline
    if lines < 0.2:
        light = rgb @ LUMA
        edge = abs(np.diff(light, axis=0, append=light[-1:])) + abs(np.diff(light, axis=1, append=light[:, -1:]))
        rgb = rgb * (1 - np.minimum(2 * edge, 1) * np.float32(0.5 + 0.5 * line_ink))[..., None]
    if posterize < 0.15:
        rgb = np.round(rgb * (2 + int(4 * tones))) / (2 + int(4 * tones))
    rgb = rgb.clip(0, 1)
    if outline < 0.25:
        p = np.pad(alpha, 1)
        grown = np.maximum.reduce([alpha, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]])
        rgb, alpha = rgb * alpha[..., None] + np.float32(0.2 * outline_ink) * (1 - alpha[..., None]), grown

    # the ground is white or a light colour; a piece may be missing; a blur
    colour = np.ones(3, np.float32) if ground < 0.6 else rng.uniform(0, 1, 3).astype(np.float32) ** 0.5
    rgb = rgb * alpha[..., None] + colour * (1 - alpha[..., None])
    if hole < 0.25:
        top, left, height, width = (np.array(hole_box) * [1, 1, 0.25, 0.25] + [0, 0, 0.12, 0.12]) * size
        rgb[int(top):int(top + height), int(left):int(left + width)] = colour
    if blur < 0.15:
        p = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode='edge')
        p = p[:-2] + 2 * p[1:-1] + p[2:]
        rgb = (p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]) / 16
    return (255 * rgb + 0.5).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# samples to pieces: a piece is a stretch of one row


class Processor:
    """What turns a sample into pieces of rows.

    form: a name of FORMS or `file.py:function`; image_tokens: how many tokens a picture takes (0: it has no place in
    the text); pictures=False leaves pictures out; lowdim: (steps, action size, proprio size) that actions are padded
    to, zeros leave them out; draft: JPEGs may be decoded small; mean, std: what `to_pixels` is to be given; documents:
    attention stops at the end of a document of a tokenized set; cameras: the pictures of every sample, by name and in
    this order, where one that is missing is black and masked; none: those that a sample has. What a model folder says:
    resample, a filter of PIL; resize, how a picture becomes a square: square, (longest, side) first, (shortest, side)
    and the middle of it; template, a chat template instead of the form's, from `where`; opens: a conversation begins
    with what the tokenizer.json says a text does; text_rule: what SigLIP does to a caption. `end_id` ends an answer."""

    def __init__(self, tokenizer, image_size=0, image_tokens=0, prompt='', seq_len=96, form='paligemma', pictures=True,
                 lowdim=(0, 0, 0), draft=True, mean=0.5, std=0.5, documents=True, cameras=(), resample=3,
                 resize=('square', 0), template='', where='', opens=False, text_rule=''):
        self.mean, self.std, self.documents = mean, std, documents
        self.tokenizer, self.image_size, self.image_tokens, self.prompt = tokenizer, image_size, image_tokens, prompt
        self.seq_len, self.form, self.with_pictures, self.lowdim, self.draft = seq_len, form, pictures, lowdim, draft
        self.cameras, self.words = tuple(cameras), {}
        self.resample, self.resize, self.text_rule = resample, resize, text_rule
        self.opening = getattr(tokenizer, 'opening', []) if opens else [tokenizer.bos_id] * (form == 'llava')
        self.function, self.end_id = load_form(form), tokenizer.eos_id
        if self.function is pair:
            self.image_tokens = 0
        if self.function is chat:
            self.chat = Chat(form, tokenizer, template, where)
            self.end_id = self.chat.markers.get(self.chat.end, self.end_id)

    def __getstate__(self):             # a user's function lives in a module that only this process has loaded
        return {k: v for k, v in self.__dict__.items() if k != 'function'}

    def __setstate__(self, state):
        self.__dict__ = state | {'function': load_form(state['form'])}

    def prefix(self, prompt=None, pictures=1):
        """Token ids of pictures and a prompt, up to where the answer begins."""
        parts = self.function(dict(pictures=[b''] * pictures, prefix=self.prompt if prompt is None else prompt,
                                   suffix='', asking=True), self)
        return [i for item, _ in takewhile(lambda part: part[1] != LEARNED, parts) for i in self.encode(item)]

    def encode(self, item):
        """Token ids of an item of a form: text, an id, ids, or a picture (bytes)."""
        if isinstance(item, list):
            return item
        if isinstance(item, bytes):
            return [self.tokenizer.image_id] * self.image_tokens
        if not isinstance(item, str):
            return [int(item)]
        try:
            return self.tokenizer.encode(item)
        except ValueError as error:
            raise BadSample(str(error)) from None

    def pieces(self, members, rng=None):
        """{extension: bytes} -> pieces: dicts of tokens, targets, blocks (arrays of one length), pictures [uint8
        (H, W, 3)], text and lowdim. One piece, or several of a text that is longer than a row. rng: a Random makes the
        pictures augmented ones. Raises BadSample."""
        for ext in ('tokens.npy', 'tokens.bin'):
            if ext in members:
                return self.cut(read_tokens(members[ext], ext))
        episode = any(self.lowdim) and members.keys() == {'json', 'lowdim.npy'} and not self.cameras
        if episode and members['json'] in self.words:       # an episode without pictures: all steps have its words
            import actions
            return [self.words[members['json']] | {'lowdim': self.pad_lowdim(**actions.read(members)['lowdim'])}]
        sample = fields(members, self.with_pictures, any(self.lowdim), self.cameras)
        asked = sample['pictures'] or sample.keys() & {'prefix', 'suffix', 'messages', 'instruction'}
        whole = self.function in FORMS.values() and self.function not in (pair, t2i, clip) and not asked
        parts = (document if whole else self.function)(sample, self)
        ids, learned, blocks = [], [], []
        for item, role in parts:
            new = self.encode(item)
            ids += new
            learned += [role == LEARNED] * len(new)
            blocks += [role != SEEN] * len(new)
        ids = np.array(ids, np.int32)
        targets = np.where(learned, ids, -100)[1:]
        if whole and len(ids) > self.seq_len:
            return self.cut(ids)
        if len(ids) > self.seq_len:
            raise BadSample(f'{len(ids)} tokens do not fit seq_len={self.seq_len}')
        piece = dict(tokens=ids, targets=np.append(targets, -100).astype(np.int32), blocks=np.array(blocks, np.uint8),
                     text=sample.get('suffix', sample.get('text', '')).strip(),
                     pictures=[self.pixels(item, rng) for item, _ in parts if isinstance(item, bytes)])
        if not all(sample.get('camera_mask', ())):          # who looks through a camera that is missing sees nothing
            piece['real'] = np.concatenate([[item is not BLACK] * len(self.encode(item)) for item, _ in parts])
        if episode:
            self.words = {} if len(self.words) >= 4096 else self.words
            self.words[members['json']] = piece.copy()
        if 'lowdim' in sample:
            piece['lowdim'] = self.pad_lowdim(**sample['lowdim'])
            if self.cameras and self.with_pictures:
                piece['lowdim']['camera_mask'] = np.array(sample['camera_mask'])
        return [piece]

    def cut(self, ids):
        """A text of any length -> pieces of seq_len tokens at most; every token but the first is a target once."""
        t = self.tokenizer
        if ids.max(initial=0) >= t.vocab_size:
            raise BadSample(f'token {ids.max()} of a tokenizer with {t.vocab_size}: it was made with another one')
        targets = np.append(ids[1:], -100)
        targets[ids == (t.eos_id if t.eos_id != t.bos_id else -1)] = -100       # a document does not foretell the next
        return [dict(tokens=ids[a:a + self.seq_len], targets=targets[a:a + self.seq_len], pictures=[], text='',
                     blocks=np.ones(len(ids[a:a + self.seq_len]), np.uint8))
                for a in range(0, max(len(ids) - 1, 1), self.seq_len)]

    def clean(self, caption):
        """What SigLIP's tokenizers in transformers do to a text first: lower case, and for the first SigLIP no
        punctuation and no more than one space."""
        caption = caption.lower() if self.text_rule else caption
        if self.text_rule == 'siglip':
            caption = ' '.join(caption.translate(NO_PUNCTUATION).split())
        return caption

    def pixels(self, data, rng=None):
        """Encoded picture -> RGB uint8 (image_size, image_size, 3), on white, bicubic if no folder says otherwise; the
        moments of a latent as they are, fp16 (2 C, H, W)."""
        from PIL import Image
        if data.startswith(b'\x93NUMPY'):
            return read_latents(data)
        picture = open_picture(data, self.image_size if self.draft else 0)
        if picture.mode == 'RGBA' and rng is None:
            picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture).convert('RGB')
        picture = self.to_square(picture)
        return np.array(picture) if rng is None else augment(np.array(picture.convert('RGBA')), rng)

    def to_square(self, picture):
        """PIL picture of any size -> image_size x image_size, by `resize`."""
        (rule, edge), size, (w, h) = self.resize, self.image_size, picture.size
        if rule == 'longest':               # Idefics3: the sides as its image processor rounds them
            long, short = edge, int(edge * min(w, h) / max(w, h))
            short = max(short + short % 2, 1)
            if long > 4096:
                long, short = 4096, max(int(4096 * short / long), 1)
            picture = picture.resize((long, short) if w >= h else (short, long), self.resample)
        elif rule == 'squares':
            picture = picture.resize((edge, edge), self.resample)
        elif rule == 'shortest':            # CLIP: the middle of it
            long = int(edge * max(w, h) / min(w, h))
            if long * edge > MAX_PIXELS:
                raise BadSample(f'a picture of {w} x {h} pixels is too narrow to be made {long} x {edge}')
            picture = picture.resize((edge, long) if w <= h else (long, edge), self.resample)
            left, top = ((side - size) // 2 for side in picture.size)
            picture = picture.crop((left, top, left + size, top + size))
        return picture if picture.size == (size, size) else picture.resize((size, size), self.resample)

    def pad_lowdim(self, actions, is_pad, proprio):
        """Actions of one sample at the sizes of the settings, with masks of what is real."""
        steps, size, proprio_size = self.lowdim
        if len(actions) > steps or actions.shape[1] > size or len(proprio) > proprio_size:
            raise BadSample(f'actions {actions.shape} and proprio {proprio.shape} are larger than '
                            f'action_steps={steps}, action_dim={size}, proprio_dim={proprio_size}')
        out = dict(actions=np.zeros((steps, size), np.float32), is_pad=np.ones(steps, bool),
                   action_mask=np.zeros(size, bool), proprio=np.zeros(proprio_size, np.float32),
                   proprio_mask=np.zeros(proprio_size, bool))
        h, a, p = *actions.shape, len(proprio)
        out['actions'][:h, :a], out['is_pad'][:h], out['action_mask'][:a] = actions, is_pad, True
        out['proprio'][:p], out['proprio_mask'][:p] = proprio, True
        return out


def read_latents(data):
    """Bytes of a .latents.npy -> fp16 (2 C, H, W), means and standard deviations. Raises BadSample."""
    try:
        moments = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BadSample(f'.latents.npy can not be read ({error})') from None
    if moments.dtype != np.float16 or moments.ndim != 3 or moments.shape[0] % 2 or not np.isfinite(moments).all():
        raise BadSample(f'.latents.npy is {moments.dtype} {moments.shape}: expected numbers of float16 (2 C, H, W)')
    return moments


def read_tokens(data, ext):
    """Bytes of a .tokens.npy, or the array of a .tokens.bin -> int32 (tokens,). Raises BadSample."""
    try:
        ids = data if ext == 'tokens.bin' else np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BadSample(f'.{ext} can not be read ({error})') from None
    if ids.dtype not in (np.uint16, np.uint32, np.int32, np.int64) or ids.ndim != 1:
        raise BadSample(f'.{ext} is {ids.dtype} {ids.shape}: expected a row of uint16 or uint32')
    ids = ids[ids != np.iinfo(ids.dtype).max]           # which marks padding
    if not len(ids) or ids.min() < 0:
        raise BadSample(f'.{ext} holds no tokens')
    return ids.astype(np.int64)


# ----------------------------------------------------------------------------------------------------------------------
# pieces to a batch


def token_rows(ids, seq_len, tokenizer, documents=True):
    """Sequences of a tokenized data set, unsigned (B, L), L <= seq_len + 1 -> tokens, targets, segments int64
    (B, seq_len), tensors on the same device.

    The last of seq_len + 1 tokens is a target only. The largest value of the type marks padding. A segment begins at
    each bos, and after each eos; documents=False: attention does not stop there."""
    import torch
    from torch.nn.functional import pad
    padding = torch.iinfo(ids.dtype).max
    ids = ids.view({2: torch.int16, 4: torch.int32}[ids.itemsize]).long() & padding     # unsigned types can do little
    n, room, bos, eos = min(ids.shape[1], seq_len), (0, seq_len + 1 - ids.shape[1]), tokenizer.bos_id, tokenizer.eos_id
    real = ids != padding
    learned = real[:, 1:]
    if bos != eos:
        learned = learned & (ids[:, :-1] != eos)        # a document does not foretell the next
    targets = pad(ids[:, 1:].where(learned, -100), room, value=-100)
    ids, real = ids[:, :n], real[:, :n]
    starts = ids == bos
    if bos != eos:
        starts[:, 1:] |= ids[:, :-1] == eos
    starts[:, 0] = True
    segments = starts.cumsum(1) if documents else torch.ones_like(ids)
    room = (0, seq_len - n)
    return pad(ids.where(real, tokenizer.pad_id), room, value=tokenizer.pad_id), targets, pad(segments * real, room)


def count_tokens(ids, seq_len, tokenizer, documents=True):
    """What `token_rows` will give of an array, counted: tokens, targets, and whether any row is not just causal."""
    bos, eos, n = tokenizer.bos_id, tokenizer.eos_id, min(ids.shape[1], seq_len)
    padding = np.iinfo(ids.dtype).max
    ended = np.zeros_like(ids[:, 1:], bool) if bos == eos else ids[:, :-1] == eos
    cut = documents and (ended | (ids[:, 1:] == bos))[:, :n - 1].any() or n < seq_len
    real = ids != padding
    return np.count_nonzero(real[:, :n]), np.count_nonzero(real[:, 1:] & ~ended), bool(cut or not real[:, :n].all())


def fill_rows(lengths, seq_len):
    """Pieces into as few rows as first-fit-decreasing finds: a list of lists of piece numbers, none of them cut."""
    rows, room = [], np.zeros(0, np.int64)
    for i in np.argsort(-np.asarray(lengths), kind='stable').tolist():
        fits = np.flatnonzero(room >= lengths[i])
        if len(fits):
            rows[fits[0]].append(i)
            room[fits[0]] -= lengths[i]
        else:
            rows.append([i])
            room = np.append(room, seq_len - lengths[i])
    return rows


def collate(pieces, p, pack=False, multiple=1, ready=()):
    """Pieces (None: a placeholder, an empty row) -> a batch, a dict of small arrays:

    tokens, targets int32, blocks uint8, segments int16 (B, T); parts int16 (B, T) or (B, 1), whose data set a target
    is; of the forms t2i and clip, positions (B,) in the run; pixels uint8 (I, H, W, 3), or fp16 (I, 2 C, H, W) the
    moments of latents, and pictures (B,), how many of them each row has; lowdim: a dict of arrays (A, ...), with `rows`
    (A,) and, where the settings name cameras, `camera_mask`; texts, one a row; num_tokens, num_targets. blocks and
    segments are left out where a row is just causal. A batch of nothing but sequences of one type has `ids` (B, L)
    instead, of which `token_rows` makes tokens, targets and segments on the device, and `cut`: whether it needs the
    segments.

    pack: several pieces share a row, each a segment of its own. multiple: of how many rows B is one; empty ones fill
    up. ready: sequences and their data set, [(ids, part), ...], which come first."""
    if ready and not pieces and len({(ids.dtype, ids.shape[1]) for ids, _ in ready}) == 1:
        return collate_sequences(ready, p, multiple)
    if pack:
        pieces = [piece for piece in pieces if piece]
        rows = fill_rows([len(piece['tokens']) for piece in pieces], p.seq_len)
    else:
        rows = [[i] if piece else [] for i, piece in enumerate(pieces)]
    first = sum(len(ids) for ids, _ in ready)
    shape = (-(-max(first + len(rows), 1) // multiple) * multiple, p.seq_len)
    tokens, targets = np.full(shape, p.tokenizer.pad_id, np.int32), np.full(shape, -100, np.int32)
    blocks, segments = np.ones(shape, np.uint8), np.zeros(shape, np.int16)
    parts = np.zeros(shape if pack else (shape[0], 1), np.int16)
    a = 0
    for ids, part in ready:
        b = a + len(ids)
        tokens[a:b], targets[a:b], segments[a:b] = token_rows(as_tensor(ids), p.seq_len, p.tokenizer, p.documents)
        parts[a:b] = part
        a = b
    pictures, counts, texts, lowdim = [], np.zeros(shape[0], np.int32), [''] * shape[0], []
    positions = np.zeros(shape[0], np.int64)
    for i, row in enumerate(rows, first):
        a = 0
        for number, piece in enumerate(pieces[j] for j in row):
            here = slice(a, a + len(piece['tokens']))
            tokens[i, here], targets[i, here], blocks[i, here] = piece['tokens'], piece['targets'], piece['blocks']
            segments[i, here] = (number + 1) * piece.get('real', 1)         # 0 is padding
            parts[i, here if pack else 0] = piece['part']
            pictures += piece['pictures']
            counts[i] += len(piece['pictures'])
            lowdim += [piece['lowdim'] | {'rows': np.int64(i), 'positions': np.int64(piece.get('position', 0))}
                       ] if 'lowdim' in piece else []
            texts[i], positions[i] = piece['text'], piece.get('position', 0)
            a = here.stop
    if p.function in (pair, t2i, clip):       # one target a picture, so that pictures are what the loss is a mean over
        targets[:, 1:] = -100
        targets[:, 0] = np.where(counts > 0, tokens[:, 0], -100)
    batch = dict(tokens=tokens, targets=targets, blocks=blocks, segments=segments, parts=parts, pictures=counts,
                 texts=texts, num_tokens=int((segments > 0).sum()), num_targets=int((targets != -100).sum()))
    if p.function in (t2i, clip):
        batch['positions'] = positions
    if pictures:
        batch['pixels'] = np.stack(pictures)
    elif (blocks == 1).all():
        del batch['blocks']
    if (segments == 1).all():
        del batch['segments']
    if lowdim:
        batch['lowdim'] = {key: np.stack([x[key] for x in lowdim]) for key in lowdim[0]}
    return batch


def collate_sequences(ready, p, multiple):
    """The batch of sequences of one type, see `collate`."""
    ids, parts = ready[0][0], np.repeat([part for _, part in ready], [len(ids) for ids, _ in ready])
    short = -len(parts) % multiple
    if len(ready) > 1 or short:
        empty = np.full((short, ids.shape[1]), np.iinfo(ids.dtype).max, ids.dtype)
        ids, parts = np.concatenate([*(ids for ids, _ in ready), empty]), np.pad(parts, (0, short))
    num_tokens, num_targets, cut = count_tokens(ids, p.seq_len, p.tokenizer, p.documents)
    return dict(ids=ids, cut=cut, parts=parts.astype(np.int16)[:, None], pictures=np.zeros(len(ids), np.int32),
                texts=[''] * len(ids), num_tokens=num_tokens, num_targets=num_targets)


def split(batch, size):
    """A batch in batches of `size` rows, each with its own pictures and actions."""
    n = len(batch['parts'])
    if n <= size:
        return [batch]
    out, ends = [], np.concatenate([[0], np.cumsum(batch['pictures'])])
    for a in range(0, n, size):
        b = min(a + size, n)
        part = {k: v[a:b] for k, v in batch.items() if k in ('ids', 'tokens', 'targets', 'blocks', 'segments', 'parts',
                                                            'pictures', 'texts', 'positions')}
        part |= {'cut': batch['cut']} if 'cut' in batch else {}
        if ends[b] > ends[a]:
            part['pixels'] = batch['pixels'][ends[a]:ends[b]]
        if 'lowdim' in batch:
            here = (batch['lowdim']['rows'] >= a) & (batch['lowdim']['rows'] < b)
            if here.any():
                part['lowdim'] = {k: v[here] for k, v in batch['lowdim'].items()}
                part['lowdim']['rows'] = part['lowdim']['rows'] - a
        out.append(part)
    return out


def to_device(batch, device, p):
    """A collated batch -> the tensors that the models' `loss` takes."""
    out = {k: as_tensor(batch[k]).to(device, non_blocking=True).long()
           for k in ('tokens', 'targets', 'blocks', 'segments', 'positions') if k in batch}
    if 'ids' in batch:
        ids = as_tensor(batch['ids']).to(device, non_blocking=True)
        rows = token_rows(ids, p.seq_len, p.tokenizer, p.documents)
        out |= dict(zip(('tokens', 'targets', 'segments')[:2 + batch['cut']], rows))
    if 'pixels' in batch and as_tensor(batch['pixels']).is_floating_point():                # moments of latents
        out['pixels'] = as_tensor(batch['pixels']).to(device, non_blocking=True).float()
    elif 'pixels' in batch:
        out['pixels'] = to_pixels(batch['pixels'], device, p.mean, p.std)
    if 'lowdim' in batch:
        out['lowdim'] = {k: as_tensor(v).to(device, non_blocking=True) for k, v in batch['lowdim'].items()}
    return out


def as_tensor(array):
    import torch
    return torch.as_tensor(array)


def to_pixels(pictures, device, mean=0.5, std=0.5):
    """uint8 (I, H, W, 3) -> fp32 (I, 3, H, W), less the mean, by std (numbers, or one a channel); 0.5 and 0.5 give -1
    to 1, as SigLIP's."""
    mean, std = (as_tensor(x).to(device).view(-1, 1, 1) for x in (mean, std))
    pixels = as_tensor(pictures).to(device, non_blocking=True).permute(0, 3, 1, 2)
    return pixels.float().div(255 * std).sub(mean / std)
