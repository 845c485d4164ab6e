"""Deadlines of a client that pass at once. A real one short enough to wait for would pass, on a busy machine, before
the call that is to be seen has come."""

import math


def let_delivery_timeout_pass(producer):
    """Does what the producer's timers do at the deadline of its batches."""
    for queue in producer._accumulator.queues():
        producer._sender._expire(queue, queue.expire(math.inf))
        producer._sender.send_ready(queue)


def let_retry_timeout_pass(consumer):
    """Has the next failure of the consumer's reads be the last."""
    consumer._reader._failing_since = -math.inf
