"""Stable Diffusion against diffusers and transformers: a tiny folder of theirs is the referee."""
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ['HF_HUB_OFFLINE'] = '1'
diffusers = pytest.importorskip('diffusers')
tf = pytest.importorskip('transformers')

import tokenizer as tokenizers  # noqa: E402
from families import diffusers as folders  # noqa: E402
from images.sd import (  # noqa: E402
    Level,
    UNet2DCondition,
    UNetConfig,
    doubled,
    levels_of,
    schedule_of,
)
from images.vae import VAEConfig  # noqa: E402
from vocabularies.clip import clip_row  # noqa: E402

tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()
diffusers.logging.set_verbosity_error()
diffusers.logging.disable_progress_bar()

# parts of Stable Diffusion 1, and the U-Net of 2
UNET = dict(
    sample_size=8, block_out_channels=(16, 32, 32), layers_per_block=2, cross_attention_dim=24,
    norm_num_groups=8, attention_head_dim=2,
    down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'),
    up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'))
SD2 = UNET | dict(
    attention_head_dim=(1, 2, 4), use_linear_projection=True, layers_per_block=1,
    upcast_attention=True)
VAE = dict(
    block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8, latent_channels=4,
    sample_size=16, down_block_types=('DownEncoderBlock2D',) * 2,
    up_block_types=('UpDecoderBlock2D',) * 2)
CLIP = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
    bos_token_id=0, eos_token_id=2)

# of a tokenizer, and what it may stumble over: case, spaces, accents, scripts, length
MERGES = [
    'c a', 'ca t</w>', 'd o', 'do g</w>', 't h', 'th e</w>', 'i n', 'in g</w>', 'Ã ©</w>',
    'a </w>']
TEXTS = [
    '', 'a cat', 'The DOG,  and\tthe\ncat!! 12345', "it's the cat's thing; we'll see, they've",
    'naïve café', 'ÉCOLE ﬁn', '猫と犬 🐱‍👤 e\u0301 İstanbul ǅ ß', ' a  b ', 'cat' * 30,
    'the dog ' * 60, '<html> & x_y', '\u00a0cat\u3000dog\u200b']


def randomized(model):
    """With random weights everywhere: biases, norms and last layers too."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        # matrices keep what goes through them at about its size, norms are around 1
        scale = 0.2 if p.ndim == 1 else 0.7 / p[0].numel() ** 0.5
        values = torch.randn(p.shape, generator=generator) * scale
        if p.ndim == 1 and 'norm' in name:
            values += 1
        p.data.copy_(values)
    return model.eval()


def write_tokenizer(folder):
    """CLIP's files: letters of bytes, the same at a word's end, merges."""
    letters = list(json.loads(tokenizers_json()))
    vocab = letters + [letter + '</w>' for letter in letters]
    vocab += [merge.replace(' ', '') for merge in MERGES[:-1]]
    vocab += ['<|startoftext|>', '<|endoftext|>']
    config = dict(
        model_max_length=77, tokenizer_class='CLIPTokenizer', bos_token='<|startoftext|>',
        eos_token='<|endoftext|>', unk_token='<|endoftext|>', pad_token='<|endoftext|>')

    folder.mkdir(parents=True)
    (folder / 'vocab.json').write_text(json.dumps({text: i for i, text in enumerate(vocab)}))
    (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(MERGES[:-1]) + '\n')
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    return len(vocab)


def tokenizers_json():
    from families.processors import bytes_tokenizer
    return json.dumps(bytes_tokenizer({})['model']['vocab'])


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """(diffusers' pipeline with random weights, its folder)."""
    folder = tmp_path_factory.mktemp('sd')
    size = write_tokenizer(folder / 'bpe')
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(
        vae=randomized(diffusers.AutoencoderKL(**VAE)),
        unet=randomized(diffusers.UNet2DConditionModel(**UNET)),
        text_encoder=randomized(tf.CLIPTextModel(tf.CLIPTextConfig(**CLIP, vocab_size=size))),
        tokenizer=tf.CLIPTokenizer.from_pretrained(folder / 'bpe'), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)

    # saved with the scheduler that Stable Diffusion has, drawn with ours
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, str(folder)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, bound=2e-5):
    assert a.shape == b.shape and (a - b).abs().max().item() <= bound, (a - b).abs().max().item()


def same_gradients(ours, theirs, part):
    """Of all parameters, relative to the largest of each."""
    grads = {folders.canonical(name, part): p.grad for name, p in theirs.named_parameters()}
    assert len(grads) == len(list(ours.parameters()))
    for name, p in ours.named_parameters():
        want = grads[folders.their_name(name, part)]
        close(p.grad, want, 1e-4 * max(1.0, want.abs().max().item()))


# -------------------------------------------------------------------------------------------------
# parity


@pytest.mark.parametrize('kind,size', [('sd1', 8), ('sd1', 6), ('sd2', 8)])
def test_a_unets_output_and_gradients(saved, tmp_path, kind, size):
    """A size that 4 does not divide, too."""
    theirs, folder = saved[0].unet, saved[1]
    # Stable Diffusion 2's heads are more at every level, its projections linear
    if kind == 'sd2':
        theirs, folder = randomized(diffusers.UNet2DConditionModel(**SD2)), str(tmp_path)
        theirs.save_pretrained(tmp_path / 'unet')
    ours = folders.from_folder(folder, 'unet')
    x, t, context = randn(2, 4, size, size), torch.tensor([981, 3]), randn(2, 7, 24)
    wanted = randn(2, 4, size, size)
    theirs.zero_grad()
    want = theirs(x, t, context).sample
    got = ours(x, t, context)
    close(got, want)
    for out in (got, want):
        (out * wanted).sum().backward()
    same_gradients(ours, theirs, 'unet')

    # with padding
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.no_grad():
        want = theirs(x, t, context, encoder_attention_mask=mask).sample
        close(ours(x, t, context, mask), want)

    # and computed twice
    ours.config.remat = True
    ours.zero_grad()
    (ours(x, t, context) * wanted).sum().backward()
    same_gradients(ours, theirs, 'unet')


def test_an_autoencoders_moments_pictures_and_gradients(saved):
    theirs, ours = saved[0].vae, folders.from_folder(saved[1], 'vae')
    pixels, scale = randn(2, 3, 16, 24), theirs.config.scaling_factor
    posterior = theirs.encode(pixels).latent_dist

    # ours are latents as the U-Net has them, times the factor
    mean, std = ours.moments(pixels)
    close(mean, posterior.mean * scale)
    close(std, posterior.std * scale)
    close(ours.encode(pixels), mean, 0)
    z = randn(2, 4, 8, 12)
    close(ours.decode(z * scale), theirs.decode(z).sample)

    # of the encoder and of the decoder
    theirs.zero_grad()
    (theirs.decode(posterior.mean).sample.square().sum() + posterior.std.sum()).backward()
    (ours.decode(mean).square().sum() + std.sum() / scale).backward()
    same_gradients(ours, theirs, 'vae')


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_a_convolution_after_doubling(memory_format):
    """Is that of the doubled pixels, with its gradients; a level takes this way with 256 pixels or
    more."""
    conv = torch.nn.Conv2d(5, 3, 3, padding=1).to(memory_format=memory_format)
    x = randn(2, 5, 4, 7).requires_grad_()

    def grads(out):
        return [out, *torch.autograd.grad(out.sin().sum(), [x, conv.weight, conv.bias])]

    plainly = conv(torch.nn.functional.interpolate(x, scale_factor=2.0))
    for got, want in zip(grads(doubled(conv, x)), grads(plainly)):
        close(got, want, 2e-6 * max(1.0, want.abs().max().item()))

    level = Level([(8, 8)], 0, 4, 1e-6, up=True).to(memory_format=memory_format)
    z = randn(1, 8, 16, 16)
    want = level.upsamplers[0].conv(torch.nn.functional.interpolate(z, scale_factor=2.0))
    close(level.upsample(z, (32, 32)), want)

    # to one less than double
    z = z[..., :15]
    want = level.upsamplers[0].conv(torch.nn.functional.interpolate(z, (31, 29)))
    close(level.upsample(z, (31, 29)), want)


def test_drawn_latents_have_their_moments_and_depend_on_their_key_alone(saved):
    vae = folders.from_folder(saved[1], 'vae')
    pixels = randn(1, 3, 16, 16).expand(4000, -1, -1, -1)
    # of one picture, encoded once and drawn 4,000 times
    mean, std = (x.expand(4000, -1, -1, -1) for x in vae.moments(pixels[:1]))
    vae.moments = lambda pixels: (mean[:len(pixels)], std[:len(pixels)])
    keys = torch.arange(4000)
    drawn = vae.encode(pixels, keys)
    close(drawn.mean(0) / std[0], mean[0] / std[0], 0.08)
    close(drawn.std(0) / std[0], torch.ones_like(std[0]), 0.06)
    close(vae.encode(pixels[:1], keys[7:8])[0], drawn[7], 0)


@pytest.mark.parametrize('layer', [-1, -2, 0])
@pytest.mark.parametrize('act', ['quick_gelu', 'gelu'])
def test_a_text_towers_layers_and_gradients(tmp_path, act, layer):
    # layers of ours that come after it are not built
    theirs = randomized(tf.CLIPTextModel(tf.CLIPTextConfig(**CLIP, hidden_act=act, vocab_size=99)))
    theirs.save_pretrained(tmp_path / 'text_encoder')
    config = replace(folders.read_config(str(tmp_path), 'text_encoder'), feature_layer=layer)
    ours = folders.from_folder(str(tmp_path), 'text_encoder', config=config)
    tokens = torch.randint(0, 99, (2, 77), generator=torch.Generator().manual_seed(0))
    out = theirs(tokens, output_hidden_states=True)

    # the first of theirs is what goes into the first block
    want = out.last_hidden_state
    if layer != -1:
        want = theirs.final_layer_norm(out.hidden_states[layer % 3 + 1])
    got = ours(tokens)
    close(got, want)
    assert len(ours.blocks) == layer % 3 + 1
    if layer == -1:
        for x in (got, out.last_hidden_state):
            (x * randn(2, 77, 24)).sum().backward()
        same_gradients(ours, theirs, 'text_encoder')


def test_full_size_models_have_as_many_parameters_as_published():
    def size(model, config):
        with torch.device('meta'):
            return sum(p.numel() for p in model(config).parameters())

    # of the U-Net, the autoencoder and the text tower of Stable Diffusion 1.5
    published = (859_520_964, 83_653_863, 123_060_480)
    for (model, config), count in zip(folders.MODELS.values(), published):
        assert size(model, config()) == count
    sd2 = folders.to_config(dict(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024,
                                 use_linear_projection=True), 'unet')
    assert size(UNet2DCondition, sd2) == 865_910_724


@pytest.mark.parametrize('config', [UNetConfig, VAEConfig])
def test_a_level_has_a_block(config):
    with pytest.raises(ValueError, match='unet.layers_per_block=0 must be at least 1'):
        levels_of(config(layers_per_block=0), 'unet')


# -------------------------------------------------------------------------------------------------
# tokens


@pytest.mark.parametrize('kind', ['merges.txt', 'tokenizer.json'])
def test_token_ids_are_those_of_cliptokenizer(saved, kind):
    pipe, folder = saved
    tok = tokenizers.load(os.path.join(folder, 'bpe' if kind == 'merges.txt' else 'tokenizer'))
    assert os.path.basename(tok.files[0]) == kind
    want = pipe.tokenizer(TEXTS, padding='max_length', max_length=77, truncation=True).input_ids
    assert [clip_row(tok, text) for text in TEXTS] == want

    # any letters, with accents that stand alone
    rng = np.random.default_rng(0)
    codes = *range(32, 127), *range(0xa0, 0x250), *range(0x300, 0x370), 0x1f600, 0x4e2d, 0x200d
    letters = [chr(code) for code in codes]
    texts = [''.join(rng.choice(letters, 60)) for _ in range(200)]
    want = pipe.tokenizer(texts, padding='max_length', max_length=40, truncation=True).input_ids
    assert [clip_row(tok, text, 40) for text in texts] == want
    assert tok.pad_id == tok.eos_id == pipe.tokenizer.eos_token_id

    # as a worker gets it
    import pickle
    assert pickle.loads(pickle.dumps(tok)).encode('the cat') == tok.encode('the cat')


def test_a_checkpoints_folder_gives_the_same_tokenizer(saved, tmp_path):
    """What train.py copies is `files`, by their names."""
    tok = tokenizers.load(os.path.join(saved[1], 'bpe'))
    for path in tok.files:
        shutil.copy(path, tmp_path)
    assert tokenizers.load(str(tmp_path)).encode(TEXTS[4]) == tok.encode(TEXTS[4])


def test_merges_that_are_not_clips_are_refused(tmp_path):
    # alone, and then beside a vocabulary without CLIP's letters
    (tmp_path / 'merges.txt').write_text('#version: 0.2\na b\n')
    with pytest.raises(ValueError, match='vocab.json'):
        tokenizers.load(str(tmp_path))

    # whose letters are not marked at a word's end
    (tmp_path / 'vocab.json').write_text(json.dumps({'a': 0, 'b': 1, 'ab': 2}))
    with pytest.raises(ValueError, match="not CLIP's"):
        tokenizers.load(str(tmp_path))


# -------------------------------------------------------------------------------------------------
# folders


def weights(path, stem='diffusion_pytorch_model'):
    found = {}
    for file in sorted(os.listdir(path)):
        if file.startswith(stem) and file.endswith('.safetensors'):
            found |= load_file(os.path.join(path, file))
    return found


def test_an_exported_folder_is_the_folder_to_the_bit(saved, tmp_path):
    pipe, folder = saved
    models = {part: folders.from_folder(folder, part) for part in folders.MODELS}
    folders.export_parts(models, str(tmp_path / 'out'), folder)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / 'out',
                                                              safety_checker=None)
    for part in models:
        want, got = getattr(pipe, part).state_dict(), getattr(again, part).state_dict()
        assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    scheduler = diffusers.PNDMScheduler.from_pretrained(folder, subfolder='scheduler')
    assert again.scheduler.config == scheduler.config

    # one part in half precision, the others copied
    folders.export_parts({'unet': models['unet']}, str(tmp_path / 'half'), folder, torch.float16)
    assert {v.dtype for v in weights(tmp_path / 'half' / 'unet').values()} == {torch.float16}
    assert {v.dtype for v in weights(tmp_path / 'half' / 'vae').values()} == {torch.float32}

    # onto itself
    with pytest.raises(ValueError, match='source'):
        folders.export_parts(models, folder, folder)


@pytest.mark.parametrize('variant', ['', 'fp16'])
@pytest.mark.parametrize('shards', ['10GB', '20KB'])
def test_sharded_files_and_fp16_variants(saved, tmp_path, shards, variant):
    unet = saved[0].unet
    want = folders.from_folder(saved[1], 'unet').state_dict()
    # a copy, for another test needs the first in fp32
    half = diffusers.UNet2DConditionModel(**UNET)
    half.load_state_dict(unet.state_dict())
    if variant:
        half, want = half.half(), {k: v.half().float() for k, v in want.items()}
    half.save_pretrained(tmp_path / 'unet', max_shard_size=shards, variant=variant or None)
    files = [file for file in os.listdir(tmp_path / 'unet') if file.endswith('.safetensors')]
    assert (len(files) > 1) == (shards == '20KB')
    got = folders.from_folder(str(tmp_path), 'unet').state_dict()
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_names_that_published_folders_have(saved, tmp_path):
    """SD 1's autoencoder names its attention otherwise, its text tower has a prefix and a table of
    positions."""
    folder = tmp_path / 'old'
    shutil.copytree(saved[1], folder)
    # the autoencoder, written with the old names
    old = {v: k for k, v in folders.OLD_VAE.items()}
    vae = weights(folder / 'vae')
    renamed = {}
    for key, value in vae.items():
        for new in old:
            if f'attentions.0.{new}.' in key:
                key = key.replace(new, old[new])
                # a matrix was a convolution of one pixel
                if value.ndim == 2:
                    value = value[..., None, None]
        renamed[key] = value.contiguous()
    # or nothing was tested
    assert any('proj_attn' in key for key in renamed)
    save_file(renamed, folder / 'vae' / 'diffusion_pytorch_model.safetensors')

    # the text tower
    text = weights(folder / 'text_encoder', 'model')
    text = {'text_model.' + k.removeprefix('text_model.'): v for k, v in text.items()}
    text['text_model.embeddings.position_ids'] = torch.arange(77)[None]
    save_file(text, folder / 'text_encoder' / 'model.safetensors')
    for part in ('vae', 'text_encoder'):
        want = folders.from_folder(saved[1], part).state_dict()
        got = folders.from_folder(str(folder), part).state_dict()
        assert all(torch.equal(want[k], got[k]) for k in want)


@pytest.mark.parametrize('part,change,named', [
    ('unet', dict(class_embed_type='timestep'), "class_embed_type='timestep'"),
    ('unet', dict(addition_embed_type='text_time'), 'addition_embed_type'),
    ('unet', dict(resnet_time_scale_shift='scale_shift'), 'resnet_time_scale_shift'),
    ('unet', dict(down_block_types=['AttnDownBlock2D'] * 3), 'AttnDownBlock2D'),
    ('unet', dict(up_block_types=['UpBlock2D'] * 3), 'up_block_types'),
    ('unet', dict(transformer_layers_per_block=[1, 2, 10]), 'transformer_layers_per_block'),
    ('unet', dict(attention_head_dim=3), 'num_heads'),
    ('unet', dict(norm_num_groups=5), 'norm_num_groups'),
    ('unet', dict(block_out_channels=[16, -1, 32]), 'block_out_channels'),
    ('unet', dict(layers_per_block='two'), 'layers_per_block'),
    ('unet', dict(layers_per_block=3), 'is missing'),
    ('unet', dict(layers_per_block=1), 'not known here'),
    ('unet', dict(cross_attention_dim=16), 'config.json says'),
    ('vae', dict(shift_factor=0.1), 'shift_factor'),
    ('vae', dict(use_quant_conv=False), 'use_quant_conv'),
    ('text_encoder', dict(hidden_act='relu'), "activation='relu'"),
    ('text_encoder', dict(model_type='t5'), "model_type='t5'")])
def test_settings_that_are_not_computed_are_refused_by_name(saved, tmp_path, part, change, named):
    shutil.copytree(os.path.join(saved[1], part), tmp_path / part)
    path = tmp_path / part / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=named):
        folders.from_folder(str(tmp_path), part)


def test_what_a_folder_holds_more_is_said_or_refused(saved, tmp_path, capsys):
    """A safety checker beside the parts, layers that config.json does not tell of, NaN."""
    shutil.copytree(saved[1], tmp_path / 'sd')
    text = tmp_path / 'sd' / 'text_encoder'
    (tmp_path / 'sd' / 'safety_checker').mkdir()
    tensors = load_file(text / 'model.safetensors')
    save_file(tensors, tmp_path / 'sd' / 'safety_checker' / 'model.safetensors')
    folders.open_run(str(tmp_path / 'sd'))
    line, = (line for line in capsys.readouterr().err.splitlines() if 'unused' in line)
    assert f'safety_checker ({len(tensors)}) left there unused' in line

    config = json.loads((text / 'config.json').read_text())
    fewer = config | dict(num_hidden_layers=config['num_hidden_layers'] - 1)
    (text / 'config.json').write_text(json.dumps(fewer))
    with pytest.raises(ValueError, match=f"layers.{fewer['num_hidden_layers']}.*not known here"):
        folders.from_folder(str(tmp_path / 'sd'), 'text_encoder')

    (text / 'config.json').write_text(json.dumps(config))
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, text / 'model.safetensors')
    with pytest.raises(ValueError, match=f'{name} holds NaN'):
        folders.from_folder(str(tmp_path / 'sd'), 'text_encoder')


def test_pickles_and_damaged_files_are_refused(saved, tmp_path):
    shutil.copytree(os.path.join(saved[1], 'vae'), tmp_path / 'vae')
    path = tmp_path / 'vae' / 'diffusion_pytorch_model.safetensors'
    # cut short
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match='can not be read'):
        folders.from_folder(str(tmp_path), 'vae')

    # nothing but a pickle
    path.rename(tmp_path / 'vae' / 'diffusion_pytorch_model.bin')
    with pytest.raises(ValueError, match='pickles run code'):
        folders.from_folder(str(tmp_path), 'vae')

    # no folder of the part
    with pytest.raises(ValueError, match='no unet/config.json'):
        folders.from_folder(str(tmp_path), 'unet')


@pytest.mark.parametrize('n', [1, 7, 50, 333])
@pytest.mark.parametrize('config', [dict(), dict(steps_offset=0, clip_sample=True), dict(
    prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing')])
def test_the_schedule_of_a_folder(saved, tmp_path, config, n):
    """Is what StableDiffusionPipeline makes of it with DDIM."""
    pipe = saved[0]
    with open(f'{saved[1]}/scheduler/scheduler_config.json') as file:
        scheduler = diffusers.DDIMScheduler.from_config(json.load(file) | config)
    scheduler.save_pretrained(tmp_path / 'scheduler')
    theirs = diffusers.StableDiffusionPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, scheduler, None, None,
        requires_safety_checker=False).scheduler
    theirs.set_timesteps(n)
    shutil.copytree(f'{saved[1]}/unet', tmp_path / 'unet')
    ours = schedule_of(folders.read_config(str(tmp_path), 'unet'))
    assert ours.timesteps(n).tolist() == theirs.timesteps.tolist()

    # and step by step
    x = y = randn(1, 4, 8, 8)
    for t, t_next in ours.pairs(n)[:20]:
        output = randn(1, 4, 8, 8, seed=t)
        x, y = ours.step(output, t, t_next, x), theirs.step(output, t, y).prev_sample
        close(x, y, 1e-5 * max(1, y.abs().max().item()))


@pytest.mark.parametrize('change,named', [
    (dict(trained_betas=[0.1] * 1000), r'trained_betas=\[0.1, 0.1'),
    (dict(thresholding=True), 'thresholding=True'),
    (dict(beta_schedule='sigmoid'), "'sigmoid'"),
    (dict(prediction_type='flow_prediction'), "'flow_prediction'"),
    (dict(_class_name='FlowMatchEulerDiscreteScheduler'), 'FlowMatchEulerDiscreteScheduler')])
def test_schedules_that_are_not_known_are_refused(saved, tmp_path, change, named):
    (tmp_path / 'scheduler').mkdir()
    shutil.copytree(f'{saved[1]}/unet', tmp_path / 'unet')
    with open(f'{saved[1]}/scheduler/scheduler_config.json') as file:
        config = json.load(file) | change
    (tmp_path / 'scheduler' / 'scheduler_config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        folders.read_config(str(tmp_path), 'unet')


# -------------------------------------------------------------------------------------------------
# whole runs


PROMPTS = ['the dog', 'a cat, 2 dogs and THE cat']


def tokens_of(tok, texts):
    return torch.tensor([clip_row(tok, text) for text in texts])


@pytest.mark.parametrize('steps,guidance', [(10, 7.5), (7, 7.5), (7, 1.0), (30, 3.0)])
def test_pictures_of_prompts_are_those_of_stablediffusionpipeline(saved, steps, guidance):
    pipe, folder = saved
    run = folders.open_run(folder)
    # theirs begins with the same noise
    noise = randn(2, 4, 8, 8, seed=3)
    want = pipe(PROMPTS, latents=noise.clone(), num_inference_steps=steps, guidance_scale=guidance,
                output_type='np').images
    want = torch.tensor(want)
    tokens = tokens_of(run.tokenizer, PROMPTS)
    got = run.model.sample(tokens, noise=noise, steps=steps, guidance=guidance)
    got = (got / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    # the two prompts give two pictures, each with something in it
    assert want.std() > 0.1 and (want[0] - want[1]).abs().mean() > 1e-3
    close(got, want, 1e-3)


@pytest.mark.parametrize('steps,strength', [(10, 0.6), (7, 0.5)])
def test_pictures_from_pictures_are_those_of_img2img(saved, steps, strength):
    pipe, folder = saved
    img2img = diffusers.StableDiffusionImg2ImgPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler, None, None,
        requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    run = folders.open_run(folder)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = run.model.vae.encode(2 * pixels - 1)

    # latents go in, and the noise is the generator's first
    only_decodes = dict(config=pipe.vae.config, decode=pipe.vae.decode, dtype=torch.float32)
    img2img.vae = None
    img2img.vae = type('Latents', (), only_decodes)()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    want = img2img(PROMPTS, image=latents, strength=strength, num_inference_steps=steps,
                   guidance_scale=4.0, generator=torch.Generator().manual_seed(5),
                   output_type='np').images
    tokens = tokens_of(run.tokenizer, PROMPTS)
    got = run.model.sample(tokens, noise=noise, steps=steps, guidance=4.0, image=latents,
                           strength=strength)
    got = (got / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    close(got, torch.tensor(want), 1e-3)
