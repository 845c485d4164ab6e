"""Kafka's names of options, arguments and methods: errors that name those here, in both clients."""

import inspect

import pytest
import streamhouse
import streamhouse.sync
from streamhouse import errors
from streamhouse.core.kafka_names import KAFKA_ARGUMENTS, KAFKA_METHODS, KAFKA_NAMES

pytestmark = pytest.mark.quick

BOTH = pytest.mark.parametrize("module", [streamhouse, streamhouse.sync], ids=["async", "sync"])
CLIENTS = ["Producer", "Consumer", "Admin"]


@pytest.mark.parametrize("client", CLIENTS)
def test_every_name_leads_to_an_option_that_exists(client):
    options = inspect.signature(getattr(streamhouse, client)).parameters
    for kafka, (ours, remark) in KAFKA_NAMES[client].items():
        assert kafka not in options, f"{kafka} is an option of {client}"
        assert ours in options if ours else remark, kafka


@BOTH
@pytest.mark.parametrize("client", CLIENTS)
def test_each_name_is_refused_with_the_one_here(module, client):
    for kafka, (ours, remark) in KAFKA_NAMES[client].items():
        for spelt in (kafka, kafka.replace("_", ".")):
            with pytest.raises(TypeError) as raised:
                getattr(module, client)("127.0.0.1:1", **{spelt: "x"})
            text = str(raised.value)
            assert text.startswith(f"Kafka's options have other names in {client}: {spelt} ")
            assert (f" is {ours}" if ours else "no counterpart") in text and remark in text


@BOTH
@pytest.mark.parametrize("client", ["Producer", "Consumer"])
def test_an_option_that_nobody_has_is_refused_by_name(module, client):
    with pytest.raises(TypeError, match=rf"^{client}\.__init__\(\) got an unexpected keyword argument 'speed'$"):
        getattr(module, client)("127.0.0.1:1", speed=1)


@BOTH
def test_all_names_of_a_call_are_explained_at_once(module):
    with pytest.raises(TypeError) as raised:
        module.Consumer(bootstrap_servers="b:1", group_id="g", auto_offset_reset="latest", enable_auto_commit=False)
    for text in ("bootstrap_servers is bootstrap", "group_id is group", "auto_offset_reset is start", "is auto_commit"):
        assert text in str(raised.value)


@BOTH
@pytest.mark.parametrize("client", CLIENTS)
def test_a_dict_of_options_is_explained(module, client):
    options = {"bootstrap.servers": "b:1", "client.id": "me"}
    with pytest.raises(
        TypeError, match=r"as keywords.*not a dict\. Its names: bootstrap\.servers is bootstrap"
    ) as raised:
        getattr(module, client)(options)
    # An admin has no such option.
    assert str(raised.value).endswith("; client.id is client_id") == (client != "Admin")
    with pytest.raises(TypeError, match=r"as keywords.*not a dict$"):
        getattr(module, client)({})


@BOTH
@pytest.mark.parametrize("client", CLIENTS)
def test_names_of_nobody_are_refused_as_by_any_function(module, client):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'lingerms'"):
        getattr(module, client)("127.0.0.1:1", lingerms=5)


@BOTH
@pytest.mark.parametrize("acks", [0, 1, -1, "all", "1"])
def test_kafkas_acks_are_refused_with_those_here(module, acks):
    with pytest.raises(errors.InvalidArgument, match=r'must be one of none, wal, durable; Kafka\'s 0 is "none"'):
        module.Producer("127.0.0.1:1", acks=acks)
    with pytest.raises(errors.InvalidArgument, match=r"durable$"):
        module.Producer("127.0.0.1:1", acks="quorum")


@BOTH
@pytest.mark.parametrize(
    ("client", "options", "text"),
    [
        ("Producer", {"linger.ms": 5}, "linger.ms is linger_ms"),
        (
            "Producer",
            {"bootstrap.servers": "b:1", "linger.ms": 5, "delivery.timeout.ms": 9, "acks": "wal"},
            "bootstrap.servers is bootstrap (the first argument); linger.ms is linger_ms; "
            "delivery.timeout.ms is delivery_timeout_ms",
        ),
        ("Consumer", {"session.timeout.ms": 5}, "session.timeout.ms is session_timeout_ms"),
        ("Consumer", {"on_assign": print}, "on_assign is on_assigned (never with an empty list)"),
        ("Consumer", {"on_revoke": print}, "on_revoke is on_revoked (never with an empty list)"),
        ("Admin", {"request.timeout.ms": 5}, "request.timeout.ms is request_timeout_ms"),
    ],
)
def test_options_with_dots_are_named_as_keywords_and_in_a_dict(module, client, options, text):
    made = getattr(module, client)
    addresses = () if "bootstrap.servers" in options else ("127.0.0.1:1",)
    with pytest.raises(TypeError) as raised:
        made(*addresses, **options)
    assert str(raised.value) == f"Kafka's options have other names in {client}: {text}"
    with pytest.raises(TypeError) as raised:
        made(options)
    assert str(raised.value).endswith(f", not a dict. Its names: {text}")


# ---- arguments of methods


def method_of(module, method):
    owner, _, name = method.partition(".")
    return getattr(getattr(module, owner), name)


@BOTH
@pytest.mark.parametrize("method", KAFKA_ARGUMENTS)
def test_every_argument_leads_to_one_that_exists(module, method):
    arguments = inspect.signature(method_of(module, method)).parameters
    for kafka, (ours, remark) in KAFKA_ARGUMENTS[method].items():
        assert kafka not in arguments, f"{kafka} is an argument of {method}"
        if ours and not (module is streamhouse and method.startswith("SendFuture.")):  # the await has the timeout
            assert ours in arguments, kafka
        else:
            assert remark, kafka


CALLS = [
    ("Producer.send", "on_delivery", "on_delivery has no counterpart (call add_done_callback of what is returned)"),
    ("Producer.send", "callback", "callback has no counterpart (call add_done_callback of what is returned)"),
    ("Producer.send", "timestamp", "timestamp is timestamp_ms (in milliseconds)"),
    ("Producer.send_and_wait", "on_delivery", "on_delivery has no counterpart (it waits for the outcome)"),
    ("Producer.send_many", "key", "key is keys (a list, one per record)"),
    ("Producer.flush", "timeout", "timeout is timeout_s (in seconds)"),
    ("Producer.close", "timeout", "timeout is timeout_s (in seconds)"),
    ("Consumer.close", "autocommit", "autocommit has no counterpart (auto_commit is an option of Consumer)"),
    (
        "Consumer.commit",
        "asynchronous",
        "asynchronous has no counterpart (commit returns once it is stored: give it a task or a thread of its own to "
        "go on meanwhile)",
    ),
    (
        "Consumer.commit",
        "message",
        "message is offsets ({(record.topic, record.partition): record.offset + 1})",
    ),
    ("Consumer.committed", "timeout", "timeout has no counterpart (retry_timeout_ms is an option of Consumer)"),
    ("Consumer.poll", "timeout", "timeout is timeout_ms (in milliseconds)"),
    ("Consumer.poll_batches", "num_messages", "num_messages is max_records"),
    ("Consumer.subscribe", "on_revoke", "on_revoke is on_revoked (never with an empty list)"),
    (
        "Consumer.subscribe",
        "listener",
        "listener has no counterpart (on_assigned, on_revoked and on_lost are functions)",
    ),
    ("Admin.create_topic", "num_partitions", "num_partitions is partitions"),
    (
        "Admin.create_topic",
        "replication_factor",
        "replication_factor has no counterpart (the object store replicates)",
    ),
    (
        "Admin.create_topic",
        "config",
        "config has no counterpart (retention_ms, retention_bytes and min_acks are keywords)",
    ),
    ("Admin.alter_topic", "new_total_count", "new_total_count is partitions"),
]
POSITIONAL = {
    "Producer.send": ("t", b"v"),
    "Producer.send_and_wait": ("t", b"v"),
    "Producer.send_many": ("t", [b"v"]),
    "Admin.create_topic": ("t",),
    "Admin.alter_topic": ("t",),
}


async def call(module, method, **kafka):
    """Calls a method of a client that reaches nobody."""
    owner, _, name = method.partition(".")
    client = getattr(module, owner)("127.0.0.1:1")
    try:
        called = getattr(client, name)(*POSITIONAL.get(method, ()), **kafka)
        return await called if inspect.isawaitable(called) else called
    finally:
        closed = client.close()
        if inspect.isawaitable(closed):
            await closed


@BOTH
@pytest.mark.parametrize(("method", "kafka", "text"), CALLS)
async def test_an_argument_under_kafkas_name_is_refused_with_the_one_here(module, method, kafka, text):
    with pytest.raises(TypeError) as raised:
        await call(module, method, **{kafka: 5})
    assert str(raised.value) == f"Kafka's arguments have other names in {method}: {text}"


@BOTH
@pytest.mark.parametrize("method", sorted({method for method, *_ in CALLS}))
async def test_an_argument_of_nobody_is_refused_as_by_any_function(module, method):
    with pytest.raises(TypeError, match=rf"{method}\(\) got an unexpected keyword argument 'nobodys'$"):
        await call(module, method, nobodys=5)


@pytest.mark.parametrize("method", KAFKA_ARGUMENTS)
def test_explained_methods_stay_coroutine_functions(method):
    """Also `unittest.mock.create_autospec` looks at that."""
    waits = not method.startswith("SendFuture.") and method not in ("Consumer.poll", "Consumer.poll_batches")
    assert inspect.iscoroutinefunction(method_of(streamhouse, method)) == waits
    assert not inspect.iscoroutinefunction(method_of(streamhouse.sync, method))


# ---- methods


@BOTH
@pytest.mark.parametrize("owner", KAFKA_METHODS)
def test_every_method_leads_to_one_that_exists(module, owner):
    for kafka, (ours, remark) in KAFKA_METHODS[owner].items():
        assert not hasattr(getattr(module, owner), kafka)
        assert ours or remark, kafka
        for name in filter(None, ours.split(", ")):
            target, _, attribute = name.rpartition(".")
            assert hasattr(getattr(module, target or owner), attribute), kafka


@BOTH
@pytest.mark.parametrize(
    ("owner", "name", "text"),
    [
        ("Producer", "produce", "produce is send (or send_many, the fast way)"),
        (
            "Producer",
            "poll",
            "poll has no counterpart (callbacks of add_done_callback are called by themselves; flush waits)",
        ),
        ("Producer", "begin_transaction", "begin_transaction has no counterpart (there are no transactions)"),
        ("Producer", "partitions_for", "partitions_for is Admin.describe_topic"),
        ("Consumer", "getmany", "getmany is poll (or poll_batches, as columns)"),
        ("Consumer", "consume", "consume is poll (or iterate over the consumer)"),
        ("Consumer", "position", "position is positions (of all partitions)"),
        ("Consumer", "end_offsets", "end_offsets is Admin.offsets"),
        ("Consumer", "offsets_for_times", "offsets_for_times is seek_to_timestamp, Admin.offsets"),
        (
            "Consumer",
            "commit_async",
            "commit_async is commit (it returns once it is stored: give it a task or a thread of its own)",
        ),
        (
            "Consumer",
            "subscription",
            "subscription is assignment (the partitions; the application has said the topics)",
        ),
        ("Admin", "create_topics", "create_topics is create_topic (one at a time)"),
    ],
)
async def test_a_method_under_kafkas_name_is_refused_with_the_one_here(module, owner, name, text):
    client = getattr(module, owner)("127.0.0.1:1")
    assert not hasattr(client, name)
    assert name not in dir(client)
    with pytest.raises(AttributeError) as raised:
        getattr(client, name)
    assert str(raised.value) == f"{owner!r} object has no attribute {name!r}: Kafka's {text}"
    setattr(client, name, 5)  # an application's own
    assert getattr(client, name) == 5
    with pytest.raises(AttributeError, match=rf"'{owner}' object has no attribute 'nobodys'$"):
        client.nobodys  # noqa: B018
    if inspect.isawaitable(closed := client.close()):
        await closed


@BOTH
async def test_the_assignment_says_that_it_is_no_method(module):
    consumer = module.Consumer("127.0.0.1:1", ["t"])
    assert consumer.assignment == frozenset()
    assert repr(consumer.assignment) == "frozenset()"
    with pytest.raises(TypeError) as raised:
        consumer.assignment()
    assert str(raised.value) == "assignment is an attribute: write consumer.assignment, without ()"


# ---- asynchronous and plain


@pytest.mark.parametrize("client", CLIENTS)
async def test_the_other_kind_of_with_is_refused_with_the_class_for_it(client):
    with pytest.raises(TypeError) as raised, getattr(streamhouse, client)("127.0.0.1:1"):
        pass
    text = f"{client} is asynchronous: use `async with`, or in plain code streamhouse.sync.{client}"
    assert str(raised.value) == text
    with pytest.raises(TypeError) as raised:
        async with getattr(streamhouse.sync, client)("127.0.0.1:1"):
            pass
    text = f"{client} is for plain code: use `with` without `async`, or the asynchronous streamhouse.{client}"
    assert str(raised.value) == text


@pytest.mark.parametrize("what", [lambda consumer: consumer, lambda consumer: consumer.batches()])
async def test_the_other_kind_of_for_is_refused_with_the_class_for_it(what):
    iterated = what(streamhouse.Consumer("127.0.0.1:1", ["t"]))
    name = type(iterated).__name__
    with pytest.raises(TypeError) as raised:
        for _ in iterated:
            pass
    text = f"{name} is asynchronous: use `async for`, or in plain code streamhouse.sync.Consumer"
    assert str(raised.value) == text
    with pytest.raises(TypeError) as raised:
        async for _ in what(streamhouse.sync.Consumer("127.0.0.1:1", ["t"])):
            pass
    text = f"{name} is for plain code: use `for` without `async`, or the asynchronous streamhouse.Consumer"
    assert str(raised.value) == text


# ---- a value is said


@BOTH
@pytest.mark.parametrize("method", ["Producer.send", "Producer.send_and_wait"])
async def test_a_record_without_a_value_is_no_tombstone_by_mistake(module, method, monkeypatch):
    monkeypatch.setitem(POSITIONAL, method, ("t",))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'value'"):
        await call(module, method)
