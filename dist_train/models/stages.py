"""A multi-exit network cut at its exits: one program per exit, which goes on from the tensors that the one before left."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dist_train.errors import ConfigError
from dist_train.models.network import MultiExitNetwork, evaluating

_ATEN = torch.ops.aten


class StagedNetwork(MultiExitNetwork):
    """A network for inference alone, as a program per exit; made by :meth:`MultiExitNetwork.staged`.

    Attributes:
        stages: M modules. The first takes images [N, 3, S, S], every other one the tensors that the one before gave behind its
            logits; each gives a tuple of its logits [N, K] and what it hands on. All tensors have a row per image, so images
            that have exited are taken out by row number.
    """

    def __init__(self, stages: Sequence[nn.Module], num_classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.num_exits = len(stages)
        self.num_classes = num_classes

    def exit_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of all exits, M tensors [N, K], for images [N, 3, S, S]."""
        return tuple(self.iter_exit_logits(images))

    def iter_exit_logits(self, images: Tensor) -> Generator[Tensor, Tensor | None, None]:
        """The same exit after exit."""
        handed_on: Sequence[Tensor] = (images,)
        for stage in self.stages:
            logits, *handed_on = stage(*handed_on)
            rows = yield logits
            if rows is not None:
                handed_on = [tensor[rows] for tensor in handed_on]


def cut_into_stages(network: MultiExitNetwork, image_size: int) -> StagedNetwork:
    """See :meth:`MultiExitNetwork.staged`.

    The whole network is traced once (torch.export); a stage is what its exit depends on and no exit before it did, so nothing
    is computed early and nothing twice.
    """
    images = _random_images(network, image_size)
    with evaluating(network):
        staged = StagedNetwork(_cut(network, images).stages(), network.num_classes).eval()
        _check(network, staged, images)
    return staged


def static_networks(network: MultiExitNetwork, image_size: int) -> list[nn.Module]:
    """The network cut off behind each exit, without the other exits: M modules, images [N, 3, S, S] to (logits [N, K],).

    What an early-exit network competes with, in the form of :meth:`MultiExitNetwork.staged`.

    Raises:
        ConfigError: as there.
    """
    with evaluating(network):
        cut = _cut(network, _random_images(network, image_size))
    return [cut.static(number) for number in range(network.num_exits)]


def _random_images(network: nn.Module, image_size: int) -> Tensor:
    parameter = next(network.parameters())
    # Neither 0 nor 1 images: torch.export would take their number for a constant.
    return torch.randn(3, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)


def _cut(network: MultiExitNetwork, images: Tensor) -> _Cut:
    whole = _trace(network, images)
    _fold_batch_norms(whole)
    return _Cut(whole, type(network).__name__)


def _trace(network: nn.Module, images: Tensor) -> fx.GraphModule:
    """The network as a graph that gives the logits of all exits, for any number of images."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer, which no other runtime knows
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes = ({0: torch.export.Dim("batch", min=1)},)
            program = torch.export.export(network, (images,), dynamic_shapes=shapes, strict=False)
            graph: fx.GraphModule = program.module(check_guards=False)
        _allow_any_layout(graph)
    except Exception as error:  # tracing runs the network's own code on tensors without values
        raise _uncut(type(network).__name__, _reason(error)) from None
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return graph


def _allow_any_layout(whole: fx.GraphModule) -> None:
    """Views become reshapes: a view of a tensor with the channels last, as :meth:`_Cut._weight` makes them, can be impossible."""
    for node in whole.graph.nodes:
        if node.target is _ATEN.view.default:
            node.target = _ATEN.reshape.default


def _fold_batch_norms(whole: fx.GraphModule) -> None:
    """Put batch norms that follow a convolution into its weights."""
    graph = whole.graph
    for node in list(graph.nodes):
        if node.target is not _ATEN.batch_norm.default:
            continue
        # aten::batch_norm(input, weight, bias, mean, variance, training, momentum, eps, ...)
        conv, *statistics = node.args[:5]
        # Another reader of the convolution wants it as it is.
        if conv.target is not _ATEN.conv2d.default or len(conv.users) > 1 or None in statistics[2:]:
            continue
        # The arguments of a convolution without a bias end before it.
        weight, bias, scale, shift = (
            None if one is None else _value(whole, one) for one in (*(*conv.args[1:3], None)[:2], *statistics[:2])
        )
        mean, variance = (_value(whole, one) for one in statistics[2:])
        assert weight is not None
        fused = fuse_conv_bn_weights(weight, bias, mean, variance, node.args[7], scale, shift)
        names = [f"{conv.name}_folded_{kind}" for kind in ("weight", "bias")]
        with graph.inserting_before(conv):
            for name, tensor in zip(names, fused):
                whole.register_buffer(name, tensor.detach())
            conv.args = (conv.args[0], *map(graph.get_attr, names), *conv.args[3:])
        node.replace_all_uses_with(conv)
        graph.erase_node(node)


class _Cut:
    """A traced network, and which of its nodes each exit needs."""

    def __init__(self, whole: fx.GraphModule, name: str) -> None:
        self._whole = whole
        self._name = name
        self._nodes = list(whole.graph.nodes)
        (self._images,) = (node for node in self._nodes if node.op == "placeholder")
        self._batch = self._images.meta["val"].shape[0]
        self._logits: list[fx.Node] = list(self._nodes[-1].args[0])
        # What follows from weights and the number of images alone is not handed on, but computed wherever it is needed.
        self._free: set[fx.Node] = set()
        for node in self._nodes:
            inputs = node.all_input_nodes
            # Without inputs, as weights are, or with none but such.
            if node is not self._images and (node.target is _ATEN.sym_size.int or self._free.issuperset(inputs)):
                self._free.add(node)

    def stages(self) -> list[fx.GraphModule]:
        """A program per exit."""
        done = {self._images}
        parts: list[list[fx.Node]] = []
        for logits in self._logits:
            needed = self._ancestors(logits, done)
            done |= needed
            parts.append([node for node in self._nodes if node in needed])
        stages = []
        takes: Sequence[fx.Node] = [self._images]
        for number, (part, logits) in enumerate(zip(parts, self._logits), start=1):
            # Handed on is what later exits read, also past a stage that does not touch it itself.
            later = {one for after in parts[number:] for node in after for one in node.all_input_nodes}
            later |= set(self._logits[number:])
            known = {*takes, *part}
            gives = [node for node in self._nodes if node in known and node in later]
            self._check_rows(gives, number)
            stages.append(self._stage(part, takes, [logits, *gives]))
            takes = gives
        return stages

    def static(self, number: int) -> fx.GraphModule:
        """What exit ``number``, from 0, depends on, as one program that gives a tuple of its logits."""
        needed = self._ancestors(self._logits[number], {self._images})
        part = [node for node in self._nodes if node in needed]
        return self._stage(part, [self._images], [self._logits[number]])

    def _ancestors(self, node: fx.Node, done: set[fx.Node]) -> set[fx.Node]:
        """What has to be computed of the images for this node, besides what is done."""
        found: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if not (one in done or one in found or one in self._free):
                found.add(one)
                waiting += one.all_input_nodes
        return found

    def _check_rows(self, gives: Sequence[fx.Node], number: int) -> None:
        for node in gives:
            value = node.meta["val"]
            if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != self._batch:
                raise _uncut(self._name, f"what exit {number} leaves to the next ({node.name}) has no row per image")

    def _stage(self, part: Sequence[fx.Node], takes: Sequence[fx.Node], gives: Sequence[fx.Node]) -> fx.GraphModule:
        graph, root = fx.Graph(), nn.Module()
        copies = {node: graph.placeholder(node.name) for node in takes}
        first = copies[takes[0]]

        def copy(node: fx.Node) -> fx.Node:
            if node in copies:
                return copies[node]
            if node.op == "get_attr":
                name = str(node.target).replace(".", "_")
                root.register_buffer(name, self._weight(node))
                copies[node] = graph.get_attr(name)
            elif node.target is _ATEN.sym_size.int:
                if node.meta["val"] != self._batch:
                    raise _uncut(self._name, f"{node.name} is a size that is not the number of images")
                # Of the stage's own input: when images have left, it has fewer rows than the first stage was given.
                copies[node] = graph.call_function(_ATEN.sym_size.int, (first, 0))
            else:
                copies[node] = graph.node_copy(node, copy)
            return copies[node]

        for node in part:
            copy(node)
        graph.output(tuple(copy(node) for node in gives))
        return fx.GraphModule(root, graph, "Stage").eval()

    def _weight(self, node: fx.Node) -> Tensor:
        """A copy of a weight or constant; kernels have their channels last, the layout that convolutions are fastest in."""
        value = _value(self._whole, node).clone()
        is_kernel = all(user.target is _ATEN.conv2d.default and user.args[1] is node for user in node.users)
        return value.contiguous(memory_format=torch.channels_last) if is_kernel else value


def _value(whole: fx.GraphModule, node: fx.Node) -> Tensor:
    """The weight or constant that a node stands for."""
    owner, _, name = str(node.target).rpartition(".")
    value: Tensor = getattr(whole.get_submodule(owner), name)
    return value.detach()


@torch.no_grad()
def _check(network: nn.Module, staged: StagedNetwork, images: Tensor) -> None:
    """Compare with the network itself, for another number of images than it was traced with."""
    for number, (logits, whole) in enumerate(zip(staged(images[:2]), network(images[:2])), start=1):
        if not torch.allclose(logits, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max())):
            raise _uncut(type(network).__name__, f"exit {number} gives other logits, as where tensors change in place")


def _uncut(name: str, reason: str) -> ConfigError:
    return ConfigError(f"{name} cannot be cut into stages at its exits: {reason}")


def _reason(error: Exception) -> str:
    """What torch.export says, in a line."""
    text = " ".join(str(error).split())
    if "specialized" in text:
        return "its code takes the number of images for a fixed one; use images.shape[0] there instead of len(images) or int()"
    return f"torch.export cannot trace it ({text[:200] or type(error).__name__})"
