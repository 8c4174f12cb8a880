import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import splat
from splat import Gaussians, matrix_to_quaternion, quaternion_to_matrix, render, rotate_sh, sh_basis

FIELDS = ("means", "scales", "rotations", "harmonics", "opacities")


def scene(n, seed=0, opacity=(0.0, 1.0), dtype=torch.float32):
    """n random Gaussians in front of and around the cameras of `cameras`."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=dtype)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    means = torch.stack([uniform(n) * 3 - 1.5, uniform(n) * 3 - 1.5, uniform(n) * 4 - .5], 1)
    scales = uniform(n, 3) * .2 + .01
    rotations = F.normalize(normal(n, 4), dim=1)
    harmonics = normal(n, 3, 9) * .4
    opacities = uniform(n) * (opacity[1] - opacity[0]) + opacity[0]
    return Gaussians(means, scales, rotations, harmonics, opacities)


def cameras(V, H, W):
    """V turning cameras a little apart -> camera-to-world (V, 4, 4), intrinsics (V, 3, 3)."""
    poses = torch.eye(4).repeat(V, 1, 1)
    for v in range(V):
        poses[v, :3, :3] = quaternion_to_matrix(torch.tensor([.05 * v, -.1 * v, .02, 1.0]))
        poses[v, :3, 3] = torch.tensor([.1 * v, 0, -1.0])
    K = torch.tensor([[.9 * W, 0, .48 * W], [0, .8 * W, .53 * H], [0, 0, 1]])
    return poses, K.repeat(V, 1, 1)


def oracle(g, pose, K, H, W):
    """Every Gaussian at every pixel, one by one, in float64, straight from the 3DGS equations."""
    g = Gaussians(*(getattr(g, field).double() for field in FIELDS))
    pose, K = pose.double(), K.double()
    R, t = pose[:3, :3].T, -pose[:3, :3].T @ pose[:3, 3]
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    items = []
    for i in range(len(g.means)):
        x, y, z = R @ g.means[i] + t
        if not splat.NEAR < z < splat.FAR or g.opacities[i] < 1 / 255:
            continue
        u = max(min(float(x / z), float((W - cx) / fx + .15 * W / fx)), float(-(cx / fx + .15 * W / fx)))
        v = max(min(float(y / z), float((H - cy) / fy + .15 * H / fy)), float(-(cy / fy + .15 * H / fy)))
        J = torch.tensor([[fx / z, 0, -fx * u / z], [0, fy / z, -fy * v / z]], dtype=torch.float64)
        M = quaternion_to_matrix(g.rotations[i][[1, 2, 3, 0]]) @ torch.diag(g.scales[i])
        conic = torch.linalg.inv(J @ R @ M @ M.T @ R.T @ J.T + .3 * torch.eye(2, dtype=torch.float64))
        direction = F.normalize(g.means[i] - pose[:3, 3], dim=0)
        colour = (g.harmonics[i] @ sh_basis(direction)[:g.harmonics.shape[-1]] + .5).clamp_min(0)
        centre = torch.stack([fx * x / z + cx, fy * y / z + cy])
        items.append((float(z), centre, conic, colour, g.opacities[i]))
    items.sort(key=lambda item: item[0])
    rgb, depth, alpha = torch.zeros(3, H, W), torch.zeros(H, W), torch.zeros(H, W)
    for row in range(H):
        for column in range(W):
            T, c, d = 1.0, torch.zeros(3, dtype=torch.float64), 0.0
            for z, centre, conic, colour, opacity in items:
                delta = torch.tensor([column + .5, row + .5], dtype=torch.float64) - centre
                a = min(.999, float(opacity * torch.exp(-.5 * delta @ conic @ delta)))
                if a < 1 / 255:
                    continue
                if T * (1 - a) <= 1e-4:
                    break
                c, d, T = c + T * a * colour, d + T * a * z, T * (1 - a)
            rgb[:, row, column] = c
            alpha[row, column] = 1 - T
            depth[row, column] = d / max(1 - T, 1e-10)
    return rgb, depth, alpha


def test_quaternions_and_spherical_harmonics_rotate():
    """There and back is the same rotation; turned coefficients at d are the old ones at R^T d."""
    q = F.normalize(torch.randn(200, 4, dtype=torch.float64), dim=-1)
    nearly = torch.tensor([[1.0, 1e-9, 0, 0], [0, 1, 0, 1e-9]])
    q = torch.cat([q, torch.eye(4, dtype=q.dtype), nearly])
    R = quaternion_to_matrix(q)
    assert torch.allclose(quaternion_to_matrix(matrix_to_quaternion(R)), R, atol=1e-9)
    harmonics = torch.randn(200, 3, 9, dtype=torch.float64)
    directions = F.normalize(torch.randn(200, 3, dtype=torch.float64), dim=-1)
    turned = torch.einsum("vcn,vn->vc", rotate_sh(harmonics, R[:200]), sh_basis(directions))
    back = torch.einsum("vij,vi->vj", R[:200], directions)  # R^T d
    assert torch.allclose(turned, torch.einsum("vcn,vn->vc", harmonics, sh_basis(back)), atol=1e-9)


@pytest.mark.parametrize("n, opacity", [(60, (0, 1)), (60, (.9, 1)), (40, (0, .05)), (1, (.7, .8))])
def test_against_a_brute_force_oracle(n, opacity):
    g = scene(n, n, opacity)
    poses, K = cameras(2, 9, 12)
    rgb, depth, alpha = render(g, poses, K, 9, 12)
    for v in range(2):
        expected = oracle(g, poses[v], K[v], 9, 12)
        assert (rgb[v] - expected[0]).abs().max() < 1e-5
        assert (alpha[v] - expected[2]).abs().max() < 1e-5
        assert ((depth[v] - expected[1]) * expected[2]).abs().max() < 2e-5


@pytest.fixture
def three_threads():
    """`make test` gives a worker one, with which no two views are drawn at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_many_views_are_the_views_and_leave_the_threads_as_they_were(three_threads):
    g = scene(100, 3)
    poses, K = cameras(5, 12, 16)
    together = render(g, poses, K, 12, 16)
    for i in range(5):
        alone = render(g, poses[i:i + 1], K[i:i + 1], 12, 16)
        assert all(torch.equal(a[i], b[0]) for a, b in zip(together, alone))
    g.means.requires_grad_(True)
    assert render(g, poses, K, 12, 16)[0].requires_grad
    with torch.no_grad():
        assert not render(g, poses, K, 12, 16)[0].requires_grad
    with pytest.raises(IndexError):
        render(g, poses[:, :, :2], K, 12, 16)
    assert torch.get_num_threads() == 3


def one(mean, scale=.05, opacity=.8, colour=(1.0, 0, 0)):
    """One round Gaussian of one colour."""
    harmonics = ((torch.tensor(colour) - .5) / .28209479177387814).view(1, 3, 1)
    unturned = torch.tensor([[1.0, 0, 0, 0]])
    return Gaussians(torch.tensor([mean]), torch.full((1, 3), scale), unturned, harmonics,
                     torch.tensor([opacity]))


def join(*scenes):
    return Gaussians(*(torch.cat([getattr(g, field) for g in scenes]) for field in FIELDS))


POSE, CAMERA = torch.eye(4)[None], torch.tensor([[[20.0, 0, 7.5], [0, 20, 7.5], [0, 0, 1]]])


def test_one_gaussian_on_the_axis():
    rgb, depth, alpha = render(one([0.0, 0, 2]), POSE, CAMERA, 15, 15)
    variance = (20 * .05 / 2) ** 2 + .3
    for offset in range(3):
        expected = .8 * math.exp(-offset ** 2 / 2 / variance)
        assert alpha[0, 7, 7 + offset] == pytest.approx(expected, rel=1e-5)
    assert depth[0, 7, 7] == pytest.approx(2.0)
    assert rgb[0, :, 7, 7].tolist() == pytest.approx([.8, 0, 0], abs=1e-6)
    assert torch.allclose(alpha[0], alpha[0].T, atol=1e-6)
    assert alpha[0, 0, 0] == 0


def test_two_overlapping_composite_front_to_back_whatever_their_order():
    near = one([0.0, 0, 2], colour=(1.0, 0, 0))
    far = one([0.0, 0, 4], opacity=.5, colour=(0.0, 1, 0))
    for g in (join(near, far), join(far, near)):
        rgb, depth, alpha = render(g, POSE, CAMERA, 15, 15)
        assert rgb[0, :, 7, 7].tolist() == pytest.approx([.8, .2 * .5, 0], abs=1e-6)
        assert alpha[0, 7, 7] == pytest.approx(.9)
        assert depth[0, 7, 7] == pytest.approx((.8 * 2 + .1 * 4) / .9)


def test_behind_the_camera_and_too_faint_show_nothing():
    for g in (one([0.0, 0, -2]), one([0.0, 0, .005]), one([0.0, 0, 2], opacity=1 / 256)):
        assert all(x.abs().max() == 0 for x in render(g, POSE, CAMERA, 15, 15))
    _, _, alpha = render(one([0.0, 0, 2], opacity=1 / 254), POSE, CAMERA, 15, 15)
    assert alpha.max() == pytest.approx(1 / 254)


def test_alpha_is_capped_and_closed_pixels_take_no_more():
    _, _, alpha = render(one([0.0, 0, 2], opacity=1.0), POSE, CAMERA, 15, 15)
    assert alpha.max() == pytest.approx(.999)
    # the second would close the pixel (1e-6 <= 1e-4): it is left out
    colours = ((1.0, 0, 0), (0.0, 1, 0), (0.0, 0, 0))
    stack = join(*(one([0.0, 0, 2 + i], opacity=1.0, colour=colour) for i, colour in enumerate(colours)))
    rgb, _, alpha = render(stack, POSE, CAMERA, 15, 15)
    assert rgb[0, :, 7, 7].tolist() == pytest.approx([.999, 0, 0])
    assert alpha[0, 7, 7] == pytest.approx(.999)


def test_one_covering_the_screen():
    _, depth, alpha = render(one([0.0, 0, 2], scale=50.0, opacity=.6), POSE, CAMERA, 15, 15)
    assert torch.allclose(alpha, torch.tensor(.6), atol=3e-4)
    assert torch.allclose(depth, torch.tensor(2.0), atol=1e-5)


def test_long_thin_splats_are_no_noise():
    """A needle seen from almost inside, thousands of pixels long: its covariance is all but singular."""
    needle = one([0.0, 0, 2])
    needle.rotations = F.normalize(torch.tensor([[1.0, 0, 0, .4]]), dim=1)
    for length in (1.0, 10.0, 100.0, 1e3, 1e4):
        needle.scales = torch.tensor([[length, .01, .01]])
        rgb, depth, alpha = render(needle, POSE, CAMERA, 15, 15)
        expected = oracle(needle, POSE[0], CAMERA[0], 15, 15)
        assert (rgb[0] - expected[0]).abs().max() < 1e-5
        assert (alpha[0] - expected[2]).abs().max() < 1e-5
    needle.scales = torch.tensor([[1e25, 0, 0]])  # beyond float32: nothing rather than noise
    assert all(x.isfinite().all() for x in render(needle, POSE, CAMERA, 15, 15))


def test_nothing_to_draw_and_one_that_is_broken():
    nothing = Gaussians(*(getattr(scene(1), field)[:0].requires_grad_() for field in FIELDS))
    rgb, depth, alpha = render(nothing, POSE, CAMERA, 15, 15)
    assert rgb.abs().max() == depth.abs().max() == alpha.abs().max() == 0
    (rgb.sum() + alpha.sum()).backward()
    good = one([0.0, 0, 2])
    for field, value in (("means", math.nan), ("means", math.inf), ("scales", math.nan), ("scales", 0.0)):
        broken = one([0.0, 0, 1.5], opacity=1 / 300)  # too faint to show, were it whole
        getattr(broken, field)[0, 0] = value
        for a, b in zip(render(join(good, broken), POSE, CAMERA, 15, 15), render(good, POSE, CAMERA, 15, 15)):
            assert torch.equal(a, b)


def test_gradients():
    """Of every Gaussian parameter, against finite differences in float64. The last three are nearly opaque and
    wide: they reach the cap, and close pixels."""
    g = scene(6, 5, (.3, .8), torch.float64)
    g.opacities[3:] = 1 - 1e-4 * torch.arange(3, dtype=torch.float64)
    g.scales[3:] *= 20
    pose, K = cameras(1, 5, 6)

    def rendered(*values):
        rgb, depth, alpha = splat._view(Gaussians(*values), pose[0].double(), K[0].double(), 5, 6)
        return rgb, depth * alpha, alpha

    values = tuple(getattr(g, field).requires_grad_() for field in FIELDS)
    assert torch.autograd.gradcheck(rendered, values, eps=1e-6, atol=1e-5, nondet_tol=1e-9)


def test_gradients_of_views_in_threads_are_the_views(three_threads):
    g = scene(50, 2)
    poses, K = cameras(3, 12, 16)
    values = [getattr(g, field).requires_grad_() for field in FIELDS]
    together = torch.autograd.grad(sum(x.square().sum() for x in render(g, poses, K, 12, 16)), values)
    alone = [torch.autograd.grad(sum(x.square().sum() for x in render(g, poses[i:i + 1], K[i:i + 1], 12, 16)),
                                 values) for i in range(3)]
    for whole, *parts in zip(together, *alone):
        assert (whole - sum(parts)).abs().max() <= 1e-5 * whole.abs().max()


# -------------------------------------------------------------------------------------------- gsplat, without a GPU

BACKEND = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
os.write(log, b"<")
total = sum(i * i for i in range(3_000_000))
os.write(log, b">")
_C = {kernels}
"""


@pytest.fixture
def stand_in(tmp_path):
    """A package with gsplat's names that writes < when its kernels begin to be compiled, > when they are.
    -> write(kernels): what it has then, as Python."""
    folder = tmp_path / "gsplat" / "cuda"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (tmp_path / "log").touch()
    return lambda kernels: (folder / "_backend.py").write_text(BACKEND.replace("{kernels}", kernels))


def test_one_process_after_the_other_compiles_gsplat(stand_in, tmp_path):
    stand_in("object()")
    code = "import splat; splat.compile_gsplat(); splat.compile_gsplat()"
    paths = [str(tmp_path), *filter(None, sys.path)]
    started = [subprocess.Popen([sys.executable, "-c", f"import sys; sys.path[:0] = {paths}; {code}",
                                 str(tmp_path / "log")]) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    assert (tmp_path / "log").read_text() == "<><>"


@pytest.mark.parametrize("kernels, said", [("None", "gsplat has no kernels for this GPU; it needs nvcc"),
                                           ("open('/nowhere')", r"not compile its kernels .*nowhere.*nvcc")])
def test_a_gsplat_that_does_not_compile_is_one_sentence(stand_in, tmp_path, monkeypatch, kernels, said):
    stand_in(kernels)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "log")])
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "gsplat"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=said):
        splat.compile_gsplat()
    for name in ("gsplat", "gsplat.cuda", "gsplat.cuda._backend"):
        sys.modules.pop(name, None)


def test_gsplat_draws_a_few_views_at_a_time_in_order(monkeypatch):
    seen = []

    def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, *planes, **options):
        assert (quats.shape[1], scales.shape[1], colors.shape[1:]) == (4, 3, (9, 3))
        to_camera = viewmats
        seen.append(len(to_camera))
        picture = to_camera[:, 2, 3].view(-1, 1, 1, 1).expand(-1, height, width, 4)
        return picture, picture[..., :1] * 2, {}

    monkeypatch.setitem(sys.modules, "gsplat", SimpleNamespace(rasterization=rasterization))
    monkeypatch.setattr(splat, "compile_gsplat", lambda: None)
    poses, K = cameras(9, 6, 8)
    poses[:, 2, 3] = -torch.arange(9.0)
    poses[:, :3, :3] = torch.eye(3)
    rgb, depth, alpha = splat._gsplat(scene(5), poses, K, 6, 8)
    assert seen == [4, 4, 1]
    assert rgb.shape == (9, 3, 6, 8)
    assert torch.equal(depth[:, 0, 0], torch.arange(9.0))
    assert torch.equal(alpha[:, 5, 7], 2 * torch.arange(9.0))
