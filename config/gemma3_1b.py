"""Go on training Gemma 3 1B on conversations, in Gemma's own chat form.

    torchrun --nproc_per_node=8 train.py config/gemma3_1b.py --mix='{"/data/chats": 1.0}'

8 GPUs of 24 GB or more. A sample is a .json with `messages`: answers alone are learned. Not run at
this size by us: the model equals transformers' at random weights, layer by layer
(tests/test_hub.py), and has its 999,885,952 parameters.
"""
task = 'llm'
out_dir = 'out/gemma3_1b'
init_from = 'google/gemma-3-1b-it'
tokenizer = 'google/gemma-3-1b-it'
processor = 'google/gemma-3-1b-it'
seq_len = 2048
pack = True

decoder.vocab_size = 262208     # 262,144, and room for the token of a picture
decoder.width = 1152
decoder.depth = 26
decoder.mlp_dim = 6912
decoder.num_heads = 4
decoder.num_kv_heads = 1
decoder.head_dim = 256
decoder.post_norms = True
decoder.qk_norm = True
decoder.query_pre_attn_scalar = 256.0
decoder.sliding_window = 512
decoder.global_every = 6
decoder.rope_theta = 1000000.0
decoder.rope_local_theta = 10000.0
decoder.remat = True

epochs = 2.0
batch_size = 64
micro_batch_size = 4
lr = 1e-5
min_lr = 0.1
weight_decay = 0.0
dtype = 'bfloat16'
fsdp = 0
compile = True
