"""Go on training Gemma 2B on your text.

    python prepare/text.py --input='raw/*.jsonl.gz' --out=datasets/mine \
        --tokenizer=google/gemma-2b --seq_len=2048
    torchrun --nproc_per_node=8 train.py config/gemma_2b.py --mix='{"mine": 1.0}'

8 GPUs of 80 GB. Not run at this size by us: the model equals transformers' at random weights,
layer by layer (tests/test_hub.py), and has its 2,506,172,416 parameters.
"""
task = 'llm'
out_dir = 'out/gemma_2b'
init_from = 'google/gemma-2b'
tokenizer = 'google/gemma-2b'
seq_len = 2048

decoder.vocab_size = 256064     # 256,000, and room for the token of a picture
decoder.width = 2048
decoder.depth = 18
decoder.mlp_dim = 16384
decoder.num_heads = 8
decoder.num_kv_heads = 1
decoder.head_dim = 256
decoder.remat = True

max_steps = 1000
batch_size = 128
micro_batch_size = 4
lr = 2e-5
min_lr = 0.1
weight_decay = 0.01
dtype = 'bfloat16'
fsdp = 0
compile = True
