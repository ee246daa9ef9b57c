"""A run's past: whatever changed between its commands, each sample came once an epoch, and what is
said of any step is true."""
import json
import os
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import tiny
from test_train import contents, show_steps
from tiny import names, rows, run

import data
import past

LANES = 8
SIZES = {'a': [3, 5], 'b': [16], 'c': [1, 0, 4, 30], 'd': [40, 2]}


class Set:
    """What a History asks of a Folder, without a file."""

    def __init__(self, name, sizes):
        self.sizes = np.array(sizes, np.int64)
        self.names = np.array([f'{name}{i}'.encode() for i in range(len(sizes))])

    def __len__(self):
        return int(self.sizes.sum())

    def name(self, shard):
        return self.names[shard].decode()


SETS = {name: Set(name, sizes) for name, sizes in SIZES.items()}
# few mixes, so that their rows are made once
MIXES = [{'a': 1}, {'b': 1.0, 'a': 2.0}, {'c': 1, 'b': 3}, {'a': 1, 'b': 1, 'c': 1, 'd': 1},
         {'d': 5, 'c': 1}, {'d': 1, 'a': 0, 'b': 2}, {'c': 2}]


def settings_of(rng, **given):
    drawn = dict(mix=rng.choice(MIXES), batch_size=rng.choice([1, 2, 4, 6, 12]), max_steps=0,
                 max_samples=0, epochs=0.0, num_checkpoints=1, allow_repeat=True)
    return drawn | dict(seed=3, lanes=LANES, window=4, whole=1 << 20, adopt=[]) | given


def begin(settings):
    return data.History(settings, {name: SETS[name] for name in settings['mix']})


class Commands:
    """A run of many commands, none of which trains: what each step saw is written down."""

    def __init__(self, rng, whole):
        self.rng, self.whole = rng, whole
        self.step, self.position = 0, 0
        self.saved, self.seen_before = None, {}
        # of each step: [(position, data set, epoch, shard, index), ...]
        self.steps = []

    def command(self):
        """Another command: from the newest checkpoint to one at a random step, or to its end."""
        rng = self.rng
        length = {'max_samples': self.position + rng.randint(1, 60)}
        if rng.random() < 0.5:
            length = {'max_steps': self.step + rng.randint(1, 6)}
        settings = settings_of(rng, whole=self.whole, **length)
        history = begin(settings)
        if self.saved:
            past.take_up(history, settings, json.loads(self.saved), self.step, self.position)
            history.seen_before = self.seen_before
        steps, _ = history.length(settings)
        world = rng.choice([world for world in (1, 2, 3) if settings['batch_size'] % world == 0])
        saves = rng.randint(self.step, steps)
        # it may be killed some steps after it saved: those are done again
        for step in range(self.step, min(saves + rng.randint(0, 2), steps)):
            if step < saves:
                self.steps.append(self.take(history, step, world))
        self.step, self.position = saves, history.position_of(saves)
        self.saved = json.dumps(history.to_json())
        self.seen_before = json.loads(json.dumps(history.provenance(saves)))
        return history

    def take(self, history, step, world):
        at_once = self.rng.choice([1, 2, 100])
        parts = [part for rank in range(world)
                 for part in history.positions_of(step, at_once, rank, world)]
        assert all(0 < len(part) <= at_once for part in parts)
        positions = np.sort(np.concatenate(parts))
        names = list(history.chapters[-1].mix)
        dataset, *places = (column.tolist() for column in history.order.locate(positions))
        return list(zip(positions.tolist(), [names[number] for number in dataset], *places))


def once_an_epoch(seen, name, in_order):
    """Each sample of a data set once an epoch, and one epoch after the other."""
    mine = [row[2:] for row in seen if row[1] == name]
    assert len(set(mine)) == len(mine)
    total = len(SETS[name])
    if in_order:
        assert [epoch for epoch, *_ in mine] == [i // total for i in range(len(mine))]


def said_is_true(commands, history):
    """What --show_steps computes, and what shards.json says."""
    for step, seen in enumerate(commands.steps):
        order, names = history.order_at(step), list(history.chapter_of(step).mix)
        positions = np.arange(history.position_of(step), history.position_of(step + 1))
        dataset, *places = (column.tolist() for column in order.locate(positions))
        assert seen == list(zip(positions.tolist(), [names[i] for i in dataset], *places)), step
    everything = [row for step in commands.steps for row in step]
    for name, said in commands.seen_before.items():
        mine = [row for row in everything if row[1] == name]
        assert said['samples'] == len(mine)
        epochs = Counter(row[2] for row in mine)
        assert all(epochs[epoch] == len(SETS[name]) for epoch in range(said['whole_epochs']))
        late = [SETS[name].name(row[3]) for row in mine if row[2] >= said['whole_epochs']]
        assert said['shards_of_next_epoch'] == dict(sorted(Counter(late).items()))


@pytest.mark.parametrize('whole', [1 << 20, 20, 0], ids=['whole', 'some by lanes', 'all by lanes'])
@pytest.mark.parametrize('number', range(10))
def test_resumes_with_anything_changed(number, whole):
    """Ten runs of 34 commands, three times: a thousand resumes."""
    commands = Commands(random.Random(number), whole)
    for _ in range(34):
        history = commands.command()
    seen = [row for step in commands.steps for row in step]
    assert [row[0] for row in seen] == list(range(len(seen))), 'positions are contiguous'
    for name in SIZES:
        once_an_epoch(seen, name, in_order=len(SETS[name]) <= whole)
    history.folders = SETS
    said_is_true(commands, history)


def test_a_resume_with_the_same_settings_adds_no_chapter():
    settings = settings_of(random.Random(0), max_steps=9)
    history = begin(settings)
    again = begin(settings)
    past.take_up(again, settings, history.to_json(), 4, 4 * settings['batch_size'])
    assert again.to_json() == history.to_json()
    other = settings | dict(batch_size=settings['batch_size'] + 1)
    past.take_up(again, other, history.to_json(), 4, 4 * settings['batch_size'])
    assert [chapter.step for chapter in again.chapters] == [0, 4]


def test_a_data_set_that_is_not_what_it_was_is_refused_or_begins_anew():
    settings = settings_of(random.Random(0), mix={'a': 1, 'b': 1}, batch_size=4, max_steps=9)
    saved = begin(settings).to_json()
    changed = data.History(settings, {'a': SETS['a'], 'b': Set('b', [15])})
    with pytest.raises(ValueError, match="'b'.*16 samples.*15.*adopt"):
        past.take_up(changed, settings, saved, 6, 24)
    adopting = settings | dict(adopt=['b'])
    assert past.take_up(changed, adopting, saved, 6, 24) == ['b']
    assert [chapter.step for chapter in changed.chapters] == [0, 6]
    assert changed.order.before(24, 1) == 0 and changed.order.before(24, 0) == 12
    with pytest.raises(ValueError, match="'b' is not what it was at step 1"):
        changed.order_at(3)
    # once it is adopted, it is what it was
    again = data.History(settings, changed.folders)
    assert past.take_up(again, settings, changed.to_json(), 8, 32) == []
    assert again.to_json() == changed.to_json()


# -----------------------------------------------------------------------------------------------
# from end to end


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Data sets of 16 and of 203 words."""
    made = tmp_path_factory.mktemp('sets')
    for name, count in (('few', 16), ('many', 203)):
        tiny.write(made / name, [(f'{name}-{i:03}', None, f'word {i}') for i in range(count)])
    return made


@pytest.fixture
def train(folder, tmp_path):
    """train(*flags): a language model on few words into tmp_path/run; its Result."""
    def command(*extra, **kwargs):
        return run('train.py', *tiny.LLM_FLAGS, f'--data_dir={folder}', '--mix={"few": 1}',
                   '--warmup=1', f'--out_dir={tmp_path / "run"}', *extra, **kwargs)
    return command


def keys_of(out, last):
    """Keys of the samples of each step, as show_steps says."""
    return [[line[-1] for line in lines] for lines in show_steps(out, f'1:{last + 1}').values()]


def stop_after_two(train, out, *flags):
    """Two steps of what is meant to be longer."""
    train('--max_steps=2', *flags).ok()
    assert names(out) == ['step_00000002']


def test_another_batch_size_and_each_sample_once(train, tmp_path):
    stop_after_two(train, tmp_path / 'run', '--batch_size=4')
    train('--epochs=1', '--batch_size=2').ok()
    seen = keys_of(tmp_path / 'run', 6)
    assert [len(step) for step in seen] == [4, 4, 2, 2, 2, 2]
    assert sorted(key for step in seen for key in step) == [f'few-{i:03}' for i in range(16)]
    assert [row['samples'] for row in rows(tmp_path / 'run')] == [4, 8, 10, 12, 14, 16]
    said = json.loads((tmp_path / 'run/checkpoints/latest/shards.json').read_text())
    assert said['few']['samples'] == 16 and said['few']['whole_epochs'] == 1


@pytest.mark.parametrize('ranks', [0, 2])
def test_an_epoch_ends_with_a_short_batch(train, tmp_path, ranks):
    flags = ['--mix={"many": 1}', '--batch_size=12', '--epochs=1', '--allow_repeat=false']
    train(*flags, torchrun=ranks).ok()
    found = rows(tmp_path / 'run')
    assert [row['samples'] for row in found] == [12 * i for i in range(1, 17)] + [203]
    assert found[-1]['epoch'] == 1.0
    seen = keys_of(tmp_path / 'run', 17)
    assert sorted(key for step in seen for key in step) == [f'many-{i:03}' for i in range(203)]
    train(*flags, f'--out_dir={tmp_path / "alone"}').ok()
    assert [row['loss'] for row in found] == pytest.approx(
        [row['loss'] for row in rows(tmp_path / 'alone')], abs=1e-5)


def test_max_samples_is_exact(train, tmp_path):
    train('--batch_size=12', '--max_samples=100').ok()
    assert [row['samples'] for row in rows(tmp_path / 'run')][-2:] == [96, 100]
    # and goes on from there
    train('--batch_size=12', '--max_samples=130').ok()
    assert [row['samples'] for row in rows(tmp_path / 'run')][-4:] == [100, 112, 124, 130]
    positions = [line[0] for lines in show_steps(tmp_path / 'run', '1:13').values()
                 for line in lines]
    assert positions == list(range(130))


def test_a_finished_run_changes_no_byte(train, tmp_path):
    flags = ['--batch_size=4', '--max_steps=3']
    train(*flags).ok()
    before = contents(tmp_path / 'run')
    for change in ('--lr=1.0', '--batch_size=2', '--max_steps=2', '--mix={"many": 1}'):
        assert 'finished' in train(*flags, change).ok().out
        assert contents(tmp_path / 'run') == before, change


def test_a_checkpoint_branches_off(train, tmp_path):
    train('--batch_size=4', '--max_steps=4', '--num_checkpoints=2').ok()
    before = contents(tmp_path / 'run')
    branch = tmp_path / 'branch'
    flags = [f'--resume={tmp_path}/run/checkpoints/step_00000002', f'--out_dir={branch}',
             '--batch_size=2', '--max_steps=6', '--lr=1e-4']
    result = train(*flags).ok()
    assert 'lr 0.005 -> 0.0001' in result.out and contents(tmp_path / 'run') == before
    assert [(row['step'], row['samples']) for row in rows(branch)] == [
        (3, 10), (4, 12), (5, 14), (6, 16)]
    seen = keys_of(branch, 6)
    assert sorted(key for step in seen for key in step) == [f'few-{i:03}' for i in range(16)]
    assert seen[:2] == keys_of(tmp_path / 'run', 2)
    # the same command goes on in the branch
    assert 'finished' in train(*flags).ok().out
    # what was before it is known before it has a checkpoint of its own, too
    shutil.rmtree(branch / 'checkpoints')
    assert keys_of(branch, 6) == seen
    train('--resume=nowhere', f'--out_dir={tmp_path / "other"}', '--max_steps=2').refused(
        'resume', 'nowhere', 'missing')


def test_keep_last_deletes_nothing_that_was_asked_for_by_another_command(train, tmp_path):
    out = tmp_path / 'run'
    train('--max_steps=4', '--num_checkpoints=4').ok()
    train('--max_steps=6', '--num_checkpoints=1').ok()
    assert names(out) == [f'step_{step:08}' for step in (1, 2, 3, 4, 6)]
    train('--max_steps=8', '--num_checkpoints=1', '--keep_last=3').ok()
    assert names(out) == [f'step_{step:08}' for step in (4, 6, 8)]


def test_float16_after_float32_begins_its_scale_anew(train, tmp_path):
    train('--max_steps=2').ok()
    train('--max_steps=4', '--dtype=float16').ok()
    assert rows(tmp_path / 'run')[-1]['loss_scale'] >= 2.0 ** 10
    progress = json.loads((tmp_path / 'run/checkpoints/latest/progress.json').read_text())
    assert progress['good_steps'] <= 2


def test_a_data_set_that_was_made_again(train, folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'sets')
    flags = [f'--data_dir={tmp_path / "sets"}', '--batch_size=4']
    train(*flags, '--max_steps=2').ok()
    shutil.rmtree(tmp_path / 'sets/few')
    tiny.write(tmp_path / 'sets/few', [(f'new-{i:03}', None, f'word {i}') for i in range(12)])
    before = contents(tmp_path / 'run')
    train(*flags, '--max_steps=5').refused("'few'", '16 samples', '12', '--adopt')
    assert contents(tmp_path / 'run') == before
    result = train(*flags, '--max_steps=5', '--adopt=["few"]').ok()
    assert "adopted: data set 'few'" in result.out
    seen = show_steps(tmp_path / 'run', '3:6')
    assert sorted(line[-1] for step in seen.values() for line in step) == [
        f'new-{i:03}' for i in range(12)]
    run('data.py', tmp_path / 'run/config.json', '--show_steps=1:2').failed(
        "'few' is not what it was at step 1")


def test_a_tokenizer_that_was_made_again(train, tmp_path):
    sentencepiece = pytest.importorskip('sentencepiece')

    def make(words):
        with open(tmp_path / 'mine.model', 'wb') as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(words * 20), model_writer=model, vocab_size=40,
                hard_vocab_limit=False, minloglevel=2)

    flags = [f'--tokenizer={tmp_path / "mine.model"}']
    make(tiny.NAMES)
    train(*flags, '--max_steps=2').ok()
    make(tiny.NAMES[::-1] + ['word'])
    before = contents(tmp_path / 'run')
    train(*flags, '--max_steps=4').refused('mine.model', 'step_00000002', '--adopt=')
    assert contents(tmp_path / 'run') == before
    train(*flags, '--max_steps=4', '--adopt=["mine.model"]').ok()
    os.remove(tmp_path / 'mine.model')
    train(*flags, '--max_steps=4').refused('mine.model', 'does not exist')
