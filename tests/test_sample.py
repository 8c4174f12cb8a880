import json
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
from noise_warp import camera_path


# ----------------------------------------------------------------------------------------- schedule and steps

@pytest.mark.parametrize("steps, shift", [(1, 1.0), (7, 3.0), (50, 5.0)])
def test_sigmas_fall_from_one_to_zero_by_the_formula(steps, shift):
    levels = S.sigmas(steps, shift)
    assert levels.shape == (steps + 1,)
    assert levels[0] == 1
    assert levels[-1] == 0
    assert (levels[1:] < levels[:-1]).all()
    u = 1 - torch.arange(steps) / steps * .999
    assert torch.allclose(levels[:-1], shift * u / (1 + (shift - 1) * u), atol=1e-6)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        S.sigmas(0, shift)
    with pytest.raises(ValueError, match="shift must be a positive number"):
        S.sigmas(steps, 0.0)


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_eta_zero_is_the_ode_to_the_bit(kind):
    x, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for sigma, sigma_next in ((1.0, .9), (.7, .31), (.1, 0.0)):
        mean, std = S.transition(x, v, sigma, sigma_next, eta=0.0, kind=kind)
        assert torch.equal(mean, S.transition(x, v, sigma, sigma_next)[0])
        assert torch.equal(mean, x - v * (torch.tensor(sigma) - torch.tensor(sigma_next)))
        assert std == 0


@pytest.mark.parametrize("kind, s", [("flow", .7 * math.sqrt(.6 / .4)), ("dance", .7)])
def test_transition_is_the_papers_formula(kind, s):
    x, v = torch.randn(2, 5), torch.randn(2, 5)
    sigma, sigma_next = .6, .5
    mean, std = S.transition(x, v, sigma, sigma_next, .7, kind)
    drift = v + s ** 2 / (2 * sigma) * (x + (1 - sigma) * v)
    assert torch.allclose(mean, x - drift * (sigma - sigma_next), atol=1e-6)
    assert std.item() == pytest.approx(s * math.sqrt(sigma - sigma_next), rel=1e-5)


def test_the_first_flow_step_divides_by_one_less_the_next_sigma():
    x, v = torch.randn(2, 5), torch.randn(2, 5)
    _, std = S.transition(x, v, 1.0, .9, .7, "flow")
    assert std.item() == pytest.approx(.7 * math.sqrt(1 / .1) * math.sqrt(.1), rel=1e-5)


def test_cps_keeps_the_coefficients_and_unknown_kinds_are_refused():
    """In cps the share of noise in the mean and the noise that is added are together sigma_next."""
    x0, eps = torch.randn(2, 5), torch.randn(2, 5)
    sigma, sigma_next, eta = .6, .5, .7
    x, v = (1 - sigma) * x0 + sigma * eps, eps - x0
    mean, std = S.transition(x, v, sigma, sigma_next, eta, "cps")
    kept = sigma_next * math.cos(eta * math.pi / 2)
    assert torch.allclose(mean, (1 - sigma_next) * x0 + kept * eps, atol=1e-6)
    assert std.item() ** 2 + kept ** 2 == pytest.approx(sigma_next ** 2, rel=1e-5)
    with pytest.raises(ValueError, match="kind must be flow, dance or cps"):
        S.transition(x, v, sigma, sigma_next, eta, "euler")


def test_log_prob_equals_torch_distributions():
    x, mean, std = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.tensor(.37)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)
    assert torch.allclose(S.log_prob(x, mean, std), expected, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- solvers

def gaussian_velocity(x, sigma, mean=2.0, spread=.5):
    """E[eps - x0 | x] when x0 ~ N(mean, spread^2): the ODE's solution is known."""
    a = 1 - sigma
    variance = a * a * spread ** 2 + sigma * sigma
    eps = sigma * (x - a * mean) / variance
    x0 = mean + a * spread ** 2 * (x - a * mean) / variance
    return eps - x0


@pytest.mark.parametrize("solver, rate, bound", [("euler", 1.8, .05), ("unipc", 2.7, .005)])
def test_solvers_converge(solver, rate, bound):
    """Twice the steps: half Euler's error, less than half of UniPC's, whose end steps are of order 1."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = 2 + .5 * x  # the flow maps N(0,1) to N(2, .5^2) monotonically
    errors = []
    for steps in (16, 32, 64):
        found = S.SOLVERS[solver](gaussian_velocity, x, S.sigmas(steps, 1.0).double())
        errors.append(float((found - exact).abs().max()))
    assert errors[0] / errors[1] > rate
    assert errors[1] / errors[2] > rate
    assert errors[2] < bound


def test_generator_depends_on_every_part_of_its_key_only():
    def draw(*key):
        return tuple(torch.randn(4, generator=S.generator(*key)).tolist())

    assert draw(1, 2, 3, "noise") == draw(1, 2, 3, "noise")
    keys = [(1, 2, 3, "noise"), (1, 2, 3, "sde"), (1, 3, 2, "noise"), (12, 3, "noise"), (0,)]
    assert len({draw(*key) for key in keys}) == len(keys)


# ------------------------------------------------------------------------------------------------ the sampler

def test_guidance_is_one_batched_forward_of_the_same_velocities(checkpoint):
    wan = load_wan(checkpoint)
    noise = torch.randn(2, 4, 2, 2, 4)
    prompts = ["a red sphere", "push_in a blue box on a checkered green floor"]
    found = S.sample(wan, prompts, noise, steps=3, guidance=3.0, shift=3.0, solver="euler", negative="a box")
    levels, x = S.sigmas(3, 3.0), noise
    text, negative = wan.encode_text(prompts), wan.encode_text(["a box", "a box"])
    with torch.no_grad():
        for sigma, sigma_next in zip(levels, levels[1:]):
            t = (1000 * sigma).expand(2)
            conditional, unconditional = wan.dit(x, t, text), wan.dit(x, t, negative)
            v = unconditional + 3.0 * (conditional - unconditional)
            x = x - v * (sigma - sigma_next)
    assert torch.allclose(found, x, atol=1e-4)

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


# --------------------------------------------------------------------------------- noise -> latents -> videos

def test_a_models_own_sampling_gives_way_to_what_is_asked(checkpoint, tmp_path):
    assert S.sampling_of(checkpoint) == S.Sampling(5, 16, 32, 2, 2.0, fps=8)
    assert S.sampling_of(checkpoint, frames=9, steps=None) == S.Sampling(9, 16, 32, 2, 2.0, fps=8)
    assert S.sampling_of("nobody/has-this", width=64) == S.Sampling(width=64)


def test_transport_is_the_default_and_each_member_has_its_own_noise(checkpoint):
    wan = load_wan(checkpoint)
    path = camera_path(["move_left"], 17)

    def noise(members, **options):
        return S.initial_noise(wan, path, 64, 64, [S.generator(5, member) for member in members], **options)

    carried, plain = noise(range(3)), noise(range(3), transport=False)
    assert torch.equal(carried[2:], noise([2]))
    assert not torch.equal(carried[0], carried[1])

    assert path[-1, 0, 3] < -.3
    # how many latent cells the scene moves right
    shift = round(-float(path[-1, 0, 3]) * 8 / 2 / math.tan(math.radians(30)))

    def likeness(z):
        return float((z[:, :, -1, :, shift:] * z[:, :, 0, :, :-shift]).mean())

    assert likeness(carried) > .35
    assert abs(likeness(plain)) < .15


def test_videos_do_not_depend_on_the_batch(checkpoint):
    """Members of a seed one by one make the same pixels as together, where the i-th prompt takes the i-th."""
    wan, sampling = load_wan(checkpoint), S.sampling_of(checkpoint)
    prompts = ["push_in a red sphere", "Camera pan left. A blue box.", "push_in a red sphere"]
    together, paths = S.sample_videos(wan, prompts, sampling, seed=3)
    for i, prompt in enumerate(prompts):
        [alone], [path] = S.sample_videos(wan, [prompt], sampling, seed=3, members=[i])
        assert alone.shape == (5, 3, 16, 32)
        assert (alone - together[i]).abs().max() < 1e-5
        assert torch.equal(path, paths[i])
    assert (together[0] - together[2]).abs().max() > 1e-3  # one prompt, two members


def test_videos_are_decoded_as_if_each_were_alone(checkpoint):
    wan = load_wan(checkpoint)
    latents = torch.randn(3, 4, 2, 2, 4)
    together = S.decode_videos(wan, latents)
    with torch.no_grad():
        alone = [wan.vae.decode(x[None])[0] for x in latents]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_psnr_by_frame_and_over_all():
    """Two frames .1 and .01 off: 20 and 40 dB, their mean 30; over all, the mean square error is .00505."""
    a = torch.full((2, 3, 8, 8), .5)
    b = torch.stack([a[0] + .1, a[1] + .01])
    assert S.psnr(a, b) == pytest.approx(30, abs=1e-3)
    assert S.psnr(a, b, per_frame=False) == pytest.approx(-10 * math.log10(.00505), abs=1e-3)
    assert S.psnr(a, a) == 100


# ------------------------------------------------------------------------------------------- the command line

def test_the_command_writes_videos_and_a_contact_sheet(checkpoint, tmp_path, capsys):
    out = tmp_path / "deep" / "clip.mp4"
    arguments = ["push_in a red sphere", "--model", str(checkpoint), "--out", str(out), "--num", "2"]
    assert S.main(arguments) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(out.parent / name) for name in ("clip_0.mp4", "clip_1.mp4", "clip.png")]
    written = sorted(file.name for file in out.parent.iterdir())
    assert written == ["clip.png", "clip_0.mp4", "clip_1.mp4"]  # no temporary files left
    for file in printed[:2]:
        assert iio.imread(file).shape == (5, 16, 32, 3)
        assert iio.immeta(file)["codec"] == "h264"
    first = [iio.imread(file) for file in printed]
    assert first[2].shape[2] == 3
    assert (first[0] != first[1]).any()

    S.main(arguments)
    assert all((a == iio.imread(file)).all() for a, file in zip(first, printed))


@pytest.mark.parametrize("arguments, message", [
    ([" "], "the prompt is empty"),
    (["a", "--frames", "16"], "--frames must be 4k+1, got 16; try 17"),
    (["a", "--height", "50"], "--height must be a multiple of 16, got 50; try 48"),
    (["a", "--width", "-16"], "--width must be positive"),
    (["a", "--steps", "0"], "--steps must be at least 1"),
    (["a", "--num", "0"], "--num must be at least 1"),
    (["a", "--guidance", "nan"], "--guidance must be a finite number, got nan"),
    (["a", "--shift", "0"], "--shift must be a positive"),
    (["a", "--degradation", "2"], "--degradation must be between 0 and 1"),
    (["a", "--strength", "inf"], "--strength must be a finite"),
    (["a", "--released", "--no-transport"], "--released pushes transported noise in, and --no-transport"),
    (["a", "--path", "nothing.json"], "--path nothing.json is not a JSON list of 4x4 matrices"),
    (["a", "--model", "nowhere"], "no model folder 'nowhere'"),
    (["a", "--out", "clip.gif"], "--out must end in .mp4"),
    (["a", "--out", "/proc/nothing/clip.mp4"], "cannot write '/proc/nothing/clip.mp4'")])
def test_bad_arguments_get_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert S.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_explicit_path_replaces_the_prompts(checkpoint, tmp_path):
    path = torch.eye(4).repeat(5, 1, 1)
    path[:, 0, 3] = torch.arange(5.0) * .1 + 3
    file = tmp_path / "path.json"
    file.write_text(json.dumps(path.tolist()))
    assert torch.allclose(S.read_path(file, 5)[:, 0, 3], torch.arange(5.0).double() * .1, atol=1e-6)
    with pytest.raises(ValueError, match="must hold 9 finite 4x4"):
        S.read_path(file, 9)

    out = tmp_path / "a.mp4"
    arguments = ["push_in a box", "--model", str(checkpoint), "--out", str(out)]
    assert S.main([*arguments, "--path", str(file)]) == 0
    moved = iio.imread(out)
    assert S.main(arguments) == 0
    assert (moved != iio.imread(out)).any()


def test_a_damaged_model_as_a_user_meets_it(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    out = tmp_path / "o" / "a.mp4"
    command = [sys.executable, ROOT / "sample.py", "a box", "--model", folder, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("sample.py: ")
    assert done.stderr.count("\n") == 1
    assert "vae/diffusion_pytorch_model.safetensors is not a whole safetensors file" in done.stderr
    assert not out.parent.exists()
