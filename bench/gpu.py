"""A GPU in one command: python bench/gpu.py [--out_dir=out/gpu] [--minutes=8]

At most `minutes` on one card, so that the first card that is there tells everything:
tests                 pytest -m gpu
decoder, paligemma    bench/gpu_models.py: steps of training, eager and compiled, and their mfu
fp16                  train.py with dtype=float16, whose loss scale has to halve
fsdp                  train.py with FSDP2 on one rank with NCCL, beside a run without
decode                bench/gpu_models.py: decoding with the KV cache
loader                train.py on JPEGs: what it waits for data, beside the step
t2i, policy, vla      steps of train.py on made data
Every row has the peak of memory, and is in out_dir/gpu.json as soon as its part is over. What
fails is named with its error, and the rest goes on; a part that no longer fits is skipped. Without
a CUDA device (--toy=true) all is tiny and on the CPU: that shows that the bench works, its figures
say nothing.
"""
import contextlib
import glob
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import logs  # noqa: E402
from configurator import configure  # noqa: E402

out_dir = 'out/gpu'             # gpu.json, and a log of each command
minutes = 8.0                   # in all
parts = ''                      # some of those above, with commas between (empty: all)
toy = not torch.cuda.is_available()     # tiny, on the CPU
configure(globals())

GRACE = 5.0                     # seconds that a command gets to end in, when its time is over

# What the runs of train.py have in common: a base ViT, a third of SmolLM2's layers.
TEXT = dict(
    width=576, depth=10, mlp_dim=1536, num_heads=9, num_kv_heads=3, head_dim=64, activation='silu',
    embed_scale=1.0, norm_offset=0.0)
VIT = dict(image_size=224, patch_size=16, width=768, depth=12, mlp_dim=3072, num_heads=12)
DIT = dict(image_size=64, patch_size=4, width=768, depth=12, mlp_dim=3072, num_heads=12)
EXPERT = dict(width=512, mlp_dim=2048)
device, dtype, batch_size = 'auto', 'bfloat16', 64
workers = max(2, min(8, os.cpu_count() - 2))
words, photo = 512, 512         # of a row; pixels of a JPEG's side
# Workers read 4 batches each ahead: the loader's run has to be much longer than that.
steps, steps_of_loader = 30, 200
if toy:
    TEXT = dict(width=32, depth=2, mlp_dim=64, num_heads=2, head_dim=16)
    VIT = dict(image_size=32, patch_size=8, width=32, depth=2, mlp_dim=64, num_heads=2)
    DIT = dict(image_size=16, patch_size=8, width=32, depth=2, mlp_dim=64, num_heads=2)
    EXPERT = dict(width=32, mlp_dim=64)
    device, dtype, batch_size, workers = 'cpu', 'float32', 8, 2
    words, photo, steps, steps_of_loader = 32, 64, 12, 24


# -----------------------------------------------------------------------------------------------
# commands


def command(arguments, name, until):
    """Run it until that time at most. Raises RuntimeError and TimeoutError, with what its log says
    last."""
    # In a session of its own, so that what it starts ends with it.
    log = f'{out_dir}/{name}.log'
    with open(log, 'w', encoding='utf-8') as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(max(0.0, until - GRACE - time.perf_counter()))
    except subprocess.TimeoutExpired:
        raise TimeoutError(f'its time was over; {last_words(log)}') from None
    # Also where Ctrl-C ends this bench.
    finally:
        stop(process)
    if code != 0:
        raise RuntimeError(last_words(log))


def stop(process):
    """End a command and all that it started: as Ctrl-C does, then by force."""
    # train.py finishes its step and saves, pytest says what it has seen.
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)

    # What is left would go on beside the next part.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_words(log):
    """The line of a log that says what went wrong, else its last one."""
    with open(log, encoding='utf-8', errors='replace') as f:
        lines = [line.strip() for line in re.split('[\r\n]', f.read()) if line.strip()]

    # torchrun's own error only says that there was one.
    for line in reversed(lines):
        if re.search(r'Error\b|^train\.py:', line) and 'ChildFailedError' not in line:
            return line
    return (lines or ['it said nothing'])[-1]


def read_rows(path):
    """The rows of a file; one that was being written is left out."""
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8') as f:
        return [json.loads(line) for line in f if line.endswith('\n')]


def train(name, folder, until, *launcher, **settings):
    """log.jsonl of a run of train.py. Raises RuntimeError and TimeoutError."""
    run_dir = f'{folder}/{name}'
    everything = dict(
        out_dir=run_dir, data_dir=folder, cache_dir=f'{folder}/cache', resume='never',
        device=device, dtype=dtype, lanes=8, warmup=2, batch_size=batch_size, max_steps=steps,
        workers=workers) | settings
    # The last third is what counts: the first steps open shards and set up libraries.
    everything.setdefault('log_every', everything['max_steps'] // 3)

    # It fails by itself where a loss is not finite.
    flags = [f'--{key}={value}' for key, value in everything.items()]
    command([*launcher, f'{ROOT}/train.py', *flags], name, until)
    return read_rows(f'{run_dir}/log.jsonl')


def figures(rows):
    """What a row of this bench says of a run: its last steps, and how the loss went."""
    last = rows[-1]
    return dict(
        steps=last['step'], step_ms=round(1e3 * last['step_time'], 2),
        data_ms=round(1e3 * last['data_time'], 2), samples_per_sec=last['samples_per_sec'],
        mfu=last.get('mfu'), first_loss=round(rows[0]['loss'], 4), loss=round(last['loss'], 4),
        mem_gb=last['mem_gb'])


def dotted(**groups):
    """dotted(vit=dict(depth=12)) -> {'vit.depth': 12}."""
    flat = {}
    for name, group in groups.items():
        for key, value in group.items():
            flat[f'{name}.{key}'] = value
    return flat


# -----------------------------------------------------------------------------------------------
# data sets, made by the first part that needs them


def write(folder, name, samples, **row):
    """A data set of one shard with its manifest."""
    import webdataset
    # One that is there already would be another set of the same name.
    os.makedirs(f'{folder}/{name}')
    with webdataset.TarWriter(f'{folder}/{name}/00000000.tar', encoder=False) as tar:
        for i, members in enumerate(samples):
            tar.write({'__key__': f'{i:08d}', **members})
    row = dict(shard='00000000', num_sequences=len(samples)) | row
    logs.append(f'{folder}/{name}/manifest.jsonl', row)


def jpegs(size):
    """32 pictures as large in bytes as photographs: blurred colours and a little noise."""
    from PIL import Image
    rng, files = np.random.default_rng(0), []
    for _ in range(32):
        colours = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        blurred = np.asarray(colours.resize((size, size), Image.Resampling.BICUBIC))
        noisy = blurred + rng.integers(-8, 9, (size, size, 3))
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=90)
        files.append(file.getvalue())
    return files


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def tokens_set(folder):
    """512 rows of 64 of the words, so that a loss has something to fall by."""
    if os.path.exists(f'{folder}/tokens'):
        return
    ids = np.random.default_rng(0).integers(0, 64, (512, words + 1)).astype(np.uint16)
    rows = dict(num_sequences=512, sequence_length=words + 1)
    write(folder, 'tokens', [{'tokens.bin': ids.tobytes()}], **rows)


def captions_set(folder):
    """2048 pictures and captions."""
    if os.path.exists(f'{folder}/captions'):
        return
    # So few pictures, again and again: each is read and decoded anew.
    pictures = jpegs(photo)
    samples = [{'jpg': pictures[i % 32], 'txt': b'a caption'} for i in range(2048)]
    write(folder, 'captions', samples)


def robot_set(folder, action_steps, action_dim, proprio_dim):
    """A camera, states, chunks of actions; one sample in four has an answer in words, too."""
    from robots.actions import Statistics
    if os.path.exists(f'{folder}/robot'):
        return
    rng = np.random.default_rng(0)
    # Within -1 and 1, as most robots want them.
    chunks = rng.uniform(-1, 1, (256, action_steps, action_dim))
    states = rng.standard_normal((256, proprio_dim))

    pictures, samples = jpegs(photo), []
    for i, (chunk, state) in enumerate(zip(chunks, states)):
        meta = dict(instruction='open the drawer')
        if i % 4 == 1:
            meta['suffix'] = 'it is open'
        numbers = npz(actions=chunk, proprio=state, is_pad=np.zeros(action_steps, bool))
        samples.append({'near.jpg': pictures[i % 32], 'json': json.dumps(meta).encode(),
                        'lowdim.npz': numbers})
    write(folder, 'robot', samples)

    # As prepare/stats.py has it.
    stats = {}
    for key, numbers in dict(actions=chunks[:, 0], proprio=states).items():
        stats[key] = Statistics(numbers.shape[1]).update(numbers).to_dict()
    with open(f'{folder}/robot/stats.json', 'w', encoding='utf-8') as f:
        json.dump(stats, f)


# -----------------------------------------------------------------------------------------------
# parts: each gives rows, and is over by `until`


def run_tests(name, folder, until):
    """A row in all, and one of each test that failed."""
    # Only files that have some: the others' imports take longer than the tests. One that can not
    # be imported does not stop those of the others.
    files = []
    for path in sorted(glob.glob(f'{ROOT}/tests/test_*.py')):
        with open(path, encoding='utf-8') as f:
            if '@pytest.mark.gpu' in f.read():
                files.append(path)
    options = ['-q', '-m', 'gpu', '-p', 'no:cacheprovider', '--continue-on-collection-errors']

    # Not to be raised before its log was read.
    problem = None
    try:
        command(['-m', 'pytest', *options, *files], name, until)
    except (RuntimeError, TimeoutError) as error:
        problem = error

    # pytest's last line counts, and those before it name.
    with open(f'{out_dir}/{name}.log', encoding='utf-8') as f:
        lines = f.read().strip().splitlines() or ['it said nothing']
    for line in lines:
        if line.startswith(('FAILED ', 'ERROR ')):
            test, _, reason = line.partition(' - ')
            yield dict(what=test.partition(' ')[2], error=reason[:300] or 'no reason is given')
    row = dict(what='pytest -m gpu', said=lines[-1].strip('= '))
    if problem:
        row['error'] = one_line(problem)
    yield row


def measured(name, folder, until):
    """Rows of a process of its own, in which no error of CUDA reaches the other parts; those that
    it had when its time was over, too."""
    # An earlier bench may have left some.
    path = f'{out_dir}/{name}.jsonl'
    if os.path.exists(path):
        os.remove(path)
    flags = [f'--part={name}', f'--toy={toy}', f'--out_dir={out_dir}']
    try:
        command([f'{HERE}/gpu_models.py', *flags], name, until)
    finally:
        yield from read_rows(path)


def train_text(name, folder, until, *launcher, **settings):
    """A short run of task=llm, of which each step is logged."""
    tokens_set(folder)
    shape = dotted(decoder=TEXT)
    everything = dict(
        task='llm', mix={'tokens': 1.0}, seq_len=words, log_every=1, lr=3e-3, workers=0)
    return train(name, folder, until, *launcher, **everything | shape | settings)


def scaler(name, folder, until):
    """fp16 with a loss so large that gradients overflow at the first scale, 2^16."""
    # The mean over all words divides a gradient by their number, which this takes back.
    weight = 4.0 * batch_size * words
    rows = train_text(name, folder, until, dtype='float16', loss_weights={'tokens': weight})

    # It halves once a step, until a step is taken.
    scales = [row['loss_scale'] for row in rows]
    if not scales[-1] == scales[-3] < 2 ** 16:
        raise RuntimeError(f'the loss scale went from 65536 through {scales}: expected it to '
                           'halve, and then to stay')
    if rows[-1]['loss'] >= rows[0]['loss']:
        raise RuntimeError(f'the loss went from {rows[0]["loss"]} to {rows[-1]["loss"]}')
    yield dict(what='train.py, fp16', loss_scale=scales[-1], **figures(rows))


def sharded(name, folder, until):
    """One rank that shards by FSDP2 learns what a process without ranks does."""
    # The same positions, weights and seed. In bf16 sums of another order may differ a little.
    alone = train_text(f'{name}-alone', folder, until)
    yield dict(what='train.py, one process', **figures(alone))
    launcher = '-m', 'torch.distributed.run', '--nproc_per_node=1', '--standalone'
    rows = train_text(name, folder, until, *launcher, fsdp=0)
    differences = [abs(a['loss'] - b['loss']) for a, b in zip(alone, rows)]
    yield dict(what='train.py, FSDP2 on one rank', **figures(rows),
               largest_difference=round(max(differences), 6))


def patches():
    return (VIT['image_size'] // VIT['patch_size']) ** 2


def loader(name, folder, until):
    """Workers read and decode JPEGs beside the step."""
    captions_set(folder)
    rows = train(
        name, folder, until, task='vlm', mix={'captions': 1.0}, seq_len=patches() + 32,
        max_steps=steps_of_loader, **dotted(vit=VIT, decoder=TEXT))

    # Of a step's time, in which nothing is computed.
    share = rows[-1]['data_time'] / rows[-1]['step_time']
    yield dict(what=f'train.py, {workers} workers', share_of_waiting=round(share, 4),
               **figures(rows))


def text_to_image(name, folder, until):
    captions_set(folder)
    shape = dotted(dit=DIT, decoder=TEXT)
    rows = train(name, folder, until, task='t2i', mix={'captions': 1.0}, seq_len=32, **shape)
    yield dict(what='train.py', **figures(rows))


def robots(name, folder, until):
    """A policy that sees by a vision-language model, or a VLA."""
    sizes = dict(action_steps=8, action_dim=7, proprio_dim=16)
    robot_set(folder, **sizes)
    shape = dotted(vit=VIT, decoder=TEXT) | dotted(**{name: EXPERT})
    if name == 'policy':
        shape |= dotted(policy=dict(encoder='vlm', denoiser='transformer', num_heads=4))
    rows = train(
        name, folder, until, task=name, mix={'robot': 1.0}, seq_len=patches() + 48, **sizes,
        **shape)
    yield dict(what='train.py', **figures(rows))


# In this order, each in so many seconds at most. Most should take half of them.
PARTS = {
    'tests': (run_tests, 110), 'decoder': (measured, 110), 'paligemma': (measured, 80),
    'fp16': (scaler, 35), 'fsdp': (sharded, 50), 'decode': (measured, 40), 'loader': (loader, 40),
    't2i': (text_to_image, 30), 'policy': (robots, 30), 'vla': (robots, 30),
}
NEED_CUDA = 'tests', 'fsdp'


def rows_of(name, folder, deadline):
    """The rows of a part; what goes wrong is one, and so is what does not fit any more."""
    part, seconds = PARTS[name]
    now = time.perf_counter()
    left = max(0.0, deadline - now)
    if toy and name in NEED_CUDA:
        yield dict(what='', skipped='it needs a CUDA device')
        return
    if left < seconds / 2:
        yield dict(what='', skipped=f'it may take {seconds} s, and {left:.0f} s are left')
        return

    # A CPU that others use, too, may take as long as there is.
    until = deadline
    if not toy:
        until = min(deadline, now + seconds)
    try:
        yield from part(name, folder, until)
    except Exception as error:
        yield dict(what='', error=one_line(error))


def one_line(error):
    return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def show(row):
    """A line of the table."""
    said = dict(row)
    begin = f'{said.pop("part"):10} {said.pop("what"):34}'
    print(begin, ', '.join(f'{key} {value}' for key, value in said.items()), flush=True)


def main():
    """The exit code: 1 if anything failed."""
    # 10 seconds are for the import of torch, which was before, and for the end of a last command.
    began = time.perf_counter()
    deadline = began + 60 * minutes - 10
    names = list(PARTS)
    if parts:
        names = parts.split(',')
    if not set(names) <= set(PARTS):
        print(f'gpu.py: parts={parts}: expected some of {",".join(PARTS)}', file=sys.stderr)
        return 2
    os.makedirs(out_dir, exist_ok=True)

    # The state of the code and versions, beside the rows.
    report = logs.environment(device, 1) | dict(toy=toy, minutes=minutes, rows=[])
    if not toy:
        report['gpu'] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for row in rows_of(name, folder, deadline):
                report['rows'].append(dict(part=name) | row)
                show(report['rows'][-1])

            # After each part, as nobody knows how long a card is there.
            report['seconds'] = round(time.perf_counter() - began, 1)
            with open(f'{out_dir}/gpu.json', 'w', encoding='utf-8') as f:
                json.dump(report, f, indent=1)

    failed = [row['part'] for row in report['rows'] if 'error' in row]
    print(f'{report["seconds"]} s; failed: {", ".join(failed) or "nothing"}; {out_dir}/gpu.json')
    if failed:
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
