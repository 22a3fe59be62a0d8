import torch
from torch import nn

from bnpatch.core.norm_spec import NormSpec
from bnpatch.finetune.moments import recalibrate
from bnpatch.nn.training_norm import convert_norms


def test_moments_are_those_of_all_batches():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    convert_norms(net, NormSpec.batch_group(2, 3))
    nn.init.normal_(net[0].running_mean)
    batches = [torch.randn(6, 4, 3, 3) * 2 + 1 for _ in range(4)]
    recalibrate(net, batches)
    by_group = torch.cat(batches).transpose(0, 1).reshape(2, -1)
    torch.testing.assert_close(net[0].running_mean, by_group.mean(1).repeat_interleave(2))
    torch.testing.assert_close(
        net[0].parameters_of_norm()[3], by_group.var(1, correction=0).repeat_interleave(2)
    )
    assert net[0].momentum == 0.1
    assert all(module.training for module in net.modules())
