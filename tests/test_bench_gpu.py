"""bench/gpu.py at toy size: what it measures, what it skips, what fails; and FSDP2 on one rank."""
import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
import tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

import parallel
from model import Decoder, DecoderConfig


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The module, with settings of its own."""
    # it reads its settings when it is imported
    monkeypatch.setattr(sys, 'argv', ['gpu.py', '--toy=true', f'--out_dir={tmp_path}'])
    spec = importlib.util.spec_from_file_location('bench_gpu', tiny.ROOT / 'bench' / 'gpu.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report_of(folder):
    return json.loads((folder / 'gpu.json').read_text())


def test_what_it_measures(tmp_path):
    """The command, with parts of each kind: every row has its figures, and is in the table."""
    script = tiny.ROOT / 'bench' / 'gpu.py'
    flags = ['--toy=true', f'--out_dir={tmp_path}', '--parts=decoder,decode,loader']
    done = subprocess.run([sys.executable, script, *flags], env=os.environ | tiny.ENV, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    # each row once, and none without a line
    report = report_of(tmp_path)
    rows = {(row['part'], row['what']): row for row in report['rows']}
    assert len(rows) == len(report['rows']) == 10 and report['toy']
    for part, what in rows:
        assert f'{part:10} {what}' in done.stdout

    # training
    for model in ('SmolLM2 135M', 'Llama 3.2 1B'):
        eager = rows['decoder', f'{model}, eager']
        # what a CPU can do at best is not known
        assert eager['mfu'] is None and eager['mem_gb'] > 0
        # 2 rows of 32 words
        assert eager['tokens_per_sec'] * eager['step_ms'] == pytest.approx(64_000, rel=0.01)
        assert 'CPU' in rows['decoder', f'{model}, compiled']['skipped']

    # decoding: a weight of bf16 has 2 bytes, and a copy says how many of them come a second
    copied = rows['decode', 'a copy']['gb_per_sec']
    for batch in (1, 32):
        row = rows['decode', f'SmolLM2 135M, {batch} at once']
        bound = batch * copied * 1e9 / (row['weights_mb'] * 1e6)
        assert row['bound'] == pytest.approx(bound, rel=0.2)
        share = row['tokens_per_sec'] / row['bound']
        assert row['share_of_bound'] == pytest.approx(share, abs=1e-4)

    # the loader beside the step: words are learned within two dozen steps
    row = rows['loader', 'train.py, 2 workers']
    assert row['steps'] == 24 and row['loss'] < row['first_loss']
    assert row['share_of_waiting'] == pytest.approx(row['data_ms'] / row['step_ms'], abs=0.01)


def test_what_fails_is_named_and_the_rest_goes_on(bench, capsys, monkeypatch, tmp_path):
    # nothing can be written there
    (tmp_path / 'decode.log').mkdir()
    monkeypatch.setattr(bench, 'parts', 'decode,tests')
    assert bench.main() == 1
    failed, skipped = report_of(tmp_path)['rows']
    assert failed['part'] == 'decode' and 'IsADirectoryError' in failed['error']
    assert skipped['part'] == 'tests' and 'CUDA' in skipped['skipped']
    assert 'failed: decode' in capsys.readouterr().out


def test_parts_that_do_not_fit_are_skipped(bench, monkeypatch, tmp_path):
    # 10 of 12 seconds are for what is before and after
    monkeypatch.setattr(bench, 'minutes', 0.2)
    assert bench.main() == 0
    rows = report_of(tmp_path)['rows']
    assert [row['part'] for row in rows] == list(bench.PARTS)
    assert all('skipped' in row for row in rows)
    assert rows[1]['skipped'] == 'it may take 110 s, and 2 s are left'


def test_an_unknown_part_is_refused(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench, 'parts', 'decoder,dreams')
    assert bench.main() == 2
    assert 'paligemma' in capsys.readouterr().err


def test_a_command_whose_time_is_over_is_stopped(bench, monkeypatch):
    """With all that it started, and with what it said last."""
    monkeypatch.setattr(bench, 'GRACE', 0.5)

    # it ends by Ctrl-C, what it started does not
    child = 'import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)'
    code = ('import subprocess, sys, time\n'
            f'child = subprocess.Popen([sys.executable, "-c", "{child}"])\n'
            'print(f"begun {child.pid}", flush=True)\n'
            'time.sleep(60)')
    began = time.perf_counter()
    with pytest.raises(TimeoutError, match='its time was over'):
        bench.command(['-c', code], 'slow', began + 3)
    assert time.perf_counter() - began < 20

    # nothing is left of either
    with open(f'{bench.out_dir}/slow.log') as f:
        pid = int(f.readline().split()[1])
    tiny.wait_until(lambda: not is_running(pid), timeout=10)


def is_running(pid):
    try:
        with open(f'/proc/{pid}/stat') as f:
            # one that ended, and whose end nobody asked for, is a zombie
            return f.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


@pytest.mark.parametrize('log, said', [
    ('step 1\rstep 2\ntrain.py: lr=-1: expected more\n', 'train.py: lr=-1: expected more'),
    ('  File "a.py"\ntorch.OutOfMemoryError: CUDA\nRoot Cause:\nx.ChildFailedError: \n=====\n',
     'torch.OutOfMemoryError: CUDA'),
    ('only this\n\n', 'only this'), ('', 'it said nothing')])
def test_last_words(bench, tmp_path, log, said):
    (tmp_path / 'a.log').write_text(log)
    assert bench.last_words(tmp_path / 'a.log') == said


def test_gpu_tests_that_failed_are_named(bench, monkeypatch, tmp_path):
    # what pytest writes, and how a command ends that fails
    def command(arguments, name, until):
        assert any(path.endswith('test_train.py') for path in arguments)
        (tmp_path / f'{name}.log').write_text(
            'F.\nFAILED tests/test_a.py::test_b[1] - assert 1 == 2\n1 failed, 1 passed in 2.0s\n')
        raise RuntimeError('1 failed, 1 passed in 2.0s')

    monkeypatch.setattr(bench, 'command', command)
    # a row of the one that failed, and one of them all
    one, whole = bench.run_tests('tests', '', 0)
    assert one == dict(what='tests/test_a.py::test_b[1]', error='assert 1 == 2')
    assert whole['said'] == '1 failed, 1 passed in 2.0s' and 'RuntimeError' in whole['error']


@pytest.mark.parametrize('scales, error', [
    ([2.0 ** 15, 2.0 ** 14, 2.0 ** 14, 2.0 ** 14], ''),
    ([2.0 ** 16] * 4, 'halve'), ([2.0 ** 15, 2.0 ** 14, 2.0 ** 13, 2.0 ** 12], 'halve')])
def test_a_loss_scale_that_does_not_halve_is_a_failure(bench, monkeypatch, scales, error):
    # four steps as train.py logs them
    base = dict(step=1, step_time=1.0, data_time=0.0, samples_per_sec=1.0, mfu=0.0, mem_gb=1.0)
    rows = [base | dict(loss_scale=x, loss=9.0 - i) for i, x in enumerate(scales)]
    monkeypatch.setattr(bench, 'train', lambda *args, **settings: rows)
    monkeypatch.setattr(bench, 'tokens_set', lambda folder: None)
    if error:
        with pytest.raises(RuntimeError, match=error):
            list(bench.scaler('fp16', '', 0))
    else:
        row, = bench.scaler('fp16', '', 0)
        assert row['loss_scale'] == 2 ** 14


def test_one_rank_that_torchrun_started_shards_too(tmp_path):
    """--fsdp=0 is FSDP2 on one rank as well, and gives the same; without ranks there is none."""
    def losses_of(ranks):
        torch.manual_seed(0)
        model = Decoder(DecoderConfig(64, 32, 2, mlp_dim=64, num_heads=2, head_dim=16))
        if not ranks:
            assert parallel.spread(model, 0, 'cpu') is model
            assert not isinstance(model, FSDPModule)
        # two layers, and the rest
        else:
            model = parallel.spread(model, 0, 'cpu')
            assert len(parallel.sharded_modules(model)) == 3
        tokens = torch.arange(32).view(2, 16)
        return model(tokens, tokens)['text'].losses

    # what torchrun makes of one process
    alone = losses_of(0)
    store = dist.FileStore(str(tmp_path / 'store'), 1)
    dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        assert torch.equal(losses_of(1), alone)
    finally:
        dist.destroy_process_group()
