"""Files -> records that may be documents, one at a time; prepare/text.py reads with it.

The `place` of a record says where reading goes on after it: a run that was killed begins there.
No more of a file is in memory than its longest document, whatever a packed file unpacks to.
"""

import codecs
import glob
import gzip
import io
import itertools
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from shards import end_of, is_plain
from tars import no_file

ENDINGS = ('.txt', '.txt.gz', '.txt.zst', '.jsonl', '.jsonl.gz', '.jsonl.zst', '.json', '.json.gz',
           '.json.zst', '.parquet', '.tar')
PIECE = 1 << 20                 # bytes that are read at once where they are thrown away


class BadInput(Exception):
    """An input that is not there or can not be read; the message says which and why."""


class Record(NamedTuple):
    """What may be a document, its bytes not decoded yet."""
    form: str       # 'text', 'json', or 'bad': then `data` is a message
    data: bytes     # None: longer than max_document_mb
    where: str      # in which file and line, for messages
    place: tuple    # where reading begins again, and how many lines or samples came before that
    read: int       # bytes of the file up to here


# -------------------------------------------------------------------------------------------------
# which files


def find_inputs(names, out):
    """Paths of a comma-separated list of files, patterns and folders, none of them twice."""
    found = {}
    for name in names.split(','):
        name = name.strip()
        if not name:
            continue
        for path in sorted(paths_of(name, out)):
            if not path.name.lower().endswith(ENDINGS):
                raise BadInput(f'input {path} ends in none of {" ".join(ENDINGS)}')
            # links and patterns may lead to one file in two ways
            found.setdefault(path.resolve(), path)

    if not found:
        raise BadInput(f'input {names!r} names no file')
    return list(found.values())


def paths_of(name, out):
    """The files that one name of the list stands for. Raises BadInput."""
    if os.path.isdir(name):
        paths = files_below(Path(name), out)
        if not paths:
            raise BadInput(f'input {name!r} holds no file that ends in {" ".join(ENDINGS)}')
        return paths

    # a file's own name may look like a pattern
    matches = [name]
    if not os.path.exists(name):
        matches = glob.glob(name, recursive=True)
    paths = [Path(match) for match in matches if Path(match).is_file()]

    if not paths and glob.has_magic(name):
        raise BadInput(f'input {name!r} matches no file')
    if not paths:
        raise BadInput(f'input {name!r} does not exist')
    return paths


def files_below(folder, out):
    """Files of a folder, but no hidden ones and none that an earlier run wrote to `out`."""
    out, paths = out.resolve(), []
    for path in folder.rglob('*'):
        if not path.name.lower().endswith(ENDINGS) or not path.is_file():
            continue
        is_hidden = any(part.startswith('.') for part in path.relative_to(folder).parts)
        if not is_hidden and out not in path.resolve().parents:
            paths.append(path)
    return paths


# -------------------------------------------------------------------------------------------------
# .txt, .json and .jsonl


def unpack(raw, path):
    """The file as it was before it was packed. Raises where its end is read and it was cut."""
    if path.suffix.lower() not in ('.gz', '.zst'):
        return raw
    if path.stat().st_size == 0:
        raise EOFError('the file is empty, and a packed file is never')
    if path.suffix.lower() == '.gz':
        return gzip.GzipFile(fileobj=raw)

    # the zstandard package would not see a cut
    import pyarrow
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, 'zstd'), 1 << 16)


def chomp(line):
    """A line without its end."""
    return line.removesuffix(b'\n').removesuffix(b'\r')


def read_lines(file, limit, at, count):
    """Yield (line with its end, bytes and lines up to there); a line that is too long is None.

    It begins at byte `at`, after `count` lines; a line may have `limit` bytes without its end."""
    # packed files can not seek
    for start in range(0, at, PIECE):
        file.read(min(at - start, PIECE))

    # 3 bytes for the mark at a file's beginning, 2 for \r\n, 1 to see that it is too long
    while line := file.readline(limit + 6):
        at += len(line)
        count += 1
        if count == 1:
            line = line.removeprefix(codecs.BOM_UTF8)

        # what is too long is read to its end, but not held
        if len(chomp(line)) > limit:
            while line and not line.endswith(b'\n'):
                line = file.readline(PIECE)
                at += len(line)
            line = None
        yield line, at, count


def read_blocks(lines, limit):
    """The same for blocks of lines between blank ones, and the number of a block's first line."""
    block, size, first, place = io.BytesIO(), 0, 0, ()
    # as if a blank line came last: the end of the file ends a block too
    for line, at, count in itertools.chain(lines, [(b'', 0, 0)]):
        is_blank = line is not None and not line.strip()
        if not is_blank:
            first, place = first or count, (at, count)
            # a line that is too long makes its block too long; 2 bytes may be the last line's end
            if line is None:
                size += limit + 3
            else:
                size += len(line)
            if size <= limit + 2:
                block.write(line)

        elif first:
            text = chomp(block.getvalue())
            if size > limit + 2 or len(text) > limit:
                text = None
            yield text, *place, first
            block, size, first = io.BytesIO(), 0, 0


def text_records(raw, path, s, at, count):
    """Records of a .txt, .json or .jsonl file."""
    limit, file = s.max_document_mb << 20, unpack(raw, path)
    form = 'json'
    if path.name.lower().removesuffix('.gz').removesuffix('.zst').endswith('.txt'):
        form = 'text'

    # the one place after a file that is read whole is 1
    if form == 'text' and s.split == 'file':
        if at == 0:
            text = file.read(limit + len(codecs.BOM_UTF8) + 1).removeprefix(codecs.BOM_UTF8)
            if len(text) > limit:
                text = None
            yield Record(form, text, str(path), (1, 0), raw.tell())
        return

    lines = read_lines(file, limit, at, count)
    if form == 'text' and s.split == 'blank':
        for text, at, count, first in read_blocks(lines, limit):
            yield Record(form, text, f'{path}:{first}', (at, count), raw.tell())
        return

    for line, at, count in lines:
        if line is not None:
            # a blank line is no record of JSON
            if form == 'json' and not line.strip():
                continue
            line = chomp(line)
        yield Record(form, line, f'{path}:{count}', (at, count), raw.tell())


# -------------------------------------------------------------------------------------------------
# .parquet and .tar


def parquet_records(raw, path, s, at, count):
    """Records of a column of a .parquet file, a few rows in memory at a time."""
    import pyarrow
    from pyarrow import parquet
    # without a buffer, a whole row group would be read at once
    table = parquet.ParquetFile(raw, buffer_size=1 << 20)
    columns = table.schema_arrow.names
    if s.text_key not in columns:
        raise ValueError(f'no column {s.text_key!r} but {", ".join(columns)}; give --text_key')

    row, size, limit = 0, path.stat().st_size, s.max_document_mb << 20
    for group in range(table.num_row_groups):
        # groups that an earlier run has read are not opened
        rows = table.metadata.row_group(group).num_rows
        if row + rows <= at:
            row += rows
            continue

        for batch in table.iter_batches(16, [group], [s.text_key], use_threads=False):
            # the bytes as they are: whether they are text is seen when they are decoded
            for value in batch.column(0).cast(pyarrow.large_binary()):
                row += 1
                if row <= at:
                    continue
                form, data, buffer = 'text', None, value.as_buffer()
                if buffer is None:
                    form, data = 'bad', f'{s.text_key!r} is null'
                elif buffer.size <= limit:
                    data = buffer.to_pybytes()
                read = size * row // table.metadata.num_rows
                yield Record(form, data, f'{path}: row {row}', (row, 0), read)


def tar_members(archive):
    """Yield ((folder, key), extension, member) of the files in a .tar file."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # or it would remember every one
        # it would go in circles
        if member.size < 0 or archive.offset <= member.offset:
            raise ValueError(f'{member.name!r} has {member.size} bytes')
        folder, name = os.path.split(member.name)
        key, _, extension = name.partition('.')
        # as shards.py has it: a link would be a document less
        if member.isdir() or not key or not extension:
            continue
        if not is_plain(member):
            raise ValueError(no_file(member))
        yield (folder, key), extension.lower(), member


def tar_records(raw, path, s, at, count):
    """Records of a .tar file's samples: members in a row with one name up to the first dot."""
    raw.seek(at)
    archive, limit = tarfile.open(fileobj=raw, mode='r:'), s.max_document_mb << 20
    samples = itertools.groupby(tar_members(archive), key=lambda item: item[0])
    for number, (_, members) in enumerate(samples):
        members = list(members)
        sample = {extension: member for _, extension, member in members}
        first = members[0][2]
        if len(sample) < len(members):
            raise ValueError(f'a member beside {first.name} is there twice')

        form = 'json'
        if 'txt' in sample:
            form = 'text'
        member = sample.get('txt', sample.get('json'))
        # a place is the sample that was read last: that one is left out
        if member is None or number < count:
            continue

        data = None
        if member.size <= limit:
            data = archive.extractfile(member).read()
        yield Record(form, data, f'{path}: {member.name}', (first.offset, 1), first.offset)

    # tarfile takes a damaged header, or none, for the end, and the first of two that were joined
    problem = end_of(raw, archive.offset)
    if problem:
        raise ValueError(f'it {problem}')


# -------------------------------------------------------------------------------------------------
# all of them


def records(files, s, place):
    """Yield the records of all files from a place on. Raises BadInput.

    A place is here (number of the file, *place in the file)."""
    begin, at, count = place
    readers = {'.parquet': parquet_records, '.tar': tar_records}
    for number, path in enumerate(files[begin:], begin):
        reader = readers.get(path.suffix.lower(), text_records)
        try:
            with open(path, 'rb') as raw:
                for form, data, where, after, read in reader(raw, path, s, at, count):
                    if data is None:
                        form, data = 'bad', f'longer than --max_document_mb={s.max_document_mb}'
                    yield Record(form, data, where, (number, *after), read)
        # of a damaged file: each library has its own
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise BadInput(f'{path} can not be read: {reason}') from None
        at, count = 0, 0
