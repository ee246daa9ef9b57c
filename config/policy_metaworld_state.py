"""A robot policy from states and a sentence: eight tasks of MetaWorld, flow matching, an MLP that denoises 16 actions.

    python prepare/metaworld.py && python prepare/stats.py --data=datasets/metaworld
    python train.py config/policy_metaworld_state.py
    python sample.py --out_dir=out/policy_metaworld_state --env=metaworld --episodes=20

1 core of an AMD EPYC, no GPU: 375 CPU-seconds, other jobs beside it. Seed 0, goals that are in no demonstration, 20 episodes
a task: 90.0 % [84.4, 93.8] of 160 (drawer-open, drawer-close, door-open, button-press-topdown and window-open 20 of 20 each,
reach 17, push 16, pick-place 11). After 300 steps of 64 samples: 42 % of 40; there the expert 100 %, one demonstration
replayed 25 %, another task's words 22 %, random 8 %, zero 0 %.
"""
task = 'policy'
out_dir = 'out/policy_metaworld_state'
mix = {'metaworld': 1.0}
seq_len = 56                    # bytes of a sentence

action_steps = 16
action_dim = 4                  # xyz of the hand, gripper
proprio_dim = 39
policy.encoder = 'text'         # the state does not say whether to reach or to pick
policy.num_noise_draws = 2
policy.pool = 1
policy.width = 512
policy.depth = 3
policy.mlp_dim = 1024
decoder.width = 48
decoder.depth = 1
decoder.mlp_dim = 96
decoder.num_heads = 2
decoder.head_dim = 24

max_steps = 1400
batch_size = 128
lr = 1e-3
betas = (0.9, 0.95)
weight_decay = 0.01
warmup = 0.03
ema = 0.995
workers = 1
log_every = 50
