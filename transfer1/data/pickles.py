"""Reading pickles without running what is in them.

The dataset layout stores arrays, lists and dicts as pickles. A pickle may call any function when
it is read, so this reader builds plain containers, numbers, strings and numpy arrays, and refuses
all else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

# The functions that numpy's own pickles name: before numpy 2 ("core") and since ("_core").
ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
}


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickler that resolves only the names in `ALLOWED`."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def load_pickle(path: str | Path) -> Any:
    """Return the content of a pickle made of containers, scalars, strings and numpy arrays.

    Raises:
        ValueError: the file is missing or broken, or wants to build anything else. Names the file.
    """
    try:
        with open(path, "rb") as file:
            return RestrictedUnpickler(file).load()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise ValueError(
            f"{path}: not a pickle of lists, dicts and numpy arrays ({error}); write it again with "
            f"nothing but these"
        ) from error
