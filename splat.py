"""Rendering 3D Gaussians (3DGS, arXiv 2308.04079): gsplat on CUDA, compiled loops on a CPU, one function.

    rgb, depth, alpha = render(rec.gaussians, rec.camera_to_world, K, height, width)

A Gaussian of opacity o_i and colour c_i, projected to mean m_i and covariance S_i, shows at pixel p with

    alpha_i = o_i exp(-(p - m_i)^T S_i^-1 (p - m_i) / 2)
    colour = sum_i c_i alpha_i prod_{j in front of i} (1 - alpha_j)

Both sides share conventions and thresholds: pixel centres at +.5, variances widened by .3 px^2, alpha at most
.999, alphas below 1/255 skipped, a pixel closed before its transmittance would fall to 1e-4, black behind.

On a CPU: project and cull, and sort by depth (PyTorch); then, nearest first, add every Gaussian to the pixels
of its box (loops that Numba compiles). Differentiable, once, in every Gaussian parameter. Left out:
anti-aliased and 2D splats, camera distortion.
"""

import fcntl
import functools
import math
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import torch
import torch.nn.functional as F

NEAR, FAR = .01, 1e10  # depths that are drawn
WIDEN = .3  # added to both variances, in square pixels: no splat falls between pixel centres
ALPHA_MAX, ALPHA_MIN = .999, 1 / 255
CLOSED = 1e-4  # the transmittance that no pixel falls below
GSPLAT_VIEWS = 4  # that gsplat renders at once


@dataclass
class Gaussians:
    """N 3D Gaussians in world axes, float32."""
    means: torch.Tensor  # (N, 3)
    scales: torch.Tensor  # (N, 3) standard deviations
    rotations: torch.Tensor  # (N, 4) unit quaternions, w first as gsplat takes them (below: w last)
    harmonics: torch.Tensor  # (N, 3, K) SH coefficients per colour channel, K = 1, 4 or 9
    opacities: torch.Tensor  # (N,) in [0, 1]


# ----------------------------------------------------------------------------- rotations, spherical harmonics

def quaternion_to_matrix(q):
    """Quaternions (..., 4), scalar last, of any norm -> (..., 3, 3)."""
    x, y, z, w = q.unbind(-1)
    s = 2 / q.square().sum(-1)
    entries = [
        1 - s * (y * y + z * z),
        s * (x * y - z * w),
        s * (x * z + y * w),
        s * (x * y + z * w),
        1 - s * (x * x + z * z),
        s * (y * z - x * w),
        s * (x * z - y * w),
        s * (y * z + x * w),
        1 - s * (x * x + y * y)]
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def matrix_to_quaternion(R):
    """Rotations (..., 3, 3) -> unit quaternions (..., 4), scalar last and not negative."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz = R.flatten(-2).unbind(-1)
    # Sums and differences of entries across the diagonal are products of two components, times 4.
    x_y, x_z, y_z = yx + xy, xz + zx, zy + yz
    x_w, y_w, z_w = zy - yz, xz - zx, yx - xy
    products = torch.stack([  # row i: 4 q_i q for q = (x, y, z, w)
        1 + xx - yy - zz, x_y, x_z, x_w,
        x_y, 1 - xx + yy - zz, y_z, y_w,
        x_z, y_z, 1 - xx - yy + zz, z_w,
        x_w, y_w, z_w, 1 + xx + yy + zz], -1).unflatten(-1, (4, 4))
    # Each row is a multiple of q; the one of its largest component loses no digits.
    squares = products.diagonal(0, -2, -1)  # 4 q_i^2
    largest = squares.argmax(-1, keepdim=True)
    row = products.take_along_dim(largest[..., None], -2).squeeze(-2)
    q = row / (2 * squares.gather(-1, largest).sqrt())
    return torch.where(q[..., 3:] < 0, -q, q)


def sh_basis(directions):
    """Spherical harmonics of degree 0-2 at unit directions (..., 3) -> (..., 9), in 3DGS's order, signs."""
    x, y, z = directions.unbind(-1)
    return torch.stack([
        torch.full_like(x, .28209479177387814),
        -.4886025119029199 * y,
        .4886025119029199 * z,
        -.4886025119029199 * x,
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        .31539156525252005 * (2 * z * z - x * x - y * y),
        -1.0925484305920792 * x * z,
        .5462742152960396 * (x * x - y * y)], -1)


def rotate_sh(harmonics, R):
    """Coefficients (V, ..., 9) of f_c -> those of f_w(d) = f_c(R^T d), for rotations R (V, 3, 3).

    Each degree turns within itself, by the matrix that maps its basis at fixed directions d to that at R^T d
    (least squares, exact for spherical harmonics).
    """
    # Any 32 directions do; the same ones every time, so that results repeat.
    fixed = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(32, 3, generator=fixed, dtype=torch.float64), dim=-1)
    turned = sh_basis(directions @ R.double().cpu())  # rows d^T R = (R^T d)^T -> (V, 32, 9)
    degrees = [harmonics[..., :1]]  # degree 0 is the same from everywhere
    for degree in (slice(1, 4), slice(4, 9)):  # the n = 3 coefficients of degree 1, the 5 of degree 2
        matrix = torch.linalg.pinv(sh_basis(directions)[:, degree]) @ turned[..., degree]  # (V, n, n)
        of_degree = harmonics[..., degree]  # (V, ..., n)
        rows = of_degree.reshape(len(R), -1, of_degree.shape[-1])  # so there is one product a rotation
        degrees.append((rows @ matrix.mT.to(harmonics)).view(of_degree.shape))
    return torch.cat(degrees, -1)


# -------------------------------------------------------------------------------------------------- rendering

def render(gaussians, camera_to_world, intrinsics, height, width):
    """-> rgb (V, 3, H, W), depth (V, H, W) expected z-depth (0 where nothing is), alpha (V, H, W), float32.

    camera_to_world (V, 4, 4), intrinsics (V, 3, 3) in pixels of the rendered size.
    """
    if gaussians.means.is_cuda:
        return _gsplat(gaussians, camera_to_world, intrinsics, height, width)
    # One view is one long loop and runs on one core; so each thread takes views of its own.
    threads = torch.get_num_threads()
    workers = min(threads, len(intrinsics))
    grad = torch.is_grad_enabled()

    def view(pose, K):
        with torch.set_grad_enabled(grad):  # a thread's own setting
            return _view(gaussians, pose, K, height, width)

    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            views = list(pool.map(view, camera_to_world.float(), intrinsics.float()))
    finally:
        torch.set_num_threads(threads)  # the workers' setting reaches libraries of the whole process
    return tuple(torch.stack(pictures) for pictures in zip(*views))


def _gsplat(gaussians, camera_to_world, intrinsics, height, width):
    compile_gsplat()
    from gsplat import rasterization  # slow to import, and a CPU does without it
    harmonics = gaussians.harmonics.mT.contiguous()
    degree = math.isqrt(gaussians.harmonics.shape[-1]) - 1
    # a few views at a time: of each Gaussian that a view sees, gsplat keeps a copy of all harmonics
    parts = []
    poses = camera_to_world.float().split(GSPLAT_VIEWS)
    for pose, K in zip(poses, intrinsics.float().split(GSPLAT_VIEWS)):
        parts.append(rasterization(
            gaussians.means, gaussians.rotations, gaussians.scales, gaussians.opacities, harmonics,
            torch.linalg.inv(pose), K, width, height, near_plane=NEAR, far_plane=FAR, eps2d=WIDEN,
            sh_degree=degree, render_mode="RGB+ED", tile_size=16))
    picture = torch.cat([picture for picture, _, _ in parts])  # (V, H, W, 4)
    alpha = torch.cat([alpha for _, alpha, _ in parts])  # (V, H, W, 1)
    return picture[..., :3].permute(0, 3, 1, 2), picture[..., 3], alpha.squeeze(-1)


@functools.cache
def compile_gsplat():
    """Has gsplat compile its CUDA kernels, which it does when they are first imported (minutes, once a
    machine). ValueError if it cannot.

    One process after the other: gsplat deletes a build that another process has begun.
    """
    needs = ("it needs nvcc, of the CUDA version that PyTorch is built with, g++, Python's headers, "
             "and ninja on the PATH")
    with open(Path(tempfile.gettempdir()) / f"gsplat_{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        try:
            from gsplat.cuda._backend import _C
        except (ImportError, OSError, RuntimeError) as e:
            lines = str(e).strip().splitlines() or [type(e).__name__]
            reason = next((line for line in lines if "error:" in line), lines[0])[:200]
            raise ValueError(f"gsplat could not compile its kernels ({reason}); {needs}") from None
    if _C is None:
        raise ValueError(f"gsplat has no kernels for this GPU; {needs}")


def _view(gaussians, pose, K, height, width):
    """One view on the CPU -> rgb (3, H, W), depth (H, W), alpha (H, W)."""
    # Project everything, and list what can show, nearest first.
    means, opacities = gaussians.means, gaussians.opacities
    centre, z, covariance, det = project(means, gaussians.scales, gaussians.rotations, pose, K, height, width)
    order, low, high = boxes(centre, z, covariance, opacities, height, width)

    def shown(tensor):
        return tensor.index_select(0, order)

    # What each of them adds to a pixel (colour and depth), and how it fades around its centre: the exponent
    # c0 dx^2 + c1 dx dy + c2 dy^2 of its inverse covariance, the half of 3DGS's exponent included.
    rgb = colour(shown(gaussians.harmonics), shown(means), pose[:3, 3])
    features = torch.cat([rgb, shown(z)[:, None]], 1)  # (n, 4)
    xx, xy, yy = shown(covariance).unbind(1)
    exponent = torch.stack([.5 * yy, -xy, .5 * xx], 1) / shown(det)[:, None]
    splats = torch.cat([shown(centre), exponent, shown(opacities)[:, None]], 1)  # (n, 6)

    total, transmittance = Composite.apply(splats, features, low, high, height, width)
    alpha = 1 - transmittance
    depth = total[..., 3] / alpha.clamp_min(1e-10)
    return total[..., :3].permute(2, 0, 1), depth, alpha


# ------------------------------------------------------------------------------------- the CPU path, in steps

def project(means, scales, rotations, pose, K, height, width):
    """World Gaussians -> a camera's pixel means (N, 2), depths (N,), widened covariances (N, 3) xx, xy, yy
    and their determinants (N,).

    cov2d = J W Sigma W^T J^T + .3 I (EWA splatting, Zwicker et al. 2001), with Sigma the covariance in world
    axes, W the rotation from world to camera axes, and J the projection's Jacobian at the mean, its slopes
    clamped as in gsplat.
    """
    W = pose[:3, :3].T
    x, y, z = ((means - pose[:3, 3]) @ W.T).unbind(1)
    (fx, _, cx), (_, fy, cy), _ = K
    safe_z = torch.where(z.abs() < 1e-6, torch.full_like(z, 1e-6), z)

    # Slopes x/z, y/z where J is taken, at most .3 tan(fov/2) beyond the picture's edges: J from far outside
    # would smear a Gaussian over everything.
    limit_x = .15 * width / fx  # .3 tan(fov/2)
    limit_y = .15 * height / fy
    slope_x = (x / safe_z).maximum(-(cx / fx + limit_x)).minimum((width - cx) / fx + limit_x)
    slope_y = (y / safe_z).maximum(-(cy / fy + limit_y)).minimum((height - cy) / fy + limit_y)

    # The rows of J W, each (N, 3), with J = [[fx/z, 0, -fx slope_x/z], [0, fy/z, -fy slope_y/z]].
    row_x = (fx / safe_z)[:, None] * (W[0] - slope_x[:, None] * W[2])
    row_y = (fy / safe_z)[:, None] * (W[1] - slope_y[:, None] * W[2])

    # Sigma = axes axes^T, where the columns of `axes` are a Gaussian's principal axes times their scales. So
    # cov2d = (J W axes)(J W axes)^T + .3 I; a and b are the rows of J W axes.
    axes = quaternion_to_matrix(rotations.roll(-1, 1)) * scales[:, None, :]  # rolled: scalar first to last
    a = torch.einsum("nk,nkj->nj", row_x, axes)
    b = torch.einsum("nk,nkj->nj", row_y, axes)
    aa, bb = a.square().sum(1), b.square().sum(1)
    covariance = torch.stack([aa + WIDEN, (a * b).sum(1), bb + WIDEN], 1)
    # xx yy - xy^2 without its cancellation, which turns long thin splats into noise: |a|^2 |b|^2 - (a.b)^2 is
    # the cross product's square.
    det = torch.linalg.cross(a, b).square().sum(1) + WIDEN * (aa + bb + WIDEN)
    centre = torch.stack([fx * x / safe_z + cx, fy * y / safe_z + cy], 1)
    return centre, z, covariance, det


def colour(harmonics, means, position):
    """View-dependent colour (N, 3) of SH coefficients (N, 3, K) seen from `position`, not negative."""
    basis = sh_basis(F.normalize(means - position, dim=-1))[:, :harmonics.shape[-1]]
    return (torch.einsum("nck,nk->nc", harmonics, basis) + .5).clamp_min(0)  # 3DGS: no light is mid-grey


@torch.no_grad()
def boxes(centre, z, covariance, opacities, height, width):
    """Which Gaussians can show, front to back, and the boxes of pixel centres within their reach.

    -> order (n,) indices; low, high (n, 2): each box covers pixels low <= (x, y) < high.
    """
    # alpha = o exp(-r^2/2) >= 1/255 up to r = sqrt(2 log(255 o)) deviations.
    reach = (2 * (opacities / ALPHA_MIN).clamp_min(1e-9).log()).clamp_min(0).sqrt()
    radius = reach[:, None] * covariance[:, [0, 2]].sqrt()
    size = torch.tensor([width, height], device=z.device)
    low = (centre - radius - .5).ceil().clamp_min(0)
    high = ((centre + radius - .5).floor() + 1).minimum(size)
    shows = (z > NEAR) & (z < FAR) & (opacities >= ALPHA_MIN) & (low < high).all(1)
    order = shows.nonzero().squeeze(1)
    order = order[z[order].argsort(stable=True)]
    return order, low[order].int(), high[order].int()


class Composite(torch.autograd.Function):
    """Splats in depth order -> what they add up to (H, W, 4), and the light that passes all of them (H, W).

    splats (n, 6): x, y, c0, c1, c2, opacity; features (n, 4); low, high (n, 2) their boxes of pixels.
    """

    @staticmethod
    def forward(ctx, splats, features, low, high, height, width):
        inputs = [x.double().contiguous() for x in (splats, features)] + [low, high]
        arrays = _composite(*(x.numpy() for x in inputs), height, width)
        total, T, closed_by = map(torch.from_numpy, arrays)
        ctx.save_for_backward(*inputs, T, closed_by)
        return total.to(splats.dtype), T.to(splats.dtype, copy=True)  # T itself is kept for backward

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, grad_T):
        tensors = *ctx.saved_tensors, grad_total.double().contiguous(), grad_T.double().contiguous()
        grads = _composite_backward(*(x.numpy() for x in tensors))
        grad_splats, grad_features = [torch.from_numpy(grad).to(grad_total.dtype) for grad in grads]
        return grad_splats, grad_features, None, None, None, None  # none for low, high, height, width


def compiled(function):
    """Has Numba compile a loop over pixels, which PyTorch cannot express. It runs without the GIL, so that
    the threads of `render` work at the same time. The machine code is cached on disk, unless Numba finds no
    folder that it can write to (RuntimeError)."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@compiled
def _fade(splat, x, y):
    """A splat at pixel (x, y) -> dx, dy, exponent: it has exp(-exponent) of its opacity there."""
    dx = x + .5 - splat[0]
    dy = y + .5 - splat[1]
    return dx, dy, splat[2] * dx * dx + splat[3] * dx * dy + splat[4] * dy * dy


@compiled
def _composite(splats, features, low, high, height, width):
    """Nearest first, each splat over its box -> total (H, W, 4), transmittance T (H, W), float64, and
    closed_by (H, W): the first splat that a pixel no longer takes, n if it takes all."""
    n = len(splats)
    total = np.zeros((height, width, features.shape[1]))
    T = np.ones((height, width))
    closed_by = np.full((height, width), n)
    still_open = height * width  # pixels that still let light through
    for i in range(n):
        if not still_open:
            break
        opacity = splats[i, 5]
        faint = math.log(opacity / ALPHA_MIN)  # the exponent at which alpha falls below 1/255
        for y in range(low[i, 1], high[i, 1]):
            for x in range(low[i, 0], high[i, 0]):
                if closed_by[y, x] < n:
                    continue
                # how opaque the splat is at this pixel
                _, _, exponent = _fade(splats[i], x, y)
                if not 0 <= exponent <= faint:
                    continue
                alpha = min(opacity * math.exp(-exponent), ALPHA_MAX)
                # a splat that would leave next to no light is not drawn, and nothing behind it (as in gsplat)
                if T[y, x] * (1 - alpha) <= CLOSED:
                    closed_by[y, x] = i
                    still_open -= 1
                    continue
                # over what is in front of it, with the light that has come through
                for k in range(features.shape[1]):
                    total[y, x, k] += T[y, x] * alpha * features[i, k]
                T[y, x] *= 1 - alpha
    return total, T, closed_by


@compiled
def _composite_backward(splats, features, low, high, T, closed_by, grad_total, grad_T):
    """Farthest first: undoes _composite splat by splat -> gradients of splats and features, float64.

    With T_i the light in front of splat i, and B_i what is added up behind it,
        d total / d feature_i = alpha_i T_i
        d total / d alpha_i = T_i feature_i - B_i / (1 - alpha_i)
        d T / d alpha_i = -T / (1 - alpha_i).
    """
    grad_splats = np.zeros(splats.shape)
    grad_features = np.zeros(features.shape)
    behind = np.zeros_like(grad_total)  # B_i
    T_in_front = T.copy()  # T_i once splat i is undone
    for i in range(len(splats) - 1, -1, -1):
        opacity = splats[i, 5]
        faint = math.log(opacity / ALPHA_MIN)
        for y in range(low[i, 1], high[i, 1]):
            for x in range(low[i, 0], high[i, 0]):
                if i >= closed_by[y, x]:
                    continue
                # alpha is computed again, not kept
                dx, dy, exponent = _fade(splats[i], x, y)
                if not 0 <= exponent <= faint:
                    continue
                fade = math.exp(-exponent)
                alpha = min(opacity * fade, ALPHA_MAX)
                # the three equations above
                T_in_front[y, x] /= 1 - alpha
                grad_alpha = -grad_T[y, x] * T[y, x] / (1 - alpha)
                for k in range(features.shape[1]):
                    g = grad_total[y, x, k]
                    grad_features[i, k] += g * alpha * T_in_front[y, x]
                    grad_alpha += g * (T_in_front[y, x] * features[i, k] - behind[y, x, k] / (1 - alpha))
                    behind[y, x, k] += alpha * T_in_front[y, x] * features[i, k]
                if opacity * fade > ALPHA_MAX:
                    continue  # the cap has no gradient
                # from alpha = opacity exp(-exponent) on to center, curvature and opacity, as `_fade` has them
                grad_exponent = -alpha * grad_alpha
                grad_splats[i, 0] -= grad_exponent * (2 * splats[i, 2] * dx + splats[i, 3] * dy)
                grad_splats[i, 1] -= grad_exponent * (2 * splats[i, 4] * dy + splats[i, 3] * dx)
                grad_splats[i, 2] += grad_exponent * dx * dx
                grad_splats[i, 3] += grad_exponent * dx * dy
                grad_splats[i, 4] += grad_exponent * dy * dy
                grad_splats[i, 5] += grad_alpha * fade
    return grad_splats, grad_features
