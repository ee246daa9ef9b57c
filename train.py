"""Train a language model, a vision-language model, a robot's policy, text to image, or your task.

    python train.py config/vlm_emoji.py --lr=1e-3
    torchrun --nproc_per_node=2 train.py config/vlm_emoji.py [--fsdp=0]     (DDP, or FSDP2)
    python train.py config/vlm_emoji.py --parameters    (the names that `groups` match)

What is trained is a task, a file of tasks/ or yours: its settings join those below. The same
command resumes a run that stopped. The loss of a step is, for each kind of target, one mean over
the global batch, however it is cut into ranks and micro-batches. `step` counts finished steps.
"""
from configurator import answer_help, configure

answer_help(__file__)               # before torch is imported, which takes two seconds

import importlib
import math
import os
import signal
import sys
import time
import warnings

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import logs
import optim
import parallel
import processor as processors
import tasks
from parallel import all_ranks, say

# -----------------------------------------------------------------------------------------------
# settings

# what is trained, and where it goes
task = 'vlm'                # llm | vlm | siglip | policy | vla | t2i, or a file: mine.py
out_dir = 'out/run'         # config.json, log.jsonl, loss.png, checkpoints/
resume = 'auto'             # auto: from the newest checkpoint in out_dir | never: refuse to | a
#                             checkpoint: the same, or where out_dir has none from that one
init_from = ''              # weights to start from: a run or a checkpoint of it, also as a URL;
#                             a folder of transformers or diffusers, a name on the Hugging Face hub
init = {}                   # or part by part, with shapes: {'vit': as init_from} (docs/models.md)
init_skip = []              # regexes of parameters that both leave as they are
lora = []                   # (regex, rank): only factors beside matrices whose names it is found
lora_alpha = 16.0           # in are trained, weighed by lora_alpha / rank; checkpoints hold these
lora_dropout = 0.0          # alone (docs/models.md)

# data
data_dir = 'datasets'       # where data sets are: here, or there beside the scripts
mix = {'emoji/noto': 1.0}   # data set -> sampling weight; a folder, .tar, list of them (.txt),
#                             with commas and {000..099} between, local or a URL
val = {}                    # name -> data set that is validated on, whole
cache_dir = data.CACHE      # indexes of shards, and copies of remote ones
cache_gb = 100.0            # of copies
tokenizer = 'bytes'         # bytes | a .model (sentencepiece), .tiktoken or tokenizer.json file or
#                             a folder of one, in data_dir or as a path | a model on the hub
processor = 'auto'          # how a sample becomes tokens: auto (as the task has it) | paligemma |
#                             text | chat | gemma | llava | smolvlm | a model folder, or one on
#                             the hub | file.py:function
seq_len = 96                # tokens a row, patches and padding included
workers = 2                 # processes that read data (0: none but this one)
lanes = 64                  # parallel streams of the order; fixed for a run
whole = 1 << 20             # a data set of at most so many samples is shuffled as a whole,
window = 1024               # of a larger one so many samples of a lane at once
adopt = []                  # what may have changed since a run began: data sets, stats.json
max_bad_fraction = 0.001    # more unusable samples than this stop the run
max_bad_shards = 0          # so many shards may be lost or damaged; their samples are left out

# length: one of the three
max_steps = 0
max_samples = 0
epochs = 0.0                # 1: as many samples as all data sets of the mix hold together; each of
#                             them goes through epochs of its own, at the pace of its weight
allow_repeat = True         # False: refuse a run that would see a sample twice

# batch
batch_size = 128            # samples a step, over all ranks
micro_batch_size = 0        # samples a rank takes at once (0: its whole share)

# optimizer
optimizer = 'adamw'         # adamw | muon (for the matrices of the layers, adamw for the rest)
lr = 1e-3                   # peak learning rate
schedule = 'cosine'         # cosine | linear | constant | wsd (warm-up, stable, decay)
min_lr = 0.0                # at the end of the schedule, as a fraction of lr
warmup = 0.05               # below 1: a fraction of the run, else steps
decay = 0.2                 # wsd: the last part of the run, in which lr falls on a line
betas = (0.9, 0.95)
weight_decay = 0.1
grad_clip = 1.0             # 0: none
groups = [(r'norm|bias|scale|pos_embed|embedding', {'weight_decay': 0.0}), (r'.*', {})]
#                             the first regex found in a parameter's name sets its lr_scale,
#                             weight_decay, freeze; --parameters lists the names
ema = 0.0                   # decay of a moving average of the weights, saved beside them (0: none)
loss_weights = {}           # data set of the mix -> what its targets weigh (1.0)
skip_bad_steps = 0          # steps in a row that may have a loss or gradient that is not finite

# precision and devices
dtype = 'float32'           # of the compute: float32 | bfloat16 | float16; weights stay float32
matmul = 'highest'          # highest: float32 means float32 | high: TensorFloat-32 | medium: bf16
compile = False             # torch.compile the layers
fsdp = 1                    # ranks that share one copy of weights and optimizer: 1: each has its
#                             own (DDP) | 0: all share one (FSDP2) | between: several (HSDP)
deterministic = False       # only operations that give the same bits every time
device = 'auto'             # auto: cuda if there is one, else cpu
seed = 0

# logs and checkpoints
log_every = 10              # steps
eval_every = 0              # steps (0: only at the end)
num_checkpoints = 1         # exactly so many, evenly spaced, the last at the end
keep_last = 0               # checkpoints kept on disk (0: all)
remote = ''                 # URL (any fsspec) that gets a copy of checkpoints and logs, and fills
#                             an out_dir that has none
wandb_project = ''          # empty: no wandb; WANDB_MODE=offline needs no network

show_parameters = '--parameters' in sys.argv
config = configure(globals(), [arg for arg in sys.argv[1:] if arg != '--parameters'],
                   more=tasks.train_settings, elsewhere=tasks.that_have,
                   brings=lambda given: importlib.import_module('parts').flags(given))
task = tasks.load(task)
warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # one rank writes checkpoints

# -----------------------------------------------------------------------------------------------
# processes and devices

rank, world, master = parallel.rank, parallel.world, parallel.master
device = parallel.begin(device)
bar = None                  # the progress bar, once there is one


def fail(message, code):
    """One line, and out. Where all ranks have the same to say, the first has ended the others."""
    if bar:
        bar.close()
    time.sleep(0 if master or code == 1 else 3)
    print(f'train.py: {" ".join(str(message).split())}', file=sys.stderr, flush=True)
    parallel.leave(code)


# -----------------------------------------------------------------------------------------------
# data, tokenizer, model; what an earlier command has left

log_path, checkpoints = f'{out_dir}/log.jsonl', f'{out_dir}/checkpoints'

try:
    notes = []
    for part in (parallel, data, optim, checkpoint, task):
        notes += part.check(config, world) or []
    micro_batch, pack = micro_batch_size or batch_size // world, config.get('pack', False)
    if not show_parameters:
        checkpoint.check_free(out_dir)

    # the checkpoint to go on from, and its progress
    found = '', {}, ''
    if master and remote:
        from mirror import find
        found = find(out_dir, remote, resume, say)
    elif master and (resume not in ('auto', 'never') or checkpoint.names(checkpoints)):
        from past import find
        found = find(out_dir, resume, say)
    resumed, saved, problem = parallel.from_master(found)
    if problem:
        raise ValueError(problem)

    folders, history = data.open_mix(config)
    if resumed:
        import past
        notes += past.go_on(history, config, resumed, saved, tasks.kept(task))
    order = history.order
    steps, checkpoint_steps = history.length(config)
    lr_at = optim.learning_rate(config, steps)

    torch.manual_seed(seed)                         # the same weights on every rank
    run = checkpoint.make_run(config, device)
    run.kept = task.statistics(config, list(folders.values()))
    if resumed:
        past.check_same_files(resumed, run)
    task.prepare(run)
    raw_model = run.model
    if lora or (not resumed and (init_from or init)):
        import parts
        notes.append(parts.begin_run(run, resumed, show_parameters))
    options = optim.match(groups, [name for name, _ in raw_model.named_parameters()])

    augmenting = seed if config.get('augment') else None
    train_data = data.Batches(list(folders.values()), order, run.processor, augmenting, pack,
                              micro_batch if pack else 1, window * lanes)
    if max_bad_shards:
        import lost
        lost.spare(train_data)
    # answers can be told apart only where each has a row of its own
    count_right = task.scorer(config)
    val_sets = data.open_validation(config, run.processor, pack and not count_right)
    constants = task.constants(run, list(folders.values()))
except (ValueError, OSError) as error:
    fail(error, 2)
if show_parameters:
    from usage import show_parameters
    show_parameters(groups, dict(raw_model.named_parameters()), say)
for line in notes:
    say(line)

torch.set_float32_matmul_precision(matmul)
torch.backends.cudnn.allow_tf32 = matmul != 'highest'
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
autocast = torch.autocast(torch.device(device).type, getattr(torch, dtype),
                          enabled=dtype != 'float32')

# what is learned: kinds of targets, each a mean of its own, and what that weighs
dataset_samples = order.samples_in_use
empty_batch = processors.collate([], run.processor) | dict(bad=[])
kinds = list(task.count(empty_batch))
weights, arguments = task.weights(config), task.arguments(config)


def checked(batch):
    """The batch, if its shards could be read."""
    if 'error' in batch:
        fail(batch['error'], 1)
    return batch


def total(sums, counts):
    """The loss: means over all targets of the global batch, weighed. One of each for each kind."""
    loss = 0
    for kind, loss_sum, count in zip(kinds, sums, counts):
        loss = loss + weights.get(kind, 1.0) * loss_sum / max(count, 1)
    return loss


# -----------------------------------------------------------------------------------------------
# what is trained, over the ranks: DDP, or FSDP2 layer by layer; compiled layer by layer

for name, parameter in raw_model.named_parameters():
    parameter.requires_grad_(parameter.requires_grad and not options[name].get('freeze'))

# before layers are compiled, whose operations are not counted
first_batch = checked(train_data[order.start + np.arange(micro_batch)])
if not any(task.count(first_batch).values()):
    fail(f'task={config["task"]} learns nothing from the first {micro_batch} samples: '
         f'{(first_batch["bad"] or ["what does its count count?"])[0]}', 2)
with autocast:
    flops = logs.count_flops(raw_model, run.inputs(first_batch) | constants)
sample_flops = 3 * flops / micro_batch                  # the backward pass takes two of three

if compile:
    parallel.compile_layers(raw_model)      # inside what FSDP puts around them
model = parallel.spread(raw_model, fsdp, device)
run.gathered = lambda: parallel.gathered(raw_model)

trained = {name: p for name, p in raw_model.named_parameters() if p.requires_grad}
averages = {name: p.detach().clone() for name, p in trained.items()} if ema else {}
optimizers = optim.build(optimizer, trained, options, lr, betas, weight_decay)

# -----------------------------------------------------------------------------------------------
# begin, or go on

progress = run.progress
progress['loss_scale'] = 2.0 ** 16 if dtype == 'float16' else 1.0

try:
    if resumed:
        state = optim.state_tensors(optimizers, trained)
        progress |= past.load(resumed, saved, dtype, run.tensors(), averages, state)
        say(f'resumed from {resumed}')
    parallel.barrier()              # all have read before the first writes
    if master and progress['step'] < steps:         # what trains nothing changes nothing
        held = checkpoint.take(out_dir, progress['step'], say)
        checkpoint.write_json(f'{out_dir}/config.json', config)
        checkpoint.write_json(f'{out_dir}/environment.json', logs.environment(device, world))
except checkpoint.ERRORS as error:
    fail(f'out_dir={out_dir!r}: {str(error).strip().splitlines()[-1]}', 2)


def save():
    """Begin to write the checkpoint of this step."""
    is_scheduled = progress['step'] in checkpoint_steps
    jsons = {'config.json': config, 'chapters.json': history.to_json(),
             'progress.json': progress | dict(world=world, scheduled=is_scheduled)} | run.kept
    if master:
        jsons['shards.json'] = history.provenance(progress['step'])
    saver.save(progress['step'], run.tensors(), averages,
               optim.state_tensors(optimizers, trained), jsons, checkpoint.own_files(run))


def saving(action):
    """`action` of the saver; what goes wrong ends the run, the last good checkpoint stays."""
    try:
        action()
    except checkpoint.ERRORS as error:
        reason = str(error).strip().splitlines()[-1]        # DCP puts a traceback before it
        fail(f'step {saver.step}: the checkpoint could not be written ({reason}); the last good '
             f'one is {checkpoint.newest_name(checkpoints)}', 1)


def log(row):
    """A row to log.jsonl and wandb."""
    if master:
        try:
            logs.append(log_path, row)
        except OSError as error:
            fail(f'{log_path} can not be written: {error}', 1)
        if wandb_run:
            wandb_run.log(row, step=row['step'])


wandb_run = copy = None
if wandb_project and master and progress['step'] < steps:
    from wandb_log import open_wandb
    wandb_run = open_wandb(wandb_project, out_dir, config)
if remote and master:
    from mirror import Mirror
    copy = Mirror(remote, out_dir, checkpoint.names(checkpoints), say)
saver = checkpoint.Saver(out_dir, keep_last, copy, rank, world, lambda: logs.plot(out_dir, val))

# -----------------------------------------------------------------------------------------------
# validation: every sample of a data set once, whatever the number of ranks


def validation_batches(name, folder, batches):
    """Micro-batches of this rank's part of a data set, chunk by chunk; each rank gives as many."""
    mine = np.arange(len(folder))[rank::world]
    for chunk in np.array_split(mine, math.ceil(len(folder) / world / micro_batch)):
        batch = checked(batches[chunk]) if len(chunk) else empty_batch
        if batch['bad']:
            fail(f'validation set {name!r}: {batch["bad"][0]}', 1)
        cut = processors.split(batch, micro_batch, run.processor)
        yield cut + [empty_batch] * (int(all_ranks(len(cut)).max()) - len(cut))


@torch.no_grad()
def validate(name, folder, batches):
    """A row with `val_loss` (means over targets), and what the task measures beyond it."""
    begun = time.perf_counter()
    model.eval()
    parallel.swap(trained, averages, raw_model)     # the averages are validated, if there are any
    sums, counts, right = [0.0] * len(kinds), [0] * len(kinds), 0
    for cut in validation_batches(name, folder, batches):
        cut = [(batch, run.inputs(batch)) for batch in cut]
        for _, tensors in cut:
            with autocast:
                learned = model(**tensors, **constants)
            for k, kind in enumerate(kinds):
                sums[k] += learned[kind].losses.sum().item()
                counts[k] += int(learned[kind].counts.sum())
        if count_right:
            with autocast, run.gathered():
                right += sum(count_right(run, *one) for one in cut)

    right, *both = all_ranks(right, *sums, *counts).sum(0).tolist()
    sums, counts = both[:len(kinds)], both[len(kinds):]
    row = dict(step=progress['step'], val=name, val_loss=total(sums, counts))
    row |= logs.of_kinds('val_loss', kinds, sums, counts)
    if count_right:
        row['exact_match'] = right / len(folder)
    row |= task.summary(run, folder, batches, dict(zip(kinds, sums)))
    parallel.swap(trained, averages, raw_model)
    model.train()
    return row | dict(val_time=round(time.perf_counter() - begun, 3))


# -----------------------------------------------------------------------------------------------
# the loop

stop = dict(signal=0)
for number in (signal.SIGTERM, signal.SIGINT):      # finish the step, save, exit 0
    signal.signal(number, lambda got, frame: stop.update(signal=got))

samples_of, first = history.position_of, progress['step']
at_once = batch_size // world if pack else micro_batch      # samples that are read together
positions = (each for step in range(first, steps)
             for each in history.positions_of(step, at_once, rank, world))
feed = iter(data.loader(train_data, positions, workers))
set_weights = np.array([float(loss_weights.get(name, 1.0)) for name in mix])
weights_there = torch.tensor(set_weights, dtype=torch.float32, device=device)
if master:
    print(f'{config["task"]}: {sum(p.numel() for p in trained.values()) / 1e6:.2f} M parameters '
          f'trained, {steps} steps of {batch_size} samples = {world} ranks x '
          f'{batch_size // world // micro_batch} x {micro_batch}; {len(mix)} data sets of '
          f'{dataset_samples} samples, {samples_of(steps) / dataset_samples:.1f} epochs')
    bar = tqdm(total=steps, initial=first, desc=os.path.basename(out_dir), mininterval=1,
               dynamic_ncols=True)


def count_step(batches, num_micro):
    """What a step holds over all ranks, for its gradient is of one mean: targets of each kind,
    tokens of each data set, if one was told to stop, its most micro-batches. May end the run."""
    counts = [task.count(batch) for batch in batches]
    learned = [sum(count[kind] for count in counts) for kind in kinds]
    tokens = logs.tokens_of(batches, len(mix))
    bad = [line for batch in batches for line in batch['bad']]
    each = all_ranks(*learned, *tokens, len(bad), stop['signal'], num_micro)
    *counts, num_bad, stopping, _ = each.sum(0).tolist()
    learned, tokens = counts[:len(kinds)], [int(count) for count in counts[len(kinds):]]

    progress['bad_samples'] += int(num_bad)
    num_bad, seen = progress['bad_samples'], samples_of(progress['step'] + 1)
    is_empty = not any(learned) and not max_bad_shards
    if is_empty or num_bad > max(1, max_bad_fraction * max(seen, dataset_samples)):
        from logs_more import why_stopped
        fail(why_stopped(progress['step'] + 1, learned, bad, num_bad, seen, config), 1)
    return learned, tokens, stopping > 0, int(each[:, -1].max())


def forward_backward(batch, learned_counts, by_set):
    """Gradients of a micro-batch; losses and counts are added to by_set (kinds, 2, data sets)."""
    tensors = run.inputs(batch)
    with autocast:
        learned = model(**tensors, **constants, **arguments)
    parts = torch.as_tensor(batch['parts']).to(device, non_blocking=True).int()
    parts, sums = parts.expand(len(parts), seq_len).flatten(), []
    for k, kind in enumerate(kinds):
        losses, counts, places = learned[kind]
        of_set = parts[places]
        sums.append((losses * weights_there[of_set]).sum())
        by_set[k].index_add_(1, of_set, torch.stack((losses.detach().double(), counts.double())))
    # the mean over the ranks, which DDP and FSDP take, is to be the sum
    (total(sums, learned_counts) * (world * progress['loss_scale'])).backward()


def log_row(step, loss, grad_norm, by_set, since):
    """What log.jsonl and wandb hold of the last `log_every` steps."""
    row = dict(step=step, samples=samples_of(step), tokens=progress['tokens'],
               epoch=round(samples_of(step) / dataset_samples, 4), loss=loss, lr=lr_at(step - 1),
               grad_norm=grad_norm, mem_gb=logs.memory_gb(device),
               bad_samples=progress['bad_samples']) | progress.get('lost', {})
    row |= logs.speed(since, world, sample_flops, logs.peak_flops(device, dtype, world))
    pace = (time.perf_counter() - loop_begun) / (step - first)
    row['eta'] = round(pace * (steps - step), 1)

    # how each data set does, when there are several, and each kind of target
    if len(mix) > 1:
        from logs_more import row_of_sets
        row |= row_of_sets(mix, order, samples_of(step), progress['tokens_of'], by_set, total)
    row |= logs.of_kinds('loss', kinds, by_set[:, 0].sum(1), by_set[:, 1].sum(1))
    if dtype == 'float16':
        row['loss_scale'] = progress['loss_scale']
    return row


def update(loss, grad_norm):
    """A step of the optimizers, if loss and gradient are finite; else what is to be done then."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        for opt in optimizers:
            for group in opt.param_groups:
                group['lr'] = lr_at(progress['step']) * group['lr_scale']
            opt.step()
        if ema:
            now = [p.detach() for p in trained.values()]
            torch._foreach_lerp_([*averages.values()], now, 1 - ema)
        progress['bad_steps'], progress['good_steps'] = 0, progress['good_steps'] + 1
        if dtype == 'float16' and progress['good_steps'] % 2000 == 0:
            progress['loss_scale'] *= 2
        return
    if math.isfinite(loss) and progress['loss_scale'] > 1:      # fp16 overflows: a smaller scale
        progress['loss_scale'], progress['good_steps'] = progress['loss_scale'] / 2, 0
        return

    from logs_more import not_finite
    progress['bad_steps'] += 1
    where = not_finite(progress['step'], loss, grad_norm, out_dir)
    if progress['bad_steps'] > skip_bad_steps:
        saving(saver.wait)
        fail(f'{where}. Last good checkpoint: {checkpoint.newest_name(checkpoints)}. Try a lower '
             'lr, a longer warmup, dtype=float32, or skip_bad_steps', 1)
    say(f'\n{where}. The weights stay as they are')


since = dict.fromkeys(('steps', 'samples', 'tokens', 'data', 'seconds', 'val', 'save'), 0)
loop_begun, stopping = time.perf_counter(), False
model.train()
while progress['step'] < steps and not stopping:
    # read the batch, and cut it into micro-batches
    begun = time.perf_counter()
    todo = history.positions_of(progress['step'], at_once, rank, world)
    batches = [checked(next(feed)) for _ in todo]
    if max_bad_shards and (problem := lost.count(progress, batches, max_bad_shards)):
        fail(problem, 1)
    for line in [line for batch in batches for line in batch['bad']]:
        print(f'\nbad sample: {line}', file=sys.stderr)
    micro = [part for batch in batches
             for part in processors.split(batch, micro_batch, run.processor)]
    have_read = time.perf_counter()

    # where texts are long or packed a rank may have fewer rows: it goes through empty ones
    learned, tokens, stopping, passes = count_step(batches, len(micro))
    micro += [empty_batch] * (passes - len(micro))

    # gradients, which travel once a step; what draws without keys follows from the seed
    torch.manual_seed(int(data.hash64(seed, 5, progress['step'], rank)[0] >> np.uint64(1)))
    by_set = torch.zeros(len(kinds), 2, len(mix), dtype=torch.float64, device=device)
    for i, batch in enumerate(micro):
        parallel.synchronize(model, is_last=i == passes - 1)
        forward_backward(batch, learned, by_set)
    if progress['loss_scale'] != 1:
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / progress['loss_scale'])
    grad_norm = parallel.clip_gradients(trained.values(), grad_clip)

    # the loss, over all ranks, and the step
    by_set = all_ranks(*by_set.flatten().tolist()).sum(0).numpy().reshape(len(kinds), 2, -1)
    loss = float(total(by_set[:, 0] @ set_weights, learned))
    update(loss, grad_norm)
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    progress['step'] += 1
    progress['tokens'] += sum(tokens)
    known = progress['tokens_of']           # not changed in place: a thread may be saving it
    progress['tokens_of'] = known | {k: known.get(k, 0) + n for k, n in zip(mix, tokens)}
    step = progress['step']
    step_samples = samples_of(step) - progress['samples']
    progress['samples'] += step_samples
    saving(saver.check)

    # what there is to say of it
    ended = time.perf_counter()
    news = dict(steps=1, samples=step_samples, tokens=sum(tokens), data=have_read - begun,
                seconds=ended - begun)
    since |= {key: since[key] + value for key, value in news.items()}
    if step % log_every == 0 or step == steps:
        log(log_row(step, loss, grad_norm, by_set, since))
        since = dict.fromkeys(since, 0)
    if master:
        speed = f'{step_samples / (ended - begun):.0f} samples/s'
        bar.set_postfix_str(f'loss {loss:.4f}, {speed}', refresh=False)
        bar.update()

    # validate, save, stop
    if step == steps or (eval_every > 0 and step % eval_every == 0):
        for name, (folder, batches) in val_sets.items():
            row = validate(name, folder, batches)
            since['val'] += row['val_time']
            log(row)
            if master:
                bar.write(logs.line_of(row))
    if step in checkpoint_steps or stopping:
        begun = time.perf_counter()
        saving(save)
        since['save'] += time.perf_counter() - begun

saving(saver.wait)
if progress['step'] < steps:
    say(f'\nstopped by a signal after step {step}, saved; the same command goes on')
if master:
    bar.close()
    if first >= steps:
        print(f'{out_dir} is finished: {first} steps of {steps}')
    if wandb_run:
        wandb_run.finish()
del feed                            # closes the workers
parallel.barrier()
if copy and copy.finish(stop):
    fail(f'{copy.error}; {out_dir} is whole, the same command tries again', 1)
parallel.end()
