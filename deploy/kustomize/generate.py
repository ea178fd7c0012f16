"""Write the manifests of these folders anew, from the chart: `python deploy/kustomize/generate.py`, with helm on the PATH.

The chart is what is written by hand; a test compares. What the component `csi` has besides is what the chart renders besides.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
CHART = HERE.parent / "helm" / "trunkline"
# Of helm, not of what is installed.
LEFT_OUT = ("helm.sh/chart", "app.kubernetes.io/managed-by")
HEAD = "# Written by deploy/kustomize/generate.py from the chart. Change that, or a component.\n"
CSI = ("--set", "attach.mode=csi", "--set", "attach.injection=admissionPolicy")


def manifests(helm: str, *arguments: str) -> list[dict[str, Any]]:
    """Return what the chart renders, without the labels of helm."""
    command = [helm, "template", "trunkline", str(CHART), "--namespace", "trunkline", *arguments]
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = [each for each in yaml.safe_load_all(text) if each]
    for each in found:
        for label in LEFT_OUT:
            each["metadata"]["labels"].pop(label)
    return sorted(found, key=lambda each: (each["kind"], each["metadata"]["name"]))


def files(helm: str) -> dict[Path, str]:
    """Return the text of each file. Raises ValueError when a component does not merely add to the base."""
    base = manifests(helm)
    texts = {json.dumps(each) for each in base}
    more = [each for each in manifests(helm, *CSI) if json.dumps(each) not in texts]
    names = {(each["kind"], each["metadata"]["name"]) for each in base}
    if changed := [each for each in more if (each["kind"], each["metadata"]["name"]) in names]:
        raise ValueError(f"the component csi changes what is in the base: {[each['metadata']['name'] for each in changed]}")
    return {
        HERE / "base" / "trunkline.yaml": HEAD + yaml.safe_dump_all(base, sort_keys=False, width=160),
        HERE / "components" / "csi" / "csi.yaml": HEAD + yaml.safe_dump_all(more, sort_keys=False, width=160),
    }


if __name__ == "__main__":
    for path, text in files(sys.argv[1] if len(sys.argv) > 1 else "helm").items():
        path.write_text(text)
