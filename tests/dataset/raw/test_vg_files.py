"""Visual Genome's files: found, read as a stream, and what is said of each that cannot be used."""

import gzip
import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dataset import reading
from dataset.raw import archives
from dataset.raw.vg_files import Draft, RawFile, find_sources, stream_items
from dataset.reading import DataError, json_items
from tests.dataset.raw.raw_layouts import contents, run, write
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


def pack(path: Path, data: str | bytes, method: int = zipfile.ZIP_STORED) -> Path:
    """Put `data` in place of a file, in an archive beside it."""
    path.unlink()
    with zipfile.ZipFile(path.with_suffix(".json.zip"), "w", method) as archive:
        archive.writestr(path.name, data)
    return path.with_suffix(".json.zip")


def refused(raw: Path, message: str, path: Path | None = None) -> None:
    """The files cannot be used, the message begins with the path given, and what was made before stays."""
    out = raw.parent / "out"
    out.mkdir(exist_ok=True)
    write(out / "vg_descriptions.json", "from before")
    with pytest.raises(DataError, match=message) as caught:
        run("vg", raw, "--out", out)
    assert str(caught.value).startswith(f"{path or ''}")
    assert contents(out) == {"vg_descriptions.json": "from before"}


# ---- the stream


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


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
def test_items_do_not_depend_on_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    items: list[Any] = [{"a": [1, {"b": '],[}{ \\" é \u2028 𝄞'}]}, -12.5e-3, "x", None, [], 1234567, True, {}]
    monkeypatch.setattr(reading, "PIECE", piece)
    for index, ascii_only in enumerate((True, False)):
        path = write(tmp_path / f"{index}.json", json.dumps(items, indent=1, ensure_ascii=ascii_only) + "\n \n")
        assert list(stream_items(RawFile(path))) == items
    for text in ("[]", " [ ] "):
        assert list(stream_items(RawFile(write(tmp_path / "x.json", text)))) == []
    for text in ("[1] x", "[] []", "[1, 2", "[1 2]", "[1]]", '["\\ud8', "", "[1,]", "[,1]"):
        with pytest.raises(DataError, match=r"x\.json: not valid JSON"):
            list(stream_items(RawFile(write(tmp_path / "x.json", text))))


def test_an_entry_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text without end is not read to its end: memory is what it would cost."""
    monkeypatch.setattr(reading, "PIECE", 1 << 10)
    monkeypatch.setattr(reading, "AT_ONCE", 1 << 14)
    file = io.BytesIO(b'[1, "' + b"a" * (1 << 18) + b'"]')
    with pytest.raises(json.JSONDecodeError, match="Unterminated string"):
        list(json_items(file))
    assert file.tell() < 1 << 16


# ---- files that cannot be used


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image_id": 1}', "expected a JSON list, found an object"),
        ('{"image_id": 1}\n{"image_id": 2}\n', r"found an object; .* If it holds an object a line, make a list"),
        ("[" * 100_000 + "]" * 100_000, "not valid JSON .*recursion"),
        ('[{"image_id": ' + "1" * 5000 + "}]", r"cannot be read .*\(4300"),
        ('[{"image_id": ' + "1" * 400 + "}]", r"an id must be an integer \(entry 0, found 1111"),
        ('[{"image_id": 1, "url": "", "image_id": 2}]', r"a key more than once.* \('image_id'\); correct the entry"),
        ("[1, 2", r"an object \{key: value\} \(entry 0"),
        ("[{} {}]", r"not valid JSON \(Expecting ',' delimiter\)"),
        ("[{},]", r"key 'image_id' or 'id' is missing"),
        ("<html>not found</html>", r"not valid JSON \(Expecting value\); is the download complete"),
        ("[NaN]", "must be an object"),
        ("[]", "holds no images"),
    ],
)
def test_a_file_that_is_no_list(raw: Path, text: str, message: str) -> None:
    path = write(raw / "image_data.json", text)
    refused(raw, message, path)


def test_gzip_is_named(raw: Path) -> None:
    path, message = raw / "image_data.json", r"is compressed by gzip; unpack it first \(gunzip\)"
    data = path.read_bytes()
    path.write_bytes(gzip.compress(data))
    refused(raw, message, path)
    refused(raw, message, path.rename(raw / "image_data.json.gz"))
    path.write_bytes(data)  # as `gunzip --keep` leaves it
    assert find_sources([raw])["image_data"] == RawFile(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_that_unpacks_to_far_more_than_it_weighs(
    raw: Path, monkeypatch: pytest.MonkeyPatch, method: int
) -> None:
    pack(raw / "image_data.json", b"[" + b" " * (2 << 20) + b"]", method)
    monkeypatch.setattr(archives, "LARGE", 1 << 20)
    refused(raw, r"zip \(image_data\.json\): unpacks from [\d,]+ bytes to 2,097,154, more than 100")
    monkeypatch.setattr(archives, "LARGE", 4 << 20)  # not large
    refused(raw, "holds no images")


def test_a_member_of_a_zip_ends_where_it_says(raw: Path) -> None:
    """A header that states less than the member unpacks to does not get the rest read."""
    text = json.dumps([IMAGE]) + " " * 100_000
    path = pack(raw / "image_data.json", text, zipfile.ZIP_DEFLATED)
    path.write_bytes(path.read_bytes().replace(struct.pack("<L", len(text)), struct.pack("<L", 20)))
    refused(raw, r"zip \(image_data\.json\): (cannot be read \(Bad CRC|not valid JSON)")


def test_a_damaged_zip(raw: Path) -> None:
    path = pack(raw / "attributes.json", json.dumps(FILES["attributes"]))
    path.write_bytes(path.read_bytes().replace(b"brown", b"black"))
    refused(raw, r"attributes\.json\.zip \(attributes\.json\): cannot be read")


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
    assert find_sources([raw / "image_data.json"]) == {"image_data": RawFile(raw / "image_data.json")}
    for path, message in (
        (raw, r"image_data\.json and .*image_data_v1_2\.json are both image_data"),
        (tmp_path / "absent", "absent: does not exist"),
        (write(tmp_path / "other.json", "[]"), r"other\.json: none of Visual Genome's files"),
        (write(tmp_path / "objects.zip", "cut off"), r"objects\.zip: cannot be read .*is the download complete"),
    ):
        with pytest.raises(DataError, match=message):
            find_sources([path])


@pytest.mark.parametrize("missing", ["image_data", "region_descriptions", "attributes"])
def test_a_missing_file_is_named(raw: Path, missing: str) -> None:
    (raw / f"{missing}.json").unlink()
    refused(raw, rf"raw: neither {missing}\.json nor {missing}\.json\.zip is there")


# ---- entries that cannot be used


def regions(**changes: Any) -> dict[str, Any]:
    """An entry whose second region has other values; those that are None are missing."""
    changed = {key: value for key, value in (REGION | changes).items() if value is not None}
    return {"id": 30, "regions": [REGION, changed]}


def things(**changes: Any) -> dict[str, Any]:
    """The same of objects."""
    changed = {key: value for key, value in (THING | changes).items() if value is not None}
    return {"image_id": 30, "attributes": [THING, changed]}


IN_REGION, IN_THING = r"\(entry 1, VG_100K/30.jpg, region 1, ", r"\(entry 1, VG_100K/30.jpg, object 1, "


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
        ("image_data", {**IMAGE, "width": 10**400}, r"'width' and 'height' must be positive .*\(entry 1, image 7\)"),
        ("image_data", {**IMAGE, "height": "80"}, r"'width' and 'height' must be positive .*\(entry 1, image 7\)"),
        ("image_data", {**IMAGE, "coco_id": "x"}, r"an id must be an integer \(entry 1, found 'x'\)"),
        ("image_data", {**IMAGE, "id": 8}, r"keys 'image_id' and 'id' mean the same but differ.*\(entry 1, 7 and 8\)"),
        ("image_data", IMAGE, r"the image has an entry already \(entry 1, image 7\)"),
        ("region_descriptions", {"id": 7, "regions": []}, r"the image has an entry already \(entry 1, image 7\)"),
        ("region_descriptions", {"id": 30}, r"key 'regions' must be a list \(entry 1, image 30\)"),
        ("region_descriptions", {"id": 30, "regions": [REGION, 5]}, rf"must be an object .*{IN_REGION}found a int\)"),
        ("region_descriptions", regions(phrase=5), rf"key 'phrase' must be a text {IN_REGION}found 5\)"),
        ("region_descriptions", regions(phrase="half \udc00"), "key 'phrase' must be a text"),
        ("region_descriptions", regions(height=None), rf"key 'height' must be a number {IN_REGION}it is missing\)"),
        ("region_descriptions", regions(x="1"), rf"key 'x' must be a number {IN_REGION}found '1'\)"),
        ("region_descriptions", regions(x=10**400), "key 'x' must be a number"),
        ("region_descriptions", regions(x=float("nan")), "key 'x' must be a number"),
        ("region_descriptions", regions(y=True), "key 'y' must be a number"),
        ("attributes", {"image_id": 30, "attributes": {}}, r"key 'attributes' must be a list \(entry 1, image 30\)"),
        ("attributes", things(names=None), r"key 'names' is missing \(entry 1, VG_100K/30.jpg, object 1\)"),
        ("attributes", things(names=["\ud800"]), r"'names' must be a text or a list"),
        ("attributes", things(attributes=["red", 5]), rf"a text or a list of texts {IN_THING}found \['red', 5\]\)"),
        ("attributes", things(object_id=[]), rf"{IN_THING}found \[\]\)"),
        ("objects", {"image_id": 30, "attributes": []}, r"key 'objects' must be a list \(entry 1, image 30\)"),
    ],
)
def test_a_malformed_entry_is_named(raw: Path, file: str, entry: Any, message: str) -> None:
    path = write(raw / f"{file}.json", [FILES[file][0], entry])
    refused(raw, message, path)


def test_repeated_ids_of_regions_and_objects_are_all_kept(raw: Path, tmp_path: Path) -> None:
    """Nothing is looked up by them, so that the last does not win."""
    found = [REGION, {**REGION, "phrase": "a cat"}, {**REGION, "x": 40}]
    write(raw / "region_descriptions.json", [{"id": 7, "regions": found}])
    found = [THING, {**THING, "attributes": ["old"]}, {**THING, "x": 40}]
    write(raw / "attributes.json", [{"image_id": 7, "attributes": found}])
    write(raw / "objects.json", [{"image_id": 7, "objects": [{**THING, "object_id": 9, "x": x} for x in (60, 80)]}])
    run("vg", raw, "--out", tmp_path / "out")
    captions = {
        name: [(row["caption"], len(row["bbox"])) for row in json.loads(text)]
        for name, text in contents(tmp_path / "out").items()
    }
    assert captions == {
        "vg_descriptions.json": [("a dog", 2), ("a cat", 1)],
        "vg_attributes.json": [("brown dog", 2), ("old dog", 1)],
        "vg_attributes_spatial.json": [("left brown dog", 1), ("left old dog", 1)],
    }


# ---- outputs that cannot be written


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
        run("vg", raw, "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def test_a_folder_that_cannot_be_written(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"taken/vg_\w+\.json: File exists; a part of the path is a file"):
        run("vg", raw, "--out", write(tmp_path / "taken", "a file"))
