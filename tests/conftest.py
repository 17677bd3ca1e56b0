"""Eight simulated CPU devices, set before anything imports jax, and one compile cache for the session."""

import atexit
import os
import shutil
import tempfile

# Compile time is the test budget: LLVM's optimiser costs several times what it saves on shapes this small. The commands
# that tests launch, and the experiments, are compiled as a user's are.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The first process makes the cache; xdist's workers and launched commands inherit it.
if "MAXLIKE_TEST_CACHE" not in os.environ:
    os.environ["MAXLIKE_TEST_CACHE"] = tempfile.mkdtemp(prefix="maxlike-tests-")
    atexit.register(shutil.rmtree, os.environ["MAXLIKE_TEST_CACHE"], ignore_errors=True)
os.environ["MAXLIKE_CACHE"] = os.environ["MAXLIKE_TEST_CACHE"]
# The same program compiles once in the whole session, as it does for a user who runs a command twice.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["MAXLIKE_TEST_CACHE"], "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import absl.flags  # noqa: E402
import pytest  # noqa: E402

absl.flags.FLAGS(["pytest"])  # Grain's workers read absl flags, which somebody must have parsed


def pytest_addoption(parser):
    parser.addoption("--update-goldens", action="store_true", help="rewrite the golden tables and losses")


def pytest_terminal_summary(terminalreporter):
    """The worst difference of each network or layer to the code it was published with: what tests recorded by
    `record_property("worst NAME", difference)`.

    Here and not beside the tests: under xdist the process that prints reads no conftest but this.
    """
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    found = {
        name.removeprefix("worst "): float(value)
        for report in reports
        for name, value in dict(getattr(report, "user_properties", ())).items()
        if name.startswith("worst ")
    }
    if found:
        terminalreporter.section("largest difference to the published code")
        for name, value in sorted(found.items()):
            terminalreporter.write_line(f"{name:40} {value:.2e}")


@pytest.fixture
def said():
    """What the stores of `open_store` have told."""
    return []


@pytest.fixture
def open_store(tmp_path, said):
    """A function that opens tmp_path/checkpoints with the knobs of `Checkpoints`; all are closed at the end."""
    from maxlike.checkpoint import Checkpoints  # not before the flags above are read

    stores = []

    def opener(read_only=False, **knobs):
        store = Checkpoints(**knobs).open(tmp_path / "checkpoints", read_only=read_only, say=said.append)
        stores.append(store)
        return store

    yield opener
    for store in stores:
        store.close()
