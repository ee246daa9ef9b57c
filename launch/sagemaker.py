"""A run as an Amazon SageMaker training job. What follows -- is what train.py takes:

    pip install boto3
    python launch/sagemaker.py --name=pali --bucket=s3://mine/runs \\
        --role=arn:aws:iam::123456789012:role/SageMaker --image=<a PyTorch container> \\
        --data=s3://mine/datasets -- config/pali.py --mix='{"captions": 1.0}' --lr=1e-5

The files here that git does not ignore go to the bucket, the job runs launch/sagemaker.sh on each
instance. `data` is seen as the folder data_dir, read as it is needed. Checkpoints and logs are
copied to <bucket>/<name> while the run goes on (train.py's `remote`), and a job that finds some
there goes on from them: after a spot instance was taken away, and by the same command. A job that
is stopped saves first. Credentials and region are boto3's own.

The image is any with CUDA, Python 3.11 and torch 2.13, such as one of AWS's deep learning
containers (https://aws.github.io/deep-learning-containers):
<account>.dkr.ecr.<region>.amazonaws.com/pytorch-training:<tag>.
"""
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configurator import configure  # noqa: E402

name = 'nanofoundry'            # of the run, and with the time of the job
bucket = ''                     # s3://bucket/prefix: the code and the run go there
role = ''                       # ARN of a role that SageMaker may take, with access to the bucket
image = ''                      # URI of a container
data = ''                       # s3://bucket/prefix of data sets (empty: --mix names URLs)
instance_type = 'ml.p5.48xlarge'
instances = 1                   # more need `fsx`
fsx = ''                        # <file system id>:/<mount name>/folder of FSx for Lustre (out_dir)
subnets = []                    # of the virtual private cloud that the file system is in
security_groups = []
volume_gb = 500                 # of an instance
max_hours = 72
spot = False                    # spot instances: cheaper, and taken away at times
wait = True                     # until it has ended; Ctrl-C leaves it running


def fail(message, code=2):
    """End with one line on stderr."""
    print(f'launch/sagemaker.py: {message}', file=sys.stderr)
    sys.exit(code)


def upload(s3, prefix):
    """The files that git does not ignore, as they are here, to s3://prefix/code."""
    command = ['git', 'ls-files', '-z', '-co', '--exclude-standard']
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    # git lists files that were deleted, too
    files = [file for file in listed.stdout.split('\0') if file and (ROOT / file).is_file()]
    if listed.returncode or not files:
        fail(f'{ROOT} is no git repository: what is sent is what git does not ignore '
             f'({listed.stderr.strip()})', 1)

    where, _, key = prefix.removeprefix('s3://').partition('/')
    for file in files:
        s3.upload_file(str(ROOT / file), where, f'{key}/code/{file}')
    return f'{prefix}/code'


def channel(channel_name, uri, mode):
    """A folder of S3 that instances see as /opt/ml/input/data/<channel_name>."""
    source = dict(S3DataType='S3Prefix', S3Uri=uri.rstrip('/') + '/',
                  S3DataDistributionType='FullyReplicated')
    return dict(ChannelName=channel_name, InputMode=mode, DataSource=dict(S3DataSource=source))


def shared_channel():
    """The file system that all instances write to."""
    system, _, path = fsx.partition(':')
    source = dict(FileSystemId=system, FileSystemType='FSxLustre', FileSystemAccessMode='rw',
                  DirectoryPath=path)
    return dict(ChannelName='shared', DataSource=dict(FileSystemDataSource=source))


def request(job, code, arguments):
    """What create_training_job takes."""
    remote, inputs = f'{bucket}/{name}', [channel('code', code, 'File')]
    out_dir = '/opt/ml/out'
    if fsx:
        out_dir = f'/opt/ml/input/data/shared/{name}'
    arguments = [*arguments, f'--out_dir={out_dir}', f'--remote={remote}']

    # read as it is needed: a data set may be larger than the instance's disk
    if data:
        inputs.append(channel('data', data, 'FastFile'))
        arguments.append('--data_dir=/opt/ml/input/data/data')
    if fsx:
        inputs.append(shared_channel())

    # spot instances may be waited for as long again
    seconds = int(max_hours * 3600)
    stopping = dict(MaxRuntimeInSeconds=seconds)
    if spot:
        stopping['MaxWaitTimeInSeconds'] = 2 * seconds

    algorithm = dict(
        TrainingImage=image, TrainingInputMode='File', ContainerArguments=arguments,
        ContainerEntrypoint=['bash', '/opt/ml/input/data/code/launch/sagemaker.sh'],
    )
    resources = dict(
        InstanceType=instance_type, InstanceCount=instances, VolumeSizeInGB=volume_gb,
    )
    out = dict(
        TrainingJobName=job, RoleArn=role, InputDataConfig=inputs,
        OutputDataConfig=dict(S3OutputPath=f'{remote}/output'),
        AlgorithmSpecification=algorithm, ResourceConfig=resources, StoppingCondition=stopping,
        EnableManagedSpotTraining=spot, Environment=dict(PYTHONUNBUFFERED='1'),
    )
    if subnets:
        out['VpcConfig'] = dict(Subnets=subnets, SecurityGroupIds=security_groups)
    return out


def check(arguments):
    """Refuse settings, and arguments of train.py, that can not be."""
    for key, value in dict(bucket=bucket, role=role, image=image).items():
        if not value:
            fail(f'--{key}= is missing; --help says what it is')
    if not bucket.startswith('s3://') or (data and not data.startswith('s3://')):
        fail(f'--bucket={bucket} --data={data}: expected s3://bucket/prefix')

    # out_dir must be one folder for all of them
    is_unshared = instances > 1 and not fsx
    if instances < 1 or is_unshared or bool(fsx) != bool(subnets):
        fail(f'--instances={instances} --fsx={fsx} --subnets={subnets}: several instances need a '
             'file system that all see, and a file system the subnets it is in')

    for argument in arguments:
        if argument.startswith(('--out_dir', '--remote', '--data_dir')):
            fail('out_dir, remote and data_dir are set here: give --name, --bucket and --data')


def follow(client, job):
    """Print what becomes of a job until it has ended; exit code 1 if it failed."""
    before = ''
    while True:
        seen = client.describe_training_job(TrainingJobName=job)
        status, reason = seen['TrainingJobStatus'], seen.get('FailureReason', '')
        now = f'{status}: {seen.get("SecondaryStatus", "")} {reason}'.strip()
        if now != before:
            print(f'{time.strftime("%H:%M:%S")} {now}', flush=True)
        before = now
        if status in ('Completed', 'Stopped'):
            return
        if status == 'Failed':
            sys.exit(1)
        time.sleep(20)


def main(argv):
    """The command: settings, and behind -- what train.py takes."""
    global bucket
    cut = len(argv)
    if '--' in argv:
        cut = argv.index('--')
    arguments = argv[cut + 1:]
    configure(globals(), argv[:cut])
    bucket = bucket.rstrip('/')
    check(arguments)

    try:
        import boto3
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        fail('boto3 is missing: pip install boto3', 1)

    # a job's name can be used once, a run's again
    job = f'{name}-{time.strftime("%Y%m%d-%H%M%S", time.gmtime())}'
    try:
        client, url = boto3.client('sagemaker'), f'{bucket}/{name}'
        code = upload(boto3.client('s3'), url)
        client.create_training_job(**request(job, code, arguments))
        print(f'{job} began; the run: {url}', flush=True)
        if wait:
            follow(client, job)
    except (Boto3Error, BotoCoreError, ClientError) as error:
        fail(error, 1)
    except KeyboardInterrupt:
        print(f'{job} goes on; aws sagemaker stop-training-job --training-job-name {job} ends it')


if __name__ == '__main__':
    main(sys.argv[1:])
