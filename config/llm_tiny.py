"""python train.py config/llm_tiny.py

A language model on Shakespeare's plays, from nothing (python prepare/shakespeare.py makes the data set: 38 works to
learn from, four whole plays held out).
"""
task = 'llm'
out_dir = 'out/llm_tiny'
mix = {'shakespeare/train': 1.0}
val = {'held out': 'shakespeare/val'}
tokenizer = 'shakespeare/tokenizer.model'
seq_len = 256

decoder.width = 256
decoder.depth = 4
decoder.mlp_dim = 768
decoder.num_heads = 4
decoder.num_kv_heads = 2
decoder.head_dim = 64
decoder.dropout = 0.1

batch_size = 16
max_steps = 1200
eval_every = 300
lr = 2e-3
min_lr = 0.05
warmup = 0.05
weight_decay = 0.1
num_checkpoints = 1
