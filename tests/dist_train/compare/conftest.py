"""Run folders as the trainer leaves them, with numbers chosen by hand."""

import json

import pytest

from dist_train.config_file import dump_config, make_config


@pytest.fixture
def make_run(tmp_path):
    """`make_run(name, tops, seed=0, **fields)` writes a finished run with these top-1 shares per exit; gives its folder."""

    def make(name, tops, seed=0, images=100, data=None, lines=(), report=None, **fields):
        tree = {"name": name, "runs": str(tmp_path / "runs"), "seed": seed, "data": {"shards": "data/x"}}
        for key, value in fields.items():
            section, _, leaf = key.partition("__")
            tree.setdefault(section, {})[leaf] = value
        config = make_config(tree)
        config.folder.mkdir(parents=True)
        (config.folder / "config.yaml").write_text(dump_config(config))
        (config.folder / "env.json").write_text(json.dumps({"data": data or {}}))
        entries = lines or [(20, 20, {"speed/images_per_second": 64.0, "train/loss": 2.0, "val/mean_top1": 0.5})]
        text = "".join(
            json.dumps({"t": 1000 * batch, "step": step, "batch": batch, "metrics": metrics}) + "\n"
            for step, batch, metrics in entries
        )
        (config.folder / "metrics.jsonl").write_text(text)
        if tops:
            exits = [
                {"exit": n, "multiply_adds": n * 10**6, "parameters": n * 1000, "top1": top, "top5": 1.0, "loss": 0.5}
                for n, top in enumerate(tops, start=1)
            ]
            content = {"format": 1, "step": 20, "images": images, "unreadable": 0, "exits": exits} | (report or {})
            (config.folder / "report.json").write_text(json.dumps(content))
        return config.folder

    return make
