"""Tokens -> tar shards of sequences and a manifest, in the format that prepare/text.py tells."""

import contextlib
import os

import numpy as np

import manifests


@contextlib.contextmanager
def atomic(path):
    """A file to write that gets its name when it is whole and on the disk, or never."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

    # the folder too, or the name could be lost
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


class Stream:
    """Tokens of one part that wait for their shard, and the manifest's `rows` of those written."""

    def __init__(self, folder, s, vocab_size, saved, tokens):
        self.folder, self.s, self.vocab_size = folder, s, vocab_size
        self.rows, self.documents = saved['rows'], saved['documents']
        self.num_bytes = saved['num_bytes']     # of the documents that end in the next shard

        # the largest value of the type must be no id: it fills up the last sequence
        self.dtype = np.dtype('<u2')
        if vocab_size >= 65535:
            self.dtype = np.dtype('<u4')
        self.waiting, self.count = [tokens.astype(self.dtype)], len(tokens)

        # a shard holds one token more, with which the next one begins
        self.step = s.sequences_per_shard * s.seq_len

    @property
    def tokens(self):
        """How many there were."""
        return len(self.rows) * self.step + self.count

    def state(self):
        """What __init__ takes as `saved`."""
        return {'rows': self.rows, 'documents': self.documents, 'num_bytes': self.num_bytes}

    def add(self, tokens, lengths, sizes):
        """Take documents of so many tokens and bytes each. True if they filled shards."""
        # places of the documents' last tokens among those that wait
        lasts = self.count + np.cumsum(lengths, dtype=np.int64) - 1
        self.waiting.append(tokens.astype(self.dtype))
        self.count += len(tokens)
        self.documents += len(lengths)

        num_shards = (self.count - 1) // self.step
        if num_shards > 0:
            held = np.concatenate(self.waiting)
            for start in range(0, num_shards * self.step, self.step):
                # a document's bytes count in the shard in which it ends
                ended = np.searchsorted(lasts, start + self.step, side='right')
                self.num_bytes += int(sizes[:ended].sum())
                lasts, sizes = lasts[ended:], sizes[ended:]
                self.write(held[start:start + self.step + 1], self.step)
            self.waiting = [held[num_shards * self.step:].copy()]
            self.count = len(self.waiting[0])

        self.num_bytes += int(sizes.sum())
        return num_shards > 0

    def close(self, last):
        """Write what is left, after the tokens `last`, and the manifest."""
        if not self.documents:
            return
        none = np.empty(0, np.int64)
        self.add(np.array(last, np.uint32), none, none)

        # a token alone is no target
        if self.count > 1:
            missing = -(self.count - 1) % self.s.seq_len
            fill = np.full(missing, np.iinfo(self.dtype).max, self.dtype)
            self.write(np.concatenate([*self.waiting, fill]), self.count - 1)

        manifests.finish(self.folder, self.rows)

    def write(self, tokens, num_tokens):
        """A shard of all of the tokens, and its row; `num_tokens` are targets."""
        from webdataset import TarWriter  # it imports torch
        # each sequence begins with the last token of the one before
        length = self.s.seq_len + 1
        sequences = np.lib.stride_tricks.sliding_window_view(tokens, length)[::self.s.seq_len]

        # without times and owners: the same tokens give the same bytes
        name, first = f'{len(self.rows):08d}', len(self.rows) * self.s.sequences_per_shard
        self.folder.mkdir(exist_ok=True)
        if not self.rows:
            manifests.begin(self.folder, 'prepare/text.py')
        with atomic(self.folder / f'{name}.tar') as file, \
                TarWriter(file, user='', group='', mode=0o644, mtime=0, encoder=False) as writer:
            for start in range(0, len(sequences), self.s.sequences_per_member):
                member = sequences[start:start + self.s.sequences_per_member]
                writer.write({'__key__': f'{first + start:010d}', 'tokens.bin': member.tobytes()})

        self.rows.append({
            'shard': name, 'num_sequences': len(sequences), 'sequence_length': length,
            'dtype': self.dtype.name, 'vocab_size': self.vocab_size, 'num_tokens': num_tokens,
            'num_bytes': self.num_bytes,
        })
        self.num_bytes = 0
