"""Prompts become embeddings: Wan2.1's UMT5 text encoder, loaded from either layout, and a cache of its
outputs on disk.

    encoder, tokenizer = load_text("tiny/wan")
    text = encode_text(encoder, tokenizer, prompts)      # (B, 512, D)

    cache = TextCache("Wan-AI/Wan2.1-T2V-1.3B", Path("runs/.texts"), "cuda", torch.bfloat16)
    cache.encode_missing(prompts)    # the encoder is loaded for those that are not there, and dropped
    wan.text_cache = cache           # then wan.encode_text(prompts) reads them

Training needs the encoder (11 GB for Wan2.1) for minutes, not for days. A file of the cache holds one
prompt's embedding without padding, and its checksum. The file's name is a digest of prompt, dtype and the
encoder's and tokenizer's files (name, size, time of change), so a different encoder's embedding is never
read. The encoder is transformers' UMT5EncoderModel; it is never trained here. Left out: clearing the cache.
"""

import contextlib
import functools
import hashlib
import html
import re

import ftfy
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from weights import (fill, fill_arguments, model_folder, on_meta, open_tensors, read_json, renamed,
                     weight_files, written_whole)

# What an error says to give where a model is asked for, and what is downloaded of a hub id.
WAN = "a folder in the Wan2.1 or Diffusers layout, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
WAN_FILES = ["*.json", "*.safetensors", "*.pth", "*.model", "google/*", "tokenizer/*"]
ORIGINAL_TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
TEXT_LENGTH = 512  # tokens the text is padded to; it matters, as cross-attention sees the padding
UMT5_XXL = dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                relative_attention_num_buckets=32, relative_attention_max_distance=128,
                feed_forward_proj="gated-gelu", dropout_rate=0.0, layer_norm_epsilon=1e-6)

# {pattern in our name (= transformers'): what the original release has in its place}, applied in order.
ORIGINAL_TEXT_NAMES = {
    r"^shared\.weight": "token_embedding.weight",
    r"^encoder\.final_layer_norm": "norm",
    r"^encoder\.block": "blocks",
    r"layer\.0\.layer_norm": "norm1",
    r"layer\.1\.layer_norm": "norm2",
    r"layer\.0\.SelfAttention\.relative_attention_bias": "pos_embedding.embedding",
    r"layer\.0\.SelfAttention": "attn",
    r"layer\.1\.DenseReluDense\.wi_0": "ffn.gate.0",
    r"layer\.1\.DenseReluDense\.wi_1": "ffn.fc1",
    r"layer\.1\.DenseReluDense\.wo": "ffn.fc2",
}
original_text_key = functools.partial(renamed, ORIGINAL_TEXT_NAMES)


# ---------------------------------------------------------------------------------------------------- loading

def describe_text(folder):
    """-> (config, its file, weight files, rename) of the text encoder in a model folder of either layout.

    The original layout has no file with the config: the weights' stands for it in errors. rename: our name of
    a tensor -> the files'.
    """
    diffusers = folder / "text_encoder"
    if diffusers.is_dir():
        file, rename = diffusers / "config.json", str
        config, files = read_json(file), weight_files(diffusers, "model")
    else:
        config, file, rename = UMT5_XXL, folder / ORIGINAL_TEXT, original_text_key
        files = [file]
    open_tensors(files)  # broken files are named before the slow import
    return config, file, files, rename


def tokenizer_folder(folder):
    name = "tokenizer" if (folder / "text_encoder").is_dir() else "google/umt5-xxl"
    if not (folder / name).is_dir():
        raise ValueError(f"{folder} lacks the tokenizer folder {name}; download the checkpoint again")
    return folder / name


def _tokenizer(folder, words):
    """The tokenizer in a folder, for an encoder of so many words. No code in the folder is run."""
    import transformers
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False,
                                                               local_files_only=True)
    except Exception as e:
        reason = str(e).strip().split("\n")[0][:160]
        raise ValueError(f"the tokenizer in {folder} cannot be read ({reason}); "
                         "download the checkpoint again") from None
    if len(tokenizer) > words or tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer in {folder} has {len(tokenizer)} words, padding "
                         f"{tokenizer.pad_token}, the text encoder {words}; they are not of one checkpoint: "
                         "download it again")
    return tokenizer


def text_files(path):
    """-> the files that decide what a prompt's embedding is: the text encoder's and the tokenizer's."""
    folder = model_folder(path, WAN_FILES, WAN)
    _, file, files, _ = describe_text(folder)
    return {file, *files, *(part for part in tokenizer_folder(folder).iterdir() if part.is_file())}


def load_text(path, device="cpu", dtype=torch.float32):
    """-> text encoder and tokenizer of a model folder (either layout), or a hub id."""
    folder = model_folder(path, WAN_FILES, WAN)
    config, file, files, rename = describe_text(folder)
    import transformers

    # Tensors are matched and the tokenizer is read before 11 GB of weights are.
    encoder = on_meta(lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**config)), files, file)
    arguments = fill_arguments(encoder, files, rename, device, dtype)
    tokenizer = _tokenizer(tokenizer_folder(folder), encoder.config.vocab_size)
    return fill(*arguments), tokenizer


# --------------------------------------------------------------------------------------------------- encoding

def clean_prompt(text):
    """Wan's text cleaning: ftfy, HTML entities twice, white space collapsed."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def spelled_out(tokenizer, text):
    """-> the text with a space inside each special token, so that "</s>" in a prompt does not end it.

    The tokenizer's split_special_tokens would not help: UMT5's vocabulary also holds these as plain words.
    """
    marks = "|".join(re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values())
    return re.sub(f"(?i)(?=(?:{marks})).", r"\g<0> ", text)  # after a mark's first character: "< /s>"


@torch.no_grad()
def encode_text(text_encoder, tokenizer, prompts):
    """Prompts (a list of B strings) -> embeddings (B, 512, D), padding zeroed.

    The encoder runs at the longest prompt's length: masked padding cannot change the tokens before it.
    """
    texts = [spelled_out(tokenizer, clean_prompt(prompt)) for prompt in prompts]
    tokens = tokenizer(texts, padding="longest", truncation=True, max_length=TEXT_LENGTH,
                       return_attention_mask=True, return_tensors="pt")
    device = text_encoder.device
    mask = tokens.attention_mask.to(device)  # (B, L)
    hidden = text_encoder(tokens.input_ids.to(device), mask).last_hidden_state  # (B, L, D)
    hidden = hidden * mask.unsqueeze(-1)  # what the encoder makes of padding is not zero
    return F.pad(hidden, (0, 0, 0, TEXT_LENGTH - hidden.shape[1]))


# ----------------------------------------------------------------------------------------------- kept on disk

class TextCache:
    """prompt -> embedding (1, 512, D), padding zeroed: bit for bit what the encoder gives for it alone."""

    def __init__(self, model, folder, device="cpu", dtype=torch.float32):
        self.model, self.folder, self.device, self.dtype = model, folder, device, dtype
        known = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in text_files(model)]
        self.fingerprint = repr((str(dtype), sorted(known)))  # of the encoder

    def file(self, prompt):
        digest = hashlib.sha256(f"{self.fingerprint} {prompt}".encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"

    @torch.no_grad()
    def encode_missing(self, prompts, progress=False):
        """Encodes and writes what is not on disk yet, or damaged. The encoder is not loaded where nothing is
        missing."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if self.read(prompt) is None]
        if not missing:
            return
        encoder, tokenizer = load_text(self.model, self.device, self.dtype)
        for prompt in tqdm(missing, desc="encode prompts", unit="prompt", disable=not progress):
            text = encode_text(encoder, tokenizer, [prompt])[0]  # (512, D)
            tokens = int(text.ne(0).any(1).sum())
            text = text[:tokens].contiguous()
            with written_whole(self.file(prompt)) as part:
                save_file(dict(text=text), part, metadata=dict(sha256=self.checksum(prompt, text)))

    def read(self, prompt):
        """-> the embedding (tokens, D), or None where its file is missing, damaged or not this prompt's."""
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            with safe_open(self.file(prompt), framework="pt") as file:
                text = file.get_tensor("text")
                known = (file.metadata() or {}).get("sha256")
            if text.dim() == 2 and len(text) <= TEXT_LENGTH and known == self.checksum(prompt, text):
                return text

    def checksum(self, prompt, text):
        """-> SHA-256 (hex) of an embedding (tokens, D), its dtype and shape, and the name of its file."""
        whose = f"{self.file(prompt).stem} {text.dtype} {tuple(text.shape)} "
        return hashlib.sha256(whose.encode() + text.cpu().view(torch.uint8).numpy().tobytes()).hexdigest()

    def __call__(self, prompt):
        text = self.read(prompt)  # (tokens, D)
        if text is None:
            self.encode_missing([prompt])
            text = self.read(prompt)
        return F.pad(text, (0, 0, 0, TEXT_LENGTH - len(text)))[None]
