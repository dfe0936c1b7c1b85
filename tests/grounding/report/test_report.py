"""The report: from result files of maps drawn by hand to the numbers, names and pictures of its page."""

import base64
import io
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from dataset.expressions import Expression
from grounding import metrics
from grounding.benchmarks import FLICKR, REFCOCO_PLUS, Benchmark
from grounding.report import rows, sections
from grounding.report.rows import (
    MEASURES,
    Results,
    collect,
    facts_of,
    measure_map,
    named_apart,
)
from grounding.report.sections import Block
from grounding.report.statistics import Interval
from grounding.report.write import no_formula, report_folders
from grounding.results import ResultError, ResultFolder, sources_of

pytestmark = pytest.mark.slow

EVIL = '<script>alert("x")</script> & "two"'
HEIGHT, WIDTH = 4, 6
BOX = [1.0, 0.0, 3.0, 3.0]  # strictly inside: x 2 and 3, y 1 and 2; a sixth of the image
DETECTIONS = np.array([[1.0, 0, 3, 3], [3, 0, 3, 4]])


def peak(x: int, y: int, value: float = 1.0, floor: float = 0.0) -> Tensor:
    """A map of an image's own size, which a resize leaves as it is."""
    cam = torch.full((HEIGHT, WIDTH), floor)
    cam[y, x] = value
    return cam


RIGHT, WRONG = peak(2, 1), peak(5, 3)


@pytest.fixture
def expressions(tmp_path: Path) -> list[Expression]:
    """Two of image 0, one each of images 1 to 3; the last one's split is not reported."""
    for number in range(4):
        Image.new("RGB", (WIDTH, HEIGHT), (40 * number, 90, 90)).save(tmp_path / f"{number}.png")
    rows = [
        (0, "cat", "val", ("animal",)),
        (0, "the cat on it", "val", ("animal", "other")),
        (1, EVIL, "val", ()),
        (2, "$a_{ dog", "testA", ("animal",)),
        (3, "a thing", "train", ("other",)),
    ]
    return [
        Expression(tmp_path / f"{image}.png", text, 10 + i, split, np.array([BOX]), {}, DETECTIONS, None, kinds)
        for i, (image, text, split, kinds) in enumerate(rows)
    ]


def store(folder: Path, expressions: list[Expression], epochs: dict[str, list[Tensor | None]], **origin: Any) -> Path:
    """An --output_dir with the results of some checkpoints, and the log lines that the evaluation would write."""
    results = ResultFolder(folder / "result")
    for epoch, maps in epochs.items():
        now = {"checkpoint": f"/some/where/ck_{epoch}.pth", "block_num": 8, **origin}
        results.write(epoch, expressions, maps, now)
        results.write_lines(epoch, [{"val_d": 0.5}, {"val_d": 0.5}])
    return folder


@pytest.fixture
def two(expressions: list[Expression], tmp_path: Path) -> tuple[Path, Path]:
    """A model that is right of three, and one that is right of the others, of one that the first is right of."""
    first = store(tmp_path / "first", expressions, {"00": [RIGHT, WRONG, RIGHT, WRONG, RIGHT]}, checkpoint="/a/old.pth")
    second = store(
        tmp_path / "second", expressions, {"00": [RIGHT, RIGHT, WRONG, RIGHT, WRONG]}, checkpoint="/b/new.pth"
    )
    return first, second


def collected(expressions: list[Expression], folders: tuple[Path, ...], benchmark: Benchmark = REFCOCO_PLUS) -> Results:
    return collect(benchmark, expressions, sources_of(folders, benchmark.metrics), others=len(folders) - 1)


def words(block: Block) -> list[list[str]]:
    """The texts of a table, row by row."""
    assert block.table is not None
    return [
        [value.text(block.signed) if isinstance(value, Interval) else str(value) for value in row]
        for row in block.table.itertuples(name=None)
    ]


# ---- from result files to arrays


def test_measures_of_a_map(expressions: list[Expression]) -> None:
    def measures(cam: Tensor) -> dict[str, float]:
        return dict(zip(MEASURES, measure_map(cam, expressions[0]), strict=True))

    cam = peak(2, 1, 10.0)
    cam[0, 5] = 6.0  # outside; hot at 0.3 and 0.5
    cam[1, 3], cam[3, 0] = -1.0, -2.0  # what bicubic leaves beside a peak takes nothing away, inside or outside
    found = measures(cam)
    assert found["energy inside"] == pytest.approx(10 / 16)
    assert found["energy above chance"] == pytest.approx((10 / 16 - 1 / 6) / (5 / 6))
    assert [found[f"pointing at {t}"] for t in rows.THRESHOLDS] == [0.5, 0.5, 1, 1]
    assert [found[f"map box at {t}"] for t in rows.THRESHOLDS] == [0, 0, 0, 0]  # one pixel of nine
    full = torch.zeros(HEIGHT, WIDTH)
    full[0:3, 1:4] = 1
    assert measures(full)["map box at 0.5"] == 1
    assert measures(peak(5, 3))["energy above chance"] == pytest.approx(-1 / 5)
    whole = replace(expressions[0], boxes=np.array([[-1.0, -1, 9, 9]]))  # nothing is above chance where all is inside
    assert measure_map(cam, whole)[:2] == [1, 0]


def test_sources_are_the_complete_checkpoints_of_the_folders(expressions: list[Expression], tmp_path: Path) -> None:
    maps: list[Tensor | None] = [RIGHT] * 5
    one = store(tmp_path / "one", expressions, {"00": maps, "01": maps})
    other = store(tmp_path / "other", expressions, {"01": maps})
    with (one / "result" / "log.txt").open("a") as log:
        log.write(json.dumps({"val_d": 0.5, "epoch": "02"}) + "\n")  # of two lines
    found = sources_of([other, one], REFCOCO_PLUS.metrics)
    assert [(source.name, source.epoch) for source in found] == [("ck_01", "01"), ("ck_00", "00"), ("ck_01", "01")]
    assert [source.name for source in named_apart(found)] == ["other/epoch 01", "ck_00", "one/epoch 01"]
    again = sources_of([one, one], REFCOCO_PLUS.metrics)  # alike in all: the whole path, at least
    assert {source.name for source in named_apart(again)} == {f"{one}/epoch 00", f"{one}/epoch 01"}
    with pytest.raises(ResultError, match="nowhere: no complete results"):
        sources_of([tmp_path / "nowhere"], REFCOCO_PLUS.metrics)


def test_what_is_compared_and_shown(expressions: list[Expression], tmp_path: Path) -> None:
    good, bad, some = [RIGHT] * 5, [WRONG] * 5, [RIGHT, None, WRONG, WRONG, WRONG]  # on val: all, none, half of two
    a = store(tmp_path / "a", expressions, {"00": bad, "01": good, "02": bad})
    b = store(tmp_path / "b", expressions, {"00": good, "01": bad})
    every = {"a/00", "a/01", "a/02"}

    def chosen(folders: list[Path], others: int) -> tuple[str, str | None, str, set[str]]:
        sources = sources_of(folders, REFCOCO_PLUS.metrics)
        names = [f"{source.folder.folder.parent.name}/{source.epoch}" for source in sources]
        named = [source._replace(name=name) for source, name in zip(sources, names, strict=True)]
        found = collect(REFCOCO_PLUS, expressions, named, others)
        return found.best, found.baseline, found.subject, set(found.shown)

    assert chosen([a], 0) == ("a/01", "a/00", "a/01", every)  # the first checkpoint with the best
    assert chosen([b], 0) == ("b/00", "b/01", "b/00", {"b/00", "b/01"})  # or the last, where the first is the best
    # the best of the other folder with the best of this one; of more than four, these and the last are shown
    assert chosen([a, b], 3) == ("a/01", "a/01", "b/00", {"a/01", "b/00", "b/01"})
    c = store(tmp_path / "c", expressions, {"00": bad, "01": some, "02": [None] * 5})
    assert chosen([c], 0) == ("c/01", "c/00", "c/01", {"c/00", "c/01", "c/02"})
    assert chosen([store(tmp_path / "d", expressions, {"00": bad})], 0) == ("d/00", None, "d/00", {"d/00"})


# ---- tables


def test_the_accuracy_table_and_what_else_is_logged(expressions: list[Expression], two: tuple[Path, Path]) -> None:
    folder = ResultFolder(two[1] / "result")
    folder.write_lines("00", [*folder.lines("00"), {"matching_val": 0.75, "matching_val_phrase": None}])
    block, logged = sections.accuracies(collected(expressions, two)).blocks
    assert list(block.table.columns) == [f"{m} {s}" for m in ("box", "point") for s in ("val_d", "testA_d", "testB_d")]
    assert words(block) == [
        ["old", "66.67", "0.00", "-", "66.67", "0.00", "-"],
        ["new", "66.67", "100.00", "-", "66.67", "100.00", "-"],
    ]
    assert [value.range for value in block.table["box val_d"]] == ["50.0 to 100.0", "0.0 to 100.0"]  # of two images
    assert block.bold == "old"  # equal by point val_d: the first
    assert len(block.charts) == 2
    assert list(logged.table.columns) == ["matching val", "matching val phrase"]
    assert words(logged) == [["old", "-", "-"], ["new", "75.00", "-"]]


def test_measures_and_groups_are_of_reported_splits(expressions: list[Expression], two: tuple[Path, Path]) -> None:
    found = collected(expressions, two)
    (measures,) = sections.further_measures(found).blocks
    assert words(measures)[0] == ["share of the map's energy inside", "50.00", "75.00"]
    assert len(words(measures)) == len(MEASURES)
    tables = sections.groups(found).blocks
    assert [table.title for table in tables] == [
        *(f"{metric} accuracy by {kind}" for metric in ("Box", "Point") for kind in ("phrase length", "category"))
    ]  # all boxes are of one size: no table
    lengths, categories = tables[2:]
    assert words(lengths) == [
        ["1 word", "1", "16.67", "100.00", "100.00"],
        ["2 words", "1", "16.67", "0.00", "100.00"],
        ["3 words", "1", "16.67", "100.00", "0.00"],
        ["4 to 5 words", "1", "16.67", "0.00", "100.00"],
    ]
    assert words(categories) == [["animal", "3", "16.67", "33.33", "100.00"], ["other", "1", "16.67", "0.00", "100.00"]]


def test_the_comparison(expressions: list[Expression], two: tuple[Path, Path]) -> None:
    found = collected(expressions, two)
    assert (found.baseline, found.subject) == ("old", "new")
    outcome, *changed = sections.comparison(found, "old", "new").blocks
    assert list(outcome.table.columns) == ["both right", "only old", "only new", "neither", "difference"]
    assert words(outcome)[3:5] == [
        ["point val_d", "1", "1", "1", "0", "0.00"],
        ["point testA_d", "0", "0", "1", "0", "+100.00"],
    ]
    gained, all_gained, lost, all_lost = changed
    assert [case.text for case in gained.cases] == ["the cat on it", "$a_{ dog"]
    assert [case.text for case in lost.cases] == [EVIL]
    assert words(all_gained) == [["the cat on it", "0.png", "11", "val_d"], ["$a_{ dog", "2.png", "13", "testA_d"]]
    assert words(all_lost) == [[EVIL, "1.png", "12", "val_d"]]
    assert [(name, right) for name, _, right in lost.cases[0].shots] == [("image", None), ("old", True), ("new", False)]


def test_a_map_that_is_lacking_changes_nothing(expressions: list[Expression], two: tuple[Path, Path]) -> None:
    maps = [RIGHT, None, WRONG, RIGHT, WRONG]
    store(two[1], expressions, {"00": maps}, checkpoint="/b/new.pth")
    found = collected(expressions, two)
    outcome = sections.comparison(found, "old", "new").blocks[0]
    assert words(outcome)[3] == ["point val_d", "1", "1", "0", "0", "-50.00"]
    assert words(sections.accuracies(found).blocks[0])[1][4] == "50.00"
    assert words(sections.origins(found).blocks[0]) == [
        ["old", "/a/old.pth", "-", "8", "-", "0"],
        ["new", "/b/new.pth", "-", "8", "-", "1"],
    ]


# ---- cases


def test_cases_are_of_the_subject(expressions: list[Expression], two: tuple[Path, Path]) -> None:
    part = sections.cases(collected(expressions, two))
    assert part.title == "Cases of new"
    assert [(sheet.title, [case.text for case in sheet.cases]) for sheet in part.blocks] == [
        ("Best cases", ["cat"]),
        ("Typical cases", ["$a_{ dog"]),
        ("Worst cases", [EVIL]),
    ]
    assert part.blocks[0].cases[0].note == "energy inside 100.00%"


# ---- the page


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, text, tables as rows of texts; every tag is closed."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def pictures(self) -> tuple[Counter[str], set[tuple[int, int]]]:
        """How many there are of each MIME type, and the sizes of the JPEGs."""
        kinds: Counter[str] = Counter()
        sizes = set()
        for source in [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]:
            kind, _, content = source.removeprefix("data:").partition(";base64,")
            data = base64.b64decode(content, validate=True)
            kinds[kind] += 1
            if kind == "image/jpeg":
                sizes.add(Image.open(io.BytesIO(data)).size)
            else:
                assert b"</svg>" in data
        return kinds, sizes

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data


@pytest.fixture
def html(expressions: list[Expression], two: tuple[Path, Path]) -> str:
    path = report_folders(REFCOCO_PLUS, expressions, two)
    assert path == two[1] / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_holds_the_numbers_and_escaped_texts(html: str) -> None:
    page = Page(html)
    assert ["new", "66.67", "100.00", "-", "66.67", "100.00", "-"] in page.rows
    headings = [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert headings == ["h1", "h2", *["h3"] * 6]
    assert "5 expressions of 4 images: val_d 3, testA_d 1, testB_d 0." in page.text
    assert "<script" not in html
    assert [EVIL, "1.png", "12", "val_d"] in page.rows
    assert f"new: {EVIL}" in [attributes.get("alt") for _, attributes in page.tags]
    template = (Path(sections.__file__).parent / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"\|\s*safe|autoescape", template)


def test_the_page_needs_nothing_else(html: str) -> None:
    page = Page(html)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "style", "onload", "onerror"):
            value = attributes.get(name)
            assert value is None or (name in ("src", "href") and value.startswith(("data:image/", "#")))
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "object", "embed", "base", "form"})
    assert not re.search(r"https?://|@import|url\(", html)
    policy = {attributes.get("http-equiv"): attributes.get("content") for tag, attributes in page.tags if tag == "meta"}
    assert policy["Content-Security-Policy"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_pages_pictures(html: str) -> None:
    page = Page(html)
    kinds, sizes = page.pictures()
    assert kinds == {"image/svg+xml": 2 + 1 + 4, "image/jpeg": 3 * (3 + 3)}
    assert sizes == {(280, 187)}
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "span"]
    assert classes.count("small right") == 4 + 3  # among the cases, and one of two models in each that changed
    assert classes.count("small wrong") == 2 + 3


def test_the_page_is_the_same_every_time(html: str, expressions: list[Expression], two: tuple[Path, Path]) -> None:
    assert report_folders(REFCOCO_PLUS, expressions, two).read_text(encoding="utf-8") == html


def test_one_checkpoint_is_not_compared_with_itself(expressions: list[Expression], two: tuple[Path, Path]) -> None:
    alone = report_folders(REFCOCO_PLUS, expressions, two[:1]).read_text(encoding="utf-8")
    page = Page(alone)
    assert [tag for tag, _ in page.tags].count("h3") == 5
    assert ["old", "66.67", "0.00", "-", "66.67", "0.00", "-"] in page.rows
    again = report_folders(REFCOCO_PLUS, expressions, [two[0], two[0] / ".." / "first", two[0]])
    assert again.read_text(encoding="utf-8") == alone


def test_any_metric_is_reported(
    expressions: list[Expression], two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the report has never heard of, with values between 0 and 1, as the benchmark's only metric."""

    overlap = metrics.Metric(lambda cam, _: 0.75 if cam.pred.equal(RIGHT) else 0.25)
    monkeypatch.setitem(metrics.METRICS, "overlap", overlap)
    benchmark = REFCOCO_PLUS._replace(metrics=("overlap",))
    path = report_folders(benchmark, expressions, two)
    page = Page(path.read_text(encoding="utf-8"))
    assert ["old", "58.33", "25.00", "-"] in page.rows
    assert ["overlap val_d", "1", "1", "1", "0", "0.00"] in page.rows
    assert "Right by overlap only with new: 2 of 2" in page.text
    assert "Overlap accuracy by category" in page.text
    assert pd.read_csv(path.with_name("expressions.csv"))["overlap: new"].tolist() == [0.75, 0.75, 0.25, 0.75, 0.25]


def test_training_curves_of_the_checkpoints_folder(expressions: list[Expression], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.txt").write_text('{"train_loss_itm": 0.5, "steps": 3, "epoch": 0}\n')
    out = store(tmp_path / "out", expressions, {"00": [RIGHT] * 5}, checkpoint=str(run / "checkpoint_00.pth"))
    page = Page(report_folders(REFCOCO_PLUS, expressions, [out]).read_text(encoding="utf-8"))
    assert "Losses of run by steps." in [attributes.get("alt") for _, attributes in page.tags]
    (run / "log.txt").write_text("{}\n")  # a log without losses is no reason to fail
    page = Page(report_folders(REFCOCO_PLUS, expressions, [out]).read_text(encoding="utf-8"))
    assert not any(text.strip() == "Training" for text in page.text)


def test_results_of_other_expressions_are_refused(expressions: list[Expression], two: tuple[Path, Path]) -> None:
    other = store(two[0].parent / "other", expressions[:2], {"00": [RIGHT] * 2})
    with pytest.raises(ResultError, match="holds 2 records"):
        report_folders(REFCOCO_PLUS, expressions, [other, two[1]])


def test_flickrs_size_is_the_annotated_one(expressions: list[Expression], tmp_path: Path) -> None:
    """Boxes, maps and pictures refer to it, whatever the file's size is."""
    box = np.array([[10.0, 10.0, 11.0, 11.0]])
    item = Expression(expressions[0].image, "cat", 0, "val", box, annotated_size=(40, 30), categories=("animals",))
    out = store(tmp_path / "flickr", [item], {"00": [RIGHT]})
    assert facts_of([item], [True])["area of boxes"].tolist() == [pytest.approx(100 / 1200)]
    html = report_folders(FLICKR, [item], [out]).read_text(encoding="utf-8")
    assert Page(html).pictures()[1] == {(210, 280)}


# ---- expressions.csv


def test_expressions_csv(expressions: list[Expression], two: tuple[Path, Path], tmp_path: Path) -> None:
    store(two[1], expressions, {"00": [RIGHT, None, WRONG, RIGHT, WRONG]}, checkpoint="/b/new.pth")
    path = report_folders(REFCOCO_PLUS, expressions, two).with_name("expressions.csv")
    content = path.read_bytes()
    found = pd.read_csv(path)
    facts = ["benchmark", "image", "phrase", "ref_id", "split", "category", "words"]
    sizes = ["image height", "image width", "area of boxes"]
    scores = [f"{metric}: {name}" for name in ("old", "new") for metric in ("box", "point")]
    assert list(found)[:14] == facts + sizes + scores
    assert list(found)[14:] == [f"{measure}: {name}" for name in ("old", "new") for measure in MEASURES]
    assert found["phrase"].tolist() == [expression.text for expression in expressions]
    second = ["RefCOCO+", str(tmp_path / "0.png"), "the cat on it", 11, "val", "animal; other", 4]
    assert found.iloc[1].tolist()[:12] == [*second, HEIGHT, WIDTH, pytest.approx(1 / 6, abs=1e-6), 0, 0]
    assert found["point: old"].tolist() == [1, 0, 1, 0, 1]
    for column in ("point: new", "energy inside: new"):
        assert found[column].tolist() == pytest.approx([1, np.nan, 0, 1, 0], nan_ok=True)
    assert b'"val","animal; other",4,4,6,0.166667,0,0,"",""' in content  # text is quoted, numbers are not
    report_folders(REFCOCO_PLUS, expressions, two)
    assert path.read_bytes() == content
    alone = pd.read_csv(report_folders(REFCOCO_PLUS, expressions, two[1:]).with_name("expressions.csv"))
    assert alone.loc[1, sizes].isna().all()  # no checkpoint has seen the image


def test_no_cell_is_a_formula(expressions: list[Expression], tmp_path: Path) -> None:
    evil = ["=cmd()", "+1", "-1", "@x", "\tx", "'x", "＝1", "plain"]
    items = [replace(expressions[0], text=text, ref_id=i, categories=(text,) * (i == 0)) for i, text in enumerate(evil)]
    out = store(tmp_path / "out", items, {"00": [RIGHT] * 8}, checkpoint="/a/=evil.pth")
    found = pd.read_csv(report_folders(REFCOCO_PLUS, items, [out]).with_name("expressions.csv"))
    assert found["phrase"].tolist() == [*("'" + text for text in evil[:-1]), "plain"]
    assert [text.removeprefix("'") for text in found["phrase"]] == evil
    assert found["category"][0] == "'=cmd()"
    assert "point: =evil" in found.columns  # does not begin with "="
    assert no_formula("") == ""
