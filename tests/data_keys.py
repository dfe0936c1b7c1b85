"""Config keys of the benchmarks on data that lie as the scenes' do; the golden data do so too."""

from collections.abc import Sequence
from pathlib import Path

PARTS = ("val", "test")
REFER = {"refcoco": "refcoco+", "refclef": "refclef"}
FLICKR = {
    "image_ids_file": "{}.txt",
    "phrase_box_file": "bounding_boxes_{}.json",
    "sentences_file": "sentences_{}.json",
}
Keys = dict[str, str | list[str]]


def flickr_keys(folder: Path, parts: Sequence[str] = PARTS) -> Keys:
    return {key: [str(folder / name.format(part)) for part in parts] for key, name in FLICKR.items()}


def data_keys(name: str, data: Path) -> Keys:
    """The data keys of an evaluation config: of refcoco (with detections), refclef or flickr."""
    if name == "flickr":
        keys = flickr_keys(data / "flickr")
    else:
        folder = data / "refer" / REFER[name]
        files = [str(folder / f"{folder.name}_{part}.json") for part in PARTS]
        keys = {"test_file": files, "refcoco_data": str(data / "refer")}
        keys |= {"det_file": str(folder / "dets.json")} if name == "refcoco" else {}
    return {**keys, "image_root": str(data / "images")}
