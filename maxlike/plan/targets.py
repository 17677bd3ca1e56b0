"""What a plan is for: a TPU topology that libtpu compiles for, simulated CPU devices, this machine, or just a number of
devices of a kind."""

import dataclasses
import importlib.util
import math
import re

import jax

from maxlike import mfu
from maxlike.catalog import nearest
from maxlike.errors import UserError

TPUS = tuple(device.name for device in mfu.DEVICES if device.platform == "tpu")
# The slices that can be had where the chips of a pod lie in a plane; libtpu would also compile for larger ones.
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SLICES = {"v5e": FLAT, "v6e": FLAT}
BOXES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4 and boxes whose sides are multiples of 4")


@dataclasses.dataclass(frozen=True)
class Target:
    """word: how it was asked for. platform: "cpu", "gpu" or "tpu". count: devices. device: their entry in the table,
    None where their speed is not known. devices: to compile for; None: there are none, and the plan is by formula.
    torus: how the TPUs of a slice are linked, and None for others. slices: of count / slices devices each, with the
    slower network between them."""

    word: str
    platform: str
    count: int
    device: mfu.Device | None
    devices: tuple[jax.Device, ...] | None
    torus: tuple[int, ...] | None = None
    slices: int = 1


def find(topology: str | None, hardware: str | None, devices: int, slices: int = 1) -> Target:
    """The target of `--topology`, or of `--hardware`, `--devices` and `--slices` of so many devices each.

    topology: "v5e:4x4" (v4, v5e, v5p, v6e and the sizes that exist), "cpu:8" or "local". Raises UserError for one that
    is not known, a libtpu that is missing, and where both or neither are given.
    """
    if (topology is None) == (hardware is None):
        raise UserError(
            "say what to plan for: `--topology v5e:4x4` (also v5p, v6e, cpu:8, local) compiles for it, `--hardware "
            "h200 --devices 256` estimates without compiling"
        )
    if hardware is not None:
        return _analytic(hardware, devices, slices)
    if slices != 1:
        raise UserError(
            f"--slices {slices} goes with --hardware and --devices, those of one slice: several slices are estimated, "
            "not compiled for"
        )
    if devices:
        raise UserError(f"--devices {devices} goes with --hardware; --topology {topology} says the number itself")
    if topology == "local":
        found = tuple(jax.devices())
        return Target("local", found[0].platform, len(found), mfu.of_kind(found[0].device_kind), found)
    generation, _, size = topology.partition(":")
    if generation == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        return _simulated(int(size))
    if generation not in TPUS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", size):
        choices = (*(f"{name}:4x4" for name in TPUS), "cpu:8", "local")
        raise UserError(
            f"--topology {topology!r} is not known{nearest(topology, choices)}; it is one of the form "
            f"{', '.join(choices)}"
        )
    return _tpu(topology, generation, tuple(int(n) for n in size.split("x")))


def _analytic(hardware: str, devices: int, slices: int) -> Target:
    known = {device.name: device for device in mfu.DEVICES}
    if hardware not in known:
        raise UserError(
            f"--hardware {hardware!r} is not known{nearest(hardware, known)}; it is one of {', '.join(known)}"
        )
    if devices < 1:
        raise UserError(f"--hardware {hardware} needs the number of devices: `--devices 8`")
    device = known[hardware]
    if device.largest is not None and devices > device.largest:
        raise UserError(
            f"--devices {devices}: the largest slice of {hardware} has {device.largest}; say the devices of one slice "
            "and how many there are: `--slices 2`"
        )
    if slices < 1:
        raise UserError(f"--slices {slices} must be at least 1")
    if slices > 1 and device.node is not None:
        raise UserError(f"--slices {slices}: only TPUs come in slices; for {hardware} give --devices alone")
    torus = _torus(devices, 3 if hardware in ("v4", "v5p", "v7x") else 2) if device.node is None else None
    word = f"{hardware} x {devices}" if slices == 1 else f"{slices} slices of {hardware} x {devices}"
    return Target(word, device.platform, slices * devices, device, None, torus, slices)


def _torus(devices: int, dims: int) -> tuple[int, ...]:
    """The most even box of so many devices."""
    sizes, left = [], devices
    for dim in range(dims, 0, -1):
        size = max(n for n in range(1, left + 1) if left % n == 0 and n <= round(left ** (1 / dim) + 1e-9))
        sizes.append(size)
        left //= size
    return tuple(sorted((*sizes[:-1], sizes[-1] * left)))


def _simulated(count: int) -> Target:
    found = [device for device in jax.devices() if device.platform == "cpu"]
    if len(found) < count:
        raise UserError(
            f"--topology cpu:{count} needs {count} simulated devices and there are {len(found)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} (the launcher does, unless you say another)"
        )
    return Target(f"cpu:{count}", "cpu", count, None, tuple(found[:count]))


def _tpu(topology: str, generation: str, size: tuple[int, ...]) -> Target:
    known = ", ".join(SLICES.get(generation, BOXES))
    if generation in SLICES and "x".join(map(str, size)) not in SLICES[generation]:
        raise UserError(f"--topology {topology} is no slice that there is: those of {generation} are {known}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {topology} compiles with libtpu, which is missing: `pip install libtpu`, or "
            f"estimate with `--hardware {generation} --devices {math.prod(size)}`"
        )
    from jax.experimental import topologies

    try:
        devices = tuple(topologies.get_topology_desc(topology, "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "INVALID_ARGUMENT: " not in reason:
            raise UserError(f"--topology {topology}: libtpu does not start here ({reason})") from None
        sentence = reason.split("INVALID_ARGUMENT: ")[-1]
        raise UserError(
            f"--topology {topology}: libtpu knows no such slice ({sentence}); those of {generation} are {known}"
        ) from None
    device = next(d for d in mfu.DEVICES if d.name == generation)
    return Target(topology, "tpu", len(devices), device, devices, size)
