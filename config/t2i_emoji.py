"""Emoji from their names: 286 animals, foods and plants, each as five designers would draw it.

    python prepare/emoji.py && python train.py config/t2i_emoji.py
    python sample.py --out_dir=out/t2i_emoji --prompt='noto: red apple' --n=16

"""
task = 't2i'
out_dir = 'out/t2i_emoji'

# 61 pairs of a style and a name are never trained on: `heldout`
data_dir = 'datasets/emoji'
mix = {'noto': 1.0, 'twemoji': 1.0, 'openmoji': 1.0, 'noto-v1': 1.0, 'emojione': 1.0}
prompt = '{style}: {text}'
val = {'heldout': 'heldout'}
tokenizer = 'tokenizer.model'
seq_len = 20                    # the longest sentence has 18 tokens
lanes = 8

dit.image_size = 24             # a captioner that saw 64 pixels reads all of these, and 98 % at 16
dit.patch_size = 4              # 36 patches
dit.width = 192
dit.depth = 4
dit.mlp_dim = 576
dit.num_heads = 3
dit.shift = 3.0                 # it is in much noise that the name has to be known
decoder.width = 128             # the text tower
decoder.depth = 1
decoder.mlp_dim = 256
decoder.num_heads = 2

max_steps = 8000
batch_size = 32
lr = 1.5e-3
schedule = 'wsd'                # so that a longer run may go on from this one
decay = 0.5
betas = (0.9, 0.98)
warmup = 100
weight_decay = 0.05
ema = 0.995
eval_every = 1000
num_checkpoints = 8
