"""Generators are judged by samples beside real ones, and the report shows them."""

import pytest
import torch

import limbeck
from limbeck import Roles
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.data.noise import Noise
from limbeck.diffusion import Denoiser, RectifiedFlow, ring
from limbeck.evaluate.generation import Generation
from limbeck.evaluate.samples import density_and_coverage
from limbeck.evaluate.tasks import evaluator
from limbeck.finished import export
from limbeck.nn.time_mlp import TimeMLP
from limbeck.report import figures

FLOW = RectifiedFlow()


def real(n=300):
    y = torch.arange(n) % 4
    return TensorSource(ring(8, 2.0, 0.2, FLOW, classes=4).sample(n, torch.Generator().manual_seed(0), y), y)


def network():
    torch.manual_seed(0)
    return Denoiser(TimeMLP(2, 8, classes=4), FLOW, "flow_prediction", null=4)


def test_of_one_distribution_density_and_coverage_are_one():
    x, y = (torch.randn(2000, 2, generator=torch.Generator().manual_seed(i)) for i in range(2))
    found = density_and_coverage(x, y)
    assert found["density"] == pytest.approx(1.0, abs=0.05)
    assert found["coverage"] == pytest.approx(1 - 0.5**5, abs=0.02)  # no neighbour of 5 is generated: one in 32
    one = density_and_coverage(x, y[:1].repeat(50, 1))
    assert one["coverage"] < 0.02
    far = density_and_coverage(x, y + 100)
    assert far == {"density": 0.0, "coverage": 0.0}
    with pytest.raises(UsageError, match="too few"):
        density_and_coverage(x[:5], y)


def test_an_exact_teacher_covers_and_the_mean_does_not():
    judge = evaluator(real(), network())
    assert isinstance(judge, Generation)
    known = ring(8, 2.0, 0.2, FLOW, classes=4)
    m = Roles(teacher=known, student=known)
    taught, once = judge.judge(m, "teacher"), judge(m)
    assert taught["coverage"] > 0.9
    assert abs(taught["energy_distance"]) < 0.05
    assert taught["frechet_distance"] < 0.1
    assert once["coverage"] == 0.0  # one call of a denoiser is the mean of a class, where none of it is
    assert judge.judge(m, "teacher") == taught  # the noise is always the same
    assert evaluator(Noise((2,), 10), network()) is None


def test_samples_have_the_class_that_is_asked_for():
    known, source = ring(8, 2.0, 0.2, FLOW, classes=4), real(64)
    made = Generation(source, 16).generate(Roles(teacher=known).teacher, 64)
    assert (torch.cdist(made, known.means).argmin(1) % 4).equal(source.labels)


def test_a_run_shows_its_samples_and_counts_the_teachers_calls(tmp_path):
    data = Data(train=Noise((2,), 256, 4), test=real(120))
    engine = {"steps": 4, "batch_size": 32, "device": "cpu"}
    result = limbeck.distill(network(), network(), data, "swiftbrush", out=tmp_path, engine=engine, progress="off")
    html = (tmp_path / "report.html").read_text()
    assert "Samples" in html
    assert html.count("<circle") >= 3 * 64
    import json

    models = json.loads((tmp_path / "metrics.json").read_text())["models"]
    assert {"coverage", "energy_distance", "frechet_distance"} <= models["student"].keys() & models["teacher"].keys()
    assert models["student"]["throughput"] > 5 * models["teacher"]["throughput"]
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    written = export(result.out, module=network()).onnx
    assert written.inputs == ("x_t", "condition")
    z, y = torch.randn(3, 2), torch.tensor([0, 1, 3])
    (found,) = runtime.InferenceSession(written.path).run(None, {"x_t": z.numpy(), "condition": y.numpy()})
    with torch.no_grad():
        expected = result.roles.student.module.eval()(z, condition=y)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_images_become_a_grid():
    images = torch.linspace(0, 1, 5 * 64).view(5, 1, 8, 8)
    svg = figures.samples("student", images, images)
    assert svg.count("data:image/png;base64,") == 5
    assert figures.samples("student", images.flatten(1), images).count("<image") == 5
    assert figures.samples("student", torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)).count("<image") == 2
    assert figures.samples("student", torch.rand(4, 20), torch.rand(4, 20)) == ""
    Image = pytest.importorskip("PIL.Image")
    import base64
    import io
    import re

    found = Image.open(io.BytesIO(base64.b64decode(re.findall(r"base64,([^\"]+)", svg)[-1])))
    assert found.size == (8, 8)
    assert found.getpixel((7, 7)) == 255
