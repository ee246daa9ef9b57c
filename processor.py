"""A sample of a shard becomes pieces of rows (tokens, what is learned, who sees whom, pictures),
and pieces become a batch.

A form says how a sample is written as tokens. It is one plain function: it gets what the sample
holds (`fields`) and the Processor, and gives [(item, role), ...]. An item is text, a token id, a
list of ids, or a picture (encoded bytes, or an array); the role is
    SEEN    not learned, seen by everything in its SEEN stretch (the prefix of a prefix-LM)
    READ    not learned, causal
    LEARNED learned, causal
    HIDDEN  as SEEN, but nobody sees it (a camera that is missing)
    BESIDE  the item is a dict of arrays that go beside the row, not into it (actions, a box)
Every task has a form of its own; `processor = 'text'` in a config names one of FORMS, a folder the
form of the model in it (token ids and pixels are those of its processor in transformers),
`'mine.py:my_form'` a function of yours:

    def my_form(sample, p):
        pictures = [(picture, SEEN) for picture in sample['pictures']]
        prefix, suffix = question(sample, p)
        return [*pictures, (p.tokenizer.bos_id, SEEN), (prefix + '\\n', SEEN),
                (suffix, LEARNED), (p.tokenizer.eos_id, LEARNED)]

Axes: B rows of a batch, T tokens of a row, I pictures of a batch, A samples with arrays beside.
"""
import importlib
import json
import os
import runpy

import numpy as np

import tasks
from shards import BadSample

SEEN, READ, LEARNED, HIDDEN, BESIDE = range(5)
HERE = os.path.dirname(os.path.abspath(__file__))
ENDINGS = ('jpg', 'jpeg', 'png', 'webp')
# what else is read of a sample, but by a form of yours
MEMBERS = ('txt', 'json', 'tokens.npy', 'tokens.bin', 'lowdim.npy', 'lowdim.npz', 'latents.npy')

# -----------------------------------------------------------------------------------------------
# what a sample holds


# what `fields` and those who ask a model add to a sample: not of its .json
OURS = ('pictures', 'picture_names', 'members', 'data_set', '_asking', '_lowdim')


def is_read(ext):
    return ext in MEMBERS or ext.rpartition('.')[2] in ENDINGS


def fields(members, with_pictures=True):
    """{extension: bytes} -> the keys of .json, and text (.txt), members (all of them), pictures (a
    list of bytes, in the order of their names) and picture_names. Raises BadSample."""
    sample = {}
    if 'json' in members:
        try:
            sample = json.loads(members['json'].decode('utf-8-sig'))
            # fine in JSON alone: a tokenizer would raise, or read something else
            if b'\\ud' in members['json'].lower():
                json.dumps(sample, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadSample('.json holds half of a surrogate pair') from None
        except (ValueError, RecursionError) as error:
            raise BadSample(f'.json can not be read ({error})') from None
        if not isinstance(sample, dict):
            raise BadSample('.json is no object')
        sample = {key: value for key, value in sample.items() if key not in OURS}
    if 'txt' in members:
        try:
            sample['text'] = members['txt'].decode('utf-8-sig')         # Windows begins with a BOM
        except UnicodeDecodeError:
            raise BadSample('.txt is not UTF-8') from None
    if {'instruction', 'output'} <= sample.keys() and 'suffix' not in sample:
        # a common shape of instructions: what is done with what, and what comes out
        asked = [sample.pop('instruction'), sample.pop('input', '')]
        sample['prefix'] = '\n'.join(str(part) for part in asked if part)
        sample['suffix'] = sample.pop('output')
    for key in ('text', 'prefix', 'suffix', 'instruction'):
        if not isinstance(sample.get(key, ''), str):
            raise BadSample(f'.json: {key} is no text')
    messages = sample.get('messages', [])
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise BadSample('.json: messages: expected a list of {"role": ..., "content": ...}')

    pictures = []
    if with_pictures:
        for ext in members:
            name, _, ending = ext.rpartition('.')
            if ending in ENDINGS:
                pictures.append((name, ext))
    pictures.sort()
    sample['picture_names'] = [name for name, _ in pictures]
    sample['pictures'] = [members[ext] for _, ext in pictures]
    sample['members'] = members
    return sample


# -----------------------------------------------------------------------------------------------
# forms


def is_document(sample):
    """Is it a text and nothing else? Then all of it is learned, whatever the form."""
    asked = sample.keys() & {'prefix', 'suffix', 'messages', 'instruction'}
    return 'text' in sample and not sample['pictures'] and not asked


def document(sample, p):
    """bos, text, eos: all of it learned, cut into as many rows as it takes."""
    t = p.tokenizer
    if not sample['text'].strip():
        raise BadSample('its text is empty')
    return [(t.bos_id, READ), (sample['text'], LEARNED), (t.eos_id, LEARNED)]


def question(sample, p):
    """(prefix, suffix) of a sample: its own, or the run's prompt and the caption. Raises
    BadSample where nothing is there to answer."""
    # keys of another format are no answer
    said = sample.keys() & {'text', 'suffix', 'messages', 'instruction'}
    if not sample['pictures'] and not said:
        members = ', '.join(sorted(sample.get('members', ()))) or 'none'
        raise BadSample(f'neither text nor pictures among its members ({members})')
    prefix = sample.get('prefix', sample.get('instruction', p.prompt))
    answer = sample.get('suffix')
    if answer is None and 'prefix' not in sample:
        answer = sample.get('text', '')
    if answer is None:
        raise BadSample('no suffix: nothing to answer')
    if not answer.strip() and not sample.get('_asking'):
        from usage import nothing_to_learn
        raise BadSample(nothing_to_learn([key for key in sample if key not in OURS]))
    return prefix, answer.strip()


def text(sample, p):
    """bos, pictures, prefix | suffix, eos, all causal."""
    if is_document(sample):
        return document(sample, p)
    prefix, suffix = question(sample, p)
    pictures = [(picture, READ) for picture in sample['pictures']]
    return [(p.tokenizer.bos_id, READ), *pictures, (prefix, READ),
            (suffix, LEARNED), (p.tokenizer.eos_id, LEARNED)]


# form -> the task of which it is the form
FORMS = {'text': 'llm', 'paligemma': 'vlm'}
# those of chat.py, which is imported where one of them is asked for
CHAT_FORMS = ('chat', 'gemma', 'llava', 'smolvlm', 'idefics3')

# of a model folder, what a processor is made from: every checkpoint keeps them
FILES = ('preprocessor_config.json', 'processor_config.json', 'chat_template.jinja',
         'chat_template.json', 'tokenizer_config.json')


def is_folder(name):
    """Does `processor` name a model folder, not a form?"""
    return name not in ('auto', *FORMS, *CHAT_FORMS) and '.py:' not in name


def load_form(name, task):
    """The function of a form: the task's own (auto), another task's, or `file.py:function`."""
    if name in ('auto', *FORMS):
        return tasks.load(FORMS.get(name, task)).form
    if name in CHAT_FORMS:
        return importlib.import_module('chat').chat
    path, _, function = name.rpartition(':')
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        path = os.path.join(HERE, path)
    if not path.endswith('.py') or not os.path.isfile(path):
        known = ', '.join((*FORMS, *CHAT_FORMS))
        raise ValueError(f'processor={name!r}: expected one of {known}, a model folder, or '
                         'file.py:function')
    found = runpy.run_path(path).get(function)
    if not callable(found):
        raise ValueError(f'processor={name!r}: {path} has no function {function!r}')
    return found


# -----------------------------------------------------------------------------------------------
# samples to pieces: a piece is a stretch of one row


class Processor:
    """What turns a sample into pieces of rows.

    settings: the flat settings of the run, which forms may read (`p.settings['prompt']`); eyes: a
    pictures.Eyes, None leaves pictures out; image_tokens: how many tokens a picture takes (0: it
    has no place in the text). What a model folder says: template, a chat template instead of the
    form's, from `where`; opens: a conversation begins with what the tokenizer.json says a text
    does; text_rule: what SigLIP does to a caption. `end_id` ends an answer."""

    NUMBERS = 1 << 23           # of a run's tokens: so many for each position

    def __init__(self, settings, tokenizer, form='auto', eyes=None, image_tokens=0, template='',
                 where='', opens=False, text_rule=''):
        self.settings, self.tokenizer, self.eyes = settings, tokenizer, eyes
        self.image_tokens, self.text_rule = image_tokens, text_rule
        self.prompt, self.seq_len = settings.get('prompt', ''), settings['seq_len']
        # attention of tokenized sets stops at a document's end
        self.documents = settings.get('document_attention', True)
        # of an episode no more rows are read than a sample takes
        self.episode_rows = settings.get('action_steps', 0)
        self.known_ids = {}
        # where a model folder's own files are; empty for forms
        self.folder = settings['processor'] if is_folder(settings['processor']) else ''
        self.form, self.function = form, load_form(form, settings['task'])
        self.end_id = tokenizer.eos_id

        self.opens = opens
        if form in CHAT_FORMS:
            self.chat = importlib.import_module('chat').Chat(form, tokenizer, template, where)
            self.end_id = self.chat.markers.get(self.chat.end, self.end_id)

    def __getstate__(self):
        # a user's function lives in a module that this process has
        return {key: value for key, value in self.__dict__.items() if key != 'function'}

    def __setstate__(self, state):
        self.__dict__ = state
        self.function = load_form(state['form'], state['settings']['task'])

    def encode(self, item):
        """Token ids of an item of a form: text, an id, ids, or a picture (bytes or an array)."""
        if isinstance(item, list):
            return item
        if isinstance(item, bytes | np.ndarray):
            return [self.tokenizer.image_id] * self.image_tokens
        if not isinstance(item, str):
            return [int(item)]
        # the sentence of an episode comes with each of its steps
        if item not in self.known_ids:
            if len(self.known_ids) >= 4096:
                self.known_ids = {}
            try:
                self.known_ids[item] = self.tokenizer.encode(item)
            except ValueError as error:
                raise BadSample(str(error)) from None
        return self.known_ids[item]

    def pieces(self, members, rng=None, data_set=''):
        """{extension: bytes} -> pieces: dicts of tokens, targets, blocks, hidden (arrays of one
        length), pictures [uint8 (H, W, 3)], text, beside. One piece, or several of a text that is
        longer than a row. rng: a Random augments the pictures; data_set: of the mix, for the form.
        Raises BadSample."""
        for ext in ('tokens.npy', 'tokens.bin'):
            if ext in members:
                from npy import read_tokens
                try:
                    return self.cut(read_tokens(members[ext], ext))
                except ValueError as error:
                    raise BadSample(str(error)) from None
        return self.row(fields(members, self.eyes is not None) | dict(data_set=data_set), rng)

    def row(self, sample, rng=None):
        """What a sample holds, as `fields` gives it -> pieces."""
        ids, roles, pictures, beside = [], [], [], {}
        try:
            for item, role in self.function(sample, self):
                if role == BESIDE:
                    beside |= item
                    continue
                new = self.encode(item)
                ids += new
                roles += [role] * len(new)
                if isinstance(item, bytes):
                    pictures.append(self.eyes.pixels_of(item, sample, rng))
                elif isinstance(item, np.ndarray):
                    pictures.append(item)
            ids, roles = np.array(ids, np.int32), np.array(roles, np.uint8)
        except Exception as error:
            from yours import bad_sample
            keys = [key for key in sample if key not in OURS]
            raise bad_sample(error, keys, self.settings) from None
        if len(ids) > self.seq_len:
            # a text may be cut: of it everything but the first token is learned
            if not pictures and not beside and (roles[1:] == LEARNED).all():
                pieces = self.cut(ids)
                if len(pieces) > 100:
                    from usage import say_once
                    say_once('long', f'a text of {len(ids)} tokens becomes {len(pieces)} rows of '
                             f'seq_len={self.seq_len}, none of it is left out')
                return pieces
            raise BadSample(f'{len(ids)} tokens do not fit seq_len={self.seq_len}')

        targets = np.where(roles == LEARNED, ids, -100)[1:]
        piece = dict(tokens=ids, targets=np.append(targets, -100).astype(np.int32),
                     blocks=blocks_of(roles), text=answer_of(sample), pictures=pictures)
        if beside:
            piece['beside'] = beside
        if (roles == HIDDEN).any():
            piece['seen'] = roles != HIDDEN
        return [piece]

    def cut(self, ids):
        """A text of any length -> pieces of seq_len tokens at most; every token but the first is a
        target once."""
        t = self.tokenizer
        if ids.max(initial=0) >= t.vocab_size:
            raise BadSample(f'token {ids.max()} of a tokenizer with {t.vocab_size}: it was made '
                            'with another one')
        targets = np.append(ids[1:], -100)
        # a document does not foretell the next
        if t.eos_id != t.bos_id:
            targets[ids == t.eos_id] = -100
        out = []
        for a in range(0, max(len(ids) - 1, 1), self.seq_len):
            tokens = ids[a:a + self.seq_len]
            out.append(dict(tokens=tokens, targets=targets[a:a + self.seq_len], pictures=[],
                            text='', blocks=np.ones(len(tokens), np.uint8), begin=a))
        return out


def blocks_of(roles):
    """Who sees whom, as make_attn_mask has it: 0 joins the token before. A stretch that is seen
    begins a block, so that what is causal before it does not see it."""
    is_seen = (roles == SEEN) | (roles == HIDDEN)
    blocks = ~is_seen
    blocks[1:] |= is_seen[1:] & ~is_seen[:-1]
    return blocks.astype(np.uint8)


def answer_of(sample):
    """The text that a sample is to be answered with: of a conversation its first answer."""
    for message in sample.get('messages', ()):
        if message.get('role') == 'assistant' and isinstance(message.get('content'), str):
            return message['content'].strip()
    return sample.get('suffix', sample.get('text', '')).strip()


def build(settings, tokenizer, task, image_tokens):
    """The Processor of a run, from its flat settings; pixels are those of a model folder, if
    `processor` names one. Raises ValueError and OSError."""
    form = settings['processor']
    eyes = task.eyes(settings) if hasattr(task, 'eyes') else None
    if os.path.isdir(form):
        reader = tasks.family('processors')
        return reader.open_processor(settings, tokenizer, eyes, image_tokens)
    return Processor(settings, tokenizer, form, eyes, image_tokens)


# -----------------------------------------------------------------------------------------------
# pieces to a batch


def fill_rows(lengths, seq_len):
    """Pieces into as few rows as first-fit-decreasing finds: a list of lists of piece numbers,
    none of them cut."""
    rows, room = [], np.zeros(0, np.int64)
    for i in np.argsort(-np.asarray(lengths), kind='stable').tolist():
        fits = np.flatnonzero(room >= lengths[i])
        if len(fits):
            rows[fits[0]].append(i)
            room[fits[0]] -= lengths[i]
        else:
            rows.append([i])
            room = np.append(room, seq_len - lengths[i])
    return rows


def collate(pieces, p, pack=False, multiple=1, ready=()):
    """Pieces (None: a placeholder, an empty row) -> a batch, a dict of small arrays:

    tokens, targets int32, blocks uint8, segments int16 (B, T), left out if rows are just causal;
    parts int16 (B, T) or (B, 1), the data set of a target; positions (B,) in the run; pixels
    uint8 (I, H, W, 3) or as the form gave them, and pictures (B,), how many of them each row has;
    beside: a dict of arrays (A, ...), with `rows` and `positions` (A,); texts, one a row;
    num_tokens, num_targets; numbers (B, n): numbers[s] and a place in the row are the number in
    the run of a token of segment s. A batch of nothing but sequences of one type has `ids` (B, L)
    instead, of which sequences.py makes the rest on the device, and `cut`: does it need segments?

    pack: several pieces share a row, each a segment of its own. multiple: of how many rows B is
    one; empty ones fill up. ready: the first, [(sequences, data set, positions), ...]."""
    if ready and not pieces and len({(ids.dtype, ids.shape[1]) for ids, *_ in ready}) == 1:
        import sequences
        return sequences.collate(ready, p, multiple)

    # a row each, or as few rows as hold them
    rows = [[piece] if piece else [] for piece in pieces]
    if pack:
        pieces = [piece for piece in pieces if piece]
        rows = []
        for numbers in fill_rows([len(piece['tokens']) for piece in pieces], p.seq_len):
            rows.append([pieces[i] for i in numbers])

    num_ready = sum(len(ids) for ids, *_ in ready)
    most = max([1, *map(len, rows)])
    batch = empty_batch(num_ready + len(rows), p, pack, multiple, most)
    if ready:
        import sequences
        sequences.write(batch, ready, p)
    pixels, beside = [], []
    for i, row in enumerate(rows, num_ready):
        end = 0
        for number, piece in enumerate(row, 1):
            begin, end = end, end + len(piece['tokens'])
            write_piece(batch, i, slice(begin, end), number, piece, pack)
            pixels += piece['pictures']
            if 'beside' in piece:
                beside.append(piece['beside'] | dict(rows=np.int64(i),
                                                     positions=np.int64(piece['position'])))

    batch['num_tokens'] = int((batch['segments'] > 0).sum())
    batch['num_targets'] = int((batch['targets'] != -100).sum())
    if pixels:
        batch['pixels'] = np.stack(pixels)
    elif (batch['blocks'] == 1).all():
        del batch['blocks']
    if (batch['segments'] == 1).all():
        del batch['segments']
    if beside:
        batch['beside'] = {}
        for key in beside[0]:
            batch['beside'][key] = np.stack([arrays[key] for arrays in beside])
    return batch


def empty_batch(rows, p, pack, multiple, most):
    """The arrays of a batch of at least so many rows, without anything in them."""
    rows = -(-max(rows, 1) // multiple) * multiple
    shape = rows, p.seq_len
    return dict(tokens=np.full(shape, p.tokenizer.pad_id, np.int32),
                targets=np.full(shape, -100, np.int32), blocks=np.ones(shape, np.uint8),
                segments=np.zeros(shape, np.int16),
                parts=np.zeros(shape if pack else (rows, 1), np.int16),
                pictures=np.zeros(rows, np.int32), positions=np.zeros(rows, np.int64),
                numbers=np.zeros((rows, most), np.int64), texts=[''] * rows)


def write_piece(batch, i, span, number, piece, pack):
    """A piece into a span of row i, as segment `number`, counted from 1; 0 is padding."""
    for key in ('tokens', 'targets', 'blocks'):
        batch[key][i, span] = piece[key]
    batch['segments'][i, span] = number * piece.get('seen', 1)
    batch['parts'][i, span if pack else 0] = piece['part']
    batch['pictures'][i] += len(piece['pictures'])
    batch['positions'][i] = piece.get('position', 0)
    begin = piece.get('begin', 0) - span.start
    batch['numbers'][i, number - 1] = batch['positions'][i] * Processor.NUMBERS + begin
    batch['texts'][i] = piece['text']


# what a batch holds of each row
ROWS = ('ids', 'tokens', 'targets', 'blocks', 'segments', 'parts', 'pictures', 'texts',
        'positions', 'numbers')


def split(batch, size, p):
    """A batch in batches of `size` rows, each with its own pictures and arrays beside."""
    n = len(batch['parts'])
    if n <= size:
        return [batch]
    out, ends = [], np.concatenate([[0], np.cumsum(batch['pictures'])])
    for a in range(0, n, size):
        b = min(a + size, n)
        part = {key: batch[key][a:b] for key in ROWS if key in batch}
        if 'ids' in batch:
            part['cut'] = batch['cut']
            import sequences
            part['num_targets'] = sequences.count(part['ids'], p)[1]
        else:
            part['num_targets'] = int((part['targets'] != -100).sum())
        if ends[b] > ends[a]:
            part['pixels'] = batch['pixels'][ends[a]:ends[b]]
        if 'beside' in batch:
            rows = batch['beside']['rows']
            chosen = (rows >= a) & (rows < b)
            if chosen.any():
                part['beside'] = {key: value[chosen] for key, value in batch['beside'].items()}
                part['beside']['rows'] = part['beside']['rows'] - a
        out.append(part)
    return out


def to_device(batch, device, p):
    """A collated batch -> the tensors that models take: tokens, targets, num_targets (a number
    that the host knows, so that a GPU need not be asked) and, where they are needed, blocks,
    segments, pixels and beside."""
    import torch

    def moved(array):
        return torch.as_tensor(array).to(device, non_blocking=True)

    out = {key: moved(batch[key]).long() for key in ('tokens', 'targets', 'blocks', 'segments')
           if key in batch}
    if 'ids' in batch:
        import sequences
        tokens, targets, segments = sequences.rows_of(moved(batch['ids']), p)
        out.update(tokens=tokens, targets=targets)
        if batch['cut']:
            out['segments'] = segments
    out['num_targets'] = batch['num_targets']

    if 'pixels' in batch:
        # latents stay as they are
        if torch.as_tensor(batch['pixels']).is_floating_point():
            out['pixels'] = moved(batch['pixels']).float()
        else:
            out['pixels'] = p.eyes.to_tensor(batch['pixels'], device)
    if 'beside' in batch:
        out['beside'] = {key: moved(value) for key, value in batch['beside'].items()}
    return out
