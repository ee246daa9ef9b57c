"""What Stable Diffusion costs: OMP_NUM_THREADS=1 python bench/sd.py [--rows=32]

Our U-Net beside diffusers' UNet2DConditionModel of the same settings and weights, in one process
with the same threads; medians of calls that take turns (on a CPU of its seconds, not of the
clock's). A DDIM sample with guidance, text encoded before, and a training step (epsilon, fused
AdamW). Then the peak memory of each, in processes of their own: weights, and what a process holds
at most beyond what it held before the call. --channels='(160, 320, 640, 640)' makes it larger;
--device=cuda --dtype=bfloat16 for a GPU.
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
from families import diffusers  # noqa: E402
from images.dit import DiTConfig  # noqa: E402
from images.sd import UNet2DCondition, UNetConfig, build, schedule_of  # noqa: E402
from images.vae import AutoencoderKL, VAEConfig  # noqa: E402

rows = 32                       # of a latent: pictures have 8 times as many
channels = (96, 192, 384, 384)  # Stable Diffusion: (320, 640, 1280, 1280)
head_dim = 48                   # of the first level, twice as much of the others (40 in SD)
context = 768
pictures = 1                    # sampled at once
steps = 4
batch_size = 2                  # of a training step
repeats = 7                     # of each, after 1 that warms up
device = 'cpu'
dtype = 'float32'
only = ''                       # of a process that measures memory: ours-sample, theirs-train ...
configure(globals())
autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != 'float32')
GUIDANCE = 7.5


class Text(torch.nn.Module):
    """Sentences that are encoded already: tokens are rows of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, tokens, segments):
        return self.table[tokens[:, 0]]


def unet_config():
    """Stable Diffusion's four levels, of which the last has no cross-attention."""
    num_heads = []
    for level, width in enumerate(channels):
        num_heads.append(width // (head_dim * 2 ** min(level, 2)) or 1)
    cross_attention = (True,) * (len(channels) - 1) + (False,)
    return UNetConfig(
        block_out_channels=channels, num_heads=tuple(num_heads), cross_attention_dim=context,
        cross_attention=cross_attention)


def models(which):
    """The calls {sample, train} of `which`, ours or theirs, and the number of its parameters."""
    # The same seed, so that both get the same weights, sentences (two of them to sample: without
    # words and with), latents and noise.
    torch.manual_seed(0)
    config = unet_config()
    table = torch.randn(batch_size + 2, 77, context, device=device)
    latents = torch.randn(batch_size, 4, rows, rows, device=device)
    noise = torch.randn_like(latents)
    t = torch.randint(0, 1000, (batch_size,), device=device)
    unet = UNet2DCondition(config)
    make = our_calls if which == 'ours' else their_calls
    module, sample, mean_loss = make(config, unet, table, latents, noise, t)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True)

    def train():
        with autocast:
            loss = mean_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def draw():
        with autocast:
            return sample()
    return dict(sample=draw, train=train), sum(p.numel() for p in module.parameters())


def our_calls(config, unet, table, latents, noise, t):
    """(the U-Net, a sample, a mean loss) as train.py and sample.py call them."""
    # An autoencoder that is small, as latents come out.
    small = VAEConfig(block_out_channels=(32,) * 4, norm_num_groups=32)
    dit = DiTConfig(image_size=rows, drop=0.0)
    model = build(dit, unet, Text(table), AutoencoderKL(small), [0] * 77)
    model.vae = None
    # As train.py and families/diffusers.py have it.
    model.to(device, memory_format=torch.channels_last)

    # Text looks at the first token alone. Token 1 is the sentence with words, 0 that without.
    told = torch.ones(pictures, 77, dtype=torch.long, device=device)
    tokens = torch.arange(2, batch_size + 2, device=device)[:, None].expand(-1, 77)
    start = noise[:1].expand(pictures, -1, -1, -1)
    given = dict(tokens=tokens, segments=torch.ones_like(tokens), pixels=latents,
                 rows=torch.arange(batch_size, device=device), noise=noise, time=t)

    def sample():
        return model.sample(told, noise=start, steps=steps, guidance=GUIDANCE)

    def mean_loss():
        loss, count = model.loss(**given)
        return loss / count
    return unet, sample, mean_loss


def their_calls(config, unet, table, latents, noise, t):
    """(the U-Net, a sample, a mean loss) of diffusers, with the weights of `unet`."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    theirs = UNet2DConditionModel(**diffusers.their_config(config, 'unet'))
    theirs.load_state_dict(unet.state_dict())
    theirs.to(device)
    ddim = DDIMScheduler(
        1000, config.beta_start, config.beta_end, config.beta_schedule, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1)
    schedule = schedule_of(config)

    # As StableDiffusionPipeline does it.
    @torch.no_grad()
    def sample():
        x = noise[:1].expand(pictures, -1, -1, -1)
        sentences = table[:2].repeat_interleave(pictures, 0)
        ddim.set_timesteps(steps)
        for t in ddim.timesteps:
            untold, told = theirs(torch.cat((x, x)), t, sentences).sample.chunk(2)
            x = ddim.step(untold + GUIDANCE * (told - untold), t, x).prev_sample
        return x

    def mean_loss():
        output = theirs(schedule.add_noise(latents, noise, t), t, table[2:]).sample
        return F.mse_loss(output.float(), noise)
    return theirs, sample, mean_loss


def timed(call):
    """Seconds of a call, and what it gave."""
    # Seconds of the CPU hardly depend on what else runs there; a GPU is waited for.
    clock = time.process_time if device == 'cpu' else time.perf_counter
    began = clock()
    out = call()
    if device != 'cpu':
        torch.cuda.synchronize()
    return clock() - began, out


def compare_times():
    """Print the medians of calls that take turns, and how far apart their outputs are."""
    ours, count = models('ours')
    theirs, _ = models('theirs')
    print(f'{count / 1e6:.1f} M parameters, latents of {rows} rows, {device} {dtype}', flush=True)
    names = {'sample': f'{pictures} pictures, {steps} steps, guidance',
             'train': f'a training step of {batch_size}'}
    for what, name in names.items():
        our_times, their_times = [], []
        for i in range(repeats + 1):
            our_seconds, our_output = timed(ours[what])
            their_seconds, their_output = timed(theirs[what])
            if i > 0:
                our_times.append(our_seconds)
                their_times.append(their_seconds)

        a, b = statistics.median(our_times), statistics.median(their_times)
        far = (our_output - their_output).abs().max().item()
        print(f'  {name:34} ours {a:8.3f} s, diffusers {b:8.3f} s: {b / a:.2f} x '
              f'(difference {far:.1e})', flush=True)


def compare_memory():
    """Print the peak memory of each call, of a process of its own."""
    for what in ('sample', 'train'):
        mb = []
        for who in ('ours', 'theirs'):
            command = [sys.executable, __file__, *sys.argv[1:], f'--only={who}-{what}']
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            mb.append(float(done.stdout))
        a, b = mb
        print(f'  peak memory, {what:21} ours {a:8.1f} MB, diffusers {b:8.1f} MB: {a / b:.2f}',
              flush=True)


def resident(key):
    """MB that this process has (VmRSS) or had at most (VmHWM)."""
    # Not getrusage's, which begins with what the parent had.
    with open('/proc/self/status') as f:
        for line in f:
            if line.startswith(key):
                return int(line.split()[1]) / 2 ** 10
    raise ValueError(f'no {key} in /proc/self/status')


def peak(who, what):
    """MB of the peak of one call, the second, weights included."""
    calls, count = models(who)
    if device != 'cpu':
        calls[what]()
        torch.cuda.reset_peak_memory_stats()
        calls[what]()
        return torch.cuda.max_memory_allocated() / 2 ** 20

    # VmHWM begins anew. The weights were there before.
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')
    before = resident('VmRSS')
    calls[what]()
    calls[what]()
    return resident('VmHWM') - before + 4 * count / 2 ** 20


if __name__ == '__main__':
    if only:
        print(peak(*only.split('-')))
    else:
        compare_times()
        compare_memory()
