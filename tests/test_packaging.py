"""The package as it is installed: a wheel, an sdist, a checkout; and what importing it costs."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USE = (
    "import lark_fast, lark_fast.kernels.token_stats as home, torch, pathlib;"
    "from lark_fast import token_stats;"
    "token_stats(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]));"
    "print(pathlib.Path(lark_fast.__file__).parent, home.__file__)"
)


def python(*arguments, cwd, interpreter=sys.executable, **settings):
    done = subprocess.run([interpreter, *arguments], cwd=cwd, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist of a copy of the checkout's tracked layout."""
    out = tmp_path_factory.mktemp("dist")
    copy = tmp_path_factory.mktemp("copy")
    for name in ("lark_fast", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        subprocess.run(["cp", "-r", ROOT / name, copy / name], check=True)
    python("-m", "build", "--no-isolation", "--outdir", out, copy, cwd=out)
    return {path.suffix: path for path in out.iterdir()}


def test_wheel_holds_kernels_in_their_place_only(built):
    names = zipfile.ZipFile(built[".whl"]).namelist()
    assert "lark_fast/kernels/token_stats.py" in names
    assert "lark_fast/kernels/__init__.py" not in names
    # A top-level `kernels` is the Hugging Face package that Transformers probes for.
    assert {name.split("/")[0] for name in names} == {"lark_fast", f"lark_fast-{version()}.dist-info"}
    for module in (ROOT / "lark_fast").rglob("*.py"):
        relative = module.relative_to(ROOT).as_posix()
        assert relative in names or relative == "lark_fast/kernels/__init__.py", f"{relative} is not shipped"
    assert {f"lark_fast/report/page/{name}" for name in ("page.html.j2", "page.js", "style.css")} <= set(names)


def test_import_from_the_wheel(built, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, system_site_packages=False, with_pip=False, symlinks=True)
    interpreter = home / "bin" / "python"
    target = next((home / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(built[".whl"]).extractall(target)
    # The dependencies are this interpreter's; lark_fast itself must come from the wheel, at the root and elsewhere.
    (target / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    for folder in (tmp_path, target):
        printed = python("-c", USE, cwd=folder, interpreter=interpreter)
        assert printed.split() == [str(target / "lark_fast"), str(target / "lark_fast/kernels/token_stats.py")]


def test_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[".gz"]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    python("-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "again", source, cwd=tmp_path)
    (again,) = (tmp_path / "again").iterdir()
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(built[".whl"]).namelist())


def test_import_from_a_checkout_that_is_not_installed(tmp_path):
    printed = python("-c", USE, cwd=ROOT).split()
    assert printed == [str(ROOT / "lark_fast"), str(ROOT / "kernels/token_stats.py")]
    elsewhere = {"PYTHONPATH": str(ROOT), "PATH": ""}
    assert python("-c", USE, cwd=tmp_path, env=elsewhere).split() == printed


def test_transformers_does_not_take_our_kernels_for_its_own():
    program = "import transformers, importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    assert python("-c", program, cwd=ROOT).strip().endswith("None")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_is_lean():
    program = "import sys, lark_fast; print({'torch', 'triton', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules))"
    assert python("-c", program, cwd=ROOT).strip() == "set()"
    program = (
        "import sys; from lark_fast import token_stats, g_hat; print({'triton', 'transformers'} & set(sys.modules))"
    )
    assert python("-c", program, cwd=ROOT).strip() == "set()"


def test_public_names():
    program = (
        "import lark_fast as our\n"
        "print(*(getattr(our, name).__name__ for name in our.__all__), hasattr(our, 'nothing'))"
    )
    printed = python("-c", program, cwd=ROOT).split()
    assert printed == [
        "Scorer",
        "TrajectoryScore",
        "ScoringQueue",
        "TokenStats",
        "g_hat",
        "chi2_weights",
        "chi2_solve",
        "Chi2Solution",
        "token_stats",
        "token_stats_from_logits",
        "trajectory_reduce",
        "linear_cross_entropy",
        "False",
    ]


def version():
    return python("-m", "lark_fast", "--version", cwd=ROOT).strip()
