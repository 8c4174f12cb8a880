import math

import pytest
import torch

from rewards import Rewards, load_rewards
from tiny.validity import (auc, comparisons, plain_sum, print_row, standardised_sum, summarise, validate,
                           win_rate)
from tiny.world import random_scene


def test_ties_count_half():
    assert win_rate([1, 2, 3], [0, 2, 4])[0] == .5
    assert auc([3, 4], [1, 2]) == (1, 1, 1)
    assert auc([1, 2], [1, 2])[0] == .5


def test_auc_is_the_chance_of_outranking_and_its_interval_covers_it():
    """Of two normals a deviation apart: Phi(1/sqrt 2) = .760, with a standard error of about .017."""
    x, y = torch.randn(2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x + 1
    area, low, high = auc(x.tolist(), y.tolist())
    assert area == pytest.approx((x[:, None] > y).double().mean().item())
    assert low < .760 < high
    assert .05 < high - low < .08


def test_standardised_terms_weigh_alike():
    """A term in other units changes nothing; the better member of a group has the higher sum."""
    scores = torch.tensor([[[.9, 3.0], [.1, 1.0]], [[.5, 8.0], [.4, 2.0]]])  # (groups, members, terms)
    total = standardised_sum(scores)
    assert (total[:, 0] > total[:, 1]).all()
    assert torch.allclose(standardised_sum(scores * torch.tensor([1.0, 100.0])), total, atol=1e-4)


def test_a_sum_without_a_term_is_of_the_others():
    scores = torch.tensor([[[1.0, 20.0, 300.0, 4000.0]]])  # meta, recon, traj, general
    assert plain_sum(scores).item() == 4321
    assert plain_sum(scores, "recon").item() == 4301
    assert plain_sum(scores, "general").item() == 321


def test_what_could_not_be_scored_is_left_out(capsys):
    """NaN ranks nothing, for no kind and in no count; a clip whose scores are all alike has no correlation."""
    row = dict(good=[1.0, 1.0, math.nan, 1.0], bad=[0.0, 0.0, 0.0, math.nan], kinds=["a", "b", "a", "b"],
               grid=[[1.0, .5, 0.0], [1.0, 1.0, 1.0], [1.0, math.nan, 0.0]])
    summarise(row, [0.0, .5, 1.0])
    assert row["pairs"][0] == row["kinds_right"]["a"] == row["kinds_right"]["b"] == row["rho"] == 1
    print_row("x", row)
    assert "  2 pairs  right 1.000" in capsys.readouterr().out


@torch.no_grad()
def test_a_judge_that_fails_is_left_out_and_no_fault():
    class Blind(Rewards):
        def depth_anything(self, video, views):
            raise ValueError("sees nothing")

    blind = Blind(views=5, weights=dict(meta=0, recon=0, general=0))
    blind.load = lambda dynamic=False: blind
    scene = random_scene("validate/0", "static", 0)
    for name, kind, score in comparisons(blind, scene, 0, 0):
        if name.startswith(("re-render", "meta", "traj")):
            assert math.isnan(score(0.0)) and math.isnan(score(.5)), name


def test_the_shipped_twins_tell_good_from_bad(capsys):
    """The suite on 8 clips: every term ranks most of its pairs right, the geometric ones nearly all."""
    table = validate(load_rewards(views=5).load(), num=8, seed=1, levels=2)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(table) + 1 == 15
    assert printed[-1].startswith("epipolar error with re-projection, over the strengths of a clip: Spearman warp ")
    for name, row in table.items():
        rate, low, high = row["pairs"]
        assert 0 <= low <= rate <= high <= 1
        if "weaker" not in name and "without" not in name:
            assert rate >= .75, (name, rate)
    for name in ("recon: clip against corrupted", "traj: right word against wrong", "total, standardised in its group",
                 "re-render where the prompt asked"):
        assert table[name]["pairs"][0] > .9, name
    assert table["recon: clip against corrupted"]["rho"] > .5
    assert math.isnan(table["traj: right word against wrong"]["rho"])
