"""Lets long polls of consumer groups sleep until their group changes."""

import asyncio


class GroupWaiters:
    """Take a ticket, look, then wait on the ticket: what changes after the ticket was taken is never missed."""

    def __init__(self) -> None:
        self._tickets: dict[str, asyncio.Event] = {}

    def ticket(self, group: str) -> asyncio.Event:
        """Set once the group changes; shared by all who wait for it."""
        return self._tickets.setdefault(group, asyncio.Event())

    def changed(self, group: str) -> None:
        """Wakes who waits for this group; all groups if it is empty."""
        names = [group] if group else list(self._tickets)
        for name in names:
            ticket = self._tickets.pop(name, None)
            if ticket is not None:
                ticket.set()
