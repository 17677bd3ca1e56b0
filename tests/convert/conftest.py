"""At the end of a run: the worst difference of each imported model to its own code."""


def pytest_terminal_summary(terminalreporter):
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    found = {
        name.removeprefix("worst "): float(value)
        for report in reports
        for name, value in dict(getattr(report, "user_properties", ())).items()
        if name.startswith("worst ")
    }
    if found:
        terminalreporter.section("largest difference of logits")
        for name, value in found.items():
            terminalreporter.write_line(f"{name:28} {value:.2e}")
