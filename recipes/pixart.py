"""PixArt-alpha (transformer of 0.6 billion parameters) as a denoiser of latents, and prompts as a text encoder made them.

    python recipes/pixart.py prompts.txt

fetches the published weights and writes `weights/pixart-512.safetensors` and `weights/pixart-prompts.safetensors` beside this
file. The text encoder (T5, 4.8 billion parameters) runs there, once for each prompt, and not in the training.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from limbeck.data import Data
from limbeck.data.noise import Noise
from limbeck.diffusion import Denoiser, Table

NAME, HERE = "PixArt-alpha/PixArt-XL-2-512x512", Path(__file__).parent / "weights"
LENGTH, WIDTH = 120, 4096  # of a prompt


class Prompted(nn.Module):
    """The transformer, told a prompt as one tensor: its states, and in a last column which of them there are."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor) -> Any:
        """The noise that it predicts, without its variance, for latents `[B, 4, H, W]`, timesteps and prompts `[B, L, D + 1]`."""
        states, known = prompt[..., :-1], prompt[..., -1]
        nothing: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        told = {"encoder_hidden_states": states, "encoder_attention_mask": known, "added_cond_kwargs": nothing}
        return self.net(x, timestep=time, **told).sample.chunk(2, 1)[0]


def teacher() -> nn.Module:
    """The structure, with random weights; `@FILE` fills it, the prompt of no words among them."""
    net = PixArtTransformer2DModel(sample_size=64, num_layers=28, caption_channels=WIDTH)
    return denoiser(net, packed(torch.zeros(LENGTH, WIDTH), torch.ones(LENGTH)))


def denoiser(net: nn.Module, null: Tensor) -> Denoiser:
    """A denoiser of latents that predicts noise, and knows the prompt of no words."""
    return Denoiser(Prompted(net), Table.linear(), "epsilon", time_scale=999, null=null)


def packed(states: Tensor, known: Tensor) -> Tensor:
    """States `[..., L, D]` and which of them there are `[..., L]` as one tensor."""
    return torch.cat([states, known[..., None].to(states)], -1)


def prompts() -> Data:
    """Noise for every prompt that was prepared."""
    file = HERE / "pixart-prompts.safetensors"
    if file.is_file():
        from safetensors.torch import load_file

        known = load_file(file)["prompts"]
    else:
        warnings.warn(f"weights/{file.name} is not there: 64 empty prompts are taken", stacklevel=2)
        known = torch.ones(1, 1, 1).expand(64, LENGTH, WIDTH + 1)
    return Data(train=Noise((4, 64, 64), conditions=known))


def main() -> None:
    """Fetch the weights, encode the prompts."""
    from diffusers import PixArtAlphaPipeline
    from safetensors.torch import save_file

    from limbeck.export.safetensors import save

    pipeline = PixArtAlphaPipeline.from_pretrained(NAME, torch_dtype=torch.bfloat16)
    lines = [line for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines() if line.strip()]
    with torch.no_grad():
        answers = [pipeline.encode_prompt(line, do_classifier_free_guidance=False)[:2] for line in ["", *lines]]
    found = [packed(states, known)[0].cpu() for states, known in answers]
    HERE.mkdir(exist_ok=True)
    save_file({"prompts": torch.stack(found[1:])}, HERE / "pixart-prompts.safetensors")
    model = denoiser(pipeline.transformer.float(), found[0].float())
    model.check_scheduler(pipeline.scheduler)
    save(model, HERE / "pixart-512.safetensors")


if __name__ == "__main__":
    main()
