"""Receives webhooks of uplinkd, in any form: verifies each request, and prints each message once.

pip install standardwebhooks
WEBHOOK_SECRET=whsec_… python webhook_receiver.py 9000
"""

import base64
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError

webhook = Webhook(os.environ["WEBHOOK_SECRET"])
seen: dict[
    str, None
] = {}  # in earnest: a unique key in your database, written together with what the message does there


def events(headers: dict[str, str], body: bytes) -> list[dict[str, Any]]:
    """The CloudEvents of a request, with what the device sent as `data`, bytes."""
    if "ce-id" in headers:  # binary: attributes in headers, what the device sent is the body
        attributes = {name.removeprefix("ce-"): value for name, value in headers.items() if name.startswith("ce-")}
        return [attributes | {"data": body}]
    document = json.loads(body)
    found = document if isinstance(document, list) else [document]
    for event in found:
        encoded = event.pop("data_base64", None)
        event["data"] = json.dumps(event["data"]).encode() if encoded is None else base64.b64decode(encoded)
    return found


class Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers["content-length"]))
        try:
            webhook.verify(body, headers, json_parse=False)
        except WebhookVerificationError as error:
            return self.answer(401, str(error))  # it comes again: correct the secret, or your clock
        except UnicodeDecodeError:
            return self.answer(415, "standardwebhooks verifies text alone: use the form structured or batch")
        for event in events(headers, body):
            if event["id"] not in seen:
                print(event["id"], event["subject"], event["data"], flush=True)
                seen[event["id"]] = None
        while len(seen) > 100_000:
            del seen[next(iter(seen))]
        return self.answer(204)

    def answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver).serve_forever()
