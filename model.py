"""Wan2.1 text-to-video (arXiv 2503.20314) in one file: causal 3D VAE, diffusion transformer, UMT5 text encoder.

    wan = load_wan("tiny/wan")                         # or a hub id, or a folder in either published layout
    x0  = wan.vae.encode(video)                        # (B,F,3,H,W) in [0,1] -> (B,16,T,h,w), T = 1+(F-1)/4
    v   = wan.dit(x, 1000 * sigma, wan.encode_text(prompts))   # the velocity eps - x0 at x = (1-sigma) x0 + sigma eps

Module names follow the Diffusers checkpoints; `original_key` maps them to the names of the original release, so
both layouts load. What is Wan's keeps Wan's names (patch_embedding, scale_shift_table = modulation).

Left out: image-to-video branches (img_emb, add_k_proj), Wan2.2's residual VAE, tiling (decoding streams over time
instead). The text encoder is transformers' UMT5EncoderModel: it is frozen here and well kept there.
"""

import dataclasses
import functools
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from safetensors import safe_open

# =================================================================================================================
# Causal 3D VAE.  Stride 4x8x8, 16 channels.  Frame 0 stands alone, then every 4 frames make one latent frame.
# Time is causal: a convolution sees the present and two past frames (zeros before the first). So a clip can be
# processed whole (training) or in pieces with each layer remembering its last two inputs (bounded memory): the two
# are equal. Activations are kept channels-last, where the channel norm reduces along contiguous memory.
# =================================================================================================================

# Per-channel statistics of Wan2.1's latents (the released VAE's constants).
WAN_LATENTS_MEAN = (-.7571, -.7089, -.9113, .1075, -.1745, .9653, -.1517, 1.5508,
                    .4134, -.0715, .5517, -.3632, -.1922, -.9497, .2503, -.2921)
WAN_LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                   3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass
class VAEConfig:
    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple = (False, True, True)  # the released spelling
    latents_mean: tuple = WAN_LATENTS_MEAN
    latents_std: tuple = WAN_LATENTS_STD


def conv3d(x, weight, bias, padding):
    """F.conv3d, but a lone small clip on the CPU takes oneDNN too: PyTorch's choice looks at B*C*T*H alone and would run
    it through an unfolding fallback, several times slower."""
    if x.shape[0] == 1 and x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, padding, (1, 1, 1), (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, padding=padding)


class CausalConv3d(nn.Conv3d):
    """Conv3d that pads time on the past side only. memory: dict that carries each layer's last inputs between pieces."""

    def forward(self, x, memory=None):
        k = self.kernel_size[0]
        if k > 1:
            past = memory.get(self) if memory is not None else None
            if past is None and x.shape[2] == 1 and memory is None:  # a lone frame sees only zeros behind it
                return conv3d(x, self.weight[:, :, -1:], self.bias, (0, *self.padding[1:]))
            x = F.pad(x, (0, 0, 0, 0, k - 1, 0)) if past is None else torch.cat([past, x], 2)
            if memory is not None:
                memory[self] = x[:, :, 1 - k:].clone()
        return conv3d(x, self.weight, self.bias, (0, *self.padding[1:]))


class _RMSNorm(torch.autograd.Function):
    """y = gamma sqrt(C) x / |x|_2 over channels (dim 1), with a backward of few passes over memory.

    With x^ = y / gamma and p = grad x^:  d gamma = sum p,  dx = r (gamma grad - x^ (p . gamma) / C).
    """

    @staticmethod
    def forward(ctx, x, gamma):  # (B, C, ...), (C,)
        C = x.shape[1]
        flat = x.movedim(1, -1).reshape(-1, C)  # a view when channels are last in memory
        r = C ** .5 / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp_min_(1e-12)
        ctx.save_for_backward(flat, gamma, r)
        return (flat * r).mul_(gamma).view(x.movedim(1, -1).shape).movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        flat, gamma, r = ctx.saved_tensors
        C = len(gamma)
        g = grad.movedim(1, -1).reshape(-1, C)
        x_hat = flat * r
        p = g * x_hat
        grad_gamma, along = p.sum(0), p @ (gamma / C).unsqueeze(1)
        dx = torch.mul(g, gamma, out=p).addcmul_(x_hat, along, value=-1).mul_(r)
        return dx.view(grad.movedim(1, -1).shape).movedim(-1, 1), grad_gamma


class RMSNorm(nn.Module):
    def __init__(self, dim, spatial):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial))

    def forward(self, x):
        return _RMSNorm.apply(x, self.gamma.to(x.dtype).flatten())


class ResidualBlock(nn.Module):
    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.norm1 = RMSNorm(in_dim, 3)
        self.conv1 = CausalConv3d(in_dim, out_dim, 3, padding=1)
        self.norm2 = RMSNorm(out_dim, 3)
        self.conv2 = CausalConv3d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x, memory=None):
        h = self.conv1(F.silu(self.norm1(x)), memory)
        h = self.conv2(F.silu(self.norm2(h)), memory)
        return h + self.conv_shortcut(x)


def frames_as_batch(x):
    return x.transpose(1, 2).flatten(0, 1)  # (B, C, T, H, W) -> (B*T, C, H, W)


def batch_as_frames(x, B):
    return x.unflatten(0, (B, -1)).transpose(1, 2)  # (B*T, C, H, W) -> (B, C, T, H, W)


class AttentionBlock(nn.Module):
    """Single-head self-attention within each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        B, C, T, H, W = x.shape
        qkv = self.to_qkv(self.norm(frames_as_batch(x)))
        q, k, v = qkv.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)  # (B*T, 1, H*W, C)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.squeeze(1).transpose(1, 2).unflatten(2, (H, W))
        return x + batch_as_frames(self.proj(y), B)


class Downsample(nn.Module):
    """Halves the frame, then (temporal) pairs of frames: out[0] = x[0], out[k] = time_conv(x[2k-2 .. 2k])."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x, memory=None):
        x = batch_as_frames(self.resample(frames_as_batch(x)), x.shape[0])
        if self.time_conv is None:
            return x
        last = memory.get(self) if memory is not None else None
        if memory is not None:
            memory[self] = x[:, :, -1:].clone()
        if last is not None:
            return self.time_conv(torch.cat([last, x], 2))
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], self.time_conv(x)], 2)


def upsampled_conv(x, conv):
    """conv3x3(2x nearest upsampling of x (B, C, H, W)) without making the large picture: each of the four output phases
    sees only 2x2 different pixels, so it is a 2x2 convolution with merged taps, 4/9 of the work."""
    B, _, H, W = x.shape

    def merged(weight, dim):  # the three taps along dim, as the even and the odd output pixel meet them
        a, b, c = weight.unbind(dim)
        return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)

    x = F.pad(x, (1, 1, 1, 1))
    phases = [F.conv2d(x, w, conv.bias)[:, :, i:i + H, j:j + W]
              for i, rows in enumerate(merged(conv.weight, 2)) for j, w in enumerate(merged(rows, 3))]
    y = torch.stack([p.permute(0, 2, 3, 1) for p in phases], 3).unflatten(3, (2, 2))  # (B, H, W, 2, 2, C)
    return y.transpose(2, 3).reshape(B, 2 * H, 2 * W, -1).permute(0, 3, 1, 2)


class Upsample(nn.Module):
    """(temporal) Doubles every frame but the clip's first, then doubles the frame's size and halves the channels."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1), padding=(1, 0, 0)) if temporal else None

    def forward(self, x, memory=None):
        if self.time_conv is not None:
            head = None
            if memory is None or self not in memory:  # the clip's first latent frame is one frame, unseen by time_conv
                head, x = x[:, :, :1], x[:, :, 1:]
            if x.shape[2]:
                B, C, T, H, W = x.shape
                x = self.time_conv(x, memory).view(B, 2, C, T, H, W)
                x = x.permute(0, 2, 3, 1, 4, 5).reshape(B, C, 2 * T, H, W)
            if head is not None:
                x = torch.cat([head, x], 2)
            if memory is not None:
                memory[self] = True
        return batch_as_frames(upsampled_conv(frames_as_batch(x), self.resample[1]), x.shape[0])


class MidBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([AttentionBlock(dim)])

    def forward(self, x, memory=None):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, memory)), memory)


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        dims = [c.base_dim * m for m in (1, *c.dim_mult)]
        self.conv_in = CausalConv3d(3, dims[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (in_dim, out_dim) in enumerate(zip(dims, dims[1:])):
            for j in range(c.num_res_blocks):
                self.down_blocks.append(ResidualBlock(out_dim if j else in_dim, out_dim))
            if i < len(c.dim_mult) - 1:
                self.down_blocks.append(Downsample(out_dim, c.temperal_downsample[i]))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], 2 * c.z_dim, 3, padding=1)

    def forward(self, x, memory=None):
        x = self.conv_in(x, memory)
        for block in self.down_blocks:
            x = block(x, memory)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x, memory))), memory)


class UpBlock(nn.Module):
    def __init__(self, in_dim, out_dim, blocks, upsample, temporal):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(out_dim if j else in_dim, out_dim) for j in range(blocks)])
        self.upsamplers = nn.ModuleList([Upsample(out_dim, temporal)] if upsample else [])

    def forward(self, x, memory=None):
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, memory)
        return x


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        dims = [c.base_dim * m for m in (c.dim_mult[-1], *c.dim_mult[::-1])]
        temporal = c.temperal_downsample[::-1]
        last = len(c.dim_mult) - 1
        self.conv_in = CausalConv3d(c.z_dim, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList([
            UpBlock(in_dim // 2 if i else in_dim, out_dim, c.num_res_blocks + 1, i < last, i < last and temporal[i])
            for i, (in_dim, out_dim) in enumerate(zip(dims, dims[1:]))])
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], 3, 3, padding=1)

    def forward(self, x, memory=None):
        x = self.mid_block(self.conv_in(x, memory), memory)
        for block in self.up_blocks:
            x = block(x, memory)
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

    def _statistics(self, device):
        shape = (1, -1, 1, 1, 1)
        return (torch.tensor(self.config.latents_mean, device=device).view(shape),
                torch.tensor(self.config.latents_std, device=device).view(shape))

    def moments(self, video, memory=None):
        """(B, F, 3, H, W) in [0, 1] -> mean, log-variance of the raw latents, each (B, C, T, h, w)."""
        x = video.transpose(1, 2).to(self.quant_conv.weight.dtype) * 2 - 1
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return self.quant_conv(self.encoder(x, memory)).chunk(2, 1)

    def decode_raw(self, z, memory=None):
        """Raw latents (B, C, T, h, w) -> (B, F, 3, H, W) in about [0, 1], not clamped."""
        x = z.to(self.quant_conv.weight.dtype).contiguous(memory_format=torch.channels_last_3d)
        return self.decoder(self.post_quant_conv(x), memory).transpose(1, 2) / 2 + .5

    def encode(self, video):
        """(B, F, 3, H, W) in [0, 1], F = 4k+1, H and W multiples of 8 -> normalised latents (B, C, T, h, w), float32.

        The latents are the posterior's mean, (mu - mean)/std per channel, as everywhere in Wan.
        """
        B, F_, _, H, W = video.shape
        if F_ % 4 != 1 or H % 8 or W % 8:
            raise ValueError(f"a video needs 4k+1 frames and sides that are multiples of 8, got {F_} frames of {H}x{W}")
        mean, std = self._statistics(video.device)
        memory, parts, start = {}, [], 0
        for piece in self._pieces(1 + (F_ - 1) // 4, B, H * W):
            stop = start + (4 * piece if start else 4 * piece - 3)
            parts.append((self.moments(video[:, start:stop], memory)[0].float() - mean) / std)
            start = stop
        return torch.cat(parts, 2)

    def decode(self, latents):
        """Normalised latents (B, C, T, h, w) -> video (B, F, 3, 8h, 8w) in [0, 1], float32, F = 4T-3."""
        B, _, T, h, w = latents.shape
        mean, std = self._statistics(latents.device)
        video = torch.empty(B, 4 * T - 3, 3, 8 * h, 8 * w, device=latents.device)
        memory, start, done = {}, 0, 0
        for piece in self._pieces(T, B, 64 * h * w):
            frames = self.decode_raw(latents[:, :, start:start + piece] * std + mean, memory).clamp_(0, 1)
            video[:, done:done + frames.shape[1]] = frames
            start, done = start + piece, done + frames.shape[1]
        return video

    def _pieces(self, T, B, pixels):
        """Latent frames per piece: up to 4, one where the batch's picture has 256x256 pixels or more."""
        size = min(max(2 ** 16 // (B * pixels), 1), 4)
        return [min(size, T - i) for i in range(0, T, size)]


# =================================================================================================================
# DiT.  (B, 16, T, h, w) noisy latents -> 1x2x2 patches -> blocks of [self-attention, cross-attention to the text,
# feed-forward], the first and last modulated by the time step -> velocity.  The residual stream, layer norms,
# modulation, time embedding and RoPE are float32 whatever the weights' dtype, as in the original.
# =================================================================================================================

@dataclass
class DiTConfig:
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    ffn_dim: int = 8960
    num_layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: tuple = (1, 2, 2)
    eps: float = 1e-6


DIT_SIZES = {"1.3B": DiTConfig(),
             "14B": DiTConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40)}


def rope(grid, head_dim, device):
    """Rotation (cos, sin), each (L, 1, head_dim/2), of a (T, h, w) token grid: the head's pairs of channels are split
    into a time part and two space parts (the two smaller), each rotated by position * 10000^(-2i/part)."""
    space = 2 * (head_dim // 6)
    angles = []
    for axis, dim in enumerate((head_dim - 2 * space, space, space)):
        frequency = 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        shape = [1, 1, 1]
        shape[axis] = grid[axis]
        angle = torch.outer(torch.arange(grid[axis], dtype=torch.float64), frequency).view(*shape, -1)
        angles.append(angle.expand(*grid, -1))
    angle = torch.cat(angles, -1).reshape(-1, 1, head_dim // 2)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x, cos, sin):
    """Rotates neighbouring channel pairs of x (B, L, heads, head_dim) in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


def time_frequencies(t, dim):
    """Sinusoidal embedding of t (B,) -> (B, dim): cosines, then sines; angles in float64."""
    frequency = 1e4 ** (-torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = torch.outer(t.double(), frequency)
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def linear32(layer, x):
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), layer.weight.float(), layer.bias.float())


class QKNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention; queries and keys are RMS-normalised over all heads together."""

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = QKNorm(dim, eps), QKNorm(dim, eps)

    def forward(self, x, context, rotation=None, bias=None):
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))  # (B, L, heads, head_dim)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class GELU(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.proj = nn.Linear(dim, out)

    def forward(self, x):
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.net = nn.ModuleList([GELU(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    def __init__(self, dim, ffn_dim, heads, eps):
        super().__init__()
        self.eps = eps
        self.attn1 = Attention(dim, heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.attn2 = Attention(dim, heads, eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim ** .5)

    def forward(self, x, text, time, rotation, bias):
        dtype, dim = self.ffn.net[2].weight.dtype, (x.shape[-1],)
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table.float() + time).chunk(6, 1)  # (B, 1, D)
        h = torch.addcmul(shift1, F.layer_norm(x, dim, eps=self.eps), 1 + scale1).to(dtype)
        x = torch.addcmul(x, self.attn1(h, h, rotation).float(), gate1)
        h = F.layer_norm(x, dim, self.norm2.weight.float(), self.norm2.bias.float(), self.eps).to(dtype)
        x = x + self.attn2(h, text, bias=bias)
        h = torch.addcmul(shift2, F.layer_norm(x, dim, eps=self.eps), 1 + scale2).to(dtype)
        return torch.addcmul(x, self.ffn(h).float(), gate2)  # (B, L, D) float32


class TwoLinear(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, out), nn.Linear(out, out)


class Conditions(nn.Module):
    def __init__(self, dim, freq_dim, text_dim):
        super().__init__()
        self.time_embedder = TwoLinear(freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLinear(text_dim, dim)


class DiT(nn.Module):
    """dit(x, t, text) -> v: the velocity eps - x0, float32.

    x (B, C, T, h, w) with h, w even; t (B,) = 1000 sigma; text (B, L, D), padding zeroed.
    Set .checkpointing = True to recompute blocks in the backward pass instead of storing them.
    """

    def __init__(self, config=DIT_SIZES["1.3B"]):
        super().__init__()
        c = self.config = config
        dim = c.num_attention_heads * c.attention_head_dim
        self.patch_embedding = nn.Conv3d(c.in_channels, dim, c.patch_size, c.patch_size)
        self.condition_embedder = Conditions(dim, c.freq_dim, c.text_dim)
        self.blocks = nn.ModuleList([Block(dim, c.ffn_dim, c.num_attention_heads, c.eps) for _ in range(c.num_layers)])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim ** .5)
        self.proj_out = nn.Linear(dim, c.out_channels * c.patch_size[0] * c.patch_size[1] * c.patch_size[2])
        self.checkpointing = False
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x, t, text, text_padding=0):
        """text_padding: number of further all-zero text tokens the last token of `text` stands for (`trim_text`)."""
        c, dtype = self.config, self.proj_out.weight.dtype
        B, C, T, h, w = x.shape
        p = c.patch_size
        grid = (T // p[0], h // p[1], w // p[2])
        if (grid[0] * p[0], grid[1] * p[1], grid[2] * p[2]) != (T, h, w):
            raise ValueError(f"latents of {T}x{h}x{w} do not divide into patches of {p[0]}x{p[1]}x{p[2]}")
        x = x.view(B, C, grid[0], p[0], grid[1], p[1], grid[2], p[2]).permute(0, 2, 4, 6, 1, 3, 5, 7)
        x = x.reshape(B, -1, C * p[0] * p[1] * p[2]).to(dtype)  # (B, L, C*patch)
        x = F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias).float()

        embed = self.condition_embedder
        time = linear32(embed.time_embedder.linear_1, time_frequencies(t, c.freq_dim))
        time = linear32(embed.time_embedder.linear_2, F.silu(time))  # (B, D)
        time6 = linear32(embed.time_proj, F.silu(time)).unflatten(1, (6, -1))  # (B, 6, D)
        text = embed.text_embedder.linear_1(text.to(dtype))
        text = embed.text_embedder.linear_2(F.gelu(text, approximate="tanh"))
        bias = None
        if text_padding:  # n equal keys weigh as much as one key with log n added to its logit
            bias = torch.zeros(text.shape[1], dtype=dtype, device=x.device)
            bias[-1] = torch.tensor(float(text_padding)).log()
            bias = bias.expand(B, 1, x.shape[1], -1)
        rotation = rope(grid, c.attention_head_dim, x.device)

        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, text, time6, rotation, bias, use_reentrant=False)
            else:
                x = block(x, text, time6, rotation, bias)

        shift, scale = (self.scale_shift_table.float() + time.unsqueeze(1)).chunk(2, 1)
        x = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=c.eps), 1 + scale).to(dtype)
        x = self.proj_out(x).float().view(B, *grid, *p, c.out_channels)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(B, c.out_channels, T, h, w)


def trim_text(text):
    """Cuts all-zero padding: (B, L, D) -> (B, L', D), n. The last kept token is zero and stands for n equal ones.

    Cross-attention has no mask and no positions, so equal padding tokens are one key with weight n: the same result
    for a fraction of the work. Pass n as dit(..., text_padding=n).
    """
    length = int(text.abs().amax((0, 2)).ne(0).sum())  # tokens are contiguous from the start
    return (text, 0) if length >= text.shape[1] - 1 else (text[:, :length + 1], text.shape[1] - length)


# =================================================================================================================
# Checkpoints.  Two published layouts of the same weights:
#   Diffusers  transformer/ vae/ text_encoder/ tokenizer/ scheduler/, each with config.json and safetensors
#              (one file, or shards listed in an index)
#   original   config.json + diffusion_pytorch_model*.safetensors (DiT), Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth,
#              google/umt5-xxl/ (tokenizer)
# Models are built on the meta device and filled tensor by tensor, each read straight into its device and dtype.
# Every header is checked before the first tensor is read; a missing, unknown or misshapen tensor is an error.
# =================================================================================================================

ORIGINAL_VAE, ORIGINAL_TEXT = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
TEXT_LENGTH = 512  # tokens the text is padded to; it matters, as cross-attention sees the padding
UMT5_XXL = dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                relative_attention_num_buckets=32, relative_attention_max_distance=128, feed_forward_proj="gated-gelu",
                dropout_rate=0.0, layer_norm_epsilon=1e-6)


def original_dit_key(key):
    """A DiT parameter's name in the original release, from ours (= Diffusers')."""
    if key == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in (("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
                         ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
                         ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
                         ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
                         ("condition_embedder.time_proj", "time_projection.1"), ("proj_out", "head.head"),
                         ("scale_shift_table", "modulation"), ("norm2", "norm3"),
                         ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"),
                         ("attn1", "self_attn"), ("attn2", "cross_attn"),
                         ("to_out.0", "o"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")):
        key = re.sub(rf"(^|\.){re.escape(ours)}(\.|$)", rf"\g<1>{theirs}\g<2>", key)
    return key


def original_vae_key(key, num_res_blocks=2):
    """A VAE parameter's name in the original release, from ours. There the decoder's levels are one flat list."""
    n = num_res_blocks + 1
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"upsamples.{int(m[1]) * (n + 1) + int(m[2])}", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"upsamples.{int(m[1]) * (n + 1) + n}", key)
    for ours, theirs in ((r"^quant_conv", "conv1"), (r"^post_quant_conv", "conv2"), (r"coder\.conv_in", "coder.conv1"),
                         (r"coder\.conv_out", "coder.head.2"), (r"coder\.norm_out", "coder.head.0"),
                         (r"mid_block\.resnets\.0", "middle.0"), (r"mid_block\.resnets\.1", "middle.2"),
                         (r"mid_block\.attentions\.0", "middle.1"), (r"down_blocks", "downsamples"),
                         (r"conv_shortcut", "shortcut"), (r"(\.\d+)\.norm1\.", r"\1.residual.0."),
                         (r"(samples\.\d+|middle\.\d+)\.conv1\.", r"\1.residual.2."), (r"(\.\d+)\.norm2\.", r"\1.residual.3."),
                         (r"(samples\.\d+|middle\.\d+)\.conv2\.", r"\1.residual.6.")):
        key = re.sub(ours, theirs, key)
    return key


def original_text_key(key):
    """A text encoder parameter's name in the original release, from that of transformers' UMT5EncoderModel."""
    for ours, theirs in ((r"^shared\.weight", "token_embedding.weight"), (r"^encoder\.final_layer_norm", "norm"),
                         (r"^encoder\.block", "blocks"), (r"layer\.0\.layer_norm", "norm1"), (r"layer\.1\.layer_norm", "norm2"),
                         (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
                         (r"layer\.0\.SelfAttention", "attn"), (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
                         (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"), (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2")):
        key = re.sub(ours, theirs, key)
    return key


def _read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; download the checkpoint again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid JSON ({e}); download it again") from None


def _weight_files(folder, stem):
    """The safetensors files of `stem` in a folder: one file, or the shards its index lists."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        files = sorted({folder / name for name in _read_json(index).get("weight_map", {}).values()})
    elif (folder / f"{stem}.safetensors").exists():
        files = [folder / f"{stem}.safetensors"]
    else:
        files = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        total = int(files[0].stem.rsplit("-", 1)[1]) if files else 0
        files = [folder / f"{stem}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    missing = [f.name for f in files if not f.exists()]
    if missing or not files:
        raise ValueError(f"{folder} lacks {', '.join(missing) or stem + '.safetensors'}; download the checkpoint again")
    return files


def _open_tensors(files, device="cpu"):
    """{name: (shape, read)} over safetensors or .pth files, from their headers alone; read() loads one tensor."""
    tensors = {}
    for file in files:
        if Path(file).suffix == ".safetensors":
            try:
                f = safe_open(file, framework="pt", device=str(device))
            except Exception as e:
                raise ValueError(f"{file} is not a whole safetensors file ({e}); download it again") from None
            for name in f.keys():
                tensors[name] = tuple(f.get_slice(name).get_shape()), functools.partial(f.get_tensor, name)
        else:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                if not (isinstance(state, dict) and state and all(isinstance(v, torch.Tensor) for v in state.values())):
                    raise ValueError("it holds something else")
            except Exception as e:
                reason = str(e).strip().split("\n")[0][:120]
                raise ValueError(f"{file} is not a .pth of plain tensors ({reason}); use the published file") from None
            tensors.update({name: (tuple(v.shape), functools.partial(state.__getitem__, name)) for name, v in state.items()})
    return tensors


def _match(model, files, rename, device="cpu", unused=frozenset()):
    """Pairs every tensor of a (meta) model with one in the files, by name and shape. -> {our name: read}

    unused: names that the files may hold and the model has no use for.
    """
    tensors = _open_tensors(files, device)
    where = Path(files[0]).parent if len(files) > 1 else files[0]
    names = {key: rename(key) for key in model.state_dict(keep_vars=True)}
    tied = {"encoder.embed_tokens.weight"}  # UMT5's second name for shared.weight; files hold either or both
    if "shared.weight" in names and names["shared.weight"] not in tensors:
        names["shared.weight"] = "encoder.embed_tokens.weight"
    names = {key: name for key, name in names.items() if key not in tied}
    missing = [name for name in names.values() if name not in tensors]
    unknown = sorted(set(tensors) - set(names.values()) - tied - unused)
    for what, keys in (("lacks", missing), ("has the unknown", unknown)):
        if keys:
            raise ValueError(f"{where} {what} tensor {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
                             + "; it is not the checkpoint its config describes")
    for key, parameter in model.state_dict(keep_vars=True).items():
        if key in names and tensors[names[key]][0] != tuple(parameter.shape):
            raise ValueError(f"{where}: tensor {names[key]} has shape {tensors[names[key]][0]}, the config asks for {tuple(parameter.shape)}")
    return {key: tensors[name][1] for key, name in names.items()}


def _fill(model, reads, device, dtype):
    """Fills a meta model in place, one tensor at a time: no second copy of the weights is ever held."""
    for key, read in reads.items():
        owner, _, leaf = key.rpartition(".")
        value = read().to(device=device, dtype=dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def _fields(cls, config, path):
    """The dataclass cls from a config.json's entries that it knows."""
    values = {f.name: config[f.name] for f in dataclasses.fields(cls) if config.get(f.name) is not None}
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as e:
        raise ValueError(f"{path}: {e}") from None


def _folder(path, wanted):
    """A local folder for a path or hub id (owner/name); only the `wanted` patterns are downloaded."""
    if Path(path).exists():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"no model folder '{path}'; give a folder in the Wan2.1 or Diffusers layout, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted, etag_timeout=3))
    except Exception as e:
        reason = str(e).strip().split("\n")[0][:160]
        raise ValueError(f"'{path}' is neither a folder nor a hub id that can be fetched ({reason}); "
                         f"download it first: hf download {path} --local-dir {Path(path).name}") from None


def _dit_part(folder):
    """-> (meta DiT, weight files, rename) for a model folder of either layout, or a transformer folder."""
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    config = _read_json(folder / "config.json")
    if "dim" in config and "num_heads" in config:  # the original's config
        config = DiTConfig(config["num_heads"], config["dim"] // config["num_heads"], config["ffn_dim"], config["num_layers"],
                           config["in_dim"], config["out_dim"], freq_dim=config["freq_dim"], eps=config["eps"],
                           text_dim=config.get("text_dim", 4096))
        rename = original_dit_key
    elif "num_attention_heads" in config:
        config, rename = _fields(DiTConfig, config, folder), str
    else:
        raise ValueError(f"{folder / 'config.json'} does not describe a Wan2.1 transformer")
    with torch.device("meta"):
        dit = DiT(config)
    return dit, _weight_files(folder, "diffusion_pytorch_model"), rename


def _vae_part(folder):
    """-> (meta VAE, weight files, rename)."""
    if (folder / ORIGINAL_VAE).exists() or folder.suffix == ".pth":
        config, files, rename = VAEConfig(), [folder if folder.suffix == ".pth" else folder / ORIGINAL_VAE], original_vae_key
    else:
        if (folder / "vae").is_dir():
            folder = folder / "vae"
        config = _fields(VAEConfig, _read_json(folder / "config.json"), folder)
        files, rename = _weight_files(folder, "diffusion_pytorch_model"), str
    with torch.device("meta"):
        vae = VAE(config)
    return vae, files, rename


def _text_part(folder):
    """-> (meta UMT5EncoderModel, weight files, rename, tokenizer folder)."""
    if (folder / "text_encoder").is_dir():
        files, rename, tokenizer = _weight_files(folder / "text_encoder", "model"), str, folder / "tokenizer"
        config = _read_json(folder / "text_encoder" / "config.json")
    else:
        files, rename, tokenizer, config = [folder / ORIGINAL_TEXT], original_text_key, folder / "google" / "umt5-xxl", UMT5_XXL
        if not files[0].exists():
            raise ValueError(f"{folder} lacks {ORIGINAL_TEXT}; download the checkpoint again")
    if not tokenizer.is_dir():
        raise ValueError(f"{folder} lacks the tokenizer folder {tokenizer.relative_to(folder)}; download the checkpoint again")
    _open_tensors(files)  # broken files are named before the slow import
    import transformers
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(transformers.UMT5Config(**config))
    return model, files, rename, tokenizer


def load_dit(path, device="cpu", dtype=torch.float32):
    """DiT from a model folder (either layout), its transformer folder, or a hub id."""
    model, files, rename = _dit_part(_folder(path, ["*config.json", "*diffusion_pytorch_model*"]))
    return _fill(model, _match(model, files, rename, device), device, dtype)


def load_vae(path, device="cpu", dtype=torch.float32):
    """VAE from a model folder (either layout), its vae folder, a .pth file, or a hub id."""
    model, files, rename = _vae_part(_folder(path, ["*config.json", "vae/*", ORIGINAL_VAE]))
    return _fill(model, _match(model, files, rename, device), device, dtype)


def clean_prompt(text):
    """Wan's text cleaning: ftfy, HTML entities twice, white space collapsed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


class Wan:
    """A text-to-video model: .dit, .vae, .text_encoder, .tokenizer, .shift (of its scheduler, or None), .device."""

    def __init__(self, dit, vae, text_encoder, tokenizer, shift=None):
        self.dit, self.vae, self.text_encoder, self.tokenizer, self.shift = dit, vae, text_encoder, tokenizer, shift

    @property
    def device(self):
        return self.dit.proj_out.weight.device

    @torch.no_grad()
    def encode_text(self, prompts):
        """Prompts (a list of B strings) -> embeddings (B, 512, D), padding zeroed.

        The encoder runs at the longest prompt's length: masked padding cannot change the tokens before it.
        """
        tokens = self.tokenizer([clean_prompt(p) for p in prompts], padding="longest", truncation=True, max_length=TEXT_LENGTH,
                                return_attention_mask=True, return_tensors="pt")
        device = self.text_encoder.device
        mask = tokens.attention_mask.to(device)
        text = self.text_encoder(tokens.input_ids.to(device), mask).last_hidden_state * mask.unsqueeze(-1)
        return F.pad(text, (0, 0, 0, TEXT_LENGTH - text.shape[1])).to(self.device)


def load_wan(path, device="cpu", dtype=torch.float32):
    """Wan2.1 from a folder in either published layout, or a hub id.

    dtype is the DiT's and text encoder's; the VAE is float32 always, its official precision. Raises ValueError with
    one sentence when a file is missing, cut short, mislabelled or not what the config describes; every part is checked
    before any is loaded.
    """
    folder = _folder(path, ["*.json", "*.safetensors", "*.pth", "*.model", "google/*", "tokenizer/*"])
    if not folder.is_dir():
        raise ValueError(f"'{path}' is not a folder; give the folder that holds the checkpoint")
    if not (folder / "transformer").is_dir() and not (folder / ORIGINAL_VAE).exists():
        raise ValueError(f"'{path}' holds neither transformer/ (Diffusers layout) nor {ORIGINAL_VAE} (original layout)")
    parts = []
    for kind, part in ((dtype, _dit_part), (torch.float32, _vae_part), (dtype, _text_part)):
        model, files, rename, *tokenizer = part(folder)
        parts.append((model, _match(model, files, rename, device), device, kind))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler = _read_json(scheduler) if scheduler.exists() else {}
    import transformers
    dit, vae, text = (_fill(*part) for part in parts)
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    return Wan(dit, vae, text, transformers.AutoTokenizer.from_pretrained(tokenizer[0]), shift)
