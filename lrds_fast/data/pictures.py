"""Encoded pictures, for all readers: sizes from headers, decoding, and scaling of levels to 255."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

#: Extensions of pictures, the same as torchvision's ImageFolder has.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

#: Largest number of pixels to read: Pillow's limit against decompression bombs.
MOST_PIXELS = 178_956_970


class Unreadable(ValueError):
    """A picture cannot be read. The message is the reason, in one line."""


@contextmanager
def reading() -> Iterator[None]:
    """Turns every exception of the body into Unreadable, because decoders raise many types for damaged files.
    MemoryError and ImportError, which do not come from the picture, pass."""
    try:
        yield
    except (Unreadable, MemoryError, ImportError):
        raise
    except Exception as error:
        raise Unreadable(_reason(error)) from error


def _reason(error: Exception) -> str:
    text = re.sub(r" ?<_io\.\w+ object at \w+>", "", str(error)).strip().partition("\n")[0]
    if isinstance(error, (OSError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")


def picture_size(data: np.ndarray) -> tuple[int, int]:
    """(height, width) from a file's header. data: (bytes,) uint8. Raises Unreadable for an invalid header."""
    with reading():
        size = _plain_size(data)
        if size is None:
            with _opened(data) as image:
                size = image.height, image.width
        return _checked(*size)


def decoded(data: np.ndarray, *, about: int = 0) -> Any:
    """The PIL image in RGB. data: (bytes,) uint8. about > 0: a thumbnail with sides of at most `about` pixels.

    16-bit levels are divided by 65535 / 255 and floating levels multiplied by 255; Pillow would clip both at 255.
    Raises Unreadable.
    """
    with reading(), _opened(data) as image:
        _checked(image.height, image.width)
        if about:
            image.draft("RGB", (about, about))
        pixels = rgb(image)
        if about:
            pixels.thumbnail((about, about))
        return pixels


def for_dali(data: np.ndarray) -> tuple[np.ndarray, int, int]:
    """(file, height, width), the file as DALI is to decode it.

    Formats whose levels DALI scales otherwise than `decoded` (PNM, floating and 32-bit levels) are decoded here and
    passed on as PPM. Raises Unreadable."""
    with reading():
        size = _plain_size(data)
        if size is None:
            with _opened(data) as image:
                size = image.height, image.width
                if image.format == "PPM" or image.mode in ("I", "F"):
                    pixels = rgb(image).tobytes()
                    header = b"P6 %d %d 255\n" % (image.width, image.height)
                    data = np.frombuffer(header + pixels, dtype=np.uint8)
        return data, *_checked(*size)


@contextmanager
def _opened(data: np.ndarray) -> Iterator[Any]:
    from PIL import Image

    with Image.open(io.BytesIO(data.tobytes())) as image:
        yield image


def rgb(image: Any) -> Any:
    """A PIL image in RGB, its levels scaled to 255."""
    from PIL import Image

    if image.mode == "F":
        levels = np.asarray(image)
        if not (levels.min() >= 0 and levels.max() <= 1):  # neither is true of NaN
            raise Unreadable(f"its floating levels must be in [0, 1]; got {levels.min():g} .. {levels.max():g}")
        image = Image.fromarray(np.floor(levels * 255 + 0.5).astype(np.uint8))
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise Unreadable("its levels have 32 bits; save it with 8 or 16 bits")
    elif image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def _checked(height: int, width: int) -> tuple[int, int]:
    if not 0 < height * width <= MOST_PIXELS:
        raise Unreadable(f"its header says {height} x {width} pixels; 1 to {MOST_PIXELS} pixels are accepted")
    return height, width


def _plain_size(data: np.ndarray) -> tuple[int, int] | None:
    """(height, width) of a PNG or JPEG, without Pillow; None for other formats."""
    raw = data[:64].tobytes()
    if raw[:8] == b"\x89PNG\r\n\x1a\n" and len(raw) >= 24:
        return int.from_bytes(raw[20:24], "big"), int.from_bytes(raw[16:20], "big")
    if raw[:2] == b"\xff\xd8":
        return _jpeg_size(memoryview(data))  # type: ignore[arg-type]
    return None


def _jpeg_size(data: memoryview) -> tuple[int, int]:
    """(height, width) from a JPEG's frame header, the first segment SOF."""
    at = 2
    while at + 9 < len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # padding between segments
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            if height and width:
                return height, width
            break
        if marker in (0x01, 0xD8) or 0xD0 <= marker <= 0xD7:
            at += 2
            continue
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    raise Unreadable("a JPEG without a frame header")
