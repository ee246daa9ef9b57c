"""Tokenizers behind one small interface: `encode`, `decode`, `vocab_size`, ids of special tokens.

`load(name)` takes `bytes` (no file), `x.model` (sentencepiece), `x.tiktoken` (BPE ranks),
`tokenizer.json` (Hugging Face), `merges.txt` (CLIP's, beside its vocab.json) or a folder that
holds one of them; nothing is downloaded. Every tokenizer has `bos_id`, `eos_id`, `pad_id` and
`image_id`, the token that marks where a picture goes; those a file lacks get new ids after its
own. Text never turns into one of them, nor into one of `specials` ({text: id}, what a
tokenizer.json flags as special, a sentencepiece model as control); <loc0001> and <seg001> of
PaliGemma it does turn into. `special('<start_of_turn>')` is the id of the token spelled so, or
None; `names`: how a file spells bos_token, eos_token ...; `files`: what was read. `mark_up`
encodes what a chat template wrote, whose markers do become special tokens.
"""
import base64
import json
import os
import re
from functools import cache
from itertools import takewhile

import numpy as np

GPT2 = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
        r'|\s++$|\s+(?!\S)|\s')
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
          r'| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s')
UPPER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]'
LOWER = r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
O200K = '|'.join([
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r'\p{N}{1,3}', r' ?[^\s\p{L}\p{N}]+[\r\n/]*', r'\s*[\r\n]+', r'\s+(?!\S)', r'\s+'])
END = '<|endoftext|>'

# Stands in what looks like a marker but is a user's: Unicode keeps it out of texts.
BREAK = '\ufdd0'
# Of PaliGemma: boxes and masks, which answers write as text.
PLACES = re.compile(r'<loc\d{4}>|<seg\d{3}>')

# A .tiktoken file's name begins so -> how text is split, least number of ranks of the real file,
# its special tokens. From tiktoken_ext/openai_public.py, whose functions would download the ranks.
ENCODINGS = {
    'gpt2': (GPT2, 50256, {END: 50256}),
    'r50k': (GPT2, 50256, {END: 50256}),
    'p50k': (GPT2, 50256, {END: 50256}),
    'cl100k': (CL100K, 100256, {END: 100257, '<|fim_prefix|>': 100258, '<|fim_middle|>': 100259,
                                '<|fim_suffix|>': 100260, '<|endofprompt|>': 100276}),
    'o200k': (O200K, 199998, {END: 199999, '<|endofprompt|>': 200018})}

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

        # The library says -1 of a token that the file lacks.
        self.size = self.model.vocab_size()
        in_file = self.model.bos_id(), self.model.eos_id(), self.model.pad_id()
        own = [None if i < 0 else i for i in in_file]
        ids, self.vocab_size = complete([*own, self.piece_id('<image>')], self.size)
        self.bos_id, self.eos_id, self.pad_id, self.image_id = ids

        # Text turns into what the file knows as a "user defined symbol", which <image> or </s>
        # may be: it is spelled out instead.
        self.names, self.specials, self.spelled = {}, {}, {}
        for i in range(self.size):
            if self.model.is_control(i):
                self.specials[self.model.id_to_piece(i)] = i
        for role, i in zip(ROLES, ids):
            if i < self.size:
                text = self.model.id_to_piece(i)
                self.names[role] = text
                self.specials[text] = i
                self.spelled[i] = spell(text, self.piece_id)

    def piece_id(self, piece):
        i = self.model.piece_to_id(piece)
        return None if i == self.model.unk_id() else i

    def encode(self, text):
        return spell_out(self.model.encode(text), self.spelled)

    def offsets(self, text):
        letters = letters_before(text).tolist()
        pieces = self.model.encode(text, return_type='proto').pieces

        # A letter that is written as bytes: all but the last of them are empty, and end with it.
        # So from the last piece to the first.
        rows, end = [], len(text.encode())
        for piece in reversed(pieces):
            if piece.end > piece.begin:
                end = piece.end
            for i in reversed(self.spelled.get(piece.id, [piece.id])):
                rows.append((i, letters[piece.begin], letters[end]))
        return columns(rows[::-1])

    def decode(self, ids):
        # The library raises for ids past its own.
        return self.model.decode([i for i in ids if i not in self.spelled and i < self.size])

    def special(self, text):
        i = self.piece_id(text)
        if i is None or self.model.is_control(i):
            return i

        # The library does not tell user defined symbols, so they are looked up in the model's
        # protobuf: a piece is field 1 its text, 2 its score, 3 its type, where 4 is USER_DEFINED
        # (sentencepiece_model.proto).
        raw = text.encode()
        length = bytes([min(len(raw), 255)])
        row = re.escape(b'\n' + length + raw) + b'(\x15.{4})?\x18\x04'
        is_user_defined = re.search(row, self.model.serialized_model_proto(), re.DOTALL)
        return i if is_user_defined else None


class Tiktoken:
    """BPE ranks in tiktoken's text format; the file's name says how text is split: ENCODINGS."""

    def __init__(self, path):
        import tiktoken
        self.files = (path,)
        name = os.path.basename(path)
        known = next((ENCODINGS[key] for key in ENCODINGS if name.startswith(key)), None)
        if known is None:
            raise ValueError(f'tokenizer {path!r}: how text is split before it is encoded is '
                             f'known for files whose name begins with {", ".join(ENCODINGS)}')
        pattern, real_size, self.specials = known

        try:
            ranks = read_ranks(path)
            self.model = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        except (ValueError, OverflowError) as error:
            raise ValueError(f'tokenizer {path!r} is no list of "base64 rank" lines: '
                             f'{error}') from None

        # Not the real ranks but some made for a test, or extended: the real ids would not do.
        self.known = set(ranks.values())
        size = max(self.known) + 1
        if size < real_size or not self.known.isdisjoint(self.specials.values()):
            self.specials = {END: size}

        # GPT-2 begins and ends a document with the same token.
        self.eos_id = self.bos_id = self.specials[END]
        self.names = dict.fromkeys(('bos_token', 'eos_token'), END)
        self.pad_id = max(size, max(self.specials.values()) + 1)
        self.image_id, self.vocab_size = self.pad_id + 1, self.pad_id + 2

    def encode(self, text):
        # The library's split fails, not by an Exception, on runs of a million spaces.
        limit = 900_000
        if len(text) > limit:
            for run in re.finditer(r'\s+', text):
                if run.end() - run.start() > limit:
                    raise ValueError(f'a text has more than {limit} spaces or line ends in a row, '
                                     'which tiktoken cannot split')
        return self.model.encode_ordinary(text)

    def offsets(self, text):
        ids = self.encode(text)
        lengths = [len(self.model.decode_single_token_bytes(i)) for i in ids]
        return ids, *char_spans(text, np.array(lengths, int))

    def decode(self, ids):
        # The library raises for ids without a rank; a cut in the middle of a letter is no error.
        return self.model.decode([i for i in ids if i in self.known], errors='replace')

    def special(self, text):
        return self.specials.get(text)


def read_ranks(path):
    """{bytes: rank} of a .tiktoken file. Raises ValueError."""
    with open(path, 'rb') as f:
        rows = [line.split() for line in f if line.strip()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}

    # Without one of the bytes there are texts that could not be encoded.
    has_all_bytes = all(bytes([byte]) in ranks for byte in range(256))
    if len(set(ranks.values())) != len(rows) or not has_all_bytes:
        raise ValueError('a rank comes twice, or one of the 256 bytes has none')
    return ranks


class HuggingFace:
    """A tokenizer.json of the tokenizers library, or CLIP's merges.txt; the files beside it say
    which tokens are bos, eos, pad and image."""

    def __init__(self, path):
        is_clip = path.endswith('.txt')
        self.model = model = open_model(path, is_clip)

        # CLIP pads with its end. The file that is read last, tokenizer_config.json, has the last
        # word, and is the first of `files`.
        folder = os.path.dirname(path)
        named = {'pad_token': END} if is_clip else {}
        beside = []
        for name in ('special_tokens_map.json', 'tokenizer_config.json'):
            file = os.path.join(folder, name)
            if os.path.isfile(file):
                named |= named_tokens(file)
                beside.insert(0, file)
        self.files = (path, *beside)
        if is_clip:
            self.files += (os.path.join(folder, 'vocab.json'),)

        own = role_ids(model, named)
        in_file = {role: i for role, i in own.items() if i is not None}
        self.names = {role: model.id_to_token(i) for role, i in in_file.items()}
        model.add_special_tokens([*self.names.values()])

        # What else a tokenizer.json may say is not for training: text that looks like a special
        # token is text, rows are filled and cut elsewhere, and BPE's merges are not random.
        model.encode_special_tokens = True
        model.no_padding()
        model.no_truncation()
        if getattr(model.model, 'dropout', None):
            model.model.dropout = None

        # GPT-2 begins and ends a document with the same token.
        if own['bos_token'] is None:
            own['bos_token'] = own['eos_token']
        size = max(model.get_vocab().values(), default=-1) + 1
        ids, self.vocab_size = complete(own.values(), size)
        self.bos_id, self.eos_id, self.pad_id, self.image_id = ids

        # A model that has special tokens among its pieces may still find them in text: they are
        # spelled out, except the one that stands for what is unknown.
        unknown = unknown_ids(model)
        self.added, self.specials, self.spelled = {}, {}, {}
        for i, token in model.get_added_tokens_decoder().items():
            self.added[token.content] = i
            if token.special and i not in unknown:
                self.specials[token.content] = i
                self.spelled[i] = spell(token.content, model.token_to_id)
        self.opening = opening_ids(model)

        # Found by `offsets` alone, which leaves it out. After all else: it is not in the file.
        model.add_special_tokens([BREAK])
        self.break_id = model.token_to_id(BREAK)

    def __reduce__(self):
        # The library would forget encode_special_tokens on the way to another process.
        return HuggingFace, self.files[:1]

    def encode(self, text):
        return spell_out(self.model.encode(text, add_special_tokens=False).ids, self.spelled)

    def offsets(self, text, special=False):
        """special: `specials` in the text are tokens, as the library has it."""
        self.model.encode_special_tokens = not special
        try:
            encoding = self.model.encode(text, add_special_tokens=False)
        finally:
            self.model.encode_special_tokens = True

        rows = []
        spelled = {self.break_id: []} if special else self.spelled
        for i, (begin, end) in zip(encoding.ids, encoding.offsets):
            for j in spelled.get(i, [i]):
                rows.append((j, begin, end))
        return columns(rows)

    def decode(self, ids):
        # The library leaves out the special tokens and those that it does not know.
        return self.model.decode(ids, skip_special_tokens=True)

    def special(self, text):
        return self.added.get(text)


def open_model(path, is_clip):
    """The tokenizers.Tokenizer of a file. Raises ValueError."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f'tokenizer {path!r} needs a package that is not here: '
                         'pip install tokenizers') from None
    if is_clip:
        return clip(path)

    # The library raises nothing narrower than Exception.
    try:
        model = tokenizers.Tokenizer.from_file(path)
    except Exception as error:
        raise ValueError(f'tokenizer {path!r} is not a tokenizer.json: {error}') from None

    # Some files flag boxes and masks as special, so that no text would turn into them.
    added = model.get_added_tokens_decoder().values()
    places = [token for token in added if PLACES.fullmatch(token.content)]
    if not any(token.special for token in places):
        return model
    texts = []
    for token in places:
        text = tokenizers.AddedToken(token.content, normalized=token.normalized, special=False)
        texts.append(text)
    # Only a new one heeds the new flags.
    model.add_tokens(texts)
    return tokenizers.Tokenizer.from_str(model.to_str())


def clip(path):
    """CLIP's tokenizer (arXiv 2103.00020) of a merges.txt and the vocab.json beside it, as
    transformers has it: lower case, any spaces are one, and a word's last letter is another than
    the same inside it. Raises ValueError."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    words = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
             r'|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+')

    # The library raises nothing narrower than Exception.
    vocab = os.path.join(os.path.dirname(path), 'vocab.json')
    try:
        bpe = models.BPE.from_file(vocab, path, unk_token=END, end_of_word_suffix='</w>')
    except Exception as error:
        raise ValueError(f'tokenizer {path!r} and the vocab.json beside it can not be read: '
                         f'{error}') from None
    if bpe.token_to_id('<|startoftext|>') is None:
        raise ValueError(f'tokenizer {path!r} is not CLIP\'s: of others the tokenizer.json is '
                         'read')

    model = Tokenizer(bpe)
    model.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r'\s+'), ' '), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), 'removed', invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.add_special_tokens(['<|startoftext|>', END])
    return model


def clip_row(tokenizer, text, length=77):
    """Ids of a text as CLIP reads it: bos, at most length - 2 tokens, eos, padding."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text)[:length - 2], tokenizer.eos_id]
    return ids + [tokenizer.pad_id] * (length - len(ids))


def named_tokens(path):
    """{role: text} of a tokenizer_config.json or special_tokens_map.json."""
    settings = read_json(path)
    named = {}
    for role in ROLES:
        token = settings.get(role)
        # transformers writes a token as its text, or as an AddedToken with its flags.
        text = token.get('content') if isinstance(token, dict) else token
        if token and not isinstance(text, str):
            raise ValueError(f'{path!r} does not say which tokens are special: {role!r} is '
                             f'{token!r}')
        if token:
            named[role] = text
    return named


def role_ids(model, named):
    """{role: id or None} of the tokens that `named` spells, or else of the usual spellings."""
    added = {token.content: i for i, token in model.get_added_tokens_decoder().items()}
    ids = {}
    for role, spellings in ROLES.items():
        if role in named:
            ids[role] = model.token_to_id(named[role])
        else:
            ids[role] = next((added[text] for text in spellings if text in added), None)
    return ids


def unknown_ids(model):
    """Ids of what stands for letters that the vocabulary lacks."""
    # The last of Unicode, which is no letter. A model without such a token raises.
    try:
        return {token.id for token in model.model.tokenize('\U0010ffff')}
    except Exception:
        return set()


def opening_ids(model):
    """Special tokens that the file says to write before a text, as most of Llama's say bos."""
    # Some files have a post-processor that the library can not run.
    try:
        ids = model.encode('a').ids
    except Exception:
        return []
    return list(takewhile(model.get_added_tokens_decoder().__contains__, ids))


@cache
def any_of(texts):
    """A pattern that finds any of the texts, the longest first."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    # Of no texts it finds nothing, where an empty pattern would find everything.
    return re.compile('|'.join(map(re.escape, longest_first)) or '(?!)')


def mark_up(tokenizer, text, markers):
    """Text in which `markers` ({text: id}) become tokens -> (ids, begins, ends), where in the text
    each comes from. What BREAK stands in is no marker."""
    # A tokenizer.json's own markers are left to the tokenizers library, so that ids are those
    # that transformers gives for the whole text.
    if isinstance(tokenizer, HuggingFace) and tokenizer.specials:
        foreign = {t: i for t, i in markers.items() if t not in tokenizer.specials}
        cuts = any_of(tuple(foreign))
        rows = mark_up_between(text, foreign, cuts, lambda part: tokenizer.offsets(part, True))

        # A tokenizer that changes text first may make a special token of what did not look like
        # one: then not like this.
        known = set(markers.values())
        count = sum(i in known for i in rows[0])
        if count == len(any_of(tuple(markers)).findall(text)):
            return rows

    cuts = any_of((*markers, BREAK))
    return mark_up_between(text, markers, cuts, tokenizer.offsets)


def mark_up_between(text, markers, cuts, offsets):
    """`mark_up`, where text between `cuts` (a pattern) is encoded piece by piece, by `offsets`."""
    ids, begins, ends, at = [], [], [], 0
    for part in re.split(f'({cuts.pattern})', text):
        if part in markers:
            ids.append(markers[part])
            begins.append(at)
            ends.append(at + len(part))
        elif part not in ('', BREAK):
            part_ids, part_begins, part_ends = offsets(part)
            ids += part_ids
            begins += [at + i for i in part_begins]
            ends += [at + i for i in part_ends]
        at += len(part)
    return ids, begins, ends


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

    # CLIP's merges are read by the tokenizers library, too.
    if name.endswith('.model'):
        kind = SentencePiece
    elif name.endswith('.tiktoken'):
        kind = Tiktoken
    elif name.endswith(('.json', 'merges.txt')):
        kind = HuggingFace
    else:
        raise ValueError(f'tokenizer={name!r} is of no known kind: give bytes, a .model file '
                         '(sentencepiece), a .tiktoken file, a tokenizer.json, a merges.txt or a '
                         'folder that holds one')
    if not os.path.isfile(name):
        raise FileNotFoundError(f'tokenizer={name!r} does not exist: make it with the data set '
                                '(prepare/) or give another path')
    return kind(name)
