"""tools/prose.py sees what it is there for: each rule has a docstring that breaks it, and one that does not."""

from pathlib import Path

import pytest

from tools.prose import over_limits, read


def findings(tmp_path: Path, source: str) -> list[str]:
    """Returns the findings in `source`, without their place."""
    path = tmp_path / "planted.py"
    path.write_text(source)
    return [finding.split(": ", 1)[1] for finding in read(path).findings]


@pytest.mark.parametrize("start", ["What", "Who", "Whether", "One", "Those", "Of", "That", "Where", "Raises", "How"])
def test_a_docstring_without_a_subject_is_found(tmp_path: Path, start: str) -> None:
    found = findings(tmp_path, f'def f() -> None:\n    """{start} of it there is."""\n')
    assert len(found) == 1
    assert f"begins with {start}" in found[0]


def test_a_public_function_that_keeps_its_value_to_itself_is_found(tmp_path: Path) -> None:
    found = findings(tmp_path, 'def decode(data: bytes) -> int:\n    """Decodes a varint."""\n')
    assert len(found) == 1
    assert "decode does not say which value is returned" in found[0]


@pytest.mark.parametrize(
    "source",
    [
        'def decode(data: bytes) -> int:\n    """Decodes a varint and returns its value."""\n',
        'def due(now_ms: int) -> bool:\n    """True if the lease has expired at `now_ms`."""\n',
        'def _decode(data: bytes) -> int:\n    """Decodes a varint."""\n',
        'def close() -> None:\n    """Closes the file."""\n',
        'class Log:\n    @property\n    def end(self) -> int:\n        """Offset after the last record."""\n',
        "def decode(data: bytes) -> int:\n    pass\n",
    ],
)
def test_a_docstring_by_the_rules_passes(tmp_path: Path, source: str) -> None:
    assert findings(tmp_path, source) == []


def test_words_without_a_subject_are_counted_in_docstrings_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text(
        '"""Log. ' + "Words of a sentence. " * 250 + '"""\n' + "# what they are told\n" * 3 + "x = 'what'\n" * 9
    )
    prose = read(path)
    assert prose.words["what"] == 3
    assert over_limits("planted", prose) == [
        f"planted: {3000 / prose.total:.1f} of 1,000 words are what or whatever, at most 2 may be"
    ]
