"""Ways to damage the embedded scenes in data/scenes, each with what `prepare.py check` must say of it."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from PIL import Image

ROOT = Path(__file__).parents[3]
CONFIGS = sorted(f"configs/scenes/{path.name}" for path in (ROOT / "configs" / "scenes").glob("*.yaml"))
REFCOCO_CONFIG, FLICKR_CONFIG = "configs/scenes/Grounding_refcoco.yaml", "configs/scenes/Grounding_flickr.yaml"
SCENES = "data/scenes"
TRAIN, EVALUATION = 8, 4  # scenes
PHRASES, CAPTIONS = f"{SCENES}/train_phrases.json", f"{SCENES}/train_captions.json"
REFCOCO, REFCLEF, FLICKR = f"{SCENES}/refer/refcoco+", f"{SCENES}/refer/refclef", f"{SCENES}/flickr"


class Outcome(NamedTuple):
    """Exit status of `prepare.py check`, and what it prints."""

    status: int
    out: str


Check: TypeAlias = "Callable[..., Outcome]"


def load(path: str) -> Any:
    return json.loads(Path(path).read_text())


def edit(path: str, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    content = load(path)
    change(content)
    Path(path).write_text(json.dumps(content))


class Problem(NamedTuple):
    level: str
    file: str
    kind: str  # its beginning
    first: list[str] = []  # noqa: RUF012 - never changed


def write_cut(path: str) -> None:
    """Lose the second half of a file."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


def missing_file() -> Problem:
    Path(CAPTIONS).unlink()
    return Problem("error", CAPTIONS, f"{CAPTIONS}: cannot be read (No such file or directory); check the path")


def unreadable_pickle() -> Problem:
    path = f"{REFCLEF}/refs(unc).p"
    write_cut(path)
    return Problem("error", path, f"{path}: not a readable pickle (")


def missing_key() -> Problem:
    edit(PHRASES, lambda rows: rows[0].pop("caption"))
    return Problem("error", PHRASES, "key 'caption' is missing", [f"{PHRASES}: entry 0 (000000.jpg)"])


def empty_caption() -> Problem:
    edit(PHRASES, lambda rows: rows[2].update(caption="\u200b"))
    kind = f"{PHRASES}: captions of which nothing is left once cleaned; as empty_captions says, they stay"
    where = f"{PHRASES}: entry 2 ({load(PHRASES)[2]['image']}) ('\\u200b')"
    return Problem("warning", PHRASES, kind, [where])


def repeated_annotation() -> Problem:
    file = f"{REFCLEF}/instances.json"
    edit(file, lambda tables: tables["annotations"].append({**tables["annotations"][0], "bbox": [0, 0, 1, 1]}))
    tables = load(file)
    where = f"{file}: annotations entry {len(tables['annotations']) - 1} (id {tables['annotations'][0]['id']})"
    return Problem("error", file, "an earlier entry has the same id", [where])


def repeated_ref() -> Problem:
    file = Path(f"{REFCOCO}/refs(unc).p")
    refs = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps([*refs, {**refs[0], "image_id": refs[1]["image_id"]}]))
    where = f"{file}: ref {len(refs)} (ref_id {refs[0]['ref_id']})"
    return Problem("error", str(file), "an earlier entry has the same ref_id", [where])


def height_of_nothing() -> Problem:
    file = f"{FLICKR}/bounding_boxes_test.json"
    edit(file, lambda rows: rows["200003"].update(height=0))
    where = f"{file}: image 200003 (found 0 and {load(file)['200003']['width']})"
    return Problem("error", file, "keys 'height' and 'width' must be the image's pixels", [where])


def sentence_without_phrases() -> Problem:
    file = f"{FLICKR}/sentences_val.json"
    edit(file, lambda sentences: sentences["100002"][1].pop("phrases"))
    return Problem("error", file, "key 'phrases' is missing", [f"{file}: image 100002, sentence 1"])


def neither_true_nor_false() -> Problem:
    file = f"{SCENES}/matching_testB.json"
    edit(file, lambda rows: rows[3].update(match=2))
    return Problem("error", file, "key 'match' must be 0 or 1", [f"{file}: entry 3 (found 2)"])


def missing_image() -> Problem:
    Path(f"{SCENES}/images/000001.jpg").unlink()
    where = f"{entry_of('000001.jpg')} ({SCENES}/images/000001.jpg)"
    return Problem("error", f"{SCENES}/images", "the image file does not exist; check image_root", [where])


def entry_of(image: str) -> str:
    """The first training phrase of an image, as it is named in messages."""
    index = next(i for i, row in enumerate(load(PHRASES)) if row["image"] == image)
    return f"{PHRASES}: entry {index} ({image})"


def wrong_extension() -> Problem:
    Path(f"{SCENES}/images/000002.jpg").rename(f"{SCENES}/images/000002.jpeg")
    where = f"{entry_of('000002.jpg')} ({SCENES}/images/000002.jpg; there is 000002.jpeg)"
    return Problem(
        "error", f"{SCENES}/images", "the image file does not exist, but one of another extension does", [where]
    )


def truncated_image() -> Problem:
    path = f"{SCENES}/images/000003.jpg"
    write_cut(path)
    where = f"{entry_of('000003.jpg')} ({path}: image file is truncated"
    return Problem("error", f"{SCENES}/images", "the image cannot be decoded; is the download complete?", [where])


def other_content() -> Problem:
    path = f"{SCENES}/images/000004.jpg"
    Image.open(path).save(path, format="PNG")
    where = f"{entry_of('000004.jpg')} ({path}: PNG)"
    return Problem(
        "warning", f"{SCENES}/images", "the image's content is of another format than its name says", [where]
    )


def size_of(image: str) -> str:
    width, height = Image.open(f"{SCENES}/images/{image}").size
    return f"{width}x{height}"


def training_box_outside() -> Problem:
    index = next(i for i, row in enumerate(load(PHRASES)) if row["image"] == "000005.jpg")
    edit(PHRASES, lambda rows: rows[index].update(bbox=[[200, 10, 210, 20]]))
    where = f"{entry_of('000005.jpg')} ([200, 10, 210, 20] in {size_of('000005.jpg')})"
    return Problem("warning", PHRASES, "no box covers a pixel of the image: amc.empty_box says", [where])


def training_boxes_partly_outside() -> Problem:
    """Five of seven boxes: by a pixel and no more, one may be."""
    width, height = Image.open(f"{SCENES}/images/000006.jpg").size
    outside = [[0, 0, width + 1.5, 9], [0, 0, 9, height + 1.5], [-3, 0, 9, 9], [0, -1.5, 9, 9], [9, 0, 9, 9]]
    boxes = [[0, 0, 9, 9], [-1, -1, width + 1, height + 1], *outside]
    index = next(i for i, row in enumerate(load(PHRASES)) if row["image"] == "000006.jpg")
    edit(PHRASES, lambda rows: rows[index].update(bbox=boxes))
    shown = [f"[0, 0, {width + 1.5:g}, 9]", f"[0, 0, 9, {height + 1.5:g}]"]
    shown += ["[-3, 0, 9, 9]", "[0, -1.5, 9, 9]", "[9, 0, 9, 9]"]
    where = [f"{entry_of('000006.jpg')} ({box} in {width}x{height})" for box in shown]
    return Problem("warning", PHRASES, "a box reaches out of its image, or covers no pixel of it", where)


REFCOCO_TEST = f"{REFCOCO}/refcoco+_test.json"


def unknown_ref() -> Problem:
    edit(REFCOCO_TEST, lambda rows: rows[-1].update(ref_id=999))
    kind = f"ref_id is not in {REFCOCO}/refs(unc).p; check that refcoco_data"
    return Problem("error", REFCOCO_TEST, kind, [f"{REFCOCO_TEST}: entry {len(load(REFCOCO_TEST)) - 1} (ref_id 999)"])


def entries_of_image(image: str) -> list[str]:
    return [f"{REFCOCO_TEST}: entry {i}" for i, row in enumerate(load(REFCOCO_TEST)) if row["image"] == image]


def annotation_outside() -> Problem:
    """The box of a ref, said once though the ref has several expressions."""
    ref_id = next(row["ref_id"] for row in load(REFCOCO_TEST) if row["image"] == "300000.jpg")
    refs = {ref["ref_id"]: ref for ref in pickle.loads(Path(f"{REFCOCO}/refs(unc).p").read_bytes())}
    ann_id = refs[ref_id]["ann_id"]
    edit(f"{REFCOCO}/instances.json", lambda tables: tables["annotations"][ann_id].update(bbox=[500, 3, 40, 6]))
    where = f"{entries_of_image('300000.jpg')[0]} ([500, 3, 540, 9] in {size_of('300000.jpg')})"
    return Problem("error", REFCOCO_TEST, "no box covers a pixel of the image: no answer can be right", [where])


def other_size_in_refer() -> Problem:
    """Said once an image; REFER's boxes refer to the image file."""
    file = f"{REFCOCO}/instances.json"
    index = next(i for i, row in enumerate(load(file)["images"]) if row["id"] == 300002)
    edit(file, lambda tables: tables["images"][index].update(width=5, height=4))
    found = f"annotated 5x4, {SCENES}/images/300002.jpg has {size_of('300002.jpg')}"
    where = f"{entries_of_image('300002.jpg')[0]} ({found})"
    return Problem("warning", REFCOCO_TEST, "the annotated size is not that of the image file", [where])


def phrase_without_box() -> Problem:
    boxes, sentences = f"{FLICKR}/bounding_boxes_test.json", f"{FLICKR}/sentences_test.json"
    phrase_id = next(iter(load(boxes)["200000"]["boxes"]))
    where = [
        f"{sentences}: image 200000, sentence {i}, phrase {j} (phrase_id {phrase_id})"
        for i, sentence in enumerate(load(sentences)["200000"])
        for j, phrase in enumerate(sentence["phrases"])
        if phrase["phrase_id"] == phrase_id
    ]
    edit(boxes, lambda rows: rows["200000"]["boxes"].pop(phrase_id))
    return Problem("warning", sentences, "the phrase's id has no boxes and is not under 'scene' or 'nobox'", where)


def phrase_box_outside() -> Problem:
    """All the boxes of a phrase id: the one is of another image, the other has its corners exchanged."""
    file = f"{FLICKR}/bounding_boxes_val.json"
    phrase_id = next(iter(load(file)["100000"]["boxes"]))
    edit(file, lambda rows: rows["100000"]["boxes"].update({phrase_id: [[300, 1, 310, 9], [9, 9, 1, 1]]}))
    where = f"{file}: image 100000, phrase id {phrase_id} ([300, 1, 310, 9], [9, 9, 1, 1] in {size_of('100000.jpg')})"
    return Problem("error", file, "no box covers a pixel of the image: no answer can be right", [where])


def other_size() -> Problem:
    """Flickr30k's boxes refer to the annotated size."""
    file = f"{FLICKR}/bounding_boxes_val.json"
    phrase_id = next(iter(load(file)["100001"]["boxes"]))
    edit(file, lambda rows: rows["100001"].update(width=500, height=400))
    edit(file, lambda rows: rows["100001"]["boxes"].update({phrase_id: [[450, 350, 500, 400]]}))
    found = f"annotated 500x400, {SCENES}/images/100001.jpg has {size_of('100001.jpg')}"
    where = [f"{file}: image 100001 ({found})"]
    return Problem("warning", file, "the annotated size is not that of the image file", where)


def repeated_id() -> Problem:
    file = f"{FLICKR}/val.txt"
    Path(file).write_text(Path(file).read_text() + "100003\n")
    return Problem("error", file, "the image id is listed more than once", [f"{file}: image 100003 (2 times)"])


def repeated_training_entry() -> Problem:
    index = next(i for i, row in enumerate(load(PHRASES)) if row["image"] == "000007.jpg")
    edit(PHRASES, lambda rows: rows.append({**rows[index], "bbox": []}))
    where = f"{PHRASES}: entry {len(load(PHRASES)) - 1} (000007.jpg) (as entry {index} (000007.jpg))"
    return Problem("warning", PHRASES, "image and text are those of an earlier entry", [where])


def repeated_expression() -> Problem:
    file = f"{REFCOCO}/refcoco+_val.json"
    edit(file, lambda rows: rows.append({**rows[2], "text": rows[2]["text"].upper() + "."}))
    where = f"{file}: entry {len(load(file)) - 1} (as entry 2)"
    return Problem("warning", file, "image and text are those of an earlier entry", [where])


def repeated_pair() -> Problem:
    file = f"{SCENES}/matching_testB.json"
    edit(file, lambda rows: rows.append(rows[1]))
    where = f"{file}: entry {len(load(file)) - 1} (as entry 1)"
    return Problem("warning", file, "image and text are those of an earlier entry", [where])


DAMAGE: list[Callable[[], Problem]] = [
    missing_file,
    unreadable_pickle,
    missing_key,
    empty_caption,
    repeated_annotation,
    repeated_ref,
    height_of_nothing,
    sentence_without_phrases,
    neither_true_nor_false,
    missing_image,
    wrong_extension,
    truncated_image,
    other_content,
    training_box_outside,
    training_boxes_partly_outside,
    unknown_ref,
    annotation_outside,
    other_size_in_refer,
    phrase_without_box,
    phrase_box_outside,
    other_size,
    repeated_id,
    repeated_training_entry,
    repeated_expression,
    repeated_pair,
]
