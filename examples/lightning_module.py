"""Any method as a LightningModule: Lightning drives, Limbeck says what the losses are."""

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from limbeck import Batch, Method, Roles
from limbeck.core.method import updates
from limbeck.methods.pld.method import PLD


class Distillation(lightning.LightningModule):
    """Works for every method with a `step`, with one optimizer per role that learns.

    Args:
        method: The method.
        learning: Models that learn, by role.
        frozen: Models that are only used, by role.
        lr: Learning rate of all.
    """

    def __init__(self, method: Method, learning: dict[str, nn.Module], frozen: dict[str, nn.Module], lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step may update several roles in turn
        self.method, self.lr = method, lr
        self.learning, self.frozen = nn.ModuleDict(learning), nn.ModuleDict(frozen)
        self.roles = Roles(**learning, **frozen)
        self.roles.freeze(*frozen)  # evaluation mode and no gradient, also after Lightning has called train()

    def training_step(self, batch: list[Tensor], index: int) -> None:
        """One step: each update goes to the optimizer of its role."""
        x, y = batch
        found = self.optimizers()
        optimizers = dict(zip(self.learning, found if isinstance(found, list) else [found], strict=True))
        for update in updates(self.method.step, self.roles, Batch(x=x, y=y), role="student"):
            if update.loss is not None:
                own = [p for p in self.learning[update.role].parameters() if p.requires_grad]
                self.manual_backward(update.loss, inputs=own)  # the loss may pass through another role that learns
                self.log(f"loss/{update.role}", update.loss.detach())
            if update.apply:
                optimizers[update.role].step()
                optimizers[update.role].zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One for each role that learns, in the order of `learning`."""
        return [torch.optim.AdamW(module.parameters(), lr=self.lr) for module in self.learning.values()]


def main() -> None:
    """Distil one random network into another for an epoch."""
    torch.manual_seed(0)
    teacher, student = nn.Linear(8, 5), nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 5))
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.randn(64, 8), torch.arange(64) % 5), batch_size=16)
    module = Distillation(PLD(), {"student": student}, {"teacher": teacher}, lr=0.01)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, loader)
    print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
