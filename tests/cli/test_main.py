"""What every command does when it fails."""

from __future__ import annotations

import pytest

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
