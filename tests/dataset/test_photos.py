"""Photographs as people have them: orientation, modes, transparency, broken files, and which files words name."""

import io
from pathlib import Path

import pytest
from PIL import Image

from dataset.photos import find_images, read_photo
from dataset.reading import DataError, image_size, read_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(size: tuple[int, int] = (6, 4)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours of the upper left and the lower right pixel."""
    assert image.mode == "RGB"
    last = (image.width - 1, image.height - 1)
    return [tuple(image.getpixel(xy)) for xy in ((0, 0), last)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("orientation", "size", "corner_colours"),
    [
        (1, (6, 4), [RED, BLUE]),
        (2, (6, 4), [BLUE, RED]),  # mirrored
        (3, (6, 4), [BLUE, RED]),  # upside down
        (6, (4, 6), [RED, BLUE]),  # the camera was turned: red, stored on the left, belongs on top
        (8, (4, 6), [BLUE, RED]),
    ],
)
def test_exif_turns_photographs_alone(
    orientation: int, size: tuple[int, int], corner_colours: list[tuple[int, ...]], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "a.png"
    halves().save(path, exif=exif)
    assert (read_photo(path).size, corners(read_photo(path))) == (size, corner_colours)
    assert (read_image(path, "").size, corners(read_image(path, ""))) == ((6, 4), [RED, BLUE])
    assert image_size(path) == (4, 6)


def test_transparency_shows_white(tmp_path: Path) -> None:
    half = Image.new("LA", (2, 1), (0, 255))
    half.putpixel((0, 0), (0, 51))  # 20% black on white
    half.save(tmp_path / "half.png")
    assert corners(read_photo(tmp_path / "half.png")) == [(204,) * 3, (0,) * 3]


def test_uploads_are_read_from_memory() -> None:
    buffer = io.BytesIO()
    halves().save(buffer, format="png")
    buffer.seek(0)
    assert corners(read_photo(buffer, "upload")) == [RED, BLUE]
    with pytest.raises(DataError, match=r"^upload: not an image"):
        read_photo(io.BytesIO(b"<html>"), "upload")


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not found")
    (tmp_path / "empty.png").touch()
    halves((90, 90)).save(tmp_path / "half.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "half.jpg").read_bytes()[:500])
    halves((90, 90)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    expected = {
        "text.jpg": r"text\.jpg: not an image, or of another kind than JPEG, .*PNG.*; convert it to one of these",
        "empty.png": r"empty\.png: not an image",
        "half.jpg": r"half\.jpg: cannot be decoded .*; is the file complete\?",
        "half.png": r"half\.png: cannot be decoded",
        "missing.png": r"missing\.png: no such image",
        ".": "a folder, not an image",
    }
    for name, message in expected.items():
        with pytest.raises(DataError, match=message):
            read_photo(tmp_path / name)


def test_which_images_words_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hidden = ("._b.jpg", ".DS_Store", ".a.png", "inner.jpg/._e.jpg")  # what macOS and editors leave
    for name in ("b.jpg", "a.PNG", "notes.txt", "inner/c.webp", "inner.jpg/d.txt", "odd", *hidden):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()

    def names(*words: str) -> list[str]:
        return [str(path) for path in find_images(list(words))]

    assert names(".") == ["a.PNG", "b.jpg"]
    assert names("inner", "b.jpg", "odd") == ["inner/c.webp", "b.jpg", "odd"]
    assert names("*.jpg", "a.PNG", ".", "b.jpg") == ["b.jpg", "a.PNG"]
    assert names(f"{tmp_path}/*.PNG") == [f"{tmp_path}/a.PNG"]
    for word, message in (
        ("inner.jpg", "inner.jpg: holds no image; help"),
        ("none*", "none*: no such file"),
        ("*.jpg/", "*.jpg/: no such"),
    ):
        with pytest.raises(DataError) as error:
            find_images([word], "help")
        assert str(error.value).startswith(message)
    missing = [Path("gone.jpg"), Path("no*.png"), Path("x" * 300)]
    assert find_images([str(path) for path in missing], skip_missing=True) == missing
    with pytest.raises(DataError, match="holds no image"):
        find_images(["inner.jpg"], skip_missing=True)
