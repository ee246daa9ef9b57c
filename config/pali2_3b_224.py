"""Fine-tune PaliGemma 2 3B (224 px): config/pali.py with Gemma 2's decoder.

    torchrun --nproc_per_node=8 train.py config/pali.py config/pali2_3b_224.py \
        --mix='{"/data/captions": 1.0}'

8 GPUs of 80 GB. Not run at this size by us (see config/pali.py). For 448 px: --vit.image_size=448
--seq_len=1152 and the 448 repository in init_from, tokenizer and processor; other sizes
interpolate the positions.
"""
out_dir = 'out/pali2'
init_from = 'google/paligemma2-3b-pt-224'
tokenizer = 'google/paligemma2-3b-pt-224'
processor = 'google/paligemma2-3b-pt-224'

decoder.width = 2304            # Gemma 2 2B
decoder.depth = 26
decoder.mlp_dim = 9216
decoder.num_kv_heads = 4
decoder.post_norms = True
decoder.query_pre_attn_scalar = 256.0
decoder.attn_logits_softcap = 50.0
decoder.final_logits_softcap = 30.0
decoder.sliding_window = 4096
decoder.global_every = 2
