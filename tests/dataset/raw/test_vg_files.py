"""Visual Genome's files: found, read as a stream, and what is said of each that cannot be used."""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest

from dataset.raw import archives, vg_files, visual_genome
from dataset.raw.vg_files import Draft, RawFile, find_sources, stream_items
from dataset.raw.vg_phrases import Rules
from dataset.reading import DataError
from utils import UserError

IMAGE = {"image_id": 7, "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/7.jpg", "width": 100, "height": 80}
REGION = {"region_id": 1, "phrase": "a dog", "x": 1, "y": 1, "width": 5, "height": 5}
THING = {"object_id": 1, "names": ["dog"], "attributes": ["brown"], "x": 1, "y": 1, "w": 5, "h": 5}
FILES: dict[str, list[dict[str, Any]]] = {
    "image_data": [IMAGE, {**IMAGE, "image_id": 30, "url": "https://cs.stanford.edu/people/rak248/VG_100K/30.jpg"}],
    "region_descriptions": [{"id": 7, "regions": [REGION]}],
    "attributes": [{"image_id": 7, "attributes": [THING]}],
    "objects": [{"image_id": 7, "objects": [THING]}],
}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with these files."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, value in FILES.items():
        write(folder / f"{name}.json", value)
    return folder


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def make(raw: Path, out: Path) -> None:
    visual_genome.prepare([raw], out, Rules())


# ---- files


def test_entries_are_read_one_at_a_time(tmp_path: Path) -> None:
    """The first arrive before the file turns out to be broken; numbers are plain ones."""
    path = write(tmp_path / "x.json", '[{"a": 1}, [2.5, 1e3], ' + " " * 300_000 + '"unfinished')
    entries = stream_items(RawFile(path))
    assert next(entries) == {"a": 1}
    numbers = next(entries)
    assert numbers == [2.5, 1000.0]
    assert [type(number) for number in numbers] == [float, float]
    with pytest.raises(DataError, match=r"x\.json: not valid JSON .*is the download complete"):
        next(entries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image_id": 1}', "expected a JSON list, found an object"),
        ('{"image_id": 1}\n{"image_id": 2}\n', r"found an object; .* If it holds an object a line, make a list"),
        ("[" * 100_000 + "]" * 100_000, "not valid JSON .*recursion"),
        ('[{"image_id": ' + "1" * 5000 + "}]", "cannot be read .*4300 digits"),
        ('[{"image_id": ' + "1" * 400 + "}]", r"an id must be an integer \(entry 0, found 1111"),
        ('[{"image_id": 1, "url": "", "image_id": 2}]', r"a key more than once.* \('image_id'\); correct the entry"),
        ("[1, 2", r"an object \{key: value\} \(entry 0"),
        ("[{}, {]", r"not valid JSON|key 'image_id'"),
        ("[{} {}]", r"not valid JSON \(Expecting ',' delimiter\)"),
        ("[{},]", r"key 'image_id' or 'id' is missing"),
        ("[", r"not valid JSON \(Expecting value\)"),
        ("<html>not found</html>", "expected a JSON list"),
        ("", "not valid JSON"),
        ("[] []", "not valid JSON"),
        ("[NaN]", "not valid JSON"),
        ("[]", "holds no images"),
    ],
)
def test_a_file_that_is_no_list(raw: Path, tmp_path: Path, text: str, message: str) -> None:
    write(raw / "image_data.json", text)
    with pytest.raises(DataError, match=message) as refused:
        make(raw, tmp_path / "out")
    assert str(raw / "image_data.json") in str(refused.value)


ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "BOM": lambda data: b"\xef\xbb\xbf" + data,
    "BOM and CRLF": lambda data: b"\xef\xbb\xbf\r\n" + data.replace(b", ", b",\r\n"),
    "indented": lambda data: json.dumps(json.loads(data), indent=4, ensure_ascii=False).encode(),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("zipped", [False, True], ids=["file", "zip"])
def test_files_as_editors_save_them(raw: Path, tmp_path: Path, encoding: str, zipped: bool) -> None:
    make(raw, tmp_path / "expected")
    for path in sorted(raw.iterdir()):
        data = ENCODINGS[encoding](path.read_bytes())
        path.write_bytes(data)
        if zipped:
            with zipfile.ZipFile(path.with_suffix(".json.zip"), "w") as archive:
                archive.writestr(path.name, data)
            path.unlink()
    make(raw, tmp_path / "out")
    for path in (tmp_path / "expected").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
def test_items_do_not_depend_on_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    items: list[Any] = [{"a": [1, {"b": '],[}{ \\" é \u2028 𝄞'}]}, -12.5e-3, "x", None, [], 1234567, True, {}]
    monkeypatch.setattr(vg_files, "PIECE", piece)
    for index, ascii_only in enumerate((True, False)):
        path = write(tmp_path / f"{index}.json", json.dumps(items, indent=1, ensure_ascii=ascii_only) + "\n \n")
        assert list(stream_items(RawFile(path))) == items
    for text in ("[]", " [ ] "):
        assert list(stream_items(RawFile(write(tmp_path / "x.json", text)))) == []
    for text in ("[1] x", "[] []", "[1, 2", "[1 2]", "[1]]", '["\\ud8', "", "[1,]", "[,1]"):
        with pytest.raises(DataError, match=r"x\.json: not valid JSON"):
            list(stream_items(RawFile(write(tmp_path / "x.json", text))))


def test_an_entry_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text without end is not read to its end: memory is what it would cost."""
    monkeypatch.setattr(vg_files, "PIECE", 1 << 10)
    monkeypatch.setattr(vg_files, "AT_ONCE", 1 << 14)
    path = write(tmp_path / "x.json", "[1, " + '"' + "a" * (1 << 18) + '"]')
    read = 0

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal read
            data = super().read(size)
            read += len(data)
            return data

    with pytest.raises(json.JSONDecodeError):
        list(vg_files._items(Counting(path.read_bytes())))
    assert read < 1 << 16
    with pytest.raises(DataError, match=r"x\.json: not valid JSON \(Unterminated string"):
        list(stream_items(RawFile(path)))


def test_gzip_is_named(raw: Path, tmp_path: Path) -> None:
    data = (raw / "image_data.json").read_bytes()
    (raw / "image_data.json").write_bytes(gzip.compress(data))
    with pytest.raises(DataError, match=r"image_data\.json: is compressed by gzip, whatever its name says; unpack it"):
        make(raw, tmp_path / "out")
    (raw / "image_data.json").rename(raw / "image_data.json.gz")
    with pytest.raises(DataError, match=r"image_data\.json\.gz: is compressed by gzip; unpack it first \(gunzip\)"):
        make(raw, tmp_path / "out")
    (raw / "image_data.json").write_bytes(data)  # as `gunzip --keep` leaves it
    make(raw, tmp_path / "out")


def test_hidden_files_are_passed_over(raw: Path, tmp_path: Path) -> None:
    """What macOS, version control and editors put beside files, in folders and in archives."""
    hidden = ("._image_data.json", ".image_data.json.swp", ".DS_Store", "._image_data.json.zip")
    for name in hidden:
        (raw / name).write_bytes(b"\x00\x05\x16\x07")
    make(raw, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("vg/", b"")
        for name, value in FILES.items():
            archive.writestr(f"vg/{name}.json", json.dumps(value))
        for folder in ("__MACOSX/vg", "vg/__MACOSX", ".Trash-0", "vg/.git"):
            for name in (*hidden, "image_data.json"):
                archive.writestr(f"{folder}/{name}", b"\x00\x05\x16\x07")
    visual_genome.prepare([tmp_path / "all.zip"], tmp_path / "zipped", Rules())
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "zipped" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_that_unpacks_to_far_more_than_it_weighs(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: int
) -> None:
    monkeypatch.setattr(archives, "LARGE", 1 << 20)
    (raw / "image_data.json").unlink()
    with zipfile.ZipFile(raw / "image_data.json.zip", "w", method) as archive:
        archive.writestr("image_data.json", b"[" + b" " * (2 << 20) + b"]")
    with pytest.raises(
        DataError, match=r"zip \(image_data\.json\): unpacks from [\d,]+ bytes to 2,097,154, more than 100"
    ):
        make(raw, tmp_path / "out")
    monkeypatch.setattr(archives, "LARGE", 4 << 20)  # not large
    with pytest.raises(DataError, match="holds no images"):
        make(raw, tmp_path / "out")


def test_a_member_of_a_zip_ends_where_it_says(raw: Path, tmp_path: Path) -> None:
    """A header that states less than the member unpacks to does not get the rest read."""
    (raw / "image_data.json").unlink()
    path = raw / "image_data.json.zip"
    text = json.dumps([IMAGE]) + " " * 100_000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image_data.json", text)
    path.write_bytes(path.read_bytes().replace(struct.pack("<L", len(text)), struct.pack("<L", 20)))
    with pytest.raises(DataError, match=r"zip \(image_data\.json\): (cannot be read \(Bad CRC|not valid JSON)"):
        make(raw, tmp_path / "out")


def test_the_file_goes_before_its_zip(tmp_path: Path) -> None:
    for name in ("attributes.json", "objects_v1_2.json", "relationships.json", "attributes_old.json", "images.zip"):
        write(tmp_path / name, "[]")
    for name in ("attributes.json.zip", "attributes.zip", "objects_v1_2.json.zip"):
        write(tmp_path / name, "no zip file")  # not opened
    assert find_sources([tmp_path]) == {
        "attributes": RawFile(tmp_path / "attributes.json"),
        "objects": RawFile(tmp_path / "objects_v1_2.json"),
    }


def test_sources_that_cannot_be_used(raw: Path, tmp_path: Path) -> None:
    write(raw / "image_data_v1_2.json", "[]")
    with pytest.raises(DataError, match=r"image_data\.json and .*image_data_v1_2\.json are both image_data"):
        find_sources([raw])
    assert find_sources([raw / "image_data.json"]) == {"image_data": RawFile(raw / "image_data.json")}
    with pytest.raises(DataError, match="absent: does not exist"):
        find_sources([tmp_path / "absent"])
    with pytest.raises(DataError, match=r"other\.json: none of Visual Genome's files"):
        find_sources([write(tmp_path / "other.json", "[]")])
    with pytest.raises(DataError, match=r"objects\.zip: cannot be read .*is the download complete"):
        find_sources([write(tmp_path / "objects.zip", "cut off")])


def test_a_damaged_zip(raw: Path, tmp_path: Path) -> None:
    (raw / "attributes.json").unlink()
    with zipfile.ZipFile(raw / "attributes.json.zip", "w") as archive:
        archive.writestr("attributes.json", json.dumps(FILES["attributes"]))
    whole = (raw / "attributes.json.zip").read_bytes()
    (raw / "attributes.json.zip").write_bytes(whole.replace(b"brown", b"black"))
    with pytest.raises(DataError, match=r"attributes\.json\.zip \(attributes\.json\): cannot be read"):
        make(raw, tmp_path / "out")


@pytest.mark.parametrize("missing", ["image_data", "region_descriptions", "attributes"])
def test_a_missing_file_is_named(raw: Path, tmp_path: Path, missing: str) -> None:
    (raw / f"{missing}.json").unlink()
    with pytest.raises(DataError, match=rf"raw: neither {missing}\.json nor {missing}\.json\.zip is there"):
        make(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_draft_is_read_back_in_any_order(tmp_path: Path) -> None:
    rows = [{"caption": "é", "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]]}, {"caption": "nine", "bbox": [[0, 0, 1, 1]]}]
    with TemporaryFile(dir=tmp_path) as file:
        draft = Draft(file)
        for image_id, added in ((5, rows), (3, []), (9, rows[1:])):
            draft.add(image_id, added)
            assert json.loads(f"[{draft.get(5)}]") == rows
        assert [draft.get(i) for i in (9, 3, 4)] == [json.dumps(rows[1]), "", ""]
        assert (len(draft.places), draft.entries, draft.boxes) == (2, 3, 4)
        assert not list(tmp_path.iterdir())


# ---- entries that cannot be used


@pytest.mark.parametrize(
    ("file", "entry", "message"),
    [
        ("image_data", 5, r"must be an object \{key: value\} \(entry 1, found a int\); correct the entry"),
        ("image_data", {"url": ""}, r"key 'image_id' or 'id' is missing \(entry 1\)"),
        ("image_data", {**IMAGE, "image_id": 8.5}, r"an id must be an integer \(entry 1, found 8.5\)"),
        ("image_data", {**IMAGE, "image_id": True}, r"an id must be an integer \(entry 1, found True\)"),
        ("image_data", {**IMAGE, "image_id": 8}, r"key 'url' must end in .* \(entry 1, image 8, found 'https"),
        ("image_data", {**IMAGE, "url": None}, r"key 'url' must end in .* \(entry 1, image 7, found None\)"),
        ("image_data", {**IMAGE, "url": "/../7.jpg"}, r"key 'url' must end in .*entry 1, image 7"),
        ("image_data", {**IMAGE, "width": 0}, r"'width' and 'height' must be positive .*\(entry 1, image 7\)"),
        ("image_data", {**IMAGE, "height": "80"}, r"'width' and 'height' must be positive .*\(entry 1, image 7\)"),
        ("image_data", {**IMAGE, "coco_id": "x"}, r"an id must be an integer \(entry 1, found 'x'\)"),
        ("image_data", IMAGE, r"the image has an entry already \(entry 1, image 7\)"),
        (
            "region_descriptions",
            FILES["region_descriptions"][0],
            r"the image has an entry already \(entry 1, image 7\)",
        ),
        ("region_descriptions", {"id": 30}, r"key 'regions' must be a list \(entry 1, image 30\)"),
        (
            "region_descriptions",
            {"id": 30, "regions": [REGION, 5]},
            "entry 1, VG_100K/30.jpg, region 1, found a int",
        ),
        (
            "region_descriptions",
            {"id": 30, "regions": [REGION, {**REGION, "phrase": 5}]},
            r"key 'phrase' must be a text \(entry 1, VG_100K/30.jpg, region 1, found 5\)",
        ),
        (
            "region_descriptions",
            {"id": 30, "regions": [{"phrase": "a", "x": 1, "y": 2, "width": 3}]},
            r"key 'height' must be a number \(entry 1, VG_100K/30.jpg, region 0, it is missing\)",
        ),
        (
            "region_descriptions",
            {"id": 30, "regions": [{**REGION, "x": "1"}]},
            r"key 'x' must be a number \(entry 1, VG_100K/30.jpg, region 0, found '1'\)",
        ),
        ("region_descriptions", {"id": 30, "regions": [{**REGION, "y": True}]}, "key 'y' must be a number"),
        ("attributes", {"image_id": 30, "attributes": {}}, r"key 'attributes' must be a list \(entry 1, image 30\)"),
        (
            "attributes",
            {"image_id": 30, "attributes": [THING, {"attributes": ["red"], "x": 1, "y": 1, "w": 1, "h": 1}]},
            r"key 'names' is missing \(entry 1, VG_100K/30.jpg, object 1\)",
        ),
        (
            "attributes",
            {"image_id": 30, "attributes": [{**THING, "attributes": ["red", 5]}]},
            r"key 'attributes' must be a text or a list of texts \(entry 1, .*, object 0, found \['red', 5\]\)",
        ),
        (
            "attributes",
            {"image_id": 30, "attributes": [{**THING, "names": ["\ud800"]}]},
            r"'names' must be a text or a list",
        ),
        (
            "region_descriptions",
            {"id": 30, "regions": [{**REGION, "phrase": "half \udc00"}]},
            "key 'phrase' must be a text",
        ),
        ("region_descriptions", {"id": 30, "regions": [{**REGION, "x": 10**400}]}, "key 'x' must be a number"),
        ("image_data", {**IMAGE, "width": 10**400}, r"'width' and 'height' must be positive .*\(entry 1, image 7\)"),
        ("image_data", {**IMAGE, "id": 8}, r"keys 'image_id' and 'id' mean the same but differ.*\(entry 1, 7 and 8\)"),
        ("attributes", {"image_id": 30, "attributes": [{**THING, "object_id": []}]}, "object 0, found \\[\\]"),
        ("objects", {"image_id": 30, "attributes": []}, r"key 'objects' must be a list \(entry 1, image 30\)"),
    ],
)
def test_a_malformed_entry_is_named(raw: Path, tmp_path: Path, file: str, entry: Any, message: str) -> None:
    write(raw / f"{file}.json", [FILES[file][0], entry])
    out = tmp_path / "out"
    out.mkdir()
    write(out / "vg_descriptions.json", "from before")
    with pytest.raises(DataError, match=message) as refused:
        make(raw, out)
    assert str(refused.value).startswith(str(raw / f"{file}.json"))
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("vg_descriptions.json", "from before")]


def test_repeated_ids_of_regions_and_objects_are_all_kept(raw: Path, tmp_path: Path) -> None:
    """Nothing is looked up by them, so that the last does not win."""
    regions = [REGION, {**REGION, "phrase": "a cat"}, {**REGION, "x": 40}]
    write(raw / "region_descriptions.json", [{"id": 7, "regions": regions}])
    things = [THING, {**THING, "attributes": ["old"]}, {**THING, "x": 40}]
    write(raw / "attributes.json", [{"image_id": 7, "attributes": things}])
    write(raw / "objects.json", [{"image_id": 7, "objects": [{**THING, "object_id": 9, "x": x} for x in (60, 80)]}])
    make(raw, tmp_path / "out")
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    boxes = [[1, 1, 6, 6], [40, 1, 45, 6]]
    captions = [(row["caption"], row["bbox"]) for row in found["vg_descriptions.json"]]
    assert captions == [("a dog", boxes), ("a cat", boxes[:1])]
    captions = [(row["caption"], row["bbox"]) for row in found["vg_attributes.json"]]
    assert captions == [("brown dog", boxes), ("old dog", boxes[:1])]
    assert [row["caption"] for row in found["vg_attributes_spatial.json"]] == ["left brown dog", "left old dog"]


def test_nothing_is_half_written(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the second of three files is being written."""
    written: list[Path] = []
    write_whole = Draft.write

    def write_half(draft: Draft, path: Path) -> None:
        write_whole(draft, path)
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Draft, "write", write_half)
    with pytest.raises(UserError, match=r"out/vg_\w+\.json: cannot be written, no space is left \(.* are free in "):
        make(raw, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_written(raw: Path, tmp_path: Path) -> None:
    write(tmp_path / "taken", "a file")
    with pytest.raises(DataError, match="taken: cannot be written"):
        make(raw, tmp_path / "taken")
