"""What the access options come to, checked before a model is loaded."""

from __future__ import annotations

import socket
import ssl

from minisgl.config.args import ServerArgs
from minisgl.config.runtime import AccessConfig
from minisgl.errors import ConfigError


def access_config(args: ServerArgs) -> AccessConfig:
    """Raises: ConfigError naming the flag whose value cannot be used with another's."""
    if args.ssl_keyfile and not args.ssl_certfile:
        raise ConfigError("--ssl-keyfile: it needs --ssl-certfile")
    if args.ssl_certfile:
        _check_certificate(args.ssl_certfile, args.ssl_keyfile)
    if not {*args.api_key}.isdisjoint(args.admin_key):
        raise ConfigError("--admin-key: it is one of --api-key as well; clients would be operators")
    names = (
        "localhost",
        "*.localhost",
        "*.internal",
        "",
        args.host,
        socket.gethostname(),
    )  # no stranger can have these
    given = args.allowed_hosts or (("*",) if args.api_key else ())  # a page that has come by a false name has no key
    hosts = tuple(map(str.lower, (*names, *given)))
    return AccessConfig(args.api_key, args.admin_key, hosts, args.ssl_certfile, args.ssl_keyfile, args.cors_origin)


def _check_certificate(certfile: str, keyfile: str | None) -> None:
    for flag, path in (("--ssl-certfile", certfile), ("--ssl-keyfile", keyfile)):
        try:
            if path is not None:
                open(path, "rb").close()
        except OSError as error:
            raise ConfigError(f"{flag} {path}: {(error.strerror or str(error)).lower()}") from None
    try:
        # The empty password: openssl would ask for one at the terminal.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certfile, keyfile, password="")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise ConfigError(
            f"--ssl-certfile {certfile}: no certificate with its private key, without a password, in PEM ({reason})"
        ) from None
