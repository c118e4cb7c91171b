"""The reference pages and the schema are those of the code."""

import json
import re

from dist_train.config_file import describe_fields, fields_page, json_schema, make_config
from tests.common import ROOT, SMALL_MODEL, train_all


def test_the_page_of_fields_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text() == fields_page(), (
        "dist-train schema --markdown > docs/configuration.md"
    )


def test_the_schema_is_current_and_has_every_field():
    text = (ROOT / "configs" / "schema.json").read_text()
    assert json.loads(text) == json_schema(), "dist-train schema > configs/schema.json"
    known = {key.rpartition(".")[2] for key, _, _ in describe_fields()}
    named = {
        name for section in [json_schema(), *json_schema()["$defs"].values()] for name in section.get("properties", {})
    }
    assert known <= named
    assert all(
        section["additionalProperties"] is False for section in [json_schema(), *json_schema()["$defs"].values()]
    )


def test_configurations_name_the_schema_for_editors():
    for path in (ROOT / "configs").glob("*.yaml"):
        has = "# yaml-language-server: $schema=schema.json\n" in path.read_text()
        assert has != path.name.startswith("study_"), path


def test_every_metric_of_a_run_is_explained(digits, tmp_path, ranks):
    config = make_config(
        {
            "runs": str(tmp_path),
            "data": {"shards": str(digits)},
            "model": SMALL_MODEL,
            "tracking": {"uri": "off", "log_every": 1},
            "train": {"global_batch": 64, "micro_batch": 32, "max_steps": 2, "epochs": 1},
        }
    )
    ranks(train_all, 2, [config])
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    names = {re.sub(r"exit\d+", "exitN", name) for line in lines for name in json.loads(line)["metrics"]}
    explained = set(re.findall(r"`([a-z]+/[A-Za-z0-9_/]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    assert names <= explained
    # Of what the page says of training, only these need what the run had not.
    others = {"train/loss_scale", "train/exitN/cosine_to_exitN"}
    assert {name for name in explained - names if not name.startswith("report/")} <= others
