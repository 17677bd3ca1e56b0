import re

import pytest

from maxlike.mfu import PEAK_FLOPS, mfu, of_kind, peak_flops


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_known_devices(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12
    assert sum(re.fullmatch(pattern, kind) is not None for pattern in PEAK_FLOPS) == 1


@pytest.mark.parametrize(
    "kind",
    ["cpu", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40", "TPU v9", ""],
)
def test_unknown_devices_have_no_mfu_rather_than_a_wrong_one(kind):
    assert peak_flops(kind) is None
    assert mfu(1e6, 1e9, kind, 8) is None


@pytest.mark.parametrize(
    ("kind", "gigabytes"),
    [
        ("NVIDIA H100 NVL", 94),
        ("NVIDIA H200 NVL", 141),
        ("NVIDIA H200", 141),
        ("NVIDIA A100 80GB PCIe", 80),
        ("NVIDIA A100-PCIE-40GB", 40),
        ("NVIDIA A100-SXM4-80GB", 80),
    ],
)
def test_cards_of_one_name_have_the_memory_of_their_own(kind, gigabytes):
    assert of_kind(kind).memory == gigabytes * 1e9


def test_mfu_is_of_all_devices():
    assert mfu(1e5, 275e12 / 1e5, "TPU v4", 1) == pytest.approx(1.0)
    assert mfu(1e5, 275e12 / 1e5, "TPU v4", 4) == pytest.approx(0.25)
