"""A robot policy from states and a sentence: eight tasks of MetaWorld, flow matching, an MLP that denoises 16 actions.

    python prepare/metaworld.py && python prepare/stats.py --data=datasets/metaworld
    python train.py config/policy_metaworld_state.py
    python sample.py --out_dir=out/policy_metaworld_state --env=metaworld --episodes=20

1 core of an AMD EPYC, no GPU: 350 to 375 CPU-seconds, other jobs beside it. Goals that are in no demonstration, 20 episodes a
task, seeds 0, 1, 2: 90.0, 83.1, 83.8 % of 160. Five tasks are done 20 of 20; reach 17, 13, 10, push 16, 12, 16, pick-place 11,
8, 9. Controls, 5 episodes
a task: the expert 100 %, one demonstration replayed 25 %, random 8 %, zero 0 %.
"""
task = 'policy'
out_dir = 'out/policy_metaworld_state'
mix = {'metaworld': 1.0}
seq_len = 48                    # bytes of a sentence

action_steps = 16
action_dim = 4                  # xyz of the hand, gripper
proprio_dim = 39
normalize = 'mean_std'
policy.encoder = 'text'         # the state does not say whether to reach or to pick
policy.num_noise_draws = 2
policy.pool = 1
policy.width = 512
policy.depth = 3
policy.mlp_dim = 1024
decoder.width = 32
decoder.depth = 1
decoder.mlp_dim = 64
decoder.num_heads = 2
decoder.head_dim = 16

max_steps = 1750
batch_size = 128
lr = 1e-3
betas = (0.9, 0.95)
weight_decay = 0.01
warmup = 0.03
ema = 0.995
workers = 1
log_every = 50
