"""The four rewards of World-R1 (arXiv 2604.24764), in one process.

    python rewards.py video.mp4 "Camera push in. A red sphere ..."      the terms, and a one-page picture of them
    python rewards.py validate                                          how well each term tells good from bad

    R = S_meta + S_recon + S_traj + lambda R_gen

One Depth Anything 3 reconstruction of a video (3D Gaussians and cameras) serves the first three:
    S_meta    the Gaussians seen from beside the path, scored 0-9 by a vision-language model, / 9    `meta_views`, `Critic`
    S_recon   1 - LPIPS between the frames and the Gaussians rendered at the recovered cameras
    S_traj    exp(-(alpha |translation error| + beta |rotation error|)), requested against recovered   `trajectory_reward`
    R_gen     HPSv3, a human-preference score, averaged over the first frames                          `Preference`

A video is scored alone: no score depends on the batch it came in. What fails is NaN, counted, and never a number.
What the paper does not state (alpha, beta, the meta-view's offset, the number of frames) is a named argument here.
Left out: reward servers, and rewards of single latents.
"""

import argparse
import functools
import math
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import splat
from depth_anything import load_depth_anything, plot_paths
from model import _fill, _folder, _match, _read_json

TINY = Path(__file__).parent / "tiny"
TERMS = ("meta", "recon", "traj", "general")

CRITIC_PROMPT = (
    "This picture is a 3D reconstruction, seen from a place where the camera that filmed the scene never was. Judge "
    "the geometry only, as an expert in 3D reconstruction would. Faults: bits that float in the air, flat cards that "
    "stand in for solid things, texture stretched into streaks, holes, walls that bend or come apart. Answer with one "
    "digit from 0 (the scene has collapsed) to 9 (solid, as if it had been filmed from here).")


# ---------------------------------------------------------------------------------------------------------- trajectory

def trajectory_reward(path, recovered, alpha=5.0, beta=5.0, depth=1.0):
    """S_traj in (0, 1]: exp(-(alpha mean_f |t_f - s t^_f| + beta mean_f angle(R_f, R^_f))), a float.

    path, recovered: camera-to-world (F, 4, 4), requested (scene units) and recovered (any scale and any world axes:
    both are taken relative to their frame 0). Angles in radians. All in float64. The scale is least squares' in size,
        s = |sum t . t^| / sum |t^|^2,
    and positive: a path that goes the wrong way is not mirrored, and costs more than one that stands still. Straight,
    planar and tiny paths need no special case. A target that stands still (fixed, pan) says nothing about scale: there
    s = 1 / depth, with depth the recovered scene's median depth, the length that is 1 in scene units.

    For a push_in of 0.35 / a pan of 20 degrees / an orbit of 30 degrees about a point at depth 1, recovered as:
        the same, at any scale     1.00 / 1.00 / 1.00
        double                     1.00 /  .42 /  .21
        half                       1.00 /  .65 /  .46
        a camera that stands still  .42 /  .42 /  .07
        the opposite way            .17 /  .17 /  .01
    """
    E, R = (torch.linalg.inv(p[:1]) @ p for p in (path.double().cpu(), recovered.double().cpu()))
    if E.shape != R.shape or E.shape[1:] != (4, 4):
        raise ValueError(f"paths must both be (F, 4, 4), got {tuple(path.shape)} and {tuple(recovered.shape)}")
    t, found = E[:, :3, 3], R[:, :3, 3]
    if t.square().sum() > 1e-8 * len(t):
        scale = (t * found).sum().abs() / found.square().sum().clamp_min(1e-12)
    else:
        scale = 1 / depth
    translation = (t - scale * found).norm(dim=1).mean()
    chord = (E[:, :3, :3] - R[:, :3, :3]).flatten(1).norm(dim=1) / math.sqrt(8)  # sin(angle / 2): exact for small angles too
    rotation = (2 * chord.clamp(max=1).asin()).mean()
    return float(torch.exp(-(alpha * translation + beta * rotation)))


# ------------------------------------------------------------------------------------------------------ reconstruction

def native_intrinsics(rec, height, width):
    """The reconstruction's intrinsics (V, 3, 3) in pixels of height x width."""
    h, w = rec.depth.shape[1:]
    return rec.intrinsics * torch.tensor([width / w, height / h, 1.0], device=rec.intrinsics.device)[:, None]


def meta_views(rec, side=.35, up=.2):
    """Camera-to-world (2, 4, 4): left and right of the path's middle camera, above it, looking at the scene.

    Offsets are fractions of the median depth d: position = p_mid +- side d x_mid - up d y_mid; the target is the median
    of the Gaussians' means, coordinate by coordinate. Far enough to see behind a flat card, near enough to be seen.
    """
    middle = rec.camera_to_world[len(rec.camera_to_world) // 2]
    d = rec.depth.median()
    target = rec.gaussians.means.median(0).values
    x, y, _, p = middle[:3].unbind(1)
    views = []
    for sign in (-1, 1):
        position = p + d * (sign * side * x - up * y)
        forward = F.normalize(target - position, dim=0)
        right = F.normalize(torch.linalg.cross(y, forward), dim=0)
        view = torch.eye(4, device=p.device)
        view[:3] = torch.stack([right, torch.linalg.cross(forward, right), forward, position], 1)
        views.append(view)
    return torch.stack(views)


def as_pictures(images):
    """(N, 3, H, W) in [0, 1] -> N uint8 pictures as the processors take them."""
    return list((images.clamp(0, 1) * 255).round().byte().cpu())


# ------------------------------------------------------------------------------------------- the vision-language critic

class Critic:
    """Qwen3-VL as a judge: the expectation over the digits 0-9 of the next token, / 9."""

    def __init__(self, path, device="cpu", dtype=torch.float32):
        import transformers
        folder = _folder(path, ["*.json", "*.safetensors", "merges.txt", "*.jinja"])
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"  # so that the last position is every prompt's end
        self.model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.digits = [self.processor.tokenizer.encode(str(d), add_special_tokens=False) for d in range(10)]
        if any(len(ids) != 1 for ids in self.digits) or len({ids[0] for ids in self.digits}) < 10:
            raise ValueError(f"the tokenizer of '{path}' does not hold each digit as one token; it cannot be a critic")

    def inputs(self, pictures, prompt=CRITIC_PROMPT):
        """Pictures -> the model's batch, one user turn each: the picture, then the prompt."""
        turns = [[{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": prompt}]}] for p in pictures]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True,
                                                  return_tensors="pt", processor_kwargs=dict(padding=True))

    @torch.no_grad()
    def __call__(self, images):
        """(N, 3, H, W) in [0, 1] -> digit probabilities (N, 10), float32."""
        batch = self.inputs(as_pictures(images)).to(self.model.device)
        logits = self.model(**batch, logits_to_keep=1).logits[:, -1]
        return logits[:, [ids[0] for ids in self.digits]].float().softmax(-1).cpu()


def digit_score(probabilities):
    """Digit probabilities (..., 10) -> expected digit / 9, in [0, 1]."""
    return probabilities @ (torch.arange(10.0) / 9)


# ------------------------------------------------------------------------------------------------ the preference model

REWARD_TOKEN = "<|Reward|>"


class HPSv3(nn.Module):
    """Qwen2-VL with a reward head (hidden -> 1024 -> 16 -> 2) read at the <|Reward|> token; column 0 is the score."""

    def __init__(self, config):
        super().__init__()
        import transformers
        self.model = transformers.Qwen2VLModel._from_config(config)
        width = config.text_config.hidden_size
        self.rm_head = nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))

    def hidden(self, input_ids, attention_mask, pixel_values, image_grid_thw):
        """-> (B, L, width). Positions are 0..L-1 on all three rotary axes, as the official scoring code ran (its
        transformers computed no image positions unless asked to generate)."""
        B, L = input_ids.shape
        position = torch.arange(L, device=input_ids.device).expand(3, B, L)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position,
                          pixel_values=pixel_values, image_grid_thw=image_grid_thw).last_hidden_state

    def score(self, hidden, input_ids, reward_id):
        """-> (B, 2) float32: mean and log-deviation of the score."""
        return self.rm_head(hidden[torch.arange(len(hidden)), (input_ids == reward_id).int().argmax(1)].float())

    def forward(self, reward_id, **inputs):
        return self.score(self.hidden(**inputs), inputs["input_ids"], reward_id)


def published_key(key):
    """Our parameter name -> that of the published file (transformers 4.45's layout)."""
    return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def published_instruction():
    """HPSv3's own prompt, which is part of what its weights know, read from the installed hpsv3 package (not imported)."""
    import ast
    from importlib.util import find_spec
    spec = find_spec("hpsv3")
    if spec is None:
        raise ValueError("HPSv3's prompt is part of the model: pip install --no-deps hpsv3 (only its text is read)")
    tree = ast.parse((Path(spec.origin).parent / "dataset" / "data_collator_qwen.py").read_text())
    texts = {t.id: node.value.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
             for t in node.targets if isinstance(t, ast.Name)}
    return texts["INSTRUCTION"] + texts["prompt_with_special_token"]


class Preference:
    """HPSv3 (arXiv 2508.03789): images and prompts -> scores, unbounded, about 0 to 10 for the published weights.

    path: a folder or hub id with HPSv3.safetensors. Config and processor come from the same folder when it has a
    config.json, else from `base`. hpsv3.json in the folder may hold the prompt and the picture size it was trained with.
    """

    def __init__(self, path, device="cpu", dtype=torch.float32, base="Qwen/Qwen2-VL-7B-Instruct"):
        import transformers
        folder = _folder(path, ["HPSv3.safetensors", "*.json", "*.jinja"])
        file = folder / "HPSv3.safetensors"
        if not file.exists():
            raise ValueError(f"{folder} lacks HPSv3.safetensors; download MizzenAI/HPSv3")
        base = folder if (folder / "config.json").exists() else _folder(base, ["*.json", "merges.txt", "*.jinja"])
        own = _read_json(folder / "hpsv3.json") if (folder / "hpsv3.json").exists() else {}
        self.instruction = own.get("instruction") or published_instruction()
        pixels = own.get("image_pixels", 256 * 28 * 28)
        self.processor = transformers.AutoProcessor.from_pretrained(base)
        self.processor.tokenizer.padding_side = "right"
        self.processor.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        self.processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
        self.reward_id = self.processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        config = transformers.Qwen2VLConfig.from_pretrained(base)
        config.text_config.vocab_size = len(self.processor.tokenizer)
        with torch.device("meta"):
            model = HPSv3(config)
        _fill(model, _match(model, [file], published_key, device, unused={"lm_head.weight"}), device, dtype)
        # rotary frequencies are no part of the file: made anew, then rounded to dtype as the official .to(bf16) does
        model.model.language_model.rotary_emb = type(model.model.language_model.rotary_emb)(config.text_config)
        model.model.visual.rotary_pos_emb = type(model.model.visual.rotary_pos_emb)(config.vision_config)
        self.model = model.to(device=device, dtype=dtype)
        self.model.rm_head.float()

    def inputs(self, pictures, prompts):
        text = [self.instruction.replace("{text_prompt}", p) for p in prompts]
        turns = [[{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": t}]}] for p, t in zip(pictures, text)]
        batch = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True,
                                                   return_tensors="pt", processor_kwargs=dict(padding=True))
        batch.pop("mm_token_type_ids", None)
        return batch

    @torch.no_grad()
    def __call__(self, images, prompts):
        """(N, 3, H, W) in [0, 1] and N prompts -> scores (N,), float32."""
        batch = self.inputs(as_pictures(images), prompts).to(self.model.rm_head[0].weight.device)
        return self.model(**batch, reward_id=self.reward_id)[:, 0].cpu()


# --------------------------------------------------------------------------------------------------- perceptual distance

def load_lpips(trunk="alex", device="cpu"):
    """The lpips package's distance with its calibrated heads. trunk: alex (downloads AlexNet's weights on first use), or
    random: a seeded random AlexNet, a *stand-in* for machines without them, whose numbers are not LPIPS numbers."""
    import lpips
    if trunk not in ("alex", "random"):
        raise ValueError(f"the LPIPS trunk must be alex or random, got '{trunk}'")
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips asks torchvision in words that it deprecates
            torch.manual_seed(0)
            return lpips.LPIPS(net="alex", pnet_rand=trunk == "random", verbose=False).to(device).requires_grad_(False)
    except OSError as e:
        raise ValueError(f"AlexNet's weights for LPIPS could not be fetched ({e}); use --lpips random for a stand-in") from None


@torch.no_grad()
def lpips_distance(network, a, b):
    """Mean LPIPS of two videos (F, 3, H, W) in [0, 1], a float."""
    return float(network(a, b, normalize=True).mean())


# ------------------------------------------------------------------- motion: watched beside the rewards, never one of them

def motion_magnitude(video, size=32):
    """How much a video (F, 3, H, W) moves by itself, the camera's share taken out: a float, in percent of its width a frame.

    Optical flow between neighbours (Lucas-Kanade on two pyramid levels, at `size` pixels wide), less the best-fitting
    quadratic field (what panning, zooming and turning do to a distant scene), mean length over pixels and frames.
    A still scene filmed by a moving camera reads near 0, but for parallax.
    """
    F_, _, H, W = video.shape
    grey = F.interpolate(video.float().mean(1, keepdim=True), size=(max(8, round(H * size / W)), size), mode="area")
    flow = lucas_kanade(grey[:-1], grey[1:])  # (F-1, 2, h, w)
    h, w = flow.shape[2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    basis = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1).view(-1, 6)
    field = flow.flatten(2).mT  # (F-1, hw, 2)
    weight = torch.ones_like(field[..., :1])
    for _ in range(4):  # iteratively reweighted: objects that move must not bend the camera's field
        B = basis * weight.sqrt()
        fit = basis @ torch.linalg.solve(B.mT @ B + 1e-4 * torch.eye(6), B.mT @ (weight.sqrt() * field))
        weight = 1 / (1 + ((field - fit).norm(dim=-1, keepdim=True) / .1).square())
    return float((field - fit).norm(dim=-1).mean() * 100 / w)


def lucas_kanade(a, b, levels=2, window=5, rounds=3):
    """Dense flow (N, 2, H, W) in pixels from pictures a to b (N, 1, H, W): coarse to fine, least squares in a window."""
    flow = None
    for level in reversed(range(levels)):
        A, B = (F.avg_pool2d(x, 2 ** level) if level else x for x in (a, b))
        N, _, H, W = A.shape
        flow = torch.zeros(N, 2, H, W) if flow is None else 2 * F.interpolate(flow, size=(H, W), mode="bilinear", align_corners=False)
        gy, gx = torch.gradient(A, dim=(2, 3))
        v, u = torch.meshgrid(torch.arange(H) + .5, torch.arange(W) + .5, indexing="ij")
        box = lambda x: F.avg_pool2d(x, window, 1, window // 2)  # noqa: E731
        xx, xy, yy = box(gx * gx) + 1e-4, box(gx * gy), box(gy * gy) + 1e-4
        for _ in range(rounds):
            grid = torch.stack([(u + flow[:, 0]) * 2 / W - 1, (v + flow[:, 1]) * 2 / H - 1], -1)
            error = F.grid_sample(B, grid, mode="bilinear", padding_mode="border", align_corners=False) - A
            ex, ey = box(error * gx), box(error * gy)
            step = torch.cat([xy * ey - yy * ex, xy * ex - xx * ey], 1) / (xx * yy - xy * xy)
            flow = flow + step.clamp(-2, 2)
    return flow


# ------------------------------------------------------------------------------------------------------------- together

class Rewards:
    """All four, each model loaded on first use. `failures` counts masked terms; `reasons` keeps the latest error of each."""

    def __init__(self, depth_anything=TINY / "depth_anything", critic=TINY / "qwen3_vl", preference=TINY / "hpsv3", lpips="random",
                 views=9, first=4, alpha=5.0, beta=5.0, weights=None, device="cpu", dtype=None):
        self.paths = dict(depth_anything=depth_anything, critic=critic, preference=preference, lpips=lpips)
        self.views, self.first, self.alpha, self.beta, self.device = views, first, alpha, beta, torch.device(device)
        self.weights = {name: 1.0 for name in TERMS} | (weights or {})
        unknown = set(self.weights) - set(TERMS)
        if unknown:
            raise ValueError(f"unknown reward term '{sorted(unknown)[0]}'; the terms are {', '.join(TERMS)}")
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.failures, self.reasons = Counter(), {}

    @functools.cached_property
    def depth_anything(self):
        return load_depth_anything(self.paths["depth_anything"], self.device)

    @functools.cached_property
    def critic(self):
        return Critic(self.paths["critic"], self.device, self.dtype)

    @functools.cached_property
    def preference(self):
        return Preference(self.paths["preference"], self.device, self.dtype)

    @functools.cached_property
    def lpips(self):
        return load_lpips(self.paths["lpips"], self.device)

    def needed(self, dynamic=False):
        """Names of the models that the weighted terms use."""
        use = {"preference"} if self.weights["general"] else set()
        if not dynamic:
            use |= {"critic"} if self.weights["meta"] else set()
            use |= {"lpips"} if self.weights["recon"] else set()
            use |= {"depth_anything"} if any(self.weights[t] for t in ("meta", "recon", "traj")) else set()
        return use

    def load(self, dynamic=False):
        """Loads what is needed now instead of on first use, so that a wrong path is an error before any long work."""
        for name in sorted(self.needed(dynamic)):
            getattr(self, name)
        return self

    def to(self, device):
        """Moves the loaded models, e.g. to the CPU while the policy trains (--offload)."""
        self.device = torch.device(device)
        for name in ("depth_anything", "critic", "preference", "lpips"):
            if name in self.__dict__:
                model = self.__dict__[name]
                (model if isinstance(model, nn.Module) else model.model).to(device)
        return self

    def _term(self, name, scores, function, *args):
        if not self.weights[name]:
            return
        try:
            value = float(function(*args))
            if not math.isfinite(value):
                raise ValueError(f"the score is {value}")
            scores[name] = value
        except Exception as e:  # a critic's failure must not become a number, nor stop the other terms
            self.failures[name] += 1
            self.reasons[name] = f"{type(e).__name__}: {e}"

    @torch.no_grad()
    def score(self, video, prompt, path, dynamic=False):
        """One video (F, 3, H, W) -> {term: float}, and what a picture of the scores needs. NaN where a term failed."""
        scores, seen = {name: math.nan for name in TERMS}, {}

        def reconstruct():
            if len(video) < 2:
                raise ValueError("one frame shows no camera path")
            rec = self.depth_anything(video, self.views)
            seen.update(rec=rec, K=native_intrinsics(rec, *video.shape[2:]))
            return 0.0

        def meta():
            rec = seen["rec"]
            seen["views"] = splat.render(rec.gaussians, meta_views(rec), seen["K"][:2], *video.shape[2:])[0]
            seen["digits"] = self.critic(seen["views"])
            return digit_score(seen["digits"]).mean()

        def recon():
            rec = seen["rec"]
            seen["render"] = splat.render(rec.gaussians, rec.camera_to_world, seen["K"], *video.shape[2:])[0].clamp(0, 1)
            return 1 - lpips_distance(self.lpips, seen["render"], video[rec.frames].to(self.device))

        def traj():
            rec = seen["rec"]
            return trajectory_reward(path[rec.frames], rec.camera_to_world, self.alpha, self.beta, float(rec.depth.median()))

        def general():
            if not video.isfinite().all():
                raise ValueError("frames have NaN or infinite pixels")
            return self.preference(video[:self.first], [prompt] * len(video[:self.first])).mean()

        if not dynamic and "depth_anything" in self.needed():
            try:
                reconstruct()
            except Exception as e:
                for name in ("meta", "recon", "traj"):
                    self.failures[name] += bool(self.weights[name])
                    self.reasons[name] = f"{type(e).__name__}: {e}"
            if seen:
                self._term("meta", scores, meta)
                self._term("recon", scores, recon)
                self._term("traj", scores, traj)
        self._term("general", scores, general)
        return scores, seen

    def terms(self, videos, prompts, paths, dynamic=False, progress=False):
        """As a call, but it is no error when every sample fails."""
        rows = [self.score(*item, dynamic)[0] for item in tqdm(list(zip(videos, prompts, paths, strict=True)), desc="rewards",
                                                              unit="video", leave=False, disable=not progress)]
        out = {name: torch.tensor([row[name] for row in rows]) for name in TERMS}
        out["three_d"], out["total"] = combine(out, self.weights, dynamic)
        return out

    def __call__(self, videos, prompts, paths, dynamic=False, progress=False):
        """B videos (F, 3, H, W), prompts, requested paths (F, 4, 4) -> {meta, recon, traj, three_d, general, total: (B,)}.

        float32; NaN = masked, or not asked for (weight 0, or 3D terms with dynamic=True). A term that is asked for and
        failed masks the total. dynamic: the preference alone, no 3D work. Raises when no sample has a total.
        """
        out = self.terms(videos, prompts, paths, dynamic, progress)
        if out["total"].isnan().all():
            raise RuntimeError("every sample's reward failed; " + "; ".join(f"{k}: {v}" for k, v in self.reasons.items()))
        return out


def combine(terms, weights, dynamic=False):
    """The weighted sum: terms {name: (B,)} -> three_d, total (B,). A dynamic prompt's total is the general term alone."""
    def of(names):
        parts = [weights[n] * terms[n] for n in names if weights[n]]
        return sum(parts) if parts else torch.zeros_like(terms["general"])

    three_d = torch.full_like(terms["general"], math.nan) if dynamic else of(("meta", "recon", "traj"))
    return three_d, of(("general",)) if dynamic else three_d + of(("general",))


def load_rewards(**options):
    """A `Rewards`; without options, the tiny twins. Models are loaded on first use, or at once by `.load()`."""
    return Rewards(**options)


# ------------------------------------------------------------------------------------------------------------- validity

def spearman(a, b):
    """Rank correlation of two vectors (ties by order of appearance)."""
    a, b = a.argsort().argsort().double(), b.argsort().argsort().double()
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def bootstrap(statistic, *sizes, draws=2000):
    """A statistic of samples of the given sizes with its bootstrap 95 % interval -> (value, low, high). statistic(weights,
    ...) takes how often each member was drawn, (draws, n) for each size n, and returns (draws,)."""
    g, weights = torch.Generator().manual_seed(0), []
    for n in sizes:
        drawn = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, torch.randint(n, (draws, n), generator=g), torch.ones(draws, n, dtype=torch.float64))
        weights.append(torch.cat([torch.ones(1, n, dtype=torch.float64), drawn]))  # first the sample itself
    found = statistic(*weights)
    return found[0].item(), found[1:].quantile(.025).item(), found[1:].quantile(.975).item()


def _beats(better, worse):
    return (better > worse).double() + .5 * (better == worse).double()


def win_rate(better, worse):
    """Share of pairs ranked right, ties counting half, with its bootstrap 95 % interval -> (rate, low, high)."""
    right = _beats(torch.as_tensor(better), torch.as_tensor(worse))
    return bootstrap(lambda w: w @ right / len(right), len(right))


def auc(better, worse):
    """Area under the ROC curve, the chance that any one of the better outranks any one of the worse, ties counting half,
    with its bootstrap 95 % interval -> (area, low, high)."""
    M = _beats(torch.as_tensor(better)[:, None], torch.as_tensor(worse)[None])
    return bootstrap(lambda a, b: ((a @ M) * b).sum(1) / M.numel(), *M.shape)


@torch.no_grad()
def validate(rewards, num=200, seed=0, levels=5):
    """On `num` held-out tiny-world clips, how well each term tells good from bad. Prints a table, returns its rows.

    pairs: share of (clip, its bad copy) ranked right, the copies' strengths drawn from [1/2, 1]; AUC: good against bad
    copies across clips; rho: mean over clips of the rank correlation of score and strength at `levels` strengths.
    The total is the plain sum, and, as train.py's --standardise --pooled has it, the sum of the terms each compared inside
    its group (a clip and its copies) and divided by its spread there.
    """
    from grpo import standardise
    from noise_warp import MOTIONS, camera_path
    from tiny_world import CORRUPTIONS, DAMAGE, DEGRADATIONS, corrupt, damage, degrade, random_scene, render
    import random
    table = {}

    grid = torch.linspace(0, 1, levels)

    def note(name, kind, score):  # score(strength) -> float, or a list of them to be summed at the end
        strength = rng.uniform(.5, 1)
        row = table.setdefault(name, dict(good=[], bad=[], kind=[], grid=[]))
        row["good"].append(score(0.0)), row["bad"].append(score(strength)), row["kind"].append(kind)
        if i < num // 4:
            row["grid"].append([score(float(s)) for s in grid])

    for i in tqdm(range(num), desc="validate", unit="clip"):
        rng = random.Random(f"{seed}/{i}")
        scene = random_scene(f"validate/{seed}", "static", i)
        path, draw = camera_path(scene.motions, 17), torch.Generator()
        clip = render(scene)["video"]
        memory = {}

        def terms(kind, strength):
            key = kind if strength else "", strength
            if key not in memory:
                video = corrupt(scene, kind, strength, i) if strength else clip
                scores, seen = rewards.score(video, scene.caption, path)
                memory[key] = scores, seen, video, seen["rec"]
            return memory[key]

        kind = CORRUPTIONS[i % 3]  # freeze is a rigid world: the path's business, not the re-render's
        note("recon: clip against corrupted", kind, lambda s: terms(kind, s)[0]["recon"])
        still = scene.motions == ["fixed"]  # which cannot be frozen
        every = CORRUPTIONS[i % 4] if not still else kind
        note("total: clip against corrupted", every, lambda s: [terms(every, s)[0][t] for t in TERMS])

        def where_asked(video, rec, K):  # the twin's units are the room's
            asked = rec.camera_to_world[:1] @ (torch.linalg.inv(path[rec.frames[:1]]) @ path[rec.frames]).float()
            return 1 - lpips_distance(rewards.lpips, splat.render(rec.gaussians, asked, K, 64, 64)[0].clamp(0, 1), video[rec.frames])

        note("re-render where the prompt asked", every, lambda s: where_asked(*terms(every, s)[2:], terms(every, s)[1]["K"]))
        if not still:
            note("traj: motion against weaker motion", "freeze", lambda s: terms("freeze", s)[0]["traj"])
        rec, K = terms("", 0.0)[1]["rec"], terms("", 0.0)[1]["K"]
        broken = DAMAGE[i % 4]

        def judged(s):
            r = damage(rec, broken, s, draw.manual_seed(i)) if s else rec
            return float(digit_score(rewards.critic(splat.render(r.gaussians, meta_views(rec), K[:2], 64, 64)[0])).mean())

        note("meta: reconstruction against broken", broken, judged)
        ugly = DEGRADATIONS[i % 4]
        frames = clip[:rewards.first]
        note("general: frames against degraded", ugly, lambda s: float(rewards.preference(
            torch.stack([degrade(f, ugly, s, draw.manual_seed(i)) if s else f for f in frames]), [scene.caption] * len(frames)).mean()))
        wrong = rng.choice([m for m in MOTIONS if [m] != scene.motions])
        row = table.setdefault("traj: right word against wrong", dict(good=[], bad=[], kind=[], grid=[]))
        row["good"].append(terms("", 0.0)[0]["traj"]), row["kind"].append("word")
        row["bad"].append(trajectory_reward(camera_path([wrong], 17)[rec.frames], rec.camera_to_world, rewards.alpha, rewards.beta, float(rec.depth.median())))

    def by_group(x):  # (groups, members, terms) -> (groups, members)
        ids = torch.arange(len(x)).repeat_interleave(x.shape[1])
        return sum(standardise(x[..., t].flatten(), ids, pooled=True).view(x.shape[:2]) for t in range(x.shape[2]))

    row = table.pop("total: clip against corrupted")
    pairs, steps = torch.tensor([row["good"], row["bad"]]).transpose(0, 1), torch.tensor(row["grid"])
    for how, total in (("total, plain sum", lambda x: x.sum(-1)), ("total, standardised in its group", by_group)):
        table[how] = dict(good=total(pairs)[:, 0], bad=total(pairs)[:, 1], kind=row["kind"], grid=total(steps))
    for name, row in table.items():
        row.update(pairs=win_rate(row["good"], row["bad"]), auc=auc(row["good"], row["bad"]))
        line = f"{name:36} {len(row['good']):3} pairs " + "  ".join("{} {:.3f} [{:.3f}, {:.3f}]".format(k, *row[v]) for k, v in (("right", "pairs"), ("AUC", "auc")))
        if len(row["grid"]):
            row["spearman"] = sum(spearman(-torch.as_tensor(scores), grid) for scores in row["grid"]) / len(row["grid"])
            line += f"  rho {row['spearman']:.2f}"
        kinds = {k: win_rate(*zip(*[(g, b) for g, b, q in zip(row["good"], row["bad"], row["kind"]) if q == k]))[0] for k in dict.fromkeys(row["kind"])}
        print(line + ("  " + ", ".join(f"{k} {v:.2f}" for k, v in kinds.items()) if len(kinds) > 1 else ""))
    return table


# ----------------------------------------------------------------------------------------------------- the command line

def page(file, video, prompt, path, scores, seen, size=128):
    """One PNG: the terms; input frames over their re-render; the meta-views with their digits; requested and found path."""
    from PIL import Image, ImageDraw
    picture = Image.new("RGB", (6 * size + 20, 4 * size + 170), "white")
    draw = ImageDraw.Draw(picture)

    def put(image, x, y):
        pixels = F.interpolate(image[None].cpu(), size=(size, size), mode="nearest-exact" if image.shape[-1] <= size else "area")[0]
        picture.paste(Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()), (x, y))

    draw.text((10, 8), prompt[:120], fill="black")
    draw.text((10, 24), "   ".join(f"{'S_' if t != 'general' else 'R_'}{t} {scores[t]:.3f}" for t in TERMS), fill="black")
    rec = seen.get("rec")
    for row, (name, frames) in enumerate((("input", video[rec.frames] if rec else video), ("re-render at the recovered cameras", seen.get("render")))):
        draw.text((10, 46 + row * (size + 20)), name, fill="black")
        if frames is not None:
            for column, f in enumerate(torch.linspace(0, len(frames) - 1, 6).round().long()):
                put(frames[f], 10 + column * size, 60 + row * (size + 20))
    top = 66 + 2 * (size + 20)
    draw.text((10, top - 18), "meta-views, and the critic's digits 0 to 9", fill="black")
    for k, view in enumerate(seen.get("views", [])):
        put(view, 10 + 2 * k * size, top)
        for digit, p in enumerate(seen["digits"][k].tolist()):
            x = 10 + (2 * k + 1) * size + 6 + digit * (size - 12) // 10
            draw.rectangle((x, top + size - 12 - int(p * (size - 16)), x + (size - 12) // 10 - 3, top + size - 12), fill="steelblue")
            draw.text((x, top + size - 11), str(digit), fill="black")
    draw.text((10 + 4 * size, top - 18), "camera: asked (grey), found (red)", fill="black")
    if rec:
        E, R = (torch.linalg.inv(p[:1]) @ p for p in (path[rec.frames].double(), rec.camera_to_world.double().cpu()))
        R[:, :3, 3] /= float(rec.depth.median())
        picture.paste(plot_paths({"grey": E, "firebrick": R}, size), (10 + 4 * size, top))
    part = Path(file).with_name(f".{Path(file).stem}.part.png")
    picture.crop((0, 0, picture.width, top + size + 20)).save(part)
    part.rename(file)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", help="an mp4, or the word validate")
    parser.add_argument("prompt", nargs="?", help="what the video was asked to show, camera words included")
    parser.add_argument("--out", type=Path, help="the picture (default: beside the video)")
    parser.add_argument("--depth-anything", default=TINY / "depth_anything", help="folder or hub id, e.g. depth-anything/DA3-GIANT")
    parser.add_argument("--critic", default=TINY / "qwen3_vl", help="folder or hub id, e.g. Qwen/Qwen3-VL-4B-Instruct")
    parser.add_argument("--preference", default=TINY / "hpsv3", help="folder or hub id, e.g. MizzenAI/HPSv3")
    parser.add_argument("--lpips", choices=("alex", "random"), default="random", help="trunk; random is a stand-in without downloads")
    parser.add_argument("--views", type=int, default=9, help="frames that are reconstructed, evenly spread")
    parser.add_argument("--num", type=int, default=200, help="validate: clips")
    parser.add_argument("--seed", type=int, default=0, help="validate: of the clips")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    from noise_warp import camera_path, parse_motion
    from sample import read_video
    rewards = Rewards(a.depth_anything, a.critic, a.preference, a.lpips, a.views, device=a.device)
    try:
        if a.video == "validate":
            validate(rewards.load(), a.num, a.seed)
            return 0
        if not a.prompt:
            raise ValueError('give the prompt as well: python rewards.py video.mp4 "Camera push in. ..."')
        video, _ = read_video(a.video)
        rewards.load()
    except (ValueError, OSError) as e:
        print(f"rewards.py: {e}", file=sys.stderr)
        return 2
    path = camera_path(parse_motion(a.prompt), len(video))
    scores, seen = rewards.score(video, a.prompt, path)
    for name in TERMS:
        print(f"{name:8} {scores[name]:.4f}" + (f"   ({rewards.reasons[name]})" if name in rewards.reasons else ""))
    print(f"{'total':8} {sum(scores.values()):.4f}" + ("   (recon: random LPIPS trunk, a stand-in)" if a.lpips == "random" else ""))
    out = a.out or Path(a.video).with_suffix(".rewards.png")
    page(out, video, a.prompt, path, scores, seen)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
