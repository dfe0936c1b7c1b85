"""Reading RefCOCO+ and RefCLEF: what comes out, and what each broken file says."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset.expressions import Expression, Problems
from dataset.reading import DataError
from dataset.refer import Reading, load_expressions, load_refer, load_refs, read_items
from dataset.text import has_content

REF = {"ref_id": 7, "ann_id": 70, "image_id": 700, "split": "testA", "file_name": "unreliable_7.jpg", "sentences": []}
ANNOTATION = {"id": 70, "image_id": 700, "bbox": [10.1, 20.2, 30.3, 40.4], "category_id": 1}
IMAGE = {"id": 700, "width": 64, "height": 48, "file_name": "unreliable.jpg"}
ENTRY = {"image": "folder/7.png", "text": "The red-hat!", "ref_id": 7, "split": "testC"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A REFER folder `refer/refclef`, a test file, detections and an image, of one expression."""
    folder = tmp_path / "refer" / "refclef"
    folder.mkdir(parents=True)
    write_refs(tmp_path, [REF])
    instances = {"images": [IMAGE], "annotations": [ANNOTATION], "categories": []}
    (folder / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "test.json").write_text(json.dumps([ENTRY]))
    (tmp_path / "dets.json").write_text(json.dumps({"700": [[1, 2, 3, 4, 0.9], [5.5, 6, 7, 8]]}))
    (tmp_path / "images" / "folder").mkdir(parents=True)
    (tmp_path / "images" / "folder" / "7.png").touch()
    return tmp_path


def write_refs(root: Path, refs: Any, protocol: int = 2) -> Path:
    path = root / "refer" / "refclef" / "refs(unc).p"
    path.write_bytes(pickle.dumps(refs, protocol))
    return path


def load(root: Path, entry_split: bool = False, det_file: bool = True) -> list[Expression]:
    return load_expressions(
        test_file=[str(root / "test.json")],
        image_root=str(root / "images"),
        refer_root=str(root / "refer"),
        dataset="refclef",
        det_file=str(root / "dets.json") if det_file else None,
        entry_split=entry_split,
    )


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
    assert stated_size(root) == (48, 64)


def stated_size(root: Path) -> tuple[int, int] | None:
    reading = Reading(str(root / "images"), load_refer(root / "refer" / "refclef", "unc"), None, None)
    (item,) = read_items(str(root / "test.json"), reading, Problems())
    return item.stated_size


def test_an_expression_of_refclef_takes_its_own_split(root: Path) -> None:
    (expression,) = load(root, entry_split=True, det_file=False)
    assert expression.split == "test"
    assert expression.detections is None
    assert expression.record == {"image_path": "folder/7.png", "split": "testC"}


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        ([{"supercategory": "person", "id": 1, "name": "person"}, {"id": 2, "name": "dog"}], ("person",)),
        ([{"id": 2, "name": "dog"}], ()),
        ([], ()),
        (None, ()),
        ("person", ()),
        ([{"id": 1, "name": 5}, {"id": 1}, {"name": "x"}, 7, {"id": [1], "name": "x"}], ()),
    ],
)
def test_the_category_is_that_of_the_annotation_where_it_is_named(
    root: Path, categories: Any, expected: tuple[str, ...]
) -> None:
    instances: dict[str, Any] = {"images": [IMAGE], "annotations": [ANNOTATION]}
    instances |= {} if categories is None else {"categories": categories}
    path = root / "refer" / "refclef" / "instances.json"
    path.write_text(json.dumps(instances))
    assert load(root)[0].categories == expected
    path.write_text(json.dumps(instances | {"annotations": [{**ANNOTATION, "category_id": [1]}]}))
    assert load(root)[0].categories == ()


def test_order_is_that_of_the_files(golden_data: Path) -> None:
    folder = golden_data / "refer" / "refcoco+"
    files = [str(folder / f"refcoco+_{part}.json") for part in ("test", "val")]
    expressions = load_expressions(
        test_file=files,
        image_root=str(golden_data / "images"),
        refer_root=str(golden_data / "refer"),
        dataset="refcoco+",
    )
    rows = [row for file in files for row in json.loads(Path(file).read_text())]
    assert [expression.ref_id for expression in expressions] == [row["ref_id"] for row in rows]
    assert [expression.split for expression in expressions][:3] == ["testA", "testA", "testA"]
    assert {expression.split for expression in expressions[12:]} == {"val"}


def test_captions_are_cut_to_thirty_words(root: Path) -> None:
    (root / "test.json").write_text(json.dumps([{**ENTRY, "text": "a " * 31}]))
    assert load(root)[0].text == " ".join(["a"] * 30)


def test_an_empty_list_of_detections_is_allowed(root: Path) -> None:
    (root / "dets.json").write_text('{"700": []}')
    detections = load(root)[0].detections
    assert detections is not None
    assert detections.shape == (0, 4)


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
    (root / "test.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=message):
        load(root)


def test_refclef_needs_a_split_in_the_entry(root: Path) -> None:
    (root / "test.json").write_text(json.dumps([without(ENTRY, "split")]))
    assert load(root)[0].split == "testA"
    with pytest.raises(DataError, match=r"key 'split' is missing"):
        load(root, entry_split=True)


def test_many_problems_make_one_message(root: Path) -> None:
    entries = [{**ENTRY, "ref_id": 100 + i} for i in range(8)] + [{**ENTRY, "text": None}, {**ENTRY, "image": "no.png"}]
    (root / "test.json").write_text(json.dumps(entries))
    with pytest.raises(DataError) as caught:
        load(root)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("- 8 found:")
    assert [line.rpartition("(")[2] for line in lines[1:6]] == [f"ref_id {100 + i})" for i in range(5)]
    assert lines[6] == "  and 3 more"
    assert lines[7].startswith("key 'text' must be of type str")
    assert lines[9].startswith("the image file does not exist")
    assert len(lines) == 11


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        ("{}", r"the image has no detections in .*dets\.json; check that det_file .*\n.*entry 0 \(image_id 700\)"),
        (
            '{"700": [[1, 2, 3]]}',
            r"dets\.json: the image's detections must be a list of boxes, each four",
        ),
        ('{"700": [[1, 2, 3, NaN]]}', r"each four finite numbers"),
        ('{"700": [[1, 2, 3, "4"]]}', r"each four finite numbers"),
        (f'{{"700": [[1, 2, 3, {10**400}]]}}', r"each four finite numbers"),
        ('{"700": [], "7": [], "700": []}', r"dets\.json: an object holds the key '700' more than once"),
        ("[]", r"dets\.json: expected a JSON dict, found a list"),
        ("{", r"dets\.json: not valid JSON"),
    ],
)
def test_broken_detections(root: Path, detections: str, message: str) -> None:
    (root / "dets.json").write_text(detections)
    with pytest.raises(DataError, match=message):
        load(root)


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        ({"images": [], "annotations": []}, r"the ref's annotation is not in .*\n.*\(ref_id 7, ann_id 70\)"),
        ({"images": [], "annotations": [without(ANNOTATION, "bbox")]}, r"'bbox' of the ref's annotation must be"),
        ({"images": [], "annotations": [without(ANNOTATION, "id")]}, r"key 'id' is missing.*\n.*annotations entry 0"),
        (
            {"images": [], "annotations": [ANNOTATION, {**ANNOTATION, "bbox": [0, 0, 1, 1]}]},
            r"an earlier entry has the same id, .* - 1 found:\n.*instances\.json: annotations entry 1 \(id 70\)",
        ),
        (
            {"images": [], "annotations": [ANNOTATION, *[{**ANNOTATION, "id": "7_2"}] * 2]},
            r"an earlier entry has the same id, .* - 1 found:\n.*annotations entry 2 \(id 7_2\)",
        ),
        (
            {"images": [IMAGE, {**IMAGE, "width": 5}, IMAGE], "annotations": [ANNOTATION]},
            r"an earlier entry has the same id, .* - 2 found:\n.*images entry 1 \(id 700\)\n.*images entry 2",
        ),
        (
            {"images": [{**IMAGE, "id": "700"}], "annotations": []},
            r"key 'id' must be of type int - 1 .*\n.*images entry 0",
        ),
        (
            {"images": [{**IMAGE, "height": 0}], "annotations": [ANNOTATION]},
            r"'height' and 'width' of the ref's image must be positive.*\n.*\(image_id 700, found 0 and 64\)",
        ),
        (
            {"images": [], "annotations": [{**ANNOTATION, "bbox": [10**400, 1, 2, 3]}]},
            r"'bbox' of the ref's annotation must be a list of boxes",
        ),
        ({"images": []}, r"instances\.json: key 'annotations' must be a list; is this REFER's instances\.json\?"),
    ],
)
def test_broken_instances(root: Path, instances: Any, message: str) -> None:
    (root / "refer" / "refclef" / "instances.json").write_text(json.dumps(instances))
    with pytest.raises(DataError, match=message):
        load(root)


def test_instances_without_image_sizes(root: Path) -> None:
    path = root / "refer" / "refclef" / "instances.json"
    path.write_text(json.dumps({"images": [], "annotations": [ANNOTATION]}))
    assert load(root)
    assert stated_size(root) is None


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
        ([REF, REF], r"an earlier entry has the same ref_id"),
        ([{**REF, "ann_id": 7.5}], r"key 'ann_id' must be of type int or str - 1 found:\n.*ref 0 \(found 7\.5\)"),
        (
            [{**REF, "ref_id": 10**5000}],
            r"key 'ref_id' must be of type int.*\n.*\(found an integer of thousands of digits",
        ),
        ([{**REF, "image_id": "700"}], r"key 'image_id' must be of type int - 1 found"),
        ([{key.encode(): value for key, value in REF.items()}], r"names the global _codecs\.encode"),
        ([[REF]], r"an entry must be an object .* - 1 found:\n.*ref 0 \(found a list\)"),
        ([{**REF, "split": "\ud800"}], r"key 'split' holds half of a surrogate pair"),
    ],
)
def test_broken_refs(root: Path, refs: Any, message: str) -> None:
    write_refs(root, refs)
    with pytest.raises(DataError, match=message):
        load(root)


def test_annotation_ids_of_refclef_are_texts(root: Path) -> None:
    write_refs(root, [{**REF, "ann_id": "8756_2"}, {**REF, "ref_id": 8}])
    tables = {"images": [IMAGE], "annotations": [ANNOTATION, {**ANNOTATION, "id": "8756_2", "bbox": [1, 2, 3, 4]}]}
    (root / "refer" / "refclef" / "instances.json").write_text(json.dumps(tables))
    (root / "test.json").write_text(json.dumps([ENTRY, {**ENTRY, "ref_id": 8}]))
    found = load(root, entry_split=True, det_file=False)
    assert [one.boxes.tolist() for one in found] == [[[1, 2, 3, 4]], [[10.1, 20.2, 30.3, 40.4]]]


@pytest.mark.parametrize(
    "text", [" .! ", "", "\u200b", "\u00ad?", "\x01\x02", "\ue000", "\u0301", "\u00a0", "\ufeff\n"]
)
def test_a_text_without_content_stays_and_is_counted(root: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    others = [{**ENTRY, "text": other} for other in ("?", "a dog")]
    (root / "test.json").write_text(json.dumps([ENTRY, {**ENTRY, "text": text}, *others]))
    expressions = load(root)
    assert [expression.text for expression in expressions[::3]] == ["the red hat", "a dog"]
    assert not has_content(expressions[1].text)
    kind = "nothing is left of a text once cleaned; it stays, and the model reads [CLS] alone - 2 found:"
    file = root / "test.json"
    places = f"  {file}: entry 1 ({text!r})\n  {file}: entry 2 ('?')\n"
    assert capsys.readouterr().out == f"warning: {file}: {kind}\n{places}"


def test_several_entries_may_share_a_ref(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "test.json").write_text(json.dumps([ENTRY, ENTRY, {**ENTRY, "text": "a man"}]))
    assert [expression.ref_id for expression in load(root)] == [7, 7, 7]
    assert capsys.readouterr().out == ""


def test_refs_keep_their_order(root: Path) -> None:
    refs = [{**REF, "ref_id": ref_id} for ref_id in (9, 7, 8)]
    assert load_refs(write_refs(root, refs)) == refs


@pytest.mark.parametrize(
    "cut",
    [lambda data: b"", lambda data: data[:-9], lambda data: b"<html>404</html>"],
    ids=["empty", "truncated", "a web page"],
)
def test_files_that_are_no_pickle(root: Path, cut: Callable[[bytes], bytes]) -> None:
    path = write_refs(root, [REF])
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: not a readable pickle .* is the download complete\?"):
        load(root)


@pytest.mark.parametrize("data", [b"\x80\x02]r\xff\xff\xff\x7f.", b"(lp2147483647\n.", b"]r\x00\x00\x00\x10."])
def test_a_pickle_that_asks_for_all_memory(tmp_path: Path, data: bytes) -> None:
    """Its list is numbered 2,147,483,647: an unpickler with a table of numbers would make one of that size."""
    (tmp_path / "refs(unc).p").write_bytes(data)
    assert load_refs(tmp_path / "refs(unc).p") == []


def test_missing_files(root: Path) -> None:
    with pytest.raises(DataError, match=r"refs\(google\)\.p: cannot be read .*check refcoco_data in the config"):
        load_refer(root / "refer" / "refclef", "google")
    (root / "refer" / "refclef" / "instances.json").unlink()
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
    path = write_refs(root, [REF, Payload(f"touch {trace}")], protocol)
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
        load_refs(path)


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
    (ref,) = load_refs(path)
    expected = {"ref_id": 7, "ann_id": 70, "image_id": 700, "split": "val", "sent": "caf\u00e9", "raw": "caf\u00e9"}
    assert ref == expected | ({"ids": {1, 2}} if protocol == 2 else {})


def test_latin_1_is_read_whole_when_one_string_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(python2_refs(b"\xe9t\xe9", 2))
    assert load_refs(path)[0]["sent"] == "\u00e9t\u00e9"
