"""What tests against other libraries need of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _torchvision() -> Iterator[None]:
    """timm and transformers import torchvision where it is installed. One made for CUDA does not load its operators
    beside a CPU torch, and then stumbles over describing two of them. No model here calls those: their schemas suffice
    for the import."""
    library = None
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            importlib.import_module("torchvision")
    yield
    del library
