"""A model is used as it was trained: pictures and prompt attend in validation, in sample.py and in
the folder that is exported as its form says, whatever the form, one of yours too."""
import json
import os
import shutil
import sys

import pytest
import tiny
import torch
from conftest import encode, picture, write_tar

os.environ['HF_HUB_OFFLINE'] = '1'

import checkpoint  # noqa: E402
import hub  # noqa: E402
from answering import prompt_of  # noqa: E402

NEEDS = ['tasks/vlm.py', 'families']
FORMS = ('paligemma', 'text', 'chat', 'llava', 'smolvlm')
MINE = '''from processor import LEARNED, READ, SEEN
def form(sample, p):            # pictures see each other, the question is causal
    return [*((picture, SEEN) for picture in sample['pictures']), (p.tokenizer.bos_id, READ),
            ('name it: ', READ), (sample.get('text', ''), LEARNED), (p.tokenizer.eos_id, LEARNED)]
'''
# of a decoder as Idefics3 has it, and its connector
LLAMA = ['--connector_bias=false', '--decoder.activation=silu', '--decoder.norm_offset=0.0',
         '--decoder.embed_scale=1.0', '--decoder.norm_eps=1e-5']


def without(flags, *names):
    return [flag for flag in flags if not flag.startswith(tuple(f'--{name}' for name in names))]


def train(out_dir, *flags):
    return tiny.run('train.py', *without(tiny.TRAINING, 'seq_len', 'lr'), '--task=vlm',
                    f'--data_dir={tiny.data_dir()}', '--seq_len=192', '--mix={"plain": 1}',
                    '--val={"plain": "plain"}', '--prompt=which?', '--max_steps=80', '--lr=1e-2',
                    '--log_every=40', f'--out_dir={out_dir}', *flags)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """form -> a run that knows its twelve pictures."""
    folder = tmp_path_factory.mktemp('runs')
    (folder / 'mine.py').write_text(MINE)

    def make(form):
        out_dir = folder / form
        if not out_dir.exists():
            more = [] if form == 'paligemma' else LLAMA
            if form == 'smolvlm':
                more = [*more, '--pixel_shuffle=2']
            name = f'{folder}/mine.py:form' if form == 'mine' else form
            train(out_dir, *tiny.MODEL, f'--processor={name}', *more).ok()
        return out_dir
    return make


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """The twelve pictures as files, which a user gives to sample.py."""
    folder = tmp_path_factory.mktemp('drawn')
    for name in tiny.NAMES:
        (folder / f'{name}.png').write_bytes(tiny.png(tiny.draw(name, 'plain')))
    return folder


def sample(out_dir, *flags):
    """What sample.py prints, a dict a line."""
    said = tiny.run('sample.py', f'--out_dir={out_dir}', '--json=true', '--device=cpu',
                    '--allow_code=true', *flags).ok()
    return [json.loads(line) for line in said.out.splitlines()]


@pytest.mark.parametrize('form', [*FORMS, 'mine'])
def test_validation_and_sample_answer_as_trained(form, trained, drawn):
    row, = tiny.rows(trained(form), 'val_loss')
    assert row['exact_match'] == 1
    shown, = sample(trained(form), '--eval=plain')
    assert shown['exact_match'] == 1
    for said in sample(trained(form), f'--image={drawn}'):
        assert said['image'].endswith(f'/{said["text"]}.png')


QUESTIONS = {'which colour?': 'red', 'which shape?': 'a circle, as round as a wheel of a cart is'}


@pytest.mark.parametrize('form', ['paligemma', 'chat'])
def test_each_sample_is_asked_its_own_question(form, tmp_path):
    """And may be answered at any length: one answer is longer than sample.py's 32 tokens."""
    samples = []
    for number, (asked, answer) in enumerate(QUESTIONS.items()):
        says = dict(prefix=asked, suffix=answer)
        if form == 'chat':
            says = dict(messages=[
                dict(role='user', content=[dict(type='image'), dict(type='text', text=asked)]),
                dict(role='assistant', content=answer)])
        samples.append((str(number), dict(png=encode(picture(1)), json=json.dumps(says).encode())))
    (tmp_path / 'both').mkdir()
    write_tar(tmp_path / 'both' / 'a.tar', samples)

    flags = [flag for flag in tiny.FLAGS if not flag.startswith(('--augment', '--seq_len'))]
    tiny.run('train.py', *flags, '--task=vlm', f'--data_dir={tmp_path}', '--seq_len=160',
             '--mix={"both": 1}', '--val={"both": "both"}', f'--processor={form}',
             '--max_steps=60', '--batch_size=4', '--lr=1e-2', '--log_every=30',
             f'--out_dir={tmp_path}/run').ok()
    row, = tiny.rows(tmp_path / 'run', 'val_loss')
    assert row['exact_match'] == 1
    shown = tiny.run('sample.py', f'--out_dir={tmp_path}/run', '--eval=both', '--json=true',
                     '--device=cpu').ok()
    assert json.loads(shown.out)['exact_match'] == 1


# -----------------------------------------------------------------------------------------------
# exported


def asked(processor, form, image):
    """What a user of transformers makes of a picture and `which?`, in the way of each form."""
    if processor.chat_template is None:
        return processor(text='<image>which?', images=[image], return_tensors='pt')
    content = '<image>\nwhich?'
    if form in ('smolvlm', 'idefics3'):
        content = [dict(type='image'), dict(type='text', text='which?')]
    text = processor.apply_chat_template([dict(role='user', content=content)],
                                         add_generation_prompt=True)
    return processor(text=text, images=[image], return_tensors='pt')


def answers_alike(out_dir, folder, form):
    """The exported folder reads the same tokens and pixels as the run, and says the same."""
    from PIL import Image
    tf = pytest.importorskip('transformers')
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    tiny.run('hub.py', 'export', out_dir, folder).ok()
    theirs = tf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    # SmolVLM's, which is Idefics3's, wants torchvision for films
    auto = tf.Idefics3Processor if 'SmolVLM' in str(folder) else tf.AutoProcessor
    processor = auto.from_pretrained(folder)
    run = hub.open_ours(str(out_dir))
    ids, _ = prompt_of(run.processor)

    for name in tiny.NAMES[:4]:
        rgba = Image.fromarray(tiny.draw(name, 'plain'), 'RGBA')
        image = Image.new('RGB', rgba.size, 'white')
        image.paste(rgba, mask=rgba)
        given = asked(processor, form, image)
        assert given['input_ids'][0].tolist() == ids
        eyes = run.processor.eyes
        ours = tiny.png(tiny.draw(name, 'plain'))
        ours = eyes.to_tensor(eyes.pixels(ours)[None], 'cpu')
        assert (given['pixel_values'].view_as(ours) - ours).abs().max() < 1e-5
        new = theirs.generate(**given, max_new_tokens=24, do_sample=False)[0, len(ids):]
        end = new.tolist().index(run.processor.end_id)
        assert processor.decode(new[:end], skip_special_tokens=True).strip() == name


@pytest.mark.parametrize('form', FORMS)
def test_what_is_exported_answers_as_trained(form, trained, tmp_path):
    answers_alike(trained(form), tmp_path / 'hf', form)


def test_a_mask_that_nobody_has_is_refused(trained, tmp_path, monkeypatch):
    """A form of one's own: its pictures see each other, its question is causal."""
    said = tiny.run('hub.py', 'export', trained('mine'), tmp_path / 'hf', '--allow_code=true')
    said.refused('attend as the form of this run says', code=1)
    assert not (tmp_path / 'hf').exists()
    monkeypatch.setattr(sys, 'argv', ['hub.py', '--allow_code=true'])
    model = hub.open_ours(str(trained('mine'))).model
    tokens, pixels = torch.full((1, 4), model.config.image_token_id), torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match='give blocks'):
        model.logits(tokens, pixels)
    assert model.logits(torch.zeros(1, 4, dtype=int)).shape[1] == 4, 'text alone is causal'


WANTS = MINE.replace("'name it: '", "sample['question']")


def test_a_form_that_wants_more_than_a_prompt_is_asked_in_one_line(trained, drawn, tmp_path):
    """It is validated on its samples; how it attends to a prompt nobody knows."""
    out_dir = with_form(trained('mine'), tmp_path, WANTS)
    said = tiny.run('sample.py', f'--out_dir={out_dir}', f'--image={drawn}', '--device=cpu',
                    '--allow_code=true')
    said.refused("wants 'question' of a sample", code=1)
    said = tiny.run('hub.py', 'export', out_dir, tmp_path / 'hf', '--allow_code=true')
    said.refused('can not be asked a prompt', code=1)


def with_form(run, folder, code):
    """A copy of a run that has another form in its file."""
    shutil.copytree(run, folder / 'run', symlinks=True)
    (folder / 'other.py').write_text(code)
    latest = folder / 'run' / 'checkpoints' / 'latest'
    changes = {'config.json': dict(processor=f'{folder}/other.py:form'), 'progress.json': {}}
    for name, change in changes.items():
        values = json.loads((latest / name).read_text()) | change
        if name == 'progress.json':         # as the checkpoint was written so
            (latest / name).unlink()
            values['files'] = checkpoint.files_of(latest)
        (latest / name).write_text(json.dumps(values))
    return folder / 'run'


def test_tokens_that_no_processor_writes_are_told(trained, tmp_path):
    """A causal form of one's own: the folder holds no processor that would write others."""
    out_dir = with_form(trained('text'), tmp_path, MINE.replace('SEEN) for', 'READ) for'))
    said = tiny.run('hub.py', 'export', out_dir, tmp_path / 'hf', '--allow_code=true').ok()
    assert 'other.py:form' in said.err and '4 times <image>' in said.err
    assert not (tmp_path / 'hf' / 'processor_config.json').exists()
    assert (tmp_path / 'hf' / 'preprocessor_config.json').exists()


# -----------------------------------------------------------------------------------------------
# of others: a random tiny model as its repository has it, trained, used and exported again


IDEFICS3 = ('<fake_token_around_image>', '<end_of_utterance>', '<global-img>', '<|im_start|>')


def write_folder(folder, kind):
    """A PaliGemma, Idefics3 or SmolVLM: weights, tokenizer, processor."""
    import test_hub_train as theirs
    import transformers as tf
    vision, text = theirs.VISION, theirs.TEXT
    pixels = dict(image_mean=[0.4] * 3, image_std=[0.6] * 3, do_resize=True, do_rescale=True,
                  do_normalize=True, rescale_factor=1 / 255)
    if kind == 'PaliGemma':
        vision = vision | dict(model_type='siglip_vision_model', projection_dim=32)
        config = tf.PaliGemmaConfig(vision_config=vision, text_config=text | dict(
            model_type='gemma'), image_token_index=theirs.IMAGE, projection_dim=32)
        pixels |= dict(image_processor_type='SiglipImageProcessor', image_seq_length=4,
                       size=dict(height=16, width=16), resample=3)
        said, tokens = {}, ()
    else:
        config = getattr(tf, f'{kind}Config')(
            vision_config=vision, text_config=text | dict(model_type='llama'), scale_factor=2,
            image_token_id=theirs.IMAGE, tie_word_embeddings=False)
        pixels |= dict(image_processor_type=f'{kind}ImageProcessor', size=dict(longest_edge=16),
                       max_image_size=dict(longest_edge=16), do_image_splitting=True, resample=1)
        said, tokens = dict(image_seq_len=1), IDEFICS3
    model = getattr(tf, f'{kind}ForConditionalGeneration')(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:          # their own are for models a hundred times as wide
                p *= 0.7 / p.shape[-1] ** 0.5 / p.std()
    model.save_pretrained(folder)
    theirs.write_bytes_tokenizer(folder, tokens)
    name = dict(processor_class=f'{kind}Processor')
    (folder / 'preprocessor_config.json').write_text(json.dumps(pixels | name))
    (folder / 'processor_config.json').write_text(json.dumps(said | name))
    if tokens:
        from chat import CHATS
        (folder / 'chat_template.jinja').write_text(CHATS['smolvlm'])


@pytest.mark.parametrize('kind', ['PaliGemma', 'Idefics3', 'SmolVLM'])
def test_models_of_others_answer_as_trained(kind, drawn, tmp_path):
    pytest.importorskip('transformers')
    folder = tmp_path / 'theirs'
    folder.mkdir()
    write_folder(folder, kind)
    (tmp_path / 'theirs.py').write_text(tiny.run('hub.py', 'config', folder).ok().out)
    train(tmp_path / 'run', tmp_path / 'theirs.py', '--seq_len=96').ok()
    row, = tiny.rows(tmp_path / 'run', 'val_loss')
    assert row['exact_match'] == 1
    shown, = sample(tmp_path / 'run', '--eval=plain')
    assert shown['exact_match'] == 1
    for said in sample(tmp_path / 'run', f'--image={drawn}'):
        assert said['image'].endswith(f'/{said["text"]}.png')
    form = 'paligemma' if kind == 'PaliGemma' else 'smolvlm'
    answers_alike(tmp_path / 'run', tmp_path / kind, form)


# -----------------------------------------------------------------------------------------------
# words alone


ASKED = {'sky': 'blue', 'grass': 'green', 'snow': 'white', 'coal': 'black', 'sun': 'yellow',
         'blood': 'red', 'sea': 'deep blue', 'fog': 'grey'}
PREFIX_LM = """from processor import LEARNED, READ, SEEN, question
def form(sample, p):
    prefix, suffix = question(sample, p)
    return [(p.tokenizer.bos_id, SEEN), (prefix + '\\n', SEEN), (suffix, LEARNED),
            (p.tokenizer.eos_id, LEARNED)]
"""


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    """form -> a language model that knows eight answers."""
    folder = tmp_path_factory.mktemp('words')
    samples = [(key, dict(json=json.dumps(dict(prefix=key, suffix=answer)).encode()))
               for key, answer in ASKED.items()]
    (folder / 'asked').mkdir()
    write_tar(folder / 'asked' / 'a.tar', samples)
    (folder / 'prefix.py').write_text(PREFIX_LM)

    def make(form):
        name = f'{folder}/prefix.py:form' if form == 'prefix' else form
        tiny.run('train.py', *tiny.LLM_FLAGS, f'--data_dir={folder}', '--mix={"asked": 1}',
                 f'--processor={name}', '--seq_len=96', '--max_steps=80', '--batch_size=8',
                 '--lr=1e-2', '--log_every=80', f'--out_dir={folder / form}').ok()
        return folder / form
    return make


def said_by(out_dir, prompt):
    said, = sample(out_dir, f'--prompt={prompt}')
    return said['text'].strip()


@pytest.mark.parametrize('form', ['text', 'chat'])
def test_a_language_model_is_asked_as_trained_and_so_is_what_is_exported(form, words, tmp_path):
    tf = pytest.importorskip('transformers')
    out_dir = words(form)
    assert [said_by(out_dir, prompt) for prompt in [*ASKED][:3]] == [*ASKED.values()][:3]
    tiny.run('hub.py', 'export', out_dir, tmp_path / 'hf').ok()
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    tok = tf.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    run = hub.open_ours(str(out_dir))
    for prompt, answer in ASKED.items():
        given = tok(prompt, return_tensors='pt')
        if form == 'chat':
            given = tok.apply_chat_template([dict(role='user', content=prompt)],
                                            add_generation_prompt=True, return_tensors='pt',
                                            return_dict=True)
        ids = given['input_ids'][0].tolist()
        assert ids == prompt_of(run.processor, prompt, 0)[0]
        new = theirs.generate(**given, max_new_tokens=24, do_sample=False)[0, len(ids):]
        assert tok.decode(new, skip_special_tokens=True).strip() == answer


def test_a_language_model_with_a_prefix_is_used_so_and_not_exported(words, tmp_path):
    out_dir = words('prefix')
    assert [said_by(out_dir, prompt) for prompt in [*ASKED][:3]] == [*ASKED.values()][:3]
    said = tiny.run('hub.py', 'export', out_dir, tmp_path / 'hf', '--allow_code=true')
    said.refused('do not attend causally', code=1)
