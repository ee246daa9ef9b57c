"""Pictures that a model has drawn: written as PNGs, put side by side, and how near they are to real ones.

Axes: N pictures, H W pixels, D numbers of a feature.
"""
import sys

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def save(path, picture, settings):
    """uint8 (H, W, 3) as a PNG, with settings {name: value} as its text chunks."""
    info = PngInfo()
    for key, value in settings.items():
        info.add_text(key, str(value))
    Image.fromarray(picture).save(path, pnginfo=info)


def resized(pictures, size):
    """uint8 (N, H, W, 3) -> uint8 (N, size, size, 3), bicubic."""
    if pictures.shape[1:3] == (size, size):
        return pictures
    return np.stack([np.array(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC)) for x in pictures])


def side_by_side(pictures, columns=0, size=96, gap=4):
    """uint8 (N, H, W, 3) in rows of `columns` (0: a square of them), each made `size` pixels wide where it is less,
    on white: uint8 (H, W, 3)."""
    n = len(pictures)
    columns = columns or int(np.ceil(n ** 0.5))
    pictures = resized(pictures, max(size, pictures.shape[1]))
    empty = np.full((-n % columns, *pictures.shape[1:]), 255, np.uint8)
    cells = np.pad(np.concatenate((pictures, empty)), ((0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
    rows, (h, w) = len(cells) // columns, cells.shape[1:3]
    sheet = cells.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)
    return np.pad(sheet, ((0, gap), (0, gap), (0, 0)), constant_values=255)


def token_f1(answer, truth):
    """Harmonic mean of the shares of the answer's and of the truth's words that the other has, too."""
    answer, truth = answer.split(), truth.split()
    common = sum(min(answer.count(word), truth.count(word)) for word in set(truth))
    return 2 * common / max(len(answer) + len(truth), 1)


def frechet(a, b):
    """Fréchet distance (arXiv 1706.08500) of two sets of features, (N, D) and (M, D), taken as Gaussians."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()     # the trace of (cov_a cov_b)^0.5
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)


def draw(path, name, pixels, texts, given, score, columns=8, rows=5):
    """A PNG of pictures, their true names and the answers: green right, red wrong."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    chosen = np.linspace(0, len(texts) - 1, min(columns * rows, len(texts))).round().astype(int)
    height = 0.5 + 1.25 * pixels.shape[1] / pixels.shape[2]
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 1.7, rows * height), layout='constrained')
    for axis in axes.flat:
        axis.axis('off')
    for axis, i in zip(axes.flat, chosen):
        axis.imshow(pixels[i], interpolation='nearest')
        right = given[i] == texts[i]
        axis.set_title(texts[i] if right else f'{texts[i]}\n{given[i][:28]}', fontsize=7, color='g' if right else 'r')
    figure.suptitle(f'{name}: {score:.1%} of {len(texts)} right (the true name; below it a wrong answer)', fontsize=10)
    figure.savefig(path, dpi=110)
    print(f'grid of {len(chosen)} pictures: {path}', file=sys.stderr)
