"""tasks/vla.py: a slow forward pass, transformers' pi0, blocks, ranks; and what is built of
the settings of a run."""
import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from small_policies import (
    IMAGE,
    PAD,
    SMALL,
    TEXT,
    VIT,
    V,
    close,
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tasks
from configurator import flatten
from diffusion import normal, sincos
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
from robots.chunks import nothing, valid_numbers
from tasks.vla import VLA, VLAConfig

# -------------------------------------------------------------------------------------------------
# vision-language-action model


def with_targets(tokens, rows):
    """Targets at the last two words of some rows, and the rows' blocks: prefix-LM."""
    targets, blocks = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    for i in rows:
        end = int((tokens[i] != PAD).sum())
        targets[i, end - 3:end - 1], blocks[i, end - 2:] = tokens[i, end - 2:end], 1
    return dict(targets=targets, blocks=blocks)


def slow_velocity(model, tokens, pixels, x, t, state):
    """pi0's forward pass for one row, (1, T, D): both towers side by side, head by head, who sees
    whom spelt out."""
    d, prefix = model.decoder.config, model.embed(tokens, pixels)
    action = model.action_in(x)
    time = sincos(t, 24)[:, None].expand(action.shape)
    action = model.time_in(torch.cat((action, time), -1))
    action = model.time_out(torch.nn.functional.silu(action))
    suffix = torch.cat((model.state_in(state)[:, None], action), 1)
    S, L = prefix.shape[1], prefix.shape[1] + suffix.shape[1]
    rope = rope_table(torch.arange(L)[None], d.head_dim, d.rope_theta)
    for vlm_block, expert_block in zip(model.decoder.blocks, model.expert):
        streams = (vlm_block, prefix), (expert_block, suffix)
        q, k, v = (joint_heads(name, streams, d.head_dim) for name in 'qkv')
        block = [0] * S + [1] + [2] * (L - S - 1)
        out = slow_attention(rotate(q, rope), rotate(k, rope), v, block)
        new = []
        for (b, h), part in zip(streams, out.flatten(2).split((S, L - S), 1)):
            h = h + b.o(part)
            n = b.norm2(h)
            new.append(h + b.down(b.activation(b.gate(n)) * b.up(n)))
        prefix, suffix = new
    return model.action_out(model.expert_norm(suffix)[:, 1:])


def joint_heads(name, streams, head_dim):
    """q, k or v (1, L, N, H) of both towers, each by its own weights."""
    parts = [getattr(b, name)(b.norm1(h)) for b, h in streams]
    return torch.cat(parts, 1).unflatten(-1, (-1, head_dim))


def slow_attention(q, k, v, block):
    """(1, L, N, H): place i sees all places whose block is not larger than its own."""
    _, L, num_heads, head_dim = q.shape
    out = torch.zeros(1, L, num_heads, head_dim)
    for n in range(num_heads):
        kv = n // (num_heads // k.shape[2])
        for i in range(L):
            seen = [j for j in range(L) if block[j] <= block[i]]
            weights = (q[0, i, n] @ k[0, seen, kv].T / head_dim ** 0.5).softmax(0)
            out[0, i, n] = weights @ v[0, seen, kv]
    return out


def velocities(model, seen, x, x_t, t):
    """The expert's output in training; x_t is t times the noise where the actions are zero."""
    outputs = []
    hook = model.action_out.register_forward_hook(lambda module, args, out: outputs.append(out))
    model(lowdim=x, noise=x_t, time=t, **seen)
    hook.remove()
    return outputs[0]


def test_vla_equals_a_slow_forward_pass():
    model, seen = vla(), observations([2])
    real = int(seen['segments'].sum())
    seen = dict(tokens=seen['tokens'][:, :real], pixels=seen['pixels'])
    state, noise, t = randn(1, 5), randn(1, 8, 3), torch.ones(1)
    slow = slow_velocity(model, seen['tokens'], seen['pixels'], noise, t, state)
    x = dict(actions=torch.zeros(1, 8, 3), proprio=state, rows=torch.arange(1))
    close(velocities(model, seen, x, noise, t), slow, 1e-5)
    sampled = model.sample(lowdim=dict(proprio=state), noise=noise, steps=1, **seen)
    close(noise - sampled, slow, 1e-5)


@pytest.mark.parametrize('text', [
    TEXT, replace(TEXT, sliding_window=3, global_every=2, qk_norm=True, post_norms=True,
                  attn_logits_softcap=20.0)])
def test_cached_sampling_equals_the_joint_forward_pass(text):
    """Ten Euler steps over the cache, and over what training computes; rows of every length."""
    model, seen = vla(text=text), observations([2, 0, 1])
    x = without(lowdim(3), 'actions', 'is_pad', 'action_mask')
    sampled = model.sample(lowdim=x, **seen)
    slow, zero = normal(x['keys'], (8, 3)), x | dict(actions=torch.zeros(3, 8, 3))
    for step in range(10):
        t = torch.full((3,), 1 - step / 10)
        slow = slow - velocities(model, seen, zero, slow / t[:, None, None], t) / 10
    close(sampled, slow, 1e-5)

    # batch equals one by one, without padding
    for i, (begin, end) in enumerate(((0, 2), (2, 2), (2, 3))):
        real = int(seen['segments'][i].sum())
        alone = model.sample(seen['tokens'][i:i + 1, :real], seen['pixels'][begin:end],
                             lowdim=take(x, i))
        close(alone, sampled[i:i + 1], 1e-5)


def test_vla_samples_only_what_a_robot_has():
    model, seen, x = vla(), observations([1, 1, 0]), lowdim(3)
    noise, wanted = randn(3, 8, 3), x['action_mask'][:, None]
    actions = [model.sample(lowdim=x, noise=n, **seen)
               for n in (noise, noise.where(wanted, 9.0))]
    assert torch.equal(*actions)
    assert (actions[0] == 0).all(1).logical_xor(x['action_mask']).all()


def test_prefix_is_computed_once():
    model, calls = vla(), []
    for module in (model.vit, model.decoder.blocks[0], model.expert[0]):
        module.register_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
    model.sample(lowdim=lowdim(2), steps=10, **observations([1, 1]))
    assert calls == ['ViT'] + ['DecoderBlock'] * 11


def test_earlier_blocks_do_not_see_later_ones():
    """Text does not change with state and actions, nor does what the state's token becomes with
    actions."""
    model, seen, x = vla(), observations([1, 1]), lowdim(2)
    x['actions'].requires_grad_()
    x['proprio'].requires_grad_()
    hidden = []
    model.expert_norm.register_forward_hook(lambda module, args, out: hidden.append(out))
    (text, _), (action, _) = model.loss(lowdim=x, **seen, **with_targets(seen['tokens'], [0, 1]))
    later = x['actions'], x['proprio']
    of_text = torch.autograd.grad(text, later, retain_graph=True, allow_unused=True)
    assert of_text == (None, None)
    of_state = torch.autograd.grad(hidden[0][:, 0].square().sum(), later, retain_graph=True)
    assert not of_state[0].any() and of_state[1].any()

    # the actions see everything
    earlier = model.vit.stem.weight, model.decoder.embedding.weight
    assert all(g.any() for g in torch.autograd.grad(action, (*later, *earlier)))

    # within a block everyone sees everyone: the first action changes with the last
    whole, noise = x | dict(is_pad=torch.zeros(2, 8)), randn(2, 8, 3)
    other = torch.cat((noise[:, :7], randn(2, 1, 3, seed=1)), 1)
    first = [velocities(model, seen, whole, n, torch.ones(2))[:, 0] for n in (noise, other)]
    assert not torch.equal(*first)


def test_vla_padded_actions_do_not_matter():
    model, seen, x = vla(num_noise_draws=2), observations([1, 0, 2]), lowdim(3)
    noise, time, valid = randn(6, 8, 3), torch.linspace(0.1, 1, 6), valid_numbers(x)
    (text, _), (loss, count) = model.loss(lowdim=x, noise=noise, time=time, **seen)
    grads = gradients(model, text + loss)
    other = x | dict(actions=x['actions'].where(valid, torch.tensor(float('nan'))))
    noise2 = noise.where(valid.repeat_interleave(2, 0), 100.0)
    (text, _), (loss2, count2) = model.loss(lowdim=other, noise=noise2, time=time, **seen)
    assert torch.equal(loss, loss2) and count == count2 == valid.sum()
    for name, g in gradients(model, text + loss2).items():
        assert torch.equal(g, grads[name]), name

    # nor does it matter that they are there
    i = int(x['is_pad'].sum(1).argmax())
    short = int((~x['is_pad'][i]).sum())
    assert short < 6
    draws = slice(2 * i, 2 * i + 2)
    full = velocities(model, seen, x, noise, time)[draws, :short]
    model.policy = replace(model.policy, action_steps=short)
    one = {key: value[i:i + 1] for key, value in x.items()}
    one |= {key: one[key][:, :short] for key in ('actions', 'is_pad')}
    close(velocities(model, seen, one, noise[draws, :short], time[draws]), full)


@pytest.mark.parametrize('remat', [False, True])
def test_text_and_actions_in_one_batch(remat):
    """Rows with text, with actions, with both; each loss, and each gradient, is what the rows give
    alone."""
    model = vla(text=replace(TEXT, remat=remat), num_noise_draws=2)
    seen = observations([1, 0, 2, 1])
    seen |= with_targets(seen['tokens'], [0, 1])
    x = lowdim(3) | dict(rows=torch.tensor([3, 1, 2]))
    (text, words), (action, numbers) = model.loss(lowdim=x, **seen)
    assert words == 4 and numbers == valid_numbers(x).sum()
    close(text, VLM.forward(model, **seen)['text'].losses.sum())
    grads = gradients(model, text + 0.3 * action)
    assert all(g.any() for g in grads.values())

    # row by row; the first has no actions
    sums = {}
    for i, (begin, end) in enumerate(((0, 1), (1, 1), (1, 3), (3, 4))):
        one = {key: value[i:i + 1] for key, value in seen.items()}
        one['pixels'] = seen['pixels'][begin:end]
        alone = nothing(model.policy, 'cpu')
        if i:
            alone = take(x, [3, 1, 2].index(i))
        (t, _), (a, _) = model.loss(lowdim=alone, **one)
        for name, g in gradients(model, t + 0.3 * a).items():
            sums[name] = sums.get(name, 0) + g
    for name, g in grads.items():
        close(sums[name], g, 2e-5)

    learned = model(lowdim=x, **seen)
    shapes = {kind: [part.shape for part in parts] for kind, parts in learned.items()}
    assert shapes == {'text': [(4,)] * 3, 'actions': [(3,)] * 3}
    width = seen['tokens'].shape[1]
    assert (learned['text'].places // width).tolist() == [0, 0, 1, 1]
    assert (learned['actions'].places // width).tolist() == [3, 1, 2]
    close(learned['actions'].losses.sum(), action)


@pytest.mark.parametrize('case', ['text only', 'no pictures', 'actions only', 'nothing'])
def test_every_vla_parameter_has_a_gradient(case):
    model = vla(text=replace(TEXT, tied=False))
    seen = observations([1, 1] if case in ('text only', 'actions only') else [0, 0])
    seen |= with_targets(seen['tokens'], [0, 1] if case in ('text only', 'no pictures') else [])
    has_actions = case in ('no pictures', 'actions only')
    x = lowdim(2) if has_actions else nothing(model.policy, 'cpu')
    if case == 'nothing':               # what a rank goes through that has fewer rows than another
        seen['tokens'] = torch.full_like(seen['tokens'], PAD)
        seen['segments'] = torch.zeros_like(seen['segments'])
    (text, words), (action, numbers) = model.loss(lowdim=x, **seen)
    grads = gradients(model, text + action)                 # each is there, though it may be zero
    assert all(g.isfinite().all() for g in grads.values())
    assert (numbers > 0) == has_actions
    assert (words == 0) == (case in ('actions only', 'nothing'))
    assert any(g.any() for g in grads.values()) == (case != 'nothing')


def test_vla_is_still_a_vlm():
    model, plain, seen = vla(), VLM(VLMConfig(VIT, TEXT, IMAGE)), observations([1, 2])
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing and {name.partition('.')[0] for name in unexpected} == {
        'expert', 'expert_norm', 'action_in', 'state_in', 'time_in', 'time_out', 'action_out'}
    assert torch.equal(plain.logits(**seen), model.logits(**seen))
    prompts = seen['tokens'], seen['pixels'], 4
    assert generate(plain, *prompts) == generate(model, *prompts)


def pi0(**more):
    """transformers' PI0 at the sizes of the VLA above."""
    from transformers import PI0Config, PI0ForConditionalGeneration
    gemma = dict(model_type='gemma', num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=1, head_dim=8)
    text = gemma | dict(hidden_size=32, intermediate_size=64, vocab_size=V)
    vision = dict(model_type='siglip_vision_model', hidden_size=24, intermediate_size=48,
                  num_hidden_layers=1, num_attention_heads=3, image_size=16, patch_size=8,
                  vision_use_head=False)
    paligemma = dict(model_type='paligemma', image_token_id=IMAGE, projection_dim=32,
                     text_config=text, vision_config=vision)
    return PI0ForConditionalGeneration(PI0Config(
        vlm_config=paligemma, dit_config=gemma | dict(hidden_size=24, intermediate_size=40),
        chunk_size=8, max_state_dim=5, max_action_dim=3)).eval()


def test_vla_equals_transformers_pi0():
    """Velocities, loss and ten sampled steps of transformers' PI0 with random weights."""
    torch.manual_seed(0)
    ref = pi0()
    model = vla(text=replace(TEXT, num_kv_heads=1)).eval()
    weights = {k: v + 0.05 * torch.randn_like(v) for k, v in ref.state_dict().items()}
    load_pi0(model, weights, ref)

    seen = observations([1, 2])
    cameras = torch.zeros(2, 2, 3, 16, 16)
    cameras[0, 0], cameras[1] = seen['pixels'][0], seen['pixels'][1:]
    there = torch.tensor([[True, False], [True, True]])
    state, noise, actions = randn(2, 5), randn(2, 8, 3), randn(2, 8, 3, seed=1)
    t = torch.tensor([0.7, 0.2])
    given = dict(input_ids=seen['tokens'], pixel_values=cameras, pixel_attention_mask=there,
                 attention_mask=seen['segments'])
    out = ref(state=state, noise=noise, timestep=t, actions=actions, **given)

    x = dict(actions=actions, proprio=state, rows=torch.arange(2))
    seen['blocks'] = torch.zeros_like(seen['tokens'])
    _, (loss, count) = model.loss(lowdim=x, noise=noise, time=t, **seen)
    close(velocities(model, without(seen, 'blocks'), x, noise, t), out.logits)
    close(loss / count, out.loss)
    close(model.sample(lowdim=dict(proprio=state), noise=noise, **seen),
          ref.sample_actions(state=state, noise=noise, **given))


def load_pi0(model, weights, ref):
    """Give transformers' PI0 these weights, and ours the same."""
    ref.load_state_dict(weights)
    names = {
        'model.vlm.vision_tower.': 'vit.', 'model.vlm.multi_modal_projector.linear': 'connector',
        'model.vlm.language_model.': 'decoder.', 'model.dit.norm': 'expert_norm',
        'model.dit.layers': 'expert', 'embed_action_time.': '', 'vision_model.': '',
        'embeddings.patch_embedding': 'stem', 'embeddings.position_embedding.weight': 'pos_embed',
        'encoder.layers': 'blocks', 'layers.': 'blocks.', 'embed_tokens': 'embedding',
        'self_attn.': '', 'mlp.': '', 'action_out_proj': 'action_out', 'out_proj': 'o',
        'action_in_proj': 'action_in', 'state_proj': 'state_in', 'action_time_mlp_': 'time_',
        'input_layernorm': 'norm1', 'post_attention_layernorm': 'norm2',
        'post_layernorm': 'norm', 'layer_norm': 'norm', '_proj': ''}
    renamed = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value[None] if name == 'vit.pos_embed' else value
    own = model.state_dict()
    model.load_state_dict({name: renamed[name] for name in own})


@pytest.mark.parametrize('wrong, message', [
    (dict(loss='l2'), "vla.loss='l2': expected one of mse, l1, huber"),
    (dict(action_steps=0), 'action_steps=0.*at least 1'),
    (dict(proprio_dim=-1), 'proprio_dim=-1.*at least 0'),
    (dict(width=7), 'vla.width=7 must be even'),
    (dict(time='gamma'), "time='gamma'")])
def test_wrong_vla_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        vla(**wrong)


# -------------------------------------------------------------------------------------------------
# from the settings of a run


SIZES = dict(action_dim=3, action_steps=8, proprio_dim=5)


def built(task, vocab_size=70, image_id=IMAGE, **given):
    """The model that a task builds of settings, beside its own."""
    settings = tasks.defaults(task) | flatten(dict(vit=VIT) | SIZES | given)
    tokenizer = SimpleNamespace(vocab_size=vocab_size, image_id=image_id)
    return tasks.load(task).build(settings, tokenizer)


def test_build():
    # the sizes of chunks are settings of their own
    plain, sized = replace(SMALL, action_dim=0, action_steps=0, proprio_dim=0), DecoderConfig()
    state = built('policy', policy=plain, decoder=TEXT)
    told = built('policy', policy=replace(plain, encoder='text'), decoder=sized)
    seeing = built('policy', policy=replace(plain, encoder='vlm'), decoder=sized)
    model = built('vla', decoder=sized)
    assert state.encoder is None and state.config == SMALL
    assert isinstance(told.encoder, Decoder) and isinstance(seeing.encoder, VLM)
    assert isinstance(model, VLA)
    assert model.decoder.config.vocab_size == seeing.encoder.decoder.config.vocab_size == 128
    assert model.config.image_token_id == IMAGE and model.policy.action_steps == 8
    with pytest.raises(ValueError, match='vocab_size=50 is less than the 70 of the tokenizer'):
        built('vla', decoder=TEXT)


def test_parameters_of_pi0():
    """The sizes of config/pi0_like.py, on the meta device, beside transformers' PI0: its expert
    has an embedding that nothing reads, and PaliGemma's own vocabulary has 64 rows more."""
    from transformers import PI0Config, PI0ForConditionalGeneration
    given = dict(
        vit=ViTConfig(image_size=224, patch_size=14, width=1152, depth=27, mlp_dim=4304,
                      num_heads=16),
        decoder=DecoderConfig(vocab_size=257216, width=2048, depth=18, mlp_dim=16384,
                              num_heads=8, num_kv_heads=1, head_dim=256),
        vla=VLAConfig(width=1024, mlp_dim=4096),
        action_dim=32, action_steps=50, proprio_dim=32)
    with torch.device('meta'):
        model = built('vla', 257216, 257152, **given)
        ref = PI0ForConditionalGeneration(PI0Config())
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (model, ref))
    assert ours == theirs - 257152 * 1024 + 64 * 2048 == 3_238_179_600


# -------------------------------------------------------------------------------------------------
# ranks


CASES = [('vla', False), ('vla', True), ('transformer', False), ('unet', True)]


def of_case(name):
    """The model of a case, and the names of inputs that it takes."""
    if name == 'vla':
        return vla(), ('tokens', 'pixels', 'segments', 'blocks', 'lowdim', 'targets')
    model = policy(encoder='vlm', denoiser=name)
    return model, ('tokens', 'pixels', 'segments', 'blocks', 'lowdim')


def a_rank(rank, folder):
    """One of two ranks: the first has a picture and actions, the second neither, but text."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    for name, sharded in CASES:
        model, takes = of_case(name)
        if sharded:
            mesh = init_device_mesh('cpu', (2,))
            blocks = [m for m in model.modules() if isinstance(m, (DecoderBlock, ViTBlock))]
            for module in (*blocks, model):
                fully_shard(module, mesh=mesh)
        run = model if sharded else DistributedDataParallel(model)
        half = halves()[rank]
        # the mean over ranks is to be the sum
        (2 * total(run(**{key: half[key] for key in takes}))).backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        if sharded:
            grads = {n: grad.full_tensor() for n, grad in grads.items()}
        if rank == 0:
            torch.save(grads, f'{folder}/{name}{sharded}.pt')
    dist.destroy_process_group()


def halves():
    first, second = observations([1]), observations([0]) | dict(pixels=None)
    first['lowdim'], second['lowdim'] = lowdim(1), nothing(SMALL, 'cpu')
    return [half | with_targets(half['tokens'], [0]) for half in (first, second)]


def test_ranks_without_pictures_or_actions(tmp_path):
    """DDP and FSDP2 wait for nobody, and the gradient is that of both ranks' batches."""
    # not forked: autograd's threads would be missing
    process = multiprocessing.get_context('spawn').Process
    ranks = [process(target=a_rank, args=(rank, tmp_path)) for rank in range(2)]
    for each_rank in ranks:
        each_rank.start()
    for each_rank in ranks:
        each_rank.join(120)
    hung = [each_rank.kill() for each_rank in ranks if each_rank.is_alive()]
    assert not hung and [each_rank.exitcode for each_rank in ranks] == [0, 0]

    for name, sharded in CASES:
        model, takes = of_case(name)
        loss = sum(total(model(**{key: half[key] for key in takes})) for half in halves())
        grads = gradients(model, loss)
        for key, grad in torch.load(tmp_path / f'{name}{sharded}.pt').items():
            close(grad, grads[key], 1e-5 * max(1.0, float(grads[key].abs().max())))
