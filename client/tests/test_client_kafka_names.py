"""Options under Kafka's names: errors that name the options here, in both clients."""

import inspect

import pytest
import streamhouse
import streamhouse.sync
from streamhouse import errors
from streamhouse.core.kafka_names import KAFKA_NAMES

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
    assert "client.id" not in str(raised.value)  # it has the same name here
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
