"""Mutates every kind of input file: each try must end in a right result, or in one message that names the file.

    make fuzz
    PYTHONPATH=. python tests/fuzz.py --tries 5000 [--seed 0] [--kind checkpoint] [--keep FOLDER]

Writes a tiny world (scenes, raw downloads, a checkpoint, logs), damages one file of it at a time, and reads it as the
programs do. Exit status 1 where a try ends in anything else: the files of such tries are kept in --keep.
"""

import argparse
import contextlib
import io
import json
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, features
from ruamel.yaml import YAML
from safetensors.torch import save_file

from config import (
    ConfigError,
    GroundingConfig,
    PretrainConfig,
    load_any_config,
    load_bert_config,
    load_config,
    size_problems,
)
from dataset.expressions import Expression
from dataset.matching import load_pairs
from dataset.photos import read_photo
from dataset.raw import flickr_entities, visual_genome
from dataset.raw import refer as raw_refer
from dataset.raw.check import check
from dataset.raw.evaluation_images import read_evaluation_images
from dataset.raw.vg_phrases import Rules
from dataset.reading import read_image
from dataset.scenes import files as scenes_files
from dataset.text import load_tokenizer
from dataset.vg import Collate, TrainingData
from grounding.benchmarks import FLICKR, OWN, REFCLEF, REFCOCO_PLUS, benchmark_of
from grounding.load import config_of
from grounding.results import ResultFolder
from models.albef import build_albef
from models.checkpoint import check_resumable, load_weights, read_checkpoint
from models.pretrain import PretrainModel
from runs import read_runs
from tests.data_keys import data_keys
from tests.dataset.raw.raw_layouts import mattnet_detections, write_entities
from tests.dataset.raw.test_vg_files import FILES as VG_FILES
from tests.small_model import BERT, SIZES
from utils import UserError

SECONDS = 60  # that a try may take
FORMATS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp", "PPM": "ppm"}
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 10**20, 10**400, 0.5, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", " ", "?!", "\u200b", "\ud800", "x" * 300, "x" * 5000),
    *("../../etc/passwd", "/etc/passwd", "\x1b[2J", "NaN", "1e5"),
    *([], {}, [[]], [None], [[1, 2]], [[4, 4, 2, 2]], [[0, 0, 1e400, 5]], {"a": {}}, "[" * 50),
)


class World(NamedTuple):
    """A folder with files of every kind, and what is needed to read them."""

    folder: Path
    train: PretrainConfig
    refcoco: GroundingConfig
    refclef: GroundingConfig
    flickr: GroundingConfig


class Kind(NamedTuple):
    """Files of one kind: which, how they are read, and how their content is parsed and written to be mutated.

    Args:
        read: reads the file (or, of several files, all of them) as the programs do, and asserts what is right then.
    """

    files: list[str]
    read: Callable[[World, Path], object]
    parse: Callable[[bytes], Any] | None = None
    write: Callable[[Any], bytes] | None = None


# ---- the world


def make_world(folder: Path) -> World:
    """Write all files; equal for every call."""
    scenes_files.generate(folder / "s", seed=3, train=4, annotated=4, evaluation=2, size=48)
    (folder / "bert.json").write_text(json.dumps(BERT))
    sizes = {**SIZES, "bert_config": str(folder / "bert.json"), "image_root": str(folder / "s/images")}
    train = {**sizes, "train_file": [str(folder / "s/train_phrases.json")], "batch_size": 2, "queue_size": 8}
    train |= {"mask_size": 48, "amc": {"layer": 1}}
    configs: dict[str, dict[str, Any]] = {"train": train}
    for name in ("refcoco", "refclef", "flickr"):
        configs[name] = {**sizes, "block_num": 1, **data_keys(name, folder / "s")}
    rows = [{"image": "000000.jpg", "phrase": "a star", "box": [1, 2, 3, 4], "category": "star"}]
    rows.append({"image": "000001.jpg", "phrases": ["it", "that"], "boxes": [[9, 9, 9, 9.5]], "split": "val"})
    (folder / "s/own.json").write_text(json.dumps(rows))
    (folder / "s/own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [str(folder / f"s/own.{end}") for end in ("json", "jsonl")]
    configs["own"] = {**sizes, "benchmark": "own", "test_file": own}
    for name, values in configs.items():
        with (folder / f"{name}.yaml").open("w") as file:
            YAML(typ="safe", pure=True).dump(values, file)
    _write_raw(folder)
    (folder / "images").mkdir()
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    for kind, suffix in {**FORMATS, **({"AVIF": "avif"} if features.check("avif") else {})}.items():
        picture.save(folder / f"images/picture.{suffix}", kind)
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(folder / "images/deep.png")
    world = World(
        folder,
        load_config(folder / "train.yaml", PretrainConfig),
        *(load_config(folder / f"{name}.yaml", GroundingConfig) for name in ("refcoco", "refclef", "flickr")),
    )
    torch.manual_seed(0)
    model = PretrainModel(world.train)
    state = model.state_dict()
    optimizer = torch.optim.AdamW([model.temp], lr=1e-4).state_dict()
    more = {"optimizer": optimizer, "lr_scheduler": {}, "config": world.train.model_dump(mode="json"), "epoch": 0}
    torch.save({"model": state, **more}, folder / "w.pth")
    torch.save({"model": state, **more}, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file({key: value.clone() for key, value in state.items()}, folder / "w.safetensors")
    tokenizer = load_tokenizer(str(folder / "s/text_encoder"))
    (folder / "json_tokenizer").mkdir()
    tokenizer.pieces.save(str(folder / "json_tokenizer/tokenizer.json"))
    (folder / "run").mkdir()
    rows = [{"epoch": n, "train_loss_mlm": 1.0 / (n + 1), "train_lr": 1e-5, "steps": 20} for n in range(3)]
    (folder / "run/log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{"epoch": 0, "step": n, "loss_mlm": 1.0 / (n + 1)} for n in range(3)]
    (folder / "run/steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (folder / "result").mkdir()
    ResultFolder(folder / "result").write("00", [asked()], [torch.rand(3, 3)], {"gradcam_mode": "itm"})
    (folder / "result/log.txt").write_text('{"val_d": 0.5, "epoch": "00"}\n')
    return world


def asked() -> Expression:
    """What the result file of the seeds is about."""
    return Expression(Path("x.jpg"), "x", 0, "val", np.ones((1, 4)), {"image_path": "x.jpg"})


def _write_raw(folder: Path) -> None:
    """Downloads in their owners' forms."""
    boxes, sentences = (
        json.loads((folder / f"s/flickr/{name}_val.json").read_text()) for name in ("bounding_boxes", "sentences")
    )
    write_entities(folder / "entities", boxes, sentences)
    shutil.copy(folder / "s/flickr/val.txt", folder / "entities/val.txt")
    detections = json.loads((folder / "s/refer/refcoco+/dets.json").read_text())
    (folder / "mattnet.json").write_text(json.dumps(mattnet_detections(detections)))
    (folder / "vg").mkdir()
    for name, rows in VG_FILES.items():
        (folder / f"vg/{name}.json").write_text(json.dumps(rows))


# ---- reading as the programs do


def read_config(world: World, path: Path) -> None:
    config = load_any_config(path)
    with contextlib.suppress(ConfigError):  # another path, which is the file that is named then
        size_problems(config, load_bert_config(config.bert_config))


def read_training(world: World, path: Path) -> None:
    check_config(world, "train")
    tokenizer = load_tokenizer(str(world.folder / "s/text_encoder"))
    data = TrainingData(world.train, seed=0)
    batch = Collate(tokenizer, world.train)([data[index] for index in range(min(2, len(data)))])
    assert all(torch.isfinite(part).all() for part in batch)


def check_config(world: World, name: str) -> None:
    """`prepare.py check` never stops, and prints what it found."""
    report = check([str(world.folder / f"{name}.yaml")], [], sample=0, workers=1, shown=2, find=benchmark_of)
    assert report.text()
    json.loads(report.json())


def check_expressions(found: list[Expression]) -> None:
    for one in found:
        assert one.boxes.shape[1] == 4, one
        assert len(one.boxes), one
        assert np.isfinite(one.boxes).all(), one
        assert one.text.encode() is not None, one
        assert one.annotated_size is None or min(one.annotated_size) > 0, one
    assert found


def read_refcoco(world: World, path: Path) -> None:
    check_config(world, "refcoco")
    check_expressions(REFCOCO_PLUS.load(world.refcoco))


def read_refclef(world: World, path: Path) -> None:
    check_config(world, "refclef")
    check_expressions(REFCLEF.load(world.refclef))


def read_refs(world: World, path: Path) -> None:
    check_config(world, "refcoco")
    check_expressions(REFCOCO_PLUS.load(world.refcoco))
    raw_refer.make_lists(world.folder / "s/refer", "refcoco+", "unc")
    read_evaluation_images(world.folder / "s/refer/refcoco+/refs(unc).p")


def read_flickr(world: World, path: Path) -> None:
    check_config(world, "flickr")
    check_expressions(FLICKR.load(world.flickr))


def read_own(world: World, path: Path) -> None:
    check_config(world, "own")
    check_expressions(OWN.load(load_config(world.folder / "own.yaml", GroundingConfig)))


def read_entities(world: World, path: Path) -> None:
    flickr_entities.convert(world.folder / "entities", [world.folder / "entities/val.txt"])


def read_vg(world: World, path: Path) -> None:
    with tempfile.TemporaryDirectory() as out:
        visual_genome.prepare([world.folder / "vg"], Path(out), Rules())
        for file in Path(out).glob("*.json"):
            assert isinstance(json.loads(file.read_text()), list)


def read_picture(world: World, path: Path) -> None:
    for image in (read_image(path, "entry 0"), read_photo(path)):
        assert image.mode == "RGB"


def read_weights(world: World, path: Path) -> None:
    """Evaluation's model and the trainer; weights of a file with checksums are right or refused."""
    content = read_checkpoint(path)
    for use in (lambda: check_resumable(content, path), lambda: config_of(content, path, REFCOCO_PLUS, [])):
        with contextlib.suppress(UserError):
            use()
    torch.manual_seed(0)
    right = PretrainModel(world.train).state_dict()
    for model in (build_albef(world.refcoco), PretrainModel(world.train)):
        load_weights(model, dict(content["model"]), path)
        if path.suffix == ".pth" and path.stem == "w":
            for name, value in model.state_dict().items():
                assert torch.equal(value, right[name]), name


def read_tokenizer(world: World, path: Path) -> None:
    load_tokenizer(str(path.parent))(["the red star", "?!", "片"])


def read_logs(world: World, path: Path) -> None:
    read_runs([path.parent])


def read_results(world: World, path: Path) -> None:
    folder = ResultFolder(path.parent)
    folder.origin("00")
    with contextlib.redirect_stdout(io.StringIO()):
        folder.read("00", [asked()])
    folder.table(["point"], ("point", "val_d"))


# ---- mutations


def dump_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def load_yaml(data: bytes) -> Any:
    return YAML(typ="safe", pure=True).load(data.decode())


def dump_yaml(value: Any) -> bytes:
    buffer = io.BytesIO()
    YAML(typ="safe", pure=True).dump(value, buffer)
    return buffer.getvalue()


def load_pth(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def dump_pth(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def odd_tensor(rng: random.Random) -> torch.Tensor:
    kinds: list[Callable[[], torch.Tensor]] = [
        lambda: torch.zeros(0),
        lambda: torch.zeros(1, 1, 1),  # shapes that no weight has: each is refused
        lambda: torch.full((7, 7), float("nan")),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.zeros(1).expand(10**9, 10**9),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.ones(3, dtype=torch.complex64),
        lambda: torch.ones(3, dtype=torch.bool),
    ]
    return rng.choice(kinds)()


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three of: a bit flipped, a piece cut, doubled, zeroed or inserted, the end or the beginning lost.

    Often near the ends, where many formats have their tables.
    """
    for _ in range(rng.randint(1, 3)):
        size = len(data)
        start = rng.choice(
            [rng.randrange(size + 1), rng.randrange(min(size, 700) + 1), size - rng.randrange(min(size, 700) + 1)]
        )
        end = min(size, start + rng.choice([1, 1, 2, 8, 200, size]))
        extra = rng.choice(
            [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"[", b'"', b"\n", b"\x1f\x8b", b"-", b"9" * 30]
        )
        flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start : start + 1])
        number = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00"])
        data = rng.choice(
            [
                data[:start] + flipped + data[start + 1 :],
                data[:start] + flipped + data[start + 1 :],
                data[:start] + number + data[start + 4 :],
                data[:start] + data[end:],
                data[:start] + data[start:end] * 2 + data[end:],
                data[:start] + bytes(end - start) + data[end:],
                data[:start] + extra + data[start:],
                extra + data,
                data[:start],
            ]
        )
    return data


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Change a parsed value at one to two places: an odd value, a key lost, renamed or doubled, items swapped."""
    for _ in range(rng.randint(1, 2)):
        places = list(_places(value))
        if not places:
            return rng.choice(ODD)
        holder, key = rng.choice(places)
        odd = odd_tensor(rng) if isinstance(holder[key], torch.Tensor) and rng.random() < 0.7 else rng.choice(ODD)
        what = rng.randrange(5)
        if what < 3:
            holder[key] = odd
        elif isinstance(holder, dict):
            taken = holder.pop(key)
            if what == 4:
                holder[rng.choice([f"{key}s", "", 7, "module.x", None])] = taken
        elif what == 3:
            del holder[key]
        else:
            holder.append(holder[key])
    return value


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a value."""
    if depth > 8:
        return
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inside in items:
        yield value, key
        yield from _places(inside, depth + 1)


JSON, YAML_FORM = (json.loads, dump_json), (load_yaml, dump_yaml)
PICKLE, PTH = (pickle.loads, pickle.dumps), (load_pth, dump_pth)
FLICKR_FILES = ["s/flickr/bounding_boxes_val.json", "s/flickr/sentences_val.json"]
KINDS = {
    "config": Kind([f"{name}.yaml" for name in ("train", "refcoco", "flickr")], read_config, *YAML_FORM),
    "bert": Kind(["bert.json"], lambda world, path: load_bert_config(path), *JSON),
    "training": Kind(["s/train_phrases.json"], read_training, *JSON),
    "refcoco": Kind(
        [f"s/refer/refcoco+/{name}.json" for name in ("refcoco+_val", "instances", "dets")], read_refcoco, *JSON
    ),
    "refclef": Kind(["s/refer/refclef/refclef_test.json", "s/refer/refclef/instances.json"], read_refclef, *JSON),
    "refs": Kind(["s/refer/refcoco+/refs(unc).p"], read_refs, *PICKLE),
    "flickr": Kind(FLICKR_FILES, read_flickr, *JSON),
    "ids": Kind(["s/flickr/val.txt"], read_flickr),
    "own": Kind(["s/own.json"], read_own, *JSON),
    "own lines": Kind(["s/own.jsonl"], read_own),
    "matching": Kind(["s/matching_val.json"], lambda world, path: load_pairs(str(path), world.train.image_root), *JSON),
    "entities": Kind(
        ["entities/Annotations/100000.xml", "entities/Sentences/100001.txt", "entities/val.txt"], read_entities
    ),
    "vg": Kind([f"vg/{name}.json" for name in VG_FILES], read_vg, *JSON),
    "mattnet": Kind(["mattnet.json"], lambda world, path: raw_refer.group_detections(path), *JSON),
    "image": Kind([f"images/picture.{suffix}" for suffix in FORMATS.values()] + ["images/deep.png"], read_picture),
    "checkpoint": Kind(["w.pth", "old.pth"], read_weights, *PTH),
    "safetensors": Kind(["w.safetensors"], read_weights),
    "vocabulary": Kind(["s/text_encoder/vocab.txt"], read_tokenizer),
    "tokenizer": Kind(["json_tokenizer/tokenizer.json"], read_tokenizer, *JSON),
    "logs": Kind(["run/log.txt", "run/steps.jsonl"], read_logs),
    "results": Kind(["result/epoch00.pth", "result/epoch00.json", "result/log.txt"], read_results),
}


# ---- tries


class Slow(BaseException):
    """A try that does not end."""


def damage(data: bytes, kind: Kind, name: str, rng: random.Random) -> bytes:
    """A mutated copy of a file's content: of its bytes, or of what it says."""
    if kind.parse is None or kind.write is None or rng.random() < 0.4 or name == "old.pth":
        return mutate_bytes(data, rng)
    while True:
        with contextlib.suppress(TypeError, ValueError, RuntimeError, NotImplementedError):  # what cannot be written
            return kind.write(mutate_value(kind.parse(data), rng))


def one_try(world: World, kind: Kind, name: str, rng: random.Random) -> tuple[str, str]:
    """Damage a file, read it, put it back. Returns "right" or "refused", or else what went wrong, and the words."""
    path = world.folder / name
    before = path.read_bytes()
    path.write_bytes(damage(before, kind, name, rng))
    signal.alarm(SECONDS)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            kind.read(world, path)
        return "right", ""
    except UserError as error:
        words = str(error)
        named = path.name in words or path.parent.name in words
        return ("refused" if named and "Traceback" not in words else "a message without the file's name"), words
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the tokenizers is no Exception
        return f"{type(error).__module__}.{type(error).__name__}", str(error)[:300]
    finally:
        signal.alarm(0)
        path.write_bytes(before)


def _too_slow(*_: object) -> None:
    raise Slow(f"not done in {SECONDS} seconds")


def fuzz(
    folder: Path, tries: int, seed: int, kinds: list[str], keep: Path | None = None
) -> tuple[Counter[str], list[str]]:
    """Damage `tries` files, kinds in turn. Returns how many ended how, and a line for each that ended wrongly."""
    world = make_world(folder)
    counts: Counter[str] = Counter()
    wrong = []
    before = signal.signal(signal.SIGALRM, _too_slow)
    try:
        for number in range(tries):
            name = kinds[number % len(kinds)]
            kind = KINDS[name]
            file = kind.files[number // len(kinds) % len(kind.files)]
            key = f"{seed}/{name}/{number}"
            outcome, words = one_try(world, kind, file, random.Random(key))
            counts[outcome] += 1
            if outcome not in ("right", "refused"):
                wrong.append(f"{key} ({file}): {outcome}: {words}")
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    data = damage((folder / file).read_bytes(), kind, file, random.Random(key))
                    (keep / f"{key.replace('/', '_')}_{Path(file).name}").write_bytes(data)
    finally:
        signal.signal(signal.SIGALRM, before)
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage input files of every kind and read them.")
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append", default=[])
    parser.add_argument("--keep", type=Path, help="where to leave files that end wrongly")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = fuzz(Path(folder), args.tries, args.seed, args.kind or list(KINDS), args.keep)
    print("\n".join(wrong))
    ends = ", ".join(f"{outcome}: {count}" for outcome, count in counts.most_common())
    print(f"{args.tries} tries in {time.monotonic() - start:.0f} s; {ends}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
