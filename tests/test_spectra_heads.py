"""Attention heads as matrices of their own: the rows that the model's own code splits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from restore_toys import pair, parts, save_model, tensors_of
from test_series import loaded, rows_in

import rlspec
from rlspec.cli.main import main
from rlspec.errors import ProjectionError, RunFolderError
from rlspec.io.heads import split_heads
from rlspec.io.projections import find_projections
from rlspec.io.weights import open_weights
from rlspec.spectra import SpectralBasis, SpectralTracker

pytestmark = pytest.mark.usefixtures("own_cache")
KINDS = ["llama", "gemma2", "phi3", "gpt2", "gpt_neox", "bloom", "falcon", "falcon-7b"]


def true_heads(kind: str, name: str, tensor: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """q, k and v of a tensor by head, 16 rows each, as the model's code views them."""
    found = {}
    for label, view in parts(kind, name, tensor).items():
        rows = view.reshape(-1, 64)
        found[label] = list(rows.reshape(-1, 16, 64))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_those_that_the_model_computes_with(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    weights = open_weights(tmp_path)
    shapes, config = weights.shapes(), weights.config()
    heads = split_heads(
        find_projections(shapes, "attn" if kind == "phi3" else "q,k,v", config), shapes, config
    )
    found: dict[str, dict[int, torch.Tensor]] = {}
    for projection, matrix in weights.stream(heads):
        if projection.module != "o":
            assert projection.head is not None and f"head {projection.head}]" in projection.name
            found.setdefault(f"{projection.tensor} {projection.module}", {})[projection.head] = matrix
            assert projection.shape(shapes[projection.tensor]) == (16, 64)
        else:
            assert projection.head is None
    wanted = {
        f"{name} {label}": rows
        for name, tensor in tensors_of(tmp_path).items()
        for label, rows in true_heads(kind, name, tensor).items()
    }
    assert found.keys() == wanted.keys() and len({p.name for p in heads}) == len(heads)
    for place, rows in wanted.items():
        assert list(found[place]) == list(range(len(rows)))
        for i, right in enumerate(rows):
            assert torch.equal(found[place][i], right)


def test_rows_of_a_head_are_those_of_its_block_alone(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    series = rlspec.measure(base, tuned, modules="q,k,o", rank=0.5, per_head=True, out=tmp_path / "out")
    rows = {row["name"]: row for row in series.rows}
    assert len(rows) == 2 * (4 + 2 + 1)
    before, after = tensors_of(base), tensors_of(tuned)
    for name, row in rows.items():
        tensor = name.partition("[")[0]
        if row["module"] == "o":
            assert row["head"] is None and name == tensor
            continue
        block = slice(16 * row["head"], 16 * row["head"] + 16)
        _, s, vh = torch.linalg.svd(after[tensor][block].double(), full_matrices=False)
        _, _, vh_ref = torch.linalg.svd(before[tensor][block].double(), full_matrices=False)
        k = row["rank"]
        assert k == 8 and name == f"{tensor}[head {row['head']}]"
        assert abs(row["sigma_max"] - float(s[0])) <= row["sigma_error_bound"]
        sines = torch.linalg.svdvals(vh[:k].T - vh_ref[:k].T @ (vh_ref[:k] @ vh[:k].T))
        error = abs(row["angle_right_max_rad"] - float(sines[0].asin()))
        assert error <= row["angle_error_bound_rad"]
    with pytest.raises(RunFolderError, match="measured with per_head=True, now per_head=False"):
        rlspec.measure(base, tuned, modules="q,k,o", rank=0.5, out=tmp_path / "out")


def test_the_command_and_a_model_in_memory_give_the_same_rows(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    options = ["--modules", "q", "--per-head", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, ["measure", str(tuned), "--base", str(base), *options])
    assert done.exit_code == 0, done.output
    basis = SpectralBasis.from_model(loaded(base), modules="q", per_head=True)
    record = SpectralTracker(basis).measure(loaded(tuned), step=0)
    assert [row["head"] for row in record.rows] == 2 * [0, 1, 2, 3]
    assert [{**row, "step": None} for row in record.rows] == [
        {name: value for name, value in row.items() if name != "checkpoint"}
        for row in rows_in(tmp_path / "out")
    ]


def test_a_table_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    rlspec.measure(base, tuned, modules="q", out=tmp_path / "out")
    about = json.loads((tmp_path / "out" / "measure.json").read_text())
    del about["settings"]["per_head"]
    (tmp_path / "out" / "measure.json").write_text(json.dumps(about))
    assert len(rlspec.measure(base, tuned, modules="q", out=tmp_path / "out").rows) == 2


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_attention_heads": None}, r"q_proj\.weight: config\.json gives no num_attention_heads"),
        ({"num_attention_heads": 3, "head_dim": None}, r"q_proj\.weight: 64 rows are not 3 heads, as config"),
        ({"head_dim": 32}, r"q_proj\.weight: 64 rows are not 4 heads of 32 rows, as config"),
        (
            {"num_key_value_heads": 1, "head_dim": None},
            r"k_proj\.weight: by config\.json its heads have 32 rows each, those of .*q_proj\.weight 16",
        ),
    ],
)
def test_heads_that_the_configuration_does_not_tell_are_refused(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    base, tuned = pair(tmp_path)
    changed(base, **settings)
    with pytest.raises(ProjectionError, match=told) as caught:
        rlspec.measure(base, tuned, out=tmp_path / "out", per_head=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_without_a_configuration_heads_are_refused(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    (base / "config.json").unlink()
    with pytest.raises(
        ProjectionError, match=r"q_proj\.weight: how many heads .* there is none; .*per_head=False"
    ):
        rlspec.measure(base, tuned, per_head=True)
