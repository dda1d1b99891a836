"""Where the operators' source is, and the library that is compiled from it."""

from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
LIBRARY = Path(__file__).with_name("kernels.so")
