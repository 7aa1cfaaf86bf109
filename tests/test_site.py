"""The documentation as a site (T0): it builds with every link and anchor followed; a wrong one ends the build."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
import site_build

pytestmark = pytest.mark.no_poison

ROOT = site_build.ROOT


@pytest.fixture(scope="module")
def overlay():
    try:
        return site_build.overlay()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"requirements/docs.txt cannot be installed: {error.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def hook(overlay):
    sys.path.append(str(overlay))
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(overlay))


def test_the_site_builds_strictly(overlay, tmp_path, capfd):
    assert site_build.build(str(tmp_path)) == 0, capfd.readouterr().err
    home = (tmp_path / "index.html").read_text()
    assert 'src="speed.png"' in home
    assert 'href="why-not-fused/"' in home
    for name in ("lora_linear", "lora_gated_mlp"):
        assert f'id="lorafuse.functional.{name}"' in (tmp_path / "api" / "functional" / "index.html").read_text()
    assert "fully_shard" in (tmp_path / "examples" / "fsdp2.py" / "index.html").read_text()


def test_a_link_that_leads_nowhere_ends_the_build(overlay, tmp_path, capfd):
    """A small site with the same settings and hook, without API pages."""
    root = tmp_path / "checkout"
    for name in ("docs", "examples", "bench"):
        (root / name).mkdir(parents=True)
    for name in ("docs/site_pages.py", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, root / name)
    (root / "README.md").write_text("[here](docs/page.md) and [nowhere](docs/absent.md)")
    (root / "bench" / "README.md").write_text("[home](../README.md)")
    (root / "docs" / "page.md").write_text("# A page\n\n[part](#absent)\n\n[code](../lorafuse/env.py)\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    (root / "mkdocs.yml").write_text(settings[: settings.index("plugins:")] + settings[settings.index("validation:") :])
    assert site_build.build(str(tmp_path / "site"), root) != 0
    message = capfd.readouterr().err
    for link in ("absent.md", "#absent", "../lorafuse/env.py"):
        assert f"'{link}'" in message


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("README.md", "![a](docs/speed.png)", "![a](speed.png)"),
        ("README.md", "[a](bench/README.md)", "[a](results.md)"),
        ("docs/fsdp.md", "[a](../examples/fsdp2.py)", "[a](examples/fsdp2.py.md)"),
        ("docs/api/nn.md", "[a](../moe.md#x)", "[a](../moe.md#x)"),
        ("docs/studies/README.md", "![a](/docs/studies/rl.png)", "![a](rl.png)"),
        ("bench/README.md", "[a](../docs/hopper.md)", "[a](hopper.md)"),
        ("docs/a.md", "[a](https://example.org/b) [b](#c) [c](../lorafuse/env.py)", None),
    ],
)
def test_links_lead_where_they_lead_in_the_checkout(hook, source, text, expected):
    assert hook.linked(text, source) == (expected or text)
