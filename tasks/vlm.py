"""A vision-language model: pictures and a question in, an answer out.

    python train.py config/vlm_emoji.py
    python sample.py --out_dir=out/vlm_emoji --image='a.png,pictures/*.png' [--prompt=...]
    python sample.py --out_dir=out/vlm_emoji --eval=mix,fluent-emoji-flat   (exact match, controls)

Axes: B rows, T tokens of a row, N pictures of a data set.
"""
import json
import os

import numpy as np
import torch

import data
import pictures
import shards
from answering import all_answers, answers, check_sampling, prompt_of
from asking import ask, logprobs_of, print_logprobs
from configurator import part
from generate import generate
from model import VLM, DecoderConfig, ViTConfig, VLMConfig, sized
from processor import LEARNED, SEEN, document, is_document, question
from tasks import body_of, llm, tower
from tasks.llm import arguments, check_text_loss  # noqa: F401
from usage import refuse_unused


class TrainSettings:
    """What train.py takes with task=vlm, beside its own settings."""
    vit = ViTConfig()
    decoder = DecoderConfig()
    pixel_shuffle = 1           # squares of so many patches a side become one image token
    connector_bias = True       # of the linear layer between vit and decoder
    prompt = ''                 # between a picture and its answer
    image_mean = 0.5            # subtracted from pixels of 0 to 1 (1.0: white is 0)
    image_std = 0.5             # and what they are then divided by
    image_draft = True          # JPEGs may be decoded at 1/2, 1/4 or 1/8, where that is at least
    #                             vit.image_size
    augment = False             # drawings change a little every time they are seen
    pack = False                # several samples share a row, each sees itself alone;
    #                             micro_batch_size then counts rows
    document_attention = True   # tokenized sets: attention stops at a document's end (False:
    #                             faster, less exact)
    label_smoothing = 0.0
    z_loss = 0.0                # weight of log(sum of exponentials)^2, which keeps logits small
    exact_match = True          # validation also generates, and counts answers that are right to
    #                             the letter


class SampleSettings(llm.SampleSettings):
    """What sample.py takes with a run of task=vlm: that of a language model, and pictures."""
    image = ''                  # pictures: paths, patterns and folders, separated by commas
    prompt = ''                 # text after the picture (empty: the run's own)
    eval = ''                   # data sets to measure, separated by commas; mix: all that the run
    #                             was trained on
    grid = ''                   # a PNG of the last one's pictures and answers (empty: in out_dir)


KEPT = 'pixel_shuffle', 'connector_bias'


def check(settings, world):
    """Raises ValueError for settings that can not be."""
    check_text_loss(settings)


def eyes(settings):
    return pictures.eyes_of(settings, settings['vit.image_size'])


def build(settings, tokenizer, load_weights=True):
    """The VLM of the settings. Raises ValueError."""
    config = config_of(settings, tokenizer)
    vit = tower('vit', config.vit, tokenizer, load_weights)
    decoder = tower('decoder', config.decoder, tokenizer, load_weights)
    return VLM(config, vit, decoder)


def config_of(settings, tokenizer):
    """The VLMConfig of the settings, which a policy and a VLA have, too."""
    decoder = sized(part(settings, 'decoder', DecoderConfig), tokenizer.vocab_size)
    return VLMConfig(part(settings, 'vit', ViTConfig), decoder, tokenizer.image_id,
                     settings['pixel_shuffle'], settings['connector_bias'])


def form(sample, p):
    """<image>..., bos, prefix, newline | suffix, eos: left of the bar seen by all (arXiv
    2407.07726)."""
    if is_document(sample):
        return document(sample, p)
    prefix, suffix = question(sample, p)
    pictures = [(picture, SEEN) for picture in sample['pictures']]
    return [*pictures, (p.tokenizer.bos_id, SEEN), (prefix + '\n', SEEN),
            (suffix, LEARNED), (p.tokenizer.eos_id, LEARNED)]


# -----------------------------------------------------------------------------------------------
# validation


def scorer(settings):
    return count_right if settings['exact_match'] else None


def count_right(run, batch, tensors):
    """How many rows are answered to the letter, from the picture and its question alone."""
    tok = run.tokenizer
    learned = (tensors['targets'] != -100).int()
    if not learned.any():
        return 0
    before = learned.cumsum(1) - learned == 0               # up to the first target
    prompts = torch.where(before, tensors['tokens'], tok.pad_id)
    blocks = tensors.get('blocks', torch.ones_like(prompts))        # as it was trained
    given = generate(run.model, prompts, tensors.get('pixels'), run.settings['seq_len'],
                     eos_id=run.processor.end_id, pad_id=tok.pad_id, blocks=blocks)
    texts = [tok.decode(ids).strip() for ids in given]
    return sum(answer == text for answer, text in zip(texts, batch['texts']))


# -----------------------------------------------------------------------------------------------
# use


def sample(run, options):
    """Say what is in --image, measure the data sets of --eval, or do as a language model."""
    check_sampling(options)
    alone = 'image', 'prompts', 'chat', 'raw', 'stop', 'logprobs'
    if options.eval:
        refuse_unused(vars(options), body_of(SampleSettings), alone,
                      f'--eval={options.eval} looks at the pictures of a data set')
        evaluate(run, options)
        return
    refuse_unused(vars(options), body_of(SampleSettings), ('grid',), 'it goes with --eval')
    is_chat = hasattr(run.processor, 'chat')
    if options.image:
        refuse_unused(vars(options), body_of(SampleSettings), ('prompts', 'chat', 'raw'),
                      f'--image={options.image} is one question')
        caption(run, options)
    elif options.chat or options.prompts or (options.prompt and is_chat):
        ask(run, options)
    else:
        raise ValueError(f'{options.out_dir} is a vision-language model: give --image=a.png or '
                         '--eval=<data set>')


def caption(run, options):
    """A line for each picture."""
    files, pixels = pictures.find(options.image), []
    for name in files:
        try:
            with open(name, 'rb') as f:
                pixels.append(run.processor.eyes.pixels(f.read()))
        except shards.BadSample as error:
            raise OSError(f'{name}: {error}') from None
    prompt = prompt_of(run.processor, options.prompt or None)
    given = all_answers(run, [prompt] * len(files), np.stack(pixels), options)
    for name, answer in zip(files, given):
        text = answer.text.strip()
        if options.json:
            said = dict(image=name, prompt=options.prompt or run.settings['prompt'], text=text)
            print(json.dumps(said | logprobs_of(run, answer, options)))
        elif len(files) == 1:
            print(text)
        else:
            print(f'{name}: {text}')
        print_logprobs(run, answer, options)


COLUMNS = 'exact match', 'blank picture', 'shuffled pictures', 'nearest pixels'


def evaluate(run, options):
    """A line of scores for each data set: exact match, beside what a model would get that does not
    look, and a nearest neighbour that only looks. The last one is drawn."""
    if not options.json:
        heads = '  '.join(f'{name:>17}' for name in COLUMNS)
        print(f'{"data set":26} {"pictures":>8}  {heads}')
    for name in options.eval.split(','):
        pixels, texts, sentences, prompts = read_sets(run, name, options)
        if options.prompt:
            prompts = [prompt_of(run.processor, options.prompt)] * len(texts)
        # an answer may be as long as the longest that is right, and its end
        longest = max(len(ids) for ids in sentences) - min(len(ids) for ids, _ in prompts)
        options.max_new_tokens = max(options.max_new_tokens, longest + 1)
        # every picture goes to another name
        shuffled = np.roll(pixels, len(pixels) // 2 + 1, 0)
        given = [[text.strip() for text in answers(run, prompts, x, options)]
                 for x in (pixels, np.full_like(pixels, 255), shuffled)]
        given.append(nearest_neighbour(run, pixels, options))
        scores = [share_right(row, texts) for row in given]
        if options.json:
            keys = [column.replace(' ', '_') for column in COLUMNS]
            print(json.dumps(dict(data=name, samples=len(texts)) | dict(zip(keys, scores))))
        else:
            row = '  '.join(f'{score:17.1%}' for score in scores)
            print(f'{name:26} {len(texts):8}  {row}', flush=True)
    path = options.grid or os.path.join(options.out_dir, 'captions.png')
    pictures.draw_answers(path, name, pixels, texts, given[0], scores[0])


def share_right(given, texts):
    return sum(answer == text for answer, text in zip(given, texts)) / len(texts)


def read_all(run, name, data_dir):
    """The pictures (uint8, on white), texts, and sentences (lists of token ids) of a data set; and
    its questions, (token ids, blocks) of each, up to the first token that is learned."""
    folder = shards.Folder(name, data_dir)
    batches = data.Batches([folder], data.InOrder(folder.sizes), run.processor)
    batch = batches[np.arange(len(folder))]
    if 'error' in batch or batch['bad']:
        raise OSError(batch.get('error') or batch['bad'][0])
    if len(batch.get('pixels', ())) != len(folder):
        raise ValueError(f'data set {name!r} has samples without a picture: there is nothing to '
                         'look at')
    lengths = [batch['tokens'].shape[1]] * len(folder)
    if 'segments' in batch:
        lengths = batch['segments'].sum(1)
    sentences = [ids[:length].tolist() for ids, length in zip(batch['tokens'], lengths)]

    # as validation asks: a question ends where the first token is learned
    questions, blocks = [], batch.get('blocks', np.ones_like(batch['tokens']))
    for ids, kinds, learned in zip(sentences, blocks, batch['targets'] != -100):
        end = int(learned.argmax()) + 1 if learned.any() else len(ids)
        questions.append((ids[:end], kinds[:end].tolist()))
    return batch['pixels'], batch['texts'], sentences, questions


def read_sets(run, name, options):
    """The same of a data set, or of all that the run was trained on: mix."""
    # validation may have given it another name
    name = run.settings['val'].get(name, name)
    places = [(name, options.data_dir or run.settings['data_dir'])]
    if name == 'mix':
        places = [(each, run.settings['data_dir']) for each in run.settings['mix']]
    try:
        sets = [read_all(run, each, folder) for each, folder in places]
    except FileNotFoundError as error:
        raise ValueError(error) from None
    pixels, *lists = zip(*sets)
    return np.concatenate(pixels), *(sum(each, []) for each in lists)


def nearest_neighbour(run, pixels, options, size=8):
    """For each picture the text of the nearest training picture, both averaged down to 8 x 8
    pixels."""
    def small(x):
        n, step = len(x), x.shape[1] // size
        x = x[:, :step * size, :step * size].astype(np.float32)
        return x.reshape(n, size, step, size, step, 3).mean((2, 4)).reshape(n, -1)

    known, names, *_ = read_sets(run, 'mix', options)
    theirs = small(known)
    # the square of the distance, less a constant of each picture
    distance = (theirs ** 2).sum(1) - 2 * small(pixels) @ theirs.T
    return [names[i] for i in distance.argmin(1)]
