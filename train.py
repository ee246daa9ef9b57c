"""Train a language model, a vision-language model, or a vision tower on picture-name pairs.

    python train.py config/vlm_emoji.py --lr=1e-3
    torchrun --nproc_per_node=2 train.py config/vlm_emoji.py        (DistributedDataParallel)

The same command resumes where the run stopped. The loss of a step is one mean over all targets of the global batch,
however it is cut into ranks and micro-batches. `step` counts finished steps: the row of log.jsonl with step=101 is of
the step that `data.py --show_steps=100:101` shows.
"""
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import data
import processor as processors
import shards
import tokenizer as tokenizers
from configurator import configure
from model import DecoderConfig, ViTConfig, build, generate

# ----------------------------------------------------------------------------------------------------------------------
# settings

# what is trained, and where it goes
task = 'vlm'                        # vlm | llm | siglip (a vision tower on picture-name pairs)
vit = ViTConfig()
decoder = DecoderConfig()           # siglip: the text tower
pixel_shuffle = 1                   # vlm: squares of so many patches a side become one image token
pair_scale = 10.0                   # siglip: the factor of the cosines at the start
pair_with = 'batch'                 # siglip: batch: a picture is compared with the texts of its batch | all: of the mix
pair_bias = -10.0                   # siglip: the logit of a pair at the start, near the log-odds of a match
out_dir = 'out/run'                 # config.json, log.jsonl, loss.png, checkpoints/
resume = 'auto'                     # auto: from the newest checkpoint in out_dir | never: refuse if there is one
init_from = ''                      # weights to start from: a run's out_dir or one of its checkpoints
init_skip = []                      # regexes of parameters that init_from leaves as they are
# data
data_dir = 'datasets'               # where data sets are: here, or there beside the scripts
mix = {'emoji/noto': 1.0}           # data set -> sampling weight; a folder, .tar, list of them (.txt), with commas and
#                                     {000..099} between, local or a URL
val = {}                            # name -> data set that is validated on, whole
cache_dir = shards.CACHE            # indexes of shards, and copies of remote ones
cache_gb = 100.0                    # of copies
tokenizer = 'bytes'                 # bytes | a .model (sentencepiece), .tiktoken or tokenizer.json file, in data_dir or
#                                     a path
processor = 'auto'                  # how a sample is written as tokens: paligemma | text | chat | gemma | llava |
#                                     smolvlm | a model folder | file.py:function; auto: by task
prompt = ''                         # vlm: the text between a picture and its answer
image_mean = 0.5                    # subtracted from pixels of 0 to 1 (1.0: white is 0)
image_std = 0.5                     # and what they are then divided by
image_draft = True                  # JPEGs may be decoded at 1/2, 1/4 or 1/8, where that is at least vit.image_size
action_steps = 0                    # actions of a sample are padded to so many steps
action_dim = 0                      # of so many numbers,
proprio_dim = 0                     # and the state to so many
seq_len = 96                        # tokens a row, patches and padding included
pack = False                        # several samples share a row, each sees itself alone; micro_batch_size: of rows
document_attention = True           # tokenized sets: attention stops at a document's end (False: faster, less exact)
augment = False                     # drawings change a little every time they are seen
workers = 2                         # processes that read data (0: none but this one)
lanes = 64                          # parallel streams of the order; fixed for a run
window = 1024                       # samples among which a lane is shuffled
max_bad_fraction = 0.001            # more unusable samples than this stop the run
# length: one of the three
max_steps = 0
max_samples = 0
epochs = 0.0                        # times the samples that the data sets of the mix hold together; each of them goes
#                                     through epochs of its own, at the pace of its weight
allow_repeat = True                 # False: refuse a run that would see a sample twice
# batch
batch_size = 128                    # samples a step, over all ranks
micro_batch_size = 0                # samples a rank takes at once (0: its whole share)
# optimizer
lr = 1e-3                           # peak learning rate
min_lr = 0.0                        # at the end of the cosine, as a fraction of lr
warmup = 0.05                       # below 1: a fraction of the run, else steps
betas = (0.9, 0.95)
weight_decay = 0.1
grad_clip = 1.0                     # 0: none
groups = [(r'norm|bias|scale|pos_embed|embedding', {'weight_decay': 0.0}), (r'.*', {})]  # the first regex found in a
#                                     parameter's name sets its lr_scale, weight_decay, freeze
# precision and devices
dtype = 'float32'                   # float32 | bfloat16: of the compute; weights and optimizer stay float32
device = 'auto'                     # auto: cuda if there is one, else cpu
seed = 0
# logs and checkpoints
log_every = 10                      # steps
eval_every = 0                      # steps (0: only at the end)
exact_match = True                  # vlm: validation also generates, and counts answers that are right to the letter
num_checkpoints = 1                 # exactly so many, evenly spaced, the last at the end
keep_last = 0                       # checkpoints kept on disk (0: all)
wandb_project = ''                  # empty: no wandb; WANDB_MODE=offline needs no network

config = configure(globals())
warnings.filterwarnings('ignore', 'torch.distributed is disabled')   # checkpoints are written by one rank

bar = None                          # the progress bar, once there is one


def fail(message, code):
    """One line, and out. What is wrong with a setting, every rank would say, so the first speaks."""
    if bar:
        bar.close()
    if int(os.environ.get('RANK', '0')) == 0 or code == 1:
        print(f'train.py: {" ".join(str(message).split())}', file=sys.stderr, flush=True)
    os._exit(code) if dist.is_initialized() else sys.exit(code)     # a rank must not wait for the others to say goodbye


# ----------------------------------------------------------------------------------------------------------------------
# processes and devices

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
master = rank == 0
if device == 'auto':
    device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if torch.cuda.is_available() else 'cpu'
if 'WORLD_SIZE' in os.environ:
    torch.cuda.set_device(device) if device != 'cpu' else None
    dist.init_process_group('nccl' if device != 'cpu' else 'gloo')
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False     # float32 means float32


def say(message):
    """Print, on one rank."""
    if master:
        print(message, flush=True)


def all_ranks(*values):
    """Every rank's values, in fp64: (ranks, values)."""
    t = torch.zeros(world, len(values), dtype=torch.float64, device=device)
    t[rank] = torch.tensor(values, dtype=torch.float64)
    if world > 1:
        dist.all_reduce(t)
    return t


def all_sum(*values):
    """Sums over the ranks, in fp64."""
    return all_ranks(*values).sum(0).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# checks that need no data

for key, value, allowed in (('task', task, ('vlm', 'llm', 'siglip')), ('resume', resume, ('auto', 'never')),
                            ('pair_with', pair_with, ('batch', 'all')), ('dtype', dtype, ('float32', 'bfloat16'))):
    if value not in allowed:
        fail(f'{key}={value!r}: expected one of {", ".join(allowed)}', 2)
if batch_size < 1 or micro_batch_size < 0 or batch_size % (world * (micro_batch_size or 1)):
    unit = world * max(micro_batch_size, 1)
    fail(f'batch_size={batch_size} is not a multiple of {world} ranks x micro_batch_size={micro_batch_size or 1}: '
         f'{max(batch_size // unit, 1) * unit} or {(max(batch_size, 0) // unit + 1) * unit} would fit', 2)
micro_batch = micro_batch_size or batch_size // world
if task == 'siglip' and pack:
    fail('pack=True: rows of task=siglip are compared one by one, they can not be shared', 2)
if task == 'siglip' and pair_with == 'batch' and micro_batch != batch_size:
    fail(f'pair_with=batch compares all pairs of a batch, so batch_size={batch_size} must be one micro-batch on one '
         f'rank (here: {world} ranks, micro_batch_size={micro_batch}): take pair_with=all', 2)
if sum(x > 0 for x in (max_steps, max_samples, epochs)) != 1 or min(max_steps, max_samples, epochs) < 0:
    fail(f'the run\'s length is one of max_steps={max_steps}, max_samples={max_samples}, epochs={epochs}: '
         'set one above 0 and leave the others at 0', 2)
if min(lr, min_lr, weight_decay, grad_clip) < 0 or len(betas) != 2 or not all(0 <= b < 1 for b in betas):
    fail(f'lr={lr}, min_lr={min_lr}, weight_decay={weight_decay} and grad_clip={grad_clip} must be at least 0, and '
         f'betas={betas} two numbers of at least 0 and below 1', 2)
for regex in [*(rule[0] for rule in groups), *init_skip]:
    try:
        re.compile(regex)
    except (re.error, TypeError) as error:
        fail(f'groups and init_skip: {regex!r} is not a regular expression ({error})', 2)
if min(log_every, num_checkpoints) < 1 or min(eval_every, keep_last, workers, warmup, seed) < 0:
    fail(f'log_every={log_every} and num_checkpoints={num_checkpoints} must be at least 1; eval_every={eval_every}, '
         f'keep_last={keep_last}, workers={workers}, warmup={warmup} and seed={seed} at least 0', 2)

# ----------------------------------------------------------------------------------------------------------------------
# data, tokenizer, model

try:
    folders, order = data.open_mix(mix, data_dir, seed, lanes, window, cache_dir, cache_gb)
    val_folders = {name: shards.Folder(path, data_dir, cache_dir, cache_gb) for name, path in val.items()}
    tok = tokenizers.load(tokenizer if tokenizer == 'bytes' else shards.find(tokenizer, data_dir, 'tokenizer'))
    torch.manual_seed(seed)                         # the same weights on every rank
    raw_model = build(task, vit, decoder, tok.vocab_size, tok.image_id, pixel_shuffle, pair_scale, pair_bias).to(device)
    image_tokens = raw_model.config.image_tokens if task == 'vlm' else 0
    rows_of = processors.build(config, tok, image_tokens)
    train_data = data.Batches(folders, order, rows_of, seed if augment else None, pack, micro_batch if pack else 1,
                              window * lanes)
    # answers can be told apart only where each has a row of its own
    val_data = {name: data.Batches([f], data.InOrder(f.sizes), rows_of, pack=pack and not (task == 'vlm' and
                                   exact_match)) for name, f in val_folders.items()}
except (ValueError, OSError) as error:
    fail(error, 2)

fixed = {}                                          # inputs that are the same for every batch
if task == 'siglip' and pair_with == 'all':
    fixed = {k: torch.as_tensor(v).to(device).long()
             for k, v in zip(('texts', 'text_segments'), data.all_texts(folders, rows_of))}

dataset_samples = sum(n for n, weight in zip(order.samples, order.weights) if weight)
steps = max_steps or math.ceil((max_samples or epochs * dataset_samples) / batch_size)
warmup_steps = round(warmup * steps) if warmup < 1 else int(warmup)
if warmup_steps > steps:
    fail(f'warmup={warmup} is {warmup_steps} steps, the run has {steps}: give a fraction below 1 or fewer steps', 2)
if num_checkpoints > steps:
    fail(f'num_checkpoints={num_checkpoints}, but the run has {steps} steps', 2)
if not allow_repeat:
    for d, name in enumerate(mix):
        if order.before(steps * batch_size, d) > order.samples[d]:
            fail(f'allow_repeat=False, but a run of {steps * batch_size} samples takes '
                 f'{order.before(steps * batch_size, d)} of {name!r}, which has {order.samples[d]}: make the run '
                 'shorter or its weight smaller', 2)
checkpoint_steps = {round(steps * (i + 1) / num_checkpoints) for i in range(num_checkpoints)}

# ----------------------------------------------------------------------------------------------------------------------
# optimizer: every parameter takes the first rule that matches its name

by_rule = {}
for name, parameter in raw_model.named_parameters():
    rule = next((i for i, (regex, _) in enumerate(groups) if re.search(regex, name)), None)
    if rule is None:
        fail(f'groups: no rule matches parameter {name}: end the list with (".*", {{}})', 2)
    by_rule.setdefault(rule, []).append((name, parameter))
param_groups = []
for i, (regex, options) in enumerate(groups):
    if i not in by_rule or set(options) - {'lr_scale', 'weight_decay', 'freeze'}:
        fail(f'groups: rule {regex!r}: {options} ' + ('may hold lr_scale, weight_decay and freeze' if i in by_rule else
                                                      'matches no parameter that an earlier one left'), 2)
    if options.get('freeze'):
        for _, parameter in by_rule[i]:
            parameter.requires_grad_(False)
    else:
        param_groups.append(dict(params=[p for _, p in by_rule[i]], lr_scale=options.get('lr_scale', 1.0),
                                 weight_decay=options.get('weight_decay', weight_decay)))
if not param_groups:
    fail(f'groups={groups} freeze every parameter: nothing is left to train', 2)
optimizer = torch.optim.AdamW(param_groups, lr=lr, betas=betas, fused=True)
trained = [p for p in raw_model.parameters() if p.requires_grad]


def lr_at(step):
    """Linear warm-up, then a cosine from lr to min_lr * lr."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr * (min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints: out_dir/checkpoints/step_00001000, written under another name, fsynced, renamed

log_path, checkpoints = os.path.join(out_dir, 'log.jsonl'), os.path.join(out_dir, 'checkpoints')


def write_json(path, value):
    """Whole or not at all, and on the disk when this returns."""
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)


def read_json(path):
    with open(path, encoding='utf-8') as f:
        return json.load(f)


def files_of(folder):
    """{path inside the folder: bytes} of every file."""
    return {os.path.relpath(os.path.join(root, name), folder): os.path.getsize(os.path.join(root, name))
            for root, _, names in os.walk(folder) for name in names}


def optimizer_tensors():
    """AdamW's state by parameter name, as views: zeros where it has not taken a step."""
    tensors = {}
    names = {p: name for name, p in raw_model.named_parameters()}
    for p in trained:
        if p not in optimizer.state:
            optimizer.state[p] = {'step': torch.zeros((), device=p.device), 'exp_avg': torch.zeros_like(p),
                                  'exp_avg_sq': torch.zeros_like(p)}
        state = optimizer.state[p]
        tensors |= {f'{names[p]}.{key}': value for key, value in state.items()}
    return tensors


def save_checkpoint():
    """Write the checkpoint of this step; then remove what keep_last leaves no room for, and unscheduled older ones."""
    name = f'step_{progress["step"]:08d}'
    new = os.path.join(checkpoints, f'.{name}.tmp')
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    save_file({k: v.contiguous() for k, v in raw_model.state_dict().items()}, os.path.join(new, 'model.safetensors'))
    # safetensors instead of DCP's own format, whose metadata is a pickle
    dcp.save(optimizer_tensors(), storage_writer=dcp.HuggingFaceStorageWriter(os.path.join(new, 'state')), no_dist=True)
    write_json(os.path.join(new, 'config.json'), config)
    write_json(os.path.join(new, 'shards.json'), data.provenance(order, folders, progress['step'] * batch_size))
    for path in tok.files:
        name_of_copy = 'tokenizer.json' if path == tok.files[0] and path.endswith('.json') else os.path.basename(path)
        shutil.copyfile(path, os.path.join(new, name_of_copy))
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    write_json(os.path.join(new, 'progress.json'), progress | dict(world=world, versions=versions, files=files_of(new)))
    for root, _, names in os.walk(new):
        for path in [root, *(os.path.join(root, n) for n in names)]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    shutil.rmtree(os.path.join(checkpoints, name), ignore_errors=True)
    os.rename(new, os.path.join(checkpoints, name))
    link = os.path.join(checkpoints, '.latest.tmp')
    if os.path.lexists(link):
        os.remove(link)
    os.symlink(name, link)
    os.replace(link, os.path.join(checkpoints, 'latest'))
    if progress['step'] in checkpoint_steps:
        kept = [n for n in complete_checkpoints() if int(n[5:]) in checkpoint_steps][:keep_last or None]
        for n in complete_checkpoints():
            if n not in kept:
                shutil.rmtree(os.path.join(checkpoints, n))


def complete_checkpoints():
    """Names of the checkpoints in out_dir, the newest first."""
    names = os.listdir(checkpoints) if os.path.isdir(checkpoints) else []
    return sorted((n for n in names if re.fullmatch(r'step_\d{8,}', n)), key=lambda n: int(n[5:]), reverse=True)


def load_newest():
    """Load the newest checkpoint that is whole into model, optimizer and progress; its path, or '' without one."""
    for name in complete_checkpoints():
        path = os.path.join(checkpoints, name)
        try:
            saved = read_json(os.path.join(path, 'progress.json'))
            sizes = files_of(path)
            for file, size in saved['files'].items():
                if sizes.get(file) != size:
                    raise ValueError(f'{file} has {sizes.get(file, 0)} of {size} bytes')
            old = read_json(os.path.join(path, 'config.json'))
            check_changed(path, old)
            weights = load_file(os.path.join(path, 'model.safetensors'), device=device)
            state, kept = optimizer_tensors(), read_json(os.path.join(path, 'state', 'model.safetensors.index.json'))
            fresh = state.keys() - kept['weight_map'].keys()    # of parameters that were frozen until now
            dcp.load({k: v for k, v in state.items() if k not in fresh}, no_dist=True,
                     storage_reader=dcp.HuggingFaceStorageReader(os.path.join(path, 'state')))
            raw_model.load_state_dict(weights)      # last: a damaged checkpoint leaves the model as it was
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, dcp.CheckpointException) as error:
            say(f'{path} is damaged and is skipped: {" ".join(str(error).split())[:200]}')
            optimizer.state.clear()
            continue
        progress.update({k: saved[k] for k in progress})
        return path
    return ''


def check_changed(path, old):
    """Refuse to resume with other model settings; print the other settings that changed."""
    for key in (k for k in old if k in config and config[k] != old[k]):
        if key.startswith(('vit.', 'decoder.')) or key in ('task', 'tokenizer', 'lanes', 'pixel_shuffle'):
            fail(f'{key}={config[key]!r}, but {path} was made with {old[key]!r}: a run keeps its model and lanes; give '
                 'another out_dir', 2)
        say(f'changed since {path}: {key} {old[key]!r} -> {config[key]!r}')


def load_weights(path):
    """Weights alone, from a run or a checkpoint: every parameter of the same name. Other shapes are refused."""
    for candidate in (path, os.path.join(path, 'checkpoints', 'latest')):
        file = os.path.join(candidate, 'model.safetensors')
        if os.path.exists(file):
            break
    else:
        fail(f'init_from={path!r}: no model.safetensors there, nor in checkpoints/latest below it', 2)
    try:
        theirs, ours = load_file(file, device=device), raw_model.state_dict()
    except (OSError, SafetensorError) as error:
        fail(f'init_from={path!r}: {file} can not be read ({error})', 2)
    skipped = {k for k in ours if any(re.search(regex, k) for regex in init_skip)}
    common = theirs.keys() & ours.keys() - skipped
    for k in sorted(common):
        if theirs[k].shape != ours[k].shape:
            fail(f'init_from={path!r}: {k} is {tuple(theirs[k].shape)} there and {tuple(ours[k].shape)} here: change '
                 "the model's settings, or name it in init_skip", 2)
    if not common:
        fail(f'init_from={path!r} holds none of the parameters of this model', 2)
    raw_model.load_state_dict({k: theirs[k] for k in common}, strict=False)
    say(f'init_from {file}: {len(common)} tensors ({parts(common)}) loaded, {parts(ours.keys() - common) or "none"} '
        f'begin anew, {parts(theirs.keys() - common) or "none"} left there unused')


def parts(names):
    """The first parts of parameter names: vit, decoder."""
    return ', '.join(sorted({n.partition('.')[0] for n in names}))


def cut_log(step):
    """Drop the rows of steps that the resumed run takes again, and a last row that was cut short."""
    rows = []
    if os.path.exists(log_path):
        with open(log_path, encoding='utf-8') as f:
            for line in f:
                if line.endswith('\n') and json.loads(line)['step'] <= step:
                    rows.append(line)
    with open(log_path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(rows)
    os.replace(log_path + '.tmp', log_path)


progress = dict(step=0, tokens=0, bad_samples=0)
try:
    if master:
        os.makedirs(checkpoints, exist_ok=True)
    if world > 1:
        dist.barrier()
    resumed = load_newest()
    if resumed and resume == 'never':
        fail(f'resume=never, but {resumed} exists: give another out_dir', 2)
    if resumed:
        say(f'resumed from {resumed}')
    elif init_from:
        load_weights(init_from)
    if world > 1:
        dist.barrier()              # all have read before the first writes
    if master:
        for leftover in os.listdir(checkpoints):
            if leftover.startswith('.step_'):
                shutil.rmtree(os.path.join(checkpoints, leftover))
        write_json(os.path.join(out_dir, 'config.json'), config)
        cut_log(progress['step'])
except OSError as error:
    fail(f'out_dir={out_dir!r}: {error}', 2)

model = raw_model
if world > 1:
    model = DistributedDataParallel(raw_model, device_ids=None if device == 'cpu' else [torch.device(device).index])
autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == 'bfloat16')

run = None
if wandb_project and master:
    import wandb
    id_path = os.path.join(out_dir, 'wandb_id')
    if not os.path.exists(id_path):
        write_json(id_path, os.urandom(4).hex())
    run_id = read_json(id_path)         # a resumed run goes on under the same id
    run = wandb.init(project=wandb_project, id=run_id, resume='allow', dir=out_dir, config=config)


def log(row):
    """A row to log.jsonl and wandb."""
    if master:
        try:
            with open(log_path, 'a', encoding='utf-8') as f:
                f.write(json.dumps(row) + '\n')
        except OSError as error:
            fail(f'{log_path} can not be written: {error}', 1)
        if run:
            run.log(row, step=row['step'])


# ----------------------------------------------------------------------------------------------------------------------
# what a step costs, and what the machine could do


def checked(batch):
    """The batch, if its shards could be read."""
    return fail(batch['error'], 1) if 'error' in batch else batch


def to_device(batch):
    return processors.to_device(batch, device, rows_of)


def flops_of_step():
    """Floating point operations of a step: those of one forward pass times three, counted on the first micro-batch."""
    batch = checked(train_data[np.arange(micro_batch)])
    if not batch['num_targets']:
        fail(f'task={task} learns nothing from the first {micro_batch} samples: {(batch["bad"] or ["?"])[0]}', 2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, autocast:
        raw_model.loss(**to_device(batch), **fixed)
    return 3 * counter.get_total_flops() * batch_size // micro_batch


def peak_flops():
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


def memory_gb():
    """The most memory held so far, by the GPU's allocator or by this process."""
    if device != 'cpu':
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    unit = 1 if sys.platform == 'darwin' else 1024      # macOS counts bytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def plot():
    """out_dir/loss.png from log.jsonl."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    with open(log_path, encoding='utf-8') as f:
        rows = [json.loads(line) for line in f]
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


step_flops, peak = flops_of_step(), peak_flops()

# ----------------------------------------------------------------------------------------------------------------------
# validation: every sample of a data set once, whatever the number of ranks


@torch.no_grad()
def validate(name, folder):
    """A row with `val_loss` (mean over targets) and, where it is asked for, `exact_match` (share of samples)."""
    model.eval()
    positions = np.array_split(np.arange(len(folder))[rank::world], math.ceil(len(folder) / world / micro_batch))
    loss, targets, right, samples = 0.0, 0, 0, 0
    for chunk in positions:
        if not len(chunk):          # more ranks than samples
            continue
        batch = checked(val_data[name][chunk])
        if batch['bad']:
            fail(f'validation set {name!r}: {batch["bad"][0]}', 1)
        for part in processors.split(batch, micro_batch):
            tensors = to_device(part)
            with autocast:
                loss_sum, count = raw_model.loss(**tensors, **fixed)
                if task == 'vlm' and exact_match:
                    right += count_right(part, tensors)
            loss, targets = loss + loss_sum.item(), targets + count.item()
        samples += len(chunk)
    model.train()
    loss, targets, right, samples = all_sum(loss, targets, right, samples)
    row = dict(step=progress['step'], val=name, val_loss=loss / max(targets, 1))
    if folder.num_bytes and task == 'llm':
        row['bits_per_byte'] = loss / math.log(2) / folder.num_bytes
    if task == 'siglip':
        row['exact_match'] = nearest_text(folder, val_data[name])
    elif task == 'vlm' and exact_match:
        row['exact_match'] = right / samples
    return row


def count_right(batch, tensors):
    """How many rows are answered to the letter, from the picture and its prompt alone."""
    learned = (tensors['targets'] != -100).int()
    prompts = torch.where(learned.cumsum(1) - learned == 0, tensors['tokens'], tok.pad_id)  # up to the first target
    answers = generate(raw_model, prompts, tensors.get('pixels'), seq_len, eos_id=tok.eos_id, pad_id=tok.pad_id)
    return sum(tok.decode(a) == text for a, text in zip(answers, batch['texts']))


def nearest_text(folder, batches):
    """Share of pictures whose own text, among all texts of the data set, lies nearest."""
    chunks = [checked(batches[c]) for c in np.array_split(np.arange(len(folder)), max(1, len(folder) // micro_batch))]
    texts, names, vectors = [], [], []
    for tensors, batch in ((to_device(b), b) for b in chunks):
        texts.append(raw_model.embed_texts(tensors['tokens'], tensors['segments']))
        vectors.append(raw_model.embed_images(tensors['pixels']))
        names += batch['texts']
    nearest = (torch.cat(vectors) @ torch.cat(texts).T).argmax(1).tolist()
    return sum(names[i] == name for i, name in zip(nearest, names)) / len(names)


# ----------------------------------------------------------------------------------------------------------------------
# the loop

stop = dict(signal=0)
for number in (signal.SIGTERM, signal.SIGINT):      # finish the step, save, exit 0
    signal.signal(number, lambda got, frame: stop.update(signal=got))

first = progress['step']
at_once = batch_size // world if pack else micro_batch      # samples that are read, and packed, together
todo = (p for k in range(first, steps) for p in data.positions_of_step(k, batch_size, at_once, rank, world))
feed = iter(data.loader(train_data, todo, workers))
accumulation = batch_size // world // micro_batch
if master:
    from tqdm import tqdm
    parameters = sum(p.numel() for p in trained) / 1e6
    print(f'{task}: {parameters:.2f} M parameters trained, {steps} steps of {batch_size} samples = {world} ranks x '
          f'{accumulation} x {micro_batch}; {len(mix)} data sets of {dataset_samples} samples, '
          f'{steps * batch_size / dataset_samples:.1f} epochs')
    bar = tqdm(total=steps, initial=first, desc=os.path.basename(out_dir), mininterval=1, dynamic_ncols=True)
since = dict(steps=0, tokens=0, data=0.0, seconds=0.0)
model.train()
while progress['step'] < steps:
    t0 = time.perf_counter()
    read = [checked(next(feed)) for _ in range(batch_size // world // at_once)]
    for line in (line for batch in read for line in batch['bad']):
        print(f'\nbad sample: {line}', file=sys.stderr)
    micro = [part for batch in read for part in processors.split(batch, micro_batch)]
    t1 = time.perf_counter()
    # Counted over all ranks before the backward pass: the gradient is of one mean, however the batch is cut.
    counts = all_ranks(sum(b['num_targets'] for b in read), sum(b['num_tokens'] for b in read),
                       sum(len(b['bad']) for b in read), stop['signal'], len(micro))
    targets, tokens, bad, stopping, _ = counts.sum(0).tolist()
    # Where texts are long or packed a rank may have fewer rows than another: it goes through empty ones.
    passes = int(counts[:, -1].max())
    micro += [processors.collate([], rows_of)] * (passes - len(micro))
    progress['bad_samples'] += int(bad)
    seen = (progress['step'] + 1) * batch_size
    if progress['bad_samples'] > max(1, max_bad_fraction * max(seen, dataset_samples)):
        fail(f'{progress["bad_samples"]} bad samples of {seen} are over max_bad_fraction={max_bad_fraction}; they are '
             'named above: mend the data set or raise the bound', 1)
    if not targets:
        fail(f'no sample of step {progress["step"]} has anything to learn: is seq_len={seq_len} too short?', 1)

    for group in optimizer.param_groups:
        group['lr'] = lr_at(progress['step']) * group['lr_scale']
    torch.manual_seed(int(data.hash64(seed, 5, progress['step'], rank)[0] >> np.uint64(1)))   # dropout's, by the step
    by_part = torch.zeros(2, len(mix), dtype=torch.float64)         # of each data set, losses and targets
    for i, batch in enumerate(micro):
        if world > 1:
            model.require_backward_grad_sync = i == passes - 1      # gradients travel once a step
        tensors = to_device(batch)
        with autocast:
            losses, _ = model(**tensors, **fixed, reduction='none')
        (losses.sum() * (world / targets)).backward()               # DDP divides by world
        part = torch.as_tensor(batch['parts']).to(device).long().expand_as(tensors['targets'])
        part = part[tensors['targets'] != -100]
        by_part += torch.stack((torch.bincount(part, losses.detach().double(), len(mix)),
                                torch.bincount(part, minlength=len(mix)))).cpu()
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf).item()
    by_part = torch.tensor(all_sum(*by_part.flatten().tolist())).view(2, -1)
    loss = by_part[0].sum().item() / targets
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        fail(f'step {progress["step"]}: loss {loss}, gradient norm {grad_norm}. Its samples: python data.py '
             f'{out_dir}/config.json --show_steps={progress["step"]}:{progress["step"] + 1}. Last good checkpoint: '
             f'{(complete_checkpoints() or ["none"])[0]}. Try a lower lr, a longer warmup or dtype=float32', 1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    progress['step'] += 1
    progress['tokens'] += int(tokens)
    t2 = time.perf_counter()
    for key, value in (('steps', 1), ('tokens', tokens), ('data', t1 - t0), ('seconds', t2 - t0)):
        since[key] += value
    step = progress['step']
    if step % log_every == 0 or step == steps:
        seconds, n = since['seconds'], since['steps']
        log(dict(
            step=step, samples=step * batch_size, tokens=progress['tokens'], loss=loss, grad_norm=grad_norm,
            epoch=round(step * batch_size / dataset_samples, 4), lr=lr_at(step - 1),
            samples_per_sec=round(n * batch_size / seconds, 2),
            samples_per_sec_per_gpu=round(n * batch_size / seconds / world, 2),
            tokens_per_sec=round(since['tokens'] / seconds, 1),
            tokens_per_sec_per_gpu=round(since['tokens'] / seconds / world, 1),
            mfu=round(step_flops * n / seconds / peak, 4), data_time=round(since['data'] / n, 5),
            step_time=round(seconds / n, 5), mem_gb=memory_gb(), bad_samples=progress['bad_samples']) | {
                key: value for d, name in enumerate(mix if len(mix) > 1 else ()) for key, value in (
                    (f'loss/{name}', (by_part[0, d] / by_part[1, d]).item()),
                    (f'epoch/{name}', round(order.before(step * batch_size, d) / order.samples[d], 4)))
                if value == value})     # no target of this data set in the step: nan
        since = dict.fromkeys(since, 0)
    if master:
        bar.set_postfix_str(f'loss {loss:.4f}, {batch_size / (t2 - t0):.0f} samples/s', refresh=False)
        bar.update()

    if val and (step == steps or eval_every and step % eval_every == 0):
        for name, folder in val_folders.items():
            row = validate(name, folder)
            log(row)
            if master:
                bar.write(f'step {step}: ' + ', '.join(f'{k} {v:.4f}' if isinstance(v, float) else f'{v}'
                                                       for k, v in row.items() if k != 'step'))
    if step in checkpoint_steps or stopping:
        if master:
            try:
                save_checkpoint()
                plot()
            except (OSError, SafetensorError, dcp.CheckpointException) as error:
                shutil.rmtree(os.path.join(checkpoints, f'.step_{step:08d}.tmp'), ignore_errors=True)
                reason = str(error).strip().splitlines()[-1]        # DCP puts a traceback before it
                fail(f'step {step}: the checkpoint could not be written ({reason}); the last good one is '
                     f'{(complete_checkpoints() or ["none"])[0]}', 1)
        if world > 1:
            dist.barrier()
    if stopping and step < steps:
        say(f'\nstopped by a signal after step {step}, saved; the same command goes on')
        break

if master:
    bar.close()
    if first >= steps:
        print(f'{out_dir} is finished: {first} steps of {steps}')
    if run:
        run.finish()
del feed                                            # closes the workers
if dist.is_initialized():
    dist.destroy_process_group()
