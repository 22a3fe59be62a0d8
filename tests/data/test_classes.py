import os
import unicodedata

import pytest
from PIL import Image

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data.class_maps import read_class_map
from bnpatch.data.class_targets import ClassOrder, targets_of_folders


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


def test_an_output_for_the_background_comes_before_imagenets_classes():
    assert targets(["n01443537", "n01440764"], 1001) == {"n01440764": 1, "n01443537": 2}


def test_a_name_that_two_outputs_have_is_refused():
    """ImageNet has two cranes, a bird and a machine."""
    names = ("crane", "dog", "crane", "fox")
    with pytest.raises(BnpatchError, match=r"'crane' is the name of outputs 0 and 2; .* --class-map"):
        targets(["crane", "dog"], 4, names)
    assert targets(["fox", "dog"], 4, names) == {"fox": 3, "dog": 1}
    assert targets(["crane", "dog"], 4, names, partial=True) == {"dog": 1}


@pytest.mark.parametrize(
    "folders",
    [
        ["Red Fox", "Tench"],
        ["red_fox", "tench"],
        ["red-fox ", "TENCH"],
        ["red fox", "tench,_Tinca_tinca"],
    ],
)
def test_case_separators_and_further_names_do_not_matter(folders):
    names = ("tench, Tinca tinca", "dog", "red fox, Vulpes vulpes")
    assert targets(folders, 3, names) == {folders[0]: 2, folders[1]: 0}


def test_names_that_are_like_two_classes_are_not_matched():
    for folders, names in (
        (["a_b", "c"], ("a b", "a-b", "c", "d")),  # like both
        (["a b", "A_b"], ("a b", "c", "d")),  # both like one
        (["x"], ("x, y", "x, z", "c")),  # the first name of both
    ):
        with pytest.raises(BnpatchError, match=r"class folders?, the model has"):
            targets(folders, len(names), names)


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
        assert targets(["a", "x"], 2, ("a", "b")) == {"a": 0, "x": 1}


def test_an_order_that_gives_a_folder_another_class_than_its_name_is_refused():
    with pytest.raises(BnpatchError, match=r"'bird' is not among .*, and by order 'cat' would be 'dog'"):
        targets(["cat", "dog", "bird"], 3, ("cat", "dog", "mouse"))


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


NAMES = ("golden retriever", "tench, Tinca tinca", "Bärin")
TEXTS = {
    "lines": "golden retriever\ntench, Tinca tinca\nBärin\n\n",
    "name, tab, index": "Bärin\t2\ngolden retriever\t0\ntench, Tinca tinca\t1",
    "index, tab, name": "2\tBärin\n0\tgolden retriever\n1\ttench, Tinca tinca",
    "name index": "Bärin 2\ngolden retriever 0\ntench, Tinca tinca 1",
    "index name": "2 Bärin\n0 golden retriever\n1 tench, Tinca tinca",
    "csv": 'Bärin,2\ngolden retriever,0\n"tench, Tinca tinca",1',
    "csv without quotes": "Bärin,2\ngolden retriever,0\ntench, Tinca tinca,1",
    "csv with a header": 'name,index\nBärin,2\ngolden retriever,0\n"tench, Tinca tinca",1',
    "index first in csv": 'index,name\n2,Bärin\n0,golden retriever\n1,"tench, Tinca tinca"',
    "semicolons": "Bärin;2\ngolden retriever; 0\ntench, Tinca tinca;1",
    "a list": '["golden retriever", "tench, Tinca tinca", "Bärin"]',
    "names in json": '{"Bärin": 2, "golden retriever": 0, "tench, Tinca tinca": 1}',
    "indices in json": '{"2": "Bärin", "0": "golden retriever", "1": "tench, Tinca tinca"}',
    "indices as text": '{"Bärin": "2", "golden retriever": "0", "tench, Tinca tinca": "1"}',
    "as of ImageNet": '{"2": ["Bärin", "x"], "0": ["golden retriever"], "1": ["tench, Tinca tinca", "y"]}',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("kind", TEXTS)
def test_reads_class_maps(tmp_path, kind, form, encoding):
    path = tmp_path / "map.txt"
    path.write_bytes(unicodedata.normalize(form, TEXTS[kind]).replace("\n", "\r\n").encode(encoding))
    assert read_class_map(path) == NAMES


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a\nb\n\n", ("a", "b")),
        ("b 1\na 0\n", ("a", "b")),
        ("1 0\n2 1\n3 2\n", ("1", "2", "3")),
        ('{"1": 0, "2": 1}', ("1", "2")),
        ("class 0\nclass 1\n", ("class 0", "class 1")),
        ("room 7\nroom 5\n", ("room 7", "room 5")),
        ("n01440764 tench\nn01443537 goldfish, fish\n", ("n01440764", "n01443537")),
        ("7\n5\n", ("7", "5")),
        ("[a]\n{b}\n", ("[a]", "{b}")),
    ],
)
def test_reads_class_maps_of_odd_names(tmp_path, text, names):
    (tmp_path / "map.txt").write_text(text)
    assert read_class_map(tmp_path / "map.txt") == names


@pytest.mark.parametrize("folders", ["NFC", "NFD"])
@pytest.mark.parametrize("classes", ["NFC", "NFD"])
@pytest.mark.parametrize("sure", [True, False])
def test_accents_are_the_same_composed_and_decomposed(folders, classes, sure):
    names = [unicodedata.normalize(folders, name) for name in ("Bär", "Öl", "Éclair")]
    known = [unicodedata.normalize(classes, name) for name in ("Öl", "Éclair", "Bär")]
    assert targets(names, 3, known, sure=sure) == dict(zip(names, (2, 0, 1), strict=True))


@pytest.mark.parametrize("width", [1, 3])
def test_folders_that_count_from_one_are_said_to_be_taken_from_zero(width):
    folders = [str(i).zfill(width) for i in range(1, 6)]
    with pytest.warns(BnpatchWarning, match=r"not 0 to 4; in natural order, '0*1' is output 0") as said:
        found = targets(folders, 5)
    assert len(said) == 1
    assert "--class-map FILE says otherwise" in str(said[0].message)
    assert found == {name: index for index, name in enumerate(folders)}


def test_folders_with_gaps_are_said_to_be_taken_in_order():
    with pytest.warns(BnpatchWarning, match="not 0 to 2; .*'4' is output 0, '7' is output 1, '9' is"):
        assert targets(["7", "4", "9"], 3) == {"4": 0, "7": 1, "9": 2}


def test_a_few_numbers_without_a_zero_are_said_to_be_indices():
    with pytest.warns(
        BnpatchWarning, match="without a 0: '1' is taken for output 1, where .* from 0"
    ) as said:
        assert targets(["1", "2"], 10) == {"1": 1, "2": 2}
    assert len(said) == 1


def test_the_indices_as_names_need_no_word():
    assert targets([str(i) for i in range(5)], 5) == {str(i): i for i in range(5)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1\n1 2\n2 0\n", "not clear which numbers of .*map.txt are the indices"),
        ("a 1\nb 2\n", "indices of .* are not 0 to 1; number every output once, from 0"),
        ('{"a": 0, "b": 0}', "indices of .* are not 0 to 1"),
        ('{"a": "x", "b": "y"}', "not a class map; give a list of names"),
        ('{"a": null}', "not a class map; give a list of names"),
        ("[[1, 2]]", "not a class map; give a list of names"),
        ('["a", "a"]', "'a' comes twice"),
        ("a\n" * 1_000_000, "has 200,001 classes or more, and the limit is 200,000"),
        ("[" + "1," * 1_000_000 + "1]", "has 1,000,001 classes or more, and the limit is 200,000"),
        (b"\0" * 40_000_000, "has 40 MB, and the limit is 20"),
        (b"\x89PNG\xff", "cannot read the class map"),
    ],
)
def test_says_what_is_wrong_with_a_class_map(tmp_path, text, message):
    (tmp_path / "map.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BnpatchError, match=message) as error:
        read_class_map(tmp_path / "map.txt")
    assert "map.txt" in str(error.value)


def test_folders_without_images_are_mentioned(tmp_path, checkpoint):
    """Once, and with what they count as: names decide, where they are known."""
    model = bnpatch.load(checkpoint)
    for name in "0123456789":
        (tmp_path / name).mkdir()
        if name not in "38":
            Image.new("L", (8, 8)).save(tmp_path / name / "a.png")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in "0123456789"))
    taken = f"{tmp_path} has 2 folders without images ('3', '8'), taken for classes by their names"
    others = f"{tmp_path} has 1 folder without images ('notes'), not taken for classes; --class-map FILE says"
    for names, file, expected in (
        (tuple("0123456789"), None, [taken, f"{others} otherwise"]),
        (None, None, [taken, f"{others} otherwise"]),
        (None, tmp_path / "names.txt", [taken]),
    ):
        model.class_names = names
        with pytest.warns(BnpatchWarning) as found:
            examples = bnpatch.open_examples(tmp_path, model, class_map=file)
        said = [str(each.message) for each in found]
        assert [text for text in said if "without images" in text] == expected
        assert sorted(examples.targets) == [0, 1, 2, 4, 5, 6, 7, 9]


def test_a_pipe_is_no_class_map(tmp_path):
    os.mkfifo(tmp_path / "map.txt")
    with pytest.raises(BnpatchError, match=r"cannot read the class map .*: not a regular file"):
        read_class_map(tmp_path / "map.txt")


@pytest.mark.parametrize("text", ["", "a\na\n", "a 0\nb 2\n"])
def test_refuses_what_is_no_class_map(tmp_path, text):
    path = tmp_path / "map.txt"
    path.write_text(text)
    with pytest.raises(BnpatchError, match=r"map\.txt"):
        read_class_map(path)
    with pytest.raises(BnpatchError, match="cannot read the class map"):
        read_class_map(tmp_path / "nope")
