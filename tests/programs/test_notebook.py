"""demo_amc.ipynb, executed as it stands: on scenes drawn anew, with the model that ships with the repository."""

import base64
import io
import itertools
import os
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from dataset.photos import read_photo
from grounding.explain import ground, ground_all
from grounding.load import open_model

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "demo_amc.ipynb"
CHECKPOINT, CONFIG = "checkpoints/scenes_amc.safetensors", "configs/scenes/Grounding_refcoco.yaml"
IMAGE = "docs/images/scenes/100000.jpg"
PHRASES = ["the small red triangle", "the big circle", "the blue circle", "the star"]
PATIENCE = 600  # seconds for a cell, and for the kernel to start; a machine may be slow
# One thread as in the kernel: what is printed is then the same to the digit.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's root as the notebook sees it, without a run of `make demo`."""
    folder = tmp_path_factory.mktemp("root")
    for name in ("checkpoints", "configs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def execute(place: Path, **parameters: object) -> Any:
    """Run the notebook in a folder, `parameters` in place of those in its first code cell."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (first,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in parameters.items():
        lines = first.source.splitlines()
        assert sum(line.startswith(f"{name} = ") for line in lines) == 1
        first.source = "\n".join(f"{name} = {value!r}" if line.startswith(f"{name} = ") else line for line in lines)
    # This Python's own kernel, whatever kernels called python3 are installed.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    waits: dict[str, Any] = {"timeout": PATIENCE, "startup_timeout": PATIENCE}
    client = NotebookClient(notebook, kernel, **waits, resources={"metadata": {"path": str(place)}})
    # No settings of whoever runs the tests, and nothing from a network.
    surroundings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    surroundings |= {"IPYTHONDIR": str(place / "ipython"), "JUPYTER_CONFIG_DIR": str(place / "jupyter")}
    client.execute(env={**os.environ, **surroundings})
    return notebook


@pytest.fixture(scope="module")
def executed(place: Path) -> Any:
    return execute(place)


def outputs(notebook: Any, cell: str) -> list[Any]:
    (found,) = [one for one in notebook.cells if one.id == cell]
    return found.outputs


def said(notebook: Any, cell: str) -> list[str]:
    """The printed lines of a cell."""
    return "".join(one.text for one in outputs(notebook, cell) if one.get("name") == "stdout").splitlines()


def pictures(notebook: Any, cell: str) -> list[np.ndarray]:
    shown = [one.data["image/png"] for one in outputs(notebook, cell) if one.output_type == "display_data"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in shown]


def test_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)
    assert notebook.metadata.kernelspec.name == "python3"
    names = [cell.id for cell in notebook.cells]
    assert len(set(names)) == len(names)
    assert all(name.isalpha() for name in names)  # given by hand: they do not change when the file is written again
    assert NOTEBOOK.read_text(encoding="utf-8") == nbformat.writes(notebook, indent=1) + "\n"


def test_what_it_prints_is_what_ground_finds(executed: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    opened = open_model(CHECKPOINT, CONFIG, device="cpu")
    image = read_photo(Path(IMAGE))
    found = ground_all(opened.explainer(), image, PHRASES)
    first = found[0]
    assert said(executed, "open")[-1] == f"config: {CONFIG}, by the checkpoint's sizes"
    assert said(executed, "overlay") == [
        f"'{first.text}': match {first.match:.4f}, point {first.point}, boxes {[box.box for box in first.boxes]}"
    ]
    x, y = first.point
    assert said(executed, "truth")[0] == f"point inside the true box: {19 < x < 39 and 77 < y < 95}"
    shares = [f"{word.word:10} {100 * word.share:5.1f}% of the map" for word in first.words]
    assert said(executed, "words") == shares
    elsewhere = [ground(opened.explainer(block=block), image, PHRASES[0]).point for block in (2, 3, 4)]
    marks = ["", " (the config's layer)", ""]
    assert said(executed, "layers") == [
        f"layer {block}: point {point}{mark}" for block, point, mark in zip((2, 3, 4), elsewhere, marks, strict=True)
    ]
    assert said(executed, "phrases") == [f"{one.text!r}: match {one.match:.4f}, point {one.point}" for one in found]
    assert len({f"{one.match:.4f}" for one in found}) == len(PHRASES)


def test_pictures_are_shown(executed: Any) -> None:
    shown = {cell: pictures(executed, cell) for cell in ("overlay", "words", "layers", "phrases")}
    assert {cell: len(found) for cell, found in shown.items()} == {"overlay": 1, "words": 1, "layers": 2, "phrases": 4}
    every = [picture for found in shown.values() for picture in found]
    assert all(min(picture.shape[:2]) > 250 and picture.std() > 20 for picture in every)
    for one, other in itertools.combinations(every, 2):
        assert one.shape != other.shape or np.abs(one.astype(int) - other).max() > 20


def test_other_parameters_and_another_checkpoint(place: Path) -> None:
    """A phrase, no true box; and a checkpoint named by the cell."""
    (place / "own.safetensors").write_bytes((ROOT / CHECKPOINT).read_bytes())
    other = execute(place, CHECKPOINT="own.safetensors", CONFIG=CONFIG, PHRASES=["blue circle"], TRUTH=None)
    assert any(line.startswith("own.safetensors: ") for line in said(other, "open"))
    assert said(other, "overlay")[0].startswith("'blue circle': match ")
    assert said(other, "truth") == []
    assert len(pictures(other, "phrases")) == 1


def test_away_from_the_root_it_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match=r"is not there; run the notebook from the root"):
        execute(tmp_path)
