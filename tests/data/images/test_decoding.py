"""Every kind of image file becomes RGB of one size, by fixed rules; damaged ones are named."""

import io
import sys
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxcl.data.images.decoding import BadImage, ImageRule, decode_image, pillow, verify_image

WHITE = (255, 255, 255)


def encoded(image, format_="PNG", **options):
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def flat(mode, size, colour):
    return Image.new(mode, size, colour)


def photo(width, height, seed=0):
    """A smooth image, as JPEG compresses noise badly."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def uniform_colour(image, rule=None):
    """The only colour of a decoded image."""
    pixels = decode_image(image, rule or ImageRule(4)).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return tuple(pixels[0].tolist())


@pytest.mark.parametrize("format_", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_a_lossless_file_of_the_right_size_is_kept(format_):
    pixels = np.random.default_rng(0).integers(0, 2, (5, 5, 3), np.uint8) * 255  # for GIF's palette
    options = {"lossless": True} if format_ == "WEBP" else {}
    file = encoded(Image.fromarray(pixels), format_, **options)
    np.testing.assert_array_equal(decode_image(file, ImageRule(5)), pixels)


def test_the_short_side_is_resized_and_the_centre_is_taken():
    image = photo(20, 10)
    wanted = image.resize((16, 8), Image.Resampling.BICUBIC).crop((4, 0, 12, 8))
    np.testing.assert_array_equal(decode_image(encoded(image), ImageRule(8)), np.asarray(wanted))
    image = photo(9, 13)
    wanted = image.resize((6, 6 * 13 // 9), Image.Resampling.BICUBIC).crop((0, 1, 6, 7))
    np.testing.assert_array_equal(decode_image(encoded(image), ImageRule(6)), np.asarray(wanted))


def test_an_image_is_stretched_on_request():
    image = photo(20, 10)
    wanted = image.resize((8, 8), Image.Resampling.BICUBIC)
    found = decode_image(encoded(image), ImageRule(8, "stretch"))
    np.testing.assert_array_equal(found, np.asarray(wanted))


@pytest.mark.parametrize("resize", ["crop", "stretch"])
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
def test_extreme_shapes_take_little_memory(resize, size):
    assert uniform_colour(flat("RGB", size, (7, 8, 9)), ImageRule(16, resize)) == (7, 8, 9)


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (flat("L", (3, 3), 77), (77, 77, 77)),
        (flat("1", (3, 3), 1), WHITE),
        (flat("RGBA", (3, 3), (255, 0, 0, 0)), (0, 0, 200)),
        (flat("RGBA", (3, 3), (255, 0, 0, 255)), (255, 0, 0)),
        (flat("RGBA", (3, 3), (255, 0, 0, 51)), (51, 0, 160)),  # a fifth of red over the background
        (flat("LA", (3, 3), (255, 0)), (0, 0, 200)),
        (flat("I;16", (3, 3), 65535), WHITE),
        (flat("I;16", (3, 3), 257 * 9), (9, 9, 9)),
        (flat("I", (3, 3), 257 * 9), (9, 9, 9)),
        (flat("CMYK", (3, 3), (0, 0, 0, 255)), (0, 0, 0)),
        (flat("CMYK", (3, 3), (0, 255, 255, 0)), (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(image, colour):
    assert uniform_colour(image, ImageRule(4, background=(0, 0, 200))) == colour


def test_a_transparent_palette_shows_the_background():
    image = flat("P", (3, 3), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert uniform_colour(encoded(image)) == (200, 100, 50)
    assert uniform_colour(encoded(image, transparency=1)) == WHITE
    assert uniform_colour(encoded(image, transparency=1), ImageRule(2, background=(1, 2, 3))) == (
        *(1, 2, 3),
    )
    grey = flat("L", (3, 3), 50)
    assert uniform_colour(encoded(grey, transparency=50)) == WHITE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    image = photo(12, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(image, exif=exif.tobytes())
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    np.testing.assert_array_equal(
        decode_image(file, ImageRule(8)), decode_image(upright, ImageRule(8))
    )
    as_stored = decode_image(image, ImageRule(8))
    assert np.array_equal(decode_image(file, ImageRule(8)), as_stored) == (orientation == 1)


def test_a_large_jpeg_is_decoded_at_a_fraction_with_a_small_difference():
    image = photo(1024, 768)
    file = encoded(image, "JPEG", quality=95)
    whole = Image.open(io.BytesIO(file))
    whole.load()
    wanted = decode_image(np.asarray(whole), ImageRule(64)).astype(int)
    difference = np.abs(decode_image(file, ImageRule(64)).astype(int) - wanted)
    assert 0 < difference.max() <= 3
    assert difference.mean() < 0.5
    # 96 is more than half of 150, so nothing is reduced.
    file = encoded(image.resize((200, 150)), "JPEG")
    whole = Image.open(io.BytesIO(file))
    whole.load()
    np.testing.assert_array_equal(
        decode_image(file, ImageRule(96)), decode_image(np.asarray(whole), ImageRule(96))
    )


def test_an_opened_image_is_not_changed():
    image = Image.open(io.BytesIO(encoded(photo(256, 256), "JPEG")))
    decode_image(image, ImageRule(16))
    assert image.size == (256, 256)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
def test_arrays_are_images(shape):
    pixels = np.arange(60, dtype=np.uint8)[: np.prod(shape)].reshape(shape)
    found = decode_image(pixels, ImageRule(4))
    image = Image.fromarray(pixels.reshape(shape[:2]) if shape[2:] in ((), (1,)) else pixels)
    np.testing.assert_array_equal(found, decode_image(image, ImageRule(4)))


WHOLE = {format_: encoded(photo(64, 48), format_) for format_ in ("JPEG", "PNG", "WEBP", "GIF")}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "empty"),
        (b"no image", "not an image file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image file"),
        (WHOLE["JPEG"][:400], "(?i)truncated"),
        (WHOLE["PNG"][:200], "(?i)truncated"),
        (WHOLE["WEBP"][:100], "."),
        (np.zeros((2, 2, 2), np.uint8), r"uint8 array of shape \(2, 2, 2\)"),
        (np.zeros((2, 2)), "float64 array"),
        (np.zeros((0, 2), np.uint8), "."),
        (flat("F", (2, 2), 0.5), "floating-point"),
        (flat("I", (2, 2), 70_000), "beyond 16 bits"),
        (3, "of type int"),
        ("cat.jpg", "of type str"),
    ],
)
def test_what_cannot_be_decoded_has_a_reason(value, reason):
    with pytest.raises(BadImage, match=reason):
        decode_image(value, ImageRule(4))


@pytest.mark.parametrize("format_", WHOLE)
def test_damage_never_ends_in_another_error(format_):
    rng = np.random.default_rng(0)
    reasons = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            damaged = bytearray(WHOLE[format_])
            for position in rng.integers(0, len(damaged), 8):
                damaged[position] = rng.integers(256)
            try:
                verify_image(bytes(damaged))
                decode_image(bytes(damaged), ImageRule(4))
            except BadImage as error:
                reasons.append(str(error))
    assert all(reasons)
    assert len(reasons) > 3
    assert not [reason for reason in reasons if "0x" in reason]  # an address differs between hosts


def test_every_damaged_png_is_found():
    for position in range(60, len(WHOLE["PNG"]), 97):  # Pillow decodes most of these
        damaged = bytearray(WHOLE["PNG"])
        damaged[position] ^= 1
        with pytest.raises(BadImage, match=r"\w"):
            verify_image(bytes(damaged))
    for value in (*WHOLE.values(), np.zeros((2, 2), np.uint8), flat("L", (2, 2), 0)):
        verify_image(value)


@pytest.mark.parametrize("pixels", [48, 100])  # Pillow warns from its limit, and fails from twice
def test_a_decompression_bomb_is_an_error(monkeypatch, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadImage, match=r"more pixels than PIL\.Image\.MAX_IMAGE_PIXELS"):
            decode_image(encoded(photo(10, 10)), ImageRule(4))


def test_a_bomb_that_python_reports_as_a_warning_is_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)  # pytest turns warnings into errors
    with pytest.raises(BadImage, match="more pixels than"):
        decode_image(encoded(photo(10, 10)), ImageRule(4))


def test_files_of_other_colours_become_rgb():
    grey = photo(600, 400).convert("L")
    found = decode_image(encoded(grey, "JPEG", quality=95), ImageRule(32))  # at a fraction
    assert (found == found[..., :1]).all()
    wanted = decode_image(grey, ImageRule(32)).astype(int)
    assert np.abs(found - wanted).max() <= 3
    cmyk = encoded(flat("CMYK", (600, 400), (0, 255, 255, 0)), "JPEG", quality=100)
    red = decode_image(cmyk, ImageRule(32)).astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 3
    deep = Image.fromarray(np.full((4, 4), 257 * 40 + 100, np.uint16))
    assert uniform_colour(encoded(deep)) == (40, 40, 40)
    assert uniform_colour(encoded(deep, "TIFF")) == (40, 40, 40)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [flat("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for format_ in ("GIF", "WEBP"):
        options = {"lossless": True} if format_ == "WEBP" else {}
        file = encoded(frames[0], format_, save_all=True, append_images=frames[1:], **options)
        assert uniform_colour(file) == (255, 0, 0)


def test_a_missing_pillow_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match=r'not installed; run pip install "jaxcl\[images\]"'):
        pillow.__wrapped__()
