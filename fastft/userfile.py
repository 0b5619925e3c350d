"""Importing a user's own Python file."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from fastft.errors import ConfigError, FastftError


def import_file(path: Path, *, where: str, error: type[FastftError] = ConfigError) -> ModuleType:
    """Runs a Python file as the module `fastft_user_<stem>`; its folder goes on `sys.path`.

    Args:
        path: the file.
        where: the setting that names it, for messages.
        error: raised where the file is missing or is no Python; what the file raises passes.
    """
    if not path.is_file() or path.suffix != ".py":
        got = "another suffix" if path.is_file() else "no such file"
        raise error(f"{where}: {path} must be a .py file; got {got}; correct the path")
    name = f"fastft_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their module up by name.
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        # Last, so that a file of the user's never hides an installed package.
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as cause:
        raise error(
            f"{where}: {cause.filename}, line {cause.lineno}: must be valid Python;"
            f" got {cause.msg}; correct it"
        ) from cause
    return module
