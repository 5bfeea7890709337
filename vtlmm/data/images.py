# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Open, identify and measure images. All other modules use these functions instead of Pillow."""

import hashlib
import io
import os
import threading
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps


# About 11,000 x 11,000 pixels, 384 MB as RGB. The largest phone cameras take images of 108 million pixels.
MAX_IMAGE_PIXELS = 128_000_000
# Wider and taller images are made smaller before an image processor pads or crops them.
MAX_ASPECT_RATIO = 8
# Longest side in pixels of an image above the maximum aspect ratio, before it is padded to a square
MAX_STRIP_SIDE = 2048

ImageSource = str | os.PathLike | bytes | Image.Image | dict | BinaryIO

_truncation_lock = threading.Lock()


class ImageError(ValueError):
    """An image cannot be used: the data is not an image, is corrupted, or has too many pixels."""


def open_image(source: ImageSource, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    r"""
    Return an image in RGB as a person sees it in an image viewer.

    The EXIF orientation is applied. Transparent pixels become white. Integer and float images with more than 8 bits
    are scaled to 8 bits: see [`_to_8_bit`]. An animation gives its first frame.

    Args:
        source: a path, the bytes of an image file, an image from Pillow, a `{"path", "bytes"}` dict from `datasets`,
            or a binary file object.
        max_pixels (`int`): maximum width times height. The size is checked before the pixels are decoded.

    Raises:
        `FileNotFoundError`: if the file does not exist.
        [`ImageError`]: if the source is not an image, is corrupted, or has more than `max_pixels` pixels.
    """
    name = _source_name(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` is the limit here
            image = source if isinstance(source, Image.Image) else Image.open(_file(source))
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"{name}: the image has {width} x {height} pixels, more than the maximum of {max_pixels:,}. "
                    "Make the image smaller."
                )
            _load_complete(image)
            return _to_rgb(_upright(image))
    except (FileNotFoundError, ImageError):
        raise
    except IsADirectoryError as error:
        raise FileNotFoundError(f"{name} is a folder, not an image file.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: the image has too many pixels. Make the image smaller. ({error})") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name}: the file is not an image.") from error
    except Exception as error:  # Pillow's decoders raise many types, such as SyntaxError, EOFError and struct.error
        raise ImageError(f"{name}: the image is corrupted: {error or type(error).__name__}") from error


def image_key(source: ImageSource) -> str:
    """
    Return a SHA-256 of an image's content, 64 hexadecimal digits.

    The key of an undecoded image is the hash of its file. The key of an image from Pillow is the hash of its size and
    its pixels as [`open_image`] returns them, so the two keys of one image differ.
    """
    if isinstance(source, Image.Image):
        image = open_image(source)  # the raw pixels of a palette image do not say their colors
        content = f"{image.size} ".encode() + image.tobytes()
    else:
        file = _file(source)
        content = Path(file).read_bytes() if isinstance(file, str) else file.read()
    return hashlib.sha256(content).hexdigest()


def processed_size(image_processor) -> tuple[int, int]:
    r"""
    Return the height and width in pixels that `image_processor` gives every image, from one wide and one tall image.

    Raises:
        `ValueError`: if the two sizes differ. The images of a batch must have one size, and VT-LMM has a fixed number
            of image tokens.
    """
    images = [Image.new("RGB", size) for size in ((96, 64), (64, 96))]
    arrays = [image_processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
    sizes = sorted({(int(array.shape[-2]), int(array.shape[-1])) for array in arrays})
    if len(sizes) > 1:
        raise ValueError(
            f"The image processor gives images of different sizes {sizes} (height, width). Set `do_center_crop`, "
            "`do_pad`, or a `size` with height and width, in preprocessor_config.json."
        )
    return sizes[0]


def limit_aspect_ratio(image: Image.Image, image_processor: Any) -> Image.Image:
    r"""
    Return a smaller image if `image` is so wide or tall that padding or cropping it would take too much memory.

    LLaVA-1.5 pads an image to a square of its longest side before it is resized: 432 MB of pixels for a strip of
    12,000 x 20. CLIP resizes the shortest side and crops the center: the same strip becomes 201,600 x 336. Images with
    an aspect ratio of at most `MAX_ASPECT_RATIO` are returned unchanged.

    Args:
        image (`PIL.Image.Image`)
        image_processor ([`BaseImageProcessor`]): with padding the image is resized, with a center crop the ends of
            the image, which the crop would remove, are cut off.
    """
    long, short = max(image.size), min(image.size)
    if long <= MAX_ASPECT_RATIO * short:
        return image
    if getattr(image_processor, "do_pad", False):
        if long <= MAX_STRIP_SIDE:
            return image
        width, height = (max(1, round(side * MAX_STRIP_SIDE / long)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    if getattr(image_processor, "do_center_crop", False):
        width, height = (min(side, MAX_ASPECT_RATIO * short) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
    return image


def prepare_images(sources: list, image_processor: Any) -> list[Image.Image]:
    """Open each source with [`open_image`] and apply [`limit_aspect_ratio`]: valid input for `image_processor`."""
    return [limit_aspect_ratio(open_image(source), image_processor) for source in sources]


def _source_name(source: ImageSource) -> str:
    """Return a name for error messages. It never contains the image's data."""
    if isinstance(source, dict):
        source = source.get("path") or b""
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        return str(name) if len(name) <= 300 else f"{name[:60]!r}…"
    return getattr(source, "filename", None) or getattr(source, "name", None) or "An image in memory"


def _file(source: Any) -> str | BinaryIO:
    """Return a path or a binary file object for Pillow."""
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
        if source is None:
            raise ImageError("The image has neither `bytes` nor a `path`.")
        if isinstance(source, str) and "://" in source:  # a streamed Hub dataset, or a file:// URL
            from datasets.utils.file_utils import xopen  # imports pandas

            with xopen(source, "rb") as file:
                source = file.read()
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{_source_name(path)}: the image file does not exist.")
        return path
    if not hasattr(source, "read"):
        raise ImageError(f"An image must be a path, bytes or an image from Pillow, not a {type(source).__name__}.")
    return source


def _load_complete(image: Image.Image) -> None:
    """Decode all pixels. A truncated file is an error, with any `LOAD_TRUNCATED_IMAGES`."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        image.load()
        return
    with _truncation_lock:
        keep, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            image.load()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = keep


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Invalid EXIF data is ignored, as image viewers do."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image  # `exif_transpose` would copy it
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow to RGB."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bit(image))
    elif image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    elif image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.has_transparency_data:
        image = _on_white(image)
    # `convert` returns a copy, so closing or changing the source does not change the result
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)


def _to_8_bit(image: Image.Image) -> np.ndarray:
    r"""
    Scale the values of an image in mode `I;16`, `I` or `F` to 0 ... 255.

    16-bit values are divided by 257. The values of 32-bit and float images have no fixed range: they are assumed to be
    0 ... 1 (float only), 0 ... 255 or 0 ... 65535 if they fit. Other values are scaled so that the minimum becomes 0
    and the maximum 255.

    Returns:
        `np.ndarray` of `uint8` and shape `(height, width)`.
    """
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    offset, factor = 0.0, 1.0
    if image.mode.startswith("I;16"):
        factor = 1 / 257
    elif low < 0 or high > 65535 or (image.mode == "F" and high > 255):
        offset, factor = low, 255 / max(high - low, 1e-12)
    elif image.mode == "F" and high <= 1:
        factor = 255.0
    elif high > 255:
        factor = 1 / 257
    result = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 256):  # float64 needs 8 bytes for each pixel
        rows = (values[start : start + 256].astype(np.float64) - offset) * factor
        result[start : start + 256] = np.clip(np.round(rows), 0, 255)
    return result
