"""Fine-tune SmolVLM 256M on your pictures and conversations, one picture at a time at 512 px.

    python train.py config/smolvlm.py --mix='{"/data/captions": 1.0}'

One GPU of 24 GB. A picture is 64 tokens: 32 x 32 patches, 4 x 4 of them side by side in each. Not
run at this size by us: the model equals transformers' at random weights, layer by layer
(tests/test_hub.py).
"""
task = 'vlm'
out_dir = 'out/smolvlm'
init_from = 'HuggingFaceTB/SmolVLM-256M-Instruct'
tokenizer = 'HuggingFaceTB/SmolVLM-256M-Instruct'
processor = 'HuggingFaceTB/SmolVLM-256M-Instruct'
prompt = 'Describe the picture.'
seq_len = 512

vit.image_size = 512            # SigLIP base/16
vit.patch_size = 16
vit.width = 768
vit.depth = 12
vit.mlp_dim = 3072
vit.num_heads = 12
pixel_shuffle = 4
connector_bias = False
decoder.vocab_size = 49280      # SmolLM2 135M
decoder.width = 576
decoder.depth = 30
decoder.mlp_dim = 1536
decoder.num_heads = 9
decoder.num_kv_heads = 3
decoder.head_dim = 64
decoder.activation = 'silu'
decoder.tied = False
decoder.embed_scale = 1.0
decoder.norm_offset = 0.0
decoder.norm_eps = 1e-5
decoder.rope_theta = 100000.0

groups = [(r'^vit\.', {'lr_scale': 0.1}),
          (r'norm|bias|embedding', {'weight_decay': 0.0}), (r'.*', {})]
epochs = 1.0
batch_size = 64
micro_batch_size = 16
lr = 1e-4
weight_decay = 0.01
exact_match = False
dtype = 'bfloat16'
compile = True
