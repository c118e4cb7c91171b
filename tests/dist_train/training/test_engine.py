"""The engine: every ZeRO stage, accumulation and number of ranks makes the same updates, and state survives the change."""

import sys

import pytest
import torch
from torch import nn

from dist_train.config_file import make_config
from dist_train.distributed.group import Group, Ranks
from dist_train.errors import ConfigError
from dist_train.models.parts import ALL
from dist_train.training.engine import Engine
from dist_train.training.loss_scale import UPDATES_BEFORE_RISE, LossScale
from dist_train.training.preflight import check_device
from dist_train.training.zero import chosen_stage, in_buckets, keep_batch_norms_from_cudnn


class TwoExits(nn.Module):
    """An odd number of parameters, sizes that no number of ranks divides, and a norm whose statistics differ by rank."""

    num_exits, num_classes = 2, 5

    def __init__(self, norm=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, bias=not norm)  # a bias before a norm has no gradient but noise
        self.norm = nn.BatchNorm2d(7) if norm else nn.Identity()
        self.register_buffer("places", torch.arange(3.0), persistent=False)  # as tables of positions are
        self.first, self.body, self.last = nn.Linear(7, 5, bias=False), nn.Conv2d(7, 9, 3), nn.Linear(9, 5, bias=False)

    def forward(self, images):
        features = self.norm(self.stem(images)).relu()
        deeper = self.body(features).relu()
        return self.first(features.mean((2, 3))), self.last(deeper.mean((2, 3)))


def settings(zero, optimizer="sgd", micro=4, precision="fp32", **optim):
    return make_config(
        {
            "data": {"shards": "none"},
            "optim": {"name": optimizer, "lr": 0.05, **optim},
            "train": {"zero_stage": zero, "precision": precision, "global_batch": 16, "micro_batch": micro},
        }
    )


def start(group, config, norm=True, weights=None):
    torch.manual_seed(0)
    model = TwoExits(norm)
    if weights:
        model.load_state_dict(weights)
    return Engine(model, config, group)


def in_group(function, calls):
    """Call a function with the group of these ranks and each set of arguments: one start of the processes for many cases."""
    group = Group(Ranks.from_env(), 1)
    return [globals()[function](group, *arguments) for arguments in calls]


def step(engine, number, poison=False):
    """One update on the same 16 images, however they are divided."""
    images = torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(number))
    micro, ranks = engine.config.train.micro_batch, engine.group.ranks
    passes = 16 // micro // ranks.world_size
    mine = images[ranks.rank * 16 // ranks.world_size :].split(micro)[:passes]
    for index, part in enumerate(mine):
        if poison and ranks.rank == ranks.world_size - 1:
            part = part * float("inf")
        logits = engine.forward(part)
        loss = sum((exit_logits.float() ** 2).mean() for exit_logits in logits) / passes
        engine.backward(loss)
        if index < passes - 1:
            engine.next_micro_batch()
    return engine.update(0.05)


def trained(group, config, norm=True):
    engine = start(group, config, norm)
    norms = [step(engine, number).gradient_norm for number in range(3)]
    return engine.weights(), engine.optimizer_state(), norms


def close(left, right, atol=0.0):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_all_zero_stages_make_the_same_updates(ranks, optimizer):
    calls = [(settings(zero, optimizer, max_grad_norm=0.3),) for zero in range(4)]
    plain, *others = ranks(in_group, 2, "trained", calls)[0]
    for stage, (weights, state, norms) in enumerate(others, start=1):
        # Adam divides by the root of gradients near zero: there the order of a sum shows.
        close(weights, plain[0], atol=1e-6 if optimizer == "sgd" else 1e-4)
        close(state, plain[1], atol=1e-6)
        assert norms == pytest.approx(plain[2], rel=1e-5), stage


def test_one_rank_with_two_passes_is_two_ranks_with_one_is_one_pass_of_all(ranks):
    # Without batch norm: its statistics are those of a micro batch.
    one = ranks(in_group, 1, "trained", [(settings(1, micro=8), False), (settings(1, micro=16), False)])[0]
    two = ranks(in_group, 2, "trained", [(settings(1, micro=8), False)])[0]
    expected = one[0]
    for weights, state, norms in (one[1], two[0]):
        close(weights, expected[0], atol=1e-6)
        close(state, expected[1], atol=1e-6)
        assert norms == pytest.approx(expected[2], rel=1e-5)


def moved(group, stage, optimizer, handed):
    """Three updates and then hand everything over, or take it over; then two more."""
    if handed is None:
        engine = start(group, settings(stage, optimizer))
        for number in range(3):
            step(engine, number)
        handed = engine.weights(), engine.optimizer_state()
    else:
        engine = start(group, settings(stage, optimizer), weights=handed[0])
        engine.load_optimizer_state(handed[1], updates=dict.fromkeys(ALL, 3))
    norms = [step(engine, number).gradient_norm for number in (3, 4)]
    return handed, norms, {name: tensor for name, tensor in engine.weights().items() if "norm" not in name}


def test_state_moves_to_any_stage_and_number_of_ranks(ranks):
    for before, after in ((2, 1), (1, 2)):
        sources = [(stage, optimizer, None) for optimizer in ("sgd", "adamw") for stage in range(4)]
        written = ranks(in_group, before, "moved", sources)[0]
        # Each stage is read by the next one, the last by the first.
        targets = [((stage + 1) % 4, optimizer, result[0]) for (stage, optimizer, _), result in zip(sources, written)]
        for (_, optimizer, _), result, expected in zip(targets, ranks(in_group, after, "moved", targets)[0], written):
            assert result[1] == pytest.approx(expected[1], rel=1e-4)
            close(result[2], expected[2], atol=1e-5 if optimizer == "sgd" else 1e-4)


def poisoned(group, zero):
    engine = start(group, settings(zero, ema_decay=0.9))
    step(engine, 0)
    before = engine.weights(), engine.optimizer_state(), engine.averaged_weights()
    update = step(engine, 1, poison=True)
    after = engine.weights(), engine.optimizer_state(), engine.averaged_weights()
    # The running statistics as well, which the forward pass had moved.
    unchanged = all(torch.equal(old[name], new[name]) for old, new in zip(before, after) for name in old)
    return update.applied, unchanged, step(engine, 2).applied


def test_an_update_that_is_not_finite_on_one_rank_changes_nothing_on_any(ranks):
    assert ranks(in_group, 2, "poisoned", [(zero,) for zero in range(4)]) == [[(False, True, True)] * 4] * 2


def waits(group, calls):
    """What makes the host wait in an update of two micro batches, on a CPU that plays a GPU."""
    from tests.dist_train.training.plays_cuda import Reads, play_cuda

    accelerator = play_cuda()
    counted = []
    for zero, optim in calls:
        engine = start(group, settings(zero, micro=4, **optim))
        step(engine, 0)
        step(engine, 1)
        accelerator.waits.clear()
        with Reads(accelerator.waits), pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "state_dict", lambda *_, **__: pytest.fail("the whole network is looked at"))
            assert step(engine, 2).applied
        counted.append(dict(accelerator.waits))
    return counted


def test_the_host_waits_for_the_device_once_per_update_and_never_for_all_of_it(ranks):
    calls = [(zero, optim) for zero in (0, 1, 2) for optim in ({}, {"max_grad_norm": 0.1, "ema_decay": 0.9})]
    calls += [(0, {"exit_gradients": rule}) for rule in ("equilibrium", "pcgrad")]
    for counted in ranks(in_group, 2, "waits", [(calls,)]):
        assert counted == [[{f"value read in {'zero' if zero else 'engine'}.py": 1} for zero, _ in calls]]


def destroyed(group, stage):
    """The modules that are imported when an engine is destroyed."""
    engine = start(group, settings(stage))
    step(engine, 0)
    before = set(sys.modules)
    engine._deepspeed.destroy()  # what DeepSpeed's destructor calls
    return sorted(sys.modules.keys() - before)


def test_an_engine_that_is_destroyed_imports_nothing(ranks):
    # Collected in the midst of an import, one that imports breaks it (Python before 3.12).
    assert ranks(in_group, 1, "destroyed", [(stage,) for stage in range(4)]) == [[[]] * 4]


def reduced(group, elements):
    """Weights after three updates at stage 0: reduced by DeepSpeed itself, and by us in buckets of so many elements."""
    results = []
    for ours in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dist_train.training.zero.LARGEST_BUCKET", elements)
            engine = start(group, settings(0, optimizer="sgd", weight_decay=0.1))
            if not ours:
                del engine._deepspeed.buffered_allreduce_fallback, engine._deepspeed.zero_grad
            for number in range(3):
                step(engine, number)
            results.append(engine.weights())
    return all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items() if "running" not in name)


@pytest.mark.parametrize("processes", [1, 2])
def test_stage_0_reduces_as_deepspeed_does_in_any_buckets(ranks, processes):
    assert ranks(in_group, processes, "reduced", [(10,), (200,), (10**6,)]) == [[True] * 3] * processes


def test_buckets_keep_the_order_and_their_size():
    tensors = [torch.zeros(size) for size in (3, 4, 10, 1, 1)]
    assert [[len(one) for one in bucket] for bucket in in_buckets(tensors, 7)] == [[3, 4], [10], [1, 1]]
    assert in_buckets([], 7) == []


def buffers(group):
    engine = start(group, settings(1))
    step(engine, 0)
    return engine.model.norm.running_mean.clone(), engine.weights()["norm.running_mean"]


def test_running_statistics_come_out_averaged_over_the_ranks(ranks):
    [(first, average)], [(second, average_again)] = ranks(in_group, 2, "buffers", [()])
    assert not torch.equal(first, second)
    torch.testing.assert_close(average, (first + second) / 2)
    assert torch.equal(average, average_again)


def averages(group, zero):
    engine = start(group, settings(zero, ema_decay=0.5))
    expected = {name: tensor.clone() for name, tensor in engine.weights().items()}
    for number in range(3):
        step(engine, number)
        decay = min(0.5, (1 + number) / (10 + number))
        for name, tensor in engine.weights().items():
            if tensor.is_floating_point():
                expected[name].lerp_(tensor, 1 - decay)
    result = engine.averaged_weights()
    assert result.keys() == expected.keys()  # or they could not be loaded
    return max(float((result[name] - expected[name]).abs().max()) for name in expected if "num_batches" not in name)


def test_averaged_weights_are_the_moving_average_of_the_weights(ranks):
    assert max(ranks(in_group, 2, "averages", [(1,), (3,)])[0]) < 1e-6


def bucketed(group, zero, bucket):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_train.training.zero.LARGEST_BUCKET", bucket)
        return trained(group, settings(zero, max_grad_norm=0.3))


def test_small_buckets_give_the_same_weights_bit_for_bit(ranks):
    # 1,024 elements are fewer than the network has, and more than most of its tensors.
    calls = [(zero, bucket) for zero in (1, 2, 3) for bucket in (1024, 25_000_000)]
    results = ranks(in_group, 2, "bucketed", calls)[0]
    for small, large in zip(results[::2], results[1::2]):
        close(small[0], large[0])
        close(small[1], large[1])
        assert small[2] == large[2]


def test_the_stage_is_chosen_from_the_size_of_the_optimizer_state():
    # 2**28 weights: 1 GiB for each tensor of the optimizer.
    network = nn.Linear(16384, 16384, bias=False, device="meta")
    plain, adam, stateless = (
        settings("auto", **optim) for optim in ({}, {"optimizer": "adamw"}, {"momentum": 0, "nesterov": False})
    )
    assert [chosen_stage(config, network, 8) for config in (plain, adam, stateless)] == [1, 1, 0]
    assert chosen_stage(plain, TwoExits(), 8) == 0
    assert chosen_stage(plain, network, 1) == 0
    assert chosen_stage(settings(2), TwoExits(), 8) == 2


def scaled(group, zero, start_scale):
    """Three applied updates in fp16, and what went before: skipped ones, after which nothing had changed."""
    engine = start(group, settings(zero, precision="fp16", max_grad_norm=0.1), norm=False)
    assert engine.loss_scale is not None
    engine.loss_scale.value = start_scale
    before, skipped = engine.weights(), 0
    while not (update := step(engine, 0)).applied:
        skipped += 1
        close(engine.weights(), before)
    norms = [update.gradient_norm] + [step(engine, number).gradient_norm for number in (1, 2)]
    return skipped, engine.loss_scale, norms, engine.weights()


def test_fp16_clips_and_reports_the_gradient_without_its_loss_scale_and_recovers_from_one_that_is_absurd(ranks):
    plain, _, expected = ranks(in_group, 2, "trained", [(settings(1, max_grad_norm=0.1), False)])[0][0]
    calls = [(zero, scale) for zero in range(4) for scale in (2.0**16, 2.0**40)]
    for (_, scale), result in zip(calls, ranks(in_group, 2, "scaled", calls)[0]):
        skipped, reached, norms, weights = result
        assert norms == pytest.approx(expected, rel=2e-3)  # fp16 has 11 bits
        close(weights, plain, atol=1e-4)
        assert reached == LossScale(scale / 2**skipped, 3)
        assert (skipped > 10) == (scale > 2**20)


def test_the_loss_scale_rises_after_many_applied_updates_and_stays_within_its_range():
    scale = LossScale(2.0**23)
    for applied in [True] * 3 * UPDATES_BEFORE_RISE + [False]:
        scale.count(applied)
    assert scale == LossScale(2.0**23, 0)  # doubled once, to the largest, and halved
    for _ in range(30):
        scale.count(False)
    assert (scale.value, scale.is_smallest) == (1.0, True)


def test_what_a_cpu_cannot_do_is_refused():
    config = make_config({"data": {"shards": "none"}, "train": {"sync_bn": True}})
    with pytest.raises(ConfigError, match="sync_bn is true, which needs a GPU"):
        check_device(config, torch.device("cpu"))


def test_batch_norms_are_kept_from_cudnn_and_nothing_else_is(monkeypatch):
    seen = []

    class Sees(nn.Module):
        def forward(self, features):
            seen.append(torch.backends.cudnn.enabled)
            return features

    class Norm(nn.BatchNorm2d):
        def forward(self, features):
            seen.append(torch.backends.cudnn.enabled)
            if features.isnan().any():
                raise ValueError("not a number")
            return super().forward(features)

    network = nn.Sequential(Sees(), Norm(3), Sees())
    keep_batch_norms_from_cudnn(network)
    network(torch.zeros(2, 3, 4, 4))
    assert seen == [True, False, True]
    with pytest.raises(ValueError, match="not a number"):
        network(torch.full((2, 3, 4, 4), torch.nan))
    assert torch.backends.cudnn.enabled
