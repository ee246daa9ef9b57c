"""Processors and tokenizers of transformers: what the files of a model folder say of pictures,
conversations and special tokens, and such files of ours.

Processors of PaliGemma, SigLIP, Idefics3, SmolVLM and Llava are read; those of the first three are
written. Where a processor of transformers differs: text that reads <image>, <bos>, <|im_end|> ...
stays text here, an answer loses the spaces around it if it is a `suffix`, and a picture is never
split.
"""
import os
import shutil
import warnings
from dataclasses import replace

import numpy as np

from accounting import say
from chat import AROUND, CHATS, read_template
from checkpoint import write_json
from processor import Processor
from tokenizer import Bytes, read_json
from vocabularies.clip import open_merges
from vocabularies.json_file import HuggingFace, named_tokens
from vocabularies.pieces import SentencePiece
from vocabularies.ranks import Tiktoken

# How the class of a processor or image processor begins -> our form. (auto: the task's own, which
# for vlm is PaliGemma's, for policy and vla that and the actions beside it.)
FORMS = {'PaliGemma': 'auto', 'Idefics3': 'smolvlm', 'SmolVLM': 'smolvlm', 'Llava': 'llava',
         'Siglip': 'auto'}

# CLIP's pictures, where a folder leaves them out (CLIPImageProcessor's defaults).
CLIP = dict(image_mean=[0.48145466, 0.4578275, 0.40821073],
            image_std=[0.26862954, 0.26130258, 0.27577711], size={'shortest_edge': 224},
            crop_size={'height': 224, 'width': 224}, do_center_crop=True)

# Idefics3Processor adds these to a tokenizer that lacks them: new tokens, which nobody trained.
IDEFICS3_TOKENS = '<fake_token_around_image>', '<end_of_utterance>'

# What SigLIP's tokenizers do to a text before they cut it up.
TEXT_RULES = {'SiglipTokenizer': 'siglip', 'Siglip2Tokenizer': 'siglip2'}

# Whole numbers are written for fractions, too.
NUMBER = int | float
SIDES = ('height', 'width')

# ------------------------------------------------------------------------------------------------
# reading


class ProcessorSettings:
    """What the processor files of a folder say; a value of a wrong type is a ValueError that names
    it."""

    def __init__(self, folder, values):
        self.folder, self.values = folder, values

        # transformers 5 writes those of the pictures inside the others.
        self.values.update(self.get('image_processor', {}, dict))

    def get(self, key, default=None, kind=None, least=None, most=1 << 16):
        """A value, or its default where it is null or missing; kind: of what type it has to be."""
        value = self.values.get(key)
        if value is None:
            value = default
        if kind is None:
            return value

        # For Python, true is an int.
        is_bool = isinstance(value, bool)
        if not isinstance(value, kind) or (is_bool and kind is not bool):
            raise self.wrong(key, value)
        if least is not None and not least <= value <= most:
            raise self.wrong(key, value)
        return value

    def wrong(self, key, value, why='which can not be'):
        return ValueError(f'processor={self.folder!r}: {key} is {str(value)[:80]!r}, {why}')

    def edge(self, key, names, default=None):
        """The one side that a size has under one of these names, or 0."""
        size = self.get(key, default or {}, dict | int)
        if isinstance(size, int):
            size = dict.fromkeys(SIDES, size)
        sides = {size[name] for name in names if isinstance(size.get(name), NUMBER)}

        # A bool, a fraction or several sides are no square.
        if len(sides) > 1 or not all(type(side) is int and 0 < side < 1 << 14 for side in sides):
            raise self.wrong(key, size, 'expected a square')
        return sides.pop() if sides else 0

    def colour(self, key):
        """Three numbers; one stands for all."""
        values = self.get(key, [0.5] * 3, list | NUMBER)
        if not isinstance(values, list):
            values = [values] * 3
        are_numbers = all(type(x) in (int, float) and abs(x) < 1e6 for x in values)
        if len(values) != 3 or not are_numbers:
            raise self.wrong(key, values)
        return np.array(values, float)


def open_processor(settings, tokenizer, eyes, image_tokens):
    """The processor.Processor of the model folder that settings['processor'] is. eyes: of the
    model's pictures, or None; image_tokens: how many it takes a picture. Raises ValueError."""
    folder = settings['processor']
    files = read_model_folder(folder, eyes is not None)

    # What the model has must be what the folder wants.
    ours = dict(image_size=eyes.size if eyes else 0, image_tokens=image_tokens)
    for key, value in ours.items():
        theirs = files.pop(key, 0)
        if theirs not in (0, value):
            raise ValueError(f'processor={folder!r} wants {key} {theirs}, the model has {value}: '
                             'change vit.image_size, vit.patch_size or pixel_shuffle')

    # Pixels as transformers has them, which decodes whole.
    if 'resize' in files:
        looks = {key: files.pop(key) for key in ('mean', 'std', 'resample', 'resize')}
        eyes = replace(eyes, draft=False, **looks)
    return Processor(settings, tokenizer, eyes=eyes, image_tokens=image_tokens,
                     where=f'processor={folder!r}', **files)


def read_model_folder(folder, pictures=True):
    """What the files of a model folder say, as keywords of Processor: form, template and, for one
    with pictures, mean, std, resample, resize, opens, text_rule, and image_size and image_tokens
    (0: not said), which are the model's. Raises ValueError.

    preprocessor_config.json and processor_config.json are read for pictures, chat_template.jinja,
    chat_template.json or tokenizer_config.json for conversations. A folder without the former, or
    pictures=False, needs a chat template."""
    said = read_settings(folder)
    template = read_template(folder)
    if not pictures or not said.values:
        return text_alone(folder, template, pictures)

    form = form_of(said)
    if said.get('image_processor_type', '', str).startswith(('CLIP', 'Llava')):
        said.values = CLIP | {key: x for key, x in said.values.items() if x is not None}
    mean, std = colours(said, form)

    # Idefics3's pictures are resized by rules of their own. (Numbers of PIL: Lanczos, bicubic.)
    if form == 'smolvlm':
        resample = said.get('resample', 1, int, 0, 5)
        image_size, resize = idefics3_sizes(said)
    else:
        resample = said.get('resample', 3, int, 0, 5)
        image_size, resize = plain_sizes(said)
    if not image_size or resize == ('squares', 0):
        raise said.wrong('size', [said.get('size'), said.get('max_image_size')])
    image_tokens = tokens_of_a_picture(said, form, image_size)

    # PaliGemma and SigLIP hold no conversations, whatever their tokenizers say.
    if form not in CHATS:
        template = ''
    return dict(form=form, mean=mean, std=std, resize=resize, resample=resample,
                image_size=image_size, image_tokens=image_tokens, template=template, opens=True,
                text_rule=text_rule_of(folder, form))


def read_settings(folder):
    """The settings of both processor files of a folder; none where there is no such file."""
    # Where both say something, the second is the newer one.
    found = {}
    for name in ('preprocessor_config.json', 'processor_config.json'):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            found |= read_json(path, 1 << 20)
    return ProcessorSettings(folder, found)


def text_alone(folder, template, pictures):
    """Keywords of Processor of a folder without pictures. Raises ValueError."""
    if template:
        return dict(form='chat', template=template)
    if pictures:
        raise ValueError(f'processor={folder!r} has no chat template and no '
                         'preprocessor_config.json')
    raise ValueError(f'processor={folder!r} has no chat template')


def form_of(said):
    """Our form of a folder's processor. Raises ValueError."""
    # A folder of a tower alone has an image processor, and nothing around it.
    kind = said.get('processor_class', '', str) or said.get('image_processor_type', '', str)
    for start, form in FORMS.items():
        if kind.startswith(start):
            return form
    raise ValueError(f'processor={said.folder!r}: its processor_class is {kind or "not given"}, '
                     f'known are those of {", ".join(FORMS)}')


def colours(said, form):
    """(mean, std) of the pixels, three numbers each. Raises ValueError."""
    # Idefics3 pads the smaller pictures of a batch, where ours are all of one size.
    is_resized = said.get('do_resize', True, bool)
    is_padded = said.get('do_pad', False, bool) and form != 'smolvlm'
    if is_padded or not is_resized:
        raise said.wrong('do_resize, do_pad', [said.get('do_resize'), said.get('do_pad')],
                         'expected true, false')

    # Eyes.to_tensor divides by 255, whatever a folder's rescale_factor says.
    factor = said.get('rescale_factor', 1 / 255, NUMBER, 1e-6)
    if not said.get('do_rescale', True, bool):
        factor = 1
    scale = 1 / 255 / factor

    mean, std = np.zeros(3), np.ones(3)
    if said.get('do_normalize', True, bool):
        mean, std = said.colour('image_mean'), said.colour('image_std')
    if (std <= 0).any():
        raise said.wrong('image_std', std)
    return (mean * scale).tolist(), (std * scale).tolist()


def idefics3_sizes(said):
    """(image_size, resize) of an Idefics3 or SmolVLM."""
    if said.get('do_image_splitting', True, bool):
        warnings.warn(f'processor={said.folder!r}: do_image_splitting is on, but pictures are not '
                      'split', stacklevel=3)
    # What a picture becomes first, and the size of the squares that it is cut into.
    image_size = said.edge('max_image_size', ('longest_edge',), {'longest_edge': 364})
    longest = said.edge('size', ('longest_edge',), {'longest_edge': 4 * 364})
    if longest:
        return image_size, ('longest', longest)
    return image_size, ('squares', said.edge('size', SIDES))


def plain_sizes(said):
    """(image_size, resize) of a SigLIP or CLIP."""
    shortest = said.edge('size', ('shortest_edge',))
    image_size = shortest or said.edge('size', SIDES, {'height': 224, 'width': 224})

    # CLIP makes the shorter side fit and takes the middle, SigLIP makes both sides fit.
    crop = 0
    if said.get('do_center_crop', False, bool):
        crop = said.edge('crop_size', SIDES)
    is_cut = shortest and crop != shortest
    if is_cut or crop not in (0, image_size):
        raise said.wrong('crop_size', crop, 'expected a square of the size')
    if shortest:
        return image_size, ('shortest', shortest)
    return image_size, ('square', 0)


def tokens_of_a_picture(said, form, image_size):
    """Tokens that a picture takes; 0: not said."""
    tokens = said.get('image_seq_length', said.get('image_seq_len', 0), int, 0)
    if form != 'llava' or not said.get('patch_size'):
        return tokens

    # A Llava's processor counts them: patches, and a class token that may be dropped again.
    tokens = (image_size // said.get('patch_size', 1, int, 1)) ** 2
    tokens += said.get('num_additional_image_tokens', 0, int, 0)
    if said.get('vision_feature_select_strategy') == 'default':
        tokens -= 1
    return tokens


def text_rule_of(folder, form):
    """What the tokenizer of a SigLIP does to a text first: siglip, siglip2, or nothing."""
    path = os.path.join(folder, 'tokenizer_config.json')
    if form != 'auto' or not os.path.isfile(path):
        return ''
    return TEXT_RULES.get(str(read_json(path).get('tokenizer_class')), '')


# ------------------------------------------------------------------------------------------------
# writing


def form_name(run):
    """What the form of a run is called: auto is its task's."""
    task = run.settings['task']
    if run.processor.form == 'auto':
        return {'llm': 'text', 'vlm': 'paligemma'}.get(task, task)
    return run.processor.form


def processor_class(kind, run):
    """The processor of transformers that writes the tokens of a run; '': none does. kind:
    model_type of a config.json."""
    form, special = form_name(run), run.tokenizer.special
    if kind == 'paligemma':
        return 'PaliGemmaProcessor' if form == 'paligemma' else ''
    if form in AROUND and all(special(text) is not None for text in IDEFICS3_TOKENS):
        return 'Idefics3Processor'
    # It serves any model, and writes no more than the tokens of a picture.
    return 'LlavaProcessor' if form in ('text', *CHATS) else ''


def write_processor(kind, run, folder):
    """preprocessor_config.json and processor_config.json: how pictures become pixels and image
    tokens. kind: model_type of the config.json beside them."""
    files = {'preprocessor_config.json': pixels_of(kind, run.settings)}
    if run.processor.folder:
        files = kept_files(run.processor) or files
    elif kind in ('paligemma', 'idefics3'):
        name, image_tokens = processor_class(kind, run), run.processor.image_tokens
        said = dict(processor_class=name)
        files['preprocessor_config.json'] |= said | dict(image_seq_length=image_tokens)
        if name == 'Idefics3Processor':
            said |= dict(image_seq_len=image_tokens)
        elif name == 'LlavaProcessor':
            side = run.settings['vit.patch_size'] * run.settings['pixel_shuffle']
            said |= dict(patch_size=side, vision_feature_select_strategy='full',
                         num_additional_image_tokens=0, image_token='<image>')
        files['processor_config.json'] = said

        # What transformers then takes by itself says that the numbers do not fit.
        if not name:
            say(f'{folder}: no processor of transformers writes processor={run.processor.form!r}: '
                f'put {image_tokens} times <image> for a picture into your ids yourself')
            del files['processor_config.json']
            del files['preprocessor_config.json']['processor_class']
    for file, values in files.items():
        write_json(os.path.join(folder, file), values)


def kept_files(processor):
    """{file: values} of the model folder that a processor was made from, as it is used here:
    pictures are not split."""
    files = {}
    for name in ('preprocessor_config.json', 'processor_config.json'):
        path = os.path.join(processor.folder, name)
        if os.path.exists(path):
            files[name] = read_json(path, 1 << 20)

    # transformers 5 writes those of the pictures inside the others
    if processor.form in AROUND:
        for values in files.values():
            values.get('image_processor', values)['do_image_splitting'] = False
    return files


def pixels_of(kind, run_settings):
    """preprocessor_config.json of a run whose pictures are as its settings say."""
    size = run_settings['vit.image_size']
    # Their slow and fast image processors have other defaults: all is said.
    pixels = dict(do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True,
                  rescale_factor=1 / 255, image_mean=three(run_settings['image_mean']),
                  image_std=three(run_settings['image_std']), resample=3)
    if kind == 'idefics3':
        edge = dict(longest_edge=size)
        return pixels | dict(image_processor_type='Idefics3ImageProcessor', size=edge,
                             max_image_size=edge, do_image_splitting=False, do_pad=True,
                             resample=1)
    return pixels | dict(image_processor_type='SiglipImageProcessor',
                         size=dict(height=size, width=size))


def three(value):
    """A number for each of red, green and blue."""
    if isinstance(value, list | tuple):
        return list(value)
    return [value] * 3


def write_template(kind, run, folder):
    """The chat template of a run that has one: its form's, or that of the folder it names."""
    if run.processor.folder:
        for name in ('chat_template.jinja', 'chat_template.json'):
            path = os.path.join(run.processor.folder, name)
            if os.path.exists(path):
                shutil.copyfile(path, os.path.join(folder, name))
    elif run.processor.form in CHATS:
        with open(os.path.join(folder, 'chat_template.jinja'), 'w', encoding='utf-8') as file:
            file.write(template_of(kind, run))


def template_of(kind, run):
    """The chat template of a form as transformers needs it to write the same tokens."""
    form, end = run.processor.form, run.processor.chat.end
    source = CHATS[form]
    # What a conversation begins with, and the token that ends answers where a tokenizer lacks
    # the form's, are of the form here, of the template there.
    if form == 'llava':
        source = '{{ bos_token }}' + source
    if end in source and run.tokenizer.special(end) is None:
        source = source.replace(end, "' + eos_token + '")
    if form in AROUND and processor_class(kind, run) != 'Idefics3Processor':
        source = source.replace("'<image>'", "'" + '<image>'.join(AROUND[form]) + "'")
    return source


def write_tokenizer(tokenizer, folder, opens=False):
    """The tokenizer's files as transformers looks for them; opens: a text begins with a bos. (Of a
    Llama-like tokenizer.model it makes a tokenizer that swallows the space before a text that
    begins with one.) Raises ValueError."""
    # Special tokens by their role; those that a tokenizer only counts get a name here.
    in_file = {id_of(tokenizer, role): text for role, text in tokenizer.names.items()}
    names, added = {}, {}
    for role in ('bos_token', 'eos_token', 'pad_token', 'image_token'):
        number = id_of(tokenizer, role)
        names[role] = in_file.get(number) or new_name(tokenizer, role)
        added[str(number)] = dict(content=names[role], special=True, normalized=False,
                                  lstrip=False, rstrip=False, single_word=False)

    # The main file, which is the first, has a name that transformers looks for.
    for path in tokenizer.files:
        name = os.path.basename(path)
        ending = os.path.splitext(path)[1]
        if path == tokenizer.files[0] and ending in ('.model', '.json'):
            name = f'tokenizer{ending}'
        shutil.copyfile(path, os.path.join(folder, name))

    # Bytes have no file of their own. A tokenizer.model does not say which class reads it.
    kind, new = 'PreTrainedTokenizerFast', {}
    if isinstance(tokenizer, Bytes):
        write_json(os.path.join(folder, 'tokenizer.json'), bytes_tokenizer(added))
    elif isinstance(tokenizer, SentencePiece):
        # of the two, Llama's writes a space before a text
        is_spaced = tokenizer.model.encode('a', out_type=str)[0].startswith('\u2581')
        kind = 'LlamaTokenizer' if is_spaced else 'GemmaTokenizer'
    else:
        new = {int(number): token for number, token in added.items() if int(number) not in in_file}
        write_tokenizer_json(tokenizer, new, folder)

    # What the tokenizer came with is kept, and wins.
    path = os.path.join(folder, 'tokenizer_config.json')
    kept = {}
    if os.path.exists(path):
        kept = read_json(path)
    added |= kept.get('added_tokens_decoder', {})
    ours = dict(tokenizer_class=kind, model_max_length=10 ** 30,
                clean_up_tokenization_spaces=False)
    write_json(path, ours | kept | names | dict(added_tokens_decoder=added))

    # The file says what a text begins with; Gemma's and Llama's classes add a bos by themselves.
    is_opened = getattr(tokenizer, 'opening', []) == [tokenizer.bos_id]
    if opens and not is_opened and not isinstance(tokenizer, SentencePiece):
        add_opening(os.path.join(folder, 'tokenizer.json'), names['bos_token'], tokenizer.bos_id)


def add_opening(path, bos, bos_id):
    """Let a tokenizer.json put a bos before a text."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    model = Tokenizer.from_file(path)
    model.post_processor = TemplateProcessing(single=[bos, '$A'], pair=[bos, '$A', '$B'],
                                              special_tokens=[(bos, bos_id)])
    model.save(path)


def id_of(tokenizer, role):
    """The id of bos_token, eos_token, pad_token or image_token."""
    return getattr(tokenizer, role.replace('_token', '_id'))


def new_name(tokenizer, role):
    """How a token is spelled that a tokenizer's file lacks: as nothing in it is."""
    piece_id = tokenizer.special
    if isinstance(tokenizer, SentencePiece):
        piece_id = tokenizer.piece_id
    elif isinstance(tokenizer, HuggingFace):
        piece_id = tokenizer.model.token_to_id
    # A file may name a token that its vocabulary lacks. Processors look for <image>.
    word = role.removesuffix('_token')
    named = ['<image>'] if word == 'image' else []
    for path in tokenizer.files:
        if os.path.basename(path) == 'tokenizer_config.json':
            named += [text for key, text in named_tokens(path).items() if key == role]
    for text in (*named, f'<{word}>', f'<|{word}|>', f'<{word}_token>'):
        if piece_id(text) is None:
            return text
    raise ValueError(f'{text} and alike are tokens, but none is its {role}: name it in the '
                     'tokenizer_config.json beside it')


def write_tokenizer_json(tokenizer, new, folder):
    """tokenizer.json of a HuggingFace or Tiktoken, with new tokens {id: AddedToken's settings}
    after its own; left as it was copied where it is all that. Raises ValueError."""
    from tokenizers import AddedToken, Tokenizer
    source, target = tokenizer.files[0], os.path.join(folder, 'tokenizer.json')
    if isinstance(tokenizer, Tiktoken):
        model = from_ranks(source, tokenizer)
        new |= {number: dict(content=text, special=True)
                for text, number in tokenizer.specials.items()}
    elif source.endswith('.txt'):
        model = open_merges(source)
    else:
        # what is not for training, vocabularies/json_file.py leaves out, too
        model = Tokenizer.from_file(source)
        dropout = getattr(model.model, 'dropout', None)
        if not (new or model.truncation or model.padding or dropout):
            return
        if dropout:
            model.model.dropout = None
    model.no_truncation()
    model.no_padding()

    # The library counts on from its last id: what is between, nobody has.
    for number in sorted(new):
        for unused in range(model.get_vocab_size(), number):
            model.add_special_tokens([AddedToken(f'<unused{unused}>', special=True)])
        model.add_special_tokens([AddedToken(**new[number])])
        if model.token_to_id(new[number]['content']) != number:
            raise ValueError(f'tokenizer {source!r} has ids that nothing stands for: transformers '
                             f'would not give {new[number]["content"]} the id {number}')
    model.save(target)


def from_ranks(path, tokenizer):
    """The tokenizers.Tokenizer that does what a .tiktoken file says. Raises ValueError."""
    try:
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError:
        raise ValueError(f'tokenizer {path!r}: to write it as tokenizer.json needs a package that '
                         'is not here: pip install transformers') from None
    return TikTokenConverter(path, tokenizer.model._pat_str).converted()


def bytes_tokenizer(added):
    """tokenizer.json of a tokenizer whose ids are the bytes of UTF-8. added: {id: its token}."""
    # It spells a byte as GPT-2 does: as itself where it is a letter of Latin-1, the others as the
    # letters from 256 on.
    plain = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1),
             *range(ord('®'), ord('ÿ') + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    vocab = {letters[byte]: byte for byte in range(256)}

    # Without merges, every byte stays a token.
    level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
    model = dict(type='BPE', dropout=None, unk_token=None, continuing_subword_prefix=None,
                 end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, vocab=vocab,
                 merges=[])
    tokens = [dict(id=int(number), **token) for number, token in added.items()]
    return dict(version='1.0', truncation=None, padding=None, normalizer=None, pre_tokenizer=level,
                post_processor=None, decoder=level, added_tokens=tokens, model=model)
