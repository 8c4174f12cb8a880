"""A step of training at its real size, on tensors without data: what does not fit, or mixes devices or
dtypes, is found on a laptop.

    python bench.py --rehearse large --gpus 96        two to five minutes; no weights, no GPU

The real functions run one batch of a step on PyTorch's fake tensors, which have shapes, dtypes and devices
but no numbers, in a process group of which only rank 0 exists. `Trace` follows what every operation
allocates and how many FLOPs it takes. On a CPU it agrees with what the allocator hands out in a true run of
the same lines (tests/test_rehearse.py).

Not in the trace: noise transport (its indices depend on values; its result is there), rendering of Gaussians,
the critic and the preference model (bench.py counts their weights), and what CUDA takes beside PyTorch's
tensors: its context, workspaces of kernels, gaps of the allocator.
"""

import contextlib
import dataclasses
import math
import weakref
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

import depth_anything
import policy
import sample
import train
from depth_anything import SIZES, DepthAnything3, processed_size
from estimate import dit_config
from model import VAE, DiT, VAEConfig, Wan
from noise_warp import camera_path
from rewards import Clip, Rewards, lpips_distance, meta_views, native_intrinsics, trajectory_term
from run import Processes
from texts import encode_text, load_text
from weights import TINY

# --------------------------------------------------------------------------------------------- what is traced

aten = torch.ops.aten
FLOPS = flop_registry | {  # PyTorch's own table lacks the CPU's attention
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, out_val=None, **__: sdpa_flop(q, k, v, out_val=out_val[0]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda gradient, q, k, v, *_, out_val=None, **__: sdpa_backward_flop(gradient, q, k, v),
}
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}


class Trace(TorchDispatchMode):
    """with Trace() as trace: .now and .peak in bytes, .flops, of every operation on the way."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.sizes = {}  # storage -> bytes

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is aten._local_scalar_dense.default and is_fake(arguments[0]):
            return 1.0 if arguments[0].is_floating_point() else 1  # .item() of a tensor without numbers
        if function._overloadpacket in PRODUCTS:  # without data they take what a GPU refuses
            dtypes = {tensor.dtype for tensor in arguments if isinstance(tensor, torch.Tensor)}
            if len(dtypes) > 1:
                raise RuntimeError(f"{function} of more than one dtype: {', '.join(map(str, dtypes))}")
        out = function(*arguments, **(options or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        if function._overloadpacket in FLOPS:
            self.flops += FLOPS[function._overloadpacket](*arguments, **(options or {}), out_val=out)
        return out

    def add(self, tensor):
        """A tensor's storage counts once, until it is gone."""
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        if storage._cdata not in self.sizes:
            weakref.finalize(storage, self.drop, storage._cdata)
            self.resize(storage._cdata, storage.nbytes())

    def resize(self, key, size):
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def drop(self, key):
        self.now -= self.sizes.pop(key)

    def lap(self):
        """-> the peak and the FLOPs since the last lap."""
        found = self.peak, self.flops
        self.peak, self.flops = self.now, 0
        return found


class Rehearsed(Processes):
    """Rank 0 of a process group whose other ranks say what it says."""

    def __init__(self, world, device="cpu"):
        self.rank, self.world, self.lock, self.device = 0, world, None, torch.device(device)
        if world > 1:
            dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())

    def gather(self, value):
        return [value] * self.world


def no_noise(wan, path, height, width, draws, *_):
    """What noise transport makes, without its numbers."""
    return torch.zeros(len(draws), wan.vae.config.z_dim, len(path) // 4 + 1, height // 8, width // 8)


@contextlib.contextmanager
def without_data(trace):
    """with without_data(trace): tensors have no data, and `trace` follows them."""
    resize, make_mesh = torch.UntypedStorage.resize_, policy.init_device_mesh

    def resized(storage, size):  # by FSDP, which frees gathered weights so
        if storage._cdata in trace.sizes:
            trace.resize(storage._cdata, size)
        return resize(storage, size)

    def mesh(*arguments, **options):  # holds the ranks' true numbers
        with _disable_current_modes():
            return make_mesh(*arguments, **options)

    with contextlib.ExitStack() as stack:
        for place, name, stand_in in (
            (torch.UntypedStorage, "resize_", resized), (policy, "init_device_mesh", mesh),
            (train, "initial_noise", no_noise), (sample, "initial_noise", no_noise),
            (depth_anything, "free_memory", lambda device: math.inf),
            (torch.backends.mkldnn, "is_available", lambda: False),  # the CPU's own convolution
        ):
            stack.enter_context(patch.object(place, name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(trace)
        yield


# ----------------------------------------------------------------------------------------------------- a step

def random_wan(config, vae_config, dtype):
    """Wan with weights as they are drawn, in the dtype, and embeddings of zeros."""
    torch.set_default_dtype(dtype)
    try:
        dit = DiT(config)
    finally:
        torch.set_default_dtype(torch.float32)
    text = torch.zeros(1, 512, config.text_dim, dtype=dtype)
    return Wan(dit, VAE(vae_config).eval().requires_grad_(False), shift=3.0, texts=lambda prompt: text)


def one_batch(trained, lap):
    """Rank 0's first batch through a step of training, and an evaluation of two steps; trained: a Policy.
    lap(phase) is called after each phase."""
    c, prompt = trained.c, "push_in a lighthouse"
    group, members = train.deal(c, trained.processes.world)[0][0]
    windows = [train.step_window(c, 0, False, index) for index in range(c.groups)]
    chosen = [(index, prompt) for index in range(c.groups)]
    lap("weights, optimiser")

    (batch, videos, _), = train.roll_out(trained, 0, False, chosen, windows, [(group, members)])
    lap("rollout, decoding")

    del videos
    batch.advantages = torch.zeros(len(members))
    for transition in batch.transitions:
        loss, _ = train.policy_loss(trained, batch, transition)
        loss.backward()
        trained.collect_gradients()
    lap("update")

    trained.step(c.lr, trained.sum_gradients())
    trained.follow(c.ema_every - 1)
    lap("optimiser step")

    sampling = dataclasses.replace(train.own_sampling(c), steps=2)
    with torch.no_grad(), trained.averaged():
        latents, _ = sample.sample_latents(trained.wan, [prompt] * len(members), sampling, c.seed)
        sample.decode_videos(trained.wan, latents)
    lap("evaluation of 2 steps")


def rehearse(c, gpus, config=None, vae_config=None):
    """A step of train.Config c on so many GPUs -> {phase: (peak bytes of one GPU, FLOPs)}, the policy's
    weights in each."""
    trace, phases = Trace(), {}

    def lap(phase):
        phases[phase] = trace.lap()

    config = config or dit_config(c.model)
    processes = Rehearsed(gpus)
    try:
        with without_data(trace):
            wan = random_wan(config, vae_config or VAEConfig(), getattr(torch, c.dtype))
            one_batch(policy.Policy(c, processes, wan), lap)
            del wan
    finally:
        processes.close()
    return phases


def rehearse_depth(c, config=SIZES["da3-giant"]):
    """Depth Anything 3 on a video's views -> peak bytes, FLOPs."""
    trace = Trace()
    with torch.no_grad(), without_data(trace):
        model = DepthAnything3(config).eval()
        model(torch.zeros(c.views, 3, *processed_size(c.height, c.width, model.config)))
        return trace.lap()


# ---------------------------------------------------------------------------------------------------- devices

@torch.no_grad()
def rehearse_devices(c, config=None, change=lambda wan: None):
    """Forward passes on a GPU that need not be there: sampling, decoding, Depth Anything 3. An operation on
    tensors of two devices, or of two dtypes, raises. change(wan): for tests, plants one."""
    config = config or dit_config(c.model)
    with without_data(Trace()):
        with torch.device("cuda"):
            wan = random_wan(config, VAEConfig(), torch.bfloat16)
            depth = DepthAnything3(SIZES["da3-giant"]).eval()
            frames = torch.zeros(2, 3, 56, 56)
        change(wan)
        sampling = dataclasses.replace(train.own_sampling(c), steps=2, frames=5, height=64, width=64)
        videos, _ = sample.sample_videos(wan, ["push_in a lighthouse"], sampling)
        depth(frames)
    return videos[0].shape


@torch.no_grad()
def rehearse_judges(change=lambda clip: None):
    """The same of the tiny twins: text encoder, Depth Anything 3 with its glue, LPIPS. The critics read
    pictures' sizes out of tensors, which have none here. change(clip): for tests, plants a mistake."""
    encoder, tokenizer = load_text(TINY / "wan", "cpu", torch.bfloat16)
    judges = Rewards(views=3)
    networks = [encoder, judges.depth_anything, judges.lpips]
    with without_data(Trace()):
        for module in [module for network in networks for module in network.modules()]:
            for held in (module._parameters, module._buffers):
                for name, values in held.items():
                    if values is not None:
                        held[name] = torch.empty_like(values, device="cuda")
        encode_text(encoder, tokenizer, ["push_in a lighthouse"])
        video = torch.zeros(5, 3, 64, 64, device="cuda")
        clip = Clip(video, "push_in a lighthouse", camera_path(["push_in"], 5))
        clip.reconstruction = rec = judges.depth_anything(video, judges.views)
        change(clip)
        trajectory_term(judges, clip)
        meta_views(rec)
        lpips_distance(judges.lpips, video, video)
        return native_intrinsics(rec, 64, 64).device
