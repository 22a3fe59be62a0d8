import itertools

import numpy as np
import pytest

from tests import reference
from tests.onnx.build import bn_model, example, parameters, run
from tests.onnx.rewritten import group_norm_model, oracle, other_moments, rewritten, two_norms


@pytest.mark.parametrize("mode", ["global", "per-site"])
@pytest.mark.parametrize("opset", [8, 13, 20])
def test_alpha_as_an_input_with_a_default(mode, opset):
    proto = two_norms(opset)
    result, report = rewritten(proto, {"bn": 0.3, "bn2": 0.3}, alpha_inputs=mode)
    names = ["alpha"] if mode == "global" else ["alpha.bn", "alpha.bn2"]
    assert list(dict.fromkeys(report.weight_inputs["alpha"].values())) == names
    assert [i.name for i in result.graph.input] == ["x", *names]
    x = example(3, 6, 5, 4)
    for value in (None, 0.0, 0.1, 1.0):
        feeds = {} if value is None else dict.fromkeys(names, np.float32(value))
        baked, _ = rewritten(proto, dict.fromkeys(("bn", "bn2"), 0.3 if value is None else value))
        # float32 in both, in another order: alpha * (1 - alpha) and the like are computed at run time
        np.testing.assert_allclose(run(result, x, **feeds), run(baked, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mode", ["global", "per-site"])
@pytest.mark.parametrize("opset", [8, 20])
def test_slope_and_offset_as_inputs_beside_alpha(mode, opset):
    proto, both = two_norms(opset), ("bn", "bn2")

    def at(alpha, slope, offset, **options):
        return rewritten(proto, *(dict.fromkeys(both, value) for value in (alpha, slope, offset)), **options)

    result, report = at(0.3, 0.5, 1.0, alpha_inputs=mode)
    kinds = [dict.fromkeys(inputs.values()) for inputs in report.weight_inputs.values()]
    assert [i.name for i in result.graph.input] == ["x", *itertools.chain(*kinds)]
    for kind, inputs in zip(("slope", "var_offset"), kinds[1:], strict=True):
        assert list(inputs) == ([kind] if mode == "global" else [f"{kind}.bn", f"{kind}.bn2"])
    without, _ = rewritten(proto, dict.fromkeys(both, 0.3), alpha_inputs=mode)
    x = example(3, 6, 5, 4)
    for values in ((0.3, 0.5, 1), (0.1, -2, -3), (0, 3, 5), (1, -3, -5), (0.7, 0, 0), (0.7, 0, 2)):
        feeds = [dict.fromkeys(kind, np.float32(v)) for kind, v in zip(kinds, values, strict=True)]
        y = run(result, x, **feeds[0], **feeds[1], **feeds[2])
        baked, _ = at(*values)
        np.testing.assert_allclose(y, run(baked, x), rtol=2e-5, atol=2e-5)  # float32, in another order
        if values[1:] == (0, 0) or values[0] in (0, 1):
            np.testing.assert_array_equal(y, run(without, x, **feeds[0]))
    np.testing.assert_array_equal(run(result, x), run(result, x, **dict.fromkeys(kinds[0], np.float32(0.3))))


def test_alpha_inputs_are_overridden_one_by_one():
    proto = two_norms()
    result, report = rewritten(proto, {"bn": 0.1, "bn2": 0.7}, alpha_inputs="per-site")
    x = example(2, 6, 5, 4)
    other, _ = rewritten(proto, {"bn": 0.1, "bn2": 0.2})
    y = run(result, x, **{report.weight_inputs["alpha"]["bn2"]: np.float32(0.2)})
    np.testing.assert_allclose(y, run(other, x), rtol=2e-5, atol=2e-5)  # float32


def test_alpha_input_for_a_double_model_and_a_taken_name():
    proto = bn_model(x=("alpha", 6, 5, 4), dtype=np.float64)
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "alpha"
    result, report = rewritten(proto, {"bn": 0.25}, alpha_inputs="global")
    assert report.weight_inputs["alpha"] == {"bn": "alpha_"}
    x = example(2, 6, 5, 4, dtype=np.float64)
    baked, _ = rewritten(bn_model(dtype=np.float64), {"bn": 0.25})
    np.testing.assert_allclose(run(result, x), run(baked, x), rtol=1e-12)  # 0.25 is exact in float32


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("opset", [8, 13, 20])
def test_running_moments_as_inputs_with_defaults(conv, opset):
    proto, x = bn_model(conv=conv, opset=opset), example(3, 6, 5, 4)
    for default in (None, other_moments(3)):
        options = {} if default is None else {"running": {"bn": default}}
        result, report = rewritten(
            proto, {"bn": 0.3}, alpha_inputs="per-site", running_inputs=True, **options
        )
        mean, var = report.running_inputs["bn"]
        alpha_input = report.weight_inputs["alpha"]["bn"]
        assert [i.name for i in result.graph.input] == ["x", alpha_input, mean, var]
        baked, _ = rewritten(proto, {"bn": 0.3}, **options)
        np.testing.assert_allclose(run(result, x), run(baked, x), rtol=2e-5, atol=2e-5)  # float32
        running = other_moments()
        for alpha in (0.0, 0.3, 1.0):
            baked, _ = rewritten(proto, {"bn": alpha}, running={"bn": running})
            feeds = {alpha_input: np.float32(alpha), mean: running.mean, var: running.var}
            # float32
            np.testing.assert_allclose(run(result, x, **feeds), run(baked, x), rtol=5e-5, atol=5e-5)


def test_running_moments_as_inputs_of_single_values_and_of_sites_without_an_alpha_input():
    x = example(4, 6)
    running = other_moments()
    for mode in (None, "per-site"):
        result, report = rewritten(bn_model(x=("n", 6)), {"bn": 0.0}, alpha_inputs=mode, running_inputs=True)
        mean, var = report.running_inputs["bn"]
        y = run(result, x, **{mean: running.mean, var: running.var})
        np.testing.assert_allclose(y, oracle(x, running, 0.0), rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_running_moments_of_other_types(dtype, alpha):
    x, running = example(2, 6, 5, 4, dtype=dtype), other_moments()
    result, report = rewritten(
        bn_model(dtype=dtype), {"bn": alpha}, alpha_inputs="per-site", running_inputs=True
    )
    mean, var = report.running_inputs["bn"]
    y = run(result, x, **{mean: running.mean, var: running.var})
    assert y.dtype == dtype
    arrays = parameters(dtype=dtype)
    expected = oracle(x, running, alpha, **arrays)
    tolerance = 4e-3 if dtype == np.float16 else 1e-6  # alpha and the moments come in float32
    assert np.abs(y.astype(np.float64) - expected).max() < tolerance * np.abs(expected).max()


def test_group_norm_takes_running_moments_as_inputs():
    proto, x, running = group_norm_model(), example(2, 6, 5, 4), other_moments()
    result, report = rewritten(
        proto, {"bn": 1.0}, running={"bn": other_moments(3)}, alpha_inputs="per-site", running_inputs=True
    )
    mean, var = report.running_inputs["bn"]
    arrays = parameters()
    for alpha in (0.0, 0.4, 1.0):
        feeds = {report.weight_inputs["alpha"]["bn"]: np.float32(alpha), mean: running.mean, var: running.var}
        expected = reference.weighted_norm(
            x, running.mean, running.var, arrays["bn.weight"], arrays["bn.bias"], 1e-5, alpha, 3
        )
        np.testing.assert_allclose(run(result, x, **feeds), expected, rtol=1e-4, atol=2e-5)  # float32
