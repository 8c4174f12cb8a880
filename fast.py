"""Faster forms of four operations of Wan2.1, each with the slow, obvious form that it must equal:

    rms_norm(x, gamma)                    = rms_norm_plain(x, gamma)
    upsampled_conv(x, conv)               = upsampled_conv_plain(x, conv)
    conv3d(x, weight, bias, padding)      = conv3d_plain(x, weight, bias, padding)
    short, n = trim_text(text)            dit(x, t, short, n) = dit(x, t, text)

and `cpu_autocast`, in which this repository trains the tiny models.

Forward and backward agree to rounding (tests/test_fast.py): with the plain forms model.py makes the same
videos up to rounding, more slowly. Left out: kernels of our own, quantisation, caching across sampling steps.
"""

import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------- channel norm

def rms_norm_plain(x, gamma):
    """y = gamma sqrt(C) x / |x|_2 over the channels: x (B, C, ...), gamma (C,) -> (B, C, ...)."""
    gamma = gamma.view(-1, *[1] * (x.dim() - 2))
    return F.normalize(x, dim=1) * len(gamma) ** .5 * gamma


def rms_norm(x, gamma):
    """rms_norm_plain with fewer passes over memory, and one activation saved for backward instead of two.

    The VAE's norms see every pixel of a video: they wait for memory, not for arithmetic.
    """
    return _RMSNorm.apply(x, gamma)


class _RMSNorm(torch.autograd.Function):
    """With r = sqrt(C) / |x|, x^ = r x = y / gamma and p = grad * x^, elementwise:

        d gamma = sum p,    dx = r (gamma grad - x^ (p . gamma) / C).
    """

    @staticmethod
    def forward(ctx, x, gamma):
        channels = x.shape[1]
        x = x.movedim(1, -1)  # (B, ..., C)
        # A view when channels are last in memory, as the VAE keeps them. The clamp is F.normalize's.
        flat = x.reshape(-1, channels)
        r = channels ** .5 / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp_min_(1e-12)
        ctx.save_for_backward(flat, gamma, r)
        return (flat * r).mul_(gamma).view(x.shape).movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        flat, gamma, r = ctx.saved_tensors
        grad = grad.movedim(1, -1)  # (B, ..., C)
        flat_grad = grad.reshape(flat.shape)
        x_hat = flat * r
        p = flat_grad * x_hat
        grad_gamma = p.sum(0)
        along = p @ (gamma / len(gamma)).unsqueeze(1)  # (p . gamma) / C, one number per pixel
        # p is not needed any more: its memory takes dx.
        dx = torch.mul(flat_grad, gamma, out=p).addcmul_(x_hat, along, value=-1).mul_(r)
        return dx.view(grad.shape).movedim(-1, 1), grad_gamma


# ----------------------------------------------------------------------------- upsampling, then a convolution

def upsampled_conv_plain(x, conv):
    """A 3x3 convolution (nn.Conv2d) of the picture x (B, C, H, W) enlarged twice by repeating pixels."""
    x = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    return F.conv2d(x, conv.weight, conv.bias, padding=1)


def upsampled_conv(x, conv):
    """upsampled_conv_plain without making the large picture, for 4/9 of the multiplications.

    Three neighbouring pixels of the enlarged picture have only two values, u u v or u v v: the taps that meet
    the same value are added first. So each of the four output phases (even and odd rows, even and odd
    columns) is a 2x2 convolution of the small picture.
    """
    B, _, H, W = x.shape
    # Padding the small picture by one is enough: phase 0 reads it from pixel 0 on, phase 1 from pixel 1 on.
    x = F.pad(x, (1, 1, 1, 1))
    phases = []
    for i, row_merged in enumerate(_merged_taps(conv.weight, 2)):
        for j, weight in enumerate(_merged_taps(row_merged, 3)):  # (out, in, 2, 2)
            phase = F.conv2d(x, weight, conv.bias)[:, :, i:i + H, j:j + W]
            phases.append(phase.permute(0, 2, 3, 1))  # (B, H, W, C)
    # Interleave: pixel (2y + i, 2x + j) is phase (i, j) at (y, x).
    y = torch.stack(phases, 3).unflatten(3, (2, 2))  # (B, H, W, i, j, C)
    y = y.transpose(2, 3).reshape(B, 2 * H, 2 * W, -1)  # (B, H, i, W, j, C) -> (B, 2H, 2W, C)
    return y.permute(0, 3, 1, 2)


def _merged_taps(weight, dim):
    """An output pixel's three taps along dim as two: (those of even output pixels, those of odd ones)."""
    a, b, c = weight.unbind(dim)
    even = torch.stack([a, b + c], dim)
    odd = torch.stack([a + b, c], dim)
    return even, odd


# ------------------------------------------------------------------------------------ 3D convolution on a CPU

def conv3d_plain(x, weight, bias, padding):
    """x (B, C, T, H, W), weight (out, C, kernel...), bias (out,), padding per side, for (T, H, W)."""
    return F.conv3d(x, weight, bias, padding=padding)


def conv3d(x, weight, bias, padding):
    """conv3d_plain, but a lone clip on the CPU takes oneDNN's kernel as a batch does.

    PyTorch chooses by size, the batch's included, and would send one small clip through an unfolding
    fallback, several times slower. Clips are decoded one by one where a video's pixels must not depend on its
    batch: in sample.py and for the rewards.
    """
    lone = x.shape[0] == 1 and x.device.type == "cpu" and x.dtype == torch.float32
    if lone and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, padding,
                                        stride=(1, 1, 1), dilation=(1, 1, 1), groups=1)
    return conv3d_plain(x, weight, bias, padding)


# -------------------------------------------------------------------------------- padding of the text, as one

def trim_text(text):
    """Cuts all-zero padding: (B, L, D) -> (B, L', D), n. The last token kept stands for n zero ones.

    Wan pads every prompt to 512 tokens and its cross-attention sees them all. But it has no mask and no
    positions, so equal tokens are one key with weight n: the same result for a fraction of the work.
    (text, 0) if there is too little padding to gain. Pass n as dit(..., text_padding=n).
    """
    # The longest prompt's, as tokens are contiguous from the start. A shorter one keeps some zero tokens.
    length = int(text.abs().amax((0, 2)).ne(0).sum())
    # Never to 64 mod 128 keys, at which cuDNN before 9.26, PyTorch's choice on an H100 or H200, can make NaNs
    # in the backward pass of attention with a bias (pytorch issue 196678): one more zero token is kept then.
    if (length + 1) % 128 == 64:
        length += 1
    if length >= text.shape[1] - 1:
        return text, 0
    return text[:, :length + 1], text.shape[1] - length


def padding_bias(text, count, queries):
    """Attention bias (B, 1, queries, L) for text (B, L, D) whose last token stands for `count` equal ones.

    n equal keys weigh n exp(q.k) = exp(q.k + log n): one key with log n added to its logit. None for 0.
    In bfloat16, whose steps between 4 and 8 are 1/32, that key's weight is off by up to 1.6 %.
    """
    if count == 0:
        return None
    # A vector, seen as a matrix without memory of its own.
    bias = torch.zeros(text.shape[1], dtype=text.dtype, device=text.device)
    bias[-1] = torch.tensor(float(count)).log()
    return bias.expand(len(text), 1, queries, -1)


# ------------------------------------------------------------------------------------------ bfloat16 on a CPU

def cpu_autocast():
    """with cpu_autocast(): arithmetic in bfloat16 where the CPU is fast at it, else in float32.

    With AVX2 alone, as most laptops have it, a convolution in bfloat16 takes 50 times as long as in float32.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability() == "AVX512")
