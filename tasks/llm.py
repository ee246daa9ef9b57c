"""A language model.

    python train.py config/llm_tiny.py
    python sample.py --out_dir=out/llm_tiny --prompt='Once upon a time'
"""
import math

from configurator import part
from model import Decoder, DecoderConfig, sized
from processor import text as form  # noqa: F401
from tasks import tower


class TrainSettings:
    """What train.py takes with task=llm, beside its own settings."""
    decoder = DecoderConfig()
    pack = False                # several samples share a row, each sees itself alone;
    #                             micro_batch_size then counts rows
    document_attention = True   # tokenized sets: attention stops at a document's end (False:
    #                             faster, less exact)
    label_smoothing = 0.0
    z_loss = 0.0                # weight of log(sum of exponentials)^2, which keeps logits small


class SampleSettings:
    """What sample.py takes with a run of task=llm."""
    prompt = ''                 # to be answered or continued; a list of them, or a .txt of lines
    prompts = ''                # or a .jsonl: a prompt, or messages, in each line
    out = ''                    # the .jsonl of its answers; those that are there stay
    raw = False                 # a chat model continues the prompt as it is
    chat = False                # a conversation in the terminal
    max_new_tokens = 32
    temperature = 0.0           # 0: the likeliest token
    top_k = 0                   # 0: all tokens
    top_p = 1.0                 # 1: all tokens
    min_p = 0.0                 # a token has at least this share of what the likeliest has
    repetition_penalty = 1.0    # above 1: what was said is less likely
    stop = ''                   # a text that ends an answer, or a list of them
    logprobs = False            # the log-probability of each token


def check(settings, world):
    """Raises ValueError for settings that can not be."""
    check_text_loss(settings)


def check_text_loss(settings):
    """The settings of the cross-entropy, which all tasks with words share."""
    if not 0 <= settings['label_smoothing'] < 1:
        raise ValueError(f'label_smoothing={settings["label_smoothing"]}: expected at least 0 and '
                         'below 1')
    if settings['z_loss'] < 0:
        raise ValueError(f'z_loss={settings["z_loss"]}: expected at least 0')


def build(settings, tokenizer, load_weights=True):
    """The Decoder of the settings. Raises ValueError."""
    config = sized(part(settings, 'decoder', DecoderConfig), tokenizer.vocab_size)
    return tower('decoder', config, tokenizer, load_weights) or Decoder(config)


def arguments(settings):
    """What forward gets in training alone."""
    return dict(label_smoothing=settings['label_smoothing'], z_loss=settings['z_loss'])


def summary(run, folder, batches, losses):
    """Bits per byte, where the data set knows how many bytes its tokens were made from."""
    if not folder.num_bytes:
        return {}
    return dict(bits_per_byte=losses['text'] / math.log(2) / folder.num_bytes)


# -----------------------------------------------------------------------------------------------
# use


def sample(run, options):
    """Continue or answer what is asked, or talk."""
    from asking import ask
    ask(run, options)
