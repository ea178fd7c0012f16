"""docs/deploy.md and docs/troubleshooting.md: what they name exists, and what was not run says so."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import yaml
from trunkline.pool import DEFAULT_CREDENTIAL

from tests.openfaas import faascli

ROOT = Path(__file__).parents[2]
DEPLOY, TROUBLES = ROOT / "docs" / "deploy.md", ROOT / "docs" / "troubleshooting.md"
# Programs that need what no test has: a cluster, faasd, systemd as the first process.
NOT_HERE = re.compile(r"\b(faas-cli|func (create|config|deploy)|kubectl|systemctl|systemd-sysusers)\b")
PATHS = re.compile(
    r"`((?:tests|deploy|knative|template)/[\w./-]+)`|\b((?:deploy|knative)/[\w./-]+\.(?:yaml|service|conf|toml|json))\b"
)


def codes(page: Path) -> set[str]:
    return set(re.findall(r"^\| `(\w+)` \|", page.read_text(), re.MULTILINE))


def test_every_error_has_an_entry_and_none_is_invented() -> None:
    assert codes(TROUBLES) == codes(ROOT / "docs" / "errors.md") != set()


def test_commands_that_were_not_run_say_so() -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", DEPLOY.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    needing = [line for line in lines if NOT_HERE.search(line.split("#")[0])]
    assert len(needing) > 5
    assert not [line for line in needing if "not run here" not in line]
    # One screen each.
    assert max(len(block.splitlines()) for block in blocks) <= 12


@pytest.mark.parametrize("page", [DEPLOY, TROUBLES], ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = {found for pair in PATHS.findall(page.read_text()) for found in pair if found}
    assert not [path for path in named - {"deploy/helm"} if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", [DEPLOY, TROUBLES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", page.read_text()):
        target = (page.parent / file) if file else page
        assert target.exists(), file
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, f"{file}#{anchor}"


def test_a_new_function_is_told_how_it_reaches_the_sidecar_of_the_chart() -> None:
    """What `faas-cli new` writes knows of none, and over HTTP the chart's sidecar refuses whoever has no token."""
    section = DEPLOY.read_text().split("## OpenFaaS on Kubernetes\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```yaml\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    added = yaml.safe_load(textwrap.dedent(block))
    faascli.check(added, faascli.FUNCTION, "functions.mine")
    assert added["labels"] == {"trunkline": "enabled"}
    assert added["secrets"] == [Path(DEFAULT_CREDENTIAL).name]
    stack = (ROOT / "stack.yml").read_text()
    assert f"TRUNKLINE_URL: ${{TRUNKLINE_URL:-{added['environment']['TRUNKLINE_URL']}}}" in stack
    # As it is called by faas-cli.
    for text in (section, (ROOT / "template" / "python3-trunkline" / "template.yml").read_text()):
        assert "faas-cli up -f stack.yaml" in text


def test_every_path_has_a_quick_start_and_a_test_that_shows_it() -> None:
    text = DEPLOY.read_text()
    rows = re.findall(r"^\| \[(.+?)\]\(#([\w-]+)\) \|.*\| (.*) \|$", text, re.MULTILINE)
    assert [anchor for _, anchor, _ in rows] == ["local", "faasd", "openfaas-on-kubernetes", "knative", "docker-alone"]
    for name, _, shown in rows:
        assert "`tests/" in shown, name
