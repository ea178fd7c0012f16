"""The second wall: in a process of its own, because nobody can take it down again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
BEGIN = """
import ast, collections, ctypes, logging, os, pickle, subprocess, sys, threading, traceback
logging.basicConfig(format="%(name)s %(levelname)s %(message)s")
from sidecar import wall
payload = pickle.dumps(os.getcwd)
code = compile("marker.append(1)", "a bundle", "exec")
marker = []
wall.build()
def refused(what):
    try:
        what()
    except PermissionError as error:
        print(error)
    else:
        print("done")
"""


def run(text: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline:{folder}", "PATH": "/bin:/usr/bin"}
    return subprocess.run(
        [sys.executable, "-c", BEGIN + text], capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment
    )


@pytest.mark.row("T7")
@pytest.mark.parametrize(
    ("tried", "event"),
    [
        ("pickle.loads(payload)", "pickle.find_class"),
        ("os.system('true')", "os.system"),
        ("subprocess.run(['true'])", "subprocess.Popen"),
        ("os.posix_spawn('/bin/true', ['true'], {})", "os.posix_spawn"),
        ("os.execv('/bin/true', ['true'])", "os.exec"),
        ("os.fork()", "os.fork"),
        ("os.forkpty()", "os.forkpty"),
        ("ctypes.CDLL(None)", "ctypes.dlopen"),
        ("exec(code)", "exec"),
        ("eval('1 + 1')", "exec"),
        ("collections.namedtuple('Made', 'of text')", "exec"),
    ],
)
def test_what_an_engine_never_does_is_refused_and_told(tried: str, event: str) -> None:
    ended = run(f"refused(lambda: {tried})\nprint(marker)")
    assert ended.stdout == f"{event} is refused in the engine\n[]\n"
    first, *trace = ended.stderr.splitlines()
    assert first == f"trunkline.wall ERROR {event} was tried in the engine, which never does that, and is refused"
    assert trace[0] == "Stack (most recent call last):"


def test_what_it_does_is_let_be(tmp_path: Path) -> None:
    """Modules are imported when they are needed, those that make classes of text too; traces are written; threads begin."""
    (tmp_path / "late.py").write_text(
        "import collections, dataclasses\nMade = collections.namedtuple('Made', 'a')\n"
        "@dataclasses.dataclass\nclass Other:\n    b: int\n"
    )
    ended = run(
        """
def late():
    import late
    print(late.Made(1).a, late.Other(2).b)
refused(late)
refused(lambda: ast.parse("1 + 1"))
def trace():
    try:
        (1 / 0)
    except ZeroDivisionError:
        traceback.format_exc()
refused(trace)
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
""",
        tmp_path,
    )
    assert ended.stdout == "1 2\ndone\ndone\ndone\nthread\n"
    assert not ended.stderr


def test_whoever_tries_again_and_again_cannot_fill_the_log() -> None:
    ended = run("for _ in range(100): refused(os.fork)")
    assert ended.stdout.count("refused") == 100
    assert 1 <= ended.stderr.count("was tried in the engine") <= 15
