"""Reading RefCOCO+ and RefCLEF: what comes out, and what each broken file says."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import GroundingConfig
from dataset.expressions import Expression
from dataset.reading import DataError
from dataset.refer import load_refer, load_refs
from dataset.text import has_content
from grounding.benchmarks import REFCLEF, REFCOCO_PLUS, Benchmark

REF = {"ref_id": 7, "ann_id": 70, "image_id": 700, "split": "testA", "file_name": "unreliable_7.jpg", "sentences": []}
ANNOTATION = {"id": 70, "image_id": 700, "bbox": [10.1, 20.2, 30.3, 40.4], "category_id": 1}
IMAGE = {"id": 700, "width": 64, "height": 48, "file_name": "unreliable.jpg"}
INSTANCES = {"images": [IMAGE], "annotations": [ANNOTATION], "categories": []}
ENTRY = {"image": "folder/7.png", "text": "The red-hat!", "ref_id": 7, "split": "testC"}
REFS = "refer/refcoco+/refs(unc).p"
TABLES = "refer/refcoco+/instances.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A test file, REFER's files, detections and an image, of one expression; RefCLEF's are those of RefCOCO+."""
    (tmp_path / "refer" / "refcoco+").mkdir(parents=True)
    (tmp_path / "refer" / "refclef").symlink_to("refcoco+")
    write(tmp_path, REFS, [REF])
    write(tmp_path, TABLES, INSTANCES)
    write(tmp_path, "test.json", [ENTRY])
    write(tmp_path, "dets.json", {"700": [[1, 2, 3, 4, 0.9], [5.5, 6, 7, 8]]})
    (tmp_path / "images" / "folder").mkdir(parents=True)
    (tmp_path / "images" / "folder" / "7.png").touch()
    return tmp_path


def write(root: Path, name: str, content: Any) -> Path:
    """Write a file: a text as it is, refs as a pickle, other things as JSON."""
    path = root / name
    if isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".p":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        path.write_text(json.dumps(content))
    return path


def load(root: Path, benchmark: Benchmark = REFCOCO_PLUS) -> list[Expression]:
    paths = {"image_root": str(root / "images"), "refcoco_data": str(root / "refer")}
    files = {"test_file": [str(root / "test.json")], "det_file": str(root / "dets.json")}
    return benchmark.load(GroundingConfig(**paths, **files))


def refs_of(path: Path) -> list[dict[str, Any]]:
    return list(load_refs(path).values())


def test_an_expression_of_refcoco(root: Path) -> None:
    (expression,) = load(root)
    assert expression.image == root / "images" / "folder" / "7.png"
    assert (expression.text, expression.ref_id, expression.split) == ("the red hat", 7, "testA")
    assert expression.boxes.dtype == np.float64
    assert expression.boxes.tolist() == [[10.1, 20.2, 30.3, 40.4]]
    assert expression.detections is not None
    assert expression.detections.tolist() == [[1, 2, 3, 4], [5.5, 6, 7, 8]]
    assert expression.record == {"image_path": "folder/7.png"}  # the entry's own, wherever the images are
    assert expression.annotated_size is None  # evaluation goes by the image file


def test_an_expression_of_refclef_takes_its_own_split(root: Path) -> None:
    (expression,) = load(root, REFCLEF)
    assert expression.split == "test"
    assert expression.detections is None
    assert expression.record == {"image_path": "folder/7.png", "split": "testC"}


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        ([{"supercategory": "person", "id": 1, "name": "person"}, {"id": 2, "name": "dog"}], ("person",)),
        ([{"id": 2, "name": "dog"}], ()),
        (None, ()),
        ("person", ()),
        ([{"id": 1, "name": 5}, {"id": 1}, {"name": "x"}, 7, {"id": [1], "name": "x"}], ()),
    ],
)
def test_the_category_is_that_of_the_annotation_where_it_is_named(
    root: Path, categories: Any, expected: tuple[str, ...]
) -> None:
    write(root, TABLES, {**INSTANCES, "categories": categories})
    assert load(root)[0].categories == expected
    write(root, TABLES, {**INSTANCES, "categories": categories, "annotations": [{**ANNOTATION, "category_id": [1]}]})
    assert load(root)[0].categories == ()


def test_what_need_not_be_there(root: Path) -> None:
    """An image's size in instances.json, and anything that was detected."""
    write(root, TABLES, {"images": [], "annotations": [ANNOTATION]})
    write(root, "dets.json", {"700": []})
    (expression,) = load(root)
    assert expression.detections is not None
    assert expression.detections.shape == (0, 4)


def test_order_is_that_of_the_files(root: Path) -> None:
    write(root, REFS, [{**REF, "ref_id": 8, "split": "val"}, REF])
    rows = [{**ENTRY, "text": "a " * 31}, {**ENTRY, "ref_id": 8}, {**ENTRY, "text": "a man"}]
    write(root, "test.json", rows)
    found = [(one.ref_id, one.split, one.text) for one in load(root)]
    thirty_words = " ".join(["a"] * 30)
    assert found == [(7, "testA", thirty_words), (8, "val", "the red hat"), (7, "testA", "a man")]


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{**ENTRY, "ref_id": 99}], r"ref_id is not in .*refs\(unc\)\.p; .* - 1 found:\n.*entry 0 \(ref_id 99\)"),
        (
            [ENTRY, {**ENTRY, "text": "red \ud800"}],
            r"'text' holds half of a surrogate pair.*\n.*entry 1 \('red \\ud800'",
        ),
        ([{**ENTRY, "image": "\udc00.png"}], r"'image' holds half of a surrogate pair.*\n.*entry 0 \('\\udc00\.png'"),
        ([{**ENTRY, "image": "x" * 300}], r"the image file does not exist; .*\n.*entry 0 \(.*xxx"),
        ([{**ENTRY, "image": "../7.png"}], r"leads out of image_root.*\n.*entry 0"),
        ([{**ENTRY, "ref_id": 10**400}], r"key 'ref_id' must be of type int.*\n.*entry 0 \(found 1000"),
        ([{**ENTRY, "ref_id": "7"}], r"key 'ref_id' must be of type int - 1 found:\n.*entry 0 \(found '7'\)"),
        ([{**ENTRY, "ref_id": True}], r"key 'ref_id' must be of type int.*\n.*\(found True\)"),
        ([{**ENTRY, "text": ["a"]}], r"key 'text' must be of type str"),
        ([without(ENTRY, "image")], r"key 'image' is missing - 1 found:\n.*test\.json: entry 0"),
        (["cat"], r"an entry must be an object.*\n.*entry 0 \(found a str\)"),
        (
            [{**ENTRY, "image": "8.png"}] * 2,
            r"file does not exist; check image_root .*--skip_broken - 1 found:\n.*entry 0 \(.*8\.png\)",
        ),
        ([], r"test\.json: holds no entries"),
        ({"a": 1}, r"test\.json: expected a JSON list, found a dict"),
    ],
)
def test_broken_entries(root: Path, entries: Any, message: str) -> None:
    write(root, "test.json", entries)
    with pytest.raises(DataError, match=message):
        load(root)


def test_refclef_needs_a_split_in_the_entry(root: Path) -> None:
    write(root, "test.json", [without(ENTRY, "split")])
    assert load(root)[0].split == "testA"
    with pytest.raises(DataError, match=r"key 'split' is missing"):
        load(root, REFCLEF)


def test_many_problems_make_one_message(root: Path) -> None:
    entries = [{**ENTRY, "ref_id": 100 + i} for i in range(8)] + [{**ENTRY, "text": None}, {**ENTRY, "image": "no.png"}]
    write(root, "test.json", entries)
    write(root, TABLES, {**INSTANCES, "images": [{}]})
    with pytest.raises(DataError) as caught:
        load(root)
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["key 'id' is missing - 1 found:", f"  {root / TABLES}: images entry 0"]
    assert lines[2].endswith("- 8 found:")
    assert [line.rpartition("(")[2] for line in lines[3:8]] == [f"ref_id {100 + i})" for i in range(5)]
    assert lines[8] == "  and 3 more"
    assert lines[9].startswith("key 'text' must be of type str")
    assert lines[11].startswith("the image file does not exist")
    assert len(lines) == 13


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        ("{}", r"the image has no detections in .*dets\.json; check that det_file .*\n.*entry 0 \(image_id 700\)"),
        ('{"700": [[1, 2, 3]]}', r"dets\.json: the image's detections must be a list of boxes, each four"),
        ('{"700": [[1, 2, 3, NaN]]}', r"each four finite numbers"),
        ('{"700": [[1, 2, 3, "4"]]}', r"each four finite numbers"),
        (f'{{"700": [[1, 2, 3, {10**400}]]}}', r"each four finite numbers"),
        ('{"700": [], "7": [], "700": []}', r"dets\.json: an object holds the key '700' more than once"),
        ("[]", r"dets\.json: expected a JSON dict, found a list"),
        ("{", r"dets\.json: not valid JSON"),
    ],
)
def test_broken_detections(root: Path, detections: str, message: str) -> None:
    write(root, "dets.json", detections)
    with pytest.raises(DataError, match=message):
        load(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": []}, r"the ref's annotation is not in .*\n.*\(ref_id 7, ann_id 70\)"),
        ({"annotations": [without(ANNOTATION, "bbox")]}, r"'bbox' of the ref's annotation must be"),
        ({"annotations": [{**ANNOTATION, "bbox": [10**400, 1, 2, 3]}]}, r"'bbox' of the ref's .* a list of boxes"),
        ({"annotations": [without(ANNOTATION, "id")]}, r"key 'id' is missing.*\n.*annotations entry 0"),
        (
            {"annotations": [ANNOTATION, {**ANNOTATION, "bbox": [0, 0, 1, 1]}]},
            r"an earlier entry has the same id, .* - 1 found:\n.*instances\.json: annotations entry 1 \(id 70\)",
        ),
        (
            {"annotations": [ANNOTATION, *[{**ANNOTATION, "id": "7_2"}] * 2]},
            r"an earlier entry has the same id, .* - 1 found:\n.*annotations entry 2 \(id 7_2\)",
        ),
        (
            {"images": [IMAGE, {**IMAGE, "width": 5}, IMAGE]},
            r"an earlier entry has the same id, .* - 2 found:\n.*images entry 1 \(id 700\)\n.*images entry 2",
        ),
        ({"images": [{**IMAGE, "id": "700"}]}, r"key 'id' must be of type int - 1 .*\n.*images entry 0"),
        (
            {"images": [{**IMAGE, "height": 0}]},
            r"'height' and 'width' of the ref's image must be positive.*\n.*\(image_id 700, found 0 and 64\)",
        ),
        (
            {"annotations": None},
            r"instances\.json: key 'annotations' must be a list; is this REFER's instances\.json\?",
        ),
    ],
)
def test_broken_instances(root: Path, change: dict[str, Any], message: str) -> None:
    write(root, TABLES, INSTANCES | change)
    with pytest.raises(DataError, match=message):
        load(root)


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ({"a": 1}, r"refs\(unc\)\.p: expected a pickled list of refs, found a dict"),
        ([without(REF, "ann_id")], r"key 'ann_id' is missing - 1 found:\n.*refs\(unc\)\.p: ref 0"),
        ([REF, {**REF, "split": None}], r"key 'split' must be of type str.*\n.*ref 1 \(found None\)"),
        (
            [REF, {**REF, "image_id": 701, "ann_id": 71}],
            r"an earlier entry has the same ref_id, .* - 1 found:\n.*refs\(unc\)\.p: ref 1 \(ref_id 7\)",
        ),
        ([{**REF, "ann_id": 7.5}], r"key 'ann_id' must be of type int or str - 1 found:\n.*ref 0 \(found 7\.5\)"),
        (
            [{**REF, "ref_id": 10**5000}],
            r"key 'ref_id' must be of type int.*\n.*\(found an integer of thousands of digits",
        ),
        ([{**REF, "image_id": "700"}], r"key 'image_id' must be of type int - 1 found"),
        ([{key.encode(): value for key, value in REF.items()}], r"names the global _codecs\.encode"),
        ([[REF]], r"an entry must be an object .* - 1 found:\n.*ref 0 \(found a list\)"),
        ([{**REF, "split": "\ud800"}], r"key 'split' holds half of a surrogate pair"),
        ("", r"refs\(unc\)\.p: not a readable pickle .* is the download complete\?"),
        ("<html>404</html>", r"refs\(unc\)\.p: not a readable pickle .* is the download complete\?"),
        (pickle.dumps([REF], 0).decode()[:-9], r"refs\(unc\)\.p: not a readable pickle .* is the download complete\?"),
    ],
)
def test_broken_refs(root: Path, refs: Any, message: str) -> None:
    write(root, REFS, refs)
    with pytest.raises(DataError, match=message):
        load(root)


def test_annotation_ids_of_refclef_are_texts(root: Path) -> None:
    write(root, REFS, [{**REF, "ann_id": "8756_2"}, {**REF, "ref_id": 8}])
    other = {**ANNOTATION, "id": "8756_2", "bbox": [1, 2, 3, 4]}
    write(root, TABLES, {**INSTANCES, "annotations": [ANNOTATION, other]})
    write(root, "test.json", [ENTRY, {**ENTRY, "ref_id": 8}])
    assert [one.boxes.tolist() for one in load(root, REFCLEF)] == [[[1, 2, 3, 4]], [[10.1, 20.2, 30.3, 40.4]]]


@pytest.mark.parametrize(
    "text", [" .! ", "", "\u200b", "\u00ad?", "\x01\x02", "\ue000", "\u0301", "\u00a0", "\ufeff\n"]
)
def test_a_text_without_content_stays_and_is_counted(root: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    others = [{**ENTRY, "text": other} for other in ("?", "a dog")]
    file = write(root, "test.json", [ENTRY, {**ENTRY, "text": text}, *others])
    expressions = load(root)
    assert [expression.text for expression in expressions[::3]] == ["the red hat", "a dog"]
    assert not has_content(expressions[1].text)
    kind = "nothing is left of a text once cleaned; it stays, and the model reads [CLS] alone - 2 found:"
    places = f"  {file}: entry 1 ({text!r})\n  {file}: entry 2 ('?')\n"
    assert capsys.readouterr().out == f"warning: {file}: {kind}\n{places}"


def test_refs_keep_their_order(root: Path) -> None:
    refs = [{**REF, "ref_id": ref_id} for ref_id in (9, 7, 8)]
    assert refs_of(write(root, REFS, refs)) == refs


@pytest.mark.parametrize("data", [b"\x80\x02]r\xff\xff\xff\x7f.", b"(lp2147483647\n.", b"]r\x00\x00\x00\x10."])
def test_a_pickle_that_asks_for_all_memory(tmp_path: Path, data: bytes) -> None:
    """Its list is numbered 2,147,483,647: an unpickler with a table of numbers would make one of that size."""
    (tmp_path / "refs(unc).p").write_bytes(data)
    assert refs_of(tmp_path / "refs(unc).p") == []


def test_missing_files(root: Path) -> None:
    with pytest.raises(DataError, match=r"refs\(google\)\.p: cannot be read .*check refcoco_data in the config"):
        load_refer(root / "refer" / "refclef", "google")
    (root / TABLES).unlink()
    with pytest.raises(DataError, match=r"instances\.json: cannot be read"):
        load(root)


class Payload:
    """Runs a command when unpickled by a plain pickle.load."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_code_is_refused(root: Path, protocol: int) -> None:
    trace = root / "ran"
    path = root / REFS
    path.write_bytes(pickle.dumps([REF, Payload(f"touch {trace}")], protocol))
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: names the global (posix|nt)\.system.* it could run code"):
        load(root)
    assert not trace.exists()
    pickle.loads(path.read_bytes())  # the payload is a live one
    assert trace.exists()


@pytest.mark.parametrize("code", [b"cbuiltins\neval\n.", b"c__builtin__\nexec\n.", b"cbuiltins\ngetattr\n."])
def test_other_builtins_are_refused(tmp_path: Path, code: bytes) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(code)
    with pytest.raises(DataError, match=r"names the global (builtins|__builtin__)\.(eval|exec|getattr)"):
        refs_of(path)


def python2_refs(text: bytes, protocol: int) -> bytes:
    """[{"ref_id": 7, ..., "split": "val", "sent": text}] as Python 2 wrote it: byte strings, a unicode, a long."""
    if protocol == 0:
        items = b"S'ref_id'\nL7L\nsS'ann_id'\nI70\nsS'image_id'\nI700\nsS'split'\nS'val'\nsS'sent'\n"
        return b"(lp0\n(dp1\n" + items + b"S" + repr(text)[1:].encode() + b"\nsS'raw'\nVcaf\xe9\nsa."
    short = lambda value: b"U" + bytes([len(value)]) + value  # noqa: E731 - SHORT_BINSTRING
    values = {b"ref_id": b"\x8a\x01\x07", b"ann_id": b"K\x46", b"image_id": b"M\xbc\x02", b"split": short(b"val")}
    values |= {b"sent": short(text), b"raw": b"X\x05\x00\x00\x00caf\xc3\xa9"}
    values |= {b"ids": b"c__builtin__\nset\n](K\x01K\x02e\x85R"}
    return b"\x80\x02]}(" + b"".join(short(key) + value for key, value in values.items()) + b"ua."


@pytest.mark.parametrize("protocol", [0, 2])
@pytest.mark.parametrize("text", [b"caf\xc3\xa9", b"caf\xe9"], ids=["utf-8", "latin-1"])
def test_python_2_pickles_load(tmp_path: Path, text: bytes, protocol: int) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(python2_refs(text, protocol))
    (ref,) = refs_of(path)
    expected = {"ref_id": 7, "ann_id": 70, "image_id": 700, "split": "val", "sent": "caf\u00e9", "raw": "caf\u00e9"}
    assert ref == expected | ({"ids": {1, 2}} if protocol == 2 else {})


def test_latin_1_is_read_whole_when_one_string_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(python2_refs(b"\xe9t\xe9", 2))
    assert refs_of(path)[0]["sent"] == "\u00e9t\u00e9"
