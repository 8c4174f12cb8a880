"""A step of training at its real size, on tensors without data: what does not fit, or mixes devices or
dtypes, is found on a laptop.

    python bench.py --rehearse large --gpus 96        about a minute; no weights, no GPU

The real functions run one batch of a step on PyTorch's fake tensors, which have shapes, dtypes and devices
but no numbers, in a process group of which only rank 0 exists. `Trace` follows what every operation
allocates and how many FLOPs it takes. On a CPU it agrees with what the allocator hands out in a true run of
the same lines (tests/test_rehearse.py).

Two checks of devices come first: forward passes on a fake GPU (`rehearse_devices`), and rewards on a GPU
that the CPU plays (`rehearse_judges`), where a tensor left on the CPU is an error, as it is with CUDA.

Not in the trace: noise transport (its indices depend on values; its result is there), rendering of Gaussians,
the critic and the preference model (bench.py counts their weights), and what CUDA takes beside PyTorch's
tensors: its context, workspaces of kernels, gaps of the allocator.
"""

import contextlib
import dataclasses
import math
import sys
import weakref
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

import depth_anything
import policy
import sample
import splat
import train
from depth_anything import SIZES, DepthAnything3, processed_size
from model import VAE, DiT, VAEConfig, Wan, released_config
from noise_warp import camera_path
from rewards import Rewards
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
        if function._overloadpacket in PRODUCTS:  # fake tensors let mixed dtypes pass, a GPU does not
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
        self.timeout = None  # nobody waits here, and older PyTorch's fake groups refuse one
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
    return Wan(dit, VAE(vae_config).eval().requires_grad_(False), shift=3.0, text_cache=lambda prompt: text)


def one_batch(trained, lap, rolled_out=1):
    """Rank 0's first batch through a step of training, and an evaluation of two steps; trained: a Policy.
    lap(phase) is called after each phase. rolled_out: batches of the rollout; those of a group share
    what comes before the window."""
    c, prompt = trained.c, "push_in a lighthouse"
    work = train.deal(c, trained.processes.world)[0][:rolled_out]
    members = work[0][1]
    with _disable_current_modes():  # the windows of a true run's first step
        windows = [train.step_window(c, 0, False, index) for index in range(c.groups)]
    chosen = [(index, prompt) for index in range(c.groups)]
    lap("weights, optimiser")

    for batch, videos, _ in train.roll_out_groups(trained, 0, False, chosen, windows, work):
        del videos  # before the next batch's
    lap("rollout, decoding")

    batch.advantages = torch.zeros(len(members))
    for sde_step in batch.sde_steps:
        loss, _ = train.policy_loss(trained, batch, sde_step)
        loss.backward()
        trained.collect_gradients()
    lap("update")

    trained.step(c.lr, trained.sum_gradients())
    trained.update_average(c.ema_every - 1)
    lap("optimiser step")

    sampling = dataclasses.replace(train.sampling_for(c), steps=2)
    with torch.no_grad(), trained.averaged():
        latents, _ = sample.sample_latents(trained.wan, [prompt] * len(members), sampling, c.seed)
        sample.decode_videos(trained.wan, latents)
    lap("evaluation of 2 steps")


def rehearse(c, gpus, config=None, vae_config=None, rolled_out=1):
    """A step of train.Config c on so many GPUs, with one batch. -> {phase: (peak bytes of one GPU, FLOPs)};
    every peak includes the policy's weights. rolled_out: how many batches the rollout makes."""
    trace, phases = Trace(), {}

    def lap(phase):
        phases[phase] = trace.lap()

    config = config or released_config(c.model)
    processes = Rehearsed(gpus)
    try:
        with without_data(trace):
            wan = random_wan(config, vae_config or VAEConfig(), getattr(torch, c.dtype))
            one_batch(policy.Policy(c, processes, wan), lap, rolled_out)
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
    config = config or released_config(c.model)
    with without_data(Trace()):
        with torch.device("cuda"):
            wan = random_wan(config, VAEConfig(), torch.bfloat16)
            depth = DepthAnything3(SIZES["da3-giant"]).eval()
            frames = torch.zeros(2, 3, 56, 56)
        change(wan)
        sampling = dataclasses.replace(train.sampling_for(c), steps=2, frames=5, height=64, width=64)
        videos, _ = sample.sample_videos(wan, ["push_in a lighthouse"], sampling)
        depth(frames)
    return videos[0].shape


# --------------------------------------------------------------------------------- a GPU that the CPU plays

class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU. Unlike a fake one it has numbers, which critics ask
    for."""

    @staticmethod
    def __new__(cls, on_cpu):
        out = torch.Tensor._make_wrapper_subclass(
            cls, on_cpu.shape, strides=on_cpu.stride(), storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype, device="cuda:0")
        out.on_cpu = on_cpu
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raise RuntimeError(f"{function} outside of the GPU that is played")

    def tolist(self):
        return self.on_cpu.tolist()

    def __format__(self, spec):
        return format(self.on_cpu, spec)


def on_cpu(value):
    return value.on_cpu if isinstance(value, OnGPU) else value


class PlayedGPU(TorchDispatchMode):
    """Computes on the CPU what is asked of a GPU; RuntimeError for tensors of two devices, as CUDA has it."""
    # operations that may take tensors of both devices
    TRANSFERS = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put.default,
                 aten.index_put_.default}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        tensors = [value for value in tree_leaves((arguments, options)) if isinstance(value, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
        # CUDA lets a scalar of the CPU meet its tensors.
        here = [tensor for tensor in tensors if not isinstance(tensor, OnGPU) and tensor.dim()]
        if there and here and function not in self.TRANSFERS:
            raise RuntimeError(f"{function} of tensors on more than one device: "
                               f"{tuple(here[0].shape)} is on the CPU")

        # The result goes where the tensors are; that of copy_ is its first argument, and stays where it is.
        to_gpu = bool(there)
        if function is aten.copy_.default:
            to_gpu = isinstance(tensors[0], OnGPU)
        if options.get("device") is not None:  # it goes where it is asked for
            to_gpu = options["device"].type == "cuda"
            options["device"] = torch.device("cpu")
        out = function(*tree_map(on_cpu, tuple(arguments)), **tree_map(on_cpu, options))
        if not to_gpu:
            return out
        known = {id(tensor.on_cpu): tensor for tensor in there}

        def placed(value):
            if id(value) in known:  # changed in place
                return known[id(value)]
            return OnGPU(value) if isinstance(value, torch.Tensor) else value

        return tree_map(placed, out)


class PlayedConstants(TorchFunctionMode):
    """torch.tensor of tensors, which PyTorch makes without asking a mode."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if function is not torch.tensor:
            return function(*arguments, **options)
        device = options.pop("device", "cpu")
        return torch.tensor(*tree_map(on_cpu, arguments), **options).to(device)


def rasterization(means, rotations, scales, opacities, harmonics, viewmats, K, width, height, *_, **__):
    """Stands in for gsplat's, whose kernels need a true GPU: checks that all tensors are on the played one,
    and returns blank pictures."""
    tensors = (means, rotations, scales, opacities, harmonics, viewmats, K)
    if not all(isinstance(tensor, OnGPU) for tensor in tensors):
        raise RuntimeError("gsplat is given tensors of the CPU: more than one device")
    return (torch.zeros(len(K), height, width, 4, device=K.device),
            torch.zeros(len(K), height, width, 1, device=K.device), {})


@contextlib.contextmanager
def played_gpu():
    """with played_gpu(): a module's .to("cuda") aside, whatever is put on a GPU is on one."""
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with (patch.object(torch.cuda, "_lazy_init", lambda: None),
              patch.object(depth_anything, "free_memory", lambda device: math.inf),
              patch.dict(sys.modules, gsplat=SimpleNamespace(rasterization=rasterization)),
              patch.object(splat, "compile_gsplat", lambda: None),
              PlayedGPU(), PlayedConstants(), sdpa_kernel(SDPBackend.MATH)):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


@torch.no_grad()
def rehearse_judges(change=lambda judges: None):
    """A video of noise scored by the tiny twins on a GPU that the CPU plays; the text encoder too. -> scores

    RuntimeError where tensors of two devices or dtypes meet. change(judges): for tests, plants a mistake.
    """
    encoder, tokenizer = load_text(TINY / "wan", "cpu", torch.bfloat16)
    judges = Rewards(views=3, dtype=torch.bfloat16).load()
    networks = [encoder, judges.depth_anything, judges.lpips, judges.critic.model, judges.preference.model]
    with played_gpu():
        for module in [module for network in networks for module in network.modules()]:
            for held in (module._parameters, module._buffers):
                for name, values in held.items():
                    if values is not None:
                        held[name] = values.detach().to("cuda:0")
        judges.device = judges.home = torch.device("cuda:0")
        change(judges)
        encode_text(encoder, tokenizer, ["push_in a lighthouse"])
        video = torch.rand(5, 3, 64, 64, generator=sample.generator(0))
        clip = judges.score(video, "push_in a lighthouse", camera_path(["push_in"], 5))
    for reason in clip.errors.values():
        raise RuntimeError(reason)
    return clip.scores
