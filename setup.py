"""Package metadata; tool settings are in pyproject.toml, exact versions in requirements.lock."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="transfer1",
    version="0.1.0",
    description="Training of a controllable video world model: a video diffusion transformer with "
    "control branches, and its fused kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=find_packages(include=["kernels", "kernels.*", "transfer1", "transfer1.*"]),
    package_data={"transfer1": ["**/*.json"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=2.0",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",  # hydra 1.3 does not work with 2.4
        "attrs>=23.2",
        "einops>=0.8",
        "av>=14",
        "opencv-python-headless>=4.11",
        "safetensors>=0.4.5",
        "loguru>=0.7",
        "rich>=13",
        "matplotlib>=3.9",
    ],
    extras_require={
        "tensorboard": ["tensorboard>=2.17"],
        "profile": ["nvtx>=0.2.11"],  # trainer.nvtx=true
        "test": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "diffusers==0.42.1",  # the peer model
            "ema-pytorch==0.8.3",  # a peer; timm and Liger-Kernel are others: see the Makefile
            "nvtx>=0.2.11",
            "tensorboard>=2.17",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
