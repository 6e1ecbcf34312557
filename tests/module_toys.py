"""A module with parameters of given names, as of a decoder's layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def named_module(parameters: Mapping[str, Tensor]) -> nn.Module:
    """Modules within modules, as the dots in the names say; the tensors are put as they are, on whatever device."""
    whole = nn.Module()
    for name, tensor in parameters.items():
        owner = whole
        *path, last = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner._parameters[last] = tensor  # type: ignore[assignment]
    return whole
