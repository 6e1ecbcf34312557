"""A pretend GPU for machines that have none: tensors that say they are on ``cuda:0`` and compute on the CPU.

Results are real, so they can be compared with the CPU path. Within :func:`pretend_device` pretend tensors refuse to mix
with CPU tensors, as CUDA's do (zero-dimensional ones may), and a :class:`Report` counts what makes the host wait, with
the line that asked, and every call that would be a launch, by operation and dtype.

It cannot show speed, races, kernels, streams or memory.
"""

from __future__ import annotations

import collections
import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
_SYNCS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
}
_MAY_MIX = {
    "aten::copy_",
    "aten::_to_copy",
    "aten::index",
}  # indices on the host are carried over, as CUDA does
# What launches nothing: views, and memory without values.
_FREE = {
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "lift_fresh",
    "new_empty",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
    "_reshape_alias",
    "_unsafe_view",
}


@dataclass
class Report:
    """What happened on the pretend device: ``syncs`` as "what at file:line", ``calls`` by "operation dtype"."""

    syncs: list[str] = field(default_factory=list)
    calls: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def launches(self) -> int:
        return sum(n for call, n in self.calls.items() if call.split()[0] not in _FREE)

    def of(self, operation: str) -> int:
        """Calls of one operation, whatever the dtype."""
        return sum(n for call, n in self.calls.items() if call.split()[0] == operation)

    def sync(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/rlspec/" in f.filename]
        where = f"{frames[-1].filename.split('/rlspec/')[-1]}:{frames[-1].lineno}" if frames else "the test"
        self.syncs.append(f"{what} at {where}")


_report = Report()


class Pretend(torch.Tensor):
    """A tensor of the pretend device; ``inner`` holds its values on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretend:
        # To torch's own C++ it is a CPU tensor: a build without CUDA has no guards for another device.
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
        )
        made.inner = inner
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretend({self.inner!r})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()  # tied tensors are told by their address

    def tolist(self) -> Any:
        _report.sync("tolist")
        return self.inner.tolist()

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        _report.sync("to the host")
        return self.inner.clone()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a cuda:0 tensor to numpy; use .cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        ours = [t for t in tensors if isinstance(t, Pretend)]
        strangers = [t for t in tensors if not isinstance(t, Pretend) and t.ndim > 0]
        if name in _SYNCS or (name in ("aten::index", "aten::index_put_") and _boolean_index(args)):
            _report.sync(name)
        if name == "aten::copy_" and not isinstance(args[0], Pretend):
            _report.sync("to the host")
        if strangers and name == "aten::index":
            _report.sync("indices from the host")
        if strangers and ours and name not in _MAY_MIX:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
        dtype = str(ours[0].dtype).removeprefix("torch.") if ours else ""
        _report.calls[f"{name.removeprefix('aten::')} {dtype}"] += 1
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if func._schema.is_mutable and tensors:  # in place, or out=: what was given is what comes back
            given = {id(_plain(t)): t for t in tensors}
            return tree_map(lambda t: given.get(id(t), _wrap(t)) if isinstance(t, torch.Tensor) else t, out)
        return tree_map(_wrap, out)


def _boolean_index(args: Any) -> bool:
    return any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1]))


def _plain(value: Any) -> Any:
    return value.inner if isinstance(value, Pretend) else value


def _wrap(value: Any) -> Any:
    return Pretend(value) if isinstance(value, torch.Tensor) and not isinstance(value, Pretend) else value


def to_pretend(tensor: torch.Tensor) -> Pretend:
    """A copy on the pretend device; what is there already as it is."""
    return tensor if isinstance(tensor, Pretend) else Pretend(tensor.detach().clone())


class _Factories(TorchFunctionMode):
    """Factory calls and ``.to`` with a CUDA device make pretend tensors; CPU generators there are refused, as there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        name = getattr(func, "__name__", "")
        if name in ("to", "cuda", "type_as") and args and isinstance(args[0], torch.Tensor):
            places = (a for a in args[1:] if isinstance(a, (str, torch.device, Pretend)))
            wanted = device if device is not None else next(places, None)
            if isinstance(wanted, Pretend):  # .to(other) takes over both
                kwargs.setdefault("dtype", wanted.dtype)
                wanted = DEVICE
            if wanted is None and isinstance(args[0], Pretend) and _other_cpu(args):
                wanted = "cpu"
            if wanted is not None and torch.device(wanted).type == "cpu" and isinstance(args[0], Pretend):
                _report.sync("to the host")
                return func(args[0].inner, *args[1:], **kwargs)
            if name == "cuda" or (wanted is not None and torch.device(wanted).type == "cuda"):
                kwargs.pop("device", None)
                rest = [a for a in args[1:] if not isinstance(a, (str, torch.device, Pretend))]
                dtypes = [a for a in rest if isinstance(a, torch.dtype)]
                dtype = kwargs.get("dtype") or (dtypes[0] if dtypes else None)
                if isinstance(args[0], Pretend):
                    return args[0] if dtype in (None, args[0].dtype) else args[0].to(dtype)
                return Pretend(args[0].to(dtype) if dtype not in (None, args[0].dtype) else args[0].clone())
        elif device is not None and torch.device(device).type == "cuda":
            if kwargs.get("generator") is not None:
                raise RuntimeError("expected a 'cuda' generator, found a 'cpu' one")
            kwargs["device"] = "cpu"
            return tree_map(_wrap, func(*args, **kwargs))
        return func(*args, **kwargs)


def _other_cpu(args: Any) -> bool:
    return any(isinstance(a, torch.Tensor) and not isinstance(a, Pretend) for a in args[1:])


@contextlib.contextmanager
def pretend_device() -> Iterator[Report]:
    """Within: CUDA factory calls make pretend tensors, and the report counts."""
    global _report
    before, _report = _report, Report()
    try:
        with _Factories():
            yield _report
    finally:
        _report = before
