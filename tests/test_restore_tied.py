"""Tied heads: adapters that cut the tie against PEFT's own model, stored copies, and checkpoints that disagree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from restore_toys import Tensors, bytes_of, pair, rewrite, save_model, svd_formula, tensors_of, tune
from safetensors.torch import load_file, save_file

import rlspec
from rlspec.errors import CheckpointError, TensorError
from rlspec.restore import plan as planning

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.arange(20)[None]


def store_head(folder: Path) -> None:
    """What FSDP mergers and offloaded saves do: the tied head once more."""
    rewrite(folder, lambda t: t.update({HEAD: t[EMBED].clone()}))


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def ties(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text())["tie_word_embeddings"])


def logits(folder: Path) -> torch.Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


Q = ["q_proj"]
BOTH = ["embed_tokens", "lm_head"]
TYING = {"ensure_weight_tying": True}
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "embedding saved": ({"target_modules": Q, "modules_to_save": ["embed_tokens"]}, False),
    "head saved": ({"target_modules": Q, "modules_to_save": ["lm_head"]}, False),
    "both saved": ({"target_modules": Q, "modules_to_save": BOTH}, False),
    "both saved as one": ({"target_modules": Q, "modules_to_save": ["embed_tokens"], **TYING}, True),
    "LoRA on the embedding": ({"target_modules": [*Q, "embed_tokens"]}, False),
    "LoRA on the head": ({"target_modules": [*Q, "lm_head"]}, False),
    "LoRA on both": ({"target_modules": [*Q, *BOTH]}, False),
    "LoRA on both as one": ({"target_modules": [*Q, "embed_tokens"], **TYING}, True),
    "LoRA on neither": ({"target_modules": Q}, True),
}


@pytest.mark.parametrize(
    ("name", "stored"),
    [*((name, False) for name in KINDS), *((n, True) for n in KINDS if "embedding" in n or "as one" in n)],
)
def test_adapters_of_tied_models_give_the_logits_of_peft(name: str, stored: bool, tmp_path: Path) -> None:
    """The truth is the model as PEFT runs it: its merge writes a LoRA on the embedding into the head as well."""
    peft = pytest.importorskip("peft")
    options, tied = KINDS[name]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_model(base, "tied llama", shard="1GB" if stored else "100KB")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    live = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options)).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        truth = live(IDS).logits
    live.save_pretrained(adapter)
    if stored:
        store_head(base)
    else:  # a loader that goes by the index finds the head too
        assert (base / "model.safetensors.index.json").is_file()
    report = rlspec.restore_checkpoint(base, adapter, tmp_path / "out", modules="q", strength=0.0)
    change = (truth - logits(base)).norm()
    assert change > 0.1 * truth.norm()
    assert (logits(tmp_path / "out") - truth).norm() < 1e-4 * change
    assert ties(tmp_path / "out") == tied
    assert (HEAD in tensors_of(tmp_path / "out")) == (stored or not tied)
    assert any("the adapter unties lm_head.weight" in note for note in report.notes) != tied
    if not stored:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        found = tensors_of(tmp_path / "out")
        assert index["weight_map"].keys() == found.keys()
        for tensor, shard in index["weight_map"].items():
            assert tensor in load_file(tmp_path / "out" / shard)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
        assert index["metadata"]["total_parameters"] == sum(t.numel() for t in found.values())


def list_head(folder: Path, *, beside: bool) -> None:
    """List the tied head in the index, in the embedding's shard or another, where it is not."""
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    shard = content["weight_map"][EMBED]
    content["weight_map"][HEAD] = next(s for s in content["weight_map"].values() if (s == shard) == beside)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("unties", [True, False])
@pytest.mark.usefixtures("own_cache")
def test_a_head_that_the_index_lists_and_no_shard_holds_is_measured_and_restored_without(
    unties: bool, beside: bool, tmp_path: Path
) -> None:
    """To the weights of the same checkpoint with a right index; the output's index is right."""
    peft = pytest.importorskip("peft")
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    save_model(base, "tied llama", shard="60KB")
    if unties:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        live = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        live.save_pretrained(tuned)
    else:
        tune(base, tuned)
    rlspec.restore_checkpoint(base, tuned, tmp_path / "right", modules="q")
    before = None if unties else rlspec.measure(base, tuned, modules="q").rows
    for folder in (base, tuned):
        if (folder / "model.safetensors.index.json").exists():
            list_head(folder, beside=beside)
    if before is not None:  # adapters on tied heads are restored alone
        assert rlspec.measure(base, tuned, modules="q").rows == before
    rlspec.restore_checkpoint(base, tuned, tmp_path / "out", modules="q")
    found, right = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "right")
    assert found.keys() == right.keys() and (HEAD in found) == unties
    assert all(torch.equal(found[name], right[name]) for name in right)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())


def test_a_head_that_is_trained_alone_is_restored_to_the_embedding(tmp_path: Path) -> None:
    """The closed form; also with the head in float32 where the rest stays as narrow as it was."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_model(base, "tied llama", dtype=torch.bfloat16)
    adapter.mkdir()
    trained = tensors_of(base)[EMBED].float() + 0.01 * torch.randn(48, 64)
    save = {"base_model.model.lm_head.weight": trained}
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    save_file(save, adapter / "adapter_model.safetensors")
    rlspec.restore_checkpoint(base, adapter, tmp_path / "out", modules="lm_head", dtype="float32")
    found, before = tensors_of(tmp_path / "out"), tensors_of(base)
    truth = svd_formula(0, 0.2)(before[EMBED].double(), trained.double())
    assert found[HEAD].dtype == torch.float32
    assert (found[HEAD] - truth).norm() < 1e-3 * (truth - trained).norm()
    assert all(torch.equal(found[name], before[name]) for name in before)
    report = rlspec.restore_checkpoint(
        base / "model.safetensors", adapter, tmp_path / "file", modules="lm_head"
    )
    assert [p.name for p in (tmp_path / "file").iterdir()] == ["model.safetensors"]
    assert report.notes[0].endswith("a config.json to go with them must have tie_word_embeddings false")


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_the_head_goes_where_transformers_looks_for_it(kind: str, tmp_path: Path) -> None:
    """GPT-NeoX calls it embed_out; where names lack their prefix, there is no telling, and it is refused."""
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    model = save_model(base, kind)
    if kind == "gpt_neox":
        model = transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(**{**model.config.to_dict(), "tie_word_embeddings": True})
        )
        model.save_pretrained(base)
    name = {"gpt2": "wte", "gpt_neox": "embed_in"}[kind]
    live = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["attention.dense", "attn.c_proj"], modules_to_save=[name])
    )
    with torch.no_grad():
        live.get_input_embeddings().weight.add_(0.1)
        truth = live.eval()(IDS).logits
    live.save_pretrained(tmp_path / "adapter")
    arguments = {"modules": "o", "strength": 0.0}
    rlspec.restore_checkpoint(base, tmp_path / "adapter", tmp_path / "out", **arguments)
    assert (logits(tmp_path / "out") - truth).norm() < 1e-4 * (logits(base) - truth).norm()
    if kind == "gpt2":
        rewrite(base, lambda t: t.update({n.removeprefix("transformer."): t.pop(n) for n in list(t)}))
        with pytest.raises(
            CheckpointError, match=r"trains wte\.weight, to which the head is tied.*which name"
        ):
            rlspec.restore_checkpoint(base, tmp_path / "adapter", tmp_path / "2", **arguments)


@pytest.fixture
def copies(tmp_path: Path) -> tuple[Path, Path]:
    """A tied model and a tuned one, both with a stored copy of the head."""
    folders = pair(tmp_path, "tied llama", dtype=torch.bfloat16)
    for folder in folders:
        store_head(folder)
    return folders


@pytest.mark.parametrize(
    "options",
    [
        {"modules": "embed"},
        {"modules": "embed,lm_head", "rounding": "stochastic"},
        {"modules": "embed,lm_head", "mode": "interpolate", "strength": 0.3, "rounding": "stochastic"},
        {"modules": "embed_tokens", "mode": "copy"},
        {"modules": "embed", "dtype": "float32"},
    ],
)
@pytest.mark.parametrize("base_stores", [True, False])
def test_a_stored_copy_of_a_tied_head_follows_the_embedding(
    options: dict[str, Any], base_stores: bool, copies: tuple[Path, Path], tmp_path: Path
) -> None:
    """Whether or not the configuration says that they are tied, and the base stores a copy."""
    base, tuned = copies
    if not base_stores:
        rewrite(base, lambda t: t.pop(HEAD))
    else:
        set_config(tuned, tie_word_embeddings=None)
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "out", **options)
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found[EMBED], found[HEAD])
    assert not torch.equal(found[EMBED], tensors_of(tuned)[EMBED].to(found[EMBED].dtype))
    assert report.tied == {HEAD: EMBED} and HEAD not in report.kept
    assert [row.tensor for row in report.matrices].count(HEAD) == 0
    rewrite(tuned, lambda t: t.pop(HEAD))
    rlspec.restore_checkpoint(base, tuned, tmp_path / "once", **options)
    assert torch.equal(found[EMBED], tensors_of(tmp_path / "once")[EMBED])


def test_without_the_rule_the_copy_stays_behind(
    copies: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin, and what transformers makes of it: a model whose head is the tuned one."""
    monkeypatch.setattr(planning, "_tied_steps", lambda like, steps, model: {})
    rlspec.restore_checkpoint(*copies, tmp_path / "out", modules="embed")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_heads_that_are_not_copies_are_matrices_of_their_own(
    copies: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = copies
    with pytest.raises(
        CheckpointError, match=r"nothing to restore: lm_head.weight: a stored copy of.*ask for embed"
    ):
        rlspec.restore_checkpoint(base, tuned, tmp_path / "1", modules="lm_head")
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "2", modules="lm_head,q")
    assert report.kept[HEAD].endswith("ask for embed") and bytes_of(tmp_path / "2") != bytes_of(tuned)
    set_config(tuned, tie_word_embeddings=False)
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "3", modules="lm_head")
    assert [row.tensor for row in report.matrices] == [HEAD]
    set_config(tuned, tie_word_embeddings=True)
    rewrite(tuned, lambda t: t[HEAD][0, 0].add_(1))
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "4", modules="embed,lm_head")
    assert {row.tensor for row in report.matrices} == {EMBED, HEAD} and not report.tied


def test_an_untied_head_is_restored_to_the_embedding_of_a_tied_base(tmp_path: Path) -> None:
    """The base's head is its embedding; the closed form."""
    base, tuned = pair(tmp_path, "tied llama")
    rewrite(tuned, lambda t: t.update({HEAD: t[EMBED] + 0.01 * torch.randn(48, 64)}))
    set_config(tuned, tie_word_embeddings=False)
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "out", modules="lm_head")
    before, after = (tensors_of(folder) for folder in (base, tuned))
    truth = svd_formula(0, 0.2)(before[EMBED].double(), after[HEAD].double())
    found = tensors_of(tmp_path / "out")
    assert (found[HEAD] - truth).norm() < 1e-3 * (truth - after[HEAD]).norm()
    assert torch.equal(found[EMBED], after[EMBED]) and not report.tied


@pytest.mark.parametrize("finished", [EMBED, HEAD])
@pytest.mark.parametrize("mode", ["directions", "interpolate"])
def test_embedding_and_copy_in_two_shards_are_resumed(
    finished: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two is on the disk already: the other comes out the same."""
    from rlspec.io.staging import Staging

    folders = tmp_path / "base", tmp_path / "tuned"
    pair(tmp_path / "one", "tied llama", dtype=torch.bfloat16)
    for folder in folders:
        split(tmp_path / "one" / folder.name, folder)
    options: dict[str, Any] = {"modules": "embed", "mode": mode, "rounding": "stochastic", "strength": 0.5}
    whole = rlspec.restore_checkpoint(*folders, tmp_path / "whole", **options)
    shard = "a.safetensors" if finished == EMBED else "b.safetensors"
    finish = Staging.finish
    with monkeypatch.context() as context:
        context.setattr(Staging, "finish", lambda s, n, size: finish(s, n, size) if n == shard else None)
        context.setattr(Staging, "publish", lambda s: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rlspec.restore_checkpoint(*folders, tmp_path / "out", **options)
    report = rlspec.restore_checkpoint(*folders, tmp_path / "out", resume=True, **options)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert [row.tensor for row in report.matrices] == [row.tensor for row in whole.matrices] == [EMBED]


def split(source: Path, folder: Path) -> None:
    """The same checkpoint with the head stored again, in a shard of its own."""
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    tensors: Tensors = tensors_of(source)
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    save_file({HEAD: tensors[EMBED].clone()}, folder / "b.safetensors", metadata={"format": "pt"})
    weight_map = {**dict.fromkeys(tensors, "a.safetensors"), HEAD: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_tied_model_in_memory_is_restored_as_one_matrix(tmp_path: Path) -> None:
    """From a basis that has the matrix once or twice; two different ones are refused before anything is written."""
    base = save_model(tmp_path / "base", "tied llama")
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    basis = rlspec.SpectralBasis.from_tensors(weights, modules="embed,lm_head")
    assert len(basis) == 2
    with torch.no_grad():
        base.lm_head.weight.add_(0.01 * torch.randn(48, 64))
        tuned = base.lm_head.weight.clone()
    rlspec.restore_(base, basis)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    truth = svd_formula(0, 0.2)(weights[EMBED].double(), tuned.double())
    assert (base.lm_head.weight - truth).norm() < 1e-3 * (truth - tuned).norm()
    weights[HEAD][0, 0] += 1
    before = base.lm_head.weight.clone()
    with pytest.raises(
        TensorError, match=r"one tensor with .* in the model \(tied\), two different ones in the basis"
    ):
        rlspec.restore_(base, rlspec.SpectralBasis.from_tensors(weights, modules="embed,lm_head"))
    assert torch.equal(base.lm_head.weight, before)
