"""Adult (Becker and Kohavi 1996): 48,842 people, whether they earn more than 50,000 dollars, and their sex, which is protected.

Put `adult.data` and `adult.test` of the UCI repository into `adult/` beside this file. Without them drawn rows stand in.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.data import Data
from limbeck.data.categorical import Columns, RowSource, columns_of, read_table, table_data
from limbeck.nn.vae import TableVAE

FOLDER = Path(__file__).parent / "adult"
PROTECTED, TARGET = "sex", "income"
NAMES = [
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race", "sex",
    "capital-gain", "capital-loss", "hours-per-week", "native-country", "income",
]  # fmt: skip
LEFT_OUT = ("fnlwgt", "education-num")  # the census's weight of a row, and education once more
# How many values the columns of words have; numbers are put into bins.
WORDS = {
    "workclass": 9, "education": 16, "marital-status": 7, "occupation": 15, "relationship": 6, "race": 5, "native-country": 42,
}  # fmt: skip


def table() -> dict[str, list[Any]]:
    """Both files as one table; `?` is a category of its own."""
    found: dict[str, list[Any]] = {name: [] for name in NAMES}
    for file in ("adult.data", "adult.test"):
        lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
        body = "\n".join(line for line in lines if line.strip() and not line.startswith("|"))
        copy = FOLDER / f"{file}.csv"
        copy.write_text(body + "\n", encoding="utf-8")
        for name, column in read_table(copy, NAMES).items():
            found[name] += [v.rstrip(".") if name == TARGET else v for v in column]
    return {name: column for name, column in found.items() if name not in LEFT_OUT}


def data() -> Data:
    """The rows in three parts."""
    if not (FOLDER / "adult.data").is_file():
        warnings.warn(f"{FOLDER}/adult.data is not there: drawn rows are taken", stacklevel=2)
        return _drawn()
    return table_data(table(), PROTECTED, TARGET, bins=8, validation=0.1, test=0.2)


def teacher() -> nn.Module:
    """The autoencoder of FairDisCo: 64 units, 8 latents."""
    return _model(64)


def student() -> nn.Module:
    """An encoder of 16 units in front of a decoder of 64."""
    return _model(16)


def _model(hidden: int) -> nn.Module:
    with torch.device("cpu"):  # a plan makes models without values, and the table has some
        columns = columns_of(data().train)
    assert columns is not None
    return TableVAE(columns.sizes, len(columns.groups), latent=8, hidden=hidden)


def _drawn() -> Data:
    sizes = [WORDS.get(name, 2 if name == TARGET else 8) for name in NAMES if name not in (*LEFT_OUT, PROTECTED)]
    columns, g = Columns.numbered(sizes, 2), torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(n, (4096,), generator=g) for n in sizes], 1)
    groups = torch.randint(2, (4096,), generator=g)
    parts = {"train": slice(0, 2048), "validation": slice(2048, 3072), "test": slice(3072, None)}
    ids = torch.arange(4096)
    return Data(**{name: RowSource(columns, codes[own], groups[own], ids[own]) for name, own in parts.items()})
