"""What is built is the package, whole, and nothing else."""

import zipfile
from pathlib import Path

from house.tree import FOLDERS, PYPROJECT, ROOT, modules

DATA = {"py.typed", *(str(file.relative_to(ROOT)) for file in (ROOT / "recipes").rglob("*.html"))}


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    wanted = {str(file.relative_to(ROOT)) for file in modules().values()} | DATA
    assert names - metadata == {f"lamina/{name}" for name in wanted}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_the_report_page_is_among_its_data():
    assert any(name.endswith(".html") for name in DATA)


def test_the_package_list_names_every_folder():
    folders = {file.parent.relative_to(ROOT) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    wanted = {"lamina", *(".".join(("lamina", *folder.parts)) for folder in folders)}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == wanted
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)
