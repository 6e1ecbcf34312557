"""The files beside the weights: which are copied into an output, and which stay behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from writer_toys import INDEX, QUERIES, TENSORS, content, load, make, new, write

from rlspec.errors import CheckpointError
from rlspec.io.companions import companions, left_behind
from rlspec.io.index import CheckpointIndex
from rlspec.io.stream import read_tensor


def test_companions(tmp_path: Path) -> None:
    """A snapshot of the download cache: links become files; other weights stay behind, and folders that hold some."""
    make(tmp_path / "plain")
    repository = tmp_path / "models--someone--model"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    others = ("pytorch_model.bin", "consolidated.00.pth", "model.gguf", "other.safetensors", "tf_model.h5")
    for name in (*others, "pytorch_model.bin.index.json"):
        (snapshot / name).write_bytes(b"weights")
    for name in (".cache/x", "checkpoint-5/config.json", "checkpoint-5/deep/optimizer.pt"):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(b"x")
    templates = snapshot / "additional_chat_templates"
    templates.mkdir()
    (repository / "blobs" / "jinja").write_text("{{ tools }}")
    (templates / "tool_use.jinja").symlink_to("../../../blobs/jinja")
    (snapshot / "elsewhere").symlink_to(tmp_path)  # a folder by a link: nobody's to copy
    below = snapshot / "below"  # a model in a folder of the repository
    below.mkdir()
    (below / "model.safetensors").symlink_to("../../../blobs/single")
    save_file({"a": torch.zeros(2)}, repository / "blobs" / "single")
    assert list(CheckpointIndex.open(below).tensors) == ["a"]
    out = write(tmp_path / "out", CheckpointIndex.open(snapshot), {})
    left = {*others, "pytorch_model.bin.index.json", ".cache", "checkpoint-5", "elsewhere", "below"}
    assert {p.name for p in out.iterdir()} == {p.name for p in snapshot.iterdir()} - left
    expected = {str(p.relative_to(out)) for p in out.rglob("*") if not p.is_dir()}
    assert {"tokenizer.json", "additional_chat_templates/tool_use.jinja"} < expected
    assert not any(p.is_symlink() for p in out.rglob("*"))
    assert all((out / n).read_bytes() == (snapshot / n).read_bytes() for n in expected)
    (tmp_path / "secret").write_text("key")
    (snapshot / "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="symbolic link that leaves"):
        write(tmp_path / "other", CheckpointIndex.open(snapshot), {})
    assert not (tmp_path / "other").exists()


def test_what_looks_like_weights_is_named_or_belongs_to_the_model(tmp_path: Path) -> None:
    like = make(tmp_path / "in")
    known = (
        "pytorch_model.bin",
        "model-q4.gguf",
        "optimizer.pt",
        "rng_state_0.pth",
        "checkpoint-5/model.safetensors",
    )
    unknown = ("spk_dict.pt", "3_Dense/model.safetensors", "3_Dense/config.json")
    named = ("2_Dense/model.safetensors", "2_Dense/config.json", "1_Pooling/config.json")
    for name in (*known, *unknown, *named):
        (like.path / name).parent.mkdir(exist_ok=True)
        (like.path / name).write_bytes(b"{}")
    assert left_behind(like) == (
        f"not copied from {like.path}: spk_dict.pt, 2_Dense/, 3_Dense/, which look like other weights; copy them if the "
        "model needs them"
    )
    paths = ["", "1_Pooling", "2_Dense", "../3_Dense"]
    listed = [{"idx": number, "path": path} for number, path in enumerate(paths)]
    (like.path / "modules.json").write_text(json.dumps(listed))
    assert "spk_dict.pt, 3_Dense/, which" in left_behind(like)
    out = write(tmp_path / "out", like, {})
    assert set(named) < content(out).keys() and not {*known, *unknown} & content(out).keys()
    (like.path / "modules.json").write_text('{"path": "2_Dense"}')  # not what sentence-transformers writes
    assert "2_Dense/" in left_behind(like)
    for name in ("spk_dict.pt", "2_Dense", "3_Dense"):
        path = like.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert left_behind(like) == ""


def test_links_that_are_not_followed_stop_nothing(tmp_path: Path) -> None:
    """Files of a tokenizer that gives way to another, and what lies beside that other one."""
    like = make(tmp_path / "in")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text("{}")
    (tmp_path / "secret").write_text("key")
    (adapter / "README.md").symlink_to(tmp_path / "secret")
    (like.path / "vocab.json").symlink_to(tmp_path / "secret")
    (like.path / "tokenizer.json").unlink()
    (like.path / "tokenizer.json").symlink_to("gone.json")
    found = companions(like, adapter)
    assert {str(p) for p in found} == {"config.json", "LICENSE", "tokenizer.json", "tokenizer_config.json"}
    (adapter / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"adapter/tokenizer\.model: a symbolic link that leaves"):
        companions(like, adapter)
    (adapter / "tokenizer.model").unlink()
    (like.path / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"in/notes\.txt: a symbolic link that leaves"):
        companions(like, adapter)


def test_parts_of_a_training_stay_behind(tmp_path: Path) -> None:
    """What FSDP leaves beside weights that were merged out of it: states, and the same weights unchanged."""
    like = make(tmp_path / "in")
    for folder in ("pytorch_model_fsdp_0", "optimizer_0", "."):
        (like.path / folder).mkdir(exist_ok=True)
        for name in (".metadata", "__0_0.distcp"):
            (like.path / folder / name).write_bytes(b"x")
    (like.path / "half").mkdir()
    (like.path / "half" / ".metadata").write_bytes(b"x")  # before its parts came
    out = write(tmp_path / "out", like, {})
    assert not [path.name for path in out.rglob("*") if path.is_dir() or path.name[:2] in ("__", ".m")]
    assert (out / "config.json").exists()


def test_companions_that_are_links_to_elsewhere_are_named(tmp_path: Path) -> None:
    """They would be copied unseen, other than weights, which are read as such. A folder of links to another one."""
    like = make(tmp_path / "store")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in like.path.iterdir():
        (linked / file.name).symlink_to(file)
    for missing, named in (
        (False, r"LICENSE: .*leaves.*store/LICENSE \(3 more do so\).*put a copy"),
        (True, "not there"),
    ):
        with pytest.raises(CheckpointError, match=named) as caught:
            write(tmp_path / "out", CheckpointIndex.open(linked), QUERIES)
        assert "\n" not in str(caught.value)
        if not missing:
            (like.path / "tokenizer.json").unlink()
    for file in linked.iterdir():
        if not file.name.startswith("model"):
            file.unlink()
    (linked / "latest").symlink_to("checkpoint-7")  # leads nowhere, and was no file
    out = write(tmp_path / "out", CheckpointIndex.open(linked), QUERIES)
    assert load(out).keys() == TENSORS.keys() and not any(p.is_symlink() for p in out.iterdir())


def test_an_index_that_the_checkpoint_does_not_go_by_stays_behind(tmp_path: Path) -> None:
    """Loaders that trust an index would look for shards that are not there."""
    like = make(tmp_path / "in")
    save_file(load(like.path), like.path / "model.safetensors", metadata={"format": "pt"})
    both = CheckpointIndex.open(like.path)
    assert {entry.shard.name for entry in both.tensors.values()} == {"model.safetensors"}
    out = write(tmp_path / "out", both, {"scalar": torch.float32})
    assert not (out / INDEX).exists() and load(out).keys() == TENSORS.keys()
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]


def test_shards_of_any_name_are_no_companions(tmp_path: Path) -> None:
    """An index may name its shards as it likes; the finished ones are not replaced by the old ones."""
    like = make(tmp_path / "in")
    index = (like.path / INDEX).read_text()
    for shard in {entry.shard for entry in like.tensors.values()}:
        shard.rename(shard.with_suffix(".st"))
    (like.path / INDEX).write_text(index.replace(".safetensors", ".st"))
    out = write(tmp_path / "out", CheckpointIndex.open(like.path), QUERIES)
    index = CheckpointIndex.open(out)
    assert torch.equal(read_tensor(index, "layers.0.q"), new("layers.0.q"))
