"""Pictures of every kind, and what happens to bad ones."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from picture_files import encoded, pixels, reason_of, seed_of
from PIL import Image, ImageFile

from unipic2_jax.pictures.decode import BadRecord, decode, read_image, to_pil


def exif(turn):
    values = Image.Exif()
    values[0x0112] = turn
    return values


def test_every_kind_of_picture_is_decoded_upright_to_rgb(tmp_path):
    plain = pixels(1)
    (tmp_path / "a.png").write_bytes(encoded(plain))
    for same in (
        plain,
        encoded(plain),
        tmp_path / "a.png",
        encoded(plain, "WEBP", lossless=True),
        encoded(plain, "BMP"),
    ):
        np.testing.assert_array_equal(decode(same), plain)

    rgb = Image.fromarray(plain)
    near = lambda found, expected, most: np.abs(np.asarray(found, int) - np.asarray(expected, int)).mean() < most
    cmyk = encoded(rgb.convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(cmyk)).mode == "CMYK" and near(decode(cmyk), plain, 6)
    turned = decode(encoded(rgb, "JPEG", quality=98, subsampling=0, exif=exif(6)))
    assert turned.size == (12, 20) and near(turned, np.rot90(plain, -1), 4)

    grey = np.linspace(0, 65535, 240).reshape(12, 20).astype(np.uint16)
    deep = encoded(Image.fromarray(grey))
    assert Image.open(io.BytesIO(deep)).mode.startswith("I") and near(decode(deep), grey[..., None] / 257, 1)
    palette = rgb.quantize(64)
    np.testing.assert_array_equal(decode(encoded(palette)), palette.convert("RGB"))
    clear = Image.new("P", (4, 4), 0)
    clear.putpalette([255, 0, 0, 0, 0, 255])
    clear.putpixel((1, 2), 1)
    shown = np.asarray(decode(encoded(clear, transparency=0)))
    assert (shown[0, 0] == 255).all() and shown[2, 1].tolist() == [0, 0, 255]


def grey_of(picture):
    shown = np.asarray(decode(picture))
    assert (shown == shown[..., :1]).all()
    return shown[..., 0]


def test_numbers_that_are_not_0_to_255_are_read_by_their_mode_and_range():
    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    wide = grey.astype(np.uint16) * 257
    dark = grey.astype(np.uint16)  # of 16 bits: nearly black
    files = {
        "fractions": (encoded(Image.fromarray(grey / np.float32(255)), "TIFF"), grey),
        "whole fractions": (encoded(Image.fromarray(grey.astype(np.float32)), "TIFF"), grey),
        "wide fractions": (encoded(Image.fromarray(wide.astype(np.float32)), "TIFF"), grey),
        "16-bit TIFF": (encoded(Image.fromarray(wide), "TIFF"), grey),
        "16-bit PNG": (encoded(Image.fromarray(wide)), grey),
        "dark 16-bit PNG": (encoded(Image.fromarray(dark)), np.round(dark / 257)),
        "dark 16-bit TIFF": (encoded(Image.fromarray(dark), "TIFF"), np.round(dark / 257)),
        "0 is white": (encoded(Image.fromarray(wide), "TIFF", tiffinfo={262: 0}), 255 - grey),
        "32-bit TIFF": (encoded(Image.fromarray(wide.astype(np.int32)), "TIFF"), grey),
        "8 of 32 bits": (encoded(Image.fromarray(grey.astype(np.int32)), "TIFF"), grey),
        "16-bit PPM": (b"P5 20 12 65535\n" + wide.astype(">u2").tobytes(), grey),
        "12-bit PPM": (
            b"P5 20 12 4095\n" + (grey.astype(int) * 16).astype(">u2").tobytes(),
            grey.astype(int) * 16 / 4095 * 255,
        ),
        "1 bit": (encoded(Image.fromarray(grey > 100)), (grey > 100) * 255),
    }
    for name, (data, expected) in files.items():
        assert np.abs(grey_of(data) - np.asarray(expected, float)).max() <= 1, name
    opaque = Image.fromarray(np.dstack([grey, np.full_like(grey, 255)]), "LA")
    np.testing.assert_array_equal(grey_of(encoded(opaque)), grey)
    assert (grey_of(encoded(Image.fromarray(np.dstack([grey, 0 * grey]), "LA"))) == 255).all()
    clear = grey_of(encoded(Image.fromarray(wide), transparency=int(wide[0, 5])))
    assert clear[0, 5] == 255 and clear[0, 6] == 6
    turned = grey_of(encoded(Image.fromarray(wide), exif=exif(6)))
    np.testing.assert_array_equal(turned, np.rot90(grey, -1))


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (np.float32([[0, 1.5]]), "span 0 to 1.5, which is neither 0 to 1 nor whole"),
        (np.float32([[-0.5, 0.5]]), "span -0.5 to 0.5"),
        (np.float32([[0, np.nan]]), "NaN or infinite in places"),
        (np.int32([[0, 70000]]), "span 0 to 70000"),
        (np.int32([[-5, 5]]), "span -5 to 5"),
    ],
)
def test_numbers_of_which_nobody_knows_what_is_white_are_refused(numbers, words):
    data = encoded(Image.fromarray(numbers), "TIFF")
    assert reason_of(lambda: decode(data)) == "unknown-range"
    with pytest.raises(ValueError, match=words):
        decode(data)
    with pytest.raises(ValueError, match=words):
        to_pil(Image.fromarray(numbers))


def png_with(*chunks, picture=None):
    """A PNG with further chunks behind its header."""
    data = encoded(pixels(1)) if picture is None else picture
    chunk = lambda kind, text: struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text))
    return data[:33] + b"".join(chunk(*found) for found in chunks) + data[33:]


def test_a_png_with_long_texts_is_a_picture(tmp_path):
    long = zlib.compress(bytes(3 * 2**20), 9)
    workflow = png_with(
        (b"zTXt", b"workflow\0\0" + long), (b"iTXt", b"prompt\0\1\0\0\0" + long), (b"iCCP", b"p\0\0" + long)
    )
    xmp = b"XML:com.adobe.xmp\0"
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(workflow))
    for data in (
        workflow,
        png_with((b"iTXt", xmp + b"\1\0\0\0" + long)),
        png_with(*[(b"tEXt", b"a\0" + bytes(2**20))] * 65),  # more than PIL takes together
    ):
        (tmp_path / "a.png").write_bytes(data)
        for found in (decode(data), decode(tmp_path / "a.png"), read_image(tmp_path / "a.png")):
            np.testing.assert_array_equal(found, pixels(1))
    # What turns a picture is in a text as well.
    turned = xmp + b'\0\0\0\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    np.testing.assert_array_equal(decode(png_with((b"iTXt", turned))), np.rot90(pixels(1), -1))
    bomb = png_with((b"zTXt", b"workflow\0\0" + long), picture=huge_png(60000, 60000))
    assert reason_of(lambda: decode(bomb)) == "decompression-bomb"
    (tmp_path / "a.png").write_bytes(bomb)
    with pytest.raises(ValueError, match="larger than the limit"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame_or_refused(kind):
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    moving = encoded(red, kind, save_all=True, append_images=[blue], duration=100)
    assert np.asarray(decode(moving))[4, 4].tolist() == pytest.approx([255, 0, 0], abs=3)
    assert reason_of(lambda: decode(moving, animated=False)) == "animated-image"
    decode(encoded(red, kind), animated=False)


@pytest.mark.parametrize("kind", ["TIFF", "MPO"])
def test_pages_and_previews_are_no_animation(kind):
    several = encoded(pixels(1), kind, save_all=True, append_images=[Image.fromarray(pixels(2))])
    assert Image.open(io.BytesIO(several)).is_animated and seed_of(several) == 1
    decode(several, animated=False)


def huge_png(width, height):
    """A PNG of some bytes whose header promises width x height pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("width", "height"), [(60000, 60000), (10000, 10000)]
)  # PIL refuses one, and warns of the other
def test_a_decompression_bomb_is_refused_by_its_header(width, height, monkeypatch):
    def fail(*_):
        pytest.fail("memory was taken for the picture")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", fail)
    assert reason_of(lambda: decode(huge_png(width, height))) == "decompression-bomb"


def test_the_pixel_limit_is_a_choice_and_a_warning_that_is_an_error_counts_too():
    for picture in (encoded(pixels()), pixels()):
        decode(picture, max_pixels=240)
        assert reason_of(lambda picture=picture: decode(picture, max_pixels=239)) == "decompression-bomb"
    with pytest.warns(Image.DecompressionBombWarning):
        reason_of(lambda: decode(huge_png(10000, 10000)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_of(lambda: decode(huge_png(10000, 10000))) == "decompression-bomb"


def test_bad_pictures_have_a_reason_and_a_sentence(tmp_path):
    sound = {kind: encoded(pixels(3, 200, 300), kind) for kind in ("JPEG", "PNG")}
    noise = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    damaged = bytearray(noise)
    damaged[2000:2100] = bytes(100)
    bad = {
        "empty-file": [b""],
        "not-an-image": [
            b"this is text",
            sound["JPEG"][:3],
            sound["PNG"][:12],
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        ],
        "truncated-image": [sound["JPEG"][: len(sound["JPEG"]) // 2], noise[: len(noise) // 2], bytes(damaged)],
    }
    for reason, contents in bad.items():
        for data in contents:
            (tmp_path / "a.jpg").write_bytes(data)
            assert reason_of(lambda data=data: decode(data)) == reason, data[:20]
            assert reason_of(lambda: decode(tmp_path / "a.jpg")) == reason
    assert reason_of(lambda: decode(tmp_path / "none.jpg")) == "missing-image"
    assert reason_of(lambda: decode(tmp_path / "a.jpg" / "b.jpg")) == "missing-image"
    assert reason_of(lambda: decode(tmp_path)) == "unreadable-file"
    assert reason_of(lambda: decode(np.zeros((4, 4, 2), np.uint8))) == "not-an-image"
    with pytest.raises(BadRecord, match=r"The picture .*none.jpg of line 3 of x does not exist"):
        decode(tmp_path / "none.jpg", "line 3 of x")
    with pytest.raises(BadRecord, match=r"The picture of key of x is empty \(0 bytes\)"):
        decode(b"", "key of x")
