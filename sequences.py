"""Data sets of tokens: sequences of one length, made beforehand (prepare/text.py).

data.py and processor.py import this where there are such. A sequence has seq_len + 1
tokens or less; the largest value of its type marks padding. B sequences, L tokens each.
"""
import numpy as np

from shards import BadSample


def read(folder, shards, indexes, tokenizer):
    """Sequences (samples, sequence_length), of the type they are stored in, and what could not be
    used of them: [(row, why)]."""
    rows, failed = [], {}
    for shard, index in zip(shards, indexes):
        try:
            rows.append(folder.read_sequence(shard, index))
        except BadSample as error:
            failed[len(rows)] = error
            # which is padding
            rows.append(bytes([255]) * folder.sequence_bytes)
    ids = np.frombuffer(bytearray().join(rows), folder.dtype).reshape(len(rows), -1)

    # padding is past the vocabulary, too: most batches that have none are told at once
    padding, vocab_size = np.iinfo(folder.dtype).max, tokenizer.vocab_size
    if ids.max() >= vocab_size:
        unknown = (ids >= vocab_size) & (ids != padding)
        for row in np.flatnonzero(unknown.any(1)).tolist():
            failed[row] = (f'token {ids[row][ids[row] != padding].max()} of a tokenizer of '
                           f'{vocab_size}: made with another one?')
            ids[row] = padding
    return ids, sorted(failed.items())


def rows_of(ids, p):
    """Sequences, unsigned (B, L), L <= seq_len + 1, and a Processor -> tokens, targets, segments
    int64 (B, seq_len), tensors on the same device.

    The last of seq_len + 1 tokens is a target only. The largest value of the type marks padding. A
    segment begins at each bos, and after each eos; p.documents False: attention does not stop."""
    import torch
    from torch.nn.functional import pad
    padding, seq_len = torch.iinfo(ids.dtype).max, p.seq_len
    bos, eos, pad_id = p.tokenizer.bos_id, p.tokenizer.eos_id, p.tokenizer.pad_id
    n, room = min(ids.shape[1], seq_len), (0, seq_len + 1 - ids.shape[1])

    # unsigned types can do little
    signed = {2: torch.int16, 4: torch.int32}[ids.itemsize]
    ids = ids.view(signed).long() & padding
    real = ids != padding
    learned = real[:, 1:]
    # a document does not foretell the next
    if bos != eos:
        learned = learned & (ids[:, :-1] != eos)
    targets = pad(ids[:, 1:].where(learned, -100), room, value=-100)

    ids, real = ids[:, :n], real[:, :n]
    starts = ids == bos
    if bos != eos:
        starts[:, 1:] |= ids[:, :-1] == eos
    starts[:, 0] = True
    segments = starts.cumsum(1) if p.documents else torch.ones_like(ids)
    room = (0, seq_len - n)
    tokens = pad(ids.where(real, pad_id), room, value=pad_id)
    return tokens, targets, pad(segments * real, room)


def count(ids, p):
    """What `rows_of` will give of an array, counted: tokens, targets, and whether any row is not
    just causal."""
    bos, eos, n = p.tokenizer.bos_id, p.tokenizer.eos_id, min(ids.shape[1], p.seq_len)
    real = ids != np.iinfo(ids.dtype).max
    ended = np.zeros_like(ids[:, 1:], bool)
    if bos != eos:
        ended = ids[:, :-1] == eos
    has_documents = (ended | (ids[:, 1:] == bos))[:, :n - 1].any()
    is_short = n < p.seq_len or not real[:, :n].all()
    num_targets = np.count_nonzero(real[:, 1:] & ~ended)
    needs_segments = is_short or p.documents and has_documents
    return np.count_nonzero(real[:, :n]), num_targets, bool(needs_segments)


def write(batch, ready, p):
    """Sequences into the first rows of a batch: ready as processor.collate has it."""
    import torch
    end = 0
    for ids, part, positions in ready:
        begin, end = end, end + len(ids)
        rows = rows_of(torch.as_tensor(ids), p)
        for key, value in zip(('tokens', 'targets', 'segments'), rows):
            batch[key][begin:end] = value
        batch['parts'][begin:end], batch['positions'][begin:end] = part, positions
        batch['numbers'][begin:end] = positions[:, None] * p.NUMBERS


def collate(ready, p, multiple):
    """The batch of sequences of one type, see processor.collate."""
    sequences, parts, positions = zip(*ready)
    ids, parts = sequences[0], np.repeat(parts, list(map(len, sequences)))
    positions, short = np.concatenate(positions), -len(parts) % multiple
    if len(ready) > 1 or short:
        empty = np.full((short, ids.shape[1]), np.iinfo(ids.dtype).max, ids.dtype)
        ids = np.concatenate([*sequences, empty])
        parts, positions = np.pad(parts, (0, short)), np.pad(positions, (0, short))
    num_tokens, num_targets, cut = count(ids, p)
    return dict(ids=ids, cut=cut, parts=parts.astype(np.int16)[:, None], texts=[''] * len(ids),
                pictures=np.zeros(len(ids), np.int32), positions=positions, num_tokens=num_tokens,
                numbers=positions[:, None] * p.NUMBERS, num_targets=num_targets)
