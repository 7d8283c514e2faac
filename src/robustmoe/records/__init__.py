"""The result file: one header, then one row an image, then the checks. Read, write, resume, validate, merge.

JSON lines, append-only, each batch written at once and flushed to the disk, so that a killed evaluation loses at most
the batch it was working on. Between the rows of a suite stand lines for the images that a part did not break. Numbers
that are not finite are written as Python's ``json`` writes them (``NaN``, ``Infinity``).
Bad content and failed writes raise :class:`~robustmoe.errors.UserError`, one line each.
"""

from robustmoe.records.audit import Audit, audit_path, read_audit, write_audit
from robustmoe.records.blend import Blend, blend_path, read_blend, write_blend
from robustmoe.records.certificates import (
    Certificates,
    Proof,
    certificates_path,
    read_all_certificates,
    read_certificates,
    write_certificates,
)
from robustmoe.records.dissection import Answers, Dissection, dissection_path, read_dissection, write_dissection
from robustmoe.records.examples import Example, examples_path, read_examples, write_examples
from robustmoe.records.files import append_json, read_jsonl, write_atomic
from robustmoe.records.lipschitz import Lipschitz, lipschitz_path, read_lipschitz, write_lipschitz
from robustmoe.records.rows import WORK, Writer, difference, merge, read, rows_files
from robustmoe.records.sweep import Override, Sweep, SweepAnswers, read_sweep, sweep_path, write_sweep
from robustmoe.records.types import (
    NORMS,
    PRECISIONS,
    ROLES,
    STATUSES,
    VERSION,
    Check,
    Checks,
    Header,
    ObjectiveInfo,
    Passed,
    Result,
    RouterInfo,
    Row,
    Time,
)

__all__ = [
    "NORMS",
    "PRECISIONS",
    "ROLES",
    "STATUSES",
    "VERSION",
    "WORK",
    "Answers",
    "Audit",
    "Blend",
    "Certificates",
    "Check",
    "Checks",
    "Dissection",
    "Example",
    "Header",
    "Lipschitz",
    "ObjectiveInfo",
    "Override",
    "Passed",
    "Proof",
    "Result",
    "RouterInfo",
    "Row",
    "Sweep",
    "SweepAnswers",
    "Time",
    "Writer",
    "append_json",
    "audit_path",
    "blend_path",
    "certificates_path",
    "difference",
    "dissection_path",
    "examples_path",
    "lipschitz_path",
    "merge",
    "read",
    "read_all_certificates",
    "read_audit",
    "read_blend",
    "read_certificates",
    "read_dissection",
    "read_examples",
    "read_jsonl",
    "read_lipschitz",
    "read_sweep",
    "rows_files",
    "sweep_path",
    "write_atomic",
    "write_audit",
    "write_blend",
    "write_certificates",
    "write_dissection",
    "write_examples",
    "write_lipschitz",
    "write_sweep",
]
