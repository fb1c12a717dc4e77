"""Checks the TLS certificate and key before the engine starts; uvicorn reads them only when the port opens."""

import ssl
from pathlib import Path


def require_certificate(certificate: Path, key: Path) -> None:
    """Check that the two PEM files are a certificate and its private key.

    Raises ``ValueError`` if a file is missing, unreadable, not PEM or encrypted, or if the key does not match.
    """
    for file in (certificate, key):
        if not file.is_file():
            raise ValueError(f"{file} is not a file")
        try:
            file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    is_encrypted = False

    def refuse_password() -> str:
        nonlocal is_encrypted
        is_encrypted = True
        return ""

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, refuse_password)
    except ssl.SSLError as error:
        if is_encrypted:
            raise ValueError(f"{key} is encrypted; give --tls-key a key without a password") from error
        raise ValueError(_reason(certificate, key, error)) from error


def _reason(certificate: Path, key: Path, error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"{key} is not the private key of {certificate}"
    if error.reason is not None and error.reason.startswith("EE_"):
        return f"{certificate} is rejected by OpenSSL ({error.reason}): create one with a longer key or a newer digest"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(certificate)
    except ssl.SSLError:
        return f"{certificate} is not a PEM certificate"
    return f"{key} is not a PEM private key"
