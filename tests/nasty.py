"""Nasty values for every setting: what tests/test_nasty.py gives the commands, and a sweep.

    python tests/nasty.py llm 1000 [seed]       (so many settings of a task: a line for each fault)

Each command runs in a process of its own that is forked from one with all of ours imported, with a
bound on its memory and on its time. One that trains for long is told to stop as soon as it has
logged a step, and has to end well.
"""
import ast
import atexit
import functools
import importlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from pathlib import Path

import tiny

ROOM = 2 << 30                      # bytes that a command may take beyond the imports
CPU_TIME, PATIENCE = 20, 120        # seconds: of work, and in all
FILE = bytes(range(256)) * 8

# -----------------------------------------------------------------------------------------------
# values

INTS = (0, -1, -5, 1, 2, 3, 7, 100_000, 2 ** 31, 2 ** 63 - 1, 2 ** 63, 2 ** 64, -2 ** 63,
        10 ** 400)
FLOATS = (math.nan, math.inf, -math.inf, 1e308, -1e308, 1e-320, 0.0, -0.0, 0.5, 1.0, 2.5, -0.1)
PATHS = ('folder', 'file.bin', 'file.bin/x', 'missing', 'missing/x.json', '~', '~nobody/x', '.')
TEXTS = ('', '\0', 'a\0b', 'x' * 10_000, ' ', '\n', 'é', '{', '{0}', '%s', '[', '(', ',', ':', '/',
         'None', 'a.py', 'a.py:b', '-1', '1', 'file:///missing', 'what://x', 'a' * 300, *PATHS)
LISTS = ([], [1], [[]], [[[]]], [None], [''], ['a'], [0, 0], [-1, 2.5], [1e308], [2 ** 64],
         [['.*', {}]], [['(', {}]], [['.*', {'lr_scale': 2 ** 70}]], [{}], [True], ['a', 'a'],
         [['a', 0, 'b']], ['\0'], [2 ** 31, 2 ** 31], [0.9, 0.9], [[1, 2], [3]], ['folder'])
DICTS = ({}, {'': 1}, {'a': []}, {'a': None}, {'a': -1}, {'plain': 0}, {'plain': 1e308},
         {'plain': 1e-320}, {'plain': {'weight': 0}}, {'plain': {'a': {'b': {}}}}, {' ': {}},
         {'\0': 1}, {'x' * 10_000: 1}, {'folder': 1}, {'file.bin': 1}, {'missing': 1}, {'~': 1},
         {'plain': 1, 'dark': 2 ** 64}, {'plain': 'plain'}, {'a': 'missing'}, {'a': 'file.bin'},
         {'a': ''}, {'robot': {'a': 1}}, {'robot': []}, {',': 1}, {'{': 1})
KINDS = {bool: (True, False), int: INTS, float: (*FLOATS, *INTS), str: TEXTS, list: LISTS,
         tuple: LISTS, dict: DICTS}
ANY = (*INTS, *FLOATS, *TEXTS, *LISTS, *DICTS, True, False, None)


def kind_of(default):
    return next(kind for kind in KINDS if isinstance(default, kind))


def choose(draw, defaults, frozen=()):
    """({key: value}, as flags?): one nasty setting, or two. draw: a function of a sequence."""
    keys = [key for key in defaults if key not in frozen]
    chosen = {}
    for _ in range(draw((1, 1, 2))):
        key = draw(keys)
        own = KINDS[kind_of(defaults[key])]
        chosen[key] = draw(draw((own, own, own, ANY)))
    return chosen, draw((True, False))


def arguments(folder, chosen, as_flags):
    """Settings as arguments: flags, or a file of JSON where a flag could not say them."""
    said = json.dumps(chosen)
    if not as_flags or '\\u0000' in said:
        (folder / 'nasty.json').write_text(said)
        return ['nasty.json', '--allow_code=true']
    return [f'--{key}={value if isinstance(value, str) else repr(value)}'
            for key, value in chosen.items()]


# -----------------------------------------------------------------------------------------------
# a warm process


def imported():
    """Import what the commands do, each fork then has it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch
    torch.set_num_threads(1)
    sys.path[0] = str(tiny.ROOT)
    paths = [*tiny.ROOT.glob('*.py'), *tiny.ROOT.glob('tasks/*.py'),
             *tiny.ROOT.glob('robots/*.py'), *tiny.ROOT.glob('images/*.py')]
    for path in paths:
        name = '.'.join(path.relative_to(tiny.ROOT).with_suffix('').parts)
        is_script = name in ('train', 'sample', 'show_steps')
        if not is_script and '__init__' not in name and 'gym' not in path.read_text():
            importlib.import_module(name)


def serve():
    """tiny.serve with all of ours imported, and its children in bounds."""
    imported()
    of_tiny = tiny.child

    def child(*request):
        with open('/proc/self/statm') as file:
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
        of_tiny(*request)

    tiny.child = child
    tiny.serve()


class Warm(tiny.Server):
    """That process."""

    def __init__(self):
        self.popen = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | tiny.ENV, text=True, bufsize=1)


@functools.cache
def warm():
    started = Warm()
    atexit.register(started.close)
    return started


Outcome = namedtuple('Outcome', 'code out err seconds')


def run(script, args, folder, out_dir='out/run'):
    """The Outcome of a command in `folder`; its code is None where it had to be killed."""
    files = [str(folder / 'stdout'), str(folder / 'stderr')]
    env = dict(HOME=str(folder / 'home'), HF_HUB_OFFLINE='1', WANDB_MODE='offline',
               COMPILE_BACKEND='eager')
    begun, told = time.monotonic(), False
    pid = warm().start(str(tiny.ROOT / script), [str(arg) for arg in args], str(folder), env,
                       files, 0)
    code = None
    while code is None:
        try:
            code = warm().code(0.25)
        except subprocess.TimeoutExpired:
            seconds = time.monotonic() - begun
            log = folder / out_dir / 'log.jsonl'
            if seconds > PATIENCE or cpu_time(pid) > CPU_TIME:
                os.killpg(pid, signal.SIGKILL)
                warm().code(60)
                break
            if not told and seconds > 1 and log.exists() and log.stat().st_size:
                os.kill(pid, signal.SIGTERM)
                told = True
    out, err = (Path(path).read_text(errors='replace') for path in files)
    return Outcome(code, out, err, time.monotonic() - begun)


def cpu_time(pid):
    """Seconds that a process has worked; 0 for one that has just ended."""
    try:
        ticks = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[11:13]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(map(int, ticks)) / os.sysconf('SC_CLK_TCK')


def faults(outcome, chosen):
    """What is wrong with an outcome: a text, or ''."""
    code, _, err, _ = outcome
    lines = [line for line in err.replace('\r', '\n').split('\n') if line.strip()]
    lines = [line for line in lines if not line.endswith('(said once)')]
    own = [line for line in lines if re.match(r'configurator: |[a-z_/]+\.py: ', line)]
    if code is None:
        is_long = any(chosen.get(key) in INTS[6:] for key in ('n', 'episodes', 'steps'))
        return '' if is_long else 'it hangs'
    if 'Traceback' in err:
        return lines[-1]
    if code not in (0, 1, 2):
        return f'exit code {code}'
    if code and len(own) != 1:
        return f'{len(own)} lines: {err[-300:]}'
    if code == 2 and len(lines) != 1:
        return f'{len(lines)} lines: {err[-300:]}'
    if code == 2 and not any(names(own[0], key, value) for key, value in chosen.items()):
        # what follows from it may be another setting's
        if not re.search(r'\w=|^train.py: groups: ', own[0]):
            return f'no key and value: {own[0]}'
    return ''


def names(line, key, value):
    """Whether a line has a setting and its value, or what is wrong in it."""
    has_key = all(part in line for part in key.split('.'))
    return has_key and any(each in line for each in texts_of(value))


def texts_of(value):
    """How a line may write a value, or a part of it: the beginnings."""
    found = {repr(value)[:12]}
    if isinstance(value, str) and value.startswith('~'):
        found = {'/'}           # of a home
    elif isinstance(value, str):
        found = {' '.join(value.split())[:12], repr(value)[1:12].rstrip("'")}
    elif isinstance(value, int) and abs(value) < 1e300:
        found.add(repr(float(value)))
    elif isinstance(value, (list, tuple)):
        found |= {text for each in value for text in texts_of(each)}
    elif isinstance(value, dict):
        found |= texts_of([*value.keys(), *value.values()])
    return found


# -----------------------------------------------------------------------------------------------
# tasks

LOOP = ['--device=cpu', '--tokenizer=bytes', '--seq_len=48', '--batch_size=6', '--lanes=8',
        '--window=4', '--workers=0', '--log_every=1', '--warmup=0', '--max_steps=1']
ROBOT = ['--action_steps=4', '--action_dim=4', '--proprio_dim=39', '--mix={"robot": 1.0}']
POLICY = ['--task=policy', '--policy.width=32', '--policy.mlp_dim=32', '--policy.num_heads=2',
          '--policy.depth=1', *ROBOT]
DIT = ['--task=t2i', '--dit.image_size=16', '--dit.patch_size=8', '--dit.width=32',
       '--dit.mlp_dim=32', '--dit.num_heads=2', '--dit.depth=1',
       '--mix={"plain": 1.0}']
SD = ['--task=t2i', '--denoiser=unet', '--seq_len=8', '--clip.max_length=8', '--clip.width=32',
      '--clip.depth=1', '--clip.vocab_size=320', '--clip.mlp_dim=32', '--clip.num_heads=2',
      '--dit.image_size=8',
      '--vae.block_out_channels=[32, 32]', '--vae.layers_per_block=1',
      '--unet.block_out_channels=[32, 32]', '--unet.layers_per_block=1',
      '--unet.cross_attention_dim=32', '--unet.num_heads=[2, 2]',
      '--unet.cross_attention=[True, False]', '--mix={"plain": 1.0}']
EYES = '--mix={"eyes": 1.0}'
SAMPLES = {'llm': ['--prompt=a', '--max_new_tokens=2'], 'vlm': ['--eval=held'], 'siglip': [],
           't2i': ['--prompt=a', '--n=1', '--steps=2'],
           'policy': ['--env=metaworld', '--tasks=reach-v3', '--episodes=1', '--processes=1']}
PREPARES = {
    'stats': ['--data={data}/robot', '--out=stats.json'],
    'lerobot': ['--data={data}/robot', '--out=out',
                '--export=true', '--fps=10'],
    'latents': ['--data={data}/plain', '--out=out', '--vae=missing', '--image_size=16'],
    'metaworld': ['--out=out', '--tasks=["reach-v3"]', '--episodes=1', '--workers=1'],
    'text': ['--input=file.txt', '--out=out', '--tokenizer=bytes'],
    'shakespeare': ['--out=out'], 'emoji': ['--out=out']}
TASKS = {
    'llm': [['--task=llm', *tiny.DECODER, '--mix={"words": 1.0}']],
    'vlm': [['--task=vlm', *tiny.MODEL, '--mix={"plain": 1.0}', '--val={"held": "held"}']],
    'siglip': [['--task=siglip', *tiny.MODEL, '--mix={"plain": 1.0}']],
    'policy': [[*POLICY, *tiny.MODEL],
               [*POLICY, *tiny.MODEL, '--policy.encoder=text', '--policy.denoiser=unet',
                '--policy.channels=[16, 32]', '--policy.objective=ddpm'],
               [*POLICY, *tiny.MODEL, '--policy.encoder=vlm', '--policy.denoiser=transformer',
                EYES]],
    'vla': [['--task=vla', '--vla.width=32', '--vla.mlp_dim=32', *tiny.MODEL, *ROBOT, EYES]],
    't2i': [[*DIT, *tiny.DECODER], [*DIT, *tiny.DECODER, '--dit.attention=joint',
                                    '--dit.objective=ddpm'], SD]}


@functools.cache
def data_dir():
    """tiny's data sets, and two of a robot."""
    import numpy as np
    import test_policy_train
    folder, rng = tiny.data_dir(), np.random.default_rng(0)
    test_policy_train.write_episodes(folder / 'robot', rng)
    test_policy_train.write_steps(folder / 'eyes', rng)
    for name in ('robot', 'eyes'):
        tiny.run('prepare/stats.py', f'--data={folder / name}',
                 f'--cache_dir={folder / "cache"}').ok()
    return folder


def place():
    """A folder to run in, which holds what paths may name."""
    folder = Path(tempfile.mkdtemp(prefix='nasty'))
    (folder / 'folder').mkdir()
    (folder / 'home').mkdir()
    (folder / 'file.bin').write_bytes(FILE)
    (folder / 'file.txt').write_text('once upon a time\n' * 9)
    return folder


def example(name, draw):
    """One: what was chosen, its outcome, and what is wrong with it. draw: see `choose`."""
    script, bases, known = commands(name)
    chosen, as_flags = choose(draw, known, FROZEN)
    return chosen, *tried(script, draw(bases), chosen, as_flags or script in OF_FLAGS)


def tried(script, base, chosen, as_flags):
    folder = place()
    try:
        outcome = run(script, [*base, *arguments(folder, chosen, as_flags)], folder)
        fault = faults(outcome, chosen)
        # but where it is what is to be written
        is_out = {'out', 'grid', 'film'} & chosen.keys()
        if not is_out and (folder / 'file.bin').read_bytes() != FILE:
            fault = 'a file is lost'
        return outcome, fault
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# servers wait for ever; a run's own folder is of another test
FROZEN = 'serve', 'port', 'serve_policy', 'help'
OF_FLAGS = 'prepare/text.py', 'prepare/shakespeare.py', 'prepare/emoji.py', 'hub.py'
HELPS = r'^ *--([a-z_.A-Z0-9]+)(?:[ =](.*?))?(?:  .*)?$'


@functools.cache
def commands(name):
    """(script, lists of arguments that work, {key: value of its settings}) of a task, or of
    'sample llm', 'data', 'stats' ..."""
    first, _, task = name.partition(' ')
    if name in TASKS:
        return 'train.py', [flags_of(base) for base in TASKS[name]], trained(name)[1]
    if first == 'sample':
        folder, _ = trained(task)
        script, base = 'sample.py', [f'--out_dir={folder}/run', '--device=cpu', *SAMPLES[task]]
    elif first == 'data':
        folder, _ = trained('llm')
        script, base = 'data.py', [f'{folder}/run/config.json', f'--out_dir={folder}/run',
                                   '--show_steps=1:2']
        return script, [base], defaults_of('show_steps.py', [])
    else:
        script, base = f'prepare/{first}.py', [arg.format(data=data_dir())
                                               for arg in PREPARES[first]]
    return script, [base], defaults_of(script, base)


@functools.cache
def trained(task):
    """(a folder that holds run/, a run of a task, {key: value}: every setting of train.py)."""
    folder = place()
    outcome = run('train.py', [*flags_of(TASKS[task][0]), '--out_dir=run'], folder)
    assert outcome.code == 0, outcome
    found = json.loads((folder / 'run/config.json').read_text())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder, found


def defaults_of(script, base):
    """{key: default} of a script, by its --help."""
    folder, found = place(), {}
    for key, text in re.findall(HELPS, run(script, [*base, '--help'], folder).out, re.M):
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    shutil.rmtree(folder)
    return found


def flags_of(base):
    return [*LOOP, f'--data_dir={data_dir()}', f'--cache_dir={data_dir()}/cache', *base]


def sweep(task, count, seed):
    rng = random.Random(f'{task} {seed}')
    figures, slowest = Counter(), (0, '')
    for number in range(count):
        chosen, outcome, fault = example(task, rng.choice)
        figures[str(outcome.code)] += 1
        slowest = max(slowest, (outcome.seconds, repr(chosen)[:100]))
        if fault:
            figures['faults'] += 1
            print(f'{number} {repr(chosen)[:150]}: {fault[:300]}', flush=True)
    print(task, dict(figures), slowest, flush=True)


if __name__ == '__main__':
    if sys.argv[1:]:
        sys.path.insert(0, str(tiny.ROOT))
        sweep(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
    else:
        serve()
