"""Flickr30k Entities' own files -> info-ground's: whole outputs, every odd case, what each broken file says."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import GroundingConfig
from dataset import flickr
from dataset.raw import flickr_entities
from dataset.reading import DataError
from grounding.benchmarks import FLICKR
from tests.data_keys import flickr_keys
from tests.dataset.raw.raw_layouts import contents, run, write_entities, zip_entities

HEAD = "<filename>1.jpg</filename><size><width>64</width><height>48</height><depth>3</depth></size>"
XML_11 = f"""<?xml version="1.0"?>
<annotation>
    <!-- two people and their hats; "6" and "1" are one and the same -->
    {HEAD}
    <object><name>9</name><scene>0</scene><nobndbox>1</nobndbox></object>
    <object><name>6</name><name>1</name>
        <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>21</xmax><ymax>32</ymax></bndbox></object>
    <object><name>1</name>
        <bndbox><xmin> 30 </xmin><ymin>10</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object>
    <object><name>10</name>
        <bndbox><xmin>0</xmin><ymin>-4</ymin><xmax>70</xmax><ymax>50</ymax></bndbox></object>
    <object><name>2</name>
        <bndbox><xmin>5</xmin><ymin>5</ymin><xmax>5</xmax><ymax>9</ymax></bndbox></object>
    <object><name>4</name><scene>1</scene><nobndbox>0</nobndbox></object>
    <object><name>3</name><name>8</name><scene>1</scene><nobndbox>1</nobndbox></object>
    <object><name>7</name><scene>0</scene><nobndbox>0</nobndbox></object>
    <object><scene>1</scene><nobndbox>1</nobndbox></object>
</annotation>
"""
XML_5 = f"<annotation>{HEAD.replace('64', '7')}</annotation>"
LINES_11 = (
    "[/EN#1/people Two men] in [/EN#10/clothing/bodyparts caf\u00e9 - coloured hats] , [/EN#0/notvisual it]\r\n"
    "\r\n"
    "   \n"
    "At [/EN#4/scene night ] [/EN#1/people they] sit [ together ]\n"
    "No entity here .\n"
)
LINES_5 = "A dog\u2028here .\n"  # a line separator ends no line
BOXES_11 = {
    "boxes": {
        "6": [[0, 1, 20, 31]],
        "1": [[0, 1, 20, 31], [29, 9, 63, 47]],
        "10": [[-1, -5, 69, 49]],
        "2": [[4, 4, 4, 8]],
    },
    "scene": ["4", "3", "8"],
    "nobox": ["9", "3", "8"],
    "width": 64,
    "height": 48,
    "depth": 3,
}
BOXES_5: dict[str, Any] = {"boxes": {}, "scene": [], "nobox": [], "width": 7, "height": 48, "depth": 3}


def phrase(first: int, words: str, phrase_id: str, *types: str) -> dict[str, Any]:
    return {"first_word_index": first, "phrase": words, "phrase_id": phrase_id, "phrase_type": list(types)}


SENTENCES_11 = [
    {
        "sentence": "Two men in caf\u00e9 - coloured hats , it",
        "phrases": [
            phrase(0, "Two men", "1", "people"),
            phrase(3, "caf\u00e9 - coloured hats", "10", "clothing", "bodyparts"),
            phrase(8, "it", "0", "notvisual"),
        ],
    },
    {
        "sentence": "At night  they sit [ together ]",
        "phrases": [phrase(1, "night ", "4", "scene"), phrase(3, "they", "1", "people")],
    },
    {"sentence": "No entity here .", "phrases": []},
]
SENTENCES_5 = [{"sentence": "A dog here .", "phrases": []}]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two images in the official layout; val.txt lists both, train.txt and test.txt one each."""
    folder = tmp_path / "raw"
    files = {
        "Annotations/11.xml": XML_11,
        "Annotations/5.xml": XML_5,
        "Sentences/11.txt": LINES_11,
        "Sentences/5.txt": LINES_5,
        "train.txt": "5",
        "val.txt": "11\n\n5",
        "test.txt": "11\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def make(source: Path, *splits: Path) -> dict[str, str]:
    """What the command writes, by name."""
    out = source.parent / "out"
    run("flickr", source, "--out", out, *(["--ids", *splits] if splits else []))
    return contents(out)


def refused(source: Path, message: str, *splits: Path) -> None:
    """The command stops with the message, and writes nothing."""
    with pytest.raises(DataError, match=message):
        make(source, *splits)
    assert not (source.parent / "out").exists()


def expected() -> dict[str, str]:
    """The three files of every split."""
    as_written = {"sort_keys": True, "indent": 4}  # and with \u escapes
    by_split = {"train": ["5"], "val": ["11", "5"], "test": ["11"]}
    boxes, sentences = {"11": BOXES_11, "5": BOXES_5}, {"11": SENTENCES_11, "5": SENTENCES_5}
    files = {f"{split}.txt": "".join(f"{name}\n" for name in ids) for split, ids in by_split.items()}
    for split, ids in by_split.items():
        for kind, values in (("bounding_boxes", boxes), ("sentences", sentences)):
            chosen = {name: values[name] for name in ids}
            files[f"{kind}_{split}.json"] = json.dumps(chosen, **as_written)  # type: ignore[call-overload]
    return files


def test_the_files_of_every_split(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(raw) == expected()
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "val: 2 images, 4 sentences, 3 phrases with a box"
    assert printed[3].endswith(f"to {raw.parent / 'out'}")


def test_an_archive_beside_the_splits(raw: Path) -> None:
    zip_entities(raw, raw / "annotations.zip")
    for path in raw.glob("*/*"):
        path.unlink()
    (raw / "Annotations").rmdir()
    assert make(raw) == make(raw / "annotations.zip") == expected()


def test_splits_are_named_by_their_files(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("5\n")
    found = make(raw, tmp_path / "mine.txt", raw / "test.txt")
    names = ("{}.txt", "bounding_boxes_{}.json", "sentences_{}.json")
    assert found.keys() == {name.format(split) for split in ("mine", "test") for name in names}
    assert found["mine.txt"] == "5\n"


def test_evaluation_reads_the_files(raw: Path, tmp_path: Path) -> None:
    make(raw, raw / "val.txt")
    for name in ("11", "5"):
        (tmp_path / f"{name}.jpg").touch()
    expressions = FLICKR.load(GroundingConfig(**flickr_keys(tmp_path / "out", ["val"]), image_root=str(tmp_path)))
    assert [(found.text, found.split) for found in expressions] == [
        ("two men", "val"),
        ("caf\u00e9 coloured hats", "val"),
        ("they", "val"),
    ]
    assert expressions[0].boxes.tolist() == [[0, 1, 20, 30], [29, 9, 34, 38]]
    assert expressions[0].size == (48, 64)


# ---- random data come back


IDS = st.integers(1, 10**6).map(str)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), min_size=1, max_size=6).filter(
    lambda word: word.split() == [word] and not word.startswith("[/EN#") and not word.endswith("]")
)
TYPES = st.lists(st.sampled_from(["people", "bodyparts", "scene", "notvisual", "\u00e9"]), min_size=1, max_size=3)


@st.composite
def images(draw: Callable[..., Any]) -> dict[str, Any]:
    names = draw(st.lists(IDS, unique=True, max_size=6))
    box = st.lists(st.integers(-2, 700), min_size=4, max_size=4)
    boxes = {name: draw(st.lists(box, min_size=1, max_size=3)) for name in names if draw(st.booleans())}
    flagged = st.lists(st.sampled_from([name for name in names if name not in boxes] or ["1"]), max_size=3)
    row = {"boxes": boxes, "scene": draw(flagged), "nobox": draw(flagged)}
    return row | {key: draw(st.integers(1, 5000)) for key in ("width", "height", "depth")}


@st.composite
def sentences(draw: Callable[..., Any]) -> dict[str, Any]:
    words: list[str] = []
    phrases = []
    for part in draw(st.lists(st.lists(WORDS, min_size=1, max_size=4), min_size=1, max_size=5)):
        if draw(st.booleans()):
            phrases.append(phrase(len(words), " ".join(part), draw(IDS), *draw(TYPES)))
        words += part
    return {"sentence": " ".join(words), "phrases": phrases}


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(st.dictionaries(IDS, st.tuples(images(), st.lists(sentences(), min_size=1, max_size=5)), min_size=1, max_size=3))
def test_random_data_come_back(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("random")
    boxes, captions = ({name: pair[index] for name, pair in data.items()} for index in (0, 1))
    write_entities(folder, boxes, captions)
    (folder / "some.txt").write_text("\n".join(data))
    splits = flickr_entities.convert(folder, [folder / "some.txt"])
    assert splits == {"some": (list(data), boxes, captions)}
    flickr_entities.write(folder / "out", splits)
    assert json.loads((folder / "out" / "bounding_boxes_some.json").read_text()) == boxes
    assert json.loads((folder / "out" / "sentences_some.json").read_text()) == captions
    assert flickr.load_ids(str(folder / "out" / "some.txt")) == list(data)


# ---- odd and broken input


def xml(*objects: str, head: str = HEAD) -> str:
    return f"<annotation>{head}{''.join(f'<object>{inside}</object>' for inside in objects)}</annotation>"


BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox>"
NAMED = "<name>1</name>"
DOCTYPES = {
    "expanding": '<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY e "&b;&b;&b;&b;">',
    "external": '<!ENTITY e SYSTEM "file:///etc/hostname">',
    "empty": "",
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><size>", r"the XML is malformed; is the download complete\? - 1 found:\n.*11\.xml \(no element"),
        ("<a>" * 300_000, r"the XML is malformed"),
        (xml("<name>&who;</name>"), r"malformed.*\n.*undefined entity"),
        ('<?xml version="1.0" encoding="utf-7"?><annotation/>', r"the XML is malformed"),
        ("<html>404</html>", r"<width> must hold an integer.*\n.*11\.xml \(<size>: found nothing\)"),
        (xml(f"<name> </name>{BOX}"), r"<name> .* is empty.*\n.*\(object 1\)"),
        (xml(NAMED + BOX + BOX), r"several <bndbox>.*\n.*object 1"),
        (xml(NAMED + BOX, NAMED + BOX.replace("n>2", "n>2.5")), r"<ymin> must hold.*\n.*\(object 2: found '2\.5'\)"),
        (
            xml(NAMED + BOX.replace("<ymin>", "<xmin>9</xmin><ymin>")),
            r"<xmin> must.*\n.*\(object 1: found '1' and '9'\)",
        ),
        (xml(f"{NAMED}<scene>1</scene>"), r"<nobndbox> must.*\n.*\(object 1, which has no <bndbox>: found nothing\)"),
        (xml(head=HEAD.replace("64", "")), r"<width> must.*\n.*\(<size>: found ''\)"),
        (xml(head=HEAD.replace("64", "6_4")), r"<width> must.*\n.*\(<size>: found '6_4'\)"),
        (xml(head=HEAD.replace("64", "1" * 5000)), r"<width> must.*\n.*\(<size>: found '1{39}\)"),
        (xml(head=HEAD.replace("48", "0")), r"<height> must be at least 1.*\n.*found 64 and 0"),
        (xml(head=HEAD.replace("64", "-64")), r"must be at least 1.*\n.*found -64 and 48"),
        (xml(head=HEAD + HEAD), r"<width> must hold an integer.*\n.*found '64' and '64'"),
        *(
            (
                f"<!DOCTYPE annotation [{subset}]>{xml('<name>&e;</name>' + BOX)}",
                r"has a DOCTYPE.* not read.*\n.*11\.xml",
            )
            for subset in DOCTYPES.values()
        ),
    ],
)
def test_broken_xml(raw: Path, text: str, message: str) -> None:
    (raw / "Annotations" / "11.xml").write_text(text)
    refused(raw, message, raw / "test.txt")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"One .\n[/EN#1/people a man", r"a span is not closed.*\n.*11\.txt \(line 2: \[/EN#1/people\)"),
        (b"\n[/EN#1/people a [/EN#2/other b] c]", r"a span is not closed.*\n.*\(line 2: \[/EN#1/people\)"),
        (b"[/EN#1/people ] a", r"a span has no words.*\n.*\(line 1: \[/EN#1/people\)"),
        (b"[/EN#1/people]", r"a span must be \[/EN#<phrase id>/<type> and words up to a ']'.*\n.*\(line 1:"),
        (b"[/EN#1 a man]", r"a span must be .*\n.*\(line 1: \[/EN#1\)"),
        (b"[/EN#/people a man]", r"a span must be "),
        (b"[/EN#1/ a man]", r"a span must be "),
        (b"a caf\xe9", r"the file is not UTF-8 text; is the download complete\?.*\n.*11\.txt \(.*0xe9"),
        (b"\n \n", r"the file holds no sentence; is the download complete\?.*\n.*11\.txt"),
    ],
)
def test_broken_sentences(raw: Path, lines: bytes, message: str) -> None:
    (raw / "Sentences" / "11.txt").write_bytes(lines)
    refused(raw, message, raw / "test.txt")


def test_marks_within_words_are_counted(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The owners' reader makes no phrase of them either; the summary says so."""
    (raw / "Sentences" / "11.txt").write_text(f'A man .\n"[/EN#1/people Two men]\n\ufeff{LINES_11}', encoding="utf-8")
    make(raw, raw / "test.txt")
    said = "; warning: 2 sentences have '[/EN#' within a word, which marks no phrase\n"
    assert said in capsys.readouterr().out


@pytest.fixture(params=["folder", "archive"])
def packed(request: pytest.FixtureRequest) -> Callable[[Path], Path]:
    """The folder of the annotations, or an archive made of them, with what a Mac adds."""

    def pack(raw: Path) -> Path:
        if request.param == "archive":
            zip_entities(raw, raw.parent / "annotations.zip")
        return raw.parent / "annotations.zip" if request.param == "archive" else raw

    return pack


NAMES = pytest.mark.parametrize("name", ["Annotations/11.xml", "Sentences/11.txt"])


@NAMES
def test_files_that_an_editor_saved(raw: Path, packed: Callable[[Path], Path], name: str) -> None:
    """With a byte-order mark. LINES_11 begins with a phrase, which must not be lost."""
    data = (raw / name).read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    (raw / name).write_bytes(b"\xef\xbb\xbf" + data)
    splits = [raw / f"{split}.txt" for split in ("train", "val", "test")]
    assert make(packed(raw), *splits) == expected()


@NAMES
def test_a_file_that_is_far_too_large(
    raw: Path, packed: Callable[[Path], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not read to its end, whatever an archive says of its size."""
    monkeypatch.setattr(flickr_entities, "AT_ONCE", 1 << 20)
    (raw / name).write_bytes(b" " * (2 << 20))
    refused(packed(raw), rf"the file is larger than 1 MB, .*\n.*{name}", raw / "val.txt")


def test_images_without_files_make_one_message(raw: Path, packed: Callable[[Path], Path]) -> None:
    (raw / "Annotations" / "5.xml").unlink()
    (raw / "Sentences" / "11.txt").unlink()
    lines = (
        "the file is missing; check that the image ids belong to these annotations - 2 found:",
        ".*: Sentences/11.txt",
        ".*: Annotations/5.xml$",
    )
    refused(packed(raw), "\n".join(lines), raw / "val.txt")


def test_an_archive_with_hidden_and_repeated_files(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "annotations.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(raw.glob("*/*")):
            archive.write(file, f"flickr/{file.relative_to(raw)}")
        for folder in ("__MACOSX/flickr", "flickr/__MACOSX", ".Trash-1000", "flickr/.git"):
            archive.writestr(f"{folder}/Annotations/11.xml", b"\x00\x05\x16\x07")
            archive.writestr(f"{folder}/Annotations/._11.xml", b"\x00\x05\x16\x07")
    assert make(path, *(raw / f"{split}.txt" for split in ("train", "val", "test"))) == expected()
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("old/Annotations/11.xml", XML_5)
    twice = r"annotations\.zip: holds Annotations/11\.xml twice \(flickr/Ann.* and old/Ann.*remove one"
    with pytest.raises(DataError, match=twice):
        make(path, raw / "val.txt")


def test_a_damaged_archive(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "annotations.zip"
    zip_entities(raw, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    refused(path, r"annotations\.zip: not a readable zip archive .* is the download complete\?", raw / "val.txt")
    start = whole.index(b"Annotations/11.xml") + len("Annotations/11.xml")
    path.write_bytes(whole[:start] + bytes(20) + whole[start + 20 :])
    refused(path, r"cannot be read; .*\n.*annotations\.zip: Annotations/11\.xml", raw / "val.txt")


def test_a_place_without_annotations(raw: Path) -> None:
    for source in (raw / "nowhere", raw / "Sentences"):
        refused(source, rf"{source.name}: holds neither Annotations/ and Sentences/ nor annot.*zip")


def test_broken_split_files(raw: Path, tmp_path: Path) -> None:
    (raw / "train.txt").write_text("5\n11\n5\n")
    refused(raw, r"listed more than once; leave out the repeated lines.*\n.*train\.txt: image 5 \(2 times\)")
    (raw / "train.txt").unlink()
    refused(raw, r"train\.txt: does not exist; name the files of image ids, .* by --ids")
    (tmp_path / "val.txt").write_text("5")
    refused(raw, r"val\.txt: another --ids file is named val\.txt as well", raw / "val.txt", tmp_path / "val.txt")
