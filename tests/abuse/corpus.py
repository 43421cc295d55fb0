"""Requests that two servers might read in two ways, to be sent to the door itself and through proxies.

Each posts to a topic, and so does the request that hides in it: what is taken for a message of its own is stored, and found.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CORPUS", "Case", "request"]


@dataclass(frozen=True)
class Case:
    """A request line, headers behind those of a report, and a body in which HIDDEN stands for a report of its own. `clear` where
    every reader reads it alike, so that HIDDEN is a second request; else nobody may answer more than one."""

    name: str
    head: bytes
    body: bytes
    clear: bool = False
    line: bytes = b"POST %(path)s HTTP/1.1"

    def raw(self, path: bytes, token: bytes, hidden: bytes) -> bytes:
        """Its bytes; `hidden` is what HIDDEN reports."""
        if not self.line:
            return self.head + self.body
        lines = [
            self.line % {b"path": path},
            b"Host: localhost",
            b"password: " + token,
            b"Content-Type: application/octet-stream",
            self.head,
        ]
        return b"\r\n".join(lines) + b"\r\n\r\n" + self.body.replace(b"HIDDEN", request(path, token, hidden))


def request(path: bytes, token: bytes, payload: bytes) -> bytes:
    """A report as devices send it."""
    lines = [
        b"POST " + path + b" HTTP/1.1",
        b"Host: localhost",
        b"password: " + token,
        b"Content-Type: application/octet-stream",
        b"Content-Length: %d" % len(payload),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + payload


_CHUNKED = b"Transfer-Encoding: chunked"
_END = b"0\r\n\r\n"

CORPUS = [
    # two lengths
    Case("CL.TE", b"Content-Length: 5\r\n" + _CHUNKED, _END + b"HIDDEN"),
    Case("TE.CL", _CHUNKED + b"\r\nContent-Length: 3", b"1\r\nx\r\n" + _END + b"HIDDEN"),
    Case("CL.0", b"Content-Length: 0\r\n" + _CHUNKED, _END + b"HIDDEN"),
    Case("TE lower case and CL", b"transfer-encoding: chunked\r\ncontent-length: 5", _END + b"HIDDEN"),
    Case("TE.TE second identity", _CHUNKED + b"\r\nTransfer-Encoding: identity", _END + b"HIDDEN"),
    Case("TE.TE second chunked", _CHUNKED + b"\r\nTransfer-Encoding: chunked", _END + b"HIDDEN"),
    Case("TE.TE second cow", _CHUNKED + b"\r\nTransfer-encoding: cow", _END + b"HIDDEN"),
    Case("TE list", b"Transfer-Encoding: chunked, identity", _END + b"HIDDEN"),
    Case("TE gzip, chunked", b"Transfer-Encoding: gzip, chunked", _END + b"HIDDEN"),
    Case("TE identity", b"Transfer-Encoding: identity\r\nContent-Length: 5", b"xxxxxHIDDEN"),
    # a transfer encoding in disguise
    Case("TE xchunked", b"Transfer-Encoding: xchunked", _END + b"HIDDEN"),
    Case("TE quoted", b'Transfer-Encoding: "chunked"', _END + b"HIDDEN"),
    Case("TE space before colon", b"Transfer-Encoding : chunked\r\nContent-Length: 5", _END + b"HIDDEN"),
    Case("TE tab before value", b"Transfer-Encoding:\tchunked\r\nContent-Length: 5", _END + b"HIDDEN"),
    Case("TE vertical tab", b"Transfer-Encoding:\x0bchunked\r\nContent-Length: 5", _END + b"HIDDEN"),
    Case("TE NUL", b"Transfer-Encoding: chunked\x00\r\nContent-Length: 5", _END + b"HIDDEN"),
    Case("TE folded", b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 5", _END + b"HIDDEN"),
    Case("TE folded name", b"A: b\r\n Transfer-Encoding: chunked\r\nContent-Length: 5", _END + b"HIDDEN"),
    Case("TE behind bare LF", b"A: b\nTransfer-Encoding: chunked\r\nContent-Length: 5", _END + b"HIDDEN"),
    Case("TE behind bare CR", b"A: b\rTransfer-Encoding: chunked\r\nContent-Length: 5", _END + b"HIDDEN"),
    Case("TE underscore", b"Transfer_Encoding: chunked\r\nContent-Length: 5", _END + b"HIDDEN", clear=True),
    Case("TE trailing comma", b"Transfer-Encoding: chunked,", _END + b"HIDDEN"),
    Case("TE empty", b"Transfer-Encoding:\r\nContent-Length: 5", _END + b"HIDDEN"),
    Case("TE with 1.0", _CHUNKED + b"\r\nConnection: keep-alive", _END + b"HIDDEN", line=b"POST %(path)s HTTP/1.0"),
    # lengths
    Case("CL twice, equal", b"Content-Length: 5\r\nContent-Length: 5", b"xxxxxHIDDEN"),
    Case("CL twice, different", b"Content-Length: 5\r\nContent-Length: 0", b"xxxxxHIDDEN"),
    Case("CL list", b"Content-Length: 5, 5", b"xxxxxHIDDEN"),
    Case("CL plus", b"Content-Length: +5", b"xxxxxHIDDEN"),
    Case("CL minus", b"Content-Length: -5", b"xxxxxHIDDEN"),
    Case("CL hexadecimal", b"Content-Length: 0x5", b"xxxxxHIDDEN"),
    Case("CL space within", b"Content-Length: 5 0", b"xxxxxHIDDEN"),
    Case("CL leading zeros", b"Content-Length: 0005", b"xxxxxHIDDEN", clear=True),
    Case("CL overflow", b"Content-Length: 18446744073709551621", b"xxxxxHIDDEN"),
    Case("CL exponent", b"Content-Length: 5e0", b"xxxxxHIDDEN"),
    Case("CL empty", b"Content-Length:", b"HIDDEN"),
    Case("CL space before colon", b"Content-Length : 5", b"xxxxxHIDDEN"),
    Case("CL underscore", b"Content_Length: 5\r\nContent-Length: 0", b"HIDDEN", clear=True),
    Case("CL NUL", b"Content-Length: 5\x00", b"xxxxxHIDDEN"),
    # chunks
    Case("chunk size 0x", _CHUNKED, b"0x1\r\nx\r\n" + _END + b"HIDDEN"),
    Case("chunk size minus", _CHUNKED, b"-1\r\nx\r\n" + _END + b"HIDDEN"),
    Case("chunk size plus", _CHUNKED, b"+1\r\nx\r\n" + _END + b"HIDDEN"),
    Case("chunk size space", _CHUNKED, b" 1\r\nx\r\n" + _END + b"HIDDEN"),
    Case("chunk size overflow", _CHUNKED, b"10000000000000001\r\nx\r\n" + _END + b"HIDDEN"),
    Case("chunk size empty", _CHUNKED, b"\r\n" + _END + b"HIDDEN"),
    Case("chunk bare LF", _CHUNKED, b"1\nx\n0\n\nHIDDEN"),
    Case("chunk longer than said", _CHUNKED, b"1\r\nxy\r\n" + _END + b"HIDDEN"),
    Case("chunk ended by LF alone", _CHUNKED, b"1\r\nx\n0\r\n\r\nHIDDEN"),
    Case("chunk extension", _CHUNKED, b"1;a=b\r\nx\r\n" + _END + b"HIDDEN", clear=True),
    Case("chunk extension with bare LF", _CHUNKED, b"1;a\nxx\r\n" + _END + b"HIDDEN"),
    Case("chunk extension with CR", _CHUNKED, b"1;a\rb\r\nx\r\n" + _END + b"HIDDEN"),
    Case("trailer length", _CHUNKED, b"1\r\nx\r\n0\r\nContent-Length: 500\r\n\r\nHIDDEN"),
    Case("trailer encoding", _CHUNKED, b"1\r\nx\r\n0\r\nTransfer-Encoding: chunked\r\n\r\nHIDDEN"),
    Case("last chunk 00", _CHUNKED, b"1\r\nx\r\n000\r\n\r\nHIDDEN", clear=True),
    # lines
    Case("bare LF ends the head", b"Content-Length: 0\n", b"HIDDEN"),
    Case("bare CR in a value", b"A: b\rc\r\nContent-Length: 0", b"HIDDEN"),
    Case("NUL in a value", b"A: b\x00c\r\nContent-Length: 0", b"HIDDEN"),
    Case("no colon", b"Content-Length 5\r\nContent-Length: 0", b"HIDDEN"),
    Case("empty name", b": x\r\nContent-Length: 0", b"HIDDEN"),
    Case("two hosts", b"Host: other\r\nContent-Length: 0", b"HIDDEN"),
    Case("space in the target", b"Content-Length: 0", b"HIDDEN", line=b"POST %(path)s x HTTP/1.1"),
    Case("absolute form", b"Content-Length: 1", b"xHIDDEN", clear=True, line=b"POST http://localhost%(path)s HTTP/1.1"),
    Case("version 1.2", b"Content-Length: 0", b"HIDDEN", line=b"POST %(path)s HTTP/1.2"),
    Case("version 2.0", b"Content-Length: 0", b"HIDDEN", line=b"POST %(path)s HTTP/2.0"),
    Case("version RTSP", b"Content-Length: 0", b"HIDDEN", line=b"POST %(path)s RTSP/1.0"),
    Case("no version", b"Content-Length: 0", b"HIDDEN", line=b"POST %(path)s"),
    Case("HTTP/0.9", b"GET /auth\r\n", b"", line=b""),
    Case("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", b"", line=b""),
    Case("upgrade to h2c", b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 0", b"HIDDEN"),
    Case("length is a hop's", b"Connection: Content-Length\r\nContent-Length: 5", b"xxxxxHIDDEN", clear=True),
    Case("body of a GET", b"Content-Length: 0", b"HIDDEN", clear=True, line=b"GET %(path)s HTTP/1.1"),
]
