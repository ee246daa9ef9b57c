"""A vision-language model says the name of a picture: 286 animals, foods and plants, drawn by five designers.

    python prepare/emoji.py && python train.py config/siglip_emoji.py && python train.py config/vlm_emoji.py
"""
task = 'vlm'
out_dir = 'out/vlm_emoji'
init_from = 'out/siglip_emoji'  # its vision tower

data_dir = 'datasets/emoji'
mix = {'noto': 1.0, 'twemoji': 1.0, 'openmoji': 1.0, 'noto-v1': 1.0, 'emojione': 1.0}
val = {'heldout': 'heldout', 'unseen': 'fluent-emoji-flat'}
tokenizer = 'tokenizer.model'
image_mean = 1.0
seq_len = 12                    # 1 image token, bos, newline, up to 8 tokens of a name, eos
lanes = 8

vit.image_size = 64             # as in config/siglip_emoji.py
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

max_steps = 2200
batch_size = 64
lr = 1e-3
betas = (0.9, 0.98)
weight_decay = 0.05
eval_every = 550
num_checkpoints = 4
