"""The Lightning module and the trainer of `examples/` end in the weights of a loop written by hand."""

import copy
import runpy
from dataclasses import dataclass

import lightning
import pytest
import torch
from pages import ROOT
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainingArguments

from limbeck import Batch, Method, Roles, Update
from limbeck.methods.kd.method import KD


@dataclass(frozen=True)
class Adversarial(Method):
    """Two roles in turn, the critic's gradient in two parts."""

    def step(self, m, batch):
        with torch.no_grad():
            real = m.teacher(batch)
        fake = m.student(batch)
        yield Update("critic", F.softplus(m.critic(fake.detach())).mean(), apply=False)
        yield Update("critic", F.softplus(-m.critic(real)).mean())
        yield Update("student", F.softplus(-m.critic(fake)).mean())


@pytest.fixture(scope="module")
def examples():
    return {name: runpy.run_path(str(ROOT / "examples" / f"{name}.py")) for name in ("lightning_module", "trainer")}


def assert_same_weights(a, b, tolerance=0.0):
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def test_lightning_runs_alternating_updates_in_order(examples, tmp_path):
    teacher = nn.Sequential(nn.Linear(8, 5), nn.Dropout(0.5))
    learning = {"student": nn.Linear(8, 5), "critic": nn.Linear(5, 1)}
    plain, before = copy.deepcopy(learning), copy.deepcopy(teacher)
    x, y = torch.randn(48, 8), torch.arange(48) % 5
    module = examples["lightning_module"]["Distillation"](Adversarial(), learning, {"teacher": teacher}, lr=0.01)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=16))

    optimizers = {name: torch.optim.AdamW(net.parameters(), lr=0.01) for name, net in plain.items()}
    student, critic = plain["student"], plain["critic"]
    for rows in 2 * list(torch.arange(48).split(16)):
        fake = student(x[rows])
        loss = F.softplus(critic(fake.detach())).mean() + F.softplus(-critic(before.eval()(x[rows]))).mean()
        for name, value in (
            ("critic", lambda loss=loss: loss),
            ("student", lambda fake=fake: F.softplus(-critic(fake)).mean()),
        ):
            optimizers[name].zero_grad()
            value().backward()
            optimizers[name].step()
    for name in learning:
        assert_same_weights(learning[name], plain[name], 1e-6)
    assert_same_weights(teacher, before)
    assert not any(part.training for part in teacher.modules())


def test_trainer_with_accumulation_takes_the_steps_of_the_whole_batch(examples, tmp_path):
    teacher, student = (without_dropout(examples["trainer"]["classifier"](layers)) for layers in (2, 1))
    plain, before = copy.deepcopy(student), copy.deepcopy(teacher)
    tokens, labels = torch.randint(1, 50, (16, 6)), torch.arange(16) % 3
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,  # both halves of the data in each step, in whatever order
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    samples = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels.tolist(), strict=True)]
    method = KD(temperature=2.0, label_weight=0.5)
    options = {"args": arguments, "train_dataset": samples, "eval_dataset": samples}
    trainer = examples["trainer"]["DistillationTrainer"](method=method, teacher=teacher, model=student, **options)
    trainer.train()

    m = Roles(teacher=before, student=plain)
    m.freeze("teacher")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        plain.train()
        optimizer.zero_grad()
        for update in method.step(m, Batch(x={"input_ids": tokens}, y=labels)):
            update.backward()
        optimizer.step()
    assert_same_weights(student, plain, 1e-5)
    assert_same_weights(teacher, before)
    expected = F.cross_entropy(plain.eval()(tokens).logits, labels).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def without_dropout(module):
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module
