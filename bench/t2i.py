"""What text to image costs: OMP_NUM_THREADS=1 python bench/t2i.py [--width=256 --image_size=32 --patch_size=2]

Our DiT beside the nearest of diffusers of equal width, depth, heads, patches and sentence, random weights, in one
process; medians of calls that take turns, in seconds of the CPU, which other work on the machine changes little (on a
GPU, seconds). Cross-attention beside PixArtTransformer2DModel, joint
attention beside SD3Transformer2DModel. A training step (flow matching, fused AdamW), `steps` Euler steps of pictures
with guidance, both of one batch with and without the sentence, and the bytes that a forward pass keeps for the backward
pass (on a GPU also the peak of a training step).
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
from diffusion import FlowSchedule  # noqa: E402
from images.dit import DiTConfig, TextToImage  # noqa: E402

image_size = 32
patch_size = 4
width = 256
depth = 6
num_heads = 4
sentence = 20                   # tokens, of which the last quarter is padding
context = 128                   # their width
batch_size = 32                 # of a training step
pictures = 4                    # sampled at once
steps = 10
repeats = 9                     # of each, after 2 that warm up
device = 'cpu'
configure(globals())


class Text(torch.nn.Module):
    """Sentences that are encoded already: tokens are rows of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, tokens, segments):
        return self.table[:len(tokens)]


def compare(what, calls):
    """Print the median times of `calls`, {name: function}, which take turns, beside the first."""
    times, clock = {name: [] for name in calls}, time.process_time if device == 'cpu' else time.perf_counter
    for i in range(repeats + 2):
        for name, call in calls.items():
            began = clock()
            call()
            torch.cuda.synchronize() if device != 'cpu' else None
            if i >= 2:
                times[name].append(clock() - began)
    ours, theirs = (1e3 * statistics.median(t) for t in times.values())
    print(f'  {what:34} ours {ours:8.1f} ms, diffusers {theirs:8.1f} ms: {theirs / ours:.2f} x', flush=True)


def kept(forward):
    """Bytes that a forward pass keeps for the backward pass, weights aside."""
    found = {}

    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward()
    loss.backward()
    return sum(found.values())


def beside(name, model, theirs, output):
    """output(x, t, context, mask) is what `theirs` says."""
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, theirs)]
    print(f'{name}: ours {sizes[0]:.2f} M parameters, diffusers {sizes[1]:.2f} M')
    shape, flow = (3, image_size, image_size), FlowSchedule('logit_normal')
    x, noise, t = torch.randn(batch_size, *shape, device=device), torch.randn(batch_size, *shape, device=device), \
        torch.rand(batch_size, device=device)
    tokens = torch.zeros(batch_size, sentence, dtype=torch.long, device=device)
    segments = (torch.arange(sentence, device=device) < sentence * 3 // 4).long().expand(batch_size, -1)
    table = model.text.table

    def our_loss():
        loss, count = model.loss(tokens, pixels=x, segments=segments, noise=noise, time=t)
        return loss / count

    def their_loss():
        return F.mse_loss(output(flow.add_noise(x, noise, t), t, table[:batch_size], segments > 0), noise - x)

    def training(module, mean_loss):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

        def step():
            mean_loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step

    @torch.no_grad()
    def their_pictures():
        y = noise[:pictures]
        both, mask = table[:2 * pictures], segments[:1].expand(2 * pictures, -1) > 0
        for a, b in flow.pairs(steps):
            told, untold = output(torch.cat((y, y)), y.new_full((2 * pictures,), a), both, mask).chunk(2)
            y = flow.step(untold + 4 * (told - untold), a, b, y)
        return y
    compare(f'a training step of {batch_size}', {'ours': training(model, our_loss),
                                                 'diffusers': training(theirs, their_loss)})
    compare(f'{pictures} pictures, {steps} steps, guidance', {
        'ours': lambda: model.sample(tokens[:pictures], segments[:pictures], noise=noise[:pictures], steps=steps,
                                     guidance=4.0), 'diffusers': their_pictures})
    a, b = kept(our_loss) / 2 ** 20, kept(their_loss) / 2 ** 20
    print(f'  kept for the backward pass         ours {a:8.1f} MB, diffusers {b:8.1f} MB: {a / b:.2f}')
    if device != 'cpu':
        for who, module, loss in (('ours', model, our_loss), ('diffusers', theirs, their_loss)):
            torch.cuda.reset_peak_memory_stats()
            training(module, loss)()
            print(f'  peak of a training step, {who}: {torch.cuda.max_memory_allocated() / 2 ** 20:.1f} MB')


def main():
    from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
    torch.manual_seed(0)
    shape = dict(num_attention_heads=num_heads, attention_head_dim=width // num_heads, num_layers=depth,
                 patch_size=patch_size, sample_size=image_size, in_channels=3, out_channels=3)
    table = torch.randn(2 * max(batch_size, pictures), sentence, context, device=device)
    text = Text(table)
    text.config = DiTConfig(width=context)

    def ours(attention):
        config = DiTConfig(image_size, 3, patch_size, width, depth, 4 * width, num_heads, attention, drop=0.0)
        return TextToImage(config, text).to(device)
    theirs = PixArtTransformer2DModel(**shape, cross_attention_dim=width, caption_channels=context,
                                      norm_type='ada_norm_single', use_additional_conditions=False).to(device)
    beside('cross-attention', ours('cross'), theirs, lambda x, t, context, mask: theirs(
        x, encoder_hidden_states=context, encoder_attention_mask=mask, timestep=t * 1000,
        added_cond_kwargs=dict(resolution=None, aspect_ratio=None)).sample)
    theirs = SD3Transformer2DModel(
        **shape, joint_attention_dim=context, caption_projection_dim=width, pooled_projection_dim=context,
        pos_embed_max_size=image_size // patch_size).to(device)
    beside('joint attention', ours('joint'), theirs, lambda x, t, context, mask: theirs(
        x, encoder_hidden_states=context, pooled_projections=context.mean(1), timestep=t * 1000).sample)


if __name__ == '__main__':
    main()
