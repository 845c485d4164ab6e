"""Limits that several packages have to agree on. Pure: numbers, each with its unit in its name and its reason.

Bounds of the format itself are in shformat.limits; limits that an operator may set are in each service's settings.
"""

NAME_LENGTH_MAX = 249
"""Characters of the name of a topic, group, client or agent. Kafka's limit for topics, where the name of a partition's
directory has to fit 255 bytes."""

TOPIC_ID_BYTES = 16
"""Size of a topic id, which is a UUID."""

METADATA_LENGTH_MAX = 4096
"""Characters of the note beside a committed offset: Kafka's offset.metadata.max.bytes."""

GROUP_SESSION_TIMEOUT_MS_MIN, GROUP_SESSION_TIMEOUT_MS_MAX = 100, 3_600_000
"""Time that a member of a group may be silent for."""

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
"""Size of one gRPC message, checked by sender and receiver. A batch of 16 MiB (the format's limit), or a fetch response
of some batches, fits with space left."""

SNAPSHOT_BYTES_MAX = 16 * 1024 * 1024
"""Size of the producers' snapshot of one range: an agent keeps some 100,000 producers of 130 bytes."""

SNAPSHOTS_BYTES_MAX = 32 * 1024 * 1024
"""Size of the producers' snapshots in one message, half of MESSAGE_BYTES_MAX: the other half is for grants or slices
beside them, some 100 bytes each. Two snapshots of the largest size, or some 250 ranges with 1,000 producers each."""

INLINE_BYTES_MAX = 512 * 1024
"""Decoded size up to which a service checks, encodes or decodes records on its event loop, at about 1 ms per MiB. More
is done in a thread. The decoded size counts: 250 KB may unpack to 63 MiB."""

RETRY_FIRST_MS, RETRY_MS_MAX = 50, 1_000
"""Back-off of a call that a reader or writer waits for: a service that comes back is found within a second, at the cost
of one attempt a second."""

RECONNECT_FIRST_MS, RECONNECT_MS_MAX = 100, 2_000
"""Back-off of a session or an event feed. Coordinators restart within a second, and the waits of a fleet spread over
more than 100 ms."""
