"""Text to image: blocks beside diffusers', TextToImage's loss and samples, judging pictures."""
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock

from diffusion import DenoiserBlock, JointBlock, normal, random_keys
from images import judge
from images.dit import DiTConfig, TextToImage
from model import Decoder, DecoderConfig
from tasks import t2i

TEXT = DecoderConfig(vocab_size=32, width=16, depth=1, mlp_dim=32, num_heads=2, head_dim=8)
SMALL = DiTConfig(image_size=8, patch_size=4, width=32, depth=2, mlp_dim=48, num_heads=4, drop=0.3)
DDPM = dict(objective='ddpm', schedule_steps=50)
KINDS = (
    dict(),
    dict(attention='joint'),
    dict(DDPM, attention='joint', prediction='v_prediction', clip_range=1.0))


def model_of(seed=0, **settings):
    """A small model none of whose weights are zero."""
    torch.manual_seed(seed)
    model = TextToImage(replace(SMALL, **settings), Decoder(TEXT), empty=[1, 2])
    # gates and the output begin at zero, which would hide what is behind them
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def sentences(padding=0):
    """tokens and segments (4, 6 + padding) of sentences of 2 to 5 tokens."""
    tokens = torch.randint(3, 32, (4, 6), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(6 + padding)[None] < torch.tensor([[2], [5], [3], [4]])).long()
    return torch.nn.functional.pad(tokens, (0, padding), value=7), segments


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


KEYS = random_keys(0, torch.arange(4))
PICTURES = normal(random_keys(1, torch.arange(4)), (3, 8, 8)).clamp(-1, 1)
ALL = torch.arange(4)

# -------------------------------------------------------------------------------------------------
# blocks


def copy(ours, theirs):
    """Weights of linear layers that ours has in one and theirs in several."""
    with torch.no_grad():
        for name in ('weight', 'bias'):
            getattr(ours, name).copy_(torch.cat([getattr(m, name) for m in theirs]))


@pytest.mark.parametrize('ends', (False, True))
def test_joint_block_is_diffusers(ends):
    torch.manual_seed(0)
    theirs = JointTransformerBlock(32, 4, 8, context_pre_only=ends)
    ours, c = JointBlock(replace(SMALL, mlp_dim=128), ends), theirs.attn
    copy(ours.patches.modulate, [theirs.norm1.linear])
    copy(ours.patches.qkv, [c.to_q, c.to_k, c.to_v])

    # where the sentence ends, it has keys and values alone
    pairs = [(ours.patches, c.to_out[0], theirs.ff)]
    if ends:
        copy(ours.text.qkv, [c.add_k_proj, c.add_v_proj])
    else:
        copy(ours.text.qkv, [c.add_q_proj, c.add_k_proj, c.add_v_proj])
        pairs.append((ours.text, c.to_add_out, theirs.ff_context))
    for stream, o, ff in pairs:
        copy(stream.o, [o])
        copy(stream.fc1, [ff.net[0].proj])
        copy(stream.fc2, [ff.net[2]])
    copy(ours.text.modulate, [theirs.norm1_context.linear])

    # diffusers has the scale before the shift there
    if ends:
        with torch.no_grad():
            for p in ours.text.modulate.parameters():
                p.copy_(p.roll(32, 0))
    x, text, condition = torch.randn(2, 9, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    text_out, x_out = theirs(x, text, condition)
    x, text = ours(x, text, torch.nn.functional.silu(condition), None)
    close(x, x_out)
    if not ends:
        close(text, text_out)


def test_cross_block_is_diffusers():
    torch.manual_seed(0)
    theirs = BasicTransformerBlock(
        32, 4, 8, cross_attention_dim=24, activation_fn='gelu-approximate', attention_bias=True,
        num_embeds_ada_norm=10, norm_type='ada_norm_zero', norm_eps=1e-6).eval()
    ours = DenoiserBlock(replace(SMALL, mlp_dim=128), 24)
    a, b, mlp = theirs.attn1, theirs.attn2, theirs.ff.net
    copy(ours.modulate, [theirs.norm1.linear])
    copy(ours.qkv, [a.to_q, a.to_k, a.to_v])
    copy(ours.o, [a.to_out[0]])
    copy(ours.fc1, [mlp[0].proj])
    copy(ours.fc2, [mlp[2]])
    copy(ours.cross_q, [b.to_q])
    copy(ours.cross_kv, [b.to_k, b.to_v])
    copy(ours.cross_o, [b.to_out[0]])

    # theirs makes the condition itself, of a time and a class
    x, context = torch.randn(2, 9, 32), torch.randn(2, 5, 24)
    t, label = torch.tensor([3, 40]), torch.tensor([1, 7])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)[:, None]
    expected = theirs(x, encoder_hidden_states=context, encoder_attention_mask=mask, timestep=t,
                      class_labels=label)
    condition = torch.nn.functional.silu(theirs.norm1.emb(t, label))
    close(ours(x, condition, None, context, mask), expected)


# -------------------------------------------------------------------------------------------------
# loss


@pytest.mark.parametrize('settings', KINDS)
def test_loss_does_not_depend_on_batch_and_padding(settings):
    model, (tokens, segments) = model_of(**settings).train(), sentences()
    # the third row is a placeholder and has no picture
    given = dict(tokens=tokens, segments=segments, pixels=PICTURES[:3],
                 rows=torch.tensor([0, 1, 3]), keys=KEYS)
    whole, count = model.loss(**given)
    assert count == 3
    losses, counts, places = model(**given)['pictures']
    close(losses.sum(), whole)
    assert counts.tolist() == [1, 1, 1] and (places // tokens.shape[1]).tolist() == [0, 1, 3]

    # row by row, with padding
    padded, padded_segments = sentences(3)
    parts = []
    for i, picture in enumerate((PICTURES[:1], PICTURES[1:2], None, PICTURES[2:3])):
        row = slice(i, i + 1)
        rows = torch.arange(0 if picture is None else 1)
        parts.append(model.loss(tokens=padded[row], segments=padded_segments[row],
                                pixels=picture, rows=rows, keys=KEYS[row]))
        close(parts[i][0], losses[places // tokens.shape[1] == i].sum())
    close(sum(loss for loss, _ in parts), whole)
    assert sum(int(n) for _, n in parts) == 3

    # a rank without pictures
    parts[2][0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_every_parameter_learns():
    tokens, segments = sentences()
    for settings in KINDS:
        model = model_of(**settings).train()
        learned = model(tokens, segments, PICTURES, ALL, KEYS)['pictures']
        learned.losses.sum().backward()
        assert all(p.grad.any() for name, p in model.named_parameters() if 'k_proj' not in name)


def test_dropped_sentence_is_the_empty_one():
    (tokens, segments), model = sentences(), model_of(drop=0.999)
    empty, there = torch.tensor([[1, 2]]).expand(4, 2), torch.ones(4, 2, dtype=torch.long)
    given = dict(pixels=PICTURES, rows=ALL, keys=KEYS)
    dropped = model.train().loss(tokens=tokens, segments=segments, **given)[0]
    close(dropped, model.eval().loss(tokens=empty, segments=there, **given)[0])

    # not dropped in validation
    assert abs(dropped - model.loss(tokens=tokens, segments=segments, **given)[0]) > 1e-3


def test_learns_a_colour_from_a_word():
    torch.manual_seed(0)
    text = Decoder(replace(TEXT, depth=0))
    model = TextToImage(replace(SMALL, depth=1, drop=0.1), text, empty=[1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    # three words, three colours
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    for step in range(120):
        word = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(step))
        tokens = torch.stack((torch.ones_like(word), word + 3, torch.full_like(word, 2)), 1)
        picture = colours[word][:, :, None, None].expand(-1, -1, 8, 8)
        keys = random_keys(0, step * 64 + torch.arange(64))
        loss, count = model.loss(tokens=tokens, segments=torch.ones_like(tokens), pixels=picture,
                                 rows=torch.arange(64), keys=keys)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    # each is drawn four times
    tokens = torch.tensor([[1, 3 + i % 3, 2] for i in range(12)])
    keys = random_keys(5, torch.arange(12))
    drawn = model.sample(tokens, keys=keys, steps=20, guidance=2.0).mean((2, 3))
    close(drawn, colours.repeat(4, 1), 0.35)

    # any colour, whatever is said
    unsaid = model.sample(tokens, keys=keys, steps=20, guidance=0.0).mean((2, 3)).argmax(1)
    assert 2 <= len(set(unsaid.tolist()))
    assert not torch.equal(unsaid, torch.arange(12) % 3)


# -------------------------------------------------------------------------------------------------
# sampling


@pytest.mark.parametrize('settings', KINDS)
def test_sample_does_not_depend_on_batch_and_padding(settings):
    model, (tokens, segments) = model_of(**settings), sentences()
    padded, padded_segments = sentences(3)
    given = dict(steps=4, guidance=3.0, sampler='ddpm' if 'objective' in settings else 'heun')
    whole = model.sample(tokens, segments, KEYS, **given)
    rows = [slice(i, i + 1) for i in range(4)]
    each = [model.sample(padded[row], padded_segments[row], KEYS[row], **given) for row in rows]
    close(whole, torch.cat(each))

    # and it depends on the sentence
    others = model.sample(tokens.flip(0), segments.flip(0), KEYS, **given)
    assert (whole - others).abs().mean() > 1e-3


@pytest.mark.parametrize('settings', KINDS)
def test_guidance(settings):
    model, (tokens, segments) = model_of(**settings).eval(), sentences()
    empty = model.dropped(tokens, segments, torch.ones(4, dtype=torch.bool))
    noise = normal(KEYS, (3, 8, 8))
    given = dict(noise=noise, steps=3)
    told = model.sample(tokens, segments, guidance=1.0, **given)
    untold = model.sample(*empty, **given)
    close(model.sample(tokens, segments, guidance=0.0, **given), untold)
    # the same by way of both
    close(model.sample(tokens, segments, guidance=1 + 1e-6, **given), told)
    assert (told - untold).abs().mean() > 1e-3

    # one step by hand
    (t, t_next), = model.schedule.pairs(1)
    at = torch.full((4,), t)
    told = model.denoiser(noise, at, *model.encode(tokens, segments))
    untold = model.denoiser(noise, at, *model.encode(*empty))
    close(model.sample(tokens, segments, noise=noise, guidance=2.5, steps=1),
          model.schedule.step(untold + 2.5 * (told - untold), t, t_next, noise))


@pytest.mark.parametrize('settings', KINDS)
def test_begins_with_a_picture(settings):
    model, (tokens, segments) = model_of(**settings), sentences()

    def drawn(**given):
        return model.sample(tokens, segments, KEYS, steps=10, guidance=2.0, image=PICTURES,
                            **given)

    distances = [(drawn(strength=s) - PICTURES).abs().mean().item() for s in (0.1, 0.4, 1.0)]
    assert distances[0] < distances[1] < distances[2]
    # less than a step
    assert torch.equal(drawn(strength=0.05), PICTURES)
    # flow's first time has nothing of x
    if not settings:
        close(drawn(strength=1.0), model.sample(tokens, segments, KEYS, steps=10, guidance=2.0))

    # one half stays
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 4:] = True
    kept = drawn(strength=0.9, mask=mask)
    close(kept[..., :4], PICTURES[..., :4])
    assert (kept[..., 4:] - PICTURES[..., 4:]).abs().mean() > 0.05


def test_bad_settings():
    for settings, words in ((dict(patch_size=3), 'multiple of dit.patch_size'),
                            (dict(patch_size=0), 'dit.patch_size=0'),
                            (dict(channels=0), 'dit.channels=0'),
                            (dict(depth=0), 'dit.depth=0'),
                            (dict(width=36), 'dit.num_heads'),
                            (dict(attention='add'), 'cross or joint'),
                            (dict(drop=1.0), 'dit.drop'),
                            (dict(objective='gan'), 'flow or ddpm'),
                            (dict(time='never'), 'logit_normal')):
        with pytest.raises(ValueError, match=words):
            model_of(**settings)
    with pytest.raises(ValueError, match='sampler'):
        model_of().sample(*sentences(), KEYS, sampler='ddim')


# -------------------------------------------------------------------------------------------------
# judging


def test_judging(tmp_path):
    assert judge.token_f1('red apple', 'red apple') == 1 and judge.token_f1('', 'a') == 0
    assert judge.token_f1('red red heart', 'red apple') == pytest.approx(2 * 1 / 5)
    rng = np.random.default_rng(0)
    # of another deviation in one direction, of another mean in the next
    a = rng.standard_normal((20000, 3))
    b = rng.standard_normal((20000, 3)) * [2, 1, 1] + [0, 3, 0]
    assert judge.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert judge.frechet(a, b) == pytest.approx(3 ** 2 + (2 - 1) ** 2, rel=0.03)
    sheet = judge.side_by_side(np.zeros((5, 8, 8, 3), np.uint8), 3, size=8, gap=2)
    assert sheet.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    assert (sheet[12:, 22:] == 255).all() and not sheet[2:10, 2:10].any()


def test_text_is_any_module():
    """A text tower and a denoiser that are no Decoder and no DiT: what is conditioned on is what
    they give and get."""
    embedding, seen = torch.nn.Embedding(32, 5), []

    class Tower(torch.nn.Module):
        def forward(self, tokens, segments):
            return embedding(tokens)

    class Denoiser(torch.nn.Module):
        def forward(self, x, t, context, context_mask):
            seen.append((t, context, context_mask))
            return x

    model = TextToImage(replace(SMALL, **DDPM), Tower(), Denoiser(), empty=[1, 2])
    tokens, segments = sentences()
    model.eval()(tokens, segments, PICTURES, ALL, KEYS)
    (t, context, mask), = seen
    assert t.dtype == torch.long and t.max() < 50 and torch.equal(context, embedding(tokens))
    assert torch.equal(mask, segments > 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('settings', KINDS)
def test_on_a_gpu(settings):
    """Loss and pictures as on the CPU; bf16 is near, and every parameter has its gradient."""
    model, (tokens, segments) = model_of(**settings).train(), sentences()
    given = dict(tokens=tokens, segments=segments, pixels=PICTURES, rows=ALL, keys=KEYS)
    loss, _ = model.loss(**given)
    drawn = model.sample(tokens, segments, KEYS, steps=3, guidance=2.0)

    # the same there
    there = model.cuda()
    given = {key: value.cuda() for key, value in given.items()}
    close(there.loss(**given)[0].cpu(), loss, 1e-3)
    again = there.sample(given['tokens'], given['segments'], given['keys'], steps=3, guidance=2.0)
    close(again.cpu(), drawn, 1e-2)

    # and in bf16, nearly
    with torch.autocast('cuda', torch.bfloat16):
        rough, _ = there.loss(**given)
    rough.backward()
    assert abs(rough.item() - loss.item()) < 0.05 * loss.item()
    assert all(p.grad is not None for p in there.parameters())


def test_prompts_name_files_and_no_prompt_takes_anothers(tmp_path):
    def path_of(prompt, grid=''):
        options = SimpleNamespace(prompt=prompt, grid=grid, out_dir=str(tmp_path))
        path = t2i.path_of_grid(options)
        judge.save(path, np.zeros((4, 4, 3), np.uint8), dict(prompt=prompt))
        return path

    odd = ['../../etc/passwd', '/', '..', '', '.', '-rf', 'a/b\\c:d*e?"<>|', 'x' * 400, '龍' * 400,
           'a\nb', '~', 'con', '{a,b}', '\u202e', 'É']
    paths = [path_of(prompt) for prompt in odd]
    assert len({os.path.realpath(path) for path in paths}) == len(odd), 'each has its own'
    assert {os.path.dirname(path) for path in paths} == {f'{tmp_path}/samples'}
    assert [path_of(prompt) for prompt in odd] == paths, 'and keeps it'
    # the same words, or the same 60 characters
    alike = 'red apple', 'Red, apple!', 'y' * 61, 'y' * 62
    assert len({path_of(prompt) for prompt in alike}) == 4
    for grid in ('grid', 'grid.jpg', str(tmp_path), f'{tmp_path}/'):
        with pytest.raises(ValueError, match='grid=.*png'):
            path_of('a', grid)
