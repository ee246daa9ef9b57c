"""What shards.py meets in some data sets: which shards one has that is no folder with a manifest
(a folder without one, a list, single shards, several of these, a URL), and members of tars that
are no files.

It imports this then; `folder` is its Folder.
"""
import glob
import os
import re

import numpy as np

MOST_PATHS = 10_000_000         # of a name with braces
PACKED = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst', '.tar.lz4')


def most_paths(spec):
    """As many paths as the braces of a spec stand for, or more."""
    number = 1
    for inside in re.findall(r'\{([^{}]*)\}', spec):
        begin, dots, end = inside.partition('..')
        end, _, stride = end.partition('..')
        try:
            number *= abs(int(end) - int(begin)) // max(abs(int(stride or 1)), 1) + 1
        except ValueError:
            number *= inside.count(',') + 1
    return number


def expand(spec):
    """'a,s3://b/{000..099}.tar' -> the paths and URLs in it."""
    from braceexpand import UnbalancedBracesError, braceexpand
    # commas inside braces separate nothing here
    patterns = re.findall(r'(?:\{[^{}]*\}|[^,])+', spec)
    if most_paths(spec) > MOST_PATHS:
        raise ValueError(f'data set {spec!r:.200}: its braces stand for more than {MOST_PATHS} '
                         'shards: name a folder or a manifest')
    try:
        return [path for pattern in patterns for path in braceexpand(pattern.strip())]
    except UnbalancedBracesError:
        raise ValueError(f'data set {spec!r}: its braces do not match; a name that holds some can '
                         'stand in a list (.txt)') from None


def listings(folder, spec, data_dir):
    """Yields what is the Listing of each part of a spec: first whole folders, then single shards.
    Raises ValueError and OSError."""
    # what is there is called so, commas and braces included
    paths = [spec]
    if not folder.place(spec, data_dir):
        paths = expand(spec)
    chosen = {}                     # folder -> file names
    for path in paths:
        is_folder = not folder.is_url(path) and os.path.isdir(folder.place(path, data_dir))
        if is_tar(path) and not is_folder:
            tars = [path]
        elif path.endswith('.txt') and not is_folder:
            tars = tars_of_list(folder, path, data_dir)
        else:
            yield whole_folder(folder, path, data_dir)
            continue
        for tar in tars:
            chosen.setdefault(os.path.dirname(tar), []).append(os.path.basename(tar))

    for base, files in chosen.items():
        if not folder.is_url(base):
            # where the first shard is, the others are
            first = folder.place(os.path.join(base, files[0]), data_dir)
            if first:
                base = os.path.dirname(first)
            else:
                base = folder.find(base or '.', data_dir)
        yield some_of_folder(folder, base, files)


def is_tar(name):
    return name.lower().endswith('.tar')


def to_names(files):
    """Names of files -> an array of bytes, without .tar."""
    return np.array([os.fsencode(file.removesuffix('.tar')) for file in files], np.bytes_)


def tars_of_list(folder, path, data_dir):
    """Paths and URLs in a .txt, one a line, relative to where it is. Raises ValueError."""
    tars = []
    if not folder.is_url(path):
        path = folder.find(path, data_dir)
    for number, line in enumerate(folder.read_file(path).decode('utf-8-sig').splitlines(), 1):
        tar = os.path.expanduser(line.strip())
        if tar and not is_tar(tar):
            raise ValueError(f'{path}, line {number}: {tar!r} is no .tar: one stands in each line')
        if folder.is_url(tar):
            tars.append(tar)
        elif tar:
            tars.append(os.path.join(os.path.dirname(path), tar))
    return tars


def whole_folder(folder, path, data_dir):
    """The Listing of a folder, or of the folder of a manifest. Raises ValueError."""
    there = path.rstrip('/')
    if not folder.is_url(path):
        there = folder.find(path, data_dir)

    # its counts, where somebody has written them down
    manifest = f'{there}/manifest.jsonl'
    if there.endswith('.jsonl'):
        manifest = there
    base = os.path.dirname(manifest) + '/'
    if there == manifest or folder.exists(manifest):
        return folder.manifest(manifest)._replace(base=base)
    if os.path.isfile(there):
        raise ValueError(f'data set {path!r} is a file: expected a folder, .tar (not packed), '
                         'list of them (.txt) or manifest (.jsonl)')

    # without one the shards are those that are there; macOS puts a hidden file beside each
    if folder.is_url(there):
        files = folder.remote.names_in(there)
    else:
        files = os.listdir(there)
    tars = [file for file in files if is_tar(file) and not file.startswith('.')]
    check_packed(there, files, tars)
    names = to_names(tars)
    return base, np.sort(names), np.full(len(names), -1)


def check_packed(there, files, tars):
    """Raises ValueError where a folder has packed shards, which would be left out."""
    for file in sorted(files):
        ending = next((ending for ending in PACKED if file.lower().endswith(ending)), '')
        # whoever unpacked it may have kept it
        if ending and file[:-len(ending)] + '.tar' not in tars and not file.startswith('.'):
            raise ValueError(f'{there}/{file} is packed, and a sample of a shard is read where it '
                             'lies: unpack it (gunzip, unzstd, ...), or take it away')


def some_of_folder(folder, base, files):
    """The Listing of some shards; their counts are in the manifest, if there is one. Raises
    ValueError."""
    names, sizes = to_names(files), np.full(len(files), -1)
    unique, counts = np.unique(names, return_counts=True)
    if len(unique) < len(names):
        twice = os.fsdecode(unique[counts.argmax()])
        raise ValueError(f'data set {folder.path!r}: shard {twice!r} comes twice')
    base += '/'
    if not folder.exists(base + 'manifest.jsonl'):
        return base, names, sizes
    _, known, counts, stored, _ = folder.manifest(base + 'manifest.jsonl')
    _, ours, theirs = np.intersect1d(names, known, return_indices=True)
    sizes[ours] = counts[theirs]
    return base, names, sizes, stored


def not_found(path, data_dir, what):
    """What to say of a file or folder that does not exist."""
    remedy = 'make it with a script of prepare/ (the config names it) or correct it'
    from usage import nearest_folder
    near = nearest_folder(path, data_dir)
    if near:
        remedy = f'did you mean {near!r}? If not, {remedy}'
    return (f'{what} {path!r} does not exist, in data_dir={data_dir!r} or as a path: '
            f'{remedy}')


def no_shards(folder, spec, data_dir):
    """What to say of a data set without shards."""
    said = f'data set {spec!r} holds no shards (.tar): '
    # of a URL nothing is looked for
    there = folder.place(spec, data_dir) or os.devnull
    for inside in sorted(glob.glob(glob.escape(there) + '/*/')):
        if any(map(is_tar, os.listdir(inside))):
            below = os.path.join(spec, os.path.basename(inside.rstrip('/')))
            return f'{said}{below!r} does, and a folder stands for its own alone'
    return said + ('`tar cf FOLDER/a.tar -C FOLDER .` makes one of files, or make it with a '
                   'script of prepare/')


# -------------------------------------------------------------------------------------------------
# members of tars


def no_file(member):
    """Why a member of a tar is no plain file of a sample, and what helps."""
    name = f'{member.name[:99]!r}'
    # tar writes both where files of a folder are linked
    if member.issym() or member.islnk():
        return (f'{name} is a link to {member.linkname[:99]!r}: write the tar with `tar '
                '--dereference --hard-dereference`')
    if member.issparse():
        return f'{name} is a sparse file: write the tar without --sparse (-S)'
    if not member.isreg():
        return f'{name} is no file (type {member.type!r}): write the tar without it'
    return f'{name} has a name of {len(member.name)} characters, or a NUL in it: give it another'
