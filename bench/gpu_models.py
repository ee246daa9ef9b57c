"""Models by themselves on a GPU, a part of bench/gpu.py: python bench/gpu_models.py --part=decoder

decoder, paligemma    steps of training in bf16, eager and compiled: mfu, tokens a second
decode                tokens a second with the KV cache, beside what the memory's bandwidth allows
Weights are random. A row for each goes to out_dir/<part>.jsonl as soon as it is measured, with the
peak of memory (on a CPU: of the process so far) or with its error.
"""
import gc
import math
import os
import statistics
import sys
import time
from dataclasses import replace

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import logs  # noqa: E402
import parallel  # noqa: E402
from configurator import configure  # noqa: E402
from generate import generate  # noqa: E402
from model import VLM, Decoder, DecoderConfig, ViTConfig, VLMConfig  # noqa: E402

part = 'decoder'                # decoder | paligemma | decode
out_dir = 'out/gpu'
toy = not torch.cuda.is_available()     # tiny, on the CPU
configure(globals())

PATIENCE = 8.0                  # seconds after which no further call is timed

# Their shapes: huggingface.co/HuggingFaceTB/SmolLM2-135M, meta-llama/Llama-3.2-1B and
# google/paligemma-3b-pt-224.
SMOLLM2 = DecoderConfig(
    vocab_size=49152, width=576, depth=30, mlp_dim=1536, num_heads=9, num_kv_heads=3, head_dim=64,
    activation='silu', embed_scale=1.0, norm_offset=0.0, norm_eps=1e-5, rope_theta=100000.0)
LLAMA = replace(
    SMOLLM2, vocab_size=128256, width=2048, depth=16, mlp_dim=8192, num_heads=32, num_kv_heads=8,
    rope_theta=500000.0)
PALIGEMMA = VLMConfig(
    ViTConfig(224, 14, width=1152, depth=27, mlp_dim=4304, num_heads=16),
    DecoderConfig(257216, 2048, 18, 16384, num_heads=8, num_kv_heads=1, head_dim=256),
    image_token_id=257152)

# Rows of a batch and words of a row in training; words after a picture; words that are decoded,
# from a prompt of 16; bytes that are copied.
device, steps = 'cuda', 12
batches, length, caption, new_words, copied = (16, 8, 32), 2048, 128, 128, 2 ** 31
if toy:
    device, steps = 'cpu', 3
    batches, length, caption, new_words, copied = (2, 2, 2), 32, 16, 16, 2 ** 26
    SMOLLM2 = DecoderConfig(320, 32, 2, mlp_dim=64, num_heads=2, head_dim=16)
    LLAMA = replace(SMOLLM2, depth=3)
    vit = ViTConfig(32, 8, width=32, depth=2, mlp_dim=64, num_heads=2)
    PALIGEMMA = VLMConfig(vit, SMOLLM2, image_token_id=310)


def attempt(what, call, *args):
    """The row of call(*args), or of its error."""
    if device != 'cpu':
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        row = call(*args)
    except Exception as error:
        row = dict(error=f'{type(error).__name__}: {" ".join(str(error).split())[:300]}')
    add_row(what=what, **row, mem_gb=logs.memory_gb(device))


def add_row(**row):
    logs.append(f'{out_dir}/{part}.jsonl', row)
    print(row, flush=True)


def seconds_of(call, count, warm=3):
    """The median of `count` calls, or of as many as PATIENCE has, after some that warm up."""
    for _ in range(warm):
        call()
    times, started = [], time.perf_counter()
    while len(times) < count and time.perf_counter() - started < PATIENCE:
        began = time.perf_counter()
        call()
        # A GPU only takes note of what it is told; what was asked is over when it says so.
        if device != 'cpu':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def size_of(model):
    return sum(p.numel() for p in model.parameters())


def model_of(config):
    kind = VLM
    if isinstance(config, DecoderConfig):
        kind = Decoder
    torch.manual_seed(0)
    # Made where it will be: a CPU would draw random weights for a minute.
    with torch.device(device):
        return kind(config)


# -----------------------------------------------------------------------------------------------
# training


def batch_of(config, batch):
    """What forward gets: `batch` rows of random words, or of a picture and a caption."""
    if isinstance(config, DecoderConfig):
        row = torch.randint(0, config.vocab_size, (batch, length + 1), device=device)
        tokens, targets = row[:, :-1].contiguous(), row[:, 1:].contiguous()
        return dict(tokens=tokens, targets=targets, num_targets=targets.numel())

    # The picture and one word are seen, the words after them are learned.
    words = torch.randint(0, config.image_token_id, (batch, caption + 1), device=device)
    picture = words.new_full((batch, config.image_tokens), config.image_token_id)
    row = torch.cat((picture, words), 1)
    targets = row[:, 1:].clone()
    targets[:, :config.image_tokens] = -100
    pixels = torch.randn(batch, 3, config.vit.image_size, config.vit.image_size, device=device)
    return dict(tokens=row[:, :-1].contiguous(), targets=targets, pixels=pixels,
                num_targets=batch * caption)


def training(config, compiled, batch):
    """A row of one model's steps, as train.py takes them."""
    model, inputs = model_of(config), batch_of(config, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    autocast = torch.autocast(device, torch.bfloat16)
    losses = []

    # Before layers are compiled, whose operations are not counted; the backward pass has two of
    # three.
    with autocast:
        flops = 3 * logs.count_flops(model, inputs)
    if compiled:
        torch._dynamo.config.allow_unspec_int_on_nn_module = True
        for layer in parallel.layers_of(model):
            layer.forward = torch.compile(layer.forward)

    def step():
        with autocast:
            loss = model(**inputs)['text'].losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    seconds = seconds_of(step, steps)
    if not math.isfinite(losses[-1]):
        raise RuntimeError(f'the loss is {losses[-1]} after {len(losses)} steps')
    peak = logs.peak_flops(device, 'bfloat16', 1)
    return dict(
        parameters_m=round(size_of(model) / 1e6, 2), batch=batch, step_ms=round(1e3 * seconds, 2),
        tokens_per_sec=round(inputs['tokens'].numel() / seconds),
        tflops=round(flops / seconds / 1e12, 3), mfu=peak and round(flops / seconds / peak, 4))


def largest(config, compiled, batch):
    """The row of the largest batch that memory holds, halved from `batch` on."""
    while True:
        try:
            return training(config, compiled, batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        # Outside of the except, which holds the tensors of the step.
        gc.collect()
        torch.cuda.empty_cache()
        batch //= 2


def eager_and_compiled(what, config, batch):
    """Two rows."""
    attempt(f'{what}, eager', largest, config, False, batch)
    if toy:
        add_row(what=f'{what}, compiled', skipped='a CPU compiles for too long')
        return
    attempt(f'{what}, compiled', largest, config, True, batch)


def decoder():
    eager_and_compiled('SmolLM2 135M', SMOLLM2, batches[0])
    eager_and_compiled('Llama 3.2 1B', LLAMA, batches[1])


def paligemma():
    """With fewer layers on a card that does not hold the training of all of them: 16 bytes a
    parameter, and half as much again for what the backward pass needs."""
    config = PALIGEMMA
    while not toy:
        with torch.device('meta'):
            size = size_of(VLM(config))
        if 24 * size < torch.cuda.mem_get_info()[1] or config.decoder.depth < 3:
            break
        fewer = replace(config.vit, depth=config.vit.depth // 2)
        config = replace(
            config, vit=fewer, decoder=replace(config.decoder, depth=config.decoder.depth // 2))
    layers = f'{config.vit.depth} + {config.decoder.depth} layers'
    eager_and_compiled(f'PaliGemma, {layers}', config, batches[2])


# -----------------------------------------------------------------------------------------------
# decoding


def bandwidth():
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * copied / seconds_of(lambda: target.copy_(source), 20)


def decoding(config, batch, bytes_per_sec):
    """A row of greedy decoding in bf16. For a token of each row all weights come from memory once,
    however many rows there are: that is the bound. The prompt's pass counts as a token's."""
    model = model_of(config).to(torch.bfloat16)
    prompt = torch.randint(1, config.vocab_size, (batch, 16), device=device)
    seconds = seconds_of(lambda: generate(model, prompt, max_new_tokens=new_words), 2, 1)
    rate = batch * new_words / seconds
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    bound = batch * bytes_per_sec / weights
    return dict(
        batch=batch, tokens_per_sec=round(rate, 1), bound=round(bound, 1),
        share_of_bound=round(rate / bound, 4), weights_mb=round(weights / 1e6, 2))


def decode():
    bytes_per_sec = bandwidth()
    add_row(what='a copy', gb_per_sec=round(bytes_per_sec / 1e9, 1))
    for what, config in (('SmolLM2 135M', SMOLLM2), ('Llama 3.2 1B', LLAMA)):
        for batch in (1, 32):
            attempt(f'{what}, {batch} at once', decoding, config, batch, bytes_per_sec)


if __name__ == '__main__':
    os.makedirs(out_dir, exist_ok=True)
    measures = dict(decoder=decoder, paligemma=paligemma, decode=decode)
    if part not in measures:
        sys.exit(f'gpu_models.py: part={part!r}: expected one of {", ".join(measures)}')
    measures[part]()
