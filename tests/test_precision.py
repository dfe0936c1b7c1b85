"""The precisions: which one is chosen, what PyTorch is told, what is said and kept; GPUs and processors are faked."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import precision
import Pretrain
from models.albef import ALBEF
from models.pretrain import PretrainModel
from tests.training_runs import arguments, make_workplace, ready, saved
from utils import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def _flags_stay() -> Iterator[None]:
    """PyTorch's own flags, before and after."""
    before = flags()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("place"))


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")


def fake_processor(monkeypatch: pytest.MonkeyPatch, flags: str | None) -> None:
    def read(path: Path, encoding: str) -> str:
        assert path == Path("/proc/cpuinfo")
        if flags is None:
            raise FileNotFoundError(path)
        return f"processor : 0\nflags : fpu sse2 {flags} avx\n"

    monkeypatch.setattr(precision.Path, "read_text", read)


# ---- which one


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "tf32"), ((9, 0), "tf32")])
def test_the_default_is_tf32_where_it_exists(
    capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu(monkeypatch, capability)
    assert precision.choose(None, GPU) == chosen
    assert precision.choose(None, CPU) == "fp32"
    for name in ("fp32", "bf16", "fp16"):
        assert precision.choose(name, GPU) == name


def test_tf32_where_there_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (7, 0))
    with pytest.raises(UserError, match=r"--precision tf32: Tesla V100 has no TF32.* use --precision fp32"):
        precision.choose("tf32", GPU)
    with pytest.raises(UserError, match="--precision tf32: the CPU has no TF32"):
        precision.choose("tf32", CPU)
    fake_gpu(monkeypatch, (8, 6))
    assert precision.choose("tf32", GPU) == "tf32"


def test_processes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU of another process that has no TF32."""
    fake_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(precision.utils, "gather_objects", lambda own: [own, "Tesla T4" if own == "" else own])
    assert precision.choose(None, GPU) == "fp32"
    with pytest.raises(UserError, match="Tesla T4 has no TF32"):
        precision.choose("tf32", GPU)


@pytest.mark.parametrize(
    ("flags", "made_for"),
    [
        ("avx2 f16c", set()),
        ("avx2 avx512f avx512bw avx512_vnni", set()),
        ("avx512f avx512_bf16", {"bf16"}),
        ("amx_tile amx_bf16 avx512_fp16", {"bf16", "fp16"}),
        ("asimd asimdhp bf16", {"bf16", "fp16"}),
    ],
)
def test_a_processor_without_units_computes_in_fp32(
    flags: str, made_for: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_processor(monkeypatch, flags)
    for name in ("bf16", "fp16"):
        assert precision.choose(name, CPU) == (name if name in made_for else "fp32")
        assert ("computing in fp32" in capsys.readouterr().out) == (name not in made_for)
        assert precision.choose(name, CPU, force=True) == name
        assert not capsys.readouterr().out
    assert precision.choose("fp32", CPU) == "fp32"


@pytest.mark.parametrize("answer", [True, False])
def test_pytorch_is_asked_where_no_file_tells(answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_processor(monkeypatch, None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: answer, raising=False)
    assert precision.has_units("bf16", CPU) == answer


# ---- what PyTorch is told


@pytest.mark.parametrize(
    ("name", "training", "capability", "tf32"),
    [
        ("tf32", True, (8, 0), True),
        ("tf32", False, (8, 0), True),
        ("fp32", True, (8, 0), False),
        ("fp32", False, (8, 0), False),
        ("bf16", True, (8, 0), True),
        ("fp16", True, (7, 5), False),
        ("bf16", False, (8, 0), False),
        ("fp16", False, (8, 0), False),
    ],
)
def test_both_flags(
    name: str, training: bool, capability: tuple[int, int], tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu(monkeypatch, capability)
    with precision.use(name, GPU, training):
        assert flags() == (tf32, tf32)
        with pytest.raises(KeyError, match="False, False"), precision.use("fp32", GPU):
            raise KeyError(flags())
        assert flags() == (tf32, tf32)
    assert flags() == (False, True)


def test_a_simulated_gpu_is_not_asked() -> None:
    if not torch.cuda.is_available():
        assert not precision.has_tf32(GPU)


def test_training_is_in_tf32_and_what_it_shows_in_fp32(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validation and heat maps of a run are what the evaluation scripts compute."""
    seen: dict[str, set[tuple[bool, bool]]] = {}

    def spy(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def note(*args: Any, **options: Any) -> Any:
            seen.setdefault(name, set()).add(flags())
            return original(*args, **options)

        monkeypatch.setattr(owner, name, note)

    for owner, name in ((PretrainModel, "forward"), (PretrainModel, "update_teacher")):
        spy(owner, name)
    for name in ("encode", "explain", "match"):
        spy(ALBEF, name)
    spy(Pretrain.torch.optim.AdamW, "step")
    monkeypatch.setattr(precision, "has_tf32", lambda device: True)
    folder = place / "data"
    config = json.loads((place / "config.yaml").read_text())
    refer = {"benchmark": "refcoco+", "refcoco_data": str(folder / "refer"), "image_root": str(folder / "images")}
    refer |= {"test_file": [str(folder / "refer/refcoco+/refcoco+_val.json")], "batch_size": 8, "block_num": 1}
    refer["det_file"] = str(folder / "refer/refcoco+/dets.json")
    refer |= {key: config[key] for key in config if key.startswith("vision_") or key in ("patch_size", "image_res")}
    refer |= {key: config[key] for key in ("bert_config", "embed_dim")}
    (tmp_path / "val.yaml").write_text(json.dumps(refer))
    words = ["--max_steps", "1", "--validate", str(tmp_path / "val.yaml"), "--tensorboard", "schedular.epochs=1"]
    Pretrain.main(Pretrain.parse_args(arguments(place, tmp_path / "out", *words)))
    assert seen.pop("forward") == seen.pop("update_teacher") == seen.pop("step") == {(True, True)}
    assert seen == {"encode": {(False, False)}, "explain": {(False, False)}}
    assert flags() == (False, True)
    assert "epochs 0 to 0, tf32" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"]["precision"] == "tf32"
    assert saved(tmp_path / "out", 0)["run"]["precision"] == "tf32"


# ---- what is said and kept


def test_what_is_taken_is_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "has_units", lambda name, device: name == "fp32")
    run = ready(place, tmp_path / "out", "--precision", "bf16")
    assert run.state.settings["precision"] == run.args.precision == "fp32"
    assert re.search("--precision bf16: .*computing in fp32.*\n(.*\n)*.*epochs 0 to 2, fp32", capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"]["precision"] == "fp32"
    assert not run.scaler.is_enabled()
    assert ready(place, tmp_path / "forced", "--precision", "bf16", "--force_precision").args.precision == "bf16"
    with pytest.raises(UserError, match="the CPU has no TF32"):
        ready(place, tmp_path / "refused", "--precision", "tf32")
    assert not (tmp_path / "refused").exists()
