"""CLIP's tokenizer (arXiv 2103.00020)."""
import os

from tokenizer import END


def open_merges(path):
    """The tokenizers.Tokenizer of a merges.txt and the vocab.json beside it, as transformers
    has it. Raises ValueError."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    words = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
             r'|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+')

    # A word's last letter is another than the same inside it. The library raises nothing narrower
    # than Exception.
    vocab = os.path.join(os.path.dirname(path), 'vocab.json')
    try:
        bpe = models.BPE.from_file(vocab, path, unk_token=END, end_of_word_suffix='</w>')
    except Exception as error:
        raise ValueError(f'tokenizer {path!r} and the vocab.json beside it can not be read: '
                         f'{error}') from None
    if bpe.token_to_id('<|startoftext|>') is None:
        raise ValueError(f'tokenizer {path!r} is not CLIP\'s: of others the tokenizer.json is '
                         'read')

    # Lower case, and any spaces are one.
    model = Tokenizer(bpe)
    model.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r'\s+'), ' '), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), 'removed', invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.add_special_tokens(['<|startoftext|>', END])
    return model


def clip_row(tokenizer, text, length=77):
    """Ids of a text as CLIP reads it: bos, at most length - 2 tokens, eos, padding."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text)[:length - 2], tokenizer.eos_id]
    return ids + [tokenizer.pad_id] * (length - len(ids))
