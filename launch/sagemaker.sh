# What launch/sagemaker.py runs in the container: the code and the data are under $ROOT/input/data, who else takes part
# stands in resourceconfig.json; the arguments are train.py's.
set -eu
ROOT=${ROOT:-/opt/ml}
cp -r "$ROOT/input/data/code" "$ROOT/run"      # the input may be read-only
cd "$ROOT/run"
# the container has a torch that fits its GPUs
grep -v '^torch==' requirements.txt > requirements-container.txt
python -m pip install -q --disable-pip-version-check -r requirements-container.txt s3fs
hosts=$(python -c "import json; c = json.load(open('$ROOT/input/config/resourceconfig.json')); print(*sorted(c['hosts']))")
set -- torchrun --nnodes="$(echo $hosts | wc -w)" --nproc_per_node="${SM_NUM_GPUS:-gpu}" --rdzv_backend=c10d \
    --rdzv_endpoint="${hosts%% *}:29500" --rdzv_id="${TRAINING_JOB_NAME:-job}" train.py "$@"
echo "$@"
exec "$@"
