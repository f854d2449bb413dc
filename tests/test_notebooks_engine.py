"""Each notebook in nbs/engine runs as saved, with --all or if its stamp is old; see test_notebooks.check_run."""
import pytest
from test_notebooks import EVERY, check_run, installed, tool  # noqa: F401


@pytest.mark.parametrize("path", [one for one in EVERY if tool.kind_of(one.values[0]) == "engine"])
def test_runs_and_saved_outputs_are_true(path, installed, request):  # noqa: F811
    check_run(path, installed, request.config)
