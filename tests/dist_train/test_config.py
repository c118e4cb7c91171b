"""The configuration: what is right is read as meant, what is wrong is one line that names the key and the remedy."""

import pytest
import yaml

from dist_train.config import Config, accumulation_steps
from dist_train.config_file import RENAMED, changed_fields, describe_fields, dump_config, load_config, make_config
from dist_train.errors import ConfigError
from tests.common import ROOT

MINIMAL = {"data": {"shards": "somewhere"}}
FOLDER = ROOT / "configs"
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
    path = write(tmp_path, "data: {shards: x}\noptim: {lr: 1e-3, max_grad_norm: 1.0}\n")
    config = load_config(
        path,
        "--optim.max_grad_norm",
        "null",
        "--train.micro_batch=8",
        "--data.crop_scale",
        "[0.2, 1]",
        "--tracking.uri",
        "off",
        "--data.flip",
        "false",
    )
    assert (config.tracking.uri, config.data.flip) == ("off", False)
    assert (config.optim.lr, config.optim.max_grad_norm, config.train.micro_batch, config.data.crop_scale) == (
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
        (["--train.zero_stage", "4"], "train.zero_stage is 4; input should be 'auto', 0, 1, 2 or 3"),
        (["--optim.milestones", "[0.7, 0.5]"], "milestones are [0.7, 0.5]; they must rise"),
        (["--data.rand_augment", "[33, 9]"], "data.rand_augment is 33; input should be less than or equal to 32"),
        (["--data.eval_resize", "16"], "eval_resize is 16; it must be at least image_size, 32"),
        (["--name", "a/b"], "name is 'a/b'"),
        (["--optim.lr"], "--optim.lr has no value"),
        (["optim.lr", "1"], "'optim.lr' is not an override; write --section.key value"),
        (["--optim.lr.x", "1"], "unknown key 'optim.lr.x'"),
        (["--optim.betas", "[0.9"], "is not valid YAML"),
        (["--slurm.hours", "0.02"], "signal_seconds is 90, but the time limit (hours) is 60 seconds; raise hours"),
        (["--slurm.signal_seconds", "86400"], "signal_seconds is 86400, but the time limit (hours) is 86400 seconds"),
        (["--slurm.sbatch", "[gres=gpu:8]"], "sbatch gres=gpu:8: is set by launch.slurm"),
        (["--slurm.sbatch", "[no-requeue]"], "sbatch no-requeue: is set by launch.slurm"),
        # What YAML 1.1 and Python would take for numbers.
        (["--slurm.hours", "1:30"], "slurm.hours is '1:30'; input should be a valid number"),
        (["--train.epochs", "true"], "train.epochs is True; it takes no true or false"),
        (["--data.crop_scale", "[0.5, true]"], "data.crop_scale is [0.5, True]; it takes no true or false"),
        (["--model.pretrained", "off"], "model.pretrained: is 'off'; write true, false, or a file"),
        (
            ["--model.pretrained", "false", "--model.regime", "heads_first"],
            "and pretrained is not set; give pretrained",
        ),
        (["--name", "2024-13-45x/"], "name is '2024-13-45x/'; string should match"),
        (["--seed", "1" * 5000], "--seed: line 1 is not valid YAML: an integer has 5000 digits"),
        (["--optim.lr", "9" * 400], "optim.lr is 999"),
        (["--train.epochs", "1"], "model.first_epochs is 1, but train.epochs is 1"),
        # What would take all memory, or all time, before anything else could say so.
        (["--model.exits", "1000000000"], "model.exits is 1000000000; input should be less than or equal to 16"),
        (["--model.base", "1000000000"], "model.base is 1000000000; input should be less than or equal to 100"),
        (["--model.step", "1000000000"], "model.step is 1000000000"),
        (["--model", "{name: resnet, exits: [a], blocks: [1000000000]}"], "model.blocks is 1000000000"),
        (["--data.eval_resize", "1000000000"], "data.eval_resize is 1000000000"),
        (["--data.decode_threads", "1000000000"], "data.decode_threads is 1000000000"),
        (["--data.preallocate", "[1000000000, 1]"], "data.preallocate is 1000000000"),
        (["--data.crop_padding", "33"], "crop_padding is 33; it must be at most image_size, 32"),
        # A union, of which one branch alone was meant.
        (
            ["--data.train", "5"],
            "data.train is 5; give the name of a split, or a list of {shards: FOLDER, split: train}",
        ),
        (["--data.train", "[]"], "data.train is []"),
        (["--data.train", "[train]"], "data.train, part 1 is 'train'; write {shards: FOLDER, split: train}"),
        (["--data.train", "[{}]"], "data.train, part 1: 'shards' is missing"),
        (["--data.train", "[{shards: 3}]"], "data.train, part 1: shards: 3 names no folder; give its path or URL"),
        (["--data.train", "[{shards: a}, {shards: b, splt: c}]"], "part 2: unknown key 'splt'; did you mean split?"),
        (["--data.train", "[{shards: a, weight: x}]"], "part 1: weight is 'x'; input should be a valid number"),
        (["--data.shards", "3"], "data.shards: 3 names no folder; give its path or URL"),
        (["--model.pretrained", "[1]"], "model.pretrained: is [1]; write true, false, or the name of a file"),
    ],
)
def test_a_bad_override_is_one_line_with_the_remedy(tmp_path, overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(
            write(tmp_path, "data: {shards: x}\noptim: {lr: 0.1}\nmodel: {regime: mixed, first_epochs: 1}"), *overrides
        )
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert not str(error.value).startswith(":")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {shards: x}\ndata: {shards: y}", "line 2 is not valid YAML: key 'data' is given twice"),
        ("- 1", "holds a list, not sections"),
        ("optim: {}", "'data' is missing"),
        ("data: {shards: x}\ntrain: [1]", "train is [1]"),
        ("data:", "'data.shards' is missing"),
        ("{a: b}: c", "line 1 is not valid YAML: a key is a list or a mapping; write a word"),
        ("? [a, b]\n: c", "line 1 is not valid YAML: a key is a list or a mapping; write a word"),
        ("loss: " + "[" * 3000 + "]" * 3000, "line 1 is not valid YAML: it is nested deeper than 50 levels"),
        ("loss: {teachers: &x [*x]}", "line 1 is not valid YAML: *x stands inside of &x"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_words_and_numbers_are_those_of_yaml_1_2(tmp_path):
    path = write(tmp_path, "data: &d {shards: x}\ntrain:\noptim: {lr: 1e-3}\n")
    config = load_config(
        path, "--train.global_batch", "0100", "--seed", "0x1F", "--name", "2024-13-45", "--optim.ema_decay", "~"
    )
    assert (config.train.global_batch, config.seed, config.name) == (100, 31, "2024-13-45")
    assert (config.optim.lr, config.optim.ema_decay, config.train.epochs) == (1e-3, None, 100)


def test_an_override_fills_an_empty_section(tmp_path):
    assert load_config(write(tmp_path, "data: {shards: x}\noptim:\n"), "--optim.lr", "0.4").optim.lr == 0.4


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config("nowhere.yaml")


def test_accumulation_follows_from_the_batches_or_names_the_nearest():
    def config(world, total, micro):
        return accumulation_steps(
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


def test_an_option_that_is_left_out_is_a_change():
    def config(**options):
        return make_config(MINIMAL | {"model": {"name": "m:f", "exits": ["a"], "options": options}})

    assert changed_fields(config(dropout=0.5), config()) == [("model.options.dropout", "0.5", "unset")]
    assert changed_fields(config(), config(dropout=None)) == [("model.options.dropout", "unset", "null")]


def test_paths_know_the_home_folder_and_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/fast")
    monkeypatch.delenv("NOWHERE", raising=False)
    config = make_config({"data": {"shards": "$DATA/x"}, "runs": "~/runs"})
    assert (str(config.data.shards), str(config.runs)) == ("/fast/x", "/home/me/runs")
    assert make_config({"data": {"shards": "s3://bucket/$x"}}).data.shards == "s3://bucket/$x"
    with pytest.raises(ConfigError, match=r"runs: \$NOWHERE/x: the variable \$NOWHERE is not set"):
        make_config({"data": {"shards": "x"}, "runs": "$NOWHERE/x"})


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_an_old_key_names_the_new_one(old):
    section, key = old.split(".")
    tree = {"data": {"shards": "x"}}
    tree.setdefault(section, {})[key] = 1
    with pytest.raises(ConfigError, match=f"'{old}' is now called '{RENAMED[old]}'"):
        make_config(tree)
    assert RENAMED[old] in {name for name, _, _ in describe_fields()}


def test_a_misspelt_key_is_named_before_the_one_that_is_missing_for_it(tmp_path):
    with pytest.raises(ConfigError, match=r"^unknown key 'data.shard'; did you mean data.shards\?$"):
        load_config(write(tmp_path, "data: {shard: x}"))


def test_the_help_has_the_choices_of_a_field():
    texts = {key: text for key, _, text in describe_fields()}
    assert "One of fp32, bf16, fp16." in texts["train.precision"]
    assert "One of auto, 0, 1, 2, 3." in texts["train.zero_stage"]
    assert "last, next, later" in texts["loss.teachers"]
    assert "One of" not in texts["train.epochs"]


def test_a_configuration_shows_what_differs_from_the_defaults():
    config = make_config({"data": {"shards": "x"}, "optim": {"lr": 0.05}})
    assert repr(config) == "Config\ndata:\n  shards: x\noptim:\n  lr: 0.05\n"
    assert "lr: 0.05" in config._repr_html_()


@pytest.mark.parametrize(
    "word", ["08", "1e5", "1e-4", "0o17", "12e3", "+.5e3", "off", "1:30", "null", "true", "0x1f", "~"]
)
def test_words_that_look_like_numbers_are_words_again_when_they_are_read(word, tmp_path):
    model = {"name": "module:function", "exits": [word], "options": {"tag": word}}
    config = make_config({"data": {"shards": "x"}, "model": model, "tracking": {"group": word, "experiment": word}})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load(dump_config(config))["model"]["options"] == {"tag": word}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("--data.mean", "[0.5, 0.5]"), "data.mean is incomplete; its part 2 is missing"),
        (("--runs", "~nobody_x/x"), "runs: ~nobody_x/x: there is no such user"),
        (("--data.shards", '""'), "data.shards: '' names no folder"),
        (("--data.shards", "s3://"), "data.shards: 's3://' names no folder"),
        (("--name", "a" * 300), "name is 'aaa"),
        (("--name", "a\x07"), "is not valid YAML: unacceptable character"),
    ],
)
def test_what_is_wrong_with_a_value_is_one_line(override, said):
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs" / "quickstart.yaml", *override)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
