"""Fixtures of the client's tests that those of the command line use, too."""

from client.tests.conftest import address, platform, server

__all__ = ["address", "platform", "server"]
