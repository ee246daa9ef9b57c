"""What a run says of itself: log.jsonl, loss.png, the machine it ran on and what that machine could do."""
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time

import numpy as np
import torch


def cut_log(path, step):
    """Drop the rows of steps that the resumed run takes again, and a last row that was cut short."""
    rows = []
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            for line in f:
                if line.endswith('\n') and json.loads(line)['step'] <= step:
                    rows.append(line)
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(rows)
    os.replace(path + '.tmp', path)


def plot(out_dir, val):
    """out_dir/loss.png from log.jsonl, while it grows."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as f:
        rows = [json.loads(line) for line in f if line.endswith('\n')]
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    for label in ['train', *val]:
        points = [(r['step'], r['val_loss' if 'val' in r else 'loss']) for r in rows if r.get('val', 'train') == label]
        if points:
            axes.plot(*zip(*points), label=label, linewidth=1, marker='o' if label != 'train' else None, markersize=3)
    axes.set(xlabel='step', ylabel='loss (nats a target)', ylim=(0, None), title=os.path.basename(out_dir))
    if axes.lines:
        axes.legend()
    figure.savefig(os.path.join(out_dir, 'loss.png'), dpi=120)
    plt.close(figure)


def environment(device, world):
    """What a result may depend on besides the settings: versions, machine, and the state of the code."""
    def git(*args):
        here = os.path.dirname(os.path.abspath(__file__))
        done = subprocess.run(['git', *args], cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ''
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, device=device,
                world=world, machine=platform.platform(), argv=sys.argv, git=git('rev-parse', 'HEAD'),
                diff=git('diff', 'HEAD', '--', '*.py'))


def peak_flops(device, dtype, world):
    """Of all devices of the run: from a table for GPUs (dense, bf16 or TF32-free fp32), measured on a CPU."""
    if device != 'cpu':
        name = torch.cuda.get_device_name(device)
        known = {'H200': (989e12, 67e12), 'H100': (989e12, 67e12), 'A100': (312e12, 19.5e12), 'L4': (121e12, 30e12),
                 '4090': (165e12, 83e12)}
        return world * next((v[dtype == 'float32'] for k, v in known.items() if k in name), math.inf)
    a = torch.randn(1024, 1024, dtype=getattr(torch, dtype))
    times = []
    for _ in range(5):
        t = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - t)
    return world * 2 * 1024 ** 3 / min(times)


def memory_gb(device):
    """The most memory held so far, by the GPU's allocator or by this process."""
    if device != 'cpu':
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    unit = 1 if sys.platform == 'darwin' else 1024      # macOS counts bytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
