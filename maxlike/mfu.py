"""What devices can do, and model FLOPs utilisation: useful FLOP/s over the peak of the devices, where it is known.

Convention: 6 FLOPs a parameter and token (forward 2, backward 4), the head included and the embedding look-up not, plus
the two attention products, of which causal attention counts half. Recomputation is not counted, which makes this model,
not hardware, utilisation (Chowdhery et al., 'PaLM', appendix B).
"""

import dataclasses
import re

CONVENTION = "6N + attention, causal halved, recomputation not counted; peak: dense bfloat16"


@dataclasses.dataclass(frozen=True)
class Device:
    """What jax calls one device, from the vendors' data sheets.

    name: for people and for `--hardware`. kind: pattern of the whole `jax.Device.device_kind`; a laptop chip, a MIG
        slice or a new model has another peak, hence no entry here. platform: "tpu" or "gpu".
    peak: dense bfloat16 matrix FLOP/s with float32 accumulation, no sparsity.
    memory: bytes that a program may use. bandwidth: bytes/s of that memory.
    link: bytes/s out of a device in one direction: of a GPU to the others of its node, of a TPU along one link of the
        torus. node: devices of a node, None for a torus. network: bytes/s of a device in one direction between nodes,
        of a TPU between slices.
    wrap: sizes of a dimension of the torus that is closed to a ring divide by this; None without a torus.
    price: dollars a device-hour, the on-demand list price of US regions as of 2025, None where none is listed by the
        device; `--price` overrides it.
    largest: devices of the largest slice of TPUs, None for others.
    float8, int8: peaks of dense products of such numbers, FLOP/s; None where the device has none.
    """

    name: str
    kind: str
    platform: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    node: int | None
    network: float
    wrap: int | None = None
    price: float | None = None
    largest: int | None = None
    float8: float | None = None
    int8: float | None = None

    def peak_of(self, dtype: str) -> float | None:
        """Peak of products by the dtype of what is multiplied: "float8", "int8", anything else bfloat16's."""
        return {"float8": self.float8, "int8": self.int8}.get(dtype, self.peak)


_GiB = 2.0**30
# TPU memory: what the compiler says that it has. GPU memory: the size on the data sheet.

DEVICES = (
    Device("v4", r"TPU v4", "tpu", 275e12, 31.75 * _GiB, 1228e9, 45e9, None, 6.25e9, 4, 3.22, 4096),
    Device(
        "v5e", r"TPU (v5 lite|v5e)", "tpu", 197e12, 15.75 * _GiB, 819e9, 45e9, None, 3.1e9, 16, 1.20, 256, int8=393e12
    ),
    Device("v5p", r"TPU (v5|v5p)", "tpu", 459e12, 95.74 * _GiB, 2765e9, 90e9, None, 6.25e9, 4, 4.20, 8960, int8=918e12),
    Device(
        "v6e",
        r"TPU (v6 lite|v6e)",
        "tpu",
        918e12,
        31.25 * _GiB,
        1640e9,
        90e9,
        None,
        12.5e9,
        16,
        2.70,
        256,
        int8=1836e12,
    ),
    # A chip is two devices to jax.
    Device(
        "v7x",
        r"TPU ?7x",
        "tpu",
        2307e12 / 2,
        94.75 * _GiB,
        3690e9,
        90e9,
        None,
        12.5e9,
        4,
        largest=18432,
        float8=2307e12,
    ),
    Device("a100", r"NVIDIA A100-SXM4-80GB", "gpu", 312e12, 80e9, 2039e9, 300e9, 8, 25e9, int8=624e12),
    Device("a100_40", r"NVIDIA A100-SXM4-40GB", "gpu", 312e12, 40e9, 1555e9, 300e9, 8, 25e9, int8=624e12),
    Device(
        "a100_pcie",
        r"NVIDIA A100-(PCIE|PCIe)-80GB|NVIDIA A100 80GB PCIe",
        "gpu",
        312e12,
        80e9,
        1935e9,
        32e9,
        8,
        25e9,
        int8=624e12,
    ),
    Device("a100_pcie_40", r"NVIDIA A100-(PCIE|PCIe)-40GB", "gpu", 312e12, 40e9, 1555e9, 32e9, 8, 25e9, int8=624e12),
    Device("h100", r"NVIDIA H100 80GB HBM3", "gpu", 989e12, 80e9, 3352e9, 450e9, 8, 50e9, float8=1979e12, int8=1979e12),
    Device(
        "gh200",
        r"NVIDIA GH200 (96|120|144|480)GB( HBM3e?)?",
        "gpu",
        989e12,
        96e9,
        4000e9,
        450e9,
        1,
        50e9,
        float8=1979e12,
        int8=1979e12,
    ),
    Device("h100_pcie", r"NVIDIA H100 PCIe", "gpu", 756e12, 80e9, 2039e9, 64e9, 8, 50e9, float8=1513e12, int8=1513e12),
    Device("h100_nvl", r"NVIDIA H100 NVL", "gpu", 835e12, 94e9, 3900e9, 300e9, 2, 50e9, float8=1671e12, int8=1671e12),
    Device("h200_nvl", r"NVIDIA H200 NVL", "gpu", 835e12, 141e9, 4800e9, 450e9, 4, 50e9, float8=1671e12, int8=1671e12),
    Device("h200", r"NVIDIA H200", "gpu", 989e12, 141e9, 4800e9, 450e9, 8, 50e9, float8=1979e12, int8=1979e12),
    Device("b200", r"NVIDIA B200", "gpu", 2250e12, 180e9, 8000e9, 900e9, 8, 50e9, float8=4500e12, int8=4500e12),
    # One of the two dies of an MI250X is a device; 4 x 25 GB/s leave a node of 8 (arXiv 2312.12705).
    Device("mi250x", r"AMD Instinct MI250X", "gpu", 191.5e12, 64e9, 1638e9, 50e9, 8, 12.5e9, int8=191.5e12),
    # Its FP8 is another format (e4m3fnuz), in which nothing is multiplied here.
    Device("mi300x", r"AMD Instinct MI300X( OAM)?", "gpu", 1307e12, 192e9, 5300e9, 448e9, 8, 50e9, int8=2615e12),
    Device("l4", r"NVIDIA L4", "gpu", 121e12, 24e9, 300e9, 32e9, 8, 12.5e9, float8=242e12, int8=242e12),
    Device("l40s", r"NVIDIA L40S", "gpu", 362e12, 48e9, 864e9, 32e9, 8, 12.5e9, float8=733e12, int8=733e12),
    Device("rtx_3090", r"NVIDIA GeForce RTX 3090", "gpu", 71e12, 24e9, 936e9, 32e9, 8, 1.25e9, int8=284e12),
    Device(
        "rtx_4090", r"NVIDIA GeForce RTX 4090", "gpu", 165e12, 24e9, 1008e9, 32e9, 8, 1.25e9, float8=330e12, int8=660e12
    ),
    Device(
        "rtx_5090", r"NVIDIA GeForce RTX 5090", "gpu", 209e12, 32e9, 1792e9, 64e9, 8, 1.25e9, float8=419e12, int8=838e12
    ),
)
PEAK_FLOPS = {device.kind: device.peak for device in DEVICES}


def of_kind(device_kind: str) -> Device | None:
    """The entry of a `jax.Device.device_kind`, or None where it is not known."""
    return next((device for device in DEVICES if re.fullmatch(device.kind, device_kind.strip())), None)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device by its `jax.Device.device_kind`, or None where it is not known."""
    device = of_kind(device_kind)
    return None if device is None else device.peak


def mfu(tokens_per_second: float, flops_per_token: float, device_kind: str, devices: int) -> float | None:
    """Model FLOPs utilisation, 0 to 1, or None on a device whose peak is not known.

    tokens_per_second: of all devices together. flops_per_token: training FLOPs by the convention above.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * devices)
