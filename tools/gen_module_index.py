"""Writes docs/modules.md: one line per module, its docstring's first sentence.

Run with --check to fail when the page is not current, or when a module says nothing about itself.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "modules.md"
HEAD = """# Modules

<!-- Written by tools/gen_module_index.py from the first sentence of each module; `make format` writes it again. -->

[ARCHITECTURE](../ARCHITECTURE.md) says how the parts work together and where each step of the flow is. This page has a
line per module, package by package, from the libraries up.
"""
PACKAGES = (
    "libs/shformat/shformat",
    "libs/shproto/shproto",
    "libs/shruntime/shruntime",
    "libs/shstore/shstore",
    "libs/shcluster/shcluster",
    "libs/shread/shread",
    "services/coordinator/streamhouse_coordinator",
    "services/ingest/streamhouse_ingest",
    "services/segmenter/streamhouse_segmenter",
    "services/query/streamhouse_query",
    "services/sql/streamhouse_sql",
    "client/streamhouse",
    "embedded/streamhouse_embedded",
    "cli/streamhouse_cli",
)
GENERATED = "libs/shproto/shproto/v1"


def first_sentence(path: Path) -> str:
    """Returns the first sentence of the module's docstring, or an empty text without one."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    for at, char in enumerate(text):
        if char in ".:;" and text[at + 1 : at + 2] in ("", " ") and at > 20:
            return text[:at]
    return text


def modules(package: Path) -> list[Path]:
    """Returns the modules of a package that are written by hand, those nearest to its root first."""
    paths = (path for path in package.rglob("*.py") if not path.relative_to(ROOT).as_posix().startswith(GENERATED))
    return sorted(paths, key=lambda path: (len(path.relative_to(package).parts), path))


def page() -> tuple[str, list[str]]:
    """Returns the text of the page, and the modules without a docstring."""
    lines, silent = [HEAD], []
    for package in PACKAGES:
        lines += [f"## {package}", "", "| module | contents |", "|---|---|"]
        for path in modules(ROOT / package):
            sentence = first_sentence(path)
            name = path.relative_to(ROOT / package).as_posix()
            if sentence:
                lines.append(f"| `{name}` | {sentence.replace('|', chr(92) + '|')} |")
            elif path.read_text().strip():
                silent.append(f"{package}/{name}")
        lines.append("")
    return "\n".join(lines), silent


def main() -> int:
    """Writes or checks the page; returns 1 if it is not current or a module says nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the page is not current")
    check = parser.parse_args().check
    text, silent = page()
    if silent:
        print("modules without a docstring:", *silent, sep="\n  ")
    if check:
        current = PAGE.exists() and PAGE.read_text() == text
        if not current:
            print("docs/modules.md is not current, run tools/gen_module_index.py")
        return int(bool(silent) or not current)
    PAGE.write_text(text)
    return int(bool(silent))


if __name__ == "__main__":
    sys.exit(main())
