"""A student to give away: a folder in the layout of the Hugging Face hub, here or on the hub (docs/sharing.md).

It holds model.safetensors, config.json, a vocabulary and a model card. Only tensors, JSON and texts are read from it,
no code. A folder of transformers' BLIP is read in the same way; older ones have their weights in pytorch_model.bin.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import utils
from dataset.text import VOCABULARY_FILES
from system.errors import describe_os_error

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
TORCH_WEIGHTS = "pytorch_model.bin"
PREPROCESSING = "preprocessor_config.json"  # of transformers: among other things, the normalisation of images
FILES = (WEIGHTS, CONFIG, CARD, PREPROCESSING, *VOCABULARY_FILES)
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
TENSOR_FILES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


class StudentError(utils.UserError):
    """A folder of a student that cannot be written, or not be had from the hub."""


def _weights_in(folder: Path) -> Path:
    return next((folder / name for name in (WEIGHTS, TORCH_WEIGHTS) if (folder / name).is_file()), folder / WEIGHTS)


def lacking(folder: Path) -> list[str]:
    """Which of the two files that make a folder a student's are not there."""
    return [path.name for path in (_weights_in(folder), folder / CONFIG) if not path.is_file()]


def is_student(path: Path) -> bool:
    return path.is_dir() and not lacking(path)


def weights_of(path: Path) -> Path:
    """The file that holds a checkpoint's weights: the checkpoint itself, or one in a student's folder."""
    return _weights_in(path) if is_student(path) else path


def own_text_encoder(path: Path) -> str | None:
    """The vocabulary of a checkpoint in the words of --text_encoder; None where it brings none."""
    return str(path) if is_student(path) else None


def local_checkpoint(checkpoint: str | Path) -> Path:
    """The local path of a --checkpoint: itself, or the folder that a name on the hub is downloaded to.

    A name on the hub is OWNER/NAME or OWNER/NAME@REVISION: one that is no local path, does not end as files of
    tensors do, and whose OWNER is no local folder. Only `FILES` are downloaded, and
    `TORCH_WEIGHTS` where the weights are not among them.

    Raises:
        StudentError: the hub cannot be reached, has no such repository, or it holds no student.
    """
    path, name = Path(checkpoint), HUB_NAME.fullmatch(str(checkpoint))
    if name is None or path.suffix in TENSOR_FILES or os.path.exists(path) or path.parent.is_dir():
        return path
    import huggingface_hub  # takes a second
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if utils.rank():
        disable_progress_bars()
    told = f"--checkpoint {checkpoint}: no such local file or folder, and as a name on the Hugging Face hub:"
    try:
        for files in (FILES, (*FILES, TORCH_WEIGHTS)):
            folder = Path(huggingface_hub.snapshot_download(name[1], revision=name[2], allow_patterns=list(files)))
            if WEIGHTS not in lacking(folder):
                break
    except errors.GatedRepoError as error:
        raise StudentError(f"{told} its owner grants access on request; log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise StudentError(f"{told} {name[1]} has no revision {name[2] or 'main'}") from error
    except errors.RepositoryNotFoundError as error:
        raise StudentError(
            f"{told} there is no such repository, or it is private (then log in with `hf auth login`)"
        ) from error
    except Exception as error:  # of the network's library, which differs from version to version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StudentError(
            f"{told} it can be neither downloaded nor found in the local cache ({reason:.200}); check the network, or "
            "pass a folder that was downloaded elsewhere"
        ) from error
    if missing := lacking(folder):
        raise StudentError(f"{told} it holds no {' and no '.join(missing)}; export.py writes such folders")
    return folder


def check_free(out: Path, force: bool) -> None:
    """Raise `StudentError` unless a student's folder may be written at `out`: nothing is there, or only another one."""
    if not os.path.lexists(out):
        return
    strange = sorted(path.name for path in out.iterdir() if path.name not in FILES) if out.is_dir() else []
    if not is_student(out) or strange:
        what = f"holds {', '.join(strange[:3])} as well" if strange else "is no folder that export.py wrote"
        raise StudentError(f"{out}: exists and {what}; choose another OUT")
    if not force:
        raise StudentError(f"{out}: exists; choose another OUT, or replace it by --force")


def write_student(
    out: Path, state: dict[str, Tensor], config: str, vocabulary: Path, card: str, force: bool = False
) -> None:
    """Write a student's folder: beside `out` first, then renamed, so that no one sees half of it.

    Args:
        config: the text of config.json, of `model_sizes.student_json`.
        vocabulary: vocab.txt or tokenizer.json, which is copied.
        card: the text of README.md.
        force: replace a folder that is there.

    Raises:
        UserError: it cannot be written; what was there stays.
    """
    out = Path(os.path.realpath(out))
    check_free(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as place:
            made = Path(place, "made")
            made.mkdir()
            _save_weights(made / WEIGHTS, state)
            utils.write_text(made / CONFIG, config)
            utils.write_text(made / CARD, card)
            shutil.copyfile(vocabulary, made / vocabulary.name)
            shutil.copymode(made / CARD, made / WEIGHTS)  # safetensors lets no one else read it
            for file in made.iterdir():
                with file.open("rb+") as written:
                    os.fsync(written.fileno())  # before the name is given
            before = Path(place, "before")
            if out.exists():
                out.rename(before)
            try:
                made.rename(out)
            except OSError:
                if before.exists():
                    before.rename(out)
                raise
    except OSError as error:
        raise StudentError(describe_os_error(error, out)) from error


def _save_weights(path: Path, state: dict[str, Tensor]) -> None:
    try:
        with utils.atomic_path(path) as temporary:
            save_file(state, temporary, {"format": "pt"})
    except SafetensorError as error:  # it has its own words for what the system says
        raise StudentError(f"{path}: cannot be written ({error}); {_bytes(state):,} bytes are needed") from error


def _bytes(state: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())
