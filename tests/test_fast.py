"""Each fast function against its plain oracle, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DIT, VAE_, randomise

from fast import conv3d, conv3d_plain, cpu_autocast, rms_norm, rms_norm_plain, trim_text
from fast import upsampled_conv, upsampled_conv_plain
from model import VAE, DiT, DiTConfig, VAEConfig


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def assert_same(fast, plain, inputs, tolerance):
    """Equal results, and equal gradients of every input for the same random weighting of the results."""
    a, b = fast(*inputs), plain(*inputs)
    assert relative(a, b) < tolerance
    weights = torch.randn_like(b)
    fast_gradients = torch.autograd.grad((a * weights).sum(), inputs)
    plain_gradients = torch.autograd.grad((b * weights).sum(), inputs)
    for x, y in zip(fast_gradients, plain_gradients):
        assert relative(x, y) < tolerance


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("shape", [(2, 5, 3, 2, 2), (3, 8, 4, 6), (1, 2, 2, 2, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_channel_norm(shape, channels_last):
    x = random(*shape)
    if channels_last:
        x = x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    assert_same(rms_norm, rms_norm_plain, (x, random(shape[1])), 1e-9)


def test_channel_norm_of_zeros_is_zero():
    zeros = torch.zeros(1, 5, 1, 1, 1)
    assert torch.equal(rms_norm(zeros, torch.ones(5)), zeros)


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (1, 6, 1, 1), (3, 2, 8, 2)])
def test_upsampled_convolution(shape):
    conv = torch.nn.Conv2d(shape[1], 3, 3, padding=1).double()
    x = random(*shape)
    assert upsampled_conv(x, conv).shape == (shape[0], 3, 2 * shape[2], 2 * shape[3])

    def through(function):
        return lambda x, *parameters: function(x, conv)

    assert_same(through(upsampled_conv), through(upsampled_conv_plain), (x, conv.weight, conv.bias), 1e-9)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel, padding", [
    ((3, 3, 3), (0, 1, 1)), ((1, 3, 3), (0, 1, 1)), ((3, 1, 1), (0, 0, 0)), ((1, 1, 1), (0, 0, 0))])
def test_convolution_of_a_lone_clip(batch, kernel, padding):
    inputs = [random(*shape, dtype=torch.float32) for shape in ((batch, 4, 5, 6, 8), (7, 4, *kernel), (7,))]
    assert_same(lambda *a: conv3d(*a, padding), lambda *a: conv3d_plain(*a, padding), inputs, 1e-5)


def test_a_lone_clip_is_as_in_a_batch():
    """A batch of one takes another convolution on the CPU: the VAE's pixels and gradients stay the same."""
    vae = randomise(VAE(VAEConfig(**VAE_)))
    z = torch.randn(2, 4, 3, 2, 3)
    both = z.clone().requires_grad_()
    alone = z[:1].clone().requires_grad_()
    of_both = vae.decode_raw(both)
    of_alone = vae.decode_raw(alone)
    assert relative(of_alone[0], of_both[0]) < 1e-5
    of_both[0].square().sum().backward()
    expected = [p.grad.clone() for p in vae.decoder.parameters()]
    vae.zero_grad()
    of_alone.square().sum().backward()
    assert relative(alone.grad[0], both.grad[0]) < 1e-5
    for p, gradient in zip(vae.decoder.parameters(), expected):
        if gradient.norm() > 1e-3:
            assert relative(p.grad, gradient) < 1e-4


def padded_text(real, length=20):
    text = torch.randn(2, length, DIT["text_dim"])
    text[:, real:] = 0
    return text


@pytest.mark.parametrize("real, length, kept", [
    (7, 20, 8),
    (63, 80, 65)])  # 64 keys are avoided
def test_trimmed_text_is_exact(real, length, kept):
    dit = randomise(DiT(DiTConfig(**DIT)))
    x = torch.randn(2, DIT["in_channels"], 3, 4, 6)
    t = torch.tensor([900.0, 40.0])
    text = padded_text(real, length)
    short, padding = trim_text(text)
    assert (short.shape[1], padding) == (kept, length - kept + 1)

    # Backward too: with respect to the latents and to the text that both see.
    def fast(x, words):
        return dit(x, t, torch.cat([words, short[:, real:]], 1), padding)

    def plain(x, words):
        return dit(x, t, torch.cat([words, text[:, real:]], 1))

    inputs = (x.requires_grad_(), text[:, :real].clone().requires_grad_())
    assert_same(fast, plain, inputs, 1e-4)
    with torch.no_grad():
        assert relative(fast(*inputs), plain(*inputs)) < 1e-5
        # Dropping the padding is not the same.
        assert relative(dit(x, t, short[:, :real]), dit(x, t, text)) > 1e-3


@pytest.mark.parametrize("real", [19, 20])
def test_text_with_no_padding_to_gain_is_left_alone(real):
    text = padded_text(real)
    assert trim_text(text) == (text, 0)


@pytest.mark.parametrize("capability, dtype", [("AVX512", torch.bfloat16), ("AVX2", torch.float32),
                                               ("DEFAULT", torch.float32)])
def test_a_cpu_computes_in_bfloat16_where_that_is_fast(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with cpu_autocast():
        assert F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype
