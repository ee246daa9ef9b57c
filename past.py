"""A run's past: the checkpoint that a command goes on from, and what may have changed since.

train.py imports this where there is something to go on from.
"""
import filecmp
import os
from dataclasses import replace

import numpy as np

import checkpoint
from data import Chapter, quotas_of, what_is
from lanes import Walk, spread
from mixing import Mixture
from tokenizer import read_json

# settings that a run keeps, whatever its task
KEPT = ('task', 'tokenizer', 'lanes', 'optimizer', 'lora', 'lora_alpha')
# what a checkpoint's progress.json holds
WRITTEN = dict(step=int, samples=int, tokens=int, bad_samples=int, world=int, files=dict)

# -------------------------------------------------------------------------------------------------
# the checkpoint to go on from


def verify(path, leave_out=()):
    """What progress.json of a checkpoint says. Raises OSError and ValueError where a file is not
    as it was written; leave_out: beginnings of names that are not looked at."""
    progress = read_json(os.path.join(path, 'progress.json'))
    if [type(progress.get(key)) for key in WRITTEN] != [*WRITTEN.values()]:
        raise ValueError('progress.json is not what a run writes')
    # all files that it names; a file more is no fault
    there = checkpoint.files_of(path, leave_out)
    for file, written in progress['files'].items():
        if not file.startswith(leave_out) and there.get(file) != written:
            raise ValueError(f'{file} has {there.get(file)}, not {written} as it was written '
                             '(bytes and checksum)')
    return progress


def newest(folder, say):
    """(path, progress) of the newest checkpoint that is whole; ('', {}) where there is none.
    Raises ValueError if all are damaged: a run must not begin anew over what may be mended."""
    paths = [os.path.join(folder, name) for name in checkpoint.names(folder)]
    for path in paths:
        try:
            return path, verify(path)
        except (OSError, ValueError) as error:
            reason = ' '.join(str(error).split())[:200]
            say(f'{path} is damaged and is skipped: {reason}')
    if paths:
        raise ValueError(f'every checkpoint in {folder} is damaged: move them away to begin anew')
    return '', {}


def checkpoint_of(path):
    """The folder of a run's newest checkpoint, or of the checkpoint that the path is."""
    folder = os.path.abspath(os.path.expanduser(path)).removesuffix('/checkpoints/latest')
    is_checkpoint = os.path.basename(os.path.dirname(folder)) == 'checkpoints'
    if is_checkpoint or os.path.exists(os.path.join(folder, 'model.safetensors')):
        return folder
    # by its number: the link is for people, and a copy may lack it
    folder = os.path.join(folder, 'checkpoints')
    return os.path.join(folder, (checkpoint.names(folder) or ['latest'])[0])


def find(out_dir, resume, say):
    """(path, its progress, '') of the newest checkpoint of a run, or where it has none of the one
    that `resume` names; or an error, last."""
    folder = os.path.join(out_dir, 'checkpoints')
    try:
        if checkpoint.names(folder) or resume in ('auto', 'never'):
            path, progress = newest(folder, say)
        else:
            path = checkpoint_of(resume)
            progress = verify(path)
    except FileNotFoundError as error:
        return '', {}, (f'resume={resume!r}: {error.filename} is missing; expected one of auto, '
                        'never, or a checkpoint')
    except (ValueError, OSError) as error:
        return '', {}, f'resume={resume!r}: {error}'
    # whoever says so wants to begin, and must not lose what is there
    if path and resume == 'never':
        return '', {}, f'resume=never, but {path} exists: give another out_dir'
    return path, progress, ''


# -------------------------------------------------------------------------------------------------
# what may have changed since


def changes(path, settings, kept):
    """Lines that tell what a resumed run has set otherwise than the checkpoint it goes on from.
    Raises ValueError for what can not change.

    kept: names of the task's settings that a run keeps, and of groups of them, with a dot."""
    lines, old = [], read_json(os.path.join(path, 'config.json'))
    # a prefix of the names of a part's settings
    groups = tuple(name for name in kept if name.endswith('.'))
    for key in old:
        if key not in settings or settings[key] == old[key]:
            continue
        # which costs time and saves memory, and changes nothing
        of_model = key.startswith(groups) and not key.endswith('.remat')
        # a file of yours may move: what is in it is looked at (check_same_files)
        has_moved = key == 'task' and settings[key].endswith('.py') and old[key].endswith('.py')
        if (of_model or key in (*KEPT, *kept)) and not has_moved:
            raise ValueError(f'{key}={settings[key]!r}, but {path} was made with {old[key]!r}: a '
                             'run keeps its model and lanes; give another out_dir')
        lines.append(f'changed since {path}: {key} {old[key]!r} -> {settings[key]!r}')
    return lines


def check_same_files(path, run):
    """Raises ValueError where statistics, tokenizer, processor or code of yours are not those of
    the checkpoint that a run goes on from, and are not adopted by name."""
    remade = [name for name, value in run.kept.items()
              if read_json(os.path.join(path, name)) != value]
    # to the byte, for a template may differ by a blank
    for name, file in checkpoint.own_files(run).items():
        kept = os.path.join(path, name)
        if not os.path.exists(kept) or not filecmp.cmp(file, kept, shallow=False):
            remade.append(name)
    for name in remade:
        if name not in run.settings['adopt']:
            raise ValueError(f'{name} is not what {path} was made with: bring it back, or take '
                             f'the new one with --adopt=\'["{name}"]\'')


# -------------------------------------------------------------------------------------------------
# weights, averages, optimizer, progress


def load(path, saved, dtype, weights, averages, state):
    """Fill tensors {name: tensor} with what any number of ranks have saved; what a run of this
    dtype goes on with of the checkpoint's progress."""
    checkpoint.load(weights, path)
    if averages:
        load_averages(averages, path)
    load_state(state, path)

    # another precision begins its scale anew
    others = ['files', 'world', 'scheduled']
    if read_json(os.path.join(path, 'config.json'))['dtype'] != dtype:
        others += ['loss_scale', 'good_steps']
    return {key: value for key, value in saved.items() if key not in others}


def load_averages(averages, path):
    """Averages of the weights {name: tensor}; of what was frozen until now, the weights."""
    folder = os.path.join(path, 'ema')
    there = checkpoint.shapes(folder) if os.path.isdir(folder) else {}
    new, kept = dict(averages), {}
    for name in averages:
        if name in there:
            kept[name] = new.pop(name)
    checkpoint.load(new, path)
    if kept:
        checkpoint.load(kept, folder)


def load_state(state, path):
    """The optimizer's state {name: tensor}; of what was frozen until now there is none."""
    folder = os.path.join(path, 'state')
    there = checkpoint.shapes(folder)
    checkpoint.load({name: tensor for name, tensor in state.items() if name in there}, folder)


# -------------------------------------------------------------------------------------------------
# chapters


def go_on(history, settings, path, saved, kept=()):
    """Let the History of a command go on from a checkpoint; lines that tell what has changed
    since. saved: the checkpoint's progress; kept: see `changes`. Raises ValueError for what can
    not change, a data set that is not what it was among it, and OSError.

    With the settings of the last chapter nothing is added. Another mix, weight, batch size, seed
    or window begins a chapter: positions go on where they stopped, and each data set goes on in
    its own epoch at its own sample."""
    lines = changes(path, settings, kept)
    chapters = read_json(os.path.join(path, 'chapters.json'))
    history.seen_before = read_json(os.path.join(path, 'shards.json'))
    adopted = take_up(history, settings, chapters, saved['step'], saved['samples'])
    return lines + [f'adopted: data set {name!r} is not what it was' for name in adopted]


def take_up(history, settings, saved, step, position):
    """`go_on` from what a chapters.json holds; names of data sets that were adopted."""
    history.lanes, history.sets = saved['lanes'], dict(saved['sets'])
    # what came after the checkpoint is done again
    history.chapters = [Chapter(**each) for each in saved['chapters'] if each['step'] <= step]
    drawn = drawn_before(history, step, position)
    adopted = meet_again(history, settings['adopt'])
    for name in adopted:
        drawn.pop(name, None)

    chapter = history.chapter(settings, step, position, drawn)
    if not is_continued(history.chapters[-1], chapter):
        history.chapters = [old for old in history.chapters if old.step < step] + [chapter]
    history.orders = {}
    return adopted


def is_continued(last, chapter):
    """Would the last chapter do just what this one does?"""
    position = last.position + (chapter.step - last.step) * last.batch_size
    # what was drawn until there follows from the others
    same = replace(last, step=chapter.step, position=position, drawn=chapter.drawn) == chapter
    return same and list(last.mix) == list(chapter.mix)


def meet_again(history, adopt):
    """Look at the data sets; names of those that are not what they were and begin anew. Raises
    ValueError for one of them that is not in `adopt`."""
    adopted = []
    for name, folder in history.folders.items():
        # None: it joins the run now
        before, now = history.sets.get(name), what_is(folder)
        if before and before | now == before:
            continue
        if before and name not in adopt:
            raise ValueError(
                f'data set {name!r} is not what this run began with ({before["samples"]} samples '
                f'in {before["shards"]} shards, now {now["samples"]} in {now["shards"]}): bring '
                f'it back, or begin its epochs anew with --adopt=\'["{name}"]\'')
        if before:
            adopted.append(name)
        history.meet(name, folder)
    return adopted


def drawn_before(history, step, position):
    """{data set: what the run drew of it} before a position that the step after `step` others
    begins with."""
    chapter = history.chapter_of(step)
    # of those that are in the mix no more, too: they may come back
    drawn, start = dict(chapter.drawn), chapter.position
    mixture = Mixture(quotas_of(list(chapter.mix.values())), history.lanes)
    for number, name in enumerate(chapter.mix):
        before = drawn.get(name, 0)
        if history.sets[name]['samples'] > chapter.whole:
            walk = Walk(mixture, number)
            new = walk.drawn(position) - walk.drawn(start)
            drawn[name] = (spread(before, history.lanes) + new).tolist()
        else:
            new = mixture.before(position, number) - mixture.before(start, number)
            drawn[name] = int(np.sum(before) + new)
    return drawn
