"""Tokens at a running endpoint: the file that is read again, TCP beyond loopback, TLS."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import requests
from click.testing import CliRunner, Result

from sidecar.admin_client import AdminClient
from sidecar.admintokens import NEW_FILE, OPERATE, READ, with_token
from sidecar.cli.exits import FAILED, UNREACHABLE
from sidecar.cli.main import main
from sidecar.config import load_settings
from sidecar.errors import ConfigError
from sidecar.http.access import Principal
from sidecar.http.server import check_settings
from sidecar.http.tokenfile import TokenFile
from tests.integration.test_admin_http import HttpServer
from tests.waiting import PATIENCE_S


@pytest.fixture
def tokens(folder: Path) -> Path:
    path = folder / "tokens.toml"
    text = with_token(NEW_FILE, "", "ann", READ, "looks")
    path.write_text(with_token(text, "", "bob", OPERATE, "changes"))
    return path


def command(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def rewrite(path: Path, text: str) -> None:
    """Replace a file, as editors do and as they do not."""
    other = path.with_suffix(".new")
    other.write_text(text)
    other.rename(path)


def test_the_file_is_read_again_when_it_changes(tokens: Path, folder: Path) -> None:
    found = TokenFile(tokens, folder / "in-force")
    assert found.holder(b"looks") == Principal("ann", READ)
    assert found.holder(b"changes") == Principal("bob", OPERATE)
    assert found.holder(b"") is None
    rewrite(tokens, with_token(NEW_FILE, "", "ann", OPERATE, "looks"))
    assert found.holder(b"looks") == Principal("ann", OPERATE)
    assert found.holder(b"changes") is None
    with tokens.open("a") as file:
        file.write(with_token("", "", "eve", READ, "new"))
    assert found.holder(b"new") == Principal("eve", READ)


def test_a_mistake_changes_nothing_and_is_told_once(tokens: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_force = folder / "in-force"
    found = TokenFile(tokens, in_force)
    rewrite(tokens, with_token(NEW_FILE, "", "ann", READ, "later"))
    assert found.holder(b"later") == Principal("ann", READ)
    rewrite(tokens, tokens.read_text().replace("role", "rolle"))
    assert [found.holder(b"later"), found.holder(b"later")] == [Principal("ann", READ)] * 2
    told = [record.getMessage() for record in caplog.records if "rolle" in record.getMessage()]
    assert told == [
        "tokens.toml, line 4: tokens.ann.rolle is no key of a token; the keys are role, token; the tokens in force stay"
    ]
    # A worker that is started now goes by what was in force last, not by what was when the sidecar was started.
    assert in_force.stat().st_mode & 0o777 == 0o600
    another = TokenFile(tokens, in_force)
    assert another.holder(b"later") == Principal("ann", READ)
    assert another.holder(b"changes") is None
    tokens.unlink()
    assert another.holder(b"later") == Principal("ann", READ)
    assert "cannot be read" in caplog.text
    rewrite(tokens, with_token(NEW_FILE, "", "ann", READ, "again"))
    assert [each.holder(b"again") for each in (found, another)] == [Principal("ann", READ)] * 2


def test_a_copy_that_cannot_be_kept_is_told(tokens: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = TokenFile(tokens, folder / "none" / "in-force")
    assert found.holder(b"looks") == Principal("ann", READ)
    assert "cannot be kept (No such file or directory)" in caplog.text


def test_without_a_file_that_can_be_read_nothing_starts(tokens: Path, folder: Path) -> None:
    settings = load_settings({"run_dir": folder, "admin_tokens": tokens}, {})
    check_settings(settings)
    assert (folder / "admin-tokens.toml").exists()
    tokens.write_text("[tokens.a]\n")
    # What an earlier life went by is not in force any more.
    with pytest.raises(ConfigError, match="line 1: tokens.a has no key role"):
        check_settings(settings)
    tokens.unlink()
    with pytest.raises(ConfigError, match="the token file tokens.toml cannot be read"):
        check_settings(settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "::"])
def test_beyond_loopback_a_token_file_is_needed(host: str, tokens: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="trunkline token add NAME --role operate"):
        load_settings({"admin_host": host}, {})
    # No port, no harm.
    assert not load_settings({"admin_host": host, "admin_port": 0}, {}).is_exposed
    settings = load_settings({"admin_host": host, "admin_tokens": tokens, "run_dir": folder}, {})
    assert settings.is_exposed
    check_settings(settings)
    assert caplog.text.count("without TLS") == 1


def test_other_machines_need_a_token(tokens: Path, folder: Path) -> None:
    running = HttpServer(folder, admin_host="0.0.0.0", admin_tokens=tokens)
    try:
        # Not a name of this machine: as from another one.
        url, other = running.url, {"Host": "node-7.example"}
        assert requests.get(f"{url}/healthz", headers=other, timeout=PATIENCE_S).ok
        refused = requests.get(f"{url}/admin/v1/status", headers=other, timeout=PATIENCE_S)
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        looks = other | {"Authorization": "Bearer looks"}
        assert requests.get(f"{url}/nowhere", headers=looks, timeout=PATIENCE_S).status_code == 404
        assert requests.post(f"{url}/admin/v1/store/verify", json={}, headers=looks, timeout=PATIENCE_S).status_code == 403
        changes = other | {"Authorization": "Bearer changes"}
        assert requests.post(f"{url}/admin/v1/store/verify", json={}, headers=changes, timeout=PATIENCE_S).ok
        # Both workers go by another file.
        rewrite(tokens, with_token(NEW_FILE, "", "ann", OPERATE, "other"))
        for _ in range(20):
            assert requests.post(f"{url}/admin/v1/store/verify", json={}, headers=changes, timeout=PATIENCE_S).status_code in (
                401,
                429,
            )
        changes = other | {"Authorization": "Bearer other"}
        assert requests.post(f"{url}/admin/v1/store/verify", json={}, headers=changes, timeout=PATIENCE_S).ok
        with AdminClient(f"unix:{running.socket}") as client:
            assert client.post("store/verify")["broken"] == {}
        for key, word in (("looks", "looks"), ("other", "other")):
            assert f'"{word}"' not in running.log.read_text(), key
    finally:
        running.stop()


@pytest.fixture
def certificate(folder: Path) -> tuple[Path, Path]:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


def test_tcp_has_tls_and_the_socket_has_not(
    tokens: Path, folder: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = HttpServer(folder, admin_tokens=tokens, admin_tls_certificate=certificate[0], admin_tls_key=certificate[1])
    try:
        url = running.url.replace("http:", "https:")
        found = requests.get(f"{url}/healthz", verify=str(certificate[0]), timeout=PATIENCE_S)
        assert found.ok
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(f"{url}/healthz", timeout=PATIENCE_S)
        with pytest.raises(requests.RequestException):
            requests.get(f"{running.url}/healthz", timeout=PATIENCE_S)
        with AdminClient(f"unix:{running.socket}") as client:
            assert client.post("store/verify")["broken"] == {}
        # The command line, by its environment.
        untrusted = command("--admin", url, "log-level")
        assert untrusted.exit_code == UNREACHABLE
        assert re.search("has no certificate that is trusted here; .*TRUNKLINE_ADMIN_CA", untrusted.stderr)
        monkeypatch.setenv("TRUNKLINE_ADMIN_CA", str(certificate[0]))
        nobody = command("--admin", url, "store", "gc", "--dry-run")
        assert (nobody.exit_code, nobody.stderr.startswith("error: unauthorized: ")) == (FAILED, True)
        (folder / "token").write_text("changes\n")
        monkeypatch.setenv("TRUNKLINE_ADMIN_TOKEN_FILE", str(folder / "token"))
        assert "0 corrupt" in command("--admin", url, "store", "verify").stdout
        (folder / "token").write_text("looks\n")
        refused = command("--admin", url, "store", "verify")
        assert (refused.exit_code, refused.stderr.startswith("error: forbidden: ")) == (FAILED, True)
        # Of its own page, a browser says https.
        asked = {"Authorization": "Bearer changes", "Origin": url}
        for origin, status in ((url, 200), (running.url, 400)):
            answer = requests.post(
                f"{url}/admin/v1/store/verify",
                json={},
                headers=asked | {"Origin": origin},
                verify=str(certificate[0]),
                timeout=PATIENCE_S,
            )
            assert answer.status_code == status
    finally:
        running.stop()


def test_a_certificate_that_cannot_be_used_is_told_at_the_start(folder: Path, certificate: tuple[Path, Path]) -> None:
    def check(certificate: object, key: object) -> None:
        check_settings(load_settings({"run_dir": folder, "admin_tls_certificate": certificate, "admin_tls_key": key}, {}))

    check(*certificate)
    (folder / "no.pem").write_text("nothing")
    for pair in ((folder / "none.pem", certificate[1]), (folder / "no.pem", certificate[1]), certificate[::-1]):
        with pytest.raises(ConfigError, match="cannot be used .*correct --admin-tls-certificate"):
            check(*pair)
    with pytest.raises(ConfigError, match="belong together; give --admin-tls-key"):
        check(certificate[0], None)
    with pytest.raises(ConfigError, match="belong together; give --admin-tls-certificate"):
        check(None, certificate[1])


def test_a_token_file_of_the_command_line_must_be_there(monkeypatch: pytest.MonkeyPatch, folder: Path, tokens: Path) -> None:
    monkeypatch.setenv("TRUNKLINE_ADMIN_TOKEN_FILE", str(folder / "none"))
    refused = command("--admin", "http://127.0.0.1:1", "status")
    assert refused.exit_code == FAILED
    assert re.search("config_error: .*No such file.*--token-file", refused.stderr)
    # Over the socket none is needed, nor by what asks no sidecar.
    assert command("--admin", f"unix:{folder}/none.sock", "status").exit_code == UNREACHABLE
    assert command("token", "ls", "--file", str(tokens)).exit_code == 0
