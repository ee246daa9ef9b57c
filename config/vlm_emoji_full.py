"""All 1,510 names, in one stage. Not part of the demo: 12,000 steps of 128 take about an hour on 2
cores, reckoned from the speed of the others; it has not been run to its end.

    python prepare/emoji.py && python train.py config/vlm_emoji_full.py
"""
task = 'vlm'
out_dir = 'out/vlm_emoji_full'

data_dir = 'datasets/emoji_full'
mix = {'noto': 1.0, 'twemoji': 1.0, 'openmoji': 1.0, 'noto-v1': 1.0, 'emojione': 1.0}
augment = True
val = {'heldout': 'heldout', 'unseen': 'fluent-emoji-flat'}
tokenizer = 'tokenizer.model'
image_mean = 1.0
seq_len = 15                    # 1 image token, bos, newline, the longest name, eos
lanes = 8

vit.image_size = 64
vit.patch_size = 16
vit.stem = 'conv'
vit.width = 192
vit.depth = 2
vit.num_heads = 3
vit.mlp_dim = 576
vit.init_scale = 0.0
pixel_shuffle = 4               # all 16 patches side by side in one image token
decoder.width = 192
decoder.depth = 2
decoder.mlp_dim = 384
decoder.num_heads = 3

max_steps = 12000
batch_size = 128
lr = 1e-3
betas = (0.9, 0.98)
weight_decay = 0.05
eval_every = 2000
num_checkpoints = 4
