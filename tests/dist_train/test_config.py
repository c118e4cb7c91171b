"""The configuration: what is right is read as meant, what is wrong is one line that names the key and the remedy."""

from pathlib import Path

import pytest

from dist_train.config import Config, accumulation
from dist_train.config_file import changed_fields, describe_fields, dump_config, load_config, make_config
from dist_train.errors import ConfigError

MINIMAL = {"data": {"shards": "somewhere"}}
FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith("study_"))


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_survive_a_round_trip(path, tmp_path):
    config = load_config(path)
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_overrides_win_and_take_both_forms(tmp_path):
    path = write(tmp_path, "data: {shards: x}\noptim: {lr: 1e-3, clip: 1.0}\n")
    config = load_config(
        path,
        "--optim.clip",
        "null",
        "--train.micro_batch=8",
        "--data.scale",
        "[0.2, 1]",
        "--tracking.uri",
        "off",
        "--data.flip",
        "false",
    )
    assert (config.tracking.uri, config.data.flip) == ("off", False)
    assert (config.optim.lr, config.optim.clip, config.train.micro_batch, config.data.scale) == (
        1e-3,
        None,
        8,
        (0.2, 1.0),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optim.lrr", "1"], "unknown key 'optim.lrr'; did you mean optim.lr?"),
        (["--lr", "1"], "unknown key 'lr'; did you mean optim.lr?"),
        (["--optim.lr", "-1"], "optim.lr is -1; input should be greater than 0"),
        (["--optim.lr", "fast"], "optim.lr is 'fast'; input should be a valid number"),
        (["--optim.lr", ".nan"], "optim.lr is nan; input should be a finite number"),
        (["--train.zero", "4"], "train.zero is 4; input should be 0, 1, 2 or 3"),
        (["--optim.milestones", "[0.7, 0.5]"], "milestones are [0.7, 0.5]; they must rise"),
        (["--data.eval_resize", "16"], "eval_resize is 16; it must be at least image_size, 32"),
        (["--name", "a/b"], "name is 'a/b'"),
        (["--optim.lr"], "--optim.lr has no value"),
        (["optim.lr", "1"], "'optim.lr' is not an override; write --section.key value"),
        (["--optim.lr.x", "1"], "unknown key 'optim.lr.x'"),
        (["--optim.betas", "[0.9"], "is not valid YAML"),
    ],
)
def test_a_bad_override_is_one_line_with_the_remedy(tmp_path, overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, "data: {shards: x}\noptim: {lr: 0.1}\n"), *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {shards: x}\ndata: {shards: y}", "line 2 is not valid YAML: key 'data' is given twice"),
        ("- 1", "holds a list, not sections"),
        ("optim: {}", "'data' is missing"),
        ("data: {shards: x}\ntrain: [1]", "train is [1]"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config("nowhere.yaml")


def test_accumulation_follows_from_the_batches_or_names_the_nearest():
    def config(world, total, micro):
        return accumulation(
            make_config(MINIMAL | {"train": {"global_batch": total, "micro_batch": micro}}).train, world
        )

    assert [config(1, 64, 64), config(2, 64, 8), config(4, 64, 16)] == [1, 4, 1]
    with pytest.raises(ConfigError, match="use 48 or 96"):
        config(3, 64, 16)
    with pytest.raises(ConfigError, match="use 128,"):
        config(2, 64, 64)


def test_every_field_has_its_help():
    fields = list(describe_fields())
    assert len(fields) > 50
    assert all(text for _, _, text in fields), [key for key, _, text in fields if not text]


def test_changed_fields_are_those_that_differ():
    before, after = make_config(MINIMAL), make_config(MINIMAL | {"optim": {"lr": 0.2}, "seed": 3})
    assert changed_fields(before, after) == [("seed", "0", "3"), ("optim.lr", "0.1", "0.2")]
    assert changed_fields(before, Config.model_validate(before.model_dump())) == []
