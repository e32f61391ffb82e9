"""What transformers generates greedily: the reference that a server's tokens are compared with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from elasticmoe_kernels.reference.quantize import dequantize_weight
from elasticmoe_patches.platform import torchvision_ops


def greedy(model_dir: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy continuation of each prompt in float32, `max_new_tokens` ids each, one prompt at a time."""
    torchvision_ops.declare_if_unloadable()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [_continue(model, prompt, max_new_tokens) for prompt in prompts]


def _continue(model: torch.nn.Module, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    # Not model.generate(): its stopping rules are not wanted, and this is the whole of greedy decoding.
    ids = torch.tensor([list(prompt)])
    past = None
    generated: list[int] = []
    for _ in range(max_new_tokens):
        output = model(ids, past_key_values=past, use_cache=True)
        past = output.past_key_values
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        generated.append(int(ids))
    return generated


def dequantised(model_dir: Path, out_dir: Path) -> Path:
    """The same model with float32 weights in the place of its block-quantised ones, written to `out_dir`."""
    shutil.copytree(model_dir, out_dir)
    config = json.loads((out_dir / "config.json").read_text())
    del config["quantization_config"]
    (out_dir / "config.json").write_text(json.dumps(config))
    tensors = load_file(model_dir / "model.safetensors")
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    for name, scale in scales.items():
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = dequantize_weight(tensors[weight], scale).float()
    save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
    return out_dir
