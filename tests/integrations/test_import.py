"""Importing effkern, or an integration, imports no other library and changes nothing."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, torch
import torch.nn.functional as F
from torch.nn.attention import list_flash_attention_impls
before = F.scaled_dot_product_attention, list_flash_attention_impls()
import effkern
assert not any(name.startswith("effkern.integrations") for name in sys.modules)
from effkern.integrations import flash_attn, sdpa, transformers
assert "transformers" not in sys.modules and "flash_attn" not in sys.modules
assert before == (F.scaled_dot_product_attention, list_flash_attention_impls())
"""


def test_imports_are_light() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
