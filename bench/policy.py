"""What robot policies cost: OMP_NUM_THREADS=1 python bench/policy.py [--batch_size=64]

Medians of calls that take turns, in one process with the same threads; weights are random.
1. DiffusionPolicy beside diffusers: a chunk of 10 DDIM steps (for 1 robot, for 16), a training step (fused AdamW for
   both). Our U-Net beside UNet1DModel with the residual temporal blocks of Diffuser, same channels, kernel and
   convolutions a level: ours has one block more in the middle, and reads a state, which theirs does not. Our
   transformer beside DiTTransformer2DModel of the same width, depth and heads, whose picture is the chunk.
2. VLA: a chunk of 10 Euler steps with the prefix computed once, beside the prefix computed in every step, and beside
   transformers' PI0 of the same shape.
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
from policies import VLA, DiffusionPolicy, PolicyConfig, VLAConfig  # noqa: E402

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
    times = {name: [] for name in calls}
    for i in range(repeats + 3):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if i >= 3:
                times[name].append(time.perf_counter() - began)
    medians = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    first = next(iter(medians))
    print(f'{what:30} ' + ', '.join(f'{name} {ms:.1f} ms' for name, ms in medians.items()) + f': {first} ' + ', '.join(
        f'{medians[name] / medians[first]:.2f} x as fast as {name}' for name in medians if name != first), flush=True)


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

    def our_loss():
        loss, count = policy.loss(lowdim=ours)
        return loss / count

    def their_loss():
        noise, t = torch.randn(batch_size, *shape), torch.randint(0, 100, (batch_size,))
        return F.mse_loss(output(scheduler.add_noise(ours['actions'], noise, t), t), noise)

    @torch.no_grad()
    def their_chunk(batch):
        x = torch.randn(batch, *shape)
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            x = scheduler.step(output(x, t.expand(batch)), t, x).prev_sample
        return x

    for batch in (1, 16):
        given = dict(proprio=torch.randn(batch, proprio_dim), keys=random_keys(0, torch.arange(batch)))
        compare(f'  10 steps of {batch} chunk{"s" * (batch > 1)}', {
            'ours': lambda given=given: policy.sample(lowdim=given, steps=10),
            'diffusers': lambda batch=batch: their_chunk(batch)})
    ours = dict(actions=torch.randn(batch_size, *shape), proprio=torch.randn(batch_size, proprio_dim),
                keys=random_keys(0, torch.arange(batch_size)))
    compare(f'  a training step of {batch_size}', {'ours': training(policy, our_loss),
                                                   'diffusers': training(theirs, their_loss)})


def unets():
    from diffusers import UNet1DModel
    theirs = UNet1DModel(
        sample_size=action_steps, in_channels=action_dim, out_channels=action_dim, time_embedding_type='positional',
        use_timestep_embedding=True, flip_sin_to_cos=False, freq_shift=1, block_out_channels=channels,
        layers_per_block=1, act_fn='mish', norm_num_groups=8, down_block_types=('DownResnetBlock1D',) * len(channels),
        up_block_types=('UpResnetBlock1D',) * (len(channels) - 1), mid_block_type='MidResTemporalBlock1D',
        out_block_type='OutConv1DBlock', downsample_each_block=False)
    policy = DiffusionPolicy(PolicyConfig(action_dim, action_steps, proprio_dim, denoiser='unet', channels=channels,
                                          width=channels[0], objective='ddpm', clip_range=1.0))
    beside_diffusers('U-Net', policy, theirs, lambda x, t: theirs(x.transpose(1, 2), t).sample.transpose(1, 2))


def transformers():
    from diffusers import DiTTransformer2DModel
    side = round(action_steps ** 0.5)
    assert side ** 2 == action_steps, 'action_steps must be a square, as diffusers has a picture there'
    theirs = DiTTransformer2DModel(
        num_attention_heads=num_heads, attention_head_dim=width // num_heads, in_channels=action_dim,
        out_channels=action_dim, num_layers=depth, sample_size=side, patch_size=1, norm_num_groups=1)
    policy = DiffusionPolicy(PolicyConfig(action_dim, action_steps, proprio_dim, denoiser='transformer', width=width,
                                          depth=depth, mlp_dim=4 * width, num_heads=num_heads, objective='ddpm',
                                          clip_range=1.0))

    def output(x, t):
        x = x.transpose(1, 2).unflatten(2, (side, side))
        return theirs(x, t, class_labels=torch.zeros_like(t)).sample.flatten(2).transpose(1, 2)
    beside_diffusers('transformer', policy, theirs, output)


def vlas():
    from transformers import PI0Config, PI0ForConditionalGeneration
    vit = ViTConfig(image_size=96, patch_size=8, width=192, depth=6, mlp_dim=768, num_heads=3)
    text = DecoderConfig(vocab_size=512, width=256, depth=6, mlp_dim=1024, num_heads=4, num_kv_heads=1, head_dim=64)
    model = VLA(VLAConfig(action_dim, action_steps, proprio_dim, width=128, mlp_dim=512), VLMConfig(vit, text, 5))
    gemma = dict(model_type='gemma', num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1, head_dim=64)
    pi0 = PI0ForConditionalGeneration(PI0Config(
        vlm_config=dict(model_type='paligemma', image_token_id=5, projection_dim=256, text_config=gemma | dict(
            hidden_size=256, intermediate_size=1024, vocab_size=512), vision_config=dict(
                model_type='siglip_vision_model', hidden_size=192, intermediate_size=768, num_hidden_layers=6,
                num_attention_heads=3, image_size=96, patch_size=8, vision_use_head=False)),
        dit_config=gemma | dict(hidden_size=128, intermediate_size=512), chunk_size=action_steps,
        max_state_dim=proprio_dim, max_action_dim=action_dim)).eval()
    print(f'VLA: ours {size(model)} parameters, transformers\' PI0 {size(pi0)}; {cameras} pictures of 144 tokens')
    tokens = torch.cat((torch.full((1, 144 * cameras), 5), torch.randint(10, 512, (1, 16))), 1)
    pixels, state = torch.randn(cameras, 3, 96, 96), torch.randn(1, proprio_dim)
    noise, zeros = torch.randn(1, action_steps, action_dim), torch.zeros_like(tokens)
    given = dict(actions=torch.zeros_like(noise), proprio=state)

    @torch.no_grad()
    def again_and_again():
        """The same actions, from a whole forward pass a step."""
        x, said = noise, []
        hook = model.action_out.register_forward_hook(lambda module, args, out: said.append(out))
        for t, t_next in model.schedule.pairs(10):
            model.loss(tokens, None, pixels, zeros, None, given, x / t, torch.full((1,), t))
            x = model.schedule.step(said.pop(), t, t_next, x)
        hook.remove()
        return x

    def once():
        return model.sample(tokens, pixels, zeros, lowdim=given, noise=noise)
    torch.testing.assert_close(once(), again_and_again(), atol=1e-4, rtol=1e-4)
    compare('  10 steps of 1 chunk', {
        'prefix once': once, 'prefix in every step': again_and_again,
        'PI0': lambda: pi0.sample_actions(state=state, input_ids=tokens, pixel_values=pixels[None], noise=noise,
                                          pixel_attention_mask=torch.ones(1, cameras, dtype=torch.bool),
                                          attention_mask=torch.ones_like(tokens))})


if __name__ == '__main__':
    unets()
    transformers()
    vlas()
