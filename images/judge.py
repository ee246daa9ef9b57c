"""Pictures that a model has drawn: written as PNGs, put side by side, and how near to real ones.

Axes: N pictures, H W pixels, D numbers of a feature.
"""

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def save(path, picture, settings):
    """uint8 (H, W, 3) as a PNG, with settings {name: value} as its text chunks."""
    info = PngInfo()
    for key, value in settings.items():
        info.add_text(key, str(value))
    Image.fromarray(picture).save(path, pnginfo=info)


def setting_in(path, key):
    """What `save` wrote into a PNG of a setting; '' for any other file."""
    try:
        with Image.open(path) as picture:
            return picture.text.get(key, '')
    except (OSError, ValueError, AttributeError):
        return ''


def resized(pictures, size):
    """uint8 (N, H, W, 3) -> uint8 (N, size, size, 3), bicubic."""
    # Nothing to do, and np.stack would copy them all.
    if pictures.shape[1:3] == (size, size):
        return pictures

    made = []
    for picture in pictures:
        image = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
        made.append(np.array(image))
    return np.stack(made)


def side_by_side(pictures, columns=0, size=96, gap=4):
    """uint8 (N, H, W, 3) in rows of `columns` (0: a square of them), each made `size` pixels wide
    where it is less, on white: uint8 (H, W, 3)."""
    n = len(pictures)
    columns = columns or int(np.ceil(n ** 0.5))
    pictures = resized(pictures, max(size, pictures.shape[1]))

    # White pictures fill the last row; each gets a gap above and on its left.
    empty = np.full((-n % columns, *pictures.shape[1:]), 255, np.uint8)
    cells = np.concatenate((pictures, empty))
    cells = np.pad(cells, ((0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255)

    rows, (height, width) = len(cells) // columns, cells.shape[1:3]
    sheet = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, 3)        # (rows H, columns W, 3)

    # The gaps on the right and below, that no picture has brought.
    return np.pad(sheet, ((0, gap), (0, gap), (0, 0)), constant_values=255)


def token_f1(answer, truth):
    """Harmonic mean of the shares of the answer's and of the truth's words that the other has."""
    answer, truth = answer.split(), truth.split()
    # A word that comes twice in both counts twice.
    common = sum(min(answer.count(word), truth.count(word)) for word in set(truth))
    return 2 * common / max(len(answer) + len(truth), 1)


def frechet(a, b):
    """Fréchet distance (arXiv 1706.08500) of features (N, D) and (M, D), taken as Gaussians."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a = np.atleast_2d(np.cov(a, rowvar=False))
    cov_b = np.atleast_2d(np.cov(b, rowvar=False))

    # root cov_b root is symmetric and has the eigenvalues of cov_a cov_b, whose square root's
    # trace is wanted. Rounding leaves some just below 0.
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()

    between_means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(between_means + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)
