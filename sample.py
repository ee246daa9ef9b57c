"""Use a trained run: caption pictures, continue text, draw pictures, or measure a data set; let a policy act.

    python sample.py --out_dir=out/vlm_emoji --image=a.png [--prompt=...] [--json=true]
    python sample.py --out_dir=out/vlm_emoji --image='pictures/*.png,other.jpg'         (many at once; a folder, too)
    python sample.py --out_dir=out/vlm_emoji --eval=mix,fluent-emoji-flat               (exact match, controls, a grid)
    python sample.py --out_dir=out/llm --prompt='Once upon'
    python sample.py --out_dir=out/t2i_emoji --prompt='noto: red apple' --n=16          (PNGs in out_dir/samples)
    python sample.py --out_dir=out/t2i_emoji --prompt=... --image=a.png --strength=0.6 [--mask=white_is_new.png]
    python sample.py --out_dir=<a folder of diffusers> --prompt='a red apple' --guidance=7.5 --n=4 (Stable Diffusion)
    python sample.py --out_dir=out/t2i_emoji --eval=mix,heldout --judge=out/vlm_judge
                                                        (what a captioner reads in its pictures, and in the real ones)
    python sample.py --out_dir=out/policy_metaworld_state --env=metaworld --episodes=20  (success, and controls)
    python sample.py --out_dir=out/policy_metaworld_state --serve_policy=8000           (for robots, see serve.py)
"""
import glob
import os
import sys
from json import dumps, load, loads

import numpy as np
import torch

import checkpoint as checkpoints
import data
import judge as judging
import processor as processors
import shards
from configurator import configure
from model import generate

out_dir = 'out/vlm_emoji'       # a run
checkpoint = 'latest'           # one of its checkpoints
ema = True                      # the moving average of the weights, where the run kept one
image = ''                      # pictures: paths, patterns and folders, separated by commas
prompt = ''                     # text after the picture, or to be continued (empty: the run's own)
json = False                    # one JSON object a line instead of text
eval = ''                       # data sets to measure, separated by commas; mix: all that the run was trained on
grid = ''                       # a PNG of the last one's pictures and answers, or of what was drawn (empty: in out_dir)
max_new_tokens = 32
temperature = 0.0               # 0: the likeliest token
top_k = 0                       # 0: all tokens
top_p = 1.0                     # 1: all tokens
seed = 0
n = 16                          # pictures to draw
guidance = 4.0                  # to draw: above 1 exaggerates what the sentence changes, 1 as learned, 0 without it
steps = 50                      # to draw
strength = 0.6                  # to draw from an --image: how much of it becomes noise first, above 0, 1 all
mask = ''                       # to draw from an --image: a picture that is white where that is drawn anew
judge = ''                      # with --eval: the run of a captioner that reads what was drawn
batch_size = 64                 # rows at once
env = ''                        # metaworld | pusht: let a policy act there
tasks = ''                      # of MetaWorld, separated by commas (empty: all eight)
episodes = 20                   # a task; their goals are in no demonstration
execute = 8                     # actions done of a chunk before the policy looks again
sample_steps = 10               # of denoising
sampler = ''                    # euler | heun | ddim | ddpm (empty: the first that fits)
held_out = False                # say the task in words that no demonstration has
controls = True                 # also measure the expert, a replayed demonstration, random, zero, and a wrong sentence
film = ''                       # films of the first episode of each task: a.gif or a.mp4 becomes a_<task>.gif or .mp4
record = ''                     # a folder: the policy's episodes as a data set of shards
processes = 2                   # that step environments
serve_policy = 0                # a port: answer robots there, see serve.py
serve_host = '127.0.0.1'        # who may ask: this machine (0.0.0.0: all that reach it)
data_dir = ''                   # where --eval looks for its data set (empty: the run's own)
device = 'auto'                 # auto: cuda if there is one, else cpu
configure(globals())


def fail(message, code=2):
    print(f'sample.py: {message}', file=sys.stderr)
    sys.exit(code)


if batch_size < 1 or max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
    fail(f'batch_size={batch_size} and max_new_tokens={max_new_tokens} must be at least 1, temperature={temperature} '
         f'and top_k={top_k} at least 0, top_p={top_p} above 0 and at most 1')
if min(n, steps) < 1 or guidance < 0 or not 0 < strength <= 1 or mask and not image:
    fail(f'n={n} and steps={steps} must be at least 1, guidance={guidance} at least 0, strength={strength} above 0 and '
         f'at most 1; mask={mask!r} goes with --image')
if device == 'auto':
    device = 'cuda' if torch.cuda.is_available() else 'cpu'

# ----------------------------------------------------------------------------------------------------------------------
# the run: its settings, tokenizer and weights


def is_diffusers(path):
    """Is it a folder of diffusers, with Stable Diffusion?"""
    return os.path.isfile(os.path.join(path, 'unet', 'config.json'))


def load_run(folder, *, of='--out_dir and --checkpoint'):
    """(settings, tokenizer, model, processor) of a run or a checkpoint."""
    try:
        if is_diffusers(folder):
            from families import diffusers as hub_sd
            run, tok, model = hub_sd.load_run(folder)
        else:
            run, tok, model = checkpoints.load_run(folder, ema)
        if run['task'] == 't2i':
            model.to(memory_format=torch.channels_last)         # convolutions are faster so
        return run, tok, model.to(device), processors.build(run, tok, checkpoints.image_tokens(model))
    except (ValueError, OSError) as error:
        fail(f'{error}: train first, or give {of}')


ours = run, tok, model, processor = load_run(
    out_dir if is_diffusers(out_dir) else os.path.join(out_dir, 'checkpoints', checkpoint))
if run['task'] == 'siglip':
    fail(f'{out_dir} is a vision tower (task=siglip), it has no words: give the run of a vlm or llm')


def answers(prefixes, pixels, by=ours):
    """Texts that continue lists of token ids; pixels uint8 (I, H, W, 3) or None, one for each row."""
    out, (run, tok, model, processor) = [], by
    for a in range(0, len(prefixes), batch_size):
        rows = prefixes[a:a + batch_size]
        tokens = torch.full((len(rows), max(map(len, rows))), tok.pad_id, device=device)
        for i, row in enumerate(rows):
            tokens[i, len(tokens[i]) - len(row):] = torch.tensor(row)
        pictures = None if pixels is None else processors.to_pixels(
            pixels[a:a + batch_size], device, processor.mean, processor.std)
        texts = [tok.decode(ids) for ids in generate(model, tokens, pictures, max_new_tokens, temperature, top_k, top_p,
                                                     processor.end_id, tok.pad_id, seed + a)]
        out += [text.strip() for text in texts] if run['task'] == 'vlm' else texts
    return out


# ----------------------------------------------------------------------------------------------------------------------
# pictures or text in, text out


def find_images(names):
    """The files that a list of paths, patterns and folders, separated by commas, stands for."""
    endings = ('.png', '.jpg', '.jpeg', '.webp')
    files = []
    for name in names.split(','):
        pattern = os.path.join(name, '*') if os.path.isdir(name) else name
        found = [name] if os.path.isfile(name) else sorted(f for f in glob.glob(pattern) if f.lower().endswith(endings))
        if not found:
            fail(f'--image={name!r}: no such picture, pattern that matches, or folder with {", ".join(endings)}')
        files += found
    return files


def main():
    if run['task'] == 't2i':
        return draw_prompt()
    if image:
        if run['task'] != 'vlm':
            fail(f'--image: {out_dir} is task={run["task"]}, which has no eyes')
        files, pixels = find_images(image), []
        for name in files:
            try:
                with open(name, 'rb') as f:
                    pixels.append(processor.pixels(f.read()))
            except (OSError, shards.BadSample) as error:
                fail(f'{name}: {error}', 1)
        texts = answers([processor.prefix(prompt or None)] * len(files), np.stack(pixels))
        for name, text in zip(files, texts):
            print(dumps({'image': name, 'prompt': prompt or run['prompt'], 'text': text}) if json else
                  text if len(files) == 1 else f'{name}: {text}')
    elif run['task'] == 'llm':
        text, = answers([[tok.bos_id] + tok.encode(prompt)], None)
        print(dumps({'prompt': prompt, 'text': text}) if json else prompt + text)
    else:
        fail(f'{out_dir} is a vision-language model: give --image=a.png or --eval=<data set>')


# ----------------------------------------------------------------------------------------------------------------------
# exact match on a data set, beside what a model would get that does not look, and a nearest neighbour that only looks


def read_all(name, where):
    """The pictures (uint8, on white), texts and sentences (lists of token ids) of a data set."""
    folder = shards.Folder(name, where)
    rows = data.Batches([folder], data.InOrder(folder.sizes), processor)[np.arange(len(folder))]
    if 'error' in rows or rows['bad']:
        fail(rows.get('error') or rows['bad'][0], 1)
    if len(rows.get('pixels', ())) != len(folder):
        fail(f'data set {name!r} has samples without a picture: there is nothing to look at', 2)
    lengths = rows['segments'].sum(1) if 'segments' in rows else [rows['tokens'].shape[1]] * len(folder)
    return rows['pixels'], rows['texts'], [ids[:k].tolist() for ids, k in zip(rows['tokens'], lengths)]


def read_sets(name):
    """The same of a data set, or of all that the run was trained on: mix."""
    try:
        parts = ([read_all(n, run['data_dir']) for n in run['mix']] if name == 'mix' else
                 [read_all(name, data_dir or run['data_dir'])])
    except (OSError, ValueError) as error:
        fail(error)
    pixels, *lists = zip(*parts)
    return np.concatenate(pixels), *(sum(part, []) for part in lists)


def nearest_neighbour(pixels, size=8):
    """For each picture the text of the nearest training picture, both averaged down to 8 x 8 pixels."""
    def small(x):
        n, s = len(x), x.shape[1] // size
        return x[:, :s * size, :s * size].astype(np.float32).reshape(n, size, s, size, s, 3).mean((2, 4)).reshape(n, -1)

    known, names, _ = read_sets('mix')
    theirs = small(known)
    distance = (theirs ** 2).sum(1) - 2 * small(pixels) @ theirs.T              # + a constant of each picture
    return [names[i] for i in distance.argmin(1)]


def evaluate():
    """A line of scores for each data set; the last one is drawn."""
    if run['task'] != 'vlm':
        fail(f'--eval={eval}: {out_dir} is task={run["task"]}, which has no eyes')
    columns = ('exact match', 'blank picture', 'shuffled pictures', 'nearest pixels')
    if not json:
        print(f'{"data set":26} {"pictures":>8}  ' + '  '.join(f'{c:>17}' for c in columns))
    for name in eval.split(','):
        pixels, texts, _ = read_sets(name)
        neighbours = nearest_neighbour(pixels)
        prefixes = [processor.prefix(prompt or None)] * len(texts)
        shuffled = np.roll(pixels, len(pixels) // 2 + 1, 0)                     # every picture goes to another name
        given = answers(prefixes, pixels)
        rows = (given, answers(prefixes, np.full_like(pixels, 255)), answers(prefixes, shuffled), neighbours)
        scores = [sum(a == t for a, t in zip(row, texts)) / len(texts) for row in rows]
        if json:
            print(dumps({'data': name, 'samples': len(texts)} |
                        dict(zip((c.replace(' ', '_') for c in columns), scores))))
        else:
            print(f'{name:26} {len(texts):8}  ' + '  '.join(f'{s:17.1%}' for s in scores), flush=True)
    judging.draw(grid or os.path.join(out_dir, 'captions.png'), name, pixels, texts, given, scores[0])


# ----------------------------------------------------------------------------------------------------------------------
# text to image


def paint(sentences, image=None, mask=None):
    """Pictures uint8 (N, H, W, 3) of lists of token ids; what the i-th gets is by (seed, i), whatever the batch."""
    import diffusion
    out = []
    for a in range(0, len(sentences), batch_size):
        rows = sentences[a:a + batch_size]
        tokens = torch.full((len(rows), max(*map(len, rows), len(model.empty))), tok.pad_id)
        for i, row in enumerate(rows):
            tokens[i, :len(row)] = torch.tensor(row)
        segments = (torch.arange(tokens.shape[1])[None] < torch.tensor([[len(row)] for row in rows])).long()
        keys = diffusion.random_keys(seed, torch.arange(a, a + len(rows)))
        start = None if image is None else image.expand(len(rows), -1, -1, -1)
        try:
            x = model.sample(tokens.to(device), segments.to(device), keys.to(device), steps=steps, sampler=sampler,
                             guidance=guidance, image=start, strength=strength, mask=mask)
        except ValueError as error:
            fail(error)
        x = x * processors.as_tensor(processor.std).to(x).view(-1, 1, 1)
        x = (x + processors.as_tensor(processor.mean).to(x).view(-1, 1, 1)).clamp(0, 1)
        out.append((255 * x).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(out)


def draw_prompt():
    """n pictures of the prompt, each a PNG with its settings inside, and one of them all."""
    from PIL import Image
    start = new = None
    try:
        if image:
            name, *others = find_images(image)
            if others:
                fail(f'--image={image}: {len(others) + 1} pictures, expected one to begin with')
            with open(name, 'rb') as f:
                start = processors.to_pixels(processor.pixels(f.read())[None], device, processor.mean, processor.std)
        if mask:
            new = Image.open(mask).convert('L').resize((model.config.image_size,) * 2, Image.Resampling.NEAREST)
            new = torch.tensor(np.array(new) > 127, device=device)[None, None]
    except (OSError, shards.BadSample) as error:
        fail(f'--image={image} --mask={mask}: {error}', 1)
    pictures = paint([processor.prefix(prompt)] * n, start, new)
    words = ''.join(c if c.isalnum() else '-' for c in prompt.lower())[:60] or 'no-sentence'
    path = grid or os.path.join(out_dir, 'samples', '-'.join(w for w in words.split('-') if w) + '.png')
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    settings = dict(prompt=prompt, seed=seed, guidance=guidance, steps=steps, sampler=sampler or 'default',
                    run=out_dir, checkpoint=os.path.basename(os.path.realpath(run['folder'])), ema=ema)
    settings |= dict(image=image, strength=strength, mask=mask) if image else {}
    for i, picture in enumerate(pictures):
        judging.save(f'{os.path.splitext(path)[0]}_{i:03}.png', picture, settings | dict(index=i))
    judging.save(path, judging.side_by_side(pictures), settings | dict(n=n))
    print(dumps(settings | dict(grid=path)) if json else path)


@torch.no_grad()
def judge_pictures():
    """What a captioner reads in pictures drawn from the sentences of a data set, beside what it reads in the real ones:
    the name to the letter, the words of it, another name of the set (which must not be read), and the Fréchet distance
    to the real ones in what its decoder sees of a picture (of the real ones: of one half to the other)."""
    if not judge:
        fail(f'--eval={eval}: {out_dir} draws pictures: give --judge=<the run of a captioner>')
    by = load_run(judge, of='--judge')
    if by[0]['task'] != 'vlm':
        fail(f'--judge={judge} is task={by[0]["task"]}: expected a captioner, task=vlm')
    _, _, captioner, reader = by

    def features(pictures):
        parts = np.array_split(judging.resized(pictures, reader.image_size), -(-len(pictures) // batch_size))
        return np.concatenate([captioner.patches(processors.to_pixels(part, device, reader.mean, reader.std)).mean(1)
                               .cpu().numpy() for part in parts])

    if not json:
        print(f'{"data set":14} {"pictures":>20}  {"exact match":>11}  {"words (F1)":>10}  {"another name":>12}  '
              f'{"Fréchet":>8}')
    for name in eval.split(','):
        real, texts, sentences = read_sets(name)
        drawn, names = paint(sentences), sorted(set(texts))
        others = [names[names.index(text) - len(names) // 2] for text in texts]
        far = features(real)
        for kind, pictures, apart in (('drawn', drawn, (features(drawn), far)), ('real', real, (far[::2], far[1::2]))):
            given = answers([reader.prefix()] * len(texts), judging.resized(pictures, reader.image_size), by)
            row = dict(exact_match=np.mean([a == t for a, t in zip(given, texts)]),
                       token_f1=np.mean([judging.token_f1(a, t) for a, t in zip(given, texts)]),
                       another_name=np.mean([a == t for a, t in zip(given, others)]), frechet=judging.frechet(*apart))
            print(dumps(dict(data=name, pictures=kind, samples=len(texts)) | row) if json else
                  f'{name:14} {len(texts):14} {kind:>5}  {row["exact_match"]:11.1%}  {row["token_f1"]:10.1%}  '
                  f'{row["another_name"]:12.1%}  {row["frechet"]:8.2f}', flush=True)
            if kind == 'drawn':
                seen, score = given, row['exact_match']
    pairs = np.concatenate((real, drawn), 2)
    judging.draw(grid or os.path.join(out_dir, 'judged.png'), f'{name}, real and drawn', pairs, texts, seen, score)


# ----------------------------------------------------------------------------------------------------------------------
# robots

FILM_SIZE = 192         # of the pictures, where the policy needs none


def statistics():
    """stats.json of the run: its actions and states have so many numbers as these."""
    with open(os.path.join(run['folder'], 'stats.json'), encoding='utf-8') as f:
        return load(f)


def is_told():
    """Does the policy read a sentence?"""
    return run['task'] == 'vla' or run['policy.encoder'] != 'none'


def policy_of(words=None, blank=False, action_dim=0):
    """A function of observations, as envs.rollouts takes it. words: task -> the sentence it is told; blank: it sees
    white pictures; action_dim: of a robot with fewer numbers than the run's largest."""
    import actions
    import diffusion
    stats = statistics()
    units = actions.Units(stats, run['normalize'], run['action_steps'], run['action_dim'], run['proprio_dim'])
    action_dim = action_dim or len(stats['actions']['mean'])

    def act(seen):
        sentences = [words(o['task']) if words else o['instruction'] for o in seen]
        pictures = [[o['pictures'][name] for name in run['cameras'] or sorted(o['pictures'])]
                    if processor.image_tokens else [] for o in seen]
        rows = [processor.prefix(text, len(p)) for text, p in zip(sentences, pictures)]
        tokens = torch.full((len(rows), max(map(len, rows))), tok.pad_id)
        for i, row in enumerate(rows):
            tokens[i, :len(row)] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in rows])
        pixels = np.stack([p for group in pictures for p in group]) if any(pictures) else None
        pixels = None if pixels is None else processors.to_pixels(
            np.full_like(pixels, 255) if blank else pixels, device, processor.mean, processor.std)
        proprio = torch.tensor(np.stack([o['proprio'] for o in seen]))
        real = torch.arange(run['proprio_dim']).expand(len(seen), -1) < proprio.shape[1]
        proprio = torch.nn.functional.pad(proprio, (0, run['proprio_dim'] - proprio.shape[1]))
        positions = torch.tensor([o['seed'] * 4096 + o['step'] for o in seen])
        low = units.encode(dict(proprio=proprio, proprio_mask=real))
        low |= dict(keys=diffusion.random_keys(seed, positions),
                    action_mask=torch.arange(run['action_dim']).expand(len(seen), -1) < action_dim)
        low = {k: v.to(device) for k, v in low.items()}
        given = model.sample(tokens.to(device), pixels, torch.zeros_like(tokens).to(device),
                             (torch.arange(tokens.shape[1])[None] < lengths[:, None]).long().to(device), low,
                             steps=sample_steps, **({'sampler': sampler} if sampler else {}))
        return units.decode(given.cpu(), proprio)[..., :action_dim].numpy()
    return act


def demonstrations(names):
    """{task: actions (T, A)} of one demonstration each, in the run's data sets; nothing of those that have none."""
    found, whole = {}, False
    for folder in (shards.Folder(name, data_dir or run['data_dir']) for name in run['mix']):
        for shard, size in enumerate(folder.sizes):
            i = 0
            while i < size and not (whole and set(names) <= set(found)):
                members = folder.read(shard, i)
                meta, low = loads(members['json']), processors.fields(members, False, True).get('lowdim')
                task, whole = meta.get('task'), 'lowdim.npy' in members     # an episode from here on, or one step of it
                if low is None or not whole and meta.get('frame', 0) < len(found.get(task, ())):
                    break               # the next episode; a shard of steps has one task
                if whole:
                    found.setdefault(task, low['actions'])
                else:
                    found.setdefault(task, []).append(low['actions'][0])
                i += len(low['actions']) if whole else 1
    return {task: found[task] for task in names if task in found}


def act_out():
    """A table of successes: a row a task, the policy beside its controls; 95 % intervals by Wilson."""
    import envs
    robot, known = (envs.MetaWorld, list(envs.TASKS)) if env == 'metaworld' else (envs.PushT, ['pusht'])
    names = [t for t in tasks.split(',') if t] or known
    for task in set(names) - set(known):
        fail(f'--tasks={tasks}: {task!r} is none of {", ".join(known)}')
    stats, blind = statistics(), not processor.image_tokens
    own = [len(stats[key]['mean']) for key in ('actions', 'proprio')]
    proprio_dim = robot.hand_dim if env == 'metaworld' and not blind else robot.proprio_dim
    if own[0] < robot.action_dim or own[1] < proprio_dim:
        fail(f'--env={env}: actions of {robot.action_dim} and states of {proprio_dim} numbers, {out_dir} was trained '
             f'on {own[0]} and {own[1]}')
    size = run['vit.image_size'] if processor.image_tokens else FILM_SIZE if film else 0
    chosen = [(task, envs.TEST_SEED + i) for task in names for i in range(episodes)]
    wrong = dict(zip(names, names[1:] + names[:1]))
    words = (lambda task: envs.instruction(task, 0, True)) if held_out else None
    rows = {'policy': policy_of(words, action_dim=robot.action_dim)}
    if controls and env == 'metaworld':
        shown = demonstrations(names)
        rows |= {'expert': envs.expert, 'random': envs.random_policy([-1] * 4, [1] * 4, execute),
                 'zero': envs.zero(4, execute)}
        rows |= {'replay': envs.replay(shown, execute)} if set(shown) == set(names) else {}
        if len(names) > 1 and is_told():
            rows |= {'wrong words': policy_of(lambda task: envs.instruction(wrong[task]), action_dim=4)}
        rows |= {'blank picture': policy_of(blank=True, action_dim=4)} if processor.image_tokens else {}
    firsts = chosen[::episodes]
    for label, policy in rows.items():
        ours, won = label == 'policy', dict.fromkeys(names, 0)
        sink = envs.Recorder(record, run['action_steps']) if record and ours else None
        show = chosen if sink and not blind else firsts if film and ours else ()
        for _, result in envs.rollouts(chosen, policy, 1 if label == 'expert' else execute,
                                       parallel=min(batch_size, 16),        # with pictures, 60 MB each
                                       make=lambda task: envs.make(task, size, run['cameras'] or ('near',), 0, blind),
                                       processes=processes, keep=chosen if sink else (), show=show, blind=blind):
            task = result['task']
            won[task] += result['success']
            if film and ours and (task, result['seed']) in firsts:
                print(f'film of {task}: {envs.write_film(film, task, result["pictures"], robot.fps)}', file=sys.stderr)
            if sink:
                sink.write(result | (dict(instruction=words(task)) if words else {}), robot.fps, not blind)
        if sink:
            print(f'{record}: {sink.close()} steps recorded', file=sys.stderr)
        share, (low, high) = sum(won.values()) / len(chosen), envs.wilson(sum(won.values()), len(chosen))
        print(dumps(dict(policy=label, success=share, low=low, high=high, episodes=episodes, tasks=won)) if json else
              f'{label:14} {share:6.1%} [{low:.1%}, {high:.1%}] of {len(chosen)}: ' +
              ', '.join(f'{task} {n}' for task, n in won.items()), flush=True)


def answer_robots():
    """A server, until SIGTERM or Ctrl-C; see serve.py."""
    import signal

    import serve
    stats, side = statistics(), run['vit.image_size']
    cameras = (run['cameras'] or ['image']) if processor.image_tokens else []
    fields = dict(proprio=('float32', (len(stats['proprio']['mean']),), False), instruction=('str', (), not is_told()),
                  **{name: ('uint8', (side, side, 3), False) for name in cameras}, seed=('int64', (), True),
                  step=('int64', (), True))
    act = policy_of()
    server = serve.Server(lambda seen: act([o | dict(pictures={name: o[name] for name in cameras}) for o in seen]),
                          fields, serve_policy, serve_host, batch_size)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.end)
    server.run()


if serve_policy:
    if run['task'] not in ('policy', 'vla') or not 0 < serve_policy < 65536:
        fail(f'--serve_policy={serve_policy}: expected a port from 1 to 65535, and a policy; {out_dir} is '
             f'task={run["task"]}')
    try:
        answer_robots()
    except OSError as error:
        fail(f'--serve_policy={serve_policy}: {error}', 1)
    except ValueError as error:
        fail(f'--serve_policy={serve_policy}: {error}')
elif env:
    if run['task'] not in ('policy', 'vla') or env not in ('metaworld', 'pusht'):
        fail(f'--env={env}: {out_dir} is task={run["task"]}; policies act in metaworld or pusht')
    try:
        act_out()
    except (OSError, ValueError, ImportError) as error:
        fail(f'--env={env}: {error}')
elif run['task'] in ('policy', 'vla') and not (image or eval or prompt):
    fail(f'{out_dir} is task={run["task"]}: give --env=metaworld or --serve_policy=8000')
elif eval and run['task'] == 't2i':
    judge_pictures()
elif eval:
    evaluate()
else:
    main()
