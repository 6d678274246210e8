"""The training run on real text: same data, same start, losses equal within rounding."""

from __future__ import annotations

import functools

import pytest
import torch

from effkern.bench import end_to_end, studies
from effkern.bench.memory import peak_tensor_bytes
from effkern.bench.model import Config
from effkern.bench.results import EndToEnd
from effkern.bench.text import standard_library

SMALL = Config(layers=2, width=64, heads=2, context=128)


def test_text_is_the_same_every_time_and_parts_do_not_overlap() -> None:
    first, second = standard_library(), standard_library()
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.validation, second.validation)
    assert len(first.train) > 4 * len(first.validation) > 0
    inputs, targets = first.windows(first.train, torch.tensor([0, 7]), 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bytes(inputs[1].tolist()) == bytes(first.train[7:23].tolist())


@pytest.mark.parametrize(("dtype", "difference"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_losses_match_plain_pytorch(dtype: torch.dtype, difference: float) -> None:
    device = torch.device("cpu")
    result = end_to_end.train(device, steps=12, config=SMALL, batch=2, dtype=dtype)
    assert result.curves[0].path == ""
    _assert_equal_losses(result, difference)


@pytest.mark.parametrize(("dtype", "difference"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_hyena_learns_as_through_torch_fft(dtype: torch.dtype, difference: float) -> None:
    study = studies.study(["long_conv"])
    result = end_to_end.train(torch.device("cpu"), steps=12, config=SMALL, batch=2, dtype=dtype, chosen=study)
    assert result.curves[0].path.endswith(":reference")
    _assert_equal_losses(result, difference)


@pytest.mark.parametrize(("dtype", "difference"), [(torch.float32, 1e-2), (torch.bfloat16, 5e-2)])
def test_reversible_networks_learn_as_with_all_activations_stored(
    dtype: torch.dtype, difference: float
) -> None:
    study = studies.study(["reversible"])
    assert study.config.layers == 24
    result = end_to_end.train(torch.device("cpu"), steps=12, config=SMALL, batch=2, dtype=dtype, chosen=study)
    stored, *others = result.curves
    assert [curve.variant for curve in others] == ["reversible", "reversible, exact"]
    assert stored.train_bits[-1] < stored.train_bits[0] - 1.0
    for curve in others:
        assert curve.parameters == stored.parameters
        pairs = zip(
            [*curve.train_bits, curve.final_bits], [*stored.train_bits, stored.final_bits], strict=True
        )
        assert all(abs(mine - theirs) < difference for mine, theirs in pairs)


def test_reversible_study_takes_less_memory_the_deeper_it_is() -> None:
    """Peaks of a step, by the allocations that torch knows of."""
    study, peaks, device = studies.study(["reversible"]), [], torch.device("cpu")
    config = Config(layers=16, width=64, heads=2, context=256)
    for variant in study.variants:
        trainer = end_to_end.Trainer.start(variant, config, device, torch.float32, 0)
        tokens = torch.randint(256, (2, 256))
        trainer.step(tokens, tokens)
        peaks.append(peak_tensor_bytes(functools.partial(trainer.step, tokens, tokens), device))
    stored, *others = peaks
    assert all(peak < 0.5 * stored for peak in others)


def _assert_equal_losses(result: EndToEnd, difference: float) -> None:
    plain, *others = result.curves
    assert plain.train_bits[-1] < plain.train_bits[0] - 1.0  # it learns
    assert others
    for curve in others:
        assert curve.path.partition("/")[0].endswith(":cpu")
        assert curve.parameters == plain.parameters
        assert len(curve.train_bits) == 12
        for mine, theirs in zip(curve.train_bits, plain.train_bits, strict=True):
            assert abs(mine - theirs) < difference
        assert abs(curve.final_bits - plain.final_bits) < difference


def test_a_rerun_gives_the_same_losses() -> None:
    def losses() -> list[float]:
        alone = studies.Study(studies.study().variants[1:])
        result = end_to_end.train(
            torch.device("cpu"), steps=4, config=SMALL, dtype=torch.float32, chosen=alone
        )
        return result.curves[0].train_bits

    assert losses() == losses()


def test_monarch_study_trains_projects_and_densifies() -> None:
    result = end_to_end.train(
        torch.device("cpu"),
        steps=16,
        config=SMALL,
        dtype=torch.float32,
        chosen=studies.study(["monarch"]),
    )
    dense, sparse, projected, grown = result.curves
    assert dense.path == "" and grown.path == ""  # what runs last in the grown model is PyTorch's
    for curve in (sparse, projected):
        assert curve.path.startswith("monarch_matmul_backward:cpu/")
        assert curve.parameters == sparse.parameters < dense.parameters
    assert grown.parameters == dense.parameters
    # Until the middle the pairs are the same training; the dense model after projection is not far from where it was.
    assert projected.train_bits[:8] == dense.train_bits[:8] and grown.train_bits[:8] == sparse.train_bits[:8]
    assert abs(grown.train_bits[8] - sparse.train_bits[8]) < 1e-3
    assert all(curve.train_bits[-1] < curve.train_bits[0] - 1.0 for curve in result.curves)


def test_dkm_study_clusters_on_and_rounds_off() -> None:
    result = end_to_end.train(
        torch.device("cpu"),
        steps=24,
        config=SMALL,
        dtype=torch.float32,
        chosen=studies.study(["dkm"]),
    )
    dense, rounded, clustered = result.curves
    assert dense.path == rounded.path == "" and clustered.path.startswith("dkm_backward:cpu/")
    assert dense.train_bits == rounded.train_bits and dense.train_bits[:12] == clustered.train_bits[:12]
    assert dense.parameters == rounded.parameters == clustered.parameters
    assert rounded.size_bytes == clustered.size_bytes < dense.size_bytes / 6
    assert dense.size_bytes == 4 * dense.parameters
    # The last validation is of 3 bits, those before the middle are not.
    assert clustered.validation_bits[:3] == dense.validation_bits[:3]
    assert rounded.final_bits > dense.final_bits
    assert clustered.train_bits[-1] < clustered.train_bits[0] - 1.0
