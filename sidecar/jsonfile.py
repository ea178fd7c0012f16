"""Small JSON files that outlive the engine: what operators said, and where things were. Replaced as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path, missing: Any) -> Any:
    """Return what a file holds, or ``missing`` where there is none. Raises OSError; ValueError when that is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return missing
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def replace_json(path: Path, plain: object) -> None:
    """Write a file in place of what was there; who reads meanwhile, or after a crash, finds one or the other. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(plain))
    os.replace(temporary, path)
