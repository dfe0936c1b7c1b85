"""What a result was computed from, by content: two results have the same origin when all these parts are equal.

An origin is a flat record of named parts, which lies beside a result as JSON. A part is a value of the config or of the
command line, or the hash of what was read. Where a file lies, and which config file named it, makes no difference.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import files
import utils
from config import GroundingConfig
from dataset.expressions import Expression
from dataset.own import MatchingPair
from grounding.load import SHAPE_KEYS
from model_sizes import load_bert_config
from models.student import weights_of

Origin = dict[str, Any]

CHECKPOINT = "checkpoint content"
# Parts that are recorded and not compared: where the checkpoint lay, file states that spare hashing again, PyTorch's
# version, and the metrics with their regions (the maps do not depend on them).
NOT_COMPARED = ("checkpoint", "checkpoint state", "image states", "torch", "metrics")
NOT_OF_EVALUATION = {"hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"}  # keys of bert_config


def of_model(config: GroundingConfig, vocabulary: str) -> Origin:
    """The parts of the model besides its weights: sizes, BERT config, vocabulary (the tokenizer's file), PyTorch."""
    bert = load_bert_config(config.bert_config).model_dump(exclude=NOT_OF_EVALUATION)
    sizes = config.model_dump(exclude={"model"})
    blip: Origin = {}  # ALBEF is not named: origins from before there was another model do not say it
    if config.model == "blip":
        blip = {"model": "blip", "config.json of BLIP": f"sha256 {files.file_digest(config.bert_config)}"}
    return {
        **blip,
        **{key: sizes[key] for key in ("image_res", *SHAPE_KEYS) if key in sizes},
        **{f"bert_config's {key}": value for key, value in bert.items()},
        "vocabulary": f"sha256 {files.file_digest(vocabulary)}",
        "torch": str(torch.__version__),
    }


def of_data(
    expressions: Sequence[Expression],
    pairs: Mapping[str, Sequence[MatchingPair]],
    image_root: str,
    stored: Iterable[Origin],
) -> Origin:
    """The parts of the data: expressions, boxes, splits, detections, matching pairs, images.

    Args:
        pairs: of matching, by the name of their file.
        stored: origins of earlier results; while no image file has changed since, their hash of the images is reused.
    """
    images = {item.image for item in expressions} | {pair.image for of in pairs.values() for pair in of}
    names = {image: _below(image, image_root) for image in images}
    paths = sorted(names, key=lambda path: names[path])
    states = _part([(names[path], _state(path)) for path in paths])
    content = next((origin.get("images") for origin in stored if origin.get("image states") == states), None)
    if content is None:
        with ThreadPoolExecutor() as pool:
            digests = pool.map(_content, paths)
            content = _part([(names[path], digest) for path, digest in zip(paths, digests, strict=True)])
    detections = [None if item.detections is None else item.detections.tolist() for item in expressions]
    sizes = [item.annotated_size or (None, None) for item in expressions]
    return {
        "expressions": _part([(item.ref_id, names[item.image], item.text) for item in expressions]),
        "boxes": _part([(item.boxes.tolist(), size) for item, size in zip(expressions, sizes, strict=True)]),
        "splits": _part([(item.split, item.record.get("split")) for item in expressions]),
        "detections (det_file)": _part(detections),
        "pairs (matching_file)": _part(
            [(name, names[pair.image], pair.text, pair.match, pair.kind) for name, of in pairs.items() for pair in of]
        ),
        "images": content,
        "image states": states,
    }


def of_regions(expressions: Sequence[Expression]) -> list[str]:
    """What a part of the metrics was measured against: nothing where no expression has a region."""
    regions = [str(item.region) for item in expressions]
    return [f"regions {_part(regions)}"] if any(item.region is not None for item in expressions) else []


def of_checkpoint(path: Path, stored: Iterable[Origin]) -> Origin:
    """The parts of a checkpoint; hashed unless one of the `stored` origins has the hash of this very file."""
    found: Origin = {"checkpoint": str(path.resolve()), "checkpoint state": _state(weights_of(path))}
    for origin in stored:
        if CHECKPOINT in origin and all(origin.get(key) == value for key, value in found.items()):
            return {**found, CHECKPOINT: origin[CHECKPOINT]}
    return {**found, CHECKPOINT: f"sha256 {files.file_digest(weights_of(path))}"}


def check_unchanged(path: Path, origin: Origin) -> None:
    """Raise `UserError` when a checkpoint is no longer the file that was hashed."""
    if _state(weights_of(path)) != origin["checkpoint state"]:
        raise utils.UserError(f"{path} was replaced while it was evaluated; its result is not kept: evaluate it again")


def lacks_parts(before: Origin, now: Origin) -> bool:
    """Whether a stored origin lacks parts that would be compared."""
    return any(key not in before and key not in NOT_COMPARED for key in now)


def changed_parts(before: Origin, now: Origin) -> list[str]:
    """What two origins differ in, each as "part BEFORE (asked for now: NOW)"; only the parts of both count."""
    changed = [key for key in now if key in before and key not in NOT_COMPARED and before[key] != now[key]]
    return [
        f"{key.removesuffix(' content')} {_shown(before, key)} (asked for now: {_shown(now, key)})" for key in changed
    ]


def harmless_changes(before: Origin, now: Origin) -> list[str]:
    """What has changed since a result was computed and does not make it another: the checkpoint's place, PyTorch."""
    notes = {"checkpoint": "the checkpoint, of equal content, was", "torch": "PyTorch was"}
    return [f"{words} {before.get(key)}" for key, words in notes.items() if before.get(key) != now[key]]


def _shown(origin: Origin, key: str) -> str:
    where = f" of {origin.get('checkpoint')}" if key == CHECKPOINT else ""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", str(origin[key])) + where


def _part(rows: Sequence[Any]) -> str:
    """Many rows as one part: their number and a hash."""
    return f"{len(rows)}, sha256 {hashlib.sha256(json.dumps(rows).encode()).hexdigest()}"


def _below(image: Path, root: str) -> str:
    """An image's path below the folder of images, which may lie anywhere."""
    return str(image.relative_to(root) if image.is_relative_to(root) else image)


def _state(path: Path) -> list[int] | None:
    """Size, times and inode: what changes when a file is written or replaced; None where it is missing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _content(path: Path) -> str | None:
    """The hash of an image file; None where it cannot be read, which evaluation reports or skips."""
    try:
        return files.file_digest(str(path))
    except OSError:
        return None
