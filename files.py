"""Files that nobody vouches for: no code of theirs runs, and no damage is taken for content.

Texts (`decode_text`, `parse_json`), what torch.save or safetensors wrote (`load_tensors`, `save_tensors`), and a hash
of any file's content (`file_digest`).
"""

import codecs
import concurrent.futures
import hashlib
import itertools
import json
import os
import pickle
import pickletools
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from utils import atomic_path

BLOCK = 2**24  # bytes of a file that one thread reads at a time

# What is found under the name of a checkpoint, by its first bytes.
OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer: `git lfs pull` fetches the file itself",
    b"<": "a web page",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras writes them",
    b"\x93NUMPY": "a NumPy array",
}


class UnreadableFile(ValueError):
    """A file of tensors that is damaged, of another kind, or holds more than tensors; the message is one line."""


# ---- texts


def decode_text(data: bytes) -> str:
    """The text of a user's file: UTF-8, or UTF-16 with a byte-order mark; the mark is dropped, CRLF becomes a newline.

    Raises:
        ValueError: it is something else; says what.
    """
    if data.startswith(b"\x1f\x8b"):
        raise ValueError("it is compressed by gzip: unpack it first, with gunzip")
    if data.startswith(b"PK\x03\x04"):
        raise ValueError("it is a zip archive: unpack it first")
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if utf16 else "utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds NUL characters: a binary file, or text that is not UTF-8")
    return text.replace("\r\n", "\n")


class RepeatedKey(ValueError):
    """A key, the error's only argument, that stands more than once in a JSON object."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's keys and values as a dict, for `object_pairs_hook`; raises `RepeatedKey`."""
    row = dict(pairs)
    if len(row) != len(pairs):
        raise RepeatedKey(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return row


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is no JSON.
        ValueError: it is JSON that cannot be used, for instance with a key twice in an object; says why.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[error.pos] in "{[":
            raise ValueError(
                "holds JSON lines, one value each; make one list of them, say with: jq -s . FILE"
            ) from None
        raise
    except (RecursionError, ValueError) as error:
        raise ValueError(why_unusable(error)) from None


def why_unusable(error: Exception) -> str:
    """What is wrong with JSON that cannot be used."""
    if isinstance(error, RepeatedKey):
        return f"an object holds the key {error.args[0]!r:.80} more than once, so that all but one would be lost"
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    return "an integer has thousands of digits"


# ---- tensors


def save_tensors(path: str | Path, content: Any) -> None:
    """`torch.save`, atomically: the same content gives the same bytes, in whatever process and under whatever name.

    Raises:
        UserError: it cannot be written; no file is left.
    """
    with atomic_path(path, needed=_bytes_of(content)) as temporary, temporary.open("wb") as file:
        try:
            # Given a path, it would write the file's name into the archive.
            torch.save(_one_object_each(content), file)
            file.flush()
            os.fsync(file.fileno())  # before the name is given: a crash of the machine must not leave a half file
        except RuntimeError as error:  # of its own, raised while that of the file system is on its way
            cause = error.__context__
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise


def _bytes_of(value: Any) -> int:
    """What the tensors in plain containers take in a file, at most."""
    if isinstance(value, Tensor):
        return value.nbytes
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes_of, inside))


def _one_object_each(value: Any) -> Any:
    """Plain containers copied, their equal texts one object: a pickle tells two equal objects from one met twice."""
    if type(value) is dict:
        return {_one_object_each(key): _one_object_each(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_one_object_each, value))
    return sys.intern(value) if type(value) is str else value


def load_tensors(path: str | Path, mapped: bool = True) -> Any:
    """What `torch.save` or safetensors wrote, onto the CPU; runs no code from the file, and verifies its checksums.

    Args:
        mapped: leave tensors in the file until they are used: spares memory, but who keeps one must clone it, since
            the process dies by a bus error once another overwrites the file.

    Raises:
        OSError: it cannot be opened.
        UnreadableFile: it can be, and is not such a file, or a damaged one.
    """
    with open(path, "rb") as file:
        head = file.read(32)
    if other := next((what for start, what in OTHER_FILES.items() if head.startswith(start)), None):
        raise UnreadableFile(other)
    zipped = head.startswith(b"PK")
    if zipped:
        verify_archive(path)
    try:
        if head[8:9] == b"{" or Path(path).suffix == ".safetensors":
            return load_file(path)
        if not zipped:
            if tarfile.is_tarfile(path):
                raise ValueError("a .tar archive")  # PyTorch before 2.6 unpacks its early format (CVE-2025-32434)
            _check_names(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and mapped)
    except Exception as error:  # what a damaged file makes these readers raise is no closed list
        raise UnreadableFile(why_unreadable(error)) from error


def _check_names(path: str | Path) -> None:
    """Raise `UnreadableFile` where the pickles of PyTorch's old format are malformed, or hold a name without end.

    PyTorch would refuse them as well, but search its own message about a name of megabytes for hours.
    """
    try:
        with open(path, "rb") as file:
            for _ in range(4):  # magic number, version, system, content
                if any(code.name == "GLOBAL" and len(name or "") > 1000 for code, name, _ in pickletools.genops(file)):
                    raise ValueError("a name without end")
    except ValueError as error:
        raise UnreadableFile("not a file that PyTorch writes") from error


def why_unreadable(error: BaseException) -> str:
    """A reader's own words, in one line; not PyTorch's advice to read unsafely what it cannot read safely."""
    if isinstance(error, pickle.UnpicklingError):
        return "not a file that PyTorch writes"
    text = str(error).split("\n")[0]
    speaks = text and isinstance(error, RuntimeError | ValueError | OSError | SafetensorError)
    return text if speaks else f"{type(error).__name__} {text}".rstrip()


def verify_archive(path: str | Path) -> None:
    """Check the zip archive of `torch.save`: what it holds, and the CRC-32 of every record.

    An archive saved without checksums has 0 in place of all of them, and there is nothing to compare.

    Raises:
        UnreadableFile: damaged, a TorchScript program (PyTorch before 2.6 runs them: CVE-2025-32434), or not an archive
            that `torch.save` writes: it compresses nothing, so that a file cannot unpack to more than it weighs.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile has no closed list either
        raise UnreadableFile("a zip archive that is cut off or damaged") from error
    with archive:
        records = archive.infolist()
        names = [Path(record.filename).name for record in records]
        if "constants.pkl" in names:
            raise UnreadableFile("a TorchScript program")
        if "data.pkl" not in names:
            raise UnreadableFile(f"a zip archive of other files ({', '.join(names[:3])!a}): unpack it first")
        if packed := [record for record in records if record.compress_type != zipfile.ZIP_STORED]:
            raise UnreadableFile(f"its record {packed[0].filename!a} is compressed: PyTorch does not write such files")
        summed = any(record.CRC for record in records)

    def damaged(part: list[zipfile.ZipInfo]) -> list[str]:
        """The damaged records of a part; opens the archive anew, which threads cannot share (Python 3.12, 3.13)."""
        found = []
        with zipfile.ZipFile(path) as own:
            for record in part:
                try:
                    with own.open(record) as stream:  # compares the two places that hold its name
                        while summed and stream.read(BLOCK):
                            pass
                except Exception:  # a wrong checksum, or a header that makes no sense
                    found.append(record.filename)
        return found

    threads = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        parts = (records[first::threads] for first in range(threads))
        found = list(itertools.chain.from_iterable(pool.map(damaged, parts)))
    if found:
        raise UnreadableFile(f"damaged: the checksum of its record {found[0]!a} does not match")


def file_digest(path: str | Path) -> str:
    """A hash of a file's content: SHA-256 of the SHA-256 of its blocks, which threads share."""

    def digest(start: int) -> bytes:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            return hashlib.sha256(file.read(BLOCK)).digest()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = b"".join(pool.map(digest, range(0, os.path.getsize(path), BLOCK)))
    return hashlib.sha256(digests).hexdigest()
