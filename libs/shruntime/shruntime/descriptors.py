"""File descriptors of this process: the limit, raised as far as allowed, and the connections' part of it."""

import errno
import logging
import resource

log = logging.getLogger(__name__)

NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
"""OSErrors of a process, or machine, that has no file descriptor left. They pass when connections end."""

DESCRIPTORS_MAX = 1 << 20
"""Highest limit asked for: Linux's own default maximum. Without any, programs that loop over all descriptors would take
minutes."""

KEPT_FOR_FILES = 256
"""Descriptors that connections from outside never get: some 10 for the log, as many as threads for cache and store
(40), the pools of PostgreSQL (20) and S3 (32), and twice that for a busy moment."""


def raise_descriptor_limit() -> int:
    """Lifts the soft limit of open files to the hard limit, at most DESCRIPTORS_MAX; returns the new soft limit.

    Shells and service managers give 1,024, which as many idle clients use up; only select() cannot handle more, and
    StreamHouse does not call it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        log.info("open files: limit raised from %d to %d", soft, wanted)
        return wanted
    return DESCRIPTORS_MAX if soft == resource.RLIM_INFINITY else soft


def connections_allowed(connections_max: int) -> int:
    """Returns `connections_max`, or less if the limit of open files would not leave KEPT_FOR_FILES (half of a
    smaller limit)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections_max
    return max(1, min(connections_max, soft - min(KEPT_FOR_FILES, soft // 2)))
