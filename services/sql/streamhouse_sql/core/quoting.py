"""Names and texts as they are written in SQL."""


def quoted(name: str) -> str:
    """Returns a name in quotes."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Returns a text as a string constant."""
    return "'" + text.replace("'", "''") + "'"
