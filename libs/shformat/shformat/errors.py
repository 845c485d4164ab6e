"""The one error of this library."""

from __future__ import annotations


class FormatError(ValueError):
    """Bytes that are not what they claim to be, or records that may not be written.

    ``what`` names the field, the limit and the value; ``at`` is the byte position in the buffer that was
    given (0 when encoding: there is no buffer yet).
    """

    def __init__(self, what: str, at: int = 0) -> None:
        super().__init__(f"{what} (at byte {at})")
        self.what = what
        self.at = at

    def __reduce__(self) -> tuple[type[FormatError], tuple[str, int]]:
        return type(self), (self.what, self.at)
