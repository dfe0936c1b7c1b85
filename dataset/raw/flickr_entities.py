"""Flickr30k Entities as its owners publish it -> the files that info-ground writes (Plummer et al., ICCV 2015).

Raw: Annotations/<id>.xml, objects with the ids of the phrases that name them and a box; Sentences/<id>.txt, a sentence
a line, phrases as `[/EN#<phrase id>/<type>[/<type>...] the words]`; a file of image ids per split. The results are what
dataset/flickr.py reads (docs/method.md, Data formats). Odd input that the owners' own reader accepts is read as
it does: an object without a name is ignored, and boxes are neither merged nor clipped nor left out.
"""

import contextlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple
from xml.etree import ElementTree

from tqdm import tqdm

from dataset.expressions import EntryProblem, Problems
from dataset.flickr import load_ids
from dataset.raw.archives import BROKEN_ZIP, require_file, visible_members
from dataset.reading import AT_ONCE, DataError
from files import decode_text
from utils import write_text

ARCHIVE = "annotations.zip"
SPLIT_FILES = ("train.txt", "val.txt", "test.txt")
SPAN = "[/EN#"
INCOMPLETE = "is the download complete?"
ReadFile = Callable[[str], bytes]


class EntitiesSplit(NamedTuple):
    """A split: its image ids in the order of its file, and by image id the content of its two JSON files."""

    ids: list[str]
    boxes: dict[str, dict[str, Any]]
    sentences: dict[str, list[dict[str, Any]]]

    def summary(self) -> str:
        """How many images, sentences and phrases with a box; these last are what evaluation counts."""
        sentences = [(self.boxes[key]["boxes"], row) for key, rows in self.sentences.items() for row in rows]
        phrases = sum(phrase["phrase_id"] in boxes for boxes, row in sentences for phrase in row["phrases"])
        marked = sum(SPAN in row["sentence"] for _, row in sentences)
        odd = f"; warning: {marked} sentences have {SPAN!r} within a word, which marks no phrase" if marked else ""
        return f"{len(self.ids)} images, {len(sentences)} sentences, {phrases} phrases with a box{odd}"


def convert(source: Path, ids_files: Sequence[Path]) -> dict[str, EntitiesSplit]:
    """Read the annotations of every image of the splits, each named as its ids file (`val.txt`: "val").

    Args:
        source: the folder that holds Annotations/ and Sentences/, or annotations.zip; or such an archive.

    Raises:
        DataError: files that cannot be used; all kinds of problems of the images in one message.
    """
    with Problems() as problems, open_annotations(source) as (place, read):
        splits = {name: EntitiesSplit(ids, {}, {}) for name, ids in load_splits(ids_files).items()}
        for name, split in splits.items():
            for image_id in tqdm(split.ids, desc=name, unit="image", disable=None):
                with problems.at(f"{place}: Annotations/{image_id}.xml"):
                    split.boxes[image_id] = parse_annotation(read(f"Annotations/{image_id}.xml"))
                with problems.at(f"{place}: Sentences/{image_id}.txt"):
                    split.sentences[image_id] = parse_sentences(read(f"Sentences/{image_id}.txt"))
    return splits


def write(out: Path, splits: dict[str, EntitiesSplit]) -> None:
    """Write each split's bounding_boxes_<split>.json, sentences_<split>.json (as info-ground) and <split>.txt."""
    for name, split in splits.items():
        for kind, content in (("bounding_boxes", split.boxes), ("sentences", split.sentences)):
            write_text(out / f"{kind}_{name}.json", json.dumps(content, sort_keys=True, indent=4))
        write_text(out / f"{name}.txt", "".join(f"{image_id}\n" for image_id in split.ids))


# ---- where the files lie


def load_splits(ids_files: Sequence[Path]) -> dict[str, list[str]]:
    """The image ids of each split, by the name of its file; raises `DataError`."""
    splits: dict[str, list[str]] = {}
    for path in ids_files:
        require_file(path, "name the files of image ids, one a split, by --ids")
        if path.stem in splits:
            raise DataError(f"{path}: another --ids file is named {path.name} as well; a split has its file's name")
        splits[path.stem] = load_ids(str(path))
    return splits


@contextlib.contextmanager
def open_annotations(source: Path) -> Iterator[tuple[Path, ReadFile]]:
    """The folder or archive that is read, and a function from such a name as "Sentences/12.txt" to the file's bytes.

    The function raises `EntryProblem` when the file is missing or broken; this one `DataError`.
    """
    if all((source / folder).is_dir() for folder in ("Annotations", "Sentences")):
        yield source, lambda name: _read(lambda: (source / name).open("rb"))
        return
    path = source / ARCHIVE if source.is_dir() else source
    if not path.is_file():
        raise DataError(
            f"{source}: holds neither Annotations/ and Sentences/ nor {ARCHIVE}, and is no archive either; name the "
            "folder of the Flickr30k Entities download"
        )
    try:
        archive = zipfile.ZipFile(path)
    except BROKEN_ZIP as error:
        raise DataError(f"{path}: not a readable zip archive ({str(error)[:100]}); {INCOMPLETE}") from None
    members: dict[str, zipfile.ZipInfo] = {}
    with archive:
        for info in visible_members(archive):
            key = "/".join(PurePosixPath(info.filename).parts[-2:])
            if members.setdefault(key, info) is not info:
                raise DataError(f"{path}: holds {key} twice ({members[key].filename} and {info.filename}); remove one")
        yield path, lambda name: _read(lambda: archive.open(members[name]))


def _read(open_file: Callable[[], IO[bytes]]) -> bytes:
    """The content of a file of a folder or an archive; raises `EntryProblem`."""
    try:
        with open_file() as file:
            data = file.read(AT_ONCE + 1)
    except (FileNotFoundError, KeyError):
        raise EntryProblem("the file is missing; check that the image ids belong to these annotations") from None
    except BROKEN_ZIP as error:
        raise EntryProblem(f"the file cannot be read; {INCOMPLETE}", str(error)[:100]) from None
    if len(data) > AT_ONCE:
        raise EntryProblem(f"the file is larger than {AT_ONCE >> 20} MB, which none of Flickr30k Entities is")
    return data


# ---- Annotations


class _Tree(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE. Without one XML has no entities beyond its five own: nothing can expand or be fetched."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise EntryProblem(
            "the XML has a DOCTYPE, which Flickr30k Entities never has; it is not read: download it anew"
        )


def parse_annotation(data: bytes) -> dict[str, Any]:
    """An image's {"boxes": {phrase_id: [[xmin, ymin, xmax, ymax], ...]}, "scene", "nobox", "width", "height", "depth"}.

    Coordinates are one less than the XML's, which count from 1. An object with several names gives its box to each;
    several objects of one name give it several boxes. Objects without a box are listed by their flags.

    Raises:
        EntryProblem: the XML is malformed, or an object of it.
    """
    try:
        root = ElementTree.fromstring(data, ElementTree.XMLParser(target=_Tree()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: encodings
        raise EntryProblem(f"the XML is malformed; {INCOMPLETE}", str(error)) from None
    image: dict[str, Any] = {"boxes": {}, "scene": [], "nobox": []}
    for tag in ("width", "height", "depth"):
        image[tag] = _integer(root, f"size/{tag}", "<size>")
    if min(image["width"], image["height"]) < 1:
        raise EntryProblem("<width> and <height> must be at least 1", f"found {image['width']} and {image['height']}")
    for number, item in enumerate(root.iterfind("object"), 1):
        where = f"object {number}"
        names = [(name.text or "").strip() for name in item.iterfind("name")]
        if not all(names):
            raise EntryProblem("a <name> of an object is empty; it must hold a phrase id", where)
        boxes = item.findall("bndbox")
        if len(boxes) > 1:
            raise EntryProblem("an object has several <bndbox>; give each an object of its own", where)
        if boxes:
            corners = [_integer(boxes[0], tag, where) - 1 for tag in ("xmin", "ymin", "xmax", "ymax")]
            for name in names:
                image["boxes"].setdefault(name, []).append(list(corners))
        else:
            for key, tag in (("nobox", "nobndbox"), ("scene", "scene")):
                if _integer(item, tag, f"{where}, which has no <bndbox>") > 0:
                    image[key] += names
    return image


def _integer(parent: ElementTree.Element, path: str, where: str) -> int:
    """The integer of the only element of that path; it has at most 9 digits, as numbers of pixels do."""
    texts = [item.text or "" for item in parent.iterfind(path)]
    if len(texts) != 1 or not re.fullmatch("[+-]?[0-9]{1,9}", texts[0].strip()):
        found = " and ".join(f"{text!r:.40}" for text in texts[:2]) or "nothing"
        raise EntryProblem(f"<{path.rpartition('/')[2]}> must hold an integer", f"{where}: found {found}")
    return int(texts[0])


# ---- Sentences


def parse_sentences(data: bytes) -> list[dict[str, Any]]:
    """An image's sentences, one a line, blank lines left out; see `parse_sentence`. Raises `EntryProblem`."""
    try:
        lines = decode_text(data).split("\n")
    except ValueError as error:
        raise EntryProblem(f"the file is not UTF-8 text; {INCOMPLETE}", str(error)) from None
    sentences = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                sentences.append(parse_sentence(line))
            except EntryProblem as problem:
                raise EntryProblem(problem.kind, f"line {number}: {problem.detail}") from None
    if not sentences:
        raise EntryProblem(f"the file holds no sentence; {INCOMPLETE}")
    return sentences


def parse_sentence(line: str) -> dict[str, Any]:
    """A sentence {"sentence", "phrases": [{"first_word_index", "phrase", "phrase_id", "phrase_type": [..]}]}.

    Words stand between white space; "sentence" joins them without the marks, and "first_word_index" counts them. A
    span's bracket closes at the end of a word, or alone: then it leaves an empty word, as with the owners' own reader.

    Raises:
        EntryProblem: a span without id, type or words, or one that never ends.
    """
    words: list[str] = []
    phrases: list[dict[str, Any]] = []
    mark: str | None = None  # of the span that is open,
    row: dict[str, Any] = {}  # and what is known of it
    for token in line.split():
        if token.startswith(SPAN):
            if mark is not None:
                break
            phrase_id, *types = token.removeprefix(SPAN).split("/")
            if not (phrase_id and types and all(types)) or token.endswith("]"):
                raise EntryProblem(f"a span must be {SPAN}<phrase id>/<type> and words up to a ']'", token[:60])
            mark = token
            row = {"first_word_index": len(words), "phrase_id": phrase_id, "phrase_type": types}
        elif mark is not None and token.endswith("]"):
            words.append(token[:-1])
            phrase = " ".join(words[row["first_word_index"] :])
            if not phrase:
                raise EntryProblem("a span has no words", mark[:60])
            phrases.append({**row, "phrase": phrase})
            mark = None
        else:
            words.append(token)
    if mark is not None:
        raise EntryProblem("a span is not closed: no word of it ends in ']'", mark[:60])
    return {"sentence": " ".join(words), "phrases": phrases}
