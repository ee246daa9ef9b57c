"""A referee of resumes: runs of many commands, each with other settings, stopped in any way, and
branched off. What is really read at each step is written down, and everything that a run says of
its past is held against it.

A command here does what train.py does, with the same Folders, Batches, History and Saver, but for
the model: that is one number, the step.
"""
import contextlib
import io
import json
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import tiny
import torch
from conftest import make_processor, write_set

import checkpoint
import data
import logs
import past
import show_steps

LANES = 8
SIZES = {'a': [3, 5], 'b': [16], 'c': [1, 0, 4, 30], 'd': [40, 2]}
MIXES = [{'a': 1}, {'b': 1.0, 'a': 2.0}, {'c': 1, 'b': 3}, {'a': 1, 'b': 1, 'c': 1, 'd': 1},
         {'d': 5, 'c': 1}, {'d': 1, 'a': 0, 'b': 2}, {'c': 2}, {'a': 2, 'b': 1.0}]
# where a command ends: after its last step, told to stop, or killed (once while it writes)
ENDS = 'finished', 'SIGTERM', 'SIGKILL', 'SIGKILL while it saves'


def write_sets(folder):
    """The data sets; the text of a sample is its key, which names its data set."""
    for name, sizes in SIZES.items():
        shards, count = [], 0
        for size in sizes:
            keys = [f'{name}{count + i:03}' for i in range(size)]
            shards.append([(key, {'txt': key.encode()}) for key in keys])
            count += size
        write_set(folder / name, shards)
    return folder


def close(folders):
    """Close the shards of Folders: a game opens more of them than a process may."""
    for folder in folders.values():
        while folder.files:
            os.close(folder.files.popitem()[1])


def silent(line):
    """Nobody reads what a checkpoint is skipped for."""


class Run:
    """An out_dir, and what was really read for it: of each step the keys, by their positions."""

    def __init__(self, out, settings, steps=()):
        self.out, self.settings, self.steps = out, settings, list(steps)
        self.asked_for, self.damaged = set(), set()

    def checkpoints(self):
        return checkpoint.names(self.out / 'checkpoints')

    def whole(self):
        """Checkpoints that are not damaged, the newest first."""
        return [name for name in self.checkpoints() if name not in self.damaged]

    def samples(self, step):
        return sum(map(len, self.steps[:step]))

    def damage(self):
        """Cut a file of the newest checkpoint, as a failing disk does."""
        name = self.whole()[0]
        os.truncate(self.out / 'checkpoints' / name / 'chapters.json', 20)
        self.damaged.add(name)
        # what came after the one before is taken again
        self.steps = self.steps[:checkpoint.step_of(self.whole()[0])]


class Referee:
    """Commands on runs that begin at `folder`; whole, seed: see data.Order."""

    def __init__(self, number, folder, sets, num_workers=0):
        self.rng, self.folder, self.num_workers = random.Random(number), Path(folder), num_workers
        self.fixed = dict(
            data_dir=str(sets), cache_dir=str(folder / 'cache'), cache_gb=1.0, lanes=LANES,
            seed=self.rng.randrange(99), window=self.rng.choice([1, 4, 1024]), adopt=[], val={},
            whole=self.rng.choice([1 << 20, 20, 0]), task='llm', tokenizer='bytes',
            optimizer='adamw', dtype='float32', seq_len=64, allow_repeat=True, log_every=1,
            eval_every=0, warmup=0, skip_bad_steps=0, max_bad_fraction=0.0,
            max_bad_shards=0)
        self.processor = make_processor(64, task='llm')
        self.runs, self.counts = [], Counter()

    def settings(self, run):
        """Settings of the next command on a run."""
        rng, done = self.rng, len(run.steps)
        world, micro = rng.choice([1, 1, 2, 3, 4]), rng.choice([0, 0, 1, 2])
        batch_size = world * max(micro, 1) * rng.choice([1, 1, 2, 3, 5])
        drawn = dict(mix=rng.choice(MIXES), batch_size=batch_size, micro_batch_size=micro,
                     workers=rng.choice([0, self.num_workers]), pack=rng.random() < 0.2,
                     num_checkpoints=rng.randint(1, 4), keep_last=rng.choice([0, 0, 1, 2, 3]))
        lengths = dict(max_steps=max(done + rng.randint(0, 9), 1),
                       max_samples=run.samples(done) + rng.randint(1, 60),
                       epochs=rng.choice([0.3, 1.0, 2.5]))
        chosen = rng.choice(list(lengths))
        drawn |= {key: value if key == chosen else 0 for key, value in lengths.items()}
        # what was changed once may stay so, or be as it was
        kept = {key: run.settings[key] for key in run.settings
                if key in drawn and key not in lengths and rng.random() < 0.3}
        if kept.keys() & {'batch_size', 'micro_batch_size'}:
            kept |= {key: drawn[key] for key in ('batch_size', 'micro_batch_size')}
        return self.fixed | drawn | kept, world

    def command(self):
        """A command on one of the runs, or one that branches off, or begins one."""
        rng, resume = self.rng, 'auto'
        run = rng.choice(self.runs) if self.runs else None
        if run is None or rng.random() < 0.1:
            out = self.folder / f'run{len(self.runs)}'
            if run and run.whole() and rng.random() < 0.7:
                name = rng.choice(run.whole())
                resume = str(run.out / 'checkpoints' / name)
                run = Run(out, run.settings, run.steps[:checkpoint.step_of(name)])
                self.counts['branches'] += 1
            else:
                run = Run(out, {})
            self.runs.append(run)
        if len(run.whole()) > 1 and rng.random() < 0.1:
            run.damage()
            self.counts['damaged'] += 1
        settings, world = self.settings(run)
        self.train(run, settings | dict(resume=resume), world)
        self.check(run)

    def train(self, run, settings, world):
        """What train.py does between its settings and its end."""
        out = str(run.out)
        data.check(settings, world)
        checkpoint.check_free(out)
        resumed, saved, problem = past.find(out, settings['resume'], silent)
        assert not problem, problem
        folders, history = data.open_mix(settings)
        if resumed:
            for line in past.go_on(history, settings, resumed, saved):
                self.counts[line.partition(' ')[0]] += 1
        try:
            steps, scheduled = history.length(settings)
        except ValueError as error:
            # refused, and nothing is changed
            assert 'num_checkpoints' in str(error)
            self.counts['refused'] += 1
            return
        first, weights = saved.get('step', 0), {'w': torch.zeros(1)}
        if resumed:
            past.load(resumed, saved, 'float32', weights, {}, {})
            assert weights['w'].item() == first and len(run.steps) >= first
        if first >= steps:
            self.counts['nothing to do'] += 1
            return
        with checkpoint.take(out, first, print):
            checkpoint.write_json(f'{out}/config.json', settings)
            # steps that were not saved are taken again
            run.steps, run.settings = run.steps[:first], settings
            self.loop(run, settings, world, history, folders, steps, scheduled)
        close(folders)

    def loop(self, run, settings, world, history, folders, steps, scheduled):
        rng, first = self.rng, len(run.steps)
        micro = settings['micro_batch_size'] or settings['batch_size'] // world
        at_once = settings['batch_size'] // world if settings['pack'] else micro
        batches = data.Batches(list(folders.values()), history.order, self.processor, None,
                               settings['pack'], micro if settings['pack'] else 1)
        feeds, workers = [], settings['workers']
        for rank in range(world):
            positions = [part for step in range(first, steps)
                         for part in history.positions_of(step, at_once, rank, world)]
            feeds.append(iter(data.loader(batches, positions, workers)))
        end, last = rng.choice(ENDS), rng.randint(first + 1, steps)
        if end == 'finished':
            last = steps
        self.counts[end] += 1
        saver = checkpoint.Saver(str(run.out), keep_last=settings['keep_last'])
        for step in range(first, last):
            run.steps.append(self.take_step(history, feeds, folders, step, at_once, workers))
            logs.append(f'{run.out}/log.jsonl', dict(
                step=step + 1, samples=history.position_of(step + 1)))
            is_killed = step + 1 == last and end.startswith('SIGKILL')
            if step + 1 in scheduled and not is_killed or step + 1 == last and end == 'SIGTERM':
                self.save(saver, run, settings, history, step + 1, step + 1 in scheduled)
        if end == 'finished' and settings['max_samples']:
            assert run.samples(len(run.steps)) == settings['max_samples'], 'a short last batch'
        if end == ENDS[-1]:
            # what it has written until then
            os.makedirs(run.out / f'checkpoints/.step_{last:08}.tmp/state')

    def take_step(self, history, feeds, folders, step, at_once, workers):
        """Keys of the samples that all ranks really read, by their positions."""
        read, taken = self.watch(folders), {}
        for rank, feed in enumerate(feeds):
            todo = history.positions_of(step, at_once, rank, len(feeds))
            for part in todo:
                read.clear()
                batch = next(feed)
                assert 'error' not in batch and not batch['bad'], batch
                texts = [text for text in batch['texts'] if text]
                # what a worker reads is seen in the batch alone, packed rows in their first text
                if not workers:
                    assert len(read) == len(part) and set(texts) <= set(read)
                    texts = read
                elif len(texts) < len(part):
                    texts = self.unpacked(batch)
                # data set by data set, by position inside each: put in the order of positions
                taken |= self.by_position(history, step, part, texts)
        positions = sorted(taken)
        begin = history.position_of(step)
        assert positions == list(range(begin, begin + len(positions))), 'positions are contiguous'
        assert begin + len(positions) == history.position_of(step + 1)
        return [taken[position] for position in positions]

    def watch(self, folders):
        """Let the folders tell which keys are really read, into a list."""
        read = []
        for folder in folders.values():
            def watched(shard, index, folder=folder):
                members = type(folder).read(folder, shard, index)
                read.append(members['txt'].decode())
                assert folder.key(shard, index) == read[-1]
                return members
            folder.read = watched
        return read

    def unpacked(self, batch):
        """The texts in a packed batch's tokens."""
        found, tokenizer = [], self.processor.tokenizer
        for row in batch['tokens'].tolist():
            texts = tokenizer.decode([i for i in row if i != tokenizer.pad_id])
            found += [texts[i:i + 4] for i in range(0, len(texts), 4)]
        return found

    def by_position(self, history, step, part, keys):
        """{position: key}: a data set's keys, as they were read, stand at its positions."""
        names = list(history.chapter_of(step).mix)
        numbers = history.order.locate(part)[0].tolist()
        taken = {}
        for number, name in enumerate(names):
            mine = [n for n, each in zip(part.tolist(), numbers) if each == number]
            its = [key for key in keys if key.startswith(name)]
            assert len(mine) == len(its)
            taken |= dict(zip(mine, its))
        return taken

    def save(self, saver, run, settings, history, step, is_scheduled):
        jsons = {'config.json': settings, 'chapters.json': history.to_json(),
                 'shards.json': history.provenance(step),
                 'progress.json': dict(step=step, samples=history.position_of(step), tokens=0,
                                       bad_samples=0, world=1, scheduled=is_scheduled)}
        number = torch.tensor([float(step)])
        saver.save(step, {'w': number}, {}, {'s': number}, jsons, {})
        saver.wait()
        self.counts['checkpoints'] += 1
        run.asked_for.discard(step)
        if is_scheduled:
            run.asked_for.add(step)
        run.damaged.discard(f'step_{step:08}')
        # all that anybody asked for stays, but where a number says how many; what is damaged and
        # was not yet come by again stays, too
        kept = sorted(each for each in run.asked_for if each <= step)[-saver.keep_last:]
        run.asked_for = {each for each in run.asked_for if each > step or each in kept}
        there = set(map(checkpoint.step_of, run.checkpoints()))
        assert run.asked_for <= there and step in there, (run.asked_for, there)

    # ---------------------------------------------------------------------------------------------
    # what is said, and what was done

    def rows_of(self, run):
        """[(step, position, data set, epoch, key)] of what was read: each data set's samples once
        an epoch."""
        rows, seen, position = [], Counter(), 0
        for step, keys in enumerate(run.steps, 1):
            for key in keys:
                name = key[0]
                rows.append((step, position, name, seen[name] // sum(SIZES[name]), key))
                seen[name] += 1
                position += 1
        return rows

    def check(self, run):
        rows = self.rows_of(run)
        for name, sizes in SIZES.items():
            mine = [row for row in rows if row[2] == name]
            if sum(sizes) <= self.fixed['whole']:
                assert max(Counter(row[3:] for row in mine).values(), default=1) == 1, name
        if not os.path.exists(run.out / 'config.json'):
            return
        said = self.show(run)
        assert [(row[0], row[1], row[2], row[5]) for row in said] == [
            (row[0], row[1], row[2], row[4]) for row in rows]
        epochs = {}
        for row, mine in zip(said, rows):
            total = sum(SIZES[row[2]])
            if total <= self.fixed['whole']:
                assert row[3] == mine[3]
            epochs.setdefault((row[2], row[3]), []).append(row[5])
        # by lanes, which may be some draws apart, too: nothing twice in an epoch
        assert all(len(set(keys)) == len(keys) for keys in epochs.values())
        # a branch has the rows of its own steps
        for row in tiny.rows(run.out, 'samples'):
            if row['step'] <= len(run.steps):
                assert row['samples'] == run.samples(row['step'])
        for name in run.whole():
            self.check_checkpoint(run, run.out / 'checkpoints' / name, said)

    def show(self, run):
        """What --show_steps prints of all steps."""
        settings = run.settings | dict(out_dir=str(run.out))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            history = show_steps.open_past(settings, str(run.out))
            show_steps.show(history, 1, len(run.steps) + 1)
        close(history.folders)
        rows = []
        for line in printed.getvalue().splitlines():
            step, position, name, epoch, shard, key = line.split('\t')
            rows.append((int(step), int(position), name, int(epoch), shard, key))
        return rows

    def check_checkpoint(self, run, path, said):
        """shards.json against what was read (`said` was held against it)."""
        progress = past.verify(path)
        step = progress['step']
        if step > len(run.steps):
            return
        assert progress['samples'] == run.samples(step)
        self.counts['shards.json'] += 1
        shards = json.loads((path / 'shards.json').read_text())
        seen = [row for row in said if row[0] <= step]
        assert {row[2] for row in seen} <= shards.keys()
        for name, found in shards.items():
            mine = [row for row in seen if row[2] == name]
            epochs = Counter(row[3] for row in mine)
            whole = found['whole_epochs']
            assert found['samples'] == len(mine)
            assert all(epochs[epoch] == sum(SIZES[name]) for epoch in range(whole))
            assert epochs[whole] < sum(SIZES[name])
            late = Counter(row[4] for row in mine if row[3] >= whole)
            assert found['shards_of_next_epoch'] == dict(sorted(late.items()))


# a form that tells which samples are really read, and by which rank
TELLING = """import os
from processor import LEARNED, READ

def form(sample, p):
    with open({path!r} + os.environ.get('RANK', '0'), 'a') as file:
        file.write(sample['text'] + '\\n')
    t = p.tokenizer
    return [(t.bos_id, READ), (sample['text'], LEARNED), (t.eos_id, LEARNED)]
"""


def last_step(run):
    return max((row['step'] for row in tiny.rows(run.out)), default=0)


class Whole(Referee):
    """The same with train.py itself, ranks, and real signals; a worker of its own at most, for
    then samples are read one after the other."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read_by = str(self.folder / 'read_by_')
        (self.folder / 'telling.py').write_text(TELLING.format(path=self.read_by))
        # those that train.py has as they are here
        for key in ('task', 'tokenizer', 'dtype', 'optimizer'):
            self.fixed.pop(key)
        self.fixed |= dict(lanes=LANES, warmup=1, processor=f'{self.folder}/telling.py:form')

    def train(self, run, settings, world):
        rng = self.rng
        if settings['max_steps']:
            # so long that a signal comes in time
            settings['max_steps'] += rng.randint(10, 40)
        settings |= dict(pack=False, workers=rng.choice([0, 0, 1]))
        for path in self.folder.glob('read_by_*'):
            path.unlink()
        before = tiny.rows(run.out)
        flags = [f'--{key}={self.text(value)}' for key, value in settings.items()]
        command = [*tiny.LLM_FLAGS, *flags, f'--out_dir={run.out}']
        process = tiny.Process('train.py', command, torchrun=world * (world > 1))
        end, moment = rng.choice(ENDS[:3]), len(run.steps) + rng.randint(0, 6)
        if end != 'finished' and tiny.wait_until(lambda: last_step(run) >= moment, process):
            kill = os.kill if end == 'SIGTERM' else os.killpg
            kill(process.pid, signal.SIGTERM if end == 'SIGTERM' else signal.SIGKILL)
        result = process.wait()
        self.counts[end] += 1
        assert 'Traceback' not in result.err, result.err
        if 'num_checkpoints=' in result.err:
            self.counts['refused'] += 1
            assert tiny.rows(run.out) == before
            return
        # a signal may come before the first step, too
        assert not result.code or end != 'finished', result.err
        if 'is finished' in result.out:
            self.counts['nothing to do'] += 1
            return
        first = 0
        if 'resumed from' in result.out:
            first = int(result.out.partition('resumed from ')[2].split()[0][-8:])
        last = max(last_step(run), first)
        if not (run.out / 'config.json').exists():
            # killed before it began
            return
        run.settings = json.loads((run.out / 'config.json').read_text())
        run.steps = run.steps[:first]
        self.read(run, first, last, world, settings)

    def text(self, value):
        if isinstance(value, dict | list):
            return json.dumps(value)
        return str(value).lower() if isinstance(value, bool) else str(value)

    def read(self, run, first, last, world, settings):
        """Keys of the steps that were taken, as each rank's form wrote them."""
        micro = settings['micro_batch_size'] or settings['batch_size'] // world
        told = []
        for rank in range(world):
            path = Path(f'{self.read_by}{rank}')
            keys = path.read_text().split() if path.exists() else []
            # the first batch is looked at before the first step
            told.append(keys[micro:])
        run.steps += [[]] * (last - first)
        by_step = {}
        for step, position, name, *_ in self.show(run):
            by_step.setdefault(step, []).append((position, name))
        for step in range(first + 1, last + 1):
            taken = {}
            for rank in range(world):
                its = [place for place in by_step[step] if place[0] % world == rank]
                keys, told[rank] = told[rank][:len(its)], told[rank][len(its):]
                assert len(keys) == len(its), (step, rank)
                for name in SIZES:
                    mine = [position for position, each in its if each == name]
                    found = [key for key in keys if key.startswith(name)]
                    assert len(found) == len(mine), (step, rank, its, keys)
                    taken |= dict(zip(mine, found))
            run.steps[step - 1] = [taken[position] for position in sorted(taken)]


def play(number, folder, sets, commands, kind=Referee, **options):
    """So many commands; how often there was what."""
    referee = kind(number, folder, sets, **options)
    for _ in range(commands):
        referee.command()
    shutil.rmtree(folder)
    return referee.counts
