"""Do the rewards tell good from bad? Every term on clips whose faults are known, because the tiny world made
them.

    python -m tiny validate --views 5        200 held-out clips, each against bad copies of itself

    right   share of (clip, its bad copy) ranked right, the copies' strengths drawn from [1/2, 1]
    AUC     good against bad copies across clips: the chance that any good one outranks any bad one
    rho     how surely the score falls as the strength rises: minus their rank correlation over `levels`
            strengths from 0 to 1, averaged over the first quarter of the clips; 1 is best

right and AUC with bootstrap 95 % intervals; and the share ranked right for each way of being bad. A pair with
a term that failed (NaN) is left out.
"""

import dataclasses
import functools
import importlib.util
import math
import random
from collections import defaultdict
from itertools import compress

import numpy as np
import scipy.stats
import torch
from tqdm import tqdm

from critics import digit_score, lpips_distance
from eval import epipolar_error, interval
from grpo import standardise
from noise_warp import MOTIONS, camera_path, relative_to_first
from rewards import TERMS, meta_views, trajectory_reward
from sample import generator
from tiny.probe import reprojection
from tiny.world import CORRUPTIONS, DAMAGE, DEGRADATIONS, corrupt, damage, degrade, random_scene, render

# ------------------------------------------------------------------------------------------------- statistics

def win_rate(better, worse):
    """Share of pairs ranked right, ties counting half, with its 95 % interval -> (rate, low, high)."""
    return interval([(b > w) + .5 * (b == w) for b, w in zip(better, worse, strict=True)])


def auc(better, worse):
    """Area under the ROC curve, ties counting half, with its bootstrap 95 % interval -> (area, low, high).
    The bootstrap draws the two samples independently, as if they were of unrelated scenes."""
    def area(better, worse, axis=-1):
        test = scipy.stats.mannwhitneyu(better, worse, axis=axis, method="asymptotic")
        return test.statistic / (better.shape[axis] * worse.shape[axis])

    samples = np.array(better, dtype=float), np.array(worse, dtype=float)
    found = scipy.stats.bootstrap(samples, area, paired=False, vectorized=True, n_resamples=2000, batch=100,
                                  method="percentile", rng=np.random.default_rng(0))
    return float(area(*samples)), float(found.confidence_interval.low), float(found.confidence_interval.high)


# ------------------------------------------------------------------------------------------------ comparisons

EPIPOLAR = "epipolar error, no reward"
REPROJECTION = "re-projection, no reward"


def comparisons(rewards, scene, index, seed):
    """Yields (what is compared, how the bad copy is bad, score) for one scene.

    score(strength) judges a copy that is bad by so much, 0 the whole one. It is a float; of the total, the
    list of all terms; NaN where a judge failed. The kind "word" has no strengths: it is right or wrong.
    """
    path = camera_path(scene.motions, 17)
    video = render(scene)["video"]
    whole = rewards.score(video, scene.caption, path)

    @functools.cache
    def clip(kind, strength):
        if not strength:
            return whole
        return rewards.score(corrupt(scene, kind, strength, index), scene.caption, path)

    # The video is wrong. Judges of rigidity get a `kind` that is not freeze, for a frozen camera still films
    # a rigid world. Judges that know the path get a `fault` that may be freeze, unless the camera is fixed.
    unrigid = [name for name in CORRUPTIONS if name != "freeze"]
    kind = unrigid[index % len(unrigid)]
    yield "recon: clip against corrupted", kind, lambda strength: clip(kind, strength).scores["recon"]
    still = scene.motions == ["fixed"]
    fault = kind if still else CORRUPTIONS[index % len(CORRUPTIONS)]
    yield "total", fault, lambda strength: [clip(fault, strength).scores[name] for name in TERMS]

    def where_asked(strength):
        """As S_recon, but rendered from the requested cameras instead of the recovered ones. They are not
        rescaled: the twin of Depth Anything has learned the room's units."""
        judged = clip(fault, strength)
        rec = judged.reconstruction
        if rec is None:
            return math.nan
        asked = rec.camera_to_world[:1] @ relative_to_first(path[rec.index]).to(rec.camera_to_world)
        rerender = judged.render(asked).clamp(0, 1)
        return 1 - lpips_distance(rewards.lpips, rerender, judged.video[rec.index].to(rerender.device))

    yield "re-render where the prompt asked", fault, where_asked

    # Two judges that are not rewards: does any rigid world explain the clip? Does one filmed along the path?
    def spoiled(strength):
        return corrupt(scene, kind, strength, index) if strength else video

    if importlib.util.find_spec("cv2"):
        yield EPIPOLAR, kind, lambda strength: -epipolar_error(spoiled(strength))
    yield REPROJECTION, kind, lambda strength: -reprojection(spoiled(strength), path, gap=4)
    if not still:
        weaker = "traj: motion against weaker motion"
        yield weaker, "freeze", lambda strength: clip("freeze", strength).scores["traj"]

    # The reconstruction is wrong. The draws are not those that the critic was trained on.
    rec = whole.reconstruction
    harm = DAMAGE[index % len(DAMAGE)]

    def from_beside(strength):
        if rec is None:
            return math.nan
        draw = generator(seed, "validate", index, harm)
        broken = damage(rec, harm, strength, draw) if strength else rec
        pictures = dataclasses.replace(whole, reconstruction=broken).render(meta_views(rec))
        return float(digit_score(rewards.critic(pictures)).mean())

    yield "meta: reconstruction against broken", harm, from_beside

    # The pictures are ugly.
    frames = video[:rewards.frames_seen]
    ugly = DEGRADATIONS[index % len(DEGRADATIONS)]

    def preferred(strength):
        shown = frames
        if strength:
            shown = torch.stack([degrade(frame, ugly, strength, generator(seed, "validate", index, ugly))
                                 for frame in frames])
        return float(rewards.preference(shown, [scene.caption] * len(frames)).mean())

    yield "general: frames against degraded", ugly, preferred

    # The prompt asks for another motion.
    others = [motion for motion in MOTIONS if [motion] != scene.motions]
    wrong = random.Random(f"{seed}/{index}/wrong").choice(others)

    def as_asked(strength):
        if not strength or rec is None:
            return whole.scores["traj"]
        asked = camera_path([wrong], 17)[rec.index]
        return trajectory_reward(asked, rec.camera_to_world, rewards.alpha, rewards.beta,
                                 float(rec.depth.median()))

    yield "traj: right word against wrong", "word", as_asked


def plain_sum(scores, without=None):
    """Terms (groups, members, terms) -> totals (groups, members). without: a term that is not added."""
    kept = [index for index, name in enumerate(TERMS) if name != without]
    return scores[..., kept].sum(-1)


def standardised_sum(scores):
    """As train.py's --standardise --pooled, with all weights 1: of each term its mean in the group (a clip
    and its copies) is taken off, and the rest divided by one std over all groups. (groups, members, terms) ->
    (groups, members)"""
    groups, members, terms = scores.shape
    ids = torch.arange(groups).repeat_interleave(members)
    parts = [standardise(scores[..., term].flatten(), ids, pooled=True) for term in range(terms)]
    return sum(parts).view(groups, members)


@torch.no_grad()
def validate(rewards, num=200, seed=0, levels=5):
    """On `num` held-out tiny-world clips, how well each term tells good from bad. Prints a table, returns its
    rows.

    -> {what is compared: {good, bad: scores (n,), kinds: how each is bad, grid: scores (m, levels),
    pairs, auc: (value, low, high), rho: float or NaN}}
    """
    # Every comparison of every clip; a quarter of the clips at a grid of strengths, too.
    strengths = torch.linspace(0, 1, levels).tolist()
    table = {}
    for i in tqdm(range(num), desc="validate", unit="clip"):
        scene = random_scene(f"validate/{seed}", "static", i)
        for name, kind, score in comparisons(rewards, scene, i, seed):
            # a draw of its own: a figure does not depend on what else is compared
            bad = random.Random(f"{seed}/{i}/{name}").uniform(.5, 1)
            row = table.setdefault(name, dict(good=[], bad=[], kinds=[], grid=[]))
            row["good"].append(score(0.0))
            row["bad"].append(score(bad))
            row["kinds"].append(kind)
            if i < num // 4 and kind != "word":
                row["grid"].append([score(strength) for strength in strengths])

    # The total, two ways: a clip and its bad copy are a group, and so are the strengths of a clip. Across
    # clips, a term that differs more between scenes than between good and bad blurs the plain sum. To see
    # which one does, the plain sum is also shown without each term.
    row = table.pop("total")
    pairs = torch.tensor([row["good"], row["bad"]]).transpose(0, 1)  # (n, 2, terms)
    grid = torch.tensor(row["grid"])  # (m, levels, terms)
    totals = {"total, standardised in its group": standardised_sum, "total, plain sum": plain_sum}
    totals |= {f"plain sum without {term.label}": functools.partial(plain_sum, without=name)
               for name, term in TERMS.items()}
    for name, total in totals.items():
        good, bad = total(pairs).T.tolist()
        falls = total(grid).tolist() if len(grid) else []
        table[name] = dict(good=good, bad=bad, kinds=row["kinds"], grid=falls)

    for name, row in table.items():
        summarise(row, strengths)
        print_row(name, row)
    if EPIPOLAR in table:
        print_agreement(table[EPIPOLAR], table[REPROJECTION])
    return table


def print_agreement(row, other):
    """How two judges rank a clip's copies of all strengths: mean Spearman correlation of each way of being
    bad, over the clips where both judges give a number and tell the copies apart."""
    found = defaultdict(list)
    for kind, mine, theirs in zip(row["kinds"], row["grid"], other["grid"]):
        found[kind].append(scipy.stats.spearmanr(mine, theirs).statistic)
    words = ", ".join(f"{kind} {np.nanmean(values):.2f}" for kind, values in found.items())
    print(f"epipolar error with re-projection, over the strengths of a clip: Spearman {words}")


def summarise(row, strengths):
    """Adds to a row what its pairs say that could be scored: count, pairs, auc, kinds_right {kind: share};
    and rho, how the score falls as the strength rises (none of a clip whose scores are alike or unknown)."""
    known = [math.isfinite(good + bad) for good, bad in zip(row["good"], row["bad"])]
    good, bad, kinds = (list(compress(row[column], known)) for column in ("good", "bad", "kinds"))
    if len(good) < 2:
        raise ValueError("a comparison needs two pairs that could be scored; ask for more clips (--num)")
    row["count"] = len(good)
    row["pairs"] = win_rate(good, bad)
    row["auc"] = auc(good, bad)
    row["kinds_right"] = {}
    for kind in dict.fromkeys(kinds):
        chosen = [other == kind for other in kinds]
        row["kinds_right"][kind], _, _ = win_rate(list(compress(good, chosen)), list(compress(bad, chosen)))
    rises = [scipy.stats.spearmanr(strengths, scores).statistic for scores in row["grid"]
             if len(set(scores)) > 1 and np.isfinite(scores).all()]
    row["rho"] = -sum(rises) / len(rises) if rises else math.nan


def print_row(name, row):
    cells = [f"{name:36} {row['count']:3} pairs"]
    for label, key in (("right", "pairs"), ("AUC", "auc")):
        value, low, high = row[key]
        cells.append(f"{label} {value:.3f} [{low:.3f}, {high:.3f}]")
    if row["grid"]:
        cells.append(f"rho {row['rho']:.2f}")
    if len(row["kinds_right"]) > 1:
        cells.append(", ".join(f"{kind} {rate:.2f}" for kind, rate in row["kinds_right"].items()))
    print("  ".join(cells))
