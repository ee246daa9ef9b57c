"""tasks/policy.py: what is padded does not matter, rows do not see each other,
and distributions are learned."""
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.resnet import Downsample1D, ResidualTemporalBlock1D, Upsample1D
from small_policies import (
    DENOISERS,
    IMAGE,
    PAD,
    TEXT,
    VIT,
    close,
    each,
    gradients,
    lowdim,
    observations,
    policy,
    randn,
    take,
    total,
    vla,
    without,
)

from diffusion import normal, random_keys, sincos, uniform
from model import Decoder, VLMConfig
from robots.chunks import nothing, valid_numbers
from robots.denoisers import ConvBlock, UNet1d, Upsample, windows
from tasks.policy import DiffusionPolicy, PolicyConfig
from tasks.vla import VLA, VLAConfig

# -------------------------------------------------------------------------------------------------
# the loss


@pytest.mark.parametrize('denoiser', DENOISERS)
@pytest.mark.parametrize('objective', ['flow', 'ddpm'])
def test_padded_actions_are_neither_input_nor_target(denoiser, objective):
    model, x = policy(denoiser=denoiser, objective=objective, num_noise_draws=2), lowdim(4)
    noise = normal(x['keys'], (2, 8, 3)).flatten(0, 1)
    time = model.schedule.times(uniform(x['keys'], 2, 1).flatten())
    loss, count = model.loss(lowdim=x, noise=noise, time=time)
    grads = gradients(model, loss)
    valid = valid_numbers(x)
    assert count == valid.sum() < x['actions'].numel()

    # what stands in their places may be anything
    junk = torch.tensor([float('nan'), float('inf'), 1e30]).expand_as(x['actions'])
    no_state = torch.tensor(float('nan'))
    other = x | dict(actions=x['actions'].where(valid, junk),
                     proprio=x['proprio'].where(x['proprio_mask'], no_state))
    other_noise = noise.where(valid.repeat_interleave(2, 0), 100.0)
    loss2, _ = model.loss(lowdim=other, noise=other_noise, time=time)
    assert torch.equal(loss, loss2)
    for name, g in gradients(model, loss2).items():
        assert torch.equal(g, grads[name]), name

    # and those that are real matter
    moved = x | dict(actions=x['actions'] + 0.1)
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
    other = model.denoise(x_t, t, state, None, None, valid)[:, :5]
    assert torch.equal(masked, other) == (denoiser == 'transformer')


@pytest.mark.parametrize('kind', ['mse', 'l1', 'huber'])
@pytest.mark.parametrize('objective, prediction', [
    ('flow', 'epsilon'), ('ddpm', 'epsilon'), ('ddpm', 'sample'), ('ddpm', 'v_prediction')])
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
    small = error.abs() < 1
    expected = {'mse': error ** 2, 'l1': error.abs(),
                'huber': torch.where(small, error ** 2 / 2, error.abs() - 0.5)}[kind].sum((1, 2))
    losses, counts = each(model, lowdim=x)
    close(losses, expected)
    assert counts.tolist() == [24, 24, 24]
    loss, count = model.loss(lowdim=x)
    close(loss, expected.sum())
    assert count == 72


def test_noise_draws_are_a_mean_and_do_not_depend_on_the_batch():
    many, once, x = policy(num_noise_draws=3), policy(), lowdim(4)
    noise, time = normal(x['keys'], (3, 8, 3)), uniform(x['keys'], 3, 1)
    losses, counts = each(many, lowdim=x)
    alone = [each(once, lowdim=x, noise=noise[:, k], time=time[:, k]) for k in range(3)]
    close(losses, torch.stack([a[0] for a in alone]).mean(0))
    assert torch.equal(counts, alone[0][1])
    for i in range(4):
        close(each(many, lowdim=take(x, i))[0], losses[i:i + 1])


def test_encoder_runs_once_for_all_draws():
    model, seen = policy(encoder='vlm', num_noise_draws=4), observations([1, 2])
    calls = []
    model.encoder.vit.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    model.loss(lowdim=lowdim(2), **seen)
    assert calls == [3]


@pytest.mark.parametrize('denoiser', DENOISERS)
@pytest.mark.parametrize('encoder', ['text', 'vlm'])
def test_conditions(denoiser, encoder):
    """Pictures and words of its own row matter to a sample; other rows, and padding, do not."""
    model, x = policy(denoiser=denoiser, encoder=encoder).eval(), lowdim(3)
    seen = observations([2, 0, 1] if encoder == 'vlm' else [0, 0, 0])
    tokens, pixels = seen['tokens'], seen['pixels']

    def losses(tokens, pixels, x=x):
        return each(model, lowdim=x, tokens=tokens, pixels=pixels, segments=seen['segments'])[0]

    before = losses(tokens, pixels)
    other = tokens.clone()
    other[1, 1] = 49
    assert (losses(other, pixels) != before).tolist() == [False, True, False]

    # padding
    other[1, 1], other[1, -1], other[0, -1] = tokens[1, 1], 49, 49
    close(losses(other, pixels), before, 0)

    # the last picture is of the last row
    if encoder == 'vlm':
        moved = pixels + torch.tensor([0.0, 0, 1])[:, None, None, None]
        is_other = (losses(tokens, moved) - before).abs() > 1e-6
        assert is_other.tolist() == [False, False, True]

    # `rows` says where samples are; other rows have no actions
    order = torch.tensor([2, 0, 1])
    shuffled = {k: v[order] for k, v in x.items()}
    close(losses(tokens, pixels, shuffled), before[order])
    text_only = {k: v[:1] for k, v in x.items()}
    close(losses(tokens, pixels, text_only), before[:1])


@pytest.mark.parametrize('denoiser', DENOISERS)
@pytest.mark.parametrize('encoder', ['none', 'text', 'vlm'])
def test_every_parameter_has_a_gradient(denoiser, encoder):
    """Else DDP would wait: with pictures, without, and in a batch without actions."""
    model = policy(denoiser=denoiser, encoder=encoder)
    seen = observations([1, 0] if encoder == 'vlm' else [0, 0])
    grads = gradients(model, model.loss(lowdim=lowdim(2), **seen)[0])
    still = [name for name, g in grads.items() if not g.any() and 'norm.weight' not in name]
    assert still == []

    blind = observations([0, 0]) | dict(pixels=None)
    gradients(model, model.loss(lowdim=lowdim(2), **blind)[0])

    # with words, and with nothing at all
    tokens = blind['tokens']
    for empty in (tokens, torch.full_like(tokens, PAD)):
        loss, count = model.loss(lowdim=nothing(model.config, 'cpu'), tokens=empty,
                                 segments=(empty != PAD).long())
        assert loss == 0 and count == 0
        assert not any(g.any() for g in gradients(model, loss).values())


def as_linear(conv):
    """The weights of a convolution over time, as our Linear on windows has them."""
    return dict(weight=conv.weight.transpose(1, 2).flatten(1), bias=conv.bias)


def test_unet_parts_equal_diffusers():
    """Ours with a FiLM that only shifts is the block of diffusers' temporal U-Net; halving and
    doubling are its own."""
    torch.manual_seed(0)
    ours, ref = ConvBlock(3, 16, 10, 5), ResidualTemporalBlock1D(3, 16, 10, 5)
    with torch.no_grad():
        for a, b in ((ours.conv1, ref.conv_in.conv1d), (ours.skip, ref.residual_conv),
                     (ours.conv2, ref.conv_out.conv1d)):
            a.load_state_dict(as_linear(b))
        ours.norm1.load_state_dict(ref.conv_in.group_norm.state_dict())
        ours.norm2.load_state_dict(ref.conv_out.group_norm.state_dict())
        ours.film.weight[:16], ours.film.bias[:16] = 0, 1
        ours.film.weight[16:], ours.film.bias[16:] = ref.time_emb.weight, ref.time_emb.bias
    x, condition = randn(2, 8, 3), randn(2, 10, seed=1)
    close(ours(x, torch.nn.functional.mish(condition)), ref(x.mT, condition).mT, 1e-6)

    down = Downsample1D(3, use_conv=True, padding=1)
    up = Upsample1D(3, use_conv_transpose=True)
    linear, double = torch.nn.Linear(9, 3), Upsample(3)
    linear.load_state_dict(as_linear(down.conv))
    close(linear(windows(x, 3, 2)), down(x.mT).mT, 1e-6)
    taps = up.conv.weight.permute(2, 1, 0).flatten(0, 1)
    double.load_state_dict({'taps.weight': taps, 'bias': up.conv.bias})
    close(double(x), up(x.mT).mT, 1e-6)


@pytest.mark.parametrize('name', [*DENOISERS, 'vla'])
def test_bfloat16(name):
    """Autocast, as train.py has it: loss, gradients and samples are those of fp32 but for
    rounding."""
    model = vla() if name == 'vla' else policy(denoiser=name, encoder='vlm')
    seen, x = observations([1, 2]), lowdim(2)
    exact, samples = total(model(lowdim=x, **seen)), model.sample(lowdim=x, **seen)
    grads = gradients(model, exact)
    with torch.autocast('cpu', torch.bfloat16):
        rough, rough_samples = total(model(lowdim=x, **seen)), model.sample(lowdim=x, **seen)
    assert rough.dtype == rough_samples.dtype == torch.float32 and rough != exact
    close(rough, exact, 0.02)
    close(rough_samples, samples, 0.1)
    rough_grads = gradients(model, rough)
    norm = sum(g.square().sum() for g in grads.values()).sqrt()
    distance = sum((g - rough_grads[k]).square().sum() for k, g in grads.items()).sqrt()
    assert distance < 0.05 * norm


# -------------------------------------------------------------------------------------------------
# sampling


@pytest.mark.parametrize('denoiser', DENOISERS)
@pytest.mark.parametrize('objective, sampler', [
    ('flow', 'euler'), ('flow', 'heun'), ('ddpm', 'ddim'), ('ddpm', 'ddpm')])
def test_samples_do_not_depend_on_the_batch(denoiser, objective, sampler):
    model = policy(denoiser=denoiser, objective=objective, encoder='vlm', clip_range=1.0)
    seen, x = observations([1, 1, 1]), without(lowdim(3), 'actions', 'is_pad')
    how = dict(steps=4, sampler=sampler)
    actions = model.sample(lowdim=x, **seen, **how)
    assert actions.shape == (3, 8, 3) and model.training

    # what a robot does not have stays 0
    assert (actions == 0).all(1).logical_xor(x['action_mask']).all()
    for i in range(3):
        one = {key: value[i:i + 1] for key, value in seen.items()}
        alone = model.sample(lowdim=take(x, i), **one, **how)
        close(alone, actions[i:i + 1])

    # other keys are other noise; noise where there is nothing does not matter
    other_keys = x | dict(keys=x['keys'] + 1)
    assert not torch.equal(actions, model.sample(lowdim=other_keys, **seen, **how))
    noise, wanted = randn(3, 8, 3), x['action_mask'][:, None]
    assert torch.equal(*(model.sample(lowdim=x, noise=n, **seen, **how)
                         for n in (noise, noise.where(wanted, 9.0))))


def test_ddim_sampling_equals_diffusers():
    model = policy(objective='ddpm', prediction='epsilon', spacing='leading', clip_range=1.0)
    state, noise = randn(2, 5), randn(2, 8, 3)
    ref = DDIMScheduler(100, beta_schedule='squaredcos_cap_v2')
    for steps in (10, 7):
        ref.set_timesteps(steps)
        x = noise
        for t in ref.timesteps:
            output = model.denoiser(x, sincos(t.expand(2) / 100, 32), state)
            x = ref.step(output, t, x).prev_sample
        close(model.sample(lowdim=dict(proprio=state), noise=noise, steps=steps), x)


def test_state_is_optional():
    model, keys = policy(proprio_dim=0), random_keys(0, torch.arange(2))
    assert model.sample(lowdim=dict(keys=keys)).shape == (2, 8, 3)
    assert model.loss(lowdim=dict(keys=keys, actions=randn(2, 8, 3)))[1] == 48


# -------------------------------------------------------------------------------------------------
# learning


@pytest.mark.parametrize('objective, sampler', [('flow', 'euler'), ('ddpm', 'ddim')])
def test_both_modes_of_a_distribution_are_learned(objective, sampler):
    """Actions lie near (1, s) or (-1, -s), as often; a policy that took their mean would be near
    0."""
    torch.manual_seed(0)
    model = DiffusionPolicy(PolicyConfig(2, 1, 1, width=64, mlp_dim=128, num_heads=4,
                                         objective=objective))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(400):
        keys = random_keys(1, torch.arange(step * 128, (step + 1) * 128))
        state, sign = uniform(keys, 1, 5), (uniform(keys, 1, 6) < 0.5).float() * 2 - 1
        actions = sign * torch.cat((torch.ones_like(state), state), 1)
        actions = actions + 0.05 * normal(keys, (2,), 7)
        x = dict(actions=actions[:, None], proprio=state, keys=keys)
        loss, count = model.loss(lowdim=x)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    state = uniform(torch.arange(1000), 1)
    x = model.sample(lowdim=dict(proprio=state, keys=random_keys(2, torch.arange(1000))),
                     steps=20, sampler=sampler)
    sign = x[:, 0, :1].sign()
    assert 0.4 < (sign > 0).float().mean() < 0.6
    distance = (x[:, 0] - sign * torch.cat((torch.ones_like(state), state), 1)).norm(dim=1)
    assert distance.median() < 0.15 and (distance < 0.4).float().mean() > 0.93


@pytest.mark.parametrize('denoiser', ['unet', 'transformer', 'vla'])
def test_a_chunk_is_learned_from_the_sentence(denoiser):
    torch.manual_seed(0)
    if denoiser == 'vla':
        config = VLAConfig(1, 4, width=32, mlp_dim=64, num_noise_draws=16)
        model = VLA(config, VLMConfig(VIT, TEXT, IMAGE))
    else:
        config = PolicyConfig(1, 4, encoder='text', denoiser=denoiser, width=32, depth=2,
                              mlp_dim=64, num_heads=4, channels=(16, 32), pool=1,
                              num_noise_draws=16)
        model = DiffusionPolicy(config, Decoder(TEXT))
    tokens = torch.tensor([[10, 20], [20, 10]])
    chunks = torch.tensor([[1.0, 1, -1, -1], [-1, 1, -1, 1]])[..., None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(80 if denoiser == 'unet' else 180):
        keys = random_keys(1, torch.arange(2) + 2 * step)
        x = dict(actions=chunks, keys=keys, rows=torch.arange(2))
        losses, counts = each(model, lowdim=x, tokens=tokens)
        (losses.sum() / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    keys = random_keys(2, torch.arange(2))
    close(model.sample(tokens, lowdim=dict(keys=keys)), chunks, 0.35)


def test_sizes():
    """The paper's U-Net for PushT from states has 65 M parameters; the MLP for MetaWorld 3.8 M."""
    with torch.device('meta'):
        unet, mlp = UNet1d(2, 10), DiffusionPolicy(PolicyConfig(4, 16, 39))
    assert sum(p.numel() for p in unet.parameters()) == 65_353_218
    assert sum(p.numel() for p in mlp.parameters()) == 3_765_824


@pytest.mark.parametrize('wrong, message', [
    (dict(denoiser='cnn'), "policy.denoiser='cnn': expected one of mlp, unet, transformer"),
    (dict(loss='l2'), "policy.loss='l2'"),
    (dict(action_dim=0), 'action_dim=0.*at least 1'),
    (dict(proprio_dim=-1), 'proprio_dim=-1.*at least 0'),
    (dict(width=36), 'policy.width=36 must be a multiple of twice policy.num_heads=4'),
    (dict(denoiser='unet', action_steps=7), 'action_steps=7 must be a multiple of 2'),
    (dict(denoiser='unet', channels=(16, 30)), 'channels=.16, 30. must be multiples of 8'),
    (dict(objective='ddpm', prediction='x'), "prediction='x'"),
    (dict(time='gamma'), "time='gamma'")])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        policy(**wrong)


