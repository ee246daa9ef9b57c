"""Use a trained run: what it can do is its task's (tasks/*.py), and so are most of the settings.

    python sample.py --out_dir=out/llm_tiny --prompt='Once upon'
    python sample.py --out_dir=out/vlm_emoji --image=a.png [--prompt=...] [--json=true]
    python sample.py --out_dir=out/vlm_emoji --eval=mix,fluent-emoji-flat
    python sample.py --out_dir=out/t2i_emoji --prompt='noto: red apple' --n=16
    python sample.py --out_dir=out/policy_metaworld_state --env=metaworld --episodes=20
    python sample.py --out_dir=out/policy_metaworld_state --serve_policy=8000
    python sample.py --out_dir=out/vlm_emoji --help         (all that this run knows)
"""
import os
import sys

from configurator import answer_help, configure, read_flag_value

# what is used
out_dir = 'out/vlm_emoji'   # a run, or a folder of diffusers
checkpoint = 'latest'       # one of its checkpoints
ema = True                  # the moving average of the weights, where the run kept one
device = 'auto'             # auto: cuda if there is one, else cpu

# how
batch_size = 64             # rows at once
seed = 0
json = False                # one JSON object a line instead of text
data_dir = ''               # where --eval looks for its data sets (empty: the run's own)


def fail(message, code=2):
    print(f'sample.py: {" ".join(str(message).split())}', file=sys.stderr)
    sys.exit(code)


# the run says which task it is of, and the task which settings there are
out_dir = os.path.expanduser(read_flag_value('out_dir', out_dir))
path = os.path.join(out_dir, 'checkpoints', read_flag_value('checkpoint', checkpoint))
answer_help(__file__, run=path, task_class='SampleSettings')

from types import SimpleNamespace

import torch

import hub
from tasks import sample_settings

try:
    if hub.is_foreign(out_dir):
        path = out_dir
    globals().update(sample_settings(hub.task_of(path)))
except (ValueError, OSError) as error:
    fail(f'{error}: train first, or give --out_dir and --checkpoint')
del path
options = SimpleNamespace(**configure(globals()))
