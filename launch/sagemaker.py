"""A run as an Amazon SageMaker training job. What follows -- is what train.py takes:

    pip install boto3
    python launch/sagemaker.py --name=pali --bucket=s3://mine/runs --role=arn:aws:iam::123456789012:role/SageMaker \
        --image=<a PyTorch container> --data=s3://mine/datasets -- config/pali.py --mix='{"captions": 1.0}' --lr=1e-5

The files here that git does not ignore go to the bucket, the job runs launch/sagemaker.sh on each instance. `data` is
seen as the folder data_dir, read as it is needed. Checkpoints and logs are copied to <bucket>/<name> while the run goes
on (train.py's `remote`), and a job that finds some there goes on from them: after a spot instance was taken away, and
by the same command. A job that is stopped saves first. Credentials and region are boto3's own.

The image is any with CUDA, Python 3.11 and torch 2.13, such as one of AWS's deep learning containers
(https://aws.github.io/deep-learning-containers): <account>.dkr.ecr.<region>.amazonaws.com/pytorch-training:<tag>.
"""
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from configurator import configure  # noqa: E402

name = 'nanofoundry'            # of the run, and with the time of the job
bucket = ''                     # s3://bucket/prefix: the code and the run go there
role = ''                       # ARN of a role that SageMaker may take, with access to the bucket
image = ''                      # URI of a container
data = ''                       # s3://bucket/prefix of data sets (empty: --mix names URLs)
instance_type = 'ml.p5.48xlarge'
instances = 1                   # more need `fsx`
fsx = ''                        # <file system id>:/<mount name>/folder of a FSx for Lustre: where out_dir is
subnets = []                    # of the virtual private cloud that the file system is in
security_groups = []
volume_gb = 500                 # of an instance
max_hours = 72
spot = False                    # spot instances: cheaper, and taken away at times
wait = True                     # until it has ended; Ctrl-C leaves it running


def fail(message, code=2):
    print(f'launch/sagemaker.py: {message}', file=sys.stderr)
    sys.exit(code)


def upload(s3, prefix):
    """The files that git does not ignore, as they are here, to s3://prefix/code."""
    root = os.path.dirname(HERE)
    listed = subprocess.run(['git', 'ls-files', '-z', '-co', '--exclude-standard'], cwd=root, capture_output=True,
                            text=True)
    files = [f for f in listed.stdout.split('\0') if f and os.path.isfile(os.path.join(root, f))]
    if listed.returncode or not files:
        fail(f'{root} is no git repository: what is sent is what git does not ignore ({listed.stderr.strip()})', 1)
    where, _, key = prefix.removeprefix('s3://').partition('/')
    for file in files:
        s3.upload_file(os.path.join(root, file), where, f'{key}/code/{file}')
    return f'{prefix}/code'


def channel(name, uri, mode):
    return dict(ChannelName=name, InputMode=mode, DataSource=dict(S3DataSource=dict(
        S3DataType='S3Prefix', S3Uri=uri.rstrip('/') + '/', S3DataDistributionType='FullyReplicated')))


def request(job, code, arguments):
    """What create_training_job takes."""
    seconds, remote = int(max_hours * 3600), f'{bucket}/{name}'
    out_dir = f'/opt/ml/input/data/shared/{name}' if fsx else '/opt/ml/out'
    arguments = [*arguments, f'--out_dir={out_dir}', f'--remote={remote}']
    inputs = [channel('code', code, 'File')]
    if data:
        inputs.append(channel('data', data, 'FastFile'))
        arguments.append('--data_dir=/opt/ml/input/data/data')
    if fsx:
        system, _, path = fsx.partition(':')
        inputs.append(dict(ChannelName='shared', DataSource=dict(FileSystemDataSource=dict(
            FileSystemId=system, FileSystemType='FSxLustre', FileSystemAccessMode='rw', DirectoryPath=path))))
    out = dict(
        TrainingJobName=job, RoleArn=role, InputDataConfig=inputs,
        OutputDataConfig=dict(S3OutputPath=f'{remote}/output'),
        AlgorithmSpecification=dict(TrainingImage=image, TrainingInputMode='File', ContainerArguments=arguments,
                                    ContainerEntrypoint=['bash', '/opt/ml/input/data/code/launch/sagemaker.sh']),
        ResourceConfig=dict(InstanceType=instance_type, InstanceCount=instances, VolumeSizeInGB=volume_gb),
        StoppingCondition=dict(MaxRuntimeInSeconds=seconds) | (dict(MaxWaitTimeInSeconds=2 * seconds) if spot else {}),
        EnableManagedSpotTraining=spot, Environment=dict(PYTHONUNBUFFERED='1'))
    if subnets:
        out['VpcConfig'] = dict(Subnets=subnets, SecurityGroupIds=security_groups)
    return out


def main(arguments):
    for key in ('bucket', 'role', 'image'):
        if not globals()[key]:
            fail(f'--{key}= is missing; --help says what it is')
    if not bucket.startswith('s3://') or data and not data.startswith('s3://'):
        fail(f'--bucket={bucket} --data={data}: expected s3://bucket/prefix')
    if instances < 1 or (instances > 1 and not fsx) or bool(fsx) != bool(subnets):
        fail(f'--instances={instances} --fsx={fsx} --subnets={subnets}: several instances need a file system that all '
             'see, and a file system the subnets it is in')
    if any(a.startswith(('--out_dir', '--remote', '--data_dir')) for a in arguments):
        fail('out_dir, remote and data_dir are set here: give --name, --bucket and --data')
    try:
        import boto3
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        fail('boto3 is missing: pip install boto3', 1)
    job = f'{name}-{time.strftime("%Y%m%d-%H%M%S", time.gmtime())}'
    try:
        client = boto3.client('sagemaker')
        client.create_training_job(**request(job, upload(boto3.client('s3'), f'{bucket}/{name}'), arguments))
        print(f'{job} began; the run: {bucket}/{name}', flush=True)
        before = ''
        while wait:
            seen = client.describe_training_job(TrainingJobName=job)
            status = seen['TrainingJobStatus']
            now = f'{status}: {seen.get("SecondaryStatus", "")} {seen.get("FailureReason", "")}'.strip()
            if now != before:
                print(f'{time.strftime("%H:%M:%S")} {now}', flush=True)
            before = now
            if status in ('Completed', 'Stopped'):
                return
            if status == 'Failed':
                sys.exit(1)
            time.sleep(20)
    except (Boto3Error, BotoCoreError, ClientError) as error:
        fail(error, 1)
    except KeyboardInterrupt:
        print(f'{job} goes on; aws sagemaker stop-training-job --training-job-name {job} ends it')


if __name__ == '__main__':
    cut = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
    configure(globals(), sys.argv[1:cut])
    bucket = bucket.rstrip('/')
    main(sys.argv[cut + 1:])
