import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchrec_em3.datasets.images import MAX_SIDE, ImageTally, load_image

RED, BLUE, WHITE = (254, 0, 0), (0, 0, 254), (255, 255, 255)


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size in a few bytes; its pixels are never reached."""
    content = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + content
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    )  # fmt: skip


def write_cmyk(path: Path) -> None:
    halves().convert("CMYK").save(path, "JPEG", quality=95)


def write_sixteen_bit(path: Path) -> None:
    grey = np.full((20, 40), 65535, dtype=np.uint16)
    grey[:, :20] = 32768
    Image.fromarray(grey).save(path, "PNG")


def write_float(path: Path) -> None:
    values = np.full((20, 40), 5.0, dtype=np.float32)
    values[:, :20] = -3.0
    values[0, 0] = np.nan
    Image.fromarray(values).save(path, "TIFF")


def write_palette(path: Path) -> None:
    halves().convert("P", palette=Image.Palette.ADAPTIVE).save(path, "PNG")


def write_transparent(path: Path) -> None:
    image = halves().convert("RGBA")
    image.paste((0, 0, 0, 0), (20, 0, 40, 20))
    image.save(path, "PNG")


def write_rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    halves().save(path, "JPEG", quality=95, exif=exif)


def write_animated(path: Path) -> None:
    halves().save(path, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20), WHITE)])


def write_one_pixel(path: Path) -> None:
    Image.new("RGB", (1, 1), RED).save(path, "PNG")


def write_bad_exif(path: Path) -> None:
    halves().save(path, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f broken")


ODD: list[tuple[Callable[[Path], None], tuple[int, int], tuple[int, int, int], tuple[int, int, int]]] = [
    (write_cmyk, (40, 20), RED, BLUE),
    (write_sixteen_bit, (40, 20), (127, 127, 127), WHITE),
    (write_float, (40, 20), (0, 0, 0), WHITE),
    (write_palette, (40, 20), RED, BLUE),
    (write_transparent, (40, 20), RED, WHITE),
    (write_animated, (40, 20), RED, BLUE),
    (write_one_pixel, (1, 1), RED, RED),
    (write_bad_exif, (40, 20), RED, BLUE),
]


@pytest.mark.parametrize(("write", "size", "left", "right"), ODD, ids=lambda value: getattr(value, "__name__", ""))
def test_odd_pictures_become_rgb(
    tmp_path: Path,
    write: Callable[[Path], None],
    size: tuple[int, int],
    left: tuple[int, int, int],
    right: tuple[int, int, int],
) -> None:
    write(tmp_path / "picture")
    loaded = load_image(tmp_path / "picture")
    assert (loaded.status, loaded.reason) == ("present", "")
    assert loaded.image is not None
    assert (loaded.image.mode, loaded.image.size) == ("RGB", size)
    pixels = np.asarray(loaded.image).astype(int)
    assert np.abs(pixels[-1, 0] - left).max() < 12
    assert np.abs(pixels[-1, -1] - right).max() < 12


def test_the_cameras_rotation_is_applied(tmp_path: Path) -> None:
    write_rotated(tmp_path / "turned.jpg")
    image = load_image(tmp_path / "turned.jpg").image
    assert image is not None
    assert image.size == (20, 40)
    pixels = np.asarray(image).astype(int)
    assert np.abs(pixels[2, 10] - RED).max() < 12
    assert np.abs(pixels[-3, 10] - BLUE).max() < 12


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    halves(2000, 1000).save(tmp_path / "large.jpg")
    halves(2000, 1000).save(tmp_path / "large.png")
    for name in ("large.jpg", "large.png"):
        image = load_image(tmp_path / name).image
        assert image is not None
        assert image.size == (MAX_SIDE, MAX_SIDE // 2)


def damaged(kind: str) -> bytes:
    """Return the bytes of a file that holds no picture."""
    return {
        "empty": b"",
        "page": b"\n<!DOCTYPE html><html><body>404</body></html>",
        "text": b"not found",
        "bomb": png_header(10_000, 10_000),
        "huge bomb": png_header(60_000, 60_000),
        "headless": b"\x89PNG\r\n\x1a\n",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "empty file"),
        ("page", "a web page, not a picture"),
        ("text", "not a picture"),
        ("bomb", "more than 16000000 pixels"),
        ("huge bomb", "more than 16000000 pixels"),
        ("headless", "not a picture"),
        ("eps", "not a picture"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, kind: str, reason: str) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(damaged(kind))
    loaded = load_image(path)
    assert (loaded.image, loaded.status, loaded.reason) == (None, "broken", reason)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_files_never_raise(tmp_path: Path, form: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    noise.save(tmp_path / "whole", form)
    whole = (tmp_path / "whole").read_bytes()
    assert load_image(tmp_path / "whole").status == "present"
    for length in (1, 10, len(whole) // 3, len(whole) // 2):
        (tmp_path / "part").write_bytes(whole[:length])
        loaded = load_image(tmp_path / "part")
        assert loaded.status == "broken"
        assert loaded.reason


def test_a_truncated_jpeg_says_so(tmp_path: Path) -> None:
    halves(200, 200).save(tmp_path / "whole.jpg")
    (tmp_path / "part.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-300])
    assert load_image(tmp_path / "part.jpg").reason == "truncated"


def test_random_bytes_never_raise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    halves().save(tmp_path / "whole.png")
    whole = bytearray((tmp_path / "whole.png").read_bytes())
    for _ in range(100):
        flipped = bytearray(whole)
        for place in rng.integers(8, len(whole), size=3):
            flipped[place] = int(rng.integers(256))
        (tmp_path / "flipped").write_bytes(flipped)
        loaded = load_image(tmp_path / "flipped")
        assert (loaded.status == "present") == (loaded.image is not None)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    gone = load_image(tmp_path / "gone.jpg")
    assert (gone.image, gone.status, gone.reason) == (None, "missing", "no such file")
    assert load_image(tmp_path / "nul\0byte.jpg").image is None
    folder = load_image(tmp_path)
    assert (folder.status, folder.reason) == ("broken", "not a readable file")


def test_the_limit_can_be_set(tmp_path: Path) -> None:
    halves().save(tmp_path / "picture.png")
    assert load_image(tmp_path / "picture.png", max_pixels=800).status == "present"
    assert load_image(tmp_path / "picture.png", max_pixels=799).reason == "more than 799 pixels"


def test_each_kind_of_fault_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    halves().save(tmp_path / "good.png")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.png").write_bytes(b"")
    tally = ImageTally()
    for name in ("good.png", "b.png", "c.png", "gone.png"):
        tally.add(tmp_path / name, load_image(tmp_path / name))
    with caplog.at_level(logging.WARNING):
        tally.log()
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("2 pictures broken (empty file), first: ")
    assert "b.png" in caplog.messages[0]
    assert caplog.messages[1].startswith("1 pictures missing (no such file)")
