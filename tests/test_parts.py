"""Parts of a model that begin with weights of others (`init`): their shapes come along, every
tensor is accounted for, and what a part computes is what transformers does."""
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
import test_sd
import tiny
import torch
import webdataset
from safetensors.torch import load_file

os.environ['HF_HUB_OFFLINE'] = '1'
tf = pytest.importorskip('transformers')

from test_hub import as_big_vision  # noqa: E402
from test_hub_train import save, write_bytes_tokenizer  # noqa: E402
from test_weights import byte_level, write_run  # noqa: E402

import checkpoint  # noqa: E402
import hub  # noqa: E402
import parts  # noqa: E402
import tasks  # noqa: E402
from configurator import configure  # noqa: E402

NEEDS = ('tasks/vlm.py', 'tasks/vla.py', 'tasks/siglip.py', 'tasks/policy.py', 'tasks/t2i.py',
         'families/huggingface.py', 'families/big_vision.py', 'families/diffusers.py')
stable_diffusion = test_sd.saved
# ids of bytes alone: our special tokens have no rows
TEXT = dict(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=96,
            rms_norm_eps=1e-5, rope_theta=5e4)
VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
              image_size=16, patch_size=8)
WORDS = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
             num_attention_heads=3)
EYES = VISION | dict(model_type='siglip_vision_model', projection_dim=32)
MODELS = {
    'llama': lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
    'tied': lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=True)),
    'gemma': lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**TEXT)),
    'gemma2': lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**TEXT)),
    'gemma3': lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**TEXT)),
    'qwen2': lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT)),
    'qwen3': lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**TEXT)),
    'siglip': lambda: tf.SiglipModel(tf.SiglipConfig(vision_config=VISION, text_config=WORDS)),
    'paligemma': lambda: tf.PaliGemmaForConditionalGeneration(tf.PaliGemmaConfig(
        vision_config=EYES, text_config=TEXT | dict(model_type='gemma'), image_token_index=259,
        projection_dim=32)),
    'idefics3': lambda: tf.Idefics3ForConditionalGeneration(tf.Idefics3Config(
        vision_config=VISION, text_config=TEXT | dict(model_type='llama'), image_token_id=259,
        scale_factor=2, tie_word_embeddings=False))}
SMALL = ['--decoder.width=16', '--decoder.depth=2', '--decoder.mlp_dim=32',
         '--decoder.num_heads=2', '--decoder.head_dim=8']
ROBOT = ['--action_steps=4', '--action_dim=3', '--proprio_dim=2']


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """kind -> its folder, as its repository has it: weights and a tokenizer of bytes."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = save(MODELS[kind](), tmp_path_factory.mktemp(kind))
            write_bytes_tokenizer(folder)
            made[kind] = str(folder)
        return made[kind]
    return make


def config_of(*argv):
    """The settings of train.py after a command line, as far as a model is made of them."""
    loop = dict(task='llm', out_dir='/nowhere', resume='auto', remote='', init_from='', init={},
                init_skip=[], data_dir='', cache_dir='/nowhere', tokenizer='bytes',
                processor='auto', seq_len=64, seed=0, ema=0.0, lora=[])
    return configure(loop, [str(word) for word in argv], more=tasks.train_settings,
                     brings=parts.flags)


def begun(*argv):
    """(settings, Run, line) of a run that begins."""
    config = config_of(*argv)
    run = checkpoint.make_run(config, 'cpu')
    return config, run, parts.begin_run(run, '')


def refused(capsys, *argv):
    """The one line of a command line that can not be."""
    with pytest.raises(SystemExit) as caught:
        config_of(*argv)
    line, = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    return line


def logits_of(folder, tokens):
    theirs = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return theirs(tokens).logits


def features_of(folder, pixels):
    theirs = tf.SiglipModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return theirs.vision_model(pixels).last_hidden_state


# ------------------------------------------------------------------------------------------------
# shapes come along, and the part computes what it did


def test_a_vlm_of_a_tower_and_a_language_model(saved):
    init = {'vit': saved('siglip'), 'decoder': saved('llama')}
    config, run, line = begun('--task=vlm', f'--init={init}')
    assert config['vit.width'] == 24 and config['decoder.rope_theta'] == 5e4
    assert config['decoder.tied'] is False and config['tokenizer'] == saved('llama')
    # what is left: the connector, the pooling head and the words of the SigLIP
    tower, words = run.model.vit.state_dict(), run.model.decoder.state_dict()
    unused = len(load_file(saved('siglip') + '/model.safetensors')) - len(tower)
    assert f'vit from {saved("siglip")}: {len(tower)} tensors loaded' in line
    assert f'({unused}) left there unused' in line and 'connector (2) begin anew' in line
    assert f'decoder from {saved("llama")}: {len(words)} tensors loaded, none left' in line
    assert 'decoder.embedding.weight (256, 32) made (320, 32), new rows are the mean' in line

    tokens, pixels = torch.arange(3, 250, 7)[None], torch.randn(2, 3, 16, 16)
    want = logits_of(saved('llama'), tokens)
    with torch.no_grad():
        got = run.model.decoder.logits(tokens)
        assert (run.model.vit(pixels) - features_of(saved('siglip'), pixels)).abs().max() < 1e-5
    assert (got[..., :256] - want).abs().max() < 1e-5
    rows = run.model.decoder.embedding.weight
    assert torch.allclose(rows[256:], rows[:256].mean(0), atol=1e-7)


def test_what_a_user_sets_against_the_weights_is_refused(saved, capsys, tmp_path):
    init = f'--init={ {"decoder": saved("llama")} }'
    for word in ('decoder.width=48', 'decoder.rope_theta=2e4', 'decoder.num_heads=8',
                 'decoder.hf=some/model'):
        said = refused(capsys, init, f'--{word}')
        assert word.partition('=')[0] in said and f'but {saved("llama")!r} of init has' in said
    # in a file, and what the default is all the same, which the weights' own stands before
    path = tmp_path / 'c.py'
    path.write_text(f'init = {{"decoder": {saved("llama")!r}}}\ndecoder.depth = 3\n')
    assert 'decoder.depth=3' in refused(capsys, path)
    config = config_of(init, '--decoder.norm_offset=1.0')
    run = checkpoint.make_run(config, 'cpu')
    with pytest.raises(ValueError, match='decoder.norm_offset=1.0, but .* has 0.0'):
        parts.begin_run(run, '')

    # named in init_skip, or no matter of the weights
    config, _, line = begun(init, '--decoder.depth=3', '--decoder.dropout=0.5',
                            "--init_skip=['decoder.depth', 'blocks.2']")
    assert config['decoder.depth'] == 3 and config['decoder.dropout'] == 0.5
    assert '. blocks (9) begin anew' in line
    config, run, line = begun('--task=vlm', f'--init={ {"vit": saved("siglip")} }',
                              '--vit.image_size=24', *SMALL)
    assert run.model.vit.pos_embed.shape[1] == 9 and 'pos_embed (4, 24) made (1, 9, 24)' in line


def test_what_is_no_part_or_no_source(saved, capsys, tmp_path):
    llama = saved('llama')
    for init, words in (({'text': llama}, ["'text' is no part of task=llm", 'decoder']),
                        ({'decoder': 'nobody/nothing'}, ['nobody/nothing', 'Hugging Face']),
                        ({'decoder': str(tmp_path)}, [str(tmp_path), 'model.safetensors']),
                        ({'decoder': saved('siglip')}, ['siglip', 'has no decoder']),
                        ({'decoder': 3}, ['decoder=3', 'a run, a folder'])):
        said = refused(capsys, f'--init={init}')
        assert all(word in said for word in ('init', *words)), said
    said = refused(capsys, f'--init={ {"decoder": llama} }', '--init_from=out/run')
    assert 'init_from' in said and 'one of the two' in said

    # a model that has no such part; a tokenizer that is not the weights'
    config = config_of('--task=policy', f'--init={ {"decoder": llama} }', *ROBOT)
    with pytest.raises(ValueError, match='this model has no decoder, only policy'):
        parts.begin_run(checkpoint.make_run(config, 'cpu'), '')
    other = byte_level(tmp_path / 'other')
    assert f'tokenizer={other!r}, but' in refused(
        capsys, f'--init={ {"decoder": llama} }', f'--tokenizer={other}')
    write_run(tmp_path / 'own', 'llm', tokenizer=other)
    config = config_of(f'--init={ {"decoder": str(tmp_path / "own")} }', '--tokenizer=bytes')
    with pytest.raises(ValueError, match="tokenizer='bytes', but .* has '"):
        parts.begin_run(checkpoint.make_run(config, 'cpu'), '')
    shutil.copytree(llama, tmp_path / 'same')
    begun(f'--init={ {"decoder": llama} }', f'--tokenizer={tmp_path / "same"}')


# ------------------------------------------------------------------------------------------------
# runs of ours, whatever a part is called in them


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """task -> the checkpoint of a tiny run."""
    folder = tmp_path_factory.mktemp('runs')
    for task in ('llm', 'vlm', 'vla', 'siglip'):
        write_run(folder / task, task, image_mean=1.0)
    return folder


@pytest.mark.parametrize('task, part, source, flags, start, there', [
    ('siglip', 'decoder', 'llm', [], 'text.', ''),
    ('llm', 'decoder', 'siglip', [], '', 'text.'),
    ('vlm', 'vit', 'siglip', SMALL, 'vit.', 'vit.'),
    ('policy', 'decoder', 'vlm', ['--policy.encoder=text', *ROBOT], 'encoder.', 'decoder.'),
    ('policy', 'vit', 'vla', ['--policy.encoder=vlm', *ROBOT, *SMALL], 'encoder.vit.', 'vit.'),
    ('t2i', 'decoder', 'vla', [], 'text.', 'decoder.'),
    ('vla', 'decoder', 'llm', ROBOT, 'decoder.', '')])
def test_a_part_of_a_run(runs, task, part, source, flags, start, there):
    flags = [f'--task={task}', f'--init={ {part: str(runs / source)} }', *flags]
    config, run, line = begun(*flags)
    theirs = load_file(runs / source / 'model.safetensors')
    ours = {name.removeprefix(start): tensor for name, tensor in run.model.state_dict().items()
            if name.startswith(start)}
    same = [name for name, tensor in ours.items() if name.startswith(('blocks', 'embed', 'pos'))
            and torch.equal(tensor, theirs[there + name])]
    assert len(same) > 10 and f'{part} from {runs / source}: ' in line
    loaded = int(re.search(r'(\d+) tensors loaded', line)[1])
    unused = sum(map(int, re.findall(r'\((\d+)\) left there unused', line)))
    anew = sum(map(int, re.findall(r'\((\d+)\) begin anew', line)))
    assert loaded + unused == len(theirs) and loaded + anew == len(run.model.state_dict())
    if part == 'vit':
        assert config['image_mean'] == 1.0, 'pixels are as the tower knows them'


def test_a_tokenizer_with_more_special_tokens(runs, tmp_path):
    """Of a user, who cuts words as the run did that the weights are of."""
    write_bytes_tokenizer(tmp_path)
    path = tmp_path / 'tokenizer.json'
    more = json.loads(path.read_text())
    last = more['added_tokens'][-1]
    more['added_tokens'] += [last | dict(id=260 + i, content=f'<more{i}>') for i in range(70)]
    path.write_text(json.dumps(more))
    config, run, line = begun(f'--init={ {"decoder": str(runs / "llm")} }',
                              f'--tokenizer={tmp_path}')
    assert run.tokenizer.vocab_size == 330 and config['decoder.vocab_size'] == 384
    assert '(320, 16) made (384, 16), new rows are the mean of the old' in line
    rows = run.model.embedding.weight
    assert torch.allclose(rows[320:], rows[:320].mean(0), atol=1e-7)


def test_the_action_expert_and_the_connector(runs):
    init = dict.fromkeys(('vit', 'decoder', 'connector'), str(runs / 'vlm'))
    config, run, line = begun('--task=vla', f'--init={init | {"vla": str(runs / "vla")} }',
                              '--action_steps=7')
    assert config['vla.width'] == 16 and config['action_dim'] == 2
    theirs = load_file(runs / 'vla' / 'model.safetensors')
    ours = run.model.state_dict()
    own = [name for name in ours if not name.startswith(('vit.', 'decoder.', 'connector.'))]
    assert own and all(torch.equal(ours[name], theirs[name]) for name in own)
    assert 'none begin anew' in line and 'vla from' in line


def test_a_run_at_a_url(runs, tmp_path):
    far = tmp_path / 'far' / 'checkpoints' / 'step_00000001'
    shutil.copytree(runs / 'vlm', far)
    shutil.copy(runs / 'vlm' / 'config.json', tmp_path / 'far')
    url = f'file://{tmp_path}/far'
    config, run, line = begun('--task=vlm', f'--init={ {"vit": url} }', *SMALL,
                              f'--cache_dir={tmp_path / "cache"}')
    assert config['vit.width'] == 16 and f'vit from {url}' in line
    assert torch.equal(run.model.vit.pos_embed,
                       load_file(far / 'model.safetensors')['vit.pos_embed'])

    # a run that goes on on another machine: its own copy there has the shapes
    gone = {'vit': '/gone'}
    (tmp_path / 'far' / 'config.json').write_text(json.dumps(config | dict(init=gone)))
    assert config_of('--task=vlm', f'--init={gone}', f'--remote={url}')['vit.width'] == 16


# ------------------------------------------------------------------------------------------------
# big_vision's files


@pytest.mark.parametrize('kind', ['paligemma', 'gemma2'])
def test_the_shapes_of_an_npz(saved, kind, tmp_path):
    model = hub.from_pretrained(saved('paligemma'))
    arrays = as_big_vision(model)
    if kind == 'gemma2':
        for name in ('attention', 'ffw'):
            arrays[f'llm/layers/post_{name}_norm/scale'] = np.zeros((2, 32), np.float32)
    path = str(tmp_path / 'pt.npz')
    np.savez(path, **{f'params/{key}': array for key, array in arrays.items()})
    init = dict.fromkeys(('vit', 'decoder', 'connector'), path)
    config, run, line = begun('--task=vlm', f'--init={init}', f'--tokenizer={saved("paligemma")}')
    assert 'none begin anew' in line and 'new rows are the mean' in line
    for name, tensor in model.state_dict().items():
        ours = run.model.state_dict()[name]
        assert torch.equal(ours[:len(tensor)], tensor), name
    assert config['decoder.post_norms'] == (kind == 'gemma2')
    assert config['decoder.attn_logits_softcap'] == (50.0 if kind == 'gemma2' else 0.0)

    # a tower alone, a layer an array
    tower = {}
    for key, array in arrays.items():
        if key.startswith('img/') and 'head' not in key:
            for i in (0, 1):
                name = key.replace('encoderblock/', f'encoderblock_{i}/')
                tower[name] = array[i] if name != key else array
    np.savez(path, **tower)
    config, _, line = begun('--task=vlm', f'--init={ {"vit": path} }', *SMALL)
    assert config['vit.depth'] == 2 and 'vit from' in line


def test_parts_of_stable_diffusion(stable_diffusion, tmp_path):
    """All of a folder, or a U-Net of a run of ours beside its autoencoder and words."""
    folder = stable_diffusion[1]
    flags = ['--task=t2i', '--denoiser=unet', '--dit.image_size=8', '--seq_len=77']
    init = dict.fromkeys(('unet', 'clip', 'vae'), folder)
    config, run, line = begun(*flags, f'--init={init}')
    assert 'none begin anew' in line and config['tokenizer'] == f'{folder}/tokenizer'
    want = hub.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in run.model.state_dict().items())

    said = {key: value for key, value in config.items() if key not in ('task', 'init')}
    write_run(tmp_path / 'run', 't2i', **said)
    init['unet'] = str(tmp_path / 'run')
    config, run, line = begun(*flags, f'--init={init}')
    theirs = load_file(tmp_path / 'run' / 'model.safetensors')
    for name, tensor in run.model.state_dict().items():
        source = theirs if name.startswith('denoiser.') else want
        assert torch.equal(tensor, source[name]), name
    assert 'unet from' in line and 'text, vae (' in line and 'unet (' in line


# ------------------------------------------------------------------------------------------------
# hub.py config X > c.py; train.py c.py


@pytest.mark.parametrize('kind', [*MODELS, 'npz'])
def test_a_config_file_of_each_family_trains(saved, kind, tmp_path):
    folder = saved(kind) if kind != 'npz' else str(tmp_path / 'pt.npz')
    words = []
    if kind == 'npz':
        np.savez(folder, **as_big_vision(hub.from_pretrained(saved('paligemma'))))
        words = [f'--tokenizer={saved("paligemma")}']
    (tmp_path / 'c.py').write_text(hub.config_lines(folder))
    # the form of a processor's folder is looked at elsewhere; a language model may have none
    if 'vit.width' in hub.settings_of(folder):
        words.append('--processor=auto')
    _, run, line = begun(tmp_path / 'c.py', *words)
    assert 'init_from' in line and (kind == 'siglip' or 'none begin anew' in line)
    if kind not in ('siglip', 'npz'):
        rows = run.model.get_parameter(
            next(name for name in run.model.state_dict() if 'embedding' in name))
        assert len(rows) == 320 and 'new rows are the mean of the old' in line


# ------------------------------------------------------------------------------------------------
# the real command


def robot(folder):
    """Twelve samples of one camera, 7 numbers of an action and a state, and their statistics."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    picture = tiny.png(tiny.draw('red disc', 'plain'))
    with webdataset.TarWriter(str(folder / '0.tar'), encoder=False) as tar:
        for i in range(12):
            file = io.BytesIO()
            np.savez(file, proprio=rng.standard_normal(7), actions=rng.uniform(-1, 1, (16, 7)),
                     is_pad=np.zeros(16, bool))
            tar.write({'__key__': f's{i}', 'json': b'{"instruction": "look"}',
                       'lowdim.npz': file.getvalue(), 'base.png': picture})
    tiny.run('prepare/stats.py', f'--data={folder}', f'--cache_dir={folder}/cache').ok()


def test_the_three_files_of_docs_models(saved, tmp_path):
    """Language model, vision-language model, robot's policy, each from the one before; they go on
    when what they began with is gone."""
    text = (tiny.ROOT / 'docs' / 'models.md').read_text()
    theirs = {name: str(tmp_path / name) for name in ('llama', 'siglip')}
    for name, folder in theirs.items():
        shutil.copytree(saved(name), folder)
    text = text.replace('HuggingFaceTB/SmolLM2-135M', theirs['llama'])
    text = text.replace('google/siglip-base-patch16-224', theirs['siglip'])
    flags = ['--epochs=0', '--batch_size=6', '--seq_len=48', '--device=cpu', '--workers=0',
             '--lanes=8', '--window=4', f'--data_dir={tiny.data_dir()}']
    flags_of = {'llm': ['--mix={"words": 1}'],
                'vlm': ['--mix={"plain": 1}', '--ema=0.9', '--lr=0'],
                'vla': [f'--data_dir={tmp_path}', '--vla.width=16', '--vla.mlp_dim=24']}
    robot(tmp_path / 'robot')

    def train(name, steps, *more, **how):
        return tiny.run('train.py', tmp_path / f'{name}.py', *flags, *flags_of[name], *more,
                        f'--max_steps={steps}', cwd=tmp_path, **how).ok().out

    for name, how in (('llm', {}), ('vlm', dict(torchrun=2)), ('vla', {})):
        shared = ['--fsdp=0'] if how else []
        block, = re.findall(rf'```python\n(# {name}\.py.*?)```', text, re.S)
        (tmp_path / f'{name}.py').write_text(block)
        line, = (line for line in train(name, 1, *shared, **how).splitlines()
                 if line.startswith('init: '))
        assert 'decoder' in line and 'begin anew' in line and 'none left there unused' in line
    config = json.loads((tmp_path / 'out/vla/config.json').read_text())
    assert config['decoder.rope_theta'] == 5e4 and config['vit.width'] == 24
    assert config['decoder.vocab_size'] == 320 and config['tokenizer'] == theirs['llama']
    assert config['init']['vit'] == 'out/vlm'

    # two processes that share the weights, and averages that begin with them (its lr is 0)
    before, after = tiny.weights(tmp_path / 'out/llm'), tiny.weights(tmp_path / 'out/vlm')
    averages = tiny.weights(tmp_path / 'out/vlm', 'latest/ema')
    for name, tensor in before.items():
        assert (after[f'decoder.{name}'] == tensor).all(), name
    assert all(np.abs(averages[name] - after[name]).max() < 1e-6 for name in after)

    # all that they began with is gone
    for folder in (theirs['llama'], theirs['siglip'], tmp_path / 'out/vlm', tmp_path / 'out/llm'):
        shutil.rmtree(folder)
    said = train('vla', 2)
    assert 'resumed from' in said and 'init: ' not in said
