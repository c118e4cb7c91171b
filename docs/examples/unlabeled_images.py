"""Images without labels take part in the distillation: later exits teach earlier ones what they see on them.

Shards are made that keep ten labels per class. One run learns from these labels alone, the other one gets the unlabeled images
as well: half of each of its batches is unlabeled (`data.labeled_fraction`).

Run it where `configs/` is: python docs/examples/unlabeled_images.py [--section.key value ...]
Prints the accuracy of every exit for both runs. With few steps and one seed that shows how it is done, not how much it gains:
tests/benchmarks/RESULTS.md has a measurement.
"""

import sys
from pathlib import Path

from dist_train import load_config, train
from shards.__main__ import main as shards

LABELS = "10"  # per class

if not Path("data/semi").exists():
    shards(["make", "digits", "data/semi", "--labels-per-class", LABELS])
    shards(["make", "digits", "data/few", "--per-class", LABELS])

variants = {
    # With 50 labeled images in every batch of both runs, they see each label equally often.
    "labels alone": ["--data.shards", "data/few", "--train.global_batch", "50", "--train.micro_batch", "50"],
    "and unlabeled images": [
        *("--data.shards", "data/semi", "--data.labeled_fraction", "0.5"),
        *("--train.global_batch", "100", "--train.micro_batch", "100"),
    ],
}
for variant, fields in variants.items():
    config = load_config(
        "configs/quickstart.yaml",
        *("--runs", "runs/unlabeled", "--name", variant.replace(" ", "_"), "--tracking.group", variant),
        *("--train.epochs", "1000", "--train.max_steps", "40"),
        *fields,
        *sys.argv[1:],
    )
    run = train(config)
    assert run.validation is not None
    print(f"{variant}: top-1 % by exit {run.validation.line()}")
