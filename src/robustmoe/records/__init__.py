"""The result file: one header, then one row an image, then the checks. Read, write, resume, validate, merge.

JSON lines, append-only, each batch written at once and flushed to the disk, so that a killed evaluation loses at most
the batch it was working on. Between the rows of a suite stand lines for the images that a part did not break. Numbers
that are not finite are written as Python's ``json`` writes them (``NaN``, ``Infinity``).
Bad content and failed writes raise :class:`~robustmoe.errors.UserError`, one line each.
"""

from robustmoe.records.audit import Audit
from robustmoe.records.blend import Blend
from robustmoe.records.certificates import Certificates, Proof
from robustmoe.records.dissection import Answers, Dissection
from robustmoe.records.evaluation import Evaluation
from robustmoe.records.examples import Example, examples_path, read_examples, write_examples
from robustmoe.records.files import append_json, assert_ours, file_stem, read_jsonl, set_aside, write_atomic, write_own
from robustmoe.records.forecast import Forecast, ForecastPart
from robustmoe.records.lipschitz import Lipschitz
from robustmoe.records.locks import at_work, check_folder, contents, restarted, writing
from robustmoe.records.record import Record, Records, Told
from robustmoe.records.rows import WORK, Writer, difference, differing, read, rows_files
from robustmoe.records.shards import joined_shards, merge
from robustmoe.records.sweep import Override, Sweep, SweepAnswers
from robustmoe.records.training import read_config, read_metrics, read_some_config
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
    Resumed,
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
    "Evaluation",
    "Example",
    "Forecast",
    "ForecastPart",
    "Header",
    "Lipschitz",
    "ObjectiveInfo",
    "Override",
    "Passed",
    "Proof",
    "Record",
    "Records",
    "Resumed",
    "RouterInfo",
    "Row",
    "Sweep",
    "SweepAnswers",
    "Time",
    "Told",
    "Writer",
    "append_json",
    "assert_ours",
    "at_work",
    "check_folder",
    "contents",
    "difference",
    "differing",
    "examples_path",
    "file_stem",
    "joined_shards",
    "merge",
    "read",
    "read_config",
    "read_examples",
    "read_jsonl",
    "read_metrics",
    "read_some_config",
    "restarted",
    "rows_files",
    "set_aside",
    "write_atomic",
    "write_examples",
    "write_own",
    "writing",
]
