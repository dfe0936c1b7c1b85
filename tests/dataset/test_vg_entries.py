"""What a training file may hold, and what is said when it holds something else."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from config import PretrainConfig
from dataset.expressions import SURROGATE
from dataset.reading import DataError
from dataset.vg import TrainingEntry, load_entries

GOOD = {"image": "0.png", "caption": "a dog", "bbox": [[1, 2, 10, 20]]}


def configure(file: Path, rows: Any) -> PretrainConfig:
    """Write a training file; a config that reads it."""
    file.write_text(json.dumps(rows))
    return PretrainConfig(train_file=[str(file)], image_root="images")


def entries(file: Path, rows: Any) -> list[TrainingEntry]:
    return list(load_entries(file, configure(file, rows)))


MISSPELT = {
    "bbox": ("bboxes", "boxes", "box", "BBox"),
    "caption": ("captions", "Caption", "capton"),
    "image": ("img", "images", "image_path"),
}
BAD_BOXES = (
    *([1, 2, 3, 4], [[1, 2, 3]], [[1, 2, 3, 4], [1, 2, 3, 4, 5]], [["1", 2, 3, 4]], [[1, 2, 3, None]]),
    *([[1, 2, 3, True]], [[1, 2, 3, 2**53]], [[1, 2, 3, math.nan]], [[1, 2, -math.inf, 4]], "everywhere", {"x": 1}),
)


@pytest.mark.parametrize(
    ("row", "kind", "found"),
    [
        ("a dog", "an entry must be an object {key: value}", " (found a str)"),
        ({"caption": "a dog", "bbox": []}, "key 'image' is missing", ""),
        ({**GOOD, "image": 7}, "key 'image' must be of type str", " (found 7)"),
        ({**GOOD, "image": "\udc80.png"}, f"key 'image' {SURROGATE}", r" ('\udc80.png')"),
        ({"image": "0.png", "bbox": []}, "key 'caption' is missing", " (0.png)"),
        *(
            ({**GOOD, "caption": bad}, "key 'caption' must be a string or a list of strings", f" (0.png) (found {bad})")
            for bad in (None, [], ["a dog", 3])
        ),
        *(
            ({**GOOD, "caption": bad}, f"key 'caption' {SURROGATE}", f" (0.png) ({bad!r})")
            for bad in ("red \ud800 star", ["a dog", "\udfff"])
        ),
        *(
            (
                {other if key == known else key: value for key, value in GOOD.items()},
                f"unknown key '{other}'; did you mean '{known}'?",
                "" if known == "image" else " (0.png)",
            )
            for known, others in MISSPELT.items()
            for other in others
        ),
        *(
            ({**GOOD, "bbox": bad}, "key 'bbox' must be a list of [x1, y1, x2, y2]", f" (0.png) (found {bad!r})")
            for bad in BAD_BOXES
        ),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, row: Any, kind: str, found: str) -> None:
    file = tmp_path / "train.json"
    with pytest.raises(DataError) as refused:
        entries(file, [GOOD, row, GOOD])
    assert str(refused.value) == f"{kind} - 1 found:\n  {file}: entry 1{found}"


def test_every_malformed_entry_is_named(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    nameless = {"caption": "a dog"}
    with pytest.raises(DataError) as refused:
        entries(file, [nameless, GOOD, {**GOOD, "bbox": 1}, nameless])
    assert str(refused.value) == (
        f"key 'image' is missing - 2 found:\n  {file}: entry 0\n  {file}: entry 3\n"
        f"key 'bbox' must be a list of [x1, y1, x2, y2] - 1 found:\n  {file}: entry 2 (0.png) (found 1)"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "holds no entries"),
        (b"{}", "expected a JSON list, found a dict"),
        *((text, "not valid JSON") for text in (b'[{"image": "0.png", ', b"[{}] x")),
        (b'{"image": "0.png"}\n{"image": "0.png"}\n', "holds JSON lines, one value each; .*jq -s"),
        (b'[{"image": "0.png", "caption": "a", "caption": "b"}]', "an object holds the key 'caption' more than once"),
        (b"[" * 100_000, "lists or objects are nested too deeply"),
        (b'[{"bbox": [[0, 0, ' + b"9" * 5000 + b", 5]]}]", "an integer has thousands of digits"),
        (b"\0" * 100, r"not a text file \(it holds NUL characters"),
        (gzip.compress(b"[]", mtime=0), r"not a text file \(it is compressed by gzip: unpack it first"),
        (b"PK\x03\x04[]", r"not a text file \(it is a zip archive: unpack it first"),
        (b"\x80\x04[]", r"not a text file \('utf-8' codec can't decode byte 0x80"),
        (None, r"cannot be read \(No such file"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_no_list_of_entries(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "train.json"
    config = configure(file, [GOOD])
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{file}: {message}"):
        load_entries(file, config)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_byte_order_marks_and_line_ends_change_nothing(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "train.json"
    config = configure(file, [{**GOOD, "caption": "caf\u00e9"}, GOOD])
    expected = list(load_entries(file, config))
    text = json.dumps(json.loads(file.read_text()), indent=1, ensure_ascii=False).replace("\n", "\r\n")
    file.write_bytes(("\ufeff" + text).encode(encoding))
    assert list(load_entries(file, config)) == expected


def test_keys_of_their_own_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**GOOD, "image_id": 7, "relation": {"group": "dog"}, "boxes_of": []}, {"image": "1.png", "caption": "cat"}]
    assert len(entries(tmp_path / "train.json", rows)) == 2
    assert capsys.readouterr().out == ""


# ---- captions without content

EMPTY = ["", " ?! ", "\u200b", "\u00ad", "\x01\x02", "\ue000", "\u0301", "\u00a0\u3000", "\ufe0f", "- /"]


def test_captions_without_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.json"
    rows = [GOOD, *({**GOOD, "caption": caption} for caption in EMPTY), {**GOOD, "caption": ["?", "a cat", ""]}]
    config = configure(file, rows)
    kept = load_entries(file, config)
    said = f"warning: {file}: captions of which nothing is left once cleaned; as empty_captions says, "
    first = f" - {len(EMPTY) + 2} found:\n  {file}: entry 1 (0.png) ('')\n  {file}: entry 2 (0.png) (' ?! ')\n"
    assert capsys.readouterr().out.startswith(f"{said}they stay, and the model reads [CLS] alone{first}")
    assert [len(entry.captions) for entry in kept] == [1] * (len(EMPTY) + 1) + [3]
    assert kept[-1].captions[1] == "a cat"
    dropped = load_entries(file, config.model_copy(update={"empty_captions": "drop"}))
    assert [entry.captions for entry in dropped] == [["a dog"], ["a cat"]]
    assert capsys.readouterr().out.startswith(f"{said}they are left out{first}")
    configure(file, [rows[1]])
    assert len(load_entries(file, config)) == 1
    with pytest.raises(DataError, match=r"train\.json: holds no entries that have a caption"):
        load_entries(file, config.model_copy(update={"empty_captions": "drop"}))
