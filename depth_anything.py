"""Depth Anything 3 (arXiv 2511.10647) inference in one file: frames -> depth, cameras, 3D Gaussians.

    da3 = load_depth_anything("tiny/depth_anything")       # or a folder / hub id such as depth-anything/DA3-GIANT
    rec = da3(frames)                                      # (F, 3, H, W) in [0, 1]
    rec.depth, rec.confidence, rec.camera_to_world, rec.intrinsics, rec.gaussians
    python depth_anything.py video.mp4                     # depth video, path, .ply, re-render beside the input

A DINOv2 transformer whose blocks, from `alt_start` on, alternate between attention within a view and over all views;
a DPT head for depth and confidence; a camera decoder on each view's first token; and (GIANT, tiny) a second DPT
whose 38 channels a pixel become Gaussians. Module names follow the published checkpoints.

Left out: ray-based poses (their branch is loaded, never run), the nested metric model, sky masks, drop-path, dropout.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import _fill, _folder, _match, _read_json

MEAN, STD = (.485, .456, .406), (.229, .224, .225)  # ImageNet


@dataclass
class DA3Config:
    dim: int = 384
    depth: int = 12
    heads: int = 6
    swiglu: bool = False  # the feed-forward of ViT-g
    out_layers: tuple = (5, 7, 9, 11)
    alt_start: int = 4  # first block with qk-norm and RoPE; from here odd blocks attend over all views
    features: int = 64  # width of the DPT heads
    out_channels: tuple = (48, 96, 192, 384)
    gaussians: bool = False  # whether the checkpoint has the Gaussian head
    patch_size: int = 14
    grid: int = 37  # side of the learned position embedding
    process_res: int = 504  # the longest side that frames are resized to


SIZES = {"da3-small": DA3Config(),
         "da3-base": DA3Config(768, 12, 12, features=128, out_channels=(96, 192, 384, 768)),
         "da3-large": DA3Config(1024, 24, 16, False, (11, 15, 19, 23), 8, 256, (256, 512, 1024, 1024)),
         "da3-giant": DA3Config(1536, 40, 24, True, (19, 27, 33, 39), 13, 256, (256, 512, 1024, 1024), True)}


# ------------------------------------------------------------------------------------------------------- transformer

class Mlp(nn.Module):
    def __init__(self, dim, hidden, out):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


def rope2d(positions, head_dim):
    """Positions (N, 2) = (y, x) -> cos, sin (N, head_dim): the head's first half turns with y, the second with x."""
    quarter = head_dim // 4
    frequency = 1 / 100 ** (torch.arange(quarter, device=positions.device).float() / quarter)
    angle = positions.float()[..., None] * frequency  # (N, 2, quarter)
    angle = torch.cat([angle, angle], -1).flatten(-2)
    return angle.cos(), angle.sin()


def rotate2d(x, cos, sin):
    """Rotates pairs (i, i + quarter) of each half of the last dimension, in float32."""
    halves = x.float().unflatten(-1, (2, 2, -1))  # (y|x half, pair member, quarter)
    turned = torch.stack([-halves[..., 1, :], halves[..., 0, :]], -2).flatten(-3)
    return (x.float() * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(self, x, rotation=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, head_dim)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate2d(q, *rotation), rotate2d(k, *rotation)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, heads, eps, qk_norm=False, swiglu=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads, qk_norm)
        self.mlp = SwiGLU(dim, 4 * dim) if swiglu else Mlp(dim, 4 * dim, dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x, rotation=None):
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        return x + self.ls2(self.mlp(self.norm2(x)))


def reference_view(tokens):
    """Index of the view whose class token (V, D) is the most average one: similarity to the others, norm and variance,
    each scaled to [0, 1] over the views, summed distance to .5 smallest ("saddle_balanced")."""
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    similarity = (unit @ unit.T - torch.eye(len(unit), device=unit.device)).sum(-1) / (len(unit) - 1)

    def off_middle(m):
        return ((m - m.min()) / (m.max() - m.min() + 1e-8) - .5).abs()

    return (off_middle(similarity) + off_middle(tokens.norm(dim=-1)) + off_middle(unit.var(-1))).argmin()


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.camera_token = nn.Parameter(torch.randn(1, 2, c.dim) * .02)  # for the reference view, for the others
        self.pos_embed = nn.Parameter(torch.randn(1, c.grid ** 2 + 1, c.dim) * .02)
        self.patch_embed = PatchEmbed(c.dim, c.patch_size)
        self.blocks = nn.ModuleList([Block(c.dim, c.heads, 1e-6, i >= c.alt_start, c.swiglu) for i in range(c.depth)])
        self.norm = nn.LayerNorm(c.dim)

    def positions(self, h, w):
        """Learned position embedding, resized to (h, w) patches by *scale factor* (n + .1)/grid, as DINOv2 does."""
        g = self.config.grid
        if h == w == g:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].float().unflatten(1, (g, g)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, scale_factor=((h + .1) / g, (w + .1) / g), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], 1)

    def forward(self, x, camera_token=None):
        """(B, V, 3, H, W) -> for each of the four out_layers: patch features (B, V, N, 2D), first tokens (B, V, 2D).

        camera_token (B, V, D) of known cameras. `.reference` (B,) holds each scene's reference view afterwards.
        """
        c = self.config
        B, V, _, H, W = x.shape
        h, w = H // c.patch_size, W // c.patch_size
        x = torch.cat([self.cls_token.expand(B * V, -1, -1), self.patch_embed(x.flatten(0, 1))], 1) + self.positions(h, w)
        x = x.unflatten(0, (B, V))  # (B, V, 1+N, D)

        grid = torch.cartesian_prod(torch.arange(h), torch.arange(w)) + 1
        grid = torch.cat([torch.zeros(1, 2, dtype=grid.dtype), grid]).to(x.device)  # the first token sits at (0, 0)
        within = rope2d(grid, c.dim // c.heads)
        across = rope2d(grid.clamp(max=1).repeat(V, 1), c.dim // c.heads)  # over views every patch sits at (1, 1)
        scene, order = torch.arange(B, device=x.device)[:, None], None
        local, taken, self.reference = x, [], torch.zeros(B, dtype=torch.long, device=x.device)
        for i, block in enumerate(self.blocks):
            if i == c.alt_start - 1 and V >= 3 and camera_token is None:
                self.reference = torch.stack([reference_view(tokens) for tokens in x[:, :, 0]])
                views = torch.arange(V, device=x.device).expand(B, V)
                order = torch.where(views == self.reference[:, None], -1, views).argsort(1)  # the reference first
                x, local = x[scene, order], local[scene, order]
            if i == c.alt_start:
                token = camera_token
                if token is None:
                    token = torch.cat([self.camera_token[:, :1], self.camera_token[:, 1:].expand(-1, V - 1, -1)], 1).expand(B, -1, -1)
                x = torch.cat([token.to(x.dtype).unsqueeze(2), x[:, :, 1:]], 2)
            if i >= c.alt_start and i % 2:
                x = block(x.flatten(1, 2), across).view_as(x)
            else:
                x = local = block(x.flatten(0, 1), within if i >= c.alt_start else None).view_as(x)
            if i in c.out_layers:
                back = order.argsort(1) if order is not None else None
                taken.append((local, x) if order is None else (local[scene, back], x[scene, back]))
        return [(torch.cat([a[:, :, 1:], self.norm(b[:, :, 1:])], -1), torch.cat([a[:, :, 0], b[:, :, 0]], -1)) for a, b in taken]


class Backbone(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.pretrained = VisionTransformer(c)


# --------------------------------------------------------------------------------------------------------- DPT heads

def uv_embedding(x, aspect):
    """.1 * sine-cosine embedding of pixel positions for features x (V, C, h, w) of a picture of this aspect (W/H)."""
    C, h, w = x.shape[1:]
    diagonal = math.sqrt(aspect ** 2 + 1)
    u = torch.linspace(-1, 1, w, device=x.device) * (aspect / diagonal * (w - 1) / w)
    v = torch.linspace(-1, 1, h, device=x.device) * (1 / diagonal * (h - 1) / h)
    frequency = 100.0 ** -(torch.arange(C // 4, device=x.device).float() / (C // 4))
    parts = []
    for values, shape in ((u, (1, w)), (v, (h, 1))):
        angle = torch.outer(frequency, values)
        parts.append(torch.cat([angle.sin(), angle.cos()]).view(-1, *shape).expand(-1, h, w))
    return .1 * torch.cat(parts)


class ResidualConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    def __init__(self, dim, lateral=True):
        super().__init__()
        if lateral:
            self.resConfUnit1 = ResidualConv(dim)
        self.resConfUnit2 = ResidualConv(dim)
        self.out_conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x, lateral=None, size=None):
        if lateral is not None:
            x = x + self.resConfUnit1(lateral)
        x = self.resConfUnit2(x)
        return self.out_conv(F.interpolate(x, size=size or [2 * s for s in x.shape[2:]], mode="bilinear", align_corners=True))


def output_convs(dim, out, norm=None):
    middle = [nn.Identity(), norm, nn.Identity()] if norm is not None else []  # the identities keep the published indices
    return nn.Sequential(nn.Conv2d(dim, 32, 3, padding=1), *middle, nn.ReLU(), nn.Conv2d(32, out, 1))


class DPT(nn.Module):
    """Four feature maps -> one map at full resolution. Also holds the published depth head's ray branch, never run."""

    def __init__(self, c, out, token_norm, ray_branch=False, image_branch=False):
        super().__init__()
        f, self.patch_size = c.features, c.patch_size
        self.norm = nn.LayerNorm(2 * c.dim) if token_norm else nn.Identity()
        self.projects = nn.ModuleList([nn.Conv2d(2 * c.dim, o, 1) for o in c.out_channels])
        o = c.out_channels
        self.resize_layers = nn.ModuleList([nn.ConvTranspose2d(o[0], o[0], 4, 4), nn.ConvTranspose2d(o[1], o[1], 2, 2),
                                            nn.Identity(), nn.Conv2d(o[3], o[3], 3, 2, 1)])
        s = self.scratch = nn.Module()
        for i in range(4):
            s.add_module(f"layer{i + 1}_rn", nn.Conv2d(o[i], f, 3, padding=1, bias=False))
            s.add_module(f"refinenet{i + 1}", Fusion(f, i < 3))
        s.output_conv1 = nn.Conv2d(f, f // 2, 3, padding=1)
        s.output_conv2 = output_convs(f // 2, out)
        if ray_branch:
            for i in range(4):
                s.add_module(f"refinenet{i + 1}_aux", Fusion(f, i < 3))
            s.output_conv1_aux = nn.ModuleList([nn.Sequential(*[nn.Conv2d(*((f, f // 2) if j % 2 == 0 else (f // 2, f)), 3, padding=1)
                                                                for j in range(5)]) for _ in range(4)])
            norm = nn.LayerNorm(32)  # one norm, shared by the four
            s.output_conv2_aux = nn.ModuleList([output_convs(f // 2, 7, norm) for _ in range(4)])
        if image_branch:
            g = f // 2
            self.images_merger = nn.Sequential(nn.Conv2d(3, g // 4, 3, padding=1), nn.GELU(), nn.Conv2d(g // 4, g // 2, 3, padding=1),
                                               nn.GELU(), nn.Conv2d(g // 2, g, 3, padding=1), nn.GELU())

    def forward(self, features, images):
        """Features: four (V, N, 2D); images (V, 3, H, W) -> (V, out, H, W), eight views at a time."""
        H, W = images.shape[2:]
        return torch.cat([self._views([f[i:i + 8] for f in features], images[i:i + 8], H, W) for i in range(0, len(images), 8)])

    def _views(self, features, images, H, W):
        s, maps = self.scratch, []
        for i, x in enumerate(features):
            x = self.norm(x).transpose(1, 2).unflatten(2, (H // self.patch_size, W // self.patch_size))
            x = self.projects[i](x)
            x = self.resize_layers[i](x + uv_embedding(x, W / H))
            maps.append(s.get_submodule(f"layer{i + 1}_rn")(x))
        x = s.refinenet4(maps[3], size=maps[2].shape[2:])
        x = s.refinenet3(x, maps[2], maps[1].shape[2:])
        x = s.refinenet2(x, maps[1], maps[0].shape[2:])
        x = s.output_conv1(s.refinenet1(x, maps[0]))
        x = F.interpolate(x, size=(H, W), mode="bilinear", align_corners=True)
        if hasattr(self, "images_merger"):
            x = x + self.images_merger(images)
        return s.output_conv2(x + uv_embedding(x, W / H))


# ----------------------------------------------------------------------------------------------------------- cameras

def quaternion_to_matrix(q):
    """Quaternions (..., 4), scalar last, of any norm -> (..., 3, 3)."""
    x, y, z, w = q.unbind(-1)
    s = 2 / q.square().sum(-1)
    return torch.stack([1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w),
                        s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w),
                        s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)], -1).unflatten(-1, (3, 3))


def matrix_to_quaternion(R):
    """(..., 3, 3) -> unit quaternions (..., 4), scalar last and not negative, from the largest component outwards."""
    m = R.flatten(-2)
    xx, xy, xz, yx, yy, yz, zx, zy, zz = m.unbind(-1)
    squares = torch.stack([1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz, 1 + xx + yy + zz], -1)  # 4 (x, y, z, w)^2
    products = torch.stack([  # row i: 4 q_i (x, y, z, w)
        squares[..., 0], yx + xy, xz + zx, zy - yz,
        yx + xy, squares[..., 1], zy + yz, xz - zx,
        xz + zx, zy + yz, squares[..., 2], yx - xy,
        zy - yz, xz - zx, yx - xy, squares[..., 3]], -1).unflatten(-1, (4, 4))
    best = squares.argmax(-1)[..., None]
    row = products.gather(-2, best[..., None].expand(*best.shape, 4)).squeeze(-2)
    q = row / (2 * squares.gather(-1, best).sqrt())
    return torch.where(q[..., 3:] < 0, -q, q)


def invert(pose):
    """Inverse of rigid (..., 4, 4) matrices."""
    R, t = pose[..., :3, :3].mT, pose[..., :3, 3:]
    return torch.cat([torch.cat([R, -R @ t], -1), pose[..., 3:, :]], -2)


class CameraDecoder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_t, self.fc_qvec = nn.Linear(dim, 3), nn.Linear(dim, 4)
        self.fc_fov = nn.Sequential(nn.Linear(dim, 2), nn.ReLU())

    def forward(self, token, H, W):
        """First tokens (V, 2D) -> camera-to-world (V, 4, 4), intrinsics (V, 3, 3) in pixels of an H x W picture."""
        x = self.backbone(token)
        fov_h, fov_w = self.fc_fov(x).unbind(-1)  # radians
        pose = torch.eye(4, device=x.device).repeat(len(x), 1, 1)
        pose[:, :3, :3], pose[:, :3, 3] = quaternion_to_matrix(self.fc_qvec(x)), self.fc_t(x)
        K = torch.eye(3, device=x.device).repeat(len(x), 1, 1)
        K[:, 0, 0], K[:, 1, 1] = W / 2 / (fov_w / 2).tan().clamp_min(1e-6), H / 2 / (fov_h / 2).tan().clamp_min(1e-6)
        K[:, 0, 2], K[:, 1, 2] = W / 2, H / 2
        return pose, K


class CameraEncoder(nn.Module):
    """Known poses -> the token that replaces each view's first one. Always 16 heads."""

    def __init__(self, dim):
        super().__init__()
        self.trunk = nn.Sequential(*[Block(dim, 16, 1e-5) for _ in range(4)])
        self.token_norm, self.trunk_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.pose_branch = Mlp(9, dim // 2, dim)

    def forward(self, camera_to_world, K, H, W):
        fov = 2 * torch.atan(torch.stack([H / 2 / K[:, 1, 1], W / 2 / K[:, 0, 0]], -1))
        x = torch.cat([camera_to_world[:, :3, 3], matrix_to_quaternion(camera_to_world[:, :3, :3]), fov], -1)
        return self.trunk_norm(self.trunk(self.token_norm(self.pose_branch(x))[None]))[0]


# --------------------------------------------------------------------------------------------------------- Gaussians

@dataclass
class Gaussians:
    """N 3D Gaussians in world axes."""
    means: torch.Tensor  # (N, 3)
    scales: torch.Tensor  # (N, 3) standard deviations
    rotations: torch.Tensor  # (N, 4) unit quaternions as the renderer reads them: w, x, y, z
    harmonics: torch.Tensor  # (N, 3, 9) SH coefficients, degree 2, per colour channel
    opacities: torch.Tensor  # (N,) in [0, 1]


def sh_basis(d):
    """Real spherical harmonics of degree 0-2 at unit directions (..., 3) -> (..., 9), in 3DGS's order and signs."""
    x, y, z = d.unbind(-1)
    return torch.stack([torch.full_like(x, .28209479177387814),
                        -.4886025119029199 * y, .4886025119029199 * z, -.4886025119029199 * x,
                        1.0925484305920792 * x * y, -1.0925484305920792 * y * z, .31539156525252005 * (2 * z * z - x * x - y * y),
                        -1.0925484305920792 * x * z, .5462742152960396 * (x * x - y * y)], -1)


def rotate_sh(sh, R):
    """Coefficients (..., 9) of f_c -> those of f_w(d) = f_c(R^T d), for R (V, 3, 3) and sh (V, ..., 9).

    Per band, the matrix that maps basis values at fixed directions D to those at R^T D (least squares, exact for SH).
    """
    D = F.normalize(torch.randn(32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1)
    out = [sh[..., :1]]
    turned = sh_basis(D @ R.double().cpu())  # rows d^T R = (R^T d)^T -> (V, 32, 9)
    for band in (slice(1, 4), slice(4, 9)):
        M = torch.linalg.pinv(sh_basis(D)[:, band]) @ turned[..., band]  # (V, n, n)
        M = M.to(sh).view(len(M), *[1] * (sh.dim() - 2), *M.shape[1:])
        out.append((M @ sh[..., band, None]).squeeze(-1))
    return torch.cat(out, -1)


def gaussians_of(raw, depth, camera_to_world, K, pose_scale=1.0):
    """The head's 38 channels a pixel -> world-space Gaussians.

    raw (V, 38, H, W): pixel offset 2, scale 3, quaternion 4, SH 27 (colour-major), depth offset 1, opacity 1.
    The mean sits at *ray length* depth + offset along the pixel's unit ray. Scales are in units of a pixel at that
    depth. The quaternion keeps the published order mix-up, with which the weights were trained.
    """
    V, _, H, W = raw.shape
    offset, scale, quaternion, sh, depth_offset, opacity = raw.permute(0, 2, 3, 1).split((2, 3, 4, 27, 1, 1), -1)
    R, t = camera_to_world[:, :3, :3], camera_to_world[:, :3, 3] * pose_scale
    depth = (depth + depth_offset.squeeze(-1)) * pose_scale  # (V, H, W)
    v, u = torch.meshgrid((torch.arange(H) + .5) / H, (torch.arange(W) + .5) / W, indexing="ij")
    size = torch.tensor([W, H], device=raw.device, dtype=raw.dtype)
    uv = torch.stack([u, v], -1).to(raw) + offset / size  # in [0, 1]
    K_inv = torch.linalg.inv(K / torch.tensor([W, H, 1.0], device=K.device)[:, None])
    ray = F.normalize(torch.einsum("vij,vhwj->vhwi", K_inv, F.pad(uv, (0, 1), value=1.0)), dim=-1)
    means = t[:, None, None] + torch.einsum("vij,vhwj->vhwi", R, ray) * depth[..., None]
    pixel = .1 * (K_inv[:, :2, :2] / size).sum((1, 2))
    scales = (1e-5 + (30 - 1e-5) * scale.sigmoid()) * depth[..., None] * pixel[:, None, None, None]
    q = quaternion / (quaternion.norm(dim=-1, keepdim=True) + 1e-8)
    q = matrix_to_quaternion(R[:, None, None] @ quaternion_to_matrix(q[..., [3, 0, 1, 2]]))
    mask = torch.tensor([1.0] + [.025] * 3 + [.00625] * 5, device=raw.device)
    sh = rotate_sh((sh.unflatten(-1, (3, 9)) * mask).flatten(1, 2), R)
    return Gaussians(means.flatten(0, 2), scales.flatten(0, 2), q.flatten(0, 2), sh.flatten(0, 1), opacity.sigmoid().flatten())


def umeyama_scale(reference, estimate):
    """Scale of the similarity that best maps positions `estimate` onto `reference` (V, 3); 1 if either stands still.

    Umeyama's S_1 + S_2 +- S_3 over the estimate's variance; collinear positions are fine for the scale.
    """
    a, b = reference.double().cpu(), estimate.double().cpu()
    a, b = a - a.mean(0), b - b.mean(0)
    U, S, Vt = torch.linalg.svd(a.T @ b / len(a))
    if S[0] <= torch.finfo(S.dtype).eps:
        return 1.0
    sign = torch.sign(torch.linalg.det(U) * torch.linalg.det(Vt))
    return float((S[0] + S[1] + sign * S[2]) / b.square().sum(1).mean())


# ----------------------------------------------------------------------------------------------------------- the model

@dataclass
class Reconstruction:
    depth: torch.Tensor  # (F, h, w) z-depth at the processed size
    confidence: torch.Tensor  # (F, h, w), at least 1
    camera_to_world: torch.Tensor  # (F, 4, 4)
    intrinsics: torch.Tensor  # (F, 3, 3) in pixels of the processed size
    gaussians: Gaussians | None
    images: torch.Tensor  # (F, 3, h, w) in [0, 1], what the model saw
    frames: torch.Tensor  # (F,) indices of the input frames used


class DepthAnything3(nn.Module):
    def __init__(self, config=SIZES["da3-small"]):
        super().__init__()
        c = self.config = config
        self.backbone = Backbone(c)
        self.head = DPT(c, 2, token_norm=True, ray_branch=True)
        self.cam_dec, self.cam_enc = CameraDecoder(2 * c.dim), CameraEncoder(c.dim)
        if c.gaussians:
            self.gs_head = DPT(c, 38, token_norm=False, image_branch=True)

    def network(self, x, camera_to_world=None, intrinsics=None):
        """Normalised images (V, 3, h, w) -> depth, confidence (V, h, w), camera-to-world, intrinsics, Gaussians or None."""
        H, W = x.shape[2:]
        token = None if camera_to_world is None else self.cam_enc(camera_to_world, intrinsics, H, W)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            features = self.backbone.pretrained(x[None], None if token is None else token[None])
        patches = [f[0].float() for f, _ in features]
        log_depth, log_confidence = self.head(patches, x).unbind(1)
        depth, confidence = log_depth.exp(), log_confidence.exp() + 1
        pose, K = self.cam_dec(features[-1][1][0].float(), H, W)
        gaussians = None
        if self.config.gaussians:
            scale = 1.0
            if camera_to_world is not None:
                scale = pose_scale(camera_to_world, pose)
            gaussians = gaussians_of(self.gs_head(patches, x), depth, pose, K, scale)
        return depth, confidence, pose, K, gaussians

    @torch.no_grad()
    def forward(self, frames, views=None, camera_to_world=None, intrinsics=None):
        """frames (F, 3, H, W) in [0, 1] -> Reconstruction, in the model's own world axes and scale.

        views: at most this many frames, evenly spread (`.frames` lists them). Attention over all views makes time grow
        with their square, and memory with their number (`memory_estimate`): keep `views` well below the frame count for
        long or large videos. camera_to_world (F, 4, 4) and intrinsics (F, 3, 3), in pixels of the frames, if they are
        known: they guide the model, and the result is in their world and scale.
        """
        if frames.dim() != 4 or frames.shape[1] != 3 or not len(frames):
            raise ValueError(f"frames must be (F, 3, H, W) with F >= 1, got {tuple(frames.shape)}")
        if views is not None and views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        if (camera_to_world is None) != (intrinsics is None) or camera_to_world is not None and (
                camera_to_world.shape != (len(frames), 4, 4) or intrinsics.shape != (len(frames), 3, 3)):
            raise ValueError("known cameras need both camera_to_world (F, 4, 4) and intrinsics (F, 3, 3), one a frame")
        count = min(views or len(frames), len(frames))
        index = torch.linspace(0, len(frames) - 1, count).round().long()
        device = self.cam_dec.fc_t.weight.device
        need, free = memory_estimate(self.config, count, *processed_size(*frames.shape[2:], self.config)), free_memory(device)
        if need > free:
            raise ValueError(f"{count} views need about {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; ask for fewer views")
        if not frames.isfinite().all():
            raise ValueError("frames have NaN or infinite pixels")
        images = preprocess(frames[index], self.config)
        x = ((images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).to(device)
        if camera_to_world is None:
            return Reconstruction(*self.network(x), images=images.to(device), frames=index)
        given = camera_to_world[index].float().to(device)
        K = intrinsics[index].float().to(device) * torch.tensor([x.shape[3] / frames.shape[3], x.shape[2] / frames.shape[2], 1.0], device=device)[:, None]
        relative = invert(given[:1]) @ given
        unit = relative[:, :3, 3].norm(dim=1).median().clamp_min(.1)
        relative[:, :3, 3] /= unit
        depth, confidence, pose, _, gaussians = self.network(x, relative, K)
        depth = depth / umeyama_scale(pose[:, :3, 3], given[:, :3, 3])
        if gaussians is not None:  # they are in the predicted cameras' world at the relative ones' scale; first cameras meet
            pose[:, :3, 3] *= pose_scale(relative, pose)
            pose[:, :3, 3] *= unit
            gaussians = move_gaussians(gaussians, given[0] @ invert(pose[0]), unit)
        return Reconstruction(depth, confidence, given, K, gaussians, images=images.to(device), frames=index)


def pose_scale(given, found):
    """The scale that takes found positions to given ones, within [1/3, 3], as the Gaussian head was trained with."""
    return min(max(umeyama_scale(given[:, :3, 3], found[:, :3, 3]), 1 / 3), 3.0)


def move_gaussians(g, transform, scale):
    """Gaussians scaled about the origin, then moved by a rigid (4, 4)."""
    R, t = transform[:3, :3], transform[:3, 3]
    turned = matrix_to_quaternion(R @ quaternion_to_matrix(g.rotations[:, [1, 2, 3, 0]]))
    return Gaussians(scale * g.means @ R.T + t, scale * g.scales, turned[:, [3, 0, 1, 2]], rotate_sh(g.harmonics[None], R[None])[0], g.opacities)


def memory_estimate(config, views, height, width):
    """Bytes a reconstruction takes beyond the weights: the features that four layers keep, the working set of one block,
    the heads' full-size maps (eight views at a time), and per pixel and view the outputs and Gaussians."""
    tokens = views * (height // config.patch_size * (width // config.patch_size) + 1)
    kept = tokens * config.dim * 4 * (2 * 4 + 12)
    heads = min(views, 8) * height * width * config.features * 4 * 3
    return kept + heads + views * height * width * 4 * (160 if config.gaussians else 16)


def free_memory(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import os
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else float("inf")


def resize(images, height, width):
    """(F, 3, H, W) -> (F, 3, height, width): exact box average where neither side grows, bicubic otherwise."""
    H, W = images.shape[2:]
    if (H, W) == (height, width):
        return images
    if height > H or width > W:
        return F.interpolate(images, size=(height, width), mode="bicubic").clamp(0, 1)

    def box(n, m):  # (m, n): how much of each of m output cells each of n input cells covers
        edges = torch.arange(m + 1, dtype=torch.float64) * n / m
        cells = torch.arange(n, dtype=torch.float64)
        overlap = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
        return (overlap.clamp_min(0) * m / n).to(images)

    return box(H, height) @ images @ box(W, width).T


def preprocess(frames, config):
    """Longest side to process_res, then each side to the nearest multiple of the patch size."""
    H, W = frames.shape[2:]
    scale = config.process_res / max(H, W)
    frames = resize(frames.float().cpu(), max(1, round(H * scale)), max(1, round(W * scale)))
    return resize(frames, *processed_size(H, W, config))


def processed_size(H, W, config):
    """The size an H x W picture is processed at: sides are multiples of the patch size, ties up."""
    scale, p = config.process_res / max(H, W), config.patch_size
    return tuple(max(p, (max(1, round(n * scale)) + p // 2) // p * p) for n in (H, W))


def load_depth_anything(path, device="cpu"):
    """DepthAnything3 from a folder or hub id with model.safetensors and config.json (strict: every tensor must match).

    config.json names a published size ({"model_name": "da3-giant"}) or holds DA3Config's fields.
    """
    folder = _folder(path, ["config.json", "model.safetensors"])
    values = _read_json(folder / "config.json")
    if values.get("model_name") in SIZES:
        config = SIZES[values["model_name"]]
    elif "dim" in values and "alt_start" in values:
        known = {f.name for f in dataclasses.fields(DA3Config)}
        config = DA3Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})
    else:
        raise ValueError(f"{folder / 'config.json'} names none of {', '.join(SIZES)}; this file covers no other model")
    file = folder / "model.safetensors"
    if not file.exists():
        raise ValueError(f"{folder} lacks model.safetensors; download the checkpoint again")
    with torch.device("meta"):
        model = DepthAnything3(config)
    return _fill(model, _match(model, [file], checkpoint_key, device), device, torch.float32)


def checkpoint_key(key):
    """The published name of one of our parameters; the ray branch's shared norm is stored once."""
    return "model." + re.sub(r"output_conv2_aux\.[1-3]\.2\.", "output_conv2_aux.0.2.", key)


# ------------------------------------------------------------------------------------------------------------- pictures

def write_ply(path, g):
    """Gaussians as the binary .ply that 3DGS viewers open: log scales, logit opacity, SH split into f_dc and f_rest."""
    import numpy as np
    order = g.opacities.argsort(descending=True).cpu()
    sh, opacity = g.harmonics.cpu()[order], g.opacities.cpu()[order].clamp(1e-6, 1 - 1e-6)
    columns = {"x y z": g.means.cpu()[order], "nx ny nz": torch.zeros(len(order), 3), "f_dc_0 f_dc_1 f_dc_2": sh[:, :, 0],
               " ".join(f"f_rest_{i}" for i in range(3 * (sh.shape[2] - 1))): sh[:, :, 1:].flatten(1), "opacity": opacity.logit()[:, None],
               "scale_0 scale_1 scale_2": g.scales.cpu()[order].clamp_min(1e-9).log(), "rot_0 rot_1 rot_2 rot_3": g.rotations.cpu()[order]}
    names = " ".join(columns).split()
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(order)}", *[f"property float {n}" for n in names], "end_header\n"]
    part = Path(path).with_name(f".{Path(path).name}.part")
    part.write_bytes("\n".join(header).encode() + torch.cat(list(columns.values()), 1).numpy().astype(np.dtype("<f4")).tobytes())
    part.rename(path)


def plot_paths(paths, size=256):
    """Camera paths from above and from the right, as one PIL picture (size x 2 size).

    paths: {colour name: camera-to-world (F, 4, 4)}, in one frame and scale. Ticks show where three of the cameras look.
    """
    from PIL import Image, ImageDraw
    picture = Image.new("RGB", (2 * size, size), "white")
    draw = ImageDraw.Draw(picture)
    points = torch.cat([p[:, :3, 3] for p in paths.values()]).double().cpu()
    middle, reach = (points.amax(0) + points.amin(0)) / 2, max(float((points.amax(0) - points.amin(0)).max()), .2)
    for k, (name, axis) in enumerate((("from above", 0), ("from the right", 1))):
        draw.text((k * size + 6, 4), name, fill="black")

        def at(v):
            across = (v[axis] - middle[axis]) if axis == 0 else -(v[1] - middle[1])
            a, b = float(across) / reach * .7 * size, float(v[2] - middle[2]) / reach * .7 * size
            return (k * size + size / 2 + a, size / 2 - b) if axis == 0 else (k * size + size / 2 + b, size / 2 - a)

        for ink, poses in paths.items():
            poses = poses.double().cpu()
            draw.line([at(p[:3, 3]) for p in poses], fill=ink, width=3)
            for i in (0, len(poses) // 2, len(poses) - 1):
                draw.line([at(poses[i, :3, 3]), at(poses[i, :3, 3] + .12 * reach * poses[i, :3, 2])], fill=ink)
    return picture


def colour_depth(depth):
    """Depth (F, H, W) -> (F, 3, H, W): near is warm and light, far is dark blue, on inverse depth between its 2 % ends."""
    inverse = 1 / depth.cpu().clamp_min(1e-6)
    low, high = inverse.flatten()[::7].quantile(.02), inverse.flatten()[::7].quantile(.98)
    t = ((inverse - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    ramp = torch.tensor([[.05, .03, .20], [.25, .07, .45], [.65, .20, .42], [.95, .45, .22], [.98, .90, .55]])
    at = t * (len(ramp) - 1)
    i = at.long().clamp(max=len(ramp) - 2)
    return (ramp[i] + (at - i)[..., None] * (ramp[i + 1] - ramp[i])).permute(0, 3, 1, 2)


def main(argv=None):
    import argparse
    import sys
    import splat
    from sample import read_video, write_video
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", help="an mp4")
    parser.add_argument("--model", default=str(Path(__file__).parent / "tiny" / "depth_anything"), help="folder or hub id, e.g. depth-anything/DA3-GIANT")
    parser.add_argument("--views", type=int, help="frames that are reconstructed, evenly spread (default: all)")
    parser.add_argument("--out", type=Path, help="folder (default: beside the video, NAME_3d)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    try:
        video, fps = read_video(a.video)
        da3 = load_depth_anything(a.model, a.device)
        rec = da3(video, a.views)
    except (ValueError, OSError) as e:
        print(f"depth_anything.py: {e}", file=sys.stderr)
        return 2
    out = a.out or Path(a.video).with_name(Path(a.video).stem + "_3d")
    out.mkdir(parents=True, exist_ok=True)
    fps = max(1.0, fps * len(rec.frames) / len(video))
    write_video(out / "depth.mp4", colour_depth(rec.depth), fps)
    plot_paths({"firebrick": rec.camera_to_world}).save(out / "path.png")
    if rec.gaussians is not None:
        write_ply(out / "gaussians.ply", rec.gaussians)
        rgb, _, _ = splat.render(rec.gaussians, rec.camera_to_world, rec.intrinsics, *rec.depth.shape[1:])
        write_video(out / "input_and_rerender.mp4", torch.cat([rec.images.cpu(), rgb.cpu()], 3), fps)
        error = (rgb.clamp(0, 1) - rec.images).square().mean((1, 2, 3))
        print(f"re-render of {len(rec.frames)} views: {-10 * float(error.mean().log10()):.2f} dB PSNR")
    travel = (rec.camera_to_world[-1, :3, 3] - rec.camera_to_world[0, :3, 3]).norm() / rec.depth.median()
    print(f"camera travels {float(travel):.3f} median depths; wrote {', '.join(sorted(f.name for f in out.iterdir()))} to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
