"""Members of samples that are not read: named once, and never a caption without its picture.

data.py imports this where it meets one.
"""
import os
import sys

from parallel import master
from processor import ENDINGS, is_read
from shards import BadSample

# pictures that are not read: what is beside one is not learned without it
PICTURES = ('tif', 'tiff', 'gif', 'bmp', 'heic', 'heif', 'avif', 'jxl', 'jp2', 'jfif', 'svg',
            'ppm', 'pgm', 'pnm', 'ico', 'tga', 'psd', 'exr', 'hdr', 'dng')


def look(folder, shard, members, processor, said):
    """Says on stderr how many members of a shard are not read, once for each kind; `said`: those
    of before. Raises BadSample where the picture of a sample is one of them."""
    # a form of yours gets them all
    if '.py:' in processor.form or processor.settings['task'].endswith('.py'):
        return
    endings = set()
    for ext in members:
        ending = ext.rpartition('.')[2]
        if not is_read(ext):
            endings.add(ending)
            # each rank reads of all shards, and one speaks for them
            if (folder.path, ending) not in said and master:
                count = count_in(folder, shard, ending)
                print(f'\n{folder.shard_path(shard)}: {count} members .{ending}: not read'
                      f'{reason(ext)}', file=sys.stderr)
            said.add((folder.path, ending))

    unreadable = sorted(endings & set(PICTURES))
    is_blind = processor.eyes is None or 'latents.npy' in members
    if unreadable and not is_blind and not any(ext.endswith(ENDINGS) for ext in members):
        raise BadSample(f'its picture is a .{unreadable[0]}, which is not read: make it a '
                        f'{", ".join(ENDINGS)}')


def count_in(folder, shard, ending):
    """How many members of a shard end so and are not read."""
    count = 0
    # by how names end: 001.txt, 002.txt ... of keys with dots are one kind
    for ext in map(os.fsdecode, folder.index(shard).table['ext'].tolist()):
        if ext.rpartition('.')[2] == ending and not is_read(ext):
            count += 1
    return count


def reason(ext):
    """Why, if its kind is one that is read."""
    if not is_read(ext.rpartition('.')[2]):
        return ''
    return f' (.{ext}: a key ends at the first dot of a name)'
