"""Files in YAML, with numbers as LightningCLI reads them: ``1e-3`` is one, as in YAML 1.2.

PyYAML has the rules of YAML 1.1, by which it is a text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    pass


_EXPONENT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def read_yaml(path: Path, meaning: str) -> Any:
    """Returns what a file has.

    Args:
        path: The file.
        meaning: What it is for, as in "has the settings"; for the error if it does not exist.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not YAML in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist. Give the YAML file that {meaning}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from None
    return load_yaml(text, str(path))


def load_yaml(text: str, where: str) -> Any:
    """Returns what a text in YAML has.

    Args:
        text: The text.
        where: Where it is from, for an error.

    Raises:
        ValueError: If it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # PyYAML lets those of Python pass, as about the date 2024-13-01
        raise ValueError(f"{where} is not YAML: {error}") from None
