"""Match pictures and texts of your own, with the vision tower of SigLIP base/16 (224 px) to start
from.

    python train.py config/siglip_base.py --mix='{"/data/captions": 1.0}' \
        --tokenizer=google/siglip-base-patch16-224

One GPU of 80 GB. The text tower begins anew: it is ours, not SigLIP's. Not run at this size by us:
the tower equals transformers' at random weights, layer by layer (tests/test_hub.py).
"""
task = 'siglip'
out_dir = 'out/siglip_base'
init_from = 'google/siglip-base-patch16-224'
seq_len = 64

vit.image_size = 224
vit.patch_size = 16
vit.width = 768
vit.depth = 12
vit.mlp_dim = 3072
vit.num_heads = 12
decoder.width = 768
decoder.depth = 6
decoder.mlp_dim = 2048
decoder.num_heads = 12
decoder.num_kv_heads = 12

groups = [(r'^vit\.', {'lr_scale': 0.1}),
          (r'norm|bias|scale|embedding', {'weight_decay': 0.0}), (r'.*', {})]
epochs = 1.0
batch_size = 512                # every picture is compared with every text of the batch
lr = 3e-4
betas = (0.9, 0.95)
weight_decay = 0.01
dtype = 'bfloat16'
compile = True
