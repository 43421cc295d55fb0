# Prints what a consumer group gets, as it arrives.
#   pip install python-qpid-proton
#   python read_group.py amqps://localhost:5671 APP_KEY APP_SECRET GROUP data/tls/ca.pem
# The file of the CA is only needed with the certificate that uplinkd makes for itself.
import base64
import hmac
import sys
import time
from typing import Any

from proton import SSLDomain
from proton.handlers import MessagingHandler
from proton.reactor import Container


class Consumer(MessagingHandler):
    def __init__(self, url: str, key: str, secret: str, group: str, ca: str = "") -> None:
        super().__init__(prefetch=100, auto_accept=False)
        self.url, self.key, self.secret, self.group, self.ca = url, key, secret, group, ca

    def on_start(self, event: Any) -> None:
        timestamp = str(round(time.time() * 1000))
        user = f"reader-1|authMode=aksign,signMethod=hmacsha256,timestamp={timestamp},authId={self.key},consumerGroupId={self.group}|"
        content = f"authId={self.key}&timestamp={timestamp}"
        sign = base64.b64encode(hmac.digest(self.secret.encode(), content.encode(), "sha256")).decode()
        tls = SSLDomain(SSLDomain.MODE_CLIENT)
        if self.ca:
            tls.set_trusted_ca_db(self.ca)
        tls.set_peer_authentication(SSLDomain.VERIFY_PEER_NAME)
        connection = event.container.connect(
            self.url, user=user, password=sign, ssl_domain=tls, allowed_mechs="PLAIN", heartbeat=120
        )
        event.container.create_receiver(connection)

    def on_message(self, event: Any) -> None:
        message = event.message
        print(message.properties["topic"], bytes(message.body).decode(errors="replace"), flush=True)
        self.accept(event.delivery)  # or self.release(event.delivery): then it comes again

    def on_transport_error(self, event: Any) -> None:
        print(event.transport.condition, file=sys.stderr)


Container(Consumer(*sys.argv[1:])).run()
