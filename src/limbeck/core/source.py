"""What the engine needs of a data set."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from limbeck.core.batch import Batch


@runtime_checkable
class Source(Protocol):
    """A data set of known length that makes batches from rows.

    A batch is a function of (rows, views) alone: augmentation is drawn from (sample id, view), never from the state of a
    worker, so that teacher outputs can be stored and runs resumed.

    Attributes:
        ids: Stable sample ids `[N]` int64, unique; they survive shuffling, sub-setting and restarts.
        views: Number of augmentation seeds in use: epoch `e` shows view `e % views`; 1 for none, 0 for a new one every epoch.
    """

    ids: Tensor
    views: int

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows` `[B]` seen with the augmentation seed `view`; has at least `x`, `id` and `view`."""
        ...

    def fingerprint(self) -> str:
        """A hash of the content that changes when any sample or the augmentation does."""
        ...
