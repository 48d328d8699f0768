"""Pictures from files nobody vouches for: decoded with limits to RGB, or refused with a reason, without raising."""

import logging
import struct
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["MAX_PIXELS", "ImageTally", "LoadedImage", "load_image"]

logger = logging.getLogger(__name__)

MAX_PIXELS = 16_000_000
"""Largest width x height that is decoded; a few kB of PNG can unpack to hundreds of MB."""

MAX_SIDE = 640
"""Longer side in pixels of what is kept in memory; more than any encoder reads."""

# A list of our own: some of Pillow's other formats start programs (EPS) or read other files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass(frozen=True)
class LoadedImage:
    """What became of one file.

    Attributes:
        image: RGB picture, upright, at most MAX_SIDE pixels a side; None unless `status` is "present".
        status: "missing": there is no such file; "broken": there is one, but no picture came out of it.
        reason: Kind of fault in a few words, the same words for all files with that fault; "" for a picture.
    """

    image: Image.Image | None
    status: Literal["present", "missing", "broken"]
    reason: str = ""


@dataclass
class ImageTally:
    """Counts what became of many files and logs one line a kind of fault."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], Path] = field(default_factory=dict)

    def add(self, path: Path, loaded: LoadedImage) -> None:
        """Count `loaded`, and keep `path` if it is the first of its kind."""
        kind = (loaded.status, loaded.reason)
        self.counts[kind] += 1
        self.examples.setdefault(kind, path)

    def log(self) -> None:
        """Log each kind of fault once, with its count and the first file."""
        for (status, reason), count in sorted(self.counts.items()):
            if status != "present":
                first = self.examples[status, reason]
                logger.warning("%d pictures %s (%s), first: %s; left out", count, status, reason, first)


def load_image(path: Path, max_pixels: int = MAX_PIXELS) -> LoadedImage:
    """Decode one picture, whatever the file holds.

    The first frame of an animation is taken, the camera's rotation is applied, transparent places become white, and
    16-bit, palette, grey and CMYK pictures become 8-bit RGB.

    Args:
        path: File to read.
        max_pixels: Refuse, before decoding, pictures with more pixels than this.

    Returns:
        The picture, or the reason why there is none.
    """
    try:
        if not path.exists():
            return LoadedImage(None, "missing", "no such file")
        with warnings.catch_warnings():
            # Pillow warns of large pictures; our own limit below is stricter.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as opened:
                if opened.width * opened.height > max_pixels:
                    return LoadedImage(None, "broken", f"more than {max_pixels} pixels")
                # JPEG can be decoded at a half, a quarter or an eighth for less work.
                opened.draft(None, (MAX_SIDE, MAX_SIDE))
                opened.load()
                image = _to_rgb(_upright(opened))
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        return LoadedImage(image, "present")
    except Exception as error:  # Pillow's decoders raise nearly every built-in exception on hostile bytes
        return LoadedImage(None, "broken", _reason(path, error))


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation; a picture whose EXIF cannot be read stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` as 8-bit RGB on white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """Scale a 16-bit, 32-bit or float picture to 8 bits; Pillow's own conversion would clip it to white."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
    else:
        low, high = 0.0, 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
    scaled = (values - low) / max(high - low, 1e-12) * 255.0
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))


def _reason(path: Path, error: Exception) -> str:
    """Name the kind of fault, without what differs from file to file."""
    if isinstance(error, PermissionError | IsADirectoryError):
        return "not a readable file"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as stream:
            start = stream.read(512).lstrip().lower()
        if not start:
            return "empty file"
        return "a web page, not a picture" if start.startswith((b"<!doctype html", b"<html")) else "not a picture"
    if isinstance(error, OSError) and "truncated" in str(error):
        return "truncated"
    return f"cannot be decoded: {type(error).__name__}"
