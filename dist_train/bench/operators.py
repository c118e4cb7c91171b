"""How many operators a piece of code calls: a number that is the same on every machine. On a GPU they are kernel launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# They compute nothing; neither do views and the profiler's marks.
_FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_reshape_alias"}


def count_operators(run: Callable[[], object]) -> int:
    """Operators that compute something in a run of ``run``, its backward passes included.

    An operator over a list of tensors counts once, and so does one that a library runs in several kernels.
    """
    with _OperatorCounter() as counter:
        run()
    return int(counter.calls)


class _OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        free = func.is_view or func.namespace == "profiler" or func.overloadpacket.__name__ in _FREE
        self.calls += 0 if free else 1
        return func(*args, **(kwargs or {}))
