"""The language model told from the other models of a multimodal checkpoint, against transformers' own modules."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
import transformers
from restore_toys import bytes_of, pair, rewrite, tensors_of

import rlspec
from rlspec.errors import OptionError
from rlspec.io.projections import find_projections, language_model
from rlspec.restore.options import RestoreOptions
from rlspec.restore.select import select
from rlspec.spectra.basis import SpectralBasis

TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {**TEXT, "hidden_size": 12, "num_hidden_layers": 3, "image_size": 8, "patch_size": 4}
MLLAMA_VISION = {**VISION, "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 32}


def _llava() -> Any:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**VISION)
    )


def _mllama() -> Any:
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    vision = {**MLLAMA_VISION, "intermediate_layers_indices": [0]}
    return transformers.MllamaConfig(text_config=text, vision_config=vision)


def _csm() -> Any:
    """A speech model: beside the language model a decoder of frames, which is a small Llama, and a codec."""
    depth = {**TEXT, "num_hidden_layers": 1, "backbone_hidden_size": 16}
    return transformers.CsmConfig(**TEXT, depth_decoder_config=depth, num_codebooks=4)


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize(
    ("build", "kind", "inner"),
    [
        (_llava, "LlavaForConditionalGeneration", "model.language_model"),
        (_mllama, "MllamaForConditionalGeneration", "model.language_model"),
        (_csm, "CsmForConditionalGeneration", "backbone_model"),
    ],
)
def test_the_language_models_layers_are_those_of_transformers(
    build: Any, kind: str, inner: str, renamed: bool
) -> None:
    """Also where the vision model has a name that nobody knows."""
    config = build()
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    truth = {f"{inner}.{name}" for name, _ in model.get_submodule(inner).named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if renamed:
        shapes = {name.replace("vision_", "xpm_"): shape for name, shape in shapes.items()}
    found = find_projections(shapes, "attn,mlp", config.to_dict())
    assert {p.tensor for p in found} == {n for n in truth if re.search(r"\d\..*_proj\.weight$", n)}
    layers = config.get_text_config().num_hidden_layers
    assert {p.layer for p in found if p.layer is not None} == set(range(layers))
    part = language_model(shapes, config.to_dict())
    assert part.layers == layers
    assert part.note is not None
    assert part.note.startswith(
        f"the language model's layers are {inner}.layers ({layers}); not part of it: "
    )


def shapes_of(prefix: str, layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """A decoder with its embedding; layers under ``prefix``."""
    parts = {"self_attn.q_proj": (2 * width, width), "self_attn.o_proj": (width, 2 * width)}
    parts["mlp.up_proj"] = (3 * width, width)
    names = {f"{prefix}layers.{i}.{part}.weight": s for i in range(layers) for part, s in parts.items()}
    return {**names, f"{prefix}embed_tokens.weight": (40, width)}


OMNI: dict[str, Any] = {
    "thinker_config": {
        "text_config": {"num_hidden_layers": 2, "hidden_size": 16},
        "audio_config": {"num_hidden_layers": 4, "d_model": 16},
    },
    "talker_config": {"text_config": {"num_hidden_layers": 2, "hidden_size": 16}},
}
MINICPM = {"num_hidden_layers": 2, "hidden_size": 16, "vision_config": {"num_hidden_layers": 4}}
PLAIN = {"num_hidden_layers": 2, "hidden_size": 16}


@pytest.mark.parametrize(
    ("own", "others", "config"),
    [
        ("llm.model.", [("vpm.encoder.", 4, 8), ("apm.", 3, 8), ("tts.model.", 5, 12)], MINICPM),
        # Of the language model's own size: the sections' names tell.
        ("thinker.model.", [("thinker.audio_tower.", 4, 16), ("talker.model.", 2, 16)], OMNI),
        # Of the language model's own width; further layers that predict more tokens, or fewer.
        ("model.", [("resampler.", 1, 16)], PLAIN),
        ("model.language_model.", [("model.inner.encoder.", 3, 8)], {"text_config": PLAIN}),
        ("", [("extra.", 3, 8)], PLAIN),
        ("model.", [("model.extra.encoder.", 3, 8)], PLAIN),
        # Nothing but names.
        ("llm.model.", [("vpm.encoder.", 4, 8), ("apm.", 3, 8), ("talker.model.", 2, 16)], None),
    ],
)
def test_other_models_are_left_out(own: str, others: list[tuple[str, int, int]], config: Any) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, layers, width in others:
        shapes |= shapes_of(prefix, layers, width)
    shapes |= shapes_of(own, 2, 16)
    found = find_projections(shapes, "q,o,mlp,embed", config)
    assert {p.tensor for p in found} == set(shapes_of(own, 2, 16))
    chosen = select(shapes, RestoreOptions(modules="q", layers="50%:100%"), config).chosen
    assert list(chosen) == [f"{own}layers.1.self_attn.q_proj.weight"]


def test_layers_that_predict_further_tokens_belong_to_the_stack() -> None:
    shapes = {**shapes_of("model.", 3, 16), **shapes_of("xpm.", 2, 8)}
    assert language_model(shapes, PLAIN).layers == 3


def test_stacks_that_nothing_tells_apart_are_all_taken_and_told(caplog: pytest.LogCaptureFixture) -> None:
    shapes = {**shapes_of("actor.model.", 2, 16), **shapes_of("critic.model.", 3, 8)}
    note = (
        "several stacks of layers are taken for the language model's: "
        "actor.model.layers (2), critic.model.layers (3)"
    )
    selection = select(shapes, RestoreOptions(modules="q"), None)
    assert len(selection.chosen) == 5 and selection.note == note
    with pytest.raises(OptionError, match=r"layers=.0.: several stacks.*regular expression for modules"):
        select(shapes, RestoreOptions(modules="q", layers="0"), None)
    with caplog.at_level(logging.WARNING):
        basis = SpectralBasis.from_tensors(
            {n: torch.randn(s) for n, s in shapes.items() if "q_proj" in n}, modules="q"
        )
    assert len(basis) == 5 and [r.getMessage() for r in caplog.records] == [note]


def test_both_halves_of_an_encoder_decoder_model_are_meant() -> None:
    sizes = {"d_model": 16, "vocab_size": 40, "encoder_layers": 2, "decoder_layers": 1}
    config = transformers.BartConfig(
        **sizes, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=16
    )
    with torch.device("meta"):
        model = transformers.BartForConditionalGeneration(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(find_projections(shapes, "q", config.to_dict())) == 3


def test_a_tower_is_not_the_language_model_where_that_has_names_that_nobody_knows() -> None:
    """A decoder in blocks, or with matrices of unknown names: its number of layers still tells."""
    tower = shapes_of("vision_model.encoder.", 3, 8)
    for own, config in (
        ("transformer.blocks", None),
        ("language_model.layers", PLAIN),
        ("xlm.layers", PLAIN),
    ):
        unknown = {f"{own}.{i}.attention.wqkv.weight": (48, 16) for i in range(2)}
        part = language_model({**tower, **unknown}, config)
        assert not part.holds("vision_model.encoder.layers.0.mlp.up_proj.weight")
        assert part.holds(f"{own}.0.attention.wqkv.weight")
        assert part.layers == (0 if "blocks" in own else 2)
        nobody = {**shapes_of("xpm.", 3, 16), **unknown}
        if "layers" in own:
            assert not language_model(nobody, config).holds("xpm.layers.0.mlp.up_proj.weight")


def test_stacks_without_known_matrices_do_not_count() -> None:
    shapes = {**shapes_of("model.", 2, 16), **{f"projector.layers.{i}.weight": (16, 8) for i in range(5)}}
    for config in (PLAIN, None):
        part = language_model(shapes, config)
        assert (part.layers, part.note) == (2, None)


def test_one_stack_is_never_doubted() -> None:
    part = language_model(shapes_of("xpm.", 2, 16), {"num_hidden_layers": 7, "hidden_size": 5})
    assert part.note is None and part.holds("xpm.layers.0.self_attn.q_proj.weight")


def test_a_tower_of_any_name_stays_to_the_bit(tmp_path: Any) -> None:
    """The whole restoration: the tower comes out as tuned, told and with a reason, and a pattern still chooses it."""
    base, tuned = pair(tmp_path)
    for folder, size in ((base, 1.0), (tuned, 1.1)):
        tower = torch.linspace(-size, size, 24 * 16).sin().view(24, 16)
        rewrite(
            folder,
            lambda t, w=tower: t.update(
                {f"xpm.layers.{i}.self_attn.q_proj.weight": w.clone() for i in (0, 5)}
            ),
        )
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "out", modules="q", layers="50%:100%")
    assert [row.tensor for row in report.matrices] == ["model.layers.1.self_attn.q_proj.weight"]
    tower_name = "xpm.layers.5.self_attn.q_proj.weight"
    assert report.kept[tower_name] == "part of another model"
    assert torch.equal(tensors_of(tmp_path / "out")[tower_name], tensors_of(tuned)[tower_name])
    assert report.notes == (
        "the language model's layers are model.layers (2); not part of it: xpm.layers (6)",
    )
    again = rlspec.restore_checkpoint(base, tuned, tmp_path / "2", modules=r"^xpm\.", mode="copy")
    assert {row.tensor for row in again.matrices} == {
        f"xpm.layers.{i}.self_attn.q_proj.weight" for i in (0, 5)
    }
    assert bytes_of(tmp_path / "2") != bytes_of(tuned)


def test_another_models_layers_are_no_counterpart(tmp_path: Any) -> None:
    """A base with a second decoder of the same names beside the language model, which alone was tuned."""
    base, tuned = pair(tmp_path)
    rlspec.restore_checkpoint(base, tuned, tmp_path / "plain", modules="q")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"llm.{name}"] = tensors.pop(name)
            tensors[f"xpm.{name}"] = torch.zeros(2 * 48, 48)

    rewrite(base, change)
    rlspec.restore_checkpoint(base, tuned, tmp_path / "out", modules="q")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "plain")
