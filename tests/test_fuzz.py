"""A short run of the fuzzer (`make fuzz` is the long one), and that it notices what ends wrongly."""

from pathlib import Path

import pytest

from tests import fuzz
from tests.fuzz import KINDS, Kind
from utils import UserError

TRIES_A_KIND = 15

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def test_damaged_files_of_every_kind_end_in_a_result_or_one_message(tmp_path: Path) -> None:
    counts, wrong = fuzz.fuzz(tmp_path, TRIES_A_KIND * len(KINDS), seed=1, kinds=list(KINDS))
    assert not wrong
    assert min(counts["right"], counts["refused"]) > 0.1 * sum(counts.values())


@pytest.mark.parametrize(
    "error",
    [ValueError("bare"), AssertionError("wrong result"), UserError("no file is named"), BaseException("a panic")],
)
def test_it_notices_what_ends_wrongly(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path, path: Path) -> None:
        raise error

    monkeypatch.setitem(KINDS, "faulty", Kind(["s/flickr/val.txt"], read))
    counts, wrong = fuzz.fuzz(tmp_path / "world", 2, seed=0, kinds=["faulty"], keep=tmp_path / "kept")
    assert len(wrong) == 2
    assert counts["right"] == counts["refused"] == 0
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_it_notices_what_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path, path: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setitem(KINDS, "endless", Kind(["s/flickr/val.txt"], read))
    assert "not done in 1 seconds" in fuzz.fuzz(tmp_path, 1, seed=0, kinds=["endless"])[1][0]
