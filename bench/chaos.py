"""SIGKILL at random moments: python bench/chaos.py [--kills=30] [--ranks=10]       (about 15 minutes on 2 cores)

A small run of train.py (dropout, averages, augmentation, workers, several data sets, validation, copies elsewhere) is
killed again and again: in its steps, while it writes a checkpoint, while it copies one. After every kill each
checkpoint that has its name must be whole, here and there. In the end log and weights must be, bit for bit, those of a
run that nobody disturbed. Then torchrun with two ranks, of which one alone is killed, and torchrun begins again.
"""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
import tiny  # noqa: E402

import checkpoint  # noqa: E402
from configurator import configure  # noqa: E402

kills = 30                      # of one process
ranks = 10                      # of one rank of two
seed = 0
configure(globals())

FLAGS = [*tiny.FLAGS, '--mix={"plain": 1, "dark": 1, "long": 1}', '--val={"held": "held"}', '--vit.dropout=0.1',
         '--decoder.dropout=0.1', '--workers=2', '--eval_every=50', '--ema=0.9', '--num_checkpoints=40',
         '--keep_last=5']


def start(out, steps, *launcher):
    flags = [*FLAGS, f'--data_dir={tiny.data_dir()}', f'--out_dir={out}', f'--remote=file://{out}-far',
             f'--max_steps={steps}']
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / 'train.py'), *flags], env=os.environ | tiny.ENV,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def sound(out):
    """Every checkpoint that has its name is whole, here and elsewhere; how many there are."""
    for name in checkpoint.names(out / 'checkpoints'):
        checkpoint.verify(str(out / 'checkpoints' / name))
    far = Path(f'{out}-far') / 'checkpoints'
    whole = [p.parent for p in far.glob('*/progress.json')]
    for path in whole:
        checkpoint.verify(str(path))
    return len(whole)


def wait_for(moment, process, out, rng):
    """Until a random time in steps, in a save or in a copy; False if the run is over first."""
    end = time.monotonic() + rng.uniform(4, 9)
    while process.poll() is None:
        if moment == 'save' and list((out / 'checkpoints').glob('.step_*.tmp')) and time.monotonic() > end - 4:
            time.sleep(rng.uniform(0, 0.02))
            return True
        far = Path(f'{out}-far') / 'checkpoints'
        if moment == 'copy' and time.monotonic() > end - 4 and any(
                not (p / 'progress.json').exists() for p in far.glob('step_*')):
            return True
        if time.monotonic() > end:
            return True
        time.sleep(0.0005)
    return False


def same(out, base):
    assert tiny.losses(out) == tiny.losses(base), 'the logs differ'
    tiny.same_weights(tiny.weights(out), tiny.weights(base))
    assert tiny.names(out) == tiny.names(base)


def workers_of(out):
    """Process ids of the ranks of a run."""
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            line = Path(f'/proc/{pid}/cmdline').read_text()
            parent = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1]
            above = Path(f'/proc/{parent}/cmdline').read_text()
        except OSError:
            continue
        if f'--out_dir={out}\0' in line and 'distributed.run' not in line and 'distributed.run' in above:
            found.append(int(pid))
    return found


def finish(process):
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text[-3000:]


def main():
    rng = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix='chaos'))
    done = dict(step=0, save=0, copy=0)
    finish(start(folder / 'base', 250 * kills))
    while sum(done.values()) < kills:
        moment = ('step', 'save', 'copy')[sum(done.values()) % 3]
        process = start(folder / 'run', 250 * kills)
        if not wait_for(moment, process, folder / 'run', rng):
            print(process.communicate()[0][-2000:])
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done[moment] += 1
        count = sound(folder / 'run')
        row = tiny.rows(folder / 'run')[-1:] or [{'step': 0}]
        print(f'killed ({moment}) at step {row[0]["step"]}; {count} checkpoints elsewhere, all whole', flush=True)
    finish(start(folder / 'run', 250 * kills))
    same(folder / 'run', folder / 'base')
    print(f'{json.dumps(done)} kills: log and weights bit-identical to the undisturbed run', flush=True)

    torchrun = ('-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', f'--max_restarts={ranks + 5}',
                '--monitor_interval=0.1')
    finish(start(folder / 'base2', 200 * ranks, *torchrun))
    process, count = start(folder / 'run2', 200 * ranks, *torchrun), 0
    while count < ranks and process.poll() is None:
        time.sleep(rng.uniform(7, 13))
        pids = workers_of(folder / 'run2')
        if pids:
            os.kill(rng.choice(pids), signal.SIGKILL)
            count += 1
            print(f'killed rank {count} of {ranks}', flush=True)
    finish(process)
    same(folder / 'run2', folder / 'base2')
    print(f'{count} kills of one rank alone: log and weights bit-identical to the undisturbed run', flush=True)


if __name__ == '__main__':
    main()
