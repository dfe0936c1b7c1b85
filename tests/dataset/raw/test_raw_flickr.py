"""Flickr30k Entities' own files -> info-ground's: whole outputs, every odd case, what each broken file says."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from config import GroundingConfig
from dataset import flickr
from dataset.raw import archives, flickr_entities
from dataset.raw.flickr_entities import parse_annotation, parse_sentence, parse_sentences
from dataset.reading import DataError
from grounding.benchmarks import FLICKR
from tests.data_keys import flickr_keys
from tests.dataset.raw.raw_layouts import write_entities, zip_entities

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
    for name, files in (("Annotations", {"11.xml": XML_11, "5.xml": XML_5}), ("Sentences", {"11.txt": LINES_11})):
        (folder / name).mkdir(parents=True)
        for file, text in files.items():
            (folder / name / file).write_bytes(text.encode())
    (folder / "Sentences" / "5.txt").write_text(LINES_5, encoding="utf-8")
    for split, ids in (("train", "5"), ("val", "11\n\n5"), ("test", "11\n")):
        (folder / f"{split}.txt").write_text(ids)
    return folder


def run(*words: object) -> None:
    args = prepare.parse_args(["flickr", *map(str, words)])
    args.run(args)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_bytes().decode() for path in folder.iterdir()}


def test_the_files_of_every_split(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(raw, "--out", tmp_path / "out")
    as_written = {"sort_keys": True, "indent": 4}  # and with \u escapes
    by_split = {"train": ["5"], "val": ["11", "5"], "test": ["11"]}
    boxes, sentences = {"11": BOXES_11, "5": BOXES_5}, {"11": SENTENCES_11, "5": SENTENCES_5}
    expected = {f"{split}.txt": "".join(f"{name}\n" for name in ids) for split, ids in by_split.items()}
    for split, ids in by_split.items():
        for kind, values in (("bounding_boxes", boxes), ("sentences", sentences)):
            chosen = {name: values[name] for name in ids}
            expected[f"{kind}_{split}.json"] = json.dumps(chosen, **as_written)  # type: ignore[call-overload]
    assert contents(tmp_path / "out") == expected
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "val: 2 images, 4 sentences, 3 phrases with a box"
    assert printed[3].endswith(f"to {tmp_path / 'out'}")


def test_a_file_letter_by_letter(raw: Path, tmp_path: Path) -> None:
    (raw / "train.txt").write_text("11")
    (raw / "Annotations" / "11.xml").write_text(
        f"<annotation>{HEAD}<object><name>3</name><name>20</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax>"
        "<ymax>8</ymax></bndbox></object></annotation>"
    )
    (raw / "Sentences" / "11.txt").write_bytes("[/EN#3/other \u00e9t\u00e9]\n".encode())
    run(raw, "--out", tmp_path / "out", "--ids", raw / "train.txt")
    assert contents(tmp_path / "out") == {
        "train.txt": "11\n",
        "bounding_boxes_train.json": """{
    "11": {
        "boxes": {
            "20": [
                [
                    0,
                    0,
                    8,
                    7
                ]
            ],
            "3": [
                [
                    0,
                    0,
                    8,
                    7
                ]
            ]
        },
        "depth": 3,
        "height": 48,
        "nobox": [],
        "scene": [],
        "width": 64
    }
}""",
        "sentences_train.json": """{
    "11": [
        {
            "phrases": [
                {
                    "first_word_index": 0,
                    "phrase": "\\u00e9t\\u00e9",
                    "phrase_id": "3",
                    "phrase_type": [
                        "other"
                    ]
                }
            ],
            "sentence": "\\u00e9t\\u00e9"
        }
    ]
}""",
    }


def test_an_archive_gives_the_files_of_the_folder(raw: Path, tmp_path: Path) -> None:
    run(raw, "--out", tmp_path / "from_folder")
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    zip_entities(raw, zipped / "annotations.zip")
    for split in ("train", "val", "test"):
        (zipped / f"{split}.txt").write_bytes((raw / f"{split}.txt").read_bytes())
    run(zipped, "--out", tmp_path / "beside")
    run(zipped / "annotations.zip", "--out", tmp_path / "named")
    assert contents(tmp_path / "from_folder") == contents(tmp_path / "beside") == contents(tmp_path / "named")


def test_splits_are_named_by_their_files(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("5\n")
    run(raw, "--out", tmp_path / "out", "--ids", tmp_path / "mine.txt", raw / "test.txt")
    names = ("{}.txt", "bounding_boxes_{}.json", "sentences_{}.json")
    assert contents(tmp_path / "out").keys() == {name.format(split) for split in ("mine", "test") for name in names}
    assert (tmp_path / "out" / "mine.txt").read_text() == "5\n"


def test_evaluation_reads_the_files(raw: Path, tmp_path: Path) -> None:
    run(raw, "--out", tmp_path, "--ids", raw / "val.txt")
    for name in ("11", "5"):
        (tmp_path / f"{name}.jpg").touch()
    expressions = FLICKR.load(GroundingConfig(**flickr_keys(tmp_path, ["val"]), image_root=str(tmp_path)))
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


# ---- broken input


BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox>"


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<annotation><size>", r"the XML is malformed; is the download complete\? - 1 found:\n.*11\.xml \(no element"),
        ("<html>404</html>", r"<width> must hold an integer.*\n.*11\.xml \(<size>: found nothing\)"),
        (
            f"<annotation>{HEAD}<object><name> </name>{BOX}</object></annotation>",
            r"<name> .* is empty.*\n.*\(object 1\)",
        ),
        (
            f"<annotation>{HEAD}<object><name>1</name>{BOX}{BOX}</object></annotation>",
            r"several <bndbox>.*\n.*object 1",
        ),
        (
            f"<annotation>{HEAD}<object><name>1</name>{BOX}</object>"
            f"<object><name>2</name>{BOX.replace('<ymin>2', '<ymin>2.5')}</object></annotation>",
            r"<ymin> must hold an integer - 1 found:\n.*11\.xml \(object 2: found '2\.5'\)",
        ),
        (
            f"<annotation>{HEAD}<object><name>1</name><scene>1</scene></object></annotation>",
            r"<nobndbox> must hold an integer.*\n.*\(object 1, which has no <bndbox>: found nothing\)",
        ),
        (f"<annotation>{HEAD.replace('64', '')}</annotation>", r"<width> must.*\n.*\(<size>: found ''\)"),
        (f"<annotation>{HEAD.replace('64', '6_4')}</annotation>", r"<width> must.*\n.*\(<size>: found '6_4'\)"),
        (f"<annotation>{HEAD.replace('64', '1' * 5000)}</annotation>", r"<width> must.*\n.*\(<size>: found '1{39}\)"),
        (f"<annotation>{HEAD.replace('48', '0')}</annotation>", r"<height> must be at least 1.*\n.*found 64 and 0"),
        (f"<annotation>{HEAD.replace('64', '-64')}</annotation>", r"must be at least 1.*\n.*found -64 and 48"),
        (f"<annotation>{HEAD}{HEAD}</annotation>", r"<width> must hold an integer.*\n.*found '64' and '64'"),
        (
            f"<annotation>{HEAD}<object><name>1</name>{BOX.replace('<ymin>', '<xmin>9</xmin><ymin>')}"
            "</object></annotation>",
            r"<xmin> must hold an integer.*\n.*\(object 1: found '1' and '9'\)",
        ),
        ("<a>" * 300_000, r"the XML is malformed"),
        (f"<annotation>{HEAD}<object><name>&who;</name></object></annotation>", r"malformed.*\n.*undefined entity"),
        ('<?xml version="1.0" encoding="utf-7"?><annotation/>', r"the XML is malformed"),
    ],
)
def test_broken_xml(raw: Path, tmp_path: Path, xml: str, message: str) -> None:
    (raw / "Annotations" / "11.xml").write_text(xml)
    with pytest.raises(DataError, match=message):
        run(raw, "--out", tmp_path / "out", "--ids", raw / "test.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "subset",
    [
        '<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY e "&b;&b;&b;&b;">',
        '<!ENTITY e SYSTEM "file:///etc/hostname">',
        "",
    ],
    ids=["expanding", "external", "empty"],
)
def test_a_doctype_is_refused(raw: Path, tmp_path: Path, subset: str) -> None:
    xml = f"<!DOCTYPE annotation [{subset}]><annotation>{HEAD}<object><name>&e;</name>{BOX}</object></annotation>"
    (raw / "Annotations" / "11.xml").write_text(xml)
    with pytest.raises(DataError, match=r"the XML has a DOCTYPE.* not read.*\n.*11\.xml"):
        run(raw, "--out", tmp_path / "out", "--ids", raw / "test.txt")


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
def test_broken_sentences(raw: Path, tmp_path: Path, lines: bytes, message: str) -> None:
    (raw / "Sentences" / "11.txt").write_bytes(lines)
    with pytest.raises(DataError, match=message):
        run(raw, "--out", tmp_path / "out", "--ids", raw / "test.txt")
    assert not (tmp_path / "out").exists()


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["Annotations/11.xml", "Sentences/11.txt"])
@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "archive"])
def test_files_that_an_editor_saved_with_a_byte_order_mark(raw: Path, tmp_path: Path, name: str, zipped: bool) -> None:
    """LINES_11 begins with a phrase, which must not be lost."""
    run(raw, "--out", tmp_path / "expected", "--ids", raw / "val.txt")
    data = (raw / name).read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    (raw / name).write_bytes(BOM + data)
    zip_entities(raw, tmp_path / "annotations.zip")
    run(tmp_path / "annotations.zip" if zipped else raw, "--out", tmp_path / "out", "--ids", raw / "val.txt")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_marks_within_words_are_counted(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The owners' reader makes no phrase of them either; the summary says so."""
    (raw / "Sentences" / "11.txt").write_text(f'A man .\n"[/EN#1/people Two men]\n\ufeff{LINES_11}', encoding="utf-8")
    run(raw, "--out", tmp_path / "out", "--ids", raw / "test.txt")
    said = "; warning: 2 sentences have '[/EN#' within a word, which marks no phrase\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("name", ["Annotations/11.xml", "Sentences/11.txt"])
def test_a_file_that_is_far_too_large(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, name: str
) -> None:
    """It is not read to its end, whatever an archive says of its size."""
    monkeypatch.setattr(archives, "AT_ONCE", 1 << 16)
    (raw / name).write_bytes(b" " * (1 << 20))
    with zipfile.ZipFile(tmp_path / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in raw.glob("*/*"):
            archive.write(path, path.relative_to(raw))
    source = tmp_path / "annotations.zip" if zipped else raw
    with pytest.raises(DataError, match=rf"the file is larger than 16 MB, .*\n.*{name}"):
        run(source, "--out", tmp_path / "out", "--ids", raw / "val.txt")


def test_an_archive_with_hidden_and_repeated_files(raw: Path, tmp_path: Path) -> None:
    run(raw, "--out", tmp_path / "expected", "--ids", raw / "val.txt")
    path = tmp_path / "annotations.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(raw.glob("*/*")):
            archive.write(file, f"flickr/{file.relative_to(raw)}")
        for folder in ("__MACOSX/flickr", "flickr/__MACOSX", ".Trash-1000", "flickr/.git"):
            archive.writestr(f"{folder}/Annotations/11.xml", b"\x00\x05\x16\x07")
            archive.writestr(f"{folder}/Annotations/._11.xml", b"\x00\x05\x16\x07")
    run(path, "--out", tmp_path / "out", "--ids", raw / "val.txt")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("old/Annotations/11.xml", XML_5)
    with pytest.raises(
        DataError, match=r"annotations\.zip: holds Annotations/11\.xml twice \(flickr/Ann.* and old/Ann.*remove one"
    ):
        run(path, "--out", tmp_path / "out", "--ids", raw / "val.txt")


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "archive"])
def test_images_without_files_make_one_message(raw: Path, tmp_path: Path, zipped: bool) -> None:
    (raw / "Annotations" / "5.xml").unlink()
    (raw / "Sentences" / "11.txt").unlink()
    zip_entities(raw, tmp_path / "annotations.zip")
    source = tmp_path / "annotations.zip" if zipped else raw
    with pytest.raises(DataError) as caught:
        run(source, "--out", tmp_path / "out", "--ids", raw / "val.txt")
    assert str(caught.value).splitlines() == [
        "the file is missing; check that the image ids belong to these annotations - 2 found:",
        f"  {source}: Sentences/11.txt",
        f"  {source}: Annotations/5.xml",
    ]


def test_a_damaged_archive(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "annotations.zip"
    zip_entities(raw, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"annotations\.zip: not a readable zip archive .* is the download complete\?"):
        run(path, "--out", tmp_path / "out", "--ids", raw / "val.txt")
    start = whole.index(b"Annotations/11.xml") + len("Annotations/11.xml")
    path.write_bytes(whole[:start] + bytes(20) + whole[start + 20 :])
    with pytest.raises(DataError, match=r"cannot be unpacked; .*\n.*annotations\.zip: Annotations/11\.xml"):
        run(path, "--out", tmp_path / "out", "--ids", raw / "val.txt")


def test_a_place_without_annotations(raw: Path, tmp_path: Path) -> None:
    for source in (tmp_path / "nowhere", raw / "Sentences"):
        with pytest.raises(
            DataError, match=rf"{source.name}: holds neither Annotations/ and Sentences/ nor annot.*zip"
        ):
            run(source, "--out", tmp_path / "out")


def test_broken_split_files(raw: Path, tmp_path: Path) -> None:
    (raw / "train.txt").write_text("5\n11\n5\n")
    with pytest.raises(
        DataError, match=r"listed more than once; leave out the repeated lines.*\n.*train\.txt: image 5 \(2 times\)"
    ):
        run(raw, "--out", tmp_path / "out")
    (raw / "train.txt").unlink()
    with pytest.raises(DataError, match=r"train\.txt: does not exist; name the files of image ids, .* by --ids"):
        run(raw, "--out", tmp_path / "out")
    (tmp_path / "val.txt").write_text("5")
    with pytest.raises(DataError, match=r"val\.txt: another --ids file is named val\.txt as well"):
        run(raw, "--out", tmp_path / "out", "--ids", raw / "val.txt", tmp_path / "val.txt")
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_no_half_file(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        run(raw, "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def test_the_functions_alone() -> None:
    assert parse_annotation(XML_11.encode()) == BOXES_11
    assert parse_sentences(LINES_11.encode()) == SENTENCES_11
    assert parse_sentence("[/EN#7/a/b x]") == {"sentence": "x", "phrases": [phrase(0, "x", "7", "a", "b")]}
