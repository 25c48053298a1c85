"""What several methods check of their fields, of models and of data, before the first step."""

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Roles
from limbeck.evaluate.cost import evaluating
from limbeck.losses._reduce import check_labels


def check_field(name: str, value: object, ok: bool, expected: str) -> None:
    """Raise a `UsageError` for a hyper-parameter out of its range.

    Example:
        >>> check_field("temperature", 2.0, 2.0 > 0, "above 0")
    """
    if not ok:
        raise UsageError(f"{name} is out of range", where=f"method.{name}", found=value, expected=expected)


def outputs(m: Roles, batch: Batch, *names: str) -> list[Tensor]:
    """What the roles give for a batch, in evaluation mode and without gradients; modes and statistics stay as they were.

    Args:
        m: The roles.
        batch: A batch.
        *names: Roles to ask.
    """
    found = []
    for name in names:
        with evaluating(m[name].module):
            found.append(m[name](batch))
    return found


def check_classes(m: Roles, batch: Batch, *, labels: bool) -> int:
    """The number of classes, the same in teacher and student and, where labels are used, in the labels.

    Args:
        m: Roles with a `teacher` and a `student` that give logits `[..., C]`.
        batch: A batch, with labels `y` `[...]` where they are used.
        labels: Whether labels are used.

    Raises:
        UsageError: The classes differ, or labels are missing, soft or out of range.
    """
    teacher, student = outputs(m, batch, "teacher", "student")
    if teacher.shape != student.shape:
        count = teacher.shape[-1]
        raise UsageError(
            "teacher and student do not have the same classes",
            where="roles.student",
            found=f"student {list(student.shape)}, teacher {list(teacher.shape)}",
            expected="logits of equal shape",
            fix=f"give the student {count} classes, or the data the classes that the teacher knows",
        )
    if labels and "y" not in batch:
        raise UsageError(
            "this method needs labels and the data have none",
            where="batch.y",
            found=repr(batch),
            fix="give labelled data, or use a method that needs none, such as kd",
        )
    if labels:
        check_labels("batch.y", batch.y, student)
    return student.shape[-1]
