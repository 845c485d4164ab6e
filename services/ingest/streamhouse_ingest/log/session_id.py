"""The session that the agent has open, as all its parts see it.

Owns: token, id and position of the session. Does not own: opening and keeping it (leadership/session.py).
Invariants: token and id are set and cleared together, in a single step without an await.
"""

import asyncio


class CurrentSession:
    """The open session. Calls carry the token, events name the id, and events up to `position` have arrived. Token and
    id are empty while no session is open."""

    def __init__(self) -> None:
        self.token = ""
        self.session_id = ""
        self.position = 0
        self._open = asyncio.Event()

    def set(self, token: str, session_id: str, position: int = 0) -> None:
        """Sets the open session; it follows the events behind `position`, the feed position at which it opened."""
        self.token, self.session_id, self.position = token, session_id, position
        self._open.set()

    def clear(self) -> None:
        """Clears token and id: no session is open."""
        self.token = self.session_id = ""
        self._open.clear()

    async def wait_open(self) -> str:
        """Returns the token of the open session; waits for a session if none is open."""
        # A loop: a session may be lost again between the event and the turn of this task.
        while not self.token:
            await self._open.wait()
        return self.token
