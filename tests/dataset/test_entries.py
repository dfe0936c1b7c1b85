"""Packed entries: what is read back, where they lie, when they are made anew; and large training files, streamed."""

import io
import json
import os
import pickle
import platform
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import files
from config import PretrainConfig
from dataset import reading, vg
from dataset.loader import entries
from dataset.loader.entries import PackedEntries, RawEntry, pack
from dataset.reading import DataError, read_list
from dataset.vg import TrainingData, load_entries, packed_entries

ROWS: list[dict[str, Any]] = [
    {"image": "a/0.png", "caption": "a dog", "bbox": [[1, 2.5, 10, 20]]},
    {"image": "b é.png", "caption": ["Ein Hündchen!", "犬 \u2028", "a cat"]},
    {"image": "a/0.png", "caption": "two", "bbox": [[-1.1e-7, 0, 2**53 - 1, 0.1], [3, 4, 5, 6]]},
]


def packed(rows: list[RawEntry]) -> bytes:
    out = io.BytesIO()
    pack(rows, out)
    return out.getvalue()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "train.json"
    path.parent.mkdir()
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture
def config(file: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    """A config of a file that counts as large."""
    monkeypatch.setattr(vg, "LARGE", 1)
    return PretrainConfig(train_file=[str(file)], image_root="images")


def packed_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.packed"))


# ---- what is read back


def test_entries_come_back_as_they_were() -> None:
    rows = [RawEntry(2 * i, row["image"], [str(row["caption"])], row.get("bbox", [])) for i, row in enumerate(ROWS)]
    found = PackedEntries(packed(rows), "t.json", "root")
    assert len(found) == 3
    for row, entry in zip(rows, found, strict=True):
        assert entry[:4] == (Path("root", row.image), row.captions, row.boxes, f"t.json: entry {row.row} ({row.image})")
        assert [type(x) for box in entry.boxes for x in box] == [type(x) for box in row.boxes for x in box]
    assert found[-1] == found[2]
    assert found[0:2] == [found[0], found[1]]
    assert found.boxed.tolist() == [1, 0, 1]
    assert list(found.images()) == [(found[i].image, found[i].source) for i in (0, 1)]
    for index in (3, -4):
        with pytest.raises(IndexError):
            found[index]


def test_the_bytes_are_those_of_any_machine() -> None:
    """Numbers are little-endian wherever they are written: a folder may be shared by machines that differ."""
    content = packed([RawEntry(3, "a", ["b"], [])])
    text = b'["a",["b"],[]]'
    numbers = (len(text), 3, 0)
    checked = text + struct.pack("<3q", *numbers) + b"\0\0"
    head = struct.pack("<7q", len(text), 8, 8, 8, 1, 1, zlib.crc32(checked))
    assert content == checked + head + b"amc entries 3\n"


def test_no_entries() -> None:
    found = PackedEntries(packed([]), "t.json", "root")
    assert list(found) == list(found.images()) == []


@pytest.mark.parametrize("mapped", [False, True])
def test_another_process_gets_the_same(mapped: bool, tmp_path: Path) -> None:
    content = packed([RawEntry(i, f"{i % 300}.png", ["a dog"], []) for i in range(1000)])
    (tmp_path / "x.packed").write_bytes(content)
    found = PackedEntries(tmp_path / "x.packed" if mapped else content, "t.json", "root")
    sent = pickle.dumps(found)
    assert list(pickle.loads(sent)) == list(found)
    assert (len(sent) < 1000) == mapped  # a mapped file is not copied


def test_every_damage_is_found() -> None:
    content = packed([RawEntry(i, f"{i}.png", ["a dog"], [[1, 2, 3, 4]]) for i in range(3)])
    PackedEntries(content, "t.json", "root").verify()
    for place in range(len(content)):
        for damaged in (content[:place], content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]):
            with pytest.raises(ValueError, match="packed entries"):
                PackedEntries(damaged, "t.json", "root").verify()


# ---- the file


def test_a_large_file_is_packed_once(
    file: Path, config: PretrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_entries(file, config)
    assert [entry.captions for entry in expected] == [["a dog"], ["ein hündchen", "犬", "a cat"], ["two"]]
    assert list(packed_entries(str(file), config)) == expected
    (path,) = packed_files(file.parent)
    assert capsys.readouterr().out == f"{file}: packing its entries into {path}, once\n"
    monkeypatch.setattr(vg, "pack", None)  # nothing is made again
    again = packed_entries(str(file), config)
    assert list(again) == expected
    assert again.packed == path
    assert capsys.readouterr().out == ""


def test_a_small_file_is_not_packed_unless_a_folder_is_named(file: Path, tmp_path: Path) -> None:
    config = PretrainConfig(train_file=[str(file)], image_root="images")
    assert list(packed_entries(str(file), config)) == load_entries(file, config)
    assert os.listdir(file.parent) == ["train.json"]
    packed_entries(str(file), config, str(tmp_path / "new" / "cache"))
    assert len(packed_files(tmp_path / "new" / "cache")) == 1
    assert os.listdir(file.parent) == ["train.json"]


@pytest.mark.parametrize("option", [{"max_words": 1}, {"image_root": "other"}, {"empty_captions": "drop"}])
def test_how_it_is_read_decides(file: Path, config: PretrainConfig, option: dict[str, Any]) -> None:
    """Each reading has its own file, and they stay side by side: runs may use them at the same time."""
    other = config.model_copy(update=option)
    for each in (config, other, config):
        assert list(packed_entries(str(file), each)) == list(load_entries(file, each))
    assert len(packed_files(file.parent)) == 2


def test_another_content_replaces_it(
    file: Path, config: PretrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bystander = file.parent / "other.json.0123456789ab-0123456789ab.packed"
    bystander.touch()
    old = packed_entries(str(file), config)
    before = list(old)
    file.write_text(json.dumps(ROWS[:1]))
    assert list(packed_entries(str(file), config)) == before[:1]
    assert f"{Path(str(old.packed))}: removed, packed from an earlier content of {file}\n" in capsys.readouterr().out
    assert list(old) == before  # who has it mapped keeps it
    monkeypatch.setattr(vg, "FORM", b"amc entries 0\n")  # so does another form
    packed_entries(str(file), config)
    assert len(packed_files(file.parent)) == 2
    assert bystander.exists()


@pytest.mark.parametrize("damage", ["emptied", "cut", "changed", "of another form", "a folder's"])
def test_a_damaged_one_is_made_anew(file: Path, config: PretrainConfig, damage: str) -> None:
    path = Path(str(packed_entries(str(file), config).packed))
    content = path.read_bytes()
    damaged = {
        "emptied": b"",
        "cut": content[:-1],
        "changed": b"x" + content[1:],
        "of another form": content[: -len(entries.FORM)] + b"amc entries 1\n",
    }
    path.write_bytes(damaged.get(damage, content))
    if damage == "a folder's":
        path.unlink()
        path.mkdir()
        with pytest.raises(DataError, match=r"--cache_dir"):
            packed_entries(str(file), config)
        return
    packed_entries(str(file), config)
    assert path.read_bytes() == content


@pytest.mark.parametrize("cached", [False, True])
def test_a_folder_that_cannot_be_written(
    file: Path, config: PretrainConfig, tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(file.parent))

    if not cached:
        monkeypatch.setattr(Path, "open", refuse)  # root may write everywhere
    with pytest.raises(DataError, match=rf"; name a folder by --cache_dir for the packed entries of {file}$"):
        packed_entries(str(file), config, str(blocked / "cache") if cached else None)
    assert packed_files(file.parent) == []


def test_entries_that_cannot_be_used_leave_no_file(file: Path, config: PretrainConfig) -> None:
    file.write_text(json.dumps([*ROWS, {"caption": "x"}]))
    with pytest.raises(DataError, match=rf"key 'image' is missing - 1 found:\n  {file}: entry 3$"):
        packed_entries(str(file), config)
    assert os.listdir(file.parent) == ["train.json"]


def test_files_of_one_name_share_a_folder(
    file: Path, config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (other := tmp_path / "train.json").write_text(json.dumps(ROWS[:1]))
    for _ in range(2):
        for path, rows in ((file, 3), (other, 1)):
            assert len(packed_entries(str(path), config, str(tmp_path / "cache"))) == rows
    assert len(packed_files(tmp_path / "cache")) == 2
    said = capsys.readouterr().out
    assert said.count("packing its entries") == 2
    assert "removed" not in said


def test_a_file_that_changes_while_it_is_read(
    file: Path, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(path: str) -> list[Any]:
        file.write_text(json.dumps(ROWS[:1]))
        return ROWS

    monkeypatch.setattr(vg, "read_list", rows)
    with pytest.raises(DataError, match=rf"^{file}: changed while it was read; start again"):
        packed_entries(str(file), config)
    assert os.listdir(file.parent) == ["train.json"]


def test_what_a_killed_process_left_is_removed(file: Path, config: PretrainConfig) -> None:
    left = file.parent / f".{file.name}.0123456789ab-0123456789ab.packed.{os.getpid()}@{platform.node()}.tmp"
    left.touch()
    packed_entries(str(file), config)
    assert not left.exists()


@pytest.mark.parametrize(("rank", "local", "makes"), [(0, "0", [0]), (1, "1", []), (8, "0", [1])])
def test_one_process_of_each_machine_makes_it(
    file: Path, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, rank: int, local: str, makes: list[int]
) -> None:
    """Rank 0 first; then the first of each other machine, which has nothing to do if the folder is shared."""
    made, passed = list[int](), list[int]()
    packed_entries(str(file), config)
    monkeypatch.setattr(vg, "rank", lambda: rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(vg, "barrier", lambda: passed.append(1))
    monkeypatch.setattr(vg, "_make_packed", lambda *_: made.append(len(passed)))
    packed_entries(str(file), config)
    assert made == makes
    assert len(passed) == 2
    monkeypatch.setattr(vg, "LARGE", 1 << 30)  # all pass as many barriers, whatever their files are
    packed_entries(str(file), config)
    assert len(passed) == 4


def test_training_data_of_packed_files(file: Path, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are looked for once, whichever files name them."""
    looked: list[str] = []

    def look(path: Path) -> bool:
        looked.append(str(path))
        return True

    monkeypatch.setattr("os.path.isfile", look)
    data = TrainingData(config.model_copy(update={"train_file": [str(file)] * 2}), seed=0)
    assert [data.entries[index].source for index in (3, 4, 5)] == [entry.source for entry in load_entries(file, config)]
    assert data.boxed.tolist() == [True, False, True] * 2
    assert looked == ["images/a/0.png", "images/b é.png"]


# ---- large files are streamed


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WHOLE", 0)
    monkeypatch.setattr(reading, "load_json", None)
    monkeypatch.setattr(reading, "PIECE", 50)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_stream_gives_what_the_whole_file_does(file: Path, encoding: str) -> None:
    text = json.dumps(ROWS, indent=1, ensure_ascii=False).replace("\n", "\r\n")
    file.write_bytes(text.encode(encoding))
    assert list(read_list(file)) == ROWS


GOOD = '{"image": "0.png", "caption": "a dog", "bbox": []}'


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected a JSON list, found an object; .* jq -s"),
        (f"{GOOD}\n{GOOD}\n", "expected a JSON list, found an object; .* jq -s"),
        (f"[{GOOD}, {GOOD[:-9]}", r"entry 1: not valid JSON \(.*\); is the file complete\?"),
        (f"[{GOOD}, {GOOD}", r"entry 1: not valid JSON \(Expecting ',' delimiter\); is the file complete\?"),
        (f"[{GOOD}] x", "entry 1: not valid JSON"),
        (f"[{GOOD},\u00a0{GOOD}]", "entry 1: not valid JSON"),
        (f'[{GOOD}, {{"a": 1, "a": 2}}]', "entry 1: an object holds the key 'a' more than once"),
        ("[" * 100_000, "entry 0: lists or objects are nested too deeply"),
        (f"[{GOOD}, {'9' * 5000}]", "entry 1: an integer has thousands of digits"),
        ("\0" * 100, "entry 0: not valid JSON"),
        (b"\x1f\x8b[]", r"not a text file \(it is compressed"),
        (b"PK\x03\x04[]", r"not a text file \(it is compressed"),
        (f"[{GOOD}, ".encode() + b'"\xff', r"not a text file \(invalid start byte\), after \d entries"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_stream_that_breaks_off(file: Path, content: str | bytes, message: str) -> None:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    config = PretrainConfig(train_file=[str(file)], image_root="images")
    with pytest.raises(DataError, match=rf"^{re.escape(str(file))}: {message}"):
        load_entries(file, config)


def allocated(call: Callable[[], object]) -> int:
    """The peak in bytes of what a call allocates."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing keeps a few bytes of each entry; the entries as objects would take ten times as much."""
    monkeypatch.setattr(reading, "WHOLE", 0)
    monkeypatch.setattr(reading, "PIECE", 1 << 12)
    monkeypatch.setattr(files, "BLOCK", 1 << 12)
    file = tmp_path / "train.json"
    count = 4000
    file.write_text("[" + ",\n".join(GOOD.replace("0.png", f"{i}.png") for i in range(count)) + "]")
    config = PretrainConfig(train_file=[str(file)], image_root="images")
    packed_entries(str(file), config, str(tmp_path / "first"))  # what the first call imports is no part of the file
    whole = allocated(lambda: list(read_list(file)))
    packing = allocated(lambda: packed_entries(str(file), config, str(tmp_path / "cache")))
    assert whole > 400 * count
    assert packing < 100 * count + (1 << 17)
    (path,) = packed_files(tmp_path / "cache")
    assert path.stat().st_size < 100 * count
