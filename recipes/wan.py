"""Wan 2.1 (text to video, 1.3 B parameters) as a denoiser of latents, and prompts as what their text encoder made of them.

    python recipes/wan.py prompts.txt

fetches the published weights and writes `weights/wan21-1.3b.safetensors` and `weights/wan21-prompts.safetensors` beside this
file. The text encoder (UMT5, 5.7 B parameters) runs there, once for each prompt, and not in the training.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from limbeck.data import Data
from limbeck.data.noise import Noise
from limbeck.diffusion import Denoiser, RectifiedFlow

NAME, HERE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", Path(__file__).parent / "weights"
LENGTH, WIDTH = 512, 4096  # of a prompt
FRAMES, HEIGHT, BREADTH = 11, 60, 104  # latents of 41 frames of 480 x 832; 21 of 81 frames want cards of more memory
SIZES = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": WIDTH}


def teacher() -> nn.Module:
    """The structure, with random weights; `@FILE` fills it, the prompt of no words among them."""
    net = WanTransformer3DModel(**SIZES)
    net.enable_gradient_checkpointing()
    return denoiser(net, torch.zeros(LENGTH, WIDTH))


def denoiser(net: nn.Module, null: Tensor) -> Denoiser:
    """A rectified flow of latents, told whole thousands of the time, that knows the prompt of no words."""
    return Denoiser(
        net, RectifiedFlow(), "flow_prediction", time_scale=1000, null=null, keyword="encoder_hidden_states"
    )


def prompts() -> Data:
    """Noise for every prompt that was prepared."""
    file = HERE / "wan21-prompts.safetensors"
    if file.is_file():
        from safetensors.torch import load_file

        known = load_file(file)["prompts"]
    else:
        warnings.warn(f"weights/{file.name} is not there: 64 empty prompts are taken", stacklevel=2)
        known = torch.zeros(1, 1, 1).expand(64, LENGTH, WIDTH)
    return Data(train=Noise((16, FRAMES, HEIGHT, BREADTH), conditions=known))


def main() -> None:
    """Fetch the weights, encode the prompts."""
    from diffusers import WanPipeline
    from safetensors.torch import save_file

    from limbeck.export.safetensors import save

    pipeline = WanPipeline.from_pretrained(NAME, torch_dtype=torch.bfloat16)
    lines = [line for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines() if line.strip()]
    with torch.no_grad():
        told: dict[str, Any] = {"do_classifier_free_guidance": False, "max_sequence_length": LENGTH}
        found = [pipeline.encode_prompt(line, **told)[0][0].cpu() for line in ["", *lines]]
    HERE.mkdir(exist_ok=True)
    save_file({"prompts": torch.stack(found[1:])}, HERE / "wan21-prompts.safetensors")
    model = denoiser(pipeline.transformer.float(), found[0].float())
    model.check_scheduler(pipeline.scheduler)
    save(model, HERE / "wan21-1.3b.safetensors")


if __name__ == "__main__":
    main()
