"""Who may sign models: Ed25519 keys as OpenSSH writes them, one a line, and signatures over the bytes of a manifest.

``ssh-keygen -t ed25519 -N '' -C NAME -f KEY`` makes a pair: the line in ``KEY.pub`` is what an operator trusts, ``KEY`` is what a
publisher signs with. A signature is the 64 bytes of RFC 8032, nothing around them. Must not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from sidecar.errors import ConfigError, NotTrusted

SIGNATURE_BYTES = 64
_LARGEST_BYTES = 1 << 20

Signers = Mapping[str, Ed25519PublicKey]


def read_signers(path: Path) -> Signers:
    """Return the trusted keys of a file by their names. Raises ConfigError that names the line."""
    found: dict[str, Ed25519PublicKey] = {}
    for number, line in enumerate(_read(path).decode("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name = " ".join(line.split()[2:])
        try:
            key = load_ssh_public_key(line.strip().encode())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{path} line {number}: no public key as OpenSSH writes it", line=number) from error
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(f"{path} line {number}: must be an ssh-ed25519 key", line=number)
        if not name or name in found:
            raise ConfigError(f"{path} line {number}: a key needs a name of its own behind it", line=number)
        found[name] = key
    if not found:
        raise ConfigError(f"{path} has no key; nothing could be pulled")
    return found


def verify(manifest: bytes, signature: bytes, signers: Signers) -> str:
    """Return the name of the signer whose signature over ``manifest`` this is. Raises NotTrusted."""
    for name, key in signers.items():
        try:
            key.verify(signature, manifest)
        except InvalidSignature:
            continue
        return name
    raise NotTrusted(
        f"the signature is of none of the {len(signers)} signers that the operator trusts, or the manifest was altered",
        signer_count=len(signers),
    )


def sign(manifest: bytes, key_file: Path) -> bytes:
    """Return the signature over ``manifest`` by the private key in a file. Raises ConfigError."""
    try:
        key = load_ssh_private_key(_read(key_file), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{key_file} holds no private key as OpenSSH writes it, without a passphrase") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{key_file} must hold an ssh-ed25519 key: ssh-keygen -t ed25519 -N '' -C NAME -f FILE")
    return key.sign(manifest)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({os.strerror(error.errno or 0)})") from error
