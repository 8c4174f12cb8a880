"""Depth Anything 3 (arXiv 2511.10647) inference in one file: frames -> depth, cameras, 3D Gaussians.

    da3 = load_depth_anything("tiny/depth_anything")       # or a hub id such as depth-anything/DA3-GIANT
    rec = da3(frames)                                      # (F, 3, H, W) in [0, 1]
    rec.depth, rec.confidence, rec.camera_to_world, rec.intrinsics, rec.gaussians
    python depth_anything.py video.mp4                     # depth video, path, .ply, re-render beside it

A DINOv2 transformer whose blocks, from `alt_start` on, alternate between attention within a view and over all
views; a DPT head for depth and confidence; a camera decoder on each view's first token; and (GIANT, tiny) a
second DPT whose 38 channels a pixel become Gaussians. Pixel p of view v at depth d is the point

    X = R_v d K_v^-1 (p, 1) + t_v    in the axes of the reference view, the most average one.

Module names follow the published checkpoints.

Left out: known cameras as input and ray-based poses (UNUSED: a checkpoint may hold their weights), the nested
metric model, sky masks, drop-path, dropout.
"""

import functools
import math
import re
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from noise_warp import draw_paths
from sample import check_device, check_writable, evenly_spaced, psnr, read_video, write_video
from splat import Gaussians, matrix_to_quaternion, quaternion_to_matrix, render, rotate_sh
from weights import (TINY, Size, as_command, command_line, config_from, fill, match_tensors, model_folder,
                     on_meta, open_tensors, read_json, weight_files, written_whole)

MEAN, STD = (.485, .456, .406), (.229, .224, .225)  # ImageNet
UNUSED = re.compile(r"model\.(cam_enc\.|head\.scratch\.(output_conv|refinenet)\d_aux\.)")  # branches left out
CHUNK = 8  # views that go through a head at once


@dataclass
class DA3Config:
    dim: Size = 384
    depth: Size = 12
    heads: Size = 6
    swiglu: bool = False  # the feed-forward of ViT-g
    out_layers: tuple[int, int, int, int] = (5, 7, 9, 11)
    alt_start: Size = 4  # first block with qk-norm and RoPE; from here odd blocks attend over all views
    features: Size = 64  # width of the DPT heads
    out_channels: tuple[Size, Size, Size, Size] = (48, 96, 192, 384)
    gaussians: bool = False  # whether the checkpoint has the Gaussian head
    patch_size: Size = 14
    grid: Size = 37  # side of the learned position embedding
    process_res: Size = 504  # the longest side that frames are resized to


SIZES = {
    "da3-small": DA3Config(),
    "da3-base": DA3Config(dim=768, depth=12, heads=12, features=128, out_channels=(96, 192, 384, 768)),
    "da3-large": DA3Config(dim=1024, depth=24, heads=16, out_layers=(11, 15, 19, 23), alt_start=8,
                           features=256, out_channels=(256, 512, 1024, 1024)),
    "da3-giant": DA3Config(dim=1536, depth=40, heads=24, swiglu=True, out_layers=(19, 27, 33, 39),
                           alt_start=13, features=256, out_channels=(256, 512, 1024, 1024), gaussians=True),
}


# --------------------------------------------------------------------------------------- blocks and attention

def mlp(dim, hidden):
    return nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8  # as many parameters as mlp, to a multiple of 8
        # Gate and value in one matrix.
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A gain a channel on what a layer adds to the residual stream."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


def rope2d(positions, head_dim):
    """Positions (N, 2) = (y, x) -> cos, sin (N, head_dim): the first half turns with y, the second with x."""
    # Base 100 instead of the usual 10,000: positions are a picture's few dozen patches.
    quarter = head_dim // 4
    frequency = 1 / 100 ** (torch.arange(quarter, device=positions.device).float() / quarter)
    angle = positions.float()[..., None] * frequency  # (N, 2, quarter)
    angle = angle.repeat(1, 1, 2).flatten(1)  # (N, head_dim)
    return angle.cos(), angle.sin()


def rotate2d(x, cos, sin):
    """Rotates pairs (i, i + quarter) of each half of the last dimension, in float32."""
    first, second = x.float().unflatten(-1, (2, 2, -1)).unbind(-2)  # (..., y|x half, quarter) each
    turned = torch.stack([-second, first], -2).flatten(-3)
    return (x.float() * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        # The first blocks are DINOv2's own, which had no norm here.
        norm = nn.LayerNorm if qk_norm else nn.Identity
        self.q_norm = norm(dim // heads)
        self.k_norm = norm(dim // heads)

    def forward(self, x, rotation=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, head_dim) each
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rotation is not None:
            q = rotate2d(q, *rotation)
            k = rotate2d(k, *rotation)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, heads, qk_norm, swiglu):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.attn = Attention(dim, heads, qk_norm)
        self.mlp = (SwiGLU if swiglu else mlp)(dim, 4 * dim)
        self.ls1 = LayerScale(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x, rotation=None):
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        return x + self.ls2(self.mlp(self.norm2(x)))


# ------------------------------------------------------------------- attention within a view / over all views

def reference_view(tokens):
    """Index of the view whose class token (V, D) is the most average one ("saddle_balanced"). Of each token:
    mean cosine to the others, norm, and variance of its entries once it has unit norm; each scaled to [0, 1]
    over the views. The view with the smallest sum of distances to .5 is taken."""
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    similarity = (unit @ unit.T - torch.eye(len(unit), device=unit.device)).sum(-1) / (len(unit) - 1)

    def off_middle(m):
        return ((m - m.min()) / (m.max() - m.min() + 1e-8) - .5).abs()

    return (off_middle(similarity) + off_middle(tokens.norm(dim=-1)) + off_middle(unit.var(-1))).argmin()


class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.camera_token = nn.Parameter(torch.randn(1, 2, c.dim) * .02)  # the reference view's, the others'
        self.pos_embed = nn.Parameter(torch.randn(1, c.grid ** 2 + 1, c.dim) * .02)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, c.dim, c.patch_size, c.patch_size)))
        self.blocks = nn.ModuleList(
            [Block(c.dim, c.heads, i >= c.alt_start, c.swiglu) for i in range(c.depth)])
        self.norm = nn.LayerNorm(c.dim)

    def positions(self, h, w):
        """Learned position embedding, resized to (h, w) patches by scale factor (n + .1)/grid as DINOv2."""
        grid = self.config.grid
        if h == w == grid:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, scale_factor=((h + .1) / grid, (w + .1) / grid), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], 1)

    def forward(self, images):
        """(B, V, 3, H, W) -> of all four out_layers: patch features (B, V, N, 2D), first tokens (B, V, 2D).

        `.reference` (B,) holds each scene's reference view afterwards: the world axes are that camera's.
        """
        c = self.config
        B, V, _, H, W = images.shape
        h, w = H // c.patch_size, W // c.patch_size

        # Every view alone: its patches and a class token, with learned positions.
        patches = self.patch_embed(images.flatten(0, 1)).flatten(2).transpose(1, 2)  # (BV, N, D)
        x = torch.cat([self.cls_token.expand(B * V, -1, -1), patches], 1) + self.positions(h, w)
        x = x.unflatten(0, (B, V))  # (B, V, 1+N, D)

        # Rotary positions. In attention within a view the first token sits at (0, 0), the patches from (1, 1)
        # on. In attention over all views every patch sits at (1, 1), so that only content tells them apart.
        grid = torch.cartesian_prod(torch.arange(h), torch.arange(w)) + 1
        grid = F.pad(grid, (0, 0, 1, 0)).to(x.device)  # (1+N, 2)
        within = rope2d(grid, c.dim // c.heads)
        across = rope2d(grid.clamp(max=1).repeat(V, 1), c.dim // c.heads)

        scene = torch.arange(B, device=x.device)[:, None]
        order = torch.arange(V, device=x.device).expand(B, V)
        self.reference = torch.zeros(B, dtype=torch.long, device=x.device)
        local = x  # what the last block within the views made
        taken = []
        for i, block in enumerate(self.blocks):
            if i == c.alt_start - 1 and V >= 3:
                # The world's axes will be the most average view's: it comes first. Below three views there is
                # no average one, and the first stays the reference.
                self.reference = torch.stack([reference_view(tokens) for tokens in x[:, :, 0]])
                order = torch.where(order == self.reference[:, None], -1, order).argsort(1)
                x, local = x[scene, order], local[scene, order]
            if i == c.alt_start:
                # From here each view's first token gathers its camera.
                which = torch.arange(V).clamp(max=1)  # the reference view's token, the others'
                token = self.camera_token[:, which].expand(B, -1, -1)  # (B, V, D)
                x = torch.cat([token.to(x.dtype).unsqueeze(2), x[:, :, 1:]], 2)
            if i >= c.alt_start and i % 2:
                x = block(x.flatten(1, 2), across).view_as(x)  # all views as one sequence (B, V(1+N), D)
            else:
                rotation = within if i >= c.alt_start else None
                x = local = block(x.flatten(0, 1), rotation).view_as(x)  # every view by itself (BV, 1+N, D)
            if i in c.out_layers:
                # Side by side: the state after the last block within the views, and now; in input order.
                back = order.argsort(1)
                earlier, now = local[scene, back], x[scene, back]
                patches = torch.cat([earlier[:, :, 1:], self.norm(now[:, :, 1:])], -1)
                taken.append((patches, torch.cat([earlier[:, :, 0], now[:, :, 0]], -1)))
        return taken


# -------------------------------------------------------------------------------------------------- DPT heads

def uv_embedding(x, aspect):
    """.1 * sine-cosine embedding of positions (C, h, w) for features x (V, C, h, w) at this aspect (W/H)."""
    C, h, w = x.shape[1:]
    diagonal = math.sqrt(aspect ** 2 + 1)
    frequency = 100.0 ** -(torch.arange(C // 4, device=x.device).float() / (C // 4))

    def along(side, reach):
        """(C/2, side) at the middles of `side` cells between -reach / diagonal and reach / diagonal."""
        positions = torch.linspace(-1, 1, side, device=x.device) * (reach / diagonal * (side - 1) / side)
        angle = torch.outer(frequency, positions)
        return torch.cat([angle.sin(), angle.cos()])

    u = along(w, aspect)[:, None, :].expand(-1, h, -1)
    v = along(h, 1)[:, :, None].expand(-1, -1, w)
    return .1 * torch.cat([u, v])  # (C, h, w)


conv3x3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


class ResidualConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1 = conv3x3(dim, dim)
        self.conv2 = conv3x3(dim, dim)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a finer map (`lateral`) to a coarse one, and enlarges the sum to `size`, by default twice."""

    def __init__(self, dim, lateral):
        super().__init__()
        if lateral:
            self.resConfUnit1 = ResidualConv(dim)
        self.resConfUnit2 = ResidualConv(dim)
        self.out_conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x, lateral=None, size=None):
        if lateral is not None:
            x = x + self.resConfUnit1(lateral)
        x = self.resConfUnit2(x)
        size = size or [2 * side for side in x.shape[2:]]
        return self.out_conv(F.interpolate(x, size=size, mode="bilinear", align_corners=True))


class DPT(nn.Module):
    """Dense prediction transformer (arXiv 2103.13413): four layers' patch features -> one map of `out`
    channels at full resolution, from coarse to fine."""

    def __init__(self, config, out, token_norm, image_branch):
        super().__init__()
        self.patch_size = config.patch_size
        features, channels = config.features, config.out_channels
        half = features // 2
        self.norm = nn.LayerNorm(2 * config.dim) if token_norm else nn.Identity()
        self.projects = nn.ModuleList([nn.Conv2d(2 * config.dim, width, 1) for width in channels])
        self.resize_layers = nn.ModuleList([  # to 4, 2, 1 and 1/2 times the patch grid
            nn.ConvTranspose2d(channels[0], channels[0], 4, 4),
            nn.ConvTranspose2d(channels[1], channels[1], 2, 2),
            nn.Identity(),
            nn.Conv2d(channels[3], channels[3], 3, 2, 1)])
        # The name is MiDaS's: the part that was trained from scratch, on top of a pretrained transformer.
        self.scratch = nn.Module()
        for i, width in enumerate(channels):
            self.scratch.add_module(f"layer{i + 1}_rn", conv3x3(width, features, bias=False))
            self.scratch.add_module(f"refinenet{i + 1}", Fusion(features, lateral=i < 3))
        self.scratch.output_conv1 = conv3x3(features, half)
        self.scratch.output_conv2 = nn.Sequential(conv3x3(half, 32), nn.ReLU(), nn.Conv2d(32, out, 1))
        self.images_merger = None
        if image_branch:  # colours at full resolution, past the patches
            self.images_merger = nn.Sequential(
                conv3x3(3, half // 4), nn.GELU(),
                conv3x3(half // 4, half // 2), nn.GELU(),
                conv3x3(half // 2, half), nn.GELU())

    def forward(self, features, images):
        """Features: four (V, N, 2D); images (V, 3, H, W) -> (V, out, H, W)."""
        # A few views at a time: their full-size maps are the largest tensors of all.
        feature_chunks = zip(*(layer.split(CHUNK) for layer in features))  # of each: four (CHUNK, N, 2D)
        image_chunks = images.split(CHUNK)
        return torch.cat([self._views(*chunk) for chunk in zip(feature_chunks, image_chunks)])

    def _views(self, features, images):
        H, W = images.shape[2:]

        # Each layer's tokens as a picture, at its own resolution.
        maps = []
        for i, x in enumerate(features):
            x = self.norm(x).transpose(1, 2).unflatten(2, (H // self.patch_size, W // self.patch_size))
            x = self.projects[i](x)
            x = self.resize_layers[i](x + uv_embedding(x, W / H))
            maps.append(self.scratch.get_submodule(f"layer{i + 1}_rn")(x))

        # From the coarsest, adding the next finer one at each step, to the pixels.
        x = self.scratch.refinenet4(maps[3], size=maps[2].shape[2:])
        x = self.scratch.refinenet3(x, maps[2], maps[1].shape[2:])
        x = self.scratch.refinenet2(x, maps[1], maps[0].shape[2:])
        x = self.scratch.output_conv1(self.scratch.refinenet1(x, maps[0]))
        x = F.interpolate(x, size=(H, W), mode="bilinear", align_corners=True)
        if self.images_merger is not None:
            x = x + self.images_merger(images)
        return self.scratch.output_conv2(x + uv_embedding(x, W / H))


# ---------------------------------------------------------------------------------------------------- cameras

class CameraDecoder(nn.Module):
    """Each view's first token -> its pose (translation, quaternion) and fields of view."""

    def __init__(self, dim):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_t = nn.Linear(dim, 3)
        self.fc_qvec = nn.Linear(dim, 4)
        self.fc_fov = nn.Sequential(nn.Linear(dim, 2), nn.ReLU())

    def forward(self, token, H, W):
        """First tokens (V, 2D) -> camera-to-world (V, 4, 4), intrinsics (V, 3, 3) in H x W pixels."""
        x = self.backbone(token)
        # fc_qvec's quaternion is not normalised: quaternion_to_matrix takes one of any norm.
        pose = torch.eye(4, device=x.device).repeat(len(x), 1, 1)
        pose[:, :3, :3] = quaternion_to_matrix(self.fc_qvec(x))
        pose[:, :3, 3] = self.fc_t(x)
        K = torch.eye(3, device=x.device).repeat(len(x), 1, 1)
        middle = x.new_tensor([W / 2, H / 2])
        K[:, :2, 2] = middle
        # focal = side / (2 tan(fov/2)); the head gives the height's fov, then the width's, in radians
        half_angle = self.fc_fov(x).flip(-1) / 2
        K.diagonal(0, 1, 2)[:, :2] = half_angle.tan().clamp_min(1e-6).reciprocal() * middle  # fx, fy
        return pose, K


# -------------------------------------------------------------------------------------------------- Gaussians

def gaussians_of(raw, depth, camera_to_world, K):
    """The head's 38 channels of each pixel -> world-space Gaussians, one per pixel and view.

    raw (V, 38, H, W): pixel offset 2, scale 3, quaternion 4, SH 27 (colour-major), depth offset 1, opacity 1.
    """
    H, W = raw.shape[2:]
    raw = raw.permute(0, 2, 3, 1)  # (V, H, W, 38)
    offset, scale, quaternion, harmonics, depth_offset, opacity = raw.split((2, 3, 4, 27, 1, 1), -1)
    R, t = camera_to_world[:, :3, :3], camera_to_world[:, :3, 3]

    # As published, depth + offset is taken as the *length* of the pixel's ray, though the depth head gives z:
    # away from the centre a mean is nearer than the X of this file's first docstring, unless the offset
    # corrects it. Pixel positions and K are in fractions of the picture's sides.
    size = torch.tensor([W, H, 1.0]).to(raw)
    v, u = torch.meshgrid((torch.arange(H) + .5) / H, (torch.arange(W) + .5) / W, indexing="ij")
    uv = torch.stack([u, v], -1).to(raw) + offset / size[:2]  # (V, H, W, 2)
    K_inv = torch.linalg.inv(K / size[:, None])
    ray = torch.einsum("vij,vhwj->vhwi", K_inv, F.pad(uv, (0, 1), value=1.0))
    ray = torch.einsum("vij,vhwj->vhwi", R, F.normalize(ray, dim=-1))  # in world axes
    length = depth[..., None] + depth_offset  # (V, H, W, 1)
    means = t[:, None, None] + ray * length

    # As published, scales lie between 1e-5 and 30 units; a unit is a tenth of the sum of a pixel's two sides
    # at the Gaussian's distance.
    pixel = .1 * (K_inv[:, :2, :2] / size[:2]).sum((1, 2))  # (V,), at distance 1
    scales = (1e-5 + (30 - 1e-5) * scale.sigmoid()) * length * pixel[:, None, None, None]

    # From camera to world axes. As published, the quaternion is rolled by one before it is read scalar last,
    # and the result, scalar last, goes as it is to a renderer that reads it scalar first: wrong as geometry,
    # but the weights were trained with it.
    q = quaternion / (quaternion.norm(dim=-1, keepdim=True) + 1e-8)
    rotations = matrix_to_quaternion(R[:, None, None] @ quaternion_to_matrix(q[..., [3, 0, 1, 2]]))
    # Degrees 1 and 2 are damped by .1 / 4^degree, as published.
    damping = torch.tensor([1.0] + [.025] * 3 + [.00625] * 5, device=raw.device)
    harmonics = rotate_sh(harmonics.unflatten(-1, (3, 9)) * damping, R)  # (V, H, W, 3, 9)
    parts = (means, scales, rotations, harmonics, opacity.sigmoid().squeeze(-1))
    return Gaussians(*(part.flatten(0, 2) for part in parts))


# -------------------------------------------------------------------------------------------------- the model

@dataclass
class Reconstruction:
    depth: torch.Tensor  # (V, h, w) z-depth at the processed size, of the V views that were reconstructed
    confidence: torch.Tensor  # (V, h, w), at least 1
    camera_to_world: torch.Tensor  # (V, 4, 4)
    intrinsics: torch.Tensor  # (V, 3, 3) in pixels of the processed size
    gaussians: Gaussians | None
    images: torch.Tensor  # (V, 3, h, w) in [0, 1], what the model saw
    index: torch.Tensor  # (V,) which of the input's frames they are


class DepthAnything3(nn.Module):
    def __init__(self, config=SIZES["da3-small"]):
        super().__init__()
        self.config = config
        self.backbone = nn.Sequential(OrderedDict(pretrained=VisionTransformer(config)))
        self.head = DPT(config, 2, token_norm=True, image_branch=False)
        self.cam_dec = CameraDecoder(2 * config.dim)
        if config.gaussians:
            self.gs_head = DPT(config, 38, token_norm=False, image_branch=True)

    def network(self, images):
        """Normalised images (V, 3, h, w) -> depth, confidence (V, h, w), camera-to-world (V, 4, 4),
        intrinsics (V, 3, 3), Gaussians or None."""
        H, W = images.shape[2:]
        # The transformer in bfloat16 where that is fast, the heads in float32 as published.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            layers = self.backbone(images[None])
        # [0]: a batch of one scene
        patches = [patch[0].float() for patch, _ in layers]  # four (V, N, 2D)
        _, first_tokens = layers[-1]
        first_tokens = first_tokens[0].float()  # (V, 2D)

        depth, confidence = self.head(patches, images).exp().unbind(1)
        pose, K = self.cam_dec(first_tokens, H, W)
        gaussians = None
        if self.config.gaussians:
            gaussians = gaussians_of(self.gs_head(patches, images), depth, pose, K)
        return depth, confidence + 1, pose, K, gaussians

    @torch.no_grad()
    def forward(self, frames, views=None):
        """frames (F, 3, H, W) in [0, 1] -> Reconstruction, in the model's own world axes and scale.

        views: at most this many frames, evenly spread (`.index` lists them). Attention over all views makes
        time grow with their square, and memory with their number (`memory_estimate`): keep `views` well below
        the frame count for long or large videos.
        """
        if frames.dim() != 4 or frames.shape[1] != 3 or not len(frames):
            raise ValueError(f"frames must be (F, 3, H, W) with F >= 1, got {tuple(frames.shape)}")
        if views is not None and views < 1:
            raise ValueError(f"--views must be at least 1, got {views}")
        # Refused before anything is computed: out of memory on a CPU, Linux kills the process without a word.
        count = min(views or len(frames), len(frames))
        device = self.cam_dec.fc_t.weight.device
        need = memory_estimate(self.config, count, *processed_size(*frames.shape[2:], self.config))
        free = free_memory(device)
        if need > free:
            raise MemoryError(f"{count} views need about {need / 1e9:.1f} GB, and "
                              f"{free / 1e9:.1f} GB are free (fewer --views need less)")
        if not frames.isfinite().all():
            raise ValueError("frames have NaN or infinite pixels")

        # Evenly spread frames, so that the whole of the camera's path is seen.
        index = evenly_spaced(len(frames), count)
        images = preprocess(frames[index], self.config)
        seen = normalised(images).to(device)
        return Reconstruction(*self.network(seen), images=images.to(device), index=index)


def memory_estimate(config, views, height, width):
    """Bytes a reconstruction takes beyond the weights: the features that four layers keep, the working set of
    one block, the heads' full-size maps (eight views at a time), and per pixel and view the outputs and
    Gaussians."""
    # All in float32, 4 bytes a number. Kept: 4 layers' 2 dim, and 12 dim at work. Heads: three maps at once.
    tokens = views * (height // config.patch_size * (width // config.patch_size) + 1)
    kept = tokens * config.dim * 4 * (2 * 4 + 12)
    heads = min(views, CHUNK) * height * width * config.features * 4 * 3
    outputs = views * height * width * 4 * (160 if config.gaussians else 16)
    return kept + heads + outputs


def free_memory(device):
    """Bytes that can be had now; infinite where nobody says."""
    if device.type == "cuda":
        # What torch has reserved and does not use can be had, too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return math.inf
    free, meminfo = container_memory(), Path("/proc/meminfo")
    if meminfo.exists():  # MemAvailable counts the file cache, which the system would give back
        free = min(free, 1024 * int(re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text())[1]))
    return free


def container_memory(folder=Path("/sys/fs/cgroup")):
    """Bytes that a container's limit leaves (cgroup v2), with what it caches of files; infinite without one.
    """
    try:
        limit, used = [(folder / name).read_text() for name in ("memory.max", "memory.current")]
        cached = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.M)
        return int(limit) - int(used) + int(cached[1])
    except (OSError, ValueError, TypeError):  # none, or "max"
        return math.inf


# ----------------------------------------------------------------------------------------------------- frames

def box_average(cells, out):
    """(out, cells): entry (i, j) is the share of output cell i that input cell j covers."""
    edges = torch.arange(out + 1, dtype=torch.float64) * cells / out
    start = torch.arange(cells, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)
    return overlap.clamp_min(0) * out / cells


def resize(images, height, width):
    """(F, 3, H, W) -> (F, 3, height, width): exact box average where neither side grows, bicubic otherwise.
    """
    H, W = images.shape[2:]
    if (H, W) == (height, width):
        return images
    if height > H or width > W:
        return F.interpolate(images, size=(height, width), mode="bicubic").clamp(0, 1)
    return box_average(H, height).to(images) @ images @ box_average(W, width).to(images).T


def fitted_size(H, W, config):
    """An H x W picture's size with its longest side at process_res."""
    scale = config.process_res / max(H, W)
    return max(1, round(H * scale)), max(1, round(W * scale))


def processed_size(H, W, config):
    """The size an H x W picture is processed at: fitted_size to multiples of the patch size, ties up."""
    patch = config.patch_size
    return tuple(max(patch, (side + patch // 2) // patch * patch) for side in fitted_size(H, W, config))


def preprocess(frames, config):
    """Longest side to process_res, then each side to the nearest multiple of the patch size: resized twice,
    as published (but in float32: the published code rounds to 8 bits each time)."""
    H, W = frames.shape[2:]
    fitted = resize(frames.float().cpu(), *fitted_size(H, W, config))
    return resize(fitted, *processed_size(H, W, config))


def normalised(images):
    """Images (..., 3, H, W) in [0, 1] -> as the network takes them, by ImageNet's mean and std a channel."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# ---------------------------------------------------------------------------------------------------- loading

def load_depth_anything(path, device="cpu"):
    """DepthAnything3 from a folder or hub id with model.safetensors and config.json. Strict: every tensor
    must match, but those of the branches that are left out (UNUSED), which a file may hold or not.

    config.json names a published size ({"model_name": "da3-giant"}) or holds DA3Config's fields.
    """
    folder = model_folder(path, ["config.json", "model.safetensors"])
    file = folder / "config.json"
    values = read_json(file)
    name = str(values.get("model_name"))
    if name in SIZES:
        config = SIZES[name]
    elif "dim" in values and "alt_start" in values:
        config = config_from(DA3Config, values, file)
    else:
        raise ValueError(f"{file} names none of {', '.join(SIZES)}; "
                         "this file covers no other model")
    layers = list(config.out_layers)
    if layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= config.depth:
        raise ValueError(f"{file}: out_layers must rise within the {config.depth} blocks, got {layers}; "
                         "download it again")
    if config.process_res > 4096:
        raise ValueError(f"{file}: process_res must be at most 4096 pixels, got {config.process_res}")
    files = weight_files(folder, "model")
    # What a file may hold of the branches left out is known only once the file is open.
    unused = {name for name in open_tensors(files) if UNUSED.match(name)}
    model = on_meta(functools.partial(DepthAnything3, config), files, file)
    return fill(model, match_tensors(model, files, checkpoint_key, device, unused), device, torch.float32)


def checkpoint_key(key):
    """The published name of one of our parameters."""
    return f"model.{key}"


# --------------------------------------------------------------------------------------------------- pictures

def write_ply(path, gaussians):
    """Gaussians as the binary .ply of 3DGS viewers: log scales, logit opacity, SH as f_dc and f_rest."""
    from gsplat import export_splats  # slow to import
    # Viewers take exp of the scales and the sigmoid of the opacities, so neither may be infinite here.
    harmonics = gaussians.harmonics.mT  # (N, K, 3)
    opacities = gaussians.opacities.clamp(1e-6, 1 - 1e-6).logit()
    scales = gaussians.scales.clamp_min(1e-9).log()
    with written_whole(path) as part:
        export_splats(gaussians.means, scales, gaussians.rotations, opacities,
                      harmonics[:, :1], harmonics[:, 1:], save_to=part)


def colour_depth(depth):
    """Depth (F, H, W) -> (F, 3, H, W): near light and warm, far dark, on inverse depth."""
    from matplotlib import colormaps  # slow to import
    inverse = 1 / depth.cpu().clamp_min(1e-6)
    some = inverse.flatten()[::7]  # quantile takes no more than 2^24 values
    # the colour map spans the values without the lowest and the highest 2 %
    low, high = some.quantile(.02), some.quantile(.98)
    place = (inverse - low) / (high - low).clamp_min(1e-9)  # outside [0, 1] the map holds its end colours
    colours = torch.from_numpy(colormaps["inferno"](place.numpy())).float()  # (F, H, W, 4): with opacity
    return colours[..., :3].permute(0, 3, 1, 2)


def write_pictures(out, rec, fps):
    """Into the folder `out`: depth.mp4, path.png; of Gaussians, gaussians.ply and input_and_rerender.mp4."""
    from matplotlib.figure import Figure  # slow to import
    out.mkdir(parents=True, exist_ok=True)
    write_video(out / "depth.mp4", colour_depth(rec.depth), fps)
    figure = Figure(figsize=(4, 4), layout="constrained")
    draw_paths(figure.subplots(), {"camera": rec.camera_to_world})
    with written_whole(out / "path.png") as part:
        figure.savefig(part)
    if rec.gaussians is not None:
        write_ply(out / "gaussians.ply", rec.gaussians)
        rgb, _, _ = render(rec.gaussians, rec.camera_to_world, rec.intrinsics, *rec.depth.shape[1:])
        write_video(out / "input_and_rerender.mp4", torch.cat([rec.images.cpu(), rgb.cpu()], 3), fps)
        # one value over all views, at the processed size: not the mean over frames that eval.py reports
        quality = psnr(rgb.clamp(0, 1), rec.images, per_frame=False)
        print(f"re-render of {len(rec.index)} views: {quality:.2f} dB PSNR")


@as_command("depth_anything.py")
def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("video", help="an mp4")
    parser.add_argument("--model", default=TINY / "depth_anything", help="folder or hub id (default: tiny)")
    parser.add_argument("--views", type=int, help="frames to reconstruct, evenly spread (default: all)")
    parser.add_argument("--out", type=Path, help="folder (default: beside the video, NAME_3d)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    check_device(options.device)
    video, fps = read_video(options.video)
    out = options.out or Path(options.video).with_name(Path(options.video).stem + "_3d")
    check_writable(out / "depth.mp4")
    rec = load_depth_anything(options.model, options.device)(video, options.views)
    write_pictures(out, rec, max(1.0, fps * len(rec.index) / len(video)))
    travel = (rec.camera_to_world[-1, :3, 3] - rec.camera_to_world[0, :3, 3]).norm() / rec.depth.median()
    written = ", ".join(sorted(file.name for file in out.iterdir()))
    print(f"camera travels {float(travel):.3f} median depths; wrote {written} to {out}")


if __name__ == "__main__":
    sys.exit(main())
