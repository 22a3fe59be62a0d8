import sqlite3

import optuna
import pytest

from bnpatch.core.errors import BnpatchError
from bnpatch.search.storages import Storage, StorageError, connect
from bnpatch.search.studies import open_study


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": "c"}, 'another model ("a", now "c")'),
        ({"range": [0, 1]}, "another range (null, now [0, 1])"),
    ],
)
def test_another_question_needs_another_study(url, changed, named):
    storage = Storage(url)
    open_study(storage, fingerprint={"model": "a", "data": 1.5})
    open_study(storage, fingerprint={"data": 1.5, "model": "a"})
    with pytest.raises(BnpatchError) as error:
        open_study(storage, fingerprint={"model": "a", "data": 1.5, **changed})
    assert named in str(error.value)
    open_study(storage, "other", fingerprint=changed)


def test_another_direction_is_refused(url):
    open_study(Storage(url), direction="minimize")
    with pytest.raises(BnpatchError, match="has the direction minimize, not maximize"):
        open_study(Storage(url), direction="maximize")


def test_a_study_of_another_tool_is_refused(url):
    study = optuna.create_study(study_name="bnpatch", storage=url)
    study.optimize(lambda trial: trial.suggest_float("y", 0, 1), n_trials=1)
    with pytest.raises(BnpatchError, match="has trials that this version of bnpatch did not make") as error:
        open_study(Storage(url))
    assert "choose another name" in error.value.remedy
    open_study(Storage(url), "another name")


def test_a_study_of_another_format_is_refused(url, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr("bnpatch.search.studies._FORMAT", 1)
        open_study(Storage(url))
    with pytest.raises(BnpatchError, match=r"another format \(1, now 2\)"):
        open_study(Storage(url))
    open_study(Storage(url), "another name")


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("sqlite:////nowhere/at/all/x.db", "unable to open database file"),
        ("study.txt", "is no database"),
        ("nonsense://x", "nonsense"),
        ("postgres://me:geheim@localhost/x", "postgres"),
        ("sqlite:///{tmp}/notes.txt", "file is not a database"),
    ],
)
def test_places_that_hold_no_study(tmp_path, place, problem):
    (tmp_path / "notes.txt").write_text("once upon a time " * 100)
    with pytest.raises(BnpatchError) as error:
        open_study(Storage(place.format(tmp=tmp_path)))
    assert problem in str(error.value)
    assert error.value.remedy
    assert "\n" not in str(error.value)
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize(
    "place", ["a/study.journal", "study.log", "journal://study.x", "journal:////a/study"]
)
def test_journals_are_refused_and_the_remedy_works(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BnpatchError, match="nothing else shows whether a search was killed") as error:
        open_study(Storage(place))
    assert error.value.remedy == "give a database such as sqlite:///study.db"
    open_study(Storage(error.value.remedy.split()[-1]))
    assert (tmp_path / "study.db").exists()


def test_a_database_that_cannot_be_written_is_refused_at_once(url):
    open_study(Storage(url))
    path = url.removeprefix("sqlite:///")
    with pytest.raises(StorageError, match="readonly database; give a database that can be written"):
        open_study(Storage(f"sqlite:///file:{path}?mode=ro&uri=true"))


def test_a_locked_database_is_refused(url):
    connect(url)
    lock = sqlite3.connect(url.removeprefix("sqlite:///"))
    lock.execute("begin exclusive")
    with pytest.raises(StorageError, match=r"database is locked; give .* that no other program locks"):
        open_study(Storage(url, lock_seconds=0.01))
    lock.close()
    open_study(Storage(url))
