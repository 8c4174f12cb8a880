"""Wan2.1 text-to-video (arXiv 2503.20314): causal 3D VAE, diffusion transformer, their files.

    wan = load_wan("tiny/wan")                # or a hub id, or a folder in either published layout
    x0 = wan.vae.encode(video)                # (B, F, 3, H, W) in [0, 1] -> (B, 16, T, h, w), T = 1 + (F-1)/4
    text = wan.encode_text(prompts)           # (B, 512, D)
    v = wan.dit(x, 1000 * sigma, text)        # the velocity eps - x0 at x = (1-sigma) x0 + sigma eps

Module names are the Diffusers checkpoints' (its scale_shift_table is what the original calls modulation);
`original_dit_key` and `original_vae_key` give the original release's, so both layouts load. fast.py holds
faster forms of four operations; they change results by rounding only.

The text encoder stands in texts.py. Left out: image-to-video branches (img_emb, add_k_proj), Wan2.2's
residual VAE, tiling (decoding streams over time instead).
"""

import dataclasses
import functools
import math
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from fast import conv3d, padding_bias, rms_norm, upsampled_conv
from texts import WAN, WAN_FILES, describe_text, encode_text, load_text, tokenizer_folder
from weights import (Positive, Size, config_from, fill, fill_arguments, model_folder, on_meta, read_json,
                     renamed, weight_files, write_json, write_safetensors)

# ============================================================================================================
# Causal 3D VAE.  Stride 4x8x8 in (time, height, width), 16 channels.
#
# T = 1 + (F-1)/4: frame 0 makes a latent frame alone, then every 4 frames make one. So a still image is a
# clip of one frame, and the VAE learns from images and videos alike.
#
# Time is causal: a convolution sees the present and at most two past frames, zeros before the first, never
# the future. So a clip can be processed whole (memory None: to train a VAE, in tiny/) or piece by piece, in
# less space with the same result: `memory` is a dict {layer: the frames it puts before its next piece}.
# (An Upsample stores True once the clip's first frame, which it treats differently, has passed.)
#
# Activations are (B, C, T, H, W), kept channels-last, where the channel norm reduces along contiguous memory.
# ============================================================================================================

# Per-channel statistics of Wan2.1's latents (the released VAE's constants).
WAN_LATENTS_MEAN = (-.7571, -.7089, -.9113, .1075, -.1745, .9653, -.1517, 1.5508,
                    .4134, -.0715, .5517, -.3632, -.1922, -.9497, .2503, -.2921)
WAN_LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                   3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass
class VAEConfig:
    base_dim: Size = 96
    z_dim: Size = 16
    dim_mult: tuple[Size, Size, Size, Size] = (1, 2, 4, 4)
    num_res_blocks: Size = 2
    temperal_downsample: tuple[bool, bool, bool] = (False, True, True)  # the released spelling
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[Positive, ...] = WAN_LATENTS_STD


class CausalConv3d(nn.Conv3d):
    """Conv3d of stride 1 that pads time on the past side only: as many frames come out as go in."""

    def forward(self, x, memory=None):
        padding = (0, *self.padding[1:])  # none in time: the past is put there by hand
        past = self.kernel_size[0] - 1
        if past == 0:
            return conv3d(x, self.weight, self.bias, padding)
        if memory is None and x.shape[2] == 1:
            # A lone frame meets only zeros behind it, so only the last tap in time counts.
            return conv3d(x, self.weight[:, :, -1:], self.bias, padding)
        if memory is None or self not in memory:
            x = F.pad(x, (0, 0, 0, 0, past, 0))
        else:
            x = torch.cat([memory[self], x], 2)
        if memory is not None:
            memory[self] = x[:, :, -past:].clone()
        return conv3d(x, self.weight, self.bias, padding)


class RMSNorm(nn.Module):
    """Scales each pixel's channels to root mean square 1, then each channel by its gamma."""

    def __init__(self, dim, axes):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))  # of rank 1 + axes, as in the checkpoints

    def forward(self, x):
        return rms_norm(x, self.gamma.to(x.dtype).flatten())


class ResidualBlock(nn.Module):
    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.norm1 = RMSNorm(in_dim, 3)
        self.conv1 = CausalConv3d(in_dim, out_dim, 3, padding=1)
        self.norm2 = RMSNorm(out_dim, 3)
        self.conv2 = CausalConv3d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Identity()
        if in_dim != out_dim:
            self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1)

    def forward(self, x, memory=None):
        h = self.conv1(F.silu(self.norm1(x)), memory)
        h = self.conv2(F.silu(self.norm2(h)), memory)
        return h + self.conv_shortcut(x)


def frames_as_batch(x):
    return x.transpose(1, 2).flatten(0, 1)  # (B, C, T, H, W) -> (B*T, C, H, W)


def batch_as_frames(x, B):
    return x.unflatten(0, (B, -1)).transpose(1, 2)  # (B*T, C, H, W) -> (B, C, T, H, W)


class AttentionBlock(nn.Module):
    """Single-head self-attention within each frame: time stays causal, as frames do not see each other."""

    def __init__(self, dim):
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x, memory=None):
        qkv = self.to_qkv(self.norm(frames_as_batch(x)))  # (B*T, 3C, H, W)
        q, k, v = qkv.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)  # (B*T, 1, H*W, C)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.squeeze(1).transpose(1, 2).unflatten(2, x.shape[3:])  # (B*T, C, H, W)
        return x + batch_as_frames(self.proj(y), len(x))


class Downsample(nn.Module):
    """Space: halved. Time (if temporal): 1 + 2n frames -> 1 + n.

    The clip's first frame stays alone, y[0] = x[0]; then y[k] = time_conv(x[2k-2], x[2k-1], x[2k]).
    """

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x, memory=None):
        x = batch_as_frames(self.resample(frames_as_batch(x)), len(x))
        if self.time_conv is None:
            return x
        # A later piece holds an even number of frames: with the last one before it, that is 2n + 1.
        if memory is not None and self in memory:
            y = self.time_conv(torch.cat([memory[self], x], 2))
        elif x.shape[2] == 1:
            y = x
        else:
            y = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        if memory is not None:
            memory[self] = x[:, :, -1:].clone()
        return y


class Upsample(nn.Module):
    """Time (if temporal): 1 + n frames -> 1 + 2n. Space: doubled, and the channels halved."""

    def __init__(self, dim, temporal):
        super().__init__()
        # The identity keeps the checkpoints' names: upsampled_conv enlarges the picture itself.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1), padding=(1, 0, 0)) if temporal else None

    def forward(self, x, memory=None):
        if self.time_conv is not None:
            x = self.double_frames(x, memory)
        return batch_as_frames(upsampled_conv(frames_as_batch(x), self.resample[1]), len(x))

    def double_frames(self, x, memory):
        first_piece = memory is None or self not in memory
        if memory is not None:
            memory[self] = True  # later pieces do not start the clip
        if not first_piece:
            return self.as_pairs(self.time_conv(x, memory))
        # The clip's first frame stays one frame, and time_conv never sees it: before frame 1 it sees zeros.
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2] == 0:
            return x
        return torch.cat([first, self.as_pairs(self.time_conv(rest, memory))], 2)

    def as_pairs(self, x):
        """Channels to time: (B, 2C, T, H, W) -> (B, C, 2T, H, W)."""
        # The first half of the channels is the earlier frame of each pair.
        x = x.unflatten(1, (2, -1))  # (B, 2, C, T, H, W)
        return x.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


def through(layers, x, memory):
    """x through the layers in turn: nn.Sequential could not hand on the memory, which each of them takes,
    used or not."""
    for layer in layers:
        x = layer(x, memory)
    return x


class MidBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([AttentionBlock(dim)])

    def forward(self, x, memory=None):
        before, after = self.resnets
        return through((before, *self.attentions, after), x, memory)


class Encoder(nn.Module):
    """(B, 3, F, H, W) -> (B, 2 z_dim, T, H/8, W/8): three Downsamples, two of them in time as well."""

    def __init__(self, config):
        super().__init__()
        dim = config.base_dim
        self.conv_in = CausalConv3d(3, dim, 3, padding=1)
        # One flat list, as in the checkpoints.
        self.down_blocks = nn.ModuleList()
        for level, multiple in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(dim, config.base_dim * multiple))
                dim = config.base_dim * multiple
            if level < len(config.temperal_downsample):
                self.down_blocks.append(Downsample(dim, config.temperal_downsample[level]))
        self.mid_block = MidBlock(dim)
        self.norm_out = RMSNorm(dim, 3)
        self.conv_out = CausalConv3d(dim, 2 * config.z_dim, 3, padding=1)

    def forward(self, x, memory=None):
        x = through((self.conv_in, *self.down_blocks, self.mid_block), x, memory)
        return self.conv_out(F.silu(self.norm_out(x)), memory)


class UpBlock(nn.Module):
    """One level of the decoder: residual blocks, then an Upsample except at the last level."""

    def __init__(self, in_dim, out_dim, blocks, upsample, temporal):
        super().__init__()
        dims = [in_dim] + blocks * [out_dim]
        self.resnets = nn.ModuleList([ResidualBlock(*pair) for pair in zip(dims, dims[1:])])
        self.upsamplers = nn.ModuleList([Upsample(out_dim, temporal)] if upsample else [])

    def forward(self, x, memory=None):
        return through((*self.resnets, *self.upsamplers), x, memory)


class Decoder(nn.Module):
    """(B, z_dim, T, h, w) -> (B, 3, F, 8h, 8w): the encoder's levels backwards, the first two in time too."""

    def __init__(self, config):
        super().__init__()
        dims = [config.base_dim * m for m in config.dim_mult[::-1]]
        temporal = (*config.temperal_downsample[::-1], False)
        last = len(dims) - 1
        self.conv_in = CausalConv3d(config.z_dim, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        in_dim = dims[0]
        for level, dim in enumerate(dims):
            # A residual block more than the encoder has.
            block = UpBlock(in_dim, dim, config.num_res_blocks + 1, level < last, temporal[level])
            self.up_blocks.append(block)
            in_dim = dim // 2  # the Upsample halved the channels
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], 3, 3, padding=1)

    def forward(self, x, memory=None):
        x = through((self.conv_in, self.mid_block, *self.up_blocks), x, memory)
        return self.conv_out(F.silu(self.norm_out(x)), memory)


class VAE(nn.Module):
    """Video <-> normalised latents. Runs in its parameters' dtype and returns float32."""

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def encode(self, video):
        """(B, F, 3, H, W) in [0, 1] -> normalised latents (B, C, T, h, w), float32.

        F = 4k+1, H and W multiples of 8, else ValueError. Nothing is drawn: the latents are the posterior's
        mean mu, (mu - latents_mean) / latents_std per channel, as everywhere in Wan.
        """
        B, frames, _, H, W = video.shape
        if frames % 4 != 1 or H % 8 or W % 8:
            raise ValueError("a video needs 4k+1 frames and sides that are multiples of 8, "
                             f"got {frames} frames of {H}x{W}")
        memory = {}
        parts = []
        for start, stop in self.pieces(1 + (frames - 1) // 4, B * H * W):
            mu, _ = self.moments(video[:, frames_of(start, stop)], memory)
            parts.append(self.normalise(mu))
        return torch.cat(parts, 2)

    def decode(self, latents):
        """Normalised latents (B, C, T, h, w) -> video (B, F, 3, 8h, 8w) in [0, 1], float32, F = 4T-3."""
        B, _, T, h, w = latents.shape
        video = torch.empty(B, 4 * T - 3, 3, 8 * h, 8 * w, device=latents.device)
        raw = self.denormalise(latents)
        memory = {}
        for start, stop in self.pieces(T, B * 64 * h * w):
            video[:, frames_of(start, stop)] = self.decode_raw(raw[:, :, start:stop], memory).clamp_(0, 1)
        return video

    def moments(self, video, memory=None):
        """(B, F, 3, H, W) in [0, 1] -> mean, log-variance of the raw latents, each (B, C, T, h, w)."""
        x = video.transpose(1, 2).to(self.quant_conv.weight.dtype) * 2 - 1  # (B, 3, F, H, W) in [-1, 1]
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return self.quant_conv(self.encoder(x, memory)).chunk(2, 1)

    def decode_raw(self, z, memory=None):
        """Raw latents (B, C, T, h, w) -> (B, F, 3, H, W) in about [0, 1], not clamped."""
        x = z.to(self.quant_conv.weight.dtype).contiguous(memory_format=torch.channels_last_3d)
        return self.decoder(self.post_quant_conv(x), memory).transpose(1, 2) / 2 + .5

    def normalise(self, raw):
        """Raw latents -> about N(0, 1) per channel, the scale that diffusion's noise has; float32."""
        mean, std = self.statistics(raw.device)
        return (raw.float() - mean) / std

    def denormalise(self, latents):
        mean, std = self.statistics(latents.device)
        return latents * std + mean

    def statistics(self, device):
        """Mean and standard deviation of each channel, as one tensor (2, 1, C, 1, 1, 1)."""
        pair = [self.config.latents_mean, self.config.latents_std]
        return torch.tensor(pair, device=device).view(2, 1, -1, 1, 1, 1)

    def pieces(self, T, pixels):
        """-> [(start, stop)] of the pieces, in latent frames. pixels: of one video frame, over the batch."""
        # To bound memory: up to 4 latent frames, but one where the batch's frame has over 2^15 pixels.
        size = min(max(2 ** 16 // pixels, 1), 4)
        return [(start, min(start + size, T)) for start in range(0, T, size)]


def frames_of(start, stop):
    """The frames that the latent frames start .. stop-1 stand for: frame 0 alone, then four each."""
    return slice(max(4 * start - 3, 0), 4 * stop - 3)


# ============================================================================================================
# DiT.  (B, 16, T, h, w) noisy latents -> 1x2x2 patches -> blocks of [self-attention, cross-attention to the
# text, feed-forward], self-attention and feed-forward modulated by the time step -> velocity.
#
# The residual stream, layer norms, modulation, time embedding and RoPE are computed in float32 whatever the
# weights' dtype, as in the original: 30 or 40 blocks each add a little to the stream, and bfloat16's 8 bits
# would round that little away. The weights are all rounded to the dtype asked for; Diffusers keeps
# those of the time embedder, the tables and the norms in float32.
# ============================================================================================================

@dataclass
class DiTConfig:
    num_attention_heads: Size = 12
    attention_head_dim: Size = 128
    ffn_dim: Size = 8960
    num_layers: Size = 30
    in_channels: Size = 16
    out_channels: Size = 16
    text_dim: Size = 4096
    freq_dim: Size = 256
    patch_size: tuple[Size, Size, Size] = (1, 2, 2)
    eps: Positive = 1e-6


DIT_SIZES = {"1.3B": DiTConfig(),
             "14B": DiTConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40)}


def rope(grid, head_dim, device):
    """Rotary positions of a (T, h, w) token grid -> (cos, sin), each (L, 1, head_dim/2).

    A token has three positions, so a head's channels are split in three parts, for t, y and x, and pair i of
    a part is rotated by position * 10000^(-2i/part). The two space parts are equal and even; time takes the
    rest: 44 + 42 + 42 of Wan's 128.
    """
    space = 2 * (head_dim // 6)
    angles = []
    for axis, part in enumerate((head_dim - 2 * space, space, space)):
        frequency = 1e4 ** (-torch.arange(0, part, 2, dtype=torch.float64, device=device) / part)
        position = torch.arange(grid[axis], dtype=torch.float64, device=device)
        shape = [1, 1, 1, -1]
        shape[axis] = grid[axis]
        angle = torch.outer(position, frequency).view(shape)
        angles.append(angle.expand(*grid, -1))  # (T, h, w, part/2)
    angle = torch.cat(angles, -1).reshape(-1, 1, head_dim // 2)
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """Rotates neighbouring channel pairs of x (B, L, heads, head_dim) in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


def time_frequencies(t, dim):
    """Sinusoidal embedding of t (B,) -> (B, dim): cosines, then sines; angles in float64."""
    frequency = 1e4 ** (-torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = torch.outer(t.double(), frequency)
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def linear_float32(layer, x):
    with torch.autocast(x.device.type, enabled=False):  # tiny/train.py autocasts to bfloat16
        return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def modulate(x, shift, scale):
    """x (1 + scale) + shift: x (B, L, D), shift and scale (B, 1, D), float32."""
    # addcmul, here and in add_gated: one pass over memory. A product, then a sum could round differently.
    return torch.addcmul(shift, x, 1 + scale)


def add_gated(x, y, gate):
    """x + gate y: the residual stream x (B, L, D) float32, a layer's output y (B, L, D), gate (B, 1, D)."""
    return torch.addcmul(x, y.float(), gate)


plain_norm = functools.partial(nn.LayerNorm, elementwise_affine=False)  # modulation scales and shifts instead


class LayerNorm(nn.LayerNorm):
    """Layer norm with its weights taken to float32, the residual stream's dtype."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class QKNorm(nn.RMSNorm):
    """RMS norm of queries or keys in their own dtype, also where autocast leaves the weight in float32."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention of x to itself or to a context; q and k are normalised over all heads at once."""

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.norm_q = QKNorm(dim, eps)
        self.norm_k = QKNorm(dim, eps)

    def forward(self, x, context=None, rotation=None, bias=None):
        """x (B, L, D), context (B, L', D), rotation of `rope`, bias (B, 1, L, L') -> (B, L, D)."""
        if context is None:
            context = x
        q = self.split_heads(self.norm_q(self.to_q(x)))
        k = self.split_heads(self.norm_k(self.to_k(context)))
        v = self.split_heads(self.to_v(context))
        if rotation is not None:
            q = rotate(q, *rotation)
            k = rotate(k, *rotation)
        q, k, v = [y.transpose(1, 2) for y in (q, k, v)]  # (B, heads, L, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.to_out(y.transpose(1, 2).flatten(2))

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1))  # (B, L, heads, head_dim)


def feed_forward(dim, hidden):
    # The nesting and the identity (a dropout's place) keep the checkpoints' names.
    first = nn.Sequential(OrderedDict(proj=nn.Linear(dim, hidden), gelu=nn.GELU("tanh")))
    return nn.Sequential(OrderedDict(net=nn.Sequential(first, nn.Identity(), nn.Linear(hidden, dim))))


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward. What goes into the first and the last is shifted
    and scaled by the time step, and what comes out is gated (adaLN, arXiv 2212.09748): by the modulation that
    all blocks share, plus a table of the block's own."""

    def __init__(self, dim, ffn_dim, heads, eps):
        super().__init__()
        self.norm1 = plain_norm(dim, eps)
        self.attn1 = Attention(dim, heads, eps)
        self.norm2 = LayerNorm(dim, eps)
        self.attn2 = Attention(dim, heads, eps)
        self.norm3 = plain_norm(dim, eps)
        self.ffn = feed_forward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim ** .5)

    def forward(self, x, text, modulation, rotation, bias):
        """x (B, L, D) float32 -> the same. text (B, L', D), modulation (B, 6, D), rotation: `rope` of x's
        tokens, bias: `padding_bias` of text."""
        table = self.scale_shift_table.float() + modulation
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = table.chunk(6, 1)  # (B, 1, D)
        dtype = self.ffn.net[2].weight.dtype  # the layers compute in their weights' dtype
        # attention to the whole video
        h = modulate(self.norm1(x), shift_attn, scale_attn).to(dtype)
        x = add_gated(x, self.attn1(h, rotation=rotation), gate_attn)
        # attention to the text: neither modulated by the time step nor gated
        h = self.norm2(x).to(dtype)
        x = x + self.attn2(h, text, bias=bias)
        # each token by itself
        h = modulate(self.norm3(x), shift_ffn, scale_ffn).to(dtype)
        return add_gated(x, self.ffn(h), gate_ffn)


def two_linear(dim, out, activation):
    layers = OrderedDict(linear_1=nn.Linear(dim, out), activation=activation, linear_2=nn.Linear(out, out))
    return nn.Sequential(layers)


class Conditions(nn.Module):
    """Embeds the time step and the text."""

    def __init__(self, dim, freq_dim, text_dim):
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = two_linear(freq_dim, dim, nn.SiLU())
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = two_linear(text_dim, dim, nn.GELU("tanh"))

    def forward(self, t, text):
        """t (B,), text (B, L', text_dim) -> time (B, D), the blocks' modulation (B, 6, D), text (B, L', D).
        """
        time = linear_float32(self.time_embedder.linear_1, time_frequencies(t, self.freq_dim))
        time = linear_float32(self.time_embedder.linear_2, F.silu(time))
        modulation = linear_float32(self.time_proj, F.silu(time)).unflatten(1, (6, -1))
        text = text.to(self.text_embedder.linear_1.weight.dtype)
        return time, modulation, self.text_embedder(text)


class DiT(nn.Module):
    """dit(x, t, text) -> v: the velocity eps - x0, float32.

    x (B, C, T, h, w) with h, w even; t (B,) = 1000 sigma; text (B, L', text_dim), padding zeroed.
    Set .checkpointing = True to recompute blocks in the backward pass instead of storing them.
    """

    def __init__(self, config=DIT_SIZES["1.3B"]):
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        dim = heads * config.attention_head_dim
        patch = math.prod(config.patch_size)
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.condition_embedder = Conditions(dim, config.freq_dim, config.text_dim)
        self.blocks = nn.ModuleList(
            [Block(dim, config.ffn_dim, heads, config.eps) for _ in range(config.num_layers)])
        self.norm_out = plain_norm(dim, config.eps)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim ** .5)
        self.proj_out = nn.Linear(dim, config.out_channels * patch)
        self.checkpointing = False
        # The adapter file, if any, of which `merge_lora` added more than LoRA pairs: `add_lora` then refuses.
        self.merged_differences = None
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.proj_out.weight)  # before training the velocity is zero everywhere

    def forward(self, x, t, text, text_padding=0):
        """text_padding: the number of zero tokens that text's last token stands for (from `fast.trim_text`);
        0: text was not trimmed."""
        # Tokens, the conditions, and where each token stands.
        x, grid = self.patchify(x)  # (B, L, D) float32
        time, modulation, text = self.condition_embedder(t, text)  # (B, D), (B, 6, D), (B, L', D)
        bias = padding_bias(text, text_padding, x.shape[1])
        rotation = rope(grid, self.config.attention_head_dim, x.device)

        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(
                    block, x, text, modulation, rotation, bias, use_reentrant=False)
            else:
                x = block(x, text, modulation, rotation, bias)

        # The last norm is modulated by the time embedding itself, not by its projection.
        shift, scale = (self.scale_shift_table.float() + time.unsqueeze(1)).chunk(2, 1)
        x = modulate(self.norm_out(x), shift, scale)
        return self.unpatchify(self.proj_out(x.to(self.proj_out.weight.dtype)).float(), grid)

    def patchify(self, x):
        """Latents (B, C, T, h, w) -> tokens (B, L, D) of the residual stream, and their grid (T', h', w')."""
        B, C, T, h, w = x.shape
        p, q, r = self.config.patch_size
        if T % p or h % q or w % r:
            raise ValueError(f"latents of {T}x{h}x{w} do not divide into patches of {p}x{q}x{r}")
        x = x.view(B, C, T // p, p, h // q, q, w // r, r)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, T', h', w', C, p, q, r)
        grid = x.shape[1:4]
        x = x.flatten(4).flatten(1, 3)  # (B, L, C*patch)
        # A convolution whose stride is its size is a linear layer of each patch.
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(x.to(weight.dtype), weight, self.patch_embedding.bias).float(), grid

    def unpatchify(self, x, grid):
        """Tokens (B, L, patch*C) -> (B, C, T, h, w). The channel comes last within a patch, unlike in
        `patchify`: the checkpoints' weights are so."""
        # (B, T', h', w', p, q, r, C) -> (B, C, T', p, h', q, w', r) -> (B, C, T, h, w)
        x = x.view(-1, *grid, *self.config.patch_size, self.config.out_channels)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


# ============================================================================================================
# Checkpoints.  Two published layouts of the same weights:
#   Diffusers  transformer/ vae/ text_encoder/, each with config.json and safetensors (one file, or shards);
#              tokenizer/; scheduler/ (only its shift is used, and it may be absent)
#   original   config.json + diffusion_pytorch_model*.safetensors (DiT), Wan2.1_VAE.pth,
#              models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/ (tokenizer)
# A loader describes the model (on the meta device, without memory), matches every tensor by the files'
# headers, and only then fills it, tensor by tensor, each read into its device and dtype.
# ============================================================================================================

ORIGINAL_VAE = "Wan2.1_VAE.pth"
# {pattern in our name (= Diffusers'): what the original release has in its place}, applied in order.
ORIGINAL_DIT_NAMES = {
    r"^condition_embedder\.(time|text)_embedder\.linear_1": r"\1_embedding.0",
    r"^condition_embedder\.(time|text)_embedder\.linear_2": r"\1_embedding.2",
    r"^condition_embedder\.time_proj": "time_projection.1",
    r"^proj_out": "head.head",
    r"^scale_shift_table": "head.modulation",
    r"scale_shift_table": "modulation",
    r"norm2": "norm3",
    r"ffn\.net\.0\.proj": "ffn.0",
    r"ffn\.net\.2": "ffn.2",
    r"attn1": "self_attn",
    r"attn2": "cross_attn",
    r"to_out\.0": "o",
    r"to_([qkv])": r"\1",
}
ORIGINAL_VAE_NAMES = {
    r"^quant_conv": "conv1",
    r"^post_quant_conv": "conv2",
    r"conv_in": "conv1",
    r"conv_out": "head.2",
    r"norm_out": "head.0",
    r"mid_block\.resnets\.0": "middle.0",
    r"mid_block\.attentions\.0": "middle.1",
    r"mid_block\.resnets\.1": "middle.2",
    r"down_blocks": "downsamples",
    r"conv_shortcut": "shortcut",
    r"(\.\d+)\.norm1\.": r"\1.residual.0.",
    r"(samples\.\d+|middle\.\d+)\.conv1\.": r"\1.residual.2.",
    r"(\.\d+)\.norm2\.": r"\1.residual.3.",
    r"(samples\.\d+|middle\.\d+)\.conv2\.": r"\1.residual.6.",
}


def original_vae_key(key):
    """A VAE parameter's name in the original release, where the decoder's levels are one flat list."""
    def index(match):
        level, place = match.groups()
        return f"upsamples.{4 * int(level) + int(place)}"

    key = key.replace("upsamplers.0", "resnets.3")  # it stands after a level's three residual blocks
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", index, key)
    return renamed(ORIGINAL_VAE_NAMES, key)


# A DiT parameter's name in the original release, from ours.
original_dit_key = functools.partial(renamed, ORIGINAL_DIT_NAMES)


def _inside(folder, name):
    """The folder's subfolder of that name; the folder itself where there is none."""
    if (folder / name).is_dir():
        return folder / name
    return folder


@dataclass
class OriginalDiT:
    """What config.json of the original release names in its own way."""
    dim: Size
    num_heads: Size
    in_dim: Size
    out_dim: Size


def released_config(model):
    """-> the DiTConfig of a released Wan, by its folder's config or else by its name; None of any other."""
    for file in (Path(model) / "transformer" / "config.json", Path(model) / "config.json"):
        if file.exists():
            values = read_json(file)
            found = values.get("num_layers"), values.get("ffn_dim")  # as both layouts name them
            return next((config for config in DIT_SIZES.values()
                         if (config.num_layers, config.ffn_dim) == found), None)
    return next((config for size, config in DIT_SIZES.items() if size in Path(model).name.upper()), None)


def _describe_dit(folder):
    """-> (meta DiT, weight files, rename) for a model folder of either layout, or a transformer folder.

    rename: our name of a tensor -> the files'."""
    if (folder / "transformer_2").exists():
        raise ValueError(f"{folder} holds two transformers, as Wan2.2 does; give a Wan2.1 model's folder")
    folder = _inside(folder, "transformer")
    file = folder / "config.json"
    values = read_json(file)
    rename = str  # the identity: Diffusers' names are ours
    if "dim" in values and "num_heads" in values:  # the original's config
        rename = original_dit_key
        own = config_from(OriginalDiT, values, file)
        values = {**values,
                  "num_attention_heads": own.num_heads,
                  "attention_head_dim": own.dim // own.num_heads,
                  "in_channels": own.in_dim,
                  "out_channels": own.out_dim}
    if "num_attention_heads" not in values:
        raise ValueError(f"{file} does not describe a Wan2.1 transformer; give the folder of a Wan2.1 model")
    if values.get("image_dim") or values.get("model_type") not in (None, "t2v"):
        raise ValueError(f"{file} describes a Wan that takes pictures; give a text-to-video model (T2V)")
    config = config_from(DiTConfig, values, file)
    if config.attention_head_dim % 2 or config.freq_dim % 2:
        raise ValueError(f"{file}: attention_head_dim and freq_dim must be even; download it again")
    files = weight_files(folder, "diffusion_pytorch_model")
    return on_meta(functools.partial(DiT, config), files, file), files, rename


def _describe_vae(folder):
    """-> (meta VAE, weight files, rename) for a model folder of either layout, a vae folder, a .pth file."""
    original = folder if folder.suffix == ".pth" else folder / ORIGINAL_VAE
    if original.exists():
        file, config, files, rename = original, VAEConfig(), [original], original_vae_key
    else:
        folder = _inside(folder, "vae")
        file, rename = folder / "config.json", str
        config = config_from(VAEConfig, read_json(file), file)
        files = weight_files(folder, "diffusion_pytorch_model")
    # Everything after it counts on a stride of 4x8x8, and on statistics of each channel.
    channels = {len(config.latents_mean), len(config.latents_std)}
    if sum(config.temperal_downsample) != 2 or channels != {config.z_dim}:
        raise ValueError(f"{file}: a Wan2.1 VAE halves time twice, and has a latents_mean and a latents_std "
                         "for each of its z_dim channels; download it again")
    return on_meta(functools.partial(VAE, config), files, file), files, rename


def load_dit(path, device="cpu", dtype=torch.float32):
    """DiT from a model folder (either layout), its transformer folder, or a hub id."""
    folder = model_folder(path, ["*config.json", "*diffusion_pytorch_model*"], WAN)
    dit, files, rename = _describe_dit(folder)
    return fill(*fill_arguments(dit, files, rename, device, dtype))


def load_vae(path, device="cpu", dtype=torch.float32):
    """VAE from a model folder (either layout), its vae folder, a .pth file, or a hub id."""
    folder = model_folder(path, ["*config.json", "vae/*", ORIGINAL_VAE], WAN)
    vae, files, rename = _describe_vae(folder)
    return fill(*fill_arguments(vae, files, rename, device, dtype))


@dataclass
class Wan:
    """A text-to-video model."""
    dit: DiT
    vae: VAE
    text_encoder: nn.Module | None = None  # transformers' UMT5EncoderModel
    tokenizer: object = None
    shift: float | None = None  # of its scheduler
    text_cache: Callable | None = None  # prompt -> its embedding (1, 512, D), instead of the encoder

    @property
    def device(self):
        return self.dit.proj_out.weight.device

    def encode_text(self, prompts):
        """Prompts (a list of B strings) -> embeddings (B, 512, D), padding zeroed."""
        if self.text_cache is None:
            text = encode_text(self.text_encoder, self.tokenizer, prompts)
        else:
            text = torch.cat([self.text_cache(prompt) for prompt in prompts])
        return text.to(self.device)


@dataclass
class Scheduler:
    """scheduler_config.json: the noise schedule's shift, which Diffusers' UniPC calls flow_shift and its
    flow-matching Euler shift, and what the transformer predicts."""
    flow_shift: Positive | None = None
    shift: Positive | None = None
    prediction_type: Literal["flow_prediction"] | None = None


def load_wan(path, device="cpu", dtype=torch.float32, text=True):
    """Wan2.1 from a folder in either published layout, or a hub id. text=False: without the text encoder,
    whose files must be there and whole all the same, though its tensors are not matched to its config.

    dtype is the DiT's and text encoder's; the VAE is float32 always, its official precision. Raises
    ValueError with one sentence when a file is missing, cut short, mislabelled or not what the config
    describes; every part is checked before any is loaded.
    """
    folder = model_folder(path, WAN_FILES, WAN)
    if not folder.is_dir():
        raise ValueError(f"'{path}' is not a folder; give the folder that holds the checkpoint")
    if not (folder / "transformer").is_dir() and not (folder / ORIGINAL_VAE).exists():
        raise ValueError(f"'{path}' holds neither transformer/ (Diffusers layout) "
                         f"nor {ORIGINAL_VAE} (original layout); give {WAN}")

    # Check by headers alone. (The text encoder's tensors are matched in load_text, also before any is read.)
    dit_arguments = fill_arguments(*_describe_dit(folder), device, dtype)
    vae_arguments = fill_arguments(*_describe_vae(folder), device, torch.float32)
    text_config, *_ = describe_text(folder)
    tokenizer_folder(folder)  # raises where it is missing
    dit, vae = dit_arguments[0], vae_arguments[0]  # on the meta device until they are filled
    for entry, takes, given in (("in_channels", dit.config.in_channels, vae.config.z_dim),
                                ("text_dim", dit.config.text_dim, text_config.get("d_model"))):
        if takes != given:
            raise ValueError(f"{folder}: the transformer's {entry} is {takes}, its VAE or text encoder gives "
                             f"{given}; they are not of one checkpoint: download it again")
    scheduler = Scheduler()
    if (folder / "scheduler" / "scheduler_config.json").exists():
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json", Scheduler)

    # Read the weights.
    encoder, tokenizer = load_text(folder, device, dtype) if text else (None, None)
    dit, vae = fill(*dit_arguments), fill(*vae_arguments)
    return Wan(dit, vae, encoder, tokenizer, scheduler.flow_shift or scheduler.shift)


def write_dit(folder, config, tensors):
    """Writes a transformer folder as Diffusers has it. tensors: {a DiT parameter's name: tensor}."""
    fixed = dict(cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=1024)
    write_json(folder / "config.json",
               {"_class_name": "WanTransformer3DModel", **dataclasses.asdict(config), **fixed})
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)


def write_wan_beside(path, folder, config, tensors):
    """Writes a model folder that `load_wan` and, where the one at `path` is in its layout, Diffusers read: a
    transformer (`write_dit`), and links to all other parts of the model at `path`."""
    write_dit(folder / "transformer", config, tensors)
    for part in path.glob("[!.]*"):
        # the other model's transformer, in either layout
        replaced = part.name in ("transformer", "config.json") or part.match("diffusion_pytorch_model*")
        if not replaced and not (folder / part.name).exists():
            (folder / part.name).unlink(missing_ok=True)  # a link that leads nowhere: the base has moved
            (folder / part.name).symlink_to(part.resolve())
