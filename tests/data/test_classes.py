import pytest

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data.class_folders import ClassOrder, read_class_map, targets_of_folders


def targets(folders, num_outputs, class_names=None, order=ClassOrder.NATURAL, **kwargs):
    return targets_of_folders(
        folders, num_outputs=num_outputs, class_names=class_names, order=order, **kwargs
    )


def test_the_names_that_the_model_knows_win():
    assert targets(["cat", "dog"], 3, ("dog", "emu", "cat")) == {"cat": 2, "dog": 0}


def test_imagenet_folders_by_synset_even_if_few():
    assert targets(["n01443537", "n01440764"], 1000) == {"n01440764": 0, "n01443537": 1}
    with pytest.raises(BnpatchError, match=r"n99999999.*--class-map"):
        targets(["n99999999"], 1000)


@pytest.mark.parametrize(
    ("order", "expected"), [(ClassOrder.PLAIN, ["1", "10", "2"]), (ClassOrder.NATURAL, ["1", "2", "10"])]
)
def test_numbers_sort_as_the_library_sorts_and_the_user_is_told(order, expected):
    with pytest.warns(BnpatchWarning, match="sort differently in torchvision and in timm"):
        found = targets(["10", "1", "2"], 3, order=order)
    assert sorted(found, key=found.get) == expected


def test_folders_named_by_index_may_be_few():
    assert targets(["3", "0"], 10) == {"3": 3, "0": 0}


def test_other_names_than_the_models_are_taken_in_order_with_a_warning():
    with pytest.warns(BnpatchWarning, match="'x' is not among the model's class names"):
        assert targets(["x", "y"], 2, ("a", "b")) == {"x": 0, "y": 1}


@pytest.mark.parametrize("folders", [["a", "b"], ["a", "b", "c", "d"], ["12"]])
def test_no_sure_answer_is_an_error(folders):
    with pytest.raises(
        BnpatchError, match=r"class folders?, the model has 3 outputs; say which .* --class-map"
    ):
        targets(folders, 3)


def test_a_given_map_must_fit():
    with pytest.raises(BnpatchError, match="the class map has no 'c'"):
        targets(["a", "c"], 2, ("a", "b"), sure=True)
    with pytest.raises(BnpatchError, match="the class map has 2 names"):
        targets(["a"], 3, ("a", "b"), sure=True)


@pytest.mark.parametrize(("text", "names"), [("a\nb\n\n", ("a", "b")), ("b 1\na 0\n", ("a", "b"))])
def test_reads_class_maps(tmp_path, text, names):
    path = tmp_path / "map.txt"
    path.write_text(text)
    assert read_class_map(path) == names


@pytest.mark.parametrize("text", ["", "a\na\n", "a 0\nb 2\n"])
def test_refuses_what_is_no_class_map(tmp_path, text):
    path = tmp_path / "map.txt"
    path.write_text(text)
    with pytest.raises(BnpatchError, match=r"map\.txt"):
        read_class_map(path)
    with pytest.raises(BnpatchError, match="cannot read the class map"):
        read_class_map(tmp_path / "nope")
