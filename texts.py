"""Prompts' embeddings, encoded once and kept on disk: training needs the text encoder (11 GB for Wan2.1) for
minutes, not for days.

    texts = TextCache("Wan-AI/Wan2.1-T2V-1.3B", Path("runs/.texts"), "cuda", torch.bfloat16)
    texts.encode(prompts)            # those that are not there: the encoder is loaded for them, and dropped
    wan.texts = texts                # then wan.encode_text(prompts) reads them

A file holds one prompt's tokens without padding. Its name is a digest of prompt, dtype and the encoder's files
(name, size, time of change): another encoder never answers for this one. Left out: clearing the folder.
"""

import contextlib
import hashlib

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from model import TEXT_LENGTH, encode_text, load_text, text_files
from weights import written_whole


class TextCache:
    """prompt -> embedding (1, 512, D), padding zeroed, as the encoder gives it: to the bit."""

    def __init__(self, model, folder, device="cpu", dtype=torch.float32):
        self.model, self.folder, self.device, self.dtype = model, folder, device, dtype
        known = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in text_files(model)]
        self.encoder = repr((str(dtype), sorted(known)))

    def file(self, prompt):
        digest = hashlib.sha256(f"{self.encoder} {prompt}".encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"

    @torch.no_grad()
    def encode(self, prompts, progress=False):
        """Encodes and writes what is not on disk yet, or damaged. The encoder is not loaded where nothing is
        missing."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if self.read(prompt) is None]
        if not missing:
            return
        encoder, tokenizer = load_text(self.model, self.device, self.dtype)
        for prompt in tqdm(missing, desc="encode prompts", unit="prompt", disable=not progress):
            text = encode_text(encoder, tokenizer, [prompt])[0]  # (512, D)
            tokens = int(text.ne(0).any(1).sum())
            with written_whole(self.file(prompt)) as part:
                save_file(dict(text=text[:tokens].contiguous()), part)

    def read(self, prompt):
        """-> (tokens, D), or None where the file holds none."""
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            text = load_file(self.file(prompt))["text"]
            if text.dim() == 2 and len(text) <= TEXT_LENGTH and text.isfinite().all():
                return text

    def __call__(self, prompt):
        self.encode([prompt])
        text = self.read(prompt)  # (tokens, D)
        return F.pad(text, (0, 0, 0, TEXT_LENGTH - len(text)))[None]
