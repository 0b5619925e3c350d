import dataclasses
import sys

import pytest

from fastft.errors import AdapterError, ConfigError
from fastft.userfile import import_file


def test_a_file_may_import_its_neighbours(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "userfile_neighbour.py").write_text("width = 3\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\nimport userfile_neighbour\n"
        "@dataclasses.dataclass\nclass Options:\n    width: int = userfile_neighbour.width\n"
    )
    module = import_file(file, where="here")
    assert sys.modules["fastft_user_mine"] is module
    assert dataclasses.asdict(module.Options()) == {"width": 3}


def test_what_is_no_python_file(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("")
    for name, got in (("absent.py", "no such file"), ("text.txt", "another suffix")):
        with pytest.raises(ConfigError, match=f"here: .*{name} must be a .py file; got {got}"):
            import_file(tmp_path / name, where="here")


def test_the_line_of_a_syntax_error(tmp_path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("x = 1\ny = = 2\n")
    with pytest.raises(AdapterError, match=r"here: .*broken.py, line 2: must be valid Python"):
        import_file(file, where="here", error=AdapterError)


def test_what_the_file_raises_passes(tmp_path) -> None:
    file = tmp_path / "raises.py"
    file.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        import_file(file, where="here")
