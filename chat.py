"""Conversations: chat templates, what of their text becomes special tokens, what of it is learned.

A chat template comes with a model (`read_template`) or with a form (CHATS); template.py runs it.
"""
import os
import re
from importlib.util import find_spec

import numpy as np

import template
from processor import LEARNED, READ, document, is_document, question
from shards import BadSample
from template import MARK
from tokenizer import BREAK, read_json
from vocabularies.markers import any_of, mark_up

# Chat templates of forms. Those whose content is text get a picture as its token and a newline.
# 'chat' is ChatML, as SmolLM2 and Qwen have it.
CHATS = {
    'chat': '''
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}''',
    'gemma': '''{{ bos_token }}
{%- set system = namespace(text='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}{% set system.text = message.content + '\\n\\n' %}
{%- else %}{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' }}
{{- system.text }}
{{- message.content | trim + '<end_of_turn>\\n' }}{% set system.text = '' %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}''',
    'llava': '''
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ 'ASSISTANT: ' + message.content + eos_token }}
{%- else %}{{ ('USER: ' if message.role == 'user' else '') + message.content + ' ' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}''',
    'smolvlm': '''<|im_start|>
{%- for message in messages %}{{ message.role | capitalize }}
{{- ':' if message.content and message.content[0].type == 'image' else ': ' }}
{%- for item in message.content %}{{ '<image>' if item.type == 'image' else item.text }}
{%- endfor %}
{{- '<end_of_utterance>\\n' }}{% endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}''',
}
CHATS['idefics3'] = CHATS['smolvlm']

# What these forms write before and after a picture.
AROUND = dict.fromkeys(
    ('smolvlm', 'idefics3'),
    ('<fake_token_around_image><global-img>', '<fake_token_around_image>'))

# What a template writes that may be a token.
MARKER = re.compile(r'<[^<>\s]+>|\[/?[A-Z_]+\]')


def read_template(folder):
    """The chat template of a model folder, or ''. Raises ValueError."""
    path = os.path.join(folder, 'chat_template.jinja')
    if os.path.isfile(path):
        with open(path, encoding='utf-8') as f:
            try:
                # One more than is allowed, so that it is refused and not cut.
                return f.read(template.MAX_SOURCE + 1)
            except UnicodeDecodeError:
                raise ValueError(f'{path!r} is not UTF-8') from None

    for name in ('chat_template.json', 'tokenizer_config.json'):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        source = read_json(path).get('chat_template')

        # There may be several, by name. A list without a default one is refused, as 0.
        if isinstance(source, list):
            named = [x for x in source if isinstance(x, dict) and x.get('name') == 'default']
            source = named[0].get('template') if named else 0
        if not isinstance(source, str | None):
            raise ValueError(f'{path!r}: chat_template is neither text nor a list with a '
                             '"default" of text')
        if source:
            return source
    return ''


def read_messages(messages, pictures):
    """[{role, content}, ...] -> [(role, [text or None for a picture, ...]), ...]. Content is text
    or a list of {type: text, text: ...} and {type: image}; `pictures` that no message places stand
    at the start of the first user's turn. Raises ValueError."""
    turns = []
    try:
        for message in messages:
            turns.append((message['role'], read_content(message['content'])))
            if message['role'] not in ('system', 'user', 'assistant'):
                raise TypeError
    except (KeyError, TypeError):
        raise ValueError('messages: expected [{"role": "system|user|assistant", "content": '
                         '"..."}, ...]') from None
    if not any(role == 'assistant' for role, _ in turns):
        raise ValueError('messages hold no answer')

    # Some data sets name a sample's pictures beside its messages, and place them nowhere.
    places_pictures = any(None in items for _, items in turns)
    if not places_pictures:
        users = [items for role, items in turns if role == 'user']
        if users:
            users[0][:0] = [None] * pictures
    return turns


def read_content(content):
    """A message's content -> [text or None for a picture, ...]. Raises KeyError or TypeError."""
    if isinstance(content, str):
        return [content]
    items = [None if item['type'] == 'image' else item['text'] for item in content]
    if not all(isinstance(item, str | None) for item in items):
        raise TypeError
    return items


class Chat:
    """A chat template, the form's or `source` (found at `where`), together with a tokenizer.

    What a template writes becomes special tokens, what messages hold never does, even if it reads
    `<|im_end|>`; here we differ from transformers on purpose (it has sanitize_control_tokens).
    Answers may hold tokens that a tokenizer.json does not flag as special, as <think>. `end`: what
    ends an answer ('': nothing that may be a token); `markers`: what becomes tokens, {text: id}.
    Raises ValueError where the template can not be used."""

    def __init__(self, form, tokenizer, source='', where=''):
        self.tokenizer = tokenizer
        self.where = where or f'processor={form!r}'
        self.names, markers = dict(tokenizer.names), dict(tokenizer.specials)

        # A form of ours serves tokenizers that lack its tokens.
        is_ours = not source
        if is_ours:
            source = CHATS[form]
            bos = self.names.setdefault('bos_token', '<bos>')
            eos = self.names.setdefault('eos_token', '<eos>')
            markers[bos] = tokenizer.bos_id
            markers[eos] = tokenizer.eos_id
        self.image = self.names.get('image_token', '<image>')
        self.around = AROUND.get(form, ('', ''))

        self.source, self.is_ours = source, is_ours
        if not find_spec('jinja2'):
            raise ValueError(f'{self.where} needs a package that is not here: pip install jinja2')

        # A template that asks for images gets content as lists of texts and images.
        self.lists = re.search(r'''['"]image['"]''', source) is not None
        for text in MARKER.findall(source + ''.join(self.around)):
            i = tokenizer.special(text)
            if i is not None:
                markers[text] = i
        self.markers = markers | {self.image: tokenizer.image_id}

        # Users' markers are broken. What ends an answer is known once the template has written
        # one, and until then all of them are.
        self.broken = self.broken_answers = any_of(tuple(self.markers))
        opening, self.end = self.ends_of_an_answer()
        broken = {*self.markers, self.end} - {''}
        self.broken = any_of(tuple(broken))

        # An answer may hold markers, but none that would end it or begin another.
        kept = {*tokenizer.specials, self.image, self.end}
        in_answers = [text for text in broken if text in kept or text in opening]
        self.broken_answers = any_of(tuple(in_answers))

        # A tokenizer without the token that ends a form's answers ends them with its own.
        if is_ours and self.end:
            self.markers.setdefault(self.end, tokenizer.eos_id)

    def ends_of_an_answer(self):
        """What the template writes before an answer, and the token after it."""
        asked = dict(role='user', content=self.content(['user']))
        answered = dict(role='assistant', content=self.content(['assistant']))
        head, _ = self.write([asked], asking=True)
        text, spans = self.write([asked, answered])
        unasked, _ = self.write([asked])

        # A template that writes nothing more when it is asked must begin the answer right there.
        opening = head[len(os.path.commonprefix([head, unasked])):]
        answer = text[len(head):].lstrip()
        follows = text.startswith(head) and (opening or answer.startswith('assistant'))
        if not spans and not follows:
            raise ValueError(f'{self.where}: with add_generation_prompt it does not write what '
                             'comes before an answer, so that what is to be learned is not known')

        # Where the template itself says what is learned, no end is looked for.
        if spans:
            return opening, ''
        known = re.compile(f'{any_of(tuple(self.markers)).pattern}|{MARKER.pattern}')
        end = known.search(text, max(text.rfind('assistant'), len(head)))
        return opening, end[0] if end else ''

    def content(self, items, role='user'):
        """[text or None for a picture, ...] -> content of a message as the template wants it."""
        broken = self.broken_answers if role == 'assistant' else self.broken
        written = []
        for item in items:
            if item is not None:
                item = re.sub(f'[{BREAK}{MARK}]', '', item)
                item = broken.sub(lambda marker: marker[0][0] + BREAK + marker[0][1:], item)
            written.append(item)

        # Two texts that only together read as a marker, also where the template trims them.
        for i in range(1, len(written)):
            before, after = written[i - 1], written[i]
            if before and after:
                joined, trimmed = before + after, before.rstrip() + after.lstrip()
                if broken.search(joined) or broken.search(trimmed):
                    written[i] = BREAK + after

        if not self.lists:
            return ''.join(self.image + '\n' if text is None else text for text in written)
        parts = []
        for text in written:
            parts.append({'type': 'image'} if text is None else {'type': 'text', 'text': text})
        return parts

    def write(self, messages, asking=False):
        """(text, [(begin, end) of what {% generation %} holds, ...]) of [{role, content}, ...];
        asking: up to where the next answer begins. Raises ValueError."""
        write = template.write if self.is_ours else template.apart.write
        try:
            text = write(self.source, messages, asking, self.names)

            # Where marks stand once they and those before them are gone.
            text = text.replace(self.image, self.image.join(self.around))
            marks = [found.start() - i for i, found in enumerate(re.finditer(MARK, text))]
            spans = list(zip(marks[::2], marks[1::2], strict=True))
            return text.replace(MARK, ''), spans
        # A template may raise anything.
        except Exception as error:
            raise ValueError(f'{self.where}: {error or type(error).__name__}') from None

    def render(self, messages, asking=False):
        """(text, [(begin, end) of what is learned, ...]) of [{role, content}, ...]. Raises
        ValueError."""
        text, spans = self.write(messages, asking)
        if asking:
            return text, []
        if spans:
            return text, spans

        # An answer goes from where the template would ask for it to the token that ends it.
        for i, message in enumerate(messages):
            if message['role'] != 'assistant':
                continue
            head, _ = self.write(messages[:i], asking=True)
            if self.end:
                end = text.find(self.end, len(head))
            else:
                end = len(self.write(messages[:i + 1])[0])
            if not text.startswith(head) or end < 0:
                raise ValueError(f'{self.where} does not write an answer as it asks for one')
            spans.append((len(head), end + len(self.end)))
        return text, spans

    def encode(self, turns, asking=False):
        """[(role, [text or None for a picture, ...]), ...] -> token ids int (T,), and which are
        learned, bool (T,). Raises ValueError."""
        messages = []
        for role, items in turns:
            messages.append(dict(role=role, content=self.content(items, role)))
        text, spans = self.render(messages, asking)

        # A token that reaches into an answer is of it.
        ids, begins, ends = np.array(mark_up(self.tokenizer, text, self.markers), int)
        learned = np.zeros(len(ids), bool)
        for begin, end in spans:
            learned |= (begins < end) & (ends > begin)
        return ids, learned


# -------------------------------------------------------------------------------------------------
# the form


def chat(sample, p):
    """A conversation: `messages` (see `read_messages`), or one question and its answer, as the
    chat template writes it. Answers alone are learned, with the token that ends them."""
    if is_document(sample):
        return document(sample, p)
    pictures, asking = sample['pictures'], sample.get('_asking', False)
    try:
        if 'messages' in sample:
            turns = read_messages(sample['messages'], len(pictures))
        else:
            prefix, suffix = question(sample, p)
            turns = [('user', [None] * len(pictures) + [prefix]), ('assistant', [suffix])]
        ids, learned = p.chat.encode(turns[:-1] if asking else turns, asking)
    except ValueError as error:
        raise BadSample(str(error)) from None

    is_picture = ids == p.tokenizer.image_id
    if is_picture.sum() != len(pictures):
        raise BadSample(f'its messages place {is_picture.sum()} pictures, there are '
                        f'{len(pictures)}')
    return chat_parts(ids, learned, is_picture, pictures, p)


def opening(p):
    """Ids that a conversation begins with: what a model folder's tokenizer says, or a bos."""
    if p.opens:
        return getattr(p.tokenizer, 'opening', [])
    if p.form == 'llava':
        return [p.tokenizer.bos_id]
    return []


def chat_parts(ids, learned, is_picture, pictures, p):
    """The ids of a conversation cut where learning begins or ends and around its pictures."""
    parts = []
    if ids[:1].tolist() != [p.tokenizer.bos_id]:
        parts.append((opening(p), READ))
    changes = np.diff(learned) | is_picture[1:] | is_picture[:-1]
    cuts = (np.flatnonzero(changes) + 1).tolist()
    left = iter(pictures)
    for a, b in zip([0, *cuts], [*cuts, len(ids)]):
        if is_picture[a]:
            parts.append((next(left), READ))
        else:
            parts.append((ids[a:b].tolist(), LEARNED if learned[a] else READ))
    return parts
