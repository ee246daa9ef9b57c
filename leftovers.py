"""What other commands left in an out_dir, or do there: one that trains into it now, half-written
checkpoints, a log with rows that are taken again or can not be read.

checkpoint.py imports this where another command was.
"""
import fcntl
import json
import os
import shutil
import time

# -------------------------------------------------------------------------------------------------
# one that trains there now


def check_free(out_dir):
    """Raises ValueError where another process trains into out_dir."""
    with open(os.path.join(out_dir, 'lock')) as file:
        wait(file, fcntl.LOCK_SH)


def wait(file, kind, say=None, patience=3.0):
    """Lock an open file, for one that was just killed may still be going. Raises ValueError where
    another process keeps it; says so where the disk has no locks."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            return fcntl.lockf(file, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            time.sleep(0.1)
        except OSError as error:
            if say:
                say(f'{file.name} can not be locked ({error.strerror}): see to it yourself that '
                    'no other command trains there')
            return
    out_dir, (host, process) = os.path.dirname(file.name), holder(file)
    raise ValueError(f'out_dir={out_dir!r}: process {process} on {host} trains there: wait until '
                     'it ends, or give another out_dir')


def holder(file):
    """Host and process that an open lock names."""
    with open(file.fileno(), 'rb', closefd=False) as raw:
        raw.seek(0)
        host, _, process = raw.read(1000).decode(errors='replace').strip().rpartition(' ')
    return host or '?', process or '?'


# -------------------------------------------------------------------------------------------------
# what one left

def tidy(out_dir, step, say):
    """Let a run go on in out_dir after so many steps. Raises OSError."""
    folder = os.path.join(out_dir, 'checkpoints')
    latest = os.path.join(folder, 'latest')
    for name in os.listdir(folder):
        if name.startswith('.step_'):
            shutil.rmtree(os.path.join(folder, name))
    if os.path.isdir(latest) and not os.path.islink(latest):
        say(f'{latest} is a folder, not the link to the newest checkpoint: it stays, unused')

    path = os.path.join(out_dir, 'log.jsonl')
    lost = cut_log(path, step)
    if lost:
        say(f'{path}: {lost} lines could not be read and are left out')


def cut_log(path, step):
    """Drop the rows of steps that the resumed run takes again, and what is no row; how many lines
    were none."""
    if not os.path.exists(path):
        return 0
    rows, lost = [], 0
    with open(path, 'rb') as f:
        for line in f:
            # a power failure leaves zeros where nothing was written yet
            line = line.strip(b'\0\r\n')
            row = row_of(line)
            if row and row['step'] <= step:
                rows.append(line + b'\n')
            lost += bool(line) and not row

    # renamed when it is whole and on the disk: neither a kill nor a power failure loses a row
    with open(path + '.tmp', 'wb') as f:
        f.writelines(rows)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)
    return lost


def row_of(line):
    """The row that a line of log.jsonl holds, or None."""
    try:
        row = json.loads(line)
        return row if type(row['step']) is int else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
