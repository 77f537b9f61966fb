"""What people receive: the wheel without the repository, licences, and environments in step."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import paligemma
from paligemma.support import picture_files, tensors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTICE = (ROOT / "NOTICE").read_text()
CAPTION = "a cat and two dogs"
MEGABYTE = 2**20


def run(*command, **options) -> str:
    """What a command prints; it may not fail."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- the wheel


def shipped() -> set[str]:
    """The package as it lies in the repository."""
    files = (path for path in (ROOT / "paligemma").rglob("*") if path.is_file())
    return {str(f.relative_to(ROOT)) for f in files if "__pycache__" not in f.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without network, from a copy that the build may litter, with the tests beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("paligemma", "tests", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "inference.py"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index"]
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - about == shipped()
    assert {"paligemma/py.typed", "paligemma/assets/tiny/model.safetensors"} < names
    assert {name.split("/", 1)[1] for name in about} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"),
        *("licenses/LICENSE", "licenses/NOTICE"),
    }
    assert wheel.stat().st_size < 8 * MEGABYTE


def test_package_holds_no_stray_file():
    endings = {path.split("/")[-1].split(".", 1)[-1] for path in shipped() if "LICENSE" not in path}
    assert endings == {"py", "typed", "png", "jpg", "json", "safetensors", "model", "md"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel; of this one it sees the other packages, not the repository."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "others.pth").write_text("\n".join(others))  # a .pth file in there is not followed
    return python


def test_installed_it_answers_without_the_repository(installed, tmp_path):
    code = """
import importlib, importlib.metadata, json, pkgutil, sys
import paligemma
from paligemma.support import picture_files, tensors
from paligemma.inference import TINY
pg = paligemma.load()
answer = pg(TINY.parent / "pictures" / "scene.png", "caption en")
names = [m.name for m in pkgutil.walk_packages(paligemma.__path__, "paligemma.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
files = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "paligemma"]
about = importlib.metadata.distribution("paligemma")
points = {p.name: p.load().__module__ for p in about.entry_points}
licences = [str(f) for f in about.files if "/licenses/" in str(f)]
print(json.dumps([answer, names, files, sys.path, about.version, points, licences, str(TINY)]))
"""
    printed = run(installed, "-I", "-c", code, cwd=tmp_path)
    answer, modules, files, path, version, points, licences, tiny = json.loads(printed)
    assert answer == CAPTION
    assert len(modules) == sum(name.endswith(".py") for name in shipped()) - 1  # paligemma itself
    assert len(files) >= len(modules) and str(ROOT) not in path
    assert all(file.startswith(str(installed.parents[1])) for file in [*files, tiny])
    assert version == PROJECT["version"] == paligemma.__version__
    assert points.keys() == PROJECT["scripts"].keys() and len(licences) == 2
    scene = Path(tiny).parent / "pictures" / "scene.png"
    for command in ([installed, "-I", "-m", "paligemma"], [installed.with_name("paligemma")]):
        said = run(*command, "--image_file_path", scene, "--prompt", "caption en", cwd=tmp_path)
        assert said == f"{CAPTION}\n"
    for name in points:
        assert run(installed.with_name(name), "--help", cwd=tmp_path).startswith(f"usage: {name}")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- licences


PATTERNS = [
    pattern
    for line in NOTICE.splitlines()
    if re.fullmatch(r"[\w.*/-]+/[\w.*-]*(, [\w.*/-]+)*", line)
    for pattern in line.split(", ")
]
FOLDERS = ("paligemma/assets", "notebooks/reference", "figures", "tests/adapters")


def material() -> list[str]:
    """Every file that is neither code nor text of the course."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = [str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts]
    return [name for name in names if not name.endswith(".py")]


def test_notice_covers_every_file_and_names_none_that_is_gone():
    files = material()
    assert [f for f in files if not any(fnmatch(f, pattern) for pattern in PATTERNS)] == []
    assert [p for p in PATTERNS if not any(fnmatch(f, p) for f in files)] == []
    assert len(PATTERNS) > 10


def test_material_lies_in_these_folders_only():
    endings = {".png", ".jpg", ".svg", ".safetensors", ".model", ".npz", ".pt", ".bin", ".ttf"}
    folders = [ROOT / name for name in ("paligemma", "notebooks", "figures", "tests", "tools")]
    files = [str(p.relative_to(ROOT)) for top in folders for p in top.rglob("*")]
    files = [name for name in files if Path(name).suffix in endings]
    assert files and [name for name in files if not name.startswith(FOLDERS)] == []


def test_licences_that_notice_names_are_there():
    named = set(re.findall(r"paligemma/assets/[\w/]+/LICENSE\.[\w.-]*\w", NOTICE))
    present = {str(path.relative_to(ROOT)) for path in ROOT.glob("paligemma/assets/**/LICENSE*")}
    assert named == present and len(named) == 3
    assert all(len((ROOT / name).read_text()) > 500 for name in named)


# ---------------------------------------------------------------- environments


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert len({pin.name.lower() for pin in pins}) == len(pins)
    return {canonicalize_name(pin.name): pin for pin in pins}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for group in (PROJECT["dependencies"], *extras) for text in group]


def test_every_dependency_is_pinned_to_what_pyproject_allows():
    pins = constraints()
    unpinned = {need.name for need in requirements() if canonicalize_name(need.name) not in pins}
    assert unpinned == {"gradio"}  # no release of it takes the pillow that the notebooks ran with
    for need in requirements():
        if need.name not in unpinned:
            (pin,) = pins[canonicalize_name(need.name)].specifier
            assert pin.operator == "==" and need.specifier.contains(pin.version), need


def test_environments_install_the_same():
    makefile = (ROOT / "Makefile").read_text()
    installs = re.findall(r'--editable "?\.(?:\[([\w,]+)\])?"?$', makefile, re.M)
    extras = {extra for names in installs for extra in names.split(",")} - {""}
    assert len(installs) == 3 and extras == {"dev", "reference", "distributed"}
    conda = (ROOT / "environment.yml").read_text()
    assert set(re.search(r"-e \.\[([\w,]+)\]", conda)[1].split(",")) == extras
    assert extras <= PROJECT["optional-dependencies"].keys()
    assert re.search(r"pytorch-cpu(\S+)", conda)[1] == str(
        next(need.specifier for need in requirements() if need.name == "torch")
    )


def test_one_lowest_python_and_one_version_everywhere():
    lowest = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])[1]
    project = (ROOT / "pyproject.toml").read_text()
    assert f'target-version = "py3{lowest}"' in project
    makefile = (ROOT / "Makefile").read_text()
    assert f"sys.version_info < (3, {lowest})" in makefile
    assert f"Python 3.{lowest} or newer" in " ".join((ROOT / "README.md").read_text().split())
    conda = (ROOT / "environment.yml").read_text()
    assert int(re.search(r"python=3\.(\d+)", conda)[1]) >= int(lowest)
    versions = {PROJECT["version"], importlib.metadata.version("paligemma")}
    versions.add(re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1])
    assert versions == {paligemma.__version__}


# ---------------------------------------------------------------- no code from data


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, object]]]:
    """Each call's name, and those of its keywords that are constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            words = {
                k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
            }
            yield ast.unparse(node.func), words


def test_nothing_that_is_read_can_run_code():
    """As SECURITY.md says: no pickles, nothing evaluated."""
    seen = set()
    for file in (ROOT / "paligemma").rglob("*.py"):
        for name, words in calls(ast.parse(file.read_text())):
            seen.add(name)
            last = name.split(".")[-1]
            assert name not in ("eval", "exec", "compile", "os.system"), file
            assert not name.startswith(("pickle.", "marshal.", "shelve.", "joblib.")), file
            assert name != "torch.load" or words.get("weights_only") is True, file
            assert last != "load" or not name.startswith("np.") or words == {"allow_pickle": False}
            assert words.get("shell") is not True and "trust_remote_code" not in words, file
    assert {"torch.load", "np.load"} <= seen


def test_security_names_what_exists():
    text = (ROOT / "SECURITY.md").read_text()
    for name in ("vae-oid.npz", "weights_only=True", "256 MiB", "MAX_IMAGE_PIXELS", "privat"):
        assert name in text
    assert tensors.ARRAYS == picture_files.STANDARD_INPUT == 256 * MEGABYTE
