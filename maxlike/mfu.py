"""Model FLOPs utilisation: useful FLOP/s over the peak of the devices, where their peak is known.

Convention: 6 FLOPs a parameter and token (forward 2, backward 4), the head included and the embedding look-up not, plus
the two attention products, of which causal attention counts half. Recomputation is not counted, which makes this model,
not hardware, utilisation (Chowdhery et al., 'PaLM', appendix B).
"""

import re

CONVENTION = "6N + attention, causal halved, recomputation not counted; peak: dense bfloat16"

# Dense bfloat16 matrix FLOP/s with float32 accumulation, no sparsity, from the vendors' data sheets, for what jax calls
# one device. The whole name must match: a laptop chip, a MIG slice or a new model has another peak, hence none here.
PEAK_FLOPS = {
    r"TPU v4": 275e12,
    r"TPU (v5 lite|v5e)": 197e12,
    r"TPU (v5|v5p)": 459e12,
    r"TPU (v6 lite|v6e)": 918e12,
    r"TPU ?7x": 2307e12 / 2,  # a chip is two devices to jax
    r"NVIDIA A100-(SXM4|PCIE|PCIe)-(40|80)GB|NVIDIA A100 80GB PCIe": 312e12,
    r"NVIDIA H100 80GB HBM3|NVIDIA GH200 (96|120|144|480)GB( HBM3e?)?": 989e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA (H100|H200) NVL": 835e12,
    r"NVIDIA H200": 989e12,
    r"NVIDIA B200": 2250e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
    r"NVIDIA GeForce RTX 4090": 165e12,
    r"NVIDIA GeForce RTX 5090": 209e12,
    r"AMD Instinct MI300X( OAM)?": 1307e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device by its `jax.Device.device_kind`, or None where it is not known."""
    for pattern, peak in PEAK_FLOPS.items():
        if re.fullmatch(pattern, device_kind.strip()):
            return peak
    return None


def mfu(tokens_per_second: float, flops_per_token: float, device_kind: str, devices: int) -> float | None:
    """Model FLOPs utilisation, 0 to 1, or None on a device whose peak is not known.

    tokens_per_second: of all devices together. flops_per_token: training FLOPs by the convention above.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * devices)
