"""Exits on any network: heads at named submodules, and a forward pass that pauses at an exit and continues from there."""

from __future__ import annotations

import copy
import difflib
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dist_train.checks import check_count, check_kind
from dist_train.errors import ConfigError
from dist_train.models.network import MultiExitNetwork, evaluating

HeadMaker = Callable[[torch.Size], nn.Module]
Pooling = Literal["mean", "class_token"]


def attach_exits(
    network: nn.Module,
    at: Sequence[str],
    num_classes: int,
    *,
    head: Pooling | HeadMaker = "mean",
    image_size: int = 224,
) -> AttachedExits:
    """Put an exit after each named submodule; the end of the network is one more, the last.

    The shapes are found by a trial run, in evaluation mode, on two random images. If the network itself gives
    [N, num_classes], that is the last exit's logits; otherwise a head is put on what it gives.

    Args:
        network: maps images [N, 3, S, S] to logits or features; it is changed (hooks), not copied.
        at: names of submodules (as in ``network.named_modules()``) in the order in which they run, each once per pass.
        num_classes: classes K.
        head: for feature maps [N, C, H, W] always the mean and a linear layer; for maps [N, H, W, C] the mean, a layer norm
            and a linear layer; for tokens [N, T, C] a layer norm and a linear layer on their ``mean`` or on the first, the
            ``class_token``. A function gets the shape of a batch of features and gives the module.
        image_size: S of the trial run, in pixels.

    Raises:
        ConfigError: a name does not exist, is repeated or out of order, or its output has nothing to classify.
    """
    check_kind("network", network, nn.Module, "give a torch.nn.Module")
    check_kind("at", at, list | tuple, "give a list of names of submodules")
    check_count("num_classes", num_classes)
    check_count("image_size", image_size)
    if head not in get_args(Pooling) and not callable(head):
        raise ConfigError(f"head is {head!r}; use mean, class_token, or a function of the shape of a batch of features")
    _check_names(network, at)
    with evaluating(network):
        parameter = next(network.parameters(), None)
        if parameter is None:
            raise ConfigError(f"the network {type(network).__name__} has no parameters, so there is nothing to train")
        # Two, so that a first size of 2 in an output means a row per image.
        images = torch.randn(2, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
        features, output = _trial_run(network, at, images)
        with torch.device(parameter.device):
            heads = [_make_head(name, features[name].shape, num_classes, head) for name in at]
            is_logits = output.shape == (2, num_classes)
            heads.append(
                nn.Identity() if is_logits else _make_head("the network's end", output.shape, num_classes, head)
            )
        attached = AttachedExits(network, at, nn.ModuleList(heads), num_classes).eval()
        if not (images.is_meta or isinstance(images, FakeTensor)):  # which have shapes, but no values to compare
            _check_iteration(attached, images)
            attached.count_rows(images)
    # The network's modules have their modes back; the heads are new.
    attached.heads.train(network.training)
    attached.training = network.training
    return attached


class AttachedExits(MultiExitNetwork):
    """A network with exits at some of its submodules and at its end; made by :func:`attach_exits`."""

    def __init__(self, network: nn.Module, at: Sequence[str], heads: nn.ModuleList, num_classes: int) -> None:
        super().__init__()
        self.network = network
        self.heads = heads
        self.num_exits = len(heads)
        self.num_classes = num_classes
        self._at = tuple(at)
        self._rows: dict[_Place, int] = {}
        for number, name in enumerate(at):
            network.get_submodule(name).register_forward_hook(partial(self._at_exit, number))

    def exit_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the exits themselves give, M tensors [N, K], for images [N, 3, H, W]."""
        logits: list[Tensor] = []
        output = self._run(images, logits)
        return (*logits, self._last_exit(output))

    def iter_exit_logits(self, images: Tensor) -> Generator[Tensor, Tensor | None, None]:
        """The same exit after exit; no submodule after an exit runs before the next one is asked for.

        Going on runs the network's own ``forward`` again, with what its submodules gave before: none of them computes
        twice, only operations between them do (an addition, a reshape).  Their ``forward`` is replaced meanwhile, so that no
        other thread may use the network; whole passes may run in several at once.
        """
        memory = _Memory(_outermost(self.network, self._at), self._rows)
        for number in range(self.num_exits):
            logits = self._run_to(number, images, memory)
            rows = yield logits
            if rows is not None:
                memory.keep(rows, len(images))
                images = images[rows]

    @torch.no_grad()
    def count_rows(self, images: Tensor) -> None:
        """Count the rows per image of the tensors between the submodules, in three trial runs of two and three images.

        Most have one; windows of an image have several, and a table of positions, which belongs to no image, has none,
        whatever its length.  Where the rows of an image do not lie together they are not known apart.
        """
        found = []
        for batch in (images, torch.cat([images, images[:1]]), images.flip(0)):
            memory = _Memory(_outermost(self.network, self._at))
            with memory:
                self.network(batch)
            found.append(memory.tensors())
        first, longer, turned = found
        # What one more image adds is what each of them has.
        self._rows = {
            place: len(longer.get(place, value)) - len(value) for place, value in first.items() if value.dim()
        }
        for place, each in self._rows.items():
            if each > 1 and not _together(first[place], turned.get(place), each):
                self._rows[place] = _APART

    def _run_to(self, number: int, images: Tensor, memory: _Memory) -> Tensor:
        try:
            with memory:
                output = self._run(images, number)
        except _Reached as reached:
            return reached.logits
        return self._last_exit(output)

    def _run(self, images: Tensor, wanted: list[Tensor] | int) -> Any:
        _passes.wanted[id(self)] = wanted
        try:
            return self.network(images)
        finally:
            del _passes.wanted[id(self)]

    def _last_exit(self, output: Any) -> Tensor:
        _refuse_several_logits(output, self.num_classes)
        logits: Tensor = self.heads[-1](_first_tensor(output))
        return logits

    def _at_exit(self, number: int, module: nn.Module, inputs: Any, output: Any) -> None:
        # Another pass than a whole one or one to an exit, such as those of count_rows, needs no logits.
        if (wanted := _passes.wanted.get(id(self))) == number:
            raise _Reached(self.heads[number](_first_tensor(output)))
        if isinstance(wanted, list):
            wanted.append(self.heads[number](_first_tensor(output)))


class _Passes(threading.local):
    """What the passes of this thread want, by id of their network: a list for the logits of all exits, or the exit to stop at."""

    def __init__(self) -> None:
        self.wanted: dict[int, list[Tensor] | int] = {}


_passes = _Passes()


class _Reached(BaseException):
    """Ends a forward pass at the requested exit; not an Exception, so that no network catches it."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits


_Place = tuple[int, ...]
"""Of a tensor that a module gave: module, number of its call in the pass, and the indices in what it gave."""


_APART = -1
"""Stands for a number of rows per image that do not lie together."""


class _Memory:
    """Inside of it, calls of the given modules that were made in an earlier pass give what they gave then."""

    def __init__(self, modules: Sequence[nn.Module], rows: Mapping[_Place, int] = MappingProxyType({})) -> None:
        self._modules = modules
        self._rows = rows
        self._outputs: dict[tuple[int, int], Any] = {}  # by module and number of its call in the pass

    def keep(self, rows: Tensor, batch: int) -> None:
        """Drop what belongs to other images of a batch from what is remembered."""

        def select(place: _Place, value: Tensor) -> Tensor:
            each = self._rows.get(place, 1)
            if each == _APART:
                raise ConfigError(
                    f"the {type(self._modules[place[0]]).__name__} beside an exit gives several rows per image, which do not lie together, so "
                    "images cannot leave there; name exits that are not inside of the module around it"
                )
            if not each or not value.dim() or len(value) != each * batch:
                return value
            # The rows of an image lie together, as view(batch, -1) makes them.
            return value[rows] if each == 1 else value.reshape(batch, each, *value.shape[1:])[rows].flatten(0, 1)

        self._outputs = {key: _map(select, key, value) for key, value in self._outputs.items()}

    def tensors(self) -> dict[_Place, Tensor]:
        """Every tensor that is remembered."""
        found: dict[_Place, Tensor] = {}

        def note(place: _Place, value: Tensor) -> Tensor:
            found[place] = value
            return value

        for key, value in self._outputs.items():
            _map(note, key, value)
        return found

    def __enter__(self) -> None:
        calls: Counter[int] = Counter()
        # A forward of the instance itself is put back afterwards; usually it is the class's, and there is none.
        self._replaced = [vars(module).get("forward") for module in self._modules]
        for number, module in enumerate(self._modules):
            # The instance's attribute comes before the class's method; the module's hooks, such as exits, still run.
            vars(module)["forward"] = partial(self._call, number, calls, module.forward)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, replaced in zip(self._modules, self._replaced):
            if replaced is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = replaced

    def _call(self, number: int, calls: Counter[int], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = number, calls[number]
        calls[number] += 1
        if key not in self._outputs:
            self._outputs[key] = forward(*args, **kwargs)
        return self._outputs[key]


def _map(function: Callable[[_Place, Tensor], Tensor], place: _Place, value: Any) -> Any:
    """What a module gave, with the function applied to every tensor in it."""
    if isinstance(value, Tensor):
        return function(place, value)
    if isinstance(value, dict):
        # Into a copy: the outputs of some libraries are dictionaries whose items are attributes as well.
        changed = copy.copy(value)
        for number, (key, one) in enumerate(value.items()):
            changed[key] = _map(function, (*place, number), one)
        return changed
    if isinstance(value, tuple | list):
        values = [_map(function, (*place, number), one) for number, one in enumerate(value)]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    return value


def _outermost(network: nn.Module, at: Sequence[str]) -> list[nn.Module]:
    """The outermost modules that hold no exit inside; all others have to run again to get from one exit to the next."""
    holders = {id(network)}
    for name in at:
        parts = name.split(".")
        holders |= {id(network.get_submodule(".".join(parts[:end]))) for end in range(1, len(parts))}
    found: dict[int, nn.Module] = {}

    def search(module: nn.Module) -> None:
        for child in module.children():
            if id(child) in holders or isinstance(child, nn.ModuleList | nn.ModuleDict):
                search(child)
            else:
                found[id(child)] = child

    search(network)
    return list(found.values())


def _check_names(network: nn.Module, at: Sequence[str]) -> None:
    names = [name for name, _ in network.named_modules() if name]
    if not at:
        raise ConfigError(f"no submodule is named for an exit; name some of them, for instance {', '.join(names[:3])}")
    for position, name in enumerate(at):
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0)
            raise ConfigError(f"there is no submodule {name!r} for an exit; the nearest is {near[0]!r}")
        if name in at[:position]:
            raise ConfigError(f"exit {name!r} is named twice; name each submodule once")


def _trial_run(network: nn.Module, at: Sequence[str], images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The features at every exit by name, and what the network gives."""
    features: dict[str, Tensor] = {}
    calls: list[str] = []

    def notice(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        calls.append(name)
        features[name] = _first_tensor(output, name)

    handles = [network.get_submodule(name).register_forward_hook(partial(notice, name)) for name in at]
    try:
        with torch.no_grad():
            output = _first_tensor(network(images))
    finally:
        for handle in handles:
            handle.remove()
    for name in at:
        if calls.count(name) != 1:
            raise ConfigError(
                f"submodule {name!r} runs {calls.count(name)} times in a pass; an exit needs one that runs once"
            )
    if calls != list(at):
        raise ConfigError(f"exits are given as {', '.join(at)}, but run as {', '.join(calls)}; give them in this order")
    return features, output


def _check_iteration(attached: AttachedExits, images: Tensor) -> None:
    with torch.no_grad():
        for number, (whole, single) in enumerate(zip(attached(images), attached.iter_exits(images)), start=1):
            if not torch.allclose(whole, single, rtol=1e-2, atol=1e-3 * float(whole.abs().max())):
                raise ConfigError(
                    f"exit {number} differs when the network is stopped before it: the network changes tensors in place "
                    "between its submodules (such as x += y); name exits that are not inside of such a module"
                )


def _together(value: Tensor, turned: Tensor | None, each: int) -> bool:
    """Whether the rows of an image lie together: those of two images, given in the other order, change places as a whole."""
    if turned is None or turned.shape != value.shape or len(value) != 2 * each:
        return False
    value, halves = value.float(), torch.cat([turned[each:], turned[:each]]).float()
    return torch.allclose(value, halves, rtol=1e-2, atol=1e-3 * float(value.abs().max()))


def _make_head(name: str, shape: torch.Size, num_classes: int, head: Pooling | HeadMaker) -> nn.Module:
    if not isinstance(head, str):
        return head(shape)
    match tuple(shape):
        case (2, height, width, channels) if height == width != channels:
            # The images are square, so the two equal sides are height and width: channels come last, as in Swin.
            pool = (nn.Flatten(1, 2), _TokenPool("mean"), nn.LayerNorm(channels))
            return nn.Sequential(*pool, nn.Linear(channels, num_classes))
        case (2, channels, _, _):
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        case (2, _, channels):
            return nn.Sequential(_TokenPool(head), nn.LayerNorm(channels), nn.Linear(channels, num_classes))
        case (2, channels):
            return nn.Linear(channels, num_classes)
    raise ConfigError(
        f"the output of {name} has the shape {list(shape)} for 2 images; an exit takes [N, C, H, W], [N, T, C] or [N, C]; "
        "name another submodule, or give head a function"
    )


class _TokenPool(nn.Module):
    """Tokens [N, T, C] to [N, C]."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.pooling == "class_token" else tokens.mean(1)


def _first_tensor(output: Any, name: str = "the network") -> Tensor:
    """The tensor in what a module gives: itself, the first of a tuple, or the logits or hidden state of a named output."""
    # Outputs of transformers are objects with named fields: of a classifier logits, of a bare model its hidden state.
    for key in ("logits", "last_hidden_state"):
        output = getattr(output, key, output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ConfigError(f"the output of {name} is a {type(output).__name__}, not a tensor; name another submodule")
    return output


def _refuse_several_logits(output: Any, num_classes: int) -> None:
    """The first of several would be taken for all, although only the network knows what they are for.

    Some distilled networks give two in training mode, and their mean in evaluation mode.
    """
    if hasattr(output, "logits") or not isinstance(output, tuple | list):
        return
    several = sum(isinstance(one, Tensor) and one.dim() == 2 and one.shape[1] == num_classes for one in output)
    if several > 1:
        raise ConfigError(
            f"the network gives {several} tensors of {num_classes} logits per image, such as those of a classifier and of one "
            "for distillation; let it give one, such as their mean, in training mode as well"
        )
