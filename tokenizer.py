"""Tokenizers behind one small interface: `encode`, `decode`, `vocab_size`, ids of special tokens.

`load(name)` takes `bytes` (no file), `x.model` (sentencepiece), `x.tiktoken` (BPE ranks),
`tokenizer.json` (Hugging Face), `merges.txt` (CLIP's, beside its vocab.json) or a folder that
holds one of them; nothing is downloaded. Every tokenizer has `bos_id`, `eos_id`, `pad_id` and
`image_id`, the token that marks where a picture goes; those a file lacks get new ids after its
own. Text never turns into one of them, nor into one of `specials` ({text: id}, what a
tokenizer.json flags as special, a sentencepiece model as control); <loc0001> and <seg001> of
PaliGemma it does turn into. `special('<start_of_turn>')` is the id of the token spelled so, or
None; `names`: how a file spells bos_token, eos_token ...; `files`: what was read.

Each kind that is read from a file has a file of its own in vocabularies/, and shares what stands
here.
"""
import importlib
import json
import os

import numpy as np

# How GPT-2, CLIP and those after them spell the end of a document.
END = '<|endoftext|>'
# Stands in what looks like a marker but is a user's: Unicode keeps it out of texts.
BREAK = '\ufdd0'

# A role in tokenizer_config.json -> how tokenizers without that file spell the token, the
# likeliest first.
ROLES = {
    'bos_token': ('<s>', '<bos>', '<|begin_of_text|>', '<|startoftext|>', '[CLS]'),
    'eos_token': ('</s>', '<eos>', END, '<|end_of_text|>', '<|im_end|>', '[SEP]'),
    'pad_token': ('<pad>', '[PAD]', '<|pad|>'),
    'image_token': ('<image>', '<image_soft_token>', '<|image_pad|>', '<|image|>')}


def complete(own, size):
    """Ids, with a new one from `size` on for each None, and the size after them."""
    ids = []
    for i in own:
        if i is None:
            i = size
            size += 1
        ids.append(i)
    return ids, size


def spell(text, piece_id):
    """Ids of a text's letters, or of their bytes. piece_id: piece -> id or None."""
    ids = []
    for letter in text:
        letter_ids = [piece_id(letter)]
        if letter_ids == [None]:
            letter_ids = [piece_id(f'<0x{byte:02X}>') for byte in letter.encode()]
        # What has neither is left out, as there is nothing to write it with.
        ids += [i for i in letter_ids if i is not None]
    return ids


def spell_out(ids, spelled):
    """Ids in which each one of `spelled`, {id: ids}, is replaced by how it is spelled."""
    # As it is with nearly all texts.
    if spelled.keys().isdisjoint(ids):
        return ids
    return [j for i in ids for j in spelled.get(i, [i])]


def letters_before(text):
    """How many letters begin before each byte of a text, and before its end: int (bytes + 1,)."""
    code = np.frombuffer(text.encode(), np.uint8)
    # The second and later bytes of a letter are 10xxxxxx (RFC 3629).
    is_first = code & 0xC0 != 0x80
    return np.concatenate(([0], np.cumsum(is_first)))


def char_spans(text, lengths):
    """Lengths in bytes of a text's tokens -> where they begin and end in it, in characters."""
    letters = letters_before(text)
    ends = np.cumsum(lengths, dtype=int)
    # A token may begin inside a letter, which then belongs to it.
    begins = letters[ends - lengths + 1] - 1
    return begins.tolist(), letters[ends].tolist()


def columns(rows):
    """[(id, begin, end), ...] -> ids, begins and ends."""
    return tuple(map(list, zip(*rows))) or ([], [], [])


def read_json(path, limit=64 << 20):
    """The object in a .json file of strangers, of `limit` letters at most. Raises ValueError."""
    # What is too large is not parsed.
    settings = None
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read(limit + 1)
        if len(text) <= limit:
            settings = json.loads(text)
    # Deep brackets end the parser's recursion.
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path!r} can not be read as JSON: {error}') from None

    if len(text) > limit:
        raise ValueError(f'{path!r} is larger than {limit} bytes')
    if not isinstance(settings, dict):
        raise ValueError(f'{path!r} is no JSON object')
    return settings


class Bytes:
    """UTF-8 bytes: ids 0 to 255, then the special tokens."""
    files, specials, names = (), {}, {}
    bos_id, eos_id, pad_id, image_id, vocab_size = 256, 257, 258, 259, 260

    def encode(self, text):
        return list(text.encode('utf-8'))

    def offsets(self, text):
        """(ids, begins, ends): `encode` and where in the text each token comes from."""
        ids = self.encode(text)
        return ids, *char_spans(text, np.ones(len(ids), int))

    def decode(self, ids):
        # Special tokens are no bytes; a text may be cut in the middle of a letter.
        return bytes(i for i in ids if i < 256).decode('utf-8', errors='replace')

    def special(self, text):
        return None


def file_in(folder):
    """The path of the one tokenizer in a folder. Raises ValueError."""
    found = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(('.model', '.tiktoken')) or name in ('tokenizer.json', 'merges.txt'):
            found.append(name)

    # Many folders hold both, the same tokenizer for two libraries; others are one of a kind.
    for name in ('tokenizer.json', 'tokenizer.model'):
        if name in found:
            return os.path.join(folder, name)
    if len(found) != 1:
        files = ' and '.join(found) or 'no file'
        raise ValueError(f'tokenizer={folder!r} is a folder with {files} of the kinds '
                         'tokenizer.json, .model, .tiktoken, merges.txt: give the path of one '
                         'file')
    return os.path.join(folder, found[0])


def load(name):
    """The tokenizer of a file, of the one file in a folder, or `bytes`. Raises ValueError or
    FileNotFoundError with what to do."""
    if name == 'bytes':
        return Bytes()
    if os.path.isdir(name):
        name = file_in(name)

    # Imported by name, for a run needs one kind at most. CLIP's merges are read by the tokenizers
    # library, too.
    if name.endswith('.model'):
        file, kind = 'pieces', 'SentencePiece'
    elif name.endswith('.tiktoken'):
        file, kind = 'ranks', 'Tiktoken'
    elif name.endswith(('.json', 'merges.txt')):
        file, kind = 'json_file', 'HuggingFace'
    else:
        raise ValueError(f'tokenizer={name!r} is of no known kind: give bytes, a .model file '
                         '(sentencepiece), a .tiktoken file, a tokenizer.json, a merges.txt or a '
                         'folder that holds one')
    if not os.path.isfile(name):
        raise FileNotFoundError(f'tokenizer={name!r} does not exist: make it with the data set '
                                '(prepare/) or give another path')
    module = importlib.import_module(f'vocabularies.{file}')
    return getattr(module, kind)(name)
