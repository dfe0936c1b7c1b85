"""Writes annotations in their owners' raw layouts, and runs prepare.py on them."""

import json
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import prepare

Row = dict[str, Any]


def run(*words: object) -> None:
    """A command of prepare.py."""
    args = prepare.parse_args([*map(str, words)])
    args.run(args)


def contents(folder: Path) -> dict[str, str]:
    """The texts of a folder's files by name."""
    return {path.name: path.read_bytes().decode() for path in folder.iterdir()}


def write(path: Path, value: Any) -> Path:
    """A text as it is, or a value as JSON."""
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def entities_xml(image: Row) -> str:
    """Flickr30k Entities' XML of an image of info-ground's form; objects of one box share an element, as there."""
    owners: dict[tuple[int, ...], list[str]] = {}
    objects = []
    for name, boxes in image["boxes"].items():
        first, *more = (tuple(box) for box in boxes)
        owners.setdefault(first, []).append(name)
        objects += [([name], box) for box in more]
    # An object's names come in the order of its first boxes, and before the further boxes of any of them.
    objects = [(names, box) for box, names in owners.items()] + objects
    parts = [f"<filename>x.jpg</filename><size>{_tags(image, ('width', 'height', 'depth'))}</size>"]
    for names, box in objects:
        corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), (value + 1 for value in box), strict=True))
        parts.append(f"<object>{_names(names)}<bndbox>{_tags(corners, corners)}</bndbox></object>")
    for key in ("scene", "nobox"):
        for name in image[key]:
            flags = {"scene": int(key == "scene"), "nobndbox": int(key == "nobox")}
            parts.append(f"<object>{_names([name])}{_tags(flags, flags)}</object>")
    return "<annotation>\n\t" + "\n\t".join(parts) + "\n</annotation>\n"


def _names(names: Iterable[str]) -> str:
    return "".join(f"<name>{escape(name)}</name>" for name in names)


def _tags(values: Row, keys: Iterable[str]) -> str:
    return "".join(f"<{key}>{values[key]}</{key}>" for key in keys)


def entities_sentence(sentence: Row) -> str:
    """A line of Sentences/<id>.txt of a sentence of info-ground's form."""
    words = sentence["sentence"].split(" ")
    for phrase in sentence["phrases"]:
        first = phrase["first_word_index"]
        last = first + len(phrase["phrase"].split(" ")) - 1
        words[last] += "]"
        words[first] = f"[/EN#{'/'.join([phrase['phrase_id'], *phrase['phrase_type']])} {words[first]}"
    return " ".join(words)


def write_entities(folder: Path, boxes: dict[str, Row], sentences: dict[str, list[Row]]) -> None:
    """Annotations/ and Sentences/ of the images of info-ground's two files."""
    for name in ("Annotations", "Sentences"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for image_id, image in boxes.items():
        (folder / "Annotations" / f"{image_id}.xml").write_text(entities_xml(image), encoding="utf-8")
        lines = "".join(entities_sentence(sentence) + "\n" for sentence in sentences[image_id])
        (folder / "Sentences" / f"{image_id}.txt").write_text(lines, encoding="utf-8")


def zip_entities(folder: Path, archive: Path) -> None:
    """Both folders in an archive, with what archives made on a Mac have beside them."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.glob("*/*")):
            if path.parent.name in ("Annotations", "Sentences"):
                file.write(path, f"{path.parent.name}/{path.name}")
                file.writestr(f"__MACOSX/{path.parent.name}/._{path.name}", b"\x00\x05\x16\x07")


def write_refer(folder: Path, split_by: str, refs: list[Row], instances: Row) -> None:
    """refs(SPLIT_BY).p and instances.json of a data set's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "instances.json").write_text(json.dumps(instances), encoding="utf-8")


def mattnet_detections(grouped: dict[str, list[list[float]]]) -> list[Row]:
    """MAttNet's list of detections that dets.json groups: those of different images take turns."""
    rows = []
    for rank in range(max(map(len, grouped.values()))):
        for image_id, boxes in grouped.items():
            if rank < len(boxes):
                box, score = boxes[rank][:4], 1 / (1 + rank)
                row = {"det_id": len(rows), "h5_id": len(rows), "box": box, "image_id": int(image_id), "score": score}
                rows.append({**row, "category_id": 1, "category_name": "person"})
    return rows
