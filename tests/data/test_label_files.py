"""Images outside class folders, whose classes are in a table beside them."""

import numpy as np
import pytest
from PIL import Image

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


def test_names_of_several_words_and_images_without_a_class(model, tmp_path):
    names = [f"{n:02}" for n in range(20)]
    write(tmp_path, names)
    model.class_names = ("red fox", "dog", *"cdefghij")
    rows = (f"{name}.png,{('Red Fox', 'dog')[n % 2]}" for n, name in enumerate(names[:19]))
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    with pytest.warns(BnpatchWarning, match=r"labels\.csv"):
        data = bnpatch.open_examples(tmp_path, model, labels="optional")
    order = np.argsort([path.name for path in data.source.paths])
    assert data.targets[order].tolist() == [0, 1] * 9 + [0, -1]


@pytest.mark.parametrize(
    "text",
    [
        "a1.png,3\na2.png,7\na3.png,3\n",  # three of four
        "".join(f"{name}.png,3\n" for name in CLASSES),  # one class
        "".join(f"{name}.png\n" for name in CLASSES),
        "b1,3\nb2,4\n",
        'a1.png,"3\n\0',
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
