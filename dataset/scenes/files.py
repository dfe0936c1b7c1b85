"""Write the synthetic scenes as data sets, in the formats of the real ones (docs/method.md, Data formats).

The output folder gets images/, train_captions.json, train_phrases.json, train_relations.json, refer/refcoco+,
refer/refclef, flickr/, matching_{val,testB}.json, text_encoder/vocab.txt and, last of all, scenes.json. Image paths are
relative to images/. masks/ holds train_phrases.json and refer/ once more, with the objects' own pixels in place of
boxes.
"""

import itertools
import json
import pickle
import re
import shutil
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from dataset.scenes import language as phrases
from dataset.scenes import world
from dataset.scenes.language import (
    CAPTION_STYLES,
    KINDS,
    Spec,
    compose,
    compose_part,
    find_phrase,
    matches,
    nouns,
    text,
)
from dataset.scenes.world import Scene, draw_scene, pick, shuffled
from dataset.segmentation import area, from_mask
from utils import atomic_path, write_text

VERSION = 3
SPLITS = ("train", "val", "testA", "testB")
MANIFEST = "scenes.json"
IDS_PER_SPLIT = 100_000
SMALLEST_SIZE = 48  # pixels; in smaller images the shapes look alike
ENDING = "on the background"  # of some Flickr30k sentences: a phrase without a box
Row = dict[str, Any]


class Drawn(NamedTuple):
    """A scene and its image id. `rng` makes all random choices in the texts about it."""

    image_id: int
    split: str
    scene: Scene
    rng: Generator

    @property
    def name(self) -> str:
        """Name of its file in images/."""
        return f"{self.image_id:06d}.jpg"


def parameters(seed: int, train: int, annotated: int, evaluation: int, size: int) -> Row:
    """All that decides the content of a folder."""
    counts = {"train": train, "annotated": annotated, "evaluation": evaluation}
    return {"version": VERSION, "seed": seed, **counts, "size": size}


def read_manifest(out: Path) -> Row | None:
    """The scenes.json of a folder ({"parameters", "counts"}); None if the folder is not complete."""
    try:
        return json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def generate(
    out: Path,
    seed: int = 0,
    train: int = 12000,
    annotated: int = 4000,
    evaluation: int = 250,
    size: int = world.REFERENCE,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, int]:
    """Write the data set. Equal arguments give equal bytes, and no scene depends on the number of scenes.

    Args:
        train: number of training scenes, at most `IDS_PER_SPLIT`; all have captions.
        annotated: how many of them, the first ones, also have region phrases with boxes.
        evaluation: number of scenes in each of val, testA and testB. testB asks for pairs of colour and shape that
            training never shows.
        size: mean of an image's width and height, in pixels, at least `SMALLEST_SIZE`.
        progress: called with 1 after each image.

    Returns:
        file or benchmark -> its number of entries.
    """
    (out / MANIFEST).unlink(missing_ok=True)
    (out / "images").mkdir(parents=True, exist_ok=True)
    drawn: dict[str, list[Drawn]] = {split: [] for split in SPLITS}
    for index, split in enumerate(SPLITS):
        for i in range(train if split == "train" else evaluation):
            rng = np.random.default_rng([seed, index, i])
            one = Drawn(IDS_PER_SPLIT * index + i, split, draw_scene(rng, size, split == "testB"), rng)
            image = Image.fromarray(world.render(one.scene, rng))
            image.save(out / "images" / one.name, quality=95, subsampling=0)
            drawn[split].append(one)
            progress(1)

    rows = {"train_captions.json": [_caption_row(one) for one in drawn["train"]]}
    rows["train_phrases.json"] = [row for one in drawn["train"][:annotated] for row in _phrase_rows(one)]
    rows["train_relations.json"] = [_relation_row(row) for row in rows["train_phrases.json"]]
    counts = {name: len(found) for name, found in rows.items()}
    # RefCOCO+ has no words of location.
    evaluated = drawn["val"] + drawn["testA"] + drawn["testB"]
    counts["refcoco+"] = _write_refer(out / "refer", "refcoco+", evaluated, ("attribute", "size"))
    counts["refclef"] = _write_refer(out / "refer", "refclef", evaluated, KINDS)
    for split, ones in (("val", drawn["val"]), ("test", drawn["testA"] + drawn["testB"])):
        counts[f"flickr {split}"] = _write_flickr(out / "flickr", split, ones)
    for index, split in ((1, "val"), (3, "testB")):
        found = _matching_rows(drawn[split], np.random.default_rng([seed, index, evaluation, 1]))
        name = f"matching_{split}.json"
        rows[name], counts[name] = found, len(found)
    for name, found in rows.items():
        _write_json(out / name, found)
    write_text(out / "text_encoder" / "vocab.txt", "\n".join(vocabulary()) + "\n")
    _write_masks(out, [*drawn["train"][:annotated], *evaluated], rows["train_phrases.json"])
    manifest = {"parameters": parameters(seed, train, annotated, evaluation, size), "counts": counts}
    _write_json(out / MANIFEST, manifest, indent=2)
    return counts


def vocabulary() -> list[str]:
    """The WordPiece vocabulary: BERT's special tokens, all words of the scenes, letters and digits for other words."""
    characters = string.ascii_lowercase + string.digits
    known = set(phrases.known_words()) | set(ENDING.split()) | set(characters)
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(known), *("##" + c for c in characters)]


# ---- training


def _caption_row(one: Drawn) -> Row:
    """A training entry without boxes: captions of the whole scene and of parts of it, and a phrase for one object."""
    texts = [compose(one.scene, one.rng, style).text for style in CAPTION_STYLES]
    texts += [compose_part(one.scene, one.rng).text for _ in CAPTION_STYLES]
    target = int(one.rng.integers(len(one.scene.things)))
    texts += [text(spec, one.rng) for spec in _paraphrases(one.scene, target, one.rng, 1, KINDS[1:])]
    return {"image": one.name, "caption": texts, "bbox": []}


def _phrase_rows(one: Drawn) -> list[Row]:
    """Training entries with boxes: three objects with two or three phrases each; in 45% of the scenes one more phrase
    that is true of several objects, with all their boxes."""
    scene, rng = one.scene, one.rng
    rows = []
    for target in shuffled(rng, range(len(scene.things)))[:3]:
        specs = _paraphrases(scene, target, rng, int(rng.integers(2, 4)))
        texts = list(dict.fromkeys(text(spec, rng) for spec in specs))
        if texts:
            rows.append({"image": one.name, "caption": texts, "bbox": [list(scene.things[target].box)]})
    if rng.random() < 0.45:
        specs = [spec for spec in nouns(pick(rng, scene.things)) if len(matches(spec, scene)) > 1]
        if specs:
            spec = pick(rng, specs)
            rows.append({"image": one.name, "caption": [text(spec, rng, ("",))], "bbox": _boxes(spec, scene)})
    return rows


def _relation_row(row: Row) -> Row:
    """A training entry with SelfEQ's `relation`: synonyms of the words that most of its phrases have, if any has."""
    texts, best, relation = "\n".join(row["caption"]), 0, {}
    for words, others in phrases.synonyms():
        count = len(re.findall(rf"\b{words}\b", texts))
        # "small" is not replaced where that would change "smallest", nor "left of" in "to the left of".
        if best < count == texts.count(words) and not any(words in other and other in texts for other in others):
            best, relation = count, {"group": words, "synonym": others, "hypernym": [], "exclusion": []}
    return row | ({"relation": relation} if relation else {})


def _paraphrases(scene: Scene, target: int, rng: Generator, count: int, kinds: Sequence[str] = KINDS) -> list[Spec]:
    """Up to `count` phrases for one object, each of another kind."""
    found = (find_phrase(scene, target, kind, rng) for kind in shuffled(rng, kinds))
    return list(itertools.islice((spec for spec in found if spec), count))


def _boxes(spec: Spec, scene: Scene) -> list[list[int]]:
    """The boxes [x1, y1, x2, y2] of all objects that a phrase is true of."""
    return [list(scene.things[i].box) for i in matches(spec, scene)]


def _xywh(thing: world.Thing) -> list[int]:
    """The box of an object as [x, y, width, height]."""
    x1, y1, x2, y2 = thing.box
    return [x1, y1, x2 - x1, y2 - y1]


def _targets(one: Drawn) -> list[int]:
    """The objects that evaluation may ask for, in random order; in testB those of `HELD_OUT` pairs alone."""
    things = one.scene.things
    order = shuffled(one.rng, range(len(things)))
    return [i for i in order if one.split != "testB" or (things[i].colour, things[i].shape) in world.HELD_OUT]


# ---- masks


def _write_masks(out: Path, drawn: list[Drawn], phrases: list[Row]) -> None:
    """Write the files of masks/. refer/ keeps the outlines of boxes that it always had as segmentations."""
    regions = {
        (one.name, thing.box): from_mask(world.thing_mask(one.scene, thing))
        for one in drawn
        for thing in one.scene.things
    }
    entries = [
        {"image": row["image"], "caption": row["caption"]}
        | {"segmentation": [regions[row["image"], tuple(box)] for box in row["bbox"]]}
        for row in phrases
    ]
    _write_json(out / "masks" / "train_phrases.json", entries)
    for source in sorted((out / "refer").iterdir()):
        instances, folder = json.loads((source / "instances.json").read_text()), out / "masks" / "refer" / source.name
        names = {row["id"]: row["file_name"] for row in instances["images"]}
        for row in instances["annotations"]:
            x, y, w, h = row["bbox"]
            region = regions[names[row["image_id"]], (x, y, x + w, y + h)]
            row |= {"segmentation": region, "area": area(region)}
        _write_json(folder / "instances.json", instances)
        shutil.copyfile(source / "refs(unc).p", folder / "refs(unc).p")


# ---- RefCOCO+ and RefCLEF


def _write_refer(root: Path, dataset: str, drawn: list[Drawn], kinds: Sequence[str]) -> int:
    """Write REFER's files and the test lists: two targets a scene, two sentences a target. Returns how many targets."""
    refs: list[Row] = []
    tests: dict[str, list[Row]] = {"val": [], "test": []}
    images: list[Row] = []
    annotations: list[Row] = []
    sent_ids = itertools.count()
    for one in drawn:
        images.append({"id": one.image_id, "width": one.scene.width, "height": one.scene.height, "file_name": one.name})
        own = [_annotation(k, one.image_id, thing) for k, thing in enumerate(one.scene.things, len(annotations))]
        annotations += own
        for target in _targets(one)[:2]:
            sentences = []
            for spec in _paraphrases(one.scene, target, one.rng, 2, kinds):
                sent = text(spec, one.rng)
                row: Row = {"image": one.name, "text": sent, "ref_id": len(refs)}
                row |= {"split": one.split} if dataset == "refclef" else {}
                tests["val" if one.split == "val" else "test"].append(row)
                sentences.append({"sent_id": next(sent_ids), "sent": sent, "raw": sent, "tokens": sent.split()})
            if sentences:
                ids = {"ref_id": len(refs), "ann_id": own[target]["id"], "image_id": one.image_id}
                of_image = {"category_id": own[target]["category_id"], "file_name": one.name, "split": one.split}
                said = {"sent_ids": [sentence["sent_id"] for sentence in sentences], "sentences": sentences}
                refs.append({**ids, **of_image, **said})
    folder = root / dataset
    categories = [{"id": k, "name": shape} for k, shape in enumerate(world.SHAPES, 1)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    _write_json(folder / "instances.json", instances)
    with atomic_path(folder / "refs(unc).p") as temporary:
        temporary.write_bytes(pickle.dumps(refs, protocol=2))
    if dataset == "refcoco+":
        _write_json(folder / "dets.json", {str(one.image_id): _detections(one) for one in drawn})
    for part, rows in tests.items():
        _write_json(folder / f"{dataset}_{part}.json", rows)
    return len(refs)


def _annotation(index: int, image_id: int, thing: world.Thing) -> Row:
    x, y, w, h = _xywh(thing)
    category = world.SHAPES.index(thing.shape) + 1
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    row = {"id": index, "image_id": image_id, "bbox": [x, y, w, h], "category_id": category}
    return row | {"segmentation": outline, "area": w * h, "iscrowd": 0}


def _detections(one: Drawn) -> list[list[float]]:
    """Simulated detections [x, y, w, h, score] inside the image, best score first.

    Each object has its own box and a shifted one; four boxes are random.
    """
    scene, rng = one.scene, one.rng
    found = []
    for thing in scene.things:
        x, y, w, h = _xywh(thing)
        dx, dy = rng.uniform(-0.3, 0.3, 2) * (w, h)
        sw, sh = rng.uniform(0.8, 1.25, 2) * (w, h)
        found += [[x, y, w, h, rng.uniform(0.9, 1)], [x + dx, y + dy, sw, sh, rng.uniform(0.5, 0.9)]]
    for _ in range(4):
        w, h = rng.uniform(0.15, 0.6, 2) * (scene.width, scene.height)
        x, y = rng.uniform(0, 1, 2) * (scene.width - w, scene.height - h)
        found.append([x, y, w, h, rng.uniform(0.1, 0.5)])
    rows = []
    for x, y, w, h, score in sorted(found, key=lambda row: -row[4]):
        x1, y1 = max(x, 0), max(y, 0)
        box = (x1, y1, min(x + w, scene.width) - x1, min(y + h, scene.height) - y1)
        rows.append([*(round(float(value), 2) for value in box), round(float(score), 4)])
    return rows


# ---- Flickr30k Entities, in info-ground's format


def _write_flickr(folder: Path, split: str, drawn: list[Drawn]) -> int:
    """Write two sentences an image; a phrase has the boxes of all objects that it is true of.

    Returns the number of phrases with boxes.
    """
    images = {Path(one.name).stem: _flickr_image(one) for one in drawn}
    write_text(folder / f"{split}.txt", "".join(f"{name}\n" for name in images))
    for name, part in (("bounding_boxes", 0), ("sentences", 1)):
        content = {key: image[part] for key, image in images.items()}
        _write_json(folder / f"{name}_{split}.json", content, sort_keys=True, indent=4)
    return sum(
        phrase["phrase_id"] in image["boxes"]
        for image, sentences in images.values()
        for row in sentences
        for phrase in row["phrases"]
    )


def _flickr_image(one: Drawn) -> tuple[Row, list[Row]]:
    """Boxes and sentences of an image. A phrase id is one set of objects, or the picture, or its background."""
    scene, rng = one.scene, one.rng
    picture, background = str(100 * one.image_id), str(100 * one.image_id + 1)
    ids: dict[tuple[int, ...], str] = {}
    boxes: dict[str, list[list[int]]] = {}
    sentences: list[Row] = []
    for style in ("plain", "size"):
        caption = compose(scene, rng, style, limit=40, opening=0.5)
        phrases = []
        if caption.mentions[0].first:
            phrases.append(_flickr_phrase(0, " ".join(caption.tokens[:2]), picture, "other"))
        for mention in caption.mentions:
            objects = tuple(matches(mention.spec, scene))
            phrase_id = ids.setdefault(objects, str(100 * one.image_id + 2 + len(ids)))
            boxes[phrase_id] = _boxes(mention.spec, scene)
            phrases.append(_flickr_phrase(mention.first, mention.phrase, phrase_id, "other"))
        tokens = caption.tokens
        if rng.random() < 0.5:
            tokens = tokens + ENDING.split()
            phrases.append(_flickr_phrase(len(tokens) - 2, " ".join(tokens[-2:]), background, "scene"))
        sentences.append({"sentence": " ".join(tokens), "phrases": phrases})
    used = {phrase["phrase_id"] for sentence in sentences for phrase in sentence["phrases"]}
    image: Row = {"boxes": boxes, "width": scene.width, "height": scene.height, "depth": 3}
    image["scene"] = [background] if background in used else []
    image["nobox"] = [picture] if picture in used else []
    return image, sentences


def _flickr_phrase(first: int, phrase: str, phrase_id: str, kind: str) -> Row:
    return {"first_word_index": first, "phrase": phrase, "phrase_id": phrase_id, "phrase_type": [kind]}


# ---- image-text matching


class Statement(NamedTuple):
    """A text that is true of a scene.

    Args:
        form: texts of the same form differ in their words only.
        claims: what the text says of each object.
    """

    one: Drawn
    kind: str
    form: tuple[object, ...]
    text: str
    claims: list[Spec]


def _matching_rows(drawn: list[Drawn], rng: Generator) -> list[Row]:
    """Balanced image-text pairs: each true text of a scene is followed by a text of another scene that is false here.

    Both texts have the same form, so that only the image tells which is true.
    """
    statements = [statement for one in drawn for statement in _statements(one)]
    by_form: dict[tuple[object, ...], list[Statement]] = {}
    for statement in statements:
        by_form.setdefault(statement.form, []).append(statement)
    rows: list[Row] = []
    used: set[tuple[str, str]] = set()
    for statement in statements:
        scene, name = statement.one.scene, statement.one.name
        for other in shuffled(rng, by_form[statement.form]):
            clearly_false = any(not matches(spec, scene, lenient=True) for spec in other.claims)
            if clearly_false and (name, other.text) not in used:
                used.add((name, other.text))
                for words, match in ((statement.text, 1), (other.text, 0)):
                    rows.append({"image": name, "text": words, "match": match, "kind": statement.kind})
                break
    return rows


def _statements(one: Drawn) -> list[Statement]:
    """Two phrases of different kinds and two captions of different styles, all true of a scene."""
    scene, rng = one.scene, one.rng
    targets = itertools.cycle(_targets(one))
    phrases = ((kind, find_phrase(scene, next(targets), kind, rng)) for kind in shuffled(rng, KINDS))
    true = list(itertools.islice(((kind, spec) for kind, spec in phrases if spec), 2))
    found = [Statement(one, "phrase", (kind, *spec.form), text(spec, rng), [spec]) for kind, spec in true]
    for style in shuffled(rng, CAPTION_STYLES)[:2]:
        caption = compose(scene, rng, style)
        claims = [mention.spec for mention in caption.mentions]
        found.append(Statement(one, "caption", (style,), caption.text, claims))
    return found


def _write_json(path: Path, value: Any, **options: Any) -> None:
    write_text(path, json.dumps(value, **options) + "\n")
