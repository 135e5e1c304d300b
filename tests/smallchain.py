"""The quickstart with little data, for tests that run it whole."""

from pathlib import Path

import yaml

STAGES = [
    "traces", "cold_start", "rl", "rejection", "sft2", "rl_final", "distill_data", "student", "eval"
]  # fmt: skip


def resized(file: Path, rows: dict[str, int]) -> dict:
    """Return a recipe's settings with `rows` of data for each configuration file, or 8."""
    settings = yaml.safe_load(file.read_text())
    own = settings["tasks"] if isinstance(settings.get("tasks"), list) else []
    for task in own:
        task["size"] = rows.get(file.stem, 8) // len(own)
    for stage in settings.get("stages", []):
        if "size" in stage:
            stage["size"] = rows[Path(stage["config"]).stem] // 3
    return settings
