"""Files in YAML, with numbers as LightningCLI reads them: ``1e-3`` is one, as in YAML 1.2.

PyYAML has the rules of YAML 1.1, by which it is a text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses a key that is there twice, of which PyYAML drops the first."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} is there twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


_EXPONENT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def read_yaml(path: Path, meaning: str) -> Any:
    """Returns what a file has.

    Args:
        path: The file.
        meaning: What it is for, as in "has the settings"; for the error if it does not exist.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is a folder, or not YAML in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder. Give the YAML file that {meaning}.") from None
    except (FileNotFoundError, NotADirectoryError):
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
