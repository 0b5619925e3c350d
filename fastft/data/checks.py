"""The data checks before the first step.

Each data set is read once (`scan`); the core's checks look at what that gathered, then the
adapter's own checks read the samples they need. Names in `data.checks.ignore` leave checks out:
those in `CORE_CHECKS`, and those of the adapter's check functions with dashes.
"""

from collections.abc import Iterable, Mapping, Sequence

from rich.text import Text

from fastft.config import ChecksConfig
from fastft.data.core_checks import CORE_CHECKS, Scans
from fastft.data.scan import SeededSamples, scan_source
from fastft.data.sources import OpenSource
from fastft.errors import ConfigError, DataError, nearest
from fastft.task import CheckData, DataCheck, FieldSpec, Finding


def check_data(
    sources: Sequence[OpenSource],
    checks: Sequence[DataCheck],
    fields: Mapping[str, FieldSpec],
    config: ChecksConfig,
) -> list[Finding]:
    """Runs the checks; returns the warnings.

    Raises:
        DataError: lists all findings that are errors.
        ConfigError: `config.ignore` names an unknown check.
    """
    findings = run_checks(sources, checks, fields, config)
    if errors := [finding for finding in findings if finding.severity == "error"]:
        raise DataError(
            f"{finding.where}: {finding.what}, as {finding.example}; {finding.advice}"
            f" (or add '{finding.check}' to data.checks.ignore)"
            for finding in errors
        )
    return findings


def run_checks(
    sources: Sequence[OpenSource],
    checks: Sequence[DataCheck],
    fields: Mapping[str, FieldSpec],
    config: ChecksConfig,
) -> list[Finding]:
    """All findings of the core's checks and of `checks`, errors first.

    Args:
        sources: opened data sets of all splits.
        checks: the adapter's.
        fields: the model's expectations (`Task.fields`).
        config: thresholds, and names to ignore.

    Raises:
        ConfigError: `config.ignore` names an unknown check.
    """
    own = {_check_name(check): check for check in checks}
    known = {*CORE_CHECKS, *own}
    if unknown := [name for name in config.ignore if name not in known]:
        raise ConfigError(
            f"data.checks.ignore: must name checks; got '{name}'{nearest(name, sorted(known))}"
            for name in unknown
        )
    scans = [scan_source(source, fields, config.max_samples) for source in sources]
    gathered = Scans(scans, fields, config)
    findings = [
        finding
        for name, check in CORE_CHECKS.items()
        if name not in config.ignore
        for finding in check(gathered)
    ]
    samples = CheckData(
        [(s.source.name, s.source.split, SeededSamples(s.source, s.indices)) for s in scans], fields
    )
    for name, check in own.items():
        if name not in config.ignore:
            findings.extend(check(samples))
    kept = (finding for finding in findings if finding.check not in config.ignore)
    return sorted(kept, key=lambda finding: finding.severity)


def describe_findings(findings: Iterable[Finding]) -> Text:
    """The findings, two lines each, to print."""
    styles = {"error": "bold red", "warning": "yellow"}
    text = Text()
    for finding in findings:
        text.append(f"{finding.severity} ({finding.check})", styles[finding.severity])
        text.append(f" {finding.where}: {finding.what}, as {finding.example}\n  {finding.advice}\n")
    text.rstrip()
    return text


def _check_name(check: DataCheck) -> str:
    """The function's name with dashes; of any other callable its class's."""
    return getattr(check, "__name__", type(check).__name__).replace("_", "-")
