"""The README.md of an export: what was measured, and how it is used."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.export.parity import TIE, leaving_at
from dist_train.export.runner import EarlyExit

REPEATS = 30


def exit_milliseconds(exported: EarlyExit, image: NDArray[np.float32]) -> list[float]:
    """Median milliseconds of ``predict`` for an image [1, 3, S, S] that leaves at exit 1, 2, ..., the decisions included."""
    chosen, count = exported.thresholds, len(exported.thresholds)
    times: list[list[float]] = []
    for _ in range(REPEATS + 1):  # in turn, so that a slower moment of the machine meets all of them
        times.append([])
        for number in range(count):
            exported.thresholds = leaving_at(number, count)
            start = time.perf_counter()
            exported.predict(image)
            times[-1].append(1000 * (time.perf_counter() - start))
    exported.thresholds = chosen
    # The first round warms up.
    return [statistics.median(column) for column in zip(*times[1:])]


def readme_text(policy: dict[str, Any], milliseconds: Sequence[float]) -> str:
    """Markdown, out of policy.json and the times of the exits, an image at a time on one thread."""
    measured, how = policy["parity"], policy["preprocessing"]
    pillow, costs = measured["pillow"], policy["costs"]["exits"]
    rows = [
        f"| {number} | {cost / 1e6:.2f} M | {time_:.2f} | {_percent(top1)} | {100 * share:.1f} | {_threshold(threshold)} |"
        for number, (cost, time_, top1, share, threshold) in enumerate(
            zip(costs, milliseconds, measured["top1"], measured["policy_shares"], policy["thresholds"]), start=1
        )
    ]
    shares = measured["policy_shares"]
    cost, time_ = (float(np.dot(shares, values)) for values in (costs, milliseconds))
    rows.append(
        f"| **by the policy** | {cost / 1e6:.2f} M | {time_:.2f} | {_percent(measured['policy_top1'])} | 100 | {policy['measure']} |"
    )
    return f"""# Early-exit network, step {policy["step"]}

{_programs(policy)}

| exit | multiply-adds | ms | top-1 % | images that leave here, % | threshold |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Measured with these programs: accuracy on the {measured["labeled"]} labeled of {measured["images"]} images of {measured["split"]}, of which some may have been used to choose
the thresholds; time of `predict` for an image alone that leaves at the exit, one thread, median of {REPEATS} ({platform.processor() or platform.machine()});
by the policy: the mean over the exits that these images take.
{_promise(policy)}
Compared with the network that they were made of, in float32, on the same images: {_compared(measured)}.

`predict.py` decodes images with Pillow, evaluation decoded them with DALI. Pixels differ by {pillow["mean_difference"]:.2f} of 255 on average
and {pillow["largest_difference"]:.0f} at most; of {pillow["images"]} images {pillow["other_class"]} get another class and {pillow["other_exit"]} another exit by that.

## Use

```
pip install numpy pillow {policy["runtime"]}
python predict.py IMAGE ...
```

```python
import numpy as np
from predict import EarlyExit

network = EarlyExit(".", threads=1)
result = network.predict(np.stack([network.load("image.jpg")]))  # sure images leave the batch, the others go on
print(network.policy["classes"][result.classes[0]], result.confidence[0], result.exits[0])
```

Images: {how["color"]}, shorter side resized to {how["resize"]} pixels, centre crop of {how["crop"]}, scaled to {how["scale"]}, minus {list(how["mean"])}, by {list(how["std"])}.
To serve it, load `EarlyExit` once per process and call `predict` with the images that are waiting. It is not shared between threads.
`network.warning()` says when the images are of another kind than those that the thresholds were chosen by.

`policy.json` has all of this for programs, and the SHA-256 of every file.
"""


def _programs(policy: dict[str, Any]) -> str:
    exits = len(policy["thresholds"])
    if "graph" in policy:
        return (
            f"One ONNX program in {policy['precision']} with {exits} exits, which takes an image at a time: what is behind an exit is computed only if the exit is not\n"
            "sure of it (`If`). Inputs: `images`, and `thresholds` of all exits but the last, those of the table; outputs: `logits`, and `exit`, from 0."
        )
    name = "OpenVINO" if policy["runtime"] == "openvino" else "ONNX"
    return f"{exits} {name} programs in {policy['precision']}, one per exit. An image goes on to the next only if the exit is not sure of it."


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _threshold(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _compared(measured: dict[str, Any]) -> str:
    if measured["max_changed"] is not None:
        return (
            f"{measured['other_class']} of {measured['images']} get another class and\n{measured['other_exit']} take another exit, "
            f"{100 * measured['changed'] / measured['images']:.2f} % one or the other (allowed: {100 * measured['max_changed']:g} %)"
        )
    ties = measured["ties"]
    exits = f", but {ties} whose confidence is within {TIE:g} of a threshold" if ties else ""
    return f"every image takes the same exit{exits}, and no logit\ndiffers by more than {measured['largest_logit_difference']:.1e}"


def _promise(policy: dict[str, Any]) -> str:
    promise = policy["promise"]
    if not promise:
        return ""
    evaluated = promise["precision"]
    same = policy["precision"] == evaluated
    whose = "" if same else f"Of the network in {evaluated}, as it was evaluated; not guaranteed for these programs. "
    if "risks" in promise:
        risks = "; ".join(f"{one['risk']} at most {one['epsilon']:g}" for one in promise["risks"])
        return f"\n{whose}Guaranteed with probability {1 - promise['delta']:g} on images like those of {promise['calibration']}: {risks}.\n"
    low, high = promise["top1_interval"]
    return (
        f"\n{whose}The report on images that had no part in the thresholds: top-1 {100 * promise['top1']:.2f} % (95 % interval "
        f"{100 * low:.2f} to {100 * high:.2f}) for a budget of {promise['budget']:.6g} {promise['unit']}.\n"
    )
