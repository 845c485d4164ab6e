"""Topics that a consumer subscribes to: names, or a pattern that names have to match."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shproto.errors import InvalidArgument

Topics = Sequence[str] | re.Pattern[str]


@dataclass(frozen=True, slots=True)
class Subscription:
    """Names of topics, or a pattern. False as a truth value if empty."""

    topics: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None

    def __bool__(self) -> bool:
        return bool(self.topics) or self.pattern is not None

    def includes(self, topic: str) -> bool:
        """Returns True if the topic is subscribed to: a pattern has to match the whole name."""
        return topic in self.topics if self.pattern is None else self.pattern.fullmatch(topic) is not None


def subscription_of(topics: Topics, pattern: str | None = None) -> Subscription:
    """Returns the subscription to each of these topics once, or to a pattern, given compiled or as text. Raises
    InvalidArgument."""
    if pattern is not None:
        if isinstance(topics, re.Pattern) or len(topics):
            raise InvalidArgument("give topics or a pattern, and not both", field="pattern", value=pattern)
        if not isinstance(pattern, str):
            raise InvalidArgument(f"pattern must be text, not {pattern!r:.300}", field="pattern", value=pattern)
        try:
            return Subscription(pattern=re.compile(pattern))
        except re.error as error:
            raise InvalidArgument(
                f"pattern is {pattern!r:.300}, no regular expression: {error}", field="pattern", value=pattern
            ) from None
    if isinstance(topics, re.Pattern):
        if not isinstance(topics.pattern, str):
            raise InvalidArgument(f"the pattern must be of text, not {topics!r:.300}", field="topics", value=topics)
        return Subscription(pattern=topics)
    if isinstance(topics, str) or not all(isinstance(topic, str) for topic in topics):
        raise InvalidArgument(
            f"topics must be a list of names or a compiled pattern, not {topics!r:.300}", field="topics", value=topics
        )
    return Subscription(tuple(dict.fromkeys(topics)))
