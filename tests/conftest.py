"""Eight simulated CPU devices for every test; set before jax is imported by anything."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import absl.flags

absl.flags.FLAGS(["pytest"])  # Grain's workers read absl flags, which somebody must have parsed


def pytest_addoption(parser):
    parser.addoption("--update-goldens", action="store_true", help="rewrite the golden tables and losses")
