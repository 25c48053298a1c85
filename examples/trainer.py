"""A method in `transformers.Trainer`: the trainer drives, Limbeck says what the loss is."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from limbeck import Batch, Method, Roles
from limbeck.core.method import updates
from limbeck.methods.kd.method import KD


class DistillationTrainer(Trainer):
    """For methods whose step is one update of the student, which most are.

    Args:
        method: The method.
        teacher: The teacher.
        **options: Those of `Trainer`.
    """

    def __init__(self, *, method: Method, teacher: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.method, self.teacher = method, teacher.to(self.args.device)
        # The loss is a mean over the samples of a micro-batch: let the trainer divide it by their number.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The method's loss in training; the model's own in evaluation."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs=True)
        x = {name: value for name, value in inputs.items() if name != "labels"}
        m = Roles(teacher=self.teacher, student=model)
        m.freeze("teacher")
        (update,) = updates(self.method.step, m, Batch(x=x, y=inputs["labels"]), role="student")
        return update.loss


def classifier(layers: int) -> nn.Module:
    """A small BERT with random weights."""
    shape: dict[str, Any] = {
        "num_labels": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_hidden_layers=layers, **shape))


def main() -> None:
    """Distil four layers into one for an epoch, and evaluate."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 50, (32, 6))
    samples = [{"input_ids": row, "labels": int(row[0]) % 3} for row in tokens]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
        )
        trainer = DistillationTrainer(
            method=KD(temperature=2.0),
            teacher=classifier(4),
            model=classifier(1),
            args=arguments,
            train_dataset=samples,
            eval_dataset=samples,
        )
        trainer.train()
        print(trainer.evaluate()["eval_loss"])


if __name__ == "__main__":
    main()
