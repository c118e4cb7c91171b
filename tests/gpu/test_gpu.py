"""What a GPU has to confirm: every part of a run works, is right, resumes exactly, and does not wait where it need not."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

from dist_train.config import LossConfig
from dist_train.config_file import dump_config, make_config
from dist_train.loss import ExitDistillation
from tests.common import ROOT, SMALL_MODEL
from tests.dist_train.loss.test_kernel import CASES
from tests.dist_train.training.test_resume import assert_same_state, state_at
from tests.gpu.conftest import WANTED


@pytest.fixture
def train(digits, tmp_path, gpus):
    """`train(name, steps, **train)` runs `launch.local` and gives the folder, the last metrics and what was said."""

    def run(name, steps, model=SMALL_MODEL, data=None, **fields):
        config = make_config(
            {
                "name": name,
                "runs": str(tmp_path),
                "model": model,
                "optim": {"lr": 0.05, "ema_decay": 0.9},
                "data": {"shards": str(digits), "flip": False, **(data or {})},
                "train": {"global_batch": 32, "micro_batch": 32 // gpus, "epochs": 1, "max_steps": steps, **fields},
                "checkpoint": {"every_steps": 5, "keep": 10},
                "tracking": {"log_every": 5, "uri": "off"},
            }
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_config(config))
        words = [sys.executable, "-m", "launch.local", "-n", str(gpus), str(path)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line)["metrics"] for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
        return config.folder, [line for line in lines if "train/loss" in line], done.stdout

    return run


def test_doctor_finds_everything_in_order(command, note, device):
    said = command("dist_train", "doctor", timeout=500).stdout
    print(said)
    assert "A run can start here." in said
    assert device.type == "cpu" or "not tried" not in said
    for line in said.splitlines():
        if re.match(r"driver|compiler|loss kernel|GPU decoder|NCCL|not tried", line):
            note(f"doctor: {line[:20].strip()}", line[20:].strip())


def test_every_case_of_the_loss_kernels(device):
    """Those of kernel_cases.py, which test_kernel.py runs in Triton's interpreter, against the operator on the CPU."""
    if device.type == "cpu":
        pytest.skip("test_kernel.py runs them in the interpreter")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASES]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("exits", "classes"), [(2, 10), (5, 1000), (11, 1000), (16, 100)])
def test_the_objective_is_that_of_the_cpu(device, exits, classes, dtype):
    generator = torch.Generator().manual_seed(exits)
    logits = [torch.randn(96, classes, generator=generator).mul_(3).to(dtype) for _ in range(exits)]
    labels = torch.randint(classes, (96,), generator=generator)
    labels[::7] = -100
    for teachers in ("last", "later", "next", "ensemble", "none"):
        results = []
        for place in (device, torch.device("cpu")):
            leaves = [z.to(place, copy=True).requires_grad_() for z in logits]
            criterion = ExitDistillation.from_config(LossConfig(teachers=teachers), exits).to(place)
            loss, stats = criterion(leaves, labels.to(place))
            loss.backward()
            results.append((loss.detach().cpu(), stats.vector.cpu(), torch.stack([leaf.grad.cpu() for leaf in leaves])))
        for got, expected in zip(*results):
            torch.testing.assert_close(got, expected, rtol=2e-2 if dtype != torch.float32 else 1e-3, atol=1e-5)


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "bf16"), (1, "fp16"), (2, "fp32"), (3, "bf16")])
def test_a_resumed_deterministic_run_is_the_uninterrupted_one_bit_for_bit(train, note, stage, precision):
    if WANTED == "rehearsal" and (stage, precision) != (1, "bf16"):
        pytest.skip("one of them is rehearsed; test_resume.py has them all on a CPU")
    options = {"zero_stage": stage, "precision": precision, "deterministic": True}
    whole, _, _ = train("whole", 15, **options)
    train("cut", 10, **options)
    cut, _, _ = train("cut", 15, **options)
    assert_same_state(state_at(whole, 15), state_at(cut, 15))
    note(f"resumed = uninterrupted, ZeRO {stage}, {precision}", "bit for bit")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_with_cuda_graphs_is_the_run_without_bit_for_bit(train, note, gpus, precision):
    """Two forward passes an update, whose gradients add up."""
    options = {"zero_stage": 0, "precision": precision, "deterministic": True, "micro_batch": 16 // gpus}
    if WANTED == "rehearsal" and precision != "bf16":
        pytest.skip("one of them is rehearsed")
    plain, _, _ = train("plain", 15, **options, cuda_graphs=False)
    replayed, _, _ = train("replayed", 15, **options, cuda_graphs=WANTED != "rehearsal")
    assert_same_state(state_at(plain, 15), state_at(replayed, 15))
    note(f"with CUDA graphs = without, {precision}", "bit for bit")


@pytest.mark.parametrize("decoder", ["gpu", "cpu"])
def test_a_run_learns_with_either_decoder(train, note, device, decoder):
    if device.type == "cpu" and decoder == "gpu":
        pytest.skip("there is no GPU to decode")
    _, lines, said = train(f"decoder-{decoder}", 40, data={"decoder": decoder})
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    note(
        f"small network, decoder {decoder}",
        f"{lines[-1]['speed/images_per_second']:.0f} images/s, waiting for data {100 * lines[-1]['speed/waiting_for_data']:.0f} %, "
        f"{lines[-1]['memory/peak_gib']:.2f} GiB",
    )
    assert "ZeRO 0 (auto)" in said


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": False}, {"deterministic": True}, {"compile": True}], ids=str)
def test_the_speed_of_a_cifar_network(train, note, options):
    if WANTED == "rehearsal" and options:
        pytest.skip("one of them is rehearsed")
    network = {"exits": 7, "base": 4, "step": 2}
    _, lines, _ = train("speed", 5 if WANTED == "rehearsal" else 60, model=network, **options)
    note(
        f"7-exit MSDNet of CIFAR, batch 32, {options or 'default'}",
        f"{lines[-1]['speed/images_per_second']:.0f} images/s",
    )


def test_an_update_waits_for_the_gpu_once(ranks, note, device):
    [counted] = ranks(waits, 1, device.type)
    print(counted)
    note("waits for the GPU per update, ZeRO 0, 1, 2", ", ".join(map(str, counted)))
    assert device.type == "cpu" or all(waited <= 1 for waited in counted)


def waits(kind):
    """Synchronizing calls in an update of two micro batches, at stages 0 to 2, as torch itself sees them."""
    from dist_train.distributed.group import Group, Ranks
    from dist_train.training.engine import Engine
    from tests.dist_train.training.test_engine import TwoExits, settings

    group, counted = Group(Ranks.from_env(), 1), []
    for stage in range(3):
        engine = Engine(TwoExits(), settings(stage, micro=8), group)
        images = torch.randn(2, 8, 3, 9, 9, device=group.device)

        def update(engine=engine, images=images):
            for number, part in enumerate(images):
                loss = sum((logits.float() ** 2).mean() for logits in engine.forward(part))
                engine.backward(loss)
                if number == 0:
                    engine.next_micro_batch()
            engine.update(0.05)

        update()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if kind == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            update()
            if kind == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        counted.append(sum("synchroniz" in str(warning.message) for warning in caught))
    return counted


FAULTY = """
import torch
from torch import nn

class Faulty(nn.Module):
    def forward(self, features):
        place = torch.full((len(features), 1), 99 if features.is_cuda else 0, device=features.device)
        return features + features.gather(1, place)

def network(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 15 * 15, classes), Faulty())
"""


def test_a_fault_on_the_gpu_ends_the_run_with_that_fault(digits, tmp_path, device):
    """A place outside of a tensor, which a kernel of torch asserts; closing DALI after it would end in an abort."""
    if device.type == "cpu":
        pytest.skip("a CPU raises an exception")
    (tmp_path / "faulty.py").write_text(FAULTY)
    config = make_config(
        {
            "runs": str(tmp_path),
            "data": {"shards": str(digits)},
            "model": {"name": "faulty:network", "exits": ["1"]},
            "tracking": {"uri": "off"},
        }
    )
    (tmp_path / "faulty.yaml").write_text(dump_config(config))
    words = [sys.executable, "-m", "launch.local", "-n", "1", "faulty.yaml"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "device-side assert" in done.stderr
    assert "nvjpeg" not in done.stderr, done.stderr[-4000:]


def test_running_out_of_memory_is_one_line(digits, tmp_path, device, command):
    if device.type == "cpu":
        pytest.skip("a CPU would swap")
    micro = 1 << 16
    words = ["--data.shards", digits, "--train.micro_batch", micro, "--train.global_batch", micro, "--runs", tmp_path]
    wrapped = ["--data.last_batch", "wrap", "--data.image_size", 256, "--data.repeated_augment", 1]
    done = command("launch.local", "-n", 1, "configs/quickstart.yaml", *words, *wrapped, timeout=500)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
