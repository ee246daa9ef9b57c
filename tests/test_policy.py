"""policies.py. What is padded does not matter, rows do not see each other, and distributions are learned."""
import multiprocessing
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler
from diffusers.models.resnet import Downsample1D, ResidualTemporalBlock1D, Upsample1D
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from diffusion import normal, random_keys, sincos, uniform
from model import (
    VLM,
    Decoder,
    DecoderBlock,
    DecoderConfig,
    ViTBlock,
    ViTConfig,
    VLMConfig,
    generate,
    rope_table,
    rotate,
)
from policies import (
    VLA,
    ConvBlock,
    DiffusionPolicy,
    PolicyConfig,
    UNet1d,
    Upsample,
    VLAConfig,
    build,
    valid_numbers,
    windows,
)

IMAGE, PAD, V = 5, 0, 50
VIT = ViTConfig(image_size=16, patch_size=8, width=24, depth=1, mlp_dim=48, num_heads=3)
TEXT = DecoderConfig(vocab_size=V, width=32, depth=2, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=8)
SMALL = PolicyConfig(action_dim=3, action_steps=8, proprio_dim=5, width=32, depth=2, mlp_dim=64, num_heads=4, pool=2,
                     channels=(16, 32))
DENOISERS = ('mlp', 'unet', 'transformer')


def policy(seed=0, **settings):
    """A small policy none of whose weights are zero."""
    torch.manual_seed(seed)
    config = replace(SMALL, **settings)
    encoder = {'none': lambda: None, 'text': lambda: Decoder(replace(TEXT, tied=False)),
               'vlm': lambda: VLM(VLMConfig(VIT, TEXT, IMAGE))}
    return shaken(DiffusionPolicy(config, encoder[config.encoder]()))


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def lowdim(rows, seed=0, config=SMALL):
    """Samples with padded actions, of robots with other numbers."""
    g = torch.Generator().manual_seed(seed)
    real = torch.randint(1, config.action_steps + 1, (rows, 1), generator=g)
    action_mask = torch.rand(rows, config.action_dim, generator=g) < 0.7
    action_mask[:, 0] = True
    return dict(actions=torch.randn(rows, config.action_steps, config.action_dim, generator=g),
                is_pad=torch.arange(config.action_steps)[None] >= real, action_mask=action_mask,
                proprio=torch.randn(rows, config.proprio_dim, generator=g),
                proprio_mask=torch.rand(rows, config.proprio_dim, generator=g) < 0.8,
                keys=random_keys(seed, torch.arange(rows)), rows=torch.arange(rows))


def observations(pictures):
    """Rows of image tokens, words and padding, with so many pictures each: (tokens, pixels, segments)."""
    width = 4 * max(pictures) + 6
    tokens = torch.full((len(pictures), width), PAD)
    for i, n in enumerate(pictures):
        words = torch.randint(10, V, (3 + i % 3,), generator=torch.Generator().manual_seed(i))
        tokens[i, :4 * n + len(words)] = torch.cat((torch.full((4 * n,), IMAGE), words))
    return tokens, randn(sum(pictures), 3, 16, 16), (tokens != PAD).long()


def take(x, i):
    return {k: v[i:i + 1] for k, v in x.items()} | {'rows': torch.tensor([0])}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ----------------------------------------------------------------------------------------------------------------------
# the loss


@pytest.mark.parametrize('denoiser', DENOISERS)
@pytest.mark.parametrize('objective', ['flow', 'ddpm'])
def test_padded_actions_are_neither_input_nor_target(denoiser, objective):
    model, x = policy(denoiser=denoiser, objective=objective, num_noise_draws=2), lowdim(4)
    noise, time = normal(x['keys'], (2, 8, 3)).flatten(0, 1), model.schedule.times(uniform(x['keys'], 2, 1).flatten())
    loss, count = model.loss(lowdim=x, noise=noise, time=time)
    grads = gradients(model, loss)
    assert count == valid_numbers(x).sum() < x['actions'].numel()
    junk = torch.tensor([float('nan'), float('inf'), 1e30]).expand_as(x['actions'])
    other = x | dict(actions=x['actions'].where(valid_numbers(x), junk),
                     proprio=x['proprio'].where(x['proprio_mask'], torch.tensor(float('nan'))))
    other_noise = noise.where(valid_numbers(x).repeat_interleave(2, 0), 100.0)
    loss2, _ = model.loss(lowdim=other, noise=other_noise, time=time)
    assert torch.equal(loss, loss2)
    for name, g in gradients(model, loss2).items():
        assert torch.equal(g, grads[name]), name
    moved = x | dict(actions=x['actions'] + 0.1)            # and those that are real do
    assert model.loss(lowdim=moved, noise=noise, time=time)[0] != loss


@pytest.mark.parametrize('denoiser', DENOISERS)
def test_attention_leaves_padding_out(denoiser):
    """A transformer's output at real actions is the same without the padded ones."""
    model, x = policy(denoiser=denoiser), lowdim(1)
    x_t, t, state = randn(1, 8, 3), torch.tensor([0.3]), x['proprio']
    valid = torch.ones(1, 8, 3, dtype=torch.bool)
    valid[:, 5:] = False
    masked = model.denoise(x_t, t, state, None, None, valid)[:, :5]
    x_t[:, 5:] = 7.0
    assert torch.equal(masked, model.denoise(x_t, t, state, None, None, valid)[:, :5]) == (denoiser == 'transformer')


@pytest.mark.parametrize('kind', ['mse', 'l1', 'huber'])
@pytest.mark.parametrize('objective, prediction', [('flow', 'epsilon'), ('ddpm', 'epsilon'), ('ddpm', 'sample'),
                                                   ('ddpm', 'v_prediction')])
def test_loss_kinds_and_objectives(kind, objective, prediction):
    model = policy(objective=objective, prediction=prediction, loss=kind, time='beta')
    x = {k: v for k, v in lowdim(3).items() if k in ('actions', 'proprio', 'keys')}
    noise, u = normal(x['keys'], (1, 8, 3))[:, 0], uniform(x['keys'], 1, 1)[:, 0]
    if objective == 'flow':
        t = 0.001 + 0.999 * u ** (1 / 1.5)
        s = t[:, None, None]
        x_t, target, fraction = s * noise + (1 - s) * x['actions'], noise - x['actions'], t
    else:
        ref = DDIMScheduler(100, beta_schedule='squaredcos_cap_v2')
        t = (u * 100).long()
        x_t, fraction = ref.add_noise(x['actions'], noise, t), t / 100
        target = {'epsilon': noise, 'sample': x['actions'],
                  'v_prediction': ref.get_velocity(x['actions'], noise, t)}[prediction]
    error = model.denoiser(x_t, sincos(fraction, 32), x['proprio']) - target
    each = {'mse': error ** 2, 'l1': error.abs(),
            'huber': torch.where(error.abs() < 1, error ** 2 / 2, error.abs() - 0.5)}[kind].sum((1, 2))
    losses, counts = model.loss(lowdim=x, reduction='none')
    close(losses, each)
    assert counts.tolist() == [24, 24, 24]
    loss, count = model.loss(lowdim=x)
    close(loss, each.sum())
    assert count == 72


def test_noise_draws_are_a_mean_and_do_not_depend_on_the_batch():
    many, once, x = policy(num_noise_draws=3), policy(), lowdim(4)
    noise, time = normal(x['keys'], (3, 8, 3)), uniform(x['keys'], 3, 1)
    losses, counts = many.loss(lowdim=x, reduction='none')
    alone = [once.loss(lowdim=x, noise=noise[:, k], time=time[:, k], reduction='none') for k in range(3)]
    close(losses, torch.stack([a[0] for a in alone]).mean(0))
    assert torch.equal(counts, alone[0][1])
    for i in range(4):
        close(many.loss(lowdim=take(x, i), reduction='none')[0], losses[i:i + 1])


def test_encoder_runs_once_for_all_draws():
    model, (tokens, pixels, segments) = policy(encoder='vlm', num_noise_draws=4), observations([1, 2])
    calls = []
    model.encoder.vit.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    model.loss(tokens, None, pixels, segments=segments, lowdim=lowdim(2))
    assert calls == [3]


@pytest.mark.parametrize('denoiser', DENOISERS)
@pytest.mark.parametrize('encoder', ['text', 'vlm'])
def test_conditions(denoiser, encoder):
    """Pictures and words of its own row matter to a sample; other rows, and padding, do not."""
    model, x = policy(denoiser=denoiser, encoder=encoder).eval(), lowdim(3)
    tokens, pixels, segments = observations([2, 0, 1] if encoder == 'vlm' else [0, 0, 0])

    def losses(tokens, pixels, x=x):
        return model.loss(tokens, None, pixels, segments=segments, lowdim=x, reduction='none')[0]
    before = losses(tokens, pixels)
    other = tokens.clone()
    other[1, 1] = 49
    assert (losses(other, pixels) != before).tolist() == [False, True, False]
    other[1, 1], other[1, -1], other[0, -1] = tokens[1, 1], 49, 49      # padding
    close(losses(other, pixels), before, 0)
    if encoder == 'vlm':
        close((losses(tokens, pixels + torch.tensor([0.0, 0, 1])[:, None, None, None]) - before).abs() > 1e-6,
              torch.tensor([False, False, True]))
    order = torch.tensor([2, 0, 1])
    shuffled = {k: v[order] for k, v in x.items()}                      # `rows` says where they are
    close(losses(tokens, pixels, shuffled), before[order])
    text_only = {k: v[:1] for k, v in x.items()}                        # other rows have no actions
    close(losses(tokens, pixels, text_only), before[:1])


@pytest.mark.parametrize('denoiser', DENOISERS)
@pytest.mark.parametrize('encoder', ['none', 'text', 'vlm'])
def test_every_parameter_has_a_gradient(denoiser, encoder):
    """Else DDP would wait: with pictures, without, and in a batch without actions."""
    model = policy(denoiser=denoiser, encoder=encoder)
    tokens, pixels, segments = observations([1, 0] if encoder == 'vlm' else [0, 0])
    grads = gradients(model, model.loss(tokens, None, pixels, segments=segments, lowdim=lowdim(2))[0])
    assert [name for name, g in grads.items() if not g.any() and 'norm.weight' not in name] == []
    tokens, _, segments = observations([0, 0])
    gradients(model, model.loss(tokens, None, None, segments=segments, lowdim=lowdim(2))[0])
    for empty in (tokens, torch.full_like(tokens, PAD)):
        loss, count = model.loss(empty, None, None, segments=(empty != PAD).long())
        assert loss == 0 and count == 0 and not any(g.any() for g in gradients(model, loss).values())


def as_linear(conv):
    """The weights of a convolution over time, as our Linear on windows has them."""
    return dict(weight=conv.weight.transpose(1, 2).flatten(1), bias=conv.bias)


def test_unet_parts_equal_diffusers():
    """Ours with a FiLM that only shifts is the block of diffusers' temporal U-Net; halving and doubling are its own."""
    torch.manual_seed(0)
    ours, ref = ConvBlock(3, 16, 10, 5), ResidualTemporalBlock1D(3, 16, 10, 5)
    with torch.no_grad():
        for a, b in ((ours.conv1, ref.conv_in.conv1d), (ours.skip, ref.residual_conv), (ours.conv2,
                                                                                        ref.conv_out.conv1d)):
            a.load_state_dict(as_linear(b))
        ours.norm1.load_state_dict(ref.conv_in.group_norm.state_dict())
        ours.norm2.load_state_dict(ref.conv_out.group_norm.state_dict())
        ours.film.weight[:16], ours.film.bias[:16] = 0, 1
        ours.film.weight[16:], ours.film.bias[16:] = ref.time_emb.weight, ref.time_emb.bias
    x, condition = randn(2, 8, 3), randn(2, 10, seed=1)
    close(ours(x, torch.nn.functional.mish(condition)), ref(x.mT, condition).mT, 1e-6)
    down, up = Downsample1D(3, use_conv=True, padding=1), Upsample1D(3, use_conv_transpose=True)
    linear, double = torch.nn.Linear(9, 3), Upsample(3)
    linear.load_state_dict(as_linear(down.conv))
    close(linear(windows(x, 3, 2)), down(x.mT).mT, 1e-6)
    double.load_state_dict({'taps.weight': up.conv.weight.permute(2, 1, 0).flatten(0, 1), 'bias': up.conv.bias})
    close(double(x), up(x.mT).mT, 1e-6)


@pytest.mark.parametrize('name', [*DENOISERS, 'vla'])
def test_bfloat16(name):
    """Autocast, as train.py has it: loss, gradients and samples are those of fp32 but for rounding."""
    model = vla() if name == 'vla' else policy(denoiser=name, encoder='vlm')
    (tokens, pixels, segments), x = observations([1, 2]), lowdim(2)

    def losses():
        out = model.loss(tokens, None, pixels, segments=segments, lowdim=x)
        return out[1][0] + out[0][0] if name == 'vla' else out[0]
    exact, samples = losses(), model.sample(tokens, pixels, segments=segments, lowdim=x)
    grads = gradients(model, exact)
    with torch.autocast('cpu', torch.bfloat16):
        rough, rough_samples = losses(), model.sample(tokens, pixels, segments=segments, lowdim=x)
    assert rough.dtype == rough_samples.dtype == torch.float32 and rough != exact
    close(rough, exact, 0.02)
    close(rough_samples, samples, 0.1)
    rough_grads = gradients(model, rough)
    norm = sum(g.square().sum() for g in grads.values()).sqrt()
    assert sum((g - rough_grads[k]).square().sum() for k, g in grads.items()).sqrt() < 0.05 * norm


# ----------------------------------------------------------------------------------------------------------------------
# sampling


@pytest.mark.parametrize('denoiser', DENOISERS)
@pytest.mark.parametrize('objective, sampler', [('flow', 'euler'), ('flow', 'heun'), ('ddpm', 'ddim'),
                                                ('ddpm', 'ddpm')])
def test_samples_do_not_depend_on_the_batch(denoiser, objective, sampler):
    model = policy(denoiser=denoiser, objective=objective, encoder='vlm', clip_range=1.0)
    tokens, pixels, segments = observations([1, 1, 1])
    x = {k: v for k, v in lowdim(3).items() if k not in ('actions', 'is_pad')}
    actions = model.sample(tokens, pixels, segments=segments, lowdim=x, steps=4, sampler=sampler)
    assert actions.shape == (3, 8, 3) and model.training
    assert (actions == 0).all(1).logical_xor(x['action_mask']).all()        # what a robot does not have stays 0
    for i in range(3):
        alone = model.sample(tokens[i:i + 1], pixels[i:i + 1], segments=segments[i:i + 1], lowdim=take(x, i), steps=4,
                             sampler=sampler)
        close(alone, actions[i:i + 1])
    assert not torch.equal(actions, model.sample(tokens, pixels, segments=segments, lowdim=x | dict(
        keys=x['keys'] + 1), steps=4, sampler=sampler))
    noise, wanted = randn(3, 8, 3), x['action_mask'][:, None]
    assert torch.equal(*(model.sample(tokens, pixels, segments=segments, lowdim=x, noise=n, steps=4, sampler=sampler)
                         for n in (noise, noise.where(wanted, 9.0))))


def test_ddim_sampling_equals_diffusers():
    model, state = policy(objective='ddpm', prediction='epsilon', spacing='leading', clip_range=1.0), randn(2, 5)
    noise, ref = randn(2, 8, 3), DDIMScheduler(100, beta_schedule='squaredcos_cap_v2')
    for steps in (10, 7):
        ref.set_timesteps(steps)
        x = noise
        for t in ref.timesteps:
            x = ref.step(model.denoiser(x, sincos(t.expand(2) / 100, 32), state), t, x).prev_sample
        close(model.sample(lowdim=dict(proprio=state), noise=noise, steps=steps), x)


def test_state_is_optional():
    model, keys = policy(proprio_dim=0), random_keys(0, torch.arange(2))
    assert model.sample(lowdim=dict(keys=keys)).shape == (2, 8, 3)
    assert model.loss(lowdim=dict(keys=keys, actions=randn(2, 8, 3)))[1] == 48


# ----------------------------------------------------------------------------------------------------------------------
# learning


@pytest.mark.parametrize('objective, sampler', [('flow', 'euler'), ('ddpm', 'ddim')])
def test_both_modes_of_a_distribution_are_learned(objective, sampler):
    """Actions lie near (1, s) or (-1, -s), as often; a policy that took their mean would be near 0."""
    torch.manual_seed(0)
    model = DiffusionPolicy(PolicyConfig(2, 1, 1, width=64, mlp_dim=128, num_heads=4, objective=objective))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(400):
        keys = random_keys(1, torch.arange(step * 128, (step + 1) * 128))
        state, sign = uniform(keys, 1, 5), (uniform(keys, 1, 6) < 0.5).float() * 2 - 1
        actions = sign * torch.cat((torch.ones_like(state), state), 1) + 0.05 * normal(keys, (2,), 7)
        loss, count = model.loss(lowdim=dict(actions=actions[:, None], proprio=state, keys=keys))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = uniform(torch.arange(1000), 1)
    x = model.sample(lowdim=dict(proprio=state, keys=random_keys(2, torch.arange(1000))), steps=20, sampler=sampler)
    sign = x[:, 0, :1].sign()
    assert 0.4 < (sign > 0).float().mean() < 0.6
    distance = (x[:, 0] - sign * torch.cat((torch.ones_like(state), state), 1)).norm(dim=1)
    assert distance.median() < 0.15 and (distance < 0.4).float().mean() > 0.93


@pytest.mark.parametrize('denoiser', ['unet', 'transformer', 'vla'])
def test_a_chunk_is_learned_from_the_sentence(denoiser):
    torch.manual_seed(0)
    if denoiser == 'vla':
        model = VLA(VLAConfig(1, 4, width=32, mlp_dim=64, num_noise_draws=16), VLMConfig(VIT, TEXT, IMAGE))
    else:
        model = DiffusionPolicy(PolicyConfig(
            1, 4, encoder='text', denoiser=denoiser, width=32, depth=2, mlp_dim=64, num_heads=4, channels=(16, 32),
            pool=1, num_noise_draws=16), Decoder(TEXT))
    tokens, chunks = torch.tensor([[10, 20], [20, 10]]), torch.tensor([[1.0, 1, -1, -1], [-1, 1, -1, 1]])[..., None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(80 if denoiser == 'unet' else 180):
        x = dict(actions=chunks, keys=random_keys(1, torch.arange(2) + 2 * step))
        loss, count = model.loss(tokens, lowdim=x) if denoiser != 'vla' else model.loss(tokens, lowdim=x)[1]
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    actions = model.sample(tokens, lowdim=dict(keys=random_keys(2, torch.arange(2))))
    close(actions, chunks, 0.35)


def test_sizes():
    """The paper's U-Net for PushT from states has 65 M parameters; the MLP for MetaWorld 3.8 M."""
    with torch.device('meta'):
        assert sum(p.numel() for p in UNet1d(2, 10).parameters()) == 65_353_218
        assert sum(p.numel() for p in DiffusionPolicy(PolicyConfig(4, 16, 39)).parameters()) == 3_765_824


@pytest.mark.parametrize('wrong, message', [
    (dict(denoiser='cnn'), "policy.denoiser='cnn': expected one of mlp, unet, transformer"),
    (dict(loss='l2'), "policy.loss='l2'"), (dict(action_dim=0), 'action_dim=0.*at least 1'),
    (dict(width=36), 'policy.width=36 must be a multiple of twice policy.num_heads=4'),
    (dict(denoiser='unet', action_steps=7), '7 actions a multiple of 2'),
    (dict(objective='ddpm', prediction='x'), "prediction='x'"), (dict(time='gamma'), "time='gamma'")])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        policy(**wrong)


# ----------------------------------------------------------------------------------------------------------------------
# vision-language-action model


def vla(seed=0, text=TEXT, **settings):
    torch.manual_seed(seed)
    return shaken(VLA(VLAConfig(**dict(action_dim=3, action_steps=8, proprio_dim=5, width=24, mlp_dim=40) | settings),
                      VLMConfig(VIT, text, IMAGE)))


def with_targets(tokens, rows):
    """Targets at the last two words of some rows, and the rows' blocks: prefix-LM."""
    targets, blocks = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    for i in rows:
        end = int((tokens[i] != PAD).sum())
        targets[i, end - 3:end - 1], blocks[i, end - 2:] = tokens[i, end - 2:end], 1
    return targets, blocks


def slow_velocity(model, tokens, pixels, x, t, state):
    """pi0's forward pass for one row, (1, T, D): both towers side by side, head by head, who sees whom spelt out."""
    d, prefix = model.decoder.config, model.embed(tokens, pixels)
    action = model.action_in(x)
    action = model.time_out(torch.nn.functional.silu(model.time_in(torch.cat((action, sincos(t, 24)[:, None].expand(
        action.shape)), -1))))
    suffix = torch.cat((model.state_in(state)[:, None], action), 1)
    S, L = prefix.shape[1], prefix.shape[1] + suffix.shape[1]
    block = [0] * S + [1] + [2] * (L - S - 1)
    rope = rope_table(torch.arange(L)[None], d.head_dim, d.rope_theta)
    for vlm_block, expert_block in zip(model.decoder.blocks, model.expert):
        streams = (vlm_block, prefix), (expert_block, suffix)
        q, k, v = (torch.cat([getattr(b, name)(b.norm1(h)) for b, h in streams], 1).unflatten(-1, (-1, d.head_dim))
                   for name in 'qkv')
        q, k = rotate(q, rope), rotate(k, rope)
        out = torch.zeros(1, L, d.num_heads, d.head_dim)
        for n in range(d.num_heads):
            kv = n // (d.num_heads // d.num_kv_heads)
            for i in range(L):
                seen = [j for j in range(L) if block[j] <= block[i]]
                weights = (q[0, i, n] @ k[0, seen, kv].T / d.head_dim ** 0.5).softmax(0)
                out[0, i, n] = weights @ v[0, seen, kv]
        new = []
        for (b, h), part in zip(streams, out.flatten(2).split((S, L - S), 1)):
            h = h + b.o(part)
            n = b.norm2(h)
            new.append(h + b.down(b.activation(b.gate(n)) * b.up(n)))
        prefix, suffix = new
    return model.action_out(model.expert_norm(suffix)[:, 1:])


def velocities(model, tokens, pixels, segments, x, x_t, t):
    """The expert's output in training; x_t is t times the noise where the actions are zero."""
    seen = []
    hook = model.action_out.register_forward_hook(lambda module, args, out: seen.append(out))
    model.loss(tokens, None, pixels, segments=segments, lowdim=x, noise=x_t, time=t)
    hook.remove()
    return seen[0]


def test_vla_equals_a_slow_forward_pass():
    model, (tokens, pixels, segments) = vla(), observations([2])
    real = int(segments.sum())
    tokens, state, noise, t = tokens[:, :real], randn(1, 5), randn(1, 8, 3), torch.ones(1)
    slow = slow_velocity(model, tokens, pixels, noise, t, state)
    x = dict(actions=torch.zeros(1, 8, 3), proprio=state)
    close(velocities(model, tokens, pixels, None, x, noise, t), slow, 1e-5)
    close(noise - model.sample(tokens, pixels, lowdim=dict(proprio=state), noise=noise, steps=1), slow, 1e-5)


@pytest.mark.parametrize('text', [TEXT, replace(TEXT, sliding_window=3, global_every=2, qk_norm=True, post_norms=True,
                                                attn_logits_softcap=20.0)])
def test_cached_sampling_equals_the_joint_forward_pass(text):
    """Ten Euler steps over the cache, and over what training computes; rows of every length."""
    model, (tokens, pixels, segments) = vla(text=text), observations([2, 0, 1])
    x = {k: v for k, v in lowdim(3).items() if k not in ('actions', 'is_pad', 'action_mask')}
    sampled = model.sample(tokens, pixels, segments=segments, lowdim=x)
    slow = normal(x['keys'], (8, 3))
    for step in range(10):
        t = torch.full((3,), 1 - step / 10)
        zero = x | dict(actions=torch.zeros(3, 8, 3))
        slow = slow - velocities(model, tokens, pixels, segments, zero, slow / t[:, None, None], t) / 10
    close(sampled, slow, 1e-5)
    for i, ends in enumerate((2, 2, 3)):                            # batch equals one by one, without padding
        real, begins = int(segments[i].sum()), (0, 2, 2)[i]
        alone = model.sample(tokens[i:i + 1, :real], pixels[begins:ends], lowdim=take(x, i))
        close(alone, sampled[i:i + 1], 1e-5)


def test_vla_samples_only_what_a_robot_has():
    model, (tokens, pixels, segments), x = vla(), observations([1, 1, 0]), lowdim(3)
    noise, wanted = randn(3, 8, 3), x['action_mask'][:, None]
    actions = [model.sample(tokens, pixels, segments=segments, lowdim=x, noise=n)
               for n in (noise, noise.where(wanted, 9.0))]
    assert torch.equal(*actions) and (actions[0] == 0).all(1).logical_xor(x['action_mask']).all()


def test_prefix_is_computed_once():
    model, (tokens, pixels, segments) = vla(), observations([1, 1])
    calls = []
    for module in (model.vit, model.decoder.blocks[0], model.expert[0]):
        module.register_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
    model.sample(tokens, pixels, segments=segments, lowdim=lowdim(2), steps=10)
    assert calls == ['ViT'] + ['DecoderBlock'] * 11


def test_earlier_blocks_do_not_see_later_ones():
    """Text does not change with state and actions, nor do what the state's token becomes with actions."""
    model, (tokens, pixels, segments), x = vla(), observations([1, 1]), lowdim(2)
    targets, blocks = with_targets(tokens, [0, 1])
    x['actions'].requires_grad_()
    x['proprio'].requires_grad_()
    hidden = []
    model.expert_norm.register_forward_hook(lambda module, args, out: hidden.append(out))
    (text, _), (action, _) = model.loss(tokens, targets, pixels, blocks, segments, x)
    assert torch.autograd.grad(text, (x['actions'], x['proprio']), retain_graph=True, allow_unused=True) == (None, None)
    state = torch.autograd.grad(hidden[0][:, 0].square().sum(), (x['actions'], x['proprio']), retain_graph=True)
    assert not state[0].any() and state[1].any()
    grads = torch.autograd.grad(action, (x['actions'], x['proprio'], model.vit.stem.weight,
                                         model.decoder.embedding.weight))
    assert all(g.any() for g in grads)                              # the actions see everything
    # within a block everyone sees everyone: the first action changes with the last
    first = [velocities(model, tokens, pixels, segments, x | dict(is_pad=torch.zeros(2, 8)), noise, torch.ones(2))[:, 0]
             for noise in (randn(2, 8, 3), torch.cat((randn(2, 8, 3)[:, :7], randn(2, 1, 3, seed=1)), 1))]
    assert not torch.equal(*first)


def test_vla_padded_actions_do_not_matter():
    model, (tokens, pixels, segments), x = vla(num_noise_draws=2), observations([1, 0, 2]), lowdim(3)
    noise, time = randn(6, 8, 3), torch.linspace(0.1, 1, 6)
    (text, _), (loss, count) = model.loss(tokens, None, pixels, segments=segments, lowdim=x, noise=noise, time=time)
    grads = gradients(model, text + loss)
    other = x | dict(actions=x['actions'].where(valid_numbers(x), torch.tensor(float('nan'))))
    noise2 = noise.where(valid_numbers(x).repeat_interleave(2, 0), 100.0)
    (text, _), (loss2, count2) = model.loss(tokens, None, pixels, segments=segments, lowdim=other, noise=noise2,
                                            time=time)
    assert torch.equal(loss, loss2) and count == count2 == valid_numbers(x).sum()
    assert all(torch.equal(g, grads[name]) for name, g in gradients(model, text + loss2).items())
    # nor does it matter that they are there
    i = int(x['is_pad'].sum(1).argmax())
    short = int((~x['is_pad'][i]).sum())
    assert short < 6
    full = velocities(model, tokens, pixels, segments, x, noise, time)[2 * i:2 * i + 2, :short]
    model.policy = replace(model.policy, action_steps=short)
    one = {k: v[i:i + 1, :short] if k in ('actions', 'is_pad') else v[i:i + 1] for k, v in x.items()}
    close(velocities(model, tokens, pixels, segments, one, noise[2 * i:2 * i + 2, :short], time[2 * i:2 * i + 2]), full)


@pytest.mark.parametrize('remat', [False, True])
def test_text_and_actions_in_one_batch(remat):
    """Rows with text, with actions, with both; each loss, and each gradient, is what the rows give alone."""
    model = vla(text=replace(TEXT, remat=remat), num_noise_draws=2)
    tokens, pixels, segments = observations([1, 0, 2, 1])
    targets, blocks = with_targets(tokens, [0, 1])
    x = lowdim(3) | dict(rows=torch.tensor([3, 1, 2]))
    (text, words), (action, numbers) = model.loss(tokens, targets, pixels, blocks, segments, x)
    assert words == 4 and numbers == valid_numbers(x).sum()
    close(text, VLM.loss(model, tokens, targets, pixels, blocks, segments)[0])
    grads = gradients(model, text + 0.3 * action)
    assert all(g.any() for g in grads.values())
    total, begins = {}, (0, 1, 1, 3)
    for i, ends in enumerate((1, 1, 3, 4)):
        one = (tokens[i:i + 1], targets[i:i + 1], pixels[begins[i]:ends], blocks[i:i + 1], segments[i:i + 1])
        j = [3, 1, 2].index(i) if i else None
        (t, _), (a, _) = model.loss(*one, None if j is None else {k: v[j:j + 1] for k, v in x.items()} | {'rows': [0]})
        for name, g in gradients(model, t + 0.3 * a).items():
            total[name] = total.get(name, 0) + g
    for name, g in grads.items():
        close(total[name], g, 2e-5)
    each = model.loss(tokens, targets, pixels, blocks, segments, x, reduction='none')
    assert [part.shape for pair in each for part in pair] == [(4,), (), (3,), (3,)]
    close(each[1][0].sum(), action)


@pytest.mark.parametrize('case', ['text only', 'no pictures', 'actions only', 'nothing'])
def test_every_vla_parameter_has_a_gradient(case):
    model = vla(text=replace(TEXT, tied=False))
    tokens, pixels, segments = observations([1, 1] if case in ('text only', 'actions only') else [0, 0])
    targets, blocks = with_targets(tokens, [0, 1] if case in ('text only', 'no pictures') else [])
    x = lowdim(2) if case in ('no pictures', 'actions only') else None
    if case == 'nothing':               # what a rank goes through that has fewer rows than another
        tokens, segments = torch.full_like(tokens, PAD), torch.zeros_like(segments)
    (text, words), (action, numbers) = model.loss(tokens, targets, pixels, blocks, segments, x)
    grads = gradients(model, text + action)                         # each is there, though it may be zero
    assert all(g.isfinite().all() for g in grads.values())
    assert (numbers == 0) == (x is None) and (words == 0) == (case in ('actions only', 'nothing'))
    assert any(g.any() for g in grads.values()) == (case != 'nothing')


def test_vla_is_still_a_vlm():
    model, plain, (tokens, pixels, segments) = vla(), VLM(VLMConfig(VIT, TEXT, IMAGE)), observations([1, 2])
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing and {name.partition('.')[0] for name in unexpected} == {
        'expert', 'expert_norm', 'action_in', 'state_in', 'time_in', 'time_out', 'action_out'}
    assert torch.equal(plain.logits(tokens, pixels, segments=segments), model.logits(tokens, pixels, segments=segments))
    assert generate(plain, tokens, pixels, 4) == generate(model, tokens, pixels, 4)


def test_vla_equals_transformers_pi0():
    """Velocities, loss and ten sampled steps of transformers' PI0 with random weights."""
    from transformers import PI0Config, PI0ForConditionalGeneration
    gemma = dict(model_type='gemma', num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=8)
    torch.manual_seed(0)
    ref = PI0ForConditionalGeneration(PI0Config(
        vlm_config=dict(model_type='paligemma', image_token_id=IMAGE, projection_dim=32, text_config=gemma | dict(
            hidden_size=32, intermediate_size=64, vocab_size=V), vision_config=dict(
                model_type='siglip_vision_model', hidden_size=24, intermediate_size=48, num_hidden_layers=1,
                num_attention_heads=3, image_size=16, patch_size=8, vision_use_head=False)),
        dit_config=gemma | dict(hidden_size=24, intermediate_size=40),
        chunk_size=8, max_state_dim=5, max_action_dim=3)).eval()
    model = vla(text=replace(TEXT, num_kv_heads=1)).eval()
    load_pi0(model, {k: v + 0.05 * torch.randn_like(v) for k, v in ref.state_dict().items()}, ref)
    tokens, pixels, segments = observations([1, 2])
    cameras = torch.zeros(2, 2, 3, 16, 16)
    cameras[0, 0], cameras[1] = pixels[0], pixels[1:]
    there = torch.tensor([[True, False], [True, True]])
    state, noise, actions, t = randn(2, 5), randn(2, 8, 3), randn(2, 8, 3, seed=1), torch.tensor([0.7, 0.2])
    given = dict(input_ids=tokens, pixel_values=cameras, pixel_attention_mask=there, attention_mask=segments)
    out = ref(state=state, noise=noise, timestep=t, actions=actions, **given)
    x = dict(actions=actions, proprio=state)
    _, (loss, count) = model.loss(tokens, None, pixels, torch.zeros_like(tokens), segments, x, noise, t)
    close(velocities(model, tokens, pixels, segments, x, noise, t), out.logits)
    close(loss / count, out.loss)
    close(model.sample(tokens, pixels, torch.zeros_like(tokens), segments, dict(proprio=state), noise),
          ref.sample_actions(state=state, noise=noise, **given))


def test_parameters_of_pi0():
    """The sizes of config/pi0_like.py, on the meta device, beside transformers' PI0: its expert has an embedding that
    nothing reads, and PaliGemma's own vocabulary has 64 rows more."""
    from transformers import PI0Config, PI0ForConditionalGeneration
    towers = (ViTConfig(image_size=224, patch_size=14, width=1152, depth=27, mlp_dim=4304, num_heads=16),
              DecoderConfig(vocab_size=257216, width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1,
                            head_dim=256))
    config = VLAConfig(action_dim=32, action_steps=50, proprio_dim=32, width=1024, mlp_dim=4096)
    with torch.device('meta'):
        model, ref = build('vla', config, *towers, 257216, 257152), PI0ForConditionalGeneration(PI0Config())
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (model, ref))
    assert ours == theirs - 257152 * 1024 + 64 * 2048 == 3_238_179_600


def load_pi0(model, weights, ref):
    """Give transformers' PI0 these weights, and ours the same."""
    ref.load_state_dict(weights)
    names = {'model.vlm.vision_tower.': 'vit.', 'model.vlm.multi_modal_projector.linear': 'connector',
             'model.vlm.language_model.': 'decoder.', 'model.dit.norm': 'expert_norm', 'model.dit.layers': 'expert',
             'embed_action_time.': '', 'vision_model.': '', 'embeddings.patch_embedding': 'stem',
             'embeddings.position_embedding.weight': 'pos_embed', 'encoder.layers': 'blocks', 'layers.': 'blocks.',
             'embed_tokens': 'embedding', 'self_attn.': '', 'mlp.': '',
             'action_out_proj': 'action_out', 'out_proj': 'o', 'action_in_proj': 'action_in', 'state_proj': 'state_in',
             'action_time_mlp_': 'time_', 'input_layernorm': 'norm1', 'post_attention_layernorm': 'norm2',
             'post_layernorm': 'norm', 'layer_norm': 'norm', '_proj': ''}
    renamed = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value[None] if name == 'vit.pos_embed' else value
    own = model.state_dict()
    model.load_state_dict({name: renamed[name] for name in own})


@pytest.mark.parametrize('wrong, message', [(dict(loss='l2'), "vla.loss='l2': expected one of mse, l1, huber"),
                                            (dict(action_steps=0), 'action_steps=0.*at least 1'),
                                            (dict(width=7), 'width=7 even'), (dict(time='gamma'), "time='gamma'")])
def test_wrong_vla_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        vla(**wrong)


def test_build():
    vocabulary = dict(vocab_size=70, image_token_id=IMAGE)
    state = build('policy', SMALL, VIT, TEXT, **vocabulary)
    seeing = build('policy', replace(SMALL, encoder='vlm'), VIT, replace(TEXT, vocab_size=0), **vocabulary)
    model = build('vla', VLAConfig(3, 8, 5), VIT, replace(TEXT, vocab_size=0), **vocabulary)
    assert state.encoder is None and isinstance(seeing.encoder, VLM) and isinstance(model, VLA)
    assert isinstance(build('policy', replace(SMALL, encoder='text'), VIT, replace(TEXT, vocab_size=0),
                            **vocabulary).encoder, Decoder)
    assert model.decoder.config.vocab_size == seeing.encoder.decoder.config.vocab_size == 128
    assert model.config.image_token_id == IMAGE and model.policy.action_steps == 8
    with pytest.raises(ValueError, match='vocab_size=50 is less than the 70 of the tokenizer'):
        build('vla', VLAConfig(3, 8, 5), VIT, TEXT, **vocabulary)


CASES = [('vla', False), ('vla', True), ('transformer', False), ('unet', True)]


def a_rank(rank, folder):
    """One of two ranks: the first has a picture and actions, the second neither, but text."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    for name, sharded in CASES:
        model = vla() if name == 'vla' else policy(encoder='vlm', denoiser=name)
        if sharded:
            mesh = init_device_mesh('cpu', (2,))
            for module in (*(m for m in model.modules() if isinstance(m, (DecoderBlock, ViTBlock))), model):
                fully_shard(module, mesh=mesh)
        run = model if sharded else DistributedDataParallel(model)
        (2 * total(run(**halves()[rank]))).backward()       # the mean over ranks is to be the sum
        grads = {n: p.grad.full_tensor() if sharded else p.grad for n, p in model.named_parameters()}
        if rank == 0:
            torch.save(grads, f'{folder}/{name}{sharded}.pt')
    dist.destroy_process_group()


def total(out):
    return out[0][0] + out[1][0] if isinstance(out[0], tuple) else out[0]


def halves():
    first, second = observations([1]), observations([0])
    out = [dict(tokens=t, pixels=p if len(p) else None, segments=s, lowdim=x)
           for (t, p, s), x in zip((first, second), (lowdim(1), None))]
    for half in out:
        half['targets'], half['blocks'] = with_targets(half['tokens'], [0])
    return out


def test_ranks_without_pictures_or_actions(tmp_path):
    """DDP and FSDP2 wait for nobody, and the gradient is that of both ranks' batches."""
    ranks = [multiprocessing.get_context('spawn').Process(target=a_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:           # not forked: autograd's threads would be missing
        process.start()
    for process in ranks:
        process.join(120)
    hung = [process.kill() for process in ranks if process.is_alive()]
    assert not hung and [process.exitcode for process in ranks] == [0, 0]
    for name, sharded in CASES:
        model = vla() if name == 'vla' else policy(encoder='vlm', denoiser=name)
        grads = gradients(model, sum(total(model(**half)) for half in halves()))
        for key, grad in torch.load(tmp_path / f'{name}{sharded}.pt').items():
            close(grad, grads[key], 1e-5 * max(1.0, float(grads[key].abs().max())))
