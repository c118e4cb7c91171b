"""The runs of a study as pandas tables: accuracy by variant and exit over the seeds, and learning curves.

A run folder is plain files, so nothing of dist_train is needed: config.yaml has the settings, report.json the exits,
metrics.jsonl a line per logged step. The runs of a study lie in one folder, and `tracking.group` is the name of the variant.

Run it after `dist-train study STUDY`: python docs/examples/study_in_pandas.py runs/STUDY
Prints a table of mean top-1 by variant and exit, one of the multiply-adds, and the last point of each learning curve; writes
both tables as CSV beside the runs.
"""

import json
import sys
from pathlib import Path

import pandas as pd
import yaml

if len(sys.argv) < 2:
    sys.exit(__doc__)
study = Path(sys.argv[1])
exits, lines = [], []
for report in sorted(study.glob("*/report.json")):
    config = yaml.safe_load((report.parent / "config.yaml").read_text())
    run = {"variant": config["tracking"]["group"] or config["name"], "seed": config["seed"]}
    exits += [run | one for one in json.loads(report.read_text())["exits"]]
    for line in (report.parent / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        lines.append(run | {"step": entry["step"]} | entry["metrics"])

results, curves = pd.DataFrame(exits), pd.DataFrame(lines)
results.to_csv(study / "exits.csv", index=False)
curves.to_csv(study / "curves.csv", index=False)

# One row per variant, one column per exit: the mean over the seeds, and its standard deviation.
print((100 * results.pivot_table(index="variant", columns="exit", values="top1", aggfunc=["mean", "std"])).round(2))
print((results.pivot_table(index="variant", columns="exit", values="multiply_adds") / 1e6).round(2))

# Lines of training have no validation, and the other way round.
validations = curves.dropna(subset=["val/mean_top1"])
print(validations.sort_values("step").groupby(["variant", "seed"])[["step", "val/mean_top1"]].last())
