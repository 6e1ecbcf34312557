"""Forward passes between two steps of a training, through a model that several processes may hold in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rlspec.spectra.spread import in_pieces, sharded_modules


@contextmanager
def in_pieces_again(model: nn.Module) -> Iterator[None]:
    """Context after which FSDP2 has the parameters in the pieces that optimizers know.

    After a forward pass its root keeps them whole for the backward pass, which never comes here; zero_grad of the model
    would then miss the gradients of the pieces. A pass that fails leaves all of them in the middle of it.
    """
    sharded = sharded_modules(model)
    try:
        yield
    except BaseException:
        for name, module in sharded.items():
            outermost = not any(
                other == "" or name.startswith(f"{other}.") for other in sharded if other != name
            )
            if outermost and hasattr(module, "reset_iter_state"):  # as of torch 2.13
                module.reset_iter_state()
        raise
    finally:
        in_pieces(model)
