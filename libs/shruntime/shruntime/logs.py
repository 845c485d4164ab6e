"""Logging of a service process: a line per event on stderr or in a file, plain or JSON."""

import contextlib
import json
import logging
import sys

from shruntime.settings import PREFIX, CommonSettings, SettingsError
from shruntime.text import escaped

log = logging.getLogger(__name__)


class LineFormatter(logging.Formatter):
    """Plain lines: a message stays on a single line, whatever it contains (file names, variables, a server's text).
    Tracebacks follow on lines of their own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escaped(record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time_ms": int(record.created * 1000),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class LogFile(logging.FileHandler):
    """Appends to a file, which `reopen` opens again after a rotation has renamed it."""

    def reopen(self) -> None:
        """Goes on in the file that now has the path; keeps the open file if that cannot be opened. Raises OSError."""
        opened = self._open()
        self.acquire()
        try:
            before, self.stream = self.stream, opened
        finally:
            self.release()
        if before is not None:
            with contextlib.suppress(OSError):  # lines that a full disk did not take are lost with the file
                before.close()


def configure_logging(service: str, settings: CommonSettings) -> None:
    """Sends the log to stderr, or to `log_file`, by the settings. Raises SettingsError for a file that cannot be
    opened."""
    handler = _handler(settings.log_file)
    plain = LineFormatter(f"%(asctime)s %(levelname)-7s {service} %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_json else plain)
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    for noisy in ("aiobotocore", "botocore", "aio_pika", "aiormq", "kombu", "amqp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _handler(path: str) -> logging.Handler:
    if not path:
        return logging.StreamHandler(sys.stderr)
    try:
        return LogFile(path, encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"log_file ({PREFIX}LOG_FILE) = {path!r}: {why}") from error


def reopen_log_file() -> str | None:
    """Opens the log file again, after a rotation; logs a failure into the file still open.

    Returns the path, or None if the log goes to stderr.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogFile):
            try:
                handler.reopen()
            except OSError as error:
                log.error("the log file cannot be opened anew, the old one is kept: %s", error)
            return handler.baseFilename
    return None
