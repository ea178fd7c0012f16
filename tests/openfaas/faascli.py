"""What faas-cli does with a repository of templates and a stack file, as its documentation and sources have it (0.18).

``pull``, ``new`` and ``build`` are `faas-cli template pull`, `new` and `build --shrinkwrap`: which files end up where.
``check_stack`` refuses what faas-cli would drop in silence: a key that its schema does not have.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

Text = dict[str, str]
# Keys of faas-cli's stack.schema, with what may be there. A map's values are text: YAML's numbers and truth values are not.
RESOURCES: dict[str, Any] = {"memory": str, "cpu": str}
FUNCTION: dict[str, Any] = {
    "lang": str,
    "handler": str,
    "image": str,
    "fprocess": str,
    "environment": Text,
    "environment_file": [str],
    "secrets": [str],
    "skip_build": bool,
    "constraints": [str],
    "labels": Text,
    "annotations": Text,
    "limits": RESOURCES,
    "requests": RESOURCES,
    "readonly_root_filesystem": bool,
    "build_options": [str],
    "build_args": Text,
    "build_secrets": Text,
    "platforms": str,
    "namespace": str,
}
TEMPLATE: dict[str, Any] = {
    "language": str,
    "fprocess": str,
    "build_options": [{"name": str, "packages": [str]}],
    "welcome_message": str,
    "handler_folder": str,
    "mount_ssh": bool,
}
STACK: dict[str, Any] = {
    "version": (str, float),
    "provider": {"name": str, "gateway": str},
    "configuration": {"templates": [{"name": str, "source": str}], "copy": [str]},
    "functions": dict,
}
# All that `faas-cli template store` reads of an entry; `official` is text there, too.
STORE_ENTRY: dict[str, Any] = dict.fromkeys(
    ("template", "platform", "language", "source", "description", "repo", "official"), str
)
SKIPPED = ("build", "template")


def check(found: object, wanted: Any, where: str) -> None:
    """Compare a value with a schema. Raises ValueError, naming the place."""
    if wanted == Text:
        if not isinstance(found, dict) or not all(isinstance(part, str) for pair in found.items() for part in pair):
            raise ValueError(f"{where} must be a map of text to text: {found!r}")
    elif isinstance(wanted, dict):
        if not isinstance(found, dict):
            raise ValueError(f"{where} must be a map: {found!r}")
        for key, value in found.items():
            if key not in wanted:
                raise ValueError(f"{where}.{key}: faas-cli knows no such key")
            check(value, wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        if not isinstance(found, list):
            raise ValueError(f"{where} must be a list: {found!r}")
        for number, each in enumerate(found):
            check(each, wanted[0], f"{where}[{number}]")
    elif not isinstance(found, wanted):
        raise ValueError(f"{where} is {found!r}")


def check_stack(path: Path) -> dict[str, Any]:
    """Return a stack file's content. Raises ValueError where it holds what faas-cli does not read."""
    stack: dict[str, Any] = yaml.safe_load(path.read_text())
    check(stack, STACK, path.name)
    for name, function in stack["functions"].items():
        check(function, FUNCTION, f"functions.{name}")
    return stack


def pull(repository: Path, folder: Path) -> list[str]:
    """Copy the templates of a git repository into ``folder/template``; return their names."""
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{repository}", str(clone)], check=True)
    names = sorted(path.name for path in (clone / "template").iterdir() if path.is_dir())
    for name in names:
        # Links are followed, as os.Stat does.
        shutil.copytree(clone / "template" / name, folder / "template" / name)
    return names


def new(folder: Path, language: str, name: str) -> Path:
    """Make a function's folder from a template's sample; return it."""
    handler = folder / name
    shutil.copytree(folder / "template" / language / "function", handler)
    handler.chmod(0o700)
    return handler


def build(folder: Path, language: str, name: str, handler: Path) -> Path:
    """Lay the build context of a function out in ``folder/build/name``; return it. Its folders are the builder's alone."""
    context = folder / "build" / name
    shutil.rmtree(context, ignore_errors=True)
    (context / "function").mkdir(parents=True, mode=0o700)
    context.chmod(0o700)
    shutil.copytree(folder / "template" / language, context, dirs_exist_ok=True)
    for path in handler.iterdir():
        if path.name in SKIPPED:
            continue
        if path.is_dir():
            shutil.copytree(path, context / "function" / path.name, dirs_exist_ok=True)
        else:
            shutil.copy(path, context / "function" / path.name)
    for made in (context, context / "function"):
        made.chmod(0o700)
    return context
