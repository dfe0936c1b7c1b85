"""Reading Flickr30k Entities in info-ground's form: order, boxes, splits, and what each broken file says."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import GroundingConfig
from dataset.expressions import Expression
from dataset.flickr import load_ids
from dataset.reading import DataError
from grounding.benchmarks import FLICKR
from tests.data_keys import data_keys

BOXES = {
    "11": {
        "boxes": {"1": [[0, 1, 20, 31]], "2": [[5, 5, 10, 10], [7, 7, 30, 20]], "4": []},
        "scene": ["3"],
        "nobox": [],
        "width": 64,
        "height": 48,
        "depth": 3,
    }
}


def phrase(text: str, phrase_id: Any) -> dict[str, Any]:
    return {"phrase": text, "phrase_id": phrase_id, "first_word_index": 0, "phrase_type": ["people"]}


SENTENCES = {
    "11": [
        {"sentence": "s", "phrases": [phrase("Two Men,", "2"), phrase("a street", "3")]},
        {"sentence": "t", "phrases": [phrase("the dog", "1"), phrase("nothing", "4"), phrase("they", "2")]},
    ]
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The three files of a split and an image."""
    (tmp_path / "test.txt").write_text("11\n\n")
    (tmp_path / "boxes.json").write_text(json.dumps(BOXES))
    (tmp_path / "sentences.json").write_text(json.dumps(SENTENCES))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "11.jpg").touch()
    return tmp_path


def load(root: Path, ids: tuple[str, ...] = ("test.txt",)) -> list[Expression]:
    ids_files = [str(root / name) for name in ids]
    boxes, sentences = ([str(root / f"{name}.json")] * len(ids) for name in ("boxes", "sentences"))
    files = {"image_ids_file": ids_files, "phrase_box_file": boxes, "sentences_file": sentences}
    return FLICKR.load(GroundingConfig(**files, image_root=str(root / "images")))


def test_every_phrase_with_boxes_in_order(root: Path) -> None:
    expressions = load(root)
    assert [expression.text for expression in expressions] == ["two men", "the dog", "they"]
    assert [expression.ref_id for expression in expressions] == [0, 1, 2]
    assert expressions[0].boxes.dtype == np.float64
    assert expressions[0].boxes.tolist() == [[5, 5, 5, 5], [7, 7, 23, 13]]
    assert expressions[1].boxes.tolist() == [[0, 1, 20, 30]]
    for expression in expressions:
        assert expression.image == root / "images" / "11.jpg"
        assert expression.record == {"image_height": 48, "image_width": 64, "split": "test"}
        assert (expression.split, expression.size, expression.detections) == ("test", (48, 64), None)


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (["people", "clothing"], ("people", "clothing")),
        ([], ()),
        ("people", ()),
        (None, ()),
        (["people", 3], ("people",)),
    ],
)
def test_categories_are_the_phrase_types(root: Path, types: Any, expected: tuple[str, ...]) -> None:
    row = {**phrase("the dog", "1"), "phrase_type": types}
    (root / "sentences.json").write_text(json.dumps({"11": [{"phrases": [row]}]}))
    assert load(root)[0].categories == expected
    del row["phrase_type"]
    (root / "sentences.json").write_text(json.dumps({"11": [{"phrases": [row]}]}))
    assert load(root)[0].categories == ()


def test_ref_ids_run_on_over_the_files(root: Path) -> None:
    (root / "val.txt").write_text("11\n")
    expressions = load(root, ("val.txt", "test.txt"))
    assert [expression.ref_id for expression in expressions] == [0, 1, 2, 3, 4, 5]
    assert [expression.split for expression in expressions] == ["val"] * 3 + ["test"] * 3


def test_golden_order(golden_data: Path) -> None:
    expressions = FLICKR.load(GroundingConfig(**data_keys("flickr", golden_data)))
    assert [expression.ref_id for expression in expressions] == list(range(24))
    assert [expression.image.stem for expression in expressions] == [str(1000 + i) for i in range(8) for _ in range(3)]


def test_phrases_are_cut_to_fifty_words(root: Path) -> None:
    (root / "sentences.json").write_text(json.dumps({"11": [{"phrases": [phrase("a " * 51, "1")]}]}))
    assert load(root)[0].text == " ".join(["a"] * 50)


@pytest.mark.parametrize(
    ("path", "split"),
    [("flickr/val.txt", "val"), ("flickr/test.txt", "test"), ("val/my_val_ids.txt", "val"), ("eval/test.txt", "test")],
)
def test_the_split_is_that_of_the_file_name(
    root: Path, capsys: pytest.CaptureFixture[str], path: str, split: str
) -> None:
    (root / path).parent.mkdir()
    (root / path).write_text("11\n")
    assert load(root, (path,))[0].split == split
    warning = f"warning: {root}/eval/test.txt counts as test, by its file name; the release would count it as val, "
    printed = capsys.readouterr().out
    assert printed.startswith(warning) if path == "eval/test.txt" else printed == ""


def test_lists_of_unequal_length() -> None:
    files = {"image_ids_file": ["a"], "phrase_box_file": ["a"], "sentences_file": ["b", "c"]}
    with pytest.raises(DataError, match=r"must be lists of equal length.*they have 1, 1 and 2 entries"):
        FLICKR.load(GroundingConfig(**files, image_root=""))


IMAGE = BOXES["11"]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ({}, r"the image id has no entry; check that phrase_box_file .*\n.*boxes\.json: image 11"),
        ({"11": {"boxes": {}, "height": 48}}, r"key 'width' is missing - 1 found:\n.*boxes\.json: image 11"),
        ({"11": {**IMAGE, "height": "48"}}, r"key 'height' must be of type int.*\n.*\(found '48'\)"),
        *(
            (
                {"11": {**IMAGE, "height": height}},
                r"'height' and 'width' must be the image's pixels.*\n.*image 11 \(found ",
            )
            for height in (0, -48, 65_536, 10**18)
        ),
        ({"11": {**IMAGE, "width": 0}}, r"'height' and 'width' must be .*\n.*\(found 48 and 0\)"),
        ({"11": {**IMAGE, "height": 10**400}}, r"key 'height' must be of type int.*\n.*\(found 1000"),
        ({"11": {**IMAGE, "boxes": {"1": [[1, 2, 3, 10**400]]}}}, r"boxes of a phrase id must be a list of boxes"),
        ({"11": {**IMAGE, "boxes": [1]}}, r"key 'boxes' must be of type dict"),
        ({"11": {**IMAGE, "boxes": {"1": [1, 2, 3, 4]}}}, r"boxes of a phrase id must be a list of boxes"),
        ({"11": {**IMAGE, "boxes": {}}}, r"sentences\.json: no phrase has boxes; do the files match\?"),
        ([], r"boxes\.json: expected a JSON dict, found a list"),
    ],
)
def test_broken_boxes(root: Path, boxes: Any, message: str) -> None:
    (root / "boxes.json").write_text(json.dumps(boxes))
    with pytest.raises(DataError, match=message):
        load(root)


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        ({}, r"the image id has no list of sentences; check that sentences_file .*\n.*sentences\.json: image 11"),
        ({"11": [{"phrases": []}, {}]}, r"key 'phrases' is missing - 1 found:\n.*image 11, sentence 1"),
        (
            {"11": [{"phrases": [phrase("a", "1"), phrase("b", 1)]}]},
            r"'phrase_id' must be of type str.*\n.*phrase 1 ",
        ),
        (
            {"11": [{"phrases": [phrase("a \udfff", "1")]}]},
            r"'phrase' holds half of a surrogate pair.*\n.*sentence 0, phrase 0 \('a \\udfff'",
        ),
        ({"11": [{"phrases": [{"phrase_id": "1"}]}]}, r"key 'phrase' is missing"),
        ({"11": ["cat"]}, r"an entry must be an object.*\n.*image 11, sentence 0 \(found a str\)"),
    ],
)
def test_broken_sentences(root: Path, sentences: Any, message: str) -> None:
    (root / "sentences.json").write_text(json.dumps(sentences))
    with pytest.raises(DataError, match=message):
        load(root)


@pytest.mark.parametrize("name", ["boxes.json", "sentences.json"])
@pytest.mark.parametrize(("key", "again"), [("11", '"11": {}, "11"'), ("phrase_id", '"phrase_id": "9", "phrase_id"')])
def test_a_repeated_key_is_named(root: Path, name: str, key: str, again: str) -> None:
    text = (root / name).read_text()
    if key == "phrase_id" and name == "boxes.json":
        key, again = "2", '"2": [], "2"'
    (root / name).write_text(text.replace(f'"{key}":', f"{again}:", 1))
    with pytest.raises(DataError, match=rf"{name}: an object holds the key '{key}' more than once"):
        load(root)


def test_an_image_id_that_is_listed_twice_would_count_twice(root: Path) -> None:
    (root / "test.txt").write_text("11\r\n12\r\n11\r\n")
    match = r"image id is listed more than once; .* - 1 found:\n  .*test\.txt: image 11 \(2 times\)"
    for read in (lambda: load(root), lambda: load_ids(str(root / "test.txt"))):
        with pytest.raises(DataError, match=match):
            read()


def test_a_phrase_without_content_stays_and_is_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phrases = [phrase("...", "1"), phrase("the dog", "1"), phrase("\u200b", "3")]  # the last has no boxes
    (root / "sentences.json").write_text(json.dumps({"11": [{"phrases": phrases}]}))
    assert [expression.text for expression in load(root)] == ["", "the dog"]
    file = root / "sentences.json"
    assert capsys.readouterr().out == (
        f"warning: {file}: nothing is left of a text once cleaned; it stays, and the model reads [CLS] alone"
        f" - 1 found:\n  {file}: image 11, sentence 0, phrase 0 ('...')\n"
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_of_windows_editors(root: Path, encoding: str) -> None:
    expected = [expression.text for expression in load(root)]
    for name in ("test.txt", "boxes.json", "sentences.json"):
        text = (root / name).read_text().replace('", ', '",\n').strip() + "\n"
        (root / name).write_text(text, encoding=encoding, newline="\r\n")
    assert [expression.text for expression in load(root)] == expected


def test_a_missing_image_is_named_once(root: Path) -> None:
    (root / "images" / "11.jpg").unlink()
    with pytest.raises(
        DataError,
        match=r"image file does not exist; check image_root .*--skip_broken - 1 found:\n.*test\.txt: image 11",
    ):
        load(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", r"ids\.txt: lists no image ids"),
        (b"\xef\xbb\xbf", r"ids\.txt: lists no image ids"),
        (b"\xff\xfe\x00", r"ids\.txt: not a text file"),
        (b"caf\xe9", r"ids\.txt: not a text file"),
        (b"1\x001\x00", r"ids\.txt: not a text file \(it holds NUL characters"),
        (gzip.compress(b"11", mtime=0), r"ids\.txt: not a text file \(it is compressed by gzip: unpack it first"),
    ],
)
def test_broken_ids(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "ids.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_ids(str(tmp_path / "ids.txt"))


def test_missing_ids(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.txt: cannot be read .*check image_ids_file in the config"):
        load_ids(str(tmp_path / "no.txt"))
