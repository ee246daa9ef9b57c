"""A step of LoRA beside one of full fine-tuning: SmolLM2-135M's shape, random weights.

    python bench/lora.py [--steps=10] [--rank=8]

Times are medians of steps taken in turns in one process; memory is the most that a process of its
own held in three steps, less what it held before there was a model.
"""
import os
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import lora
from configurator import configure
from model import Decoder, DecoderConfig

batch_size, seq_len = 2, 128
steps = 10
rank = 8
rules = []                  # as `lora` has them; empty: every matrix of the blocks, of this rank

configure(globals())

SHAPE = DecoderConfig(
    vocab_size=49152, width=576, depth=30, mlp_dim=1536, num_heads=9, num_kv_heads=3, head_dim=64,
    activation='silu', embed_scale=1.0, norm_offset=0.0, norm_eps=1e-5, rope_theta=100000.0)


def step_of(has_factors):
    """A function that takes one step as train.py does."""
    torch.manual_seed(0)
    model = Decoder(SHAPE)
    if has_factors:
        settings = dict(lora=rules or [('blocks', rank)], lora_alpha=16.0, lora_dropout=0.0,
                        groups=[])
        print(lora.add(model, settings), flush=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = torch.randint(0, SHAPE.vocab_size, (batch_size, seq_len))

    def step():
        loss, count = model.loss(tokens, tokens)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_of(has_factors):
    """MB of three steps, in a process of their own."""
    reader, writer = os.pipe()
    if not os.fork():
        before = megabytes()
        step = step_of(has_factors)
        for _ in range(3):
            step()
        os.write(writer, str(megabytes() - before).encode())
        os._exit(0)
    os.wait()
    return float(os.read(reader, 100))


if __name__ == '__main__':
    # before this process has threads, which no child would have
    memory = [memory_of(has_factors) for has_factors in (False, True)]
    calls, times = [step_of(False), step_of(True)], ([], [])
    for number in range(steps + 2):
        for call, found in zip(calls, times):
            began = time.perf_counter()
            call()
            # the first two fill caches
            if number >= 2:
                found.append(time.perf_counter() - began)
    full, factors = (statistics.median(found) for found in times)
    print(f'a step of {batch_size} x {seq_len} tokens: full {1e3 * full:.0f} ms, LoRA '
          f'{1e3 * factors:.0f} ms: {factors / full:.2f} of the time')
    print(f'memory: full {memory[0]:.0f} MB, LoRA {memory[1]:.0f} MB: '
          f'{memory[1] / memory[0]:.2f} of the memory')
