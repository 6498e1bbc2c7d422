"""Where a model computes and in which dtype, whatever keeps its parameters."""

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The device that images go to: that of the first parameter that is not offloaded."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    for module in model.modules():  # accelerate brings every parameter to where it is needed
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """That of the first floating-point parameter (quantised weights have another); float32 without any."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
