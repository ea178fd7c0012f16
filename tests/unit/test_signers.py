"""Signatures: by keys as OpenSSH writes them, of signers that the operator trusts by name, over the bytes of a manifest."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from sidecar.errors import ConfigError, NotTrusted
from sidecar.signers import SIGNATURE_BYTES, read_signers, sign, verify

MANIFEST = b'{"format":"trunkline-bundle-1"}'
Key = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey


def write_key(path: Path, key: Key | None = None, name: str = "release", password: bytes | None = None) -> str:
    """Write a private key, and return the line of its public one."""
    key = key or ed25519.Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, encryption))
    return f"{key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} {name}".rstrip()


def test_a_signature_tells_who_signed(tmp_path: Path) -> None:
    lines = [write_key(tmp_path / name, name=name) for name in ("ann", "the release team")]
    trusted = tmp_path / "signers"
    trusted.write_text("# who may\n\n" + "\n".join(lines) + "\n")
    signers = read_signers(trusted)
    assert list(signers) == ["ann", "the release team"]
    for name in signers:
        signature = sign(MANIFEST, tmp_path / name)
        assert len(signature) == SIGNATURE_BYTES
        assert verify(MANIFEST, signature, signers) == name


@pytest.mark.row("T24")
def test_what_is_not_signed_by_a_trusted_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "signers").write_text(write_key(tmp_path / "ann", name="ann"))
    write_key(tmp_path / "eve", name="ann")
    signers = read_signers(tmp_path / "signers")
    good = sign(MANIFEST, tmp_path / "ann")
    for manifest, signature in (
        (MANIFEST, sign(MANIFEST, tmp_path / "eve")),
        (MANIFEST + b" ", good),
        (MANIFEST, good[:-1] + bytes([good[-1] ^ 1])),
        (MANIFEST, b""),
        (MANIFEST, good[:-1]),
    ):
        with pytest.raises(NotTrusted, match="none of the 1 signers"):
            verify(manifest, signature, signers)


def test_a_file_of_signers_with_a_mistake_is_refused_by_its_line(tmp_path: Path) -> None:
    trusted = tmp_path / "signers"
    good = write_key(tmp_path / "ann", name="ann")
    other = write_key(tmp_path / "curve", ec.generate_private_key(ec.SECP256R1()), "curve")
    nameless = write_key(tmp_path / "nameless", name="")
    for text, problem in (
        (f"{good}\nnonsense\n", "line 2: no public key"),
        (f"{good}\nssh-ed25519 AAAA bob\n", "line 2: no public key"),
        (f"{good}\nssh-unheard-of AAAA bob\n", "line 2: no public key"),
        (other, "line 1: must be an ssh-ed25519 key"),
        (nameless, "line 1: a key needs a name"),
        (f"{good}\n{good}\n", "line 2: a key needs a name of its own"),
        ("# nobody\n", "has no key"),
        ("\udcff", "line 1: no public key"),
    ):
        trusted.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ConfigError, match=problem):
            read_signers(trusted)
    with pytest.raises(ConfigError, match="No such file"):
        read_signers(tmp_path / "none")


def test_a_key_that_cannot_sign_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nonsense").write_text("nonsense")
    write_key(tmp_path / "curve", ec.generate_private_key(ec.SECP256R1()))
    for name, problem in (
        ("nonsense", "no private key as OpenSSH writes it"),
        ("curve", "must hold an ssh-ed25519 key"),
        ("none", "No such file"),
    ):
        with pytest.raises(ConfigError, match=problem):
            sign(MANIFEST, tmp_path / name)
