"""The settings of a restoration: which indices, which layers, which tensors, and what is refused."""

from __future__ import annotations

import pytest

from rlspec.errors import OptionError, ProjectionError
from rlspec.restore import RestoreOptions
from rlspec.restore.select import select

NAMES = {
    "model.embed_tokens.weight": (48, 8),
    **{
        f"model.layers.{i}.{name}.weight": shape
        for i in range(10)
        for name, shape in {
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "mlp.down_proj": (8, 16),
            "input_layernorm": (8,),
            "extra.mixer": (8, 8),
        }.items()
    },
    "visual.blocks.3.attn.qkv.weight": (24, 8),
    "visual.layers.40.self_attn.q_proj.weight": (8, 8),
    "lm_head.weight": (48, 8),
}


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        (None, 10, None),
        ("3", 10, {3}),
        ("0-2,9", 10, {0, 1, 2, 9}),
        ("0:2", 10, {0, 1}),
        ("0:25%", 28, set(range(7))),
        ("0:25%", 6, {0, 1}),
        ("25%:50%", 6, {2}),
        ("50%:100%, 0", 6, {3, 4, 5, 0}),
        ("0:10%", 10, {0}),
    ],
)
def test_layers(layers, count, expected):
    found = RestoreOptions(layers=layers).chosen_layers(count)
    assert found == (None if expected is None else frozenset(expected))


@pytest.mark.parametrize("count", [1, 5, 28, 33, 80])
def test_neighbouring_shares_of_layers_meet(count):
    quarters = [RestoreOptions(layers=f"{a}%:{a + 25}%") for a in (0, 25, 50, 75)]
    found = []
    for options in quarters:
        try:
            found += sorted(options.chosen_layers(count))
        except OptionError:
            assert count < 4
    assert found == list(range(count))


@pytest.mark.parametrize("layers", ["x", "0-", "-3", "0:25%:2", "", "0%-25%", "25%", "0 1"])
def test_layers_that_cannot_be_read(layers):
    with pytest.raises(OptionError, match="is not valid: give for example 0:25%"):
        RestoreOptions(layers=layers)


@pytest.mark.parametrize("layers", ["0-28", "28", "5:5", "9-3", "0:29"])
def test_layers_that_do_not_exist(layers):
    with pytest.raises(OptionError, match="here; the model has 28 layers, 0 to 27"):
        RestoreOptions(layers=layers).chosen_layers(28)


def test_parts_become_indices():
    assert RestoreOptions().arguments(10) == {"mode": "directions"}
    assert RestoreOptions(part="tail").arguments(10) == {"mode": "tail"}
    assert RestoreOptions(part="2:64").arguments(10) == {"mode": "band", "band": (2, 10)}
    assert RestoreOptions(part="10%:25%").arguments(40) == {"mode": "band", "band": (4, 10)}
    assert RestoreOptions(part="12:64").arguments(10) is None
    assert RestoreOptions(mode="both").arguments(10) == {"mode": "directions_and_values"}
    found = [
        RestoreOptions(part=p, rank=r).directions(40) for p, r in (("2:64", 1), ("tail", 0.2), ("top", 7))
    ]
    assert found == [38, 8, 7]
    assert RestoreOptions(rank="energy:0.9").directions(40) is None
    assert RestoreOptions(mode="copy").directions(40) == 40


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "tail"}, "unknown mode 'tail'; valid: directions, values, both, copy, interpolate"),
        ({"part": "5:5"}, "the range is empty"),
        ({"part": "bottom"}, "top, tail, or indices such as"),
        ({"part": "tail", "mode": "copy"}, "takes whole matrices"),
        ({"strength": 1.01}, "not in"),
        ({"strength": float("nan")}, "not in"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'; valid: keep, float32"),
        ({"rounding": "up"}, "unknown rounding 'up'"),
        ({"rank": 0}, "rank=0 is not valid"),
    ],
)
def test_settings_that_are_refused(options, named):
    with pytest.raises(OptionError, match=named):
        RestoreOptions(**options)


def chosen(**options):
    return list(select(NAMES, RestoreOptions(**options), None).chosen)


def test_selection_by_module_and_layer():
    assert chosen(modules="q", layers="2-3") == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (2, 3)]
    # What belongs to no layer is not limited by --layers.
    assert chosen(modules=("embed", "k"), layers="9") == [
        "model.embed_tokens.weight",
        "model.layers.9.self_attn.k_proj.weight",
    ]
    assert len(chosen(modules="q,k,mlp,embed,lm_head")) == 32


def test_selection_by_regular_expression():
    assert chosen(modules=r"layers\.[12]\.extra") == [f"model.layers.{i}.extra.mixer.weight" for i in (1, 2)]
    assert chosen(modules="visual.*qkv") == ["visual.blocks.3.attn.qkv.weight"]
    assert chosen(modules="norm|lm_h") == ["lm_head.weight"]  # a vector has no singular directions
    assert len(chosen(modules="norm|lm_h", mode="copy")) == 11
    assert chosen(modules=r"layers\.4\..*\[q\]|4.*down") == ["model.layers.4.mlp.down_proj.weight"]


def test_every_other_tensor_has_a_reason():
    selection = select(NAMES, RestoreOptions(modules="q", layers="0"), None)
    assert selection.chosen.keys() | selection.reasons.keys() == NAMES.keys()
    reasons = selection.reasons
    assert reasons["model.layers.1.self_attn.q_proj.weight"] == "layer 1 is not among layers 0"
    assert reasons["model.layers.0.self_attn.k_proj.weight"] == "k is not among the modules"
    assert reasons["model.layers.0.input_layernorm.weight"] == "not a matrix"
    assert reasons["model.layers.0.extra.mixer.weight"] == "name not known"
    assert reasons["visual.layers.40.self_attn.q_proj.weight"] == "part of the vision or audio model"
    assert selection.unmatched == tuple(f"model.layers.{i}.extra.mixer.weight" for i in range(10))


def test_what_a_regular_expression_chooses_counts_as_matched():
    found = select(NAMES, RestoreOptions(modules="[0-7].extra"), None).unmatched
    assert found == tuple(f"model.layers.{i}.extra.mixer.weight" for i in (8, 9))
    with pytest.raises(OptionError, match="no 0..0 here; the model has no numbered layers"):
        select({"lm_head.weight": (4, 4)}, RestoreOptions(modules="lm_head", layers="0"), None)


def test_nothing_is_never_silent():
    with pytest.raises(ProjectionError, match="no v projection found.*regular expression"):
        chosen(modules="v")
    with pytest.raises(
        OptionError, match="as a regular expression it matches no matrix; the tensors are named"
    ):
        chosen(modules="q,kk")
    with pytest.raises(OptionError, match="nor a valid regular expression"):
        chosen(modules="q(")
    with pytest.raises(OptionError, match="no module named|unknown module"):
        chosen(modules=",")
