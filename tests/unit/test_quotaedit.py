"""Changes to a quota file: what is said changes, and nothing else does."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sidecar.errors import ConfigError
from sidecar.quotaedit import edit, new_token, replaced, with_tenant, with_token, without_older_token, without_tenant
from sidecar.quotas import parse_quotas
from sidecar.tenants import hash_of

A, B, C = (hash_of(name) for name in (b"a", b"b", b"c"))
TEXT = f"""\
# Box 7, the one in the cellar.

# Vision pays.
[tenants.vision]
tokens = [
  "sha256:{A}",  # since May
]
models = ["resnet-*"]  # and nothing else
weight = 3

# Search does not.
[tenants.search]
models = ["embed"]
tokens = ['sha256:{B}']
# The end.
"""


def without_hashes(text: str) -> list[str]:
    return [line for line in text.splitlines() if "sha256:" not in line]


def test_tokens_are_long_and_need_no_quoting() -> None:
    token = new_token()
    assert len(token) == 43
    assert token.replace("-", "a").replace("_", "a").isalnum()
    assert new_token() != token


def test_a_tenant_is_added_at_the_end() -> None:
    values = {"models": ["a", "b-*"], "weight": 2.0, "priority": 1, "compute_once": False, "arena": "1MiB"}
    changed = with_tenant(TEXT, "q", "trial", "secret", values)
    assert changed.startswith(TEXT)
    assert "secret" not in changed
    tenant = parse_quotas(changed, "q").tenants["trial"]
    assert (tenant.models, tenant.weight, tenant.priority, tenant.compute_once) == (("a", "b-*"), 2.0, 1, False)
    assert tenant.arena_limit_bytes == 2**20
    assert tenant.token_hashes == (hash_of(b"secret"),)


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("vision", {"models": ["a"]}, "q has a tenant vision already"),
        ("new", {"models": ["a"], "weight": float("nan")}, "weight must be a number from .*, is nan"),
        ("new", {"models": ["a"], "weight": float("-inf")}, "is -inf"),
        ("new", {"models": ["a"], "arena": "lots"}, "arena must be a size"),
        ("new", {"models": [""]}, "models must be a list"),
        ("new", {}, "has no key models"),
    ],
)
def test_a_tenant_that_cannot_be_is_refused(name: str, values: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        with_tenant(TEXT, "q", name, "secret", values)


def test_a_token_is_rotated_and_comments_stay() -> None:
    both = with_token(TEXT, "q", "vision", "c")
    assert parse_quotas(both, "q").tenants["vision"].token_hashes == (A, C)
    assert without_hashes(both) == without_hashes(TEXT)
    assert "# since May" in both
    with pytest.raises(ConfigError, match="vision has 2 valid tokens, which is the limit; .*rotate vision --end"):
        with_token(both, "q", "vision", "d")
    ended = without_older_token(both, "q", "vision")
    assert parse_quotas(ended, "q").tenants["vision"].token_hashes == (C,)
    assert "# since May" in ended
    with pytest.raises(ConfigError, match="vision has 1 valid tokens, so none is the older"):
        without_older_token(ended, "q", "vision")
    assert parse_quotas(with_token(TEXT, "q", "search", "c"), "q").tenants["search"].token_hashes == (B, C)


@pytest.mark.parametrize(
    "text",
    [
        "[tenants.other]\nmodels = []\ntokens = []\n\n[tenants.a]\nmodels = []\n",
        "[tenants.a]\nmodels = []\n\n[tenants.other]\nmodels = []\ntokens = []\n",
        "[tenants.a]\nmodels = []\n  tokens = [ ]  # none yet\n[tenants.other]\nmodels = []\n",
        "[tenants.other]\nmodels = []\n[tenants.a]\ntokens = [\n]\nmodels = []",
    ],
)
def test_a_tenant_without_a_token_gets_its_first(text: str) -> None:
    changed = parse_quotas(with_token(text, "q", "a", "c"), "q").tenants
    assert changed["a"].token_hashes == (C,)
    assert changed["other"].token_hashes == ()


def test_a_tenant_is_removed_and_what_others_said_stays() -> None:
    changed = without_tenant(TEXT, "q", "vision")
    assert list(parse_quotas(changed, "q").tenants) == ["search"]
    assert changed == TEXT[: TEXT.index("[tenants.vision]")] + TEXT[TEXT.index("\n# Search") :]
    changed = without_tenant(TEXT, "q", "search")
    assert list(parse_quotas(changed, "q").tenants) == ["vision"]
    assert changed.endswith("# Search does not.\n# The end.\n")
    with pytest.raises(ConfigError, match="q has no tenant trial; it has search, vision"):
        without_tenant(TEXT, "q", "trial")
    with pytest.raises(ConfigError, match="it has none"):
        without_tenant("", "q", "trial")
    assert without_tenant("[tenants.a]\nmodels = []", "q", "a") == ""


def test_tables_stay_one_line_apart() -> None:
    text = "# Box\n\n[tenants.a]\nmodels = []\n\n[tenants.b]\nmodels = []\n"
    assert without_tenant(text, "q", "a") == "# Box\n\n[tenants.b]\nmodels = []\n"


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("tenants.a = { models = [] }\ntenants.b.models = []\n", lambda text: without_tenant(text, "q", "a")),
        ("tenants = { a = { models = [] }, b = { models = [] } }\n", lambda text: without_tenant(text, "q", "b")),
        ("tenants.a = { models = [] }\n", lambda text: with_token(text, "q", "a", "c")),
        (f"# 'sha256:{A}'\n[tenants.a]\nmodels = []\ntokens = ['sha256:{A}']\n", lambda text: with_token(text, "q", "a", "c")),
    ],
)
def test_what_is_laid_out_otherwise_is_left_to_its_owner(text: str, change: object) -> None:
    with pytest.raises(ConfigError, match="cannot be changed here; .* by hand, and reload"):
        change(text)  # type: ignore[operator]


def test_a_file_with_a_mistake_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "quotas.toml"
    path.write_text(bad := TEXT + "\nwieght = 1\n")
    with pytest.raises(ConfigError, match="wieght"):
        edit(path, lambda text, file: without_tenant(text, file, "vision"))
    assert path.read_text() == bad
    assert os.listdir(tmp_path) == ["quotas.toml"]


def test_a_file_is_replaced_at_one_stroke_with_the_rights_it_had(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path, link = tmp_path / "real" / "quotas.toml", tmp_path / "quotas.toml"
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        edit(link, lambda text, file: text)
    edit(link, lambda text, file: f"{text}# {file}\n", create=True)
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.read_text().endswith("comments alone.\n# quotas.toml\n")
    path.chmod(0o640)
    before = path.stat().st_ino
    edit(link, lambda text, file: text + "# more\n")
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.stat().st_ino != before
    assert link.is_symlink()
    assert os.listdir(tmp_path / "real") == ["quotas.toml"]


def test_edits_are_made_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "quotas.toml"

    def add(number: int) -> None:
        edit(path, lambda text, file: with_tenant(text, file, f"t{number}", f"s{number}", {"models": []}), create=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert len(parse_quotas(path.read_text(), "q").tenants) == 8


def test_what_fails_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    with pytest.raises(RuntimeError), replaced(path, 0o600) as descriptor:
        os.write(descriptor, b"new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["token"]
    with replaced(path, 0o600) as descriptor:
        os.write(descriptor, b"new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
