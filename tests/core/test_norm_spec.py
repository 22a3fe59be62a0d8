import pytest

from bnpatch.core.errors import BnpatchError
from bnpatch.core.norm_spec import NormSpec, Renorm


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (NormSpec.batch(), "Batch Norm"),
        (NormSpec.ghost(8), "Ghost Batch Norm of 8 examples"),
        (NormSpec.group(16), "Group Norm of 16 channels"),
        (NormSpec.instance(), "Instance Norm"),
        (NormSpec.batch_group(16), "Batch/Group Norm of 16 channels and all examples"),
        (NormSpec.batch_group(16, 2), "Batch/Group Norm of 16 channels and 2 examples"),
        (NormSpec.batch_renorm(), "Batch Renorm"),
    ],
)
def test_members_have_their_names(spec, name):
    assert str(spec) == name


@pytest.mark.parametrize(
    "values",
    [
        {"channels_per_group": 0},
        {"examples_per_group": 0},
        {"alpha": 1.5},
        {"examples_per_group": 4, "renorm": Renorm()},
        {"channels_per_group": 4, "renorm": Renorm()},
    ],
)
def test_impossible_specs_are_refused(values):
    with pytest.raises(BnpatchError):
        NormSpec(**values)


def test_fits_itself_to_a_layer():
    spec = NormSpec.batch_group(16)
    assert spec.for_channels(64) == spec
    assert spec.for_channels(24).channels_per_group == 8
    assert NormSpec.ghost(4).for_channels(24) == NormSpec.ghost(4)
