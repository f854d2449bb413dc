"""The notebooks are the source: in step with the package, clean, fresh, and each runs from its first cell to its last."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import notebooks as tool  # noqa: E402

EVERY = [pytest.param(path, id=path.stem) for path in tool.notebooks()]


def test_package_is_what_the_notebooks_export():
    assert tool.out_of_step() == [], "run: python tools/notebooks.py export"


@pytest.mark.parametrize("path", EVERY)
def test_clean_and_stamped(path):
    assert tool.is_clean(path), f"run: python tools/notebooks.py run {path.stem}"
    assert tool.is_stamped(path), f"outputs are older than the code: python tools/notebooks.py run {path.stem}"


@pytest.mark.parametrize("path", EVERY)
def test_runs_and_saved_outputs_are_true(path):
    saved = tool.read(path)
    found = tool.differences(saved, tool.execute(path))
    assert not found, "\n\n".join(found)


def test_a_changed_module_makes_outputs_stale():
    nb = tool.read(tool.notebooks()[1])
    before = tool.fingerprint(nb)
    code = next(c for c in nb["cells"] if c["cell_type"] == "code")
    code["source"] = [*code["source"], "\n1 + 1"]
    assert tool.fingerprint(nb) != before


@pytest.mark.parametrize("a, b, same", [
    ("loss 1.234", "loss 1.235", True), ("loss 1.2", "loss 1.5", False), ("7 tokens", "8 tokens", False),
    ("a 1.0", "b 1.0", False), ("1,000 ids", "1,000 ids", True)])
def test_texts_are_compared_up_to_rounding(a, b, same):
    assert tool.same_text(a, b) is same
