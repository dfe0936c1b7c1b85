"""What raw downloads share: members of .zip files, hidden and missing files, and limits on what is read at once."""

import lzma
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from dataset.reading import DataError

LARGE = 100 << 20  # bytes from which a member of a .zip must not unpack to more than
MOST_RATIO = 100  # times what it weighs; the owners' JSON and XML unpack to 5 to 20 times


# What zipfile raises at a broken archive.
BROKEN_ZIP = (OSError, EOFError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def is_hidden(name: str) -> bool:
    """Whether a path's file or any folder of it is hidden or macOS's own: `._7.xml`, `.git/x`, `__MACOSX/7.xml`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def visible_members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files of an archive that are not hidden."""
    return [info for info in archive.infolist() if not info.is_dir() and not is_hidden(info.filename)]


def check_ratio(path: Path, info: zipfile.ZipInfo) -> None:
    """Raise `DataError` for a member that unpacks to far more than it weighs. Reading stops at the size it states."""
    if info.file_size > LARGE and info.file_size > MOST_RATIO * info.compress_size:
        raise DataError(
            f"{path} ({info.filename}): unpacks from {info.compress_size:,} bytes to {info.file_size:,}, more than "
            f"{MOST_RATIO} times as much; it is not read: download it anew, or unpack it yourself if you trust it"
        )


def require_file(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise DataError(f"{path}: does not exist; {remedy}")
