"""What a run of PEFT's tests recorded, and how two runs compare."""

from typing import NamedTuple


class Result(NamedTuple):
    """Of one test: "passed", "failed" or "skipped"; fused calls, the modules they ran for; the error's first line."""

    outcome: str = "passed"
    calls: int = 0
    modules: int = 0
    why: str = ""


class Comparison(NamedTuple):
    """Tests that pass in the first run, and what became of them in the second."""

    expected: int
    failed: dict[str, str]
    calls: int
    modules: int

    def __str__(self) -> str:
        lines = [
            f"{self.expected - len(self.failed)} of {self.expected} pass; "
            f"{self.calls} fused calls, in {self.modules} modules"
        ]
        return "\n".join(lines + [f"  FAILED {name}: {why}" for name, why in sorted(self.failed.items())])

    @property
    def is_good(self) -> bool:
        """Whether all pass, and patching had something to do."""
        return not self.failed and self.calls > 0


def passed(results: dict[str, Result]) -> set[str]:
    return {name for name, result in results.items() if result.outcome == "passed"}


def compare(first: dict[str, Result], second: dict[str, Result]) -> Comparison:
    expected = passed(first)
    ran = {name: second[name] for name in expected if name in second}
    failed = {name: f"{result.outcome}: {result.why}" for name, result in ran.items() if result.outcome != "passed"}
    failed |= dict.fromkeys(expected - ran.keys(), "it did not run")
    calls, modules = (sum(getattr(result, field) for result in ran.values()) for field in ("calls", "modules"))
    return Comparison(len(expected), failed, calls, modules)
