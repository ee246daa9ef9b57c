"""Train a language model, a vision-language model, a vision tower on picture-name pairs, a robot's policy, or text to
image.

    python train.py config/vlm_emoji.py --lr=1e-3
    torchrun --nproc_per_node=2 train.py config/vlm_emoji.py [--fsdp=0]     (DDP, or FSDP2)

The same command resumes where the run stopped. The loss of a step is one mean over all targets of the global batch,
however it is cut into ranks and micro-batches. `step` counts finished steps: the row of log.jsonl with step=101 is of
the step that `data.py --show_steps=100:101` shows.
"""
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import checks
import data
import hf
import hub
import logs
import optim
import processor as processors
import shards
import tokenizer as tokenizers
from checkpoint import write_json
from configurator import configure
from model import DecoderBlock, DecoderConfig, ViTBlock, ViTConfig, generate, positions_where
from tokenizer import read_json

try:
    import diffusion
except ModuleNotFoundError:     # deleted: what is left trains language and vision-language models
    diffusion = None
try:
    import hub_sd
    import sd
except ModuleNotFoundError:     # deleted: no Stable Diffusion
    hub_sd = sd = None
try:
    import actions
    import policies
except ModuleNotFoundError:     # deleted: no robots
    actions = policies = None

# ----------------------------------------------------------------------------------------------------------------------
# settings

# what is trained, and where it goes
task = 'vlm'                        # vlm | llm | siglip | policy | vla | t2i
#                                     siglip: a vision tower on picture-name pairs; policy: a robot's actions, by
#                                     diffusion; vla: a vlm with an action expert; t2i: text to image
vit = ViTConfig()
decoder = DecoderConfig()           # siglip, t2i: the text tower
pixel_shuffle = 1                   # vlm: squares of so many patches a side become one image token
connector_bias = True               # vlm: of the linear layer between vit and decoder
pair_scale = 10.0                   # siglip: the factor of the cosines at the start
pair_with = 'batch'                 # siglip: batch: a picture is compared with the texts of its batch | all: of the mix
pair_bias = -10.0                   # siglip: the logit of a pair at the start, near the log-odds of a match
policy = policies.PolicyConfig() if policies else {}      # task=policy
vla = policies.VLAConfig() if policies else {}            # task=vla, beside vit and decoder
dit = diffusion.DiTConfig() if diffusion else {}          # task=t2i, beside decoder
denoiser = 'dit'                    # t2i: dit | unet (Stable Diffusion: unet, clip and vae; of dit image_size, the rows
#                                     of a latent, and drop)
unet = sd.UNetConfig() if sd else {}
clip = sd.CLIPTextConfig() if sd else {}
vae = sd.VAEConfig() if sd else {}                        # of unet, and of dit with dit.vae
out_dir = 'out/run'                 # config.json, log.jsonl, loss.png, checkpoints/
resume = 'auto'                     # auto: from the newest checkpoint in out_dir | never: refuse if there is one
init_from = ''                      # weights to start from: a run's out_dir or one of its checkpoints, also as a URL;
#                                     a folder of transformers, or its name on the Hugging Face hub; unet: a folder of
#                                     diffusers
init_skip = []                      # regexes of parameters that init_from leaves as they are
# data
data_dir = 'datasets'               # where data sets are: here, or there beside the scripts
mix = {'emoji/noto': 1.0}           # data set -> sampling weight; a folder, .tar, list of them (.txt), with commas and
#                                     {000..099} between, local or a URL
val = {}                            # name -> data set that is validated on, whole
cache_dir = shards.CACHE            # indexes of shards, and copies of remote ones
cache_gb = 100.0                    # of copies
tokenizer = 'bytes'                 # bytes | a .model (sentencepiece), .tiktoken or tokenizer.json file or a folder of
#                                     one, in data_dir or as a path | a model on the Hugging Face hub
processor = 'auto'                  # how a sample is written as tokens: paligemma | text | chat | gemma | llava |
#                                     smolvlm | t2i | a model folder, or one on the Hugging Face hub |
#                                     file.py:function; auto: by task
prompt = ''                         # vlm: between a picture and its answer; t2i: a caption, as '{style}: {text}'
#                                     of what the sample and its .json hold (empty: '{text}')
image_mean = 0.5                    # subtracted from pixels of 0 to 1 (1.0: white is 0)
image_std = 0.5                     # and what they are then divided by
image_draft = True                  # JPEGs may be decoded at 1/2, 1/4 or 1/8, where that is at least vit.image_size
action_steps = 0                    # policy, vla: actions of a chunk; a sample is padded to so many
action_dim = 0                      # of so many numbers,
proprio_dim = 0                     # and the state to so many
cameras = []                        # names of the pictures of every sample, in this order; [] those that it has
stats = ''                          # a stats.json of prepare/stats.py; empty: the one beside the data set
normalize = 'quantile'              # actions and states: quantile (1 %, 99 % to -1, 1) | min_max | mean_std | none
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
optimizer = 'adamw'                 # adamw | muon (torch.optim.Muon for the matrices of the blocks, adamw for the rest)
lr = 1e-3                           # peak learning rate
schedule = 'cosine'                 # cosine | linear | constant | wsd (warm-up, stable, decay)
min_lr = 0.0                        # at the end of the schedule, as a fraction of lr
warmup = 0.05                       # below 1: a fraction of the run, else steps
decay = 0.2                         # wsd: the last part of the run, in which lr falls on a line
betas = (0.9, 0.95)
weight_decay = 0.1
grad_clip = 1.0                     # 0: none
groups = [(r'norm|bias|scale|pos_embed|embedding', {'weight_decay': 0.0}), (r'.*', {})]  # the first regex found in a
#                                     parameter's name sets its lr_scale, weight_decay, freeze
ema = 0.0                           # decay of a moving average of the weights, kept and saved beside them (0: none)
# loss
loss_weights = {}                   # data set of the mix -> what its targets weigh (1.0)
action_weight = 1.0                 # vla: of the mean over actions, beside the mean over text
label_smoothing = 0.0
z_loss = 0.0                        # weight of log(sum of exponentials)^2, which keeps logits small
skip_bad_steps = 0                  # so many steps in a row may have a loss or gradient that is not finite
# precision and devices
dtype = 'float32'                   # float32 | bfloat16 | float16: of the compute; weights and optimizer stay float32
matmul = 'highest'                  # highest: float32 means float32 | high: TensorFloat-32 | medium: bfloat16
compile = False                     # torch.compile the blocks
fsdp = 1                            # ranks that share one copy of weights and optimizer: 1: each has its own (DDP) |
#                                     0: all share one (FSDP2) | between: several copies (HSDP)
deterministic = False               # only operations that give the same bits every time
device = 'auto'                     # auto: cuda if there is one, else cpu
seed = 0
# logs and checkpoints
log_every = 10                      # steps
eval_every = 0                      # steps (0: only at the end)
exact_match = True                  # vlm: validation also generates, and counts answers that are right to the letter
num_checkpoints = 1                 # exactly so many, evenly spaced, the last at the end
keep_last = 0                       # checkpoints kept on disk (0: all)
remote = ''                         # URL (s3://..., any fsspec) that gets a copy of checkpoints and logs, and fills an
#                                     out_dir that has none
wandb_project = ''                  # empty: no wandb; WANDB_MODE=offline needs no network

config = configure(globals())
warnings.filterwarnings('ignore', 'torch.distributed is disabled')   # where a checkpoint is written by one process

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
    # after a restart torchrun may give the same store, which still knows the addresses of the dead
    store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), next(dist.rendezvous('env://'))[0])
    backend = 'gloo' if device == 'cpu' else 'cpu:gloo,cuda:nccl'
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def say(message):
    """Print, on one rank."""
    if master:
        print(message, flush=True)


def all_ranks(*values):
    """Every rank's values, in fp64: (ranks, values)."""
    t = torch.zeros(world, len(values), dtype=torch.float64)       # on the CPU: the GPU need not wait
    t[rank] = torch.tensor(values, dtype=torch.float64)
    if world > 1:
        dist.all_reduce(t)
    return t


def all_sum(*values):
    """Sums over the ranks, in fp64."""
    return all_ranks(*values).sum(0).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# checks that need no data

try:
    checks.check(SimpleNamespace(**config), world)
except ValueError as error:
    fail(error, 2)
micro_batch = micro_batch_size or batch_size // world

torch.set_float32_matmul_precision(matmul)
torch.backends.cudnn.allow_tf32 = matmul != 'highest'
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)

# ----------------------------------------------------------------------------------------------------------------------
# data, tokenizer, model

try:
    folders, order = data.open_mix(mix, data_dir, seed, lanes, window, cache_dir, cache_gb)
    val_folders = {name: shards.Folder(path, data_dir, cache_dir, cache_gb) for name, path in val.items()}
    tok = tokenizers.load(tokenizer if tokenizer == 'bytes' else hub.locate(tokenizer, data_dir, 'tokenizer'))
    torch.manual_seed(seed)                         # the same weights on every rank
    raw_model = checkpoint.build_model(config, tok).to(device)
    image_tokens = checkpoint.image_tokens(raw_model)
    files = {}                                      # of a model folder's processor: every checkpoint keeps them
    if processors.is_folder(processor):
        folder = hub.locate(processor, data_dir, 'processor')
        files = {name: os.path.join(folder, name) for name in processors.FILES
                 if os.path.exists(os.path.join(folder, name))}
        processor = folder
    rows_of = processors.build(config | dict(processor=processor), tok, image_tokens)
    known, units = {}, None                         # statistics, and what turns a robot's numbers into the model's
    if task in ('policy', 'vla'):
        known = data.read_stats(folders, stats)
        units = actions.Units(known, normalize, action_steps, action_dim, proprio_dim).to(device)
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
# what is trained

try:
    options = optim.match(groups, [name for name, _ in raw_model.named_parameters()])
except ValueError as error:
    fail(error, 2)
for name, parameter in raw_model.named_parameters():
    parameter.requires_grad_(parameter.requires_grad and not options[name].get('freeze'))


autocast = torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != 'float32')


def checked(batch):
    """The batch, if its shards could be read."""
    return fail(batch['error'], 1) if 'error' in batch else batch


def to_device(batch):
    tensors = processors.to_device(batch, device, rows_of)
    low = tensors.pop('lowdim', None)
    if units and low:
        keys = diffusion.random_keys(seed, low['positions'])        # a sample's noise and times, whoever draws them
        tensors['lowdim'] = units.encode(low) | dict(keys=keys)
    if task == 't2i':
        tensors['keys'] = diffusion.random_keys(seed, tensors.pop('positions'))
    return tensors


# what is learned of a batch, each a mean of its own, and what that weighs
kinds = {'policy': {'actions': 1.0}, 'vla': {'text': 1.0, 'actions': action_weight}}.get(task, {'text': 1.0})


def count_learned(batch):
    """Targets of text and numbers of actions in a batch, as far as they are learned."""
    low = batch.get('lowdim')
    numbers = 0 if low is None else int(((~low['is_pad']).sum(1) * low['action_mask'].sum(1)).sum())
    return [batch['num_targets'] if kind == 'text' else numbers for kind in kinds]


def total(sums, counts):
    """The loss: means over all targets of the global batch, weighed. sums and counts: one for each of `kinds`."""
    return sum(weight * a / max(n, 1) for weight, a, n in zip(kinds.values(), sums, counts))


def count_targets(batch):
    """Targets of a batch, counted here, so that a GPU need not be asked."""
    if 'ids' in batch:
        return processors.count_tokens(batch['ids'], seq_len, tok, document_attention)[1]
    return int((batch['targets'] != -100).sum())


def flops_of_step():
    """Floating point operations of a step: those of one forward pass times three, counted on the first micro-batch."""
    batch = checked(train_data[np.arange(micro_batch)])
    if not any(count_learned(batch)):
        fail(f'task={task} learns nothing from the first {micro_batch} samples: {(batch["bad"] or ["?"])[0]}', 2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, autocast:
        raw_model.loss(**to_device(batch), **fixed)
    return 3 * counter.get_total_flops() * batch_size // micro_batch


step_flops = flops_of_step()            # before compiled blocks, whose operations are not counted

# ----------------------------------------------------------------------------------------------------------------------
# over the ranks: DDP, or FSDP2 block by block; compiled block by block

block_kinds = (ViTBlock, DecoderBlock, *((diffusion.DenoiserBlock, diffusion.JointBlock) if diffusion else ()),
               *((sd.ResnetBlock, sd.SpatialTransformer, sd.CLIPBlock) if sd else ()),
               *((policies.ConvBlock,) if policies else ()))
model, blocks = raw_model, [m for m in raw_model.modules() if isinstance(m, block_kinds)]
blocks += [layer for m in raw_model.modules() if isinstance(m, hf.KINDS) for layer in hf.layers_of(m)]
if compile:
    torch._dynamo.config.allow_unspec_int_on_nn_module = True       # one graph for all layers, whatever their number
    for block in blocks:
        block.forward = torch.compile(block.forward)        # inside what FSDP puts around a block
sharded = fsdp != 1 and world > 1
if sharded:
    shape = (world,) if fsdp in (0, world) else (world // fsdp, fsdp)
    mesh = init_device_mesh(torch.device(device).type, shape, mesh_dim_names=('replicate', 'shard')[-len(shape):])
    for module in (*blocks, raw_model):
        fully_shard(module, mesh=mesh)          # gathered in fp32, so that DDP computes the same
elif denoiser == 'unet':
    raw_model.to(memory_format=torch.channels_last)     # what convolutions are fastest with, and FSDP can not shard
if world > 1 and not sharded:
    model = DistributedDataParallel(raw_model, device_ids=None if device == 'cpu' else [torch.device(device).index])
trained = {name: p for name, p in raw_model.named_parameters() if p.requires_grad}
averages = {name: p.detach().clone() for name, p in trained.items()} if ema else {}

optimizers = optim.build(optimizer, trained, options, lr, betas, weight_decay)


def lr_at(step):
    """Linear warm-up to lr, then as `schedule` says down to min_lr * lr."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    x = (step - warmup_steps) / max(1, steps - warmup_steps)        # 0 to 1
    left = {'cosine': 0.5 * (1 + math.cos(math.pi * x)), 'linear': 1 - x, 'constant': 1.0,
            'wsd': min(1.0, (steps - step) / (decay * steps))}[schedule]
    return lr * (min_lr + (1 - min_lr) * left)


# ----------------------------------------------------------------------------------------------------------------------
# begin, or go on: checkpoint.py holds how they are written and read

log_path, checkpoints = os.path.join(out_dir, 'log.jsonl'), os.path.join(out_dir, 'checkpoints')
progress = dict(step=0, tokens=0, bad_samples=0, bad_steps=0, loss_scale=2.0 ** 16 if dtype == 'float16' else 1.0,
                good_steps=0)


def from_master(value):
    """What the first rank has, on every rank."""
    if world > 1:
        box = [value]
        dist.broadcast_object_list(box, device=torch.device('cpu'))
        value = box[0]
    return value


def find_checkpoint():
    """(path, its progress, '') of the newest checkpoint, from `remote` where out_dir has none; or an error, last."""
    try:
        if remote and not checkpoint.names(checkpoints):
            checkpoint.restore(remote, out_dir)
        return *checkpoint.newest(checkpoints, say), ''
    except (ValueError, OSError) as error:
        return '', {}, str(error)


def load_checkpoint(path, saved):
    """Weights, averages, optimizer and progress of a checkpoint, whatever number of ranks wrote it."""
    check_changed(path, read_json(os.path.join(path, 'config.json')))
    checkpoint.load(raw_model.state_dict(), path)
    if ema:
        old = os.path.join(path, 'ema')
        kept = checkpoint.shapes(old) if os.path.isdir(old) else {}
        checkpoint.load({k: v for k, v in averages.items() if k not in kept}, path)     # frozen until now
        checkpoint.load({k: v for k, v in averages.items() if k in kept}, old)
    state, kept = optim.state_tensors(optimizers, trained), checkpoint.shapes(os.path.join(path, 'state'))
    state = {k: v for k, v in state.items() if k in kept}           # others were frozen until now
    checkpoint.load(state, os.path.join(path, 'state'))
    progress.update({k: saved[k] for k in progress if k in saved})


def check_changed(path, old):
    """Refuse to resume with other model settings; print the other settings that changed."""
    for key in (k for k in old if k in config and config[k] != old[k]):
        model_settings = ('vit.', 'decoder.', 'dit.' if task == 't2i' else f'{task}.', 'unet.', 'clip.', 'vae.')
        if key.startswith(model_settings) and not key.endswith('.remat') or key in (
                'task', 'denoiser', 'tokenizer', 'lanes', 'pixel_shuffle', 'connector_bias', 'optimizer',
                'action_steps', 'action_dim', 'proprio_dim', 'normalize'):
            fail(f'{key}={config[key]!r}, but {path} was made with {old[key]!r}: a run keeps its model and lanes; give '
                 'another out_dir', 2)
        say(f'changed since {path}: {key} {old[key]!r} -> {config[key]!r}')


def load_weights(path):
    """Weights alone, of a run or a checkpoint (every parameter of the same name), or of a model of transformers."""
    folder = path
    try:
        if shards.is_url(path):
            folder = os.path.join(os.path.expanduser(cache_dir), 'weights', f'{data.hash64(*path.encode())[0]:016x}')
            if int(os.environ.get('LOCAL_RANK', 0)) == 0:
                checkpoint.download(path, folder, ('model.safetensors',))
            if world > 1:
                dist.barrier()
            folder = os.path.join(folder, next(iter(checkpoint.names(folder)), ''))
        # a language or vision-language model begins what reads for a denoiser
        inside = '' if checkpoint.has_denoiser(folder) else 'text' if task == 't2i' else (
            'encoder' if task == 'policy' and policy.encoder != 'none' else '')
        target, prefix = (getattr(raw_model, inside), inside + '.') if inside else (raw_model, '')
        if hub_sd and hub_sd.is_folder(folder):
            loaded, unused, prefix = hub_sd.load(raw_model, folder, init_skip), set(), ''
        elif hub.is_foreign(folder):
            loaded, unused = hub.load(target, hub.fetch(folder), init_skip), set()
        else:
            loaded, unused = checkpoint.load_weights(target, folder, init_skip)
        loaded = {prefix + name for name in loaded}
    except checkpoint.ERRORS as error:
        fail(f'init_from={path!r}: {error}', 2)
    fresh, parts = raw_model.state_dict().keys() - loaded, checkpoint.parts
    say(f'init_from {folder}: {len(loaded)} tensors ({parts(loaded)}) loaded, {parts(fresh) or "none"} begin anew, '
        f'{parts(unused) or "none"} left there unused')
    if ema:
        for name, p in trained.items():
            averages[name].copy_(p.detach())


try:
    if master:
        os.makedirs(checkpoints, exist_ok=True)
    resumed, saved, problem = from_master(find_checkpoint() if master else None)
    if problem:
        fail(problem, 2)
    if resumed and resume == 'never':
        fail(f'resume=never, but {resumed} exists: give another out_dir', 2)
    if resumed:
        load_checkpoint(resumed, saved)
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
        write_json(os.path.join(out_dir, 'environment.json'), logs.environment(device, world))
        logs.cut_log(log_path, progress['step'])
except checkpoint.ERRORS as error:
    fail(f'out_dir={out_dir!r}: {str(error).strip().splitlines()[-1]}', 2)
copy = None
if remote and master:
    from remote import Mirror
    copy = Mirror(remote, out_dir, say)


def save():
    """Begin to write the checkpoint of this step."""
    weights = raw_model.state_dict()
    copies = files | {'tokenizer.json' if path == tok.files[0] and path.endswith('.json') else os.path.basename(path):
                      path for path in tok.files}
    saver.save(progress['step'], weights, averages, optim.state_tensors(optimizers, trained), {
        'config.json': config, 'progress.json': progress | dict(world=world),
        'shards.json': data.provenance(order, folders, progress['step'] * batch_size) if master else {}}
        | ({'stats.json': known} if known else {}), copies)


def saving(action):
    """`action` of the saver; what went wrong while it wrote ends the run, the last good checkpoint stays."""
    try:
        action()
    except checkpoint.ERRORS as error:
        reason = str(error).strip().splitlines()[-1]        # DCP puts a traceback before it
        last = (checkpoint.names(checkpoints) or ['none'])[0]
        fail(f'step {saver.step}: the checkpoint could not be written ({reason}); the last good one is {last}', 1)


run = None
if wandb_project and master:
    import wandb
    id_path = os.path.join(out_dir, 'wandb_id')
    if not os.path.exists(id_path):
        write_json(id_path, os.urandom(4).hex())
    with open(id_path, encoding='utf-8') as f:
        run_id = json.load(f)           # a resumed run goes on under the same id
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


peak = logs.peak_flops(device, dtype, world)
saver = checkpoint.Saver(out_dir, checkpoint_steps, keep_last, copy, rank, world,
                         lambda: logs.plot(out_dir, val))
if copy:
    copy.wake(checkpoint.names(checkpoints))    # what an earlier session did not bring there

# ----------------------------------------------------------------------------------------------------------------------
# validation: every sample of a data set once, whatever the number of ranks


def swap_averages():
    """Weights and their averages change places: what is validated is the average, where there is one."""
    with torch.no_grad():
        for name, average in averages.items():
            weights = trained[name].clone()
            trained[name].copy_(average)
            average.copy_(weights)
    for module in raw_model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()        # what it gathered before is of the other weights


@contextlib.contextmanager
def gathered():
    """Every rank holds the whole model meanwhile: what runs inside need not be the same on all of them."""
    modules = [m for m in raw_model.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in modules:
        module.reshard()
        module.set_reshard_after_forward(module is not raw_model, recurse=False)


@torch.no_grad()
def validate(name, folder):
    """A row with `val_loss` (mean over targets) and, where it is asked for, `exact_match` (share of samples)."""
    model.eval()
    swap_averages()
    positions = np.array_split(np.arange(len(folder))[rank::world], math.ceil(len(folder) / world / micro_batch))
    sums, counts, right, samples = [0.0] * len(kinds), [0] * len(kinds), 0, 0
    for chunk in positions:
        batch = checked(val_data[name][chunk]) if len(chunk) else processors.collate([], rows_of) | dict(bad=[])
        if batch['bad']:
            fail(f'validation set {name!r}: {batch["bad"][0]}', 1)
        cut = processors.split(batch, micro_batch)
        cut += [processors.collate([], rows_of)] * int(all_ranks(len(cut)).max() - len(cut))    # ranks keep step
        cut = [(part, to_device(part)) for part in cut]
        for _, tensors in cut:
            with autocast:
                out = model(**tensors, **fixed)
            for k, (loss_sum, count) in enumerate(out if len(kinds) > 1 else (out,)):
                sums[k], counts[k] = sums[k] + loss_sum.item(), counts[k] + int(count)
        if task == 'vlm' and exact_match:
            with autocast, gathered():
                right += sum(count_right(*one) for one in cut if (one[1]['targets'] != -100).any())
        samples += len(chunk)
    row = dict(step=progress['step'], val=name)
    if task == 'siglip':
        with gathered():
            row['exact_match'] = nearest_text(folder, val_data[name])
    swap_averages()
    model.train()
    right, samples, *both = all_sum(right, samples, *sums, *counts)
    row['val_loss'] = total(both[:len(kinds)], both[len(kinds):])
    if folder.num_bytes and task == 'llm':
        row['bits_per_byte'] = both[0] / math.log(2) / folder.num_bytes
    if task == 'vlm' and exact_match:
        row['exact_match'] = right / samples
    return row


def count_right(batch, tensors):
    """How many rows are answered to the letter, from the picture and its prompt alone."""
    learned = (tensors['targets'] != -100).int()
    prompts = torch.where(learned.cumsum(1) - learned == 0, tensors['tokens'], tok.pad_id)  # up to the first target
    answers = generate(raw_model, prompts, tensors.get('pixels'), seq_len, eos_id=rows_of.end_id, pad_id=tok.pad_id)
    return sum(tok.decode(a).strip() == text for a, text in zip(answers, batch['texts']))


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
    parameters = sum(p.numel() for p in trained.values()) / 1e6
    print(f'{task}: {parameters:.2f} M parameters trained, {steps} steps of {batch_size} samples = {world} ranks x '
          f'{accumulation} x {micro_batch}; {len(mix)} data sets of {dataset_samples} samples, '
          f'{steps * batch_size / dataset_samples:.1f} epochs')
    bar = tqdm(total=steps, initial=first, desc=os.path.basename(out_dir), mininterval=1, dynamic_ncols=True)
since = dict(steps=0, tokens=0, data=0.0, seconds=0.0)
weights_of_sets = np.array([float(loss_weights.get(name, 1.0)) for name in mix])
weigh = torch.tensor(weights_of_sets, dtype=torch.float32, device=device)
extra = dict(label_smoothing=label_smoothing, z_loss=z_loss) if task in ('llm', 'vlm', 'vla') else {}


def losses_of(batch):
    """[(losses, what each of them counts, its data set), ...] of a micro-batch, for each of `kinds`."""
    tensors, count, found = to_device(batch), count_targets(batch), []
    with autocast:
        out = model(**tensors, **fixed, **extra, reduction='none', num_targets=count)
    parts = torch.as_tensor(batch['parts']).to(device, non_blocking=True).int()
    for kind, (losses, counts) in zip(kinds, out if len(kinds) > 1 else (out,)):
        if kind == 'text':
            part = parts.expand_as(tensors['targets']).flatten()[positions_where(tensors['targets'] != -100, count)]
            counts = torch.ones_like(losses)
        else:                           # a rank without actions goes through one that counts nothing
            part = parts[tensors['lowdim']['rows'], 0] if 'lowdim' in tensors else parts[:1, 0]
        found.append((losses, counts, part))
    return found


model.train()
while progress['step'] < steps:
    t0 = time.perf_counter()
    read = [checked(next(feed)) for _ in range(batch_size // world // at_once)]
    for line in (line for batch in read for line in batch['bad']):
        print(f'\nbad sample: {line}', file=sys.stderr)
    micro = [part for batch in read for part in processors.split(batch, micro_batch)]
    t1 = time.perf_counter()
    # Counted over all ranks before the backward pass: the gradient is of one mean, however the batch is cut.
    counts = all_ranks(*np.sum([count_learned(b) for b in read], 0), sum(b['num_tokens'] for b in read),
                       sum(len(b['bad']) for b in read), stop['signal'], len(micro))
    *learned, tokens, bad, stopping, _ = counts.sum(0).tolist()
    # Where texts are long or packed a rank may have fewer rows than another: it goes through empty ones.
    passes = int(counts[:, -1].max())
    micro += [processors.collate([], rows_of)] * (passes - len(micro))
    progress['bad_samples'] += int(bad)
    seen = (progress['step'] + 1) * batch_size
    if progress['bad_samples'] > max(1, max_bad_fraction * max(seen, dataset_samples)):
        fail(f'{progress["bad_samples"]} bad samples of {seen} are over max_bad_fraction={max_bad_fraction}; they are '
             'named above: mend the data set or raise the bound', 1)
    if not any(learned):
        fail(f'no sample of step {progress["step"]} has anything to learn: is seq_len={seq_len} too short?', 1)

    torch.manual_seed(int(data.hash64(seed, 5, progress['step'], rank)[0] >> np.uint64(1)))   # dropout's, by the step
    by_part = torch.zeros(len(kinds), 2, len(mix), dtype=torch.float64, device=device)  # losses and counts, by data set
    for i, batch in enumerate(micro):
        if sharded:                                                 # gradients travel once a step
            model.set_requires_gradient_sync(i == passes - 1)
        elif world > 1:
            model.require_backward_grad_sync = i == passes - 1
        found = losses_of(batch)
        # the mean over the ranks, which DDP and FSDP take, is to be the sum
        (total([(losses * weigh[part]).sum() for losses, _, part in found], learned) * (
            world * progress['loss_scale'])).backward()
        for k, (losses, counted, part) in enumerate(found):
            by_part[k].index_add_(1, part, torch.stack((losses.detach().double(), counted.double())))
    if progress['loss_scale'] != 1:
        torch._foreach_mul_([p.grad for p in trained.values() if p.grad is not None], 1 / progress['loss_scale'])
    grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), grad_clip or math.inf)
    grad_norm = (grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm).item()
    by_part = np.array(all_sum(*by_part.flatten().tolist())).reshape(len(kinds), 2, -1)
    loss = float(total(by_part[:, 0] @ weights_of_sets, learned))
    if math.isfinite(loss) and math.isfinite(grad_norm):
        for opt in optimizers:
            for group in opt.param_groups:
                group['lr'] = lr_at(progress['step']) * group['lr_scale']
            opt.step()
        if ema:
            torch._foreach_lerp_([*averages.values()], [p.detach() for p in trained.values()], 1 - ema)
        progress['bad_steps'], progress['good_steps'] = 0, progress['good_steps'] + 1
        if dtype == 'float16' and progress['good_steps'] % 2000 == 0:
            progress['loss_scale'] *= 2
    elif math.isfinite(loss) and progress['loss_scale'] > 1:        # fp16 overflows: a smaller scale, and on
        progress['loss_scale'], progress['good_steps'] = progress['loss_scale'] / 2, 0
    else:
        progress['bad_steps'] += 1
        where = (f'step {progress["step"]}: loss {loss}, gradient norm {grad_norm}. Its samples: python data.py '
                 f'{out_dir}/config.json --show_steps={progress["step"]}:{progress["step"] + 1}')
        if progress['bad_steps'] > skip_bad_steps:
            saving(saver.wait)
            fail(f'{where}. Last good checkpoint: {(checkpoint.names(checkpoints) or ["none"])[0]}. Try a lower lr, a '
                 'longer warmup, dtype=float32, or skip_bad_steps', 1)
        say(f'\n{where}. The weights stay as they are')
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)

    progress['step'] += 1
    progress['tokens'] += int(tokens)
    saving(saver.check)
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
            step_time=round(seconds / n, 5), mem_gb=logs.memory_gb(device), bad_samples=progress['bad_samples']) | {
                key: value for d, name in enumerate(mix if len(mix) > 1 else ()) for key, value in (
                    (f'loss/{name}', float(total(by_part[:, 0, d], by_part[:, 1, d]))),
                    (f'epoch/{name}', round(order.before(step * batch_size, d) / order.samples[d], 4)))
                if by_part[:, 1, d].any() or key.startswith('epoch')}
            | {f'loss/{kind}': float(a.sum() / max(n.sum(), 1)) for kind, (a, n) in zip(kinds, by_part)
               if len(kinds) > 1}
            | ({'loss_scale': progress['loss_scale']} if dtype == 'float16' else {}))
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
        saving(save)
    if step == steps or stopping:
        saving(saver.wait)
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
if world > 1:
    dist.barrier()
problem = copy.finish() if copy else ''
if problem:
    fail(f'{problem}; {out_dir} is whole, the same command tries again', 1)
if dist.is_initialized():
    dist.destroy_process_group()
