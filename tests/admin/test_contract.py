"""The management API does what its own OpenAPI says, whatever is sent: schemathesis against the real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import Server, cli, cli_json, environment

CONFIG = Path(__file__).parent / "schemathesis.toml"


@pytest.mark.slow
def test_the_api_keeps_its_own_contract(tmp_path: Path) -> None:
    """Every operation: examples, the bounds of each value, and random calls; no server error, no undocumented answer, nothing
    malformed accepted, nothing without its key."""
    server = Server(tmp_path / "data", console_port=0).start()
    data = server.data
    try:
        cli("product", "create", "contract", "--key", "contract", data=data)
        for number in range(1, 4):
            cli("device", "create", "contract", f"lamp-{number:04}", data=data)
        cli("app", "create", "contract", "--product", "contract", data=data)
        cli("group", "create", "contract", "--product", "contract", data=data)
        cli("apikey", "create", "contract", "--scope", "read", data=data)
        cli("user", "create", "contract", "--role", "viewer", data=data)
        key = cli_json("apikey", "create", "schemathesis", "--scope", "admin", data=data)["key"]
        done = subprocess.run(
            [
                *(Path(sys.executable).parent / "st", "--config-file", CONFIG),
                *("run", f"http://127.0.0.1:{server.console_port}/api/v1/openapi.json"),
                *("-H", f"Authorization: Bearer {key}", "--phases", "examples,coverage,fuzzing"),
                *("--max-examples", "25", "--generation-deterministic", "--continue-on-failure"),
                # A stream has no end; and a request may keep the schema and break a rule that no schema can say, such as
                # that a topic is of the device that it is sent to.
                *("--exclude-path-regex", "/stream$", "--exclude-checks", "positive_data_acceptance"),
            ],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment(PYTHONWARNINGS="default", NO_COLOR="1"),
            cwd=tmp_path,
            check=False,
        )
        report = os.environ.get("UPLINKD_TEST_PICTURES")
        if report:
            Path(report).mkdir(parents=True, exist_ok=True)
            (Path(report) / "schemathesis.txt").write_text(done.stdout)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert "Traceback" not in server.log.read_text()
        schema = json.loads(
            subprocess.run(
                ["curl", "-s", f"http://127.0.0.1:{server.console_port}/api/v1/openapi.json"],
                capture_output=True,
                check=True,
            ).stdout
        )
        operations = sum(len(path) for path in schema["paths"].values())
        assert f"{operations - 3}/{operations}" in done.stdout, "three streams are left out, and nothing else"
    finally:
        server.stop()
