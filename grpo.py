"""Flow-GRPO-Fast: groups of videos, advantages inside each group, a clipped surrogate on a short stochastic
window.

    group      G members of one prompt; each gets a reward r, a weighted sum of terms;
               processes share the work by batches of members                            `Batch`
    rollout    ODE steps, but for a window of a few consecutive early steps
               that are SDE steps x' ~ N(mean_theta(x), std^2)                           `rollout`
    advantage  A = (r - mean of the group) / (std of the group + 1e-4), within +-5       `advantages`
    ratio      rho = exp(log p_theta(x'|x) - log p_old(x'|x)), log p a mean over
               elements                                                                  `sample.log_prob`
    loss       mean max(-A rho, -A clip(rho, 1-eps, 1+eps))                              `surrogate`
               + beta (mean - mean_ref)^2 / (2 std^2), a mean over elements too          `kl`

In train.py these are called, in this order, by `roll_out_groups`, `step_advantages` and `policy_loss`.

Two choices are options of train.py. The paper sums the terms plainly; --standardise first divides each term
by its std inside the group (`standardise`), so that no term drowns the others. A std is each group's own;
--pooled takes one over all groups of the step, so that a group whose members are alike counts for little. The
presets say which.

As RL: the state is the latents x at a noise level, the action is the next latents x', the policy is the
Gaussian that x' is drawn from, and one reward comes at the end, for the finished video.

"Fast": only the window is trained, so a rollout keeps a few steps instead of all. A group's members have the
same window. Each prompt draws its own, or with --common-window (every preset but tiny) a step draws one.
A rollout is used once: with --updates n the step's groups are split among n optimiser steps, not used n
times. At the first of them the ratio is 1; so with one update (every preset) clipping never acts, and the
gradient is REINFORCE's with a baseline.

Sources: Flow-GRPO (arXiv 2505.05470) and its Fast variant, GRPO-Guard's ratio normalisation (arXiv
2510.22319). `sample.transition` gives mean and std for sampling, log-probability and KL alike. Left out:
value functions, replay.
"""

from dataclasses import dataclass, field

import torch

from sample import log_prob, transition, unchanged


@dataclass
class SDEStep:
    """One stochastic step of a batch's rollout, as the update needs it. All float32."""
    index: int  # which of the denoising steps
    x: torch.Tensor  # (B, C, T, h, w), the state before
    x_next: torch.Tensor  # (B, C, T, h, w), the state drawn
    mean: torch.Tensor  # (B, C, T, h, w), of the distribution it was drawn from
    logp: torch.Tensor  # (B,), its log-probability then


@dataclass
class Batch:
    """Members of one group that are rolled out, scored and trained on together: the work that processes
    share."""
    group: int  # which of the step's groups
    members: range  # which of the group's members, B of its G
    prompt: str
    levels: torch.Tensor  # noise levels sigma (steps + 1,)
    sde_steps: list  # of SDEStep, one a step of the window
    terms: dict = field(default_factory=dict)  # reward term -> (B,); NaN = masked
    motion: list = field(default_factory=list)  # B floats, `rewards.motion_magnitude`: no term, only logged
    advantages: torch.Tensor | None = None  # (B,)


# --------------------------------------------------------------------------------------------------- rollouts

def possible_windows(steps, size, noisy_steps):
    """-> all windows (ranges) of `size` consecutive steps among the first `noisy_steps`. Never the last step:
    its noise would stay in the video, and cps has std 0 there, so no log-probability."""
    noisy_steps = min(noisy_steps, steps - 1)
    if not 1 <= size <= noisy_steps:
        raise ValueError(f"a window of {size} steps does not fit into "
                         f"the first {noisy_steps} of {steps} steps; lower --window")
    return [range(start, start + size) for start in range(noisy_steps - size + 1)]


def draw_window(generator, steps, size, noisy_steps):
    """-> one of `possible_windows`, each as likely as any other."""
    windows = possible_windows(steps, size, noisy_steps)
    return windows[int(torch.randint(len(windows), (), generator=generator))]


@torch.no_grad()
def rollout(velocity, x, levels, window, eta=.7, kind="flow", generators=None, first=0, after_step=unchanged):
    """Samples with SDE steps on `window` (consecutive step indices) and Euler ODE steps elsewhere.

    velocity(x, sigma) -> v; x (B, ...) at levels[first], levels (steps + 1,); generators: one torch.Generator
    a sample, for its step noise. after_step(x, i) may change x after step i, which is no part of the policy.
    -> latents (B, ...), and the window's [SDEStep].

    first: the step to begin at. It is above 0 when members share the steps before the window: these are an
    ODE, so `euler` solves them once, and x holds copies of the state that it reached.
    """
    x, sde_steps = x.float(), []
    for i in range(first, len(levels) - 1):
        sigma, sigma_next = levels[i], levels[i + 1]
        stochastic = i in window
        v = velocity(x, sigma)
        mean, std = transition(x, v, sigma, sigma_next, eta if stochastic else 0.0, kind)
        if stochastic:
            # the action: the one random draw of these steps, whose probability the update raises or lowers
            noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
            x_next = mean + std * noise.to(mean.device)
            sde_steps.append(SDEStep(i, x, x_next, mean, log_prob(x_next, mean, std)))
        else:
            x_next = mean
        x = after_step(x_next, i)
    return x, sde_steps


# --------------------------------------------------------------- how processes share a step, c: train.Config

def update_of(c, group):
    """-> which of the step's optimiser steps a group belongs to."""
    return group * c.updates // c.groups


def deal(c, world):
    """-> for each process its work in a step, [(group, members)].

    Each optimiser step's batches are cut, in order, into `world` shares of nearly equal length (some may be
    empty), so that a group's members stay on one process where they can.
    """
    size = c.batch or c.members
    work = [[] for _ in range(world)]
    for update in range(c.updates):
        groups = [g for g in range(c.groups) if update_of(c, g) == update]
        batches = [(g, range(start, start + size)) for g in groups for start in range(0, c.members, size)]
        for rank in range(world):
            begin = len(batches) * rank // world
            end = len(batches) * (rank + 1) // world
            work[rank] += batches[begin:end]
    return work


def rollout_passes(c, windows, work):
    """-> how many forward passes `train.roll_out_groups` makes of a process's work."""
    if not c.shared:
        return c.steps * len(work)
    groups = {group for group, _ in work}
    before_windows = sum(windows[group][0] for group in groups)  # once for all of a group's batches
    return before_windows + sum(c.steps - windows[group][0] for group, _ in work)


# ------------------------------------------------------------------------------------------------- advantages

def standardise(values, group_ids, pooled=False, eps=1e-6):
    """(x - group mean) / (group std + eps) of values (N,) with group ids (N,), float32; a masked sample (NaN)
    stays NaN. The std divides by the number of members, not by one less (as in Flow-GRPO).

    pooled: one std for all, the root mean square of what is left after each group's mean. A group whose
    members are nearly alike then counts for little, where by its own std it counts as much as any other. A
    group whose values are all equal, or of which fewer than two are left, has nothing to compare and gets 0;
    these zeros count in the pooled std.
    """
    values = values.float()
    centred = torch.full((len(values),), torch.nan, device=values.device)
    std = torch.ones_like(centred)
    for group in torch.unique(group_ids):
        member = (group_ids == group) & ~values.isnan()
        x = values[member]
        comparable = len(x) > 1 and (x != x[0]).any()  # the mean of equal values may differ in its last bit
        centred[member] = x - x.mean() if comparable else torch.zeros_like(x)
        std[member] = centred[member].square().mean().sqrt()
    if pooled:
        std[:] = centred[~centred.isnan()].square().mean().sqrt()
    return centred / (std + eps)


def advantages(rewards, group_ids, clip=5.0, pooled=False):
    """Group-relative advantages (N,) of rewards (N,): standardised, clipped to +-clip, 0 for a masked sample
    (NaN).

    For leave-one-out (RLOO): r - mean of the others = n / (n - 1) (r - mean of the group), where n counts the
    members that are not masked. It keeps the rewards' own size, and --kl and --adv-clip are meant for a std
    of 1, so it needs other values of them.
    """
    return standardise(rewards, group_ids, pooled, 1e-4).clamp(-clip, clip).nan_to_num(0)  # 1e-4: Flow-GRPO


def variance_shares(terms, weights, group_ids):
    """How much each term decides: its share of the variance of the weighted sum inside groups.

    terms {name: (N,)}, NaN = masked or not asked for; weights {name: weight}; group_ids (N,). -> {name:
    share}, share = cov(w r, R) / var(R) about the groups' means, over the samples that no term masks. Shares
    sum to 1; a term that pulls against the sum has a negative one. Where nothing varies, every share is 0.
    Groups that vary more count for more here, also where `advantages` gives each group its own std.
    """
    parts = {name: weights[name] * values.double() for name, values in terms.items() if weights[name]}
    # a term not asked for (R_3D's, in a dynamic phase) is NaN throughout, and would mask every sample
    parts = {name: values for name, values in parts.items() if not values.isnan().all()}
    if not parts:  # every sample is masked
        return {}
    known = ~sum(parts.values()).isnan()  # the samples that no term masks
    same_group = (group_ids[known, None] == group_ids[known]).double()  # (n, n)
    group_average = same_group / same_group.sum(1, keepdim=True)  # @ values: the mean of each sample's group
    deviations = {name: values[known] - group_average @ values[known] for name, values in parts.items()}
    total = sum(deviations.values())
    variance = total.square().sum().clamp_min(1e-300)
    return {name: float((values * total).sum() / variance) for name, values in deviations.items()}


# ------------------------------------------------------------------------------------------------------- loss

def surrogate(log_ratio, advantages, clip):
    """Clipped policy surrogate, a scalar to minimise: mean of max(-A rho, -A clip(rho, 1-clip, 1+clip)) with
    rho = exp(log_ratio)."""
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped).mean()


def kl(mean, mean_ref, std):
    """KL between two Gaussian steps of the same std, averaged over elements: (B, ...) -> (B,)."""
    return ((mean.float() - mean_ref.float()).square() / (2 * std * std)).flatten(1).mean(1)


def normalise_log_ratio(log_ratio, mean, mean_old, std):
    """GRPO-Guard's RatioNorm: std (log rho + |mean - mean_old|^2 / (2 std^2)), (B,).

    Under the old policy log rho has mean -|mean - mean_old|^2 / (2 std^2), below 0, so one side of the clip
    would act more often: adding that square back centres log rho. Its spread goes with
    |mean - mean_old| / std, so the clip would act more where std is small: multiplying by std undoes that.
    """
    return (log_ratio + kl(mean, mean_old, std)) * std


def rectification(levels, count, eta=.7, kind="flow"):
    """Weights (count,) of the surrogate at the first `count` steps, of mean 1: with them the gradients of
    all these steps are of one size.

    A step x' = mean + std noise moves the policy by d log p / dv = (x' - mean) / std^2 . d mean / dv. As x' -
    mean is of size std, this is of size |d mean / dv| / std. It differs from step to step (Flash-GRPO, arXiv
    2605.15980); the weight is its inverse. `transition` is linear in v, so the slope of its mean is read off
    two calls, for every kind alike. For flow and dance, with D = sigma - sigma_next and their s,
        |d mean / dv| / std = sqrt(D) / s + s sqrt(D) (1 - sigma) / (2 sigma).
    """
    zero, one = torch.zeros(1), torch.ones(1)
    sizes = []
    for sigma, sigma_next in zip(levels[:count], levels[1:]):
        mean, std = transition(zero, zero, sigma, sigma_next, eta, kind)
        mean_of_one, _ = transition(zero, one, sigma, sigma_next, eta, kind)
        sizes.append((mean_of_one - mean).abs() / std)
    weights = 1 / torch.cat(sizes)
    return weights / weights.mean()
