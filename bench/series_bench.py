"""What measuring a series of checkpoints costs, against loading each with transformers and decomposing it.

``python bench/series_bench.py`` writes a base of the shape of Llama-3.2-1B in bfloat16 and 20 checkpoints of it, whose
q, k and v are off by a Gaussian update that grows to ``--size`` of their norm; what does not change is hard-linked, and
so is read from memory by everybody. Then the true command in a process of its own, ``rlspec measure`` at 20 % of the
directions, twice: cold, with no decomposition of the base at hand, and cached, with all of them. In the same run:

* peer: base and checkpoints loaded with ``transformers.AutoModelForCausalLM``, and ``torch.linalg.svd`` in float32 of
  each q, k and v: what a script does, without the angles. Measured on ``--peer`` checkpoints in a process of its own
  and multiplied by the number of checkpoints and the base. That is an extrapolation, and is called so.

The correctness gate comes before any figure: the rotations that the table has for one q, k and v are held against
float64 decompositions, within the bound that the table reports. Peak memory is VmHWM of the process.
``--model SmolLM2-135M --layers 2 --checkpoints 3`` is quick.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from harness import machine, run_watched, table
from safetensors import safe_open
from safetensors.torch import save_file
from shapes import SHAPES, matrix
from torch import Tensor

from rlspec.io.jsonl import read_rows

#: model -> heads, hidden size of the MLP, vocabulary
REST = {"Llama-3.2-1B": (32, 8192, 128256), "SmolLM2-135M": (9, 1536, 49152)}
SHARE = 0.2
MOVED, UNMOVED = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def name_of(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.self_attn.{projection}_proj.weight"


def write_base(folder: Path, model: str, layers: int) -> tuple[int, str]:
    """A checkpoint in two files, q, k and v in the first one; its bytes, and where their singular values come from."""
    heads, inner, vocabulary = REST[model]
    hidden, narrow = SHAPES[f"{model}:q"].cols, SHAPES[f"{model}:k"].rows
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads * narrow // hidden,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    folder.mkdir()
    config.save_pretrained(folder)
    moved, source = {}, ""
    for layer in range(layers):
        for projection in "qkv":
            weight, *_, source = matrix(SHAPES[f"{model}:{projection}"], seed=layer)
            moved[name_of(layer, projection)] = weight.bfloat16().contiguous()
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in transformers.LlamaForCausalLM(config).named_parameters()
        }
    draw = torch.Generator().manual_seed(0)
    unmoved = {
        name: (torch.randn(shape, generator=draw) * 0.02).bfloat16()
        for name, shape in shapes.items()
        if name not in moved
    }
    weight_map = {}
    for file, tensors in ((MOVED, moved), (UNMOVED, unmoved)):
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    total = sum(2 * tensor.numel() for tensor in (*moved.values(), *unmoved.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total, source


def write_checkpoint(base: Path, folder: Path, share: float) -> None:
    """The base with q, k and v moved by a share of their norm, always in the same direction."""
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.name != MOVED:
            os.link(path, folder / path.name)
    moved = {}
    with safe_open(str(base / MOVED), "pt") as file:
        for number, name in enumerate(sorted(file.keys())):
            weight = file.get_tensor(name).float()
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            moved[name] = (weight + share * weight.norm() / noise.norm() * noise).bfloat16()
    save_file(moved, folder / MOVED, metadata={"format": "pt"})


def angles(base: Tensor, tuned: Tensor, k: int) -> dict[str, Tensor]:
    """Side -> principal angles (k,) of the leading subspaces, in float64, by their sines, or cosines where larger."""
    u, _, vh = torch.linalg.svd(base.double(), full_matrices=False)
    u2, _, vh2 = torch.linalg.svd(tuned.double(), full_matrices=False)
    found = {}
    for side, a, b in (("left", u[:, :k], u2[:, :k]), ("right", vh[:k].T, vh2[:k].T)):
        product = a.T @ b
        sines = torch.linalg.svdvals(b - a @ product).clamp(max=1)
        cosines = torch.linalg.svdvals(product).flip(0).clamp(max=1)
        found[side] = torch.where(sines < 0.5**0.5, sines.asin(), cosines.acos())
    return found


def gate(base: Path, checkpoint: Path, rows: list[dict[str, Any]], layers: int) -> float:
    """The largest error of a mean or largest angle, in rad; stops the bench where the reported bound is exceeded."""
    worst = 0.0
    for layer, projection in ((0, "q"), (layers - 1, "k"), (layers // 2, "v")):
        name = name_of(layer, projection)
        weights = []
        for folder in (base, checkpoint):
            with safe_open(str(folder / MOVED), "pt") as file:
                weights.append(file.get_tensor(name))
        (row,) = (r for r in rows if r["checkpoint"] == checkpoint.name and r["name"].startswith(name))
        for side, truth in angles(*weights, row["rank"]).items():
            for kind, right in (("mean", truth.mean()), ("max", truth.max())):
                error = abs(row[f"angle_{side}_{kind}_rad"] - float(right))
                worst = max(worst, error)
                if not error <= row["angle_error_bound_rad"] + 1e-9:
                    raise click.ClickException(
                        f"correctness gate: {name}: {kind} {side} angle is {error:.1e} rad off, the bound is "
                        f"{row['angle_error_bound_rad']:.1e}"
                    )
    return worst


_PEER = """
import json, sys, time
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
transformers.LlamaForCausalLM  # imported late, and no part of a load
taken = []
for folder in sys.argv[1:]:
    began = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = time.perf_counter()
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            torch.linalg.svd(weight.detach().float(), full_matrices=False)
    taken.append([loaded - began, time.perf_counter() - loaded])
    del model
print(json.dumps(taken))
"""


def run_peer(folders: list[Path]) -> dict[str, float]:
    _, peak, output = run_watched([sys.executable, "-c", _PEER, *folders])
    loading, svds = zip(*json.loads(output.splitlines()[-1]))
    return {"load": statistics.median(loading), "svd": statistics.median(svds), "peak_gib": peak}


def run_command(work: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "rlspec", "measure", work / "run", "--base", work / "base", "--out", out]
    command += ["--rank", str(SHARE)]
    seconds, peak, _ = run_watched(command, {"RLSPEC_CACHE": str(work / "cache")})
    return {"seconds": seconds, "peak_gib": peak}


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(list(REST)), default="Llama-3.2-1B", show_default=True)
@click.option("--layers", type=int, help="Layers.  [default: the model's]")
@click.option("--checkpoints", default=20, show_default=True)
@click.option("--size", default=1e-2, show_default=True, help="‖ΔW‖ / ‖W‖ of the last checkpoint.")
@click.option("--peer", default=2, show_default=True, help="Checkpoints that the peer is measured on.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to work.  [default: a temporary folder]"
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures there too.")
def main(
    model: str,
    layers: int | None,
    checkpoints: int,
    size: float,
    peer: int,
    folder: Path | None,
    json_file: Path | None,
) -> None:
    if not 1 <= peer <= checkpoints:
        raise click.BadParameter(f"1 to {checkpoints}", param_hint="--peer")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        figures = bench(Path(work), model, layers or SHAPES[f"{model}:q"].layers, checkpoints, size, peer)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def bench(work: Path, model: str, layers: int, checkpoints: int, size: float, peer: int) -> dict[str, Any]:
    facts = machine()
    click.echo(f"{facts['cpu']}, {facts['capability']}, {facts['threads']} threads, torch {facts['torch']}")
    base = work / "base"
    total, source = write_base(base, model, layers)
    folders = [work / "run" / f"checkpoint-{100 * (i + 1)}" for i in range(checkpoints)]
    for i, folder in enumerate(folders):
        write_checkpoint(base, folder, size * (i + 1) / checkpoints)
    click.echo(
        f"{model}-shaped, {layers} layers, {total / 1e9:.2f} GB bfloat16 each, {checkpoints} checkpoints; q, k, v at "
        f"{SHARE:.0%}; updates up to {size:g} of the norm; spectra {source}"
    )
    cold = run_command(work, work / "cold")
    rows = read_rows(work / "cold" / "spectra.jsonl")
    worst = gate(base, folders[-1], rows, layers)
    click.echo(f"correctness gate: rotations of a q, k and v against float64: at most {worst:.1e} rad off")
    cached = run_command(work, work / "cached")
    if (work / "cached" / "spectra.jsonl").read_bytes() != (work / "cold" / "spectra.jsonl").read_bytes():
        raise click.ClickException("correctness gate: the cached run has other rows than the cold one")
    theirs = run_peer(folders[:peer])
    scaled = (theirs["load"] + theirs["svd"]) * (checkpoints + 1)
    cells = [("", "seconds", "a checkpoint, s", "of cold", "peak GiB")]
    for name, run in (("rlspec measure, cold", cold), ("rlspec measure, base cached", cached)):
        seconds = run["seconds"]
        cells.append(
            (
                name,
                f"{seconds:.1f}",
                f"{seconds / checkpoints:.2f}",
                f"{seconds / cold['seconds']:.2f}",
                f"{run['peak_gib']:.2f}",
            )
        )
    cells.append(
        (
            f"transformers + torch.linalg.svd, extrapolated from {peer}",
            f"{scaled:.1f}",
            f"{theirs['load'] + theirs['svd']:.2f}",
            f"{scaled / cold['seconds']:.2f}",
            f"{theirs['peak_gib']:.2f}",
        )
    )
    click.echo(table(cells))
    click.echo(
        f"of the last line {theirs['load']:.1f} s a checkpoint are loading; it counts the base as one more, leaves out "
        "the interpreter's start, and computes no angles"
    )
    return {
        "machine": facts,
        "model": model,
        "layers": layers,
        "checkpoints": checkpoints,
        "bytes": total,
        "gate_rad": worst,
        "cold": cold,
        "cached": cached,
        "peer": theirs | {"seconds_extrapolated": scaled, "measured_on": peer},
    }


if __name__ == "__main__":
    main()
