"""What a training step costs: python bench/train.py [--nanogpt=path/to/nanoGPT]

1. A step of our Decoder beside a step of nanoGPT's model at equal shape: width, depth, heads, context, vocabulary and
   parameters in matrices (its MLP has two of 4 widths, ours three of 8/3), same batch, each with the AdamW that it
   uses itself and clipping, eager and compiled. Ours with SiLU (Llama) and with tanh's GELU (Gemma), nanoGPT's own is
   the exact GELU: on a CPU tanh takes four times as long as the others. Medians of steps that take turns, on the wall's
   clock and, for a machine that others use, in CPU time. Needs a clone of github.com/karpathy/nanoGPT.
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
width = 384
depth = 6
num_heads = 6
seq_len = 256
vocab_size = 4096
batch_size = 8
steps = 15                      # of each, after 3 that warm up
configure(globals())


def step_of(model, optimizer, mean_loss):
    """A training step, tokens and targets (B, T) -> the loss."""
    def step(tokens, targets):
        loss = mean_loss(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step, sum(p.numel() for p in model.parameters())


def our_step(compiled, activation='gelu'):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab_size, width, depth, round(8 / 3 * width / 64) * 64, num_heads, num_heads,
                                  width // num_heads, activation))
    for block in model.modules() if compiled else ():
        if isinstance(block, DecoderBlock):
            block.forward = torch.compile(block.forward)

    def mean_loss(tokens, targets):
        loss, count = model(tokens, targets)
        return loss / count
    return step_of(model, torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True), mean_loss)


def their_step(compiled):
    spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(nanogpt, 'model.py'))
    module = importlib.util.module_from_spec(spec)
    sys.modules['nanogpt_model'] = module       # its dataclass looks itself up there
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(block_size=seq_len, vocab_size=vocab_size, n_layer=depth, n_head=num_heads,
                                        n_embd=width, dropout=0.0, bias=False))
    run = torch.compile(model) if compiled else model
    return step_of(model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu'), lambda x, y: run(x, y)[1])


def side_by_side():
    tokens = torch.randint(0, vocab_size, (batch_size, seq_len + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    for compiled in (False, True):
        runs = {'ours, SiLU': our_step(compiled, 'silu'), 'ours, GELU': our_step(compiled, 'gelu'),
                'nanoGPT': their_step(compiled)}
        times = {name: [] for name in runs}
        for i in range(steps + 3):
            for name, (step, _) in runs.items():
                began = time.perf_counter(), time.process_time()
                step(x, y)
                if i >= 3:
                    times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
        medians = {name: [1e3 * statistics.median(t) for t in zip(*times[name])] for name in runs}
        wall, cpu = medians['nanoGPT']
        for name, (a, b) in medians.items():
            print(f'{"compiled" if compiled else "eager":10} {name:10} {runs[name][1] / 1e6:.2f} M parameters: '
                  f'{a:7.1f} ms a step ({b:7.1f} of CPU), {wall / a:.2f} ({cpu / b:.2f}) x as fast as nanoGPT',
                  flush=True)


def around():
    """Of a run of train.py on tokens: what is not forward, backward or optimizer, by its own clock."""
    import numpy as np
    import webdataset
    with tempfile.TemporaryDirectory() as folder:
        with webdataset.TarWriter(f'{folder}/00000000.tar', encoder=False) as tar:
            ids = np.random.default_rng(0).integers(0, 256, (512, seq_len + 1)).astype(np.uint16)
            tar.write({'__key__': '0', 'tokens.bin': ids.tobytes()})
        with open(f'{folder}/manifest.jsonl', 'w') as f:
            json.dump({'shard': '00000000', 'num_sequences': 512, 'sequence_length': seq_len + 1}, f)
        settings = dict(task='llm', mix={folder: 1.0}, seq_len=seq_len, batch_size=batch_size, max_steps=40,
                        log_every=20, out_dir=f'{folder}/run', workers=2)
        shape = dict(width=width, depth=depth, num_heads=num_heads, num_kv_heads=num_heads, vocab_size=vocab_size,
                     head_dim=width // num_heads, mlp_dim=round(8 / 3 * width / 64) * 64)
        flags = [f'--{k}={json.dumps(v) if isinstance(v, dict) else v}' for k, v in settings.items()]
        flags += [f'--decoder.{k}={v}' for k, v in shape.items()]
        alone, whole = [], []
        step, _ = our_step(False)
        tokens = torch.randint(0, 256, (batch_size, seq_len + 1))
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        for _ in range(3):
            times = []
            for _ in range(20):
                began = time.perf_counter()
                step(x, y)
                times.append(time.perf_counter() - began)
            alone.append(statistics.median(times))
            subprocess.run([sys.executable, os.path.join(os.path.dirname(HERE), 'train.py'), *flags, '--resume=auto'],
                           check=True, capture_output=True, env=os.environ | {'OMP_NUM_THREADS': str(
                               torch.get_num_threads())})
            with open(f'{folder}/run/log.jsonl') as f:
                whole.append([json.loads(line)['step_time'] for line in f][-1])
            shutil.rmtree(f'{folder}/run')
        a, b = statistics.median(alone), statistics.median(whole)
        print(f'a step alone {1e3 * a:.1f} ms, in train.py {1e3 * b:.1f} ms: {100 * (b / a - 1):+.1f} %', flush=True)


def saves():
    """Seconds that a checkpoint of 100 M parameters, with AdamW's state, stops the loop, and that it takes in all."""
    tensors = {f'{i}': torch.randn(1000, 1000) for i in range(100)}
    state = {f'{k}.{name}': torch.randn(1000, 1000) for k in tensors for name in ('exp_avg', 'exp_avg_sq')}
    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoint.Saver(folder, set())
        for step in range(1, 4):
            began = time.perf_counter()
            saver.save(step, tensors, {}, state, {'progress.json': {}}, {})
            stopped = time.perf_counter() - began
            saver.wait()
            print(f'100 M parameters: stopped for {stopped:.2f} s of {time.perf_counter() - began:.2f} s', flush=True)


if __name__ == '__main__':
    saves()
    around()
    if nanogpt:
        side_by_side()
