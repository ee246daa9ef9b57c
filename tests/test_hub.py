"""hub.py and families/ against transformers: random tiny models of every family, saved by
transformers, are the referee."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

os.environ['HF_HUB_OFFLINE'] = '1'
tf = pytest.importorskip('transformers')

import hub  # noqa: E402
from families import huggingface, huggingface_config  # noqa: E402
from generate import generate  # noqa: E402
from model import VLM, Decoder, DecoderConfig, ViT, ViTConfig, VLMConfig  # noqa: E402

tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()

TEXT = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
            bos_token_id=1, eos_token_id=2, pad_token_id=0)
VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
              image_size=32, patch_size=8)
ROPE3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             rope_theta=5e5, original_max_position_embeddings=32)
IMAGE = 98


def paligemma(text, **more):
    vision = VISION | dict(model_type='siglip_vision_model', projection_dim=32)
    text = TEXT | dict(model_type=text, vocab_size=107) | more
    return tf.PaliGemmaForConditionalGeneration(tf.PaliGemmaConfig(
        vision_config=vision, image_token_index=IMAGE, text_config=text, projection_dim=32))


def idefics(kind):
    config, model = getattr(tf, f'{kind}Config'), getattr(tf, f'{kind}ForConditionalGeneration')
    text = TEXT | dict(model_type='llama', vocab_size=107)
    return model(config(vision_config=VISION, text_config=text, image_token_id=IMAGE,
                        scale_factor=2, tie_word_embeddings=False))


# Each setting that changes what is computed is met by one of these, with grouped and single heads.
SEVEN = TEXT | dict(num_hidden_layers=7)
TIED = TEXT | dict(num_key_value_heads=4, head_dim=8, tie_word_embeddings=True)
PLAIN = {key: value for key, value in TEXT.items() if key != 'head_dim'}
LINEAR = dict(rope_type='linear', factor=4.0, rope_theta=1e4)
DECODERS = {
    'gemma': lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**TEXT)),
    'gemma-mqa': lambda: tf.GemmaForCausalLM(
        tf.GemmaConfig(**TEXT | dict(num_key_value_heads=1, head_dim=24))),
    'gemma2': lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**TEXT, sliding_window=5, query_pre_attn_scalar=24)),
    'gemma2-long-window': lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**TEXT, sliding_window=64)),
    'gemma3': lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**SEVEN, sliding_window=5, query_pre_attn_scalar=24)),
    'llama': lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
    'llama-tied-mha': lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TIED)),
    'llama3-rope': lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, rope_parameters=ROPE3)),
    'llama-linear-rope': lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**TEXT, rope_parameters=LINEAR)),
    'qwen2': lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**PLAIN)),
    'qwen3': lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**TEXT))}
VLMS = {'paligemma': lambda: paligemma('gemma'),
        'paligemma2': lambda: paligemma('gemma2', sliding_window=9, query_pre_attn_scalar=24),
        'idefics3': lambda: idefics('Idefics3'), 'smolvlm': lambda: idefics('SmolVLM')}
SIGLIP_TEXT = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
                   num_attention_heads=3)
TOWERS = {
    'siglip_vision': lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION)),
    'siglip': lambda: tf.SiglipModel(
        tf.SiglipConfig(vision_config=VISION, text_config=SIGLIP_TEXT))}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """kind -> (transformers' model with random weights, norms and biases too, its folder)."""
    made = {}

    def make(kind):
        if kind not in made:
            model = (DECODERS | VLMS | TOWERS)[kind]().eval()
            generator = torch.Generator().manual_seed(0)
            for name, p in model.named_parameters():
                random = torch.randn(p.shape, generator=generator)
                scale = 0.3 if p.ndim == 1 else 1.5 / p.shape[-1] ** 0.5
                centre = 1.0 if 'norm' in name and p.ndim == 1 and 'emma' not in kind else 0.0
                p.data.copy_(random * scale + centre)
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            made[kind] = model, str(folder)
        return made[kind]
    return make


def rows(length=17, padding='none', seed=0):
    """tokens, mask and positions (2, length); the second row is 5 shorter if padded, on the left
    or right."""
    tokens = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    if padding != 'none':
        mask[1, slice(0, 5) if padding == 'left' else slice(-5, None)] = 0
    return tokens * mask, mask, (mask.cumsum(1) - 1).clamp(min=0)


def pictured(c, extra=12, count=2):
    """tokens with one picture a row, and its pixels."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 90, (count, c.image_tokens + extra), generator=generator)
    tokens[:, 1:1 + c.image_tokens] = IMAGE
    return tokens, torch.randn(count, 3, c.vit.image_size, c.vit.image_size, generator=generator)


def close(a, b, bound=5e-5):
    assert a.shape == b.shape and (a - b).abs().max().item() <= bound


# ------------------------------------------------------------------------------------------------
# parity


@pytest.mark.parametrize('padding', ['none', 'left', 'right'])
@pytest.mark.parametrize('kind', DECODERS)
def test_a_decoders_logits_and_all_its_layers(saved, kind, padding):
    theirs, folder = saved(kind)
    ours = hub.from_pretrained(folder)
    tokens, mask, positions = rows(padding=padding)
    real = mask.bool()
    with torch.no_grad():
        want = theirs(tokens, attention_mask=mask, position_ids=positions,
                      output_hidden_states=True)
        close(ours.logits(tokens, segments=mask)[real], want.logits[real])
        for layer in range(len(ours.blocks)):
            part = Decoder(replace(ours.config, feature_layer=layer))
            assert set(hub.load(part, folder)) == set(part.state_dict())
            if layer < len(ours.blocks) - 1:        # their last hidden state is normed
                close(part.features(part.embed(tokens), segments=mask)[real],
                      want.hidden_states[layer + 1][real])
    close(ours.features(ours.embed(tokens), segments=mask)[real], want.hidden_states[-1][real])


@pytest.mark.parametrize('kind', TOWERS)
def test_a_towers_layers(saved, kind):
    theirs, folder = saved(kind)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = getattr(theirs, 'vision_model', theirs)(pixels, output_hidden_states=True)
        close(hub.from_pretrained(folder)(pixels), want.last_hidden_state)
        for layer in range(2):
            part = ViT(replace(huggingface_config.read_config(folder), feature_layer=layer))
            hub.load(part, folder)
            close(part(pixels), want.hidden_states[layer + 1])


def run_theirs(theirs, tokens, pixels, suffix):
    """Logits of transformers for rows whose last `suffix` tokens are causal in a PaliGemma, all in
    an Idefics3."""
    mask = torch.ones_like(tokens)
    if 'PaliGemma' in type(theirs).__name__:
        types = torch.zeros_like(tokens)
        types[:, len(types[0]) - suffix:] = 1
        out = theirs(input_ids=tokens, pixel_values=pixels, token_type_ids=types,
                     attention_mask=mask)
        return out.logits, types
    return theirs(input_ids=tokens, pixel_values=pixels[:, None], attention_mask=mask).logits, mask


@pytest.mark.parametrize('kind', VLMS)
def test_a_vlms_logits_and_gradients(saved, kind):
    theirs, folder = saved(kind)
    ours = hub.from_pretrained(folder)
    tokens, pixels = pictured(ours.config)
    want, blocks = run_theirs(theirs, tokens, pixels, 5)
    close(ours.logits(tokens, pixels, blocks), want)

    # The loss is summed, so that gradients can be compared.
    targets = torch.full_like(tokens, -100)
    targets[:, -6:-1] = tokens[:, -5:]
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(want.float().flatten(0, 1), targets.flatten(),
                                      reduction='sum').backward()
    loss, count = ours.loss(tokens, targets, pixels, blocks)
    loss.backward()
    assert count == 10
    grads = {huggingface.canonical(name): p.grad for name, p in theirs.named_parameters()
             if p.grad is not None}
    for key, name in huggingface.our_names(ours).items():
        grad = ours.get_parameter(name).grad
        close(grad.flatten(), grads[key].flatten(), 1e-4 * max(1.0, grads[key].abs().max().item()))
    # Without blocks, what stands before the first target attends as in theirs.
    close(ours.loss(tokens, targets, pixels)[0], loss, 1e-4)


@pytest.mark.parametrize('kind', [*DECODERS, *VLMS])
def test_greedy_generations(saved, kind):
    theirs, folder = saved(kind)
    ours = hub.from_pretrained(folder)
    if kind in DECODERS:
        tokens, mask, _ = rows(9, 'left')
        inputs, pixels = dict(input_ids=tokens, attention_mask=mask), None
    else:
        tokens, pixels = pictured(ours.config, 5)
        inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens),
                      pixel_values=pixels if kind.startswith('pali') else pixels[:, None])
        if kind.startswith('pali'):
            inputs['token_type_ids'] = torch.zeros_like(tokens)         # as its processor does
    want = theirs.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=2,
                           pad_token_id=0)
    want = [row[:row.index(2)] if 2 in row else row for row in want[:, tokens.shape[1]:].tolist()]
    assert generate(ours, tokens, pixels, 16, eos_id=2, pad_id=0) == want



def test_another_picture_size_interpolates_the_positions(saved):
    theirs, folder = saved('siglip_vision')
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(hub.from_pretrained(folder, image_size=48)(pixels),
              theirs(pixels, interpolate_pos_encoding=True).last_hidden_state)
    assert hub.from_pretrained(saved('paligemma')[1], image_size=64).config.image_tokens == 64


def test_gemma3_with_a_vision_tower_gives_its_text_part(tmp_path):
    vision, text = VISION | dict(model_type='siglip_vision_model'), SEVEN | dict(vocab_size=107)
    theirs = tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(
        vision_config=vision, text_config=text | dict(sliding_window=5), mm_tokens_per_image=4,
        image_token_index=IMAGE, boi_token_index=97, eoi_token_index=96)).eval()
    theirs.save_pretrained(tmp_path)
    tokens, _, _ = rows()
    with torch.no_grad():
        close(hub.from_pretrained(str(tmp_path)).logits(tokens), theirs(tokens).logits)


def test_names_of_older_releases_and_shards(saved, tmp_path):
    """The same weights under the names that the published PaliGemma and Gemma repositories have,
    in several files."""
    _, folder = saved('paligemma')
    weights = load_file(os.path.join(folder, 'model.safetensors'))
    old = {re.sub(r'^model\.language_model\.', 'language_model.model.', k): v
           for k, v in weights.items()}
    assert any(k.startswith('language_model.model.layers.0.') for k in old)
    names = sorted(old)
    index = {name: f'model-{i % 3}.safetensors' for i, name in enumerate(names)}
    for file in set(index.values()):
        save_file({n: old[n].bfloat16() for n in names if index[n] == file}, tmp_path / file)
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=index)))
    (tmp_path / 'config.json').write_bytes(open(os.path.join(folder, 'config.json'), 'rb').read())
    got = hub.from_pretrained(str(tmp_path)).state_dict()
    want = hub.from_pretrained(folder).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k].bfloat16().float()) for k in want)
    half = hub.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_big_models_settings(tmp_path):
    """config.json files as published (numbers of the repositories), and the parameters that
    follow."""
    published = {
        'gemma-2b': (
            dict(model_type='gemma', vocab_size=256000, hidden_size=2048, intermediate_size=16384,
                 num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, head_dim=256,
                 hidden_act='gelu', rms_norm_eps=1e-6, rope_theta=10000.0), 2_506_172_416),
        'gemma-3-1b': (
            dict(model_type='gemma3_text', vocab_size=262144, hidden_size=1152,
                 intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
                 num_key_value_heads=1, head_dim=256, sliding_window=512, sliding_window_pattern=6,
                 rope_theta=1000000, rope_local_base_freq=10000, query_pre_attn_scalar=256),
            999_885_952),
        'smollm2-135m': (
            dict(model_type='llama', vocab_size=49152, hidden_size=576, intermediate_size=1536,
                 num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                 rope_theta=100000, tie_word_embeddings=True, rms_norm_eps=1e-5), 134_515_008),
        'qwen3-0.6b': (
            dict(model_type='qwen3', vocab_size=151936, hidden_size=1024, intermediate_size=3072,
                 num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                 rope_theta=1000000, tie_word_embeddings=True, use_sliding_window=False),
            596_049_920),
        'siglip-so400m': (
            dict(model_type='siglip_vision_model', hidden_size=1152, intermediate_size=4304,
                 num_hidden_layers=27, num_attention_heads=16, image_size=224, patch_size=14),
            None),
        'paligemma-3b': (
            dict(
                model_type='paligemma', image_token_index=257152, projection_dim=2048,
                hidden_size=2048,
                text_config=dict(model_type='gemma', hidden_size=2048, intermediate_size=16384,
                                 num_attention_heads=8, num_hidden_layers=18,
                                 num_key_value_heads=1, vocab_size=257216, num_image_tokens=256),
                vision_config=dict(model_type='siglip_vision_model', hidden_size=1152,
                                   patch_size=14, intermediate_size=4304, num_attention_heads=16,
                                   num_hidden_layers=27)), 2_923_466_480)}
    for theirs, count in published.values():
        config = huggingface_config.to_config(theirs)
        with torch.device('meta'):
            model = {DecoderConfig: Decoder, ViTConfig: ViT, VLMConfig: VLM}[type(config)](config)
        if count:
            assert sum(p.numel() for p in model.parameters()) == count
    assert config.image_tokens == 256 and config.connector_bias and config.image_token_id == 257152


# ------------------------------------------------------------------------------------------------
# the way back


@pytest.mark.parametrize('kind',
                         [*DECODERS, 'paligemma', 'paligemma2', 'idefics3', 'siglip_vision'])
def test_export_is_the_same_model_to_the_bit(saved, kind, tmp_path):
    theirs, folder = saved(kind)
    ours = hub.from_pretrained(folder)
    # So small that it takes several files.
    hub.export(ours, str(tmp_path), max_shard_size='20KB')
    assert (tmp_path / 'model.safetensors.index.json').exists()
    again = hub.from_pretrained(str(tmp_path))
    assert again.config == ours.config
    assert all(torch.equal(a, b)
               for a, b in zip(again.state_dict().values(), ours.state_dict().values()))

    # All is found again but for the pooling head, which we have not.
    back, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not [k for k in report['missing_keys'] if 'head.' not in k]
    assert not report['unexpected_keys'] and not report['mismatched_keys']
    state, wanted = back.state_dict(), theirs.state_dict()
    assert all(torch.equal(state[k], wanted[k]) for k in wanted
               if not re.search(r'(^|\.)head\.', k))

    # Settings too: the logits are those of the original.
    tokens, mask, positions = rows()
    if kind in DECODERS:
        with torch.no_grad():
            assert torch.equal(back.eval()(tokens).logits, theirs(tokens).logits)


SMALL_VIT, SMALL_DECODER = ViTConfig(32, 8, 16, 1, 32, 2), DecoderConfig(64, 16, 2, 32, 2, 1, 8)


@pytest.mark.parametrize('model, said', [
    (lambda: Decoder(replace(SMALL_DECODER, norm_offset=0.0)), 'decoder.norm_offset'),
    (lambda: Decoder(replace(SMALL_DECODER, feature_layer=0)), 'decoder.feature_layer=0'),
    (lambda: ViT(replace(SMALL_VIT, stem='conv')), "vit.stem='conv'"),
    (lambda: VLM(VLMConfig(SMALL_VIT, SMALL_DECODER, 3, 2)), 'pixel_shuffle=2'),
    (lambda: torch.nn.Linear(2, 2), 'Linear has no counterpart in transformers')])
def test_export_refuses_what_transformers_has_not(model, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        hub.export(model(), str(tmp_path / 'new'))
    assert not (tmp_path / 'new').exists()


# ------------------------------------------------------------------------------------------------
# what a folder may say


@pytest.mark.parametrize(
    'change, said',
    [(dict(model_type='mamba'), "model_type='mamba' is not supported"),
     (dict(num_attention_heads=-4), 'attention_he'),
     (dict(hidden_act='relu'), "hidden_act='relu'"),
     (dict(hidden_size='large'), "hidden_size='large'"),
     (dict(num_hidden_layers=10 ** 9), 'num_hidden_layers'),
     (dict(rope_parameters=dict(rope_type='yarn')), "'yarn'"),
     (dict(quantization_config=dict(bits=4)), 'quantization_config'),
     (dict(vocab_size=None), 'vocab_size'),
     (dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
     (dict(attention_bias=True), 'attention_bias=True'),
     (dict(rope_parameters=[1]), 'config.json'),
     (dict(hidden_size=40), 'is (99, 32) there and (99, 40) here')])
def test_settings_that_are_not_supported_are_named(saved, change, said, tmp_path):
    folder = saved('llama')[1]
    config = json.load(open(os.path.join(folder, 'config.json'))) | change
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'model.safetensors').symlink_to(os.path.join(folder, 'model.safetensors'))
    with pytest.raises(ValueError, match=re.escape(said)):
        hub.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('kind, change, said', [
    ('idefics3', dict(scale_factor='2'), "scale_factor='2'"),
    ('idefics3', dict(scale_factor=0), 'scale_factor=0'),
    ('paligemma', dict(quantization_config=dict(bits=4)), 'quantization_config'),
    ('siglip', dict(quantization_config=dict(bits=4)), 'quantization_config')])
def test_settings_beside_those_of_the_parts_are_looked_at(saved, kind, change, said):
    theirs = json.load(open(os.path.join(saved(kind)[1], 'config.json')))
    huggingface_config.to_config(theirs)
    with pytest.raises(ValueError, match=re.escape(said)):
        huggingface_config.to_config(theirs | change)


def test_broken_and_hostile_files(saved, tmp_path):
    folder = saved('llama')[1]
    config = open(os.path.join(folder, 'config.json')).read()
    weights = open(os.path.join(folder, 'model.safetensors'), 'rb').read()

    def refused(said, **files):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, content in (dict(config=config) | files).items():
            name = {'config': 'config.json', 'weights': 'model.safetensors',
                    'pickle': 'pytorch_model.bin', 'index': 'model.safetensors.index.json'}[name]
            (tmp_path / name).write_bytes(content
                                          if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=re.escape(said)):
            hub.from_pretrained(str(tmp_path))

    refused('no model.safetensors')
    refused('pickles run code', pickle=b'cos\nsystem\n')
    refused('can not be read', weights=weights[:-100])
    refused('can not be read', weights=weights[:50])
    refused('can not be read', weights=b'\xff' * 8 + weights[8:])        # a header of 2^64 bytes
    refused('can not be read', weights=b'')
    outside = {'model.norm.weight': '../../etc/passwd.safetensors'}
    refused('weight_map', index=json.dumps(dict(weight_map=outside)))
    refused('weight_map', index=json.dumps(dict(weight_map=3)))
    names = safe_open(os.path.join(folder, 'model.safetensors'), 'pt').keys()
    refused('can not be read',
            index=json.dumps(dict(weight_map=dict.fromkeys(names, 'gone.safetensors'))))
    refused('can not be read as JSON', config=config[:-20])
    refused('can not be read as JSON', config='[' * 100000)
    refused('no JSON object', config='[]')
    refused('is larger than', config=config[:-2] + ' ' * (65 << 20) + '}')

    # One tensor under another name: the first 8 bytes say how long the header is.
    end = 8 + int.from_bytes(weights[:8], 'little')
    header = json.loads(weights[8:end])
    header['model.layers.0.evil.weight'] = header.pop('model.layers.0.mlp.up_proj.weight')
    text = json.dumps(header).encode()
    refused('holds another model: it lacks decoder.layers.0.mlp.up_proj.weight and has '
            'model.layers.0.evil.weight',
            weights=len(text).to_bytes(8, 'little') + text + weights[end:])

    with pytest.raises(ValueError, match='neither a folder nor a repository'):
        hub.from_pretrained('/nowhere/at/all')
    with pytest.raises(ValueError, match='no folder here, and could not be fetched'):
        hub.from_pretrained('nobody/nothing')


def test_load_takes_the_parts_that_both_have(saved):
    _, folder = saved('paligemma')
    config = huggingface_config.read_config(saved('siglip_vision')[1])
    vlm = VLM(VLMConfig(config, DecoderConfig(128, 16, 1, 32, 2, 1, 8), IMAGE))
    before = vlm.state_dict()['decoder.embedding.weight'].clone()
    loaded = hub.load(vlm, saved('siglip')[1])
    assert set(loaded) == {k for k in vlm.state_dict() if k.startswith('vit.')}
    assert torch.equal(vlm.state_dict()['decoder.embedding.weight'], before)
    with pytest.raises(ValueError, match=r'decoder.width=32 \(here 16\).*python hub.py config'):
        hub.load(vlm, folder)

    # More rows in our embedding: tokens that were added; and a part that is left as it is.
    config = huggingface_config.read_config(folder)
    wide = VLM(replace(config, decoder=replace(config.decoder, vocab_size=128)))
    loaded = hub.load(wide, folder, skip=['connector'])
    assert set(wide.state_dict()) - set(loaded) == {'connector.weight', 'connector.bias'}
    table = hub.from_pretrained(folder).decoder.embedding.weight
    assert torch.equal(wide.decoder.embedding.weight[:107], table)
    close(wide.decoder.embedding.weight[107:], table.mean(0).expand(21, -1), 1e-6)


# ------------------------------------------------------------------------------------------------
# big_vision


def as_big_vision(model):
    """Its arrays of our VLM, written the other way round: einsum operands with an axis for each of
    heads and layers."""
    c, p = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    n, k, h, d = c.decoder.num_heads, c.decoder.num_kv_heads, c.decoder.head_dim, c.decoder.width
    w, vn = c.vit.width, c.vit.num_heads

    def stack(part, name, change):
        return np.stack(
            [change(p[f'{part}.blocks.{i}.{name}']) for i in range(getattr(c, part).depth)])
    out = {'img/embedding/kernel': np.einsum('dchw->hwcd', p['vit.stem.weight']),
           'img/embedding/bias': p['vit.stem.bias'], 'img/pos_embedding': p['vit.pos_embed'],
           'img/Transformer/encoder_norm/scale': p['vit.norm.weight'],
           'img/Transformer/encoder_norm/bias': p['vit.norm.bias'],
           'img/head/kernel': p['connector.weight'].T, 'img/head/bias': p['connector.bias'],
           'llm/embedder/input_embedding': p['decoder.embedding.weight'],
           'llm/final_norm/scale': p['decoder.norm.weight']}
    e, a = 'img/Transformer/encoderblock/', 'MultiHeadDotProductAttention_0'
    for i in (0, 1):
        out[f'{e}LayerNorm_{i}/scale'] = stack('vit', f'norm{i + 1}.weight', np.array)
        out[f'{e}LayerNorm_{i}/bias'] = stack('vit', f'norm{i + 1}.bias', np.array)
        out[f'{e}MlpBlock_0/Dense_{i}/kernel'] = stack('vit', f'fc{i + 1}.weight', np.transpose)
        out[f'{e}MlpBlock_0/Dense_{i}/bias'] = stack('vit', f'fc{i + 1}.bias', np.array)
    for ours, theirs in (('q', 'query'), ('k', 'key'), ('v', 'value')):
        out[f'{e}{a}/{theirs}/kernel'] = stack(
            'vit', f'{ours}.weight', lambda x: x.T.reshape(w, vn, -1))
        out[f'{e}{a}/{theirs}/bias'] = stack('vit', f'{ours}.bias', lambda x: x.reshape(vn, -1))
    out[f'{e}{a}/out/kernel'] = stack('vit', 'o.weight', lambda x: x.T.reshape(vn, -1, w))
    out[f'{e}{a}/out/bias'] = stack('vit', 'o.bias', np.array)
    kv = [stack('decoder', f'{x}.weight', lambda x: np.einsum('khd->kdh', x.reshape(k, h, d)))
          for x in 'kv']
    gates = [stack('decoder', f'{x}.weight', np.transpose) for x in ('gate', 'up')]
    return out | {
        'llm/layers/attn/q_einsum/w': stack('decoder', 'q.weight',
                                            lambda x: np.einsum('nhd->ndh', x.reshape(n, h, d))),
        'llm/layers/attn/kv_einsum/w': np.stack(kv, 1),
        'llm/layers/mlp/gating_einsum': np.stack(gates, 1),
        'llm/layers/attn/attn_vec_einsum/w': stack(
            'decoder', 'o.weight', lambda x: x.T.reshape(n, h, d)),
        'llm/layers/mlp/linear': stack('decoder', 'down.weight', np.transpose),
        'llm/layers/pre_attention_norm/scale': stack('decoder', 'norm1.weight', np.array),
        'llm/layers/pre_ffw_norm/scale': stack('decoder', 'norm2.weight', np.array)}


def test_big_vision_checkpoints(saved, tmp_path):
    want = hub.from_pretrained(saved('paligemma')[1])
    arrays = {f'params/{k}': v for k, v in as_big_vision(want).items()}
    np.savez(tmp_path / 'pt.npz', **arrays)
    ours = VLM(want.config)
    assert set(hub.load(ours, str(tmp_path / 'pt.npz'))) == set(ours.state_dict())
    assert all(torch.equal(a, b)
               for a, b in zip(ours.state_dict().values(), want.state_dict().values()))

    # A SigLIP tower alone, a layer an array, at another picture size.
    tower = {re.sub('encoderblock/', f'encoderblock_{i}/', k): v[i] if 'encoderblock/' in k else v
             for k, v in arrays.items() if '/img/' in k and '/head/' not in k for i in (0, 1)}
    np.savez(tmp_path / 'siglip.npz', **tower)
    large = VLM(replace(want.config, vit=replace(want.config.vit, image_size=48)))
    assert set(hub.load(large, str(tmp_path / 'siglip.npz'))) == {
        k for k in large.state_dict() if k.startswith('vit.')}
    assert torch.equal(large.vit.blocks[1].fc1.weight, want.vit.blocks[1].fc1.weight)

    # What is cut or broken.
    del arrays['params/llm/layers/mlp/linear']
    np.savez(tmp_path / 'cut.npz', **arrays)
    with pytest.raises(ValueError, match='has no llm/layers/mlp/linear'):
        hub.load(ours, str(tmp_path / 'cut.npz'))
    (tmp_path / 'bad.npz').write_bytes((tmp_path / 'pt.npz').read_bytes()[:1000])
    with pytest.raises(ValueError, match='can not be read'):
        hub.load(ours, str(tmp_path / 'bad.npz'))
    with pytest.raises(ValueError, match='no settings'):
        hub.from_pretrained(str(tmp_path / 'pt.npz'))


# ------------------------------------------------------------------------------------------------
# runs of ours


def write_checkpoint(folder, model):
    """A checkpoint of a language model of ours, as far as it is opened again."""
    folder.mkdir()
    settings = {f'decoder.{f.name}': getattr(model.config, f.name) for f in fields(model.config)}
    settings |= dict(task='llm', tokenizer='bytes', processor='auto', seq_len=32)
    (folder / 'config.json').write_text(json.dumps(settings))
    save_file(model.state_dict(), folder / 'model.safetensors')


WITHOUT = """
import hub
assert hub.from_pretrained('ours').config.width == 16
for call in (lambda: hub.from_pretrained('theirs'), lambda: hub.from_pretrained('owner/name'),
             lambda: hub.export_run('ours', 'out'), lambda: hub.config_lines('theirs')):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_runs_of_ours_need_no_families(saved, tmp_path):
    """families/ is really deleted: our runs open, and the models of others are refused in one
    line."""
    for path in ROOT.glob('*.py'):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / 'tasks', tmp_path / 'tasks')
    shutil.copytree(saved('llama')[1], tmp_path / 'theirs')
    model = Decoder(replace(SMALL_DECODER, vocab_size=320))
    write_checkpoint(tmp_path / 'ours', model)
    done = subprocess.run([sys.executable, '-c', WITHOUT], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | dict(PYTHONPATH=''))
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 4 and all('families/ is not here' in line for line in said)

    # And with it, the same checkpoint is opened and exported.
    assert not hub.is_foreign(str(tmp_path / 'ours'))
    hub.export_run(str(tmp_path / 'ours'), str(tmp_path / 'out'))
    again = hub.from_pretrained(str(tmp_path / 'out')).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_run_that_no_family_writes_says_so(tmp_path, monkeypatch):
    """Such as a policy's, or a task's of one's own."""
    run = SimpleNamespace(settings=dict(task='mine.py'), tokenizer=None,
                          model=torch.nn.Linear(2, 2))
    monkeypatch.setattr(hub, 'open_ours', lambda path: run)
    with pytest.raises(ValueError, match=r"out/mine.*task='mine.py' trains a Linear.*huggingface"):
        hub.export_run('out/mine', str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_the_settings_of_a_model_are_a_config_file(saved):
    """What hub.py config prints runs as Python and makes the same model."""
    folder = saved('paligemma')[1]
    config = huggingface_config.read_config(folder)
    found = {}
    for line in hub.config_lines(folder).splitlines():
        key, _, value = line.partition(' = ')
        if value:
            found[key] = ast.literal_eval(value)
    assert found['task'] == 'vlm' and found['pixel_shuffle'] == 1 and found['connector_bias']
    assert found['init_from'] == found['tokenizer'] == found['processor'] == folder
    assert found['vit.width'] == config.vit.width
    assert found['decoder.head_dim'] == config.decoder.head_dim
