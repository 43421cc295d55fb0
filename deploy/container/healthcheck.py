"""Whether the server of this container serves devices: by /readyz of its console, or without a console by its HTTPS port."""

from __future__ import annotations

import os
import socket
import ssl
import sys
import urllib.request

SECONDS = 4


def place(setting: str, default: str) -> tuple[str, int]:
    """Where this container reaches the listener that `setting` names."""
    host, _, port = os.environ.get(setting, default).rpartition(":")
    host = host.strip("[]")
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), int(port or 0)  # noqa: S104 - turned into a place to ask


def main() -> None:
    # Of this container itself, whose names the certificate need not have.
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    host, port = place("UPLINKD_CONSOLE_LISTEN", "127.0.0.1:8080")
    if port:
        tls = os.environ.get("UPLINKD_CONSOLE_TLS", "").lower() in ("1", "true", "yes", "on")
        url = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}/readyz"
        urllib.request.urlopen(url, timeout=SECONDS, context=trusting).close()  # noqa: S310 - a URL of ours
    else:
        with socket.create_connection(place("UPLINKD_LISTEN", "127.0.0.1:8443"), SECONDS) as plain:
            trusting.wrap_socket(plain).close()


if __name__ == "__main__":
    try:
        main()
    except OSError as fault:
        sys.exit(str(fault))
