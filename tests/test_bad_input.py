"""Bad input from end to end: every kind of damage, with 0 and 2 workers, on 1 and 2 ranks. Damage
to a sample is a counted placeholder and costs no step; damage to a shard ends the run in one line.
Nothing hangs: see the timeouts."""
import gzip
import io
import json
import tarfile
import zlib

import numpy as np
import pytest
import tiny
from conftest import encode, picture, sample, write_set
from tiny import rows, run

NEEDS = 'robots', 'tasks/vla.py'
BOTH = [(workers, ranks) for workers in (0, 2) for ranks in (0, 2)]


def bomb(side):
    """A PNG of a few bytes that says it has side x side pixels."""
    data = encode(picture(1))
    header = b'IHDR' + side.to_bytes(4, 'big') * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, 'big') + data[33:]


def arrays(**values):
    out = io.BytesIO()
    np.savez(out, **values)
    return out.getvalue()


PNG = encode(picture(1))
PUSH = {'cam.png': PNG, 'json': b'{"instruction": "push"}'}
SAMPLES = {
    'cut': {'png': PNG[:60], 'txt': b'a'},
    'no-picture': {'png': b'', 'txt': b'a'},
    'bomb': {'png': bomb(60000), 'txt': b'a'},
    'latin': {'png': PNG, 'txt': 'é'.encode('latin-1')},
    'mute': {'png': PNG},
    'long': sample(1, 'x' * 99),
    'json': {'png': PNG, 'json': b'{'},
    'deep': {'png': PNG, 'json': b'[' * 100_000},
    'surrogate': {'json': b'{"text": "\\ud800"}'},
    'nan': PUSH | {'lowdim.npz': arrays(actions=np.full((2, 2), np.nan))},
    'shape': PUSH | {'lowdim.npz': arrays(actions=np.zeros(3))},
    'no-zip': PUSH | {'lowdim.npz': b'PK'},
    'zip-bomb': PUSH | {'lowdim.npz': None},
    'tokens': {'tokens.npy': b'\x93NUMPY'},
    'other-tokens': {'tokens.bin': np.array([1, 9999], np.uint16).tobytes()},
    'odd-tokens': {'tokens.bin': b'abc'}}


def zip_bomb():
    """A small .npz that unpacks to 80 MB."""
    out = io.BytesIO()
    np.savez_compressed(out, actions=np.zeros((10 ** 7, 2), np.float32))
    return out.getvalue()


# a task that reads all of them: text, pictures, tokens and actions
ACTIONS = ['--task=vla', '--action_steps=4', '--action_dim=2', '--vla.width=32',
           '--vla.mlp_dim=32']
STATS = dict(mean=[0, 0], std=[1, 1], min=[-1, -1], max=[1, 1], q01=[-1, -1], q99=[1, 1])


def train(folder, out, workers, ranks, *extra):
    stats = out.parent / 'stats.json'
    stats.write_text(json.dumps(dict(actions=STATS, proprio=dict.fromkeys(STATS, []))))
    return run('train.py', *tiny.FLAGS, *ACTIONS, f'--stats={stats}', f'--mix={{"{folder}": 1}}',
               '--max_steps=6', f'--out_dir={out}', f'--workers={workers}', *extra,
               torchrun=ranks, timeout=90)


@pytest.fixture(scope='module')
def spoiled(tmp_path_factory):
    """Twelve good samples and one of each bad kind, a repeated member, and a key whose members lie
    apart."""
    bad = SAMPLES | {'zip-bomb': PUSH | {'lowdim.npz': zip_bomb()}}
    good = [(f'good{i}', sample(i, 'ab' * i + 'c')) for i in range(11)]
    folder = write_set(tmp_path_factory.mktemp('bad') / 'set',
                       [[*good[:6], *bad.items()], good[6:]])
    with tarfile.open(folder / '00000001.tar', 'a') as tar:
        for name, data in (('apart.png', PNG), ('twice.txt', b'a'), ('twice.txt', b'b'),
                           ('apart.txt', b'ab')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / 'manifest.jsonl').write_text(
        ''.join(json.dumps({'shard': f'{i:08d}', 'num_sequences': n}) + '\n'
                for i, n in enumerate((6 + len(bad), 5 + 2))))
    return folder


@pytest.fixture(scope='module')
def alone(spoiled, tmp_path_factory):
    out = tmp_path_factory.mktemp('alone') / 'run'
    return out, train(spoiled, out, 0, 0, '--max_bad_fraction=1').ok()


def test_each_kind_is_counted_and_named(spoiled, alone):
    out, result = alone
    shown = run('data.py', out / 'config.json', '--show_steps=0:6').ok().out.splitlines()
    keys = [line.split('\t')[-1] for line in shown]
    bad = [key for key in keys if not key.startswith(('good', 'apart'))]
    assert set(bad) == {*SAMPLES, 'twice'} and 'apart' in keys
    lines = [line for line in result.lines if line.startswith('bad sample')]
    assert sorted(line.split(', ')[1].split(':')[0] for line in lines) == sorted(bad)
    assert rows(out)[-1]['bad_samples'] == len(bad) and len(rows(out)) == 6


@pytest.mark.parametrize('workers, ranks', BOTH[1:])
def test_workers_and_ranks_see_the_same_bad_samples(spoiled, alone, tmp_path, workers, ranks):
    train(spoiled, tmp_path / 'run', workers, ranks, '--max_bad_fraction=1').ok()
    ours, theirs = rows(tmp_path / 'run'), rows(alone[0])
    assert all([row[k] for row in ours] == [row[k] for row in theirs]
               for k in ('step', 'tokens', 'bad_samples'))
    assert [row['loss']
            for row in ours] == pytest.approx([row['loss'] for row in theirs], abs=1e-5)


def header_at(data, number):
    """Where the header of a member of a tar begins."""
    return tarfile.open(fileobj=io.BytesIO(data)).getmembers()[number].offset


def with_header(data, number, new):
    """A tar of which the header of a member begins with other bytes."""
    begin = header_at(data, number)
    return data[:begin] + new + data[begin + len(new):]


SHARDS = {
    'cut in data': lambda data: data[:header_at(data, 9) + 600],
    'cut in a header': lambda data: data[:header_at(data, 9) + 100],
    "cut at a member's edge": lambda data: data[:header_at(data, 9)],
    'a damaged header': lambda data: with_header(data, 9, b'\0\1\2'),
    'a header of zeros': lambda data: with_header(data, 9, bytes(512)),
    'empty': lambda data: b'',
    'no tar': lambda data: b'hello' * 1000,
    'gzip bomb': lambda data: gzip.compress(data + bytes(10 ** 8)),
    'one sample less': lambda data: data[:header_at(data, 20)] + bytes(10240),
    'missing': None}


def damaged(folder, kind):
    """Two shards of which the second, that step 0 need not read, is damaged."""
    write_set(folder, [12, 12])
    shard = folder / '00000001.tar'
    if SHARDS[kind]:
        shard.write_bytes(SHARDS[kind](shard.read_bytes()))
    else:
        shard.unlink()
    return folder


@pytest.mark.parametrize('kind', SHARDS)
@pytest.mark.parametrize('workers', [0, 2])
def test_a_damaged_shard_ends_the_run_in_one_line(tmp_path, kind, workers):
    result = train(damaged(tmp_path / 'set', kind), tmp_path / 'run', workers, 0)
    result.failed('00000001.tar', code=1)


@pytest.mark.parametrize('kind', ['cut in a header', 'gzip bomb', 'missing'])
@pytest.mark.parametrize('workers', [0, 2])
def test_ranks_do_not_wait_for_one_that_met_a_damaged_shard(tmp_path, kind, workers):
    """One lane a rank, each lane half the samples: one rank reads the good shard, the other one
    the damaged."""
    result = train(damaged(tmp_path / 'set', kind), tmp_path / 'run', workers, 2, '--lanes=2',
                   '--window=100')
    own = [line for line in result.lines if line.startswith('train.py: ')]
    assert result.code == 1 and own and all('00000001.tar' in line for line in own), result.err


@pytest.mark.parametrize(
    'line', ['{"shard": "00000001", "num_sequences": -1}', '{"shard": 1, "num_sequences": 12}',
             'x', '{"shard": "00000000", "num_sequences": 12}', '{"num_sequences": 12}',
             '{"shard": "00000001", "num_sequences": 1000000000000000000000}',
             '{"shard": "00000001", "num_sequences": 12, "sequence_length": 8}'])
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, line):
    folder = write_set(tmp_path / 'set', [12, 12])
    first = (folder / 'manifest.jsonl').read_text().splitlines()[0]
    (folder / 'manifest.jsonl').write_text(f'{first}\n{line}\n')
    train(folder, tmp_path / 'run', 0, 0).refused('manifest.jsonl')
