"""Stable Diffusion 2.1 base (UNet of 866 M, text encoder of 340 M parameters) as one denoiser of latents, and prompts as data.

    python recipes/stable_diffusion.py prompts.txt [negatives.txt]

fetches the published weights and writes `weights/sd21-base.safetensors`, `weights/prompts.safetensors` and, where there are
negative prompts, `weights/negatives.safetensors` beside this file. With `--v1-5` before the files it is Stable Diffusion 1.5
(860 M and 123 M parameters): `weights/sd15.safetensors`, `weights/sd15-prompts.safetensors`.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from limbeck.data import Data, TensorSource
from limbeck.data.noise import Noise
from limbeck.diffusion import Denoiser, Table
from limbeck.methods.vsd.proof import Particles

NAMES = {False: "stabilityai/stable-diffusion-2-1-base", True: "stable-diffusion-v1-5/stable-diffusion-v1-5"}
HERE = Path(__file__).parent / "weights"
START, END, LENGTH = 49406, 49407, 77
EXAMPLES = ([320, 1125, 539, 320, 2368], [320, 1125, 539, 320, 1929])  # "a photo of a cat", "a photo of a dog"


class Prompted(nn.Module):
    """A UNet that is told what a frozen text encoder makes of tokens."""

    def __init__(self, unet: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.unet, self.text = unet, text.requires_grad_(False)

    def forward(self, x: Tensor, time: Tensor, tokens: Tensor) -> Any:
        """What the UNet predicts for latents `[B, 4, H, W]`, timesteps `[B]` and tokens `[B, L]`."""
        return self.unet(x, time, encoder_hidden_states=self.states(tokens)).sample

    def states(self, tokens: Tensor) -> Tensor:
        """What its cross-attention sees of tokens `[B, L]`, `[B, L, C]`."""
        return self.text(tokens).last_hidden_state


def padded(tokens: list[int], pad: int = 0) -> list[int]:
    """A start, the tokens, an end, and the padding: 0 of 2.1, the end once more of 1.5."""
    return [START, *tokens, END] + [pad] * (LENGTH - len(tokens) - 2)


def teacher() -> nn.Module:
    """The structure, with random weights; `@FILE` fills it."""
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
    )
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    ends = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": 0, "hidden_act": "gelu"}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, projection_dim=512, **sizes, **ends))
    return denoiser(unet, text, torch.tensor(padded([])))


def teacher_1_5() -> nn.Module:
    """That of 1.5, whose UNet predicts the noise too."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    ends = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END, "hidden_act": "quick_gelu"}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, projection_dim=768, **sizes, **ends))
    return denoiser(unet, text, torch.tensor(padded([], END)))


def denoiser(unet: nn.Module, text: nn.Module, null: Tensor) -> Denoiser:
    """A denoiser of latents that predicts noise, with the tokens of no words."""
    return Denoiser(Prompted(unet, text), Table.scaled_linear(), "epsilon", time_scale=999, null=null)


def prompts() -> Data:
    """Noise for every prompt that was prepared."""
    return Data(train=Noise((4, 64, 64), conditions=_tokens()))


def prompts_1_5() -> Data:
    """Noise for every prompt that was prepared for 1.5."""
    return Data(train=Noise((4, 64, 64), conditions=_tokens("sd15-prompts", END)))


def prompts_and_negatives() -> Data:
    """The same, each with a negative prompt out of `weights/negatives.safetensors`."""
    return Data(train=Noise((4, 64, 64), conditions=_tokens(), negatives=_tokens("negatives")))


def particles() -> nn.Module:
    """Four latents."""
    return Particles(torch.randn(4, 4, 64, 64, generator=torch.Generator().manual_seed(0)))


def one_prompt() -> Data:
    """The first prompt, once for each of the latents."""
    return Data(train=TensorSource(torch.arange(4), _tokens()[:1].repeat(4, 1), ids=torch.arange(4)))


def _tokens(name: str = "prompts", pad: int = 0) -> Tensor:
    file = HERE / f"{name}.safetensors"
    if file.is_file():
        from safetensors.torch import load_file

        return load_file(file)["tokens"].long()
    warnings.warn(f"weights/{name}.safetensors is not there: two example prompts are taken", stacklevel=2)
    return torch.tensor([padded(tokens, pad) for tokens in EXAMPLES]).repeat(512, 1)


def main() -> None:
    """Fetch the weights, tokenise the prompts."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    from limbeck.export.safetensors import save

    old = "--v1-5" in sys.argv
    pipeline = StableDiffusionPipeline.from_pretrained(NAMES[old])
    HERE.mkdir(exist_ok=True)
    options = {"padding": "max_length", "truncation": True, "max_length": pipeline.tokenizer.model_max_length}
    files = [word for word in sys.argv[1:] if not word.startswith("--")]
    for name, file in zip(("prompts", "negatives"), files, strict=False):
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        tokens = pipeline.tokenizer(lines, **options, return_tensors="pt").input_ids
        save_file({"tokens": tokens.int()}, HERE / f"{'sd15-' if old else ''}{name}.safetensors")
    null = pipeline.tokenizer("", **options, return_tensors="pt").input_ids[0]
    model = denoiser(pipeline.unet, pipeline.text_encoder, null)
    model.check_scheduler(pipeline.scheduler)
    save(model, HERE / f"{'sd15' if old else 'sd21-base'}.safetensors")


if __name__ == "__main__":
    main()
