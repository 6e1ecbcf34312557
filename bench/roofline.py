"""A model, not a measurement: the least time that the stages of one tracking event can take on a named card.

``python bench/roofline.py --model Qwen2.5-7B --card H100`` adds up, for q, k and v of every layer, the bytes that each
stage must move and the products that it must take, and divides by the data sheet's rates. A stage takes at least the
larger of the two. Launches, waits and small solves on the host come on top; ``gpu_report.py`` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

import click
from harness import table
from shapes import SHAPES, Shape

GUARD = (
    0.25  # of k: the directions kept behind the cut, as rlspec.perturb.reference takes them on flat spectra
)


@dataclass(frozen=True)
class Card:
    """Rates of a data sheet, dense: bytes a second, flops a second of bfloat16, TF32 and float32."""

    bandwidth: float
    bfloat16: float
    tf32: float
    float32: float
    source: str


#: From the vendors' data sheets, without sparsity.
CARDS = {
    "A100": Card(2.04e12, 312e12, 156e12, 19.5e12, "NVIDIA A100 80GB SXM data sheet"),
    "H100": Card(3.35e12, 989e12, 494e12, 67e12, "NVIDIA H100 SXM data sheet"),
    "H200": Card(4.8e12, 989e12, 494e12, 67e12, "NVIDIA H200 SXM data sheet"),
    "B200": Card(8.0e12, 2250e12, 1125e12, 75e12, "NVIDIA HGX B200 data sheet"),
    "MI300X": Card(5.3e12, 1307e12, 653e12, 163e12, "AMD Instinct MI300X data sheet"),
}


@dataclass(frozen=True)
class Stage:
    """``products`` flops counted once; three products of split factors stand for a float32 one on TF32 units."""

    title: str
    bytes: float
    products: float

    def seconds(self, card: Card, precision: str) -> tuple[float, str]:
        rate = {"bf16": card.bfloat16, "tf32x3": card.tf32 / 3, "ieee": card.float32}[precision]
        moving, multiplying = self.bytes / card.bandwidth, self.products / rate
        return max(moving, multiplying), "bytes" if moving > multiplying else "products"


def stages(shape: Shape, share: float, weight_bytes: int) -> list[Stage]:
    """First order of one matrix; the sizes are those that track_bench.py counts."""
    m, n, layers = shape.rows, shape.cols, shape.layers
    r = min(m, n)
    k = max(1, round(share * r))
    w = min(r, round(k * (1 + GUARD)))
    pair = 2.0 * m * n * weight_bytes
    factors = 4.0 * (m + n) * r
    found = [
        Stage("sums of W, W_ref and E", pair, 0.0),
        Stage("E V and Eᵀ U, E formed in registers", 2 * pair + 4.0 * 2 * (m + n) * w, 4.0 * m * n * w),
        Stage("coordinates along the reference's factors", factors + 8.0 * r * w, 2.0 * r * (m + n) * w),
        Stage(
            "rotations and what lies outside",
            factors + 8.0 * r * w,
            8.0 * (r - w) * w * w + 4.0 * (r - k) * k * k,
        ),
    ]
    return [Stage(s.title, s.bytes * layers, s.products * layers) for s in found]


@click.command(help=__doc__)
@click.option("--model", default="Qwen2.5-7B", show_default=True, help="Whose q, k and v; see shapes.py.")
@click.option("--card", default="H100", show_default=True, type=click.Choice(list(CARDS)))
@click.option("--rank", default=0.2, show_default=True, help="Share of the directions.")
@click.option(
    "--precision", default="tf32x3", show_default=True, type=click.Choice(["bf16", "tf32x3", "ieee"])
)
@click.option(
    "--weight-bytes", default=2, show_default=True, help="Of an entry: 2 for bfloat16, 4 for float32."
)
def main(model: str, card: str, rank: float, precision: str, weight_bytes: int) -> None:
    shapes = [shape for shape in SHAPES.values() if shape.model == model]
    if not shapes:
        raise click.ClickException(
            f"unknown model {model}; valid: {', '.join({s.model: 0 for s in SHAPES.values()})}"
        )
    chosen = CARDS[card]
    whole: dict[str, Stage] = {}
    for shape in shapes:
        for stage in stages(shape, rank, weight_bytes):
            old = whole.get(stage.title, Stage(stage.title, 0.0, 0.0))
            whole[stage.title] = Stage(stage.title, old.bytes + stage.bytes, old.products + stage.products)
    click.echo(
        f"A MODEL, NOT A MEASUREMENT: {model}, {', '.join(s.projection for s in shapes)} of all layers, {card}"
    )
    click.echo(f"({chosen.source}; products in {precision}, k = {rank:.0%}, {weight_bytes} bytes an entry)")
    rows = [("stage", "GB", "TFLOP", "at least, ms", "limited by")]
    total = 0.0
    for stage in whole.values():
        seconds, limit = stage.seconds(chosen, precision)
        total += seconds
        rows.append(
            (
                stage.title,
                f"{stage.bytes / 1e9:.2f}",
                f"{stage.products / 1e12:.3f}",
                f"{seconds * 1e3:.2f}",
                limit,
            )
        )
    rows.append(("one event, at least", "", "", f"{total * 1e3:.2f}", ""))
    click.echo(table(rows))


if __name__ == "__main__":
    main()
