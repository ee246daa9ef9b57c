"""Models of others, asked: templates, conversations, files of prompts, and how tokens are chosen.
The reference is transformers, with a tiny Llama of random weights that chats."""
import io
import json
import os
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import tiny
import torch

import answering
import asking
import generate
import hub
import talk
import tasks

transformers = pytest.importorskip('transformers')
tokenizers = pytest.importorskip('tokenizers')
NEEDS = ['families']
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
PROMPTS = ['one two', 'a red square', 'the quick brown fox jumps', 'x', 'say it again, say it']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A Llama of bf16 weights whose answers wander, with its tokenizer and chat template."""
    folder = str(tmp_path_factory.mktemp('chat'))
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=['<|im_start|>', '<|im_end|>'],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(PROMPTS, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token='<|im_start|>', eos_token='<|im_end|>',
        pad_token='<|im_end|>')
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(wrapped), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=200,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=False))
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(6)
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope='module')
def run(folder):
    return hub.open_run(folder, dtype='float32')


def options(**said):
    loop = dict(batch_size=2, seed=0, json=False, out_dir='')
    known = tasks.body_of(tasks.load('llm').SampleSettings)
    assert said.keys() <= known.keys() | loop.keys()
    return SimpleNamespace(**known | loop | said)


def ids_of(run, prompts, **said):
    """The answers' ids."""
    said = options(**said)
    questions = [asking.read_question(run, i, dict(prompt=prompt), said.raw)
                 for i, prompt in enumerate(prompts)]
    return [answer.ids for answer in asking.answered(run, questions, said)]


def their_ids(folder, theirs, prompts, raw=False, **said):
    """The ids that transformers generates, one prompt by one, less what ends them."""
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    out = []
    for prompt in prompts:
        if raw:
            ids = tok(prompt, return_tensors='pt')['input_ids']
        else:
            turn = dict(role='user', content=prompt)
            ids = tok.apply_chat_template([turn], return_tensors='pt', return_dict=True,
                                          add_generation_prompt=True)['input_ids']
        new = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **said)
        row = new[0, ids.shape[1]:].tolist()
        out.append(row[:row.index(1)] if 1 in row else row)
    return out


# -------------------------------------------------------------------------------------------------
# what is said


@pytest.mark.parametrize('raw', [False, True])
@pytest.mark.parametrize('penalty', [1.0, 1.3])
def test_greedy_answers_are_those_of_transformers(folder, theirs, run, raw, penalty):
    want = their_ids(folder, theirs, PROMPTS, raw, max_new_tokens=20, repetition_penalty=penalty)
    said = dict(max_new_tokens=20, raw=raw, repetition_penalty=penalty)
    assert ids_of(run, PROMPTS, **said) == want
    assert ids_of(run, PROMPTS, **said, batch_size=5) == want
    assert len({tuple(row) for row in want}) == 5, 'a lively model'


def test_bf16_stays_bf16_and_says_what_transformers_says(folder):
    half = hub.open_run(folder)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert ids_of(half, PROMPTS, max_new_tokens=12) == their_ids(folder, theirs, PROMPTS,
                                                                 max_new_tokens=12)


def test_tokens_are_chosen_as_by_transformers():
    """Its logits processors, one by one and together."""
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    lp = transformers.generation.logits_process
    said = torch.randint(50, (4, 7), generator=torch.Generator().manual_seed(1))
    for top_k, top_p, min_p in [(0, 1.0, 0.1), (5, 1.0, 0.0), (0, 0.7, 0.0), (20, 0.9, 0.05)]:
        want = logits
        if top_k:
            want = lp.TopKLogitsWarper(top_k)(said, want)
        if top_p < 1:
            want = lp.TopPLogitsWarper(top_p)(said, want)
        if min_p:
            want = lp.MinPLogitsWarper(min_p)(said, want)
        got = generate.kept(logits, top_k, top_p, min_p)
        assert torch.equal(got, want) and got.isinf().any()

    # the likeliest after the fine, which differs from that before it
    want = lp.RepetitionPenaltyLogitsProcessor(5.0)(said, logits).argmax(-1)
    is_said = torch.zeros(4, 50, dtype=torch.bool).scatter(1, said, True)
    choice = generate.Choice(repetition_penalty=5.0)
    assert generate.choose(logits, choice, is_said, [])[:, 0].equal(want)
    assert not want.equal(logits.argmax(-1))


def test_an_answer_is_its_prompts_whatever_stands_beside_it(run):
    said = dict(max_new_tokens=10, temperature=1.5, top_k=40, min_p=0.01, seed=3)
    alone = ids_of(run, PROMPTS, batch_size=1, **said)
    assert ids_of(run, PROMPTS, batch_size=3, **said) == alone
    assert ids_of(run, PROMPTS, **said | dict(seed=4)) != alone


def test_stop_and_logprobs(run, theirs, folder, capsys):
    whole, = ids_of(run, PROMPTS[:1], max_new_tokens=16)
    text = run.tokenizer.decode(whole)
    stop = text[5:8]
    said = options(prompt=PROMPTS[0], max_new_tokens=16, stop=repr([stop, 'never there']),
                   json=True, logprobs=True)
    asking.ask(run, said)
    row = json.loads(capsys.readouterr().out)
    assert row['text'] == text[:text.index(stop)] and len(row['tokens']) < 16

    # as the reference has them
    question = asking.read_question(run, 0, dict(prompt=PROMPTS[0]), False)
    n = len(row['logprobs'])
    ids = torch.tensor([question.prompt[0] + whole[:n]])
    with torch.no_grad():
        logprobs = theirs(ids).logits[0, -n - 1:-1].log_softmax(-1)
    want = logprobs.gather(1, ids[0, -n:, None])[:, 0]
    assert torch.allclose(torch.tensor(row['logprobs']), want, atol=1e-4)


# -------------------------------------------------------------------------------------------------
# files


def test_a_file_is_answered_in_its_order_and_goes_on(run, tmp_path, capsys):
    rows = [dict(prompt=prompt, id=i) for i, prompt in enumerate(PROMPTS)]
    rows.append(dict(messages=[dict(role='user', content='one two'),
                               dict(role='assistant', content='three'),
                               dict(role='user', content='and?')]))
    (tmp_path / 'in.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    out = tmp_path / 'out.jsonl'
    said = options(prompts=f'{tmp_path}/in.jsonl', out=str(out), max_new_tokens=6, temperature=1.0)
    asking.ask(run, said)
    whole = out.read_text()
    found = [json.loads(line) for line in whole.splitlines()]
    assert [{key: row[key] for key in rows[i]} for i, row in enumerate(found)] == rows
    assert 'were cut at max_new_tokens=6' in capsys.readouterr().err

    # killed in the middle of a line
    lines = whole.splitlines(keepends=True)
    out.write_text(''.join(lines[:3]) + lines[3][:9])
    asking.ask(run, said)
    assert out.read_text() == whole
    err = capsys.readouterr().err
    assert 'its last line is torn' in err and '3 of 6 are answered already' in err
    asking.ask(run, said)
    assert out.read_text() == whole

    # the answers to others are not added to
    (tmp_path / 'in.jsonl').write_text(json.dumps(dict(prompt='another')) + '\n')
    with pytest.raises(ValueError, match='line 1 is no answer to that line'):
        asking.ask(run, said)
    assert out.read_text() == whole


@pytest.mark.parametrize('mine', ['precious\nnotes, no newline', 'notes, no newline', '{"a": 1}',
                                  '{"prompt": "a"}\n', '{"prompt": "a"}\n{"prompt": "b"}'])
def test_what_is_no_file_of_answers_stays_as_it_is(tmp_path, mine):
    rows = [dict(prompt='a'), dict(prompt='b')]
    (tmp_path / 'out').write_text(mine)
    with pytest.raises(ValueError, match='name another'):
        asking.mend(str(tmp_path / 'out'), rows)
    assert (tmp_path / 'out').read_text() == mine
    with pytest.raises(ValueError, match='no file'):
        asking.mend('/dev/full', rows)


def test_answers_are_not_written_over_their_questions(run, tmp_path):
    (tmp_path / 'in.jsonl').write_text('{"prompt": "a"}\n')
    said = options(prompts=f'{tmp_path}/in.jsonl', out=f'{tmp_path}/../{tmp_path.name}/in.jsonl')
    with pytest.raises(ValueError, match='is the file of --prompts'):
        asking.ask(run, said)


@pytest.mark.parametrize('line, words', [
    ('{"prompt"', 'line 2 is no JSON'), ('[1]', 'line 2: expected'),
    ('{"question": "a"}', 'it has question'), ('{"prompt": "a", "text": "b"}', 'has text'),
    ('{"prompt": "a", "images": ["a.png"]}', 'no eyes'),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "not a user's"),
    ('{"messages": [{"role": "user"}]}', 'line 2: messages: expected')])
def test_a_line_that_can_not_be_asked_is_refused_before_all(run, tmp_path, line, words):
    (tmp_path / 'in.jsonl').write_text(f'{{"prompt": "a"}}\n{line}\n')
    out = tmp_path / 'out.jsonl'
    with pytest.raises(ValueError) as error:
        asking.ask(run, options(prompts=f'{tmp_path}/in.jsonl', out=str(out)))
    assert words in str(error.value) and not out.exists()


def test_several_prompts(run, tmp_path, capsys):
    (tmp_path / 'three.txt').write_text('\n'.join(PROMPTS[:3]) + '\n')
    said = dict(max_new_tokens=3, json=True)
    for prompt in (str(tmp_path / 'three.txt'), repr(PROMPTS[:3])):
        asking.ask(run, options(prompt=prompt, **said))
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row['prompt'] for row in rows] == PROMPTS[:3]
    with pytest.raises(ValueError, match='nowhere.txt'):
        asking.ask(run, options(prompt='nowhere.txt'))


# -------------------------------------------------------------------------------------------------
# conversations


def spoken(run, monkeypatch, capsys, text, **said):
    """What a conversation prints of what is piped into it."""
    monkeypatch.setattr(sys, 'stdin', io.StringIO(text))
    asking.ask(run, options(chat=True, **said))
    return capsys.readouterr()


def test_a_conversation_remembers_and_forgets(folder, theirs, run, monkeypatch, capsys):
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [dict(role='user', content='one two')]
    want = []
    for line in ('a red square', ''):
        ids = tok.apply_chat_template(turns, add_generation_prompt=True, return_tensors='pt',
                                      return_dict=True)['input_ids']
        new = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9,
                              do_sample=False)[0, ids.shape[1]:]
        want.append(tok.decode(new, skip_special_tokens=True))
        turns += [dict(role='assistant', content=want[-1]), dict(role='user', content=line)]
    said = spoken(run, monkeypatch, capsys, 'one two\na red square\n/reset\n\none two\n',
                  max_new_tokens=9)
    assert said.out == f'{want[0]}\n{want[1]}\n{want[0]}\n' and not said.err


def test_a_conversation_goes_on_after_what_can_not_be(run, monkeypatch, capsys):
    text = '/image a.png\n/nothing\n' + 'x ' * 300 + '\none two\n/quit\nx\n'
    said = spoken(run, monkeypatch, capsys, text, max_new_tokens=2)
    assert len(said.out.splitlines()) == 1
    assert ['no eyes' in said.err, '/nothing is unknown' in said.err,
            'reads and writes 200' in said.err] == [True] * 3


def test_ctrl_c_ends_a_conversation_well(run, monkeypatch, capsys):
    read, write = os.pipe()
    with os.fdopen(read) as stdin, os.fdopen(write, 'w'):
        monkeypatch.setattr(sys, 'stdin', stdin)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        asking.ask(run, options(chat=True))
    assert capsys.readouterr().out == '\n'


def test_what_may_still_change_is_not_printed():
    assert talk.settled('caf\ufffd', []) == 'caf'
    assert talk.settled('yes\n##', ['###']) == 'yes\n'
    assert talk.settled('yes', ['###']) == 'yes'
    assert answering.cut('a##b#', ['#b', '##']) == ('a', True)


# -------------------------------------------------------------------------------------------------
# the command


def test_the_command_takes_a_folder_and_what_the_folder_wants(folder, tmp_path):
    config = tmp_path / 'generation_config.json'
    for name in os.listdir(folder):
        (tmp_path / name).write_bytes(open(f'{folder}/{name}', 'rb').read())
    config.write_text(json.dumps(dict(do_sample=True, temperature=0.5, top_p=0.8,
                                      eos_token_id=[1, 7])))
    at = f'--model={tmp_path}'
    said = tiny.run('sample.py', at, '--device=cpu', '--prompt=one two', '--json=true').ok()
    assert f'{config}: temperature=0.5, top_k=50, top_p=0.8' in said.err
    assert asking.wanted_by(str(tmp_path), ['--temperature=0']) == ({}, '')
    assert answering.ends_of(SimpleNamespace(
        folder=str(tmp_path), processor=SimpleNamespace(end_id=5))) == {1, 5, 7}
    tiny.run('sample.py', at, '--out_dir=x').refused('--model', '--out_dir', 'one of them')
    tiny.run('sample.py', '--model=nowhere/at/all').refused('nowhere/at/all')
    tiny.run('sample.py', at, '--image=a.png').refused('--image', 'task=vlm')
