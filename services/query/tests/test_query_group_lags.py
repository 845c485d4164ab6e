"""Which lags of consumer groups are shown."""

from shproto.errors import UnknownGroup
from shproto.v1 import coordinator_pb2 as pb
from shread.core.watermarks import Watermarks
from shread.group_lags import GroupLags
from shruntime.clock import ManualClock

from services.query.tests.start_query import StartQuery
from tests.platform.read_world import World, values_of


class _Groups:
    """The part of a coordinator that knows groups."""

    def __init__(self, topic_id: str, offsets: dict[str, int]) -> None:
        self._topic_id = topic_id
        self._offsets = offsets

    async def list_groups(self, request: pb.ListGroupsRequest) -> pb.ListGroupsResponse:
        names = [*self._offsets, "deleted"]
        return pb.ListGroupsResponse(groups=[pb.GroupSummary(group=name, committed_partitions=1) for name in names])

    async def fetch_offsets(self, request: pb.FetchOffsetsRequest) -> pb.FetchOffsetsResponse:
        if request.group not in self._offsets:
            raise UnknownGroup("deleted")
        known = pb.CommittedOffset(
            topic="orders", partition=0, offset=self._offsets[request.group], topic_id=bytes.fromhex(self._topic_id)
        )
        gone = pb.CommittedOffset(topic="orders", partition=0, offset=1, topic_id=bytes(16))
        nothing = pb.CommittedOffset(topic="orders", partition=0, offset=-1)
        return pb.FetchOffsetsResponse(offsets=[known, gone, nothing])


async def test_those_furthest_behind_are_shown(platform: World, start_query: StartQuery) -> None:
    await platform.create_topic("orders", 1)
    await platform.start_agent("a")
    await platform.grant("a")
    await platform.produce(values_of(100))
    await platform.register()
    service = await start_query()
    topic_id = service.engine.reads.index.find("orders", 0).topic_id.hex()
    groups = _Groups(topic_id, {"ready": 100, "behind": 10, "late": 90})
    lags = GroupLags(
        groups,  # type: ignore[arg-type]
        service.engine.reads.index,
        Watermarks(),
        ManualClock(1 << 42),
        interval_ms=1_000,
        series_max=2,
    )
    await lags.look()
    assert {pair: lag.records for pair, lag in lags.lags.items()} == {("behind", "orders"): 90, ("late", "orders"): 10}
    assert lags.left_out == 1
    observed = [(dict(item.attributes or {}), item.value) for item in lags._observe_records(None)]  # type: ignore[arg-type]
    assert observed[0] == ({"group": "behind", "topic": "orders"}, 90)
