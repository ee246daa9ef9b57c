"""Files of pictures as others make them, beside a second reader (OpenCV): in a robot's camera, and
in the makers of data sets."""
import io
import runpy

import numpy as np
import pytest
import tiny
from conftest import encode, make_processor, picture, write_set
from PIL import Image

from pictures import Eyes
from robots.record import saved
from shards import Folder

cv2 = pytest.importorskip('cv2')
NEEDS = ['prepare', 'images', 'families']
SMOOTH = np.kron(np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8),
                 np.ones((8, 8, 1), np.uint8))


def file(picture, form='PNG', **options):
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def turned(form, orientation, **options):
    """A picture that says how the camera was held."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file(Image.fromarray(SMOOTH), form, exif=exif, **options)


FRAMES = [Image.fromarray(picture(number)) for number in (5, 6)]
MOVING = dict(save_all=True, append_images=FRAMES[1:])
GREY = np.array(np.arange(256).reshape(16, 16) * 257, np.uint16)
GREY[0] = 20_000
FILES = {
    '16 bits': encode(GREY),
    'CMYK': file(Image.fromarray(SMOOTH).convert('CMYK'), 'JPEG', quality=95),
    'palette': file(Image.fromarray(picture(4)).quantize(16)),
    'palette, one colour clear': file(Image.fromarray(SMOOTH).quantize(16), transparency=1),
    'one colour clear': file(Image.fromarray(SMOOTH), transparency=tuple(SMOOTH[0, 0].tolist())),
    'grey and alpha': file(Image.fromarray(picture(4)).convert('LA')),
    'a bit a pixel': file(Image.fromarray(picture(4)[..., 0]).convert('1')),
    'moving PNG': file(FRAMES[0], **MOVING),
    'moving WebP': file(FRAMES[0], 'WEBP', lossless=True, exact=True, **MOVING)}
for number in range(1, 9):
    FILES[f'JPEG, turned {number}'] = turned('JPEG', number, quality=95)
    FILES[f'PNG, turned {number}'] = turned('PNG', number)
    FILES[f'WebP, turned {number}'] = turned('WEBP', number, lossless=True)


def by_opencv(data):
    """Float (H, W, 3) of 0 to 255, on white."""
    data = np.frombuffer(data, np.uint8)
    x = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    if x.dtype == np.uint16:
        return np.repeat((x // 257)[..., None], 3, 2)
    # without alpha it looks at how the camera was held, and makes grey three colours
    if x.shape[2:] != (4,):
        return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(float)
    alpha = x[..., 3:] / 255
    return x[..., 2::-1] * alpha + 255 * (1 - alpha)


@pytest.fixture(scope='module')
def made():
    """The scripts prepare/lerobot.py and prepare/latents.py."""
    folder = tiny.ROOT / 'prepare'
    return [runpy.run_path(str(folder / name)) for name in ('lerobot.py', 'latents.py')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A data set of all files, as pictures with captions."""
    path = tmp_path_factory.mktemp('files')
    members = [(f'p{i}', {'webp': data, 'txt': b'a'}) for i, data in enumerate(FILES.values())]
    write_set(path, [members])
    return Folder(str(path))


def test_every_file_is_what_another_reader_sees(made, folder):
    """Cameras of robots, a column of LeRobot's, latents."""
    lerobot, latents = made
    camera = make_processor(32, 16, 4, task='vla', cameras=['near'], action_steps=1, action_dim=2)
    lowdim = saved(np.savez, actions=np.zeros((1, 2)))
    bad, found = [], {'latents': [], 'camera': [], 'column': []}
    for _, _, pixels in latents['pictures'](folder, 0, Eyes(16), bad):
        found['latents'].append(pixels)
    assert not bad
    for data in FILES.values():
        piece, = camera.pieces({'near.webp': data, 'lowdim.npz': lowdim, 'json': b'{}'})
        found['camera'] += piece['pictures']
        found['column'].append(lerobot['pixels_of']('near', data))

    for place, pictures in found.items():
        for (name, data), pixels in zip(FILES.items(), pictures, strict=True):
            error = abs(pixels - by_opencv(data)).max()
            # half a step of rounding; CMYK is converted by each in its own way
            assert error <= (1 if name == 'CMYK' else 0.51), (place, name, error)
    assert (found['camera'][0][0] == 77).all(), '20,000 of 65,535'


def test_orientations_differ():
    """So that the test above can fail."""
    for form in ('JPEG', 'PNG', 'WebP'):
        seen = {by_opencv(FILES[f'{form}, turned {number}']).tobytes() for number in range(1, 9)}
        assert len(seen) == 8, form
