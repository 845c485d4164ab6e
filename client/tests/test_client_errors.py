"""Errors as applications see them: module, names, pickles."""

import pickle
import traceback

import pytest
from shproto.errors import StreamHouseError
from streamhouse import errors

pytestmark = pytest.mark.quick

EXPORTED = [getattr(errors, name) for name in errors.__all__]


def test_errors_show_the_module_that_an_except_clause_can_name():
    named = {kind for kind in StreamHouseError.registry.values() if kind.__module__ == "streamhouse.errors"}
    assert named | {StreamHouseError} == set(EXPORTED)
    assert errors.StreamHouseError.__module__ == "streamhouse.errors"
    shown = "".join(traceback.format_exception(errors.NotLeader("another agent leads it")))
    assert shown == "streamhouse.errors.NotLeader: another agent leads it\n"


@pytest.mark.parametrize("kind", list(StreamHouseError.registry.values()), ids=lambda kind: kind.__name__)
def test_errors_survive_a_pickle(kind):
    error = kind("no room", retry_after_ms=20, limit="buffer_bytes_max", value=7)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.message, copy.retry_after_ms, copy.details) == (
        "no room",
        20,
        {"limit": "buffer_bytes_max", "value": "7"},
    )
