"""The process-wide flags of torch that choose how float32 matrix products are computed, and how each is put back.

From 2.9 on each backend has a flag of its own. Before, one setting rules them all: torch.set_float32_matmul_precision,
of which torch.backends.cuda.matmul.allow_tf32 is another view.

oneDNN's products are asked for in its bfloat16 mode where a probe finds them as accurate as float32's. Without AMX it
has no bfloat16 kernels for float32 factors, and answers with float32 ones of its own, which on AVX-512 take as little
as half the time of the default's; with AMX it truly computes in bfloat16, and the probe turns it down. Nothing is
timed: the choice is the same in every process on a machine, and a resumed run computes as the interrupted one did.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# float32 products of 512 terms are off by about 2.5e-7; bfloat16 ones by 2e-3.
_FLOAT32_ERROR = 2e-6


@dataclass(frozen=True)
class Flag:
    """One process-wide setting: how to read and set it, and ``wanted()``, the value to compute under."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    wanted: Callable[[], Any]
    inherited: Callable[[], Any] | None = None  # what it reads as, where it is left to a wider flag

    def original(self) -> Any:
        """What to write so that the flag is again as it is now."""
        value = self.read()
        # One that follows a wider flag reads as that does, and must go on following it. One that was set to the same
        # value by itself cannot be told from it, and follows from now on.
        return "none" if self.inherited is not None and value == self.inherited() else value


def flags() -> list[Flag]:
    """All flags of this torch. Each may be set once those before it are."""
    found = []
    mkldnn, cuda = torch.backends.mkldnn, torch.backends.cuda.matmul
    if mkldnn.is_available() and hasattr(mkldnn, "enabled"):
        found.append(_attribute(mkldnn, "enabled", lambda: True))
    if not has_backend_flags():
        legacy = Flag(
            torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, lambda: "highest"
        )
        return [*found, legacy]
    # cuDNN's holder is that of all of CUDA.
    found.append(_attribute(cuda, "fp32_precision", lambda: "ieee", torch.backends.cudnn))
    return [*found, _mkldnn_products()]


def has_backend_flags() -> bool:
    """Whether this torch has a flag for the products of each backend (2.9 on)."""
    holders = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return all(hasattr(holder, "fp32_precision") for holder in holders)


def own_kernels_pay() -> bool:
    """Whether oneDNN's bfloat16 mode is accurate here, on a CPU where it is also faster."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and own_kernels_are_accurate()


@functools.cache
def own_kernels_are_accurate() -> bool:
    """Whether float32 products in oneDNN's bfloat16 mode are as accurate as float32's on this CPU.

    Call it with the thread's modes pinned: under autocast every product is inaccurate.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    # Every form in use: plain, transposed left factor, batched. Each may take a route of its own.
    a = torch.randn(2, 256, 512, generator=generator, dtype=torch.float32)
    b = torch.randn(2, 512, 256, generator=generator, dtype=torch.float32)
    truth = a.double() @ b.double()
    flag = _mkldnn_products()
    before = flag.original()
    try:
        flag.write("bf16")
        forms = [torch.stack([a[0] @ b[0], a[1] @ b[1]]), a.mT.contiguous().mT @ b, torch.bmm(a, b)]
    except RuntimeError:  # a build of torch that refuses the setting
        return False
    finally:
        flag.write(before)
    worst = max(float((form - truth).norm() / truth.norm()) for form in forms)
    return worst < _FLOAT32_ERROR


def _mkldnn_products() -> Flag:
    mkldnn: Any = torch.backends.mkldnn
    return _attribute(
        mkldnn.matmul, "fp32_precision", lambda: "bf16" if own_kernels_pay() else "ieee", mkldnn
    )


def _attribute(holder: Any, name: str, wanted: Callable[[], Any], wider: Any = None) -> Flag:
    """A flag that is an attribute, and of the same name in the ``wider`` holder that it may follow."""
    read, write = functools.partial(getattr, holder, name), functools.partial(setattr, holder, name)
    inherited = functools.partial(getattr, wider, name, None) if wider is not None else None
    return Flag(read, write, wanted, inherited)
