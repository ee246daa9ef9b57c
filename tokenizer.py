"""Tokenizers behind one small interface: `encode`, `decode`, `vocab_size` and the ids of the special tokens.

`load(name)` reads the name's ending: `bytes` (no file), `x.model` (sentencepiece), `x.tiktoken` (BPE ranks, read from
the file itself: nothing is downloaded). Every tokenizer has `bos_id`, `eos_id`, `pad_id` and `image_id`, the token that
marks where a picture goes; those a file lacks get new ids after its own. Text never turns into a special token.
"""
import base64
import os


class Bytes:
    """UTF-8 bytes: ids 0 to 255, then the special tokens."""
    files = ()

    def __init__(self):
        self.bos_id, self.eos_id, self.pad_id, self.image_id, self.vocab_size = 256, 257, 258, 259, 260

    def encode(self, text):
        return list(text.encode('utf-8'))

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode('utf-8', errors='replace')


class SentencePiece:
    """A sentencepiece model file, as Gemma, PaliGemma and Llama 2 have."""

    def __init__(self, path):
        import sentencepiece
        self.files = (path,)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (OSError, RuntimeError) as error:
            raise ValueError(f'tokenizer {path!r} is not a sentencepiece model: {error}') from None
        size = self.model.vocab_size()
        self.special = {}
        for name, own in (('bos', self.model.bos_id()), ('eos', self.model.eos_id()), ('pad', self.model.pad_id()),
                          ('image', self.model.piece_to_id('<image>'))):
            missing = own < 0 or (name == 'image' and own == self.model.unk_id())
            self.special[name] = size if missing else own
            size += missing
        self.bos_id, self.eos_id = self.special['bos'], self.special['eos']
        self.pad_id, self.image_id = self.special['pad'], self.special['image']
        self.vocab_size = size
        # Where the file knows <image> as a symbol, it is spelled out when it comes as text: letter by letter or bytes.
        pieces = [(self.model.piece_to_id(chr(b)), self.model.piece_to_id(f'<0x{b:02X}>')) for b in b'<image>']
        self.spelled = [letter if letter != self.model.unk_id() else byte for letter, byte in pieces]

    def encode(self, text):
        return [j for i in self.model.encode(text) for j in (self.spelled if i == self.image_id else [i])]

    def decode(self, ids):
        hidden = set(self.special.values())
        return self.model.decode([i for i in ids if i not in hidden and i < self.model.vocab_size()])


class Tiktoken:
    """BPE ranks in tiktoken's text format; the file's name says how text is split: gpt2, r50k or p50k."""

    def __init__(self, path):
        import tiktoken
        import tiktoken_ext.openai_public as public
        self.files = (path,)
        name = os.path.basename(path)
        if not name.startswith(('gpt2', 'r50k', 'p50k')):
            raise ValueError(f'tokenizer {path!r}: how text is split before it is encoded is known for files whose '
                             'name begins with gpt2, r50k or p50k')
        with open(path, 'rb') as f:
            rows = [line.split() for line in f if line.strip()]
        try:
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
            if len(set(ranks.values())) != len(rows) or not all(bytes([i]) in ranks for i in range(256)):
                raise ValueError('a rank comes twice, or one of the 256 bytes has none')
        except ValueError as error:
            raise ValueError(f'tokenizer {path!r} is no list of "base64 rank" lines: {error}') from None
        self.model = tiktoken.Encoding(name, pat_str=public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
        size = max(ranks.values()) + 1
        self.eos_id = self.bos_id = size        # GPT-2 begins and ends a document with the same token
        self.pad_id, self.image_id, self.vocab_size = size + 1, size + 2, size + 3

    def encode(self, text):
        return self.model.encode_ordinary(text)

    def decode(self, ids):
        return self.model.decode([i for i in ids if i < self.eos_id], errors='replace')


def load(name):
    """The tokenizer of a file's name, or `bytes`. Raises ValueError or FileNotFoundError with what to do."""
    if name == 'bytes':
        return Bytes()
    kind = {'.model': SentencePiece, '.tiktoken': Tiktoken}.get(os.path.splitext(name)[1])
    if kind is None:
        raise ValueError(f'tokenizer={name!r} is of no known kind: give bytes, a .model file (sentencepiece) or a '
                         '.tiktoken file')
    if not os.path.isfile(name):
        raise FileNotFoundError(f'tokenizer={name!r} does not exist: make it with the data set (prepare/) or give '
                                'another path')
    return kind(name)
