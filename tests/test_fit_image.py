"""`fit_image`: one image of any mode, size and orientation, as training sees it."""

import numpy as np
import pytest
from helpers import noise_image
from PIL import Image

from dataset import fit_image


def test_an_image_of_the_right_size_is_untouched():
    image = noise_image(0)
    ours = fit_image(image, image_size=8, channels=3)
    assert np.array_equal(ours, np.asarray(image).transpose(2, 0, 1))


def test_crop_is_the_centre_and_never_stretches():
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    assert (fit_image(Image.fromarray(pixels), image_size=8, channels=3) == 255).all()
    assert fit_image(Image.fromarray(pixels), image_size=4, channels=3).min() > 230


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pad_keeps_all_and_never_stretches(channels):
    image = Image.new("RGB", (40, 20), "white")
    pixels = fit_image(image, image_size=16, channels=channels, fit="pad")
    assert pixels.shape == (channels, 16, 16)
    assert (pixels[:, 4:12] == 255).all()
    assert not pixels[:, :4].any()  # black, and clear where there is alpha
    assert not pixels[:, 12:].any()
    square = noise_image(0, (16, 16))
    for fit in ("crop", "pad"):
        same = fit_image(square, image_size=16, channels=3, fit=fit)
        assert np.array_equal(same, np.asarray(square).transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_crop_and_pad_to_another_shape_are_slices(channels):
    """Where no side has to be resized."""
    image = noise_image(0, (20, 12))
    pixels = fit_image(image, image_size=(12, 20), channels=channels)  # height, width
    assert pixels.shape == (channels, 12, 20)
    for size, part in (((12, 8), pixels[:, :, 6:14]), ((6, 20), pixels[:, 3:9])):
        assert np.array_equal(fit_image(image, image_size=size, channels=channels), part)
    for size, at in (((12, 30), np.s_[:, :, 5:25]), ((16, 20), np.s_[:, 2:14])):
        padded = np.zeros((channels, *size), np.uint8)
        padded[at] = pixels
        padded_too = fit_image(image, image_size=size, channels=channels, fit="pad")
        assert np.array_equal(padded_too, padded)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [(50, 30), (30, 50), (7, 9), (24, 16)])
@pytest.mark.parametrize("target", [(12, 20), (16, 8), (8, 8)])
def test_transposed_images_become_transposed_arrays(target, size, fit):
    image = noise_image(1, size).point(lambda value: 96 + value // 4)  # no pass clips them
    ours = fit_image(image, image_size=target, channels=3, fit=fit)
    theirs = image.transpose(Image.Transpose.TRANSPOSE)
    theirs = fit_image(theirs, image_size=target[::-1], channels=3, fit=fit).transpose(0, 2, 1)
    assert np.abs(ours.astype(int) - theirs).max() <= 2  # between its two passes Pillow rounds


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "PA", "HSV", "I", "F", "I;16"]
)
def test_every_mode_becomes_any_channels(mode, channels):
    white = {"1": 1, "L": 255, "P": 0, "PA": (0, 255), "LA": (255, 255), "CMYK": (0, 0, 0, 0)}
    white |= {"I": 65535, "F": 1.0, "I;16": 65535, "YCbCr": (255, 128, 128), "HSV": (0, 0, 255)}
    image = Image.new(mode, (12, 8), white.get(mode, "white"))
    if mode in ("P", "PA"):
        image.putpalette([255] * 768)
    assert (fit_image(image, image_size=8, channels=channels) == 255).all()


def test_shrinking_is_antialiased():
    pixels = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)  # a fine chequerboard
    gray = fit_image(Image.fromarray(pixels), image_size=8, channels=1)
    assert abs(gray.astype(int) - 127).max() < 12


def test_odd_files_come_out_right():
    gray16 = Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16))
    assert (fit_image(gray16, image_size=8, channels=3) // 2 == 63).all()

    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (fit_image(clear, image_size=8, channels=3) == 255).all()  # on white
    assert fit_image(clear, image_size=8, channels=4)[3].max() == 0

    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert fit_image(palette, image_size=8, channels=3)[:, 0, 0].tolist() == [10, 20, 30]

    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert fit_image(cmyk, image_size=8, channels=3)[:, 0, 0].tolist() == [0, 255, 255]

    turned = Image.new("RGB", (8, 8))
    turned.paste((255, 255, 255), (0, 0, 8, 4))  # the upper half is white
    turned.getexif()[0x0112] = 3  # "upside down"
    upright = fit_image(turned, image_size=8, channels=1)[0]
    assert upright[:4].max() == 0
    assert upright[4:].min() == 255

    gray = noise_image(0, mode="L")
    assert np.array_equal(fit_image(gray, image_size=8, channels=3)[1], np.asarray(gray))
