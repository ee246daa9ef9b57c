"""SIGKILL at random moments: python bench/chaos.py [--kills=30] [--ranks=10]

About 15 minutes on 2 cores. A small run of train.py (dropout, averages, augmentation, workers,
several data sets, validation, copies elsewhere) is killed again and again: in its steps, while it
writes a checkpoint, while it copies one. After every kill each checkpoint that has its name must
be whole, here and there. In the end log and weights must be, bit for bit, those of a run that
nobody disturbed. Then torchrun with two ranks, of which one alone is killed, and torchrun begins
again.
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
import past  # noqa: E402
from configurator import configure  # noqa: E402

kills = 30                      # of one process
ranks = 10                      # of one rank of two
seed = 0
configure(globals())

# All that holds state which a resume could lose.
FLAGS = [
    *tiny.FLAGS, '--mix={"plain": 1, "dark": 1, "long": 1}', '--val={"held": "held"}',
    '--vit.dropout=0.1', '--decoder.dropout=0.1', '--workers=2', '--eval_every=50', '--ema=0.9',
    '--num_checkpoints=40', '--keep_last=5']


def start(out, steps, *launcher):
    """A run of so many steps; the launcher is Python's own arguments before train.py."""
    command = [
        sys.executable, *launcher, str(ROOT / 'train.py'), *FLAGS,
        f'--data_dir={tiny.data_dir()}', f'--out_dir={out}', f'--remote=file://{out}-far',
        f'--max_steps={steps}']
    # In a session of its own, so that its workers are killed with it.
    return subprocess.Popen(
        command, env=os.environ | tiny.ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True)


def sound(out):
    """Every checkpoint that has its name is whole, here and elsewhere; how many are elsewhere."""
    for name in checkpoint.names(out / 'checkpoints'):
        past.verify(str(out / 'checkpoints' / name))

    # Elsewhere progress.json comes last: a folder with it has its name.
    far = Path(f'{out}-far') / 'checkpoints'
    whole = [marker.parent for marker in far.glob('*/progress.json')]
    for path in whole:
        past.verify(str(path))
    return len(whole)


def is_saving(out):
    """Whether a checkpoint is being written."""
    return any((out / 'checkpoints').glob('.step_*.tmp'))


def is_copying(out):
    """Whether a checkpoint is being copied: it is there without its last file."""
    far = Path(f'{out}-far') / 'checkpoints'
    return any(not (path / 'progress.json').exists() for path in far.glob('step_*'))


def wait_for(moment, process, out, rng):
    """Until a random time in steps, in a save or in a copy; False if the run is over first."""
    end = time.monotonic() + rng.uniform(4, 9)
    while process.poll() is None:
        # Not in its first seconds, as it shall get on.
        is_late = time.monotonic() > end - 4
        if moment == 'save' and is_late and is_saving(out):
            time.sleep(rng.uniform(0, 0.02))
            return True
        if moment == 'copy' and is_late and is_copying(out):
            return True
        if time.monotonic() > end:
            return True
        # A save takes a few milliseconds.
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
        # A process may end while it is looked at.
        try:
            line = Path(f'/proc/{pid}/cmdline').read_text()
            parent = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1]
            above = Path(f'/proc/{parent}/cmdline').read_text()
        except OSError:
            continue

        # torchrun's children, not torchrun itself and not the ranks' own workers.
        is_of_run = f'--out_dir={out}\0' in line
        if is_of_run and 'distributed.run' not in line and 'distributed.run' in above:
            found.append(int(pid))
    return found


def finish(process):
    """Wait until a run is done, which must end well."""
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text[-3000:]


def kill_whole_runs(folder, rng):
    """One process, killed again and again."""
    # So many steps that the run is not over before the last kill.
    run, steps = folder / 'run', 250 * kills
    finish(start(folder / 'base', steps))

    done = dict(step=0, save=0, copy=0)
    while sum(done.values()) < kills:
        moment = ('step', 'save', 'copy')[sum(done.values()) % 3]
        process = start(run, steps)
        # It came to its end before all kills were spent.
        if not wait_for(moment, process, run, rng):
            print(process.communicate()[0][-2000:])
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done[moment] += 1

        count = sound(run)
        rows = tiny.rows(run)
        step = rows[-1]['step'] if rows else 0
        print(f'killed ({moment}) at step {step}; {count} checkpoints elsewhere, all whole',
              flush=True)

    finish(start(run, steps))
    same(run, folder / 'base')
    print(f'{json.dumps(done)} kills: log and weights bit-identical to the undisturbed run',
          flush=True)


def kill_ranks(folder, rng):
    """One rank of two, again and again; torchrun ends the other and starts both anew."""
    run, steps = folder / 'run2', 200 * ranks
    torchrun = (
        '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone',
        f'--max_restarts={ranks + 5}', '--monitor_interval=0.1')
    finish(start(folder / 'base2', steps, *torchrun))

    process, count = start(run, steps, *torchrun), 0
    while count < ranks and process.poll() is None:
        time.sleep(rng.uniform(7, 13))
        pids = workers_of(run)
        # None where torchrun is just starting them.
        if pids:
            os.kill(rng.choice(pids), signal.SIGKILL)
            count += 1
            print(f'killed rank {count} of {ranks}', flush=True)

    finish(process)
    same(run, folder / 'base2')
    print(f'{count} kills of one rank alone: log and weights bit-identical to the undisturbed run',
          flush=True)


def main():
    rng = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix='chaos'))
    kill_whole_runs(folder, rng)
    kill_ranks(folder, rng)


if __name__ == '__main__':
    main()
