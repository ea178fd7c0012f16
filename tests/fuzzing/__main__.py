"""``python -m tests.fuzzing TARGET [FOLDER] [libFuzzer's options]``: fuzzing that is guided by which lines have been reached.

It takes Atheris (``make fuzz`` installs it). What reaches new lines is written to FOLDER, and can be added to ``tests/corpus``,
with ``-merge=1`` as few files as possible. What raises is written to ``crash-…``, and is to become a test.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["sidecar", "trunkline"]):
    from tests.fuzzing import targets


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in targets.TARGETS:
        sys.exit(f"{__doc__}\ntargets: {', '.join(targets.TARGETS)}")
    name = sys.argv.pop(1)
    atheris.Setup([*sys.argv, str(targets.CORPUS / name)], targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
