"""Errors of this library: of bytes, of numbers out of range, of a package that an extra would have installed."""

from __future__ import annotations


class FormatError(ValueError):
    """Bytes that do not follow the format, or records that cannot be written.

    ``what`` names the field, the limit and the value; ``at`` is the byte position in the given buffer (0 when encoding,
    where no buffer exists yet).
    """

    def __init__(self, what: str, at: int = 0) -> None:
        super().__init__(f"{what} (at byte {at})")
        self.what = what
        self.at = at

    def __reduce__(self) -> tuple[type[FormatError], tuple[object, ...]]:
        return type(self), (self.what, self.at)


class ValueOutOfRange(FormatError):
    """A number that stored batches may have and new batches may not."""

    def __init__(self, field: str, value: int, least: int, most: int, at: int = 0) -> None:
        super().__init__(f"{field} is {value}, must be {least} to {most}", at)
        self.field = field
        self.value = value
        self.least = least
        self.most = most

    def __reduce__(self) -> tuple[type[FormatError], tuple[object, ...]]:
        return type(self), (self.field, self.value, self.least, self.most, self.at)


EXTRAS_OF_ONE_PACKAGE = ("arrow", "zstd")
"""Extras that bring what is named as missing and nothing else, so that installing that package is enough."""


class MissingExtra(ModuleNotFoundError):
    """`user` needs a package that is not installed, because the distribution was installed without `extra`."""

    def __init__(self, user: str, package: str, extra: str) -> None:
        # Not 'streamhouse[extra]': the package of that name in public indexes is another project.
        alone = f"{package}, or " if extra in EXTRAS_OF_ONE_PACKAGE else ""
        how = f"pip install {alone}'.[{extra}]' in a checkout of StreamHouse"
        super().__init__(f"{user} needs {package}, which is not installed: {how}", name=package)
        self.user = user
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[object, ...]]:
        return type(self), (self.user, self.package, self.extra)
