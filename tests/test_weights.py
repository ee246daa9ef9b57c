"""Every tensor of what is opened is loaded, new or unused, and said to be; weights that are of no
use are refused by name. Random tiny models that transformers saves are the referee."""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

os.environ['HF_HUB_OFFLINE'] = '1'
tf = pytest.importorskip('transformers')

import accounting  # noqa: E402
import checkpoint  # noqa: E402
import hub  # noqa: E402
import initial  # noqa: E402
import tasks  # noqa: E402
import tokenizer as tokenizers  # noqa: E402
from families import huggingface, processors  # noqa: E402
from families.towers import HFDecoder, HFViT  # noqa: E402
from model import VLM, Decoder, DecoderConfig, ViT, ViTConfig  # noqa: E402

NEEDS = 'tasks/vlm.py', 'tasks/vla.py', 'tasks/siglip.py'
tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()

TEXT = dict(vocab_size=107, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=96,
            bos_token_id=1, eos_token_id=2, pad_token_id=0)
VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
              image_size=16, patch_size=8)
WORDS = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
             num_attention_heads=3)
EYES = VISION | dict(model_type='siglip_vision_model', projection_dim=32, vision_use_head=False)
UP = 'model.layers.1.mlp.up_proj.weight'
MODELS = {
    'llama': lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
    'tied': lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=True)),
    'gemma3': lambda: tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(
        vision_config=EYES, text_config=TEXT | dict(sliding_window=5), mm_tokens_per_image=4,
        image_token_index=98, boi_token_index=97, eoi_token_index=96)),
    'paligemma': lambda: tf.PaliGemmaForConditionalGeneration(tf.PaliGemmaConfig(
        vision_config=EYES, text_config=TEXT | dict(model_type='gemma'), image_token_index=98,
        projection_dim=32)),
    'idefics3': lambda: tf.Idefics3ForConditionalGeneration(tf.Idefics3Config(
        vision_config=VISION, text_config=TEXT | dict(model_type='llama'), image_token_id=98,
        scale_factor=2, tie_word_embeddings=False)),
    'siglip': lambda: tf.SiglipModel(tf.SiglipConfig(vision_config=VISION, text_config=WORDS)),
    'siglip_vision': lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION)),
    'clip': lambda: tf.CLIPModel(tf.CLIPConfig(
        vision_config=VISION, text_config=WORDS | dict(eos_token_id=2), projection_dim=8))}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """kind -> its folder, as transformers writes it."""
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = tmp_path_factory.mktemp(kind)
            MODELS[kind]().save_pretrained(made[kind])
        return made[kind]
    return make


@pytest.fixture
def changed(saved, tmp_path):
    """A copy of a kind's folder, its settings and weights changed; where it is."""
    def make(kind, weights=None, **settings):
        folder = tmp_path / f'{len(list(tmp_path.iterdir()))}'
        shutil.copytree(saved(kind), folder)
        if settings:
            config = json.loads((folder / 'config.json').read_text()) | settings
            (folder / 'config.json').write_text(json.dumps(config))
        if weights:
            tensors = load_file(folder / 'model.safetensors')
            weights(tensors)
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
        return str(folder)
    return make


def refused(call, *words):
    """What it raises: one line that holds all of the words."""
    with pytest.raises(ValueError) as caught:
        call()
    said = str(caught.value)
    assert '\n' not in said and all(word in said for word in words), said
    return said


# ------------------------------------------------------------------------------------------------
# weights of others that are not loaded as they are


def other_head(tensors):
    tensors['lm_head.weight'] = torch.randn(107, 32)


def same_head(tensors):
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].clone()


def put(value):
    def change(tensors):
        tensors[UP][3, 4] = value
    return change


def cast(dtype, ending=''):
    def change(tensors):
        tensors[UP] = tensors[UP].mul(100).to(dtype)
        if ending:
            tensors[UP.replace('weight', ending)] = torch.ones(48)
    return change


def gptq(tensors):
    del tensors[UP]
    for ending in ('qweight', 'qzeros', 'scales', 'g_idx'):
        tensors[UP.replace('weight', ending)] = torch.ones(4)


def half(tensors):
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


EIGHT = dict(quant_method='bitsandbytes', load_in_8bit=True)
USELESS = {
    'extra layers': ('llama', None, dict(num_hidden_layers=2), ['layers.2.', 'config.json']),
    'another head': ('tied', other_head, {}, ['tie_word_embeddings=true', 'output layer']),
    'nan': ('llama', put(float('nan')), {}, [UP, 'NaN']),
    'infinity': ('llama', put(-float('inf')), {}, [UP, 'infinity']),
    'int8': ('llama', cast(torch.int8), {}, [UP, 'dequantize']),
    'float8': ('llama', cast(torch.float8_e4m3fn), {}, [UP, 'dequantize']),
    'float8 with scales': ('llama', cast(torch.float8_e4m3fn, 'weight_scale_inv'), {},
                           ['weight_scale_inv', 'dequantize']),
    'bitsandbytes': ('llama', cast(torch.int8, 'SCB'), {}, ['SCB', 'dequantize']),
    'gptq': ('llama', gptq, {}, ['qweight', 'dequantize']),
    'said in config.json': ('llama', None, dict(quantization_config=EIGHT),
                            ['quantization_config', 'bitsandbytes', 'dequantize'])}


@pytest.mark.parametrize('case', USELESS)
def test_weights_of_no_use_are_refused_wherever_they_are_opened(changed, case):
    kind, weights, settings, words = USELESS[case]
    folder = changed(kind, weights, **settings)
    refused(lambda: hub.from_pretrained(folder), *words)
    refused(lambda: HFDecoder(DecoderConfig(hf=folder), 60), *words)
    if not settings:
        config = huggingface.read_config(folder)
        refused(lambda: initial.begin(Decoder(config), folder, [], ''), *words)


def test_what_is_the_same_is_loaded_and_said(changed, capsys):
    tokens = torch.arange(3, 20)[None]
    for kind, weights in (('tied', same_head), ('llama', half)):
        folder = changed(kind, weights)
        theirs = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ours = hub.from_pretrained(folder)
        said = capsys.readouterr().err
        assert ('lm_head.weight not needed (the embedding once more)' in said) == (kind == 'tied')
        tower = HFDecoder(DecoderConfig(hf=folder), 60)
        assert 'tensors of a LlamaForCausalLM loaded, none left' in capsys.readouterr().err
        with torch.no_grad():
            want = theirs(tokens).logits
            for model in (ours, tower):
                assert (model.logits(tokens) - want).abs().max() < 1e-4


def test_files_that_are_not_all_there(saved, changed, tmp_path):
    def both(folder, *words):
        refused(lambda: hub.from_pretrained(folder), *words)
        refused(lambda: HFDecoder(DecoderConfig(hf=folder), 60), *words)

    # A shard that its index names, one that has more, and a file beside an index.
    theirs = tf.AutoModelForCausalLM.from_pretrained(saved('llama'))
    theirs.save_pretrained(tmp_path / 'cut', max_shard_size='20KB')
    shards = sorted((tmp_path / 'cut').glob('model-*.safetensors'))
    last = shards[-1].read_bytes()
    shards[-1].unlink()
    both(str(tmp_path / 'cut'), shards[-1].name, 'index')
    shards[-1].write_bytes(last)
    save_file(load_file(shards[-1]) | {'more': torch.ones(1)}, shards[-1], {'format': 'pt'})
    both(str(tmp_path / 'cut'), shards[-1].name, 'more')
    shards[-1].write_bytes(last)
    shutil.copy(saved('llama') / 'model.safetensors', tmp_path / 'cut')
    both(str(tmp_path / 'cut'), 'model.safetensors', 'index', 'old')

    # Cut, and changed where the header is.
    path = os.path.join(changed('llama'), 'model.safetensors')
    whole = open(path, 'rb').read()
    for torn in (whole[:-10], whole[:40] + bytes([whole[40] ^ 4]) + whole[41:]):
        open(path, 'wb').write(torn)
        both(os.path.dirname(path), 'model.safetensors', 'can not be read')

    # Pickles, and an adapter, in a folder of its own or beside a model.
    os.remove(path)
    torch.save({}, os.path.join(os.path.dirname(path), 'pytorch_model.bin'))
    both(os.path.dirname(path), 'pytorch_model.bin', 'pickles run code')
    folder = changed('llama')
    open(os.path.join(folder, 'adapter_config.json'), 'w').write(
        json.dumps(dict(base_model_name_or_path='google/gemma-2b', use_dora=True)))
    both(folder, 'adapter', 'google/gemma-2b', 'merge_and_unload')
    for name in ('config.json', 'model.safetensors'):
        os.remove(os.path.join(folder, name))
    both(folder, 'adapter', 'google/gemma-2b', 'merge_and_unload')
    tiny.run('sample.py', f'--out_dir={folder}').refused('adapter', 'merge_and_unload')


# ------------------------------------------------------------------------------------------------
# a part of a model


def test_less_than_the_whole_is_said(saved, capsys):
    """By from_pretrained, and by init_from in numbers that are true."""
    names = {kind: list(load_file(saved(kind) / 'model.safetensors')) for kind in MODELS}
    for kind, words in (('gemma3', ['vision_tower', 'multi_modal_projector']),
                        ('siglip', ['text_model', 'logit_scale', 'vit.head']),
                        ('siglip_vision', ['vit.head'])):
        model = hub.from_pretrained(str(saved(kind)))
        lines = capsys.readouterr().err.splitlines()
        loaded = len(model.state_dict())
        assert len(lines) == 1 and all(word in lines[0] for word in words), lines
        assert f' {loaded} tensors' in lines[0]
        assert f'({len(names[kind]) - loaded}) left there unused' in lines[0]

    vlm = hub.from_pretrained(str(saved('paligemma')))
    assert not capsys.readouterr().err, 'all of it is loaded'
    line = initial.begin(vlm.decoder, str(saved('paligemma')), [], '')
    unused = len(names['paligemma']) - len(vlm.decoder.state_dict())
    assert line.endswith(f'none begin anew, connector, vit ({unused}) left there unused')
    line = initial.begin(vlm, str(saved('siglip')), ['pos_embed'], '')
    loaded = len(vlm.vit.state_dict()) - 1
    fresh, unused = len(vlm.state_dict()) - loaded, len(names['siglip']) - loaded
    assert f'{loaded} tensors (vit) loaded, connector, decoder, vit ({fresh}) begin anew' in line
    assert f'({unused}) left there unused' in line and 'text_model' in line

    # More rows than there, and layers after the one that is used.
    config = vlm.decoder.config
    some = Decoder(replace(config, feature_layer=0, vocab_size=128))
    line = initial.begin(some, str(saved('paligemma')), [], '')
    unused = len(names['paligemma']) - len(some.state_dict())
    assert f'connector, decoder, vit ({unused}) left there unused; embedding.weight' in line


def test_vision_models_behind_our_calls(saved, capsys):
    HFViT(ViTConfig(hf=str(saved('clip')), image_size=16, patch_size=8))
    line, = capsys.readouterr().err.splitlines()
    assert 'tensors of a CLIPModel loaded' in line and 'text_model' in line


def more_connector(tensors):
    name = 'model.connector.modality_projection.proj.weight'
    tensors[name.replace('weight', 'bias')] = torch.zeros(32)


def resampler(tensors):
    tensors['model.connector.perceiver_resampler.latents'] = torch.zeros(4, 32)


def test_a_connector_that_differs(changed, saved):
    refused(lambda: hub.from_pretrained(changed('idefics3', more_connector)), 'proj.bias')
    refused(lambda: hub.from_pretrained(changed('idefics3', resampler)), 'perceiver_resampler')
    refused(lambda: hub.from_pretrained(changed('idefics3', scale_factor=1)), 'connector.weight')
    model = VLM(replace(huggingface.read_config(saved('idefics3')), pixel_shuffle=1))
    refused(lambda: initial.begin(model, str(saved('idefics3')), [], ''), 'pixel_shuffle=2')


def test_init_skip_is_what_it_says(saved):
    model = hub.from_pretrained(str(saved('llama')))
    begin = lambda *args: initial.begin(*args, '')  # noqa: E731
    refused(lambda: begin(model, str(saved('llama')), ['nothing']), "init_skip: 'nothing'")

    # What is not there is refused, or skipped by name.
    folder = saved('llama').parent / 'headless'
    shutil.copytree(saved('llama'), folder)
    tensors = load_file(folder / 'model.safetensors')
    del tensors['lm_head.weight']
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
    refused(lambda: begin(model, str(folder), []), 'lacks decoder.head.weight')
    refused(lambda: HFDecoder(DecoderConfig(hf=str(folder)), 60), 'lacks lm_head.weight')
    line = begin(model, str(folder), ['^head'])
    assert line.endswith('head (1) begin anew, none left there unused')


def test_big_vision_says_what_it_leaves(tmp_path):
    config = ViTConfig(16, 8, 8, 2, 16, 2)
    rng = np.random.default_rng(0)
    arrays = {}
    for name in ViT(config).state_dict():
        key, layer, _ = huggingface_free_name(name)
        arrays[f'params/{key}'] = rng.standard_normal(SHAPES[key]).astype(np.float32)
    arrays['params/txt/head/kernel'] = arrays['opt/count'] = np.ones(3, np.float32)
    path = str(tmp_path / 'a.npz')
    np.savez(path, **arrays)
    model = Eyes(config)
    line = initial.begin(model, path, [], '')
    assert line.endswith('none begin anew, opt, txt (2) left there unused')

    # Of more layers than here, and not finite.
    refused(lambda: initial.begin(Eyes(replace(config, depth=1)), path, [], ''), '2 layers')
    arrays['params/img/embedding/bias'][0] = np.nan
    np.savez(path, **arrays)
    refused(lambda: initial.begin(model, path, [], ''), 'img/embedding/bias', 'NaN')


class Eyes(torch.nn.Module):
    """A model that has a tower, as big_vision's files begin one."""

    def __init__(self, config):
        super().__init__()
        self.vit, self.config = ViT(config), Parts(config)


class Parts:
    def __init__(self, vit):
        self.vit = vit


def huggingface_free_name(name):
    from families import big_vision
    return big_vision.array_of(f'vit.{name}', ())


# Of a tower of width 8 and two layers.
BLOCK = 'img/Transformer/encoderblock/'
HEADS = f'{BLOCK}MultiHeadDotProductAttention_0/'
SHAPES = {
    'img/embedding/kernel': (8, 8, 3, 8), 'img/embedding/bias': (8,),
    'img/pos_embedding': (1, 4, 8), 'img/Transformer/encoder_norm/scale': (8,),
    'img/Transformer/encoder_norm/bias': (8,)}
for _norm in ('LayerNorm_0', 'LayerNorm_1'):
    SHAPES |= {f'{BLOCK}{_norm}/scale': (2, 8), f'{BLOCK}{_norm}/bias': (2, 8)}
for _part in ('query', 'key', 'value'):
    SHAPES |= {f'{HEADS}{_part}/kernel': (2, 8, 2, 4), f'{HEADS}{_part}/bias': (2, 2, 4)}
SHAPES |= {f'{HEADS}out/kernel': (2, 2, 4, 8), f'{HEADS}out/bias': (2, 8),
           f'{BLOCK}MlpBlock_0/Dense_0/kernel': (2, 8, 16),
           f'{BLOCK}MlpBlock_0/Dense_0/bias': (2, 16),
           f'{BLOCK}MlpBlock_0/Dense_1/kernel': (2, 16, 8),
           f'{BLOCK}MlpBlock_0/Dense_1/bias': (2, 8)}


# ------------------------------------------------------------------------------------------------
# runs of ours

SMALL = {'decoder.width': 16, 'decoder.depth': 2, 'decoder.mlp_dim': 32, 'decoder.num_heads': 2,
         'decoder.head_dim': 8, 'vit.image_size': 16, 'vit.patch_size': 8, 'vit.width': 16,
         'vit.depth': 1, 'vit.mlp_dim': 32, 'vit.num_heads': 2, 'vla.width': 16, 'vla.mlp_dim': 24,
         'action_steps': 2, 'action_dim': 2}


PROGRESS = dict(step=1, samples=2, tokens=3, bad_samples=0, world=1)


def settings_of(task, **said):
    known = tasks.defaults(task)
    small = {key: value for key, value in SMALL.items() if key in known}
    if 'decoder.hf' in said:
        small = {}          # it brings its own shape
    loop = dict(task=task, tokenizer='bytes', processor='auto', seq_len=32, seed=0, ema=0.0,
                data_dir='')
    return known | loop | small | said


def write_run(folder, task, **said):
    """A checkpoint, as a run of train.py writes it; its Run."""
    torch.manual_seed(0)
    run = checkpoint.make_run(settings_of(task, **said), 'cpu')
    checkpoint.write_weights(str(folder), run.model.state_dict(), {})
    jsons = {'config.json': run.settings, 'progress.json': PROGRESS} | run.kept
    checkpoint.write_files(str(folder), jsons, checkpoint.own_files(run))
    return run


def test_damaged_weights_of_ours_are_refused_wherever_they_are_opened(tmp_path):
    """By what uses a run, begins with it, or exports it; its averages, too."""
    names = 'step_00000001', 'step_00000002'
    plain, averaged = (str(tmp_path / 'checkpoints' / name) for name in names)
    run = write_run(plain, 'llm')
    tensors = run.model.state_dict()
    checkpoint.write_weights(averaged, tensors, tensors)
    jsons = {'config.json': run.settings | dict(ema=0.9), 'progress.json': PROGRESS}
    checkpoint.write_files(averaged, jsons, {})
    for folder, file in ((plain, 'model.safetensors'), (averaged, 'ema/model.safetensors')):
        path = Path(folder, file)
        begin = lambda folder: initial.begin(run.model, folder, [], '')  # noqa: B023, E731
        hub.open_ours(folder)
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        for call in (hub.open_ours, hub.from_pretrained, begin):
            refused(lambda: call(folder), 'model.safetensors', 'checksum')  # noqa: B023
        refused(lambda: hub.export_run(folder, str(tmp_path / 'x')), 'checksum')  # noqa: B023
        flags = f'--out_dir={tmp_path}', f'--checkpoint={Path(folder).name}'
        tiny.run('sample.py', *flags).refused('model.safetensors', 'checksum')
    refused(lambda: begin(os.path.join(averaged, 'ema')), 'checksum')
    os.remove(os.path.join(plain, 'progress.json'))
    refused(lambda: hub.open_ours(plain), 'progress.json is missing')
    assert not (tmp_path / 'x').exists()


def test_numbers_of_ours_that_are_not_finite(tmp_path):
    run = write_run(tmp_path / 'a', 'llm')
    tensors = run.model.state_dict()
    tensors['norm.weight'][0] = torch.nan
    checkpoint.write_weights(str(tmp_path / 'b'), tensors, {})
    checkpoint.write_files(str(tmp_path / 'b'), {'config.json': run.settings,
                                                 'progress.json': PROGRESS}, {})
    refused(lambda: hub.open_ours(str(tmp_path / 'b')), 'norm.weight', 'NaN')
    refused(lambda: initial.begin(run.model, str(tmp_path / 'b'), [], ''), 'norm.weight', 'NaN')


def test_a_vla_begins_a_vlm_and_the_reverse(tmp_path):
    runs = {task: write_run(tmp_path / task, task) for task in ('vlm', 'vla')}
    counts = {task: len(run.model.state_dict()) for task, run in runs.items()}
    more = counts['vla'] - counts['vlm']
    line = initial.begin(runs['vlm'].model, str(tmp_path / 'vla'), [], '')
    assert f'none begin anew, action_in, action_out, expert, expert_norm, state_in, time_in, ' \
        f'time_out ({more}) left there unused' in line
    line = initial.begin(runs['vla'].model, str(tmp_path / 'vlm'), [], '')
    assert f'{counts["vlm"]} tensors' in line and 'expert, expert_norm, ' in line
    assert f'({more}) begin anew, none left there unused' in line


def test_a_part_that_is_not_whole_is_refused_or_skipped(tmp_path):
    write_run(tmp_path / 'a', 'vlm')
    deeper = checkpoint.make_run(settings_of('vlm', **{'decoder.depth': 3}), 'cpu').model
    refused(lambda: initial.begin(deeper, str(tmp_path / 'a'), [], ''), 'decoder.blocks.2.',
            'init_skip')
    line = initial.begin(deeper, str(tmp_path / 'a'), [r'blocks\.2\.'], '')
    new = [name for name in deeper.state_dict() if '.blocks.2.' in name]
    assert f'decoder ({len(new)}) begin anew, none left there unused' in line


def test_a_run_of_a_model_of_transformers(saved, changed, tmp_path):
    """Its own weights are read, not the folder's again; without the folder's config.json it is
    told by name."""
    folder = changed('tied')
    run = write_run(tmp_path / 'run', 'llm', **{'decoder.hf': folder})
    with torch.no_grad():
        for p in run.model.parameters():
            p.mul_(2)
    checkpoint.write_weights(str(tmp_path / 'two'), run.model.state_dict(), {})
    checkpoint.write_files(str(tmp_path / 'two'), {'config.json': run.settings,
                                                   'progress.json': PROGRESS}, {})
    opened = hub.open_ours(str(tmp_path / 'two')).model.state_dict()
    now = run.model.state_dict()
    assert all(torch.equal(opened[name], now[name]) for name in now)
    line = initial.begin(run.model, str(tmp_path / 'run'), [], '')
    assert f': {len(opened)} tensors' in line
    assert line.endswith('none begin anew, none left there unused')
    shutil.rmtree(folder)
    refused(lambda: hub.open_ours(str(tmp_path / 'two')), folder)


# ------------------------------------------------------------------------------------------------
# export


def exported_names(folder):
    return {huggingface.canonical(name) for name in load_file(folder / 'model.safetensors')}


@pytest.mark.parametrize('kind', ['llama', 'tied', 'paligemma', 'idefics3', 'siglip_vision'])
def test_the_names_that_come_in_go_out(saved, kind, tmp_path):
    hub.export(hub.from_pretrained(str(saved(kind))), str(tmp_path))
    want = {name for name in exported_names(saved(kind)) if not name.startswith('vit.head.')}
    assert exported_names(tmp_path) == want
    if kind != 'siglip_vision':
        theirs, ours = (json.loads((path / 'config.json').read_text())
                        for path in (saved(kind), tmp_path))
        for config in (theirs, ours):
            config |= config.get('text_config', {})
        assert ours['max_position_embeddings'] == theirs['max_position_embeddings'] == 96
        assert ours['vocab_size'] == theirs['vocab_size'] == 107


def byte_level(folder, **named):
    """A tokenizer.json that has none of the tokens that are named beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(['<|endoftext|>'])
    t.add_tokens(['<pad_me>'])
    t.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps(dict(
        tokenizer_class='PreTrainedTokenizerFast', eos_token='<|endoftext|>', **named)))
    return str(folder)


def sentencepiece_of(folder, **options):
    import sentencepiece
    folder.mkdir()
    (folder / 'text').write_text((tiny.ROOT / 'README.md').read_text())
    sentencepiece.SentencePieceTrainer.train(
        input=folder / 'text', model_prefix=str(folder / 'm'), vocab_size=400, model_type='bpe',
        minloglevel=2, byte_fallback=True, remove_extra_whitespaces=False,
        normalization_rule_name='identity', **options)
    return str(folder / 'm.model')


def ranks(folder):
    import base64
    folder.mkdir()
    pairs = [bytes([i]) for i in range(256)] + [b'in', b' a', b'the', b'at']
    lines = [f'{base64.b64encode(pair).decode()} {i}' for i, pair in enumerate(pairs)]
    (folder / 'gpt2_tiny.tiktoken').write_text('\n'.join(lines))
    return str(folder / 'gpt2_tiny.tiktoken')


TOKENIZERS = {
    'bytes': (lambda folder: 'bytes', '<image>'),
    'json': (byte_level, '<image>'),
    'named': (lambda folder: byte_level(folder, pad_token='<fill>'), '<image>'),
    'in the file': (lambda folder: byte_level(folder, image_token='<pad_me>'), '<pad_me>'),
    'no ends': (lambda folder: sentencepiece_of(folder, bos_id=-1, eos_id=-1), '<image>'),
    'a token <pad>': (lambda folder: sentencepiece_of(
        folder, pad_id=-1, user_defined_symbols=['<pad>']), '<image>'),
    'ranks': (ranks, '<image>')}


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_special_tokens_go_out_by_names_that_are_theirs(kind, tmp_path):
    make, image = TOKENIZERS[kind]
    ours = tokenizers.load(make(tmp_path / 'ours'))
    (tmp_path / 'out').mkdir()
    processors.write_tokenizer(ours, str(tmp_path / 'out'))
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path / 'out')
    for role in ('bos', 'eos', 'pad'):
        assert getattr(theirs, f'{role}_token_id') == getattr(ours, f'{role}_id')
    if kind == 'named':
        assert theirs.pad_token == '<fill>'
    assert theirs.image_token == image and len(theirs) == ours.vocab_size
    assert theirs.convert_tokens_to_ids(image) == ours.image_id
    for text in ('a cat, at the  mat', 'naïve 東京', '<b> it\'s 123'):
        assert theirs(text, add_special_tokens=False)['input_ids'] == ours.encode(text)
    assert '\\ufdd0' not in ''.join(path.read_text(errors='replace')
                                    for path in (tmp_path / 'out').glob('*.json'))


@pytest.mark.parametrize('kind', ['bytes', 'json', 'ranks'])
def test_a_processor_knows_the_picture_tokens_of_a_run(kind, tmp_path):
    """PaliGemma's, whatever the run's tokenizer calls them, in a vocabulary that is rounded up."""
    make, image = TOKENIZERS[kind]
    run = write_run(tmp_path / 'run', 'vlm', tokenizer=make(tmp_path / 'ours'))
    hub.export_run(str(tmp_path / 'run'), str(tmp_path / 'out'))
    theirs = tf.AutoProcessor.from_pretrained(tmp_path / 'out')
    picture = torch.zeros(3, 16, 16)
    ids = theirs(images=picture, text=f'{image}what', return_tensors='pt')['input_ids'][0].tolist()
    tok = run.tokenizer
    assert ids == [tok.image_id] * 4 + [tok.bos_id] + tok.encode('what\n')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['text_config']['max_position_embeddings'] == 32, 'its seq_len'
    assert config['vocab_size'] == len(run.model.decoder.embedding.weight) >= tok.vocab_size
    assert config['image_token_index'] == tok.image_id


def test_a_picture_token_that_processors_do_not_look_for_is_said(tmp_path, capsys):
    make, _ = TOKENIZERS['in the file']
    write_run(tmp_path / 'run', 'vlm', tokenizer=make(tmp_path / 'ours'))
    hub.export_run(str(tmp_path / 'run'), str(tmp_path / 'out'))
    line, = capsys.readouterr().err.splitlines()
    assert '<image>' in line and '<pad_me>' in line


def test_a_siglip_goes_out_without_its_words_and_says_so(tmp_path, capsys):
    run = write_run(tmp_path / 'run', 'siglip')
    hub.export_run(str(tmp_path / 'run'), str(tmp_path / 'out'))
    said = capsys.readouterr().err
    others = {name.partition('.')[0] for name in run.model.state_dict()} - {'vit'}
    assert others and all(name in said for name in others) and 'left out' in said


def test_half_a_gigabyte_is_looked_at_in_no_time():
    import time
    tensor = torch.zeros(1 << 25)
    start = time.perf_counter()
    assert accounting.is_finite(tensor)
    assert time.perf_counter() - start < 1, 'isfinite takes ten times as long'
    tensor[7] = torch.nan
    assert not accounting.is_finite(tensor)
