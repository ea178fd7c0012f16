"""What all benchmarks share: flags, the record of the machine, summaries of times, the table and the JSON object."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "numpy", "flask", "gunicorn", "msgpack", "posix-ipc", "requests", "onnx", "onnxruntime")


def arguments(description: str) -> argparse.Namespace:
    """Return --quick, --seed, --device and --json."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; ends within 60 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--json", metavar="PATH", help="write the figures there; '-': to standard output, and nothing else")
    return parser.parse_args()


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Return median, p90, p99, largest and number of samples."""
    values = np.asarray(samples, float)
    return {
        "median": float(np.median(values)),
        "p90": float(np.percentile(values, 90)),
        "p99": float(np.percentile(values, 99)),
        "max": float(values.max()),
        "n": len(values),
    }


@dataclass
class Report:
    """Figures under fixed names, what could not be measured and why, and the raw summaries behind them."""

    benchmark: str
    quick: bool
    device: str = "cpu"
    figures: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def lack(self, reason: str, *names: str) -> None:
        """Note figures that this run does not give."""
        self.missing.update(dict.fromkeys(names, reason))

    def to_plain(self) -> dict[str, object]:
        """Return the object that ``--json`` writes."""
        return {
            "benchmark": self.benchmark,
            "quick": self.quick,
            "commit": _commit(),
            "hardware": hardware(),
            "versions": versions(),
            "device": self.device,
            "figures": self.figures,
            "missing": self.missing,
            "raw": self.raw,
        }

    def finish(self, json_path: str | None) -> None:
        """Print a table, or the JSON object alone when it goes to standard output."""
        plain = json.dumps(self.to_plain(), indent=2)
        if json_path == "-":
            sys.stdout.write(plain + "\n")
            return
        table = Table("figure", "value", title=f"{self.benchmark}{' (quick)' if self.quick else ''}")
        for name, value in self.figures.items():
            table.add_row(name, f"{value:.4g}")
        for name, reason in self.missing.items():
            table.add_row(name, f"[dim]not measured: {reason}[/]")
        Console().print(table)
        if json_path:
            Path(json_path).write_text(plain + "\n")


def hardware() -> dict[str, object]:
    """Return what the figures depend on: processor, cores, memory, kernel, GPU."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    found: dict[str, object] = {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
    }
    import torch

    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
