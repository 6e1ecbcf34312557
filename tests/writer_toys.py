"""A small sharded checkpoint in bfloat16, and writing one like it; shared by the tests of the writer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rlspec.io.index import CheckpointIndex
from rlspec.io.writer import CheckpointWriter

INDEX = "model.safetensors.index.json"
TENSORS = {
    **{f"layers.{i}.{part}": (30 + i, 17) for i in range(6) for part in ("q", "mlp")},
    "scalar": (),
    "empty": (0, 4),
}


def make(folder: Path, *, shards: int = 3, seed: int = 0) -> CheckpointIndex:
    """A checkpoint in bfloat16 with what else lies in such folders."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(s, generator=generator).to(torch.bfloat16) for n, s in TENSORS.items()}
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        group = names[number::shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in group}, folder / file, metadata={"format": "pt", "é": "ü"})
        weight_map |= dict.fromkeys(group, file)
    size = sum(2 * t.numel() for t in tensors.values())
    content = {"metadata": {"total_size": size, "total_parameters": size // 2}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"):
        (folder / name).write_text(f'{{"file": "{name}"}}')
    return CheckpointIndex.open(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def new(name: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(TENSORS[name], generator=generator).to(dtype)


def write(out: Path, like: CheckpointIndex, changed: dict[str, torch.dtype], **options: bool) -> Path:
    with CheckpointWriter(out, like, changed=changed, fingerprint="f", **options) as writer:
        for name in writer.pending:
            writer.put(name, new(name, changed[name]))
        return writer.commit()


def partial(out: Path) -> Path:
    return out.parent / f".{out.name}.rlspec-partial"


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


QUERIES = dict.fromkeys((n for n in TENSORS if n.endswith("q")), torch.bfloat16)
