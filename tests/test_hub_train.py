"""Models of transformers in the real commands: train.py from a folder of theirs, on one process
and two, export, the Hub's protocol, and their models as towers."""
import http.server
import json
import os
import re
import threading
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file

os.environ['HF_HUB_OFFLINE'] = '1'
tf = pytest.importorskip('transformers')

import hub  # noqa: E402
import tokenizer as tokenizers  # noqa: E402
from families import processors  # noqa: E402
from families.towers import HFDecoder  # noqa: E402
from generate import generate  # noqa: E402
from model import DecoderConfig  # noqa: E402

tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()

NEEDS = 'tasks/vlm.py', 'tasks/vla.py'
IMAGE, VOCAB = 259, 264
VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
              image_size=16, patch_size=8)
TEXT = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, bos_token_id=256,
            eos_token_id=257, pad_token_id=258)
FLAGS = ['--device=cpu', '--lanes=8', '--window=4', '--workers=0', '--batch_size=12',
         '--seq_len=48', '--log_every=1', '--micro_batch_size=3', '--max_steps=3', '--epochs=0',
         '--dtype=float32', '--compile=false', '--warmup=0', '--num_checkpoints=1',
         '--mix={"plain": 1.0}', '--ema=0.5']


def save(model, folder):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        scale = 0.1 if p.ndim == 1 else 0.7 / p.shape[-1] ** 0.5
        p.data.copy_(torch.randn(p.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return Path(folder)


def write_bytes_tokenizer(folder, more=()):
    names = dict(enumerate(('<bos>', '<eos>', '<pad>', '<image>', *more), 256))
    how = dict(special=True, normalized=False, lstrip=False, rstrip=False, single_word=False)
    added = {str(i): dict(content=text) | how for i, text in names.items()}
    (folder / 'tokenizer.json').write_text(json.dumps(processors.bytes_tokenizer(added)))
    (folder / 'tokenizer_config.json').write_text(json.dumps(dict(
        tokenizer_class='PreTrainedTokenizerFast', bos_token='<bos>', eos_token='<eos>',
        pad_token='<pad>', image_token='<image>')))


@pytest.fixture(scope='module')
def pali(tmp_path_factory):
    """A PaliGemma with random weights as its repository has it: weights, tokenizer, processor."""
    theirs = tf.PaliGemmaForConditionalGeneration(tf.PaliGemmaConfig(
        vision_config=VISION | dict(model_type='siglip_vision_model', projection_dim=32),
        text_config=TEXT | dict(model_type='gemma'), image_token_index=IMAGE, projection_dim=32))
    folder = save(theirs, tmp_path_factory.mktemp('pali'))
    write_bytes_tokenizer(folder)
    (folder / 'preprocessor_config.json').write_text(json.dumps(dict(
        image_processor_type='SiglipImageProcessor', processor_class='PaliGemmaProcessor',
        image_seq_length=4, size=dict(height=16, width=16), image_mean=[0.5] * 3,
        image_std=[0.5] * 3, resample=3, do_resize=True, do_rescale=True, do_normalize=True,
        rescale_factor=1 / 255)))
    (folder / 'processor_config.json').write_text(
        json.dumps(dict(processor_class='PaliGemmaProcessor')))

    # What a user would begin with.
    settings = tiny.run('hub.py', 'config', folder).ok().out
    (folder / 'tiny.py').write_text(settings)
    return folder


def train(pali, out_dir, *flags, **kwargs):
    return tiny.run('train.py', 'config/pali.py', pali / 'tiny.py', *FLAGS,
                    f'--data_dir={tiny.data_dir()}', f'--out_dir={out_dir}', *flags, **kwargs)


@pytest.fixture(scope='module')
def run(pali, tmp_path_factory):
    """config/pali.py on the tiny PaliGemma, one process."""
    out_dir = tmp_path_factory.mktemp('run') / 'one'
    result = train(pali, out_dir, '--lr=1e-3').ok()
    assert re.search(r'init_from .*\(connector, decoder, vit\) loaded, none begin anew, none left',
                     result.out)
    return out_dir


def test_config_pali_on_ranks_and_shards(pali, run, tmp_path):
    want = tiny.rows(run)
    for name, flags in (('ddp', ['--fsdp=1']), ('fsdp', ['--fsdp=0'])):
        train(pali, tmp_path / name, '--lr=1e-3', *flags, torchrun=2).ok()
        for a, b in zip(tiny.rows(tmp_path / name), want, strict=True):
            assert abs(a['loss'] - b['loss']) < 1e-5
            assert abs(a['grad_norm'] - b['grad_norm']) < 1e-3


def test_config_pi0_like(pali, tmp_path):
    """config/pi0_like.py begins from the tiny PaliGemma, on a robot with fewer numbers and one
    camera of three."""
    import io

    import numpy as np
    import webdataset
    (tmp_path / 'robot').mkdir()
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(tmp_path / 'robot' / '0.tar'), encoder=False) as tar:
        for i in range(12):
            file = io.BytesIO()
            np.savez(file, proprio=rng.standard_normal(5), actions=rng.uniform(-1, 1, (4, 3)),
                     is_pad=np.arange(4) > i)
            tar.write({'__key__': f's{i}', 'json': b'{"instruction": "look"}',
                       'lowdim.npz': file.getvalue(),
                       'base.png': tiny.png(tiny.draw('red disc', 'plain'))})
    tiny.run('prepare/stats.py', f'--data={tmp_path / "robot"}',
             f'--cache_dir={tmp_path / "cache"}').ok()
    done = tiny.run('train.py', 'config/pi0_like.py', pali / 'tiny.py', *FLAGS,
                    f'--data_dir={tmp_path}', '--fsdp=1', '--mix={"robot": 1.0}',
                    f'--out_dir={tmp_path / "run"}', '--action_steps=6', '--action_dim=4',
                    '--proprio_dim=6', '--task=vla', '--vla.width=16', '--vla.mlp_dim=24',
                    '--cameras_of={"robot": {"base": "base"}}').ok()
    assert re.search(
        r'\(connector, decoder, vit\) loaded, action_in, .*expert.* begin anew, none left',
        done.out)
    assert len(tiny.rows(tmp_path / 'run')) == 3

    # Nobody else has such a model, and half of it is not what was asked for.
    export = tiny.run('hub.py', 'export', tmp_path / 'run', tmp_path / 'out')
    export.refused('a VLA can not be exported', 'action_in', 'expert', code=1)
    assert len(export.err.splitlines()) == 1 and not (tmp_path / 'out').exists()


def test_frozen_parts_have_no_state_and_are_not_saved_twice(run):
    latest = run / 'checkpoints' / 'latest'
    state = [name for file in (latest / 'state').glob('*.safetensors')
             for name in safe_open(file, 'pt').keys()]
    assert state and not [name for name in state if 'vit.' in name]
    saved, averages = (load_file(latest / p / 'model.safetensors') for p in ('', 'ema'))
    assert {k for k in saved if k not in averages} == {k for k in saved if k.startswith('vit.')}
    model = hub.open_ours(str(run)).model.state_dict()
    assert all(torch.equal(model[k], averages.get(k, saved[k])) for k in model)


def test_export_of_a_run_in_transformers(run, tmp_path):
    from PIL import Image
    tiny.run('hub.py', 'export', run, tmp_path / 'hf').ok()
    theirs = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / 'hf').eval()
    ours = hub.open_ours(str(run)).model
    processor = tf.AutoProcessor.from_pretrained(tmp_path / 'hf')
    picture = Image.fromarray(tiny.draw('red disc', 'dark'), 'RGBA').convert('RGB')
    picture.save(tmp_path / 'a.png')
    inputs = processor(images=picture, text='caption en', return_tensors='pt')
    prefix = [IMAGE] * 4 + [256] + list(b'caption en\n')
    assert inputs['input_ids'][0].tolist() == prefix

    # The same numbers, and the same words.
    with torch.no_grad():
        want = theirs(**inputs).logits
        got = ours.logits(torch.tensor([prefix]), inputs['pixel_values'])
    assert (want - got).abs().max() < 1e-5
    new = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(prefix):]
    said = tiny.run('sample.py', f'--out_dir={run}', f'--image={tmp_path / "a.png"}',
                    '--device=cpu', '--max_new_tokens=8').ok().out
    assert said.rstrip('\n') == processor.decode(new, skip_special_tokens=True).rstrip('\n')
    assert theirs.generation_config.eos_token_id == 257
    tiny.run('hub.py', 'export', run, tmp_path / 'half', '--dtype=bfloat16').ok()
    half = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / 'half')
    assert half.dtype == torch.bfloat16


def test_a_run_of_bytes_reads_the_same_text_in_transformers(tmp_path):
    """A language model from nothing, by our settings alone, exported: ids and logits are ours."""
    # an llm has no pictures
    flags = [flag for flag in tiny.FLAGS if not flag.startswith(('--vit.', '--augment'))]
    tiny.run('train.py', '--task=llm', *flags, '--mix={"words": 1.0}',
             f'--data_dir={tiny.data_dir()}', '--max_steps=2',
             f'--out_dir={tmp_path / "run"}').ok()
    tiny.run('hub.py', 'export', tmp_path / 'run', tmp_path / 'hf').ok()
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    ours = hub.from_pretrained(str(tmp_path / 'run'))
    text = 'naïve café\n\t<b>東京</b>  \x00'
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert special == (256, 257, 258)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        assert (theirs(tokens).logits - ours.logits(tokens)).abs().max() < 1e-5


@pytest.mark.parametrize('names', [
    dict(bos_piece='<bos>', eos_piece='<eos>', pad_piece='<pad>', pad_id=0, eos_id=1, bos_id=2,
         unk_id=3),
    dict(pad_id=-1, add_dummy_prefix=True)])
def test_sentencepiece_in_transformers(names, tmp_path):
    """Gemma's and Llama's tokenizer.model: the same ids, special tokens and those that are new,
    too."""
    import sentencepiece
    (tmp_path / 'text').write_text((tiny.ROOT / 'README.md').read_text())
    options = dict(
        input=tmp_path / 'text', model_prefix=str(tmp_path / 'm'), vocab_size=500,
        model_type='bpe', minloglevel=2, byte_fallback=True, normalization_rule_name='identity',
        remove_extra_whitespaces=False, add_dummy_prefix=False)
    sentencepiece.SentencePieceTrainer.train(**options | names)
    ours = tokenizers.load(str(tmp_path / 'm.model'))
    (tmp_path / 'hf').mkdir()
    processors.write_tokenizer(ours, str(tmp_path / 'hf'))
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    spaced = [] if 'add_dummy_prefix' in names else [' x']          # see write_tokenizer
    texts = ['hello world', 'Train a model, turn it into', 'naïve 東京 `code`\n  two', '<b>']
    for text in texts + spaced:
        assert theirs(text, add_special_tokens=False)['input_ids'] == ours.encode(text)
    special = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert special == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert theirs.convert_tokens_to_ids('<image>') == ours.image_id


def test_init_from_says_what_does_not_fit(pali, tmp_path):
    train(pali, tmp_path / 'a', '--decoder.width=48').refused(
        'init_from', 'decoder.width=32 (here 48)', 'hub.py')
    train(pali, tmp_path / 'b', '--init_from=nobody/nothing').refused(
        'nobody/nothing', 'Hugging Face')
    train(pali, tmp_path / 'c', '--vit.image_size=24').refused('image_size 16', 'the model has 24')
    train(pali, tmp_path / 'd', '--tokenizer=nobody/nothing').refused(
        'nobody/nothing', 'Hugging Face')
    tiny.run('hub.py', 'export', tmp_path / 'gone', tmp_path / 'x').refused(
        'gone', 'config.json', code=1)


def test_the_command_line_says_what_it_knows():
    result = tiny.run('hub.py', 'expert')
    assert result.code == 2 and 'python hub.py export' in result.err
    assert 'Traceback' not in result.err


# ------------------------------------------------------------------------------------------------
# any model of transformers as a tower


@pytest.fixture(scope='module')
def towers(tmp_path_factory):
    text, vision = TEXT | dict(attention_dropout=0.1), VISION | dict(attention_dropout=0.1)
    llama = save(tf.LlamaForCausalLM(tf.LlamaConfig(**text)), tmp_path_factory.mktemp('llama'))
    clip = save(tf.CLIPVisionModel(tf.CLIPVisionConfig(**vision)), tmp_path_factory.mktemp('clip'))
    return llama, clip


# With positions of their own, without rotary ones, with windows, with both kinds of layers.
PLAIN = {key: value for key, value in TEXT.items() if key != 'head_dim'}
SEVEN = TEXT | dict(num_hidden_layers=7)
NEOX = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4)


@pytest.mark.parametrize('model, depth', [
    (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)), 2),
    (lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**NEOX)), 2),
    (lambda: tf.MistralForCausalLM(tf.MistralConfig(**TEXT, sliding_window=5)), 2),
    (lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SEVEN, sliding_window=5)), 7),
    (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**PLAIN)), 2)])
def test_decoders_of_transformers_behind_our_calls(model, depth, tmp_path):
    theirs = model()
    save(theirs.eval(), tmp_path)
    ours = HFDecoder(DecoderConfig(hf=str(tmp_path)), 60).eval()
    tokens = torch.randint(3, 60, (2, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    want = theirs(tokens, attention_mask=mask, position_ids=positions).logits
    assert (ours.logits(tokens, segments=mask) - want)[mask.bool()].abs().max() < 1e-5

    # Bidirectional: the first token sees the last.
    prefix = torch.zeros_like(tokens)
    assert (ours.logits(tokens, blocks=prefix) - ours.logits(tokens))[:, 0].abs().max() > 1e-3

    # Greedy, by a cache and without.
    new = theirs.generate(tokens * mask, attention_mask=mask, max_new_tokens=9, do_sample=False,
                          eos_token_id=98, pad_token_id=0)[:, 14:].tolist()
    got = generate(ours, tokens * mask, max_new_tokens=9, eos_id=98)
    assert got == [row[:row.index(98)] if 98 in row else row for row in new]
    assert generate(ours, tokens * mask, max_new_tokens=9, eos_id=98, use_cache=False) == got

    # Its dropout, which knows no positions, is off (GPT-2's is on by default).
    assert torch.equal(ours.train().logits(tokens), ours.eval().logits(tokens))

    # FSDP and torch.compile find its layers.
    blocks = [module for module in ours.modules() if getattr(module, 'is_block', False)]
    assert len(blocks) == depth


def test_a_model_that_does_more_than_its_layers_is_refused(tmp_path):
    """Granite scales its logits: to leave that out in silence would train another model."""
    save(tf.GraniteForCausalLM(tf.GraniteConfig(**PLAIN, logits_scaling=8.0)), tmp_path)
    with pytest.raises(ValueError, match='does more than its layers'):
        HFDecoder(DecoderConfig(hf=str(tmp_path)), 60)


def test_towers_of_transformers_train_and_speak(towers, tmp_path):
    """Llama and CLIP: DDP and FSDP as one process, and captions by their cache."""
    llama, clip = towers
    flags = [f'--decoder.hf={llama}', f'--vit.hf={clip}', '--vit.image_size=16',
             '--vit.patch_size=8', *FLAGS, '--seq_len=32', '--lr=1e-3',
             f'--data_dir={tiny.data_dir()}', '--ema=0']

    def losses(name, *more, **kwargs):
        done = tiny.run('train.py', *flags, f'--out_dir={tmp_path / name}', *more, **kwargs).ok()
        assert done.err.count('attention_dropout=0.1 is not used') == 2
        return [row['loss'] for row in tiny.rows(tmp_path / name)]

    want = losses('one', '--num_checkpoints=3')
    ddp = losses('ddp', torchrun=2)
    sharded = losses('fsdp', '--fsdp=0', '--decoder.remat=true', torchrun=2)
    for got in (ddp, sharded):
        assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < 1e-5
    said = tiny.run('sample.py', f'--out_dir={tmp_path / "one"}',
                    '--image=' + str(picture(tmp_path)), '--device=cpu', '--max_new_tokens=6',
                    '--json=true').ok().out
    assert 'text' in json.loads(said)
    tiny.run('hub.py', 'export', tmp_path / 'one', tmp_path / 'hf').refused('decoder.hf', code=1)


def picture(folder):
    path = folder / 'b.png'
    path.write_bytes(tiny.png(tiny.draw('red disc', 'plain')))
    return path


def test_a_tower_brings_its_own_shape(towers, tmp_path):
    llama, clip = towers
    cases = {'decoder.width=64': [f'--decoder.hf={llama}', '--decoder.width=64'],
             '--vit.image_size': [f'--vit.hf={clip}', '--vit.image_size=32', '--vit.patch_size=8'],
             'Hugging Face': ['--decoder.hf=nobody/nothing']}
    for said, flags in cases.items():
        tiny.run('train.py', *FLAGS, f'--data_dir={tiny.data_dir()}', f'--out_dir={tmp_path}',
                 *flags).failed(said, code=2)


# ------------------------------------------------------------------------------------------------
# the Hub: its protocol, spoken by huggingface_hub to a server that holds a few files


class Hub(http.server.BaseHTTPRequestHandler):
    files, pushed, sha = {}, {}, 'a' * 40

    def log_message(self, *args):
        pass

    def answer(self, body, code=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        headers = {'Content-Length': str(len(body)), 'X-Repo-Commit': self.sha} | headers
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def do_GET(self):
        if '/resolve/' in self.path:
            name = self.path.split('/resolve/')[1].partition('/')[2].partition('?')[0]
            return self.answer(self.files[name], ETag=f'"{hash(self.files[name]) & 0xffffffff:x}"')
        siblings = [dict(rfilename=name) for name in self.files]
        if '/tree/' in self.path:
            return self.answer([dict(type='file', path=name, size=len(content), oid='0' * 40)
                                for name, content in self.files.items()])
        if self.path.startswith('/api/models/owner/tiny'):
            return self.answer(
                dict(id='owner/tiny', modelId='owner/tiny', sha=self.sha, siblings=siblings))
        self.answer(dict(error='Repository not found'), 404, **{'X-Error-Code': 'RepoNotFound'})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.path.endswith('/repos/create'):
            url = f'http://{self.headers["Host"]}/owner/new'
            return self.answer(dict(url=url, name='owner/new', id='owner/new'))
        if '/preupload/' in self.path:
            asked = json.loads(body)['files']
            return self.answer(dict(files=[
                dict(path=file['path'], uploadMode='regular', shouldIgnore=False)
                for file in asked]))
        if '/commit/' in self.path:
            for line in body.decode().splitlines():
                row = json.loads(line)
                if row['key'] == 'file':
                    self.pushed[row['value']['path']] = row['value']
            url = f'http://{self.headers["Host"]}/owner/new/commit/1'
            return self.answer(dict(commitUrl=url, commitOid='b' * 40, success=True,
                                    pullRequestUrl=None))
        self.answer(dict(type='ok'))


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


def test_a_repository_is_fetched_once_and_a_run_is_pushed(pali, run, server, tmp_path):
    Hub.files = {p.name: p.read_bytes() for p in pali.iterdir()} | {
        'pytorch_model.bin': b'pickle', 'run.py': b'evil'}
    env = dict(HF_ENDPOINT=server, HF_HOME=str(tmp_path / 'hf'), HF_HUB_OFFLINE='0',
               HF_TOKEN='hf_x', HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')
    flags = [f'--{key}=owner/tiny' for key in ('init_from', 'tokenizer', 'processor')]
    train(pali, tmp_path / 'a', '--lr=1e-3', *flags, env=env, real=True).ok()
    assert tiny.losses(tmp_path / 'a') == tiny.losses(run)
    fetched = {p.name for p in (tmp_path / 'hf').rglob('*') if p.is_file() or p.is_symlink()}
    assert 'model.safetensors' in fetched and not fetched & {'pytorch_model.bin', 'run.py'}

    # From the cache, and by its name.
    offline = env | dict(HF_HUB_OFFLINE='1')
    train(pali, tmp_path / 'b', '--lr=1e-3', *flags, env=offline, real=True).ok()
    config = tiny.run('hub.py', 'config', 'owner/tiny', env=offline, real=True).ok().out
    for key in ('init_from', 'tokenizer', 'processor'):
        assert f"{key} = 'owner/tiny'\n" in config

    out = tiny.run('hub.py', 'push', run, 'owner/new', env=env, real=True).ok().out
    assert 'commit' in out
    assert {'README.md', 'config.json', 'model.safetensors', 'tokenizer.json',
            'preprocessor_config.json'} <= set(Hub.pushed)
    import base64
    card = base64.b64decode(Hub.pushed['README.md']['content']).decode()
    assert 'plain (1)' in card and 'config/pali.py' in card and '| train | 3 |' in card
    tiny.run('hub.py', 'push', run, 'owner/new', env=env | dict(HF_ENDPOINT='http://127.0.0.1:9'),
             real=True).refused('owner/new', 'could not be written', code=1)
