"""Pages lead where they say: links, anchors, the index, and commands that the command line understands."""

import re
import shlex
from collections import Counter
from pathlib import Path

import click
import pytest
from streamhouse_cli.app import cli

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("examples/*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_no_page_installs_the_package_of_our_name_from_an_index(page: Path) -> None:
    """The one in PyPI is another project: pages install a checkout, `'.[extra]'`, or a wheel."""
    assert not re.findall(r"pip install [^`\n]*\bstreamhouse(?=[\s`'\[]|$)", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(file), f"{target}: there is no such heading"


def test_the_index_has_every_page() -> None:
    listed = set(re.findall(r"\]\(([\w./-]+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    pages = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    missing = {page for page in pages - listed if not page.startswith("decisions/0")} - {"README.md"}
    assert not missing


def test_the_decisions_are_numbered_without_gaps_and_listed_in_order() -> None:
    """Two branches may take the same number."""
    folder = ROOT / "docs" / "decisions"
    files = sorted(path.name for path in folder.glob("0*.md"))
    assert [name[:4] for name in files] == [f"{number:04}" for number in range(1, len(files) + 1)]
    rows = re.findall(r"^\| \[(\d{4})\]\(([\w.-]+)\) \| (.+) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    assert [file for _, file, _ in rows] == files
    for number, file, title in rows:
        assert (folder / file).read_text().startswith(f"# {number}: {title}\n"), file


def whole_lines(block: str) -> list[str]:
    """Returns the lines of a block, those of a command of ours whose quotes go on in the next line as one."""
    found: list[str] = []
    for line in block.splitlines():
        if found and found[-1].lstrip().startswith("streamhouse ") and _goes_on(found[-1]):
            found[-1] += f"\n{line}"
        else:
            found.append(line)
    return found


def _goes_on(command: str) -> bool:
    try:
        shlex.split(command)
    except ValueError as error:
        return "quotation" in str(error)
    return False


def commands(page: Path) -> list[str]:
    """Returns the commands of ours in a page's blocks; what shows a syntax (NAME, [--option], …) is none."""
    found = []
    for indent, language, block in FENCE.findall(page.read_text()):
        if language not in ("", "sh", "bash", "cron"):
            continue
        for line in whole_lines(block):
            command = line.removeprefix(indent).split(" #")[0]
            for part in re.split(r"\s(?:\||&&)\s", command):
                part = part.strip()
                if part.startswith("streamhouse ") and not re.search(r"\[|\||…|\b[A-Z]{2,}\b", part):
                    found.append(re.split(r"\s(?:>>?|<)\s", part)[0])
    return found


COMMANDS = [(command, name) for page, name in zip(PAGES, IDS, strict=True) for command in commands(page)]


@pytest.mark.parametrize(("command", "page"), COMMANDS)
def test_commands_are_understood(command: str, page: str) -> None:
    found: click.Command = cli
    arguments = shlex.split(command)[1:]
    context = click.Context(cli, obj={})
    while isinstance(found, click.Group):
        name = arguments.pop(0)
        assert name in found.commands, f"{page}: {command}"
        found = found.commands[name]
    with found.make_context(found.name, arguments, parent=context):  # parses and checks; runs nothing
        pass


def test_most_pages_with_commands_are_looked_at() -> None:
    assert {name for _, name in COMMANDS} >= {"README.md", "docs/backup.md", "docs/partitions.md", "docs/upgrading.md"}


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        (target, name)
        for page, name in zip(PAGES, IDS, strict=True)
        for target in re.findall(r"(?:^ *|`|; )make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert {target for target, _ in named} >= {"demo", "test", "test-all", "quick"}
    assert sorted((target, name) for target, name in named if target not in targets) == []
