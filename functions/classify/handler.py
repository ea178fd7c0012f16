"""classify: a JPEG or PNG picture to its five most probable ImageNet labels."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from trunkline import model
from trunkline.errors import BodyTooLarge, InvalidInput

m = model("classify")
LABELS = [line for line in Path(__file__).with_name("labels.txt").read_text().splitlines() if line[0] != "#"]
# Decoding this many takes up to 130 MB, and the function has a memory limit.
MAX_PIXELS = 2**24


def square(body, side=224):
    """Return the middle of the picture as RGB bytes [side, side, 3], upright, on white where it is transparent."""
    try:
        picture = Image.open(io.BytesIO(body), formats=("JPEG", "PNG"))
        if (pixels := picture.width * picture.height) > MAX_PIXELS:
            raise BodyTooLarge(f"the picture has {pixels} pixels, at most {MAX_PIXELS} are taken", pixels=pixels)
        picture.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
        picture = ImageOps.exif_transpose(picture)
    except Image.DecompressionBombError as error:
        raise BodyTooLarge(f"the picture is too large, at most {MAX_PIXELS} pixels are taken") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidInput(f"the body of {len(body)} bytes is no JPEG or PNG picture: {error}", bytes=len(body)) from error
    if picture.mode.startswith("I"):  # 16-bit greyscale
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    # The model was trained and measured on the middle 7/8 of the shorter side.
    cut = min(picture.size) * 7 / 16
    x, y = picture.width / 2, picture.height / 2
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture = picture.resize((side, side), Image.Resampling.BICUBIC, box=(x - cut, y - cut, x + cut, y + cut))
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture if picture.mode == "RGBA" else None)
    return np.asarray(white)


def handle(event, context):
    pixels = square(event.body)
    with m.request() as request:
        image = request["image"][0]
        np.subtract(pixels.transpose(2, 0, 1), np.float32(127), out=image)
        image /= 128
        probabilities = request.run()[0]
    best = probabilities.argsort()[:-6:-1]
    return {"statusCode": 200, "body": [{"label": LABELS[i], "probability": float(probabilities[i])} for i in best]}
