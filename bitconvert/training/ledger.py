"""A ledger of what a computation costs: every tensor's storage while it lives, and the work of every operation.

It sees each operation after autograd, so it counts what really happens, whatever made it happen. Under fake tensors
(shapes and types without memory) that takes neither the memory nor the time of the computation. What a kernel allocates
for itself and frees again is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten

ACTIVATIONS = "activations"


@dataclass(eq=False)
class _Storage:
    nbytes: int
    kind: str = ACTIVATIONS


@dataclass(frozen=True)
class Work:
    """What one operation does.

    Attributes:
        flops: floating point (or integer) operations of a matrix product; 0 for all else.
        nbytes: read and written.
        dtype: of its first operand.
    """

    flops: int
    nbytes: int
    dtype: torch.dtype


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Enter it inside a FakeTensorMode; what exists before that is counted once it is named by ``book``.

    Attributes:
        work: how often each kind of work was done since it was last emptied.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: Counter[Work] = Counter()
        self._alive: dict[int, tuple[_Storage, weakref.ref[UntypedStorage]]] = {}
        self._history: list[tuple[_Storage, int]] = []

    def book(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Say what tensors are for. Until then they are activations; the last word counts, for the past too."""
        for tensor in tensors:
            if tensor is not None:
                self._entry(tensor).kind = kind

    def nbytes(self, kind: str) -> int:
        """Bytes of a kind that are alive now."""
        return sum(entry.nbytes for entry, _ in self._alive.values() if entry.kind == kind)

    def rename(self, old: str, new: str) -> None:
        """Turn all of a kind that is alive into another."""
        for entry, _ in self._alive.values():
            if entry.kind == old:
                entry.kind = new

    def peak(self) -> dict[str, int]:
        """Bytes by kind at the moment when there were most of them."""
        total = highest = when = 0
        for index, (entry, sign) in enumerate(self._history):
            total += sign * entry.nbytes
            if total > highest:
                highest, when = total, index
        kinds: Counter[str] = Counter()
        for entry, sign in self._history[: when + 1]:
            kinds[entry.kind] += sign * entry.nbytes
        return {kind: nbytes for kind, nbytes in kinds.items() if nbytes}

    @property
    def entries(self) -> int:
        """How many there are by now."""
        return len(self._history)

    def highest(self, since: int) -> dict[str, int]:
        """Bytes of each kind when there were most of that kind, whenever that was after the first so many entries."""
        now: Counter[str] = Counter()
        for entry, sign in self._history[:since]:
            now[entry.kind] += sign * entry.nbytes
        most = now.copy()
        for entry, sign in self._history[since:]:
            now[entry.kind] += sign * entry.nbytes
            most[entry.kind] = max(most[entry.kind], now[entry.kind])
        return {kind: nbytes for kind, nbytes in most.items() if nbytes}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do the operation, and write it down."""
        if func is _aten._local_scalar_dense.default:
            return _plausible(args[0].dtype)
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._entry(tensor)
        if not func.is_view:
            self._note_work(func, args, kwargs or {}, result, made)
        return result

    def _entry(self, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            entry = _Storage(storage.nbytes())
            self._alive[key] = entry, weakref.ref(storage, partial(self._freed, key))
            self._history.append((entry, 1))
        return self._alive[key][0]

    def _freed(self, key: int, _: object) -> None:
        entry, _ = self._alive.pop(key)
        self._history.append((entry, -1))

    def _note_work(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, made: list[Tensor]
    ) -> None:
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        count = _own_product_flops if func.namespace == "bitconvert" else _FLOPS.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        dtype = (operands or made)[0].dtype if operands or made else torch.float32
        self.work[Work(flops, sum(map(_touched, (*operands, *made))), dtype)] += 1


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor; an expanded one is read from what it was expanded from."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _plausible(dtype: torch.dtype) -> float | int | bool:
    """A value where a fake tensor has none: 1, with which a loss is finite and a step the first."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _own_product_flops(a: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    """Of an operator of ours that makes a matrix (m, n) of a matrix (m, k) and others."""
    if isinstance(out_val, Tensor) and a.ndim == out_val.ndim == 2 and a.shape[0] == out_val.shape[0]:
        return 2 * a.shape[0] * a.shape[1] * out_val.shape[1]
    return 0


def _int_mm_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return flops


def _attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    shapes = gradient.shape, query.shape, key.shape, value.shape
    flops: int = sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
    return flops


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._int_mm: _int_mm_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
