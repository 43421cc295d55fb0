"""Whether a locked dependency has a known vulnerability: `make audit`. Ends with 1 if one has, 0 if none has, 0 with one clear line if
nobody could be asked.

pip-audit asks PyPI, or OSV where PyPI's advisories are not to be had, as behind a mirror, which has the packages alone. To such a
mirror's 404 pip-audit 2.10 says that no vulnerability was found; so what it has skipped is counted here, and is no answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCKS = ("run", "amqp", "build")
SERVICES = ("pypi", "osv")


@dataclass(slots=True)
class Answer:
    """`asked` packages are known there, and `unknown` ones not; `fault` says why there is no answer at all."""

    asked: int = 0
    found: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    fault: str = ""


def understood(output: str) -> Answer:
    """What pip-audit's JSON says."""
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return Answer(fault="it cannot be reached")
    answer = Answer()
    for each in packages:
        if "skip_reason" in each:
            answer.unknown.append(each["name"])
            continue
        answer.asked += 1
        for vulnerability in each["vulns"]:
            fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
            answer.found.append(f"{each['name']} {each['version']}: {vulnerability['id']}, fixed in {fixed}")
    if not answer.asked:
        answer.fault = "it has no advisories"
    return answer


def ask(pip_audit: str, service: str) -> Answer:
    """All locks at once; nothing is written but below a folder that goes again."""
    locks = [part for lock in LOCKS for part in ("-r", str(ROOT / "requirements" / f"{lock}.txt"))]
    with tempfile.TemporaryDirectory() as cache:
        options = ["--require-hashes", "--disable-pip", "--progress-spinner", "off", "--timeout", "10"]
        done = subprocess.run(  # noqa: S603 - a program of our own environment
            [pip_audit, "-s", service, "-f", "json", "--cache-dir", cache, *options, *locks],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )
    return understood(done.stdout)


def main(pip_audit: str) -> int:
    faults = []
    for service in SERVICES:
        answer = ask(pip_audit, service)
        for line in answer.found:
            print(line)
        if answer.found:
            return 1
        if not answer.fault:
            print(f"no known vulnerability in {answer.asked} locked packages, says {service}")
            if answer.unknown:
                print(f"NOT AUDITED, since it does not know them: {', '.join(sorted(answer.unknown))}")
            return 0
        faults.append(f"{service}: {answer.fault}")
    print(f"NOT AUDITED: no advisory service answers ({'; '.join(faults)}); try again where one is reachable")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
