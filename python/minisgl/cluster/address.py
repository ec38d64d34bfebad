"""Whether somebody is at an address, asked without Ray, which would try for minutes."""

import os
import socket

from minisgl.config.args import integer


def reach(address: str) -> None:
    """Raises: ConnectionError unless there is a HOST:PORT where somebody speaks first, and as a server of HTTP/2 does.
    Ray's head is one; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), integer(1, 65535)(port)), timeout=5.0) as head:
            if os.environ.get("RAY_USE_TLS") != "1" and head.recv(4)[3:] != b"\4":
                raise ConnectionError("something else does")
    except ValueError:
        raise ConnectionError("expected HOST:PORT, as in 10.0.0.1:6379") from None
    except OSError as error:
        raise ConnectionError(f"no Ray answers there ({error.strerror or error})") from error
