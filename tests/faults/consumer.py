"""A backend over AMQP, as a process that can be killed: `consumer.py URL KEY SECRET GROUP CA accept|hold`.

It prints messageId and topic of each message, and connects again by itself.
"""

from __future__ import annotations

import base64
import hmac
import sys
import time
from typing import Any

from proton import SSLDomain
from proton.handlers import MessagingHandler
from proton.reactor import Container

URL, KEY, SECRET, GROUP, CA, WHAT = sys.argv[1:]


class Consumer(MessagingHandler):
    def __init__(self) -> None:
        super().__init__(prefetch=200, auto_accept=False)

    def on_start(self, event: Any) -> None:
        stamp = str(round(time.time() * 1000))
        user = f"fault|authMode=aksign,signMethod=hmacsha1,timestamp={stamp},authId={KEY},consumerGroupId={GROUP}|"
        sign = hmac.digest(SECRET.encode(), f"authId={KEY}&timestamp={stamp}".encode(), "sha1")
        tls = SSLDomain(SSLDomain.MODE_CLIENT)
        tls.set_trusted_ca_db(CA)
        tls.set_peer_authentication(SSLDomain.VERIFY_PEER_NAME)
        password = base64.b64encode(sign).decode()
        event.container.create_receiver(
            event.container.connect(
                URL, user=user, password=password, ssl_domain=tls, allowed_mechs="PLAIN", heartbeat=60
            )
        )

    def on_message(self, event: Any) -> None:
        properties = event.message.properties
        print(properties["messageId"], properties["topic"], flush=True)
        if WHAT == "accept":
            self.accept(event.delivery)


Container(Consumer()).run()
