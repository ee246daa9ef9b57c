"""sentencepiece's .model files, as Gemma, PaliGemma and Llama 2 have (top of tokenizer.py)."""
import re

from tokenizer import ROLES, columns, complete, letters_before, spell, spell_out


class SentencePiece:
    """A sentencepiece model file, as Gemma, PaliGemma and Llama 2 have."""

    def __init__(self, path):
        import sentencepiece
        self.files = (path,)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (OSError, RuntimeError) as error:
            raise ValueError(f'tokenizer {path!r} is not a sentencepiece model: {error}') from None

        # The library says -1 of a token that the file lacks.
        self.size = self.model.vocab_size()
        in_file = self.model.bos_id(), self.model.eos_id(), self.model.pad_id()
        own = [None if i < 0 else i for i in in_file]
        ids, self.vocab_size = complete([*own, self.piece_id('<image>')], self.size)
        self.bos_id, self.eos_id, self.pad_id, self.image_id = ids

        # Text turns into what the file knows as a "user defined symbol", which <image> or </s>
        # may be: it is spelled out instead.
        self.names, self.specials, self.spelled = {}, {}, {}
        for i in range(self.size):
            if self.model.is_control(i):
                self.specials[self.model.id_to_piece(i)] = i
        for role, i in zip(ROLES, ids):
            if i < self.size:
                text = self.model.id_to_piece(i)
                self.names[role] = text
                self.specials[text] = i
                self.spelled[i] = spell(text, self.piece_id)

    def piece_id(self, piece):
        i = self.model.piece_to_id(piece)
        if i == self.model.unk_id():
            return None
        return i

    def encode(self, text):
        return spell_out(self.model.encode(text), self.spelled)

    def offsets(self, text):
        letters = letters_before(text).tolist()
        pieces = self.model.encode(text, return_type='proto').pieces

        # A letter that is written as bytes: all but the last of them are empty, and end with it.
        # So from the last piece to the first.
        rows, end = [], len(text.encode())
        for piece in reversed(pieces):
            if piece.end > piece.begin:
                end = piece.end
            for i in reversed(self.spelled.get(piece.id, [piece.id])):
                rows.append((i, letters[piece.begin], letters[end]))
        return columns(rows[::-1])

    def decode(self, ids):
        # The library raises for ids past its own.
        return self.model.decode([i for i in ids if i not in self.spelled and i < self.size])

    def special(self, text):
        i = self.piece_id(text)
        if i is None or self.model.is_control(i):
            return i

        # The library does not tell user defined symbols, so they are looked up in the model's
        # protobuf: a piece is field 1 its text, 2 its score, 3 its type, where 4 is USER_DEFINED
        # (sentencepiece_model.proto).
        raw = text.encode()
        length = bytes([min(len(raw), 255)])
        row = re.escape(b'\n' + length + raw) + b'(\x15.{4})?\x18\x04'
        if not re.search(row, self.model.serialized_model_proto(), re.DOTALL):
            return None
        return i
