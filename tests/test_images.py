# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Open images of every mode and format as a person sees them, and refuse images that cannot be used."""

import io
import resource

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageFile
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from vtlmm.data.images import (
    MAX_ASPECT_RATIO,
    MAX_STRIP_SIDE,
    ImageError,
    image_key,
    limit_aspect_ratio,
    open_image,
    prepare_images,
    processed_size,
)


RAMP = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
SIDE = {"height": 28, "width": 28}


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def red(image):
    """The red channel of the first line."""
    assert image.mode == "RGB"
    return np.asarray(image)[0, :, 0].astype(int)


def test_every_kind_of_source(tmp_path):
    image = Image.new("RGB", (5, 4), (10, 20, 30))
    content = encode(image)
    (tmp_path / "a.png").write_bytes(content)
    path = tmp_path / "a.png"
    sources = [path, str(path), content, io.BytesIO(content), image]
    sources += [{"path": None, "bytes": content}, {"path": str(path), "bytes": None}, {"path": "x", "bytes": content}]
    for source in sources:
        assert open_image(source).tobytes() == image.tobytes(), source


SIXTEEN_BIT = RAMP.astype(np.uint16) * 257
RAMPS = {
    "8-bit PNG": encode(Image.fromarray(RAMP)),
    "16-bit PNG": encode(Image.fromarray(SIXTEEN_BIT)),
    "16-bit TIFF": encode(Image.fromarray(SIXTEEN_BIT), "TIFF"),
    "16-bit big-endian": Image.frombytes("I;16B", (256, 8), SIXTEEN_BIT.astype(">u2").tobytes()),
    "32-bit integers of 16 bits": Image.fromarray(SIXTEEN_BIT.astype(np.int32)),
    "32-bit integers of 8 bits": Image.fromarray(RAMP.astype(np.int32)),
    "32-bit integers of any range": Image.fromarray(RAMP.astype(np.int32) * 1000000 - 1000000),
    "floats of 0 to 1": encode(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
    "floats of 0 to 255": Image.fromarray(RAMP.astype(np.float32)),
    "floats of any range": Image.fromarray((RAMP * 77.0 - 900).astype(np.float32)),
    "gray with alpha": encode(Image.fromarray(RAMP).convert("LA")),
    "palette": encode(Image.fromarray(RAMP).convert("P")),
    "CMYK JPEG": encode(Image.fromarray(RAMP).convert("RGB").convert("CMYK"), "JPEG", quality=100),
    "CMYK TIFF": encode(Image.fromarray(RAMP).convert("RGB").convert("CMYK"), "TIFF"),
    "YCbCr": Image.fromarray(RAMP).convert("RGB").convert("YCbCr"),
    "HSV": Image.fromarray(RAMP).convert("RGB").convert("HSV"),
    "premultiplied": Image.fromarray(RAMP).convert("RGBA").convert("RGBa"),
    "WebP": encode(Image.fromarray(RAMP).convert("RGB"), "WEBP", lossless=True),
    "BMP": encode(Image.fromarray(RAMP), "BMP"),
    "GIF": encode(Image.fromarray(RAMP), "GIF"),
    "PPM": encode(Image.fromarray(RAMP), "PPM"),
}


@pytest.mark.parametrize("name", RAMPS)
def test_every_mode_shows_the_same_gray_ramp(name):
    assert abs(red(open_image(RAMPS[name])) - np.arange(256)).max() <= 2


def test_every_format_that_pillow_writes_shows_the_ramp():
    """AVIF, GIF and WebP cannot hold 16 bits, and Pillow cuts them off when it writes."""
    Image.init()
    square = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    gray = Image.fromarray(square)
    modes = {mode: gray.convert(mode) for mode in ("L", "LA", "P", "RGB", "RGBA")}
    modes["CMYK"], modes["I;16"] = modes["RGB"].convert("CMYK"), Image.fromarray(square.astype(np.uint16) * 257)
    shown = {}
    for name in set(Image.SAVE) & set(Image.OPEN) - {"EPS", "ICNS"}:  # a program is missing, and other sizes
        for mode, image in modes.items():
            if mode == "I;16" and name in ("AVIF", "GIF", "WEBP"):
                continue
            try:
                content = encode(image, name)
            except (OSError, KeyError, ValueError):
                continue  # the format does not have this mode
            values = np.asarray(open_image(content))[:, :, 0].astype(int)
            assert values.shape == square.shape and abs(values - square).max() <= 8, (name, mode)
            shown.setdefault(name, set()).add(mode)
    assert len(shown) > 12 and shown["PNG"] == shown["TIFF"] - {"CMYK"} == set(modes) - {"CMYK"}


def test_lab_colors():
    image = Image.new("RGB", (2, 2), (200, 40, 30))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    assert lab.mode == "LAB"
    assert open_image(lab).getpixel((0, 0)) == pytest.approx((200, 40, 30), abs=3)


def test_values_that_are_not_finite():
    values = np.array([[0.0, np.nan, 1.0, np.inf]], dtype=np.float32)
    assert red(open_image(Image.fromarray(values))).tolist() == [0, 0, 255, 0]


def test_transparent_pixels_are_white():
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))  # black where it is invisible
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    keyed = Image.new("RGB", (2, 1), "red")
    keyed.putpixel((1, 0), (0, 0, 0))
    gray = Image.new("LA", (2, 1), (255, 255))
    gray.putpixel((1, 0), (0, 0))
    sources = [
        rgba,
        encode(rgba),
        encode(palette, transparency=1),
        encode(palette, "GIF", transparency=1),
        encode(keyed, transparency=(0, 0, 0)),
        encode(gray),
    ]
    for source in sources:
        image = open_image(source)
        assert image.getpixel((1, 0)) == (255, 255, 255) and image.getpixel((0, 0))[0] == 255


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = encode(Image.new("RGB", (8, 4), "red"), "JPEG", exif=exif)
    assert open_image(content).size == (4, 8)
    assert open_image(open_image(content)).size == (4, 8)
    assert open_image(encode(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\x00\x00broken")).size == (8, 4)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    assert open_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0))[0] > 250


def test_pixel_limit_is_checked_before_decoding(monkeypatch):
    content = encode(Image.new("1", (20000, 20000)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="too many pixels"):
        open_image(content)
    with pytest.raises(ImageError, match="30 x 40 pixels, more than the maximum of 1,000"):
        open_image(encode(Image.new("L", (30, 40))), max_pixels=1000)


def test_errors_name_the_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.png: the image file does not exist"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        open_image({"path": str(tmp_path), "bytes": None})
    (tmp_path / "text.png").write_text("<html>")
    with pytest.raises(ImageError, match="text.png: the file is not an image"):
        open_image(tmp_path / "text.png")
    content = encode(Image.effect_noise((64, 64), 50), "JPEG")
    with pytest.raises(ImageError, match="in memory: the image is corrupted: .*truncated"):
        open_image(content[: len(content) // 2])
    with pytest.raises(ImageError, match="neither"):
        open_image({"path": None, "bytes": None})
    with pytest.raises(ImageError, match="not a int"):
        open_image(3)


def test_truncated_images_stay_an_error_if_pillow_fills_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    content = encode(Image.effect_noise((64, 64), 50), "JPEG")
    with pytest.raises(ImageError, match="truncated"):
        open_image(content[: len(content) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_image_key(tmp_path):
    image, other = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    content = encode(image)
    (tmp_path / "a.png").write_bytes(content)
    path = str(tmp_path / "a.png")
    keys = {image_key(source) for source in (content, path, {"path": path, "bytes": None}, {"bytes": content})}
    assert len(keys) == 1
    assert image_key(image) == image_key(image.copy()) != image_key(other)


def test_processed_size():
    assert processed_size(CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIDE)) == (28, 28)
    with pytest.raises(ValueError, match=r"different sizes .*\(28, 42\)"):
        processed_size(CLIPImageProcessorPil(size={"shortest_edge": 28}, do_center_crop=False))


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", [(12000, 20), (20, 12000)])
def test_extreme_aspect_ratio_takes_little_memory(pad, size):
    options = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    image_processor = LlavaImageProcessorPil(do_pad=True, **options) if pad else CLIPImageProcessorPil(**options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [image] = prepare_images([Image.new("RGB", size, (200, 10, 10))], image_processor)
    assert image_processor([image], return_tensors="pt")["pixel_values"].shape == (1, 3, 336, 336)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kilobytes
    assert max(image.size) <= (MAX_STRIP_SIDE if pad else MAX_ASPECT_RATIO * 20)


def test_usual_aspect_ratios_are_not_changed():
    padding = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 28}, crop_size=SIDE)
    for size in ((3000, 400), (1600, 100)):
        image = Image.new("RGB", size)
        assert limit_aspect_ratio(image, padding) is image
    image = Image.new("RGB", (12000, 20))
    assert limit_aspect_ratio(image, CLIPImageProcessorPil(size=SIDE, do_center_crop=False)) is image


def test_palette_images_have_different_keys():
    """Both images have index 0 at each pixel, in palettes with another color."""
    keys = set()
    for color in ((255, 0, 0), (0, 0, 255)):
        image = Image.new("P", (4, 4), 0)
        image.putpalette(color)
        keys.add(image_key(image))
    assert len(keys) == 2
