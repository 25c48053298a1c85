"""GPT-2 of 124 M parameters without dropout, and prompts for it with a negative one.

    python recipes/gpt2_prompts.py prompts.txt "Some badly written, dull text:"

tokenises one prompt a line and writes `weights/gpt2-prompts.safetensors` beside this file.
"""

import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from limbeck.data import Data
from limbeck.data.language import Prompts

NAME, FILE = "openai-community/gpt2", Path(__file__).parent / "weights" / "gpt2-prompts.safetensors"
END, LENGTH = 50256, 64


def gpt2() -> nn.Module:
    """The structure, with random weights; `@FILE` fills it with the published ones."""
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def prompts() -> Data:
    """The prompts that were prepared."""
    if FILE.is_file():
        from safetensors.torch import load_file

        found = load_file(FILE)
        sides = (found["tokens"], found["negative"], found["mask"])
        return Data(train=Prompts(*sides))
    warnings.warn("weights/gpt2-prompts.safetensors is not there: the empty prompt is taken", stacklevel=2)
    return Data(train=Prompts(torch.full((512, 1), END), torch.tensor([END])))


def main() -> None:
    """Tokenise."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(NAME, padding_side="left", pad_token="<|endoftext|>")
    lines = [line for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines() if line.strip()]
    made = tokenizer(lines, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    negative: Tensor = tokenizer(sys.argv[2], return_tensors="pt").input_ids[0]
    FILE.parent.mkdir(exist_ok=True)
    save_file({"tokens": made.input_ids, "mask": made.attention_mask, "negative": negative}, FILE)


if __name__ == "__main__":
    main()
