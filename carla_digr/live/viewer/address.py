"""Where the page's server is bound, and by which names it may be called."""

from __future__ import annotations

import errno
import ipaddress
import socket
from urllib.parse import urlsplit

from carla_digr.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    name = host.lower()
    return name == "localhost" or (is_address(name) and ipaddress.ip_address(name).is_loopback)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: it cannot be had.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        where = f"Port {port} on {host}"
        if error.errno == errno.EADDRINUSE:
            problem = f"{where} is in use: stop the program that has it, or choose another port for the web page."
        elif error.errno == errno.EACCES:
            problem = f"{where} needs privileges: choose a port above 1023 for the web page."
        else:
            reason = error.strerror or str(error)
            problem = f"{where} cannot serve the web page ({reason}): choose an address of this machine."
        raise UserError(problem) from None
    except OverflowError:
        raise UserError(f"Port {port} does not exist: choose one from 0 to 65535 for the web page.") from None


def host_name(host: str) -> str | None:
    """The name in a request's Host field, None if there is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def is_address(name: str) -> bool:
    """Whether it is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
