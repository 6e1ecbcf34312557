"""LoRA adapters as tuned checkpoints: against PEFT's own merge, the closed form, and the kinds that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from restore_toys import bytes_of, expected, rewrite, save_model, svd_formula, tensors_of
from safetensors.torch import load_file, save_file

import rlspec
from rlspec.errors import CheckpointError, TensorError

Q0 = "model.layers.0.self_attn.q_proj"
MLP = "model.layers.0.mlp.down_proj"


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{n}": t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    full = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(full))
    return folder


def factors(module: str, out: int, inner: int, r: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": 0.02 * torch.randn(r, inner, generator=draw),
        f"{module}.lora_B.weight": torch.randn(out, r, generator=draw),
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(tmp_path / "base", "llama")
    return tmp_path / "base"


def test_an_adapters_own_tokenizer_goes_before_the_bases(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(Q0, 64, 64))
    for name in ("tokenizer.json", "special_tokens_map.json", "generation_config.json"):
        (base / name).write_text("base")
    for name in ("chat_template.jinja", "README.md"):
        (adapter / name).write_text("adapter")
    rlspec.restore_checkpoint(base, adapter, tmp_path / "template", modules="q")
    assert (tmp_path / "template" / "chat_template.jinja").read_text() == "adapter"
    assert (tmp_path / "template" / "tokenizer.json").read_text() == "base"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text("adapter")
    rlspec.restore_checkpoint(base, adapter, tmp_path / "whole", modules="q")
    own = {p.name for p in (tmp_path / "whole").iterdir() if p.read_bytes() == b"adapter"}
    assert own == {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert not (tmp_path / "whole" / "special_tokens_map.json").exists()  # of the other tokenizer
    assert not (tmp_path / "whole" / "adapter_config.json").exists()


@pytest.mark.parametrize("mode", ["directions", "copy", "interpolate"])
def test_closed_form(mode: str, base: Path, tmp_path: Path) -> None:
    tensors = {**factors(Q0, 64, 64), **factors(MLP, 64, 96, r=2, seed=1)}
    adapter = write_adapter(
        tmp_path / "adapter", tensors, rank_pattern={"down_proj": 2}, alpha_pattern={r"layers\.0\.mlp\..*": 3}
    )
    strength = 0.25 if mode == "interpolate" else 1.0
    report = rlspec.restore_checkpoint(base, adapter, tmp_path / "out", mode=mode, strength=strength)
    before, found = tensors_of(base), tensors_of(tmp_path / "out")
    tuned = {name: t.double() for name, t in before.items()}
    for module, scale in ((Q0, 8 / 4), (MLP, 3 / 2)):
        a, b = tensors[f"{module}.lora_A.weight"].double(), tensors[f"{module}.lora_B.weight"].double()
        tuned[f"{module}.weight"] += scale * (b @ a)
    formula = {
        "directions": svd_formula(0, 0.2),
        "copy": lambda b, t: b,
        "interpolate": lambda b, t: t + 0.25 * (b - t),
    }[mode]
    truth = expected("llama", before, tuned, formula)
    assert [row.name for row in report.matrices] == [f"{Q0}.weight"]
    assert report.merged == (f"{MLP}.weight",)
    assert report.kept["model.layers.1.self_attn.q_proj.weight"] == "the adapter does not change it"
    for name, tensor in found.items():
        if name in (f"{Q0}.weight", f"{MLP}.weight"):
            intended = (truth[name] - tuned[name]).norm()
            assert (tensor - truth[name]).norm() <= 0.01 * intended + 1e-6
        else:
            assert torch.equal(tensor, before[name])
    assert bytes_of(tmp_path / "out").keys() == bytes_of(base).keys()


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj"]}),
    "rslora and patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 5},
        },
    ),
    "saved modules": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    ),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    # PEFT saves the flag of the module adapted last, which is no Conv1D here.
    "conv1d beside a linear one": ("gpt2-untied", {"target_modules": ["c_attn", "attn.c_proj", "lm_head"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "fused heads": ("gpt_neox", {"target_modules": ["query_key_value"]}),
}


@pytest.mark.parametrize("name", KINDS)
def test_peft_merges_to_the_same(name: str, tmp_path: Path) -> None:
    """At strength 0 the output is the merged model; *directions* of it equals restoring PEFT's merged checkpoint."""
    peft = pytest.importorskip("peft")
    kind, options = KINDS[name]
    save_model(tmp_path / "base", kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    base, merged = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "merged")

    arguments = (tmp_path / "base", tmp_path / "adapter")
    report = rlspec.restore_checkpoint(*arguments, tmp_path / "same", strength=0.0, modules="attn,mlp")
    ours = tensors_of(tmp_path / "same")
    differ = {n for n in base if not torch.equal(base[n], merged[n])}
    assert differ and differ == {row.tensor for row in report.matrices} | set(report.merged)
    for n in base:
        torch.testing.assert_close(ours[n], merged[n], rtol=1e-6, atol=1e-7, msg=n)

    selected = {"modules": "q,k,v", "rank": 0.2}
    rlspec.restore_checkpoint(*arguments, tmp_path / "ours", **selected)
    rlspec.restore_checkpoint(tmp_path / "base", tmp_path / "merged", tmp_path / "theirs", **selected)
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert any(not torch.equal(theirs[n], merged[n]) for n in base)
    for n in base:
        torch.testing.assert_close(ours[n], theirs[n], rtol=1e-4, atol=2e-6, msg=n)


def test_narrow_bases_are_rounded_once(tmp_path: Path) -> None:
    save_model(tmp_path / "base", "llama", dtype=torch.bfloat16)
    tensors = factors(Q0, 64, 64)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    base = tensors_of(tmp_path / "base")[f"{Q0}.weight"]
    exact = base.float() + 2 * tensors[f"{Q0}.lora_B.weight"] @ tensors[f"{Q0}.lora_A.weight"]
    for rounding in ("nearest", "stochastic"):
        out = tmp_path / rounding
        rlspec.restore_checkpoint(
            tmp_path / "base", adapter, out, modules="q", strength=0.0, rounding=rounding
        )
        found = tensors_of(out)[f"{Q0}.weight"]
        assert found.dtype == torch.bfloat16
        wrong = (found != exact.bfloat16()).float().mean()
        assert wrong < 0.01 if rounding == "nearest" else 0.1 < wrong < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["saved", "added", "base"])
def test_nan_is_told_of_the_file_that_holds_it(where: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(tmp_path / "base", "llama", dtype=dtype)
    tensors = {**factors(Q0, 64, 64), **factors(MLP, 64, 96), "model.norm.weight": torch.ones(64)}
    file, name = tmp_path / "adapter" / "adapter_model.safetensors", "model.norm.weight"
    if where == "saved":
        tensors[name][3] = torch.nan
    elif where == "added":
        name = f"{MLP}.weight"
        tensors[f"{MLP}.lora_B.weight"][3, 1] = torch.inf
    else:
        file, name = tmp_path / "base" / "model.safetensors", f"{MLP}.weight"
        rewrite(tmp_path / "base", lambda t: t[name].fill_(torch.nan))
        # A tensor that the adapter holds whole is not the base's any more.
        rewrite(tmp_path / "base", lambda t: t["model.norm.weight"].fill_(torch.nan))
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(TensorError, match=f"^{file}: {name}: .* values are NaN or infinite"):
        rlspec.restore_checkpoint(tmp_path / "base", adapter, tmp_path / "out", modules="q")


def test_scalars_that_an_adapter_holds_are_taken_over(tmp_path: Path) -> None:
    save_model(tmp_path / "base", "llama", dtype=torch.bfloat16)
    scalars = {f"model.layers.{i}.scale": torch.tensor(1.0 + i) for i in range(2)}
    narrow = {name: value.bfloat16() for name, value in scalars.items()}
    rewrite(tmp_path / "base", lambda t: t.update({name: torch.zeros_like(v) for name, v in narrow.items()}))
    trained = scalars | {"model.layers.1.scale": torch.tensor(2.0, dtype=torch.bfloat16)}
    adapter = write_adapter(tmp_path / "adapter", {**factors(Q0, 64, 64), **trained})
    for dtype in ("keep", "float32"):
        report = rlspec.restore_checkpoint(
            tmp_path / "base", adapter, tmp_path / dtype, modules="q", dtype=dtype, rounding="stochastic"
        )
        found = tensors_of(tmp_path / dtype)
        assert all(torch.equal(found[name], value) for name, value in narrow.items())
        assert set(scalars) <= set(report.merged)


def test_prefixes_may_differ(tmp_path: Path) -> None:
    """GPT-2's checkpoints on the hub lack the prefix that its modules have in memory."""
    save_model(tmp_path / "base", "gpt2")
    rewrite(
        tmp_path / "base",
        lambda t: t.update({n.removeprefix("transformer."): t.pop(n) for n in list(t)}),
    )
    tensors = factors("transformer.h.1.attn.c_attn", 192, 64)
    adapter = write_adapter(tmp_path / "adapter", tensors, fan_in_fan_out=True)
    report = rlspec.restore_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    assert [row.name for row in report.matrices] == [f"h.1.attn.c_attn.weight[{part}]" for part in "qkv"]


Change = Callable[[Path], None]


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = {n.removeprefix("base_model.model."): t for n, t in load_file(path).items()}
        change(found)
        save_file({f"base_model.model.{n}": t for n, t in found.items()}, path)

    return apply


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (config(peft_type="IA3"), "peft_type 'IA3'; only LORA"),
        (config(use_dora=True), "use_dora: DoRA rescales.*merge the adapter with PEFT"),
        (config(init_lora_weights="pissa_niter_4"), "changed the base's weights before training"),
        (config(target_parameters=["x"]), "target_parameters"),
        (config(r=8), f"{Q0} has rank 4, adapter_config.json says 8"),
        (config(lora_alpha="big"), "lora_alpha is 'big', expected a positive number"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not valid JSON"),
        (pickled, "adapter_model.bin is a pickle"),
        (tensors(lambda t: t.pop(f"{Q0}.lora_B.weight")), f"{Q0} has lora_A alone"),
        (tensors(lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(64)})), "not supported"),
        (tensors(lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(64, 3)})), "do not multiply"),
        (tensors(lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(60, 4)})), r"is \(60, 64\), but"),
        (
            tensors(lambda t: t.update(factors("model.layers.7.self_attn.q_proj", 64, 64))),
            "belongs to no tensor",
        ),
        (tensors(lambda t: t.update({"lm_head.weight": torch.ones(50, 64)})), r"is \(50, 64\), but lm_head"),
    ],
)
def test_adapters_that_are_refused(change: Change, named: str, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(Q0, 64, 64))
    change(adapter)
    with pytest.raises(CheckpointError, match=named):
        rlspec.restore_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
