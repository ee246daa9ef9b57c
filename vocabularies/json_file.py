"""tokenizer.json of the tokenizers library, and CLIP's merges.txt (top of tokenizer.py)."""
import os
import re
from itertools import takewhile

from tokenizer import BREAK, END, ROLES, columns, complete, read_json, spell, spell_out
from vocabularies.clip import open_merges

# Of PaliGemma: boxes and masks, which answers write as text.
PLACES = re.compile(r'<loc\d{4}>|<seg\d{3}>')


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
        return open_merges(path)

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
