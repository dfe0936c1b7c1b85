"""Pretrain.py --tensorboard: the event files that a run leaves, and that the run is the same with them as without."""

import io
import itertools
import math
import random
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import Pretrain
import runs
from config import ConfigError, PretrainConfig, load_config
from dataset.loader.entries import TrainingEntry
from dataset.photos import read_photo
from dataset.reading import DataError
from dataset.text import load_tokenizer
from grounding.explain import Explainer, ground
from grounding.load import open_model
from grounding.pictures import tensorboard
from grounding.pictures.overlay import overlay
from grounding.pictures.render import save
from models.pretrain import PretrainModel
from tests.training_runs import (
    REPOSITORY,
    Interruption,
    arguments,
    interrupt,
    left_by_a_run,
    log_rows,
    make_workplace,
    same_weights,
    saved,
    step_rows,
    train,
)
from training import log as training_log
from utils import UserError

RUN = ["schedular.epochs=2"]
STEPS = 9  # of one epoch; with a look at the meters every 4
PHRASES = ["The red circle!", "blue"]
TAGS = ["maps/01_the_red_circle", "maps/02_blue"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
Series = dict[str, list[tuple[int, Any]]]


@pytest.fixture(scope="module", autouse=True)
def _frequent_looks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_log, "INTERVAL", 4)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace and a photograph, stored lying down (EXIF). Do not write into it."""
    folder = make_workplace(tmp_path_factory.mktemp("watch"))
    exif = Image.Exif()
    exif[274] = 6
    shades = np.random.default_rng(3).integers(256, size=(20, 30, 3), dtype=np.uint8)
    Image.fromarray(shades).save(folder / "photo.png", exif=exif)
    return folder


def watching(place: Path, *phrases: str, every: int = 7) -> list[str]:
    words = ["--tensorboard", "--heat_maps_every", str(every)]
    for phrase in phrases or PHRASES:
        words += ["--watch", str(place / "photo.png"), phrase]
    return words


@pytest.fixture(scope="module")
def plain(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two epochs that nobody watched. Do not write into it."""
    output = tmp_path_factory.mktemp("plain")
    train(place, output, *RUN)
    return output


@pytest.fixture(scope="module")
def watched(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the same two epochs, watched. Do not write into it."""
    output = tmp_path_factory.mktemp("watched")
    train(place, output, *RUN, *watching(place))
    return output


def read_events(output: Path) -> tuple[Series, Series]:
    """Scalars and PNG files by tag, each with its step, as TensorBoard would show them."""
    events = EventAccumulator(str(output / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    images = {tag: [(event.step, event.encoded_image_string) for event in events.Images(tag)] for tag in tags["images"]}
    return scalars, images


def array(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def drawn(place: Path, output: Path, epoch: int, phrase: str, folder: Path) -> np.ndarray:
    """What the evaluation's model draws with the weights of a checkpoint."""
    checkpoint = output / f"checkpoint_{epoch:02d}.pth"
    opened = open_model(checkpoint, text_encoder=str(place / "data" / "text_encoder"), device="cpu")
    image = read_photo(place / "photo.png")
    save(overlay(image, ground(opened.explainer(), image, phrase)), folder / "drawn.png")
    return np.asarray(Image.open(folder / "drawn.png").convert("RGB"))


# ---- what is written


def test_watching_changes_nothing(plain: Path, watched: Path) -> None:
    assert {path.name for path in plain.iterdir()} == left_by_a_run(epochs=2)
    assert {path.name for path in watched.iterdir()} == {*left_by_a_run(epochs=2), "tensorboard"}
    assert log_rows(watched) == log_rows(plain)
    assert step_rows(watched) == step_rows(plain)
    for epoch in (0, 1):
        one, other = saved(watched, epoch), saved(plain, epoch)
        assert same_weights(one["model"], other["model"])
        for key, state in other["optimizer"]["state"].items():
            assert same_weights(one["optimizer"]["state"][key], state)


def test_scalars_are_those_of_the_logs(watched: Path) -> None:
    scalars, _ = read_events(watched)
    for name in training_log.MEASURED:
        series = scalars.pop(f"steps/{name}")
        assert [step for step, _ in series] == [4, 8, 9, 13, 17, 18]
        assert all(0 <= value < 10_000 for _, value in series)
    wanted: Series = {}
    for row in step_rows(watched):
        done = row.pop("epoch") * STEPS + row.pop("step") + 1
        for name, value in row.items():
            wanted.setdefault(f"steps/{name}", []).append((done, pytest.approx(value)))
    for row in log_rows(watched):
        for name, value in row.items():
            if name.startswith("train_"):
                tag = f"epochs/{name.removeprefix('train_')}"
                wanted.setdefault(tag, []).append(((row["epoch"] + 1) * STEPS, pytest.approx(value)))
    assert len(wanted) == 7 + 8  # the rate, five losses, the gradients' norm; of steps also the largest norm
    assert scalars == wanted


def test_the_config_is_shown(watched: Path) -> None:
    events = EventAccumulator(str(watched / "tensorboard")).Reload()
    (event,) = events.Tensors("config/text_summary")
    (text,) = event.tensor_proto.string_val
    left = (watched / "config.yaml").read_text().splitlines()
    assert text.decode().splitlines() == [f"    {line}" for line in left]  # Markdown's way to leave a text as it is


def test_maps_of_the_phrases(place: Path, watched: Path, tmp_path: Path) -> None:
    _, images = read_events(watched)
    assert list(images) == TAGS
    for tag, phrase in zip(TAGS, PHRASES, strict=True):
        assert [step for step, _ in images[tag]] == [0, 7, 14, 18]
        pictures = [array(png) for _, png in images[tag]]
        wanted = drawn(place, watched, 1, phrase, tmp_path)
        assert wanted.shape[0] > wanted.shape[1]  # upright
        assert all(picture.shape == wanted.shape for picture in pictures)
        assert all((one != other).any() for one, other in itertools.pairwise(pictures))
        np.testing.assert_array_equal(pictures[-1], wanted)


# ---- interruption


def test_a_resumed_run_shows_no_step_twice(
    place: Path, watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "in step 18", Pretrain.Run, "backward", after=17)
        with pytest.raises(Interruption):
            train(place, tmp_path, *RUN, *watching(place))
    scalars, images = read_events(tmp_path)
    assert [step for step, _ in scalars["steps/lr"]] == [4, 8, 9, 13, 17]  # nothing waits in a buffer
    assert [step for step, _ in images[TAGS[0]]] == [0, 7, 14]
    train(place, tmp_path, *RUN, *watching(place), "--resume")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    scalars, images = read_events(tmp_path)
    wanted_scalars, wanted_images = read_events(watched)
    for name in training_log.MEASURED:
        series, other = (of.pop(f"steps/{name}") for of in (scalars, wanted_scalars))
        assert [step for step, _ in series] == [step for step, _ in other]
    assert scalars == wanted_scalars
    assert images == wanted_images


def test_a_run_that_goes_on_elsewhere_begins_with_its_maps(place: Path, watched: Path, tmp_path: Path) -> None:
    start = ["--resume", "--checkpoint", str(watched / "checkpoint_00.pth"), "--max_steps", str(STEPS + 1)]
    train(place, tmp_path / "out", *RUN, *start, *watching(place, "blue"))
    scalars, images = read_events(tmp_path / "out")
    (first, png), (second, other) = images["maps/01_blue"]
    assert (first, second) == (STEPS, STEPS + 1)
    np.testing.assert_array_equal(array(png), drawn(place, watched, 0, "blue", tmp_path))
    assert png != other
    assert [step for step, _ in scalars["epochs/lr"]] == [STEPS + 1]


def test_nothing_is_left_to_watch(place: Path, watched: Path, tmp_path: Path) -> None:
    last = ["--resume", "--checkpoint", str(watched / "checkpoint_01.pth")]
    for _ in range(2):
        train(place, tmp_path, *RUN, *last, *watching(place, "blue"))
    _, images = read_events(tmp_path)
    assert [step for step, _ in images["maps/01_blue"]] == [2 * STEPS]


def test_an_earlier_runs_events_move_with_it(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").write_text("earlier")
    runs.prepare_output(tmp_path, runs.Position(1))
    assert (tmp_path / "tensorboard" / "events").exists()
    runs.prepare_output(tmp_path, runs.BEGINNING)
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "earlier_1" / "tensorboard" / "events").read_text() == "earlier"


# ---- training entries


def watched_entries(entries: list[TrainingEntry], **options: Any) -> list[tensorboard.Watched]:
    return tensorboard.watched_entries(entries, np.array([bool(entry.boxes) for entry in entries]), **options)


def test_entries_to_watch(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(10)]
    for number, path in enumerate(paths):
        Image.new("RGB", (20 + number, 10)).save(path)
    entries = [TrainingEntry(path, [f"phrase {path.stem}", "another"], [], f"entry {path.stem}") for path in paths]
    boxed = [entry._replace(boxes=[[2, 3, 90, 8.9], [5, 5, 5, 7], [0, 0, 4, 1]]) for entry in entries[1::2]]
    mixed = [boxed[number // 2] if number % 2 else entry for number, entry in enumerate(entries)]
    found = watched_entries(mixed, count=2)
    assert [one.phrase for one in found] == ["phrase 1", "phrase 5"]  # of 1, 3, 5, 7, 9
    assert [one.image.size for one in found] == [(21, 10), (25, 10)]
    assert found[0].truth == ((2, 3, 19, 5), (0, 0, 4, 1))  # clipped as in training, and those that are left
    assert [one.phrase for one in watched_entries(entries, count=4)] == [f"phrase {n}" for n in (0, 2, 5, 7)]
    assert watched_entries(entries)[0].truth == ()
    assert [one.phrase for one in watched_entries(boxed[:2])] == ["phrase 1", "phrase 3"]  # none twice
    regions = [[[1, 1, 4, 1, 4, 3, 1, 3]], {"size": [10, 20], "counts": [0, 2, 198]}, [[90, 1, 99, 1, 99, 9]]]
    (one,) = watched_entries([entries[0]._replace(segmentations=regions)], count=1)
    assert one.region is not None
    assert one.region.nonzero()[0].tolist() == [0, 1, 1, 1, 1, 2, 2, 2]  # all regions, as far as they are in the image
    with pytest.raises(UserError, match="entry 1: segmentation: the size of an RLE is not that of its image"):
        watched_entries([entries[1]._replace(segmentations=regions)])
    blank = [entry._replace(captions=["", "\u200b"]) for entry in entries]
    some = [blank[0], entries[1]._replace(captions=["", "second"]), *blank[2:]]
    assert [one.phrase for one in watched_entries(some)] == ["second"]
    paths[2].write_text("broken")
    with pytest.raises(DataError, match=r"entry 2: image .*2\.png cannot be decoded"):
        watched_entries(entries)
    replaced = watched_entries(entries, skip_broken=True)
    assert [one.phrase for one in replaced] == [f"phrase {number}" for number in (0, 3, 5, 7)]


def test_the_truth_is_drawn(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Mock(wraps=overlay)
    monkeypatch.setattr(tensorboard, "overlay", draw)
    mask = np.eye(9, dtype=bool)
    shown = [tensorboard.Watched(Image.new("RGB", (9, 9)), "red", ((1, 2, 3, 4),), mask)]
    tensorboard.Board(explainer(place), shown, 1).start(tmp_path / "new", 0, "")
    (call,) = draw.call_args_list
    assert call.args[2] == ((1, 2, 3, 4),)
    assert call.kwargs["region"] is mask


# ---- what is asked of the model


def explainer(place: Path) -> Explainer:
    model = PretrainModel(load_config(place / "config.yaml", PretrainConfig))
    return Explainer(model, load_tokenizer(str(place / "data" / "text_encoder")), torch.device("cpu"), "itm", 1)


def random_states() -> list[Any]:
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    return [random.getstate(), keys.tolist(), rest, torch.get_rng_state().tolist()]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(place: Path, fails: bool) -> None:
    asked = explainer(place)
    model = asked.model.train()
    model.text_encoder_m.eval()
    model.visual_encoder.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    needed = [p.requires_grad for p in model.parameters()]
    states = random_states()
    try:
        with tensorboard.undisturbed(asked):
            assert not any(module.training for module in model.modules())
            random.random()
            np.random.rand()  # noqa: NPY002
            torch.rand(1)
            if fails:
                raise Interruption
    except Interruption:
        assert fails
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needed
    assert random_states() == states


def test_maps_leave_no_gradients(place: Path, tmp_path: Path) -> None:
    asked = explainer(place)
    asked.model.train()
    before = {key: value.clone() for key, value in asked.model.state_dict().items()}
    image = read_photo(place / "photo.png")
    phrases = [tensorboard.Watched(image, "red"), tensorboard.Watched(image, "blue")]
    board = tensorboard.Board(asked, phrases, every=1)
    passes: list[None] = []
    asked.model.visual_encoder.patch_embed.register_forward_pre_hook(lambda *_: passes.append(None))
    board.start(tmp_path / "new", 0, "")
    assert len(passes) == 1  # of the image encoder, for two phrases
    assert all(p.grad is None for p in asked.model.parameters())
    assert same_weights(asked.model.state_dict(), before)
    assert asked.model.training


def test_weights_that_are_nan_stop_the_training_and_not_the_drawing(
    place: Path, watched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = saved(watched, 0)
    content["model"]["itm_head.weight"].fill_(math.nan)
    torch.save(content, tmp_path / "spoiled.pth")
    words = ["--checkpoint", str(tmp_path / "spoiled.pth"), "--max_steps", "2", *watching(place, "blue", every=1)]
    with pytest.raises(Pretrain.TrainingError, match=r"loss_itm.* became NaN or infinite in epoch 0"):
        train(place, tmp_path / "out", *words)
    assert "step 1: no map of 'blue': the map holds values that are not numbers" in capsys.readouterr().out


# ---- errors before training


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["--watch", "PHOTO", "red"], UserError, "^--watch draws its maps for TensorBoard: add --tensorboard"),
        (["--tensorboard", "--watch", "nowhere.jpg", "dog"], DataError, r"^--watch nowhere\.jpg: no such image"),
        (["--tensorboard", "--watch", "CONFIG", "dog"], DataError, r"^--watch .*config\.yaml: not an image"),
        (["--tensorboard", "--watch", "PHOTO", "!?"], UserError, r"^phrase '!\?': nothing is left of it"),
        (
            ["--tensorboard", "amc.layer=0", "add_gcam=False"],
            ConfigError,
            r"config\.yaml: --tensorboard .* amc\.layer, which is 0.* layers are 1 to 2",
        ),
    ],
)
def test_errors_come_before_training(
    place: Path, tmp_path: Path, words: list[str], kind: type[Exception], message: str
) -> None:
    (tmp_path / "log.txt").write_text("an earlier run")
    names = {"CONFIG": str(place / "config.yaml"), "PHOTO": str(place / "photo.png")}
    with pytest.raises(kind, match=message):
        train(place, tmp_path, *(names.get(word, word) for word in words))
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]  # not even set aside


def test_tensorboard_is_optional(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"^--tensorboard: TensorBoard is missing \(.*\); pip install tensorboard$"):
        train(place, tmp_path / "out", *watching(place))
    assert not (tmp_path / "out").exists()
    for name in ("grounding.pictures.tensorboard", "grounding.explain", "matplotlib"):  # needed by the flag alone
        monkeypatch.setitem(sys.modules, name, None)
    program = runpy.run_path(str(REPOSITORY / "Pretrain.py"))
    program["main"](program["parse_args"](arguments(place, tmp_path / "out", "--max_steps", "1")))


def test_tags() -> None:
    assert tensorboard.tag_of("a dog's bone / left-hand é") == "a_dog_s_bone_left_hand_é"
    assert len(tensorboard.tag_of("x" * 200)) == 60
