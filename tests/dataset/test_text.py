"""Captions and tokens, against the ids and strings that the released checkpoints were trained with."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers.models import WordPiece

from dataset.text import Tokenizer, check_vocabulary, clean_caption, has_content, load_tokenizer, swap_left_right
from utils import UserError


@pytest.fixture(scope="module")
def tokenizer(bert_vocab: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("text_encoder")
    (folder / "vocab.txt").write_bytes(bert_vocab.read_bytes())
    return load_tokenizer(str(folder))


def test_golden_captions(golden_metrics: dict[str, Any]) -> None:
    cases = golden_metrics["captions"]
    assert [clean_caption(text, max_words) for text, max_words, _ in cases] == [cleaned for *_, cleaned in cases]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a \n\t b", "a b"),
        ("a\tb", "a\tb"),
        ("Left-most/dog.\n", "left most dog"),
        ("a - b", "a b"),
        ("'\"!?()*#:;~,.", ""),
        ("one two three four", "one two three"),
    ],
)
def test_clean_caption(text: str, cleaned: str) -> None:
    assert clean_caption(text, 3) == cleaned


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("the man on the left", "the man on the right"),
        ("rightmost of the two left cups", "leftmost of the two right cups"),
        ("leftover food is alright and bright", "leftover food is alright and bright"),
        ("", ""),
    ],
)
def test_swap_left_right(text: str, mirrored: str) -> None:
    assert swap_left_right(text) == mirrored
    assert swap_left_right(mirrored) == text


def test_golden_tokens(tokenizer: Tokenizer, golden_metrics: dict[str, Any]) -> None:
    for text, evaluation, training in golden_metrics["tokens"]:
        assert tokenizer([text]).input_ids.tolist() == [evaluation]
        assert tokenizer([text], max_tokens=25).input_ids.tolist() == [training]


def test_tokens_are_padded_to_the_longest_and_masked(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(["two dogs", "", "\u2603"])  # the snowman is unknown
    assert tokens.input_ids.tolist() == [[101, 2048, 6077], [101, 0, 0], [101, 100, 0]]
    assert tokens.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert tokens.input_ids.dtype == tokens.attention_mask.dtype == torch.int64
    assert tokenizer(["two dogs", "a"], max_tokens=2).input_ids.tolist() == [[101, 2048], [101, 1037]]
    assert tokenizer([]).input_ids.shape == (0, 0)


def test_special_ids_and_size(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.mask_id, tokenizer.vocab_size) == (0, 101, 103, 30522)
    pieces = [tokenizer.pieces.id_to_token(index) for index in (101, 4100, 25778, 2239, 0)]
    assert pieces == ["[CLS]", "semi", "##col", "##on", "[PAD]"]


def test_a_folder_with_tokenizer_json_alone(bert_vocab: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    # This file asks for truncation, padding and a closing [SEP]; none of them is ours.
    (tmp_path / "tokenizer.json").write_bytes((bert_vocab.parent / "tokenizer.json").read_bytes())
    texts = ["two dogs", "the mans red hat on near the left " * 30]
    ours, theirs = tokenizer(texts), load_tokenizer(str(tmp_path))(texts)
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.attention_mask, theirs.attention_mask)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("cached", [True]),
        ("to-download", [True, False]),  # local files only, then the network
        ("no-such-encoder", [True, False]),
        ("x" * 300, [True, False]),
    ],
)
def test_a_name_is_looked_up_in_the_cache_first(
    name: str, asked: list[bool], bert_vocab: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def cached_file(name: str, file: str, local_files_only: bool) -> str:
        calls.append((name, file, local_files_only))
        if name == "cached" or (name == "to-download" and not local_files_only):
            return str(bert_vocab)
        raise OSError("not in the cache, and no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    if name in ("cached", "to-download"):
        assert load_tokenizer(name).vocab_size == 30522
    else:
        with pytest.raises(UserError, match=rf"{name}: no such folder.* pass a folder that holds BERT-base"):
            load_tokenizer(name)
    assert calls == [(name, "vocab.txt", local) for local in asked]


def test_a_folder_without_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder holds no vocab\.txt and no tokenizer\.json"):
        load_tokenizer(str(tmp_path))


SMALL = "[PAD]\n[UNK]\n[CLS]\n[MASK]\ncat\ndog\n"


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_and_line_ends_change_no_id(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / "vocab.txt").write_text(SMALL)
    plain = load_tokenizer(str(tmp_path)).pieces
    text = SMALL if name == "vocab.txt" else plain.to_str(pretty=True)
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / name).write_text(text, encoding=encoding, newline="\r\n")
    assert load_tokenizer(str(tmp_path)).pieces.get_vocab() == plain.get_vocab()


@pytest.mark.parametrize(
    ("part", "replaced", "message"),
    [
        (
            '"dog":5',
            '"dog":900',
            r"901 word pieces, and bert_config's vocab_size is 30; pass the",
        ),  # ids left out count
        # An unknown word without a token is told at once.
        ('"unk_token":"[UNK]"', '"unk_token":"<unk>"', r"tokenizer\.json: cannot be read as a vocabulary \(.*UNK"),
    ],
)
def test_a_tokenizer_file_that_is_no_berts(part: str, replaced: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(SMALL)
    text = load_tokenizer(str(tmp_path)).pieces.to_str()
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "tokenizer.json").write_text(text.replace(part, replaced))
    with pytest.raises(UserError, match=message):
        check_vocabulary(load_tokenizer(str(tmp_path)), 30)


def test_a_panic_of_the_library_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3's, which is no Exception."""

    def panic(error: BaseException) -> object:
        def from_str(text: str) -> None:
            raise error

        return type("Tokenizer", (), {"from_str": staticmethod(from_str)})

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("tokenizers.Tokenizer", panic(PanicException("index out of bounds")))
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as a vocabulary \(index out of bounds\)"):
        load_tokenizer(str(tmp_path))
    monkeypatch.setattr("tokenizers.Tokenizer", panic(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, True) for text in ("a", "7", "\u2603", "\u00e9", "\u65e5", "\u200ba", "e\u0301", "$", "[", "\u00df")),
        *((text, True) for text in ("\uffff", "\u0378")),  # unassigned: the tokenizer reads an unknown word
        *((text, False) for text in ("", " ", "\u200b", "\u200d \ufeff", "\u00ad", "\x00\x7f", "\ue000", "\U0010fffd")),
        *((text, False) for text in ("\u0301", "\u0308\ufe0f", "\u2028", "\ufffd", "\t\u3000")),
    ],
)
def test_content(text: str, expected: bool, tokenizer: Tokenizer) -> None:
    assert has_content(text) == expected
    assert (tokenizer([text]).input_ids.shape[1] > 1) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", "[PAD]\n[UNK]\n[MASK]\ncat\n", r"vocab\.txt: holds no \[CLS\]"),
        ("vocab.txt", "", r"vocab\.txt: holds no \[PAD\]"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[MASK]\n##cat\n", r"\(0 of 0 to \[UNK\]\)"),
        ("vocab.txt", SMALL + "dog\n", r"vocab\.txt: line 7 repeats 'dog' of line 6, so that its id would be 5 or 6"),
        ("vocab.txt", SMALL + "\n\nhare\n", r"vocab\.txt: line 8 repeats '' of line 7"),
        ("vocab.txt", SMALL + "[CLS]", r"vocab\.txt: line 7 repeats '\[CLS\]' of line 3"),
        ("vocab.txt", "[PAD]\n\xff\xfe\n", r"vocab\.txt: cannot be read as a vocabulary"),
        ("vocab.txt", "\0" * 9, r"vocab\.txt: cannot be read as a vocabulary \(it holds NUL"),
        *(
            ("tokenizer.json", text, r"tokenizer\.json: cannot be read as a vocabulary")
            for text in ("{", "[]", "3", "null", "[" * 100_000, '{"model": {"type": "WordPiece", "vocab": {"a": -1}}}')
        ),
    ],
)
def test_a_broken_vocabulary(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path))


def test_known_words_mapped_to_unk_are_an_error() -> None:
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[MASK]", "cat", "dog"])}
    pieces = tokenizers.Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))  # without BERT's splitting at spaces
    with pytest.raises(UserError, match=r"broken: the tokenizer maps known words to \[UNK\].*\(1 of 2 to \[UNK\]\)"):
        Tokenizer(pieces, "broken")


def test_words_with_their_pieces(tokenizer: Tokenizer) -> None:
    text = "a  skateboarder's\tt\u200bshirt \u200b café $50 日本 " + "x" * 101
    words = tokenizer.split(text)
    assert [(word.text, list(word.pieces)) for word in words] == [
        ("[CLS]", ["[CLS]"]),
        ("a", ["a"]),
        ("skateboarder's", ["skate", "##board", "##er", "'", "s"]),
        ("t\u200bshirt", ["ts", "##hir", "##t"]),
        ("café", ["cafe"]),
        ("$50", ["$", "50"]),
        ("日本", ["日", "本"]),
        ("x" * 101, ["[UNK]"]),
    ]
    pieces = [piece for word in words for piece in word.pieces]
    assert [tokenizer.pieces.id_to_token(index) for index in tokenizer([text]).input_ids[0].tolist()] == pieces
    assert [word.text for word in tokenizer.split("")] == ["[CLS]"]


def test_a_vocabulary_of_another_size_than_the_models(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    check_vocabulary(tokenizer, 30522)
    assert not capsys.readouterr().out
    check_vocabulary(tokenizer, 30592)  # as some models pad their embeddings; or another model's vocabulary
    assert (
        f"WARNING: {tokenizer.source}: 30522 word pieces, and bert_config's vocab_size is 30592"
        in capsys.readouterr().out
    )
    with pytest.raises(
        UserError, match=r"text_encoder.*: 30522 word pieces, and bert_config's vocab_size is 30521; pass"
    ):
        check_vocabulary(tokenizer, 30521)
