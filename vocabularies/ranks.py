"""tiktoken's files of BPE ranks, one "base64 rank" a line (top of tokenizer.py)."""
import base64
import os
import re

import numpy as np

from tokenizer import END, char_spans

GPT2 = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
        r'|\s++$|\s+(?!\S)|\s')
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
          r'| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s')
# Capitals, and letters that are neither; marks such as accents.
UPPER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]'
# Small letters, and those that are neither.
LOWER = r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
O200K = '|'.join([
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r'\p{N}{1,3}', r' ?[^\s\p{L}\p{N}]+[\r\n/]*', r'\s*[\r\n]+', r'\s+(?!\S)', r'\s+'])

# A .tiktoken file's name begins so -> how text is split, least number of ranks of the real file,
# its special tokens. From tiktoken_ext/openai_public.py, whose functions would download the ranks.
ENCODINGS = {
    'gpt2': (GPT2, 50256, {END: 50256}),
    'r50k': (GPT2, 50256, {END: 50256}),
    'p50k': (GPT2, 50256, {END: 50256}),
    'cl100k': (CL100K, 100256, {END: 100257, '<|fim_prefix|>': 100258, '<|fim_middle|>': 100259,
                                '<|fim_suffix|>': 100260, '<|endofprompt|>': 100276}),
    'o200k': (O200K, 199998, {END: 199999, '<|endofprompt|>': 200018})}


class Tiktoken:
    """BPE ranks in tiktoken's text format; the file's name says how text is split: ENCODINGS."""

    def __init__(self, path):
        import tiktoken
        self.files = (path,)
        name = os.path.basename(path)
        # gpt2.tiktoken, or r50k_base.tiktoken
        beginning = re.match('|'.join(ENCODINGS), name)
        if not beginning:
            raise ValueError(f'tokenizer {path!r}: how text is split before it is encoded is '
                             f'known for files whose name begins with {", ".join(ENCODINGS)}')
        pattern, real_size, self.specials = ENCODINGS[beginning[0]]

        try:
            ranks = read_ranks(path)
            self.model = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        except (ValueError, OverflowError) as error:
            raise ValueError(f'tokenizer {path!r} is no list of "base64 rank" lines: '
                             f'{error}') from None

        # Not the real ranks but some made for a test, or extended: the real ids would not do.
        self.known = set(ranks.values())
        size = max(self.known) + 1
        if size < real_size or not self.known.isdisjoint(self.specials.values()):
            self.specials = {END: size}

        # GPT-2 begins and ends a document with the same token.
        self.eos_id = self.bos_id = self.specials[END]
        self.names = dict.fromkeys(('bos_token', 'eos_token'), END)
        self.pad_id = max(size, max(self.specials.values()) + 1)
        self.image_id, self.vocab_size = self.pad_id + 1, self.pad_id + 2

    def encode(self, text):
        # The library's split fails, not by an Exception, on runs of a million spaces.
        limit = 900_000
        if len(text) > limit:
            for run in re.finditer(r'\s+', text):
                if run.end() - run.start() > limit:
                    raise ValueError(f'a text has more than {limit} spaces or line ends in a row, '
                                     'which tiktoken cannot split')
        return self.model.encode_ordinary(text)

    def offsets(self, text):
        ids = self.encode(text)
        lengths = [len(self.model.decode_single_token_bytes(i)) for i in ids]
        return ids, *char_spans(text, np.array(lengths, int))

    def decode(self, ids):
        # The library raises for ids without a rank; a cut in the middle of a letter is no error.
        return self.model.decode([i for i in ids if i in self.known], errors='replace')

    def special(self, text):
        return self.specials.get(text)


def read_ranks(path):
    """{bytes: rank} of a .tiktoken file. Raises ValueError."""
    ranks, num_rows = {}, 0
    with open(path, 'rb') as f:
        for line in f:
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
                num_rows += 1

    # Without one of the bytes there are texts that could not be encoded.
    has_all_bytes = all(bytes([byte]) in ranks for byte in range(256))
    if len(set(ranks.values())) != num_rows or not has_all_bytes:
        raise ValueError('a rank comes twice, or one of the 256 bytes has none')
    return ranks
