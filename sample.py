"""Use a trained run: what it can do is its task's (tasks/*.py), and so are most of the settings.

    python sample.py --out_dir=out/llm_tiny --prompt='Once upon'
    python sample.py --model=HuggingFaceTB/SmolLM2-135M-Instruct --chat=true
    python sample.py --model=folder --prompts=in.jsonl --out=out.jsonl
    python sample.py --out_dir=out/vlm_emoji --image=a.png [--prompt=...] [--json=true]
    python sample.py --out_dir=out/vlm_emoji --eval=mix,fluent-emoji-flat
    python sample.py --out_dir=out/t2i_emoji --prompt='noto: red apple' --n=16
    python sample.py --out_dir=out/policy_metaworld_state --env=metaworld --episodes=20
    python sample.py --out_dir=out/policy_metaworld_state --serve_policy=8000
    python sample.py --out_dir=out/vlm_emoji --help         (all that this run knows)

A run that somebody else made may name code, as `task: mine.py`: --allow_code=true lets it run.
"""
import json as jsons
import os
import re
import sys
from types import SimpleNamespace

from configurator import answer_help, configure

# what is used
out_dir = 'out/vlm_emoji'   # a run
model = ''                  # or any model instead: a run, a checkpoint, a folder of transformers
#                             or diffusers, a repository of the Hugging Face hub
checkpoint = 'latest'       # one of its checkpoints
ema = True                  # the moving average of the weights, where the run kept one
device = 'auto'             # auto: cuda if there is one, else cpu
dtype = 'auto'              # of the weights of a model of others: float32, bfloat16, float16;
#                             auto: as its files have them

# how
batch_size = 64             # rows at once
seed = 0
json = False                # one JSON object a line instead of text
adopt = []                  # code of yours (a task, a form) taken as it is now, by name, where the
#                             run keeps it as it was
data_dir = ''               # where --eval looks for its data sets (empty: the run's own)


def fail(message, code=2):
    print(f'sample.py: {" ".join(str(message).split())}', file=sys.stderr)
    sys.exit(code)


def given(name, default):
    """The value of a flag, before all flags are read: the run says which there are."""
    for argument in sys.argv[1:]:
        if argument.startswith(f'--{name}='):
            default = argument.partition('=')[2]
    return default


def newest(folder):
    """The name of the newest of a run's checkpoints, whether there is a link to it or not."""
    names = []
    if os.path.isdir(folder):
        names = [name for name in os.listdir(folder) if re.fullmatch(r'step_\d{8,}', name)]
    return max(names, key=lambda name: (len(name), name), default='latest')


def task_of(folder):
    """The task of a checkpoint's config.json, '' without one; a file of yours as it keeps it."""
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
            task = str(jsons.load(file).get('task', ''))
    except (OSError, ValueError, AttributeError):
        return ''
    name = os.path.basename(task)
    kept = os.path.join(folder, name)
    is_kept = task.endswith('.py') and os.path.isfile(kept)
    return kept if is_kept and name not in given('adopt', '') else task


_model, _name = given('model', model), given('checkpoint', checkpoint)
if _model and given('out_dir', ''):
    fail(f'--model={_model} and --out_dir={given("out_dir", "")}: give one of them')
_folder = os.path.expanduser(_model or given('out_dir', out_dir))
_checkpoints = os.path.join(_folder, 'checkpoints')
_checkpoint = os.path.join(_checkpoints, newest(_checkpoints) if _name == 'latest' else _name)
if _model and not os.path.isdir(_checkpoints):
    _checkpoint = _folder
_task = task_of(_checkpoint)
answer_help(__file__, task=_task, task_class='SampleSettings')     # before torch is imported

import torch

import hub
import parallel
from asking import wanted_by
from shards import BadSample
from tasks import body_of, load, that_have
from usage import printing

try:
    if not _task:
        _checkpoint = hub.fetch(_folder) if hub.is_foreign(_folder) else _checkpoint
        _task = hub.task_of(_checkpoint)
except (ValueError, OSError) as error:
    fail(f'{error}: train first, or give --out_dir and --checkpoint')
try:
    hub.check_code(_checkpoint)         # before it is run
    _body = body_of(load(_task).SampleSettings)
    # a model with words may say how it wants to be asked
    _wanted, _said = {}, ''
    if 'temperature' in _body:
        _wanted, _said = wanted_by(_checkpoint, sys.argv[1:])
    globals().update(_body | _wanted)
except (ValueError, OSError) as error:
    fail(error)
options = SimpleNamespace(**configure(
    globals(), elsewhere=lambda key: that_have(key, 'SampleSettings')))
options.out_dir = _folder
if _said:
    print(_said, file=sys.stderr)
if options.dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
    fail(f'dtype={options.dtype!r}: expected auto, float32, bfloat16 or float16')
if options.batch_size < 1:
    fail(f'batch_size={options.batch_size} must be at least 1')
if options.device == 'auto':
    options.device = 'cuda' if torch.cuda.is_available() else 'cpu'

try:
    parallel.check(vars(options))
except ValueError as error:
    fail(error)
torch.set_grad_enabled(False)       # a task of yours need not think of it
try:
    run = hub.open_run(_checkpoint, options.device, options.ema, options.adopt, options.dtype)
except (ValueError, OSError) as error:
    fail(f'{error}: train first, or give --out_dir and --checkpoint')
try:
    with printing():
        run.task.sample(run, options)
except (ValueError, ImportError) as error:
    fail(error)
except (OSError, BadSample) as error:
    fail(error, 1)
