"""Machines and processes with something missing: each case works or says what to do. One process a case."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effkern import _lib

USE = """
import torch, effkern
q = torch.randn(2, 4, 50, 32, requires_grad=True)
out, lse = effkern.attention(q, q, q, causal=True, return_lse=True)
(out.sum() + lse.sum()).backward()
expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
torch.testing.assert_close(out, expected)
assert q.grad.isfinite().all()
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Not from the checkout: the package must be found where it is installed.
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "2"} | environment,
        cwd=os.sep,
        capture_output=True,
        text=True,
        timeout=240,
    )


def works(code: str, **environment: str) -> str:
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_in_nothing_heavy() -> None:
    works(
        "import torch, sys; before = set(sys.modules); import effkern; new = set(sys.modules) - before\n"
        "heavy = {'triton', 'numpy', 'sympy', 'matplotlib', 'rich', 'torch._dynamo', 'torch._inductor'}\n"
        "assert not heavy & {name for name in new}, heavy & new"
    )


def test_without_triton() -> None:
    works(
        "import sys; sys.modules['triton'] = None\n" + USE + "from effkern import backends\n"
        "reasons = [a.reason for row in backends.report() for a in row.alternatives if a.backend == 'triton']\n"
        "assert any('triton is not installed' in r for r in reasons if r), reasons\n"
        "try: effkern.attention(q, q, q, backend='triton')\n"
        "except backends.Unavailable as error:\n"
        "    assert 'pip install triton' in str(error) and 'cpu' in error.would_work\n"
        "else: raise AssertionError('no error')"
    )


def test_flops_are_registered_whichever_is_imported_first() -> None:
    count = (
        "x = torch.randn(1, 1, 8, 4)\n"
        "with FlopCounterMode(display=False) as counter: effkern.attention(x, x, x)\n"
        "assert counter.get_total_flops() == 8 * 8 * 16"
    )
    counter = "from torch.utils.flop_counter import FlopCounterMode\n"
    works(f"import torch, effkern\n{counter}{count}")
    works(f"import torch\n{counter}import effkern\n{count}")


def test_number_of_threads() -> None:
    """One thread from the environment, then more than there are cores."""
    works(f"{USE}assert torch.get_num_threads() == 1\ntorch.set_num_threads(7){USE}", OMP_NUM_THREADS="1")


def test_read_only_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    places = {name: str(home) for name in ("HOME", "XDG_CACHE_HOME", "TRITON_HOME")}
    works(USE, **places)
    assert not list(home.iterdir())


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_dataloader_workers(method: str, tmp_path: Path) -> None:
    """Workers call the op, also when the parent has used its threads before they were forked."""
    script = tmp_path / "workers.py"
    script.write_text(
        "import torch, effkern\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 6\n"
        "    def __getitem__(self, i):\n"
        "        q = torch.full((1, 2, 40, 16), 0.1 * i).requires_grad_()\n"
        "        out = effkern.attention(q, q, q, causal=True)\n"
        "        out.sum().backward()\n"
        "        return out.detach(), q.grad\n"
        "if __name__ == '__main__':\n"
        "    big = torch.randn(2, 4, 256, 32)\n"
        "    effkern.attention(big, big, big)\n"
        "    context = {'num_workers': 2, 'timeout': 150, 'multiprocessing_context': '" + method + "'}\n"
        "    for i, (out, grad) in enumerate(torch.utils.data.DataLoader(Data(), **context)):\n"
        "        torch.testing.assert_close(out, torch.full_like(out, 0.1 * i))\n"
        "        assert grad.isfinite().all()\n"
    )
    works(
        f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
        if method == "fork"
        else f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, {str(script)!r}]).returncode)"
    )


def test_unknown_cpu_level() -> None:
    done = python(USE, EFFKERN_CPU_ISA="avx9000")
    assert done.returncode != 0
    assert "avx9000" in done.stderr and "scalar" in done.stderr, "names the level and the ones there are"
    assert "Error" in done.stderr.splitlines()[-1], "a Python exception, not a crash"


@pytest.mark.parametrize("level", ["scalar"])
def test_cpu_level_from_the_environment(level: str) -> None:
    works(USE + f"assert effkern.backends.last() == 'attention_backward:cpu/{level}'", EFFKERN_CPU_ISA=level)


def test_backend_from_the_environment() -> None:
    works(USE + "assert effkern.backends.last() == 'attention:reference'", EFFKERN_BACKEND="reference")
    done = python(USE, EFFKERN_BACKEND="metal")
    assert done.returncode != 0 and "backend 'metal' is unknown; expected one of" in done.stderr
    done = python(USE, EFFKERN_BACKEND="cuda")
    if not torch.cuda.is_available():
        assert done.returncode != 0
        assert "Unavailable: attention: backend 'cuda' cannot run" in done.stderr
        assert "would work: cpu, reference" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_library_without_a_gpu() -> None:
    """Built or not: the CPU works, and the report says what is in the way of the CUDA kernels."""
    library = _lib.status().cuda
    assert library.loaded or library.reason
    assert torch.version.cuda or not library.loaded
    works(
        USE + "row = effkern.backends.report('attention')[1]\n"
        "assert row.device == 'cuda' and row.backend is None\n"
        "assert all(a.reason for a in row.alternatives), row"
    )


def test_gpu_hidden_from_the_process() -> None:
    works(USE, CUDA_VISIBLE_DEVICES="")
