"""Pictures of every kind, and what happens to bad ones."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from picture_files import encoded, pixels, reason_of, seed_of
from PIL import Image, ImageFile

from unipic2_jax.data.images import decode
from unipic2_jax.data.records import BadRecord


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
