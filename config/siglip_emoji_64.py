"""A vision tower learns which of 64 names a picture has: the first stage of config/vlm_emoji_64.py.

    make demo
    python prepare/emoji.py && python train.py config/siglip_emoji_64.py

2 cores of an AMD EPYC, no GPU: 215 s (16 steps/s). config/vlm_emoji_64.py says what it is good for.
"""
task = 'siglip'
out_dir = 'out/siglip_emoji_64'

# five designers draw the same things; a sixth, fluent-emoji-flat, is never trained on
data_dir = 'datasets/emoji_64'
mix = {'noto': 1.0, 'twemoji': 1.0, 'openmoji': 1.0, 'noto-v1': 1.0, 'emojione': 1.0}
augment = True
val = {'heldout': 'heldout', 'unseen': 'fluent-emoji-flat'}
tokenizer = 'tokenizer.model'
image_mean = 1.0                # white is 0, so that what a convolution pads with is the ground
seq_len = 14                    # as in config/vlm_emoji_64.py

vit.image_size = 64
vit.patch_size = 16             # 16 patches
vit.stem = 'conv'
vit.width = 192
vit.depth = 2
vit.num_heads = 3
vit.mlp_dim = 576
vit.init_scale = 0.0
decoder.width = 192             # the text tower: a name is the mean of its tokens
decoder.depth = 0
pair_with = 'all'
pair_scale = 20.0
pair_bias = -5.0                # near the log-odds of 1 in 64, which are -4.1

max_steps = 3500
batch_size = 32
lr = 1.5e-3
betas = (0.9, 0.98)
weight_decay = 0.3              # 309 pictures are soon known by heart
eval_every = 1750
num_checkpoints = 1
