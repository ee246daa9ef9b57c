"""Damage of every kind, by seed: what the tests of damaged files share."""
import json
import signal
import tarfile
import zlib
from contextlib import contextmanager

import numpy as np

NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62]
VALUES = [None, True, False, 0, -1, 3, 30_000, 1 << 31, 1 << 64, 10 ** 400, 0.5, -0.0, 1e308,
          float('nan'), float('inf'), '', 'x', 'ü' * 300, '\ud800', 'a\0b', '../..', '/',
          [], {}, [[]], [None], {'a': 1}, [0] * 300, '9' * 5000]


def damaged(data, seed, other=b''):
    """(kind of damage, the bytes damaged); other: bytes that may be joined to them."""
    rng = np.random.default_rng(seed)
    kinds = [flipped, overwritten, cut, left_out, doubled, swapped, blanked, numbered, joined]
    kind = kinds[rng.integers(len(kinds))]
    for _ in range(int(rng.choice([1, 1, 1, 2, 5]))):
        data = kind(bytearray(data), rng, other)
    return kind.__name__, bytes(data)


def span(data, rng, most=2000):
    begin = int(rng.integers(len(data) + 1))
    return slice(begin, begin + int(rng.integers(1, most)))


def flipped(data, rng, _):
    for place in rng.integers(len(data), size=int(rng.integers(1, 9))) if data else ():
        data[place] ^= 1 << int(rng.integers(8))
    return data


def overwritten(data, rng, _):
    part = span(data, rng, 40)
    data[part] = rng.bytes(len(data[part]))
    return data


def cut(data, rng, _):
    return data[:int(rng.integers(len(data) + 1))]


def left_out(data, rng, _):
    del data[span(data, rng)]
    return data


def doubled(data, rng, _):
    part = span(data, rng)
    place = int(rng.integers(len(data) + 1))
    return data[:place] + data[part] + data[place:]


def swapped(data, rng, _):
    """Two blocks of 512 bytes change places, or one comes twice."""
    if len(data) < 1024:
        return data[::-1]
    a, b = (512 * int(x) for x in rng.integers(len(data) // 512, size=2))
    first, second = data[a:a + 512], data[b:b + 512]
    data[a:a + 512] = second
    if rng.integers(2):
        data[b:b + 512] = first
    return data


def blanked(data, rng, _):
    begin = 512 * int(rng.integers(len(data) // 512 + 1))
    part = slice(begin, begin + 512)
    data[part] = bytes(len(data[part]))
    return data


def numbered(data, rng, _):
    """A number that is the largest, the smallest, or none."""
    number, size = NUMBERS[rng.integers(len(NUMBERS))], int(rng.choice([1, 2, 4, 8]))
    place = int(rng.integers(min(len(data), 2000) + 1))
    order = ('big', 'little')[rng.integers(2)]
    data[place:place + size] = (number & ((1 << 8 * size) - 1)).to_bytes(size, order)
    return data


def joined(data, rng, other):
    if rng.integers(2):
        return other + data
    return data + (other or data)


# -----------------------------------------------------------------------------------------------
# damage that its readers do not notice at once


def headed(data, seed):
    """(kind, a tar one of whose headers says something else, with the right checksum)."""
    rng, data = np.random.default_rng(seed), bytearray(data)
    places = [at for at in range(0, len(data), 512) if data[at + 257:at + 262] == b'ustar']
    at = places[rng.integers(len(places))]
    # name, mode, uid, gid, size, time, type, name of a link, magic, user, group, prefix
    fields = {'name': (0, 100), 'mode': (100, 24), 'size': (124, 12), 'time': (136, 12),
              'type': (156, 1), 'link': (157, 100), 'magic': (257, 8), 'prefix': (345, 155)}
    name = list(fields)[rng.integers(len(fields))]
    begin, size = fields[name]
    sizes = [b'%011o\0' % int(rng.integers(0, 5000)), b'77777777777\0', b'\xff' * 12,
             b'\xff' * 10 + bytes([int(rng.integers(256)), 0]), b'\x80' + bytes(10) + b'\7',
             b'\x80' + b'\xff' * 11, b'-0000000001\0', b' ' * 12, b'0x10'.ljust(12, b'\0')]
    values = {'size': sizes, 'type': [bytes([c]) for c in b'\x001234567DKLMNSVXgxZ ']}
    names = [b'a.txt', b'../../x.txt', b'/x.txt', b'x.TXT', b'', b'.', b'a\n.txt', b'\xff\xfe.txt',
             b'a.txt/', b'__x__/a.txt', b'.hidden', b'n' * size, rng.bytes(size)]
    choices = values.get(name, names)
    value = choices[rng.integers(len(choices))][:size].ljust(size, b'\0')
    data[at + begin:at + begin + size] = value
    data[at + 148:at + 156] = b' ' * 8
    data[at + 148:at + 156] = b'%06o\0 ' % sum(data[at:at + 512])
    return f'header: {name}', bytes(data)


def chunked(data, seed):
    """(kind, a PNG one of whose chunks says something else, with the right checksum)."""
    rng = np.random.default_rng(seed)
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at:at + 4], 'big')
        chunks.append([data[at + 4:at + 8], bytearray(data[at + 8:at + 8 + size])])
        at += size + 12
    kind, content = chunk = chunks[rng.integers(len(chunks))]
    change = rng.integers(5)
    if change == 0:
        chunks.remove(chunk)
    elif change == 1:
        chunks.insert(int(rng.integers(len(chunks) + 1)), chunk)
    elif change == 2:
        del content[int(rng.integers(len(content) + 1)):]
    else:
        size = int(rng.choice([1, 1, 4]))
        place = int(rng.integers(max(len(content) - size, 0) + 1))
        content[place:place + size] = rng.bytes(size)
    out = bytearray(data[:8])
    for name, content in chunks:
        crc = zlib.crc32(name + content)
        out += len(content).to_bytes(4, 'big') + name + content + crc.to_bytes(4, 'big')
    return f'chunk {kind.decode()}', bytes(out)


def revalued(value, seed):
    """A JSON value with something else at one place, or one key less, or more."""
    rng = np.random.default_rng(seed)
    value = json.loads(json.dumps(value))
    places = list(places_in(value))
    holder, key = places[rng.integers(len(places))]
    choice = rng.integers(8)
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        holder[key + 'x'] = holder.pop(key)
    elif choice == 2:
        other, its_key = places[rng.integers(len(places))]
        holder[key] = json.loads(json.dumps(other[its_key])) if its_key in range_of(other) else 0
    else:
        holder[key] = VALUES[rng.integers(len(VALUES))]
    return json.dumps(value).encode()


def range_of(holder):
    return holder if isinstance(holder, dict) else range(len(holder))


def places_in(value):
    """(list or dict, key) of every value inside."""
    for key in range_of(value):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places_in(value[key])


# -----------------------------------------------------------------------------------------------


class Hang(BaseException):
    """What takes too long; nobody catches it."""


@contextmanager
def at_most(seconds):
    """Raises Hang in what hangs."""
    def stop(*_):
        raise Hang(f'it takes more than {seconds} s')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def members_of(file):
    """[(name, bytes)] of a tar's plain files, as tarfile has them up to where it raises or goes in
    circles, and whether it did."""
    found, end = [], 0
    try:
        tar = tarfile.open(fileobj=file, mode='r:')
        while (member := tar.next()) is not None:
            if member.size < 0 or tar.offset <= end:
                return found, True
            end = tar.offset
            if member.isreg() and not member.issparse():
                found.append((member.name, tar.extractfile(member).read()))
    except Exception:
        return found, True
    return found, False
