"""The order of attention's kernels."""

import torch
from torch.nn.attention import SDPBackend

from lrtrain.model.kernels import attention_kernels


def test_cudnn_comes_first_on_a_gpu_and_nothing_changes_elsewhere():
    before = torch._C._get_sdp_priority_order()
    with attention_kernels(torch.device("cuda")):
        assert torch._C._get_sdp_priority_order()[0] == SDPBackend.CUDNN_ATTENTION.value
    assert torch._C._get_sdp_priority_order() == before
    with attention_kernels(torch.device("cpu")):
        assert torch._C._get_sdp_priority_order() == before
