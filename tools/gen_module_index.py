"""Writes "Where what is" into ARCHITECTURE.md: one line per module, its docstring's first sentence.

Run with --check to fail when the section is not current, or when a module says nothing about itself.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- modules: written by tools/gen_module_index.py -->", "<!-- end of modules -->"
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
    "client/streamhouse",
    "embedded/streamhouse_embedded",
    "cli/streamhouse_cli",
)
GENERATED = "libs/shproto/shproto/v1"


def first_sentence(path: Path) -> str:
    """Of the module's docstring; empty when there is none."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    for at, char in enumerate(text):
        if char in ".:;" and text[at + 1 : at + 2] in ("", " ") and at > 20:
            return text[:at]
    return text


def modules(package: Path) -> list[Path]:
    paths = (path for path in package.rglob("*.py") if not path.relative_to(ROOT).as_posix().startswith(GENERATED))
    return sorted(paths, key=lambda path: (len(path.relative_to(package).parts), path))


def section() -> tuple[str, list[str]]:
    """The text, and the modules that say nothing about themselves."""
    lines, silent = [BEGIN, ""], []
    for package in PACKAGES:
        lines += [f"**`{package}`**", "", "| module | what lives there |", "|---|---|"]
        for path in modules(ROOT / package):
            said = first_sentence(path)
            name = path.relative_to(ROOT / package).as_posix()
            if said:
                lines.append(f"| `{name}` | {said.replace('|', chr(92) + '|')} |")
            elif path.read_text().strip():
                silent.append(f"{package}/{name}")
        lines.append("")
    return "\n".join([*lines, END]), silent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the section is not current")
    check = parser.parse_args().check
    text, silent = section()
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    wanted = before + text + rest.split(END)[1]
    if silent:
        print("modules without a docstring:", *silent, sep="\n  ")
    if check:
        if wanted != page:
            print("ARCHITECTURE.md is not current, run tools/gen_module_index.py")
        return int(bool(silent) or wanted != page)
    PAGE.write_text(wanted)
    return int(bool(silent))


if __name__ == "__main__":
    sys.exit(main())
