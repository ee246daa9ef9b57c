"""A vision-language-action model from the captioner of `make demo`: four tasks of MetaWorld, told
apart by the sentence.

    make demo FULL=1
    (the data as config/policy_metaworld_pixels.py makes them)
    python train.py config/vla_metaworld.py
    python sample.py --out_dir=out/vla_metaworld --env=metaworld \
        --tasks=button-press-topdown,window-open,door-open,reach [--held_out=true]

2 cores of an AMD EPYC, no GPU: 20 CPU-minutes. Goals that are in no demonstration, 20 episodes a
task, seed 0: 83.8 % of 80 (95 %: 74.2 to 90.3): button, window and door 20 times of 20, reach 7.
In words of no demonstration 87.5 % (20, 19, 19, 12). 5 episodes a task: the expert 100 %, a
replayed demonstration 25 % (reach 0, door 0), random 0, zero 0, with another task's sentence 50 %
(button and window are done all the same: the picture says enough), with a blank picture 5 %.
Measured with --init_from=out/vlm_judge (config/emoji_judge.py, the same model, which saw 61
pictures more), not out/vlm_emoji.
"""
task = 'vla'
out_dir = 'out/vla_metaworld'
init_from = 'out/vlm_emoji'     # tower, connector and decoder of config/vlm_emoji.py
mix = {'metaworld_96': 1.0}
tokenizer = 'emoji/tokenizer.model'
image_mean = 1.0
seq_len = 32                    # a picture's token, and the tokens of a sentence

action_steps = 16
action_dim = 4                  # xyz of the hand, gripper
proprio_dim = 4                 # the same of the state
cameras = ['near']
normalize = 'mean_std'
vla.width = 128                 # the action expert's
vla.mlp_dim = 384
vla.num_noise_draws = 3         # the picture is read once for all three

vit.image_size = 64             # as in config/vlm_emoji.py
vit.patch_size = 16
vit.stem = 'conv'
vit.width = 192
vit.depth = 2
vit.num_heads = 3
vit.mlp_dim = 576
vit.init_scale = 0.0
pixel_shuffle = 4
decoder.width = 192
decoder.depth = 2
decoder.mlp_dim = 384
decoder.num_heads = 3

max_steps = 1600
batch_size = 64
lr = 1e-3
betas = (0.9, 0.95)
weight_decay = 0.02
warmup = 0.03
ema = 0.998
workers = 1
log_every = 50
