"""Texts in, token ids out: what every function on the MiniLM trunk does before the model. Not torch, not transformers.

The functions that need this file and its vocabulary hold equal copies of both, because faas-cli packs one folder only.
vocab.txt is BERT's uncased English vocabulary, as all-MiniLM-L6-v2 (Apache-2.0) ships it.
"""

import json
from pathlib import Path

from tokenizers.implementations import BertWordPieceTokenizer
from trunkline.errors import InvalidInput

TOKENIZER = BertWordPieceTokenizer(str(Path(__file__).with_name("vocab.txt")), lowercase=True)
# A megabyte of text takes 300 MB while it is split into tokens, and a function has a memory limit.
MAX_CHARACTERS_PER_TOKEN = 64


def read_json(body):
    """Return the JSON object in ``body``. Raises InvalidInput when it holds something else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the body of {len(body)} bytes is not JSON: {error}", body_bytes=len(body)) from error
    if not isinstance(value, dict):
        raise InvalidInput(f"the body must be a JSON object, not {type(value).__name__}", body_bytes=len(body))
    return value


def read_text(body):
    """Return ``body`` as text. Raises InvalidInput when it is not UTF-8."""
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the body is not UTF-8 at byte {error.start}", at_byte=error.start) from error


def token_ids(texts, maximum):
    """Return a list of token ids for each text, [CLS] and [SEP] included.

    Raises InvalidInput for a text that is no string, has no word in it, or has more than ``maximum`` tokens.
    """
    rows = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidInput(f"text {number} is of type {type(text).__name__}, not a string", text=number)
        _refuse_above(maximum * MAX_CHARACTERS_PER_TOKEN, len(text), "characters", number)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"text {number} is not valid Unicode at character {error.start}", text=number) from error
        row = TOKENIZER.encode(text).ids
        if len(row) <= 2:
            raise InvalidInput(f"text {number} of {len(text)} characters has no word in it", text=number)
        _refuse_above(maximum, len(row), "tokens", number)
        rows.append(row)
    return rows


def _refuse_above(maximum, count, what, number):
    if count > maximum:
        raise InvalidInput(
            f"text {number} has {count} {what}, the model takes at most {maximum}",
            text=number,
            count=count,
            maximum=maximum,
        )


def run(model, texts):
    """Run ``model`` on ``texts``, padded to the longest, in one call; return its output, one row per text."""
    limits = model.signature.symbols
    if not 1 <= len(texts) <= limits["batch"][1]:
        raise InvalidInput(
            f"{len(texts)} texts were given, the model takes 1 to {limits['batch'][1]}",
            texts=len(texts),
            maximum=limits["batch"][1],
        )
    rows = token_ids(texts, limits["tokens"][1])
    with model.request(batch=len(rows), tokens=max(map(len, rows))) as request:
        ids, mask = request["input_ids"], request["attention_mask"]
        ids[...] = mask[...] = 0
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        return request.run()
