"""Surgery on models: parts replaced in place, with a report of what was done and what was not, and a way back.

Every conversion takes `only` and `skip`, which choose layers, and `dry_run`; every report prints as a table, is data
(`to_dict`), and has `undo`.
"""

from effkern._convert_cluster import cluster
from effkern._convert_cluster_report import ClusterReport, Palettized
from effkern._convert_finalize import finalize, restore
from effkern._convert_monarch import Monarchized, MonarchReport, monarchize
from effkern._convert_report import Report
from effkern._convert_reversible import Reversed, ReversibleReport, reversible
from effkern._convert_surgery import Filter

__all__ = [
    "ClusterReport",
    "Filter",
    "MonarchReport",
    "Monarchized",
    "Palettized",
    "Report",
    "Reversed",
    "ReversibleReport",
    "cluster",
    "finalize",
    "monarchize",
    "restore",
    "reversible",
]
