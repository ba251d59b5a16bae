"""What pytest says at its end: what was tested, and how long each part took."""

from collections import defaultdict

SLOW = 10.0  # seconds; a test that takes longer is marked and says why


def pytest_collection_modifyitems(items):
    """The reason of a slow test travels with its report, from whichever process runs it."""
    for item in items:
        mark = item.get_closest_marker("slow")
        if mark and mark.args:
            item.user_properties.append(("slow", mark.args[0]))


def duration(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def pytest_terminal_summary(terminalreporter):
    seconds, reasons = defaultdict(float), {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "nodeid"):
                seconds[report.nodeid] += report.duration
                reasons.update(
                    (report.nodeid, reason)
                    for name, reason in report.user_properties
                    if name == "slow"
                )
    cells = defaultdict(dict)
    for name in list(seconds):
        path, _, cell = name.partition("::")
        if path.endswith(".ipynb"):
            cells[path.split("/")[-1]][cell] = seconds.pop(name)
    write = terminalreporter.write_line
    terminalreporter.section("what was tested (times are of one core)", sep="-")
    write(f"{len(seconds):>5} unit tests in {duration(sum(seconds.values()))}")
    for name, took in sorted(seconds.items(), key=lambda item: -item[1]):
        if name in reasons:
            write(f"{duration(took):>11}  {name.split('/')[-1]}, slow: {reasons[name]}")
        elif took > SLOW:
            write(
                f"{duration(took):>11}  {name.split('/')[-1]}, not marked as slow: quicker, or a mark and a reason"
            )
    if cells:
        total = sum(sum(times.values()) for times in cells.values())
        write(
            f"{len(cells):>5} notebooks, {sum(map(len, cells.values()))} cells, in {duration(total)}"
        )
        for name, times in sorted(cells.items()):
            write(f"{duration(sum(times.values())):>11}  {name}, {len(times)} cells")
