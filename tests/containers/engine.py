"""A container engine: docker, as its command line has it."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from typing import Any


def docker(*arguments: str, **options: Any) -> str:
    """Run docker; return what it printed."""
    done = subprocess.run(["docker", *arguments], stdout=subprocess.PIPE, check=False, text=True, **options)
    assert done.returncode == 0, f"docker {' '.join(arguments)[:200]} ended with {done.returncode}"
    return done.stdout.strip()


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[str]:
    """Run a container until the block ends; yield its id."""
    container = docker("run", "--detach", *arguments)
    try:
        yield container
    except BaseException:
        print(docker("logs", container, stderr=subprocess.STDOUT))
        raise
    finally:
        docker("rm", "--force", "--volumes", container)


def state(container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("inspect", container))[0]["State"]
    return found
