"""Pictures in, pixels out: what the classifier was trained to see. Bounded in memory whatever the body holds."""

import io
import struct

import numpy as np
from PIL import Image, ImageOps
from trunkline.errors import BodyTooLarge, InvalidInput

# Decoding this many takes up to 130 MB, and a function has a memory limit.
MAX_PIXELS = 2**24
# All that Pillow raises for a damaged picture; struct.error comes from EXIF.
DAMAGED = (OSError, SyntaxError, ValueError, struct.error)


def decode(body, side):
    """Return the JPEG or PNG picture in ``body``, upright; a large JPEG in a smaller size of at least twice ``side``.

    Raises InvalidInput when there is no such picture in it, BodyTooLarge when it has more than MAX_PIXELS.
    """
    try:
        picture = Image.open(io.BytesIO(body), formats=("JPEG", "PNG"))
        if (pixels := picture.width * picture.height) > MAX_PIXELS:
            raise BodyTooLarge(
                f"the picture has {pixels} pixels, at most {MAX_PIXELS} are taken", pixels=pixels, maximum=MAX_PIXELS
            )
        picture.draft("RGB", (2 * side, 2 * side))
        return ImageOps.exif_transpose(picture)
    except Image.DecompressionBombError as error:
        raise BodyTooLarge(f"at most {MAX_PIXELS} pixels are taken: {error}", maximum=MAX_PIXELS) from error
    except Image.UnidentifiedImageError as error:
        raise InvalidInput(f"the body of {len(body)} bytes is not a JPEG or PNG picture", body_bytes=len(body)) from error
    except DAMAGED as error:
        raise InvalidInput(f"the picture of {len(body)} bytes is damaged: {error}", body_bytes=len(body)) from error


def square(body, side=224):
    """Return the middle of the picture as RGB values from 0 to 255, shape [side, side, 3], white where transparent."""
    picture = decode(body, side)
    if picture.mode.startswith("I"):  # greyscale of 16 bits, which convert() would clip to 8
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    # The middle 7/8 of the shorter side, bicubic: how the model's published accuracy was measured.
    cut = min(picture.size) * 7 / 16
    x, y = picture.width / 2, picture.height / 2
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture = picture.resize((side, side), Image.Resampling.BICUBIC, box=(x - cut, y - cut, x + cut, y + cut))
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture if picture.mode == "RGBA" else None)
    return np.asarray(white)
