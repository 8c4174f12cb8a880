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
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn as nn

from weights import fill, match_tensors, model_folder, read_json

CRITIC_PROMPT = (
    "This picture is a 3D reconstruction, seen from a place where the camera that filmed the scene "
    "never was. Judge the geometry only, as an expert in 3D reconstruction would. Faults: bits that "
    "float in the air, flat cards that stand in for solid things, texture stretched into streaks, "
    "holes, walls that bend or come apart. Answer with one digit from 0 (the scene has collapsed) to 9 "
    "(solid, as if it had been filmed from here).")
REWARD_TOKEN = "<|Reward|>"  # HPSv3 reads its score at this token


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


# --------------------------------------------------------------------------------- the vision-language critic

class Critic:
    """Qwen3-VL as a judge: the expectation over the digits 0-9 of the next token, / 9."""

    def __init__(self, path, device="cpu", dtype=torch.float32):
        import transformers
        folder = model_folder(path, ["*.json", "*.safetensors", "merges.txt", "*.jinja"])
        self.processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # so that the last position is every prompt's end
        self.model, found = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found[what]:  # transformers would go on with random weights
                name = sorted(map(str, found[what]))[0]
                raise ValueError(f"the critic '{path}' has {what.replace('_', ' ')} such as {name}; "
                                 "it is not the checkpoint its config describes")
        self.model.to(device).eval()
        self.digits = [tokenizer.encode(str(digit), add_special_tokens=False) for digit in range(10)]
        if any(len(ids) != 1 for ids in self.digits) or len({ids[0] for ids in self.digits}) < 10:
            raise ValueError(f"the tokenizer of '{path}' does not hold each digit as one token; "
                             "it cannot be a critic")

    def inputs(self, pictures, prompt=CRITIC_PROMPT):
        return chat_batch(self.processor, pictures, [prompt] * len(pictures))

    @torch.no_grad()
    def __call__(self, images):
        """(N, 3, H, W) in [0, 1] -> digit probabilities (N, 10), float32."""
        batch = self.inputs(as_pictures(images)).to(self.model.device)
        logits = self.model(**batch, logits_to_keep=1).logits[:, -1]  # (N, vocabulary)
        return logits[:, [ids[0] for ids in self.digits]].float().softmax(-1).cpu()


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
        at = (input_ids == reward_id).int().argmax(1)
        return self.rm_head(hidden[torch.arange(len(hidden)), at].float())

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
    texts = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            texts |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    return texts["INSTRUCTION"] + texts["prompt_with_special_token"]


class Preference:
    """HPSv3: images and prompts -> scores, unbounded, about 0 to 10 for the published weights.

    .center and .spread bring a score to about [-1, 1], the scale of R_gen: (score - center) / spread.
    path: a folder or hub id with HPSv3.safetensors. Config and processor come from the same folder when it
    has a config.json, else from `base`. hpsv3.json in the folder may hold the prompt and the picture size it
    was trained with.
    """

    def __init__(self, path, device="cpu", dtype=torch.float32, base="Qwen/Qwen2-VL-7B-Instruct"):
        import transformers
        folder = model_folder(path, ["HPSv3.safetensors", "*.json", "*.jinja"])
        file = folder / "HPSv3.safetensors"
        if not file.exists():
            raise ValueError(f"{folder} lacks HPSv3.safetensors; download MizzenAI/HPSv3")
        own = {}
        if (folder / "hpsv3.json").exists():
            own = read_json(folder / "hpsv3.json")
        self.instruction = own.get("instruction") or published_instruction()
        pixels = own.get("image_pixels", 256 * 28 * 28)
        self.center, self.spread = own.get("center", 5.0), own.get("spread", 5.0)

        # the processor, with the token at which the score is read
        if (folder / "config.json").exists():
            base = folder
        else:
            base = model_folder(base, ["*.json", "merges.txt", "*.jinja"])
        self.processor = transformers.AutoProcessor.from_pretrained(base, trust_remote_code=False)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "right"
        tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        self.processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
        self.reward_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

        # the model, filled from the published file
        config = transformers.Qwen2VLConfig.from_pretrained(base)
        config.text_config.vocab_size = len(tokenizer)
        with torch.device("meta"):
            model = HPSv3(config)
        tensors = match_tensors(model, [file], published_key, device, unused={"lm_head.weight"})
        fill(model, tensors, device, dtype)
        # rotary frequencies are no part of the file: made anew, then rounded to dtype as the official
        # .to(bf16) does
        language, vision = model.model.language_model, model.model.visual
        language.rotary_emb = type(language.rotary_emb)(config.text_config)
        vision.rotary_pos_emb = type(vision.rotary_pos_emb)(config.vision_config)
        self.model = model.to(device=device, dtype=dtype)
        self.model.rm_head.float()

    def inputs(self, pictures, prompts):
        texts = [self.instruction.replace("{text_prompt}", prompt) for prompt in prompts]
        batch = chat_batch(self.processor, pictures, texts)
        batch.pop("mm_token_type_ids", None)
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
            warnings.simplefilter("ignore")  # lpips asks torchvision in words that it deprecates
            torch.manual_seed(0)
            network = lpips.LPIPS(net="alex", pnet_rand=trunk == "random", verbose=False)
    except OSError as e:
        raise ValueError(f"AlexNet's weights for LPIPS could not be fetched ({e}); "
                         "use --lpips random for a stand-in") from None
    return network.to(device).requires_grad_(False)


@torch.no_grad()
def lpips_distance(network, a, b):
    """Mean LPIPS of two videos (F, 3, H, W) in [0, 1], a float."""
    return float(network(a, b, normalize=True).mean())
