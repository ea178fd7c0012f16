"""What the sample functions do before a model is asked: reading pictures and texts. No sidecar, no torch."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trunkline.errors import BodyTooLarge, InvalidInput

from functions.classify import picture
from functions.classify.handler import LABELS
from functions.embed import texts
from functions.route.handler import INTENTS

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = ROOT / "functions"
TEXT_FUNCTIONS = ("embed", "similar", "route")
RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    body = io.BytesIO()
    image.save(body, kind, **options)
    return body.getvalue()


def left_red_right_blue(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height))
    return image


def png_of_size(width: int, height: int) -> bytes:
    """A picture whose header promises more than its body holds."""
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    chunk = len(header).to_bytes(4) + b"IHDR" + header + zlib.crc32(b"IHDR" + header).to_bytes(4)
    pixels = zlib.compress(b"")
    data = len(pixels).to_bytes(4) + b"IDAT" + pixels + zlib.crc32(b"IDAT" + pixels).to_bytes(4)
    return b"\x89PNG\r\n\x1a\n" + chunk + data


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_becomes_the_middle_of_its_shorter_side() -> None:
    image = Image.new("RGB", (400, 200), "white")
    image.paste(RED, (100, 0, 300, 200))
    pixels = picture.square(encoded(image))
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == RED).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_orientation_a_camera_noted_is_applied(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture must be turned by 90 degrees clockwise: what was left is now on top
    pixels = picture.square(encoded(left_red_right_blue(300, 300), kind, exif=exif)).astype(int)
    assert abs(pixels[20, 112] - RED).max() < 30
    assert abs(pixels[200, 112] - BLUE).max() < 30


def test_transparent_is_white() -> None:
    image = Image.new("RGBA", (50, 50), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 25, 50))
    pixels = picture.square(encoded(image))
    assert (pixels[112, 200] == 255).all()
    assert (pixels[112, 20] == BLUE).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_picture_becomes_rgb(mode: str) -> None:
    grey = Image.new("L", (40, 30), 255)
    if mode == "I;16":
        image = Image.fromarray(np.full((30, 40), 65535, np.uint16))
    else:
        image = grey.convert(mode) if mode != "CMYK" else grey.convert("RGB").convert("CMYK")
    pixels = picture.square(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert pixels.shape == (224, 224, 3)
    assert (pixels > 250).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    pixels = picture.square(encoded(Image.fromarray(np.full((30, 40), 0x8000, np.uint16))))
    assert (pixels == 0x80).all()


def test_a_palette_with_a_transparent_colour_is_white_there() -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert (picture.square(encoded(image, transparency=1)) == 255).all()


def test_a_large_jpeg_is_decoded_small() -> None:
    assert picture.decode(encoded(Image.new("RGB", (3000, 2000)), "JPEG"), 224).size == (750, 500)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(5000, 4000), (12000, 12000), (60000, 60000)], ids=["ours", "warned", "pillow's"])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    with pytest.raises(BodyTooLarge, match=str(width * height)):
        picture.square(png_of_size(width, height))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "of 0 bytes"),
        (b"hello", "of 5 bytes"),
        (b"GIF89a" + bytes(20), "not a JPEG or PNG"),
        (png_of_size(10, 10), "damaged"),
        (encoded(Image.effect_noise((90, 90), 50), "JPEG")[:-500], "damaged"),
        (b"\x89PNG\r\n\x1a\n", "not a JPEG or PNG"),
    ],
    ids=["empty", "text", "gif", "no pixels", "cut off", "signature only"],
)
def test_what_is_no_picture_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        picture.square(body)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_pictures_never_raise_anything_else() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    image = left_red_right_blue(30, 20)
    whole = [
        encoded(image, "JPEG", exif=exif),
        encoded(image, "JPEG", progressive=True),
        encoded(image, exif=exif),
        encoded(image.convert("P"), transparency=0),
    ]
    chosen = np.random.default_rng(3)
    for _ in range(1500):
        body = bytearray(whole[chosen.integers(len(whole))])
        for _ in range(chosen.integers(1, 8)):
            body[chosen.integers(min(len(body), 400))] = chosen.integers(256)
        with contextlib.suppress(InvalidInput, BodyTooLarge):
            assert picture.square(bytes(body)).shape == (224, 224, 3)


def test_there_is_a_label_for_each_class() -> None:
    assert len(LABELS) == 1000
    assert LABELS[0] == "tench, Tinca tinca"
    assert LABELS[-1].startswith("toilet tissue")
    assert all(LABELS)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_models_vocabulary() -> None:
    assert texts.token_ids(["Hello, wörld!", "unaffable"], 256) == [
        [101, 7592, 1010, 2088, 999, 102],
        [101, 14477, 20961, 3468, 102],
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "text 1 of 0 characters has no word"),
        (" \t\n", "no word"),
        ("\x00", "no word"),
        ("\ud800", "not valid Unicode at character 0"),
        (None, "of type NoneType"),
        ("word " * 300, "text 1 has 302 tokens, the model takes at most 256"),
        ("word " * 100_000, "text 1 has 500000 characters, the model takes at most 16384"),
    ],
    ids=["empty", "blank", "control", "surrogate", "none", "long", "huge"],
)
def test_texts_that_say_nothing_or_too_much_are_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        texts.token_ids(["fine", text], 256)


def test_the_longest_text_is_as_long_as_the_model_takes() -> None:
    assert len(texts.token_ids(["word " * 254], 256)[0]) == 256


@pytest.mark.parametrize("body", [b"", b"\xff", b"[1]", b'"text"', b"null", b"[" * 100_000, b'{"a": '])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput, match="JSON"):
        texts.read_json(body)


def test_text_that_is_not_utf8_is_refused_with_the_place() -> None:
    assert texts.read_text("grün".encode()) == "grün"
    with pytest.raises(InvalidInput, match="at byte 2"):
        texts.read_text("grün".encode("latin-1"))


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["texts.py", "vocab.txt", "requirements.txt"])
def test_functions_on_one_trunk_hold_equal_copies(name: str) -> None:
    assert len({(FUNCTIONS / function / name).read_bytes() for function in TEXT_FUNCTIONS}) == 1


def test_handlers_load_no_torch() -> None:
    program = (
        "import sys\n"
        "from functions.classify import handler\n"
        "from functions.embed import handler\n"
        "from functions.similar import handler\n"
        "from functions.route import handler\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'sidecar'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_every_question_has_four_wordings_and_every_desk_twelve_questions() -> None:
    lines = [line for line in (FUNCTIONS / "questions.txt").read_text().splitlines() if not line.startswith("#")]
    rows = [[part.strip() for part in line.split("|")] for line in lines]
    assert all(len(row) == 5 and all(row) for row in rows)
    assert sorted(row[0] for row in rows) == sorted(INTENTS * 12)
    wordings = [text.lower() for row in rows for text in row[1:]]
    assert len(set(wordings)) == len(wordings)
