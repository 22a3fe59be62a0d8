import re

import numpy as np
import torch

import bnpatch
from bnpatch.data.groups import group_by
from tests.remedies.world import SIDE, X, Y, case, loaded, opened


@case("there is no", "a folder with a folder of images per class, or an .npz file")
def test_missing_data(w):
    np.savez(w.folder / "data.npz", x=X.numpy(), y=Y)

    def follow(_):
        opened(w.images("a/1.png", "b/1.png", "c/1.png"))
        opened(w.folder / "data.npz")

    return lambda: opened(w.folder / "nowhere"), follow


@case(r"has 2 class folders, the model has 3 outputs", "--class-map FILE: the folders, one a line")
def test_fewer_folders(w):
    data = w.images("a/1.png", "c/1.png")
    names = w.file("classes.txt", "a\nb\nc\n")

    def follow(_):
        assert opened(data, class_map=names).targets.tolist() == [0, 2]

    return lambda: opened(data), follow


@case("cannot read", "remove it, or leave out --strict")
def test_an_unreadable_image(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png", "c/2.png")
    (data / "c" / "2.png").write_bytes(b"\x89PNG")

    def follow(_):
        assert len(opened(data).skipped) == 1
        (data / "c" / "2.png").unlink()
        opened(data, strict=True)

    return lambda: opened(data, strict=True), follow


@case("the data has 6 images and targets of shape", "give one target per image")
def test_fewer_targets(w):
    return lambda: opened((X, Y[:5])), lambda _: opened((X, Y))


@case("there are images without classes", r"give a pair \(images, classes\), or search without labels")
def test_no_targets(w):
    return lambda: opened(X), lambda _: [opened((X, Y)), opened(X, labels="optional")]


@case("the targets are of type <U3", "give numbers")
def test_names_as_targets(w):
    return lambda: opened((X, np.array(["cat"] * 6))), lambda _: opened((X, Y))


@case("the classes are not whole numbers", "one class index per image, or a metric of your own")
def test_fractions_as_targets(w):
    return lambda: opened((X, Y + 0.5)), lambda _: [opened((X, Y)), opened((X, Y + 0.5), classes=False)]


@case("the data has class 5, Net has the outputs 0 to 2", "the data set that the model was trained for")
def test_too_many_classes(w):
    return lambda: opened((X, Y + 5)), lambda _: opened((X, Y))


@case("the images are of type torch.int32", "give bytes, or floating-point inputs")
def test_integers_as_images(w):
    return (
        lambda: opened((X.int(), Y)),
        lambda _: [opened(((X * 40 + 100).clip(0, 255).byte(), Y)), opened((X.double(), Y))],
    )


@case("has the arrays images, kinds", "name the images x and the classes y")
def test_other_arrays(w):
    np.savez(w.folder / "data.npz", images=X.numpy(), kinds=Y)

    def follow(_):
        np.savez(w.folder / "data.npz", x=X.numpy(), y=Y)
        opened(w.folder / "data.npz")

    return lambda: opened(w.folder / "data.npz"), follow


@case("has the arrays x", "name the images x and the classes y, or search without labels")
def test_images_alone(w):
    np.savez(w.folder / "data.npz", x=X.numpy())

    def follow(_):
        opened(w.folder / "data.npz", labels="optional")
        np.savez(w.folder / "data.npz", x=X.numpy(), y=Y)
        opened(w.folder / "data.npz")

    return lambda: opened(w.folder / "data.npz"), follow


@case("is damaged or not an .npz file", "write it again")
def test_a_damaged_npz(w):
    path = w.file("data.npz", b"PK")

    def follow(_):
        np.savez(path, x=X.numpy(), y=Y)
        opened(path)

    return lambda: opened(path), follow


@case("the data gives dictionaries", r"call the parts image and label, or give pairs \(image, target\)")
def test_dictionaries(w):
    def named(*keys):
        return [dict(zip(keys, pair, strict=True)) for pair in zip(X, Y, strict=True)]

    def follow(_):
        opened(named("image", "label"))
        opened([(x, y) for x, y in zip(X, Y, strict=True)])

    return lambda: opened(named("scan", "finding")), follow


@case("the loader gives no batches", "a generator gives them only once")
def test_a_generator_that_was_read(w):
    batches = ((x[None], torch.tensor([y])) for x, y in zip(X, Y, strict=True))
    list(batches)
    return lambda: opened(batches), lambda _: opened(iter([(X, torch.from_numpy(Y))]))


@case("takes more memory than the 0.001 GB", r"raise cache_gb .*, give fewer examples, or images as bytes")
def test_too_much_data(w):
    many = [(torch.cat([X] * 9), torch.from_numpy(np.tile(Y, 9)))] * 50

    def follow(_):
        opened(iter(many), cache_gb=0.1)
        opened(iter(many[:5]), cache_gb=0.001)

    return lambda: opened(iter(many), cache_gb=0.001), follow


@case("there are 3 group labels for 6 examples", "give one label per example")
def test_fewer_groups(w):
    return lambda: opened((X, Y), groups=list("aab")), lambda _: opened((X, Y), groups=list("aabbcc"))


@case("the groups have one example each", "name groups that several examples share .*, or leave groups out")
def test_groups_of_one(w):
    return (
        lambda: opened((X, Y), groups=list("abcdef")),
        lambda _: [opened((X, Y), groups=list("aabbcc")), opened((X, Y))],
    )


@case("has no parentheses", "put them around what names the group")
def test_an_expression_without_a_group(w):
    def follow(remedy):
        assert group_by(re.search("'(.*)'", remedy)[1])("video1_frame2.png") == "video1"

    return lambda: group_by("video[0-9]+"), follow


@case("is no regular expression", "write parent, an expression such as .*, or the name of a .csv file")
def test_a_damaged_expression(w):
    table = w.file("groups.csv", "a/1.png,first\n")

    def follow(remedy):
        assert group_by("parent")("class/video/1.png") == "video"
        assert group_by(re.search("such as '(.*)'", remedy)[1])("x/patient7_2.png") == "patient7"
        assert group_by(str(table))("a/1.png") == "first"

    return lambda: group_by("([a-z"), follow


@case("finds nothing in other.png", "write an expression that fits all names")
def test_an_expression_that_does_not_fit(w):
    return lambda: group_by("(video[0-9]+)")("other.png"), lambda _: group_by("([a-z]+)")("other.png")


@case("has no group for b/1.png", "list each image by its path below the folder of the data")
def test_a_table_without_an_image(w):
    return (
        lambda: group_by(str(w.file("groups.csv", "a/1.png,first\n")))("b/1.png"),
        lambda _: group_by(str(w.file("groups.csv", "a/1.png,first\nb/1.png,second\n")))("b/1.png"),
    )


@case("is not a data set", "give a folder with a folder of images per class")
def test_a_text_as_data(w):
    path = w.file("data.txt", "a\nb\n")
    return lambda: opened(path), lambda _: opened(w.images("a/1.png", "b/1.png", "c/1.png"))


@case("data is a int", "give a path, a pair of arrays, a torch data set or a loader")
def test_a_number_as_data(w):
    pairs = [(x, int(y)) for x, y in zip(X, Y, strict=True)]
    folder = w.images("a/1.png", "b/1.png", "c/1.png")
    loader = torch.utils.data.DataLoader(pairs, 3)
    return lambda: opened(5), lambda _: [opened(data) for data in (folder, (X, Y), pairs, loader)]


@case("the data has no examples", "name a data set with some")
def test_no_examples(w):
    return lambda: opened((X[:0], Y[:0])), lambda _: opened((X, Y))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(x, int(y)) for x, y in zip(X, Y, strict=True)])


@case("the data set is a stream", "give a DataLoader of it")
def test_a_stream(w):
    return lambda: opened(Stream()), lambda _: opened(torch.utils.data.DataLoader(Stream(), 2))


@case("none of the images can be read, .* for one", "look at the files")
def test_images_that_are_all_damaged(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")
    whole = (data / "a" / "1.png").read_bytes()

    def damage(content):
        for path in data.rglob("*.png"):
            path.write_bytes(content)
        return bnpatch.open_examples(data, loaded()).readable(np.arange(3))

    return lambda: damage(whole[:30]), lambda _: damage(whole)


@case("inputs differ in shape", "give inputs of one shape")
def test_inputs_of_two_sizes(w):
    pairs = [(torch.zeros(3, side, side), 0) for side in (SIDE, SIDE, SIDE + 1)]
    return lambda: opened(pairs), lambda _: opened([*pairs[:2], pairs[0]])


@case("the images are of type list of several shapes", "of one shape")
def test_a_list_of_images_of_two_sizes(w):
    images = [x.numpy() for x in X]
    return lambda: opened(([*images[:5], images[5][:, 1:]], Y)), lambda _: opened((images, Y))


@case("some batches have targets, others don't", "give batches of one kind")
def test_targets_in_some_batches(w):
    y = torch.from_numpy(Y)
    return lambda: opened(iter([(X, y), (X,)])), lambda _: opened(iter([(X, y), (X, y)]))


@case("inputs differ in shape or type", "give inputs of one shape")
def test_batches_of_two_sizes(w):
    y = torch.from_numpy(Y)
    return lambda: opened(iter([(X, y), (X[:, :, 1:], y)])), lambda _: opened(iter([(X, y), (X, y)]))


@case("the data gives a str where numbers are needed", "give arrays or tensors")
def test_texts_in_batches(w):
    return (
        lambda: opened(iter([("a picture", torch.from_numpy(Y))])),
        lambda _: [opened(iter([(x, torch.from_numpy(Y))])) for x in (X, X.numpy())],
    )


@case("the images are of type <U1 and shape", "give arrays of bytes or of floating-point values")
def test_texts_as_images(w):
    return lambda: opened((np.array(list("abcdef")), Y)), lambda _: opened((X.numpy(), Y))


@case(r"targets of shape \(6, 2\) are no classes", "or a metric of your own for other targets")
def test_two_targets_per_image(w):
    two = np.stack([Y, Y], 1)
    return lambda: opened((X, two)), lambda _: [opened((X, Y)), opened((X, two), classes=False)]


@case("the images would be resized or cropped, their targets", "give the inputs as floats")
def test_masks_of_images_that_are_resized(w):
    images, masks = np.zeros((6, 20, 20, 3), np.uint8), np.zeros((6, 20, 20), np.int64)
    return (
        lambda: opened((images.transpose(0, 3, 1, 2), masks), classes=False),
        lambda _: opened((X, masks[:, :SIDE, :SIDE]), classes=False),
    )


@case("accuracy needs class indices, and the targets are something else", "a function from")
def test_accuracy_of_fractions(w):
    model = loaded()
    data = bnpatch.open_examples((X, Y + 0.5), model, classes=False)

    def error(outputs, targets):
        return -(outputs.mean(1) - targets).square()

    return lambda: bnpatch.evaluate(model, data), lambda _: bnpatch.evaluate(model, data, [error])


@case("the metric 'total' returned float for 6 examples", "a tensor with one number per example")
def test_a_metric_of_one_number(w):
    def total(outputs, targets):
        return float(outputs.sum())

    def each(outputs, targets):
        return outputs.sum(1)

    return lambda: bnpatch.evaluate(loaded(), opened((X, Y)), [total]), lambda _: bnpatch.evaluate(
        loaded(), opened((X, Y)), [each]
    )
