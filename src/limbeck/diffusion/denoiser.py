"""Networks that predict something about noisy samples, as one kind of module: noisy sample and time in, clean sample out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.diffusion.schedule import EDM, PREDICTIONS, Prediction, Schedule, Table


class Denoiser(nn.Module):
    """A network and its schedule: `forward(x_t, t, condition)` is the prediction of `x_0`, whatever the network predicts.

    Args:
        net: Called as `net(x_t, time)`, with a condition as `net(x_t, time, condition)`; returns a tensor, or what has one as
            `sample`, as the models of diffusers do.
        schedule: The noise schedule.
        prediction: What the network predicts.
        time_scale: The network is told `time_scale * t`: 999 for 1000 whole timesteps.
        null: The condition that says nothing: the label beyond the last class, or an embedding; None where there are none.
        keyword: The name under which the network takes the condition, such as `class_labels` or `encoder_hidden_states`;
            None gives it by position.

    Raises:
        UsageError: There is no such prediction.

    Example:
        >>> from limbeck.diffusion.schedule import RectifiedFlow
        >>> flow = Denoiser(lambda x, t: torch.zeros_like(x), RectifiedFlow(), "flow_prediction")
        >>> flow(torch.ones(1, 2), torch.tensor([0.5]))
        tensor([[1., 1.]])
    """

    null: Tensor | None

    def __init__(
        self,
        net: Any,
        schedule: Schedule,
        prediction: Prediction = "epsilon",
        time_scale: float = 1.0,
        null: int | Tensor | None = None,
        keyword: str | None = None,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            expected = ", ".join(PREDICTIONS)
            raise UsageError("there is no such prediction", where="prediction", found=prediction, expected=expected)
        self.net, self.schedule, self.prediction, self.time_scale = net, schedule, prediction, time_scale
        self.keyword = keyword
        self.register_buffer("null", None if null is None else torch.as_tensor(null))

    def forward(self, x_t: Tensor, t: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """`x_0` as the network predicts it.

        Args:
            x_t: Noisy samples `[B, ...]`.
            t: Times `[B]`; without them `x_t` is standard normal noise, and the call a sample of a generator of one step.
            condition: Class labels `[B]` or embeddings `[B, ...]`; without them the empty one, where there is one.

        Raises:
            UsageError: `x_t` is noise, and the network predicts just that under a schedule that ends in noise alone.
        """
        if t is None:
            self.schedule.check_beginning(self.prediction)
        x_t, t = self.schedule.from_noise(x_t, t)
        raw = self._raw(x_t, self.time_scale * t, condition)
        return self.schedule.convert(raw, x_t, t, self.prediction, "sample")

    def null_like(self, condition: Tensor) -> Tensor:
        """The condition that says nothing, once for each sample of `condition` `[B, ...]`.

        Raises:
            UsageError: The denoiser knows none.
        """
        if self.null is None:
            raise UsageError("this denoiser has no empty condition", where="null", fix="Denoiser(..., null=classes)")
        return self.null.to(condition).expand_as(condition)

    def check_scheduler(self, scheduler: Any) -> None:
        """That a scheduler of diffusers, which was published beside a network, tells of it what this denoiser does.

        Args:
            scheduler: Its `config` names the prediction; those without one are flows'.

        Raises:
            UsageError: The network predicts something else, or was trained on another table of noise.
        """
        found = scheduler.config.get("prediction_type", "flow_prediction")
        if found != self.prediction:
            raise UsageError(
                "the network predicts something else", where="scheduler.config.prediction_type", found=found,
                expected=self.prediction, fix=f"Denoiser(..., prediction={found!r})",
            )  # fmt: skip
        self.check_table(scheduler)

    def check_table(self, scheduler: Any) -> None:
        """That a scheduler of diffusers has the same table of noise, if both have one.

        Raises:
            UsageError: They differ.
        """
        known = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(self.schedule, Table) or known is None:
            return
        own = torch.tensor([float(a) for a in self.schedule.alphas_cumprod], dtype=torch.float64)
        if own.shape != known.shape or not torch.allclose(own, known.double().cpu(), rtol=1e-3, atol=1e-6):
            raise UsageError(
                "this is another table of noise", where="scheduler.alphas_cumprod",
                found=f"{len(known)} down to {float(known[-1]):.3g}", expected=f"{len(own)} down to {float(own[-1]):.3g}",
                fix="Denoiser(..., Table(scheduler.alphas_cumprod))",
            )  # fmt: skip

    def _raw(self, x: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        if condition is None and self.null is not None:
            condition = self.null.expand(len(x), *self.null.shape)
        if condition is not None and condition.is_floating_point():
            condition = condition.to(x.dtype)  # embeddings are often kept in half precision
        if condition is None:
            found = self.net(x, time)
        elif self.keyword is None:
            found = self.net(x, time, condition)
        else:
            found = self.net(x, time, **{self.keyword: condition})
        return found if isinstance(found, Tensor) else getattr(found, "sample", found[0])


class EDMDenoiser(Denoiser):
    """A network under the preconditioning of Karras et al. 2022: `D = c_skip x + c_out F(c_in x, ln(sigma) / 4)`.

    Args:
        net: As in `Denoiser`.
        schedule: With `data`, the standard deviation of the data.
        null: As in `Denoiser`.
        keyword: As in `Denoiser`.
        time_scale: The network is told `time_scale ln(sigma) / 4`: 1 by Karras et al., 1000 by Song et al. 2023.

    Example:
        >>> one = EDMDenoiser(lambda x, t: torch.zeros_like(x), EDM())
        >>> one(torch.ones(1, 2), torch.tensor([0.5]))
        tensor([[0.5000, 0.5000]])
    """

    schedule: EDM

    def __init__(
        self,
        net: Any,
        schedule: EDM | None = None,
        null: int | Tensor | None = None,
        keyword: str | None = None,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__(net, schedule or EDM(), "sample", time_scale, null, keyword)

    def forward(self, x_t: Tensor, t: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """`x_0` as the network predicts it."""
        x_t, t = self.schedule.from_noise(x_t, t)
        _, sigma = self.schedule.factors(t, x_t)
        data = self.schedule.data
        total = (sigma**2 + data**2).sqrt()
        found = self._raw(x_t / total, self.time_scale * t.log() / 4, condition)
        return (data / total) ** 2 * x_t + sigma * data / total * found
