"""The session that the agent has open, as all its parts see it."""

import asyncio


class CurrentSession:
    """The open session: its token, which calls carry, its id, which events name, and `position`, up to which its events
    have come in. Token and id are empty while there is none."""

    def __init__(self) -> None:
        self.token = ""
        self.session_id = ""
        self.position = 0
        self._open = asyncio.Event()

    def set(self, token: str, session_id: str, position: int = 0) -> None:
        """Notes the open session; what happens behind `position` of the event log concerns it."""
        self.token, self.session_id, self.position = token, session_id, position
        self._open.set()

    def clear(self) -> None:
        """Notes that there is no session."""
        self.token = self.session_id = ""
        self._open.clear()

    async def wait_open(self) -> str:
        """Returns the token of the open session, once there is one."""
        while not self.token:
            await self._open.wait()
        return self.token
