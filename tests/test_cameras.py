"""Cameras of robots: which picture is which, in the data sets of a mix, in training and where the
policy acts; depth; a state that is left out; statistics of other data."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from conftest import encode, make_processor, picture, robot_processor, write_set
from test_policy_train import FLAGS, KINDS, npy

import tasks
from hub import open_run
from processor import collate
from robots import actions
from robots.acting import fields_of, policy_of
from robots.cameras import fits
from robots.record import saved
from shards import BadSample, Folder
from tokenizer import Bytes

SEES = {name: encode(picture(i)[..., :3]) for i, name in enumerate(('a', 'b', 'c'))}
DEPTH = encode(np.full((16, 16), 20_000, np.uint16))


def robot(pictures=(), numbers=4, states=39, steps=4, **said):
    """The members of a robot's sample; pictures: camera -> its picture, or names of SEES."""
    if not isinstance(pictures, dict):
        pictures = {name: SEES[name] for name in pictures}
    rng = np.random.default_rng(0)
    lowdim = saved(np.savez, proprio=rng.standard_normal(states),
                   actions=rng.uniform(-1, 1, (steps, numbers)), is_pad=np.zeros(steps, bool))
    views = {f'{name}.png': data for name, data in pictures.items()}
    return views | {'lowdim.npz': lowdim,
                    'json': json.dumps(dict(instruction='go') | said).encode()}


def write(folder, members):
    """A data set of one shard, with statistics of its sizes."""
    write_set(folder, [[(f's{i}', each) for i, each in enumerate(members)]])
    (folder / 'stats.json').write_text(json.dumps(stats_of((4, 39))))
    return str(folder)


def stats_of(*sizes):
    """What prepare/stats.py says of samples with (numbers of an action, of a state)."""
    found = {'actions': actions.Statistics(0), 'proprio': actions.Statistics(0)}
    for pair in sorted(sizes):
        for key, width in zip(found, pair):
            new = actions.Statistics(width)
            if width:
                new.update(np.eye(width)[:1])
            new.merge(found[key])
            found[key] = new
    return {key: each.to_dict() for key, each in found.items()}


def settings_of(tmp_path, sets, task='vla', **more):
    """The settings of a run of these data sets, {name: [members, ...]}, with what statistics
    say."""
    base = dict(task=task, data_dir='', cache_dir=str(tmp_path / 'cache'), cache_gb=1.0, val={},
                mix={write(tmp_path / name, members): 1.0 for name, members in sets.items()},
                action_steps=4, action_dim=4, proprio_dim=39)
    settings = tasks.defaults(task) | base | more
    settings['cameras_of'] = {str(tmp_path / name): names
                              for name, names in settings['cameras_of'].items()}
    return settings


def begin(tmp_path, sets, **more):
    """What a run is told before it begins: its stats.json. Raises ValueError."""
    settings = settings_of(tmp_path, sets, **more)
    tasks.load(settings['task']).check(settings, 1)
    folders = [Folder(name, '', settings['cache_dir']) for name in settings['mix']]
    return tasks.load(settings['task']).statistics(settings, folders)['stats.json']


def processor(*cameras, **settings):
    return make_processor(64, 16, 4, task='vla', cameras=list(cameras), action_steps=4,
                          action_dim=4, proprio_dim=39, **settings)


# -----------------------------------------------------------------------------------------------
# what stands beside robots


CAPTION = {'png': SEES['a'], 'txt': b'a dog'}
BESIDE_ROBOTS = {
    'caption': CAPTION,
    'two pictures': {'a.png': SEES['a'], 'b.png': SEES['b'], 'txt': b'two dogs'},
    'question': {'png': SEES['a'], 'json': b'{"prefix": "what?", "suffix": "a dog"}'},
    'question in words': {'json': b'{"prefix": "what?", "suffix": "a dog"}'},
    'text': {'txt': b'once upon a time'},
    'long text': {'txt': b'once upon a time ' * 20},
    'tokens': {'tokens.npy': npy(np.arange(1, 30, dtype=np.uint16))}}


@pytest.mark.parametrize('kind', BESIDE_ROBOTS)
def test_what_has_no_actions_is_as_a_vlm_has_it(kind):
    """Cameras are of robots: a caption keeps its picture, a text has none."""
    ours = processor('a', 'b', 'c').pieces(BESIDE_ROBOTS[kind])
    theirs = make_processor(64, 16, 4).pieces(BESIDE_ROBOTS[kind])
    assert len(ours) == len(theirs) and (kind != 'long text' or len(ours) == 6)
    for one, other in zip(ours, theirs):
        assert one.keys() == other.keys()
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key])


def test_robots_need_no_words():
    """The run's own are said; another sample without an answer is a bad one."""
    p = processor('a', prompt='go on')
    for members in (robot('a', instruction='go on'), robot('a'), robot()):
        if members['json'] == b'{"instruction": "go"}':
            members = members | {'json': b'{}'}
        piece, = p.pieces(members)
        ids = Bytes().encode('go on\n')
        assert piece['tokens'].tolist()[-len(ids):] == ids and 'beside' in piece
    with pytest.raises(BadSample, match='nothing to answer'):
        p.pieces({'png': SEES['a'], 'json': b'{"instruction": "go"}'})


def test_a_mix_of_all_kinds_is_learned_without_a_bad_sample(tmp_path):
    sets = {kind.replace(' ', '_'): [members] * 3 for kind, members in BESIDE_ROBOTS.items()}
    sets |= {'robots': [robot('ab')] * 3, 'blind': [robot()] * 3}
    for name, members in sets.items():
        write(tmp_path / name, members)
    flags = [flag for flag in FLAGS if not flag.startswith(('--mix', '--seq_len', '--max_steps'))]
    done = tiny.run(
        'train.py', *flags, *KINDS['vla'][:-2], '--seq_len=64', '--max_steps=3',
        f'--mix={json.dumps(dict.fromkeys(sets, 1.0))}', '--cameras=["b", "a"]',
        '--cameras_of={"blind": {}}', f'--stats={tmp_path}/robots/stats.json',
        f'--data_dir={tmp_path}', f'--out_dir={tmp_path / "run"}').ok()
    assert 'bad sample' not in done.err
    assert tiny.rows(tmp_path / 'run')[-1]['bad_samples'] == 0
    losses = tiny.rows(tmp_path / 'run')[-1]
    assert losses['loss/text'] > 0 and losses['loss/actions'] > 0


# -----------------------------------------------------------------------------------------------
# names


def test_a_camera_keeps_its_place_whatever_the_case_of_its_letters():
    """As members of a tar come, and as a reader of one's own may give them."""
    members = robot({'Wrist': SEES['a'], 'base': SEES['b']})
    for given in (members, {ext.lower(): data for ext, data in members.items()}):
        piece, = processor('base', 'WRIST').pieces(given)
        assert piece['beside']['camera_mask'].tolist() == [True, True]
        for pixels, number in zip(piece['pictures'], (1, 0), strict=True):
            np.testing.assert_array_equal(pixels, picture(number)[..., :3])


def test_an_upper_case_extension_is_a_picture(tmp_path):
    write(tmp_path / 'x', [{'Wrist.PNG': SEES['c']} | robot()])
    members = Folder(str(tmp_path / 'x'), '', str(tmp_path / 'cache')).read(0, 0)
    piece, = processor('Wrist').pieces(members)
    np.testing.assert_array_equal(piece['pictures'][0], picture(2)[..., :3])


def test_two_cameras_with_the_same_last_part_stay_two():
    names = 'observation.images.b.wrist', 'observation.images.a.wrist'
    piece, = processor(*names).pieces(robot(dict(zip(names, SEES.values()))))
    for pixels, number in zip(piece['pictures'], (0, 1), strict=True):
        np.testing.assert_array_equal(pixels, picture(number)[..., :3])
    with pytest.raises(BadSample, match="two pictures of camera 'a'"):
        processor('a').pieces(robot('a') | {'a.jpg': encode(picture(1)[..., :3], 'JPEG')})


def test_a_data_set_calls_a_camera_what_it_likes():
    p = processor('base', 'wrist', cameras_of={'droid': {'base': 'Ext_1'}, 'old': {'base': ''}})
    for data_set, members in (('droid', robot({'ext_1': SEES['c'], 'wrist': SEES['a']})),
                              ('old', robot({}) | {'png': SEES['c']})):
        piece, = p.pieces(members, data_set=data_set)
        assert piece['beside']['camera_mask'].tolist() == [True, False], data_set
        np.testing.assert_array_equal(piece['pictures'][0], picture(2)[..., :3])
        # nobody attends to the one that it is said to lack
        assert piece['seen'].tolist()[:8] == [True] * 4 + [False] * 4
    piece, = p.pieces(robot({'base': SEES['a'], 'wrist': SEES['b']}), data_set='another')
    assert piece['beside']['camera_mask'].all()


@pytest.mark.parametrize('sets, more, said', [
    # a name that no sample has
    ({'x': [robot('ab')]}, dict(cameras=['a', 'bb']),
     ("'bb'", 'has a, b', "mean 'b'", 'cameras_of=')),
    ({'x': [robot('a')], 'y': [robot()]}, dict(cameras=['a'], stats='x'), ('y', 'has none')),
    ({'x': [robot('ab')]}, dict(cameras=['a', 'b'], cameras_of={'x': {'a': 'a', 'b': 'bb'}}),
     ("'bb'", "mean 'b'")),
    ({'x': [robot({'observation.images.wrist': SEES['a']})]}, dict(cameras=['wrist']),
     ("mean 'observation.images.wrist'",)),
    # settings that can not be
    ({'x': [robot('a')]}, dict(cameras=['a', 'A']), ('twice',)),
    ({'x': [robot('a')]}, dict(cameras=['a'], cameras_of={'y': {}}), ('y', 'no data set')),
    ({'x': [robot('a')]}, dict(cameras=['a'], cameras_of={'x': {'b': 'a'}}), ("'b'", "['a']")),
    ({'x': [robot('a')]}, dict(cameras=['a'], cameras_of={'x': ['a']}), ('a dict',)),
    # pictures would be told apart by the order of their names alone
    ({'x': [robot('a')], 'y': [robot('b')]}, dict(stats='x'), ('has a', 'has b', 'cameras_of')),
    ({'x': [robot('ab'), robot('b')]}, {}, ("1 of 2", "'a'", "cameras=['a', 'b']")),
    # depth
    ({'x': [robot('a') | {'depth.png': DEPTH}]}, dict(cameras=['a', 'depth']),
     ("'depth'", '16 bits', "cameras=['a']")),
    ({'x': [robot('a') | {'depth.png': DEPTH}]}, {}, ("'depth'", '16 bits', "cameras=['a']")),
    ({'x': [robot('a') | {'depth.npy': npy(np.zeros((2, 2)))}]}, dict(cameras=['depth']),
     ('depth.npy', 'no picture'))])
def test_what_is_named_wrongly_ends_a_run_before_it_begins(tmp_path, sets, more, said):
    if 'stats' in more:
        more = more | dict(stats=str(tmp_path / more['stats'] / 'stats.json'))
    with pytest.raises(ValueError) as error:
        begin(tmp_path, sets, **more)
    assert all(word in str(error.value) for word in said), error.value
    assert '\n' not in str(error.value)


def test_what_is_named_rightly_begins(tmp_path, capsys):
    sets = {'x': [robot('ab'), robot('b'), robot('ab')], 'words': [CAPTION]}
    assert 'cameras' not in begin(tmp_path, sets, cameras=['b', 'A'])
    assert "1 of 3 samples of" in (said := capsys.readouterr().out) and "lack camera 'A'" in said
    lacks = sets | {'y': [robot('a')]}
    begin(tmp_path / 'two', lacks, cameras=['b', 'a'], stats=str(tmp_path / 'x/stats.json'),
          cameras_of={'y': {'a': 'a'}})
    assert 'lack' in capsys.readouterr().out

    # of a run that names none the checkpoint says what it saw; a policy learns of actions alone
    seen = begin(tmp_path / 'all', {'x': [robot('ba')], 'words': [CAPTION]}, task='policy',
                 **{'policy.encoder': 'vlm'})
    assert seen['cameras'] == ['a', 'b']
    assert 'words: nothing is learned' in capsys.readouterr().out


def test_validation_has_the_cameras_too(tmp_path):
    val = write(tmp_path / 'val', [robot('b')])
    with pytest.raises(ValueError, match="val' has 'a'"):
        begin(tmp_path, {'x': [robot('a')]}, cameras=['a'], val={'held': val})


def test_the_last_shard_may_be_the_one_with_the_camera(tmp_path):
    folder = tmp_path / 'x'
    write(folder, [robot('a')])
    write_set(folder, [[(f's{i}', robot('b' if i == 8 else 'a'))] for i in range(9)])
    settings = settings_of(tmp_path, {}, cameras=['b'], mix={str(folder): 1.0})
    vla = tasks.load('vla')
    vla.statistics(settings, [Folder(str(folder), '', settings['cache_dir'])])


def test_a_wrong_name_is_one_line_before_step_0(tmp_path):
    write(tmp_path / 'x', [robot('ab')] * 2)
    flags = *FLAGS, *KINDS['vla'][:-2], '--mix={"x": 1.0}', f'--data_dir={tmp_path}'
    tiny.run('train.py', *flags, '--cameras=["a", "bee"]', f'--out_dir={tmp_path}/run').refused(
        "'bee'", 'a, b', "did you mean 'b'")
    assert not (tmp_path / 'run').exists()


# -----------------------------------------------------------------------------------------------
# depth


def test_depth_is_never_a_picture():
    """16 bits by the name of depth; as a grey they are 77 of 255, and 8 bits are a picture."""
    p = processor()
    for name in ('depth', 'wrist_Depth', 'depth.left'):
        with pytest.raises(BadSample, match='holds depth'):
            p.pieces(robot({name: DEPTH}))
        with pytest.raises(BadSample, match='holds depth'):
            make_processor(64, 16, 4).pieces({f'{name}.png': DEPTH, 'txt': b'far'})
        # a camera that is not asked for disturbs nobody
        assert len(processor('a').pieces(robot({'a': SEES['a'], name: DEPTH}))) == 1
    piece, = p.pieces(robot({'grey': DEPTH}))
    assert (piece['pictures'][0] == 77).all()
    piece, = p.pieces(robot({'depth': SEES['a']}))
    np.testing.assert_array_equal(piece['pictures'][0], picture(0)[..., :3])


# -----------------------------------------------------------------------------------------------
# a state that is left out


@pytest.mark.parametrize('kind', ['state', 'vla'])
def test_a_run_may_leave_the_state_out(tmp_path, kind):
    """It trains, resumes, and acts, whatever state a robot sends."""
    write(tmp_path / 'x', [robot('a')] * 4)
    flags = [*FLAGS, *KINDS[kind], '--proprio_dim=0', '--mix={"x": 1.0}',
             f'--data_dir={tmp_path}', f'--out_dir={tmp_path}/run', '--num_checkpoints=1']
    tiny.run('train.py', *flags, '--max_steps=2').ok()
    assert 'resumed' in tiny.run('train.py', *flags).ok().out
    assert tiny.rows(tmp_path / 'run')[-1]['bad_samples'] == 0

    run = open_run(f'{tmp_path}/run')
    assert fields_of(run)['proprio'] == ('float32', (39,), True)
    act = policy_of(run, SimpleNamespace(seed=0, sample_steps=2, sampler=''))
    seen = dict(instruction='go', pictures=dict(a=picture(0)[..., :3]), seed=0, step=0)
    chunks = [act([seen | state]) for state in ({}, dict(proprio=np.ones(39)),
                                                dict(proprio=np.zeros(3)))]
    assert chunks[0].shape == (1, 4, 4)
    for chunk in chunks[1:]:
        np.testing.assert_array_equal(chunk, chunks[0])


def test_relative_actions_need_the_state():
    stats = stats_of((2, 2)) | dict(pairs=[(0, 0)], action_steps=4)
    with pytest.raises(ValueError, match='proprio_dim=0'):
        actions.Units(stats, 'none', 4, 2, 0)


# -----------------------------------------------------------------------------------------------
# statistics of other data


@pytest.mark.parametrize('stats, more, said', [
    (stats_of((3, 39)), {}, ('actions have 3 numbers', 'have 4')),
    (stats_of((5, 39)), {}, ('actions have 5 numbers', 'have 4')),
    (stats_of((4, 38)), {}, ('proprio have 38 numbers', 'have 39')),
    (stats_of((4, 40), (4, 41)), {}, ('proprio have 41 numbers', 'have 39')),
    (stats_of((4, 39)), {}, ()),
    (stats_of((4, 39), (7, 41)), {}, ()),
    (stats_of((4, 38)), dict(proprio_dim=0), ())])
def test_statistics_are_of_the_data(tmp_path, stats, more, said):
    path = tmp_path / 'stats.json'
    path.write_text(json.dumps(stats))
    sets = {'x': [robot('a')], 'words': [CAPTION]}
    if not said:
        begin(tmp_path, sets, stats=str(path), **more)
        return
    with pytest.raises(ValueError) as error:
        begin(tmp_path, sets, stats=str(path), **more)
    for word in (*said, 'prepare/stats.py --data=', '/x --out='):
        assert word in str(error.value), error.value


def test_a_robot_without_a_state_is_one_of_those_that_were_counted():
    assert fits(stats_of((4, 39), (4, 0)), 'proprio', 0)
    assert not fits(stats_of((4, 39)), 'proprio', 0)


def test_a_sample_of_more_numbers_than_the_statistics_is_a_bad_one():
    p = robot_processor(32, (4, 8, 50))
    p.known_numbers = 4, 39
    assert len(p.pieces(robot())) == 1
    for more in (dict(numbers=5), dict(states=40)):
        with pytest.raises(BadSample, match='prepare/stats.py'):
            p.pieces(robot(**more))


# -----------------------------------------------------------------------------------------------
# where the policy acts


class Seen(Exception):
    """What a model was shown."""


def shown(run, pictures):
    """The pixels and the segments that a policy gets of an observation."""
    def stop(**seen):
        raise Seen(seen)

    model = SimpleNamespace(sample=stop)
    fake = SimpleNamespace(**vars(run) | dict(model=model), inputs=run.inputs)
    observation = dict(proprio=np.zeros(39), instruction='go', pictures=pictures, seed=0, step=0)
    with pytest.raises(Seen) as seen:
        policy_of(fake, SimpleNamespace(seed=0, sample_steps=1, sampler=''))([observation])
    return seen.value.args[0]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(a run that names its cameras, one that does not), each of a step."""
    folder = tmp_path_factory.mktemp('trained')
    write(folder / 'x', [robot('ab')] * 2)
    write(folder / 'y', [robot('b')] * 2)
    flags = [*FLAGS, *KINDS['vla'][:-2], f'--data_dir={folder}', '--max_steps=1', '--ema=0',
             f'--stats={folder}/x/stats.json']
    tiny.run('train.py', *flags, '--mix={"x": 1.0, "y": 1.0}', '--cameras=["b", "a"]',
             '--cameras_of={"y": {"b": "b"}}', f'--out_dir={folder}/named').ok()
    tiny.run('train.py', *flags, '--mix={"x": 1.0}', f'--out_dir={folder}/all').ok()
    return open_run(f'{folder}/named'), open_run(f'{folder}/all')


def test_a_policy_is_shown_what_it_was_trained_on(trained):
    """Cameras in the same order, however a robot sends them; one that a data set lacked may be
    missing, no other."""
    views = {name: picture(i)[..., :3] for i, name in enumerate('ab')}
    named, every = trained
    for run, order in ((named, 'ba'), (every, 'ab')):
        piece, = run.processor.pieces(robot('ab'))
        expected = collate([piece | dict(part=0, position=0)], run.processor)
        for given in (views, dict(reversed(views.items()))):
            seen = shown(run, given)
            want = run.processor.eyes.to_tensor(expected['pixels'], 'cpu')
            np.testing.assert_array_equal(seen['pixels'], want)
            eyes = np.stack([views[name] for name in order])
            np.testing.assert_array_equal(expected['pixels'], eyes)

    seen = shown(named, {'b': views['b']})
    assert (seen['segments'][0, :8] == 1).tolist() == [True] * 4 + [False] * 4
    for run, given, name in ((named, 'a', 'b'), (every, 'a', 'b'), (every, 'b', 'a')):
        with pytest.raises(ValueError, match=f"camera '{name}'"):
            shown(run, {given: views[given]})

    # so a server asks for it, or takes what comes
    of_named, of_every = fields_of(named), fields_of(every)
    assert of_named['a'] == ('uint8', (16, 16, 3), True) and not of_named['b'][2]
    assert not of_every['a'][2] and not of_every['b'][2] and not of_every['proprio'][2]
