"""diffusion.py: keyed noise, schedules and samplers against diffusers."""
import itertools
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from diffusion import FlowSchedule, Schedule, mix64, normal, random_keys, uniform

KINDS = 'linear', 'scaled_linear', 'squaredcos_cap_v2'
PREDICTIONS = 'epsilon', 'sample', 'v_prediction'


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def their(scheduler, kind, steps, prediction, **settings):
    """diffusers' scheduler of the same settings."""
    return scheduler(num_train_timesteps=steps, beta_schedule=kind, prediction_type=prediction,
                     **settings)


# -------------------------------------------------------------------------------------------------
# keyed random numbers


def test_splitmix64():
    # the first outputs of the published generator from seed 0
    state = torch.tensor([0x9E3779B97F4A7C15 - 2 ** 64, 2 * 0x9E3779B97F4A7C15 - 2 ** 64])
    assert [v % 2 ** 64 for v in mix64(state).tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_normal_numbers_are_normal():
    keys = random_keys(0, torch.arange(2000))
    x, u = normal(keys, (50, 3)), uniform(keys, 150)

    # moments, five standard errors of the first two
    assert abs(x.mean()) < 5 / math.sqrt(x.numel())
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / x.numel())
    assert abs((x ** 4).mean() - 3) < 0.1 and abs((x ** 3).mean()) < 0.05 and x.isfinite().all()

    # and quantiles
    q = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999])
    close(torch.special.ndtr(x.flatten()[:100000].quantile(q)), q, 5e-3)
    assert 0 < u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    close(u.flatten()[:100000].quantile(q), q, 5e-3)


def test_normal_numbers_are_independent():
    keys = random_keys(0, torch.arange(2000))
    x = normal(keys, (40,))

    # of the numbers of a row, other streams, other seeds, neighbours
    other_stream = normal(keys, (40,), 1)
    other_seed = normal(random_keys(1, torch.arange(2000)), (40,))
    correlations = torch.corrcoef(torch.cat((x, other_stream, other_seed, x.roll(1, 0)), 1).T)
    assert correlations.fill_diagonal_(0).abs().max() < 6 / math.sqrt(2000)

    # of the two that have a radius in common
    halves = torch.stack((x[:, :20].flatten().abs(), x[:, 20:].flatten().abs()))
    assert torch.corrcoef(halves)[0, 1].abs() < 0.025

    # raw seeds as keys
    assert len(normal(torch.arange(1000), (40,)).unique()) > 39000
    assert not torch.equal(normal(torch.tensor([1]), (8,), 0), normal(torch.tensor([0]), (8,), 1))


def test_normal_numbers_do_not_depend_on_the_batch():
    keys = random_keys(7, torch.arange(1000, 1012))
    whole = normal(keys, (5, 3))
    cut = torch.cat([normal(random_keys(7, torch.arange(a, a + 3)), (5, 3))
                     for a in (1000, 1003, 1006, 1009)])
    assert torch.equal(whole, cut) and torch.equal(whole.flip(0), normal(keys.flip(0), (5, 3)))
    assert not torch.equal(whole, normal(random_keys(8, torch.arange(1000, 1012)), (5, 3)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_normal_numbers_on_a_gpu():
    keys = random_keys(7, torch.arange(1000))
    assert torch.equal(random_keys(7, torch.arange(1000).cuda()).cpu(), keys)
    close(normal(keys.cuda(), (64,)).cpu(), normal(keys, (64,)), 1e-5)


# -------------------------------------------------------------------------------------------------
# discrete schedules


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('prediction', PREDICTIONS)
@pytest.mark.parametrize('zero_snr', [False, True])
def test_add_noise_and_targets(kind, prediction, zero_snr):
    x, noise, t = randn(20, 3, 4), randn(20, 3, 4, seed=1), torch.linspace(0, 99, 20).long()
    for start, end in ((1e-4, 0.02), (0.00085, 0.012)):
        settings = dict(rescale_betas_zero_snr=zero_snr, beta_start=start, beta_end=end)
        ours = Schedule(kind, 100, prediction, **settings)
        ref = their(DDIMScheduler, kind, 100, prediction, **settings)
        close(ours.add_noise(x, noise, t), ref.add_noise(x, noise, t))
        close(ours.add_noise(x, noise, 40), ref.add_noise(x, noise, torch.full((20,), 40)))
        velocity = ref.get_velocity(x, noise, t)
        targets = {'epsilon': noise, 'sample': x, 'v_prediction': velocity}
        close(ours.target(x, noise, t), targets[prediction])
        close(ours.alphas, ref.alphas_cumprod)
        assert (ours.alphas[-1] == 0) == zero_snr


@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
def test_timesteps(spacing):
    for steps, offset in itertools.product((1000, 100, 37), (0, 1)):
        ours = Schedule('linear', steps, timestep_spacing=spacing, steps_offset=offset)
        ref = their(DDIMScheduler, 'linear', steps, 'epsilon', timestep_spacing=spacing,
                    steps_offset=offset)
        numbers = range(1, steps + 1)
        if steps == 1000:
            numbers = 1, 2, 3, 7, 10, 50, 61, 299, 999, 1000
        for n in numbers:
            ref.set_timesteps(n)
            t = ours.timesteps(n)
            # 61: theirs are 62, the last -1
            assert len(t) == n and torch.equal(t, ref.timesteps[:n])
            assert torch.equal(ref.timesteps[n:], torch.full((len(ref.timesteps) - n,), -1))
    with pytest.raises(ValueError, match='1001 sampling steps.*1000'):
        Schedule('linear', 1000).timesteps(1001)


def our_chain(ours, pairs, step, seed=0):
    """The x of every step; outputs are a function of x and t that a model might be."""
    x, out = randn(2, 3, 4, seed=seed), []
    for i, (t, t_next) in enumerate(pairs):
        x = step(fake_model(x, t), t, t_next, x, i)
        out.append(x)
    return torch.stack(out)


def fake_model(x, t):
    return 0.8 * x + 0.3 * math.sin(t) + 0.5 * (3 * x).sin()


@pytest.mark.parametrize('kind, prediction', [*itertools.product(KINDS, PREDICTIONS)])
@pytest.mark.parametrize('spacing, clip, to_one, zero_snr', [
    ('leading', 1.0, True, False), ('trailing', 0.0, False, False), ('linspace', 0.7, True, False),
    ('leading', 1.0, False, True), ('trailing', 1.0, True, True)])
def test_ddim_steps(kind, prediction, spacing, clip, to_one, zero_snr):
    if zero_snr and spacing == 'trailing' and prediction == 'epsilon':
        pytest.skip('at the last time epsilon says nothing of x: infinite, here and there')
    settings = dict(timestep_spacing=spacing, clip_sample=clip > 0, clip_sample_range=clip or 1.0,
                    set_alpha_to_one=to_one, rescale_betas_zero_snr=zero_snr)
    ours = Schedule(kind, 100, prediction, **settings)
    ref = their(DDIMScheduler, kind, 100, prediction, **settings)
    cases = ((10, 0.0, False), (7, 0.0, True), (100, 0.0, False), (33, 0.5, False),
             (13, 0.9, True))
    for n, eta, clipped in cases:
        ref.set_timesteps(n)
        a = our_chain(ours, ours.pairs(n), lambda o, t, t_next, x, i: ours.step(
            o, t, t_next, x, eta, randn(*x.shape, seed=i), clipped))        # noqa: B023
        x, b = randn(2, 3, 4), []
        for i, t in enumerate(ref.timesteps):
            noise = randn(2, 3, 4, seed=i) if eta else None
            x = ref.step(fake_model(x, int(t)), t, x, eta, clipped,
                         variance_noise=noise).prev_sample
            b.append(x)
        close(a, torch.stack(b), 1e-6 * max(1, float(a.abs().max())))


@pytest.mark.parametrize('kind, prediction', [*itertools.product(KINDS, PREDICTIONS)])
@pytest.mark.parametrize('spacing, clip', [('leading', 1.0), ('trailing', 0.0), ('linspace', 0.7)])
def test_ddpm_steps(kind, prediction, spacing, clip):
    settings = dict(timestep_spacing=spacing, clip_sample=clip > 0, clip_sample_range=clip or 1.0)
    ours = Schedule(kind, 100, prediction, **settings)
    ref = their(DDPMScheduler, kind, 100, prediction, **settings)
    for n in (10, 7, 33, 100):
        ref.set_timesteps(n)
        # theirs draws no noise at t = 0
        generator = torch.Generator().manual_seed(5)

        def step(output, t, t_next, x, i):
            noise = torch.randn(x.shape, generator=generator) if t else None    # noqa: B023
            return ours.ddpm_step(output, t, t_next, x, noise)

        a = our_chain(ours, ours.pairs(n, chained=True), step)

        # the same noise once more
        x, b, generator = randn(2, 3, 4), [], torch.Generator().manual_seed(5)
        for t in ref.timesteps:
            x = ref.step(fake_model(x, int(t)), int(t), x, generator).prev_sample
            b.append(x)
        close(a, torch.stack(b), 1e-6 * max(1, float(a.abs().max())))
        # noise does not matter in the last step
        assert torch.equal(ours.ddpm_step(x, 0, -1, x, x), ours.ddpm_step(x, 0, -1, x))


def test_steps_take_one_time_a_row():
    ours, x, output = Schedule('linear', 100), randn(3, 4), randn(3, 4, seed=1)
    t, t_next = torch.tensor([90, 40, 10]), torch.tensor([80, 0, -1])
    for step in (ours.step, ours.ddpm_step, FlowSchedule().step):
        rows = [step(output[i:i + 1], int(t[i]), int(t_next[i]), x[i:i + 1]) for i in range(3)]
        # numbers or tensors
        close(step(output, t, t_next, x), torch.cat(rows))


def test_pairs_say_which_time_comes_next():
    ours = Schedule('linear', 100, timestep_spacing='trailing')
    # 100 // 3 = 33 below each
    assert ours.pairs(3) == [(99, 66), (66, 33), (32, -1)]
    assert ours.pairs(3, chained=True) == [(99, 66), (66, 32), (32, -1)]


@pytest.mark.parametrize('sampler', ['ddim', 'ddpm'])
def test_samples_of_a_known_distribution(sampler):
    """With the best possible model of N(0.3, 0.2^2), samples have that mean and deviation."""
    ours = Schedule('squaredcos_cap_v2', 100, clip_sample=False)

    def best(x, t):
        a = ours.alpha(t, x)
        return (1 - a).sqrt() * (x - a.sqrt() * 0.3) / (a * 0.04 + 1 - a)

    keys = random_keys(0, torch.arange(4000))
    x = ours.sample(best, normal(keys, (1,)), 100, sampler, keys=keys)
    assert abs(x.mean() - 0.3) < 0.02 and abs(x.std() - 0.2) < 0.02
    some = ours.sample(best, normal(keys[5:7], (1,)), 100, sampler, keys=keys[5:7])
    assert torch.equal(x[5:7], some)


@pytest.mark.parametrize('wrong', [dict(kind='cosine'), dict(prediction='noise'),
                                   dict(timestep_spacing='even'), dict(steps=0)])
def test_wrong_schedules(wrong):
    with pytest.raises(ValueError, match='|'.join(wrong)):
        Schedule(**wrong)


# -------------------------------------------------------------------------------------------------
# flow matching


@pytest.mark.parametrize('n', [1, 2, 3, 7, 10, 49, 1000])
@pytest.mark.parametrize('shift', [1.0, 3.0])
@pytest.mark.parametrize('sampler', ['euler', 'heun'])
def test_any_number_of_steps_ends_at_zero(n, shift, sampler):
    flow, x, noise = FlowSchedule(shift=shift), randn(4, 3), randn(4, 3, seed=1)
    t = flow.timesteps(n)
    assert len(t) == n + 1 and t[0] == 1 and t[-1] == 0 and (t[1:] < t[:-1]).all()
    close(flow.add_noise(x, noise, torch.ones(4)), noise)
    close(flow.add_noise(x, noise, 0), x)
    close(flow.add_noise(x, noise, torch.full((4,), 0.25)), 0.25 * noise + 0.75 * x)
    # rounding adds up
    tolerance = 2e-6 if n < 100 else 5e-5
    close(flow.sample(lambda x_t, t: flow.target(x, noise, t), noise, n, sampler), x, tolerance)


def test_heun_is_of_second_order():
    """x' = x from 1 to 0: the error falls with the square of the step, Euler's with the step."""
    def error(n, sampler):
        x = FlowSchedule().sample(lambda x, t: x, torch.ones(1, 1), n, sampler)
        return abs(x.item() - math.exp(-1))

    assert 1.8 < error(10, 'euler') / error(20, 'euler') < 2.2
    assert error(20, 'heun') < error(20, 'euler') / 10

    # the last step is Euler's, as diffusers' and EDM's
    times = []
    FlowSchedule().sample(lambda x, t: times.append(float(t)) or x, torch.ones(1, 1), 2, 'heun')
    assert times == [1, 0.5, 0.5]


@pytest.mark.parametrize('sigmas', [None, torch.linspace(1, 0.1, 10).tolist(), [1.0, 0.8, 0.3]])
@pytest.mark.parametrize('shift', [1.0, 2.5])
def test_euler_equals_diffusers(sigmas, shift):
    flow, ref = FlowSchedule(shift=shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    ref.set_timesteps(**dict(sigmas=sigmas) if sigmas else dict(num_inference_steps=9))
    if sigmas and len(sigmas) == 10:
        # pi0's grid is the one of n even steps
        close(flow.timesteps(10), ref.sigmas)
    x, ours = randn(2, 3), randn(2, 3)
    for t, s, s_next in zip(ref.timesteps, ref.sigmas, ref.sigmas[1:]):
        x = ref.step(fake_model(x, float(s)), t, x).prev_sample
        ours = flow.step(fake_model(ours, float(s)), s, s_next, ours)
        close(ours, x)


def test_heun_equals_diffusers():
    flow, ref = FlowSchedule(), FlowMatchHeunDiscreteScheduler()
    ref.set_timesteps(8)
    x = randn(2, 3)
    for t in ref.timesteps:
        x = ref.step(fake_model(x, float(t) / 1000), t, x).prev_sample
    # theirs has every time but the ends twice
    flow.timesteps = lambda n: torch.cat((ref.sigmas[:1], ref.sigmas[1:-1:2], ref.sigmas[-1:]))
    close(flow.sample(lambda x, t: fake_model(x, float(t[0])), randn(2, 3), 8, 'heun'), x, 1e-5)


def test_training_times():
    u = (torch.arange(100000) + 0.5) / 100000
    quantiles = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95])
    uniformly = FlowSchedule('uniform').times(u)
    beta = FlowSchedule('beta').times(u)
    logit = FlowSchedule('logit_normal').times(u)
    close(uniformly.quantile(quantiles), quantiles, 1e-4)

    # as pi0 has it
    draws = torch.distributions.Beta(1.5, 1.0).sample((100000,)) * 0.999 + 0.001
    close(beta.quantile(quantiles), draws.quantile(quantiles), 1e-2)
    assert 0.001 < beta.min() and beta.max() < 1
    close(logit.logit().mean(), torch.tensor(0.0), 1e-3)
    close(logit.logit().std(), torch.tensor(1.0), 1e-2)
    close(FlowSchedule('uniform', 3.0).times(u), 3 * u / (1 + 2 * u))

    # each of a discrete schedule's times as often as any other
    t = Schedule('linear', 50).times(u)
    assert t.min() == 0 and t.max() == 49 and (t.bincount() == 2000).all()


@pytest.mark.parametrize('wrong', [dict(time='cosine'), dict(shift=0.0)])
def test_wrong_flows(wrong):
    with pytest.raises(ValueError, match='flow: time.*shift'):
        FlowSchedule(**wrong)
    with pytest.raises(ValueError, match="sampler='ddim'.*euler and heun"):
        FlowSchedule().sample(lambda x, t: x, randn(1, 1), 2, 'ddim')
