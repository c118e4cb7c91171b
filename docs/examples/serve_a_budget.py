"""The cheapest budget that costs at most a point of accuracy, chosen from a report and served.

`dist-train eval RUN` has measured what every average cost per image achieves. This chooses a point of that curve, predicts image
files with its thresholds, and watches whether they stop where the images of the report did.

Run it after `dist-train eval RUN`: python docs/examples/serve_a_budget.py RUN IMAGES...
Prints the budget, then a line per image (class, confidence, exit), then what stopping early saved. For a server without torch,
`dist-train export RUN --budget B` writes the same thresholds into policy.json: docs/export.md.
"""

import json
import sys
from pathlib import Path

from dist_train import Predictor
from dist_train.evaluation.thresholds import point_for_budget
from dist_train.prediction.images import find_images

if len(sys.argv) < 3:
    sys.exit(__doc__)
run, *images = sys.argv[1:]
report = json.loads(Path(run, "report.json").read_text())

# Points of rising budget, with what held-out images promise of each. Costs are those of what an image needs until it exits.
sweep = next(one for one in report["budgeted"] if one["cost"] == "multiply_adds_lazy" and one["method"] == "optimal")
best = max(point["expected_top1"] for point in sweep["points"])
budget = next(point["budget"] for point in sweep["points"] if point["expected_top1"] >= best - 0.01)
point = point_for_budget(run, str(budget))
print(f"budget {budget / 1e6:.2f} M multiply-adds: expected top-1 {100 * point.promise['expected_top1']:.1f} %")

# Made once per process; it keeps the network, the classes and the preparation of images.
predictor = Predictor(run, point.policy, reference=point.reference)
for one in predictor.run(find_images(images)):
    print(f"{one.image}: {one.label} ({one.confidence:.2f}), exit {one.exit}")

saving = predictor.saving()
print(f"{saving.multiply_adds / 1e6:.2f} M multiply-adds per image instead of {saving.full_multiply_adds / 1e6:.2f} M")
if predictor.monitor and (warning := predictor.monitor.warning()):
    print(f"warning: {warning}")  # images of another kind: the promise does not hold for them
