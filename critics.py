"""The models that judge pictures: Qwen3-VL as a critic of geometry, HPSv3 as a judge of beauty, LPIPS as a
distance.

    Critic("Qwen/Qwen3-VL-4B-Instruct")(images)        # (N, 3, H, W) -> digit probabilities (N, 10)
    Preference("MizzenAI/HPSv3")(images, prompts)      # -> scores (N,)
    lpips_distance(load_lpips("alex"), a, b)           # of two videos, a float

Any folder or hub id with the published layout will do, the tiny twins among them. `rewards.py` makes rewards
of what they say. HPSv3: arXiv 2508.03789. Left out: servers, generation of text, training of the published
models.
"""

import ast
import contextlib
import re
import warnings
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn as nn

from weights import (Positive, Size, fill, is_out_of_memory, match_tensors, model_folder, on_meta,
                     open_tensors, read_json, weight_files)

CRITIC_PROMPT = (
    "This picture is a 3D reconstruction, seen from a place where the camera that filmed the scene "
    "never was. Judge the geometry only, as an expert in 3D reconstruction would. Faults: bits that "
    "float in the air, flat cards that stand in for solid things, texture stretched into streaks, "
    "holes, walls that bend or come apart. Answer with one digit from 0 (the scene has collapsed) to 9 "
    "(solid, as if it had been filmed from here).")
REWARD_TOKEN = "<|Reward|>"  # HPSv3 reads its score at this token
CRITIC, PREFERENCE = "Qwen/Qwen3-VL-4B-Instruct", "MizzenAI/HPSv3"  # hub ids, which errors name
PREFERENCE_BASE = "Qwen/Qwen2-VL-7B-Instruct"  # its config and processor are HPSv3's


# -------------------------------------------------------------------------------- pictures and chat templates

def as_pictures(images):
    """(N, 3, H, W) in [0, 1] -> N uint8 pictures as the processors take them."""
    return list((images.clamp(0, 1) * 255).round().byte().cpu())


def chat_batch(processor, pictures, texts):
    """One user turn a picture, the picture before its text -> the model's inputs, padded to one length."""
    turns = []
    for picture, text in zip(pictures, texts, strict=True):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
        turns.append([{"role": "user", "content": content}])
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True,
                                         return_tensors="pt", processor_kwargs=dict(padding=True))


def as_text(prompt, tokenizer):
    """A prompt without the tokenizer's own marks (<|Reward|>, <|im_end|> ...): a space makes them text."""
    for mark in tokenizer.get_added_vocab():
        prompt = prompt.replace(mark, f"{mark[0]} {mark[1:]}")
    return prompt


@contextlib.contextmanager
def one_sentence_errors(folder, hub_id):
    """Makes one sentence of whatever transformers raises at a folder that lacks what `hub_id` holds."""
    try:
        yield
    except Exception as e:
        if is_out_of_memory(e):
            raise
        reason = str(e).strip().partition("\n")[0][:200]
        raise ValueError(f"'{folder}' does not hold a model such as {hub_id} ({reason}); "
                         f"download it: hf download {hub_id}") from None


def load_processor(folder, model_type):
    """The tokenizer and picture processor beside a model of this type; no code of the folder is run."""
    import transformers
    found = read_json(folder / "config.json").get("model_type")
    if found != model_type:
        raise ValueError(f"its config's model_type is {found}, not {model_type}")
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if re.search(r"\brange\b", str(processor.chat_template)):  # nested loops over it would hang
        raise ValueError("its chat template counts with range, as no published one does")
    chat_batch(processor, [torch.zeros(3, 64, 64, dtype=torch.uint8)], [""])  # a broken template fails here
    return processor


# --------------------------------------------------------------------------------- the vision-language critic

class Critic:
    """Qwen3-VL as a judge: how probable each digit 0-9 is as its next token, by a softmax over the ten digits
    alone. `digit_score` makes one score of the ten."""

    def __init__(self, path, device="cpu", dtype=torch.float32):
        import transformers
        folder = model_folder(path, ["*.json", "*.safetensors", "merges.txt", "*.jinja"],
                              f"a folder with Qwen3-VL, or its hub id: {CRITIC}")
        kind = transformers.Qwen3VLForConditionalGeneration
        with one_sentence_errors(folder, CRITIC):
            self.processor = load_processor(folder, "qwen3_vl")
            config = transformers.Qwen3VLConfig.from_pretrained(folder)
            config._attn_implementation = "sdpa"  # the folder's could name a hub kernel: code from elsewhere
            # the files are checked first, dtype and finiteness too, which from_pretrained would not do
            files = weight_files(folder, "model")
            on_meta(partial(kind._from_config, config), files, folder / "config.json")
            for _, read in open_tensors(files).values():
                read()
            self.model, found = kind.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True,
                                                     output_loading_info=True)
            for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                if found[what]:  # transformers would go on with random weights
                    name = sorted(map(str, found[what]))[0]
                    raise ValueError(f"it has {what.replace('_', ' ')} such as {name}")
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # so that the last position is every prompt's end
        self.model.to(device).eval()

        # where the ten digits stand in the vocabulary
        digits = [tokenizer.encode(str(digit), add_special_tokens=False) for digit in range(10)]
        if any(len(ids) != 1 for ids in digits) or len({ids[0] for ids in digits}) < 10:
            raise ValueError(f"the tokenizer of '{path}' does not hold each digit as one token; "
                             "it cannot be a critic")
        self.digits = [ids[0] for ids in digits]

    def inputs(self, pictures, prompt=CRITIC_PROMPT):
        return chat_batch(self.processor, pictures, [prompt] * len(pictures))

    @torch.no_grad()
    def __call__(self, images):
        """(N, 3, H, W) in [0, 1] -> digit probabilities (N, 10) that sum to 1, float32."""
        batch = self.inputs(as_pictures(images)).to(self.model.device)
        logits = self.model(**batch, logits_to_keep=1).logits[:, -1]  # (N, vocabulary)
        return logits[:, self.digits].float().softmax(-1).cpu()


def digit_score(probabilities):
    """Digit probabilities (..., 10) -> expected digit / 9, in [0, 1]."""
    return probabilities @ (torch.arange(10.0) / 9)


# --------------------------------------------------------------------------------------- the preference model

class HPSv3(nn.Module):
    """Qwen2-VL with a reward head (hidden -> 1024 -> 16 -> 2) read at the <|Reward|> token; column 0 is the
    score."""

    def __init__(self, config):
        super().__init__()
        import transformers
        self.model = transformers.Qwen2VLModel._from_config(config)
        width = config.text_config.hidden_size
        self.rm_head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(.05),
            nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))

    def hidden(self, input_ids, attention_mask, pixel_values, image_grid_thw):
        """-> (B, L, width). Positions are 0..L-1 on all three rotary axes, as the official scoring code ran
        (its transformers computed no image positions unless asked to generate)."""
        B, L = input_ids.shape
        position = torch.arange(L, device=input_ids.device).expand(3, B, L)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position,
                          pixel_values=pixel_values, image_grid_thw=image_grid_thw).last_hidden_state

    def score(self, hidden, input_ids, reward_id):
        """-> (B, 2) float32: mean and log-deviation of the score."""
        found = input_ids == reward_id
        if (found.sum(1) != 1).any():
            raise ValueError(f"a prompt must hold {REWARD_TOKEN} once: HPSv3 reads its score there")
        return self.rm_head(hidden[found].float())

    def forward(self, reward_id, **inputs):
        return self.score(self.hidden(**inputs), inputs["input_ids"], reward_id)


def published_key(key):
    """Our parameter name -> that of the published file (transformers 4.45's layout)."""
    return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def published_instruction():
    """HPSv3's own prompt, which is part of what its weights know, read from the installed hpsv3 package (not
    imported)."""
    spec = find_spec("hpsv3")
    if spec is None:
        raise ValueError("HPSv3's prompt is part of the model: "
                         "pip install --no-deps hpsv3 (only its text is read)")
    file = Path(spec.origin).parent / "dataset" / "data_collator_qwen.py"
    constants = {}  # of that module, by name
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            constants |= dict.fromkeys(names, node.value.value)
    return constants["INSTRUCTION"] + constants["prompt_with_special_token"]


@dataclass
class Hpsv3Json:
    """What hpsv3.json may hold, beside the weights: what they were trained with, and the scale of R_gen."""
    instruction: str = ""  # empty: the published one
    image_pixels: Size = 256 * 28 * 28
    center: float = 5.0
    spread: Positive = 5.0

    def __post_init__(self):
        counts = [self.instruction.count(part) for part in ("{text_prompt}", REWARD_TOKEN)]
        if self.instruction and counts != [1, 1]:
            raise ValueError(f"the instruction must hold {{text_prompt}} and {REWARD_TOKEN}, each once")


class Preference:
    """HPSv3: images and prompts -> scores, unbounded, about 0 to 10 for the published weights.

    .center and .spread bring a score to R_gen's scale, [-1, 1]: tanh((score - center) / spread).
    path: a folder or hub id with HPSv3.safetensors. Config and processor come from the same folder when it
    has a config.json, else from `base`. hpsv3.json in the folder may hold the entries of Hpsv3Json.
    """

    def __init__(self, path, device="cpu", dtype=torch.float32, base=PREFERENCE_BASE):
        import transformers
        folder = model_folder(path, ["HPSv3.safetensors", "*.json", "*.jinja"],
                              f"a folder with HPSv3, or its hub id: {PREFERENCE}")
        file = folder / "HPSv3.safetensors"
        if not file.exists():
            raise ValueError(f"'{folder}' lacks HPSv3.safetensors; download it: hf download {PREFERENCE}")
        own = Hpsv3Json()
        if (folder / "hpsv3.json").exists():
            own = read_json(folder / "hpsv3.json", Hpsv3Json)
        self.instruction = own.instruction or published_instruction()
        self.center, self.spread = own.center, own.spread

        # the processor, with the token at which the score is read
        if (folder / "config.json").exists():
            base = folder
        else:
            base = model_folder(base, ["*.json", "merges.txt", "*.jinja"],
                                f"a folder with Qwen2-VL, or its hub id: {PREFERENCE_BASE}")
        with one_sentence_errors(base, PREFERENCE_BASE):
            self.processor = load_processor(base, "qwen2_vl")
            config = transformers.Qwen2VLConfig.from_pretrained(base)
            config._attn_implementation = "sdpa"  # as the critic's
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "right"
        tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        pixels, vision = own.image_pixels, config.vision_config
        side = vision.patch_size * vision.spatial_merge_size  # a token covers side x side pixels
        if pixels > config.text_config.max_position_embeddings * side ** 2:
            raise ValueError(f"{folder / 'hpsv3.json'}, entry image_pixels: {pixels} are more tokens than "
                             "the model reads; lower it")
        self.processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
        self.reward_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

        # the model, filled from the published file
        config.text_config.vocab_size = len(tokenizer)
        model = on_meta(partial(HPSv3, config), [file], base / "config.json")
        reads = match_tensors(model, [file], published_key, device, unused={"lm_head.weight"})
        fill(model, reads, device, dtype)
        # rotary frequencies are no part of the file: made anew, then rounded to dtype as the official
        # .to(bf16) does
        language, visual = model.model.language_model, model.model.visual
        language.rotary_emb = type(language.rotary_emb)(config.text_config)
        visual.rotary_pos_emb = type(visual.rotary_pos_emb)(vision)
        self.model = model.to(device=device, dtype=dtype)
        # the published head computes in float32: read again, as its weights must not be rounded to dtype
        head = {name: read for name, read in reads.items() if name.startswith("rm_head.")}
        fill(self.model, head, device, torch.float32)

    def inputs(self, pictures, prompts):
        prompts = [as_text(prompt, self.processor.tokenizer) for prompt in prompts]
        texts = [self.instruction.replace("{text_prompt}", prompt) for prompt in prompts]
        batch = chat_batch(self.processor, pictures, texts)
        batch.pop("mm_token_type_ids", None)  # for image positions, which `hidden` leaves out
        return batch

    @torch.no_grad()
    def __call__(self, images, prompts):
        """(N, 3, H, W) in [0, 1] and N prompts -> scores (N,), float32."""
        batch = self.inputs(as_pictures(images), prompts).to(self.model.rm_head[0].weight.device)
        return self.model(**batch, reward_id=self.reward_id)[:, 0].cpu()


# ---------------------------------------------------------------------------------------- perceptual distance

def load_lpips(trunk="alex", device="cpu"):
    """The lpips package's distance with its calibrated heads. trunk: alex (downloads AlexNet's weights on
    first use), or random: a seeded random AlexNet, a *stand-in* for machines without them, whose numbers are
    not LPIPS numbers."""
    import lpips
    if trunk not in ("alex", "random"):
        raise ValueError(f"the LPIPS trunk must be alex or random, got '{trunk}'")
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision with deprecated arguments
            torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed a GPU's as well
            network = lpips.LPIPS(net="alex", pnet_rand=trunk == "random", verbose=False)
    except OSError as e:
        raise ValueError(f"AlexNet's weights for LPIPS could not be fetched ({e}); "
                         "use --lpips random for a stand-in") from None
    return network.to(device).requires_grad_(False)


@torch.no_grad()
def lpips_distance(network, a, b):
    """Mean LPIPS of two videos (F, 3, H, W) in [0, 1], a float."""
    return float(network(a, b, normalize=True).mean())
