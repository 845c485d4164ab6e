"""Addresses and URLs that users give: checked before anything connects, and shown without their passwords."""

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import parse_qsl, urlsplit

from shproto.errors import InvalidArgument

PORT_MAX = 65_535
_PASSWORD_OPTION = re.compile(r"(\w*password\s*=\s*)('[^']*'|[^&\s]*)", re.IGNORECASE)
_ADDRESS = re.compile(r"(?:\[[0-9a-fA-F:.%]+\]|[^\s:\[\]/,@]+):(?P<port>\d{1,5})")
_HOST = re.compile(r"(?:\[[0-9a-fA-F:.%]+\]|[^:\[\]]*)(?::(?P<port>.*))?")


def masked(url: str) -> str:
    """Returns the URL with `***` for anything that may be a password; right or wrong, the rest stays."""
    head, slashes, rest = url.partition("//")
    credentials, at, place = rest.rpartition("@")
    if at:
        user, colon, _ = credentials.partition(":")
        credentials = user + (":***" if colon else "")
    elif slashes:
        place = re.sub(r"^([^:/?\[]*):(?!\d*(?:[/?,]|$))[^?]*", r"\1:***", place)  # the @ and the host may be missing
    return _PASSWORD_OPTION.sub(r"\1***", head + slashes + credentials + at + place)


def addresses(text: str) -> str:
    """Returns `text`, a setting, if it is host:port to connect to, or several with commas in between. Raises
    ValueError."""
    _to_connect(text.split(","))
    return text


def addresses_of(bootstrap: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the host:port addresses of a text (commas between several) or a sequence. Raises InvalidArgument."""
    if not isinstance(bootstrap, str) and not all(isinstance(part, str) for part in bootstrap):
        raise InvalidArgument(f"bootstrap must be text, not {bootstrap!r}", field="bootstrap", value=bootstrap)
    try:
        return _to_connect(bootstrap.split(",") if isinstance(bootstrap, str) else bootstrap)
    except ValueError as error:
        raise InvalidArgument(f"bootstrap: {error}", field="bootstrap", value=bootstrap) from error


def _to_connect(parts: Iterable[str]) -> tuple[str, ...]:
    """Returns addresses to connect to, without blanks around them and without empty parts, as a comma at the end makes
    them. Raises ValueError for a part that is no address, or has port 0, and if there is none."""
    found = tuple(part.strip() for part in parts if part.strip())
    for place in found:
        if int(address(place).rpartition(":")[2]) == 0:
            raise ValueError(f"{place!r} has port 0: name the port at which the service listens")
    if not found:
        raise ValueError("no address is given")
    return found


def address(text: str) -> str:
    """Returns `text`, a setting, if it is host:port. Raises ValueError."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"]) > PORT_MAX:
        raise ValueError(f"{text!r} must be host:port, as in 127.0.0.1:7070")
    return text


def advertised_or_empty(text: str) -> str:
    """Returns `text`, a setting, if it is empty or host:port that can be connected to. Raises ValueError."""
    if not text:
        return text
    host, _, port = address(text).rpartition(":")
    if is_unspecified(host):
        raise ValueError(f"{text!r} means all addresses of a machine: name the one at which others reach this service")
    if int(port) == 0:
        raise ValueError(f"{text!r} has port 0: name the port at which others reach this service")
    return text


def is_unspecified(host: str) -> bool:
    """True for 0.0.0.0, [::] and other spellings that the system takes for them (0, 0x0, [::ffff:0.0.0.0])."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, flags=socket.AI_NUMERICHOST)
    except OSError:  # a name
        return False
    numbers = [ipaddress.ip_address(str(item[4][0]).partition("%")[0]) for item in found]
    return any(number.is_unspecified or number == ipaddress.ip_address("::ffff:0.0.0.0") for number in numbers)


def address_or_empty(text: str) -> str:
    """Returns `text`, a setting, if it is empty or host:port. Raises ValueError."""
    return text and address(text)


def url_of(*schemes: str) -> Callable[[str], str]:
    """Returns a validator for a setting: empty, or a URL of one of `schemes` that can be parsed. It raises
    ValueError, whose text has the URL without its password."""

    def check(url: str) -> str:
        problem = _problem(url, schemes) if url else ""
        if problem:
            raise ValueError(f"{masked(url)!r} {problem}")
        return url

    return check


def _problem(url: str, schemes: tuple[str, ...]) -> str:
    if not url.startswith(tuple(f"{scheme}://" for scheme in schemes)):
        return f"must be a URL that begins with {' or '.join(f'{scheme}://' for scheme in schemes)}"
    try:
        parts = urlsplit(url)
    except ValueError:
        return "cannot be parsed: is a bracket in user or password not percent-encoded?"
    if parts.netloc.count("@") > 1:
        return "has more than one @: in user and password, write %40"
    if parts.fragment or "#" in url:
        return "has a #: in user and password, write %23"
    for host in parts.netloc.rpartition("@")[2].split(","):
        match = _HOST.fullmatch(host)
        if match is None:
            return "has a host that cannot be parsed: it is name:port, or [address]:port for IPv6"
        port = match["port"]
        if port and not (port.isdecimal() and 0 < int(port) <= PORT_MAX):
            return f"has a port that is not 1 to {PORT_MAX}; a : or / in user or password is written %3A or %2F"
    try:
        parse_qsl(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        return "has options that are not name=value, joined by &"
    return ""
