"""Makes the data folders that tests of the upgrade open: what a version left behind, and in facts.json what is in it.

    git worktree add --detach OLD COMMIT        # the last commit whose registry has the revision
    PYTHONPATH=OLD/src .venv/bin/python tests/vectors/folders/make.py 0003 tests/vectors/folders/0003.tar.gz

It uses the command line and HTTPS alone, so that it runs with every version; what a version does not have yet is left out.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import signal
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

UPLINKD = [sys.executable, "-m", "uplinkd"]
# What is made today is looked at in years.
LONG = {"--token-ttl": "3600d", "--keep-age": "0", "--down-age": "3600d"}
LISTEN = ("--listen", "--mqtt-listen", "--nats-listen")
LEFT_OUT = (
    "nats.log",
    "start.log",
    "nats.conf",
    "access.json",
    "lock",
    "serve.lock",
    "registry.sqlite.lock",
    "keep.lock",
)


class Folder:
    """A data folder that is being made."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.facts: dict[str, Any] = {"devices": {}, "tokens": {}, "messages": {}}

    def run(self, *arguments: str) -> Any:
        done = subprocess.run(
            [*UPLINKD, *arguments, "--json", "--data", str(self.data)], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    def fill(self, commands: set[str]) -> None:
        facts = self.facts
        product = self.run("product", "create", "old homes")
        key = product["productKey"]
        facts["product"], facts["productSecret"] = key, product["productSecret"]
        for name in ("lamp-1", "lamp-2", "disabled-1"):
            facts["devices"][name] = self.run("device", "create", key, name)["deviceSecret"]
        self.run("device", "disable", key, "disabled-1")
        self.run("topic", "add", key, "user/own/report", "--right", "publish")
        facts["topics"] = [[each["levels"], each["right"]] for each in self.run("topic", "list", key)]
        if "app" in commands:
            made = self.run("app", "create", "reader", "--product", key)
            facts["app"] = {
                "name": "reader",
                "key": made.get("key") or made.get("user"),
                "secret": made.get("secret") or made.get("password"),
            }
        if "user" in commands:
            facts["user"] = self.run("user", "create", "ada", "--role", "operator")["name"]
            facts["apiKey"] = self.run("apikey", "create", "program", "--scope", "admin")["key"]
        if "group" in commands:
            self.run("group", "create", "backend", "--product", key, "--app", "reader")
            facts["group"] = "backend"

    def serve(self, commands: set[str], options: str) -> None:
        given = [part for flag, value in LONG.items() if flag in options for part in (flag, value)]
        given += [part for flag in LISTEN if flag in options for part in (flag, "127.0.0.1:0")]
        given += ["--console-listen", ""] if "--console-listen" in options else []
        server = subprocess.Popen(
            [*UPLINKD, "serve", "--data", str(self.data), "--workers", "1", *given], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout
        banner = ""
        while " state " not in banner:
            banner += server.stdout.readline()
        match = re.search(r"https://127\.0\.0\.1:\d+", banner)
        assert match
        try:
            for name in ("lamp-1", "lamp-2"):
                self.report(match[0], name)
            if "send" in commands:
                key = self.facts["product"]
                topic = f"/{key}/lamp-2/user/get"
                self.facts["down"] = self.run("send", key, "lamp-2", topic, "sent by an old version")["messageId"]
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=30)

    def report(self, url: str, name: str) -> None:
        key = self.facts["product"]
        members = {"clientId": f"{key}.{name}", "deviceName": name, "productKey": key}
        content = "".join(f"{member}{value}" for member, value in sorted(members.items()))
        sign = hmac.new(self.facts["devices"][name].encode(), content.encode(), hashlib.sha1).hexdigest()
        login = json.dumps({**members, "version": "default", "signmethod": "hmacsha1", "sign": sign}).encode()
        token = self.post(f"{url}/auth", login, {"Content-Type": "application/json"})["token"]
        self.facts["tokens"][name] = token
        for number in range(5):
            payload = f"{name} says {number}"
            headers = {"Content-Type": "application/octet-stream", "password": token}
            answer = self.post(f"{url}/topic/{key}/{name}/user/update", payload.encode(), headers)
            self.facts["messages"][str(answer["messageId"])] = payload

    def post(self, url: str, body: bytes, headers: dict[str, str]) -> Any:
        context = ssl.create_default_context(cafile=self.data / "tls" / "ca.pem")
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), context=context) as answer:
            document = json.load(answer)
        assert document["code"] == 0, document
        return document["info"]


def main(revision: str, file: Path) -> None:
    def words(*arguments: str) -> str:
        return subprocess.run([*UPLINKD, *arguments], capture_output=True, text=True, check=True).stdout

    commands = set(re.findall(r"^  (\w+)", words("--help").partition("Commands:")[2], re.MULTILINE))
    with tempfile.TemporaryDirectory() as place:
        folder = Folder(Path(place) / "data")
        folder.fill(commands)
        folder.serve(commands, words("serve", "--help"))
        folder.facts["revision"] = revision
        (folder.data / "facts.json").write_text(json.dumps(folder.facts, indent=1))
        with tarfile.open(file, "w:gz") as archive:
            for path in sorted(folder.data.rglob("*")):
                if path.is_file() and path.name not in LEFT_OUT and path.parent.name != "tls":
                    info = archive.gettarinfo(path, str(path.relative_to(folder.data)))
                    info.uid = info.gid = 0
                    info.uname = info.gname = ""
                    with path.open("rb") as content:
                        archive.addfile(info, content)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
