"""What a model returns: one tensor or several, logits or probabilities, one number for two classes."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY
from bnpatch.models.outputs import Kind
from bnpatch.models.torch_model import TorchModel

CLASSES = 3


@dataclass
class Returned:
    loss: Tensor | None
    scores: Tensor
    features: Tensor


class Brightest(nn.Module):
    """The class of an image is its brightest channel; ``form`` makes the return value of logits (N, 3)."""

    def __init__(self, form=lambda y: y):
        super().__init__()
        self.norm, self.form = nn.BatchNorm2d(CLASSES), form

    def forward(self, x):
        return self.form(4 * self.norm(x).mean((2, 3)))


class TwoHeads(Brightest):
    def __init__(self):
        super().__init__(None)

    def forward(self, x):
        y = self.norm(x).mean((2, 3))
        return {"other": -y, "kind": y}


def features(y):
    return torch.cat([-y, y, -y], 1)  # (N, 9)


def data(count=40, classes=CLASSES):
    """Inputs (N, 3, 4, 4) and their classes."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % classes
    x = random.normal(0, 0.3, (count, CLASSES, 4, 4))
    x[np.arange(count), labels] += 1
    return x.astype(np.float32), labels


def opened(form, **options):
    return bnpatch.load(Brightest(form).eval(), device="cpu", preprocessing={"img_size": 4}, **options)


@pytest.mark.filterwarnings("ignore:.* is read:bnpatch.core.errors.BnpatchWarning")
@pytest.mark.parametrize(
    "form",
    [
        lambda y: (features(y), y),
        lambda y: [features(y), y],
        lambda y: {"embedding": features(y), "head": y},
        lambda y: {"features": features(y), "heads": {"kind": y, "age": torch.cat([-y, y], 1)}},
        lambda y: Returned(None, y, features(y)),
        lambda y: SimpleNamespace(logits=y, pooled=features(y), loss=y.mean()),
        lambda y: (y, -y),  # as an auxiliary classifier, which is the second
    ],
)
def test_the_output_with_the_classes_is_found(form):
    model = opened(form)
    assert evaluate(model, bnpatch.open_examples(data(), model)).mean(ACCURACY) == 1.0


def test_what_was_taken_and_what_else_there_is_is_said():
    model = opened(lambda y: (features(y), y))
    with pytest.warns(BnpatchWarning, match=r"returns 0 \(N, 9\), 1 \(N, 3\); 1 \(N, 3\) is read, --output"):
        bnpatch.open_examples(data(), model)


@pytest.mark.parametrize("name", ["kind", "1"])
def test_equal_heads_are_told_apart_by_name_or_number(name):
    def heads(y):
        return {"other": -y, "kind": y}

    with pytest.raises(BnpatchError, match=r"outputs: other \(N, 3\), kind \(N, 3\); say with --output"):
        bnpatch.open_examples(data(), opened(heads))
    model = opened(heads, output=name)
    assert evaluate(model, bnpatch.open_examples(data(), model)).mean(ACCURACY) == 1.0
    with pytest.raises(BnpatchError, match="no output 'nope'; choose --output-name among other"):
        opened(heads, output="nope").num_outputs()


def test_logits_beside_their_probabilities_are_one_answer():
    model = opened(lambda y: {"a": y, "b": y.softmax(1), "c": features(y)})
    with pytest.warns(BnpatchWarning, match="is read"):
        assert model.num_outputs(classes=CLASSES) == CLASSES
    assert model.output.name == "a"


def test_a_recipe_and_a_patched_file_remember_the_output(tmp_path):
    module = bnpatch.patch(TwoHeads().eval(), 0.1)
    model = bnpatch.load(module, device="cpu", preprocessing={"img_size": 4}, output="kind")
    result = bnpatch.tune_alpha(model, data(), granularity="global", trials=1, holdout=0.5)
    assert result.recipe.provenance["output"] == "kind"
    model.save(tmp_path / "patched.pt", model.recipe())
    again = bnpatch.load(tmp_path / "patched.pt", device="cpu", unsafe_load=True)
    x = torch.from_numpy(data()[0])
    assert torch.equal(again.predict(x), model.predict(x))


def test_an_export_has_every_output_by_its_name(tmp_path):
    model = opened(lambda y: {"other": -y, "kind": y}, output="kind")
    model.set_alphas(0.3)
    bnpatch.export_onnx(model, tmp_path / "model.onnx")
    file = bnpatch.load(tmp_path / "model.onnx")
    assert list(file.signature.outputs) == ["other", "kind"]
    x = torch.from_numpy(data()[0])
    torch.testing.assert_close(file.predict(x), model.predict(x), rtol=1e-4, atol=1e-4)


ONE = {
    "logit": lambda z: z,
    "of rank 1": lambda z: z[:, 0],
    "map": lambda z: z[..., None, None],
    "sigmoid": torch.sigmoid,
    "view": lambda z: torch.sigmoid(z[:, 0])[:, None].clone(),
}


def binary(form):
    return opened(lambda y: form(y[:, 1:2] - y[:, :1]))


@pytest.mark.parametrize("form", ONE.values(), ids=ONE)
@pytest.mark.parametrize("backend", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_one_output_is_two_classes(form, backend, tmp_path):
    model, two = binary(form), opened(lambda y: y[:, :2])
    if backend == "onnx":
        bnpatch.export_onnx(model, tmp_path / "model.onnx")
        model = bnpatch.load(tmp_path / "model.onnx")
    assert model.num_outputs() == 2
    pairs = [evaluate(m, bnpatch.open_examples(data(classes=2), m)).values for m in (model, two)]
    for name in (ACCURACY.name, CROSS_ENTROPY.name):
        np.testing.assert_allclose(pairs[0][name], pairs[1][name], atol=1e-4)  # float32
    assert pairs[0][ACCURACY.name].mean() == 1.0


def test_one_output_has_the_label_free_objectives_of_two_classes():
    from bnpatch.search.objective import ObjectiveSpec

    found = []
    for model in (binary(torch.sigmoid), opened(lambda y: y[:, :2])):
        examples = bnpatch.open_examples(data(classes=2), model)
        everything = np.arange(len(examples))
        objective = ObjectiveSpec.of("information", None, 64).objective(model, examples, everything)
        found.append(objective.scores(model, examples, everything)["information"])
    np.testing.assert_allclose(*found, atol=1e-4)
    assert found[0] != 0


def test_several_sigmoids_are_read_as_logits_of_classes():
    logits, sigmoids = opened(lambda y: y), opened(torch.sigmoid)
    pair = [evaluate(m, bnpatch.open_examples(data(), m)).mean(CROSS_ENTROPY) for m in (logits, sigmoids)]
    assert pair[0] == pytest.approx(pair[1], abs=1e-4)


def test_a_metric_of_ones_own_sees_what_the_model_returns():
    seen = []

    def error(outputs, targets):
        seen.append(outputs.shape[1:])
        return -(outputs[:, 0] - targets).abs()

    x, labels = data(classes=2)
    bnpatch.tune_alpha(binary(ONE["logit"]), (x, labels + 0.5), metric=error, granularity="global", trials=1)
    assert set(seen) == {(1,)}


@pytest.mark.parametrize("first", ["predict", "num_outputs"])
def test_nothing_changes_what_an_output_is(first):
    """Every half of 0.5 and 0.5 sums to 1, as the probabilities of two classes do."""
    model = opened(lambda y: torch.sigmoid(y[:, :2]))
    half = torch.zeros(1, 3, 4, 4)
    if first == "predict":
        assert model.predict(half).tolist() == [[0.5, 0.5]]
    assert model.num_outputs() == 2
    assert model.output.kind is Kind.SIGMOID
    assert model.predict(half).tolist() == [[0.5, 0.5]]


def as_recurrent(y):
    return torch.stack([y, 2 * y, -y, y, y])  # (T, N, K)


def test_another_axis_may_be_the_batch():
    model = opened(as_recurrent)
    x = torch.from_numpy(data()[0])
    assert model.predict(x).shape == (40, 5, CLASSES)
    with pytest.raises(BnpatchError, match=r"\(5, N, 3\), not one number per class; .* a metric of your own"):
        bnpatch.open_examples(data(), model)

    def last_step(outputs, targets):
        return (outputs[:, -1].argmax(1) == targets[:, 0]).float()

    x, labels = data()
    texts = labels[:, None] * np.ones((1, 2), np.int64)
    result = bnpatch.tune_alpha(model, (x, texts), metric=last_step, granularity="global", trials=1)
    assert result.comparisons[0].before.value == 1.0


@pytest.mark.parametrize("batch", [None, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (1, 2))])
def test_another_axis_may_be_the_batch_of_a_file(batch, tmp_path):
    """Five steps are more than the three inputs that find the axis."""
    model = opened(as_recurrent)
    bnpatch.export_onnx(model, tmp_path / "model.onnx")
    if batch is not None:
        proto = onnx.load(tmp_path / "model.onnx")
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
        onnx.save(proto, tmp_path / "model.onnx")
    file, x = bnpatch.load(tmp_path / "model.onnx"), torch.from_numpy(data()[0][:3])
    torch.testing.assert_close(file.predict(x), model.predict(x))
    assert file.predict(x).shape == (3, 5, CLASSES)


def test_one_class_folder_is_not_what_one_output_stands_for(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "1.png")
    model = binary(torch.sigmoid)
    assert isinstance(model, TorchModel)
    with pytest.raises(BnpatchError, match="has 1 class folder, the model has 2 outputs"):
        bnpatch.open_examples(tmp_path, model)
