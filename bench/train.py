"""What a training step costs: python bench/train.py [--nanogpt=path/to/nanoGPT]

1. A step of our Decoder beside a step of nanoGPT's model at equal shape: width, depth, heads,
   context, vocabulary and parameters in matrices (its MLP has two of 4 widths, ours three of 8/3),
   same batch, each with the AdamW that it uses itself and clipping, eager and compiled. Ours with
   SiLU (Llama) and with tanh's GELU (Gemma), nanoGPT's own is the exact GELU: on a CPU tanh takes
   four times as long as the others. Medians of steps that take turns, on the wall's clock and, for
   a machine that others use, in CPU time. Needs a clone of github.com/karpathy/nanoGPT.
2. What train.py does around forward, backward and optimizer, as a share of a step of about 0.3 s.
3. How long a checkpoint of 100 M parameters stops the loop.
"""
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import checkpoint  # noqa: E402
from configurator import configure  # noqa: E402
from model import Decoder, DecoderBlock, DecoderConfig  # noqa: E402

nanogpt = ''                    # a clone of nanoGPT (empty: without that part)
width = 384                     # of both models, as the four that follow
depth = 6
num_heads = 6
seq_len = 256
vocab_size = 4096
batch_size = 8
steps = 15                      # of each, after 3 that warm up
configure(globals())
# A multiple of 64 near 8/3 widths, of which three are as many parameters as two of 4 widths.
mlp_dim = round(8 / 3 * width / 64) * 64


def step_of(model, optimizer, mean_loss):
    """A training step, tokens and targets (B, T) -> the loss; and the model's parameters."""
    def step(tokens, targets):
        loss = mean_loss(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Both wait for the loss, as a loop that logs it does.
        return loss.item()
    return step, sum(p.numel() for p in model.parameters())


def our_step(compiled, activation='gelu'):
    # As many heads for keys and values as for queries: nanoGPT has no other.
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(
        vocab_size, width, depth, mlp_dim, num_heads, num_heads, width // num_heads, activation))

    # Block by block, as train.py does.
    if compiled:
        for module in model.modules():
            if isinstance(module, DecoderBlock):
                module.forward = torch.compile(module.forward)

    def mean_loss(tokens, targets):
        loss, count = model.loss(tokens, targets)
        return loss / count
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    return step_of(model, optimizer, mean_loss)


def their_step(compiled):
    # Its folder is no package, and has a train.py of its own.
    path = os.path.join(nanogpt, 'model.py')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up there.
    sys.modules['nanogpt_model'] = module
    spec.loader.exec_module(module)

    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(
        block_size=seq_len, vocab_size=vocab_size, n_layer=depth, n_head=num_heads, n_embd=width,
        dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    forward = torch.compile(model) if compiled else model
    return step_of(model, optimizer, lambda tokens, targets: forward(tokens, targets)[1])


def random_batch(vocabulary):
    """Tokens and targets (B, T)."""
    tokens = torch.randint(0, vocabulary, (batch_size, seq_len + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def side_by_side():
    tokens, targets = random_batch(vocab_size)
    for compiled in (False, True):
        calls = {
            'ours, SiLU': our_step(compiled, 'silu'),
            'ours, GELU': our_step(compiled, 'gelu'),
            'nanoGPT': their_step(compiled),
        }
        wall_times = {name: [] for name in calls}
        cpu_times = {name: [] for name in calls}
        for i in range(steps + 3):
            for name, (step, _) in calls.items():
                wall, cpu = time.perf_counter(), time.process_time()
                step(tokens, targets)
                # The first three compile and fill caches.
                if i >= 3:
                    wall_times[name].append(1e3 * (time.perf_counter() - wall))
                    cpu_times[name].append(1e3 * (time.process_time() - cpu))

        mode = 'compiled' if compiled else 'eager'
        their_wall = statistics.median(wall_times['nanoGPT'])
        their_cpu = statistics.median(cpu_times['nanoGPT'])
        for name, (_, size) in calls.items():
            wall, cpu = statistics.median(wall_times[name]), statistics.median(cpu_times[name])
            print(f'{mode:10} {name:10} {size / 1e6:.2f} M parameters: '
                  f'{wall:7.1f} ms a step ({cpu:7.1f} of CPU), {their_wall / wall:.2f} '
                  f'({their_cpu / cpu:.2f}) x as fast as nanoGPT', flush=True)


def write_tokens(folder):
    """A data set of one shard of random tokens."""
    # 512 rows: more than 40 steps of 8 take.
    import numpy as np
    import webdataset
    with webdataset.TarWriter(f'{folder}/00000000.tar', encoder=False) as tar:
        ids = np.random.default_rng(0).integers(0, 256, (512, seq_len + 1)).astype(np.uint16)
        tar.write({'__key__': '0', 'tokens.bin': ids.tobytes()})
    with open(f'{folder}/manifest.jsonl', 'w') as f:
        row = {'shard': '00000000', 'num_sequences': 512, 'sequence_length': seq_len + 1}
        json.dump(row, f)


def flags_of(folder):
    """Flags of train.py for the model and the batch of `our_step`."""
    settings = dict(
        task='llm', mix=json.dumps({folder: 1.0}), seq_len=seq_len, batch_size=batch_size,
        max_steps=40, log_every=20, out_dir=f'{folder}/run', workers=2)
    shape = dict(
        width=width, depth=depth, num_heads=num_heads, num_kv_heads=num_heads,
        vocab_size=vocab_size, head_dim=width // num_heads, mlp_dim=mlp_dim)
    flags = [f'--{key}={value}' for key, value in settings.items()]
    return flags + [f'--decoder.{key}={value}' for key, value in shape.items()]


def around():
    """Of a run of train.py on tokens: what is not forward, backward or optimizer, by its own
    clock."""
    # With as many threads as this process has.
    script = os.path.join(os.path.dirname(HERE), 'train.py')
    environment = os.environ | {'OMP_NUM_THREADS': str(torch.get_num_threads())}
    step, _ = our_step(compiled=False)
    tokens, targets = random_batch(256)

    with tempfile.TemporaryDirectory() as folder:
        write_tokens(folder)
        command = [sys.executable, script, *flags_of(folder), '--resume=auto']
        alone, whole = [], []
        for _ in range(3):
            # The step by itself, then the run, so that what else runs meets both.
            times = []
            for _ in range(20):
                began = time.perf_counter()
                step(tokens, targets)
                times.append(time.perf_counter() - began)
            alone.append(statistics.median(times))

            # The last row: the first has what only the first steps cost.
            subprocess.run(command, check=True, capture_output=True, env=environment)
            with open(f'{folder}/run/log.jsonl') as f:
                *_, last = f
            whole.append(json.loads(last)['step_time'])
            shutil.rmtree(f'{folder}/run')

    a, b = statistics.median(alone), statistics.median(whole)
    share = 100 * (b / a - 1)
    print(f'a step alone {1e3 * a:.1f} ms, in train.py {1e3 * b:.1f} ms: {share:+.1f} %',
          flush=True)


def saves():
    """Seconds that a checkpoint of 100 M parameters, with AdamW's state, stops the loop, and that
    it takes in all."""
    # 400 MB of weights, twice as much of state.
    tensors, state = {}, {}
    for i in range(100):
        tensors[f'{i}'] = torch.randn(1000, 1000)
        for key in ('exp_avg', 'exp_avg_sq'):
            state[f'{i}.{key}'] = torch.randn(1000, 1000)

    # The first is slower: pages of the copy that is written are new.
    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoint.Saver(folder)
        for step in range(1, 4):
            began = time.perf_counter()
            saver.save(step, tensors, {}, state, {'progress.json': {}}, {})
            stopped = time.perf_counter() - began
            saver.wait()
            seconds = time.perf_counter() - began
            print(f'100 M parameters: stopped for {stopped:.2f} s of {seconds:.2f} s', flush=True)


if __name__ == '__main__':
    saves()
    around()
    if nanogpt:
        side_by_side()
