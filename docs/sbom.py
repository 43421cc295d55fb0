"""Adds to a CycloneDX document, as cyclonedx-py writes it, what it does not see: which files the lock allows, and what packages have
inside. `make sbom`; standard input to standard output."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from docs.licences import ROOT, licence, locked, parts


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """`document` with hashes, licences and inner components, and with the packages of the lock alone."""
    wanted = {each.name: each for each in locked("run") if each.is_here}
    hashes = _hashes()
    document["components"] = [each for each in document["components"] if _name(each) in wanted]
    kept = {each["bom-ref"] for each in document["components"]} | {_main(document)}
    for each in document["components"]:
        each["licenses"] = [{"expression": licence(_name(each))}]
        each["externalReferences"] = [
            {
                "type": "distribution",
                "url": f"pkg:pypi/{_name(each)}@{each['version']}",
                "comment": "one of these files, by the lock",
                "hashes": [{"alg": "SHA-256", "content": digest} for digest in hashes[_name(each), each["version"]]],
            }
        ]
        inside = [part for part in parts() if part.package == _name(each)]
        if inside:
            each["components"] = [
                {
                    "type": "library",
                    "bom-ref": f"{_name(each)}:{part.how}:{part.name}@{part.version}",
                    "name": part.name,
                    **({"version": part.version} if part.version else {}),
                    **({"purl": f"pkg:{part.how}/{part.name}@{part.version}"} if part.version else {}),
                    "licenses": [{"expression": part.licence}],
                }
                for part in inside
            ]
    document["dependencies"] = [
        {**each, "dependsOn": [ref for ref in each.get("dependsOn", []) if ref in kept]}
        for each in document.get("dependencies", [])
        if each["ref"] in kept
    ]
    return document


def _main(document: dict[str, Any]) -> str:
    return str(document.get("metadata", {}).get("component", {}).get("bom-ref", ""))


def _name(component: dict[str, Any]) -> str:
    return re.sub(r"[-_.]+", "-", str(component["name"])).lower()


def _hashes() -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    key = ("", "")
    for line in (ROOT / "requirements" / "run.txt").read_text().splitlines():
        if match := re.match(r"([a-z0-9-]+)==(\S+)", line):
            key = match[1], match[2]
        elif match := re.search(r"--hash=sha256:([0-9a-f]{64})", line):
            found.setdefault(key, []).append(match[1])
    return found


def main() -> None:
    json.dump(completed(json.load(sys.stdin)), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
