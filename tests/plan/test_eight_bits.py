"""Eight-bit products in plans: their own peaks, and no plan for devices that have none."""

import pytest

from maxlike import config
from maxlike.errors import UserError
from maxlike.plan import planned, targets
from maxlike.plan.trace import trace

TOY = ["depth = 2", "experiment.Experiment.batch_size = 64", "experiment.Experiment.hooks = ()"]


def traced(overlay, *bindings):
    experiment = config.load("families/transformer", overlays=[f"precision/{overlay}"], bindings=[*TOY, *bindings])
    return experiment, trace(experiment, "gpu")


def plan(made, hardware):
    return planned.analytic(made[0], targets.find(None, hardware, 8), made[1])


def test_products_of_eight_bits_have_the_peak_of_their_own():
    bf16, fp8, emulated = (
        traced("bf16"),
        traced("fp8", "low_precision.Float8.smallest = 16"),
        traced("fp8", "low_precision.Float8.smallest = 16", "low_precision.Float8.emulate = True"),
    )
    assert {work.dtype for work in bf16[1].row} <= {"bfloat16", "float32"}
    eight = sum(work.flops for work in fp8[1].row if work.dtype == "float8")
    assert eight > 0.4 * sum(work.flops for work in fp8[1].row)
    assert "float8" not in {work.dtype for work in emulated[1].row}
    # Twice the peak where the products are of eight bits, and the same where not.
    device = targets.find(None, "h100", 8).device
    assert device.float8 == pytest.approx(2 * device.peak, rel=1e-3)
    wide, narrow, same = (plan(made, "h100").time.compute for made in (bf16, fp8, emulated))
    assert narrow < 0.8 * wide
    assert same == pytest.approx(wide, rel=0.02)
    for hardware in ("a100", "v6e", "mi250x"):
        with pytest.raises(UserError, match=f"{hardware} has no float8 products"):
            plan(fp8, hardware)
