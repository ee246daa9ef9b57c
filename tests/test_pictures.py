"""pictures.py: decoding, pixels of a square, and the augmentation of drawings."""
import io
import struct
import zlib

import numpy as np
import pytest
from conftest import encode, picture
from PIL import Image

from pictures import Eyes, Random, augment, on_background, open_picture
from shards import BadSample


def chunk_of(kind, body):
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def png(*chunks, size=16):
    """A PNG of 16 x 16 RGBA pixels, or one that says so."""
    return (b'\x89PNG\r\n\x1a\n'
            + chunk_of(b'IHDR', struct.pack('>IIBBBBB', size, size, 8, 6, 0, 0, 0))
            + b''.join(chunks) + chunk_of(b'IDAT', PIXELS) + chunk_of(b'IEND', b''))


PIXELS = zlib.compress(b''.join(b'\0' + np.random.default_rng(0).bytes(64) for _ in range(16)))


def bomb(size):
    """A PNG of a few bytes that says it is size x size pixels."""
    return png(size=size)


def rgba_of(content):
    return np.array(open_picture(content).convert('RGBA'))


def test_pictures_are_decoded_whatever_their_kind():
    rgba = picture(1)
    assert (rgba_of(encode(rgba)) == rgba).all() and rgba_of(png()).any()
    assert (rgba_of(encode(rgba, 'WEBP', lossless=True, exact=True)) == rgba).all()
    smooth = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    jpeg = rgba_of(encode(smooth, 'JPEG', quality=95)).astype(int)
    assert jpeg.shape == (16, 16, 4) and np.abs(jpeg[..., :3] - smooth).max() < 6
    assert (jpeg[..., 3] == 255).all()
    grey = rgba_of(encode(rgba[..., 0]))
    assert (grey[..., :3] == rgba[..., :1]).all() and (grey[..., 3] == 255).all()


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_picture_is_turned_as_the_camera_was_held(orientation):
    """Beside numpy: each way of the EXIF standard undone by hand."""
    upright = picture(3)[:8, :, :3]
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1),
              7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = np.array(open_picture(encode(np.ascontiguousarray(stored), exif=exif)))
    np.testing.assert_array_equal(seen, upright)


def test_grey_of_16_bits_is_no_white():
    grey = np.array([[0, 257], [20_000, 65_535]], np.uint16)
    seen = np.array(open_picture(encode(grey)))
    assert seen.shape == (2, 2, 3) and seen[..., 0].tolist() == [[0, 1], [77, 255]]


def test_other_modes_are_as_they_look():
    """Beside PIL's own conversion: CMYK, a palette with transparency; of several frames the
    first."""
    rgb = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    cmyk = Image.fromarray(rgb).convert('CMYK')
    out = io.BytesIO()
    cmyk.save(out, 'JPEG', quality=95)
    assert np.abs(np.array(open_picture(out.getvalue())).astype(int) - rgb).max() < 6

    palette = Image.fromarray(picture(4)).quantize(16)
    out = io.BytesIO()
    palette.save(out, 'PNG')
    np.testing.assert_array_equal(rgba_of(out.getvalue()), np.array(palette.convert('RGBA')))

    out, frames = io.BytesIO(), [Image.fromarray(picture(n)) for n in (5, 6)]
    frames[0].save(out, 'PNG', save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(rgba_of(out.getvalue()), picture(5))


@pytest.mark.filterwarnings('ignore')
def test_pictures_that_can_not_be_decoded_are_bad_samples():
    whole = encode(picture(2))
    for name, content in {
        'empty': b'', 'text': b'hello', 'cut': whole[:len(whole) // 2], 'header': whole[:20],
        'too long a text': png(chunk_of(b'zTXt', b'a\0\0' + zlib.compress(bytes(1 << 23)))),
        'bad chunk': png(chunk_of(b'IDAT', PIXELS[:50]), chunk_of(b'\0\1\2\3', b'')),
        'bomb': bomb(30000), 'over the bound': bomb(9000)}.items():
        with pytest.raises(BadSample) as error:
            rgba_of(content)
        assert 'picture' in str(error.value), name


@pytest.mark.filterwarnings('ignore')
def test_a_damaged_picture_is_a_bad_sample_or_a_picture():
    """Whatever Pillow raises, nothing else may leave decode_picture: it would end the run."""
    rng = np.random.default_rng(0)
    forms = [encode(picture(3)), encode(picture(3)[..., :3], 'JPEG'), encode(picture(3), 'WEBP'),
             encode(picture(3), 'TIFF'), encode(picture(3), 'GIF'), encode(picture(3), 'ICO')]
    for content in forms:
        for _ in range(150):
            damaged = bytearray(content)
            for _ in range(rng.integers(1, 4)):
                damaged[rng.integers(0, min(len(damaged), 120))] = rng.integers(0, 256)
            try:
                out = rgba_of(bytes(damaged))
            except BadSample:
                continue
            assert out.dtype == np.uint8 and out.shape[2] == 4


def test_on_background_blends_by_alpha():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, :3] = (250, 0, 9)
    rgba[0, :, 3] = (255, 0, 51)
    assert on_background(rgba).tolist() == [[[250, 0, 9], [255, 255, 255], [254, 204, 206]]]
    assert on_background(rgba,
                         (0, 100, 255)).tolist() == [[[250, 0, 9], [0, 100, 255], [50, 80, 206]]]
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    for colour in (0, 77, 255):
        blended = on_background(np.stack([value, value, value, alpha], -1).astype(np.uint8),
                                (colour,) * 3)
        exact = value / 255 * alpha + colour * (1 - alpha / 255)
        assert np.abs(blended - exact[..., None]).max() <= 0.5


def test_pixels_fill_the_square():
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 20:] = 255
    out = Eyes(8).pixels(encode(wide))
    assert out.shape == (8, 8, 3) and (out[:, :2] == 0).all() and (out[:, 6:] == 255).all()
    same = picture(4)
    assert (Eyes(16).pixels(encode(same)) == on_background(same)).all()


def test_a_jpeg_may_be_decoded_small():
    rgb = np.kron(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8),
                  np.ones((40, 40, 1), np.uint8))
    content = encode(rgb, 'JPEG', quality=95)
    small, whole = (Eyes(40, draft=draft).pixels(content).astype(int) for draft in (True, False))
    assert small.shape == whole.shape == (40, 40, 3) and 0 < np.abs(small - whole).mean() < 6
    assert open_picture(content, 40).size == (40, 40), '1/8 of 320'


def test_augmentation_is_keyed_by_seed_and_position():
    rgba = picture(5, 32)
    one = augment(rgba, Random(0, 4, 17))
    assert one.shape == (32, 32, 3) and one.dtype == np.uint8
    assert (one == augment(rgba, Random(0, 4, 17))).all()
    assert len({augment(rgba, Random(seed, 4, n)).tobytes() for seed in range(3)
                for n in range(5)}) == 15


def test_augmentation_never_mirrors_or_turns_a_picture_over():
    rgba = np.zeros((48, 48, 4), np.uint8)
    rgba[..., 3] = 255
    rgba[:22, :30, :3] = 255                            # light in the upper left
    eyes, content = Eyes(48), encode(rgba)
    plain = rgba[8:40, 8:40, 0].astype(float)
    views = [plain, plain[:, ::-1], plain[::-1], plain[::-1, ::-1]]
    seen = []
    for n in range(300):
        out = eyes.pixels(content, Random(1, 4, n))[8:40, 8:40].astype(float).mean(-1)
        seen.append(
            int(np.argmax([np.corrcoef(out.ravel(), view.ravel())[0, 1] for view in views])))
    assert seen.count(0) >= 294, np.bincount(seen)      # a hole may hide a corner


def test_augmentation_is_not_too_strong_and_not_nothing():
    rgba = picture(6, 32)
    rgba[...] = 0
    rgba[10:22, 10:22] = (200, 60, 30, 255)
    plain, moved = on_background(rgba), [augment(rgba, Random(2, 4, n)) for n in range(200)]
    assert 0 < sum((out == plain).all() for out in moved) < 50, 'some are left as they are'
    assert len({tuple(out[0, 0]) for out in moved}) > 30, 'the ground changes colour'
    assert len({tuple(out[16, 16]) for out in moved}) > 100, 'and the picture'
    distance = [np.abs(out.astype(int) - out[0, 0]).sum(-1) for out in moved]
    # others: a ground like the picture
    masks = [d > d.max() / 2 for d in distance if d.max() > 100]
    assert len(masks) > 150
    centres = np.array([np.argwhere(mask).mean(0) for mask in masks])
    areas = np.array([mask.sum() for mask in masks]) / 144
    assert np.quantile(np.abs(centres - 15.5), 0.95) < 5 and centres.std(0).min() > 0.5, (
        'shifted, and in the frame')
    assert 0.6 < np.median(areas) < 1.3 and areas.std() > 0.1, 'it is scaled'


def test_random_is_pinned_keyed_and_uniform():
    assert Random(1, 2, 3).uniform(size=3).tolist() == [0.03142468112206298, 0.07195283435997135,
                                                        0.2140216723910111]
    rng, again = Random(4), Random(4)
    apart = [rng.uniform(-2, 6) for _ in range(3)] + rng.uniform(
        -2, 6, (2, 2)).ravel().tolist() + [rng.uniform(-2, 6)]
    assert apart == again.uniform(-2, 6, 8).tolist(), 'one stream, however it is asked for'
    assert isinstance(apart[0], float) and Random(4).uniform(-2, 6, (2, 2)).shape == (2, 2)
    assert len({Random(*key).uniform() for key in [(0,), (1,), (0, 1), (1, 0)]}) == 4
    values = Random(9).uniform(3, 5, 20000)
    assert values.min() >= 3 and values.max() < 5
    assert abs(values.mean() - 4) < 0.02 and abs(values.var() - 4 / 12) < 0.01
    assert np.abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
