"""A method of one's own: a feature loss through a projector that learns with the student.

limbeck distill --teacher examples/own_model.py:teacher --student examples/own_model.py:student \
    --data examples/own_model.py:digits --method examples/own_method.py:Hint --epochs 5 --set optim.student.lr=0.01
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from limbeck import Batch, Method, Optim, Roles, Train, Update


@dataclass(frozen=True)
class Hint(Method):
    """The student's features, projected, come close to the teacher's (FitNets: Romero et al. 2015, eq. 3).

    Args:
        weight: Of the feature loss beside the cross-entropy with the labels.
        layer: Dotted path of the layer, in teacher and student.
        projector_lr: Learning rate of the projector.
    """

    weight: float = 1.0
    layer: str = "stem"
    projector_lr: float = 0.01

    def stages(self, m: Roles, data: Any) -> Generator[Any, Any, None]:
        """The projector is a role like any other; it is left out of what is saved as the student."""
        one = data.train.batch(torch.arange(1), view=0)
        (wide, narrow) = (role.features(one, self.layer)[1][self.layer].shape[1] for role in (m.teacher, m.student))
        m.projector = nn.Conv2d(narrow, wide, 1)
        roles = {"student": None, "projector": Optim(lr=self.projector_lr)}  # None: as the run says
        yield Train(self.step, roles=roles, frozen=["teacher"], data=data.train)

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """The projector first, then the student through the projector that has just moved."""
        with torch.no_grad():
            _, teacher = m.teacher.features(batch, self.layer)
        logits, student = m.student.features(batch, self.layer)
        target, hint = teacher[self.layer], student[self.layer]
        yield Update("projector", F.mse_loss(m.projector(hint.detach()), target))
        feature = F.mse_loss(m.projector(hint), target)
        yield Update("student", F.cross_entropy(logits, batch.y) + self.weight * feature, logs={"feature": feature})


def main() -> None:
    """The same from Python."""
    import tempfile

    import own_model

    from limbeck import distill

    with tempfile.TemporaryDirectory() as folder:
        result = distill(
            own_model.teacher(),
            own_model.student(),
            own_model.digits(),
            method=Hint(weight=0.5),
            out=f"{folder}/run",
            engine={"epochs": 2},
            optim={"student": {"lr": 0.003}},
        )
        print({name: round(value, 3) for name, value in result.metrics.items()})


if __name__ == "__main__":
    main()
