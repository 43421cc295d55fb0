"""What every command does when it fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.house import UPLINKD, environment
from uplinkd import cli
from uplinkd.core.errors import Rejected


def test_a_failure_is_lines_that_do_not_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words may be a server's elsewhere, or hold what a device has sent."""

    def fail(**_: object) -> None:
        raise Rejected("no \x1b[2Jlamp 灯\nat all")

    monkeypatch.setattr(cli, "uplinkd", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "uplinkd: no \\x1b[2Jlamp 灯\nuplinkd: at all\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("product", "list", "--json"), "No space left on device"),
        (
            ("registry", "copy", "--to", "sqlite:////nowhere/registry.sqlite", "--data", "nowhere"),
            "nowhere/serve.lock: No such file",
        ),
        (("product", "list", "--data", "x" * 300), "File name too long"),
    ],
)
def test_what_the_system_refuses_is_a_line(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """A full disk where the answer goes, a folder that is not there, a name that is too long."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*UPLINKD, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=environment(),
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.decode().startswith("uplinkd: ")
    assert said in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1
