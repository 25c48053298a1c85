"""Self-distillation: the closed forms of kernel ridge, the estimated label weight, the network's loss, its chain, bad input."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import limbeck
from limbeck import Batch, Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.core.stages import Collect, Convert, Train
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.evaluate.tasks import predict
from limbeck.methods.self_distillation import kernel as theory
from limbeck.methods.self_distillation.method import SelfDistillation
from limbeck.methods.self_distillation.restart import Copy, Redraw
from limbeck.nn.mlp import mlp
from limbeck.prove import seeded

# Eleven noisy points of a sine, the values of Mobahi et al. 2020.
Y = np.array(
    [0.384766, 1.233397, 1.332322, 0.692016, -0.297561, -0.241893, -0.796449, -0.961648, -0.496725, -0.346907, 0.558951]
)
ALPHA = 0.2


def rbf(a, b):
    return np.exp(-80 * (a[:, None] - b) ** 2)


X = np.linspace(0, 1, 11)
GRID = np.linspace(0, 1, 101)
K = rbf(X, X)
A = np.linalg.solve(K + ALPHA * np.eye(11), K)


def error(duals):
    """Mean squared distance of a function to the sine without noise."""
    return np.mean((rbf(GRID, X) @ duals - np.sin(2 * np.pi * GRID)) ** 2)


# Kernel ridge

STEPS = {
    0.0: (0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251),
    0.25: (0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011),
    0.35: (0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948),
}
LIMITS = {0.0: 0.49505, 0.25: 0.15250, 0.35: 0.14959}


@pytest.mark.parametrize("weight", STEPS)
def test_the_errors_of_the_toy_are_those_of_the_official_notebook(weight):
    duals = theory.distill_duals(K, Y, alpha=ALPHA, label_weight=weight, steps=6)
    assert [round(error(c), 5) for c in duals] == list(STEPS[weight])
    last = theory.limit(K, Y, alpha=ALPHA, label_weight=weight)
    assert round(error(np.linalg.solve(K, last)), 5) == LIMITS[weight]


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.6, 1.0])
def test_the_steps_are_the_iteration_and_the_closed_form(weight):
    found, expected = theory.distill_steps(K, Y, alpha=ALPHA, label_weight=weight, steps=7), Y
    for t in range(1, 8):
        expected = A @ (weight * Y + (1 - weight) * expected)
        np.testing.assert_allclose(found[t - 1], expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            theory.distilled(K, Y, alpha=ALPHA, label_weight=weight, step=t), expected, rtol=0, atol=1e-12
        )


def test_each_step_may_have_its_own_weight():
    expected, weights = A @ Y, [0.9, 0.0, 0.3]
    for weight in weights:
        expected = A @ (weight * Y + (1 - weight) * expected)
    found = theory.distill_steps(K, Y, alpha=ALPHA, label_weight=weights, steps=4)
    np.testing.assert_allclose(found[-1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
def test_many_steps_are_ridge_with_the_penalty_over_the_weight(weight):
    ridge = np.linalg.solve(K + ALPHA / weight * np.eye(11), K @ Y)
    np.testing.assert_allclose(theory.limit(K, Y, alpha=ALPHA, label_weight=weight), ridge, rtol=0, atol=1e-12)
    many = theory.distill_steps(K, Y, alpha=ALPHA, label_weight=weight, steps=500)[-1]
    np.testing.assert_allclose(many, ridge, rtol=0, atol=1e-12)


def test_labels_alone_change_nothing_and_no_labels_are_powers_that_collapse():
    for fitted in theory.distill_steps(K, Y, alpha=ALPHA, label_weight=1.0, steps=5):
        np.testing.assert_allclose(fitted, A @ Y, rtol=0, atol=1e-12)
    for t, fitted in enumerate(theory.distill_steps(K, Y, alpha=ALPHA, label_weight=0.0, steps=5), start=1):
        np.testing.assert_allclose(fitted, np.linalg.matrix_power(A, t) @ Y, rtol=0, atol=1e-12)
    assert not theory.limit(K, Y, alpha=ALPHA, label_weight=0.0).any()


def test_the_duals_are_the_function_of_the_fitted_values():
    duals = theory.distill_duals(K, Y, alpha=ALPHA, label_weight=[0.2, 0.7], steps=3)
    fitted = theory.distill_steps(K, Y, alpha=ALPHA, label_weight=[0.2, 0.7], steps=3)
    np.testing.assert_allclose(duals @ K, fitted, rtol=0, atol=1e-12)


def test_several_targets_are_several_fits():
    both = np.stack([Y, Y**2], 1)
    found = theory.distill_steps(K, both, alpha=ALPHA, label_weight=0.4, steps=3)
    alone = theory.distill_steps(K, both[:, 1], alpha=ALPHA, label_weight=0.4, steps=3)
    np.testing.assert_allclose(found[..., 1], alone, rtol=0, atol=1e-14)


def test_a_mixed_target_has_the_minimiser_of_both_terms():
    optimize = pytest.importorskip("scipy.optimize")
    before, weight = A @ Y, 0.35

    def objective(c):
        f = K @ c
        terms = weight * np.sum((f - Y) ** 2) + (1 - weight) * np.sum((f - before) ** 2) + ALPHA * c @ f
        gradient = K @ (weight * (f - Y) + (1 - weight) * (f - before) + ALPHA * c)
        return terms / 2, gradient

    found = optimize.minimize(objective, np.zeros(11), jac=True, method="BFGS", options={"gtol": 1e-13})
    expected = theory.distill_steps(K, Y, alpha=ALPHA, label_weight=weight, steps=2)[1]
    np.testing.assert_allclose(K @ found.x, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8])
def test_each_step_comes_closer_to_the_limit_at_the_rate_of_the_theory(weight):
    steps = theory.distill_steps(K, Y, alpha=ALPHA, label_weight=weight, steps=12)
    apart = np.linalg.norm(steps - theory.limit(K, Y, alpha=ALPHA, label_weight=weight), axis=1)
    rate = (1 - weight) * np.linalg.eigvalsh(A).max()
    assert (apart[1:] <= rate * apart[:-1] + 1e-14).all()


def test_small_directions_are_shrunk_more_than_by_the_first_fit():
    values = np.linalg.eigvalsh(K)
    for weight in (0.0, 0.3, 0.8):
        factors = theory.shrinkage(values, ALPHA, np.full(9, weight))
        ratios = factors[:, 1:] / factors[:, :-1]  # of a larger to the next smaller one
        assert (ratios[1:] >= ratios[0] - 1e-12).all()
        if weight == 0:
            assert (np.diff(ratios, axis=0) >= -1e-12).all()


def test_a_kernel_of_lower_rank_is_no_trouble():
    low = K[:, :3] @ K[:3]
    found = theory.distill_steps(low, Y, alpha=1e-6, label_weight=0.5, steps=3)
    assert np.isfinite(found).all()


# The label weight


def predictions(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, 40, 2))


def test_the_label_weight_is_the_best_of_a_fine_grid():
    y, g_1, g_0 = predictions(0)
    y = 0.62 * g_1 + 0.38 * g_0 + 0.1 * y
    grid = np.linspace(0, 1, 100_001)
    # The error is a parabola in the weight.
    a, b = np.sum((g_1 - g_0) ** 2), np.sum((y - g_0) * (g_1 - g_0))
    best = grid[np.argmin(a * grid**2 - 2 * b * grid)]
    assert theory.optimal_label_weight(y, g_1, g_0) == pytest.approx(best, abs=1e-5)
    errors = [np.sum((y - w * g_1 - (1 - w) * g_0) ** 2) for w in (best - 1e-3, best, best + 1e-3)]
    assert errors[1] == min(errors)


def test_the_label_weight_at_its_ends_and_under_a_shift():
    y, g_1, g_0 = predictions(1)
    best = theory.optimal_label_weight
    assert best(g_1, g_1, g_0) == pytest.approx(1, abs=1e-12)
    assert best(g_0, g_1, g_0) == 0
    assert best(y, g_1, g_1) == 1  # nothing to mix
    assert best(y + 5, g_1 + 5, g_0 + 5, clip=False) == pytest.approx(best(y, g_1, g_0, clip=False), abs=1e-12)
    assert (best(2 * g_1 - g_0, g_1, g_0), best(2 * g_0 - g_1, g_1, g_0)) == (1, 0)
    assert best(2 * g_1 - g_0, g_1, g_0, clip=False) == pytest.approx(2, abs=1e-12)
    assert best(2 * g_0 - g_1, g_1, g_0, clip=False) == pytest.approx(-1, abs=1e-12)


def test_bad_input_to_the_theory_is_refused():
    def fit(**changed):
        given = {"kernel": K, "y": Y, "alpha": ALPHA, "label_weight": 0.5, "steps": 3}
        return theory.distill_steps(**(given | changed))

    for changed in ({"alpha": 0.0}, {"steps": 0}, {"label_weight": 1.5}, {"label_weight": [0.5]}, {"kernel": K[:5]}):
        with pytest.raises(UsageError, match=next(iter(changed))):
            fit(**changed)
    with pytest.raises(UsageError, match="finite"):
        theory.optimal_label_weight([np.nan], [1.0], [0.0])
    with pytest.raises(UsageError, match="shape"):
        theory.optimal_label_weight([1.0], [1.0, 2.0], [0.0])


# The estimator


@pytest.fixture
def regressor():
    pytest.importorskip("sklearn")
    from limbeck.methods.self_distillation.regressor import SelfDistillationRegressor

    return SelfDistillationRegressor


def test_one_step_is_kernel_ridge_and_many_are_ridge_with_a_larger_penalty(regressor):
    from sklearn.kernel_ridge import KernelRidge

    x, new = X[:, None], GRID[:, None]
    for alpha, steps in ((ALPHA, 1), (ALPHA / 0.4, 300)):
        found = regressor(alpha=ALPHA, steps=steps, label_weight=0.4, gamma=80).fit(x, Y).predict(new)
        expected = KernelRidge(alpha=alpha, kernel="rbf", gamma=80).fit(x, Y).predict(new)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_the_estimator_estimates_its_weights_step_by_step(regressor):
    x, held = X[:, None], GRID[5::10, None]
    truth = np.sin(2 * np.pi * held[:, 0])
    model = regressor(alpha=ALPHA, steps=3, label_weight="auto", gamma=80).fit(x, Y, X_val=held, y_val=truth)
    chosen = model.label_weights_
    first = regressor(alpha=ALPHA, steps=1, gamma=80).fit(x, Y).predict(held)
    alone = regressor(alpha=ALPHA, steps=2, label_weight=0.0, gamma=80).fit(x, Y).predict(held)
    assert chosen[0] == pytest.approx(theory.optimal_label_weight(truth, first, alone), abs=1e-12)
    errors = [np.sum((truth - said) ** 2) for said in model.staged_predict(held)]
    for other in (max(0.0, chosen[0] - 0.05), min(1.0, chosen[0] + 0.05)):
        worse = regressor(alpha=ALPHA, steps=2, label_weight=other, gamma=80).fit(x, Y).predict(held)
        assert errors[1] <= np.sum((truth - worse) ** 2) + 1e-12
    assert errors[1] <= errors[0] + 1e-12
    with pytest.raises(UsageError, match="X_val"):
        regressor(label_weight="auto").fit(x, Y)


def test_the_estimator_is_one_of_scikit_learn(regressor):
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV
    from sklearn.utils.estimator_checks import check_estimator

    check_estimator(regressor())
    model = clone(regressor(steps=4).set_params(alpha=0.3))
    assert (model.get_params()["alpha"], model.get_params()["steps"]) == (0.3, 4)
    search = GridSearchCV(regressor(gamma=80), {"label_weight": [0.2, 0.8], "kernel": ["rbf", "laplacian"]}, cv=2)
    assert search.fit(X[:, None], Y).best_params_["label_weight"] in (0.2, 0.8)


# The network's loss

POINTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


def roles():
    return Roles(teacher=seeded(0, lambda: mlp(6, 16, 4)), student=seeded(1, lambda: mlp(6, 16, 4)))


def gradient(method, m=None, **step):
    m = m or roles()
    m.freeze("teacher")
    method.step(m, Batch(x=POINTS, y=LABELS), **step).backward(m)
    return torch.cat([p.grad.flatten() for p in m.student.parameters()])


class Refuses(nn.Module):
    def forward(self, x):
        raise AssertionError("the teacher was asked")


def test_the_loss_is_the_mix_of_two_squared_errors_of_probabilities():
    m = roles()
    p, q, e = m.student(POINTS).softmax(-1), m.teacher(POINTS).softmax(-1), torch.eye(4)[LABELS]
    expected = 0.3 * ((p - e) ** 2).mean() + 0.7 * ((p - q) ** 2).mean()
    found = SelfDistillation(label_weight=0.3).step(m, Batch(x=POINTS, y=LABELS))
    torch.testing.assert_close(found.loss, expected)


def test_labels_alone_never_ask_the_teacher():
    m = Roles(teacher=Refuses(), student=roles().student.module)
    alone = gradient(SelfDistillation(label_weight=1.0), m)
    again = roles()
    ((again.student(POINTS).softmax(-1) - torch.eye(4)[LABELS]) ** 2).mean().backward()
    torch.testing.assert_close(alone, torch.cat([p.grad.flatten() for p in again.student.parameters()]))


def test_no_labels_never_read_them():
    garbage = Batch(x=POINTS, y=torch.full((8,), -7))
    found = SelfDistillation(label_weight=0.0).step(roles(), garbage).loss
    torch.testing.assert_close(found, SelfDistillation(label_weight=0.0).step(roles(), Batch(x=POINTS)).loss)


def test_the_teacher_gets_no_gradient():
    m = roles()  # not frozen: the step itself must not differentiate through the teacher
    SelfDistillation(label_weight=0.5).step(m, Batch(x=POINTS, y=LABELS)).loss.backward()
    assert all(p.grad is None for p in m.teacher.parameters())


class Certain(nn.Module):
    """Logits that are one-hot as probabilities."""

    def forward(self, x):
        return 1e4 * torch.eye(4)[LABELS]


def test_where_all_agree_the_loss_is_zero():
    m = Roles(teacher=Certain(), student=Certain())
    assert SelfDistillation(label_weight=0.4).step(m, Batch(x=POINTS, y=LABELS)).loss == 0


def test_the_gradient_is_linear_in_the_label_weight():
    none, half, all_of_it = (gradient(SelfDistillation(label_weight=w)) for w in (0.0, 0.25, 1.0))
    torch.testing.assert_close(half, 0.75 * none + 0.25 * all_of_it)


def test_the_norm_penalty_is_the_sum_of_norms_not_squared():
    m, batch = roles(), Batch(x=POINTS, y=LABELS)
    plain, more = (SelfDistillation(label_weight=0.5, norm_penalty=rho).step(m, batch).loss for rho in (0.0, 0.01))
    torch.testing.assert_close(more - plain, 0.01 * sum(p.norm() for p in m.student.parameters()))


# Beginning anew


def test_fresh_weights_follow_from_the_seed_and_are_drawn_as_at_first():
    before = torch.random.get_rng_state()
    net = nn.Sequential(nn.Linear(400, 300), nn.BatchNorm1d(300), nn.MultiheadAttention(300, 2))
    net[1].running_mean += 3
    torch.random.set_rng_state(before)
    one, other, third = Redraw(1)(net)[0], Redraw(1)(net)[0], Redraw(2)(net)[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one[0].weight, net[0].weight)
    assert not torch.equal(one[0].weight, third[0].weight)
    assert one[0].weight.std().item() == pytest.approx(nn.Linear(400, 300).weight.std().item(), rel=0.02)
    assert not one[1].running_mean.any()
    assert torch.equal(seeded(1, lambda: nn.Linear(9, 9)).weight, Redraw(1)(nn.Linear(9, 9))[0].weight)


def test_what_does_not_learn_stays():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    fresh, _ = Redraw(5)(net)
    assert torch.equal(fresh[0].weight, net[0].weight)
    assert not torch.equal(fresh[1].weight, net[1].weight)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * self.body(x)


class Initialised(Scaled):
    def init_weights(self):
        nn.init.constant_(self.scale, 2.0)


def test_a_part_that_cannot_draw_is_named():
    with pytest.raises(UsageError, match=r"Scaled\.scale"):
        Redraw(0)(Scaled())
    assert Redraw(0)(Initialised())[0].scale == 2
    batch = Batch(x=POINTS, y=LABELS)
    with pytest.raises(UsageError, match="restart=initial"):
        SelfDistillation().check(Roles(student=Scaled()), batch)
    SelfDistillation(restart="initial").check(Roles(student=Scaled()), batch)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_models_of_timm_draw_fresh_weights(name):
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, num_classes=3)
    fresh, _ = Redraw(5)(net)
    changed = {n for (n, p), q in zip(net.named_parameters(), fresh.parameters(), strict=True) if not torch.equal(p, q)}
    matrices = {n for n, p in net.named_parameters() if p.ndim > 1}
    zero = {n for n in matrices if not dict(net.named_parameters())[n].any()}
    assert matrices - zero <= changed | {n for n in matrices if n.endswith("head.weight")}


# The chain


def world(seed=0, count=300):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=g)
    y = (x[:, :4] + 0.5 * torch.randn(count, 4, generator=g)).argmax(1)
    source = TensorSource(x, y)
    return Data(train=source.subset(range(count // 2)), validation=source.subset(range(count // 2, count)))


ENGINE = Engine(epochs=4, batch_size=32, device="cpu", evaluate_every=0)
OPTIM = {"student": Optim("adam", lr=0.01)}


def chain(method, m=None, data=None, **settings):
    """The stages of a run and its result."""
    seen = []

    class Watched(type(method)):
        def after_stage(self, m, stage):
            copies = {name: {k: v.clone() for k, v in r.module.state_dict().items()} for name, r in m.items()}
            seen.append((stage, copies))

    given = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    m = m or Roles(student=mlp(6, 16, 4))
    result = execute(Watched(**given), m, data or world(), dataclasses.replace(ENGINE, **settings), optim=OPTIM)
    return seen, result


def named(seen, kind):
    return [stage.name for stage, _ in seen if isinstance(stage, kind)]


def test_an_estimated_chain_trains_once_and_then_twice_for_each_generation():
    seen, result = chain(SelfDistillation(generations=2))
    assert named(seen, Train) == ["first", "unguided_1", "generation_1", "unguided_2", "generation_2"]
    assert named(seen, Collect) == ["first_outputs", "label_weight_1", "label_weight_2"]
    weights = [s.value for s in result.results if hasattr(s, "value") and isinstance(s.value, float)]
    assert all(0 <= w <= 1 for w in weights)
    assert len(weights) == 2
    # The numbers again, from the weights that the stages left.
    after = {stage.name: states["student"] for stage, states in seen}
    data = world()

    def said(name):
        net = mlp(6, 16, 4)
        net.load_state_dict(after[name])
        return predict(Roles(student=net).student, data.validation)[0].softmax(-1)

    truth = torch.eye(4)[predict(result.roles.student, data.validation)[1]]
    for t, weight in enumerate(weights, start=1):
        assert weight == theory.optimal_label_weight(truth, said("first"), said(f"unguided_{t}"))


def test_a_chain_of_fixed_weight_trains_once_for_each_generation():
    assert named(chain(SelfDistillation(generations=2, label_weight=0.5))[0], Train) == [
        "first",
        "generation_1",
        "generation_2",
    ]


def test_a_teacher_is_the_first_fit():
    seen, _ = chain(SelfDistillation(generations=2, label_weight=0.5), roles())
    assert named(seen, Train) == ["generation_1", "generation_2"]
    first, second = (stage for stage, _ in seen if isinstance(stage, Train))
    assert (first.frozen, second.frozen) == (("teacher",), ("previous",))


def test_each_training_begins_at_weights_of_its_own_whatever_the_student_has():
    method = SelfDistillation(generations=2, label_weight=0.5)

    def starts(m, seed):
        seen, result = chain(method, m, seed=seed)
        begun = [
            s["student"]["0.weight"] for stage, s in seen if isinstance(stage, Convert) and stage.role == "student"
        ]
        return begun, result.roles.student.module[0].weight

    one, end = starts(Roles(student=mlp(6, 16, 4)), 0)
    same, again = starts(Roles(student=mlp(6, 16, 4)), 0)
    other, _ = starts(Roles(student=mlp(6, 16, 4)), 1)
    assert len({tuple(w.flatten().tolist()) for w in (*one, *other)}) == 6
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert torch.equal(end, again)


def test_each_training_may_begin_at_the_first_weights():
    m = Roles(student=mlp(6, 16, 4))
    first = m.student.module[0].weight.clone()
    seen, result = chain(SelfDistillation(generations=2, label_weight=0.5, restart="initial"), m)
    begun = [s["student"]["0.weight"] for stage, s in seen if isinstance(stage, Convert) and stage.role == "student"]
    assert len(begun) == 3
    assert all(torch.equal(w, first) for w in begun)
    assert not torch.equal(result.roles.student.module[0].weight, first)


def test_the_teacher_of_a_generation_is_the_generation_before():
    seen, _ = chain(SelfDistillation(generations=3, label_weight=0.5))
    ends = {stage.name: states for stage, states in seen}
    for teacher, taught in (("first", "generation_1"), ("generation_1", "generation_2")):
        for key, value in ends[teacher]["student"].items():
            assert torch.equal(ends[taught]["previous"][key], value)


def test_a_copy_is_apart():
    net = nn.Linear(2, 2)
    copied, _ = Copy()(net)
    copied.weight.data.zero_()
    assert net.weight.any()


def test_it_learns_and_labels_keep_it_from_collapse():
    data = world(count=600)

    def sure(**fields):
        result = chain(SelfDistillation(generations=4, **fields), data=data, epochs=15)[1]
        scores, y = predict(result.roles.student, data.validation)
        return scores.softmax(-1).amax(-1).mean().item(), (scores.argmax(-1) == y).float().mean().item()

    alone, guided = sure(label_weight=0.0), sure(label_weight=0.8)
    assert guided[1] > 0.6
    assert alone[0] < guided[0]  # each generation without labels is less sure


# From the outside


def test_distill_with_a_teacher_and_without_one(tmp_path):
    x, y = torch.randn(200, 6), torch.arange(200) % 4
    for teacher in (mlp(6, 16, 4), None):
        out = tmp_path / ("with" if teacher else "without")
        result = limbeck.distill(
            teacher,
            mlp(6, 16, 4),
            (x, y),
            "self_distillation",
            generations=1,
            out=out,
            engine={"epochs": 1},
            progress="off",
        )
        assert "top1" in result.metrics
        assert (out / "report.html").exists()


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="norm_penalty"):
        SelfDistillation(norm_penalty=-1)
    for field in (
        {"generations": 0},
        {"label_weight": 1.1},
        {"label_weight": "guess"},
        {"restart": "warm"},
        {"norm_penalty": -1},
    ):
        with pytest.raises(UsageError, match=next(iter(field))):
            SelfDistillation(**field)
    data, method = world(), SelfDistillation()
    with pytest.raises(UsageError, match=r"data\.validation"):  # before any training
        execute(method, Roles(student=mlp(6, 4)), Data(train=data.train), ENGINE)
    with pytest.raises(UsageError, match="trained on"):
        method.check_data(Data(train=data.train, validation=data.train.subset(range(20))))
    with pytest.raises(UsageError, match="no labels"):
        method.check_data(Data(train=data.train, validation=TensorSource(torch.randn(9, 6))))
    SelfDistillation(label_weight=0.5).check_data(Data(train=data.train))
    method.check_data(data)
    with pytest.raises(UsageError, match="needs labels"):
        method.check(Roles(student=mlp(6, 4)), Batch(x=POINTS))
    with pytest.raises(UsageError, match="same classes"):
        method.check(Roles(teacher=mlp(6, 4), student=mlp(6, 3)), Batch(x=POINTS, y=LABELS))
    with pytest.raises(UsageError, match="number"):
        method.step(roles(), Batch(x=POINTS, y=LABELS))


# The claims of the theory on real data


def test_what_the_card_says_of_kernel_ridge_regression():
    pytest.importorskip("sklearn")
    from limbeck.methods.self_distillation.proof import ridge

    found = ridge(penalties=(0.1, 1.0))
    small, large = found[0.1], found[1.0]
    # Enough regularisation: more of it is worse, and the estimated weights keep the chain where it was.
    assert large.unguided[3] > large.unguided[2] > large.unguided[0]
    assert max(abs(error / large.guided[0] - 1) for error in large.guided) < 0.02
    # Too little: both are better than the teacher.
    assert small.unguided[3] < small.unguided[1] < small.unguided[0]
    assert small.guided[3] < 0.95 * small.guided[0]
    assert small.weights[0] < 0.1
    for one in found.values():  # the estimated weight is as good as a searched one
        assert np.mean(one.first) == pytest.approx(np.mean(one.searched), rel=0.005)
