"""Which names and addresses are this machine's, as no page of another site may ask under one of its own."""

import ipaddress
import socket
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine reaches it."""
    return host in LOOPBACK or host.startswith("127.")


def host_of(url: str) -> str:
    """Return the host of a URL, "" where it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_no_foreign_name(host: str) -> bool:
    """Whether a host is an address, or a name of this machine.

    Who owns any other name may let it lead here, and his page is then of the same origin.
    """
    name = socket.gethostname().lower()
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", name, f"{name}.local")
    return True
