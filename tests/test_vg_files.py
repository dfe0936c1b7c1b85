"""Visual Genome's files: found, read as a stream, and what is said of each that cannot be used."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dataset.raw import visual_genome
from dataset.raw.vg_files import Draft, Source, Spool, find_sources, read_entries
from dataset.raw.vg_phrases import Rules
from dataset.reading import DataError

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
    entries = read_entries(Source(path))
    assert next(entries) == {"a": 1}
    numbers = next(entries)
    assert numbers == [2.5, 1000.0]
    assert [type(number) for number in numbers] == [float, float]
    with pytest.raises(DataError, match=r"x\.json: not valid JSON .*is the download complete"):
        next(entries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image_id": 1}', "expected a JSON list"),
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


def test_the_file_goes_before_its_zip(tmp_path: Path) -> None:
    for name in ("attributes.json", "objects_v1_2.json", "relationships.json", "attributes_old.json", "images.zip"):
        write(tmp_path / name, "[]")
    for name in ("attributes.json.zip", "attributes.zip", "objects_v1_2.json.zip"):
        write(tmp_path / name, "no zip file")  # not opened
    assert find_sources([tmp_path]) == {
        "attributes": Source(tmp_path / "attributes.json"),
        "objects": Source(tmp_path / "objects_v1_2.json"),
    }


def test_sources_that_cannot_be_used(raw: Path, tmp_path: Path) -> None:
    write(raw / "image_data_v1_2.json", "[]")
    with pytest.raises(DataError, match=r"image_data\.json and .*image_data_v1_2\.json are both image_data"):
        find_sources([raw])
    assert find_sources([raw / "image_data.json"]) == {"image_data": Source(raw / "image_data.json")}
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


def test_spool(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        for image_id, text in ((5, "é"), (3, ""), (9, "nine")):
            spool.add(image_id, text)
            assert spool.get(5) == "é"
        assert [spool.get(i) for i in (9, 5, 3, 4)] == ["nine", "é", "", ""]
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
    with pytest.raises(DataError, match=r"out: cannot be written \(.*No space left on device\); is there room"):
        make(raw, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_written(raw: Path, tmp_path: Path) -> None:
    write(tmp_path / "taken", "a file")
    with pytest.raises(DataError, match="taken: cannot be written"):
        make(raw, tmp_path / "taken")
