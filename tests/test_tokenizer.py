"""tokenizer.py: round trips, special ids, text that looks like a special token, and refusals.

The referees are the libraries themselves, on OpenAI's real ranks for tiktoken: two wheels of PyPI
hold those.
"""
import base64
import hashlib
import io
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
import tempfile
import zipfile

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import tokenizer
from vocabularies.markers import mark_up

HERE = pathlib.Path(__file__).parent

NASTY = ['', ' ', 'a', 'hello world', '  two  spaces ', 'tab\tand\nnewline\r\n',
         'naïve café', '日本語のテキスト', '👩‍🚀🏽 emoji', 'e\u0301 is not é', '\x00\x07\ufeff',
         '\U0010ffff', '<s></s><unk>', '🇨🇭', 'שלום', "it's 42,000!"]
LOOKS_SPECIAL = ['<eos>', '<bos>', '<s>', '</s>', '<pad>', '<unk>',
                 '<image>', '<|endoftext|>', '<0x41>', 'a <image> b </s> c', '<image><image>',
                 '<|im_start|>user\nhi<|im_end|>', '<start_of_turn> <|fim_prefix|> x <|pause|> y']
TEXTS = ['a cat sits on the mat', 'red apple', 'the quick brown fox jumps over the lazy dog',
         'grinning face', 'one two three four five six seven eight nine ten', 'picture of a dog',
         'caption <image> text </s> <pad>']


FORTY = f'<{38 * "x"}>'      # its length is the code of a bracket


def any_unicode(n, seed=0):
    """Random texts of all planes, without the surrogates, which are no characters."""
    rng = random.Random(seed)
    codes = [c for c in (rng.randrange(2 ** rng.randrange(1, 21)) for _ in range(n))
             if not 0xD800 <= c < 0xE000]
    return ''.join(map(chr, codes))


def train_sentencepiece(path, **settings):
    """A sentencepiece model file of a few hundred pieces."""
    model = io.BytesIO()
    options = dict(vocab_size=320, model_type='bpe',
                   byte_fallback=True, hard_vocab_limit=False, num_threads=1, minloglevel=2,
                   normalization_rule_name='identity', remove_extra_whitespaces=False)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 3), model_writer=model,
                                             **options | settings)
    path.write_bytes(model.getvalue())
    return str(path)


def write_ranks(path, merges=('th', 'he', 'the', ' t', ' the', 'in', 'ing', 'é', 'q ')):
    """A tiktoken file: 256 bytes, then some merges."""
    tokens = [bytes([i]) for i in range(256)] + [m.encode() for m in merges]
    lines = [base64.b64encode(token) + b' %d\n' % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b''.join(lines) + b'\n')
    return str(path)


def write_huggingface(folder, model, trainer=None, special=(), plain=(), config=None, **parts):
    """A folder with tokenizer.json, trained on TEXTS if there is a trainer, and
    tokenizer_config.json."""
    folder.mkdir()
    t = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(t, name, part)
    if trainer:
        t.train_from_iterator(TEXTS * 3, trainer)
    t.add_special_tokens(list(special))
    t.add_tokens(list(plain))
    t.save(str(folder / 'tokenizer.json'))
    if config is not None:
        (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    return str(folder / 'tokenizer.json')


def byte_level(folder, vocab_size=300, **rest):
    """Byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM have."""
    trainer = trainers.BpeTrainer(vocab_size=vocab_size,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    return write_huggingface(folder, models.BPE(), trainer, pre_tokenizer=pre_tokenizers.ByteLevel(
        add_prefix_space=False), decoder=decoders.ByteLevel(), **rest)


def pieces(*special):
    """The vocabulary of a converted sentencepiece model: special tokens and bytes are pieces
    beside the letters."""
    letters = [c for c in map(chr, range(32, 127)) if c != ' '] + ['\u2581', '\n', 'é', '日']
    return [*special, *(f'<0x{b:02X}>' for b in range(256)), *letters]


def gemma_like(folder, **rest):
    """BPE over bytes and letters; by its merges, the letters of <eos> would become the token."""
    vocab = {piece: i for i, piece in enumerate(pieces('<pad>', '<eos>', '<bos>', '<unk>')
                                                + ['<e', 'os', 'os>'])}
    merges = [('<', 'e'), ('o', 's'), ('os', '>'), ('<e', 'os>')]
    return write_huggingface(
        folder, models.BPE(vocab, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True),
        normalizer=normalizers.Replace(' ', '\u2581'),
        special=['<pad>', '<eos>', '<bos>', '<unk>'], decoder=decoders.Sequence(
            [decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()]), **rest)


def llama3_like(folder):
    """What is to be switched off: the post-processor's bos, padding, cuts, dropout; two tokens eat
    spaces."""
    path = byte_level(folder, special=['<|begin_of_text|>', '<|end_of_text|>',
                                       '<|eot_id|>', '<|im_start|>', '<|im_end|>', AddedToken(
                                           '<|pause|>', lstrip=True, rstrip=True, special=True)],
                      plain=[AddedToken('<image>', lstrip=True, rstrip=True), '<tool_call>'],
                      config=dict(bos_token={'content': '<|begin_of_text|>', 'special': True},
                                  eos_token='<|eot_id|>', pad_token=None, model_max_length=8))
    t = tokenizers.Tokenizer.from_file(path)
    ids = {text: t.token_to_id(text) for text in ('<|begin_of_text|>', '<|end_of_text|>')}
    t.post_processor = processors.TemplateProcessing(single='<|begin_of_text|> $A <|end_of_text|>',
                                                     special_tokens=list(ids.items()))
    t.enable_truncation(8)
    t.enable_padding(length=16)
    t.model.dropout = 0.5
    t.save(path)
    return path


def unigram(folder):
    """Unigram with special tokens among its pieces, as T5; it finds them in text whatever its
    settings say."""
    special = ['<pad>', '</s>', '<s>', '<unk>', '<image>']
    scores = [(piece, 0.0 if piece in special else -4.0)
              for piece in pieces(*special)] + [('cat', -3.0)]
    return write_huggingface(folder, models.Unigram(scores, unk_id=3, byte_fallback=True),
                             special=special[:4],
                             plain=['<image>'], normalizer=normalizers.Replace(' ', '\u2581'),
                             decoder=decoders.Sequence([decoders.Replace('\u2581', ' '),
                                                        decoders.ByteFallback(), decoders.Fuse()]))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizers')
    # own: as Gemma's, with <image> within; llama: bos, eos, unk, no pad, no <image>; gpt: no
    # tokenizer_config.json
    gemma_names = dict(bos_token='<bos>', eos_token='<eos>', pad_token='<pad>',
                       image_token='<image_soft_token>')
    return {
        'bytes': 'bytes',
        'own': train_sentencepiece(folder / 'own.model', pad_id=0, eos_id=1, bos_id=2, unk_id=3,
                                   control_symbols=['<image>']),
        'llama': train_sentencepiece(folder / 'llama.model'),
        'bare': train_sentencepiece(folder / 'bare.model', bos_id=-1, eos_id=-1),
        'user': train_sentencepiece(folder / 'user.model', pad_id=3,
                                    user_defined_symbols=['<image>']),
        'ends': train_sentencepiece(
            folder / 'ends.model', pad_id=3,
            user_defined_symbols=['<s>', '</s>', '<pad>', '<start_of_turn>', FORTY]),
        'tiktoken': write_ranks(folder / 'gpt2_tiny.tiktoken'),
        'cl100k': write_ranks(folder / 'cl100k_tiny.tiktoken'),
        'o200k': write_ranks(folder / 'o200k_tiny.tiktoken'),
        'gpt': byte_level(folder / 'gpt', special=['<|endoftext|>']),
        'llama3': llama3_like(folder / 'llama3'),
        'gemma': gemma_like(folder / 'gemma', plain=['<unused0>'], config=gemma_names),
        'unigram': unigram(folder / 'unigram')}


KINDS = ['bytes', 'own', 'llama', 'bare', 'user', 'ends', 'tiktoken', 'cl100k', 'o200k', 'gpt',
         'llama3', 'gemma', 'unigram']
SENTENCEPIECE = ['own', 'llama', 'bare', 'user', 'ends', 'unigram']
ONE_END = ['tiktoken', 'cl100k', 'o200k', 'gpt']       # one token for both ends, as GPT-2


@pytest.mark.parametrize('kind', KINDS)
def test_text_comes_back(files, kind):
    t = tokenizer.load(files[kind])
    texts = NASTY + [any_unicode(40, seed) for seed in range(30)]
    if kind in SENTENCEPIECE:                   # sentencepiece keeps no NUL
        texts = [text.replace('\x00', '').replace('\u2581', '') for text in texts]
    for text in texts:
        ids = t.encode(text)
        assert all(type(i) is int and 0 <= i < t.vocab_size for i in ids)
        assert t.decode(ids) == text


@pytest.mark.parametrize('kind', KINDS)
def test_text_never_becomes_a_special_token(files, kind):
    t = tokenizer.load(files[kind])
    special = {t.bos_id, t.eos_id, t.pad_id, t.image_id}
    for text in LOOKS_SPECIAL:
        assert not special & set(t.encode(text)), text
        # the library takes this for the byte, which is not special
        if text != '<0x41>' or kind != 'unigram':
            assert t.decode(t.encode(text)) == text


@pytest.mark.parametrize('kind', KINDS)
def test_special_ids_lie_in_the_vocabulary_and_are_not_shown(files, kind):
    t = tokenizer.load(files[kind])
    special = [t.bos_id, t.eos_id, t.pad_id, t.image_id]
    assert all(0 <= i < t.vocab_size for i in special)
    assert len(set(special)) == (3 if kind in ONE_END else 4), 'GPT-2 has one token for both ends'
    ids = t.encode('a cat')
    assert t.decode([t.bos_id, *ids, t.eos_id, t.pad_id, t.image_id]) == 'a cat'
    assert t.decode([*ids, t.vocab_size, t.vocab_size + 40]) == 'a cat', (
        'ids that only round the vocabulary up')
    assert t.decode([]) == '' and t.encode('') == []


def test_bytes_are_bytes():
    t = tokenizer.load('bytes')
    assert t.encode('aé') == [97, 0xC3, 0xA9] and t.vocab_size == 260 and t.files == ()
    assert (t.bos_id, t.eos_id, t.pad_id, t.image_id) == (256, 257, 258, 259)
    assert t.decode([0xC3, 97]) == '\ufffda', 'a half character is shown, not an error'


def test_sentencepiece_keeps_its_own_ids_and_adds_the_missing_after_them(files):
    def ids(kind):
        t = tokenizer.load(files[kind])
        size = sentencepiece.SentencePieceProcessor(model_file=files[kind]).vocab_size()
        assert t.files == (files[kind],)
        return t, size
    t, size = ids('own')
    assert (t.pad_id, t.eos_id, t.bos_id) == (0, 1, 2) and t.image_id < size == t.vocab_size
    assert t.model.id_to_piece(t.image_id) == '<image>'
    t, size = ids('llama')
    assert (t.bos_id, t.eos_id) == (1, 2)
    assert (t.pad_id, t.image_id) == (size, size + 1) and t.vocab_size == size + 2
    t, size = ids('bare')
    assert (t.bos_id, t.eos_id, t.pad_id, t.image_id) == (size, size + 1, size + 2, size + 3)
    assert t.vocab_size == size + 4
    t, size = ids('user')
    assert t.pad_id == 3 and t.image_id < size == t.vocab_size


def test_sentencepiece_encodes_as_sentencepiece_does(files):
    t = tokenizer.load(files['llama'])
    theirs = sentencepiece.SentencePieceProcessor(model_file=files['llama'])
    for text in TEXTS[:-1] + NASTY[:10]:
        assert t.encode(text) == theirs.encode(text)
    assert len(t.encode(TEXTS[2])) < len(TEXTS[2]), 'pieces are longer than letters'


def test_tiktoken_merges_by_rank(files):
    t = tokenizer.load(files['tiktoken'])
    assert t.encode('the') == [258] and t.encode('a the') == [97, 260]
    assert t.encode('thing') == [256, 262]
    assert t.encode('é') == [263] and t.encode('\xff') == [0xC3, 0xBF]
    assert (t.bos_id, t.eos_id, t.pad_id, t.image_id, t.vocab_size) == (265, 265, 266, 267, 268)
    assert t.files == (files['tiktoken'],)
    assert t.decode([0xC3, 97]) == '\ufffda'
    assert t.encode('in 123ing') == [261, 32, 49, 50, 51, 262]
    assert t.encode('q r') == [113, 32, 114], "GPT-2's split: a space goes with the word after it"


def test_tiktoken_splits_as_the_name_says(tmp_path):
    merges = ['12', '123', '1234', "'L", "'LL", ' \n', ' \n\n', 'aB']
    def encode(name, text):
        ids = tokenizer.load(write_ranks(tmp_path / f'{name}_x.tiktoken', merges)).encode(text)
        return [merges[i - 256] if i > 255 else chr(i) for i in ids]
    for name in ('gpt2', 'r50k', 'p50k'):
        assert encode(name, "1234'LL aB") == ['1234', "'", 'L', 'L', ' ', 'aB']
    assert encode('cl100k', "1234'LLaB") == ['123', '4', "'LL", 'aB']
    assert encode('o200k', '1234aB') == ['123', '4', 'a', 'B'], (
        'a word ends where a capital begins')


def test_tiktoken_refuses_what_would_end_the_process(files):
    t = tokenizer.load(files['o200k'])
    assert len(t.encode('a' + ' ' * 500_000 + 'b' + ' ' * 500_000)) == 1_000_002
    with pytest.raises(ValueError, match='spaces'):
        t.encode('a' + ' ' * 1_100_000 + 'b')


def test_tiktoken_knows_the_real_ranks_by_their_number(tmp_path):
    def load(name, ranks):
        tokens = [bytes([i]) for i in range(256)] + [b'%06d' % i for i in range(len(ranks) - 256)]
        (tmp_path / name).write_bytes(b''.join(base64.b64encode(t) + b' %d\n' % r
                                               for t, r in zip(tokens, ranks)))
        t = tokenizer.load(str(tmp_path / name))
        return t.bos_id, t.eos_id, t.pad_id, t.image_id, t.vocab_size
    assert load('gpt2.tiktoken', range(50256)) == (50256, 50256, 50257, 50258, 50259)
    assert load('gpt2.tiktoken', range(50255)) == (50255, 50255, 50256, 50257, 50258), (
        'not the real one')
    assert load('gpt2.tiktoken', range(50300)) == (50300, 50300, 50301, 50302, 50303), (
        '50256 is taken')
    assert load('p50k.tiktoken',
                [*range(50256), *range(50257, 50281)]) == (50256, 50256, 50281, 50282, 50283)
    assert load('cl100k.tiktoken', range(100256)) == (100257, 100257, 100277, 100278, 100279)


# on PyPI: member of the wheel -> our name for it, and tiktoken's checksum
URLS = [f'https://openaipublic.blob.core.windows.net/encodings/{name}_base.tiktoken'
        for name in ('cl100k', 'o200k')]
CACHED = 'llama_index/core/_static/tiktoken_cache/'
WHEELS = {
    'mlx-whisper==0.4.3': {'mlx_whisper/assets/gpt2.tiktoken': 'r50k_base.tiktoken'},
    'llama-index-core==0.14.25': {
        CACHED + hashlib.sha1(url.encode()).hexdigest(): url.split('/')[-1] for url in URLS}}
SHA256 = {
    'r50k_base.tiktoken': '306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930',
    'p50k_base.tiktoken': '94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069',
    'cl100k_base.tiktoken': '223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7',
    'o200k_base.tiktoken': '446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d'}


def fetch_ranks(cache):
    """OpenAI's rank files from PyPI's wheels, unpacked and not run, into a folder that outlives
    the tests."""
    cache.mkdir(parents=True, exist_ok=True)
    for wheel, members in WHEELS.items():
        if all((cache / name).exists() for name in members.values()):
            continue
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            try:
                subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet',
                                '--no-deps', '--only-binary=:all:', '--dest', folder, wheel],
                               check=True, capture_output=True, text=True, timeout=120)
            except (subprocess.SubprocessError, OSError) as error:
                said = str(getattr(error, 'stderr', None) or error).strip().splitlines()
                pytest.skip(f'pip cannot download {wheel}: {said[-1] if said else error}')
            with zipfile.ZipFile(next(pathlib.Path(folder).glob('*.whl'))) as archive:
                for member, name in members.items():
                    (pathlib.Path(folder) / name).write_bytes(archive.read(member))
                    os.replace(pathlib.Path(folder) / name, cache / name)
    # p50k_base is r50k_base and 24 runs of spaces on the other side of <|endoftext|>
    spaces = b''.join(base64.b64encode(b' ' * (i + 2)) + b' %d\n' % (50257 + i) for i in range(24))
    p50k = (cache / 'r50k_base.tiktoken').read_bytes() + spaces
    return {name: p50k if name.startswith('p50k') else (cache / name).read_bytes()
            for name in SHA256}


@pytest.fixture(scope='module')
def real_ranks(tmp_path_factory):
    """A folder with the real rank files, under their own names and under those of tiktoken's
    cache."""
    folder = tmp_path_factory.mktemp('ranks')
    for name, content in fetch_ranks(pathlib.Path.home() / '.cache' / 'nanofoundry-tests').items():
        assert hashlib.sha256(content).hexdigest() == SHA256[name], name
        url = f'https://openaipublic.blob.core.windows.net/encodings/{name}'
        (folder / name).write_bytes(content)
        (folder / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)
    (folder / 'gpt2.tiktoken').write_bytes((folder / 'r50k_base.tiktoken').read_bytes())
    return folder


def nasty_texts():
    """Where splits differ: numbers, contractions, capitals, kinds of spaces, marks, symbols, mixed
    at random; files."""
    rng = random.Random(0)
    bits = ["'s", "'LL", "'re", "\u2019s", ' ', '  ', '\t', '\n', '\r\n',
            '\u00a0', '\u3000', '\u2028', '1', '42', '12345', '²', '٣', 'the', ' The', 'THE',
            'theEnd', 'ǅ', 'é', 'e\u0301', '日本', 'ー', 'ß', 'ʰ', 'नमस्ते', '!', '...', '_', '$',
            '{}', '😀', '👩\u200d🚀', '\x00', '\ufeff', '\ue000', '<|endoftext|>', ' /', '/\n',
            'http://a.b/c?d=e']
    mixed = [''.join(rng.choices(bits, k=rng.randrange(1, 25))) for _ in range(600)]
    unicode = [any_unicode(rng.randrange(1, 60), seed) for seed in range(300)]
    long = [' ' * 3000, '\n' * 3000, 'a' * 3000, '1' * 3000, '!' * 3000, ' \n' * 1500,
            'aB' * 1500, '日' * 1500]
    source = [(HERE / name).read_text()
              for name in ('test_tokenizer.py', '../vocabularies/ranks.py', '../README.md')]
    return NASTY + LOOKS_SPECIAL + TEXTS + mixed + unicode + long + source


@pytest.mark.parametrize('name', ['gpt2', 'r50k_base', 'p50k_base', 'cl100k_base', 'o200k_base'])
def test_real_ranks_give_what_tiktoken_gives(real_ranks, monkeypatch, name):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(real_ranks))
    # gpt2 has other files, the same ranks
    theirs = tiktoken.get_encoding('r50k_base' if name == 'gpt2' else name)
    t = tokenizer.load(str(real_ranks / f'{name}.tiktoken'))
    for text in nasty_texts():
        ids = t.encode(text)
        assert ids == theirs.encode(text, disallowed_special=()), text
        assert t.decode(ids) == text
    assert t.bos_id == t.eos_id == theirs.eot_token
    ours = t.pad_id, t.image_id, t.vocab_size
    assert ours == (theirs.n_vocab, theirs.n_vocab + 1, theirs.n_vocab + 2)
    special = {text: theirs.encode_single_token(text) for text in theirs.special_tokens_set}
    assert special == {text: t.special(text) for text in special} and '<|endoftext|>' in special
    for i in range(0, t.vocab_size + 3):
        shown = i not in special.values() and i < theirs.n_vocab
        try:
            expected = theirs.decode([i]) if shown else ''
        except KeyError:                # an id that no token has
            expected = ''
        assert t.decode([i]) == expected, i


HUGGINGFACE = ['gpt', 'llama3', 'gemma', 'unigram']


@pytest.mark.parametrize('kind', HUGGINGFACE)
def test_huggingface_encodes_as_tokenizers_does(files, kind):
    t, theirs = tokenizer.load(files[kind]), tokenizers.Tokenizer.from_file(files[kind])
    if kind == 'llama3':
        assert theirs.encode('a cat').ids[0] == t.bos_id, (
            'the file has a post-processor that adds bos')
        assert len(theirs.encode('a').ids) == 16 and len(theirs.encode('a cat ' * 20).ids) == 16
        assert len({tuple(theirs.encode(TEXTS[2]).ids) for _ in range(9)}) > 1, 'and dropout'
        theirs.no_truncation()
        theirs.no_padding()
        theirs.model.dropout = None
    texts = [text for text in TEXTS + NASTY + [any_unicode(40, seed) for seed in range(30)]
             if '<' not in text]
    # added tokens that are not special do match
    for text in [*texts, 'a cat ' * 50, '<tool_call> <unused0>']:
        ids = t.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert t.decode(ids) == theirs.decode(ids)
    assert t.decode(t.encode('a cat ' * 50)) == 'a cat ' * 50


def test_huggingface_takes_special_tokens_from_the_files_or_by_their_names(files, tmp_path):
    def ids(path):
        t, theirs = tokenizer.load(path), tokenizers.Tokenizer.from_file(path)
        own = [theirs.id_to_token(i) for i in (t.bos_id, t.eos_id, t.pad_id, t.image_id)]
        new = [i for i, text in zip((t.bos_id, t.eos_id, t.pad_id, t.image_id), own)
               if text is None]
        size = theirs.get_vocab_size()
        assert new == list(range(size, size + len(new))) and t.vocab_size == size + len(new)
        return own
    end = '<|endoftext|>'
    assert ids(files['llama3']) == ['<|begin_of_text|>', '<|eot_id|>', None, '<image>']
    assert ids(files['gemma']) == ['<bos>', '<eos>', '<pad>', None]
    assert ids(files['unigram']) == ['<s>', '</s>', '<pad>', '<image>']
    assert ids(files['gpt']) == [end, end, None, None]
    qwen = byte_level(tmp_path / 'qwen',
                      special=[end, '<|im_start|>', '<|im_end|>', '<|image_pad|>'])
    assert ids(qwen) == [end, end, None, '<|image_pad|>'], (
        '<|im_start|> begins a turn, not a document')
    side = tmp_path / 'qwen' / 'special_tokens_map.json'
    side.write_text(
        json.dumps(dict(eos_token={'content': '<|im_end|>'}, pad_token=end, additional=['x'])))
    assert ids(qwen) == ['<|im_end|>', '<|im_end|>', end, '<|image_pad|>']
    config = tmp_path / 'qwen' / 'tokenizer_config.json'
    config.write_text(json.dumps(dict(bos_token='<|im_start|>', pad_token=None, eos_token=end,
                                      image_token='<gone>')))
    assert ids(qwen) == ['<|im_start|>', end, end, None], (
        'tokenizer_config.json first, null says nothing')
    assert tokenizer.load(qwen).files == (qwen, str(config), str(side))
    assert tokenizer.load(files['gpt']).files == (files['gpt'],)
    assert ids(byte_level(tmp_path / 'none')) == [None] * 4


def test_huggingface_pieces_that_are_special_are_spelled_out(files, tmp_path):
    for kind, text in (('gemma', '<eos>'), ('unigram', 'a</s>b <s> <image>')):
        t = tokenizer.load(files[kind])
        theirs = tokenizers.Tokenizer.from_file(files[kind])
        theirs.encode_special_tokens = True
        assert t.spelled.keys() & set(theirs.encode(text).ids), 'the library itself does find them'
        assert not t.spelled.keys() & set(t.encode(text)) and t.decode(t.encode(text)) == text
    t = tokenizer.load(files['unigram'])
    assert t.encode('a cat') == [t.model.token_to_id(piece) for piece in ('a', '\u2581', 'cat')]
    words = {'[PAD]': 0, '[UNK]': 1, '[CLS]': 2, 'cat': 3, '##s': 4}
    words |= {c: 5 + i for i, c in enumerate('[]CLS')}
    t = tokenizer.load(
        write_huggingface(tmp_path / 'words', models.WordPiece(words, unk_token='[UNK]'),
                          special=['[PAD]', '[UNK]', '[CLS]'], decoder=decoders.WordPiece(),
                          pre_tokenizer=pre_tokenizers.WhitespaceSplit()))
    assert t.encode('cats [CLS] dog') == [3, 4, *(words[c] for c in '[CLS]'), 1], (
        'an unknown word stays unknown')
    assert t.decode([2, 3, 4, 0, 11]) == 'cats'
    assert (t.bos_id, t.pad_id, t.vocab_size) == (2, 0, 12)


def test_huggingface_vocabulary_reaches_to_the_largest_id(tmp_path):
    vocab = {'a': 0, 'b': 1, 'far': 40}
    t = tokenizer.load(write_huggingface(tmp_path / 'holes',
                                         models.WordLevel(vocab | {'?': 7}, unk_token='?')))
    assert (t.bos_id, t.vocab_size) == (41, 45) and t.encode('far') == [40]
    assert t.decode([0, 5, 43, 44, 45]) == 'a'


@pytest.mark.parametrize('kind', KINDS)
def test_special_knows_special_tokens_and_nothing_else(files, kind):
    end = ['<|endoftext|>']
    has = {'own': ['<pad>', '</s>', '<s>', '<image>'],
           'llama': ['<s>', '</s>'], 'user': ['<s>', '<pad>', '<image>'],
           'ends': ['<s>', '</s>', '<pad>', '<start_of_turn>', FORTY], 'gpt': end, 'tiktoken': end,
           'cl100k': end, 'llama3': ['<|eot_id|>', '<|im_end|>', '<image>', '<tool_call>'],
           'gemma': ['<bos>', '<eos>', '<unused0>'], 'unigram': ['<s>', '<image>']}.get(kind, [])
    t = tokenizer.load(files[kind])
    piece = getattr(t.model, 'id_to_piece',
                    getattr(t.model, 'id_to_token', None)) if kind != 'bytes' else None
    for text in has:
        assert t.special(text) == t.eos_id if piece is None else piece(t.special(text)) == text
    ordinary = {'<0x41>', '<image>', '<gone>', '<start_of_turn>', 'cat', 'a', '\u2581', '',
                'x' * 300, '('}
    if kind in SENTENCEPIECE and kind != 'unigram':
        ordinary |= {p for p in map(piece, range(t.model.vocab_size())) if p[0] != '<'}
    assert [text for text in sorted(ordinary - set(has)) if t.special(text) is not None] == []


@pytest.mark.parametrize('kind', KINDS)
def test_offsets_say_where_tokens_come_from(files, kind):
    t = tokenizer.load(files[kind])
    for text in TEXTS + LOOKS_SPECIAL + ['', 'né 日本\n  x', any_unicode(200)]:
        ids, begins, ends = t.offsets(text)
        assert ids == t.encode(text) and len(begins) == len(ends) == len(ids)
        assert all(0 <= a <= b <= len(text) for a, b in zip(begins, ends)) and ends == sorted(ends)
        covered = {i for a, b in zip(begins, ends) for i in range(a, b)}
        assert not [c for i, c in enumerate(text) if i not in covered and c.isalnum()
                    and ord(c) < 0x3000]


@pytest.mark.parametrize('kind', KINDS)
def test_markers_become_tokens_and_broken_ones_do_not(files, kind):
    t = tokenizer.load(files[kind])
    markers = {'<mine>': 7, '<eos>': t.eos_id} | t.specials
    name = next((text for text, i in t.specials.items() if i == t.eos_id), '<eos>')
    broken = f'<{tokenizer.BREAK}mine>{name[0]}{tokenizer.BREAK}{name[1:]}'
    text = f'one<mine>two {name}{broken}cat{name}'
    ids, begins, ends = mark_up(t, text, markers)
    found = [text[a:b] for i, a, b in zip(ids, begins, ends) if i in (7, t.eos_id) and b - a > 1]
    assert found == ['<mine>', name, name]
    assert ids.count(t.eos_id) == 2
    shown = t.decode([i for i in ids if i != 7])
    assert tokenizer.BREAK not in shown and shown.replace(' ', '') == f'onetwo<mine>{name}cat'
    assert mark_up(t, 'one', markers)[0] == t.encode('one')
    assert mark_up(t, '', markers)[0] == []


@pytest.mark.parametrize('kind', KINDS)
def test_another_process_gets_the_same_tokenizer(files, kind):
    t = tokenizer.load(files[kind])
    other = pickle.loads(pickle.dumps(t))
    for text in LOOKS_SPECIAL + TEXTS:
        assert other.encode(text) == t.encode(text)
    assert (other.files, other.vocab_size, other.eos_id) == (t.files, t.vocab_size, t.eos_id)


def test_sentencepiece_ends_that_are_user_defined_are_text(files):
    # the library says that such a file has no bos, eos and pad
    t = tokenizer.load(files['ends'])
    assert t.encode('<s> </s><pad>')[-3:].count(t.special('<pad>')) == 1
    assert t.special('<s>') != t.bos_id
    size = t.model.vocab_size()
    assert (t.bos_id, t.eos_id, t.pad_id) == (size, size + 1, size + 2)
    assert t.special('<start_of_turn>') in t.encode('<start_of_turn>user')


def test_a_folder_is_the_one_tokenizer_it_holds(files, tmp_path):
    def load(*names):
        folder = pathlib.Path(tempfile.mkdtemp(dir=tmp_path))
        for name in ('config.json', 'shards.json', 'tokenizer_config.json'):
            (folder / name).write_text('{}')
        kinds = {'.json': 'gpt', '.model': 'llama', '.tiktoken': 'tiktoken'}
        for name in names:
            (folder / name).write_bytes(
                pathlib.Path(files[kinds[os.path.splitext(name)[1]]]).read_bytes())
        return os.path.basename(tokenizer.load(str(folder)).files[0])
    assert load('tokenizer.json') == load('tokenizer.json', 'tokenizer.model',
                                          'x.model') == 'tokenizer.json'
    assert load('tokenizer.model', 'other.model') == 'tokenizer.model'
    assert load('own.model') == 'own.model' and load('gpt2_x.tiktoken') == 'gpt2_x.tiktoken'
    with pytest.raises(ValueError, match='with no file of the kinds'):
        load()
    with pytest.raises(ValueError, match='gpt2_x.tiktoken and own.model'):
        load('own.model', 'gpt2_x.tiktoken')


def test_broken_files_of_huggingface_are_refused_by_name(files, tmp_path, monkeypatch):
    path, config = tmp_path / 'tokenizer.json', tmp_path / 'tokenizer_config.json'
    def refused(name):
        with pytest.raises(ValueError) as error:
            tokenizer.load(str(path))
        assert name in str(error.value) and '\n' not in str(error.value)
        return str(error.value)
    for content in (b'', b'{}', b'[]', b'\xff\xfe',
                    b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'):
        path.write_bytes(content)
        refused('tokenizer.json')
    path.write_bytes(pathlib.Path(files['gpt']).read_bytes())
    for content in ('', '[]', '3', '\x00', '{"eos_token": 7}', '{"eos_token": ["a"]}',
                    '{"eos_token": {"content": 1}}', '{"pad_token": {"text": "a"}}'):
        config.write_text(content)
        refused('tokenizer_config.json')
    config.write_text('{"eos_token": null}')
    assert tokenizer.load(str(path)).eos_id == tokenizer.load(files['gpt']).eos_id
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    assert 'pip install tokenizers' in refused('tokenizer.json')
    with pytest.raises(FileNotFoundError, match='gone.json'):
        tokenizer.load(str(tmp_path / 'gone.json'))


def test_tokenizers_that_can_not_be_are_refused(tmp_path):
    files = {'x.txt': ('known kind', b''),
             'x.model': ('x.model', b'no protobuf at all'), 'e.model': ('e.model', b''),
             'x.tiktoken': ('o200k', b'IQ== 0\n'), 'gpt2_a.tiktoken': ('gpt2_a', b'IQ== 0 7\n'),
             'gpt2_b.tiktoken': ('gpt2_b', b'IQ== zero\n'), 'gpt2_c.tiktoken': ('gpt2_c', b''),
             'gpt2_d.tiktoken': ('gpt2_d', b'?\xff 0\n'), 'gpt2_e.tiktoken': ('gpt2_e', b'IQ==\n'),
             'gpt2_f.tiktoken': ('gpt2_f', b'IQ== 0\nIg== 0\n'),
             'gpt2_g.tiktoken': ('gpt2_g', b'IQ== 0\n')}
    passed = []
    for name, (word, content) in files.items():
        (tmp_path / name).write_bytes(content)
        try:
            with pytest.raises(ValueError) as error:
                tokenizer.load(str(tmp_path / name))
            assert word in str(error.value)
        # pytest's Failed is one, and all cases shall be tried
        except BaseException as error:      # noqa: B036
            passed.append(f'{name}: {error!r:.120}')
    assert not passed, '\n'.join(passed)
    for name in ('gone.model', 'gone.tiktoken'):
        with pytest.raises(FileNotFoundError, match=name):
            tokenizer.load(str(tmp_path / name))
    with pytest.raises(ValueError, match='known kind'):
        tokenizer.load('byte')
