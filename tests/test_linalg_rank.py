"""Rank rules: share, count, snap to a gap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlspec.errors import OptionError
from rlspec.linalg.rank import Rank
from rlspec.linalg.svd import svd


@pytest.mark.parametrize(
    ("given", "r", "expected"),
    [
        (0.2, 192, 38),
        ("0.2", 192, 38),
        (768, 3584, 768),
        ("768", 512, 512),
        (1.0, 7, 7),
        (1, 7, 1),
        ("1.0", 7, 7),
        ("1", 7, 1),
        ("1.00", 7, 7),
        (1e-05, 7, 1),
        (".5", 8, 4),
        (np.float64(0.25), 8, 2),
        (np.int64(3), 8, 3),
        (0.01, 10, 1),
    ],
)
def test_share_and_count(given, r, expected):
    assert Rank.parse(given).resolve(r) == expected
    assert Rank.parse(given).resolve(torch.ones(r)) == expected


def test_gap_snaps_to_the_largest_relative_drop_within_five_percent():
    s = torch.linspace(2.0, 1.0, 200, dtype=torch.float64)
    s[41:] -= 0.3  # the gap sits after 41 values; the share alone says 40
    s[60:] -= 0.5  # a larger gap, too far away
    assert Rank.parse("gap:0.2").resolve(s) == 41
    assert Rank.parse("0.2").resolve(s) == 40


def test_gap_needs_values_and_survives_tiny_spectra():
    with pytest.raises(OptionError, match="singular values"):
        Rank.parse("gap:0.2").resolve(100)
    assert Rank.parse("gap:0.5").resolve(torch.ones(1)) == 1
    assert Rank.parse("gap:1").resolve(torch.ones(5)) == 5


def test_energy_is_the_fewest_values_that_hold_the_share():
    s = torch.tensor([4.0, 2.0, 2.0, 1.0])  # squares 16, 4, 4, 1 of 25
    found = {
        share: Rank.parse(f"energy:{share}").resolve(s) for share in (0.1, 0.64, 0.65, 0.8, 0.81, 0.97, 1)
    }
    assert found == {0.1: 1, 0.64: 1, 0.65: 2, 0.8: 2, 0.81: 3, 0.97: 4, 1: 4}
    assert Rank.parse("energy:0.5").resolve(torch.zeros(3)) == 1
    with pytest.raises(OptionError, match="singular values"):
        Rank.parse("energy:0.9").resolve(100)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "x",
        0,
        0.0,
        -1,
        1.5,
        "gap:2",
        "gap:",
        "nan",
        "gap:nan",
        -0.2,
        "energy:0",
        "energy:x",
        ":0.2",
        "gaps:0.2",
    ],
)
def test_invalid_ranks_are_refused(bad):
    with pytest.raises(OptionError, match="not valid"):
        Rank.parse(bad)


@pytest.mark.parametrize("either", ["1.", "1e0", "01", "+1", "1_0", 64.0, "64.0", True, "\u0661"])
def test_what_could_be_a_share_or_a_count_is_refused_and_both_are_told(either):
    with pytest.raises(OptionError, match=r"1\.0 is all directions.*1 is one direction"):
        Rank.parse(either)


@pytest.mark.parametrize(
    "text", ["0.2", "768", "gap:0.2", "energy:0.9", "1", "1.0", "0.123456789", "gap:1.0"]
)
def test_text_round_trip(text):
    assert str(Rank.parse(text)) == text


def test_one_direction_and_all_of_them_stay_apart_as_text():
    # Reports and the fingerprint of a restoration hold the text.
    assert Rank.parse(str(Rank.parse(1))).resolve(9) == 1
    assert Rank.parse(str(Rank.parse(1.0))).resolve(9) == 9


@pytest.mark.parametrize("r", [1, 2, 5, 7, 10])
def test_svd_takes_a_share_for_as_many_directions_as_a_rank_does(r):
    shares = [0.01, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9, 0.99, 1.0, 1]
    a = torch.randn(r, r + 3)
    assert [svd(a, share).S.shape[-1] for share in shares] == [Rank.parse(s).resolve(r) for s in shares]
    # By hand, for the largest: ties go to the even neighbour.
    if r == 10:
        assert [Rank.parse(s).resolve(r) for s in shares] == [1, 1, 2, 3, 5, 8, 9, 10, 10, 1]
