"""Text to image in the real commands: train.py with task=t2i on any number of ranks, sample.py
draws and judges."""
import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import hub

DECODER = [flag for flag in tiny.MODEL if flag.startswith('--decoder')]
LOOP = ['--device=cpu', '--lanes=8', '--window=4', '--workers=0', '--batch_size=12',
        '--seq_len=24', '--log_every=1', '--max_steps=4', '--lr=1e-2', '--warmup=0', '--ema=0.9',
        f'--data_dir={tiny.data_dir()}']
DIT = ['--task=t2i', '--dit.image_size=16', '--dit.patch_size=8', '--dit.width=32',
       '--dit.mlp_dim=32', '--dit.num_heads=2', '--dit.depth=2', '--dit.drop=0.3',
       '--mix={"plain": 1.0, "dark": 1.0}']
FLAGS = [*LOOP, *DIT, *DECODER, '--decoder.dropout=0.1']


def train(out_dir, *flags, **kwargs):
    return tiny.run('train.py', *FLAGS, f'--out_dir={out_dir}', *flags, **kwargs)


def losses(out_dir):
    return [row['loss'] for row in tiny.rows(out_dir)]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'a'
    train(folder, '--val={"held": "held"}', '--num_checkpoints=2').ok()
    return folder


def test_any_ranks_and_micro_batches(run, tmp_path):
    """The same losses however the batch is cut, by DDP and FSDP, in both kinds of attention."""
    assert losses(run)[-1] < losses(run)[0]
    assert np.isfinite(tiny.rows(run, 'val_loss')[0]['val_loss'])
    train(tmp_path / 'ddp', '--micro_batch_size=2', torchrun=2).ok()
    np.testing.assert_allclose(losses(tmp_path / 'ddp'), losses(run), rtol=1e-5)
    joint = ['--dit.attention=joint', '--dit.objective=ddpm', '--compile=false']
    train(tmp_path / 'joint', *joint).ok()
    train(tmp_path / 'fsdp', *joint, '--fsdp=0', torchrun=2).ok()
    np.testing.assert_allclose(losses(tmp_path / 'fsdp'), losses(tmp_path / 'joint'), rtol=1e-5)
    assert abs(losses(tmp_path / 'joint')[0] - losses(run)[0]) > 1e-3


def test_resume_is_bit_identical(run, tmp_path):
    train(tmp_path, '--val={"held": "held"}', '--num_checkpoints=2').ok()
    tiny.same_weights(tiny.weights(tmp_path), tiny.weights(run))

    # damaged: the one before it is taken
    for path in (tmp_path / 'checkpoints').glob('step_00000004/**/*'):
        if path.is_file():
            path.unlink()
    train(tmp_path, '--val={"held": "held"}', '--num_checkpoints=2').ok()
    tiny.same_weights(tiny.weights(tmp_path), tiny.weights(run))
    assert losses(tmp_path) == losses(run)
    train(tmp_path, '--dit.depth=1').refused('dit.depth=1', 'another out_dir')


def test_text_tower_of_a_language_model(tmp_path):
    """A run of task=llm begins the text tower, which may be frozen."""
    tiny.run('train.py', *LOOP, *DECODER, f'--out_dir={tmp_path / "llm"}', '--task=llm',
             '--mix={"words": 1.0}').ok()
    freeze = "--groups=[('^text', {'freeze': True}), ('.*', {})]"
    train(tmp_path / 'a', f'--init_from={tmp_path / "llm"}', freeze, '--max_steps=2').ok()
    text, llm = tiny.weights(tmp_path / 'a'), tiny.weights(tmp_path / 'llm')
    tiny.same_weights({k[5:]: v for k, v in text.items() if k.startswith('text.')}, llm)
    # and then the whole
    train(tmp_path / 'b', f'--init_from={tmp_path / "a"}', '--max_steps=1').ok()


@pytest.mark.parametrize('kind', ('clip', 't5'))
def test_text_tower_of_transformers(kind, tmp_path):
    """A text encoder of transformers is what is read, to the bit; a checkpoint has it, and it may
    be frozen."""
    tf = pytest.importorskip('transformers')
    torch.manual_seed(0)
    if kind == 'clip':
        theirs = tf.CLIPTextModel(tf.CLIPTextConfig(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=24)).eval()
        encoder = theirs
    else:
        theirs = tf.T5Model(tf.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=2,
                                        num_heads=4)).eval()
        encoder = theirs.get_encoder()
    theirs.save_pretrained(tmp_path / 'hf')

    tiny.run('train.py', *LOOP, *DIT, f'--out_dir={tmp_path / "a"}', '--max_steps=1',
             f'--decoder.hf={tmp_path / "hf"}',
             "--groups=[('^text', {'freeze': True}), ('.*', {})]").ok()
    model = hub.open_run(str(tmp_path / 'a')).model
    tokens, segments = torch.randint(3, 250, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    segments[1, 5:] = 0
    expected = encoder(input_ids=tokens, attention_mask=segments).last_hidden_state
    features, mask = model.encode(tokens, segments)
    assert torch.equal(mask, segments > 0)
    torch.testing.assert_close(features[mask], expected[mask], atol=1e-6, rtol=1e-6)


def test_pictures_of_a_prompt(run):
    sample = [f'--out_dir={run}', '--steps=3', '--n=5']
    tiny.run('sample.py', *sample, '--prompt=red bar', '--batch_size=2').ok()
    names = sorted(path.name for path in (run / 'samples').iterdir())
    assert names == ['red-bar.png', *(f'red-bar_{i:03}.png' for i in range(5))]
    first = [Image.open(run / 'samples' / name) for name in names[1:]]
    assert first[3].size == (16, 16)
    wrote = {'prompt': 'red bar', 'seed': '0', 'index': '3', 'steps': '3', 'guidance': '4.0',
             'run': str(run)}
    assert first[3].text | wrote == first[3].text

    # the same in another batch, to rounding; each by another noise
    again = run / 'again.png'
    tiny.run('sample.py', *sample, '--prompt=red bar', '--batch_size=5', f'--grid={again}').ok()
    for i, picture in enumerate(first):
        other = np.asarray(Image.open(run / f'again_{i:03}.png')).astype(int)
        assert abs(other - np.asarray(picture)).max() <= 1
        assert abs(other - np.asarray(first[i - 1])).max() > 1

    # from a picture, of which one half stays
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(run / 'mask.png')
    start = run / 'samples' / 'red-bar_000.png'
    tiny.run('sample.py', *sample, '--prompt=blue disc', f'--image={start}',
             f'--mask={run / "mask.png"}', f'--grid={again}').ok()
    drawn = np.asarray(Image.open(run / 'again_001.png')).astype(int)
    changed = abs(drawn - np.asarray(Image.open(start)))
    assert changed[:, :8].max() <= 1 < changed[:, 8:].max()


def test_judging_by_a_captioner(run, tmp_path):
    flags = ['--batch_size=24', '--max_steps=60', '--warmup=5']
    tiny.run('train.py', *tiny.FLAGS, *flags, f'--data_dir={tiny.data_dir()}',
             '--mix={"plain": 1.0, "dark": 1.0}', '--image_mean=1.0', '--augment=false',
             f'--out_dir={tmp_path}').ok()
    judged = tiny.run('sample.py', f'--out_dir={run}', '--eval=mix,held', f'--judge={tmp_path}',
                      '--steps=2', '--json=true').ok()
    rows = [json.loads(line) for line in judged.out.splitlines()]
    assert [(row['data'], row['pictures'], row['samples']) for row in rows] == [
        ('mix', 'drawn', 24), ('mix', 'real', 24), ('held', 'drawn', 12), ('held', 'real', 12)]
    drawn, real = rows[:2]
    assert real['exact_match'] > 0.4 > drawn['exact_match']
    assert real['token_f1'] >= real['exact_match']
    assert real['another_name'] < 0.4 and drawn['frechet'] > real['frechet'] > 0
    assert (run / 'judged.png').exists()
    tiny.run('sample.py', f'--out_dir={run}', '--eval=mix').refused('--judge')
    judged = tiny.run('sample.py', f'--out_dir={run}', '--eval=mix', f'--judge={run}')
    judged.refused('t2i', 'captioner')


@pytest.mark.parametrize('flag, words', [
    ('--dit.width=30', 'dit.num_heads'),
    ('--dit.attention=add', 'cross or joint'),
    ('--pack=true', 'pack'),
    ('--z_loss=0.1', 'z_loss'),
    ('--dit.time=never', 'logit_normal'),
    ('--prompt={style}: {text}', 'style'),
    ('--mix={"words": 1.0}', 'expected one')])
def test_bad_settings(tmp_path, flag, words):
    assert words in train(tmp_path, flag).refused().err


@pytest.mark.parametrize('flags, words', [
    (['--guidance=-1'], 'guidance=-1'), (['--strength=0'], 'strength'),
    (['--mask=a.png'], '--image'), (['--sampler=ddim'], 'euler'),
    (['--image=none.png'], 'none.png'), (['--n=0'], 'n=0')])
def test_bad_samples(run, flags, words):
    drawn = tiny.run('sample.py', f'--out_dir={run}', '--prompt=red bar', *flags)
    assert words in drawn.refused().err
