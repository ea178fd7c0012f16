"""stack.yml: which functions there are, and the build context of each, laid out as faas-cli lays it out. No processes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from sidecar.errors import ConfigError

LANGUAGE: Final = "python3-trunkline"
PROVIDER: Final = "openfaas"
# The template's route that tells whether a function has its models.
READY_PATH: Final = "/_/trunkline/ready"
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class Function:
    """One function of a stack: its name, the folder of its handler, its environment."""

    name: str
    handler: Path
    environment: Mapping[str, str]


def read_stack(path: Path, only: list[str] | None = None) -> list[Function]:
    """Return the functions of a stack file, or those named in ``only``. Raises ConfigError, naming the key."""
    try:
        read = yaml.safe_load(_substituted(path.read_text()))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({os.strerror(error.errno or 0)})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    functions = read.get("functions") if isinstance(read, dict) else None
    if not isinstance(functions, dict) or not functions:
        raise ConfigError(f"{path}: there are no functions")
    provider = read.get("provider")
    if not isinstance(provider, dict) or provider.get("name") != PROVIDER:
        raise ConfigError(f"{path}: provider.name must be {PROVIDER}")
    if unknown := set(only or ()) - functions.keys():
        raise ConfigError(f"{path}: there is no function {min(unknown)!r}; it has {', '.join(functions)}")
    return [_function(path, name, entry) for name, entry in functions.items() if not only or name in only]


def _substituted(text: str) -> str:
    # ${NAME} and ${NAME:-default}, as faas-cli substitutes them.
    return _VARIABLE.sub(lambda match: os.environ.get(match[1]) or match[2] or "", text)


def _function(path: Path, name: object, entry: Any) -> Function:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{path}: {name!r} is no name of a function (a-z, 0-9 and '-', at most 63 characters)")
    if not isinstance(entry, dict):
        raise ConfigError(f"{path}: functions.{name} must be a map")
    if entry.get("lang") != LANGUAGE:
        raise ConfigError(f"{path}: functions.{name}.lang is {entry.get('lang')!r}; only {LANGUAGE} can be run locally")
    handler = (path.parent / str(entry.get("handler", ""))).resolve()
    if not (handler / "handler.py").is_file():
        raise ConfigError(f"{path}: functions.{name}.handler: {handler} holds no handler.py")
    environment = entry.get("environment") or {}
    if not isinstance(environment, dict):
        raise ConfigError(f"{path}: functions.{name}.environment must be a map")
    return Function(name, handler, {str(key): _text(value) for key, value in environment.items()})


def _text(value: object) -> str:
    # As faas-cli reads it: what YAML takes for a truth value or for nothing is the text that stands there.
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def lay_out(function: Function, template: Path, build: Path) -> Path:
    """Copy the template with the handler laid over ``function/`` into ``build/<name>``; return that folder.

    The sample's files that the handler's folder does not replace stay, as they do in an image.
    """
    context = build / function.name
    shutil.rmtree(context, ignore_errors=True)
    shutil.copytree(template, context, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {"__pycache__"} | ({"build", "template"} if Path(folder) == function.handler else set())

    shutil.copytree(function.handler, context / "function", ignore=left_out, dirs_exist_ok=True)
    return context


def find_template(stack: Path) -> Path:
    """Return the template's folder: beside the stack file, as faas-cli expects it. Raises ConfigError."""
    template = stack.resolve().parent / "template" / LANGUAGE
    if not (template / "index.py").is_file():
        raise ConfigError(f"{template} is not there; run `faas-cli template pull` beside {stack.name} first")
    return template
