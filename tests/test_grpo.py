import math

import pytest
import torch

from grpo import (advantages, draw_window, kl, normalise_log_ratio, rectification, rollout, standardise,
                  surrogate, variance_shares)
from rewards import combine
from sample import euler, generator, log_prob, sigmas, transition

NAN = math.nan


# ------------------------------------------------------------------------------------------------- statistics

def test_advantages_are_standardised_within_each_group():
    rewards, group_ids = torch.tensor([1.0, 2, 3, 10, 30]), torch.tensor([7, 7, 7, 2, 2])
    found = advantages(rewards, group_ids)
    expected = torch.tensor([-1.0, 0, 1]) / (torch.tensor([1.0, 2, 3]).std(correction=0) + 1e-4)
    assert torch.allclose(found[:3], expected)
    assert torch.allclose(found[3:], torch.tensor([-1.0, 1]), atol=1e-4)


def test_masked_samples_get_zero_and_leave_the_statistics():
    masked = advantages(torch.tensor([1.0, NAN, 3]), torch.zeros(3))
    without = advantages(torch.tensor([1.0, 3]), torch.zeros(2))
    assert masked[1] == 0
    assert torch.equal(masked[[0, 2]], without)
    assert advantages(torch.tensor([1.0, NAN]), torch.zeros(2)).abs().max() == 0
    assert advantages(torch.tensor([.3, .3, .3]), torch.zeros(3)).abs().max() == 0


def test_advantages_are_clipped():
    rewards = torch.zeros(100)
    rewards[0] = 1e6
    found = advantages(rewards, torch.zeros(100))
    assert found[0] == 5.0
    assert found.min() > -1
    assert advantages(rewards, torch.zeros(100), clip=2.0)[0] == 2.0


def test_pooled_spread_gives_a_quiet_group_little_weight():
    quiet, loud = torch.tensor([.50, .51, .52, .53]), torch.tensor([0, .2, .4, .6])
    rewards, group_ids = torch.cat([quiet, loud]), torch.arange(8) // 4
    own = advantages(rewards, group_ids)
    pooled = advantages(rewards, group_ids, pooled=True)

    def size(x):
        return x.abs().mean().item()

    assert size(own[:4]) == pytest.approx(size(own[4:]), rel=.02)
    assert size(pooled[4:]) == pytest.approx(20 * size(pooled[:4]), rel=1e-3)
    assert pooled.square().mean().item() == pytest.approx(1, rel=2e-3)

    # a third group with one member left has nothing to compare
    rewards = torch.cat([rewards, torch.tensor([NAN, 9.0])])
    group_ids = torch.cat([group_ids, torch.tensor([2, 2])])
    assert torch.equal(advantages(rewards, group_ids, pooled=True)[8:], torch.zeros(2))


def test_standardised_terms_have_one_voice_each():
    terms = dict(meta=torch.tensor([.1, .2, .3, .4]), recon=torch.ones(4),
                 traj=torch.tensor([.4, .3, .2, .1]), general=torch.tensor([0., 10, NAN, 30]))
    group_ids = torch.tensor([0, 0, 1, 1])
    compared = {name: standardise(values, group_ids) for name, values in terms.items()}
    three_d, total = combine(compared, dict.fromkeys(terms, 1.0))
    assert torch.allclose(three_d, torch.zeros(4), atol=1e-4)  # meta and traj disagree, recon is constant
    assert torch.allclose(total[:2], torch.tensor([-1., 1]), atol=1e-4)
    assert total[2].isnan()
    assert torch.equal(standardise(torch.tensor([2., 2.]), torch.zeros(2)), torch.zeros(2))


# ------------------------------------------------------------------------------------------------------- loss

def test_gradient_at_ratio_one_is_reinforce():
    theta = torch.tensor([.3, -.2], requires_grad=True)
    x, A = torch.randn(64, 2), torch.randn(64)
    logp = log_prob(x, theta.expand(64, 2), torch.tensor(.5))
    [ours] = torch.autograd.grad(surrogate(logp - logp.detach(), A, 1e-3), theta, retain_graph=True)
    [reinforce] = torch.autograd.grad(-(A * logp).mean(), theta)
    assert torch.allclose(ours, reinforce, atol=1e-6)


@pytest.mark.parametrize("A, log_ratio, moves", [
    (1.0, .5, False), (1.0, -.5, True), (-1.0, -.5, False), (-1.0, .5, True)])
def test_clipping_stops_the_gradient_only_where_the_step_went_far_enough(A, log_ratio, moves):
    logp = torch.tensor([log_ratio], requires_grad=True)
    [gradient] = torch.autograd.grad(surrogate(logp, torch.tensor([A]), .2), logp)
    if moves:
        assert torch.sign(gradient) == -math.copysign(1, A)
    else:
        assert gradient == 0


def test_the_surrogate_is_flat_beyond_the_clip():
    assert surrogate(torch.tensor([1.0]), torch.tensor([1.0]), .2) == pytest.approx(-1.2)


def test_kl_is_that_of_two_gaussians_and_pulls_back():
    mean, reference, std = torch.randn(3, 4), torch.randn(3, 4), torch.tensor(.4)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, std), normal(reference, std)).mean(1)
    assert torch.allclose(kl(mean, reference, std), exact, atol=1e-5)
    mean.requires_grad_()
    [gradient] = torch.autograd.grad(kl(mean, reference, std).sum(), mean)
    assert ((mean - reference) * gradient >= 0).all()


@pytest.mark.parametrize("std", [.05, .5])
def test_ratio_normalisation_removes_the_bias_and_the_step_scale(std):
    draw, std = torch.Generator().manual_seed(0), torch.tensor(std)
    mean_old, change = torch.randn(20_000, 3, generator=draw), torch.tensor([.02, -.03, .01])
    noise = torch.randn(mean_old.shape, generator=draw)
    mean_old, noise = torch.cat([mean_old, mean_old]), torch.cat([noise, -noise])  # pairs: exact means
    x = mean_old + std * noise
    log_ratio = log_prob(x, mean_old + change, std) - log_prob(x, mean_old, std)
    bias = float(-(change / std).square().mean() / 2)
    assert log_ratio.mean() == pytest.approx(bias, rel=.01)  # below 0

    fair = normalise_log_ratio(log_ratio, mean_old + change, mean_old, std)
    spread = float(change.norm() / 3)  # without std in it
    assert abs(fair.mean()) < spread / 1000
    assert fair.std() == pytest.approx(spread, rel=.05)


# --------------------------------------------------------------------------------------------------- rollouts

MEANS, SPREAD, WEIGHTS = torch.tensor([[-1.5, .5], [1.0, -.5]]), .4, torch.tensor([.3, .7])


def mixture_velocity(x, sigma):
    """Exact v(x, sigma) = E[eps - x0 | x] when x0 is a mixture of two Gaussians in the plane."""
    a = 1 - sigma
    variance = a * a * SPREAD ** 2 + sigma * sigma
    offset = x[:, None] - a * MEANS  # (B, 2 components, 2)
    weight = (WEIGHTS.log() - offset.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
    x0 = (weight * (MEANS + a * SPREAD ** 2 * offset / variance)).sum(1)
    eps = (weight * (sigma * offset / variance)).sum(1)
    return eps - x0


def moment_error(kind, eta, steps, samples=40_000):
    """How far mean and covariance of an all-SDE rollout are from the mixture's (the last is an ODE step)."""
    draw = torch.Generator().manual_seed(0)
    x, levels = torch.randn(samples, 2, generator=draw), sigmas(steps, 1.0)
    for i, (sigma, sigma_next) in enumerate(zip(levels, levels[1:])):
        noise_level = eta if i < steps - 1 else 0.0
        mean, std = transition(x, mixture_velocity(x, sigma), sigma, sigma_next, noise_level, kind)
        x = mean + std * torch.randn(x.shape, generator=draw)
    mean = WEIGHTS @ MEANS
    covariance = (MEANS - mean).T @ torch.diag(WEIGHTS) @ (MEANS - mean) + SPREAD ** 2 * torch.eye(2)
    return float((x.mean(0) - mean).norm() + (x.T.cov() - covariance).norm())


@pytest.mark.parametrize("kind", ["flow", "dance"])
@pytest.mark.parametrize("eta", [.3, .7])
def test_sde_keeps_the_marginals_as_steps_grow(kind, eta):
    errors = [moment_error(kind, eta, steps) for steps in (10, 40, 160)]
    print(f"{kind}, eta {eta}: error of mean and covariance at 10, 40, 160 steps {errors}")
    assert errors[0] > errors[1] > errors[2] * .9, errors
    assert errors[2] < .05, errors  # Monte-Carlo error is about .01


def test_a_masked_sample_leaves_the_pooled_std_and_a_flat_group_counts_in_it():
    rewards, group_ids = torch.tensor([.1, .2, .6, NAN, .5, .9]), torch.tensor([0, 0, 0, 0, 1, 1])
    known = ~rewards.isnan()
    found = advantages(rewards, group_ids, pooled=True)
    assert torch.equal(found[known], advantages(rewards[known], group_ids[known], pooled=True))
    assert found[3] == 0 and found[known].abs().max() > 1
    # deviations -.5, .5, 0, 0: their mean square is 1/8
    found = advantages(torch.tensor([0.0, 1, 5, 5]), torch.tensor([0, 0, 1, 1]), pooled=True)
    assert found.tolist() == pytest.approx([-2 ** .5, 2 ** .5, 0, 0], rel=1e-3)


def test_shares_count_the_weights():
    x = torch.tensor([0.0, 1, 2])
    shares = variance_shares(dict(meta=x, recon=x), dict(meta=1.0, recon=3.0), torch.zeros(3))
    assert shares == pytest.approx(dict(meta=.25, recon=.75))


def test_cps_is_a_sampler_too_but_its_error_does_not_vanish():
    errors = [moment_error("cps", .7, steps) for steps in (10, 40, 160)]
    print(f"cps, eta 0.7: error of mean and covariance at 10, 40, 160 steps {errors}")
    assert .2 < errors[2] < .5
    assert moment_error("cps", .1, 160) < .06  # nearly the ODE


LEVELS = sigmas(6, 1.0)


def roll(noise, window, count, member=0, **options):
    """A rollout of the mixture with `count` generators of step noise, numbered from `member` on."""
    generators = [generator(0, member + i) for i in range(count)]
    return rollout(mixture_velocity, noise, LEVELS, window, generators=generators, **options)


def ode_step(x, i):
    return transition(x, mixture_velocity(x, LEVELS[i]), LEVELS[i], LEVELS[i + 1])[0]


def test_rollout_is_ode_outside_its_window_and_stores_only_the_window():
    noise = torch.randn(4, 2)
    x, moves = roll(noise, range(1, 3), 4)
    assert [move.index for move in moves] == [1, 2]
    assert torch.equal(moves[0].x, ode_step(noise, 0))
    assert torch.equal(moves[0].x_next, moves[1].x)
    for move in moves:  # the stored mean and log-probability are recomputed from what is stored
        sigma, sigma_next = LEVELS[move.index], LEVELS[move.index + 1]
        mean, std = transition(move.x, mixture_velocity(move.x, sigma), sigma, sigma_next, .7)
        assert torch.equal(mean, move.mean)
        assert torch.equal(log_prob(move.x_next, mean, std), move.logp)
    tail = moves[1].x_next
    for i in range(3, 6):
        tail = ode_step(tail, i)
    assert torch.equal(x, tail)


def test_members_branch_from_a_path_that_they_share():
    """The steps before the window are an ODE: made once, they are those of every member."""
    noise = torch.randn(1, 2)
    branching = euler(mixture_velocity, noise, LEVELS[:3]).repeat(3, 1)
    x, [move] = roll(branching, range(2, 3), 3, first=2)
    assert len({tuple(row.tolist()) for row in move.x_next}) == 3  # every member draws its own step noise
    alone, [expected] = roll(noise.repeat(3, 1), range(2, 3), 3)
    assert torch.allclose(x, alone, atol=1e-6)
    assert move.index == expected.index == 2


def test_what_changes_latents_after_a_step_is_no_part_of_the_policy():
    noise = torch.randn(2, 2)
    x, [move] = roll(noise, range(1, 2), 2, after_step=lambda x, i: x + 10 * (i + 1))
    assert torch.equal(move.x, ode_step(noise, 0) + 10)
    assert torch.equal(move.logp, log_prob(move.x_next, move.mean, std_of(1)))
    tail = move.x_next + 20
    for i in range(2, 6):
        tail = ode_step(tail, i) + 10 * (i + 1)
    assert torch.equal(x, tail)


def std_of(i):
    return transition(torch.zeros(1), torch.zeros(1), LEVELS[i], LEVELS[i + 1], .7)[1]


def test_members_do_not_depend_on_each_other():
    noise = torch.randn(4, 2)
    together, _ = roll(noise, range(1, 2), 4)
    alone, _ = roll(noise[2:3], range(1, 2), 1, member=2)
    assert torch.allclose(together[2:3], alone, atol=1e-6)


def test_windows_are_random_high_noise_and_never_the_last_step():
    starts = {draw_window(generator(i), 10, 2, 5)[0] for i in range(100)}
    assert starts == {0, 1, 2, 3}
    assert max(draw_window(generator(i), 4, 1, 99)[-1] for i in range(50)) == 2
    with pytest.raises(ValueError, match="a window of 5 steps does not fit into the first 4"):
        draw_window(generator(0), 10, 5, 4)


# ----------------------------------------------------------------------------------- rectification and shares

@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_rectified_gradients_are_of_one_size_at_every_step(kind):
    """The gradient of log p(x') with respect to v, over many draws of the step: its norm differs from step to
    step, and is the same to 5 % once it is rectified."""
    levels, drawn = sigmas(20, 5.0), 12
    plain = []
    for i in range(drawn):
        g = generator(kind, i)
        x = torch.randn(4000, 2, generator=g)
        v = mixture_velocity(x, levels[i]).requires_grad_()
        mean, std = transition(x, v, levels[i], levels[i + 1], .7, kind)
        x_next = mean.detach() + std * torch.randn(mean.shape, generator=g)
        gradient, = torch.autograd.grad(log_prob(x_next, mean, std).sum(), v)
        plain.append(gradient.norm(dim=1).mean())
    plain = torch.stack(plain)
    rectified = plain * rectification(levels, drawn, .7, kind)
    assert plain.max() / plain.min() > 1.3
    assert rectified.max() / rectified.min() < 1.05


def test_rectification_is_flash_grpos_formula():
    levels, drawn, eta = sigmas(20, 5.0), 12, .7
    sigma, sigma_next = levels[1:drawn].double(), levels[2:drawn + 1].double()
    step = sigma - sigma_next
    s = eta * (sigma / (1 - sigma)).sqrt()
    expected = 1 / (step.sqrt() / s + s * step.sqrt() * (1 - sigma) / (2 * sigma))
    weights = rectification(levels, drawn, eta, "flow").double()
    assert torch.allclose(weights[1:] / weights[1], expected / expected[0], rtol=1e-4)
    assert weights.mean() == pytest.approx(1, abs=1e-6)


def test_shares_name_the_term_that_decides():
    """Raw HPSv3 spans some ten units where R_3D spans three: it decides nearly alone."""
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(40) // 8
    terms = {name: torch.rand(40, generator=g) for name in ("meta", "recon", "traj")}
    terms["general"] = 10 * torch.rand(40, generator=g) + 5 * ids
    shares = variance_shares(terms, dict.fromkeys(terms, 1.0), ids)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["general"] > .9
    halved = variance_shares(terms, dict.fromkeys(terms, 1.0) | dict(general=0.0), ids)
    assert set(halved) == {"meta", "recon", "traj"}
    assert max(halved.values()) < .6


def test_shares_leave_masked_samples_and_terms_out():
    ids = torch.zeros(4, dtype=torch.long)
    terms = dict(meta=torch.tensor([.1, .2, .4, NAN]), traj=torch.full((4,), NAN),
                 general=torch.tensor([.3, .1, .2, 99.0]))
    weights = dict.fromkeys(terms, 1.0)
    without = {name: values[:3] for name, values in terms.items()}
    expected = variance_shares(without, weights, ids[:3])
    assert variance_shares(terms, weights, ids) == pytest.approx(expected)
    assert set(expected) == {"meta", "general"}
    same = dict(meta=torch.ones(4), general=torch.ones(4))
    assert variance_shares(same, weights, ids) == dict(meta=0.0, general=0.0)
