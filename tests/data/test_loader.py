"""Batches depend on (seed, step, schedule) alone: whatever the start, the workers and the hosts."""

import multiprocessing

import numpy as np
import pytest

from maxlike.data import loader, reader, sources
from maxlike.data.data import Data
from maxlike.data.mixture import Mixture
from maxlike.data.tokenizers import Bytes
from maxlike.errors import UserError

LENGTH, BATCH = 24, 8


@pytest.fixture
def two(tmp_path, corpus):
    (tmp_path / "small.txt").write_text("A short text of letters, fit for a second source; " * 4)
    return {"large": corpus, "small": sources.Text(paths=str(tmp_path / "small.txt"))}


def data_of(two, **knobs):
    phases = ((0, {"large": 3, "small": 1}), (5, {"large": 1, "small": 1}))
    return Data(**({"sources": two, "tokenizer": Bytes(), "mixture": Mixture(phases=phases)} | knobs))


def open_train(two, seed=0, batch_size=BATCH, **knobs):
    return data_of(two, **knobs).train(sequence_length=LENGTH, batch_size=batch_size, seed=seed)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        assert a[name].dtype == b[name].dtype


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_fields_follow_from_the_documents_by_definition(two, packing):
    """Every field, token by token, from the pieces and the documents they name."""
    batches = open_train(two, packing=packing)
    table = Bytes().bytes_per_token
    for step in (0, 7):
        batch = batches.batch(step)
        expected = {name: np.zeros((BATCH, LENGTH + 1), np.int64) for name in ("tokens", "segment", "position")}
        expected["tokens"][:] = Bytes.eos_id
        at, number = np.zeros(BATCH, int), np.zeros(BATCH, int)
        for piece, text in zip(batches.documents(step), batches.text(step)):
            layers = batches._layers[piece.source]
            names = [layers.tokens.name(d) for d in range(layers.tokens.documents)]
            document = layers.tokens.read(np.array([names.index(piece.document)]))[0]
            content = document[piece.offset : piece.offset + piece.length]
            assert Bytes().decode(content) == text
            here = slice(at[piece.row], at[piece.row] + piece.length)
            number[piece.row] += 1
            expected["tokens"][piece.row, here] = content
            expected["segment"][piece.row, here] = number[piece.row]
            expected["position"][piece.row, here] = np.arange(piece.length)
            at[piece.row] += piece.length
        segment = expected["segment"]
        weights = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
        np.testing.assert_array_equal(batch["inputs"], expected["tokens"][:, :-1])
        np.testing.assert_array_equal(batch["targets"], expected["tokens"][:, 1:])
        np.testing.assert_array_equal(batch["segment_ids"], segment[:, :-1])
        real = segment[:, :-1] > 0
        np.testing.assert_array_equal(batch["positions"][real], expected["position"][:, :-1][real])
        np.testing.assert_array_equal(batch["loss_weights"], weights)
        np.testing.assert_array_equal(batch["target_bytes"], np.where(weights, table[expected["tokens"][:, 1:]], 0))
        assert {str(value.dtype) for name, value in batch.items() if name != "loss_weights"} == {"int32"}
        assert batch["loss_weights"].dtype == np.float32


def test_any_start_and_the_random_access_agree(two):
    batches = open_train(two)
    with batches.iterate() as straight:
        whole = [next(straight) for _ in range(9)]
        assert straight.step == 9
    for start in (0, 4, 6):
        with batches.iterate(start) as resumed:
            for step in range(start, 9):
                same(next(resumed), whole[step])
                same(batches.batch(step), whole[step])


@pytest.mark.large
def test_worker_processes_change_nothing_and_are_closed(two):
    transforms = (Reverse(0.5), add_field)
    batches = open_train(two, transforms=transforms)
    for workers in (1, 4):
        with open_train(two, workers=workers, transforms=transforms).iterate(3) as ahead:
            for step in range(3, 8):
                same(next(ahead), batches.batch(step))
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_take_contiguous_blocks_of_the_global_batch(two, hosts):
    batches = open_train(two)
    for step in (2, 6):
        parts = [batches.batch(step, host=host, hosts=hosts) for host in range(hosts)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        same(joined, batches.batch(step))
    with batches.iterate(6, host=hosts - 1, hosts=hosts) as ahead:
        same(next(ahead), parts[-1])


def test_no_row_twice_before_its_epoch_ends_also_across_phases(two):
    batches = open_train(two)
    steps = 90
    sources_of, rows_of = batches._reader.places(np.arange(steps * BATCH))
    accounts = batches.accounting(steps)
    for source, name in enumerate(two):
        given = rows_of[sources_of == source]
        count = batches._reader.rows[source].count
        assert len(given) == accounts[name]["rows"] > count  # more than an epoch
        for start in range(0, len(given), count):
            epoch = given[start : start + count]
            assert len(np.unique(epoch)) == len(epoch)
        assert (given[: len(epoch)] != epoch).any()


def test_accounting_is_what_the_batches_hold(two):
    batches = open_train(two)
    pieces = [piece for step in range(7) for piece in batches.documents(step)]
    rows_of = dict.fromkeys(two, 0)
    for step in range(7):
        for name in {piece.row: piece.source for piece in batches.documents(step)}.values():
            rows_of[name] += 1
    accounts = batches.accounting(7)
    assert {name: account["rows"] for name, account in accounts.items()} == rows_of
    assert sum(account["tokens"] for account in accounts.values()) == 7 * BATCH * LENGTH
    assert {piece.source for piece in pieces} == set(two)
    asked = (5 * 3 / 4 + 2 / 2) / 7
    assert accounts["large"]["asked"] == pytest.approx(asked)
    assert abs(accounts["large"]["realised"] - asked) <= 2 / (7 * BATCH)
    assert batches.accounting(0)["large"] == {"rows": 0, "tokens": 0, "epochs": 0, "asked": 0.75, "realised": 0}
    table = batches.describe(7)
    assert [row["source"] for row in table] == list(two)
    assert table[0]["epochs"] == accounts["large"]["epochs"]


class Reverse:
    """Reverses a row's tokens with a probability; leaves a mark."""

    def __init__(self, probability):
        self.probability = probability

    def __call__(self, row, generator):
        turned = generator.random() < self.probability
        tokens = row["tokens"][::-1] if turned else row["tokens"]
        return row | {"tokens": tokens, "turned": np.int32(turned)}


def add_field(row, generator):
    return row | {"draw": generator.random(3)}


def already_shifted(row, generator):
    inputs = row.pop("tokens")[:-1]
    return {"inputs": inputs, "targets": inputs}


def test_transforms_draw_from_seed_and_example_alone(two):
    transforms = (Reverse(0.5), add_field)
    batches = open_train(two, transforms=transforms)
    plain = open_train(two).batch(2)
    batch = batches.batch(2)
    assert 0 < batch["turned"].sum() < BATCH and batch["draw"].shape == (BATCH, 3)
    for row in range(BATCH):
        expected = plain["targets"][row, ::-1] if batch["turned"][row] else plain["inputs"][row]
        np.testing.assert_array_equal(batch["inputs"][row], expected)
    same(batches.batch(2, host=1, hosts=2), {name: value[BATCH // 2 :] for name, value in batch.items()})
    assert (open_train(two, seed=1, transforms=transforms).batch(2)["draw"] != batch["draw"]).all()
    assert open_train(two, transforms=(already_shifted,)).batch(0).keys() == {"inputs", "targets"}


def test_fingerprint_names_what_changed(two, tmp_path):
    base = open_train(two)
    changed = {
        "order (seed, batch_size, sequence_length)": open_train(two, seed=1),
        "mixture": open_train(two, mixture={"large": 1, "small": 2}),
        "source large": open_train(two, packing="best_fit"),
        "transforms": open_train(two, transforms=(Reverse(0.5),)),
    }
    assert base.fingerprint == open_train(two).fingerprint
    for name, other in changed.items():
        differing = {key for key in base.identity() if base.identity()[key] != other.identity()[key]}
        assert name in differing and (name == "source large" or differing == {name})
        assert other.fingerprint != base.fingerprint
    halves = [open_train(two, transforms=(Reverse(p),)).fingerprint for p in (0.5, 0.25)]
    assert halves[0] != halves[1]
    branch = Mixture(phases=((0, {"large": 3, "small": 1}), (5, {"small": 1})))
    branched = open_train(two, mixture=branch)
    assert branched.identity(5) == base.identity(5)
    assert branched.identity(6) != base.identity(6)
    assert branched.fingerprint != base.fingerprint
    for step in range(5):
        same(branched.batch(step), base.batch(step))
    (tmp_path / "0.jsonl").write_text('{"text": "another document"}\n' * 9)
    assert open_train(two).identity()["source large"] != base.identity()["source large"]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_validation_holds_every_target_once_with_exact_bytes(two, texts, packing):
    held = data_of(two, validation=two, packing=packing).open_validation(sequence_length=LENGTH, batch_size=BATCH)
    batches = list(held)
    assert len(batches) == len(held)
    assert all(value.shape == (BATCH, LENGTH) for batch in batches for value in batch.values())
    total = sum(len(text.encode()) for text in texts) + 200
    assert sum(int(batch["target_bytes"].sum()) for batch in batches) == total
    assert sum(int(batch["loss_weights"].sum()) for batch in batches) == total + len(texts) + 1  # and each eos
    last = batches[-1]
    filler = last["segment_ids"].max(axis=1) == 0
    assert filler.any() and last["loss_weights"][filler].sum() == 0
    assert sum(int(batch["target_bytes"].sum()) for batch in held.of("small")) == 200
    for step in (0, len(held) - 1):
        halves = [held.batch(step, host=host, hosts=2) for host in (0, 1)]
        same({name: np.concatenate([half[name] for half in halves]) for name in last}, held.batch(step))
    with pytest.raises(UserError, match="no validation source 'x'"):
        held.of("x")


def test_a_notebook_without_parsed_flags_reads_with_workers(two, monkeypatch):
    flags = loader.absl.flags.FLAGS
    monkeypatch.setattr(type(flags), "is_parsed", lambda self: False)
    with open_train(two).iterate() as ahead:
        assert next(ahead)["inputs"].shape == (BATCH, LENGTH)


def test_rows_that_do_not_fill_are_refused():
    with pytest.raises(UserError, match="do not fill"):
        reader.fields_of(np.zeros((1, 9), np.int32), np.array([[0, 0, 8]]), np.array([1]))


def test_refusals(two, tmp_path):
    batches = open_train(two)
    with pytest.raises(UserError, match="batch_size=8 cannot be shared by 3 hosts"):
        batches.batch(0, host=0, hosts=3)
    with pytest.raises(UserError, match="batch_size=0"):
        open_train(two, batch_size=0)
    (tmp_path / "short.txt").write_text("tiny")
    short = Data(sources=sources.Text(paths=str(tmp_path / "short.txt")), tokenizer=Bytes())
    with pytest.raises(UserError, match="'train' has 6 tokens, fewer than a row"):
        short.train(sequence_length=LENGTH, batch_size=2, seed=0)
    capped = Mixture(phases=((0, {"large": 1, "small": 1}),), max_epochs=2.0)
    with pytest.raises(UserError, match="small more often than"):
        data_of(two, mixture=capped).train(sequence_length=LENGTH, batch_size=BATCH, seed=0, steps=20)
