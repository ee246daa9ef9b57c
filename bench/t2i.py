"""What text to image costs: OMP_NUM_THREADS=1 python bench/t2i.py [--width=256 --image_size=32]

Our DiT beside the nearest of diffusers of equal width, depth, heads, patches and sentence, random
weights, in one process; medians of calls that take turns, in seconds of the CPU, which other work
on the machine changes little (on a GPU, seconds). Cross-attention beside PixArtTransformer2DModel,
joint attention beside SD3Transformer2DModel. A training step (flow matching, fused AdamW), `steps`
Euler steps of pictures with guidance, both of one batch with and without the sentence, and the
bytes that a forward pass keeps for the backward pass (on a GPU also the peak of a training step).
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
GUIDANCE = 4.0


class Text(torch.nn.Module):
    """Sentences that are encoded already: tokens are rows of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, tokens, segments):
        return self.table[:len(tokens)]


def compare(what, ours, theirs):
    """Print the median times of the two calls, which take turns."""
    clock = time.process_time if device == 'cpu' else time.perf_counter
    times = {ours: [], theirs: []}
    for i in range(repeats + 2):
        for call in times:
            began = clock()
            call()
            if device != 'cpu':
                torch.cuda.synchronize()
            # The first two fill caches, and the state of the optimizer.
            if i >= 2:
                times[call].append(clock() - began)

    a, b = 1e3 * statistics.median(times[ours]), 1e3 * statistics.median(times[theirs])
    print(f'  {what:34} ours {a:8.1f} ms, diffusers {b:8.1f} ms: {b / a:.2f} x', flush=True)


def kept(forward):
    """MB that a forward pass keeps for the backward pass, weights aside."""
    found = {}

    # By storage: several views of one tensor are kept once.
    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            storage = x.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return x

    # The backward pass frees it again.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward()
    loss.backward()
    return sum(found.values()) / 2 ** 20


def training(module, mean_loss):
    """A training step."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step():
        mean_loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def size(module):
    return f'{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M'


def beside(name, model, theirs, output):
    """output(x, t, context, mask) is what `theirs` says."""
    print(f'{name}: ours {size(model)} parameters, diffusers {size(theirs)}')
    flow = FlowSchedule('logit_normal')
    table = model.text.table
    is_text = torch.arange(sentence, device=device) < sentence * 3 // 4

    # A training step's pictures, noise, times and sentences.
    x = torch.randn(batch_size, 3, image_size, image_size, device=device)
    noise = torch.randn_like(x)
    t = torch.rand(batch_size, device=device)
    tokens = torch.zeros(batch_size, sentence, dtype=torch.long, device=device)
    segments = is_text.long().expand(batch_size, -1)
    rows = torch.arange(batch_size, device=device)

    # And what pictures are drawn from, which may be more of them.
    start = torch.randn(pictures, 3, image_size, image_size, device=device)
    asked = torch.zeros(pictures, sentence, dtype=torch.long, device=device)
    asked_segments = is_text.long().expand(pictures, -1)

    def our_loss():
        losses, counts, _ = model(tokens, segments, x, rows, noise=noise, time=t)['pictures']
        return losses.sum() / counts.sum()

    def their_loss():
        noisy = flow.add_noise(x, noise, t)
        return F.mse_loss(output(noisy, t, table[:batch_size], segments > 0), noise - x)

    def our_pictures():
        return model.sample(asked, asked_segments, noise=start, steps=steps, guidance=GUIDANCE)

    # Both halves of guidance in one batch, as ours has them.
    @torch.no_grad()
    def their_pictures():
        y, both = start, table[:2 * pictures]
        mask = is_text.expand(2 * pictures, -1)
        for a, b in flow.pairs(steps):
            time_of_step = y.new_full((2 * pictures,), a)
            told, untold = output(torch.cat((y, y)), time_of_step, both, mask).chunk(2)
            y = flow.step(untold + GUIDANCE * (told - untold), a, b, y)
        return y

    compare(f'a training step of {batch_size}',
            training(model, our_loss), training(theirs, their_loss))
    compare(f'{pictures} pictures, {steps} steps, guidance', our_pictures, their_pictures)
    a, b = kept(our_loss), kept(their_loss)
    print(f'  kept for the backward pass         ours {a:8.1f} MB, diffusers {b:8.1f} MB: '
          f'{a / b:.2f}')

    # Only a GPU's allocator tells.
    if device != 'cpu':
        for who, module, loss in (('ours', model, our_loss), ('diffusers', theirs, their_loss)):
            torch.cuda.reset_peak_memory_stats()
            training(module, loss)()
            mb = torch.cuda.max_memory_allocated() / 2 ** 20
            print(f'  peak of a training step, {who}: {mb:.1f} MB')


def our_model(attention, text):
    config = DiTConfig(
        image_size, 3, patch_size, width, depth, 4 * width, num_heads, attention, drop=0.0)
    return TextToImage(config, text).to(device)


def main():
    from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
    torch.manual_seed(0)
    table = torch.randn(2 * max(batch_size, pictures), sentence, context, device=device)
    text = Text(table)
    # The width of what it gives is all that is asked of it.
    text.config = DiTConfig(width=context)
    shape = dict(
        num_attention_heads=num_heads, attention_head_dim=width // num_heads, num_layers=depth,
        patch_size=patch_size, sample_size=image_size, in_channels=3, out_channels=3)

    # Times of diffusers go from 0 to 1000.
    pixart = PixArtTransformer2DModel(
        **shape, cross_attention_dim=width, caption_channels=context,
        norm_type='ada_norm_single', use_additional_conditions=False).to(device)

    def pixart_output(x, t, context, mask):
        no_conditions = dict(resolution=None, aspect_ratio=None)
        return pixart(
            x, encoder_hidden_states=context, encoder_attention_mask=mask, timestep=t * 1000,
            added_cond_kwargs=no_conditions).sample
    beside('cross-attention', our_model('cross', text), pixart, pixart_output)

    # Its attention takes no mask, and it wants a vector of the whole sentence, too.
    sd3 = SD3Transformer2DModel(
        **shape, joint_attention_dim=context, caption_projection_dim=width,
        pooled_projection_dim=context, pos_embed_max_size=image_size // patch_size).to(device)

    def sd3_output(x, t, context, mask):
        return sd3(
            x, encoder_hidden_states=context, pooled_projections=context.mean(1),
            timestep=t * 1000).sample
    beside('joint attention', our_model('joint', text), sd3, sd3_output)


if __name__ == '__main__':
    main()
