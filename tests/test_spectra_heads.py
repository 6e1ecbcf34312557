"""Attention heads as matrices of their own: the rows and columns that the model's code splits, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from restore_toys import pair, parts, save_model, tensors_of
from series_toys import loaded, rows_in

import rlspec
from rlspec.cli.main import main
from rlspec.errors import ProjectionError, RunFolderError
from rlspec.io import heads as heads_of
from rlspec.io.heads import split_heads
from rlspec.io.projections import Projection, find_projections
from rlspec.io.weights import find_tensor, open_weights
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
    heads = split_heads(find_projections(shapes, "attn", config), shapes, config)
    found: dict[str, dict[int, torch.Tensor]] = {}
    for projection, matrix in weights.stream(heads):
        if projection.module != "o":
            assert projection.head is not None and f"head {projection.head}]" in projection.name
            found.setdefault(f"{projection.tensor} {projection.module}", {})[projection.head] = matrix
            assert projection.shape(shapes[projection.tensor]) == (16, 64)
        else:
            assert projection.head in range(4) and matrix.shape == (64, 16)
            assert projection.shape(shapes[projection.tensor]) == (64, 16)
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_o_is_what_the_head_of_q_ends_in(kind: str, tmp_path: Path) -> None:
    """Where a head's queries are others, the input of o changes at that head's columns, and nowhere else."""
    save_model(tmp_path, kind)
    weights = open_weights(tmp_path)
    shapes, config = weights.shapes(), weights.config()
    heads = split_heads(find_projections(shapes, "q,o", config), shapes, config)
    model = loaded(tmp_path).eval()
    tensors, layer = model.state_dict(), {p.head: p for p in heads if p.module == "o" and p.layer == 0}
    inputs: list[torch.Tensor] = []
    place = find_tensor(layer[0].tensor, tensors, "the model").removesuffix(".weight")
    model.get_submodule(place).register_forward_pre_hook(lambda module, given: inputs.append(given[0][0]))

    def entering() -> torch.Tensor:
        model(torch.tensor([[3, 7, 11, 5]]))
        return inputs[-1].detach()

    before = entering()
    for query in (p for p in heads if p.module == "q" and p.layer == 0):
        stored = tensors[find_tensor(query.tensor, tensors, "the model")]
        kept = stored.clone()
        query.put(stored, 1.5 * query.take(stored).clone())
        changed = (entering() != before).any(0)
        stored.copy_(kept)
        mine = torch.zeros_like(changed)
        mine[layer[query.head].columns] = True
        assert changed.any() and not (changed & ~mine).any()
        # What Projection.take gives of o meets these entries of its input, whatever way the tensor is stored.
        whole = tensors[f"{place}.weight"]
        part = layer[query.head].take(whole) @ before[:, mine].T
        others = before.masked_fill(mine, 0.0) @ (whole if kind == "gpt2" else whole.T)
        both = before @ (whole if kind == "gpt2" else whole.T)
        torch.testing.assert_close(part.T + others, both, rtol=1e-4, atol=1e-5)


def test_another_head_of_o_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = heads_of._columns

    def next_one(whole: Projection, total: int, head: int, size: int) -> Projection:
        return replace(right(whole, total, (head + 1) % (total // size), size), head=head)

    monkeypatch.setattr(heads_of, "_columns", next_one)
    with pytest.raises(AssertionError):
        test_a_head_of_o_is_what_the_head_of_q_ends_in("llama", tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_heads_of_o_take_their_part_of_an_adapter(kind: str, tmp_path: Path) -> None:
    """As the heads of the merged weights, also where o is stored the other way round."""
    peft = pytest.importorskip("peft")
    save_model(tmp_path / "base", kind)
    torch.manual_seed(1)
    target = {"llama": "o_proj", "gpt2": "attn.c_proj"}[kind]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[target], fan_in_fan_out=kind == "gpt2")
    model = peft.get_peft_model(loaded(tmp_path / "base"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    rows = rlspec.measure(tmp_path / "base", tmp_path / "adapter", modules="o", rank=0.5, per_head=True).rows
    basis = SpectralBasis.from_model(loaded(tmp_path / "base"), modules="o", rank=0.5, per_head=True)
    merged = SpectralTracker(basis).measure(model.merge_and_unload(), step=0).rows
    assert len(rows) == len(merged) == 2 * 4
    for row, right in zip(rows, merged, strict=True):
        assert row["name"] == right["name"] and row["delta_frobenius"] > 0
        for column in ("delta_frobenius", "angle_left_mean_rad", "angle_right_mean_rad", "sigma_max"):
            assert row[column] == pytest.approx(right[column], rel=1e-4, abs=1e-6), column


def test_rows_of_a_head_are_those_of_its_block_alone(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    series = rlspec.measure(base, tuned, modules="q,k,o", rank=0.5, per_head=True, out=tmp_path / "out")
    rows = {row["name"]: row for row in series.rows}
    assert len(rows) == 2 * (4 + 2 + 4)
    before, after = tensors_of(base), tensors_of(tuned)
    for name, row in rows.items():
        tensor = name.partition("[")[0]
        block: Any = slice(16 * row["head"], 16 * row["head"] + 16)
        block = (slice(None), block) if row["module"] == "o" else block
        u, s, vh = torch.linalg.svd(after[tensor][block].double(), full_matrices=False)
        u_ref, _, vh_ref = torch.linalg.svd(before[tensor][block].double(), full_matrices=False)
        k = row["rank"]
        assert (row["rows"], row["cols"]) == ((64, 16) if row["module"] == "o" else (16, 64))
        assert k == 8 and name == f"{tensor}[head {row['head']}]"
        assert abs(row["sigma_max"] - float(s[0])) <= row["sigma_error_bound"]
        for side, now, then in (("left", u, u_ref), ("right", vh.T, vh_ref.T)):
            sines = torch.linalg.svdvals(now[:, :k] - then[:, :k] @ (then[:, :k].T @ now[:, :k]))
            error = abs(row[f"angle_{side}_max_rad"] - float(sines[0].asin()))
            assert error <= row["angle_error_bound_rad"] < 1e-3
    with pytest.raises(RunFolderError, match="measured with per_head=True, now per_head=False"):
        rlspec.measure(base, tuned, modules="q,k,o", rank=0.5, out=tmp_path / "out")


def test_the_command_and_a_model_in_memory_give_the_same_rows(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    options = ["--modules", "q,o", "--per-head", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, ["measure", str(tuned), "--base", str(base), *options])
    assert done.exit_code == 0, done.output
    basis = SpectralBasis.from_model(loaded(base), modules="q,o", per_head=True)
    record = SpectralTracker(basis).measure(loaded(tuned), step=0)
    assert [row["head"] for row in record.rows] == 4 * [0, 1, 2, 3]
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
        (
            {"num_key_value_heads": 1, "head_dim": None, "modules": "v,o"},
            r"o_proj\.weight: by config\.json its heads have 16 columns each, those of .*v_proj\.weight 32; v and o",
        ),
        (
            {"head_dim": 32, "modules": "o"},
            r"o_proj\.weight: 64 columns are not 4 heads of 32 columns, as config",
        ),
        (
            {"v_head_dim": 8, "modules": "o"},
            r"o_proj\.weight: 64 columns are not 4 heads of 8 columns, as config",
        ),
        (
            {"num_attention_heads": 3, "head_dim": None, "modules": "o"},
            r"64 columns are not 3 heads, as config",
        ),
    ],
)
def test_heads_that_the_configuration_does_not_tell_are_refused(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    base, tuned = pair(tmp_path)
    modules = settings.get("modules", "q,k,v")
    changed(base, **{name: value for name, value in settings.items() if name != "modules"})
    with pytest.raises(ProjectionError, match=told) as caught:
        rlspec.measure(base, tuned, modules=modules, out=tmp_path / "out", per_head=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_without_a_configuration_heads_are_refused(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    (base / "config.json").unlink()
    with pytest.raises(
        ProjectionError, match=r"q_proj\.weight: how many heads .* there is none; .*per_head=False"
    ):
        rlspec.measure(base, tuned, per_head=True)
