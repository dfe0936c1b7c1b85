"""One reader of image files for photographs and data sets: formats, modes, sizes, damage; and where images may lie."""

import importlib
import json
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

import dataset.images
from config import PretrainConfig
from dataset.expressions import EntryProblem, Problems, check_images, locate
from dataset.flickr import load_ids
from dataset.images import LONGEST_SIDE
from dataset.own import load_pairs
from dataset.photos import read_photo
from dataset.raw.check_images import inspect_image
from dataset.raw.flickr_entities import load_splits
from dataset.reading import DataError, image_size, read_image
from dataset.vg import load_entries


def scene(size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A picture in which every column and row differs."""
    columns, rows = np.arange(size[0]) * 255 // size[0], np.arange(size[1]) * 255 // size[1]
    red, green = np.broadcast_to(columns, size[::-1]), np.broadcast_to(rows[:, None], size[::-1])
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1).astype(np.uint8))


def pixels(path: Path) -> np.ndarray:
    """What both readers make of an image; they agree."""
    found = np.asarray(read_image(path, "entry 0"))
    assert found.shape[2:] == (3,)
    assert found.dtype == np.uint8
    assert (found == np.asarray(read_photo(path))).all()
    return found


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colours: int, data: bytes, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# ---- modes


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp", "webp"])
def test_ordinary_images_are_as_pillow_converts_them(mode: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    try:
        scene().convert(mode).save(path)
    except (OSError, ValueError):
        pytest.skip("the format has no such mode")
    with Image.open(path) as image:
        assert (pixels(path) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "palette.png", "a.gif", "grey.png", "grey16.png"])
def test_colours_under_transparency_are_hidden(name: str, tmp_path: Path) -> None:
    """The left half is transparent, and magenta, or grey, below."""
    image = Image.new("RGBA", (8, 4), (0, 128, 0, 255))
    image.paste((255, 0, 255, 0), (0, 0, 4, 4))
    expected = np.full((4, 8, 3), 255)
    expected[:, 4:] = (0, 128, 0)
    path, options = tmp_path / name, {"lossless": True} if name == "a.webp" else {}
    if name in ("palette.png", "a.gif"):
        image = Image.new("P", (8, 4), 1)
        image.putpalette([255, 0, 255, 0, 128, 0])
        image.paste(0, (0, 0, 4, 4))
        options = {"transparency": 0}
    elif name == "grey.png":
        image, expected[:, 4:] = image.convert("LA"), 75
    if name == "grey16.png":  # one of the 16-bit greys stands for transparent
        row = b"\0" + struct.pack(">8H", *[500] * 4, *[257 * 90] * 4)
        path.write_bytes(png(8, 4, 16, 0, row * 4, chunk(b"tRNS", struct.pack(">H", 500))))
        expected[:, 4:] = 90
    else:
        image.save(path, **options)
    assert (pixels(path) == expected).all()


GREY = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(3, axis=0)
DEEP = {
    "a.png": GREY.astype(np.uint16) * 257,
    "a.tif": GREY.astype(np.uint16) * 257,
    "big-endian.tif": GREY.astype(">u2") * 257,
    "a.pgm": GREY.astype(np.uint16) * 257,
    "unit.tif": (GREY / 255).astype(np.float32),
    "two-bytes-in-floats.tif": GREY.astype(np.float32) * 257,
    "a.pfm": GREY.astype(np.float32),
    "bytes.tif": GREY.astype(np.int32),
    "two-bytes.tif": GREY.astype(np.int32) * 257,
    "four-bytes.tif": GREY.astype(np.int32) * 8_000_000,
    "large.tif": GREY.astype(np.float32) * 1e30,
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_greys_are_scaled(name: str, tmp_path: Path) -> None:
    try:
        Image.fromarray(DEEP[name]).save(tmp_path / name)
    except (OSError, ValueError) as error:
        pytest.skip(f"this Pillow does not write it: {error}")
    assert np.abs(pixels(tmp_path / name) - GREY[..., None].astype(int)).max() <= 1


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, -1.0, -9999.0])
def test_what_is_no_measure_is_black(odd: float, tmp_path: Path) -> None:
    """Depth cameras and the like mark the pixels that they know nothing of; the others are as ever."""
    values = (GREY / 255).astype(np.float32)
    values[0, -5:] = odd
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = GREY.copy()
    expected[0, -5:] = 0
    assert (pixels(tmp_path / "a.tif") == expected[..., None]).all()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.avif"])
def test_the_first_picture_counts(name: str, tmp_path: Path) -> None:
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    red.save(tmp_path / name, save_all=True, append_images=[blue])
    assert np.abs(pixels(tmp_path / name) - np.array([255, 0, 0])).max() < 4


# ---- formats


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX", "SGI", "IM", "DDS", "PDF"])
def test_other_formats_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the name says: only the formats of the field are opened, and none that starts a program."""
    started: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: started.append(args))
    path = tmp_path / "a.jpg"
    scene().save(path, format=kind)
    for read in readers(path):
        with pytest.raises(DataError, match=r"a\.jpg.*\bnot an image, or of another kind than JPEG, .*PPM"):
            read()
    assert str(inspect_image((path, True)).problem).startswith("not an image")
    assert not started


def readers(path: Path) -> list[Callable[[], object]]:
    return [lambda: read_image(path, "entry 7"), lambda: read_photo(path), lambda: image_size(path)]


# ---- sizes


def test_a_side_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for size in ((1, LONGEST_SIDE), (LONGEST_SIDE, 1)):
        Image.new("RGB", size).save(path)
        assert read_image(path, "").size == size
    for width, height in ((1, 39_000_000), (1, LONGEST_SIDE + 1), (LONGEST_SIDE + 1, 2)):
        path.write_bytes(png(width, height, 8, 2, b""))
        for read in readers(path):
            with pytest.raises(DataError, match=rf"\({width} x {height} pixels, and sides of at most 65535 are read\)"):
                read()
        assert "sides of at most" in str(inspect_image((path, False)).problem)


def test_pixels_have_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(20_000, 20_000, 8, 2, b""))
    for read in readers(path):
        with pytest.raises(DataError, match=r"a\.png.* cannot be decoded \(Image size .*; make (it|the image) smaller"):
            read()
    path.write_bytes(png(13_000, 13_000, 8, 2, b""))  # 169 megapixels
    assert image_size(path) == (13_000, 13_000)


def test_pillow_does_not_warn_of_each_image(tmp_path: Path) -> None:
    """Loaders would say so thousands of times: large images, odd palettes, broken metadata."""
    (tmp_path / "large.png").write_bytes(png(10_000, 10_000, 8, 2, b""))
    palette = chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", bytes(2))
    (tmp_path / "palette.png").write_bytes(png(2, 1, 8, 3, bytes([0, 0, 1]), palette))
    scene().save(tmp_path / "a.tif")
    cut = (tmp_path / "a.tif").read_bytes().replace(struct.pack("<HHI", 282, 5, 1), struct.pack("<HHI", 282, 5, 9))
    (tmp_path / "a.tif").write_bytes(cut)
    with warnings.catch_warnings(record=True) as raised:
        warnings.resetwarnings()
        importlib.reload(dataset.images)
        image_size(tmp_path / "large.png")
        for name in ("palette.png", "a.tif"):
            dataset.images.decode(tmp_path / name)
    assert not raised


# ---- damage


@pytest.mark.parametrize(
    "error",
    [
        *(kind("bad") for kind in (RuntimeError, struct.error, zlib.error, IndexError, KeyError, OverflowError)),
        *(kind() for kind in (MemoryError, AssertionError, TypeError, EOFError, NotImplementedError)),
        UnicodeDecodeError("utf-8", b"a", 0, 1, "bad"),
    ],
)
def test_whatever_a_decoder_raises_names_the_image(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    path = tmp_path / "a.avif"
    said = str(error) or type(error).__name__
    for read in readers(path):
        with pytest.raises(DataError, match=r"a\.avif:? cannot be decoded \(") as refused:
            read()
        assert f"({said})" in str(refused.value)
    with pytest.raises(DataError, match=r"^entry 7: image .*; is the download complete\? \(--skip_broken"):
        read_image(path, "entry 7")
    assert inspect_image((path, True)).problem == said


def test_a_user_can_still_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", stop)
    for read in readers(tmp_path):
        with pytest.raises(KeyboardInterrupt):
            read()


# ---- where images lie


@pytest.mark.parametrize("root", ["images", "/data/images", "."])
def test_names_below_image_root(root: str) -> None:
    for name in ("1.jpg", "VG_100K/1.jpg", "./a/b.png", "a..b/..c.jpg", "..\\x.jpg", "...", "~/a.jpg"):
        assert locate(root, name) == Path(root) / name
    for name in ("../a.jpg", "a/../../b.jpg", "a/../b.jpg", "..", "a/.."):
        with pytest.raises(EntryProblem, match=r"leads out of image_root by '\.\.'"):
            locate(root, name)
    for name in ("/etc/passwd", "//server/a.jpg", "/data/images/a.jpg"):
        with pytest.raises(EntryProblem, match="is absolute, so that image_root is not used; set image_root to ''"):
            locate(root, name)
    with pytest.raises(EntryProblem) as refused:
        locate(root, "/a\x1b[31m.jpg")
    assert refused.value.detail == r"found '/a\x1b[31m.jpg'"


def test_an_empty_image_root_takes_all_names() -> None:
    for name in ("/data/a.jpg", "../a.jpg", "a.jpg"):
        assert locate("", name) == Path(name)


@pytest.mark.parametrize("name", ["/abs/a", "../a", "b/../../a"])
def test_no_reader_leaves_image_root(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    rows = [{"image": name, "caption": "cat", "text": "cat", "match": 1}]
    file.write_text(json.dumps(rows))

    def train(root: str) -> object:
        return load_entries(file, PretrainConfig(train_file=[], image_root=root))

    for read in (train, lambda root: load_pairs(str(file), root, skip_missing=True)):
        with pytest.raises(DataError, match=rf"(?s)(is absolute|leads out of).*file\.json: entry 0.*{name}"):
            read("images")
        assert read("")
    ids = tmp_path / "val.txt"
    ids.write_text(f"123\n{name}\n")
    for read_ids in (lambda: load_ids(str(ids), "images"), lambda: load_splits([ids])):
        with pytest.raises(DataError, match=rf"an image id is absolute or leads .*\n.*val\.txt \('{name}'\)"):
            read_ids()
    assert load_ids(str(ids), "") == ["123", name]


@pytest.mark.parametrize("name", ["absent.jpg", "x" * 300 + ".jpg", "a\0.jpg", "\ud800.jpg", "file/a.jpg", ""])
def test_names_of_nothing_are_missing_images(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    problems = Problems()
    check_images([(locate(str(tmp_path), name), "entry 0")], problems)
    (paragraph,) = problems.paragraphs()
    assert paragraph.startswith("the image file does not exist; check image_root and the entry, or pass --skip_broken")
    with pytest.raises(DataError, match="entry 0"):
        read_image(locate(str(tmp_path), name), "entry 0")
