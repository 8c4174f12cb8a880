"""How the tiny judges are made: the twins of Depth Anything 3, Qwen3-VL and HPSv3, trained on the procedural rooms.

    python tiny_world.py depth --minutes 120     Depth Anything 3                -> RUN/depth
    python tiny_world.py critic --minutes 20     Qwen3-VL, the meta-view's judge -> RUN/critic
    python tiny_world.py preference --minutes 20 HPSv3                           -> RUN/preference

The loop is tiny_train.fit; the losses are in the docstring of each function.
"""

import copy
import dataclasses
import functools
import math
import random
import re
import shutil

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import splat
from depth_anything import MEAN, STD, DA3Config, DepthAnything3, checkpoint_key, load_depth_anything, sh_basis
from noise_warp import FOV, camera_path
from rewards import CRITIC_PROMPT, Critic, HPSv3, Preference, digit_score, meta_views, native_intrinsics, published_key, spearman
from sample import contact_sheet, generator
from tiny_train import fit, load_trained_vae, make_tokenizer, psnr, save
from tiny_world import COLOURS, DAMAGE, DEGRADATIONS, SHAPES, caption, corrupt, damage, degrade, intrinsics, random_scene, render
from train import write_json

# ----------------------------------------------------------------------------------------------------- Depth Anything

TINY_DA3 = dict(dim=128, depth=8, heads=4, out_layers=(2, 3, 5, 7), alt_start=2, features=48, out_channels=(32, 48, 64, 96),
                gaussians=True, patch_size=8, grid=8, process_res=64)


SPLAT, OPACITY = .15, .4  # on exact surfaces, alike for all: 25 dB from five views; .6 pixels and .95: 20 dB


def build_depth():
    """The tiny Depth Anything, fresh: level cameras, depth near 1, splats of SPLAT pixels and opacity OPACITY."""
    da3 = DepthAnything3(DA3Config(**TINY_DA3))
    with torch.no_grad():
        for head in (da3.head, da3.gs_head):
            head.scratch.output_conv2[-1].weight.mul_(.1)
        bias = da3.gs_head.scratch.output_conv2[-1].bias
        bias[2:5], bias[37] = torch.logit(torch.tensor(SPLAT / 6)), torch.logit(torch.tensor(OPACITY))  # a scale of 1 is 6 pixels
        for layer in (da3.cam_dec.fc_t, da3.cam_dec.fc_qvec, da3.cam_dec.fc_fov[0]):  # the identity, whatever comes in
            layer.weight.zero_(), layer.bias.zero_()
        torch.nn.init.normal_(da3.backbone.pretrained.pos_embed, std=.5)
        for layer in (da3.cam_dec.backbone[0], da3.cam_dec.backbone[2]):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        da3.cam_dec.fc_qvec.bias[3] = 1
        da3.cam_dec.fc_fov[0].bias.fill_(FOV)
    return da3


def depth_sample(rng, vae, index, seed, views):
    """A static clip as the model will meet it -> seen frames (V, 3, 64, 64), exact depth at `views`, scene.

    One in 16 is round-tripped through the VAE, a fifth blurred or noisy, half not antialiased: samples of a video model
    are not renders.
    """
    scene, draw = random_scene(f"depth/{seed}", "static", index), rng.random()
    trip = draw < 1 / 16
    clip = render(scene, depth=True, at=None if trip else views, supersample=rng.choice((1, 2)))
    seen, depth = (clip["video"][views], clip["depth"][views]) if trip else (clip["video"], clip["depth"])
    if trip:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            seen = vae.decode_raw(vae.moments(clip["video"][None])[0])[0].float().clamp(0, 1)[views]
    elif draw > .9:
        seen = F.avg_pool2d(F.pad(seen, (1, 1, 1, 1), mode="replicate"), 3, 1)
    elif draw > .8:
        seen = (seen + .05 * torch.randn(seen.shape)).clamp(0, 1)
    return seen, depth, scene


def normalised(images):
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def geometry_losses(d, confidence, true_depth, pose, K, true):
    """Depth: |log d - log d*| weighted by the confidence c, minus .1 log c. Cameras: smooth L1 (quadratic below .1) of
    positions and rotation matrices, where plain L1's median is "no motion", and of log focals."""
    near = functools.partial(F.smooth_l1_loss, beta=.1)
    true_K = intrinsics(64, 64)
    return dict(depth=(confidence * (d.log() - true_depth.log()).abs() - .1 * confidence.log()).mean(), position=near(pose[..., :3, 3], true[..., :3, 3]),
                rotation=near(pose[..., :3, :3], true[..., :3, :3]), focal=near(K.diagonal(dim1=1, dim2=2)[:, :2].log(), true_K.diagonal()[:2].log().expand(len(K), -1)))


def camera_step(da3, room, seen, depth, poses, rng):
    """Losses of B clips at once, (B, V, 3, 64, 64): all cameras, and the depth and Gaussians of one view of each. The
    Gaussians are not rendered: their colour must be the pixel's, and their place the surface (they sit at ray length
    depth + offset, so the offset learns what the ray is longer), and those off it by more than some 3 % learn to vanish. The
    world is the reference view's, at the scene's scale.

    room: a linear layer on each view's token half-way up, asked for the camera's place in the room. The tiny room is
    always the same, so one view tells it; without this stepping stone, relative cameras sat on a plateau for 5,000 clips.
    """
    B, V = seen.shape[:2]
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # twice as fast; the later phase is in float32
        features = [(f.float(), t.float()) for f, t in da3.backbone.pretrained(normalised(seen))]
    pose, K = da3.cam_dec(features[-1][1].flatten(0, 1), 64, 64)
    scene, view = torch.arange(B), torch.tensor([rng.randrange(V) for _ in range(B)])
    patches, image = [f[scene, view] for f, _ in features], normalised(seen[scene, view])
    d, confidence = da3.head(patches, image).unbind(1)
    raw = da3.gs_head(patches, image)
    v, u = torch.meshgrid(torch.arange(64) + .5, torch.arange(64) + .5, indexing="ij")
    length = (torch.linalg.inv(intrinsics(64, 64)) @ torch.stack([u, v, torch.ones_like(u)]).flatten(1)).norm(dim=0).view(64, 64)
    surface = depth[scene, view] * length
    true = torch.linalg.inv(poses[torch.arange(B), da3.backbone.pretrained.reference])[:, None] @ poses
    place = torch.cat([2 * poses[..., :3, 3], (poses[..., :3, :3] - torch.eye(3)).flatten(2)], 2)
    off = ((raw[:, 36] + d.exp() - surface) / surface).detach()
    losses = geometry_losses(d.exp(), confidence.exp() + 1, depth[scene, view], pose, K, true.flatten(0, 1))
    return losses | dict(room=(room(features[2][1][..., :da3.config.dim]) - place).square().mean(), surface=((raw[:, 36] + d.exp() - surface).abs() / surface).mean(),
                         opacity=(raw[:, 37].sigmoid() - OPACITY * torch.exp(-(off / .03).square())).square().mean(),
                         colour=(raw[:, [9, 18, 27]] * sh_basis(torch.eye(3)[2])[0] + .5 - seen[scene, view]).abs().mean(), flat=raw[:, :2].square().mean())


def render_step(da3, seen, depth, poses, views, scene, targets):
    """Losses of one clip: as above for all views, and the L1 of the frames `targets` re-rendered at their true cameras."""
    d, confidence, pose, K, gaussians = da3.network(normalised(seen))
    world = torch.linalg.inv(poses[views[da3.backbone.pretrained.reference[0]]]) @ poses
    losses = geometry_losses(d, confidence, depth, pose, K, world[views])
    rgb = splat.render(gaussians, world[targets], intrinsics(64, 64).expand(len(targets), 3, 3), 64, 64)[0]
    return losses | dict(render=(rgb - render(scene, at=targets)["video"]).abs().mean())


def train_depth(run, minutes, seed=0, batch=16):
    """Cameras, depth and surfaces first, `batch` clips of as many views at once (85 % of the time); then with the re-render,
    three clips a step, at small rates: at large ones it blurs what was learnt. 2 to 9 views a clip."""
    torch.manual_seed(seed)
    vae, da3, room = load_trained_vae(run), build_depth(), torch.nn.Linear(TINY_DA3["dim"], 12)

    def total(parts):
        return parts["depth"] + 20 * parts["position"] + 40 * parts["rotation"] + parts["focal"] + 20 * parts.get("room", 0) + 5 * parts.get("render", 0) + \
            2 * parts.get("surface", 0) + 5 * parts.get("colour", 0) + parts.get("flat", 0) + 5 * parts.get("opacity", 0)

    def losses(step, progress):
        rng = random.Random(f"depth/{seed}/{step}")
        V, together = rng.choice((2, 3, 4, 5, 5, 9)), progress <= .85
        count = batch if together else 3
        choose = [sorted(rng.sample(range(17), V)) for _ in range(count)]
        data = [depth_sample(rng, vae, step * batch + i, seed, views) for i, views in enumerate(choose)]
        paths = [camera_path(scene.motions, 17).float() for *_, scene in data]
        if together:
            parts = camera_step(da3, room, torch.stack([x for x, _, _ in data]), torch.stack([d for _, d, _ in data]), torch.stack([p[v] for p, v in zip(paths, choose)]), rng)
            yield total(parts), {k: v.item() for k, v in parts.items()}
            return
        for (seen, depth, scene), path, views in zip(data, paths, choose):
            parts = render_step(da3, seen, depth, path, views, scene, sorted(rng.sample(range(17), 2)))
            yield total(parts) / count, {k: v.item() for k, v in parts.items()}

    blocks = [p for n, p in da3.backbone.named_parameters() if p.dim() == 2 and "blocks." in n]
    fit(run / "depth", minutes, torch.nn.ModuleDict(dict(da3=da3, room=room)), losses, lambda: depth_metrics(da3, 8, run / "depth" / "sheet.png"), lr=1e-3, decay_from=.5, power=2, matrices=blocks)


@torch.no_grad()
def depth_metrics(da3, count, sheet=None):
    """On held-out static clips, from their even frames alone: re-render PSNR at these and at the odd ones (cameras halfway
    between their neighbours), median rotation error in degrees and direction error of the last frame's translation (moving
    cameras), depth AbsRel after median scaling."""
    import statistics
    from eval import rerender
    shown, held, rotation, direction, absrel, rows = [], [], [], [], [], []
    for i in tqdm(range(count), desc="held-out clips", unit="clip", leave=False):
        clip = render(random_scene("held-out/depth", "static", i), depth=True)
        rec = da3(clip["video"], 9)
        pairs = rerender(rec, clip["video"])
        shown.append(psnr(*pairs[0])), held.append(psnr(*pairs[1]))
        true, found = clip["poses"][rec.frames], torch.linalg.inv(rec.camera_to_world[:1]) @ rec.camera_to_world
        cosine = ((true[:, :3, :3] * found[:, :3, :3]).sum((1, 2)) - 1) / 2
        rotation.append(math.degrees(cosine.clamp(-1, 1).acos()[1:].median()))
        a, b = true[-1, :3, 3], found[-1, :3, 3]
        if a.norm() > .05:
            direction.append(math.degrees(F.cosine_similarity(a, b, dim=0).clamp(-1, 1).acos()))
        depth = clip["depth"][rec.frames]
        scaled = rec.depth * (depth.flatten(1).median(1).values / rec.depth.flatten(1).median(1).values)[:, None, None]
        absrel.append(((scaled - depth).abs() / depth).mean().item())
        rows += pairs[0][::-1]
    if sheet:
        contact_sheet(sheet, rows[:12], columns=9)
    middle = statistics.median
    return dict(input_db=statistics.mean(shown), odd_db=statistics.mean(held), rotation_deg=middle(rotation),
                direction_deg=middle(direction), absrel=statistics.mean(absrel))


def score_depth(a):
    """`tiny_world.py score-depth`: the figures above on --num held-out clips."""
    for name, value in depth_metrics(load_depth_anything(a.model), a.num, a.run / "score-depth.png").items():
        print(f"{name:14} {value:.3f}")


def load_trained_depth(run):
    da3 = build_depth()
    state = torch.load(run / "depth" / "state.pt", weights_only=True)["ema"]
    da3.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("da3.")})
    return da3.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------- the two critics

TINY_TEXT_MODEL = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
                       max_position_embeddings=1024, tie_word_embeddings=True)
PREFERENCE_PROMPT = ("Rate this picture from a generated video. Is it sharp, clean and true in colour, with clear edges and even "
                     "surfaces? Does it show what was asked: {text_prompt}? The overall rating is <|Reward|>")
CHAT = ("{% for m in messages %}<|im_start|> {{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}<|vision_start|> <|image_pad|> "
        "<|vision_end|> {% else %}{{ c.text }} {% endif %}{% endfor %}<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}")
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def make_chat_tokenizer(*texts):
    """Word-level tokenizer with Qwen's marks, the ten digits, and the words of the captions and of the given texts."""
    words = [w for t in texts for w in re.findall(r"[a-z0-9]+", t.lower())] + ["user", "assistant", *map(str, range(10))]
    tokenizer = make_tokenizer(words, MARKS + ("<|Reward|>",), end=False)
    tokenizer.chat_template = CHAT
    tokenizer.padding_side = "left"
    return tokenizer


def make_processor(cls, tokenizer, patch):
    """Qwen's image processor at 64x64, with a tokenizer of ours. cls: of transformers, Qwen3VLProcessor or Qwen2VLProcessor."""
    import transformers
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl import Qwen3VLVideoProcessor
    size = dict(shortest_edge=64 * 64, longest_edge=64 * 64)
    video = Qwen3VLVideoProcessor if cls == "Qwen3VLProcessor" else Qwen2VLVideoProcessor
    return getattr(transformers, cls)(Qwen2VLImageProcessor(patch_size=patch, size=size), tokenizer, video(patch_size=patch, size=size),
                                      chat_template=CHAT)


def build_critic(folder):
    """A fresh tiny Qwen3-VL written to a folder in the layout of the published one, and loaded from it."""
    import transformers
    processor = make_processor("Qwen3VLProcessor", make_chat_tokenizer(CRITIC_PROMPT), 8)
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in
           (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5], mrope_interleaved=True)
    config = transformers.Qwen3VLConfig(
        text_config=dict(**TINY_TEXT_MODEL, head_dim=32, vocab_size=len(tokenizer), rope_parameters=rope),
        vision_config=dict(depth=3, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=8, spatial_merge_size=2, temporal_patch_size=2,
                           out_hidden_size=96, num_position_embeddings=64, deepstack_visual_indexes=[1]), tie_word_embeddings=True, **ids)
    model = transformers.Qwen3VLForConditionalGeneration(config)
    model.save_pretrained(folder), processor.save_pretrained(folder)
    return Critic(folder)


def build_preference(folder):
    """A fresh tiny HPSv3 in the published file layout, and loaded from it."""
    import transformers
    processor = make_processor("Qwen2VLProcessor", make_chat_tokenizer(PREFERENCE_PROMPT), 8)
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in
           (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
    config = transformers.Qwen2VLConfig(
        text_config=dict(**TINY_TEXT_MODEL, vocab_size=len(tokenizer), rope_parameters=rope),
        vision_config=dict(depth=3, embed_dim=64, hidden_size=96, mlp_ratio=2, num_heads=4, patch_size=8), **ids)
    model = HPSv3(config)
    config.save_pretrained(folder), processor.save_pretrained(folder)
    write_json(folder / "hpsv3.json", dict(instruction=PREFERENCE_PROMPT, image_pixels=64 * 64))
    save_file({published_key(k): v.contiguous() for k, v in model.state_dict().items()}, folder / "HPSv3.safetensors")
    return Preference(folder)


def true_poses(rec, poses, views):
    """Camera-to-world `views` (V, 4, 4) in the reconstruction's world -> in the true one, given the true poses (F, 4, 4).

    The middle cameras are matched, and the scale is that of median depth over the reconstruction's (`scale` per unit).
    """
    middle = len(rec.camera_to_world) // 2
    relative = torch.linalg.inv(rec.camera_to_world[middle]) @ views
    relative[:, :3, 3] *= rec.true_scale
    return poses[rec.frames[middle]] @ relative


def grade(render, truth, seen):
    """The digit 0-9 a view deserves: round(9 exp(-(e - .03) / .05)), at most 9, e the mean absolute colour error against the
    true view, over the pixels `seen` (V, H, W): what the video never showed is no fault. The twin's best views are at .03."""
    error = ((render - truth).abs().mean(1) * seen).sum((1, 2)) / seen.sum((1, 2)).clamp_min(1)
    return (9 * torch.exp(-(error - .03).clamp_min(0) / .05)).round().long()


@torch.no_grad()
def critic_examples(da3, index, seed):
    """One clip -> pictures (8, 3, 64, 64) and digits (8,): two meta-views each of the reconstruction as it is (of the
    true clip, or half of the time of a corrupted one) and of three damaged copies of it."""
    rng = random.Random(f"critic/{seed}/{index}")
    scene = random_scene(f"critic/{seed}", "static", index)
    clip = render(scene, depth=True)
    video = corrupt(scene, rng.choice(("warp", "morph", "swap")), rng.random(), index) if rng.random() < .5 else clip["video"]
    rec = da3(video, rng.choice((3, 5, 9)))
    rec.true_scale = clip["depth"][rec.frames].median() / rec.depth.median()
    views = meta_views(rec)
    truth = render(scene, poses=true_poses(rec, clip["poses"], views.clone()))["video"]
    K = native_intrinsics(rec, 64, 64)[:2]
    draw = torch.Generator().manual_seed(index)
    copies = [rec] + [damage(rec, rng.choice(DAMAGE), rng.random(), draw) for _ in range(3)]
    shown, _, alphas = zip(*[splat.render(r.gaussians, views, K, 64, 64) for r in copies])
    shown, seen = [x.clamp(0, 1) for x in shown], (alphas[0] > .5).float()
    return torch.cat(shown), torch.cat([grade(x, truth, seen) for x in shown])


def train_critic(run, minutes, seed=0, clips=400, batch=32):
    """Cross-entropy of the digit token. The pictures of `clips` reconstructions are made once, into RUN/critic/data.pt."""
    torch.manual_seed(seed)
    folder, file = run / "critic", run / "critic" / "data.pt"
    if not file.exists():
        da3 = load_trained_depth(run)
        parts = [critic_examples(da3, i, seed) for i in tqdm(range(clips), desc="critic data", unit="clip")]
        save(file, pictures=(torch.cat([p for p, _ in parts]) * 255).round().byte(), digits=torch.cat([d for _, d in parts]))
    data = torch.load(file, weights_only=True)
    pictures, digits = data["pictures"], data["digits"]
    critic = build_critic(folder / "start") if not (folder / "state.pt").exists() else Critic(folder / "start")
    held = len(pictures) // 10
    names = torch.tensor([ids[0] for ids in critic.digits])

    def losses(step, progress):
        index = torch.randint(held, len(pictures), (batch,), generator=generator(seed, step, "critic"))
        logits = critic.model(**critic.inputs(list(pictures[index])), logits_to_keep=1).logits[:, -1]
        loss = F.cross_entropy(logits, names[digits[index]])
        yield loss, dict(loss=loss.item())

    def report():
        critic.model.eval()
        found = torch.cat([digit_score(critic(p.float() / 255)) for p in pictures[:min(held, 512)].split(64)])
        true = digits[:len(found)] / 9
        return dict(held_out_error=(found - true).abs().mean().item(), rank_correlation=spearman(found, true))

    critic.model.train()
    fit(folder, minutes, critic.model, losses, report, lr=1e-3)


def miscast(scene, rng):
    """The same scene with one object of another shape, or of a colour that is not in it."""
    other = copy.deepcopy(scene)
    thing = rng.choice(other.objects)
    if rng.random() < .7 and thing.behaviour != "spins":  # only a box is seen to spin
        thing.shape = rng.choice([s for s in SHAPES if s != thing.shape])
    else:
        thing.colour = rng.choice([c for c in COLOURS if c not in (scene.wall, scene.floor, *(o.colour for o in scene.objects))])
    return other


def preference_pair(index, seed):
    """A better and a worse picture with their prompt -> (better, prompt), (worse, prompt), how the worse one is worse. In
    half of the pairs a degradation is stronger; else picture and prompt disagree, on one object (`miscast`) or altogether."""
    rng = random.Random(f"preference/{seed}/{index}")
    split = rng.choice(("static", "dynamic"))
    scene = random_scene(f"preference/{seed}", split, index)
    at, kind, strength, half = [rng.randrange(17)], rng.choice(DEGRADATIONS), rng.random(), rng.random()

    def picture(scene, s):
        image = render(scene, at=at)["video"][0]
        return degrade(image, kind, s, torch.Generator().manual_seed(index)) if s else image

    if half < .5:
        return (picture(scene, strength * rng.choice((0, 0, .6))), scene.caption), (picture(scene, strength), scene.caption), "degraded"
    strength *= rng.choice((0, .5))
    other = miscast(scene, rng) if half < .9 else random_scene(f"preference/{seed}/other", split, index)
    if half < .7:  # the picture is wrong
        return (picture(scene, strength), scene.caption), (picture(other, strength), scene.caption), "object"
    shown = picture(scene, strength)  # the words are
    return *((shown, caption(s, random.Random(index))) for s in (scene, other)), "object" if half < .9 else "room"


def train_preference(run, minutes, seed=0, batch=16):
    """Bradley-Terry, -log sigmoid(score of the better - score of the worse), and the likelihood of the better one's words
    after its picture: describing is learned sooner than preferring, and HPSv3, too, starts from a model that can."""
    torch.manual_seed(seed)
    folder = run / "preference"
    judge = build_preference(folder / "start") if not (folder / "state.pt").exists() else Preference(folder / "start")
    judge.model.requires_grad_(True).train()

    def scores(pairs):
        items = [side[i] for i in (0, 1) for side in pairs]
        inputs = judge.inputs([(p * 255).round().byte() for p, _ in items], [t for _, t in items])
        hidden, ids = judge.model.hidden(**inputs), inputs["input_ids"]
        n = len(pairs)
        logits = hidden[:n, :-1] @ judge.model.model.get_input_embeddings().weight.T
        said = inputs["attention_mask"][:n, 1:].bool() & (ids[:n, :-1] != judge.model.model.config.image_token_id)
        return *judge.model.score(hidden, ids, judge.reward_id)[:, 0].chunk(2), F.cross_entropy(logits[said], ids[:n, 1:][said])

    def losses(step, progress):
        better, worse, words = scores([preference_pair(step * batch + i, seed) for i in range(batch)])
        loss = -F.logsigmoid(better - worse).mean() + 1e-3 * (better + worse).square().mean()
        yield loss + 3 * words, dict(loss=loss.item(), words=words.item(), right=(better > worse).float().mean().item())

    @torch.no_grad()
    def report():
        judge.model.eval()
        pairs = [preference_pair(i, f"{seed}/held-out") for i in range(256)]
        better, worse = (torch.cat(x) for x in zip(*[scores(pairs[i:i + 32])[:2] for i in range(0, 256, 32)]))
        judge.model.train()
        right = {kind: [(b > w).item() for b, w, p in zip(better, worse, pairs) if p[2] == kind] for kind in ("degraded", "object", "room")}
        return dict(held_out_right=(better > worse).float().mean().item(), gap=(better - worse).mean().item(), **{k: sum(v) / len(v) for k, v in right.items()})

    fit(folder, minutes, judge.model, losses, report, lr=1e-3)


# -------------------------------------------------------------------------------------------------------------- export

def export_depth(run, folder):
    folder.mkdir(parents=True, exist_ok=True)
    model = load_trained_depth(run)
    weights = {checkpoint_key(k): v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", dataclasses.asdict(model.config))


def export_critic(run, folder):
    critic = Critic(run / "critic" / "start")
    critic.model.load_state_dict(torch.load(run / "critic" / "state.pt", weights_only=True)["ema"])
    critic.model.to(torch.bfloat16).save_pretrained(folder), critic.processor.save_pretrained(folder)


def export_preference(run, folder):
    """The score divided by 32: pairs leave its size open, and so the plain sum of the four terms is not its alone."""
    shutil.copytree(run / "preference" / "start", folder, dirs_exist_ok=True)
    state = torch.load(run / "preference" / "state.pt", weights_only=True)["ema"]
    for name in ("rm_head.5.weight", "rm_head.5.bias"):
        state[name][0] /= 32
    save_file({published_key(k): v.to(torch.bfloat16).contiguous() for k, v in state.items()}, folder / "HPSv3.safetensors")
