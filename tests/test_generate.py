"""generate.py: with and without a cache, padding, ends of rows, and how it samples."""

import pytest
import torch
from test_model import IMAGE, PAD, TEXT, P, V, close, decoder, pad, pictures, vlm, words

from generate import generate, left_padded, sample
from model import KVCache


def reference(model, prompt, pixels, steps, eos_id=-1):
    """Greedy generation of one row by whole forward passes over prompt and answer, without padding
    or cache."""
    tokens, answer = list(prompt), []
    pictured = IMAGE in prompt
    for _ in range(steps):
        blocks = torch.tensor([[0 if pictured else 1] * len(prompt) + [1] * len(answer)])
        row = torch.tensor([tokens + answer])
        answer.append(model.logits(row, pixels, blocks=blocks)[0, -1].argmax().item())
        if answer[-1] == eos_id:
            return answer[:-1]
    return answer


def prompts(with_pictures):
    """Four prompts of unequal length, with 1, 0, 2 and 1 pictures; the pictures of each."""
    if not with_pictures:
        return [words(n, seed=n).tolist() for n in (6, 1, 3, 9)], [None] * 4
    row = [IMAGE] * P
    texts = [row + [10, 11], [12, 13, 14], row + [15] + row + [16, 17], row + [18, 19, 20, 21]]
    counts = [1, 0, 2, 1]
    return texts, [pictures(n, seed=9 + i) if n else None for i, n in enumerate(counts)]


def lively(seed=0, pictured=False, **settings):
    """A model whose greedy answers wander: fresh ones, being tied, say the same token for ever,
    whatever the mask, the positions or the cache. Attention is made sharp and strong; the image
    token is never the answer."""
    m = vlm(seed, **settings) if pictured else decoder(seed, **settings)
    d = getattr(m, 'decoder', m)
    with torch.no_grad():
        d.embedding.weight[IMAGE] = 0
        for b in d.blocks:
            b.q.weight *= 6
            b.o.weight *= 20
    return m


@pytest.mark.parametrize('pictured', [False, True])
@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('use_cache', [False, True])
def test_generation_equals_whole_forward_passes_row_by_row(pictured, side, use_cache):
    m = lively(pictured=pictured)
    texts, pixels = prompts(pictured)
    expected = [reference(m, text, p, 10) for text, p in zip(texts, pixels)]
    assert sum(len(set(row)) for row in expected) > 20
    assert len({tuple(row) for row in expected}) == 4, 'a lively model'
    given = torch.cat([p for p in pixels if p is not None]) if pictured else None
    tokens, _ = pad(texts, side, 13)
    assert generate(m, tokens, given, 10, pad_id=PAD, use_cache=use_cache) == expected
    for text, p, row in zip(texts, pixels, expected):
        assert generate(m, torch.tensor([text]), p, 10, pad_id=PAD, use_cache=use_cache) == [row]


@pytest.mark.parametrize('pictured', [False, True])
def test_sampling_with_a_cache_equals_sampling_without(pictured):
    m = lively(1, pictured)
    texts, pixels = prompts(pictured)
    given = torch.cat([p for p in pixels if p is not None]) if pictured else None
    settings = dict(max_new_tokens=20, temperature=1.3, top_k=30, top_p=0.95, pad_id=PAD, seed=4)
    tokens, wider = pad(texts, 'right')[0], pad(texts, 'left', 17)[0]
    out = generate(m, tokens, given, **settings)
    assert out == generate(m, tokens, given, use_cache=False, **settings)
    assert out == generate(m, wider, given, **settings), (
        'padding does not touch the random numbers')
    assert out == generate(m, tokens, given, **settings), 'the same again'
    assert out != generate(m, tokens, given, **settings | dict(seed=5))
    same_row = generate(m, torch.tensor([texts[1]] * 3), pixels[1], **settings)
    assert len({tuple(row) for row in same_row}) == 3, 'every row has random numbers of its own'
    alone = generate(m, torch.tensor([texts[0]]), pixels[0], **settings)
    assert alone == out[:1]


@pytest.mark.parametrize('use_cache', [False, True])
def test_generation_runs_under_autocast(use_cache):
    tokens, _ = pad(prompts(False)[0], 'left')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = generate(decoder(), tokens, max_new_tokens=6, pad_id=PAD, use_cache=use_cache)
    assert out == generate(decoder(), tokens, max_new_tokens=6, pad_id=PAD), (
        'not lively: no answer hangs by a hair')


def test_a_row_ends_before_its_end_token():
    m = lively()
    texts, _ = prompts(False)
    tokens, _ = pad(texts, 'left')
    free = [reference(m, text, None, 10) for text in texts]
    # one that ends rows at unequal times
    eos = next(t for row in free for t in row[2:] if t not in row[:2]
               and len({r.index(t) for r in free if t in r}) > 1 and any(t not in r for r in free))
    expected = [row[:row.index(eos)] if eos in row else row for row in free]
    assert len({len(row) for row in expected}) > 2
    for use_cache in (True, False):
        assert generate(m, tokens, max_new_tokens=10, eos_id=eos, pad_id=PAD,
                        use_cache=use_cache) == expected
    steps = []
    hook = m.norm.register_forward_hook(lambda *_: steps.append(1))
    both = [i for i, row in enumerate(free) if eos in row]
    ends = [free[i].index(eos) for i in both]
    assert len(set(ends)) > 1
    generate(m, tokens[both], max_new_tokens=10, eos_id=eos, pad_id=PAD)
    hook.remove()
    assert len(steps) == max(ends) + 1, 'it stops when the last row has ended'


def test_the_end_token_may_be_the_padding():
    m = lively()
    text = words(6, seed=6).tolist()
    free = reference(m, text, None, 10)
    end = free[4]
    tokens, _ = pad([text, [12, 13]], 'left', 8, end)
    expected = [reference(m, t, None, 10, end) for t in (text, [12, 13])]
    assert end not in text and len(expected[0]) <= 4
    assert generate(m, tokens, max_new_tokens=10, eos_id=end, pad_id=end) == expected


def test_a_pad_id_inside_a_prompt_is_a_token():
    m = lively()
    text = [10, PAD, 11, PAD, PAD, 12]
    expected = [reference(m, text, None, 8)]
    without = [reference(m, [10, 11, 12], None, 8)]
    assert expected != without
    for side in ('left', 'right'):
        assert generate(m, pad([text], side, 9)[0], max_new_tokens=8, pad_id=PAD) == expected


def test_left_padded_moves_padding_alone():
    tokens = torch.tensor([[0, 0, 7, 0, 8, 0], [7, 8, 9, 7, 8, 9], [0, 0, 0, 0, 0, 3],
                           [4, 0, 0, 0, 0, 0]])
    moved, segments, blocks = left_padded(tokens, 0, tokens)
    assert moved.tolist() == [[0, 0, 0, 7, 0, 8], [7, 8, 9, 7, 8, 9], [0, 0, 0, 0, 0, 3],
                              [0, 0, 0, 0, 0, 4]]
    assert segments.tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6, [0] * 5 + [1], [0] * 5 + [1]]
    assert torch.equal(blocks.where(segments > 0, 0), moved)


def test_an_empty_prompt_is_refused():
    m = decoder()
    for tokens in (torch.tensor([[10, 11], [PAD, PAD]]), torch.zeros(2, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match='empty'):
            generate(m, tokens, pad_id=PAD)


def test_generate_leaves_the_model_as_it_was():
    m, tokens = decoder(dropout=0.5).train(), words(2, 4)
    out = generate(m, tokens, max_new_tokens=8, pad_id=PAD)
    assert m.training and all(b.training for b in m.blocks)
    assert out == generate(m.eval(), tokens, max_new_tokens=8, pad_id=PAD)
    assert not m.training, 'no dropout meanwhile'
    assert generate(m, tokens, max_new_tokens=0, pad_id=PAD) == [[], []]
    m.train()
    with pytest.raises(ValueError, match='empty'):
        generate(m, torch.full((1, 3), PAD), pad_id=PAD)
    assert m.training, 'also after an error'


def test_generation_with_a_feature_layer():
    m = lively(feature_layer=1)
    tokens = words(2, 5)
    a, b = (generate(m, tokens, max_new_tokens=6, pad_id=PAD, use_cache=c) for c in (True, False))
    assert b == [reference(m, row, None, 6) for row in tokens.tolist()]
    assert a == b, 'the cache moves on'


def test_cache_returns_what_was_written():
    cache = KVCache(TEXT, 2, 6, 'cpu', torch.float32)
    k, v = torch.randn(2, 4, 2, 8), torch.randn(2, 4, 2, 8)
    for layer in range(3):
        out = cache.update(layer, k + layer, v - layer)
        close(out[0], k + layer, 0)
        close(out[1], v - layer, 0)
    cache.length = 4
    keys, values = cache.update(1, k[:, :1], v[:, :1])
    close(keys, torch.cat((k + 1, k[:, :1]), 1), 0)
    close(values, torch.cat((v - 1, v[:, :1]), 1), 0)


# -----------------------------------------------------------------------------------------------
# sampling


def draws(probs, n=4000, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    """How often each token comes, as shares."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.tensor(probs).log()[None].expand(n, -1) + 3.7
    return torch.bincount(sample(logits, temperature, top_k, top_p, [generator] * n),
                          minlength=len(probs)) / n


PROBS = [0.05, 0.4, 0.1, 0.25, 0.2]


def test_samples_come_as_often_as_they_should():
    close(draws(PROBS), torch.tensor(PROBS), 0.03)
    for temperature in (0.5, 2.0):
        warm = torch.tensor(PROBS) ** (1 / temperature)
        close(draws(PROBS, temperature=temperature), warm / warm.sum(), 0.03)
    assert (draws(PROBS) == draws(PROBS)).all() and (draws(PROBS) != draws(PROBS, seed=1)).any()


def test_top_k_keeps_the_k_likeliest():
    close(draws(PROBS, top_k=2), torch.tensor([0, 0.4, 0, 0.25, 0]) / 0.65, 0.03)
    close(draws(PROBS, top_k=100), torch.tensor(PROBS), 0.03)
    assert draws(PROBS, top_k=1).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize('top_p, kept',
                         [(0.0, [1]), (0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.64, [1, 3]),
                          (0.66, [1, 3, 4]), (0.84, [1, 3, 4]), (0.86, [1, 2, 3, 4]),
                          (0.96, [0, 1, 2, 3, 4]), (1.0, [0, 1, 2, 3, 4])])
def test_top_p_keeps_the_smallest_set_that_holds_it(top_p, kept):
    expected = torch.zeros(5)
    expected[kept] = torch.tensor(PROBS)[kept]
    close(draws(PROBS, 2000, top_p=top_p), expected / expected.sum(), 0.045)


def test_temperature_zero_and_top_k_one_are_greedy():
    torch.manual_seed(0)
    logits, generators = torch.randn(20, V), [torch.Generator() for _ in range(20)]
    greedy = sample(logits, 0.0, 0, 1.0, generators)
    assert (greedy == logits.argmax(-1)).all()
    assert (sample(logits, 1.7, 1, 1.0, generators) == greedy).all()
    m, tokens = lively(), words(3, 4)
    greedy = generate(m, tokens, max_new_tokens=8)
    assert generate(m, tokens, max_new_tokens=8, temperature=2.0, top_k=1) == greedy


def test_each_row_of_a_batch_is_cut_by_its_own_probabilities():
    logits = torch.tensor([PROBS, PROBS[::-1]]).log()
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    seen = torch.stack([sample(logits, 1.0, 0, 0.6, generators) for _ in range(200)])
    assert set(seen[:, 0].tolist()) == {1, 3} and set(seen[:, 1].tolist()) == {3, 1}
    seen = torch.stack([sample(logits, 1.0, 3, 1.0, generators) for _ in range(200)])
    assert set(seen[:, 0].tolist()) == {1, 3, 4} and set(seen[:, 1].tolist()) == {3, 1, 0}
