"""Whole checkpoints: every mode against the dense formula, for every naming scheme, and what must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from restore_toys import (
    CONFIGS,
    bytes_of,
    expected,
    pair,
    parts,
    rewrite,
    svd_formula,
    tensors_of,
)
from safetensors import safe_open
from safetensors.torch import save_file

import rlspec
from rlspec.errors import CheckpointError, OptionError, ProjectionError, TensorError

MODES: dict[str, tuple[dict[str, Any], Any]] = {
    "directions": ({}, svd_formula(0, 0.2)),
    "count": ({"rank": 5}, svd_formula(0, 5)),
    "all directions": ({"rank": 1.0}, svd_formula(0, 1.0)),
    "tail": ({"part": "tail"}, svd_formula(0.8, 1.0)),
    "band": ({"part": "3:11"}, svd_formula(3, 11)),
    "band in shares": ({"part": "25%:50%"}, svd_formula(0.25, 0.5)),
    "values": ({"mode": "values"}, svd_formula(0, 0.2, left_values="values only")),
    "both": ({"mode": "both"}, svd_formula(0, 0.2, left_values="base")),
    "interpolate": ({"mode": "interpolate", "strength": 0.3}, lambda b, t: t + 0.3 * (b - t)),
    "half": ({"strength": 0.5}, lambda b, t: 0.5 * (t + svd_formula(0, 0.2)(b, t))),
    "copy": ({"mode": "copy"}, lambda b, t: b),
}


def check(
    kind: str,
    base: Path,
    tuned: Path,
    out: Path,
    options: dict[str, Any],
    formula: Any,
    untouched: str = "no",
) -> None:
    report = rlspec.restore_checkpoint(base, tuned, out, **options)
    before, found = tensors_of(tuned), tensors_of(out)
    truth = expected(kind, tensors_of(base), before, formula)
    assert found.keys() == before.keys()
    restored = {row.tensor for row in report.matrices}
    changed = 0
    for name, tensor in found.items():
        if name.startswith(untouched) or not parts(kind, name, before[name]):
            assert torch.equal(tensor, before[name]), name
            assert name in report.kept
            continue
        assert name in restored
        ours, there = parts(kind, name, tensor), parts(kind, name, truth[name])
        start = parts(kind, name, before[name])
        for label, matrix in ours.items():
            intended = (there[label] - start[label]).norm()
            assert intended > 0
            # What an engine may be off by (1 %), and float32's rounding of the weight.
            allowed = 0.01 * intended + 6e-8 * there[label].norm()
            assert (matrix - there[label]).norm() <= allowed, (name, label)
            changed += 1
    assert changed == len(report.matrices) == 6
    assert {row.module for row in report.matrices} == {"q", "k", "v"}


@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_the_dense_formula(mode: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    check("llama", *llama, tmp_path / "out", *MODES[mode])


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "llama"])
def test_naming_schemes_equal_the_dense_formula(kind: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, kind)
    for mode in ("directions", "tail", "values", "both", "interpolate", "copy"):
        check(kind, base, tuned, tmp_path / mode, *MODES[mode])


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_language_models_inside_multimodal_ones(
    prefix: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    folders = tmp_path / "base", tmp_path / "tuned"
    for source, folder in zip(llama, folders):
        folder.mkdir()
        tensors = {n.replace("model.layers.", f"{prefix}layers."): t for n, t in tensors_of(source).items()}
        tower = {n.replace(prefix, "vision_model."): t.clone() for n, t in tensors.items() if ".layers." in n}
        save_file({**tensors, **tower}, folder / "model.safetensors")
    check("llama", *folders, tmp_path / "out", {}, svd_formula(0, 0.2), untouched="vision_model.")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_exact_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, dtype=dtype)
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "out", exact=True)
    found = tensors_of(tmp_path / "out")
    truth = expected("llama", tensors_of(base), tensors_of(tuned), svd_formula(0, 0.2))
    for row in report.matrices:
        assert row.method == "exact" and found[row.tensor].dtype == dtype
        exact = truth[row.tensor]
        if dtype == torch.float64:
            assert (found[row.tensor] - exact).norm() <= 1e-12 * exact.norm()
        else:
            # Rounding to nearest, but for what lies within the formula's own error of a tie.
            assert (found[row.tensor] != exact.to(dtype)).float().mean() < 1e-3


def test_the_check_notices_the_wrong_formula(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """The broken twin: one direction more, or the base's values, fails."""
    for number, formula in enumerate((svd_formula(0, 0.25), svd_formula(0, 0.2, left_values="base"))):
        with pytest.raises(AssertionError):
            check("llama", *llama, tmp_path / str(number), {}, formula)


@pytest.mark.parametrize("kind", ["phi3", "gpt2", "gpt_neox"])
def test_one_part_of_a_fused_tensor_leaves_the_others(kind: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, kind, dtype=torch.bfloat16)
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "out", modules="k", layers="1")
    assert [(row.module, row.layer) for row in report.matrices] == [("k", 1)]
    before, found = tensors_of(tuned), tensors_of(tmp_path / "out")
    for name, tensor in found.items():
        if name != report.matrices[0].tensor:
            assert torch.equal(tensor, before[name])
            continue
        ours, start = parts(kind, name, tensor), parts(kind, name, before[name])
        assert torch.equal(ours["q"], start["q"]) and torch.equal(ours["v"], start["v"])
        assert not torch.equal(ours["k"], start["k"])


def test_strength_zero_is_the_tuned_checkpoint(llama_bf16: tuple[Path, Path], tmp_path: Path) -> None:
    for mode in ("directions", "copy"):
        rlspec.restore_checkpoint(*llama_bf16, tmp_path / mode, mode=mode, strength=0.0)
        assert bytes_of(tmp_path / mode) == bytes_of(llama_bf16[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_copy_of_everything_is_the_base(kind: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, kind, dtype=torch.bfloat16)
    rewrite(base, lambda t: next(iter(t.values())).view(-1)[:2].copy_(torch.tensor([-0.0, 1e-30])))
    rlspec.restore_checkpoint(base, tuned, tmp_path / "out", mode="copy", modules=".")
    there, found = tensors_of(base), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[n].view(torch.int16), there[n].view(torch.int16)) for n in there)
    rlspec.restore_checkpoint(base, tuned, tmp_path / "matrices", mode="copy", modules="all")
    found, before = tensors_of(tmp_path / "matrices"), tensors_of(tuned)
    for name, tensor in found.items():
        source = there if tensor.ndim == 2 and "wpe" not in name else before
        assert torch.equal(tensor, source[name]), name


def test_the_result_loads_and_generates(llama_bf16: tuple[Path, Path], tmp_path: Path) -> None:
    rlspec.restore_checkpoint(*llama_bf16, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    tokens = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[0] == 1 and 4 <= tokens.shape[1] <= 7
    found = tensors_of(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.state_dict()[name], found[name])


def test_files_order_metadata_and_inputs_stay(llama: tuple[Path, Path], tmp_path: Path) -> None:
    before = [bytes_of(folder) for folder in llama]
    rlspec.restore_checkpoint(*llama, tmp_path / "out")
    assert [bytes_of(folder) for folder in llama] == before
    found = bytes_of(tmp_path / "out")
    assert found.keys() == before[1].keys()
    assert sum(name.endswith(".safetensors") for name in found) >= 2
    for name, content in found.items():
        if not name.endswith(".safetensors"):
            assert content == before[1][name]
            continue
        with (
            safe_open(str(tmp_path / "out" / name), "pt") as ours,
            safe_open(str(llama[1] / name), "pt") as theirs,
        ):
            assert ours.metadata() == theirs.metadata()
            assert ours.offset_keys() == theirs.offset_keys()


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "tied llama")
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "out", modules="embed,lm_head,v")
    assert [row.module for row in report.matrices] == ["embed", "v", "v"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors_of(tmp_path / "out")["model.embed_tokens.weight"])
    with pytest.raises(ProjectionError, match="no lm_head in this model: it is tied"):
        rlspec.restore_checkpoint(base, tuned, tmp_path / "2", modules="lm_head")


def test_single_files(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "gpt_neox")
    files = [folder / "model.safetensors" for folder in (base, tuned)]
    rlspec.restore_checkpoint(*files, tmp_path / "file")
    rlspec.restore_checkpoint(base, tuned, tmp_path / "folder")
    assert [path.name for path in (tmp_path / "file").iterdir()] == ["model.safetensors"]
    found, there = (bytes_of(tmp_path / name)["model.safetensors"] for name in ("file", "folder"))
    assert found == there


def test_layers_and_regular_expressions_choose(llama: tuple[Path, Path], tmp_path: Path) -> None:
    def chosen(out: str, **options: Any) -> list[str]:
        report = rlspec.restore_checkpoint(*llama, tmp_path / out, **options)
        return [row.name.removeprefix("model.").removesuffix(".weight") for row in report.matrices]

    assert chosen("1", modules="embed,q", layers="0:50%") == ["embed_tokens", "layers.0.self_attn.q_proj"]
    assert chosen("2", modules=r"layers\.1\..*(gate|up)_proj") == [
        "layers.1.mlp.gate_proj",
        "layers.1.mlp.up_proj",
    ]
    both = chosen("3", modules=r"lm_head|1.*k_proj|final|^model\.norm", mode="copy", layers="1")
    assert sorted(both) == ["layers.1.self_attn.k_proj", "lm_head", "norm"]


def test_names_that_no_pattern_knows(llama: tuple[Path, Path], tmp_path: Path) -> None:
    for folder, name in zip(llama, ("base", "tuned")):
        (tmp_path / name).mkdir()
        renamed = {n.replace("self_attn.q_proj", "mixer.query"): t for n, t in tensors_of(folder).items()}
        save_file(renamed, tmp_path / name / "model.safetensors")
    with pytest.raises(
        ProjectionError, match=r"no q projection found.*modules= also takes a regular expression"
    ):
        rlspec.restore_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    with pytest.raises(OptionError, match=r"'que\?ry!' is not a list of q.*it matches no matrix.*named like"):
        rlspec.restore_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", modules="que?ry!")
    report = rlspec.restore_checkpoint(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", modules=r"mixer\.query"
    )
    assert [(row.module, row.layer) for row in report.matrices] == [("other", 0), ("other", 1)]


Q0 = "model.layers.0.self_attn.q_proj.weight"


def test_bases_that_differ(tmp_path: Path) -> None:
    """A resized or tied vocabulary is common and skipped; other differences mean that it is the wrong base."""
    base, tuned = pair(tmp_path)
    rewrite(
        base, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:40].clone()})
    )
    rewrite(base, lambda t: t.pop("lm_head.weight"))
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "out", modules="all", rank=3)
    assert report.kept["model.embed_tokens.weight"] == "[48, 64] here, [40, 64] in the base"
    assert report.kept["lm_head.weight"] == "not in the base"
    assert len(report.matrices) == 14
    with pytest.raises(CheckpointError, match=r"nothing to restore: lm_head.weight: not in the base"):
        rlspec.restore_checkpoint(base, tuned, tmp_path / "2", modules="lm_head")
    rewrite(base, lambda t: t.update({Q0: t[Q0][:32].clone()}))
    with pytest.raises(
        CheckpointError, match=rf"{Q0} cannot be restored from .*base: \[64, 64\] here, \[32, 64\] in"
    ):
        rlspec.restore_checkpoint(base, tuned, tmp_path / "3")
    rewrite(base, lambda t: t.pop(Q0))
    with pytest.raises(CheckpointError, match=rf"{Q0} cannot be restored.*not in the base.*tuned from"):
        rlspec.restore_checkpoint(base, tuned, tmp_path / "4")
    assert not (tmp_path / "4").exists()


def test_a_base_in_another_float_dtype(
    llama: tuple[Path, Path], llama_bf16: tuple[Path, Path], tmp_path: Path
) -> None:
    rlspec.restore_checkpoint(llama[0], llama_bf16[1], tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    truth = expected("llama", tensors_of(llama[0]), tensors_of(llama_bf16[1]), svd_formula(0, 0.2))
    assert found[Q0].dtype == torch.bfloat16
    assert (found[Q0] - truth[Q0]).norm() < 0.004 * truth[Q0].norm()


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_what_cannot_be_restored_is_named(which: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    folder = tmp_path / which

    def run(**options: Any) -> None:
        try:
            rlspec.restore_checkpoint(base, tuned, tmp_path / "out", **options)
        finally:
            assert not (tmp_path / "out").exists()

    rewrite(folder, lambda t: t[Q0].view(-1)[5:7].fill_(torch.nan))
    with pytest.raises(TensorError, match=rf"{folder}/model.safetensors: {Q0}: 2 of 4096 values are NaN"):
        run()
    with pytest.raises(TensorError, match=rf"{folder}/model.safetensors: {Q0}: rows 0:64: 2 of 4096"):
        run(mode="interpolate")
    rewrite(folder, lambda t: t.update({Q0: t[Q0].nan_to_num().to(torch.float8_e4m3fn)}))
    if which == "tuned":  # plain codes of a base are numbers like any others
        with pytest.raises(CheckpointError, match=rf"{Q0}.* stored as F8_E4M3"):
            run()
    for name in (
        "qweight",
        "SCB",
        "weight.absmax",
        "weight_scale_2",
        "weight.quant_state.bitsandbytes__nf4",
    ):
        extra = Q0.replace("weight", name)
        rewrite(folder, lambda t, extra=extra: t.update({extra: torch.zeros(2, dtype=torch.uint8)}))
        with pytest.raises(CheckpointError, match=rf"{extra} belongs to quantised weights"):
            run()
        rewrite(folder, lambda t, extra=extra: t.pop(extra))


def test_equal_matrices_stay_to_the_bit(llama_bf16: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = llama_bf16
    report = rlspec.restore_checkpoint(base, base, tmp_path / "out", rank="energy:0.5")
    assert bytes_of(tmp_path / "out") == bytes_of(base)
    assert [(row.change_frobenius, row.entries_changed, row.k) for row in report.matrices] == [(0, 0, 0)] * 6


def test_figures_of_a_copy_over_zeros(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    rewrite(tuned, lambda t: t[Q0].zero_())
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "out", mode="copy")
    (found,) = [row for row in report.matrices if row.name == Q0]
    size = float(tensors_of(base)[Q0].double().norm())
    assert found.change_frobenius == pytest.approx(size, rel=1e-12)
    assert (found.change_relative, found.rounding_share, found.entries_changed) == (0.0, 0.0, 64 * 64)


def test_memory_too_small_says_what_is_needed(llama: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"q_proj.*takes about 0.1 GiB, memory_gib=0.0 is too little: give memory_gib=0.1"
    ):
        rlspec.restore_checkpoint(*llama, tmp_path / "out", memory_gib=0.01)
