"""Conversations: chat templates, what of their text becomes special tokens, and what of it is learned.

A chat template is jinja2 source that comes with a model (`read_template`) or with a form (CHATS). It runs in jinja2's
ImmutableSandboxedEnvironment, as in transformers, so that it can neither reach Python nor change what it is given. Its
length, the turns of its loops and what it writes are bounded; the memory that it takes is not.
"""
import json
import os
import re

import numpy as np

from tokenizer import BREAK, any_of, mark_up, read_json

# Chat templates of forms. Those whose content is text get a picture as its token and a newline.
CHATS = {
    'chat': '''
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}''',          # ChatML: SmolLM2, Qwen
    'gemma': '''{{ bos_token }}
{%- set system = namespace(text='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}{% set system.text = message.content + '\\n\\n' %}
{%- else %}{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' + system.text }}
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
{%- for item in message.content %}{{ '<image>' if item.type == 'image' else item.text }}{% endfor %}
{{- '<end_of_utterance>\\n' }}{% endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}''',
}
CHATS['idefics3'] = CHATS['smolvlm']
AROUND = dict.fromkeys(('smolvlm', 'idefics3'), ('<fake_token_around_image><global-img>', '<fake_token_around_image>'))
MARKER = re.compile(r'<[^<>\s]+>|\[/?[A-Z_]+\]')        # what a template writes that may be a token
MARK = '\ufdd1'                 # around what {% generation %} holds; Unicode keeps it out of texts, as BREAK
MAX_SOURCE = 64 << 10           # characters of a template
MAX_TEXT = 4 << 20              # characters that it may write
MAX_TURNS = 1 << 20             # of its loops, all together


def read_template(folder):
    """The chat template of a model folder, or ''. Raises ValueError."""
    path = os.path.join(folder, 'chat_template.jinja')
    if os.path.isfile(path):
        with open(path, encoding='utf-8') as f:
            try:
                return f.read(MAX_SOURCE + 1)
            except UnicodeDecodeError:
                raise ValueError(f'{path!r} is not UTF-8') from None
    for name in ('chat_template.json', 'tokenizer_config.json'):
        path = os.path.join(folder, name)
        source = read_json(path).get('chat_template') if os.path.isfile(path) else None
        if isinstance(source, list):            # several, by name
            source = next((x.get('template') for x in source if isinstance(x, dict) and x.get('name') == 'default'), 0)
        if not isinstance(source, str | None):
            raise ValueError(f'{path!r}: chat_template is neither text nor a list with a "default" of text')
        if source:
            return source
    return ''


def compile_template(source):
    """Jinja2 source -> a template in the environment that transformers gives it, less strftime_now and what is random:
    a run must not depend on the day or on chance (templates that ask for the day have a date of their own)."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj, attribute):         # jinja2 writes nothing in its place
            raise SecurityError(f'access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe')

    class Generation(jinja2.ext.Extension):
        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
            return nodes.CallBlock(self.call_method('around'), [], [], body).set_lineno(line)

        def around(self, caller):
            return MARK + caller() + MARK

    @jinja2.pass_environment
    def counted(env, items):
        for item in items:
            env.turns += 1
            if env.turns > MAX_TURNS:
                raise ValueError(f'its loops take more than {MAX_TURNS} turns')
            yield item

    def stop(message):
        raise jinja2.TemplateError(str(message))

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    if len(source) > MAX_SOURCE:
        raise ValueError(f'longer than {MAX_SOURCE} characters')
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters |= dict(tojson=tojson, counted=counted)
    env.globals['raise_exception'] = stop
    del env.globals['lipsum'], env.filters['random']
    tree = env.parse(source)
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = nodes.Filter(loop.iter, 'counted', [], [], None, None)
    return jinja2.Template.from_code(env, env.compile(tree), env.make_globals(None))


def read_messages(messages, pictures):
    """[{role, content}, ...] -> [(role, [text or None for a picture, ...]), ...]. Content is text or a list of {type:
    text, text: ...} and {type: image}; `pictures` that no message places stand at the start of the first user's turn.
    Raises ValueError."""
    out = []
    try:
        for message in messages:
            role, content = message['role'], message['content']
            items = [content] if isinstance(content, str) else [
                None if item['type'] == 'image' else item['text'] for item in content]
            if role not in ('system', 'user', 'assistant') or not all(isinstance(x, str | None) for x in items):
                raise TypeError
            out.append((role, items))
    except (KeyError, TypeError):
        raise ValueError('messages: expected [{"role": "system|user|assistant", "content": "..."}, ...]') from None
    if not any(role == 'assistant' for role, _ in out):
        raise ValueError('messages hold no answer')
    if not any(item is None for _, items in out for item in items):
        first = next((items for role, items in out if role == 'user'), [])
        first[:0] = [None] * pictures
    return out


class Chat:
    """A chat template, the form's or `source` (found at `where`), together with a tokenizer.

    What a template writes becomes special tokens, what messages hold never does, even if it reads `<|im_end|>`; here we
    differ from transformers on purpose (it has sanitize_control_tokens). Answers may hold tokens that a tokenizer.json
    does not flag as special, as <think>. `end`: what ends an answer ('': nothing that may be a token); `markers`: what
    becomes tokens, {text: id}. Raises ValueError where the template can not be used."""

    def __init__(self, form, tokenizer, source='', where=''):
        self.made_of = form, tokenizer, source, where
        self.tokenizer, self.where = tokenizer, where or f'processor={form!r}'
        self.names, markers = dict(tokenizer.names), dict(tokenizer.specials)
        if not source:                          # a form of ours serves tokenizers that lack its tokens
            for role, text, i in (('bos_token', '<bos>', tokenizer.bos_id), ('eos_token', '<eos>', tokenizer.eos_id)):
                markers[self.names.setdefault(role, text)] = i
        self.image, self.around = self.names.get('image_token', '<image>'), AROUND.get(form, ('', ''))
        ours, source = not source, source or CHATS[form]
        try:
            self.template = compile_template(source)
        except ImportError:
            raise ValueError(f'{self.where} needs a package that is not here: pip install jinja2') from None
        except Exception as error:              # jinja2's and Python's compiler have many
            raise ValueError(f'{self.where}: {error or type(error).__name__}') from None
        self.lists = re.search(r'''['"]image['"]''', source) is not None        # content is a list of texts and images
        special = {text: tokenizer.special(text) for text in MARKER.findall(source + ''.join(self.around))}
        self.markers = markers | {t: i for t, i in special.items() if i is not None} | {self.image: tokenizer.image_id}
        self.broken = self.broken_answers = any_of(tuple(self.markers))
        opening, self.end = self.ends_of_an_answer()
        if ours and self.end:
            self.markers.setdefault(self.end, tokenizer.eos_id)     # a tokenizer without that token ends with its own
        broken = {*self.markers, self.end} - {''}
        kept = {*tokenizer.specials, self.image, self.end}
        self.broken = any_of(tuple(broken))
        self.broken_answers = any_of(tuple(text for text in broken if text in kept or text in opening))

    def __reduce__(self):               # compiled templates do not travel
        return Chat, self.made_of

    def ends_of_an_answer(self):
        """What the template writes before an answer, and the token after it."""
        asked, answered = (dict(role=role, content=self.content([role])) for role in ('user', 'assistant'))
        head, (text, spans) = self.write([asked], True)[0], self.write([asked, answered])
        opening = head[len(os.path.commonprefix([head, self.write([asked])[0]])):]
        follows = text.startswith(head) and (opening or text[len(head):].lstrip().startswith('assistant'))
        if not spans and not follows:
            raise ValueError(f'{self.where}: with add_generation_prompt it does not write what comes before an answer, '
                             'so that what is to be learned is not known')
        known = re.compile(f'{any_of(tuple(self.markers)).pattern}|{MARKER.pattern}')
        end = known.search(text, max(text.rfind('assistant'), len(head)))
        return opening, end[0] if end and not spans else ''

    def content(self, items, role='user'):
        """[text or None for a picture, ...] -> content of a message as the template wants it."""
        broken = self.broken_answers if role == 'assistant' else self.broken
        items = [item if item is None else broken.sub(lambda m: m[0][0] + BREAK + m[0][1:],
                                                      re.sub(f'[{BREAK}{MARK}]', '', item)) for item in items]
        for i, (a, b) in enumerate(zip(items, items[1:]), 1):       # two texts that only together read so
            if a and b and (broken.search(a + b) or broken.search(a.rstrip() + b.lstrip())):
                items[i] = BREAK + b
        if self.lists:
            return [{'type': 'image'} if item is None else {'type': 'text', 'text': item} for item in items]
        return ''.join(self.image + '\n' if item is None else item for item in items)

    def write(self, messages, asking=False):
        """(text, [(begin, end) of what {% generation %} holds, ...]) of [{role, content}, ...]; asking: up to where the
        next answer begins. Raises ValueError."""
        text, self.template.environment.turns = '', 0
        try:
            for part in self.template.generate(messages=messages, add_generation_prompt=asking, tools=None,
                                               documents=None, **self.names):
                text += part
                if len(text) > MAX_TEXT:
                    raise ValueError(f'it writes more than {MAX_TEXT} characters')
            text = text.replace(self.image, self.image.join(self.around))
            marks = [found.start() - i for i, found in enumerate(re.finditer(MARK, text))]
            return text.replace(MARK, ''), list(zip(marks[::2], marks[1::2], strict=True))
        except Exception as error:              # whatever a template may raise
            raise ValueError(f'{self.where}: {error or type(error).__name__}') from None

    def render(self, messages, asking=False):
        """(text, [(begin, end) of what is learned, ...]) of [{role, content}, ...]. Raises ValueError."""
        text, spans = self.write(messages, asking)
        if spans or asking:
            return text, [] if asking else spans
        for i, message in enumerate(messages):
            if message['role'] == 'assistant':
                head = self.write(messages[:i], True)[0]
                end = text.find(self.end, len(head)) if self.end else len(self.write(messages[:i + 1])[0])
                if not text.startswith(head) or end < 0:
                    raise ValueError(f'{self.where} does not write an answer as it asks for one')
                spans.append((len(head), end + len(self.end)))
        return text, spans

    def encode(self, turns, asking=False):
        """[(role, [text or None for a picture, ...]), ...] -> token ids int (T,), and which are learned, bool (T,).
        Raises ValueError."""
        text, spans = self.render([dict(role=role, content=self.content(items, role)) for role, items in turns], asking)
        ids, begins, ends = np.array(mark_up(self.tokenizer, text, self.markers), int)
        learned = np.zeros(len(ids), bool)
        for begin, end in spans:
            learned |= (begins < end) & (ends > begin)
        return ids, learned
