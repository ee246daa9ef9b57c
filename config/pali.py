"""Fine-tune PaliGemma 3B (224 px) on your pictures and texts.

    torchrun --nproc_per_node=8 train.py config/pali.py --mix='{"/data/captions": 1.0}' --lr=1e-5

8 GPUs of 80 GB: weights, gradients and AdamW's state are float32, 16 bytes a parameter, shared by
all ranks (fsdp=0), 6 GB each. Every sample is a picture (.jpg, .png, .webp) with a .txt, or a
.json with `prefix` ("caption en") and `suffix`. The licence has to be accepted once on the model's
page, and HF_TOKEN set. Not run at this size by us: the model equals transformers' at random
weights, layer by layer, and has its 2,923,466,480 parameters (tests/test_hub.py).
"""
task = 'vlm'
out_dir = 'out/pali'
init_from = 'google/paligemma-3b-pt-224'
tokenizer = 'google/paligemma-3b-pt-224'
processor = 'google/paligemma-3b-pt-224'
prompt = 'caption en'           # where a sample has no prefix of its own
seq_len = 384                   # 256 image tokens, and text

vit.image_size = 224            # SigLIP So400m/14
vit.patch_size = 14
vit.width = 1152
vit.depth = 27
vit.mlp_dim = 4304
vit.num_heads = 16
vit.remat = True
decoder.vocab_size = 257216     # Gemma 2B
decoder.width = 2048
decoder.depth = 18
decoder.mlp_dim = 16384
decoder.num_heads = 8
decoder.num_kv_heads = 1
decoder.head_dim = 256
decoder.remat = True

# the tower stays as it is; r'^decoder\.blocks\.\d\.' with freeze would leave the first ten
# layers, too
groups = [(r'^vit\.', {'freeze': True}),
          (r'norm|bias|embedding', {'weight_decay': 0.0}), (r'.*', {})]
epochs = 3.0
batch_size = 64
micro_batch_size = 8
lr = 1e-5
warmup = 0.05
betas = (0.9, 0.999)
weight_decay = 1e-6
exact_match = False
dtype = 'bfloat16'
fsdp = 0
compile = True
num_checkpoints = 3
