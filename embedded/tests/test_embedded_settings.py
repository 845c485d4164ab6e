"""Settings of every part are checked before the platform makes anything."""

import re
import tomllib
from pathlib import Path

import pytest
from shruntime.settings import SettingsError
from shstore.settings import StoreSettings
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_embedded.settings import EmbeddedSettings
from streamhouse_embedded.wiring import EmbeddedPlatform
from streamhouse_ingest.settings import IngestSettings
from streamhouse_query.settings import QuerySettings
from streamhouse_segmenter.settings import SegmenterSettings


@pytest.mark.parametrize(
    "line",
    [
        "[ingest]\nseal_age_ms = -1",
        "[query]\ncache_chunk_bytes = 1",
        "[segmenter]\nscan_interval_ms = 0",
        "[coordinator]\nsession_ttl_ms = 1",
        "s3_read_timeout_ms = 1",
    ],
)
def test_a_wrong_setting_of_any_part_is_named_and_nothing_is_made(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "streamhouse.toml"
    config.write_text(line)
    monkeypatch.setenv("STREAMHOUSE_CONFIG", str(config))
    named = line.splitlines()[-1].split(" ")[0]
    with pytest.raises(SettingsError, match=f"{named} .STREAMHOUSE_{named.upper()}"):
        EmbeddedPlatform(EmbeddedSettings.load(data_dir=tmp_path / "data"))
    assert not (tmp_path / "data").exists()


PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_file_on_the_page_is_one_that_every_service_takes(tmp_path: Path) -> None:
    (whole,) = re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    config = tmp_path / "streamhouse.toml"
    config.write_text(whole)
    environ = {"STREAMHOUSE_CONFIG": str(config)}
    kinds = (IngestSettings, SegmenterSettings, QuerySettings, CoordinatorSettings, EmbeddedSettings, StoreSettings)
    loaded = {kind.service: kind.load(environ) for kind in kinds}
    assert set(tomllib.loads(whole)) - {"bootstrap"} == {*loaded, "common"}, "the example has every table"
    for name, table in tomllib.loads(whole).items():
        if name in loaded:
            assert {key: str(getattr(loaded[name], key)) for key in table} == {k: str(v) for k, v in table.items()}
    for name in ("segmenter", "query", "store"):
        assert (loaded[name].s3_bucket, loaded[name].s3_prefix) == ("streamhouse-data", "production/")  # type: ignore[attr-defined]
    levels = {name: settings.log_level for name, settings in loaded.items()}
    assert levels == dict.fromkeys(loaded, "INFO") | {"query": "WARNING"}
    assert {settings.otlp_endpoint for settings in loaded.values()} == {"http://collector:4317"}
    assert {settings.bootstrap for settings in loaded.values()} == {"coordinator-1:7070,coordinator-2:7070"}
