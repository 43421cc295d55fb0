"""The device door over HTTP/1.1: bytes to requests, replies to bytes."""
