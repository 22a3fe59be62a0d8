import json
import re

import numpy as np

from tests.remedies.world import X, Y, case, opened


@case("are in no class folders", "make one folder per class, or search without labels")
def test_no_class_folders(w):
    flat = w.images("1.png", "2.png")

    def follow(_):
        opened(w.images("a/1.png", "b/2.png", "c/3.png", root="made"))
        opened(flat, labels="optional")

    return lambda: opened(flat), follow


@case("has no images", "a folder of images per class")
def test_an_empty_folder(w):
    (w.folder / "data").mkdir()
    return lambda: opened(w.folder / "data"), lambda _: opened(w.images("a/1.png", "b/1.png", "c/1.png"))


@case("none of the class folders .* has the name of a class", "--class-map FILE")
def test_other_names(w):
    data = w.images("katze/1.png", "hund/1.png", "maus/1.png")
    names = w.file("classes.txt", "katze\nhund\nmaus\n")

    def follow(_):
        examples = opened(data, ("cat", "dog", "mouse"), class_map=names)
        assert [examples.targets[i] for i in np.argsort([examples.source.name(i) for i in range(3)])] == [
            1,
            0,
            2,
        ]

    return lambda: opened(data, ("cat", "dog", "mouse")), follow


@case("are parts of a data set, not classes", "give .*val")
def test_the_folder_above(w):
    data = w.images(*(f"{part}/{kind}/1.png" for part in ("train", "val") for kind in "abc"))
    return lambda: opened(data), lambda remedy: opened(re.search(r"give (\S+)", remedy)[1])


@case("the data has class 3, Net has the outputs 0 to 2", "subtract 1, if the classes count from 1")
def test_classes_from_1(w):
    return lambda: opened((X, Y + 1)), lambda _: opened((X, Y + 1 - 1))


@case("is not a class map, 'a' comes twice", "one class folder a line, .* or a name, a tab and its index")
def test_a_class_map_with_a_name_twice(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")
    path = w.file("classes.txt", "a\na\nc\n")

    def follow(_):
        for text in ("a\nb\nc\n", "c\t2\na\t0\nb\t1\n"):
            assert sorted(opened(data, class_map=w.file("classes.txt", text)).targets) == [0, 1, 2]

    return lambda: opened(data, class_map=path), follow


@case("the indices of .* are not 0 to 2", "number every output once, from 0")
def test_a_class_map_from_1(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")
    return (
        lambda: opened(data, class_map=w.file("classes.txt", "a\t1\nb\t2\nc\t3\n")),
        lambda _: opened(data, class_map=w.file("classes.txt", "a\t0\nb\t1\nc\t2\n")),
    )


@case("is not a class map", r"give a list of names, \{name: index\} or \{index: name\}")
def test_a_class_map_of_another_layout(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")

    def follow(_):
        for content in (["a", "b", "c"], {"a": 0, "b": 1, "c": 2}, {"0": "a", "1": "b", "2": "c"}):
            opened(data, class_map=w.file("classes.json", json.dumps(content)))

    return lambda: opened(data, class_map=w.file("classes.json", '{"classes": {"a": 0.5}}')), follow


@case("the class map has", "list every class folder once, in the order of the outputs")
def test_a_class_map_without_a_folder(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")
    return (
        lambda: opened(data, class_map=w.file("classes.txt", "a\nb\nd\n")),
        lambda _: opened(data, class_map=w.file("classes.txt", "a\nb\nc\n")),
    )


@case("has no images", "give a folder that has some")
def test_a_folder_without_images_to_tune_on_without_labels(w):
    (w.folder / "empty").mkdir()
    return (
        lambda: opened(w.folder / "empty", labels="optional"),
        lambda _: opened(w.images("1.png"), labels="optional"),
    )


@case("the class folder 'bird' is not among .*, and by order 'cat' would be 'dog'", "--class-map")
def test_a_class_that_the_model_does_not_know(w):
    data = w.images("cat/1.png", "dog/1.png", "bird/1.png")
    names = w.file("classes.txt", "cat\ndog\nbird\n")
    return (
        lambda: opened(data, ("cat", "dog", "mouse")),
        lambda _: opened(data, ("cat", "dog", "mouse"), class_map=names),
    )


@case("cannot read the class map", "check the path")
def test_a_class_map_that_is_not_there(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")
    path = w.folder / "classes.txt"

    def follow(_):
        opened(data, class_map=w.file(path.name, "a\nb\nc\n"))

    return lambda: opened(data, class_map=path), follow


@case("it is not clear which numbers of .* are the indices", "write the names alone, in the order")
def test_a_class_map_of_two_columns_of_numbers(w):
    data = w.images("0/1.png", "1/1.png", "2/1.png")

    def follow(_):
        assert opened(data, class_map=w.file("classes.txt", "1\n2\n0\n")).targets.tolist() == [2, 0, 1]

    return lambda: opened(data, class_map=w.file("classes.txt", "0,1\n1,2\n2,0\n")), follow


@case("'crane' is the name of outputs 0 and 2", "say which is which with --class-map FILE")
def test_a_class_name_of_two_outputs(w):
    data = w.images("bird/1.png", "crane/1.png", "dog/1.png")
    names = w.file("classes.txt", "bird\ndog\ncrane\n")

    def follow(_):
        assert opened(data, ("crane", "dog", "crane"), class_map=names).targets.tolist() == [0, 2, 1]

    return lambda: opened(data, ("crane", "dog", "crane")), follow
