"""launch/: what goes to SageMaker (moto's) and what then runs in the container, here; what Slurm's
script starts."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

boto3 = pytest.importorskip('boto3')
server = pytest.importorskip('moto.server')

ROLE = 'arn:aws:iam::123456789012:role/SageMaker'
IMAGE = '1.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.13'
TRAIN = ['--mix={"plain": 1.0}', '--max_steps=2', '--num_checkpoints=1', '--task=vlm', *tiny.FLAGS]


@pytest.fixture(scope='module')
def aws():
    """The environment of a command that shall see moto as AWS."""
    moto = server.ThreadedMotoServer('127.0.0.1', 0, verbose=False)
    moto.start()
    url = 'http://{}:{}'.format(*moto.get_host_and_port())
    env = dict(os.environ, **tiny.ENV, AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID='k',
               AWS_SECRET_ACCESS_KEY='s', AWS_DEFAULT_REGION='us-east-1')
    boto3.client('s3', endpoint_url=url, aws_access_key_id='k', aws_secret_access_key='s',
                 region_name='us-east-1').create_bucket(Bucket='mine')
    yield env
    moto.stop()


def clients(env):
    keys = dict(aws_access_key_id='k', aws_secret_access_key='s', region_name='us-east-1')
    return [boto3.client(name, endpoint_url=env['AWS_ENDPOINT_URL'], **keys)
            for name in ('sagemaker', 's3')]


def launch(env, *flags):
    return subprocess.run([sys.executable, str(tiny.ROOT / 'launch/sagemaker.py'), *flags],
                          env=env, text=True, capture_output=True, timeout=300)


def test_a_job_is_what_runs_in_the_container(aws, tmp_path):
    """Sent, fetched as SageMaker would, run by its own command on two processes, and gone on with
    from the bucket."""
    done = launch(
        aws, '--name=small', '--bucket=s3://mine/runs/', f'--role={ROLE}', f'--image={IMAGE}',
        '--data=s3://mine/sets', '--wait=false', '--spot=true', '--', *TRAIN)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[0]
    sagemaker, s3 = clients(aws)
    sent = sagemaker.describe_training_job(TrainingJobName=job)
    algorithm, inputs = sent['AlgorithmSpecification'], {
        c['ChannelName']: c for c in sent['InputDataConfig']}
    assert (algorithm['TrainingImage'], sent['RoleArn']) == (IMAGE, ROLE)
    assert sent['EnableManagedSpotTraining']
    assert algorithm['ContainerArguments'][:len(TRAIN)] == TRAIN
    assert inputs['data']['DataSource']['S3DataSource']['S3Uri'] == 's3://mine/sets/'
    prefix = inputs['code']['DataSource']['S3DataSource']['S3Uri'].removeprefix('s3://mine/')
    root = tmp_path / 'ml'
    for page in s3.get_paginator('list_objects_v2').paginate(Bucket='mine', Prefix=prefix):
        for item in page['Contents']:
            path = root / 'input/data/code' / item['Key'].removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file('mine', item['Key'], str(path))
    (root / 'input/config').mkdir()
    (root / 'input/config/resourceconfig.json').write_text(
        json.dumps(dict(current_host='a', hosts=['localhost'])))
    os.symlink(tiny.data_dir(), root / 'input/data/data')
    assert algorithm['ContainerEntrypoint'] == [
        'bash', '/opt/ml/input/data/code/launch/sagemaker.sh']
    command = ['bash', str(root / 'input/data/code/launch/sagemaker.sh'),
               *(a.replace('/opt/ml', str(root)) for a in algorithm['ContainerArguments'])]
    env = aws | dict(ROOT=str(root), PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    # a new machine has nothing: the run goes on from the bucket
    for steps, gpus in ((2, 2), (3, 1)):
        done = subprocess.run([*command, f'--max_steps={steps}'], env=env | dict(
            SM_NUM_GPUS=str(gpus)), text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f'--nproc_per_node={gpus}' in done.stdout and f'{gpus} ranks' in done.stdout
        for folder in ('run', 'out'):
            subprocess.run(['rm', '-r', str(root / folder)], check=True)
    assert 'resumed from' in done.stdout
    kept = s3.list_objects_v2(Bucket='mine', Prefix='runs/small/checkpoints/')['Contents']
    assert {item['Key'].split('/')[3] for item in kept} == {'step_00000002', 'step_00000003'}


@pytest.mark.parametrize('flags, words', [
    ((), ('--bucket=',)),
    (('--bucket=mine', f'--role={ROLE}', f'--image={IMAGE}'), ('--bucket=mine', 's3://')),
    (('--bucket=s3://mine', f'--role={ROLE}', f'--image={IMAGE}', '--instances=2'),
     ('--instances=2', 'file system')),
    (('--bucket=s3://mine', f'--role={ROLE}', f'--image={IMAGE}', '--', '--out_dir=x'),
     ('out_dir', '--name')),
    (('--bucket=s3://absent', f'--role={ROLE}', f'--image={IMAGE}'), ('absent', 'does not exist')),
    (('--nmae=x',), ('nmae', 'name'))])
def test_wrong_settings(aws, flags, words):
    done = launch(aws, *flags)
    lines = done.stderr.strip().splitlines()
    assert done.returncode in (1, 2) and len(lines) == 1 and all(
        word in lines[0] for word in words), done.stderr


def test_slurm(tmp_path):
    """srun and scontrol stand in for a cluster of one node; what the script starts trains."""
    tools = tmp_path / 'bin'
    tools.mkdir()
    for name, text in (('srun', 'shift; exec "$@"'), ('scontrol', 'echo localhost')):
        (tools / name).write_text(f'#!/bin/sh\n{text}\n')
        (tools / name).chmod(0o755)
    path = f'{tools}:{Path(sys.executable).parent}:{os.environ["PATH"]}'
    env = os.environ | tiny.ENV | dict(
        SLURM_SUBMIT_DIR=str(tiny.ROOT), SLURM_JOB_NODELIST='localhost', PATH=path,
        SLURM_NNODES='1', SLURM_JOB_ID='7', SLURM_GPUS_ON_NODE='2', PORT='0')
    done = subprocess.run(
        ['sh', str(tiny.ROOT / 'launch/slurm.sh'), *TRAIN, f'--data_dir={tiny.data_dir()}',
         f'--out_dir={tmp_path / "out"}'], env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0 and '2 ranks' in done.stdout, done.stderr
    assert len(tiny.rows(tmp_path / 'out')) == 2
