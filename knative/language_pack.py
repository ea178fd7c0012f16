"""``python -m knative.language_pack FOLDER``: the language pack for func with the client in it, as a git repository of its own.

A function made from this repository as it is gets the client from PyPI. One made from what this writes has it in its folder
``client``, taken from its one source, ``template/python3-trunkline``, and builds without it being published anywhere.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "template" / "python3-trunkline"
TEMPLATE = Path("knative") / "python" / "trunkline"
PUBLISHED = '"trunkline-client[frame]>=0.1,<0.2"'
ENCLOSED = '"trunkline-client[frame] @ {root:uri}/client"'
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info")
_GIT = ("git", "-c", "user.name=trunkline", "-c", "user.email=trunkline@localhost", "-c", "init.defaultBranch=main")


def write_language_pack(folder: Path) -> None:
    """Write the pack into a new folder and commit it. Raises FileExistsError, subprocess.CalledProcessError."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "manifest.yaml", folder)
    template = folder / TEMPLATE
    shutil.copytree(ROOT / TEMPLATE, template, ignore=_LEFT_OUT)
    shutil.copytree(SOURCE / "trunkline", template / "client" / "trunkline", ignore=_LEFT_OUT)
    shutil.copy(SOURCE / "pyproject.toml", template / "client")
    project = template / "pyproject.toml"
    text = project.read_text()
    if text.count(PUBLISHED) != 1:
        raise ValueError(f"{project} should name {PUBLISHED} once")
    project.write_text(text.replace(PUBLISHED, ENCLOSED))
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "Trunkline's language pack"]):
        subprocess.run([*_GIT, *command], cwd=folder, check=True)


if __name__ == "__main__":
    write_language_pack(Path(sys.argv[1]))
    print(f"func create --repository file://{Path(sys.argv[1]).resolve()} -l python -t trunkline NAME")
