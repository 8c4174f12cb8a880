import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import imageio.v2 as iio_v2
import imageio.v3 as iio
import pytest
import torch
from conftest import ROOT
from imageio_ffmpeg import get_ffmpeg_exe
from safetensors.torch import load_file, save_file

import sample as S
from lora import add_lora, lora_weights
from model import load_wan
from noise_warp import camera_path, released_push


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
    with pytest.raises(ValueError, match="kind must be one of flow, dance, cps"):
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
        [alone], [path] = S.sample_videos(wan, [prompt], sampling, seed=3, noise_ids=[i])
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
        assert S.read_video(file)[1] == S.sampling_of(checkpoint).fps
        assert iio.imread(file).shape == (5, 16, 32, 3)
        assert iio.immeta(file)["codec"] == "h264"
    first = [iio.imread(file) for file in printed]
    assert first[2].shape[2] == 3
    assert (first[0] != first[1]).any()

    S.main(arguments)
    assert all((a == iio.imread(file)).all() for a, file in zip(first, printed))


def test_pixels_survive_a_file(tmp_path):
    assert S.as_bytes(torch.tensor([-.1, .6 / 255, 1.1]).view(3, 1, 1)).flatten().tolist() == [0, 1, 255]
    greys = torch.tensor([0, .25, .5, 1])
    for grey in greys:
        S.write_video(tmp_path / "a.mp4", grey.expand(5, 3, 32, 32), 8)
        assert (S.read_video(tmp_path / "a.mp4")[0] - grey).abs().max() < .003  # to the nearest of 256


@pytest.mark.parametrize("arguments, message", [
    ([" "], "the prompt is empty"),
    (["a", "--frames", "16"], "--frames must be 4k+1, got 16; try 17"),
    (["a", "--height", "50"], "--height must be a multiple of 16, got 50; try 48"),
    (["a" * 180_000], "the prompt has 180000 characters; shorten it to at most 2000"),
    (["a", "--negative", "b" * 2001], "the prompt has 2001 characters"),
    (["a \x1b[31m"], "the prompt holds the control character '\\x1b'"),
    (["a", "--width", "-16"], "--width must be between 16 and 10000, got -16"),
    (["a", "--frames", "100000001"], "--frames must be between 1 and 10000"),
    (["a", "--steps", "0"], "--steps must be between 1 and 1000, got 0"),
    (["a", "--steps", "1000000000"], "--steps must be between 1 and 1000"),
    (["a", "--num", "0"], "--num must be between 1 and 1000, got 0"),
    (["a", "--guidance", "nan"], "--guidance must be between 0 and 100, got nan"),
    (["a", "--guidance", "-1"], "--guidance must be between 0 and 100, got -1"),
    (["a", "--shift", "0"], "--shift must be between 0.01 and 100, got 0"),
    (["a", "--shift", "nan"], "--shift must be between 0.01 and 100, got nan"),
    (["a", "--degradation", "2"], "--degradation must be between 0 and 1"),
    (["a", "--degradation", "nan"], "--degradation must be between 0 and 1"),
    (["a", "--strength", "inf"], "--strength must be between 0 and 10, got inf"),
    (["a", "--strength", "-1"], "--strength must be between 0 and 10, got -1"),
    (["a", "--frames", "9997", "--height", "9600", "--width", "9600", "--num", "9"], "GB of memory, and there are"),
    (["a", "--device", "bogus"], "--device must be cpu or cuda, got 'bogus'"),
    (["a", "--device", "meta"], "--device must be cpu or cuda, got 'meta'"),
    (["a", "--device", "cuda:99"], "--device cuda:99 needs a CUDA GPU"),
    (["a", "--released", "--no-transport"], "--released pushes transported noise in, and --no-transport"),
    (["a", "--path", "nothing.json"], "nothing.json is missing; check the name"),
    (["a", "--model", "nowhere"], "no model folder 'nowhere'"),
    (["a", "--out", "clip.gif"], "--out must end in .mp4"),
    (["a", "--out", "c" * 300 + ".mp4"], "(File name too long); choose another --out"),
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
    with pytest.raises(ValueError, match="must hold a matrix for each of 9 frames, it has 5"):
        S.read_path(file, 9)

    out = tmp_path / "a.mp4"
    arguments = ["push_in a box", "--model", str(checkpoint), "--out", str(out)]
    assert S.main([*arguments, "--path", str(file)]) == 0
    moved = iio.imread(out)
    assert S.main(arguments) == 0
    assert (moved != iio.imread(out)).any()


def mirrored(pose):
    pose[0][0] = -1


def stretched(pose):
    pose[1][1] = 1.01


def singular(pose):
    pose[2][2] = 0


def no_pose(pose):
    pose[3][0] = 1


def far(pose):
    pose[0][3] = 1e30


def ragged(pose):
    pose[0].pop()


def short(pose):
    pose.pop()


def worded(pose):
    pose[0][0] = "one"


@pytest.mark.parametrize("damage, message", [
    (mirrored, "matrix 2 is no camera-to-world pose"),
    (stretched, "matrix 2 is no camera-to-world pose"),
    (singular, "matrix 2 is no camera-to-world pose"),
    (no_pose, "matrix 2 is no camera-to-world pose"),
    (far, "matrix 2 is no camera-to-world pose"),
    (ragged, r"entry \[2\]\[0\]: Expected array of length 4"),
    (short, r"entry \[2\]: Expected array of length 4"),
    (worded, r"entry \[2\]\[0\]\[0\]: Expected float, got str")])
def test_a_path_of_no_cameras_is_named(damage, message, tmp_path):
    poses = torch.eye(4).repeat(5, 1, 1).tolist()
    damage(poses[2])
    (tmp_path / "path.json").write_text(json.dumps(poses))
    with pytest.raises(ValueError, match=f"path.json.*{message}"):
        S.read_path(tmp_path / "path.json", 5)


@pytest.mark.parametrize("entries, message", [
    (dict(frames="5"), "sampling.json, entry frames: Expected int, got str"),
    (dict(frames=True), "sampling.json, entry frames: Expected int, got bool"),
    (dict(steps=0), "sampling.json: steps must be between 1 and 1000, got 0"),
    (dict(fps=-8), "sampling.json: fps must be between 1 and 240, got -8"),
    (dict(frames=6), "frames must be 4k.1, got 6"),
    (dict(guidance=[2]), "sampling.json, entry guidance: Expected float, got array")])
def test_a_models_own_sampling_is_checked(entries, message, tmp_path):
    (tmp_path / "sampling.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message):
        S.sampling_of(tmp_path)


def test_what_would_not_fit_in_memory_is_told_before_the_first_step(checkpoint, tmp_path, capsys):
    out = tmp_path / "o" / "a.mp4"
    size = ["--frames", "9997", "--height", "9600", "--width", "9600", "--num", "1000"]
    assert S.main(["a box", "--model", str(checkpoint), "--out", str(out), *size]) == 2
    error = capsys.readouterr().err
    assert "1000 x 9997 frames of 9600x9600 need about" in error
    assert error.count("\n") == 1
    assert not out.parent.exists()
    S.check_memory(load_wan(checkpoint), S.Sampling(17, 64, 64), 8)  # this fits anywhere


def test_latents_that_are_not_finite_are_no_video(checkpoint, tmp_path, capsys):
    """Finite weights can still overflow."""
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["proj_out.bias"].fill_(3e38)
    save_file(state, file)
    out = tmp_path / "o" / "a.mp4"
    assert S.main(["a box", "--model", str(folder), "--out", str(out)]) == 2
    assert "made latents that are not finite; lower --guidance" in capsys.readouterr().err
    assert not out.parent.exists()


def test_adapters_stand_side_by_side_from_one_noise(checkpoint, tmp_path, capsys):
    """Each column is what the command makes with that adapter alone; a missing one is found before sampling."""
    torch.manual_seed(0)
    dit = load_wan(checkpoint).dit
    add_lora(dit)
    for layer in dit.modules():
        if hasattr(layer, "lora_B"):
            torch.nn.init.normal_(layer.lora_B)
    adapter = tmp_path / "lora.safetensors"
    save_file(lora_weights(dit), adapter)

    arguments = ["push_in a box", "--model", str(checkpoint), "--frames", "5", "--steps", "2", "--num", "2"]
    videos = {}
    for name, lora in (("both", ["none", str(adapter)]), ("none", ["none"]), ("one", [str(adapter)])):
        out = tmp_path / name / "x.mp4"
        assert S.main([*arguments, "--out", str(out), "--lora", *lora]) == 0
        videos[name] = S.read_video(out.with_stem("x_1"))[0]
        if name == "both":
            assert f"top to bottom: none, {adapter}" in capsys.readouterr().out
    W = videos["none"].shape[-1]
    assert videos["both"].shape[-1] == 2 * W + 4
    for columns, name in ((slice(W), "none"), (slice(-W, None), "one")):
        assert (videos["both"][..., columns] - videos[name]).abs().mean() < .02  # but for the compression
    assert (videos["none"] - videos["one"]).abs().mean() > .04

    assert S.main([*arguments, "--out", str(tmp_path / "y" / "x.mp4"), "--lora", str(adapter), "nowhere"]) == 2
    assert "no LoRA file 'nowhere'" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()

    # a bad one of the second column is found before the first is sampled
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 8)
    save_file({"stranger.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    for name, message in (("bad", "is not a whole safetensors file"), ("other", "fits no layer of this model")):
        bad = tmp_path / f"{name}.safetensors"
        out = tmp_path / "y" / "x.mp4"
        assert S.main([*arguments, "--out", str(out), "--lora", "none", str(adapter), str(bad)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1  # no progress bar
        assert not out.parent.exists()


@pytest.mark.parametrize("out, more, message", [
    ("{tmp}/" + "x" * 242 + ".mp4", "", "File name too long"),  # with its temporary name
    ("{tmp}/nowhere/x.mp4", "", "nowhere/x.mp4' .No such file"),
    ("{tmp}/nowhere/y/x.mp4", "", "nowhere/y/x.mp4' .No such file"),
    ("{tmp}/sheet.mp4", "", "sheet.png is a folder"),
    ("{tmp}/many.mp4", "--num 2", "many_1.mp4 is a folder"),
    ("{tmp}/\udcff.mp4", "", r"udcff.mp4' is not UTF-8; give another name")])
def test_what_could_not_be_written_in_the_end_is_found_before_the_model_is_read(out, more, message, tmp_path, capsys):
    (tmp_path / "nowhere").symlink_to("no such folder")
    for name in ("sheet.png", "many_1.mp4"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.iterdir())
    assert S.main(["a box", "--out", out.format(tmp=tmp_path), "--model", "no model", *more.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("idle", [["--strength", "5"], ["--no-transport"]])
def test_a_path_leaves_no_option_idle(idle, tmp_path, capsys):
    assert S.main(["a box", "--path", "p.json", *idle, "--out", str(tmp_path / "x.mp4")]) == 2
    assert "--path is the noise's camera path, which --strength does not scale" in capsys.readouterr().err


def test_what_is_no_video_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")  # would hang
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("pipe.mp4", "text.mp4", "nothing.mp4", "."):
        with pytest.raises(ValueError, match="cannot be read as a video") as error:
            S.read_video(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_video_is_whole_and_in_one_file(tmp_path):
    """Neither a list of other files, nor a picture, nor what was cut or damaged passes as an mp4."""
    torch.manual_seed(0)
    whole = tmp_path / "whole.mp4"
    S.write_video(whole, torch.rand(17, 3, 64, 64), 8)
    assert S.read_video(whole)[0].shape == (17, 3, 64, 64)
    bad = {name: tmp_path / f"{name}.mp4" for name in ("list", "picture", "cut", "damaged")}
    bad["list"].write_text("ffconcat version 1.0\nfile whole.mp4\n")
    bad["picture"].write_bytes(iio.imwrite("<bytes>", torch.zeros(64, 64, 3).byte().numpy(), extension=".png"))
    # its index in front, as for the web: a cut file still opens
    ffmpeg = [get_ffmpeg_exe(), "-loglevel", "error", "-i", whole, "-c", "copy", "-movflags", "+faststart"]
    subprocess.run([*ffmpeg, tmp_path / "web.mp4"], check=True)
    data = (tmp_path / "web.mp4").read_bytes()
    bad["cut"].write_bytes(data[:len(data) * 2 // 3])
    third = len(data) // 3
    bad["damaged"].write_bytes(data[:third] + bytes(third) + data[2 * third:])
    for name, file in bad.items():
        with pytest.raises(ValueError, match=f"{name}.mp4' cannot be read as a video"):
            S.read_video(file)


def test_a_video_that_could_not_be_written_whole_is_an_error(tmp_path, monkeypatch):
    """ffmpeg writes a part and fails without a word, as on a full disk."""
    def cut(part, *_, **__):
        whole(part, *_, **__)
        part.write_bytes(part.read_bytes()[:-200])

    whole = iio_v2.mimwrite
    monkeypatch.setattr(iio_v2, "mimwrite", cut)
    with pytest.raises(OSError, match="cannot write '.*a.mp4' .ffmpeg could not write all frames"):
        S.write_video(tmp_path / "a.mp4", torch.rand(5, 3, 16, 32))
    assert not list(tmp_path.iterdir())


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


# ------------------------------------------------------------------------------------ every option has its effect

def test_every_option_of_sampling_reaches_the_latents(checkpoint):
    wan, own = load_wan(checkpoint), S.sampling_of(checkpoint)
    ways = [dict(), dict(seed=1), dict(transport=False), dict(solver="euler"), dict(negative="a box"),
            dict(strength=3.0)]
    ways += [dict(sampling=dataclasses.replace(own, **{name: value}))
             for name, value in dict(shift=7.0, guidance=4.0, steps=3, degradation=.9).items()]
    found = [S.sample_latents(wan, ["push_in a red sphere"], **dict(sampling=own) | way)[0].flatten()
             for way in ways]
    assert torch.pdist(torch.stack(found)).min() > 1e-3
    assert torch.equal(S.noise_levels(wan, 4), S.sigmas(4, 3.0)), "the model's own shift"
    assert torch.equal(S.noise_levels(SimpleNamespace(shift=None), 4), S.sigmas(4, 5.0)), "it states none"


def test_every_option_of_the_command_reaches_the_video(checkpoint):
    own, videos = S.sampling_of(checkpoint), []
    for way in ("", "--seed 1", "--no-transport", "--released", "--strength 3", "--solver euler", "--negative box"):
        a = S.parse_arguments(["push_in a red sphere", "--model", str(checkpoint), "--device", "cpu", *way.split()])
        videos.append(S.videos_of_column(a, "none", own, None)[0].flatten())
    assert torch.pdist(torch.stack(videos)).min() > 0  # two calls alike are equal to the bit


@pytest.mark.parametrize("solver", S.SOLVERS)
def test_what_changes_latents_is_called_after_every_step(solver, checkpoint):
    steps = []

    def after_step(x, i):
        steps.append(i)
        return torch.full_like(x, i)

    x = S.sample(load_wan(checkpoint), ["a box"], torch.randn(1, 4, 2, 2, 4), 3, solver=solver, after_step=after_step)
    assert steps == [0, 1, 2]
    assert (x == 2).all()


def test_released_sampling_pushes_the_carried_noise_into_white(checkpoint):
    wan, own, path = load_wan(checkpoint), S.sampling_of(checkpoint), camera_path(["push_in"], 5)
    white = S.initial_noise(wan, path, 16, 32, [S.generator(0, 0, 0, 0, "white")], transport=False)
    carried = S.initial_noise(wan, path, 16, 32, [S.generator(0, 0, 0, 0, "noise")], True, own.degradation)
    expected = S.sample(wan, ["push_in a box"], white, own.steps, own.guidance,
                        after_step=released_push(white, carried))
    assert torch.equal(S.sample_latents(wan, ["push_in a box"], own, released=True)[0], expected)


def test_euler_changes_latents_after_every_step():
    x = S.euler(lambda x, sigma: torch.zeros_like(x), torch.zeros(1, 2), S.sigmas(3, 1.0), lambda x, i: x + 10 ** i)
    assert x.tolist() == [[111.0, 111.0]]


def test_a_video_keeps_its_frames_a_second(tmp_path):
    S.write_video(tmp_path / "a.mp4", torch.rand(5, 3, 16, 32), 8)
    assert S.read_video(tmp_path / "a.mp4")[1] == 8
