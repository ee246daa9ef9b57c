"""Pictures: encoded bytes to pixels, and drawings that change a little every time they are seen.

Imported by the tasks that have eyes. `Eyes` is what a run does to every picture, made of its
settings or of a model folder's preprocessor_config.json.

Axes: I pictures, H W rows and columns, S the side of a square.
"""
import glob
import io
import os
import sys
from dataclasses import dataclass

import numpy as np

from data import hash64, splitmix64
from shards import BadSample

MAX_PIXELS = 64 << 20           # of one picture; more is a bad sample
ENDINGS = ('.png', '.jpg', '.jpeg', '.webp')


def open_picture(data, size=0):
    """Encoded bytes -> a PIL picture, RGBA where it is transparent, else RGB. Raises BadSample.

    size > 0: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as both sides stay at
    least `size`."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        picture = Image.open(io.BytesIO(data), formats=('JPEG', 'PNG', 'WEBP'))
        if picture.width * picture.height > MAX_PIXELS:
            raise BadSample(f'a picture of {picture.width} x {picture.height} pixels is over the '
                            f'bound of {MAX_PIXELS}')
        if size and picture.format == 'JPEG':
            picture.draft(None, (size, size))
        picture = ImageOps.exif_transpose(picture)      # as the camera was held
        if picture.mode.startswith('I'):                # 16 bits, which PIL would clip at 255
            grey = np.asarray(picture).clip(0, 65535) // 257
            picture = Image.fromarray(grey.astype(np.uint8))
        return picture.convert('RGBA' if picture.has_transparency_data else 'RGB')
    except UnidentifiedImageError:
        raise BadSample('the picture can not be decoded (no JPEG, PNG or WebP)') from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f'the picture can not be decoded ({error})') from None


def on_white(picture):
    """What is transparent of a PIL picture becomes white: RGB."""
    from PIL import Image
    if picture.mode != 'RGBA':
        return picture
    white = Image.new('RGBA', picture.size, 'white')
    return Image.alpha_composite(white, picture).convert('RGB')


def is_depth(name, data):
    """Does a picture hold distances? It is named so, and has 16 bits, as a PNG's header says."""
    return 'depth' in name.lower() and data.startswith(b'\x89PNG') and data[24:25] == b'\x10'


def find(names):
    """The files that a list of paths, patterns and folders, separated by commas, stands for.

    Raises ValueError for one that stands for nothing."""
    files = []
    for name in names.split(','):
        pattern = os.path.join(name, '*') if os.path.isdir(name) else name
        matches = sorted(path for path in glob.glob(pattern) if path.lower().endswith(ENDINGS))
        if os.path.isfile(name):
            matches = [name]
        if not matches:
            raise ValueError(f'--image={name!r}: no such picture, pattern that matches, or folder '
                             f'with {", ".join(ENDINGS)}')
        files += matches
    return files


# -----------------------------------------------------------------------------------------------
# pixels


@dataclass
class Eyes:
    """How a picture of any size becomes pixels of a square.

    resize: what comes before the last resampling to `size`: ('square', 0) nothing,
    ('longest', side), ('squares', side), ('shortest', side) and the middle of it."""
    size: int = 64
    mean: object = 0.5          # subtracted from pixels of 0 to 1: a number, or one a channel
    std: object = 0.5           # and what they are then divided by
    draft: bool = True          # JPEGs may be decoded small, where that is at least `size`
    resample: int = 3           # a filter of PIL: bicubic
    resize: tuple = ('square', 0)

    def random(self, *key):
        """What augments the pictures of a sample, by integers that say which it is."""
        return Random(*key)

    def pixels(self, data, rng=None):
        """Encoded picture -> RGB uint8 (S, S, 3), on white. rng: a Random augments it.

        Raises BadSample."""
        picture = open_picture(data, self.size if self.draft else 0)
        if rng is not None:
            return augment(np.array(self.to_square(picture).convert('RGBA')), rng)

        return np.array(self.to_square(on_white(picture)))

    def pixels_of(self, data, sample, rng=None):
        """The same of one of a sample's pictures, if it is one. Raises BadSample."""
        # distances of 16 bits would be learned as a grey of 8
        names = sample.get('picture_names', ())
        for name, picture in zip(names, sample['pictures']):
            if picture is data and is_depth(name, data):
                raise BadSample(f'{name!r} holds depth in 16 bits, which is no picture: a form of '
                                'yours can read it among the members')
        return self.pixels(data, rng)

    def to_square(self, picture):
        """PIL picture of any size -> size x size, by `resize`."""
        rule, edge = self.resize
        if rule == 'longest':
            picture = to_longest(picture, edge, self.resample)
        elif rule == 'squares':
            picture = picture.resize((edge, edge), self.resample)
        elif rule == 'shortest':
            picture = to_shortest(picture, edge, self.size, self.resample)
        if picture.size == (self.size, self.size):
            return picture
        return picture.resize((self.size, self.size), self.resample)

    def to_tensor(self, pictures, device):
        """uint8 (I, H, W, 3) -> fp32 (I, 3, H, W), less the mean, by std.

        0.5 and 0.5 give -1 to 1, as SigLIP has it."""
        import torch
        mean = torch.as_tensor(self.mean).to(device).view(-1, 1, 1)
        std = torch.as_tensor(self.std).to(device).view(-1, 1, 1)
        x = torch.as_tensor(pictures).to(device, non_blocking=True).permute(0, 3, 1, 2)
        return x.float().div(255 * std).sub(mean / std)

    def to_pictures(self, x):
        """The way back: fp32 (I, 3, H, W) as a model has it -> uint8 (I, H, W, 3)."""
        import torch
        x = x * torch.as_tensor(self.std).to(x).view(-1, 1, 1)
        x = (x + torch.as_tensor(self.mean).to(x).view(-1, 1, 1)).clamp(0, 1)
        return (255 * x).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def eyes_of(settings, size):
    """The Eyes of a run's settings."""
    return Eyes(size, settings['image_mean'], settings['image_std'], settings['image_draft'])


def to_longest(picture, edge, resample):
    """The longer side becomes `edge`; sides are rounded as Idefics3's image processor does."""
    w, h = picture.size
    long, short = edge, int(edge * min(w, h) / max(w, h))
    short = max(short + short % 2, 1)
    if long > 4096:
        long, short = 4096, max(int(4096 * short / long), 1)
    return picture.resize((long, short) if w >= h else (short, long), resample)


def to_shortest(picture, edge, size, resample):
    """The shorter side becomes `edge`, then the middle size x size of it, as CLIP's. Raises
    BadSample."""
    w, h = picture.size
    long = int(edge * max(w, h) / min(w, h))
    if long * edge > MAX_PIXELS:
        raise BadSample(f'a picture of {w} x {h} pixels is too narrow to be made {long} x {edge}')
    picture = picture.resize((edge, long) if w <= h else (long, edge), resample)
    left, top = ((side - size) // 2 for side in picture.size)
    return picture.crop((left, top, left + size, top + size))


def on_background(rgba, colour=(255, 255, 255)):
    """RGBA uint8 (H, W, 4) over a colour -> RGB uint8 (H, W, 3)."""
    alpha = rgba[..., 3:].astype(np.uint16)
    ground = np.array(colour, np.uint16) * (255 - alpha)
    return ((rgba[..., :3] * alpha + ground + 127) // 255).astype(np.uint8)


# -----------------------------------------------------------------------------------------------
# augmentation of drawings

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]],
                  np.float32)
TO_RGB = np.linalg.inv(TO_YIQ)


class Random:
    """A stream of random numbers keyed by integers, the same for ever. Enough for augmentation."""

    def __init__(self, *key):
        self.key, self.count = hash64(*key), 0

    def uniform(self, low=0.0, high=1.0, size=None):
        """Uniform in [low, high): a float, or an array of `size` numbers."""
        if size is None:
            return float(self.uniform(low, high, 1)[0])
        n = int(np.prod(size))
        places = np.arange(self.count, self.count + n, dtype=np.uint64)
        bits = splitmix64(self.key + splitmix64(places))
        self.count += n

        # the 53 highest bits, as many as a float64 holds exactly
        values = low + (high - low) * (bits >> np.uint64(11)).astype(np.float64) * 2.0 ** -53
        return values.reshape(size)


def augment(rgba, rng):
    """RGBA uint8 (S, S, 4) -> RGB uint8 (S, S, 3): as another designer might have drawn it.

    Never mirrored, since left and right arrows are different names; one in ten stays as it is."""
    if rng.uniform() < 0.1:
        return on_background(rgba)
    size = rgba.shape[0]
    angle, zoom, aspect, shear, dx, dy, *colours = rng.uniform(-1, 1, 13)
    (gray, lines, line_ink, posterize, tones, outline, outline_ink, ground, hole, *hole_box,
     blur) = rng.uniform(size=14)

    x = moved(rgba, angle, zoom, aspect, shear, dx, dy)
    rgb = recoloured(x[..., :3], *colours[:4], colours[4:], is_gray=gray < 0.1)
    alpha = x[..., 3]

    # line and tone: dark lines inside, few tones, a dark outline
    if lines < 0.2:
        rgb = with_lines(rgb, line_ink)
    if posterize < 0.15:
        steps = 2 + int(4 * tones)
        rgb = np.round(rgb * steps) / steps
    rgb = rgb.clip(0, 1)
    if outline < 0.25:
        grown = dilated(alpha)
        ink = np.float32(0.2 * outline_ink)
        rgb, alpha = rgb * alpha[..., None] + ink * (1 - alpha[..., None]), grown

    # the ground is white or a light colour; a piece may be missing; a blur
    colour = np.ones(3, np.float32)
    if ground >= 0.6:
        colour = rng.uniform(0, 1, 3).astype(np.float32) ** 0.5
    rgb = rgb * alpha[..., None] + colour * (1 - alpha[..., None])
    if hole < 0.25:
        box = (np.array(hole_box) * [1, 1, 0.25, 0.25] + [0, 0, 0.12, 0.12]) * size
        top, left, height, width = box
        rgb[int(top):int(top + height), int(left):int(left + width)] = colour
    if blur < 0.15:
        rgb = blurred(rgb)
    return (255 * rgb + 0.5).astype(np.uint8)


def moved(rgba, angle, zoom, aspect, shear, dx, dy):
    """Rotation, zoom, aspect, shear and shift, each by a number of -1 to 1: fp32 of 0 to 1."""
    from PIL import Image
    size = rgba.shape[0]
    zoom, aspect, angle = np.exp(0.22 * zoom - 0.12), np.exp(0.12 * aspect), 0.3 * angle
    c, s, middle = np.cos(angle) / zoom, np.sin(angle) / zoom, size / 2
    a, b = c * aspect, (s + 0.15 * shear * c) * aspect
    d, e = -s / aspect, (c - 0.15 * shear * s) / aspect
    dx, dy = middle + 0.08 * size * dx, middle + 0.08 * size * dy

    matrix = (a, b, middle - a * dx - b * dy, d, e, middle - d * dx - e * dy)
    picture = Image.fromarray(rgba).transform((size, size), Image.Transform.AFFINE, matrix,
                                              Image.Resampling.BILINEAR)
    return np.asarray(picture).astype(np.float32) / 255


def recoloured(rgb, hue, saturation, gain, brightness, gains, is_gray):
    """Hue and saturation turn and stretch the chroma plane; gains and brightness."""
    turn = 0.35 * hue
    stretch = 0.0 if is_gray else np.exp(0.6 * saturation)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    chroma = np.eye(3)
    chroma[1:, 1:] = stretch * rotation
    gains = np.exp(0.3 * gain + 0.15 * np.array(gains))
    matrix = ((TO_RGB @ chroma @ TO_YIQ) * gains[:, None]).astype(np.float32)
    return rgb @ matrix.T + np.float32(0.12 * brightness + 0.5 * (1 - gains.mean()))


def with_lines(rgb, ink):
    """Dark lines where the light changes."""
    light = rgb @ LUMA
    down = abs(np.diff(light, axis=0, append=light[-1:]))
    across = abs(np.diff(light, axis=1, append=light[:, -1:]))
    edge = np.minimum(2 * (down + across), 1) * np.float32(0.5 + 0.5 * ink)
    return rgb * (1 - edge)[..., None]


def dilated(alpha):
    """What is opaque, one pixel larger on all sides."""
    p = np.pad(alpha, 1)
    return np.maximum.reduce([alpha, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]])


def blurred(rgb):
    """A binomial blur of 3 x 3 pixels."""
    p = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode='edge')
    p = p[:-2] + 2 * p[1:-1] + p[2:]
    return (p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]) / 16


# -----------------------------------------------------------------------------------------------
# pictures for people


def draw_answers(path, name, pixels, texts, given, score, columns=8, rows=5):
    """A PNG of pictures, their true names and the answers: green right, red wrong."""
    import matplotlib
    # The one way to draw that needs no screen.
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    # Evenly from the whole set, which may be sorted.
    count = min(columns * rows, len(texts))
    chosen = np.linspace(0, len(texts) - 1, count).round().astype(int)

    # Half an inch for the title above each picture.
    height = 0.5 + 1.25 * pixels.shape[1] / pixels.shape[2]
    size = columns * 1.7, rows * height
    figure, axes = plt.subplots(rows, columns, figsize=size, layout='constrained')
    for axis in axes.flat:
        axis.axis('off')

    for axis, i in zip(axes.flat, chosen):
        axis.imshow(pixels[i], interpolation='nearest')
        if given[i] == texts[i]:
            axis.set_title(texts[i], fontsize=7, color='g')
        else:
            axis.set_title(f'{texts[i]}\n{given[i][:28]}', fontsize=7, color='r')

    title = f'{name}: {score:.1%} of {len(texts)} right (the true name; below it a wrong answer)'
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    # pyplot would keep it.
    plt.close(figure)
    print(f'grid of {len(chosen)} pictures: {path}', file=sys.stderr)
