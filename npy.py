"""Members of shards that are .npy files, and alike: what their headers say, where the samples of
an episode are, which tokens they hold.

shards.py and processor.py import this where they meet one.
"""
import io
import math
import os

import numpy as np


def read_header(file):
    """(shape, is it in columns, dtype) of a .npy file that is open. Raises ValueError."""
    try:
        read = np.lib.format.read_array_header_2_0
        if np.lib.format.read_magic(file)[0] == 1:
            read = np.lib.format.read_array_header_1_0
        return read(file)
    # it is Python's source, whose parsers have errors of many kinds
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(f'no .npy file ({reason})') from None


def npy_header(fd, at, size, where):
    """(shape, dtype, bytes of the header) of a .npy of so many bytes. Raises ValueError."""
    # far more than a header has; it is a stranger's
    header = io.BytesIO(os.pread(fd, min(size, 4096), at))
    try:
        shape, in_columns, dtype = read_header(header)
        if in_columns and len(shape) > 1 or dtype.hasobject:
            raise ValueError(f'no rows of numbers ({dtype} in columns)')
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    return shape, dtype, header.tell()


def load(data):
    """The array of a .npy's bytes, as numpy reads it. Raises ValueError."""
    file = io.BytesIO(data)
    shape, _, dtype = read_header(file)
    # a few bytes may say that they are more than there is memory
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > len(data) - file.tell():
        raise ValueError(f'{len(data)} bytes are no {shape} of {dtype}')
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        raise ValueError(' '.join(str(error).split())[:200]) from None


def read_episodes(table, firsts, fd, path):
    """How many samples each key of a shard is: with a `.lowdim.npy` one a row, else one.

    table: of shards.index_tar; firsts: where each key's rows begin in it, and the end. Gives the
    number of each key's first sample (one more: the count), the keys, and for each the type of its
    rows and the bytes before them. Raises ValueError."""
    starts, keys, episodes = [0], [], []
    for first, last in zip(firsts, firsts[1:]):
        # a key without such a member is one sample
        row_type, header, steps = None, 0, 1
        for _, key, ext, offset, size, _ in table[first:last].tolist():
            # pictures and the like are of the whole episode
            if ext != b'lowdim.npy':
                continue
            where = f'{path}, {key.decode()}'
            shape, row_type, header = npy_header(fd, offset, size, where)
            steps = math.prod(shape)

            # a row for each step, and nothing behind them
            size_of_rows = max(steps, 0) * row_type.itemsize
            if len(shape) != 1 or not size_of_rows or size != header + size_of_rows:
                raise ValueError(f'{where}: .lowdim.npy has {size} bytes and {shape} rows of '
                                 f'{row_type.itemsize}: make the data set again')
        starts.append(starts[-1] + steps)
        keys.append(table['key'][first])
        episodes.append((row_type, header))
    return starts, keys, episodes


def read_tokens(data, ext):
    """Bytes of a .tokens.npy, or the array of a .tokens.bin -> int64 (tokens,). Raises
    ValueError."""
    ids = data
    if ext == 'tokens.npy':
        try:
            ids = load(data)
        except ValueError as error:
            raise ValueError(f'.{ext} can not be read ({error})') from None
    if ids.dtype not in (np.uint16, np.uint32, np.int32, np.int64) or ids.ndim != 1:
        raise ValueError(f'.{ext} is {ids.dtype} {ids.shape}: expected a row of uint16 or uint32')
    # the largest value marks padding
    ids = ids[ids != np.iinfo(ids.dtype).max]
    if not len(ids) or ids.min() < 0:
        raise ValueError(f'.{ext} holds no tokens')
    return ids.astype(np.int64)


def read_sequences(table, sequence_length, dtype, fd, path):
    """Where the sequences of a shard begin: (the number of each member's first, and the count;
    keys of members; offsets of their first bytes). table: of shards.index_tar. Raises
    ValueError."""
    starts, keys, offsets = [0], [], []
    stride = sequence_length * dtype.itemsize
    for _, key, ext, offset, size, _ in table.tolist():
        where = f'{path}, {os.fsdecode(key)}'
        # members of other kinds hold no sequences
        if ext == b'tokens.npy':
            _, its_dtype, header = npy_header(fd, offset, size, where)
            if its_dtype != dtype:
                raise ValueError(f'{where}: {its_dtype}, the manifest says {dtype}')
            offset, size = offset + header, size - header
        elif ext != b'tokens.bin':
            continue
        if size % stride:
            raise ValueError(f'{where}: {size // dtype.itemsize} tokens are no multiple of '
                             f'sequence_length={sequence_length}')
        starts.append(starts[-1] + size // stride)
        offsets.append(offset)
        keys.append(key)
    return starts, keys, offsets
