"""Rules from a file, and the numbers of the command line that stand for some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from purepruning.arguments import shown


def read_rules(path: Path) -> list[dict[str, Any]]:
    """Returns the rules in a JSON or YAML file: a list, or an object with one at ``"rules"``.

    auptimizer's ``"config_list"`` is read too, alone or inside of ``"compression"``.

    Raises:
        ValueError, TypeError: it holds something else; the message names file and line.
        OSError: it cannot be read.
    """
    content = _load(path)
    if isinstance(content, dict):
        inner = content.get("compression", content)
        for key in ("rules", "config_list"):
            if isinstance(inner, dict) and key in inner:
                content = inner[key]
                break
        else:
            if "steps" in content or "purepruning" in content:
                raise ValueError(f"{path} is a recipe of steps; give it to purepruning run")
            content = [content]  # one rule
    if not isinstance(content, list) or not all(isinstance(rule, dict) for rule in content):
        raise TypeError(f"{path}: rules must be a list of objects, got {shown(content)}")
    if not content:
        raise ValueError(f"{path}: there are no rules; write one, such as {{'sparsity': 0.8}}")
    return content


def _load(path: Path) -> Any:
    text = path.read_bytes()
    if path.suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError:
            raise ValueError(
                f"{path}: YAML needs PyYAML; pip install 'purepruning[yaml]', or write JSON"
            ) from None
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}; mend the YAML") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; mend the JSON there"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: it is no UTF-8; save it as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deeply; write a list of rules") from None
