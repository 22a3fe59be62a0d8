from bnpatch.data.corruptions import parse_kinds
from bnpatch.evaluation.metrics import as_metric
from bnpatch.models.load import load
from bnpatch.search.config import SearchConfig
from bnpatch_cli.options import _numbers, _size
from tests.remedies.world import case, net


@case("--img-size '0' is not a size in pixels", "write one side, 224, or height,width: 48,192")
def test_a_size_of_0(w):
    return lambda: _size("0"), lambda _: [_size("224"), _size("48,192")]


@case("--mean 'grey' is not a list of numbers", "write 0.485,0.456,0.406")
def test_a_mean_in_words(w):
    return lambda: _numbers("grey", "--mean"), lambda remedy: _numbers(
        remedy.removeprefix("write "), "--mean"
    )


@case("--mean has 2 values, the model 3 channels", "give one, or one each")
def test_two_means(w):
    def follow(_):
        for mean in ((0.5,), (0.4, 0.5, 0.6)):
            load(net(), preprocessing={"mean": mean})

    return lambda: load(net(), preprocessing={"mean": (0.5, 0.4)}), follow


@case("std = .* is not positive", "give --std as for images in .0, 1.")
def test_a_deviation_of_0(w):
    return lambda: load(net(), preprocessing={"std": (0.0,)}), lambda _: load(
        net(), preprocessing={"std": (0.2,)}
    )


@case("there is no interpolation 'cubic'", "choose .*bicubic")
def test_another_interpolation(w):
    return (
        lambda: load(net(), preprocessing={"interpolation": "cubic"}),
        lambda _: load(net(), preprocessing={"interpolation": "bicubic"}),
    )


@case("there is no metric 'precision'", "choose one of accuracy")
def test_another_metric(w):
    def follow(remedy):
        for name in remedy.removeprefix("choose one of ").split(", "):
            as_metric(name)

    return lambda: as_metric("precision"), follow


@case("there is no augmentation 'rain'", "choose from .*contrast")
def test_another_augmentation(w):
    return lambda: parse_kinds("rain"), lambda remedy: parse_kinds(remedy.removeprefix("choose from "))


@case("a held-out part of 1.5 is not a fraction", "set --holdout between 0 and 1")
def test_too_much_held_out(w):
    return lambda: SearchConfig(holdout=1.5), lambda _: SearchConfig(holdout=0.5)


@case("0.9 times the latency is not possible", "write --max-overhead 1.1")
def test_a_latency_below_1(w):
    return lambda: SearchConfig(max_overhead=0.9), lambda _: SearchConfig(max_overhead=1.1)


@case("a margin of 5 is not a fraction", "set --margin to 0.005")
def test_a_margin_in_percent(w):
    return lambda: SearchConfig(margin=5), lambda _: SearchConfig(margin=0.005)
