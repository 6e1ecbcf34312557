"""What restoring a Qwen2.5-7B-shaped checkpoint costs, against copying it and against full decompositions.

``python bench/restore_bench.py`` generates a base and a tuned checkpoint in bfloat16, sharded as the original is
(hidden size 3584, 28 query and 4 key-value heads, vocabulary 152064), with ``--layers`` layers, and runs the true
command in a process of its own: ``rlspec restore``, 20 % of the directions of q, k and v. The singular values of q, k
and v are those that ``bench/shapes.py`` names; the tuned weights are off by a Gaussian update of ``--size`` of their
norm. The correctness gate holds one matrix of each shape against the float64 formula, and the two runs against each
other, byte for byte. In the same run:

* cold: no decomposition of the base in the cache;
* cached: all of them;
* copy: reading the tuned folder and writing it elsewhere, to disk;
* paper: ``torch.linalg.svd`` in float32 of base and tuned matrix and the sum put together, measured on one matrix of
  each shape and multiplied by their number. That is an extrapolation, and is called so; reading and writing the
  15 GB, which the procedure of arXiv 2508.16546 does as well, is not in it.

Peak memory is VmHWM of the process. The page cache is asked to drop the inputs before each run. Nothing is scaled to
28 layers: give ``--layers 28`` for that (50 GB of disk).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from harness import machine, run_watched, table
from safetensors import safe_open
from safetensors.torch import save_file
from shapes import spectrum
from torch import Tensor

from rlspec.perturb.matrix import matrix_basis
from rlspec.restore import restore_matrix
from rlspec.spectra import Rank
from rlspec.spectra.cache import cached_factors

HIDDEN, KEY_VALUE, INNER, VOCABULARY = 3584, 512, 18944, 152064
SHARD_BYTES = 2 << 30
SHARE = 0.2


def layout(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, in the order of the files."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        for name, shape in {
            "input_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            "self_attn.q_proj.bias": (HIDDEN,),
            "self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
            "self_attn.k_proj.bias": (KEY_VALUE,),
            "self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
            "self_attn.v_proj.bias": (KEY_VALUE,),
            "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            "post_attention_layernorm.weight": (HIDDEN,),
            "mlp.gate_proj.weight": (INNER, HIDDEN),
            "mlp.up_proj.weight": (INNER, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, INNER),
        }.items():
            shapes[f"model.layers.{i}.{name}"] = shape
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


class Maker:
    """Weights from a seed: attention matrices with a known spectrum, noise for what is only copied."""

    def __init__(self, size: float) -> None:
        self.size = size
        self._spectra: dict[tuple[str, int], Tensor] = {}
        self._noise = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(9)) * 0.02).bfloat16()
        self._factors = [
            torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n))).Q for n in (512, 7)
        ]

    def tensor(self, name: str, shape: tuple[int, ...], number: int, *, tuned: bool) -> Tensor:
        kind = name.split(".")[-2][0]
        if not (name.endswith(".weight") and "self_attn" in name and kind in "qkv"):
            count = 1
            for side in shape:
                count *= side
            repeats = -(-count // len(self._noise))
            return self._noise.repeat(repeats)[:count].view(shape).clone()
        draw = torch.Generator().manual_seed(number)
        if (kind, min(shape)) not in self._spectra:
            self._spectra[kind, min(shape)] = spectrum(kind, min(shape))[0]
        s = self._spectra[kind, min(shape)]
        base = torch.zeros(shape)
        base.diagonal().copy_(s)
        for _ in range(2):
            base = self._turn(self._turn(base, draw).T, draw).T
        base = base.bfloat16().contiguous()
        if not tuned:
            return base
        noise = torch.randn(shape, generator=draw)
        return (base.float() + self.size * base.float().norm() / noise.norm() * noise).bfloat16()

    def _turn(self, a: Tensor, draw: torch.Generator) -> Tensor:
        """Rows mixed by an orthogonal matrix: signs, a permutation, then a Kronecker product."""
        rows = a.shape[0]
        signs = torch.randint(0, 2, (rows, 1), generator=draw) * 2.0 - 1
        a = (a * signs)[torch.randperm(rows, generator=draw)]
        wide, narrow = self._factors
        a = (wide @ a.reshape(512, -1)).view(512, rows // 512, -1)
        if rows > 512:
            a = torch.einsum("ij,bjc->bic", narrow, a)
        return a.reshape(rows, -1).contiguous()


def generate(folder: Path, layers: int, maker: Maker, *, tuned: bool) -> int:
    """Write a checkpoint folder; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    shapes = layout(layers)
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        total += size
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    numbers = {name: i for i, name in enumerate(shapes)}
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        tensors = {name: maker.tensor(name, shapes[name], numbers[name], tuned=tuned) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def read(folder: Path, name: str) -> Tensor:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(str(folder / weight_map[name]), "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def leading(weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,), V (n, k) in float64. sigma_1 / sigma_k is small, so the Gram matrix resolves them fully."""
    a = weight.double()
    turned = a.shape[0] < a.shape[1]
    a = a.T if turned else a
    v = torch.linalg.eigh(a.T @ a).eigenvectors.flip(-1)[:, :k]
    u = a @ v
    s = u.norm(dim=0)
    return (v, s, u / s) if turned else (u / s, s, v)


def gate(base: Path, tuned: Path, out: Path, cache: Path) -> dict[str, float]:
    """Matrix -> error of the change before rounding, as a share of it: at most 1 %, or the bench stops.

    The same engine, run here in float64 output, must be that close to the float64 formula, and its bfloat16 output
    must be what the command wrote, but for one entry in a thousand at a tie.
    """
    errors = {}
    for kind in "qv":
        name = f"model.layers.0.self_attn.{kind}_proj.weight"
        w_b, w_t, found = (read(folder, name) for folder in (base, tuned, out))
        basis = matrix_basis(name, w_b, cached_factors(w_b, cache), Rank.parse(SHARE))
        k = basis.k
        u_b, _, v_b = leading(w_b, k)
        u_t, s_t, v_t = leading(w_t, k)
        change = (u_b * s_t) @ v_b.T - (u_t * s_t) @ v_t.T
        ours = restore_matrix(w_b, w_t, SHARE, basis=basis, dtype=torch.float64).weight
        errors[kind] = float((ours - w_t.double() - change).norm() / change.norm())
        differ = float((ours.bfloat16() != found).float().mean())
        if not errors[kind] <= 0.01 or not differ <= 1e-3:
            raise click.ClickException(
                f"correctness gate: {name}: {errors[kind]:.2%} of the change off, {differ:.2%} of the file's entries"
            )
    return errors


def files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def digest(folder: Path) -> str:
    """Of names and contents of all files."""
    found = hashlib.blake2b()
    for path in files(folder):
        found.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                found.update(block)
    return found.hexdigest()


def evict(*folders: Path) -> None:
    """Ask the page cache to drop what it holds of these files."""
    os.sync()
    for folder in folders:
        for path in files(folder):
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def run_command(base: Path, tuned: Path, out: Path, cache: Path, memory_gib: float) -> dict[str, float]:
    """Seconds, sync included, and peak resident memory of the command."""
    shutil.rmtree(out, ignore_errors=True)
    evict(base, tuned, cache)
    command = [sys.executable, "-m", "rlspec", "restore", "--base", base, "--tuned", tuned, "--out", out]
    command += ["--rank", str(SHARE), "--memory-gib", str(memory_gib)]
    seconds, peak, _ = run_watched(command, {"RLSPEC_CACHE": str(cache)})
    return {"seconds": seconds, "peak_gib": peak}


def run_copy(tuned: Path, out: Path) -> float:
    evict(tuned)
    began = time.perf_counter()
    shutil.copytree(tuned, out)
    for path in files(out):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    taken = time.perf_counter() - began
    shutil.rmtree(out)
    return taken


def run_paper(base: Path, tuned: Path) -> dict[str, float]:
    """Seconds for one matrix of each shape: two float32 decompositions, and the sum put together."""
    taken = {}
    for kind in "qk":
        name = f"model.layers.0.self_attn.{kind}_proj.weight"
        w_b, w_t = read(base, name).float(), read(tuned, name).float()
        k = round(SHARE * min(w_b.shape))
        began = time.perf_counter()
        u_b, _, v_b = torch.linalg.svd(w_b, full_matrices=False)
        u_t, s_t, v_t = torch.linalg.svd(w_t, full_matrices=False)
        u_t[:, :k], v_t[:k] = u_b[:, :k], v_b[:k]
        (u_t * s_t) @ v_t
        taken[kind] = time.perf_counter() - began
    return taken


@click.command(help=__doc__)
@click.option("--layers", default=1, show_default=True, help="Layers of the checkpoint; the original has 28.")
@click.option("--size", default=1e-2, show_default=True, help="‖ΔW‖ / ‖W‖.")
@click.option("--memory-gib", default=2.0, show_default=True, help="Given to the command.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to work.  [default: a temporary folder]"
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures there too.")
def main(layers: int, size: float, memory_gib: float, folder: Path | None, json_file: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        figures = bench(Path(work), layers, size, memory_gib)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def bench(work: Path, layers: int, size: float, memory_gib: float) -> dict[str, Any]:
    facts = machine()
    click.echo(f"{facts['cpu']}, {facts['capability']}, {facts['threads']} threads, torch {facts['torch']}")
    base, tuned, out, cache = (work / name for name in ("base", "tuned", "out", "cache"))
    maker = Maker(size)
    total = generate(base, layers, maker, tuned=False)
    generate(tuned, layers, maker, tuned=True)
    cache.mkdir()
    click.echo(
        f"Qwen2.5-7B-shaped, {layers} of 28 layers, {total / 1e9:.2f} GB bfloat16; q, k, v at {SHARE:.0%}; "
        f"update {size:g} of the norm; spectra {spectrum('q', HIDDEN)[1]}"
    )
    cold = run_command(base, tuned, out, cache, memory_gib)
    errors = gate(base, tuned, out, cache)
    worst = ", ".join(f"{kind} {error:.2%}" for kind, error in errors.items())
    click.echo(f"correctness gate: error before rounding, as a share of the change: {worst}")
    first = digest(out)
    cached = run_command(base, tuned, out, cache, memory_gib)
    if digest(out) != first:
        raise click.ClickException("correctness gate: the cached run wrote other bytes than the cold one")
    copy = run_copy(tuned, work / "copy")
    paper = run_paper(base, tuned)
    estimate = layers * (paper["q"] + 2 * paper["k"])
    rows = [("", "seconds", "of copying", "peak GiB")]
    rows += [
        (name, f"{run['seconds']:.1f}", f"{run['seconds'] / copy:.2f}", f"{run['peak_gib']:.2f}")
        for name, run in (("restore, base cached", cached), ("restore, cold", cold))
    ]
    rows.append(("copying the folder", f"{copy:.1f}", "1.00", ""))
    rows.append(
        (
            f"two full SVDs each, extrapolated from {paper['q']:.1f} s (q), {paper['k']:.1f} s (k, v)",
            f"{estimate:.1f}",
            f"{estimate / copy:.2f}",
            "",
        )
    )
    click.echo(table(rows))
    return {
        "machine": facts,
        "layers": layers,
        "size": size,
        "bytes": total,
        "gate": errors,
        "cold": cold,
        "cached": cached,
        "copy_seconds": copy,
        "paper_seconds_per_matrix": paper,
        "paper_seconds_extrapolated": estimate,
    }


if __name__ == "__main__":
    main()
