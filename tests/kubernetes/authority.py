"""Certificates for localhost, made anew."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def issue(certificate: Path, key: Path) -> int:
    """Write a certificate that vouches for itself, and its key; return its serial number."""
    private = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    serial = x509.random_serial_number()
    # Else whoever believes two such certificates may compare with the wrong one.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {serial}"[:64])])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder(name, name, private.public_key(), serial)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form, no_password = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    for path, content in ((certificate, made.public_bytes(pem)), (key, private.private_bytes(pem, form, no_password))):
        # In one step, as renewers do with each file.
        new = path.with_suffix(".new")
        new.write_bytes(content)
        new.replace(path)
    return serial
