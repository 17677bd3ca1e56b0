"""Checkpoints with the real Orbax on a real disk: exactness, meshes, damage, refusals, keep policies."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxlike import checkpoint_files, manifest
from maxlike.checkpoint import Checkpoints
from maxlike.errors import UserError

PRINTS = {"tokenizer": "t1", "data": "d1"}
META = {"data_position": 7, "config": "a.b = 1", "fingerprints": PRINTS, "revision": "abc"}


def mesh_of(**shape):
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def placed(tree, mesh):
    """Matrices split over the mesh's first axis, everything else on all devices; Python numbers stay."""

    def place(leaf):
        if isinstance(leaf, int | np.ndarray):
            return leaf
        spec = PartitionSpec(mesh.axis_names[0]) if leaf.ndim == 2 else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, tree)


def make_state(seed=0, mesh=None):
    key = jax.random.key(seed)
    params = {
        "stack": {0: {"q": jax.random.normal(key, (16, 6))}, 1: {"gain": jnp.arange(5, dtype=jnp.bfloat16)}},
        "embed": jax.random.normal(jax.random.fold_in(key, 1), (8, 4)),
    }
    state = {
        "params": params,
        "optimizer": optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params),
        "key": jax.random.split(key, 3),
        "step": 11 + seed,
        "counter": np.asarray([1, 2], np.int64),
    }
    if mesh is None:
        return state
    return jax.tree.map(
        lambda leaf, where: jax.device_put(leaf, where) if isinstance(leaf, jax.Array) else leaf,
        state,
        placed(state, mesh),
    )


def abstract(state, mesh=None):
    def form(leaf, where):
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if mesh is None else where)

    return jax.tree.map(form, state, state if mesh is None else placed(state, mesh))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y) or isinstance(x, jax.Array)
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(x) == jax.random.key_impl(y)
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="session")
def two_saved(tmp_path_factory):
    """A directory with checkpoints 1 and 2 of different states, to be copied and damaged."""
    directory = tmp_path_factory.mktemp("saved")
    store = Checkpoints().open(directory)
    store.save(1, make_state(1), META | {"data_position": 1})
    store.save(2, make_state(2), META | {"data_position": 2})
    store.close()
    return directory


@pytest.mark.parametrize("saved_on", [None, {"fsdp": 8}])
@pytest.mark.parametrize("restored_on", [None, {"fsdp": 8}, {"tensor": 2, "data": 4}])
def test_round_trip_is_exact_onto_any_mesh(open_store, saved_on, restored_on):
    state = make_state(3, mesh_of(**saved_on) if saved_on else None)
    store = open_store()
    store.save(5, state, META)
    target = abstract(make_state(0), mesh_of(**restored_on) if restored_on else None)
    restored, metadata = store.restore(target, PRINTS)
    assert metadata == META
    assert_same(restored, make_state(3))
    for leaf, form in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        if isinstance(form, jax.ShapeDtypeStruct):
            assert leaf.sharding.is_equivalent_to(form.sharding, leaf.ndim)


def test_donating_the_state_while_it_is_being_saved_does_not_change_what_is_saved(open_store):
    update = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    x = jnp.arange(1 << 20, dtype=jnp.float32)
    expected = np.array(x)
    store = open_store()
    store.save(1, {"x": x}, META)
    for _ in range(10):
        x = update(x)
    x.block_until_ready()
    restored, _ = store.restore({"x": jax.ShapeDtypeStruct(expected.shape, jnp.float32)}, {})
    np.testing.assert_array_equal(restored["x"], expected)


def files_of(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("harm", ["truncate", "flip", "delete"])
def test_damage_to_any_file_is_detected(two_saved, tmp_path, harm):
    names = files_of(two_saved / "2")
    assert len(names) > 6
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(two_saved / "2", copy)
        assert manifest.damage(copy) is None
        path = copy / name
        content = bytearray(path.read_bytes())
        if harm == "truncate":
            path.write_bytes(content[:-1])
        elif harm == "delete":
            path.unlink()
        else:
            content[len(content) // 2] ^= 0x10
            path.write_bytes(content)
        assert name in manifest.damage(copy)
        shutil.rmtree(copy)


def test_a_damaged_checkpoint_falls_back_to_the_newest_good_one_and_says_so(two_saved, tmp_path, open_store, said):
    shutil.copytree(two_saved, tmp_path / "checkpoints")
    largest = max(
        (path for path in (tmp_path / "checkpoints/2").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:100])
    reader = open_store(read_only=True)
    state, metadata = reader.restore(abstract(make_state()), PRINTS)
    assert_same(state, make_state(1))
    assert metadata["data_position"] == 1
    assert len(said) == 1 and "checkpoint 2 is damaged" in said[0] and "falling back to step 1" in said[0]
    assert reader.steps() == [1, 2]  # a reader touches nothing
    with pytest.raises(UserError, match="checkpoint 2 is damaged"):
        reader.restore(abstract(make_state()), PRINTS, step=2)

    writer = open_store()
    writer.restore(abstract(make_state()), PRINTS)
    assert writer.steps() == [1]
    assert (tmp_path / "checkpoints/2.damaged").is_dir()


def test_nothing_intact_is_an_error_and_nothing_is_moved(two_saved, tmp_path, open_store):
    shutil.copytree(two_saved, tmp_path / "checkpoints")
    for step in "12":
        (tmp_path / "checkpoints" / step / manifest.NAME).unlink()
    store = open_store()
    with pytest.raises(UserError, match=r"checkpoint 2 is damaged.*checkpoint 1 is damaged"):
        store.restore(abstract(make_state()), PRINTS)
    assert store.steps() == [1, 2]
    with pytest.raises(UserError, match=r"no checkpoint of step 9 .* \[1, 2\]"):
        store.restore(abstract(make_state()), PRINTS, step=9)


def test_what_differs_is_refused_with_a_table(two_saved):
    store = Checkpoints().open(two_saved, read_only=True)
    target = abstract(make_state())
    target["params"]["embed"] = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)  # Orbax alone would cast
    target["params"]["stack"][0]["q"] = jax.ShapeDtypeStruct((16, 7), jnp.float32)
    target["params"]["stack"][2] = {"new": jax.ShapeDtypeStruct((3,), jnp.float32)}
    del target["params"]["stack"][1]
    target["step"] = 0.5
    with pytest.raises(UserError) as caught:
        store.restore(target, PRINTS)
    lines = [line.split() for line in str(caught.value).splitlines()[2:]]
    assert lines == [
        ["missing", "params/stack/2/new", "float32[3]"],
        ["extra", "params/stack/1/gain", "bfloat16[5]"],
        ["changed", "params/embed", "float32[8,", "4]", "bfloat16[8,", "4]"],
        ["changed", "params/stack/0/q", "float32[16,", "6]", "float32[16,", "7]"],
        ["changed", "step", "python", "int[]", "python", "float[]"],
    ]


def test_a_changed_fingerprint_is_refused_by_name_unless_allowed(two_saved):
    store = Checkpoints().open(two_saved, read_only=True)
    changed = PRINTS | {"tokenizer": "t2"}
    with pytest.raises(UserError, match=r"the tokenizer changed since checkpoint 2 .*then t1, now t2.*allow_changed"):
        store.restore(abstract(make_state()), changed)
    with pytest.raises(UserError, match=r"the weights changed .*then not recorded"):
        store.restore(abstract(make_state()), PRINTS | {"weights": "w"})
    store.restore(abstract(make_state()), changed, allow={"tokenizer"})
    store.restore(abstract(make_state()), lambda step: PRINTS | {"data": f"d{step}"}, step=1)
    Checkpoints(allow_changed=("tokenizer",)).open(two_saved, read_only=True).restore(abstract(make_state()), changed)


def test_trees_may_be_left_on_disk_but_not_forgotten(two_saved, monkeypatch):
    state = make_state(2)
    used = {name: tree for name, tree in abstract(state).items() if name != "optimizer"}
    store = Checkpoints().open(two_saved, read_only=True)
    with pytest.raises(UserError, match=r"extra +optimizer/"):
        store.restore(used, PRINTS)
    read = []
    read_leaves = checkpoint_files.read_leaves
    monkeypatch.setattr(
        checkpoint_files,
        "read_leaves",
        lambda where, wanted, saved: read.extend(wanted) or read_leaves(where, wanted, saved),
    )
    assert set(store.restore(used, PRINTS, without={"optimizer"})[0]) == set(used)
    assert read and not any(path.startswith("optimizer") for path in read)
    with pytest.raises(UserError, match=r"missing +params/more"):
        store.restore(used | {"params": used["params"] | {"more": jnp.ones(1)}}, PRINTS, without={"optimizer"})


def test_another_format_is_refused(two_saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_saved, copy)
    record = copy / "2/metadata/metadata"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 99}))
    manifest.write(copy / "2", manifest.facts(copy / "2"))
    with pytest.raises(UserError, match="format 99"):
        Checkpoints().open(copy, read_only=True).restore(abstract(make_state()), PRINTS)


@pytest.mark.parametrize(
    ("knobs", "values", "kept"),
    [
        ({"keep": 2}, {}, [5, 6]),
        ({"keep": 1, "every": 1, "keep_every": 2}, {}, [2, 4, 6]),
        ({"keep": 1, "keep_best": "loss"}, {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0}, [2, 6]),
        ({"keep": 3, "keep_best": "loss", "asynchronous": False}, {}, [4, 5, 6]),
    ],
)
def test_keep_policies(open_store, knobs, values, kept):
    store = open_store(**knobs)
    for step in range(1, 7):
        store.save(step, {"x": jnp.ones(2)}, {}, {"loss": values[step]} if step in values else None)
    store.wait()
    assert store.steps() == kept
    assert sorted(int(path.name) for path in store.directory.iterdir()) == kept  # nothing else lies about
    assert store.failures == 0


def test_saving_after_an_older_step_was_restored_replaces_the_abandoned_future(open_store):
    store = open_store(keep=3)
    for step in (1, 2, 3):
        store.save(step, {"x": jnp.full(2, step)}, {})
    form = {"x": jax.ShapeDtypeStruct((2,), jnp.int32)}
    store.restore(form, {}, step=1)
    store.save(1, {"x": jnp.full(2, 99)}, {})  # already there, and it is this run's own past
    store.save(2, {"x": jnp.full(2, 22)}, {})
    store.wait()
    assert store.steps() == [1, 2]
    assert [int(store.restore(form, {}, step=step)[0]["x"][0]) for step in (1, 2)] == [1, 22]


def test_leftovers_of_a_killed_save_are_swept_by_the_owner_alone(tmp_path, open_store):
    for name in ("5.unfinished", "5.unfinished.orbax-checkpoint-tmp", "3.removed", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert open_store(read_only=True).latest() is None
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4
    assert open_store().latest() is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["notes"]


def test_mistakes_of_the_caller_are_raised_not_counted_as_disk_failures(open_store):
    store = open_store()
    for state in ({"x": "text"}, {"x": jnp.zeros((0, 2))}, {"x": True}):
        with pytest.raises(TypeError, match="cannot hold x"):
            store.save(1, state, {})
    with pytest.raises(TypeError):
        store.save(1, {"x": jnp.ones(1)}, {"config": object()})
    deleted = jnp.ones(3)
    deleted.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        store.save(1, {"x": deleted}, {})
    assert store.failures == 0
    store.save(1, {"x": jnp.ones(3)}, {})
    store.wait()
    assert store.steps() == [1]


@pytest.mark.parametrize("knobs", [{"every": 0}, {"keep": 0}, {"every": 10, "keep_every": 15}, {"keep_every": 5}])
def test_knobs_out_of_range_are_refused_by_name(knobs):
    with pytest.raises(UserError, match=r"Checkpoints\.\w+ = "):
        Checkpoints(**knobs)


def test_due():
    assert [step for step in range(10) if Checkpoints(every=3).due(step)] == [3, 6, 9]
