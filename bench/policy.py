"""What robot policies cost: OMP_NUM_THREADS=1 python bench/policy.py [--batch_size=64]

Medians of calls that take turns, in one process with the same threads; weights are random.
1. DiffusionPolicy beside diffusers: a chunk of 10 DDIM steps (for 1 robot, for 16), a training
   step (fused AdamW for both). Our U-Net beside UNet1DModel with the residual temporal blocks of
   Diffuser, same channels, kernel and convolutions a level: ours has one block more in the middle,
   and reads a state, which theirs does not. Our transformer beside DiTTransformer2DModel of the
   same width, depth and heads, whose picture is the chunk.
2. VLA: a chunk of 10 Euler steps with the prefix computed once, beside the prefix computed in
   every step, and beside transformers' PI0 of the same shape.
"""
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from configurator import configure  # noqa: E402
from diffusion import random_keys  # noqa: E402
from model import DecoderConfig, ViTConfig, VLMConfig  # noqa: E402
from tasks.policy import DiffusionPolicy, PolicyConfig  # noqa: E402
from tasks.vla import VLA, VLAConfig  # noqa: E402

action_dim = 8
action_steps = 16
proprio_dim = 16
batch_size = 64                 # of a training step
channels = (128, 256, 512)      # of the U-Nets
width = 256                     # of the transformers
depth = 6
num_heads = 4
cameras = 2                     # of the VLAs
repeats = 15                    # of each, after 3 that warm up
configure(globals())


def compare(what, calls):
    """Print the median times of `calls`, {name: function}, which take turns, beside the first."""
    # By turns, so that what else runs on the machine meets all of them.
    times = {name: [] for name in calls}
    for i in range(repeats + 3):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            # The first fill caches, and the state of the optimizer.
            if i >= 3:
                times[name].append(time.perf_counter() - began)

    medians = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    first, *others = medians
    all_times = ', '.join(f'{name} {ms:.1f} ms' for name, ms in medians.items())
    ratios = []
    for name in others:
        ratios.append(f'{medians[name] / medians[first]:.2f} x as fast as {name}')
    print(f'{what:30} {all_times}: {first} {", ".join(ratios)}', flush=True)


def training(model, mean_loss):
    """A training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        mean_loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def size(model):
    return f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M'


def beside_diffusers(name, policy, theirs, output):
    """output(x (B, T, D), t (B,)) is what `theirs` says."""
    from diffusers import DDIMScheduler
    print(f'{name}: ours {size(policy)} parameters, diffusers {size(theirs)}')
    scheduler = DDIMScheduler(100, beta_schedule='squaredcos_cap_v2')
    shape = action_steps, action_dim

    @torch.no_grad()
    def their_chunk(robots):
        x = torch.randn(robots, *shape)
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            x = scheduler.step(output(x, t.expand(robots)), t, x).prev_sample
        return x

    for robots, what in ((1, '1 chunk'), (16, '16 chunks')):
        # Noise of ours comes of a key for each robot, whatever the batch it is in.
        proprio = torch.randn(robots, proprio_dim)
        asked = dict(proprio=proprio, keys=random_keys(0, torch.arange(robots)))
        compare(f'  10 steps of {what}', {
            'ours': lambda asked=asked: policy.sample(lowdim=asked, steps=10),
            'diffusers': lambda robots=robots: their_chunk(robots)})

    taught = dict(
        actions=torch.randn(batch_size, *shape), proprio=torch.randn(batch_size, proprio_dim),
        keys=random_keys(0, torch.arange(batch_size)))

    def our_loss():
        loss, count = policy.loss(lowdim=taught)
        return loss / count

    def their_loss():
        noise, t = torch.randn(batch_size, *shape), torch.randint(0, 100, (batch_size,))
        noisy = scheduler.add_noise(taught['actions'], noise, t)
        return F.mse_loss(output(noisy, t), noise)

    compare(f'  a training step of {batch_size}', {
        'ours': training(policy, our_loss), 'diffusers': training(theirs, their_loss)})


def unets():
    from diffusers import UNet1DModel
    levels = len(channels)

    # The blocks of Diffuser (arXiv 2205.09991).
    theirs = UNet1DModel(
        sample_size=action_steps, in_channels=action_dim, out_channels=action_dim,
        time_embedding_type='positional', use_timestep_embedding=True, flip_sin_to_cos=False,
        freq_shift=1, block_out_channels=channels, layers_per_block=1, act_fn='mish',
        norm_num_groups=8, down_block_types=('DownResnetBlock1D',) * levels,
        up_block_types=('UpResnetBlock1D',) * (levels - 1),
        mid_block_type='MidResTemporalBlock1D', out_block_type='OutConv1DBlock',
        downsample_each_block=False)
    policy = DiffusionPolicy(PolicyConfig(
        action_dim, action_steps, proprio_dim, denoiser='unet', channels=channels,
        width=channels[0], objective='ddpm', clip_range=1.0))

    # Theirs wants (B, D, T).
    def output(x, t):
        return theirs(x.transpose(1, 2), t).sample.transpose(1, 2)
    beside_diffusers('U-Net', policy, theirs, output)


def transformers():
    from diffusers import DiTTransformer2DModel
    side = round(action_steps ** 0.5)
    what = 'action_steps must be a square, as diffusers has a picture there'
    assert side ** 2 == action_steps, what

    # A patch of one pixel for each action: as many tokens as ours.
    theirs = DiTTransformer2DModel(
        num_attention_heads=num_heads, attention_head_dim=width // num_heads,
        in_channels=action_dim, out_channels=action_dim, num_layers=depth, sample_size=side,
        patch_size=1, norm_num_groups=1)
    policy = DiffusionPolicy(PolicyConfig(
        action_dim, action_steps, proprio_dim, denoiser='transformer', width=width, depth=depth,
        mlp_dim=4 * width, num_heads=num_heads, objective='ddpm', clip_range=1.0))

    def output(x, t):
        x = x.transpose(1, 2).unflatten(2, (side, side))            # (B, D, side, side)
        x = theirs(x, t, class_labels=torch.zeros_like(t)).sample
        return x.flatten(2).transpose(1, 2)                         # (B, T, D)
    beside_diffusers('transformer', policy, theirs, output)


def their_vla():
    """transformers' PI0, of the shape that `vlas` gives ours."""
    from transformers import PI0Config, PI0ForConditionalGeneration
    gemma = dict(
        model_type='gemma', num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1,
        head_dim=64)
    text = gemma | dict(hidden_size=256, intermediate_size=1024, vocab_size=512)
    vision = dict(
        model_type='siglip_vision_model', hidden_size=192, intermediate_size=768,
        num_hidden_layers=6, num_attention_heads=3, image_size=96, patch_size=8,
        vision_use_head=False)
    vlm = dict(
        model_type='paligemma', image_token_id=5, projection_dim=256, text_config=text,
        vision_config=vision)
    expert = gemma | dict(hidden_size=128, intermediate_size=512)
    return PI0ForConditionalGeneration(PI0Config(
        vlm_config=vlm, dit_config=expert, chunk_size=action_steps, max_state_dim=proprio_dim,
        max_action_dim=action_dim)).eval()


def vlas():
    # Small, so that a CPU takes a second; in the proportions of SigLIP, Gemma and pi0's expert.
    vit = ViTConfig(image_size=96, patch_size=8, width=192, depth=6, mlp_dim=768, num_heads=3)
    text = DecoderConfig(
        vocab_size=512, width=256, depth=6, mlp_dim=1024, num_heads=4, num_kv_heads=1, head_dim=64)
    expert = VLAConfig(action_dim, action_steps, proprio_dim, width=128, mlp_dim=512)
    model = VLA(expert, VLMConfig(vit, text, 5))
    pi0 = their_vla()
    print(f'VLA: ours {size(model)} parameters, transformers\' PI0 {size(pi0)}; '
          f'{cameras} pictures of 144 tokens')

    # Token 5 is where pictures go; 16 words follow. All of a prefix sees all of it.
    words = torch.randint(10, 512, (1, 16))
    tokens = torch.cat((torch.full((1, 144 * cameras), 5), words), 1)
    blocks = torch.zeros_like(tokens)
    pixels, state = torch.randn(cameras, 3, 96, 96), torch.randn(1, proprio_dim)
    noise = torch.randn(1, action_steps, action_dim)
    given = dict(actions=torch.zeros_like(noise), proprio=state, rows=torch.arange(1))

    def once():
        return model.sample(tokens, pixels, blocks, lowdim=given, noise=noise)

    @torch.no_grad()
    def again_and_again():
        """The same actions, from a whole forward pass a step."""
        x, said = noise, []
        hook = model.action_out.register_forward_hook(
            lambda module, args, output: said.append(output))
        for t, t_next in model.schedule.pairs(10):
            # Of actions that are 0, noise x / t is at time t what x is.
            time_of_step = torch.full((1,), t)
            model(tokens, given, pixels=pixels, blocks=blocks, noise=x / t, time=time_of_step)
            x = model.schedule.step(said.pop(), t, t_next, x)
        hook.remove()
        return x

    def theirs():
        return pi0.sample_actions(
            state=state, input_ids=tokens, pixel_values=pixels[None], noise=noise,
            pixel_attention_mask=torch.ones(1, cameras, dtype=torch.bool),
            attention_mask=torch.ones_like(tokens))

    torch.testing.assert_close(once(), again_and_again(), atol=1e-4, rtol=1e-4)
    compare('  10 steps of 1 chunk', {
        'prefix once': once, 'prefix in every step': again_and_again, 'PI0': theirs})


if __name__ == '__main__':
    unets()
    transformers()
    vlas()
