"""Stable Diffusion 1.5 (860 M parameters) goes on learning from your pictures and captions, on
GPUs.

    hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir=models/sd15 \
        --include='*.json' '*.txt' 'unet/*.fp16.safetensors' 'vae/*.fp16.safetensors' \
        'text_encoder/*.fp16.safetensors'
    python prepare/latents.py --data=datasets/mine --vae=models/sd15 --image_size=512
    torchrun --nproc_per_node=8 train.py config/sd15.py --mix='{"mine-latents": 1.0}'
    python sample.py --out_dir=out/sd15 --prompt='...' --guidance=7.5 --n=4
        (or --out_dir=models/sd15: as it was)
    python hub.py export out/sd15 folder     (a folder that diffusers loads)

Not run at full size by us. What was checked (tests/test_sd.py, random weights): every part's
output and gradients, and whole pictures, against diffusers; the full-size models have as many
parameters as published. The settings of unet, clip and vae are Stable Diffusion 1.5's; python
hub.py config <folder> prints those of another folder. A data set of pictures does without
prepare/latents.py: they are then encoded every time. Learning rate, batch and averaging: as the
model cards of 1.4 and 1.5 have them (1e-4 for a batch of 2048), less for less.
"""
task = 't2i'
denoiser = 'unet'
out_dir = 'out/sd15'
init_from = 'models/sd15'
tokenizer = 'models/sd15/tokenizer'

mix = {'mine-latents': 1.0}
seq_len = 77                    # all that CLIP reads
dit.image_size = 64             # rows of a latent: 512 pixels
dit.drop = 0.1
unet.remat = True

groups = [('^text|^vae', {'freeze': True}), (r'norm|bias', {'weight_decay': 0.0}), ('.*', {})]
max_steps = 5000
batch_size = 256
micro_batch_size = 8            # of 80 GB
lr = 1e-5
schedule = 'constant'
warmup = 500
betas = (0.9, 0.999)
weight_decay = 0.01
ema = 0.9999
dtype = 'bfloat16'
matmul = 'high'
num_checkpoints = 5
