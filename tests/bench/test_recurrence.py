"""The benchmark of linear mixers, at a size that measures nothing."""

from maxlike.bench import recurrence


def test_every_ratio_is_of_the_same_round(monkeypatch):
    sizes = recurrence.Sizes(dim=8, heads=4, tokens=32, dtype="float32", flat=(4, 32), against=((8, "> 1"),))
    both = dict(list(recurrence.mixers(sizes).items())[:2])
    monkeypatch.setattr(recurrence, "CPU", sizes)
    monkeypatch.setattr(recurrence, "mixers", lambda sizes: both)
    result = recurrence.measure(None, repeats=2, steps=1)
    found = {quantity.name: quantity for quantity in result.quantities}
    fast, slow = found["lightning attention, rows of 8"], found["softmax attention, rows of 8"]
    ratio = found["softmax attention / lightning attention, 8"]
    assert list(ratio.values) == [s / f for s, f in zip(slow.values, fast.values, strict=True)] and ratio.goal == "> 1"
    assert "softmax attention, rows of 32" not in found
    assert all(len(quantity.values) == 2 and min(quantity.values) > 0 for quantity in result.quantities)
