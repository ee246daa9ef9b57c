"""What Stable Diffusion costs: OMP_NUM_THREADS=1 python bench/sd.py [--rows=32 --channels='(160, 320, 640, 640)']

Our U-Net beside diffusers' UNet2DConditionModel of the same settings and weights, in one process with the same threads;
medians of calls that take turns (on a CPU of its seconds, not of the clock's). A DDIM sample with guidance, text
encoded before, and a training step (epsilon, fused AdamW). Then the peak memory of each, in processes of their own:
weights, and what a process holds at most beyond what it held before the call. --device=cuda --dtype=bfloat16 for a GPU.
"""
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from configurator import configure  # noqa: E402
from families import diffusers as hub_sd  # noqa: E402
from images.dit import DiTConfig  # noqa: E402
from images.sd import UNet2DCondition, UNetConfig, build, schedule_of  # noqa: E402
from images.vae import AutoencoderKL, VAEConfig  # noqa: E402

rows = 32                       # of a latent: pictures have 8 times as many
channels = (96, 192, 384, 384)  # Stable Diffusion: (320, 640, 1280, 1280)
head_dim = 48                   # of the first level, twice as much of the others (40 in Stable Diffusion)
context = 768
pictures = 1                    # sampled at once
steps = 4
batch_size = 2                  # of a training step
repeats = 7                     # of each, after 1 that warms up
device = 'cpu'
dtype = 'float32'
only = ''                       # of a process that measures memory: ours-sample | ours-train | theirs-sample | ...
configure(globals())
autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != 'float32')


class Text(torch.nn.Module):
    """Sentences that are encoded already: tokens are rows of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, tokens, segments):
        return self.table[tokens[:, 0]]


def models(which):
    """The calls {sample, train} of `which`, ours or theirs."""
    torch.manual_seed(0)
    heads = tuple(width // (head_dim * 2 ** min(i, 2)) or 1 for i, width in enumerate(channels))
    c = UNetConfig(block_out_channels=channels, num_heads=heads, cross_attention_dim=context,
                   cross_attention=(True,) * (len(channels) - 1) + (False,))
    table = torch.randn(batch_size + 2, 77, context, device=device)
    x = torch.randn(batch_size, 4, rows, rows, device=device)
    noise, t = torch.randn_like(x), torch.randint(0, 1000, (batch_size,), device=device)
    unet = UNet2DCondition(c)
    schedule = schedule_of(c)
    if which == 'theirs':
        from diffusers import DDIMScheduler, UNet2DConditionModel
        theirs = UNet2DConditionModel(**hub_sd.their_config(c, 'unet'))
        theirs.load_state_dict(unet.state_dict())
        theirs.to(device)
        ddim = DDIMScheduler(1000, c.beta_start, c.beta_end, c.beta_schedule, clip_sample=False,
                             set_alpha_to_one=False, steps_offset=1)

        @torch.no_grad()
        def sample():
            """As StableDiffusionPipeline does it."""
            y, both = noise[:1].expand(pictures, -1, -1, -1), table[:2].repeat_interleave(pictures, 0)
            ddim.set_timesteps(steps)
            for t in ddim.timesteps:
                untold, told = theirs(torch.cat((y, y)), t, both).sample.chunk(2)
                y = ddim.step(untold + 7.5 * (told - untold), t, y).prev_sample
            return y

        def mean_loss():
            return F.mse_loss(theirs(schedule.add_noise(x, noise, t), t, table[2:]).sample.float(), noise)
        module = theirs
    else:
        small = VAEConfig(block_out_channels=(32,) * 4, norm_num_groups=32)
        model = build(DiTConfig(image_size=rows, drop=0.0), unet, Text(table), AutoencoderKL(small), [0] * 77)
        model.to(device, memory_format=torch.channels_last)     # as train.py and load_run have it
        model.vae = None                        # latents come out
        told = torch.ones(pictures, 77, dtype=torch.long, device=device)
        tokens = torch.arange(2, batch_size + 2, device=device)[:, None].expand(-1, 77)

        def sample():
            return model.sample(told, noise=noise[:1].expand(pictures, -1, -1, -1), steps=steps, guidance=7.5)

        def mean_loss():
            loss, count = model.loss(tokens, pixels=x, noise=noise, time=t)
            return loss / count
        module = unet
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True)

    def train():
        with autocast:
            loss = mean_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def drawn():
        with autocast:
            return sample()
    return dict(sample=drawn, train=train), sum(p.numel() for p in module.parameters())


def timed(call):
    clock = time.process_time if device == 'cpu' else time.perf_counter
    began = clock()
    out = call()
    torch.cuda.synchronize() if device != 'cpu' else None
    return clock() - began, out


def main():
    (ours, count), (theirs, _) = models('ours'), models('theirs')
    print(f'{count / 1e6:.1f} M parameters, latents of {rows} rows, {device} {dtype}', flush=True)
    names = {'sample': f'{pictures} pictures, {steps} steps, guidance', 'train': f'a training step of {batch_size}'}
    for what, name in names.items():
        times, outs = {'ours': [], 'diffusers': []}, {}
        for i in range(repeats + 1):
            for who, calls in (('ours', ours), ('diffusers', theirs)):
                seconds, outs[who] = timed(calls[what])
                times[who] += [seconds] if i else []
        a, b = (statistics.median(x) for x in times.values())
        far = (outs['ours'] - outs['diffusers']).abs().max().item()
        print(f'  {name:34} ours {a:8.3f} s, diffusers {b:8.3f} s: {b / a:.2f} x (difference {far:.1e})', flush=True)
    for what in ('sample', 'train'):
        mb = [float(subprocess.run([sys.executable, __file__, *sys.argv[1:], f'--only={who}-{what}'], check=True,
                                   capture_output=True, text=True).stdout) for who in ('ours', 'theirs')]
        print(f'  peak memory, {what:21} ours {mb[0]:8.1f} MB, diffusers {mb[1]:8.1f} MB: {mb[0] / mb[1]:.2f}',
              flush=True)


def resident(key):
    """MB that this process has (VmRSS) or had at most (VmHWM; getrusage's begins with what the parent had)."""
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) / 2 ** 10


def peak(who, what):
    """MB of the peak of one call, the second, weights included."""
    calls, count = models(who)
    if device != 'cpu':
        calls[what]()
        torch.cuda.reset_peak_memory_stats()
        calls[what]()
        return torch.cuda.max_memory_allocated() / 2 ** 20
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')                            # VmHWM begins anew
    before = resident('VmRSS')
    calls[what]()
    calls[what]()
    return resident('VmHWM') - before + 4 * count / 2 ** 20


if __name__ == '__main__':
    print(peak(*only.split('-'))) if only else main()
