"""Checks the English of docstrings and comments: verb first, subject named, the returned value said.

    python -m tools.prose                      checks all packages, as `make check` does
    python -m tools.prose libs/shstore         lists findings and word counts of some files or directories

Counted are words per 1,000 words of docstrings and comments. The limits lie a little above well-kept projects of the
field; they keep sentences without a subject out ("what was told", "those behind it"), not single words.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tools.gen_module_index import GENERATED, PACKAGES, ROOT

REFUSED_STARTS = frozenset(
    ("What", "Who", "Whoever", "Whether", "One", "Ones", "Those", "Of", "That", "Where", "Raises", "How", "Nobody")
)
RETURNS = re.compile(
    r"\b(return(s|ed)?|yield(s|ed)?|true (if|for|when|while|once|unless)|false (if|when))\b", re.IGNORECASE
)
CODE = re.compile(r"``?[^`]*``?")  # names are no words of the language
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
# Words per 1,000 words of a package's docstrings and comments, and the most there may be.
LIMITS_PER_1000 = {"what": 2.0, "who": 0.5, "one": 8.0}
COUNTED = {
    "what": ("what", "whatever"),
    "who": ("who", "whoever", "whom", "nobody", "everybody", "somebody", "anybody"),
    "one": ("one", "ones"),
    "it": ("it", "its"),
    "return": ("return", "returns", "returned"),
}
FEWEST_WORDS = 1_000  # a package with fewer words is not judged by its counts: two words would decide

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(slots=True)
class Prose:
    """Words and findings of some files."""

    words: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of words."""
        return self.words.total()

    def per_1000(self, name: str) -> float:
        """Returns how often the words of COUNTED[name] stand in 1,000 words, 0 if there are none."""
        return 1000 * sum(self.words[word] for word in COUNTED[name]) / self.total if self.total else 0.0

    def add(self, other: "Prose") -> None:
        """Adds the words and findings of `other`."""
        self.words += other.words
        self.findings += other.findings


def words_of(text: str) -> list[str]:
    """Returns the words of `text` in lower case, without those in backticks."""
    return [word.lower() for word in WORD.findall(CODE.sub(" ", text))]


def read(path: Path) -> Prose:
    """Returns the words and findings of one Python file."""
    source = path.read_text()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
    prose = Prose()
    for node, public in documented(ast.parse(source), public=True):
        text = ast.get_docstring(node)
        if text is None:
            continue
        prose.words.update(words_of(text))
        line = getattr(node, "lineno", 1)
        prose.findings += (f"{name}:{line}: {problem}" for problem in problems(node, text, public=public))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("#!", "# type:", "# noqa", "# pragma")):
            prose.words.update(words_of(token.string))
    return prose


def documented(
    node: ast.Module | ast.ClassDef | Function, *, public: bool
) -> Iterator[tuple[ast.Module | ast.ClassDef | Function, bool]]:
    """Yields the module, its classes and functions, and for each whether its whole name is public."""
    yield node, public
    for child in ast.walk(node) if isinstance(node, Function) else ast.iter_child_nodes(node):
        if child is not node and isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inside = public and not isinstance(node, Function) and not child.name.startswith("_")
            yield from documented(child, public=inside)


def problems(node: ast.Module | ast.ClassDef | Function, text: str, *, public: bool) -> Iterator[str]:
    """Yields the ways in which the docstring `text` of `node` breaks the rules."""
    first = WORD.match(text)
    if first is not None and first.group() in REFUSED_STARTS and not isinstance(node, ast.Module):
        yield f"docstring begins with {first.group()}: name the subject or begin with the verb: {text.splitlines()[0]}"
    if isinstance(node, Function) and public and returns_value(node) and not RETURNS.search(text):
        yield f"docstring of {node.name} does not say which value is returned: {text.splitlines()[0]}"


def returns_value(function: Function) -> bool:
    """True if the function returns a value: neither None nor a property, a context manager or a test's fixture."""
    returned = function.returns
    if returned is None or (isinstance(returned, ast.Constant) and returned.value is None):
        return False
    if isinstance(returned, ast.Name) and returned.id in ("NoReturn", "Never", "Self"):
        return False
    decorators = {ast.unparse(decorator).split("(")[0].split(".")[-1] for decorator in function.decorator_list}
    return not decorators & {
        "property",
        "cached_property",
        "contextmanager",
        "asynccontextmanager",
        "fixture",
        "overload",
    }


def python_files(paths: list[Path]) -> Iterator[Path]:
    """Yields the Python files below `paths`, without generated code and tests."""
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            if GENERATED not in file.as_posix() and "tests" not in file.parts and file.name != "services.py":
                yield file


def over_limits(name: str, prose: Prose) -> list[str]:
    """Returns the word counts of package `name` that lie above their limits."""
    if prose.total < FEWEST_WORDS:
        return []
    return [
        f"{name}: {prose.per_1000(word):.1f} of 1,000 words are {' or '.join(COUNTED[word])}, at most {limit:g} may be"
        for word, limit in LIMITS_PER_1000.items()
        if prose.per_1000(word) > limit
    ]


def table(rows: list[tuple[str, Prose]]) -> str:
    """Returns the counts of `rows` as text, a line each."""
    head = f"{'':44}{'words':>8}" + "".join(f"{word:>8}" for word in COUNTED) + f"{'findings':>10}"
    lines = [
        f"{name:44}{prose.total:8}"
        + "".join(f"{prose.per_1000(word):8.1f}" for word in COUNTED)
        + f"{len(prose.findings):10}"
        for name, prose in rows
    ]
    return "\n".join([head, *lines])


def main() -> int:
    """Prints the findings; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="files or directories; all packages if none is given")
    parser.add_argument("--table", action="store_true", help="print the counts of each package and stop")
    options = parser.parse_args()
    targets = [(str(path), path) for path in options.paths] or [(package, ROOT / package) for package in PACKAGES]
    rows = []
    for name, path in targets:
        prose = Prose()
        for file in python_files([path.resolve()]):
            prose.add(read(file))
        rows.append((name, prose))
    if options.table:
        print(table(rows))
        return 0
    findings = [finding for name, prose in rows for finding in (*prose.findings, *over_limits(name, prose))]
    print("\n".join(findings) or "prose: no findings")
    if options.paths:
        print(table(rows))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
