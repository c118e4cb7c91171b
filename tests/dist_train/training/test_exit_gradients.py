"""Rules for the gradients of the exits: identities against one backward pass per exit, in real processes."""

import shutil

import pytest
import torch
from torch import nn

from dist_train.config_file import make_config
from dist_train.distributed.group import Group, Ranks
from dist_train.errors import ConfigError
from dist_train.models import MSDNet, build_model
from dist_train.models.cells import run_stage
from dist_train.models.parts import exits_behind
from dist_train.training.engine import Engine
from dist_train.training.exit_gradients import orders
from tests.common import SMALL_MODEL, network_config, train_all
from tests.dist_train.training.test_resume import assert_same_state, settings, state_at, training_lines

LR = 0.5
EXITS = 3
UPDATE = 8
"""In which the exits that agree meet each other first, so that a projection that should not be would show."""


class Chain(nn.Module):
    """Three blocks with an exit behind each; ``rescale`` puts the factors of gradient equilibrium where the paper has them."""

    num_exits, num_classes = EXITS, 5

    def __init__(self, rescale=False):
        super().__init__()
        self.rescale = rescale
        self.blocks = nn.ModuleList(nn.Conv2d(width, 6, 3, padding=1) for width in (3, 6, 6))
        self.heads = nn.ModuleList(nn.Linear(6, 5) for _ in range(EXITS))
        for head in self.heads:
            head.load_state_dict(
                self.heads[0].state_dict()
            )  # so that the exits ask the same of the blocks, or the opposite

    def forward(self, images):
        logits, features = [], images
        for number, (block, head) in enumerate(zip(self.blocks, self.heads)):
            features = block(features).tanh() + (features if number else 0)
            branch, left = features, EXITS - number
            if self.rescale:
                branch, features = Rescale.apply(features, 1 / left), Rescale.apply(features, (left - 1) / left)
            logits.append(head(branch.mean((2, 3))))
        return tuple(logits)


class Rescale(torch.autograd.Function):
    @staticmethod
    def forward(context, features, factor):
        context.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(context, gradient):
        return gradient * context.factor, None


def exit_losses(logits, images):
    """The second exit unlearns what the others learn, so that its gradient points against both of theirs."""
    classes = (images.flatten(1).sum(1).abs() * 100).long() % 5
    return [sign * nn.functional.cross_entropy(one.float(), classes) for sign, one in zip((1, -1, 1), logits)]


def chain(rescale=False):
    torch.manual_seed(0)
    return Chain(rescale)


def batch():
    return torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def updated(rule, cases):
    """By case (ZeRO stage, images per pass, precision) the weights after an update by a rule, and the logged cosines."""
    group = Group(Ranks.from_env(), 1)
    results = []
    for zero, micro, precision in cases:
        train = {"zero_stage": zero, "global_batch": 16, "micro_batch": micro, "precision": precision}
        optim = {"lr": LR, "momentum": 0, "nesterov": False, "weight_decay": 0, "exit_gradients": rule}
        engine = Engine(chain(), make_config({"data": {"shards": "-"}, "optim": optim, "train": train}), group)
        ranks, rank = group.ranks.world_size, group.ranks.rank
        mine = batch()[rank * 16 // ranks :].split(micro)[: 16 // micro // ranks]
        for number, images in enumerate(mine, start=1):
            engine.backward(sum(exit_losses(engine.forward(images), images)) / len(mine))
            if number < len(mine):
                engine.next_micro_batch()
        engine.update(LR, batch=UPDATE)
        projected = engine.projected_gradients
        results.append((engine.weights(), projected.metrics() if projected else {}))
    return results


def gradients_by_exit():
    """From one backward pass per exit over the whole batch: by parameter, where the exit depends on it."""
    network = chain()
    names, parameters = zip(*network.named_parameters())
    found = []
    for loss in exit_losses(network(batch()), batch()):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found.append({name: gradient for name, gradient in zip(names, gradients) if gradient is not None})
    return found


def assert_moved_by(weights, gradients, atol=1e-6):
    before = chain().state_dict()
    assert weights.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close((before[name] - weights[name]) / LR, gradient, rtol=0, atol=atol, msg=name)


def projected(by_exit, meets):
    """Algorithm 1 of Yu et al. (2020), as it is written there."""
    total = {}
    for exit_number, own in enumerate(by_exit):
        gradient = dict(own)
        for other in (by_exit[number] for number in meets[exit_number]):
            shared = gradient.keys() & other.keys()
            product = sum((gradient[name] * other[name]).sum() for name in shared)
            if product < 0:
                square = sum((other[name] ** 2).sum() for name in shared)
                gradient |= {name: gradient[name] - product / square * other[name] for name in shared}
        for name, part in gradient.items():
            total[name] = total.get(name, 0) + part
    return total


@pytest.mark.parametrize(
    ("fields", "size"), [(SMALL_MODEL | {"exits": 3}, 16), ({"name": "resnet", "exits": ["stages.0", "stages.1"]}, 16)]
)
def test_the_exits_behind_a_parameter_are_those_whose_gradient_it_has(fields, size):
    network = build_model(network_config(**fields), 10, size).train()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = exits_behind(network, size)
    # Looking changed nothing: no running statistics, no mode.
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(module.training for module in network.modules())
    named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    logits = network(torch.randn(2, 3, size, size))
    for number, one in enumerate(logits):
        gradients = torch.autograd.grad(one.sum(), named.values(), retain_graph=True, allow_unused=True)
        for name, gradient in zip(named, gradients):
            assert (gradient is not None) == (number in found[name]), name
    assert {exits for exits in found.values() if exits} >= {(0, 1, 2), (0,), (1, 2), (1,), (2,)}


def test_equilibrium_is_the_rule_of_the_paper_at_every_stage(ranks):
    network = chain(rescale=True)
    sum(exit_losses(network(batch()), batch())).backward()
    paper = {name: parameter.grad for name, parameter in network.named_parameters()}
    by_exit = gradients_by_exit()
    for name, gradient in paper.items():
        behind = [gradients[name] for gradients in by_exit if name in gradients]
        torch.testing.assert_close(gradient, sum(behind) / len(behind))
    cases = [(zero, 4, "fp32") for zero in range(4)]
    for weights, _ in ranks(updated, 2, "equilibrium", cases)[0]:
        assert_moved_by(weights, paper)


def msdnet(scales):
    torch.manual_seed(0)
    factors = (1, 2, 4)[:scales]
    fields = {"growth": 4, "initial_channels": 4, "base": 1, "step": 1, "head_width": 8, "reduction": 0}
    return MSDNet(5, exits=EXITS, scales=scales, growth_factors=factors, bottleneck_factors=None, **fields).eval()


def test_with_one_scale_the_coarsest_balances_all():
    network, images = msdnet(1), batch()
    named = dict(network.named_parameters())
    by_exit = [
        torch.autograd.grad(loss, named.values(), retain_graph=True, materialize_grads=True)
        for loss in exit_losses(network(images), images)
    ]
    behind = exits_behind(network, 8)
    network.balance_coarsest = True
    sum(exit_losses(network(images), images)).backward()
    for number, (name, parameter) in enumerate(named.items()):
        mean = sum(gradients[number] for gradients in by_exit) / len(behind[name])
        torch.testing.assert_close(parameter.grad, mean, rtol=1e-4, atol=1e-7, msg=name)


def test_with_several_scales_the_coarsest_alone_is_rescaled():
    images = torch.randn(4, 3, 16, 16)
    plain, balanced = msdnet(3), msdnet(3)
    balanced.balance_coarsest = True
    for one, other in zip(plain(images), balanced(images), strict=True):
        assert torch.equal(one, other)
    sum(exit_losses(balanced(images), images)).backward()
    # The same forward pass with the factors of the paper written beside the blocks.
    features = []
    for layer in plain.stem:
        features.append(layer(features[-1] if features else images))
    logits = []
    for number, (block, head) in enumerate(zip(plain.blocks, plain.heads)):
        for stage in block:
            features = run_stage(stage, features)
        left = EXITS - number
        logits.append(head(Rescale.apply(features[-1], 1 / left)))
        features = [*features[:-1], Rescale.apply(features[-1], (left - 1) / left)]
    sum(exit_losses(logits, images)).backward()
    for (name, one), other in zip(plain.named_parameters(), balanced.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_networks_without_scales_have_no_coarsest():
    model = {"name": "resnet", "exits": ["stages.0"]}
    with pytest.raises(ConfigError, match=r"equilibrium_coarsest and model\.name resnet, which has no scales"):
        make_config(
            {"data": {"shards": "-"}, "model": model, "optim": {"exit_gradients": "equilibrium_coarsest"}},
        )


def test_pcgrad_is_algorithm_1_on_one_gradient_per_exit_of_the_whole_batch(ranks):
    by_exit = gradients_by_exit()
    expected = projected(by_exit, orders(0, UPDATE, EXITS).tolist())
    for other in (
        [[]] * EXITS,
        [row[::-1] for row in orders(0, UPDATE, EXITS).tolist()],
    ):  # no projection, or in other order
        wrong = projected(by_exit, other)
        assert max(float((expected[name] - wrong[name]).abs().max()) for name in wrong) > 1e-3
    whole, half = ranks(updated, 1, "pcgrad", [(0, 16, "fp32"), (0, 16, "fp16")])[0]
    divided = [result[0] for result in ranks(updated, 2, "pcgrad", [("auto", 4, "fp32")])]
    for weights, cosines in (whole, *divided):
        assert_moved_by(weights, expected)
        for pair in ((0, 1), (0, 2), (1, 2)):
            both = [name for name in by_exit[pair[0]] if name in by_exit[pair[1]]]
            flat = [torch.cat([by_exit[number][name].flatten() for name in both]) for number in pair]
            cosine = float(nn.functional.cosine_similarity(*flat, dim=0))
            assert cosines[f"train/exit{pair[1] + 1}/cosine_to_exit{pair[0] + 1}"] == pytest.approx(cosine, abs=1e-5)
    assert_moved_by(half[0], expected, atol=2e-3)


def test_exits_meet_each_other_in_an_order_of_their_own_in_every_update():
    drawn = [orders(3, update, 4) for update in range(200)]
    assert torch.equal(orders(3, 5, 4), drawn[5])
    for meets in drawn:
        assert [sorted(row) for row in meets.tolist()] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert {tuple(meets[0].tolist()) for meets in drawn} == {
        (1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)
    }  # fmt: skip


def test_resumed_is_uninterrupted(ranks, digits, tmp_path):
    rules = {"equilibrium": (0, 3), "pcgrad": (0,)}

    def configs(prefix, steps):
        made = []
        for rule, stages in rules.items():
            for zero in stages:
                config = settings(digits, tmp_path, f"{prefix}-{rule}-{zero}", zero, max_steps=steps)
                optim = config.optim.model_copy(update={"exit_gradients": rule})
                made.append(config.model_copy(update={"optim": optim}))
        return made

    whole, cut = configs("whole", 10), configs("cut", 6)
    ranks(train_all, 2, [*whole, *cut])
    for config in cut:  # as if it had been killed after step 6, two steps after its last checkpoint
        shutil.rmtree(config.folder / "checkpoints" / "step-00000006")
    ranks(train_all, 2, configs("cut", 10))
    for one, other in zip(whole, cut):
        assert_same_state(state_at(one.folder, 10), state_at(other.folder, 10))
        assert training_lines(one.folder) == training_lines(other.folder)
    assert "train/exit2/cosine_to_exit1" in training_lines(whole[-1].folder)[-1][2]


def test_stages_of_a_regime_train_by_their_gradients_alone(ranks, digits, tmp_path):
    """With one exit that trains there is nothing to balance and nothing to project: every rule is the sum."""

    def config(rule, regime):
        return make_config(
            {
                "name": f"{rule}-{regime}",
                "runs": str(tmp_path),
                "data": {"shards": str(digits), "flip": False, "image_size": 16},
                "model": SMALL_MODEL | {"regime": regime, "first_epochs": 1},
                "optim": {"lr": 0.05, "exit_gradients": rule},
                "train": {"global_batch": 256, "micro_batch": 256, "zero_stage": 0, "precision": "fp32", "epochs": 2},
                "checkpoint": {"every_epochs": 1, "keep": 10},
                "tracking": {"uri": "off"},
            }
        )

    rules = ("sum", "equilibrium", "equilibrium_coarsest", "pcgrad")
    runs = [config(rule, "disjoint") for rule in rules]
    ranks(train_all, 1, runs)
    plain, *others = [state_at(run.folder, 10)[0] for run in runs]
    for state in others:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, plain[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("train", [{"zero_stage": 1}, {"zero_stage": 3}, {"compile": True}])
def test_pcgrad_is_refused_where_one_backward_pass_is_all_there_is(train):
    with pytest.raises(ConfigError, match=r"pcgrad takes a backward pass per exit, which needs train\.zero_stage 0"):
        make_config({"data": {"shards": "-"}, "optim": {"exit_gradients": "pcgrad"}, "train": train})
