"""Errors of the system and of libraries in plain words: no space, no memory, no permission, no process group.

`utils.run` asks here what a program ended by; what is not known here is a fault of ours and keeps its traceback.
"""

import errno
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "your quota is used up",
    errno.EFBIG: "files may not be that large",
}
REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENAMETOOLONG: "shorten the name",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or lower --num_workers",
}
# What PyTorch says where Python would raise MemoryError, and torch.OutOfMemoryError for a GPU.
OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|can't allocate memory|not enough memory|Failed to allocate|CUDNN_STATUS_ALLOC_FAILED", re.I
)
LESS_MEMORY = {  # option of the program -> what to do with it
    "accum_steps": "a smaller --set batch_size=N with more --accum_steps, which keeps the samples of a step",
    "grad_checkpointing": "--grad_checkpointing",
    "precision": "--precision bf16",
    "num_workers": "fewer --num_workers",
}


def explain(error: BaseException, options: Mapping[str, Any]) -> str | None:
    """What the user can put right, in one message; None where `error` is not of the system.

    Args:
        options: of the program, by name: which of them there are decides what is advised.
    """
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return _out_of_memory(error, options)
    if isinstance(error, dist.DistError):
        reason = str(error).splitlines()[0]
        return f"the processes cannot reach each other ({reason}); see the messages of the others, if there are any"
    if isinstance(error, OSError) and error.errno is not None and (error.filename or error.errno in FULL):
        return describe_os_error(error)
    return None


def describe_os_error(error: OSError, path: str | Path | None = None, needed: int | None = None) -> str:
    """An error of reading or writing a file: its name, the reason, the remedy; sizes where the disk is full.

    Args:
        path: of the file; None: as the error says.
        needed: bytes that were to be written, if that is known.
    """
    name = path or error.filename
    what = f"{name}: " if name else ""
    if error.errno not in FULL:
        remedy = REMEDIES.get(error.errno or 0)
        return f"{what}{error.strerror or error}" + (f"; {remedy}" if remedy else "")
    sizes = [f"{megabytes(needed)} are needed"] if needed is not None else []
    above = Path(name).absolute().parents if name else ()
    if folder := next((folder for folder in above if folder.is_dir()), None):  # the nearest that exists
        sizes.append(f"{megabytes(shutil.disk_usage(folder).free)} are free in {folder}")
    return (
        f"{what}cannot be written, {FULL[error.errno]} ({', '.join(sizes) or error.strerror}); make room and try again"
    )


def megabytes(count: int) -> str:
    """A number of bytes, for people."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _out_of_memory(error: BaseException, options: Mapping[str, Any]) -> str:
    on_gpu = "CUDA" in str(error) or "CUDNN" in str(error)
    asked = re.search(r"tr(?:ied|ying) to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    advice = [
        LESS_MEMORY[option] for option in options if option in LESS_MEMORY and not (on_gpu and option == "num_workers")
    ]
    if "accum_steps" not in options:
        advice.insert(0, "a smaller --set batch_size=N" if "num_workers" in options else "smaller files or images")
    full = f"{'the GPU' if on_gpu else 'this machine'} is out of memory"
    return full + (f" ({asked[1]} more were asked for)" if asked else "") + f"; try {', '.join(advice)}"
