"""sd.py and hub_sd.py against diffusers and transformers: a tiny random folder, saved by them, is the referee."""
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

os.environ['HF_HUB_OFFLINE'] = '1'
diffusers = pytest.importorskip('diffusers')
tf = pytest.importorskip('transformers')

import hub_sd  # noqa: E402
import tokenizer as tokenizers  # noqa: E402
from sd import CLIPText, CLIPTextConfig, UNet2DCondition, UNetConfig  # noqa: E402

tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()
diffusers.logging.set_verbosity_error()
diffusers.logging.disable_progress_bar()

UNET = dict(sample_size=8, block_out_channels=(16, 32, 32), layers_per_block=2, cross_attention_dim=24, norm_num_groups=8,
            attention_head_dim=2, down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'),
            up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'))
SD2 = UNET | dict(attention_head_dim=(1, 2, 4), use_linear_projection=True, layers_per_block=1, upcast_attention=True)
VAE = dict(block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8, latent_channels=4, sample_size=16,
           down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2)
CLIP = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, bos_token_id=0,
            eos_token_id=2)
MERGES = ['c a', 'ca t</w>', 'd o', 'do g</w>', 't h', 'th e</w>', 'i n', 'in g</w>', 'Ã ©</w>', 'a </w>']
TEXTS = ['', 'a cat', 'The DOG,  and\tthe\ncat!! 12345', "it's the cat's thing; we'll see, they've", 'naïve café ÉCOLE ﬁn',
         '猫と犬 🐱‍👤 e\u0301 İstanbul ǅ ß', ' a  b ', 'cat' * 30, 'the dog ' * 60, '<html> & x_y', '\u00a0cat\u3000dog\u200b']


def randomized(model):
    """With random weights everywhere: biases, norms and last layers too."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        scale = 0.2 if p.ndim == 1 else 0.7 / p[0].numel() ** 0.5
        p.data.copy_(torch.randn(p.shape, generator=generator) * scale + (p.ndim == 1 and 'norm' in name))
    return model.eval()


def write_tokenizer(folder):
    """CLIP's files: letters of bytes, the same at a word's end, merges."""
    level = json.loads(tokenizers_json())
    letters = [*level]
    vocab = letters + [letter + '</w>' for letter in letters] + [m.replace(' ', '') for m in MERGES[:-1]]
    vocab += ['<|startoftext|>', '<|endoftext|>']
    folder.mkdir(parents=True)
    (folder / 'vocab.json').write_text(json.dumps({text: i for i, text in enumerate(vocab)}))
    (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(MERGES[:-1]) + '\n')
    (folder / 'tokenizer_config.json').write_text(json.dumps(dict(
        model_max_length=77, tokenizer_class='CLIPTokenizer', bos_token='<|startoftext|>', eos_token='<|endoftext|>',
        unk_token='<|endoftext|>', pad_token='<|endoftext|>')))
    return len(vocab)


def tokenizers_json():
    import hub
    return json.dumps(hub.bytes_tokenizer({})['model']['vocab'])


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """(diffusers' pipeline with random weights, its folder)."""
    folder = tmp_path_factory.mktemp('sd')
    size = write_tokenizer(folder / 'bpe')
    pipe = diffusers.StableDiffusionPipeline(
        vae=randomized(diffusers.AutoencoderKL(**VAE)), unet=randomized(diffusers.UNet2DConditionModel(**UNET)),
        text_encoder=randomized(tf.CLIPTextModel(tf.CLIPTextConfig(**CLIP, vocab_size=size))),
        tokenizer=tf.CLIPTokenizer.from_pretrained(folder / 'bpe'), safety_checker=None, feature_extractor=None,
        scheduler=diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear',
                                          skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        requires_safety_checker=False)
    pipe.save_pretrained(folder)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, str(folder)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, bound=2e-5):
    assert a.shape == b.shape and (a - b).abs().max().item() <= bound, (a - b).abs().max().item()


def same_gradients(ours, theirs, part):
    """Of all parameters, relative to the largest of each."""
    grads = {hub_sd.canonical(name, part): p.grad for name, p in theirs.named_parameters()}
    assert len(grads) == len(list(ours.parameters()))
    for name, p in ours.named_parameters():
        want = grads[hub_sd.their_name(name, part)]
        close(p.grad, want, 1e-4 * max(1.0, want.abs().max().item()))


# ----------------------------------------------------------------------------------------------------------------------
# parity


@pytest.mark.parametrize('kind,size', [('sd1', 8), ('sd1', 6), ('sd2', 8)])
def test_a_unets_output_and_gradients(saved, tmp_path, kind, size):
    """A size that 4 does not divide, too."""
    theirs, folder = saved[0].unet, saved[1]
    if kind == 'sd2':
        theirs, folder = randomized(diffusers.UNet2DConditionModel(**SD2)), str(tmp_path)
        theirs.save_pretrained(tmp_path / 'unet')
    ours = hub_sd.from_folder(folder, 'unet')
    x, t, context, wanted = randn(2, 4, size, size), torch.tensor([981, 3]), randn(2, 7, 24), randn(2, 4, size, size)
    theirs.zero_grad()
    want = theirs(x, t, context).sample
    got = ours(x, t, context)
    close(got, want)
    for out in (got, want):
        (out * wanted).sum().backward()
    same_gradients(ours, theirs, 'unet')
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.no_grad():
        close(ours(x, t, context, mask), theirs(x, t, context, encoder_attention_mask=mask).sample)
    ours.config.remat = True
    ours.zero_grad()
    (ours(x, t, context) * wanted).sum().backward()
    same_gradients(ours, theirs, 'unet')


def test_an_autoencoders_moments_pictures_and_gradients(saved):
    theirs, ours = saved[0].vae, hub_sd.from_folder(saved[1], 'vae')
    pixels, scale = randn(2, 3, 16, 24), theirs.config.scaling_factor
    posterior = theirs.encode(pixels).latent_dist
    mean, std = ours.moments(pixels)
    close(mean, posterior.mean * scale)
    close(std, posterior.std * scale)
    close(ours.encode(pixels), mean, 0)
    z = randn(2, 4, 8, 12)
    close(ours.decode(z * scale), theirs.decode(z).sample)
    theirs.zero_grad()
    (theirs.decode(posterior.mean).sample.square().sum() + posterior.std.sum()).backward()
    (ours.decode(mean).square().sum() + std.sum() / scale).backward()
    same_gradients(ours, theirs, 'vae')


def test_drawn_latents_have_their_moments_and_depend_on_their_key_alone(saved):
    vae, pixels = hub_sd.from_folder(saved[1], 'vae'), randn(1, 3, 16, 16).expand(4000, -1, -1, -1)
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
    theirs = randomized(tf.CLIPTextModel(tf.CLIPTextConfig(**CLIP, hidden_act=act, vocab_size=99)))
    theirs.save_pretrained(tmp_path / 'text_encoder')
    config = replace(hub_sd.read_config(str(tmp_path), 'text_encoder'), feature_layer=layer)
    ours = hub_sd.from_folder(str(tmp_path), 'text_encoder', config=config)
    tokens = torch.randint(0, 99, (2, 77), generator=torch.Generator().manual_seed(0))
    out = theirs(tokens, output_hidden_states=True)
    want = theirs.final_layer_norm(out.hidden_states[layer + 1 if layer >= 0 else layer])
    got = ours(tokens)
    close(got, want if layer != -1 else out.last_hidden_state)
    assert len(ours.blocks) == layer % 3 + 1
    if layer == -1:
        for x in (got, out.last_hidden_state):
            (x * randn(2, 77, 24)).sum().backward()
        same_gradients(ours, theirs, 'text_encoder')


def test_full_size_models_have_as_many_parameters_as_published():
    for (model, config), count in zip(hub_sd.MODELS.values(), (859_520_964, 83_653_863, 123_060_480)):
        with torch.device('meta'):
            assert sum(p.numel() for p in model(config()).parameters()) == count
    sd2 = hub_sd.to_config(dict(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024,
                                use_linear_projection=True), 'unet')
    with torch.device('meta'):
        assert sum(p.numel() for p in UNet2DCondition(sd2).parameters()) == 865_910_724
