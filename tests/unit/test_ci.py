"""What ``CI`` changes for the tests: nothing is skipped for what is missing, and properties are tried as elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest
from hypothesis import settings

def test_that_misses_a_program(): pytest.skip("no frobnicate: apt-get install frob")

@pytest.mark.skipif(True, reason="no cores")
def test_that_misses_cores(): ...

@pytest.fixture
def root(): pytest.skip("not root")

def test_that_misses_a_right(root): ...

def test_that_misses_a_package(): pytest.importorskip("no_such_package")

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="needs a CUDA device")
def test_that_misses_a_device(): ...

@pytest.mark.xfail
def test_that_is_known_to_fail(): assert False

def test_that_tells_its_settings():
    made = settings()
    print("settings", made.derandomize, made.deadline, made.suppress_health_check, made.max_examples)
"""


def told(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """Run the tests above as ours are run, with nothing else that tells of a machine; what pytest says, line by line."""
    (folder / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-rP", "-p", "tests.conftest", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    needed = {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, "-c", os.devnull, *arguments, "test_some.py"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **needed, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines()


def test_what_is_skipped_elsewhere_fails_but_for_cuda(tmp_path: Path) -> None:
    assert "= 1 passed, 5 skipped, 1 xfailed" in told(tmp_path)[-1]
    lines = told(tmp_path, CI="1")
    assert "= 2 failed, 1 passed, 1 skipped, 1 xfailed" in lines[-1]
    # Those that were to be skipped before they began.
    assert "2 errors" in lines[-1]
    for reason in ("no frobnicate: apt-get install frob", "no cores", "not root"):
        assert f"not to be skipped where CI is set: Skipped: {reason}" in lines


def test_properties_are_tried_as_elsewhere(tmp_path: Path) -> None:
    for arguments, is_same_each_time in (((), True), (("--nightly",), False)):
        here, there = (told(tmp_path, *arguments, **environment) for environment in ({}, {"CI": "1"}))
        expected = f"settings {is_same_each_time} 0:00:00.200000 () 100"
        assert expected in here
        assert expected in there
