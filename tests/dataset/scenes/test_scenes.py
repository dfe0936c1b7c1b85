"""The embedded data set: what its files say is read back, parsed, and checked against scenes drawn anew."""

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from config import GroundingConfig
from dataset import vg
from dataset.scenes import files as scenes_files
from dataset.scenes import language as phrases
from dataset.scenes import world
from dataset.scenes.language import KINDS, Caption, Spec, compose, find_phrase, matches
from dataset.scenes.world import HELD_OUT, Scene, Thing, draw_scene, render, shape_mask
from dataset.text import clean_caption, load_tokenizer, swap_left_right
from grounding.benchmarks import FLICKR, REFCLEF, REFCOCO_PLUS
from tests.data_keys import data_keys

SEED, TRAIN, EVALUATION = 3, 40, 12
REFER = ("refcoco+", "refclef")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set. Do not write into it."""
    out = tmp_path_factory.mktemp("scenes")
    scenes_files.generate(out, SEED, TRAIN, TRAIN, EVALUATION)
    return out


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def scene_of(image: str | int) -> Scene:
    """The scene of an image id or file name of the fixture, drawn anew."""
    split, index = divmod(int(Path(str(image)).stem), 100_000)
    return draw_scene(np.random.default_rng([SEED, split, index]), held_out=split == 3)


def some_scenes(count: int, held_out: bool = False) -> list[Scene]:
    return [draw_scene(np.random.default_rng([9, i, 1]), held_out=held_out) for i in range(count)]


# ---- an independent reading of the words


def _plain_phrases() -> dict[str, Spec]:
    sizes = {"": None, **{f"{word} ": size for size, row in phrases.SIZES.items() for word in row}}
    colours = {"": None, **{f"{colour} ": colour for colour in world.COLOURS}}
    heads = {word: shape for shape, row in phrases.NOUNS.items() for word in row}
    forms: dict[str, dict[str, Any]] = {"{}": {}}
    for field, table in (("place", phrases.PLACES), ("extreme", phrases.EXTREMES)):
        forms |= {form: {field: name} for name, row in table.items() for form in row}
    return {
        form.format(size + colour + head): Spec(colours[colour], heads[head], sizes[size], **said)
        for size, colour, head, (form, said) in itertools.product(sizes, colours, heads, forms.items())
    }


PLAIN = _plain_phrases()
JOINERS = {
    " to the left of ": "left",
    " to the right of ": "right",
    " left of ": "left",
    " right of ": "right",
    " above ": "above",
    " below ": "below",
    " under ": "below",
}


def parse(phrase: str) -> Spec:
    phrase = re.sub(r"^(the|a|an|another) ", "", phrase)
    for joiner, relation in JOINERS.items():
        head, found, anchor = phrase.partition(joiner)
        if found:
            return parse(head)._replace(relation=relation, anchor=parse(anchor))
    return PLAIN[phrase]


def parse_caption(caption: str) -> list[Spec]:
    caption = re.sub(r"^(a picture of|an image with) ", "", caption)
    return [parse(piece) for piece in re.split(", | and ", caption)]


def pairs(text: str) -> list[tuple[str, str]]:
    """The (colour, shape) combinations that a text names."""
    return re.findall(rf"({'|'.join(world.COLOURS)}) ({'|'.join(world.SHAPES)})", text)


def things(scene: Scene) -> list[tuple[str, str]]:
    return [(thing.colour, thing.shape) for thing in scene.things]


def all_texts(folder: Path) -> list[tuple[str, str]]:
    """(image, text) of every caption and phrase in the files."""
    entries = [row for name in ("captions", "phrases") for row in load(folder, f"train_{name}.json")]
    found = [(row["image"], text) for row in entries for text in row["caption"]]
    lists = [f"refer/{dataset}/{dataset}_{part}.json" for dataset in REFER for part in ("val", "test")]
    for name in (*lists, "matching_val.json", "matching_testB.json"):
        found += [(row["image"], row["text"]) for row in load(folder, name)]
    for part in ("val", "test"):
        sentences = load(folder, f"flickr/sentences_{part}.json")
        found += [(image, row["sentence"]) for image, rows in sentences.items() for row in rows]
    return found


# ---- determinism


@pytest.mark.parametrize(
    ("seed", "size", "digest", "of_masks"),
    [(0, 96, "28d50850ad848960", "e2a696aecbad5bab"), (7, 48, "f013eb0ba11fd1ae", "26b7a3beb86acd42")],
)
def test_equal_seeds_give_equal_texts(seed: int, size: int, digest: str, of_masks: str, tmp_path: Path) -> None:
    """Every file but the images, whose pixels depend on libraries. Who changes what they say raises VERSION."""
    scenes_files.generate(tmp_path, seed, 12, 8, 6, size)
    found = sorted(path for path in tmp_path.rglob("*.*") if path.suffix != ".jpg")
    masks = [path for path in found if path.is_relative_to(tmp_path / "masks")]
    others = [path for path in found if path not in masks]
    assert (len(others), len(masks)) == (22, 5)
    for paths, expected in ((others, digest), (masks, of_masks)):
        assert hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16] == expected


def test_a_scene_does_not_depend_on_how_many_there_are(folder: Path, tmp_path: Path) -> None:
    scenes_files.generate(tmp_path, SEED, 5, 5, 2)
    for path in (tmp_path / "images").iterdir():
        assert path.read_bytes() == (folder / "images" / path.name).read_bytes()
    few, many = load(tmp_path, "train_phrases.json"), load(folder, "train_phrases.json")
    assert few == many[: len(few)]


def test_synonyms_say_the_same(folder: Path) -> None:
    plain, rows = load(folder, "train_phrases.json"), load(folder, "train_relations.json")
    assert [{key: row[key] for key in row if key != "relation"} for row in rows] == plain
    groups = set()
    for row in (row for row in rows if "relation" in row):
        group, synonyms = row["relation"]["group"], row["relation"]["synonym"]
        groups.add(group)
        for synonym in synonyms:
            said = [phrase.replace(group, synonym) for phrase in row["caption"]]
            assert said != row["caption"]
            assert list(map(parse, said)) == list(map(parse, row["caption"]))
            assert set(" ".join(said).split()) <= set(scenes_files.vocabulary())
    assert groups > {"small", "little", "big", "thing", "object", "largest", "left of", "to the right of"}
    assert sum("relation" in row for row in rows) > len(rows) / 2


# ---- pictures


def test_boxes_hold_the_drawn_pixels_tightly() -> None:
    for scene in some_scenes(30):
        for index, thing in enumerate(scene.things):
            pictures = []
            for value in (0.0, 255.0):
                changed = list(scene.things)
                changed[index] = thing._replace(rgb=(value,) * 3)
                pictures.append(render(scene._replace(things=tuple(changed)), np.random.default_rng(0)).astype(int))
            difference = (pictures[1] - pictures[0]).max(-1)
            x1, y1, x2, y2 = thing.box
            inside = difference[y1:y2, x1:x2]
            assert inside.shape == (y2 - y1, x2 - x1)
            assert inside.sum() == difference.sum()
            assert min(inside[0].max(), inside[-1].max(), inside[:, 0].max(), inside[:, -1].max()) > 10  # 25% of 20%


def test_objects_do_not_touch() -> None:
    for scene in some_scenes(100):
        covered = np.zeros((scene.height, scene.width), int)
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            covered[y1 - 1 : y2 + 1, x1 - 1 : x2 + 1] += 1
        assert covered.max() == 1


def test_colours_are_nameable() -> None:
    named = np.array(list(world.COLOURS.values()))
    for scene in some_scenes(60):
        pixels = render(scene, np.random.default_rng(1))
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            plain = world.pattern(thing.shape, y2 - y1, x2 - x1, world.STRIPE * scene.scale) == 0
            solid = shape_mask(thing.shape, thing.side, thing.angle) == 1
            mean = pixels[y1:y2, x1:x2][plain & solid].mean(0)
            assert list(world.COLOURS)[int(np.abs(named - mean).sum(1).argmin())] == thing.colour


def test_patterns() -> None:
    on, off = [0.8] * 3, [0.0] * 3
    expected = {
        "circle": [off + off] * 6,
        "square": [[-value for value in on + off]] * 6,
        "triangle": [on + on] * 3 + [off + off] * 3,
        "star": [on + off] * 3 + [off + on] * 3,
        "cross": [[-value for value in on + off]] * 3 + [[-value for value in off + on]] * 3,
    }
    assert set(expected) == set(world.SHAPES)
    for shape, values in expected.items():
        np.testing.assert_allclose(world.pattern(shape, 6, 6, 3), values, atol=1e-6)


def test_patterns_scale_with_the_image() -> None:
    assert Scene(96, 96, ()).scale == 1
    assert Scene(224, 168, ()).scale == pytest.approx(2, rel=0.03)
    for shape in world.SHAPES:
        small, large = world.pattern(shape, 30, 30, 3), world.pattern(shape, 60, 60, 6)
        shrunk = large.reshape(30, 2, 30, 2).mean((1, 3))
        np.testing.assert_allclose(shrunk, small, atol=0.25)


# ---- truth


def thing(colour: str, shape: str, size: str, side: int, x: float, y: float) -> Thing:
    """An object with its centre at (x, y)."""
    box = (round(x - side / 2), round(y - side / 2), round(x + side / 2), round(y + side / 2))
    return Thing(colour, shape, size, side, 0, (0, 0, 0), box)


SCENE = Scene(
    100,
    100,
    (
        thing("red", "circle", "small", 14, 15, 20),
        thing("red", "circle", "big", 34, 40, 75),
        thing("blue", "square", "big", 24, 80, 22),
        thing("green", "star", "small", 16, 84, 60),
    ),
)
RED_CIRCLE = Spec("red", "circle")


@pytest.mark.parametrize(
    ("phrase", "true", "not_false"),
    [
        ("red circle", [0, 1], [0, 1]),
        ("thing", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("green square", [], []),
        ("the small red circle", [0], [0]),
        ("small object", [0, 3], [0, 3]),
        ("the circle on the left", [0], [0, 1]),
        ("the thing on the right", [2, 3], [2, 3]),
        ("top left circle", [0], [0]),
        ("bottom thing", [1], [1, 3]),
        ("thing in the middle", [], [1]),
        ("leftmost circle", [0], [0]),
        ("rightmost thing", [], [2, 3]),
        ("biggest thing", [1], [1]),
        ("smallest object", [], [0, 3]),
        ("circle left of the blue square", [0], [0, 1]),
        ("the thing above the green star", [2], [0, 2]),
        ("star below the square", [3], [3]),
        ("star right of the square", [], [3]),
        ("square left of the red circle", [], []),
        ("thing below the yellow star", [], []),
    ],
)
def test_truth(phrase: str, true: list[int], not_false: list[int]) -> None:
    assert matches(parse(phrase), SCENE) == true
    assert matches(parse(phrase), SCENE, lenient=True) == not_false


@pytest.mark.parametrize("kind", KINDS)
def test_described_objects_are_the_only_match(kind: str) -> None:
    described = 0
    for i, scene in enumerate(some_scenes(40)):
        for target in range(len(scene.things)):
            rng = np.random.default_rng([i, target])
            spec = find_phrase(scene, target, kind, rng)
            if spec:
                described += 1
                assert matches(spec, scene) == [target]
                assert matches(spec, scene, lenient=True) == [target]
                assert parse(phrases.text(spec, rng)) == spec
    assert described > 60


def mirror(scene: Scene) -> Scene:
    flipped = (
        t._replace(box=(scene.width - t.box[2], t.box[1], scene.width - t.box[0], t.box[3])) for t in scene.things
    )
    return scene._replace(things=tuple(flipped))


def test_a_mirrored_scene_makes_the_swapped_words_true() -> None:
    mirrored = 0
    for i, scene in enumerate(some_scenes(40)):
        for kind in ("position", "relation"):
            rng = np.random.default_rng(i)
            spec = find_phrase(scene, 0, kind, rng)
            if spec:
                words = phrases.text(spec, rng)
                swapped = parse(swap_left_right(words))
                mirrored += swapped != spec
                assert matches(swapped, mirror(scene)) == [0] == matches(swapped, mirror(scene), lenient=True)
    assert mirrored > 20


def check_caption(caption: Caption, scene: Scene) -> Counter[str]:
    """Every mention is true and stands where it says, and the caption is short; what is said besides the nouns."""
    assert len(caption.text.replace(",", "").split()) <= phrases.CAPTION_WORDS
    assert all(matches(spec, scene) for spec in parse_caption(caption.text))
    for mention in caption.mentions:
        assert matches(mention.spec, scene)
        assert caption.tokens[mention.first :][: len(mention.phrase.split())] == mention.phrase.split()
    specs = [mention.spec for mention in caption.mentions]
    return Counter(name for spec in specs for name in ("size", "place", "relation") if getattr(spec, name))


@pytest.mark.parametrize("style", phrases.CAPTION_STYLES)
def test_captions_name_every_object_truly(style: str) -> None:
    said: Counter[str] = Counter()
    for i, scene in enumerate(some_scenes(60)):
        caption = compose(scene, np.random.default_rng(i), style)
        said += check_caption(caption, scene)
        assert Counter(pairs(caption.text)) == Counter(things(scene))
    assert set(said) == {style} - {"plain"}


def test_captions_of_a_part_are_true_and_short() -> None:
    said, mentioned = Counter[str](), Counter[int]()
    for i, scene in enumerate(some_scenes(120)):
        caption = phrases.compose_part(scene, np.random.default_rng(i))
        said += check_caption(caption, scene)
        mentioned[len(caption.mentions)] += 1
        if len(caption.mentions) == 1:  # one object alone is described in full
            assert all(caption.mentions[0].spec[:3])
    assert set(mentioned) == {1, 2, 3}
    assert set(said) == {"size", "place", "relation"}


# ---- files


def target_boxes(image: str, text: str) -> list[list[int]]:
    scene = scene_of(image)
    return [list(scene.things[i].box) for i in matches(parse(text), scene)]


def test_training_files(folder: Path) -> None:
    config: Any = SimpleNamespace(image_root=folder / "images", max_words=50, empty_captions="keep")
    captions = vg.load_entries(folder / "train_captions.json", config)
    assert len(captions) == TRAIN
    for entry in captions:
        assert entry.boxes == []
        assert len(set(entry.captions)) > 1
    entries = vg.load_entries(folder / "train_phrases.json", config)
    assert len(entries) > 2.5 * TRAIN
    assert any(len(entry.boxes) > 1 for entry in entries)
    for entry in entries:
        for text in entry.captions:
            assert target_boxes(entry.image.name, text) == entry.boxes


@pytest.mark.parametrize("dataset", REFER)
def test_refer_files(folder: Path, dataset: str) -> None:
    benchmark, name = {"refcoco+": (REFCOCO_PLUS, "refcoco"), "refclef": (REFCLEF, "refclef")}[dataset]
    expressions = benchmark.load(GroundingConfig(**data_keys(name, folder)))
    splits = {"val", "testA", "testB"} if dataset == "refcoco+" else {"val", "test"}
    assert {expression.split for expression in expressions} == splits
    for expression in expressions:
        ((x, y, w, h),) = expression.boxes.tolist()
        assert target_boxes(expression.image.name, expression.text) == [[x, y, x + w, y + h]]
        height, width = expression.size or (0, 0)
        assert Image.open(expression.image).size == (width, height)
        if expression.detections is not None:
            assert [x, y, w, h] in expression.detections.tolist()
            assert (expression.detections[:, :2] >= 0).all()
            assert (expression.detections[:, :2] + expression.detections[:, 2:] <= [width + 0.02, height + 0.02]).all()
    if dataset == "refcoco+":  # it has no location words, except those of relations
        assert not any(parse(e.text).place or parse(e.text).extreme in ("leftmost", "rightmost") for e in expressions)


@pytest.mark.parametrize(("part", "images"), [("val", EVALUATION), ("test", 2 * EVALUATION)])
def test_flickr_files(folder: Path, part: str, images: int) -> None:
    every = FLICKR.load(GroundingConfig(**data_keys("flickr", folder)))
    expressions = [expression for expression in every if expression.split == part]
    assert len({expression.image for expression in expressions}) == images
    for expression in expressions:
        assert expression.size == Image.open(expression.image).size[::-1]
        found = [[x, y, x + w, y + h] for x, y, w, h in expression.boxes.tolist()]
        assert target_boxes(expression.image.name, expression.text) == found
    boxes = load(folder, f"flickr/bounding_boxes_{part}.json")
    without = Counter()
    for image, sentences in load(folder, f"flickr/sentences_{part}.json").items():
        for sentence in sentences:
            for phrase in sentence["phrases"]:
                words = sentence["sentence"].split(" ")[phrase["first_word_index"] :]
                assert words[: len(phrase["phrase"].split())] == phrase["phrase"].split()
                row = boxes[image]
                if phrase["phrase_id"] not in row["boxes"]:
                    without[phrase["phrase"]] += 1
                    assert phrase["phrase_id"] in row["scene"] + row["nobox"]
    assert set(without) == {"the background", "a picture", "an image"}


@pytest.mark.parametrize("split", ["val", "testB"])
def test_matching_pairs(folder: Path, split: str) -> None:
    rows = load(folder, f"matching_{split}.json")
    kinds = Counter((row["kind"], row["match"]) for row in rows)
    assert kinds["phrase", 1] == kinds["phrase", 0] > EVALUATION
    assert kinds["caption", 1] == kinds["caption", 0] > EVALUATION
    for row in rows:
        scene = scene_of(row["image"])
        claims = parse_caption(row["text"]) if row["kind"] == "caption" else [parse(row["text"])]
        if row["match"]:
            assert all(matches(claim, scene) for claim in claims)
        else:
            assert any(not matches(claim, scene, lenient=True) for claim in claims)
    for true, false in zip(rows[::2], rows[1::2], strict=True):
        assert (true["match"], false["match"]) == (1, 0)
        assert (true["image"], true["kind"]) == (false["image"], false["kind"])
        if true["kind"] == "phrase":
            assert parse(true["text"]).form == parse(false["text"]).form


def test_held_out_combinations_are_in_testB_alone(folder: Path) -> None:
    seen = set()
    for image, text in all_texts(folder):
        if int(Path(image).stem) < 300_000:
            assert not set(pairs(text)) & set(HELD_OUT)
            seen.update(pairs(text))
    assert {colour for colour, _ in seen} == set(world.COLOURS)
    assert {shape for _, shape in seen} == set(world.SHAPES)
    for i in range(EVALUATION):
        assert 1 <= sum(thing in HELD_OUT for thing in things(scene_of(300_000 + i))) <= 2
    for dataset in REFER:
        targets = [row for row in load(folder, f"refer/{dataset}/{dataset}_test.json") if row["image"] >= "300000"]
        assert len(targets) > EVALUATION
        for row in targets:
            scene = scene_of(row["image"])
            (target,) = matches(parse(row["text"]), scene)
            assert things(scene)[target] in HELD_OUT


def test_the_vocabulary_covers_every_word(folder: Path) -> None:
    known = (folder / "text_encoder" / "vocab.txt").read_text().split("\n")[:-1]
    assert known[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(known)) == len(known)
    tokenizer = load_tokenizer(str(folder / "text_encoder"))
    texts = [clean_caption(text, 50) for _, text in all_texts(folder)]
    assert {word for text in texts for word in text.split(" ")} <= set(known)
    ids = tokenizer([*texts, "zebra 42", "quick brown fox"]).input_ids
    assert not (ids == known.index("[UNK]")).any()
