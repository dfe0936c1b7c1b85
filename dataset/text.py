"""Captions: cleaning, mirroring, turning them into token ids (docs/method.md, Model; ALBEF, arXiv 2107.07651)."""

import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor

from files import decode_text
from utils import UserError, log

DELETED = ",.'!?\"()*#:;~"
CHARACTERS = str.maketrans("-/", "  ", DELETED)
MIRRORED = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}
NORMALIZER = BertNormalizer(lowercase=True)
ADDED_BY_BLIP = ("[DEC]", "[ENC]")  # a tokenizer.json of BLIP may have them after its word pieces
VOCABULARY_FILES = ("vocab.txt", "tokenizer.json")  # in order of preference


def clean_caption(text: str, max_words: int) -> str:
    """Clean a caption as the released checkpoints saw it; may come out empty.

    Lower case; the characters of `DELETED` go, hyphen and slash become a space; `<person>` becomes `person`; two or
    more white-space characters become one space (a single tab or newline inside stays, as in the release); outer
    newlines and spaces go; at most `max_words` words, counted between spaces.
    """
    text = text.lower().translate(CHARACTERS).replace("<person>", "person")
    text = re.sub(r"\s\s+", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def has_content(text: str) -> bool:
    """Whether the model reads more than [CLS] of a cleaned text.

    It drops white space, combining marks, and characters that are invisible, control codes or for private use.
    """
    if re.search("[a-z0-9]", text):
        return True
    unseen = ("Cc", "Cf", "Co", "Cs")
    return any(not (c.isspace() or unicodedata.category(c) in unseen) for c in NORMALIZER.normalize_str(text))


def swap_left_right(text: str) -> str:
    """Mirror the caption of a flipped image: left and right change places, as do leftmost and rightmost."""
    return re.sub(r"\b(left|right)(most)?\b", lambda match: MIRRORED[match.group()], text)


class Tokens(NamedTuple):
    """A batch of token ids. Both are int64 (N, longest); the mask is 1 on [CLS] and word pieces, 0 on padding."""

    input_ids: Tensor
    attention_mask: Tensor


class Word(NamedTuple):
    """A word of a caption, between white space, and its word pieces."""

    text: str
    pieces: tuple[str, ...]


class Tokenizer:
    """Lower-case WordPiece giving [CLS] and the pieces, **without a closing [SEP]**, as AMC's checkpoints were trained.

    Args:
        pieces: the WordPiece model with its normaliser; its own special-token template and padding are not used.
        source: the file it came from, for messages.

    Raises:
        UserError: [CLS], [PAD], [UNK] or [MASK] is missing, or words of the vocabulary do not tokenise to themselves.
    """

    def __init__(self, pieces: tokenizers.Tokenizer, source: str) -> None:
        self.pieces = pieces
        self.source = source
        # one more than the last id: a tokenizer.json may leave ids out
        words = (index for word, index in pieces.get_vocab().items() if word not in ADDED_BY_BLIP)
        self.vocab_size = max(words, default=-1) + 1
        self.pad_id = self._special("[PAD]")
        self.cls_id = self._special("[CLS]")
        self.mask_id = self._special("[MASK]")
        self._check_known_words(self._special("[UNK]"))

    def __call__(self, texts: list[str], max_tokens: int | None = None) -> Tokens:
        """Tokenise cleaned captions, padded to the longest.

        Args:
            max_tokens: cut to this many ids, [CLS] included (25 in training); None, as in evaluation, cuts nothing.
        """
        # One text at a time: encode_batch starts threads, which a data loader's worker must not inherit.
        rows = [[self.cls_id, *self._encode(text)][:max_tokens] for text in texts]
        input_ids = torch.full((len(rows), max(map(len, rows), default=0)), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            attention_mask[i, : len(row)] = 1
        return Tokens(input_ids, attention_mask)

    def split(self, text: str) -> list[Word]:
        """The words of a cleaned caption; their pieces, one after another, are the ids that `__call__` gives it.

        The first is [CLS]. A word without pieces (nothing but characters that the tokenizer drops) is left out.
        """
        encoding = self.pieces.encode(text, add_special_tokens=False)
        words = [Word("[CLS]", ("[CLS]",))]
        for word in re.finditer(r"\S+", text):
            inside = [word.start() <= start < word.end() for start, _ in encoding.offsets]
            if pieces := tuple(piece for piece, own in zip(encoding.tokens, inside, strict=True) if own):
                words.append(Word(word.group(), pieces))
        return words

    def _encode(self, text: str) -> list[int]:
        return self.pieces.encode(text, add_special_tokens=False).ids

    def _special(self, token: str) -> int:
        index = self.pieces.token_to_id(token)
        if index is None:
            raise UserError(f"{self.source}: holds no {token}; it must be the vocabulary of BERT-base-uncased")
        return index

    def _check_known_words(self, unknown_id: int) -> None:
        """Words of the vocabulary must come back as their own ids: a broken tokenizer says [UNK] silently.

        And a word that it lacks must not be an error of the library, as with another name for [UNK] in the file.
        """
        self._encode("\u2603\u2604")
        known = {word: i for word, i in self.pieces.get_vocab().items() if re.fullmatch("[a-z]+", word)}
        found = self._encode(" ".join(known))
        if not known or found != list(known.values()):
            lost = found.count(unknown_id) if known else 0
            raise UserError(
                f"{self.source}: the tokenizer maps known words to [UNK] or to other ids ({lost} of {len(known)} to "
                "[UNK]), which would change every map; give --text_encoder a folder with the vocab.txt of "
                "BERT-base-uncased and no other tokenizer files"
            )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, special: Mapping[str, int | None] = {}) -> None:
    """Compare a vocabulary with bert_config's `vocab_size`; warns if it is smaller: it may be another model's.

    Args:
        special: ids of special tokens by the model's config, which the vocabulary must share; it may lack [ENC].

    Raises:
        UserError: it has other ids; or it is larger, so that the model has no embeddings for some of its word pieces.
    """
    for token, index in special.items():
        own = tokenizer.pieces.token_to_id(token)
        if own != index and (own, token) != (None, "[ENC]"):
            raise UserError(f"{tokenizer.source}: {token} has the id {own}, and by the model's config.json {index}")
    found = f"{tokenizer.source}: {tokenizer.vocab_size} word pieces, and bert_config's vocab_size is {vocab_size}"
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{found}; pass the --text_encoder that the model was trained with")
    if tokenizer.vocab_size < vocab_size:
        log(f"WARNING: {found}; is this the --text_encoder that the model was trained with?")


def load_tokenizer(text_encoder: str) -> Tokenizer:
    """The tokenizer of `--text_encoder`: a folder holding vocab.txt (or else tokenizer.json), or a Hugging Face name.

    Raises:
        UserError: there is no vocabulary there, or it fails the check of `Tokenizer`.
    """
    path = _find_vocabulary(text_encoder)
    try:
        return Tokenizer(_word_pieces(path), str(path))
    except UserError:
        raise
    except BaseException as error:  # tokenizers raises plain Exception for a file that it cannot read, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{path}: cannot be read as a vocabulary ({error}); is the file complete?") from error


def _word_pieces(path: Path) -> tokenizers.Tokenizer:
    text = decode_text(path.read_bytes())
    if path.suffix == ".json":
        pieces = tokenizers.Tokenizer.from_str(text)
        pieces.no_truncation()
        pieces.no_padding()
        return pieces
    vocabulary: dict[str, int] = {}
    for index, piece in enumerate(text.rstrip("\n").split("\n")):
        if vocabulary.setdefault(piece, index) != index:
            raise UserError(
                f"{path}: line {index + 1} repeats {piece!r:.60} of line {vocabulary[piece] + 1}, so that its id would "
                f"be {vocabulary[piece]} or {index}; every line of a vocabulary must differ: get the file anew"
            )
    pieces = tokenizers.Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.normalizer = NORMALIZER
    pieces.pre_tokenizer = BertPreTokenizer()
    return pieces


def _find_vocabulary(text_encoder: str) -> Path:
    folder = Path(text_encoder)
    if os.path.isdir(folder):  # False, too, for a name that the system finds too long
        for name in VOCABULARY_FILES:
            if (folder / name).is_file():
                return folder / name
        raise UserError(f"--text_encoder {folder}: the folder holds no {' and no '.join(VOCABULARY_FILES)}")
    from transformers.utils.hub import cached_file  # seconds to import, and a folder does not need it

    for local_files_only in (True, False):
        try:
            found = cached_file(text_encoder, "vocab.txt", local_files_only=local_files_only)
        except (OSError, ValueError):  # not in the cache; no network, no such name
            continue
        if found is not None:
            return Path(found)
    raise UserError(
        f"--text_encoder {text_encoder}: no such folder, and its vocab.txt is neither in the local Hugging Face cache "
        "nor can it be downloaded; pass a folder that holds BERT-base-uncased's vocab.txt"
    )
