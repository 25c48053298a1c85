"""Errors that say what, where, what was found, what was expected, and how to mend it."""

import logging
from importlib import import_module
from typing import Any


class LimbeckError(Exception):
    """One clear message; the command line prints it without a traceback and exits with `exit_code`.

    Args:
        what: The problem in one short sentence.
        where: The field, file, role or line it concerns.
        found: What was there.
        expected: What should have been there.
        fix: What to do about it, in words or as a command.

    Example:
        >>> print(UsageError("unknown method", where="method.name", found="kdd", fix="limbeck methods lists them"))
        unknown method
          where: method.name
          found: kdd
          fix: limbeck methods lists them
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: object = None, found: object = None, expected: object = None, fix: str | None = None
    ) -> None:
        self.what, self.where, self.found, self.expected, self.fix = what, where, found, expected, fix
        parts = {"where": where, "found": found, "expected": expected, "fix": fix}
        super().__init__("\n  ".join([what, *(f"{k}: {v}" for k, v in parts.items() if v is not None)]))


class UsageError(LimbeckError):
    """A recipe, argument, file or model that cannot work; found before any work is done (exit code 2)."""

    exit_code = 2


class RunError(LimbeckError):
    """A run that had to stop (exit code 1)."""


class Interrupted(LimbeckError):
    """A run that was asked to stop, and saved its state (exit code 130)."""

    exit_code = 130


def quiet_torchao() -> None:
    """Drop what torch and diffusers say of torchao's inside, which transformers imports wherever it is there."""
    for name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).addFilter(_not_of_torchao)


def _not_of_torchao(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "register_constant() on Enum" not in text and "Unable to import `torchao` Tensor" not in text


def require(module: str, extra: str) -> Any:
    """Import a module of an optional extra, or say which extra to install.

    Args:
        module: Dotted module name, such as `"timm"`.
        extra: The extra of Limbeck that brings it, such as `"vision"`.

    Returns:
        The imported module.

    Raises:
        UsageError: The module is not installed.

    Example:
        >>> require("json", extra="core").dumps([1])
        '[1]'
    """
    quiet_torchao()
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name.split(".")[0]):
            raise
        raise UsageError(
            f"the package '{module.split('.')[0]}' is needed here and not installed",
            fix=f'pip install "limbeck[{extra}]"',
        ) from None
