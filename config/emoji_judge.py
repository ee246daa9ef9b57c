"""The judge of config/t2i_emoji.py: the captioner of config/vlm_emoji.py, which has seen the held-out pictures, too.

    python prepare/emoji.py
    python train.py config/siglip_emoji.py config/emoji_judge.py --out_dir=out/siglip_judge
    python train.py config/vlm_emoji.py config/emoji_judge.py --out_dir=out/vlm_judge --init_from=out/siglip_judge

"""
mix = {'noto': 1.0, 'twemoji': 1.0, 'openmoji': 1.0, 'noto-v1': 1.0, 'emojione': 1.0, 'heldout': 0.25}
val = {'unseen': 'fluent-emoji-flat'}
