import pytest
import timm

from bnpatch.core.errors import BnpatchError
from bnpatch.data.preprocessing import Preprocessing


def test_a_data_config_of_timm_overrides_and_other_names_are_refused():
    base = Preprocessing((3, 224, 224), (0.5,), (0.5,))
    config = timm.data.resolve_model_data_config(timm.create_model("test_resnet"))
    assert base.override(**config).input_size == config["input_size"]
    assert base.override(img_size=(48, 192)).input_size == (3, 48, 192)
    with pytest.raises(BnpatchError, match=r"has no value 'size'; choose crop_mode, .*img_size"):
        base.override(size=32)
