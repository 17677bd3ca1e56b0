"""The benchmark of linear mixers, at a size that measures nothing."""

from maxlike.bench import recurrence


def test_every_ratio_is_of_the_same_round(monkeypatch):
    monkeypatch.setattr(recurrence, "MIXERS", {name: recurrence.MIXERS[name] for name in list(recurrence.MIXERS)[:2]})
    for name, value in {"DIM": 8, "TOKENS": 32, "SHORT": 4, "MIDDLE": 8, "LONG": 32}.items():
        monkeypatch.setattr(recurrence, name, value)
    result = recurrence.measure(None, repeats=2, steps=1)
    found = {quantity.name: quantity for quantity in result.quantities}
    fast, slow = found["lightning attention, rows of 8"], found["softmax attention, rows of 8"]
    ratio = found["softmax attention / lightning attention, 4 K"]
    assert list(ratio.values) == [s / f for s, f in zip(slow.values, fast.values, strict=True)]
    assert "softmax attention, rows of 32" not in found
    assert all(len(quantity.values) == 2 and min(quantity.values) > 0 for quantity in result.quantities)
