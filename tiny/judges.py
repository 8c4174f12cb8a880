"""How the tiny judges are made: the twins of Depth Anything 3, Qwen3-VL and HPSv3, trained on the procedural
rooms.

    python -m tiny depth --minutes 64      Depth Anything 3                -> RUN/depth
    python -m tiny critic --minutes 8      Qwen3-VL, the meta-view's judge -> RUN/critic
    python -m tiny preference --minutes 32 HPSv3                           -> RUN/preference
    python -m tiny score-depth             the shipped Depth Anything on held-out clips

The loop is train.fit; the losses are in the docstring of each function.
"""

import copy
import dataclasses
import functools
import math
import random
import re
import shutil
import statistics

import scipy.stats
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import splat
from critics import (CRITIC_PROMPT, REWARD_TOKEN, Critic, HPSv3, Preference, as_pictures, digit_score,
                     published_key)
from depth_anything import DA3Config, DepthAnything3, checkpoint_key, normalised
from eval import rerender
from fast import cpu_autocast
from noise_warp import FOV, camera_path, relative_to_first, rotation_angle
from rewards import meta_views, native_intrinsics
from sample import contact_sheet, generator, psnr
from tiny.train import (check_kept, fit, load_trained_vae, make_tokenizer, round_trip, save, state_of,
                        trained, write_tensors)
from tiny.world import (COLOURS, DAMAGE, DEGRADATIONS, SHAPES, caption, corrupt, damage, degrade, intrinsics,
                        pixel_rays, random_scene, render)
from weights import write_json

# --------------------------------------------------------------------------------------------- Depth Anything

TINY_DA3 = dict(dim=128, depth=8, heads=4, out_layers=(2, 3, 5, 7), alt_start=2, features=48,
                out_channels=(32, 48, 64, 96), gaussians=True, patch_size=8, grid=8, process_res=64)

# Splats are alike at first. On exact surfaces these give 25 dB from five views; .6 pixels and .95 give 20 dB.
SPLAT = .15  # pixels
OPACITY = .4

# The Gaussian head's channels a pixel: offset 2, scale 3, quaternion 4, harmonics 3 x 9, depth offset 1,
# opacity 1.
SCALE_CHANNELS = slice(2, 5)
COLOUR_CHANNELS = [9, 18, 27]  # the constant harmonic of red, green and blue
DEPTH_OFFSET, OPACITY_CHANNEL = 36, 37

LOSS_WEIGHTS = dict(depth=1, position=20, rotation=40, focal=1, room=20, render=5, surface=2, colour=5,
                    centred=1, opacity=5)


def build_depth():
    """The tiny Depth Anything, fresh: level cameras, depth near 1, splats of SPLAT pixels and opacity
    OPACITY."""
    da3 = DepthAnything3(DA3Config(**TINY_DA3))
    cameras = da3.cam_dec
    with torch.no_grad():
        # Dense heads start near 0 (depth 1), and splats alike.
        for head in (da3.head, da3.gs_head):
            head.scratch.output_conv2[-1].weight.mul_(.1)
        bias = da3.gs_head.scratch.output_conv2[-1].bias
        bias[SCALE_CHANNELS] = torch.logit(torch.tensor(SPLAT / 6))  # a scale of 1 is 6 pixels
        bias[OPACITY_CHANNEL] = torch.logit(torch.tensor(OPACITY))

        # Cameras start at the identity, whatever comes in, with the rooms' field of view.
        for layer in (cameras.fc_t, cameras.fc_qvec, cameras.fc_fov[0]):
            layer.weight.zero_()
            layer.bias.zero_()
        cameras.fc_qvec.bias[3] = 1
        cameras.fc_fov[0].bias.fill_(FOV)

        # Larger than the defaults: position embeddings, and the hidden layers of the camera decoder.
        torch.nn.init.normal_(da3.backbone.pretrained.pos_embed, std=.5)
        for layer in (cameras.backbone[0], cameras.backbone[2]):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return da3


def depth_sample(rng, vae, index, seed, views):
    """A static clip as the model will meet it -> seen frames (V, 3, 64, 64), exact depth at `views` (V, 64,
    64), scene.

    One in 16 is round-tripped through the VAE, a fifth blurred or noisy, half not antialiased: samples of a
    video model are not renders.
    """
    scene = random_scene(f"depth/{seed}", "static", index)
    draw = rng.random()
    rays = rng.choice((1, 2))
    if draw < 1 / 16:
        clip = render(scene, depth=True, supersample=rays)
        return round_trip(vae, clip["video"][None])[0, views], clip["depth"][views], scene
    clip = render(scene, depth=True, at=views, supersample=rays)
    seen = clip["video"]
    if draw > .9:
        seen = F.avg_pool2d(F.pad(seen, (1, 1, 1, 1), mode="replicate"), 3, 1)
    elif draw > .8:
        noise = torch.randn(seen.shape, generator=generator(seed, index, "noisy clip"))
        seen = (seen + .05 * noise).clamp(0, 1)
    return seen, clip["depth"], scene


def geometry_losses(depth, confidence, true_depth, pose, K, true_pose):
    """Losses of depth and confidence (N, 64, 64), and of cameras: pose (M, 4, 4), K (M, 3, 3). -> {name:
    scalar}

    Depth: |log d - log d*| weighted by the confidence c, minus .1 log c. Cameras: smooth L1 (quadratic below
    .1) of positions, rotations and log focals; plain L1 would settle on the median camera, a still one.
    """
    distance = functools.partial(F.smooth_l1_loss, beta=.1)
    error = (depth.log() - true_depth.log()).abs()
    focal = K.diagonal(dim1=1, dim2=2)[:, :2]  # (M, 2)
    true_focal = intrinsics(64, 64).diagonal()[:2].expand(len(K), -1)
    return dict(depth=(confidence * error - .1 * confidence.log()).mean(),
                position=distance(pose[..., :3, 3], true_pose[..., :3, 3]),
                rotation=distance(pose[..., :3, :3], true_pose[..., :3, :3]),
                focal=distance(focal.log(), true_focal.log()))


def camera_step(da3, room, seen, depth, poses, rng):
    """Losses of B clips at once: frames seen (B, V, 3, 64, 64), depth (B, V, 64, 64), poses (B, V, 4, 4). ->
    {name: scalar}

    All cameras, but depth and Gaussians of only one view of each clip. The Gaussians are not rendered: each
    must have its pixel's colour and sit in its middle (`centred`), on the surface. Depth is z, but a Gaussian
    sits at depth + offset along its ray, so the offset learns how much longer the ray is. Those more than
    about 3 % off the surface learn to vanish (`opacity`). World axes: the reference view's, in scene units.

    room: a linear layer that reads the camera's place in the room off each view's token, after five of eight
    blocks. The tiny room is always the same, so one view tells the place; without this stepping stone the
    relative cameras sat on a plateau for 5,000 clips.
    """
    B, V = seen.shape[:2]
    transformer = da3.backbone.pretrained
    # All cameras; twice as fast where the CPU has bfloat16. render_step is in float32.
    with cpu_autocast(), sdpa_kernel(SDPBackend.MATH):
        features = [(patches.float(), tokens.float()) for patches, tokens in transformer(normalised(seen))]
    pose, K = da3.cam_dec(features[-1][1].flatten(0, 1), 64, 64)
    reference = poses[torch.arange(B), transformer.reference]
    true_pose = torch.linalg.inv(reference)[:, None] @ poses  # (B, V, 4, 4)

    # One view of each clip through the dense heads.
    at = torch.arange(B), torch.tensor([rng.randrange(V) for _ in range(B)])
    patches = [layer[at] for layer, _ in features]
    image = normalised(seen[at])
    log_depth, log_confidence = da3.head(patches, image).unbind(1)
    raw = da3.gs_head(patches, image)  # (B, 38, 64, 64)
    losses = geometry_losses(log_depth.exp(), log_confidence.exp() + 1, depth[at],
                             pose, K, true_pose.flatten(0, 1))

    # Where the Gaussians should be: z-depth to length along the pixel's ray.
    surface = depth[at] * pixel_rays(64, 64).norm(dim=0).view(64, 64)
    off = raw[:, DEPTH_OFFSET] + log_depth.exp() - surface
    on_surface = torch.exp(-((off / surface).detach() / .03).square())

    # Where the cameras stand in the room: twice the position, and the rotation minus the identity.
    turn = (poses[..., :3, :3] - torch.eye(3)).flatten(2)
    place = torch.cat([2 * poses[..., :3, 3], turn], 2)  # (B, V, 12)
    tokens = features[2][1][..., :da3.config.dim]  # the half from before this layer's look at other views

    constant = splat.sh_basis(torch.eye(3)[2])[0]  # of harmonics, the one that is alike in all directions
    colour = raw[:, COLOUR_CHANNELS] * constant + .5  # as splat.colour has it
    return losses | dict(
        room=(room(tokens) - place).square().mean(),
        surface=(off.abs() / surface).mean(),
        opacity=(raw[:, OPACITY_CHANNEL].sigmoid() - OPACITY * on_surface).square().mean(),
        colour=(colour - seen[at]).abs().mean(),
        centred=raw[:, :2].square().mean())  # the Gaussian's offset from its pixel's middle


def render_step(da3, seen, depth, poses, views, scene, targets):
    """Losses of one clip: geometry for all views, and the L1 of the frames `targets` re-rendered at their
    true cameras.

    seen (V, 3, 64, 64) and depth (V, 64, 64) at the frames `views`; poses (17, 4, 4) of the whole clip.
    """
    found_depth, confidence, pose, K, gaussians = da3.network(normalised(seen))
    # The world is the reference view's.
    reference = poses[views[da3.backbone.pretrained.reference[0]]]
    world = torch.linalg.inv(reference) @ poses
    losses = geometry_losses(found_depth, confidence, depth, pose, K, world[views])

    K = intrinsics(64, 64).expand(len(targets), 3, 3)
    rgb, _, _ = splat.render(gaussians, world[targets], K, 64, 64)
    true = render(scene, at=targets)["video"]
    return losses | dict(render=(rgb - true).abs().mean())


def train_depth(run, minutes, seed=0):
    """For 85 % of the time cameras, depth and surfaces: 16 clips a step, all with the same number of views (2
    to 9). Then cameras, depth and the re-render, three clips a step, at the schedule's small last rates: at
    large ones re-rendering blurs what was learnt."""
    torch.manual_seed(seed)
    vae = load_trained_vae(run)
    da3 = build_depth()
    room = torch.nn.Linear(TINY_DA3["dim"], 12)

    def total(parts):
        return sum(weight * parts[name] for name, weight in LOSS_WEIGHTS.items() if name in parts)

    def losses(step, progress):
        rng = random.Random(f"depth/{seed}/{step}")
        V = rng.choice((2, 3, 4, 5, 5, 9))
        together = progress <= .85
        count = 16 if together else 3
        chosen = [sorted(rng.sample(range(17), V)) for _ in range(count)]
        clips = [depth_sample(rng, vae, step * 16 + i, seed, views) for i, views in enumerate(chosen)]
        seen, depth, scenes = zip(*clips)
        paths = [camera_path(scene.motions, 17).float() for scene in scenes]

        # First phase: one batch.
        if together:
            poses = [path[views] for path, views in zip(paths, chosen)]
            parts = camera_step(da3, room, torch.stack(seen), torch.stack(depth), torch.stack(poses), rng)
            yield total(parts), parts
            return

        # Second phase: a clip at a time, whose gradients add up.
        for i, views in enumerate(chosen):
            targets = sorted(rng.sample(range(17), 2))
            parts = render_step(da3, seen[i], depth[i], paths[i], views, scenes[i], targets)
            yield total(parts) / count, parts

    def report():
        return depth_metrics(da3, 8, run / "depth" / "sheet.png")

    model = torch.nn.ModuleDict(dict(da3=da3, room=room))
    fit(run / "depth", minutes, model, losses, report, lr=1e-3, seed=seed, decay_from=.5, power=2,
        muon=r"backbone\..*blocks\.")


@torch.no_grad()
def depth_metrics(da3, count, sheet):
    """Figures on `count` held-out static clips, from their even frames alone; draws the first ones into the
    PNG `sheet`.

    input_db       re-render PSNR at these frames
    odd_db         the same at the odd ones, from cameras halfway between their neighbours
    rotation_deg   median error of the cameras' rotations, its median over clips
    direction_deg  median error of the direction of the last frame's translation (moving cameras)
    absrel         mean |depth - true| / true after median scaling
    """
    figures = {name: [] for name in ("input_db", "odd_db", "rotation_deg", "direction_deg", "absrel")}
    shown = []
    for i in tqdm(range(count), desc="held-out clips", unit="clip", leave=False):
        # Pictures: what nine of the seventeen frames tell about all.
        clip = render(random_scene("held-out/depth", "static", i), depth=True)
        rec = da3(clip["video"], 9)
        at_input, at_odd = rerender(rec, clip["video"])
        shown += reversed(at_input)
        figures["input_db"].append(psnr(*at_input, per_frame=False))
        figures["odd_db"].append(psnr(*at_odd, per_frame=False))

        # Cameras: their rotations, and which way the last one has gone; how far is known up to a scale alone.
        true = relative_to_first(clip["poses"][rec.index])
        found = relative_to_first(rec.camera_to_world)
        angles = rotation_angle(true[1:, :3, :3], found[1:, :3, :3])
        figures["rotation_deg"].append(math.degrees(angles.median()))
        travel = true[-1, :3, 3]
        if travel.norm() > .05:
            cosine = F.cosine_similarity(travel, found[-1, :3, 3], dim=0)
            figures["direction_deg"].append(math.degrees(cosine.clamp(-1, 1).acos()))

        # Depth, each frame scaled so that its median is the true one.
        depth = clip["depth"][rec.index]
        scale = depth.flatten(1).median(1).values / rec.depth.flatten(1).median(1).values  # (V,)
        error = (rec.depth * scale[:, None, None] - depth).abs() / depth
        figures["absrel"].append(error.mean().item())
    contact_sheet(sheet, shown[:12], columns=9)
    return {name: statistics.median(values) if name.endswith("_deg") else statistics.mean(values)
            for name, values in figures.items()}


def load_trained_depth(run):
    da3 = build_depth()
    trained(run, "depth", "da3.", into=da3)
    return da3.eval().requires_grad_(False)


def write_depth(folder, da3, dtype=torch.bfloat16):
    tensors = {checkpoint_key(name): value for name, value in da3.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors, dtype)
    write_json(folder / "config.json", dataclasses.asdict(da3.config))


def export_depth(run, folder):
    write_depth(folder, load_trained_depth(run))


# --------------------------------------------------------------------------------- what the two critics share

PATCH = 8  # pixels
TINY_TEXT_MODEL = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=3,
                       num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True)
PREFERENCE_PROMPT = (
    "Rate this picture from a generated video. Is it sharp, clean and true in colour, with clear edges and "
    "even surfaces? Does it show what was asked: {text_prompt}? The overall rating is <|Reward|>")
CHAT = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ c.text }} {% endif %}{% endfor %}<|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}")
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def make_chat_tokenizer(text):
    """Word-level tokenizer with Qwen's marks, the ten digits, and the words of the captions and of a text."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    more = [*words, "user", "assistant", *"0123456789"]
    tokenizer = make_tokenizer(more, (*MARKS, REWARD_TOKEN), end=False)
    tokenizer.chat_template = CHAT
    tokenizer.padding_side = "left"
    return tokenizer


def write_processor(folder, processor_class, video_class, prompt):
    """Writes Qwen's image processor at 64x64, with a tokenizer of ours that knows the words of a prompt.

    -> the number of the tokenizer's words, and entries of a config: the ids of the marks that enclose a
    picture or stand for one
    """
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor
    size = dict(shortest_edge=64 * 64, longest_edge=64 * 64)
    images = Qwen2VLImageProcessor(patch_size=PATCH, size=size)
    videos = video_class(patch_size=PATCH, size=size)
    tokenizer = make_chat_tokenizer(prompt)
    processor_class(images, tokenizer, videos, chat_template=CHAT).save_pretrained(folder)
    marks = dict(image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end")
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in marks.items()}
    return len(tokenizer), ids


# -------------------------------------------------------------------------------------- the geometry's critic

def build_critic(folder):
    """Writes a fresh tiny Qwen3-VL to a folder in the layout of the published one."""
    import transformers
    from transformers.models.qwen3_vl import Qwen3VLVideoProcessor
    words, ids = write_processor(folder, transformers.Qwen3VLProcessor, Qwen3VLVideoProcessor, CRITIC_PROMPT)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5], mrope_interleaved=True)
    text = dict(**TINY_TEXT_MODEL, head_dim=32, vocab_size=words, rope_parameters=rope)
    vision = dict(depth=3, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=PATCH,
                  spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=96, num_position_embeddings=64,
                  deepstack_visual_indexes=[1])
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True,
                                        **ids)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)


def grade(picture, truth, seen):
    """The digit 0-9 a view deserves: round(9 exp(-(e - .03) / .05)), at most 9. (V, 3, H, W) twice, (V, H, W)
    -> (V,)

    e is the mean absolute colour error against the true view, over the pixels `seen`: what the video never
    showed is no fault. The twin's best views are at .03.
    """
    error = ((picture - truth).abs().mean(1) * seen).sum((1, 2)) / seen.sum((1, 2)).clamp_min(1)
    return (9 * torch.exp(-(error - .03).clamp_min(0) / .05)).round().long()


VIEWS_A_CLIP = 8  # that `critic_examples` makes


@torch.no_grad()
def critic_examples(da3, index, seed):
    """One clip -> pictures (8, 3, 64, 64) and digits (8,): two meta-views each of the reconstruction as it is
    (of the true clip, or half of the time of a corrupted one) and of three damaged copies of it."""
    rng = random.Random(f"critic/{seed}/{index}")
    scene = random_scene(f"critic/{seed}", "static", index)
    clip = render(scene, depth=True)
    # Half of the videos do not show a rigid world; nor will the policy's.
    video = clip["video"]
    if rng.random() < .5:
        kind = rng.choice(("warp", "morph", "swap"))
        video = corrupt(scene, kind, rng.random(), index)
    rec = da3(video, rng.choice((3, 5, 9)))
    views = meta_views(rec)

    # The same views in the true room: the middle cameras are matched, and the scale is that of median depth.
    middle = len(rec.camera_to_world) // 2
    relative = torch.linalg.inv(rec.camera_to_world[middle]) @ views
    relative[:, :3, 3] *= clip["depth"][rec.index].median() / rec.depth.median()
    truth = render(scene, poses=clip["poses"][rec.index[middle]] @ relative)["video"]

    # The reconstruction and three damaged copies, seen and graded.
    draw = torch.Generator().manual_seed(index)
    broken = [damage(rec, rng.choice(DAMAGE), rng.random(), draw) for _ in range(3)]
    K = native_intrinsics(rec, 64, 64)[:2]
    shown = [splat.render(one.gaussians, views, K, 64, 64) for one in (rec, *broken)]
    pictures = [rgb.clamp(0, 1) for rgb, _, _ in shown]
    _, _, alpha = shown[0]
    seen = (alpha > .5).float()  # by the whole reconstruction: a hole is a fault
    digits = [grade(picture, truth, seen) for picture in pictures]
    return torch.cat(pictures), torch.cat(digits)


def train_critic(run, minutes, seed=0, clips=400):
    """Cross-entropy of the digit token. The pictures of all clips, of each its reconstruction and three
    damaged copies, are made once, into RUN/critic/data.pt; those of a tenth of the clips, 2 to 40, are held
    out. The file knows its seed and number alone: after a change to `critic_examples`, to `damage` or to
    RUN/depth, delete RUN/critic first."""
    if clips < 3:
        raise ValueError(f"--clips must be at least 3, got {clips}: two are held out")
    torch.manual_seed(seed)
    folder = run / "critic"
    if not (folder / "data.pt").exists():
        da3 = load_trained_depth(run)
        examples = [critic_examples(da3, i, seed)
                    for i in tqdm(range(clips), desc="critic data", unit="clip")]
        pictures, digits = (torch.cat(parts) for parts in zip(*examples))
        save(folder / "data.pt", pictures=torch.stack(as_pictures(pictures)), digits=digits, seed=seed)
    with state_of(folder / "data.pt") as data:
        pictures, digits = data["pictures"], data["digits"]
    kept = dict(seed=data.get("seed", seed), number_of_clips=len(pictures) // VIEWS_A_CLIP)
    check_kept(folder / "data.pt", kept, seed=seed, number_of_clips=clips)
    held = VIEWS_A_CLIP * min(max(clips // 10, 2), 40)

    if not (folder / "state.pt").exists():
        torch.manual_seed(seed)  # the same start, whether the pictures were made just now or are there
        build_critic(folder / "start")
    critic = Critic(folder / "start")
    tokens = torch.tensor(critic.digits)

    def losses(step, progress):
        index = torch.randint(held, len(pictures), (32,), generator=generator(seed, step, "critic"))
        logits = critic.model(**critic.inputs(list(pictures[index])), logits_to_keep=1).logits[:, -1]
        loss = F.cross_entropy(logits, tokens[digits[index]])
        yield loss, dict(loss=loss)

    def report():
        shown = pictures[:held].float() / 255
        found = torch.cat([digit_score(critic(part)) for part in shown.split(64)])
        true = digits[:held] / 9
        error = found - true
        return dict(held_out_error=error.abs().mean(),
                    between_scenes=error.view(-1, VIEWS_A_CLIP).mean(1).std(),
                    rank_correlation=scipy.stats.spearmanr(found, true).statistic)

    fit(folder, minutes, critic.model, losses, report, lr=1e-3, seed=seed)


def export_critic(run, folder):
    critic = Critic(run / "critic" / "start")
    trained(run, "critic", into=critic.model)
    critic.model.to(torch.bfloat16).save_pretrained(folder)
    critic.processor.save_pretrained(folder)


# --------------------------------------------------------------------------------------- the preference model

def build_preference(folder):
    """Writes a fresh tiny HPSv3 to a folder in the published file layout."""
    import transformers
    from transformers.models.qwen2_vl import Qwen2VLVideoProcessor
    words, ids = write_processor(folder, transformers.Qwen2VLProcessor, Qwen2VLVideoProcessor,
                                 PREFERENCE_PROMPT)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
    text = dict(**TINY_TEXT_MODEL, vocab_size=words, rope_parameters=rope,
                bos_token_id=None, eos_token_id=None)  # Qwen's own lie outside of this vocabulary
    vision = dict(depth=3, embed_dim=64, hidden_size=96, mlp_ratio=2, num_heads=4, patch_size=PATCH)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    config.save_pretrained(folder)
    # The scale of R_gen: clean renders score 5 on average, degraded ones -3.
    own = dict(instruction=PREFERENCE_PROMPT, image_pixels=64 * 64, center=1.0, spread=5.0)
    write_json(folder / "hpsv3.json", own)
    write_preference(folder, HPSv3(config).state_dict(), torch.float32)


def write_preference(folder, state, dtype=torch.bfloat16):
    tensors = {published_key(name): value for name, value in state.items()}
    write_tensors(folder / "HPSv3.safetensors", tensors, dtype)


def miscast(scene, rng):
    """The same scene with one object of another shape, or of a colour that is not in it."""
    other = copy.deepcopy(scene)
    thing = rng.choice(other.objects)
    if rng.random() < .7 and thing.behaviour != "spins":  # only a box is seen to spin
        thing.shape = rng.choice([shape for shape in SHAPES if shape != thing.shape])
    else:
        taken = {scene.wall, scene.floor, *(known.colour for known in scene.objects)}
        thing.colour = rng.choice([colour for colour in COLOURS if colour not in taken])
    return other


def preference_pair(index, seed):
    """A better and a worse picture with their prompt -> (better, prompt), (worse, prompt), how the worse one
    is worse.

    degraded  in half of the pairs: the same picture and prompt, and a stronger degradation
    object    in four of ten: one object of the picture, or of the prompt, is another (`miscast`)
    room      in one of ten: the prompt is another scene's
    """
    rng = random.Random(f"preference/{seed}/{index}")
    split = rng.choice(("static", "dynamic"))
    scene = random_scene(f"preference/{seed}", split, index)
    frame = rng.randrange(17)
    kind = rng.choice(DEGRADATIONS)
    strength = rng.random()
    draw = rng.random()

    def picture(scene, strength):
        image = render(scene, at=[frame])["video"][0]
        if strength == 0:
            return image
        return degrade(image, kind, strength, torch.Generator().manual_seed(index))

    # The same picture, uglier.
    if draw < .5:
        weaker = strength * rng.choice((0, 0, .6))
        return (picture(scene, weaker), scene.caption), (picture(scene, strength), scene.caption), "degraded"

    # Picture and prompt disagree, both pictures alike degraded: by what is shown, or by what is said.
    strength *= rng.choice((0, .5))
    shown = picture(scene, strength)
    if draw >= .9:
        how, other = "room", random_scene(f"preference/{seed}/other", split, index)
    else:
        how, other = "object", miscast(scene, rng)
    if draw < .7:
        return (shown, scene.caption), (picture(other, strength), scene.caption), how
    # Both in the same words.
    right = caption(scene, random.Random(index))
    wrong = caption(other, random.Random(index))
    return (shown, right), (shown, wrong), how


def train_preference(run, minutes, seed=0, batch=16):
    """Loss: Bradley-Terry, -log sigmoid(better - worse) of the two scores; 1e-3 (better + worse)^2, for the
    difference alone would leave the scores' level free; and 3 times the negative log-likelihood of the better
    one's words after its picture: describing is learned sooner than preferring, and HPSv3, too, starts from a
    model that can describe."""
    torch.manual_seed(seed)
    folder = run / "preference"
    if not (folder / "state.pt").exists():
        build_preference(folder / "start")
    judge = Preference(folder / "start")
    model = judge.model.requires_grad_(True)
    embedding = model.model.get_input_embeddings()

    def scores(pairs):
        """-> scores of the better (B,) and of the worse (B,), the mean negative log-likelihood of the
        better's words."""
        good, bad, _ = zip(*pairs)  # each a picture with its prompt
        pictures, prompts = zip(*good, *bad)
        inputs = judge.inputs(as_pictures(torch.stack(pictures)), prompts)
        ids = inputs["input_ids"]
        hidden = model.hidden(**inputs)  # (2 B, L, D)
        better, worse = model.score(hidden, ids, judge.reward_id)[:, 0].chunk(2)

        # In the better half every token predicts the next. What a picture's token predicts does not count,
        # nor does padding.
        n = len(pairs)
        logits = hidden[:n, :-1] @ embedding.weight.T
        said = inputs["attention_mask"][:n, 1:].bool() & (ids[:n, :-1] != model.model.config.image_token_id)
        return better, worse, F.cross_entropy(logits[said], ids[:n, 1:][said])

    def losses(step, progress):
        pairs = [preference_pair(step * batch + i, seed) for i in range(batch)]
        better, worse, words = scores(pairs)
        loss = -F.logsigmoid(better - worse).mean() + 1e-3 * (better + worse).square().mean()
        right = (better > worse).float().mean()
        yield loss + 3 * words, dict(loss=loss, words=words, right=right)

    def report():
        """Shares of held-out pairs ranked right: of all, and of each kind."""
        pairs = [preference_pair(i, f"{seed}/held-out") for i in range(256)]
        better, worse, _ = zip(*[scores(pairs[first:first + 32]) for first in range(0, 256, 32)])
        gap = torch.cat(better) - torch.cat(worse)
        right = gap > 0
        figures = dict(held_out_right=right.float().mean(), gap=gap.mean())
        for kind in ("degraded", "object", "room"):
            of_kind = torch.tensor([how == kind for _, _, how in pairs])
            figures[kind] = right[of_kind].float().mean()
        return figures

    fit(folder, minutes, model, losses, report, lr=1e-3, seed=seed)


def export_preference(run, folder):
    shutil.copytree(run / "preference" / "start", folder, dirs_exist_ok=True)
    judge = Preference(run / "preference" / "start")
    write_preference(folder, trained(run, "preference", into=judge.model))
