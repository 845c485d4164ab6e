"""Kafka's configuration names, as other clients spell them, and the option that each of them has here.

The tests hold every entry against the options: none names an option that does not exist.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Literal, ParamSpec

P = ParamSpec("P")
Client = Literal["Producer", "Consumer", "Admin"]

# Kafka's name (dots as underscores) -> the option here, empty where there is none, and a remark.
Names = dict[str, tuple[str, str]]

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


def explains_kafka_names(client: Client) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Returns a decorator of the client's `__init__`: options under Kafka's names, as keywords or in a dict where the
    addresses go, raise a TypeError that names the options here. The signature stays as it is."""

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        @wraps(init)
        def explained(*args: P.args, **kwargs: P.kwargs) -> None:
            given: Iterable[object] = kwargs
            if len(args) > 1 and isinstance(args[1], Mapping):  # args[0] is self
                raise TypeError(_in_a_dict(client, args[1]))
            if text := "; ".join(_explanations(client, given)):
                raise TypeError(f"Kafka's options have other names in {client}: {text}")
            init(*args, **kwargs)

        return explained

    return decorate


def _in_a_dict(client: Client, options: Mapping[object, object]) -> str:
    text = "; ".join(_explanations(client, options))
    wanted = f'{client} takes addresses and then options as keywords, as in {client}("host:7070", client_id="me")'
    return f"{wanted}, not a dict" + (f". Its names: {text}" if text else "")


def _explanations(client: Client, given: Iterable[object]) -> list[str]:
    names = KAFKA_NAMES[client]
    found = []
    for name in given:
        ours, remark = names.get(str(name).replace(".", "_"), (None, ""))
        if ours is None or ours == name:
            continue
        found.append(
            (f"{name} is {ours}" if ours else f"{name} has no counterpart") + (f" ({remark})" if remark else "")
        )
    return found
