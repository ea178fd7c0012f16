"""Environments for functions: what their images would have installed, and so no torch. One per set of requirements."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sidecar.errors import ConfigError


def ensure_environment(requirements: list[Path], root: Path, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Return the interpreter of an environment with ``requirements``, making it when there is none yet.

    Functions with equal requirements share one, and with it the memory of every library in it. It is made aside
    and renamed when it is complete, so an installation that was interrupted is never taken for one that was not.
    Raises ConfigError when pip fails.
    """
    texts = [path.read_text() for path in requirements if path.is_file()]
    digest = hashlib.sha256("\0".join([sys.version, *texts]).encode()).hexdigest()[:16]
    final = root / digest
    interpreter = final / "bin" / "python"
    if interpreter.exists():
        return interpreter
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f"{digest}.part-{secrets.token_hex(4)}"
    tell(f"installing what the functions need into {final}")
    try:
        _run([sys.executable, "-m", "venv", str(temporary)])
        arguments = [argument for path in requirements if path.is_file() for argument in ("--requirement", str(path))]
        _run([str(temporary / "bin" / "python"), "-m", "pip", "install", "--quiet", *arguments])
        _run([str(temporary / "bin" / "python"), "-m", "compileall", "-q", str(temporary / "lib")], may_fail=True)
        try:
            temporary.rename(final)
        except OSError:
            # Somebody else was quicker; theirs is as good.
            if not interpreter.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return interpreter


def _run(command: list[str], *, may_fail: bool = False) -> None:
    done = subprocess.run(command, env=_clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-5:]
        raise ConfigError(f"`{' '.join(command[:5])} …` ended with {done.returncode}: {' | '.join(last)}")


def _clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON") and key != "VIRTUAL_ENV"}
