"""Environments for functions: what their images would have installed, and so no torch. One per set of requirements."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from sidecar.errors import ConfigError
from sidecar.processes import die_with_parent

_ABANDONED_S = 3600.0


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
    _remove_abandoned(root)
    temporary = root / f"{digest}.part-{secrets.token_hex(4)}"
    tell(f"[setup] installing what the functions need into {final}")
    try:
        _run([sys.executable, "-m", "venv", str(temporary)], tell)
        arguments = [argument for path in requirements if path.is_file() for argument in ("--requirement", str(path))]
        python = str(temporary / "bin" / "python")
        options = ["--no-compile", "--progress-bar=off", "--disable-pip-version-check"]
        _run([python, "-m", "pip", "install", *options, *arguments], tell)
        _run([python, "-m", "compileall", "-q", str(temporary / "lib")], tell, may_fail=True)
        try:
            temporary.rename(final)
        except OSError:
            # Somebody else was quicker; theirs is as good.
            if not interpreter.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return interpreter


def _remove_abandoned(root: Path) -> None:
    # What a killed installation left behind. One that is under way is younger.
    for path in root.glob("*.part-*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(path, ignore_errors=True)


def _run(command: list[str], tell: Callable[[str], None], *, may_fail: bool = False) -> None:
    parent = os.getpid()
    last: deque[str] = deque(maxlen=5)
    process = subprocess.Popen(
        command,
        env=_clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=lambda: die_with_parent(parent),
    )
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                last.append(line.strip())
                tell(f"[setup] {line.rstrip()}")
        except BaseException:
            process.kill()
            raise
    if process.returncode and not may_fail:
        raise ConfigError(f"`{' '.join(command[:5])} …` ended with {process.returncode}: {' | '.join(last)}")


def _clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON") and key != "VIRTUAL_ENV"}
