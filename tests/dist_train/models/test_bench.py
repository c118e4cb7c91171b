"""``dist-train bench model``: what it writes can be read, and its shares are those of the lazy count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_train.bench import model as bench
from dist_train.models.cost import exit_costs
from dist_train.models.msdnet import MSDNet


def test_the_file_holds_every_setting_and_every_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "BLOCKS", 1)
    assert (
        bench.run(["--networks", "cifar", "--steps", "1", "--batch", "2", "--json", str(tmp_path / "bench.json")]) == 0
    )
    (result,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    speeds = result["images_per_second"]
    assert {"plain", "channels_last", "default"} <= speeds.keys()
    assert result["ratio"] == speeds["default"] / speeds["plain"]
    lazy = [cost.macs for cost in exit_costs(MSDNet(100), 32, lazy=True)]
    assert result["stopping"].keys() == {"64", "1"}
    for exits in result["stopping"].values():
        assert [one["share_of_multiply_adds"] for one in exits] == [cost / lazy[-1] for cost in lazy]
        assert exits[-1]["share"] == 1
        assert all(one["milliseconds"] > 0 for one in exits)
    assert "all of a batch of 64 stop at exit" in capsys.readouterr().out
