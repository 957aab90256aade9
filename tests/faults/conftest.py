"""Every test here is a campaign, which counts its cases; the counts are said at the end."""

import json
from pathlib import Path

import pytest
import transformers
from campaigns import SEED, Tally

transformers.utils.logging.disable_progress_bar()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def tally(request):
    return Tally(request)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section(f"cases (FAULTS_SEED={SEED})")
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    for report in sorted(reports, key=lambda report: report.nodeid):
        for name, value in report.user_properties:
            if name == "counts":
                counts = ", ".join(f"{number} {what}" for what, number in json.loads(value).items())
                name = report.nodeid.rpartition("/")[2]
                terminalreporter.write_line(f"{report.outcome} {report.duration:5.0f} s  {name}: {counts}")
