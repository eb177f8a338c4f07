"""Where the server listens: sockets, TLS, and what an address is."""

from __future__ import annotations

import errno
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from kvarn.errors import ConfigError

BACKLOG = 2048
"""Connections that the system keeps until the event loop takes them."""


def listen(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A listening socket. Raises ConfigError, naming the flag, where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = f"it is in use: stop what listens there or choose another {flag}"
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}") from error


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """The listener's address for people."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address. A name is none, but for localhost."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM: the certificate with those that it follows from, and its key. Both or none. Raises ConfigError."""

    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            given, missing = ("--tls-cert", "--tls-key") if self.cert else ("--tls-key", "--tls-cert")
            raise ConfigError(f"{given} needs {missing}: a certificate and its key go together")
        if self.cert is not None and self.key is not None:
            _check_pair(self.cert, self.key)

    @property
    def scheme(self) -> str:
        """http or https."""
        return "http" if self.cert is None else "https"


def _check_pair(cert: Path, key: Path) -> None:
    for flag, path in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            path.open("rb").close()
        except OSError as error:
            raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}") from error

    def no_password() -> str:
        # OpenSSL would ask for it at the terminal, and wait.
        raise ConfigError(f"--tls-key: {key} is encrypted; `openssl pkey -in {key}` decrypts it")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=no_password)
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        raise ConfigError(f"--tls-cert {cert} with --tls-key {key}: not a certificate and its key ({reason})") from None
