"""Lists of points."""

import pytest

from maxlike.errors import UserError
from maxlike.scaling.points import Product, Zip, binding, short_names


def test_products_and_zips_nest():
    size = Zip(knobs={"dim": (64, 128), "attention.Attention.heads": (2, 4)})
    assert size.points == [
        {"dim": 64, "attention.Attention.heads": 2},
        {"dim": 128, "attention.Attention.heads": 4},
    ]
    both = Product(knobs={"lr": (0.1, 0.2, 0.3)}, parts=(size,))
    assert [(point["lr"], point["dim"]) for point in both.points] == [
        (0.1, 64), (0.1, 128), (0.2, 64), (0.2, 128), (0.3, 64), (0.3, 128),
    ]  # fmt: skip
    beside = Zip(knobs={"steps": tuple(range(6))}, parts=(both,))
    assert [point["steps"] for point in beside.points] == list(range(6))
    assert beside.points[5] == {"steps": 5, "lr": 0.3, "dim": 128, "attention.Attention.heads": 4}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Product(knobs={"dim": ()}), "dim has no values"),
        (lambda: Product(), "neither knobs nor parts"),
        (lambda: Zip(knobs={"dim": (1, 2), "heads": (1, 2, 3)}), "dim 2, heads 3"),
        (lambda: Product(knobs={"dim": (1, 2, 1)}), "the point {'dim': 1} twice"),
        (lambda: Product(knobs={"dim": (1,)}, parts=(Zip(knobs={"dim": (2,)}),)), "dim has values in two places"),
        (lambda: Product(knobs={"model": (object(),)}), "name a class as text"),
    ],
)
def test_points_that_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_bindings_and_names():
    assert binding("steps", 5) == "steps = 5"
    assert binding("a.B.text", "x") == "a.B.text = 'x'"
    assert binding("a.B.optimizer", "@adamw.AdamW()") == "a.B.optimizer = @adamw.AdamW()"
    knobs = ["matrices/schedules.WSD.lr", "others/schedules.WSD.lr", "steps", "mlp.GatedMLP.width"]
    assert short_names(knobs) == {
        "matrices/schedules.WSD.lr": "matrices.schedules.WSD.lr",
        "others/schedules.WSD.lr": "others.schedules.WSD.lr",
        "steps": "steps",
        "mlp.GatedMLP.width": "width",
    }
