"""What a sentence encoder is judged by: does a query find its passage, and do its cosines rank like the teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.core.roles import Roles
from limbeck.evaluate.metrics import reciprocal_rank, spearman
from limbeck.models.sentence import SentenceEncoder


def mrr(queries: Tensor, passages: Tensor, k: int = 10) -> Tensor:
    """Mean reciprocal rank of each query's own passage among all passages, by cosine; 0 beyond rank `k`.

    Args:
        queries: Embeddings `[N, D]`.
        passages: Embeddings `[N, D]`; row `i` is the right answer to query `i`.
        k: Cut-off rank.

    Returns:
        Scalar in [0, 1].

    Example:
        >>> mrr(torch.eye(3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.1, 0.9], [0.0, 0.2, 0.1]]))
        tensor(0.6667)
    """
    return reciprocal_rank(cosines(queries, passages), torch.arange(len(queries)), k=k)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines between all rows of `a` `[N, D]` and all rows of `b` `[M, D]`: `[N, M]`.

    Example:
        >>> cosines(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
        tensor([[1., 0.]])
    """
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T


def scored_pairs(encoder: SentenceEncoder, first: Sequence[str], second: Sequence[str], scores: Tensor) -> float:
    """Spearman correlation between the cosines of text pairs and human scores `[N]`, as on STS-B."""
    a, b = encoder.encode(first), encoder.encode(second)
    return float(spearman(torch.cosine_similarity(a, b), scores))


class Retrieval:
    """Judges sentence encoders on pairs of held-out texts: `mrr@10`, and `spearman`, the rank correlation between their
    cosines and the teacher's over all combinations of a query and a passage.

    The teacher's embeddings are computed once.

    Args:
        queries: N texts, such as summary lines.
        passages: N texts; `passages[i]` is what `queries[i]` must find.
        k: Cut-off rank of the reciprocal rank.
        batch_size: Texts of one call.

    Raises:
        UsageError: There are no texts, or not as many queries as passages.
    """

    task = "retrieval"

    def __init__(self, queries: Sequence[str], passages: Sequence[str], k: int = 10, batch_size: int = 64) -> None:
        if not queries or len(queries) != len(passages):
            raise UsageError(
                "each query needs its own passage",
                where="data",
                found=f"{len(queries)} queries, {len(passages)} passages",
                expected="as many, and at least one of each",
            )
        self.queries, self.passages, self.k, self.batch_size = queries, passages, k, batch_size
        self.primary = f"mrr@{k}"
        self._teacher: Tensor | None = None

    def __call__(self, m: Roles) -> dict[str, float]:
        """The student's numbers."""
        return self.judge(m, "student")

    def judge(self, m: Roles, role: str) -> dict[str, float]:
        """The numbers of any role."""
        if self._teacher is None and "teacher" in m:
            self._teacher = self._scores(m, "teacher")
        scores = self._teacher if role == "teacher" and self._teacher is not None else self._scores(m, role)
        found = {self.primary: float(reciprocal_rank(scores, torch.arange(len(scores)), k=self.k))}
        if self._teacher is not None and role != "teacher":
            found["spearman"] = float(spearman(scores.flatten(), self._teacher.flatten()))
        return found

    def _scores(self, m: Roles, role: str) -> Tensor:
        queries, passages = (_encode(m, role, texts, self.batch_size) for texts in (self.queries, self.passages))
        return cosines(queries, passages)  # [N, N]


class Similarity:
    """Judges sentence encoders on held-out texts without labels: `spearman`, the rank correlation between their cosines
    and the teacher's over all pairs of texts.

    Args:
        texts: N >= 3 texts.
        batch_size: Texts of one call.

    Raises:
        UsageError: There are too few texts.
    """

    task, primary = "similarity", "spearman"

    def __init__(self, texts: Sequence[str], batch_size: int = 64) -> None:
        if len(texts) < 3:
            raise UsageError("too few texts to compare", where="data", found=len(texts), expected="3 or more")
        self.texts, self.batch_size = texts, batch_size
        self._teacher: Tensor | None = None

    def __call__(self, m: Roles) -> dict[str, float]:
        """The student's numbers."""
        return self.judge(m, "student")

    def judge(self, m: Roles, role: str) -> dict[str, float]:
        """The numbers of any role; the teacher agrees with itself."""
        if self._teacher is None:
            self._teacher = self._pairs(m, "teacher")
        return {"spearman": 1.0 if role == "teacher" else float(spearman(self._pairs(m, role), self._teacher))}

    def _pairs(self, m: Roles, role: str) -> Tensor:
        embeddings = _encode(m, role, self.texts, self.batch_size)
        above = torch.ones(len(embeddings), len(embeddings), dtype=torch.bool).triu(1)
        return cosines(embeddings, embeddings)[above]  # [N (N - 1) / 2]


def _encode(m: Roles, role: str, texts: Sequence[str], batch_size: int) -> Tensor:
    encoder = m[role].module
    if not isinstance(encoder, SentenceEncoder):
        raise UsageError(
            "only sentence encoders can be judged on texts",
            where=f"roles.{role}",
            found=type(encoder).__name__,
            expected="a SentenceEncoder",
            fix="load it with limbeck.models.sentence.load_encoder",
        )
    return encoder.encode(texts, batch_size)
