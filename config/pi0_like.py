"""pi0 (arXiv 2410.24164): PaliGemma 3B and an action expert of 300 M, on your robot's
demonstrations.

    python prepare/lerobot.py --data=/data/droid --out=datasets/robot
    python prepare/stats.py --data=datasets/robot
    torchrun --nproc_per_node=8 train.py config/pi0_like.py --mix='{"robot": 1.0}'

8 GPUs of 80 GB: weights, gradients and AdamW's state are float32, 16 bytes a parameter and 4 more
for their average, shared by all ranks (fsdp=0), 8 GB each. Several robots: name each data set in
`mix`, and in `cameras_of` what it calls its cameras; one with fewer numbers or cameras is padded
and masked. The actions' sizes, the learning rate and its schedule are openpi's. Not run at this
size by us: the model equals transformers' PI0 at random weights, and has its 3,238,179,600
parameters (tests/test_vla.py).
"""
task = 'vla'
out_dir = 'out/pi0_like'
init_from = 'google/paligemma-3b-pt-224'
tokenizer = 'google/paligemma-3b-pt-224'
mix = {'robot': 1.0}
seq_len = 816                   # 3 pictures of 256 tokens, and 48 of an instruction

action_steps = 50
action_dim = 32
proprio_dim = 32
cameras = ['base', 'left_wrist', 'right_wrist']
normalize = 'quantile'
vla.width = 1024
vla.mlp_dim = 4096

vit.image_size = 224            # SigLIP So400m/14
vit.patch_size = 14
vit.width = 1152
vit.depth = 27
vit.mlp_dim = 4304
vit.num_heads = 16
vit.remat = True
decoder.vocab_size = 257216     # Gemma 2B
decoder.width = 2048
decoder.depth = 18
decoder.mlp_dim = 16384
decoder.num_heads = 8
decoder.num_kv_heads = 1
decoder.head_dim = 256
decoder.remat = True

max_steps = 30000
batch_size = 32
micro_batch_size = 4
lr = 2.5e-5
min_lr = 0.1
warmup = 1000
betas = (0.9, 0.95)
weight_decay = 1e-10
grad_clip = 1.0
ema = 0.99
dtype = 'bfloat16'
fsdp = 0
compile = True
num_checkpoints = 6
