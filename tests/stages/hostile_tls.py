"""A web server on loopback whose TLS is as bad as the real web's: every host says what is wrong with it."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.stages.hostile_web import Handler, Server, served

# Host -> the status that download gives its pages.
TLS = {
    "trusted.example": "success",
    "self-signed.example": "tls",
    "other-name.example": "tls",
    "expired.example": "tls",
    "resets.example": "connection",
    "hangs-up.example": "connection",
    "stalls.example": "timeout",
}
TLS_STATUS = {f"https://{host}/jpeg": status for host, status in TLS.items()}
AUTHORITY = "authority.example"


def certificate(
    host: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey, days: int = 1
) -> bytes:
    """PEM; `days` are those that it is still valid."""

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])

    now, own = datetime.now(UTC), host == issuer
    signed = (
        x509.CertificateBuilder()
        .subject_name(named(host))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(own, None), critical=True)
        .add_extension(x509.KeyUsage(True, False, False, False, False, own, own, False, False), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return signed.public_bytes(serialization.Encoding.PEM)


def contexts(folder: Path) -> dict[str, ssl.SSLContext]:
    """What the hosts that speak TLS show; ``authority.pem`` is then in the folder, for clients to trust."""
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    (folder / "authority.pem").write_bytes(certificate(AUTHORITY, authority, AUTHORITY, authority))
    shown = {
        "trusted.example": certificate("trusted.example", key, AUTHORITY, authority),
        "self-signed.example": certificate("self-signed.example", key, "self-signed.example", key),
        "other-name.example": certificate("another.example", key, AUTHORITY, authority),
        "expired.example": certificate("expired.example", key, AUTHORITY, authority, days=-1),
    }
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )  # fmt: skip
    found = {}
    for host, chain in shown.items():
        (folder / f"{host}.pem").write_bytes(secret + chain)
        found[host] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        found[host].load_cert_chain(folder / f"{host}.pem")
    return found


class TlsServer(Server):
    """Which host is meant is read from the client's first bytes, where its name stands in clear."""

    def __init__(self, contexts: dict[str, ssl.SSLContext]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.contexts = contexts

    def finish_request(self, request, client_address):
        hello = request.recv(8192, socket.MSG_PEEK)
        (host,) = [host for host in TLS if host.encode() in hello]
        if host in self.contexts:
            with self.contexts[host].wrap_socket(request, server_side=True) as secure:
                super().finish_request(secure, client_address)
        elif host == "resets.example":
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.close()
        elif host == "stalls.example":
            time.sleep(3)
        else:
            # Read to the end, or the system resets the connection.
            request.recv(8192)


@contextlib.contextmanager
def tls_web(folder: Path) -> Iterator[str]:
    """Serves `TLS` with the pages of the hostile web, for clients that trust ``folder/authority.pem``; gives ``host:port``."""
    with served(TlsServer(contexts(folder))) as place:
        yield place
