import math

import pytest
import torch

import grpo
from grpo import advantages, draw_window, kl, rollout, standardise, surrogate
from rewards import combine
from sample import generator, log_prob, sigmas, transition

NAN = math.nan


# --------------------------------------------------------------------------------------------------------- statistics

def test_advantages_are_standardised_within_each_group():
    r, ids = torch.tensor([1.0, 2, 3, 10, 30]), torch.tensor([7, 7, 7, 2, 2])
    a = advantages(r, ids)
    expected = torch.tensor([-1.0, 0, 1]) / (torch.tensor([1.0, 2, 3]).std(correction=0) + 1e-4)
    assert torch.allclose(a[:3], expected) and torch.allclose(a[3:], torch.tensor([-1.0, 1]), atol=1e-4)


def test_masked_samples_get_zero_and_leave_the_statistics():
    a = advantages(torch.tensor([1.0, NAN, 3]), torch.zeros(3))
    b = advantages(torch.tensor([1.0, 3]), torch.zeros(2))
    assert a[1] == 0 and torch.equal(a[[0, 2]], b)
    assert advantages(torch.tensor([1.0, NAN]), torch.zeros(2)).abs().max() == 0
    assert advantages(torch.tensor([.3, .3, .3]), torch.zeros(3)).abs().max() == 0


def test_advantages_are_clipped():
    r = torch.zeros(100)
    r[0] = 1e6
    a = advantages(r, torch.zeros(100))
    assert a[0] == 5.0 and a.min() > -1 and advantages(r, torch.zeros(100), clip=2.0)[0] == 2.0


def test_pooled_spread_gives_a_quiet_group_little_weight():
    quiet, loud = torch.tensor([.50, .51, .52, .53]), torch.tensor([0, .2, .4, .6])
    r, ids = torch.cat([quiet, loud]), torch.arange(8) // 4
    own, pooled = advantages(r, ids), advantages(r, ids, pooled=True)
    size = lambda a: a.abs().mean().item()  # noqa: E731
    assert size(own[:4]) == pytest.approx(size(own[4:]), rel=.02)
    assert size(pooled[4:]) == pytest.approx(20 * size(pooled[:4]), rel=1e-3)
    assert pooled.square().mean().item() == pytest.approx(1, rel=2e-3)
    masked = advantages(torch.cat([r, torch.tensor([NAN, 9.0])]), torch.cat([ids, torch.tensor([2, 2])]), pooled=True)
    assert torch.equal(masked[8:], torch.zeros(2))  # nothing to compare there


def test_standardised_terms_have_one_voice_each():
    terms = dict(meta=torch.tensor([.1, .2, .3, .4]), recon=torch.ones(4), traj=torch.tensor([.4, .3, .2, .1]), general=torch.tensor([0., 10, NAN, 30]))
    ids = torch.tensor([0, 0, 1, 1])
    three_d, total = combine({n: standardise(x, ids) for n, x in terms.items()}, dict.fromkeys(terms, 1.0))
    assert torch.allclose(three_d, torch.zeros(4), atol=1e-4)  # meta and traj disagree, recon is constant
    assert torch.allclose(total[:2], torch.tensor([-1., 1]), atol=1e-4) and total[2].isnan()
    assert torch.equal(standardise(torch.tensor([2., 2.]), torch.zeros(2)), torch.zeros(2))


def test_gradient_at_ratio_one_is_reinforce():
    theta = torch.tensor([.3, -.2], requires_grad=True)
    x, A = torch.randn(64, 2), torch.randn(64)
    logp = log_prob(x, theta.expand(64, 2), torch.tensor(.5))
    ours = torch.autograd.grad(surrogate(logp, logp.detach(), A, 1e-3), theta, retain_graph=True)[0]
    assert torch.allclose(ours, torch.autograd.grad(-(A * logp).mean(), theta)[0], atol=1e-6)


def test_clipping_stops_the_gradient_only_where_the_step_went_far_enough():
    for A, shift, moves in ((1.0, .5, False), (1.0, -.5, True), (-1.0, -.5, False), (-1.0, .5, True)):
        logp = torch.tensor([shift], requires_grad=True)
        grad = torch.autograd.grad(surrogate(logp, torch.zeros(1), torch.tensor([A]), .2), logp)[0]
        assert (grad != 0) == moves and (not moves or torch.sign(grad) == -torch.sign(torch.tensor(A)))
    assert surrogate(torch.tensor([1.0]), torch.zeros(1), torch.tensor([1.0]), .2) == pytest.approx(-1.2)


def test_kl_is_that_of_two_gaussians_and_pulls_back():
    mean, ref, std = torch.randn(3, 4), torch.randn(3, 4), torch.tensor(.4)
    exact = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), torch.distributions.Normal(ref, std)).mean(1)
    assert torch.allclose(kl(mean, ref, std), exact, atol=1e-5)
    mean.requires_grad_()
    assert ((mean - ref) * torch.autograd.grad(kl(mean, ref, std).sum(), mean)[0] >= 0).all()


def test_ratio_normalisation_removes_the_bias_and_the_step_scale():
    g = torch.Generator().manual_seed(0)
    mean_old, change = torch.randn(20_000, 3, generator=g), torch.tensor([.02, -.03, .01])
    for std in (torch.tensor(.05), torch.tensor(.5)):
        x = mean_old + std * torch.randn(mean_old.shape, generator=g)
        log_ratio = log_prob(x, mean_old + change, std) - log_prob(x, mean_old, std)
        assert log_ratio.mean() == pytest.approx(float(-(change / std).square().mean() / 2), rel=.1)  # biased below 0
        fair = grpo.normalise_log_ratio(log_ratio, mean_old + change, mean_old, std)
        spread = float(change.norm() / 3)
        assert abs(fair.mean()) < 4 * spread / math.sqrt(20_000) and fair.std() == pytest.approx(spread, rel=.05)


# ------------------------------------------------------------------------------------------------------------ rollouts

MEANS, SPREAD, WEIGHTS = torch.tensor([[-1.5, .5], [1.0, -.5]]), .4, torch.tensor([.3, .7])


def mixture_velocity(x, sigma):
    """Exact v(x, sigma) = E[eps - x0 | x] when x0 is a mixture of two Gaussians in the plane."""
    a, s = 1 - sigma, sigma
    variance = a * a * SPREAD ** 2 + s * s
    offset = x[:, None] - a * MEANS  # (B, 2 components, 2)
    weight = (WEIGHTS.log() - offset.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
    x0 = (weight * (MEANS + a * SPREAD ** 2 * offset / variance)).sum(1)
    eps = (weight * (s * offset / variance)).sum(1)
    return eps - x0


def moment_error(kind, eta, steps, samples=40_000):
    """How far the mean and covariance of an all-SDE rollout are from the mixture's (the last step is an ODE step)."""
    g = torch.Generator().manual_seed(0)
    x, levels = torch.randn(samples, 2, generator=g), sigmas(steps, 1.0)
    for i, (s, n) in enumerate(zip(levels, levels[1:])):
        mean, std = transition(x, mixture_velocity(x, s), s, n, eta if i < steps - 1 else 0.0, kind)
        x = mean + std * torch.randn(x.shape, generator=g)
    mean = WEIGHTS @ MEANS
    covariance = (MEANS - mean).T @ torch.diag(WEIGHTS) @ (MEANS - mean) + SPREAD ** 2 * torch.eye(2)
    return float((x.mean(0) - mean).norm() + (x.T.cov() - covariance).norm())


@pytest.mark.parametrize("kind", ["flow", "dance"])
@pytest.mark.parametrize("eta", [.3, .7])
def test_sde_keeps_the_marginals_as_steps_grow(kind, eta):
    errors = [moment_error(kind, eta, n) for n in (10, 40, 160)]
    print(f"{kind}, eta {eta}: error of mean and covariance at 10, 40, 160 steps " + " ".join(f"{e:.3f}" for e in errors))
    assert errors[0] > errors[1] > errors[2] * .9 and errors[2] < .05, errors  # Monte-Carlo error is about .01


def test_cps_is_a_sampler_too_but_its_error_does_not_vanish():
    errors = [moment_error("cps", .7, n) for n in (10, 40, 160)]
    print("cps, eta 0.7: error of mean and covariance at 10, 40, 160 steps " + " ".join(f"{e:.3f}" for e in errors))
    assert errors[2] < 2 and moment_error("cps", .1, 160) < errors[2] + .05


def run(noise, window=(1, 2), members=1, shared=False, seed=0, **k):
    levels = sigmas(6, 1.0)
    n = len(noise) * (members if shared else 1)
    return rollout(mixture_velocity, noise, levels, range(*window), generators=[generator(seed, i) for i in range(n)],
                   shared=shared, members=members, **k), levels


def test_rollout_is_ode_outside_its_window_and_stores_only_the_window():
    noise = torch.randn(4, 2)
    (x, steps), levels = run(noise, (1, 3))
    assert [s["index"] for s in steps] == [1, 2] and set(steps[0]) == {"index", "x", "x_next", "mean", "logp"}
    expected = transition(noise, mixture_velocity(noise, levels[0]), levels[0], levels[1])[0]
    assert torch.equal(steps[0]["x"], expected) and torch.equal(steps[0]["x_next"], steps[1]["x"])
    for s in steps:  # the stored log-prob is recomputed from what is stored
        mean, std = transition(s["x"], mixture_velocity(s["x"], levels[s["index"]]), levels[s["index"]], levels[s["index"] + 1], .7)
        assert torch.equal(log_prob(s["x_next"], mean, std), s["logp"])
    tail = steps[1]["x_next"]
    for s, n in zip(levels[3:], levels[4:]):
        tail = transition(tail, mixture_velocity(tail, s), s, n)[0]
    assert torch.equal(x, tail)


def test_shared_prefix_branches_at_the_window():
    (x, steps), _ = run(torch.randn(2, 2), (2, 3), members=3, shared=True)
    assert x.shape == (6, 2) and torch.equal(steps[0]["x"][0], steps[0]["x"][2]) and not torch.equal(steps[0]["x"][0], steps[0]["x"][3])
    assert len({tuple(row.tolist()) for row in steps[0]["x_next"]}) == 6  # every member draws its own step noise


def test_members_do_not_depend_on_each_other():
    noise = torch.randn(4, 2)
    (all_, _), levels = run(noise)
    alone, _ = rollout(mixture_velocity, noise[2:3], levels, range(1, 2), generators=[generator(0, 2)])
    assert torch.allclose(all_[2:3], alone, atol=1e-6)


def test_windows_are_random_high_noise_and_never_the_last_step():
    starts = {draw_window(generator(i), 10, 2, 5)[0] for i in range(100)}
    assert starts == {0, 1, 2, 3}
    assert max(draw_window(generator(i), 4, 1, 99)[-1] for i in range(50)) == 2
    with pytest.raises(ValueError, match="a window of 5 steps does not fit into the first 4"):
        draw_window(generator(0), 10, 5, 4)
