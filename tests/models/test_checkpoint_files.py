"""Checkpoint files as people have them: damaged, hostile, of other kinds; and byte-equal ones of our own."""

import argparse
import copy
import gzip
import hashlib
import os
import pickle
import re
import shutil
import tarfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import files
from dataset.expressions import Expression
from grounding.load import ready
from grounding.results import ResultFolder
from models.albef import ALBEF
from models.checkpoint import CheckpointError, diverged, load_weights, read_checkpoint
from models.pretrain import PretrainModel
from tests.models.states import Payload, assert_holds, data_offset, flip, load, state_of
from tests.training_runs import make_workplace, train

TinyConfig = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- reading


def write_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def write_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def write_safetensors(content: Any, path: Path) -> None:
    save_file(content["model"], path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_zip, r"refused, .*\.mkdir\)$"),
        (write_legacy, r"refused, .*\.mkdir\)$"),
        (write_pickle, r"not a readable checkpoint \(not a file that PyTorch writes\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_function_call_in_a_checkpoint_is_refused_and_not_made(
    tmp_path: Path, write: Callable[[Any, Path], None], message: str
) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    write({"model": {"temp": torch.ones(())}, "epoch": Payload(marker)}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pth: " + message) as error:
        read_checkpoint(path)
    assert "weights_only" not in str(error.value)  # PyTorch's message advises to read it unsafely
    assert not marker.exists()
    # The file is what it claims to be: an unsafe reader makes the call.
    if write is write_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def write_torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


@pytest.mark.parametrize(
    ("write", "what"), [(write_torchscript, "a TorchScript program"), (write_tar, r"a \.tar archive")]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_programs_and_early_formats_never_reach_torch_load(
    write: Callable[[Path], None], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch before 2.6 runs the first and unpacks the second, weights_only or not."""
    path = tmp_path / "ALBEF.pth"
    write(path)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("torch.load was called"))
    with pytest.raises(CheckpointError, match=rf"ALBEF\.pth: not a readable checkpoint \({what}\)"):
        read_checkpoint(path)


def test_other_objects_in_a_checkpoint_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, tmp_path / "args.pth")
    with pytest.raises(CheckpointError, match=r"args\.pth: refused.*\(argparse\.Namespace\)$"):
        read_checkpoint(tmp_path / "args.pth")


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_checkpoint_reads_back(tmp_path: Path, write: Callable[[Any, Path], None]) -> None:
    path = tmp_path / "good.pth"
    content = {"model": {"a": torch.arange(3.0)}, "epoch": 4, "config": {"lr": [1e-5]}, "optimizer": {"state": {}}}
    write(content, path)
    found = read_checkpoint(path)
    assert torch.equal(found.pop("model")["a"], torch.arange(3.0))
    assert found == {"epoch": 4, "config": {"lr": [1e-5]}, "optimizer": {"state": {}}}


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_safetensors])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_checkpoint(tmp_path: Path, write: Callable[[Any, Path], None], share: float) -> None:
    path = tmp_path / f"cut.{'safetensors' if write is write_safetensors else 'pth'}"
    write({"model": {"a": torch.ones(2000)}}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.\w+: not a readable checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "more"),
    [("none.pth", ""), ("none.safetensors", ""), (".", r" \(it is a folder: give a file; as a student")],
)
def test_missing_checkpoint(tmp_path: Path, name: str, more: str) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint" + more):
        read_checkpoint(tmp_path / name)


def ring() -> dict[str, Any]:
    """A checkpoint that holds itself."""
    content: dict[str, Any] = {}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    "content",
    [
        {"epoch": 1},
        {},
        {"model": {}},
        {"model": torch.ones(2)},
        {"model": {"a": 1}},
        [torch.ones(2)],
        torch.ones(2),
        ring(),
    ],
)
def test_checkpoint_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth: no state dict found"):
        read_checkpoint(tmp_path / "odd.pth")


def test_safetensors_by_another_name(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "weights.pth")
    assert read_checkpoint(tmp_path / "weights.pth")["model"]["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"config": "{"}, {"config": "[" * 9999}])
def test_metadata_without_a_config_is_passed_over(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"temp": torch.ones(())}, tmp_path / "x.safetensors", metadata)
    assert read_checkpoint(tmp_path / "x.safetensors").keys() == {"model"}


# ---- checksums


@pytest.fixture
def without_checksums() -> Iterator[None]:
    switch = getattr(torch.serialization, "set_crc32_options", None)
    if switch is None:
        pytest.skip("this version of PyTorch always writes checksums")
    switch(False)
    yield
    switch(True)


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/2", "byteorder", "version"])
def test_a_flipped_bit_names_file_and_record(tmp_path: Path, record: str) -> None:
    path = tmp_path / "flipped.pth"
    torch.save({"model": {name: torch.ones(100) for name in "abc"}}, path)
    flip(path, data_offset(path, f"flipped/{record}"))
    expected = rf"flipped\.pth: not a readable checkpoint \(damaged: the checksum of its record 'flipped/{record}'"
    with pytest.raises(CheckpointError, match=expected):
        read_checkpoint(path)


def test_no_flipped_bit_changes_a_number(tmp_path: Path) -> None:
    """Wherever it is: in weights, tables, names or padding."""
    path, model = tmp_path / "flipped.pth", {name: torch.arange(8.0) + i for i, name in enumerate("abcd")}
    files.save_tensors(path, {"model": model})
    whole, refused = path.read_bytes(), 0
    for at in range(0, len(whole), 13):
        flip(path, at, at % 8)
        try:
            assert all(torch.equal(value, model[key]) for key, value in read_checkpoint(path)["model"].items())
        except CheckpointError:
            refused += 1
        path.write_bytes(whole)
    assert refused > len(whole) / 13 / 3


def test_no_two_threads_share_an_open_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on, zipfile then reads one record's bytes as another's: intact files were refused as damaged."""
    torch.save([torch.randn(20) for _ in range(300)], tmp_path / "many.pth")
    threads: dict[int, set[int]] = {}
    kept = []

    class Watched(zipfile.ZipFile):
        def open(self, *args: Any, **keys: Any) -> Any:
            kept.append(self)  # or the next may have its id
            threads.setdefault(id(self), set()).add(threading.get_ident())
            return super().open(*args, **keys)

    monkeypatch.setattr(zipfile, "ZipFile", Watched)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    files.verify_archive(tmp_path / "many.pth")
    assert len(threads) == 4
    assert all(len(found) == 1 for found in threads.values())


@pytest.mark.usefixtures("without_checksums")
def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.arange(3.0)}}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as archive:
        assert {record.CRC for record in archive.infolist()} == {0}
    assert read_checkpoint(tmp_path / "plain.pth")["model"]["a"].tolist() == [0, 1, 2]


def test_one_checksum_of_zero_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "zero.pth"
    torch.save({"model": {"a": torch.arange(3.0)}}, path)
    with zipfile.ZipFile(path) as archive:
        record = archive.getinfo("zero/data/0")
    data, checksum = path.read_bytes(), record.CRC.to_bytes(4, "little")
    assert data.count(checksum) >= 2  # beside the record, and in the table at the end
    path.write_bytes(data.replace(checksum, bytes(4)))
    with pytest.raises(CheckpointError, match="'zero/data/0'"):
        read_checkpoint(path)


# ---- other files


def repacked(path: Path) -> None:
    """A checkpoint of 8 MB that weighs 20 KB, as an archiver leaves it."""
    torch.save({"model": {"a": torch.zeros(2_000_000)}}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def zipped_checkpoint(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ALBEF.pth", b"")


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))


OTHER_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "repacked": (repacked, "its record 'repacked/data.pkl' is compressed"),
    "zipped": (zipped_checkpoint, r"a zip archive of other files \('ALBEF.pth'\): unpack it first"),
    "npz": (npz, "a zip archive of other files"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 100)), "a gzip archive: unpack it first"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "a Git LFS pointer"),
    "page": (lambda path: path.write_text("<html>Quota exceeded</html>"), "a web page"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "text": (lambda path: path.write_text("hello"), "not a readable checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable checkpoint"),
    "huge": (lambda path: path.write_bytes(b"\x80\x02\x8a\xff" + b"\xff" * 99), "not a readable checkpoint"),
    "sizes": (lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{" * 99), "[Hh]eader ?[Tt]oo ?[Ll]arge"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_named(tmp_path: Path, name: str) -> None:
    write, message = OTHER_FILES[name]
    path = tmp_path / f"{name}.pth"
    write(path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: not a readable checkpoint (")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [KeyError("1"), AssertionError(), MemoryError()])
def test_whatever_pytorch_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "odd.pth")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match=rf"odd\.pth: not a readable checkpoint \({type(error).__name__}"):
        read_checkpoint(tmp_path / "odd.pth")


@pytest.mark.parametrize("letter", [b"\0", b"x", b"\xff"])
def test_a_name_of_a_million_characters_in_the_old_format(tmp_path: Path, letter: bytes) -> None:
    """PyTorch searches its message about the name with a pattern whose time grows with the square of it."""
    path = tmp_path / "old.pth"
    torch.save({"model": OrderedDict(a=torch.ones(2))}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"ccollections\n", b"c" + letter * 10**6 + b"\n"))
    with pytest.raises(CheckpointError, match=r"not a readable checkpoint \(not a file that PyTorch writes\)"):
        read_checkpoint(path)


# ---- odd content


ODD_WEIGHTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a number": (lambda: 3, "'temp' in its state dict is of type int, not a tensor"),
    "a list": (lambda: [1], "'temp' in its state dict is of type list"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "'temp' .* a cpu sparse_coo tensor"),
    "compressed": (lambda: torch.eye(2).to_sparse_csr(), "'temp' .* a cpu sparse_csr tensor"),
    "meta": (lambda: torch.zeros(3, device="meta"), "'temp' .* a meta strided tensor"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "'temp' .* a quantized tensor",
    ),
    "expanded": (
        lambda: torch.zeros(1).expand(10**9, 10**9),
        r"'temp' .* larger than the file: its shape is \[1000000000, ",
    ),
    "integers": (lambda: torch.tensor(3), "of another type: temp is torch.int64, the model has torch.float32"),
    "complex": (lambda: torch.tensor(1j), "of another type: temp is torch.complex64"),
    "empty": (lambda: torch.zeros(0), r"of another shape: temp is \[0\], the model has \[\]"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of sparse and quantized tensors
@pytest.mark.parametrize("what", ODD_WEIGHTS)
def test_a_weight_that_is_none(tmp_path: Path, evaluation: ALBEF, what: str) -> None:
    make, message = ODD_WEIGHTS[what]
    torch.save({"model": state_of(evaluation) | {"temp": make()}}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd\.pth: (does not fit .*\n  )?{message}"):
        load(evaluation, tmp_path / "odd.pth")


@pytest.mark.parametrize("key", [1, None, b"temp", (1, "a")])
def test_a_key_that_is_no_text(tmp_path: Path, evaluation: ALBEF, key: Any) -> None:
    torch.save({"model": state_of(evaluation) | {key: torch.ones(1)}}, tmp_path / "odd.pth")
    # PyTorch 2.4 does not even read bytes.
    message = rf"({re.escape(repr(key))} in its state dict is a key that is |refused, .* \(_codecs\.encode\))"
    with pytest.raises(CheckpointError, match=rf"odd\.pth: {message}"):
        read_checkpoint(tmp_path / "odd.pth")


# ---- what stays mapped


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_loaded_model_does_not_hold_on_to_its_file(
    tmp_path: Path, evaluation: ALBEF, training: PretrainModel, suffix: str
) -> None:
    path, state = tmp_path / f"weights.{suffix}", state_of(training)
    save_file({k: v.clone() for k, v in state.items()}, path) if suffix == "safetensors" else torch.save(state, path)
    for model in (evaluation, training):
        ready(model, read_checkpoint(path), path, torch.device("cpu"))  # type: ignore[arg-type]
        assert str(path) not in mapped_files()
    path.write_bytes(b"")  # in place: a mapping would now end the process
    assert diverged(training.state_dict()) is None


def test_results_are_no_mapping(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path)
    expressions = [Expression(Path("x.jpg"), "x", 0, "val", np.ones((1, 4)))]
    folder.write("00", expressions, [torch.arange(4.0)[None]], {})
    found = folder.read("00", expressions)
    assert str(tmp_path) not in mapped_files()
    folder.path("00").write_bytes(b"")
    assert found is not None
    assert found[0] is not None
    assert found[0].tolist() == [[0, 1, 2, 3]]


# ---- writing


def test_saved_checkpoint_reads_back_into_a_model(tmp_path: Path, tiny_config: TinyConfig) -> None:
    first, second = PretrainModel(tiny_config()), PretrainModel(tiny_config())
    path = tmp_path / "new folder" / "checkpoint_00.pth"
    files.save_tensors(path, {"model": first.state_dict(), "epoch": 0})
    report = load_weights(second, read_checkpoint(path)["model"], path)
    assert_holds(second, first.state_dict())
    assert report.loaded == len(first.state_dict())
    assert str(report) == f"{path}: {report.loaded} tensors loaded"  # and nothing more to say
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint_00.pth"]


def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint_00.pth"
    files.save_tensors(path, {"model": {"a": torch.ones(1)}, "epoch": 7})
    before = path.read_bytes()

    def full_disk(content: Any, file: IO[bytes]) -> None:
        file.write(b"half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        files.save_tensors(path, {"model": {"a": torch.zeros(1)}, "epoch": 8})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_00.pth"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_equal_content_gives_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"model": {"a": torch.arange(5.0), "b": torch.ones(2)}, "epoch": 1}
    files.save_tensors(tmp_path / "one.pth", content)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    files.save_tensors(tmp_path / "folder" / "another.name", copy.deepcopy(content))
    assert sha256(tmp_path / "one.pth") == sha256(tmp_path / "folder" / "another.name")
    content["model"]["a"][0] = 1
    files.save_tensors(tmp_path / "other.pth", content)
    assert sha256(tmp_path / "one.pth") != sha256(tmp_path / "other.pth")


def test_the_same_training_twice_leaves_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, names = make_workplace(tmp_path), ["checkpoint_00.pth", "checkpoint_01.pth"]
    first, second, resumed = tmp_path / "first", tmp_path / "second run", tmp_path / "resumed"
    options = ("batch_size=16", "--max_steps", "5")
    train(place, first, *options)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    train(place, second, *options)
    assert [sha256(first / name) for name in names] == [sha256(second / name) for name in names]
    shutil.copytree(first, resumed)
    (resumed / names[1]).unlink()
    train(place, resumed, *options, "--resume")
    assert sha256(first / names[1]) == sha256(resumed / names[1])


def test_digest_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 10)
    path, seen = tmp_path / "file", set()
    for data in (b"", b"a", b"a" * 9, b"a" * 10, b"a" * 11, b"a" * 20, b"a" * 10 + b"b" * 10, b"b" * 10 + b"a" * 10):
        path.write_bytes(data)
        seen.add(files.file_digest(path))
    assert len(seen) == 8
    (tmp_path / "copy").write_bytes(path.read_bytes())
    assert files.file_digest(tmp_path / "copy") == files.file_digest(path)
