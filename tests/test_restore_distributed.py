"""Restoring what torch.distributed.checkpoint wrote: the bytes that the same weights in safetensors give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from distributed_toys import bits, save
from process_toys import held, together, toy_with_uneven_layers
from restore_process_toys import OPTIONS as LAUNCHED
from restore_process_toys import together as launched
from restore_toys import CONFIGS, bytes_of, save_model, tensors_of, tune
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM

import rlspec
from rlspec.cli.main import main
from rlspec.errors import CheckpointError, TensorError
from rlspec.io.distributed_model import DistributedModel
from rlspec.io.index import CheckpointIndex
from rlspec.io.writer import CheckpointWriter
from rlspec.restore import checkpoint

pytestmark = pytest.mark.usefixtures("own_cache")


def trio(folder: Path, kind: str = "llama", **options: Any) -> tuple[Path, Path, Path]:
    """A base, what was tuned from it, and the same as accelerate and Hugging Face's Trainer leave it under FSDP."""
    base, tuned, parts = folder / "base", folder / "tuned", folder / "checkpoint-7"
    save_model(base, kind, **options)
    tune(base, tuned)
    state = AutoModelForCausalLM.from_pretrained(tuned, dtype="auto").state_dict()
    save({"model": state}, parts / "pytorch_model_fsdp_0")
    save({"optimizer": {"state": {"step": torch.ones(1)}}}, parts / "optimizer_0")
    return base, tuned, parts


def assert_same_output(found: Path, wanted: Path) -> None:
    assert bytes_of(found) == bytes_of(wanted)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "exact, half the strength": {"exact": True, "strength": 0.5, "layers": "1"},
    "every module, entry by entry": {"mode": "interpolate", "strength": 0.3, "modules": "all"},
    "copied": {"mode": "copy", "modules": "q,o,mlp"},
    "stochastic": {"rounding": "stochastic", "modules": "attn"},
    "nothing restored": {"strength": 0.0},
}


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("mistral", "gpt2-untied")])
def test_the_output_is_that_of_the_same_weights_in_safetensors(kind: str, tmp_path: Path) -> None:
    base, tuned, parts = trio(tmp_path, kind)
    right = rlspec.restore_checkpoint(base, tuned, tmp_path / "right")
    report = rlspec.restore_checkpoint(base, parts, tmp_path / "out")
    assert_same_output(tmp_path / "out", tmp_path / "right")
    assert report.matrices == right.matrices
    assert report.kept == right.kept and len(report.matrices) == 6


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
def test_so_it_is_with_every_option(kind: str, options: str, tmp_path: Path) -> None:
    base, tuned, parts = trio(tmp_path, kind, dtype=torch.bfloat16)
    chosen = {**OPTIONS[options]}
    if kind != "llama" and chosen.get("modules") == "all":
        chosen["modules"] = "q,mlp,embed"
    rlspec.restore_checkpoint(base, tuned, tmp_path / "right", **chosen)
    rlspec.restore_checkpoint(base, parts, tmp_path / "out", **chosen)
    assert_same_output(tmp_path / "out", tmp_path / "right")


def test_the_comparison_notices_the_base_in_place_of_the_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = DistributedModel.pairs

    def twice_the_base(self: Any, *args: Any, **options: Any) -> Iterator[Any]:
        for name, base, _ in right(self, *args, **options):
            yield name, base, base.clone()

    monkeypatch.setattr(DistributedModel, "pairs", twice_the_base)
    with pytest.raises(AssertionError):
        test_the_output_is_that_of_the_same_weights_in_safetensors("llama", tmp_path)


def test_the_comparison_notices_what_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = DistributedModel.rows

    def wrong(self: Any, name: str, **options: Any) -> Iterator[Any]:
        for first, block in right(self, name, **options):
            yield first, block + 1 if name == "model.norm.weight" else block

    monkeypatch.setattr(DistributedModel, "rows", wrong)
    with pytest.raises(AssertionError):
        test_the_output_is_that_of_the_same_weights_in_safetensors("llama", tmp_path)


def test_dtypes_are_those_of_the_parts_and_shards_those_of_the_base(tmp_path: Path) -> None:
    """FSDP trains in float32 what was loaded in bfloat16."""
    base, _, _ = trio(tmp_path, dtype=torch.bfloat16, shard="60KB")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    save({"model": model.state_dict()}, tmp_path / "wide")
    model.save_pretrained(tmp_path / "tuned")
    rlspec.restore_checkpoint(base, tmp_path / "tuned", tmp_path / "right")
    rlspec.restore_checkpoint(base, tmp_path / "wide", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in base.iterdir()}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    found, right = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "right")
    assert found.keys() == right.keys() and {t.dtype for t in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in found.values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto") is not None


def test_row_blocks_of_any_size_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, parts = trio(tmp_path, dtype=torch.bfloat16)
    options: dict[str, Any] = {"mode": "interpolate", "strength": 0.3, "modules": "q,mlp"}
    rlspec.restore_checkpoint(base, tuned, tmp_path / "right", **options)
    monkeypatch.setattr(checkpoint, "pool_bytes", lambda plan, memory: 1 << 17)
    rlspec.restore_checkpoint(base, parts, tmp_path / "cut", **options)
    assert_same_output(tmp_path / "cut", tmp_path / "right")


def saves(number: int, out: Path, kind: str) -> None:
    model = held(toy_with_uneven_layers(), kind, dist.get_world_size())
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=out)


@pytest.mark.parametrize(("count", "kind"), [(2, "fsdp2"), (2, "tp"), (4, "tp and fsdp2")])
def test_parts_of_many_processes_make_the_model(count: int, kind: str, tmp_path: Path) -> None:
    """Rows of a tensor, columns of one, and boxes."""
    toy: Any = toy_with_uneven_layers()
    toy.save_pretrained(tmp_path / "tuned")
    shutil.copytree(tmp_path / "tuned", tmp_path / "base")
    noise = {n: t + 0.01 * torch.randn_like(t) for n, t in tensors_of(tmp_path / "tuned").items()}
    save_file(noise, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert together(count, saves, tmp_path / "parts", kind) == [0] * count
    for i, options in enumerate(({"modules": "attn"}, {"mode": "interpolate", "modules": "q,o,mlp"})):
        settings: dict[str, Any] = {"strength": 0.5, **options}
        rlspec.restore_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / f"right-{i}", **settings)
        rlspec.restore_checkpoint(tmp_path / "base", tmp_path / "parts", tmp_path / f"out-{i}", **settings)
        assert_same_output(tmp_path / f"out-{i}", tmp_path / f"right-{i}")


def test_several_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    base, tuned, parts = trio(tmp_path, shard="60KB")
    shutil.rmtree(tuned)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tuned, max_shard_size="60KB")
    tune(tuned, tmp_path / "tuned-too")
    saved_otherwise(parts, lambda state: state.update(tensors_of(tmp_path / "tuned-too")))
    rlspec.restore_checkpoint(base, tmp_path / "tuned-too", tmp_path / "right", **LAUNCHED)
    ended = launched(3, (base, parts), tmp_path / "out")
    assert [one.code for one in ended] == [0, 0, 0], ended
    found, right = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "right")
    assert found.keys() == right.keys() and all(bits(found[n]) == bits(t) for n, t in right.items())


@contextmanager
def stopped_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, Ctrl-C comes after so many writes; it must come."""
    right, calls = CheckpointWriter._write, []

    def stopped(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) > writes:
            raise KeyboardInterrupt
        right(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointWriter, "_write", stopped)
        yield


@pytest.mark.parametrize("stop_after", [1, 9])
def test_an_interrupted_restoration_goes_on_to_the_same_bytes(
    stop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, parts = trio(tmp_path, shard="60KB")
    rlspec.restore_checkpoint(base, tuned, tmp_path / "right")
    with stopped_after(stop_after, monkeypatch):
        rlspec.restore_checkpoint(base, parts, tmp_path / "out")
    rlspec.restore_checkpoint(base, parts, tmp_path / "out", resume=True)
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "right")
    assert found.keys() == wanted.keys() and all(bits(found[n]) == bits(t) for n, t in wanted.items())


def test_parts_written_anew_are_not_mixed_with_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, parts = trio(tmp_path, shard="60KB")
    with stopped_after(9, monkeypatch):
        rlspec.restore_checkpoint(base, parts, tmp_path / "out")
    file = next((parts / "pytorch_model_fsdp_0").glob("*.distcp"))
    file.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="other"):
        rlspec.restore_checkpoint(base, parts, tmp_path / "out", resume=True)


def saved_otherwise(parts: Path, change: Any) -> None:
    """The same model with other tensors."""
    place = parts / "pytorch_model_fsdp_0"
    state = AutoModelForCausalLM.from_pretrained(parts.parent / "tuned").state_dict()
    change(state)
    shutil.rmtree(place)
    save({"model": state}, place)


NAME = "model.layers.1.self_attn.o_proj.weight"
WAY = "write its weights as safetensors first: accelerate merge-weights .* OUT"


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("llama", lambda s: s.pop(NAME), f"lacks {NAME}, which its base .* has; .*{WAY}"),
        (
            "llama",
            lambda s: s.update(score=torch.ones(2, 3)),
            rf"holds score of shape \[2, 3\], which .* {WAY}",
        ),
        (
            "llama",
            lambda s: s.update({NAME: torch.ones(64, 48)}),
            rf"{NAME} is \[64, 48\], which its base .* has as \[64, 64\]; .*{WAY}",
        ),
        (
            "tied llama",
            lambda s: s.update({"lm_head.weight": s["lm_head.weight"] + 1}),
            r"holds lm_head\.weight of shape \[48, 64\], which its base .* has not; .*",
        ),
    ],
    ids=["missing", "too many", "another shape", "an untied head"],
)
def test_a_model_that_is_not_laid_out_like_its_base_is_refused(
    kind: str, change: Any, told: str, tmp_path: Path
) -> None:
    base, _, parts = trio(tmp_path, kind)
    saved_otherwise(parts, change)
    with pytest.raises(CheckpointError, match=told) as caught:
        rlspec.restore_checkpoint(base, parts, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_head_of_a_tied_model_may_be_there_or_not(tmp_path: Path) -> None:
    """Also where the base stores it twice: it is written as the embedding is."""
    base, tuned, parts = trio(tmp_path, "tied llama")
    rlspec.restore_checkpoint(base, tuned, tmp_path / "right", modules="q,embed")
    saved_otherwise(parts, lambda state: state.pop("lm_head.weight"))
    rlspec.restore_checkpoint(base, parts, tmp_path / "without", modules="q,embed")
    assert_same_output(tmp_path / "without", tmp_path / "right")
    for folder in (base, tuned):
        tensors = tensors_of(folder)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rlspec.restore_checkpoint(base, tuned, tmp_path / "twice", modules="q,embed")
    rlspec.restore_checkpoint(base, parts, tmp_path / "without-twice", modules="q,embed")
    assert_same_output(tmp_path / "without-twice", tmp_path / "twice")
    saved_otherwise(parts, lambda state: None)
    rlspec.restore_checkpoint(base, parts, tmp_path / "with-twice", modules="q,embed")
    assert_same_output(tmp_path / "with-twice", tmp_path / "twice")


def test_nan_is_told_where_it_would_spread_and_copied_elsewhere(tmp_path: Path) -> None:
    base, _, parts = trio(tmp_path)

    def spoil(name: str) -> Any:
        return lambda state: state[name].view(-1).__setitem__(5, torch.nan)

    saved_otherwise(parts, spoil("model.norm.weight"))
    rlspec.restore_checkpoint(base, parts, tmp_path / "out")
    assert tensors_of(tmp_path / "out")["model.norm.weight"].isnan().sum() == 1
    saved_otherwise(parts, spoil("model.layers.0.self_attn.k_proj.weight"))
    with pytest.raises(TensorError, match=r"pytorch_model_fsdp_0: model.layers.0.*k_proj.*1 of 2048 values"):
        rlspec.restore_checkpoint(base, parts, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_codes_in_the_base_and_numbers_in_the_parts_have_no_layout_in_common(tmp_path: Path) -> None:
    base, _, parts = trio(tmp_path)
    tensors = tensors_of(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match="is stored as codes, and .* holds numbers: .*dequantise the base"
    ):
        rlspec.restore_checkpoint(base, parts, tmp_path / "out")


def test_tensors_without_rows_and_of_other_kinds_are_copied_too(tmp_path: Path) -> None:
    base, tuned, parts = trio(tmp_path)
    more = {
        "extra.empty": torch.empty(0, 4),
        "extra.scalar": torch.tensor(7),
        "extra.mask": torch.tensor([True, False, True]),
        "extra.columns": torch.arange(12.0).reshape(3, 4).T,
    }
    for folder in (base, tuned):
        saved = tensors_of(folder) | {name: tensor.contiguous() for name, tensor in more.items()}
        save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    saved_otherwise(parts, lambda state: state.update(tensors_of(tuned) | more))
    rlspec.restore_checkpoint(base, tuned, tmp_path / "right")
    rlspec.restore_checkpoint(base, parts, tmp_path / "out")
    assert_same_output(tmp_path / "out", tmp_path / "right")


def test_the_base_itself_must_be_safetensors(tmp_path: Path) -> None:
    base, _, parts = trio(tmp_path)
    with pytest.raises(CheckpointError, match=f"not read here; {WAY}"):
        rlspec.restore_checkpoint(parts, base, tmp_path / "out")


def test_the_tokenizer_of_the_training_goes_before_the_base_s(tmp_path: Path) -> None:
    base, _, parts = trio(tmp_path)
    for folder, text in ((base, "old"), (parts, "new")):
        (folder / "chat_template.jinja").write_text(text)
    (parts / "trainer_state.json").write_text("{}")
    rlspec.restore_checkpoint(base, parts, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "new"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in base.iterdir()}


def test_the_command_tells_what_it_copies_and_writes_it(tmp_path: Path) -> None:
    base, tuned, parts = trio(tmp_path, "tied llama")
    command = ["restore", "--base", str(base), "--tuned", str(parts)]
    dry = CliRunner().invoke(main, [*command, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "restore 6, copy 14" in dry.output and not (tmp_path / "out").exists()
    assert "lm_head.weight: a copy of model.embed_tokens.weight, which the base stores once" in dry.output
    done = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "restored 6 matrices (k 2, q 2, v 2), kept 14 tensors" in done.stdout
    rlspec.restore_checkpoint(base, tuned, tmp_path / "right")
    assert_same_output(tmp_path / "out", tmp_path / "right")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tensor_comes_in_row_blocks_within_the_memory(kind: str, tmp_path: Path) -> None:
    base, tuned, parts = trio(tmp_path, kind)
    model = DistributedModel.open(parts, CheckpointIndex.open(base))
    for name, tensor in tensors_of(tuned).items():
        if tensor.ndim == 2 and tensor.numel() > 4096:
            assert model.comes_by_rows(name)
            blocks = [(at, block.clone()) for at, block in model.rows(name, memory_bytes=70_000)]
            assert [at for at, _ in blocks] == [
                sum(len(b) for _, b in blocks[:i]) for i in range(len(blocks))
            ]
            assert len(blocks) > 3 and all(4 * block.nbytes <= 70_000 for _, block in blocks)
            assert torch.equal(torch.cat([block for _, block in blocks]), tensor)
