"""Mutants of a corpus, from a seed: the same ones on every machine."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Final

MOST_BYTES: Final = 64 * 1024
_SPAN: Final = 24
# Of numbers and texts in JSON; what is between them stays, so that mutants get past the first line of a reader.
_TOKEN: Final = re.compile(rb'-?\d+(?:\.\d+)?(?:e-?\d+)?|"[^"]{0,80}"|[\[\]{}:,]')
_ODD: Final = (
    *(b"0", b"-1", b"1e999", b"-0.0", b"NaN", b"null", b"true", b'""', b"[]", b"{}", b'"../x"', b'"\\u0000"', b'"\xff"'),
    *(str(2**power + more).encode() for power in (7, 8, 15, 16, 31, 32, 62, 63, 64) for more in (-1, 0)),
    # Of msgpack: arrays, maps, texts and bytes that claim to be long, extensions, nothing that is defined.
    *(b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc1", b"\xd4\x05x"),
    *(b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff", b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00", b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00"),
)


def mutants(corpus: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Yield ``count`` mutants of what is in ``corpus``, of up to six changes each."""
    chance = random.Random(seed)
    tokens = sorted({token for data in corpus for token in _TOKEN.findall(data)}) or [b"0"]
    for _ in range(count):
        data = bytearray(chance.choice(corpus))
        for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
            _change(data, chance, corpus, tokens)
        yield bytes(data[:MOST_BYTES])


def _change(data: bytearray, chance: random.Random, corpus: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    at = chance.randrange(len(data) + 1)
    end = min(len(data), at + chance.randrange(_SPAN))
    match chance.randrange(10):
        case 0 if data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        case 1 if data:
            data[at % len(data)] = chance.randrange(256)
        case 2:
            data[at:at] = chance.randbytes(chance.randrange(1, 6))
        case 3:
            del data[at:end]
        case 4:
            data[at:at] = data[at:end] * chance.choice((1, 2, 300))
        case 5:
            other = chance.choice(corpus)
            begin = chance.randrange(len(other) + 1)
            data[at:end] = other[begin : begin + chance.randrange(4 * _SPAN)]
        case 6:
            del data[at:]
        case 7:
            data[at:end] = chance.choice(_ODD)
        case 8 if data and 0x90 <= data[0] < 0x9F:
            # An array of msgpack that says it has one element more, and has.
            data[0] += 1
            data.append(chance.randrange(128))
        case _:
            # The next token from here on becomes another one.
            if found := _TOKEN.search(data, at):
                data[found.start() : found.end()] = chance.choice((chance.choice(tokens), chance.choice(_ODD)))
