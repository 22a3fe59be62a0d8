"""``bnpatch inspect``: norm layers, and advice on training."""

import json
import re

import timm
import torch

import bnpatch


def test_inspect(cli, checkpoint, tmp_path):
    code, out, _ = cli("inspect", checkpoint)
    norm_layers = bnpatch.load(checkpoint).inventory().norm_layers
    assert code == 0
    assert "12 norm layers to weigh examples at" in out
    assert "3 more see one value per channel and stay plain: layer4.0.bn1" in out
    code, out, _ = cli("inspect", checkpoint, "--sites")
    assert all(norm_layer.name in out for norm_layer in norm_layers)
    torch.save(timm.create_model("test_efficientnet_gn").state_dict(), tmp_path / "gn.pt")
    code, out, _ = cli("inspect", "gn.pt")
    assert code == 0
    assert "0 norm layers" in out
    assert "GroupNormAct" in out
    assert "estimated" in out


def test_inspect_advises_on_training(cli, checkpoint, folder, tmp_path):
    code, out, err = cli("inspect", checkpoint, "--data", folder, "-j", 0, "--sites")
    assert code == 0
    assert "15 BatchNorm2d" in err
    assert (
        "scales and shifts of 2 of 15 norm layers reach the output past no other norm: layer4.0.bn2, " in out
    )
    assert "layer4.0.downsample.2" in out
    assert "for batches of 32 in training (assumed)" in out
    assert re.search(r"Ghost Batch Norm +yes", out)
    assert re.search(r"of 15 norm layers go beyond what was possible in training", out)
    assert re.search(r"layer1\.0\.bn1 +\d+\.\d +\d+\.\d +none", out)

    state = bnpatch.load(checkpoint).module.state_dict()
    torch.save({"state_dict": state, "args": {"batch_size": 6}}, tmp_path / "small.pt")
    code, out, _ = cli("inspect", "small.pt", "--img-size", 32)
    assert "for batches of 6 in training (from the checkpoint)" in out
    assert re.search(r"Ghost Batch Norm +with care", out)
    assert "go beyond" not in out
    code, out, _ = cli("inspect", checkpoint, "--train-batch-size", 2, "--json")
    content = json.loads(out)
    assert content["norms"] == {"BatchNorm2d": 15}
    assert content["unnormalized"] == ["layer4.0.bn2", "layer4.0.downsample.2"]
    assert len(content["single_value_sites"]) == 3
    assert (content["train_batch_size"], content["train_batch_size_source"]) == (2, "as asked")
    assert {t["name"]: t["fits"] for t in content["techniques"]}["Batch/Group Norm"] == "yes"
    assert content["output_ranges"] is None
    assert content["norms_by_function_calls"] == 0
    code, out, _ = cli("inspect", checkpoint, "--data", folder, "-j", 0, "--json")
    ranges = json.loads(out)["output_ranges"]
    assert len(ranges) == 15
    assert all(r["observed"] > 0 and r["inference_bound"] is None for r in ranges)


def test_images_that_are_only_looked_at_need_no_labels(cli, checkpoint, flat, plain):
    assert cli("inspect", checkpoint, "--data", flat, "-j", 0)[0] == 0
    assert plain[0].exists()  # exported with these images


def test_inspect_of_an_onnx_file_says_what_needs_torch(cli, plain):
    code, out, err = cli("inspect", plain[0], "--train-batch-size", 8, "--json")
    assert code == 0
    assert json.loads(out)["norms"] == {"BatchNormalization": 15}
    assert "techniques" not in json.loads(out)
    assert "need a torch model" in err
