"""What few runs say of themselves: those that mix data sets, that stop, or have GPUs. logs.py and
train.py import this where it is needed.

Axes: B rows of a batch, T tokens of a row.
"""
import re

import numpy as np

# Operations a second of dense matrices in 16 bits, and in float32 without TensorFloat-32, by a
# part of the GPU's name (NVIDIA's data sheets).
PEAKS = {
    'H200': (989e12, 67e12),
    'H100': (989e12, 67e12),
    'A100': (312e12, 19.5e12),
    'L4': (121e12, 30e12),
    '4090': (165e12, 83e12),
}


# -----------------------------------------------------------------------------------------------
# each data set of a mix


def tokens_by_set(batches, number):
    """How many tokens collated batches hold of each of so many data sets: a list."""
    tokens = np.zeros(number, np.int64)
    for batch in batches:
        # padding is in no segment; of sequences it is the largest value of their type
        if 'ids' in batch:
            ids = np.asarray(batch['ids'])
            real = ids != np.iinfo(ids.dtype).max
        elif 'segments' in batch:
            real = np.asarray(batch['segments']) > 0
        else:
            real = np.ones(np.shape(batch['tokens']), bool)

        # packed rows are of several data sets
        parts = np.asarray(batch['parts'])
        if parts.shape[1] == 1:
            tokens += np.bincount(parts[:, 0], real.sum(1), number).astype(np.int64)
        else:
            tokens += np.bincount(parts[real], minlength=number)
    return tokens.tolist()


def row_of_sets(names, order, position, tokens, by_set, total):
    """What a row holds of each data set after so many samples of the run. tokens: {name: since the
    run began}; by_set: (kinds, 2, data sets), losses and counts of the last step; total: of the
    losses and counts of all kinds, what is learned."""
    row = {}
    for number, name in enumerate(names):
        samples = order.before(position, number)
        row[f'samples/{name}'], row[f'tokens/{name}'] = samples, tokens[name]
        row[f'epoch/{name}'] = round(samples / max(order.samples[number], 1), 4)
        # one that was not met just now has no loss
        losses, counts = by_set[:, :, number].T
        if counts.any():
            row[f'loss/{name}'] = float(total(losses, counts))
    return row


# -----------------------------------------------------------------------------------------------
# a run that stops


def why_stopped(step, learned, bad, num_bad, seen, settings):
    """Why a run ends at a step that has nothing to learn, or with too many bad samples. bad: the
    lines of those of this step and rank; num_bad, seen: samples of the whole run."""
    if not any(learned):
        reason = (bad or [f'is seq_len={settings["seq_len"]} too short?'])[0]
        return f'no sample of step {step} has anything to learn: {reason}'
    last = (bad or ['named above'])[-1]
    return (f'{num_bad} bad samples of {seen} are over max_bad_fraction='
            f'{settings["max_bad_fraction"]}: mend what the last one says, or raise the bound: '
            f'{last}')


def not_finite(step, loss, grad_norm, out_dir):
    """What is said of a step whose loss or gradient is not finite."""
    return (f'step {step}: loss {loss}, gradient norm {grad_norm}. Its samples: python data.py '
            f'{out_dir}/config.json --show_steps={step + 1}:{step + 2}')


# -----------------------------------------------------------------------------------------------
# GPUs


def peak_of_gpu(name, dtype):
    """Operations a second of the GPU called `name`; None for one that is not in the table."""
    for part, (bits_16, float32) in PEAKS.items():
        # Not an L40 for an L4, nor an A1000 for an A100.
        if re.search(rf'{part}(?!\d)', name):
            return float32 if dtype == 'float32' else bits_16
    return None
