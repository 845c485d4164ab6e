"""Settings of every part are checked before the platform makes anything."""

from pathlib import Path

import pytest
from shruntime.settings import SettingsError
from streamhouse_embedded.settings import EmbeddedSettings
from streamhouse_embedded.wiring import EmbeddedPlatform


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
