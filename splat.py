"""Rendering 3D Gaussians (3DGS, arXiv 2308.04079): gsplat on CUDA, plain PyTorch elsewhere, one function.

    rgb, depth, alpha = render(rec.gaussians, rec.camera_to_world, K, height, width)

A Gaussian of opacity o_i and colour c_i, projected to mean m_i and covariance S_i, shows at pixel p with

    alpha_i = o_i exp(-(p - m_i)^T S_i^-1 (p - m_i) / 2)
    colour = sum_i c_i alpha_i prod_{j in front of i} (1 - alpha_j)

Both sides share conventions and thresholds: pixel centres at +.5, covariance widened by .3 px, alpha at most
.999, alphas below 1/255 skipped, a pixel closed before its transmittance would fall to 1e-4, black behind.

The PyTorch path: project and cull; sort by depth; evaluate every Gaussian over the pixels of its box; keep
the pairs (Gaussian, pixel) that count; group them by pixel, in depth order; composite each group by a
segmented product. Gaussians are taken nearest first, `max_pairs` pairs at a time, so memory stays bounded and
closed pixels cost nothing more. Differentiable in every Gaussian parameter. Left out: anti-aliased and 2D
splats, camera distortion.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F

NEAR, FAR = .01, 1e10  # depths that are drawn
WIDEN = .3  # added to both variances, in square pixels: no splat falls between pixel centres
ALPHA_MAX, ALPHA_MIN = .999, 1 / 255
CLOSED = 1e-4  # the transmittance that no pixel falls below


@dataclass
class Gaussians:
    """N 3D Gaussians in world axes."""
    means: torch.Tensor  # (N, 3)
    scales: torch.Tensor  # (N, 3) standard deviations
    rotations: torch.Tensor  # (N, 4) unit quaternions as the renderer reads them: w, x, y, z
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
    for degree in (slice(1, 4), slice(4, 9)):
        matrix = torch.linalg.pinv(sh_basis(directions)[:, degree]) @ turned[..., degree]  # (V, n, n)
        matrix = matrix.to(harmonics).view(len(matrix), *[1] * (harmonics.dim() - 2), *matrix.shape[1:])
        degrees.append((matrix @ harmonics[..., degree, None]).squeeze(-1))
    return torch.cat(degrees, -1)


# -------------------------------------------------------------------------------------------------- rendering

def render(gaussians, camera_to_world, intrinsics, height, width, max_pairs=None):
    """-> rgb (V, 3, H, W), depth (V, H, W) expected z-depth (0 where nothing is), alpha (V, H, W), float32.

    camera_to_world (V, 4, 4), intrinsics (V, 3, 3) in pixels of the rendered size. max_pairs bounds the
    PyTorch path's working memory, at about 200 bytes per pair without gradients; threads share it. By default
    each has 4 pairs per pixel, at least 100,000: small enough for the cache, and for pixels to close before
    what they hide is looked at.
    """
    if gaussians.means.is_cuda:
        return _gsplat(gaussians, camera_to_world, intrinsics, height, width)
    # One view is many small operations, which two cores hardly share; so each thread takes views of its own.
    threads = torch.get_num_threads()
    workers = min(threads, len(intrinsics))
    share = max(max_pairs // workers, 1) if max_pairs else max(100_000, 4 * height * width)
    grad = torch.is_grad_enabled()

    def view(pose, K):
        with torch.set_grad_enabled(grad):  # a thread's own setting
            return _view(gaussians, pose, K, height, width, share)

    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            views = list(pool.map(view, camera_to_world.float(), intrinsics.float()))
    finally:
        torch.set_num_threads(threads)  # the workers' setting reaches libraries of the whole process
    return tuple(torch.stack(pictures) for pictures in zip(*views))


def _gsplat(gaussians, camera_to_world, intrinsics, height, width):
    from gsplat import rasterization  # only here: on machines without a GPU its import may start a compiler
    picture, alpha, _ = rasterization(
        gaussians.means, gaussians.rotations, gaussians.scales, gaussians.opacities,
        gaussians.harmonics.mT.contiguous(), torch.linalg.inv(camera_to_world.float()), intrinsics.float(),
        width, height, NEAR, FAR, eps2d=WIDEN, sh_degree=math.isqrt(gaussians.harmonics.shape[-1]) - 1,
        render_mode="RGB+ED", tile_size=16)
    return picture[..., :3].permute(0, 3, 1, 2), picture[..., 3], alpha.squeeze(-1)


def _take(index, *tensors):
    """The rows `index` of each tensor; on a CPU index_select and its gradient are faster than indexing."""
    return [tensor.index_select(0, index) for tensor in tensors]


def _view(gaussians, pose, K, height, width, max_pairs):
    """One view by the PyTorch path -> rgb (3, H, W), depth (H, W), alpha (H, W)."""
    # Project everything, and list what can show, nearest first.
    means, opacities = gaussians.means, gaussians.opacities
    centre, z, covariance = project(means, gaussians.scales, gaussians.rotations, pose, K, height, width)
    order, low, shape = boxes(centre, z, covariance, opacities, height, width)

    # What each of them adds to a pixel (colour and depth), and how it fades around its centre: the exponent
    # c0 dx^2 + c1 dx dy + c2 dy^2 of its inverse covariance.
    harmonics, means, z, covariance = _take(order, gaussians.harmonics, means, z, covariance)
    centre, opacities = _take(order, centre, opacities)
    features = torch.cat([colour(harmonics, means, pose[:3, 3]), z[:, None]], 1)  # (n, 4)
    xx, xy, yy = covariance.unbind(1)
    det = xx * yy - xy * xy
    conic = [.5 * yy / det, -xy / det, .5 * xx / det]
    splats = torch.stack([*centre.unbind(1), *conic, opacities], 1)  # (n, 6)

    # Composite chunks of at most max_pairs pairs; what lies wholly behind closed pixels is left out.
    total = features.new_zeros(height * width, 4)
    log_T = total.new_zeros(height * width, dtype=torch.float64)  # log transmittance so far
    is_open = log_T == 0
    pairs = shape.prod(1).cumsum(0)
    start = 0
    while start < len(order) and is_open.any():
        done = int(pairs[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(pairs, done + max_pairs, right=True)))
        live = start + _reaching_open(is_open.view(height, width), low[start:stop], shape[start:stop])
        if len(live):
            chunk = _take(live, splats, features, low, shape)
            total, log_T, is_open = _composite(*chunk, width, total, log_T, is_open)
        start = stop
    alpha = (1 - log_T.exp()).to(total.dtype)
    depth = total[:, 3] / alpha.clamp_min(1e-10)
    return total[:, :3].T.reshape(3, height, width), depth.view(height, width), alpha.view(height, width)


# --------------------------------------------------------------------------------- the PyTorch path, in steps

def project(means, scales, rotations, pose, K, height, width):
    """World Gaussians -> a camera's pixel means (N, 2), depths (N,), widened covariances (N, 3) xx, xy, yy.

    EWA: cov2d = J W S W^T J^T + .3 I, with J the projection's Jacobian at the mean, its slope limited to 1.3
    times the field of view as in 3DGS.
    """
    R = pose[:3, :3].T  # W: world -> camera
    x, y, z = ((means - pose[:3, 3]) @ R.T).unbind(1)
    (fx, _, cx), (_, fy, cy), _ = K
    safe_z = torch.where(z.abs() < 1e-6, torch.full_like(z, 1e-6), z)

    # Slopes x/z, y/z where J is taken: from far outside, a linear map would smear a Gaussian over everything.
    limit_x = .15 * width / fx  # .3 tan(fov/2)
    limit_y = .15 * height / fy
    slope_x = (x / safe_z).maximum(-(cx / fx + limit_x)).minimum((width - cx) / fx + limit_x)
    slope_y = (y / safe_z).maximum(-(cy / fy + limit_y)).minimum((height - cy) / fy + limit_y)

    # The rows of J W, each (N, 3), with J = [[fx/z, 0, -fx slope_x/z], [0, fy/z, -fy slope_y/z]].
    row_x = (fx / safe_z)[:, None] * (R[0] - slope_x[:, None] * R[2])
    row_y = (fy / safe_z)[:, None] * (R[1] - slope_y[:, None] * R[2])

    # S = axes axes^T, its columns the scaled principal axes, so cov2d = (J W axes)(J W axes)^T.
    axes = quaternion_to_matrix(rotations[:, [1, 2, 3, 0]]) * scales[:, None, :]
    a = torch.einsum("nk,nkj->nj", row_x, axes)
    b = torch.einsum("nk,nkj->nj", row_y, axes)
    covariance = torch.stack([(a * a).sum(1) + WIDEN, (a * b).sum(1), (b * b).sum(1) + WIDEN], 1)
    centre = torch.stack([fx * x / safe_z + cx, fy * y / safe_z + cy], 1)
    return centre, z, covariance


def colour(harmonics, means, position):
    """View-dependent colour (N, 3) of SH coefficients (N, 3, K) seen from `position`, not negative."""
    basis = sh_basis(F.normalize(means - position, dim=-1))[:, :harmonics.shape[-1]]
    return (torch.einsum("nck,nk->nc", harmonics, basis) + .5).clamp_min(0)


@torch.no_grad()
def boxes(centre, z, covariance, opacities, height, width):
    """Which Gaussians can show, front to back, and the boxes of pixel centres within their reach.

    -> order (n,) indices, low (n, 2) the boxes' first pixels x, y, shape (n, 2); shape.prod(1) pixel-Gaussian
    pairs each.
    """
    # alpha = o exp(-r^2/2) >= 1/255 up to r = sqrt(2 log(255 o)) deviations.
    reach = (2 * (opacities / ALPHA_MIN).clamp_min(1e-9).log()).clamp_min(0).sqrt()
    radius = reach[:, None] * covariance[:, [0, 2]].sqrt()
    last = torch.tensor([width - 1, height - 1], device=z.device)
    low = (centre - radius - .5).ceil().clamp_min(0)
    high = (centre + radius - .5).floor().minimum(last)
    shape = (high - low + 1).nan_to_num(0).clamp_min(0)
    shows = (z > NEAR) & (z < FAR) & (opacities >= ALPHA_MIN) & (shape.prod(1) > 0)
    order = shows.nonzero().squeeze(1)
    order = order[z[order].argsort(stable=True)]
    return order, low[order].long(), shape[order].long()


def _reaching_open(is_open, low, shape):
    """Indices of the boxes that hold an open pixel (H, W), by a summed-area table."""
    table = F.pad(is_open.int().cumsum(0).cumsum(1), (1, 0, 1, 0))
    x0, y0 = low.unbind(1)
    x1, y1 = (low + shape).unbind(1)
    return (table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]).nonzero().squeeze(1)


def _pairs(splats, low, shape, width):
    """Every (Gaussian, pixel) pair whose alpha reaches 1/255 -> who, pixel, alpha, each (P,), ordered by who.

    Gaussians with boxes of about the same size are evaluated together, in one dense block.
    """
    side = shape.amax(1)
    sizes = [2 ** k for k in range(int(side.max()).bit_length() + 1)]  # a block an octave
    if len(side) * int(side.max()) ** 2 < 2 * int(shape.prod(1).sum()):
        sizes = sizes[-1:]  # all about as large as the largest: one block
    found = []
    smaller = 0
    for size in sizes:
        group = ((side > smaller) & (side <= size)).nonzero().squeeze(1)
        smaller = size
        if len(group):
            n, pixel, alpha = _block(*_take(group, splats, low, shape), width)
            found.append((group.index_select(0, n), pixel, alpha))
    who, pixel, alpha = (torch.cat(x) for x in zip(*found))
    if len(found) > 1:  # back into depth order
        who, pixel, alpha = _take(_sorting(who), who, pixel, alpha)
    return who, pixel, alpha.clamp(max=ALPHA_MAX)


def _block(splats, low, shape, width):
    """_pairs of n Gaussians over one block (n, rows, columns) as large as their largest box.

    A dense block takes no index arithmetic per pair, and only the pairs that count get an index.
    """
    px, py, c0, c1, c2, opacity = splats.unbind(1)
    x, y = low.to(torch.int32).unbind(1)
    w, h = shape.to(torch.int32).unbind(1)
    columns = torch.arange(int(w.max()), dtype=torch.int32, device=x.device)
    rows = torch.arange(int(h.max()), dtype=torch.int32, device=x.device)
    dx = x[:, None] + columns + .5 - px[:, None]  # (n, columns)
    dy = y[:, None] + rows + .5 - py[:, None]  # (n, rows)
    exponent = (c1[:, None] * dy)[:, :, None] * dx[:, None]  # (n, rows, columns)
    exponent = exponent + (c0[:, None] * dx * dx)[:, None]
    exponent = exponent + (c2[:, None] * dy * dy)[:, :, None]
    with torch.no_grad():
        counts = exponent <= (opacity / ALPHA_MIN).log()[:, None, None]
        counts &= (columns < w[:, None])[:, None] & (rows < h[:, None])[:, :, None]
        index = counts.flatten().nonzero().squeeze(1)  # (P,) into the block
        n = index.div(len(rows) * len(columns), rounding_mode="floor")
        pixels = ((y[:, None] + rows) * width)[:, :, None] + (x[:, None] + columns)[:, None]
        pixel = pixels.flatten().index_select(0, index)
    return n, pixel, opacity.index_select(0, n) * torch.exp(-exponent.flatten().index_select(0, index))


def _composite(splats, features, low, shape, width, total, log_T, is_open):
    """Adds Gaussians, given in depth order, behind what the pixels already hold -> total, log_T, is_open."""
    # The pairs in open pixels, grouped by pixel, nearest first.
    who, pixel, alpha = _pairs(splats, low, shape, width)
    with torch.no_grad():
        keep = is_open.index_select(0, pixel).nonzero().squeeze(1)
        keep, = _take(_sorting(pixel.index_select(0, keep)), keep)
        who, pixel = _take(keep, who, pixel.long())
    alpha = alpha.index_select(0, keep)

    # Transmittance in front of each pair: a running sum of log(1 - alpha) that restarts with every pixel.
    step = torch.log1p(-alpha.double())
    running = step.cumsum(0)
    count = torch.bincount(pixel, minlength=len(log_T))
    at_start = torch.cat([running.new_zeros(1), running]).index_select(0, count.cumsum(0) - count)  # (H*W,)
    before = running - step + (log_T - at_start).index_select(0, pixel)

    # A pair that would close its pixel is not drawn, and nothing behind it is.
    shown = before + step > math.log(CLOSED)
    weight = torch.where(shown, alpha * before.exp(), 0.0).to(features.dtype)
    total = total.index_add(0, pixel, weight[:, None] * features.index_select(0, who))
    log_T = log_T.index_add(0, pixel, torch.where(shown, step, 0.0))
    closed = torch.zeros_like(is_open).index_fill(0, pixel.masked_select(~shown), True)
    return total, log_T, is_open & ~closed


def _sorting(keys):
    """Indices that sort integers, equal ones in place; 32-bit keys take half the time of 64-bit ones."""
    return keys.int().argsort(stable=True)
