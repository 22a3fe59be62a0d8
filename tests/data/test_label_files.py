"""Images outside class folders, whose classes are in a table beside them."""

import json

import pytest
from PIL import Image
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning

CLASSES = {"a1": 3, "a2": 7, "a3": 3, "a4": 0}
TABLES = {
    "val_annotations.txt": "".join(f"{n}.png\t{c}\t0\t0\t62\t{c}\n" for n, c in CLASSES.items()),
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(f"{n},{c} 85 1 499 272 {c} 1 2 3 4 \n" for n, c in CLASSES.items()),
    "metadata.csv": "width,label,file_name\n" + "".join(f"8,{c},{n}.png\n" for n, c in CLASSES.items()),
    "labels.csv": "id;other;breed\n" + "".join(f"images/{n}.png;x;{c}\n" for n, c in CLASSES.items()),
    "list.txt": "".join(f"val/{n}.png {c}\n" for n, c in CLASSES.items()),
    "class first.tsv": "".join(f"{c}\t{n}\n" for n, c in CLASSES.items()),
    "metadata.jsonl": "".join(
        json.dumps({"file_name": f"{n}.png", "text": None, "label": c}) + "\n" for n, c in CLASSES.items()
    ),
}


def write(place, names=CLASSES):
    place.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("L", (8, 8)).save(place / f"{name}.png")


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("below", ["", "images"])
@pytest.mark.parametrize("above", [False, True])
def test_classes_are_read_from_a_table(model, name, below, above, tmp_path):
    write(tmp_path / "val" / below)
    (tmp_path / ("" if above else "val") / name).write_text(TABLES[name])
    (tmp_path / "val" / "readme.txt").write_text("of 4 images\n")
    with pytest.warns(BnpatchWarning, match=f"in no class folders: their classes are those in {name}"):
        data = bnpatch.open_examples(tmp_path / "val", model)
    found = {data.source.paths[i].stem: int(data.targets[i]) for i in range(len(data))}
    assert found == CLASSES


def opened(folder, model, **options):
    """Return the targets of the images of a folder by their paths in it."""
    with pytest.warns(BnpatchWarning, match="their classes are those in"):
        data = bnpatch.open_examples(folder, model, **options)
    return {data.source.name(index): int(data.targets[index]) for index in range(len(data))}


@pytest.mark.parametrize("row", ["{}.png,{}", "{}.png  {}", "{1} {0}.png", "{}.png,{},2"])
@pytest.mark.parametrize("last", ["", "-1"])
def test_names_of_several_words_and_images_without_a_class(model, row, last, tmp_path):
    names = [f"{n:02}" for n in range(20)]
    write(tmp_path, names)
    model.class_names = ("red fox", "red deer", *"cdefghij")
    rows = [row.format(name, ("Red Fox", "red deer")[n % 2]) for n, name in enumerate(names[:19])]
    (tmp_path / "labels.csv").write_text("\n".join([*rows, row.format(names[19], last)]))
    found = opened(tmp_path, model, labels="optional")
    assert [found[f"{name}.png"] for name in names] == [0, 1] * 9 + [0, -1]


@pytest.mark.parametrize("order", ["plain", "natural"])
def test_numbers_in_a_table_are_those_of_outputs_in_any_order_of_folders(model, order, tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(model.preprocessing.input_size[1] ** 2, 12))
    model = bnpatch.TorchModel(net, name="net", preprocessing=model.preprocessing)
    model.class_order = order  # by which "10" would come before "2"
    names = [str(n) for n in range(24)]
    write(tmp_path, names)
    (tmp_path / "labels.csv").write_text("label,id\n" + "".join(f"{n % 12},{n}\n" for n in range(24)))
    assert opened(tmp_path, model) == {f"{n}.png": n % 12 for n in range(24)}


def test_folders_tell_images_of_one_name_apart(model, tmp_path):
    classes = {f"all/{folder}/{n}.png": n + folder for folder in range(3) for n in range(3)}
    for folder in range(3):
        write(tmp_path / "all" / str(folder), range(3))
    (tmp_path / "labels.txt").write_text("".join(f"data/{name} {c}\n" for name, c in classes.items()))
    assert opened(tmp_path, model) == classes
    (tmp_path / "labels.txt").write_text("".join(f"{name[6:]} {c}\n" for name, c in classes.items()))
    with pytest.raises(BnpatchError, match="1 class folder"):
        bnpatch.open_examples(tmp_path, model)


@pytest.mark.parametrize(("one", "none"), [("1", "0"), ("1.0", "0.0")])
def test_columns_may_be_the_classes(model, one, none, tmp_path):
    write(tmp_path)
    model.class_names = tuple("abcdefghij")
    rows = (f"{n}," + ",".join(one if c == k else none for k in (0, 3, 7)) for n, c in CLASSES.items())
    (tmp_path / "truth.csv").write_text("\n".join(["image,A,D,H", *rows]))
    assert opened(tmp_path, model) == {f"{name}.png": c for name, c in CLASSES.items()}


@pytest.mark.parametrize(
    "text",
    [
        "a1.png,3\na2.png,7\na3.png,3\n",  # three of four
        "".join(f"{name}.png,3\n" for name in CLASSES),  # one class
        "".join(f"{name}.png\n" for name in CLASSES),
        "b1,3\nb2,4\n",
        'a1.png,"3\n\0',
        "".join(f"{name}.png,{c}\n{name}.png,{c + 1}\n" for name, c in CLASSES.items()),  # several classes
        "name,split,of\n" + "".join(f"{name}.png,{c},1\n" for name, c in CLASSES.items()),
        "name,d,h\n" + "".join(f"{name}.png,1,1\n" for name in CLASSES),
    ],
)
def test_what_is_no_table_of_classes_is_not_read(model, text, tmp_path):
    write(tmp_path)
    (tmp_path / "labels.csv").write_text(text)
    (tmp_path / "bytes.csv").write_bytes(bytes(range(256)))
    with pytest.raises(BnpatchError, match="in no class folders"):
        bnpatch.open_examples(tmp_path, model)


def test_class_folders_need_no_table(model, tmp_path):
    for name in ("3", "7"):
        write(tmp_path / name, [f"{name}{n}" for n in range(2)])
    (tmp_path / "labels.csv").write_text("30.png,0\n31.png,1\n70.png,0\n71.png,1\n")
    assert sorted(bnpatch.open_examples(tmp_path, model).targets) == [3, 3, 7, 7]
