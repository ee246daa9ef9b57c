"""Processors against those of transformers, loaded from the same folder: pixels to 1/255, token
ids exactly, what is learned. What they need of tokenizers and chat templates is in
test_chat.py."""
import io
import json

import numpy as np
import pytest
import sentencepiece
from conftest import encode, make_processor, picture
from PIL import Image

import tokenizer
from answering import prompt_of
from processor import BadSample
from tasks import vlm

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')
import transformers.models.clip.image_processing_pil_clip as clip_images  # noqa: E402
import transformers.models.idefics3.image_processing_pil_idefics3 as idefics3_images  # noqa: E402
import transformers.models.siglip.image_processing_pil_siglip as siglip_images  # noqa: E402
import transformers.models.smolvlm.image_processing_pil_smolvlm as smolvlm_images  # noqa: E402
from test_chat import (  # noqa: E402
    HEADERS,
    IM,
    TEXTS,
    byte_level,
    gemma,
    learned,
    load,
    piece_of,
    sentencepiece_like,
)
from tokenizers import AddedToken, models, pre_tokenizers  # noqa: E402

CLIPImageProcessorPil = clip_images.CLIPImageProcessorPil
Idefics3ImageProcessorPil = idefics3_images.Idefics3ImageProcessorPil
SiglipImageProcessorPil = siglip_images.SiglipImageProcessorPil
SmolVLMImageProcessorPil = smolvlm_images.SmolVLMImageProcessorPil

# ------------------------------------------------------------------------------------------------
# pictures


def pictures():
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(90), np.arange(70))[..., None] * [1, 2, 3] % 256
    yield encode(smooth.astype(np.uint8))
    yield encode(smooth.astype(np.uint8), 'JPEG')
    yield encode(rng.integers(0, 256, (200, 131, 3), np.uint8), 'JPEG')
    yield encode(rng.integers(0, 256, (31, 77, 3), np.uint8))
    yield encode(rng.integers(0, 256, (16, 16, 3), np.uint8))
    yield encode(rng.integers(0, 256, (1, 9, 3), np.uint8))
    yield encode(picture(1, 40))
    yield encode(
        np.dstack([smooth, np.add.outer(np.arange(90), np.arange(70)) % 256]).astype(np.uint8))
    yield encode(smooth[..., 0].astype(np.uint8))


def pixels(p, data):
    ours = p.eyes.to_tensor(p.eyes.pixels(data)[None], 'cpu')[0].numpy()
    return ours, Image.open(io.BytesIO(data))


SQUARE = {'height': 24, 'width': 24}
EDGE = dict(max_image_size={'longest_edge': 24}, do_image_splitting=False)
IMAGE_PROCESSORS = {
    'siglip': (SiglipImageProcessorPil, dict(size=SQUARE), 'SiglipProcessor'),
    'bilinear': (
        SiglipImageProcessorPil,
        dict(size=SQUARE, resample=2, rescale_factor=1 / 127.5, image_mean=[0.9, 0.8, 1.0],
             image_std=[0.5, 0.25, 2.0]), 'SiglipProcessor'),
    'plain': (SiglipImageProcessorPil, dict(size=SQUARE, do_normalize=False), 'SiglipProcessor'),
    'bytes': (SiglipImageProcessorPil, dict(size=SQUARE, do_rescale=False), 'SiglipProcessor'),
    'idefics3': (Idefics3ImageProcessorPil, dict(size={'longest_edge': 50}, **EDGE),
                 'Idefics3Processor'),
    'smolvlm': (SmolVLMImageProcessorPil, dict(size={'longest_edge': 73}, **EDGE),
                'SmolVLMProcessor'),
    'longest': (Idefics3ImageProcessorPil, dict(size={'longest_edge': 5000}, **EDGE),
                'Idefics3Processor'),
    'square': (SmolVLMImageProcessorPil, dict(size={'height': 30, 'width': 30}, **EDGE),
               'SmolVLMProcessor'),
    'clip': (CLIPImageProcessorPil, dict(size={'shortest_edge': 24}, crop_size=SQUARE),
             'LlavaProcessor')}


@pytest.mark.parametrize('name', IMAGE_PROCESSORS)
def test_pixels_are_those_of_transformers(tmp_path, name):
    kind, options, whole = IMAGE_PROCESSORS[name]
    size = 24
    theirs = kind(**options)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'preprocessor_config.json').read_text())
    (tmp_path / 'preprocessor_config.json').write_text(
        json.dumps(config | {'processor_class': whole}))
    p = load(tmp_path, 'vlm', size, tok=tokenizer.Bytes())
    chosen = list(pictures())
    if name == 'longest':
        chosen = chosen[5:6]        # 1 x 9 pixels, made 5000 long
    for data in chosen:
        ours, opened = pixels(p, data)
        wanted = theirs(images=[opened], return_tensors='np')['pixel_values']
        wanted = wanted.reshape(3, size, size)
        scale = np.array(p.eyes.std).reshape(3, 1, 1) * 255
        assert abs((ours - wanted) * scale).max() <= 1e-3, 'the very bytes'
        assert ours.dtype == np.float32


def test_pictures_that_are_split_are_not_here(tmp_path):
    images = Idefics3ImageProcessorPil(size={'longest_edge': 50},
                                       max_image_size={'longest_edge': 16})
    images.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'preprocessor_config.json').read_text())
    (tmp_path / 'preprocessor_config.json').write_text(
        json.dumps(config | {'processor_class': 'Idefics3Processor'}))
    with pytest.warns(UserWarning, match='do_image_splitting'):
        load(tmp_path, 'vlm', 16, tok=tokenizer.Bytes())


GOOD = dict(processor_class='SiglipProcessor', size={'height': 16, 'width': 16})
EDGES = dict(processor_class='Idefics3Processor', do_image_splitting=False)
BROKEN = {'no json': '{', 'a list': '[1]', 'deep': '[' * 100000, 'huge': ' ' * (1 << 21) + '{}',
          'empty': '{}', 'kind': dict(GOOD, processor_class='Blip2Processor'),
          'kind of a wrong type': dict(GOOD, processor_class=[1]),
          'size': dict(GOOD, size={'height': 16, 'width': 8}), 'size text': dict(GOOD, size='16'),
          'size nan': dict(GOOD, size={'height': 'x', 'width': 1e300}),
          'size huge': dict(GOOD, size=10 ** 9), 'size zero': dict(GOOD, size=0),
          'mean': dict(GOOD, image_mean=[0.5]), 'mean text': dict(GOOD, image_mean=['a'] * 3),
          'std': dict(GOOD, image_std=[0.5, 0, 0.5]), 'std none': dict(GOOD, image_std=[None] * 3),
          'resample': dict(GOOD, resample=9), 'resample text': dict(GOOD, resample='bicubic'),
          'factor': dict(GOOD, rescale_factor=0), 'normalize': dict(GOOD, do_normalize='yes'),
          'resize': dict(GOOD, do_resize=False), 'pad': dict(GOOD, do_pad=True),
          'tokens': dict(GOOD, image_seq_length=-1),
          'tokens of a wrong type': dict(GOOD, image_seq_length='4'),
          'nested': dict(GOOD, image_processor=3),
          'crop': dict(GOOD, do_center_crop=True, crop_size=8),
          'nan': '{"processor_class": "SiglipProcessor", "image_mean": NaN}',
          'shortest': dict(GOOD, size={'shortest_edge': 16}),
          'edges': dict(GOOD, size={'height': -1, 'width': -1}), 'no size': dict(GOOD, size={}),
          'no edge': dict(GOOD | EDGES, size={}),
          'no patch': dict(GOOD | EDGES, max_image_size={'height': 16})}


def test_a_picture_that_would_not_fit(tmp_path):
    CLIPImageProcessorPil(size={'shortest_edge': 224}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'preprocessor_config.json').read_text())
    (tmp_path / 'preprocessor_config.json').write_text(
        json.dumps(config | {'processor_class': 'LlavaProcessor'}))
    with pytest.raises(BadSample, match='narrow'):
        load(tmp_path, 'vlm', 224, tok=tokenizer.Bytes()).eyes.pixels(
            encode(np.zeros((1, 60000, 3), np.uint8)))


@pytest.mark.parametrize('name', BROKEN)
def test_broken_processor_files_are_refused(tmp_path, name):
    broken = BROKEN[name]
    (tmp_path / 'preprocessor_config.json').write_text(
        broken if isinstance(broken, str) else json.dumps(broken))
    with pytest.raises(ValueError, match=tmp_path.name):
        load(tmp_path, 'vlm', tok=tokenizer.Bytes())
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(GOOD))
    load(tmp_path, 'vlm', tok=tokenizer.Bytes())


# ------------------------------------------------------------------------------------------------
# PaliGemma, SigLIP, Idefics3, Llava


@pytest.fixture(scope='module')
def paligemma(tmp_path_factory):
    """A folder that PaliGemmaProcessor wrote, and one with its tokenizer.model in place of the
    tokenizer.json."""
    folder = tmp_path_factory.mktemp('paligemma')
    other = tmp_path_factory.mktemp('paligemma-model')
    images = SiglipImageProcessorPil(size={'height': 16, 'width': 16})
    images.image_seq_length = 4
    transformers.PaliGemmaProcessor(images, gemma(folder)).save_pretrained(folder)
    for name in ('processor_config.json', 'tokenizer.model'):
        (other / name).write_bytes((folder / name).read_bytes())
    return folder, other


PROMPTS = [('detect cat', '<loc0012><loc1023><loc0000><loc0500> cat'),
           ('segment cat', '<loc0001> <seg000><seg127> x'), ('', 'a cat'),
           ('  what  is\nthis?\n', 'né 日本'), ('caption en', 'x' * 50),
           ('<loc0003> which?', '<table>')]


@pytest.mark.parametrize('which', [0, 1])
@pytest.mark.parametrize('count', [1, 3])
def test_paligemma(paligemma, which, count):
    theirs = transformers.AutoProcessor.from_pretrained(paligemma[0])
    p = load(paligemma[which], 'vlm', tokens=4)
    assert p.function is vlm.form and p.tokenizer.image_id == theirs.image_token_id
    data = [encode(picture(i, 30)) for i in range(count)]
    opened = [Image.open(io.BytesIO(x)) for x in data]
    for prefix, suffix in PROMPTS:
        out = theirs(images=[opened], text=['<image>' * count + prefix], suffix=[suffix])
        piece, = p.pieces({'json': json.dumps(dict(prefix=prefix, suffix=suffix)).encode()}
                          | {f'{i}.png': x for i, x in enumerate(data)})
        assert piece['tokens'].tolist() == out['input_ids'][0]
        assert piece['blocks'].tolist() == out['token_type_ids'][0], 'what is causal'
        assert np.append(-100, piece['targets'][:-1]).tolist() == out['labels'][0].tolist()
        assert prompt_of(p, prefix, count)[0] == theirs(
            images=[opened], text=['<image>' * count + prefix])['input_ids'][0]
    ours = np.stack([pixels(p, x)[0] for x in data])
    wanted = theirs(images=[opened], text=['<image>' * count])['pixel_values']
    np.testing.assert_allclose(ours, np.stack(wanted), atol=1e-5)


@pytest.mark.parametrize('which', [0, 1])
def test_paligemma_texts_are_no_special_tokens_but_places(paligemma, which):
    p = load(paligemma[which], 'vlm', tokens=4)
    t = p.tokenizer
    for text in ('<image>', '<bos>', '<eos>', '<pad>', 'a<image>b<eos>'):
        assert not {t.image_id, t.bos_id, t.eos_id, t.pad_id} & set(t.encode(text)), text
        assert t.decode(t.encode(text)) == text
    assert t.encode('<loc0007><seg009>') == [t.special('<loc0007>'), t.special('<seg009>')]
    assert t.encode('<loc1024>') != t.encode('<loc1024>')[:1] and len(t.encode('<loc7>')) > 1


def test_places_that_a_file_flags_as_special_are_text_too(tmp_path):
    t = tokenizers.Tokenizer(
        models.WordLevel({'a': 0, '<unk>': 1, '<loc0001>': 2}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.add_special_tokens(['<loc0001>', '<loc0002>', '<s>'])
    t.save(str(tmp_path / 'tokenizer.json'))
    ours = tokenizer.load(str(tmp_path))
    assert ours.encode('a <loc0001> <loc0002> <s>') == [0, 2, t.token_to_id('<loc0002>'), 1]
    assert set(ours.specials) == {'<s>'}


@pytest.mark.parametrize('kind', ['siglip', 'siglip2'])
def test_siglip(tmp_path, kind):
    if kind == 'siglip':
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=out, vocab_size=120,
            hard_vocab_limit=False, num_threads=1, minloglevel=2, pad_id=0, eos_id=1, unk_id=2,
            bos_id=-1, character_coverage=1.0)
        (tmp_path / 'spiece.model').write_bytes(out.getvalue())
        theirs = transformers.SiglipTokenizer(str(tmp_path / 'spiece.model'))
    else:
        made = gemma(tmp_path)
        backend = json.loads(made.backend_tokenizer.to_str())['model']
        theirs = transformers.models.siglip2.tokenization_siglip2.Siglip2Tokenizer(
            vocab=backend['vocab'], merges=[tuple(m) for m in backend['merges']])
    images = SiglipImageProcessorPil(size={'height': 16, 'width': 16})
    transformers.SiglipProcessor(images, theirs).save_pretrained(tmp_path)
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path)
    p = load(tmp_path, 'siglip')
    for text in ('A cat, on the MAT!', 'the  quick\n brown (fox)', "it's", 'one-two_three'):
        piece, = p.pieces({'txt': text.encode(), 'png': encode(picture(1))})
        opened = Image.open(io.BytesIO(encode(picture(1))))
        wanted = theirs(text=[text], images=[opened])['input_ids'][0]
        # The class of the second leaves the end to a setting.
        end = [] if kind == 'siglip' else [p.tokenizer.eos_id]
        assert piece['tokens'].tolist() == [*wanted, *end]
        assert piece['text'] == text


SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}"
    "{% endif %}")
IDEFICS3 = SMOLVLM.replace('<|im_start|>', '<|begin_of_text|>')
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")

VLM_TALKS = [
    [('user', [None, 'What is this?']), ('assistant', ['A cat.'])],
    [('system', ['Be brief.']), ('user', ['  Here: ', None, ' and ', None, ' differ?\n']),
     ('assistant', [' yes ']), ('user', ['sure?']), ('assistant', ['no'])]]
VLM_CASES = {
    'smolvlm': (
        SMOLVLM, byte_level,
        dict(special=[*IM, '<fake_token_around_image>', '<image>', '<end_of_utterance>'],
             bos_token='<|im_start|>', eos_token='<end_of_utterance>')),
    'smolvlm-global': (
        SMOLVLM, byte_level,
        dict(
            special=[*IM, '<fake_token_around_image>', '<image>', '<end_of_utterance>',
                     '<global-img>'], bos_token='<|im_start|>', eos_token='<end_of_utterance>')),
    'idefics3': (
        IDEFICS3, byte_level,
        dict(special=[*HEADERS, '<fake_token_around_image>', '<image>', '<end_of_utterance>'],
             bos_token='<|begin_of_text|>', eos_token='<|end_of_text|>')),
    'idefics3-llama2': (
        IDEFICS3, sentencepiece_like,
        dict(
            special=['<fake_token_around_image>', '<image>',
                     AddedToken('<end_of_utterance>', lstrip=True)])),
    'llava': (LLAVA, sentencepiece_like, dict(special=['<image>']))}


def made_by_transformers(name, folder):
    """A Llava or Idefics3 processor in a folder, as AutoProcessor opens it."""
    template, make, options = VLM_CASES[name]
    tok = make(folder, **options)
    if name == 'llava':
        images = CLIPImageProcessorPil(size={'shortest_edge': 16},
                                       crop_size={'height': 16, 'width': 16})
        made = transformers.LlavaProcessor(images, tok, patch_size=8, chat_template=template,
                                           vision_feature_select_strategy='full')
    else:
        images = Idefics3ImageProcessorPil(size={'longest_edge': 40}, do_image_splitting=False,
                                           max_image_size={'longest_edge': 16})
        made = transformers.Idefics3Processor(images, tok, image_seq_len=4, chat_template=template)
    made.save_pretrained(folder)
    return transformers.AutoProcessor.from_pretrained(folder)


def messages_of(talk, opened=()):
    """A talk as messages; opened: the pictures in it, for transformers."""
    opened = iter(opened)
    messages = []
    for role, items in talk:
        content = []
        for item in items:
            if item is None:
                content.append({'type': 'image'})
            else:
                content.append({'type': 'text', 'text': item})
            image = next(opened, None) if item is None else None
            if image:
                content[-1]['image'] = image
        messages.append(dict(role=role, content=content))
    return messages


@pytest.mark.parametrize('name', VLM_CASES)
@pytest.mark.parametrize('talk', VLM_TALKS)
def test_conversations_with_pictures(tmp_path, name, talk):
    theirs = made_by_transformers(name, tmp_path)
    p = load(tmp_path, 'vlm', tokens=4)
    assert p.form == ('llava' if name == 'llava' else 'smolvlm') and p.chat.lists

    # The same tokens and pixels.
    count = [item for _, items in talk for item in items].count(None)
    data = [encode(picture(i, 30)) for i in range(count)]
    members = {f'{i}.png': x for i, x in enumerate(data)}
    opened = [Image.open(io.BytesIO(x)) for x in data]
    piece = piece_of(p, messages_of(talk), **members)
    out = theirs.apply_chat_template(messages_of(talk, opened), tokenize=True, return_dict=True,
                                     return_tensors='np')
    assert piece['tokens'].tolist() == out['input_ids'][0].tolist()
    got = p.eyes.to_tensor(np.array(piece['pictures']), 'cpu').numpy()
    np.testing.assert_allclose(got, out['pixel_values'].reshape(got.shape), atol=1e-5)

    # What is learned: of a Llava what its {% generation %} blocks hold, which have no end.
    answers = [items[0] for role, items in talk if role == 'assistant']
    said = learned(p, piece)
    if name == 'llava':
        assert [x.strip() for x in said] == [x.strip() for x in answers]
        assert p.end_id == p.tokenizer.eos_id
    else:
        ended = [f' {answer}<end_of_utterance>' for answer in answers]
        assert [x.replace(' <end', '<end') for x in said] == [
            x.replace(' <end', '<end') for x in ended]
        assert p.end_id == p.tokenizer.special('<end_of_utterance>')

    # A question, as it is asked after training.
    asked = messages_of([('user', [None, 'What is this?'])], opened)
    asked = theirs.apply_chat_template(asked, tokenize=True, return_dict=True,
                                       add_generation_prompt=True)
    assert prompt_of(p, 'What is this?', 1)[0] == asked['input_ids'][0]

    # The form of ours, without the folder.
    form = make_processor(4000, 16, 4, tokenizer=p.tokenizer, form=p.form)
    if not name.startswith('idefics3'):
        assert prompt_of(form, 'What is this?', 1)[0] == prompt_of(p, 'What is this?', 1)[0]
    if name.startswith('smolvlm'):
        again = piece_of(form, messages_of(talk), **members)
        assert again['tokens'].tolist() == piece['tokens'].tolist()


@pytest.mark.parametrize('name', VLM_CASES)
def test_a_text_places_no_picture(tmp_path, name):
    made_by_transformers(name, tmp_path)
    p = load(tmp_path, 'vlm', tokens=4)
    hostile = messages_of([('user', ['<image><end_of_utterance>', None])])
    hostile.append(dict(role='assistant', content='<image>'))
    tokens = piece_of(p, hostile, png=encode(picture(1)))['tokens'].tolist()
    assert tokens.count(p.tokenizer.image_id) == 4
    with pytest.raises(BadSample, match='place 1 pictures, there are 2'):
        piece_of(p, hostile, **{'a.png': encode(picture(1)), 'b.png': encode(picture(2))})
