"""Rendering 3D Gaussians (3DGS, arXiv 2308.04079): gsplat on CUDA, plain PyTorch elsewhere, one function.

    rgb, depth, alpha = render(rec.gaussians, rec.camera_to_world, K, height, width)

Both sides share conventions and thresholds: pixel centres at +.5, covariance widened by .3 px, alpha at most .999,
contributions below 1/255 skipped, a pixel closed before its transmittance would fall to 1e-4, black background.

The PyTorch path: project and cull; sort by depth; evaluate every Gaussian over the pixels of its box; keep the pairs
(Gaussian, pixel) that count; group them by pixel, in depth order; composite each group by a segmented product.
Gaussians are taken nearest first, `max_pairs` pairs at a time, so memory stays bounded and closed pixels cost nothing
more. Differentiable in every Gaussian parameter. Left out: anti-aliased and 2D splats, camera distortion.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from depth_anything import quaternion_to_matrix, sh_basis

NEAR, FAR, WIDEN = .01, 1e10, .3
ALPHA_MAX, ALPHA_MIN, CLOSED = .999, 1 / 255, 1e-4


def render(gaussians, camera_to_world, intrinsics, height, width, max_pairs=None):
    """-> rgb (V, 3, H, W), depth (V, H, W) expected z-depth (0 where nothing is hit), alpha (V, H, W), float32.

    gaussians: means (N, 3), scales (N, 3), rotations (N, 4) as w, x, y, z, harmonics (N, 3, K) with K = 1, 4 or 9,
    opacities (N,). camera_to_world (V, 4, 4), intrinsics (V, 3, 3) in pixels of the rendered size.
    max_pairs bounds the PyTorch path's working memory, at about 200 bytes a pair without gradients; by default 4 pairs a pixel
    and thread, at least 100,000: small enough for the cache, and for pixels to close before what they hide is looked at.
    """
    if gaussians.means.is_cuda:
        return _gsplat(gaussians, camera_to_world, intrinsics, height, width)
    # One view is many small operations, which two cores hardly share; so each thread takes views of its own.
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    workers = min(threads, len(intrinsics))
    share = max(max_pairs // workers, 1) if max_pairs else max(100_000, 4 * height * width)

    def view(pose, K):
        with torch.set_grad_enabled(grad):  # a thread's own setting
            return _view(gaussians, pose, K, height, width, share)

    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            views = list(pool.map(view, camera_to_world.float(), intrinsics.float()))
    finally:
        torch.set_num_threads(threads)  # the workers' setting reaches libraries of the whole process
    return tuple(torch.stack(x) for x in zip(*views))


def _gsplat(g, camera_to_world, intrinsics, height, width):
    from gsplat import rasterization  # only here: on machines without a GPU its import may start a compiler
    degree = math.isqrt(g.harmonics.shape[-1]) - 1
    out, alpha, _ = rasterization(g.means, g.rotations, g.scales, g.opacities, g.harmonics.mT.contiguous(),
                                  torch.linalg.inv(camera_to_world.float()), intrinsics.float(), width, height, NEAR, FAR,
                                  eps2d=WIDEN, sh_degree=degree, render_mode="RGB+ED", tile_size=16)
    return out[..., :3].permute(0, 3, 1, 2), out[..., 3], alpha.squeeze(-1)


def project(means, scales, rotations, pose, K, height, width):
    """World Gaussians -> (in this camera) pixel means (N, 2), depths (N,), 2D covariances (N, 3) as xx, xy, yy, widened.

    EWA: cov2d = J W S W^T J^T + .3 I, with J the projection's Jacobian at the mean, its slope limited to 1.3 times the
    field of view as in 3DGS.
    """
    R = pose[:3, :3].T
    p = (means - pose[:3, 3]) @ R.T  # camera axes
    z = p[:, 2]
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    safe = torch.where(z.abs() < 1e-6, torch.full_like(z, 1e-6), z)
    limit_x, limit_y = .15 * width / fx, .15 * height / fy  # .3 tan(fov/2)
    sx = torch.minimum(torch.maximum(p[:, 0] / safe, -(cx / fx + limit_x)), (width - cx) / fx + limit_x)
    sy = torch.minimum(torch.maximum(p[:, 1] / safe, -(cy / fy + limit_y)), (height - cy) / fy + limit_y)
    # rows of J R, each (N, 3): J = [[fx/z, 0, -fx sx/z], [0, fy/z, -fy sy/z]]
    row_x = (fx / safe)[:, None] * (R[0] - sx[:, None] * R[2])
    row_y = (fy / safe)[:, None] * (R[1] - sy[:, None] * R[2])
    axes = quaternion_to_matrix(rotations[:, [1, 2, 3, 0]]) * scales[:, None, :]  # columns: scaled principal axes
    a, b = torch.einsum("nk,nkj->nj", row_x, axes), torch.einsum("nk,nkj->nj", row_y, axes)
    covariance = torch.stack([(a * a).sum(1) + WIDEN, (a * b).sum(1), (b * b).sum(1) + WIDEN], 1)
    return torch.stack([fx * p[:, 0] / safe + cx, fy * p[:, 1] / safe + cy], 1), z, covariance


def colour(harmonics, means, position):
    """View-dependent colour (N, 3) of SH coefficients (N, 3, K) seen from `position`, not negative."""
    basis = sh_basis(torch.nn.functional.normalize(means - position, dim=-1))[:, :harmonics.shape[-1]]
    return (torch.einsum("nck,nk->nc", harmonics, basis) + .5).clamp_min(0)


@torch.no_grad()
def boxes(centre, z, cov, opacities, height, width):
    """Which Gaussians can show, front to back, and the boxes of pixel centres within their reach.

    -> order (n,) indices, low (n, 2) the boxes' first pixels x, y, shape (n, 2); shape.prod(1) pixel-Gaussian pairs each.
    """
    # alpha = o exp(-r^2/2) >= 1/255 up to r = sqrt(2 log(255 o)) deviations
    reach = (2 * (opacities / ALPHA_MIN).clamp_min(1e-9).log()).clamp_min(0).sqrt()
    rx, ry = reach * cov[:, 0].sqrt(), reach * cov[:, 2].sqrt()
    low = torch.stack([(centre[:, 0] - rx - .5).ceil(), (centre[:, 1] - ry - .5).ceil()], 1).clamp_min(0)
    high = torch.stack([(centre[:, 0] + rx - .5).floor().clamp(max=width - 1), (centre[:, 1] + ry - .5).floor().clamp(max=height - 1)], 1)
    shape = (high - low + 1).nan_to_num(0).clamp_min(0)
    shows = (z > NEAR) & (z < FAR) & (opacities >= ALPHA_MIN) & (shape.prod(1) > 0)
    order = shows.nonzero().squeeze(1)
    order = order.index_select(0, z.index_select(0, order).argsort(stable=True))
    return order, *(x.index_select(0, order).long() for x in (low, shape))


def _view(g, pose, K, H, W, max_pairs):
    device = g.means.device
    centre, z, cov = project(g.means, g.scales, g.rotations, pose, K, H, W)
    order, low, shape = boxes(centre, z, cov, g.opacities, H, W)
    pairs = shape.prod(1).cumsum(0)
    if not len(order):
        return z.new_zeros(3, H, W), z.new_zeros(H, W), z.new_zeros(H, W)
    rgb = colour(g.harmonics.index_select(0, order), g.means.index_select(0, order), pose[:3, 3])
    features = torch.cat([rgb, z.index_select(0, order)[:, None]], 1)  # (n, 4)
    xx, xy, yy = cov.index_select(0, order).unbind(1)
    det = xx * yy - xy * xy
    conic = torch.stack([.5 * yy / det, -xy / det, .5 * xx / det], 1)  # exponent = c0 dx^2 + c1 dx dy + c2 dy^2
    splats = torch.cat([centre.index_select(0, order), conic, g.opacities.index_select(0, order)[:, None]], 1)  # (n, 6)

    total = features.new_zeros(H * W, 4)
    log_T = torch.zeros(H * W, dtype=torch.float64, device=device)  # log transmittance so far
    open_ = torch.ones(H * W, dtype=torch.bool, device=device)
    start = 0
    while start < len(order) and open_.any():
        done = int(pairs[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(pairs, done + max_pairs, right=True)))
        live = start + _reaches_open(open_.view(H, W), low[start:stop], shape[start:stop])
        if len(live):
            total, log_T, open_ = _composite(*(x.index_select(0, live) for x in (splats, features, low, shape)), W, total, log_T, open_)
        start = stop
    alpha = (1 - log_T.exp()).to(total.dtype)
    depth = total[:, 3] / alpha.clamp_min(1e-10)
    return total[:, :3].T.reshape(3, H, W), depth.view(H, W), alpha.view(H, W)


def _reaches_open(open_, low, shape):
    """Indices of the boxes that hold an open pixel, by a summed-area table."""
    table = torch.nn.functional.pad(open_.int().cumsum(0).cumsum(1), (1, 0, 1, 0))
    (x0, y0), (x1, y1) = low.unbind(1), (low + shape).unbind(1)
    return (table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]).nonzero().squeeze(1)


def _pairs(splats, low, shape, W):
    """Every (Gaussian, pixel) pair whose alpha reaches 1/255 -> who, pixel, alpha, each (P,), ordered by who.

    Gaussians with boxes of about the same size are evaluated together as one dense (n, rows, columns) block: that
    takes no index arithmetic a pair, and only the pairs that count get an index.
    """
    side = shape.amax(1)
    edges = [2 ** k for k in range(int(side.max()).bit_length() + 1)]  # octaves of box sizes
    if len(side) * int(side.max()) ** 2 < 2 * int(shape.prod(1).sum()):
        edges = edges[-1:]  # all about as large as the largest: one block
    parts, least = [], 0
    for most in edges:
        group = ((side > least) & (side <= most)).nonzero().squeeze(1)
        least = most
        if not len(group):
            continue
        px, py, c0, c1, c2, opacity = splats.index_select(0, group).unbind(1)
        (x, y), (w, h) = (box.index_select(0, group).to(torch.int32).unbind(1) for box in (low, shape))
        columns, rows = (torch.arange(int(n.max()), dtype=torch.int32, device=x.device) for n in (w, h))
        dx, dy = x[:, None] + columns + .5 - px[:, None], y[:, None] + rows + .5 - py[:, None]  # (n, columns), (n, rows)
        exponent = ((c1[:, None] * dy)[:, :, None] * dx[:, None] + (c0[:, None] * dx * dx)[:, None]) + (c2[:, None] * dy * dy)[:, :, None]
        with torch.no_grad():
            counts = exponent <= (opacity / ALPHA_MIN).log()[:, None, None]
            counts &= (columns < w[:, None])[:, None] & (rows < h[:, None])[:, :, None]
            index = counts.flatten().nonzero().squeeze(1)
            n = index.div(len(rows) * len(columns), rounding_mode="floor")
            pixel = (((y[:, None] + rows) * W)[:, :, None] + (x[:, None] + columns)[:, None]).flatten().index_select(0, index)
        parts.append((group.index_select(0, n), pixel, opacity.index_select(0, n) * torch.exp(-exponent.flatten().index_select(0, index))))
    who, pixel, alpha = (torch.cat(x) for x in zip(*parts))
    if len(parts) > 1:
        order = _stable_order(who)
        who, pixel, alpha = (x.index_select(0, order) for x in (who, pixel, alpha))
    return who, pixel, alpha.clamp(max=ALPHA_MAX)


def _composite(splats, features, low, shape, W, total, log_T, open_):
    """Adds Gaussians, given in depth order, behind what the pixels already hold."""
    who, pixel, alpha = _pairs(splats, low, shape, W)
    with torch.no_grad():
        keep = open_.index_select(0, pixel).nonzero().squeeze(1)
        keep = keep.index_select(0, _stable_order(pixel.index_select(0, keep)))  # grouped by pixel, nearest first
        who, pixel = who.index_select(0, keep), pixel.index_select(0, keep).long()
    alpha = alpha.index_select(0, keep)
    # Transmittance in front of each pair: a running sum of log(1 - alpha) that restarts with every pixel.
    step = torch.log1p(-alpha.double())
    running = step.cumsum(0)
    size = torch.bincount(pixel, minlength=len(log_T))
    at_start = torch.cat([running.new_zeros(1), running]).index_select(0, size.cumsum(0) - size)  # running sum where each pixel starts
    before = running - step + (log_T - at_start).index_select(0, pixel)
    shown = before + step > math.log(CLOSED)
    weight = torch.where(shown, alpha * before.exp(), 0.0).to(features.dtype)
    total = total.index_add(0, pixel, weight[:, None] * features.index_select(0, who))
    log_T = log_T.index_add(0, pixel, torch.where(shown, step, 0.0))
    closed = torch.zeros_like(open_).index_fill(0, pixel.masked_select(~shown), True)
    return total, log_T, open_ & ~closed


def _stable_order(keys):
    """Indices that sort non-negative integers, equal ones in place: numpy's linear-time radix sort, 16 bits a pass."""
    order = np.arange(len(keys))
    keys = keys.cpu().numpy()
    for shift in range(0, max(int(keys.max(initial=0)).bit_length(), 1), 16):
        order = order[np.argsort((keys[order] >> shift & 0xFFFF).astype(np.uint16), kind="stable")]
    return torch.from_numpy(order)
