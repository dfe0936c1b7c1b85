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
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ruamel.yaml import YAML

from config import ConfigError, GroundingConfig, PretrainConfig, load_any_config, load_config, naming
from dataset.own import load_pairs
from dataset.photos import read_photo
from dataset.raw import flickr_entities, visual_genome
from dataset.raw import refer as raw_refer
from dataset.raw.check import check
from dataset.raw.check_images import inspect_image
from dataset.raw.evaluation_images import read_evaluation_images
from dataset.raw.vg_phrases import Rules
from dataset.reading import DataError, image_size, read_image
from dataset.text import load_tokenizer
from dataset.vg import Collate, TrainingData
from grounding.benchmarks import BENCHMARKS, FLICKR, OWN, REFCLEF, REFCOCO_PLUS, Benchmark, benchmark_of
from grounding.load import check_config as check_model
from grounding.load import config_of, own_sizes
from grounding.metrics import score
from grounding.results import ResultFolder
from model_sizes import load_bert_config, size_problems
from models.albef import build_albef
from models.checkpoint import check_resumable, load_weights, read_checkpoint
from models.pretrain import PretrainModel
from runs import read_runs
from tests.dataset.raw.test_vg_files import FILES as VG_FILES
from tests.fuzz_world import PICTURES, VG_KEYS, asked, dump_yaml, make_world
from tests.mutations import mutate_bytes, mutate_value
from utils import UserError

SECONDS = 60  # that a try may take


class Kind(NamedTuple):
    """Files of one kind: which, how they are read, and how their content is parsed and written to be mutated.

    Args:
        read: with the world's folder and a file's path; reads the file (or, of several files, all of them) as the
            programs do, and asserts what is right then.
    """

    files: list[str]
    read: Callable[[Path, Path], object]
    parse: Callable[[bytes], Any] | None = None
    write: Callable[[Any], bytes] | None = None


# ---- reading as the programs do


def read_config(folder: Path, path: Path) -> None:
    config = load_any_config(path)
    with contextlib.suppress(ConfigError):  # another path, which is the file that is named then
        size_problems(config, load_bert_config(config.bert_config))


def check_config(folder: Path, name: str) -> None:
    """`prepare.py check` never stops, and prints what it found."""
    report = check([str(folder / f"{name}.yaml")], [], sample=0, workers=1, shown=2, find=benchmark_of)
    assert report.text()
    json.loads(report.json())


def training(name: str) -> Callable[[Path, Path], None]:
    """What reads the entries of a config of a name: in its first epoch, with `relation_file`."""

    def read(folder: Path, path: Path) -> None:
        check_config(folder, name)
        config = load_config(folder / f"{name}.yaml", PretrainConfig).phases()[0].config
        data = TrainingData(config, seed=0)
        samples = [data[index] for index in range(min(4, len(data)))]
        batch = Collate(load_tokenizer(str(folder / "s/text_encoder")), config)(samples)
        assert all(torch.isfinite(part).all() for part in batch)

    return read


def evaluating(name: str, benchmark: Benchmark) -> Callable[[Path, Path], None]:
    """What reads the expressions of a benchmark by the config of a name."""

    def read(folder: Path, path: Path) -> None:
        check_config(folder, name)
        config = load_config(folder / f"{name}.yaml", GroundingConfig)
        found = benchmark.load(config)
        for one in found:
            assert one.boxes.shape[1] == 4, one
            assert len(one.boxes), one
            assert np.isfinite(one.boxes).all(), one
            assert one.text.encode() is not None, one
            assert one.annotated_size is None or min(one.annotated_size) > 0, one
        assert found
        names = [*benchmark.metrics, *config.metrics]
        assert len(score([torch.rand(3, 3)] * len(found), found, names)) == len(found)

    return read


read_refcoco, read_flickr = evaluating("refcoco", REFCOCO_PLUS), evaluating("flickr", FLICKR)
read_refclef, read_own = evaluating("refclef", REFCLEF), evaluating("own", OWN)
read_regions = evaluating("regions", BENCHMARKS["vg"])
read_metrics = evaluating("masks", REFCOCO_PLUS)


def read_masks(folder: Path, path: Path) -> None:
    read_metrics(folder, path)
    lists = raw_refer.make_lists(folder / "s/masks/refer", "refcoco+", "unc")
    with contextlib.suppress(DataError):  # scenes of val and testA alone are here: no ref is left
        raw_refer.training_entries(lists, "refcoco+", [], masks=True)


def read_blip(folder: Path, path: Path) -> None:
    """The sizes, as evaluation takes them from a config or from a folder of transformers, and the model."""
    check_config(folder, "blip")
    with naming(folder / "blip.yaml"):
        check_model(load_config(folder / "blip.yaml", GroundingConfig), "itm", 1)
        check_model(load_config(folder / "blip.yaml", GroundingConfig, own_sizes(path.parent)), "itm", 1)


def read_refs(folder: Path, path: Path) -> None:
    read_refcoco(folder, path)
    raw_refer.make_lists(folder / "s/refer", "refcoco+", "unc")
    read_evaluation_images(path)


def read_entities(folder: Path, path: Path) -> None:
    flickr_entities.convert(folder / "entities", [folder / "entities/val.txt"])


def read_vg(folder: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory() as out:
        visual_genome.prepare([folder / "vg"], Path(out), Rules())
        for file in Path(out).glob("*.json"):
            assert isinstance(json.loads(file.read_text()), list)


def read_picture(folder: Path, path: Path) -> None:
    inspect_image((path, True))
    image_size(path)
    for image in (read_image(path, "entry 0"), read_photo(path)):
        assert image.mode == "RGB"


def read_weights(folder: Path, path: Path) -> None:
    """Evaluation's model and the trainer; weights of a file with checksums are right or refused."""
    content = read_checkpoint(path)
    for use in (lambda: check_resumable(content, path), lambda: config_of(content, path, REFCOCO_PLUS, [])):
        with contextlib.suppress(UserError):
            use()
    torch.manual_seed(0)
    config = load_config(folder / "train.yaml", PretrainConfig)
    right = PretrainModel(config).state_dict()
    for model in (build_albef(config), PretrainModel(config)):
        load_weights(model, dict(content["model"]), path)
        if path.name == "w.pth":
            for name, value in model.state_dict().items():
                assert torch.equal(value, right[name]), name


def read_tokenizer(folder: Path, path: Path) -> None:
    load_tokenizer(str(path.parent))(["the red star", "?!", "片"])


def read_results(folder: Path, path: Path) -> None:
    results = ResultFolder(path.parent)
    results.origin("00")
    with contextlib.redirect_stdout(io.StringIO()):
        results.read("00", [asked()])
    results.table(["point"], ("point", "val_d"))


# ---- content


def dump_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def load_yaml(data: bytes) -> Any:
    return YAML(typ="safe", pure=True).load(data.decode())


def load_pth(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def dump_pth(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


JSON, YAML_FORM = (json.loads, dump_json), (load_yaml, dump_yaml)
PICKLE, PTH = (pickle.loads, pickle.dumps), (load_pth, dump_pth)
FLICKR_FILES = ["s/flickr/bounding_boxes_val.json", "s/flickr/sentences_val.json"]
KINDS = {
    "config": Kind([f"{name}.yaml" for name in ("train", "relations", "refcoco", "masks")], read_config, *YAML_FORM),
    "bert": Kind(["bert.json"], lambda _, path: load_bert_config(path), *JSON),
    "blip": Kind(["blip/config.json"], read_blip, *JSON),
    "training": Kind(["s/train_phrases.json"], training("train"), *JSON),
    "relations": Kind(["s/train_relations.json"], training("relations"), *JSON),
    "segmentations": Kind(["s/segmentations.json"], training("segmentations"), *JSON),
    "refcoco": Kind(
        [f"s/refer/refcoco+/{name}.json" for name in ("refcoco+_val", "instances", "dets")], read_refcoco, *JSON
    ),
    "refclef": Kind(["s/refer/refclef/refclef_test.json", "s/refer/refclef/instances.json"], read_refclef, *JSON),
    "refs": Kind(["s/refer/refcoco+/refs(unc).p"], read_refs, *PICKLE),
    "masks": Kind(["s/masks/refer/refcoco+/instances.json"], read_masks, *JSON),
    "flickr": Kind(FLICKR_FILES, read_flickr, *JSON),
    "ids": Kind(["s/flickr/val.txt"], read_flickr),
    "own": Kind(["s/own.json"], read_own, *JSON),
    "own lines": Kind(["s/own.jsonl"], read_own),
    "matching": Kind(
        ["s/matching_val.json"], lambda folder, path: load_pairs(str(path), str(folder / "s/images")), *JSON
    ),
    "entities": Kind(
        ["entities/Annotations/100000.xml", "entities/Sentences/100001.txt", "entities/val.txt"], read_entities
    ),
    "vg": Kind([f"vg/{name}.json" for name in VG_FILES], read_vg, *JSON),
    "regions": Kind([f"vg/{name}.json" for name in VG_KEYS.values()], read_regions, *JSON),
    "region ids": Kind(["vg/test.txt"], read_regions),
    "mattnet": Kind(["mattnet.json"], lambda _, path: raw_refer.group_detections(path), *JSON),
    "image": Kind([f"images/{name}" for name in (*PICTURES, "deep.png", "a.pfm")], read_picture),
    "checkpoint": Kind(["w.pth", "old.pth"], read_weights, *PTH),
    "safetensors": Kind(["w.safetensors"], read_weights),
    "vocabulary": Kind(["s/text_encoder/vocab.txt"], read_tokenizer),
    "tokenizer": Kind(["json_tokenizer/tokenizer.json"], read_tokenizer, *JSON),
    "logs": Kind(["run/log.txt", "run/steps.jsonl"], lambda _, path: read_runs([path.parent])),
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


def one_try(folder: Path, kind: Kind, name: str, rng: random.Random) -> tuple[str, str]:
    """Damage a file, read it, put it back. Returns "right" or "refused", or else what went wrong, and the words."""
    path = folder / name
    before = path.read_bytes()
    path.write_bytes(damage(before, kind, name, rng))
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            kind.read(folder, path)
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
    make_world(folder)
    counts: Counter[str] = Counter()
    wrong = []
    before = signal.signal(signal.SIGALRM, _too_slow)
    try:
        for number in range(tries):
            name = kinds[number % len(kinds)]
            kind = KINDS[name]
            file = kind.files[number // len(kinds) % len(kind.files)]
            key = f"{seed}/{name}/{number}"
            outcome, words = one_try(folder, kind, file, random.Random(key))
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
