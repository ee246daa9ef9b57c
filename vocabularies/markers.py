"""Text in which markers become special tokens: what a chat template writes (chat.py)."""
import re
from functools import cache

from tokenizer import BREAK
from vocabularies.json_file import HuggingFace


@cache
def any_of(texts):
    """A pattern that finds any of the texts, the longest first."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    # Of no texts it finds nothing, where an empty pattern would find everything.
    return re.compile('|'.join(map(re.escape, longest_first)) or '(?!)')


def mark_up(tokenizer, text, markers):
    """Text in which `markers` ({text: id}) become tokens -> (ids, begins, ends), where in the text
    each comes from. What BREAK stands in is no marker."""
    # A tokenizer.json's own markers are left to the tokenizers library, so that ids are those
    # that transformers gives for the whole text.
    if isinstance(tokenizer, HuggingFace) and tokenizer.specials:
        foreign = {t: i for t, i in markers.items() if t not in tokenizer.specials}
        cuts = any_of(tuple(foreign))
        rows = mark_up_between(text, foreign, cuts, lambda part: tokenizer.offsets(part, True))

        # A tokenizer that changes text first may make a special token of what did not look like
        # one: then not like this.
        known = set(markers.values())
        count = sum(i in known for i in rows[0])
        if count == len(any_of(tuple(markers)).findall(text)):
            return rows

    cuts = any_of((*markers, BREAK))
    return mark_up_between(text, markers, cuts, tokenizer.offsets)


def mark_up_between(text, markers, cuts, offsets):
    """`mark_up`, where text between `cuts` (a pattern) is encoded piece by piece, by `offsets`."""
    ids, begins, ends, at = [], [], [], 0
    for part in re.split(f'({cuts.pattern})', text):
        if part in markers:
            ids.append(markers[part])
            begins.append(at)
            ends.append(at + len(part))
        elif part not in ('', BREAK):
            for i, begin, end in zip(*offsets(part)):
                ids.append(i)
                begins.append(at + begin)
                ends.append(at + end)
        at += len(part)
    return ids, begins, ends
