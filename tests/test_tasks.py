"""Models of transformers as towers (`vit.hf`, `decoder.hf`) in every task that has such a tower:
they are what is built and trained, or refused by name."""
import io
import os

import numpy as np
import pytest
import torch
from conftest import encode, picture

os.environ['HF_HUB_OFFLINE'] = '1'
tf = pytest.importorskip('transformers')

import checkpoint  # noqa: E402
import tasks  # noqa: E402
from families.towers import HFDecoder, HFText, HFViT  # noqa: E402
from model import Decoder, ViT  # noqa: E402
from processor import collate  # noqa: E402

NEEDS = 'tasks/vlm.py', 'tasks/siglip.py', 'tasks/policy.py', 'tasks/vla.py', 'tasks/t2i.py'
VOCAB = 264
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
DECODER = {'decoder.width': 32, 'decoder.depth': 2, 'decoder.mlp_dim': 48, 'decoder.num_heads': 4,
           'decoder.head_dim': 8}
VIT = {'vit.width': 24, 'vit.depth': 1, 'vit.mlp_dim': 48, 'vit.num_heads': 3}
ACTIONS = {'action_steps': 4, 'action_dim': 2, 'proprio_dim': 1}
POLICY = ACTIONS | {'policy.width': 32, 'policy.mlp_dim': 32, 'policy.num_heads': 2,
                    'policy.depth': 1}
DIT = {'dit.image_size': 16, 'dit.patch_size': 8, 'dit.width': 32, 'dit.depth': 1,
       'dit.num_heads': 2}
NUMBERS = dict(mean=[0], std=[1], min=[-1], max=[1], q01=[-1], q99=[1])
STATS = dict(actions={key: 2 * value for key, value in NUMBERS.items()}, proprio=NUMBERS)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A language model, a vision model and a text encoder that only reads, with random weights."""
    models = dict(
        llama=tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=VOCAB, **SHAPE)),
        vision=tf.CLIPVisionModel(tf.CLIPVisionConfig(image_size=16, patch_size=8, **SHAPE)),
        text=tf.CLIPTextModel(tf.CLIPTextConfig(vocab_size=VOCAB, eos_token_id=257, **SHAPE)))
    made = {}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        made[name] = str(folder)
    return made


def run_of(task, **said):
    """A run of small models, as train.py makes one."""
    settings = tasks.defaults(task)
    loop = dict(task=task, tokenizer='bytes', processor='auto', seq_len=32, seed=0, batch_size=2,
                micro_batch_size=0)
    small = {'vit.image_size': 16, 'vit.patch_size': 8}
    known = {key: value for key, value in small.items() if key in settings}
    run = checkpoint.make_run(settings | loop | known | said, 'cpu')
    run.kept = {name: STATS for name in run.task.FILES}
    run.task.prepare(run)
    return run


def batch_of(run):
    """Two samples of a picture and its name, those of robots with actions."""
    file = io.BytesIO()
    np.savez(file, actions=np.ones((4, 2)), proprio=np.zeros(1))
    samples = []
    for number in range(2):
        members = {'png': encode(picture(number)), 'txt': f'name {number}'.encode()}
        if run.task.FILES:
            members |= {'lowdim.npz': file.getvalue()}
        samples.append(members)
    pieces = []
    for position, members in enumerate(samples):
        pieces += [piece | dict(part=0, position=position)
                   for piece in run.processor.pieces(members)]
    return collate(pieces, run.processor)


def learns(run, *towers):
    """Every tower gets gradients from a batch that goes through the task."""
    # a DiT begins by looking at nothing: what is zero at the start lets no gradient through
    with torch.no_grad():
        for p in run.model.parameters():
            if not p.any():
                p.normal_(std=0.1)
    learned = run.model(**run.inputs(batch_of(run)))
    sum(each.losses.sum() for each in learned.values()).backward()
    assert all(len(each.losses) for each in learned.values())
    for tower in towers:
        parts = [module for module in run.model.modules() if isinstance(module, tower)]
        assert len(parts) == 1, f'{tower.__name__} was asked for'
        trained = [p for p in parts[0].parameters() if p.requires_grad]
        assert trained and all(p.grad is not None for p in trained)
        assert any(p.grad.abs().max() > 0 for p in trained)

    # and none of ours stands beside them
    replaced = {HFViT: ViT, HFDecoder: Decoder, HFText: Decoder}
    ours = tuple(replaced[tower] for tower in towers)
    assert not [module for module in run.model.modules() if isinstance(module, ours)]


BOTH = {'decoder.hf': 'llama', 'vit.hf': 'vision'}
SEES = {'policy.encoder': 'vlm', 'policy.denoiser': 'transformer'}
WORKS = {
    'llm': ('llm', {'decoder.hf': 'llama'}, {}),
    'vlm': ('vlm', BOTH, {}),
    'vlm, vit alone': ('vlm', {'vit.hf': 'vision'}, DECODER),
    'vlm, decoder alone': ('vlm', {'decoder.hf': 'llama'}, VIT),
    'siglip': ('siglip', {'vit.hf': 'vision'}, DECODER),
    'policy of words': ('policy', {'decoder.hf': 'llama'}, POLICY | {'policy.encoder': 'text'}),
    'policy': ('policy', BOTH, POLICY | SEES),
    'policy, vit alone': ('policy', {'vit.hf': 'vision'}, POLICY | SEES | DECODER),
    'policy, decoder alone': ('policy', {'decoder.hf': 'llama'}, POLICY | SEES | VIT),
    'vla': ('vla', {'vit.hf': 'vision'},
            ACTIONS | DECODER | {'vla.width': 32, 'vla.mlp_dim': 32}),
    't2i': ('t2i', {'decoder.hf': 'llama'}, DIT),
    't2i, an encoder': ('t2i', {'decoder.hf': 'text'}, DIT)}


@pytest.mark.parametrize('name', WORKS)
def test_towers_of_transformers_are_what_is_trained(folders, name):
    task, towers, said = WORKS[name]
    classes = dict(llama=HFDecoder, vision=HFViT, text=HFText)
    torch.manual_seed(0)
    run = run_of(task, **{key: folders[model] for key, model in towers.items()}, **said)
    learns(run, *(classes[model] for model in towers.values()))


REFUSED = [
    ('siglip', 'decoder.hf', VIT, 'text tower of task=siglip'),
    ('vla', 'decoder.hf', ACTIONS | VIT, 'action expert of task=vla'),
    ('policy', 'decoder.hf', POLICY, 'policy.encoder=none has no decoder'),
    ('policy', 'vit.hf', POLICY, 'policy.encoder=none has no vit'),
    ('policy', 'vit.hf', POLICY | DECODER | {'policy.encoder': 'text'},
     'policy.encoder=text has no vit'),
    ('t2i', 'decoder.hf', {'denoiser': 'unet', 'clip.max_length': 32},
     'text tower of denoiser=unet')]


@pytest.mark.parametrize('task, key, said, why', REFUSED)
def test_towers_that_a_task_has_no_place_for_are_refused_by_name(folders, task, key, said, why):
    folder = folders[BOTH[key]]
    with pytest.raises(ValueError, match=why) as error:
        run_of(task, **said, **{key: folder})
    assert f'{key}={folder!r}' in str(error.value)


def test_every_task_with_a_tower_is_here():
    known = {task for task, _, _ in WORKS.values()}
    for task in tasks.names():
        has = {'vit.hf', 'decoder.hf'} & tasks.defaults(task).keys()
        assert not has or task in known, f'{task} has {has}'
