"""Where the shared data lie: `AJ_SHARED`, or `../shared`. Absent data skip a test, but fail it where `AJ_SHARED` was set."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def shared(name: str) -> Path:
    """The path of a shared file."""
    asked = os.environ.get("AJ_SHARED")
    path = (Path(asked) if asked else ROOT.parent / "shared") / name
    if not path.exists():
        message = f"shared data are absent: {name} (set AJ_SHARED to their folder)"
        pytest.fail(message) if asked else pytest.skip(message)
    return path
