"""diffusion.py: policies. What is padded does not matter, rows do not see each other, and distributions are learned."""
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.resnet import ResidualTemporalBlock1D

from diffusion import ConvBlock, DiffusionPolicy, PolicyConfig, normal, random_keys, sincos, uniform, valid_numbers
from model import VLM, Decoder, DecoderConfig, ViTConfig, VLMConfig

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
    encoder = {'none': lambda: None, 'text': lambda: Decoder(TEXT), 'vlm': lambda: VLM(VLMConfig(VIT, TEXT, IMAGE))}
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
    loss, count = model.loss(tokens, None, None, segments=segments)
    assert loss == 0 and count == 0 and not any(g.any() for g in gradients(model, loss).values())


def test_film_block_equals_diffusers():
    """Ours with a scale that is always 1 is the block of diffusers' temporal U-Net."""
    torch.manual_seed(0)
    ours, ref = ConvBlock(3, 16, 10, 5), ResidualTemporalBlock1D(3, 16, 10, 5)
    with torch.no_grad():
        for a, b in ((ours.conv1, ref.conv_in.conv1d), (ours.norm1, ref.conv_in.group_norm), (ours.skip,
                     ref.residual_conv), (ours.conv2, ref.conv_out.conv1d), (ours.norm2, ref.conv_out.group_norm)):
            a.load_state_dict(b.state_dict())
        ours.film.weight[:16], ours.film.bias[:16] = 0, 1
        ours.film.weight[16:], ours.film.bias[16:] = ref.time_emb.weight, ref.time_emb.bias
    x, condition = randn(2, 3, 8), randn(2, 10, seed=1)
    close(ours(x, torch.nn.functional.mish(condition)), ref(x, condition), 1e-6)


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


def test_ddim_sampling_equals_diffusers():
    model, state = policy(objective='ddpm', clip_range=1.0), randn(2, 5)
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


@pytest.mark.parametrize('denoiser', ['unet', 'transformer'])
def test_a_chunk_is_learned_from_the_sentence(denoiser):
    torch.manual_seed(0)
    config = PolicyConfig(1, 4, encoder='text', denoiser=denoiser, width=32, depth=2, mlp_dim=64, num_heads=4,
                          channels=(16, 32), pool=1)
    model = DiffusionPolicy(config, Decoder(TEXT))
    tokens, chunks = torch.tensor([[10, 20], [20, 10]]), torch.tensor([[1.0, 1, -1, -1], [-1, 1, -1, 1]])[..., None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        keys = random_keys(1, torch.arange(step * 32, (step + 1) * 32))
        row = torch.arange(32) % 2
        loss, count = model.loss(tokens, lowdim=dict(actions=chunks[row], keys=keys, rows=row))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    actions = model.sample(tokens, lowdim=dict(keys=random_keys(2, torch.arange(2))))
    close(actions, chunks, 0.35)


@pytest.mark.parametrize('wrong, message', [
    (dict(denoiser='cnn'), "policy.denoiser='cnn': expected one of mlp, unet, transformer"),
    (dict(loss='l2'), "policy.loss='l2'"), (dict(action_dim=0), 'action_dim=0.*at least 1'),
    (dict(width=36), 'policy.width=36 must be a multiple of twice policy.num_heads=4'),
    (dict(denoiser='unet', action_steps=7), 'a chunk of 7 actions can be halved 1 times only.*multiple of 2'),
    (dict(objective='ddpm', prediction='x'), "prediction='x'"), (dict(time='gamma'), "time='gamma'")])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        policy(**wrong)
