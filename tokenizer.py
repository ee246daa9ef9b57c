"""Tokenizers behind one small interface: `encode`, `decode`, `vocab_size` and the ids of the special tokens.

`load(name)` takes `bytes` (no file), `x.model` (sentencepiece), `x.tiktoken` (BPE ranks), `tokenizer.json` (Hugging
Face), `merges.txt` (CLIP's, beside its vocab.json) or a folder that holds one of them; nothing is downloaded. Every
tokenizer has `bos_id`, `eos_id`, `pad_id` and `image_id`, the token that marks where a picture goes; those a file lacks
get new ids after its own. Text never turns into one of them, nor into one of `specials` ({text: id}, what a
tokenizer.json flags as special, a sentencepiece model as control); <loc0001> and <seg001> of PaliGemma it does turn
into. `special('<start_of_turn>')` is the id of the token spelled so, or None; `names`: how a file spells bos_token,
eos_token ...; `files`: what was read. `mark_up` encodes what a chat template wrote, whose markers do become special
tokens.
"""
import base64
import json
import os
import re
from functools import cache
from itertools import takewhile

import numpy as np

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
          r'|\s+(?!\S)|\s')
UPPER, LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
O200K = '|'.join([rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                  rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                  r'\p{N}{1,3}', r' ?[^\s\p{L}\p{N}]+[\r\n/]*', r'\s*[\r\n]+', r'\s+(?!\S)', r'\s+'])
END = '<|endoftext|>'
BREAK = '\ufdd0'        # Unicode keeps it out of texts; it stands in what looks like a marker but is a user's
PLACES = re.compile(r'<loc\d{4}>|<seg\d{3}>')      # of PaliGemma: boxes and masks, which answers write as text
# A .tiktoken file's name begins so -> how text is split, least number of ranks of the real file, its special tokens.
# From tiktoken_ext/openai_public.py, whose functions would download the ranks.
ENCODINGS = {
    'gpt2': (GPT2, 50256, {END: 50256}), 'r50k': (GPT2, 50256, {END: 50256}), 'p50k': (GPT2, 50256, {END: 50256}),
    'cl100k': (CL100K, 100256, {END: 100257, '<|fim_prefix|>': 100258, '<|fim_middle|>': 100259,
                                '<|fim_suffix|>': 100260, '<|endofprompt|>': 100276}),
    'o200k': (O200K, 199998, {END: 199999, '<|endofprompt|>': 200018})}

# A role in tokenizer_config.json -> how tokenizers without that file spell the token, the likeliest first.
ROLES = {'bos_token': ('<s>', '<bos>', '<|begin_of_text|>', '<|startoftext|>', '[CLS]'),
         'eos_token': ('</s>', '<eos>', END, '<|end_of_text|>', '<|im_end|>', '[SEP]'),
         'pad_token': ('<pad>', '[PAD]', '<|pad|>'),
         'image_token': ('<image>', '<image_soft_token>', '<|image_pad|>', '<|image|>')}


def complete(own, size):
    """Ids, with a new one from `size` on for each None, and the size after them."""
    ids = []
    for i in own:
        ids.append(size if i is None else i)
        size += i is None
    return ids, size


def spell(text, piece_id):
    """Ids of a text's letters, or of their bytes. piece_id: piece -> id or None."""
    ids = [[piece_id(c)] if piece_id(c) is not None else [piece_id(f'<0x{b:02X}>') for b in c.encode()] for c in text]
    return [i for letter in ids for i in letter if i is not None]


def char_spans(text, lengths):
    """Lengths in bytes of the tokens of a text -> where they begin and end in it, counted in characters."""
    char = np.cumsum([byte & 0xC0 != 0x80 for byte in text.encode()])           # of each byte, counted from 1
    ends = np.cumsum(lengths, dtype=int)
    return (char[ends - lengths] - 1).tolist(), char[ends - 1].tolist()


class Bytes:
    """UTF-8 bytes: ids 0 to 255, then the special tokens."""
    files, specials, names = (), {}, {}

    def __init__(self):
        self.bos_id, self.eos_id, self.pad_id, self.image_id, self.vocab_size = 256, 257, 258, 259, 260

    def encode(self, text):
        return list(text.encode('utf-8'))

    def offsets(self, text):
        """(ids, begins, ends): `encode` and where in the text each token comes from."""
        ids = self.encode(text)
        return ids, *char_spans(text, np.ones(len(ids), int))

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode('utf-8', errors='replace')

    def special(self, text):
        return None


class SentencePiece:
    """A sentencepiece model file, as Gemma, PaliGemma and Llama 2 have."""

    def __init__(self, path):
        import sentencepiece
        self.files = (path,)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (OSError, RuntimeError) as error:
            raise ValueError(f'tokenizer {path!r} is not a sentencepiece model: {error}') from None
        self.size = self.model.vocab_size()
        own = [i if i >= 0 else None for i in (self.model.bos_id(), self.model.eos_id(), self.model.pad_id())]
        ids, self.vocab_size = complete([*own, self.piece_id('<image>')], self.size)
        self.bos_id, self.eos_id, self.pad_id, self.image_id = ids
        # Where the file knows <image> as a "user defined symbol", text turns into it: it is spelled out instead.
        self.spelled = {i: spell(self.model.id_to_piece(i), self.piece_id) for i in ids if i < self.size}
        self.specials = {self.model.id_to_piece(i): i for i in range(self.size) if self.model.is_control(i)}
        self.specials |= {self.model.id_to_piece(i): i for i in self.spelled}
        self.names = {role: self.model.id_to_piece(i) for role, i in zip(ROLES, ids) if i < self.size}

    def piece_id(self, piece):
        i = self.model.piece_to_id(piece)
        return None if i == self.model.unk_id() else i

    def encode(self, text):
        return [j for i in self.model.encode(text) for j in self.spelled.get(i, [i])]

    def offsets(self, text):
        char = np.cumsum([0] + [byte & 0xC0 != 0x80 for byte in text.encode()]).tolist()
        rows, end = [], len(text.encode())
        for piece in reversed(self.model.encode(text, return_type='proto').pieces):
            end = piece.end if piece.end > piece.begin else end     # all but the last byte of a letter are empty
            rows += [(i, char[piece.begin], char[end]) for i in self.spelled.get(piece.id, [piece.id])[::-1]]
        return tuple(map(list, zip(*rows[::-1]))) or ([], [], [])

    def decode(self, ids):
        return self.model.decode([i for i in ids if i not in self.spelled and i < self.size])

    def special(self, text):
        # The library tells control symbols but not user defined ones, so they are looked up in the model's protobuf:
        # a piece is field 1 its text, 2 its score, 3 its type, where 4 is USER_DEFINED (sentencepiece_model.proto).
        i, raw = self.piece_id(text), text.encode()
        row = re.escape(b'\n' + bytes([min(len(raw), 255)]) + raw) + b'(\x15.{4})?\x18\x04'
        known = i is not None and (self.model.is_control(i)
                                   or re.search(row, self.model.serialized_model_proto(), re.DOTALL))
        return i if known else None


class Tiktoken:
    """BPE ranks in tiktoken's text format; the file's name says how text is split: see ENCODINGS."""

    def __init__(self, path):
        import tiktoken
        self.files = (path,)
        name = os.path.basename(path)
        known = next((ENCODINGS[key] for key in ENCODINGS if name.startswith(key)), None)
        if known is None:
            raise ValueError(f'tokenizer {path!r}: how text is split before it is encoded is known for files whose '
                             f'name begins with {", ".join(ENCODINGS)}')
        pattern, real, self.specials = known
        with open(path, 'rb') as f:
            rows = [line.split() for line in f if line.strip()]
        try:
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
            self.known = set(ranks.values())
            if len(self.known) != len(rows) or not all(bytes([i]) in ranks for i in range(256)):
                raise ValueError('a rank comes twice, or one of the 256 bytes has none')
            self.model = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        except (ValueError, OverflowError) as error:
            raise ValueError(f'tokenizer {path!r} is no list of "base64 rank" lines: {error}') from None
        size = max(self.known) + 1
        if size < real or not self.known.isdisjoint(self.specials.values()):
            self.specials = {END: size}         # not the real ranks: made for a test, or extended
        self.eos_id = self.bos_id = self.specials[END]      # GPT-2 begins and ends a document with the same token
        self.pad_id = max(size, *(i + 1 for i in self.specials.values()))
        self.image_id, self.vocab_size = self.pad_id + 1, self.pad_id + 2
        self.names = dict.fromkeys(('bos_token', 'eos_token'), END)

    def encode(self, text):
        limit = 900_000     # the library's split fails, not by an Exception, on runs of a million spaces
        if len(text) > limit and any(run.end() - run.start() > limit for run in re.finditer(r'\s+', text)):
            raise ValueError(f'a text has more than {limit} spaces or line ends in a row, which tiktoken cannot split')
        return self.model.encode_ordinary(text)

    def offsets(self, text):
        ids = self.encode(text)
        return ids, *char_spans(text, np.array([len(self.model.decode_single_token_bytes(i)) for i in ids], int))

    def decode(self, ids):
        return self.model.decode([i for i in ids if i in self.known], errors='replace')

    def special(self, text):
        return self.specials.get(text)


def read_json(path, limit=64 << 20):
    """The object in a .json file of strangers, of `limit` bytes at most. Raises ValueError with the path."""
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read(limit + 1)
        settings = json.loads(text) if len(text) <= limit else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path!r} can not be read as JSON: {error}') from None
    if not isinstance(settings, dict):
        raise ValueError(f'{path!r} {"is no JSON object" if len(text) <= limit else f"is larger than {limit} bytes"}')
    return settings


def named_tokens(path):
    """{role: text} of a tokenizer_config.json or special_tokens_map.json."""
    settings = read_json(path)
    try:
        named = {role: settings[role] for role in ROLES if settings.get(role)}
        return {role: '' + (token['content'] if isinstance(token, dict) else token) for role, token in named.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f'{path!r} does not say which tokens are special: {error!r}') from None


def clip(path):
    """CLIP's tokenizer (arXiv 2103.00020) of a merges.txt and the vocab.json beside it, as transformers has it: lower
    case, any spaces are one, and a word's last letter is another than the same inside it. Raises ValueError."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    try:
        bpe = models.BPE.from_file(os.path.join(os.path.dirname(path), 'vocab.json'), path, unk_token=END,
                                   end_of_word_suffix='</w>')
    except Exception as error:                  # the library raises no narrower one
        raise ValueError(f'tokenizer {path!r} and the vocab.json beside it can not be read: {error}') from None
    if bpe.token_to_id('<|startoftext|>') is None:
        raise ValueError(f'tokenizer {path!r} is not CLIP\'s: of others the tokenizer.json is read')
    model = Tokenizer(bpe)
    model.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r'\s+'), ' '), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), 'removed', invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.add_special_tokens(['<|startoftext|>', END])
    return model


def clip_row(tokenizer, text, length=77):
    """Ids of a text as CLIP reads it: bos, at most length - 2 tokens, eos, padding."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text)[:length - 2], tokenizer.eos_id]
    return ids + [tokenizer.pad_id] * (length - len(ids))


class HuggingFace:
    """A tokenizer.json of the tokenizers library, or CLIP's merges.txt; the files beside it say which tokens are bos,
    eos, pad and image."""

    def __init__(self, path):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f'tokenizer {path!r} needs a package that is not here: pip install tokenizers') from None
        is_clip = path.endswith('.txt')
        try:
            self.model = clip(path) if is_clip else tokenizers.Tokenizer.from_file(path)
        except ValueError:
            raise
        except Exception as error:              # the library raises no narrower one
            raise ValueError(f'tokenizer {path!r} is not a tokenizer.json: {error}') from None
        found = self.model.get_added_tokens_decoder().values()
        if any(token.special and PLACES.fullmatch(token.content) for token in found):
            self.model.add_tokens([tokenizers.AddedToken(token.content, normalized=token.normalized, special=False)
                                   for token in found if PLACES.fullmatch(token.content)])
            self.model = tokenizers.Tokenizer.from_str(self.model.to_str())     # only then does it heed the new flags
        beside = [os.path.join(os.path.dirname(path), n) for n in ('tokenizer_config.json', 'special_tokens_map.json')]
        beside = [*filter(os.path.isfile, beside)]
        self.files = (path, *beside, *[os.path.join(os.path.dirname(path), 'vocab.json')] * is_clip)
        named = {'pad_token': END} if is_clip else {}
        for file in beside[::-1]:               # tokenizer_config.json has the last word
            named |= named_tokens(file)
        added = {token.content: i for i, token in self.model.get_added_tokens_decoder().items()}
        own = {role: self.model.token_to_id(named[role]) if role in named else
               next((added[text] for text in usual if text in added), None) for role, usual in ROLES.items()}
        self.names = {role: self.model.id_to_token(i) for role, i in own.items() if i is not None}
        if own['bos_token'] is None:
            own['bos_token'] = own['eos_token']             # as GPT-2 has it
        self.model.add_special_tokens([self.model.id_to_token(i) for i in own.values() if i is not None])
        self.model.encode_special_tokens = True             # text that looks like a special token is text
        self.model.no_padding()
        self.model.no_truncation()
        if getattr(self.model.model, 'dropout', None):      # random merges, for BPE alone
            self.model.model.dropout = None
        size = max(self.model.get_vocab().values(), default=-1) + 1
        ids, self.vocab_size = complete(own.values(), size)
        self.bos_id, self.eos_id, self.pad_id, self.image_id = ids
        added = self.model.get_added_tokens_decoder()
        self.added = {token.content: i for i, token in added.items()}
        # A model that has special tokens among its pieces may still find them in text: they are spelled out, except
        # the one that stands for what is unknown.
        try:
            unknown = {token.id for token in self.model.model.tokenize('\U0010ffff')}
        except Exception:                       # it has none
            unknown = set()
        self.specials = {token.content: i for i, token in added.items() if token.special and i not in unknown}
        self.spelled = {i: spell(text, self.model.token_to_id) for text, i in self.specials.items()}
        try:            # what the file says to write before a text, as most of Llama's say bos
            self.opening = list(takewhile(added.__contains__, self.model.encode('a').ids))
        except Exception:                       # a post-processor that the library can not run
            self.opening = []
        self.model.add_special_tokens([BREAK])              # found by `offsets` alone, which leaves it out
        self.break_id = self.model.token_to_id(BREAK)

    def __reduce__(self):       # the library would forget encode_special_tokens on the way to another process
        return HuggingFace, self.files[:1]

    def encode(self, text):
        ids = self.model.encode(text, add_special_tokens=False).ids
        return ids if self.spelled.keys().isdisjoint(ids) else [j for i in ids for j in self.spelled.get(i, [i])]

    def offsets(self, text, special=False):
        """special: `specials` in the text are tokens, as the library has it."""
        self.model.encode_special_tokens = not special
        try:
            out = self.model.encode(text, add_special_tokens=False)
        finally:
            self.model.encode_special_tokens = True
        spelled = {self.break_id: []} if special else self.spelled
        rows = [(j, *span) for i, span in zip(out.ids, out.offsets) for j in spelled.get(i, [i])]
        return tuple(map(list, zip(*rows))) or ([], [], [])

    def decode(self, ids):
        return self.model.decode(ids, skip_special_tokens=True)     # nor those that it does not know

    def special(self, text):
        return self.added.get(text)


@cache
def any_of(texts):
    """A pattern that finds any of the texts, the longest first."""
    return re.compile('|'.join(map(re.escape, sorted(texts, key=lambda t: (-len(t), t)))) or '(?!)')


def mark_up(tokenizer, text, markers):
    """Text in which `markers` ({text: id}) become tokens -> (ids, begins, ends), where in the text each comes from.

    A tokenizer.json's own markers are left to the tokenizers library, so that ids are those that transformers gives
    for the whole text; text between other markers is encoded piece by piece. What BREAK stands in is no marker."""
    own = tokenizer.specials if isinstance(tokenizer, HuggingFace) else {}
    for joint in (own, {}):
        foreign = {t: i for t, i in markers.items() if t not in joint}
        cuts = any_of((*foreign,) if joint else (*foreign, BREAK))
        ids, begins, ends, at = [], [], [], 0
        for part in re.split(f'({cuts.pattern})', text):
            if part in foreign:
                new = [foreign[part]], [0], [len(part)]
            elif part in ('', BREAK):
                new = [], [], []
            else:
                new = tokenizer.offsets(part, True) if joint else tokenizer.offsets(part)
            ids += new[0]
            begins += [at + i for i in new[1]]
            ends += [at + i for i in new[2]]
            at += len(part)
        # A tokenizer that changes text first may make a special token of what did not look like one.
        known = set(markers.values())
        if not joint or sum(i in known for i in ids) == sum(1 for _ in any_of(tuple(markers)).finditer(text)):
            break
    return ids, begins, ends


def load(name):
    """The tokenizer of a file, of the one file in a folder, or `bytes`. Raises ValueError or FileNotFoundError with
    what to do."""
    if name == 'bytes':
        return Bytes()
    if os.path.isdir(name):
        found = sorted(f for f in os.listdir(name) if f.endswith(('.model', '.tiktoken')) or f in (
            'tokenizer.json', 'merges.txt'))
        chosen = [f for f in ('tokenizer.json', 'tokenizer.model') if f in found][:1] or found
        if len(chosen) != 1:
            raise ValueError(f'tokenizer={name!r} is a folder with {" and ".join(found) or "no file"} of the kinds '
                             'tokenizer.json, .model, .tiktoken, merges.txt: give the path of one file')
        name = os.path.join(name, chosen[0])
    kinds = {'.model': SentencePiece, '.tiktoken': Tiktoken, '.json': HuggingFace, 'merges.txt': HuggingFace}
    kind = next((kind for ending, kind in kinds.items() if name.endswith(ending)), None)
    if kind is None:
        raise ValueError(f'tokenizer={name!r} is of no known kind: give bytes, a .model file (sentencepiece), a '
                         '.tiktoken file, a tokenizer.json, a merges.txt or a folder that holds one')
    if not os.path.isfile(name):
        raise FileNotFoundError(f'tokenizer={name!r} does not exist: make it with the data set (prepare/) or give '
                                'another path')
    return kind(name)
