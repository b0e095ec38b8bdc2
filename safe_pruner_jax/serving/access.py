"""Who may connect: API key, TLS, and addresses that are safe to listen on without either."""

import hashlib
import hmac
import ipaddress
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

KEY_VARIABLE = "OPENPI_API_KEY"
"""Environment variable that holds the key where no file is given."""


class ServerError(RuntimeError):
    """The server cannot start; the text says why and what to do."""


@dataclass(frozen=True)
class Access:
    """Who may connect.

    Args:
      key: what clients must send as `Authorization: Api-Key <key>`; None admits everybody.
      tls: makes the port speak TLS; None speaks plain TCP.
      insecure: listen beyond this machine without a key.
      per_address: websocket connections from one address at a time.
      connections: websocket connections altogether.
    """

    key: str | None = None
    tls: ssl.SSLContext | None = None
    insecure: bool = False
    per_address: int = 64
    connections: int = 256

    def admits(self, authorization: str | None) -> bool:
        """Whether the header carries the key; the time it takes does not depend on how much of it is right."""
        if self.key is None:
            return True
        expected = hashlib.sha256(f"Api-Key {self.key}".encode()).digest()
        got = hashlib.sha256((authorization or "").encode("utf-8", "surrogateescape")).digest()
        return hmac.compare_digest(expected, got)

    def check(self, host: str) -> None:
        """Raises ServerError if `host` is open to others and nobody is asked for a key."""
        if self.key is None and not self.insecure and not is_loopback(host):
            raise ServerError(
                f"expected an API key to listen on {host}, got none: anybody who reaches this port could drive the "
                f"robot; put a key into ${KEY_VARIABLE} or a file (--serving.api-key-file), listen on 127.0.0.1, or "
                "say --serving.insecure"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; names other than localhost are not looked up.

    >>> [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "robot.lan", "")]
    [True, True, True, False, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(file: str | os.PathLike | None) -> str | None:
    """The API key: of the file if one is given, else of $OPENPI_API_KEY; None without either.

    Raises:
      ServerError: an unreadable file, or a key that no header can carry.
    """
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
    else:
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeError) as error:
            raise ServerError(
                f"the API key cannot be read from {file}: {error}; give a text file with one line"
            ) from error
    if key is None:
        return None
    if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
        raise ServerError(
            f"expected an API key of at least 8 printable ASCII characters without spaces, got {len(key)} characters; "
            'make one with python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return key


def tls_context(cert: str | os.PathLike | None, key: str | os.PathLike | None) -> ssl.SSLContext | None:
    """A context for a certificate chain and its private key, PEM files; None without them.

    Raises:
      ServerError: one without the other, or files that cannot be read or do not belong together.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ServerError("expected both a certificate and its private key, got one; give --serving.tls-cert and -key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:  # absent, unreadable, no PEM, another certificate's key
        why = getattr(error, "strerror", None) or error
        raise ServerError(
            f"the certificate {cert} with the key {key} cannot be used: {why}; give PEM files that belong together"
        ) from error
    return context


def _no_password() -> bytes:
    raise ValueError("the private key is encrypted")
