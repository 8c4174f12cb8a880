import math
import shutil
import subprocess
import sys

import imageio.v3 as iio
import pytest
import torch
from conftest import ROOT

import sample as S
from model import load_wan


# ------------------------------------------------------------------------------------------------ schedule and steps

@pytest.mark.parametrize("steps, shift", [(1, 1.0), (7, 3.0), (50, 5.0)])
def test_sigmas(steps, shift):
    s = S.sigmas(steps, shift)
    assert s.shape == (steps + 1,) and s[0] == 1 and s[-1] == 0 and (s[1:] < s[:-1]).all()
    u = 1 - torch.arange(steps) / steps * .999
    assert torch.allclose(s[:-1], shift * u / (1 + (shift - 1) * u), atol=1e-6)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        S.sigmas(0, shift)
    with pytest.raises(ValueError, match="shift must be a positive number"):
        S.sigmas(steps, 0.0)


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_eta_zero_is_the_ode_to_the_bit(kind):
    x, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for s, n in ((1.0, .9), (.7, .31), (.1, 0.0)):
        mean, std = S.transition(x, v, s, n, eta=0.0, kind=kind)
        assert torch.equal(mean, S.transition(x, v, s, n)[0]) and std == 0
        assert torch.equal(mean, x - v * (torch.tensor(s) - torch.tensor(n)))


def test_transition_formulas():
    x, v, s, n, eta = torch.randn(2, 5), torch.randn(2, 5), .6, .5, .7
    for kind, noise in (("flow", eta * math.sqrt(s / (1 - s))), ("dance", eta)):
        mean, std = S.transition(x, v, s, n, eta, kind)
        assert torch.allclose(mean, x - (v + noise ** 2 / (2 * s) * (x + (1 - s) * v)) * (s - n), atol=1e-6)
        assert std.item() == pytest.approx(noise * math.sqrt(s - n), rel=1e-5)
    assert S.transition(x, v, 1.0, .9, eta, "flow")[1].item() == pytest.approx(eta * math.sqrt(1 / .1) * math.sqrt(.1), rel=1e-5)
    x0, eps = torch.randn(2, 5), torch.randn(2, 5)  # cps keeps the coefficients: mean and std add up to sigma_next
    mean, std = S.transition((1 - s) * x0 + s * eps, eps - x0, s, n, eta, "cps")
    assert torch.allclose(mean, (1 - n) * x0 + n * math.cos(eta * math.pi / 2) * eps, atol=1e-6)
    assert std.item() ** 2 + (n * math.cos(eta * math.pi / 2)) ** 2 == pytest.approx(n * n, rel=1e-5)
    with pytest.raises(ValueError, match="kind must be flow, dance or cps"):
        S.transition(x, v, s, n, eta, "euler")


def test_log_prob_equals_torch_distributions():
    x, mean, std = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.tensor(.37)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)
    assert torch.allclose(S.log_prob(x, mean, std), expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ solvers

def gaussian_velocity(x, sigma, mean=2.0, spread=.5):
    """E[eps - x0 | x] when x0 ~ N(mean, spread^2): the ODE's solution is known."""
    a, s = 1 - sigma, sigma
    variance = a * a * spread ** 2 + s * s
    eps = s * (x - a * mean) / variance
    x0 = mean + a * spread ** 2 * (x - a * mean) / variance
    return eps - x0


@pytest.mark.parametrize("solver, rate, bound", [("euler", 1.8, .05), ("unipc", 2.7, .005)])  # UniPC's end steps are of order 1
def test_solvers_converge(solver, rate, bound):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = 2 + .5 * x  # the flow maps N(0,1) to N(2, .5^2) monotonically
    errors = [float((S.SOLVERS[solver](gaussian_velocity, x, S.sigmas(n, 1.0).double()) - exact).abs().max()) for n in (16, 32, 64)]
    assert errors[0] / errors[1] > rate and errors[1] / errors[2] > rate and errors[2] < bound


def test_generator_depends_on_every_part_of_its_key_only():
    draw = lambda *key: torch.randn(4, generator=S.generator(*key)).tolist()  # noqa: E731
    assert draw(1, 2, 3, "noise") == draw(1, 2, 3, "noise")
    keys = [(1, 2, 3, "noise"), (1, 2, 3, "sde"), (1, 3, 2, "noise"), (12, 3, "noise"), (0,)]
    assert len({tuple(draw(*k)) for k in keys}) == len(keys)


# ------------------------------------------------------------------------------------------------------- the sampler

def test_guidance_is_one_batched_forward_of_the_same_velocities(checkpoint):
    wan = load_wan(checkpoint)
    noise = torch.randn(2, 4, 2, 2, 4)
    prompts = ["a red sphere", "push_in a blue box on a checkered green floor"]
    got = S.sample(wan, prompts, noise, steps=3, guidance=3.0, shift=3.0, solver="euler", negative="a box")
    levels, x = S.sigmas(3, 3.0), noise
    text, negative = wan.encode_text(prompts), wan.encode_text(["a box", "a box"])
    with torch.no_grad():
        for s, n in zip(levels, levels[1:]):
            c, u = (wan.dit(x, (1000 * s).expand(2), e) for e in (text, negative))
            x = x - (u + 3.0 * (c - u)) * (s - n)
    assert torch.allclose(got, x, atol=1e-4)
    calls = []
    wan.dit.register_forward_hook(lambda *_: calls.append(1))
    S.sample(wan, prompts, noise, steps=5)
    assert len(calls) == 5


def test_sampling_does_not_depend_on_the_batch(checkpoint):
    wan = load_wan(checkpoint)
    noise = torch.randn(3, 4, 2, 2, 4)
    together = S.sample(wan, ["a red sphere", "", "an orange box"], noise, steps=4)
    alone = S.sample(wan, ["an orange box"], noise[2:], steps=4)
    assert torch.allclose(together[2:], alone, atol=1e-4)
    with pytest.raises(ValueError, match="2 prompts need as many noise samples, got 3"):
        S.sample(wan, ["a", "b"], noise)


# --------------------------------------------------------------------------------------------------- the command line

def test_cli_writes_videos_and_a_contact_sheet(checkpoint, tmp_path, capsys):
    out = tmp_path / "deep" / "clip.mp4"
    arguments = ["push_in a red sphere", "--model", str(checkpoint), "--out", str(out), "--num", "2", "--seed", "7"]
    assert S.main(arguments) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(out.with_stem("clip_0")), str(out.with_stem("clip_1")), str(out.with_suffix(".png"))]
    assert sorted(p.name for p in out.parent.iterdir()) == ["clip.png", "clip_0.mp4", "clip_1.mp4"]  # no temporary files left
    for path in printed[:2]:
        assert iio.imread(path).shape == (5, 16, 32, 3)
        assert iio.immeta(path)["codec"] == "h264"
    assert iio.imread(printed[2]).shape[2] == 3
    first = [iio.imread(p) for p in printed]
    assert (first[0] != first[1]).any()
    S.main(arguments)
    assert all((a == iio.imread(p)).all() for a, p in zip(first, printed))


@pytest.mark.parametrize("arguments, message", [
    ([" "], "the prompt is empty"), (["a", "--frames", "16"], "--frames must be 4k+1, got 16; try 17"),
    (["a", "--height", "50"], "--height must be a multiple of 16, got 50; try 48"), (["a", "--width", "-16"], "--width must be positive"),
    (["a", "--steps", "0"], "--steps must be at least 1"), (["a", "--num", "0"], "--num must be at least 1"),
    (["a", "--guidance", "nan"], "--guidance must be a finite number, got nan"), (["a", "--shift", "0"], "--shift must be a positive"),
    (["a", "--degradation", "2"], "--degradation must be between 0 and 1"), (["a", "--strength", "inf"], "--strength must be a finite"),
    (["a", "--path", "nothing.json"], "--path nothing.json is not a JSON list of 4x4 matrices"),
    (["a", "--model", "nowhere"], "no model folder 'nowhere'"), (["a", "--out", "clip.gif"], "--out must end in .mp4"),
    (["a", "--out", "/proc/nothing/clip.mp4"], "cannot write '/proc/nothing/clip.mp4'")])
def test_bad_arguments_get_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert S.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_transport_is_the_default_and_each_member_has_its_own_noise(checkpoint):
    wan = load_wan(checkpoint)
    args = (wan, "Camera move left. A box.", 17, 64, 64)
    noise, path = S.initial_noise(*args, range(3), seed=5)
    again, _ = S.initial_noise(*args, [2], seed=5)
    plain, _ = S.initial_noise(*args, range(3), seed=5, transport=False)
    assert torch.equal(noise[2:], again) and not torch.equal(noise[0], noise[1]) and path[-1, 0, 3] < -.3
    shift = round(-float(path[-1, 0, 3]) * 8 / 2 / math.tan(math.radians(30)))  # latent cells the scene moves right
    follow = lambda z: float((z[:, :, -1, :, shift:] * z[:, :, 0, :, :-shift]).mean())  # noqa: E731
    assert follow(noise) > .35 and abs(follow(plain)) < .15


def test_explicit_path_replaces_the_prompts(checkpoint, tmp_path):
    path = torch.eye(4).repeat(5, 1, 1)
    path[:, 0, 3] = torch.arange(5.0) * .1 + 3
    (tmp_path / "p.json").write_text(str(path.tolist()))
    assert torch.allclose(S.read_path(tmp_path / "p.json", 5)[:, 0, 3], torch.arange(5.0).double() * .1, atol=1e-6)
    with pytest.raises(ValueError, match="must hold 9 finite 4x4"):
        S.read_path(tmp_path / "p.json", 9)
    out = tmp_path / "a.mp4"
    assert S.main(["push_in a box", "--model", str(checkpoint), "--out", str(out), "--path", str(tmp_path / "p.json")]) == 0
    moved = iio.imread(out)
    assert S.main(["push_in a box", "--model", str(checkpoint), "--out", str(out)]) == 0
    assert (moved != iio.imread(out)).any()


def test_bad_argument_as_a_user_meets_it(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    run = subprocess.run([sys.executable, ROOT / "sample.py", "a box", "--model", folder, "--out", tmp_path / "o" / "a.mp4"],
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("sample.py: ") and run.stderr.count("\n") == 1
    assert "vae/diffusion_pytorch_model.safetensors is not a whole safetensors file" in run.stderr and not (tmp_path / "o").exists()
