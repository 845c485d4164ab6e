"""Kafka's names of options, arguments and methods, as other clients spell them, and their counterparts here.

The tests hold every entry against the code: no entry names an option or a method that does not exist.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=type)
Client = Literal["Producer", "Consumer", "Admin"]

# Kafka's name (dots as underscores) -> the name here, empty if there is no counterpart, and a remark.
Names = dict[str, tuple[str, str]]

_REBALANCE: Names = {
    "on_assign": ("on_assigned", "never with an empty list"),
    "on_revoke": ("on_revoked", "never with an empty list"),
}
_RETRIES = "retries back off by themselves"
_NO_SECURITY = "there is no TLS and no authentication in the client yet"

COMMON: Names = {
    "bootstrap_servers": ("bootstrap", "the first argument"),
    "metadata_broker_list": ("bootstrap", "the first argument"),
    "retry_backoff_ms": ("", _RETRIES),
    "retry_backoff_max_ms": ("", _RETRIES),
    "reconnect_backoff_ms": ("", _RETRIES),
    "reconnect_backoff_max_ms": ("", _RETRIES),
    "api_version": ("", "there is one version of the protocol"),
    "security_protocol": ("", _NO_SECURITY),
    "ssl_context": ("", _NO_SECURITY),
    "ssl_cafile": ("", _NO_SECURITY),
    "ssl_ca_location": ("", _NO_SECURITY),
    "ssl_certfile": ("", _NO_SECURITY),
    "ssl_certificate_location": ("", _NO_SECURITY),
    "ssl_keyfile": ("", _NO_SECURITY),
    "ssl_key_location": ("", _NO_SECURITY),
    "ssl_check_hostname": ("", _NO_SECURITY),
    "sasl_mechanism": ("", _NO_SECURITY),
    "sasl_mechanisms": ("", _NO_SECURITY),
    "sasl_username": ("", _NO_SECURITY),
    "sasl_password": ("", _NO_SECURITY),
    "sasl_plain_username": ("", _NO_SECURITY),
    "sasl_plain_password": ("", _NO_SECURITY),
}
KAFKA_NAMES: Mapping[Client, Names] = {
    "Producer": COMMON
    | {
        "batch_size": ("batch_bytes", ""),
        "buffer_memory": ("buffer_bytes_max", ""),
        "batch_num_messages": ("batch_bytes", "bytes bound a batch, not the number of its records"),
        "queue_buffering_max_kbytes": ("buffer_bytes_max", "in bytes"),
        "queue_buffering_max_messages": ("buffer_bytes_max", "bytes bound the buffer, not the number of records"),
        "queue_buffering_max_ms": ("linger_ms", ""),
        "compression_type": ("compression", '"lz4", "zstd", "gzip" or "none"'),
        "compression_codec": ("compression", '"lz4", "zstd", "gzip" or "none"'),
        "enable_idempotence": ("idempotent", "on by default"),
        "partitioner_class": ("partitioner", "a callable"),
        "max_in_flight_requests_per_connection": ("max_in_flight", ""),
        "max_block_ms": ("delivery_timeout_ms", "it bounds how long send waits as well"),
        "message_timeout_ms": ("delivery_timeout_ms", ""),
        "message_send_max_retries": ("delivery_timeout_ms", "time bounds the retries, not their number"),
        "retries": ("delivery_timeout_ms", "time bounds the retries, not their number"),
        "request_required_acks": ("acks", '"none", "wal" or "durable"'),
        "max_request_size": ("", "a record may have almost 16 MiB"),
        "message_max_bytes": ("", "a record may have almost 16 MiB"),
        "transactional_id": ("", "there are no transactions"),
        "transaction_timeout_ms": ("", "there are no transactions"),
    },
    "Consumer": COMMON
    | _REBALANCE
    | {
        "group_id": ("group", ""),
        "auto_offset_reset": (
            "start",
            'for partitions without a commit; on_out_of_range="earliest" or "latest" for offsets that are gone',
        ),
        "enable_auto_commit": ("auto_commit", ""),
        "enable_auto_offset_store": ("", "only what the application has done with is committed"),
        "allow_auto_create_topics": ("", "topics are created by Admin.create_topic"),
        "client_rack": ("", "there are no followers to read from"),
        "group_protocol": ("", "there is one"),
        "fetch_max_bytes": ("fetch_bytes", "of one partition's response"),
        "max_partition_fetch_bytes": ("fetch_bytes", ""),
        "fetch_message_max_bytes": ("fetch_bytes", ""),
        "queued_max_messages_kbytes": ("prefetch_bytes_max", "in bytes"),
        "default_api_timeout_ms": ("retry_timeout_ms", ""),
        "metadata_max_age_ms": ("topic_refresh_interval_ms", "of patterns"),
        "topic_metadata_refresh_interval_ms": ("topic_refresh_interval_ms", "of patterns"),
        "fetch_min_bytes": ("", "records are sent as soon as they are there"),
        "fetch_max_wait_ms": ("", "records are sent as soon as they are there"),
        "fetch_wait_max_ms": ("", "records are sent as soon as they are there"),
        "max_poll_records": ("", "poll takes max_records; max_poll_interval_ms counts between two calls"),
        "heartbeat_interval_ms": ("session_timeout_ms", "the server derives the interval from it"),
        "consumer_timeout_ms": ("stop_at_end", "ends the iteration where the log ended when it began"),
        "enable_partition_eof": ("stop_at_end", "ends the iteration where the log ended when it began"),
        "partition_assignment_strategy": ("", "the coordinator assigns, and moves as few partitions as balance allows"),
        "group_instance_id": ("", "there are no static members"),
        "isolation_level": ("", "there are no transactions"),
        "check_crcs": ("", "checksums are always checked"),
    },
    "Admin": COMMON | {"default_api_timeout_ms": ("retry_timeout_ms", "")},
}


_SECONDS = {"timeout": ("timeout_s", "in seconds")}
_OUTCOME = {"timeout": ("timeout_s", "in seconds; of the asynchronous client, await asyncio.wait_for(future, seconds)")}
_CALLBACK = ("", "call add_done_callback of what is returned")
_SEND: Names = {"on_delivery": _CALLBACK, "callback": _CALLBACK, "timestamp": ("timestamp_ms", "in milliseconds")}
_POLL: Names = {
    "timeout": ("timeout_ms", "in milliseconds"),
    "num_messages": ("max_records", ""),
    "update_offsets": ("", "positions move with what is returned"),
}
_WAITS = ("", "commit returns once it is stored: give it a task or a thread of its own to go on meanwhile")
_TOPIC_SETTINGS = ("", "retention_ms, retention_bytes and min_acks are keywords")
_REQUEST_TIMEOUT = ("", "request_timeout_ms is an option of the client")

# Arguments of methods.
KAFKA_ARGUMENTS: Mapping[str, Names] = {
    "Producer.send": _SEND,
    "Producer.send_and_wait": _SEND | dict.fromkeys(("on_delivery", "callback"), ("", "it waits for the outcome")),
    "Producer.send_many": _SEND
    | {
        "value": ("values", "a list"),
        "key": ("keys", "a list, one per record"),
        "timestamp": ("timestamps_ms", "in milliseconds"),
        "timestamp_ms": ("timestamps_ms", "one for all, or a list"),
    },
    "Producer.flush": _SECONDS,
    "Producer.close": _SECONDS,
    "SendFuture.result": _OUTCOME,
    "SendFuture.exception": _OUTCOME,
    "Consumer.close": _SECONDS
    | {"timeout_ms": ("timeout_s", "in seconds"), "autocommit": ("", "auto_commit is an option of Consumer")},
    "Consumer.commit": {
        "asynchronous": _WAITS,
        "callback": _WAITS,
        "message": ("offsets", "{(record.topic, record.partition): record.offset + 1}"),
        "timeout_ms": ("", "request_timeout_ms is an option of Consumer"),
    },
    "Consumer.committed": {"timeout": ("", "retry_timeout_ms is an option of Consumer")},
    "Consumer.poll": _POLL,
    "Consumer.poll_batches": _POLL,
    "Consumer.subscribe": _REBALANCE | {"listener": ("", "on_assigned, on_revoked and on_lost are functions")},
    "Admin.create_topic": {
        "name": ("topic", ""),
        "num_partitions": ("partitions", ""),
        "replication_factor": ("", "the object store replicates"),
        "replica_assignments": ("", "any agent can lead any partition"),
        "config": _TOPIC_SETTINGS,
        "topic_configs": _TOPIC_SETTINGS,
        "timeout_ms": _REQUEST_TIMEOUT,
        "request_timeout": _REQUEST_TIMEOUT,
        "operation_timeout": _REQUEST_TIMEOUT,
    },
    "Admin.alter_topic": {
        "num_partitions": ("partitions", ""),
        "total_count": ("partitions", ""),
        "new_total_count": ("partitions", ""),
        "config": _TOPIC_SETTINGS,
    },
}

_NO_TRANSACTIONS = ("", "there are no transactions")
_NO_ACLS = ("", "there are no ACLs")
_OFFSETS = ("Admin.offsets", "")
_ITERATE = ("poll", "or iterate over the consumer")
_LATER = ("add_done_callback", "its function is given the future")

# Methods, by the class that has them in other clients.
KAFKA_METHODS: Mapping[str, Names] = {
    "Producer": {
        "produce": ("send", "or send_many, the fast way"),
        "send_batch": ("send_many", ""),
        "create_batch": ("send_many", "records gather by themselves as well, for linger_ms"),
        "poll": ("", "callbacks of add_done_callback are called by themselves; flush waits"),
        "start": ("", "nothing has to be started"),
        "stop": ("close", ""),
        "purge": ("close", "close(0) fails what is not acknowledged"),
        "partitions_for": ("Admin.describe_topic", ""),
        "list_topics": ("Admin.list_topics", ""),
        "init_transactions": _NO_TRANSACTIONS,
        "begin_transaction": _NO_TRANSACTIONS,
        "commit_transaction": _NO_TRANSACTIONS,
        "abort_transaction": _NO_TRANSACTIONS,
        "transaction": _NO_TRANSACTIONS,
        "send_offsets_to_transaction": _NO_TRANSACTIONS,
    },
    "SendFuture": {
        "get": ("result", "with timeout_s in streamhouse.sync; `await` the future of the asynchronous client"),
        "add_callback": _LATER,
        "add_errback": _LATER,
        "succeeded": ("exception", "None once it has succeeded"),
        "failed": ("exception", "None unless it has failed"),
        "is_done": ("done", ""),
    },
    "Consumer": {
        "consume": _ITERATE,
        "getmany": ("poll", "or poll_batches, as columns"),
        "getone": _ITERATE,
        "position": ("positions", "of all partitions"),
        "assign": ("", "assign=[(topic, partition), ...] is an option of Consumer"),
        "incremental_assign": ("", "assign=[(topic, partition), ...] is an option of Consumer"),
        "unassign": ("close", ""),
        "incremental_unassign": ("close", ""),
        "subscription": ("assignment", "the partitions; the application has said the topics"),
        "beginning_offsets": _OFFSETS,
        "end_offsets": _OFFSETS,
        "get_watermark_offsets": _OFFSETS,
        "highwater": ("lag", ""),
        "offsets_for_times": ("seek_to_timestamp, Admin.offsets", ""),
        "commit_async": ("commit", "it returns once it is stored: give it a task or a thread of its own"),
        "store_offsets": ("commit", "with {(topic, partition): offset}"),
        "partitions_for_topic": ("Admin.describe_topic", ""),
        "topics": ("Admin.list_topics", ""),
        "list_topics": ("Admin.list_topics", ""),
        "consumer_group_metadata": ("membership", "an attribute"),
        "memberid": ("membership", "an attribute"),
        "wakeup": ("close", "from another task or thread"),
        "stop": ("close", ""),
    },
    "Admin": {
        "create_topics": ("create_topic", "one at a time"),
        "delete_topics": ("delete_topic", "one at a time"),
        "describe_topics": ("describe_topic", "one at a time"),
        "create_partitions": ("alter_topic", "partitions=n"),
        "alter_configs": ("alter_topic", ""),
        "incremental_alter_configs": ("alter_topic", ""),
        "describe_configs": ("topic_configs", ""),
        "describe_cluster": ("status", ""),
        "list_offsets": ("offsets", ""),
        "list_consumer_groups": ("list_groups", ""),
        "describe_consumer_groups": ("describe_group", "one at a time"),
        "list_consumer_group_offsets": ("group_offsets", ""),
        "alter_consumer_group_offsets": ("commit_group_offsets, reset_offsets", ""),
        "delete_consumer_groups": ("delete_group", "one at a time"),
        "create_acls": _NO_ACLS,
        "describe_acls": _NO_ACLS,
        "delete_acls": _NO_ACLS,
        "elect_leaders": ("", "any agent takes over by itself"),
    },
}


def explains_kafka_names(client: Client) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Returns a decorator of the client's `__init__`: options under Kafka's names, as keywords or in a dict in place of
    the addresses, raise a TypeError that names the options here. The signature stays unchanged."""

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        @wraps(init)
        def explained(*args: P.args, **kwargs: P.kwargs) -> None:
            names, options = KAFKA_NAMES[client], inspect.signature(explained).parameters
            if len(args) > 1 and isinstance(args[1], Mapping):  # args[0] is self
                raise TypeError(_in_a_dict(client, _explanations(names, args[1], options)))
            if found := _explanations(names, kwargs, options):
                raise TypeError(f"Kafka's options have other names in {client}: {'; '.join(found)}")
            if unknown := [name for name in kwargs if name not in options]:
                raise TypeError(f"{client}.__init__() got an unexpected keyword argument {unknown[0]!r}")
            init(*args, **kwargs)

        return explained

    return decorate


def _in_a_dict(client: Client, found: list[str]) -> str:
    wanted = f'{client} takes addresses and then options as keywords, as in {client}("host:7070", client_id="me")'
    return f"{wanted}, not a dict" + (f". Its names: {'; '.join(found)}" if found else "")


def explains_kafka_arguments(method: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Returns a decorator of a method, "Producer.flush": arguments under Kafka's names raise a TypeError that names the
    arguments here. The signature stays unchanged, and a coroutine function remains a coroutine function."""
    names = KAFKA_ARGUMENTS[method]

    def decorate(call: Callable[P, T]) -> Callable[P, T]:
        if inspect.iscoroutinefunction(call):

            @wraps(call)
            async def explained_later(*args: P.args, **kwargs: P.kwargs) -> Any:
                if not names.keys().isdisjoint(kwargs):
                    refuse_arguments(method, kwargs)
                return await call(*args, **kwargs)

            return cast("Callable[P, T]", explained_later)

        @wraps(call)
        def explained(*args: P.args, **kwargs: P.kwargs) -> T:
            if not names.keys().isdisjoint(kwargs):
                refuse_arguments(method, kwargs)
            return call(*args, **kwargs)

        return explained

    return decorate


def refuse_arguments(method: str, given: Mapping[str, object]) -> NoReturn:
    """Refuses keywords that a method, "Producer.send", does not have: raises TypeError.

    Methods called for every record take `**kafka: Never` and call this function if keywords are given: 30 ns a call,
    while a decorator takes 150. Type checkers refuse any keyword for `**kafka`.
    """
    if found := _explanations(KAFKA_ARGUMENTS[method], given):
        raise TypeError(f"Kafka's arguments have other names in {method}: {'; '.join(found)}")
    raise TypeError(f"{method}() got an unexpected keyword argument {next(iter(given))!r}")


def explains_kafka_methods(client: str) -> Callable[[C], C]:
    """Returns a decorator of the class: methods under Kafka's names raise an AttributeError that names the methods
    here."""

    def decorate(cls: C) -> C:
        for name, (ours, remark) in KAFKA_METHODS[client].items():
            assert not hasattr(cls, name), f"{client} has {name}"
            setattr(
                cls,
                name,
                _Elsewhere(
                    f"{cls.__name__!r} object has no attribute {name!r}: Kafka's " + _explanation(name, ours, remark)
                ),
            )
        cls.__dir__ = _listed  # type: ignore[assignment]
        return cls

    return decorate


class _Elsewhere:
    """An attribute that raises AttributeError when read, so that `hasattr` answers False.

    A `__getattr__` would do the same for all names at once. But CPython does not specialize the access to attributes of
    classes that define `__getattr__`: each access took four times as long, a microsecond in a `send`.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(self._text)


def _listed(self: object) -> list[str]:
    """Returns the names of an object for `dir`, without Kafka's names."""
    static = partial(inspect.getattr_static, type(self))
    return [name for name in object.__dir__(self) if not isinstance(static(name, None), _Elsewhere)]


def _explanations(names: Names, given: Iterable[object], options: Iterable[str] = ()) -> list[str]:
    """Returns an explanation of each given name that has another name here, or that differs from an option only by
    dots."""
    found = []
    for name in given:
        plain = str(name).replace(".", "_")
        ours, remark = names.get(plain, (plain if plain in options else None, ""))
        if ours is not None and ours != name:
            found.append(_explanation(str(name), ours, remark))
    return found


def _explanation(name: str, ours: str, remark: str) -> str:
    return (f"{name} is {ours}" if ours else f"{name} has no counterpart") + (f" ({remark})" if remark else "")
