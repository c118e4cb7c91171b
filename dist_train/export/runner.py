"""Early-exit prediction with ONNX Runtime: needs numpy, Pillow, onnxruntime and the files beside this one.

python predict.py IMAGE ..., or network = EarlyExit(FOLDER); network.predict(numpy.stack([network.load(path), ...]))
"""

import argparse
import hashlib
import json
import math
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnxruntime
    from PIL import Image
except ImportError as missing:
    sys.exit(f"{missing}; install what predict.py needs: pip install numpy pillow onnxruntime")

Array = np.ndarray[Any, Any]
# A row per image: logits [N, K] of the exit that it took, class, probability of that class, exit (from 1).
Result = namedtuple("Result", ["logits", "classes", "confidence", "exits"])


class EarlyExit:
    """The network of a folder; ``threads`` compute together (0: one per core).  ValueError: a file is not the exported one."""

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        self.policy: dict[str, Any] = json.loads(Path(folder, "policy.json").read_text(encoding="utf-8"))
        signed = json.dumps({key: value for key, value in self.policy.items() if key != "sha256"}, sort_keys=True)
        if hashlib.sha256(signed.encode()).hexdigest() != self.policy.get("sha256"):
            raise ValueError(f"{folder}: policy.json was changed, its SHA-256 does not fit; export again")
        for name in (one for one in self.policy["files"] if not one.endswith((".py", ".md"))):
            if hashlib.sha256(Path(folder, name).read_bytes()).hexdigest() != self.policy["files"][name]:
                raise ValueError(f"{folder}: {name} is not the one of policy.json, its SHA-256 differs; export again")
        names = self.policy.get("stages") or [self.policy["graph"]]
        self.stages = [self.program(Path(folder, name), threads) for name in names]
        self.graph = self.stages.pop() if "graph" in self.policy else None  # stops by itself, for an image at a time
        self.thresholds = np.array([np.inf if v is None else v for v in self.policy["thresholds"]], np.float32)
        self.counts = np.zeros(len(self.thresholds), dtype=np.int64)  # images that took each exit so far

    def program(self, file: Path, threads: int) -> Any:
        """A program as a function, from a list of its inputs to a list of its outputs."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        return lambda given: session.run(None, dict(zip(names, given)))

    def load(self, file: Any) -> Array:
        """An image file, prepared as the network takes it, float32 [3, S, S]; raises OSError for what is no image."""
        how, size = self.policy["preprocessing"], self.policy["preprocessing"]["crop"]
        image: Image.Image = Image.open(file)
        if max(image.size) > 100 * min(image.size):  # resized by its shorter side, it could fill the memory
            raise OSError(f"{image.size[0]} x {image.size[1]} pixels; one side may be at most 100 times the other")
        if image.mode.startswith("I"):  # 16 bits
            image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        width, height = (int(how["resize"] * side / min(image.size)) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), np.float32)
        pixels = (pixels[top : top + size, left : left + size] / 255 - np.float32(how["mean"])) / np.float32(how["std"])
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def predict(self, images: Array) -> Result:
        """Classify float32 [N, 3, S, S]: after every exit sure images leave, and only the others are computed further."""
        waiting, given = np.arange(len(images)), [images]
        predicted, exits = np.zeros((len(images), 0), dtype=np.int64), np.zeros(len(images), dtype=np.int64)
        logits = np.zeros((len(images), len(self.policy["classes"])), dtype=np.float32)
        if self.graph and len(images):
            logits, exits = map(np.concatenate, zip(*(self.graph([one[None], self.thresholds[:-1]]) for one in images)))
        for number, stage in enumerate(self.stages):
            if not len(waiting):
                break
            found, *given = stage(given)
            predicted = np.concatenate([predicted, found.argmax(1)[:, None]], axis=1)
            sure = (self.confidence(number, found, predicted) >= self.thresholds[number]) | (stage is self.stages[-1])
            logits[waiting[sure]], exits[waiting[sure]] = found[sure], number
            if sure.any():
                waiting, predicted, given = waiting[~sure], predicted[~sure], [tensor[~sure] for tensor in given]
        self.counts += np.bincount(exits, minlength=len(self.counts))
        return Result(logits, logits.argmax(1), np.exp(_log_softmax(logits)).max(1, initial=0), exits + 1)

    def confidence(self, number: int, logits: Array, predicted: Array) -> Array:
        """By the policy's measure, of an exit counted from 0: of its logits [N, K] and the classes so far [N, number + 1]."""
        name, temperatures = self.policy["measure"], self.policy["temperatures"]
        logs = _log_softmax(logits / np.float32(temperatures[number]) if temperatures else logits)
        if name == "max_probability":
            return np.asarray(np.exp(logs.max(1)))
        top, same = np.exp(np.sort(logs, axis=1)), predicted[:, :-1] == predicted[:, -1:]
        entropy = -(np.exp(logs) * np.maximum(logs, -200)).sum(1)  # 0 times -inf is no number
        measures = {
            "max_probability": top[:, -1],
            "entropy": 1 - entropy / math.log(max(logs.shape[1], 2)),
            "margin": top[:, -1] - (top[:, -2] if logs.shape[1] > 1 else 0),
            "agreement": same.sum(1) / max(number, 1),
            "patience": np.cumprod(same[:, ::-1], axis=1).sum(1) / max(number, 1),
        }
        if name != "learned":
            return np.asarray(measures[name], dtype=np.float32)
        features = np.stack([np.float32(values) for values in measures.values()], axis=1)
        *weights, constant = np.float32(self.policy["weights"][number])
        return np.asarray(1 / (1 + np.exp(-(features * weights).sum(1) - constant)))

    def warning(self) -> str:
        """A line where another share of images takes an exit than when the thresholds were tried out; else empty."""
        known, images = self.policy["shares"], int(self.counts.sum())
        for number, hits in enumerate(self.counts.tolist()) if known and images else ():
            low, high, others = known["low"][number], known["high"][number], images - hits
            nearest = min(max(hits / images, low), high)
            # Evidence of a beta-binomial mixture, which holds at every number of images (Robbins 1970).
            evidence = math.lgamma(hits + 1) + math.lgamma(others + 1) - math.lgamma(images + 2)
            evidence -= sum(n * math.log(max(p, 1e-300)) for n, p in ((hits, nearest), (others, 1 - nearest)))
            if evidence >= math.log(1 / known["level"]):
                return f"{100 * hits / images:.1f} % of {images} images exit at exit {number + 1}, usual are {100 * low:.1f} to {100 * high:.1f} %: these are of another kind"
        return ""


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True, initial=-np.inf)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def main() -> int:
    """Print a line per image: confidence, exit, class, file."""
    parser = argparse.ArgumentParser(description="Classify images; each exits as soon as an exit is confident of it.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: one per core")
    if (known := parser.parse_args()).threads < 0:
        sys.exit(f"predict.py: --threads is {known.threads}; give the number of threads, or 0 for one per core")
    try:
        network = EarlyExit(Path(__file__).parent, known.threads)
    except (ValueError, OSError) as error:
        sys.exit(f"predict.py: {error}")
    for file in known.images:
        try:
            image = network.load(file)
        except Exception as error:  # a damaged file can make Pillow raise anything
            print(f"unreadable: {file}: {str(error) or type(error).__name__}", file=sys.stderr)
            continue
        (class_,), (confidence,), (exit_,) = network.predict(image[None])[1:]
        print(f"{confidence:.4f}  {exit_:>4}  {network.policy['classes'][class_]}  {file}")
    if warning := network.warning():
        print(f"warning: {warning}", file=sys.stderr)
    return 0 if network.counts.any() else 2


if __name__ == "__main__":
    sys.exit(main())
