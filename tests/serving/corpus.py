"""Requests that mean harm or are broken."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from tests.serving.small import SIZE, bomb, picture


def corpus(count: int) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """Broken requests, the same every time: path, body, headers."""
    chance = random.Random(0)
    good = [picture((9, 99, 199), kind, (300, 200)) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")]
    tensor = json.dumps(
        {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 3, SIZE, SIZE], "data": [0.5] * 3 * SIZE**2}]}
    ).encode()
    bombs = [bomb(20_000, 20_000), bomb(7000, 7000), bomb(60_000, 700)]
    for number in range(count):
        kind = number % 5
        seed = bytearray(chance.choice([*bombs, *good] if kind < 3 else [tensor]))
        if kind == 0:
            del seed[chance.randrange(len(seed)) :]
        elif kind in (1, 3):
            for _ in range(chance.randrange(1, 20)):
                seed[chance.randrange(min(len(seed), 2000))] = chance.randrange(256)
        elif kind == 4:
            at = chance.randrange(len(seed))
            seed[at:at] = chance.choice([b"NaN", b"[", b"{", b"1e999", b"\\ud800", b'"', b"-", b"\0", b"9" * 5000])
        headers = chance.choice(
            [
                {}, {"content-encoding": "gzip"}, {"content-encoding": "x"}, {"content-type": "image/png"},
                {"content-type": "multipart/form-data; boundary=x"}, {"content-type": "multipart/form-data"},
                {"content-type": "multipart/form-data; boundary=" + "y" * 300, "x": "y"},
                {"inference-header-content-length": str(chance.randrange(-5, 5000))},
            ]
        )  # fmt: skip
        routes = ["/v1/classify", "/v1/explain"] if kind < 3 else ["/v2/models/other/infer"]
        query = chance.choice(["", "", "", "?top_k=-1", "?model=%00", "?model=" + "x" * 3000, "?target=%ff"])
        yield chance.choice(routes) + query, bytes(seed), headers
