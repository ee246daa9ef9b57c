"""What a run says of itself: log.jsonl, loss.png, the machine and what that machine could do."""
import json
import math
import os
import platform
import resource
import subprocess
import sys

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode


def plot(out_dir, val):
    """out_dir/loss.png from log.jsonl, while it grows."""
    import matplotlib
    # The one way to draw that needs no screen.
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    # A line without an end is still being written.
    with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as f:
        rows = [json.loads(line) for line in f if line.endswith('\n')]

    # Rows of validation name their data set. They are few, so that each point gets a mark.
    # Nothing, and no label, is drawn where there are none.
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    curves = [(None, 'train', 'loss', ''), *((name, name, 'val_loss', 'o') for name in val)]
    for data_set, label, key, marker in curves:
        # A loss that was not finite is no point.
        points = [(row['step'], row[key]) for row in rows
                  if row.get('val') == data_set and row[key] is not None]
        if points:
            axes.plot(*zip(*points), label=label, linewidth=1, marker=marker, markersize=3)

    title = os.path.basename(out_dir)
    axes.set(xlabel='step', ylabel='loss (nats a target)', ylim=(0, None), title=title)
    if axes.lines:
        axes.legend()
    figure.savefig(os.path.join(out_dir, 'loss.png'), dpi=120)
    # pyplot would keep every figure of the run.
    plt.close(figure)


def environment(device, world):
    """What a result may depend on besides the settings: versions, machine, state of the code."""
    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        device=device,
        world=world,
        machine=platform.platform(),
        argv=sys.argv,
        git=git('rev-parse', 'HEAD'),
        diff=git('diff', 'HEAD', '--', '*.py'),
    )


def git(*args):
    """What git says of the folder of this file; '' where that is no repository, or no git is."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        # Of a file that is no UTF-8, too. rev-parse prints its argument where it can not resolve
        # it, and fails.
        return subprocess.run(['git', *args], cwd=folder, capture_output=True, text=True,
                              errors='replace', check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ''


def peak_flops(device, dtype, world):
    """Operations a second of all GPUs of the run; None where that is not known. A CPU's peak is
    not known: a product of matrices that is timed here is passed by a faster one."""
    if device == 'cpu':
        return None
    from logs_more import peak_of_gpu
    peak = peak_of_gpu(torch.cuda.get_device_name(device), dtype)
    return peak and world * peak


def memory_gb(device):
    """The most memory held so far, by the GPU's allocator or by this process."""
    if device != 'cpu':
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == 'darwin' else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def append(path, row):
    """A row at the end of log.jsonl; JSON has no word for a number that is not finite but null.
    Raises OSError."""
    row = {key: None if isinstance(value, float) and not math.isfinite(value) else value
           for key, value in row.items()}
    with open(path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(row) + '\n')


def line_of(row):
    """A row of validation, for people."""
    parts = []
    for key, value in row.items():
        if key != 'step':
            parts.append(f'{key} {value:.4f}' if isinstance(value, float) else f'{key} {value}')
    return f'step {row["step"]}: {", ".join(parts)}'


def tokens_of(batches, number):
    """How many tokens batches hold of each of so many data sets: a list."""
    if number == 1:
        return [sum(batch['num_tokens'] for batch in batches)]
    from logs_more import tokens_by_set
    return tokens_by_set(batches, number)


def of_kinds(name, kinds, sums, counts):
    """What a row holds of each kind of target that was met, where there are several."""
    if len(kinds) == 1:
        return {}
    each = zip(kinds, sums, counts)
    return {f'{name}/{kind}': float(loss / count) for kind, loss, count in each if count}


def speed(since, world, sample_flops, peak):
    """What a row says of time. since: steps, samples, tokens, seconds of reading, of all that went
    into it, of validation and saving; sample_flops: floating point operations of a sample; peak:
    how many a second all devices can do, or None, and the row has no mfu (the share of it that was
    used)."""
    seconds, n = since['seconds'], since['steps']
    samples, tokens = since['samples'] / seconds, since['tokens'] / seconds
    row = dict(samples_per_sec=round(samples, 2), tokens_per_sec=round(tokens, 1),
               samples_per_sec_per_gpu=round(samples / world, 2),
               tokens_per_sec_per_gpu=round(tokens / world, 1),
               data_time=round(since['data'] / n, 5), step_time=round(seconds / n, 5),
               val_time=round(since['val'], 3), save_time=round(since['save'], 3))
    if peak:
        row['mfu'] = round(sample_flops * samples / peak, 4)
    return row


def count_flops(model, inputs):
    """Floating point operations of a forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()
