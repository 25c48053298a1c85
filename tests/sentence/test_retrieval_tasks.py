import pytest
import torch
from scipy import stats
from tiny_encoder import TEXTS, encoder
from torch import nn

from limbeck.convert.static import StaticTokens
from limbeck.core.errors import UsageError
from limbeck.core.roles import Roles
from limbeck.evaluate.retrieval import Retrieval, Similarity, cosines, mrr, scored_pairs


def test_mrr_counts_ranks_up_to_k():
    queries = torch.eye(12)
    passages = torch.eye(12).roll(1, dims=0)  # every right passage has cosine 0, as have ten wrong ones; one has 1
    assert mrr(queries, queries, k=10) == 1
    ranks = torch.arange(2, 13, dtype=torch.float64)
    expected = (1 / ranks)[ranks <= 10].sum() / 11
    assert float(mrr(queries, passages, k=10)) == pytest.approx(float(expected), rel=1e-6)


def test_mrr_does_not_depend_on_lengths_or_rotation():
    queries, passages = torch.randn(20, 8), torch.randn(20, 8)
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    assert mrr(3 * queries @ turn, torch.rand(20, 1) * passages @ turn) == mrr(queries, passages)


def test_retrieval_judges_teacher_and_student(tmp_path):
    teacher = encoder(tmp_path)
    student = StaticTokens(TEXTS)(teacher)[0]
    evaluate = Retrieval(TEXTS, [t + " again" for t in TEXTS])
    m = Roles(teacher=teacher, student=student)
    assert set(evaluate.judge(m, "teacher")) == {"mrr@10"}
    found = evaluate(m)
    assert found["mrr@10"] == float(mrr(student.encode(TEXTS), student.encode([t + " again" for t in TEXTS])))
    pairs = [
        cosines(e.encode(TEXTS), e.encode([t + " again" for t in TEXTS])).flatten().numpy() for e in (student, teacher)
    ]
    assert found["spearman"] == pytest.approx(stats.spearmanr(*pairs).statistic, abs=1e-6)
    assert evaluate.judge(Roles(teacher=teacher, student=teacher), "student")["spearman"] == pytest.approx(1)


def test_similarity_is_the_rank_correlation_over_all_pairs(tmp_path):
    teacher = encoder(tmp_path)
    student = StaticTokens(TEXTS)(teacher)[0]
    m = Roles(teacher=teacher, student=student)
    rows, columns = torch.triu_indices(len(TEXTS), len(TEXTS), offset=1)
    pairs = [(e.encode(TEXTS)[rows] * e.encode(TEXTS)[columns]).sum(1).numpy() for e in (student, teacher)]
    assert Similarity(TEXTS)(m)["spearman"] == pytest.approx(stats.spearmanr(*pairs).statistic, abs=1e-3)
    assert Similarity(TEXTS).judge(m, "teacher") == {"spearman": 1.0}


def test_without_a_teacher_only_retrieval_is_left(tmp_path):
    assert set(Retrieval(TEXTS, TEXTS)(Roles(student=encoder(tmp_path)))) == {"mrr@10"}


def test_human_scores(tmp_path):
    model = encoder(tmp_path)
    first, second = TEXTS[:4], TEXTS[1:]
    cosine = (model.encode(first) * model.encode(second)).sum(1)
    assert scored_pairs(model, first, second, cosine.exp()) == pytest.approx(1)
    assert scored_pairs(model, first, second, -cosine) == pytest.approx(-1)


def test_data_and_models_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="its own passage"):
        Retrieval(["a"], [])
    with pytest.raises(UsageError, match="too few"):
        Similarity(["a", "b"])
    with pytest.raises(UsageError, match=r"roles\.student"):
        Retrieval(["a"], ["b"])(Roles(student=nn.Linear(1, 1)))
