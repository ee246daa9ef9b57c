"""Use a trained run: what it can do is its task's (tasks/*.py), and so are most of the settings.

    python sample.py --out_dir=out/llm_tiny --prompt='Once upon'
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
out_dir = 'out/vlm_emoji'   # a run, or a folder of diffusers
checkpoint = 'latest'       # one of its checkpoints
ema = True                  # the moving average of the weights, where the run kept one
device = 'auto'             # auto: cuda if there is one, else cpu

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


_folder = os.path.expanduser(given('out_dir', out_dir))
_checkpoints = os.path.join(_folder, 'checkpoints')
_name = given('checkpoint', checkpoint)
_checkpoint = os.path.join(_checkpoints, newest(_checkpoints) if _name == 'latest' else _name)
_task = task_of(_checkpoint)
answer_help(__file__, task=_task, task_class='SampleSettings')     # before torch is imported

import torch

import hub
import parallel
from shards import BadSample
from tasks import body_of, load, that_have
from usage import printing

try:
    if not _task:
        _checkpoint = _folder if hub.is_foreign(_folder) else _checkpoint
        _task = hub.task_of(_checkpoint)
except (ValueError, OSError) as error:
    fail(f'{error}: train first, or give --out_dir and --checkpoint')
try:
    hub.check_code(_checkpoint)         # before it is run
    globals().update(body_of(load(_task).SampleSettings))
except (ValueError, OSError) as error:
    fail(error)
options = SimpleNamespace(**configure(
    globals(), elsewhere=lambda key: that_have(key, 'SampleSettings')))
if options.batch_size < 1:
    fail(f'batch_size={options.batch_size} must be at least 1')
if options.device == 'auto':
    options.device = 'cuda' if torch.cuda.is_available() else 'cpu'

try:
    parallel.check(vars(options))
except ValueError as error:
    fail(error)
try:
    run = hub.open_run(_checkpoint, options.device, options.ema, options.adopt)
except (ValueError, OSError) as error:
    fail(f'{error}: train first, or give --out_dir and --checkpoint')
try:
    with printing():
        run.task.sample(run, options)
except (ValueError, ImportError) as error:
    fail(error)
except (OSError, BadSample) as error:
    fail(error, 1)
